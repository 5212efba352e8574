//! [`PostedSlot`], a frame that a device fills or sends.

use std::fmt;

use static_assertions::const_assert_eq;
use vmring_core::{Class, Frame, SKIP_SUCCESS, SqeRef};

use crate::mailbox::{DroppedSlot, LAST_RING_NUMBER, report_dropped};

/// A submitted frame that a device owns: a read to be filled, or a write to be sent.
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
    /// The number of the ring that the entry belongs to, and perhaps [`SKIP_SUCCESS`]. A number and
    /// not a pointer, so that a slot costs no reference count.
    pub(super) ring: u32,
    /// `None` only while a slot is being completed or dropped.
    frame: Option<Frame>,
    user_data: u64,
}

// `SKIP_SUCCESS` is in `PostedSlot::ring` because that number is compared for every slot that a device
// has finished with. With the bit it is not the ring's own, so what a write that skips success needs
// costs nothing where the numbers are equal.
const_assert_eq!(SKIP_SUCCESS & LAST_RING_NUMBER, 0);

// The docs of `RingBuilder` ("Memory") give this size.
#[cfg(target_pointer_width = "64")]
const_assert_eq!(size_of::<PostedSlot>(), 40);

impl PostedSlot {
    #[inline(always)]
    pub(crate) fn new(frame: Frame, user_data: u64, ring: u32, class: Class) -> Self {
        Self { frame: Some(frame), user_data, ring, class }
    }

    /// Takes the slot out of an SQE of class `class`, which was submitted to ring number `ring`.
    #[inline(always)]
    pub(super) fn from_sqe(sqe: SqeRef<'_>, ring: u32, class: Class) -> Self {
        let ring = ring | sqe.flags();
        let (frame, user_data) = sqe.take();
        Self::new(frame, user_data, ring, class)
    }

    /// As [`from_sqe`](Self::from_sqe) for a read, which has no flags to look at.
    #[inline(always)]
    pub(super) fn from_read_sqe(sqe: SqeRef<'_>, ring: u32) -> Self {
        let (frame, user_data) = sqe.take();
        Self::new(frame, user_data, ring, Class::Read)
    }

    #[inline(always)]
    pub(crate) fn into_frame(mut self) -> (Frame, u64, Class) {
        let frame = self.frame.take();
        let (user_data, class) = (self.user_data, self.class);
        // Nothing is left to drop. Without this the destructor would look for a frame.
        std::mem::forget(self);
        (frame.expect("a posted slot has its frame until it is completed"), user_data, class)
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

    /// Returns the packet: that of a write is to be sent, that of a read is empty until the read is
    /// completed.
    #[inline]
    pub fn packet(&self) -> &[u8] {
        self.frame().as_ref()
    }

    /// Returns the whole buffer, from the packet's start to the end of the slot. For a read this is
    /// where the packet goes: at least [`max_packet_size`](crate::device::Capabilities) bytes. For
    /// a write it is the packet and the space behind it.
    #[inline]
    pub fn buffer_mut(&mut self) -> &mut [u8] {
        self.frame_mut().buffer_mut()
    }

    /// Returns the buffer from `header` bytes before the packet's start, for a device that has an
    /// offload header there. Returns `None` if there is less headroom than that. See also
    /// [`buffer_mut`](Self::buffer_mut).
    #[inline]
    pub fn buffer_with_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        self.frame_mut().buffer_with_header_mut(header)
    }

    /// Returns the packet of a write with the `header` bytes in front of it. Returns `None` if
    /// there is less headroom than that.
    #[inline]
    pub fn packet_with_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        let len = header + self.packet().len();
        self.buffer_with_header_mut(header)?.get_mut(..len)
    }

    /// Returns the packet of a write, to be changed in place.
    pub fn packet_mut(&mut self) -> &mut [u8] {
        self.frame_mut().as_mut()
    }

    #[inline]
    fn frame(&self) -> &Frame {
        self.frame.as_ref().expect("a posted slot has its frame until it is completed")
    }

    #[inline]
    pub(super) fn frame_mut(&mut self) -> &mut Frame {
        self.frame.as_mut().expect("a posted slot has its frame until it is completed")
    }
}

impl AsMut<[u8]> for PostedSlot {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        self.buffer_mut()
    }
}

impl Drop for PostedSlot {
    #[inline]
    fn drop(&mut self) {
        if let Some(frame) = self.frame.take() {
            report_dropped(
                self.ring,
                DroppedSlot { frame, user_data: self.user_data, class: self.class },
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
