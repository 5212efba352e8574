//! [`PollContext`]: what a queue may take in one poll, and where it completes it.

use std::collections::VecDeque;
use std::fmt;

use vmring_core::{Class, Outcome, SqConsumer, offload};

use crate::device::completions::Completions;
use crate::device::slot::{PostedSlot, class_index};
use crate::error::{EntryError, Status};
use crate::fifo::Fifo;
use crate::mailbox::{DroppedSlot, report_dropped};

/// A batch: the posted slots that a queue may take in one [`poll`](Queue::poll), and the way back
/// for what it has completed.
pub struct PollContext<'a> {
    /// The ring whose slots these are; 0 for a wrapper's, which only hands them through.
    ring: u32,
    /// What earlier calls have left: older than whatever is in the SQ.
    posted: &'a mut Posted,
    /// What was submitted since then, taken by the device out of the SQ itself. A wrapper has none.
    sq_consumer: Option<&'a mut SqConsumer>,
    sink: Sink<'a>,
    /// How many reads and writes may be taken in this call, if there are as many.
    limits: [usize; 2],
    /// How many of them may still be: what is put back may be taken again.
    left: [usize; 2],
}

impl fmt::Debug for PollContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PollContext")
            .field("posted", &self.posted)
            .field("sq_consumer", &self.sq_consumer)
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

impl<'a> PollContext<'a> {
    pub(crate) fn new(
        ring: u32,
        posted: &'a mut Posted,
        sq_consumer: Option<&'a mut SqConsumer>,
        sink: Sink<'a>,
        limits: [u32; 2],
    ) -> Self {
        let limits = limits.map(|limit| limit as usize);
        Self { ring, posted, sq_consumer, sink, limits, left: limits }
    }

    /// How many reads and writes were taken and not put back; below 0 if more came back of earlier calls.
    pub(crate) fn taken(&self) -> [i64; 2] {
        [0, 1].map(|i| self.limits[i] as i64 - self.left[i] as i64)
    }

    /// Reads that may be taken in this call.
    #[inline]
    pub fn reads(&mut self) -> usize {
        self.post_from_sq();
        self.posted.reads.len().min(self.left[0])
    }

    /// Writes that may be taken in this call.
    #[inline]
    pub fn writes(&mut self) -> usize {
        self.post_from_sq();
        self.posted.writes.len().min(self.left[1])
    }

    /// Takes the read posted longest ago.
    #[inline(always)]
    pub fn take_read(&mut self) -> Option<PostedSlot> {
        self.take(Class::Read)
    }

    /// Takes the write submitted longest ago.
    #[inline(always)]
    pub fn take_write(&mut self) -> Option<PostedSlot> {
        self.take(Class::Write)
    }

    #[inline(always)]
    fn take(&mut self, class: Class) -> Option<PostedSlot> {
        let i = class_index(class);
        if self.left[i] == 0 {
            return None;
        }
        let slot = match self.posted.list(class).pop_front() {
            Some(slot) => slot,
            None => self.fetch(class)?,
        };
        self.left[i] -= 1;
        Some(slot)
    }

    /// The next of `wanted` in the SQ. What stands before it is posted.
    #[inline(always)]
    fn fetch(&mut self, wanted: Class) -> Option<PostedSlot> {
        let sq_consumer = self.sq_consumer.as_deref_mut()?;
        loop {
            let sqe = sq_consumer.front()?;
            let class = sqe.class();
            if class == wanted {
                return Some(PostedSlot::from_sqe(sqe, self.ring, class));
            }
            self.posted.list(class).push_back_with(|| PostedSlot::from_sqe(sqe, self.ring, class));
        }
    }

    /// Posts what is in the SQ, for who looks at several slots before taking one.
    #[inline]
    fn post_from_sq(&mut self) {
        if let Some(sq_consumer) = self.sq_consumer.as_deref_mut()
            && sq_consumer.known() > 0
        {
            self.posted.post_from_sq(sq_consumer, self.ring);
        }
    }

    /// Whether the SQ's next is a write. What earlier calls have left is in no common order.
    #[inline]
    pub(crate) fn is_write_next(&mut self) -> bool {
        let front = self.sq_consumer.as_deref_mut().and_then(SqConsumer::front);
        front.is_some_and(|sqe| sqe.class() == Class::Write)
    }

    /// How many of the writes that may be taken, from the oldest on, are like that. There may be more of
    /// them behind.
    #[inline]
    pub(crate) fn leading_writes(&mut self, mut like: impl FnMut(&[u8]) -> bool) -> usize {
        let most = self.left[1];
        if self.posted.writes.is_empty() && self.is_write_next() {
            let most = u32::try_from(most).unwrap_or(u32::MAX);
            return self
                .sq_consumer
                .as_ref()
                .map_or(0, |sq_consumer| sq_consumer.leading(Class::Write, most, like))
                as usize;
        }
        self.post_from_sq();
        let writes = self.posted.writes.iter().take(most);
        writes.take_while(|slot| like(slot.packet())).count()
    }

    /// The reads that may be taken, oldest first, where they are: for a device that fills before it
    /// knows how many it will take.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    #[inline]
    pub(crate) fn posted_reads(&mut self) -> impl Iterator<Item = &mut PostedSlot> {
        let limit = self.reads();
        self.posted.reads.iter_mut().take(limit)
    }

    /// As [`posted_reads`](Self::posted_reads), for writes.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    #[inline]
    pub(crate) fn posted_writes(&mut self) -> impl Iterator<Item = &mut PostedSlot> {
        let limit = self.writes();
        self.posted.writes.iter_mut().take(limit)
    }

    /// Takes the oldest of those that [`posted_reads`](Self::posted_reads) or
    /// [`posted_writes`](Self::posted_writes) has shown: there is no need to look into the SQ.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    #[inline(always)]
    pub(crate) fn take_shown(&mut self, class: Class) -> Option<PostedSlot> {
        let slot = self.posted.list(class).pop_front()?;
        self.left[class_index(class)] -= 1;
        Some(slot)
    }

    /// Puts a taken slot back to the front of its list: it is posted again as if never taken. Put
    /// several back in the reverse order of taking.
    #[cold]
    #[inline(never)]
    pub fn put_back(&mut self, slot: PostedSlot) {
        if self.is_foreign(slot.ring) {
            return;
        }
        self.left[class_index(slot.class)] += 1;
        self.posted.list(slot.class).push_front(slot);
    }

    /// A packet of `len` bytes stands in the slot. A length beyond the slot's room completes it as
    /// refused with `InvalidArgument` instead: a device cannot make anybody read outside.
    #[inline(always)]
    pub fn complete_read(&mut self, mut slot: PostedSlot, len: usize) {
        match slot.frame_mut().set_len(len) {
            Ok(()) => self.finish(slot, Outcome::Done),
            Err(_) => self.fail(slot, Status::InvalidArgument),
        }
    }

    /// An offload header and behind it a packet, `len` bytes together, stand in the slot, where
    /// [`PostedSlot::buffer_with_header_mut`] said. Lengths that cannot be complete it as refused with
    /// `InvalidArgument`.
    pub fn complete_read_with_header(&mut self, mut slot: PostedSlot, len: usize) {
        let packet = len.checked_sub(offload::LEN);
        let outcome = match packet.map(|len| slot.frame_mut().received_with_offload(len)) {
            Some(Ok(())) => Outcome::Done,
            _ => Status::InvalidArgument.into(),
        };
        self.finish(slot, outcome);
    }

    /// The slot's packet was sent.
    #[inline(always)]
    pub fn complete_write(&mut self, slot: PostedSlot) {
        self.finish(slot, Outcome::Done);
    }

    /// The device refuses this slot.
    #[cold]
    #[inline(never)]
    pub fn fail(&mut self, slot: PostedSlot, status: Status) {
        self.finish(slot, status.into());
    }

    /// The slot was given back because of a cancel or a close.
    #[inline]
    pub fn cancel(&mut self, slot: PostedSlot) {
        self.finish(slot, Outcome::Cancelled);
    }

    /// Passes on what an inner queue completed: for wrappers.
    pub fn forward(&mut self, done: CompletedSlot) {
        let CompletedSlot { slot, outcome } = done;
        self.finish(slot, outcome);
    }

    /// Always inlined, with all that it calls, and the slot taken apart first: it then never leaves the
    /// registers, where a call, or a panic that has to drop it, would want it in memory, written in
    /// small pieces and read back in large ones.
    #[inline(always)]
    fn finish(&mut self, slot: PostedSlot, outcome: Outcome) {
        let ring = slot.ring;
        let (frame, user_data, class) = slot.into_frame();
        if self.is_foreign(ring) {
            return report_dropped(ring, DroppedSlot { frame, user_data, class });
        }
        match &mut self.sink {
            Sink::Ring(completions) => completions.push_done(class, frame, user_data, outcome),
            Sink::Relay(list) => {
                let slot = PostedSlot::new(frame, user_data, ring, class);
                list.push_back(CompletedSlot { slot, outcome });
            }
        }
    }

    /// Whether a device has mixed up two rings' slots. Such a slot completes on its own ring as
    /// abandoned.
    #[inline(always)]
    fn is_foreign(&self, ring: u32) -> bool {
        // Nearly always they are the same.
        self.ring != ring && self.is_a_ring()
    }

    #[cold]
    fn is_a_ring(&self) -> bool {
        self.ring != 0
    }
}

/// Slots posted and not taken, in submission order.
#[derive(Debug, Default)]
pub(crate) struct Posted {
    pub(crate) reads: Fifo<PostedSlot>,
    pub(crate) writes: Fifo<PostedSlot>,
}

impl Posted {
    #[inline(always)]
    pub(super) fn list(&mut self, class: Class) -> &mut Fifo<PostedSlot> {
        if class == Class::Read { &mut self.reads } else { &mut self.writes }
    }

    /// Posts the packets of ring number `ring` that its SQ has, up to a cancel.
    pub(crate) fn post_from_sq(&mut self, sq_consumer: &mut SqConsumer, ring: u32) {
        while let Some(sqe) = sq_consumer.front() {
            let class = sqe.class();
            self.list(class).push_back_with(|| PostedSlot::from_sqe(sqe, ring, class));
        }
    }
}

/// Where a completed slot goes: to its ring, or, behind a wrapper, to the wrapper's list. Two known
/// ways and no trait object, so that a completion costs no call.
pub(crate) enum Sink<'a> {
    Ring(&'a mut Completions),
    Relay(&'a mut VecDeque<CompletedSlot>),
}

/// A slot that a queue is done with.
#[derive(Debug)]
pub struct CompletedSlot {
    pub(super) slot: PostedSlot,
    outcome: Outcome,
}

impl CompletedSlot {
    /// Whether it succeeded, and if so with how many bytes.
    pub fn result(&self) -> Result<usize, EntryError> {
        EntryError::from_outcome(self.outcome).map(|()| self.slot.packet().len())
    }

    /// The slot.
    pub fn slot(&self) -> &PostedSlot {
        &self.slot
    }

    /// The slot's packet, to be changed in place.
    pub fn packet_mut(&mut self) -> &mut [u8] {
        self.slot.packet_mut()
    }
}
