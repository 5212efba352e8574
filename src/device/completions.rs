//! The way from a device into the completion queue: a slot that a device has finished with becomes
//! a CQE, and is counted.

use std::sync::Arc;

use vmring_core::{
    Buffer, Class, CqProducer, DoneReads, GUEST, LeadingFrames, Outcome, SqConsumer,
};

use crate::Status;
use crate::device::bounce::{Bounce, Bounced};
use crate::device::slot::{BOUNCED, PostedSlot, class_index};
use crate::mailbox::RingShared;
use crate::stats::{add_batch, reason_index};

/// The poller's end of a completion queue. The reaper sees entries after
/// [`publish`](Self::publish).
pub(crate) struct Completions {
    cq_producer: CqProducer,
    /// The outcome of slots that the device gives back as cancelled: `Cancelled`, or the reason for
    /// which the ring closes.
    undone: Outcome,
    batch: Batch,
    /// `None` if no guest's buffer can be submitted to the ring.
    bounce: Option<Box<Bounce>>,
    /// How many reads can be posted at a time, if one packet can fill several of them.
    merging_depth: Option<u32>,
    shared: Arc<RingShared>,
}

/// The sums of one device call. They are added to the ring's counters together, when the call ends.
#[derive(Debug, Default)]
struct Batch {
    rx_packets: u32,
    tx_packets: u32,
    rx_bytes: u64,
    tx_bytes: u64,
    /// Reads and writes that did not succeed. These are rare, so the ring's counters have them by
    /// their reason at once.
    failed: [u32; 2],
    /// Reads that have a part of a packet and not its last one.
    parts: u32,
}

impl Completions {
    pub(crate) fn new(
        cq_producer: CqProducer,
        bounce: Option<Bounce>,
        merging_depth: Option<u32>,
        shared: Arc<RingShared>,
    ) -> Self {
        Self {
            cq_producer,
            undone: Outcome::Cancelled,
            batch: Batch::default(),
            bounce: bounce.map(Box::new),
            merging_depth,
            shared,
        }
    }

    /// Whether a guest's buffer can be in the ring.
    #[inline(always)]
    pub(crate) fn may_have_guests(&self) -> bool {
        self.bounce.is_some()
    }

    pub(super) fn merging_depth(&self) -> Option<u32> {
        self.merging_depth
    }

    #[cfg(all(target_os = "linux", feature = "tap"))]
    pub(super) fn count_bounced_reads(&self, reads: u64) {
        self.shared.counters.poller.bounced_reads.add(reads);
    }

    /// Makes a slot such as the device takes it: if it has a guest's buffer that the device does not
    /// take, a reserved frame is put into its place.
    pub(super) fn make_fit(&mut self, slot: &mut PostedSlot) -> Result<(), Bounced> {
        let (Some(bounce), Some(guest)) = (&mut self.bounce, slot.guest()) else { return Ok(()) };
        let class = slot.class;
        if bounce.is_taken(class, guest) {
            return Ok(());
        }
        bounce.replace(class, slot.posted_buffer_mut())?;
        slot.ring ^= GUEST | BOUNCED;
        let counters = &self.shared.counters.poller;
        match class {
            Class::Read => counters.bounced_reads.add(1),
            _ => counters.bounced_writes.add(1),
        }
        Ok(())
    }

    /// What an entry that ends gives back to its caller: the guest's buffer, if the device had a
    /// reserved frame in its place.
    pub(super) fn restored(
        &mut self,
        class: Class,
        buffer: Buffer,
        outcome: Outcome,
    ) -> (Buffer, Outcome) {
        match &mut self.bounce {
            Some(bounce) if bounce.has_replaced(&buffer) => bounce.restore(class, buffer, outcome),
            _ => (buffer, outcome),
        }
    }

    /// Sets the outcome of slots that the device gives back as cancelled from now on.
    pub(crate) fn set_undone(&mut self, outcome: Outcome) {
        self.undone = outcome;
    }

    /// Completes a slot that a device has finished with, as part of a batch that
    /// [`end_batch`](Self::end_batch) ends.
    #[inline(always)]
    pub(crate) fn push_done(
        &mut self,
        class: Class,
        buffer: Buffer,
        user_data: u64,
        outcome: Outcome,
    ) {
        let len = buffer.len() as u64;
        if outcome != Outcome::Done {
            return self.push_failed(class, buffer, user_data, outcome);
        }
        self.cq_producer.push(class, buffer, user_data, outcome);
        if class == Class::Read {
            self.batch.rx_packets += 1;
            self.batch.rx_bytes += len;
        } else {
            self.batch.tx_packets += 1;
            self.batch.tx_bytes += len;
        }
    }

    /// Completes the oldest writes of the SQ as done, at most `most`; see [`SqConsumer::end_writes`].
    /// Returns how many there were.
    #[inline(always)]
    pub(super) fn end_writes(
        &mut self,
        sq_consumer: &mut SqConsumer,
        most: u32,
        mut send: impl FnMut(&Buffer) -> bool,
    ) -> usize {
        let mut bytes = 0;
        let ended = sq_consumer.end_writes(&mut self.cq_producer, most, |packet| {
            let is_sent = send(packet);
            bytes += if is_sent { packet.len() as u64 } else { 0 };
            is_sent
        });
        self.batch.tx_packets += ended;
        self.batch.tx_bytes += bytes;
        ended as usize
    }

    /// Completes pairs of a write and a read of the SQ as done, at most `most`; see
    /// [`SqConsumer::end_pairs`]. Returns how many pairs there were.
    #[inline(always)]
    pub(super) fn end_pairs(
        &mut self,
        sq_consumer: &mut SqConsumer,
        most: u32,
        mut pass: impl FnMut(&[u8], &mut [u8]) -> bool,
    ) -> usize {
        let mut bytes = 0;
        let ended = sq_consumer.end_pairs(&mut self.cq_producer, most, |packet, space| {
            let is_passed = pass(packet, space);
            bytes += if is_passed { packet.len() as u64 } else { 0 };
            is_passed
        });
        let Batch { rx_packets, tx_packets, rx_bytes, tx_bytes, .. } = &mut self.batch;
        (*rx_packets, *tx_packets) = (*rx_packets + ended, *tx_packets + ended);
        (*rx_bytes, *tx_bytes) = (*rx_bytes + bytes, *tx_bytes + bytes);
        ended as usize
    }

    /// Shows the oldest writes of the SQ, as long as they are `like` the first; see
    /// [`SqConsumer::with_leading_frames`].
    #[inline(always)]
    pub(super) fn with_leading_frames<R>(
        &mut self,
        sq_consumer: &mut SqConsumer,
        most: u32,
        like: impl FnMut(&Buffer, &[u8]) -> bool,
        with: impl FnOnce(&mut FrameWrites<'_, '_>) -> R,
    ) -> (usize, R) {
        let Self { cq_producer, batch, .. } = self;
        sq_consumer.with_leading_frames(cq_producer, most, like, |frames| {
            let mut writes = FrameWrites { frames, ended: 0, bytes: 0 };
            let result = with(&mut writes);
            let FrameWrites { ended, bytes, .. } = writes;
            batch.tx_packets += ended as u32;
            batch.tx_bytes += bytes;
            (ended, result)
        })
    }

    /// Completes reads one after the other, at most `most`. `ring` is the number of the ring.
    #[inline(always)]
    pub(super) fn filled_reads(&mut self, ring: u32, most: u32) -> FilledReads<'_> {
        let Self { cq_producer, batch, .. } = self;
        FilledReads { done: cq_producer.done_reads(most), batch, ring }
    }

    /// Completes a read that has a part of a packet. The rest is in the `more` next ones.
    pub(super) fn push_part(&mut self, buffer: Buffer, user_data: u64, more: u16) {
        self.batch.rx_bytes += buffer.len() as u64;
        self.batch.parts += 1;
        self.cq_producer.push_part(buffer, user_data, more);
    }

    /// As [`push_done`](Self::push_done), for a write that skips success: if it succeeded, it is
    /// counted, and its frame returns to its pool.
    pub(super) fn push_unless_done(
        &mut self,
        class: Class,
        buffer: Buffer,
        user_data: u64,
        outcome: Outcome,
    ) {
        if outcome != Outcome::Done {
            return self.push_failed(class, buffer, user_data, outcome);
        }
        self.batch.tx_packets += 1;
        self.batch.tx_bytes += buffer.len() as u64;
        self.cq_producer.skip(buffer);
    }

    #[cold]
    #[inline(never)]
    fn push_failed(&mut self, class: Class, buffer: Buffer, user_data: u64, outcome: Outcome) {
        self.batch.failed[class_index(class)] += 1;
        match outcome {
            Outcome::Cancelled => self.push_undone(class, buffer, user_data, self.undone),
            outcome => self.push(class, buffer, user_data, outcome),
        }
    }

    /// Completes an entry that the device has not looked at, with the outcome that all such have when a
    /// ring closes.
    fn push_undone(&mut self, class: Class, buffer: Buffer, user_data: u64, outcome: Outcome) {
        self.push(class, buffer, user_data, outcome);
        if matches!(outcome, Outcome::Refused(_)) {
            // After `errors`, of which it is a part.
            self.shared.counters.poller.errors_at_failure.add(1);
        }
    }

    /// The same, for a slot that is not with the device.
    pub(crate) fn complete_undone(&mut self, slot: PostedSlot, outcome: Outcome) {
        let (buffer, user_data, class) = slot.into_buffer();
        self.push_undone(class, buffer, user_data, outcome);
    }

    /// Completes a slot that is not with the device.
    pub(crate) fn complete(&mut self, slot: PostedSlot, outcome: Outcome) {
        let (buffer, user_data, class) = slot.into_buffer();
        self.push(class, buffer, user_data, outcome);
    }

    /// Completes an entry that did not succeed, and counts it by its reason.
    pub(crate) fn push(&mut self, class: Class, buffer: Buffer, user_data: u64, outcome: Outcome) {
        let counters = &self.shared.counters.poller;
        match outcome {
            Outcome::Done => {}
            Outcome::Cancelled => counters.cancelled.add(1),
            Outcome::Refused(code) => {
                counters.errors.add(1);
                counters.errors_by_status[reason_index(Status::from_raw(code))].add(1);
            }
            Outcome::Abandoned | Outcome::DevicePanicked => counters.abandoned.add(1),
        }
        let (buffer, outcome) = self.restored(class, buffer, outcome);
        self.cq_producer.push(class, buffer, user_data, outcome);
    }

    /// Completes a write that the device did not take within the retry budget. It counts as
    /// `exhausted` only, not as an error.
    pub(crate) fn give_up(&mut self, slot: PostedSlot, outcome: Outcome) {
        let (buffer, user_data, class) = slot.into_buffer();
        self.shared.counters.poller.exhausted.add(1);
        let (buffer, outcome) = self.restored(class, buffer, outcome);
        self.cq_producer.push(class, buffer, user_data, outcome);
    }

    /// Completes a cancel that matched `matched` entries.
    pub(crate) fn push_cancel(&mut self, all: bool, matched: u32, user_data: u64) {
        self.cq_producer.push_cancel(all, matched, user_data);
    }

    /// Adds the sums of the device call that has just ended to the ring's counters. Returns how
    /// many reads and writes the call completed.
    #[inline]
    pub(crate) fn end_batch(&mut self) -> [u32; 2] {
        let Batch { rx_packets, tx_packets, rx_bytes, tx_bytes, failed, parts } =
            std::mem::take(&mut self.batch);
        let counters = &self.shared.counters.poller;
        if rx_packets > 0 {
            counters.rx_packets.add(rx_packets.into());
            counters.rx_bytes.add(rx_bytes);
            add_batch(&counters.read_batches, rx_packets);
        }
        if tx_packets > 0 {
            counters.tx_packets.add(tx_packets.into());
            counters.tx_bytes.add(tx_bytes);
            add_batch(&counters.write_batches, tx_packets);
        }
        [rx_packets + parts + failed[0], tx_packets + failed[1]]
    }

    /// Publishes all entries to the reaper, with one store, and the count of the skipped ones. Returns
    /// whether there were any of either.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        self.cq_producer.publish()
    }

    /// The number of completions that are published and not reaped. It may be out of date at once.
    pub(crate) fn backlog(&self) -> u32 {
        self.cq_producer.backlog()
    }

    /// The CQ's tail: the number of completions that were ever published, plus the start index.
    pub(crate) fn index(&self) -> u32 {
        self.cq_producer.index()
    }

    /// The number of writes that have skipped their completion.
    pub(crate) fn skipped(&self) -> u32 {
        self.cq_producer.skipped()
    }
}

/// The oldest writes, which may be sent together; see [`PollContext::with_leading_frames`].
///
/// [`PollContext::with_leading_frames`]: crate::device::PollContext::with_leading_frames
pub(crate) struct FrameWrites<'a, 'q> {
    frames: &'a mut LeadingFrames<'q>,
    ended: usize,
    bytes: u64,
}

impl FrameWrites<'_, '_> {
    /// How many there are.
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Their packets, oldest first.
    #[inline(always)]
    pub(crate) fn packets(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.packets()
    }

    /// Completes the first `count`, whose packets have been sent and have `bytes` together.
    #[inline(always)]
    pub(crate) fn end(&mut self, count: usize, bytes: u64) {
        self.bytes += bytes;
        self.ended += count.min(self.len());
        self.frames.end(count);
    }
}

/// Completes reads of one ring one after the other; see [`PollContext::filled_reads`].
///
/// [`PollContext::filled_reads`]: crate::device::PollContext::filled_reads
pub(crate) struct FilledReads<'a> {
    done: DoneReads<'a>,
    batch: &'a mut Batch,
    ring: u32,
}

impl FilledReads<'_> {
    /// Takes a read whose frame now holds a packet of `len` bytes, and completes it. If it has to be
    /// completed by itself, leaves it and returns false. The caller [counts](Self::count) it.
    #[inline(always)]
    pub(crate) fn push(&mut self, slot: &mut Option<PostedSlot>, len: usize) -> bool {
        // A slot with flags has another number.
        if let Some(posted) = slot
            && posted.ring == self.ring
            && posted.class == Class::Read
            && self.done.push(&mut posted.buffer, len, posted.user_data)
        {
            // It has no buffer any more.
            std::mem::forget(slot.take());
            return true;
        }
        false
    }

    /// Counts the packets that were completed, and their bytes.
    #[inline(always)]
    pub(crate) fn count(self, packets: u32, bytes: u64) {
        self.batch.rx_packets += packets;
        self.batch.rx_bytes += bytes;
    }
}
