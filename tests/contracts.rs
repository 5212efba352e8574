//! The contracts, each a test named after it: submitting, credits, order, partial batches, cancel,
//! claims, settings, and what a third-party device can and cannot do. Closing, polling and waking
//! have modules of their own.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::{Capabilities, Io, PortForward, PostedSlot, Progress, Protocol};
use vmring::{
    Closed, ConfigError, Direction, Embedded, EntryError, Error, Frame, Interface, Ipv4Range,
    Loopback, MacAddr6, Mode, Op, Pool, PoolBuilder, RetryPolicy, Ring, Status, SubmitErrorKind,
};

use crate::support::{
    Dice, LONG, Script, ScriptQueue, Way, every_way, filled, guarded, inline, loopback, number_of,
    packet, packet_between, post, reap, reap_n, scaled, send, settle, stage, take_writes, unique,
};

/// Patience without end, for tests whose stalls are meant to end.
const PATIENT: RetryPolicy = RetryPolicy { attempts: u32::MAX, delay: Duration::from_micros(50) };

fn pool(frames: usize) -> Pool {
    PoolBuilder::new(frames, 1514).build().expect("a pool")
}

fn full(io: &mut Io<'_>) -> usize {
    io.writes()
}

// ---- Submitting ----

/// Goal: a slot is in exactly one place. Method: random operations; the slots the test holds, those
/// in flight and those in the free list always add up, and no slot comes twice.
#[test]
fn one_place_per_slot() {
    guarded(|| {
        every_way(|way, poller| {
            const FRAMES: usize = 24;
            let interface = loopback();
            let pool = pool(FRAMES);
            let mut ring = interface
                .ring(Direction::Both)
                .depth(8)
                .pool(&pool)
                .drive(way.drive(poller))
                .start_index(u32::MAX - 20)
                .build()
                .unwrap();
            let mut dice = Dice::new(way as u64 + 1);
            let mut held: Vec<Frame> = Vec::new();
            let mut cancels = 0;
            for step in 0..scaled(3000) {
                match dice.below(8) {
                    0 => held.extend(pool.alloc()),
                    1 => drop(held.pop()),
                    2 | 3 => {
                        if let Some(frame) = held.pop() {
                            held.extend(ring.submit_read(frame, step % 5).err().map(|e| e.frame));
                        }
                    }
                    4 | 5 => {
                        if let Some(mut frame) = held.pop() {
                            frame.reset();
                            frame.copy_from(&packet(step, 60)).unwrap();
                            held.extend(ring.submit_write(frame, step % 5).err().map(|e| e.frame));
                        }
                    }
                    6 => cancels += u64::from(ring.cancel(step % 5, 0).is_ok()),
                    _ => {
                        for done in ring.reap() {
                            cancels -= u64::from(done.op == Op::Cancel);
                            held.extend(done.frame());
                        }
                    }
                }
                let slots: HashSet<u32> = held.iter().map(Frame::slot).collect();
                assert_eq!(slots.len(), held.len(), "a slot is in two frames");
                let queued = ring.in_flight() as u64 - cancels;
                assert_eq!(u64::from(pool.slots_out()), held.len() as u64 + queued);
            }
            held.clear();
            ring.quiesce(LONG).unwrap();
            ring.reap().for_each(drop);
            assert_eq!(pool.slots_out(), 0);
            held.extend(std::iter::from_fn(|| pool.alloc()));
            let slots: BTreeSet<u32> = held.iter().map(Frame::slot).collect();
            assert!(slots.into_iter().eq(0..FRAMES as u32), "every slot is there once");
        });
    });
}

/// Goal: after `Ok` a completion comes, exactly one, whatever happens next. Method: one thread
/// submits until it is refused while another stops the ring at a random moment.
#[test]
fn publishing_is_the_commit_point() {
    guarded(|| {
        every_way(|way, poller| {
            for round in 0..scaled(30) {
                let interface = loopback();
                let ring = interface
                    .ring(Direction::Both)
                    .depth(8)
                    .drive(way.drive(poller))
                    .build()
                    .unwrap();
                let control = ring.control();
                let (mut sq, mut cq) = ring.into_split();
                let submitting = thread::spawn(move || {
                    for number in 0.. {
                        let mut frame = loop {
                            match sq.alloc() {
                                Some(frame) => break frame,
                                None => thread::yield_now(),
                            }
                        };
                        frame.copy_from(&packet(number, 60)).unwrap();
                        loop {
                            let sent = match number % 2 {
                                0 => sq.submit_read(frame, number),
                                _ => sq.submit_write(frame, number),
                            };
                            match sent {
                                Ok(()) => break,
                                Err(refused) if refused.is_backpressure() => {
                                    thread::yield_now();
                                    frame = refused.frame;
                                }
                                Err(refused) => {
                                    let closed = SubmitErrorKind::Closed(Closed::Stopped);
                                    assert_eq!(refused.kind, closed);
                                    return number;
                                }
                            }
                        }
                    }
                    unreachable!("it ends when it is refused");
                });
                let stop_after = 5 * (round + 1);
                let mut completed = HashSet::new();
                while completed.len() < stop_after as usize {
                    cq.wait(1, Some(Duration::from_millis(1)));
                    completed.extend(cq.reap().map(|done| done.user_data));
                }
                control.stop();
                // It may still wait for a credit: reap until it has seen that the ring is closed.
                while !submitting.is_finished() || cq.in_flight() > 0 {
                    cq.wait(1, Some(Duration::from_millis(1)));
                    for done in cq.reap() {
                        assert!(completed.insert(done.user_data), "completed twice");
                    }
                }
                let accepted = submitting.join().unwrap();
                assert_eq!(completed.len() as u64, accepted, "as many completions as submits");
                cq.close().unwrap();
            }
        });
    });
}

/// Goal: a CQE is retired before its frame exists. Method: forget frames and panic amid reaping;
/// what is lost is lost, nothing comes twice, the rest still comes.
#[test]
fn a_forgotten_completion_can_lose_its_slot_but_not_copy_it() {
    guarded(|| {
        let interface = loopback();
        let pool = pool(8);
        let mut ring = inline(&interface, Direction::Both).depth(8).pool(&pool).build().unwrap();
        for number in 0..6 {
            send(&mut ring, number);
        }
        let mut reaping = ring.reap();
        let lost = reaping.next().unwrap().frame_ok().unwrap();
        let lost_slot = lost.slot();
        std::mem::forget(lost);
        let _ = reaping;
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if let Some(done) = ring.reap().next() {
                assert_eq!(done.user_data, 1);
                std::panic::resume_unwind(Box::new("amid reaping"));
            }
        }));
        assert!(panicked.is_err());
        let rest: Vec<u64> = ring.reap().map(|done| done.user_data).collect();
        assert_eq!(rest, [2, 3, 4, 5]);
        assert_eq!(pool.slots_out(), 1, "only the forgotten frame is out");
        let frames: Vec<Frame> = std::iter::from_fn(|| pool.alloc()).collect();
        assert_eq!(frames.len(), 7);
        assert!(frames.iter().all(|frame| frame.slot() != lost_slot));
    });
}

/// Submits `frame` and checks that it comes back as it was, with `kind`.
fn refused(ring: &mut Ring, read: bool, frame: Frame, kind: SubmitErrorKind, backpressure: bool) {
    stage(format!("refusal: {kind:?}"));
    let (slot, bytes, credits) = (frame.slot(), frame.to_vec(), credits(ring));
    let in_flight = ring.in_flight();
    let result = if read { ring.submit_read(frame, 0) } else { ring.submit_write(frame, 0) };
    let refused = result.expect_err("it must be refused");
    assert_eq!(refused.kind, kind);
    assert_eq!(refused.is_backpressure(), backpressure);
    assert_eq!(refused.kind.is_backpressure(), backpressure);
    assert_eq!(refused.frame.slot(), slot);
    if !read {
        assert_eq!(refused.frame[..], bytes[..]);
    }
    assert!(!refused.to_string().is_empty());
    let now = self::credits(ring);
    assert_eq!((now, ring.in_flight()), (credits, in_flight), "a refusal changes nothing");
}

fn credits(ring: &mut Ring) -> (u32, u32) {
    let (mut sq, _) = ring.split();
    (sq.read_credits(), sq.write_credits())
}

/// Every kind of refusal, each with its frame.
#[test]
fn refusal_returns_the_frame() {
    guarded(|| {
        let interface = loopback();
        let big = PoolBuilder::new(8, 4000).build().unwrap();
        let small = PoolBuilder::new(8, 100).build().unwrap();
        let frame = |pool: &Pool, len| {
            let mut frame = pool.alloc().unwrap();
            frame.copy_from(&packet(7, len)).unwrap();
            frame
        };
        let build = |sq| {
            inline(&interface, Direction::Both).depth(2).sq_depth(sq).pool(&big).build().unwrap()
        };

        let mut ring = build(2);
        send(&mut ring, 0);
        post(&mut ring, 0);
        refused(&mut ring, false, frame(&big, 60), SubmitErrorKind::SqFull, true);
        refused(&mut ring, true, frame(&big, 60), SubmitErrorKind::SqFull, true);
        assert_eq!(ring.cancel(0, 0), Err(SubmitErrorKind::SqFull));
        drop(ring);

        let mut ring = build(8);
        for _ in 0..2 {
            send(&mut ring, 0);
            post(&mut ring, 0);
        }
        refused(&mut ring, false, frame(&big, 60), SubmitErrorKind::NoCredit, true);
        refused(&mut ring, true, frame(&big, 60), SubmitErrorKind::NoCredit, true);
        drop(reap_n(&mut ring, 4));

        let too_big = SubmitErrorKind::TooBig { len: 1515, max: 1514 };
        refused(&mut ring, false, frame(&big, 1515), too_big, false);
        let room = small.capacity() as usize;
        let too_small = SubmitErrorKind::TooSmall { room, needed: 1514 };
        refused(&mut ring, true, frame(&small, 60), too_small, false);
        refused(&mut ring, false, frame(&small, 60), SubmitErrorKind::ForeignPool, false);
        refused(&mut ring, true, frame(&pool(1), 60), SubmitErrorKind::ForeignPool, false);

        // A batch says how many went before.
        let frames = [frame(&big, 60), frame(&big, 1515), frame(&big, 60)];
        let refusal = ring.submit_writes(frames.into_iter().zip(1..)).unwrap_err();
        assert_eq!((refusal.kind, refusal.accepted), (too_big, 1));
        assert_eq!(refusal.frame.len(), 1515);
        drop(refusal);
        assert_eq!(reap_n(&mut ring, 1)[0].user_data, 1);

        ring.close().unwrap();
        let closed = SubmitErrorKind::Closed(Closed::Stopped);
        refused(&mut ring, false, frame(&big, 60), closed, false);
        refused(&mut ring, true, frame(&big, 60), closed, false);
        assert_eq!(ring.cancel(0, 0), Err(closed));
        assert_eq!(ring.cancel_all(0), Err(closed));

        let mut ring = inline(&interface, Direction::Write).pool(&big).build().unwrap();
        refused(&mut ring, true, frame(&big, 60), SubmitErrorKind::WrongDirection, false);
        drop(ring);
        let mut ring = inline(&interface, Direction::Read).pool(&big).build().unwrap();
        refused(&mut ring, false, frame(&big, 60), SubmitErrorKind::WrongDirection, false);
        drop(ring);
        assert_eq!((big.slots_out(), small.slots_out()), (0, 0));

        let failing = Script::new(|_, _| ScriptQueue::new(|_| Err(Status::InvalidAccess))).start();
        let mut ring = inline(&failing, Direction::Both).build().unwrap();
        send(&mut ring, 0);
        let done = reap_n(&mut ring, 1).remove(0);
        assert_eq!(done.result, Err(Status::InvalidAccess.into()));
        let kind = SubmitErrorKind::Closed(Closed::Failed(Status::InvalidAccess));
        refused(&mut ring, false, done.frame.unwrap(), kind, false);

        let panicking = Script::new(|_, _| {
            ScriptQueue::new(|_| std::panic::resume_unwind(Box::new("on purpose")))
        })
        .start();
        let mut ring = inline(&panicking, Direction::Both).build().unwrap();
        send(&mut ring, 0);
        let done = reap_n(&mut ring, 1).remove(0);
        assert_eq!(done.result, Err(EntryError::DevicePanicked));
        let kind = SubmitErrorKind::Closed(Closed::DevicePanicked);
        refused(&mut ring, false, done.frame.unwrap(), kind, false);
    });
}

// ---- Credits ----

/// Goal: the CQ has room for every completion there can be. Method: use every credit of every
/// kind, let everything complete, and reap nothing, twice over the wrap of the indices.
#[test]
fn the_cq_never_overflows() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring = interface
                .ring(Direction::Both)
                .read_depth(4)
                .write_depth(8)
                .cancel_depth(2)
                .drive(way.drive(poller))
                .start_index(u32::MAX - 5)
                .build()
                .unwrap();
            for _ in 0..3 {
                (0..4).for_each(|i| post(&mut ring, i));
                (0..8).for_each(|i| send(&mut ring, i));
                assert_eq!(credits(&mut ring), (0, 0));
                while ring.wait(12, Some(LONG)) < 12 {}
                assert_eq!(ring.cancel(100, 0), Ok(()));
                assert_eq!(ring.cancel_all(0), Ok(()));
                assert_eq!(ring.cancel(100, 0), Err(SubmitErrorKind::NoCredit));
                while ring.wait(14, Some(LONG)) < 14 {}
                // Nothing is reaped, so no credit has come back, though everything is complete.
                assert_eq!(credits(&mut ring), (0, 0));
                assert_eq!(reap_n(&mut ring, 14).len(), 14);
                // Four of the eight packets are still in the device: take them out.
                (0..4).for_each(|i| post(&mut ring, i));
                reap_n(&mut ring, 4);
            }
        });
    });
}

#[test]
fn a_credit_returns_when_its_completion_is_reaped() {
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).depth(4).build().unwrap();
        (0..3).for_each(|number| send(&mut ring, number));
        (0..2).for_each(|number| post(&mut ring, number));
        assert_eq!(credits(&mut ring), (2, 1));
        settle(&mut ring);
        assert_eq!(credits(&mut ring), (2, 1), "complete, but not reaped");
        assert_eq!(ring.in_flight(), 5);
        for done in reap(&mut ring) {
            drop(done);
        }
        assert_eq!(credits(&mut ring), (4, 4));
        assert_eq!(ring.in_flight(), 0);
    });
}

#[test]
fn reads_that_fill_the_ring_never_block_writes_or_cancels() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            // Reads that nobody sends to: another ring's interface has its own wire.
            let mut ring = interface
                .ring(Direction::Both)
                .depth(4)
                .frames(16)
                .cancel_depth(1)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            (0..4).for_each(|i| post(&mut ring, 10 + i));
            let frame = ring.alloc().unwrap();
            let kind = ring.submit_read(frame, 0).unwrap_err().kind;
            assert_eq!(kind, SubmitErrorKind::NoCredit);
            assert_eq!(ring.cancel(99, 1), Ok(()));
            assert_eq!(reap_n(&mut ring, 1)[0].brief(), (Op::Cancel, 1, Ok(0)));
            send(&mut ring, 2);
            let mut seen: Vec<_> = reap_n(&mut ring, 2).iter().map(|done| done.op).collect();
            seen.sort_by_key(|op| *op == Op::Write);
            assert_eq!(seen, [Op::Read, Op::Write]);
        });
    });
}

// ---- Order ----

/// Goal: packets fill the posted slots first come, first served, in the order of their arrival,
/// whether they came before or after the slots were posted.
#[test]
fn packets_complete_in_arrival_order_filling_the_longest_posted_first() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let build = |direction| {
                interface.ring(direction).drive(way.drive(poller)).retry(PATIENT).build().unwrap()
            };
            let (mut reader, mut writer) = (build(Direction::Read), build(Direction::Write));
            let (mut posted, mut arrived, mut seen) = (0, 0, 0);
            let mut dice = Dice::new(3);
            while seen < scaled(2000) {
                for _ in 0..dice.below(20).min(256 - (posted - seen)) {
                    post(&mut reader, posted);
                    posted += 1;
                }
                // No more than the loop holds, so that none has to wait.
                for _ in 0..dice.below(20).min(200_u64.saturating_sub(arrived - seen)) {
                    send(&mut writer, arrived);
                    arrived += 1;
                }
                // (An inline writer sends when it is driven.)
                writer.wait(0, None);
                let some = dice.below(2) as usize * writer.in_flight();
                for done in reap_n(&mut writer, some) {
                    assert!(done.result.is_ok());
                }
                if writer.in_flight() > 200 {
                    let n = writer.in_flight();
                    reap_n(&mut writer, n);
                }
                settle(&mut writer);
                reader.wait(usize::from(posted > seen && arrived > seen), Some(LONG));
                for done in reap(&mut reader) {
                    let frame = done.frame.unwrap();
                    assert_eq!((done.user_data, number_of(&frame)), (seen, seen));
                    seen += 1;
                }
            }
        });
    });
}

/// Goal: on a loopback, packets keep their order and fill the longest posted read first, whether they
/// go from writes to reads directly, by reads that were lent, or through the device's own queue.
/// Method: one ring, which has another beside it for a while.
#[test]
fn a_loopback_keeps_the_order_on_every_way_through_it() {
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).depth(64).build().unwrap();
        let (mut sent, mut posted) = (0, 0);
        let mut came = 0;
        let mut round = |ring: &mut Ring, writes: u64, reads: u64| {
            (sent..sent + writes).for_each(|number| send(ring, number));
            (posted..posted + reads).for_each(|number| post(ring, number));
            (sent, posted) = (sent + writes, posted + reads);
            settle(ring);
            for done in reap(ring) {
                assert!(done.result.is_ok(), "{done:?}");
                if done.op == Op::Read {
                    let number = done.frame.as_deref().map(number_of);
                    assert_eq!((done.user_data, number), (came, Some(came)), "order");
                    came += 1;
                }
            }
            assert_eq!(came, sent.min(posted), "so many have both a write and a read");
        };
        stage("directly, and the rest waits");
        round(&mut ring, 3, 1);
        round(&mut ring, 2, 1);
        round(&mut ring, 0, 2);
        stage("what waited is gone, reads are left over");
        round(&mut ring, 1, 7);
        round(&mut ring, 1, 1);
        stage("another ring writes: reads are lent");
        let mut beside = inline(&interface, Direction::Write).depth(8).build().unwrap();
        round(&mut ring, 2, 9);
        beside.close().unwrap();
        stage("alone again, with lent reads and fresh ones");
        round(&mut ring, 1, 4);
        round(&mut ring, 16, 2);
        round(&mut ring, 5, 9);
        round(&mut ring, 4, 4);
    });
}

/// Goal: the reads of a ring are there for others' packets too, and not only as many as the device
/// queues (256). Method: a reader that writes as well, first alone, then with another beside it.
#[test]
fn reads_on_a_loopback_are_there_for_every_writing_ring() {
    const COUNT: u64 = 512;
    guarded(|| {
        let interface = loopback();
        let depth = |direction| inline(&interface, direction).depth(COUNT as u32);
        let mut reader = depth(Direction::Both).build().unwrap();
        (0..COUNT).for_each(|number| post(&mut reader, number));
        settle(&mut reader);
        let mut writer = depth(Direction::Write).build().unwrap();
        settle(&mut reader);
        (0..COUNT).for_each(|number| send(&mut writer, number));
        for done in reap_n(&mut writer, COUNT as usize) {
            assert!(done.result.is_ok(), "{done:?}");
        }
        let came = reap_n(&mut reader, COUNT as usize);
        let numbers = came.iter().map(|done| done.frame.as_deref().map_or(u64::MAX, number_of));
        assert!(numbers.eq(0..COUNT), "{came:?}");
    });
}

/// Goal: the device gets writes in submission order although it takes them in odd pieces.
#[test]
fn writes_reach_the_device_in_submission_order() {
    guarded(|| {
        every_way(|way, poller| {
            let count = scaled(2000);
            let order: Arc<Mutex<Vec<u64>>> = Arc::default();
            let seen = order.clone();
            let interface = Script::new(move |_, _| {
                let (seen, mut dice) = (seen.clone(), Dice::new(5));
                ScriptQueue::new(move |io| {
                    // Some are taken, some of those put back, the rest left.
                    let mut taken = Vec::new();
                    for _ in 0..dice.below(8) {
                        taken.extend(io.take_write());
                    }
                    let keep = dice.below(taken.len() as u64 + 1) as usize;
                    for slot in taken.drain(keep..).rev() {
                        io.put_back(slot);
                    }
                    for slot in taken {
                        seen.lock().unwrap().push(number_of(slot.packet()));
                        io.complete_write(slot);
                    }
                    Ok(Progress::Idle)
                })
            })
            .limits(|caps| caps.max_write_batch = 5)
            .start();
            let mut ring = interface
                .ring(Direction::Write)
                .write_depth(64)
                .retry(PATIENT)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let (mut sent, mut completed) = (0, 0);
            while completed < count {
                while sent < count && credits(&mut ring).1 > 0 {
                    send(&mut ring, sent);
                    sent += 1;
                }
                for done in reap_n(&mut ring, 1) {
                    assert_eq!(done.brief(), (Op::Write, completed, Ok(60)));
                    completed += 1;
                }
            }
            assert!(order.lock().unwrap().iter().copied().eq(0..count));
        });
    });
}

/// Goal: an entry that is cancelled or refused does not wait for those before it.
#[test]
fn cancelled_and_failed_entries_complete_at_once() {
    guarded(|| {
        every_way(|way, poller| {
            // It refuses number 3 and keeps everything else for ever.
            let interface = Script::new(|_, _| {
                let mut kept = Vec::new();
                let keeping = Arc::new(Mutex::new(Vec::new()));
                let closing = keeping.clone();
                ScriptQueue::new(move |io| {
                    while let Some(slot) = io.take_write() {
                        if slot.user_data() == 3 {
                            io.fail(slot, Status::InvalidArgument);
                        } else {
                            kept.push(slot);
                        }
                    }
                    keeping.lock().unwrap().append(&mut kept);
                    Ok(Progress::Idle)
                })
                .on_close(move |io| {
                    closing.lock().unwrap().drain(..).for_each(|slot| io.cancel(slot));
                    true
                })
            })
            .start();
            let mut ring = interface
                .ring(Direction::Both)
                .drive(way.drive(poller))
                .retry(PATIENT)
                .build()
                .unwrap();
            (1..=3).for_each(|number| send(&mut ring, number));
            let done = reap_n(&mut ring, 1).remove(0);
            assert_eq!(done.brief(), (Op::Write, 3, Err(Status::InvalidArgument.into())));
            // Reads that this device never takes.
            (10..20).for_each(|number| post(&mut ring, number));
            ring.cancel(15, 100).unwrap();
            let done: Vec<_> = reap_n(&mut ring, 2).iter().map(|done| done.brief()).collect();
            assert!(done.contains(&(Op::Read, 15, Err(EntryError::Cancelled))), "{done:?}");
            assert!(done.contains(&(Op::Cancel, 100, Ok(1))), "{done:?}");
            assert_eq!(ring.in_flight(), 11);
        });
    });
}

// ---- Partial batches ----

/// A device that takes writes as the test tells it: how many per call, counting the calls that
/// offered any.
#[derive(Clone, Default)]
struct Gate {
    open: Arc<AtomicUsize>,
    offers: Arc<AtomicU64>,
    /// Reads that it completes with an empty packet, per call.
    reads: Arc<AtomicUsize>,
}

impl Gate {
    fn start(&self) -> Interface {
        self.start_with(|_| ())
    }

    fn start_with(&self, limits: fn(&mut Capabilities)) -> Interface {
        let gate = self.clone();
        Script::new(move |_, _| {
            let gate = gate.clone();
            ScriptQueue::new(move |io| {
                if full(io) > 0 {
                    gate.offers.fetch_add(1, Ordering::SeqCst);
                }
                for _ in 0..gate.open.load(Ordering::SeqCst) {
                    let Some(slot) = io.take_write() else { break };
                    io.complete_write(slot);
                }
                for _ in 0..gate.reads.load(Ordering::SeqCst) {
                    let Some(slot) = io.take_read() else { break };
                    io.complete_read(slot, 60);
                }
                Ok(Progress::Idle)
            })
        })
        .limits(limits)
        .start()
    }

    fn take(&self, writes: usize) {
        self.open.store(writes, Ordering::SeqCst);
    }

    fn offers(&self) -> u64 {
        self.offers.swap(0, Ordering::SeqCst)
    }
}

/// Goal: what the device does not take is retried, and the budget belongs to the stall: a device
/// that moves, however slowly, exhausts nobody.
#[test]
fn a_partial_batch_is_retried_within_the_budget_of_the_stall() {
    guarded(|| {
        every_way(|way, poller| {
            // Takes one write in every third call that offers any.
            let offers = Arc::new(AtomicU64::new(0));
            let count = offers.clone();
            let interface = Script::new(move |_, _| {
                let count = count.clone();
                ScriptQueue::new(move |io| {
                    if full(io) > 0
                        && count.fetch_add(1, Ordering::SeqCst) % 3 == 2
                        && let Some(slot) = io.take_write()
                    {
                        io.complete_write(slot);
                    }
                    Ok(Progress::Idle)
                })
            })
            .start();
            let mut ring = interface
                .ring(Direction::Write)
                .retry(RetryPolicy { attempts: 5, delay: Duration::from_micros(10) })
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let frames: Vec<_> = (0..50).map(|number| (filled(&ring, number), number)).collect();
            assert_eq!(ring.submit_writes(frames).unwrap(), 50);
            for (number, done) in reap_n(&mut ring, 50).iter().enumerate() {
                assert_eq!(done.brief(), (Op::Write, number as u64, Ok(60)));
            }
            let stats = ring.stats();
            assert_eq!((stats.tx_packets, stats.exhausted), (50, 0));
            assert!(stats.retries >= 100, "{stats:?}");
            assert!(offers.load(Ordering::SeqCst) >= 150);
        });
    });
}

/// Goal: a loop without a reader holds 256 packets, then stalls; past the budget what is posted
/// completes with `BufferExhausted`, with its frame, and is counted.
#[test]
fn past_the_budget_writes_complete_with_buffer_exhausted() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring = interface
                .ring(Direction::Both)
                .depth(512)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let frames: Vec<_> = (0..300).map(|number| (filled(&ring, number), number)).collect();
            assert_eq!(ring.submit_writes(frames).unwrap(), 300);
            let mut done = reap_n(&mut ring, 300);
            for (number, done) in done.iter().enumerate() {
                let expected =
                    if number < 256 { Ok(60) } else { Err(Status::BufferExhausted.into()) };
                assert_eq!(done.brief(), (Op::Write, number as u64, expected));
                assert_eq!(number_of(done.frame.as_ref().unwrap()), number as u64);
            }
            let stats = ring.stats();
            assert_eq!((stats.tx_packets, stats.exhausted, stats.errors), (256, 44, 0));
            // The packets that were taken are not lost, and the ring goes on.
            done.clear();
            (0..256).for_each(|number| post(&mut ring, number));
            for (number, done) in reap_n(&mut ring, 256).iter().enumerate() {
                assert_eq!(number_of(done.frame.as_ref().unwrap()), number as u64);
            }
            send(&mut ring, 1000);
            assert_eq!(reap_n(&mut ring, 1)[0].brief(), (Op::Write, 1000, Ok(60)));
        });
    });
}

/// Goal: the budget is one for the whole stall. Method: count how often a device that takes nothing
/// is asked: not once more for a hundred entries than for one; later writes get one attempt each,
/// until it takes something.
#[test]
fn the_retry_budget_belongs_to_the_stall_and_not_to_each_entry() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            let interface = gate.start();
            let mut ring = interface
                .ring(Direction::Write)
                .retry(RetryPolicy { attempts: 7, delay: Duration::from_micros(50) })
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let exhausted = Err(Status::BufferExhausted.into());
            let burst = |ring: &mut Ring, writes: u64| {
                let frames: Vec<_> = (0..writes).map(|n| (filled(ring, n), n)).collect();
                assert_eq!(ring.submit_writes(frames).unwrap() as u64, writes);
                let done = reap_n(ring, writes as usize);
                (done.iter().filter(|done| done.result == exhausted).count(), gate.offers())
            };
            assert_eq!(burst(&mut ring, 100), (100, 7));
            assert_eq!(burst(&mut ring, 1), (1, 1), "still the same stall");
            assert_eq!(burst(&mut ring, 50), (50, 1));
            gate.take(1);
            assert_eq!(burst(&mut ring, 1), (0, 1), "it takes one: the stall is over");
            gate.take(0);
            assert_eq!(burst(&mut ring, 3), (3, 7), "a new stall, a new budget");
            assert_eq!(ring.stats().exhausted, 154);
        });
    });
}

#[test]
fn reads_never_wait_behind_stuck_writes() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            gate.reads.store(usize::MAX, Ordering::SeqCst);
            let interface = gate.start();
            let mut ring = interface
                .ring(Direction::Both)
                .retry(RetryPolicy { attempts: u32::MAX, delay: Duration::from_secs(3600) })
                .drive(way.drive(poller))
                .build()
                .unwrap();
            (0..10).for_each(|number| send(&mut ring, number));
            for number in 100..scaled(200) + 100 {
                post(&mut ring, number);
                assert_eq!(reap_n(&mut ring, 1)[0].brief(), (Op::Read, number, Ok(60)));
            }
            assert_eq!(ring.in_flight(), 10);
        });
    });
}

#[test]
fn writes_never_wait_behind_reads() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            gate.take(usize::MAX);
            let interface = gate.start();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            (0..100).for_each(|number| post(&mut ring, number));
            for number in 1000..scaled(200) + 1000 {
                send(&mut ring, number);
                assert_eq!(reap_n(&mut ring, 1)[0].brief(), (Op::Write, number, Ok(60)));
            }
            assert_eq!(ring.in_flight(), 100);
        });
    });
}

/// Goal: inline, a stall costs the caller no sleep. Method: a retry delay of an hour: `reap` returns
/// at once (or the watchdog ends the test), asks the device once, and `next_deadline` says when.
#[test]
fn inline_reap_never_sleeps_and_next_deadline_tells_when_to_come_back() {
    guarded(|| {
        let gate = Gate::default();
        let interface = gate.start();
        let hour = Duration::from_secs(3600);
        let mut ring = inline(&interface, Direction::Write)
            .retry(RetryPolicy { attempts: 100, delay: hour })
            .build()
            .unwrap();
        assert_eq!(ring.next_deadline(), None);
        let before = Instant::now();
        send(&mut ring, 1);
        for _ in 0..1000 {
            assert_eq!(ring.reap().len(), 0);
        }
        assert_eq!(gate.offers(), 1);
        let deadline = ring.next_deadline().expect("the write is to be tried again");
        assert!(deadline >= before + hour);
        // Others do not hurry it either.
        send(&mut ring, 2);
        gate.take(usize::MAX);
        assert_eq!((ring.reap().len(), gate.offers()), (0, 0));
        ring.cancel_all(3).unwrap();
        assert_eq!(reap_n(&mut ring, 3).len(), 3);
        assert_eq!(ring.next_deadline(), None, "nothing is stuck any more");

        // With a short delay `wait` comes back by itself at that time.
        drop(ring);
        gate.take(0);
        let mut ring = inline(&interface, Direction::Write)
            .retry(RetryPolicy { attempts: 4, delay: Duration::from_millis(1) })
            .build()
            .unwrap();
        send(&mut ring, 1);
        assert_eq!(ring.wait(1, None), 1);
        assert_eq!(gate.offers(), 4);
        assert_eq!(reap(&mut ring)[0].result, Err(Status::BufferExhausted.into()));
    });
}

#[test]
fn times_too_long_for_the_clock_are_for_ever() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            let interface = gate.start_with(|caps| caps.safety_poll = Some(Duration::MAX));
            let mut ring = interface
                .ring(Direction::Write)
                .retry(RetryPolicy { attempts: 9, delay: Duration::MAX })
                .close_timeout(Duration::MAX)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            send(&mut ring, 1);
            assert_eq!(ring.wait(1, Some(Duration::from_millis(20))), 0, "it is not tried again");
            assert_eq!(ring.quiesce(Duration::MAX).unwrap(), 1);
            reap_n(&mut ring, 1);
            if way != Way::Inline {
                // Which ends the stall.
                interface.restart(Duration::MAX).unwrap();
                gate.take(1);
                send(&mut ring, 2);
                assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(60));
            }
            ring.close().unwrap();
            interface.stop(Duration::MAX).unwrap();
        });
    });
}

// ---- Backpressure on read ----

#[test]
fn no_posted_read_no_packet() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            (0..10).for_each(|number| send(&mut ring, number));
            assert!(reap_n(&mut ring, 10).iter().all(|done| done.op == Op::Write));
            assert_eq!((ring.in_flight(), ring.stats().rx_packets), (0, 0));
            let mut next = 0;
            for posted in [3, 1, 6] {
                (0..posted).for_each(|_| post(&mut ring, 50));
                for done in reap_n(&mut ring, posted) {
                    assert_eq!(done.op, Op::Read);
                    assert_eq!(number_of(&done.frame.unwrap()), next);
                    next += 1;
                }
                assert_eq!(ring.stats().rx_packets, next, "as many packets as posted reads");
            }
        });
    });
}

// ---- Cancel ----

#[test]
fn cancel_has_its_own_completion_and_all_matching_entries_complete() {
    guarded(|| {
        every_way(|way, poller| {
            // A device that keeps posted reads itself, and one that leaves them with the poller.
            for interface in [loopback(), Gate::default().start()] {
                let mut ring = interface
                    .ring(Direction::Both)
                    .drive(way.drive(poller))
                    .retry(PATIENT)
                    .build()
                    .unwrap();
                for user_data in [7, 8, 7, 8, 7] {
                    post(&mut ring, user_data);
                }
                ring.cancel(7, 99).unwrap();
                let done = reap_n(&mut ring, 4);
                let (cancel, others): (Vec<_>, Vec<_>) =
                    done.iter().partition(|done| done.op == Op::Cancel);
                assert_eq!(cancel.len(), 1);
                assert_eq!(cancel[0].brief(), (Op::Cancel, 99, Ok(3)));
                assert!(cancel[0].frame.is_none());
                for done in others {
                    assert_eq!(done.brief(), (Op::Read, 7, Err(EntryError::Cancelled)));
                    assert!(done.frame.is_some());
                }
                assert_eq!(ring.in_flight(), 2);
                ring.cancel(7, 100).unwrap();
                assert_eq!(reap_n(&mut ring, 1)[0].brief(), (Op::Cancel, 100, Ok(0)));
                assert_eq!(ring.stats().cancelled, 3);
                drop(done);
                ring.cancel_all(101).unwrap();
                let done = reap_n(&mut ring, 3);
                let cancel = done.iter().find(|done| done.op == Op::Cancel).unwrap();
                assert_eq!(cancel.brief(), (Op::Cancel, 101, Ok(2)));
            }
        });
    });
}

/// Goal: what is submitted and cancelled before the device is called is not given to it, also where the
/// caller drives the ring and nothing is a matter of luck.
#[test]
fn a_cancel_comes_before_the_device() {
    let gate = Gate::default();
    gate.take(10);
    let interface = gate.start();
    let mut ring = inline(&interface, Direction::Both).build().unwrap();
    for user_data in [1, 2] {
        let frame = ring.alloc().unwrap();
        ring.submit_write(frame, user_data).unwrap();
    }
    ring.cancel(1, 3).unwrap();
    let mut done: Vec<_> = reap(&mut ring).iter().map(|seen| seen.brief()).collect();
    done.sort_by_key(|(_, user_data, _)| *user_data);
    let cancelled = Err(EntryError::Cancelled);
    assert_eq!(done, [(Op::Write, 1, cancelled), (Op::Write, 2, Ok(0)), (Op::Cancel, 3, Ok(1))]);
}

/// Goal: cancels at any moment lose no packet. Method: a writer sends numbered packets while the
/// reader posts and cancels; every number arrives, in order.
#[test]
fn a_packet_is_never_dropped_by_a_cancel() {
    guarded(|| {
        every_way(|way, poller| {
            let count = scaled(3000);
            let interface = loopback();
            let build = |direction| {
                interface.ring(direction).drive(way.drive(poller)).retry(PATIENT).build().unwrap()
            };
            let (mut reader, mut writer) = (build(Direction::Read), build(Direction::Write));
            let writing = thread::spawn(move || {
                let mut sent = 0;
                while sent < count || writer.in_flight() > 0 {
                    while sent < count && credits(&mut writer).1 > 0 {
                        send(&mut writer, sent);
                        sent += 1;
                    }
                    writer.wait(1, Some(Duration::from_millis(1)));
                    for done in reap(&mut writer) {
                        assert!(done.result.is_ok(), "{done:?}");
                    }
                }
            });
            let mut dice = Dice::new(11);
            let mut next = 0;
            let mut take = |ring: &mut Ring| {
                for done in reap(ring) {
                    match done.result {
                        Ok(_) if done.op == Op::Read => {
                            assert_eq!(number_of(&done.frame.unwrap()), next);
                            next += 1;
                        }
                        Ok(_) => {}
                        error => assert_eq!(error, Err(EntryError::Cancelled)),
                    }
                }
                next
            };
            loop {
                for _ in 0..dice.below(16) {
                    if credits(&mut reader).0 > 0 {
                        post(&mut reader, dice.below(4));
                    }
                }
                match dice.below(6) {
                    0 => drop(reader.cancel(dice.below(4), 0)),
                    1 => drop(reader.cancel_all(0)),
                    2 => reader.control().cancel_all(),
                    3 => drop(reader.quiesce(LONG).unwrap()),
                    _ => drop(reader.wait(1, Some(Duration::from_micros(200)))),
                }
                let seen = take(&mut reader);
                stage(format!("{way:?}: {seen} of {count}"));
                if seen == count {
                    break;
                }
            }
            writing.join().unwrap();
        });
    });
}

/// Goal: on the embedded network, where what finds no posted read is dropped, a cancel takes from the
/// senders nothing but its target. Method: no overflow, far more reads posted than packets are under
/// way, and cancels all the time, of what is there and of what is not: nothing is dropped.
#[test]
fn a_packet_is_never_dropped_by_a_cancel_on_the_embedded_network() {
    guarded(|| {
        every_way(|way, poller| {
            const READS: u64 = 256;
            const UNDER_WAY: u64 = 64;
            let count = scaled(10_000);
            let name = unique("cancel");
            let port = || {
                let driver = Embedded::network(name.clone()).overflow(0);
                Interface::builder().device(driver).start().unwrap()
            };
            let (to, from) = (port(), port());
            let bytes = packet_between(from.mac().into_array(), to.mac().into_array(), 0, 60);
            let mut reader =
                to.ring(Direction::Read).cancel_depth(4).drive(way.drive(poller)).build().unwrap();
            let mut writer = from.ring(Direction::Write).drive(way.drive(poller)).build().unwrap();
            (0..READS).for_each(|number| post(&mut reader, number));
            if way == Way::Inline {
                settle(&mut reader);
            } else {
                // The poller has them all when the cancel behind them has come back.
                reader.cancel(u64::MAX, 0).unwrap();
                assert_eq!(reap_n(&mut reader, 1)[0].op, Op::Cancel);
            }
            let posted_again = Arc::new(AtomicU64::new(0));
            let writing = thread::spawn({
                let posted_again = posted_again.clone();
                move || {
                    let (mut sent, start) = (0, Instant::now());
                    while sent < count || writer.in_flight() > 0 {
                        while sent < count
                            && sent - posted_again.load(Ordering::SeqCst) < UNDER_WAY
                            && credits(&mut writer).1 > 0
                        {
                            let mut frame = writer.alloc().unwrap();
                            frame.copy_from(&bytes).unwrap();
                            writer.submit_write(frame, sent).unwrap();
                            sent += 1;
                        }
                        writer.wait(1, Some(Duration::from_micros(200)));
                        assert!(reap(&mut writer).iter().all(|done| done.result.is_ok()));
                        assert!(start.elapsed() < LONG, "{sent} of {count} were sent");
                    }
                }
            });
            let (mut received, mut cancelled, mut asked) = (0, 0, 0);
            let start = Instant::now();
            while received < count {
                reader.wait(1, Some(Duration::from_micros(200)));
                for done in reap(&mut reader) {
                    match done.brief() {
                        (Op::Cancel, ..) => continue,
                        (_, _, Ok(_)) => received += 1,
                        (_, _, result) => {
                            assert_eq!(result, Err(EntryError::Cancelled));
                            cancelled += 1;
                        }
                    }
                    reader.submit_read(done.frame.unwrap(), done.user_data).unwrap();
                }
                posted_again.store(received, Ordering::SeqCst);
                asked += 1;
                let target = if asked % 4 == 0 { asked / 4 % READS } else { u64::MAX };
                let _ = reader.cancel(target, 0);
                stage(format!("{way:?}: {received} of {count}, {cancelled} reads cancelled"));
                assert!(start.elapsed() < LONG, "{received} of {count}, {:?}", to.drops());
            }
            writing.join().unwrap();
            assert!(to.drops().iter().all(|(_, packets)| *packets == 0), "{:?}", to.drops());
        });
    });
}

/// Goal: a cancel of one leaves the others posted, also when a packet has just come for the first
/// of as many reads as the device keeps.
#[test]
fn a_cancel_touches_nothing_but_its_target() {
    guarded(|| {
        let interface = loopback();
        let mut reader = inline(&interface, Direction::Read).read_depth(1024).build().unwrap();
        let mut writer = inline(&interface, Direction::Write).build().unwrap();
        (0..1024).for_each(|number| post(&mut reader, number));
        settle(&mut reader);
        send(&mut writer, 0);
        settle(&mut writer);
        reader.cancel(5, 5000).unwrap();
        let mut done: Vec<_> = reap_n(&mut reader, 3).iter().map(|done| done.brief()).collect();
        done.sort_by_key(|(_, user_data, _)| *user_data);
        let cancelled = Err(EntryError::Cancelled);
        assert_eq!(
            done,
            [(Op::Read, 0, Ok(60)), (Op::Read, 5, cancelled), (Op::Cancel, 5000, Ok(1))]
        );
        settle(&mut reader);
        assert_eq!(reap(&mut reader).len(), 0, "nothing else has completed");
        assert_eq!(reader.in_flight(), 1022);
        // They still are filled, in their order.
        for number in (1..1024).filter(|number| *number != 5) {
            send(&mut writer, number);
            assert_eq!(reap_n(&mut writer, 1)[0].result, Ok(60));
            let done = reap_n(&mut reader, 1).remove(0);
            assert_eq!(done.brief(), (Op::Read, number, Ok(60)));
            assert_eq!(number_of(&done.frame.unwrap()), number);
        }
    });
}

#[test]
fn quiesce_empties_the_ring_and_keeps_it_alive() {
    guarded(|| {
        every_way(|way, poller| {
            for interface in [loopback(), Gate::default().start()] {
                let mut ring = interface
                    .ring(Direction::Both)
                    .depth(16)
                    .drive(way.drive(poller))
                    .retry(PATIENT)
                    .build()
                    .unwrap();
                for _ in 0..3 {
                    assert_eq!(ring.quiesce(LONG).unwrap(), 0, "nothing to do");
                    (0..16).for_each(|number| post(&mut ring, number));
                    assert_eq!(ring.quiesce(LONG).unwrap(), 16);
                    assert_eq!(ring.in_flight(), 16, "they wait to be reaped");
                    for done in reap(&mut ring) {
                        assert_eq!(done.result, Err(EntryError::Cancelled));
                        assert!(done.frame.is_some());
                    }
                    assert_eq!((ring.in_flight(), ring.control().closed()), (0, None));
                }
            }
            // Alive: packets still go round.
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            post(&mut ring, 1);
            ring.quiesce(LONG).unwrap();
            drop(reap(&mut ring));
            post(&mut ring, 2);
            send(&mut ring, 3);
            assert!(reap_n(&mut ring, 2).iter().all(|done| done.result.is_ok()));
        });
    });
}

/// A device that does not let go in time: an error, and nothing is lost.
#[test]
fn a_quiesce_that_does_not_end_in_time_loses_nothing() {
    guarded(|| {
        let held: Arc<Mutex<Vec<PostedSlot>>> = Arc::default();
        let release = Arc::new(AtomicBool::new(false));
        let (keep, go) = (held.clone(), release.clone());
        let interface = Script::new(move |_, _| {
            let (keep, go) = (keep.clone(), go.clone());
            ScriptQueue::new(move |io| {
                let mut kept = keep.lock().unwrap();
                while let Some(slot) = io.take_read() {
                    kept.push(slot);
                }
                if go.load(Ordering::SeqCst) {
                    kept.drain(..).for_each(|slot| io.complete_read(slot, 14));
                }
                Ok(Progress::Idle)
            })
        })
        .start();
        let mut ring = inline(&interface, Direction::Read).build().unwrap();
        (0..4).for_each(|number| post(&mut ring, number));
        settle(&mut ring);
        let short = Duration::from_millis(20);
        let error = ring.quiesce(short).unwrap_err();
        assert!(matches!(error, Error::Timeout(timeout) if timeout == short), "{error}");
        assert_eq!((ring.in_flight(), held.lock().unwrap().len()), (4, 4));
        release.store(true, Ordering::SeqCst);
        assert!(reap_n(&mut ring, 4).iter().all(|done| done.result == Ok(14)));
    });
}

#[test]
fn cancel_all_from_a_control_handle_empties_the_ring() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            (0..20).for_each(|number| post(&mut ring, number));
            let control = ring.control();
            thread::spawn(move || control.cancel_all()).join().unwrap();
            for (number, done) in reap_n(&mut ring, 20).iter().enumerate() {
                let cancelled = Err(EntryError::Cancelled);
                assert_eq!(done.brief(), (Op::Read, number as u64, cancelled));
            }
            assert_eq!(ring.control().closed(), None);
        });
    });
}

// ---- Rings and interfaces ----

#[test]
fn one_ring_too_many_is_a_typed_error() {
    guarded(|| {
        let interface = loopback();
        let too_many =
            |interface: &Interface, direction, which: &str| match inline(interface, direction)
                .build()
            {
                Err(Error::TooManyRings { device, direction, limit }) => {
                    assert_eq!((device.as_str(), direction), (interface.device_name(), which));
                    assert_eq!(limit, 1);
                }
                other => panic!("{other:?}"),
            };
        let reader = inline(&interface, Direction::Both).build().unwrap();
        too_many(&interface, Direction::Read, "reading");
        too_many(&interface, Direction::Both, "reading");
        let writers: Vec<Ring> =
            (0..5).map(|_| inline(&interface, Direction::Write).build().unwrap()).collect();
        drop(writers);
        // Freed by a close, and by a drop.
        let mut reader = reader;
        reader.close().unwrap();
        let second = inline(&interface, Direction::Read).build().unwrap();
        too_many(&interface, Direction::Read, "reading");
        drop(second);
        inline(&interface, Direction::Both).build().unwrap();

        let script =
            Script::new(|_, _| ScriptQueue::new(|_| Ok(Progress::Idle))).limits(|_| {}).start();
        assert_eq!(script.capabilities().writing_rings, 1);
        let _writer = inline(&script, Direction::Write).build().unwrap();
        let _reader = inline(&script, Direction::Read).build().unwrap();
        too_many(&script, Direction::Write, "writing");
        too_many(&script, Direction::Read, "reading");
    });
}

/// A build that fails gives its claim and its place back.
#[test]
fn a_ring_that_could_not_be_built_takes_no_place() {
    guarded(|| {
        every_way(|way, poller| {
            let refuse = Arc::new(AtomicBool::new(true));
            let refusing = refuse.clone();
            let interface = Script::fallible(move |_, _| {
                if refusing.load(Ordering::SeqCst) {
                    return Err(Status::SharingServiceBusy.into());
                }
                Ok(ScriptQueue::new(|_| Ok(Progress::Idle)))
            })
            .limits(|_| {})
            .start();
            for _ in 0..3 {
                let build = interface.ring(Direction::Both).drive(way.drive(poller)).build();
                assert!(matches!(build, Err(Error::Vmnet(Status::SharingServiceBusy))));
            }
            refuse.store(false, Ordering::SeqCst);
            interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
        });
    });
}

#[test]
fn a_pool_serves_several_rings_and_a_frame_read_from_one_is_written_to_the_other() {
    guarded(|| {
        every_way(|way, poller| {
            let (left, right) = (loopback(), loopback());
            let (shared, foreign) = (pool(32), pool(4));
            let build = |interface: &Interface| {
                let builder = interface.ring(Direction::Both).depth(8).pool(&shared);
                builder.pool(&pool(1)).drive(way.drive(poller)).build().unwrap()
            };
            let (mut left, mut right) = (build(&left), build(&right));
            send(&mut left, 42);
            post(&mut left, 1);
            let read = reap_n(&mut left, 2).into_iter().find(|done| done.op == Op::Read).unwrap();
            let frame = read.frame.unwrap();
            let (slot, address) = (frame.slot(), frame.as_ptr());
            right.submit_write(frame, 2).unwrap();
            post(&mut right, 3);
            for done in reap_n(&mut right, 2) {
                let frame = done.frame.unwrap();
                assert_eq!(number_of(&frame), 42);
                if done.op == Op::Write {
                    assert_eq!((frame.slot(), frame.as_ptr()), (slot, address), "without a copy");
                }
            }
            assert_eq!(shared.slots_out(), 0);
            let refusal = left.submit_read(foreign.alloc().unwrap(), 4).unwrap_err();
            assert_eq!(refusal.kind, SubmitErrorKind::ForeignPool);
            assert!(foreign.owns(&refusal.frame));
            assert_eq!(left.pools().len(), 2);
        });
    });
}

// ---- Settings ----

#[test]
fn sizes_that_cannot_be_are_refused_with_the_reason() {
    let interface = loopback();
    let ring = || inline(&interface, Direction::Both);
    let config = |result: Result<Ring, Error>| match result {
        Err(Error::Config(error)) => error,
        other => panic!("{other:?}"),
    };
    for (what, zero, odd, large) in [
        ("read depth", ring().read_depth(0), ring().read_depth(48), ring().read_depth(1 << 31)),
        ("write depth", ring().write_depth(0), ring().write_depth(3), ring().write_depth(1 << 29)),
        (
            "cancel depth",
            ring().cancel_depth(0),
            ring().cancel_depth(17),
            ring().cancel_depth(1 << 31),
        ),
        ("SQ depth", ring().sq_depth(0), ring().sq_depth(6), ring().sq_depth(1 << 30)),
    ] {
        assert_eq!(config(zero.build()), ConfigError::Zero { what });
        let error = config(odd.build());
        assert!(
            matches!(error, ConfigError::NotPowerOfTwo { what: w, .. } if w == what),
            "{error}"
        );
        assert!(error.to_string().contains("power of two"));
        let error = config(large.build());
        assert!(matches!(error, ConfigError::TooLarge { what: w, .. } if w == what), "{error}");
    }
    let small = PoolBuilder::new(4, 60).build().unwrap();
    let error = config(ring().pool(&small).build());
    let (room, needed) = (small.capacity() as usize, 1514);
    assert_eq!(error, ConfigError::PoolTooSmall { room, needed });
    assert_eq!(config(ring().frames(0).build()), ConfigError::Zero { what: "number of frames" });
    let error = ring().frames(1 << 30).headroom(1 << 30).build().unwrap_err();
    assert!(matches!(error, Error::Memory { .. }), "{error}");
    // The largest depth can be had, and one that is larger is refused before any memory is asked for.
    let max = 1 << 16;
    for what in ["read depth", "write depth", "cancel depth", "SQ depth"] {
        let with = |depth| match what {
            "read depth" => ring().read_depth(depth),
            "write depth" => ring().write_depth(depth),
            "cancel depth" => ring().cancel_depth(depth),
            _ => ring().sq_depth(depth),
        };
        with(max as u32).frames(4).build().unwrap();
        for depth in [1 << 17, 1 << 28] {
            let value = u64::from(depth);
            assert_eq!(
                config(with(depth).frames(4).build()),
                ConfigError::TooLarge { what, value, max }
            );
        }
    }
    // A direction that is not used needs no depth; a small pool will do for writing.
    inline(&interface, Direction::Write).read_depth(0).pool(&small).build().unwrap();
    // None of the refused has taken the one place there is.
    ring().build().unwrap();

    for mtu in [0, 65_522] {
        let start = Interface::builder().device(Loopback::new(mtu)).start();
        assert!(matches!(start, Err(Error::Config(ConfigError::Invalid(_)))), "{start:?}");
    }
}

#[test]
fn modes_and_ranges_are_parsed_or_refused_in_a_sentence() {
    for (text, mode) in [
        ("host", Mode::Host),
        ("shared", Mode::Shared),
        ("bridged:en0", Mode::Bridged("en0".to_owned())),
    ] {
        assert_eq!(text.parse(), Ok(mode.clone()));
        assert_eq!(mode.to_string(), text);
    }
    assert_eq!(Mode::default(), Mode::Shared);
    for text in ["", "Host", "bridged", "bridged:", "nat"] {
        let error = text.parse::<Mode>().unwrap_err().to_string();
        assert!(error.ends_with(&format!("and not '{text}'")), "{error}");
    }
    let range: Ipv4Range = "192.168.64.1/24".parse().unwrap();
    assert_eq!(range.start.octets(), [192, 168, 64, 1]);
    assert_eq!(
        (range.end.octets(), range.mask.octets()),
        ([192, 168, 64, 254], [255, 255, 255, 0])
    );
    for text in ["", "192.168.64.1", "192.168.64.1/33", "192.168.64/24", "192.168.64.1/-1", "x/24"]
    {
        let error = text.parse::<Ipv4Range>().unwrap_err().to_string();
        assert!(error.ends_with(&format!("and not '{text}'")), "{error}");
    }
    // Extremes are numbers like others.
    assert_eq!("10.0.0.1/0".parse::<Ipv4Range>().unwrap().mask.octets(), [0; 4]);
    assert_eq!("10.0.0.1/32".parse::<Ipv4Range>().unwrap().mask.octets(), [255; 4]);
    // An impossible network is refused at start.
    for range in ["10.0.0.1/32", "8.8.8.1/24"] {
        let builder = Interface::builder().device(Embedded::network(unique("impossible")));
        let start = builder.ipv4(range.parse().unwrap()).start();
        assert!(matches!(start, Err(Error::Config(_))), "{range}: {start:?}");
    }
}

#[test]
fn an_interface_says_what_was_negotiated() {
    let mac = MacAddr6::new(2, 1, 2, 3, 4, 5);
    let network = unique("negotiated");
    let builder = || {
        Interface::builder()
            .mode(Mode::Host)
            .interface_id([7; 16])
            .device(Embedded::network(network.clone()))
    };
    let first = builder().mac(mac).mtu(2000).start().unwrap();
    assert_eq!((first.mode(), first.mac(), first.mtu()), (Mode::Host, mac, 2000));
    assert_eq!((first.max_packet_size(), first.interface_id()), (2014, [7; 16]));
    assert_eq!((first.device_name(), first.lease(mac)), ("embedded", None));
    let caps = first.capabilities();
    assert_eq!((caps.mtu, caps.max_packet_size), (2000, 2014));
    assert_eq!((caps.reading_rings, caps.max_read_batch), (1, 200));
    assert!(first.info().ipv4.is_some());
    let ring = inline(&first, Direction::Both).build().unwrap();
    assert_eq!(ring.capabilities(), caps);
    // The same identity gives the same MAC; those who join must agree.
    let second = builder().mtu(2000).start().unwrap();
    let derived = second.mac();
    assert_ne!(derived, mac);
    drop(second);
    assert_eq!(builder().mtu(2000).start().unwrap().mac(), derived);
    assert!(matches!(builder().mtu(1500).start(), Err(Error::Config(_))), "another MTU");
    assert!(matches!(builder().mac(mac).mtu(2000).start(), Err(Error::Config(_))), "its MAC");
    let bridged = builder().mode(Mode::Bridged("en0".to_owned())).start();
    assert!(matches!(bridged, Err(Error::NotSupported { .. })), "{bridged:?}");
    // Identities are random unless given.
    assert_ne!(loopback().interface_id(), loopback().interface_id());
}

/// Goal: what happens to a packet on the embedded network can be read from outside: second copies,
/// frames the gateway could not answer, and every drop, also of what a guest sends to itself.
#[test]
fn an_embedded_interface_counts_what_it_drops_copies_and_does_not_answer() {
    guarded(|| {
        let network = unique("counts");
        let port = || Interface::builder().device(Embedded::network(network.clone())).start();
        let (near, far) = (port().unwrap(), port().unwrap());
        let (mac, peer) = (near.mac().into_array(), far.mac().into_array());
        let mut ring = inline(&near, Direction::Both).build().unwrap();
        let mut other = inline(&far, Direction::Both).build().unwrap();
        let write = |ring: &mut Ring, bytes: &[u8]| {
            let mut frame = ring.alloc().unwrap();
            frame.copy_from(bytes).unwrap();
            ring.submit_write(frame, 0).unwrap();
            assert!(reap_n(ring, 1)[0].result.is_ok());
        };
        let read = |counts: Vec<(&'static str, u64)>, what: &str| {
            let found = counts.iter().find(|(name, _)| *name == what);
            found.unwrap_or_else(|| panic!("no {what} in {counts:?}")).1
        };
        write(&mut ring, &packet_between(mac, mac, 0, 60));
        assert_eq!(read(near.drops(), "own port"), 1);
        // No read is posted there: it waits, and is copied once more.
        write(&mut ring, &packet_between(mac, peer, 1, 60));
        post(&mut other, 0);
        assert_eq!(number_of(reap_n(&mut other, 1)[0].frame.as_ref().unwrap()), 1);
        assert_eq!((read(far.counters(), "second copies"), near.counters()[0].1), (1, 0));
        // An ARP packet cut short, and a protocol that the gateway does not know.
        let mut broken = packet_between(mac, [0xff; 6], 2, 30);
        broken[12..14].copy_from_slice(&[8, 6]);
        write(&mut ring, &broken);
        write(&mut ring, &packet_between(mac, [0xff; 6], 3, 60));
        for interface in [&near, &far] {
            assert_eq!(read(interface.counters(), "gateway malformed"), 1);
            assert_eq!(read(interface.counters(), "gateway ignored"), 1);
            assert_eq!(read(interface.counters(), "gateway ARP replies"), 0);
        }
    });
}

/// Goal: a network ends when the last interface on it stops, though its handle is still there, and
/// its name is free; a restart keeps the network and who was on it.
#[test]
fn a_network_lives_as_long_as_an_interface_is_on_it() {
    guarded(|| {
        let network = unique("lives");
        let port =
            |mtu| Interface::builder().mtu(mtu).device(Embedded::network(network.clone())).start();
        let (first, second) = (port(1500).unwrap(), port(1500).unwrap());
        let ring = first.ring(Direction::Both).build().unwrap();
        first.stop(LONG).unwrap();
        assert!(matches!(port(2000), Err(Error::Config(_))), "the second is still there");
        second.restart(LONG).unwrap();
        assert!(matches!(port(2000), Err(Error::Config(_))), "the second has come back");
        second.stop(LONG).unwrap();
        assert_eq!((first.drops(), second.counters()), (Vec::new(), Vec::new()));
        assert_eq!(second.lease(second.mac()), None);
        let third = port(2000).unwrap();
        assert_eq!(third.mtu(), 2000);
        drop(ring);
        drop((first, second, third));
        port(1500).unwrap();
    });
}

#[test]
fn what_a_device_lacks_answers_not_supported() {
    let rule = PortForward {
        protocol: Protocol::Tcp,
        external_port: 8080,
        internal_address: [192, 168, 64, 2].into(),
        internal_port: 80,
    };
    let embedded = Interface::builder().device(Embedded::network(unique("lacks"))).start().unwrap();
    let faulty = vmring::device::fault::Faults::seeded(1).wrap(Loopback::new(1500));
    let faulty = Interface::builder().device(faulty).start().unwrap();
    for interface in [loopback(), embedded, faulty] {
        let name = interface.device_name().to_owned();
        let answers = [
            interface.add_port_forward(&rule).unwrap_err(),
            interface.remove_port_forward(Protocol::Tcp, 8080).unwrap_err(),
            interface.port_forwards().unwrap_err(),
            interface.shared_interfaces().unwrap_err(),
        ];
        for error in answers {
            assert!(matches!(&error, Error::NotSupported { device, .. } if *device == name));
            assert!(error.to_string().contains("not supported"), "{error}");
        }
    }
}

// ---- A third-party device ----

/// Goal: a device cannot return a slot twice or keep its memory: a slot dropped comes back as
/// abandoned, a slot forgotten is counted at close, and each entry completes once.
#[test]
fn a_third_party_device_cannot_return_a_slot_twice_or_keep_its_memory() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = Script::new(|_, _| {
                ScriptQueue::new(|io| {
                    while let Some(slot) = io.take_write() {
                        match slot.user_data() {
                            0 => drop(slot),
                            1 => std::mem::forget(slot),
                            _ => io.complete_write(slot),
                        }
                    }
                    Ok(Progress::Idle)
                })
            })
            .start();
            let pool = pool(16);
            let mut ring = interface
                .ring(Direction::Both)
                .depth(8)
                .pool(&pool)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            (0..3).for_each(|number| send(&mut ring, number));
            let mut done = reap_n(&mut ring, 2);
            done.sort_by_key(|done| done.user_data);
            assert_eq!(done[0].brief(), (Op::Write, 0, Err(EntryError::Abandoned)));
            assert_eq!(number_of(done[0].frame.as_ref().unwrap()), 0);
            assert_eq!(done[1].brief(), (Op::Write, 2, Ok(60)));
            assert_eq!((ring.in_flight(), ring.stats().abandoned), (1, 1));
            drop(done);
            let error = ring.close().unwrap_err();
            assert!(matches!(error, Error::Leaked { slots: 1, .. }), "{error}");
            drop(ring);
            assert_eq!(pool.slots_out(), 1, "lost, and not copied");
        });
    });
}

/// Goal: a length beyond the slot makes nobody read outside it. Method: a device that claims any
/// length; what fits is taken, what does not is refused as an invalid argument.
#[test]
fn hostile_lengths_never_reach_outside_the_slot() {
    guarded(|| {
        let interface = Script::new(|_, _| {
            ScriptQueue::new(|io| {
                while let Some(mut slot) = io.take_read() {
                    let (room, hostile) = (slot.room_mut().len(), slot.user_data() as usize);
                    slot.room_mut().fill(0xaa);
                    let len = if hostile < 2 { room + hostile } else { hostile };
                    io.complete_read(slot, len);
                }
                Ok(Progress::Idle)
            })
        })
        .start();
        let mut ring = inline(&interface, Direction::Read).build().unwrap();
        let hostile = [0, 1, 14, 1 << 16, 1 << 31, (1 << 32) + 14, u64::MAX, u64::MAX - 63];
        hostile.iter().for_each(|len| post(&mut ring, *len));
        for (number, done) in reap_n(&mut ring, hostile.len()).iter().enumerate() {
            let frame = done.frame.as_ref().expect("its frame, in any case");
            match hostile[number] {
                0 => assert_eq!(done.result, Ok(frame.capacity())),
                14 => assert_eq!((done.result, &frame[..]), (Ok(14), &[0xaa; 14][..])),
                _ => {
                    assert_eq!(done.result, Err(Status::InvalidArgument.into()));
                    assert_eq!(frame.len(), 0);
                }
            }
        }
        assert_eq!((ring.stats().errors, ring.stats().rx_packets), (6, 2));
    });
}

/// Two rings of one device that share what its queues may do to each other's slots.
fn mixed_up(give: impl Fn(&mut Io<'_>, PostedSlot) + Send + Sync + 'static) -> Interface {
    let taken: Arc<Mutex<Vec<PostedSlot>>> = Arc::default();
    let queues = AtomicU64::new(0);
    let give = Arc::new(give);
    Script::new(move |_, _| {
        let (taken, give) = (taken.clone(), give.clone());
        let first = queues.fetch_add(1, Ordering::SeqCst) == 0;
        ScriptQueue::new(move |io| {
            let mut taken = taken.lock().unwrap();
            if first {
                while let Some(slot) = io.take_write() {
                    taken.push(slot);
                }
            } else {
                taken.drain(..).for_each(|slot| give(io, slot));
                take_writes(io);
            }
            Ok(Progress::Idle)
        })
    })
    .start()
}

/// Ring A's slot, given to ring B, completes on A, as abandoned, and nothing happens to B.
fn a_slot_given_to_another_ring_completes_on_its_own(
    give: impl Fn(&mut Io<'_>, PostedSlot) + Send + Sync + Copy + 'static,
) {
    for shared_pool in [false, true] {
        every_way(|way, poller| {
            let interface = mixed_up(give);
            let (first, second) = (pool(8), pool(8));
            let build = |pool: &Pool| {
                let builder = interface.ring(Direction::Write).write_depth(4).pool(pool);
                builder.drive(way.drive(poller)).build().unwrap()
            };
            let mut a = build(&first);
            let mut b = build(if shared_pool { &first } else { &second });
            send(&mut a, 1);
            stage(format!("{way:?}: the slot is taken"));
            // Inline, A's engine must have handed the slot over before B's looks.
            let _ = a.wait(1, Some(Duration::from_millis(5)));
            for number in 10..14 {
                send(&mut b, number);
                assert_eq!(reap_n(&mut b, 1)[0].brief(), (Op::Write, number, Ok(60)));
            }
            stage(format!("{way:?}: it comes back"));
            let done = reap_n(&mut a, 1).remove(0);
            assert_eq!(done.brief(), (Op::Write, 1, Err(EntryError::Abandoned)));
            assert!(first.owns(&done.frame.unwrap()));
            // Both live on.
            send(&mut b, 20);
            assert_eq!(reap_n(&mut b, 1)[0].brief(), (Op::Write, 20, Ok(60)));
            assert_eq!((a.control().closed(), b.control().closed()), (None, None));
            b.quiesce(LONG).unwrap();
            b.close().unwrap();
            a.close().unwrap();
        });
    }
}

#[test]
fn a_slot_completed_on_another_ring_comes_back_on_its_own() {
    guarded(|| {
        a_slot_given_to_another_ring_completes_on_its_own(|io, slot| io.complete_write(slot))
    });
}

#[test]
fn a_slot_put_back_to_another_ring_comes_back_on_its_own() {
    guarded(|| a_slot_given_to_another_ring_completes_on_its_own(|io, slot| io.put_back(slot)));
}

/// A device may keep a slot for some calls and put it back later: it is posted as before.
#[test]
fn a_slot_put_back_in_a_later_call_is_posted_again() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = Script::new(|_, _| {
                let (mut kept, mut calls) = (Vec::new(), 0);
                ScriptQueue::new(move |io| {
                    calls += 1;
                    match calls {
                        1 => kept.extend(std::iter::from_fn(|| io.take_write())),
                        2 => kept.drain(..).rev().for_each(|slot| io.put_back(slot)),
                        _ => take_writes(io),
                    }
                    Ok(Progress::Idle)
                })
            })
            .start();
            let mut ring = interface
                .ring(Direction::Write)
                .retry(PATIENT)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let frames: Vec<_> = (0..3).map(|number| (filled(&ring, number), number)).collect();
            ring.submit_writes(frames).unwrap();
            for (number, done) in reap_n(&mut ring, 3).iter().enumerate() {
                assert_eq!(done.brief(), (Op::Write, number as u64, Ok(60)));
            }
        });
    });
}

/// What is put back may be taken again, in its order, and takes nothing of what a call may take; what
/// stands in the SQ comes behind it.
#[test]
fn a_slot_that_is_put_back_may_be_taken_again_in_the_same_call() {
    guarded(|| {
        let interface = Script::new(|_, _| {
            ScriptQueue::new(|io| {
                for _ in 0..3 {
                    let taken: Vec<_> = std::iter::from_fn(|| io.take_write()).collect();
                    assert!(taken.len() <= 2, "the limit of a call");
                    taken.into_iter().rev().for_each(|slot| io.put_back(slot));
                }
                take_writes(io);
                Ok(Progress::Idle)
            })
        })
        .limits(|caps| caps.max_write_batch = 2)
        .start();
        let mut ring = inline(&interface, Direction::Write).build().unwrap();
        let frames: Vec<_> = (0..5).map(|number| (filled(&ring, number), number)).collect();
        ring.submit_writes(frames).unwrap();
        for calls in [2, 2, 1] {
            assert_eq!(ring.reap().count(), calls);
        }
        assert_eq!((ring.in_flight(), ring.stats().retries), (0, 0));
    });
}

/// A driver that starts too slowly, fails, or panics.
#[test]
fn a_start_that_takes_too_long_times_out_and_is_undone() {
    use vmring::device::fault::Faults;
    guarded(|| {
        let script = Script::new(|_, _| ScriptQueue::new(|_| Ok(Progress::Idle)));
        let stops = script.stops();
        let slow = Faults::seeded(1).start_delay(Duration::from_millis(100)).wrap(script);
        let timeout = Duration::from_millis(10);
        let start = Interface::builder().device(slow).start_timeout(timeout).start();
        assert!(matches!(start, Err(Error::StartTimeout(after)) if after == timeout), "{start:?}");
        crate::support::eventually("the late device is stopped", || {
            stops.load(Ordering::SeqCst) == 1
        });
    });
}
