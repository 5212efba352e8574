//! Where the three parts of a queue are, and what was negotiated for it.

use core::fmt;

/// The largest size of a queue (virtio 1.2, section 2.7).
pub const SIZE_MAX: u32 = 32768;

/// Whose addresses name the parts of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSpace {
    /// The guest's, as a transport inside the VMM has them.
    Guest,
    /// Those of a vhost-user front end, as `VHOST_USER_SET_VRING_ADDR` has them.
    FrontEnd,
}

/// Where the parts of a queue are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// The number of entries of each part: a power of two, at most [`SIZE_MAX`].
    pub size: u32,
    /// The descriptor table: 16 bytes for each entry, at a multiple of 16.
    pub descriptors: u64,
    /// The available ring: 2 bytes for each entry and 6 more, at a multiple of 2.
    pub available: u64,
    /// The used ring: 8 bytes for each entry and 6 more, at a multiple of 4.
    pub used: u64,
    /// Whose addresses these three are.
    pub addresses: AddressSpace,
    /// Where in the guest's memory writes to the used ring are logged, if that is not where the ring
    /// is: `log_guest_addr` of vhost-user, with `VHOST_VRING_F_LOG`.
    pub used_log: Option<u64>,
}

/// What the driver has accepted of what concerns a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueFeatures {
    /// `VIRTIO_F_EVENT_IDX`: both sides say with an index when they want to be notified.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may refer to a table of descriptors.
    pub indirect: bool,
    /// `VIRTIO_F_IN_ORDER`: one element of the used ring may stand for several chains.
    pub in_order: bool,
}

impl QueueFeatures {
    /// The features among the feature bits of a device (virtio 1.2, section 6).
    pub fn from_bits(bits: u64) -> Self {
        let has = |bit: u32| bits & (1 << bit) != 0;
        Self { event_idx: has(29), indirect: has(28), in_order: has(35) }
    }
}

/// How far a queue is. Because chains are used in order, this and the guest's memory are all that
/// another queue needs to go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// The index in the available ring of the chain that is popped next.
    pub next_available: u16,
    /// The index in the used ring that the driver sees.
    pub next_used: u16,
}

/// A part of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The descriptor table.
    Descriptors,
    /// The available ring.
    Available,
    /// The used ring.
    Used,
}

/// Why there is no queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueError {
    /// The size is no power of two, or more than [`SIZE_MAX`].
    Size {
        /// The size.
        size: u32,
    },
    /// A part is not at a multiple of what its kind demands, in its own addresses or in those of
    /// this program.
    Misaligned {
        /// The part.
        part: Part,
        /// Its address.
        address: u64,
    },
    /// A part is not in memory, or not wholly in one region.
    Outside {
        /// The part.
        part: Part,
        /// Its address.
        address: u64,
    },
    /// The addresses at which the used ring is logged exceed 64 bits.
    UsedLog {
        /// The address of the ring's first byte.
        address: u64,
    },
    /// More chains are between the two indices than the queue has entries.
    State {
        /// The indices.
        state: QueueState,
    },
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Descriptors => "descriptor table",
            Part::Available => "available ring",
            Part::Used => "used ring",
        })
    }
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QueueError::Size { size } => {
                write!(f, "a queue's size is a power of two up to {SIZE_MAX}, not {size}")
            }
            QueueError::Misaligned { part, address } => {
                write!(f, "the {part} at {address:#x} is not aligned")
            }
            QueueError::Outside { part, address } => {
                write!(f, "the {part} at {address:#x} is not in one region of the guest's memory")
            }
            QueueError::UsedLog { address } => {
                write!(f, "the used ring is logged at {address:#x}, which exceeds 64 bits")
            }
            QueueError::State { state } => {
                let QueueState { next_available: to, next_used: from } = state;
                write!(f, "the queue has fewer entries than from index {from} to {to}")
            }
        }
    }
}

impl core::error::Error for QueueError {}

/// The driver's index is one that no driver can have reached. What it has made available is unknown
/// from here on, so the queue works no more until the driver resets it: the device sets
/// `DEVICE_NEEDS_RESET` (virtio 1.2, section 2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenQueue {
    /// The available index that the driver wrote.
    pub index: u16,
    /// The available index up to which entries were taken.
    pub fetched: u16,
}

impl fmt::Display for BrokenQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { index, fetched } = self;
        write!(f, "the driver moved its available index from {fetched} to {index}")
    }
}

impl core::error::Error for BrokenQueue {}
