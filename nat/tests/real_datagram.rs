//! UDP, ICMP echo and port forwards over the host's real sockets, on loopback addresses.

use std::collections::VecDeque;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use vmring_core::offload::{Gso, OffloadHeader, Offloads};
use vmring_nat::sys::{Events, Host};
use vmring_nat::{
    Counter, ForwardError, ForwardRule, Full, Guest, GuestFrame, Link, Nat, NatConfig, Output,
    Policy, Port, Protocol, Request, Sockets, Verdict,
};

use crate::support::datagram::{Got, Receiver, echo_request, udp_frame};
use crate::support::port::{PORT, config};
use crate::support::script::Segment;

/// Far longer than any test needs on a slow and busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Leads every destination to the loopback address of its family, with the same port.
struct ToLoopback;

impl Policy for ToLoopback {
    fn decide(&mut self, request: &Request) -> Verdict {
        let ip: IpAddr = match request.destination {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        Verdict::Allow { to: SocketAddr::new(ip, request.destination.port()) }
    }
}

pub(crate) struct Frames(VecDeque<(Vec<u8>, OffloadHeader)>, Link);

impl Output for Frames {
    fn link(&self, _: Port) -> Link {
        self.1
    }
    fn send(&mut self, _: Port, frame: &[u8], header: &OffloadHeader) -> Result<(), Full> {
        self.0.push_back((frame.to_vec(), *header));
        Ok(())
    }
}

pub(crate) struct World {
    pub(crate) nat: Nat<Host>,
    out: Frames,
    events: Events,
    receiver: Receiver,
    pub(crate) start: Instant,
    pub(crate) guest: IpAddr,
    remote: IpAddr,
    got: VecDeque<Got>,
}

impl World {
    pub(crate) fn new(config: NatConfig, offloads: Offloads, v6: bool) -> Self {
        let host = Host::new().expect("sockets");
        let nat = Nat::with_policy(config, host, Box::new(ToLoopback), Duration::ZERO);
        let link = Link { mtu: 1500, offloads, longest: 65_549 };
        let (guest, remote) =
            if v6 { ("fd00::2", "2001:db8::1") } else { ("192.168.64.2", "192.0.2.1") };
        Self {
            nat,
            out: Frames(VecDeque::new(), link),
            events: Events::new(64),
            receiver: Receiver::default(),
            start: Instant::now(),
            guest: guest.parse().unwrap(),
            remote: remote.parse().unwrap(),
            got: VecDeque::new(),
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8], header: OffloadHeader) {
        let now = self.start.elapsed();
        self.nat.from_guest(PORT, &[GuestFrame { bytes, header }], now, &mut self.out);
    }

    /// What the guest gets next.
    pub(crate) fn next(&mut self, what: &str) -> Got {
        let start = Instant::now();
        loop {
            for (frame, header) in self.out.0.drain(..) {
                self.got.extend(self.receiver.take(&frame, &header, &self.out.1));
            }
            if let Some(got) = self.got.pop_front() {
                return got;
            }
            assert!(start.elapsed() < LONG, "it never came: {what}: {:?}", self.nat);
            self.turn();
        }
    }

    /// The next segment of TCP that the guest gets and that is one of these. Others are left out.
    pub(crate) fn segment(&mut self, what: &str, is_one: impl Fn(&Segment) -> bool) -> Segment {
        let start = Instant::now();
        loop {
            while let Some((frame, header)) = self.out.0.pop_front() {
                match Segment::parse(&frame, &header, &self.out.1) {
                    Some((segment, _)) if is_one(&segment) => return segment,
                    _ => {}
                }
            }
            assert!(start.elapsed() < LONG, "it never came: {what}: {:?}", self.nat);
            self.turn();
        }
    }

    pub(crate) fn turn(&mut self) {
        self.nat.sockets().wait(Some(Duration::from_millis(2)), &mut self.events).expect("a wait");
        let now = self.start.elapsed();
        for (token, readiness) in self.events.iter() {
            self.nat.on_ready(token, readiness, now, &mut self.out);
        }
        self.nat.on_time(now, &mut self.out);
    }
}

pub(crate) fn loopback(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
}

/// A server of UDP, or `None` where a family has no loopback.
fn server(v6: bool) -> Option<UdpSocket> {
    match UdpSocket::bind((loopback(v6), 0)) {
        Ok(server) => {
            server.set_read_timeout(Some(LONG)).unwrap();
            Some(server)
        }
        Err(error) => {
            eprintln!("skipped: no loopback address (v6: {v6}): {error}");
            None
        }
    }
}

fn each(test: impl Fn(&UdpSocket, bool)) {
    for v6 in [false, true] {
        if let Some(server) = server(v6) {
            test(&server, v6);
        }
    }
}

/// A question and its answer, with the guest's port on the host, through both kinds of sockets.
#[test]
fn a_question_is_answered() {
    each(|server, v6| {
        for endpoint_independent in [false, true] {
            let mut config = config(false);
            config.endpoint_independent = endpoint_independent;
            let mut world = World::new(config, Offloads::default(), v6);
            // A port that is free now.
            let free = UdpSocket::bind((loopback(v6), 0)).unwrap().local_addr().unwrap().port();
            let guest = SocketAddr::new(world.guest, free);
            let remote = SocketAddr::new(world.remote, server.local_addr().unwrap().port());
            world.send(&udp_frame(guest, remote, b"question"), OffloadHeader::NONE);
            let mut buffer = [0; 100];
            let (len, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(
                (&buffer[..len], from),
                (&b"question"[..], SocketAddr::new(loopback(v6), free))
            );
            server.send_to(b"answer", from).unwrap();
            let answer = Got::Udp { from: remote, to: guest, data: b"answer".into() };
            assert_eq!(world.next("the answer"), answer);
            let counters = world.nat.counters();
            assert_eq!((counters[Counter::UdpSent], counters[Counter::UdpReceived]), (1, 1));
        }
    });
}

/// A datagram that has left the host is nothing to wake up for.
#[test]
fn what_was_sent_is_told_to_nobody() {
    each(|server, v6| {
        let mut world = World::new(config(false), Offloads::default(), v6);
        let guest = SocketAddr::new(world.guest, 4005);
        let remote = SocketAddr::new(world.remote, server.local_addr().unwrap().port());
        for _ in 0..20 {
            world.send(&udp_frame(guest, remote, b"x"), OffloadHeader::NONE);
            server.recv_from(&mut [0; 10]).unwrap();
            let wait = Some(Duration::from_millis(1));
            world.nat.sockets().wait(wait, &mut world.events).expect("a wait");
            let told: Vec<_> = world.events.iter().collect();
            assert_eq!(told, [], "somebody was woken");
        }
    });
}

/// A port that somebody else has on the host stays his, and the guest's datagrams come from another.
#[test]
fn a_port_that_is_in_use_stays_its_owners() {
    each(|server, v6| {
        let unspecified: IpAddr =
            if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let owner = UdpSocket::bind((unspecified, 0)).unwrap();
        let port = owner.local_addr().unwrap().port();
        let mut world = World::new(config(false), Offloads::default(), v6);
        let remote = SocketAddr::new(world.remote, server.local_addr().unwrap().port());
        let guest = SocketAddr::new(world.guest, port);
        world.send(&udp_frame(guest, remote, b"x"), OffloadHeader::NONE);
        let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
        assert_ne!(from.port(), port);
        server.send_to(b"y", from).unwrap();
        assert_eq!(
            world.next("the answer"),
            Got::Udp { from: remote, to: guest, data: b"y".into() }
        );
    });
}

/// Nobody listens: the guest is told by ICMP, about its own datagram.
#[test]
fn a_refused_datagram_is_told() {
    each(|server, v6| {
        let nobody = UdpSocket::bind((loopback(v6), 0)).unwrap().local_addr().unwrap().port();
        assert_ne!(nobody, server.local_addr().unwrap().port());
        let mut world = World::new(config(false), Offloads::default(), v6);
        let (guest, remote) = (world.guest, world.remote);
        let from = SocketAddr::new(guest, 4001);
        world.send(
            &udp_frame(from, SocketAddr::new(remote, nobody), b"hello?"),
            OffloadHeader::NONE,
        );
        let Got::Icmp { from, to, kind, code, message } = world.next("the error") else { panic!() };
        assert_eq!((from, to, (kind, code)), (remote, guest, if v6 { (1, 4) } else { (3, 3) }));
        let quoted = &message[8 + if v6 { 40 } else { 20 }..];
        assert_eq!(
            (&quoted[..2], &quoted[2..4]),
            (&4001u16.to_be_bytes()[..], &nobody.to_be_bytes()[..])
        );
        // Only an error queue keeps what was sent.
        if cfg!(target_os = "linux") {
            assert!(message.ends_with(b"hello?"));
        }
    });
}

/// `UDP_SEGMENT` and `UDP_GRO`: a frame that is to be cut arrives as its datagrams, and what comes back in
/// one piece is one frame for a guest that cuts, and datagrams for another.
#[test]
fn many_datagrams_go_through_in_few_pieces() {
    each(|server, v6| {
        for offloads in [Offloads::ALL, Offloads::default()] {
            let mut world = World::new(config(false), offloads, v6);
            let guest = SocketAddr::new(world.guest, 4002);
            let remote = SocketAddr::new(world.remote, server.local_addr().unwrap().port());
            let data: Vec<u8> = (0..30 * 1000 + 9).map(|n| (n / 3) as u8).collect();
            let header =
                OffloadHeader { gso: Gso::UdpL4, segment_size: 1000, ..OffloadHeader::NONE };
            world.send(&udp_frame(guest, remote, &data), header);
            let mut buffer = [0; 2000];
            for piece in data.chunks(1000) {
                let (len, from) = server.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..len], piece);
                // Each goes back with its neighbours, where the kernel keeps them together.
                server.send_to(piece, from).unwrap();
            }
            for piece in data.chunks(1000) {
                let Got::Udp { from, to, data } = world.next("the echo") else { panic!() };
                assert!((from, to, &data[..]) == (remote, guest, piece));
            }
            assert_eq!(world.nat.counters()[Counter::UdpReceived], 31);
            assert_eq!(world.nat.counters()[Counter::SegmentsRefused], 0);
        }
    });
}

/// A flow of another translator sends in pieces, so the kernel hands them over in pieces.
#[test]
#[cfg(target_os = "linux")]
fn what_the_kernel_puts_together_is_one_frame() {
    use std::os::fd::AsRawFd;
    each(|server, v6| {
        let mut world = World::new(config(false), Offloads::ALL, v6);
        let guest = SocketAddr::new(world.guest, 4003);
        let remote = SocketAddr::new(world.remote, server.local_addr().unwrap().port());
        world.send(&udp_frame(guest, remote, b"x"), OffloadHeader::NONE);
        let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
        let size: libc::c_int = 1000;
        // SAFETY: the pointer and the length are those of `size` (UDP_SEGMENT of linux/udp.h is 103).
        let set =
            unsafe { libc::setsockopt(server.as_raw_fd(), 17, 103, (&raw const size).cast(), 4) };
        if set != 0 {
            eprintln!("skipped: this kernel has no UDP_SEGMENT");
            return;
        }
        let data: Vec<u8> = (0..20_500).map(|n| (n / 5) as u8).collect();
        server.send_to(&data, from).unwrap();
        let mut all = Vec::new();
        for _ in 0..21 {
            let Got::Udp { data, .. } = world.next("a datagram") else { panic!() };
            all.extend(data);
        }
        assert!(all == data);
        assert_eq!(world.receiver.cut_count, 1, "one frame, which the guest cuts");
        let size: libc::c_int = 0;
        // SAFETY: as above. The server is used again.
        unsafe { libc::setsockopt(server.as_raw_fd(), 17, 103, (&raw const size).cast(), 4) };
    });
}

/// A datagram that is longer than the guest's MTU arrives, in fragments, and so does its answer.
#[test]
fn a_long_datagram_arrives() {
    each(|server, v6| {
        let mut world = World::new(config(false), Offloads::default(), v6);
        let guest = SocketAddr::new(world.guest, 4004);
        let remote = SocketAddr::new(world.remote, server.local_addr().unwrap().port());
        world.send(&udp_frame(guest, remote, b"x"), OffloadHeader::NONE);
        let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
        let data: Vec<u8> = (0..60_000).map(|n| (n / 5) as u8).collect();
        server.send_to(&data, from).unwrap();
        assert!(world.next("it") == Got::Udp { from: remote, to: guest, data });
        assert!(world.receiver.fragment_count > 40);
    });
}

/// Echo through sockets of the system, or an honest refusal where it gives none.
#[test]
fn an_echo_is_answered_or_honestly_refused() {
    for v6 in [false, true] {
        if server(v6).is_none() {
            continue;
        }
        let mut world = World::new(config(false), Offloads::default(), v6);
        let (guest, remote) = (world.guest, world.remote);
        let capabilities = world.nat.sockets().capabilities();
        let may = if v6 { capabilities.echo_v6 } else { capabilities.echo_v4 };
        world.send(&echo_request(guest, remote, 0x1234, 7, b"payload"), OffloadHeader::NONE);
        let Got::Icmp { from, to, kind, code, message } = world.next("an answer") else { panic!() };
        assert_eq!(to, guest);
        if may {
            assert_eq!((from, kind, code), (remote, if v6 { 129 } else { 0 }, 0));
            assert_eq!(message[4..], [&[0x12, 0x34, 0, 7][..], b"payload"].concat());
            assert_eq!(world.nat.counters()[Counter::EchoReceived], 1);
        } else {
            eprintln!("skipped: this process may not open sockets for echo (v6: {v6})");
            assert_eq!((kind, code), if v6 { (1, 1) } else { (3, 13) });
            assert_eq!(world.nat.counters()[Counter::EchoForbidden], 1);
        }
    }
}

/// A forward of UDP: whoever sends to it reaches the guest, as the gateway, and gets the guest's answers.
#[test]
fn a_forward_of_udp_lets_the_host_in() {
    for v6 in [false, true] {
        let Some(client) = server(v6) else { continue };
        let mut world = World::new(config(false), Offloads::default(), v6);
        world.nat.sources().lease(PORT, crate::support::port::GUEST_MAC, world.guest);
        for wildcard in [false, true] {
            let mut rule = ForwardRule::new(Protocol::Udp, 0, Guest::Address(world.guest), 80);
            if wildcard {
                rule.bind =
                    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
            }
            let now = world.start.elapsed();
            let at = world.nat.add_forward(&rule, now, &mut world.out).expect("a forward");
            assert_eq!(at.ip().is_loopback(), !wildcard);
            // On Linux, all of 127.0.0.0/8 is loopback, and the system would answer from the first.
            let other = wildcard && !v6 && cfg!(target_os = "linux");
            let ip = if other { [127, 0, 0, 2].into() } else { loopback(v6) };
            let at = SocketAddr::new(ip, at.port());
            client.send_to(b"question", at).unwrap();
            let Got::Udp { from, to, data } = world.next("the question") else { panic!() };
            let guest = SocketAddr::new(world.guest, 80);
            assert_eq!((to, &data[..]), (guest, &b"question"[..]));
            let gateway: IpAddr = if v6 { "fd00::1" } else { "192.168.64.1" }.parse().unwrap();
            assert_eq!(from, SocketAddr::new(gateway, client.local_addr().unwrap().port()));
            world.send(&udp_frame(guest, from, b"answer"), OffloadHeader::NONE);
            let mut buffer = [0; 100];
            let (len, from) = client.recv_from(&mut buffer).unwrap();
            // From where the question was sent to, also if the socket is everywhere.
            assert_eq!((&buffer[..len], from), (&b"answer"[..], at));
            let now = world.start.elapsed();
            let listens = world.nat.forwards().next().unwrap().at;
            assert!(world.nat.remove_forward(Protocol::Udp, listens, false, now, &mut world.out));
        }
    }
}

/// A forward of TCP: a connection of the host reaches the guest as SYN, and one without a guest waits.
#[test]
fn a_forward_of_tcp_lets_the_host_in() {
    for v6 in [false, true] {
        if server(v6).is_none() {
            continue;
        }
        let mut world = World::new(config(false), Offloads::default(), v6);
        let rule = ForwardRule::new(Protocol::Tcp, 0, Guest::Address(world.guest), 80);
        let now = world.start.elapsed();
        let at = world.nat.add_forward(&rule, now, &mut world.out).expect("a forward");
        let same = ForwardRule::new(Protocol::Tcp, at.port(), rule.guest, 81);
        let again = world.nat.add_forward(&same, now, &mut world.out);
        assert_eq!(again, Err(ForwardError::InUse(at.port())));
        let taken = TcpListener::bind((loopback(v6), 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let others = ForwardRule::new(Protocol::Tcp, port, rule.guest, 81);
        let other = world.nat.add_forward(&others, now, &mut world.out);
        assert_eq!(other, Err(ForwardError::InUse(port)));
        let mut nowhere = rule;
        nowhere.bind = if v6 { "2001:db8::77" } else { "203.0.113.77" }.parse().unwrap();
        let nowhere = world.nat.add_forward(&nowhere, now, &mut world.out);
        assert_eq!(nowhere, Err(ForwardError::NoAddress));

        let client = TcpStream::connect(at).expect("a connection that waits");
        for _ in 0..5 {
            world.turn();
        }
        assert!(world.out.0.is_empty());
        world.nat.sources().lease(PORT, crate::support::port::GUEST_MAC, world.guest);
        let start = Instant::now();
        let (frame, header) = loop {
            if let Some(frame) = world.out.0.pop_front() {
                break frame;
            }
            assert!(start.elapsed() < LONG, "no SYN: {:?}", world.nat);
            world.turn();
        };
        let (syn, _) = Segment::parse(&frame, &header, &world.out.1).unwrap();
        assert_eq!((&syn.flags[..], &syn.data[..]), ("S", &[][..]));
        // The guest refuses, and the client is told.
        let gateway: IpAddr = if v6 { "fd00::1" } else { "192.168.64.1" }.parse().unwrap();
        let from = SocketAddr::new(gateway, client.local_addr().unwrap().port());
        let (flags, ack) = ("R.".into(), syn.seq.wrapping_add(1));
        let reset = Segment { flags, ack, ..Segment::default() };
        world.send(&reset.frame(SocketAddr::new(world.guest, 80), from), OffloadHeader::NONE);
        client.set_read_timeout(Some(LONG)).unwrap();
        let error = (&client).read(&mut [0; 10]).expect_err("a reset");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        // A removed forward is no listener any more.
        let now = world.start.elapsed();
        assert!(world.nat.remove_forward(Protocol::Tcp, at, false, now, &mut world.out));
        assert!(TcpStream::connect(at).is_err());
    }
}
