//! The two ends of the completion queue: [`CqProducer`] and [`CqConsumer`].
//!
//! [`CqProducer::push`] turns a frame into an entry. [`CqConsumer::pop`] makes the frame again,
//! after it has retired the entry.

use crate::buffer::Buffer;
use crate::credits::{Class, CreditReturner, SkipCounter};
use crate::entry::{Cqe, Opcode, Outcome, SlotRange, Sqe};
use crate::frame::{Frame, free_with};
use crate::queue::{Consumer, FreeCells, Producer, Published, debug_by_queue};
use crate::regions::Regions;
use crate::slots::{Freed, PoolInner};
use core::fmt;
use core::ptr::NonNull;
use static_assertions::{assert_impl_all, assert_not_impl_any};

/// The caller's end of the CQ.
pub struct CqConsumer {
    cq: Consumer<Cqe>,
    credits: CreditReturner,
    submitted: Published<Sqe>,
}

/// The poller's end of the CQ.
pub struct CqProducer {
    cq: Producer<Cqe>,
    skips: SkipCounter,
    /// The slots of guests' buffers whose completions were pushed and not published.
    freed: Freed,
}

assert_impl_all!(CqConsumer: Send);
assert_impl_all!(CqProducer: Send);
assert_not_impl_any!(CqConsumer: Sync, Clone);
assert_not_impl_any!(CqProducer: Sync, Clone);

/// How an entry has ended.
struct Ended {
    outcome: Outcome,
    more: u16,
}

/// What the caller took from the CQ.
#[derive(Debug)]
pub struct Reaped {
    /// The caller's number.
    pub user_data: u64,
    /// What the submission asked for.
    pub opcode: Opcode,
    /// How the entry ended.
    pub outcome: Outcome,
    /// The packet's length in bytes. For a cancel, the number of entries that it found.
    pub len: u32,
    /// How many of the next completions have the rest of this packet. 0 if none has.
    pub more: u16,
    /// The frame, both on success and on failure. A cancel has none. Nor has an entry with a guest's
    /// buffer: the bytes are in the guest's memory, and the list of the segments was freed when the
    /// entry ended.
    pub frame: Option<Frame>,
}

impl CqConsumer {
    pub(crate) fn new(
        cq: Consumer<Cqe>,
        credits: CreditReturner,
        submitted: Published<Sqe>,
    ) -> Self {
        Self { cq, credits, submitted }
    }

    /// Looks at the queue and returns how many completions wait.
    #[inline]
    pub fn ready(&mut self) -> u32 {
        self.cq.refresh()
    }

    /// Prefetches the cache lines of the first completions that [`ready`](Self::ready) saw. Useful
    /// when another processor wrote them. This is a hint, which affects only the time.
    #[inline]
    pub fn prefetch(&self) {
        self.cq.prefetch();
    }

    /// The submissions that are not reaped yet and have not skipped their completion. Those that
    /// another thread submits meanwhile may be missing.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        // The ended ones first: the count of submissions that is loaded afterwards includes them.
        let ended = self.ended();
        self.submitted.count().wrapping_sub(ended)
    }

    #[inline]
    pub(crate) fn head(&self) -> u32 {
        self.cq.head()
    }

    /// The number of submissions that have ended and have no completion left to reap, plus the start
    /// index.
    #[inline]
    pub(crate) fn ended(&self) -> u32 {
        self.head().wrapping_add(self.credits.skipped())
    }

    /// The number of writes that have succeeded without a completion. It wraps.
    pub fn skipped(&self) -> u32 {
        self.credits.skipped()
    }

    /// The index that the CQ's tail has when `n` completions wait.
    pub fn index_of(&self, n: u32) -> u32 {
        self.cq.head().wrapping_add(n)
    }

    /// The next of the completions that [`ready`](Self::ready) saw. The entry is retired and its
    /// credit returned before the frame exists.
    #[inline]
    pub fn pop(&mut self) -> Option<Reaped> {
        let Self { cq, credits, .. } = self;
        cq.pop(|cqe, regions| {
            credits.give_back(cqe.opcode());
            // SAFETY: `Consumer::pop` took the entry, and yields each entry once.
            unsafe { reaped(&cqe, regions) }
        })
    }

    /// Takes the completions that [`ready`](Self::ready) saw, oldest first, and calls `each` with every
    /// one. The entries are retired and their credits returned together, when this returns or `each`
    /// panics.
    #[inline]
    pub fn pop_all(&mut self, mut each: impl FnMut(Reaped)) {
        let taking = TakingAll(self);
        loop {
            let CqConsumer { cq, credits, .. } = &mut *taking.0;
            let Some(front) = cq.front() else { break };
            let next = front.take(|cqe, regions| {
                credits.count(cqe.opcode());
                // SAFETY: `Front::take` yields each entry once.
                unsafe { reaped(cqe, regions) }
            });
            each(next);
        }
    }

    /// The next of the completions that [`ready`](Self::ready) saw, which the caller may take or
    /// leave. `None` if none is left.
    #[inline]
    pub fn front(&mut self) -> Option<CqeRef<'_>> {
        let cqe = self.cq.front()?.peek(|cqe| *cqe);
        Some(CqeRef { cqe, consumer: self })
    }

    /// Moves those of the completions that [`ready`](Self::ready) saw for which `first` returns true
    /// before the others, and forgets the others until the next [`ready`](Self::ready). Both groups
    /// keep their order. `first` sees each completion once, oldest first.
    ///
    /// This only changes the order, so a caller that panics or never takes them loses nothing. For
    /// n completions it takes O(n log n) steps.
    pub fn select(&mut self, first: impl FnMut(&Cqe) -> bool) {
        let selected = self.cq.partition(first);
        self.cq.limit_known(selected);
    }

    /// How many completions wait, after a look at the queue that [`known`](Self::known) does not
    /// count.
    pub fn waiting(&self) -> u32 {
        self.cq.waiting()
    }

    /// How many of the completions that `ready` saw are left.
    #[inline]
    pub fn known(&self) -> u32 {
        self.cq.known()
    }

    /// The ring's pools.
    pub fn regions(&self) -> &Regions {
        self.cq.regions()
    }
}

/// What an entry of the CQ says, with its frame.
///
/// # Safety
///
/// The entry was taken out of the CQ of these regions, and this is called once for it.
#[inline(always)]
unsafe fn reaped(cqe: &Cqe, regions: &Regions) -> Reaped {
    Reaped {
        user_data: cqe.user_data(),
        opcode: cqe.opcode(),
        outcome: cqe.outcome(),
        len: cqe.len(),
        more: cqe.more(),
        // SAFETY: the caller has taken the entry. `CqProducer::push` wrote it by a frame of these
        // regions.
        frame: unsafe { regions.frame(cqe) },
    }
}

/// Retires the entries that were taken, and returns their credits, when it is dropped.
struct TakingAll<'a>(&'a mut CqConsumer);

impl Drop for TakingAll<'_> {
    #[inline]
    fn drop(&mut self) {
        // In the order of `pop`: nobody submits on a credit whose cell is still occupied.
        self.0.cq.retire();
        self.0.credits.give_all_back();
    }
}

/// The next completion, which is still in its queue. [`take`](Self::take) takes it. If it is dropped,
/// or forgotten, and not taken, it stays the next in the queue.
#[derive(Debug)]
pub struct CqeRef<'a> {
    /// A copy. The entry in the queue goes on owning its slot.
    cqe: Cqe,
    consumer: &'a mut CqConsumer,
}

impl CqeRef<'_> {
    /// The entry.
    #[inline]
    pub fn cqe(&self) -> &Cqe {
        &self.cqe
    }

    /// Takes the completion, as [`CqConsumer::pop`] does.
    #[inline]
    pub fn take(self) -> Reaped {
        // The consumer is exclusively borrowed since `front` saw the entry.
        self.consumer.pop().expect("the entry is still there")
    }
}

impl CqProducer {
    pub(crate) fn new(cq: Producer<Cqe>, skips: SkipCounter) -> Self {
        Self { cq, skips, freed: Freed::default() }
    }

    /// Ends a write that has succeeded and skips success: its frame returns to its pool, and no
    /// completion is written. The submitter sees after [`publish`](Self::publish) that the credit is
    /// back, and finds the frame in its pool then.
    #[inline]
    pub fn skip(&mut self, buffer: impl Into<Buffer>) {
        drop(buffer.into());
        self.skips.count();
    }

    /// The queue, and the slots that [`publish`](Self::publish) frees.
    #[inline(always)]
    pub(crate) fn parts_mut(&mut self) -> (&mut Producer<Cqe>, &mut Freed) {
        (&mut self.cq, &mut self.freed)
    }

    /// Writes the completion of a read or write, which the reaper sees after
    /// [`publish`](Self::publish).
    ///
    /// # Panics
    ///
    /// If the CQ is full, or the frame is not of the ring's pools. Neither happens if each
    /// completion answers one submission of this ring: its credit keeps a cell free.
    #[inline(always)]
    pub fn push(
        &mut self,
        class: Class,
        buffer: impl Into<Buffer>,
        user_data: u64,
        outcome: Outcome,
    ) {
        let buffer = buffer.into();
        let opcode = match class {
            Class::Read => Opcode::Read,
            _ => Opcode::Write,
        };
        let region = self.cq.regions().find_first(buffer.carrier());
        // The buffer is taken apart first. If a panic had to drop a buffer, the compiler would keep
        // it in memory instead of in registers.
        let (pool, range) = (buffer.carrier().pool_ptr(), buffer.into_carrier().into_raw());
        if let Some(region) = region
            && self.cq.push(Cqe::packet(opcode, region, range, user_data, outcome))
        {
            return;
        }
        if range.offload_state().is_guest() && outcome == Outcome::Done {
            // SAFETY: `into_raw` gave the slot up without freeing it ("one place per slot"). Pool and
            // range are the frame's.
            return unsafe { self.push_guest(opcode, pool, range, user_data) };
        }
        // SAFETY: `into_raw` gave the slot up without freeing it, and no entry was written, so the
        // slot is in no other place ("one place per slot"). Pool and range are the frame's.
        unsafe { self.push_other(opcode, pool, range, user_data, Ended { outcome, more: 0 }) }
    }

    /// Completions of up to `most` reads that are done, which are written one after the other. The reaper
    /// sees them after [`publish`](Self::publish).
    #[inline(always)]
    pub fn done_reads(&mut self, most: u32) -> DoneReads<'_> {
        let first = &self.cq.regions().pools()[0];
        let (pool, slot_size) = (first.ptr(), first.layout().slot_size);
        DoneReads { free: self.cq.free_cells(most), pool, slot_size }
    }

    /// Writes the completion of a read that has a part of a packet. The rest is in the `more` next
    /// completions, which the caller pushes before it [publishes](Self::publish).
    ///
    /// # Panics
    ///
    /// As [`push`](Self::push).
    pub fn push_part(&mut self, buffer: Buffer, user_data: u64, more: u16) {
        let carrier = buffer.into_carrier();
        let (pool, range) = (carrier.pool_ptr(), carrier.into_raw());
        let ended = Ended { outcome: Outcome::Done, more };
        // SAFETY: `into_raw` gave the slot up without freeing it ("one place per slot"). Pool and range
        // are the frame's.
        unsafe { self.push_other(Opcode::Read, pool, range, user_data, ended) }
    }

    /// Writes the completion of a guest's buffer that has succeeded, as most have. It is as
    /// [`push_other`](Self::push_other), with few enough arguments for the registers, and what it calls
    /// comes last, so that it saves none of them.
    ///
    /// # Safety
    ///
    /// The caller owns the slot of the range ("one place per slot"), and gives it up.
    #[inline(never)]
    unsafe fn push_guest(
        &mut self,
        opcode: Opcode,
        pool: NonNull<PoolInner>,
        range: SlotRange,
        user_data: u64,
    ) {
        if !self.cq.push(Cqe::without_slot(opcode, range.len(), user_data, Outcome::Done)) {
            // SAFETY: the caller gives up the slot that it owns.
            unsafe { self.refuse(pool, range) }
        }
        // SAFETY: the same. Nobody sees the completion before `publish`, which frees the slot first.
        unsafe { free_with(pool, range, &mut self.freed) }
    }

    /// Writes the completion of a guest's buffer, or of a frame that is not of the first pool. A guest's
    /// buffer loses its slot: nobody needs the list of the segments any more. The carrier is taken apart,
    /// so that it stays in registers.
    ///
    /// # Safety
    ///
    /// The caller owns the slot of the range ("one place per slot"), and gives it up.
    #[inline(never)]
    unsafe fn push_other(
        &mut self,
        opcode: Opcode,
        pool: NonNull<PoolInner>,
        range: SlotRange,
        user_data: u64,
        ended: Ended,
    ) {
        let Ended { outcome, more } = ended;
        let (is_guest, len) = (range.offload_state().is_guest(), range.len());
        let with_more = |cqe: Cqe| if more > 0 { cqe.with_more(more) } else { cqe };
        let region = if is_guest { None } else { self.cq.regions().find_pool(pool) };
        if let Some(region) = region
            && self.cq.push(with_more(Cqe::packet(opcode, region, range, user_data, outcome)))
        {
            return;
        }
        let cqe = with_more(Cqe::without_slot(opcode, len, user_data, outcome));
        if !is_guest || !self.cq.push(cqe) {
            // SAFETY: the caller gives up the slot that it owns, and no entry was written.
            unsafe { self.refuse(pool, range) }
        }
        // SAFETY: the caller gives up the slot that it owns, and the entry has none.
        unsafe { free_with(pool, range, &mut self.freed) }
    }

    /// Frees the slot of what cannot be completed, and panics.
    ///
    /// # Safety
    ///
    /// The caller owns the slot of the range ("one place per slot"), and gives it up.
    #[cold]
    #[inline(never)]
    unsafe fn refuse(&mut self, pool: NonNull<PoolInner>, range: SlotRange) -> ! {
        // SAFETY: the caller gives up the slot that it owns.
        unsafe { free_with(pool, range, &mut self.freed) }
        self.freed.free();
        panic!("more completions than credits, or a frame that is not the ring's");
    }

    /// Writes the completion of a cancel that found `matched` entries.
    pub fn push_cancel(&mut self, all: bool, matched: u32, user_data: u64) {
        let opcode = if all { Opcode::CancelAll } else { Opcode::Cancel };
        let pushed = self.cq.push(Cqe::cancel(opcode, matched, user_data));
        assert!(pushed, "no more completions than credits");
    }

    /// Publishes all completions that were pushed, with one store, and the count of those that were
    /// skipped. Returns whether there were any of either.
    #[inline]
    pub fn publish(&mut self) -> bool {
        // A thread that sees a completion finds the slots in its table.
        self.freed.free();
        self.skips.publish() | self.cq.publish()
    }

    /// The number of writes that have succeeded without a completion and are published. It wraps.
    #[inline]
    pub fn skipped(&self) -> u32 {
        self.skips.published()
    }

    /// The completions that are published and not reaped. A snapshot.
    #[inline]
    pub fn backlog(&self) -> u32 {
        self.cq.backlog()
    }

    /// The CQ's tail: the number of completions ever published, plus the start index.
    #[inline]
    pub fn index(&self) -> u32 {
        self.cq.published()
    }
}

/// Completions of reads that are done: see [`CqProducer::done_reads`].
pub struct DoneReads<'a> {
    free: FreeCells<'a, Cqe>,
    /// The ring's first pool, and the bytes of its slots.
    pool: NonNull<PoolInner>,
    slot_size: u32,
}

impl fmt::Debug for DoneReads<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DoneReads").finish_non_exhaustive()
    }
}

impl DoneReads<'_> {
    /// Takes the buffer of a read, which has a packet of `len` bytes, and writes its completion. Returns
    /// whether it has: it leaves the buffer if it is no frame of the ring's first pool, if it has fewer
    /// bytes, or if `most` completions were written. [`CqProducer::push`] handles each of these cases.
    #[inline(always)]
    #[must_use = "false means that the buffer is still there"]
    pub fn push(&mut self, from: &mut Option<Buffer>, len: usize, user_data: u64) -> bool {
        let fits = |frame: &Frame| {
            // The frame that a guest's buffer begins with is of another pool.
            frame.pool_ptr() == self.pool && len <= frame.capacity_in(self.slot_size)
        };
        if !from.as_ref().is_some_and(|buffer| fits(buffer.carrier())) || !self.free.has_space() {
            return false;
        }
        let Some(buffer) = from.take() else { return false };
        // Nothing between here and the entry can panic.
        let cqe = Cqe::packet(
            Opcode::Read,
            0,
            buffer.into_carrier().into_raw(),
            user_data,
            Outcome::Done,
        );
        let pushed = self.free.push(cqe.with_len(len as u32));
        debug_assert!(pushed, "there was space");
        true
    }
}

debug_by_queue!(CqConsumer.cq, CqProducer.cq);
