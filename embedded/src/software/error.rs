//! [`SoftwareError`]: why work is not done.

use thiserror::Error as ThisError;
use vmring_core::offload::OffloadError;

/// Why a checksum could not be completed or a packet not be cut. Drop such a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ThisError)]
#[non_exhaustive]
pub enum SoftwareError {
    /// The offload header does not describe the packet.
    #[error(transparent)]
    Offload(#[from] OffloadError),
    /// The offload header asks for IP fragments
    /// ([`Gso::Udp`](vmring_core::offload::Gso::Udp), legacy "UFO"), which this module does not make.
    #[error("cutting a UDP datagram into IP fragments is not supported")]
    FragmentsNotSupported,
    /// The offload header asks for no segments
    /// ([`Gso::None`](vmring_core::offload::Gso::None)).
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
