//! [`Pool`]: a handle to a region of slots, from which frames are allocated.

use crate::backing::Backing;
use crate::entry::{OffloadState, SlotRange};
use crate::frame::Frame;
use crate::slots::{Freed, Layout, LayoutError, PoolInner, release_handle};
use alloc::boxed::Box;
use core::fmt;
use core::ptr::NonNull;

/// The slots of a stock that is full.
const STOCK: u32 = 32;

/// Slots of a pool that one owner has taken together, and allocates from. So a slot does not cost the
/// locked instructions that a pool costs.
///
/// A stock that is dropped without [`Pool::empty`] loses its slots.
#[derive(Debug, Default)]
pub(crate) struct Stock {
    /// The first of the slots, which are linked.
    first: u32,
    pub(crate) count: u32,
}

/// A handle to a pool of slots. Cloning it is cheap; any thread may allocate from it.
///
/// The memory lives until the last handle is dropped **and** the last [`Frame`] has returned to the
/// pool, in any order.
pub struct Pool {
    inner: NonNull<PoolInner>,
}

// SAFETY: everything reachable through a handle is atomic or immutable after construction, and a
// slot's bytes are reached only through the one `Frame` that owns it ("one place per slot").
unsafe impl Send for Pool {}
// SAFETY: `&Pool` gives access to nothing else: atomics, immutable fields, and frames that each own
// their slot.
unsafe impl Sync for Pool {}

impl Pool {
    /// Cuts `backing` into slots, which are all free.
    pub fn new(backing: Box<dyn Backing>, layout: Layout) -> Result<Self, LayoutError> {
        Ok(Self { inner: PoolInner::new(backing, layout)? })
    }

    fn inner(&self) -> &PoolInner {
        // SAFETY: `refs` counts this handle, so `PoolInner` is alive ("the pool outlives its
        // slots").
        unsafe { self.inner.as_ref() }
    }

    /// Takes a slot from the free list, as a frame whose packet is empty and begins behind the
    /// headroom. `None` if every slot is out. The bytes are those that the slot's last owner left
    /// there.
    pub fn alloc(&self) -> Option<Frame> {
        let inner = self.inner();
        let slot = inner.alloc_slot()?;
        let (offset, state) = (inner.layout.headroom, OffloadState::ABSENT);
        let range = SlotRange::new(slot, offset, 0, state);
        // SAFETY: `alloc_slot` took the slot out of the free list, so it is in no other place ("one
        // place per slot"), and counted it as out. `Layout::check` saw that the headroom is smaller
        // than a slot.
        Some(unsafe { Frame::from_raw(self.inner, range) })
    }

    /// As [`alloc`](Self::alloc), out of a stock of slots that this fills.
    #[inline]
    pub(crate) fn alloc_from(&self, stock: &mut Stock) -> Option<Frame> {
        let inner = self.inner();
        if stock.count == 0 {
            (stock.first, stock.count) = inner.alloc_slots(STOCK)?;
        }
        let slot = stock.first;
        (stock.first, stock.count) = (inner.following(slot), stock.count - 1);
        let range = SlotRange::new(slot, inner.layout.headroom, 0, OffloadState::ABSENT);
        // SAFETY: `alloc_slots` took the slot out of the free list and counted it as out. The stock had
        // it since then, and does not have it any more. The headroom is as in `alloc`.
        Some(unsafe { Frame::from_raw(self.inner, range) })
    }

    /// Returns what is in a stock of this pool to the free list.
    pub(crate) fn empty(&self, stock: &mut Stock) {
        let mut freed = Freed::default();
        while stock.count > 0 {
            let slot = stock.first;
            (stock.first, stock.count) = (self.inner().following(slot), stock.count - 1);
            // SAFETY: the stock owned the slot, and does not have it any more.
            unsafe { freed.add(self.inner, slot) }
        }
    }

    /// How the region is cut into slots.
    pub fn layout(&self) -> Layout {
        self.inner().layout
    }

    /// The bytes that a packet may have in a fresh frame.
    pub fn capacity(&self) -> u32 {
        self.layout().slot_size - self.layout().headroom
    }

    /// The slots that are not in the free list: those held as frames, in a queue, or with a device.
    /// A snapshot.
    pub fn slots_out(&self) -> u32 {
        self.inner().slots_out()
    }

    /// As [`slots_out`](Self::slots_out). If it is 0, what the owners of the slots did comes before
    /// what the caller does next.
    pub(crate) fn slots_out_acquire(&self) -> u32 {
        self.inner().slots_out_acquire()
    }

    /// Whether `frame` owns a slot of this pool.
    #[inline]
    pub fn owns(&self, frame: &Frame) -> bool {
        frame.pool_ptr() == self.inner
    }

    #[inline]
    pub(crate) fn ptr(&self) -> NonNull<PoolInner> {
        self.inner
    }
}

impl Clone for Pool {
    fn clone(&self) -> Self {
        self.inner().add_handle();
        Self { inner: self.inner }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: `refs` counts this handle, and nothing uses it after its drop.
        unsafe { release_handle(self.inner) }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("layout", &self.layout())
            .field("slots_out", &self.slots_out())
            .finish()
    }
}
