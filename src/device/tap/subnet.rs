//! Which IPv4 range a network of ours gets. Two interfaces of a host with the same network, or a network
//! that the host reaches by a route, is silence for one of the two.

use std::net::Ipv4Addr;

use vmring_embedded::{AddressRange as Range, NetworkMode};

use super::limits::DEFAULT_ROUTE_PREFIX_MAX;
use super::link::Netlink;
use crate::error::{Error, TapError};

/// Returns the range of a network behind the interface `index`: the one that was asked for, or else
/// the first free one, beginning with the default of the mode.
///
/// # Errors
///
/// [`TapError::SubnetTaken`] if the range that was asked for overlaps with a network of the host;
/// [`TapError::NoFreeSubnet`] if none was asked for and none is free.
pub(super) fn choose(
    netlink: &mut Netlink,
    index: u32,
    asked: Option<Range>,
    mode: NetworkMode,
) -> Result<Range, Error> {
    let taken = Taken::on(netlink, index)?;
    let mut free = candidates(mode).filter(|range| taken.by(*range).is_none());
    let Some(asked) = asked else {
        return free.next().ok_or(TapError::NoFreeSubnet.into());
    };
    match taken.by(asked) {
        None => Ok(asked),
        Some(by) => Err(TapError::SubnetTaken {
            subnet: written(network_of(asked.gateway, prefix_of(asked)), prefix_of(asked)),
            by,
            free: free.next().map(|range| written(range.gateway, prefix_of(range))),
        }
        .into()),
    }
}

/// The ranges that are tried for a network that asked for none. They are private (RFC 1918), and those
/// of the two modes differ.
fn candidates(mode: NetworkMode) -> impl Iterator<Item = Range> {
    let default = Range::of(mode);
    let [_, _, third, _] = default.gateway.octets();
    let first = (third..third + 64).map(|third| [192, 168, third]);
    let second = (16..32).map(move |second| [172, second, third]);
    let third = (third..third + 64).map(move |second| [10, second, third]);
    first.chain(second).chain(third).map(move |[a, b, c]| Range {
        gateway: Ipv4Addr::new(a, b, c, 1),
        end: Ipv4Addr::new(a, b, c, 254),
        mask: default.mask,
    })
}

/// The networks of the host, each with the words that say who has it.
struct Taken(Vec<(Ipv4Addr, u8, String)>);

impl Taken {
    /// The networks that the host has or reaches otherwise than by the interface `index`.
    fn on(netlink: &mut Netlink, index: u32) -> Result<Self, Error> {
        let links = netlink.links()?;
        let name = |index: u32| match links.iter().find(|link| link.index == index) {
            Some(link) => format!("'{}'", link.name),
            None => format!("the interface with the number {index}"),
        };
        let mut all = Vec::new();
        for other in netlink.addresses()?.into_iter().filter(|other| other.index != index) {
            let by = format!(
                "{} has the address {}",
                name(other.index),
                written(other.address, other.prefix_len)
            );
            all.push((other.network, other.prefix_len, by.clone()));
            all.push((other.address, 32, by));
        }
        for route in netlink.routes()?.into_iter().filter(|route| route.index != Some(index)) {
            // A default route leads to all that is not nearer, so it is not in the way.
            if route.prefix_len > DEFAULT_ROUTE_PREFIX_MAX {
                let to = written(route.network, route.prefix_len);
                let by = match route.index {
                    Some(index) => format!("the host has a route to {to} by {}", name(index)),
                    None => format!("the host has a route to {to}"),
                };
                all.push((route.network, route.prefix_len, by));
            }
        }
        Ok(Self(all))
    }

    /// Returns who has a part of this range, if anybody has.
    fn by(&self, range: Range) -> Option<String> {
        let prefix = prefix_of(range);
        let overlap = |(other, other_prefix, _): &&(Ipv4Addr, u8, String)| {
            let shorter = prefix.min(*other_prefix);
            network_of(*other, shorter) == network_of(range.gateway, shorter)
        };
        self.0.iter().find(overlap).map(|(_, _, by)| by.clone())
    }
}

/// The length of the range's mask, in bits.
pub(super) fn prefix_of(range: Range) -> u8 {
    u32::from(range.mask).count_ones() as u8
}

/// The first address of the network of this length that has `address`.
pub(super) fn network_of(address: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    Ipv4Addr::from(u32::from(address) & mask)
}

fn written(address: Ipv4Addr, prefix: u8) -> String {
    format!("{address}/{prefix}")
}

#[cfg(test)]
mod tests {
    use super::super::link::testing::{Namespace, run};
    use super::*;

    fn range(text: &str) -> Range {
        let (gateway, prefix) = text.split_once('/').unwrap();
        let gateway: Ipv4Addr = gateway.parse().unwrap();
        let mask = Ipv4Addr::from(u32::MAX << (32 - prefix.parse::<u32>().unwrap()));
        let end = Ipv4Addr::from((u32::from(gateway) | !u32::from(mask)) - 1);
        Range { gateway, end, mask }
    }

    #[test]
    fn every_candidate_is_a_range_and_the_modes_have_none_in_common() {
        let all: Vec<_> =
            candidates(NetworkMode::Host).chain(candidates(NetworkMode::Shared)).collect();
        assert_eq!(all.len(), 2 * (64 + 16 + 64));
        for (at, one) in all.iter().enumerate() {
            one.check().unwrap();
            assert!(all[at + 1..].iter().all(|other| other.gateway != one.gateway), "{one:?}");
        }
        for mode in [NetworkMode::Host, NetworkMode::Shared] {
            assert_eq!(candidates(mode).next(), Some(Range::of(mode)));
        }
    }

    #[test]
    fn a_network_of_the_host_is_taken_and_its_owner_is_named() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            run("ip link add lan0 type veth peer name lan1");
            run("ip link add vpn0 type veth peer name vpn1");
            for name in ["lo", "lan0", "lan1", "vpn0", "vpn1"] {
                run(&format!("ip link set {name} up"));
            }
            run("ip address add 192.168.64.7/24 dev lan0");
            run("ip address add 10.1.0.1 peer 10.2.0.1/32 dev vpn0");
            run("ip route add default via 192.168.64.1");
            run("ip route add 0.0.0.0/1 dev vpn0");
            run("ip route add 172.20.0.0/14 dev vpn0 table 77");
            run("ip route add unreachable 10.9.0.0/16");
            let mut netlink = Netlink::open().unwrap();
            let index = netlink.link("lan0").unwrap().unwrap().index;
            for (asked, by) in [
                ("192.168.64.1/24", "'lan0' has the address 192.168.64.7/24"),
                ("192.168.0.1/16", "'lan0' has the address 192.168.64.7/24"),
                ("192.168.64.129/25", "'lan0' has the address 192.168.64.7/24"),
                ("10.1.0.129/24", "'vpn0' has the address 10.1.0.1/32"),
                ("10.2.0.129/24", "'vpn0' has the address 10.1.0.1/32"),
                ("172.21.3.1/24", "the host has a route to 172.20.0.0/14 by 'vpn0'"),
                ("10.9.8.1/24", "the host has a route to 10.9.0.0/16"),
            ] {
                let asked = Some(range(asked));
                let refused = choose(&mut netlink, 0, asked, NetworkMode::Shared);
                let Err(Error::Tap(TapError::SubnetTaken { by: named, free, .. })) = refused else {
                    panic!("{asked:?}: {refused:?}");
                };
                assert_eq!(named, by, "{asked:?}");
                assert_eq!(free.as_deref(), Some("192.168.65.1/24"));
            }
            let chosen = choose(&mut netlink, 0, None, NetworkMode::Shared).unwrap();
            assert_eq!(chosen.gateway, Ipv4Addr::new(192, 168, 65, 1));
            // What the interface has itself is not in its way.
            let own = range("192.168.64.1/24");
            assert_eq!(choose(&mut netlink, index, Some(own), NetworkMode::Shared).unwrap(), own);

            run("ip route add 192.168.0.0/16 dev vpn0");
            let chosen = choose(&mut netlink, 0, None, NetworkMode::Host).unwrap();
            assert_eq!(chosen.gateway, Ipv4Addr::new(172, 16, 128, 1));
            run("ip route add 172.16.0.0/12 dev vpn0");
            run("ip route add 10.0.0.0/8 dev vpn0");
            let none = choose(&mut netlink, 0, None, NetworkMode::Host);
            assert!(matches!(none, Err(Error::Tap(TapError::NoFreeSubnet))), "{none:?}");
        });
    }
}
