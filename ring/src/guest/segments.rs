//! [`SegmentTable`]: where the segments of guest buffers are listed.

use crate::backing::Backing;
use crate::entry::OffloadState;
use crate::frame::Frame;
use crate::guest::buffer::GuestBuffer;
use crate::guest::memory::{GuestFault, GuestMemory};
use crate::guest::region::GuestSlice;
use crate::pool::{Pool, Stock};
use crate::segment_slots::{EMPTY, NIL, PER_SLOT, Segment, SegmentSlot, write_slot};
use crate::slots::{Layout, LayoutError};
use crate::sync::UnsafeCell;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;

/// The largest number of segments of one buffer.
pub const SEGMENTS_MAX: u32 = 256;

/// The memory of the table's slots, and every guest memory that a buffer of the table may be in. It
/// is dropped when the table is gone and the last buffer has returned.
struct SegmentBacking {
    slots: NonNull<[SegmentSlot]>,
    memories: NonNull<UnsafeCell<Vec<GuestMemory>>>,
}

// SAFETY: the value owns what both pointers are to. What it owns is `Send`: the pointers in the
// segments are into mappings that `memories` keeps, and those may be used by any thread.
unsafe impl Send for SegmentBacking {}

// SAFETY: `SegmentTable::new` leaked the slots, which are initialised and stay where they are. The
// value alone has them, until `drop` frees them.
unsafe impl Backing for SegmentBacking {
    fn base(&self) -> NonNull<u8> {
        self.slots.cast()
    }

    fn len(&self) -> usize {
        self.slots.len() * size_of::<SegmentSlot>()
    }
}

impl Drop for SegmentBacking {
    fn drop(&mut self) {
        // SAFETY: `SegmentTable::new` leaked both boxes for this value, which alone frees them. The
        // table's own pointer to `memories` is not used any more: the table has a handle to the
        // pool, and the pool drops its backing after the last handle is gone.
        drop(unsafe {
            (Box::from_raw(self.slots.as_ptr()), Box::from_raw(self.memories.as_ptr()))
        });
    }
}

/// Where the segments of guest buffers are listed, and the guest's memory that they are in.
///
/// A table serves one ring or several. It is allocated once. A buffer takes a slot for every
/// four of its segments, and gives the slots back when it is dropped.
///
/// The mappings of the memory live as long as the table, and beyond that as long as a buffer of the
/// table exists, also in a ring or with a device. So nothing reads or writes what is unmapped.
pub struct SegmentTable {
    pool: Pool,
    /// Free slots that the next buffers get.
    stock: Stock,
    memory: GuestMemory,
    /// In the pool's backing. Only this table changes it, and it has a handle to the pool.
    memories: NonNull<UnsafeCell<Vec<GuestMemory>>>,
}

// SAFETY: the pointer is to a list of `Send` values, which lives as long as the table's pool handle,
// and which only the table uses.
unsafe impl Send for SegmentTable {}
// SAFETY: `&SegmentTable` gives no access to the list; the pool and the memory are `Sync`.
unsafe impl Sync for SegmentTable {}

/// Why a guest's addresses are no buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestBufferError {
    /// An address is in no region.
    Fault(GuestFault),
    /// A slice is of another memory than the table's.
    ForeignMemory,
    /// The table has no free slots. Buffers that are dropped free some.
    NoSlots,
    /// The buffer has more than [`SEGMENTS_MAX`] segments.
    TooManySegments,
    /// The buffer has fewer bytes than its header.
    NoHeader,
    /// The buffer has 2^31 bytes or more.
    TooLong,
}

impl fmt::Display for GuestBufferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestBufferError::Fault(fault) => fault.fmt(f),
            GuestBufferError::ForeignMemory => {
                f.write_str("the slice is of another memory than the segment table's")
            }
            GuestBufferError::NoSlots => f.write_str("the segment table has no free slots"),
            GuestBufferError::TooManySegments => {
                write!(f, "a buffer has at most {SEGMENTS_MAX} segments")
            }
            GuestBufferError::NoHeader => f.write_str("the buffer is shorter than its header"),
            GuestBufferError::TooLong => f.write_str("a buffer has less than 2 GiB"),
        }
    }
}

impl core::error::Error for GuestBufferError {}

impl From<GuestFault> for GuestBufferError {
    fn from(fault: GuestFault) -> Self {
        GuestBufferError::Fault(fault)
    }
}

impl SegmentTable {
    /// A table with space for `segments` segments, rounded up to a multiple of four, of buffers in
    /// `memory`.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if there are no segments, or too many.
    pub fn new(memory: GuestMemory, segments: u32) -> Result<Self, LayoutError> {
        let slots = segments.div_ceil(PER_SLOT as u32);
        let layout = Layout { slots, slot_size: size_of::<SegmentSlot>() as u32, headroom: 0 };
        let list = Box::new(UnsafeCell::new(alloc::vec![memory.clone()]));
        let memories = NonNull::from(Box::leak(list));
        let list = alloc::vec![EMPTY; slots as usize].into_boxed_slice();
        let backing = SegmentBacking { slots: NonNull::from(Box::leak(list)), memories };
        let pool = Pool::new(Box::new(backing), layout)?;
        Ok(Self { pool, stock: Stock::default(), memory, memories })
    }

    /// The memory that new buffers are in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Sets the memory that new buffers are in.
    ///
    /// Buffers that exist stay in the memory that they were made of, and its mappings stay too, until
    /// this function or [`release_unused`](Self::release_unused) is called while no buffer exists.
    /// So before a guest's region is taken away, drain the rings that have buffers, and drop what
    /// they complete.
    ///
    /// Returns whether the mappings of earlier memory have been given up.
    pub fn set_memory(&mut self, memory: GuestMemory) -> bool {
        self.memory = memory.clone();
        self.with_memories(|memories| memories.push(memory));
        self.release_unused()
    }

    /// Gives the mappings of earlier memory up, unless a buffer exists, which may be in it. Returns
    /// whether it has.
    pub fn release_unused(&mut self) -> bool {
        self.pool.empty(&mut self.stock);
        let unused = self.pool.slots_out_acquire() == 0;
        if unused {
            self.with_memories(|memories| drop(memories.drain(..memories.len() - 1)));
        }
        unused
    }

    fn with_memories<R>(&mut self, f: impl FnOnce(&mut Vec<GuestMemory>) -> R) -> R {
        // SAFETY: the pool's backing has the list, and `self.pool` keeps the backing alive.
        let memories = unsafe { self.memories.as_ref() };
        // SAFETY: only this function uses the list, and `self` is borrowed exclusively.
        memories.with_mut(|memories| f(unsafe { &mut *memories }))
    }

    /// The number of buffers' slots that are in use, each for up to four segments. A snapshot.
    pub fn slots_in_use(&self) -> u32 {
        self.pool.slots_out() - self.stock.count
    }

    /// The pool whose slots are the table's.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Makes a buffer of ranges of the guest's memory, in their order. Each is an address and a
    /// number of bytes. The first `header` bytes are space for a `virtio_net_hdr`: 0 or 12.
    ///
    /// # Errors
    ///
    /// [`GuestBufferError`]. In this case the table's slots are free again.
    pub fn buffer(
        &self,
        ranges: impl IntoIterator<Item = (u64, u32)>,
        header: u32,
    ) -> Result<GuestBuffer, GuestBufferError> {
        let slices = ranges.into_iter().flat_map(|(address, len)| self.memory.slices(address, len));
        let slices = slices.map(|slice| slice.map_err(GuestBufferError::from));
        let mut alloc = || self.pool.alloc();
        collect(List::new(&self.pool, &mut alloc)?, &self.memory, slices, header)
    }

    /// Makes a buffer of slices of [`memory`](Self::memory), as [`buffer`](Self::buffer) does.
    ///
    /// It takes slots out of the free ones 32 at a time, so that a buffer costs no locked instruction.
    /// Those that it has not used yet are free for this function only, until
    /// [`release_unused`](Self::release_unused) is called.
    ///
    /// # Errors
    ///
    /// [`GuestBufferError`]. In this case the table's slots are free again.
    #[inline]
    pub fn buffer_of<'m>(
        &mut self,
        slices: impl IntoIterator<Item = GuestSlice<'m>>,
        header: u32,
    ) -> Result<GuestBuffer, GuestBufferError> {
        let mut slices = slices.into_iter();
        let (first, second) = (slices.next(), slices.next());
        match (first, second) {
            (Some(only), None) => self.buffer_of_one(only, header),
            (first, second) => {
                self.buffer_of_many(first.into_iter().chain(second).chain(slices), header)
            }
        }
    }

    /// Makes a buffer of one slice, as most are.
    #[inline]
    fn buffer_of_one(
        &mut self,
        slice: GuestSlice<'_>,
        header: u32,
    ) -> Result<GuestBuffer, GuestBufferError> {
        if !self.memory.owns(&slice) {
            return Err(GuestBufferError::ForeignMemory);
        }
        let total = slice.len();
        if total >= 1 << 31 {
            return Err(GuestBufferError::TooLong);
        }
        let packet = total.checked_sub(header).ok_or(GuestBufferError::NoHeader)?;
        let mut frame = self.pool.alloc_from(&mut self.stock).ok_or(GuestBufferError::NoSlots)?;
        write_slot(self.pool.ptr(), frame.slot(), |slot| {
            (slot.next, slot.count, slot.total, slot.header) =
                (NIL, u32::from(total > 0), total, header);
            slot.segments[0] = Segment::of(&slice);
        });
        frame.mark_guest(packet, state_of(u32::from(total > 0)));
        Ok(GuestBuffer::new(frame))
    }

    #[inline(never)]
    fn buffer_of_many<'m>(
        &mut self,
        slices: impl Iterator<Item = GuestSlice<'m>>,
        header: u32,
    ) -> Result<GuestBuffer, GuestBufferError> {
        let Self { pool, stock, memory, .. } = self;
        let mut alloc = || pool.alloc_from(stock);
        collect(List::new(pool, &mut alloc)?, memory, slices.map(Ok), header)
    }
}

impl Drop for SegmentTable {
    fn drop(&mut self) {
        self.pool.empty(&mut self.stock);
    }
}

#[inline]
fn collect<'m, A: FnMut() -> Option<Frame>>(
    mut list: List<'_, A>,
    memory: &GuestMemory,
    slices: impl Iterator<Item = Result<GuestSlice<'m>, GuestBufferError>>,
    header: u32,
) -> Result<GuestBuffer, GuestBufferError> {
    for slice in slices {
        let slice = slice?;
        if !memory.owns(&slice) {
            return Err(GuestBufferError::ForeignMemory);
        }
        if !slice.is_empty() {
            list.push(&slice)?;
        }
    }
    let total = list.total;
    if total >= 1 << 31 {
        return Err(GuestBufferError::TooLong);
    }
    let Some(packet) = (total as u32).checked_sub(header) else {
        return Err(GuestBufferError::NoHeader);
    };
    Ok(GuestBuffer::new(list.finish(header, packet)))
}

impl fmt::Debug for SegmentTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SegmentTable")
            .field("memory", &self.memory)
            .field("slots_in_use", &self.slots_in_use())
            .finish_non_exhaustive()
    }
}

/// The state of a list with so many segments.
#[inline]
fn state_of(segments: u32) -> OffloadState {
    if segments == 1 { OffloadState::GUEST } else { OffloadState::GUEST_IN_PIECES }
}

/// A list of segments that is being made. Until it is finished, dropping it frees its slots.
struct List<'t, A> {
    pool: &'t Pool,
    /// Takes a slot of the pool.
    alloc: &'t mut A,
    /// The first slot.
    frame: Frame,
    last: u32,
    /// The segments in the last slot, and in all.
    count: u32,
    segments: u32,
    total: u64,
}

impl<'t, A: FnMut() -> Option<Frame>> List<'t, A> {
    #[inline]
    fn new(pool: &'t Pool, alloc: &'t mut A) -> Result<Self, GuestBufferError> {
        let mut frame = alloc().ok_or(GuestBufferError::NoSlots)?;
        let slot = frame.slot();
        write_slot(pool.ptr(), slot, |slot| {
            (slot.next, slot.count) = (NIL, 0);
        });
        // From here on, dropping it frees the slots that follow.
        frame.mark_guest(0, OffloadState::GUEST_IN_PIECES);
        Ok(Self { pool, alloc, frame, last: slot, count: 0, segments: 0, total: 0 })
    }

    #[inline]
    fn push(&mut self, slice: &GuestSlice<'_>) -> Result<(), GuestBufferError> {
        if self.segments == SEGMENTS_MAX {
            return Err(GuestBufferError::TooManySegments);
        }
        if self.count as usize == PER_SLOT {
            self.add_slot()?;
        }
        let count = self.count;
        write_slot(self.pool.ptr(), self.last, |slot| {
            slot.segments[count as usize] = Segment::of(slice);
            slot.count = count + 1;
        });
        self.count += 1;
        self.segments += 1;
        self.total += u64::from(slice.len());
        Ok(())
    }

    fn add_slot(&mut self) -> Result<(), GuestBufferError> {
        let next = (self.alloc)().ok_or(GuestBufferError::NoSlots)?;
        let slot = next.slot();
        // The list owns the slot from here on: the link in the slot before is its one place.
        core::mem::forget(next);
        write_slot(self.pool.ptr(), slot, |slot| (slot.next, slot.count) = (NIL, 0));
        write_slot(self.pool.ptr(), self.last, |last| last.next = slot);
        (self.last, self.count) = (slot, 0);
        Ok(())
    }

    #[inline]
    fn finish(self, header: u32, packet: u32) -> Frame {
        let Self { pool, mut frame, total, segments, .. } = self;
        write_slot(pool.ptr(), frame.slot(), |slot| {
            (slot.total, slot.header) = (total as u32, header);
        });
        frame.mark_guest(packet, state_of(segments));
        frame
    }
}
