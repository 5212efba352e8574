//! Where a queue can be, and where it cannot.

use std::sync::{Arc, Mutex};

use vmring_core::HeapBacking;
use vmring_core::guest::{DirtyLog, GuestMemory, GuestRegion};
use vmring_virtio::queue::{
    AddressSpace, Part, Queue, QueueError, QueueFeatures, QueueLayout, QueueState,
};

use crate::driver::{Driver, FRONT_END, Setup};

fn refused(driver: &Driver, change: impl FnOnce(&mut QueueLayout)) -> Option<QueueError> {
    let mut layout = driver.layout();
    change(&mut layout);
    let (features, state) = (QueueFeatures::default(), QueueState::default());
    let error = Queue::new(driver.memory().clone(), layout, features, state).err()?;
    assert!(!error.to_string().is_empty());
    Some(error)
}

#[test]
fn a_size_is_a_power_of_two_up_to_32768() {
    let driver = Driver::new(&Setup::of(32768));
    for size in [0, 3, 6, 32767, 65536, u32::MAX, 1 << 31] {
        assert_eq!(refused(&driver, |layout| layout.size = size), Some(QueueError::Size { size }));
    }
    for shift in 0..=15 {
        assert_eq!(refused(&driver, |layout| layout.size = 1 << shift), None);
    }
}

#[test]
fn each_part_is_aligned() {
    let driver = Driver::new(&Setup::of(8));
    let layout = driver.layout();
    let misaligned = |part, address| Some(QueueError::Misaligned { part, address });
    for off in [1, 2, 4, 8] {
        // The rings follow, so the table may begin later.
        let address = layout.descriptors + off;
        let error = refused(&driver, |layout| layout.descriptors += off);
        assert_eq!(error, misaligned(Part::Descriptors, address));
    }
    // One entry less leaves room behind.
    let error = refused(&driver, |layout| {
        layout.size = 4;
        layout.available += 1;
    });
    assert_eq!(error, misaligned(Part::Available, layout.available + 1));
    assert_eq!(
        refused(&driver, |layout| {
            layout.size = 4;
            layout.available += 2;
        }),
        None
    );
    for off in [1, 2, 3] {
        let error = refused(&driver, |layout| {
            layout.size = 4;
            layout.used += off;
        });
        assert_eq!(error, misaligned(Part::Used, layout.used + off));
    }
    assert_eq!(
        refused(&driver, |layout| {
            layout.size = 4;
            layout.used += 4;
        }),
        None
    );
    // This program's addresses are aligned, but the guest's are not.
    let odd = GuestRegion::new(0x9001, Arc::new(HeapBacking::new(0x100)));
    let regions = driver.memory().regions().iter().cloned().chain([odd]);
    let memory = GuestMemory::new(regions).expect("valid regions");
    for (part, address) in [(Part::Available, 0x9001), (Part::Used, 0x9005)] {
        let mut layout = driver.layout();
        match part {
            Part::Available => layout.available = address,
            _ => layout.used = address,
        }
        let (features, state) = (QueueFeatures::default(), QueueState::default());
        let error = Queue::new(memory.clone(), layout, features, state).err();
        assert_eq!(error, misaligned(part, address));
    }
    // It is the other way round.
    let mapping = Arc::new(HeapBacking::new(0x1001));
    let odd = GuestRegion::part(0, mapping, 1, 0x1000).expect("it is inside");
    let memory = GuestMemory::new([odd]).expect("one region");
    let layout = QueueLayout { descriptors: 0, available: 0x100, used: 0x200, ..layout };
    let error = Queue::new(memory, layout, QueueFeatures::default(), QueueState::default()).err();
    assert_eq!(error, misaligned(Part::Used, 0x200));
}

#[test]
fn each_part_is_in_one_region() {
    for addresses in [AddressSpace::Guest, AddressSpace::FrontEnd] {
        let driver = Driver::new(&Setup { addresses, arena: vec![64, 64], ..Setup::of(8) });
        let layout = driver.layout();
        let border = crate::driver::ARENA
            + 64
            + if addresses == AddressSpace::Guest { 0 } else { FRONT_END };
        let outside = |part, address| Some(QueueError::Outside { part, address });
        for address in [0, border, border - 16, border + 64, u64::MAX - 15] {
            let error = refused(&driver, |layout| layout.descriptors = address);
            assert_eq!(error, outside(Part::Descriptors, address));
        }
        // The available ring has 22 bytes, and the used ring 70.
        for (address, inside) in [(border - 22, true), (border - 20, false), (border, true)] {
            let error = refused(&driver, |layout| layout.available = address);
            let expected = if inside { None } else { outside(Part::Available, address) };
            assert_eq!(error, expected);
        }
        let error = refused(&driver, |layout| layout.used = border - 64);
        assert_eq!(error, outside(Part::Used, border - 64));
        // The last byte counts.
        let end = layout.used + 70;
        assert_eq!(refused(&driver, |layout| layout.used = end - 70), None);
        let error = refused(&driver, |layout| layout.used = end - 68);
        assert_eq!(error, outside(Part::Used, end - 68));
    }
}

#[test]
fn a_state_has_at_most_as_many_chains_as_the_queue_has_entries() {
    let driver = Driver::new(&Setup::of(8));
    for (next_available, next_used, fits) in
        [(8, 0, true), (9, 0, false), (3, 65531, true), (3, 65530, false), (0, 1, false)]
    {
        let state = QueueState { next_available, next_used };
        let error = driver.device_at(state).err();
        assert_eq!(error, (!fits).then_some(QueueError::State { state }));
    }
}

#[derive(Default)]
struct Log(Mutex<Vec<(u64, u64)>>);

impl DirtyLog for Log {
    fn mark(&self, guest_address: u64, len: u64) {
        self.0.lock().expect("no panic").push((guest_address, len));
    }
}

impl Log {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.0.lock().expect("no panic"))
    }
}

/// A log that looks at the used index when it is called.
struct Watch {
    driver: Mutex<Option<GuestMemory>>,
    index_at: u64,
    seen: Mutex<Vec<(u64, u16)>>,
}

impl DirtyLog for Watch {
    fn mark(&self, guest_address: u64, _len: u64) {
        let memory = self.driver.lock().expect("no panic");
        let Some(memory) = &*memory else { return };
        let index = memory.slice(self.index_at, 2).and_then(|bytes| bytes.read());
        let index = u16::from_le_bytes(index.expect("it is in memory"));
        self.seen.lock().expect("no panic").push((guest_address, index));
    }
}

#[test]
fn elements_are_logged_before_the_index_shows_them_and_the_index_after_it_is_written() {
    let used = Driver::new(&Setup::of(4)).layout().used;
    let (driver, seen) = Default::default();
    let watch = Arc::new(Watch { driver, index_at: used + 2, seen });
    let mut driver = Driver::new(&Setup { dirty_log: Some(watch.clone()), ..Setup::of(4) });
    let mut queue = driver.device();
    *watch.driver.lock().expect("no panic") = Some(driver.memory().clone());
    driver.post(&[(60, true)], None).expect("there is room");
    driver.post(&[(60, true)], None).expect("there is room");
    driver.expose();
    assert_eq!(queue.fetch(4), Ok(2));
    for _ in 0..2 {
        queue.pop().expect("it is there").expect("it is whole");
        queue.push(0);
    }
    queue.flush();
    // One mark for both.
    let seen = std::mem::take(&mut *watch.seen.lock().expect("no panic"));
    assert_eq!(seen, [(used + 4, 0), (used + 2, 2)]);
    *watch.driver.lock().expect("no panic") = None;
}

#[test]
fn the_used_ring_is_logged_where_it_was_asked_for() {
    let log = Arc::new(Log::default());
    let features = QueueFeatures { event_idx: true, ..QueueFeatures::default() };
    let setup = Setup {
        dirty_log: Some(log.clone()),
        addresses: AddressSpace::FrontEnd,
        base: 3,
        features,
        ..Setup::of(4)
    };
    let mut driver = Driver::new(&setup);
    let used = driver.layout().used - FRONT_END;
    let mut queue = driver.device();
    // `flags`, and `avail_event` behind four elements.
    assert_eq!(log.take(), [(used, 2), (used + 36, 2)]);
    for (used_log, at) in [(None, used), (Some(0x7777_0000), 0x7777_0000), (None, used)] {
        queue.set_used_log(used_log).expect("it fits");
        let head = driver.post(&[(60, true)], None).expect("there is room");
        driver.post(&[(60, true)], None).expect("there is room");
        driver.expose();
        let index = u64::from(driver.used_index() % 4);
        assert_eq!(queue.fetch(4), Ok(2));
        let buffer = driver.buffers(head)[0].address;
        for _ in 0..2 {
            let chain = queue.pop().expect("it is there").expect("it is whole");
            chain.writable().for_each(|segment| segment.mark_dirty(60));
            queue.push(60);
        }
        let marks = log.take();
        assert_eq!((marks.len(), marks[0]), (2, (buffer, 60)), "buffers have the guest's address");
        queue.flush();
        let elements = match index {
            // The burst wraps around in the ring.
            3 => vec![(at + 28, 8), (at + 4, 8)],
            _ => vec![(at + 4 + index * 8, 16)],
        };
        assert_eq!(log.take(), [elements, vec![(at + 2, 2)]].concat());
        assert!(!queue.enable_notifications());
        assert_eq!(log.take(), [(at + 36, 2)]);
        assert_eq!(driver.collect().len(), 2);
    }
    let far = u64::MAX - 38;
    assert_eq!(queue.set_used_log(Some(far)), Ok(()));
    let error = queue.set_used_log(Some(far + 1));
    assert_eq!(error, Err(QueueError::UsedLog { address: far + 1 }));
    assert_eq!(queue.layout().used_log, Some(far));
}

#[test]
fn a_queue_follows_its_memory() {
    let mut driver = Driver::new(&Setup::of(4));
    let mut queue = driver.device();
    driver.post(&[(60, false)], None).expect("there is room");
    driver.expose();
    assert_eq!(queue.fetch(1), Ok(1));
    queue.pop().expect("it is there").expect("it is whole");
    // Without the rings it cannot be the queue's memory.
    let regions = driver.memory().regions();
    let without = GuestMemory::new(regions[1..].to_vec()).expect("one region");
    let error = queue.set_memory(without);
    let address = driver.layout().used;
    assert_eq!(error, Err(QueueError::Outside { part: Part::Used, address }));
    // Without the arena it can, and the chains there are broken from now on.
    let log = Arc::new(Log::default());
    let rings = regions[0].clone().dirty_log(Some(log.clone()));
    queue.set_memory(GuestMemory::new([rings]).expect("one region")).expect("the rings are there");
    queue.push(0);
    queue.flush();
    assert_eq!(driver.collect().len(), 1);
    assert_eq!(log.take(), [(address + 4, 8), (address + 2, 2)]);
    driver.post(&[(60, false)], None).expect("there is room");
    driver.expose();
    assert_eq!(queue.fetch(1), Ok(1));
    assert!(queue.pop().is_some_and(|chain| chain.is_err()));
    queue.flush();
    assert_eq!(driver.collect().len(), 1);
    assert_eq!(queue.memory().regions().len(), 1);
}

#[test]
fn feature_bits_are_those_of_the_specification() {
    let has = |bits| QueueFeatures::from_bits(bits);
    let none = QueueFeatures::default();
    assert_eq!(has(0x1000_0000), QueueFeatures { indirect: true, ..none });
    assert_eq!(has(0x2000_0000), QueueFeatures { event_idx: true, ..none });
    assert_eq!(has(0x8_0000_0000), QueueFeatures { in_order: true, ..none });
    assert_eq!(has(!0x8_3000_0000), none);
}
