//! Looking at a completion without taking it, and taking some out of their order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use vmring::{Direction, Drive, EntryError, Ring, RingOp};

use super::{Gate, credits};
use crate::support::{
    LONG, drive_to_rest, eventually, every_way, filled, guarded, inline, loopback, number_of, post,
    reap, scaled, send, stage,
};

fn waits_for(ring: &mut Ring, n: usize) {
    while ring.wait(n, Some(LONG)) < n {}
}

/// Goal: a look takes nothing. The completion stays the next one, also if the look is forgotten, and
/// its credit and its frame stay with the ring. Then `take` gives what the look has shown.
#[test]
fn a_look_at_a_completion_takes_nothing() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let builder = interface.ring(Direction::Both).depth(4).drive(way.drive(poller));
            let mut ring = builder.build().unwrap();
            assert!(ring.peek().is_none(), "{way:?}: nothing was submitted");
            post(&mut ring, 7);
            send(&mut ring, 9);
            waits_for(&mut ring, 2);
            let out = ring.pools()[0].slots_out();
            for look in 0..4 {
                let next = ring.peek().expect("two completions wait");
                assert_eq!((next.user_data, next.result), (next.user_data, Ok(60)), "{way:?}");
                if look % 2 == 0 {
                    #[allow(clippy::forget_non_drop)] // that it has no `Drop` is what is promised
                    std::mem::forget(next);
                }
                assert_eq!((ring.in_flight(), credits(&mut ring)), (2, (3, 3)), "{way:?}");
                assert_eq!(ring.pools()[0].slots_out(), out, "{way:?}");
            }
            let mut seen = Vec::new();
            while let Some(next) = ring.peek() {
                let info = *next;
                let done = next.take();
                assert_eq!((done.user_data, done.op, done.result), {
                    (info.user_data, info.op, info.result)
                });
                assert_eq!(done.take_packet().map(|frame| number_of(&frame)).unwrap(), 9);
                seen.push((info.op, info.user_data));
            }
            seen.sort_by_key(|(_, user_data)| *user_data);
            assert_eq!(seen, [(RingOp::Read, 7), (RingOp::Write, 9)], "{way:?}");
            assert_eq!((ring.in_flight(), credits(&mut ring)), (0, (4, 4)), "{way:?}");
        });
    });
}

/// Goal: a look shows failures and cancels as they are.
#[test]
fn a_look_shows_how_an_entry_ended() {
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).depth(4).build().unwrap();
        post(&mut ring, 1);
        ring.cancel(1, 2).unwrap();
        drive_to_rest(&mut ring);
        let look = ring.peek().map(|next| (next.user_data, next.op, next.result));
        assert_eq!(look, Some((1, RingOp::Read, Err(EntryError::Cancelled))));
        assert!(ring.peek().unwrap().take().take_frame().is_some());
        let look = ring.peek().map(|next| (next.user_data, next.op, next.result));
        assert_eq!(look, Some((2, RingOp::Cancel, Ok(1))));
    });
}

/// Goal: a ring for both directions whose guest takes no packet sends on, at full depth, for as
/// long as one likes. Method: every read completes and stays in the ring; the writes behind them are
/// taken, and their frames are used again. Then the reads come out, whole and in order.
#[test]
fn reads_that_cannot_be_taken_hold_up_no_write() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            gate.reads.store(8, Relaxed);
            gate.take(8);
            let interface = gate.start();
            let mut ring = interface
                .ring(Direction::Both)
                .depth(8)
                .start_index(u32::MAX - 21)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            (0..8).for_each(|number| post(&mut ring, number));
            waits_for(&mut ring, 8);
            for round in 0..scaled(200) {
                stage(format!("{way:?}: round {round}"));
                let writes = 1 + round % 8;
                for i in 0..writes {
                    let frame = filled(&ring, i);
                    ring.submit_write(frame, 100 + i).unwrap();
                }
                waits_for(&mut ring, 8 + writes as usize);
                // A part is left for the next call, in every other round.
                let first = (writes / 2 * (round % 2)) as usize;
                let done = ring.reap_if(|next| next.op == RingOp::Write);
                assert_eq!(done.len(), writes as usize);
                let mut done: Vec<_> = done.take(first).collect();
                assert_eq!(ring.in_flight(), 8 + writes as usize - first);
                done.extend(ring.reap_if(|next| next.op == RingOp::Write));
                let numbers: Vec<_> = done.iter().map(|done| done.user_data).collect();
                assert_eq!(numbers, (100..100 + writes).collect::<Vec<_>>(), "{way:?}: in order");
                assert!(done.iter().all(|done| done.result == Ok(60)));
                assert_eq!((ring.ready(), ring.in_flight()), (8, 8), "{way:?}: the reads stay");
                assert_eq!(credits(&mut ring), (0, 8));
            }
            let reads: Vec<_> = reap(&mut ring).iter().map(|done| done.user_data).collect();
            assert_eq!(reads, (0..8).collect::<Vec<_>>(), "{way:?}: in order");
            assert_eq!(ring.pools()[0].slots_out(), 0, "{way:?}");
        });
    });
}

/// Goal: a choice that panics half-way leaves every completion in the ring.
#[test]
fn a_choice_that_panics_takes_nothing() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let builder = interface.ring(Direction::Both).depth(4).drive(way.drive(poller));
            let mut ring = builder.build().unwrap();
            (0..3).for_each(|number| post(&mut ring, number));
            (10..13).for_each(|number| send(&mut ring, number));
            waits_for(&mut ring, 6);
            let mut seen = 0;
            let choice = catch_unwind(AssertUnwindSafe(|| {
                let chosen = ring.reap_if(|next| {
                    seen += 1;
                    assert!(seen < 5, "this choice panics, as it was told to");
                    next.op == RingOp::Write
                });
                chosen.count()
            }));
            assert!(choice.is_err(), "{choice:?}");
            assert_eq!((ring.ready(), ring.in_flight()), (6, 6), "{way:?}");
            let mut all: Vec<_> = reap(&mut ring).iter().map(|done| done.user_data).collect();
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2, 10, 11, 12], "{way:?}: each once");
        });
    });
}

/// Goal: whoever leaves completions in the ring can sleep until another one comes. Method: two reads
/// stay; the ring's owner waits for a third, and the descriptor and the waker of the ring say the
/// same.
#[test]
fn a_reaper_that_leaves_some_sleeps_until_there_is_one_more() {
    guarded(|| {
        let interface = loopback();
        let mut ring = interface.ring(Direction::Read).drive(Drive::Thread).build().unwrap();
        let mut writer = interface.ring(Direction::Write).build().unwrap();
        (0..4).for_each(|number| post(&mut ring, number));
        (0..2).for_each(|number| send(&mut writer, number));
        waits_for(&mut ring, 2);
        assert_eq!(ring.reap_if(|_| false).count(), 0);
        assert_eq!(ring.wait(3, Some(Duration::from_millis(20))), 2, "nothing new");
        assert!(ring.arm_after(3, None), "two are not enough for a signal");
        let sender = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            send(&mut writer, 2);
            writer
        });
        waits_for(&mut ring, 3);
        let writer = sender.join().unwrap();
        let numbers: Vec<_> = reap(&mut ring).iter().map(|done| done.user_data).collect();
        assert_eq!(numbers, [0, 1, 2]);
        drop(writer);
    });
}

/// Goal: between the borrowed halves, a choice defers the doorbell as a plain loop does, and a frame
/// of a completion that was taken can be submitted at once.
#[test]
fn a_choice_among_completions_defers_the_doorbell() {
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).depth(4).build().unwrap();
        (0..2).for_each(|number| post(&mut ring, number));
        (10..12).for_each(|number| send(&mut ring, number));
        drive_to_rest(&mut ring);
        let (mut sq, mut cq) = ring.split();
        assert!(cq.peek().is_some());
        let mut again = 0;
        for done in cq.reap_if(|next| next.op == RingOp::Write) {
            let frame = done.take_packet().unwrap();
            sq.submit_write(frame, done.user_data + 10).unwrap();
            again += 1;
        }
        assert_eq!(again, 2);
        drive_to_rest(&mut ring);
        let numbers: Vec<_> = reap(&mut ring).iter().map(|done| done.user_data).collect();
        assert_eq!(numbers, [0, 1, 20, 21], "the reads stayed, and both writes were sent again");
    });
}

/// Goal: completions that stay in a ring are not lost when it closes, and do not keep it open.
#[test]
fn what_stays_can_be_taken_after_the_close() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let builder = interface.ring(Direction::Both).depth(4).drive(way.drive(poller));
            let mut ring = builder.build().unwrap();
            let pool = Arc::new(ring.pools()[0].clone());
            (0..3).for_each(|number| post(&mut ring, number));
            (10..12).for_each(|number| send(&mut ring, number));
            waits_for(&mut ring, 4);
            assert_eq!(ring.reap_if(|next| next.op == RingOp::Write).count(), 2);
            ring.close().unwrap();
            assert_eq!(ring.in_flight(), 3, "{way:?}");
            let read = |next: &vmring::CompletionInfo| next.result.is_ok();
            let numbers: Vec<_> = ring.reap_if(read).map(|done| done.user_data).collect();
            assert_eq!((numbers, ring.in_flight()), (vec![0, 1], 1), "{way:?}");
            drop(ring);
            eventually("every frame is home", || pool.slots_out() == 0);
        });
    });
}
