//! Arming for completions, with and without a delay, against an engine that posts them.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use loom::thread;

use super::{Polled, Reads, Rig, Task, check, explored, poller_sleeps, reap, setup, sleeps};
use crate::engine::Engine;
use crate::mailbox::ready::ReadySet;
use crate::poller::Poller;
use crate::ring_builder::Drive;
use crate::sync::{Ordering, Overwrite};
use crate::sys::{now, pass_time};

/// Broken by: a poller that sleeps without its last look; a `try_sleep` that does not look at the SQ.
#[test]
fn a_task_that_wants_two_completions_is_woken_for_them() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let Polled { mut sq, mut cq, poller, thread } = setup(|| Polled::new(&rig));
        let submitter = thread::spawn(move || {
            for n in 1..=2 {
                sq.submit_write(sq.alloc().unwrap(), n).unwrap();
            }
            sq
        });
        let task = Arc::new(Task::default());
        let waker = Waker::from(task.clone());
        while cq.poll_ready(&mut Context::from_waker(&waker), 2) == Poll::Pending {
            task.sleep();
        }
        assert_eq!(reap(&mut cq), [(1, Ok(0)), (2, Ok(0))]);
        let sq = submitter.join().unwrap();
        sleeps(&mut cq);
        poller_sleeps(&poller);
        explored();
        Polled { sq, cq, poller, thread }.end();
    });
}

const LATE: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_millis(1);

/// Drives an engine as a poller of one ring does, until the poller is told that something has arrived.
/// Returns it asleep.
fn drive(mut engine: Engine, set: &ReadySet) -> Engine {
    let mut told = false;
    loop {
        while engine.poll_once() {}
        if !engine.try_sleep() {
            continue;
        }
        let mut rung = false;
        while !rung {
            // Acquire: pairs with the Release of the thread that tells.
            told |= set.arrived.swap(false, Ordering::Acquire);
            set.collect(|_| rung = true);
            if told && !rung {
                return engine;
            }
            if !rung {
                set.bell.sleep(None, || set.has_news());
            }
        }
    }
}

/// One completion waits and no other comes, and the reaper arms for two with a delay, which must run.
/// `arm` says how it arms. When all is quiet the delay must be the last one, `SOON`.
fn a_delay_runs(arm: impl Fn(&mut crate::ring::CompletionQueue) + Send + Sync + Copy + 'static) {
    check(3, move || {
        let rig = Rig::new(Reads::Leave);
        let poller = Poller::unstarted();
        let (mut sq, mut cq) = rig.ring(Drive::Shared(&poller));
        let (engine, handoff) = poller.shared().take_engine();
        let set = poller.shared().set.clone();
        let driver = thread::spawn({
            let set = set.clone();
            move || drive(engine, &set)
        });
        sq.submit_write(sq.alloc().unwrap(), 1).unwrap();
        arm(&mut cq);
        // Release: pairs with the Acquire in `drive`.
        set.arrived.overwrite(true, Ordering::Release);
        set.bell.ring();
        let mut engine = driver.join().unwrap();
        assert!(cq.shared.cq_bell.is_armed(), "one completion is too few");
        assert_eq!(engine.deadline(), Some(now() + SOON));
        pass_time(SOON);
        engine.poll_once();
        assert!(!cq.shared.cq_bell.is_armed(), "the delay is over");
        assert_eq!(reap(&mut cq), [(1, Ok(0))]);
        assert!(cq.arm());
        while engine.poll_once() {}
        assert!(engine.try_sleep());
        explored();
        handoff.give(engine);
    });
}

/// Broken by: an `arm_bells` that does not start the clock, or stores what it wants after it has armed.
#[test]
fn a_delay_runs_for_a_completion_that_races_the_arming() {
    a_delay_runs(|cq| assert!(cq.arm_after(2, Some(SOON))));
}

/// Broken by: a `coalescing` that acts on the value that it loaded.
#[test]
fn the_delay_of_the_last_arming_counts() {
    a_delay_runs(|cq| {
        assert!(cq.arm_after(2, Some(LATE)));
        assert!(cq.arm_after(2, Some(SOON)));
    });
}
