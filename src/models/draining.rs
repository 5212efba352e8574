//! Draining against submissions, a close and a restart.

use loom::thread;

use super::{LONG, Polled, Reads, Rig, check, ends, explored, poller_sleeps, read, reap, setup};
use crate::error::{EntryError, Error, SubmitErrorKind};

/// Looks for: an engine that does not look at `is_draining` after a request; a `drain` that does not
/// sleep behind its own look; Relaxed in place of Release or Acquire at `requests`.
fn a_drain_against_a_submit(reads: Reads) {
    check(2, move || {
        let rig = Rig::new(reads);
        let Polled { mut sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        let submitter = thread::spawn(move || {
            let accepted = (1..=1).filter(|n| {
                let submitted = sq.submit_read(sq.alloc().unwrap(), *n);
                let refused = |refused| assert_eq!(refused, SubmitErrorKind::Draining);
                submitted.map_err(|error| refused(error.kind)).is_ok()
            });
            let accepted: Vec<u64> = accepted.collect();
            (sq, accepted)
        });
        let first = cq.drain(LONG).unwrap();
        let (mut sq, accepted) = submitter.join().unwrap();
        assert!(first <= accepted.len());
        // What was accepted meanwhile.
        assert_eq!(cq.drain(LONG).unwrap(), accepted.len());
        let done: Vec<_> = accepted.iter().map(|n| (*n, Err(EntryError::Cancelled))).collect();
        assert_eq!(reap(&mut cq), done, "in the order in which they were posted");
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

/// Looks for: a last look of `drain` without `is_closed`; a `hand_back` that does not notify.
#[test]
fn a_drain_that_races_a_stop_ends() {
    check(2, || {
        let rig = Rig::new(Reads::Keep);
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

/// Looks for: a restart that ends the draining; a drained engine that does not attach again.
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

/// Whoever finds that a ring takes submissions again sees what came before the `resume`.
///
/// Looks for: Relaxed in place of Release or Acquire at `state`.
#[test]
fn who_submits_after_a_resume_sees_what_came_before() {
    check(3, || {
        let mark = super::Mark::default();
        let rig = Rig::new(Reads::Leave);
        let (mut sq, mut cq) = rig.ring(crate::ring_builder::Drive::Inline);
        assert_eq!(cq.drain(LONG).unwrap(), 0);
        let submitter = thread::spawn({
            let mark = mark.clone();
            move || {
                if sq.submit_write(sq.alloc().unwrap(), 1).is_ok() {
                    mark.read();
                }
                sq
            }
        });
        mark.write();
        cq.resume();
        let sq = submitter.join().unwrap();
        ends(&mut cq);
        drop((sq, cq));
    });
}
