//! From a posted slot to the pieces of a payload, and from a payload into a posted slot. Both kinds of
//! buffers are known here only: frames, and buffers in the memory of a guest.

use std::fmt;

use vmring_core::offload::OffloadHeader;
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::software::{self, Left};

use super::implied;
use super::limits::HEADER_LEN;
use crate::config::Offloads;
use crate::device::context::PollContext;
use crate::device::slot::PostedSlot;
use crate::error::Status;

/// The bytes of a virtio header.
pub(super) type Header = [u8; HEADER_LEN];

/// What is in front of a wire's frames.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Whether each frame has a virtio header in front.
    pub(super) has_header: bool,
    /// The longest frame in bytes, with a VLAN tag and without the header.
    pub(super) max_packet_size: usize,
    /// The work that a header may ask for.
    pub(super) offloads: Offloads,
    /// Whether frames without a header may leave that work, so that the header is [made](implied).
    pub(super) is_implied: bool,
    /// The longest IP packet in bytes that need not be cut.
    pub(super) mtu: usize,
}

impl Layout {
    /// The length of the header, in bytes: 12 or 0.
    pub(super) fn header(&self) -> usize {
        if self.has_header { HEADER_LEN } else { 0 }
    }

    /// The header of a frame of `len` bytes as it is passed on, of which the peer has sent these bytes.
    /// `None` if it is not true of the frame, or asks for work that was not negotiated.
    ///
    /// Flags that are not known are ignored, as the standard demands (virtio 1.2, 5.1.6.4.2), and not
    /// passed on.
    pub(super) fn check(&self, bytes: &Header, len: usize) -> Option<Header> {
        let header = OffloadHeader::parse_ignoring_reserved(bytes).ok()?;
        header.validate(len).ok()?;
        if software::left_by(&self.offloads, &header) != Left::Nothing {
            return None;
        }
        let mut checked = [0; HEADER_LEN];
        header.write(&mut checked);
        Some(checked)
    }

    /// The header of a write as it is sent. `None` if the write cannot be sent.
    ///
    /// That of a frame was checked when it was submitted. That of a guest's buffer is copied once, and
    /// the copy is checked and sent, because the guest can change its memory at any time.
    fn header_of(&self, slot: &mut PostedSlot) -> Option<Header> {
        match slot.guest() {
            None => {
                let bytes = slot.packet_with_header_mut(HEADER_LEN)?;
                bytes.first_chunk().copied()
            }
            Some(guest) => {
                let header = OffloadHeader::parse_ignoring_reserved(&guest.header()?).ok()?;
                header.validate(guest.len()).ok()?;
                let left = software::left_by(&self.offloads, &header);
                if left != Left::Nothing {
                    return None;
                }
                let mut checked = [0; HEADER_LEN];
                header.for_sending().write(&mut checked);
                Some(checked)
            }
        }
    }

    /// The header of a write, empty on a wire without headers.
    ///
    /// # Errors
    ///
    /// The status with which the write completes, because it is none that can be sent.
    #[inline]
    pub(super) fn front_of(&self, slot: &mut PostedSlot) -> Result<Option<Header>, Status> {
        if slot.len() < ETHERNET_HEADER_LEN {
            return Err(Status::InvalidArgument);
        }
        if self.is_implied {
            let whole = slot.packet_with_header_mut(HEADER_LEN);
            let is_right = whole.is_some_and(|bytes| implied::finish(bytes, &self.offloads));
            return if is_right { Ok(None) } else { Err(Status::InvalidArgument) };
        }
        if !self.has_header {
            return Ok(None);
        }
        self.header_of(slot).map(Some).ok_or(Status::InvalidArgument)
    }

    /// The header of a frame of `len` bytes without one, which a read's buffer has received. `None` if the
    /// frame cannot be delivered.
    #[inline]
    pub(super) fn implied(&self, slot: &mut PostedSlot, len: usize) -> Option<Header> {
        let frame = slot.buffer_mut()?.get_mut(..len)?;
        implied::infer(frame, self.mtu, &self.offloads)
    }

    /// Completes a read with a payload, which is copied into its buffer. The payload's length is one
    /// that the wire delivers. If its header is wrong, the slot is returned.
    #[inline]
    pub(super) fn deliver(
        &self,
        cx: &mut PollContext<'_>,
        mut slot: PostedSlot,
        payload: &[u8],
    ) -> Option<PostedSlot> {
        if !self.has_header {
            match slot.copy_from(payload) {
                Ok(()) => cx.complete_read(slot, payload.len()),
                Err(_) => cx.fail(slot, Status::PacketTooBig),
            }
            return None;
        }
        let (header, packet) = payload.split_first_chunk::<HEADER_LEN>()?;
        let Some(header) = self.check(header, packet.len()) else { return Some(slot) };
        match slot.copy_from(packet) {
            Ok(()) => complete_with_header(cx, slot, &header, packet.len()),
            Err(_) => cx.fail(slot, Status::PacketTooBig),
        }
        None
    }
}

/// Completes a read whose buffer has a packet of `len` bytes, with a header in front.
pub(super) fn complete_with_header(
    cx: &mut PollContext<'_>,
    mut slot: PostedSlot,
    header: &Header,
    len: usize,
) {
    let has_room = if let Some(guest) = slot.guest_mut() {
        guest.set_header(header)
    } else if let Some(room) = slot.buffer_with_header_mut(HEADER_LEN) {
        room[..HEADER_LEN].copy_from_slice(header);
        true
    } else {
        false
    };
    if has_room {
        cx.complete_read_with_header(slot, HEADER_LEN + len);
    } else {
        cx.fail(slot, Status::InvalidArgument);
    }
}

/// Pieces of memory for a system call: addresses and lengths.
pub(super) struct Pieces(pub(super) Vec<libc::iovec>);

// SAFETY: the pieces are addresses. Only a call that also has what they are the addresses of uses them.
unsafe impl Send for Pieces {}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pieces").field("len", &self.0.len()).finish_non_exhaustive()
    }
}

impl Pieces {
    pub(super) fn with_capacity(pieces: usize) -> Self {
        Self(Vec::with_capacity(pieces))
    }

    pub(super) fn push_bytes(&mut self, bytes: &[u8]) {
        let iov_base = bytes.as_ptr().cast_mut().cast();
        self.0.push(libc::iovec { iov_base, iov_len: bytes.len() });
    }

    /// Adds the packet of a write.
    #[inline]
    pub(super) fn push_packet(&mut self, slot: &PostedSlot) {
        if let Some(bytes) = slot.packet() {
            return self.push_bytes(bytes);
        }
        let Some(guest) = slot.guest() else { return };
        for segment in guest.packet() {
            let (iov_base, iov_len) = (segment.as_ptr().cast(), segment.len() as usize);
            self.0.push(libc::iovec { iov_base, iov_len });
        }
    }

    /// Adds the space of a read, at most `longest` bytes and one more, which tells a packet that is too
    /// long.
    #[inline]
    pub(super) fn push_space(&mut self, slot: &mut PostedSlot, longest: usize) {
        if let Some(room) = slot.buffer_mut() {
            let len = room.len().min(longest + 1);
            self.0.push(libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: len });
            return;
        }
        let Some(guest) = slot.guest() else { return };
        for segment in guest.space().take_bytes(longest + 1) {
            let (iov_base, iov_len) = (segment.as_ptr().cast(), segment.len() as usize);
            self.0.push(libc::iovec { iov_base, iov_len });
        }
    }
}
