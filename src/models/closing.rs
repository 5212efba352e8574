//! Closing: what is in flight completes once, and nobody sleeps for ever beside a closed ring.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::{
    Mark, Polled, Reads, Rig, Task, check, complete, ends, explored, poller_sleeps, read, reap,
    setup, sleeps, take_reads,
};
use crate::error::EntryError;
use crate::ring::SubmissionQueue;
use crate::ring_builder::Drive;

/// Submits two writes, and returns the half with the numbers of those that were accepted.
fn submit_two(mut sq: SubmissionQueue) -> (SubmissionQueue, Vec<u64>) {
    let accepted = (1..=2).filter(|n| sq.submit_write(sq.alloc().unwrap(), *n).is_ok());
    let accepted = accepted.collect();
    (sq, accepted)
}

/// Broken by: a poller that sleeps without its last look.
#[test]
fn each_write_that_races_a_close_completes_or_is_refused() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let Polled { sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        let submitter = thread::spawn(move || submit_two(sq));
        cq.close().unwrap();
        let mut done = reap(&mut cq);
        let (sq, accepted) = submitter.join().unwrap();
        done.append(&mut ends(&mut cq));
        let numbers: Vec<_> = done.iter().map(|(n, _)| *n).collect();
        assert_eq!(numbers, accepted, "each accepted entry completes once, in order");
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}

/// The ring is stopped, and its poller hands the engine to the reaping half, which sleeps as a task.
///
/// Broken by: a `ring_engine` that does not ring the reaper of a closed ring; a `hand_back` that does
/// not notify; an `arm_bells` that does not take the engine over; a `try_sleep` that does not look at
/// the SQ.
#[test]
fn a_write_that_races_the_hand_over_wakes_the_task_that_took_over() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let Polled { mut sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        let task = Arc::new(Task::default());
        let waker = Waker::from(task.clone());
        let refused = Arc::new(AtomicBool::new(false));
        let submitter = thread::spawn({
            let (waker, refused) = (waker.clone(), refused.clone());
            move || {
                if sq.submit_write(sq.alloc().unwrap(), 1).is_err() {
                    // Nobody else wakes the task.
                    refused.store(true, Ordering::Release);
                    waker.wake();
                }
                sq
            }
        });
        cq.control().stop();
        let cx = &mut Context::from_waker(&waker);
        let mut done = Vec::new();
        while done.is_empty() && !refused.load(Ordering::Acquire) {
            match cq.poll_ready(cx, 1) {
                Poll::Ready(_) => done = reap(&mut cq),
                Poll::Pending => task.sleep(),
            }
        }
        let sq = submitter.join().unwrap();
        assert_eq!(done.is_empty(), refused.load(Ordering::Acquire));
        sleeps(&mut cq);
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}

/// The ring is stopped while a thread of the device has a slot, which it drops.
///
/// Broken by: the same as the model above.
#[test]
fn a_slot_that_is_dropped_during_the_hand_over_completes() {
    check(2, || {
        let rig = Rig::over(Reads::Keep, false);
        let (mut ring, slot) = setup(|| {
            let mut ring = Polled::new(&rig);
            let [slot] = take_reads(&rig, &mut ring.sq, &mut ring.cq);
            (ring, slot)
        });
        let device = thread::spawn({
            let wake = rig.desk.wake();
            move || {
                drop(slot);
                wake.wake();
            }
        });
        ring.cq.control().stop();
        let done = complete(&mut ring.cq, 1);
        let cancelled_or_abandoned = [Err(EntryError::Cancelled), Err(EntryError::Abandoned)];
        assert!(cancelled_or_abandoned.contains(&done[0].1), "{done:?}");
        device.join().unwrap();
        sleeps(&mut ring.cq);
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// Broken by: a `try_sleep` without `has_requests`.
#[test]
fn a_stop_ends_a_wait_of_the_thread_that_drives() {
    check(3, || {
        let rig = Rig::new(Reads::Leave);
        let (mut sq, mut cq) = rig.ring(Drive::Inline);
        read(&mut sq, 1);
        let control = cq.control();
        let stopper = thread::spawn(move || control.stop());
        assert_eq!(complete(&mut cq, 1), [(1, Err(EntryError::Cancelled))]);
        stopper.join().unwrap();
        sleeps(&mut cq);
        drop((sq, cq));
    });
}

/// A thread that sees that a ring is closed sees what came before the `stop`.
///
/// Broken by: Relaxed in place of Release or Acquire at `state`.
#[test]
fn a_thread_that_sees_a_ring_closed_sees_what_came_before() {
    check(3, || {
        let rig = Rig::new(Reads::Leave);
        let (mut sq, cq) = rig.ring(Drive::Inline);
        let marks = [Mark::default(), Mark::default(), Mark::default()];
        let stopper = thread::spawn({
            let (control, marks) = (cq.control(), marks.clone());
            move || {
                marks.iter().for_each(Mark::write);
                control.stop();
            }
        });
        let frame = sq.alloc().unwrap();
        if sq.submit_write(frame, 1).is_err() {
            marks[0].read();
        }
        if cq.control().closed().is_some() {
            marks[1].read();
        }
        if cq.shared.is_closed() {
            marks[2].read();
        }
        stopper.join().unwrap();
        drop((sq, cq));
    });
}
