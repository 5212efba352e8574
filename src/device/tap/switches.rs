//! The kernel's switches of one interface, below `/proc/sys/net`. A guest writes frames that the host's
//! end receives, so that end must not do what a host does for the routers and servers of its network:
//! take a default route, an address or a redirect from a frame.
//!
//! Sources: the kernel's `Documentation/networking/ip-sysctl.rst`, and for the way in which a switch
//! of the interface and the one of `all` go together, `include/linux/inetdevice.h`
//! (`IN_DEV_ANDCONF`, `IN_DEV_ORCONF`, `IN_DEV_MAXCONF`). The kernel accepts IPv4 redirects if *either*
//! switch allows it, so where the interface is part of a network of ours the rules of `nat.rs` drop
//! them as well.

use std::fs;
use std::io;

use crate::error::Error;

/// What the host's end is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It has an address of the host and the rules of `nat.rs` (host and shared mode).
    Routed,
    /// It is a port of a bridge.
    Port,
    /// It is left to the operator.
    Bare,
}

/// One switch and its value.
struct Switch {
    /// The folder of the protocol, `ipv4` or `ipv6`.
    protocol: &'static str,
    name: &'static str,
    value: i32,
    /// Without this switch the guest changes the host.
    needed: bool,
}

const fn v4(name: &'static str, value: i32) -> Switch {
    Switch { protocol: "ipv4", name, value, needed: false }
}

const fn v6(name: &'static str, value: i32) -> Switch {
    Switch { protocol: "ipv6", name, value, needed: false }
}

/// The switches of every end: the host learns nothing from the guest.
const CLIENT: &[Switch] = &[
    Switch { protocol: "ipv6", name: "accept_ra", value: 0, needed: true },
    Switch { protocol: "ipv6", name: "accept_redirects", value: 0, needed: true },
    // These are parts of router advertisements. They matter if somebody sets `accept_ra` later.
    v6("accept_ra_defrtr", 0),
    v6("accept_ra_pinfo", 0),
    v6("accept_ra_rtr_pref", 0),
    v6("accept_ra_mtu", 0),
    v6("accept_ra_rt_info_max_plen", 0),
    v6("accept_ra_from_local", 0),
    v6("autoconf", 0),
    v6("router_solicitations", 0),
    // Below 0, the kernel accepts no routing header at all. 0 accepts type 2.
    v6("accept_source_route", -1),
    v6("seg6_enabled", 0),
    v6("rpl_seg_enabled", 0),
    v6("ioam6_enabled", 0),
    v6("accept_untracked_na", 0),
    v6("proxy_ndp", 0),
    v6("force_forwarding", 0),
    v6("drop_unicast_in_l2_multicast", 1),
    v4("accept_redirects", 0),
    v4("shared_media", 0),
    v4("secure_redirects", 1),
    v4("accept_source_route", 0),
    v4("arp_accept", 0),
    v4("proxy_arp", 0),
    v4("proxy_arp_pvlan", 0),
    v4("bootp_relay", 0),
    v4("bc_forwarding", 0),
    v4("route_localnet", 0),
    v4("accept_local", 0),
    v4("drop_unicast_in_l2_multicast", 1),
];

/// The further switches of an end with an address of ours: a guest sends from its own network only, and
/// ARP tells it of that network's address only.
const ROUTED: &[Switch] =
    &[v4("rp_filter", 1), v4("arp_ignore", 1), v4("arp_announce", 2), v4("send_redirects", 0)];

/// The further switches of a port. The bridge takes what arrives there, except for frames to the
/// reserved addresses `01:80:c2:00:00:0x`, which go to the port's own protocols. These must not answer.
const PORT: &[Switch] = &[
    v6("disable_ipv6", 1),
    v4("forwarding", 0),
    v4("rp_filter", 1),
    // With 8, the port answers no ARP request.
    v4("arp_ignore", 8),
    v4("arp_announce", 2),
    v4("send_redirects", 0),
];

/// Sets the switches of the interface `tap` of the calling thread's network namespace. A kernel that
/// lacks a switch lacks what it switches.
///
/// Returns an error if a needed switch has another value and cannot be written, as in a container with
/// a read-only `/proc/sys`. For [`End::Routed`] that is no error, because the rules of `nat.rs` drop
/// what the needed switches refuse.
pub(super) fn set(tap: &str, end: End) -> Result<(), Error> {
    let further = match end {
        End::Routed => ROUTED,
        End::Port => PORT,
        End::Bare => &[],
    };
    for switch in further.iter().chain(CLIENT) {
        let Err(source) = write(tap, switch) else { continue };
        let Switch { protocol, name, value, needed } = switch;
        if *needed && end != End::Routed && !has_no_ipv6(tap) {
            return Err(match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Error::PermissionDenied {
                        needs: format!(
                            "root and a writable /proc/sys, so that the guest behind '{tap}' cannot \
                             give this host a route ({protocol}.{name}={value}); in a container \
                             'docker run --sysctl net.{protocol}.conf.default.{name}={value}' does \
                             without, and so does a TAP that root has made: {source}"
                        ),
                    }
                }
                _ => Error::Io { what: "setting a switch below /proc/sys/net", source },
            });
        }
        tracing::info!(tap, protocol, name, value, error = %source, "a switch was not set");
    }
    Ok(())
}

/// Sets one switch, unless it has the value already or the kernel does not have it.
fn write(tap: &str, switch: &Switch) -> io::Result<()> {
    let path = path(tap, switch.protocol, switch.name);
    match fs::read_to_string(&path) {
        Ok(now) if now.trim() == switch.value.to_string() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => fs::write(&path, switch.value.to_string()),
    }
}

/// Whether IPv6 is off on this interface, so that no switch of it matters.
fn has_no_ipv6(tap: &str) -> bool {
    fs::read_to_string(path(tap, "ipv6", "disable_ipv6")).is_ok_and(|text| text.trim() == "1")
}

fn path(tap: &str, protocol: &str, name: &str) -> String {
    format!("/proc/sys/net/{protocol}/conf/{tap}/{name}")
}

#[cfg(test)]
mod tests {
    use super::super::link::testing::{Namespace, run};
    use super::*;

    fn value(tap: &str, switch: &Switch) -> Option<i32> {
        fs::read_to_string(path(tap, switch.protocol, switch.name)).ok()?.trim().parse().ok()
    }

    /// Every switch has the other value before, as far as the kernel accepts one.
    #[test]
    fn every_switch_that_the_kernel_has_is_set() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        for (end, further) in [(End::Routed, ROUTED), (End::Port, PORT), (End::Bare, &[])] {
            namespace.run(|| {
                run("ip link add v0 type veth peer name v1");
                for switch in CLIENT.iter().chain(further) {
                    let other = if switch.value == 0 { "1" } else { "0" };
                    let _ = fs::write(path("v0", switch.protocol, switch.name), other);
                }
                set("v0", end).unwrap();
                let mut seen = 0;
                for switch in CLIENT.iter().chain(further) {
                    if let Some(value) = value("v0", switch) {
                        assert_eq!(value, switch.value, "{end:?} {}", switch.name);
                        seen += 1;
                    }
                }
                assert!(seen >= 10, "{seen} switches: is there no /proc?");
                run("ip link del v0");
            });
        }
    }
}
