//! The way out of embedded networks: guests over rings, and servers and clients of the host.

mod guest;
#[cfg(target_os = "linux")]
mod host_v6;
mod ipv6;
mod names;
mod workers;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::tcp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, Ipv4Cidr};
use vmring::device::embedded::nat::{
    Counter, ForwardRule, Guest as Whose, HostAccess, HostPort, Limits, NatControl, NatSettings,
    Protocol,
};
use vmring::{Embedded, Error, Interface, Mode, Socket};

use crate::sockets::Folder;
use crate::support::{LONG, eventually, guarded, myself, scaled, skip, stage, unique};
use guest::{GATEWAY, Guest, datagram};

/// An address of the world (RFC 5737). Nothing is sent there.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);

/// An interface on a shared network with these settings.
fn join(name: &str, settings: &NatSettings, control: &NatControl) -> Interface {
    let driver = Embedded::network(name).nat(settings.clone()).nat_control(control);
    Interface::builder().device(driver).start().expect("an interface")
}

/// Settings that let guests reach a server of this process at the host's loopback address.
fn reaching(port: u16, protocol: Protocol) -> NatSettings {
    NatSettings::new().host_port(HostPort { port, protocol })
}

fn gateway_port(port: u16) -> SocketAddr {
    SocketAddr::new(GATEWAY.into(), port)
}

fn guest_address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 64, last)
}

/// Bytes of which each place is known.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 7 + index / 251) as u8).collect()
}

/// A server that reads a request to its end, and answers each connection with `answer`.
fn server(connections: usize, answer: Vec<u8>) -> (u16, thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let thread = thread::spawn(move || {
        let mut request = Vec::new();
        for _ in 0..connections {
            let (mut stream, _) = listener.accept().expect("a connection");
            stream.set_read_timeout(Some(LONG)).expect("a timeout");
            request.clear();
            stream.read_to_end(&mut request).expect("the request");
            stream.write_all(&answer).expect("the answer's way");
        }
        request
    });
    (port, thread)
}

/// Like [`server`], for as many connections as come. It ends with the process.
fn lasting_server(answer: &'static [u8]) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            stream.set_read_timeout(Some(LONG)).expect("a timeout");
            if stream.read_to_end(&mut Vec::new()).is_ok() {
                let _ = stream.write_all(answer);
            }
        }
    });
    port
}

/// Fetches from a server at a port of the gateway's address: sends a request and its end, and returns
/// what comes.
fn fetch(guest: &mut Guest, port: u16, from: u16, request: &[u8]) -> Vec<u8> {
    let connection = guest.connect(gateway_port(port), from);
    guest.until("a connection", |guest| guest.tcp(connection).may_send().then_some(()));
    guest.write_all(connection, request);
    guest.tcp(connection).close();
    guest.read_to_end(connection)
}

/// Goal: a guest whose address was set by hand fetches from a server of the host through the gateway's
/// address: all bytes, both ways, with connections that are half closed.
#[test]
fn a_guest_with_a_static_address_fetches_from_a_server_of_the_host() {
    guarded(|| {
        let (answer, request) = (pattern(300_000), pattern(100_000));
        let (port, server) = server(1, answer.clone());
        let control = NatControl::default();
        let interface = join(&unique("fetch"), &reaching(port, Protocol::Tcp), &control);
        let mut guest = Guest::with_address(interface, guest_address(77));
        assert!(fetch(&mut guest, port, 40_000, &request) == answer, "the answer differs");
        assert!(server.join().expect("the server") == request, "the request differs");
        let report = control.report().expect("a report");
        assert_eq!(report.counters[Counter::TcpEstablished], 1);
        assert!(guest.counter("NAT TCP opened") == 1 && guest.counter("sent to the router") > 0);
    });
}

/// Goal: a guest gets out with the address that it was leased, by UDP, and answers come back.
#[test]
fn a_guest_with_a_lease_asks_by_udp() {
    guarded(|| {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        server.set_read_timeout(Some(LONG)).expect("a timeout");
        let port = server.local_addr().expect("an address").port();
        let control = NatControl::default();
        let interface = join(&unique("udp"), &reaching(port, Protocol::Udp), &control);
        let mut guest = Guest::with_dhcp(interface);
        let socket = guest.udp_at(4321);
        guest.udp(socket).send_slice(b"question", gateway_port(port)).expect("space");
        guest.turn();
        let server = thread::spawn(move || {
            let mut buffer = [0; 100];
            let (len, from) = server.recv_from(&mut buffer).expect("the question");
            server.send_to(b"answer", from).expect("the answer's way");
            (buffer[..len].to_vec(), from)
        });
        let (answer, from) = guest.until("the answer", |guest| {
            let (bytes, meta) = guest.udp(socket).recv().ok()?;
            Some((bytes.to_vec(), meta.endpoint))
        });
        assert_eq!((&answer[..], from), (&b"answer"[..], (IpAddress::Ipv4(GATEWAY), port).into()));
        let (question, from) = server.join().expect("the server");
        // The guest's port is free on the host, most likely.
        assert_eq!((&question[..], from.ip()), (&b"question"[..], Ipv4Addr::LOCALHOST.into()));
        let report = control.report().expect("a report");
        let flow = report.datagram_flows.first().expect("a flow");
        assert_eq!(flow.guest, SocketAddr::new(guest.address().into(), 4321));
        assert_eq!(flow.to, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
    });
}

/// An address of this host that is not its loopback address.
fn address_of_this_host() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) if !address.is_loopback() => Some(address),
        _ => None,
    }
}

/// Goal: a guest pings an address of the host's world where the system has sockets for that.
#[test]
fn a_guest_pings() {
    guarded(|| {
        let Some(host) = address_of_this_host() else {
            return skip("this host has no address but loopback");
        };
        let settings = NatSettings::new().host_access(HostAccess::Allow);
        let control = NatControl::default();
        let interface = join(&unique("ping"), &settings, &control);
        let mut guest = Guest::with_address(interface, guest_address(3));
        let socket = guest.ping(77);
        let request = Icmpv4Repr::EchoRequest { ident: 77, seq_no: 5, data: b"are you there?" };
        let buffer = guest.icmp(socket).send(request.buffer_len(), host.into()).expect("space");
        request.emit(&mut Icmpv4Packet::new_unchecked(buffer), &ChecksumCapabilities::default());
        let answer = guest.until("an answer or a refusal", |guest| {
            if let Ok((bytes, from)) = guest.icmp(socket).recv() {
                return Some(Some((bytes.to_vec(), from)));
            }
            (guest.counter("NAT echo forbidden") > 0).then_some(None)
        });
        let Some((bytes, from)) = answer else {
            return skip("the system gives this process no sockets for ICMP echo");
        };
        assert_eq!(from, host.into());
        let packet = Icmpv4Packet::new_checked(&bytes[..]).expect("a reply");
        let reply = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).expect("a reply");
        let expected = Icmpv4Repr::EchoReply { ident: 77, seq_no: 5, data: b"are you there?" };
        assert_eq!(reply, expected);
    });
}

/// Goal: neither the host nor its links are reached, nor what a rule denies, and each refusal is counted
/// by its reason. What a rule allows is reached all the same.
#[test]
fn what_the_policy_denies_is_refused_at_once_and_counted() {
    guarded(|| {
        let (port, server) = server(1, b"welcome".to_vec());
        let settings = reaching(port, Protocol::Tcp)
            .deny("198.51.100.0/24".parse().expect("a rule"))
            .deny("203.0.113.7:22,tcp".parse().expect("a rule"));
        let control = NatControl::default();
        let interface = join(&unique("policy"), &settings, &control);
        let mut guest = Guest::with_address(interface, guest_address(9));
        let mut denied = vec![
            ("127.0.0.1:80".to_owned(), Counter::DeniedLoopback),
            ("169.254.169.254:80".to_owned(), Counter::DeniedLinkLocal),
            ("198.51.100.1:443".to_owned(), Counter::DeniedByRule),
            ("203.0.113.7:22".to_owned(), Counter::DeniedByRule),
            ("100.100.100.200:80".to_owned(), Counter::DeniedMetadata),
        ];
        denied.extend(
            address_of_this_host().map(|address| (format!("{address}:22"), Counter::DeniedHost)),
        );
        for (index, (to, counter)) in denied.iter().enumerate() {
            let to: SocketAddr = to.parse().expect("an address");
            let connection = guest.connect(to, 50_000 + index as u16);
            guest.until(&format!("{to} is refused"), |_| {
                (control.report().ok()?.counters[*counter] > 0).then_some(())
            });
            guest.tcp(connection).abort();
        }
        // A port of the gateway that leads nowhere is the gateway's, which refuses it.
        let other = if port == 1 { 2 } else { 1 };
        let connection = guest.connect(gateway_port(other), 51_000);
        guest.until("the gateway refuses", |guest| {
            (guest.tcp(connection).state() == tcp::State::Closed).then_some(())
        });
        assert_eq!(fetch(&mut guest, port, 52_000, b"may I?"), b"welcome");
        server.join().expect("the server");
    });
}

/// Goal: port forwards by the interface's own functions: added before the guest is there, listed, used by
/// TCP and UDP, removed. What the system refuses is the system's error.
#[test]
fn ports_of_the_host_lead_to_a_guest() {
    guarded(|| {
        let control = NatControl::default();
        let interface = join(&unique("forward"), &NatSettings::new(), &control);
        let address = guest_address(20);
        let forward = |protocol, external_port| vmring::config::PortForward {
            protocol,
            external_port,
            internal_address: address.into(),
            internal_port: 2222,
        };
        interface.add_port_forward(&forward(vmring::config::Protocol::Tcp, 0)).expect("a forward");
        interface.add_port_forward(&forward(vmring::config::Protocol::Udp, 0)).expect("a forward");
        let forwards = interface.port_forwards().expect("the forwards");
        let port_of = |protocol| {
            let of_it = |forward: &&vmring::config::PortForward| forward.protocol == protocol;
            let found = forwards.iter().find(of_it).expect("a forward of the protocol");
            assert_eq!((found.internal_address, found.internal_port), (address.into(), 2222));
            assert_ne!(found.external_port, 0);
            found.external_port
        };
        let (tcp, udp) =
            (port_of(vmring::config::Protocol::Tcp), port_of(vmring::config::Protocol::Udp));
        // The guest is not there yet. The peer waits in the backlog.
        let mut peer = TcpStream::connect((Ipv4Addr::LOCALHOST, tcp)).expect("a listener");
        peer.set_read_timeout(Some(LONG)).expect("a timeout");
        let mut guest = Guest::with_address(interface, address);
        let listener = guest.listen(2222);
        // It is silent. Its answer to a question tells where it is.
        guest.until("a connection", |guest| guest.tcp(listener).may_send().then_some(()));
        let seen = guest.tcp(listener).remote_endpoint().expect("a peer");
        assert_eq!(seen.addr, IpAddress::Ipv4(GATEWAY), "loopback has the gateway's address");
        peer.write_all(b"hello").expect("it goes out");
        let hello = guest.until("bytes of the peer", |guest| {
            let socket = guest.tcp(listener);
            let mut bytes = [0; 10];
            let len = socket.can_recv().then(|| socket.recv_slice(&mut bytes).ok()).flatten()?;
            Some(bytes[..len].to_vec())
        });
        assert_eq!(hello, b"hello");
        guest.write_all(listener, b"hello, too");
        guest.tcp(listener).close();
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            peer.read_to_end(&mut bytes).map(|_| bytes)
        });
        guest.until("the peer has it all", |_| reader.is_finished().then_some(()));
        assert_eq!(reader.join().expect("a reader").expect("no error"), b"hello, too");

        stage("UDP");
        let socket = guest.udp_at(2222);
        let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        peer.set_nonblocking(true).expect("a socket");
        peer.send_to(b"knock", (Ipv4Addr::LOCALHOST, udp)).expect("it goes out");
        let from = guest.until("a datagram", |guest| {
            let (bytes, meta) = guest.udp(socket).recv().ok()?;
            assert_eq!(bytes, b"knock");
            Some(meta.endpoint)
        });
        guest.udp(socket).send_slice(b"come in", from).expect("space");
        guest.until("its answer", |_| {
            let mut bytes = [0; 10];
            let (len, from) = peer.recv_from(&mut bytes).ok()?;
            assert_eq!((&bytes[..len], from.port()), (&b"come in"[..], udp));
            Some(())
        });

        stage("what is refused");
        let refused = |rule: &str| control.add_forward(&rule.parse::<ForwardRule>().expect(rule));
        let kind_of = |error: Error| match error {
            Error::Io { source, .. } => source.kind(),
            other => panic!("{other}"),
        };
        let again = refused(&format!("{tcp}=192.168.64.21:1"));
        assert_eq!(kind_of(again.expect_err("the port is taken")), ErrorKind::AddrInUse);
        let nowhere = refused("192.0.2.77:0=192.168.64.21:1");
        assert_eq!(kind_of(nowhere.expect_err("not this host")), ErrorKind::AddrNotAvailable);
        match refused("1=192.168.64.21:1") {
            Ok(_) => skip("this process may listen at port 1"),
            Err(error) => assert_eq!(kind_of(error), ErrorKind::PermissionDenied),
        }
        let outside = refused("0=10.0.0.1:1").expect_err("no guest of this network").to_string();
        assert!(outside.contains("no guest of this network"), "{outside}");

        stage("by a MAC address, and removal");
        let rule = ForwardRule::new(Protocol::Tcp, 0, Whose::Mac(guest.mac()), 2223);
        let at = control.add_forward(&rule).expect("a forward");
        assert!(control.remove_forward(Protocol::Tcp, at, false).expect("an answer"));
        assert!(!control.remove_forward(Protocol::Tcp, at, false).expect("an answer"));
        guest
            .interface
            .remove_port_forward(vmring::config::Protocol::Tcp, tcp)
            .expect("it is there");
        let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, tcp)).expect_err("nobody listens");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let gone = guest.interface.remove_port_forward(vmring::config::Protocol::Tcp, tcp);
        assert!(gone.expect_err("it is gone").to_string().contains("no tcp port"));
    });
}

/// Goal: what a peer sends first to a guest that nobody knows yet, and which says nothing, arrives: the guest is
/// asked for, and the datagram waits.
#[test]
fn the_first_datagram_waits_for_a_silent_guest() {
    guarded(|| {
        let control = NatControl::default();
        let interface = join(&unique("first datagram"), &NatSettings::new(), &control);
        let address = guest_address(21);
        let rule: ForwardRule = format!("0={address}:2222,udp").parse().expect("a rule");
        let at = control.add_forward(&rule).expect("a forward");
        let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let mut sent = Instant::now();
        peer.send_to(b"first", at).expect("it goes out");
        let mut guest = Guest::with_address(interface, address);
        let socket = guest.udp_at(2222);
        let mut dropped = 0;
        guest.until("the first datagram", |guest| {
            let count = control.report().expect("a report").counters[Counter::NoGuest];
            if count > dropped {
                // This machine has stood still for 30 seconds.
                let waited = sent.elapsed();
                assert!(waited >= Duration::from_secs(29), "it is dropped after {waited:?}");
                (sent, dropped) = (Instant::now(), count);
                peer.send_to(b"first", at).expect("it goes out");
            }
            let (bytes, _) = guest.udp(socket).recv().ok()?;
            assert_eq!(bytes, b"first");
            Some(())
        });
        let report = control.report().expect("a report");
        let [forward] = &report.forwards[..] else { panic!("{:?}", report.forwards) };
        assert_eq!((forward.accepted, forward.refused), (1, dropped));
        assert_eq!((forward.carried.datagrams_received, forward.carried.bytes_received), (1, 5));
    });
}

/// Goal: a guest that floods loses its own frames, which are counted, and another guest goes on.
#[test]
fn a_guest_that_floods_leaves_the_others_alone() {
    guarded(|| {
        let sink = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let flooded = sink.local_addr().expect("an address").port();
        let (port, server) = server(1, pattern(100_000));
        let name = unique("flood");
        let settings = reaching(port, Protocol::Tcp)
            .host_port(HostPort { port: flooded, protocol: Protocol::Udp });
        let control = NatControl::default();
        let interface = join(&name, &settings, &control);
        let lost = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let flooding = {
            let (interface, lost) = (join(&name, &settings, &control), lost.clone());
            thread::spawn(move || {
                let mut guest = Guest::with_address(interface, guest_address(66));
                let macs = (guest.mac(), guest.ask_for_gateway(guest_address(66)));
                let frame = datagram(macs, (guest_address(66), GATEWAY), flooded);
                while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                    guest.send_raw(&frame, 600);
                    lost.store(guest.drops("router busy"), Ordering::Relaxed);
                }
            })
        };
        eventually("the flood fills the guest's outbox", || lost.load(Ordering::Relaxed) > 0);
        let mut guest = Guest::with_address(interface, guest_address(2));
        let answer = fetch(&mut guest, port, 40_000, &pattern(50_000));
        assert!(answer == pattern(100_000), "the answer differs");
        server.join().expect("the server");
        assert_eq!(guest.drops("router busy"), 0, "the other guest loses nothing");
        drop(stop);
        flooding.join().expect("the flood");
    });
}

/// Goal: what a guest's own flood pushes out is a counted drop, and its connection recovers from that.
#[test]
fn a_connection_survives_the_flood_of_its_own_guest() {
    guarded(|| {
        let sink = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let flooded = sink.local_addr().expect("an address").port();
        let (port, server) = server(1, b"thanks".to_vec());
        let settings = reaching(port, Protocol::Tcp)
            .host_port(HostPort { port: flooded, protocol: Protocol::Udp });
        let interface = join(&unique("own flood"), &settings, &NatControl::default());
        let mut guest = Guest::with_address(interface, guest_address(4));
        let macs = (guest.mac(), guest.ask_for_gateway(guest_address(4)));
        let frame = datagram(macs, (guest_address(4), GATEWAY), flooded);
        let request = pattern(60_000);
        let connection = guest.connect(gateway_port(port), 40_000);
        let (mut sent, mut turns) = (0, 0);
        guest.until("all bytes on their way, between floods", |guest| {
            turns += 1;
            if turns < 20 || guest.drops("router busy") == 0 {
                guest.send_raw(&frame, 600);
            }
            let socket = guest.tcp(connection);
            if sent < request.len() && socket.can_send() {
                sent += socket.send_slice(&request[sent..]).expect("an open connection");
            }
            (sent == request.len()).then_some(())
        });
        guest.tcp(connection).close();
        assert_eq!(guest.read_to_end(connection), b"thanks");
        assert!(server.join().expect("the server") == request, "the request differs");
        assert!(guest.drops("router busy") > 0, "the flood fits into the guest's outbox");
    });
}

/// Goal: a guest with few reads posted, which refuses most of what comes, gets every byte.
#[test]
fn what_a_slow_guest_refuses_comes_later() {
    guarded(|| {
        let (port, server) = server(1, pattern(400_000));
        let control = NatControl::default();
        let driver = Embedded::network(unique("slow"))
            .nat(reaching(port, Protocol::Tcp))
            .nat_control(&control)
            .overflow(1);
        let interface = Interface::builder().device(driver).start().expect("an interface");
        let mut guest = Guest::new(interface, 2);
        guest.set_address(Ipv4Cidr::new(guest_address(5), 24));
        assert!(fetch(&mut guest, port, 40_000, b"all of it") == pattern(400_000));
        server.join().expect("the server");
    });
}

/// Runs the test of this name again in a process of its own, in which `body` runs.
fn in_child(name: &str, body: impl FnOnce()) {
    const CHILD: &str = "VMRING_TEST_NAT_CHILD";
    if std::env::var_os(CHILD).is_some_and(|child| child == name) {
        return body();
    }
    stage("the child process runs");
    let output = myself()
        .args(["--exact", &format!("nat::{name}"), "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .output()
        .expect("a child process");
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{name}: {}\n{out}{err}", output.status);
    assert!(out.contains("1 passed"), "{name} is not the test's name:\n{out}");
}

/// How many threads of this process translate. `None` where the system does not tell.
fn translators() -> Option<usize> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    Some(tasks.flatten().filter_map(name).filter(|name| name.trim() == "vmring-nat").count())
}

/// Goal: nobody has a thread for a way out that he does not use, and none stays.
#[test]
fn the_thread_begins_with_the_first_packet_for_outside_and_ends_with_the_network() {
    guarded(|| {
        in_child(
            "the_thread_begins_with_the_first_packet_for_outside_and_ends_with_the_network",
            || {
                if translators().is_none() {
                    return skip("this system does not tell the names of threads");
                }
                let (port, server) = server(1, b"welcome".to_vec());
                let name = unique("thread");
                let (settings, control) = (reaching(port, Protocol::Tcp), NatControl::default());
                let other = join(&name, &settings, &control);
                // It asks for an address, and finds the gateway.
                let mut guest = Guest::with_dhcp(join(&name, &settings, &control));
                let connection = guest.connect(gateway_port(if port == 1 { 2 } else { 1 }), 39_999);
                guest.until("the gateway refuses", |guest| {
                    (guest.tcp(connection).state() == tcp::State::Closed).then_some(())
                });
                assert_eq!(translators(), Some(0), "nothing was for outside");
                let nothing = control.report().expect("a report");
                assert_eq!((nothing.entries, nothing.descriptors), (0, 0));
                assert_eq!(fetch(&mut guest, port, 40_000, b"may I?"), b"welcome");
                server.join().expect("the server");
                assert_eq!(translators(), Some(1));
                drop(guest);
                assert_eq!(translators(), Some(1), "the network has another interface");
                other.stop(LONG).expect("it stops");
                eventually("the thread ends", || translators() == Some(0));
                control.report().expect_err("the network is gone");
            },
        );
    });
}

/// Goal: a guest that outlives its network's process, as one behind a wire does, goes on within 5 seconds,
/// with the address that it was leased and that nobody remembers.
/// Method: the network ends and begins anew. The guest keeps its stack, and so its neighbours' addresses.
#[test]
fn a_guest_that_outlives_its_network_goes_on() {
    guarded(|| {
        let port = lasting_server(b"welcome");
        let (settings, control) = (reaching(port, Protocol::Tcp), NatControl::default());
        let name = unique("outlives");
        let start = |mac| {
            let driver = Embedded::network(&name).nat(settings.clone()).nat_control(&control);
            Interface::builder().mac(mac).device(driver).start().expect("an interface")
        };
        let mac = vmring::MacAddr6::new(2, 0, 0, 0, 7, 7);
        let mut guest = Guest::with_dhcp(start(mac));
        assert_eq!(fetch(&mut guest, port, 40_000, b"first"), b"welcome");
        goes_on(&mut guest, port, |guest| guest.move_to(|| start(mac)));
    });
}

/// Asserts that a guest goes on within 5 seconds after each `renew` of its network. A machine on which
/// other things take seconds needs several attempts.
fn goes_on(guest: &mut Guest, port: u16, mut renew: impl FnMut(&mut Guest)) {
    let limit = if scaled(10) == 10 { Duration::from_secs(5) } else { LONG };
    let mut took = Vec::new();
    for attempt in 1..=5 {
        renew(guest);
        let again = Instant::now();
        assert_eq!(fetch(guest, port, 40_000 + attempt, b"second"), b"welcome");
        took.push(again.elapsed());
        if took.last() < Some(&limit) {
            return;
        }
    }
    panic!("it took {took:?}");
}

/// A process with a network, to which a guest outside of it has a wire.
struct Process(Child);

impl Process {
    fn start(wire: &Path, port: u16) -> Self {
        let mut command = myself();
        command.args(["--ignored", "--exact", "nat::the_body_of_a_networks_process"]);
        command.args(["--nocapture", "--test-threads=1"]);
        command.env("VMRING_TEST_NAT_WIRE", wire).env("VMRING_TEST_NAT_PORT", port.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut this = Self(command.spawn().expect("it starts"));
        // The wire of the process before may still have its file, but nobody listens there.
        eventually("the process listens", || {
            assert!(this.0.try_wait().expect("a child").is_none(), "it has ended");
            UnixStream::connect(wire).is_ok()
        });
        this
    }

    /// Ends it by SIGKILL.
    fn kill(mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it ends");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Carries frames between two interfaces until this process's input ends.
#[test]
#[ignore = "the test of a killed network starts it in another process"]
fn the_body_of_a_networks_process() {
    let wire = std::env::var_os("VMRING_TEST_NAT_WIRE").expect("the path of a socket");
    let port = std::env::var("VMRING_TEST_NAT_PORT").expect("a port").parse().expect("a port");
    let network = join("of a process", &reaching(port, Protocol::Tcp), &NatControl::default());
    let wire = Interface::builder().device(Socket::stream().listen(wire)).start().expect("a wire");
    let ended = Arc::new(AtomicBool::new(false));
    let input = ended.clone();
    thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        input.store(true, Ordering::Relaxed);
    });
    let mut rings = [network, wire].map(|interface| guest::ring_of(&interface, 64));
    while !ended.load(Ordering::Relaxed) {
        for from in [0, 1] {
            for frame in guest::received(&mut rings[from]) {
                guest::send(&mut rings[1 - from], &frame);
            }
        }
        let [one, other] = &mut rings;
        one.wait(1, Some(Duration::from_millis(1)));
        other.wait(1, Some(Duration::from_millis(1)));
    }
}

/// Goal: a guest that outlives its network's process, which was killed, goes on within 5 seconds after
/// there is another one.
#[test]
fn a_guest_goes_on_after_its_networks_process_was_killed() {
    guarded(|| {
        let port = lasting_server(b"welcome");
        let folder = Folder::new();
        let path = folder.path("wire");
        let mut process = Some(Process::start(&path, port));
        let wire = Socket::stream().connect(&path).reconnect(Some(Duration::from_millis(20)));
        let wire = Interface::builder().device(wire).start().expect("a wire");
        let mut guest = Guest::with_dhcp(wire);
        let address = guest.address();
        assert_eq!(fetch(&mut guest, port, 40_000, b"first"), b"welcome");
        goes_on(&mut guest, port, |_| {
            stage("it is killed");
            process.take().expect("it runs").kill();
            process = Some(Process::start(&path, port));
        });
        assert_eq!(guest.address(), address);
    });
}

/// Goal: nobody takes the address of another guest, whether that has a lease or uses it.
#[test]
fn no_guest_speaks_for_another() {
    guarded(|| {
        let (port, server) = server(1, b"welcome".to_vec());
        let name = unique("source");
        let (settings, control) = (reaching(port, Protocol::Tcp), NatControl::default());
        let mut guest = Guest::with_dhcp(join(&name, &settings, &control));
        assert_eq!(fetch(&mut guest, port, 40_000, b"mine"), b"welcome");
        server.join().expect("the server");
        let address = guest.address();
        let mut thief = Guest::with_address(join(&name, &settings, &control), address);
        let to = [(address, Counter::SourceReserved), (GATEWAY, Counter::SourceGateway)];
        let macs = (thief.mac(), thief.ask_for_gateway(guest_address(99)));
        for (address, counter) in to {
            let frame = datagram(macs, (address, OUTSIDE), 53);
            thief.until("its frame is refused", |thief| {
                thief.send_raw(&frame, 1);
                (control.report().ok()?.counters[counter] > 0).then_some(())
            });
        }
    });
}

/// Goal: whoever joins a network with other settings learns which differ, and host mode and a network
/// without NAT answer that there is no way.
#[test]
fn other_settings_are_refused_and_a_network_can_do_without() {
    guarded(|| {
        let name = unique("settings");
        let control = NatControl::default();
        let settings = NatSettings::new().deny("10.0.0.0/8:22,tcp".parse().expect("a rule"));
        let first = join(&name, &settings, &control);
        let start = |driver: Embedded| Interface::builder().device(driver).start();
        let other = settings.clone().host_port("80".parse().expect("a port"));
        let refused = start(Embedded::network(&name).nat(other)).expect_err("other settings");
        let refused = refused.to_string();
        assert!(refused.contains("with host_port [] and not [80,tcp]"), "{refused}");
        let refused = start(Embedded::network(&name).nat(NatSettings::new())).expect_err("no rule");
        let refused = refused.to_string();
        assert!(refused.contains("with deny [10.0.0.0/8:22,tcp] and not []"), "{refused}");
        let changed = || settings.clone();
        let limits = Limits::default().share(2);
        for (other, told) in [
            (changed().allow("10.1.0.0/16".parse().expect("a rule")), "allow [] and not [10.1."),
            (changed().host_access(HostAccess::Allow), "host_access Deny and not Allow"),
            (changed().forward("0=[fd00::2]:22".parse().expect("a rule")), "forward [] and not [["),
            (changed().limits(limits), "nat limits Limits"),
            (changed().endpoint_independent(true), "endpoint_independent false and not true"),
            (changed().resolvers([([9, 9, 9, 9], 53).into()]), "the host's and not [9.9.9.9:53]"),
        ] {
            let refused = start(Embedded::network(&name).nat(other)).expect_err(told).to_string();
            assert!(refused.contains(told), "{refused}");
        }
        let refused = start(Embedded::network(&name).no_nat()).expect_err("no way out").to_string();
        assert!(refused.contains("with nat yes and not no"), "{refused}");
        start(Embedded::network(&name).nat(settings)).expect("the same settings");
        drop(first);

        for mode in [Mode::Host, Mode::Shared] {
            let driver = Embedded::network(unique("without"));
            let driver = if mode == Mode::Shared { driver.no_nat() } else { driver };
            let interface =
                Interface::builder().mode(mode).device(driver).start().expect("an interface");
            let range = interface.info().ipv4.expect("addresses");
            let refused = interface.port_forwards().expect_err("no forwards").to_string();
            assert!(refused.contains("port forwarding is not supported"), "{refused}");
            let mut guest = Guest::new(interface, 16);
            let own = Ipv4Addr::from(u32::from(range.start) + 1);
            let macs = (guest.mac(), guest.ask_for_gateway(own));
            let frame = datagram(macs, (own, OUTSIDE), 53);
            guest.until("the gateway refuses", |guest| {
                guest.send_raw(&frame, 1);
                (guest.counter("gateway refused routes") > 0).then_some(())
            });
        }
    });
}

/// Goal: a forward of the settings is there when the interface has started, and one that is not possible
/// keeps it from starting, with the system's error.
#[test]
fn forwards_of_the_settings_are_there_from_the_start() {
    guarded(|| {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = taken.local_addr().expect("an address").port();
        let name = unique("from the start");
        let settings = |first: u16, second: u16| {
            let rule = |port: u16| {
                let rule: ForwardRule = format!("{port}=192.168.64.2:22").parse().expect("a rule");
                rule
            };
            NatSettings::new().forward(rule(first)).forward(rule(second))
        };
        let driver = Embedded::network(&name).nat(settings(0, port));
        let refused = Interface::builder().device(driver).start().expect_err("the port is taken");
        assert!(
            matches!(&refused, Error::Io { source, .. } if source.kind() == ErrorKind::AddrInUse)
        );
        drop(taken);
        let control = NatControl::default();
        let first = join(&name, &settings(0, port), &control);
        let second = join(&name, &settings(0, port), &control);
        let forwards = control.report().expect("a report").forwards;
        assert_eq!(forwards.len(), 2, "the second interface adds none");
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("somebody listens");
        drop((first, second));
        let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect_err("nobody listens");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    });
}
