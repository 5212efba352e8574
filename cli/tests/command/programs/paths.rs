//! ping and traceroute.

use super::*;
use crate::host::{Host, ip};

/// A host behind the world outside.
const FAR: &str = "198.51.100.1";

/// A world with one more host behind it, and ping sockets for everybody.
fn far_world() -> (World, Host) {
    let (world, far) = (World::new(), Host::new());
    let there = far.namespace().split('/').nth(4).expect("a thread").to_owned();
    world.outside.run(move || {
        ip(&format!("link add x0 type veth peer name x1 netns {there}"));
        ip("address add 198.51.100.254/24 dev x0");
        ip("link set x0 up");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("the namespace's own setting");
    });
    far.run(|| {
        ip("link set lo up");
        ip(&format!("address add {FAR}/24 dev x1"));
        ip("link set x1 up");
        ip("route add default via 198.51.100.254");
    });
    allow_pings(&world, "0 2147483647");
    (world, far)
}

fn allow_pings(world: &World, groups: &'static str) {
    world
        .host
        .run(move || fs::write("/proc/sys/net/ipv4/ping_group_range", groups))
        .expect("it is set");
}

#[test]
fn ping_reaches_the_world_with_long_packets_too() {
    if !have(&["ping"]) {
        return;
    }
    let (world, _far) = far_world();
    let ping = "ping -q -i 0.05 -W 20";
    let said = guest(&world, &[], &format!("{ping} -c 5 {FAR}; {ping} -c 3 -s 1400 {OUTSIDE}"));
    assert_eq!(said.matches(" 0% packet loss").count(), 2, "{said}");
    // A packet of 8,000 bytes comes from the guest in fragments, unless its network takes it whole.
    for whole in [&[][..], &["--mtu", "9000", "--offload", "none"]] {
        let said = guest(&world, whole, &format!("{ping} -c 3 -s 8000 {OUTSIDE}"));
        assert!(said.contains(" 0% packet loss"), "{said}");
    }
    let lost = format!("ping -q -c 2 -i 0.2 -W 1 -s 8000 {OUTSIDE} || true");
    for fragments in [["--mtu", "1500"], ["--offload", "none"]] {
        let said = guest(&world, &fragments, &lost);
        assert!(said.contains("100% packet loss"), "{said}");
    }
}

/// Where the system has no ping sockets for this process, a guest is told so at once.
#[test]
fn ping_says_that_the_host_forbids_it() {
    if !have(&["ping"]) {
        return;
    }
    let world = World::new();
    allow_pings(&world, "1 0");
    let said = guest(&world, &[], &format!("ping -n -c 1 -W 60 {OUTSIDE} 2>&1 || true"));
    assert!(
        said.contains(&format!("From {GATEWAY}")) && said.contains("Packet filtered"),
        "{said}"
    );
    // The gateway itself answers.
    let said = guest(&world, &[], &format!("ping -q -c 1 -W 60 {GATEWAY}"));
    assert!(said.contains(" 0% packet loss"), "{said}");
}

#[test]
fn traceroute_shows_each_hop() {
    if !have(&["traceroute"]) {
        return;
    }
    let (world, _far) = far_world();
    let kinds = ["-U", "-I", "-T -p 80"];
    let script =
        kinds.map(|kind| format!("traceroute -n -q 1 -N 1 -w 5 -m 5 {kind} {FAR}")).join("; ");
    let said = guest(&world, &[], &script);
    let hops: Vec<_> = said
        .lines()
        .filter(|line| !line.starts_with("traceroute"))
        .map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
        .collect();
    let wanted = [format!("1 {GATEWAY}"), format!("2 {OUTSIDE}"), format!("3 {FAR}")];
    for (kind, hops) in kinds.iter().zip(hops.chunks(3)) {
        assert_eq!(hops, wanted, "{kind}: {said}");
    }
    assert_eq!(hops.len(), 3 * kinds.len(), "{said}");
}
