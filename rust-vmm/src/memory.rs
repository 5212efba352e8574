//! The memory of a guest: from `vm-memory`'s types to a [`GuestMemory`].

use std::any::TypeId;
use std::ptr::NonNull;
use std::sync::Arc;

use thiserror::Error as ThisError;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};
use vmring::GuestMemory;
use vmring::guest::{DirtyLog, GuestMapping, GuestMemoryError, GuestRegion};

/// Where a device takes the guest's memory from, at its start and whenever the VMM has changed the
/// memory.
///
/// A VMM with regions of a type of its own implements this with [`region`].
pub trait MemorySource {
    /// The guest's memory as it is now. The mappings stay until the last clone of the result is
    /// dropped. What the VMM adds or removes later is not in it.
    ///
    /// # Errors
    ///
    /// [`MemoryError`].
    fn snapshot(&self) -> Result<GuestMemory, MemoryError>;
}

/// Why the regions of a VMM are no memory for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum MemoryError {
    /// The mapping of a region cannot be read and written, according to [`MmapRegion::prot`]. A guest
    /// could let a device write there, and the VMM would end with SIGSEGV.
    #[error(
        "the region at {guest_address:#x} is mapped with the protection {prot:#x}, and not for reading and writing"
    )]
    Protection {
        /// Where the region begins in the guest's memory.
        guest_address: u64,
        /// The protection, as for `mmap`.
        prot: i32,
    },
    /// The regions are no memory.
    #[error("the regions are no memory of a guest")]
    Regions(#[from] GuestMemoryError),
}

/// A mapping that stays as long as this does.
struct Mapping<B>(Arc<MmapRegion<B>>);

// With its feature `xen`, vm-memory maps some regions at each access only, and `Mapping` would not
// keep its promise. The function is missing there, so that this does not compile.
const _: fn(&MmapRegion<()>) -> bool = MmapRegion::owned;

// SAFETY: `MmapRegion` has its `size()` bytes at `as_ptr()` from its construction on, by `mmap`, and
// unmaps them in its `Drop`, which cannot come before that of this `Arc`. It has no method that moves
// or unmaps them earlier. If it does not own the mapping, the caller of its unsafe constructor
// promised that the bytes are mapped. `region` has seen that they can be read and written. Only
// volatile accesses and atomics reach them through vm-memory's safe functions, which make no other
// references to them.
unsafe impl<B: Bitmap + Send + Sync> GuestMapping for Mapping<B> {
    fn start(&self) -> NonNull<u8> {
        NonNull::new(self.0.as_ptr()).expect("a mapping is not at address 0")
    }

    fn len(&self) -> usize {
        self.0.size()
    }
}

/// The bitmap of a region, which counts from the region's first byte.
struct Log<B> {
    mapping: Arc<MmapRegion<B>>,
    guest_address: u64,
}

impl<B: Bitmap + Send + Sync> DirtyLog for Log<B> {
    fn mark(&self, guest_address: u64, len: u64) {
        // An address before the region is none of the region, and bitmaps ignore what is behind.
        if let Some(offset) = guest_address.checked_sub(self.guest_address) {
            self.mapping.bitmap().mark_dirty(offset as usize, len as usize);
        }
    }
}

/// A region of the guest's memory, with its mapping, which stays as long as the result. What a device
/// writes is marked in the region's bitmap, before the guest is told of it.
///
/// A bitmap of the type `()` costs nothing.
///
/// # Errors
///
/// [`MemoryError::Protection`].
pub fn region<B>(region: &GuestRegionMmap<B>) -> Result<GuestRegion, MemoryError>
where
    B: Bitmap + Send + Sync + 'static,
{
    let mapping = region.get_mmap();
    let guest_address = region.start_addr().0;
    let (prot, needed) = (mapping.prot(), libc::PROT_READ | libc::PROT_WRITE);
    if prot & needed != needed {
        return Err(MemoryError::Protection { guest_address, prot });
    }
    let has_log = TypeId::of::<B>() != TypeId::of::<()>();
    let log = has_log.then(|| Log { mapping: mapping.clone(), guest_address });
    let log = log.map(|log| Arc::new(log) as Arc<dyn DirtyLog>);
    Ok(GuestRegion::new(guest_address, Arc::new(Mapping(mapping))).dirty_log(log))
}

impl<B> MemorySource for GuestMemoryMmap<B>
where
    B: Bitmap + Send + Sync + 'static,
{
    fn snapshot(&self) -> Result<GuestMemory, MemoryError> {
        let regions: Result<Vec<_>, _> = self.iter().map(region).collect();
        Ok(GuestMemory::new(regions?)?)
    }
}

/// The guard of `vm-memory` is held only while the snapshot is made. So updates never wait for a
/// device, and a thread keeps its fast path (`arc_swap` has eight places for each thread).
impl<B> MemorySource for GuestMemoryAtomic<GuestMemoryMmap<B>>
where
    B: Bitmap + Send + Sync + 'static,
{
    fn snapshot(&self) -> Result<GuestMemory, MemoryError> {
        self.memory().snapshot()
    }
}

impl MemorySource for GuestMemory {
    fn snapshot(&self) -> Result<GuestMemory, MemoryError> {
        Ok(self.clone())
    }
}

impl<M: MemorySource + ?Sized> MemorySource for Arc<M> {
    fn snapshot(&self) -> Result<GuestMemory, MemoryError> {
        (**self).snapshot()
    }
}
