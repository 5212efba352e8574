//! Addresses of both families as vmnet's functions take them.

use std::net::IpAddr;

use super::ffi::{AF_INET, AF_INET6};

/// An address as vmnet takes it: its family, and its bytes in network order.
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
