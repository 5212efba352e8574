//! The forms in which tcpdump, dumpcap, Wireshark and others write captures: every whole Ethernet
//! packet is replayed, what cannot be is counted by its reason, and a file that is cut off or
//! damaged is replayed up to there.

use proptest::prelude::*;
use vmring::device::pcap::Replay;
use vmring::{ConfigError, Direction, Error, Interface};

use super::Scratch;
use crate::support::{guarded, inline, packet, post, unique};

/// What became of a file that was replayed.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    packets: Vec<Vec<u8>>,
    /// The reasons that occurred.
    drops: Vec<(&'static str, u64)>,
    note: Option<String>,
}

/// Replays a file to its end. An error is the sentence that refuses the file.
fn replayed(bytes: &[u8]) -> Result<Outcome, String> {
    let file = Scratch::holding(&unique("form"), bytes);
    let replay = Replay::open(&file.0).map_err(|error| match error {
        Error::Config(ConfigError::Invalid(sentence)) => sentence,
        other => panic!("{other}"),
    })?;
    let interface = Interface::builder().device(replay.clone()).start().unwrap();
    let mut ring = inline(&interface, Direction::Read).build().unwrap();
    let mut packets = Vec::new();
    // Reaping an inline ring drives its device. The last time finds what was left out at the end.
    for _ in 0..=replay.packets() {
        post(&mut ring, 0);
        packets.extend(ring.reap().map(|done| done.take_packet().unwrap().to_vec()));
    }
    assert_eq!((replay.left(), packets.len() as u64), (0, replay.packets()));
    let drops = interface.drops().into_iter().filter(|(_, n)| *n > 0).collect();
    Ok(Outcome { packets, drops, note: replay.note().map(str::to_owned) })
}

/// The byte order of what is built.
#[derive(Clone, Copy, Debug)]
enum Order {
    Little,
    Big,
}
use Order::{Big, Little};

impl Order {
    fn u16(self, n: u16) -> [u8; 2] {
        match self {
            Little => n.to_le_bytes(),
            Big => n.to_be_bytes(),
        }
    }

    fn u32(self, n: u32) -> [u8; 4] {
        match self {
            Little => n.to_le_bytes(),
            Big => n.to_be_bytes(),
        }
    }

    fn words(self, words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| self.u32(*word)).collect()
    }
}

const ETHERNET: u32 = 1;
const LINUX_SLL: u32 = 113;
const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const MODIFIED: u32 = 0xa1b2_cd34;

/// A pcap file.
struct Pcap {
    order: Order,
    magic: u32,
    version: (u16, u16),
    snap_len: u32,
    link: u32,
}

impl Default for Pcap {
    fn default() -> Self {
        let (magic, version) = (MICROSECONDS, (2, 4));
        Self { order: Little, magic, version, snap_len: 262_144, link: ETHERNET }
    }
}

impl Pcap {
    /// The file with these records: the two lengths in the order of the file, and the data.
    fn with(&self, records: &[(u32, u32, &[u8])]) -> Vec<u8> {
        let order = self.order;
        let mut file = order.u32(self.magic).to_vec();
        file.extend(order.u16(self.version.0));
        file.extend(order.u16(self.version.1));
        // Some old writers had a time zone and an accuracy here.
        file.extend(order.words(&[3600, 6, self.snap_len, self.link]));
        for (first, second, data) in records {
            file.extend(order.words(&[1, 999_999_999, *first, *second]));
            if self.magic == MODIFIED {
                file.extend([0xee; 8]);
            }
            file.extend(*data);
        }
        file
    }

    fn of(&self, packets: &[Vec<u8>]) -> Vec<u8> {
        let records: Vec<_> =
            packets.iter().map(|p| (p.len() as u32, p.len() as u32, &p[..])).collect();
        self.with(&records)
    }
}

/// An option list without an end mark, in the little byte order.
fn options(order: Order, options: &[(u16, &[u8])]) -> Vec<u8> {
    let mut list = Vec::new();
    for (code, value) in options {
        list.extend(order.u16(*code));
        list.extend(order.u16(value.len() as u16));
        list.extend(*value);
        list.resize(list.len().next_multiple_of(4), 0);
    }
    list
}

/// A pcapng file.
struct Blocks {
    order: Order,
    file: Vec<u8>,
}

impl Blocks {
    fn new(order: Order) -> Self {
        Self { order, file: Vec::new() }.section(order, -1, &[])
    }

    fn section(mut self, order: Order, len: i64, options: &[u8]) -> Self {
        self.order = order;
        let mut body = order.u32(0x1a2b_3c4d).to_vec();
        body.extend(order.u16(1));
        body.extend(order.u16(0));
        body.extend(match order {
            Little => len.to_le_bytes(),
            Big => len.to_be_bytes(),
        });
        body.extend(options);
        self.block(0x0a0d_0d0a, &body)
    }

    /// A block with this body, padded.
    fn block(mut self, kind: u32, body: &[u8]) -> Self {
        let len = 12 + body.len().next_multiple_of(4);
        self.file.extend(self.order.words(&[kind, len as u32]));
        self.file.extend(body);
        self.file.resize(self.file.len().next_multiple_of(4), 0xee);
        self.file.extend(self.order.u32(len as u32));
        self
    }

    fn interface(self, link: u32, snap_len: u32, options: &[u8]) -> Self {
        let order = self.order;
        let mut body = order.u16(link as u16).to_vec();
        // Readers must ignore the two reserved bytes.
        body.extend([0xee; 2]);
        body.extend(order.u32(snap_len));
        body.extend(options);
        self.block(1, &body)
    }

    fn enhanced(self, interface: u32, (captured, original): (u32, u32), tail: &[u8]) -> Self {
        let mut body = self.order.words(&[interface, 0x0005_e0c0, 7, captured, original]);
        body.extend(tail);
        self.block(6, &body)
    }

    /// A whole packet.
    fn packet(self, interface: u32, packet: &[u8]) -> Self {
        let len = packet.len() as u32;
        self.enhanced(interface, (len, len), packet)
    }

    fn simple(self, original: u32, data: &[u8]) -> Self {
        let mut body = self.order.u32(original).to_vec();
        body.extend(data);
        self.block(3, &body)
    }
}

/// `packet` with its padding and these options behind it.
fn tail(packet: &[u8], options: &[u8]) -> Vec<u8> {
    let mut tail = packet.to_vec();
    tail.resize(tail.len().next_multiple_of(4), 0);
    tail.extend(options);
    tail
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<_> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

const SECTION: &str = "0a0d0d0a 1c000000 4d3c2b1a 01000000 ffffffffffffffff 1c000000";
const INCOMPLETE: &str = "recorded incompletely";

/// Small files after public bug reports of other readers, byte for byte.
#[test]
fn forms_that_other_readers_once_refused_are_read() {
    let nothing: &[Vec<u8>] = &[];
    for (name, hex, packets, drops) in [
        (
            "an original length above the snapshot length",
            "d4c3b2a1 02000400 00000000 00000000 01000000 01000000
             00000000 00000000 00000000 02000000",
            nothing,
            &[(INCOMPLETE, 1)][..],
        ),
        (
            "a snapshot length of 0",
            "d4c3b2a1 02000400 00000000 00000000 00000000 01000000
             00000000 00000000 01000000 01000000 00",
            &[vec![0]],
            &[],
        ),
        (
            "a packet's options without an end mark",
            "SECTION 01000000 14000000 01000000 00000000 14000000
             06000000 24000000 00000000 c0e00500 00000000 00000000 00000000 01000000 24000000",
            &[vec![]],
            &[],
        ),
        (
            "an interface's options without an end mark",
            "SECTION 01000000 1c000000 01000000 00000000 02000100 65000000 1c000000",
            nothing,
            &[],
        ),
        (
            "a section's options without an end mark",
            "0a0d0d0a 20000000 4d3c2b1a 01000000 ffffffffffffffff 01000000 20000000",
            nothing,
            &[],
        ),
        (
            "a second interface of another link type",
            "SECTION 01000000 14000000 01000000 00000000 14000000
             01000000 14000000 00000000 00000000 14000000
             06000000 20000000 00000000 c0e00500 00000000 00000000 00000000 20000000",
            &[vec![]],
            &[],
        ),
        (
            "a time zone of four bytes",
            "SECTION 01000000 20000000 01000000 00000000 0a000400 00000000 00000000 20000000",
            nothing,
            &[],
        ),
        (
            "a simple packet that ends at the snapshot length, and padding",
            "SECTION 01000000 14000000 01000000 0d000000 14000000
             03000000 20000000 0e000000 020000000001 020000000002 88eeeeee 20000000",
            nothing,
            &[(INCOMPLETE, 1)],
        ),
    ] {
        let file = bytes(&hex.replace("SECTION", SECTION));
        let outcome = Outcome { packets: packets.to_vec(), drops: drops.to_vec(), note: None };
        assert_eq!(replayed(&file), Ok(outcome), "{name}");
    }
}

/// The forms of the pcap format: byte orders, magic numbers, versions, the frame check sequence.
#[test]
fn every_form_of_pcap_is_read() {
    guarded(|| {
        let packets = [packet(0, 60), packet(1, 1514), packet(2, 61)];
        let whole = |outcome: Result<Outcome, String>, name: &str| {
            let expected = Outcome { packets: packets.to_vec(), ..Outcome::default() };
            assert_eq!(outcome, Ok(expected), "{name}");
        };
        for order in [Little, Big] {
            for magic in [MICROSECONDS, NANOSECONDS, MODIFIED] {
                let file = Pcap { order, magic, ..Pcap::default() }.of(&packets);
                whole(replayed(&file), &format!("{order:?} {magic:x}"));
            }
        }
        for snap_len in [0, 1, 60, u32::MAX] {
            let file = Pcap { snap_len, ..Pcap::default() }.of(&packets);
            whole(replayed(&file), &format!("snapshot length {snap_len}"));
        }
        // Two words of a frame check sequence are four bytes, which a device adds by itself. The
        // field counts only if its bit says so.
        let longer: Vec<_> = packets.iter().map(|p| [&p[..], &[1, 2, 3, 4]].concat()).collect();
        let file = Pcap { link: 2 << 28 | 1 << 26 | ETHERNET, ..Pcap::default() }.of(&longer);
        whole(replayed(&file), "with a frame check sequence");
        let file = Pcap { link: 2 << 28 | ETHERNET, ..Pcap::default() }.of(&packets);
        whole(replayed(&file), "without its bit");
        // Old versions have the two lengths in the other order, or perhaps so.
        let record = |first: u32, second: u32, data| (first, second, data);
        let data = &packets[0][..];
        for (version, first, second, is_whole) in [
            ((2, 4), 60, 1514, false),
            ((2, 3), 60, 1514, false),
            ((2, 3), 1514, 60, false),
            ((2, 2), 1514, 60, false),
            ((2, 0), 60, 60, true),
            ((543, 0), 1514, 60, false),
            // An original length that is too small: the packet is what was recorded.
            ((2, 4), 60, 59, true),
            ((2, 4), 60, 0, true),
        ] {
            let file = Pcap { version, ..Pcap::default() }.with(&[record(first, second, data)]);
            let outcome = replayed(&file).unwrap();
            let drops: &[_] = if is_whole { &[] } else { &[(INCOMPLETE, 1)] };
            assert_eq!(outcome.drops, drops, "{version:?} {first} {second}");
            assert_eq!(outcome.packets.len(), usize::from(is_whole));
        }
    });
}

/// The forms of the pcapng format.
#[test]
fn every_form_of_pcapng_is_read() {
    guarded(|| {
        let packets = [packet(0, 60), packet(1, 61), packet(2, 62), packet(3, 63)];
        let [a, b, c, d] = &packets;
        for order in [Little, Big] {
            let custom = |kind| (kind, [order.words(&[32_473]), vec![1; 7]].concat());
            let list = |all: &[(u16, &[u8])]| options(order, all);
            let fcs = |packet: &[u8]| [packet, &[1, 2, 3, 4]].concat();
            let flags = order.u32(4 << 5 | 1);
            let mut file = Blocks::new(order);
            // Blocks that are not packets, as dumpcap and others write them: custom, name
            // resolution, statistics, secrets, a journal, and one that nobody knows.
            for (kind, body) in [
                custom(0xbad),
                custom(0x4000_0bad),
                (4, order.words(&[0])),
                (5, order.words(&[0, 1, 2])),
                (0xa, order.words(&[0x544c_534b, 3, 0x0065_6b6b])),
                (9, b"__CURSOR=1\n\n".to_vec()),
                (0x7777_7777, vec![9; 70_000]),
                (0x8888_8888, vec![]),
            ] {
                file = file.block(kind, &body);
            }
            file = file
                // Names, a resolution in powers of two, an offset, and an unknown option.
                .interface(
                    ETHERNET,
                    0,
                    &list(&[
                        (2, b"eth0"),
                        (9, &[0x80 | 20]),
                        (14, &[0xff; 8]),
                        (0x7fff, b"xyz"),
                        (0, b""),
                    ]),
                )
                // A frame check sequence of 4 bytes: in bits, and in bytes.
                .interface(ETHERNET, 65_535, &list(&[(13, &[32])]))
                .interface(ETHERNET, 65_535, &list(&[(13, &[4])]))
                .packet(0, a)
                .enhanced(0, (61, 61), &tail(b, &list(&[(1, b"a comment"), (0x7fff, b"?")])))
                // A comment of 65,532 bytes.
                .enhanced(0, (62, 62), &tail(c, &list(&[(1, &[b'x'; 65_532]), (0, b"")])))
                .packet(1, &fcs(d))
                .packet(2, &fcs(a))
                // The flags of a packet override its interface.
                .enhanced(0, (65, 65), &tail(&fcs(b), &list(&[(1, b"!"), (2, &flags)])))
                .simple(62, c);
            // The obsolete packet block: interface 0, and 0xffff lost packets.
            let mut old = [order.u16(0), order.u16(0xffff)].concat();
            old.extend(order.words(&[0, 0, 63, 63]));
            old.extend(d);
            file = file.block(2, &old);
            let twice = [&packets[..], &packets[..]].concat();
            let expected = Outcome { packets: twice, ..Outcome::default() };
            assert_eq!(replayed(&file.file), Ok(expected), "{order:?}");
        }
    });
}

/// Sections begin anew: with their own byte order, interfaces and length.
#[test]
fn sections_follow_each_other_in_either_byte_order() {
    let [a, b, c] = [packet(0, 60), packet(1, 61), packet(2, 62)];
    let first = Blocks::new(Little).interface(ETHERNET, 0, &[]).packet(0, &a);
    // The second section has no interface yet when its first packet comes, and a wrong length.
    let second = first
        .section(Big, 8, &options(Big, &[(4, b"dumpcap")]))
        .packet(0, &b)
        .interface(LINUX_SLL, 0, &[])
        .interface(ETHERNET, 0, &[])
        .packet(0, &a)
        .packet(1, &b);
    let third = second.section(Little, 0, &[]).interface(ETHERNET, 0, &[]).simple(62, &c);
    let drops = vec![("not Ethernet", 1), ("of an interface that the file does not describe", 1)];
    let expected = Outcome { packets: vec![a, b, c], drops, note: None };
    assert_eq!(replayed(&third.file), Ok(expected));
}

/// What cannot be replayed, each counted by its reason, between packets that are.
#[test]
fn what_cannot_be_replayed_is_counted_by_reason() {
    guarded(|| {
        let good = packet(7, 100);
        let big = vec![5; 65_550];
        let huge = vec![5; 70_000];
        let len = |bytes: &[u8]| bytes.len() as u32;
        for order in [Little, Big] {
            let file = Blocks::new(order)
                .interface(ETHERNET, 64, &[])
                .interface(0, 0, &[])
                // An interface description that is too short has a number all the same.
                .block(1, &[1, 0, 0, 0])
                .interface(ETHERNET, 0, &options(order, &[(13, &[4])]))
                .packet(0, &good)
                .enhanced(0, (60, 100), &good[..60])
                .enhanced(0, (0, 100), &[])
                .packet(0, &big)
                .packet(0, &huge)
                .packet(0, &big[..65_549])
                .enhanced(0, (100, 70_000), &good)
                .packet(1, &good)
                .packet(2, &good)
                .packet(4, &good)
                .packet(u32::MAX, &good)
                // A captured length behind the end of the block, and blocks that are too short.
                .enhanced(0, (101, 101), &good)
                .enhanced(0, (u32::MAX, u32::MAX), &good)
                .block(6, &[0; 16])
                .block(3, &[])
                // Shorter than its frame check sequence.
                .packet(3, &[1, 2, 3])
                // The snapshot length is 64, and this block has less.
                .simple(100, &good[..40])
                .simple(64, &good[..64])
                .packet(0, &good);
            let drops = vec![
                (INCOMPLETE, 4),
                ("too big", 2),
                ("not Ethernet", 2),
                ("of an interface that the file does not describe", 2),
                ("malformed in the file", 5),
            ];
            let packets =
                vec![good.clone(), big[..65_549].to_vec(), good[..64].to_vec(), good.clone()];
            assert_eq!(replayed(&file.file), Ok(Outcome { packets, drops, note: None }));
            let file = Pcap { order, ..Pcap::default() }.with(&[
                (len(&good), len(&good), &good),
                (len(&big), len(&big), &big),
                (len(&huge), len(&huge), &huge),
                (len(&huge), 80_000, &huge),
                (0, 0, &[]),
                (0, 60, &[]),
                (13, 13, &good[..13]),
            ]);
            let packets = vec![good.clone(), vec![], good[..13].to_vec()];
            let drops = vec![(INCOMPLETE, 2), ("too big", 2)];
            assert_eq!(replayed(&file), Ok(Outcome { packets, drops, note: None }));
        }
    });
}

/// Goal: wherever a file is cut off, the whole packets before the cut are replayed, the packet in
/// the middle of which it is cut is counted, and a note says so. Method: cut after every byte.
#[test]
fn a_file_that_is_cut_off_is_replayed_up_to_there_with_a_note() {
    guarded(|| {
        let packets = [packet(0, 61), packet(1, 62)];
        let [a, b] = &packets;
        let ng = |n: usize| match n {
            0 => Blocks::new(Big).interface(ETHERNET, 0, &[]).file,
            1 => Blocks::new(Big).interface(ETHERNET, 0, &[]).packet(0, a).file,
            _ => Blocks::new(Big).interface(ETHERNET, 0, &[]).packet(0, a).packet(0, b).file,
        };
        let pcap = |n: usize| Pcap::default().of(&packets[..n]);
        for (name, ends) in
            [("pcapng", [0, 1, 2].map(|n| ng(n).len())), ("pcap", [0, 1, 2].map(|n| pcap(n).len()))]
        {
            let file = if name == "pcap" { pcap(2) } else { ng(2) };
            for cut in ends[0]..=file.len() {
                let outcome = replayed(&file[..cut]).unwrap();
                let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
                assert_eq!(outcome.packets, packets[..whole], "{name} cut at {cut}");
                if ends.contains(&cut) {
                    assert_eq!((outcome.note, outcome.drops), (None, vec![]), "{name} at {cut}");
                    continue;
                }
                let note = outcome.note.expect("a note");
                assert!(note.contains("in the middle of a record"), "{note}");
                // In the first 8 bytes of a block nothing says yet that it is a packet.
                let begun = cut - ends[whole];
                let known = name == "pcap" || begun >= 8;
                let drops: &[_] =
                    if known { &[("cut off by the end of the file", 1)] } else { &[] };
                assert_eq!(outcome.drops, drops, "{name} cut at {cut}");
            }
        }
    });
}

#[test]
fn a_file_that_is_damaged_is_replayed_up_to_there_with_a_note() {
    let good = packet(7, 100);
    let before = Blocks::new(Little).interface(ETHERNET, 0, &[]).packet(0, &good);
    let begin = before.file;
    let mut two_lengths = Blocks { order: Little, file: begin.clone() }.packet(0, &good).file;
    let last = two_lengths.len() - 4;
    two_lengths[last] ^= 4;
    let mut version = Blocks { order: Little, file: begin.clone() }.section(Little, -1, &[]).file;
    version[begin.len() + 12] = 2;
    for (name, bytes, said) in [
        // As a file system leaves the end of a file after a crash.
        ("zeros", [&begin[..], &[0; 100]].concat(), "a block has 0 bytes, which is too few"),
        ("two lengths", two_lengths, "132 bytes at its beginning and 128 at its end"),
        ("a version", version, "a section has the version 2.0, and only 1 is known"),
        (
            "no byte order",
            [&begin[..], &0x0a0d_0d0a_u32.to_le_bytes(), &[28, 0, 0, 0], &[7; 20]].concat(),
            "a section header has no byte order",
        ),
        (
            "a short section header",
            [&begin[..], &bytes("0a0d0d0a 10000000 4d3c2b1a 10000000")].concat(),
            "a section header has 16 bytes",
        ),
    ] {
        let outcome = replayed(&bytes).unwrap();
        assert_eq!(outcome.packets, [&good[..]], "{name}");
        let note = outcome.note.expect("a note");
        assert!(note.contains("is damaged near byte") && note.contains(said), "{name}: {note}");
    }
    // A block whose length is no multiple of 4 is followed by its padding.
    let mut odd = begin.clone();
    odd.extend(bytes("77777777 0e000000 eeee eeee 0e000000"));
    let file = Blocks { order: Little, file: odd }.packet(0, &good).file;
    let expected = Outcome { packets: vec![good.clone(), good], ..Outcome::default() };
    assert_eq!(replayed(&file), Ok(expected));
}

#[test]
fn a_file_that_is_no_ethernet_capture_is_refused_in_a_sentence() {
    let sll = Pcap { link: LINUX_SLL, ..Pcap::default() }.of(&[packet(0, 100)]);
    let sll_blocks = Blocks::new(Little).interface(LINUX_SLL, 0, &[]).packet(0, &packet(0, 100));
    let archaic = Pcap { version: (1, 2), ..Pcap::default() }.of(&[]);
    let next = Pcap { version: (2, 5), ..Pcap::default() }.of(&[]);
    let neither = "the capture is neither pcap nor pcapng; if it is in another format, convert it \
                   first, with editcap -F pcapng";
    let other_link =
        "the capture's link type is 113 (LINUX_SLL), but only Ethernet can be replayed";
    for (file, sentence) in [
        (&b""[..], "the capture is empty"),
        (b"ab", neither),
        (b"this is no capture at all, whoever wrote it", neither),
        (b"snoop\0\0\0\0\0\0\x02\0\0\0\x04", neither),
        (&sll[..10], "the capture ends within its header"),
        (&sll_blocks.file[..20], "the capture ends within its header"),
        (&sll, other_link),
        (&sll_blocks.file, other_link),
        (&archaic, "the capture's version is 1.2, and 2.4 is the last one"),
        (&next, "the capture's version is 2.5, and 2.4 is the last one"),
        (&[0x1f, 0x8b, 8, 0, 0], "the capture is compressed; decompress it first, with gunzip"),
        (
            &[0x28, 0xb5, 0x2f, 0xfd, 0],
            "the capture is compressed; decompress it first, with unzstd",
        ),
        (
            &[0x04, 0x22, 0x4d, 0x18, 0],
            "the capture is compressed; decompress it first, with unlz4",
        ),
    ] {
        assert_eq!(replayed(file), Err(sentence.to_owned()));
    }
}

/// Neither a pipe nor a directory nor a device is waited for.
#[test]
fn what_is_not_a_regular_file_is_refused_at_once() {
    guarded(|| {
        let folder = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let pipe = Scratch(folder.join(unique("pipe")));
        let made = std::process::Command::new("mkfifo").arg(&pipe.0).status().unwrap();
        assert!(made.success());
        for (path, what) in [
            (pipe.0.as_path(), "a pipe"),
            (std::path::Path::new("/dev/zero"), "a device"),
            (folder.as_path(), "a directory"),
        ] {
            let error = Replay::open(path).unwrap_err();
            let said = format!(
                "the capture is {what}, and a replay reads a regular file twice; save it in a file \
                 first"
            );
            assert!(
                matches!(&error, Error::Config(ConfigError::Invalid(text)) if *text == said),
                "{error}"
            );
        }
    });
}

/// A file that another program still writes has the packets it had when it was opened.
#[test]
fn what_is_appended_later_is_not_replayed() {
    let packets = [packet(0, 60), packet(1, 61)];
    let file = Scratch::holding(&unique("growing"), &Pcap::default().of(&packets[..1]));
    let replay = Replay::open(&file.0).unwrap();
    std::fs::write(&file.0, Pcap::default().of(&packets)).unwrap();
    let interface = Interface::builder().device(replay.clone()).start().unwrap();
    let mut ring = inline(&interface, Direction::Read).build().unwrap();
    (0..4).for_each(|number| post(&mut ring, number));
    let came: Vec<_> = ring.reap().map(|done| done.take_packet().unwrap().to_vec()).collect();
    assert_eq!((came, replay.left()), (packets[..1].to_vec(), 0));
}

proptest! {
    /// Goal: no file makes the reader panic, hang or grow, and both times it reads the file it
    /// finds the same packets. Method: change, remove and repeat bytes of a file that has every
    /// kind of block.
    #[test]
    fn no_damage_to_a_file_confuses_the_reader(
        order in prop_oneof![Just(Little), Just(Big)],
        is_pcap in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
        moved in prop::option::of((any::<prop::sample::Index>(), any::<prop::sample::Index>())),
    ) {
        let [a, b] = [packet(0, 61), packet(1, 62)];
        let mut file = if is_pcap {
            Pcap { order, ..Pcap::default() }.of(&[a, b])
        } else {
            Blocks::new(order)
                .interface(ETHERNET, 0, &options(order, &[(2, b"eth0"), (13, &[32])]))
                .packet(0, &a)
                .enhanced(0, (61, 61), &tail(&a, &options(order, &[(2, &order.u32(4 << 5))])))
                .simple(62, &b)
                .block(0xbad, &[1; 20])
                .section(order, -1, &[])
                .interface(ETHERNET, 0, &[])
                .packet(0, &b)
                .file
        };
        for (at, value) in changes {
            let at = at.index(file.len());
            file[at] ^= value;
        }
        if let Some((from, to)) = moved {
            let (from, to) = (from.index(file.len()), to.index(file.len()));
            file = [&file[..from], &file[to..]].concat();
        }
        if is_cut && !file.is_empty() {
            file.truncate(cut.index(file.len()));
        }
        if let Ok(outcome) = replayed(&file) {
            let len: usize = outcome.packets.iter().map(Vec::len).sum();
            prop_assert!(len <= file.len(), "bytes that are not in the file");
        }
    }
}
