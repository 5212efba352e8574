//! What a translator knows of a network's guests, and how frames get to them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use vmring_core::offload::OffloadHeader;
use vmring_embedded::RouterEnd;
use vmring_embedded::dhcp::AddressHolder;
use vmring_nat::sys::Host;
use vmring_nat::{Full, Link, Nat, Output, Port};

use super::limits::{ADDRESSES, ADDRESSES_MAX, LOOK_FIRST, LOOK_MAX};
use crate::device::slot::PostedSlot;

/// The guests' ports, as a translator sends to them.
pub(super) struct Guests {
    pub(super) end: RouterEnd<PostedSlot>,
    mtu: u32,
    /// The ports that have taken no frame, and when to look again. The translator asks for space with a
    /// shared borrow.
    full: RefCell<FullPorts>,
}

/// Ports that have taken no frame. Nobody says when they do again: a guest that posts buffers would pay
/// for it with each batch. So they are looked at, sooner if they have just begun.
#[derive(Default)]
struct FullPorts {
    ports: Vec<(Port, Duration)>,
    look_at: Option<Duration>,
}

impl Guests {
    pub(super) fn new(end: RouterEnd<PostedSlot>, mtu: u32) -> Self {
        Self { end, mtu, full: RefCell::default() }
    }

    fn note_full(&self, port: Port) {
        let ports = &mut self.full.borrow_mut().ports;
        if ports.iter().all(|(other, _)| *other != port) {
            ports.push((port, Duration::ZERO));
        }
    }

    /// A port has left.
    pub(super) fn port_left(&mut self, port: Port) {
        self.full.get_mut().ports.retain(|(other, _)| *other != port);
    }

    /// Tells the translator of the ports that take frames again. Returns when the others are to be looked
    /// at.
    pub(super) fn look_for_space(
        &mut self,
        nat: &mut Nat<Host>,
        now: Duration,
    ) -> Option<Duration> {
        let full = self.full.get_mut();
        if full.ports.is_empty() {
            full.look_at = None;
            return None;
        }
        let due = full.look_at.is_none_or(|at| at <= now);
        if !due {
            return full.look_at;
        }
        let ports = std::mem::take(&mut full.ports);
        let mut pause = LOOK_MAX;
        for (port, waited) in ports {
            if self.end.space(port.0) > 0 {
                nat.on_space(port, now, self);
            } else {
                self.note_full(port);
            }
            let next = (waited * 2).clamp(LOOK_FIRST, LOOK_MAX);
            // It has taken none again, or not all.
            let full = self.full.get_mut().ports.iter_mut().find(|(other, _)| *other == port);
            if let Some((_, waited)) = full {
                *waited = next;
                pause = pause.min(next);
            }
        }
        let full = self.full.get_mut();
        full.look_at = (!full.ports.is_empty()).then_some(now + pause);
        full.look_at
    }

    /// Whether a port has been full since the last look.
    pub(super) fn has_full(&self) -> bool {
        let full = self.full.borrow();
        full.look_at.is_none() && !full.ports.is_empty()
    }
}

impl Output for Guests {
    fn link(&self, port: Port) -> Link {
        let link = self.end.link(port.0);
        Link { mtu: self.mtu, offloads: link.offloads, longest: link.longest }
    }

    fn space(&self, port: Port) -> usize {
        let space = self.end.space(port.0);
        if space == 0 {
            self.note_full(port);
        }
        space
    }

    fn send(&mut self, port: Port, frame: &[u8], header: &OffloadHeader) -> Result<(), Full> {
        self.end.send(port.0, frame, header).map_err(|_| {
            self.note_full(port);
            Full
        })
    }
}

/// The guests' addresses, as the network's gateway knows them.
#[derive(Default)]
pub(super) struct Addresses {
    /// What the gateway had seen at the last look, and when that was.
    seen: Option<(u64, Duration)>,
    /// The leases at the last look: the guest, and its port if that was known.
    leased: HashMap<Ipv4Addr, ([u8; 6], Option<u32>)>,
    reserved: HashMap<Ipv4Addr, [u8; 6]>,
}

impl Addresses {
    /// No address is anybody's but those that are reserved.
    pub(super) fn new(
        reservations: impl IntoIterator<Item = ([u8; 6], Ipv4Addr)>,
        nat: &mut Nat<Host>,
    ) -> Self {
        let mut reserved = HashMap::new();
        for (mac, address) in reservations {
            nat.sources().reserve(mac, address.into());
            reserved.insert(address, mac);
        }
        Self { reserved, ..Self::default() }
    }

    /// Tells the translator what has changed.
    pub(super) fn follow(&mut self, guests: &Guests, nat: &mut Nat<Host>, now: Duration) {
        let dhcp = guests.end.gateway().dhcp();
        let changes = dhcp.changes();
        if let Some((seen, at)) = self.seen {
            let age = if seen == changes { ADDRESSES_MAX } else { ADDRESSES };
            if now < at + age {
                return;
            }
        }
        self.seen = Some((changes, now));
        let holders = dhcp.holders(guests.end.now());
        let sources = nat.sources();
        let mut leased = HashMap::new();
        for holder in &holders {
            let AddressHolder { address, mac, port, leased: is_leased } = *holder;
            let mac = mac.into_array();
            if !is_leased {
                continue;
            }
            leased.insert(address, (mac, port));
            // What is as before stays as it is: the guest may be elsewhere by now.
            if self.leased.get(&address) == Some(&(mac, port)) {
                continue;
            }
            match port {
                Some(port) => _ = sources.lease(Port(port), mac, address.into()),
                None if sources.find(address.into()).is_some_and(|(_, has)| has == mac) => {}
                None => _ = sources.reserve(mac, address.into()),
            }
        }
        for address in self.leased.keys().filter(|address| !leased.contains_key(address)) {
            sources.free((*address).into());
            if let Some(mac) = self.reserved.get(address) {
                sources.reserve(*mac, (*address).into());
            }
        }
        self.leased = leased;
        let micros = now.as_micros() as u64;
        for holder in holders.iter().filter(|holder| !holder.leased) {
            if let Some(port) = holder.port {
                // Whoever has the address by right keeps it.
                let mac = holder.mac.into_array();
                let _ = sources.check(Port(port), mac, holder.address.into(), micros);
            }
        }
    }
}
