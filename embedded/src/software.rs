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

mod checksum;
mod error;
mod headers;
mod segments;

use vmring_core::offload::{Gso, OffloadHeader, Offloads};

pub use checksum::complete_checksum;
pub use error::SoftwareError;
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
