//! [`Regions`]: a ring's pools, and how an entry of its queues becomes a frame.

use crate::entry::Entry;
use crate::frame::Frame;
use crate::pool::Pool;
use alloc::boxed::Box;
use alloc::vec::Vec;

/// The pools whose slots may stand in a ring's queues; a pool's place in the list is its region
/// number.
#[derive(Clone, Debug)]
pub struct Regions {
    /// Another handle to the first pool, in most rings the only one, where it costs one load.
    first: Pool,
    pools: Box<[Pool]>,
}

impl Regions {
    /// At most 2^16 pools; `None` if there are more, or none.
    pub fn new(pools: Vec<Pool>) -> Option<Self> {
        let first = pools.first()?.clone();
        (pools.len() <= 1 << 16).then(|| Self { first, pools: pools.into_boxed_slice() })
    }

    /// The pools, in the order of their region numbers.
    pub fn pools(&self) -> &[Pool] {
        &self.pools
    }

    #[inline]
    pub(crate) fn find(&self, frame: &Frame) -> Option<u16> {
        let pool = frame.pool_ptr();
        if self.first.ptr() == pool {
            return Some(0);
        }
        self.pools.iter().position(|other| other.ptr() == pool).map(|region| region as u16)
    }

    /// Makes an entry's slot a frame again.
    ///
    /// # Safety
    ///
    /// The entry came from a frame that `find` placed in these regions, it was taken out of its
    /// queue, and this is the only call for it.
    #[inline]
    pub(crate) unsafe fn frame(&self, entry: &impl Entry) -> Option<Frame> {
        // SAFETY: as the caller says.
        entry.has_slot().then(|| unsafe { self.frame_of(entry) })
    }

    /// As [`frame`](Self::frame), of an entry that has a slot.
    ///
    /// # Safety
    ///
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn frame_of(&self, entry: &impl Entry) -> Frame {
        let (region, range) = entry.slot();
        debug_assert!(entry.has_slot() && usize::from(region) < self.pools.len());
        // SAFETY: `find` gave the region's number, which the entry carries unchanged.
        let pool = unsafe { self.pools.get_unchecked(usize::from(region)) }.ptr();
        // SAFETY: the caller has taken the entry, so the slot is in no other place now; it is
        // counted as out since its frame was submitted, and offset and length were the frame's.
        unsafe { Frame::from_raw(pool, range) }
    }
}
