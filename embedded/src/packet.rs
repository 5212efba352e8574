//! [`Packet`]: what is delivered, and [`PacketBuffer`]: where it is delivered to.

use vmring_core::guest::{GuestSlice, Segments};
use vmring_core::offload::{self, Checksum, Gso, OffloadHeader};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_core::{Frame, GuestBuffer};

use crate::limits::HEAD_LEN;

/// Where the length of a TCP header is in it, in the upper four bits and in words of four bytes (RFC
/// 9293, section 3.1).
const TCP_OFFSET_AT: usize = 12;
/// The least length of a TCP header, and the length of a UDP header (RFC 768), in bytes.
const TCP_HEADER_LEN: usize = 20;
const UDP_HEADER_LEN: usize = 8;

/// A buffer that a receiver lends to a network. It owns its bytes exclusively. [`AsMut`] gives all of
/// them, or none if they are in the memory of a guest.
pub trait PacketBuffer: AsMut<[u8]> + Send {
    /// The buffer, if it is in the memory of a guest.
    fn guest(&self) -> Option<&GuestBuffer> {
        None
    }

    /// The 12 bytes of an offload header and, behind them, all bytes for a packet. Only a receiver with
    /// [offload](crate::network::PortConfig::offloads) needs them. By default the header is the first
    /// 12 bytes that [`AsMut`] gives. If there are fewer bytes than 12 or the buffer is in the memory of
    /// a guest, the result is shorter.
    fn header_and_bytes(&mut self) -> &mut [u8] {
        self.as_mut()
    }
}

impl PacketBuffer for Vec<u8> {}
impl PacketBuffer for Box<[u8]> {}

/// The header is in the headroom, in front of the packet's bytes.
impl PacketBuffer for Frame {
    fn header_and_bytes(&mut self) -> &mut [u8] {
        let len = offload::LEN + self.len();
        let bytes = self.buffer_with_header_mut(offload::LEN);
        bytes.and_then(|bytes| bytes.get_mut(..len)).unwrap_or_default()
    }
}

/// A packet that is delivered. Its bytes stay where they are until they are copied to the receiver.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'p> {
    source: Source<'p>,
    /// The work that the sender has left to others. For most packets it is none.
    offload: OffloadHeader,
}

#[derive(Clone, Copy, Debug)]
enum Source<'p> {
    Bytes(&'p [u8]),
    Guest {
        /// The packet's first bytes, copied once. The network decides by them, and the receiver gets
        /// them, whatever the guest writes into its buffer meanwhile.
        head: [u8; HEAD_LEN],
        buffer: &'p GuestBuffer,
    },
}

impl<'p> From<&'p [u8]> for Packet<'p> {
    #[inline(always)]
    fn from(bytes: &'p [u8]) -> Self {
        Self { source: Source::Bytes(bytes), offload: OffloadHeader::NONE }
    }
}

/// Copies the first `len` bytes of a packet to `space`, if the packet is in one piece. The first bytes are
/// those of `head`, whatever the guest has written there since. `None` if it has copied nothing.
#[inline]
pub(crate) fn copy_in_one_piece<const N: usize>(
    head: &[u8; N],
    from: &GuestBuffer,
    len: usize,
    space: GuestSlice<'_>,
) -> Option<()> {
    let (_, bytes) = from.in_one_piece()?;
    let (bytes, _) = bytes.split_at(u32::try_from(len).ok()?)?;
    if len < N || space.len() < bytes.len() {
        return None;
    }
    space.copy_from_guest(bytes);
    // Nobody is told of the packet before this.
    space.write(head);
    Some(())
}

impl<'p> From<&'p GuestBuffer> for Packet<'p> {
    /// The packet in a guest's buffer. This copies its first bytes. The header in front of it is not
    /// read; see [`with_offload`](Packet::with_offload).
    fn from(buffer: &'p GuestBuffer) -> Self {
        let head = buffer.packet().read_first().unwrap_or_else(|| {
            let mut head = [0; HEAD_LEN];
            buffer.copy_to(&mut head);
            head
        });
        Self { source: Source::Guest { head, buffer }, offload: OffloadHeader::NONE }
    }
}

impl<'p> Packet<'p> {
    /// The same packet with the work that its sender has left to others: a checksum to complete, or
    /// segments to cut. A guest's header is copied once, and this is the copy. If the header leaves no
    /// work, nothing of it reaches a receiver, so its other fields need not be sound.
    #[must_use]
    pub fn with_offload(self, header: &OffloadHeader) -> Self {
        let offload = if header.is_plain() { OffloadHeader::NONE } else { header.for_sending() };
        Self { offload, ..self }
    }

    /// The packet in a guest's buffer, which begins with this Ethernet header.
    pub(crate) fn with_header(buffer: &'p GuestBuffer, header: &[u8; ETHERNET_HEADER_LEN]) -> Self {
        let mut packet = Self::from(buffer);
        if let Source::Guest { head, .. } = &mut packet.source {
            head[..ETHERNET_HEADER_LEN].copy_from_slice(header);
        }
        packet
    }
}

impl Packet<'_> {
    /// The work that the sender has left to others.
    #[inline]
    pub fn offload(&self) -> &OffloadHeader {
        &self.offload
    }

    /// Whether the sender has left work to others.
    #[inline(always)]
    pub(crate) fn asks(&self) -> bool {
        !self.offload.is_plain()
    }

    /// The bytes, unless they are in the memory of a guest.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        match &self.source {
            Source::Bytes(bytes) => Some(bytes),
            Source::Guest { .. } => None,
        }
    }

    /// The header as a receiver gets it whose packet fills `count` buffers (virtio 1.2, section
    /// 5.1.6.4.1).
    pub(crate) fn header_for(&self, count: u16) -> [u8; offload::LEN] {
        let mut bytes = [0; offload::LEN];
        OffloadHeader { num_buffers: count, ..self.offload }.write(&mut bytes);
        bytes
    }

    /// How many frames the packet is once it is cut, and the length of the longest of them.
    ///
    /// The header must be valid. What a guest writes after the packet was made may change both.
    pub(crate) fn segments(&self) -> (usize, usize) {
        let Checksum::Partial { start, .. } = self.offload.checksum else { return (1, self.len()) };
        let start = usize::from(start);
        let transport_len = match self.offload.gso {
            Gso::None => return (1, self.len()),
            Gso::TcpV4 | Gso::TcpV6 => {
                let mut offset = [0];
                self.copy_to(start + TCP_OFFSET_AT, &mut offset);
                (usize::from(offset[0] >> 4) * 4).max(TCP_HEADER_LEN)
            }
            Gso::UdpL4 | Gso::Udp => UDP_HEADER_LEN,
        };
        let headers = self.len().min(start + transport_len);
        let segment_size = usize::from(self.offload.segment_size);
        let count = (self.len() - headers).div_ceil(segment_size.max(1)).max(1);
        (count, self.len().min(headers + segment_size))
    }

    /// The number of bytes.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        match &self.source {
            Source::Bytes(bytes) => bytes.len(),
            Source::Guest { buffer, .. } => buffer.len(),
        }
    }

    /// The first bytes: [`HEAD_LEN`] of them, or all if the packet is shorter. They do not change.
    #[inline(always)]
    pub fn head(&self) -> &[u8] {
        match &self.source {
            Source::Bytes(bytes) => &bytes[..bytes.len().min(HEAD_LEN)],
            Source::Guest { head, buffer } => &head[..buffer.len().min(HEAD_LEN)],
        }
    }

    /// Like [`copy_to`](Self::copy_to), from a byte that a guest has named and that the packet may not have.
    pub(crate) fn read_at(&self, at: usize, to: &mut [u8]) -> usize {
        if at <= self.len() { self.copy_to(at, to) } else { 0 }
    }

    /// Copies bytes out, from byte `at` on, which is not behind the packet's end: as many as both sides have.
    /// Returns how many.
    #[inline(always)]
    pub fn copy_to(&self, at: usize, to: &mut [u8]) -> usize {
        let len = self.len().saturating_sub(at).min(to.len());
        match &self.source {
            Source::Bytes(bytes) => to[..len].copy_from_slice(&bytes[at..at + len]),
            Source::Guest { buffer, .. } => self.copy_from_guest(buffer, at, &mut to[..len]),
        }
        len
    }

    #[inline(never)]
    fn copy_from_guest(&self, buffer: &GuestBuffer, at: usize, to: &mut [u8]) {
        let head = self.head_from(at, to.len());
        let (first, rest) = to.split_at_mut(head.len());
        first.copy_from_slice(head);
        buffer.packet().skip_bytes(at + head.len()).copy_to(rest);
    }

    /// The packet's segments, if they are in the memory of a guest.
    pub(crate) fn guest_segments(&self) -> Option<Segments<'_>> {
        match &self.source {
            Source::Bytes(_) => None,
            Source::Guest { buffer, .. } => Some(buffer.packet()),
        }
    }

    /// Copies `len` bytes, from byte `at` on, into a guest's segments, from their byte `to_at` on. Both
    /// sides must have them. `rest` are the packet's segments from byte `at` on, if the caller has them.
    #[inline(never)]
    pub(crate) fn copy_to_guest(
        &self,
        at: usize,
        len: usize,
        to: &GuestBuffer,
        to_at: usize,
        rest: Option<&Segments<'_>>,
    ) {
        let space = || to.segments().skip_bytes(to_at);
        match &self.source {
            Source::Bytes(bytes) => {
                space().copy_from(&bytes[at..at + len]);
            }
            Source::Guest { head, buffer } => {
                if at == 0
                    && let Some((header, room)) = to.in_one_piece()
                    && header.len() as usize == to_at
                    && copy_in_one_piece(head, buffer, len, room).is_some()
                {
                    return;
                }
                let head = self.head_from(at, len);
                space().copy_from(head);
                let from = rest.cloned().unwrap_or_else(|| buffer.packet().skip_bytes(at));
                let from = from.skip_bytes(head.len()).take_bytes(len - head.len());
                space().skip_bytes(head.len()).copy_from_segments(from);
            }
        }
    }

    /// Those of the first bytes that are among the `len` bytes from `at` on.
    fn head_from(&self, at: usize, len: usize) -> &[u8] {
        let head = self.head().get(at..).unwrap_or_default();
        &head[..head.len().min(len)]
    }
}
