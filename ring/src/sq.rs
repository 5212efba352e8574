//! The two ends of the submission queue: [`SqProducer`] and [`SqConsumer`].
//!
//! [`SqProducer::push`] turns a frame into an entry. [`SqConsumer`] makes the frame again, when the
//! entry is taken.

use crate::buffer::Buffer;
use crate::cq::{CqConsumer, CqProducer};
use crate::credits::{Class, CreditTaker};
use crate::entry::{Cqe, Entry, GUEST, Opcode, Outcome, SKIP_SUCCESS, SlotRange, Sqe};
use crate::frame::{Frame, free_with};
use crate::guest::buffer::GuestBuffer;
use crate::limits::RUN_MAX;
use crate::queue::{Consumer, Front, Oldest, Producer, debug_by_queue};
use crate::regions::Regions;
use crate::slots::PoolInner;
use core::fmt;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ptr::NonNull;
use static_assertions::{assert_impl_all, assert_not_impl_any};

/// Why the ring did not take an entry. The set is closed: `vmring` turns each case into one of its
/// own, and the compiler tells it when a case is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushError {
    /// The SQ is full, because the poller has not taken its entries yet.
    SqFull,
    /// As many entries of this class are in flight as the ring has credits.
    NoCredit,
    /// The frame is of a pool that is not one of the ring's.
    ForeignPool,
    /// A cancel carries no frame; [`SqProducer::push_cancel`] writes one.
    WrongClass,
}

/// The caller's end of the SQ.
pub struct SqProducer {
    sq: Producer<Sqe>,
    credits: CreditTaker,
}

/// The poller's end of the SQ.
pub struct SqConsumer {
    sq: Consumer<Sqe>,
}

assert_impl_all!(SqProducer: Send);
assert_impl_all!(SqConsumer: Send);
assert_not_impl_any!(SqProducer: Sync, Clone);
assert_not_impl_any!(SqConsumer: Sync, Clone);

/// What the poller took from the SQ.
#[derive(Debug)]
pub enum Submission {
    /// A frame to fill or to send.
    Packet {
        /// Read (to fill) or write (to send).
        class: Class,
        /// The caller's number.
        user_data: u64,
        /// The buffer that the packet goes into, or the packet.
        buffer: Buffer,
    },
    /// A cancel: entries to complete now.
    Cancel {
        /// The caller's number for the cancel itself.
        user_data: u64,
        /// The `user_data` of the entries to complete. `None`: all entries.
        target: Option<u64>,
    },
}

impl SqProducer {
    pub(crate) fn new(sq: Producer<Sqe>, credits: CreditTaker) -> Self {
        Self { sq, credits }
    }

    /// Whether an entry of `class` would be taken now.
    #[inline]
    pub fn check(&self, class: Class) -> Result<(), PushError> {
        if !self.credits.has(class) {
            return Err(PushError::NoCredit);
        }
        if !self.sq.has_space() {
            return Err(PushError::SqFull);
        }
        Ok(())
    }

    /// Writes a read or write entry, which the poller sees after [`publish`](Self::publish). An
    /// error gives the frame back. [`Class::Cancel`] is always an error.
    #[inline(always)]
    pub fn push(
        &self,
        class: Class,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), (PushError, Frame)> {
        self.push_flagged(class, 0, frame, user_data)
    }

    /// Writes a write entry that has no completion if it succeeds, as `IOSQE_CQE_SKIP_SUCCESS` of
    /// io_uring. See [`CqProducer::skip`](crate::CqProducer::skip). Otherwise it is a
    /// [`push`](Self::push).
    #[inline(always)]
    pub fn push_skip_success(
        &self,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), (PushError, Frame)> {
        self.push_flagged(Class::Write, SKIP_SUCCESS, frame, user_data)
    }

    /// Writes an entry as [`push`](Self::push) does, or a write as
    /// [`push_skip_success`](Self::push_skip_success) does if `flags` is [`SKIP_SUCCESS`]. The flags
    /// of a read are ignored.
    #[inline(always)]
    pub fn push_flagged(
        &self,
        class: Class,
        flags: u32,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), (PushError, Frame)> {
        self.push_carrier::<false>(class, flags & SKIP_SUCCESS, frame, user_data)
    }

    /// Writes an entry for a guest's buffer, as [`push_flagged`](Self::push_flagged) does for a frame.
    /// The regions have the buffer's segment table, or it is a buffer of a foreign pool.
    #[inline(always)]
    pub fn push_guest(
        &self,
        class: Class,
        flags: u32,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), (PushError, GuestBuffer)> {
        let (flags, carrier) = (flags & SKIP_SUCCESS | GUEST, buffer.into_carrier());
        self.push_carrier::<true>(class, flags, carrier, user_data)
            .map_err(|(error, carrier)| (error, GuestBuffer::new(carrier)))
    }

    /// Writes an entry for a frame, or for a guest's buffer, which begins with the frame.
    #[inline(always)]
    fn push_carrier<const IS_GUEST: bool>(
        &self,
        class: Class,
        flags: u32,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), (PushError, Frame)> {
        let (opcode, flags) = match class {
            Class::Read => (Opcode::Read, flags & !SKIP_SUCCESS),
            Class::Write => (Opcode::Write, flags),
            Class::Cancel => return Err((PushError::WrongClass, frame)),
        };
        // Before the look at the credits, so that a caller which has asked for the pool asks once.
        let regions = self.sq.regions();
        let first =
            if IS_GUEST { regions.find_first_table(&frame) } else { regions.find_first(&frame) };
        if !self.credits.has(class) {
            return Err((PushError::NoCredit, frame));
        }
        // The frame is taken apart first, as in `CqProducer::push`.
        let (pool, range) = (frame.pool_ptr(), frame.into_raw());
        let pushed = match first {
            // SAFETY: `into_raw` gave the slot up without freeing it, and it is of this region.
            Some(region) => unsafe { self.push_range(region, opcode, flags, range, user_data) },
            // SAFETY: the same, and it is of this pool.
            None => unsafe { self.push_other::<IS_GUEST>(opcode, flags, pool, range, user_data) },
        };
        // SAFETY: no entry was written, so the slot is in no other place ("one place per slot"). Pool and
        // range are the frame's.
        pushed.map_err(|error| (error, unsafe { Frame::from_raw(pool, range) }))
    }

    /// Writes an entry for a slot that is not of the first region. It is apart, so that the usual entry is
    /// written in few steps.
    ///
    /// # Safety
    ///
    /// The caller owns the slot of the range, which is of `pool` ("one place per slot"), and gives it up
    /// unless the result is an error.
    #[inline(never)]
    unsafe fn push_other<const IS_GUEST: bool>(
        &self,
        opcode: Opcode,
        flags: u32,
        pool: NonNull<PoolInner>,
        range: SlotRange,
        user_data: u64,
    ) -> Result<(), PushError> {
        let regions = self.sq.regions();
        match if IS_GUEST { regions.find_table(pool) } else { regions.find_pool(pool) } {
            // SAFETY: the caller gives up the slot that it owns.
            Some(region) => unsafe { self.push_range(region, opcode, flags, range, user_data) },
            // A full SQ is the first reason, as in `check`.
            None if !self.sq.has_space() => Err(PushError::SqFull),
            None => Err(PushError::ForeignPool),
        }
    }

    /// Writes an entry, and takes a credit, which there is.
    ///
    /// # Safety
    ///
    /// The caller owns the slot of the range, which is of `region` ("one place per slot"), and gives it up
    /// unless the result is an error.
    #[inline(always)]
    unsafe fn push_range(
        &self,
        region: u16,
        opcode: Opcode,
        flags: u32,
        range: SlotRange,
        user_data: u64,
    ) -> Result<(), PushError> {
        if !self.sq.push(Sqe::packet(opcode, region, range, user_data).with_flags(flags)) {
            return Err(PushError::SqFull);
        }
        self.credits.take(if opcode == Opcode::Read { Class::Read } else { Class::Write });
        if flags & SKIP_SUCCESS != 0 {
            self.credits.expect_skips();
        }
        Ok(())
    }

    /// Writes a cancel entry for all entries whose `user_data` is `target`, or for all entries
    /// (`None`).
    pub fn push_cancel(&self, target: Option<u64>, user_data: u64) -> Result<(), PushError> {
        if !self.credits.has(Class::Cancel) {
            return Err(PushError::NoCredit);
        }
        let opcode = if target.is_some() { Opcode::Cancel } else { Opcode::CancelAll };
        if !self.sq.push(Sqe::cancel(opcode, target.unwrap_or(0), user_data)) {
            return Err(PushError::SqFull);
        }
        self.credits.take(Class::Cancel);
        Ok(())
    }

    /// Publishes all entries that were pushed: the commit point. They are the poller's from here
    /// on. Returns whether there were any.
    #[inline]
    pub fn publish(&self) -> bool {
        // This is called after a push, so it stores without a check. A caller that ignores the
        // result does not pay for it.
        let anything = self.sq.has_unpublished();
        self.sq.store_tail();
        anything
    }

    /// Publishes only if the entries fill a batch of whole cache lines. For a run of entries: at
    /// its end the caller must call [`publish`](Self::publish).
    #[inline]
    pub fn publish_lines(&self) {
        self.sq.publish_lines();
    }

    /// Whether the caller of a push publishes now: the entries fill a batch of whole cache lines, or no
    /// [run](Self::begin_run) is on.
    #[inline(always)]
    pub fn ends_piece(&self) -> bool {
        self.sq.ends_piece()
    }

    /// Whether a [run](Self::begin_run) is on.
    pub fn is_in_run(&self) -> bool {
        self.sq.is_in_run()
    }

    /// Ends the run that [`begin_run`](Self::begin_run) has begun.
    #[inline]
    pub fn end_run(&self) {
        self.sq.end_run();
    }

    /// Begins a loop over `cq_consumer`'s completions. If many entries are in flight,
    /// [`publish_lines`](Self::publish_lines) publishes more of them together.
    #[inline]
    pub fn begin_run(&self, cq_consumer: &CqConsumer) {
        // What skips its completion is looked at only if it matters.
        let many = self.sq.are_many_since(cq_consumer.head())
            && self.sq.are_many_since(cq_consumer.ended());
        self.sq.begin_run(many);
    }

    /// Whether a write that skips success was ever pushed, so that a credit and a frame may come back
    /// without a completion.
    pub fn expects_skips(&self) -> bool {
        self.credits.expects_skips()
    }

    /// The number of writes that have succeeded without a completion. It wraps.
    pub fn skipped(&self) -> u32 {
        self.credits.skipped()
    }

    /// The credits of `class` that can be taken now. Reaping returns more, and so does a write that
    /// skips its completion.
    pub fn available(&self, class: Class) -> u32 {
        self.credits.available(class)
    }

    /// The number of credits of `class` that the ring has in all.
    pub fn depth(&self, class: Class) -> u32 {
        self.credits.depth(class)
    }

    /// The ring's pools.
    pub fn regions(&self) -> &Regions {
        self.sq.regions()
    }
}

impl SqConsumer {
    pub(crate) fn new(sq: Consumer<Sqe>) -> Self {
        Self { sq }
    }

    /// Looks at the queue and returns how many submissions wait.
    #[inline]
    pub fn ready(&mut self) -> u32 {
        self.sq.refresh()
    }

    /// Prefetches the cache lines of the first submissions that [`ready`](Self::ready) saw. Useful
    /// when another processor wrote them. This is a hint, which affects only the time.
    #[inline]
    pub fn prefetch(&self) {
        self.sq.prefetch();
    }

    /// How many of the submissions that [`ready`](Self::ready) saw are left.
    #[inline]
    pub fn known(&self) -> u32 {
        self.sq.known()
    }

    /// The number of submissions ever published, plus the start index. A snapshot, which is never
    /// less than what was taken.
    pub fn submitted(&self) -> u32 {
        self.sq.published()
    }

    /// Whether submissions wait, after a look at the queue that [`known`](Self::known) does not count.
    pub fn has_more(&self) -> bool {
        self.sq.waiting() > 0
    }

    /// The next of the submissions that [`ready`](Self::ready) saw, which the caller may take or
    /// leave. `None` if none is left, or if the next is a cancel, which [`pop`](Self::pop) takes.
    #[inline(always)]
    pub fn front(&mut self) -> Option<SqeRef<'_>> {
        let front = self.sq.front()?;
        front.peek(Sqe::is_packet).then_some(SqeRef(front))
    }

    /// The oldest of the submissions that [`ready`](Self::ready) saw, at most `most`, as long as they are
    /// reads. The iterator takes each that it yields, and leaves the others.
    #[inline(always)]
    pub fn reads(&mut self, most: u32) -> Reads<'_> {
        Reads(self.sq.oldest(most))
    }

    /// Frees the SQ's cells of all submissions that were taken by [`SqeRef::take`] and [`Reads`], with one
    /// store. Until this call they still count as occupied.
    #[inline]
    pub fn retire(&mut self) {
        self.sq.retire();
    }

    /// The length of the leading run, at most `most`, of known submissions that are packets of
    /// `class` and for which `like` returns true.
    #[inline(always)]
    pub fn leading(&self, class: Class, most: u32, mut like: impl FnMut(&Buffer) -> bool) -> u32 {
        let wanted = if class == Class::Read { Opcode::Read } else { Opcode::Write };
        self.sq.leading(most, |sqe, regions| {
            // SAFETY: `SqProducer::push` wrote the entry by a frame of these regions, and it is
            // called only if the entry is a packet's. The entry stays in the queue and goes on
            // owning its slot: the frame made here is only read, and `ManuallyDrop` does not free
            // it.
            let frame = || unsafe { regions.frame_of(sqe) };
            let packet = || ManuallyDrop::new(Buffer::from_carrier(frame()));
            sqe.opcode() == wanted && like(&packet())
        })
    }

    /// Ends the oldest known submissions as done, at most `most`, as long as they are writes that want a
    /// completion and `send` returns true: their entries move to the CQ of the same ring. `send` sees each
    /// packet. Returns how many there were.
    ///
    /// This is for a device that ends each write at once. It does what [`front`](Self::front),
    /// [`SqeRef::take`] and [`CqProducer::push`] do, but the packet's pool is not looked for.
    #[inline(always)]
    pub fn end_writes(
        &mut self,
        cq: &mut CqProducer,
        most: u32,
        mut send: impl FnMut(&Buffer) -> bool,
    ) -> u32 {
        let (cq, freed) = cq.parts_mut();
        self.move_to_cq(cq, most, |[write], regions| {
            // SAFETY: `move_to_cq` gives entries that stay in the queue meanwhile.
            let packet = unsafe { frame_in_queue(&write, Opcode::Write, GUEST, regions) }?;
            let packet = ManuallyDrop::new(Buffer::from_carrier(ManuallyDrop::into_inner(packet)));
            if !send(&packet) {
                return None;
            }
            if !packet.is_guest() {
                return Some([Cqe::of(Opcode::Write, &write)]);
            }
            let (pool, (_, range)) = (packet.carrier().pool_ptr(), write.slot());
            // SAFETY: the entry owns the slot ("one place per slot"). It leaves the queue when this returns,
            // and nothing can panic before. The completion that takes its place has no slot.
            unsafe { free_with(pool, range, freed) };
            Some([Cqe::without_slot(Opcode::Write, range.len(), write.user_data(), Outcome::Done)])
        })
    }

    /// Shows the oldest known submissions, at most `most` and 32, as long as they are writes of frames
    /// that want a completion and `like` returns true for the buffer and its packet. `with` sees the
    /// packets, and ends those that it has sent; see [`LeadingFrames::end`].
    ///
    /// This is for a device that has to know how many packets there are before it sends the first. It finds
    /// each packet once. `cq` is of the same ring, or there are no packets.
    #[inline(always)]
    pub fn with_leading_frames<R>(
        &mut self,
        cq: &mut CqProducer,
        most: u32,
        mut like: impl FnMut(&Buffer, &[u8]) -> bool,
        with: impl FnOnce(&mut LeadingFrames<'_>) -> R,
    ) -> R {
        let (cq, _) = cq.parts_mut();
        // So an entry's region number and slot mean in the CQ what they mean here.
        let is_own = self.sq.regions().are_those(cq.regions());
        let most = if is_own { most.min(RUN_MAX as u32) } else { 0 };
        let most = most.min(self.sq.known());
        let most = if most > 0 { most.min(cq.space_for(most)) } else { 0 };
        // Not initialised: most polls find few packets or none.
        let mut packets = [MaybeUninit::<NonNull<[u8]>>::uninit(); RUN_MAX];
        let mut count = 0;
        self.sq.leading(most, |sqe, regions| {
            // SAFETY: `leading` gives entries that stay in the queue meanwhile.
            let Some(frame) = (unsafe { frame_in_queue(sqe, Opcode::Write, 0, regions) }) else {
                return false;
            };
            let buffer = ManuallyDrop::new(Buffer::from_carrier(ManuallyDrop::into_inner(frame)));
            let Some(packet) = buffer.bytes().filter(|packet| like(&buffer, packet)) else {
                return false;
            };
            let Some(place) = packets.get_mut(count) else { return false };
            place.write(NonNull::from(packet));
            count += 1;
            true
        });
        with(&mut LeadingFrames { sq: &mut self.sq, cq, packets: &packets[..count] })
    }

    /// Ends the oldest known submissions as done, at most `most` pairs of a write and the read behind it,
    /// as [`end_writes`](Self::end_writes) does. `pass` sees the packet and the space in the read's frame,
    /// and returns whether it has copied the packet there. Returns how many pairs there were.
    #[inline(always)]
    pub fn end_pairs(
        &mut self,
        cq: &mut CqProducer,
        most: u32,
        mut pass: impl FnMut(&[u8], &mut [u8]) -> bool,
    ) -> u32 {
        let (cq, _) = cq.parts_mut();
        self.move_to_cq(cq, most, |[write, read], regions| {
            // SAFETY: as in `end_writes`.
            let from = unsafe { frame_in_queue(&write, Opcode::Write, 0, regions) }?;
            // SAFETY: the same. The two entries have different slots ("one place per slot").
            let mut to = unsafe { frame_in_queue(&read, Opcode::Read, 0, regions) }?;
            let packet = from.bytes()?;
            if to.set_len(packet.len()).is_err() || !pass(packet, &mut to) {
                return None;
            }
            let done = Cqe::of(Opcode::Read, &read).with_len(packet.len() as u32);
            Some([Cqe::of(Opcode::Write, &write), done])
        })
    }

    /// Moves entries to the CQ, unless it is another ring's.
    #[inline(always)]
    fn move_to_cq<const N: usize>(
        &mut self,
        cq: &mut Producer<Cqe>,
        most: u32,
        make: impl FnMut([Sqe; N], &Regions) -> Option<[Cqe; N]>,
    ) -> u32 {
        // So an entry's region number and slot mean in the CQ what they mean here.
        if !self.sq.regions().are_those(cq.regions()) {
            return 0;
        }
        self.sq.move_to(cq, most, make)
    }

    /// The next submission among those that [`ready`](Self::ready) saw.
    #[inline]
    pub fn pop(&mut self) -> Option<Submission> {
        self.sq.pop(|sqe, regions| {
            let user_data = sqe.user_data();
            // SAFETY: `Consumer::pop` took the entry, and yields each entry once.
            // `SqProducer::push` wrote it by a frame of these regions.
            match unsafe { regions.frame(&sqe) } {
                Some(frame) => {
                    let buffer = Buffer::from_carrier(frame);
                    Submission::Packet { class: class_of(&sqe), user_data, buffer }
                }
                None => {
                    let target = (sqe.opcode() == Opcode::Cancel).then(|| sqe.target());
                    Submission::Cancel { user_data, target }
                }
            }
        })
    }
}

/// A packet's submission that is still in its queue's memory. [`take`](Self::take) copies it once,
/// to its destination. If it is dropped and not taken, it stays the next in the queue.
pub struct SqeRef<'a>(Front<'a, Sqe>);

impl fmt::Debug for SqeRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.peek(|sqe| f.debug_tuple("SqeRef").field(sqe).finish())
    }
}

impl SqeRef<'_> {
    /// Read (to be filled) or write (to be sent).
    #[inline(always)]
    pub fn class(&self) -> Class {
        self.0.peek(class_of)
    }

    /// [`SKIP_SUCCESS`] if this is a write that has no completion if it succeeds,
    /// and [`GUEST`] if its packet is in the memory of a guest.
    #[inline(always)]
    pub fn flags(&self) -> u32 {
        self.0.peek(Sqe::flags)
    }

    /// Takes the submission: returns the buffer and the caller's number.
    #[inline(always)]
    pub fn take(self) -> (Buffer, u64) {
        self.0.take(|sqe, regions| {
            // SAFETY: `Front::take` yields each entry once. `SqProducer::push` wrote it by a frame
            // of these regions, and `SqConsumer::front` has seen that it is a packet's.
            (Buffer::from_carrier(unsafe { regions.frame_of(sqe) }), sqe.user_data())
        })
    }
}

/// Reads that are taken out of the SQ; see [`SqConsumer::reads`].
pub struct Reads<'a>(Oldest<'a, Sqe>);

impl fmt::Debug for Reads<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reads").finish_non_exhaustive()
    }
}

/// The buffers, and the caller's numbers.
impl Iterator for Reads<'_> {
    type Item = (Buffer, u64);

    #[inline(always)]
    fn next(&mut self) -> Option<(Buffer, u64)> {
        let is_read = |sqe: &Sqe| sqe.opcode() == Opcode::Read;
        self.0.take_if(is_read, |sqe, regions| {
            // SAFETY: `take_if` yields each entry once. `SqProducer::push` wrote it by a frame of these
            // regions, since it is a read.
            (Buffer::from_carrier(unsafe { regions.frame_of(sqe) }), sqe.user_data())
        })
    }
}

/// The oldest writes of the SQ; see [`SqConsumer::with_leading_frames`].
pub struct LeadingFrames<'a> {
    sq: &'a mut Consumer<Sqe>,
    cq: &'a mut Producer<Cqe>,
    /// The packets of the oldest entries of the SQ, in their order. The CQ has space for them.
    packets: &'a [MaybeUninit<NonNull<[u8]>>],
}

impl fmt::Debug for LeadingFrames<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeadingFrames").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl LeadingFrames<'_> {
    /// How many packets are left.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether no packet is left.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// The packets, oldest first.
    #[inline(always)]
    pub fn packets(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.packets.iter().map(|packet| {
            // SAFETY: `with_leading_frames` has written as many places as the list is long.
            let packet = unsafe { packet.assume_init() };
            // SAFETY: it found the bytes in the frames of the oldest entries. These stay in the SQ and go on
            // owning their slots until `end`, which takes their packets out of the list, and which cannot
            // run while the caller has a packet. Meanwhile nobody writes to the slots.
            unsafe { packet.as_ref() }
        })
    }

    /// Ends the first `count` writes as done: their entries move to the CQ.
    #[inline(always)]
    pub fn end(&mut self, count: usize) {
        let count = count.min(self.packets.len());
        let moved = self
            .sq
            .move_to(self.cq, count as u32, |[write], _| Some([Cqe::of(Opcode::Write, &write)]));
        debug_assert_eq!(moved as usize, count, "`with_leading_frames` has seen the space");
        self.packets = &self.packets[count..];
    }
}

/// The frame of an entry that asks for `wanted` and has no flags but `flags`. It may be the carrier of a
/// guest's buffer if [`GUEST`] is among these. It is only looked at.
///
/// # Safety
///
/// The entry is one of the SQ with these regions, and stays there as long as the frame is used.
#[inline(always)]
unsafe fn frame_in_queue(
    sqe: &Sqe,
    wanted: Opcode,
    flags: u32,
    regions: &Regions,
) -> Option<ManuallyDrop<Frame>> {
    // SAFETY: `SqProducer::push` wrote the entry by a frame of these regions, and `wanted` is a packet's
    // opcode. The entry goes on owning its slot: `ManuallyDrop` does not free it.
    sqe.is_plain(wanted, flags).then(|| ManuallyDrop::new(unsafe { regions.frame_of(sqe) }))
}

#[inline(always)]
fn class_of(sqe: &Sqe) -> Class {
    if sqe.opcode() == Opcode::Read { Class::Read } else { Class::Write }
}

debug_by_queue!(SqProducer.sq, SqConsumer.sq);
