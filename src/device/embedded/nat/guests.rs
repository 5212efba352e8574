//! What a translator knows of a network's guests, and how frames get to them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use vmring_core::offload::OffloadHeader;
use vmring_embedded::RouterEnd;
use vmring_embedded::dhcp::AddressHolder;
use vmring_nat::sys::Host;
use vmring_nat::{Full, Link, Nat, Output, Port};

use super::limits::{ADDRESSES, ADDRESSES_MAX, ADDRESSES_SHARE, LOOK_FIRST, LOOK_MAX};
use super::names::GuestNames;
use crate::device::slot::PostedSlot;

/// The guests' ports, as a translator sends to them.
pub(super) struct Guests {
    pub(super) end: RouterEnd<PostedSlot>,
    mtu: u32,
    /// The ports that have taken no frame. The translator asks for space with a shared borrow.
    full: RefCell<Vec<FullPort>>,
}

/// A port that has taken no frame. Nobody says when it does again: a guest would pay for that with each
/// batch of buffers that it posts. So it is looked at, sooner if it has just begun.
struct FullPort {
    port: Port,
    /// When to look at it next. `None` if it has just begun.
    at: Option<Duration>,
    pause: Duration,
}

impl Guests {
    pub(super) fn new(end: RouterEnd<PostedSlot>, mtu: u32) -> Self {
        Self { end, mtu, full: RefCell::default() }
    }

    fn note_full(&self, port: Port) {
        let mut full = self.full.borrow_mut();
        if full.iter().all(|other| other.port != port) {
            full.push(FullPort { port, at: None, pause: LOOK_FIRST });
        }
    }

    /// A port has left.
    pub(super) fn port_left(&mut self, port: Port) {
        self.full.get_mut().retain(|other| other.port != port);
    }

    /// Tells the translator of ports that take frames again.
    pub(super) fn look_for_space(&mut self, nat: &mut Nat<Host>, now: Duration) {
        let mut index = 0;
        while let Some(full) = self.full.get_mut().get_mut(index) {
            index += 1;
            if full.at.is_none_or(|at| at > now) {
                continue;
            }
            let (port, pause) = (full.port, (full.pause * 2).min(LOOK_MAX));
            if self.end.space(port.0) > 0 {
                index -= 1;
                self.full.get_mut().swap_remove(index);
                nat.on_space(port, now, self);
                // It comes back to the end of the list if it has taken none again.
            } else {
                (full.at, full.pause) = (Some(now + pause), pause);
            }
        }
    }

    /// When to call [`look_for_space`](Self::look_for_space) next.
    pub(super) fn next_look(&mut self, now: Duration) -> Option<Duration> {
        let full = self.full.get_mut().iter_mut();
        full.map(|full| *full.at.get_or_insert(now + LOOK_FIRST)).min()
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
    /// How long to wait after that look if the gateway sees a change.
    pause: Duration,
    /// The leases at the last look: the guest, and its port if that was known.
    leased: HashMap<Ipv4Addr, ([u8; 6], Option<u32>)>,
    reserved: HashMap<Ipv4Addr, [u8; 6]>,
    names: GuestNames,
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
            let age = if seen == changes { ADDRESSES_MAX } else { self.pause };
            if now < at + age {
                return;
            }
        }
        self.seen = Some((changes, now));
        let begin = Instant::now();
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
                // A guest that has the address by right keeps it.
                let mac = holder.mac.into_array();
                let _ = sources.check(Port(port), mac, holder.address.into(), micros);
            }
        }
        self.names.follow(dhcp.host_names(guests.end.now()), nat);
        // A guest can make the gateway see changes, and a look costs more if there are many leases.
        self.pause = (begin.elapsed() * ADDRESSES_SHARE).max(ADDRESSES);
    }
}
