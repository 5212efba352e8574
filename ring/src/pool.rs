//! [`Pool`]: a handle to a region of slots, from which frames are allocated.

use crate::backing::Backing;
use crate::entry::{HeaderState, Place};
use crate::frame::Frame;
use crate::slots::{Header, Layout, LayoutError, release_handle};
use alloc::boxed::Box;
use core::fmt;
use core::ptr::NonNull;

/// A handle to a pool of slots. Cloning it is cheap; any thread may allocate from it.
///
/// The memory lives until the last handle is gone **and** the last [`Frame`] is home, in whatever
/// order they go.
pub struct Pool {
    header: NonNull<Header>,
}

// SAFETY: everything reachable through a handle is atomic or immutable after construction, and a
// slot's bytes are reached only through the one `Frame` that owns it ("one place per slot").
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// Cuts `backing` into slots, all free.
    pub fn new(backing: Box<dyn Backing>, layout: Layout) -> Result<Self, LayoutError> {
        Ok(Self { header: Header::new(backing, layout)? })
    }

    fn header(&self) -> &Header {
        // SAFETY: this handle is counted in `refs`, so the header is alive ("the pool outlives
        // its slots").
        unsafe { self.header.as_ref() }
    }

    /// Takes a slot from the free list: an empty frame behind the headroom. `None` if every slot
    /// is out. The bytes are what the slot's last owner left there.
    pub fn alloc(&self) -> Option<Frame> {
        let header = self.header();
        let slot = header.alloc_slot()?;
        let (offset, header) = (header.layout.headroom, HeaderState::ABSENT);
        let place = Place::new(slot, offset, 0, header);
        // SAFETY: `alloc_slot` took the slot out of the free list, so it is in no other place, and
        // counted it as out.
        Some(unsafe { Frame::from_raw(self.header, place) })
    }

    /// How the region is cut.
    pub fn layout(&self) -> Layout {
        self.header().layout
    }

    /// Bytes a packet may take in a fresh frame.
    pub fn capacity(&self) -> u32 {
        self.layout().slot_size - self.layout().headroom
    }

    /// Slots that are not in the free list: held as frames, queued, or with a device. A snapshot.
    pub fn slots_out(&self) -> u32 {
        self.header().slots_out()
    }

    /// Whether `frame` is a slot of this pool.
    #[inline]
    pub fn owns(&self, frame: &Frame) -> bool {
        frame.header() == self.header
    }

    #[inline]
    pub(crate) fn raw(&self) -> NonNull<Header> {
        self.header
    }
}

impl Clone for Pool {
    fn clone(&self) -> Self {
        self.header().add_handle();
        Self { header: self.header }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: we give up the one handle we are.
        unsafe { release_handle(self.header) }
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
