//! The offload header: the 12 bytes in front of a packet when offload is on, `virtio_net_hdr`,
//! typed.
//!
//! The header says what the packet's sender has left undone: a checksum to complete
//! ([`Checksum::Partial`]), or a large packet to cut into segments ([`Gso`]). A VMM, TAP
//! (`IFF_VNET_HDR`) and vmnet (virtio header key) all use this header, so it is passed on
//! unchanged, in the headroom directly in front of the packet.
//!
//! ```
//! use vmring_core::offload::{Checksum, Gso, LEN, OffloadError, OffloadHeader};
//!
//! # fn main() -> Result<(), OffloadError> {
//! // 4 KiB of TCP over IPv4, to send as segments of 1,460 bytes.
//! let header = OffloadHeader {
//!     checksum: Checksum::Partial { start: 34, offset: 16 },
//!     gso: Gso::TcpV4,
//!     segment_size: 1460,
//!     header_len: 54,
//!     ..OffloadHeader::NONE
//! };
//! header.validate(54 + 4096)?; // the length of the packet, without the header
//!
//! let mut bytes = [0xaa; LEN];
//! header.write(&mut bytes);
//! assert_eq!(bytes, [1, 1, 54, 0, 0xb4, 0x05, 34, 0, 16, 0, 0, 0]);
//! assert_eq!(OffloadHeader::parse(&bytes)?, header);
//!
//! // Trim the four bytes of a VLAN tag. Trimming 40 bytes would cut into the TCP header.
//! assert_eq!(header.trim_front(4)?.checksum, Checksum::Partial { start: 30, offset: 16 });
//! assert_eq!(
//!     header.trim_front(40),
//!     Err(OffloadError::TrimPastChecksumStart { trim: 40, start: 34 }),
//! );
//! # Ok(())
//! # }
//! ```
//!
//! # Reading what others wrote
//!
//! [`OffloadHeader::parse`] refuses what it cannot represent. [`OffloadHeader::validate`] checks
//! the rest against the packet's length. Do both with a header from a guest before anything relies
//! on it. In a validated header, the checksum field is inside the packet. If the packet is to be
//! cut, the fixed part of its transport header is inside the packet, too.
//!
//! Sources: "5.1.6" below is that section of the [virtio 1.2 specification][virtio]; the layout is
//! `virtio_net_hdr_v1` of Linux's `include/uapi/linux/virtio_net.h`; what Linux accepts is
//! `virtio_net_hdr_to_skb` in `include/linux/virtio_net.h` and `tun_vnet_hdr_get` in
//! `drivers/net/tun_vnet.h`.
//!
//! [virtio]: https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html

use crate::view::ETHERNET_HEADER_LEN;
use core::fmt;
use core::mem::{align_of, offset_of, size_of};
use core::ops::BitAnd;
use static_assertions::const_assert_eq;

/// The number of bytes in the header.
pub const LEN: usize = 12;

/// `flags`: the checksum must be completed as `csum_start` and `csum_offset` say.
#[doc(alias = "VIRTIO_NET_HDR_F_NEEDS_CSUM")]
pub const F_NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum has been verified.
#[doc(alias = "VIRTIO_NET_HDR_F_DATA_VALID")]
pub const F_DATA_VALID: u8 = 2;
/// `flags`: `csum_start` and `csum_offset` hold counts of coalesced segments and not positions.
#[doc(alias = "VIRTIO_NET_HDR_F_RSC_INFO")]
pub const F_RSC_INFO: u8 = 4;

/// `gso_type`: one packet, not to be cut.
#[doc(alias = "VIRTIO_NET_HDR_GSO_NONE")]
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
#[doc(alias = "VIRTIO_NET_HDR_GSO_TCPV4")]
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: a UDP datagram to be cut into IP fragments.
#[doc(alias = "VIRTIO_NET_HDR_GSO_UDP")]
pub const GSO_UDP: u8 = 3;
/// `gso_type`: TCP over IPv6.
#[doc(alias = "VIRTIO_NET_HDR_GSO_TCPV6")]
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: many UDP datagrams in one.
#[doc(alias = "VIRTIO_NET_HDR_GSO_UDP_L4")]
pub const GSO_UDP_L4: u8 = 5;
/// `gso_type`, added to one of the TCP types: the ECN bits are set.
#[doc(alias = "VIRTIO_NET_HDR_GSO_ECN")]
pub const GSO_ECN: u8 = 0x80;

/// A segment size that Linux reserves for itself (`GSO_BY_FRAGS`) and refuses from outside.
const SEGMENT_SIZE_BY_FRAGS: u16 = 0xffff;

/// A 16-bit field as it is in memory: little-endian on every machine, aligned to one byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Le16([u8; 2]);

impl Le16 {
    /// The field that holds `value`.
    #[inline]
    pub const fn new(value: u16) -> Self {
        Self(value.to_le_bytes())
    }

    /// The value.
    #[inline]
    pub const fn get(self) -> u16 {
        u16::from_le_bytes(self.0)
    }
}

/// The header as it is in memory, not interpreted. [`OffloadHeader`] is the typed one.
///
/// It is little-endian on every machine, as virtio 1.x is (5.1.6 of the specification, "le16"). TAP
/// uses the host's byte order until `TUNSETVNETLE` is set, which makes no difference on
/// little-endian machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
#[doc(alias = "virtio_net_hdr_v1")]
pub struct VirtioNetHdr {
    /// The `F_*` bits.
    pub flags: u8,
    /// One of `GSO_*`, perhaps with [`GSO_ECN`].
    pub gso_type: u8,
    /// Bytes of headers in front of the first segment's payload. A hint.
    pub hdr_len: Le16,
    /// Bytes of payload in each segment.
    pub gso_size: Le16,
    /// Where in the packet the checksummed part begins.
    pub csum_start: Le16,
    /// Where the checksum goes, counted from `csum_start`.
    pub csum_offset: Le16,
    /// The number of buffers that the packet is spread over.
    pub num_buffers: Le16,
}

const_assert_eq!(size_of::<VirtioNetHdr>(), LEN);
const_assert_eq!(align_of::<VirtioNetHdr>(), 1);
const_assert_eq!(offset_of!(VirtioNetHdr, flags), 0);
const_assert_eq!(offset_of!(VirtioNetHdr, gso_type), 1);
const_assert_eq!(offset_of!(VirtioNetHdr, hdr_len), 2);
const_assert_eq!(offset_of!(VirtioNetHdr, gso_size), 4);
const_assert_eq!(offset_of!(VirtioNetHdr, csum_start), 6);
const_assert_eq!(offset_of!(VirtioNetHdr, csum_offset), 8);
const_assert_eq!(offset_of!(VirtioNetHdr, num_buffers), NUM_BUFFERS_AT);

const NUM_BUFFERS_AT: usize = 10;

impl VirtioNetHdr {
    /// The header in `bytes`. Any bytes are a header.
    #[inline]
    pub const fn from_bytes(bytes: &[u8; LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: Le16([h0, h1]),
            gso_size: Le16([g0, g1]),
            csum_start: Le16([s0, s1]),
            csum_offset: Le16([o0, o1]),
            num_buffers: Le16([n0, n1]),
        }
    }

    /// The bytes of this header.
    #[inline]
    pub const fn to_bytes(self) -> [u8; LEN] {
        let Le16([h0, h1]) = self.hdr_len;
        let Le16([g0, g1]) = self.gso_size;
        let Le16([s0, s1]) = self.csum_start;
        let Le16([o0, o1]) = self.csum_offset;
        let Le16([n0, n1]) = self.num_buffers;
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
    }
}

/// What is known about the transport checksum, and what is left to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Checksum {
    /// There is nothing to complete. On a packet to send, the checksum is complete. On a received
    /// packet, nobody has verified it.
    #[default]
    Complete,
    /// The checksum field holds only the sum of the pseudo header. To complete it, sum from `start`
    /// to the packet's end, and put the result `offset` bytes after `start`.
    ///
    /// On a received packet this also says that there is nothing to verify, because the packet has
    /// not been on a wire.
    Partial {
        /// Where the sum begins, counted from the packet's first byte.
        start: u16,
        /// Where the result goes, counted from `start`: 16 for TCP, 6 for UDP.
        offset: u16,
    },
    /// The checksum has been verified (if several are encapsulated, one of them). Only on received
    /// packets.
    DataValid,
}

/// How to cut a packet that is larger than the MTU: generic segmentation offload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Gso {
    /// Not at all.
    #[default]
    None,
    /// TCP over IPv4, into TCP segments (TSO).
    TcpV4,
    /// TCP over IPv6, into TCP segments (TSO).
    TcpV6,
    /// One UDP datagram, into IP fragments (UFO). Legacy: newer systems do not offer it.
    Udp,
    /// UDP over IPv4 or IPv6, into UDP datagrams of equal size (USO).
    UdpL4,
}

impl Gso {
    /// Whether the packet is TCP.
    #[inline]
    pub const fn is_tcp(self) -> bool {
        matches!(self, Gso::TcpV4 | Gso::TcpV6)
    }

    const fn to_wire(self) -> u8 {
        match self {
            Gso::None => GSO_NONE,
            Gso::TcpV4 => GSO_TCPV4,
            Gso::TcpV6 => GSO_TCPV6,
            Gso::Udp => GSO_UDP,
            Gso::UdpL4 => GSO_UDP_L4,
        }
    }

    /// For the transport header of a packet to cut: the length of its fixed part, and the
    /// checksum's offset in it.
    const fn transport(self) -> Option<(u16, u16)> {
        match self {
            Gso::None => None,
            Gso::TcpV4 | Gso::TcpV6 => Some((20, 16)),
            Gso::Udp | Gso::UdpL4 => Some((8, 6)),
        }
    }
}

/// The header's meaning. See the [module](self) for an example.
///
/// The default, [`NONE`](Self::NONE), is the header of a plain packet: 12 zero bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OffloadHeader {
    /// The state of the checksum.
    pub checksum: Checksum,
    /// Whether and how to cut the packet.
    pub gso: Gso,
    /// The packet is TCP with its congestion bits (ECN) set. The code that cuts it must respect
    /// them.
    pub ecn: bool,
    /// Bytes of payload in each segment but the last (MSS). Has no meaning if `gso` is
    /// [`Gso::None`].
    pub segment_size: u16,
    /// Bytes of headers, from Ethernet to transport, in front of the payload; 0 if not said. A hint
    /// about how much to keep in one piece. Never rely on it (5.1.6.2.2: "the device MUST NOT rely
    /// on hdr_len to be correct").
    pub header_len: u16,
    /// The number of buffers that the packet is spread over: 1 on packets that a guest receives, 0
    /// on packets to send.
    pub num_buffers: u16,
}

impl OffloadHeader {
    /// The header of a plain packet: nothing to complete, nothing to cut.
    pub const NONE: Self = Self {
        checksum: Checksum::Complete,
        gso: Gso::None,
        ecn: false,
        segment_size: 0,
        header_len: 0,
        num_buffers: 0,
    };

    /// Reads a header. Does not check it against a packet; [`validate`](Self::validate) does.
    ///
    /// `csum_start` and `csum_offset` are dropped unless [`F_NEEDS_CSUM`] is set, because without
    /// that flag they must not be used. If [`F_DATA_VALID`] is set as well, it is dropped, because
    /// a partial checksum needs no verifying.
    ///
    /// # Errors
    ///
    /// [`ReservedFlags`](OffloadError::ReservedFlags),
    /// [`CoalescingInfo`](OffloadError::CoalescingInfo),
    /// [`UnknownGsoType`](OffloadError::UnknownGsoType).
    #[inline]
    pub fn parse(bytes: &[u8; LEN]) -> Result<Self, OffloadError> {
        let raw = VirtioNetHdr::from_bytes(bytes);
        let reserved = raw.flags & !(F_NEEDS_CSUM | F_DATA_VALID | F_RSC_INFO);
        if reserved != 0 {
            return Err(OffloadError::ReservedFlags { flags: reserved });
        }
        Self::from_raw(raw)
    }

    /// Reads a header like [`parse`](Self::parse), but ignores reserved flags.
    ///
    /// The specification requires this of both sides (5.1.6.2.2 and 5.1.6.4.2: "MUST ignore flag
    /// bits that it does not recognize"), so a VMM that reads a guest's headers should use it.
    /// [`write`](Self::write) does not write these bits, so nobody further on sees them.
    ///
    /// # Errors
    ///
    /// [`CoalescingInfo`](OffloadError::CoalescingInfo),
    /// [`UnknownGsoType`](OffloadError::UnknownGsoType).
    #[inline]
    pub fn parse_ignoring_reserved(bytes: &[u8; LEN]) -> Result<Self, OffloadError> {
        Self::from_raw(VirtioNetHdr::from_bytes(bytes))
    }

    #[inline]
    fn from_raw(raw: VirtioNetHdr) -> Result<Self, OffloadError> {
        if raw.flags & F_RSC_INFO != 0 {
            return Err(OffloadError::CoalescingInfo);
        }
        let checksum = if raw.flags & F_NEEDS_CSUM != 0 {
            Checksum::Partial { start: raw.csum_start.get(), offset: raw.csum_offset.get() }
        } else if raw.flags & F_DATA_VALID != 0 {
            Checksum::DataValid
        } else {
            Checksum::Complete
        };
        let gso = match raw.gso_type & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCPV4 => Gso::TcpV4,
            GSO_TCPV6 => Gso::TcpV6,
            GSO_UDP => Gso::Udp,
            GSO_UDP_L4 => Gso::UdpL4,
            gso_type => return Err(OffloadError::UnknownGsoType { gso_type }),
        };
        Ok(Self {
            checksum,
            gso,
            ecn: raw.gso_type & GSO_ECN != 0,
            segment_size: raw.gso_size.get(),
            header_len: raw.hdr_len.get(),
            num_buffers: raw.num_buffers.get(),
        })
    }

    /// Writes the header over all of `bytes`, so that nothing stale is left. [`parse`](Self::parse)
    /// of these bytes gives this header again.
    #[inline]
    pub const fn write(&self, bytes: &mut [u8; LEN]) {
        *bytes = self.to_raw().to_bytes();
    }

    /// The header as it is in memory.
    #[inline]
    pub const fn to_raw(&self) -> VirtioNetHdr {
        let (flags, start, offset) = match self.checksum {
            Checksum::Complete => (0, 0, 0),
            Checksum::Partial { start, offset } => (F_NEEDS_CSUM, start, offset),
            Checksum::DataValid => (F_DATA_VALID, 0, 0),
        };
        VirtioNetHdr {
            flags,
            gso_type: self.gso.to_wire() | if self.ecn { GSO_ECN } else { 0 },
            hdr_len: Le16::new(self.header_len),
            gso_size: Le16::new(self.segment_size),
            csum_start: Le16::new(start),
            csum_offset: Le16::new(offset),
            num_buffers: Le16::new(self.num_buffers),
        }
    }

    /// Whether the packet can go on a wire as it is: there is nothing to complete and nothing to
    /// cut.
    #[inline]
    pub const fn is_plain(&self) -> bool {
        matches!(self.gso, Gso::None) && !matches!(self.checksum, Checksum::Partial { .. })
    }

    /// Checks the header against the length of its packet, `packet_len` bytes without the header.
    /// Does not look at the packet's bytes.
    ///
    /// `header_len` is only a hint, so a value that is too small, or 0, passes. A value beyond the
    /// packet's end does not pass: it means nothing, and Linux's TAP answers such a write with
    /// `EINVAL`.
    ///
    /// # Errors
    ///
    /// The first broken rule: any [`OffloadError`] except those that only `parse`, `trim_front` and
    /// `grow_front` give.
    pub fn validate(&self, packet_len: usize) -> Result<(), OffloadError> {
        // 32 bits hold the sum of three 16-bit fields. A longer packet passes every check.
        let len = u32::try_from(packet_len).unwrap_or(u32::MAX);
        let end = |start: u16, n: u32| u32::from(start) + n;

        if let Checksum::Partial { start, offset } = self.checksum {
            if usize::from(start) < ETHERNET_HEADER_LEN {
                return Err(OffloadError::ChecksumStartInEthernet { start });
            }
            if end(start, u32::from(offset) + 2) > len {
                return Err(OffloadError::ChecksumPastEnd { start, offset, packet_len });
            }
        }
        if let Some((transport_len, field)) = self.gso.transport() {
            let Checksum::Partial { start, offset } = self.checksum else {
                return Err(OffloadError::GsoWithoutChecksum);
            };
            if offset != field {
                return Err(OffloadError::GsoChecksumOffset { offset, expected: field });
            }
            if end(start, transport_len.into()) > len {
                return Err(OffloadError::TransportPastEnd { start, packet_len });
            }
            if self.segment_size == 0 || self.segment_size == SEGMENT_SIZE_BY_FRAGS {
                return Err(OffloadError::SegmentSize { size: self.segment_size });
            }
        }
        if self.ecn && !self.gso.is_tcp() {
            return Err(OffloadError::EcnWithoutTcp);
        }
        if u32::from(self.header_len) > len {
            return Err(OffloadError::HeaderLenPastEnd { header_len: self.header_len, packet_len });
        }
        Ok(())
    }

    /// The header for the same packet without its first `n` bytes. Positions are adjusted, so that
    /// they name the same bytes.
    ///
    /// `header_len` shrinks by `n`, but not below 0 ("not said"). [`Checksum::DataValid`] becomes
    /// [`Checksum::Complete`] (to be verified), because it may have been about a checksum in the
    /// removed bytes.
    ///
    /// # Errors
    ///
    /// [`TrimPastChecksumStart`](OffloadError::TrimPastChecksumStart) if bytes that a partial
    /// checksum covers would be removed. [`GsoWithoutChecksum`](OffloadError::GsoWithoutChecksum)
    /// if the packet is to be cut, but the header does not say where its transport header is.
    pub fn trim_front(&self, n: usize) -> Result<Self, OffloadError> {
        if n == 0 {
            return Ok(*self);
        }
        let checksum = match self.checksum {
            Checksum::Partial { start, offset } => {
                let start = u16::try_from(n)
                    .ok()
                    .and_then(|n| start.checked_sub(n))
                    .ok_or(OffloadError::TrimPastChecksumStart { trim: n, start })?;
                Checksum::Partial { start, offset }
            }
            _ if self.gso != Gso::None => return Err(OffloadError::GsoWithoutChecksum),
            Checksum::DataValid | Checksum::Complete => Checksum::Complete,
        };
        let header_len = self.header_len.saturating_sub(u16::try_from(n).unwrap_or(u16::MAX));
        Ok(Self { checksum, header_len, ..*self })
    }

    /// The header for the same packet with `n` more bytes in front.
    ///
    /// # Errors
    ///
    /// [`ChecksumStartTooFar`](OffloadError::ChecksumStartTooFar) if a position no longer fits in
    /// its field.
    pub fn grow_front(&self, n: usize) -> Result<Self, OffloadError> {
        let further = |at: u16| u16::try_from(n).ok().and_then(|n| at.checked_add(n));
        let checksum = match self.checksum {
            Checksum::Partial { start, offset } => {
                let start =
                    further(start).ok_or(OffloadError::ChecksumStartTooFar { grow: n, start })?;
                Checksum::Partial { start, offset }
            }
            other => other,
        };
        // This is only a hint. 0 stays 0, which means "not said".
        let header_len =
            if self.header_len == 0 { 0 } else { further(self.header_len).unwrap_or(0) };
        Ok(Self { checksum, header_len, ..*self })
    }

    /// The header for a packet that a guest receives: `num_buffers` is 1. TAP delivers 0, but
    /// 5.1.6.4.1 requires 1 unless mergeable buffers are negotiated.
    #[inline]
    #[must_use]
    pub const fn for_guest(self) -> Self {
        Self { num_buffers: 1, ..self }
    }

    /// The header for forwarding a received packet: `num_buffers` is 0, and [`Checksum::DataValid`]
    /// is replaced, because no sender may claim it (5.1.6.2.1).
    #[inline]
    #[must_use]
    pub const fn for_sending(self) -> Self {
        let checksum = match self.checksum {
            Checksum::DataValid => Checksum::Complete,
            other => other,
        };
        Self { checksum, num_buffers: 0, ..self }
    }
}

/// Sets `num_buffers` of a header in place, without looking at the rest. The read path does this,
/// with 1, to every header that TAP delivers.
#[inline]
pub const fn set_num_buffers(header: &mut [u8; LEN], num_buffers: u16) {
    [header[NUM_BUFFERS_AT], header[NUM_BUFFERS_AT + 1]] = num_buffers.to_le_bytes();
}

/// The work that a device does for a guest. An offload is off unless it was negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Offloads {
    /// Checksums: the device completes a partial one.
    pub checksum: bool,
    /// TCP segmentation over IPv4: the device cuts a large packet into segments.
    pub tso4: bool,
    /// TCP segmentation over IPv6: the device cuts a large packet into segments.
    pub tso6: bool,
    /// UDP segmentation: the device cuts a large packet into datagrams.
    pub uso: bool,
    /// Each packet has a 12-byte `virtio_net_hdr` in front. This is a format rather than an
    /// offload; the header says which work is left.
    pub virtio_header: bool,
}

impl Offloads {
    /// All offloads.
    pub const ALL: Self =
        Self { checksum: true, tso4: true, tso6: true, uso: true, virtio_header: true };
}

/// The offloads that both operands have.
impl BitAnd for Offloads {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self {
            checksum: self.checksum && other.checksum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            uso: self.uso && other.uso,
            virtio_header: self.virtio_header && other.virtio_header,
        }
    }
}

/// The rule that a header breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OffloadError {
    /// The header has flags set that virtio 1.2 does not define.
    ReservedFlags {
        /// Those flags.
        flags: u8,
    },
    /// [`F_RSC_INFO`] is set. It belongs to a feature (`VIRTIO_NET_F_RSC_EXT`) that neither TAP nor
    /// vmnet has, and no sender may set it (5.1.6.2.1).
    CoalescingInfo,
    /// Virtio 1.2 does not define this `gso_type`.
    UnknownGsoType {
        /// The type, without [`GSO_ECN`].
        gso_type: u8,
    },
    /// The checksum would begin in the Ethernet header, which no checksum covers.
    ChecksumStartInEthernet {
        /// Where it would begin.
        start: u16,
    },
    /// The two bytes of the checksum are not all in the packet.
    ChecksumPastEnd {
        /// `csum_start`.
        start: u16,
        /// `csum_offset`.
        offset: u16,
        /// The packet's length.
        packet_len: usize,
    },
    /// The packet is to be cut, but has no partial checksum (5.1.6.2.1: "the driver MUST also set
    /// the VIRTIO_NET_HDR_F_NEEDS_CSUM bit").
    GsoWithoutChecksum,
    /// The packet is to be cut, but its checksum is not where its transport protocol has it.
    GsoChecksumOffset {
        /// Where the header says it is in the transport header.
        offset: u16,
        /// Where it should be.
        expected: u16,
    },
    /// The packet is to be cut, but its transport header is not all in the packet.
    TransportPastEnd {
        /// Where it begins.
        start: u16,
        /// The packet's length.
        packet_len: usize,
    },
    /// A packet cannot be cut into segments of 0 bytes. Linux refuses 65,535, which it uses for
    /// something else (`GSO_BY_FRAGS`).
    SegmentSize {
        /// 0 or 65,535.
        size: u16,
    },
    /// The ECN bit is set, but the packet is not a TCP packet to cut.
    EcnWithoutTcp,
    /// The header says that the packet's headers are longer than the packet.
    HeaderLenPastEnd {
        /// `hdr_len`.
        header_len: u16,
        /// The packet's length.
        packet_len: usize,
    },
    /// Growing would move the start of the checksummed part beyond what its field can hold.
    ChecksumStartTooFar {
        /// The bytes to add in front.
        grow: usize,
        /// Where the checksummed part begins.
        start: u16,
    },
    /// Trimming would remove bytes that a partial checksum covers.
    TrimPastChecksumStart {
        /// The bytes to trim.
        trim: usize,
        /// Where the checksummed part begins.
        start: u16,
    },
}

impl fmt::Display for OffloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ReservedFlags { flags } => {
                write!(f, "the offload header has reserved flags set ({flags:#04x})")
            }
            Self::CoalescingInfo => f.write_str(
                "the offload header carries coalescing information, which is not supported",
            ),
            Self::UnknownGsoType { gso_type } => {
                write!(f, "the offload header has the unknown segmentation type {gso_type}")
            }
            Self::ChecksumStartInEthernet { start } => {
                write!(f, "the checksum would begin at byte {start}, inside the Ethernet header")
            }
            Self::ChecksumPastEnd { start, offset, packet_len } => write!(
                f,
                "the checksum at {start} + {offset} is outside the packet of {packet_len} bytes"
            ),
            Self::GsoWithoutChecksum => {
                f.write_str("a packet to be segmented must have a partial checksum")
            }
            Self::GsoChecksumOffset { offset, expected } => write!(
                f,
                "the checksum of a packet to be segmented lies at byte {offset} of its transport \
                 header instead of {expected}"
            ),
            Self::TransportPastEnd { start, packet_len } => write!(
                f,
                "the transport header at {start} does not fit in the packet of {packet_len} bytes"
            ),
            Self::SegmentSize { size } => {
                write!(f, "a packet cannot be cut into segments of {size} bytes")
            }
            Self::EcnWithoutTcp => {
                f.write_str("the ECN bit is set on a packet that is not TCP to be segmented")
            }
            Self::HeaderLenPastEnd { header_len, packet_len } => write!(
                f,
                "the headers are said to have {header_len} bytes in a packet of {packet_len} bytes"
            ),
            Self::ChecksumStartTooFar { grow, start } => write!(
                f,
                "{grow} more bytes in front would move the checksummed part, which begins at \
                 {start}, beyond 65,535"
            ),
            Self::TrimPastChecksumStart { trim, start } => write!(
                f,
                "trimming {trim} bytes would cut into the checksummed part, which begins at {start}"
            ),
        }
    }
}

impl core::error::Error for OffloadError {}
