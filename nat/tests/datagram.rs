//! UDP and ICMP echo, over the model of the kernel.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, Ipv4Packet};
use vmring_core::offload::{Gso, OffloadHeader, Offloads};
use vmring_nat::{
    Counter, DatagramError, GuestFrame, Link, NatConfig, Port, Protocol, SocketError,
};

use crate::support::datagram::{Got, Receiver, echo_request, udp_frame};
use crate::support::port::{Net, PORT, config, plain_link};

/// A guest, and a peer, over IPv4 or IPv6.
struct Pair {
    net: Net,
    receiver: Receiver,
    guest: SocketAddr,
    peer: SocketAddr,
}

impl Pair {
    fn new(v6: bool) -> Self {
        Self::with(config(false), plain_link(), v6)
    }

    fn with(config: NatConfig, link: Link, v6: bool) -> Self {
        let (guest, peer) = if v6 {
            ("[fd00::2]:4000", "[2001:db8::1]:53")
        } else {
            ("192.168.64.2:4000", "192.0.2.1:53")
        };
        let net = Net::new(config, link);
        let (guest, peer) = (guest.parse().unwrap(), peer.parse().unwrap());
        Self { net, receiver: Receiver::default(), guest, peer }
    }

    fn send(&mut self, data: &[u8]) {
        self.net.send(&[udp_frame(self.guest, self.peer, data)]);
    }

    fn got(&mut self) -> Vec<Got> {
        let frames: Vec<_> = self.net.out.frames.drain(..).collect();
        let link = self.net.out.link;
        frames.iter().flat_map(|(frame, head)| self.receiver.take(frame, head, &link)).collect()
    }

    /// Sends a datagram, or several of `segment` bytes that the guest has left to be cut.
    fn send_to_be_cut(&mut self, data: &[u8], segment: u16) {
        let bytes = udp_frame(self.guest, self.peer, data);
        let header =
            OffloadHeader { gso: Gso::UdpL4, segment_size: segment, ..OffloadHeader::NONE };
        let (now, out) = (self.net.now, &mut self.net.out);
        self.net.nat.from_guest(PORT, &[GuestFrame { bytes: &bytes, header }], now, out);
        self.net.settle();
    }

    /// The lengths of what the socket has sent, and of the datagrams in each.
    fn sent(&self, index: usize) -> Vec<(usize, u16)> {
        let sent = self.net.kernel.sent(index);
        sent.iter().map(|sent| (sent.bytes.len(), sent.segment)).collect()
    }

    fn reply(&mut self, index: usize, from: SocketAddr, data: &[u8]) {
        self.net.kernel.datagram(index, from, data, 0);
        self.net.settle();
    }

    fn counted(&self, counter: Counter) -> u64 {
        self.net.nat.counters()[counter]
    }

    fn flows(&self) -> usize {
        self.net.nat.datagram_flows().count()
    }
}

fn each(test: impl Fn(Pair)) {
    for v6 in [false, true] {
        test(Pair::new(v6));
    }
}

/// A datagram goes out from the guest's port, and the answer comes back from whom it was asked.
#[test]
fn a_datagram_goes_out_and_its_answer_comes_back() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest, pair.peer);
        pair.send(b"question");
        let sent = pair.net.kernel.sent(0);
        assert_eq!((sent.len(), &sent[0].bytes[..], sent[0].route), (1, &b"question"[..], None));
        let (to, port) = pair.net.kernel.with(0, |p| (p.to, p.datagrams.port));
        assert_eq!((to, port), (peer, 4000));
        pair.reply(0, peer, b"answer");
        let answer = Got::Udp { from: peer, to: guest, data: b"answer".into() };
        assert_eq!(pair.got(), [answer]);
        // An empty datagram is one.
        pair.send(b"");
        pair.reply(0, peer, b"");
        assert_eq!(pair.got(), [Got::Udp { from: peer, to: guest, data: Vec::new() }]);
        assert_eq!(pair.net.kernel.sent(0).len(), 1);
        assert_eq!((pair.counted(Counter::UdpSent), pair.counted(Counter::UdpReceived)), (2, 2));
    });
}

/// T14: a datagram of somebody else, who has sent while the socket was not yet connected, is no answer.
#[test]
fn only_the_asked_peer_answers() {
    for endpoint_independent in [false, true] {
        for v6 in [false, true] {
            let mut config = config(false);
            config.endpoint_independent = endpoint_independent;
            let mut pair = Pair::with(config, plain_link(), v6);
            pair.send(b"question");
            let other_port = SocketAddr::new(pair.peer.ip(), 54);
            let other: IpAddr = if v6 { "2001:db8::2" } else { "192.0.2.2" }.parse().unwrap();
            pair.reply(0, other_port, b"lie");
            pair.reply(0, SocketAddr::new(other, 53), b"lie");
            assert_eq!((pair.got(), pair.counted(Counter::NotAsked)), (vec![], 2));
            pair.reply(0, pair.peer, b"truth");
            assert_eq!(pair.got().len(), 1);
        }
    }
}

/// 9725e79: an answer that waits before the socket is told of is not lost.
#[test]
fn an_answer_that_is_there_at_once_is_not_lost() {
    each(|mut pair| {
        pair.send(b"question");
        for _ in 0..40 {
            pair.net.kernel.with(0, |peer| peer.datagrams.incoming.clear());
        }
        for byte in 0..40 {
            pair.net.kernel.datagram(0, pair.peer, &[byte], 0);
        }
        // One event tells of all.
        let (token, readiness) = pair.net.kernel.take_event().unwrap();
        while pair.net.kernel.take_event().is_some() {}
        let (now, out) = (pair.net.now, &mut pair.net.out);
        pair.net.nat.on_ready(token, readiness, now, out);
        pair.net.settle();
        assert_eq!(pair.got().len(), 40);
    });
}

/// A port that somebody has on the host, or that belongs to its services, is not shared with him.
#[test]
fn a_port_in_use_is_not_shared() {
    each(|mut pair| {
        pair.net.kernel.0.borrow_mut().ports_in_use.push(4000);
        pair.send(b"x");
        assert_eq!(pair.net.kernel.with(0, |peer| peer.datagrams.port), 50_000);
        // Nor is one of the host's services taken.
        pair.guest.set_port(1023);
        pair.send(b"x");
        assert!(pair.net.kernel.with(1, |peer| peer.datagrams.port) >= 50_000);
        assert_eq!(pair.flows(), 2);
    });
}

/// Each destination has a port of its own, unless the mapping is to be independent of it.
#[test]
fn an_endpoint_independent_mapping_has_one_port_for_all_destinations() {
    for v6 in [false, true] {
        let mut config = config(false);
        config.endpoint_independent = true;
        let mut pair = Pair::with(config, plain_link(), v6);
        let first = pair.peer;
        pair.send(b"one");
        pair.peer.set_port(54);
        pair.send(b"two");
        assert_eq!((pair.net.kernel.len(), pair.flows()), (1, 2));
        let routes: Vec<_> =
            pair.net.kernel.sent(0).iter().map(|sent| sent.route.unwrap().to).collect();
        assert_eq!(routes, [first, pair.peer]);
        let (guest, second) = (pair.guest, pair.peer);
        pair.reply(0, first, b"from one");
        pair.reply(0, second, b"from two");
        let from = |from, data: &[u8]| Got::Udp { from, to: guest, data: data.into() };
        assert_eq!(pair.got(), [from(first, b"from one"), from(second, b"from two")]);
        // An error is told to the flow that it is about.
        let kind = if v6 { (1, 4) } else { (3, 3) };
        let error = DatagramError { icmp: Some(kind), offender: None, to: second, quoted: 0 };
        pair.net.kernel.datagram_error(0, error, b"two");
        pair.net.settle();
        assert_eq!(quoted_ports(&pair.got()), [(guest.port(), 54)]);
        // The socket goes with the last flow.
        pair.net.wait(Duration::from_secs(29));
        pair.send(b"two");
        pair.net.wait(Duration::from_secs(29));
        assert_eq!((pair.flows(), pair.net.kernel.open()), (1, 1));
        pair.net.wait(Duration::from_secs(100));
        pair.net.assert_empty();
    }
}

/// The ports of the datagrams that errors quote.
fn quoted_ports(got: &[Got]) -> Vec<(u16, u16)> {
    let ports = |got: &Got| match got {
        Got::Icmp { message, from, .. } => {
            let at = 8 + if from.is_ipv4() { 20 } else { 40 };
            let port = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
            (port(at), port(at + 2))
        }
        other => panic!("no error: {other:?}"),
    };
    got.iter().map(ports).collect()
}

/// A flow ends after 30 s, and one that both sides have used for a while after 120 s (section 1.6).
#[test]
fn flows_end_when_they_are_not_used() {
    each(|mut pair| {
        pair.send(b"x");
        pair.net.wait(Duration::from_secs(29));
        assert_eq!(pair.flows(), 1);
        pair.net.wait(Duration::from_secs(2));
        pair.net.assert_empty();
        // A question and an answer are no stream.
        pair.send(b"x");
        pair.reply(1, pair.peer, b"y");
        pair.net.wait(Duration::from_secs(31));
        assert_eq!(pair.flows(), 0);
        // Nor is what only one side sends.
        for _ in 0..5 {
            pair.send(b"x");
            pair.net.wait(Duration::from_secs(2));
        }
        pair.net.wait(Duration::from_secs(30));
        assert_eq!(pair.flows(), 0);
        for _ in 0..3 {
            pair.send(b"x");
            pair.reply(3, pair.peer, b"y");
            pair.net.wait(Duration::from_secs(2));
        }
        assert!(pair.net.nat.datagram_flows().all(|flow| flow.stream));
        pair.net.wait(Duration::from_secs(115));
        assert_eq!(pair.flows(), 1);
        pair.net.wait(Duration::from_secs(5));
        pair.net.assert_empty();
    });
}

/// What one flow sends in a batch goes out in one call: equal sizes in one piece, and flows do not mix.
#[test]
fn datagrams_of_a_batch_are_sent_together() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest, pair.peer);
        let other = SocketAddr::new(peer.ip(), 99);
        let mut frames = Vec::new();
        for n in 0..6u8 {
            frames.push(udp_frame(guest, peer, &[n; 100]));
            frames.push(udp_frame(guest, other, &[n; 50]));
        }
        frames.push(udp_frame(guest, peer, &[6; 40]));
        frames.push(udp_frame(guest, peer, &[7; 100]));
        frames.push(udp_frame(guest, peer, &[]));
        frames.push(udp_frame(guest, peer, &[8; 100]));
        pair.net.send(&frames);
        let sent = pair.net.kernel.sent(0);
        let shape: Vec<_> = sent.iter().map(|s| (s.bytes.len(), s.segment, s.call)).collect();
        // A shorter one ends a piece.
        assert_eq!(shape, [(640, 100, 1), (100, 0, 1), (0, 0, 1), (100, 0, 1)]);
        let bytes: Vec<u8> = (0..6).flat_map(|n| [n; 100]).chain([6; 40]).collect();
        assert_eq!(sent[0].bytes, bytes);
        let sent = pair.net.kernel.sent(1);
        assert_eq!((sent.len(), sent[0].bytes.len(), sent[0].segment), (1, 300, 50));
        assert_eq!(pair.counted(Counter::UdpSent), 16);
    });
}

/// A frame that the guest has left to be cut goes out with one call, or in datagrams where the system
/// cannot, or refuses.
#[test]
fn a_frame_to_be_cut_is_sent_in_one_piece_where_the_system_can() {
    for (segments, refuses) in [(64, false), (0, false), (64, true)] {
        each(|mut pair| {
            pair.net.kernel.0.borrow_mut().capabilities.udp_segments = segments;
            pair = Pair { net: remake(&pair.net), ..pair };
            let data: Vec<u8> = (0..100 * 400 + 7).map(|n| (n / 3) as u8).collect();
            pair.send(&[]);
            pair.net.kernel.sent(0);
            let header =
                OffloadHeader { gso: Gso::UdpL4, segment_size: 400, ..OffloadHeader::NONE };
            let bytes = udp_frame(pair.guest, pair.peer, &data);
            if refuses {
                let einval = SocketError::Other(22);
                pair.net.kernel.with(0, |peer| peer.datagrams.failures.push_back(einval));
            }
            let (now, out) = (pair.net.now, &mut pair.net.out);
            let frame = GuestFrame { bytes: &bytes, header };
            pair.net.nat.from_guest(PORT, &[frame], now, out);
            let sent = pair.net.kernel.sent(0);
            let all: Vec<u8> = sent.iter().flat_map(|sent| sent.bytes.clone()).collect();
            assert!(all == data);
            let cut: Vec<_> = sent.iter().map(|s| (s.bytes.len(), s.segment)).collect();
            match (segments, refuses) {
                (64, false) => assert_eq!(cut, [(64 * 400, 400), (36 * 400 + 7, 400)]),
                (0, _) => assert!(cut.len() == 101 && cut[0] == (400, 0) && cut[100] == (7, 0)),
                // The second piece was in the same call.
                _ => assert!(cut.len() == 65 && cut[0] == (400, 0) && cut[64].0 == 36 * 400 + 7),
            }
            assert_eq!(pair.counted(Counter::UdpSent), 102);
            assert_eq!(pair.counted(Counter::SegmentsRefused), refuses.into());
        });
    }
}

/// A socket that has refused several datagrams at once is not asked again. Another is.
#[test]
fn a_socket_that_refuses_segments_gets_no_more() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest, pair.peer);
        pair.send(&[]);
        pair.sent(0);
        let refused = SocketError::TooLong;
        pair.net.kernel.with(0, |peer| peer.datagrams.failures.push_back(refused));
        for _ in 0..2 {
            pair.send_to_be_cut(&[1; 250], 100);
            assert_eq!(pair.sent(0), [(100, 0), (100, 0), (50, 0)]);
            let frames: Vec<_> = (0..3).map(|n| udp_frame(guest, peer, &[n; 100])).collect();
            pair.net.send(&frames);
            assert_eq!(pair.sent(0), [(100, 0); 3]);
        }
        let counted = [Counter::SegmentsRefused, Counter::TooLong].map(|one| pair.counted(one));
        assert_eq!(counted, [1, 0]);
        pair.peer.set_port(99);
        pair.send_to_be_cut(&[1; 250], 100);
        assert_eq!(pair.sent(1), [(250, 100)]);
    });
}

/// The system takes so many bytes in one piece, whether the guest has left them to be cut or they are
/// datagrams of one batch.
#[test]
fn a_piece_is_as_long_as_the_system_takes() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest, pair.peer);
        pair.send_to_be_cut(&[1; 65_500], 1100);
        assert_eq!(pair.sent(0), [(59 * 1100, 1100), (600, 0)]);
        // 65,000 bytes are one piece.
        pair.send_to_be_cut(&[1; 65_005], 1300);
        assert_eq!(pair.sent(0), [(65_000, 1300), (5, 0)]);
        let frames: Vec<_> = (0..60).map(|n| udp_frame(guest, peer, &[n; 1300])).collect();
        pair.net.send(&frames);
        assert_eq!(pair.sent(0), [(50 * 1300, 1300), (10 * 1300, 1300)]);
        let frames: Vec<_> = (0..60).map(|n| udp_frame(guest, peer, &[n; 1301])).collect();
        pair.net.send(&frames);
        assert_eq!(pair.sent(0), [(49 * 1301, 1301), (11 * 1301, 1301)]);
        // A datagram that is longer than a piece is one.
        pair.send(&[1; 65_300]);
        pair.send_to_be_cut(&[1; 65_300], 65_200);
        assert_eq!(pair.sent(0), [(65_300, 0), (65_200, 0), (100, 0)]);
    });
}

/// A frame that is to be cut and is one datagram is sent as one, also an empty one.
#[test]
fn a_frame_to_be_cut_may_be_one_datagram() {
    each(|mut pair| {
        for len in [400, 399, 1, 0] {
            pair.send_to_be_cut(&vec![7; len], 400);
            assert_eq!(pair.sent(0), [(len, 0)]);
        }
        // It goes together with others of its size.
        let bytes = udp_frame(pair.guest, pair.peer, &[7; 400]);
        let header = OffloadHeader { gso: Gso::UdpL4, segment_size: 400, ..OffloadHeader::NONE };
        let frames = [GuestFrame { bytes: &bytes, header }; 2];
        pair.net.nat.from_guest(PORT, &frames, pair.net.now, &mut pair.net.out);
        assert_eq!(pair.sent(0), [(800, 400)]);
        assert_eq!(pair.counted(Counter::UdpSent), 6);
        // The last of many is one, too.
        pair.send_to_be_cut(&[7; 65 * 400], 400);
        assert_eq!(pair.sent(0), [(64 * 400, 400), (400, 0)]);
    });
}

/// A translator over the same kernel, which has changed its capabilities.
fn remake(net: &Net) -> Net {
    let mut new = Net::new(config(false), net.out.link);
    let capabilities = net.kernel.0.borrow().capabilities;
    let kernel = crate::support::kernel::Kernel::new();
    kernel.0.borrow_mut().capabilities = capabilities;
    new.nat = vmring_nat::Nat::new(config(false), kernel.clone(), new.now);
    new.kernel = kernel;
    new
}

/// A guest cannot make many datagrams of one small frame.
#[test]
fn a_frame_is_few_datagrams() {
    each(|mut pair| {
        for segment_size in [0, 1, 7] {
            let header = OffloadHeader { gso: Gso::UdpL4, segment_size, ..OffloadHeader::NONE };
            let bytes = udp_frame(pair.guest, pair.peer, &[1; 1024]);
            let (now, out) = (pair.net.now, &mut pair.net.out);
            pair.net.nat.from_guest(PORT, &[GuestFrame { bytes: &bytes, header }], now, out);
        }
        assert_eq!((pair.counted(Counter::Malformed), pair.net.kernel.len()), (3, 0));
    });
}

/// What the kernel gives in one piece is one frame for a guest that cuts it, and datagrams for another.
#[test]
fn a_piece_is_one_frame_for_a_guest_that_takes_it() {
    for v6 in [false, true] {
        for uso in [false, true] {
            let mut offloads = Offloads::ALL;
            offloads.uso = uso;
            let link = Link { mtu: 1500, offloads, longest: 65_549 };
            let mut pair = Pair::with(config(false), link, v6);
            pair.send(b"x");
            let data: Vec<u8> = (0..20 * 1200 + 5).map(|n| (n / 7) as u8).collect();
            pair.net.kernel.datagram(0, pair.peer, &data, 1200);
            pair.net.settle();
            assert_eq!(pair.net.out.frames.len(), if uso { 1 } else { 21 });
            let got = pair.got();
            let pieces: Vec<_> = got
                .iter()
                .map(|got| match got {
                    Got::Udp { data, .. } => &data[..],
                    other => panic!("{other:?}"),
                })
                .collect();
            assert!(pieces.len() == 21 && pieces.concat() == data, "{} pieces", pieces.len());
            assert_eq!(
                (pair.receiver.cut_count, pair.counted(Counter::UdpReceived)),
                (uso.into(), 21)
            );
            // Datagrams that are longer than the guest's MTU are not left to it.
            pair.net.kernel.datagram(0, pair.peer, &data[..6000], 3000);
            pair.net.settle();
            assert_eq!((pair.got().len(), pair.receiver.cut_count), (2, uso.into()));
            // Tiny ones, whose frames are padded, one behind the other.
            pair.net.kernel.datagram(0, pair.peer, b"abcdefghi", 2);
            pair.net.settle();
            let tiny: Vec<_> = pair.got();
            let text: Vec<u8> = tiny
                .iter()
                .flat_map(|got| match got {
                    Got::Udp { data, .. } => data.clone(),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!((tiny.len(), &text[..]), (5, &b"abcdefghi"[..]));
        }
    }
}

/// A frame to be cut is no longer than an IP packet and than the link allows. What would be longer comes in
/// datagrams.
#[test]
fn a_frame_to_be_cut_is_as_long_as_its_link_allows() {
    for v6 in [false, true] {
        let headers = if v6 { 40 } else { 20 } + 8;
        for (longest, most) in [(70_000, 65_535 - headers), (20_000, 20_000 - 14 - headers)] {
            let link = Link { mtu: 1500, offloads: Offloads::ALL, longest };
            let mut pair = Pair::with(config(false), link, v6);
            pair.send(b"x");
            for (len, frames) in [(most, 1), (most + 1, (most + 1usize).div_ceil(1000))] {
                let data: Vec<u8> = (0..len).map(|n| (n / 7) as u8).collect();
                pair.net.kernel.datagram(0, pair.peer, &data, 1000);
                pair.net.settle();
                assert_eq!(pair.net.out.frames.len(), frames, "{len} bytes");
                let got: Vec<u8> = pair.got().iter().flat_map(udp_data).copied().collect();
                assert!(got == data, "{len} bytes");
            }
            assert_eq!(pair.receiver.cut_count, 1);
        }
    }
}

/// The data of a datagram.
fn udp_data(got: &Got) -> &[u8] {
    match got {
        Got::Udp { data, .. } => data,
        other => panic!("{other:?}"),
    }
}

/// A short frame is padded with zeros. Its checksum is complete, also for a guest that leaves it to others.
#[test]
fn short_frames_are_padded() {
    for v6 in [false, true] {
        for offloads in [Offloads::default(), Offloads::ALL] {
            let mut pair = Pair::with(config(false), Link { offloads, ..plain_link() }, v6);
            let (guest, peer) = (pair.guest, pair.peer);
            pair.send(b"x");
            pair.net.send(&[echo_request(guest.ip(), peer.ip(), 0, 0, b"")]);
            // What was there before has no zeros.
            pair.reply(0, peer, &[0xff; 200]);
            pair.got();
            let headers = 14 + if v6 { 40 } else { 20 } + 8;
            for len in [0, 1, 3, 59usize.saturating_sub(headers), 60 - headers.min(60)] {
                pair.reply(0, peer, &vec![0xff; len]);
                let (frame, header) = &pair.net.out.frames[0];
                assert_eq!(frame.len(), (headers + len).max(60));
                assert!(frame[headers + len..].iter().all(|&byte| byte == 0), "{len} bytes");
                let is_short = headers + len < 60;
                let complete = is_short || offloads == Offloads::default();
                assert_eq!(*header == OffloadHeader::NONE, complete, "{len} bytes");
                let got = pair.got();
                let data = vec![0xff; len];
                assert_eq!(got, [Got::Udp { from: peer, to: guest, data }]);
            }
            let reply = [if v6 { 129 } else { 0 }, 0, 0, 0, 9, 9, 0, 0, 0xff];
            pair.reply(1, SocketAddr::new(peer.ip(), 0), &reply);
            let (frame, _) = &pair.net.out.frames[0];
            assert_eq!(frame.len(), (headers + 1).max(60));
            assert!(frame[headers + 1..].iter().all(|&byte| byte == 0));
            assert_eq!(pair.got().len(), 1);
        }
    }
}

/// M8: what is longer than the guest's MTU arrives in fragments.
#[test]
fn a_long_datagram_arrives_in_fragments() {
    for v6 in [false, true] {
        for mtu in [1280, 1500, 9000] {
            let link = Link { mtu, offloads: Offloads::default(), longest: mtu as usize + 14 };
            let mut pair = Pair::with(config(false), link, v6);
            pair.send(b"x");
            let ip = if v6 { 40 } else { 20 };
            let fits = mtu as usize - ip - 8;
            for len in [fits, fits + 1, 10_000, 65_507 - if v6 { 20 } else { 0 }] {
                let data: Vec<u8> = (0..len).map(|n| (n / 11) as u8).collect();
                let before = pair.receiver.fragment_count;
                pair.reply(0, pair.peer, &data);
                let (from, to) = (pair.peer, pair.guest);
                assert!(pair.got() == [Got::Udp { from, to, data }], "{len} bytes, MTU {mtu}");
                assert_eq!(pair.receiver.fragment_count > before, len > fits);
            }
        }
    }
}

/// S8: fragments of a guest are dropped, and counted.
#[test]
fn fragments_of_a_guest_are_dropped_and_counted() {
    let mut pair = Pair::new(false);
    let mut first = udp_frame(pair.guest, pair.peer, &[1; 100]);
    first[20] = 0x20;
    let mut second = first.clone();
    (second[20], second[21]) = (0, 10);
    for frame in [&mut first, &mut second] {
        Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
    }
    pair.net.send(&[first, second]);
    assert_eq!((pair.counted(Counter::Fragment), pair.net.kernel.len()), (2, 0));
    let mut pair = Pair::new(true);
    let mut frame = udp_frame(pair.guest, pair.peer, &[1; 100]);
    frame[20] = 44;
    pair.net.send(&[frame]);
    assert_eq!((pair.counted(Counter::Fragment), pair.net.kernel.len()), (1, 0));
}

/// Lengths that do not fit are nonsense, and what is behind the datagram is padding.
#[test]
fn a_length_that_is_a_lie_is_refused() {
    each(|mut pair| {
        let at = if pair.guest.is_ipv4() { 34 } else { 54 };
        for len in [0u16, 7, 13, 65_535] {
            let mut frame = udp_frame(pair.guest, pair.peer, b"data");
            frame[at + 4..at + 6].copy_from_slice(&len.to_be_bytes());
            pair.net.send(&[frame]);
        }
        for port_at in [at, at + 2] {
            let mut frame = udp_frame(pair.guest, pair.peer, b"data");
            frame[port_at..port_at + 2].fill(0);
            pair.net.send(&[frame]);
        }
        assert_eq!((pair.counted(Counter::Malformed), pair.net.kernel.len()), (6, 0));
        let mut frame = udp_frame(pair.guest, pair.peer, b"data");
        frame[at + 4..at + 6].copy_from_slice(&[0, 10]);
        frame.extend([0xee; 20]);
        pair.net.send(&[frame]);
        assert_eq!(pair.net.kernel.sent(0)[0].bytes, b"da");
    });
}

/// An error that a datagram meets is told, as if it had met the guest's own: from whom, about what.
#[test]
fn errors_are_passed_on_with_who_sent_them() {
    for (v6, router) in [(false, "203.0.113.9"), (true, "2001:db8:9::9")] {
        let mut pair = Pair::new(v6);
        let (guest, peer) = (pair.guest, pair.peer);
        let router: IpAddr = router.parse().unwrap();
        let (unreachable, exceeded) = if v6 { ((1, 4), (3, 0)) } else { ((3, 3), (11, 0)) };
        pair.send(b"question");
        let gateway: IpAddr = if v6 { "fd00::1" } else { "192.168.64.1" }.parse().unwrap();
        let loopback: IpAddr = if v6 { "::1" } else { "127.0.0.1" }.parse().unwrap();
        let cases = [
            (unreachable, Some(peer.ip()), peer.ip()),
            (exceeded, Some(router), router),
            (unreachable, Some(loopback), gateway),
            (unreachable, None, gateway),
        ];
        for (icmp, offender, from) in cases {
            let error = DatagramError { icmp: Some(icmp), offender, to: peer, quoted: 0 };
            pair.net.kernel.datagram_error(0, error, b"question");
            pair.net.settle();
            let got = pair.got();
            let [Got::Icmp { from: sender, to, kind, code, message }] = &got[..] else {
                panic!("{got:?}");
            };
            assert_eq!((*sender, *to, (*kind, *code)), (from, guest.ip(), icmp));
            // The quoted packet is the guest's.
            let ip = &message[8..];
            let (source, target) = if v6 { (8..24, 24..40) } else { (12..16, 16..20) };
            let bytes = |ip: IpAddr| match ip {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            assert_eq!((&ip[source], &ip[target]), (&bytes(guest.ip())[..], &bytes(peer.ip())[..]));
            assert_eq!(quoted_ports(&got), [(guest.port(), peer.port())]);
            assert!(message.ends_with(b"question"));
        }
        assert_eq!(pair.counted(Counter::ErrorsPassed), 4);
        // The guest would send fragments if it were told that its datagram is too long.
        let icmp = Some(if v6 { (2, 0) } else { (3, 4) });
        for icmp in [icmp, None] {
            let error = DatagramError { icmp, offender: Some(router), to: peer, quoted: 0 };
            pair.net.kernel.datagram_error(0, error, b"question");
            pair.net.settle();
        }
        assert_eq!((pair.got(), pair.counted(Counter::TooLong)), (vec![], 2));
        // A flow outlives its errors.
        assert_eq!(pair.flows(), 1);
    }
}

/// The packet that an error quotes has the length of what the system has kept of it, in each of its headers. Of
/// an echo request there is at least the header.
#[test]
fn a_quoted_packet_has_its_length() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest, pair.peer);
        let v4 = guest.is_ipv4();
        let ip = if v4 { 20 } else { 40 };
        pair.send(b"x");
        pair.net.send(&[echo_request(guest.ip(), peer.ip(), 0x1234, 7, b"payload")]);
        let icmp = Some(if v4 { (3, 1) } else { (1, 3) });
        // The longest error has 576 bytes over IPv4 and 1,280 over IPv6.
        let longest = if v4 { 576 } else { 1280 } - ip - 8;
        for (index, to) in [(0, peer), (1, SocketAddr::new(peer.ip(), 0))] {
            for kept in [0, 1, 7, 8, 9, 100, 1400] {
                let error = DatagramError { icmp, offender: None, to, quoted: 0 };
                pair.net.kernel.datagram_error(index, error, &vec![8; kept]);
                pair.net.settle();
                let got = pair.got();
                let [Got::Icmp { message, .. }] = &got[..] else { panic!("{got:?}") };
                let packet = &message[8..];
                // As much is kept as fits over IPv6.
                let kept = kept.min(1280 - 40 - 8 - 40 - 8);
                let len = if index == 0 { 8 + kept } else { kept.max(8) };
                assert_eq!(packet.len(), (ip + len).min(longest), "{kept} bytes");
                let word =
                    |at: usize| usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
                assert_eq!(word(if v4 { 2 } else { 4 }), if v4 { 20 + len } else { len });
                if index == 0 {
                    assert_eq!(word(ip + 4), len, "{kept} bytes");
                    continue;
                }
                assert_eq!((packet[ip], word(ip + 4)), (if v4 { 8 } else { 128 }, 0x1234));
                // The checksum is that of what is quoted.
                if packet.len() == ip + len {
                    let quoted = &packet[ip..];
                    let is_right = match (guest.ip(), peer.ip()) {
                        (IpAddr::V6(from), IpAddr::V6(to)) => {
                            Icmpv6Packet::new_checked(quoted).unwrap().verify_checksum(&from, &to)
                        }
                        _ => Icmpv4Packet::new_checked(quoted).unwrap().verify_checksum(),
                    };
                    assert!(is_right, "{kept} bytes");
                }
            }
        }
    });
}

/// A datagram that the kernel refuses because of an earlier one's error is sent again. Where the system
/// keeps no errors, the guest is told all the same.
#[test]
fn an_earlier_datagrams_error_costs_no_datagram() {
    each(|mut pair| {
        let fail = |pair: &Pair, error| {
            pair.net.kernel.with(0, |peer| peer.datagrams.failures.push_back(error));
        };
        pair.send(b"one");
        fail(&pair, SocketError::Refused);
        pair.send(b"two");
        let sent: Vec<_> = pair.net.kernel.sent(0).into_iter().map(|sent| sent.bytes).collect();
        assert_eq!(sent, [b"one", b"two"]);
        let kind = if pair.guest.is_ipv4() { (3, 3) } else { (1, 4) };
        let got = pair.got();
        assert!(matches!(&got[..], [Got::Icmp { kind: k, code: c, .. }] if (*k, *c) == kind));
        // An error that stays loses the datagram, and does not spin.
        for _ in 0..2 {
            fail(&pair, SocketError::NetworkUnreachable);
        }
        pair.send(b"three");
        assert_eq!(pair.net.kernel.sent(0), []);
        assert_eq!(pair.counted(Counter::DatagramLost), 1);
        // A full socket loses what it does not take, as a link does.
        fail(&pair, SocketError::WouldBlock);
        pair.send(b"four");
        assert_eq!((pair.net.kernel.sent(0), pair.counted(Counter::DatagramLost)), (vec![], 2));
        fail(&pair, SocketError::TooLong);
        pair.send(b"five");
        assert_eq!((pair.net.kernel.sent(0), pair.counted(Counter::TooLong)), (vec![], 1));
    });
}

/// What is denied opens nothing. The guest is told, unless it has sent to many.
#[test]
fn what_is_denied_opens_nothing() {
    let mut pair = Pair::new(false);
    pair.peer = "169.254.169.254:53".parse().unwrap();
    pair.send(b"x");
    pair.send(b"x");
    assert!(matches!(&pair.got()[..], [Got::Icmp { kind: 3, code: 13, .. }, _]));
    assert_eq!(pair.counted(Counter::DeniedLinkLocal), 2);
    for (to, why) in [
        ("224.0.0.251:5353", Counter::DeniedMulticast),
        ("255.255.255.255:67", Counter::DeniedMulticast),
        ("192.168.64.255:137", Counter::DeniedSubnet),
    ] {
        pair.peer = to.parse().unwrap();
        let before = pair.counted(why);
        pair.net.send(&[
            udp_frame(pair.guest, pair.peer, b"x"),
            udp_frame(pair.guest, pair.peer, b"y"),
        ]);
        assert_eq!((pair.got(), pair.counted(why)), (vec![], before + 2), "{to}");
        let mut frame = udp_frame(pair.guest, pair.peer, b"x");
        frame[22] = 1;
        Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        pair.net.send(&[frame]);
        assert_eq!(pair.got(), [], "{to}");
    }
    let mut pair = Pair::new(true);
    pair.peer = "[ff02::fb]:5353".parse().unwrap();
    pair.send(b"x");
    assert_eq!((pair.got(), pair.counted(Counter::DeniedMulticast)), (vec![], 1));
    assert_eq!(pair.net.kernel.len(), 0);
}

fn from_ports(pair: &mut Pair, port: u32, ports: std::ops::Range<u16>) {
    let header = OffloadHeader::NONE;
    for from in ports {
        let guest = SocketAddr::new([192, 168, 64, 10 + port as u8].into(), from);
        let bytes = udp_frame(guest, pair.peer, b"x");
        let (now, out) = (pair.net.now, &mut pair.net.out);
        pair.net.nat.from_guest(Port(port), &[GuestFrame { bytes: &bytes, header }], now, out);
    }
    pair.net.settle();
}

/// S6: of thousands of flows, as many are open as the port may have. The oldest of the port make way, streams and
/// others' flows do not, and memory does not grow.
#[test]
fn a_flood_takes_only_the_ports_own_place() {
    let mut limits = config(false);
    limits.limits.udp_flows = 40;
    limits.limits.port.udp_flows = 30;
    limits.limits.new_flows_per_second = 100_000;
    limits.limits.port.new_flows_per_second = 100_000;
    let mut pair = Pair::with(limits, plain_link(), false);
    from_ports(&mut pair, 1, 5000..5005);
    // The flow of port 2000 is a stream.
    from_ports(&mut pair, 0, 2000..2001);
    pair.net.wait(Duration::from_secs(3));
    pair.reply(5, pair.peer, b"y");
    from_ports(&mut pair, 0, 2000..2001);
    from_ports(&mut pair, 0, 1025..1999);
    from_ports(&mut pair, 0, 3000..9000);
    assert_eq!((pair.flows(), pair.net.kernel.open()), (35, 35));
    let of = |pair: &Pair, port, from| {
        let is =
            |flow: &vmring_nat::DatagramFlow| flow.port == Port(port) && flow.guest.port() == from;
        pair.net.nat.datagram_flows().any(|flow| is(&flow))
    };
    assert!(of(&pair, 0, 2000) && of(&pair, 0, 8999) && of(&pair, 1, 5000) && !of(&pair, 0, 3000));
    assert_eq!(pair.counted(Counter::Evicted), 974 + 6000 - 29);
    // The network's limit: a third port gets 5, and then makes way for itself only.
    from_ports(&mut pair, 2, 2000..2010);
    assert_eq!((pair.flows(), of(&pair, 1, 5000), of(&pair, 2, 2009)), (40, true, true));
    from_ports(&mut pair, 3, 2000..2001);
    assert_eq!((pair.flows(), pair.counted(Counter::FlowLimit)), (40, 1));
    let (now, out) = (pair.net.now, &mut pair.net.out);
    pair.net.nat.port_left(Port(0), now, out);
    assert_eq!((pair.flows(), pair.net.kernel.open()), (10, 10));
    pair.net.nat.close(now, &mut pair.net.out);
    pair.net.assert_empty();
}

/// S6: rates and descriptors hold for UDP too, together with TCP's.
#[test]
fn rates_and_descriptors_are_shared_with_tcp() {
    let mut limits = config(false);
    limits.limits.port.new_flows_per_second = 100;
    let mut pair = Pair::with(limits, plain_link(), false);
    from_ports(&mut pair, 0, 2000..2500);
    assert_eq!((pair.flows(), pair.counted(Counter::NewFlowLimit)), (100, 400));
    let mut limits = config(false);
    limits.limits.descriptors = 10;
    let mut pair = Pair::with(limits, plain_link(), false);
    for port in 1..=4 {
        let syn = crate::support::script::Segment { flags: "S".into(), ..Default::default() };
        pair.net.send(&[syn.frame(SocketAddr::new(pair.guest.ip(), port), pair.peer)]);
    }
    from_ports(&mut pair, 0, 2000..2020);
    assert_eq!((pair.net.kernel.open(), pair.flows()), (10, 6));
    assert_eq!(pair.counted(Counter::Evicted), 14);
    let syn = crate::support::script::Segment { flags: "S".into(), ..Default::default() };
    pair.net.send(&[syn.frame(SocketAddr::new(pair.guest.ip(), 9), pair.peer)]);
    assert_eq!((pair.net.kernel.open(), pair.counted(Counter::DescriptorLimit)), (10, 1));
}

/// S6: when the kernel's memory for sockets is used up, new ones get small buffers.
#[test]
fn the_kernels_memory_is_bounded_for_datagrams() {
    let mut limits = config(false);
    limits.limits.kernel_memory = 1 << 20;
    let mut pair = Pair::with(limits, plain_link(), false);
    from_ports(&mut pair, 0, 2000..2005);
    let buffers = |index| pair.net.kernel.with(index, |peer| peer.options.buffers);
    let all: Vec<_> = (0..5).map(buffers).collect();
    assert_eq!(all, [None, None, None, Some(64 << 10), Some(64 << 10)]);
    assert_eq!(pair.counted(Counter::SmallBuffers), 2);
    // One port's own part.
    let mut limits = config(false);
    limits.limits.port.kernel_memory = 1 << 20;
    let mut pair = Pair::with(limits, plain_link(), false);
    from_ports(&mut pair, 0, 2000..2005);
    from_ports(&mut pair, 1, 2000..2001);
    let buffers = |index| pair.net.kernel.with(index, |peer| peer.options.buffers);
    let all: Vec<_> = (0..6).map(buffers).collect();
    let small = Some(64 << 10);
    assert_eq!(all, [None, None, None, small, small, None]);
}

/// A port that takes no frames leaves its datagrams in the kernel, and gets them later.
#[test]
fn datagrams_wait_for_a_port_that_is_full() {
    each(|mut pair| {
        pair.send(b"x");
        pair.net.set_space(0);
        for byte in 0..20 {
            pair.reply(0, pair.peer, &[byte]);
        }
        assert_eq!(pair.net.kernel.with(0, |peer| peer.datagrams.incoming.len()), 20);
        pair.net.set_space(5);
        assert_eq!(pair.got().len(), 5);
        pair.net.out.space = 100;
        pair.net.wait(Duration::from_millis(200));
        assert_eq!(pair.got().len(), 15, "nobody says that there is space");
        assert_eq!(pair.counted(Counter::DatagramRefused), 0);
        // A port whose space is not known may refuse.
        (pair.net.out.tells, pair.net.out.space) = (false, 0);
        pair.reply(0, pair.peer, b"y");
        assert_eq!(pair.counted(Counter::DatagramRefused), 1);
    });
}

/// Section 9, 15 and 16: the gateway is a hop of its own, and the others' are counted from it. Hop limit
/// and DSCP are set when they change.
#[test]
fn hop_limit_and_services_are_the_packets() {
    let mut pair = Pair::new(false);
    let (guest, peer) = (pair.guest, pair.peer);
    let frame = |hop_limit, dscp: u8| {
        let mut frame = udp_frame(guest, peer, &[hop_limit]);
        (frame[22], frame[15]) = (hop_limit, dscp << 2);
        Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        frame
    };
    pair.net.send(&[frame(1, 0)]);
    let got = pair.got();
    let gateway: IpAddr = [192, 168, 64, 1].into();
    assert!(matches!(&got[..], [Got::Icmp { from, kind: 11, code: 0, .. }] if *from == gateway));
    assert_eq!(pair.net.kernel.len(), 0);
    pair.net.send(&[frame(2, 0), frame(2, 0), frame(3, 0), frame(3, 46)]);
    let fields: Vec<_> =
        pair.net.kernel.sent(0).iter().map(|s| (s.bytes.clone(), s.ip_fields.unwrap())).collect();
    let expected =
        [(vec![2, 2], (1, 0)), (vec![3], (2, 0)), (vec![3], (2, 46))].map(|(b, f)| (b, f));
    assert_eq!(fields, expected);
    let mut pair = Pair::new(true);
    let mut frame = udp_frame(pair.guest, pair.peer, b"x");
    frame[21] = 5;
    (frame[14], frame[15]) = (0x6b, 0x80);
    pair.net.send(&[frame]);
    assert_eq!(pair.net.kernel.sent(0)[0].ip_fields, Some((4, 46)));
}

/// Echo: the guest's identifier comes back although the system chooses another, and only from whom it was
/// asked.
#[test]
fn an_echo_request_is_answered() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest.ip(), pair.peer.ip());
        let v4 = guest.is_ipv4();
        let request = echo_request(guest, peer, 0x1234, 7, b"payload");
        pair.net.send(&[request]);
        let sent = pair.net.kernel.sent(0);
        assert_eq!(sent[0].bytes[0], if v4 { 8 } else { 128 });
        assert_eq!((&sent[0].bytes[6..8], &sent[0].bytes[8..]), (&[0, 7][..], &b"payload"[..]));
        let reply = if v4 { 0 } else { 129 };
        let message = |kind: u8| [&[kind, 0, 0xaa, 0xbb, 9, 9, 0, 7][..], b"payload"].concat();
        pair.reply(0, SocketAddr::new(peer, 0), &message(reply));
        let got = pair.got();
        let [Got::Icmp { from, to, kind, message: m, .. }] = &got[..] else { panic!("{got:?}") };
        assert_eq!((*from, *to, *kind), (peer, guest, reply));
        assert_eq!(m[4..], [&[0x12, 0x34, 0, 7][..], b"payload"].concat());
        // Neither what is no reply, nor what is cut short, nor another's.
        pair.reply(0, SocketAddr::new(peer, 0), &message(3));
        pair.reply(0, SocketAddr::new(peer, 0), &message(reply)[..7]);
        let mut with_code = message(reply);
        with_code[1] = 1;
        pair.reply(0, SocketAddr::new(peer, 0), &with_code);
        let other = if v4 { "192.0.2.9:0" } else { "[2001:db8::9]:0" };
        pair.reply(0, other.parse().unwrap(), &message(reply));
        assert_eq!((pair.got(), pair.counted(Counter::IcmpType)), (vec![], 3));
        assert_eq!(pair.counted(Counter::NotAsked), 1);
        // A long one comes in fragments.
        let long = [&[reply, 0, 0, 0, 9, 9, 0, 8][..], &[5; 8000]].concat();
        pair.reply(0, SocketAddr::new(peer, 0), &long);
        let got = pair.got();
        assert!(matches!(&got[..], [Got::Icmp { message, .. }] if message.len() == 8008));
        assert!(pair.receiver.fragment_count >= 6);
        // Another identifier is another flow, and both end after a minute.
        pair.net.send(&[echo_request(guest, peer, 0x1235, 1, b"")]);
        assert_eq!(pair.net.nat.datagram_flows().count(), 2);
        assert!(pair.net.nat.datagram_flows().all(|flow| flow.protocol == Protocol::IcmpEcho));
        pair.net.wait(Duration::from_secs(59));
        assert_eq!(pair.flows(), 2);
        pair.net.wait(Duration::from_secs(2));
        pair.net.assert_empty();
    });
}

/// macOS gives the IP header in front of a reply.
#[test]
fn an_ip_header_in_front_of_a_reply_is_skipped() {
    let mut pair = Pair::new(false);
    let peer = pair.peer.ip();
    pair.net.send(&[echo_request(pair.guest.ip(), peer, 1, 1, b"payload")]);
    let header = [0x45, 0, 0, 35, 0, 0, 0, 0, 64, 1, 0, 0, 192, 0, 2, 1, 192, 0, 2, 7];
    let reply = [&header[..], &[0, 0, 0, 0, 9, 9, 0, 1], b"payload"].concat();
    pair.reply(0, SocketAddr::new(peer, 0), &reply);
    let got = pair.got();
    assert!(
        matches!(&got[..], [Got::Icmp { message, .. }] if message.ends_with(b"\0\x01\0\x01payload"))
    );
}

/// What a guest sends of ICMP and is no echo request is dropped, and counted.
#[test]
fn other_messages_of_icmp_are_refused() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest.ip(), pair.peer.ip());
        let at = if guest.is_ipv4() { 34 } else { 54 };
        // A reply, a redirect or a packet too big, and a code that no request has.
        for (kind, code) in [(if guest.is_ipv4() { 0 } else { 129 }, 0), (5, 1), (8, 1), (128, 1)] {
            let mut frame = echo_request(guest, peer, 1, 1, b"x");
            (frame[at], frame[at + 1]) = (kind, code);
            pair.net.send(&[frame]);
        }
        assert_eq!((pair.counted(Counter::IcmpType), pair.net.kernel.len()), (4, 0));
        // A message of the other family's protocol.
        let mut frame = echo_request(guest, peer, 1, 1, b"x");
        if guest.is_ipv4() {
            frame[23] = 58;
            Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        } else {
            frame[20] = 1;
        }
        pair.net.send(&[frame]);
        assert_eq!((pair.counted(Counter::Protocol), pair.net.kernel.len()), (1, 0));
    });
}

/// M3: where the system gives no sockets for echo, the guest is told, and nothing pretends to answer.
#[test]
fn echo_that_the_system_forbids_is_refused() {
    each(|pair| {
        {
            let capabilities = &mut pair.net.kernel.0.borrow_mut().capabilities;
            (capabilities.echo_v4, capabilities.echo_v6) = (false, false);
        }
        let mut pair = Pair { net: remake(&pair.net), ..pair };
        let request = echo_request(pair.guest.ip(), pair.peer.ip(), 1, 1, b"x");
        pair.net.send(&[request.clone(), request]);
        let prohibited = if pair.guest.is_ipv4() { (3, 13) } else { (1, 1) };
        let got = pair.got();
        assert!(matches!(&got[..], [Got::Icmp { kind, code, .. }] if (*kind, *code) == prohibited));
        assert_eq!((pair.counted(Counter::EchoForbidden), pair.net.kernel.len()), (2, 0));
        // UDP goes on.
        pair.send(b"x");
        assert_eq!(pair.net.kernel.sent(0).len(), 1);
    });
}

/// An error that an echo request meets names the guest's identifier: a hop of `traceroute -I`.
#[test]
fn an_echo_requests_error_names_its_identifier() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest.ip(), pair.peer.ip());
        pair.net.send(&[echo_request(guest, peer, 0x1234, 7, b"payload")]);
        let icmp = Some(if guest.is_ipv4() { (11, 0) } else { (3, 0) });
        let to = SocketAddr::new(peer, 0);
        let offender = Some(if guest.is_ipv4() { "203.0.113.9" } else { "2001:db8:9::9" });
        let offender = offender.map(|text| text.parse().unwrap());
        let error = DatagramError { icmp, offender, to, quoted: 0 };
        pair.net.kernel.datagram_error(0, error, &[8, 0, 1, 2, 9, 9, 0, 7]);
        pair.net.settle();
        let got = pair.got();
        let [Got::Icmp { from, message, .. }] = &got[..] else { panic!("{got:?}") };
        assert_eq!(Some(*from), offender);
        assert!(message.ends_with(&[0x12, 0x34, 0, 7]));
    });
}

/// A traceroute with SYN: its hop limit is the connection's, and the guest sees which hop has dropped it.
/// Another SYN's hop limit is the system's.
#[test]
fn a_syn_of_a_traceroute_shows_its_hop() {
    each(|mut pair| {
        let (guest, peer) = (pair.guest, pair.peer);
        let v4 = guest.is_ipv4();
        let syn = crate::support::script::Segment { flags: "S".into(), ..Default::default() };
        let mut frame = syn.frame(guest, peer);
        pair.net.send(&[frame.clone()]);
        assert_eq!(pair.net.kernel.with(0, |peer| peer.options.hop_limit), None);
        let port_at = if v4 { 34 } else { 54 };
        frame[port_at + 1] ^= 1;
        frame[if v4 { 22 } else { 21 }] = 3;
        if v4 {
            Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        }
        pair.net.send(&[frame]);
        assert_eq!(pair.net.kernel.with(1, |peer| peer.options.hop_limit), Some(2));
        let router: IpAddr = if v4 { "203.0.113.9" } else { "2001:db8:9::9" }.parse().unwrap();
        let icmp = Some(if v4 { (11, 0) } else { (3, 0) });
        let error = DatagramError { icmp, offender: Some(router), to: peer, quoted: 0 };
        pair.net.kernel.with(1, |peer| peer.datagrams.errors.push_back((error, Vec::new())));
        pair.net.kernel.connect(1, Err(SocketError::HostUnreachable));
        pair.net.settle();
        let got = pair.got();
        let [Got::Icmp { from, kind, code, .. }] = &got[..] else { panic!("{got:?}") };
        assert_eq!((*from, Some((*kind, *code))), (router, icmp));
        assert_eq!(quoted_ports(&got), [(guest.port() ^ 1, peer.port())]);
    });
}

/// What the system refuses when a flow is opened is counted by its reason, and the guest is told.
#[test]
fn refusals_of_the_system_are_told_apart() {
    use SocketError as E;
    let (net, host, prohibited) = ([(3, 0), (1, 0)], [(3, 1), (1, 3)], [(3, 13), (1, 1)]);
    for (error, counter, told) in [
        (E::NetworkUnreachable, Counter::ConnectUnreachable, net),
        (E::HostUnreachable, Counter::ConnectUnreachable, host),
        (E::TimedOut, Counter::ConnectTimedOut, host),
        (E::Denied, Counter::ConnectDenied, prohibited),
        (E::NoDescriptor, Counter::NoDescriptor, host),
        (E::NoMemory, Counter::NoMemory, host),
        (E::NoAddress, Counter::NoPort, host),
        (E::Other(7), Counter::OtherError, host),
    ] {
        for v6 in [false, true] {
            let mut pair = Pair::new(v6);
            pair.net.kernel.0.borrow_mut().failure = Some(error);
            pair.send(b"x");
            let got = pair.got();
            let [Got::Icmp { kind, code, .. }] = &got[..] else { panic!("{error:?}: {got:?}") };
            assert_eq!((*kind, *code), told[usize::from(v6)], "{error:?}");
            assert_eq!((pair.counted(counter), pair.flows()), (1, 0), "{error:?}");
            // It succeeds later.
            pair.net.kernel.0.borrow_mut().failure = None;
            pair.send(b"x");
            assert_eq!((pair.counted(Counter::UdpOpened), pair.flows()), (1, 1));
        }
    }
}

/// An error quotes as much as fits into the least MTU (RFC 1812, 4.3.2.3; RFC 4443, 2.4 c), and a link-local
/// source is told that it leads nowhere from its link. No error is about an error or a redirect.
#[test]
fn errors_have_their_form() {
    for (v6, peer, len) in
        [(false, "169.254.169.254:53", 576 - 20), (true, "[fd00::99]:53", 1280 - 40)]
    {
        let mut pair = Pair::new(v6);
        pair.peer = peer.parse().unwrap();
        pair.send(&[7; 1400]);
        let got = pair.got();
        let [Got::Icmp { message, .. }] = &got[..] else { panic!("{got:?}") };
        assert_eq!(message.len(), len);
        // A message that gets an error, and others of ICMP, which do not.
        let (at, hops) = if v6 { (54, 21) } else { (34, 22) };
        let kinds: &[u8] = if v6 { &[128, 1, 127, 137] } else { &[8, 3, 4, 5, 11, 12] };
        for &kind in kinds {
            let mut frame = echo_request(pair.guest.ip(), Pair::new(v6).peer.ip(), 1, 1, b"x");
            (frame[at], frame[hops]) = (kind, 1);
            if !v6 {
                Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
            }
            pair.net.send(&[frame]);
            assert_eq!(pair.got().len(), usize::from(kind == kinds[0]), "{kind}");
        }
    }
    let mut pair = Pair::new(true);
    pair.guest = "[fe80::5]:4000".parse().unwrap();
    pair.send(b"x");
    assert!(matches!(&pair.got()[..], [Got::Icmp { kind: 1, code: 2, .. }]));
}

/// All errors that a socket has are told with its readiness, and each once.
#[test]
fn each_error_is_told_once() {
    each(|mut pair| {
        pair.send(b"x");
        let icmp = Some(if pair.guest.is_ipv4() { (3, 1) } else { (1, 3) });
        let error = DatagramError { icmp, offender: None, to: pair.peer, quoted: 0 };
        for _ in 0..2 {
            let errors = |p: &mut crate::support::kernel::Peer| {
                p.datagrams.errors.push_back((error, b"x".into()));
            };
            pair.net.kernel.with(0, errors);
        }
        pair.net.kernel.datagram_error(0, error, b"x");
        pair.net.settle();
        assert_eq!((pair.got().len(), pair.counted(Counter::ErrorsPassed)), (3, 3));
        // A call that fails because of an error tells of it, and the error is no second one.
        pair.net.kernel.with(0, |p| {
            p.datagrams.errors.push_back((error, b"x".into()));
            p.datagrams.failures.push_back(SocketError::HostUnreachable);
        });
        pair.send(b"y");
        assert_eq!((pair.got().len(), pair.counted(Counter::ConnectUnreachable)), (1, 0));
    });
}

/// A socket that has more than one turn takes is read to its end, although it says so once.
#[test]
fn a_full_socket_is_read_to_its_end() {
    let mut pair = Pair::new(false);
    pair.send(b"x");
    for _ in 0..2 {
        let one = vmring_nat::Incoming { len: 1, from: pair.peer, segment: 0, to: None };
        pair.net.kernel.with(0, |p| {
            p.datagrams.incoming.extend((0..2000).map(|_| (one, vec![7])));
        });
        pair.reply(0, pair.peer, b"y");
        assert_eq!(pair.got().len(), 2001);
    }
}

/// A port that takes nothing for long is looked at again and again, and a port of the host that a flow has
/// given back is kept again.
#[test]
fn a_port_is_looked_at_until_it_takes_frames() {
    each(|mut pair| {
        pair.send(b"x");
        pair.net.out.space = 0;
        pair.reply(0, pair.peer, b"y");
        pair.net.wait(Duration::from_secs(1));
        pair.net.out.space = usize::MAX;
        pair.net.wait(Duration::from_millis(200));
        assert_eq!(pair.got().len(), 1);
        pair.net.wait(Duration::from_secs(130));
        assert_eq!(pair.flows(), 0);
        pair.send(b"x");
        assert_eq!(pair.net.kernel.with(1, |peer| peer.datagrams.port), 4000);
    });
}

/// Each fragmented datagram has an identification of its own, and may be cut further on its way. When one
/// fragment is refused, the others are worth nothing.
#[test]
fn fragments_belong_to_their_datagram() {
    let mut pair = Pair::new(false);
    pair.send(b"x");
    for _ in 0..2 {
        pair.reply(0, pair.peer, &[1; 2000]);
    }
    let frames: Vec<_> = pair.net.out.frames.drain(..).map(|(frame, _)| frame).collect();
    let ids: Vec<_> = frames.iter().map(|frame| [frame[18], frame[19]]).collect();
    assert!(ids.len() == 4 && ids[0] == ids[1] && ids[2] == ids[3] && ids[1] != ids[2], "{ids:?}");
    assert!(frames.iter().all(|frame| frame[20] & 0x40 == 0), "do not fragment");
    (pair.net.out.tells, pair.net.out.space) = (false, 1);
    pair.reply(0, pair.peer, &[1; 9000]);
    assert_eq!((pair.counted(Counter::OutputFull), pair.counted(Counter::DatagramRefused)), (1, 1));
}
