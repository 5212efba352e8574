//! The IPv6 settings of a gateway, and the addresses that follow from them.

use core::net::Ipv6Addr;

use macaddr::MacAddr6;

use crate::table::mix;

/// The IPv6 settings of a network. Start from [`Ipv6Config::new`] or [`Ipv6Config::of_name`] and change
/// the public fields.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ipv6Config {
    /// The network's prefix, whose length is 64 bits. The last 64 bits are 0. The guests choose
    /// addresses that begin with it (RFC 4862), and the gateway's is the first after it.
    pub prefix: Ipv6Addr,
    /// The name servers that router advertisements and DHCPv6 tell the guests. The network has none of
    /// its own.
    pub dns: Vec<Ipv6Addr>,
}

impl Ipv6Config {
    /// Returns settings with this prefix and without name servers.
    pub fn new(prefix: Ipv6Addr) -> Self {
        Self { prefix, dns: Vec::new() }
    }

    /// Returns settings with a unique local prefix (RFC 4193) and without name servers. The prefix
    /// follows from the name and from nothing else, so that a network which is made again has the
    /// prefix that its guests still use. Two names share a prefix with a probability of 2^-56.
    pub fn of_name(name: &str) -> Self {
        // FNV-1a, and a finalizer that spreads it. The values are a promise: every version and every
        // process computes the same.
        let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        let hash = mix(name.bytes().fold(0xcbf2_9ce4_8422_2325, step));
        // fd00::/8, a global identifier of 40 bits and a subnet identifier of 16 bits (RFC 4193, 3.1).
        let high = 0xfd << 56 | hash >> 8;
        Self::new(Ipv6Addr::from_bits(u128::from(high) << 64))
    }

    /// Returns the gateway's address in the prefix.
    pub fn gateway(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.prefix.to_bits() | 1)
    }

    /// Returns whether an address begins with the prefix.
    pub fn contains(&self, address: Ipv6Addr) -> bool {
        address.to_bits() >> 64 == self.prefix.to_bits() >> 64
    }

    /// Whether the prefix is one for hosts: global (RFC 4291, 2.5.4) or unique local (RFC 4193), and
    /// 64 bits long.
    pub(crate) fn has_valid_prefix(&self) -> bool {
        let first = self.prefix.segments()[0];
        self.prefix.to_bits() as u64 == 0 && matches!(first >> 8, 0x20..=0x3f | 0xfc | 0xfd)
    }

    /// The first name server that is no address of a host, if there is one.
    pub(crate) fn invalid_dns(&self) -> Option<Ipv6Addr> {
        let invalid = |server: &&Ipv6Addr| {
            server.is_unspecified() || server.is_multicast() || server.is_loopback()
        };
        self.dns.iter().find(invalid).copied()
    }
}

/// The link-local address of an interface: fe80::/64 and the modified EUI-64 of its MAC address (RFC
/// 4291, appendix A).
pub(super) fn link_local(mac: MacAddr6) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.into_array();
    let id = u64::from_be_bytes([a ^ 0x02, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(id))
}

/// The solicited-node group of an address (RFC 4291, 2.7.1).
pub(super) fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let group = 0xff02_0000_0000_0000_0000_0001_ff00_0000;
    Ipv6Addr::from_bits(group | address.to_bits() & 0xff_ffff)
}

/// The MAC address of a group (RFC 2464, 7).
pub(super) fn group_mac(group: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Goal: a guest that outlives the process finds its prefix again. Method: the value is fixed here,
    /// so that no later version changes it.
    #[test]
    fn a_name_has_one_prefix_for_ever() {
        let prefix = |name| Ipv6Config::of_name(name).prefix;
        assert_eq!(prefix("lab"), "fd5e:59bb:db1c:d084::".parse::<Ipv6Addr>().unwrap());
        assert_eq!(prefix(""), "fdf5:2a15:e9a9:b5e8::".parse::<Ipv6Addr>().unwrap());
        assert_ne!(prefix("lab"), prefix("lab2"));
        assert!(Ipv6Config::of_name("lab").has_valid_prefix());
    }

    #[test]
    fn a_prefix_is_global_or_unique_local_and_has_64_bits() {
        let valid = |prefix: &str| Ipv6Config::new(prefix.parse().unwrap()).has_valid_prefix();
        for prefix in ["fd00::", "fdff:1:2:3::", "fc00::", "2001:db8:1:2::", "3fff::"] {
            assert!(valid(prefix), "{prefix}");
        }
        for prefix in ["::", "::1", "fe80::", "ff02::", "fec0::", "fd00::1", "64:ff9b::", "4000::"]
        {
            assert!(!valid(prefix), "{prefix}");
        }
    }

    #[test]
    fn addresses_follow_from_the_mac_address() {
        let address = link_local(MacAddr6::new(0x02, 0, 0, 0xab, 0xcd, 0xef));
        assert_eq!(address, "fe80::ff:feab:cdef".parse::<Ipv6Addr>().unwrap());
        let group = solicited_node(address);
        assert_eq!(group, "ff02::1:ffab:cdef".parse::<Ipv6Addr>().unwrap());
        assert_eq!(group_mac(group), [0x33, 0x33, 0xff, 0xab, 0xcd, 0xef]);
    }
}
