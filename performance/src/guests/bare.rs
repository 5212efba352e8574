//! The limit: two rings of slot numbers and one copy per packet, with nothing around them.

use std::cell::UnsafeCell;

use rtrb::{Consumer, Producer, RingBuffer};

use super::inspection::{FROM, Inspection, PACKETS, TO, numbered, packet};
use super::traffic::{BATCH, Carried, Receiver, Sender, Traffic, WINDOW, carry};
use crate::queues::{Entry, Queues};
use crate::result::Result;

/// A slot begins with a cache line, like vmring's.
#[repr(C, align(64))]
struct Line(UnsafeCell<[u8; 64]>);

/// The receiver's slots, which the sender writes to.
struct Slots {
    lines: Box<[Line]>,
    /// The lines of one slot.
    count: usize,
}

// SAFETY: a slot is touched only by the side that has its number. The rings through which the
// numbers go order what one side did before what the other side does.
unsafe impl Sync for Slots {}

impl Slots {
    fn new(length: usize) -> Self {
        let count = length.div_ceil(64);
        let lines = (0..WINDOW * count).map(|_| Line(UnsafeCell::new([0; 64]))).collect();
        Self { lines, count }
    }

    /// Where a slot begins, and how many bytes it has.
    fn at(&self, slot: u32) -> (*mut u8, usize) {
        let lines = &self.lines[slot as usize * self.count..][..self.count];
        (lines.as_ptr().cast_mut().cast(), size_of_val(lines))
    }

    /// # Safety
    ///
    /// The caller must have the slot's number.
    #[inline]
    unsafe fn fill(&self, slot: u32, packet: &[u8]) {
        let (start, room) = self.at(slot);
        assert!(packet.len() <= room);
        // SAFETY: the packet fits. The lines are cells, and the caller has the slot.
        unsafe { start.copy_from_nonoverlapping(packet.as_ptr(), packet.len()) };
    }

    /// # Safety
    ///
    /// The caller must have the slot's number, and keep it as long as the result is used.
    #[inline]
    unsafe fn view(&self, slot: u32, length: usize) -> &[u8] {
        let (start, room) = self.at(slot);
        assert!(length <= room);
        // SAFETY: it is within the slot, which nothing writes to meanwhile, as the caller has the
        // slot.
        unsafe { std::slice::from_raw_parts(start, length) }
    }
}

/// A slot with a packet.
#[derive(Clone, Copy)]
struct Filled {
    slot: u32,
    length: u32,
}

struct BareSender<'a> {
    slots: &'a Slots,
    packets: Vec<Vec<u8>>,
    filled: Producer<Filled>,
    empty: Consumer<u32>,
    sent: u64,
}

impl BareSender<'_> {
    /// Sends up to `most` packets.
    #[inline(always)]
    fn send_some(&mut self, most: usize) -> Result<usize> {
        let Self { slots, packets, filled, empty, sent } = self;
        let count = empty.slots().min(most);
        if count == 0 {
            return Ok(0);
        }
        let slot_numbers = empty.read_chunk(count)?;
        let room = filled.write_chunk_uninit(count)?;
        room.fill_from_iter(slot_numbers.into_iter().map(|slot| {
            let packet = &packets[*sent as usize % packets.len()];
            // SAFETY: the number came out of the ring of empty slots, so it is in no other place.
            unsafe { slots.fill(slot, packet) };
            *sent += 1;
            Filled { slot, length: packet.len() as u32 }
        }));
        Ok(count)
    }
}

impl Sender for BareSender<'_> {
    fn send(&mut self) -> Result<bool> {
        Ok(self.send_some(BATCH)? > 0)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        Ok(Some(self.sent))
    }
}

struct BareReceiver<'a> {
    slots: &'a Slots,
    filled: Consumer<Filled>,
    empty: Producer<u32>,
}

impl Receiver for BareReceiver<'_> {
    fn receive(&mut self, inspection: &mut Inspection) -> Result<bool> {
        let Self { slots, filled, empty } = self;
        let count = filled.slots().min(BATCH);
        if count == 0 {
            return Ok(false);
        }
        let packets = filled.read_chunk(count)?;
        let room = empty.write_chunk_uninit(count)?;
        room.fill_from_iter(packets.into_iter().map(|Filled { slot, length }| {
            // SAFETY: the number came out of the ring of filled slots. It is returned afterwards.
            inspection.inspect(unsafe { slots.view(slot, length as usize) });
            slot
        }));
        Ok(true)
    }
}

/// A sender that submits its packets to a queue and reaps them from another.
struct QueuedSender<'a> {
    bare: BareSender<'a>,
    queues: Queues,
}

impl Sender for QueuedSender<'_> {
    fn send(&mut self) -> Result<bool> {
        self.queues.turn(BATCH, |entry| entry)?;
        let sent = self.bare.send_some(self.queues.waiting().min(BATCH))?;
        let length = self.bare.packets[0].len() as u32;
        self.queues.complete(sent, |entry| Entry { length, ..entry })?;
        Ok(sent > 0)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        self.bare.finish()
    }
}

/// A receiver that submits its slots to a queue and reaps them, filled, from another.
struct QueuedReceiver<'a> {
    bare: BareReceiver<'a>,
    queues: Queues,
}

impl Receiver for QueuedReceiver<'_> {
    fn receive(&mut self, inspection: &mut Inspection) -> Result<bool> {
        let Self { bare: BareReceiver { slots, filled, empty }, queues } = self;
        let came = queues.complete_from(filled, BATCH, |Filled { slot, length }| (slot, length))?;
        queues.turn(came, |entry| {
            // SAFETY: the number came out of the ring of filled slots. It is returned afterwards.
            inspection.inspect(unsafe { slots.view(entry.buffer, entry.length as usize) });
            Entry { length: 0, ..entry }
        })?;
        queues.pass_on(came, empty)?;
        Ok(came > 0)
    }
}

/// Measures the bare loop, or the same loop with a submission and a completion queue on either
/// side.
pub(crate) fn measure(traffic: Traffic, queued: bool) -> Result<Carried> {
    let expected = packet(traffic.length, TO, FROM);
    let slots = Slots::new(traffic.length);
    // More than there are numbers: a batch's numbers enter one ring before the other ring has
    // released them.
    let (to_receiver, filled) = RingBuffer::new(WINDOW + BATCH);
    let (mut to_sender, empty) = RingBuffer::new(WINDOW + BATCH);
    for slot in 0..WINDOW as u32 {
        to_sender.push(slot)?;
    }
    let packets = numbered(&expected).collect();
    let sender = BareSender { slots: &slots, packets, filled: to_receiver, empty, sent: 0 };
    let receiver = BareReceiver { slots: &slots, filled, empty: to_sender };
    if !queued {
        return carry(sender, receiver, expected, traffic);
    }
    let mut queues = Queues::new(WINDOW);
    queues.fill(PACKETS as u32)?;
    let sender = QueuedSender { bare: sender, queues };
    let receiver = QueuedReceiver { bare: receiver, queues: Queues::new(WINDOW) };
    carry(sender, receiver, expected, traffic)
}
