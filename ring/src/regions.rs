//! [`Regions`]: a ring's pools, and how an entry of its queues becomes a frame.

use crate::entry::Entry;
use crate::frame::Frame;
use crate::guest::segments::SegmentTable;
use crate::pool::Pool;
use crate::slots::PoolInner;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr::NonNull;

/// The pools and segment tables whose slots may be in a ring's queues. Their index in the list is
/// their region number.
#[derive(Clone, Debug)]
pub struct Regions {
    /// Another handle to the first pool, which in most rings is the only one. Here, finding it
    /// costs one load.
    first: Pool,
    /// The pools, and the pools of the segment tables behind them. Clones share the list.
    all: Arc<[Pool]>,
    /// The number of pools that are no segment table's.
    pools: usize,
}

impl Regions {
    /// The regions of `pools`. `None` if there are none, or more than 2^16.
    pub fn new(pools: Vec<Pool>) -> Option<Self> {
        let first = pools.first()?.clone();
        let count = pools.len();
        (count <= 1 << 16).then(|| Self { first, all: pools.into(), pools: count })
    }

    /// Adds a segment table, whose buffers may be in the ring's queues from then on. `None` if there
    /// are more than 2^16 pools and tables.
    pub fn with_segment_table(self, table: &SegmentTable) -> Option<Self> {
        let all: Arc<[Pool]> = self.all.iter().chain([table.pool()]).cloned().collect();
        (all.len() <= 1 << 16).then(|| Self { all, ..self })
    }

    /// The pools, in the order of their region numbers.
    pub fn pools(&self) -> &[Pool] {
        &self.all[..self.pools]
    }

    /// Whether a region number means the same in both, because one is a clone of the other.
    #[inline]
    pub(crate) fn are_those(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.all, &other.all)
    }

    /// Whether there is a segment table.
    pub fn has_segment_table(&self) -> bool {
        self.all.len() > self.pools
    }

    /// Whether the frame is of the first pool.
    #[inline(always)]
    pub fn is_of_first(&self, frame: &Frame) -> bool {
        self.first.ptr() == frame.pool_ptr()
    }

    /// As [`find_pool`](Self::find_pool) for the frame's pool, if that is the first.
    #[inline(always)]
    pub(crate) fn find_first(&self, frame: &Frame) -> Option<u16> {
        self.is_of_first(frame).then_some(0)
    }

    /// The region number of a pool. `None` if it is not in the list, or a segment table's.
    #[inline]
    pub(crate) fn find_pool(&self, pool: NonNull<PoolInner>) -> Option<u16> {
        self.pools().iter().position(|other| other.ptr() == pool).map(|region| region as u16)
    }

    /// As [`find_table`](Self::find_table) for the pool of the frame that begins a guest's buffer, if that is
    /// the first table's. Most rings have one table.
    #[inline(always)]
    pub(crate) fn find_first_table(&self, carrier: &Frame) -> Option<u16> {
        let first = self.all.get(self.pools)?;
        (first.ptr() == carrier.pool_ptr()).then_some(self.pools as u16)
    }

    /// The region number of the segment table whose pool this is. `None` if it is not in the list.
    #[inline]
    pub(crate) fn find_table(&self, pool: NonNull<PoolInner>) -> Option<u16> {
        let tables = &self.all[self.pools..];
        let number = tables.iter().position(|table| table.ptr() == pool)?;
        Some((self.pools + number) as u16)
    }

    /// Makes a frame of an entry's slot. `None` if the entry has none.
    ///
    /// # Safety
    ///
    /// The entry carries the range of a frame and the region number that `find_pool` or `find_table` gives
    /// for the frame's pool. The caller has taken the entry out of its queue, and calls this once for it.
    #[inline]
    pub(crate) unsafe fn frame(&self, entry: &impl Entry) -> Option<Frame> {
        // SAFETY: the caller keeps the same conditions, and the entry has a slot.
        entry.has_slot().then(|| unsafe { self.frame_of(entry) })
    }

    /// Like [`frame`](Self::frame), for an entry that has a slot.
    ///
    /// # Safety
    ///
    /// The same conditions as for [`frame`](Self::frame), and the entry has a slot. While the entry
    /// stays in its queue, its consumer may also call this if it only reads the frame and then
    /// forgets it.
    #[inline(always)]
    pub(crate) unsafe fn frame_of(&self, entry: &impl Entry) -> Frame {
        let (region, range) = entry.slot();
        debug_assert!(entry.has_slot() && usize::from(region) < self.all.len());
        // SAFETY: the caller says that the region's number was found. Only numbers of `all` are found,
        // which never changes, and all queues of a ring have clones of the same regions.
        let pool = unsafe { self.all.get_unchecked(usize::from(region)) }.ptr();
        // SAFETY: the caller has taken the entry, so the slot is in no other place now ("one place
        // per slot"). `refs` counts it as out, because `into_raw` did not free it. The range was a
        // frame's.
        unsafe { Frame::from_raw(pool, range) }
    }
}
