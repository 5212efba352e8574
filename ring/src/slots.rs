//! Slots: a region of memory cut into equal pieces, a free list, and the count that decides when
//! the memory is freed.
//!
//! Invariants (ARCHITECTURE.md, "Ownership"):
//! * **One place per slot.** A slot index is in the free list, or in exactly one
//!   [`Frame`](crate::Frame), or in exactly one entry between the head and the tail of a queue, or in
//!   exactly one list of segments.
//!   Each step from one to another consumes its source:
//!   - Free list to frame: `Pool::alloc` takes the slot with `alloc_slot`.
//!   - Free list to a `Stock`, and from there to a frame: `Pool::alloc_from`, which takes several slots
//!     with `alloc_slots`.
//!   - Frame to free list: dropping the frame calls `free_slot`.
//!   - Frame to a list of [`Freed`], and from there to the free list: `CqProducer`, for a guest's buffer.
//!   - Frame to entry: `SqProducer::push` and `CqProducer::push` take the frame apart with
//!     `Frame::into_raw`. If the entry was not written, `SqProducer` makes the frame again, and
//!     `CqProducer` frees the slot.
//!   - Entry of the SQ to entry of the CQ: `Consumer::move_to`. For a guest's buffer, to a list of
//!     [`Freed`]: `SqConsumer::end_writes`.
//!   - Entry to frame: `Regions::frame_of`, after a consumer has taken the entry, or when the queue
//!     itself is dropped.
//!
//!   - Frame to list, in the pool of a segment table: a list of segments owns the slots that are
//!     linked from its first one, which is a frame's or an entry's. They are freed with the first.
//!
//!   `Frame::from_raw` is the one way to make a frame. It is unsafe, and only `pool.rs`,
//!   `regions.rs` and `sq.rs` call it.
//! * **The pool outlives its slots.** `refs` counts the handles, and the slots that are not in the
//!   free list. The release that takes it to zero frees the [`PoolInner`] and the memory. Only this
//!   file changes `refs` and the free list.

use crate::backing::Backing;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use alloc::boxed::Box;
use core::fmt;
use core::ptr::NonNull;
use crossbeam_utils::CachePadded;

/// How a region is cut into slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of slots.
    pub slots: u32,
    /// Bytes from one slot to the next.
    pub slot_size: u32,
    /// Bytes at a slot's start that stay free in front of a fresh frame's packet.
    pub headroom: u32,
}

/// Why a region cannot be cut as a [`Layout`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// There are no slots, or the slots have no bytes.
    Zero,
    /// There are 2^31 slots or more, or a slot has 2^31 bytes or more.
    TooLarge,
    /// The headroom leaves no space for a packet.
    NoSpace,
    /// The memory is smaller than `slots * slot_size`.
    NotEnoughMemory,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LayoutError::Zero => "a pool needs at least one slot of at least one byte",
            LayoutError::TooLarge => "a pool holds fewer than 2^31 slots of less than 2 GiB each",
            LayoutError::NoSpace => "the headroom leaves no space for a packet in the slot",
            LayoutError::NotEnoughMemory => "the memory is smaller than the slots need",
        })
    }
}

impl core::error::Error for LayoutError {}

const LIMIT: u32 = 1 << 31;

impl Layout {
    fn check(&self, memory: usize) -> Result<(), LayoutError> {
        if self.slots == 0 || self.slot_size == 0 {
            return Err(LayoutError::Zero);
        }
        if self.slots >= LIMIT || self.slot_size >= LIMIT {
            return Err(LayoutError::TooLarge);
        }
        if self.headroom >= self.slot_size {
            return Err(LayoutError::NoSpace);
        }
        match (self.slots as usize).checked_mul(self.slot_size as usize) {
            Some(bytes) if bytes <= memory => Ok(()),
            _ => Err(LayoutError::NotEnoughMemory),
        }
    }
}

/// One handle in `PoolInner::refs`. The low half counts the slots that are out.
const HANDLE: u64 = 1 << 32;
/// End of the free list.
const NIL: u32 = u32::MAX;

/// What all handles to a pool, and all frames of it, share.
pub(crate) struct PoolInner {
    base: NonNull<u8>,
    pub(crate) layout: Layout,
    /// In the low half, the index of the first free slot. In the high half, a tag that every change
    /// increments, so that a compare-exchange fails if the first slot was taken and returned
    /// meanwhile.
    free: CachePadded<AtomicU64>,
    /// `handles * HANDLE + slots out`. At zero, nobody can reach the pool any more.
    refs: CachePadded<AtomicU64>,
    /// `next[i]` is the free slot that follows free slot `i` in the free list.
    next: Box<[AtomicU32]>,
    /// The memory under `base`. It is dropped with the pool.
    _backing: Box<dyn Backing>,
}

impl PoolInner {
    /// Cuts `backing` into slots, all free, and counts the first handle.
    pub(crate) fn new(
        backing: Box<dyn Backing>,
        layout: Layout,
    ) -> Result<NonNull<Self>, LayoutError> {
        layout.check(backing.len())?;
        let next = (1..layout.slots).chain([NIL]).map(AtomicU32::new).collect();
        let pool = Box::leak(Box::new(PoolInner {
            base: backing.base(),
            layout,
            free: CachePadded::new(AtomicU64::new(0)),
            refs: CachePadded::new(AtomicU64::new(HANDLE)),
            next,
            _backing: backing,
        }));
        Ok(NonNull::from(pool))
    }

    /// Takes a slot out of the free list and counts it as out.
    #[inline]
    pub(crate) fn alloc_slot(&self) -> Option<u32> {
        let slot = self.pop_free()?;
        // Relaxed: the caller's handle keeps the count above zero, and the count hands over no
        // data.
        self.refs.fetch_add(1, Ordering::Relaxed);
        Some(slot)
    }

    /// Takes up to `most` slots out of the free list together, and counts them as out. Returns the first
    /// of them and how many they are. Each is followed by the next one ([`following`](Self::following)).
    #[inline(never)]
    pub(crate) fn alloc_slots(&self, most: u32) -> Option<(u32, u32)> {
        // Acquire, here and twice below: as in `pop_free`.
        let mut head = self.free.load(Ordering::Acquire);
        let taken = loop {
            let first = head as u32;
            if first == NIL || most == 0 {
                return None;
            }
            // Links are stale if another thread has taken a slot meanwhile. In that case the tag has
            // changed, the exchange fails, and we try again. A stale link is the number of a slot, too.
            let (mut behind, mut count) = (self.following(first), 1);
            while count < most && behind != NIL {
                (behind, count) = (self.following(behind), count + 1);
            }
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(behind);
            match self.free.compare_exchange_weak(head, new, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => break (first, count),
                Err(seen) => head = seen,
            }
        };
        // Relaxed: as in `alloc_slot`.
        self.refs.fetch_add(taken.1.into(), Ordering::Relaxed);
        Some(taken)
    }

    /// The slot that follows `slot` in a list of slots.
    #[inline]
    pub(crate) fn following(&self, slot: u32) -> u32 {
        self.next[slot as usize].load(Ordering::Relaxed)
    }

    /// Counts one more handle.
    pub(crate) fn add_handle(&self) {
        // Relaxed: the caller's own handle keeps the count above zero, and the count hands over no
        // data.
        let before = self.refs.fetch_add(HANDLE, Ordering::Relaxed);
        // 2^31 handles can only be a leak in a loop. Stop before the count can wrap.
        assert!(before < HANDLE << 31, "too many handles to one pool");
    }

    /// Slots that are not in the free list. A snapshot.
    pub(crate) fn slots_out(&self) -> u32 {
        self.refs.load(Ordering::Relaxed) as u32
    }

    /// As [`slots_out`](Self::slots_out). If it is 0, what the owners of the slots did comes before
    /// what the caller does next.
    pub(crate) fn slots_out_acquire(&self) -> u32 {
        // Acquire: pairs with the Release in `release`, of each slot that has returned.
        self.refs.load(Ordering::Acquire) as u32
    }

    /// Puts a list of slots in front of the free list. Those from `first` to `last` are linked.
    #[inline]
    fn push_free(&self, first: u32, last: u32) {
        let mut head = self.free.load(Ordering::Relaxed);
        loop {
            // Relaxed: the Release exchange below publishes it.
            self.next[last as usize].store(head as u32, Ordering::Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(first);
            // Release: pairs with the Acquire in `pop_free`. The slot's next owner sees our link,
            // and every byte that we wrote into the slot before. Relaxed if it fails: we read no
            // slot.
            match self.free.compare_exchange_weak(head, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(seen) => head = seen,
            }
        }
    }

    fn pop_free(&self) -> Option<u32> {
        // Acquire, here and twice below: pairs with the Release in `push_free`, so that we see the
        // slot's link, and the bytes that its last owner wrote.
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            let slot = head as u32;
            if slot == NIL {
                return None;
            }
            // The link is stale if another thread has taken the slot meanwhile. In that case the
            // tag has changed, the exchange fails, and we try again.
            let next = self.next[slot as usize].load(Ordering::Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(next);
            match self.free.compare_exchange_weak(head, new, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some(slot),
                Err(seen) => head = seen,
            }
        }
    }

    #[inline]
    pub(crate) fn slot_start(&self, slot: u32) -> NonNull<u8> {
        debug_assert!(slot < self.layout.slots);
        // SAFETY: `slot < slots`, because a frame's slot came from the free list, which `new`
        // filled with these numbers. `Layout::check` made sure that slots * slot_size bytes lie
        // inside the backing.
        unsafe { self.base.add(slot as usize * self.layout.slot_size as usize) }
    }
}

/// Gives `what` (a handle or a slot) back, and frees the pool if it was the last.
///
/// # Safety
///
/// The caller owns `what` in `refs`, and does not touch the pool afterwards.
unsafe fn release(pool: NonNull<PoolInner>, what: u64) {
    // SAFETY: the caller's share in `refs` keeps the pool alive up to the subtraction below ("the
    // pool outlives its slots").
    let refs = unsafe { &pool.as_ref().refs };
    // Release: pairs with the Acquire below, in the call that takes the count to zero. What we did
    // with the pool comes before the freeing.
    if refs.fetch_sub(what, Ordering::Release) == what {
        // Acquire: pairs with the Release above in every earlier call. What the others did with the
        // pool comes before our freeing. This is a load and not a fence, because ThreadSanitizer
        // does not know fences.
        refs.load(Ordering::Acquire);
        // SAFETY: the count is zero, so no handle and no slot is left, and only the one call that
        // took it to zero comes here ("the pool outlives its slots"). The pool came from
        // `Box::leak` in `new`.
        drop(unsafe { Box::from_raw(pool.as_ptr()) });
    }
}

/// Gives a handle back.
///
/// # Safety
///
/// The caller owns one handle, and does not touch the pool through it afterwards.
pub(crate) unsafe fn release_handle(pool: NonNull<PoolInner>) {
    // SAFETY: the caller gives up the one handle that it owns, which `refs` counts.
    unsafe { release(pool, HANDLE) }
}

/// Returns a slot to its pool's free list.
///
/// # Safety
///
/// The caller owns `slot` ("one place per slot") and gives it up with this call. `pool` is its
/// pool.
#[inline]
pub(crate) unsafe fn free_slot(pool: NonNull<PoolInner>, slot: u32) {
    // SAFETY: the caller's slot is still counted in `refs`, so the pool is alive ("the pool
    // outlives its slots").
    unsafe { pool.as_ref() }.push_free(slot, slot);
    // SAFETY: the caller owned this one slot, which `refs` still counts, and gives it up.
    unsafe { release(pool, 1) }
}

/// Slots of one pool that are to be freed together: two locked instructions for all of them. Such an
/// instruction waits until everything is stored that was stored before it, so in between two packets it
/// would wait for the lines of memory of the first one, which another processor has.
///
/// The slots are linked, and `refs` counts them until they are free.
#[derive(Debug, Default)]
pub(crate) struct Freed {
    list: Option<FreedList>,
}

#[derive(Debug)]
struct FreedList {
    pool: NonNull<PoolInner>,
    first: u32,
    last: u32,
    count: u32,
}

// SAFETY: the list owns its slots ("one place per slot"), and what it shares with others, `PoolInner`,
// is atomic or immutable.
unsafe impl Send for Freed {}

impl Freed {
    /// Adds a slot.
    ///
    /// # Safety
    ///
    /// The conditions are those of [`free_slot`].
    #[inline]
    pub(crate) unsafe fn add(&mut self, pool: NonNull<PoolInner>, slot: u32) {
        if let Some(list) = &mut self.list
            && list.pool == pool
        {
            // SAFETY: `refs` counts the slots of the list, so the pool is alive ("the pool outlives its
            // slots"). Relaxed: the list alone owns the slot, and `push_free` publishes the link.
            unsafe { pool.as_ref() }.next[slot as usize].store(list.first, Ordering::Relaxed);
            list.first = slot;
            list.count += 1;
            return;
        }
        self.begin(pool, slot);
    }

    #[cold]
    #[inline(never)]
    fn begin(&mut self, pool: NonNull<PoolInner>, slot: u32) {
        self.free();
        self.list = Some(FreedList { pool, first: slot, last: slot, count: 1 });
    }

    /// Frees them.
    #[inline]
    pub(crate) fn free(&mut self) {
        if let Some(FreedList { pool, first, last, count }) = self.list.take() {
            // SAFETY: `refs` counts the slots of the list, so the pool is alive ("the pool outlives its
            // slots").
            unsafe { pool.as_ref() }.push_free(first, last);
            // SAFETY: the list owned these slots, which `refs` still counts, and gives them up.
            unsafe { release(pool, count.into()) }
        }
    }
}

impl Drop for Freed {
    fn drop(&mut self) {
        self.free();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::backing::HeapBacking;
    use alloc::collections::BTreeSet;

    /// A thread that looked at the list, slept, and comes back when the same slot is first again must
    /// not take the list for the one that it has seen.
    #[test]
    fn the_free_list_never_looks_as_it_did() {
        let layout = Layout { slots: 2, slot_size: 8, headroom: 0 };
        let pool = PoolInner::new(Box::new(HeapBacking::new(16)), layout).expect("it fits");
        let mut seen = BTreeSet::new();
        {
            // SAFETY: `new` leaked the pool, and the one handle is given back below.
            let pool = unsafe { pool.as_ref() };
            for _ in 0..20 {
                assert!(seen.insert(pool.free.load(Ordering::Relaxed)), "an old head is back");
                let slot = pool.pop_free().expect("both are free");
                pool.push_free(slot, slot);
            }
        }
        // SAFETY: this is the handle that `new` has counted, and no slot is out.
        unsafe { release_handle(pool) };
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::backing::HeapBacking;
    use crate::sync::AtomicBool;
    use loom::sync::Arc;

    const SLOTS: u32 = 3;

    /// A pool that goes to another thread.
    struct Shared(NonNull<PoolInner>);

    // SAFETY: what is shared is atomic or immutable.
    unsafe impl Send for Shared {}

    impl Shared {
        fn get(&self) -> &PoolInner {
            // SAFETY: each thread of the model has a handle, which keeps the pool alive.
            unsafe { self.0.as_ref() }
        }
    }

    /// Notes that somebody has a slot, which nobody else had.
    fn take(owned: &[AtomicBool], slot: u32) {
        assert!(
            !owned[slot as usize].swap(true, Ordering::Relaxed),
            "slot {slot} is in two places"
        );
    }

    fn give(owned: &[AtomicBool], slot: u32) {
        owned[slot as usize].store(false, Ordering::Relaxed);
    }

    /// One thread takes slots together and frees them together. Another one takes and frees single
    /// slots, so the links that the first one follows may be stale.
    #[test]
    fn slots_that_are_taken_together_are_nobody_elses() {
        loom::model(|| {
            let layout = Layout { slots: SLOTS, slot_size: 8, headroom: 0 };
            let memory = Box::new(HeapBacking::new(8 * SLOTS as usize));
            let pool = PoolInner::new(memory, layout).expect("it fits");
            let owned: Arc<[AtomicBool]> = Arc::from_std(std::sync::Arc::from_iter(
                (0..SLOTS).map(|_| AtomicBool::new(false)),
            ));
            let own = Shared(pool);
            own.get().add_handle();
            let other = {
                let (owned, pool) = (owned.clone(), Shared(pool));
                loom::thread::spawn(move || {
                    for _ in 0..2 {
                        if let Some(slot) = pool.get().alloc_slot() {
                            take(&owned, slot);
                            give(&owned, slot);
                            // SAFETY: the slot was just taken, and is given up.
                            unsafe { free_slot(pool.0, slot) };
                        }
                    }
                    // SAFETY: this thread has that handle.
                    unsafe { release_handle(pool.0) };
                })
            };
            let mut freed = Freed::default();
            if let Some((mut slot, count)) = own.get().alloc_slots(2) {
                for _ in 0..count {
                    take(&owned, slot);
                    let next = own.get().following(slot);
                    give(&owned, slot);
                    // SAFETY: the slot was taken with the others, and is given up.
                    unsafe { freed.add(pool, slot) };
                    slot = next;
                }
            }
            freed.free();
            other.join().unwrap();
            assert_eq!(own.get().slots_out(), 0);
            // SAFETY: this is the handle that `new` has counted.
            unsafe { release_handle(pool) };
        });
    }
}
