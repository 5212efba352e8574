//! Draining against submissions, a close and a restart.

use loom::thread;

use super::{
    LONG, Mark, Polled, Reads, Rig, check, ends, explored, poller_sleeps, read, reap, setup, sleeps,
};
use crate::error::{EntryError, Error, SubmitErrorKind};
use crate::ring_builder::Drive;

/// Broken by: an engine that does not look at `is_draining` after a request; Relaxed in place of Release
/// at `requests`.
fn a_drain_against_a_submit(reads: Reads) {
    check(2, move || {
        let rig = Rig::new(reads);
        let Polled { mut sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        let submitter = thread::spawn(move || {
            let submitted = sq.submit_read(sq.alloc().unwrap(), 1);
            let accepted = submitted.is_ok();
            if let Err(refused) = submitted {
                assert_eq!(refused.kind, SubmitErrorKind::Draining);
            }
            (sq, usize::from(accepted))
        });
        let first = cq.drain(LONG).unwrap();
        let (mut sq, accepted) = submitter.join().unwrap();
        assert!(first <= accepted);
        // What was accepted meanwhile.
        assert_eq!(cq.drain(LONG).unwrap(), accepted);
        assert_eq!(reap(&mut cq), [(1, Err(EntryError::Cancelled))][..accepted]);
        poller_sleeps(&poller);
        explored();
        cq.resume();
        sq.submit_write(sq.alloc().unwrap(), 3).unwrap();
        assert_eq!(ends(&mut cq), [(3, Ok(0))]);
        Polled { sq, cq, poller, thread }.end();
    });
}

#[test]
fn a_drain_takes_back_posted_reads_while_others_are_submitted() {
    a_drain_against_a_submit(Reads::Leave);
}

#[test]
fn a_drain_takes_back_kept_reads_while_others_are_submitted() {
    a_drain_against_a_submit(Reads::Keep);
}

/// The reaping half drives the engine, which asks the device for the read that it keeps.
///
/// Broken by: a `drain` that sleeps although the engine has just worked.
#[test]
fn an_inline_drain_takes_back_what_the_device_keeps() {
    check(3, || {
        let rig = Rig::new(Reads::Keep);
        let (mut sq, mut cq) = rig.ring(Drive::Inline);
        read(&mut sq, 1);
        assert_eq!(reap(&mut cq), []);
        let waker = thread::spawn({
            let (control, wake) = (cq.control(), rig.desk.wake());
            move || {
                control.wake();
                wake.wake();
            }
        });
        assert_eq!(cq.drain(LONG).unwrap(), 1);
        assert_eq!(reap(&mut cq), [(1, Err(EntryError::Cancelled))]);
        waker.join().unwrap();
        // The wake was not the drain's.
        sleeps(&mut cq);
        drop((sq, cq));
    });
}

/// One preemption, because two take minutes.
#[test]
fn a_drain_that_races_a_stop_ends() {
    check(1, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| {
            let mut ring = Polled::new(&rig);
            read(&mut ring.sq, 1);
            ring
        });
        let control = ring.cq.control();
        let stopper = thread::spawn(move || control.stop());
        match ring.cq.drain(LONG) {
            Ok(1) | Err(Error::Closed(_)) => {}
            other => panic!("{other:?}"),
        }
        stopper.join().unwrap();
        assert_eq!(ends(&mut ring.cq), [(1, Err(EntryError::Cancelled))]);
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

#[test]
fn a_restart_does_not_end_a_drain() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| {
            let mut ring = Polled::new(&rig);
            read(&mut ring.sq, 1);
            ring
        });
        let interface = rig.interface.clone();
        let restarter = thread::spawn(move || interface.restart(LONG));
        assert_eq!(ring.cq.drain(LONG).unwrap(), 1);
        restarter.join().unwrap().unwrap();
        assert_eq!(ends(&mut ring.cq), [(1, Err(EntryError::Cancelled))]);
        poller_sleeps(&ring.poller);
        explored();
        let refused = ring.sq.submit_read(ring.sq.alloc().unwrap(), 2).unwrap_err();
        assert_eq!(refused.kind, SubmitErrorKind::Draining);
        drop(refused);
        ring.cq.resume();
        ring.sq.submit_write(ring.sq.alloc().unwrap(), 3).unwrap();
        assert_eq!(ends(&mut ring.cq), [(3, Ok(0))]);
        ring.end();
    });
}

/// A thread that sees that a ring takes submissions again sees what came before the `resume`.
///
/// Broken by: Relaxed in place of Release or Acquire at `state`.
#[test]
fn a_thread_that_sees_a_ring_open_again_sees_what_came_before() {
    check(3, || {
        let mark = Mark::default();
        let rig = Rig::new(Reads::Leave);
        let (sq, mut cq) = rig.ring(Drive::Inline);
        assert_eq!(cq.drain(LONG).unwrap(), 0);
        let looker = thread::spawn({
            let mark = mark.clone();
            move || {
                // A submit itself has a fence behind its look at this.
                if sq.shared.is_open() {
                    mark.read();
                }
                sq
            }
        });
        mark.write();
        cq.resume();
        let sq = looker.join().unwrap();
        sleeps(&mut cq);
        drop((sq, cq));
    });
}

/// A read that is submitted after a resume is not taken back, although the engine may hear of the
/// drain only then.
///
/// Broken by: a `take_back_reads` that does not look at `is_draining` after it has taken submissions.
#[test]
fn a_read_after_a_resume_is_not_taken_back() {
    check(2, || {
        let rig = Rig::new(Reads::Fill);
        let Polled { mut sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        assert_eq!(cq.drain(LONG).unwrap(), 0);
        cq.resume();
        read(&mut sq, 1);
        assert_eq!(ends(&mut cq), [(1, Ok(0))]);
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}
