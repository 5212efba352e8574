//! [`Frame`]: the one owner of a slot.

use crate::entry::{OffloadState, SlotRange};
use crate::offload::{self, OffloadError, OffloadHeader};
use crate::slots::{PoolInner, free_slot};
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
/// On a device with offload a 12-byte header stands directly in front of the packet, in the
/// headroom; see [`offload`](Self::offload). It goes with the packet: trimming and growing move it.
///
/// Bytes that a longer length or a smaller offset uncovers are what was last written there, possibly
/// by an earlier packet; they are never uninitialised.
pub struct Frame {
    pool: NonNull<PoolInner>,
    range: SlotRange,
}

assert_not_impl_any!(Frame: Clone, Copy);
assert_impl_all!(Frame: Send, Sync);

// SAFETY: a frame is the only way to its slot's bytes ("one place per slot"), and `PoolInner` is
// shared through atomics.
unsafe impl Send for Frame {}
// SAFETY: `&Frame` only reads.
unsafe impl Sync for Frame {}

/// Why a packet's front could not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrontError {
    /// There is not that much packet, or headroom.
    Space(OutOfSpace),
    /// The packet's offload header would not be true any more.
    Offload(OffloadError),
}

impl fmt::Display for FrontError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrontError::Space(error) => error.fmt(f),
            FrontError::Offload(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for FrontError {}

impl From<OutOfSpace> for FrontError {
    fn from(error: OutOfSpace) -> Self {
        FrontError::Space(error)
    }
}

impl From<OffloadError> for FrontError {
    fn from(error: OffloadError) -> Self {
        FrontError::Offload(error)
    }
}

/// The slot has not that much room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfSpace {
    /// Bytes asked for.
    pub wanted: usize,
    /// Bytes there are.
    pub available: usize,
}

impl fmt::Display for OutOfSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes were asked of a frame that has {}", self.wanted, self.available)
    }
}

impl core::error::Error for OutOfSpace {}

impl Frame {
    /// # Safety
    ///
    /// The place's slot is counted as out in `header` and is in no other place; `offset + len` is
    /// within the slot, and so is the offload header if there is one.
    #[inline]
    pub(crate) unsafe fn from_raw(pool: NonNull<PoolInner>, range: SlotRange) -> Self {
        Self { pool, range }
    }

    /// Gives up ownership without putting the slot home: the caller puts the place into a queue
    /// entry, which owns the slot from then on.
    #[inline]
    pub(crate) fn into_raw(self) -> SlotRange {
        let range = self.range;
        core::mem::forget(self);
        range
    }

    #[inline]
    pub(crate) fn pool_ptr(&self) -> NonNull<PoolInner> {
        self.pool
    }

    #[inline]
    fn pool(&self) -> &PoolInner {
        // SAFETY: our slot is counted as out, so `PoolInner` is alive ("the pool outlives its
        // slots").
        unsafe { self.pool.as_ref() }
    }

    /// Bytes of the packet.
    #[inline]
    pub fn len(&self) -> usize {
        self.range.len() as usize
    }

    /// Whether the packet has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.range.len() == 0
    }

    /// Bytes from the packet's start to the end of the slot: the longest the packet may become.
    #[inline]
    pub fn capacity(&self) -> usize {
        (self.pool().layout.slot_size - self.range.offset()) as usize
    }

    /// Bytes in front of the packet.
    #[inline]
    pub fn headroom(&self) -> usize {
        self.range.offset() as usize
    }

    /// The slot's number in its pool.
    #[inline]
    pub fn slot(&self) -> u32 {
        self.range.slot()
    }

    /// Back to the state after [`Pool::alloc`](crate::Pool::alloc): the pool's headroom, length 0, no
    /// offload header.
    #[inline]
    pub fn reset(&mut self) {
        let headroom = self.pool().layout.headroom;
        self.range = SlotRange::new(self.range.slot(), headroom, 0, OffloadState::ABSENT);
    }

    /// Makes the packet `len` bytes long, from the same start.
    #[inline]
    pub fn set_len(&mut self, len: usize) -> Result<(), OutOfSpace> {
        let available = self.capacity();
        if len > available {
            return Err(OutOfSpace { wanted: len, available });
        }
        self.range.set_len(len as u32);
        Ok(())
    }

    /// Drops `n` bytes at the packet's front; they become headroom. An offload header moves along, and
    /// its positions with it.
    ///
    /// # Errors
    ///
    /// [`FrontError::Space`] if the packet is shorter; [`FrontError::Offload`] if the header would lose
    /// what it is about. Nothing has changed then.
    pub fn trim_front(&mut self, n: usize) -> Result<(), FrontError> {
        if n > self.len() {
            return Err(OutOfSpace { wanted: n, available: self.len() }.into());
        }
        let header = self.offload()?.map(|header| header.trim_front(n)).transpose()?;
        self.range.set_window(self.range.offset() + n as u32, self.range.len() - n as u32);
        self.put_offload(header);
        Ok(())
    }

    /// Drops `n` bytes at the packet's end.
    pub fn trim_back(&mut self, n: usize) -> Result<(), OutOfSpace> {
        if n > self.len() {
            return Err(OutOfSpace { wanted: n, available: self.len() });
        }
        self.range.set_len(self.range.len() - n as u32);
        Ok(())
    }

    /// Takes `n` bytes of headroom into the packet's front, for a header to be written there. An
    /// offload header moves along, and its positions with it.
    ///
    /// # Errors
    ///
    /// [`FrontError::Space`] if there is less headroom (in front of the offload header, if there is
    /// one); [`FrontError::Offload`] if its positions do not fit. Nothing has changed then.
    pub fn grow_front(&mut self, n: usize) -> Result<(), FrontError> {
        let header = self.offload()?.map(|header| header.grow_front(n)).transpose()?;
        let available = self.headroom() - if header.is_some() { offload::LEN } else { 0 };
        if n > available {
            return Err(OutOfSpace { wanted: n, available }.into());
        }
        self.range.set_window(self.range.offset() - n as u32, self.range.len() + n as u32);
        self.put_offload(header);
        Ok(())
    }

    /// Makes the packet a copy of `bytes`, from the same start. It is another packet, so an offload
    /// header is gone.
    pub fn copy_from(&mut self, bytes: &[u8]) -> Result<(), OutOfSpace> {
        self.set_len(bytes.len())?;
        self.range.set_offload_state(OffloadState::ABSENT);
        self.copy_from_slice(bytes);
        Ok(())
    }

    /// The offload header in front of the packet: the one it was received with, or the one set for
    /// sending. `None` if there is none, as on every device without offload.
    ///
    /// # Errors
    ///
    /// What stands there is no header that we know.
    pub fn offload(&self) -> Result<Option<OffloadHeader>, OffloadError> {
        if self.range.offload_state() == OffloadState::ABSENT {
            return Ok(None);
        }
        OffloadHeader::parse(self.offload_bytes()).map(Some)
    }

    /// Puts an offload header in front of the packet, to be sent with it. Without one, a packet is
    /// sent as it is: nothing to complete, nothing to cut.
    ///
    /// # Errors
    ///
    /// There are less than 12 bytes of headroom.
    pub fn set_offload(&mut self, header: &OffloadHeader) -> Result<(), OutOfSpace> {
        let available = self.headroom();
        if available < offload::LEN {
            return Err(OutOfSpace { wanted: offload::LEN, available });
        }
        self.range.set_offload_state(OffloadState::TO_SEND);
        header.write(self.offload_bytes_mut());
        Ok(())
    }

    /// Says that the header with which the packet was received is to be sent with it: for handing a
    /// packet from one interface to another. What only a receiver may say is taken out of it. False
    /// if there is no header.
    ///
    /// Nothing is forwarded without this call, so a frame that is reused carries no stale header.
    ///
    /// # Errors
    ///
    /// What stands there is no header that we know.
    pub fn forward_offload(&mut self) -> Result<bool, OffloadError> {
        let header = self.offload()?.map(OffloadHeader::for_sending);
        if header.is_some() {
            self.range.set_offload_state(OffloadState::TO_SEND);
            self.put_offload(header);
        }
        Ok(header.is_some())
    }

    /// Takes the offload header away.
    pub fn clear_offload(&mut self) {
        self.range.set_offload_state(OffloadState::ABSENT);
    }

    /// Whether the offload header is one to be sent.
    #[inline]
    pub fn has_offload_to_send(&self) -> bool {
        self.range.offload_state() == OffloadState::TO_SEND
    }

    /// The offload header and the packet behind it, as they lie in memory: what a VMM hands to its
    /// guest. `None` if there is no header.
    pub fn with_offload(&self) -> Option<&[u8]> {
        let start = (self.range.offset() as usize).checked_sub(offload::LEN)?;
        let end = self.range.offset() as usize + self.len();
        (self.range.offload_state() != OffloadState::ABSENT).then(|| &self.whole()[start..end])
    }

    /// `header` bytes in front of the packet, and everything behind them up to the slot's end, for a
    /// device to fill. `None` if there is less headroom.
    #[inline]
    pub fn buffer_with_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        let start = (self.range.offset() as usize).checked_sub(header)?;
        Some(&mut self.whole_mut()[start..])
    }

    /// A device has put an offload header and a packet of `len` bytes there, with
    /// [`buffer_with_header_mut`](Self::buffer_with_header_mut).
    ///
    /// # Errors
    ///
    /// The slot, or its headroom, is too small for that. Nothing has changed then.
    pub fn received_with_offload(&mut self, len: usize) -> Result<(), OutOfSpace> {
        let available = self.headroom();
        if available < offload::LEN {
            return Err(OutOfSpace { wanted: offload::LEN, available });
        }
        self.set_len(len)?;
        self.range.set_offload_state(OffloadState::RECEIVED);
        // 1, also where the device says 0 (virtio 1.2, 5.1.6.4.1).
        offload::set_num_buffers(self.offload_bytes_mut(), 1);
        Ok(())
    }

    /// Puts `header` in front again, after the front has moved.
    fn put_offload(&mut self, header: Option<OffloadHeader>) {
        if let Some(header) = header {
            header.write(self.offload_bytes_mut());
        }
    }

    fn offload_bytes(&self) -> &[u8; offload::LEN] {
        let start = self.range.offset() as usize - offload::LEN;
        self.whole()[start..].first_chunk().expect("a header stands in the headroom")
    }

    fn offload_bytes_mut(&mut self) -> &mut [u8; offload::LEN] {
        let start = self.range.offset() as usize - offload::LEN;
        self.whole_mut()[start..].first_chunk_mut().expect("a header stands in the headroom")
    }

    /// The packet as a view on its slot, for parsing without copying.
    #[inline]
    pub fn view(&self) -> PacketView<&[u8]> {
        PacketView::new(self.whole(), self.range.offset(), self.range.len())
            .expect("the packet is in its slot")
    }

    /// The packet as a view that can be written through.
    #[inline]
    pub fn view_mut(&mut self) -> PacketView<&mut [u8]> {
        let (offset, len) = (self.range.offset(), self.range.len());
        PacketView::new(self.whole_mut(), offset, len).expect("the packet is in its slot")
    }

    /// All bytes from the packet's start to the end of the slot, for a writer that learns the
    /// length later; see [`set_len`](Self::set_len).
    #[inline]
    pub fn buffer_mut(&mut self) -> &mut [u8] {
        let offset = self.range.offset() as usize;
        &mut self.whole_mut()[offset..]
    }

    #[inline]
    fn whole(&self) -> &[u8] {
        let (start, size) =
            (self.pool().slot_start(self.range.slot()), self.pool().layout.slot_size);
        // SAFETY: the slot lies in the backing, which is initialised; we own it alone ("one place
        // per slot") and are borrowed shared.
        unsafe { core::slice::from_raw_parts(start.as_ptr(), size as usize) }
    }

    #[inline]
    fn whole_mut(&mut self) -> &mut [u8] {
        let (start, size) =
            (self.pool().slot_start(self.range.slot()), self.pool().layout.slot_size);
        // SAFETY: as in `whole`, and we are borrowed exclusively.
        unsafe { core::slice::from_raw_parts_mut(start.as_ptr(), size as usize) }
    }
}

impl Drop for Frame {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: we own the slot ("one place per slot") and this is the end of us.
        unsafe { free_slot(self.pool, self.range.slot()) }
    }
}

impl Deref for Frame {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.whole()[self.range.offset() as usize..][..self.range.len() as usize]
    }
}

impl DerefMut for Frame {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.range.len() as usize;
        &mut self.buffer_mut()[..len]
    }
}

impl AsRef<[u8]> for Frame {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Frame {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame")
            .field("slot", &self.range.slot())
            .field("offset", &self.range.offset())
            .field("len", &self.range.len())
            .finish_non_exhaustive()
    }
}
