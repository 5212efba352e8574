//! A way out with several threads: what guests see of it is as with one.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use smoltcp::wire::IpAddress;
use vmring::device::embedded::nat::{
    Counter, ForwardRule, HostPort, Limits, NatControl, NatSettings, Protocol,
};
use vmring::{Embedded, Error, Interface};

use super::guest::{GATEWAY, Guest, datagram};
use super::names::{A, ask};
use super::{gateway_port, guest_address, in_child, join, pattern, reaching};
use crate::support::{LONG, eventually, guarded, scaled, skip, stage, unique};

const WORKERS: usize = 3;

/// How many threads of this process translate. `None` where the system does not tell.
fn translators() -> Option<usize> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    Some(tasks.flatten().filter_map(name).filter(|name| name.starts_with("vmring-nat")).count())
}

/// A server that answers each request with the same bytes backwards, on a thread for each connection.
fn mirror(connections: usize) -> (u16, thread::JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let answer = |mut stream: TcpStream| {
        stream.set_read_timeout(Some(LONG)).expect("a timeout");
        let mut request = Vec::new();
        stream.read_to_end(&mut request).expect("the request");
        request.reverse();
        stream.write_all(&request).expect("the answer's way");
    };
    let server = thread::spawn(move || {
        let accept = |_| listener.accept().expect("a connection").0;
        let all: Vec<_> =
            (0..connections).map(accept).map(|s| thread::spawn(move || answer(s))).collect();
        all.into_iter().for_each(|one| one.join().expect("a connection's thread"));
    });
    (port, server)
}

/// What a guest sends in its flow of this number.
fn request(number: usize, len: usize) -> Vec<u8> {
    pattern(len + number).split_off(number)
}

/// Goal: all bytes of many flows of one guest arrive, by TCP and UDP both ways, whichever thread has them;
/// the report has all of them; the threads begin with the first packet and end with the network.
#[test]
fn several_threads_translate_for_one_guest() {
    guarded(|| {
        in_child("workers::several_threads_translate_for_one_guest", || {
            if translators().is_none() {
                return skip("this system does not tell the names of threads");
            }
            let flows = scaled(16).max(8) as usize;
            let (port, server) = mirror(flows);
            let echo = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
            let udp_port = echo.local_addr().expect("an address").port();
            let settings = reaching(port, Protocol::Tcp)
                .host_port(HostPort { port: udp_port, protocol: Protocol::Udp })
                .workers(WORKERS);
            let control = NatControl::default();
            let interface = join(&unique("workers"), &settings, &control);
            let mut guest = Guest::with_dhcp(interface);
            assert_eq!(translators(), Some(0), "nothing was for outside");
            let connections: Vec<_> =
                (0..flows).map(|n| guest.connect(gateway_port(port), 40_000 + n as u16)).collect();
            for connection in &connections {
                guest
                    .until("a connection", |guest| guest.tcp(*connection).may_send().then_some(()));
            }
            assert_eq!(translators(), Some(WORKERS));
            let report = guest.until("all handshakes", |_| {
                let report = control.report().ok()?;
                (report.counters[Counter::TcpEstablished] == flows as u64).then_some(report)
            });
            assert_eq!(report.tcp_flows.len(), flows);
            assert_eq!(report.descriptors, flows);
            for (number, connection) in connections.iter().enumerate() {
                guest.write_all(*connection, &request(number, 20_000));
                guest.tcp(*connection).close();
            }
            for (number, connection) in connections.into_iter().enumerate() {
                let mut answer = guest.read_to_end(connection);
                answer.reverse();
                assert!(answer == request(number, 20_000), "flow {number} differs");
            }
            server.join().expect("the server");

            stage("UDP");
            echo.set_read_timeout(Some(LONG)).expect("a timeout");
            let echo = thread::spawn(move || {
                let mut buffer = [0; 2000];
                for _ in 0..flows {
                    let (len, from) = echo.recv_from(&mut buffer).expect("a question");
                    buffer[..len].reverse();
                    echo.send_to(&buffer[..len], from).expect("the answer's way");
                }
            });
            for number in 0..flows {
                let socket = guest.udp_at(5000 + number as u16);
                let question = request(number, 1000);
                guest.udp(socket).send_slice(&question, gateway_port(udp_port)).expect("space");
                let mut answer = guest.until("the answer", |guest| {
                    let (bytes, meta) = guest.udp(socket).recv().ok()?;
                    assert_eq!(meta.endpoint, (IpAddress::Ipv4(GATEWAY), udp_port).into());
                    Some(bytes.to_vec())
                });
                answer.reverse();
                assert!(answer == question, "flow {number} differs");
            }
            echo.join().expect("the server");
            let report = control.report().expect("a report");
            assert_eq!(report.datagram_flows.len(), flows);
            assert_eq!(report.counters[Counter::UdpOpened], flows as u64);
            assert_eq!(guest.counter("NAT UDP opened"), flows as u64);
            drop(guest);
            eventually("all threads end", || translators() == Some(0));
        });
    });
}

/// Goal: ports of the host lead to a guest whichever thread has the guest's port, in ranges too, before the
/// guest is there; a port is forwarded once; what is removed is gone.
#[test]
fn forwards_lead_to_a_guest_whichever_thread_has_them() {
    guarded(|| {
        const PORTS: u16 = 6;
        let control = NatControl::default();
        let settings = NatSettings::new().workers(WORKERS);
        let interface = join(&unique("workers forward"), &settings, &control);
        let address = guest_address(20);
        let add = |rule: String| control.add_forward(&rule.parse::<ForwardRule>().expect("a rule"));
        // A port that is free, and those after it are, most likely.
        let first = (0..50).find_map(|_| {
            let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
            let first = probe.local_addr().expect("an address").port();
            drop(probe);
            let last = first.checked_add(PORTS - 1)?;
            add(format!("{first}-{last}={address}:3000")).ok().map(|at| at.port())
        });
        let first = first.expect("six ports in a row");
        let forwards = || control.report().expect("a report").forwards;
        assert_eq!(forwards().len(), usize::from(PORTS));
        // The peers wait in the backlogs of several threads.
        let peers: Vec<_> = (0..PORTS)
            .map(|index| {
                let peer = TcpStream::connect((Ipv4Addr::LOCALHOST, first + index));
                let mut peer = peer.expect("a listener");
                peer.set_read_timeout(Some(LONG)).expect("a timeout");
                peer.write_all(&request(index.into(), 5000)).expect("it goes out");
                peer.shutdown(std::net::Shutdown::Write).expect("its end");
                thread::spawn(move || {
                    let mut bytes = Vec::new();
                    peer.read_to_end(&mut bytes).map(|_| bytes)
                })
            })
            .collect();
        let mut guest = Guest::with_address(interface, address);
        let listeners: Vec<_> = (0..PORTS).map(|index| guest.listen(3000 + index)).collect();
        guest.ask_for_gateway(address);
        for (index, listener) in listeners.iter().enumerate() {
            guest.until("a connection", |guest| guest.tcp(*listener).may_send().then_some(()));
            let bytes = guest.read_to_end(*listener);
            assert!(bytes == request(index, 5000), "forward {index} differs");
            guest.write_all(*listener, &request(index + 50, 4000));
            guest.tcp(*listener).close();
        }
        for (index, peer) in peers.into_iter().enumerate() {
            guest.until("the peer has it all", |_| peer.is_finished().then_some(()));
            let bytes = peer.join().expect("a peer").expect("no error");
            assert!(bytes == request(index + 50, 4000), "the answer of forward {index} differs");
        }
        assert!(forwards().iter().all(|forward| forward.accepted == 1), "{:?}", forwards());

        stage("what is refused, and what is removed");
        let is_taken = |added: Result<SocketAddr, Error>| match added {
            Err(Error::Io { source, .. }) => source.kind() == ErrorKind::AddrInUse,
            other => panic!("{other:?}"),
        };
        for guest_port in 1..8 {
            assert!(is_taken(add(format!("{first}=192.168.64.21:{guest_port}"))));
        }
        // A range of which the last port is taken leaves nothing.
        if let Some(before) = first.checked_sub(2) {
            assert!(is_taken(add(format!("{before}-{first}=192.168.64.21:1"))));
        }
        assert_eq!(forwards().len(), usize::from(PORTS));
        let mut rule: ForwardRule = format!("8000-8009={address}:1").parse().expect("a rule");
        rule.port = 0;
        let refused = control.add_forward(&rule).expect_err("no range").to_string();
        assert!(refused.contains("are no range"), "{refused}");
        for index in 0..PORTS {
            let at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), first + index);
            let remove = || control.remove_forward(Protocol::Tcp, at, false).expect("an answer");
            assert!(remove());
            assert!(!remove(), "it is gone");
            TcpStream::connect(at).expect_err("nobody listens");
        }
        assert_eq!(forwards(), []);
        // A network has at most 1,024.
        let refused = add(format!("10000-11024={address}:1")).expect_err("too many");
        assert!(refused.to_string().contains("at most"), "{refused}");
    });
}

/// Goal: a forward gets its port of the host although a guest's flow on another thread has it.
#[test]
fn a_forward_gets_its_port_from_another_threads_flow() {
    guarded(|| {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        server.set_nonblocking(true).expect("a socket");
        let server_port = server.local_addr().expect("an address").port();
        let control = NatControl::default();
        let settings = reaching(server_port, Protocol::Udp).workers(WORKERS);
        let interface = join(&unique("workers port"), &settings, &control);
        let mut guest = Guest::with_address(interface, guest_address(30));
        let probe = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let kept = probe.local_addr().expect("an address").port();
        drop(probe);
        let socket = guest.udp_at(kept);
        // The guest's ports are with all threads.
        for guest_port in 2000..2008 {
            let to = gateway_port(server_port);
            guest.udp(socket).send_slice(b"mine", to).expect("space");
            let from = guest.until("a question", |_| {
                let (_, from) = server.recv_from(&mut [0; 10]).ok()?;
                Some(from.port())
            });
            if from != kept {
                return skip("another program has the port");
            }
            let rule = format!("{kept}=192.168.64.30:{guest_port},udp");
            let at = control.add_forward(&rule.parse().expect("a rule")).expect("a forward");
            assert_eq!(at.port(), kept);
            assert!(control.remove_forward(Protocol::Udp, at, false).expect("an answer"));
        }
    });
}

/// A frame with a datagram of UDP from a port.
fn datagram_from(macs: ([u8; 6], [u8; 6]), from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Vec<u8> {
    let mut frame = datagram(macs, (from.0, to.0), to.1);
    frame[34..36].copy_from_slice(&from.1.to_be_bytes());
    // The sum is left out (RFC 768).
    frame[40..42].fill(0);
    frame
}

/// Goal: an address that a guest uses at one thread is its own at all of them, and is free for others once
/// the guest has left.
#[test]
fn no_guest_takes_anothers_address_at_another_thread() {
    guarded(|| {
        const PORTS: u16 = 30;
        let sink = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = sink.local_addr().expect("an address").port();
        let name = unique("workers source");
        let settings = reaching(port, Protocol::Udp).workers(WORKERS);
        let control = NatControl::default();
        let address = guest_address(7);
        let mut guest = Guest::with_address(join(&name, &settings, &control), address);
        let socket = guest.udp_at(4000);
        guest.udp(socket).send_slice(b"mine", gateway_port(port)).expect("space");
        let flows = || control.report().expect("a report").datagram_flows;
        guest.until("its flow", |_| (flows().len() == 1).then_some(()));
        let mut thief = Guest::with_address(join(&name, &settings, &control), guest_address(8));
        let macs = (thief.mac(), thief.ask_for_gateway(guest_address(8)));
        // One by one: of a port that is new to a thread, only a few frames wait for it.
        for number in 0..PORTS {
            let from = (address, 6000 + number);
            thief.send_raw(&datagram_from(macs, from, (GATEWAY, port)), 1);
            thief.until("it is refused", |_| {
                let counters = control.report().ok()?.counters;
                (counters[Counter::SourceTaken] > number.into()).then_some(())
            });
        }
        assert_eq!(flows().len(), 1);

        stage("the guest leaves");
        drop(guest);
        eventually("its flows end", || flows().is_empty());
        for from in 6000..6000 + PORTS {
            thief.send_raw(&datagram_from(macs, (address, from), (GATEWAY, port)), 1);
        }
        thief.until("the address is free", |_| (flows().len() == usize::from(PORTS)).then_some(()));
    });
}

/// Goal: what a guest may have is a limit of all threads together.
#[test]
fn the_threads_share_the_limits() {
    guarded(|| {
        const FLOWS: u16 = 40;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let mut limits = Limits::default();
        (limits.flows, limits.port.flows) = (WORKERS, WORKERS);
        let settings = reaching(port, Protocol::Tcp).workers(WORKERS).limits(limits);
        let control = NatControl::default();
        let interface = join(&unique("workers limits"), &settings, &control);
        let mut guest = Guest::with_address(interface, guest_address(9));
        for number in 0..FLOWS {
            guest.connect(gateway_port(port), 40_000 + number);
        }
        let most = FLOWS as u64 - WORKERS as u64;
        guest.until("all others are refused", |_| {
            let report = control.report().ok()?;
            assert!(report.tcp_flows.len() <= WORKERS, "{:?}", report.tcp_flows);
            (report.counters[Counter::FlowLimit] >= most).then_some(())
        });
        assert_eq!(control.report().expect("a report").tcp_flows.len(), WORKERS);
    });
}

/// Goal: guests find each other by name, and the host, whichever thread they ask.
#[test]
fn each_thread_knows_the_names() {
    guarded(|| {
        let name = unique("workers names");
        let control = NatControl::default();
        let settings = NatSettings::new().workers(WORKERS);
        let first = Guest::with_dhcp_as(join(&name, &settings, &control), b"web");
        let web = first.address();
        let mut guest = Guest::with_dhcp_as(join(&name, &settings, &control), b"asks");
        let gateway = IpAddr::from(GATEWAY);
        for (what, expected) in [("web.internal", web), ("host.internal", GATEWAY)] {
            // Each question comes from another port.
            for _ in 0..12 {
                let answer = ask(&mut guest, gateway, what, A);
                assert_eq!(answer, (0, expected.octets().to_vec()), "{what}");
            }
        }
        assert_eq!(guest.counter("NAT name refused"), 0);
        let rival = Guest::with_dhcp_as(join(&name, &settings, &control), b"web");
        guest.until("one refusal", |guest| {
            let _ = ask(guest, gateway, "web.internal", A);
            (guest.counter("NAT name refused") == 1).then_some(())
        });
        for _ in 0..12 {
            let answer = ask(&mut guest, gateway, "web.internal", A);
            assert_eq!(answer, (0, web.octets().to_vec()));
        }
        assert_eq!(guest.counter("NAT name refused"), 1, "it is counted once");

        stage("the guest leaves");
        drop(first);
        for _ in 0..12 {
            guest.until("its name is the other's", |guest| {
                let answer = ask(guest, gateway, "web.internal", A);
                (answer.1 == rival.address().octets()).then_some(())
            });
        }
    });
}

/// Goal: the number of threads is the network's, and has a range.
#[test]
fn who_joins_with_another_number_is_refused() {
    guarded(|| {
        let name = unique("workers joined");
        let control = NatControl::default();
        let _first = join(&name, &NatSettings::new().workers(WORKERS), &control);
        let start = |name: &str, settings: NatSettings| {
            let started =
                Interface::builder().device(Embedded::network(name).nat(settings)).start();
            started.map(drop).map_err(|error| error.to_string())
        };
        let refused = start(&name, NatSettings::new()).expect_err("another number");
        assert!(refused.contains("with nat workers 3 and not 1"), "{refused}");
        start(&name, NatSettings::new().workers(WORKERS)).expect("the same number");
        for number in [0, 9] {
            let refused = start(&unique("workers range"), NatSettings::new().workers(number));
            let refused = refused.expect_err("no such number");
            assert!(refused.contains("it has from 1 to 8"), "{refused}");
        }
        start(&unique("workers most"), NatSettings::new().workers(8)).expect("eight");
    });
}
