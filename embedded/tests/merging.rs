//! Merging, against cutting and against a plain way to build packets: what is merged and cut again is
//! what it was, and everything else comes out as it went in, in the order of its flow.
#![cfg(not(loom))]

use std::collections::HashMap;

use proptest::prelude::*;
use vmring_core::offload::{Checksum, Gso, OffloadHeader, Offloads};
use vmring_embedded::limits::{DATAGRAMS_PER_PACKET, FLOWS_MERGED};
use vmring_embedded::software::{MergeBuffer as _, Merging, Outgoing, Segments};

/// The longest packet in these tests: IPv6 with 64 KiB behind its header, and a tag.
const LONGEST: usize = 65_535 + 40 + 18;

/// A packet, field by field.
#[derive(Clone, Debug)]
struct Fields {
    v4: bool,
    tcp: bool,
    tags: usize,
    mac: u8,
    port: u8,
    tos: u8,
    ttl: u8,
    ident: u16,
    /// The IPv4 word of flags and fragment offset.
    fragment: u16,
    /// Words of IPv4 options, or IPv6 extension headers of 8 bytes.
    extras: usize,
    label: u16,
    sequence: u32,
    acknowledgment: u32,
    /// The bits of bytes 12 and 13 of the TCP header, without the length.
    flags: u16,
    window: u16,
    urgent: u16,
    /// The words of TCP options.
    options: Vec<u32>,
    payload: usize,
    fill: u8,
    /// Bytes behind the IP packet.
    padding: usize,
    /// What is added to the transport checksum, and to that of the IPv4 header.
    wrong: u16,
    wrong_ip: u16,
    checksum: Checksum,
}

const ACK: u16 = 0x10;
const DF: u16 = 0x4000;
const SHAPE: Fields = Fields {
    v4: true,
    tcp: true,
    tags: 0,
    mac: 1,
    port: 1,
    tos: 0,
    ttl: 64,
    ident: 0xfffe,
    fragment: DF,
    extras: 0,
    label: 0,
    sequence: u32::MAX - 2000,
    acknowledgment: 5,
    flags: ACK,
    window: 500,
    urgent: 0,
    options: Vec::new(),
    payload: 1000,
    fill: 3,
    padding: 0,
    wrong: 0,
    wrong_ip: 0,
    checksum: Checksum::Complete,
};

fn folded(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl Fields {
    /// Where the transport header begins.
    fn transport(&self) -> usize {
        14 + 4 * self.tags + if self.v4 { 20 + 4 * self.extras } else { 40 + 8 * self.extras }
    }

    fn headers(&self) -> usize {
        self.transport() + if self.tcp { 20 + 4 * self.options.len() } else { 8 }
    }

    /// The packet of the same flow that follows this one.
    fn next(&self) -> Self {
        let sequence = self.sequence.wrapping_add(self.payload as u32);
        Self { sequence, ident: self.ident.wrapping_add(1), fill: self.fill + 1, ..self.clone() }
    }

    fn build(&self) -> (Vec<u8>, OffloadHeader) {
        let mut packet = [&[2; 6][..], &[2, 0, 0, 0, 0, self.mac]].concat();
        for tag in 0..self.tags {
            packet.extend([0x81, 0, 0, 7 + tag as u8]);
        }
        packet.extend(if self.v4 { [8, 0] } else { [0x86, 0xdd] });
        let protocol = if self.tcp { 6 } else { 17 };
        let mut datagram = vec![0xc0, self.port, 0, 80];
        if self.tcp {
            datagram.extend(self.sequence.to_be_bytes());
            datagram.extend(self.acknowledgment.to_be_bytes());
            let words = 5 + self.options.len() as u16;
            datagram.extend((words << 12 | self.flags).to_be_bytes());
            datagram.extend(self.window.to_be_bytes());
            datagram.extend([0, 0]);
            datagram.extend(self.urgent.to_be_bytes());
            datagram.extend(self.options.iter().flat_map(|word| word.to_be_bytes()));
        } else {
            datagram.extend((8 + self.payload as u16).to_be_bytes());
            datagram.extend([0, 0]);
        }
        datagram.extend((0..self.payload).map(|i| ((i * 7) >> 2) as u8 ^ self.fill));
        let addresses = if self.v4 { [10; 8].to_vec() } else { [0xfd; 32].to_vec() };
        let mut pseudo = addresses.clone();
        pseudo.extend([0, protocol]);
        pseudo.extend((datagram.len() as u16).to_be_bytes());
        let field = if self.tcp { 16 } else { 6 };
        let sum = match self.checksum {
            Checksum::Partial { .. } => folded(&pseudo),
            _ => match !folded(&[&pseudo[..], &datagram].concat()) {
                0 => 0xffff,
                sum => sum,
            },
        };
        let sum = sum.wrapping_add(self.wrong);
        datagram[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        if self.v4 {
            let len = 20 + 4 * self.extras + datagram.len();
            let mut ip = vec![0x45 + self.extras as u8, self.tos];
            ip.extend((len as u16).to_be_bytes());
            ip.extend(self.ident.to_be_bytes());
            ip.extend(self.fragment.to_be_bytes());
            ip.extend([self.ttl, protocol, 0, 0]);
            ip.extend(addresses);
            ip.extend(vec![1; 4 * self.extras]);
            let sum = (!folded(&ip)).wrapping_add(self.wrong_ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend(ip);
        } else {
            let word = 6 << 28 | u32::from(self.tos) << 20 | u32::from(self.label);
            packet.extend(word.to_be_bytes());
            packet.extend(((8 * self.extras + datagram.len()) as u16).to_be_bytes());
            let kind = |i| if i == self.extras { protocol } else { 60 };
            packet.extend([kind(0), self.ttl]);
            packet.extend(addresses);
            (0..self.extras).for_each(|i| packet.extend([kind(i + 1), 0, 1, 4, 0, 0, 0, 0]));
        }
        let start = packet.len() as u16;
        packet.extend(datagram);
        packet.extend(vec![0; self.padding]);
        let checksum = match self.checksum {
            Checksum::Partial { .. } => Checksum::Partial { start, offset: field as u16 },
            other => other,
        };
        (packet, OffloadHeader { checksum, ..OffloadHeader::NONE })
    }
}

type Packet = (Vec<u8>, OffloadHeader);

/// A buffer of that size with the packet in it.
fn buffer(packet: &[u8], capacity: usize) -> Vec<u8> {
    let mut buffer = Vec::with_capacity(capacity);
    buffer.extend_from_slice(packet);
    buffer
}

/// One batch.
fn merged(merging: &mut Merging<Vec<u8>>, packets: &[Packet]) -> Vec<Outgoing<Vec<u8>>> {
    let mut out = Vec::new();
    let mut free = 0;
    // Some batches have buffers to merge in, and others have only those of their packets.
    let given = packets.len() % 3;
    for _ in 0..given {
        free += usize::from(merging.reuse(buffer(&[0xee; 99], LONGEST)).is_some());
    }
    for (packet, header) in packets {
        let pushed = merging.push(buffer(packet, LONGEST), header, |packet| out.push(packet));
        free += usize::from(pushed.is_some());
    }
    merging.flush(|packet| out.push(packet));
    assert!(merging.is_empty());
    assert_eq!(out.iter().map(|out| out.packets).sum::<usize>(), packets.len());
    let back = out.len() + free;
    assert!(back <= packets.len() + FLOWS_MERGED, "no buffer came back twice");
    assert!(back + FLOWS_MERGED >= packets.len() + given, "each came out or is kept");
    out
}

/// What the receiver of a packet has when it has cut it.
fn cut(packet: &Outgoing<Vec<u8>>, partial: bool) -> Vec<Packet> {
    if packet.packets == 1 {
        return vec![(packet.buffer.clone(), packet.header)];
    }
    let segments = Segments::new(&packet.header, &packet.buffer).unwrap();
    assert_eq!(segments.count(), packet.packets);
    let write = |index| {
        let mut out = vec![0; segments.len_max()];
        let (written, header) = match partial {
            true => (segments.write_partial(index, &mut out), segments.partial_header()),
            false => (segments.write(index, &mut out), OffloadHeader::NONE),
        };
        out.truncate(written.unwrap());
        (out, header)
    };
    (0..segments.count()).map(write).collect()
}

fn all() -> Merging<Vec<u8>> {
    Merging::new(&Offloads::ALL, LONGEST)
}

/// How many packets are in each that comes out.
fn counts(merging: &mut Merging<Vec<u8>>, packets: &[Fields]) -> Vec<usize> {
    let packets: Vec<Packet> = packets.iter().map(Fields::build).collect();
    merged(merging, &packets).iter().map(|out| out.packets).collect()
}

/// A change to the next packet of a flow. Half of the packets are not changed.
fn changes() -> impl Strategy<Value = (usize, u16)> {
    (prop_oneof![8 => Just(0), 8 => 1..24_usize], 1..100_u16)
}

fn flows() -> impl Strategy<Value = Vec<Fields>> {
    let bits = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let numbers = (0..3_usize, 0..3_usize, 1..400_usize, 0..3_u8);
    let one = (bits, numbers, any::<u16>(), any::<u32>()).prop_map(
        |((v4, tcp, df, shares), (tags, options, payload, checksum), ident, sequence)| Fields {
            v4,
            tcp,
            tags,
            ident,
            sequence,
            payload,
            fragment: if df { DF } else { 0 },
            options: vec![0x0101_080a; options],
            mac: if shares { 0 } else { 1 },
            checksum: match checksum {
                0 => Checksum::DataValid,
                1 => Checksum::Partial { start: 0, offset: 0 },
                _ => Checksum::Complete,
            },
            ..SHAPE
        },
    );
    proptest::collection::vec(one, 1..12)
}

/// Makes `packet` differ from what would follow. Some changes last, and others are of this packet.
fn change(kind: usize, by: u16, lasting: &mut Fields) -> Fields {
    match kind {
        1 => lasting.tos ^= by as u8 & 3,
        2 => lasting.ttl ^= 1,
        3 => lasting.ident = lasting.ident.wrapping_add(by),
        4 => lasting.sequence = lasting.sequence.wrapping_add(by.into()),
        5 => lasting.acknowledgment += u32::from(by),
        6 => lasting.window += by,
        7 if !lasting.options.is_empty() => lasting.options[0] += u32::from(by),
        8 => lasting.label ^= by,
        9 => lasting.mac ^= 1,
        10 => lasting.ident = lasting.ident.wrapping_sub(1),
        11 => lasting.payload = (lasting.payload + usize::from(by)) % 400,
        _ => {}
    }
    let mut packet = lasting.clone();
    match kind {
        12 => packet.flags |= 0x08,
        13 => packet.flags |= 0x01,
        14 => packet.flags |= 0x80,
        15 => packet.flags |= 1 << (by % 9),
        16 => packet.payload = packet.payload.min(by.into()),
        17 => packet.payload = 0,
        18 if packet.checksum != Checksum::DataValid => packet.wrong = by,
        19 => packet.wrong_ip = by,
        20 => packet.padding = by.into(),
        21 => packet.extras = 1,
        22 => packet.fragment ^= [0x2000, 0x4000, 1, 0x8000][usize::from(by % 4)],
        23 => packet.urgent = by,
        _ => {}
    }
    packet
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The flows' packets in a random order, and batches of random lengths.
    #[test]
    fn what_is_merged_and_cut_again_is_what_it_was(
        mut flows in flows(),
        steps in proptest::collection::vec((any::<prop::sample::Index>(), changes(), 1..6_usize), 1..60),
        batches in proptest::collection::vec(1..80_usize, 1..6),
    ) {
        let mut packets = Vec::new();
        let mut flow_of: HashMap<Vec<u8>, usize> = HashMap::new();
        for (which, (kind, by), times) in steps {
            let number = which.index(flows.len());
            for time in 0..times {
                let flow = &mut flows[number];
                flow.port = number as u8;
                let kind = if time == 0 { kind } else { 0 };
                let fields = change(kind, by, flow);
                let built = fields.build();
                flow_of.insert(built.0.clone(), number);
                packets.push(built);
                *flow = Fields { payload: flow.payload, flags: flow.flags, ..fields.next() };
                *flow = Fields { extras: 0, padding: 0, wrong: 0, wrong_ip: 0, urgent: 0, ..flow.clone() };
                flow.fragment &= DF;
                flow.fill %= 100;
            }
        }
        let mut merging = all();
        let mut came = Vec::new();
        let mut rest = &packets[..];
        for len in batches.into_iter().cycle() {
            let (batch, later) = rest.split_at(len.min(rest.len()));
            let is_partial: HashMap<&[u8], bool> = batch
                .iter()
                .map(|(packet, header)| (&packet[..], matches!(header.checksum, Checksum::Partial { .. })))
                .collect();
            for out in merged(&mut merging, batch) {
                // Whether the first segment is one that was left partial decides how all are cut.
                let partial = out.packets > 1 && {
                    let segments = Segments::new(&out.header, &out.buffer).unwrap();
                    let mut first = vec![0; segments.len_max()];
                    let len = segments.write_partial(0, &mut first).unwrap();
                    is_partial.get(&first[..len]).copied().unwrap_or(false)
                };
                came.extend(cut(&out, partial));
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        // A checksum that was known to be right is complete in each segment.
        let plain = |(packet, header): &Packet| {
            (packet.clone(), matches!(header.checksum, Checksum::Partial { .. }))
        };
        for number in 0..flows.len() {
            let of = |packets: &[Packet]| -> Vec<_> {
                packets.iter().filter(|(packet, _)| flow_of.get(packet) == Some(&number)).map(plain).collect()
            };
            prop_assert_eq!(of(&came), of(&packets));
        }
        prop_assert_eq!(came.len(), packets.len());
    }

    /// Arbitrary bytes, and good packets with bytes changed. Nothing panics, and nothing is lost.
    #[test]
    fn hostile_packets_come_out(
        flows in flows(),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..120_usize, any::<u8>()), 0..40),
        raw in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..80), any::<[u8; 12]>()), 0..10),
    ) {
        let mut packets: Vec<Packet> = flows.iter().flat_map(|flow| {
            let next = flow.next();
            [flow.build(), next.build(), next.next().build()]
        }).collect();
        for (which, at, byte) in edits {
            let (packet, _) = &mut packets[which.index(flows.len() * 3)];
            if let Some(place) = packet.get_mut(at) {
                *place = byte;
            }
        }
        for (bytes, header) in raw {
            let header = OffloadHeader::parse_ignoring_reserved(&header).unwrap_or_default();
            packets.push((bytes, header));
        }
        for out in merged(&mut all(), &packets) {
            let cut = cut(&out, false);
            prop_assert_eq!(cut.len(), out.packets);
        }
    }
}

/// Three segments and a short one, of each kind.
#[test]
fn segments_of_one_flow_become_one_packet() {
    for (v4, tcp, tags, gso) in [
        (true, true, 0, Gso::TcpV4),
        (false, true, 1, Gso::TcpV6),
        (true, false, 2, Gso::UdpL4),
        (false, false, 0, Gso::UdpL4),
    ] {
        let first = Fields { v4, tcp, tags, options: vec![0x0101_080a, 1, 2], ..SHAPE };
        let (second, third) = (first.next(), first.next().next());
        let last = Fields { payload: 10, flags: ACK | 8, ..third.next() };
        let packets = [&first, &second, &third, &last].map(Fields::build);
        let out = merged(&mut all(), &packets);
        assert_eq!(out.len(), 1, "{first:?}");
        let expected = OffloadHeader {
            checksum: Checksum::Partial {
                start: first.transport() as u16,
                offset: if tcp { 16 } else { 6 },
            },
            gso,
            ecn: false,
            segment_size: 1000,
            header_len: first.headers() as u16,
            num_buffers: 0,
        };
        assert_eq!((out[0].packets, out[0].header), (4, expected));
        assert_eq!(out[0].buffer.len(), first.headers() + 3010);
        assert_eq!(cut(&out[0], false), packets);
    }
}

/// PSH and FIN end a packet, CWR begins one, and ECE is the same in all.
#[test]
fn flags_begin_and_end_a_packet() {
    let flagged = |flags: [u16; 4]| -> Vec<Fields> {
        let mut packets = vec![SHAPE];
        (1..4).for_each(|i| packets.push(packets[i - 1].next()));
        packets.iter_mut().zip(flags).for_each(|(packet, flags)| packet.flags |= flags);
        packets
    };
    for (flags, expected) in [
        ([0, 0, 8, 0], &[3, 1][..]),
        ([0, 0, 0, 1], &[4]),
        ([0, 9, 0, 0], &[2, 2]),
        ([8, 0, 0, 0], &[1, 3]),
        ([1, 8, 0, 0], &[1, 1, 2]),
        ([0x80, 0, 0, 0], &[4]),
        ([0, 0x80, 0, 0], &[1, 3]),
        ([0x80, 0x80, 0, 0], &[1, 3]),
        ([0x40; 4], &[4]),
        ([0x40, 0x40, 0, 0], &[2, 2]),
        // AE, of AccECN, and the reserved bits.
        ([0x100, 0, 0, 0], &[1, 3]),
        ([0x800, 0x800, 0, 0], &[2, 2]),
        ([0, 2, 0, 0], &[1, 1, 2]),
        ([0, 4, 0, 0], &[1, 1, 2]),
        ([0, 0x20, 0, 0], &[1, 1, 2]),
    ] {
        assert_eq!(counts(&mut all(), &flagged(flags)), expected, "{flags:x?}");
    }
    // The receiver is told of CWR.
    let packets: Vec<Packet> = flagged([0x80, 0, 0, 8]).iter().map(Fields::build).collect();
    let out = merged(&mut all(), &packets);
    assert!(out[0].header.ecn);
    assert_eq!(cut(&out[0], false), packets);
}

/// What differs from the packet before is not merged with it. Each of the changes is alone.
#[test]
fn packets_that_differ_stay_apart() {
    type Change = fn(&mut Fields);
    let of_both: &[Change] = &[
        |p| p.tos = 3,
        |p| p.ttl = 63,
        |p| p.mac = 9,
        |p| p.tags = 1,
        |p| p.extras = 1,
        |p| p.padding = 1,
        |p| p.wrong = 1,
        |p| p.checksum = Checksum::Partial { start: 0, offset: 0 },
        |p| p.payload = 1001,
        |p| p.port = 2,
    ];
    let of_v4: &[Change] = &[
        |p| p.ident = p.ident.wrapping_add(1),
        |p| p.ident = p.ident.wrapping_sub(1),
        |p| p.fragment = 0,
        |p| p.fragment = 0x2000,
        |p| p.fragment = 1,
        |p| p.fragment = 0xc000,
        |p| p.wrong_ip = 1,
    ];
    let of_v6: &[Change] = &[|p| p.label = 1];
    let of_tcp: &[Change] = &[
        |p| p.sequence = p.sequence.wrapping_add(1),
        |p| p.sequence = p.sequence.wrapping_sub(1),
        |p| p.acknowledgment += 1,
        |p| p.window += 1,
        |p| p.urgent = 1,
        |p| p.options[1] = 7,
        |p| p.options.truncate(2),
        |p| p.payload = 0,
    ];
    for (v4, tcp) in [(true, true), (false, true), (true, false), (false, false)] {
        let first = Fields { v4, tcp, options: vec![0x0101_080a, 1, 2], ..SHAPE };
        assert_eq!(counts(&mut all(), &[first.clone(), first.next()]), [2]);
        let ip = if v4 { of_v4 } else { of_v6 };
        for (i, change) in of_both.iter().chain(ip).chain(of_tcp.iter().filter(|_| tcp)).enumerate()
        {
            let mut second = first.next();
            change(&mut second);
            let packets = [&first, &second].map(Fields::build);
            let out = merged(&mut all(), &packets);
            let came: Vec<Packet> = out.into_iter().map(|out| (out.buffer, out.header)).collect();
            assert_eq!(came, packets, "change {i}, v4 {v4}, tcp {tcp}");
        }
    }
}

/// What is never merged, even if both packets have it, and even if somebody has verified the checksum.
#[test]
fn some_packets_are_never_merged() {
    type Change = fn(&mut Fields);
    let of_any: &[Change] = &[|p| p.padding = 1, |p| p.extras = 1, |p| p.flags |= 2];
    let of_v4: &[Change] = &[
        |p| p.fragment = 0x2000,
        |p| p.fragment = 0x8000,
        |p| p.fragment = 0x1000,
        |p| p.wrong_ip = 1,
    ];
    for v4 in [true, false] {
        for change in of_any.iter().chain(of_v4.iter().filter(|_| v4)) {
            let mut first = Fields { v4, checksum: Checksum::DataValid, ..SHAPE };
            assert_eq!(counts(&mut all(), &[first.clone(), first.next()]), [2]);
            change(&mut first);
            assert_eq!(counts(&mut all(), &[first.clone(), first.next()]), [1, 1], "{first:?}");
        }
    }
    // Nor is what is behind an IP packet a part of its payload.
    let first = Fields { checksum: Checksum::DataValid, ..SHAPE };
    let padded = Fields { payload: 10, padding: 7, ..first.next() };
    assert_eq!(counts(&mut all(), &[first.clone(), padded.clone()]), [1, 1]);
    let [first, padded] = [first, padded].map(|packet| Fields { v4: false, ..packet });
    assert_eq!(counts(&mut all(), &[first, padded]), [1, 1]);
    // A packet that is to be cut is not merged with one that is not.
    let partial = Fields { checksum: Checksum::Partial { start: 0, offset: 0 }, ..SHAPE };
    let mut packets = [partial.build(), partial.next().build()];
    (packets[1].1.gso, packets[1].1.segment_size) = (Gso::TcpV4, 500);
    assert_eq!(merged(&mut all(), &packets).len(), 2);
}

/// 0 and 0xffff are the same sum. Cutting writes one of them, so a packet with the other is not merged.
#[test]
fn a_checksum_in_its_other_form_is_not_merged() {
    let shape = Fields { payload: 10, ..SHAPE };
    let second = shape.next();
    let at_ip = |ident| Fields { ident, ..shape.clone() }.build().0[24..26] == [0, 0];
    let ident = (0..=u16::MAX).find(|ident| at_ip(*ident)).expect("one has this sum");
    let first = Fields { ident, ..shape.clone() };
    let mut packets = [first.build(), Fields { ident: ident.wrapping_add(1), ..second }.build()];
    assert_eq!(merged(&mut all(), &packets).len(), 1);
    packets[0].0[24..26].fill(0xff);
    assert_eq!(merged(&mut all(), &packets).len(), 2);

    let at_tcp = |window| Fields { window, ..shape.clone() }.build().0[50..52] == [0xff, 0xff];
    let window = (0..=u16::MAX).find(|window| at_tcp(*window)).expect("one has this sum");
    let first = Fields { window, ..shape.clone() };
    let mut packets = [first.build(), first.next().build()];
    assert_eq!(merged(&mut all(), &packets).len(), 1);
    packets[0].0[50..52].fill(0);
    assert_eq!(merged(&mut all(), &packets).len(), 2);
}

/// Corruption gets no good checksum, whether it is in the first packet or behind it. A checksum that is
/// known to be right is not verified, and UDP without a checksum stays without one.
#[test]
fn a_corrupt_packet_is_not_merged() {
    for (v4, tcp) in [(true, true), (false, false)] {
        let first = Fields { v4, tcp, ..SHAPE };
        let mut packets: Vec<Packet> = vec![first.build(), first.next().build()];
        packets.push(first.next().next().build());
        for wrong in 0..3 {
            let mut packets = packets.clone();
            let last = packets[wrong].0.len() - 1;
            packets[wrong].0[last] ^= 4;
            let out = merged(&mut all(), &packets);
            let counts: Vec<usize> = out.iter().map(|out| out.packets).collect();
            assert_eq!(counts, [[1, 2].as_slice(), &[1, 1, 1], &[2, 1]][wrong]);
            let came: Vec<Packet> = out.iter().flat_map(|out| cut(out, false)).collect();
            assert_eq!(came, packets);
        }
        let valid = Fields { checksum: Checksum::DataValid, wrong: 1, ..first.clone() };
        assert_eq!(counts(&mut all(), &[valid.clone(), valid.next()]), [2]);
        let (field, header) = (first.transport() + if tcp { 16 } else { 6 }, OffloadHeader::NONE);
        for packet in &mut packets {
            packet.0[field..field + 2].fill(0);
        }
        assert!(packets.iter().all(|(_, packet_header)| *packet_header == header));
        assert_eq!(merged(&mut all(), &packets).len(), 3, "it says that there is none");
        packets.iter_mut().for_each(|(_, header)| header.checksum = Checksum::DataValid);
        assert_eq!(
            merged(&mut all(), &packets).len(),
            3,
            "and no more if somebody has verified it"
        );
        // A partial checksum must be the sum of the pseudo header.
        let partial = Fields { checksum: Checksum::Partial { start: 0, offset: 0 }, ..first };
        assert_eq!(counts(&mut all(), &[partial.clone(), partial.next()]), [2]);
        let wrong = Fields { wrong: 1, ..partial };
        assert_eq!(counts(&mut all(), &[wrong.clone(), wrong.next()]), [1, 1]);
    }
}

/// A packet that is not merged comes behind what was held of its flow, or of every flow that it may be
/// of, and before the rest.
#[test]
fn the_order_of_a_flow_is_kept() {
    let flow = |port| Fields { port, payload: 100, ..SHAPE };
    let (a, b) = (flow(1), flow(2));
    let lone = Fields { payload: 0, ..a.next() };
    let fragment = Fields { fragment: 1, port: 3, ..a.clone() };
    let foreign = vec![0xff; 60];
    let batch = [&b, &a, &b.next(), &lone].map(Fields::build);
    let [first, second, third, last] = batch.clone();
    let ports = |packets: &[Packet]| -> Vec<(u8, usize)> {
        let out = merged(&mut all(), packets);
        out.iter().map(|out| (out.buffer[35], out.packets)).collect()
    };
    assert_eq!(ports(&batch), [(1, 1), (1, 1), (2, 2)]);
    let arp = (foreign.clone(), OffloadHeader::NONE);
    let with_arp = [first.clone(), second.clone(), arp, third.clone()];
    assert_eq!(ports(&with_arp), [(0xff, 1), (2, 2), (1, 1)]);
    let with_fragment = [first.clone(), second, fragment.build(), third];
    assert_eq!(ports(&with_fragment), [(2, 1), (1, 1), (3, 1), (2, 1)]);
    // A packet that is to be cut already is of its flow.
    let large = OffloadHeader {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Gso::TcpV4,
        segment_size: 50,
        ..OffloadHeader::NONE
    };
    let packets = [first, last, (b.next().build().0, large)];
    let out = merged(&mut all(), &packets);
    let came: Vec<(u8, Gso)> = out.iter().map(|out| (out.buffer[35], out.header.gso)).collect();
    assert_eq!(came, [(1, Gso::None), (2, Gso::None), (2, Gso::TcpV4)]);
}

/// More flows than are held, more bytes than a packet or a buffer has, more datagrams than Linux merges.
#[test]
fn what_is_held_is_bounded() {
    let flow = |port| Fields { port, payload: 100, ..SHAPE };
    let flows: Vec<Fields> = (0..=FLOWS_MERGED as u8).map(flow).collect();
    let rounds: Vec<Fields> = flows.iter().cloned().chain(flows.iter().map(Fields::next)).collect();
    // Each flow ends the oldest, which begins anew and ends the next.
    assert_eq!(counts(&mut all(), &rounds), [1; 2 * (FLOWS_MERGED + 1)]);
    let rounds: Vec<Fields> =
        flows[1..].iter().cloned().chain(flows[1..].iter().map(Fields::next)).collect();
    assert_eq!(counts(&mut all(), &rounds), [2; FLOWS_MERGED]);

    for (v4, tcp, most) in
        [(true, true, 65), (false, true, 65), (true, false, DATAGRAMS_PER_PACKET)]
    {
        let mut packets = vec![Fields { v4, tcp, payload: if tcp { 1000 } else { 10 }, ..SHAPE }];
        for i in 0..most {
            packets.push(packets[i].next());
        }
        packets.iter_mut().for_each(|packet| packet.fill = 0);
        assert_eq!(counts(&mut all(), &packets), [most, 1]);
        if tcp {
            // An IP packet of exactly the greatest length is the last that is merged.
            let room = 65_535 - if v4 { 40 } else { 20 } - 65_000;
            for (payload, expected) in [(room, vec![66]), (room + 1, vec![65, 1])] {
                packets[65].payload = payload;
                let built: Vec<Packet> = packets.iter().map(Fields::build).collect();
                let out = merged(&mut all(), &built);
                let counts: Vec<usize> = out.iter().map(|out| out.packets).collect();
                assert_eq!(counts, expected, "v4 {v4}");
                let came: Vec<Packet> = out.iter().flat_map(|out| cut(out, false)).collect();
                assert_eq!(came, built);
            }
        }
    }

    let packets = [SHAPE, SHAPE.next()].map(|fields| fields.build());
    let len = packets[0].0.len() + 1000;
    for (capacity, longest, merges) in
        [(len, len, true), (len - 1, len, false), (len, len - 1, false)]
    {
        let mut merging = Merging::new(&Offloads::ALL, longest);
        let mut out = Vec::new();
        for (packet, header) in &packets {
            let packet = buffer(packet, capacity);
            assert_eq!(packet.packet_len_max(), capacity);
            merging.push(packet, header, |packet| out.push(packet));
        }
        merging.flush(|packet| out.push(packet));
        assert_eq!(out.len() == 1, merges, "{capacity} {longest}");
    }
}

/// The last buffer that was given is used first, and the packet's own is free at once.
#[test]
fn packets_are_merged_in_a_buffer_that_was_given() {
    let mut merging = all();
    for i in 0..=FLOWS_MERGED as u8 {
        let back = merging.reuse(buffer(&[i; 10], LONGEST + usize::from(i)));
        assert_eq!(back.is_some(), usize::from(i) == FLOWS_MERGED);
    }
    let packets = [SHAPE, SHAPE.next()].map(|fields| fields.build());
    let mut out = None;
    for (packet, header) in &packets {
        let back = merging.push(buffer(packet, 2000), header, |packet| out = Some(packet));
        assert_eq!(back.map(|back| back.capacity()), Some(2000));
    }
    assert!(out.is_none());
    merging.flush(|packet| out = Some(packet));
    let merged = out.unwrap();
    assert_eq!((merged.packets, merged.buffer.capacity()), (2, LONGEST + FLOWS_MERGED - 1));
    assert_eq!(cut(&merged, false), packets);
    // A buffer that is too short for the first packet is left alone.
    let mut merging = all();
    assert!(merging.reuse(Vec::with_capacity(10)).is_none());
    let (packet, header) = &packets[0];
    assert!(merging.push(buffer(packet, 2000), header, |_| {}).is_none());
}

/// Only what the receiver cuts is merged, so UDP only for one that has USO.
#[test]
fn a_receiver_gets_what_it_cuts() {
    for set in 0..32 {
        let mut offloads = Offloads::default();
        (offloads.checksum, offloads.virtio_header) = (set & 1 != 0, set & 2 != 0);
        (offloads.tso4, offloads.tso6, offloads.uso) = (set & 4 != 0, set & 8 != 0, set & 16 != 0);
        let takes = offloads.checksum && offloads.virtio_header;
        let mut merging = Merging::new(&offloads, LONGEST);
        assert_eq!(merging.is_able(), takes && set & 28 != 0);
        for (v4, tcp) in [(true, true), (false, true), (true, false), (false, false)] {
            let cuts = match (tcp, v4) {
                (true, true) => offloads.tso4,
                (true, false) => offloads.tso6,
                (false, _) => offloads.uso,
            };
            let first = Fields { v4, tcp, ..SHAPE };
            let expected: &[usize] = if takes && cuts { &[2] } else { &[1, 1] };
            assert_eq!(counts(&mut merging, &[first.clone(), first.next()]), expected);
        }
    }
}

/// Systems that send the same identification in each packet that cannot be fragmented.
#[test]
fn constant_identifications_are_merged_if_asked_for() {
    let constant = |packet: Fields| Fields { ident: 0, ..packet };
    let first = constant(SHAPE);
    let packets = [first.clone(), constant(first.next()), constant(first.next().next())];
    assert_eq!(counts(&mut all(), &packets), [1, 1, 1]);
    let merging = || all().with_constant_ids();
    assert_eq!(counts(&mut merging(), &packets), [3]);
    // A flow whose identifications count goes on counting, and one whose do not goes on so.
    let counted =
        [packets[0].clone(), packets[0].next(), Fields { ident: 1, ..packets[2].clone() }];
    assert_eq!(counts(&mut merging(), &counted), [2, 1]);
    let counted = [packets[0].clone(), packets[1].clone(), packets[1].next()];
    assert_eq!(counts(&mut merging(), &counted), [2, 1]);
    // A datagram that may be fragmented needs its identification.
    let fragmentable = packets.map(|packet| Fields { fragment: 0, ..packet });
    assert_eq!(counts(&mut merging(), &fragmentable), [1, 1, 1]);

    let packets = [first.clone(), constant(first.next())].map(|packet| packet.build());
    let out = merged(&mut merging(), &packets);
    for (i, ((cut, _), (packet, _))) in cut(&out[0], false).iter().zip(&packets).enumerate() {
        assert_eq!(cut[18..20], [0, i as u8]);
        assert_eq!(folded(&cut[14..34]), 0xffff);
        assert_eq!((&cut[..18], &cut[34..]), (&packet[..18], &packet[34..]));
    }
}
