//! An address and a port, smaller than `SocketAddr`, which is for tables with many of them.

use core::fmt;
use core::hash::{Hash, Hasher};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An address and a port. An IPv6 address has no scope, because link-local addresses are not
/// translated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// An IPv4 address is in the first four bytes, and the rest is 0.
    address: [u8; 16],
    port: u16,
    v4: bool,
}

static_assertions::const_assert_eq!(size_of::<Endpoint>(), 20);

impl Endpoint {
    pub(crate) fn ip(self) -> IpAddr {
        match self.address {
            [a, b, c, d, ..] if self.v4 => Ipv4Addr::new(a, b, c, d).into(),
            address => Ipv6Addr::from(address).into(),
        }
    }

    pub(crate) fn port(self) -> u16 {
        self.port
    }

    pub(crate) fn is_ipv4(self) -> bool {
        self.v4
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(from: SocketAddr) -> Self {
        let mut address = [0; 16];
        match from.ip() {
            IpAddr::V4(v4) => address[..4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => address = v6.octets(),
        }
        Self { address, port: from.port(), v4: from.is_ipv4() }
    }
}

impl From<Endpoint> for SocketAddr {
    fn from(endpoint: Endpoint) -> Self {
        Self::new(endpoint.ip(), endpoint.port)
    }
}

/// Few words, where the derived one would hash every field.
impl Hash for Endpoint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [a, b, c, d, ..] = self.address;
        let first = u32::from_ne_bytes([a, b, c, d]);
        state.write_u64(u64::from(first) << 32 | u64::from(self.port) << 1 | u64::from(self.v4));
        if !self.v4 {
            state.write_u128(u128::from_ne_bytes(self.address));
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: an address comes out as it went in.
    #[test]
    fn an_endpoint_is_a_socket_address() {
        for address in ["1.2.3.4:5", "[2001:db8::1]:65535", "0.0.0.0:0", "[::]:1"] {
            let address: SocketAddr = address.parse().unwrap();
            let endpoint = Endpoint::from(address);
            assert_eq!(SocketAddr::from(endpoint), address);
            assert_eq!((endpoint.ip(), endpoint.port()), (address.ip(), address.port()));
            assert_eq!(endpoint.is_ipv4(), address.is_ipv4());
        }
    }
}
