//! Model checking of the inbox. Loom tries every interleaving, within a preemption bound, of the
//! claims of senders with each other and with close, recall, overflow and sleep.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p vmring-embedded --test loom`
//!
//! The bound is three preemptions (`LOOM_MAX_PREEMPTIONS` overrides it).
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc as StdArc;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use vmring_core::guest::{GuestMemory, GuestRegion};
use vmring_core::offload::{Checksum, OffloadHeader};
use vmring_core::{GuestBuffer, HeapBacking, SegmentTable};
use vmring_embedded::inbox::{Collected, Collector, Delivery, Inbox, Refused};
use vmring_embedded::packet::{Packet, PacketBuffer};

/// A buffer that knows its number. Loom watches accesses to it through the inbox's cells.
#[derive(Debug)]
struct Buffer {
    number: u8,
    bytes: [u8; 2],
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl PacketBuffer for Buffer {}

fn buffer(number: u8) -> Buffer {
    Buffer { number, bytes: [0; 2] }
}

fn open(depth: u32, overflow: u32) -> (Arc<Inbox<Buffer>>, Collector<Buffer>) {
    // Every index starts just below its wrap.
    let inbox = Arc::new(Inbox::starting_at(depth, overflow, 2, u32::MAX));
    let collector = Inbox::open(&inbox, StdArc::new(|| {})).unwrap();
    (inbox, collector)
}

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    if builder.preemption_bound.is_none() {
        builder.preemption_bound = Some(3);
    }
    builder.check(model);
}

/// Collects until it has `count` packets, and returns their bytes.
fn collect(collector: &mut Collector<Buffer>, count: usize) -> Vec<[u8; 2]> {
    let mut seen = Vec::new();
    while seen.len() < count {
        match collector.collect() {
            Some(packet) => {
                assert_eq!(packet.len, 2);
                seen.push(packet.buffer.bytes);
            }
            None => thread::yield_now(),
        }
    }
    seen
}

#[test]
fn two_senders_lose_nothing_and_keep_their_order() {
    check(|| {
        let (inbox, mut collector) = open(4, 0);
        for number in 0..3 {
            collector.post(buffer(number)).unwrap();
        }
        let other = {
            let inbox = inbox.clone();
            thread::spawn(move || assert_eq!(inbox.deliver(&[2, 0]), Delivery::Direct))
        };
        let first = {
            let inbox = inbox.clone();
            thread::spawn(move || {
                assert_eq!(inbox.deliver(&[1, 0]), Delivery::Direct);
                assert_eq!(inbox.deliver(&[1, 1]), Delivery::Direct);
            })
        };
        let seen = collect(&mut collector, 3);
        let of_first: Vec<_> = seen.iter().filter(|p| p[0] == 1).map(|p| p[1]).collect();
        assert_eq!(of_first, [0, 1]);
        assert!(seen.contains(&[2, 0]));
        other.join().unwrap();
        first.join().unwrap();
    });
}

/// A packet that waits has its header with it, and one that does not wait too.
#[test]
fn a_header_arrives_with_its_packet_whichever_way_it_takes() {
    check(|| {
        let inbox = Arc::new(Inbox::with_headers(2, 1, 2));
        let mut collector = Inbox::open(&inbox, StdArc::new(|| {})).unwrap();
        collector.post(vec![0xee; 14]).unwrap();
        let send = |id: u8| {
            let inbox = inbox.clone();
            thread::spawn(move || {
                let checksum = Checksum::Partial { start: id.into(), offset: 0 };
                let header = OffloadHeader { checksum, ..OffloadHeader::NONE };
                let bytes = [id, id];
                let packet = Packet::from(&bytes[..]).with_offload(&header);
                assert!(!matches!(inbox.deliver_packet(packet), Delivery::Dropped(_)));
            })
        };
        let senders = [send(1), send(2)];
        let mut seen = Vec::new();
        while seen.len() < 2 {
            match collector.collect() {
                Some(Collected { buffer, len: 2, .. }) => {
                    let header = OffloadHeader::parse(buffer.first_chunk().unwrap()).unwrap();
                    let id = buffer[12];
                    let checksum = Checksum::Partial { start: id.into(), offset: 0 };
                    assert_eq!((header.checksum, buffer[13]), (checksum, id));
                    seen.push(id);
                    collector.post(buffer).unwrap();
                }
                Some(packet) => panic!("{packet:?}"),
                None => thread::yield_now(),
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, [1, 2]);
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
}

#[test]
fn after_close_no_sender_touches_a_buffer_and_each_comes_back_once() {
    check(|| {
        let (inbox, mut collector) = open(2, 1);
        collector.post(buffer(0)).unwrap();
        collector.post(buffer(1)).unwrap();
        let senders: Vec<_> = (0..2u8)
            .map(|id| {
                let inbox = inbox.clone();
                thread::spawn(move || inbox.deliver(&[id, id]))
            })
            .collect();
        collector.close();
        let mut back = Vec::new();
        let mut packets = 0;
        while let Some(packet) = collector.collect() {
            packets += 1;
            back.push(packet.buffer);
        }
        collector.recall(|buffer| back.push(buffer));
        assert_eq!(collector.posted(), 0);
        // Loom reports a sender that still writes here.
        back.iter_mut().for_each(|buffer| buffer.bytes = [9, 9]);
        let mut numbers: Vec<_> = back.iter().map(|buffer| buffer.number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1]);
        drop(collector);
        let delivered = senders
            .into_iter()
            .map(|sender| sender.join().unwrap())
            .filter(|delivery| {
                assert!(*delivery != Delivery::Dropped(Refused::NoBuffer));
                *delivery == Delivery::Direct
            })
            .count();
        assert_eq!(delivered, packets);
    });
}

#[test]
fn a_reopened_inbox_serves_its_new_owner_though_an_old_sender_is_late() {
    check(|| {
        let (inbox, mut collector) = open(1, 1);
        collector.post(buffer(0)).unwrap();
        let late = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.deliver(&[7, 7]))
        };
        drop(collector);
        let mut collector = Inbox::open(&inbox, StdArc::new(|| {})).unwrap();
        collector.post(buffer(1)).unwrap();
        let late = late.join().unwrap();
        let got = collector.collect();
        if let Some(packet) = &got {
            // The late frame came in time for the new owner, who gets it as a complete packet.
            assert_eq!((packet.buffer.number, packet.buffer.bytes), (1, [7, 7]));
            assert!(matches!(late, Delivery::Direct | Delivery::Overflow));
        }
        assert!(collector.collect().is_none());
        let posted = usize::from(got.is_none());
        assert_eq!(collector.recall(|_| {}), posted);
    });
}

#[test]
fn a_recall_takes_back_each_unclaimed_buffer_and_drops_no_packet() {
    check(|| {
        let (inbox, mut collector) = open(2, 1);
        collector.post(buffer(0)).unwrap();
        collector.post(buffer(1)).unwrap();
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.deliver(&[5, 5]))
        };
        let mut back = Vec::new();
        collector.recall(|buffer| back.push(buffer));
        // Loom reports a sender that still writes here.
        back.iter_mut().for_each(|buffer| buffer.bytes = [9, 9]);
        if back.len() == 2 {
            // Whatever the sender does from now on, it needs a new buffer.
            collector.post(buffer(2)).unwrap();
        }
        let packet = loop {
            match collector.collect() {
                Some(packet) => break packet,
                None => thread::yield_now(),
            }
        };
        assert_eq!(packet.buffer.bytes, [5, 5]);
        assert_eq!(packet.buffer.number, if back.len() == 2 { 2 } else { 0 });
        assert_ne!(sender.join().unwrap(), Delivery::Dropped(Refused::NoBuffer));
        assert!(collector.collect().is_none());
        assert_eq!(collector.posted(), 0);
    });
}

/// One sender, three buffers, no overflow ring. Whichever buffer is taken back, and whatever the
/// sender has claimed by that time, its frames get the other buffers, in order.
fn recall_one(target: u8) {
    check(move || {
        let (inbox, mut collector) = open(4, 0);
        for number in 0..3 {
            collector.post(buffer(number)).unwrap();
        }
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || {
                for number in 0..2 {
                    assert_eq!(inbox.deliver(&[5, number]), Delivery::Direct);
                }
            })
        };
        let mut back = Vec::new();
        collector.recall_if(|buffer| buffer.number == target, |buffer| back.push(buffer));
        // Loom reports a sender that still writes here.
        back.iter_mut().for_each(|buffer| buffer.bytes = [9, 9]);
        assert!(back.iter().all(|buffer| buffer.number == target));
        let mut left: Vec<_> = (0..3).filter(|n| back.is_empty() || *n != target).collect();
        for number in 0..2 {
            let packet = loop {
                match collector.collect() {
                    Some(packet) => break packet,
                    None => thread::yield_now(),
                }
            };
            assert_eq!((packet.buffer.number, packet.buffer.bytes), (left.remove(0), [5, number]));
        }
        sender.join().unwrap();
        assert_eq!(collector.posted(), left.len());
        assert_eq!(collector.recall(|buffer| assert_eq!(buffer.number, left[0])), left.len());
    });
}

#[test]
fn recalling_the_first_buffer_leaves_the_others_to_the_sender() {
    recall_one(0);
}

#[test]
fn recalling_the_last_buffer_leaves_the_others_to_the_sender() {
    recall_one(2);
}

#[test]
fn recalling_what_is_not_there_leaves_all_to_the_sender() {
    recall_one(7);
}

/// A `recall_if` runs while frames wait in the overflow ring. The sender pushes more, or finds a
/// buffer.
#[test]
fn recalling_one_in_overflow_loses_nothing_and_keeps_the_order() {
    check(|| {
        let (inbox, mut collector) = open(4, 2);
        assert_eq!(inbox.deliver(&[1, 0]), Delivery::Overflow);
        for number in 0..3 {
            collector.post(buffer(number)).unwrap();
        }
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || {
                assert!(!matches!(inbox.deliver(&[1, 1]), Delivery::Dropped(_)));
            })
        };
        let mut back = Vec::new();
        collector.recall_if(|buffer| buffer.number == 1, |buffer| back.push(buffer.number));
        assert_eq!(back, [1]);
        assert_eq!(collect(&mut collector, 2), [[1, 0], [1, 1]]);
        sender.join().unwrap();
        assert_eq!(collector.posted(), 0);
    });
}

#[test]
fn entering_and_leaving_overflow_keeps_the_order_of_a_sender() {
    check(|| {
        let (inbox, mut collector) = open(2, 2);
        collector.post(buffer(0)).unwrap();
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || {
                for number in 0..3 {
                    assert!(!matches!(inbox.deliver(&[1, number]), Delivery::Dropped(_)));
                }
            })
        };
        let mut seen = collect(&mut collector, 1);
        collector.post(buffer(1)).unwrap();
        collector.post(buffer(2)).unwrap();
        seen.extend(collect(&mut collector, 2));
        assert_eq!(seen, [[1, 0], [1, 1], [1, 2]]);
        sender.join().unwrap();
    });
}

#[test]
fn two_senders_share_the_overflow_ring() {
    check(|| {
        let (inbox, mut collector) = open(2, 2);
        let senders: Vec<_> = (0..2u8)
            .map(|id| {
                let inbox = inbox.clone();
                thread::spawn(move || {
                    assert!(!matches!(inbox.deliver(&[id, id]), Delivery::Dropped(_)))
                })
            })
            .collect();
        collector.post(buffer(0)).unwrap();
        collector.post(buffer(1)).unwrap();
        let mut seen = collect(&mut collector, 2);
        seen.sort_unstable();
        assert_eq!(seen, [[0, 0], [1, 1]]);
        for sender in senders {
            sender.join().unwrap();
        }
    });
}

/// The receiver sleeps only if the sender's ring will wake it. With `first_in_overflow` the frame
/// goes through the overflow ring.
fn sleep_against_ring(first_in_overflow: bool) {
    check(move || {
        let inbox = Arc::new(Inbox::starting_at(2, 2, 2, u32::MAX));
        let woken = Arc::new(AtomicUsize::new(0));
        let mut collector = {
            let woken = woken.clone();
            Inbox::open(
                &inbox,
                StdArc::new(move || {
                    woken.fetch_add(1, Ordering::Release);
                }),
            )
            .unwrap()
        };
        if first_in_overflow {
            assert_eq!(inbox.deliver(&[0, 0]), Delivery::Overflow);
        }
        collector.post(buffer(0)).unwrap();
        collector.post(buffer(1)).unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let sender = {
            let (inbox, done) = (inbox.clone(), done.clone());
            thread::spawn(move || {
                assert!(!matches!(inbox.deliver(&[1, 1]), Delivery::Dropped(_)));
                inbox.ring();
                done.store(true, Ordering::Release);
            })
        };
        if first_in_overflow {
            assert_eq!(collect(&mut collector, 1), [[0, 0]]);
        }
        loop {
            if let Some(packet) = collector.collect() {
                assert_eq!(packet.buffer.bytes, [1, 1]);
                break;
            }
            if collector.arm() {
                // The receiver sleeps. When the sender has ended, it must have called the callback.
                while !done.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                assert_eq!(woken.load(Ordering::Acquire), 1, "a wake-up was lost");
                assert!(!collector.disarm());
            }
        }
        sender.join().unwrap();
        assert!(woken.load(Ordering::Acquire) <= 1, "one ring, one wake-up at most");
    });
}

#[test]
fn no_wake_up_is_lost_on_the_direct_way() {
    sleep_against_ring(false);
}

#[test]
fn no_wake_up_is_lost_on_the_way_through_overflow() {
    sleep_against_ring(true);
}

#[test]
fn claims_of_several_buffers_share_the_inbox_with_single_ones() {
    check(|| {
        let (inbox, mut collector) = open(4, 1);
        (0..3).for_each(|number| collector.stage(buffer(number)).unwrap());
        collector.publish();
        let run = {
            let inbox = inbox.clone();
            thread::spawn(move || {
                let mut claim = inbox.claim(2).expect("three are posted, and the other takes one");
                let count = claim.left();
                (0..count as u8).for_each(|number| assert!(claim.fill(&[1, number])));
                count
            })
        };
        let one = {
            let inbox = inbox.clone();
            thread::spawn(move || assert_eq!(inbox.deliver(&[2, 0]), Delivery::Direct))
        };
        let seen = collect(&mut collector, 3);
        assert_eq!(run.join().unwrap(), 2);
        one.join().unwrap();
        let of_run: Vec<_> = seen.iter().filter(|p| p[0] == 1).map(|p| p[1]).collect();
        assert_eq!(of_run, [0, 1]);
    });
}

/// A close waits for a whole claim. Frames that were claimed before it arrive, later ones are
/// refused.
#[test]
fn a_close_waits_for_all_buffers_of_a_claim() {
    check(|| {
        let (inbox, mut collector) = open(2, 0);
        (0..2).for_each(|number| collector.post(buffer(number)).unwrap());
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || match inbox.claim(2) {
                Some(mut claim) => {
                    assert!(claim.fill(&[1, 0]) && claim.fill(&[1, 1]));
                    2
                }
                None => 0,
            })
        };
        collector.close();
        let mut packets = 0;
        let mut back = Vec::new();
        while let Some(packet) = collector.collect() {
            assert_eq!(packet.buffer.bytes, [1, packets]);
            packets += 1;
            back.push(packet.buffer);
        }
        collector.recall(|buffer| back.push(buffer));
        // Loom reports a sender that still writes here.
        back.iter_mut().for_each(|buffer| buffer.bytes = [9, 9]);
        assert_eq!(back.len(), 2);
        assert_eq!(sender.join().unwrap(), packets);
    });
}

/// A close waits for the copy of a frame that has its place in the overflow ring. A frame that was
/// accepted before the close is there when `close` returns, and a later one is refused.
#[test]
fn a_close_waits_for_copies_into_the_overflow_ring() {
    check(|| {
        let (inbox, mut collector) = open(1, 1);
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.deliver(&[5, 5]))
        };
        collector.close();
        collector.post(buffer(0)).unwrap();
        // No yield and no second try: what arrived must be there at once.
        let packet = collector.collect().map(|packet| packet.buffer.bytes);
        match sender.join().unwrap() {
            Delivery::Overflow => assert_eq!(packet, Some([5, 5])),
            delivery => assert_eq!((delivery, packet), (Delivery::Dropped(Refused::Closed), None)),
        }
    });
}

/// The inbox's new owner does not take a frame that was discarded for one that is still being
/// copied into the same cell of the overflow ring.
#[test]
fn a_discarded_frame_is_not_taken_for_the_next_in_its_cell() {
    check(|| {
        let (inbox, mut collector) = open(1, 1);
        assert_eq!(inbox.deliver(&[1, 1]), Delivery::Overflow);
        assert_eq!(collector.discard(drop), 1);
        collector.reopen();
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || assert!(!matches!(inbox.deliver(&[2, 2]), Delivery::Dropped(_))))
        };
        collector.post(buffer(0)).unwrap();
        assert_eq!(collect(&mut collector, 1), [[2, 2]]);
        sender.join().unwrap();
    });
}

/// A frame is discarded whose sender was still copying it when the close began. The sender of the
/// next frame in its cell writes after that one; loom reports it if not.
#[test]
fn a_discarded_copy_ends_before_the_next_in_its_cell() {
    check(|| {
        let (inbox, mut collector) = open(1, 1);
        let late = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.deliver(&[1, 1]))
        };
        let dropped = collector.discard(drop);
        collector.reopen();
        let next = inbox.deliver(&[2, 2]);
        let late = late.join().unwrap();
        collector.post(buffer(0)).unwrap();
        let packet = collector.collect().map(|packet| packet.buffer.bytes);
        // The late sender may also have come after the reopening.
        let expected = if next == Delivery::Overflow { [2, 2] } else { [1, 1] };
        assert_eq!(packet, Some(expected));
        assert!(dropped == 0 || (late, next) == (Delivery::Overflow, Delivery::Overflow));
    });
}

/// A receiver that hears from `is_ready` that there is a packet finds it when it collects, although
/// the packet's sender has not yet raised the hint that `collect` looks at.
#[test]
fn what_is_ready_can_be_collected_at_once() {
    check(|| {
        let (inbox, mut collector) = open(1, 1);
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || assert!(!matches!(inbox.deliver(&[5, 5]), Delivery::Dropped(_))))
        };
        collector.post(buffer(0)).unwrap();
        if collector.is_ready() {
            assert_eq!(collector.collect().expect("it is ready").buffer.bytes, [5, 5]);
        } else {
            assert_eq!(collect(&mut collector, 1), [[5, 5]]);
        }
        sender.join().unwrap();
    });
}

/// One buffer is posted while two senders come. Each may have read how many are posted before that,
/// and who has claimed after it. One of them gets the buffer at most, and its frame arrives.
fn one_buffer_for_two_senders(second: fn(&Inbox<Buffer>) -> bool) {
    check(move || {
        let (inbox, mut collector) = open(2, 0);
        let senders = [
            {
                let inbox = inbox.clone();
                thread::spawn(move || inbox.deliver(&[1, 1]) == Delivery::Direct)
            },
            {
                let inbox = inbox.clone();
                thread::spawn(move || second(&inbox))
            },
        ];
        collector.post(buffer(0)).unwrap();
        let direct = senders.map(|sender| sender.join().unwrap());
        let packet = collector.collect().map(|packet| (packet.len, packet.buffer.bytes));
        match direct {
            [false, false] => assert_eq!(packet, None),
            [true, false] => assert_eq!(packet, Some((2, [1, 1]))),
            [false, true] => assert_eq!(packet, Some((2, [2, 2]))),
            [true, true] => panic!("two frames in one buffer"),
        }
        assert!(collector.collect().is_none());
    });
}

#[test]
fn two_frames_do_not_share_the_buffer_that_is_posted_meanwhile() {
    one_buffer_for_two_senders(|inbox| inbox.deliver(&[2, 2]) == Delivery::Direct);
}

#[test]
fn a_claim_takes_no_buffer_that_is_not_posted() {
    one_buffer_for_two_senders(|inbox| {
        inbox.claim(2).is_some_and(|mut claim| {
            assert_eq!(claim.left(), 1);
            claim.fill(&[2, 2])
        })
    });
}

/// The receiver takes its buffers back one at a time, and posts another in between. A sender that
/// waits for the first choice and goes on after the second claims no cell without a buffer.
#[test]
fn recalling_twice_leaves_no_cell_to_a_sender_that_waited() {
    check(|| {
        let (inbox, mut collector) = open(2, 0);
        collector.post(buffer(0)).unwrap();
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.deliver(&[5, 5]))
        };
        let mut back = Vec::new();
        collector.recall_if(|_| true, |buffer| back.push(buffer.number));
        collector.post(buffer(1)).unwrap();
        collector.recall_if(|_| true, |buffer| back.push(buffer.number));
        let delivery = sender.join().unwrap();
        match collector.collect() {
            Some(packet) => {
                assert_eq!((delivery, packet.buffer.bytes), (Delivery::Direct, [5, 5]));
                back.push(packet.buffer.number);
            }
            None => assert_eq!(delivery, Delivery::Dropped(Refused::NoBuffer)),
        }
        back.sort_unstable();
        assert_eq!(back, [0, 1]);
    });
}

/// An inbox that one thread leaves and another opens: the new owner goes on where the last one
/// stopped, and loom reports if the two touch a cell at once.
#[test]
fn a_new_owner_sees_what_the_last_one_left() {
    check(|| {
        let (inbox, mut collector) = open(1, 0);
        let leaving = thread::spawn(move || {
            collector.post(buffer(0)).unwrap();
            drop(collector);
        });
        if let Some(mut collector) = Inbox::open(&inbox, StdArc::new(|| {})) {
            collector.post(buffer(1)).unwrap();
            assert_eq!(inbox.deliver(&[7, 7]), Delivery::Direct);
            let packet = collector.collect().unwrap();
            assert_eq!((packet.buffer.number, packet.buffer.bytes), (1, [7, 7]));
        }
        leaving.join().unwrap();
    });
}

/// A buffer of two bytes in the memory of a guest.
#[derive(Debug)]
struct Small(GuestBuffer);

impl AsMut<[u8]> for Small {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut []
    }
}

impl PacketBuffer for Small {
    fn guest(&self) -> Option<&GuestBuffer> {
        Some(&self.0)
    }
}

/// An inbox for frames of up to four bytes, with `posted` buffers that each have space for two.
fn open_small(posted: u64, overflow: u32) -> (Arc<Inbox<Small>>, Collector<Small>, SegmentTable) {
    let region = GuestRegion::new(0, StdArc::new(HeapBacking::new(16)));
    let memory = GuestMemory::new([region]).expect("a region");
    let table = SegmentTable::new(memory, 16).expect("a table");
    let inbox = Arc::new(Inbox::starting_at(4, overflow, 4, u32::MAX));
    let mut collector = Inbox::open(&inbox, StdArc::new(|| {})).unwrap();
    (0..posted).for_each(|place| collector.post(small(&table, place)).unwrap());
    (inbox, collector, table)
}

fn small(table: &SegmentTable, place: u64) -> Small {
    Small(table.buffer([(2 * place, 2)], 0).expect("it is memory"))
}

/// The bytes of a part, and whether the packet goes on.
fn part(packet: Collected<Small>) -> (Vec<u8>, bool) {
    let mut bytes = [0; 2];
    packet.buffer.0.segments().copy_to(&mut bytes);
    (bytes[..packet.len].to_vec(), packet.more)
}

/// A close finds all parts of a packet or none, and no sender writes afterwards.
#[test]
fn a_close_splits_no_packet() {
    check(|| {
        let (inbox, mut collector, table) = open_small(3, 0);
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.deliver(&[1, 2, 3, 4]))
        };
        collector.close();
        // No yield and no second try: what was claimed must be there at once.
        let mut parts = Vec::new();
        while let Some(packet) = collector.collect() {
            parts.push(part(packet));
        }
        let mut left = 0;
        collector.recall(|_| left += 1);
        // Nobody writes any more, so what is written here stays.
        table.memory().slice(0, 6).unwrap().copy_from(&[9; 6]);
        match sender.join().unwrap() {
            Delivery::Direct => {
                assert_eq!(parts, [(vec![1, 2], true), (vec![3, 4], false)]);
                assert_eq!(left, 1);
            }
            delivery => {
                assert_eq!(delivery, Delivery::Dropped(Refused::Closed));
                assert_eq!((parts.len(), left), (0, 3));
            }
        }
        assert_eq!(table.memory().slice(0, 6).unwrap().read(), Some([9; 6]));
    });
}

/// A recall takes back what no packet has claimed, and leaves all parts of a packet or none.
#[test]
fn a_recall_splits_no_packet() {
    check(|| {
        let (inbox, mut collector, table) = open_small(3, 1);
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.deliver(&[1, 2, 3, 4]))
        };
        let mut left = 0;
        collector.recall(|_| left += 1);
        match sender.join().unwrap() {
            Delivery::Direct => assert_eq!(left, 1),
            delivery => {
                assert_eq!((delivery, left), (Delivery::Overflow, 3));
                // One buffer is too few: the packet stays where it is.
                collector.post(small(&table, 4)).unwrap();
                assert!(collector.collect().is_none());
                collector.post(small(&table, 5)).unwrap();
            }
        }
        assert_eq!(collector.collect().map(part), Some((vec![1, 2], true)));
        assert_eq!(collector.collect().map(part), Some((vec![3, 4], false)));
        assert!(collector.collect().is_none() && collector.posted() == 0);
    });
}

/// Packets of two senders do not mix.
#[test]
fn packets_of_several_buffers_do_not_mix() {
    check(|| {
        let (inbox, mut collector, _table) = open_small(4, 0);
        let senders: Vec<_> = [[1, 1, 1, 1], [2, 2, 2, 2]]
            .into_iter()
            .map(|packet| {
                let inbox = inbox.clone();
                thread::spawn(move || assert_eq!(inbox.deliver(&packet), Delivery::Direct))
            })
            .collect();
        let mut seen = Vec::new();
        while seen.len() < 2 {
            let Some(packet) = collector.collect() else {
                thread::yield_now();
                continue;
            };
            let (bytes, more) = part(packet);
            let (rest, end) = part(collector.collect().expect("the rest is there at once"));
            assert!(more && !end && bytes == rest, "{bytes:?} {rest:?}");
            seen.push(bytes[0]);
        }
        seen.sort_unstable();
        assert_eq!(seen, [1, 2]);
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
}

/// A choice among the buffers splits no packet, and leaves the others to the sender.
#[test]
fn a_choice_splits_no_packet() {
    check(|| {
        let (inbox, mut collector, _table) = open_small(3, 0);
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || assert_eq!(inbox.deliver(&[1, 2, 3, 4]), Delivery::Direct))
        };
        let second = |small: &mut Small| small.0.segments().next().unwrap().guest_address() == 2;
        let mut taken = 0;
        collector.recall_if(second, |_| taken += 1);
        sender.join().unwrap();
        assert_eq!(collector.collect().map(part), Some((vec![1, 2], true)));
        assert_eq!(collector.collect().map(part), Some((vec![3, 4], false)));
        assert!(collector.collect().is_none());
        assert_eq!(collector.posted() + taken, 1);
    });
}

/// A collector that gives up a frame for which the buffers are too few finds the next one, and a sender
/// that comes meanwhile loses nothing.
#[test]
fn a_frame_that_is_given_up_does_not_hold_up_the_next() {
    check(|| {
        let (inbox, mut collector, _table) = open_small(1, 2);
        assert_eq!(inbox.deliver(&[1, 2, 3, 4]), Delivery::Overflow);
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || {
                let delivery = inbox.deliver(&[5, 6]);
                inbox.ring();
                delivery
            })
        };
        while collector.arm() {
            thread::yield_now();
            collector.disarm();
        }
        assert_eq!(collector.take_dropped(), 1);
        assert_eq!(collector.collect().map(part), Some((vec![5, 6], false)));
        assert!(!matches!(sender.join().unwrap(), Delivery::Dropped(_)));
    });
}

/// As `open_small`, where the copy of this number panics, once. Copies count from 1: one for each part
/// of a packet, and one for a packet that goes to the overflow ring.
fn open_mortal(
    posted: u64,
    overflow: u32,
    dies_at: u32,
) -> (Arc<Inbox<Small>>, Collector<Small>, SegmentTable) {
    let (inbox, collector, table) = open_small(posted, overflow);
    inbox.die_at(dies_at);
    (inbox, collector, table)
}

/// Delivers a packet. `None` if the sender died of it.
fn deliver_or_die(inbox: &Inbox<Small>, packet: &[u8]) -> Option<Delivery> {
    catch_unwind(AssertUnwindSafe(|| inbox.deliver(packet))).ok()
}

/// The parts of a packet of two buffers whose sender died.
fn dead() -> [(Vec<u8>, bool); 2] {
    [(Vec::new(), true), (Vec::new(), false)]
}

/// A close finds all buffers of a packet whose sender dies, at whichever part, and waits for none.
#[test]
fn a_close_survives_the_death_of_a_sender() {
    for dies_at in [1, 2] {
        check(move || {
            let (inbox, mut collector, table) = open_mortal(3, 0, dies_at);
            let sender = {
                let inbox = inbox.clone();
                thread::spawn(move || deliver_or_die(&inbox, &[1, 2, 3, 4]))
            };
            collector.close();
            let mut parts = Vec::new();
            while let Some(packet) = collector.collect() {
                parts.push(part(packet));
            }
            let left = collector.recall(drop);
            assert_eq!(collector.posted(), 0);
            match sender.join().unwrap() {
                None => assert_eq!((&parts[..], left), (&dead()[..], 1)),
                Some(delivery) => {
                    assert_eq!(delivery, Delivery::Dropped(Refused::Closed));
                    assert_eq!((parts.len(), left), (0, 3));
                }
            }
            drop(table);
        });
    }
}

/// A recall leaves a packet whose sender dies whole or not at all, and takes each other buffer once.
#[test]
fn a_recall_survives_the_death_of_a_sender() {
    for dies_at in [1, 2] {
        check(move || {
            let (inbox, mut collector, _table) = open_mortal(3, 0, dies_at);
            let sender = {
                let inbox = inbox.clone();
                thread::spawn(move || deliver_or_die(&inbox, &[1, 2, 3, 4]))
            };
            let left = collector.recall(drop);
            let packet = match sender.join().unwrap() {
                None => dead().map(Some),
                Some(delivery) => {
                    assert_eq!(delivery, Delivery::Dropped(Refused::NoBuffer));
                    [None, None]
                }
            };
            assert_eq!(left, if packet[0].is_some() { 1 } else { 3 });
            assert_eq!([(); 2].map(|()| collector.collect().map(part)), packet);
            assert!(collector.collect().is_none() && collector.posted() == 0);
        });
    }
}

/// A sender dies of a frame that goes to the overflow ring. A close ends, the frame has no bytes, and
/// the frame of another sender arrives.
#[test]
fn the_overflow_ring_survives_the_death_of_a_sender() {
    check(|| {
        let (inbox, mut collector, table) = open_mortal(0, 2, 1);
        let senders: Vec<_> = [[1, 1], [2, 2]]
            .into_iter()
            .map(|packet| {
                let inbox = inbox.clone();
                thread::spawn(move || deliver_or_die(&inbox, &packet))
            })
            .collect();
        collector.close();
        (0..2).for_each(|place| collector.post(small(&table, place)).unwrap());
        let seen: Vec<_> = core::iter::from_fn(|| collector.collect().map(part)).collect();
        let mut came = Vec::new();
        for (sender, byte) in senders.into_iter().zip(1..) {
            match sender.join().unwrap() {
                None => came.push((Vec::new(), false)),
                Some(Delivery::Overflow) => came.push((vec![byte; 2], false)),
                Some(delivery) => assert_eq!(delivery, Delivery::Dropped(Refused::Closed)),
            }
        }
        assert!(seen.len() == came.len() && seen.iter().all(|packet| came.contains(packet)));
        assert_eq!(collector.recall(drop), 2 - seen.len());
    });
}

/// A choice among the buffers ends though a sender dies meanwhile, and takes no buffer of its packet.
#[test]
fn a_choice_survives_the_death_of_a_sender() {
    for dies_at in [1, 2] {
        check(move || {
            let (inbox, mut collector, _table) = open_mortal(3, 0, dies_at);
            let sender = {
                let inbox = inbox.clone();
                thread::spawn(move || deliver_or_die(&inbox, &[1, 2, 3, 4]))
            };
            let second =
                |small: &mut Small| small.0.segments().next().unwrap().guest_address() == 2;
            let taken = collector.recall_if(second, drop);
            assert_eq!(sender.join().unwrap(), None);
            assert_eq!([(); 2].map(|()| collector.collect().map(part)), dead().map(Some));
            assert!(collector.collect().is_none());
            assert_eq!(collector.posted() + taken, 1);
        });
    }
}

/// One of two senders dies. The other's packet arrives once and whole, in its own buffers.
#[test]
fn the_death_of_a_sender_costs_its_own_packet() {
    for dies_at in [1, 2] {
        check(move || {
            let (inbox, mut collector, _table) = open_mortal(4, 0, dies_at);
            let senders: Vec<_> = [[1, 1, 1, 1], [2, 2, 2, 2]]
                .into_iter()
                .map(|packet| {
                    let inbox = inbox.clone();
                    thread::spawn(move || deliver_or_die(&inbox, &packet))
                })
                .collect();
            let mut seen = Vec::new();
            while seen.len() < 2 {
                let Some(packet) = collector.collect() else {
                    thread::yield_now();
                    continue;
                };
                let (bytes, more) = part(packet);
                let (rest, end) = part(collector.collect().expect("the rest is there at once"));
                assert!(more && !end && bytes == rest, "{bytes:?} {rest:?}");
                seen.push(bytes.first().copied());
            }
            let lives: Vec<_> = senders
                .into_iter()
                .map(|sender| match sender.join().unwrap() {
                    None => None,
                    Some(delivery) => {
                        assert_eq!(delivery, Delivery::Direct);
                        Some(())
                    }
                })
                .collect();
            // The one that lives is the one whose bytes arrived.
            let lived = lives.iter().position(Option::is_some).map(|at| at as u8 + 1);
            assert_eq!(lives.iter().flatten().count(), 1);
            seen.sort_unstable();
            assert_eq!(seen, [None, lived]);
        });
    }
}

/// A receiver dies of a frame that has waited, while a sender comes. That frame is gone, its buffers
/// come back, and the sender's frame arrives.
#[test]
fn the_death_of_a_receiver_costs_the_frame_it_moves() {
    for dies_at in [1, 2] {
        check(move || {
            // The first copy is the sender's.
            let (inbox, mut collector, table) = open_mortal(0, 2, 1 + dies_at);
            assert_eq!(inbox.deliver(&[1, 2, 3, 4]), Delivery::Overflow);
            (0..3).for_each(|place| collector.post(small(&table, place)).unwrap());
            catch_unwind(AssertUnwindSafe(|| collector.collect())).expect_err("it dies");
            let sender = {
                let inbox = inbox.clone();
                thread::spawn(move || inbox.deliver(&[5, 6]))
            };
            assert_eq!([(); 2].map(|()| collector.collect().map(part)), dead().map(Some));
            let packet = loop {
                match collector.collect() {
                    Some(packet) => break part(packet),
                    None => thread::yield_now(),
                }
            };
            assert_eq!(packet, (vec![5, 6], false));
            assert!(!matches!(sender.join().unwrap(), Delivery::Dropped(_)));
            assert_eq!(collector.posted(), 0);
        });
    }
}

/// A claim that is dropped before it is filled, against what `end` does. Its frame arrives if it has
/// one, its other buffers come back empty, and each buffer comes back once.
fn a_claim_is_dropped(filled: usize, end: fn(&mut Collector<Buffer>) -> Vec<u8>) {
    check(move || {
        let (inbox, mut collector) = open(4, 0);
        (0..3).for_each(|number| collector.post(buffer(number)).unwrap());
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || {
                let claim = inbox.claim(2).map(|mut claim| {
                    (0..filled).for_each(|_| assert!(claim.fill(&[7, 7])));
                    claim.left() + filled
                });
                claim.unwrap_or(0)
            })
        };
        let mut back = end(&mut collector);
        let claimed = sender.join().unwrap();
        for at in 0..claimed {
            let packet = collector.collect().expect("a claim ends when it is dropped");
            let expected = if at < filled { 2 } else { 0 };
            assert_eq!((packet.len, packet.more), (expected, false));
            back.push(packet.buffer.number);
        }
        assert!(collector.collect().is_none());
        collector.recall(|buffer| back.push(buffer.number));
        assert_eq!(collector.posted(), 0);
        back.sort_unstable();
        assert_eq!(back, [0, 1, 2]);
    });
}

#[test]
fn a_close_survives_a_dropped_claim() {
    for filled in [0, 1] {
        a_claim_is_dropped(filled, |collector| {
            collector.close();
            Vec::new()
        });
    }
}

#[test]
fn a_recall_survives_a_dropped_claim() {
    for filled in [0, 1] {
        a_claim_is_dropped(filled, |collector| {
            let mut back = Vec::new();
            collector.recall(|buffer| back.push(buffer.number));
            back
        });
    }
}

#[test]
fn a_choice_survives_a_dropped_claim() {
    for filled in [0, 1] {
        a_claim_is_dropped(filled, |collector| {
            let mut back = Vec::new();
            collector.recall_if(|buffer| buffer.number == 1, |buffer| back.push(buffer.number));
            back
        });
    }
}
