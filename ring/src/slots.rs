//! Slots: a region of memory cut into equal pieces, a free list, and the count that decides when
//! the memory goes.
//!
//! Invariants (ARCHITECTURE.md, "Ownership"):
//! * **One place per slot.** A slot index is in the free list, or in exactly one
//!   [`Frame`](crate::Frame), or in exactly one queue entry. Only `pool` and `queue` turn one into
//!   the other.
//! * **The pool outlives its slots.** `refs` counts handles and slots out of the free list; the
//!   one who takes it to zero frees both.

use crate::backing::Backing;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use alloc::boxed::Box;
use core::fmt;
use core::ptr::NonNull;
use crossbeam_utils::CachePadded;

/// How a region is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of slots.
    pub slots: u32,
    /// Bytes from one slot to the next.
    pub slot_size: u32,
    /// Bytes at a slot's start kept free in front of a fresh frame.
    pub headroom: u32,
}

/// Why a region cannot be cut that way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// No slots, or slots of no bytes.
    Zero,
    /// 2^31 slots or more, or 2^31 bytes or more in one.
    TooLarge,
    /// The headroom leaves no room for a packet.
    NoSpace,
    /// The memory is smaller than `slots * slot_size`.
    NotEnoughMemory,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LayoutError::Zero => "a pool needs at least one slot of at least one byte",
            LayoutError::TooLarge => "a pool holds fewer than 2^31 slots of less than 2 GiB each",
            LayoutError::NoSpace => "the headroom leaves no room for a packet in the slot",
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

/// One handle in `PoolInner::refs`; slots out are counted in the low half.
const HANDLE: u64 = 1 << 32;
/// End of the free list.
const NIL: u32 = u32::MAX;

pub(crate) struct PoolInner {
    base: NonNull<u8>,
    pub(crate) layout: Layout,
    /// Index of the first free slot in the low half; in the high half a tag that every change
    /// raises, so that a compare-exchange cannot mistake a slot that left and came back.
    free: CachePadded<AtomicU64>,
    /// `handles * HANDLE + slots out`. At zero nobody can reach the pool any more.
    refs: CachePadded<AtomicU64>,
    /// `next[i]`: the free slot behind free slot `i`.
    next: Box<[AtomicU32]>,
    /// Dropped with the pool: the memory under `base`.
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
        // Relaxed: the caller's handle keeps the count above zero.
        self.refs.fetch_add(1, Ordering::Relaxed);
        Some(slot)
    }

    /// Counts one more handle.
    pub(crate) fn add_handle(&self) {
        // Relaxed: the caller's own handle keeps the count above zero.
        let before = self.refs.fetch_add(HANDLE, Ordering::Relaxed);
        // 2^31 handles can only be a leak in a loop; stop before the count can wrap.
        assert!(before < HANDLE << 31, "too many handles to one pool");
    }

    /// Slots that are not in the free list. A snapshot.
    pub(crate) fn slots_out(&self) -> u32 {
        self.refs.load(Ordering::Relaxed) as u32
    }

    fn push_free(&self, slot: u32) {
        let mut head = self.free.load(Ordering::Relaxed);
        loop {
            // Relaxed: published by the Release exchange below.
            self.next[slot as usize].store(head as u32, Ordering::Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(slot);
            // Release: pairs with the Acquire in `pop_free`. The next owner sees our link, and every
            // byte we wrote into the slot before it.
            match self.free.compare_exchange_weak(head, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(seen) => head = seen,
            }
        }
    }

    fn pop_free(&self) -> Option<u32> {
        // Acquire (both): pairs with the Release in `push_free`.
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            let slot = head as u32;
            if slot == NIL {
                return None;
            }
            // May be stale if somebody else took the slot; then the tag has moved and we retry.
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
        // SAFETY: `slot < slots`, and `Layout::check` made sure that slots * slot_size bytes lie
        // inside the backing.
        unsafe { self.base.add(slot as usize * self.layout.slot_size as usize) }
    }
}

/// Gives `what` (a handle or slots) back; frees everything if it was the last.
///
/// # Safety
///
/// The caller owns `what` in `refs` and touches the pool no more.
unsafe fn release(pool: NonNull<PoolInner>, what: u64) {
    // SAFETY: the caller's share keeps the pool alive up to this line.
    let refs = unsafe { &pool.as_ref().refs };
    // Release: what we did with the pool comes before the freeing, whoever does it.
    if refs.fetch_sub(what, Ordering::Release) == what {
        // Acquire: what all the others did comes before our freeing. A load and not a fence, which
        // ThreadSanitizer does not know.
        refs.load(Ordering::Acquire);
        // SAFETY: the count is zero, so no handle and no slot is left, and we are the one who
        // took it there ("the pool outlives its slots"); the pool came from `Box::leak`.
        drop(unsafe { Box::from_raw(pool.as_ptr()) });
    }
}

/// Gives a handle back.
///
/// # Safety
///
/// The caller owns one handle and touches the pool no more.
pub(crate) unsafe fn release_handle(pool: NonNull<PoolInner>) {
    // SAFETY: the caller gives up exactly the one handle it owned.
    unsafe { release(pool, HANDLE) }
}

/// Puts a slot home.
///
/// # Safety
///
/// The caller owns `slot` and gives it up here; `pool` is its pool.
#[inline(never)]
pub(crate) unsafe fn free_slot(pool: NonNull<PoolInner>, slot: u32) {
    // SAFETY: the slot is still counted as out, so the pool is alive.
    unsafe { pool.as_ref() }.push_free(slot);
    // SAFETY: we give up exactly the one slot we owned.
    unsafe { release(pool, 1) }
}
