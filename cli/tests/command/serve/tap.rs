//! Guests below a TAP: the switch gives each what is for it.

use std::net::UdpSocket;

use super::guest::{Guest, mac, packet};
use super::*;
use crate::tap::is_possible;

pub(super) const HOST: [u8; 4] = [10, 9, 0, 1];
const PORT: u16 = 4789;

/// Runs `test` in a network namespace of its own, and whatever it starts.
pub(super) fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let test = move || {
        // SAFETY: the argument is a plain number. The call only concerns this thread and what it
        // starts.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        test()
    };
    thread::spawn(test).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

pub(super) fn address(guest: u8) -> [u8; 4] {
    [10, 9, 0, 10 + guest]
}

/// An ARP packet of a guest: a question for the host's address.
fn question(guest: u8) -> Vec<u8> {
    let own = mac(guest);
    let ethernet = [&[0xff; 6][..], &own, &[8, 6]].concat();
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &own, &address(guest), &[0; 6], &HOST].concat();
    let mut packet = [ethernet, arp].concat();
    packet.resize(60, 0);
    packet
}

/// The Internet checksum (RFC 1071) of these bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|two| u32::from(u16::from_be_bytes([two[0], *two.get(1).unwrap_or(&0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// A UDP packet of a guest to the host.
fn udp(guest: u8, host_mac: &[u8], text: &[u8]) -> Vec<u8> {
    let len = |extra: usize| ((text.len() + extra) as u16).to_be_bytes();
    let mut ip =
        [&[0x45, 0][..], &len(28), &[0, 0, 0x40, 0], &[64, 17, 0, 0], &address(guest), &HOST]
            .concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    let mut udp = [&PORT.to_be_bytes()[..], &PORT.to_be_bytes(), &len(8), &[0, 0], text].concat();
    let sum = checksum(&[&ip[12..20], &[0, 17], &len(8), &udp].concat());
    udp[6..8].copy_from_slice(&sum);
    let ethernet = [host_mac, &mac(guest), &[8, 0]].concat();
    let mut packet = [ethernet, ip, udp].concat();
    packet.resize(packet.len().max(60), 0);
    packet
}

/// The next IPv4 packet. Every packet on the way is for this guest or for all.
fn next(guest: &mut Guest) -> Vec<u8> {
    loop {
        let packet = guest.receive();
        assert!(packet[..6] == guest.mac || packet[0] & 1 == 1, "for another: {packet:x?}");
        if packet[12..14] == [8, 0] && packet[..6] == guest.mac {
            return packet;
        }
    }
}

/// Asks for the host's MAC address.
pub(super) fn host_mac(guest: &mut Guest, number: u8) -> Vec<u8> {
    guest.send(&question(number));
    loop {
        let packet = guest.receive();
        // The host may still send to a guest that has left, and the switch floods that.
        if packet[12..14] == [8, 6] && packet[..6] == guest.mac {
            assert_eq!(packet[28..32], HOST);
            return packet[6..12].to_vec();
        }
    }
}

/// Two guests, on these sockets, exchange packets with the host in `rounds` rounds.
pub(super) fn talk(a: &Path, b: &Path, rounds: usize) -> [Guest; 2] {
    let host = UdpSocket::bind(("10.9.0.1", PORT)).expect("the host's address");
    host.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let mut guests = [Guest::new(a, mac(1)), Guest::new(b, mac(2))];
    for guest in &mut guests {
        guest.post(128);
    }
    let host_mac = host_mac(&mut guests[0], 1);
    assert_eq!(host_mac, self::host_mac(&mut guests[1], 2));
    for round in 0..rounds {
        for (guest, number) in guests.iter_mut().zip([1, 2]) {
            let text = format!("from guest {number}, round {round}, {}", "x".repeat(round * 20));
            guest.send(&udp(number, &host_mac, text.as_bytes()));
            let mut heard = [0; 2048];
            let (len, from) = host.recv_from(&mut heard).expect("the guest's packet");
            assert_eq!(heard[..len], *text.as_bytes());
            assert_eq!(from.ip(), std::net::IpAddr::from(address(number)));
            host.send_to(text.to_uppercase().as_bytes(), from).expect("it is sent");
        }
        for (guest, number) in guests.iter_mut().zip([1, 2]) {
            let heard = next(guest);
            assert_eq!(heard[30..34], address(number));
            let text = format!("FROM GUEST {number}, ROUND {round}, ");
            assert_eq!(heard[42..42 + text.len()], *text.as_bytes());
        }
    }
    guests
}

fn through_a_tap(network: &str, name: &str, extra: &[&str]) -> Value {
    let folder = scratch(&format!("serve tap {name}"));
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let (one, two) = (format!("{},mac=learn", listen(&a)), listen(&b));
    let arguments = [&["--network", network, "--listen", &one, "--listen", &two], extra].concat();
    let server = Server::on(&arguments);
    let mut guests = talk(&a, &b, 50);
    // The guests reach each other, and the host does not see it.
    let [one, two] = &mut guests;
    exchange(one, two, 0..50);
    // One whose address is known sends from no other.
    one.send(&packet(mac(9), two.mac, 60, 1));
    one.sync();
    exchange(one, two, 0..2);
    // What is for a station that nobody knows leads to the TAP, and to no other guest.
    one.send(&packet(one.mac, mac(77), 60, 1));
    one.sync();
    host_mac(two, 2);
    let report = server.report("TERM");
    let ways = &report["uplink"]["ways"];
    // What the host gets: a question and 50 packets of each guest, and nothing of what they say to each
    // other.
    let [to_guests, to_host] = [0, 1].map(|way| ways[way]["packets_written"].as_u64());
    assert!((102..152).contains(&to_host.expect("a number")), "{ways:#}");
    assert!(to_guests >= Some(102), "{ways:#}");
    assert_eq!(report["sockets"][0]["drops_by_reason"]["spoofed"], 1);
    report
}

/// Two guests and the host on one TAP: no frame reaches the wrong guest.
#[test]
fn two_guests_and_the_host_share_a_tap() {
    if !is_possible() {
        return;
    }
    in_namespace(|| {
        let report = through_a_tap("tap:t0,host,10.9.0.1/24", "host", &[]);
        let kept = report["sandbox"]["capabilities"]["state"].as_str().expect("words");
        assert!(kept.starts_with("none but CAP_NET_ADMIN"), "{kept}");
        let links = std::fs::read_to_string("/proc/thread-self/net/dev").expect("/proc");
        assert!(!links.contains("t0:"), "the TAP is removed: {links}");
    });
}

/// A guest that sends no large packets costs the kernel less than one call a packet: what it has sent
/// together goes into the TAP as one. What the host's sockets get is the same.
#[test]
fn what_a_guest_without_offload_sends_is_merged_towards_the_tap() {
    if !is_possible() {
        return;
    }
    in_namespace(|| {
        let path = scratch("serve tap merging").join("a.sock");
        let network = ["--network", "tap:t0,host,10.9.0.1/24", "--listen", &listen(&path)];
        let server = Server::on(&network);
        let host = UdpSocket::bind(("10.9.0.1", PORT)).expect("the host's address");
        host.set_read_timeout(Some(LIMIT)).expect("a timeout");
        let mut guest = Guest::new(&path, mac(1));
        guest.post(64);
        let host_mac = host_mac(&mut guest, 1);
        const BATCH: usize = 32;
        let text =
            |round: usize, number: usize| format!("round {round:03}, {number:03}, {:900}", "");
        for round in 0..4 {
            // A server that is stopped finds all of them when it goes on.
            server.signal("STOP");
            for number in 0..BATCH {
                guest.send(&udp(1, &host_mac, text(round, number).as_bytes()));
            }
            server.signal("CONT");
            for number in 0..BATCH {
                let mut heard = [0; 2048];
                let (len, _) = host.recv_from(&mut heard).expect("the guest's packet");
                assert_eq!(heard[..len], *text(round, number).as_bytes());
            }
        }
        let report = server.report("TERM");
        let to_host = &report["uplink"]["ways"][1];
        let offloads = report["uplink"]["ends"][0]["offloads"].as_array().expect("a list");
        let cuts_udp = offloads.iter().any(|one| one == "uso");
        let merged = to_host["segments_merged"].as_u64().expect("a number");
        assert_eq!(merged > 0, cuts_udp, "{report:#}");
        assert_eq!(to_host["packets_read"].as_u64(), Some(1 + 4 * BATCH as u64), "{report:#}");
        assert_eq!(to_host["drops"], 0, "{report:#}");
    });
}

/// Makes a TAP as an administrator does. Returns whether that is possible.
pub(super) fn set_up() -> bool {
    for arguments in [
        &["tuntap", "add", "t0", "mode", "tap"][..],
        &["address", "add", "10.9.0.1/24", "dev", "t0"],
        &["link", "set", "t0", "up"],
    ] {
        match Command::new("ip").args(arguments).status() {
            Ok(status) => assert!(status.success(), "ip {arguments:?}"),
            Err(error) => {
                eprintln!("skipped: ip: {error}");
                return false;
            }
        }
    }
    true
}

/// The engines that work here.
pub(super) fn engines() -> Vec<&'static str> {
    match vmring::TapEngine::IoUring.resolve() {
        Ok(_) => vec!["plain", "io_uring"],
        Err(error) => {
            eprintln!("skipped: io_uring: {error}");
            vec!["plain"]
        }
    }
}

/// Goal: the thread that writes the leases of a TAP's clients is confined as the others are, although
/// the file was opened with the TAP, before the confinement.
#[test]
fn the_writer_of_a_taps_leases_is_confined_too() {
    if !is_possible() {
        return;
    }
    in_namespace(|| {
        let folder = scratch("serve tap leases");
        let (path, file) = (folder.join("a.sock"), folder.join("leases"));
        let name = file.to_str().expect("UTF-8");
        let network = ["--network", "tap:t0,host,10.9.0.1/24", "--lease-file", name];
        let server = Server::on(&[&network[..], &["--listen", &listen(&path)]].concat());
        // CAP_NET_ADMIN puts the host's end back.
        let net_admin = 1 << 12;
        expect_confined_threads(&server, net_admin, &["signals", "uplink", "vmring"]);
        let mut guest = Guest::new(&path, mac(1));
        guest.post(64);
        guest.lease();
        let threads = ["guest1", "signals", "uplink", "vmring", "vmring-leases"];
        expect_confined_threads(&server, net_admin, &threads);
        let report = server.report("TERM");
        for part in PARTS {
            assert_eq!(report["sandbox"][part]["complete"], true, "{report:#}");
        }
        let leases = std::fs::read_to_string(&file).expect("the leases");
        assert!(leases.contains("52:54:00:12:34:01"), "{leases}");
    });
}

/// The TAP is the administrator's: the server needs no capability after its start.
#[test]
fn guests_share_a_tap_that_is_set_up_by_others() {
    if !is_possible() {
        return;
    }
    in_namespace(|| {
        if !set_up() {
            return;
        }
        for engine in engines() {
            let report = through_a_tap("tap:t0", engine, &["--engine", engine]);
            for part in ["new_privileges", "capabilities", "files_and_network", "system_calls"] {
                assert_eq!(report["sandbox"][part]["complete"], true, "{report:#}");
            }
            assert_eq!(report["sandbox"]["capabilities"]["state"], "none");
        }
    });
}

/// A TAP that goes away ends the server, which says why: a service manager starts it again.
#[test]
fn a_tap_that_is_removed_ends_the_server() {
    if !is_possible() {
        return;
    }
    in_namespace(|| {
        if !set_up() {
            return;
        }
        for engine in engines() {
            let path = scratch(&format!("serve tap gone {engine}")).join("a.sock");
            let listen = listen(&path);
            let arguments = ["--network", "tap:t0", "--engine", engine, "--listen", &listen];
            let server = Server::on(&arguments);
            Guest::new(&path, mac(1)).sync();
            let removed = Command::new("ip").args(["link", "delete", "t0"]).status();
            assert!(removed.expect("there is ip").success());
            let (status, printed, said) = server.ended();
            assert_eq!(status.code(), Some(1), "{said}");
            let report: Value = serde_json::from_str(&printed).expect("one JSON object");
            let failed = report["failed"].as_str().expect("words");
            assert!(failed.starts_with("tap:t0: "), "{failed}");
            assert!(said.ends_with(&format!("vmring: {failed}")), "{said}");
            assert!(!is_socket(&path));
            assert!(set_up());
        }
    });
}
