//! Who may reach what. A [`Policy`] is asked once for each flow, before anything is opened.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::output::Port;
use crate::stats::Counter;

/// A transport protocol that is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP.
    Tcp,
}

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The guest's port on the network.
    pub port: Port,
    /// The protocol.
    pub protocol: Protocol,
    /// Where the packet says that it comes from.
    pub source: SocketAddr,
    /// Where the guest wants to get to.
    pub destination: SocketAddr,
}

/// The answer to a [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The flow may be opened, to this address of the host's world. The guest sees the address that
    /// it has asked for.
    Allow {
        /// Where the host's socket connects to.
        to: SocketAddr,
    },
    /// The flow may not be opened. The guest gets an ICMP error ("administratively prohibited").
    Deny(Counter),
}

/// Decides what guests may reach.
pub trait Policy {
    /// Decides about a new flow. The addresses are those of the packet, so names that resolve to a
    /// forbidden address are refused too.
    fn decide(&mut self, request: &Request) -> Verdict;
}

/// Denies what is no place in the outside world, and allows the rest: see [`forbidden`].
#[derive(Clone, Copy, Debug, Default)]
pub struct WorldOnly;

impl Policy for WorldOnly {
    fn decide(&mut self, request: &Request) -> Verdict {
        match forbidden(request.destination.ip()) {
            Some(why) => Verdict::Deny(why),
            None => Verdict::Allow { to: request.destination },
        }
    }
}

/// Why an address is no place in the outside world, or `None` if it is one, as far as the address
/// alone says. Loopback, unspecified, link-local (the metadata services of clouds), multicast,
/// broadcast and reserved addresses are none (RFC 6890), nor is IPv4 in the form of IPv6, which would
/// lead around these rules.
pub fn forbidden(address: IpAddr) -> Option<Counter> {
    match address {
        IpAddr::V4(v4) => match v4.octets() {
            [127, ..] => Some(Counter::DeniedLoopback),
            [0, ..] => Some(Counter::DeniedUnspecified),
            [169, 254, ..] => Some(Counter::DeniedLinkLocal),
            [224..=239, ..] | [255, 255, 255, 255] => Some(Counter::DeniedMulticast),
            [240..=255, ..] => Some(Counter::DeniedReserved),
            _ => None,
        },
        IpAddr::V6(v6) => match v6.segments() {
            _ if v6 == Ipv6Addr::LOCALHOST => Some(Counter::DeniedLoopback),
            _ if v6 == Ipv6Addr::UNSPECIFIED => Some(Counter::DeniedUnspecified),
            [0xfe80..=0xfebf, ..] => Some(Counter::DeniedLinkLocal),
            // Site-local addresses, which are deprecated (RFC 3879).
            [0xfec0..=0xfeff, ..] => Some(Counter::DeniedReserved),
            [0xff00..=0xffff, ..] => Some(Counter::DeniedMulticast),
            // ::/96 (IPv4-compatible), ::ffff:0:0/96 (mapped), ::ffff:0:0:0/96 (translated),
            // 64:ff9b::/96 and 64:ff9b:1::/48 (NAT64), 2002::/16 (6to4).
            [0, 0, 0, 0, 0 | 0xffff, 0, ..] | [0, 0, 0, 0, 0, 0xffff, ..] => {
                Some(Counter::DeniedMapped)
            }
            [0x64, 0xff9b, 0, 0, 0, 0, ..] | [0x64, 0xff9b, 1, ..] | [0x2002, ..] => {
                Some(Counter::DeniedMapped)
            }
            _ => None,
        },
    }
}

/// Whether a packet of a guest may say that it comes from this address, as far as the address alone
/// says.
pub fn is_source(address: IpAddr) -> bool {
    forbidden(address).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: no address of the host itself, of its links or of a group is reached.
    #[test]
    fn what_is_no_place_in_the_world_is_denied() {
        let denied = "127.0.0.1 127.5.5.5 0.0.0.0 0.1.2.3 169.254.169.254 224.0.0.1 239.1.1.1 240.0.0.1 \
             255.255.255.255 ::1 :: fe80::1 febf::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::127.0.0.1 \
             ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::7f00:1 2002:7f00:1::1";
        for address in denied.split_whitespace() {
            assert!(forbidden(address.parse().unwrap()).is_some(), "{address}");
        }
        for address in "1.1.1.1 10.0.0.1 192.168.1.1 223.255.255.255 2001:db8::1 fd00::1".split(' ')
        {
            assert_eq!(forbidden(address.parse().unwrap()), None, "{address}");
        }
    }
}
