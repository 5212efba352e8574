//! The memory of a guest, for tests: buffers of any shape, and what is in them.

use std::collections::HashMap;
use std::sync::Arc;

use vmring::guest::{GuestMemory, GuestRegion};
use vmring::{GuestBuffer, SegmentTable};
use vmring_core::HeapBacking;

use crate::support::Dice;

/// The bytes of a `virtio_net_hdr`.
pub(crate) const HEADER: u32 = 12;

/// The address of a guest's first byte.
const START: u64 = 0x10_0000;

/// A guest with equal areas of memory, each for one buffer. A buffer is cut into segments at random.
pub(crate) struct Guest {
    table: SegmentTable,
    area: u64,
    /// The bytes of a buffer for the longest packet: a header and the packet.
    len: u32,
    free: Vec<u64>,
    /// The segments of the buffers that are in use, by the `user_data` of their entries.
    used: HashMap<u64, Vec<(u64, u32)>>,
    dice: Dice,
}

impl Guest {
    /// A guest with `buffers` buffers for packets of at most `packet` bytes.
    pub(crate) fn new(buffers: usize, packet: usize) -> Self {
        let len = packet as u32 + HEADER;
        // The segments of a buffer lie apart from each other.
        let area = u64::from(len) + 1024;
        let backing = Arc::new(HeapBacking::new(area as usize * buffers));
        let memory = GuestMemory::new([GuestRegion::new(START, backing)]).expect("a region");
        let table = SegmentTable::new(memory, buffers as u32 * 16).expect("a table");
        let free = (0..buffers as u64).map(|i| START + i * area).collect();
        Self { table, area, len, free, used: HashMap::new(), dice: Dice::new(7) }
    }

    pub(crate) fn table(&self) -> &SegmentTable {
        &self.table
    }

    /// A buffer with space for the longest packet, in one segment or in several.
    pub(crate) fn buffer(&mut self, user_data: u64) -> GuestBuffer {
        self.buffer_of(user_data, self.len)
    }

    /// A buffer with a packet, and with a header that asks for nothing.
    pub(crate) fn packet(&mut self, user_data: u64, bytes: &[u8]) -> GuestBuffer {
        let mut buffer = self.buffer_of(user_data, bytes.len() as u32 + HEADER);
        buffer.copy_from(bytes).expect("it is as long");
        assert!(buffer.set_header(&[0; HEADER as usize]));
        buffer
    }

    /// A buffer of `len` bytes, header included.
    pub(crate) fn buffer_of(&mut self, user_data: u64, len: u32) -> GuestBuffer {
        let pieces = 1 + self.dice.below(6);
        self.buffer_in(user_data, len, pieces)
    }

    /// As [`buffer_of`](Self::buffer_of), in one piece.
    #[cfg(target_os = "linux")]
    pub(crate) fn piece_of(&mut self, user_data: u64, len: u32) -> GuestBuffer {
        self.buffer_in(user_data, len, 1)
    }

    /// As [`buffer_of`](Self::buffer_of), in so many pieces.
    pub(crate) fn buffer_in(&mut self, user_data: u64, len: u32, pieces: u64) -> GuestBuffer {
        let mut at = self.free.pop().expect("a guest has as many areas as a ring has entries");
        let (mut ranges, mut left) = (Vec::new(), len);
        for piece in (1..=pieces).rev() {
            let some = self.dice.below(u64::from(left) + 1) as u32;
            // The first segment has a byte, for it names the area.
            let len = if piece == 1 { left } else { some.max(u32::from(ranges.is_empty())) };
            ranges.push((at, len));
            at += u64::from(len) + self.dice.below(100);
            left -= len;
        }
        let buffer = self.table.buffer(ranges.iter().copied(), HEADER);
        assert!(self.used.insert(user_data, ranges).is_none(), "{user_data} is in use");
        buffer.expect("the table has space for each area")
    }

    /// The header and the packet, of `len` bytes, in the buffer of this entry.
    pub(crate) fn bytes(&self, user_data: u64, len: usize) -> ([u8; HEADER as usize], Vec<u8>) {
        let all = self.all_bytes(user_data);
        let (header, packet) = all.split_at(HEADER as usize);
        (header.try_into().expect("12 bytes"), packet[..len].to_vec())
    }

    /// Every byte of the buffer of this entry.
    pub(crate) fn all_bytes(&self, user_data: u64) -> Vec<u8> {
        let mut all = Vec::new();
        for (address, len) in &self.used[&user_data] {
            let mut piece = vec![0; *len as usize];
            let slice = self.table.memory().slice(*address, *len).expect("it is the guest's");
            assert_eq!(slice.copy_to(&mut piece), piece.len());
            all.extend(piece);
        }
        all
    }

    /// Frees the buffer of an entry that has completed.
    pub(crate) fn free(&mut self, user_data: u64) {
        let first = self.used.remove(&user_data).expect("it is in use")[0].0;
        self.free.push(first - (first - START) % self.area);
    }
}
