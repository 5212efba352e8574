//! Router advertisements (RFC 4861, 4.2), with the name servers of RFC 8106.

use core::net::Ipv6Addr;

use smoltcp::time::Duration;
use smoltcp::wire::{
    EthernetAddress, Icmpv6Packet, NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr,
    NdiscRouterFlags,
};

use super::ipv6::Ipv6Config;
use crate::limits::ROUTER_LIFETIME;

/// The number of the option "recursive DNS server" (RFC 8106, 5.1).
const RDNSS: u8 = 25;
/// The bytes of that option in front of its addresses.
const RDNSS_HEADER_LEN: usize = 8;
/// A lifetime without an end, in seconds (RFC 4861, 4.6.2; RFC 8106, 5.1). What the network is made
/// with holds as long as it exists, and a silent guest gets no later advertisement.
const INFINITE: u32 = u32::MAX;
/// The hop limit that guests are told to use, as that of Linux.
const GUEST_HOP_LIMIT: u8 = 64;

/// What an advertisement says.
pub(super) struct Advertisement<'a> {
    pub(super) config: &'a Ipv6Config,
    pub(super) mac: EthernetAddress,
    pub(super) mtu: Option<u32>,
    /// Whether the gateway leads to the world.
    pub(super) is_router: bool,
}

impl Advertisement<'_> {
    fn repr(&self) -> NdiscRepr<'static> {
        let infinite = Duration::from_secs(INFINITE.into());
        let lifetime = if self.is_router { ROUTER_LIFETIME } else { 0 };
        NdiscRepr::RouterAdvert {
            hop_limit: GUEST_HOP_LIMIT,
            flags: NdiscRouterFlags::OTHER,
            router_lifetime: Duration::from_secs(lifetime.into()),
            reachable_time: Duration::ZERO,
            retrans_time: Duration::ZERO,
            lladdr: Some(self.mac.into()),
            mtu: self.mtu,
            prefix_info: Some(NdiscPrefixInformation {
                prefix_len: 64,
                flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
                valid_lifetime: infinite,
                preferred_lifetime: infinite,
                prefix: self.config.prefix,
            }),
        }
    }

    /// The bytes of the message.
    pub(super) fn len(&self) -> usize {
        let dns = &self.config.dns[..];
        let rdnss = if dns.is_empty() { 0 } else { RDNSS_HEADER_LEN + size_of_val(dns) };
        self.repr().buffer_len() + rdnss
    }

    /// Writes the message. `out` has [`len`](Self::len) bytes.
    pub(super) fn write(&self, from: Ipv6Addr, to: Ipv6Addr, out: &mut [u8]) {
        out.fill(0);
        let repr = self.repr();
        let (message, rdnss) = out.split_at_mut(repr.buffer_len());
        repr.emit(&mut Icmpv6Packet::new_unchecked(message));
        if !rdnss.is_empty() {
            rdnss[0] = RDNSS;
            rdnss[1] = (rdnss.len() / 8) as u8;
            rdnss[4..RDNSS_HEADER_LEN].copy_from_slice(&INFINITE.to_be_bytes());
            let places = rdnss[RDNSS_HEADER_LEN..].chunks_exact_mut(size_of::<Ipv6Addr>());
            for (place, server) in places.zip(&self.config.dns) {
                place.copy_from_slice(&server.octets());
            }
        }
        Icmpv6Packet::new_unchecked(out).fill_checksum(&from, &to);
    }
}
