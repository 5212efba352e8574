//! The host's own addresses (getifaddrs(3)).

use std::io;
use std::net::IpAddr;
use std::ptr;

use super::socket::from_system;

/// The list that the system gives, which goes back to it.
struct List(*mut libc::ifaddrs);

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the list came from `getifaddrs`, and nobody has a reference into it any more.
        unsafe { libc::freeifaddrs(self.0) };
    }
}

/// The addresses of all interfaces, loopback's too.
pub(super) fn all() -> io::Result<Vec<IpAddr>> {
    let mut first = ptr::null_mut();
    // SAFETY: the pointer is to `first`.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let list = List(first);
    let mut addresses = Vec::new();
    let mut next = list.0;
    // SAFETY: each entry is valid until `list` is dropped, and the last one names no next.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        if entry.ifa_addr.is_null() {
            continue;
        }
        // SAFETY: an address that is not null has a family.
        let family = i32::from(unsafe { (*entry.ifa_addr).sa_family });
        let len = match family {
            libc::AF_INET => size_of::<libc::sockaddr_in>(),
            libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
            _ => continue,
        };
        // SAFETY: the structure consists of numbers, for which zero is valid.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        // SAFETY: an address of this family has `len` bytes, and the storage has more.
        unsafe {
            ptr::copy_nonoverlapping(
                entry.ifa_addr.cast::<u8>(),
                (&raw mut storage).cast::<u8>(),
                len,
            );
        }
        addresses.push(from_system(&storage)?.ip());
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: an address that others could reach the host at is in the list.
    /// Method: loopback's is there wherever a network namespace has its loopback interface up.
    #[test]
    fn the_list_has_the_addresses_that_can_be_bound() {
        let addresses = all().expect("the addresses");
        if addresses.is_empty() {
            eprintln!("skipped: this machine has no address");
        }
        for address in addresses {
            // Link-local addresses need a scope to be bound.
            if crate::policy::forbidden(address).is_none() {
                std::net::UdpSocket::bind((address, 0)).unwrap_or_else(|error| {
                    panic!("{address} is none of this host's: {error}");
                });
            }
        }
    }
}
