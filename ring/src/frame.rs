//! [`Frame`]: the one owner of a slot.

use crate::pool::{Header, put_home};
use crate::view::PacketView;
use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use static_assertions::{assert_impl_all, assert_not_impl_any};

/// The exclusive owner of one slot of a [`Pool`](crate::Pool), and a window on it: the packet.
///
/// ```text
/// slot:  | headroom ............ | packet (len) ......... | tailroom ........ |
///        0                    offset                 offset + len        slot_size
/// ```
///
/// It dereferences to the packet's bytes. It is neither `Copy` nor `Clone`: submitting a frame moves
/// it away, and a completion moves it back. Dropping it puts the slot into its pool's free list,
/// from any thread, also after the pool's handles are gone.
///
/// Bytes that a longer length or a smaller offset uncovers are what was last written there, possibly
/// by an earlier packet; they are never uninitialised.
pub struct Frame {
    header: NonNull<Header>,
    slot: u32,
    offset: u32,
    len: u32,
}

assert_not_impl_any!(Frame: Clone, Copy);
assert_impl_all!(Frame: Send, Sync);

// SAFETY: a frame is the only way to its slot's bytes ("one place per slot"), and the header is
// shared through atomics.
unsafe impl Send for Frame {}
// SAFETY: `&Frame` only reads.
unsafe impl Sync for Frame {}

/// The slot has not that much room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRoom {
    /// Bytes asked for.
    pub wanted: usize,
    /// Bytes there are.
    pub room: usize,
}

impl fmt::Display for OutOfRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes were asked of a frame that has {}", self.wanted, self.room)
    }
}

impl core::error::Error for OutOfRoom {}

impl Frame {
    /// # Safety
    ///
    /// `slot` is counted as out in `header` and is in no other place; `offset + len` is within the
    /// slot.
    #[inline]
    pub(crate) unsafe fn from_raw(
        header: NonNull<Header>,
        slot: u32,
        offset: u32,
        len: u32,
    ) -> Self {
        Self { header, slot, offset, len }
    }

    /// Gives up ownership without putting the slot home: the caller puts slot, offset and length
    /// into a queue entry, which owns it from then on.
    #[inline]
    pub(crate) fn into_raw(self) -> (u32, u32, u32) {
        let raw = (self.slot, self.offset, self.len);
        core::mem::forget(self);
        raw
    }

    #[inline]
    pub(crate) fn header(&self) -> NonNull<Header> {
        self.header
    }

    fn pool(&self) -> &Header {
        // SAFETY: our slot is counted as out, so the header is alive ("the pool outlives its
        // slots").
        unsafe { self.header.as_ref() }
    }

    /// Bytes of the packet.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether the packet has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes from the packet's start to the end of the slot: the longest the packet may become.
    pub fn capacity(&self) -> usize {
        (self.pool().layout.slot_size - self.offset) as usize
    }

    /// Bytes in front of the packet.
    pub fn headroom(&self) -> usize {
        self.offset as usize
    }

    /// The slot's number in its pool.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Back to the state after [`Pool::alloc`](crate::Pool::alloc): the pool's headroom, length 0.
    pub fn reset(&mut self) {
        self.offset = self.pool().layout.headroom;
        self.len = 0;
    }

    /// Makes the packet `len` bytes long, from the same start.
    pub fn set_len(&mut self, len: usize) -> Result<(), OutOfRoom> {
        let room = self.capacity();
        if len > room {
            return Err(OutOfRoom { wanted: len, room });
        }
        self.len = len as u32;
        Ok(())
    }

    /// Drops `n` bytes at the packet's front; they become headroom.
    pub fn trim_front(&mut self, n: usize) -> Result<(), OutOfRoom> {
        if n > self.len() {
            return Err(OutOfRoom { wanted: n, room: self.len() });
        }
        self.offset += n as u32;
        self.len -= n as u32;
        Ok(())
    }

    /// Drops `n` bytes at the packet's end.
    pub fn trim_back(&mut self, n: usize) -> Result<(), OutOfRoom> {
        if n > self.len() {
            return Err(OutOfRoom { wanted: n, room: self.len() });
        }
        self.len -= n as u32;
        Ok(())
    }

    /// Takes `n` bytes of headroom into the packet's front, for a header to be written there.
    pub fn grow_front(&mut self, n: usize) -> Result<(), OutOfRoom> {
        if n > self.headroom() {
            return Err(OutOfRoom { wanted: n, room: self.headroom() });
        }
        self.offset -= n as u32;
        self.len += n as u32;
        Ok(())
    }

    /// Makes the packet a copy of `bytes`, from the same start.
    pub fn copy_from(&mut self, bytes: &[u8]) -> Result<(), OutOfRoom> {
        self.set_len(bytes.len())?;
        self.copy_from_slice(bytes);
        Ok(())
    }

    /// The packet as a view on its slot, for parsing without copying.
    #[inline]
    pub fn view(&self) -> PacketView<&[u8]> {
        PacketView::new(self.whole(), self.offset, self.len).expect("the packet is in its slot")
    }

    /// The packet as a view that can be written through.
    #[inline]
    pub fn view_mut(&mut self) -> PacketView<&mut [u8]> {
        let (offset, len) = (self.offset, self.len);
        PacketView::new(self.whole_mut(), offset, len).expect("the packet is in its slot")
    }

    /// All bytes from the packet's start to the end of the slot, for a writer that learns the
    /// length later; see [`set_len`](Self::set_len).
    #[inline]
    pub fn room_mut(&mut self) -> &mut [u8] {
        let offset = self.offset as usize;
        &mut self.whole_mut()[offset..]
    }

    fn whole(&self) -> &[u8] {
        let (start, size) = (self.pool().slot_start(self.slot), self.pool().layout.slot_size);
        // SAFETY: the slot lies in the backing, which is initialised; we own it alone ("one place
        // per slot") and are borrowed shared.
        unsafe { core::slice::from_raw_parts(start.as_ptr(), size as usize) }
    }

    fn whole_mut(&mut self) -> &mut [u8] {
        let (start, size) = (self.pool().slot_start(self.slot), self.pool().layout.slot_size);
        // SAFETY: as in `whole`, and we are borrowed exclusively.
        unsafe { core::slice::from_raw_parts_mut(start.as_ptr(), size as usize) }
    }
}

impl Drop for Frame {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: we own the slot ("one place per slot") and this is the end of us.
        unsafe { put_home(self.header, self.slot) }
    }
}

impl Deref for Frame {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.whole()[self.offset as usize..][..self.len as usize]
    }
}

impl DerefMut for Frame {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len as usize;
        &mut self.room_mut()[..len]
    }
}

impl AsRef<[u8]> for Frame {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Frame {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame")
            .field("slot", &self.slot)
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
