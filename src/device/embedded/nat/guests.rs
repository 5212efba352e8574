//! What a translator knows of a network's guests, and how frames get to them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmring_core::offload::OffloadHeader;
use vmring_embedded::RouterEnd;
use vmring_embedded::dhcp::AddressHolder;
use vmring_nat::dns::names::Names;
use vmring_nat::sys::{Host, Waker};
use vmring_nat::{Full, Guest, Link, Nat, Output, Port, Sources};

use super::limits::{
    ADDRESSES, ADDRESSES_MAX, ADDRESSES_SHARE, ASK_FOR_GUESTS, LOOK_FIRST, LOOK_MAX, ROUTES,
};
use super::names::GuestNames;
use crate::device::slot::PostedSlot;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering};
use crate::sys::lock;

/// The guests' ports, as a translator sends to them.
pub(super) struct Guests {
    pub(super) end: RouterEnd<PostedSlot>,
    mtu: u32,
    /// The ports that have taken no frame. The translator asks for space with a shared borrow.
    full: RefCell<Vec<FullPort>>,
    /// When guests may be asked for addresses next.
    ask_at: Duration,
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
        Self { end, mtu, full: RefCell::default(), ask_at: Duration::ZERO }
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

    /// Asks for the addresses that port forwards lead to and that nobody has used yet: a guest whose address
    /// is set by hand may only wait for connections.
    pub(super) fn ask_for_silent(&mut self, nat: &mut Nat<Host>, now: Duration) {
        if now < self.ask_at {
            return;
        }
        self.ask_at = now + ASK_FOR_GUESTS;
        let address = |guest| match guest {
            Guest::Address(address) => Some(address),
            Guest::Mac(_) => None,
        };
        let mut wanted: Vec<IpAddr> = nat.forward_guests().filter_map(address).collect();
        wanted.sort_unstable();
        wanted.dedup();
        for address in wanted {
            if nat.sources().find(address).is_none() {
                self.end.ask_for(address);
            }
        }
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

/// What the workers of a network know together: whose an address is and what guests are called, as the
/// network's gateway knows it.
pub(super) struct Directory {
    /// When all workers' time begins.
    start: Instant,
    /// What the gateway had seen at the last look.
    seen: AtomicU64,
    /// When to look next if the gateway sees a change, and when if it sees none, in microseconds.
    look_at: AtomicU64,
    look_anyway_at: AtomicU64,
    known: Mutex<Known>,
    names: Mutex<Arc<Names>>,
    /// How often the names have changed. The first ones are 1.
    names_changes: AtomicU64,
    /// What wakes the worker that looks at the host's routes.
    first: Mutex<Option<Waker>>,
    /// Whether a worker that does not look at the host's routes has got frames since the last look at them.
    has_frames: AtomicBool,
    /// When such a worker wakes the one that does, in microseconds.
    routes_at: AtomicU64,
}

/// The guests at the last look.
struct Known {
    sources: Sources,
    /// The leases: the guest, and its port if that was known.
    leased: HashMap<Ipv4Addr, ([u8; 6], Option<u32>)>,
    reserved: HashMap<Ipv4Addr, [u8; 6]>,
    names: GuestNames,
}

fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

impl Directory {
    /// No address is anybody's but those that are reserved, and there are no names but these.
    pub(super) fn new(
        mut sources: Sources,
        names: Names,
        reservations: impl IntoIterator<Item = ([u8; 6], Ipv4Addr)>,
    ) -> Self {
        let mut reserved = HashMap::new();
        for (mac, address) in reservations {
            sources.reserve(mac, address.into());
            reserved.insert(address, mac);
        }
        let known = Known {
            sources,
            leased: HashMap::new(),
            reserved,
            names: GuestNames::new(names.clone()),
        };
        Self {
            start: Instant::now(),
            first: Mutex::new(None),
            seen: AtomicU64::new(u64::MAX),
            look_at: AtomicU64::new(0),
            look_anyway_at: AtomicU64::new(0),
            known: Mutex::new(known),
            names: Mutex::new(Arc::new(names)),
            names_changes: AtomicU64::new(1),
            has_frames: AtomicBool::new(false),
            routes_at: AtomicU64::new(0),
        }
    }

    /// The time of all workers.
    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Whose an address is, for one more worker.
    pub(super) fn sources(&self) -> Sources {
        lock(&self.known).sources.clone()
    }

    /// Says what wakes the worker that looks at the host's routes.
    pub(super) fn set_first(&self, waker: Waker) {
        *lock(&self.first) = Some(waker);
    }

    /// Learns what the gateway has seen, if that is to be looked at, and tells one worker's translator of
    /// names if they have changed since it was `told`. What is learned of addresses holds for all workers.
    pub(super) fn follow(
        &self,
        guests: &Guests,
        nat: &mut Nat<Host>,
        told: &mut u64,
        now: Duration,
    ) {
        let changes = guests.end.gateway().dhcp().changes();
        if self.is_due(changes, now) {
            let mut known = lock(&self.known);
            // Another worker may have looked meanwhile.
            if self.is_due(changes, now) {
                self.look(&mut known, changes, guests, nat, now);
            }
        }
        // Acquire: pairs with the Release in `look`.
        let names_changes = self.names_changes.load(Ordering::Acquire);
        if *told != names_changes {
            *told = names_changes;
            let names = Arc::clone(&lock(&self.names));
            nat.names_mut().clone_from(&names);
        }
    }

    /// Whether the gateway is to be looked at.
    fn is_due(&self, changes: u64, now: Duration) -> bool {
        // Relaxed, all: whoever looks takes the lock.
        let seen = self.seen.load(Ordering::Relaxed);
        let at = if seen == changes { &self.look_anyway_at } else { &self.look_at };
        micros(now) >= at.load(Ordering::Relaxed)
    }

    fn look(
        &self,
        known: &mut Known,
        changes: u64,
        guests: &Guests,
        nat: &mut Nat<Host>,
        now: Duration,
    ) {
        let begin = Instant::now();
        let dhcp = guests.end.gateway().dhcp();
        let holders = dhcp.holders(guests.end.now());
        known.follow(&holders, guests, now);
        for port in known.names.follow(dhcp.host_names(guests.end.now())) {
            nat.count_refused_name(port);
        }
        let mut names = lock(&self.names);
        if **names != *known.names.table() {
            *names = Arc::new(known.names.table().clone());
            // Release: pairs with the Acquire in `follow`.
            self.names_changes.fetch_add(1, Ordering::Release);
        }
        drop(names);
        // A guest can make the gateway see changes, and a look costs more if there are many leases.
        let pause = (begin.elapsed() * ADDRESSES_SHARE).max(ADDRESSES);
        // Relaxed, all: see `is_due`.
        self.look_at.store(micros(now + pause), Ordering::Relaxed);
        self.look_anyway_at.store(micros(now + ADDRESSES_MAX), Ordering::Relaxed);
        self.seen.store(changes, Ordering::Relaxed);
    }

    /// Notes that a worker that does not look at the host's routes has got frames, and wakes the one that
    /// does, if it has not been woken for long.
    pub(super) fn note_frames(&self, now: Duration) {
        // Relaxed, all: the wake comes after these.
        if micros(now) >= self.routes_at.load(Ordering::Relaxed) {
            self.routes_at.store(micros(now + ROUTES), Ordering::Relaxed);
            self.has_frames.store(true, Ordering::Relaxed);
            if let Some(first) = &*lock(&self.first) {
                first.wake();
            }
        }
    }

    /// Whether other workers have got frames since the routes were looked at.
    pub(super) fn has_frames(&self) -> bool {
        self.has_frames.load(Ordering::Relaxed)
    }

    /// Says that the routes are looked at.
    pub(super) fn routes_are_seen(&self) {
        self.has_frames.store(false, Ordering::Relaxed);
    }
}

impl Known {
    fn follow(&mut self, holders: &[AddressHolder], guests: &Guests, now: Duration) {
        let sources = &mut self.sources;
        let mut leased = HashMap::new();
        for holder in holders {
            let AddressHolder { address, mac, port, leased: is_leased } = *holder;
            let mac = mac.into_array();
            if let Some(port) = port
                && let Some(generation) = guests.end.generation(port)
            {
                sources.set_generation(Port(port), generation);
            }
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
        for holder in holders.iter().filter(|holder| !holder.leased) {
            if let Some(port) = holder.port {
                // A guest that has the address by right keeps it.
                let mac = holder.mac.into_array();
                let _ = sources.note(Port(port), mac, holder.address.into(), micros(now));
            }
        }
    }
}
