//! [`GuestSupport`] and [`Bounce`]: what happens to a guest's buffer at a device that does not take
//! it. The packet is copied through a frame that was reserved when the ring was built.

use vmring_core::guest::SEGMENTS_MAX;
use vmring_core::offload::{self, OffloadHeader};
use vmring_core::{Buffer, Class, Frame, GuestBuffer, Outcome, Pool};

use vmring_embedded::software::{self, Left};

use crate::config::Offloads;
use crate::device::slot::class_index;
use crate::error::{Error, Status};
use crate::limits::BOUNCE_FRAMES_MAX;
use crate::pool::PoolBuilder;

/// The header of a packet whose checksum is complete, and which fills one buffer (virtio 1.2,
/// 5.1.6.1).
const NO_OFFLOAD: [u8; offload::LEN] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// What the header of a packet begins with that leaves no work to others.
const NOTHING_LEFT: [u8; 10] = [0; 10];

/// What a device takes of a guest's memory; see [`Capabilities`](crate::device::Capabilities).
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestSupport {
    pub(crate) read_segments: u32,
    pub(crate) write_segments: u32,
    pub(crate) headroom: u32,
    pub(crate) max_packet_size: u32,
    /// The largest packet that the ring reads, in bytes.
    pub(crate) read_size: u32,
    pub(crate) offloads: Offloads,
    /// Whether a packet may fill several reads of the ring, so that each may be small.
    pub(crate) merges: bool,
    /// Whether the device looks at the header of what a guest sends.
    pub(crate) checks_headers: bool,
}

impl GuestSupport {
    /// Whether the device takes every buffer of a guest that can be submitted to the ring.
    pub(crate) fn takes_all(&self, reads: bool) -> bool {
        let needs_no_look = !reads || self.merges && self.read_segments >= SEGMENTS_MAX;
        self.headroom == 0
            && self.write_segments >= SEGMENTS_MAX
            && self.checks_headers
            && needs_no_look
    }
}

/// The frames through which the packets of one ring are copied that are in a guest's memory, where
/// the device does not take such memory.
#[derive(Debug)]
pub(crate) struct Bounce {
    pool: Pool,
    /// The guest's buffer for which each frame stands, by the frame's slot.
    originals: Box<[Option<GuestBuffer>]>,
    /// How many frames are left for reads, and for writes. Posted reads may wait for ever, so they
    /// must not take the frames of the writes.
    left: [usize; 2],
    support: GuestSupport,
}

impl Bounce {
    /// Reserves frames for a ring with as many reads and writes on such a device.
    pub(crate) fn new(depths: [u32; 2], support: GuestSupport) -> Result<Self, Error> {
        let left = depths.map(|depth| (depth as usize).min(BOUNCE_FRAMES_MAX / 2));
        let pool = PoolBuilder::new(left[0] + left[1], support.max_packet_size as usize);
        let pool = pool.headroom((support.headroom as usize).max(offload::LEN)).build()?;
        let originals = (0..pool.layout().slots).map(|_| None).collect();
        Ok(Self { pool, originals, left, support })
    }

    /// Whether the device takes this buffer of a guest as it is.
    pub(crate) fn is_taken(&self, class: Class, guest: &GuestBuffer) -> bool {
        let GuestSupport { read_segments, write_segments, headroom, read_size, merges, .. } =
            self.support;
        let most = if class == Class::Read { read_segments } else { write_segments };
        let has_room = class == Class::Write || merges || guest.capacity() >= read_size as usize;
        // Most devices take none or all, and the segments need not be counted. A device without a header
        // of its own does not see the guest's.
        let has_few = || {
            let mut pieces = match (class, headroom) {
                _ if most >= SEGMENTS_MAX => return true,
                (Class::Read, 0) => guest.space(),
                (_, 0) => guest.packet(),
                _ => guest.segments(),
            };
            pieces.nth(most as usize).is_none()
        };
        // Nor does it do the work that the header asks for.
        let is_plain = || class == Class::Read || headroom > 0 || is_complete(guest);
        most > 0 && guest.header_len() >= headroom as usize && has_room && has_few() && is_plain()
    }

    /// Puts a reserved frame into the place of a guest's buffer. For a write, it has the packet.
    pub(super) fn replace(&mut self, class: Class, buffer: &mut Buffer) -> Result<(), Bounced> {
        let Some(guest) = buffer.guest() else { return Ok(()) };
        let left = &mut self.left[class_index(class)];
        if *left == 0 {
            return Err(Bounced::NoFrame);
        }
        let mut frame = self.pool.alloc().ok_or(Bounced::NoFrame)?;
        if class == Class::Write {
            fill(&mut frame, guest, &self.support.offloads).map_err(Bounced::Refused)?;
        }
        *left -= 1;
        let slot = frame.slot() as usize;
        let original = std::mem::replace(buffer, frame.into());
        self.originals[slot] = original.into_frame().err();
        Ok(())
    }

    /// Whether the buffer is a reserved frame.
    pub(super) fn has_replaced(&self, buffer: &Buffer) -> bool {
        buffer.frame().is_some_and(|frame| self.pool.owns(frame))
    }

    /// Gives the guest's buffer back for which a reserved frame stands, and frees the frame. If it is
    /// a read that is done, the packet is copied into the buffer. Returns the outcome, which is
    /// another one if the packet did not fit.
    pub(super) fn restore(
        &mut self,
        class: Class,
        buffer: Buffer,
        outcome: Outcome,
    ) -> (Buffer, Outcome) {
        let frame = match buffer.into_frame() {
            Ok(frame) => frame,
            Err(guest) => return (guest.into(), outcome),
        };
        let Some(mut guest) = self.originals[frame.slot() as usize].take() else {
            return (frame.into(), outcome);
        };
        self.left[class_index(class)] += 1;
        let outcome = match (class, outcome) {
            (Class::Read, Outcome::Done) => deliver(&frame, &mut guest),
            _ => outcome,
        };
        (guest.into(), outcome)
    }
}

/// Why a guest's buffer was not replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bounced {
    /// All reserved frames are in use.
    NoFrame,
    /// The packet is none that the device can send.
    Refused(Status),
}

/// Copies a guest's packet into a frame. The header is copied once, and the copy is checked.
fn fill(frame: &mut Frame, guest: &GuestBuffer, offloads: &Offloads) -> Result<(), Status> {
    frame.set_len(guest.len()).map_err(|_| Status::PacketTooBig)?;
    // The guest may change the bytes during the copy. That changes its own packet.
    guest.copy_to(frame);
    let header = header_of(guest, offloads).ok_or(Status::InvalidArgument)?;
    if offloads.virtio_header {
        frame.set_offload(&header.for_sending()).map_err(|_| Status::InvalidArgument)?;
    }
    Ok(())
}

/// The header of a guest's packet, copied once. `None` if it is not true of the packet, or asks for
/// work that a device with these offloads does not do.
pub(super) fn header_of(guest: &GuestBuffer, offloads: &Offloads) -> Option<OffloadHeader> {
    let header = match guest.header() {
        // The usual packet leaves nothing to do. The last two bytes are the receiver's.
        None => return Some(OffloadHeader::NONE),
        Some(bytes) if bytes[..10] == NOTHING_LEFT => return Some(OffloadHeader::NONE),
        Some(bytes) => OffloadHeader::parse(&bytes).ok()?,
    };
    header.validate(guest.len()).ok()?;
    (software::left_by(offloads, &header) == Left::Nothing).then_some(header)
}

/// Whether a device without offloads can send a guest's packet as it is.
pub(super) fn is_complete(guest: &GuestBuffer) -> bool {
    guest.header_len() == 0 || header_of(guest, &Offloads::default()).is_some()
}

/// Copies a packet that has arrived into the guest's buffer.
fn deliver(frame: &Frame, guest: &mut GuestBuffer) -> Outcome {
    if guest.copy_from(frame).is_err() {
        let _ = guest.set_len(0);
        return Status::PacketTooBig.into();
    }
    match frame.with_offload().and_then(|bytes| bytes.first_chunk()) {
        Some(header) => guest.set_header(header),
        None => guest.set_header(&NO_OFFLOAD),
    };
    Outcome::Done
}

/// Writes the header of a packet whose checksum is complete, and which fills `count` buffers.
pub(super) fn set_count(guest: &mut GuestBuffer, count: u16) {
    let mut header = NO_OFFLOAD;
    header[10..].copy_from_slice(&count.to_le_bytes());
    guest.set_header(&header);
}

/// Writes into the header that is in a guest's buffer that the packet fills `count` buffers.
#[cfg(all(target_os = "linux", feature = "tap"))]
pub(super) fn set_buffer_count(guest: &mut GuestBuffer, count: u16) {
    guest.segments().skip_bytes(10).copy_from(&count.to_le_bytes());
}

/// Sets the length of a part of a packet. If the buffer has fewer bytes, it is all of them.
pub(super) fn set_part_len(buffer: &mut Buffer, len: usize, is_first: bool) {
    let set = |len: usize, buffer: &mut Buffer| match buffer.guest_mut() {
        Some(guest) if is_first => guest.set_len(len),
        Some(guest) => guest.set_part_len(len),
        None => buffer.set_frame_len(len),
    };
    if let Err(too_long) = set(len, buffer) {
        let _ = set(too_long.available, buffer);
    }
}

/// Ends a read that a device has filled in the guest's memory itself, with `len` bytes of a packet, and
/// writes a header that leaves no work to others. Returns whether the packet fits; otherwise the buffer
/// is empty.
#[inline(always)]
pub(super) fn end_plain_read(guest: &mut GuestBuffer, len: usize) -> bool {
    let fits = guest.end_filling(len, &NO_OFFLOAD).is_ok();
    if !fits {
        let _ = guest.set_len(0);
    }
    fits
}

/// Ends a read that a device has filled in the guest's memory itself: `len` bytes of a packet, behind
/// a header if `with_header`.
pub(super) fn end_read(guest: &mut GuestBuffer, len: usize, with_header: bool) -> Outcome {
    if guest.set_len(len).is_err() || with_header && guest.header_len() == 0 {
        let _ = guest.set_len(0);
        return Status::InvalidArgument.into();
    }
    match if with_header { guest.header() } else { None } {
        // 1, even if the device says 0 (virtio 1.2, 5.1.6.4.1).
        Some(mut header) => {
            header[10..].copy_from_slice(&NO_OFFLOAD[10..]);
            guest.set_header(&header)
        }
        None => guest.set_header(&NO_OFFLOAD),
    };
    Outcome::Done
}
