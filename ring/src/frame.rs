//! [`Frame`]: the one owner of a slot.

use crate::entry::{OffloadState, SlotRange};
use crate::offload::{self, OffloadError, OffloadHeader};
use crate::segment_slots::{free_links, has_links};
use crate::slots::{Freed, PoolInner, free_slot};
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
/// It dereferences to the packet's bytes. It is neither `Copy` nor `Clone`: submitting a frame
/// moves it away, and a completion moves it back. Dropping it returns the slot to its pool's free
/// list. That works on any thread, and also after the pool's handles are dropped.
///
/// On a device with offload, a 12-byte header is directly in front of the packet, in the headroom;
/// see [`offload`](Self::offload). The header belongs to the packet: trimming and growing move it.
///
/// A longer length or a smaller offset uncovers bytes that were written before, possibly by an
/// earlier packet. They are never uninitialised.
pub struct Frame {
    pool: NonNull<PoolInner>,
    range: SlotRange,
}

assert_not_impl_any!(Frame: Clone, Copy);
assert_impl_all!(Frame: Send, Sync);

// SAFETY: a frame is the only way to its slot's bytes ("one place per slot"), and what it shares
// with others, `PoolInner`, is atomic or immutable.
unsafe impl Send for Frame {}
// SAFETY: `&Frame` only reads the slot's bytes.
unsafe impl Sync for Frame {}

/// Why a packet's front could not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrontError {
    /// The packet, or the headroom, has too few bytes.
    Space(OutOfSpace),
    /// The packet's offload header would no longer be true, or is none that we know.
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

/// The slot, the packet or the headroom does not have that many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfSpace {
    /// The bytes that were asked for.
    pub wanted: usize,
    /// The bytes that there are.
    pub available: usize,
}

impl fmt::Display for OutOfSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes were requested, but only {} are available", self.wanted, self.available)
    }
}

impl core::error::Error for OutOfSpace {}

impl Frame {
    /// Makes the frame that owns the slot of `range`.
    ///
    /// # Safety
    ///
    /// `pool` counts the range's slot as out, and the slot is in no other place ("one place per
    /// slot"). `offset + len` is within the slot, and so is the offload header if there is one.
    #[inline]
    pub(crate) unsafe fn from_raw(pool: NonNull<PoolInner>, range: SlotRange) -> Self {
        Self { pool, range }
    }

    /// Gives the slot up without freeing it. The caller puts the range into a queue entry, which
    /// owns the slot from then on.
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

    /// Whether the slot holds the list of a guest's buffer. The bytes of such a frame are nobody's
    /// packet: only [`Buffer`](crate::Buffer) and [`GuestBuffer`](crate::GuestBuffer) have one
    /// inside, and they do not give it away.
    #[inline(always)]
    pub(crate) fn is_guest(&self) -> bool {
        self.range.offload_state().is_guest()
    }

    /// Says that the slot holds the list of a guest's buffer, whose packet has `len` bytes. The frame
    /// itself has no bytes then: its capacity is 0, so [`set_len`](Self::set_len) refuses it, and code
    /// in the hot path need not ask which of the two it is.
    ///
    /// `state` is [`OffloadState::GUEST`] if the list has one segment, and so no further slots. Else it is
    /// [`OffloadState::GUEST_IN_PIECES`].
    #[inline]
    pub(crate) fn mark_guest(&mut self, len: u32, state: OffloadState) {
        let end = self.pool().layout.slot_size;
        self.range = SlotRange::new(self.range.slot(), end, len, state);
    }

    /// Sets the length of a guest's packet.
    #[inline(always)]
    pub(crate) fn set_guest_len(&mut self, len: u32) {
        debug_assert!(self.is_guest());
        self.range.set_len(len);
    }

    /// Whether the list of a guest's buffer may have several segments.
    #[inline(always)]
    pub(crate) fn is_in_pieces(&self) -> bool {
        self.range.offload_state().is_in_pieces()
    }

    /// The packet's bytes. `None` for the frame that a guest's buffer begins with, unless its packet is
    /// empty: such a frame ends where its packet would begin ([`mark_guest`](Self::mark_guest)).
    #[inline(always)]
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        let start = self.range.offset() as usize;
        self.whole().get(start..start.wrapping_add(self.len()))
    }

    #[inline]
    fn pool(&self) -> &PoolInner {
        // SAFETY: `refs` counts our slot as out, so `PoolInner` is alive ("the pool outlives its
        // slots").
        unsafe { self.pool.as_ref() }
    }

    /// The packet's length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.range.len() as usize
    }

    /// Whether the packet has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.range.len() == 0
    }

    /// The bytes from the packet's start to the end of the slot: the largest length that the packet
    /// can have.
    #[inline]
    pub fn capacity(&self) -> usize {
        (self.pool().layout.slot_size - self.range.offset()) as usize
    }

    /// The [`capacity`](Self::capacity), for a caller that knows the size of the pool's slots.
    #[inline(always)]
    pub(crate) fn capacity_in(&self, slot_size: u32) -> usize {
        debug_assert_eq!(slot_size, self.pool().layout.slot_size);
        (slot_size - self.range.offset()) as usize
    }

    /// The bytes of the slot in front of the packet.
    #[inline]
    pub fn headroom(&self) -> usize {
        self.range.offset() as usize
    }

    /// The slot's number in its pool.
    #[inline]
    pub fn slot(&self) -> u32 {
        self.range.slot()
    }

    /// Resets the frame to its state after [`Pool::alloc`](crate::Pool::alloc): the pool's
    /// headroom, length 0, no offload header.
    #[inline]
    pub fn reset(&mut self) {
        let headroom = self.pool().layout.headroom;
        self.range = SlotRange::new(self.range.slot(), headroom, 0, OffloadState::ABSENT);
    }

    /// Makes the packet `len` bytes long. Its start stays.
    #[inline]
    pub fn set_len(&mut self, len: usize) -> Result<(), OutOfSpace> {
        let available = self.capacity();
        if len > available {
            return Err(OutOfSpace { wanted: len, available });
        }
        self.range.set_len(len as u32);
        Ok(())
    }

    /// Removes `n` bytes from the packet's front; they become headroom. An offload header moves
    /// with the front, and its positions are adjusted.
    ///
    /// # Errors
    ///
    /// [`FrontError::Space`] if the packet is shorter than `n`. [`FrontError::Offload`] if the
    /// header would no longer be true. In both cases nothing has changed.
    pub fn trim_front(&mut self, n: usize) -> Result<(), FrontError> {
        if n > self.len() {
            return Err(OutOfSpace { wanted: n, available: self.len() }.into());
        }
        let header = self.offload()?.map(|header| header.trim_front(n)).transpose()?;
        self.range.set_window(self.range.offset() + n as u32, self.range.len() - n as u32);
        self.put_offload(header);
        Ok(())
    }

    /// Removes `n` bytes from the packet's end.
    pub fn trim_back(&mut self, n: usize) -> Result<(), OutOfSpace> {
        if n > self.len() {
            return Err(OutOfSpace { wanted: n, available: self.len() });
        }
        self.range.set_len(self.range.len() - n as u32);
        Ok(())
    }

    /// Adds `n` bytes of headroom to the packet's front, so that a header can be written there. An
    /// offload header moves with the front, and its positions are adjusted.
    ///
    /// # Errors
    ///
    /// [`FrontError::Space`] if there is less headroom, counted in front of the offload header if
    /// there is one. [`FrontError::Offload`] if the header's positions would not fit in their
    /// fields. In both cases nothing has changed.
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

    /// Makes the packet a copy of `bytes`. Its start stays. This is another packet, so an offload
    /// header is removed.
    pub fn copy_from(&mut self, bytes: &[u8]) -> Result<(), OutOfSpace> {
        self.set_len(bytes.len())?;
        self.range.set_offload_state(OffloadState::ABSENT);
        self.copy_from_slice(bytes);
        Ok(())
    }

    /// The offload header in front of the packet: the one that the packet was received with, or the
    /// one that was set for sending. `None` if there is none, as on every device without offload.
    ///
    /// # Errors
    ///
    /// The bytes in front of the packet are no header that we know.
    pub fn offload(&self) -> Result<Option<OffloadHeader>, OffloadError> {
        if self.range.offload_state() == OffloadState::ABSENT {
            return Ok(None);
        }
        OffloadHeader::parse(self.offload_bytes()).map(Some)
    }

    /// Writes an offload header in front of the packet, to be sent with it. A packet without one is
    /// sent as it is: its checksum is complete, and it is not to be segmented.
    ///
    /// # Errors
    ///
    /// There are fewer than 12 bytes of headroom.
    pub fn set_offload(&mut self, header: &OffloadHeader) -> Result<(), OutOfSpace> {
        let available = self.headroom();
        if available < offload::LEN {
            return Err(OutOfSpace { wanted: offload::LEN, available });
        }
        self.range.set_offload_state(OffloadState::TO_SEND);
        header.write(self.offload_bytes_mut());
        Ok(())
    }

    /// Marks the header that the packet was received with as one to be sent with it. This is for a
    /// packet that goes from one interface to another. What only a receiver may say is removed from
    /// the header. Returns false if there is no header.
    ///
    /// Without this call no header is forwarded, so a frame that is reused carries no stale header.
    ///
    /// # Errors
    ///
    /// The bytes in front of the packet are no header that we know.
    pub fn forward_offload(&mut self) -> Result<bool, OffloadError> {
        let header = self.offload()?.map(OffloadHeader::for_sending);
        if header.is_some() {
            self.range.set_offload_state(OffloadState::TO_SEND);
            self.put_offload(header);
        }
        Ok(header.is_some())
    }

    /// Removes the offload header.
    pub fn clear_offload(&mut self) {
        self.range.set_offload_state(OffloadState::ABSENT);
    }

    /// Whether there is no offload header and the packet has fewer than `end` bytes: both conditions in one
    /// comparison.
    #[inline(always)]
    pub fn is_bare_below(&self, end: u64) -> bool {
        self.range.is_bare_below(end)
    }

    /// Whether there is an offload header that is to be sent.
    #[inline]
    pub fn has_offload_to_send(&self) -> bool {
        self.range.offload_state().is_to_send()
    }

    /// The offload header and the packet behind it, as they are in memory. A VMM gives these bytes
    /// to its guest. `None` if there is no header.
    pub fn with_offload(&self) -> Option<&[u8]> {
        let start = (self.range.offset() as usize).checked_sub(offload::LEN)?;
        let end = self.range.offset() as usize + self.len();
        (self.range.offload_state() != OffloadState::ABSENT).then(|| &self.whole()[start..end])
    }

    /// The buffer that a device fills with a header and a packet: from `header` bytes in front of
    /// the packet's start to the end of the slot. `None` if there is less headroom.
    #[inline]
    pub fn buffer_with_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        let start = (self.range.offset() as usize).checked_sub(header)?;
        Some(&mut self.whole_mut()[start..])
    }

    /// Says that a device has written an offload header and a packet of `len` bytes into
    /// [`buffer_with_header_mut`](Self::buffer_with_header_mut).
    ///
    /// # Errors
    ///
    /// The slot, or its headroom, is too small for them. In this case nothing has changed.
    pub fn set_received_with_offload(&mut self, len: usize) -> Result<(), OutOfSpace> {
        let available = self.headroom();
        if available < offload::LEN {
            return Err(OutOfSpace { wanted: offload::LEN, available });
        }
        self.set_len(len)?;
        self.range.set_offload_state(OffloadState::RECEIVED);
        // 1, even if the device says 0 (virtio 1.2, 5.1.6.4.1).
        offload::set_num_buffers(self.offload_bytes_mut(), 1);
        Ok(())
    }

    /// Writes `header` in front of the packet again, after the front has moved.
    fn put_offload(&mut self, header: Option<OffloadHeader>) {
        if let Some(header) = header {
            header.write(self.offload_bytes_mut());
        }
    }

    fn offload_bytes(&self) -> &[u8; offload::LEN] {
        let start = self.range.offset() as usize - offload::LEN;
        self.whole()[start..].first_chunk().expect("a header is in the headroom")
    }

    fn offload_bytes_mut(&mut self) -> &mut [u8; offload::LEN] {
        let start = self.range.offset() as usize - offload::LEN;
        self.whole_mut()[start..].first_chunk_mut().expect("a header is in the headroom")
    }

    /// A view of the packet in its slot, for parsing without a copy.
    #[inline]
    pub fn view(&self) -> PacketView<&[u8]> {
        PacketView::new(self.whole(), self.range.offset(), self.range.len())
            .expect("the packet is in its slot")
    }

    /// A view of the packet in its slot, for writing.
    #[inline]
    pub fn view_mut(&mut self) -> PacketView<&mut [u8]> {
        let (offset, len) = (self.range.offset(), self.range.len());
        PacketView::new(self.whole_mut(), offset, len).expect("the packet is in its slot")
    }

    /// The whole buffer from the packet's start to the end of the slot. This is for a writer that
    /// learns the length later; see [`set_len`](Self::set_len).
    #[inline]
    pub fn buffer_mut(&mut self) -> &mut [u8] {
        let offset = self.range.offset() as usize;
        &mut self.whole_mut()[offset..]
    }

    #[inline]
    fn whole(&self) -> &[u8] {
        let (start, size) =
            (self.pool().slot_start(self.range.slot()), self.pool().layout.slot_size);
        // SAFETY: the slot lies in the backing, whose bytes are initialised and live as long as the
        // pool (`Backing`), which our slot keeps alive. Nobody else can reach the slot's bytes
        // ("one place per slot"), and we are borrowed shared.
        unsafe { core::slice::from_raw_parts(start.as_ptr(), size as usize) }
    }

    #[inline]
    fn whole_mut(&mut self) -> &mut [u8] {
        let (start, size) =
            (self.pool().slot_start(self.range.slot()), self.pool().layout.slot_size);
        // SAFETY: the slot lies in the backing, whose bytes are initialised and live as long as the
        // pool (`Backing`), which our slot keeps alive. Nobody else can reach the slot's bytes
        // ("one place per slot"), and we are borrowed exclusively.
        unsafe { core::slice::from_raw_parts_mut(start.as_ptr(), size as usize) }
    }
}

impl Drop for Frame {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: this frame owns the slot ("one place per slot"), and nothing uses it after its
        // drop. The range is the frame's.
        unsafe { free(self.pool, self.range) }
    }
}

/// Returns a frame's slot to its pool, and with a guest's buffer the slots of its list. One call, so
/// that it costs no space where a frame is hardly ever dropped.
///
/// # Safety
///
/// The caller owns the slot of `range` ("one place per slot") and gives it up with this call. `pool`
/// is its pool, and the range is that of a frame.
#[inline(never)]
unsafe fn free(pool: NonNull<PoolInner>, range: SlotRange) {
    if range.offload_state().is_guest() {
        // SAFETY: a frame is only marked as a guest's buffer if it begins a list of its pool, which it
        // owns. Nothing uses the list after this.
        unsafe { free_links(pool, range.slot()) }
    }
    // SAFETY: the caller gives up the slot that it owns.
    unsafe { free_slot(pool, range.slot()) }
}

/// As [`free`], together with other slots. What it calls comes last.
///
/// # Safety
///
/// The conditions are those of [`free`].
#[inline(always)]
pub(crate) unsafe fn free_with(pool: NonNull<PoolInner>, range: SlotRange, freed: &mut Freed) {
    // SAFETY: as in `free`.
    if range.offload_state().is_in_pieces() && unsafe { has_links(pool, range.slot()) } {
        // SAFETY: the caller gives up the slot that it owns.
        return unsafe { free(pool, range) };
    }
    // SAFETY: the caller gives up the slot that it owns.
    unsafe { freed.add(pool, range.slot()) }
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
