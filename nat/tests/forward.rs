//! Port forwards, over the model of the kernel.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use vmring_nat::{
    Counter, ForwardError, ForwardInfo, ForwardRule, Guest, NatConfig, Port, Protocol, SocketError,
};

use crate::support::datagram::{Got, Receiver, udp_frame};
use crate::support::port::{GUEST_MAC, Net, PORT, config, plain_link};
use crate::support::script::Segment;

struct World {
    net: Net,
    guest: IpAddr,
    gateway: IpAddr,
    peer: SocketAddr,
}

impl World {
    fn new(v6: bool) -> Self {
        Self::with(config(false), v6)
    }

    fn with(config: NatConfig, v6: bool) -> Self {
        let (guest, gateway, peer) = if v6 {
            ("fd00::2", "fd00::1", "[2001:db8::9]:5000")
        } else {
            ("192.168.64.2", "192.168.64.1", "203.0.113.9:5000")
        };
        Self {
            net: Net::new(config, plain_link()),
            guest: guest.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
            peer: peer.parse().unwrap(),
        }
    }

    fn lease(&mut self) {
        assert!(self.net.nat.sources().lease(PORT, GUEST_MAC, self.guest));
    }

    fn rule(&self, protocol: Protocol, port: u16) -> ForwardRule {
        ForwardRule::new(protocol, port, Guest::Address(self.guest), 80)
    }

    fn add(&mut self, rule: &ForwardRule) -> Result<SocketAddr, ForwardError> {
        let (now, out) = (self.net.now, &mut self.net.out);
        let at = self.net.nat.add_forward(rule, now, out);
        self.net.settle();
        at
    }

    fn remove(&mut self, protocol: Protocol, at: SocketAddr, cut: bool) -> bool {
        let (now, out) = (self.net.now, &mut self.net.out);
        let was_there = self.net.nat.remove_forward(protocol, at, cut, now, out);
        self.net.settle();
        was_there
    }

    /// A peer connects to the listener.
    fn knock(&mut self, listener: usize, from: SocketAddr) {
        self.net.kernel.knock(listener, from);
        self.net.settle();
    }

    /// The segments that the guest gets, with whom they are from.
    fn segments(&mut self) -> Vec<(Segment, SocketAddr, SocketAddr)> {
        let link = self.net.out.link;
        let frames: Vec<_> = self.net.out.frames.drain(..).collect();
        let parse = |(frame, header): &(Vec<u8>, _)| {
            let (segment, _) = Segment::parse(frame, header, &link).unwrap();
            let (ip, tcp) = if frame[12] == 8 { (26, 34) } else { (22, 54) };
            let len = if ip == 26 { 4 } else { 16 };
            let address = |at: usize| -> IpAddr {
                if len == 4 {
                    <[u8; 4]>::try_from(&frame[at..at + 4]).unwrap().into()
                } else {
                    <[u8; 16]>::try_from(&frame[at..at + 16]).unwrap().into()
                }
            };
            let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
            let from = SocketAddr::new(address(ip), port(tcp));
            let to = SocketAddr::new(address(ip + len), port(tcp + 2));
            (segment, from, to)
        };
        frames.iter().map(parse).collect()
    }

    /// The guest answers SYN.
    fn answer(&mut self, syn: &Segment, from: SocketAddr, flags: &str) {
        let (flags, ack) = (flags.into(), syn.seq.wrapping_add(1));
        let segment =
            Segment { flags, seq: 700, ack, window: 65_000, mss: Some(1460), ..Segment::default() };
        self.net.send(&[segment.frame(SocketAddr::new(self.guest, 80), from)]);
    }

    fn counted(&self, counter: Counter) -> u64 {
        self.net.nat.counters()[counter]
    }

    fn infos(&self) -> Vec<ForwardInfo> {
        self.net.nat.forwards().collect()
    }
}

fn each(test: impl Fn(World)) {
    for v6 in [false, true] {
        test(World::new(v6));
    }
}

/// A peer that connects is accepted, the guest gets SYN from the peer's own address, and bytes go both
/// ways.
#[test]
fn a_connection_comes_in_from_its_own_address() {
    each(|mut world| {
        world.lease();
        let at = world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
        assert!(at.ip().is_loopback() && at.port() == 8080);
        world.knock(0, world.peer);
        let segments = world.segments();
        let [(syn, from, to)] = &segments[..] else { panic!("{segments:?}") };
        assert_eq!(
            (&syn.flags[..], *from, *to),
            ("S", world.peer, SocketAddr::new(world.guest, 80))
        );
        world.answer(syn, *from, "S.");
        world.net.kernel.write(1, b"hello");
        world.net.settle();
        assert!(world.segments().iter().any(|(segment, ..)| segment.data == b"hello"));
        let infos = world.infos();
        let [info] = &infos[..] else { panic!("{infos:?}") };
        assert_eq!((info.at, info.flows, info.accepted, info.refused), (at, 1, 1, 0));
    });
}

/// A peer on the host itself, and one whose address the guest would look for on its own link, has the
/// gateway's address.
#[test]
fn a_peer_without_an_address_in_the_world_has_the_gateways() {
    each(|mut world| {
        world.lease();
        world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
        let peers = if world.guest.is_ipv4() {
            ["127.0.0.1:5001", "169.254.3.4:5002", "192.168.64.77:5003", "[2001:db8::9]:5004"]
        } else {
            ["[::1]:5001", "[fe80::5]:5002", "[fd00::77]:5003", "203.0.113.9:5004"]
        };
        for (index, peer) in peers.into_iter().enumerate() {
            world.knock(0, peer.parse().unwrap());
            let segments = world.segments();
            let [(syn, from, _)] = &segments[..] else { panic!("{segments:?}") };
            assert_eq!((&syn.flags[..], from.ip()), ("S", world.gateway), "{peer}");
            assert_eq!(from.port(), 5001 + index as u16);
        }
    });
}

/// A guest that refuses resets its peer.
#[test]
fn a_connection_that_the_guest_refuses_is_reset() {
    each(|mut world| {
        world.lease();
        world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
        world.knock(0, world.peer);
        let segments = world.segments();
        world.answer(&segments[0].0, segments[0].1, "R.");
        assert_eq!(world.net.kernel.with(1, |peer| peer.closed), Some(true));
    });
}

/// A peer that connects again from the same port at once comes in. While its connection is open, another
/// with its address and port cannot be told apart, and is reset.
#[test]
fn a_peer_comes_in_again_from_the_same_port() {
    each(|mut world| {
        world.lease();
        world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
        world.knock(0, world.peer);
        let (syn, from, _) = world.segments().remove(0);
        world.answer(&syn, from, "S.");
        world.segments();
        world.knock(0, world.peer);
        assert_eq!(world.net.kernel.with(2, |peer| peer.closed), Some(true));
        world.net.kernel.finish(1);
        world.net.settle();
        let (fin, ..) = world.segments().remove(0);
        assert!(fin.flags.contains('F'), "{fin:?}");
        let (flags, ack) = ("F.".into(), fin.seq.wrapping_add(1));
        let last = Segment { flags, seq: 701, ack, window: 65_000, ..Segment::default() };
        world.net.send(&[last.frame(SocketAddr::new(world.guest, 80), from)]);
        assert_eq!(world.net.kernel.with(1, |peer| peer.closed), Some(false));
        assert_eq!(world.net.nat.usage().0, 1, "it waits for late segments");
        world.segments();
        world.knock(0, world.peer);
        assert_eq!(world.segments()[0].0.flags, "S");
        assert_eq!((world.infos()[0].accepted, world.infos()[0].refused), (2, 1));
    });
}

/// Port 0 gives a port, and says which.
#[test]
fn port_0_is_any_free_port() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut world = World::new(false);
        let first = world.add(&world.rule(protocol, 0)).unwrap();
        let second = world.add(&world.rule(protocol, 0)).unwrap();
        assert!(first.port() != 0 && second.port() != 0 && first != second);
        assert_eq!(world.infos().len(), 2);
        assert!(world.remove(protocol, first, false) && !world.remove(protocol, first, false));
        assert_eq!(world.infos()[0].at, second);
        assert_eq!((world.net.kernel.open(), world.net.nat.usage()), (1, (0, 1)));
    }
}

/// What makes a rule a wrong one.
type Change<'a> = &'a dyn Fn(&mut ForwardRule);

/// Errors are told apart, and nothing has changed then. A range is all or nothing.
#[test]
fn errors_are_told_apart_and_change_nothing() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut world = World::new(false);
        world.net.kernel.0.borrow_mut().ports_in_use.push(8003);
        let mut rule = world.rule(protocol, 8000);
        rule.count = 5;
        assert_eq!(world.add(&rule), Err(ForwardError::InUse(8003)));
        assert_eq!((world.infos(), world.net.nat.usage()), (vec![], (0, 0)));
        rule.count = 3;
        assert_eq!(world.add(&rule).unwrap().port(), 8000);
        let mut ports: Vec<_> =
            world.infos().iter().map(|info| (info.at.port(), info.guest_port)).collect();
        ports.sort_unstable();
        assert_eq!(ports, [(8000, 80), (8001, 81), (8002, 82)]);
        assert_eq!(world.add(&world.rule(protocol, 8001)), Err(ForwardError::InUse(8001)));
        let fail = |world: &World, error| world.net.kernel.0.borrow_mut().failure = error;
        for (error, told) in [
            (SocketError::Denied, ForwardError::NoPrivilege(22)),
            (SocketError::NoAddress, ForwardError::NoAddress),
            (SocketError::NoDescriptor, ForwardError::NoDescriptor),
            (SocketError::Other(7), ForwardError::System(SocketError::Other(7))),
        ] {
            fail(&world, Some(error));
            assert_eq!(world.add(&world.rule(protocol, 22)), Err(told));
        }
        fail(&world, None);
        let with = |world: &World, change: &dyn Fn(&mut ForwardRule)| {
            let mut rule = world.rule(protocol, 9000);
            change(&mut rule);
            rule
        };
        let outside = |rule: &mut ForwardRule| rule.guest = Guest::Address([10, 0, 0, 1].into());
        let gateway =
            |rule: &mut ForwardRule| rule.guest = Guest::Address([192, 168, 64, 1].into());
        let wraps = |rule: &mut ForwardRule| (rule.port, rule.count) = (65_000, 600);
        let guest_wraps = |rule: &mut ForwardRule| (rule.guest_port, rule.count) = (65_000, 600);
        let cases: [(Change<'_>, ForwardError); 9] = [
            (&outside, ForwardError::NoGuest),
            (&gateway, ForwardError::NoGuest),
            (&wraps, ForwardError::Range),
            (&guest_wraps, ForwardError::Range),
            (&|rule| rule.count = 0, ForwardError::Range),
            (&|rule| rule.guest_port = 0, ForwardError::Range),
            (&|rule| (rule.port, rule.count) = (0, 2), ForwardError::Range),
            (&|rule| rule.count = 1022, ForwardError::TooMany),
            (&|rule| rule.protocol = Protocol::IcmpEcho, ForwardError::Protocol),
        ];
        for (change, error) in cases {
            let rule = with(&world, change);
            assert_eq!(world.add(&rule), Err(error), "{rule:?}");
        }
        assert_eq!((world.infos().len(), world.net.kernel.open()), (3, 3));
        let (now, out) = (world.net.now, &mut world.net.out);
        world.net.nat.close(now, out);
        world.net.assert_empty();
    }
}

/// Section 9, 12: a guest that has no address yet is waited for, and nothing spins. After a while, the
/// peers get resets.
#[test]
fn a_connection_waits_for_its_guest_and_not_for_ever() {
    each(|mut world| {
        world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
        world.knock(0, world.peer);
        world.net.wait(Duration::from_secs(20));
        assert_eq!((world.net.kernel.calls().accept, world.segments().len()), (0, 0));
        world.lease();
        world.net.wait(Duration::from_secs(1));
        assert_eq!(world.segments()[0].0.flags, "S");

        let mut world = World::new(world.guest.is_ipv6());
        world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
        world.knock(0, world.peer);
        world.net.wait(Duration::from_secs(15));
        let later = SocketAddr::new(world.peer.ip(), 5001);
        world.knock(0, later);
        world.net.wait(Duration::from_secs(14));
        assert_eq!(world.counted(Counter::NoGuest), 0);
        world.net.wait(Duration::from_secs(2));
        assert_eq!(world.counted(Counter::NoGuest), 2);
        let reset = |index| world.net.kernel.with(index, |peer| peer.closed);
        assert_eq!((reset(1), reset(2), world.infos()[0].refused), (Some(true), Some(true), 2));
        assert_eq!(world.net.next, None, "nothing is to come");
        // The next one has its own time.
        world.knock(0, world.peer);
        world.net.wait(Duration::from_secs(10));
        world.lease();
        world.net.wait(Duration::from_secs(1));
        assert_eq!(world.segments().len(), 1);
    });
}

/// Section 9, 18: a forward that is full, and a process without a descriptor, leave connections in the
/// backlog, look again after a time, and do not spin.
#[test]
fn a_full_forward_waits_and_does_not_spin() {
    let mut world = World::new(false);
    world.lease();
    let mut rule = world.rule(Protocol::Tcp, 8080);
    rule.max_flows = 2;
    let at = world.add(&rule).unwrap();
    for port in 1..=4 {
        world.knock(0, SocketAddr::new(world.peer.ip(), port));
    }
    let syns = world.segments();
    let calls = world.net.kernel.calls().accept;
    assert_eq!((syns.len(), world.infos()[0].accepted), (2, 2));
    for (syn, from, _) in &syns {
        world.answer(syn, *from, "S.");
    }
    world.net.wait(Duration::from_secs(5));
    assert!(world.counted(Counter::ForwardLimit) < 60);
    assert_eq!(world.net.kernel.calls().accept, calls);
    world.net.kernel.reset(1);
    world.net.settle();
    world.net.wait(Duration::from_millis(200));
    assert_eq!((world.infos()[0].accepted, world.infos()[0].flows), (3, 2));

    world.net.kernel.0.borrow_mut().failure = Some(SocketError::NoDescriptor);
    world.net.kernel.reset(2);
    world.net.settle();
    world.net.wait(Duration::from_secs(5));
    let calls = world.net.kernel.calls().accept;
    assert!(calls < 60 && world.counted(Counter::NoDescriptor) > 10, "{calls} calls");
    world.net.kernel.0.borrow_mut().failure = None;
    world.net.wait(Duration::from_secs(1));
    assert_eq!(world.infos()[0].accepted, 4);
    assert!(world.remove(Protocol::Tcp, at, true));
    // A flood takes its turns.
    let mut rule = world.rule(Protocol::Tcp, 8081);
    rule.max_flows = 1000;
    world.add(&rule).unwrap();
    let listener = world.net.kernel.len() - 1;
    for port in 1..=60 {
        world.net.kernel.knock(listener, SocketAddr::new(world.peer.ip(), 100 + port));
    }
    let calls = world.net.kernel.calls().accept;
    let (token, readiness) = world.net.kernel.take_event().unwrap();
    let (now, out) = (world.net.now, &mut world.net.out);
    world.net.nat.on_ready(token, readiness, now, out);
    assert_eq!(world.net.kernel.calls().accept - calls, 16);
    world.net.settle();
    assert_eq!(world.infos()[0].accepted, 60);
}

/// S6: a connection that its guest's port has no descriptor for waits in the backlog, and is not reset. Another
/// port has its own.
#[test]
fn a_connection_waits_for_a_descriptor_of_its_port() {
    let mut limits = config(false);
    limits.limits.port.descriptors = 3;
    let mut world = World::with(limits, false);
    world.lease();
    // A flow of the guest's own counts too.
    let to = SocketAddr::new(world.peer.ip(), 53);
    world.net.send(&[udp_frame(SocketAddr::new(world.guest, 4000), to, b"x")]);
    world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
    for port in 1..=4 {
        world.knock(1, SocketAddr::new(world.peer.ip(), port));
    }
    let calls = world.net.kernel.calls().accept;
    world.net.wait(Duration::from_millis(550));
    let counts = |world: &World| (world.infos()[0].accepted, world.infos()[0].refused);
    assert_eq!((counts(&world), world.segments().len()), ((2, 0), 2));
    assert_eq!(world.net.kernel.calls().accept, calls);
    assert!((2..20).contains(&world.counted(Counter::DescriptorLimit)));
    let there = IpAddr::from([192, 168, 64, 3]);
    assert!(world.net.nat.sources().lease(Port(9), [2, 0, 0, 0, 0, 3], there));
    world.add(&ForwardRule::new(Protocol::Tcp, 8081, Guest::Address(there), 80)).unwrap();
    let listener = world.net.kernel.len() - 1;
    world.knock(listener, world.peer);
    assert_eq!(world.infos().iter().map(|info| info.accepted).sum::<u64>(), 3);
    world.net.kernel.reset(2);
    world.net.settle();
    world.net.wait(Duration::from_millis(150));
    assert_eq!(world.infos().iter().map(|info| info.accepted).sum::<u64>(), 4);
    // So it is with the network's, of which the listener has one.
    let mut limits = config(false);
    limits.limits.descriptors = 3;
    let mut world = World::with(limits, false);
    world.lease();
    world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
    for port in 1..=4 {
        world.net.kernel.knock(0, SocketAddr::new(world.peer.ip(), port));
    }
    world.net.settle();
    assert_eq!((counts(&world), world.counted(Counter::DescriptorLimit)), ((2, 0), 1));
}

/// A connection whose peer has gone before it was accepted is nobody's, and the next one comes in at once.
#[test]
fn a_peer_that_has_gone_holds_up_nobody() {
    for error in [SocketError::Reset, SocketError::TimedOut] {
        let mut world = World::new(false);
        world.lease();
        world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
        world.net.kernel.with(0, |listener| listener.datagrams.failures.extend([error; 20]));
        for port in 1..=21 {
            world.net.kernel.knock(0, SocketAddr::new(world.peer.ip(), port));
        }
        world.net.settle();
        let segments = world.segments();
        let [(syn, from, _)] = &segments[..] else { panic!("{error:?}: {segments:?}") };
        assert_eq!((&syn.flags[..], from.port()), ("S", 21));
        let [info] = world.infos()[..] else { panic!("one forward") };
        assert_eq!((info.accepted, info.refused), (1, 0));
        assert_eq!((world.counted(Counter::OtherError), world.net.next.is_some()), (0, true));
        // An error that is none of the peer's is counted, and the next one waits for a moment.
        let broken = SocketError::Other(7);
        world.net.kernel.with(0, |listener| listener.datagrams.failures.push_back(broken));
        for port in 30..=31 {
            world.knock(0, SocketAddr::new(world.peer.ip(), port));
        }
        assert_eq!((world.segments().len(), world.counted(Counter::OtherError)), (0, 1));
        world.net.wait(Duration::from_millis(110));
        assert_eq!(world.segments()[0].1.port(), 31);
    }
}

/// A forward that waits is not looked at before its time, whoever connects to it in between, and whatever is
/// due to another forward.
#[test]
fn a_forward_that_waits_is_looked_at_in_its_time() {
    let mut world = World::new(false);
    world.lease();
    for (listener, port) in [(0, 8080), (1, 8081)] {
        let mut rule = world.rule(Protocol::Tcp, port);
        rule.max_flows = 0;
        world.add(&rule).unwrap();
        for n in 1..=5 {
            world.knock(listener, SocketAddr::new(world.peer.ip(), n));
        }
        assert_eq!(world.counted(Counter::ForwardLimit), listener as u64 + 1);
        world.net.wait(Duration::from_millis(50));
    }
    // They look every 100 ms, one 50 ms behind the other.
    for looks in 3..10 {
        assert_eq!(world.counted(Counter::ForwardLimit), looks);
        world.knock(0, world.peer);
        world.knock(1, world.peer);
        assert_eq!(world.counted(Counter::ForwardLimit), looks);
        world.net.wait(Duration::from_millis(50));
    }
}

/// Removing a forward leaves its connections, unless they are to be cut.
#[test]
fn connections_outlive_their_forward_unless_they_are_cut() {
    for cut in [false, true] {
        each(|mut world| {
            world.lease();
            let at = world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
            world.knock(0, world.peer);
            let (syn, from, _) = world.segments().remove(0);
            world.answer(&syn, from, "S.");
            // Another connection of the guest is not concerned.
            let other = Segment { flags: "S".into(), ..Segment::default() };
            let to = SocketAddr::new(world.peer.ip(), 443);
            world.net.send(&[other.frame(SocketAddr::new(world.guest, 4000), to)]);
            assert!(world.remove(Protocol::Tcp, at, cut));
            let closed = |index| world.net.kernel.with(index, |peer| peer.closed);
            assert_eq!((closed(1), closed(2)), (cut.then_some(true), None));
            assert_eq!(closed(0), Some(false), "the listener");
        });
    }
}

/// A forward that names a MAC address follows its guest.
#[test]
fn a_forward_follows_a_mac_address() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut world = World::new(false);
        let mut rule = world.rule(protocol, 8080);
        rule.guest = Guest::Mac(GUEST_MAC);
        world.add(&rule).unwrap();
        for (host, port) in [(7, 5007), (8, 5008)] {
            let address = [192, 168, 64, host].into();
            let old = [192, 168, 64, host - 1].into();
            world.net.nat.sources().free(old);
            world.net.nat.sources().lease(PORT, GUEST_MAC, address);
            let from = SocketAddr::new(world.peer.ip(), port);
            if protocol == Protocol::Tcp {
                world.knock(0, from);
            } else {
                world.net.kernel.datagram(0, from, b"x", 0);
                world.net.settle();
            }
            let (frame, _) = world.net.out.frames.pop_back().unwrap();
            assert_eq!(frame[30..34], [192, 168, 64, host]);
        }
    }
}

/// UDP: each peer is a flow, answers go back from where the peer has sent to, and loopback is the
/// gateway.
#[test]
fn datagrams_come_in_and_answers_go_back() {
    each(|mut world| {
        let at = world.add(&world.rule(Protocol::Udp, 5353)).unwrap();
        assert_eq!(at.port(), 5353);
        let (peer, guest) = (world.peer, SocketAddr::new(world.guest, 80));
        world.lease();
        let local: SocketAddr =
            if guest.is_ipv4() { "127.0.0.1:77" } else { "[::1]:77" }.parse().unwrap();
        let seen = SocketAddr::new(world.gateway, 77);
        let mut receiver = Receiver::default();
        for (from, sees) in [(peer, peer), (local, seen)] {
            world.net.kernel.datagram(0, from, b"question", 0);
            world.net.settle();
            let (frame, header) = world.net.out.frames.pop_front().unwrap();
            let got = receiver.take(&frame, &header, &world.net.out.link);
            assert_eq!(got, [Got::Udp { from: sees, to: guest, data: b"question".into() }]);
            world.net.send(&[udp_frame(guest, sees, b"answer")]);
            let sent = world.net.kernel.sent(0);
            assert_eq!((&sent[0].bytes[..], sent[0].route.unwrap().to), (&b"answer"[..], from));
        }
        assert_eq!((world.infos()[0].flows, world.net.kernel.len()), (2, 1));
        let carried = world.infos()[0].carried;
        assert_eq!((carried.datagrams_received, carried.bytes_received), (2, 16));
        assert_eq!((carried.datagrams_sent, carried.bytes_sent), (2, 12));
        let flows: Vec<_> = world.net.nat.datagram_flows().map(|flow| flow.carried).collect();
        assert!(flows.len() == 2 && flows.iter().all(|one| one.bytes_received == 8), "{flows:?}");
        // The socket stays when the flows end.
        world.net.wait(Duration::from_secs(40));
        let info = world.infos()[0];
        assert_eq!((info.flows, world.net.kernel.open()), (0, 1));
        assert_eq!((info.accepted, info.refused, info.carried), (2, 0, carried));
        world.net.kernel.datagram(0, peer, b"x", 0);
        world.net.settle();
        assert!(world.remove(Protocol::Udp, at, false));
        world.net.assert_empty();
    });
}

/// Datagrams for a guest that nobody knows stay in the socket, and nothing spins. A forward to a guest that
/// is there goes on. The guest gets them in their order when it is known. After a while they are dropped.
#[test]
fn datagrams_wait_for_their_guest_and_not_for_ever() {
    each(|mut world| {
        let v6 = world.guest.is_ipv6();
        let at = world.add(&world.rule(Protocol::Udp, 5353)).unwrap();
        let there = if v6 { "fd00::3" } else { "192.168.64.3" }.parse().unwrap();
        assert!(world.net.nat.sources().lease(PORT, GUEST_MAC, there));
        world.add(&ForwardRule::new(Protocol::Udp, 5354, Guest::Address(there), 80)).unwrap();
        for n in 0..20 {
            world.net.kernel.datagram(0, world.peer, &[n; 9], 0);
            world.net.settle();
        }
        world.net.wait(Duration::from_secs(20));
        assert_eq!(
            (world.net.kernel.calls().receive_datagrams, world.net.out.frames.len()),
            (0, 0)
        );
        assert!((1..200).contains(&world.net.calls), "{} looks for the guest", world.net.calls);
        world.net.kernel.datagram(1, world.peer, b"x", 0);
        world.net.settle();
        assert_eq!(world.net.out.frames.drain(..).count(), 1, "the other forward goes on");
        world.lease();
        world.net.wait(Duration::from_secs(1));
        let mut receiver = Receiver::default();
        let (from, to) = (world.peer, SocketAddr::new(world.guest, 80));
        for n in 0..20 {
            let (frame, header) = world.net.out.frames.pop_front().unwrap();
            let got = receiver.take(&frame, &header, &world.net.out.link);
            assert_eq!(got, [Got::Udp { from, to, data: vec![n; 9] }]);
        }
        assert_eq!(world.counted(Counter::NoGuest), 0);
        // Nobody knows the guest any more. A forward that is removed waits for nothing.
        world.net.nat.sources().free(world.guest);
        world.net.kernel.datagram(0, world.peer, b"late", 0);
        world.net.settle();
        world.net.wait(Duration::from_secs(25));
        assert_eq!(world.counted(Counter::NoGuest), 0, "it has its own time");
        assert!(world.remove(Protocol::Udp, at, false));
        world.net.wait(Duration::from_secs(1));
        world.net.wait(Duration::from_secs(60));
        assert_eq!((world.net.next, world.net.out.frames.len()), (None, 0));

        let mut world = World::new(v6);
        world.add(&world.rule(Protocol::Udp, 5353)).unwrap();
        world.net.kernel.datagram(0, world.peer, b"one", 0);
        world.net.settle();
        world.net.wait(Duration::from_secs(15));
        // Three datagrams that the system has put together.
        world.net.kernel.datagram(0, world.peer, b"sevenby", 3);
        world.net.settle();
        world.net.wait(Duration::from_secs(14));
        assert_eq!((world.counted(Counter::NoGuest), world.infos()[0].refused), (0, 0));
        world.net.wait(Duration::from_secs(2));
        assert_eq!((world.counted(Counter::NoGuest), world.infos()[0].refused), (4, 4));
        assert_eq!(world.net.next, None, "nothing is to come");
        // The next one has its own time.
        world.net.kernel.datagram(0, world.peer, b"next", 0);
        world.net.settle();
        world.net.wait(Duration::from_secs(10));
        world.lease();
        world.net.wait(Duration::from_secs(1));
        assert_eq!(world.net.out.frames.len(), 1);
        assert_eq!((world.infos()[0].accepted, world.infos()[0].refused), (1, 4));
    });
}

/// A port that waits until it takes frames is looked at as soon as before, whatever waits for a guest.
#[test]
fn who_waits_for_a_guest_does_not_delay_who_waits_for_a_port() {
    let mut world = World::new(false);
    world.add(&world.rule(Protocol::Udp, 5353)).unwrap();
    world.net.kernel.datagram(0, world.peer, b"waits", 0);
    world.net.settle();
    world.net.send(&[udp_frame(SocketAddr::new(world.guest, 4000), world.peer, b"x")]);
    world.net.nat.sources().free(world.guest);
    world.net.out.space = 0;
    world.net.kernel.datagram(1, world.peer, b"y", 0);
    world.net.settle();
    world.net.kernel.datagram(0, world.peer, b"waits, too", 0);
    world.net.settle();
    // Nobody says that there is space.
    world.net.out.space = usize::MAX;
    world.net.wait(Duration::from_millis(110));
    assert_eq!(world.net.out.frames.len(), 1);
}

/// What has gone through a forward is listed, also of flows that have ended, and of its own flows only.
#[test]
fn a_forward_lists_what_it_has_carried() {
    let mut world = World::new(false);
    world.lease();
    let at = world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
    let other = world.add(&world.rule(Protocol::Tcp, 8081)).unwrap();
    world.knock(0, world.peer);
    let (syn, from, _) = world.segments().remove(0);
    world.answer(&syn, from, "S.");
    world.net.kernel.write(2, b"hello");
    world.net.settle();
    let to = SocketAddr::new(world.guest, 80);
    let said = |flags: &str, seq, data: &[u8]| {
        let (flags, data, ack) = (flags.into(), data.to_vec(), syn.seq.wrapping_add(6));
        Segment { flags, seq, ack, data, window: 65_000, ..Segment::default() }.frame(to, from)
    };
    world.net.send(&[said(".", 701, b"hi!")]);
    let info = |world: &World, at| *world.infos().iter().find(|info| info.at == at).unwrap();
    let bytes = |info: &ForwardInfo| (info.carried.bytes_sent, info.carried.bytes_received);
    let open = info(&world, at);
    assert_eq!((open.flows, open.accepted, bytes(&open)), (1, 1, (3, 5)));
    assert_eq!((open.carried.datagrams_sent, open.carried.datagrams_received), (0, 0));
    let idle = info(&world, other);
    assert_eq!((idle.flows, idle.accepted, bytes(&idle)), (0, 0, (0, 0)));
    // The guest ends the flow.
    world.net.send(&[said("R.", 704, b"")]);
    let ended = info(&world, at);
    assert_eq!((ended.flows, ended.accepted, bytes(&ended)), (0, 1, (3, 5)));
    // Another forward in its place has its own numbers, and a flow that outlives its forward is nobody's.
    world.segments();
    world.knock(0, SocketAddr::new(world.peer.ip(), 5001));
    assert_eq!(info(&world, at).flows, 1);
    assert!(world.remove(Protocol::Tcp, at, false));
    world.add(&world.rule(Protocol::Tcp, 8080)).unwrap();
    let anew = info(&world, at);
    assert_eq!((anew.flows, anew.accepted, bytes(&anew)), (0, 0, (0, 0)));
    world.net.kernel.reset(3);
    world.net.settle();
    assert_eq!(info(&world, at).flows, 0);
}

/// What a forward of UDP did not let in is told apart: its own limit, and a port that takes nothing.
#[test]
fn a_forward_of_udp_lists_what_it_has_refused() {
    let mut world = World::new(false);
    world.lease();
    let mut rule = world.rule(Protocol::Udp, 5353);
    rule.max_flows = 0;
    world.add(&rule).unwrap();
    world.add(&world.rule(Protocol::Udp, 5354)).unwrap();
    world.net.kernel.datagram(0, world.peer, b"no place", 0);
    world.net.settle();
    world.net.out.space = 0;
    world.net.kernel.datagram(1, world.peer, b"no space", 0);
    world.net.settle();
    world.net.out.space = usize::MAX;
    world.add(&world.rule(Protocol::Udp, 5355)).unwrap();
    world.net.kernel.datagram(2, SocketAddr::new(world.peer.ip(), 5001), b"taken", 0);
    world.net.settle();
    let mut infos = world.infos();
    infos.sort_by_key(|info| info.at);
    let told: Vec<_> =
        infos.iter().map(|one| (one.accepted, one.refused, one.carried.bytes_received)).collect();
    assert_eq!(told, [(0, 1, 0), (1, 1, 0), (1, 0, 5)]);
    let counted = [Counter::FlowLimit, Counter::DatagramRefused].map(|one| world.counted(one));
    assert_eq!(counted, [1, 1]);
}

/// A guest answers from the address that the peer has sent to, and hears of the errors that its answers meet.
/// A forward that cannot be added costs no flow of another. The process's last descriptor is no forward's.
#[test]
fn a_forward_of_udp_answers_from_its_address() {
    let mut limits = config(false);
    limits.limits.descriptors = 1;
    let mut world = World::with(limits, false);
    world.lease();
    world.add(&world.rule(Protocol::Udp, 5353)).unwrap();
    assert_eq!(world.add(&world.rule(Protocol::Udp, 5354)), Err(ForwardError::NoDescriptor));
    assert_eq!(world.add(&world.rule(Protocol::Tcp, 5354)), Err(ForwardError::NoDescriptor));
    let (peer, here) = (world.peer, IpAddr::from([198, 51, 100, 7]));
    let incoming = vmring_nat::Incoming { len: 1, from: peer, segment: 0, to: Some(here) };
    world.net.kernel.with(0, |p| p.datagrams.incoming.push_back((incoming, b"x".into())));
    world.net.kernel.datagram(0, peer, b"y", 0);
    world.net.settle();
    let guest = SocketAddr::new(world.guest, 80);
    world.net.send(&[udp_frame(guest, peer, b"answer")]);
    assert_eq!(world.net.kernel.sent(0)[0].route.unwrap().from, Some(here));
    world.net.out.frames.clear();
    let error =
        vmring_nat::DatagramError { icmp: Some((3, 3)), offender: None, to: peer, quoted: 0 };
    world.net.kernel.datagram_error(0, error, b"answer");
    world.net.settle();
    assert_eq!((world.net.out.frames.len(), world.counted(Counter::ErrorsPassed)), (1, 1));
    let mut world = World::new(false);
    world.lease();
    world.add(&world.rule(Protocol::Udp, 5353)).unwrap();
    world.net.kernel.datagram(0, peer, b"x", 0);
    world.net.settle();
    world.net.kernel.0.borrow_mut().ports_in_use.push(80);
    assert_eq!(world.add(&world.rule(Protocol::Udp, 80)), Err(ForwardError::InUse(80)));
    assert_eq!(world.infos()[0].flows, 1);
}

/// A guest that sends from a port, which its flow has on the host too, does not keep a forward from it.
#[test]
fn a_guest_does_not_occupy_a_port_that_is_to_be_forwarded() {
    for endpoint_independent in [false, true] {
        let mut config = config(false);
        config.endpoint_independent = endpoint_independent;
        let mut world = World::with(config, false);
        world.lease();
        let (guest, peer) = (SocketAddr::new(world.guest, 5353), world.peer);
        world.net.send(&[udp_frame(guest, peer, b"x")]);
        assert_eq!(world.net.kernel.with(0, |peer| peer.datagrams.port), 5353);
        world.add(&world.rule(Protocol::Udp, 5353)).unwrap();
        assert_eq!(world.net.kernel.open(), 1);
        world.net.send(&[udp_frame(guest, peer, b"y")]);
        assert_eq!(world.net.kernel.sent(2)[0].bytes, b"y");
        assert!(world.net.kernel.with(2, |peer| peer.datagrams.port) >= 50_000);
        // What is another program's stays his.
        world.net.kernel.0.borrow_mut().ports_in_use.push(5354);
        let taken = world.add(&world.rule(Protocol::Udp, 5354));
        assert_eq!(taken, Err(ForwardError::InUse(5354)));
        assert_eq!(world.net.kernel.open(), 2);
    }
}

/// S12: a flood of spoofed peers takes a forward's own place, not the guest's, and not its rate.
#[test]
fn a_flood_from_outside_is_bounded() {
    let mut limits = config(false);
    limits.limits.port.new_flows_per_second = 100;
    let mut world = World::with(limits, false);
    world.lease();
    let mut rule = world.rule(Protocol::Udp, 5353);
    rule.max_flows = 50;
    world.add(&rule).unwrap();
    for port in 1..3000 {
        world.net.kernel.datagram(0, SocketAddr::new(world.peer.ip(), port), b"x", 0);
    }
    world.net.settle();
    assert_eq!((world.infos()[0].flows, world.counted(Counter::Evicted)), (50, 2999 - 50));
    let to = SocketAddr::new(world.peer.ip(), 53);
    world.net.send(&[udp_frame(SocketAddr::new(world.guest, 4000), to, b"mine")]);
    assert_eq!(world.net.kernel.sent(1).len(), 1);
    let (now, out) = (world.net.now, &mut world.net.out);
    world.net.nat.port_left(PORT, now, out);
    assert_eq!((world.infos()[0].flows, world.net.kernel.open()), (0, 1));
    // The guest is back, on another port.
    world.net.nat.sources().lease(Port(9), GUEST_MAC, world.guest);
    world.net.kernel.datagram(0, world.peer, b"x", 0);
    world.net.settle();
    assert_eq!(world.net.nat.datagram_flows().next().unwrap().port, Port(9));
}
