//! Ports with different offloads on one network: each gets what its own offloads leave, and nobody gets
//! anything that he did not negotiate.
#![cfg(not(loom))]

mod common;
#[path = "common/form.rs"]
mod form;

use core::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use form::*;
use macaddr::MacAddr6;
use vmring_core::offload::{Checksum, Gso, LEN, OffloadHeader, Offloads};
use vmring_embedded::limits::SEGMENTS_PER_PACKET;
use vmring_embedded::software::{self, Left};
use vmring_embedded::{
    Accepted, DropReason, Network, NetworkConfig, Packet, Port, PortConfig, PortLimits, PortPolicy,
    Rate, RateLimit, Receiver, Sender, Sent, SourceRule,
};

struct Station {
    receiver: Receiver<Buffer>,
    sender: Sender<Buffer>,
    mac: MacAddr6,
    offloads: Offloads,
    size: usize,
}

impl Station {
    fn join(network: &Arc<Network<Buffer>>, id: u64, set: u32) -> Self {
        Self::with(network, PortConfig { offloads: offloads(set), ..config(id) })
    }

    fn with(network: &Arc<Network<Buffer>>, config: PortConfig) -> Self {
        let port: Port<Buffer> = network.join(config).unwrap();
        let offloads = port.offloads();
        let header = if offloads.virtio_header { LEN } else { 0 };
        let (mac, size) = (port.mac(), header + port.max_packet_size());
        let (mut receiver, sender) = port.split();
        assert!(receiver.post(vec![0; size - 1]).is_err());
        for _ in 0..256 {
            receiver.post(vec![0xee; size]).unwrap();
        }
        Self { receiver, sender, mac, offloads, size }
    }

    /// All that has arrived, each with the header that it had or would have.
    fn receive(&mut self) -> Vec<(Vec<u8>, OffloadHeader)> {
        let mut packets = Vec::new();
        while let Some((buffer, len)) = self.receiver.collect() {
            let at = if self.offloads.virtio_header { LEN } else { 0 };
            let header = match at {
                0 => OffloadHeader { num_buffers: 1, ..OffloadHeader::NONE },
                _ => OffloadHeader::parse(buffer.first_chunk().unwrap()).unwrap(),
            };
            packets.push((buffer[at..at + len].to_vec(), header));
            self.receiver.post(vec![0xee; self.size]).unwrap();
        }
        packets
    }

    /// The frames that a receiver without offload would have seen. Checks that nothing needs more work
    /// than this station does.
    fn frames(&mut self) -> Vec<Vec<u8>> {
        let received = self.receive();
        let finish = |(packet, header): (Vec<u8>, OffloadHeader)| {
            assert_eq!(header.num_buffers, 1);
            assert_eq!(software::left_by(&self.offloads, &header), Left::Nothing, "{header:?}");
            if header.is_plain() { vec![packet] } else { finished(&packet, &header) }
        };
        received.into_iter().flat_map(finish).collect()
    }

    fn send(&mut self, packet: &[u8], header: &OffloadHeader) -> Sent {
        let sent = self.sender.send_packet(Packet::from(packet).with_offload(header));
        self.sender.flush();
        sent
    }
}

fn network() -> Arc<Network<Buffer>> {
    Network::new(NetworkConfig { overflow_depth: Some(256), ..NetworkConfig::default() }).unwrap()
}

/// Goal: whatever the offloads of two ports, the receiver gets what it negotiated, and what a receiver
/// without offload must see comes out of it, in order and complete. Method: a port of each of the 16
/// sets, random packets from each to each and to all, and `software` on the whole packet beside it.
#[test]
fn every_set_of_offloads_talks_to_every_other() {
    let network = network();
    let limits = PortLimits { flood: None, ..PortLimits::default() };
    let policy = PortPolicy { limits, ..PortPolicy::default() };
    let join = |set: u32| {
        let config = PortConfig { offloads: offloads(set), policy, ..config(set.into()) };
        Station::with(&network, config)
    };
    let mut stations: Vec<_> = (0..16).map(join).collect();
    let random = &mut Random(5);
    let mut asked = 0;
    for number in 0..3000 {
        let (from, to) = (random.below(16), random.below(16));
        if from == to {
            continue;
        }
        let form = Form::random(random);
        let to_all = random.below(20) == 0;
        let destination =
            if to_all { MacAddr6::new(1, 0, 0x5e, 0, 0, 1) } else { stations[to].mac };
        let (packet, header) = form.build(destination, stations[from].mac, number);
        let sent = stations[from].send(&packet, &header);
        if software::left_by(&stations[from].offloads, &header) != Left::Nothing {
            assert_eq!(sent, Sent::Dropped(DropReason::BadOffload), "it was not negotiated");
            assert!(stations.iter_mut().all(|station| station.frames().is_empty()));
            continue;
        }
        asked += 1;
        let expected = finished(&packet, &header);
        for (index, station) in stations.iter_mut().enumerate() {
            let gets_it = index != from && (to_all || index == to);
            let frames = station.frames();
            let wanted = if gets_it { &expected[..] } else { &[] };
            assert!(frames == wanted, "{form:?} from {from} to {index}");
        }
        let right = if to_all { Sent::Flooded { reached: 15 } } else { Sent::Forwarded };
        assert_eq!(sent, right);
    }
    assert!(asked > 500, "{asked}");
    let stats: Vec<_> = stations.iter().map(|station| station.receiver.stats()).collect();
    assert!(stats[15].cut_in_software > 20 && stats[15].completed_in_software > 20);
    assert!(stats.iter().all(|stats| stats.missed_no_buffer == 0 && stats.dropped_too_big == 0));
    assert_eq!(stats[0].cut_in_software + stats[0].completed_in_software, 0);
}

const LARGE: Form =
    Form { v4: true, tcp: true, tagged: false, payload: 65_495, segment: Some(1460) };

/// Goal: the longest packet there is passes uncut between ports that both cut, and one that is longer,
/// or whose segments are longer than a frame of the network, is refused and counted.
#[test]
fn a_packet_of_64_kib_passes_and_a_longer_one_does_not() {
    let network = network();
    let mut alice = Station::join(&network, 1, ALL);
    let mut bob = Station::join(&network, 2, ALL);
    let mut carol = Station::join(&network, 3, 0);
    let large = |form: Form, to: &Station, from: &Station| form.build(to.mac, from.mac, 0);
    for tagged in [false, true] {
        let form = Form { tagged, ..LARGE };
        let (packet, header) = large(form, &bob, &alice);
        assert_eq!(packet.len(), 65_549 + if tagged { 4 } else { 0 });
        assert_eq!(alice.send(&packet, &header), Sent::Forwarded);
        let received = bob.receive();
        assert_eq!(received, [(packet, OffloadHeader { num_buffers: 1, ..header })]);
        let (packet, header) = large(form, &carol, &alice);
        assert_eq!(alice.send(&packet, &header), Sent::Forwarded);
        assert_eq!(carol.frames(), finished(&packet, &header));
        // With a longer packet the IP length would be wrong too, and the length is looked at first.
        let (packet, header) = large(form, &bob, &alice);
        let longer = [&packet[..], &[0]].concat();
        assert_eq!(alice.send(&longer, &header), Sent::Dropped(DropReason::TooBig));
        let (packet, header) = large(Form { segment: Some(1461), ..form }, &bob, &alice);
        assert_eq!(alice.send(&packet, &header), Sent::Dropped(DropReason::TooBig));
    }
    let stats = alice.receiver.stats();
    assert_eq!((stats.dropped_too_big, stats.cut_in_software), (4, 2));
    assert_eq!((stats.sent_packets, stats.dropped_bad_offload), (4, 0));
}

/// Goal: what is hostile costs its packet, is counted by its reason, and reaches nobody.
#[test]
fn hostile_headers_cost_their_packet() {
    let network = network();
    let mut alice = Station::join(&network, 1, ALL);
    let mut bob = Station::join(&network, 2, 0);
    let mut carol = Station::join(&network, 3, ALL);
    let (packet, header) = Form { payload: 4000, ..LARGE }.build(bob.mac, alice.mac, 0);
    let Checksum::Partial { start, offset } = header.checksum else { panic!("it is partial") };
    let partial = |start, offset| OffloadHeader {
        checksum: Checksum::Partial { start, offset },
        gso: Gso::None,
        segment_size: 0,
        ..header
    };
    let short = &packet[..100];
    let cases = [
        (short, partial(13, 2), DropReason::BadOffload),
        (short, partial(99, 0), DropReason::BadOffload),
        // Nobody may write into the IP header.
        (short, partial(14, 10), DropReason::BadOffload),
        (short, partial(33, 0), DropReason::BadOffload),
        (&packet, OffloadHeader { segment_size: 0, ..header }, DropReason::BadOffload),
        (&packet, OffloadHeader { header_len: 9999, ..header }, DropReason::BadOffload),
        (&packet, OffloadHeader { ecn: true, gso: Gso::UdpL4, ..header }, DropReason::BadOffload),
        (&packet, OffloadHeader { gso: Gso::Udp, ..partial(start, 6) }, DropReason::BadOffload),
        (&packet, OffloadHeader { checksum: Checksum::Complete, ..header }, DropReason::BadOffload),
        (&packet, OffloadHeader { segment_size: 2, ..header }, DropReason::NotSegmentable),
        (&packet, OffloadHeader { gso: Gso::TcpV6, ..header }, DropReason::NotSegmentable),
        (
            &packet,
            OffloadHeader {
                checksum: Checksum::Partial { start: start + 1, offset },
                segment_size: 1000,
                ..header
            },
            DropReason::NotSegmentable,
        ),
    ];
    for (bytes, header, reason) in cases {
        assert_eq!(alice.send(bytes, &header), Sent::Dropped(reason), "{header:?}");
        assert!(bob.receive().is_empty() && carol.receive().is_empty());
    }
    // A port without offload leaves no work to others.
    let (asking, _) = Form { payload: 80, segment: None, ..LARGE }.build(carol.mac, bob.mac, 0);
    let reason = Sent::Dropped(DropReason::BadOffload);
    assert_eq!(bob.send(&asking, &partial(start, offset)), reason);
    let stats = alice.receiver.stats();
    assert_eq!((stats.dropped_bad_offload, stats.dropped_not_segmentable), (9, 3));
    assert_eq!((stats.drops(), bob.receiver.stats().dropped_bad_offload), (12, 1));
    // To all: nobody can take it, which is counted for each that cannot.
    let (mut packet, header) =
        Form { payload: 4000, ..LARGE }.build(MacAddr6::broadcast(), alice.mac, 0);
    packet[20] |= 0x20; // more fragments
    assert_eq!(alice.send(&packet, &header), Sent::Flooded { reached: 1 });
    // The gateway and bob, and carol cuts it herself.
    assert_eq!(alice.receiver.stats().dropped_not_segmentable, 5);
}

/// Goal: of a header that leaves no work, nothing reaches the receiver.
#[test]
fn a_header_that_leaves_no_work_is_not_passed_on() {
    let network = network();
    let mut alice = Station::join(&network, 1, ALL);
    let mut bob = Station::join(&network, 2, ALL);
    let frame = data(bob.mac, alice.mac, &[1; 60]);
    for checksum in [Checksum::Complete, Checksum::DataValid] {
        let header = OffloadHeader {
            checksum,
            gso: Gso::None,
            ecn: true,
            segment_size: 0xffff,
            header_len: 9999,
            num_buffers: 7,
        };
        assert_eq!(alice.send(&frame, &header), Sent::Forwarded);
        let plain = OffloadHeader { num_buffers: 1, ..OffloadHeader::NONE };
        assert_eq!(bob.receive(), [(frame.clone(), plain)]);
    }
}

/// Goal: completing a checksum forges nothing that the network has looked at. Method: ARP packets of a
/// bound port whose header asks for a sum in the sender's address, or in the EtherType behind a tag.
#[test]
fn a_checksum_changes_nothing_that_was_decided_by() {
    let network = network();
    let policy = PortPolicy { source: SourceRule::Fixed, ..PortPolicy::default() };
    let config = PortConfig { offloads: offloads(ALL), policy, ..config(1) };
    let mut alice = Station::with(&network, config);
    let mut bob = Station::join(&network, 2, 0);
    let plain = arp_request(alice.mac, SHARED, SHARED);
    let mut tagged = plain.clone();
    tagged.splice(12..14, [0x81, 0, 0, 0, 8, 0]);
    tagged.resize(100, 0);
    for (frame, start, offset) in
        [(&plain, 14, 8), (&plain, 34, 0), (&tagged, 14, 2), (&tagged, 37, 0)]
    {
        let header =
            OffloadHeader { checksum: Checksum::Partial { start, offset }, ..OffloadHeader::NONE };
        assert_eq!(alice.send(frame, &header), Sent::Dropped(DropReason::BadOffload), "{start}");
        assert!(bob.receive().is_empty());
    }
    assert!(matches!(alice.send(&plain, &OffloadHeader::NONE), Sent::Flooded { .. }));
    assert_eq!(bob.receive().len(), 1);
}

/// Goal: the gateway answers a packet whose checksum was left to others, and one that was cut.
#[test]
fn the_gateway_gets_complete_packets() {
    let network = network();
    let gateway = network.gateway().unwrap();
    let mut alice = Station::join(&network, 1, ALL);
    let form = Form { tcp: false, payload: 100, segment: None, ..LARGE };
    let (mut packet, header) = form.build(gateway.mac(), alice.mac, 0);
    // From 192.168.64.9 to the gateway: nobody listens there.
    let finish_ip = |packet: &mut Vec<u8>| {
        packet[26..34].copy_from_slice(&[192, 168, 64, 9, 192, 168, 64, 1]);
        packet[24..26].fill(0);
        let sum: u32 =
            packet[14..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        packet[24..26].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    };
    // The sum of the pseudo header.
    let pseudo = |packet: &mut Vec<u8>, protocol: u32, field: usize| {
        let words = packet[26..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
        let sum = words.sum::<u32>() + protocol + (packet.len() - 34) as u32;
        let sum = (sum & 0xffff) + (sum >> 16);
        packet[34 + field..][..2].copy_from_slice(&(sum as u16).to_be_bytes());
    };
    finish_ip(&mut packet);
    pseudo(&mut packet, 17, 6);
    assert_eq!(alice.send(&packet, &header), Sent::Gateway);
    assert_eq!(gateway.stats().refused_udp, 1, "{:?}", gateway.stats());
    let answer = alice.receive();
    assert_eq!((answer.len(), answer[0].1.is_plain()), (1, true));

    let (mut packet, header) = Form { payload: 3000, ..LARGE }.build(gateway.mac(), alice.mac, 0);
    finish_ip(&mut packet);
    pseudo(&mut packet, 6, 16);
    assert_eq!(alice.send(&packet, &header), Sent::Gateway);
    assert_eq!(gateway.stats().refused_tcp, 3, "one for each segment");
    let stats = alice.receiver.stats();
    assert_eq!((stats.completed_in_software, stats.cut_in_software), (1, 1));
    assert_eq!((stats.sent_to_gateway, stats.drops()), (4, 0));
}

/// Goal: a port cannot send more segments than its limit of packets allows, nor receive more, whoever
/// cuts them.
#[test]
fn limits_count_segments() {
    let network = network();
    let rate = |burst| {
        let number = |n| NonZeroU64::new(n).unwrap();
        Some(Rate { per_second: number(1), burst: number(burst) })
    };
    let limited = |send, receive| {
        let of = |packets| RateLimit { packets, bytes: None };
        let limits = PortLimits { send: of(send), receive: of(receive), flood: rate(100) };
        PortPolicy { limits, ..PortPolicy::default() }
    };
    let join = |id, set, policy| {
        Station::with(&network, PortConfig { offloads: offloads(set), policy, ..config(id) })
    };
    let mut alice = join(1, ALL, limited(rate(100), None));
    let bob = join(2, ALL, PortPolicy::default());
    // 45 segments.
    let (packet, header) = LARGE.build(bob.mac, alice.mac, 0);
    assert_eq!(finished(&packet, &header).len(), 45);
    let sent: Vec<_> = (0..3).map(|_| alice.send(&packet, &header)).collect();
    let over = Sent::Dropped(DropReason::SendLimit);
    assert_eq!(sent, [Sent::Forwarded, Sent::Forwarded, over]);

    let mut dave = join(4, ALL, PortPolicy::default());
    for (id, set) in [(5, ALL), (6, 1)] {
        let mut carol = join(id, set, limited(None, rate(100)));
        let (packet, header) = LARGE.build(carol.mac, dave.mac, 0);
        for _ in 0..3 {
            dave.send(&packet, &header);
        }
        let frames = carol.frames().len();
        assert_eq!(
            (frames, carol.receiver.stats().missed_receive_limit > 0),
            (if set == ALL { 90 } else { 100 }, true)
        );
    }
    let mut erin = join(7, ALL, limited(None, None));
    let (packet, header) = LARGE.build(MacAddr6::new(1, 0, 0x5e, 0, 0, 1), erin.mac, 0);
    let sent: Vec<_> = (0..3).map(|_| erin.send(&packet, &header)).collect();
    assert_eq!(sent[2], Sent::Dropped(DropReason::FloodLimit));
    assert!(matches!(sent[1], Sent::Flooded { .. }));
    let (packet, header) = Form { segment: Some(40), ..LARGE }.build(bob.mac, dave.mac, 0);
    assert!(packet.len() / 40 > SEGMENTS_PER_PACKET);
    assert_eq!(dave.send(&packet, &header), Sent::Dropped(DropReason::NotSegmentable));
}

/// Goal: a place of the network serves ports of all kinds one after the other.
#[test]
fn a_place_serves_ports_of_every_kind_in_turn() {
    let network = network();
    let mut alice = Station::join(&network, 1, ALL);
    for round in 0..3 {
        for set in 0..16 {
            let mut bob = Station::join(&network, 2, set);
            let (packet, header) = LARGE.build(bob.mac, alice.mac, round);
            assert_eq!(alice.send(&packet, &header), Sent::Forwarded);
            assert_eq!(bob.frames(), finished(&packet, &header));
            assert_eq!(network.ports(), 2);
        }
    }
    let config = NetworkConfig::default();
    assert!(config.max_packet_size() < 65_553);
}

/// Goal: a receiver that accepts less than its port has gets that and no more, in buffers that need not
/// be larger, and the port sends as before. Method: each set of offloads, with and without ECN, one after
/// the other on one port; random packets beside `software` on the whole packet.
#[test]
fn a_receiver_gets_no_more_than_it_accepts() {
    let network = network();
    let mut alice = Station::join(&network, 1, ALL);
    let port: Port<Buffer> =
        network.join(PortConfig { offloads: offloads(ALL), ..config(2) }).unwrap();
    let mac = port.mac();
    let (mut bob, mut bob_sends) = port.split();
    let random = &mut Random(9);
    for turn in 0..64 {
        let mut accepted = Accepted::new(offloads(turn % 16));
        accepted.ecn = turn / 16 % 2 == 0;
        bob.accept(accepted);
        let now = bob.offloads();
        assert!(now.virtio_header, "the header stays");
        let checksum = turn & 1 != 0;
        assert_eq!((now.checksum, now.tso4), (checksum, checksum && turn & 2 != 0));
        let is_cut = !(now.tso4 || now.tso6 || now.uso);
        let size = if is_cut { network.max_packet_size() } else { 65_553 };
        assert_eq!(bob.max_packet_size(), size);
        assert!(bob.post(vec![0; LEN + size - 1]).is_err());
        for _ in 0..64 {
            bob.post(vec![0xee; LEN + size]).unwrap();
        }
        for number in 0..20 {
            let form = Form::random(random);
            let (packet, mut header) = form.build(mac, alice.mac, number);
            header.ecn = header.gso.is_tcp() && random.below(2) == 0;
            assert_eq!(alice.send(&packet, &header), Sent::Forwarded);
            let mut frames = Vec::new();
            while let Some((buffer, len)) = bob.collect() {
                let header = OffloadHeader::parse(buffer.first_chunk().unwrap()).unwrap();
                assert_eq!(software::left_by(&now, &header), Left::Nothing, "{header:?}");
                assert!(accepted.ecn || !header.ecn, "{header:?}");
                let packet = &buffer[LEN..LEN + len];
                match header.is_plain() {
                    true => frames.push(packet.to_vec()),
                    false => frames.extend(finished(packet, &header)),
                }
                bob.post(vec![0xee; LEN + size]).unwrap();
            }
            assert_eq!(frames, finished(&packet, &header), "{accepted:?} {form:?}");
        }
        // What the port leaves to others has not changed.
        let (packet, header) = LARGE.build(alice.mac, mac, 0);
        let packet = Packet::from(&*packet).with_offload(&header);
        assert_eq!(bob_sends.send_packet(packet), Sent::Forwarded);
        bob_sends.flush();
        assert_eq!(alice.frames().len(), 45);
        while bob.posted() > 0 {
            bob.recall(drop);
        }
    }
    assert_eq!(bob.stats().drops() + alice.receiver.stats().drops(), 0);
}

/// Goal: a change keeps what waits and is still accepted, in its order, and counts the rest.
#[test]
fn what_waits_stays_if_it_is_accepted() {
    // The inbox stays the same, or another one takes its place.
    for (before, after) in [(ALL, 1 | 2), (ALL, 1), (ALL, 0), (1, 0)] {
        let network = network();
        let mut alice = Station::join(&network, 1, ALL);
        let config = PortConfig { offloads: offloads(before), ..config(2) };
        let port: Port<Buffer> = network.join(config).unwrap();
        let mac = port.mac();
        let (mut bob, _sends) = port.split();
        let mut expected = Vec::new();
        let mut lost = 0;
        for number in 0..30 {
            let form = match number % 3 {
                0 => Form { v4: true, tcp: true, tagged: false, payload: 20, segment: None },
                1 => Form { v4: number % 2 == 0, payload: 3000, segment: Some(1000), ..LARGE },
                _ => Form { tcp: false, payload: 700, segment: None, ..LARGE },
            };
            let (packet, header) = form.build(mac, alice.mac, number);
            let header = if number % 6 == 0 { OffloadHeader::NONE } else { header };
            let at_first = software::left_by(&bob.offloads(), &header) == Left::Nothing;
            assert_eq!(alice.send(&packet, &header), Sent::Forwarded);
            let mut accepted = offloads(after);
            accepted.virtio_header = true;
            if !at_first {
                // The sender has done the work.
                continue;
            }
            match software::left_by(&accepted, &header) {
                Left::Nothing => expected.push(packet),
                _ => lost += 1,
            }
        }
        let done = bob.stats().missed_closed;
        bob.accept(Accepted::new(offloads(after)));
        let lost_by_change = bob.stats().missed_closed - done;
        let mut seen = Vec::new();
        loop {
            let _ = bob.post(vec![0; LEN + bob.max_packet_size()]);
            let Some((buffer, len)) = bob.collect() else { break };
            seen.push(buffer[LEN..LEN + len].to_vec());
        }
        if before == ALL {
            assert_eq!((seen, lost_by_change), (expected, lost), "{before} {after}");
        } else {
            // What was cut for it has partial checksums, and is dropped too.
            assert!(lost_by_change >= lost && expected.iter().all(|packet| seen.contains(packet)));
        }
        assert!(alice.send(&[0; 60], &OffloadHeader::NONE) != Sent::Forwarded, "no address");
    }
}

/// Goal: after the call that accepts less, no packet comes out that leaves more, however fast others
/// send; and a receiver that changes all the time goes on receiving.
#[test]
fn nothing_arrives_that_is_no_longer_accepted() {
    let network = network();
    let mut alice = Station::join(&network, 1, ALL);
    let port: Port<Buffer> =
        network.join(PortConfig { offloads: offloads(ALL), ..config(2) }).unwrap();
    let mac = port.mac();
    let (mut bob, _sends) = port.split();
    let done = &AtomicBool::new(false);
    /// Sets a flag when it is dropped, also by a panic, so that a thread ends that looks at it.
    struct SetAtEnd<'a>(&'a AtomicBool);
    impl Drop for SetAtEnd<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _ends = SetAtEnd(done);
        scope.spawn(move || {
            let packets: Vec<_> = (0..8)
                .map(|number| {
                    let form = Form { v4: number % 2 == 0, payload: 2500, ..LARGE };
                    let form = Form { segment: (number < 4).then_some(1000), ..form };
                    form.build(mac, alice.mac, number)
                })
                .collect();
            while !done.load(Ordering::Relaxed) {
                for (packet, header) in &packets {
                    alice.send(packet, header);
                    alice.receive();
                }
            }
        });
        let rounds = if std::env::var_os("VMRING_TEST_SCALE").is_some() { 100 } else { 1000 };
        let mut received = [0; 4];
        for round in 0..rounds {
            let began = std::time::Instant::now();
            let kind = round % 4;
            let mut accepted = Accepted::new(offloads([ALL, 1, 0, 1 | 2][kind]));
            accepted.ecn = round % 3 != 0;
            bob.accept(accepted);
            let now = bob.offloads();
            let size = LEN + bob.max_packet_size();
            let mut came = 0;
            while came < 3 {
                assert!(began.elapsed().as_secs() < 60, "round {round}: {:?}", bob.stats());
                while bob.posted() < 4 {
                    bob.post(vec![0; size]).unwrap();
                }
                let Some((buffer, _)) = bob.collect() else {
                    std::thread::yield_now();
                    continue;
                };
                let header = OffloadHeader::parse(buffer.first_chunk().unwrap()).unwrap();
                assert_eq!(software::left_by(&now, &header), Left::Nothing, "{accepted:?}");
                came += 1;
                received[kind] += 1;
            }
            bob.close();
            while bob.posted() > 0 {
                bob.recall(drop);
                while bob.collect().is_some() {}
            }
            bob.reopen();
        }
        assert!(received.iter().all(|count| *count > 0));
    });
}
