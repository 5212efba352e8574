//! The pcap format (draft-ietf-opsawg-pcap), with the older forms that libpcap reads too.

use std::io::Read;

use super::format::{ETHERNET, link_name};
use super::record::{Input, Order, Record, Stop, without_fcs};

/// The length of the file's header, in bytes.
const HEADER_LEN: usize = 24;
/// In the header's last field, the bit that says that the length of the frame check sequence is
/// there (draft-ietf-opsawg-pcap, section 4).
const FCS_LEN_PRESENT: u32 = 0x0400_0000;

/// A pcap file that is being read.
#[derive(Debug)]
pub(super) struct Pcap<R> {
    input: Input<R>,
    order: Order,
    /// The length of a record's header, in bytes.
    header_len: usize,
    swapped: Swapped,
    fcs_len: usize,
    buffer: Vec<u8>,
}

/// Whether a record has its two lengths in the opposite order. In the versions before 2.3 it has,
/// and in 2.3 it may (libpcap, `sf-pcap.c`).
#[derive(Clone, Copy, Debug)]
enum Swapped {
    Never,
    Always,
    IfLonger,
}

/// The byte order and the length of a record's header of a file that begins with `magic`.
pub(super) fn recognize(magic: [u8; 4]) -> Option<(Order, usize)> {
    let number = u32::from_le_bytes(magic);
    [(Order::Little, number), (Order::Big, number.swap_bytes())].into_iter().find_map(
        |(order, number)| match number {
            // Timestamps in microseconds and in nanoseconds. Nobody looks at them here.
            0xa1b2_c3d4 | 0xa1b2_3c4d => Some((order, 16)),
            // The modified format of some old Linux distributions: 8 more bytes.
            0xa1b2_cd34 => Some((order, 24)),
            _ => None,
        },
    )
}

impl<R: Read> Pcap<R> {
    /// Reads the file's header. Fails with a clause if no packet can be read or replayed.
    pub(super) fn open(
        mut input: Input<R>,
        (order, header_len): (Order, usize),
    ) -> Result<Self, Stop> {
        let mut header = [0; HEADER_LEN];
        input.fill(&mut header)?;
        let version = (order.u16(&header, 4), order.u16(&header, 6));
        let swapped = match version {
            (2, 4) => Swapped::Never,
            (2, 3) => Swapped::IfLonger,
            (2, 0..=2) | (543, 0) => Swapped::Always,
            (major, minor) => {
                let clause =
                    format!("the capture's version is {major}.{minor}, and 2.4 is the last one");
                return Err(Stop::Damaged(clause));
            }
        };
        let link = order.u32(&header, 20);
        if link as u16 != ETHERNET {
            return Err(Stop::Damaged(not_ethernet(link as u16)));
        }
        let fcs_len = if link & FCS_LEN_PRESENT == 0 { 0 } else { 2 * (link >> 28) as usize };
        Ok(Self { input, order, header_len, swapped, fcs_len, buffer: Vec::new() })
    }

    /// Returns the next packet.
    pub(super) fn next(&mut self) -> Result<Record<'_>, Stop> {
        let mut header = [0; 24];
        let header = &mut header[..self.header_len];
        self.input.fill(header).map_err(|stop| match stop {
            Stop::End => Stop::End,
            other => other.inside(true),
        })?;
        let (mut captured, mut original) = (self.order.u32(header, 8), self.order.u32(header, 12));
        let swap = match self.swapped {
            Swapped::Never => false,
            Swapped::Always => true,
            Swapped::IfLonger => captured > original,
        };
        if swap {
            (captured, original) = (original, captured);
        }
        // The snapshot length is not looked at: every record has its own lengths, and the header's
        // is 0 or too small in many files.
        let read = self.input.packet(&mut self.buffer, captured, original);
        Ok(match read.map_err(|stop| stop.inside(true))? {
            Ok(()) => without_fcs(&self.buffer, self.fcs_len),
            Err(unfit) => Record::Unfit(unfit),
        })
    }

    pub(super) fn at(&self) -> u64 {
        self.input.at()
    }
}

/// The clause that refuses a file of another link type.
pub(super) fn not_ethernet(link: u16) -> String {
    let name = link_name(link).map_or(String::new(), |name| format!(" ({name})"));
    format!("the capture's link type is {link}{name}, but only Ethernet can be replayed")
}
