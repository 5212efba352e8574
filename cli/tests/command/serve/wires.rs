//! A server whose guests are on wires. The clients here are a VMM's part of a wire, by the standard
//! library's sockets.

use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;

use super::guest::OURS;
use super::*;

/// The type of frames that say that a guest is there.
const HELLO: [u8; 2] = [0x88, 0xb6];
const VFKIT_MAGIC: &[u8; 4] = b"VFKT";
/// How long a client waits for what may not come.
const SHORT: Duration = Duration::from_millis(50);

/// A guest behind a wire.
pub(crate) struct Wire {
    socket: End,
    pub(super) mac: [u8; 6],
    /// The length of the virtio header in front of each frame.
    header: usize,
}

enum End {
    Stream(UnixStream),
    Datagram(UnixDatagram),
}

pub(super) fn connected(path: &Path) -> UnixStream {
    UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

impl Wire {
    pub(crate) fn stream(path: &Path, mac: [u8; 6]) -> Self {
        Self::on(connected(path), mac)
    }

    pub(super) fn on(socket: UnixStream, mac: [u8; 6]) -> Self {
        socket.set_read_timeout(Some(LIMIT)).expect("a timeout");
        socket.set_write_timeout(Some(LIMIT)).expect("a timeout");
        Self { socket: End::Stream(socket), mac, header: 0 }
    }

    /// A VMM that announces itself as vfkit does, and has a socket of its own at `own`.
    pub(super) fn vfkit(path: &Path, own: &Path, mac: [u8; 6]) -> Self {
        let socket = UnixDatagram::bind(own).expect("a socket of its own");
        socket.connect(path).expect("the server's socket");
        socket.send(VFKIT_MAGIC).expect("it is taken");
        Self::of(socket, mac)
    }

    /// User-mode Linux: sequenced packets, which are sent and received as datagrams are.
    #[cfg(target_os = "linux")]
    pub(super) fn bess(path: &Path, mac: [u8; 6]) -> Self {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
        let kind = (AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let socket = socket(kind.0, kind.1, kind.2, None).expect("a socket");
        let address = UnixAddr::new(path).expect("an address");
        connect(socket.as_raw_fd(), &address).expect("the server's socket");
        Self::of(UnixDatagram::from(socket), mac)
    }

    pub(super) fn of(socket: UnixDatagram, mac: [u8; 6]) -> Self {
        socket.set_read_timeout(Some(LIMIT)).expect("a timeout");
        socket.set_write_timeout(Some(LIMIT)).expect("a timeout");
        Self { socket: End::Datagram(socket), mac, header: 0 }
    }

    /// The same, with a virtio header in front of each frame.
    fn with_header(mut self) -> Self {
        self.header = 12;
        self
    }

    pub(super) fn send(&mut self, frame: &[u8]) {
        let whole = [&vec![0; self.header], frame].concat();
        match &mut self.socket {
            End::Stream(socket) => {
                let len = (whole.len() as u32).to_be_bytes();
                socket.write_all(&[&len[..], &whole].concat()).expect("the server reads");
            }
            End::Datagram(socket) => {
                assert_eq!(socket.send(&whole).expect("the server reads"), whole.len());
            }
        }
    }

    /// The next frame, if there is one in time.
    pub(super) fn next(&mut self, time: Duration) -> Option<Vec<u8>> {
        let is_late = |kind| matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut);
        let mut frame = match &mut self.socket {
            End::Stream(socket) => {
                let mut len = [0; 4];
                socket.set_read_timeout(Some(time)).expect("a timeout");
                match socket.read_exact(&mut len) {
                    Err(error) if is_late(error.kind()) => return None,
                    result => result.expect("the server is there"),
                }
                socket.set_read_timeout(Some(LIMIT)).expect("a timeout");
                let mut frame = vec![0; u32::from_be_bytes(len) as usize];
                socket.read_exact(&mut frame).expect("a whole frame");
                frame
            }
            End::Datagram(socket) => {
                let mut frame = vec![0; 70_000];
                socket.set_read_timeout(Some(time)).expect("a timeout");
                match socket.recv(&mut frame) {
                    Err(error) if is_late(error.kind()) => return None,
                    len => frame.truncate(len.expect("the server is there")),
                }
                frame
            }
        };
        frame.drain(..self.header);
        Some(frame)
    }

    /// The next frame of these tests.
    pub(super) fn receive(&mut self) -> Vec<u8> {
        loop {
            let frame = self.next(LIMIT).expect("a frame arrives");
            // A frame for a guest that nobody knows yet goes to all.
            if frame[12..14] == OURS && frame[..6] == self.mac {
                return frame;
            }
        }
    }
}

/// Sends from one to the other until a frame arrives. A server that has accepted a connection says so to
/// nobody but its log.
fn reach(from: &mut Wire, to: &mut Wire) {
    let mut hello = packet(from.mac, to.mac, 60, 0);
    hello[12..14].copy_from_slice(&HELLO);
    // A datagram socket learns its peer from the first frame.
    to.send(&packet(to.mac, [0xff; 6], 60, 0));
    let start = Instant::now();
    loop {
        from.send(&hello);
        while let Some(frame) = to.next(SHORT) {
            if frame[12..14] == HELLO && frame[6..12] == from.mac {
                return;
            }
        }
        assert!(start.elapsed() < LIMIT, "they do not reach each other");
    }
}

/// Two guests find each other, and exchange frames of many lengths. None is lost or changed.
pub(crate) fn exchange(a: &mut Wire, b: &mut Wire, numbers: std::ops::Range<u32>) {
    reach(a, b);
    reach(b, a);
    for number in numbers {
        let there = packet(a.mac, b.mac, 60 + number as usize * 37 % 1455, number);
        a.send(&there);
        assert_eq!(b.receive(), there);
        let back = packet(b.mac, a.mac, 1514 - number as usize % 1400, number);
        b.send(&back);
        assert_eq!(a.receive(), back);
    }
}

/// A `--listen` of this kind.
pub(super) fn at(kind: &str, path: &Path) -> String {
    format!("{kind}:{}", path.display())
}

fn how(report: &Value, socket: usize) -> Vec<&str> {
    let ends = report["sockets"][socket]["ends"].as_array().expect("a list");
    ends.iter().map(|end| end["how"].as_str().expect("words")).collect()
}

/// A counter of all guests of a socket. One that is 0 may be left out.
fn counted(report: &Value, socket: usize, name: &str) -> u64 {
    report["sockets"][socket]["counts"][name].as_u64().unwrap_or(0)
}

#[test]
fn clients_of_streams_exchange_frames_and_are_counted() {
    let folder = scratch("wires streams");
    let [a, b] = ["a.sock", "b.sock"].map(|name| folder.join(name));
    let server = Server::new(&["--listen", &at("qemu", &a), "--listen", &at("socket_vmnet", &b)]);
    let mut one = Wire::stream(&a, mac(1));
    let mut two = Wire::stream(&a, mac(2));
    let mut three = Wire::stream(&b, mac(3));
    exchange(&mut one, &mut two, 0..50);
    exchange(&mut one, &mut three, 50..100);
    drop(two);
    server.until_said(&format!("{}: guest 2 has left", at("qemu", &a)));
    // Its address is another's now.
    let mut two = Wire::stream(&b, mac(2));
    exchange(&mut one, &mut two, 0..10);
    let report = server.report("TERM");
    assert_eq!(report["sandbox"]["system_calls"]["complete"], true, "{report:#}");
    assert_eq!(report["sockets"][0]["connections"], 2, "{report:#}");
    assert_eq!(report["sockets"][1]["connections"], 2, "{report:#}");
    assert_eq!(how(&report, 0)[0], "has left");
    assert_eq!(how(&report, 0)[1], "was connected when the server ended");
    // 50 of each pair there and back, and the hellos.
    for (socket, least) in [(0, 160), (1, 60)] {
        for name in ["rx_packets", "tx_packets"] {
            let n = counted(&report, socket, name);
            assert!(n >= least, "{socket} {name} {n}: {report:#}");
        }
        assert!(counted(&report, socket, "tx_bytes") >= 60 * least, "{report:#}");
        for name in ["rx_errors", "tx_errors", "rx_not_taken", "tx_short"] {
            assert_eq!(counted(&report, socket, name), 0, "{name}: {report:#}");
        }
    }
    assert!(!is_socket(&a) && !is_socket(&b), "nothing is left");
}

/// Goal: guests on different wires are on one switch, also with one on vhost-user.
#[test]
fn clients_of_different_wires_reach_each_other() {
    let folder = scratch("wires kinds");
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.join(name));
    let [own, other] = ["own", "other"].map(|name| folder.join(name));
    let server = Server::new(&[
        "--listen",
        &at("libkrun", &a),
        "--listen",
        &at("vfkit", &b),
        "--listen",
        &listen(&c),
    ]);
    let mut stream = Wire::stream(&a, mac(1));
    let mut datagrams = Wire::vfkit(&b, &own, mac(2));
    exchange(&mut stream, &mut datagrams, 0..50);
    let mut device = Guest::new(&c, mac(3));
    device.post(16);
    let there = packet(mac(1), mac(3), 1514, 7);
    stream.send(&there);
    assert_eq!(device.receive_ours(), there);
    let back = packet(mac(3), mac(2), 60, 8);
    device.send(&back);
    assert_eq!(datagrams.receive(), back);
    // The next VMM at the same socket, when the first has gone.
    drop(datagrams);
    let start = Instant::now();
    let again = UnixDatagram::bind(&other).expect("a socket of its own");
    while let Err(error) = again.connect(&b) {
        assert!(start.elapsed() < LIMIT, "the server does not let go: {error}");
        thread::sleep(Duration::from_millis(20));
    }
    let mut again = Wire::of(again, mac(4));
    exchange(&mut stream, &mut again, 0..10);
    let report = server.report("TERM");
    assert_eq!(report["sockets"][1]["connections"], 2, "{report:#}");
    assert_eq!(how(&report, 1), ["has left", "was connected when the server ended"]);
    assert!(!is_socket(&a) && !is_socket(&b) && is_socket(&own), "only its own are removed");
}

/// Sends a broadcast, and waits until the other has it.
fn broadcast(from: &mut Wire, to: &mut Wire) {
    let frame = packet(from.mac, [0xff; 6], 60, 7);
    from.send(&frame);
    let start = Instant::now();
    while to.next(SHORT).is_none_or(|came| came != frame) {
        assert!(start.elapsed() < LIMIT, "the broadcast does not arrive");
    }
}

/// Connects to a datagram socket. While it has another peer, which may have gone just now, it refuses.
fn connect_datagrams(path: &Path, own: &Path) -> UnixDatagram {
    let socket = UnixDatagram::bind(own).expect("a socket of its own");
    let start = Instant::now();
    while let Err(error) = socket.connect(path) {
        assert!(start.elapsed() < LIMIT, "the server does not let go: {error}");
        thread::sleep(Duration::from_millis(20));
    }
    socket
}

/// Goal: what a datagram socket has learned of a VMM, such as its MAC address, is forgotten when the VMM
/// has gone, also if the next one has the same path. The next one has no more rights by that: it takes
/// nobody's address.
#[test]
fn the_next_vmm_of_a_datagram_socket_has_an_address_of_its_own() {
    let folder = scratch("wires next");
    let [a, b, own] = ["a.sock", "b.sock", "own"].map(|name| folder.join(name));
    for (kind, other) in [("vfkit", "qemu"), ("qemu-dgram", "libkrun")] {
        let datagrams = at(kind, &a) + ",mac=learn";
        let streams = at(other, &b) + ",mac=learn";
        let server = Server::new(&["--listen", &datagrams, "--listen", &streams]);
        let mut stream = Wire::stream(&b, mac(9));
        for number in 1..4 {
            let mut vmm = Wire::of(connect_datagrams(&a, &own), mac(number));
            exchange(&mut stream, &mut vmm, 0..5);
            // Neither its predecessor's address nor another guest's is its own.
            for taken in [mac(9), mac(number - 1)] {
                vmm.send(&packet(taken, [0xff; 6], 60, 99));
            }
            exchange(&mut stream, &mut vmm, 5..6);
            drop(vmm);
            std::fs::remove_file(&own).expect("its socket");
        }
        let report = server.report("TERM");
        let of_datagrams = &report["sockets"][0];
        assert_eq!(of_datagrams["connections"], 3, "{report:#}");
        assert_eq!(of_datagrams["drops_by_reason"]["spoofed"], 6, "{report:#}");
    }
}

/// Goal: a datagram socket is no guest while nobody is there: neither in the counters of guests, nor for
/// frames to all, which nobody loses then.
#[test]
fn a_datagram_socket_without_a_vmm_is_no_guest() {
    let folder = scratch("wires nobody");
    let [a, b, c, own] = ["a", "b", "c", "own"].map(|name| folder.join(name));
    let [metrics, vmm] = ["metrics", "vmm"].map(|name| folder.join(name));
    let datagrams = at("qemu-dgram", &a);
    let reaching = format!("{},client,own={}", at("vfkit", &vmm), c.display());
    let place = format!("unix:{}", metrics.display());
    let arguments = ["--listen", &datagrams, "--listen", &at("qemu", &b), "--listen", &reaching];
    let server = Server::new(&[&arguments[..], &["--metrics", &place]].concat());
    let guests = |path: &str| {
        let answer = options::scraped(connected(&metrics));
        let start = format!("vmring_guests{{socket=\"{path}\"}} ");
        let line = answer.lines().find_map(|line| line.strip_prefix(&start));
        line.unwrap_or_else(|| panic!("{answer}")).to_owned()
    };
    let until = |path: &str, number: &str| {
        let start = Instant::now();
        while guests(path) != number {
            assert!(start.elapsed() < LIMIT, "{path} has {} guests", guests(path));
            thread::sleep(Duration::from_millis(20));
        }
    };
    let reached = format!("{},client", at("vfkit", &vmm));
    assert_eq!((&*guests(&datagrams), &*guests(&reached)), ("0", "0"));
    let mut one = Wire::stream(&b, mac(1));
    let mut two = Wire::stream(&b, mac(2));
    exchange(&mut one, &mut two, 0..1);
    for _ in 0..10 {
        broadcast(&mut one, &mut two);
    }
    // One whom nobody can answer is no guest.
    let unnamed = UnixDatagram::unbound().expect("a socket");
    unnamed.send_to(&packet(mac(8), [0xff; 6], 60, 1), &a).expect("it is taken");
    broadcast(&mut one, &mut two);
    assert_eq!((&*guests(&datagrams), &*guests(&reached)), ("0", "0"));
    for _ in 0..2 {
        let listening = UnixDatagram::bind(&vmm).expect("a socket");
        let mut magic = [0; 16];
        listening.set_read_timeout(Some(LIMIT)).expect("a timeout");
        let (len, _) = listening.recv_from(&mut magic).expect("the server announces itself");
        assert_eq!(&magic[..len], VFKIT_MAGIC);
        let mut three = Wire::of(connect_datagrams(&a, &own), mac(3));
        exchange(&mut one, &mut three, 0..2);
        until(&datagrams, "1");
        until(&reached, "1");
        drop((three, listening));
        for path in [&own, &vmm] {
            std::fs::remove_file(path).expect("its file");
        }
        until(&datagrams, "0");
        until(&reached, "0");
    }
    for _ in 0..10 {
        broadcast(&mut one, &mut two);
    }
    let report = server.report("TERM");
    assert_eq!(report["sockets"][0]["connections"], 2, "{report:#}");
    assert_eq!(counted(&report, 0, "tx_unnamed"), 1, "{report:#}");
    // The few frames between the end of a VMM and the moment when it is noticed have nobody.
    assert!(counted(&report, 0, "rx_errors") <= 4, "{report:#}");
    assert!(!is_socket(&a) && !is_socket(&c), "nothing is left");
}

/// Goal: clients that take all the places that they can get leave each other socket one.
#[test]
fn a_socket_has_a_place_that_no_other_sockets_clients_take() {
    let folder = scratch("wires places");
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.join(name));
    let [streams, others, devices] = [at("qemu", &a), at("qemu", &b), listen(&c)];
    let arguments = ["--connections", "4", "--listen", &streams, "--listen", &others];
    let server = Server::new(&[&arguments[..], &["--listen", &devices]].concat());
    let mut one = Wire::stream(&a, mac(1));
    let idle: Vec<_> = (0..8).map(|_| connected(&a)).collect();
    server.until_said(&format!("{streams}: guest 2 is here"));
    let mut two = Wire::stream(&b, mac(2));
    exchange(&mut one, &mut two, 0..5);
    let mut device = Guest::new(&c, mac(3));
    device.post(16);
    let frame = packet(mac(1), mac(3), 60, 1);
    one.send(&frame);
    assert_eq!(device.receive_ours(), frame);
    // The places that the sockets share are taken, and those that are kept are no other's.
    let mut more = Wire::stream(&b, mac(4));
    more.send(&packet(mac(4), mac(1), 60, 2));
    assert!(one.next(SHORT).is_none_or(|frame| frame[6..12] != mac(4)), "there are too many");
    drop(device);
    server.until_said(&format!("{devices}: guest 1 has left"));
    let mut device = Guest::new(&c, mac(3));
    device.post(16);
    one.send(&frame);
    assert_eq!(device.receive_ours(), frame);
    drop(idle);
    exchange(&mut one, &mut more, 5..10);
    server.report("TERM");
    let said = refused(
        &[&["serve", "--network", "embedded:lab"], &arguments[2..], &["--connections", "1"]]
            .concat(),
    );
    assert!(said.contains("each of the 2 sockets has a place"), "{said}");
}

/// A UDP datagram of 18 bytes without a checksum but that of its pseudo header, and the checksum (RFC 768).
fn datagram(from: [u8; 6], to: [u8; 6]) -> (Vec<u8>, [u8; 2]) {
    let sum = |bytes: &[u8]| {
        let words = bytes.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
        let total: u32 = words.sum();
        (total & 0xffff) as u16 + (total >> 16) as u16
    };
    let mut ip = [&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0][..], &[10, 0, 0, 1, 10, 0, 0, 2]];
    let checked = [ip[0], ip[1]].concat();
    let first = [&ip[0][..10], &(!sum(&checked)).to_be_bytes()].concat();
    ip[0] = &first;
    let pseudo = sum(&[ip[1], &[0, 17, 0, 26]].concat());
    let udp = [&[0x12, 0x34, 0x43, 0x21, 0, 26][..], &pseudo.to_be_bytes(), &[0x5a; 18]].concat();
    let complete = (!sum(&udp)).to_be_bytes();
    ([&to[..], &from, &[8, 0], ip[0], ip[1], &udp].concat(), complete)
}

#[test]
fn frames_with_virtio_headers_go_through() {
    let folder = scratch("wires headers");
    let [a, b, own] = ["a", "b", "own"].map(|name| folder.join(name));
    let plain_listen = at("qemu", &b);
    let krunkit: fn(&Path, &Path) -> Wire = |path, own| Wire::vfkit(path, own, mac(1));
    let kinds = [
        ("krunkit", krunkit),
        #[cfg(target_os = "linux")]
        ("bess", |path, _| Wire::bess(path, mac(1))),
    ];
    for (kind, guest) in kinds {
        let listen = at(kind, &a) + ",vnet_hdr";
        let server = Server::new(&["--listen", &listen, "--listen", &plain_listen]);
        let mut with = guest(&a, &own).with_header();
        let mut plain = Wire::stream(&b, mac(2));
        exchange(&mut with, &mut plain, 0..20);
        // A frame whose checksum the guest has left out is completed for the one without a header.
        let (mut frame, complete) = datagram(with.mac, plain.mac);
        let mut header = [0; 12];
        (header[0], header[6], header[8]) = (1, 34, 6);
        let End::Datagram(socket) = &with.socket else { panic!("it is of datagrams") };
        socket.send(&[&header[..], &frame].concat()).expect("it is taken");
        frame[40..42].copy_from_slice(&complete);
        assert!((0..100).any(|_| plain.next(LIMIT).expect("a frame arrives") == frame), "{kind}");
        // One whose header is no such header is counted.
        header[1] = 99;
        socket.send(&[&header[..], &frame].concat()).expect("it is taken");
        exchange(&mut with, &mut plain, 0..1);
        let report = server.report("TERM");
        assert_eq!(counted(&report, 0, "tx_bad_header"), 1, "{report:#}");
    }
}

/// Goal: a guest that does not read loses its own packets, and holds up nobody, also at the end.
#[test]
fn a_client_that_is_stuck_holds_up_nobody() {
    let folder = scratch("wires stuck");
    let path = folder.join("a.sock");
    let server = Server::new(&["--listen", &at("qemu", &path)]);
    let mut one = Wire::stream(&path, mac(1));
    let mut two = Wire::stream(&path, mac(2));
    let mut stuck = Wire::stream(&path, mac(3));
    exchange(&mut one, &mut stuck, 0..1);
    exchange(&mut one, &mut two, 0..1);
    for number in 0..200 {
        // Together they are more than its socket, its link and its port hold.
        for _ in 0..50 {
            one.send(&packet(mac(1), mac(3), 1514, number));
        }
        let other = packet(mac(1), mac(2), 60, number);
        one.send(&other);
        assert_eq!(two.receive(), other);
    }
    // If its end waited for the stuck one, the report would say that a guest does not end.
    let report = server.report("TERM");
    let missed = counted(&report, 0, "rx_not_taken");
    let unread = &report["sockets"][0]["drops_by_reason"]["no buffer posted"];
    assert!(missed + unread.as_u64().unwrap_or(0) > 1000, "{report:#}");
    assert!(!is_socket(&path), "it is removed");
    drop(stuck);
}

/// Goal: the rules of a socket hold for the guests of wires, and what breaks them is counted.
#[test]
fn a_wires_rules_hold_for_its_guests() {
    let folder = scratch("wires rules");
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.join(name));
    let fixed = at("qemu", &a) + ",mac=52:54:00:12:34:01";
    let isolated = at("qemu", &c) + ",isolated";
    let server =
        Server::new(&["--listen", &fixed, "--listen", &at("qemu", &b), "--listen", &isolated]);
    let mut one = Wire::stream(&a, mac(1));
    let mut two = Wire::stream(&b, mac(2));
    let mut three = Wire::stream(&c, mac(3));
    exchange(&mut one, &mut two, 0..5);
    one.send(&packet(mac(9), mac(2), 60, 1));
    let wanted = packet(mac(1), mac(2), 60, 2);
    one.send(&wanted);
    assert_eq!(two.receive(), wanted);
    three.send(&packet(mac(3), mac(2), 60, 3));
    // Its answer comes from the gateway: it is served, and reaches no other guest.
    let mut arp = packet(mac(3), [0xff; 6], 60, 0);
    arp[12..].fill(0);
    arp[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp[22..28].copy_from_slice(&mac(3));
    arp[28..32].copy_from_slice(&[192, 168, 64, 9]);
    arp[38..42].copy_from_slice(&[192, 168, 64, 1]);
    three.send(&arp);
    let answer = three.next(LIMIT).expect("the gateway answers");
    assert_eq!(answer[12..14], [8, 6]);
    exchange(&mut one, &mut two, 5..10);
    // Two guests cannot have one address, so the second waits.
    let mut second = Wire::stream(&a, mac(1));
    second.send(&packet(mac(1), mac(2), 60, 4));
    assert!(two.next(SHORT).is_none(), "it is served already");
    drop(one);
    assert_eq!(two.receive(), packet(mac(1), mac(2), 60, 4));
    let report = server.report("TERM");
    let dropped = |socket: usize, why: &str| {
        report["sockets"][socket]["drops_by_reason"][why].as_u64().unwrap_or(0)
    };
    assert_eq!((dropped(0, "spoofed"), dropped(2, "isolated")), (1, 1), "{report:#}");
}

/// Goal: a client that breaks the rules of its wire ends alone, and is told from one that leaves.
#[test]
fn a_client_that_breaks_the_rules_ends_alone() {
    let folder = scratch("wires broken");
    let path = folder.join("a.sock");
    let server = Server::new(&["--listen", &at("qemu", &path)]);
    let mut one = Wire::stream(&path, mac(1));
    let mut two = Wire::stream(&path, mac(2));
    exchange(&mut one, &mut two, 0..2);
    for bytes in [&[0xff; 8][..], &[0, 0, 0, 60, 1, 2, 3], &[0, 0, 0, 3, 1, 1, 1]] {
        let mut bad = connected(&path);
        bad.write_all(bytes).expect("it is taken");
        bad.shutdown(std::net::Shutdown::Write).expect("it says no more");
        bad.set_read_timeout(Some(LIMIT)).expect("a timeout");
        bad.read_to_end(&mut Vec::new()).expect("the server ends it");
    }
    exchange(&mut one, &mut two, 2..10);
    let report = server.report("TERM");
    assert_eq!(counted(&report, 0, "tx_short"), 1, "{report:#}");
    let ends = [
        "is cut off: it has sent a length above the maximum",
        "has left in the middle of a packet",
        "has left",
    ];
    assert_eq!(how(&report, 0)[..3], ends);
}

/// Gives the child of a command these descriptors, by their numbers there.
pub(super) fn with_descriptors<const N: usize>(
    command: &mut Command,
    fds: [(RawFd, RawFd); N],
) -> &mut Command {
    // SAFETY: dup2(2) is safe to call between fork and exec, and touches no memory.
    unsafe {
        command.pre_exec(move || {
            for (fd, number) in fds {
                if libc::dup2(fd, number) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        })
    }
}

#[test]
fn a_server_takes_over_the_sockets_of_wires() {
    let path = scratch("wires inherited").join("a.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let (stream, streams) = UnixStream::pair().expect("sockets");
    let (datagram, datagrams) = UnixDatagram::pair().expect("sockets");
    let fds = [listener.as_raw_fd(), streams.as_raw_fd(), datagrams.as_raw_fd()];
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    with_descriptors(&mut command, [(fds[0], 103), (fds[1], 104), (fds[2], 105)]);
    let arguments = ["serve", "--json", "--network", "embedded:lab", "--listen", "qemu:fd=103"];
    let others = ["--listen", "qemu:fd=104", "--listen", "krunkit:fd=105"];
    let arguments = [&arguments[..], &others].concat();
    let server = Server::of(command.args(&arguments), &arguments);
    drop((listener, streams, datagrams));
    let mut one = Wire::stream(&path, mac(1));
    let mut two = Wire::on(stream, mac(2));
    let mut three = Wire::of(datagram, mac(3));
    exchange(&mut one, &mut two, 0..10);
    exchange(&mut two, &mut three, 10..20);
    drop(two);
    server.until_said("qemu:fd=104: guest 1 has left");
    exchange(&mut one, &mut three, 0..5);
    let report = server.report("TERM");
    assert_eq!(report["sockets"][1]["name"], "qemu:fd=104");
    assert!(is_socket(&path), "it is not the server's to remove");
    // A socket of another type is refused.
    let (stream, streams) = UnixStream::pair().expect("sockets");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    with_descriptors(&mut command, [(streams.as_raw_fd(), 103)]);
    let arguments = ["serve", "--network", "embedded:lab", "--listen", "vfkit:fd=103"];
    let output = command.args(arguments).output().expect("it runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("it is no datagram socket"), "{output:?}");
    drop(stream);
}

/// Goal: a server connects to VMMs that listen, again and again, confined.
#[test]
fn a_server_connects_to_vmms_that_listen() {
    let folder = scratch("wires client");
    let [a, b, own] = ["a", "b", "own"].map(|name| folder.join(name));
    let datagrams = format!("{},own={}", at("vfkit", &b), own.display());
    let server = Server::new(&["--connect", &at("qemu", &a), "--listen", &(datagrams + ",client")]);
    let vmm = UnixDatagram::bind(&b).expect("a socket");
    vmm.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let mut magic = [0; 16];
    let (len, from) = vmm.recv_from(&mut magic).expect("the server announces itself");
    assert_eq!((&magic[..len], from.as_pathname()), (&VFKIT_MAGIC[..], Some(&*own)));
    vmm.connect(&own).expect("it answers there");
    let mut two = Wire::of(vmm, mac(2));
    let listener = UnixListener::bind(&a).expect("a socket");
    for _ in 0..2 {
        let (socket, _) = listener.accept().expect("the server connects");
        exchange(&mut Wire::on(socket, mac(1)), &mut two, 0..10);
    }
    let report = server.report("TERM");
    assert_eq!(report["sockets"][1]["connections"], 2, "{report:#}");
    assert!(is_socket(&a) && is_socket(&b) && !is_socket(&own), "only its own is removed");
}

/// Goal: a server is killed and started again under its guests, whose VMMs connect again.
#[test]
fn a_killed_server_is_started_again_under_its_wires() {
    let folder = scratch("wires killed");
    let [a, b, own] = ["a", "b", "own"].map(|name| folder.join(name));
    let arguments = ["--listen", &at("qemu", &a), "--listen", &at("qemu-dgram", &b)];
    let server = Server::new(&arguments);
    let datagram = UnixDatagram::bind(&own).expect("a socket");
    datagram.connect(&b).expect("the server's socket");
    let mut one = Wire::stream(&a, mac(1));
    let mut two = Wire::of(datagram.try_clone().expect("the same socket"), mac(2));
    exchange(&mut one, &mut two, 0..5);
    drop(server);
    assert!(is_socket(&a) && is_socket(&b), "they are left over");
    let server = Server::new(&arguments);
    let mut one = Wire::stream(&a, mac(1));
    datagram.connect(&b).expect("the new server's socket");
    exchange(&mut one, &mut two, 5..10);
    // Sockets of a server that lives are another's.
    for listen in [at("qemu", &a), at("qemu-dgram", &b)] {
        let output = vmring(&["serve", "--network", "embedded:lab", "--listen", &listen]);
        assert_eq!(output.status.code(), Some(1), "{listen}");
        assert!(
            unfolded(&output.stderr).contains("is the socket of a process that runs"),
            "{output:?}"
        );
    }
    exchange(&mut one, &mut two, 10..15);
    server.report("TERM");
    assert!(!is_socket(&a) && !is_socket(&b), "nothing is left");
}

/// Goal: many clients that say nothing cost descriptors, which the server has, and hold up nobody.
#[test]
fn a_hundred_idle_clients_hold_up_nobody() {
    const IDLE: usize = 100;
    let path = scratch("wires idle").join("a.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    // SAFETY: setrlimit(2) is safe to call between fork and exec, and reads a live limit.
    unsafe {
        command.pre_exec(|| {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
            limit.rlim_cur = 128;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
            Ok(())
        })
    };
    let listen = at("qemu", &path);
    let network = ["serve", "--json", "--network", "embedded:lab", "--connections", "102"];
    let arguments = [&network[..], &["--listen", &listen]].concat();
    let server = Server::of(command.args(&arguments), &arguments);
    let idle: Vec<_> = (0..IDLE).map(|_| connected(&path)).collect();
    let mut one = Wire::stream(&path, mac(1));
    let mut two = Wire::stream(&path, mac(2));
    exchange(&mut one, &mut two, 0..20);
    #[cfg(target_os = "linux")]
    {
        let id = server.child.as_ref().expect("it runs").id();
        let files = std::fs::read_dir(format!("/proc/{id}/fd")).expect("its files").count();
        assert!(files < 128 + 12 * (IDLE + 2), "{files}");
        // What translates for guests has its own on top, if the system gives the server so many.
        let limits = std::fs::read_to_string(format!("/proc/{id}/limits")).expect("its limits");
        let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
        let mut numbers = line.split_whitespace().skip(3);
        let mut number = || numbers.next().and_then(|word| word.parse().ok()).unwrap_or(u64::MAX);
        let (soft, hard) = (number(), number());
        assert!(soft >= hard.min(4096 + 128), "{line}");
    }
    // One more waits until another has left.
    let mut more = Wire::stream(&path, mac(3));
    let hello = packet(mac(3), mac(1), 60, 1);
    more.send(&hello);
    assert!(one.next(SHORT).is_none(), "there are too many");
    drop(idle);
    assert_eq!(one.receive(), hello);
    let report = server.report("TERM");
    assert_eq!(report["sockets"][0]["connections"], IDLE + 3, "{report:#}");
}

#[test]
fn a_wire_with_wrong_arguments_is_refused_in_a_sentence() {
    let folder = scratch("wires wrong");
    let file = folder.join("file");
    std::fs::write(&file, "no socket").expect("a file");
    let good = at("qemu", &folder.join("a.sock"));
    for (listen, said) in [
        (at("qemu", &file), "exists and is no socket"),
        (at("vfkit", &file), "exists and is no socket"),
        (at("qemu", &folder.join("none/a.sock")), "No such file"),
        (at("qemu", &folder.join("x".repeat(120))), "qemu:"),
        ("qemu:fd=99".to_owned(), "qemu:fd=99: "),
        ("qemu:/a,queues=2".to_owned(), "a socket of qemu has no option 'queues'"),
        ("qemu:/a,own=/b".to_owned(), "a socket of qemu has no option 'own'"),
        ("vfkit:/a,own=/b".to_owned(), "add client"),
        ("slirp:/a".to_owned(), "there is no wire 'slirp:/a'; use vhost-user:PATH, qemu:PATH"),
        (good.clone(), "is there twice"),
    ] {
        let arguments = ["serve", "--network", "embedded:lab", "--listen", &good, "--listen"];
        let message = refused(&[&arguments[..], &[&listen]].concat());
        assert!(message.contains(said), "{listen}: {message}");
        assert!(!is_socket(&folder.join("a.sock")), "nothing is left");
    }
    let message = refused(&["serve", "--network", "embedded:lab", "--connect", "qemu:fd=7"]);
    assert!(message.contains("a client needs a path"), "{message}");
}

/// A TCP segment over IPv4 from one to the other, whose checksum is left to others.
fn segment(from: &Wire, to: &Wire, payload: usize) -> Vec<u8> {
    let total = (40 + payload) as u16;
    let mut frame = [&to.mac[..], &from.mac, &[8, 0, 0x45, 0]].concat();
    frame.extend(total.to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.extend((0..payload).map(|i| (i / 7) as u8));
    frame
}

/// The payload of the next segment, whose checksum is whole.
fn whole_payload(to: &mut Wire) -> Vec<u8> {
    loop {
        let frame = to.next(LIMIT).expect("a segment arrives");
        if frame[12..14] != [8, 0] || frame[..6] != to.mac {
            continue;
        }
        let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        assert_eq!(frame.len(), 14 + total);
        let len = (total - 20) as u16;
        let pseudo = [&frame[26..34], &[0, 6], &len.to_be_bytes()].concat();
        let words = pseudo.chunks(2).chain(frame[34..].chunks(2));
        let mut sum: u32 =
            words.map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        assert_eq!(sum, 0xffff, "the checksum of a segment of {len} bytes is not whole");
        return frame[54..].to_vec();
    }
}

/// Goal: guests of krunkit with offload exchange 64 KiB at once, without a header, and one that does not
/// offload gets segments. All checksums are whole when they arrive.
#[test]
fn guests_with_implied_offload_send_large_segments() {
    let folder = scratch("wires implied");
    let [a, b, c] = ["a.sock", "b.sock", "c.sock"].map(|name| folder.join(name));
    let implied = |path: &Path| format!("{},offload=implied", at("krunkit", path));
    let [one, other, plain] = [implied(&a), implied(&b), at("qemu", &c)];
    let server = Server::new(&["--listen", &one, "--listen", &other, "--listen", &plain]);
    let mut one = Wire::vfkit(&a, &folder.join("a.own"), mac(1));
    let mut other = Wire::vfkit(&b, &folder.join("b.own"), mac(2));
    let mut plain = Wire::stream(&c, mac(3));
    exchange(&mut one, &mut other, 0..5);
    exchange(&mut one, &mut plain, 0..5);
    for payload in [0, 1, 100, 1460, 1461, 9000, 65_000] {
        let sent = segment(&one, &other, payload);
        one.send(&sent);
        assert_eq!(whole_payload(&mut other), sent[54..], "{payload}");
        let sent = segment(&one, &plain, payload);
        one.send(&sent);
        let mut came = Vec::new();
        while came.len() < payload || payload == 0 {
            let part = whole_payload(&mut plain);
            assert!(part.len() <= 1460, "{}", part.len());
            came.extend(part);
            if payload == 0 {
                break;
            }
        }
        assert_eq!(came, sent[54..], "{payload}");
    }
    let report = server.report("TERM");
    assert_eq!(counted(&report, 0, "tx_too_big"), 0, "{report:#}");
    for wrong in ["qemu:s,offload=implied", "krunkit:s,vnet_hdr,offload=implied"] {
        let said = refused(&["serve", "--network", "embedded:lab", "--listen", wrong]);
        assert!(said.contains("implied"), "{said}");
    }
}
