//! The memory of a guest: the table of regions, and access to the bytes.
#![cfg(not(loom))]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmring_core::HeapBacking;
use vmring_core::guest::{
    DirtyLog, GuestFault, GuestMapping, GuestMemory, GuestMemoryError, GuestRegion, REGIONS_MAX,
};

fn mapping(len: usize) -> Arc<dyn GuestMapping> {
    Arc::new(HeapBacking::new(len))
}

fn region(guest_address: u64, len: usize) -> GuestRegion {
    GuestRegion::new(guest_address, mapping(len))
}

fn refused(regions: impl IntoIterator<Item = GuestRegion>) -> GuestMemoryError {
    GuestMemory::new(regions).expect_err("these regions are no memory")
}

#[test]
fn regions_that_are_no_memory_are_refused() {
    assert_eq!(refused([region(8, 0)]), GuestMemoryError::Empty { guest_address: 8 });
    let twice = [region(0x2000, 0x1000), region(0x1fff, 2)];
    assert_eq!(refused(twice), GuestMemoryError::Overlap { guest_address: 0x2000 });
    let far = region(u64::MAX - 9, 9);
    assert!(GuestMemory::new([far]).is_ok());
    assert_eq!(
        refused([region(u64::MAX - 9, 10)]),
        GuestMemoryError::Overflow { guest_address: u64::MAX - 9 }
    );
    // The front end's addresses are a space of their own.
    let users = [region(0, 16).user_address(100), region(16, 16).user_address(110)];
    assert_eq!(refused(users), GuestMemoryError::Overlap { guest_address: 16 });
    let far = region(0, 16).user_address(u64::MAX - 3);
    assert_eq!(refused([far]), GuestMemoryError::Overflow { guest_address: 0 });
    let many = (0..=REGIONS_MAX as u64).map(|i| region(i * 2, 1));
    assert_eq!(refused(many), GuestMemoryError::TooMany);
    assert!(GuestMemory::new((0..REGIONS_MAX as u64).map(|i| region(i * 2, 1))).is_ok());
    for (offset, len) in [(0, 17), (16, 1), (u64::MAX, 2)] {
        let part = GuestRegion::part(7, mapping(16), offset, len);
        let outside = GuestMemoryError::OutsideMapping { guest_address: 7 };
        assert_eq!(part.expect_err("it has 16 bytes"), outside);
    }
}

#[test]
fn a_mapping_lives_as_long_as_any_memory_of_it() {
    let owner = mapping(64);
    let memory = GuestMemory::new([GuestRegion::new(0, owner.clone())]).expect("one region");
    let copy = memory.clone();
    drop(memory);
    assert_eq!(Arc::strong_count(&owner), 2);
    drop(copy);
    assert_eq!(Arc::strong_count(&owner), 1);
}

#[test]
fn a_part_of_a_mapping_is_that_part() {
    let owner = mapping(0x3000);
    let whole = GuestMemory::new([GuestRegion::new(0, owner.clone())]).expect("one region");
    let part = GuestRegion::part(0x10_0000, owner, 0x1000, 0x800).expect("it is inside");
    let memory = GuestMemory::new([part.user_address(0x7000)]).expect("one region");
    let slice = memory.slice(0x10_0010, 4).expect("it is inside");
    assert_eq!((slice.guest_address(), slice.copy_from(b"abcd")), (0x10_0010, 4));
    assert_eq!(whole.slice(0x1010, 4).and_then(|slice| slice.read()), Some(*b"abcd"));
    let user = memory.slice_of_user(0x7010, 4).expect("it is inside");
    assert_eq!((user.guest_address(), user.read()), (0x10_0010, Some(*b"abcd")));
    assert!(memory.slice(0x10_07ff, 1).is_some() && memory.slice(0x10_07ff, 2).is_none());
    assert!(memory.slice(0x10_0800, 1).is_none() && memory.slice(0xf_ffff, 1).is_none());
    assert!(memory.slice_of_user(0x6fff, 1).is_none());
    assert!(memory.slice_of_user(0x7800, 0).is_none());
}

#[test]
fn a_range_over_several_regions_comes_in_pieces() {
    let memory = GuestMemory::new([region(0x1000, 0x1000), region(0x2000, 0x1000)]).expect("two");
    let pieces: Result<Vec<_>, _> = memory.slices(0x1ff0, 0x20).collect();
    let pieces = pieces.expect("all of it is there");
    let lens: Vec<_> = pieces.iter().map(|piece| (piece.guest_address(), piece.len())).collect();
    assert_eq!(lens, [(0x1ff0, 0x10), (0x2000, 0x10)]);
    let mut behind = memory.slices(0x2ff0, 0x20);
    assert_eq!(behind.next().map(|piece| piece.expect("memory").len()), Some(0x10));
    assert_eq!(behind.next().map(|piece| piece.err()), Some(Some(GuestFault { address: 0x3000 })));
    assert!(behind.next().is_none() && behind.next().is_none());
    assert!(memory.slices(0x1000, 0).next().is_none());
}

#[test]
fn a_part_of_a_memory_is_a_region_that_keeps_its_mapping() {
    let owner = mapping(0x1000);
    let log = Arc::new(Log::default());
    let whole = GuestRegion::new(0x1000, owner.clone()).user_address(0x9000);
    let memory = GuestMemory::new([whole.dirty_log(Some(log.clone()))]).expect("one region");
    assert!(memory.slice(0x1108, 2).is_some_and(|slice| slice.copy_from(b"hi") == 2));
    let part = memory.part(0x1100, 0x10).expect("it is inside");
    let user = memory.part_of_user(0x9100, 0x10).expect("it is inside");
    assert!(memory.part(0x1ff0, 0x10).is_some() && memory.part_of_user(0x9ff0, 0x10).is_some());
    for (address, len) in [(0x1ff0, 0x11), (0x2000, 0), (0xfff, 1), (0x1000, u64::MAX)] {
        assert!(memory.part(address, len).is_none());
        assert!(memory.part_of_user(address + 0x8000, len).is_none());
    }
    drop(memory);
    assert_eq!(Arc::strong_count(&owner), 3);
    for part in [part.clone(), user] {
        assert_eq!((part.guest_address(), part.len()), (0x1100, 0x10));
        assert_eq!(part.get(8, 2).and_then(|slice| slice.read()), Some(*b"hi"));
        assert!(part.get(0x10, 0).is_some() && part.get(8, 9).is_none());
        assert!(part.get(u64::MAX, 1).is_none() && part.get(0x11, 0).is_none());
        assert_eq!(part.at(0x1108, 2).and_then(|slice| slice.read()), Some(*b"hi"));
        let place = part.at(0x1108, 8).map(|slice| (slice.guest_address(), slice.len()));
        assert_eq!(place, Some((0x1108, 8)));
        assert!(part.at(0x1110, 0).is_some() && part.at(0x1108, 9).is_none());
        assert!(part.at(0x10ff, 1).is_none() && part.at(0x1111, 0).is_none());
        assert_eq!((part.read(8), part.read(14)), (Some(*b"hi"), Some([0, 0])));
        assert!(part.read::<16>(0).is_some() && part.read::<17>(0).is_none());
        assert!(part.read::<2>(15).is_none() && part.read::<1>(u64::MAX).is_none());
    }
    let elsewhere = part.clone().readdressed(0x50);
    elsewhere.get(8, 2).expect("it is inside").mark_dirty(2);
    part.get(8, 2).expect("it is inside").mark_dirty(2);
    assert_eq!(*log.0.lock().expect("no panic"), [(0x58, 2), (0x1108, 2)]);
    let at_the_end = part.readdressed(u64::MAX - 9);
    assert!(at_the_end.get(8, 2).is_none() && at_the_end.at(u64::MAX - 1, 2).is_none());
    assert!(at_the_end.at(u64::MAX - 1, 1).is_some(), "it ends within 64 bits");
}

#[test]
fn a_slice_copies_what_both_sides_have() {
    let memory = GuestMemory::new([region(0, 16)]).expect("one region");
    let slice = memory.slice(4, 8).expect("it is inside");
    assert_eq!(slice.copy_from(b"0123456789"), 8);
    let mut bytes = [0; 10];
    assert_eq!(slice.copy_to(&mut bytes), 8);
    assert_eq!(&bytes, b"01234567\0\0");
    assert_eq!(slice.read::<9>(), None);
    // The guest may name the same bytes twice.
    let (_, rest) = slice.split_at(2).expect("it has 8");
    assert_eq!(rest.copy_from_guest(slice), 6);
    assert_eq!(slice.read(), Some(*b"01012345"));
    assert!(slice.split_at(9).is_none() && slice.skip(8).is_some_and(|rest| rest.is_empty()));
}

#[test]
fn an_atomic_is_aligned_and_inside() {
    let memory = GuestMemory::new([region(0, 16)]).expect("one region");
    let slice = memory.slice(0, 7).expect("it is inside");
    let word = slice.atomic_u16(4).expect("it is even");
    word.store(0x1234_u16.to_le(), std::sync::atomic::Ordering::Relaxed);
    assert_eq!(slice.skip(4).and_then(|rest| rest.read()), Some([0x34, 0x12]));
    assert!(slice.atomic_u16(5).is_none(), "odd");
    assert!(slice.atomic_u16(6).is_none(), "one byte is missing");
    assert!(slice.atomic_u32(0).is_some() && slice.atomic_u32(2).is_none());
    assert!(slice.atomic_u32(4).is_none() && slice.atomic_u32(u32::MAX).is_none());
}

#[derive(Default)]
struct Log(Mutex<Vec<(u64, u64)>>);

impl DirtyLog for Log {
    fn mark(&self, guest_address: u64, len: u64) {
        self.0.lock().expect("no panic").push((guest_address, len));
    }
}

#[test]
fn what_is_marked_is_the_guests_address() {
    let log = Arc::new(Log::default());
    let logged = region(0x5000, 0x1000).user_address(0).dirty_log(Some(log.clone()));
    let memory = GuestMemory::new([logged]).expect("one region");
    let slice = memory.slice(0x5100, 0x100).expect("it is inside").skip(0x10).expect("it has more");
    slice.mark_dirty(0x20);
    slice.mark_dirty(u32::MAX);
    memory.slice_of_user(0x8, 8).expect("it is inside").mark_dirty(1);
    let marks = log.0.lock().expect("no panic").clone();
    assert_eq!(marks, [(0x5110, 0x20), (0x5110, 0xf0), (0x5008, 1)]);
}

proptest! {
    /// Against a table that has each byte by itself.
    #[test]
    fn look_ups_find_what_a_table_of_bytes_finds(
        layout in prop::collection::vec((0_u64..200, 1_usize..40), 0..8),
        ranges in prop::collection::vec((0_u64..260, 0_u32..80), 1..20),
    ) {
        let mut bytes = BTreeMap::new();
        let mut regions = Vec::new();
        for (start, len) in layout {
            if (start..start + len as u64).any(|at| bytes.contains_key(&at)) {
                continue;
            }
            bytes.extend((start..start + len as u64).map(|at| (at, regions.len())));
            regions.push(region(start, len).user_address(1000 - start * 2));
        }
        let count = regions.len();
        // Overlaps of the front end's addresses are possible here, and another test's.
        let Ok(memory) = GuestMemory::new(regions) else { return Ok(()) };
        prop_assert_eq!(memory.regions().len(), count);
        for (at, len) in ranges {
            let owners: Vec<_> =
                (at..at + u64::from(len)).map(|at| bytes.get(&at).copied()).collect();
            let in_one = owners.iter().all(|owner| owner.is_some() && *owner == owners[0]);
            let has = memory.slice(at, len);
            prop_assert_eq!(has.is_some(), in_one && bytes.contains_key(&at));
            let mut covered = 0;
            for piece in memory.slices(at, len) {
                match piece {
                    Ok(piece) => covered += piece.len() as usize,
                    Err(fault) => prop_assert_eq!(fault.address, at + covered as u64),
                }
            }
            let until = owners.iter().position(Option::is_none).unwrap_or(owners.len());
            prop_assert_eq!(covered, until);
        }
    }
}
