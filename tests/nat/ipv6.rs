//! The way out over IPv6: guests over rings, and servers and clients of the host.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use smoltcp::wire::IpAddress;
use vmring::device::embedded::nat::{Counter, ForwardRule, NatControl, NatSettings, Protocol};
use vmring::{Embedded, Interface, Mode};

use super::guest::{Guest, datagram};
use super::names::{A, AAAA, ask, query};
use super::{join, pattern, reaching};
use crate::support::{LONG, guarded, skip, stage, unique};

/// An address of the world (RFC 3849). Nothing is sent there.
pub(super) const OUTSIDE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);

/// Whether this host has a loopback address of IPv6.
fn has_loopback() -> bool {
    let bound = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    if !bound {
        skip("this host has no IPv6");
    }
    bound
}

/// Goal: guests with addresses of the network's prefix reach a server of the host through the gateway's
/// address: by TCP all bytes both ways with half-closes, and by UDP. Each gets its own answers.
#[test]
fn guests_reach_a_server_of_the_host_over_ipv6() {
    guarded(|| {
        if !has_loopback() {
            return;
        }
        let (answer, request) = (pattern(200_000), pattern(90_000));
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (expected, bytes) = (request.clone(), answer.clone());
        let server = thread::spawn(move || {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().expect("a connection");
                stream.set_read_timeout(Some(LONG)).expect("a timeout");
                let mut request = Vec::new();
                stream.read_to_end(&mut request).expect("the request");
                assert!(request == expected, "the request differs");
                stream.write_all(&bytes).expect("the answer's way");
            }
        });
        let udp = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("a port");
        udp.set_read_timeout(Some(LONG)).expect("a timeout");
        let udp_port = udp.local_addr().expect("an address").port();
        let settings = reaching(port, Protocol::Tcp)
            .host_port(format!("{udp_port},udp").parse().expect("a port"));
        let (name, control) = (unique("fetch6"), NatControl::default());
        let mut guests: Vec<_> =
            [0xa, 0xb].map(|last| Guest::with_ipv6(join(&name, &settings, &control), last)).into();
        for guest in &mut guests {
            let gateway = guest.gateway_v6();
            let connection = guest.connect((IpAddr::V6(gateway), port), 40_000);
            guest.until("a connection", |guest| guest.tcp(connection).may_send().then_some(()));
            guest.write_all(connection, &request);
            guest.tcp(connection).close();
            assert!(guest.read_to_end(connection) == answer, "the answer differs");
        }
        server.join().expect("the server");
        let echo = thread::spawn(move || {
            for _ in 0..2 {
                let mut buffer = [0; 100];
                let (len, from) = udp.recv_from(&mut buffer).expect("a question");
                udp.send_to(&buffer[..len], from).expect("the answer's way");
            }
        });
        for (guest, question) in guests.iter_mut().zip([b"one", b"two"]) {
            let gateway = IpAddress::Ipv6(guest.gateway_v6());
            let socket = guest.udp_at(4321);
            guest.udp(socket).send_slice(question, (gateway, udp_port)).expect("space");
            let (bytes, from) = guest.until("the answer", |guest| {
                let (bytes, meta) = guest.udp(socket).recv().ok()?;
                Some((bytes.to_vec(), meta.endpoint))
            });
            assert_eq!((&bytes[..], from), (&question[..], (gateway, udp_port).into()));
        }
        echo.join().expect("the server");
        let report = control.report().expect("a report");
        assert_eq!(report.counters[Counter::TcpEstablished], 2);
        let guest_of = |index: usize| SocketAddr::new(guests[index].address_v6().into(), 4321);
        for index in [0, 1] {
            let is_its =
                |flow: &&vmring::device::embedded::nat::DatagramFlow| flow.guest == guest_of(index);
            let flow = report.datagram_flows.iter().find(is_its).expect("a flow of each guest");
            assert_eq!(flow.to, SocketAddr::new(Ipv6Addr::LOCALHOST.into(), udp_port));
        }
    });
}

/// Goal: nothing of the host, of its links or of the network is reached over IPv6, in no form of an address,
/// and each refusal is counted by its reason.
#[test]
fn what_the_policy_denies_over_ipv6_is_counted() {
    guarded(|| {
        let control = NatControl::default();
        let settings = NatSettings::new().deny("2001:db8:7::/48".parse().expect("a rule"));
        let settings = settings.host_port("8080".parse().expect("a port"));
        let interface = join(&unique("policy6"), &settings, &control);
        let mut guest = Guest::with_ipv6(interface, 9);
        let macs = (guest.mac(), guest.ask_for_gateway(Ipv4Addr::new(192, 168, 64, 9)));
        let (own, gateway) = (guest.address_v6(), guest.gateway_v6());
        let mut denied = vec![
            ("::1".to_owned(), Counter::DeniedLoopback),
            ("::".to_owned(), Counter::DeniedUnspecified),
            ("::ffff:8.8.8.8".to_owned(), Counter::DeniedMapped),
            ("::ffff:127.0.0.1".to_owned(), Counter::DeniedMapped),
            ("::127.0.0.1".to_owned(), Counter::DeniedMapped),
            ("64:ff9b::7f00:1".to_owned(), Counter::DeniedMapped),
            ("2002:7f00:1::1".to_owned(), Counter::DeniedMapped),
            ("fec0::1".to_owned(), Counter::DeniedReserved),
            ("fd00:ec2::254".to_owned(), Counter::DeniedMetadata),
            ("2001:db8:7::1".to_owned(), Counter::DeniedByRule),
        ];
        denied.extend(address_of_this_host().map(|own| (own.to_string(), Counter::DeniedHost)));
        for (to, counter) in denied {
            let to: Ipv6Addr = to.parse().expect("an address");
            let before = control.report().expect("a report").counters[counter];
            let frame = datagram(macs, (own, to), 53);
            guest.send_raw(&frame, 1);
            guest.until(&format!("{to} is denied"), |_| {
                (control.report().ok()?.counters[counter] > before).then_some(())
            });
        }
        // A port of the gateway that leads nowhere is refused by the gateway, and so is what no router
        // forwards.
        let link = "fe80::77".parse().expect("an address");
        let neighbor = Ipv6Addr::from_bits(own.to_bits() ^ 0x4000);
        let group = "ff0e::5".parse().expect("an address");
        for (from, to, counter) in [
            (own, gateway, "gateway IPv6 refused UDP"),
            (own, link, "gateway IPv6 refused routes"),
            (own, neighbor, "gateway IPv6 refused routes"),
            (link, OUTSIDE, "gateway IPv6 refused routes"),
            (own, group, "gateway IPv6 multicasts"),
            (Ipv6Addr::UNSPECIFIED, OUTSIDE, "gateway IPv6 bad source"),
        ] {
            let before = guest.counter(counter);
            guest.send_raw(&datagram(macs, (from, to), 9), 1);
            guest.until(&format!("{from} to {to} is refused"), |guest| {
                (guest.counter(counter) > before).then_some(())
            });
        }
    });
}

/// A global address of this host, or a unique local one.
fn address_of_this_host() -> Option<Ipv6Addr> {
    let listed = std::fs::read_to_string("/proc/self/net/if_inet6").ok()?;
    let addresses =
        listed.lines().filter_map(|line| u128::from_str_radix(line.get(..32)?, 16).ok());
    let mut addresses = addresses.map(Ipv6Addr::from_bits);
    addresses.find(|ip| !ip.is_loopback() && !ip.is_unicast_link_local())
}

/// Goal: nobody speaks over IPv6 for another guest, for the gateway or for another network. A guest has
/// several addresses, and its neighbour discovery alone binds one.
#[test]
fn no_guest_speaks_for_another_over_ipv6() {
    guarded(|| {
        let (name, control) = (unique("source6"), NatControl::default());
        let settings = NatSettings::new().deny("::/0".parse().expect("a rule"));
        let mut guest = Guest::with_ipv6(join(&name, &settings, &control), 0xa);
        let mut thief = Guest::with_ipv6(join(&name, &settings, &control), 0xb);
        let (own, gateway) = (guest.address_v6(), guest.gateway_v6());
        let macs = (guest.mac(), guest.ask_for_gateway(Ipv4Addr::new(192, 168, 64, 9)));
        let with = |last: u128| Ipv6Addr::from_bits(own.to_bits() >> 16 << 16 | last);
        // Its neighbour discovery for the gateway says that the first is its own.
        let socket = guest.udp_at(4000);
        let to = (IpAddress::Ipv6(OUTSIDE), 53);
        guest.udp(socket).send_slice(b"who am I?", to).expect("space");
        let counted = |counter| control.report().expect("a report").counters[counter];
        guest.until("its packet is looked at", |_| {
            (counted(Counter::DeniedByRule) > 0).then_some(())
        });
        for last in [0x100, 0x101] {
            let before = counted(Counter::DeniedByRule);
            guest.send_raw(&datagram(macs, (with(last), OUTSIDE), 53), 1);
            guest.until("another address of its own", |_| {
                (counted(Counter::DeniedByRule) > before).then_some(())
            });
        }
        let macs = (thief.mac(), macs.1);
        for (source, counter) in [
            (own, Counter::SourceTaken),
            (with(0x100), Counter::SourceTaken),
            (gateway, Counter::SourceGateway),
            (OUTSIDE, Counter::SourceOutside),
            (with(0), Counter::SourceOutside),
            (Ipv6Addr::LOCALHOST, Counter::BadSource),
        ] {
            let before = counted(counter);
            thief.send_raw(&datagram(macs, (source, OUTSIDE), 53), 1);
            thief.until(&format!("{source} is refused"), |_| {
                (counted(counter) > before).then_some(())
            });
        }
    });
}

/// Goal: a port of the host leads to a guest over IPv6 that has said nothing yet: its network asks who it
/// is. The peer may come by IPv6 or by IPv4.
#[test]
fn ports_of_the_host_lead_to_a_silent_guest_over_ipv6() {
    guarded(|| {
        if !has_loopback() {
            return;
        }
        let control = NatControl::default();
        let interface = join(&unique("forward6"), &NatSettings::new(), &control);
        let mut guest = Guest::with_ipv6(interface, 0x20);
        let (address, gateway) = (guest.address_v6(), guest.gateway_v6());
        for bind in ["", "127.0.0.1:"] {
            let rule = format!("{bind}0=[{address}]:2222");
            let rule: ForwardRule = rule.parse().expect("a rule");
            let at = control.add_forward(&rule).expect("a forward");
            assert_eq!(at.is_ipv6(), bind.is_empty(), "{at}");
            let listener = guest.listen(2222);
            let mut peer = TcpStream::connect(at).expect("somebody listens");
            peer.set_read_timeout(Some(LONG)).expect("a timeout");
            guest.until("a connection", |guest| guest.tcp(listener).may_send().then_some(()));
            let seen = guest.tcp(listener).remote_endpoint().expect("a peer");
            assert_eq!(seen.addr, IpAddress::Ipv6(gateway), "loopback has the gateway's address");
            peer.write_all(b"knock").expect("it goes out");
            guest.until("bytes of the peer", |guest| {
                let socket = guest.tcp(listener);
                let mut bytes = [0; 10];
                let len =
                    socket.can_recv().then(|| socket.recv_slice(&mut bytes).ok()).flatten()?;
                (&bytes[..len] == b"knock").then_some(())
            });
            guest.write_all(listener, b"come in");
            guest.tcp(listener).close();
            let reader = thread::spawn(move || {
                let mut bytes = Vec::new();
                peer.read_to_end(&mut bytes).map(|_| bytes)
            });
            guest.until("the peer has it all", |_| reader.is_finished().then_some(()));
            assert_eq!(reader.join().expect("a reader").expect("no error"), b"come in");
            assert!(control.remove_forward(Protocol::Tcp, at, true).expect("an answer"));
        }

        stage("UDP");
        let rule: ForwardRule = format!("0=[{address}]:2222,udp").parse().expect("a rule");
        let at = control.add_forward(&rule).expect("a forward");
        let socket = guest.udp_at(2222);
        let peer = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("a port");
        peer.set_nonblocking(true).expect("a socket");
        peer.send_to(b"knock", at).expect("it goes out");
        let from = guest.until("a datagram", |guest| {
            let (bytes, meta) = guest.udp(socket).recv().ok()?;
            assert_eq!(bytes, b"knock");
            Some(meta.endpoint)
        });
        guest.udp(socket).send_slice(b"come in", from).expect("space");
        guest.until("its answer", |_| {
            let mut bytes = [0; 10];
            let (len, from) = peer.recv_from(&mut bytes).ok()?;
            assert_eq!((&bytes[..len], from), (&b"come in"[..], at));
            Some(())
        });
        let other = format!("0=[{OUTSIDE}]:1").parse::<ForwardRule>().expect("a rule");
        let refused = control.add_forward(&other).expect_err("no guest").to_string();
        assert!(refused.contains("no guest of this network"), "{refused}");
    });
}

/// Goal: guests ask the gateway for names over IPv6, by UDP and TCP. `host.internal` has an address of IPv6
/// if there is something to reach at it.
#[test]
fn the_gateway_answers_dns_over_ipv6() {
    guarded(|| {
        let control = NatControl::default();
        for (settings, has_host) in
            [(NatSettings::new(), false), (reaching(8080, Protocol::Tcp), true)]
        {
            let interface = join(&unique("dns6"), &settings, &control);
            let mut guest = Guest::with_ipv6(interface, 7);
            let gateway = guest.gateway_v6();
            let v6 = gateway.octets().to_vec();
            let mut ask = |name, kind| ask(&mut guest, gateway.into(), name, kind);
            assert_eq!(ask("gateway.internal", AAAA), (0, v6.clone()));
            assert_eq!(ask("gateway.internal", A), (0, vec![192, 168, 64, 1]));
            assert_eq!(ask("host.internal", A), (0, vec![192, 168, 64, 1]));
            let host = if has_host { v6 } else { Vec::new() };
            assert_eq!(ask("host.internal", AAAA), (0, host));
            assert_eq!(ask("nobody.internal", AAAA), (3, vec![]));
        }

        stage("TCP");
        let resolver = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let at = resolver.local_addr().expect("an address");
        let settings = NatSettings::new().resolvers([at]);
        let mut guest = Guest::with_ipv6(join(&unique("dns6 tcp"), &settings, &control), 7);
        let gateway = guest.gateway_v6();
        let question = query("www.example", A);
        let message = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
        let asked = message(&question);
        let expected = asked.clone();
        // The answer has the question's name, and an address.
        let mut answer = question.clone();
        (answer[2], answer[3], answer[7]) = (0x81, 0x80, 1);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 53]);
        let answer = message(&answer);
        let told = answer.clone();
        let server = thread::spawn(move || {
            let (mut stream, _) = resolver.accept().expect("a connection");
            stream.set_read_timeout(Some(LONG)).expect("a timeout");
            let mut got = vec![0; expected.len()];
            stream.read_exact(&mut got).expect("the question");
            assert_eq!(got, expected);
            stream.write_all(&told).expect("the answer's way");
        });
        let connection = guest.connect((IpAddr::V6(gateway), 53), 40_000);
        guest.until("a connection", |guest| guest.tcp(connection).may_send().then_some(()));
        guest.write_all(connection, &asked);
        assert_eq!(guest.read_to_end(connection), answer);
        server.join().expect("the resolver");
    });
}

/// Whether a frame has a message of ICMPv6 of this kind.
pub(super) fn is_icmp(frame: &[u8], kind: u8) -> bool {
    frame.len() > 62 && frame[12..14] == [0x86, 0xdd] && frame[20] == 58 && frame[54] == kind
}

/// Goal: a network has IPv6 with its way out, a prefix of the caller's choice, or none. The gateway is the
/// name server, unless the caller names others.
#[test]
fn a_network_has_ipv6_unless_it_is_turned_off() {
    guarded(|| {
        let start = |driver: Embedded, mode: Mode| {
            Interface::builder().mode(mode).device(driver).start().expect("an interface")
        };
        let named = |what: &str| Embedded::network(unique(what));
        let prefix: Ipv6Addr = "fd12:3456:789a:1::".parse().expect("an address");
        let of = |interface: &Interface| interface.info().nat66_prefix;
        assert!(
            of(&start(named("on"), Mode::Shared)).is_some_and(|ip| ip.segments()[0] >> 8 == 0xfd)
        );
        assert_eq!(of(&start(named("prefix").ipv6(Some(prefix)), Mode::Shared)), Some(prefix));
        assert_eq!(of(&start(named("off").no_ipv6(), Mode::Shared)), None);
        assert_eq!(of(&start(named("nat off").no_nat(), Mode::Shared)), None);
        assert_eq!(of(&start(named("host").no_nat(), Mode::Host)), None);
        for (driver, is_named) in [
            (named("rdnss"), true),
            (named("other servers").dns([Ipv4Addr::new(10, 0, 0, 53)]), false),
        ] {
            let mut guest = Guest::new(start(driver, Mode::Shared), 16);
            let gateway = guest.gateway_v6();
            guest.ask_for_gateway(Ipv4Addr::new(192, 168, 64, 10));
            let frame = guest.frame_where("an advertisement", &[], |frame| is_icmp(frame, 134));
            let names = frame.windows(16).skip(70).any(|part| part == gateway.octets());
            assert_eq!(names, is_named, "{frame:02x?}");
        }
        let name = unique("differs");
        let first = start(Embedded::network(&name), Mode::Shared);
        let second = Interface::builder().device(Embedded::network(&name).no_ipv6()).start();
        let refused = second.expect_err("other settings").to_string();
        assert!(refused.contains("ipv6") && refused.contains("not none"), "{refused}");
        drop(first);
    });
}
