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

use core::net::IpAddr;
use std::collections::HashMap;

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
    /// None for a lease or a reservation whose guest has no port now.
    port: Option<Port>,
    mac: [u8; 6],
    by: By,
    /// When a flow was last opened from the address, in microseconds.
    used_at: u64,
}

/// The addresses of a network's guests.
#[derive(Debug)]
pub struct Sources {
    subnets: [Prefix; 2],
    gateways: [IpAddr; 2],
    bindings: HashMap<IpAddr, Binding>,
    /// What each port has by use.
    by_use: Vec<Vec<IpAddr>>,
}

impl Sources {
    /// The addresses of these subnets. None but the gateways' is anybody's yet.
    pub fn new(subnets: [Prefix; 2], gateways: [IpAddr; 2]) -> Self {
        Self { subnets, gateways, bindings: HashMap::new(), by_use: Vec::new() }
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
        if let Some(binding) = self.bindings.get_mut(&address) {
            match (binding.by, binding.port) {
                (By::Lease, _) if binding.mac != mac => return Err(Counter::SourceReserved),
                (_, Some(holder)) if holder != port => return Err(Counter::SourceTaken),
                _ => {}
            }
            // A guest may give its own address another of its MAC addresses.
            (binding.port, binding.mac, binding.used_at) = (Some(port), mac, now);
            return Ok(());
        }
        self.is_possible(address)?;
        let index = port.0 as usize;
        if index >= self.by_use.len() {
            self.by_use.resize_with(index + 1, Vec::new);
        }
        if self.by_use[index].len() >= SOURCES_PER_PORT {
            let used_at = |address| self.bindings.get(address).map_or(0, |binding| binding.used_at);
            if let Some(oldest) = self.by_use[index].iter().min_by_key(|&a| used_at(a)).copied() {
                self.free(oldest);
            }
        }
        let binding = Binding { port: Some(port), mac, by: By::Use, used_at: now };
        self.bindings.insert(address, binding);
        self.by_use[index].push(address);
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
            self.free(address);
            self.bindings.insert(address, Binding { port, mac, by: By::Lease, used_at: 0 });
        }
        possible
    }

    /// Makes an address nobody's: its lease has ended.
    pub fn free(&mut self, address: IpAddr) {
        if let Some(Binding { port: Some(port), by: By::Use, .. }) = self.bindings.remove(&address)
        {
            self.by_use[port.0 as usize].retain(|&other| other != address);
        }
    }

    /// Forgets a port. What it had by use is nobody's. A lease is still its MAC address's, on whichever
    /// port that is next.
    pub fn port_left(&mut self, port: Port) {
        self.bindings.retain(|_, binding| binding.port != Some(port) || binding.by == By::Lease);
        for binding in self.bindings.values_mut().filter(|binding| binding.port == Some(port)) {
            binding.port = None;
        }
        if let Some(addresses) = self.by_use.get_mut(port.0 as usize) {
            addresses.clear();
        }
    }

    /// The port and the MAC address of the guest with an address, if it has one now.
    pub fn find(&self, address: IpAddr) -> Option<(Port, [u8; 6])> {
        let binding = self.bindings.get(&address)?;
        Some((binding.port?, binding.mac))
    }

    /// An address of the family that the guest with a MAC address has now. One that is leased comes
    /// before one that is used.
    pub fn find_mac(&self, mac: [u8; 6], v4: bool) -> Option<IpAddr> {
        let found = self.bindings.iter().filter(|(address, binding)| {
            binding.mac == mac && binding.port.is_some() && address.is_ipv4() == v4
        });
        found.map(|(&address, binding)| (binding.by == By::Use, address)).min().map(|(_, ip)| ip)
    }

    /// The port, the MAC address and the address of a guest, if it has one now. A guest that is known by
    /// its MAC address is best reached over IPv4 or IPv6 as asked for, or else over the other.
    pub fn resolve(&self, guest: Guest, v4: bool) -> Option<(Port, [u8; 6], IpAddr)> {
        let address = match guest {
            Guest::Address(address) => address,
            Guest::Mac(mac) => self.find_mac(mac, v4).or_else(|| self.find_mac(mac, !v4))?,
        };
        let (port, mac) = self.find(address)?;
        Some((port, mac, address))
    }

    /// Whether an address is one of the subnets'.
    pub fn is_inside(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| subnet.contains(address))
    }

    /// How many addresses are somebody's.
    pub fn len(&self) -> usize {
        self.bindings.len()
    }

    /// Whether no address is anybody's.
    pub fn is_empty(&self) -> bool {
        self.bindings.is_empty()
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
}
