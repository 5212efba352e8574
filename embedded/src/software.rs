//! Offloads in software: completes a checksum, and cuts a large packet into segments.
//!
//! A packet with an [`OffloadHeader`] comes from a device or a guest that left work to others. If
//! it is to go to a device that was started with fewer [`Offloads`], [`left_by`] says which work is
//! missing. [`complete_checksum`] completes the checksum in place. [`Segments`] writes one segment
//! at a time into memory of the caller. Nothing here allocates.
//!
//! ```
//! use vmring_core::offload::{Checksum, Gso, OffloadHeader, Offloads};
//! use vmring_embedded::software::{self, Left, Segments};
//!
//! # fn packet() -> Vec<u8> {
//! #     let mut p = vec![0; 54 + 4000];
//! #     p[12..18].copy_from_slice(&[8, 0, 0x45, 0, 15, 200]); // 4,040 bytes of IPv4
//! #     p[23] = 6;
//! #     p[46] = 5 << 4;
//! #     p
//! # }
//! // 4,000 bytes of TCP over IPv4, to be sent as segments of 1,460 bytes.
//! let packet: Vec<u8> = packet();
//! let header = OffloadHeader {
//!     checksum: Checksum::Partial { start: 34, offset: 16 },
//!     gso: Gso::TcpV4,
//!     segment_size: 1460,
//!     ..OffloadHeader::NONE
//! };
//! assert_eq!(software::left_by(&Offloads::default(), &header), Left::Segments { partial: false });
//!
//! let segments = Segments::new(&header, &packet)?;
//! let mut frame = [0; 1514];
//! let lens: Result<Vec<_>, _> = (0..segments.count()).map(|i| segments.write(i, &mut frame)).collect();
//! assert_eq!(lens?, [54 + 1460, 54 + 1460, 54 + 1080]);
//! # Ok::<(), software::SoftwareError>(())
//! ```
//!
//! A guest may send anything, and nothing malformed is passed on. An offload header that does not
//! describe its packet, a length field that disagrees with the packet, and a fragment are
//! [`SoftwareError`]s. Each segment has the packet's Ethernet header, VLAN tags, IP options and
//! IPv6 extension headers.
//!
//! Sources: RFC 1071 for the checksum. Linux's `net/ipv4/tcp_offload.c` (`tcp_gso_segment`) and
//! `net/ipv4/udp_offload.c` (`__udp_gso_segment`) for which fields of a segment are copied and
//! which are counted up.

use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6ExtHeader, Ipv6Packet, TcpPacket,
    UdpPacket,
};
use thiserror::Error as ThisError;
use vmring_core::offload::{Checksum, Gso, OffloadError, OffloadHeader, Offloads};

/// The EtherTypes of a VLAN tag (IEEE 802.1Q and 802.1ad), and the length of a tag in bytes.
const VLAN_TAGS: [u16; 2] = [0x8100, 0x88a8];
const VLAN_TAG_LEN: usize = 4;
/// The offset of the checksum in a TCP header and in a UDP header.
const TCP_CHECKSUM_AT: usize = 16;
const UDP_CHECKSUM_AT: usize = 6;
const UDP_HEADER_LEN: usize = 8;

/// The work that is left for software; see [`left_by`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Left {
    /// Nothing.
    Nothing,
    /// The checksum is to be completed: [`complete_checksum`].
    Checksum,
    /// The packet is to be cut into segments: [`Segments`].
    Segments {
        /// Whether the receiver completes checksums. If it does, the segments may have
        /// [partial](Segments::write_partial) ones, which costs less.
        partial: bool,
    },
}

/// Returns the work for a packet with this header that is left by a receiver with these `offloads`.
pub fn left_by(offloads: &Offloads, header: &OffloadHeader) -> Left {
    let cuts = match header.gso {
        Gso::None => true,
        Gso::TcpV4 => offloads.tso4,
        Gso::TcpV6 => offloads.tso6,
        Gso::UdpL4 => offloads.uso,
        Gso::Udp => false,
    };
    // Without an offload header the receiver would not know that a checksum is partial.
    let completes = offloads.virtio_header && offloads.checksum;
    match header.gso {
        Gso::None if header.is_plain() || completes => Left::Nothing,
        Gso::None => Left::Checksum,
        _ if cuts && completes => Left::Nothing,
        _ => Left::Segments { partial: completes },
    }
}

/// Why a checksum could not be completed or a packet not be cut. Drop such a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ThisError)]
#[non_exhaustive]
pub enum SoftwareError {
    /// The offload header does not describe the packet.
    #[error(transparent)]
    Offload(#[from] OffloadError),
    /// The offload header asks for IP fragments ([`Gso::Udp`], legacy "UFO"), which this module
    /// does not make.
    #[error("cutting a UDP datagram into IP fragments is not supported")]
    FragmentsNotSupported,
    /// The offload header asks for no segments ([`Gso::None`]).
    #[error("the packet's offload header asks for no segments")]
    NotToBeCut,
    /// The packet is to be cut into segments, each of which has a checksum. The packet's own means
    /// nothing.
    #[error("the packet must be cut into segments, which have a checksum each")]
    ToBeCut,
    /// The protocol behind the Ethernet header and its VLAN tags is not the one that the offload
    /// header names.
    #[error("the packet's EtherType is {ethertype:#06x}, but its offload header says otherwise")]
    NotThatIp {
        /// The EtherType.
        ethertype: u16,
    },
    /// A header is truncated, or has an invalid version or length.
    #[error("the packet's {what} header is cut short or malformed")]
    Malformed {
        /// Which header.
        what: &'static str,
    },
    /// A length field disagrees with the packet. Those of the segments would be derived from it.
    #[error("the {what} header says {said} bytes, but the packet has {is}")]
    Length {
        /// Which header.
        what: &'static str,
        /// The length that the field says, in bytes.
        said: usize,
        /// The length that the packet has, in bytes.
        is: usize,
    },
    /// The packet is an IP fragment.
    #[error("an IP fragment cannot be cut into segments")]
    Fragment,
    /// The transport protocol in the IP header is not the one that the offload header names.
    #[error("the packet's IP protocol is {protocol}, but its offload header says otherwise")]
    NotThatTransport {
        /// The IP protocol's number.
        protocol: u8,
    },
    /// The part of the packet that the checksum covers does not begin at the transport header.
    #[error("the checksum starts at {said}, but the transport header is at {is}")]
    TransportAt {
        /// Where it begins, by the offload header's `csum_start`.
        said: u16,
        /// Where the transport header is.
        is: usize,
    },
    /// The packet has SYN, RST or URG, which cannot be repeated in each segment.
    #[error("a TCP packet with SYN, RST or URG cannot be cut into segments")]
    TcpFlags,
    /// The packet has no segment of this number.
    #[error("there is no segment {index}: the packet has {count}, counted from 0")]
    NoSuchSegment {
        /// The number that was asked for, counted from 0.
        index: usize,
        /// How many segments the packet has.
        count: usize,
    },
    /// The segment does not fit into the buffer.
    #[error("the segment has {needed} bytes, but the buffer has {available}")]
    Space {
        /// The segment's length in bytes.
        needed: usize,
        /// The buffer's length in bytes.
        available: usize,
    },
}

/// The sum of `start` and `bytes` as the Internet checksum has it (RFC 1071), folded to 16 bits and
/// not complemented.
fn sum(start: u16, bytes: &[u8]) -> u16 {
    // Add four bytes at a time, in the machine's byte order. The order does not matter, except that
    // the bytes of the result are swapped at the end (RFC 1071, 2B).
    let mut words = bytes.chunks_exact(4);
    let mut total = u64::from(start.to_be());
    for word in &mut words {
        total += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut last = [0; 4];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::from_be(total as u16)
}

/// Writes the checksum of `part` into its field, which is at offset `field` and holds the sum of
/// the pseudo header.
fn complete(part: &mut [u8], field: usize) {
    // In UDP a 0 means that there is no checksum. Everywhere else 0 and 0xffff are the same number.
    let sum = match !sum(0, part) {
        0 => 0xffff,
        sum => sum,
    };
    part[field..][..2].copy_from_slice(&sum.to_be_bytes());
}

/// Completes a partial checksum in the packet, and returns the header that describes the packet
/// afterwards. A complete checksum stays as it is.
///
/// # Errors
///
/// [`SoftwareError::Offload`] if the header does not describe the packet;
/// [`SoftwareError::ToBeCut`] if the packet is to be cut into segments. In both cases the packet
/// has not changed.
pub fn complete_checksum(
    header: &OffloadHeader,
    packet: &mut [u8],
) -> Result<OffloadHeader, SoftwareError> {
    header.validate(packet.len())?;
    if header.gso != Gso::None {
        return Err(SoftwareError::ToBeCut);
    }
    if let Checksum::Partial { start, offset } = header.checksum {
        complete(&mut packet[start.into()..], offset.into());
        return Ok(OffloadHeader { checksum: Checksum::Complete, ..*header });
    }
    Ok(*header)
}

/// Cuts one packet into segments. See the [module](self) for an example.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    packet: &'a [u8],
    is_v4: bool,
    is_tcp: bool,
    /// The offsets of the IP header, the transport header and the payload.
    ip: usize,
    transport: usize,
    payload: usize,
    segment_size: usize,
    count: usize,
    /// The sum of the pseudo header without the length.
    pseudo: u16,
}

/// What the headers in front of the transport header say.
struct Ip {
    transport: usize,
    protocol: IpProtocol,
    /// The sum of the addresses of the pseudo header. `None` if the destination in the IP header is
    /// not the final one (an IPv6 routing header).
    addresses: Option<u16>,
}

impl<'a> Segments<'a> {
    /// Checks the packet and its header, and prepares to cut the packet.
    ///
    /// # Errors
    ///
    /// Every error but [`NoSuchSegment`](SoftwareError::NoSuchSegment),
    /// [`Space`](SoftwareError::Space) and [`ToBeCut`](SoftwareError::ToBeCut).
    pub fn new(header: &OffloadHeader, packet: &'a [u8]) -> Result<Self, SoftwareError> {
        header.validate(packet.len())?;
        let (is_v4, is_tcp) = match header.gso {
            Gso::None => return Err(SoftwareError::NotToBeCut),
            Gso::Udp => return Err(SoftwareError::FragmentsNotSupported),
            Gso::TcpV4 => (Some(true), true),
            Gso::TcpV6 => (Some(false), true),
            Gso::UdpL4 => (None, false),
        };
        let Checksum::Partial { start, .. } = header.checksum else {
            return Err(OffloadError::GsoWithoutChecksum.into());
        };
        let (ip, ethertype) = behind_ethernet(packet)?;
        let found_v4 = match ethertype {
            EthernetProtocol::Ipv4 => true,
            EthernetProtocol::Ipv6 => false,
            other => return Err(SoftwareError::NotThatIp { ethertype: other.into() }),
        };
        if is_v4.is_some_and(|wanted| wanted != found_v4) {
            return Err(SoftwareError::NotThatIp { ethertype: ethertype.into() });
        }
        let Ip { transport, protocol, addresses } =
            if found_v4 { ipv4(packet, ip)? } else { ipv6(packet, ip)? };
        let wanted = if is_tcp { IpProtocol::Tcp } else { IpProtocol::Udp };
        if protocol != wanted {
            return Err(SoftwareError::NotThatTransport { protocol: protocol.into() });
        }
        if usize::from(start) != transport {
            return Err(SoftwareError::TransportAt { said: start, is: transport });
        }

        let datagram = &packet[transport..];
        let (header_len, flagged, field) = if is_tcp { tcp(datagram)? } else { udp(datagram)? };
        let payload = transport + header_len;
        let segment_size = usize::from(header.segment_size);
        let count = (packet.len() - payload).div_ceil(segment_size).max(1);
        if flagged && count > 1 {
            return Err(SoftwareError::TcpFlags);
        }
        let protocol = u16::from(u8::from(protocol));
        let pseudo = match addresses {
            Some(addresses) => sum(addresses, &protocol.to_be_bytes()),
            // Only the sender knows the final address. Its sum is in the checksum field; subtract
            // the length from it. (`ipv6` has checked that the length fits.)
            None => sum(field, &(!(datagram.len() as u16)).to_be_bytes()),
        };
        Ok(Self {
            packet,
            is_v4: found_v4,
            is_tcp,
            ip,
            transport,
            payload,
            segment_size,
            count,
            pseudo,
        })
    }

    /// Returns the number of segments, which is at least 1.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns the length of the longest segment, in bytes.
    pub fn len_max(&self) -> usize {
        self.packet.len().min(self.payload + self.segment_size)
    }

    /// Returns the offload header of every segment that [`write_partial`](Self::write_partial)
    /// writes.
    pub fn partial_header(&self) -> OffloadHeader {
        let (start, offset) = (self.transport as u16, self.checksum_at() as u16);
        let checksum = Checksum::Partial { start, offset };
        OffloadHeader { checksum, ..OffloadHeader::NONE }
    }

    /// Writes segment `index` (from 0) to the front of `out`, with all checksums, and returns its
    /// length in bytes.
    ///
    /// # Errors
    ///
    /// [`SoftwareError::NoSuchSegment`] if `index` is not below [`count`](Self::count);
    /// [`SoftwareError::Space`] if `out` is too short. In both cases `out` has not changed.
    pub fn write(&self, index: usize, out: &mut [u8]) -> Result<usize, SoftwareError> {
        let len = self.write_partial(index, out)?;
        complete(&mut out[self.transport..len], self.checksum_at());
        Ok(len)
    }

    /// Writes segment `index` like [`write`](Self::write), but with a partial transport checksum,
    /// which the receiver completes. Send the [`partial_header`](Self::partial_header) with it.
    ///
    /// # Errors
    ///
    /// The errors of [`write`](Self::write).
    pub fn write_partial(&self, index: usize, out: &mut [u8]) -> Result<usize, SoftwareError> {
        let count = self.count;
        if index >= count {
            return Err(SoftwareError::NoSuchSegment { index, count });
        }
        let begin = index * self.segment_size;
        let payload = &self.packet[self.payload + begin..];
        let payload = &payload[..payload.len().min(self.segment_size)];
        let needed = self.payload + payload.len();
        let available = out.len();
        let out = out.get_mut(..needed).ok_or(SoftwareError::Space { needed, available })?;
        let (headers, rest) = out.split_at_mut(self.payload);
        headers.copy_from_slice(&self.packet[..self.payload]);
        rest.copy_from_slice(payload);

        // The casts do not truncate: a segment's lengths are no larger than the packet's own, which
        // fit.
        let ip_len = needed - self.ip;
        let len = (needed - self.transport) as u16;
        if self.is_v4 {
            let mut ip = Ipv4Packet::new_unchecked(&mut headers[self.ip..self.transport]);
            let ident = ip.ident();
            ip.set_total_len(ip_len as u16);
            ip.set_ident(ident.wrapping_add(index as u16));
            ip.fill_checksum();
        } else {
            let mut ip = Ipv6Packet::new_unchecked(&mut headers[self.ip..self.transport]);
            ip.set_payload_len((ip_len - IPV6_HEADER_LEN) as u16);
        }
        let pseudo = sum(self.pseudo, &len.to_be_bytes());
        let transport = &mut headers[self.transport..];
        if self.is_tcp {
            let mut tcp = TcpPacket::new_unchecked(transport);
            let (first, last) = (index == 0, index + 1 == count);
            let sequence = tcp.seq_number();
            tcp.set_seq_number(sequence + begin);
            tcp.set_fin(last && tcp.fin());
            tcp.set_psh(last && tcp.psh());
            tcp.set_cwr(first && tcp.cwr());
            tcp.set_checksum(pseudo);
        } else {
            let mut udp = UdpPacket::new_unchecked(transport);
            udp.set_len(len);
            udp.set_checksum(pseudo);
        }
        Ok(needed)
    }

    fn checksum_at(&self) -> usize {
        if self.is_tcp { TCP_CHECKSUM_AT } else { UDP_CHECKSUM_AT }
    }
}

/// Returns the offset behind the Ethernet header and its VLAN tags, and the EtherType of what is
/// there.
fn behind_ethernet(packet: &[u8]) -> Result<(usize, EthernetProtocol), SoftwareError> {
    let ethernet = EthernetFrame::new_checked(packet)
        .map_err(|_| SoftwareError::Malformed { what: "Ethernet" })?;
    let mut at = EthernetFrame::<&[u8]>::header_len();
    let mut ethertype = ethernet.ethertype();
    while VLAN_TAGS.contains(&ethertype.into()) {
        let tag = packet.get(at..at + VLAN_TAG_LEN);
        let tag = tag.ok_or(SoftwareError::Malformed { what: "VLAN" })?;
        ethertype = u16::from_be_bytes([tag[2], tag[3]]).into();
        at += VLAN_TAG_LEN;
    }
    Ok((at, ethertype))
}

fn length(what: &'static str, said: usize, is: usize) -> Result<(), SoftwareError> {
    if said == is { Ok(()) } else { Err(SoftwareError::Length { what, said, is }) }
}

const IPV4_HEADER_LEN: usize = smoltcp::wire::IPV4_HEADER_LEN;
const IPV6_HEADER_LEN: usize = smoltcp::wire::IPV6_HEADER_LEN;

fn ipv4(packet: &[u8], at: usize) -> Result<Ip, SoftwareError> {
    let malformed = SoftwareError::Malformed { what: "IPv4" };
    let bytes = &packet[at..];
    if bytes.len() < IPV4_HEADER_LEN {
        return Err(malformed);
    }
    let ip = Ipv4Packet::new_unchecked(bytes);
    length("IPv4", ip.total_len().into(), bytes.len())?;
    let header_len = usize::from(ip.header_len());
    if ip.version() != 4 || header_len < IPV4_HEADER_LEN || header_len > bytes.len() {
        return Err(malformed);
    }
    if ip.more_frags() || ip.frag_offset() != 0 {
        return Err(SoftwareError::Fragment);
    }
    let addresses = sum(sum(0, &ip.src_addr().octets()), &ip.dst_addr().octets());
    let (transport, protocol) = (at + header_len, ip.next_header());
    Ok(Ip { transport, protocol, addresses: Some(addresses) })
}

fn ipv6(packet: &[u8], at: usize) -> Result<Ip, SoftwareError> {
    let bytes = &packet[at..];
    let malformed = SoftwareError::Malformed { what: "IPv6" };
    if bytes.len() < IPV6_HEADER_LEN {
        return Err(malformed);
    }
    let ip = Ipv6Packet::new_unchecked(bytes);
    length("IPv6", ip.total_len(), bytes.len())?;
    if ip.version() != 6 {
        return Err(malformed);
    }
    let mut addresses = Some(sum(sum(0, &ip.src_addr().octets()), &ip.dst_addr().octets()));
    let mut protocol = ip.next_header();
    let mut transport = at + IPV6_HEADER_LEN;
    loop {
        match protocol {
            IpProtocol::HopByHop | IpProtocol::Ipv6Opts | IpProtocol::Ipv6Route => {}
            IpProtocol::Ipv6Frag => return Err(SoftwareError::Fragment),
            _ => return Ok(Ip { transport, protocol, addresses }),
        }
        let extension = Ipv6ExtHeader::new_checked(&packet[transport..])
            .map_err(|_| SoftwareError::Malformed { what: "IPv6 extension" })?;
        // The payload of a routing header begins with its type and the number of addresses that are
        // left (RFC 8200, 4.4).
        let rest = extension.payload();
        if protocol == IpProtocol::Ipv6Route && rest[1] > 0 {
            addresses = None;
        }
        transport += 2 + rest.len();
        protocol = extension.next_header();
    }
}

/// Returns the length of the TCP header, whether its flags forbid segments, and its checksum field.
fn tcp(datagram: &[u8]) -> Result<(usize, bool, u16), SoftwareError> {
    let tcp =
        TcpPacket::new_checked(datagram).map_err(|_| SoftwareError::Malformed { what: "TCP" })?;
    let flagged = tcp.syn() || tcp.rst() || tcp.urg();
    Ok((tcp.header_len().into(), flagged, tcp.checksum()))
}

/// Returns the length of the UDP header, false because it has no flags, and its checksum field.
fn udp(datagram: &[u8]) -> Result<(usize, bool, u16), SoftwareError> {
    if datagram.len() < UDP_HEADER_LEN {
        return Err(SoftwareError::Malformed { what: "UDP" });
    }
    let udp = UdpPacket::new_unchecked(datagram);
    length("UDP", udp.len().into(), datagram.len())?;
    Ok((UDP_HEADER_LEN, false, udp.checksum()))
}
