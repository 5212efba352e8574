//! What both engines share: the layout of a frame in a slot, and the meaning of the kernel's
//! answers.

use std::fmt;
use std::sync::Arc;

use vmring_core::GuestBuffer;
use vmring_core::guest::{GuestSlice, Segments};
use vmring_core::offload;
use vmring_core::sync::{AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::limits::VLAN_TAG_LEN;

use super::dhcp::{Dhcp, FRONT};
use super::limits::{DHCP_REQUEST_MAX, WRITE_SEGMENTS_MAX};
use crate::config::Offloads;
use crate::device::bounce::header_of;
use crate::device::context::PollContext;
use crate::device::slot::PostedSlot;
use crate::error::Status;

/// The frame layout of one TAP. Its queues share it.
#[derive(Debug)]
pub(crate) struct Framing {
    /// The length of the offload header in front of each packet, in bytes: 12 or 0.
    pub(crate) header: usize,
    /// The longest packet, in bytes, with a VLAN tag and without the offload header.
    pub(crate) max_packet_size: usize,
    pub(crate) offloads: Offloads,
    pub(crate) dhcp: Option<Dhcp>,
    pub(crate) drops: Arc<Drops>,
}

/// The packets from the host that were dropped, by reason. They are the interface's: a stop or a
/// restart does not reset them.
#[derive(Debug, Default)]
pub(crate) struct Drops {
    /// The packet was longer than `max_packet_size`: somebody has raised the TAP's MTU.
    pub(crate) too_big: AtomicU64,
    /// The packet came without a whole offload header.
    pub(crate) malformed: AtomicU64,
    /// The posted reads of a ring with mergeable reads were too few for the packet.
    pub(crate) too_few_reads: AtomicU64,
}

/// The pieces of one frame, for readv(2), writev(2) or their like.
pub(crate) struct Pieces<const N: usize>([libc::iovec; N]);

// SAFETY: the pieces are addresses. Only a call that also has the slot whose bytes they are uses them.
unsafe impl<const N: usize> Send for Pieces<N> {}

impl<const N: usize> Default for Pieces<N> {
    fn default() -> Self {
        Self([libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; N])
    }
}

impl<const N: usize> Pieces<N> {
    /// Makes the segments the pieces from number `from` on. Returns the number behind the last one.
    pub(crate) fn put<'b>(
        &mut self,
        from: usize,
        segments: impl Iterator<Item = GuestSlice<'b>>,
    ) -> usize {
        let mut at = from;
        for (piece, segment) in self.0[from..].iter_mut().zip(segments) {
            *piece =
                libc::iovec { iov_base: segment.as_ptr().cast(), iov_len: segment.len() as usize };
            at += 1;
        }
        at
    }

    /// Makes the bytes the piece of number `at`. Returns whether there is such a piece.
    pub(crate) fn put_bytes(&mut self, at: usize, bytes: &mut [u8]) -> bool {
        let Some(piece) = self.0.get_mut(at) else { return false };
        *piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        true
    }

    /// Makes `len` bytes from `start` on the piece of number `at`, which must be there.
    #[inline]
    pub(crate) fn put_space(&mut self, at: usize, start: *mut u8, len: usize) {
        self.0[at] = libc::iovec { iov_base: start.cast(), iov_len: len };
    }

    /// The bytes of the pieces from number `from` to `end`.
    pub(crate) fn len_of(&self, from: usize, end: usize) -> usize {
        self.0[from..end].iter().map(|piece| piece.iov_len).sum()
    }

    /// The first `count` pieces.
    pub(crate) fn first(&self, count: usize) -> &[libc::iovec] {
        &self.0[..count]
    }
}

impl<const N: usize> fmt::Debug for Pieces<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pieces").finish_non_exhaustive()
    }
}

/// The pieces of one write, and the header of a packet from a guest's memory.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    /// A copy, because the guest may change its own while the kernel reads it.
    header: [u8; offload::LEN],
    /// One more than the segments of a guest's buffer: the header.
    pieces: Pieces<{ WRITE_SEGMENTS_MAX + 1 }>,
}

/// The space of a posted read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Space {
    /// One piece: where it begins, and its length in bytes.
    Piece(*mut u8, usize),
    /// Several pieces of a guest's memory.
    Scattered,
    /// The slot lacks space for the offload header.
    Lacking,
}

/// What an error of the kernel means for the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The frame may succeed later.
    Wait,
    /// This frame fails; others may succeed.
    Entry(Status),
    /// Every further frame fails: the TAP is gone.
    Gone(Status),
}

/// Returns what `errno` means for the frame. Sources: `tun_get_user`, `tun_chr_write_iter` and
/// `tun_do_read` in the kernel's `drivers/net/tun.c`.
pub(crate) fn fault_of(errno: i32) -> Fault {
    match errno {
        libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM => Fault::Wait,
        // The interface has been deleted, or the queue detached.
        libc::EBADFD | libc::EBADF | libc::ENODEV => Fault::Gone(Status::Os(errno)),
        // Among these are EIO, if the host's end is down; EINVAL, if the packet is shorter than an
        // Ethernet header or its offload header does not fit it; and EMSGSIZE.
        errno => Fault::Entry(Status::Os(errno)),
    }
}

/// Returns the status for the error of a system call that moves no frame.
pub(crate) fn status_of(error: &std::io::Error) -> Status {
    error.raw_os_error().map_or(Status::Failure, Status::Os)
}

impl Framing {
    /// The bytes of a posted write for the kernel, in pieces: the offload header, if the TAP has one,
    /// and the packet. `None` if the slot lacks space for the header, or a guest's header is wrong or
    /// asks for what was not negotiated. That of a frame was checked when it was submitted.
    #[inline]
    pub(crate) fn to_write<'a>(
        &self,
        slot: &'a mut PostedSlot,
        outgoing: &'a mut Outgoing,
    ) -> Option<&'a [libc::iovec]> {
        let Outgoing { header, pieces } = outgoing;
        let Some(guest) = slot.guest() else {
            let bytes = slot.packet_with_header_mut(self.header)?;
            pieces.0[0] = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            return Some(pieces.first(1));
        };
        let mut count = 0;
        if self.header > 0 {
            header_of(guest, &self.offloads)?.for_sending().write(header);
            pieces.put_bytes(0, header);
            count = 1;
        }
        let count = pieces.put(count, guest.packet());
        Some(pieces.first(count))
    }

    /// The same, if it is one piece and nothing that the DHCP server looks at: where it begins, and its
    /// length in bytes.
    #[inline]
    pub(crate) fn piece_to_write(&self, slot: &mut PostedSlot) -> Option<(*mut u8, usize)> {
        let Some(guest) = slot.guest() else {
            let bytes = slot.packet_with_header_mut(self.header)?;
            let is_others = self.dhcp.is_none() || !Dhcp::looks_at(bytes.get(self.header..)?);
            return is_others.then_some((bytes.as_mut_ptr(), bytes.len()));
        };
        let mut segments = guest.packet();
        match (segments.next(), segments.next()) {
            // A header would be a piece of its own.
            (Some(segment), None) if self.dhcp.is_none() && self.header == 0 => {
                Some((segment.as_ptr(), segment.len() as usize))
            }
            _ => None,
        }
    }

    /// The space of a posted read for the kernel, if it is one piece: for the offload header, if the
    /// TAP has one, and the longest packet.
    #[inline]
    pub(crate) fn to_read(&self, slot: &mut PostedSlot) -> Space {
        let Some(guest) = slot.guest() else {
            let Some(room) = slot.buffer_with_header_mut(self.header) else {
                return Space::Lacking;
            };
            return Space::Piece(room.as_mut_ptr(), room.len());
        };
        let mut space = self.space_of(guest);
        match (space.next(), space.next()) {
            (Some(segment), None) => Space::Piece(segment.as_ptr(), segment.len() as usize),
            (Some(_), Some(_)) => Space::Scattered,
            (None, _) => Space::Lacking,
        }
    }

    /// The segments of a guest's buffer for the offload header, if the TAP has one, and a packet.
    pub(crate) fn space_of<'b>(&self, guest: &'b GuestBuffer) -> Segments<'b> {
        if self.header > 0 { guest.segments() } else { guest.space() }
    }

    /// Completes a read for which the kernel has written `len` bytes: the offload header, if the TAP has
    /// one, into the headroom, and the packet after it. The packet is none that is
    /// [dropped](Self::drops_packet).
    #[inline]
    pub(crate) fn complete_received(&self, cx: &mut PollContext<'_>, slot: PostedSlot, len: usize) {
        if self.header > 0 {
            cx.complete_read_with_header(slot, len);
        } else {
            cx.complete_read(slot, len);
        }
    }

    /// Whether a packet is dropped for which the kernel has written `len` bytes, with its offload
    /// header, into a space of `room` bytes. It is counted then. `front` copies the packet's first
    /// bytes.
    ///
    /// A packet that was longer than the space is dropped, too. The kernel has cut it off and does not
    /// report that, but the packet's IP header states a greater length than has arrived.
    #[inline]
    pub(crate) fn drops_packet(
        &self,
        len: usize,
        room: usize,
        mut front: impl FnMut() -> [u8; FRONT],
    ) -> bool {
        let packet = len.wrapping_sub(self.header);
        let drops = self.is_long(len) && self.is_too_long(&front(), packet)
            || len == room && promises_more(&front(), packet);
        if drops {
            self.count_dropped(len);
        }
        drops
    }

    /// Whether [`drops_packet`](Self::drops_packet) has to look into the packet. It keeps every other one.
    #[inline]
    pub(crate) fn may_drop(&self, len: usize, room: usize) -> bool {
        self.is_long(len) || len == room
    }

    /// Whether a packet is longer than the longest one without a tag, or lacks a part of its offload header.
    #[inline]
    fn is_long(&self, len: usize) -> bool {
        len.wrapping_sub(self.header) > self.max_packet_size - VLAN_TAG_LEN
    }

    /// Whether a packet that is longer than the longest one without a tag is too long. `front` is its
    /// first bytes.
    #[cold]
    fn is_too_long(&self, front: &[u8; FRONT], packet: usize) -> bool {
        let ether_type = &front[ETHERNET_HEADER_LEN - 2..ETHERNET_HEADER_LEN];
        packet > self.max_packet_size || !matches!(ether_type, &[0x81, 0x00] | &[0x88, 0xa8])
    }

    /// A copy of the first bytes that the kernel has written into a read's buffer, behind the offload
    /// header.
    pub(crate) fn front(&self, slot: &mut PostedSlot) -> [u8; FRONT] {
        let mut front = [0; FRONT];
        if let Some(guest) = slot.guest() {
            guest.copy_to(&mut front);
        } else if let Some(room) = slot.buffer_with_header_mut(self.header) {
            let written = &room[self.header..];
            let len = written.len().min(FRONT);
            front[..len].copy_from_slice(&written[..len]);
        }
        front
    }

    #[cold]
    fn count_dropped(&self, len: usize) {
        let Drops { malformed, too_big, .. } = &*self.drops;
        let counter = if len < self.header { malformed } else { too_big };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes what the guest writes if it is a DHCP request that this TAP's server handles, and
    /// answers it. Returns whether it did. The server learns from ARP packets, and leaves them.
    #[inline]
    pub(crate) fn take_dhcp(&self, slot: &mut PostedSlot) -> bool {
        let Some(dhcp) = &self.dhcp else { return false };
        if let Some(guest) = slot.guest() {
            return self.take_guests_dhcp(dhcp, guest);
        }
        let Some(bytes) = slot.packet_with_header_mut(self.header) else { return false };
        let (header, packet) = bytes.split_at(self.header.min(bytes.len()));
        dhcp.take(packet, (header.len() == offload::LEN).then_some(header))
    }

    /// As [`take_dhcp`](Self::take_dhcp). What the server decides by is a copy, because the guest may
    /// change the packet. Only a packet that may be a request is copied whole.
    fn take_guests_dhcp(&self, dhcp: &Dhcp, guest: &GuestBuffer) -> bool {
        let mut packet = [0; DHCP_REQUEST_MAX];
        let front = guest.copy_to(&mut packet[..FRONT]);
        if !Dhcp::looks_at(&packet[..front]) || guest.len() > DHCP_REQUEST_MAX {
            return false;
        }
        let len = guest.copy_to(&mut packet);
        let header = guest.header().filter(|_| self.header > 0);
        dhcp.take(&packet[..len], header.as_ref().map(<[u8; offload::LEN]>::as_slice))
    }
}

/// Whether the IP header of a packet of `len` bytes, of which these are the first, states a greater
/// length than the packet has. False for a packet that is not IP.
fn promises_more(packet: &[u8], len: usize) -> bool {
    let packet = &packet[..packet.len().min(len)];
    let field = |at: usize| {
        packet.get(at..at + 2).map_or(0, |b| usize::from(u16::from_be_bytes([b[0], b[1]])))
    };
    // Skips up to two VLAN tags (IEEE 802.1Q, 802.1ad).
    let mut at = ETHERNET_HEADER_LEN;
    while matches!(field(at - 2), 0x8100 | 0x88a8) && at < ETHERNET_HEADER_LEN + 8 {
        at += 4;
    }
    match field(at - 2) {
        0x0800 => at + field(at + 2) > len,
        0x86dd => at + 40 + field(at + 4) > len,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_packet_promises_more_than_it_has() {
        let cut = |packet: &[u8]| promises_more(packet, packet.len());
        let mut packet = vec![0; 100];
        packet[12..14].copy_from_slice(&[0x08, 0x00]);
        packet[16..18].copy_from_slice(&86u16.to_be_bytes());
        assert!(!cut(&packet));
        assert!(cut(&packet[..99]));
        packet[12..14].copy_from_slice(&[0x86, 0xdd]);
        packet[18..20].copy_from_slice(&46u16.to_be_bytes());
        assert!(!cut(&packet));
        assert!(cut(&packet[..99]));
        for tags in [&[0x81, 0, 0, 7][..], &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 9]] {
            let mut tagged = packet.clone();
            tagged.splice(12..12, tags.iter().copied());
            assert!(!cut(&tagged));
            assert!(cut(&tagged[..tagged.len() - 1]));
        }
        let only_tags: Vec<u8> = [0x81, 0].into_iter().cycle().take(100).collect();
        assert!(!cut(&only_tags));
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        assert!(!cut(&packet[..20]), "of what is not IP nobody knows the length");
        for len in 0..20 {
            cut(&packet[..len]);
        }
    }
}
