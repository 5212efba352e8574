//! [`PollContext`], which lends a queue its ring's slots for one poll.

use std::collections::VecDeque;
use std::fmt;

use vmring_core::{Buffer, Class, GUEST, Outcome, Reads, SKIP_SUCCESS, SqConsumer, offload};

use crate::device::bounce::{Bounced, end_plain_read, end_read, set_count, set_part_len};
use crate::device::completions::{Completions, FilledReads, FrameWrites};
use crate::device::slot::{BOUNCED, FLAGS, PostedSlot, class_index};
use crate::error::{EntryError, Status};
use crate::fifo::Fifo;
use crate::mailbox::{DroppedSlot, report_dropped};

/// The access of a queue to its ring during one [`Queue::poll`](crate::device::Queue::poll): the
/// posted slots that the queue may take, and the methods that complete them.
pub struct PollContext<'a> {
    /// The number of the ring whose slots these are. 0 for a wrapper's inner queue, whose slots may
    /// be of any ring.
    ring: u32,
    /// The slots that earlier calls have left. They are older than everything in the SQ.
    posted: &'a mut Posted,
    /// What was submitted since then. Slots are taken directly out of the SQ. `None` for a
    /// wrapper's inner queue, and while a queue is being closed.
    sq_consumer: Option<&'a mut SqConsumer>,
    sink: Sink<'a>,
    /// The largest numbers of reads and writes that this call may take.
    limits: [usize; 2],
    /// How many of them are left. A slot that is put back may be taken again.
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

    /// The numbers of reads and writes that were taken and not put back. Negative if the queue put
    /// back more slots than it took, because it had taken them in earlier calls.
    pub(crate) fn taken(&self) -> [i64; 2] {
        [0, 1].map(|i| self.limits[i] as i64 - self.left[i] as i64)
    }

    /// Returns how many reads can be taken now.
    #[inline]
    pub fn reads(&mut self) -> usize {
        self.post_from_sq();
        self.posted.reads.len().min(self.left[0])
    }

    /// Returns how many writes can be taken now.
    #[inline]
    pub fn writes(&mut self) -> usize {
        self.post_from_sq();
        self.posted.writes.len().min(self.left[1])
    }

    /// Takes the oldest posted read. Returns `None` if no read is posted, or if this call has taken
    /// as many as it may.
    #[inline(always)]
    pub fn take_read(&mut self) -> Option<PostedSlot> {
        self.take(Class::Read)
    }

    /// Takes the oldest posted write. Returns `None` if no write is posted, or if this call has
    /// taken as many as it may.
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

    /// Takes the next entry of class `wanted` out of the SQ. Entries of the other class in front of
    /// it are posted.
    #[inline(always)]
    fn fetch(&mut self, wanted: Class) -> Option<PostedSlot> {
        let sq_consumer = self.sq_consumer.as_deref_mut()?;
        loop {
            let sqe = sq_consumer.front()?;
            let class = sqe.class();
            if class == wanted {
                return Some(match wanted {
                    Class::Read => PostedSlot::from_read_sqe(sqe, self.ring),
                    _ => PostedSlot::from_sqe(sqe, self.ring, class),
                });
            }
            self.posted.list(class).push_back_with(|| PostedSlot::from_sqe(sqe, self.ring, class));
        }
    }

    /// Moves what is in the SQ to the posted slots, for callers that look at several slots before
    /// they take one.
    #[inline]
    fn post_from_sq(&mut self) {
        if let Some(sq_consumer) = self.sq_consumer.as_deref_mut()
            && sq_consumer.known() > 0
        {
            self.posted.post_from_sq(sq_consumer, self.ring);
        }
    }

    /// Whether the next entry of the SQ is a write. The slots that earlier calls have left do not
    /// count: those are in two lists, so there is no order between reads and writes.
    #[inline]
    pub(crate) fn is_write_next(&mut self) -> bool {
        let front = self.sq_consumer.as_deref_mut().and_then(SqConsumer::front);
        front.is_some_and(|sqe| sqe.class() == Class::Write)
    }

    /// Whether there may be a write: if not, nothing is posted but reads, and the SQ is empty.
    #[inline]
    pub(crate) fn may_have_writes(&self) -> bool {
        !self.posted.writes.is_empty()
            || self.sq_consumer.as_ref().is_some_and(|sq_consumer| sq_consumer.known() > 0)
    }

    /// Completes the oldest writes, at most `most`, as long as `send` returns true: it sees each packet,
    /// and has sent it then. Returns how many there were. It stops at a write that skips its completion,
    /// and does nothing in a wrapper's inner queue. Take the others one by one.
    ///
    /// Such a write does not become a slot in between, which saves most of its cost.
    #[inline(always)]
    pub(crate) fn end_writes(&mut self, most: usize, send: impl FnMut(&Buffer) -> bool) -> usize {
        let most = most.min(self.left[1]);
        let Some((sq_consumer, completions)) = self.queues() else { return 0 };
        let ended = completions.end_writes(sq_consumer, clamped(most), send);
        self.left[1] -= ended;
        ended
    }

    /// Shows the oldest writes, as long as they are of frames and `like` returns true for each: `with`
    /// sends their packets and completes them. Returns `None`, without a call of `with`, if the oldest
    /// write is not such a one, or as [`end_writes`](Self::end_writes) does nothing.
    ///
    /// It finds each packet once, for a device that has to know how many there are before it sends the
    /// first.
    #[inline(always)]
    pub(crate) fn with_leading_frames<R>(
        &mut self,
        like: impl FnMut(&Buffer, &[u8]) -> bool,
        with: impl FnOnce(&mut FrameWrites<'_, '_>) -> R,
    ) -> Option<R> {
        let most = clamped(self.left[1]);
        let (sq_consumer, completions) = self.queues()?;
        let (ended, result) = completions.with_leading_frames(sq_consumer, most, like, |writes| {
            (writes.len() > 0).then(|| with(writes))
        });
        self.left[1] -= ended;
        result
    }

    /// The oldest reads, as long as no write is between them. Those that the iterator yields are taken.
    /// `None` if there are older ones than those in the SQ, or none can be there.
    #[inline(always)]
    pub(crate) fn submitted_reads(&mut self) -> Option<SubmittedReads<'_>> {
        if !self.posted.reads.is_empty() {
            return None;
        }
        let Self { ring, sq_consumer, left: [left, _], .. } = self;
        let reads = sq_consumer.as_deref_mut()?.reads(clamped(*left));
        Some(SubmittedReads { reads, ring: *ring, taken: 0, left })
    }

    /// Completes reads with packets in their frames one after the other, at most `most`. What has to be
    /// completed by itself comes back. Returns `None` in a wrapper's inner queue.
    #[inline(always)]
    pub(crate) fn filled_reads(&mut self, most: u32) -> Option<FilledReads<'_>> {
        match &mut self.sink {
            Sink::Ring(completions) => Some(completions.filled_reads(self.ring, most)),
            Sink::Relay(_) => None,
        }
    }

    /// Completes the oldest submissions, as long as they are a write and the read behind it, each pair
    /// with one packet, and `pass` returns true: it sees the packet and the read's space, and has copied
    /// the packet then. It stops as [`end_writes`](Self::end_writes) does.
    #[inline(always)]
    pub(crate) fn end_pairs(&mut self, pass: impl FnMut(&[u8], &mut [u8]) -> bool) {
        let most = self.left[0].min(self.left[1]);
        let Some((sq_consumer, completions)) = self.queues() else { return };
        let ended = completions.end_pairs(sq_consumer, clamped(most), pass);
        self.left = self.left.map(|left| left - ended);
    }

    /// The ring's two queues, if nothing is older than what is in the SQ.
    #[inline(always)]
    fn queues(&mut self) -> Option<(&mut SqConsumer, &mut Completions)> {
        let is_first = self.posted.reads.is_empty() && self.posted.writes.is_empty();
        match &mut self.sink {
            Sink::Ring(completions) if is_first => {
                self.sq_consumer.as_deref_mut().map(|sq_consumer| (sq_consumer, &mut **completions))
            }
            _ => None,
        }
    }

    /// The length of the longest run of writes, from the oldest on, that can be taken and for which
    /// `like` returns true. This may be an undercount: the run may go on behind the end of one
    /// list.
    #[inline]
    pub(crate) fn leading_writes(&mut self, mut like: impl FnMut(&Buffer) -> bool) -> usize {
        let most = self.left[1];
        if self.posted.writes.is_empty() && self.is_write_next() {
            return self
                .sq_consumer
                .as_ref()
                .map_or(0, |sq_consumer| sq_consumer.leading(Class::Write, clamped(most), like))
                as usize;
        }
        self.post_from_sq();
        let writes = self.posted.writes.iter().take(most);
        writes.take_while(|slot| like(slot.buffer())).count()
    }

    /// The reads that can be taken, oldest first, without taking them. This is for a device that
    /// fills slots before it knows how many it will take.
    #[cfg(any(
        target_os = "macos",
        feature = "vmnet-sim",
        all(target_os = "linux", feature = "tap")
    ))]
    #[inline]
    pub(crate) fn posted_reads(&mut self) -> impl Iterator<Item = &mut PostedSlot> {
        let limit = self.reads();
        self.posted.reads.iter_mut().take(limit)
    }

    /// The writes that can be taken, oldest first, without taking them; see
    /// [`posted_reads`](Self::posted_reads).
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    #[inline]
    pub(crate) fn posted_writes(&mut self) -> impl Iterator<Item = &mut PostedSlot> {
        let limit = self.writes();
        self.posted.writes.iter_mut().take(limit)
    }

    /// Takes the oldest slot of those that [`posted_reads`](Self::posted_reads) or
    /// [`posted_writes`](Self::posted_writes) returned. It need not look into the SQ.
    #[cfg(any(
        target_os = "macos",
        feature = "vmnet-sim",
        all(target_os = "linux", feature = "tap")
    ))]
    #[inline(always)]
    pub(crate) fn take_shown(&mut self, class: Class) -> Option<PostedSlot> {
        let slot = self.posted.list(class).pop_front()?;
        self.left[class_index(class)] -= 1;
        Some(slot)
    }

    /// Returns how many reads can be posted at a time, if one packet may fill several of them: the ring
    /// has [mergeable reads](crate::RingBuilder::mergeable_reads). Otherwise, and for a wrapper's inner
    /// queue, returns `None`.
    pub fn merging_depth(&self) -> Option<u32> {
        match &self.sink {
            Sink::Ring(completions) => completions.merging_depth(),
            Sink::Relay(_) => None,
        }
    }

    /// How many reads are posted, with those that this call may not take.
    #[cfg(all(target_os = "linux", feature = "tap"))]
    pub(crate) fn posted_in_all(&mut self) -> usize {
        self.post_from_sq();
        self.posted.reads.len()
    }

    /// Whether this call has taken reads, and may not take all that are still posted.
    #[cfg(all(target_os = "linux", feature = "tap"))]
    pub(crate) fn is_short_of_reads(&mut self) -> bool {
        self.left[0] < self.limits[0] && self.posted_in_all() > self.left[0]
    }

    /// Counts `reads` that a packet fills through a frame of the queue.
    #[cfg(all(target_os = "linux", feature = "tap"))]
    pub(crate) fn count_bounced_reads(&mut self, reads: usize) {
        if let Sink::Ring(completions) = &mut self.sink {
            completions.count_bounced_reads(reads as u64);
        }
    }

    /// Puts a slot back to the front of its list. It is posted again, as if it had never been
    /// taken.
    ///
    /// Put several slots back in the reverse of the order in which they were taken, so that they
    /// keep their order.
    #[cold]
    #[inline(never)]
    pub fn put_back(&mut self, slot: PostedSlot) {
        if self.is_foreign(slot.ring & !FLAGS) {
            return;
        }
        self.left[class_index(slot.class)] += 1;
        self.posted.list(slot.class).push_front(slot);
    }

    /// Completes a read whose buffer now holds a packet of `len` bytes.
    ///
    /// If the buffer is shorter than `len`, the read fails with [`Status::InvalidArgument`]
    /// instead, so that nobody can be made to read behind the slot.
    #[inline(always)]
    pub fn complete_read(&mut self, mut slot: PostedSlot, len: usize) {
        let is_done = slot.posted_buffer_mut().set_frame_len(len).is_ok()
            || slot.guest_mut().is_some_and(|guest| end_plain_read(guest, len));
        match is_done {
            true => self.finish(slot, Outcome::Done),
            false => self.finish(slot, Status::InvalidArgument.into()),
        }
    }

    /// As [`complete_read`](Self::complete_read). If the buffer is in the memory of a guest, the device
    /// has written the header there too.
    #[inline(always)]
    pub(crate) fn complete_filled(&mut self, mut slot: PostedSlot, len: usize) {
        let buffer = slot.posted_buffer_mut();
        let fits = buffer.set_frame_len(len).is_ok()
            || buffer.guest_mut().is_some_and(|guest| guest.set_len(len).is_ok());
        if !fits {
            return self.complete_part(slot, len, true, 0);
        }
        self.finish(slot, Outcome::Done);
    }

    /// Completes a read whose buffer is in the memory of a guest.
    #[inline(always)]
    fn complete_guest(&mut self, mut slot: PostedSlot, len: usize, with_header: bool) {
        match slot.guest_mut().map(|guest| end_read(guest, len, with_header)) {
            Some(outcome) => self.finish(slot, outcome),
            // It is a write, and the device has mixed the two up.
            None => self.finish(slot, Status::InvalidArgument.into()),
        }
    }

    /// Completes a read whose buffer now holds an offload header and a packet behind it, `len`
    /// bytes together. They are where [`PostedSlot::buffer_with_header_mut`] begins, or in the first
    /// segments of a guest's buffer.
    ///
    /// If `len` is shorter than the header or longer than the buffer, the read fails with
    /// [`Status::InvalidArgument`] instead.
    pub fn complete_read_with_header(&mut self, mut slot: PostedSlot, len: usize) {
        let packet = len.checked_sub(offload::LEN);
        if slot.guest().is_some() {
            // A length that is too long for every buffer stands for one that is too short.
            return self.complete_guest(slot, packet.unwrap_or(usize::MAX), true);
        }
        let received = |len| slot.frame_mut().map(|frame| frame.set_received_with_offload(len));
        let outcome = match packet.and_then(received) {
            Some(Ok(())) => Outcome::Done,
            _ => Status::InvalidArgument.into(),
        };
        self.finish(slot, outcome);
    }

    /// Completes the reads that one packet fills together, on a ring with [mergeable
    /// reads](crate::RingBuilder::mergeable_reads). `parts` are the reads, in the order in which they
    /// were taken, each with the number of the packet's bytes in it. The first part is behind the
    /// header, if its buffer has space for one; this call writes that header. The other parts begin
    /// with the first byte of their buffer ([`GuestBuffer::segments`](crate::GuestBuffer::segments)).
    ///
    /// The completions come one after the other and together: nothing splits them. A part that is
    /// longer than its buffer is cut to it.
    ///
    /// A buffer of a guest that the device does not take, with more segments than its
    /// [`read_segments`](crate::device::Capabilities::read_segments), has a reserved frame in its place.
    /// Such a read takes a whole packet or nothing: [`PostedSlot::is_reserved`] says so. If it is one of
    /// several parts, it fails with [`Status::InvalidArgument`], and so do the parts behind it.
    pub fn complete_read_parts<I>(&mut self, parts: I)
    where
        I: IntoIterator<Item = (PostedSlot, usize)>,
        I::IntoIter: ExactSizeIterator,
    {
        let parts = parts.into_iter();
        let count = parts.len();
        let mut is_spoiled = false;
        for (i, (mut slot, len)) in parts.enumerate() {
            is_spoiled |= count > 1 && slot.is_reserved();
            if is_spoiled {
                self.fail(slot, Status::InvalidArgument);
                continue;
            }
            if let Some(guest) = slot.guest_mut().filter(|_| i == 0) {
                set_count(guest, count as u16);
            }
            self.complete_part(slot, len, i == 0, (count - 1 - i) as u16);
        }
    }

    /// Completes a read that has a part of a packet, `len` bytes. The rest is in the `more` next
    /// ones, which the caller completes before its poll ends. The header is written.
    #[cold]
    #[inline(never)]
    pub(crate) fn complete_part(
        &mut self,
        mut slot: PostedSlot,
        len: usize,
        is_first: bool,
        more: u16,
    ) {
        if slot.is_reserved() {
            return self.complete_read(slot, len);
        }
        set_part_len(slot.posted_buffer_mut(), len, is_first);
        let ring = slot.ring & !FLAGS;
        if self.is_foreign(ring) {
            return; // dropped
        }
        let marked = slot.ring;
        let (buffer, user_data, class) = slot.into_buffer();
        match &mut self.sink {
            Sink::Ring(completions) if more > 0 => {
                completions.push_part(buffer, user_data, more);
            }
            Sink::Ring(completions) => {
                completions.push_done(class, buffer, user_data, Outcome::Done);
            }
            Sink::Relay(list) => {
                let slot = PostedSlot::new(buffer, user_data, marked, class);
                list.push_back(CompletedSlot { slot, outcome: Outcome::Done, more });
            }
        }
    }

    /// Completes a write whose packet has been sent.
    #[inline(always)]
    pub fn complete_write(&mut self, slot: PostedSlot) {
        self.finish(slot, Outcome::Done);
    }

    /// Completes a slot with an error, which concerns this entry alone. The ring stays open. If the
    /// device has failed for good, return an error from
    /// [`Queue::poll`](crate::device::Queue::poll) instead.
    #[cold]
    #[inline(never)]
    pub fn fail(&mut self, slot: PostedSlot, status: Status) {
        self.finish(slot, status.into());
    }

    /// Completes a slot as cancelled, after a [`Queue::cancel`](crate::device::Queue::cancel) or in
    /// a [`Queue::close`](crate::device::Queue::close).
    #[inline]
    pub fn cancel(&mut self, slot: PostedSlot) {
        self.finish(slot, Outcome::Cancelled);
    }

    /// Completes a slot in the way in which an inner queue has completed it. This is for wrappers;
    /// see [`Relay`](crate::device::Relay).
    pub fn forward(&mut self, done: CompletedSlot) {
        let CompletedSlot { slot, outcome, more } = done;
        let ring = slot.ring & !FLAGS;
        match &mut self.sink {
            Sink::Ring(completions) if more > 0 && ring == self.ring => {
                let (buffer, user_data, _) = slot.into_buffer();
                completions.push_part(buffer, user_data, more);
            }
            _ => self.finish(slot, outcome),
        }
    }

    /// Completes a slot. This function and everything that it calls is inlined, and the slot is
    /// taken apart first, so that the slot stays in registers. A call, or a panic that had to drop
    /// the slot, would need it in memory, written in small pieces and read back in large ones.
    #[inline(always)]
    fn finish(&mut self, slot: PostedSlot, outcome: Outcome) {
        let ring = slot.ring;
        let (buffer, user_data, class) = slot.into_buffer();
        // A guest's buffer completes as a frame does.
        if self.is_foreign(ring & !GUEST) {
            return self.finish_marked(ring, DroppedSlot { buffer, user_data, class }, outcome);
        }
        match &mut self.sink {
            Sink::Ring(completions) => completions.push_done(class, buffer, user_data, outcome),
            Sink::Relay(list) => {
                let slot = PostedSlot::new(buffer, user_data, ring, class);
                list.push_back(CompletedSlot { slot, outcome, more: 0 });
            }
        }
    }

    /// Completes a slot whose number is not this ring's alone: it has flags, or the slot is
    /// foreign.
    #[cold]
    #[inline(never)]
    fn finish_marked(&mut self, ring: u32, slot: DroppedSlot, outcome: Outcome) {
        match &mut self.sink {
            Sink::Ring(completions) if ring & !FLAGS == self.ring => {
                let DroppedSlot { buffer, user_data, class } = slot;
                let (buffer, outcome) = match ring & BOUNCED {
                    0 => (buffer, outcome),
                    _ => completions.restored(class, buffer, outcome),
                };
                if ring & SKIP_SUCCESS != 0 {
                    completions.push_unless_done(class, buffer, user_data, outcome);
                } else {
                    completions.push_done(class, buffer, user_data, outcome);
                }
            }
            _ => report_dropped(ring, slot),
        }
    }

    /// Whether a slot of ring number `ring` belongs to another ring than this context's, because
    /// the device has mixed up two rings. Such a slot completes on its own ring, as abandoned. True
    /// for a number with flags too.
    #[inline(always)]
    fn is_foreign(&self, ring: u32) -> bool {
        // The common case is checked first: the numbers are equal.
        self.ring != ring && self.is_a_ring()
    }

    #[cold]
    fn is_a_ring(&self) -> bool {
        self.ring != 0
    }
}

/// A number of slots as the queues count them.
#[inline(always)]
fn clamped(slots: usize) -> u32 {
    u32::try_from(slots).unwrap_or(u32::MAX)
}

/// The slots of a ring that are posted and not taken, each list in the order of submission.
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

    /// Makes the first slots of each class such as the device takes, at most `limits` of them. Returns
    /// how many there are. The others wait, until there are reserved frames again.
    #[cold]
    #[inline(never)]
    pub(crate) fn make_fit(&mut self, completions: &mut Completions, limits: [u32; 2]) -> [u32; 2] {
        let mut fit = [0; 2];
        for class in [Class::Read, Class::Write] {
            let list = self.list(class);
            // One that is refused completes when it is the first.
            while let Some(mut slot) = list.pop_front() {
                match completions.make_fit(&mut slot) {
                    Err(Bounced::Refused(status)) => completions.complete(slot, status.into()),
                    _ => {
                        list.push_front(slot);
                        break;
                    }
                }
            }
            let i = class_index(class);
            let slots = list.iter_mut().take(limits[i] as usize);
            fit[i] = slots.map_while(|slot| completions.make_fit(slot).ok()).count() as u32;
        }
        fit
    }

    /// Posts the packets that the SQ of ring number `ring` is known to hold, up to the first
    /// cancel.
    pub(crate) fn post_from_sq(&mut self, sq_consumer: &mut SqConsumer, ring: u32) {
        while let Some(sqe) = sq_consumer.front() {
            let class = sqe.class();
            self.list(class).push_back_with(|| PostedSlot::from_sqe(sqe, ring, class));
        }
    }
}

/// Reads that are taken out of the SQ; see [`PollContext::submitted_reads`].
pub(crate) struct SubmittedReads<'a> {
    reads: Reads<'a>,
    ring: u32,
    taken: usize,
    /// How many reads the call may still take, without those in `taken`.
    left: &'a mut usize,
}

impl Drop for SubmittedReads<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.left -= self.taken;
    }
}

impl Iterator for SubmittedReads<'_> {
    type Item = PostedSlot;

    #[inline(always)]
    fn next(&mut self) -> Option<PostedSlot> {
        let (buffer, user_data) = self.reads.next()?;
        self.taken += 1;
        Some(PostedSlot::new(buffer, user_data, self.ring, Class::Read))
    }
}

/// Where a completed slot goes: to its ring, or from an inner queue to its wrapper's list. An enum
/// and not a trait object, so that a completion costs no indirect call.
pub(crate) enum Sink<'a> {
    Ring(&'a mut Completions),
    Relay(&'a mut VecDeque<CompletedSlot>),
}

/// A slot that an inner queue has completed, with the result; see [`Relay`](crate::device::Relay).
///
/// The wrapper completes it on the ring with [`PollContext::forward`].
#[derive(Debug)]
pub struct CompletedSlot {
    pub(super) slot: PostedSlot,
    outcome: Outcome,
    /// How many of the next slots have the rest of the packet.
    more: u16,
}

impl CompletedSlot {
    /// Returns the length of the packet in bytes if the slot succeeded.
    ///
    /// # Errors
    ///
    /// The reason for which the slot did not succeed.
    pub fn result(&self) -> Result<usize, EntryError> {
        EntryError::from_outcome(self.outcome).map(|()| self.slot.len())
    }

    /// Returns the slot.
    pub fn slot(&self) -> &PostedSlot {
        &self.slot
    }

    /// Returns the slot's packet, to be changed in place. `None` if it is in the memory of a guest.
    pub fn packet_mut(&mut self) -> Option<&mut [u8]> {
        self.slot.packet_mut()
    }
}
