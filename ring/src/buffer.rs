//! [`Buffer`]: what an entry of the queues carries, a frame or a guest's buffer.

use crate::frame::{Frame, OutOfSpace};
use crate::guest::buffer::GuestBuffer;
use core::fmt;
use static_assertions::{assert_impl_all, assert_not_impl_any};

/// A frame, or a buffer of a guest. It is as large as a [`Frame`].
#[repr(transparent)]
pub struct Buffer(
    /// The frame, or the carrier of the guest's buffer. Which of the two is in its range, which is
    /// in registers while an entry is moved.
    Frame,
);

assert_not_impl_any!(Buffer: Clone, Copy);
assert_impl_all!(Buffer: Send, Sync);

impl Buffer {
    /// The buffer of an entry's slot, or of a guest's list.
    #[inline(always)]
    pub(crate) fn from_carrier(frame: Frame) -> Self {
        Self(frame)
    }

    #[inline(always)]
    pub(crate) fn carrier(&self) -> &Frame {
        &self.0
    }

    #[inline(always)]
    pub(crate) fn into_carrier(self) -> Frame {
        self.0
    }

    /// Whether this is a guest's buffer.
    #[inline(always)]
    pub fn is_guest(&self) -> bool {
        self.0.is_guest()
    }

    /// The packet's length in bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the packet has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The frame. `None` if this is a guest's buffer.
    #[inline(always)]
    pub fn frame(&self) -> Option<&Frame> {
        (!self.is_guest()).then_some(&self.0)
    }

    /// The frame. `None` if this is a guest's buffer.
    #[inline(always)]
    pub fn frame_mut(&mut self) -> Option<&mut Frame> {
        (!self.is_guest()).then_some(&mut self.0)
    }

    /// The packet's bytes in a frame. `None` if they are in the memory of a guest. (An empty packet may
    /// be an empty slice there too.) This costs no question which of the two it is.
    #[inline(always)]
    pub fn bytes(&self) -> Option<&[u8]> {
        self.0.bytes()
    }

    /// The bytes from the packet's start to the end of the frame. None of a guest's buffer.
    #[inline(always)]
    pub fn space_mut(&mut self) -> &mut [u8] {
        // The frame of a guest's buffer ends where its packet would begin.
        self.0.buffer_mut()
    }

    /// The guest's buffer. `None` if this is a frame.
    #[inline]
    pub fn guest(&self) -> Option<&GuestBuffer> {
        self.is_guest().then(|| GuestBuffer::from_carrier_ref(&self.0))
    }

    /// The guest's buffer. `None` if this is a frame.
    #[inline]
    pub fn guest_mut(&mut self) -> Option<&mut GuestBuffer> {
        if self.is_guest() { Some(GuestBuffer::from_carrier_mut(&mut self.0)) } else { None }
    }

    /// The frame, or the guest's buffer as the error.
    #[inline(always)]
    pub fn into_frame(self) -> Result<Frame, GuestBuffer> {
        if self.is_guest() { Err(GuestBuffer::new(self.0)) } else { Ok(self.0) }
    }

    /// Sets the length of a frame's packet. This costs no question which of the two it is.
    ///
    /// # Errors
    ///
    /// The frame has fewer bytes, or this is a guest's buffer and `len` is not 0. In this case nothing
    /// has changed. With a length of 0, a guest's buffer is empty afterwards too.
    #[inline(always)]
    pub fn set_frame_len(&mut self, len: usize) -> Result<(), OutOfSpace> {
        // The frame of a guest's buffer has a capacity of 0.
        self.0.set_len(len)
    }
}

impl Buffer {
    /// Copies the packet's first bytes out: as many as both sides have. Returns how many.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        if let Some(guest) = self.guest() {
            return guest.copy_to(to);
        }
        let len = to.len().min(self.len());
        to[..len].copy_from_slice(&self.0[..len]);
        len
    }

    /// Copies a packet in, and sets its length.
    ///
    /// # Errors
    ///
    /// The buffer has fewer bytes. In this case nothing has changed.
    pub fn copy_from(&mut self, packet: &[u8]) -> Result<(), OutOfSpace> {
        match self.guest_mut() {
            Some(guest) => guest.copy_from(packet),
            None => self.0.copy_from(packet),
        }
    }

    /// Copies a packet in from another buffer, once, and sets its length.
    ///
    /// # Errors
    ///
    /// The buffer has fewer bytes. In this case nothing has changed.
    pub fn copy_from_buffer(&mut self, packet: &Buffer) -> Result<(), OutOfSpace> {
        match (packet.guest(), self.guest_mut()) {
            (None, _) => self.copy_from(&packet.0),
            (Some(from), Some(to)) => to.copy_from_guest(from),
            (Some(from), None) => {
                self.0.set_len(from.len())?;
                from.copy_to(&mut self.0);
                Ok(())
            }
        }
    }
}

impl From<Frame> for Buffer {
    #[inline(always)]
    fn from(frame: Frame) -> Self {
        Self(frame)
    }
}

impl From<GuestBuffer> for Buffer {
    #[inline]
    fn from(buffer: GuestBuffer) -> Self {
        Self(buffer.into_carrier())
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.guest() {
            Some(guest) => guest.fmt(f),
            None => self.0.fmt(f),
        }
    }
}
