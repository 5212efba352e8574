//! A capture file that somebody else has written, pcap or pcapng. Reading it must neither panic nor
//! grow, nor bring a byte that is not in the file, and the second look, which replays it, must find as
//! many packets as the first.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmring::device::pcap::Replay;
use vmring::{Direction, Drive, Interface};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    big: bool,
    start: Start,
    pieces: Vec<Piece<'a>>,
    /// How many bytes of the end are missing.
    cut: u8,
}

#[derive(Arbitrary, Debug)]
enum Start {
    Nothing,
    Pcap { magic: u8, minor: u8, snap_len: u32, link: u32 },
    PcapNg { len: Option<u64>, link: u16, snap_len: u32 },
}

#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    Bytes(&'a [u8]),
    /// A packet of a pcap file.
    Record {
        captured: Option<u32>,
        original: Option<u32>,
        extra: u8,
        bytes: &'a [u8],
    },
    /// A block of a pcapng file, whose lengths are mostly right.
    Block {
        kind: u8,
        len: Option<u32>,
        bytes: &'a [u8],
    },
    /// An enhanced packet block.
    Packet {
        interface: u8,
        captured: Option<u32>,
        original: Option<u32>,
        bytes: &'a [u8],
    },
    /// An interface, perhaps with options.
    Interface {
        link: u16,
        snap_len: u32,
        options: &'a [u8],
    },
}

struct Writer {
    big: bool,
    bytes: Vec<u8>,
}

impl Writer {
    fn u16(&mut self, n: u16) {
        self.bytes.extend(if self.big { n.to_be_bytes() } else { n.to_le_bytes() });
    }

    fn u32(&mut self, n: u32) {
        self.bytes.extend(if self.big { n.to_be_bytes() } else { n.to_le_bytes() });
    }

    fn block(&mut self, kind: u32, len: Option<u32>, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.u32(kind);
        self.u32(0);
        body(self);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        let len = len.unwrap_or((self.bytes.len() - start + 4) as u32);
        self.u32(len);
        let place = self.bytes.len() - 4;
        self.bytes.copy_within(place.., start + 4);
    }

    fn interface(&mut self, link: u16, snap_len: u32, options: &[u8]) {
        self.block(1, None, |to| {
            to.u16(link % 3);
            to.u16(0);
            to.u32(snap_len);
            to.bytes.extend(options);
        });
    }

    fn start(&mut self, start: &Start) {
        match *start {
            Start::Nothing => {}
            Start::Pcap { magic, minor, snap_len, link } => {
                let magics = [0xa1b2_c3d4, 0xa1b2_3c4d, 0xa1b2_cd34];
                self.u32(magics[usize::from(magic) % 3]);
                self.u16(2);
                self.u16(u16::from(minor % 6));
                [0, 0, snap_len, link & 0xfc00_0003].into_iter().for_each(|n| self.u32(n));
            }
            Start::PcapNg { len, link, snap_len } => {
                self.block(0x0a0d_0d0a, None, |to| {
                    to.u32(0x1a2b_3c4d);
                    to.u16(1);
                    to.u16(0);
                    let len = len.unwrap_or(u64::MAX);
                    to.u32(len as u32);
                    to.u32((len >> 32) as u32);
                });
                self.interface(link, snap_len, &[]);
            }
        }
    }

    fn piece(&mut self, piece: &Piece<'_>) {
        match *piece {
            Piece::Bytes(bytes) => self.bytes.extend(bytes),
            Piece::Record { captured, original, extra, bytes } => {
                let len = bytes.len() as u32;
                let captured = captured.unwrap_or(len);
                [7, 8, captured, original.unwrap_or(captured)]
                    .into_iter()
                    .for_each(|n| self.u32(n));
                // The modified form has more.
                self.bytes.extend(vec![0; usize::from(extra % 2) * 8]);
                self.bytes.extend(bytes);
            }
            Piece::Block { kind, len, bytes } => {
                self.block((kind % 12).into(), len, |to| to.bytes.extend(bytes));
            }
            Piece::Packet { interface, captured, original, bytes } => {
                let captured = captured.unwrap_or(bytes.len() as u32);
                let original = original.unwrap_or(captured);
                self.block(6, None, |to| {
                    let fields = [u32::from(interface % 4), 0, 0, captured, original];
                    fields.into_iter().for_each(|n| to.u32(n));
                    to.bytes.extend(bytes);
                });
            }
            Piece::Interface { link, snap_len, options } => self.interface(link, snap_len, options),
        }
    }
}

fn memory() -> File {
    // SAFETY: the name ends with a 0.
    let fd = unsafe { libc::memfd_create(c"capture".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a file in memory");
    // SAFETY: the descriptor is new, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }.into()
}

fuzz_target!(|input: Input| {
    let mut writer = Writer { big: input.big, bytes: Vec::new() };
    writer.start(&input.start);
    input.pieces.iter().for_each(|piece| writer.piece(piece));
    let len = writer.bytes.len().saturating_sub(input.cut.into());
    let mut file = memory();
    file.write_all(&writer.bytes[..len]).expect("a file in memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let replay = match Replay::open(path) {
        Ok(replay) => replay,
        Err(error) => return assert!(error.to_string().len() > 10),
    };
    assert!(replay.packets() <= len as u64 && replay.note().is_none_or(|note| note.len() > 10));
    if replay.packets() == 0 {
        return;
    }
    let interface = Interface::builder().device(replay.clone()).start().expect("an interface");
    let ring = interface.ring(Direction::Read).depth(16).frames(16).drive(Drive::Inline);
    let mut ring = ring.build().expect("a ring");
    let (mut packets, mut bytes) = (0, 0);
    // The last time finds what was left out at the end.
    for _ in 0..=replay.packets() {
        while let Some(frame) = ring.alloc() {
            if ring.submit_read(frame, 0).is_err() {
                break;
            }
        }
        for done in ring.reap() {
            if let Ok(packet) = done.take_packet() {
                packets += 1;
                bytes += packet.len();
            }
        }
    }
    assert_eq!((replay.left(), packets), (0, replay.packets()));
    assert!(bytes <= len, "bytes that are not in the file");
});
