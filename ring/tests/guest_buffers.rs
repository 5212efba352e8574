//! Guest buffers: lists of segments, their way through the queues, and what keeps their memory.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use vmring_core::guest::{
    GuestBufferError, GuestFault, GuestMapping, GuestMemory, GuestRegion, SEGMENTS_MAX,
};
use vmring_core::{
    Class, Depths, GuestBuffer, HeapBacking, Layout, Outcome, Pool, Regions, SKIP_SUCCESS,
    SegmentTable, Submission, rings,
};

fn memory(len: usize) -> (Arc<dyn GuestMapping>, GuestMemory) {
    let mapping: Arc<dyn GuestMapping> = Arc::new(HeapBacking::new(len));
    let memory = GuestMemory::new([GuestRegion::new(0, mapping.clone())]).expect("one region");
    (mapping, memory)
}

fn table(len: usize, segments: u32) -> SegmentTable {
    SegmentTable::new(memory(len).1, segments).expect("some slots")
}

fn pool() -> Pool {
    let layout = Layout { slots: 4, slot_size: 64, headroom: 0 };
    Pool::new(Box::new(HeapBacking::new(256)), layout).expect("a pool")
}

/// The addresses and lengths of segments.
fn places(segments: vmring_core::guest::Segments<'_>) -> Vec<(u64, u32)> {
    segments.map(|segment| (segment.guest_address(), segment.len())).collect()
}

#[test]
fn a_buffer_is_its_segments_in_order() {
    let table = table(0x1000, 64);
    let ranges = [(0x100, 10), (0x80, 0), (0x20, 6), (0x400, 100)];
    let mut buffer = table.buffer(ranges, 12).expect("valid ranges");
    assert_eq!((buffer.header_len(), buffer.len(), buffer.capacity()), (12, 104, 104));
    assert_eq!(places(buffer.segments()), [(0x100, 10), (0x20, 6), (0x400, 100)]);
    assert_eq!(places(buffer.packet()), [(0x22, 4), (0x400, 100)]);
    buffer.set_len(5).expect("it has 104");
    assert_eq!(places(buffer.packet()), [(0x22, 4), (0x400, 1)]);
    assert_eq!(places(buffer.space()), [(0x22, 4), (0x400, 100)]);
    buffer.set_len(0).expect("it has 104");
    assert!(buffer.is_empty() && buffer.packet().next().is_none());
    let refused = buffer.set_len(105).expect_err("it has 104");
    assert_eq!((refused.wanted, refused.available), (105, 104));
}

#[test]
fn packets_and_headers_are_copied_over_the_borders_of_segments() {
    let table = table(0x1000, 64);
    let mut buffer = table.buffer([(0, 8), (0x10, 8), (0x20, 3), (0x30, 9)], 12).expect("valid");
    assert!(buffer.set_header(b"headerheader"));
    buffer.copy_from(b"0123456789").expect("it has 16");
    assert_eq!(buffer.header(), Some(*b"headerheader"));
    let memory = table.memory().clone();
    let read = |at| memory.slice(at, 8).and_then(|slice| slice.read::<8>()).expect("memory");
    assert_eq!(&read(0), b"headerhe");
    assert_eq!(&read(0x10), b"ader0123");
    assert_eq!(&read(0x20)[..3], b"456");
    assert_eq!(&read(0x30)[..4], b"789\0");
    let mut out = [0; 16];
    assert_eq!((buffer.copy_to(&mut out), &out[..10]), (10, &b"0123456789"[..]));
    assert_eq!((buffer.copy_to(&mut out[..3]), &out[..3]), (3, &b"012"[..]));
    assert!(buffer.copy_from(&[0; 17]).is_err() && buffer.len() == 10);

    // From one guest to another, over other borders.
    let other = self::table(0x1000, 64);
    let mut to = other.buffer([(1, 1), (5, 4), (0x100, 1), (0x200, 90)], 0).expect("valid");
    to.copy_from_guest(&buffer).expect("it has 96");
    assert_eq!((to.len(), to.copy_to(&mut out), &out[..10]), (10, 10, &b"0123456789"[..]));
    let mut small = other.buffer([(0, 9)], 0).expect("valid");
    assert!(small.copy_from_guest(&buffer).is_err());
    // It has no header.
    assert!(to.header().is_none() && !to.set_header(&[0; 12]));
}

#[test]
fn what_is_no_buffer_is_refused_and_takes_no_slot() {
    let mut table = table(0x10_0000, 2 * SEGMENTS_MAX);
    let fault = |address| Err(GuestBufferError::Fault(GuestFault { address }));
    let refused = |ranges: &[(u64, u32)], header| {
        let result = table.buffer(ranges.iter().copied(), header).map(|_| ());
        assert_eq!(table.slots_in_use(), 0);
        result
    };
    assert_eq!(refused(&[(0x10_0000, 1)], 0), fault(0x10_0000));
    assert_eq!(refused(&[(0, 1), (0xf_ffff, 2)], 0), fault(0x10_0000));
    assert_eq!(refused(&[(0, 11)], 12), Err(GuestBufferError::NoHeader));
    assert_eq!(refused(&[], 12), Err(GuestBufferError::NoHeader));
    let many = vec![(0, 1); SEGMENTS_MAX as usize];
    assert_eq!(refused(&many, 0), Ok(()));
    let too_many = vec![(0, 1); SEGMENTS_MAX as usize + 1];
    assert_eq!(refused(&too_many, 0), Err(GuestBufferError::TooManySegments));
    let long = vec![(0, 0x10_0000); 200];
    assert_eq!(refused(&long, 0), Ok(()));
    // The slices of one memory are nothing in another.
    let (_, other) = memory(16);
    let foreign = table.buffer_of(other.slice(0, 4), 0).map(|_| ());
    assert_eq!(foreign, Err(GuestBufferError::ForeignMemory));
    let own = table.memory().clone();
    assert!(table.buffer_of(own.slice(0, 4), 0).is_ok());
    assert!(SegmentTable::new(other, 0).is_err());
}

/// Goal: slots that are taken in advance are nobody's: they count as free, every one of them can be used,
/// and they keep neither memory nor the table.
#[test]
fn slots_that_are_taken_in_advance_are_free() {
    let mut table = table(0x1000, 4 * 40);
    let own = table.memory().clone();
    let mut buffers: Vec<_> =
        (0..40).map(|i| table.buffer_of(own.slice(i, 4), 0).expect("a slot is free")).collect();
    assert_eq!(table.slots_in_use(), 40);
    assert_eq!(table.buffer_of(own.slice(0, 4), 0).map(|_| ()), Err(GuestBufferError::NoSlots));
    buffers.drain(..7);
    // This takes all seven.
    buffers.push(table.buffer_of(own.slice(0, 4), 0).expect("seven slots are free"));
    assert_eq!(table.slots_in_use(), 34);
    let (mapping, other) = memory(0x1000);
    assert!(!table.set_memory(other), "buffers are in the first memory");
    buffers.clear();
    assert!(table.release_unused());
    assert_eq!(table.slots_in_use(), 0);
    for _ in 0..40 {
        buffers.push(table.buffer([(0, 4)], 0).expect("all slots are free for everybody"));
    }
    buffers.clear();
    let memory = table.memory().clone();
    assert!(table.buffer_of(memory.slice(0, 4), 0).is_ok());
    drop((table, memory));
    assert_eq!(Arc::strong_count(&mapping), 1, "the table has gone, and its memory with it");
}

#[test]
fn two_gibibytes_are_too_long() {
    let table = table(1 << 24, SEGMENTS_MAX);
    // Each range is the same memory again.
    let of = |n| table.buffer(std::iter::repeat_n((0, 1 << 24), n), 0).map(|_| ());
    assert_eq!(of(127), Ok(()));
    assert_eq!(of(128), Err(GuestBufferError::TooLong));
}

#[test]
fn a_full_table_refuses_and_a_dropped_buffer_frees() {
    let table = table(0x1000, 12);
    let nine = || table.buffer((0..9).map(|i| (i, 1)), 0);
    let first = nine().expect("three slots are free");
    assert_eq!(table.slots_in_use(), 3);
    assert_eq!(table.buffer([(0, 1)], 0).map(|_| ()), Err(GuestBufferError::NoSlots));
    drop(first);
    let small = table.buffer([(0, 1)], 0).expect("it fits");
    assert_eq!(nine().map(|_| ()), Err(GuestBufferError::NoSlots));
    assert_eq!(table.slots_in_use(), 1);
    drop(small);
    assert!(nine().is_ok());
}

/// The mapping must not go while a buffer of it is anywhere.
#[test]
fn memory_stays_until_its_last_buffer_is_gone() {
    let (first, memory_of_first) = memory(0x1000);
    let mut table = SegmentTable::new(memory_of_first, 8).expect("some slots");
    let buffer = table.buffer([(0, 64)], 0).expect("valid");
    let (second, memory_of_second) = memory(0x2000);
    assert!(!table.set_memory(memory_of_second), "a buffer is in the first");
    assert_eq!(Arc::strong_count(&first), 2);
    assert!(table.buffer([(0x1fff, 1)], 0).is_ok(), "new buffers are in the second");
    assert!(!table.release_unused());
    drop(buffer);
    assert_eq!(Arc::strong_count(&first), 2, "nobody has asked yet");
    assert!(table.release_unused());
    assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (1, 2));

    // A buffer outlives its table.
    let mut buffer = table.buffer([(16, 4)], 0).expect("valid");
    drop(table);
    assert_eq!(Arc::strong_count(&second), 2);
    buffer.copy_from(b"late").expect("it has four");
    drop(buffer);
    assert_eq!(Arc::strong_count(&second), 1);
}

/// A buffer in a queue owns its slots as one in a variable does.
#[test]
fn a_queue_that_is_dropped_frees_the_buffers_in_it() {
    let (mapping, memory) = memory(0x1000);
    let table = SegmentTable::new(memory, 64).expect("some slots");
    let pool = pool();
    let regions = Regions::new(vec![pool.clone()]).and_then(|r| r.with_segment_table(&table));
    let regions = regions.expect("two regions");
    assert!(regions.has_segment_table() && regions.pools().len() == 1);
    let (sq_producer, cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(4, 4, 1), regions, 0);
    let long = |i: u64| table.buffer((0..9).map(|j| (i * 16 + j, 1)), 0).expect("slots are free");
    for i in 0..3 {
        sq_producer.push_guest(Class::Write, 0, long(i), i).expect("credits");
    }
    sq_producer.push(Class::Write, pool.alloc().expect("free"), 3).expect("a credit");
    sq_producer.publish();
    sq_consumer.ready();
    // One in the CQ, one taken and lost with its taker, one in the SQ.
    let Some(Submission::Packet { class, user_data, buffer }) = sq_consumer.pop() else {
        panic!("an entry is missing")
    };
    assert_eq!(places(buffer.guest().expect("a guest's").packet()).len(), 9);
    cq_producer.push(class, buffer, user_data, Outcome::Done);
    cq_producer.publish();
    let taken = sq_consumer.front().expect("the second").take().0;
    // What has ended needs no list any more.
    assert_eq!((table.slots_in_use(), pool.slots_out()), (6, 1));
    assert!(taken.is_guest() && taken.frame().is_none());
    drop((sq_producer, cq_consumer, sq_consumer, cq_producer));
    assert_eq!((table.slots_in_use(), pool.slots_out()), (3, 0));
    let guest: GuestBuffer = taken.into_frame().expect_err("a guest's");
    assert_eq!(guest.capacity(), 9);
    drop((guest, table));
    assert_eq!(Arc::strong_count(&mapping), 1);
}

#[test]
fn a_buffer_of_another_table_comes_back() {
    let (ours, theirs) = (table(64, 4), table(64, 4));
    let regions = Regions::new(vec![pool()]).and_then(|r| r.with_segment_table(&ours));
    let (sq_producer, ..) = rings(Depths::new(1, 1, 1), regions.expect("two regions"), 0);
    let foreign = theirs.buffer([(3, 7)], 0).expect("valid");
    let (error, buffer) =
        sq_producer.push_guest(Class::Read, 0, foreign, 0).expect_err("it is another table's");
    assert_eq!(error, vmring_core::PushError::ForeignPool);
    assert_eq!(places(buffer.packet()), [(3, 7)]);
}

/// What a completion says of a guest's read is what the device has set.
#[test]
fn a_completion_has_the_length_that_arrived() {
    let table = table(0x1000, 8);
    let regions = Regions::new(vec![pool()]).and_then(|r| r.with_segment_table(&table));
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(1, 1, 1), regions.expect("two regions"), u32::MAX);
    let buffer = table.buffer([(0, 512), (0x800, 512)], 12).expect("valid");
    sq_producer.push_guest(Class::Read, 0, buffer, 7).expect("a credit");
    sq_producer.publish();
    sq_consumer.ready();
    let (mut buffer, user_data) = sq_consumer.front().expect("a read").take();
    assert!(buffer.guest_mut().expect("a guest's").set_len(1013).is_err());
    buffer.guest_mut().expect("a guest's").copy_from(&[9; 600]).expect("it has 1012");
    cq_producer.push(Class::Read, buffer, user_data, Outcome::Done);
    cq_producer.publish();
    cq_consumer.ready();
    let reaped = cq_consumer.pop().expect("a completion");
    assert_eq!((reaped.user_data, reaped.len, reaped.outcome), (7, 600, Outcome::Done));
    // The packet is in the guest's memory, and the list is free again.
    assert!(reaped.frame.is_none() && table.slots_in_use() == 0);
    let read = |at| table.memory().slice(at, 100).and_then(|slice| slice.read::<100>());
    assert_eq!((read(412), read(0x800)), (Some([9; 100]), Some([9; 100])));
}

/// The completions of one packet count down, whatever their buffers are. Those of others do not, even
/// if they carry a number of their device's.
#[test]
fn the_parts_of_a_packet_count_down() {
    let table = table(0x1000, 16);
    let pool = pool();
    let regions = Regions::new(vec![pool.clone()]).and_then(|r| r.with_segment_table(&table));
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(8, 1, 1), regions.expect("two regions"), u32::MAX);
    for number in 0..5 {
        let buffer = table.buffer([(64 * number, 40)], 12).expect("valid");
        match number {
            1 => {
                let frame = pool.alloc().expect("a frame");
                sq_producer.push(Class::Read, frame, number).expect("a credit");
            }
            _ => sq_producer.push_guest(Class::Read, 0, buffer, number).expect("a credit"),
        }
    }
    sq_producer.publish();
    sq_consumer.ready();
    for number in 0..5 {
        let (mut buffer, user_data) = sq_consumer.front().expect("a read").take();
        match number {
            0 => buffer.guest_mut().expect("a guest's").set_len(28).expect("it has 28"),
            1 => buffer.set_frame_len(50).expect("it has 64"),
            2 => buffer.guest_mut().expect("a guest's").set_part_len(40).expect("it has 40"),
            _ => {}
        }
        match number {
            0..2 => cq_producer.push_part(buffer, user_data, 2 - number),
            2 => cq_producer.push(Class::Read, buffer, user_data, Outcome::Done),
            _ => cq_producer.push(Class::Read, buffer, user_data, Outcome::Refused(9)),
        }
    }
    cq_producer.publish();
    assert_eq!(cq_consumer.ready(), 5);
    let mut seen = Vec::new();
    while let Some(reaped) = cq_consumer.pop() {
        assert_eq!(reaped.frame.is_some(), reaped.user_data == 1);
        seen.push((reaped.user_data, reaped.len, reaped.more, reaped.outcome));
    }
    let refused = Outcome::Refused(9);
    assert_eq!(
        seen[..3],
        [(0, 28, 2, Outcome::Done), (1, 50, 1, Outcome::Done), (2, 40, 0, Outcome::Done)]
    );
    assert_eq!(seen[3..], [(3, 28, 0, refused), (4, 28, 0, refused)]);
    assert_eq!(table.slots_in_use(), 0);
}

/// A frame of no pool of the ring, given back as a part, is a misuse, as in other completions.
#[test]
#[should_panic(expected = "more completions than credits")]
fn a_part_in_a_foreign_frame_is_a_misuse() {
    let regions = Regions::new(vec![pool()]).expect("a region");
    let (.., mut cq_producer) = rings(Depths::new(1, 1, 1), regions, 0);
    let foreign = pool();
    cq_producer.push_part(foreign.alloc().expect("a frame").into(), 0, 1);
}

/// A later part of a packet begins with the first byte of its buffer.
#[test]
fn a_later_part_has_no_header() {
    let table = table(0x1000, 16);
    let mut buffer = table.buffer([(0, 5), (0x100, 20)], 12).expect("valid");
    assert!(buffer.set_part_len(26).is_err());
    assert_eq!((buffer.header_len(), buffer.len()), (12, 13), "nothing has changed");
    buffer.set_part_len(21).expect("it has 25");
    assert_eq!((buffer.header_len(), buffer.len(), buffer.capacity()), (0, 21, 25));
    assert_eq!(places(buffer.packet()), [(0, 5), (0x100, 16)]);
}

/// Bytes are copied between parts of lists of segments, however the lists are cut.
#[test]
fn parts_of_segments_are_copied() {
    let table = table(0x1000, 64);
    let from = table.buffer([(0, 3), (0x10, 0), (0x20, 7), (0x30, 10)], 0).expect("valid");
    let to = table.buffer([(0x100, 8), (0x120, 1), (0x140, 30)], 0).expect("valid");
    assert_eq!(from.segments().copy_from(b"0123456789abcdefghij"), 20);
    assert_eq!(places(from.segments().skip_bytes(4).take_bytes(9)), [(0x21, 6), (0x30, 3)]);
    assert!(from.segments().skip_bytes(21).next().is_none());
    for bytes in 0..=21 {
        let (skipped, stepped) = (from.segments().skip_bytes(bytes), from.segments());
        let stepped = stepped.step_over(bytes / 2).step_over(bytes - bytes / 2);
        assert_eq!(places(stepped), places(skipped), "{bytes} of 20 bytes");
    }
    for (skip, len, at) in [(0, 20, 0), (4, 9, 5), (19, 1, 38), (3, 0, 0)] {
        assert_eq!(to.segments().copy_from(&[b'.'; 39]), 39);
        let part = from.segments().skip_bytes(skip).take_bytes(len);
        to.segments().skip_bytes(at).copy_from_segments(part);
        let mut seen = [0; 39];
        assert_eq!(to.segments().copy_to(&mut seen), 39);
        let mut expected = [b'.'; 39];
        expected[at..at + len].copy_from_slice(&b"0123456789abcdefghij"[skip..skip + len]);
        assert_eq!(seen, expected, "{skip} {len} {at}");
    }
}

proptest! {
    /// Buffers are made, moved through queues and dropped at random, against lists of ranges.
    #[test]
    fn buffers_keep_their_segments_and_give_their_slots_back(
        steps in prop::collection::vec(
            (0_u8..5, prop::collection::vec((0_u64..0x1000, 1_u32..64), 0..24), 0_usize..8),
            1..60,
        ),
    ) {
        const SLOTS: u32 = 24;
        let table = table(0x2000, SLOTS * 4);
        let mut kept: Vec<(GuestBuffer, Vec<(u64, u32)>)> = Vec::new();
        let regions = Regions::new(vec![pool()]).and_then(|r| r.with_segment_table(&table));
        let (sq_producer, _cq, mut sq_consumer, _cq_producer) =
            rings(Depths::new(8, 8, 1), regions.expect("two regions"), 5);
        let mut queued = VecDeque::new();
        let slots = |ranges: &Vec<(u64, u32)>| (ranges.len() as u32).div_ceil(4).max(1);
        for (step, ranges, which) in steps {
            let used: u32 = kept.iter().map(|(_, ranges)| slots(ranges)).sum::<u32>()
                + queued.iter().map(slots).sum::<u32>();
            prop_assert_eq!(table.slots_in_use(), used);
            match step {
                0 | 1 => match table.buffer(ranges.iter().copied(), 0) {
                    Ok(buffer) => kept.push((buffer, ranges)),
                    Err(error) => {
                        prop_assert_eq!(error, GuestBufferError::NoSlots);
                        prop_assert!(used + slots(&ranges) > SLOTS);
                    }
                },
                2 if !kept.is_empty() => drop(kept.swap_remove(which % kept.len())),
                3 if !kept.is_empty() => {
                    let (buffer, ranges) = kept.swap_remove(which % kept.len());
                    match sq_producer.push_guest(Class::Write, 0, buffer, 0) {
                        Ok(()) => queued.push_back(ranges),
                        Err((_, buffer)) => {
                            kept.push((buffer, ranges));
                        }
                    }
                    sq_producer.publish();
                }
                4 => {
                    sq_consumer.ready();
                    if let Some(front) = sq_consumer.front() {
                        let buffer = front.take().0.into_frame().expect_err("a guest's");
                        kept.push((buffer, queued.pop_front().expect("it was queued")));
                    }
                    sq_consumer.retire();
                }
                _ => {}
            }
            for (buffer, ranges) in &kept {
                prop_assert_eq!(&places(buffer.segments()), ranges);
            }
        }
        drop((sq_producer, _cq, sq_consumer, _cq_producer));
        kept.clear();
        prop_assert_eq!(table.slots_in_use(), 0);
    }
}

/// Goal: a guest's write that ends where it is gives its slots back before its completion is seen, one of
/// several slots too. Method: one buffer of one segment, and one of six, which takes two slots.
#[test]
fn a_guests_write_ends_in_its_queue() {
    let table = table(0x1000, 16);
    let regions = Regions::new(vec![pool()]).and_then(|r| r.with_segment_table(&table));
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(1, 3, 1), regions.expect("two regions"), u32::MAX);
    let one = table.buffer([(0, 72)], 12).expect("valid");
    let many = table.buffer((0..6).map(|i| (i * 0x100, 12)), 12).expect("valid");
    for (number, buffer) in [(1, one), (2, many)] {
        sq_producer.push_guest(Class::Write, 0, buffer, number).expect("a credit");
    }
    let skipping = table.buffer([(0, 20)], 0).expect("valid");
    sq_producer.push_guest(Class::Write, SKIP_SUCCESS, skipping, 3).expect("a credit");
    sq_producer.publish();
    sq_consumer.ready();
    let mut seen = Vec::new();
    let ended = sq_consumer.end_writes(&mut cq_producer, 9, |packet| {
        seen.extend(packet.guest().map(|guest| places(guest.packet()).len()));
        true
    });
    assert_eq!((ended, &seen[..]), (2, &[1, 5][..]));
    assert_eq!(sq_consumer.known(), 1, "one that skips its completion stays");
    cq_producer.publish();
    assert_eq!(table.slots_in_use(), 1);
    assert_eq!(cq_consumer.ready(), 2);
    let done = std::iter::from_fn(|| cq_consumer.pop()).map(|it| (it.user_data, it.len));
    assert_eq!(done.collect::<Vec<_>>(), [(1, 60), (2, 60)]);
}

/// Goal: the end of a read sets the length and the header together, or changes nothing. Method: buffers in
/// one piece and in several, with space for a header and without.
#[test]
fn the_end_of_a_filling_sets_the_length_and_the_header() {
    let table = table(0x1000, 64);
    let whole: &[(u64, u32)] = &[(0x100, 52)];
    let pieces: &[(u64, u32)] = &[(0x200, 7), (0x300, 45)];
    for (ranges, header_len) in [(whole, 12), (whole, 0), (pieces, 12), (pieces, 0)] {
        let mut buffer = table.buffer(ranges.iter().copied(), header_len).expect("valid");
        let room = 52 - header_len as usize;
        assert!(buffer.end_filling(room + 1, b"headerheader").is_err());
        assert_eq!(buffer.len(), room);
        assert_ne!(buffer.header(), Some(*b"headerheader"));
        for len in [0, room] {
            buffer.end_filling(len, b"headerheader").expect("it has space");
            assert_eq!(buffer.len(), len);
        }
        assert_eq!(buffer.header(), (header_len > 0).then_some(*b"headerheader"));
        let mut first = [0; 12];
        assert_eq!(buffer.segments().copy_to(&mut first), 12);
        assert_eq!(&first == b"headerheader", header_len > 0, "nothing else is written");
        assert!(buffer.set_header(&[0; 12]) == (header_len > 0));
    }
}

/// Goal: the entry of a buffer says whether it is in one piece, however it was made and whatever became of its
/// length. Method: lists of none, one and several segments, with empty ranges between.
#[test]
fn one_segment_is_one_piece() {
    let mut table = table(0x1000, 64);
    let memory = table.memory().clone();
    let slice = |address, len| memory.slice(address, len).expect("it is in the region");
    let ranges: [&[(u64, u32)]; 5] = [
        &[],
        &[(8, 0)],
        &[(8, 0), (16, 40), (9, 0)],
        &[(16, 20), (64, 20)],
        &[(0, 8), (8, 8), (16, 8), (24, 8), (32, 8), (40, 8)],
    ];
    for ranges in ranges {
        let segments = ranges.iter().filter(|(_, len)| *len > 0).count();
        let one_by_one = table.buffer(ranges.iter().copied(), 0).expect("valid");
        let of_slices = ranges.iter().map(|(address, len)| slice(*address, *len));
        let together = table.buffer_of(of_slices, 0).expect("valid");
        for mut buffer in [one_by_one, together] {
            for len in [buffer.capacity(), 0] {
                buffer.set_len(len).expect("it has as many");
                assert_eq!(buffer.in_one_piece().is_some(), segments == 1, "{ranges:?}");
                assert_eq!(buffer.segments().count(), segments);
            }
            buffer.set_part_len(0).expect("any buffer has none");
            assert_eq!(buffer.in_one_piece().is_some(), segments == 1, "{ranges:?}");
        }
        assert_eq!(table.slots_in_use(), 0, "{ranges:?}");
    }
}
