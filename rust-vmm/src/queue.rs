//! [`QueueDescription`]: what the types of `virtio-queue` and those of vmring say of a queue, and the
//! way from each to the other.

use thiserror::Error as ThisError;
use vmring_virtio::net::QueueSetup;
use vmring_virtio::queue::{AddressSpace, Part, QueueLayout, QueueState, SIZE_MAX};

/// A queue, as both crates know it. It is made of a [`virtio_queue::Queue`] or
/// [`virtio_queue::QueueState`] and becomes one, and it becomes a [`QueueSetup`].
///
/// ```
/// use virtio_queue::{Queue, QueueT};
/// use vmring_rust_vmm::QueueDescription;
/// use vmring_rust_vmm::vmring_virtio::net::QueueSetup;
///
/// // What the guest has written into the registers of the transport.
/// let mut queue = Queue::new(256)?;
/// queue.set_desc_table_address(Some(0x1000), None);
/// queue.set_avail_ring_address(Some(0x3000), None);
/// queue.set_used_ring_address(Some(0x4000), None);
/// queue.set_ready(true);
///
/// let description = QueueDescription::try_from(&queue)?;
/// assert_eq!(description.layout.available, 0x3000);
/// let setup = QueueSetup::try_from(description)?;
/// assert_eq!(Queue::try_from(description)?, queue);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What the two indices mean
///
/// Here chains come back in order, so the chains from `next_used` to `next_available` are those that
/// the device has. A queue of vmring that goes on takes them again. A device that gave its chains back
/// in another order must give all of them back before its queue is converted.
///
/// A [`virtio_queue::Queue`] also counts the chains since its last look at the driver's wish for
/// interrupts. That is not in its state. A queue of vmring that goes on does not need it: it decides
/// about its first interrupt without that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueDescription {
    /// The size that the driver has chosen, and where the queue is.
    pub layout: QueueLayout,
    /// How far the queue is.
    pub state: QueueState,
    /// Whether `VIRTIO_F_EVENT_IDX` is in use. A device of this crate follows the features that the
    /// driver has accepted.
    pub event_idx: bool,
    /// The largest size that the device offers.
    pub max_size: u16,
    /// Whether the driver has set the queue up.
    pub ready: bool,
}

/// Why a queue cannot be converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum QueueConversionError {
    /// The size is no power of two up to the largest one, or that is no power of two up to
    /// [`SIZE_MAX`].
    #[error("a size of {size} is not possible in a queue of at most {max_size}")]
    Size {
        /// The size.
        size: u32,
        /// The largest one.
        max_size: u16,
    },
    /// The specification does not allow a part of the queue at this address (virtio 1.2, section 2.7).
    #[error("the {part} at {address:#x} is not aligned")]
    Misaligned {
        /// The part.
        part: Part,
        /// Its address.
        address: u64,
    },
    /// More chains are between the two indices than the queue has entries.
    #[error("a queue of {size} has fewer entries than from index {} to {}", state.next_used, state.next_available)]
    State {
        /// The indices.
        state: QueueState,
        /// The size.
        size: u32,
    },
    /// The driver has not set the queue up, so it cannot run.
    #[error("the driver has not set the queue up")]
    NotReady,
    /// `virtio-queue` knows only the addresses of the guest. These are those of a front end of
    /// vhost-user.
    #[error("the addresses are those of a front end")]
    FrontEndAddresses,
    /// `virtio-queue` has no place for [`QueueLayout::used_log`].
    #[error("the used ring is logged at another place")]
    UsedLog,
}

impl QueueDescription {
    /// What both ways have in common.
    fn check(self) -> Result<Self, QueueConversionError> {
        let Self { layout, state, max_size, .. } = self;
        let size = layout.size;
        let possible = max_size.is_power_of_two()
            && u32::from(max_size) <= SIZE_MAX
            && size.is_power_of_two()
            && size <= u32::from(max_size);
        if !possible {
            return Err(QueueConversionError::Size { size, max_size });
        }
        let parts = [
            (Part::Descriptors, layout.descriptors, 16),
            (Part::Available, layout.available, 2),
            (Part::Used, layout.used, 4),
        ];
        for (part, address, alignment) in parts {
            if !address.is_multiple_of(alignment) {
                return Err(QueueConversionError::Misaligned { part, address });
            }
        }
        if u32::from(state.next_available.wrapping_sub(state.next_used)) > size {
            return Err(QueueConversionError::State { state, size });
        }
        Ok(self)
    }
}

impl TryFrom<virtio_queue::QueueState> for QueueDescription {
    type Error = QueueConversionError;

    fn try_from(queue: virtio_queue::QueueState) -> Result<Self, Self::Error> {
        let layout = QueueLayout {
            size: queue.size.into(),
            descriptors: queue.desc_table,
            available: queue.avail_ring,
            used: queue.used_ring,
            addresses: AddressSpace::Guest,
            used_log: None,
        };
        let description = Self {
            layout,
            state: QueueState { next_available: queue.next_avail, next_used: queue.next_used },
            event_idx: queue.event_idx_enabled,
            max_size: queue.max_size,
            ready: queue.ready,
        };
        description.check()
    }
}

impl TryFrom<&virtio_queue::Queue> for QueueDescription {
    type Error = QueueConversionError;

    fn try_from(queue: &virtio_queue::Queue) -> Result<Self, Self::Error> {
        queue.state().try_into()
    }
}

impl TryFrom<QueueDescription> for virtio_queue::QueueState {
    type Error = QueueConversionError;

    fn try_from(description: QueueDescription) -> Result<Self, Self::Error> {
        let QueueDescription { layout, state, event_idx, max_size, ready } = description.check()?;
        if layout.addresses == AddressSpace::FrontEnd {
            return Err(QueueConversionError::FrontEndAddresses);
        }
        if layout.used_log.is_some() {
            return Err(QueueConversionError::UsedLog);
        }
        Ok(Self {
            max_size,
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: event_idx,
            // It is at most `max_size`.
            size: layout.size as u16,
            ready,
            desc_table: layout.descriptors,
            avail_ring: layout.available,
            used_ring: layout.used,
        })
    }
}

impl TryFrom<QueueDescription> for virtio_queue::Queue {
    type Error = QueueConversionError;

    fn try_from(description: QueueDescription) -> Result<Self, Self::Error> {
        let state = virtio_queue::QueueState::try_from(description)?;
        Ok(state.try_into().expect("what `check` demands is what virtio-queue does"))
    }
}

/// The queue runs, without a kick descriptor. Only a queue that is ready can.
impl TryFrom<QueueDescription> for QueueSetup {
    type Error = QueueConversionError;

    fn try_from(description: QueueDescription) -> Result<Self, Self::Error> {
        let QueueDescription { layout, state, ready, .. } = description.check()?;
        if !ready {
            return Err(QueueConversionError::NotReady);
        }
        let mut setup = QueueSetup::new(layout);
        setup.state = state;
        Ok(setup)
    }
}
