//! Ownership of frames: one place per slot, one completion per submission, and a refusal returns
//! its frame.

use std::collections::{BTreeSet, HashSet};
use std::thread;
use std::time::Duration;

use vmring::{
    CloseReason, Direction, EntryError, Frame, Pool, PoolBuilder, Ring, RingOp, Status,
    SubmitErrorKind,
};

use super::{credits, pool};
use crate::support::{
    Dice, LONG, Script, ScriptQueue, every_way, guarded, inline, loopback, packet, post, reap_n,
    scaled, send, stage,
};

/// Goal: a slot is in exactly one place. Method: random operations. The slots that the test holds,
/// those in flight and those in the free list always add up, and no slot appears twice.
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
                            cancels -= u64::from(done.op == RingOp::Cancel);
                            held.extend(done.take_frame());
                        }
                    }
                }
                let slots: HashSet<u32> = held.iter().map(Frame::slot).collect();
                assert_eq!(slots.len(), held.len(), "a slot is in two frames");
                let queued = ring.in_flight() as u64 - cancels;
                assert_eq!(u64::from(pool.slots_out()), held.len() as u64 + queued);
            }
            held.clear();
            ring.cancel_and_wait(LONG).unwrap();
            ring.reap().for_each(drop);
            assert_eq!(pool.slots_out(), 0);
            held.extend(std::iter::from_fn(|| pool.alloc()));
            let slots: BTreeSet<u32> = held.iter().map(Frame::slot).collect();
            assert!(slots.into_iter().eq(0..FRAMES as u32), "every slot is there once");
        });
    });
}

/// Goal: after `Ok`, exactly one completion comes, whatever happens next. Method: one thread
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
                                    let closed = SubmitErrorKind::Closed(CloseReason::Stopped);
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
                // The submitting thread may still wait for a credit. Reap until it has seen that
                // the ring is closed.
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

/// Goal: a CQE is retired before its frame exists. Method: forget frames and panic while reaping. A
/// forgotten frame stays lost, no completion comes twice, and the others still come.
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
        let lost = reaping.next().unwrap().take_packet().unwrap();
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

/// Submits `frame` and checks that it comes back unchanged, with `kind`.
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

/// Each kind of refusal returns the frame.
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
        let capacity = small.capacity() as usize;
        let too_small = SubmitErrorKind::TooSmall { capacity, needed: 1514 };
        refused(&mut ring, true, frame(&small, 60), too_small, false);
        refused(&mut ring, false, frame(&small, 60), SubmitErrorKind::ForeignPool, false);
        refused(&mut ring, true, frame(&pool(1), 60), SubmitErrorKind::ForeignPool, false);

        // The error of a batch says how many entries were accepted before it.
        let frames = [frame(&big, 60), frame(&big, 1515), frame(&big, 60)];
        let refusal = ring.submit_writes(frames.into_iter().zip(1..)).unwrap_err();
        assert_eq!((refusal.kind, refusal.accepted), (too_big, 1));
        assert_eq!(refusal.frame.len(), 1515);
        drop(refusal);
        assert_eq!(reap_n(&mut ring, 1)[0].user_data, 1);

        ring.close().unwrap();
        let closed = SubmitErrorKind::Closed(CloseReason::Stopped);
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
        let kind = SubmitErrorKind::Closed(CloseReason::Failed(Status::InvalidAccess));
        refused(&mut ring, false, done.frame.unwrap(), kind, false);

        let panicking = Script::new(|_, _| {
            ScriptQueue::new(|_| std::panic::resume_unwind(Box::new("on purpose")))
        })
        .start();
        let mut ring = inline(&panicking, Direction::Both).build().unwrap();
        send(&mut ring, 0);
        let done = reap_n(&mut ring, 1).remove(0);
        assert_eq!(done.result, Err(EntryError::DevicePanicked));
        let kind = SubmitErrorKind::Closed(CloseReason::DevicePanicked);
        refused(&mut ring, false, done.frame.unwrap(), kind, false);
    });
}
