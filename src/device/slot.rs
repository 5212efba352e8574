//! [`PostedSlot`], a frame or a guest's buffer that a device fills or sends.

use std::fmt;

use static_assertions::const_assert_eq;
use vmring_core::{
    Buffer, Class, Frame, GUEST, GuestBuffer, OutOfSpace, SKIP_SUCCESS, SqeRef, offload,
};

use vmring_embedded::PacketBuffer;

use crate::mailbox::{DroppedSlot, LAST_RING_NUMBER, report_dropped};

/// A submitted buffer that a device owns: a read to be filled, or a write to be sent.
///
/// The buffer is a frame, whose bytes the device uses as a slice, or it is in the memory of a guest
/// ([`guest`](Self::guest)). A device gets buffers of a guest only if its
/// [`Capabilities`](crate::device::Capabilities) say that it takes them. For such a buffer every
/// method that lends a slice returns `None`.
///
/// A device gets slots from a [`PollContext`](crate::device::PollContext) and completes them
/// through it. A slot cannot be cloned.
///
/// If a device drops a slot instead, the entry completes as
/// [`EntryError::Abandoned`](crate::EntryError::Abandoned), and the caller gets the frame back. If
/// a device forgets a slot ([`std::mem::forget`]), the slot is lost; closing the ring reports it in
/// [`Error::Leaked`](crate::Error::Leaked).
// The order of the fields matters. The 32 bytes behind `class` and `ring` are copied in pieces that
// do not overlap. Reading back pieces that overlap costs some fifteen cycles. (`class` is read by
// itself: it says whether an `Option` of a slot is `Some`.)
#[repr(C)]
pub struct PostedSlot {
    pub(super) class: Class,
    /// The number of the ring that the entry belongs to, and perhaps some of [`FLAGS`]. A number and
    /// not a pointer, so that a slot costs no reference count.
    pub(super) ring: u32,
    /// `None` only while a slot is being completed or dropped.
    pub(super) buffer: Option<Buffer>,
    pub(super) user_data: u64,
}

/// The flag of a slot whose frame is a reserved one, in the place of a guest's buffer.
pub(super) const BOUNCED: u32 = 1 << 29;
pub(super) const FLAGS: u32 = SKIP_SUCCESS | GUEST | BOUNCED;

// The flags are in `PostedSlot::ring` because that number is compared for every slot that a device has
// finished with. With a flag it is not the ring's own, so what such a slot needs costs nothing where
// the numbers are equal.
const_assert_eq!(FLAGS & LAST_RING_NUMBER, 0);

// The docs of `RingBuilder` ("Memory") give this size.
#[cfg(target_pointer_width = "64")]
const_assert_eq!(size_of::<PostedSlot>(), 40);

impl PostedSlot {
    #[inline(always)]
    pub(crate) fn new(buffer: Buffer, user_data: u64, ring: u32, class: Class) -> Self {
        Self { buffer: Some(buffer), user_data, ring, class }
    }

    /// Takes the slot out of an SQE of class `class`, which was submitted to ring number `ring`.
    #[inline(always)]
    pub(super) fn from_sqe(sqe: SqeRef<'_>, ring: u32, class: Class) -> Self {
        let ring = ring | sqe.flags();
        let (buffer, user_data) = sqe.take();
        Self::new(buffer, user_data, ring, class)
    }

    /// As [`from_sqe`](Self::from_sqe) for a read in a frame, which has no flags.
    #[inline(always)]
    pub(super) fn from_read_sqe(sqe: SqeRef<'_>, ring: u32) -> Self {
        let (buffer, user_data) = sqe.take();
        Self::new(buffer, user_data, ring, Class::Read)
    }

    #[inline(always)]
    pub(crate) fn into_buffer(mut self) -> (Buffer, u64, Class) {
        let buffer = self.buffer.take();
        let (user_data, class) = (self.user_data, self.class);
        // Nothing is left to drop. Without this the destructor would look for a buffer.
        std::mem::forget(self);
        (buffer.expect("a posted slot has its buffer until it is completed"), user_data, class)
    }

    /// Returns the `user_data` that the caller gave when it submitted the frame.
    #[inline]
    pub fn user_data(&self) -> u64 {
        self.user_data
    }

    /// Returns true for a read, which is to be filled, and false for a write, which is to be sent.
    #[inline]
    pub fn is_read(&self) -> bool {
        self.class == Class::Read
    }

    /// Returns the length of the packet of a write, in bytes. For a read it says nothing until the
    /// read is completed.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.buffer().len()
    }

    /// Returns the packet: that of a write is to be sent, that of a read is empty until the read is
    /// completed. `None` if the packet is in the memory of a guest.
    #[inline]
    pub fn packet(&self) -> Option<&[u8]> {
        self.buffer().bytes()
    }

    /// As [`packet`](Self::packet), for a device that takes frames only. Else it is empty.
    #[inline(always)]
    pub(super) fn frame_bytes(&self) -> &[u8] {
        self.packet().unwrap_or_default()
    }

    /// Returns the whole buffer, from the packet's start to the end of the slot. For a read this is
    /// where the packet goes: at least [`max_packet_size`](crate::device::Capabilities) bytes. For
    /// a write it is the packet and the space behind it. `None` if the buffer is in the memory of a
    /// guest.
    #[inline]
    pub fn buffer_mut(&mut self) -> Option<&mut [u8]> {
        self.frame_mut().map(Frame::buffer_mut)
    }

    /// Returns the buffer from `header` bytes before the packet's start, for a device that has an
    /// offload header there. Returns `None` if there is less headroom than that, or if the buffer is
    /// in the memory of a guest. See also [`buffer_mut`](Self::buffer_mut).
    #[inline]
    pub fn buffer_with_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        self.frame_mut()?.buffer_with_header_mut(header)
    }

    /// Returns the packet of a write with the `header` bytes in front of it. Returns `None` if
    /// there is less headroom than that, or if the packet is in the memory of a guest.
    #[inline]
    pub fn packet_with_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        let len = header + self.len();
        self.buffer_with_header_mut(header)?.get_mut(..len)
    }

    /// Returns the packet of a write, to be changed in place. `None` if the packet is in the memory
    /// of a guest: what a guest gives for sending is not written.
    pub fn packet_mut(&mut self) -> Option<&mut [u8]> {
        self.frame_mut().map(AsMut::as_mut)
    }

    /// Copies the first bytes of a write's packet, wherever it is: as many as both sides have.
    /// Returns how many.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        self.buffer().copy_to(to)
    }

    /// Copies a packet into a read's buffer, wherever it is. Complete the read with the packet's
    /// length then. A write does not change.
    ///
    /// # Errors
    ///
    /// The buffer has fewer bytes. In this case nothing was copied.
    pub fn copy_from(&mut self, packet: &[u8]) -> Result<(), OutOfSpace> {
        match self.is_read() {
            true => self.posted_buffer_mut().copy_from(packet),
            false => Err(OutOfSpace { wanted: packet.len(), available: 0 }),
        }
    }

    /// Copies the packet of a write into a read's buffer, once, wherever the two are. Returns the
    /// packet's length; complete the read with it. A write does not change.
    ///
    /// # Errors
    ///
    /// The buffer has fewer bytes. In this case nothing was copied.
    #[inline]
    pub fn copy_from_slot(&mut self, write: &PostedSlot) -> Result<usize, OutOfSpace> {
        match self.is_read() {
            true => self.posted_buffer_mut().copy_from_buffer(write.buffer())?,
            false => return Err(OutOfSpace { wanted: write.len(), available: 0 }),
        }
        Ok(write.len())
    }

    /// Returns the buffer if it is in the memory of a guest.
    #[inline]
    pub fn guest(&self) -> Option<&GuestBuffer> {
        self.buffer().guest()
    }

    /// Returns the buffer of a read if it is in the memory of a guest. Returns `None` for a write:
    /// what a guest gives for sending is not written.
    #[inline]
    pub fn guest_mut(&mut self) -> Option<&mut GuestBuffer> {
        if self.is_read() { self.posted_buffer_mut().guest_mut() } else { None }
    }

    /// Returns whether the buffer is a frame of the ring's, in the place of a guest's buffer that the
    /// device does not take. A read with such a frame takes a whole packet or nothing, also on a ring
    /// with [mergeable reads](crate::RingBuilder::mergeable_reads). The packet is copied into the
    /// guest's buffer when the read completes.
    pub fn is_reserved(&self) -> bool {
        self.ring & BOUNCED != 0
    }

    #[inline(always)]
    pub(super) fn buffer(&self) -> &Buffer {
        self.buffer.as_ref().expect("a posted slot has its buffer until it is completed")
    }

    #[inline(always)]
    pub(super) fn posted_buffer_mut(&mut self) -> &mut Buffer {
        self.buffer.as_mut().expect("a posted slot has its buffer until it is completed")
    }

    #[inline(always)]
    pub(super) fn frame(&self) -> Option<&Frame> {
        self.buffer().frame()
    }

    #[inline(always)]
    pub(super) fn frame_mut(&mut self) -> Option<&mut Frame> {
        self.posted_buffer_mut().frame_mut()
    }
}

/// All bytes of the buffer, and none if it is in the memory of a guest.
impl AsMut<[u8]> for PostedSlot {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        self.posted_buffer_mut().space_mut()
    }
}

impl PacketBuffer for PostedSlot {
    fn guest(&self) -> Option<&GuestBuffer> {
        PostedSlot::guest(self)
    }

    fn header_and_bytes(&mut self) -> &mut [u8] {
        self.buffer_with_header_mut(offload::LEN).unwrap_or_default()
    }
}

impl Drop for PostedSlot {
    #[inline]
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            report_dropped(
                self.ring,
                DroppedSlot { buffer, user_data: self.user_data, class: self.class },
            );
        }
    }
}

impl fmt::Debug for PostedSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostedSlot")
            .field("user_data", &self.user_data)
            .field("class", &self.class)
            .finish_non_exhaustive()
    }
}

/// Returns the index of a class in a pair of reads and writes: 0 for reads, 1 for writes.
#[inline(always)]
pub(crate) fn class_index(class: Class) -> usize {
    usize::from(class != Class::Read)
}
