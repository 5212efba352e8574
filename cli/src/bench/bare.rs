//! The bare loop: two queues of slot numbers and one copy of each packet, with nothing around them. A ring
//! may take less far apart, because it hands packets over in groups and asks for cache lines ahead.

use std::cell::UnsafeCell;

use super::carry::{Receives, Sends};
use super::check::{Account, Pattern};
use super::limits::window;
use super::queue::{Queue, Reader, Writer};
use super::setup::Setup;
use crate::failure::Failure;

/// A slot begins with a cache line, like a ring's.
#[repr(C, align(64))]
struct Line(UnsafeCell<[u8; 64]>);

/// The receiver's slots, which the sender writes to.
struct Slots {
    lines: Box<[Line]>,
    /// The lines of one slot.
    count: usize,
}

// SAFETY: a slot is touched only by the side that has its number. The queues through which the numbers go
// order what one side did before what the other side does.
unsafe impl Sync for Slots {}

impl Slots {
    fn new(slots: usize, size: usize) -> Self {
        let count = size.div_ceil(64);
        let lines = (0..slots * count).map(|_| Line(UnsafeCell::new([0; 64]))).collect();
        Self { lines, count }
    }

    /// Where a slot begins, and how many bytes it has.
    #[inline]
    fn at(&self, slot: u64) -> (*mut u8, usize) {
        let lines = &self.lines[slot as usize * self.count..][..self.count];
        (lines.as_ptr().cast_mut().cast(), size_of_val(lines))
    }

    /// # Safety
    ///
    /// The caller must have the slot's number.
    #[inline]
    unsafe fn fill(&self, slot: u64, packet: &[u8]) {
        let (start, room) = self.at(slot);
        assert!(packet.len() <= room);
        // SAFETY: the packet fits. The lines are cells, and the caller has the slot.
        unsafe { start.copy_from_nonoverlapping(packet.as_ptr(), packet.len()) };
    }

    /// # Safety
    ///
    /// The caller must have the slot's number, and keep it as long as the result is used.
    #[inline]
    unsafe fn view(&self, slot: u64, len: usize) -> &[u8] {
        let (start, room) = self.at(slot);
        assert!(len <= room);
        // SAFETY: it is within the slot, which nothing writes to meanwhile, as the caller has the slot.
        unsafe { std::slice::from_raw_parts(start, len) }
    }
}

/// See the [module](self).
pub(crate) struct Bare {
    slots: Slots,
    filled: Queue,
    empty: Queue,
    /// The packets that the sender sends in turn.
    packets: Vec<Vec<u8>>,
    /// How many numbers were taken out of the two queues.
    taken: [usize; 2],
    size: usize,
    batch: usize,
}

impl Bare {
    pub(crate) fn new(setup: &Setup) -> Self {
        let slots = window(setup.batch).next_power_of_two();
        let (filled, mut empty) = (Queue::new(slots), Queue::new(slots));
        let (mut writer, _) = empty.ends(0);
        (0..slots as u64).for_each(|slot| writer.put(slot));
        writer.publish();
        Self {
            slots: Slots::new(slots, setup.size),
            filled,
            empty,
            packets: vec![vec![0; setup.size]; slots],
            taken: [0; 2],
            size: setup.size,
            batch: setup.batch,
        }
    }

    /// Lends both sides to `body`. Between two calls nothing is under way.
    pub(crate) fn ends<T>(
        &mut self,
        pattern: Pattern,
        body: impl FnOnce(&mut BareSender<'_>, &mut BareReceiver<'_>) -> T,
    ) -> T {
        let (slots, size, batch) = (&self.slots, self.size, self.batch);
        let (put_filled, take_filled) = self.filled.ends(self.taken[0]);
        let (put_empty, take_empty) = self.empty.ends(self.taken[1]);
        let packets = &mut self.packets;
        let mut sender =
            BareSender { slots, packets, filled: put_filled, empty: take_empty, pattern, batch };
        let mut receiver =
            BareReceiver { slots, filled: take_filled, empty: put_empty, pattern, size, batch };
        let result = body(&mut sender, &mut receiver);
        self.taken = [receiver.filled.taken(), sender.empty.taken()];
        result
    }
}

pub(crate) struct BareSender<'a> {
    slots: &'a Slots,
    packets: &'a mut [Vec<u8>],
    filled: Writer<'a>,
    empty: Reader<'a>,
    pattern: Pattern,
    batch: usize,
}

impl Sends for BareSender<'_> {
    fn send(&mut self, number: &mut u64, _: u64) -> Result<bool, Failure> {
        let count = self.empty.ready().min(self.batch);
        for _ in 0..count {
            let slot = self.empty.take();
            let packet = &mut self.packets[slot as usize];
            self.pattern.write(packet, *number);
            // SAFETY: the number came out of the queue of empty slots, so it is in no other place.
            unsafe { self.slots.fill(slot, packet) };
            self.filled.put(slot);
            *number += 1;
        }
        // With nothing new, the line of the index stays with the receiver.
        if count > 0 {
            self.filled.publish();
        }
        Ok(count > 0)
    }

    fn finish(&mut self) -> Result<bool, Failure> {
        Ok(true)
    }

    fn refused(&self) -> u64 {
        0
    }
}

pub(crate) struct BareReceiver<'a> {
    slots: &'a Slots,
    filled: Reader<'a>,
    empty: Writer<'a>,
    pattern: Pattern,
    size: usize,
    batch: usize,
}

impl Receives for BareReceiver<'_> {
    fn receive(&mut self, account: &mut Account) -> Result<bool, Failure> {
        let count = self.filled.ready().min(self.batch);
        for _ in 0..count {
            let slot = self.filled.take();
            // SAFETY: the number came out of the queue of filled slots. It is returned afterwards.
            let packet = unsafe { self.slots.view(slot, self.size) };
            account.record(self.pattern.inspect(packet, self.size));
            self.empty.put(slot);
        }
        if count > 0 {
            self.empty.publish();
        }
        Ok(count > 0)
    }
}
