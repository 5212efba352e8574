//! Software offload, checked with smoltcp. Every segment is parsed and its checksums are verified,
//! and the payloads are joined again.

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpAddress, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, Ipv6Address, Ipv6Packet, Ipv6Repr,
    TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};
use vmring::device::Offloads;
use vmring::software::{self, Left, Segments, SoftwareError};
use vmring::{Checksum, Gso, OffloadError, OffloadHeader};

/// The headers in front of the payload.
#[derive(Clone, Debug)]
struct Shape {
    v4: bool,
    tcp: bool,
    vlans: usize,
    /// IPv4 options in words, or IPv6 extension headers of 8 bytes.
    extras: usize,
    /// The last extension header is a routing header with this many segments left.
    route: u8,
    sequence: i32,
    ident: u16,
    fin: bool,
    push: bool,
    cwr: bool,
    timestamp: bool,
    payload: usize,
    segment: u16,
}

const PLAIN: Shape = Shape {
    v4: true,
    tcp: true,
    vlans: 0,
    extras: 0,
    route: 0,
    sequence: 1000,
    ident: 7,
    fin: true,
    push: true,
    cwr: true,
    timestamp: true,
    payload: 4000,
    segment: 1448,
};

fn shapes() -> impl Strategy<Value = Shape> {
    let where_ = (any::<bool>(), any::<bool>(), 0..3_usize, 0..4_usize, 0..3_u8);
    let numbers = (any::<i32>(), any::<u16>(), 0..9000_usize, 1..3000_u16);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (where_, numbers, flags).prop_map(|(where_, numbers, flags)| {
        let (v4, tcp, vlans, extras, route) = where_;
        let (sequence, ident, payload, segment) = numbers;
        let (fin, push, cwr, timestamp) = flags;
        Shape {
            v4,
            tcp,
            vlans,
            extras,
            route,
            sequence,
            ident,
            fin,
            push,
            cwr,
            timestamp,
            payload,
            segment,
        }
    })
}

const FROM4: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);
const TO4: Ipv4Address = Ipv4Address::new(10, 255, 1, 2);
const FROM6: Ipv6Address = Ipv6Address::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const TO6: Ipv6Address = Ipv6Address::new(0xfd00, 0xffff, 9, 8, 7, 6, 5, 4);
/// The destination in the IPv6 header while a routing header has segments left.
const VIA6: Ipv6Address = Ipv6Address::new(0xfd00, 1, 1, 1, 1, 1, 1, 1);

impl Shape {
    fn ip_at(&self) -> usize {
        14 + 4 * self.vlans
    }

    fn transport_at(&self) -> usize {
        self.ip_at() + if self.v4 { 20 + 4 * self.extras } else { 40 + 8 * self.extras }
    }

    fn addresses(&self) -> (IpAddress, IpAddress) {
        if self.v4 { (FROM4.into(), TO4.into()) } else { (FROM6.into(), TO6.into()) }
    }

    fn rerouted(&self) -> bool {
        !self.v4 && self.extras > 0 && self.route > 0
    }

    /// The packet with a partial checksum, and its offload header.
    fn build(&self) -> (Vec<u8>, OffloadHeader) {
        let payload: Vec<u8> = (0..self.payload).map(|i| ((i * 31) >> 3) as u8).collect();
        let mut packet = vec![2; 12];
        for tag in 0..self.vlans {
            packet.extend(if tag == 0 { [0x81, 0] } else { [0x88, 0xa8] });
            packet.extend([0x20, tag as u8]);
        }
        packet.extend(if self.v4 { [8, 0] } else { [0x86, 0xdd] });
        let (from, to) = self.addresses();
        let caps = ChecksumCapabilities::ignored();
        let protocol = if self.tcp { IpProtocol::Tcp } else { IpProtocol::Udp };
        let transport = if self.tcp {
            let repr = TcpRepr {
                src_port: 49_152,
                dst_port: 80,
                control: if self.fin { TcpControl::Fin } else { TcpControl::None },
                seq_number: TcpSeqNumber(self.sequence),
                ack_number: Some(TcpSeqNumber(77)),
                window_len: 512,
                window_scale: None,
                max_seg_size: None,
                sack_permitted: false,
                sack_ranges: [None; 3],
                timestamp: self.timestamp.then(|| smoltcp::wire::TcpTimestampRepr::new(1, 2)),
                payload: &payload,
            };
            let mut bytes = vec![0; repr.buffer_len()];
            let mut tcp = TcpPacket::new_unchecked(&mut bytes[..]);
            repr.emit(&mut tcp, &from, &to, &caps);
            tcp.set_psh(self.push);
            tcp.set_cwr(self.cwr);
            bytes
        } else {
            let mut bytes = vec![0; 8 + payload.len()];
            let mut udp = UdpPacket::new_unchecked(&mut bytes[..]);
            let repr = UdpRepr { src_port: 5000, dst_port: 53 };
            let fill = |room: &mut [u8]| room.copy_from_slice(&payload);
            repr.emit(&mut udp, &from, &to, payload.len(), fill, &caps);
            bytes
        };
        if self.v4 {
            let header = 20 + 4 * self.extras;
            let mut ip = vec![0; header];
            let repr = Ipv4Repr {
                src_addr: FROM4,
                dst_addr: TO4,
                next_header: protocol,
                payload_len: transport.len(),
                hop_limit: 64,
            };
            repr.emit(&mut Ipv4Packet::new_unchecked(&mut ip[..]), &caps);
            let mut view = Ipv4Packet::new_unchecked(&mut ip[..]);
            view.set_ident(self.ident);
            view.set_header_len(header as u8);
            view.set_total_len((header + transport.len()) as u16);
            ip[20..].fill(1); // the no-operation option
            packet.extend(ip);
        } else {
            let extras = 8 * self.extras;
            // All are destination options, except for a routing header at the end.
            let kind = |i: usize| match i {
                i if i == self.extras => u8::from(protocol),
                i if i + 1 == self.extras && self.route > 0 => 43,
                _ => 60,
            };
            let mut ip = vec![0; 40];
            let repr = Ipv6Repr {
                src_addr: FROM6,
                dst_addr: if self.rerouted() { VIA6 } else { TO6 },
                next_header: IpProtocol::from(kind(0)),
                payload_len: extras + transport.len(),
                hop_limit: 64,
            };
            repr.emit(&mut Ipv6Packet::new_unchecked(&mut ip[..]));
            packet.extend(ip);
            for i in 0..self.extras {
                let left = if kind(i) == 43 { self.route } else { 4 };
                packet.extend([kind(i + 1), 0, 1, left, 0, 0, 0, 0]);
            }
        }
        let start = packet.len();
        assert_eq!(start, self.transport_at());
        let offset = if self.tcp { 16 } else { 6 };
        // The sum of the pseudo header, computed the simple way.
        let mut pseudo = Vec::new();
        if self.v4 {
            pseudo.extend([FROM4.octets(), TO4.octets()].concat());
        } else {
            pseudo.extend([FROM6.octets(), TO6.octets()].concat());
        }
        pseudo.extend([0, protocol.into()]);
        pseudo.extend((transport.len() as u16).to_be_bytes());
        let mut sum: u32 = pseudo.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        packet.extend(transport);
        packet[start + offset..][..2].copy_from_slice(&(sum as u16).to_be_bytes());
        let gso = match (self.tcp, self.v4) {
            (true, true) => Gso::TcpV4,
            (true, false) => Gso::TcpV6,
            (false, _) => Gso::UdpL4,
        };
        let header = OffloadHeader {
            checksum: Checksum::Partial { start: start as u16, offset: offset as u16 },
            gso,
            segment_size: self.segment,
            ..OffloadHeader::NONE
        };
        (packet, header)
    }

    /// Parses segment `i` of `count`, verifies every checksum, and returns the payload.
    fn judge(&self, packet: &[u8], segment: &[u8], i: usize, count: usize) -> Vec<u8> {
        let (from, to) = self.addresses();
        let verify = ChecksumCapabilities::default();
        let ip_at = self.ip_at();
        assert_eq!(segment[..ip_at], packet[..ip_at], "Ethernet and VLAN tags survive");
        let ip = &segment[ip_at..];
        let transport = if self.v4 {
            let ip = Ipv4Packet::new_checked(ip).unwrap();
            assert!(ip.verify_checksum());
            assert_eq!(usize::from(ip.total_len()), segment.len() - ip_at);
            assert_eq!(ip.ident(), self.ident.wrapping_add(i as u16));
            let payload = ip.payload();
            assert!(ip.into_inner()[20..20 + 4 * self.extras].iter().all(|b| *b == 1));
            payload
        } else {
            let ip = Ipv6Packet::new_checked(ip).unwrap();
            assert_eq!(ip.total_len(), segment.len() - ip_at);
            let (extras, at) = (8 * self.extras, ip_at + 40);
            assert_eq!(segment[at..at + extras], packet[at..at + extras], "extension headers");
            &ip.payload()[extras..]
        };
        if self.tcp {
            let tcp = TcpPacket::new_checked(transport).unwrap();
            let repr = TcpRepr::parse(&tcp, &from, &to, &verify).unwrap();
            let first = TcpSeqNumber(self.sequence);
            assert_eq!(repr.seq_number, first + i * usize::from(self.segment));
            assert_eq!(repr.timestamp.is_some(), self.timestamp);
            let (is_first, is_last) = (i == 0, i + 1 == count);
            assert_eq!(tcp.fin(), self.fin && is_last);
            assert_eq!(tcp.psh(), self.push && is_last);
            assert_eq!(tcp.cwr(), self.cwr && is_first);
            repr.payload.to_vec()
        } else {
            let udp = UdpPacket::new_checked(transport).unwrap();
            assert_eq!(usize::from(udp.len()), transport.len());
            assert_ne!(udp.checksum(), 0, "which would say that there is none");
            UdpRepr::parse(&udp, &from, &to, &verify).unwrap();
            udp.payload().to_vec()
        }
    }
}

proptest! {
    #[test]
    fn every_segment_is_a_good_packet_and_together_they_are_the_payload(shape in shapes()) {
        let (packet, header) = shape.build();
        let segments = Segments::new(&header, &packet).unwrap();
        let count = segments.count();
        prop_assert_eq!(count, shape.payload.div_ceil(shape.segment.into()).max(1));
        let mut out = vec![0xee; segments.len_max()];
        let mut together = Vec::new();
        let mut longest = 0;
        for i in 0..count {
            let len = segments.write(i, &mut out).unwrap();
            longest = longest.max(len);
            let payload = shape.judge(&packet, &out[..len], i, count);
            prop_assert!(i + 1 == count || payload.len() == usize::from(shape.segment));
            together.extend(payload);

            // A segment that is left partial and completed afterwards is the same.
            let whole = out[..len].to_vec();
            let len = segments.write_partial(i, &mut out).unwrap();
            let done = software::complete_checksum(&segments.partial_header(), &mut out[..len]);
            prop_assert_eq!(done.unwrap().checksum, Checksum::Complete);
            prop_assert_eq!(&whole, &out[..len]);
        }
        prop_assert_eq!(longest, segments.len_max());
        prop_assert_eq!(&together[..], &packet[packet.len() - shape.payload..]);
    }

    #[test]
    fn a_completed_checksum_is_the_one_the_receiver_computes(shape in shapes()) {
        let (mut packet, header) = shape.build();
        let header = OffloadHeader { gso: Gso::None, segment_size: 0, ..header };
        let before = packet.clone();
        let done = software::complete_checksum(&header, &mut packet).unwrap();
        prop_assert_eq!(done, OffloadHeader::NONE);
        if shape.v4 {
            // `complete_checksum` leaves the IPv4 header's checksum alone, so fill it in here.
            Ipv4Packet::new_unchecked(&mut packet[shape.ip_at()..]).fill_checksum();
        }
        let shape = Shape { segment: u16::MAX, ..shape };
        let payload = shape.judge(&before, &packet, 0, 1);
        prop_assert_eq!(payload.len(), shape.payload);
    }

    /// Good packets with some header bytes changed, and truncated packets.
    #[test]
    fn hostile_packets_give_an_error_or_segments_that_fit(
        shape in shapes(),
        changes in proptest::collection::vec((0..120_usize, any::<u8>()), 0..6),
        cut in 0..200_usize,
        start in proptest::option::of(any::<u16>()),
        segment_size: u16,
    ) {
        let (mut packet, mut header) = shape.build();
        for (at, byte) in changes {
            if let Some(there) = packet.get_mut(at) {
                *there = byte;
            }
        }
        packet.truncate(packet.len().saturating_sub(cut));
        if let (Some(start), Checksum::Partial { offset, .. }) = (start, header.checksum) {
            header.checksum = Checksum::Partial { start, offset };
        }
        header.segment_size = segment_size;
        prop_assume!(segment_size > 20 || packet.len() < 500);
        match Segments::new(&header, &packet) {
            Err(error) => prop_assert!(!error.to_string().is_empty()),
            Ok(segments) => {
                let mut out = vec![0; segments.len_max()];
                let mut moved = 0;
                for i in 0..segments.count() {
                    let len = segments.write(i, &mut out).unwrap();
                    prop_assert!(len <= packet.len());
                    moved += len;
                }
                prop_assert!(moved >= packet.len());
            }
        }
        let plain = OffloadHeader { gso: Gso::None, ..header };
        let _ = software::complete_checksum(&plain, &mut packet);
    }

    #[test]
    fn any_bytes_give_an_error_or_segments(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        raw: [u8; vmring::OFFLOAD_LEN],
    ) {
        let Ok(header) = OffloadHeader::parse_ignoring_reserved(&raw) else { return Ok(()) };
        let _ = Segments::new(&header, &bytes);
        let _ = software::complete_checksum(&header, &mut bytes.clone());
    }
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_ones() {
    let (mut packet, header) = Shape { tcp: false, payload: 2, ..PLAIN }.build();
    let header = OffloadHeader { gso: Gso::None, ..header };
    let at = packet.len() - 2;
    // For one of these payloads the sum is 0xffff and its complement is 0.
    for payload in 0..=u16::MAX {
        packet[at..].copy_from_slice(&payload.to_be_bytes());
        let mut sent = packet.clone();
        software::complete_checksum(&header, &mut sent).unwrap();
        let sum = u16::from_be_bytes([sent[40], sent[41]]);
        assert_ne!(sum, 0);
        if sum == 0xffff {
            assert!(
                UdpPacket::new_unchecked(&sent[34..]).verify_checksum(&FROM4.into(), &TO4.into())
            );
            return;
        }
    }
    panic!("no payload gave it");
}

#[test]
fn the_largest_packets_are_cut() {
    for (v4, payload) in [(true, 65_535 - 20 - 32), (false, 65_535 - 32)] {
        let shape = Shape { v4, payload, ..PLAIN };
        let (packet, header) = shape.build();
        let segments = Segments::new(&header, &packet).unwrap();
        assert_eq!(segments.count(), payload.div_ceil(1448));
        let whole = OffloadHeader { segment_size: 65_534, ..header };
        let one = Segments::new(&whole, &packet).unwrap();
        let mut out = vec![0; one.len_max()];
        assert_eq!((one.count(), one.write(0, &mut out)), (1, Ok(packet.len())));
        shape.judge(&packet, &out, 0, 1);
    }
}

#[test]
fn each_wrong_has_its_error() {
    type Change = fn(&mut Vec<u8>, &mut OffloadHeader);
    let cases: [(Change, SoftwareError); 16] = [
        (|_, h| h.gso = Gso::None, SoftwareError::NotToBeCut),
        (|_, h| h.checksum = Checksum::Complete, OffloadError::GsoWithoutChecksum.into()),
        (|_, h| h.segment_size = 0, OffloadError::SegmentSize { size: 0 }.into()),
        (|p, _| p[13] = 6, SoftwareError::NotThatIp { ethertype: 0x0806 }),
        (|_, h| h.gso = Gso::TcpV6, SoftwareError::NotThatIp { ethertype: 0x0800 }),
        (
            |p, _| p[12..14].copy_from_slice(&[0x86, 0xdd]),
            SoftwareError::NotThatIp { ethertype: 0x86dd },
        ),
        (|p, _| p[14] = 0x65, SoftwareError::Malformed { what: "IPv4" }),
        (|p, _| p[14] = 0x44, SoftwareError::Malformed { what: "IPv4" }),
        (|p, _| p.push(0), SoftwareError::Length { what: "IPv4", said: 4052, is: 4053 }),
        (|p, _| p[20] = 0x20, SoftwareError::Fragment),
        (|p, _| p[21] = 1, SoftwareError::Fragment),
        (|p, _| p[23] = 17, SoftwareError::NotThatTransport { protocol: 17 }),
        (|p, _| p[46] = 0x40, SoftwareError::Malformed { what: "TCP" }),
        (|p, _| p[47] |= 2, SoftwareError::TcpFlags),
        (|p, _| p[47] |= 0x20, SoftwareError::TcpFlags),
        (
            |_, h| h.checksum = Checksum::Partial { start: 38, offset: 16 },
            SoftwareError::TransportAt { said: 38, is: 34 },
        ),
    ];
    for (change, expected) in cases {
        let (mut packet, mut header) = PLAIN.build();
        change(&mut packet, &mut header);
        assert_eq!(Segments::new(&header, &packet).unwrap_err(), expected);
    }
    let (packet, header) = Shape { tcp: false, ..PLAIN }.build();
    let ufo = OffloadHeader { gso: Gso::Udp, ..header };
    assert_eq!(Segments::new(&ufo, &packet).unwrap_err(), SoftwareError::FragmentsNotSupported);
    let mut short = packet.clone();
    short[39] -= 1;
    let error = Segments::new(&header, &short).unwrap_err();
    assert!(matches!(error, SoftwareError::Length { what: "UDP", .. }), "{error}");
    let mut packet = packet;
    assert_eq!(software::complete_checksum(&header, &mut packet), Err(SoftwareError::ToBeCut));

    let (mut packet, header) = Shape { v4: false, extras: 1, ..PLAIN }.build();
    packet[20] = 44;
    assert_eq!(Segments::new(&header, &packet).unwrap_err(), SoftwareError::Fragment);
    packet[20] = 60;
    packet[55] = 255;
    let (packet, header) = (packet.clone(), header);
    let error = Segments::new(&header, &packet[..]).unwrap_err();
    assert_ne!(error.to_string(), "");
}

#[test]
fn a_segment_is_written_whole_or_not_at_all() {
    let (packet, header) = PLAIN.build();
    let segments = Segments::new(&header, &packet).unwrap();
    let needed = segments.len_max();
    let mut out = vec![0xee; needed];
    let too_short = SoftwareError::Space { needed, available: needed - 1 };
    assert_eq!(segments.write(0, &mut out[..needed - 1]), Err(too_short));
    let none = SoftwareError::NoSuchSegment { index: 3, count: 3 };
    assert_eq!(segments.write(3, &mut out), Err(none));
    assert!(out.iter().all(|byte| *byte == 0xee));
}

#[test]
fn what_a_receiver_leaves_undone() {
    let (_, tso) = PLAIN.build();
    let (_, tso6) = Shape { v4: false, ..PLAIN }.build();
    let (_, uso) = Shape { tcp: false, ..PLAIN }.build();
    let partial = OffloadHeader { gso: Gso::None, ..tso };
    let ufo = OffloadHeader { gso: Gso::Udp, ..uso };
    let all = Offloads::ALL;
    for header in [OffloadHeader::NONE, partial, tso, tso6, uso] {
        assert_eq!(software::left_by(&all, &header), Left::Nothing);
    }
    assert_eq!(software::left_by(&all, &ufo), Left::Segments { partial: true });
    let mut sums = Offloads::default();
    (sums.checksum, sums.virtio_header) = (true, true);
    assert_eq!(software::left_by(&sums, &partial), Left::Nothing);
    for header in [tso, tso6, uso] {
        assert_eq!(software::left_by(&sums, &header), Left::Segments { partial: true });
    }
    let none = Offloads::default();
    assert_eq!(software::left_by(&none, &OffloadHeader::NONE), Left::Nothing);
    assert_eq!(software::left_by(&none, &partial), Left::Checksum);
    assert_eq!(software::left_by(&none, &tso), Left::Segments { partial: false });
    // Without the virtio header, the device cannot be told to complete a checksum.
    let mut mute = all;
    mute.virtio_header = false;
    assert_eq!(software::left_by(&mute, &partial), Left::Checksum);
    assert_eq!(all & sums, sums);
    assert_eq!(sums & none, none);
}
