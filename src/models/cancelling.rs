//! Requests to cancel everything, and who waits until they are carried out.

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::{
    LONG, Polled, Reads, Rig, check, complete, explored, poller_sleeps, read, reap, setup, sleeps,
};
use crate::error::EntryError;
use crate::ring_builder::Drive;

/// Nothing is in flight, so only the engine's answer ends the wait.
///
/// Broken by: a `mark_cancels_done` that does not notify; a last look of `cancel_and_wait` without
/// `are_cancelled`; Relaxed in place of Release or Acquire at `requests`.
#[test]
fn a_cancel_of_nothing_is_answered() {
    check(3, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| Polled::new(&rig));
        assert_eq!(ring.cq.cancel_and_wait(LONG).unwrap(), 0);
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// Broken by: a `try_sleep` without `has_requests`; Relaxed in place of Release or Acquire at `requests`.
fn a_cancel_ends_what_is_in_flight(reads: Reads) {
    check(2, move || {
        let rig = Rig::new(reads);
        let mut ring = setup(|| Polled::new(&rig));
        read(&mut ring.sq, 1);
        assert_eq!(ring.cq.cancel_and_wait(LONG).unwrap(), 1);
        assert_eq!(reap(&mut ring.cq), [(1, Err(EntryError::Cancelled))]);
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

#[test]
fn a_cancel_ends_what_is_posted() {
    a_cancel_ends_what_is_in_flight(Reads::Leave);
}

#[test]
fn a_cancel_ends_what_the_device_keeps() {
    a_cancel_ends_what_is_in_flight(Reads::Keep);
}

/// The submitting half is on another thread. What it has submitted before the request is cancelled.
///
/// Broken by: Relaxed in place of Release at `requests`.
#[test]
fn a_cancel_finds_what_another_thread_submitted_before() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let Polled { mut sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        let submitted = Arc::new(AtomicBool::new(false));
        let submitter = thread::spawn({
            let submitted = submitted.clone();
            move || {
                read(&mut sq, 1);
                submitted.store(true, Ordering::Release);
                sq
            }
        });
        while !submitted.load(Ordering::Acquire) {
            thread::yield_now();
        }
        assert_eq!(cq.cancel_and_wait(LONG).unwrap(), 1);
        assert_eq!(reap(&mut cq), [(1, Err(EntryError::Cancelled))]);
        let sq = submitter.join().unwrap();
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}

#[test]
fn a_cancel_by_a_control_handle_ends_a_wait() {
    check(3, || {
        let rig = Rig::new(Reads::Leave);
        let (mut sq, mut cq) = rig.ring(Drive::Inline);
        read(&mut sq, 1);
        let control = cq.control();
        let canceller = thread::spawn(move || control.cancel_all());
        assert_eq!(complete(&mut cq, 1), [(1, Err(EntryError::Cancelled))]);
        canceller.join().unwrap();
        sleeps(&mut cq);
        drop((sq, cq));
    });
}

/// The second request is counted while the first is carried out.
///
/// Broken by: Relaxed in place of Release at `requests`.
#[test]
fn two_cancels_at_once_are_both_answered() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| Polled::new(&rig));
        let control = ring.cq.control();
        let canceller = thread::spawn(move || control.cancel_all());
        assert_eq!(ring.cq.cancel_and_wait(LONG).unwrap(), 0);
        canceller.join().unwrap();
        assert!(ring.cq.shared.are_cancelled(1));
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}
