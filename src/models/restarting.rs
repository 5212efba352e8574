//! Restarts, stops and builds at once: each answers, and each ring works afterwards or is closed.

use std::sync::atomic::Ordering::Relaxed;

use loom::thread;

use super::{
    Desk, LONG, Polled, Reads, Rig, check, ends, explored, poller, poller_sleeps, read, reap, setup,
};
use crate::error::{ConfigError, EntryError, Error};
use crate::lifecycle::InterfaceShared;
use crate::ring_builder::Drive;

/// The ring works: the device fills a read.
fn works(ring: &mut Polled, user_data: u64) {
    read(&mut ring.sq, user_data);
    assert_eq!(ends(&mut ring.cq), [(user_data, Ok(0))]);
}

/// Restarts the device. If the answer is that it was restarted, that began after the call.
fn restart(interface: &InterfaceShared, desk: &Desk) -> Result<(), Error> {
    let before = desk.calls.restarts.load(Relaxed);
    let answer = interface.restart(LONG);
    assert!(answer.is_err() || desk.calls.restarts.load(Relaxed) > before);
    answer
}

fn restarter(rig: &Rig) -> thread::JoinHandle<Result<(), Error>> {
    let (interface, desk) = (rig.interface.clone(), rig.desk.clone());
    thread::spawn(move || restart(&interface, &desk))
}

/// Broken by: a `Step::Detach` without anything pending; a restart that counts the one that is being
/// applied; a request, or an `apply_pending`, that does not tell the rings to look; an `announced` that
/// goes back.
#[test]
fn two_restarts_at_once_leave_the_ring_working() {
    check(2, || {
        let rig = Rig::new(Reads::Fill);
        let mut ring = setup(|| Polled::new(&rig));
        let other = restarter(&rig);
        restart(&rig.interface, &rig.desk).unwrap();
        other.join().unwrap().unwrap();
        works(&mut ring, 1);
        poller_sleeps(&ring.poller);
        explored();
        assert!((1..=2).contains(&rig.desk.calls.restarts.load(Relaxed)));
        ring.end();
    });
}

/// Broken by: a ring that is added to the interface after its engine has attached; a `Step::Detach`
/// without anything pending; an `apply_pending` that does not tell the rings to look.
#[test]
fn a_restart_during_a_build_leaves_the_ring_working() {
    check(2, || {
        let rig = Rig::new(Reads::Fill);
        let (poller, thread) = poller();
        let other = restarter(&rig);
        let built = rig.try_ring(Drive::Shared(&poller));
        other.join().unwrap().unwrap();
        // It is refused in the middle of a restart.
        let (sq, cq) = match built {
            Err(Error::Config(ConfigError::Invalid(_))) => rig.ring(Drive::Shared(&poller)),
            built => built.unwrap(),
        };
        let mut ring = Polled { sq, cq, poller, thread };
        works(&mut ring, 1);
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// The ring takes nothing more as soon as the stop returns, also if it was detached for the restart.
///
/// Broken by: a restart that does not know that a stop has overridden it; a request, or an
/// `apply_pending`, that does not tell the rings to look; a `notify_rings` that leaves it to the engine
/// to close the ring.
#[test]
fn a_stop_and_a_restart_at_once_close_the_ring() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| {
            let mut ring = Polled::new(&rig);
            read(&mut ring.sq, 1);
            ring
        });
        let other = restarter(&rig);
        rig.interface.stop(LONG).unwrap();
        assert!(ring.cq.control().closed().is_some());
        match other.join().unwrap() {
            Ok(()) | Err(Error::Config(ConfigError::Invalid(_))) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(reap(&mut ring.cq), [(1, Err(EntryError::Cancelled))]);
        poller_sleeps(&ring.poller);
        explored();
        assert_eq!(rig.desk.calls.stops.load(Relaxed), 1);
        ring.end();
    });
}

/// What is submitted while the ring is detached for a restart can be reaped when the stop returns.
///
/// Broken by: a stop that does not wait for `leave_detached`.
#[test]
fn a_stop_returns_after_what_waits_for_a_restart_has_ended() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| Polled::new(&rig));
        let other = restarter(&rig);
        read(&mut ring.sq, 1);
        rig.interface.stop(LONG).unwrap();
        assert_eq!(reap(&mut ring.cq), [(1, Err(EntryError::Cancelled))]);
        let _ = other.join().unwrap();
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}

/// A caller that hears of a stop finds the ring closed, also if another thread has stopped the device.
///
/// Broken by: a stop or a restart that answers when the device is stopped, before the rings are told; a
/// stop that comes later, and leaves it to the other thread to tell them.
#[test]
fn a_stop_by_another_thread_is_over_when_it_is_heard_of() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let ring = setup(|| Polled::new(&rig));
        let interface = rig.interface.clone();
        let stopper = thread::spawn(move || interface.stop(LONG));
        match restart(&rig.interface, &rig.desk) {
            Ok(()) => {}
            Err(Error::Config(ConfigError::Invalid(_))) => {
                assert!(ring.cq.control().closed().is_some());
            }
            Err(other) => panic!("{other:?}"),
        }
        rig.interface.stop(LONG).unwrap();
        assert!(ring.cq.control().closed().is_some());
        stopper.join().unwrap().unwrap();
        poller_sleeps(&ring.poller);
        explored();
        assert_eq!(rig.desk.calls.stops.load(Relaxed), 1);
        ring.end();
    });
}

/// Broken by: a ring that is added to the interface after its engine has attached.
#[test]
fn a_stop_during_a_build_closes_the_ring_or_refuses_it() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let (poller, thread) = poller();
        let interface = rig.interface.clone();
        let stopper = thread::spawn(move || interface.stop(LONG));
        let built = rig.try_ring(Drive::Shared(&poller));
        stopper.join().unwrap().unwrap();
        match built {
            Ok((sq, mut cq)) => {
                ends(&mut cq);
                assert!(cq.control().closed().is_some());
                poller_sleeps(&poller);
                explored();
                Polled { sq, cq, poller, thread }.end();
            }
            Err(Error::Config(ConfigError::Invalid(_))) => {
                explored();
                drop(poller);
                thread.join().unwrap();
            }
            Err(other) => panic!("{other:?}"),
        }
        assert_eq!(rig.desk.calls.stops.load(Relaxed), 1);
    });
}

/// Completions that a restart makes are there when it returns.
///
/// Broken by: a `finish_close` that detaches before it publishes.
#[test]
fn a_restart_returns_after_its_completions_are_there() {
    check(2, || {
        let rig = Rig::new(Reads::Leave);
        let mut ring = setup(|| {
            let mut ring = Polled::new(&rig);
            read(&mut ring.sq, 1);
            ring
        });
        rig.interface.restart(LONG).unwrap();
        assert_eq!(reap(&mut ring.cq), [(1, Err(EntryError::Cancelled))]);
        poller_sleeps(&ring.poller);
        explored();
        ring.end();
    });
}
