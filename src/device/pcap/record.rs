//! What both formats of a capture file have in common: bytes in a byte order, a packet, why it is
//! left out, and how a file ends.

use std::io::{self, BufRead, BufReader, Read};

use vmring_core::view::ETHERNET_HEADER_LEN;

/// The length of the largest packet that is replayed, in bytes: the largest IP packet and an
/// Ethernet header.
pub(super) const LEN_MAX: usize = 65_535 + ETHERNET_HEADER_LEN;
/// The length of the longest frame check sequence that a format can name, in bytes.
const FCS_LEN_MAX: usize = 30;

/// A record of the file that holds a packet.
#[derive(Debug)]
pub(super) enum Record<'a> {
    /// A whole packet, without padding and without a frame check sequence.
    Packet(&'a [u8]),
    /// A packet that cannot be replayed.
    Unfit(Unfit),
}

/// Why a packet is not replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    Truncated,
    TooBig,
    OtherLink,
    NoInterface,
    Malformed,
    Cut,
}

impl Unfit {
    /// Every reason with its name in the counters, in the order of the discriminants.
    pub(super) const ALL: [(Unfit, &'static str); 6] = [
        (Unfit::Truncated, "recorded incompletely"),
        (Unfit::TooBig, "too big"),
        (Unfit::OtherLink, "not Ethernet"),
        (Unfit::NoInterface, "of an interface that the file does not describe"),
        (Unfit::Malformed, "malformed in the file"),
        (Unfit::Cut, "cut off by the end of the file"),
    ];
}

/// Why there is no further record.
#[derive(Debug)]
pub(super) enum Stop {
    /// The file ends behind a whole record.
    End,
    /// The file ends inside a record. The field says whether the record is a packet's.
    Cut { packet: bool },
    /// What follows is not in the file's format, for the reason in this clause.
    Damaged(String),
    /// The file cannot be read.
    Io(io::Error),
}

impl Stop {
    /// Turns an end of the file into one inside a record.
    pub(super) fn inside(self, packet: bool) -> Self {
        match self {
            Stop::End | Stop::Cut { .. } => Stop::Cut { packet },
            other => other,
        }
    }
}

/// The byte order of a file or of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Little,
    Big,
}

impl Order {
    /// Returns the 16 bits at `at`. The caller has made sure that they are there.
    pub(super) fn u16(self, bytes: &[u8], at: usize) -> u16 {
        let bytes = [bytes[at], bytes[at + 1]];
        match self {
            Order::Little => u16::from_le_bytes(bytes),
            Order::Big => u16::from_be_bytes(bytes),
        }
    }

    /// Returns the 32 bits at `at`. The caller has made sure that they are there.
    pub(super) fn u32(self, bytes: &[u8], at: usize) -> u32 {
        let bytes = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        match self {
            Order::Little => u32::from_le_bytes(bytes),
            Order::Big => u32::from_be_bytes(bytes),
        }
    }
}

/// The bytes of a file, and how many of them were read.
#[derive(Debug)]
pub(super) struct Input<R> {
    reader: BufReader<R>,
    at: u64,
}

impl<R: Read> Input<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader: BufReader::with_capacity(1 << 17, reader), at: 0 }
    }

    /// How many bytes were read or skipped.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The next bytes, without reading them: fewer than 4 only if the file has no more.
    pub(super) fn peek(&mut self) -> io::Result<&[u8]> {
        // Only regular files are read, and of those one read returns all that fits the buffer.
        self.reader.fill_buf()
    }

    /// Fills `buffer`. Returns [`Stop::End`] if not a single byte is left.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Stop> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.reader.read(&mut buffer[filled..]) {
                Ok(0) if filled == 0 => return Err(Stop::End),
                Ok(0) => return Err(Stop::Cut { packet: false }),
                Ok(n) => {
                    filled += n;
                    self.at += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Stop::Io(error)),
            }
        }
        Ok(())
    }

    /// Skips `count` bytes.
    pub(super) fn skip(&mut self, count: u64) -> Result<(), Stop> {
        let skipped = io::copy(&mut self.reader.by_ref().take(count), &mut io::sink());
        let skipped = skipped.map_err(Stop::Io)?;
        self.at += skipped;
        if skipped < count { Err(Stop::End) } else { Ok(()) }
    }

    /// Reads the `captured` bytes of a packet that had `original` bytes on the wire into `buffer`.
    /// It reads nothing of a packet that is too big, so a length in a damaged file makes no memory
    /// grow.
    ///
    /// An original length below the captured length counts as the captured length, as both drafts
    /// allow (draft-ietf-opsawg-pcap, section 5; draft-ietf-opsawg-pcapng, section 4.3).
    pub(super) fn packet(
        &mut self,
        buffer: &mut Vec<u8>,
        captured: u32,
        original: u32,
    ) -> Result<Result<(), Unfit>, Stop> {
        let len = captured as usize;
        buffer.clear();
        if len > LEN_MAX + FCS_LEN_MAX {
            self.skip(captured.into())?;
        } else {
            buffer.resize(len, 0);
            self.fill(buffer)?;
        }
        Ok(match captured {
            _ if captured < original => Err(Unfit::Truncated),
            _ if buffer.len() < len => Err(Unfit::TooBig),
            _ => Ok(()),
        })
    }
}

/// Cuts the frame check sequence off a packet, because a device adds its own.
pub(super) fn without_fcs(packet: &[u8], fcs_len: usize) -> Record<'_> {
    match packet.len().checked_sub(fcs_len) {
        Some(len) if len <= LEN_MAX => Record::Packet(&packet[..len]),
        Some(_) => Record::Unfit(Unfit::TooBig),
        None => Record::Unfit(Unfit::Malformed),
    }
}
