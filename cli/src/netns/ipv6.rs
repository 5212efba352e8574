//! The TAP's IPv6. The kernel configures it by what the gateway advertises, as that of a guest (RFC 4862):
//! the address, the default route and its end.

use std::fs;
use std::io::{self, Write};
use std::net::Ipv6Addr;
use std::thread;
use std::time::{Duration, Instant};

/// How long a command may wait for its address, and how long a look at it is put off.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(2);
/// An address that the kernel still probes (`IFA_F_TENTATIVE` in `linux/if_addr.h`).
const TENTATIVE: u32 = 0x40;
/// The addresses of this namespace, one on each line.
const ADDRESSES: &str = "/proc/self/net/if_inet6";

fn switch(interface: &str, name: &str) -> String {
    format!("/proc/sys/net/ipv6/conf/{interface}/{name}")
}

/// Makes the interface one that is configured by its router, at once: nobody else is on the network who
/// could have its address. Call this before it is up.
pub(super) fn prepare(interface: &str) {
    let values = [
        ("accept_dad", "0"),
        ("router_solicitation_delay", "0"),
        ("accept_ra", "1"),
        ("autoconf", "1"),
        ("disable_ipv6", "0"),
    ];
    for (name, value) in values {
        // A kernel without IPv6 has no such file. Where they cannot be written, all takes longer.
        let _ = fs::write(switch(interface, name), value);
    }
}

/// Waits until the interface has an address that begins with the first 64 bits of `prefix`. After a while the
/// command starts without, which is said.
pub(super) fn wait(interface: &str, prefix: Ipv6Addr) {
    let disabled = fs::read_to_string(switch(interface, "disable_ipv6"));
    if disabled.map_or(true, |text| text.trim() != "0") {
        return;
    }
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let listed = fs::read_to_string(ADDRESSES).unwrap_or_default();
        if listed.lines().any(|line| is_usable(line, interface, prefix)) {
            return;
        }
        thread::sleep(PAUSE);
    }
    let _ =
        writeln!(io::stderr(), "vmring: note: {interface} has got no address of {prefix}/64 yet");
}

/// Whether a line is about an address of the prefix that the interface can send from.
fn is_usable(line: &str, interface: &str, prefix: Ipv6Addr) -> bool {
    let mut words = line.split_whitespace();
    let Some(address) = words.next().and_then(|word| u128::from_str_radix(word, 16).ok()) else {
        return false;
    };
    // The index, the length of the prefix and the scope.
    let Some(flags) = words.nth(3).and_then(|word| u32::from_str_radix(word, 16).ok()) else {
        return false;
    };
    address >> 64 == prefix.to_bits() >> 64
        && flags & TENTATIVE == 0
        && words.next() == Some(interface)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_usable_when_it_is_of_the_prefix_and_not_probed() {
        let prefix = "fd12:3456:789a:1::".parse().expect("an address");
        let is_usable = |line| is_usable(line, "tap0", prefix);
        assert!(is_usable("fd123456789a0001006e65fffe746e73 02 40 00 00     tap0"));
        for line in [
            "fd123456789a0001006e65fffe746e73 02 40 00 40     tap0",
            "fd123456789a0001006e65fffe746e73 02 40 00 00     tap1",
            "fd123456789a0002006e65fffe746e73 02 40 00 00     tap0",
            "fe80000000000000006e65fffe746e73 02 40 20 80     tap0",
            "fd123456789a0001006e65fffe746e73 02",
            "",
        ] {
            assert!(!is_usable(line), "{line}");
        }
    }
}
