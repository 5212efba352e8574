//! Whether the host has a way to the world over IPv6, asked in a network namespace of its own.
#![cfg(target_os = "linux")]

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use vmring_nat::sys::has_ipv6_route;

/// Runs `ip` in this thread's namespace.
fn ip(arguments: &str) -> bool {
    let done = Command::new("timeout").arg("20").arg("ip").args(arguments.split(' ')).output();
    done.is_ok_and(|output| output.status.success())
}

/// Waits until the kernel has taken a new address into use.
fn has_route_soon() -> bool {
    let start = Instant::now();
    while !has_ipv6_route() && start.elapsed() < Duration::from_secs(20) {
        thread::sleep(Duration::from_millis(10));
    }
    has_ipv6_route()
}

/// Goal: the answer is yes only if there is a default route and an address to send from. Method: they come
/// and go one by one.
#[test]
fn a_way_to_the_world_is_a_route_and_an_address() {
    let asked = thread::spawn(|| {
        // SAFETY: the call takes no pointer. It affects this thread and what it starts.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return eprintln!("skipped: a network namespace needs root");
        }
        for switch in ["disable_ipv6", "accept_dad"] {
            for set in ["all", "default"] {
                let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{set}/{switch}"), "0");
            }
        }
        assert!(!has_ipv6_route(), "nothing is up");
        if !ip("link set lo up") || !ip("link add wan0 type veth peer name wan1") {
            return eprintln!("skipped: no `ip`, or no interfaces of type veth");
        }
        if !(ip("link set wan0 up") && ip("link set wan1 up")) {
            return eprintln!("skipped: the interfaces cannot be used");
        }
        if !ip("-6 addr add 2001:db8::2/64 dev wan0") {
            return eprintln!("skipped: no IPv6");
        }
        assert!(!has_ipv6_route(), "an address, and no route");
        assert!(ip("-6 route add default via 2001:db8::1 dev wan0"));
        assert!(has_route_soon());
        assert!(ip("-6 addr del 2001:db8::2/64 dev wan0"));
        assert!(ip("-6 route replace default dev wan0"));
        assert!(!has_ipv6_route(), "a route, and link-local addresses only");
        assert!(ip("-6 addr add fd00::2/64 dev wan0"));
        assert!(has_route_soon(), "somebody else may translate the address");
        assert!(ip("-6 route replace unreachable default"));
        assert!(!has_ipv6_route(), "a route that says no");
    });
    asked.join().expect("the answers");
}
