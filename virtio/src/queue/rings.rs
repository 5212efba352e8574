//! [`Rings`]: the fields of a queue's three parts, in the guest's memory.

use crate::queue::layout::{AddressSpace, Part, QueueError, QueueLayout, SIZE_MAX};
use vmring_core::guest::{GuestMemory, GuestRegion, GuestSlice};
use vmring_core::sync::Ordering;

/// The number of bytes of a descriptor, in the table of a queue and in an indirect one.
pub(super) const DESCRIPTOR_LEN: u32 = 16;
/// The number of bytes of an element of the used ring.
pub(super) const ELEMENT_LEN: u32 = 8;

/// Both rings begin with these two fields of 16 bits, and the entries follow.
const FLAGS: u32 = 0;
const INDEX: u32 = 2;
const ENTRIES: u32 = 4;

/// Bit 0 of the available ring's flags: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// Bit 0 of the used ring's flags: the device wants no notifications.
const NO_NOTIFY: u16 = 1;

/// The three parts. They were looked up once, so an access searches no table.
#[derive(Debug)]
pub(super) struct Rings {
    size: u16,
    descriptors: GuestRegion,
    available: GuestRegion,
    used: GuestRegion,
}

impl Rings {
    pub(super) fn new(memory: &GuestMemory, layout: &QueueLayout) -> Result<Self, QueueError> {
        let size = layout.size;
        if !size.is_power_of_two() || size > SIZE_MAX {
            return Err(QueueError::Size { size });
        }
        let find = |part, address: u64, len: u32, align: usize| {
            let region = match layout.addresses {
                AddressSpace::Guest => memory.part(address, len.into()),
                AddressSpace::FrontEnd => memory.part_of_user(address, len.into()),
            };
            let region = region.ok_or(QueueError::Outside { part, address })?;
            // The mapping may be aligned otherwise than the guest's address, and the fields are
            // atomics of this program.
            let fields = region.get(0, len).and_then(|bytes| bytes.atomic_u16(0));
            if !address.is_multiple_of(align as u64) || fields.is_none() {
                return Err(QueueError::Misaligned { part, address });
            }
            Ok(region)
        };
        let used = find(Part::Used, layout.used, used_len(size), 4)?;
        let used = match layout.used_log {
            Some(address) if address.checked_add(used_len(size).into()).is_none() => {
                return Err(QueueError::UsedLog { address });
            }
            Some(address) => used.readdressed(address),
            None => used,
        };
        Ok(Self {
            size: size as u16,
            descriptors: find(Part::Descriptors, layout.descriptors, size * DESCRIPTOR_LEN, 16)?,
            available: find(Part::Available, layout.available, available_len(size), 2)?,
            used,
        })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// The place of an index in either ring.
    pub(super) fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// The descriptor at `index`, copied once. `None` if it is behind the table.
    #[inline]
    pub(super) fn descriptor(&self, index: u16) -> Option<[u8; DESCRIPTOR_LEN as usize]> {
        self.descriptors.read(u64::from(index) * u64::from(DESCRIPTOR_LEN))
    }

    /// The driver's index. Acquire: what the driver wrote before this index, entries and descriptors,
    /// is read afterwards. It pairs with the driver's barrier before its store (virtio 1.2, section
    /// 2.7.13.3; `virtio_wmb` in Linux's `virtqueue_add_split`).
    pub(super) fn available_index(&self) -> u16 {
        load(&self.available, INDEX, Ordering::Acquire)
    }

    /// Copies the heads at `index` and behind, as many as `to` takes. They do not go beyond the
    /// ring's end.
    pub(super) fn copy_heads(&self, index: u16, to: &mut [[u8; 2]]) {
        let at = ENTRIES + self.slot(index) as u32 * 2;
        let to = to.as_flattened_mut();
        let copied = field(&self.available, at, to.len() as u32).copy_to(to);
        debug_assert_eq!(copied, to.len());
    }

    pub(super) fn wants_interrupts(&self) -> bool {
        load(&self.available, FLAGS, Ordering::Relaxed) & NO_INTERRUPT == 0
    }

    /// The used index for which the driver wants an interrupt.
    pub(super) fn used_event(&self) -> u16 {
        load(&self.available, available_len(self.size.into()) - 2, Ordering::Relaxed)
    }

    /// Writes elements from `index` on. They do not go beyond the ring's end.
    pub(super) fn write_elements(&self, index: u16, elements: &[[u8; ELEMENT_LEN as usize]]) {
        let at = ENTRIES + self.slot(index) as u32 * ELEMENT_LEN;
        let bytes = elements.as_flattened();
        let to = field(&self.used, at, bytes.len() as u32);
        to.copy_from(bytes);
        to.mark_dirty(to.len());
    }

    /// Shows the driver the elements before `index`. Release: it sees them, and what was written
    /// into its buffers, before it sees the index. It pairs with the driver's barrier after its load
    /// (virtio 1.2, section 2.7.14; `virtio_rmb` in Linux's `virtqueue_get_buf_ctx_split`).
    pub(super) fn publish(&self, index: u16) {
        store(&self.used, INDEX, index, Ordering::Release);
    }

    /// Says whether the device wants notifications, where that is not said with an index.
    pub(super) fn set_wants_notifications(&self, wanted: bool) {
        store(&self.used, FLAGS, if wanted { 0 } else { NO_NOTIFY }, Ordering::Relaxed);
    }

    /// Says at which available index the device wants a notification.
    pub(super) fn set_available_event(&self, index: u16) {
        store(&self.used, used_len(self.size.into()) - 2, index, Ordering::Relaxed);
    }
}

fn available_len(size: u32) -> u32 {
    6 + size * 2
}

fn used_len(size: u32) -> u32 {
    6 + size * ELEMENT_LEN
}

fn field(part: &GuestRegion, at: u32, len: u32) -> GuestSlice<'_> {
    part.get(at.into(), len).expect("`new` saw that the part has all its fields")
}

fn load(part: &GuestRegion, at: u32, order: Ordering) -> u16 {
    let value = field(part, at, 2).atomic_u16(0).expect("`new` saw that the part is aligned");
    u16::from_le(value.load(order))
}

fn store(part: &GuestRegion, at: u32, value: u16, order: Ordering) {
    let bytes = field(part, at, 2);
    let place = bytes.atomic_u16(0).expect("`new` saw that the part is aligned");
    place.store(value.to_le(), order);
    // It is logged after the store. A migration that copies the page in between copies it again.
    bytes.mark_dirty(2);
}
