//! What both engines share: the layout of a frame in a slot, and the meaning of the kernel's
//! answers.

use vmring_core::offload;
use vmring_core::sync::{AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::limits::VLAN_TAG_LEN;

use super::dhcp::Dhcp;
use crate::device::context::PollContext;
use crate::device::slot::PostedSlot;
use crate::error::Status;

/// The frame layout and the counters of one TAP. Its queues share them.
#[derive(Debug)]
pub(crate) struct Framing {
    /// The length of the offload header in front of each packet, in bytes: 12 or 0.
    pub(crate) header: usize,
    /// The longest packet, in bytes, with a VLAN tag and without the offload header.
    pub(crate) max_packet_size: usize,
    pub(crate) dhcp: Option<Dhcp>,
    /// Counts packets from the host that were longer than `max_packet_size`: somebody has raised
    /// the TAP's MTU.
    pub(crate) too_big: AtomicU64,
    /// Counts packets that came without a whole offload header.
    pub(crate) malformed: AtomicU64,
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
    /// Completes a read for which the kernel has written `len` bytes: the offload header, if the
    /// TAP has one, into the headroom, and the packet after it. If the packet is dropped, posts the
    /// slot again instead.
    #[inline]
    pub(crate) fn complete_received(
        &self,
        cx: &mut PollContext<'_>,
        mut slot: PostedSlot,
        len: usize,
    ) {
        let packet = len.wrapping_sub(self.header);
        let longest = self.max_packet_size - VLAN_TAG_LEN;
        if packet > longest && self.is_too_long(&mut slot, packet) || self.is_cut(&mut slot, len) {
            self.drop_packet(cx, slot, len);
        } else if self.header > 0 {
            cx.complete_read_with_header(slot, len);
        } else {
            cx.complete_read(slot, len);
        }
    }

    /// Whether a packet that is longer than the longest one without a tag is too long.
    #[cold]
    fn is_too_long(&self, slot: &mut PostedSlot, packet: usize) -> bool {
        let tagged = slot.buffer_with_header_mut(self.header).is_some_and(|room| {
            let at = self.header + ETHERNET_HEADER_LEN - 2;
            matches!(room.get(at..at + 2), Some(&[0x81, 0x00] | &[0x88, 0xa8]))
        });
        packet > self.max_packet_size || !tagged
    }

    /// Counts the packet and posts the slot again.
    #[cold]
    fn drop_packet(&self, cx: &mut PollContext<'_>, slot: PostedSlot, len: usize) {
        let counter = if len < self.header { &self.malformed } else { &self.too_big };
        counter.fetch_add(1, Ordering::Relaxed);
        cx.put_back(slot);
    }

    /// Whether the packet was longer than the buffer and the kernel has cut it off. The kernel does
    /// not report this, but the packet's IP header states a greater length than has arrived.
    #[inline]
    fn is_cut(&self, slot: &mut PostedSlot, len: usize) -> bool {
        match slot.buffer_with_header_mut(self.header) {
            Some(room) if len == room.len() => promises_more(&room[self.header..]),
            _ => false,
        }
    }

    /// Takes what the guest writes if it is a DHCP request that this TAP's server handles, and
    /// answers it. Returns whether it did. The server learns from ARP packets, and leaves them. `bytes` begin with the offload header if the TAP has
    /// one.
    #[inline]
    pub(crate) fn take_dhcp(&self, bytes: &[u8]) -> bool {
        let Some(dhcp) = &self.dhcp else { return false };
        let (header, packet) = bytes.split_at(self.header.min(bytes.len()));
        dhcp.take(packet, (header.len() == offload::LEN).then_some(header))
    }
}

/// Whether the packet's IP header states a greater length than the packet has. False for a packet
/// that is not IP.
fn promises_more(packet: &[u8]) -> bool {
    let field = |at: usize| {
        packet.get(at..at + 2).map_or(0, |b| usize::from(u16::from_be_bytes([b[0], b[1]])))
    };
    // Skips up to two VLAN tags (IEEE 802.1Q, 802.1ad).
    let mut at = ETHERNET_HEADER_LEN;
    while matches!(field(at - 2), 0x8100 | 0x88a8) && at < ETHERNET_HEADER_LEN + 8 {
        at += 4;
    }
    match field(at - 2) {
        0x0800 => at + field(at + 2) > packet.len(),
        0x86dd => at + 40 + field(at + 4) > packet.len(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_packet_promises_more_than_it_has() {
        let mut packet = vec![0; 100];
        packet[12..14].copy_from_slice(&[0x08, 0x00]);
        packet[16..18].copy_from_slice(&86u16.to_be_bytes());
        assert!(!promises_more(&packet));
        assert!(promises_more(&packet[..99]));
        packet[12..14].copy_from_slice(&[0x86, 0xdd]);
        packet[18..20].copy_from_slice(&46u16.to_be_bytes());
        assert!(!promises_more(&packet));
        assert!(promises_more(&packet[..99]));
        for tags in [&[0x81, 0, 0, 7][..], &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 9]] {
            let mut tagged = packet.clone();
            tagged.splice(12..12, tags.iter().copied());
            assert!(!promises_more(&tagged));
            assert!(promises_more(&tagged[..tagged.len() - 1]));
        }
        let only_tags: Vec<u8> = [0x81, 0].into_iter().cycle().take(100).collect();
        assert!(!promises_more(&only_tags));
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        assert!(!promises_more(&packet[..20]), "of what is not IP nobody knows the length");
        for len in 0..20 {
            promises_more(&packet[..len]);
        }
    }
}
