//! The rules for what guests may reach. A [`Policy`] is asked once for each flow, before anything is opened.
//!
//! | file | what it holds |
//! |---|---|
//! | `rules.rs` | [`PolicyRules`](rules::PolicyRules): the policy of a network, as data |
//! | `sources.rs` | [`Sources`](sources::Sources): which guest an address belongs to |

pub mod rules;
pub mod sources;

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::output::Port;
use crate::stats::Counter;

/// A transport protocol that is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests of ICMP and ICMPv6. Their ports are 0.
    IcmpEcho,
}

/// Writes the name by which rules know the protocol.
impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::IcmpEcho => "icmp",
        })
    }
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

    /// Whether the policy is to be told the host's own addresses. They are read again when a flow is
    /// opened and the last look at them is [`HOST_ADDRESSES`](crate::limits::HOST_ADDRESSES) old.
    fn wants_host_addresses(&self) -> bool {
        false
    }

    /// Tells the host's own addresses, those of all its interfaces.
    fn set_host_addresses(&mut self, addresses: &[IpAddr]) {
        let _ = addresses;
    }
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

/// The services of clouds that tell a machine its secrets, and that are not link-local as
/// 169.254.169.254 is: those of EC2 and Google over IPv6, Azure's wire server, Alibaba's and Oracle's.
const METADATA: [IpAddr; 5] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// Why an address is no place in the outside world, or `None` if it is one, as far as the address
/// alone says. Loopback, unspecified, link-local, multicast, broadcast and reserved addresses are none
/// (RFC 6890), nor are the metadata services of clouds, nor is such an address in a form of IPv6, which
/// would lead around these rules.
pub fn forbidden(address: IpAddr) -> Option<Counter> {
    if METADATA.contains(&address) {
        return Some(Counter::DeniedMetadata);
    }
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
            // ::/96 (IPv4-compatible), ::ffff:0:0/96 (mapped) and ::ffff:0:0:0/96 (translated) are on no
            // wire (RFC 4291, 2.5.5; RFC 7915, 2.1).
            [0, 0, 0, 0, 0 | 0xffff, 0, ..] | [0, 0, 0, 0, 0, 0xffff, ..] => {
                Some(Counter::DeniedMapped)
            }
            // In 64:ff9b:1::/48 nobody but its network knows where the IPv4 address is (RFC 8215).
            [0x64, 0xff9b, 1, ..] => Some(Counter::DeniedMapped),
            _ => embedded_v4(address)
                .filter(|&v4| forbidden(v4.into()).is_some())
                .map(|_| Counter::DeniedMapped),
        },
    }
}

/// The IPv4 address that an IPv6 address stands for, if its packets end there: 64:ff9b::/96 (NAT64, RFC
/// 6052, 2.1), 2002::/16 (6to4, RFC 3056, 2), 2001::/32 (Teredo, RFC 4380, 4) and the interface
/// identifiers of ISATAP (RFC 5214, 6.1).
pub fn embedded_v4(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(v6) = address else { return None };
    let v4 = |high: u16, low: u16| Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match v6.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low),
        [0x2002, high, low, ..] => v4(high, low),
        [0x2001, 0, .., high, low] => v4(!high, !low),
        [_, _, _, _, 0 | 0x200, 0x5efe, high, low] => v4(high, low),
        _ => None,
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
             ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::7f00:1 2002:7f00:1::1 64:ff9b::169.254.169.254 \
             2001:0:1:2::80ff:fffe fd12::5efe:127.0.0.1 fd12::200:5efe:127.0.0.1 fd00:ec2::254 \
             fd20:ce::254 168.63.129.16 100.100.100.200 192.0.0.192 64:ff9b::168.63.129.16";
        for address in denied.split_whitespace() {
            assert!(forbidden(address.parse().unwrap()).is_some(), "{address}");
        }
        let allowed = "1.1.1.1 10.0.0.1 192.168.1.1 223.255.255.255 2001:db8::1 fd00::1 64:ff9b::808:808 \
             2002:808:808::1 fd00:ec2::253 168.63.129.17";
        for address in allowed.split_whitespace() {
            assert_eq!(forbidden(address.parse().unwrap()), None, "{address}");
        }
    }
}
