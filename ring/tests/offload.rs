//! The typed `virtio_net_hdr`: it is read from bytes and written to bytes, and every rule is broken
//! once.

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use std::collections::HashSet;
use vmring_core::offload::{
    Checksum, F_DATA_VALID, F_NEEDS_CSUM, F_RSC_INFO, GSO_ECN, GSO_TCPV4, GSO_UDP_L4, Gso, LEN,
    Le16, OffloadError, OffloadHeader, VirtioNetHdr, set_num_buffers,
};

/// The default configuration. Failing cases are kept beside those of the other crates.
fn config() -> ProptestConfig {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../proptest-regressions/ring-offload.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        ..ProptestConfig::default()
    }
}

/// UDP over IPv4 with a checksum to complete.
const PARTIAL: OffloadHeader =
    OffloadHeader { checksum: Checksum::Partial { start: 34, offset: 6 }, ..OffloadHeader::NONE };

/// A large TCP packet over IPv4.
const TSO: OffloadHeader = OffloadHeader {
    checksum: Checksum::Partial { start: 34, offset: 16 },
    gso: Gso::TcpV4,
    ecn: false,
    segment_size: 1460,
    header_len: 54,
    num_buffers: 0,
};

/// A large UDP packet over IPv6.
const USO: OffloadHeader = OffloadHeader {
    checksum: Checksum::Partial { start: 54, offset: 6 },
    gso: Gso::UdpL4,
    ecn: false,
    segment_size: 1200,
    header_len: 62,
    num_buffers: 0,
};

fn partial(start: u16, offset: u16) -> Checksum {
    Checksum::Partial { start, offset }
}

fn bytes_of(header: OffloadHeader) -> [u8; LEN] {
    let mut bytes = [0xaa; LEN];
    header.write(&mut bytes);
    bytes
}

fn checksum() -> impl Strategy<Value = Checksum> {
    prop_oneof![
        Just(Checksum::Complete),
        Just(Checksum::DataValid),
        (0..200u16, 0..40u16).prop_map(|(start, offset)| partial(start, offset)),
        (any::<u16>(), any::<u16>()).prop_map(|(start, offset)| partial(start, offset)),
        (0..200u16, prop_oneof![Just(6), Just(16)])
            .prop_map(|(start, offset)| partial(start, offset)),
    ]
}

fn gso() -> impl Strategy<Value = Gso> {
    prop_oneof![
        Just(Gso::None),
        Just(Gso::TcpV4),
        Just(Gso::TcpV6),
        Just(Gso::Udp),
        Just(Gso::UdpL4)
    ]
}

fn header() -> impl Strategy<Value = OffloadHeader> {
    let small_or_any = || prop_oneof![0..200u16, any::<u16>()];
    (checksum(), gso(), any::<bool>(), small_or_any(), small_or_any(), any::<u16>()).prop_map(
        |(checksum, gso, ecn, segment_size, header_len, num_buffers)| OffloadHeader {
            checksum,
            gso,
            ecn,
            segment_size,
            header_len,
            num_buffers,
        },
    )
}

/// A header and a packet length for which the header is valid.
fn valid() -> impl Strategy<Value = (OffloadHeader, usize)> {
    (header(), 14..200u16, 1..65_535u16, 0..300usize).prop_map(|(header, start, size, tail)| {
        let offset = if header.gso.is_tcp() { 16 } else { 6 };
        let len = usize::from(start) + if header.gso.is_tcp() { 20 } else { 8 } + tail;
        let checksum = match header.checksum {
            Checksum::Complete | Checksum::DataValid if header.gso == Gso::None => header.checksum,
            _ => partial(start, offset),
        };
        let header = OffloadHeader {
            checksum,
            ecn: header.ecn && header.gso.is_tcp(),
            segment_size: size,
            header_len: header.header_len % (len as u16 + 1),
            ..header
        };
        (header, len)
    })
}

/// Twelve bytes, mostly with known flags and types, because others are refused at once.
fn bytes() -> impl Strategy<Value = [u8; LEN]> {
    let known = (any::<[u8; LEN]>(), 0..4u8, 0..6u8, any::<bool>()).prop_map(
        |(mut bytes, flags, gso_type, ecn)| {
            bytes[0] = flags;
            bytes[1] = gso_type | if ecn { GSO_ECN } else { 0 };
            bytes
        },
    );
    prop_oneof![3 => known, 1 => any::<[u8; LEN]>()]
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0..400usize, 1 => 0..140_000usize, 1 => any::<usize>(), 1 => Just(usize::MAX)]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_header_survives_a_round_trip(header in header()) {
        let bytes = bytes_of(header);
        prop_assert_eq!(OffloadHeader::parse(&bytes), Ok(header));
        prop_assert_eq!(OffloadHeader::parse_ignoring_reserved(&bytes), Ok(header));
        prop_assert_eq!(VirtioNetHdr::from_bytes(&bytes), header.to_raw());
    }

    #[test]
    fn any_bytes_survive_a_round_trip_through_the_raw_header(bytes: [u8; LEN]) {
        let raw = VirtioNetHdr::from_bytes(&bytes);
        prop_assert_eq!(raw.to_bytes(), bytes);
        prop_assert_eq!(raw.hdr_len.get(), u16::from_le_bytes([bytes[2], bytes[3]]));
        prop_assert_eq!(raw.gso_size.get(), u16::from_le_bytes([bytes[4], bytes[5]]));
        prop_assert_eq!(raw.csum_start.get(), u16::from_le_bytes([bytes[6], bytes[7]]));
        prop_assert_eq!(raw.csum_offset.get(), u16::from_le_bytes([bytes[8], bytes[9]]));
        prop_assert_eq!(raw.num_buffers.get(), u16::from_le_bytes([bytes[10], bytes[11]]));
    }

    /// Whatever a guest writes, nothing panics, and a header that passes keeps its promises.
    #[test]
    fn hostile_bytes_give_a_typed_error_or_a_header_that_holds(
        bytes in bytes(), len in length(), trim in length(),
    ) {
        let strict = OffloadHeader::parse(&bytes);
        let lenient = OffloadHeader::parse_ignoring_reserved(&bytes);
        if let Ok(header) = strict {
            prop_assert_eq!(lenient, Ok(header));
            // Only fields that must not be used are lost.
            let mut kept = VirtioNetHdr::from_bytes(&bytes);
            if kept.flags & F_NEEDS_CSUM != 0 {
                kept.flags = F_NEEDS_CSUM;
            } else {
                (kept.csum_start, kept.csum_offset) = (Le16::new(0), Le16::new(0));
            }
            prop_assert_eq!(header.to_raw(), kept);
        }
        let Ok(header) = lenient else { return Ok(()) };
        let _ = header.trim_front(trim);
        if let Err(error) = header.validate(len) {
            prop_assert!(!error.to_string().is_empty());
            return Ok(());
        }
        prop_assert!(usize::from(header.header_len) <= len);
        prop_assert!(!header.ecn || header.gso.is_tcp());
        if let Checksum::Partial { start, offset } = header.checksum {
            prop_assert!(start >= 14);
            prop_assert!(usize::from(start) + usize::from(offset) + 2 <= len);
        }
        if header.gso != Gso::None {
            let Checksum::Partial { start, offset } = header.checksum else {
                return Err(TestCaseError::fail("to be cut, but without a partial checksum"));
            };
            let (transport_len, field) = if header.gso.is_tcp() { (20, 16) } else { (8, 6) };
            prop_assert_eq!(offset, field);
            prop_assert!(usize::from(start) + transport_len <= len);
            prop_assert!(header.segment_size > 0);
        }
    }

    #[test]
    fn trimming_moves_the_checksum_with_its_bytes_or_fails(
        header in header(), n in length(), more in length(),
    ) {
        let trimmed = header.trim_front(n);
        match header.checksum {
            Checksum::Partial { start, offset } if n <= usize::from(start) => {
                let trimmed = trimmed.unwrap();
                prop_assert_eq!(trimmed.checksum, partial(start - n as u16, offset));
                prop_assert_eq!(
                    usize::from(trimmed.header_len),
                    usize::from(header.header_len).saturating_sub(n)
                );
                let rest = OffloadHeader {
                    checksum: header.checksum, header_len: header.header_len, ..trimmed
                };
                prop_assert_eq!(rest, header, "nothing else changes");
                prop_assert_eq!(
                    trimmed.trim_front(more).ok(),
                    n.checked_add(more).and_then(|n| header.trim_front(n).ok()),
                    "trimming twice is trimming once by the sum"
                );
            }
            Checksum::Partial { start, .. } => prop_assert_eq!(
                trimmed, Err(OffloadError::TrimPastChecksumStart { trim: n, start })
            ),
            _ if n == 0 => prop_assert_eq!(trimmed, Ok(header)),
            _ if header.gso != Gso::None => {
                prop_assert_eq!(trimmed, Err(OffloadError::GsoWithoutChecksum));
            }
            _ => prop_assert_eq!(trimmed.unwrap().checksum, Checksum::Complete),
        }
    }

    /// This holds as long as the Ethernet header's 14 bytes, or others instead of them, are left.
    #[test]
    fn a_valid_header_is_valid_after_a_trim((header, len) in valid(), n in 0..400usize) {
        prop_assert_eq!(header.validate(len), Ok(()));
        let n = n.min(len);
        if let Ok(trimmed) = header.trim_front(n) {
            match trimmed.checksum {
                Checksum::Partial { start, .. } if start < 14 => prop_assert_eq!(
                    trimmed.validate(len - n), Err(OffloadError::ChecksumStartInEthernet { start })
                ),
                _ => prop_assert_eq!(trimmed.validate(len - n), Ok(())),
            }
        }
    }

    #[test]
    fn the_number_of_buffers_is_set_in_place(bytes: [u8; LEN], n: u16) {
        let mut set = bytes;
        set_num_buffers(&mut set, n);
        prop_assert_eq!(VirtioNetHdr::from_bytes(&set).num_buffers.get(), n);
        prop_assert_eq!(&set[..10], &bytes[..10]);
    }
}

#[test]
fn the_default_is_twelve_zero_bytes() {
    assert_eq!(OffloadHeader::default(), OffloadHeader::NONE);
    assert_eq!(bytes_of(OffloadHeader::NONE), [0; LEN]);
    assert_eq!(OffloadHeader::parse(&[0; LEN]), Ok(OffloadHeader::NONE));
    assert_eq!(OffloadHeader::NONE.validate(0), Ok(()));
    assert!(OffloadHeader::NONE.is_plain());
    assert!(!PARTIAL.is_plain() && !TSO.is_plain());
    assert!(OffloadHeader { checksum: Checksum::DataValid, ..OffloadHeader::NONE }.is_plain());
}

/// Bytes written out by hand from the layout in the specification.
#[test]
fn each_field_lies_where_the_specification_puts_it() {
    let header = OffloadHeader {
        checksum: partial(0x0605, 0x0807),
        gso: Gso::TcpV6,
        ecn: true,
        header_len: 0x0201,
        segment_size: 0x0403,
        num_buffers: 0x0a09,
    };
    assert_eq!(bytes_of(header), [1, 0x84, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);

    for (gso, wire) in
        [(Gso::None, 0), (Gso::TcpV4, 1), (Gso::Udp, 3), (Gso::TcpV6, 4), (Gso::UdpL4, 5)]
    {
        assert_eq!(bytes_of(OffloadHeader { gso, ..OffloadHeader::NONE })[1], wire);
    }
    let valid = OffloadHeader { checksum: Checksum::DataValid, ..OffloadHeader::NONE };
    assert_eq!(bytes_of(valid), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn unused_checksum_fields_are_dropped() {
    let mut bytes = bytes_of(TSO);
    bytes[..2].fill(0);
    let header = OffloadHeader::parse(&bytes).unwrap();
    assert_eq!(header.checksum, Checksum::Complete);
    assert_eq!(header.to_raw().csum_start.get(), 0);
}

#[test]
fn a_partial_checksum_wins_over_a_verified_one() {
    let mut bytes = bytes_of(PARTIAL);
    bytes[0] = F_NEEDS_CSUM | F_DATA_VALID;
    assert_eq!(OffloadHeader::parse(&bytes), Ok(PARTIAL));
}

#[test]
fn every_undefined_flag_and_type_is_refused() {
    for flags in 0..=0xff {
        let mut bytes = bytes_of(PARTIAL);
        bytes[0] |= flags;
        let parsed = OffloadHeader::parse(&bytes);
        let lenient = OffloadHeader::parse_ignoring_reserved(&bytes);
        match flags & !7 {
            0 if flags & F_RSC_INFO == 0 => assert_eq!(parsed, Ok(PARTIAL)),
            0 => assert_eq!(parsed, Err(OffloadError::CoalescingInfo)),
            reserved => assert_eq!(parsed, Err(OffloadError::ReservedFlags { flags: reserved })),
        }
        let expected =
            if flags & F_RSC_INFO == 0 { Ok(PARTIAL) } else { Err(OffloadError::CoalescingInfo) };
        assert_eq!(lenient, expected);
    }
    for gso_type in 0..=0x7f {
        for ecn in [0, GSO_ECN] {
            let mut bytes = [0; LEN];
            bytes[1] = gso_type | ecn;
            match OffloadHeader::parse(&bytes) {
                Ok(header) => {
                    assert!([0, 1, 3, 4, 5].contains(&gso_type), "{gso_type}");
                    assert_eq!(header.ecn, ecn != 0);
                    assert_eq!(bytes_of(header), bytes);
                }
                Err(error) => {
                    assert!(![0, 1, 3, 4, 5].contains(&gso_type), "{gso_type}");
                    assert_eq!(error, OffloadError::UnknownGsoType { gso_type });
                }
            }
        }
    }
}

/// For each rule of `validate`: a header and a length that just break it, and neighbours that just
/// do not.
#[test]
fn every_rule_has_an_edge() {
    use OffloadError as E;
    let with = |header: OffloadHeader, change: fn(&mut OffloadHeader)| {
        let mut header = header;
        change(&mut header);
        header
    };
    #[rustfmt::skip]
    let cases: &[(OffloadHeader, usize, Result<(), OffloadError>)] = &[
        // Rule: the checksum's two bytes are in the packet.
        (PARTIAL, 42, Ok(())),
        (PARTIAL, 41, Err(E::ChecksumPastEnd { start: 34, offset: 6, packet_len: 41 })),
        (with(PARTIAL, |h| h.checksum = partial(u16::MAX, u16::MAX)), 131_072, Ok(())),
        (with(PARTIAL, |h| h.checksum = partial(u16::MAX, u16::MAX)), 131_071,
            Err(E::ChecksumPastEnd { start: u16::MAX, offset: u16::MAX, packet_len: 131_071 })),
        // A sum in 16 bits would wrap to 14 + 2.
        (with(PARTIAL, |h| h.checksum = partial(u16::MAX, 15)), 1514,
            Err(E::ChecksumPastEnd { start: u16::MAX, offset: 15, packet_len: 1514 })),
        (PARTIAL, usize::MAX, Ok(())),
        // Rule: the checksummed part begins behind the Ethernet header.
        (with(PARTIAL, |h| h.checksum = partial(14, 6)), 60, Ok(())),
        (with(PARTIAL, |h| h.checksum = partial(13, 6)), 60,
            Err(E::ChecksumStartInEthernet { start: 13 })),
        // Rule: a packet to cut has a partial checksum.
        (TSO, 4150, Ok(())),
        (with(TSO, |h| h.checksum = Checksum::Complete), 4150, Err(E::GsoWithoutChecksum)),
        (with(TSO, |h| h.checksum = Checksum::DataValid), 4150, Err(E::GsoWithoutChecksum)),
        (with(TSO, |h| { h.checksum = Checksum::Complete; h.gso = Gso::None }), 4150, Ok(())),
        // Rule: its checksum is where its protocol has it.
        (USO, 4150, Ok(())),
        (with(USO, |h| h.gso = Gso::Udp), 4150, Ok(())),
        (with(USO, |h| h.checksum = partial(54, 16)), 4150,
            Err(E::GsoChecksumOffset { offset: 16, expected: 6 })),
        (with(TSO, |h| h.checksum = partial(34, 6)), 4150,
            Err(E::GsoChecksumOffset { offset: 6, expected: 16 })),
        (with(PARTIAL, |h| h.checksum = partial(34, 16)), 4150, Ok(())),
        // Rule: its transport header is in the packet.
        (TSO, 54, Ok(())),
        (TSO, 53, Err(E::TransportPastEnd { start: 34, packet_len: 53 })),
        (USO, 62, Ok(())),
        (with(USO, |h| h.header_len = 0), 61, Err(E::ChecksumPastEnd { start: 54, offset: 6, packet_len: 61 })),
        // Rule: it says how large the segments are.
        (with(TSO, |h| h.segment_size = 1), 4150, Ok(())),
        (with(TSO, |h| h.segment_size = 0), 4150, Err(E::SegmentSize { size: 0 })),
        (with(TSO, |h| h.segment_size = 65_534), 4150, Ok(())),
        (with(TSO, |h| h.segment_size = 65_535), 4150, Err(E::SegmentSize { size: 65_535 })),
        (with(PARTIAL, |h| h.segment_size = 65_535), 4150, Ok(())),
        // Rule: ECN is only for TCP.
        (with(TSO, |h| h.ecn = true), 4150, Ok(())),
        (with(TSO, |h| { h.ecn = true; h.gso = Gso::TcpV6 }), 4150, Ok(())),
        (with(USO, |h| h.ecn = true), 4150, Err(E::EcnWithoutTcp)),
        (with(PARTIAL, |h| h.ecn = true), 4150, Err(E::EcnWithoutTcp)),
        // Rule: the headers' length is a hint, but it must be inside this packet.
        (with(TSO, |h| h.header_len = 0), 4150, Ok(())),
        (with(TSO, |h| h.header_len = 4150), 4150, Ok(())),
        (with(TSO, |h| h.header_len = 4151), 4150,
            Err(E::HeaderLenPastEnd { header_len: 4151, packet_len: 4150 })),
        (with(OffloadHeader::NONE, |h| h.header_len = 61), 60,
            Err(E::HeaderLenPastEnd { header_len: 61, packet_len: 60 })),
        // No rule: the number of buffers is not checked.
        (with(TSO, |h| h.num_buffers = 7), 4150, Ok(())),
    ];
    for (header, packet_len, expected) in cases {
        assert_eq!(header.validate(*packet_len), *expected, "{header:?} of {packet_len}");
    }
}

#[test]
fn a_trim_stops_at_the_checksummed_part() {
    assert_eq!(TSO.trim_front(0), Ok(TSO));
    let last = TSO.trim_front(34).unwrap();
    assert_eq!((last.checksum, last.header_len), (partial(0, 16), 20));
    assert_eq!(
        TSO.trim_front(35),
        Err(OffloadError::TrimPastChecksumStart { trim: 35, start: 34 })
    );
    // A trim length whose low 16 bits are 0.
    assert_eq!(
        TSO.trim_front(0x1_0000),
        Err(OffloadError::TrimPastChecksumStart { trim: 0x1_0000, start: 34 })
    );
    // The hint may be shorter than the trim.
    let short = OffloadHeader { header_len: 20, ..TSO };
    assert_eq!(short.trim_front(30).unwrap().header_len, 0);
    let plain = OffloadHeader { header_len: 42, ..OffloadHeader::NONE };
    assert_eq!(plain.trim_front(usize::MAX).unwrap().header_len, 0);
}

#[test]
fn a_verified_checksum_is_to_be_verified_again_after_a_trim() {
    let valid = OffloadHeader { checksum: Checksum::DataValid, ..OffloadHeader::NONE };
    assert_eq!(valid.trim_front(0).unwrap().checksum, Checksum::DataValid);
    assert_eq!(valid.trim_front(50).unwrap().checksum, Checksum::Complete);
}

#[test]
fn a_guest_gets_one_buffer_and_a_device_gets_no_claims() {
    let received = OffloadHeader { checksum: Checksum::DataValid, ..OffloadHeader::NONE };
    assert_eq!(received.for_guest(), OffloadHeader { num_buffers: 1, ..received });
    assert_eq!(received.for_guest().for_sending(), OffloadHeader::NONE);
    assert_eq!(TSO.for_guest().for_sending(), TSO);

    let mut bytes = bytes_of(TSO);
    set_num_buffers(&mut bytes, 1);
    assert_eq!(OffloadHeader::parse(&bytes), Ok(TSO.for_guest()));
}

#[test]
fn every_rule_has_a_sentence_of_its_own() {
    use OffloadError as E;
    let errors = [
        E::ReservedFlags { flags: 0x18 },
        E::CoalescingInfo,
        E::UnknownGsoType { gso_type: GSO_TCPV4 + 1 },
        E::ChecksumStartInEthernet { start: 13 },
        E::ChecksumPastEnd { start: 34, offset: 16, packet_len: 50 },
        E::GsoWithoutChecksum,
        E::GsoChecksumOffset { offset: 6, expected: 16 },
        E::TransportPastEnd { start: 34, packet_len: 53 },
        E::SegmentSize { size: 0 },
        E::EcnWithoutTcp,
        E::HeaderLenPastEnd { header_len: 61, packet_len: 60 },
        E::TrimPastChecksumStart { trim: 35, start: 34 },
    ];
    let sentences: HashSet<_> = errors.iter().map(|error| error.to_string()).collect();
    assert_eq!(sentences.len(), errors.len());
    assert_eq!(errors[0].to_string(), "the offload header has reserved flags set (0x18)");
    let _: &dyn std::error::Error = &errors[0];
    assert_eq!(GSO_UDP_L4, 5);
}
