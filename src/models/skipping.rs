//! Writes whose success has no completion: nobody sleeps for ever beside a ring that ends in silence.

use std::sync::Arc;
use std::task::{Context, Waker};

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::{
    LONG, Polled, Reads, Rig, Task, check, explored, poller_sleeps, read, reap, setup, sleeps,
};
use crate::config::Direction;
use crate::error::{EntryError, SubmitErrorKind};
use crate::policy::IdlePolicy;
use crate::ring::{CompletionQueue, SubmissionQueue};
use crate::ring_builder::{Drive, RingBuilder};

/// Submits a write whose success has no completion. Returns whether it was accepted.
fn write(sq: &mut SubmissionQueue, user_data: u64) -> Result<(), SubmitErrorKind> {
    let frame = sq.alloc().expect("more frames than credits");
    sq.submit_write_skip_success(frame, user_data).map_err(|refused| refused.kind)
}

/// A ring with one credit for writes, and one for reads, on a poller.
fn shallow(rig: &Rig) -> Polled {
    let (poller, thread) = super::poller();
    let builder = RingBuilder::new(&rig.interface, Direction::Both).depth(1).cancel_depth(1);
    let builder = builder.pool(&rig.pool).idle(IdlePolicy::PARK).start_index(u32::MAX);
    let ring = builder.drive(Drive::Shared(&poller)).build().unwrap();
    let (sq, cq) = ring.into_split();
    Polled { sq, cq, poller, thread }
}

/// The thread that waits has submitted too. The last entry in flight ends without a completion, while
/// the thread goes to sleep.
///
/// Broken by: a `notify_if_due` that looks at completions only; an `arm_bells` whose last look does
/// not count what is in flight; a `publish` that does not report skipped completions.
#[test]
fn the_last_skipped_success_ends_a_wait() {
    check(3, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| Polled::new(&rig));
        write(&mut ring.sq, 1).unwrap();
        assert_eq!(ring.cq.wait(1, None), 0);
        assert_eq!(ring.cq.in_flight(), 0);
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// The same with a completion before or behind the skipped one.
///
/// Broken by: the same as above.
fn a_wait_for_more_than_comes_ends(skip: [bool; 2]) {
    check(2, move || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| Polled::new(&rig));
        for (number, skip) in (1..).zip(skip) {
            if skip {
                write(&mut ring.sq, number).unwrap();
            } else {
                let frame = ring.sq.alloc().unwrap();
                ring.sq.submit_write(frame, number).unwrap();
            }
        }
        let number = 1 + u64::from(skip[0]);
        assert_eq!(ring.cq.wait(2, None), 1);
        assert_eq!((ring.cq.in_flight(), reap(&mut ring.cq)), (1, vec![(number, Ok(0))]));
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

#[test]
fn a_skipped_success_behind_a_completion_ends_a_wait_for_two() {
    a_wait_for_more_than_comes_ends([false, true]);
}

#[test]
fn a_skipped_success_before_a_completion_ends_a_wait_for_two() {
    a_wait_for_more_than_comes_ends([true, false]);
}

/// Another thread submits. What the reaper sees in flight is never less than nothing, and its wait ends
/// each time. One preemption, because two take minutes. The order of the loads in `in_flight` takes
/// more; a model of `vmring-core` shows it.
#[test]
fn a_wait_ends_while_another_thread_submits_writes_that_skip_success() {
    check(1, || {
        let rig = Rig::new(Reads::Leave);
        let Polled { mut sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        let submitter = thread::spawn(move || {
            for number in 1..=2 {
                write(&mut sq, number).unwrap();
            }
            sq
        });
        for _ in 0..2 {
            assert!(cq.in_flight() <= 2);
            assert_eq!(cq.wait(1, None), 0);
        }
        let sq = submitter.join().unwrap();
        assert_eq!(cq.wait(1, None), 0);
        assert_eq!(cq.in_flight(), 0);
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}

/// What the submitter does that was refused: it sleeps until the reaper tells it to try again.
fn submit_when_told(mut sq: SubmissionQueue, task: &Task) -> SubmissionQueue {
    for number in 1..=2 {
        while let Err(refused) = write(&mut sq, number) {
            assert_eq!(refused, SubmitErrorKind::NoCredit);
            task.sleep();
        }
    }
    sq
}

/// Nobody waits for the last write, which ends all the same.
fn only_the_read_is_left(cq: &CompletionQueue) {
    while cq.in_flight() > 1 {
        thread::yield_now();
    }
}

/// The submitter is refused, because its only credit is in flight. The reaper, who waits for a packet
/// that does not come, tells it when the credit is back.
///
/// Broken by: a `notify_if_due` or a last look without `is_shortage_over`; a `report_shortage` that
/// does not ring, or reports a count that it has loaded after the attempt.
#[test]
fn a_refused_submitter_is_told_by_a_reaper_that_waits() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let Polled { sq, mut cq, poller, thread } = setup(|| {
            let mut ring = shallow(&rig);
            read(&mut ring.sq, 9);
            poller_sleeps(&ring.poller);
            ring
        });
        let (task, over) = (Arc::new(Task::default()), Arc::new(AtomicBool::new(false)));
        let submitter = thread::spawn({
            let (task, over, control) = (task.clone(), over.clone(), cq.control());
            move || {
                let sq = submit_when_told(sq, &task);
                over.store(true, Ordering::Release);
                control.wake();
                sq
            }
        });
        while !over.load(Ordering::Acquire) {
            assert_eq!(cq.wait(1, None), 0);
            std::task::Wake::wake(task.clone());
        }
        let sq = submitter.join().unwrap();
        only_the_read_is_left(&cq);
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}

/// The same, and the reaper sleeps as a task.
///
/// Broken by: the same as above.
#[test]
fn a_refused_submitter_is_told_by_a_task_that_polls() {
    check(1, || {
        let rig = Rig::new(Reads::Leave);
        let Polled { sq, mut cq, poller, thread } = setup(|| {
            let mut ring = shallow(&rig);
            read(&mut ring.sq, 9);
            poller_sleeps(&ring.poller);
            ring
        });
        let (task, over) = (Arc::new(Task::default()), Arc::new(AtomicBool::new(false)));
        let submitter = thread::spawn({
            let (task, over, control) = (task.clone(), over.clone(), cq.control());
            move || {
                let sq = submit_when_told(sq, &task);
                over.store(true, Ordering::Release);
                control.wake();
                sq
            }
        });
        let reaper = Arc::new(Task::default());
        let waker = Waker::from(reaper.clone());
        let cx = &mut Context::from_waker(&waker);
        while !over.load(Ordering::Acquire) {
            if cq.poll_ready(cx, 1).is_pending() {
                reaper.sleep();
            }
            std::task::Wake::wake(task.clone());
        }
        let sq = submitter.join().unwrap();
        only_the_read_is_left(&cq);
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}

/// One thread submits and waits, beside a read that nobody answers. A refused submit is accepted after
/// the wait, and its frame is there.
///
/// Broken by: Relaxed in place of Release or Acquire at the count of skipped completions.
#[test]
fn who_is_refused_and_waits_submits_again() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| {
            let mut ring = shallow(&rig);
            read(&mut ring.sq, 9);
            poller_sleeps(&ring.poller);
            ring
        });
        for number in 1..=3 {
            while let Err(refused) = write(&mut ring.sq, number) {
                assert_eq!(refused, SubmitErrorKind::NoCredit);
                assert_eq!(ring.cq.wait(1, None), 0);
            }
            // The read's frame and this one.
            assert!(rig.pool.slots_out() <= 2, "a credit is back before its frame");
        }
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// Submits two writes. Returns how many were accepted.
fn submit_two(mut sq: SubmissionQueue) -> (SubmissionQueue, usize) {
    let accepted = (1..=2).filter(|number| write(&mut sq, *number).is_ok()).count();
    (sq, accepted)
}

/// Reaps what waits: all of it has ended for `why`. Returns how much it was.
fn failed(cq: &mut CompletionQueue, why: EntryError) -> usize {
    let done = reap(cq);
    assert!(done.iter().all(|(_, result)| *result == Err(why)), "{done:?}");
    done.len()
}

/// Broken by: a poller that sleeps without its last look.
#[test]
fn each_write_that_skips_success_and_races_a_close_ends_once() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let Polled { sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        let submitter = thread::spawn(move || submit_two(sq));
        cq.close().unwrap();
        let (sq, accepted) = submitter.join().unwrap();
        while cq.in_flight() > cq.ready() {
            cq.wait(2, None);
        }
        let completed = failed(&mut cq, EntryError::Cancelled);
        assert_eq!(cq.in_flight(), 0);
        assert_eq!(cq.stats().tx_packets + completed as u64, accepted as u64);
        sleeps(&mut cq);
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}

/// The posted read comes back, and the write ends before or behind it.
///
/// Broken by: a `drain` that waits for a completion of each entry in flight.
#[test]
fn a_drain_ends_when_writes_that_skip_success_have_ended() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| {
            let mut ring = Polled::new(&rig);
            read(&mut ring.sq, 9);
            ring
        });
        write(&mut ring.sq, 1).unwrap();
        assert_eq!(ring.cq.drain(LONG).unwrap(), 1);
        assert_eq!(ring.cq.in_flight(), 1);
        assert_eq!(failed(&mut ring.cq, EntryError::Cancelled), 1);
        assert_eq!(write(&mut ring.sq, 2), Err(SubmitErrorKind::Draining));
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// The cancel may find the write, or find that it has ended.
///
/// Broken by: a `cancel_and_wait` that looks for the end before it was answered, which spins.
#[test]
fn a_cancel_of_a_write_that_skips_success_ends() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| Polled::new(&rig));
        write(&mut ring.sq, 1).unwrap();
        let completed = ring.cq.cancel_and_wait(LONG).unwrap();
        assert_eq!(ring.cq.in_flight(), completed);
        assert_eq!(failed(&mut ring.cq, EntryError::Cancelled), completed);
        assert_eq!(ring.cq.stats().tx_packets + completed as u64, 1);
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// An inline ring whose submitting half is on another thread: the owner of the engine counts, sleeps
/// and tells.
///
/// Broken by: a `report_shortage` that does not ring.
#[test]
fn a_refused_submitter_is_told_by_who_drives_the_engine() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let builder = RingBuilder::new(&rig.interface, Direction::Both).depth(1).cancel_depth(1);
        let builder = builder.pool(&rig.pool).idle(IdlePolicy::PARK).drive(Drive::Inline);
        let (mut sq, mut cq) = builder.build().unwrap().into_split();
        read(&mut sq, 9);
        assert_eq!(reap(&mut cq), []);
        let (task, over) = (Arc::new(Task::default()), Arc::new(AtomicBool::new(false)));
        let submitter = thread::spawn({
            let (task, over, control) = (task.clone(), over.clone(), cq.control());
            move || {
                let sq = submit_when_told(sq, &task);
                over.store(true, Ordering::Release);
                control.wake();
                sq
            }
        });
        while !over.load(Ordering::Acquire) {
            assert_eq!(cq.wait(1, None), 0);
            std::task::Wake::wake(task.clone());
        }
        drop((submitter.join().unwrap(), cq));
    });
}
