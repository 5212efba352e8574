//! IPv4 and IPv6 addresses in the form that vmnet's functions take.

use std::net::IpAddr;

use super::ffi::{AF_INET, AF_INET6};

/// Returns the address family, in Darwin's numbering, and the address's bytes in network order. An
/// IPv4 address has 4 bytes; the other 12 are 0.
pub(crate) fn address(of: IpAddr) -> (u8, [u8; 16]) {
    let mut bytes = [0; 16];
    match of {
        IpAddr::V4(address) => {
            bytes[..4].copy_from_slice(&address.octets());
            (AF_INET, bytes)
        }
        IpAddr::V6(address) => (AF_INET6, address.octets()),
    }
}
