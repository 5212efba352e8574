//! Model checking of what only this crate sees of a queue: changes of what its receiver accepts.

use std::sync::Arc as StdArc;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use vmring_core::offload::{Checksum, OffloadHeader, Offloads};

use crate::inbox::{Delivery, Inbox, Refused};
use crate::packet::Packet;
use crate::receive_queue::{Accepted, QueueEnd, ReceiveQueue, ReceiveQueues, Shape};
use crate::software::Left;

type Buffer = Vec<u8>;

const LEN: usize = 2;
const SPACE: usize = 12 + LEN;

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    if builder.preemption_bound.is_none() {
        builder.preemption_bound = Some(3);
    }
    builder.check(model);
}

fn make(_: Shape) -> Inbox<Buffer> {
    Inbox::with_headers(2, 1, LEN)
}

fn checksums() -> (Shape, Shape) {
    let mut offloads = Offloads::default();
    offloads.checksum = true;
    let with = Shape::new(offloads);
    let without = with.accepting(Accepted::new(Offloads::default()));
    (with, without)
}

/// A packet that leaves its checksum.
fn asking() -> OffloadHeader {
    OffloadHeader { checksum: Checksum::Partial { start: 0, offset: 0 }, ..OffloadHeader::NONE }
}

/// Sends one packet as a port's sender does: it decides by the shape, and then delivers.
fn send(queue: &ReceiveQueue<Buffer>) -> Delivery {
    let shape = queue.shape();
    let header = match shape.left_by(&asking()) {
        Left::Nothing => asking(),
        _ => OffloadHeader::NONE,
    };
    queue.deliver(shape, Packet::from(&[1, 2][..]).with_offload(&header), || true)
}

/// Takes everything out that has arrived, and checks that the receiver accepts it.
fn take(end: &mut QueueEnd<Buffer>) -> usize {
    let mut count = 0;
    while let Some(packet) = end.collector.collect() {
        let header = OffloadHeader::parse(packet.buffer.first_chunk().unwrap()).unwrap();
        assert_eq!(end.shape.left_by(&header), Left::Nothing);
        assert_eq!(packet.len, LEN);
        count += 1;
    }
    count
}

/// A receiver that changes what it accepts while a packet comes: the packet arrives once, in the form
/// that is accepted when it comes out, or its sender is told that it was dropped.
#[test]
fn a_change_of_what_is_accepted_lets_nothing_else_in() {
    check(|| {
        let (with, without) = checksums();
        let queue = Arc::new(ReceiveQueue::new());
        let mut end = queue.open(with, StdArc::new(|| {}), make).unwrap();
        end.collector.reopen();
        let sender = {
            let queue = queue.clone();
            thread::spawn(move || send(&queue))
        };
        let mut dropped = 0;
        let mut arrived = 0;
        for shape in [without, with] {
            end.collector.close();
            dropped += end.change(&queue, shape, make) as usize;
            end.collector.reopen();
            end.collector.post(vec![0; SPACE]).unwrap();
            arrived += take(&mut end);
            end.collector.close();
            arrived += take(&mut end);
            end.collector.recall(drop);
            end.collector.reopen();
        }
        let sent = sender.join().unwrap();
        end.collector.post(vec![0; SPACE]).unwrap();
        arrived += take(&mut end);
        match sent {
            Delivery::Dropped(Refused::Closed | Refused::Stale) => {
                assert_eq!((arrived, dropped), (0, 0));
            }
            Delivery::Direct | Delivery::Overflow => assert_eq!(arrived + dropped, 1),
            Delivery::Dropped(refused) => panic!("{refused:?}"),
        }
    });
}

/// Sends one packet to one of several queues, as a port's sender does.
fn send_to_one(queues: &ReceiveQueues<Buffer>, flow: u64) -> Option<usize> {
    for _ in 0..=2 {
        let (number, queue) = queues.pick(|| flow)?;
        let packet = [1, 2];
        match queue.deliver(queue.shape(), Packet::from(&packet[..]), || true) {
            Delivery::Direct | Delivery::Overflow => return Some(number),
            Delivery::Dropped(Refused::Closed) => {}
            Delivery::Dropped(refused) => panic!("{refused:?}"),
        }
    }
    None
}

/// A queue that closes while a packet comes, and opens again: the packet is in one queue, and it is never
/// refused, because the other one is open all the time.
#[test]
fn a_queue_that_closes_gives_a_packet_to_the_other() {
    for flow in [1, 2] {
        check(move || {
            let (with, _) = checksums();
            let queues = Arc::new(ReceiveQueues::new());
            let mut ends: Vec<_> = [0, 1]
                .map(|number| {
                    let queue: &ReceiveQueue<Buffer> = queues.get(number).unwrap();
                    let mut end = queue.open(with, StdArc::new(|| {}), make).unwrap();
                    end.collector.reopen();
                    end.collector.post(vec![0; SPACE]).unwrap();
                    queues.set_open(number, true);
                    end
                })
                .into();
            let sender = {
                let queues = queues.clone();
                thread::spawn(move || send_to_one(&queues, flow))
            };
            // As `Receiver::close` and `reopen` do.
            queues.set_open(0, false);
            ends[0].collector.close();
            let early = take(&mut ends[0]);
            ends[0].collector.reopen();
            queues.set_open(0, true);
            let number = sender.join().unwrap().expect("one queue is open");
            let arrived = [early + take(&mut ends[0]), take(&mut ends[1])];
            assert_eq!(arrived[number], 1);
            assert_eq!(arrived[1 - number], 0);
        });
    }
}

/// A port that leaves, and another one that takes its place, while a packet comes for the first: the other
/// one never gets it. The entry of the table is a number, which is set and cleared as `pin` and `forget`
/// do.
#[test]
fn a_port_that_takes_a_place_gets_no_packet_for_the_one_before() {
    check(|| {
        let (with, without) = checksums();
        let queue = Arc::new(ReceiveQueue::new());
        let entry = Arc::new(AtomicU64::new(0));
        let join = |shape, address| {
            let mut end = queue.open(shape, StdArc::new(|| {}), make).unwrap();
            end.collector.reopen();
            entry.store(address, Ordering::Release);
            end
        };
        let mut first = join(with, 1);
        first.collector.post(vec![0; SPACE]).unwrap();
        let sender = {
            let (queue, entry) = (queue.clone(), entry.clone());
            thread::spawn(move || {
                // The look-up of `MacTable::locate`.
                let found = entry.load(Ordering::Relaxed);
                if found == 1 {
                    let is_for_it = || entry.load(Ordering::Acquire) == found;
                    let packet = [1, 2];
                    queue.deliver(queue.shape(), Packet::from(&packet[..]), is_for_it);
                }
            })
        };
        drop(first);
        entry.store(0, Ordering::Relaxed);
        // With buffers and without, in the same inbox and in another one.
        for (shape, buffers) in [(with, 0), (without, 1)] {
            let mut next = join(shape, 2);
            (0..buffers).for_each(|_| next.collector.post(vec![0; SPACE]).unwrap());
            assert!(!next.collector.is_ready() && !next.collector.inbox().frames_wait());
            drop(next);
            entry.store(0, Ordering::Relaxed);
        }
        let mut last = join(with, 2);
        sender.join().unwrap();
        last.collector.post(vec![0; SPACE]).unwrap();
        assert_eq!(take(&mut last), 0);
    });
}
