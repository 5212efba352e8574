//! Port forwarding rules.

use std::ffi::c_void;

pub(crate) const INET: u8 = 2;
/// Darwin's number.
const INET6: u8 = 30;

/// A port forwarding rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) protocol: u8,
    pub(crate) outside: u16,
    pub(crate) family: u8,
    pub(crate) address: [u8; 16],
    pub(crate) inside: u16,
}

/// How many bytes an address of this family has.
pub(crate) fn address_len(family: u8) -> Option<usize> {
    match family {
        INET => Some(4),
        INET6 => Some(16),
        _ => None,
    }
}

/// # Safety
///
/// `from` must point at an address of this family.
pub(crate) unsafe fn address(from: *const c_void, family: u8) -> Option<[u8; 16]> {
    let len = address_len(family)?;
    let mut bytes = [0; 16];
    // SAFETY: guaranteed by the caller.
    bytes[..len].copy_from_slice(unsafe { std::slice::from_raw_parts(from.cast::<u8>(), len) });
    Some(bytes)
}
