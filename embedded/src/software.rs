//! Offloads in software: completes a checksum, cuts a large packet into segments, and merges segments
//! into a large packet.
//!
//! A packet with an [`OffloadHeader`] comes from a device or a guest that left work to others. If
//! it is to go to a device that was started with fewer [`Offloads`], [`left_by`] says which work is
//! missing. [`complete_checksum`] completes the checksum in place. [`Segments`] writes one segment
//! at a time into memory of the caller. If packets are to go to a device that was started with more
//! offloads than where they come from, [`Merging`] makes one packet of many. Nothing here allocates
//! for a packet.
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
//! # Merging
//!
//! A device that takes 64 KiB does the same work for a packet of any length. So many short packets in
//! it cost a multiple of what one large packet costs. A guest without offload sends nothing else.
//!
//! ```
//! use vmring_core::offload::{Gso, OffloadHeader, Offloads};
//! use vmring_embedded::software::{Merging, Segments};
//!
//! # use vmring_core::offload::Checksum;
//! # fn packets() -> Vec<Vec<u8>> {
//! #     let mut p = vec![0; 54 + 4000];
//! #     p[12..18].copy_from_slice(&[8, 0, 0x45, 0, 15, 200]);
//! #     p[23] = 6;
//! #     p[46] = 5 << 4;
//! #     let checksum = Checksum::Partial { start: 34, offset: 16 };
//! #     let header = OffloadHeader { checksum, gso: Gso::TcpV4, segment_size: 1460, ..OffloadHeader::NONE };
//! #     let cut = Segments::new(&header, &p).unwrap();
//! #     (0..3).map(|i| { let mut s = vec![0; 1514]; let n = cut.write(i, &mut s).unwrap(); s.truncate(n); s }).collect()
//! # }
//! // 1,460, 1,460 and 1,080 bytes of one TCP stream.
//! let batch: Vec<Vec<u8>> = packets();
//! let mut merging = Merging::new(&Offloads::ALL, 65_549);
//! let mut to_send = Vec::new();
//! for packet in &batch {
//!     // The first packet of a flow is held, and the others are appended to it.
//!     let mut buffer = Vec::with_capacity(65_549);
//!     buffer.extend_from_slice(packet);
//!     merging.push(buffer, &OffloadHeader::NONE, |packet| to_send.push(packet));
//! }
//! merging.flush(|packet| to_send.push(packet));
//!
//! let [large] = &to_send[..] else { panic!("it is one packet") };
//! assert_eq!((large.packets, large.buffer.len()), (3, 54 + 4000));
//! assert_eq!((large.header.gso, large.header.segment_size), (Gso::TcpV4, 1460));
//!
//! // Cut again, they are what they were.
//! let segments = Segments::new(&large.header, &large.buffer)?;
//! let mut frame = [0; 1514];
//! let len = segments.write(1, &mut frame)?;
//! assert_eq!(frame[..len], batch[1]);
//! # Ok::<(), vmring_embedded::software::SoftwareError>(())
//! ```
//!
//! Packets are merged only if the receiver can tell no difference once it has cut them. They follow
//! each other in one flow, and their headers are equal, apart from lengths, checksums, the sequence
//! number, the identification, which counts up, and these flags. CWR is on the first only; PSH and FIN
//! are on the last only, and end it. All but the last have the same length. A checksum that is complete
//! is verified first, because a corrupt packet would otherwise get a good one.
//!
//! Everything else comes out as it went in: SYN, RST, URG and pure acknowledgments, fragments, IP
//! options and extension headers, lengths that disagree, padding behind the IP packet, and checksums
//! that are wrong. If such a packet is of a flow, or may be, it comes out behind what was held of it.
//!
//! # Hostile packets
//!
//! A guest may send anything, and nothing malformed is passed on. An offload header that does not
//! describe its packet, a length field that disagrees with the packet, and a fragment are
//! [`SoftwareError`]s. Each segment has the packet's Ethernet header, VLAN tags, IP options and
//! IPv6 extension headers.
//!
//! Sources: RFC 1071 for the checksum. Linux's `net/ipv4/tcp_offload.c` (`tcp_gso_segment`) and
//! `net/ipv4/udp_offload.c` (`__udp_gso_segment`) for which fields of a segment are copied and
//! which are counted up. `tcp_gro_receive`, `udp_gro_receive_segment`, `inet_gro_receive` and
//! `ipv6_gro_receive` in `net/` for which packets are merged, and `include/net/gro.h`
//! (`inet_gro_flush`) for the identification.

mod candidate;
mod checksum;
mod error;
mod headers;
mod merging;
mod segments;

use vmring_core::offload::{Gso, OffloadHeader, Offloads};

pub use crate::limits::FLOWS_MERGED;
pub use checksum::complete_checksum;
pub use error::SoftwareError;
pub use merging::{MergeBuffer, Merging, Outgoing};
pub use segments::Segments;

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
