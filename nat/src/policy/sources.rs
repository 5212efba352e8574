//! Which guest an address belongs to.
//!
//! An address of the subnet is nobody's at first. A lease gives it to a port and a MAC address. A
//! guest that never asks for a lease, because its address is set by hand or because it has outlived
//! an earlier process of the host, gets its address by using it: the first ARP or IP packet binds the
//! address to its port. From then on no other port may use it, until a lease says otherwise.
//!
//! A guest changes nothing but its own: it cannot use the gateway's address, a reservation of another
//! MAC address, or what another port has, and it holds at most [`SOURCES_PER_PORT`] addresses without
//! a lease.
//!
//! Several translators of one network share its addresses: a clone of [`Sources`] is one more handle to
//! them. A lock is taken when a flow is opened or refused, and for none of its later packets. What comes in
//! through a forward remembers the guest that it was for last, until an address changes hands.
//!
//! Translators learn at different times that a port has left and that its number is another's. So a handle
//! knows the generation of each port that it speaks for ([`Sources::set_generation`]). One that is late
//! binds nothing to the port that has the number now, and takes nothing from it.

use core::cell::Cell;
use core::net::IpAddr;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmring_core::sync::{AtomicU64, Ordering};

use crate::limits::SOURCES_PER_PORT;
use crate::output::Port;
use crate::policy::is_source;
use crate::prefix::Prefix;
use crate::stats::Counter;

/// A guest, by what its network knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guest {
    /// The guest that has this address.
    Address(IpAddr),
    /// The guest that has this MAC address, at the address that it has then.
    Mac([u8; 6]),
}

/// How an address came to its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// It was used first.
    Use,
    /// DHCP gave it, or the network's configuration reserves it.
    Lease,
}

#[derive(Clone, Copy, Debug)]
struct Binding {
    /// The port and its generation. None for a lease or a reservation whose guest has no port now.
    holder: Option<(Port, u32)>,
    mac: [u8; 6],
    by: By,
    /// When a flow was last opened from the address, in microseconds.
    used_at: u64,
}

/// What all handles share.
#[derive(Debug, Default)]
struct Table {
    bindings: HashMap<IpAddr, Binding>,
    /// What each port has by use.
    by_use: Vec<Vec<IpAddr>>,
    /// The latest generation of each port that any handle knows.
    generations: Vec<u32>,
}

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<Table>,
    /// How often an address has changed hands.
    changes: AtomicU64,
}

/// What a handle has found last, and how often an address had changed hands then.
type Found = (u64, (Guest, bool), (Port, [u8; 6], IpAddr));

/// The addresses of a network's guests. A clone is another handle to the same addresses.
#[derive(Debug)]
pub struct Sources {
    subnets: [Prefix; 2],
    gateways: [IpAddr; 2],
    shared: Arc<Shared>,
    /// The generation of each port that this handle speaks for.
    generations: Vec<u32>,
    /// The guest that was looked for last.
    found: Cell<Option<Found>>,
}

impl Clone for Sources {
    /// Another handle to the same addresses, which speaks for no port yet.
    fn clone(&self) -> Self {
        let (generations, found) = (Vec::new(), Cell::default());
        let shared = Arc::clone(&self.shared);
        Self { subnets: self.subnets, gateways: self.gateways, shared, generations, found }
    }
}

/// The generation of a port among these.
fn generation_of(generations: &[u32], port: Port) -> u32 {
    generations.get(port.0 as usize).copied().unwrap_or(0)
}

impl Sources {
    /// The addresses of these subnets. None but the gateways' is anybody's yet.
    pub fn new(subnets: [Prefix; 2], gateways: [IpAddr; 2]) -> Self {
        let (generations, found) = (Vec::new(), Cell::default());
        Self { subnets, gateways, shared: Arc::default(), generations, found }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that an address has changed hands, while the table is locked.
    fn changed(&self) {
        // Release: pairs with the Acquire in `resolve`. A handle that sees the number takes the lock.
        self.shared.changes.fetch_add(1, Ordering::Release);
    }

    /// Says which generation of a port this handle speaks for from now on. A port that gets the number of
    /// one that has left has a greater generation. The first one is 0.
    pub fn set_generation(&mut self, port: Port, generation: u32) {
        if generation_of(&self.generations, port) == generation {
            return;
        }
        let index = port.0 as usize;
        if index >= self.generations.len() {
            self.generations.resize(index + 1, 0);
        }
        self.generations[index] = generation;
        let latest = &mut self.table().generations;
        if index >= latest.len() {
            latest.resize(index + 1, 0);
        }
        latest[index] = latest[index].max(generation);
    }

    /// Whether an address can be a guest's at all.
    ///
    /// # Errors
    ///
    /// Why it cannot: [`BadSource`](Counter::BadSource), [`SourceOutside`](Counter::SourceOutside) or
    /// [`SourceGateway`](Counter::SourceGateway).
    pub fn is_possible(&self, address: IpAddr) -> Result<(), Counter> {
        if !is_source(address) {
            return Err(Counter::BadSource);
        }
        let subnet = self.subnets.iter().find(|subnet| subnet.contains(address));
        if subnet.is_none_or(|subnet| subnet.is_network_or_broadcast(address)) {
            return Err(Counter::SourceOutside);
        }
        if self.gateways.contains(&address) { Err(Counter::SourceGateway) } else { Ok(()) }
    }

    /// Whether a port's guest may send from an address, by ARP, neighbour discovery or IP. If the
    /// address is nobody's, it is this port's afterwards. `now` is in microseconds.
    ///
    /// # Errors
    ///
    /// Why not: as [`is_possible`](Self::is_possible), or the address is another MAC address's by
    /// lease or reservation ([`SourceReserved`](Counter::SourceReserved)) or another port's
    /// ([`SourceTaken`](Counter::SourceTaken)).
    pub fn check(
        &mut self,
        port: Port,
        mac: [u8; 6],
        address: IpAddr,
        now: u64,
    ) -> Result<(), Counter> {
        let generation = generation_of(&self.generations, port);
        if generation < generation_of(&self.table().generations, port) {
            return Err(Counter::SourceTaken);
        }
        self.bind((port, generation), mac, address, now)
    }

    /// [`check`](Self::check) for what the network has seen of a port itself, and no frame that this handle
    /// was given: it is about the port that has the number now.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn note(
        &mut self,
        port: Port,
        mac: [u8; 6],
        address: IpAddr,
        now: u64,
    ) -> Result<(), Counter> {
        let generation = self.latest(port);
        self.bind((port, generation), mac, address, now)
    }

    /// The generation of the port that has the number now, as far as any handle knows.
    fn latest(&self, port: Port) -> u32 {
        let own = generation_of(&self.generations, port);
        generation_of(&self.table().generations, port).max(own)
    }

    /// Makes an address a port's, if the port may have it.
    fn bind(
        &self,
        holder: (Port, u32),
        mac: [u8; 6],
        address: IpAddr,
        now: u64,
    ) -> Result<(), Counter> {
        let port = holder.0;
        let mut table = self.table();
        if let Some(binding) = table.bindings.get_mut(&address) {
            match (binding.by, binding.holder) {
                (By::Lease, _) if binding.mac != mac => return Err(Counter::SourceReserved),
                (_, Some((other, _))) if other != port => return Err(Counter::SourceTaken),
                _ => {}
            }
            // A guest may give its own address another of its MAC addresses.
            let is_new = (binding.holder, binding.mac) != (Some(holder), mac);
            (binding.holder, binding.mac, binding.used_at) = (Some(holder), mac, now);
            if is_new {
                self.changed();
            }
            return Ok(());
        }
        self.is_possible(address)?;
        let index = port.0 as usize;
        if index >= table.by_use.len() {
            table.by_use.resize_with(index + 1, Vec::new);
        }
        if table.by_use[index].len() >= SOURCES_PER_PORT {
            let used_at =
                |address| table.bindings.get(address).map_or(0, |binding| binding.used_at);
            let oldest =
                table.by_use[index].iter().min_by_key(|&address| used_at(address)).copied();
            if let Some(oldest) = oldest {
                table.free(oldest);
            }
        }
        let binding = Binding { holder: Some(holder), mac, by: By::Use, used_at: now };
        table.bindings.insert(address, binding);
        table.by_use[index].push(address);
        self.changed();
        Ok(())
    }

    /// Gives an address to a port and a MAC address, whoever had it: DHCP has leased it. Flows that
    /// are open stay open. Returns whether the address can be a guest's.
    pub fn lease(&mut self, port: Port, mac: [u8; 6], address: IpAddr) -> bool {
        self.give(Some(port), mac, address)
    }

    /// Keeps an address for a MAC address, on whichever port it is. Returns whether the address can be
    /// a guest's.
    pub fn reserve(&mut self, mac: [u8; 6], address: IpAddr) -> bool {
        self.give(None, mac, address)
    }

    fn give(&mut self, port: Option<Port>, mac: [u8; 6], address: IpAddr) -> bool {
        let possible = self.is_possible(address).is_ok();
        if possible {
            let holder = port.map(|port| (port, self.latest(port)));
            let mut table = self.table();
            table.free(address);
            table.bindings.insert(address, Binding { holder, mac, by: By::Lease, used_at: 0 });
            self.changed();
        }
        possible
    }

    /// Makes an address nobody's: its lease has ended.
    pub fn free(&mut self, address: IpAddr) {
        self.table().free(address);
        self.changed();
    }

    /// Forgets a port, in the generation that this handle speaks for. What it had by use is nobody's. A
    /// lease is still its MAC address's, on whichever port that is next. What a port has that got the number
    /// since stays its own.
    pub fn port_left(&mut self, port: Port) {
        let generation = generation_of(&self.generations, port);
        let has_left = |binding: &Binding| {
            binding.holder.is_some_and(|(of, since)| of == port && since <= generation)
        };
        let table = &mut *self.table();
        table.bindings.retain(|_, binding| !has_left(binding) || binding.by == By::Lease);
        for binding in table.bindings.values_mut().filter(|binding| has_left(binding)) {
            binding.holder = None;
        }
        if let Some(addresses) = table.by_use.get_mut(port.0 as usize) {
            addresses.retain(|address| table.bindings.contains_key(address));
        }
        self.changed();
    }

    /// The port and the MAC address of the guest with an address, if it has one now.
    pub fn find(&self, address: IpAddr) -> Option<(Port, [u8; 6])> {
        self.table().find(address)
    }

    /// An address of the family that the guest with a MAC address has now. One that is leased comes
    /// before one that is used.
    pub fn find_mac(&self, mac: [u8; 6], v4: bool) -> Option<IpAddr> {
        self.table().find_mac(mac, v4)
    }

    /// The port, the MAC address and the address of a guest, if it has one now. A guest that is known by
    /// its MAC address is best reached over IPv4 or IPv6 as asked for, or else over the other.
    pub fn resolve(&self, guest: Guest, v4: bool) -> Option<(Port, [u8; 6], IpAddr)> {
        // Acquire: pairs with the Release in `changed`.
        let changes = self.shared.changes.load(Ordering::Acquire);
        if let Some((then, wanted, found)) = self.found.get()
            && (then, wanted) == (changes, (guest, v4))
        {
            return Some(found);
        }
        let table = self.table();
        let address = match guest {
            Guest::Address(address) => address,
            Guest::Mac(mac) => table.find_mac(mac, v4).or_else(|| table.find_mac(mac, !v4))?,
        };
        let (port, mac) = table.find(address)?;
        let found = (port, mac, address);
        // The number was read before the table, so what changed in between is looked for again.
        self.found.set(Some((changes, (guest, v4), found)));
        Some(found)
    }

    /// Whether an address is one of the subnets'.
    pub fn is_inside(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| subnet.contains(address))
    }

    /// How many addresses are somebody's.
    pub fn len(&self) -> usize {
        self.table().bindings.len()
    }

    /// Whether no address is anybody's.
    pub fn is_empty(&self) -> bool {
        self.table().bindings.is_empty()
    }
}

impl Table {
    fn free(&mut self, address: IpAddr) {
        if let Some(Binding { holder: Some((port, _)), by: By::Use, .. }) =
            self.bindings.remove(&address)
        {
            self.by_use[port.0 as usize].retain(|&other| other != address);
        }
    }

    fn find(&self, address: IpAddr) -> Option<(Port, [u8; 6])> {
        let binding = self.bindings.get(&address)?;
        Some((binding.holder?.0, binding.mac))
    }

    fn find_mac(&self, mac: [u8; 6], v4: bool) -> Option<IpAddr> {
        let found = self.bindings.iter().filter(|(address, binding)| {
            binding.mac == mac && binding.holder.is_some() && address.is_ipv4() == v4
        });
        found.map(|(&address, binding)| (binding.by == By::Use, address)).min().map(|(_, ip)| ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
    const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

    fn sources() -> Sources {
        Sources::new(
            ["192.168.64.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()],
            ["192.168.64.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        )
    }

    fn at(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Goal: no guest speaks for the gateway, for the outside world or for the host.
    #[test]
    fn only_an_address_of_the_subnet_can_be_a_guests() {
        let mut sources = sources();
        let refused = [
            ("192.168.64.1", Counter::SourceGateway),
            ("fd00::1", Counter::SourceGateway),
            ("192.168.65.2", Counter::SourceOutside),
            ("192.168.64.0", Counter::SourceOutside),
            ("192.168.64.255", Counter::SourceOutside),
            ("fd00:0:0:1::2", Counter::SourceOutside),
            ("8.8.8.8", Counter::SourceOutside),
            ("127.0.0.1", Counter::BadSource),
            ("fe80::2", Counter::BadSource),
            ("0.0.0.0", Counter::BadSource),
        ];
        for (address, why) in refused {
            assert_eq!(sources.check(Port(0), A, at(address), 0), Err(why), "{address}");
            assert!(!sources.lease(Port(0), A, at(address)), "{address}");
        }
        assert!(sources.is_empty());
    }

    /// Goal: a guest whose address is set by hand gets out, and so does one that has outlived the
    /// process that leased its address; nobody else takes the address from it.
    #[test]
    fn the_first_use_binds_an_address_to_a_port() {
        for address in ["192.168.64.9", "fd00::9"].map(at) {
            let mut sources = sources();
            assert_eq!(sources.find(address), None);
            assert_eq!(sources.check(Port(3), A, address, 0), Ok(()));
            assert_eq!(sources.find(address), Some((Port(3), A)));
            assert_eq!(sources.check(Port(4), B, address, 1), Err(Counter::SourceTaken));
            assert_eq!(sources.check(Port(4), A, address, 1), Err(Counter::SourceTaken));
            // Its own network card may get another MAC address.
            assert_eq!(sources.check(Port(3), B, address, 2), Ok(()));
            assert_eq!(sources.find(address), Some((Port(3), B)));
            sources.port_left(Port(3));
            assert_eq!(sources.check(Port(4), A, address, 3), Ok(()));
        }
    }

    /// Goal: who grabs an address before its owner asks for it does not keep it.
    #[test]
    fn a_lease_overrides_a_use() {
        let mut sources = sources();
        let address = at("192.168.64.9");
        sources.check(Port(3), A, address, 0).unwrap();
        assert!(sources.lease(Port(4), B, address));
        assert_eq!(sources.check(Port(3), A, address, 1), Err(Counter::SourceReserved));
        // Not with the owner's MAC address either.
        assert_eq!(sources.check(Port(3), B, address, 1), Err(Counter::SourceTaken));
        assert_eq!(sources.check(Port(4), B, address, 1), Ok(()));
        assert_eq!(sources.find_mac(B, true), Some(address));
        for guest in [Guest::Mac(B), Guest::Address(address)] {
            assert_eq!(sources.resolve(guest, false), Some((Port(4), B, address)));
        }
        // The guest starts again on another port, and asks for nothing.
        sources.port_left(Port(4));
        assert_eq!((sources.find(address), sources.find_mac(B, true)), (None, None));
        assert_eq!(sources.check(Port(3), A, address, 2), Err(Counter::SourceReserved));
        assert_eq!(sources.check(Port(5), B, address, 2), Ok(()));
        assert_eq!(sources.find(address), Some((Port(5), B)));
        sources.free(address);
        assert_eq!(sources.check(Port(3), A, address, 3), Ok(()));
    }

    #[test]
    fn a_reservation_is_its_mac_addresss() {
        let mut sources = sources();
        let address = at("192.168.64.9");
        assert!(sources.reserve(A, address));
        assert_eq!(sources.check(Port(3), B, address, 0), Err(Counter::SourceReserved));
        assert_eq!(sources.check(Port(4), A, address, 0), Ok(()));
        assert_eq!(sources.check(Port(3), A, address, 0), Err(Counter::SourceTaken));
    }

    /// Goal: a guest that sends from everywhere makes nothing grow, and takes no more than its share of
    /// the subnet.
    #[test]
    fn a_port_has_few_addresses_without_a_lease() {
        let mut sources = sources();
        sources.check(Port(1), B, at("fd00::b"), 0).unwrap();
        for n in 0..10_000u32 {
            let address = format!("fd00::{:x}:{:x}", n >> 8 | 0x100, n & 0xff);
            sources.check(Port(0), A, at(&address), n.into()).unwrap();
            assert!(sources.len() <= SOURCES_PER_PORT + 1);
        }
        // The one that it used last is among them, and others' are theirs.
        assert!(sources.find(at("fd00::127:f")).is_some());
        assert_eq!(sources.find(at("fd00::b")), Some((Port(1), B)));
        sources.port_left(Port(0));
        assert_eq!(sources.len(), 1);
    }

    /// Goal: what one translator knows of an address holds for all of a network's translators.
    #[test]
    fn handles_share_the_addresses() {
        let mut first = sources();
        let mut second = first.clone();
        let address = at("192.168.64.9");
        assert_eq!(first.check(Port(3), A, address, 0), Ok(()));
        assert_eq!(second.check(Port(4), B, address, 1), Err(Counter::SourceTaken));
        let guest = Guest::Address(address);
        for _ in 0..2 {
            assert_eq!(second.resolve(guest, true), Some((Port(3), A, address)));
        }
        assert!(second.lease(Port(4), B, address));
        assert_eq!(first.resolve(guest, true), Some((Port(4), B, address)));
        assert_eq!(first.check(Port(3), A, address, 2), Err(Counter::SourceReserved));
        assert_eq!(second.resolve(guest, true), Some((Port(4), B, address)));
        first.port_left(Port(4));
        assert_eq!(second.resolve(guest, true), None, "what was found before is old");
        // All of them together have a port's share.
        for n in 0..2 * SOURCES_PER_PORT as u64 {
            let sources = if n % 2 == 0 { &mut first } else { &mut second };
            sources.check(Port(0), A, at(&format!("fd00::1:{n:x}")), n).unwrap();
        }
        assert_eq!(first.len(), SOURCES_PER_PORT + 1);
    }

    /// Goal: a translator that learns late that a port has left takes nothing from the port that has the
    /// number now, and gives it nothing of the one before.
    #[test]
    fn a_late_translator_leaves_the_next_port_alone() {
        let mut early = sources();
        let mut late = early.clone();
        let [old, new, leased] = ["192.168.64.8", "192.168.64.9", "192.168.64.7"].map(at);
        for sources in [&mut early, &mut late] {
            sources.set_generation(Port(3), 5);
            sources.check(Port(3), A, old, 0).unwrap();
        }
        early.port_left(Port(3));
        // It is not too late yet: nobody has the number, and the port is forgotten in a moment.
        late.check(Port(3), A, old, 1).unwrap();
        early.set_generation(Port(3), 6);
        early.check(Port(3), B, new, 2).unwrap();
        assert!(early.lease(Port(3), B, leased));
        for address in [at("192.168.64.20"), new] {
            assert_eq!(late.check(Port(3), B, address, 3), Err(Counter::SourceTaken));
        }
        late.port_left(Port(3));
        assert_eq!(late.find(old), None);
        assert_eq!(late.find(new), Some((Port(3), B)));
        assert_eq!(late.find(leased), Some((Port(3), B)));
        // What the network itself has seen is of the port that is there now.
        late.note(Port(3), B, at("fd00::9"), 4).unwrap();
        assert_eq!(early.find(at("fd00::9")), Some((Port(3), B)));
        late.set_generation(Port(3), 6);
        late.check(Port(3), B, new, 5).unwrap();
        late.port_left(Port(3));
        assert_eq!(early.len(), 1, "the lease is the MAC address's");
        assert_eq!(early.find(leased), None);
    }
}
