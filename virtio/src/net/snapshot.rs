//! [`Snapshot`]: what a device must know to go on elsewhere, as bytes.
//!
//! All numbers are little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | the magic `VNET` |
//! | 4 | the version, 1 |
//! | 8, 8 | the features that the driver has accepted; the offloads that it accepts now |
//! | 6, 2 | the MAC address; the MTU |
//! | 1 | bit 0: the link is up; bit 1: the driver is to announce itself |
//! | 2, 2 | the pairs of queues; how many of them the driver uses |
//! | 2 | the number of queues, which follow |
//! | 7 each | index, next available index, next used index; bit 0 of the last byte: enabled |

use crate::net::features::Features;
use crate::net::limits::PAIRS_MAX;
use crate::queue::{QueueState, SIZE_MAX};

const MAGIC: [u8; 4] = *b"VNET";
const VERSION: u32 = 1;

/// A queue of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SavedQueue {
    /// The queue.
    pub index: u16,
    /// How far it was.
    pub state: QueueState,
    /// Whether it was enabled.
    pub enabled: bool,
}

/// The fields of a snapshot. They are well-formed, and perhaps not of this device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) accepted: Features,
    pub(super) guest_offloads: Features,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    pub(super) link_up: bool,
    pub(super) announcing: bool,
    pub(super) pairs: u16,
    pub(super) active_pairs: u16,
    pub(super) queues: Vec<SavedQueue>,
}

impl Snapshot {
    pub(super) fn write(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.accepted.bits().to_le_bytes());
        bytes.extend(self.guest_offloads.bits().to_le_bytes());
        bytes.extend(self.mac);
        bytes.extend(self.mtu.to_le_bytes());
        bytes.push(u8::from(self.link_up) | u8::from(self.announcing) << 1);
        bytes.extend(self.pairs.to_le_bytes());
        bytes.extend(self.active_pairs.to_le_bytes());
        bytes.extend((self.queues.len() as u16).to_le_bytes());
        for SavedQueue { index, state, enabled } in &self.queues {
            for number in [*index, state.next_available, state.next_used] {
                bytes.extend(number.to_le_bytes());
            }
            bytes.push((*enabled).into());
        }
        bytes
    }

    /// Reads a snapshot. An error says what is wrong with the bytes, which anybody may have written.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut reader = Reader(bytes);
        if reader.take()? != MAGIC {
            return Err("it has another magic");
        }
        if u32::from_le_bytes(reader.take()?) != VERSION {
            return Err("it has another version");
        }
        let accepted = Features::from_bits(u64::from_le_bytes(reader.take()?));
        let guest_offloads = Features::from_bits(u64::from_le_bytes(reader.take()?));
        let mac: [u8; 6] = reader.take()?;
        let mtu = reader.number()?;
        let [flags] = reader.take()?;
        let (pairs, active_pairs) = (reader.number()?, reader.number()?);
        if !accepted.has(guest_offloads) {
            return Err("it has offloads that were not negotiated");
        }
        if mac[0] & 1 != 0 {
            return Err("its MAC address is a group's");
        }
        if flags > 3 {
            return Err("it has unknown flags");
        }
        if !(1..=PAIRS_MAX).contains(&pairs) || !(1..=pairs).contains(&active_pairs) {
            return Err("it has an impossible number of pairs");
        }
        let count = reader.number()?;
        if count > pairs * 2 + 1 {
            return Err("it has too many queues");
        }
        let mut queues: Vec<SavedQueue> = Vec::with_capacity(count.into());
        for _ in 0..count {
            let [index, next_available, next_used] =
                [reader.number()?, reader.number()?, reader.number()?];
            let [enabled] = reader.take()?;
            let state = QueueState { next_available, next_used };
            if index > pairs * 2 || queues.last().is_some_and(|last| last.index >= index) {
                return Err("its queues are not in order");
            }
            if u32::from(next_available.wrapping_sub(next_used)) > SIZE_MAX || enabled > 1 {
                return Err("a queue is in an impossible state");
            }
            queues.push(SavedQueue { index, state, enabled: enabled == 1 });
        }
        if !reader.0.is_empty() {
            return Err("it is too long");
        }
        let (link_up, announcing) = (flags & 1 != 0, flags & 2 != 0);
        Ok(Self {
            accepted,
            guest_offloads,
            mac,
            mtu,
            link_up,
            announcing,
            pairs,
            active_pairs,
            queues,
        })
    }
}

/// Bytes that are read from the front.
struct Reader<'b>(&'b [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (taken, rest) = self.0.split_first_chunk().ok_or("it is too short")?;
        self.0 = rest;
        Ok(*taken)
    }

    fn number(&mut self) -> Result<u16, &'static str> {
        self.take().map(u16::from_le_bytes)
    }
}
