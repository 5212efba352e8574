//! [`PostedSlot`]: a frame that a device fills or sends.

use std::fmt;

use static_assertions::const_assert_eq;
use vmring_core::{Class, Frame, SqeRef};

use crate::mailbox::{DroppedSlot, report_dropped};

/// A slot lent to a device: a frame to fill or to send. Not `Clone`; ends by being completed through
/// [`PollContext`].
///
/// If it is dropped instead, the entry completes as [`EntryError::Abandoned`] and the frame goes
/// back to the caller. If it is forgotten, the slot is lost and counted as such at close.
// In this order what stands behind the class and the ring is 32 bytes, which are copied in pieces that do
// not overlap. (The class is looked at by itself: it says whether an `Option` of a slot has one.) Reading
// overlapping pieces back costs some fifteen cycles.
#[repr(C)]
pub struct PostedSlot {
    pub(super) class: Class,
    /// The ring to which the entry belongs: a number, not a pointer, so that a slot costs no
    /// reference count.
    pub(super) ring: u32,
    /// `None` only in the moment between completing and dropping.
    frame: Option<Frame>,
    user_data: u64,
}

// As the docs of `RingBuilder` say.
#[cfg(target_pointer_width = "64")]
const_assert_eq!(size_of::<PostedSlot>(), 40);

impl PostedSlot {
    #[inline(always)]
    pub(crate) fn new(frame: Frame, user_data: u64, ring: u32, class: Class) -> Self {
        Self { frame: Some(frame), user_data, ring, class }
    }

    /// The slot of ring number `ring` that an SQE of that class was submitted with.
    #[inline(always)]
    pub(super) fn from_sqe(sqe: SqeRef<'_>, ring: u32, class: Class) -> Self {
        let (frame, user_data) = sqe.take();
        Self::new(frame, user_data, ring, class)
    }

    #[inline(always)]
    pub(crate) fn into_frame(mut self) -> (Frame, u64, Class) {
        let frame = self.frame.take();
        let (user_data, class) = (self.user_data, self.class);
        // Nothing is left to drop, and nobody need ask.
        std::mem::forget(self);
        (frame.expect("a posted slot has its frame until it is completed"), user_data, class)
    }

    /// The number the caller gave.
    #[inline]
    pub fn user_data(&self) -> u64 {
        self.user_data
    }

    /// Whether it is to be filled rather than sent.
    #[inline]
    pub fn is_read(&self) -> bool {
        self.class == Class::Read
    }

    /// Of a write: the packet.
    #[inline]
    pub fn packet(&self) -> &[u8] {
        self.frame().as_ref()
    }

    /// Of a read: where the packet goes, at least `max_packet_size` bytes. Of a write: the packet
    /// and the room behind it.
    #[inline]
    pub fn buffer_mut(&mut self) -> &mut [u8] {
        self.frame_mut().buffer_mut()
    }

    /// As [`buffer_mut`](Self::buffer_mut), from `header` bytes before the packet: for devices that put
    /// an offload header there. `None` if there is less headroom.
    #[inline]
    pub fn buffer_with_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        self.frame_mut().buffer_with_header_mut(header)
    }

    /// Of a write: the packet, from `header` bytes before it. `None` if there is less headroom.
    #[inline]
    pub fn packet_with_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        let len = header + self.packet().len();
        self.buffer_with_header_mut(header)?.get_mut(..len)
    }

    /// Of a write: the packet, to be changed in place.
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

/// The place of a class in a pair of reads and writes.
#[inline(always)]
pub(crate) fn class_index(class: Class) -> usize {
    usize::from(class != Class::Read)
}
