//! The slots of a segment table: lists of segments, linked from slot to slot.

use crate::guest::region::GuestSlice;
use crate::slots::{PoolInner, free_slot};
use core::ptr::NonNull;
use static_assertions::const_assert;

/// The segments that fit into one slot of the table.
pub(crate) const PER_SLOT: usize = 4;

/// The end of a list of slots.
pub(crate) const NIL: u32 = u32::MAX;

/// One piece of a buffer. The mapping that it is in is kept alive by the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) start: *mut u8,
    pub(crate) guest_address: u64,
    pub(crate) len: u32,
}

impl Segment {
    #[inline]
    pub(crate) fn of(slice: &GuestSlice<'_>) -> Self {
        Self { start: slice.as_ptr(), guest_address: slice.guest_address(), len: slice.len() }
    }
}

/// A slot of the table: some segments of a buffer, and the slot that has the next ones.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(128))]
pub(crate) struct SegmentSlot {
    pub(crate) next: u32,
    /// The number of segments in this slot.
    pub(crate) count: u32,
    /// In the first slot of a buffer, the bytes of all segments together, and those of them that are
    /// the header.
    pub(crate) total: u32,
    pub(crate) header: u32,
    pub(crate) segments: [Segment; PER_SLOT],
}

const NO_SEGMENT: Segment = Segment { start: core::ptr::null_mut(), guest_address: 0, len: 0 };
pub(crate) const EMPTY: SegmentSlot =
    SegmentSlot { next: NIL, count: 0, total: 0, header: 0, segments: [NO_SEGMENT; PER_SLOT] };

const_assert!(size_of::<SegmentSlot>() == 128);

/// Changes a slot of a list that the caller owns.
#[inline(always)]
pub(crate) fn write_slot(pool: NonNull<PoolInner>, slot: u32, f: impl FnOnce(&mut SegmentSlot)) {
    // SAFETY: the callers own the slot ("one place per slot"): it is the frame's of their list, or
    // linked from it. So the pool is alive and nobody else reaches the slot. `SegmentTable::new`
    // made the pool of `SegmentSlot`s, which are initialised and aligned.
    f(unsafe { &mut *pool.as_ref().slot_start(slot).cast::<SegmentSlot>().as_ptr() });
}

/// Reads a slot of a list that the caller owns.
///
/// # Safety
///
/// `pool` is a segment table's, and the caller's list owns the slot ("one place per slot") for `'a`.
#[inline(always)]
pub(crate) unsafe fn read_slot<'a>(pool: NonNull<PoolInner>, slot: u32) -> &'a SegmentSlot {
    // SAFETY: the caller's slot keeps the pool alive, and nobody writes to it meanwhile.
    // `SegmentTable::new` made the pool of `SegmentSlot`s, which are initialised and aligned.
    unsafe { &*pool.as_ref().slot_start(slot).cast::<SegmentSlot>().as_ptr() }
}

/// Whether a list has more slots than its first one.
///
/// # Safety
///
/// The conditions of [`read_slot`] hold for the list's first slot.
#[inline]
pub(crate) unsafe fn has_links(pool: NonNull<PoolInner>, first: u32) -> bool {
    // SAFETY: the caller keeps the same conditions.
    unsafe { read_slot(pool, first) }.next != NIL
}

/// Frees the slots of a list behind the first one.
///
/// # Safety
///
/// `pool` is a segment table's, the caller owns the list that begins with `first`, and uses nothing of
/// it afterwards but the first slot.
#[inline]
pub(crate) unsafe fn free_links(pool: NonNull<PoolInner>, first: u32) {
    // SAFETY: the caller owns the list.
    let next = unsafe { read_slot(pool, first) }.next;
    if next != NIL {
        // SAFETY: the caller owns the list, and gives up what is behind its first slot.
        unsafe { free_list(pool, next) }
    }
}

/// Frees the slots of a list.
///
/// # Safety
///
/// `pool` is a segment table's, and the caller owns the list, which nobody uses any more.
#[cold]
#[inline(never)]
unsafe fn free_list(pool: NonNull<PoolInner>, first: u32) {
    let mut next = first;
    while next != NIL {
        // SAFETY: the slot is of the list, and not freed yet.
        let behind = unsafe { read_slot(pool, next) }.next;
        // SAFETY: the list owned the slot, and nothing links to it any more that is followed.
        unsafe { free_slot(pool, next) };
        next = behind;
    }
}

/// The bytes of all segments of a list, and those of them that are the header.
///
/// # Safety
///
/// The conditions of [`read_slot`] hold for the list's first slot.
#[inline]
pub(crate) unsafe fn lengths(pool: NonNull<PoolInner>, first: u32) -> (u32, u32) {
    // SAFETY: the caller keeps the same conditions.
    let slot = unsafe { read_slot(pool, first) };
    (slot.total, slot.header)
}
