//! Why a connection ends.

use std::io;

use thiserror::Error as ThisError;
use vmring_core::guest::GuestMemoryError;

use crate::vhost_user::features::ProtocolFeature;
use crate::vhost_user::request::Request;

/// Why a connection with a front end ends. The last message has changed nothing, except that rings
/// may have been started before one that could not be.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// The number belongs to no request.
    #[error("vhost-user has no request {number}")]
    UnknownRequest {
        /// The number.
        number: u32,
    },
    /// The request belongs to a feature that this back end does not have.
    #[error("{request} belongs to a feature that this back end does not offer")]
    NotOffered {
        /// The request.
        request: Request,
    },
    /// The request belongs to a protocol feature that the front end has not acknowledged.
    #[error("{request} needs the protocol feature {feature}, which was not negotiated")]
    NotNegotiated {
        /// The request.
        request: Request,
        /// The protocol feature.
        feature: ProtocolFeature,
    },
    /// The header's flags are not those of a request of version 1.
    #[error(
        "{request} has the flags {flags:#x}, but a request has version 1 and need_reply at most"
    )]
    Flags {
        /// The request.
        request: Request,
        /// The flags of the header.
        flags: u32,
    },
    /// The payload is too long or too short.
    #[error("{request} has a payload of {size} bytes, which is not the size of its contents")]
    Size {
        /// The request.
        request: Request,
        /// The header's number of bytes.
        size: u32,
    },
    /// The message has the wrong number of descriptors.
    #[error("{request} came with {count} descriptors, but takes {takes}")]
    Descriptors {
        /// The request.
        request: Request,
        /// How many came.
        count: usize,
        /// How many it takes.
        takes: usize,
    },
    /// The system did not hand over every descriptor of a message.
    #[error("descriptors of a message were lost; the limit of open files may be reached")]
    DescriptorsLost,
    /// A field has bits or values that the document reserves.
    #[error("{request} has the {field} {value:#x}, which the protocol does not define")]
    Reserved {
        /// The request.
        request: Request,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The ring does not exist.
    #[error("{request} names ring {index}, but there are {rings} rings")]
    RingIndex {
        /// The request.
        request: Request,
        /// The index.
        index: u32,
        /// The number of rings of this back end.
        rings: usize,
    },
    /// A split ring has a power of two of entries, at most 32768 (virtio, "Split Virtqueues").
    #[error("SET_VRING_NUM: a ring has no {num} entries, but 0 or a power of two up to 32768")]
    RingSize {
        /// The number of entries.
        num: u32,
    },
    /// The index of a split ring has 16 bits.
    #[error("SET_VRING_BASE: the index {base} has more than 16 bits")]
    RingBase {
        /// The index.
        base: u32,
    },
    /// A part of a ring is not aligned (virtio, "Split Virtqueues").
    #[error("SET_VRING_ADDR: the {part} at {address:#x} is not aligned")]
    RingAlignment {
        /// The part of the ring.
        part: &'static str,
        /// The front end's address of it.
        address: u64,
    },
    /// A part of a ring is not in one region of the guest's memory.
    #[error("ring {index} cannot start: its {part} at {address:#x} is not within one region")]
    RingAddress {
        /// The ring.
        index: u16,
        /// The part of the ring.
        part: &'static str,
        /// The front end's address of it.
        address: u64,
    },
    /// Bits were acknowledged that were not offered.
    #[error("{request} acknowledges the bits {bits:#x}, which were not offered")]
    Features {
        /// The request.
        request: Request,
        /// The bits that were not offered.
        bits: u64,
    },
    /// There are too many regions.
    #[error("{request} makes {count} regions, but at most {max} are possible")]
    Regions {
        /// The request.
        request: Request,
        /// The number of regions.
        count: usize,
        /// How many are possible.
        max: usize,
    },
    /// The region to be removed does not exist.
    #[error("REM_MEM_REG: there is no such region at {guest_address:#x}")]
    UnknownRegion {
        /// Where it begins in the guest's memory.
        guest_address: u64,
    },
    /// The regions are no memory of a guest.
    #[error("{request}: the regions are no memory of a guest")]
    Memory {
        /// The request.
        request: Request,
        /// Why.
        source: GuestMemoryError,
    },
    /// The memory of a descriptor cannot be mapped.
    #[error("{request}: a descriptor's memory cannot be mapped")]
    Map {
        /// The request.
        request: Request,
        /// Why.
        source: MapError,
    },
    /// The dirty log has no bits for some of the memory.
    #[error("{request}: the dirty log ends before the address {address:#x}")]
    LogTooShort {
        /// The request.
        request: Request,
        /// The last address that must have a bit.
        address: u64,
    },
    /// The descriptor cannot be the event of a ring.
    #[error("{request}: the descriptor is no eventfd, pipe or socket")]
    NotAnEvent {
        /// The request.
        request: Request,
    },
    /// The device did not start a ring.
    #[error("the device does not start ring {index}")]
    Backend {
        /// The ring.
        index: u16,
        /// Why.
        source: Box<dyn core::error::Error + Send + Sync>,
    },
    /// The connection ended inside a message.
    #[error("the connection ended after {received} bytes of a message")]
    Truncated {
        /// The bytes of the message that had arrived.
        received: usize,
    },
    /// The socket failed.
    #[error("the socket of the connection failed")]
    Socket(#[from] io::Error),
}

/// Why a descriptor's memory is not mapped.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum MapError {
    /// It is a pipe, a socket, a directory or a device.
    #[error("the descriptor has no memory (its mode is {mode:#o})")]
    NotMemory {
        /// The type and permissions of the file, as in `st_mode`.
        mode: u32,
    },
    /// It has fewer bytes than its region.
    #[error("the file has {file} bytes, but {needed} are needed")]
    TooShort {
        /// The bytes of the file.
        file: u64,
        /// The offset and the length of the region together.
        needed: u64,
    },
    /// The numbers exceed what a process can map.
    #[error("{len} bytes at the offset {offset:#x} are more than a process can map")]
    Overflow {
        /// The offset in the file.
        offset: u64,
        /// The length.
        len: u64,
    },
    /// The front end can make the file shorter, and this back end was told to refuse that.
    #[error("the file is not sealed against shrinking")]
    NotSealed,
    /// The program that looks after mappings cannot look after one more; see
    /// [`MappingObserver`](crate::vhost_user::MappingObserver).
    #[error("one mapping more is not observed, and could not be cut off safely")]
    Unobserved,
    /// The memory of the connection exceeds its limit.
    #[error("the memory of the connection would exceed {max} bytes")]
    TooMuch {
        /// The limit.
        max: u64,
    },
    /// The system refused.
    #[error("the system refused")]
    System(#[from] io::Error),
}
