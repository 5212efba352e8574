//! What a TAP does to its host: a guest changes nothing on it, a network is what its mode says, and what
//! was set is put back, whatever ends the process. Each test runs in a network namespace of its own.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmring::{
    ConfigError, Direction, Error, Interface, InterfaceBuilder, MacAddr6, Mode, Ring, Tap, TapError,
};

use crate::netns::{Host, has, in_namespace, sh, skip, try_sh, with_ipv6};
use crate::support::{LONG, eventually, myself, stage};
use crate::tap_traffic::SetAtEnd;

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// The guest's MAC.
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 0x0a];
/// The port of the datagrams.
const PORT: u16 = 7777;

fn in_mode(mode: Mode) -> InterfaceBuilder {
    Interface::builder().mode(mode)
}

/// The first word after `key` in what a command printed.
fn word_after(text: &str, key: &str) -> String {
    let at = text.find(key).unwrap_or_else(|| panic!("{key} is not in {text}")) + key.len();
    text[at..].split_whitespace().next().expect("a word").to_owned()
}

fn mac_of(interface: &str) -> MacAddr6 {
    word_after(&sh(&format!("ip -o link show {interface}")), "link/ether ").parse().expect("a MAC")
}

fn mtu_of(interface: &str) -> u32 {
    word_after(&sh(&format!("ip -o link show {interface}")), " mtu ").parse().expect("a number")
}

fn switch(path: &str) -> String {
    let path = format!("/proc/sys/net/{path}");
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}")).trim().to_owned()
}

fn set_switch(path: &str, value: &str) {
    let path = format!("/proc/sys/net/{path}");
    std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// A guest that writes frames as they are and keeps those that come.
struct Guest {
    ring: Ring,
    interface: Interface,
    tap: String,
    /// The MAC of the host's end.
    host: [u8; 6],
}

impl Guest {
    fn behind(builder: InterfaceBuilder, tap: Tap) -> Self {
        let interface = builder.device(tap).start().expect("it starts");
        let tap = interface.system_name().expect("a TAP has a name");
        let host = mac_of(&tap).into_array();
        let mut ring = interface.ring(Direction::Both).depth(64).build().expect("a ring");
        for _ in 0..32 {
            let frame = ring.alloc().expect("a fresh ring");
            ring.submit_read(frame, 0).expect("a fresh ring");
        }
        Self { ring, interface, tap, host }
    }

    /// Writes a frame. When this returns, the kernel has handled it.
    fn write(&mut self, bytes: &[u8]) {
        let mut frame = self.ring.alloc().expect("a free frame");
        frame.copy_from(bytes).expect("it fits");
        let before = self.ring.stats().tx_packets;
        self.ring.submit_write(frame, 1).expect("a credit");
        eventually("the frame is written", || {
            self.ring.wait(1, Some(Duration::from_millis(5)));
            self.ring.stats().tx_packets > before
        });
    }

    /// Whether a datagram with this number comes before the one with the number `last`.
    fn gets(&mut self, number: u64, last: u64) -> bool {
        let mut seen = false;
        let start = Instant::now();
        loop {
            self.ring.wait(1, Some(Duration::from_millis(5)));
            let (mut sq, mut cq) = self.ring.split();
            let mut over = false;
            for done in cq.reap() {
                let read = done.op == vmring::RingOp::Read;
                let Some(mut frame) = done.take_frame() else { continue };
                if read {
                    let ends = |n: u64| frame.ends_with(&n.to_be_bytes());
                    seen |= ends(number);
                    over |= ends(last);
                    frame.reset();
                    sq.submit_read(frame, 0).expect("its credit came back");
                }
            }
            if over {
                return seen;
            }
            assert!(start.elapsed() < LONG, "datagram {last} does not come to {}", self.tap);
        }
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 = words.map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes()
}

fn ethernet(to: [u8; 6], kind: u16, packet: &[u8]) -> Vec<u8> {
    [&to[..], &GUEST, &kind.to_be_bytes(), packet].concat()
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = (20 + payload.len()) as u16;
    let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
    header[2..4].copy_from_slice(&len.to_be_bytes());
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum);
    [header, payload.to_vec()].concat()
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8], sum_at: usize) -> Vec<u8> {
    let len = (payload.len() as u16).to_be_bytes();
    let addresses = [from.octets(), to.octets()].concat();
    let mut payload = payload.to_vec();
    let sum = checksum(&[&addresses, &len, &[0, next], &payload]);
    payload[sum_at..sum_at + 2].copy_from_slice(&sum);
    [&[0x60, 0, 0, 0, len[0], len[1], next, 255], &addresses[..], &payload].concat()
}

/// A UDP datagram whose payload is a number. Its IPv4 checksum is left out.
fn udp(number: u64) -> Vec<u8> {
    [&PORT.to_be_bytes()[..], &PORT.to_be_bytes(), &[0, 16, 0, 0], &number.to_be_bytes()].concat()
}

/// A router advertisement: a default route for half an hour, and a prefix for addresses.
fn router_advertisement(to: [u8; 6]) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    // Prefix information (RFC 4861 section 4.6.2): /64, on-link and autonomous, valid for an hour.
    message.extend([3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0]);
    message.extend("fd00:bad::".parse::<Ipv6Addr>().unwrap().octets());
    let from = "fe80::a".parse().unwrap();
    let all = "ff02::1".parse().unwrap();
    ethernet(to, 0x86dd, &ipv6(from, all, 58, &message, 2))
}

const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
/// The router advertisement of a report, as it came: it has no prefix.
const REPORTED: &str = "33330000000102000000000a86dd6000000000103afffe800000000000000000000000000001\
                        ff0200000000000000000000000000018600751f000807080000000000000000";

fn reported() -> Vec<u8> {
    let digits = REPORTED.as_bytes().chunks(2);
    digits.map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

/// The routes and addresses that the host has on an interface and that are not link-local.
fn learned(tap: &str) -> String {
    sh(&format!("ip -6 route show dev {tap} | grep -v ^fe80 | grep -v ^multicast; true"))
        + &sh(&format!("ip -6 -o address show dev {tap} scope global"))
}

fn with_eager_ipv6() {
    with_ipv6();
    for (name, value) in [("accept_ra", "1"), ("autoconf", "1"), ("accept_redirects", "1")] {
        set_switch(&format!("ipv6/conf/default/{name}"), value);
    }
}

/// Goal: a guest gives its host no route and no address. Method: the same frames do so on a persistent
/// TAP, which is the operator's affair.
#[test]
fn a_router_advertisement_of_a_guest_changes_nothing() {
    in_namespace(|| {
        with_eager_ipv6();
        let ends: [(Mode, &str, Tap); 3] = [
            (Mode::Host, "h0", Tap::named("h0")),
            (Mode::Shared, "s0", Tap::named("s0")),
            (Mode::Host, "b0", Tap::named("b0").configure(false)),
        ];
        for (mode, name, tap) in ends {
            stage(format!("{mode} {name}"));
            let mut guest = Guest::behind(in_mode(mode), tap);
            guest.write(&reported());
            guest.write(&router_advertisement(ALL_NODES));
            thread::sleep(Duration::from_millis(50));
            assert_eq!(learned(name), "", "{name}");
            assert_eq!(switch(&format!("ipv6/conf/{name}/accept_ra")), "0");
            if name != "b0" {
                // Another program switches it on again: the rules hold.
                set_switch(&format!("ipv6/conf/{name}/accept_ra"), "2");
                guest.write(&router_advertisement(ALL_NODES));
                thread::sleep(Duration::from_millis(50));
                assert!(!learned(name).contains("default"), "{}", learned(name));
            }
        }
        stage("a persistent TAP");
        sh("ip tuntap add p0 mode tap");
        let mut guest = Guest::behind(in_mode(Mode::Host), Tap::named("p0"));
        eventually("the route and the address", || {
            // The kernel may still be about to use the link.
            guest.write(&reported());
            guest.write(&router_advertisement(ALL_NODES));
            let learned = learned("p0");
            learned.contains("default via fe80::") && learned.contains("fd00:bad:")
        });
    });
}

/// Goal: frames to the reserved group addresses, which a bridge does not take, are not handled by the
/// port's own IPv6.
#[test]
fn a_port_of_a_bridge_has_no_protocols_of_its_own() {
    in_namespace(|| {
        with_eager_ipv6();
        sh("ip link add br0 type bridge && ip link set br0 up");
        // The address is one of those that IEEE 802.1AB uses.
        let lldp = [0x01, 0x80, 0xc2, 0, 0, 0x0e];
        let mut guest = Guest::behind(in_mode(Mode::Bridged("br0".into())), Tap::named("t0"));
        guest.write(&router_advertisement(lldp));
        thread::sleep(Duration::from_millis(50));
        assert_eq!(learned("t0"), "");
        assert_eq!(switch("ipv6/conf/t0/disable_ipv6"), "1");
        assert_eq!(switch("ipv4/conf/t0/arp_ignore"), "8");
        assert!(sh("ip -d link show t0").contains("root_block on"));
        drop(guest);
        stage("a port that the operator has made");
        sh("ip tuntap add p0 mode tap && ip link set p0 master br0");
        let mut guest = Guest::behind(in_mode(Mode::Host), Tap::named("p0"));
        eventually("the route", || {
            guest.write(&router_advertisement(lldp));
            learned("p0").contains("default via fe80::")
        });
    });
}

/// Goal: a guest that pretends to be the host's router does not redirect the host's packets. Method: the
/// same frame does so behind a TAP of the operator's.
#[test]
fn a_redirect_of_a_guest_changes_nothing() {
    in_namespace(|| {
        set_switch("ipv4/ip_forward", "0");
        for (name, value) in [("accept_redirects", "1"), ("rp_filter", "0")] {
            set_switch(&format!("ipv4/conf/all/{name}"), value);
            set_switch(&format!("ipv4/conf/default/{name}"), value);
        }
        sh("ip link add lan0 type veth peer name lan1 && ip link set lan1 up");
        sh("ip addr add 192.0.2.1/24 dev lan0 && ip link set lan0 up");
        sh("ip route add default via 192.0.2.254");
        sh("ip neigh add 192.0.2.77 lladdr 02:00:00:00:00:77 dev lan0 nud permanent");
        sh("ip neigh add 192.0.2.254 lladdr 02:00:00:00:00:fe dev lan0 nud permanent");
        let [own, router, other] = [1, 254, 77].map(|last| Ipv4Addr::new(192, 0, 2, last));
        let whither = Ipv4Addr::new(198, 51, 100, 9);
        // The kernel's handler of ICMP errors takes an echo reply without a socket.
        let sent = ipv4(own, whither, 1, &[0; 8]);
        // Type 5 with code 1 says that there is a better router for this destination.
        let mut message = [&[5, 1, 0, 0], &other.octets()[..], &sent[..28]].concat();
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum);
        let redirect = ipv4(router, own, 1, &message);
        let way = || sh("ip route get 198.51.100.9");

        let mut guest = Guest::behind(in_mode(Mode::Host), Tap::named("h0"));
        way();
        guest.write(&ethernet(guest.host, 0x0800, &redirect));
        thread::sleep(Duration::from_millis(50));
        assert!(way().contains("via 192.0.2.254"), "{}", way());
        stage("from the guest itself, which is the router of a network");
        let [host, guest_itself, third] = [1, 2, 3].map(|last| Ipv4Addr::new(192, 168, 128, last));
        sh("ip route add 203.0.113.0/24 via 192.168.128.2");
        for last in [2, 3] {
            sh(&format!("ip neigh add 192.168.128.{last} lladdr 02:00:00:00:00:0a dev h0"));
        }
        let sent = ipv4(host, Ipv4Addr::new(203, 0, 113, 9), 1, &[0; 8]);
        let mut message = [&[5, 1, 0, 0], &third.octets()[..], &sent[..28]].concat();
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum);
        let own_redirect = ipv4(guest_itself, host, 1, &message);
        let guests_way = || sh("ip route get 203.0.113.9");
        guests_way();
        guest.write(&ethernet(guest.host, 0x0800, &own_redirect));
        thread::sleep(Duration::from_millis(50));
        assert!(guests_way().contains("via 192.168.128.2 "), "{}", guests_way());
        drop(guest);
        stage("behind a TAP of the operator's");
        sh("ip tuntap add p0 mode tap && ip addr add 192.168.128.1/24 dev p0");
        let mut guest = Guest::behind(in_mode(Mode::Host), Tap::named("p0"));
        eventually("the redirected way", || {
            guest.write(&ethernet(guest.host, 0x0800, &redirect));
            way().contains("via 192.0.2.77")
        });
    });
}

/// A network beyond the host, `10.9.0.0/24` and `fd00:9::/64`, whose only other host knows the way back.
struct Outside {
    host: Host,
    v4: UdpSocket,
    v6: UdpSocket,
}

impl Outside {
    fn new() -> Self {
        let host = Host::new();
        sh("ip link add v0 type veth peer name v1");
        host.give("v1");
        with_ipv6();
        host.run(with_ipv6);
        sh(
            "ip addr add 10.9.0.1/24 dev v0 && ip addr add fd00:9::1/64 dev v0 nodad && ip link set v0 up",
        );
        host.sh("ip addr add 10.9.0.2/24 dev v1 && ip addr add fd00:9::2/64 dev v1 nodad");
        host.sh("ip link set v1 up && ip route add default via 10.9.0.1");
        host.sh("ip -6 route add default via fd00:9::1");
        let v4 = host.run(|| UdpSocket::bind(("10.9.0.2", PORT)).expect("a socket"));
        let v6 = host.run(|| UdpSocket::bind(("fd00:9::2", PORT)).expect("a socket"));
        for socket in [&v4, &v6] {
            socket.set_read_timeout(Some(Duration::from_millis(10))).expect("a timeout");
        }
        Self { host, v4, v6 }
    }

    /// The numbers of the datagrams that have come.
    fn received(&self) -> Vec<u64> {
        let mut numbers = Vec::new();
        for socket in [&self.v4, &self.v6] {
            let mut bytes = [0; 64];
            while let Ok(len) = socket.recv(&mut bytes) {
                numbers.push(u64::from_be_bytes(bytes[..len].try_into().expect("a number")));
            }
        }
        numbers
    }
}

/// Makes the host send to an address of a guest's network without asking for its MAC, also by IPv6,
/// where the guest's network is `fd00:8::/64`.
fn is_at(tap: &str, v4: &str) {
    sh(&format!("ip neigh replace {v4} lladdr 02:00:00:00:00:0a dev {tap} nud permanent"));
    sh(&format!("ip -6 route replace fd00:8::/64 dev {tap}"));
    sh(&format!("ip -6 neigh replace fd00:8::2 lladdr 02:00:00:00:00:0a dev {tap} nud permanent"));
}

fn address(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

/// Goal: host mode has no way out and none in, whatever the host forwards, and neither has a guest of
/// it to one of shared mode. Method: the same packets pass a TAP of the operator's, and in shared mode
/// those pass that may.
#[test]
fn a_host_network_is_closed_whatever_the_host_forwards() {
    in_namespace(|| {
        let outside = Outside::new();
        let shared = Tap::named("s0");
        let mut shared =
            Guest::behind(in_mode(Mode::Shared).ipv4("192.168.64.1/24".parse().unwrap()), shared);
        for first in ["before", "after"] {
            stage(format!("forwarding is on {first} the start"));
            set_switch("ipv4/ip_forward", "1");
            set_switch("ipv6/conf/all/forwarding", if first == "before" { "1" } else { "0" });
            let mut guest = Guest::behind(in_mode(Mode::Host), Tap::named("h0"));
            set_switch("ipv6/conf/all/forwarding", "1");
            is_at("h0", "192.168.128.2");
            is_at("s0", "192.168.64.2");
            sh("ip -6 route replace fd00:8::/64 dev h0");
            set_switch("ipv4/conf/all/rp_filter", "0");

            let to_host = |guest: &Guest, kind, packet: &[u8]| ethernet(guest.host, kind, packet);
            let v6 = |from: &str, to: &str, number| {
                ipv6(from.parse().unwrap(), to.parse().unwrap(), 17, &udp(number), 6)
            };
            let own = address("192.168.128.2");
            stage("out");
            let packet = ipv4(own, address("10.9.0.2"), 17, &udp(1));
            guest.write(&to_host(&guest, 0x0800, &packet));
            guest.write(&to_host(&guest, 0x86dd, &v6("fd00:8::2", "fd00:9::2", 2)));
            // Its address is not of its network.
            let packet = ipv4(address("10.77.0.2"), address("10.9.0.2"), 17, &udp(3));
            guest.write(&to_host(&guest, 0x0800, &packet));
            assert_eq!(outside.received(), [0; 0]);

            stage("in");
            let [v4_out, v6_out] = [&outside.v4, &outside.v6];
            v4_out.send_to(&4u64.to_be_bytes(), ("192.168.128.2", PORT)).expect("it is sent");
            let _ = v6_out.send_to(&4u64.to_be_bytes(), ("fd00:8::2", PORT));
            let packet = ipv4(address("192.168.64.2"), own, 17, &udp(4));
            shared.write(&to_host(&shared, 0x0800, &packet));
            thread::sleep(Duration::from_millis(50));
            let socket = UdpSocket::bind("192.168.128.1:0").expect("a socket");
            socket.send_to(&5u64.to_be_bytes(), ("192.168.128.2", PORT)).expect("it is sent");
            assert!(!guest.gets(4, 5), "it came in");

            stage("to a guest of shared mode");
            let packet = ipv4(own, address("192.168.64.2"), 17, &udp(6));
            guest.write(&to_host(&guest, 0x0800, &packet));
            // Nobody who was not asked reaches it from outside either.
            v4_out.send_to(&6u64.to_be_bytes(), ("192.168.64.2", PORT)).expect("it is sent");
            thread::sleep(Duration::from_millis(50));
            let socket = UdpSocket::bind("192.168.64.1:0").expect("a socket");
            socket.send_to(&7u64.to_be_bytes(), ("192.168.64.2", PORT)).expect("it is sent");
            assert!(!shared.gets(6, 7), "it passed");

            stage("with an address of the network beyond");
            // systemd sets it so for every interface.
            set_switch("ipv4/conf/s0/rp_filter", "2");
            let packet = ipv4(address("10.9.0.77"), address("10.9.0.2"), 17, &udp(11));
            shared.write(&to_host(&shared, 0x0800, &packet));
            assert_eq!(outside.received(), [0; 0]);

            stage("shared mode goes out and gets its answers");
            let packet = ipv4(address("192.168.64.2"), address("10.9.0.2"), 17, &udp(8));
            shared.write(&to_host(&shared, 0x0800, &packet));
            shared.write(&to_host(&shared, 0x86dd, &v6("fd00:8::2", "fd00:9::2", 9)));
            let mut bytes = [0; 64];
            let mut from = None;
            eventually("the datagram outside", || {
                from = outside.v4.recv_from(&mut bytes).ok().map(|(_, from)| from);
                from.is_some()
            });
            assert_eq!(bytes[..8], 8u64.to_be_bytes());
            let from = from.expect("it came");
            assert_eq!(from.ip(), address("10.9.0.1"), "the host's address");
            outside.v4.send_to(&10u64.to_be_bytes(), from).expect("it is sent");
            assert!(shared.gets(10, 10));
            assert_eq!(outside.received(), [0; 0], "IPv6 has no way out");

            guest.interface.stop(LONG).expect("it stops");
            drop(guest);
            eventually("the TAP is gone", || try_sh("ip link show h0").is_err());
        }
        stage("the same packets through a TAP of the operator's");
        sh("ip tuntap add p0 mode tap && ip addr add 192.168.128.1/24 dev p0");
        let mut guest = Guest::behind(in_mode(Mode::Host), Tap::named("p0"));
        is_at("p0", "192.168.128.2");
        let packet = ipv4(address("192.168.128.2"), address("10.9.0.2"), 17, &udp(1));
        guest.write(&ethernet(guest.host, 0x0800, &packet));
        let packet =
            ipv6("fd00:8::2".parse().unwrap(), "fd00:9::2".parse().unwrap(), 17, &udp(2), 6);
        guest.write(&ethernet(guest.host, 0x86dd, &packet));
        let mut seen = HashSet::new();
        eventually("both", || {
            seen.extend(outside.received());
            seen == HashSet::from([1, 2])
        });
        outside.v4.send_to(&4u64.to_be_bytes(), ("192.168.128.2", PORT)).expect("it is sent");
        assert!(guest.gets(4, 4));
        outside.host.run(|| ());
    });
}

/// Another process with a network of shared mode. It runs in this thread's network namespace.
/// It writes to a pipe, of which this is the other end.
struct Process(Child, BufReader<ChildStdout>);

/// What it says when it has its network.
const STARTED: &str = "the network has started";

impl Process {
    fn start(tap: &str) -> Self {
        let mut command = myself();
        command.args(["--ignored", "--exact", "tap_host::the_body_of_another_process"]);
        command.env("VMRING_TEST_TAP", tap).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let said = BufReader::new(child.stdout.take().expect("piped"));
        let mut this = Self(child, said);
        stage("the other process has its network");
        let mut line = String::new();
        while line.trim_end() != STARTED {
            line.clear();
            let len = this.1.read_line(&mut line).expect("lines of text");
            assert!(len > 0, "it ends without a network");
        }
        this
    }

    /// Ends it by SIGKILL.
    fn kill(mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it ends");
    }

    fn end(mut self) {
        drop(self.0.stdin.take());
        eventually("the other process ends", || self.0.try_wait().expect("a child").is_some());
        assert!(self.0.wait().expect("a child").success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "other tests run it, as a process of their own"]
fn the_body_of_another_process() {
    let Ok(tap) = std::env::var("VMRING_TEST_TAP") else {
        return skip("no test has started this process");
    };
    let interface = in_mode(Mode::Shared).device(Tap::named(tap)).start().expect("it starts");
    // The test harness would keep what `println!` prints.
    writeln!(std::io::stdout(), "\n{STARTED}").expect("the test reads it");
    // It ends with its input, or by a signal.
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    interface.stop(LONG).expect("it stops");
}

/// Goal: forwarding stays on as long as a process needs it, is off afterwards, and what a killed process
/// has left on is put back by the next one.
#[test]
fn forwarding_is_put_back_by_the_last_of_several_processes_also_after_a_kill() {
    in_namespace(|| {
        let on = || std::fs::read_to_string(IP_FORWARD).expect("a setting") == "1\n";
        let start = |mode, name: &str| in_mode(mode).device(Tap::named(name)).start();
        set_switch("ipv4/ip_forward", "0");
        let first = start(Mode::Shared, "s0").expect("it starts");
        let other = Process::start("s1");
        assert_eq!(first.info().ipv4.expect("a range").start, address("192.168.64.1"));
        assert!(sh("ip -4 -o address show dev s1").contains("192.168.65.1/24"));
        first.stop(LONG).expect("it stops");
        assert!(on(), "the other process needs it");
        other.end();
        assert!(!on());

        stage("a kill beside a living one");
        let first = start(Mode::Shared, "s0").expect("it starts");
        Process::start("s1").kill();
        assert!(on());
        first.stop(LONG).expect("it stops");
        assert!(!on());

        stage("a kill of the only one");
        Process::start("s1").kill();
        eventually("the TAP is gone", || try_sh("ip link show s1").is_err());
        let forwarding = Tap::forwarding().expect("root sees it");
        assert!(forwarding.on && forwarding.by_vmring && forwarding.left_on, "{forwarding:?}");
        let host = start(Mode::Host, "h0").expect("it starts");
        assert!(!on(), "nobody needs it");
        let forwarding = Tap::forwarding().expect("root sees it");
        assert!(!forwarding.on && !forwarding.by_vmring && !forwarding.left_on, "{forwarding:?}");
        host.stop(LONG).expect("it stops");

        stage("the operator sets it meanwhile");
        for value in ["1", "0"] {
            set_switch("ipv4/ip_forward", "0");
            let first = start(Mode::Shared, "s0").expect("it starts");
            let other = Process::start("s1");
            sh(&format!("echo {value} >{IP_FORWARD}"));
            first.stop(LONG).expect("it stops");
            other.end();
            assert_eq!(switch("ipv4/ip_forward"), value);
        }
        if has("nft") {
            assert_eq!(sh("nft list tables"), "");
        }
    });
}

/// Goal: no two networks of a host overlap. Who has a range is named; without a range a free one is
/// taken, also by starts at the same time.
#[test]
fn no_two_networks_of_a_host_overlap() {
    in_namespace(|| {
        let start = |name: &str, range: Option<&str>| {
            let builder = in_mode(Mode::Host).device(Tap::named(name));
            match range {
                Some(range) => builder.ipv4(range.parse().expect("a range")),
                None => builder,
            }
            .start()
        };
        let range = |interface: &Interface| interface.info().ipv4.expect("a range").start;
        let first = start("a0", None).expect("it starts");
        let second = start("a1", None).expect("it starts");
        assert_eq!(range(&first), address("192.168.128.1"));
        assert_eq!(range(&second), address("192.168.129.1"));
        let refused = start("a2", Some("192.168.128.1/24")).expect_err("it is taken");
        assert_eq!(
            refused.to_string(),
            "the network 192.168.128.0/24 is taken here, because 'a0' has the address \
             192.168.128.1/24: ask for another range, such as 192.168.130.1/24"
        );
        stage("a restart keeps its range");
        first.stop(LONG).expect("it stops");
        second.restart(LONG).expect("it restarts");
        assert!(sh("ip -4 -o address show dev a1").contains("192.168.129.1/24"));
        let again = start("a3", Some("192.168.128.1/24")).expect("it is free again");
        drop((again, second));

        stage("a LAN");
        sh("ip link add lan0 type veth peer name lan1 && ip link set lan1 up");
        sh("ip addr add 192.168.128.7/24 dev lan0 && ip link set lan0 up");
        sh("ip route add 10.0.0.0/8 via 192.168.128.254");
        let beside = start("b0", None).expect("it starts");
        assert_ne!(range(&beside), address("192.168.128.1"));
        assert!(sh("ip route get 192.168.128.254").contains("lan0"));
        let refused = start("b1", Some("192.168.128.1/25")).expect_err("it is taken").to_string();
        assert!(refused.contains("'lan0' has the address 192.168.128.7/24"), "{refused}");
        let refused = start("b1", Some("10.7.0.1/24")).expect_err("it is taken").to_string();
        assert!(refused.contains("a route to 10.0.0.0/8 by 'lan0'"), "{refused}");
        drop(beside);

        stage("at the same time");
        let all: Vec<_> = thread::scope(|scope| {
            let starts: Vec<_> = (0..6)
                .map(|n| scope.spawn(move || start(&format!("c{n}"), None).expect("it starts")))
                .collect();
            starts.into_iter().map(|start| start.join().expect("no panic")).collect()
        });
        let ranges: HashSet<_> = all.iter().map(range).collect();
        assert_eq!(ranges.len(), 6, "{ranges:?}");

        stage("a range that nothing would get");
        sh("ip link add br0 type bridge");
        for (mode, tap) in [
            (Mode::Bridged("br0".into()), Tap::named("d0")),
            (Mode::Host, Tap::named("d0").configure(false)),
        ] {
            let builder = in_mode(mode).ipv4("10.7.0.1/24".parse().unwrap());
            let refused = builder.device(tap).start();
            let what = "IPv4 range of the TAP";
            assert!(
                matches!(&refused, Err(Error::Config(ConfigError::NotApplicable { what: w, .. }))
                    if *w == what),
                "{refused:?}"
            );
        }
    });
}

/// Goal: a start waits for another one in the same network namespace, so that both see each other's
/// range. Method: the table that is the lock is there.
#[test]
fn a_start_waits_for_another_one() {
    if !has("nft") {
        return;
    }
    in_namespace(|| {
        sh("nft add table inet vmring/lock");
        thread::scope(|scope| {
            let start = scope.spawn(|| in_mode(Mode::Host).device(Tap::named("t0")).start());
            eventually("the TAP is made", || try_sh("ip link show t0").is_ok());
            thread::sleep(Duration::from_millis(100));
            assert_eq!(sh("ip -4 -o address show dev t0"), "");
            assert!(!start.is_finished());
            sh("nft delete table inet vmring/lock");
            start.join().expect("no panic").expect("it starts");
        });
    });
}

/// Goal: a TAP that joins a bridge and leaves it changes neither its address nor its MTU.
#[test]
fn a_bridge_keeps_its_address_and_its_mtu() {
    in_namespace(|| {
        let bridged = |tap: Tap| in_mode(Mode::Bridged("br0".to_owned())).device(tap).start();
        for ports in [0, 1] {
            for round in 0..10 {
                stage(format!("{ports} ports, round {round}"));
                sh("ip link add br0 type bridge && ip link set br0 up");
                if ports == 1 {
                    // Its address is larger than most.
                    sh("ip link add e0 type veth peer name e1");
                    sh("ip link set e0 address f6:ff:ff:00:00:01 mtu 9000 up master br0");
                }
                let before = (mac_of("br0"), mtu_of("br0"));
                let interface = bridged(Tap::new()).expect("it starts");
                assert_eq!((mac_of("br0"), mtu_of("br0")), before);
                assert_eq!(interface.mtu(), before.1);
                let second = bridged(Tap::new()).expect("it starts");
                assert_eq!((mac_of("br0"), mtu_of("br0")), before);
                drop((interface, second));
                eventually("the TAPs are gone", || sh("ip -o link show type tun").is_empty());
                assert_eq!((mac_of("br0"), mtu_of("br0")), before);
                if ports == 1 {
                    // The kernel still chooses, as the operator has left it.
                    sh("ip link add f0 type veth peer name f1");
                    sh("ip link set f0 address 02:00:00:00:00:09 master br0");
                    assert_eq!(mac_of("br0"), MacAddr6::new(2, 0, 0, 0, 0, 9));
                    sh("ip link del f0");
                }
                sh("ip link del br0; ip link del e0 2>/dev/null; true");
            }
        }
        stage("an address that was asked for, and a persistent TAP");
        sh("ip link add br0 type bridge && ip link add e0 type veth peer name e1");
        sh("ip link set e0 address 06:00:00:00:00:01 master br0");
        let before = mac_of("br0");
        let low = MacAddr6::new(2, 0, 0, 0, 0, 1);
        let interface = bridged(Tap::named("t0").host_mac(low)).expect("it starts");
        assert_eq!((mac_of("t0"), mac_of("br0")), (low, before));
        drop(interface);
        sh("ip tuntap add p0 mode tap && ip link set p0 address 02:00:00:00:00:02");
        let interface = bridged(Tap::named("p0").configure(true)).expect("it starts");
        assert!(sh("ip link show p0").contains("master br0"));
        assert_eq!(mac_of("br0"), before);
        drop(interface);
        assert_eq!(mac_of("br0"), before);
    });
}

/// Goal: what drops forwarded packets is named, and only where it matters.
#[test]
fn a_forward_policy_of_drop_is_said() {
    if !has("nft") {
        return;
    }
    in_namespace(|| {
        let obstacle = |mode: &Mode| Tap::forwarding().expect("root sees it").obstacle("t0", mode);
        let bridged = Mode::Bridged("br0".to_owned());
        assert_eq!(obstacle(&Mode::Shared), None);
        sh("nft add table ip filter");
        sh(
            "nft 'add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'",
        );
        let said = obstacle(&Mode::Shared).expect("a sentence");
        for part in ["ip filter FORWARD", "'t0'", "-i t0 -j ACCEPT"] {
            assert!(said.contains(part), "{part} is not in {said}");
        }
        assert_eq!(obstacle(&Mode::Host), None);
        let path = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        if std::fs::write(path, "0").is_ok() {
            assert_eq!(obstacle(&bridged), None);
            std::fs::write(path, "1").expect("a setting");
            assert_eq!(obstacle(&bridged), Some(said));
        }
        // A network of ours is no obstacle.
        sh("nft delete table ip filter");
        let _interface = in_mode(Mode::Host).device(Tap::new()).start().expect("it starts");
        assert_eq!(obstacle(&Mode::Shared), None);
    });
}

/// Changes an interface as udev and systemd-networkd do: another address, another MTU, and down.
fn change(name: &str) {
    // SAFETY: all zeroes are an `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let ask = |what: libc::c_ulong, with: &libc::ifreq| {
        use std::os::fd::AsRawFd;
        // SAFETY: these requests read an `ifreq`, which lives through the call.
        unsafe { libc::ioctl(socket.as_raw_fd(), what as libc::Ioctl, with) };
    };
    request.ifr_ifru.ifru_mtu = 1280;
    ask(libc::SIOCSIFMTU, &request);
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: [2, 9, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0],
    };
    ask(libc::SIOCSIFHWADDR, &request);
    request.ifr_ifru.ifru_flags = 0;
    ask(libc::SIOCSIFFLAGS, &request);
}

/// Gives an interface another name.
fn rename(name: &str, other: &str) {
    // SAFETY: all zeroes are an `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let mut bytes = [0; libc::IFNAMSIZ];
    for (to, from) in bytes.iter_mut().zip(other.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_newname = bytes;
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    use std::os::fd::AsRawFd;
    // SAFETY: SIOCSIFNAME reads an `ifreq`, which lives through the call.
    unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFNAME as libc::Ioctl, &request) };
}

/// Goal: a start ends with what was asked for, although another program changes the TAP as soon as it is
/// there; or it fails and says what differs.
#[test]
fn a_start_ends_with_what_was_asked_for_or_says_what_differs() {
    in_namespace(|| {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, 0x55);
        let start = || {
            let tap = Tap::named("t0").host_mac(mac);
            in_mode(Mode::Host).mtu(1400).device(tap).start()
        };
        let is_there = || {
            std::ffi::CString::new("t0").is_ok_and(|name| {
                // SAFETY: the string ends with a zero and lives through the call.
                unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
            })
        };
        // A change that comes after the start stays. So no round tells much by itself, but in one of
        // them the changes are over before the start ends.
        let (mut round, mut undone, began) = (0, 0, Instant::now());
        while round < 20 || undone == 0 {
            stage(format!("one change, round {round}, {undone} of them undone"));
            assert!(began.elapsed() < LONG, "no start undoes a change");
            let (over, changed) = (AtomicBool::new(false), AtomicBool::new(false));
            thread::scope(|scope| {
                let _over = SetAtEnd(&over);
                let changes = scope.spawn(|| {
                    while !is_there() {
                        if over.load(Ordering::Acquire) {
                            return;
                        }
                        thread::yield_now();
                    }
                    (0..1 + round % 3).for_each(|_| change("t0"));
                    changed.store(true, Ordering::Release);
                });
                let interface = start().expect("it starts");
                let before_the_end = changed.load(Ordering::Acquire);
                changes.join().expect("no panic");
                let link = sh("ip -o link show t0");
                let mut parts = ["02:00:00:00:00:55", "mtu 1400", ",UP"].into_iter();
                undone += u32::from(before_the_end && parts.all(|part| link.contains(part)));
                interface.stop(LONG).expect("it stops");
                drop(interface);
            });
            eventually("the TAP is gone", || !is_there());
            round += 1;
        }
        stage("a change that a start does not undo: another name");
        let over = AtomicBool::new(false);
        let refusal = thread::scope(|scope| {
            let _over = SetAtEnd(&over);
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    rename("t0", "t1");
                    thread::sleep(Duration::from_micros(20));
                }
            });
            // The name may also be gone when the start first looks, or be changed after its end.
            let deadline = Instant::now() + LONG;
            loop {
                match start() {
                    Err(error @ Error::Tap(TapError::Changed { .. })) => break error,
                    Err(Error::Tap(TapError::Gone(_))) | Ok(_) => {}
                    Err(error) => panic!("another error: {error}"),
                }
                assert!(Instant::now() < deadline, "it is never refused");
            }
        });
        let said = refusal.to_string();
        assert!(said.contains("'t0', so that its name is 't1': keep udev"), "{said}");
    });
}

/// Goal: in a container whose `/proc/sys` is read-only, a network of ours is closed by its rules, and a
/// TAP without rules is refused unless the container's defaults are safe.
#[test]
fn without_a_writable_proc_sys_the_rules_close_a_network() {
    in_namespace(|| {
        with_eager_ipv6();
        // SAFETY: the call takes no pointer. It affects this thread and those that it starts.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNS) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        let read_only = |yes: bool| {
            let how = if yes { "ro" } else { "rw" };
            sh(&format!("mount -o remount,bind,{how} /proc/sys"));
        };
        sh("mount --make-rprivate / && mount --bind /proc/sys /proc/sys");
        read_only(true);
        let bare = || in_mode(Mode::Host).device(Tap::named("b0").configure(false)).start();
        let refused = bare().expect_err("a guest could give the host a route").to_string();
        for part in ["writable /proc/sys", "--sysctl", "accept_ra=0"] {
            assert!(refused.contains(part), "{part} is not in {refused}");
        }
        let mut guest = Guest::behind(in_mode(Mode::Host), Tap::named("h0"));
        guest.write(&router_advertisement(ALL_NODES));
        thread::sleep(Duration::from_millis(50));
        assert_eq!(learned("h0"), "");
        drop(guest);
        read_only(false);
        set_switch("ipv6/conf/default/accept_ra", "0");
        set_switch("ipv6/conf/default/accept_redirects", "0");
        read_only(true);
        bare().expect("the defaults are safe");
    });
}

/// Goal: what cannot be a TAP, a bridge or a second TAP of this process says why and what helps.
#[test]
fn a_refusal_names_its_cause_and_its_remedy() {
    in_namespace(|| {
        let refused = |mode: Mode, name: &str| {
            in_mode(mode).device(Tap::named(name)).start().expect_err("it cannot be").to_string()
        };
        let long = refused(Mode::Host, "NAME-THAT-IS-TOO-LONG");
        assert!(long.contains("1 to 15 bytes (it has 21)"), "{long}");
        let lo = refused(Mode::Host, "lo");
        assert!(lo.contains("'lo'") && lo.contains("no TAP: choose another name"), "{lo}");
        for name in ["nowhere", "lo"] {
            let none = refused(Mode::Bridged(name.to_owned()), "t0");
            assert!(none.contains(&format!("there is no bridge '{name}': name one")), "{none}");
        }
        let _first = in_mode(Mode::Host).device(Tap::named("t0")).start().expect("it starts");
        let twice = refused(Mode::Host, "t0");
        assert!(twice.contains("this process uses the TAP 't0' already"), "{twice}");
        let other = Process::start("s1");
        let taken = refused(Mode::Host, "s1");
        assert!(taken.contains("another process uses the TAP 's1' already"), "{taken}");
        other.end();
    });
}
