//! The guest's memory: snapshots, and what is marked in bitmaps.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};
use vmring_rust_vmm::{MemoryError, MemorySource, region, vm_memory};

#[test]
fn a_snapshot_is_the_same_memory() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0x1000), 0x1000),
        (GuestAddress(0x2000), 0x3000),
        (GuestAddress(1 << 40), 0x1000),
    ]);
    let memory = memory.unwrap();
    let snapshot = memory.snapshot().unwrap();
    let regions: Vec<_> =
        snapshot.regions().iter().map(|region| (region.guest_address(), region.len())).collect();
    assert_eq!(regions, [(0x1000, 0x1000), (0x2000, 0x3000), (1 << 40, 0x1000)]);
    assert!(!snapshot.has_dirty_log(), "a bitmap that marks nothing is none");
    memory.write_obj(0x1234_5678_u32, GuestAddress((1 << 40) + 8)).unwrap();
    let slice = snapshot.slice((1 << 40) + 8, 4).unwrap();
    assert_eq!(slice.read(), Some(0x1234_5678_u32.to_ne_bytes()));
    slice.copy_from(&[1, 2, 3, 4]);
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress((1 << 40) + 8)).unwrap(), [1, 2, 3, 4]);
    // It stays when the VMM lets it go.
    let mapping = Arc::downgrade(&memory.find_region(GuestAddress(0x1000)).unwrap().get_mmap());
    snapshot.slice(0x1ff0, 2).unwrap().copy_from(b"ab");
    drop(memory);
    assert_eq!(snapshot.slice(0x1ff0, 2).unwrap().read(), Some(*b"ab"));
    drop(snapshot);
    assert!(mapping.upgrade().is_none());
}

#[test]
fn an_empty_memory_is_one() {
    assert!(GuestMemoryMmap::<()>::new().snapshot().unwrap().regions().is_empty());
}

/// Goal: a device never gets memory in which its writes would end the VMM.
#[test]
fn memory_that_cannot_be_written_is_refused() {
    for prot in [libc::PROT_READ, libc::PROT_WRITE, libc::PROT_NONE] {
        let mapping: MmapRegion =
            MmapRegionBuilder::new(0x4000).with_mmap_prot(prot).build().unwrap();
        let rom = GuestRegionMmap::new(mapping, GuestAddress(0xf000)).unwrap();
        let error = MemoryError::Protection { guest_address: 0xf000, prot };
        assert_eq!(region(&rom).unwrap_err(), error);
        let memory = GuestMemoryMmap::from_regions(vec![rom]).unwrap();
        assert_eq!(memory.snapshot().unwrap_err(), error);
    }
}

/// A bitmap that keeps the calls.
#[derive(Debug, Default)]
struct Calls(std::sync::Mutex<Vec<(usize, usize)>>);

impl vm_memory::bitmap::WithBitmapSlice<'_> for Calls {
    type S = ();
}

impl Bitmap for Calls {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.lock().unwrap().push((offset, len));
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) {}
}

impl NewBitmap for Calls {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

/// Goal: bitmaps count from the first byte of their region, and our addresses are the guest's.
#[test]
fn marks_count_from_the_region() {
    let ranges = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x2000)];
    let memory = GuestMemoryMmap::<Calls>::from_ranges(&ranges).unwrap();
    let snapshot = memory.snapshot().unwrap();
    assert!(snapshot.has_dirty_log());
    snapshot.mark_dirty(0x1ffe, 5);
    let calls: Vec<_> =
        memory.iter().map(|region| region.get_mmap().bitmap().0.lock().unwrap().clone()).collect();
    assert_eq!(calls, [vec![(0xffe, 2)], vec![(0, 3)]]);
}
