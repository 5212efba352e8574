//! [`GuestBuffer`]: a packet in the memory of a guest.

use crate::frame::{Frame, OutOfSpace};
use crate::guest::region::GuestSlice;
use crate::segment_slots::{NIL, Segment, SegmentSlot, lengths, read_slot, write_slot};
use crate::slots::PoolInner;
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;
use static_assertions::{assert_impl_all, assert_not_impl_any};

/// A place for a packet in the memory of a guest: a chain of segments, which are in the guest's own
/// buffers.
///
/// ```text
/// bytes of all segments:  | header | packet (len) .......... | space .......... |
///                         0        header_len                header_len + capacity
/// ```
///
/// It does not dereference to bytes, because the guest may change them at any time. Code copies bytes
/// in or out, or gives the [`segments`](Self::segments) to the kernel.
///
/// A [`SegmentTable`](crate::guest::SegmentTable) makes it. It is neither `Copy` nor `Clone`:
/// submitting a buffer moves it away, and a completion moves it back. Dropping it frees the slots that
/// it has in its table, and nothing of the guest's.
#[repr(transparent)]
pub struct GuestBuffer(Frame);

assert_not_impl_any!(GuestBuffer: Clone, Copy);
assert_impl_all!(GuestBuffer: Send, Sync);

impl GuestBuffer {
    /// The buffer whose list of segments begins in the frame's slot.
    #[inline]
    pub(crate) fn new(frame: Frame) -> Self {
        debug_assert!(frame.is_guest());
        Self(frame)
    }

    #[inline]
    pub(crate) fn from_carrier_ref(frame: &Frame) -> &Self {
        debug_assert!(frame.is_guest());
        // SAFETY: `GuestBuffer` is a transparent wrapper of `Frame`.
        unsafe { &*core::ptr::from_ref(frame).cast() }
    }

    #[inline]
    pub(crate) fn from_carrier_mut(frame: &mut Frame) -> &mut Self {
        debug_assert!(frame.is_guest());
        // SAFETY: `GuestBuffer` is a transparent wrapper of `Frame`.
        unsafe { &mut *core::ptr::from_mut(frame).cast() }
    }

    #[inline]
    pub(crate) fn into_carrier(self) -> Frame {
        self.0
    }

    /// The packet's length in bytes, without the header. In a fresh buffer it is all that there is
    /// behind the header. After a read it is what has arrived.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the packet has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of space for a `virtio_net_hdr` in front of the packet: 0 or 12.
    #[inline]
    pub fn header_len(&self) -> usize {
        self.lengths().1 as usize
    }

    fn lengths(&self) -> (u32, u32) {
        // SAFETY: the frame is of a segment table, by `new`, and owns the slot.
        unsafe { lengths(self.0.pool_ptr(), self.0.slot()) }
    }

    /// The largest length that the packet can have, in bytes.
    #[inline]
    pub fn capacity(&self) -> usize {
        let (total, header) = self.lengths();
        (total - header) as usize
    }

    /// Sets the packet's length.
    ///
    /// # Errors
    ///
    /// The segments have fewer bytes. In this case nothing has changed.
    #[inline]
    pub fn set_len(&mut self, len: usize) -> Result<(), OutOfSpace> {
        let available = self.capacity();
        if len > available {
            return Err(OutOfSpace { wanted: len, available });
        }
        self.0.set_guest_len(len as u32);
        Ok(())
    }

    /// Makes this the place of a later part of a packet, which has no header: sets the part's length,
    /// from the first byte of the first segment on.
    ///
    /// # Errors
    ///
    /// The segments have fewer bytes. In this case nothing has changed.
    pub fn set_part_len(&mut self, len: usize) -> Result<(), OutOfSpace> {
        let available = self.lengths().0 as usize;
        if len > available {
            return Err(OutOfSpace { wanted: len, available });
        }
        write_slot(self.0.pool_ptr(), self.0.slot(), |slot| slot.header = 0);
        self.0.set_guest_len(len as u32);
        Ok(())
    }

    /// The segments of the header and of the whole space behind it.
    #[inline]
    pub fn segments(&self) -> Segments<'_> {
        self.range(0, (self.header_len() + self.capacity()) as u32)
    }

    /// The segments of the packet.
    #[inline]
    pub fn packet(&self) -> Segments<'_> {
        self.range(self.header_len() as u32, self.len() as u32)
    }

    /// The segments of the space for a packet, which is longer than the packet or as long.
    #[inline]
    pub fn space(&self) -> Segments<'_> {
        self.range(self.header_len() as u32, self.capacity() as u32)
    }

    /// The header, and the whole space behind it, if the two are in one piece, as they usually are.
    #[inline]
    pub fn in_one_piece(&self) -> Option<(GuestSlice<'_>, GuestSlice<'_>)> {
        if self.0.is_in_pieces() {
            return None;
        }
        // SAFETY: as in `range`.
        let slot = unsafe { read_slot(self.0.pool_ptr(), self.0.slot()) };
        // SAFETY: as in `Segments::next`.
        unsafe { slice_of(&slot.segments[0]) }.split_at(slot.header)
    }

    #[inline]
    fn range(&self, skip: u32, len: u32) -> Segments<'_> {
        // SAFETY: the frame is of a segment table, by `new`, and owns the list for as long as `self`
        // is borrowed. No function of a shared buffer changes the list.
        unsafe { Segments::new(self.0.pool_ptr(), self.0.slot(), skip, len) }
    }

    /// Copies the packet's first bytes out: as many as both sides have. Returns how many.
    #[inline]
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        self.packet().copy_to(to)
    }

    /// Copies the header out. `None` if the buffer has none.
    #[inline]
    pub fn header(&self) -> Option<[u8; 12]> {
        match self.in_one_piece() {
            Some((header, _)) => header.read(),
            None if self.header_len() == 0 => None,
            None => self.segments().read_first(),
        }
    }

    /// Copies a header in. Returns whether the buffer has space for one.
    #[inline]
    pub fn set_header(&mut self, header: &[u8; 12]) -> bool {
        match self.in_one_piece() {
            Some((space, _)) => space.len() as usize == header.len() && space.write(header),
            None => self.set_header_in_pieces(header),
        }
    }

    #[inline(never)]
    fn set_header_in_pieces(&mut self, header: &[u8; 12]) -> bool {
        self.header_len() == header.len() && self.segments().write_first(header)
    }

    /// Ends the filling of the buffer with a packet of `len` bytes: sets the packet's length, and copies a
    /// header in if there is space for one.
    ///
    /// # Errors
    ///
    /// The segments have fewer bytes. In this case nothing has changed.
    #[inline]
    pub fn end_filling(&mut self, len: usize, header: &[u8; 12]) -> Result<(), OutOfSpace> {
        if self.0.is_in_pieces() {
            self.set_len(len)?;
            self.set_header_in_pieces(header);
            return Ok(());
        }
        // SAFETY: as in `range`.
        let slot = unsafe { read_slot(self.0.pool_ptr(), self.0.slot()) };
        let available = (slot.total - slot.header) as usize;
        if len > available {
            return Err(OutOfSpace { wanted: len, available });
        }
        if slot.header as usize == header.len() {
            // SAFETY: as in `Segments::next`.
            unsafe { slice_of(&slot.segments[0]) }.write(header);
        }
        self.0.set_guest_len(len as u32);
        Ok(())
    }

    /// Copies a packet in, and sets its length.
    ///
    /// # Errors
    ///
    /// The segments have fewer bytes. In this case nothing has changed.
    pub fn copy_from(&mut self, packet: &[u8]) -> Result<(), OutOfSpace> {
        self.set_len(packet.len())?;
        self.packet().copy_from(packet);
        Ok(())
    }

    /// Copies a packet in from another buffer, and sets its length. The two may be in the same memory
    /// and overlap; then the bytes are unspecified, and they are the guests' own.
    ///
    /// # Errors
    ///
    /// The segments have fewer bytes. In this case nothing has changed.
    pub fn copy_from_guest(&mut self, packet: &GuestBuffer) -> Result<(), OutOfSpace> {
        self.set_len(packet.len())?;
        self.packet().copy_from_segments(packet.packet());
        Ok(())
    }
}

impl fmt::Debug for GuestBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestBuffer")
            .field("header_len", &self.header_len())
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .finish_non_exhaustive()
    }
}

/// The bytes of a segment.
///
/// # Safety
///
/// The mapping that the segment is in lives for `'b`.
#[inline]
unsafe fn slice_of<'b>(segment: &Segment) -> GuestSlice<'b> {
    let Segment { start, guest_address, len } = *segment;
    // SAFETY: the segment was made of a slice, so it is in a mapping, which the caller keeps.
    unsafe { GuestSlice::new(NonNull::new_unchecked(start), len, guest_address, None) }
}

/// The segments of a buffer, in their order.
#[derive(Clone, Debug)]
pub struct Segments<'b> {
    pool: NonNull<PoolInner>,
    slot: &'b SegmentSlot,
    /// The next segment in the slot.
    at: u32,
    /// Bytes to leave out, and bytes to return after that.
    skip: u32,
    left: u32,
    buffer: PhantomData<&'b GuestBuffer>,
}

impl<'b> Segments<'b> {
    /// The segments of the list that begins with `first`, from byte `skip` on, `len` bytes.
    ///
    /// # Safety
    ///
    /// The conditions of [`read_slot`] hold for the whole list.
    #[inline]
    unsafe fn new(pool: NonNull<PoolInner>, first: u32, skip: u32, len: u32) -> Segments<'b> {
        // SAFETY: the caller keeps the same conditions.
        let slot = unsafe { read_slot(pool, first) };
        Segments { pool, slot, at: 0, skip, left: len, buffer: PhantomData }
    }
}

impl Segments<'_> {
    /// The segments behind the first `bytes` bytes.
    #[inline]
    pub fn skip_bytes(self, bytes: usize) -> Self {
        let bytes = bytes.min(self.left as usize) as u32;
        Self { skip: self.skip + bytes, left: self.left - bytes, ..self }
    }

    /// As [`skip_bytes`](Self::skip_bytes), but looks for the place now, and not at each use of a clone.
    #[must_use]
    pub fn step_over(self, bytes: usize) -> Self {
        let mut rest = self.skip_bytes(bytes);
        loop {
            if rest.at == rest.slot.count {
                if rest.slot.next == NIL {
                    return rest;
                }
                // SAFETY: the slot is of the list that `new` was called for.
                rest.slot = unsafe { read_slot(rest.pool, rest.slot.next) };
                rest.at = 0;
                continue;
            }
            let len = rest.slot.segments[rest.at as usize].len;
            if rest.skip < len {
                return rest;
            }
            rest.skip -= len;
            rest.at += 1;
        }
    }

    /// The segments of the first `bytes` bytes.
    #[inline]
    pub fn take_bytes(self, bytes: usize) -> Self {
        Self { left: bytes.min(self.left as usize) as u32, ..self }
    }

    /// The first bytes, if they are in the segment where the search begins, as they usually are.
    #[inline]
    fn first_piece(&self) -> Option<GuestSlice<'_>> {
        if self.at == self.slot.count {
            return None;
        }
        // SAFETY: as in `next`.
        let slice = unsafe { slice_of(&self.slot.segments[self.at as usize]) }.skip(self.skip)?;
        slice.split_at(slice.len().min(self.left)).map(|(slice, _)| slice)
    }

    /// Copies the first `N` bytes out. `None` if there are fewer.
    #[inline]
    pub fn read_first<const N: usize>(self) -> Option<[u8; N]> {
        if let Some(bytes) = self.first_piece().and_then(|first| first.read()) {
            return Some(bytes);
        }
        let mut bytes = [0; N];
        (self.copy_pieces_to(&mut bytes) == N).then_some(bytes)
    }

    /// Copies bytes out, from the first one on: as many as both sides have. Returns how many.
    #[inline]
    pub fn copy_to(self, to: &mut [u8]) -> usize {
        // The first bytes of most packets are in one piece.
        match self.first_piece() {
            Some(first) if first.len() as usize >= to.len() => first.copy_to(to),
            _ => self.copy_pieces_to(to),
        }
    }

    #[inline(never)]
    fn copy_pieces_to(self, to: &mut [u8]) -> usize {
        let mut copied = 0;
        for segment in self.take_bytes(to.len()) {
            copied += segment.copy_to(&mut to[copied..]);
        }
        copied
    }

    /// Copies bytes in, from the first one on: as many as both sides have. Returns how many.
    pub fn copy_from(self, from: &[u8]) -> usize {
        let mut copied = 0;
        for segment in self.take_bytes(from.len()) {
            copied += segment.copy_from(&from[copied..]);
        }
        copied
    }

    /// Copies `N` bytes in, from the first one on. Returns whether there is space for all of them.
    #[inline]
    pub fn write_first<const N: usize>(self, bytes: &[u8; N]) -> bool {
        let in_one_piece = self.first_piece().is_some_and(|first| first.write(bytes));
        in_one_piece || self.copy_from(bytes) == N
    }

    /// Copies bytes in from other segments: as many as both sides have. The two may overlap; then the
    /// bytes are unspecified.
    pub fn copy_from_segments(mut self, mut from: Segments<'_>) {
        let (mut piece, mut space) = (from.next(), self.next());
        while let (Some(bytes), Some(room)) = (piece, space) {
            let len = room.copy_from_guest(bytes) as u32;
            // At least one of the two has no bytes left, or both have fewer.
            piece = bytes.skip(len).filter(|rest| !rest.is_empty()).or_else(|| from.next());
            space = room.skip(len).filter(|rest| !rest.is_empty()).or_else(|| self.next());
        }
    }
}

impl<'b> Iterator for Segments<'b> {
    type Item = GuestSlice<'b>;

    #[inline]
    fn next(&mut self) -> Option<GuestSlice<'b>> {
        while self.left > 0 {
            if self.at == self.slot.count {
                if self.slot.next == NIL {
                    return None;
                }
                // SAFETY: the slot is of the list that `new` was called for.
                self.slot = unsafe { read_slot(self.pool, self.slot.next) };
                self.at = 0;
                continue;
            }
            let segment = self.slot.segments[self.at as usize];
            self.at += 1;
            // SAFETY: the pool's backing keeps the mapping, and the buffer, which is borrowed, keeps
            // the pool.
            let slice = unsafe { slice_of(&segment) };
            let skipped = self.skip.min(segment.len);
            self.skip -= skipped;
            let Some(slice) = slice.skip(skipped).filter(|slice| !slice.is_empty()) else {
                continue;
            };
            let len = slice.len().min(self.left);
            self.left -= len;
            return slice.split_at(len).map(|(slice, _)| slice);
        }
        None
    }
}
