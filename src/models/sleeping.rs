//! What wakes a sleeper is neither lost nor kept, in any phase of the engine.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use loom::thread;

use super::{
    LONG, Mark, Polled, Reads, Rig, check, complete, explored, poller_sleeps, read, reap, setup,
    sleeps, take_reads,
};
use crate::device::slot::PostedSlot;
use crate::error::EntryError;
use crate::ring::{CompletionQueue, SubmissionQueue};
use crate::ring_builder::Drive;

/// Two threads of the device drop a slot each, while the engine collects, publishes and goes to sleep.
///
/// Broken by: a `take_dropped` that clears the flag after the list was locked; a `try_sleep` without
/// `has_requests`; a `slot_dropped` that does not ring.
#[test]
fn dropped_slots_complete_while_the_reaper_drives_the_engine() {
    check(3, || {
        let rig = Rig::over(Reads::Keep, false);
        let (mut sq, mut cq) = rig.ring(Drive::Inline);
        let droppers =
            take_reads::<2>(&rig, &mut sq, &mut cq).map(|slot| thread::spawn(|| drop(slot)));
        let done = complete(&mut cq, 2);
        assert!(done.iter().all(|(_, result)| *result == Err(EntryError::Abandoned)));
        droppers.into_iter().for_each(|dropper| dropper.join().unwrap());
        sleeps(&mut cq);
    });
}

/// Broken by: a `slot_dropped` that does not ring.
#[test]
fn a_dropped_slot_completes_while_a_poller_drives_the_engine() {
    check(2, || {
        let rig = Rig::over(Reads::Keep, false);
        let (mut ring, slot) = setup(|| {
            let mut ring = Polled::new(&rig);
            let [slot] = take_reads(&rig, &mut ring.sq, &mut ring.cq);
            (ring, slot)
        });
        let dropper = thread::spawn(|| drop(slot));
        assert_eq!(complete(&mut ring.cq, 1), [(1, Err(EntryError::Abandoned))]);
        dropper.join().unwrap();
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// The phases of an engine in which something can still be in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The device keeps a read, whose slot a thread has.
    Open,
    /// The ring closes, but the queue waits for the thread that has the slot.
    Closing,
    /// The ring waits for the other ring of the interface, which holds up a restart.
    Detached,
    /// The queue was closed, although a thread still has the slot.
    Closed,
}

/// An inline ring in `phase`, with a read in flight.
struct InPhase {
    rig: Rig,
    sq: SubmissionQueue,
    cq: CompletionQueue,
    slot: Option<PostedSlot>,
    other: Option<(SubmissionQueue, CompletionQueue)>,
}

impl InPhase {
    fn new(phase: Phase) -> Self {
        let rig = Rig::over(Reads::Keep, phase == Phase::Closing);
        let other = (phase == Phase::Detached).then(|| rig.ring(Drive::Inline));
        let (mut sq, mut cq) = rig.ring(Drive::Inline);
        let slot = if phase == Phase::Detached {
            // It waits for no time, and the restart stays pending.
            rig.interface.restart(Duration::ZERO).unwrap_err();
            assert_eq!(reap(&mut cq), []);
            read(&mut sq, 1);
            None
        } else {
            let [slot] = take_reads(&rig, &mut sq, &mut cq);
            if phase != Phase::Open {
                cq.control().stop();
            }
            Some(slot)
        };
        assert_eq!(reap(&mut cq), []);
        assert_eq!(cq.in_flight(), 1);
        Self { rig, sq, cq, slot, other }
    }
}

/// Broken by: a `wait` whose last look takes the wake, or does not look for it; Relaxed in place of
/// Release or Acquire at `woken`.
fn a_wake_ends_a_wait(phase: Phase) {
    check(3, move || {
        let InPhase { rig, sq, mut cq, slot, other } = InPhase::new(phase);
        let mark = Mark::default();
        let waker = thread::spawn({
            let (control, mark) = (cq.control(), mark.clone());
            move || {
                mark.write();
                control.wake();
            }
        });
        assert_eq!(cq.wait(1, None), 0);
        mark.read();
        waker.join().unwrap();
        sleeps(&mut cq);
        // The closing waits for it.
        slot.into_iter().for_each(|slot| match phase {
            Phase::Closed => drop(slot),
            _ => rig.desk.fill(slot),
        });
        drop((other, sq, cq));
    });
}

#[test]
fn a_wake_ends_a_wait_on_an_open_ring() {
    a_wake_ends_a_wait(Phase::Open);
}

#[test]
fn a_wake_ends_a_wait_on_a_closing_ring() {
    a_wake_ends_a_wait(Phase::Closing);
}

#[test]
fn a_wake_ends_a_wait_on_a_detached_ring() {
    a_wake_ends_a_wait(Phase::Detached);
}

#[test]
fn a_wake_ends_a_wait_on_a_closed_ring() {
    a_wake_ends_a_wait(Phase::Closed);
}

/// A wake that comes while `cancel_and_wait` waits is left for the next `wait`.
///
/// Broken by: a `cancel_and_wait` that takes the wake; a `try_sleep` without `has_requests`.
#[test]
fn a_wake_during_a_cancel_ends_the_next_wait() {
    check(2, || {
        let rig = Rig::over(Reads::Keep, true);
        let (mut ring, slot) = setup(|| {
            let mut ring = Polled::new(&rig);
            let [slot] = take_reads(&rig, &mut ring.sq, &mut ring.cq);
            (ring, slot)
        });
        let waker = thread::spawn({
            let (control, desk, wake) = (ring.cq.control(), rig.desk.clone(), rig.desk.wake());
            move || {
                control.wake();
                desk.fill(slot);
                wake.wake();
            }
        });
        assert_eq!(ring.cq.cancel_and_wait(LONG).unwrap(), 1);
        assert_eq!(reap(&mut ring.cq), [(1, Ok(0))]);
        waker.join().unwrap();
        explored();
        read(&mut ring.sq, 2);
        assert_eq!(ring.cq.wait(1, None), 0);
        poller_sleeps(&ring.poller);
        ring.end();
    });
}

/// A thread of the device rings, after it has filled or dropped the slot that it has.
///
/// Broken by: a `device_rang` that is not taken in every phase; a `ring_from_device` that does not
/// ring; a `try_sleep` without `has_requests`.
fn a_devices_wake_is_consumed(phase: Phase) {
    check(3, move || {
        let InPhase { rig, sq, mut cq, slot, other } = InPhase::new(phase);
        let device = thread::spawn({
            let (desk, wake) = (rig.desk.clone(), rig.desk.wake());
            move || {
                match (phase, slot) {
                    (Phase::Closed, slot) => drop(slot),
                    (_, Some(slot)) => desk.fill(slot),
                    (_, None) => {}
                }
                wake.wake();
            }
        });
        match phase {
            Phase::Detached => sleeps(&mut cq),
            Phase::Closed => assert_eq!(complete(&mut cq, 1), [(1, Err(EntryError::Cancelled))]),
            _ => assert_eq!(complete(&mut cq, 1), [(1, Ok(0))]),
        }
        device.join().unwrap();
        sleeps(&mut cq);
        if let Some(other) = other {
            // The restart happens, and the read goes to the new queue.
            drop(other);
            assert_eq!(reap(&mut cq), []);
            assert_eq!((rig.desk.calls.restarts.load(Relaxed), rig.desk.kept()), (1, 1));
            sleeps(&mut cq);
        }
        drop((sq, cq));
    });
}

#[test]
fn a_devices_wake_is_consumed_by_an_open_ring() {
    a_devices_wake_is_consumed(Phase::Open);
}

#[test]
fn a_devices_wake_is_consumed_by_a_closing_ring() {
    a_devices_wake_is_consumed(Phase::Closing);
}

#[test]
fn a_devices_wake_is_consumed_by_a_detached_ring() {
    a_devices_wake_is_consumed(Phase::Detached);
}

#[test]
fn a_devices_wake_is_consumed_by_a_closed_ring() {
    a_devices_wake_is_consumed(Phase::Closed);
}

/// Broken by: a `device_rang` that is not taken in every phase; a `try_sleep` without `has_requests`.
#[test]
fn a_devices_wake_is_consumed_by_a_detached_ring_on_a_poller() {
    check(2, || {
        let rig = Rig::new(Reads::Fill);
        let (mut ring, other) = setup(|| {
            let other = rig.ring(Drive::Inline);
            let mut ring = Polled::new(&rig);
            read(&mut ring.sq, 1);
            complete(&mut ring.cq, 1);
            rig.interface.restart(Duration::ZERO).unwrap_err();
            poller_sleeps(&ring.poller);
            (ring, other)
        });
        let device = thread::spawn({
            let wake = rig.desk.wake();
            move || wake.wake()
        });
        // What is submitted meanwhile waits for the restart, which waits for the other ring.
        read(&mut ring.sq, 2);
        drop(other);
        assert_eq!(complete(&mut ring.cq, 1), [(2, Ok(0))]);
        device.join().unwrap();
        poller_sleeps(&ring.poller);
        explored();
        assert_eq!(rig.desk.calls.restarts.load(Relaxed), 1);
        ring.end();
    });
}

/// Nothing is posted, so the device is polled because it has rung. It finds what its thread wrote.
///
/// Broken by: Relaxed in place of Release or Acquire at `device_rang`.
#[test]
fn a_poll_for_a_devices_wake_sees_what_came_before_it() {
    check(3, || {
        let mark = Mark::default();
        let rig = Rig::with(|desk| desk.read_by_polls = Some(mark.clone()));
        let (sq, mut cq) = rig.ring(Drive::Inline);
        let device = thread::spawn({
            let wake = rig.desk.wake();
            move || {
                mark.write();
                wake.wake();
            }
        });
        while rig.desk.calls.polls.load(Relaxed) == 0 {
            assert_eq!(reap(&mut cq), []);
            thread::yield_now();
        }
        device.join().unwrap();
        sleeps(&mut cq);
        drop((sq, cq));
    });
}
