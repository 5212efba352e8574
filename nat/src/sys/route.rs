//! Whether the host has a way to the world.

use std::net::{IpAddr, Ipv6Addr, UdpSocket};

/// Somebody in the world: a root server of DNS. Nothing is sent there.
const SOMEBODY: Ipv6Addr = Ipv6Addr::new(0x2001, 0x503, 0xba3e, 0, 0, 0, 2, 0x30);

/// Returns whether the host has a route to the world over IPv6, and an address to send from: guests can
/// use the gateway as a router then ([`Network::set_ipv6_router`](vmring_embedded::Network::set_ipv6_router)).
/// Routes come and go, so ask again from time to time, as every few seconds.
///
/// It looks a route up by connecting a socket of UDP, which sends nothing. If the system refuses a socket,
/// the answer is no.
pub fn has_ipv6_route() -> bool {
    let source = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))
        .and_then(|socket| socket.connect((SOMEBODY, 53)).map(|()| socket))
        .and_then(|socket| socket.local_addr());
    match source.map(|source| source.ip()) {
        Ok(IpAddr::V6(source)) => !source.is_loopback() && !source.is_unicast_link_local(),
        _ => false,
    }
}
