//! Each way in which a chain can be broken, and what is just not broken.

use std::sync::Arc;

use vmring_core::HeapBacking;
use vmring_core::guest::{GuestFault, GuestMemory, GuestRegion};
use vmring_virtio::queue::{ChainError, DESCRIPTORS_MAX, Queue, QueueFeatures, SEGMENTS_MAX};

use crate::driver::{ARENA, Descriptor, Driver, INDIRECT, NEXT, Setup, WRITE};
use crate::queue::segments;

fn guest(size: u16) -> (Driver, Queue) {
    let driver = Driver::new(&Setup::of(size));
    let queue = driver.device();
    (driver, queue)
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len, flags, next }
}

/// What the device says of the chain at `head`, and that it comes back empty.
fn judged(
    driver: &mut Driver,
    queue: &mut Queue,
    head: u16,
) -> Result<Vec<(u64, u32)>, ChainError> {
    driver.make_available(head);
    driver.expose();
    let before = driver.used_index();
    assert_eq!(queue.fetch(8), Ok(1));
    let judged = match queue.pop().expect("it was fetched") {
        Ok(chain) => Ok(segments(&chain).iter().map(|s| (s.0, s.1)).collect()),
        Err(error) => Err(error),
    };
    assert_eq!(queue.outstanding(), u16::from(judged.is_ok()));
    if judged.is_ok() {
        queue.push(0);
    }
    queue.flush();
    assert!(queue.pop().is_none());
    assert_eq!(driver.used_index(), before.wrapping_add(1));
    assert_eq!(driver.element(before), (head.into(), 0));
    judged
}

/// The same for a chain of these descriptors of the queue's table, from index 0 on.
fn judge(descriptors: &[Descriptor]) -> Result<Vec<(u64, u32)>, ChainError> {
    let (mut driver, mut queue) = guest(8);
    for (i, one) in descriptors.iter().enumerate() {
        driver.set_descriptor(i as u16, *one);
    }
    judged(&mut driver, &mut queue, 0)
}

/// The same for a chain of these descriptors in an indirect table.
fn judge_indirect(descriptors: &[Descriptor]) -> Result<Vec<(u64, u32)>, ChainError> {
    let (mut driver, mut queue) = guest(8);
    indirect(&driver, descriptors);
    judged(&mut driver, &mut queue, 0)
}

fn indirect(driver: &Driver, descriptors: &[Descriptor]) {
    let table = ARENA + 0x8_0000;
    for (i, one) in descriptors.iter().enumerate() {
        driver.set_indirect(table, i as u16, *one);
    }
    let len = descriptors.len() as u32 * 16;
    driver.set_descriptor(0, descriptor(table, len, INDIRECT, 0));
}

#[test]
fn a_head_behind_the_table_is_refused() {
    let (mut driver, mut queue) = guest(8);
    for head in [8, u16::MAX] {
        let refused = judged(&mut driver, &mut queue, head);
        assert_eq!(refused, Err(ChainError::HeadOutOfRange { head }));
    }
    // The queue goes on.
    driver.set_descriptor(7, descriptor(ARENA, 60, 0, 0));
    assert_eq!(judged(&mut driver, &mut queue, 7), Ok(vec![(ARENA, 60)]));
}

#[test]
fn a_next_descriptor_behind_its_table_is_refused() {
    let refused = judge(&[descriptor(ARENA, 1, NEXT, 8)]);
    assert_eq!(refused, Err(ChainError::NextOutOfRange { next: 8 }));
    let refused = judge_indirect(&[descriptor(ARENA, 1, NEXT, 1)]);
    assert_eq!(refused, Err(ChainError::NextOutOfRange { next: 1 }));
    // Without the flag, the field means nothing.
    assert_eq!(judge(&[descriptor(ARENA, 1, 0, 8)]), Ok(vec![(ARENA, 1)]));
}

#[test]
fn a_chain_that_comes_back_to_itself_is_refused() {
    assert_eq!(judge(&[descriptor(ARENA, 1, NEXT, 0)]), Err(ChainError::Cyclic));
    let two = [descriptor(ARENA, 1, NEXT, 1), descriptor(ARENA, 1, NEXT, 0)];
    assert_eq!(judge(&two), Err(ChainError::Cyclic));
    assert_eq!(judge_indirect(&two), Err(ChainError::Cyclic));
    // As many descriptors as the table has are no cycle.
    let all: Vec<_> = (0..8)
        .map(|i| descriptor(ARENA + i * 16, 16, if i < 7 { NEXT } else { 0 }, i as u16 + 1))
        .collect();
    assert_eq!(judge(&all).map(|segments| segments.len()), Ok(8));
    assert_eq!(judge_indirect(&all).map(|segments| segments.len()), Ok(8));
}

#[test]
fn a_chain_of_too_many_descriptors_is_refused() {
    let chain = |count: usize| -> Vec<_> {
        let last = count as u64 - 1;
        let flags = |i| WRITE | if i < last { NEXT } else { 0 };
        (0..=last).map(|i| descriptor(ARENA + i, 1, flags(i), i as u16 + 1)).collect()
    };
    // It may be longer than the queue: Linux does that.
    let refused = judge_indirect(&chain(DESCRIPTORS_MAX + 1));
    assert_eq!(refused, Err(ChainError::TooLong));
    let refused = judge_indirect(&chain(DESCRIPTORS_MAX));
    assert_eq!(refused, Err(ChainError::TooManySegments { segments: DESCRIPTORS_MAX }));
    assert_eq!(judge_indirect(&chain(SEGMENTS_MAX)).map(|s| s.len()), Ok(SEGMENTS_MAX));
    // A table as large as a descriptor can say, with a chain without an end.
    let (mut driver, mut queue) = guest(8);
    indirect(&driver, &[descriptor(ARENA, 1, NEXT, 0)]);
    let table = descriptor(ARENA + 0x8_0000, u32::MAX - 15, INDIRECT, 0);
    driver.set_descriptor(0, table);
    assert_eq!(judged(&mut driver, &mut queue, 0), Err(ChainError::TooLong));
    // A large queue bounds its chains too.
    let (mut driver, mut queue) = guest(32768);
    for (i, one) in chain(DESCRIPTORS_MAX + 1).into_iter().enumerate() {
        driver.set_descriptor(i as u16, one);
    }
    assert_eq!(judged(&mut driver, &mut queue, 0), Err(ChainError::TooLong));
}

#[test]
fn a_chain_of_too_many_segments_is_whole_for_who_has_room() {
    let (mut driver, queue) = guest(8);
    let mut queue = queue.with_segments_max(3);
    let four: Vec<_> = (0..4)
        .map(|i| descriptor(ARENA + i * 16, 16, if i < 3 { NEXT } else { 0 }, i as u16 + 1))
        .collect();
    indirect(&driver, &four);
    let refused = judged(&mut driver, &mut queue, 0);
    assert_eq!(refused, Err(ChainError::TooManySegments { segments: 4 }));
    // What is broken behind the room is told apart.
    indirect(&driver, &[&four[..3], &[descriptor(1, 1, 0, 0)]].concat());
    let refused = judged(&mut driver, &mut queue, 0);
    assert_eq!(refused, Err(ChainError::Fault(GuestFault { address: 1 })));
    indirect(&driver, &four);
    let mut queue = queue.with_segments_max(4);
    assert_eq!(judged(&mut driver, &mut queue, 0).map(|s| s.len()), Ok(4));
}

#[test]
fn a_chain_of_more_than_4_gib_is_refused() {
    const QUARTER: u32 = 1 << 22;
    // Its descriptors name the same bytes again and again.
    let mut driver = Driver::new(&Setup { arena: vec![QUARTER as usize + 1], ..Setup::of(8) });
    let mut queue = driver.device().with_segments_max(DESCRIPTORS_MAX);
    let chain = |last_len| -> Vec<_> {
        let all = (0..1024).map(|i| descriptor(ARENA, QUARTER, NEXT, i + 1));
        let last = descriptor(ARENA, last_len, 0, 0);
        all.take(1023).chain([last]).collect()
    };
    indirect(&driver, &chain(QUARTER));
    assert_eq!(judged(&mut driver, &mut queue, 0).map(|s| s.len()), Ok(1024));
    indirect(&driver, &chain(QUARTER + 1));
    assert_eq!(judged(&mut driver, &mut queue, 0), Err(ChainError::TooLarge));
}

#[test]
fn a_descriptor_without_bytes_is_refused() {
    assert_eq!(judge(&[descriptor(ARENA, 0, 0, 0)]), Err(ChainError::EmptyDescriptor));
    let second = [descriptor(ARENA, 1, NEXT, 1), descriptor(ARENA, 0, WRITE, 0)];
    assert_eq!(judge(&second), Err(ChainError::EmptyDescriptor));
    assert_eq!(judge_indirect(&second), Err(ChainError::EmptyDescriptor));
}

#[test]
fn a_descriptor_outside_memory_is_refused() {
    let end = ARENA + 0x10_0000;
    let fault = |address| Err(ChainError::Fault(GuestFault { address }));
    for (address, len, at) in
        [(0, 1, 0), (ARENA - 1, 2, ARENA - 1), (end - 1, 2, end), (u64::MAX, u32::MAX, u64::MAX)]
    {
        assert_eq!(judge(&[descriptor(address, len, 0, 0)]), fault(at));
        assert_eq!(judge_indirect(&[descriptor(address, len, WRITE, 0)]), fault(at));
        // A whole table there.
        let len = 32;
        let behind = if at == end { end - 1 } else { address };
        let at = if at == end { end } else { behind };
        let table = [descriptor(behind, len, INDIRECT, 0)];
        assert_eq!(judge(&table), fault(at));
    }
    assert_eq!(judge(&[descriptor(end - 1, 1, 0, 0)]), Ok(vec![(end - 1, 1)]));
    // The second descriptor of the table is outside.
    let (mut driver, mut queue) = guest(8);
    driver.set_indirect(end - 16, 0, descriptor(ARENA, 1, NEXT, 1));
    driver.set_descriptor(0, descriptor(end - 16, 32, INDIRECT, 0));
    assert_eq!(judged(&mut driver, &mut queue, 0), fault(end));
}

#[test]
fn a_readable_descriptor_behind_a_writable_one_is_refused() {
    let mixed = [descriptor(ARENA, 1, NEXT | WRITE, 1), descriptor(ARENA, 1, 0, 0)];
    assert_eq!(judge(&mixed), Err(ChainError::ReadableAfterWritable));
    assert_eq!(judge_indirect(&mixed), Err(ChainError::ReadableAfterWritable));
    let (mut driver, mut queue) = guest(8);
    indirect(&driver, &[descriptor(ARENA, 1, 0, 0)]);
    // The first is in the queue's own table.
    let table = descriptor(ARENA + 0x8_0000, 16, INDIRECT, 0);
    driver.set_descriptor(0, descriptor(ARENA, 1, NEXT | WRITE, 1));
    driver.set_descriptor(1, table);
    assert_eq!(judged(&mut driver, &mut queue, 0), Err(ChainError::ReadableAfterWritable));
}

#[test]
fn an_indirect_table_that_breaks_a_rule_is_refused() {
    let table = |len, flags| descriptor(ARENA + 0x8_0000, len, flags | INDIRECT, 1);
    assert_eq!(judge(&[table(16, NEXT)]), Err(ChainError::IndirectWithNext));
    for len in [0, 1, 15, 17, u32::MAX] {
        assert_eq!(judge(&[table(len, 0)]), Err(ChainError::IndirectLength { len }));
    }
    assert_eq!(judge_indirect(&[table(16, 0)]), Err(ChainError::IndirectNested));
    let second = [descriptor(ARENA, 1, NEXT, 1), table(16, 0)];
    assert_eq!(judge_indirect(&second), Err(ChainError::IndirectNested));
    let features = QueueFeatures::default();
    let mut driver = Driver::new(&Setup { features, ..Setup::of(8) });
    let mut queue = driver.device();
    indirect(&driver, &[descriptor(ARENA, 1, 0, 0)]);
    assert_eq!(judged(&mut driver, &mut queue, 0), Err(ChainError::IndirectNotNegotiated));
    // With the feature it is whole, and the table's own WRITE flag means nothing.
    let (mut driver, mut queue) = guest(8);
    indirect(&driver, &[descriptor(ARENA, 1, 0, 0)]);
    driver.set_descriptor(0, table(16, WRITE));
    assert_eq!(judged(&mut driver, &mut queue, 0), Ok(vec![(ARENA, 1)]));
}

#[test]
fn an_indirect_table_may_be_anywhere() {
    // A region ends within its second descriptor, and within the buffer.
    let arena = vec![24, 8, 100];
    let mut driver = Driver::new(&Setup { arena, ..Setup::of(8) });
    let mut queue = driver.device();
    driver.set_indirect(ARENA + 1, 0, descriptor(ARENA + 40, 2, NEXT, 1));
    driver.set_indirect(ARENA + 1, 1, descriptor(ARENA + 20, 20, WRITE, 0));
    driver.set_descriptor(0, descriptor(ARENA + 1, 32, INDIRECT, 0));
    let pieces = vec![(ARENA + 40, 2), (ARENA + 20, 4), (ARENA + 24, 8), (ARENA + 32, 8)];
    assert_eq!(judged(&mut driver, &mut queue, 0), Ok(pieces));
}

#[test]
fn an_indirect_table_does_not_wrap_around() {
    let (driver, queue) = guest(8);
    // Memory at both ends of the addresses.
    let ends = [(u64::MAX - 32, 32), (0, 64)]
        .map(|(address, len)| GuestRegion::new(address, Arc::new(HeapBacking::new(len))));
    let regions = driver.memory().regions().iter().cloned().chain(ends);
    let memory = GuestMemory::new(regions).expect("valid regions");
    let mut driver = Driver::over(memory, driver.layout(), queue.features(), 0, 0);
    let mut queue = driver.device();
    let table = u64::MAX - 16;
    driver.set_indirect(table, 0, descriptor(ARENA, 1, NEXT, 2));
    // This is where the third descriptor would be.
    driver.set_indirect(15, 0, descriptor(ARENA, 2, 0, 0));
    driver.set_descriptor(0, descriptor(table, 48, INDIRECT, 0));
    let fault = ChainError::Fault(GuestFault { address: table });
    assert_eq!(judged(&mut driver, &mut queue, 0), Err(fault));
}

#[test]
fn each_broken_chain_is_told_apart_in_words() {
    let all = [
        ChainError::HeadOutOfRange { head: 1 },
        ChainError::NextOutOfRange { next: 1 },
        ChainError::Cyclic,
        ChainError::TooLong,
        ChainError::TooLarge,
        ChainError::EmptyDescriptor,
        ChainError::Fault(GuestFault { address: 1 }),
        ChainError::ReadableAfterWritable,
        ChainError::IndirectNotNegotiated,
        ChainError::IndirectWithNext,
        ChainError::IndirectNested,
        ChainError::IndirectLength { len: 1 },
        ChainError::TooManySegments { segments: 1 },
    ];
    let words: std::collections::BTreeSet<_> = all.iter().map(ToString::to_string).collect();
    assert_eq!(words.len(), all.len());
}

#[test]
fn a_broken_chain_costs_that_chain() {
    let (mut driver, mut queue) = guest(8);
    let whole = |driver: &mut Driver| driver.post(&[(100, true)], None).expect("there is room");
    let first = whole(&mut driver);
    // The head 0 is the driver's last, and stays free.
    driver.set_descriptor(0, descriptor(ARENA, 0, 0, 0));
    driver.make_available(0);
    driver.make_available(9);
    let last = whole(&mut driver);
    driver.expose();
    assert_eq!(queue.fetch(8), Ok(4));
    assert!(queue.pop().is_some_and(|chain| chain.is_ok()));
    let error = |queue: &mut Queue| queue.pop().and_then(Result::err);
    assert_eq!(error(&mut queue), Some(ChainError::EmptyDescriptor));
    assert_eq!(error(&mut queue), Some(ChainError::HeadOutOfRange { head: 9 }));
    // They wait for their turn.
    queue.flush();
    assert_eq!((driver.used_index(), queue.outstanding()), (0, 1));
    assert!(queue.pop().is_some_and(|chain| chain.is_ok()));
    queue.push(60);
    queue.flush();
    assert_eq!((driver.used_index(), queue.outstanding()), (3, 1));
    queue.push(70);
    queue.flush();
    let elements: Vec<_> = (0..driver.used_index()).map(|i| driver.element(i)).collect();
    assert_eq!(elements, [(first.into(), 60), (0, 0), (9, 0), (last.into(), 70)]);
}
