//! Races: each way to lose a wake-up or a request for ever.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::Duration;

use vmring::device::fault::Faults;
use vmring::device::{PostedSlot, Progress};
use vmring::{
    CloseReason, Direction, Drive, EntryError, Error, IdlePolicy, Interface, Loopback, Poller, Ring,
};

use super::{AtClose, Keeper, MOMENT, Running, assert_works};
use crate::support::{
    LONG, Script, ScriptQueue, Way, eventually, filled, guarded, inline, loopback, number_of, post,
    quiet_network, reap, reap_n, scaled, send, stage, unique,
};

/// Goal: a slot that a device drops on a thread of its own always completes. Method: a few threads
/// drop many slots each, so the engine takes some of them while others are dropped. Each round
/// ends only when all have completed, so a slot that is overlooked is not found with the next.
#[test]
fn slots_dropped_on_other_threads_always_complete() {
    guarded(|| {
        let droppers: Vec<_> = (0..4)
            .map(|_| {
                let (sender, slots) = mpsc::channel::<Vec<PostedSlot>>();
                thread::spawn(move || slots.into_iter().for_each(drop));
                sender
            })
            .collect();
        let interface = Script::new(move |_, _| {
            let droppers = droppers.clone();
            ScriptQueue::new(move |cx| {
                let mut shares: Vec<Vec<PostedSlot>> = droppers.iter().map(|_| vec![]).collect();
                for share in (0..droppers.len()).cycle() {
                    let Some(slot) = cx.take_write() else { break };
                    shares[share].push(slot);
                }
                for (dropper, share) in droppers.iter().zip(shares) {
                    if !share.is_empty() {
                        dropper.send(share).unwrap();
                    }
                }
                Ok(Progress::Idle)
            })
        })
        .start();
        let builder = interface.ring(Direction::Write).depth(64).idle(IdlePolicy::PARK);
        let mut ring = builder.build().unwrap();
        for round in 0..scaled(40_000) {
            let n = 1 + round % 64;
            let writes: Vec<_> = (0..n).map(|number| (filled(&ring, number), number)).collect();
            assert_eq!(ring.submit_writes(writes).unwrap(), n as usize);
            for done in reap_n(&mut ring, n as usize) {
                assert_eq!(done.result, Err(EntryError::Abandoned));
            }
        }
    });
}

fn restart_at_once(interface: &Arc<Interface>, n: usize) -> Vec<Result<(), Error>> {
    let gate = Arc::new(Barrier::new(n));
    let restarts: Vec<_> = (0..n)
        .map(|_| {
            let (interface, gate) = (interface.clone(), gate.clone());
            Running::start(move || {
                gate.wait();
                interface.restart(LONG)
            })
        })
        .collect();
    restarts.into_iter().map(|restart| restart.answer("a restart")).collect()
}

/// Goal: of two restarts that join each other, the second does not detach the rings that the first
/// has brought back.
#[test]
fn two_restarts_at_once_leave_the_ring_working() {
    guarded(|| {
        for way in [Way::Thread, Way::Shared] {
            let poller = Poller::start().unwrap();
            let interface = Arc::new(loopback());
            let builder = interface.ring(Direction::Both).depth(8);
            let mut ring = builder.drive(way.drive(&poller)).build().unwrap();
            for round in 0..scaled(200) {
                for answer in restart_at_once(&interface, 2 + round as usize % 2) {
                    answer.unwrap();
                }
                stage(format!("{way:?}: the ring works after round {round}"));
                assert_works(&mut ring);
            }
        }
    });
}

/// Goal: the same for an inline ring. Method: its owner drives it all the while.
#[test]
fn two_restarts_at_once_leave_an_inline_ring_working() {
    guarded(|| {
        let interface = Arc::new(loopback());
        let mut ring = inline(&interface, Direction::Both).depth(8).build().unwrap();
        for round in 0..scaled(200) {
            let restarting = {
                let interface = interface.clone();
                Running::start(move || restart_at_once(&interface, 2))
            };
            eventually("both restarts have answered", || {
                let _ = ring.wait(1, Some(Duration::from_micros(100)));
                restarting.thread.is_finished()
            });
            for answer in restarting.answer("two restarts") {
                answer.unwrap();
            }
            stage(format!("the ring works after round {round}"));
            assert_works(&mut ring);
        }
    });
}

/// Goal: a restart while a ring is being built leaves that ring working, or refuses it. Method:
/// the ring's queues are large, so building takes longer than the restart.
#[test]
fn a_restart_during_a_build_leaves_the_ring_working() {
    guarded(|| {
        let interface = Arc::new(loopback());
        let poller = Poller::start().unwrap();
        let mut built = 0;
        for round in 0..scaled(600) {
            let gate = Arc::new(Barrier::new(2));
            let restarting = {
                let (interface, gate) = (interface.clone(), gate.clone());
                Running::start(move || {
                    gate.wait();
                    thread::sleep(Duration::from_micros(round * 37 % 400));
                    interface.restart(LONG)
                })
            };
            gate.wait();
            let builder = interface.ring(Direction::Both).depth(16_384).frames(8);
            let ring = builder.drive(Drive::Shared(&poller)).build();
            restarting.answer("the restart").unwrap();
            // Nothing goes on any more.
            match ring {
                Ok(mut ring) => {
                    stage(format!("the ring works after round {round}"));
                    assert_works(&mut ring);
                    built += 1;
                }
                Err(error) => assert!(matches!(error, Error::Config(_)), "{error}"),
            }
        }
        assert!(built > 0, "every build was refused");
    });
}

/// Does something again and again on a thread, until it is dropped.
struct Again {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Again {
    fn start(mut f: impl FnMut(u64) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut round = 0;
            while !stopped.load(Ordering::SeqCst) {
                f(round);
                round += 1;
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Again {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || thread::panicking(), "what was done again and again panicked");
    }
}

/// Goal: any number of restarts, builds and closes at once leave the rings that there are working.
#[test]
fn a_storm_of_restarts_and_builds_leaves_every_ring_working() {
    guarded(|| {
        let interface = Arc::new(loopback());
        let poller = Arc::new(Poller::start().unwrap());
        let mut rings: Vec<Ring> = [Way::Thread, Way::Shared]
            .map(|way| {
                let builder = interface.ring(Direction::Write).depth(8);
                builder.drive(way.drive(&poller)).build().unwrap()
            })
            .into();
        let mut reader = interface.ring(Direction::Read).depth(8).build().unwrap();
        for round in 0..scaled(20) {
            let restarts = Arc::new(AtomicU64::new(0));
            let storm: Vec<_> = (0..4)
                .map(|i| {
                    let (interface, poller) = (interface.clone(), poller.clone());
                    let restarts = restarts.clone();
                    Again::start(move |round| match i {
                        0 | 1 => {
                            interface.restart(LONG).unwrap();
                            restarts.fetch_add(1, Ordering::SeqCst);
                        }
                        _ => {
                            let way = if round % 2 == 0 { Way::Shared } else { Way::Thread };
                            let builder = interface.ring(Direction::Write).depth(8);
                            if let Ok(mut ring) = builder.drive(way.drive(&poller)).build() {
                                send(&mut ring, round);
                                ring.close().unwrap();
                                assert_eq!(reap(&mut ring).len(), 1);
                            }
                        }
                    })
                })
                .collect();
            stage(format!("round {round}: both restart"));
            eventually("they have restarted a few times", || restarts.load(Ordering::SeqCst) >= 10);
            stage(format!("round {round}: the storm ends"));
            drop(storm);
            // The storm's packets wait in the loopback, which takes 256, before this one. Afterwards 8
            // reads are posted.
            let last = u64::MAX;
            send(&mut rings[0], last);
            let mut seen = false;
            eventually(&format!("round {round}: the loopback is emptied"), || {
                (reader.in_flight()..8).for_each(|number| post(&mut reader, number as u64));
                for done in reap(&mut reader) {
                    seen |= done.result.is_ok() && number_of(&done.frame.unwrap()) == last;
                }
                if reap(&mut rings[0]).iter().any(|done| done.result.is_err()) {
                    send(&mut rings[0], last);
                }
                seen && rings[0].in_flight() == 0 && reader.in_flight() == 8
            });
            stage(format!("round {round}: the rings work"));
            for ring in &mut rings {
                send(ring, 1);
                assert_eq!(reap_n(ring, 1)[0].result, Ok(60));
            }
            assert!(reap_n(&mut reader, 2).iter().all(|done| done.result == Ok(60)));
        }
    });
}

/// Goal: whatever races with a stop, every ring ends up closed, and every call answers truly.
/// Method: restarts, builds and a stop begin at once.
#[test]
fn a_stop_among_restarts_and_builds_closes_every_ring() {
    guarded(|| {
        let poller = Arc::new(Poller::start().unwrap());
        for round in 0..scaled(500) {
            let interface = Arc::new(loopback());
            let mut ring = interface.ring(Direction::Both).depth(8).build().unwrap();
            (0..8).for_each(|number| post(&mut ring, number));
            let gate = Arc::new(Barrier::new(5));
            let restarts: Vec<_> = (0..2)
                .map(|_| {
                    let (interface, gate) = (interface.clone(), gate.clone());
                    Running::start(move || {
                        gate.wait();
                        interface.restart(LONG)
                    })
                })
                .collect();
            let builds: Vec<_> = [Way::Thread, Way::Shared]
                .into_iter()
                .map(|way| {
                    let (interface, gate) = (interface.clone(), gate.clone());
                    let poller = poller.clone();
                    Running::start(move || {
                        gate.wait();
                        let builder = interface.ring(Direction::Write).depth(8);
                        builder.drive(way.drive(&poller)).build()
                    })
                })
                .collect();
            let stop = {
                let (interface, gate) = (interface.clone(), gate.clone());
                Running::start(move || {
                    gate.wait();
                    interface.stop(LONG)
                })
            };
            stop.answer("the stop").unwrap();
            for restart in restarts {
                match restart.answer("a restart") {
                    Ok(()) | Err(Error::Config(_)) => {}
                    Err(error) => panic!("round {round}: {error}"),
                }
            }
            let mut rings = vec![ring];
            rings.extend(builds.into_iter().filter_map(|build| build.answer("a build").ok()));
            for mut ring in rings {
                eventually("the ring is closed", || ring.control().closed().is_some());
                assert_eq!(ring.control().closed(), Some(CloseReason::Stopped));
                stage(format!("round {round}: all completes"));
                let in_flight = ring.in_flight();
                for done in reap_n(&mut ring, in_flight) {
                    assert_eq!(done.result, Err(EntryError::Cancelled));
                }
                ring.close().unwrap();
            }
        }
    });
}

/// Waits until the interface refuses rings because a stop or a restart is pending.
fn eventually_busy(interface: &Interface) {
    eventually("a stop or a restart is pending", || {
        inline(interface, Direction::Write).depth(1).build().is_err()
    });
}

/// Drives `ring` until both have returned, and returns their answers.
fn drive_until<T: Send + 'static>(ring: &mut Ring, calls: [Running<T>; 2]) -> [T; 2] {
    eventually("both calls have returned", || {
        ring.reap().for_each(drop);
        calls.iter().all(|call| call.thread.is_finished())
    });
    calls.map(|call| call.answer("a call that has returned"))
}

/// Goal: a restart of an interface that is stopped meanwhile is an error. Method: the stop waits
/// for an inline ring, while the restart is asked for.
#[test]
fn a_restart_behind_a_stop_is_an_error() {
    guarded(|| {
        let interface = Arc::new(loopback());
        let mut ring = inline(&interface, Direction::Both).depth(8).build().unwrap();
        let [stopping, restarting] = [interface.clone(), interface.clone()];
        let stop = Running::start(move || stopping.stop(LONG));
        eventually_busy(&interface);
        let restart = Running::start(move || restarting.restart(LONG));
        // Time for the restart to be asked for.
        thread::sleep(MOMENT);
        let [stop, restart] = drive_until(&mut ring, [stop, restart]);
        stop.unwrap();
        assert!(restart.is_err(), "an interface that is stopped was not restarted");
        assert_eq!(ring.control().closed(), Some(CloseReason::Stopped));
        assert!(interface.ring(Direction::Write).build().is_err());
    });
}

/// As [`a_restart_behind_a_stop_is_an_error`], with the restart first. A second ring, on a thread,
/// shows that the stop has been asked for.
#[test]
fn a_restart_that_a_stop_overtakes_is_an_error() {
    guarded(|| {
        let interface = Arc::new(loopback());
        let mut ring = inline(&interface, Direction::Both).depth(8).build().unwrap();
        let other = interface.ring(Direction::Write).depth(8).build().unwrap();
        let [stopping, restarting] = [interface.clone(), interface.clone()];
        let restart = Running::start(move || restarting.restart(LONG));
        eventually_busy(&interface);
        let stop = Running::start(move || stopping.stop(LONG));
        eventually("the other ring is stopped", || other.control().closed().is_some());
        let [stop, restart] = drive_until(&mut ring, [stop, restart]);
        stop.unwrap();
        assert!(restart.is_err(), "an interface that is stopped was not restarted");
        assert_eq!(ring.control().closed(), Some(CloseReason::Stopped));
    });
}

/// One of four devices, each of which gives posted reads back in its own way.
fn device(n: u64) -> Interface {
    let faults = Faults::seeded(n).engine(Duration::from_micros(200), true);
    let builder = Interface::builder();
    let builder = match n % 4 {
        0 => return loopback(),
        1 => return Keeper::start(AtClose::Cancels).0,
        2 => builder.device(quiet_network(unique("visible"))),
        _ => builder.device(faults.wrap(Loopback::new(1500))),
    };
    builder.start().unwrap()
}

/// Goal: when `stop` has returned, everything that it has cancelled can be reaped. Method: reap at
/// once, without a wait.
#[test]
fn what_a_stop_cancels_is_visible_when_it_returns() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        for round in 0..scaled(200) {
            let way = if round % 2 == 0 { Way::Thread } else { Way::Shared };
            let interface = device(round / 2);
            stage(format!("{way:?} on {}: round {round}", interface.device_name()));
            let builder = interface.ring(Direction::Both).depth(8);
            let mut ring = builder.drive(way.drive(&poller)).build().unwrap();
            (0..8).for_each(|number| post(&mut ring, number));
            interface.stop(LONG).unwrap();
            let done = reap(&mut ring);
            assert_eq!(done.len(), 8, "{way:?} on {}: round {round}", interface.device_name());
            assert!(done.iter().all(|done| done.result == Err(EntryError::Cancelled)));
        }
    });
}

/// As [`what_a_stop_cancels_is_visible_when_it_returns`], for `restart`.
#[test]
fn what_a_restart_cancels_is_visible_when_it_returns() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        for way in [Way::Thread, Way::Shared] {
            for interface in (0..4).map(device) {
                let builder = interface.ring(Direction::Both).depth(8);
                let mut ring = builder.drive(way.drive(&poller)).build().unwrap();
                for round in 0..scaled(50) {
                    stage(format!("{way:?} on {}: round {round}", interface.device_name()));
                    (0..8).for_each(|number| post(&mut ring, number));
                    interface.restart(LONG).unwrap();
                    let done = reap(&mut ring);
                    let name = interface.device_name();
                    assert_eq!(done.len(), 8, "{way:?} on {name}: round {round}");
                    assert!(done.iter().all(|done| done.result == Err(EntryError::Cancelled)));
                    // Reads that are posted before the ring has a queue again wait for it.
                    eventually("the ring has a queue", || ring.stats().restarts == round + 1);
                }
            }
        }
    });
}
