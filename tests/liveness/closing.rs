//! Rings that close, are closed or are between the halves of a restart: they cost nothing, and a
//! caller that waits for their last completions does not wait for ever.

use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use vmring::{CloseReason, Direction, EntryError, Error, IdlePolicy, Poller, Ring};

use super::{AtClose, Keeper, MOMENT, Running};
use crate::support::{
    LONG, Way, drive_to_rest, eventually, every_way, filled, guarded, inline, loopback, post, reap,
    reap_n, scaled, send, stage,
};

/// Calls `f`. Asserts that the calling thread uses little of the time that this takes. Only Linux
/// tells the time of one thread.
pub(super) fn asleep<T>(f: impl FnOnce() -> T) -> T {
    #[cfg(target_os = "linux")]
    let (before, start) = (crate::notify::own_cpu_time(), Instant::now());
    let result = f();
    #[cfg(target_os = "linux")]
    {
        let (used, of) = (crate::notify::own_cpu_time() - before, start.elapsed());
        assert!(used <= of / 5 + Duration::from_millis(20), "it used {used:?} of {of:?}");
    }
    result
}

/// Goal: a ring that waits for its device at close asks the device about once a millisecond, and
/// not as often as it can, whatever the device does. Method: the device counts the calls of
/// `close` while it refuses, and rings once.
#[test]
fn a_closing_ring_asks_its_device_about_once_a_millisecond() {
    guarded(|| {
        let poller = Poller::builder().idle(IdlePolicy::PARK).start().unwrap();
        for way in Way::ALL {
            stage(format!("{way:?}"));
            let (interface, keeper) = Keeper::start(AtClose::Refuses);
            let mut ring = interface
                .ring(Direction::Write)
                .depth(8)
                .drive(way.drive(&poller))
                .idle(IdlePolicy::PARK)
                .close_timeout(Duration::from_millis(400))
                .build()
                .unwrap();
            send(&mut ring, 1);
            keeper.eventually_keeps(&mut ring, 1);
            let start = Instant::now();
            ring.control().stop();
            for _ in 0..2 {
                asleep(|| ring.wait(1, Some(Duration::from_millis(100))));
                keeper.wake();
            }
            let (calls, ms) = (keeper.closes(), start.elapsed().as_millis() as u64);
            assert!(calls <= 10 * ms + 10, "{way:?}: it was asked {calls} times in {ms} ms");
            eventually("the device is asked at all", || {
                let _ = ring.reap().len();
                keeper.closes() > 0
            });
        }
    });
}

/// Goal: a device that rings while its ring is detached wakes the poller once, and no more.
/// Method: a restart waits for an inline ring, so the other ring stays detached. Each ring of the
/// device is followed by one more sleep.
#[test]
fn a_device_that_rings_on_a_detached_ring_costs_nothing() {
    guarded(|| {
        for way in [Way::Thread, Way::Shared] {
            let poller = Poller::start().unwrap();
            let (interface, keeper) = Keeper::start(AtClose::Cancels);
            let builder = interface.ring(Direction::Write).drive(way.drive(&poller));
            let mut ring = builder.build().unwrap();
            let mut other = inline(&interface, Direction::Write).build().unwrap();
            let restart = interface.restart(Duration::from_millis(1));
            assert!(matches!(restart, Err(Error::StopTimeout { rings: 1 | 2, .. })), "{restart:?}");
            eventually("the ring is detached", || keeper.closes() == 1);
            for round in 0..10 {
                let parks = ring.stats().parks;
                keeper.wake();
                eventually(&format!("{way:?}: the poller sleeps after wake {round}"), || {
                    ring.stats().parks > parks
                });
            }
            eventually("the restart is carried out", || {
                other.reap().for_each(drop);
                ring.stats().restarts == 1
            });
            send(&mut ring, 1);
            keeper.eventually_keeps(&mut ring, 1);
        }
    });
}

/// Goal: the descriptor of a closed ring can be armed, so that an event loop over it sleeps.
/// Method: the ring is closed in each way, and its device rings afterwards. Each time the device
/// rings, one call may say that there is something to reap.
#[test]
fn a_closed_ring_can_be_armed() {
    guarded(|| {
        every_way(|way, poller| {
            for at_close in [AtClose::Cancels, AtClose::Keeps, AtClose::Refuses] {
                for rings in [false, true] {
                    let (interface, keeper) = Keeper::start(at_close);
                    let mut ring = interface
                        .ring(Direction::Write)
                        .depth(8)
                        .drive(way.drive(poller))
                        .close_timeout(Duration::from_millis(20))
                        .build()
                        .unwrap();
                    send(&mut ring, 1);
                    keeper.eventually_keeps(&mut ring, 1);
                    ring.control().stop();
                    eventually(&format!("{way:?}, {at_close:?}: it comes back or is lost"), || {
                        ring.reap().for_each(drop);
                        ring.in_flight() == 0 && ring.control().closed().is_some()
                    });
                    let mut refused = 0;
                    for _ in 0..100 {
                        if rings {
                            keeper.wake();
                            // At most once for each time the device rings.
                            let _ = ring.arm();
                        }
                        refused += u32::from(!ring.arm());
                        assert_eq!(ring.reap().len(), 0);
                    }
                    assert!(
                        refused <= 1,
                        "{way:?}, {at_close:?}, rings: {rings}: {refused} of 100 calls said that \
                         there is something to reap"
                    );
                }
            }
        });
    });
}

/// Goal: the loop of the documentation, `while ring.in_flight() > 0 { ring.wait(1, None); ... }`,
/// ends on a ring whose device keeps slots for ever, and sleeps until it does.
#[test]
fn waiting_for_what_is_in_flight_ends_when_it_is_lost() {
    guarded(|| {
        every_way(|way, poller| {
            for at_close in [AtClose::Keeps, AtClose::Refuses] {
                let (interface, keeper) = Keeper::start(at_close);
                let mut ring = interface
                    .ring(Direction::Both)
                    .depth(8)
                    .drive(way.drive(poller))
                    .close_timeout(Duration::from_millis(300))
                    .build()
                    .unwrap();
                (0..2).for_each(|number| send(&mut ring, number));
                post(&mut ring, 2);
                keeper.eventually_keeps(&mut ring, 3);
                let control = ring.control();
                let stopping = thread::spawn(move || {
                    thread::sleep(MOMENT);
                    control.stop();
                });
                stage(format!("{way:?}, {at_close:?}: waiting for what is lost"));
                let mut rounds = 0;
                asleep(|| {
                    while ring.in_flight() > 0 {
                        ring.wait(1, None);
                        rounds += 1;
                        assert!(rounds < 1000, "{way:?}, {at_close:?}: `wait` returns at once");
                        assert_eq!(ring.reap().len(), 0);
                    }
                });
                stopping.join().unwrap();
                assert!(rounds <= 10, "{way:?}, {at_close:?}: {rounds} rounds");
                assert_eq!(ring.control().closed(), Some(CloseReason::Stopped));
                // Nothing is waited for any more.
                assert_eq!(ring.wait(1, None), 0);
                assert_eq!(ring.cancel_and_wait(LONG).unwrap(), 0);
                match ring.close() {
                    Err(Error::Leaked { slots, .. }) => assert_eq!(slots, 3),
                    other => panic!("{other:?}"),
                }
            }
        });
    });
}

/// Goal: what a device gives back after the close, and within the close timeout, completes, and
/// one `wait` sleeps until then.
#[test]
fn what_comes_back_within_the_close_timeout_completes() {
    guarded(|| {
        every_way(|way, poller| {
            let (interface, keeper) = Keeper::start(AtClose::Keeps);
            let builder = interface.ring(Direction::Both).depth(8).close_timeout(LONG);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            send(&mut ring, 1);
            post(&mut ring, 2);
            keeper.eventually_keeps(&mut ring, 2);
            ring.control().stop();
            let dropping = {
                let keeper = keeper.clone();
                thread::spawn(move || {
                    thread::sleep(2 * MOMENT);
                    keeper.drop_slots();
                })
            };
            stage(format!("{way:?}: waiting for slots that come late"));
            assert_eq!(asleep(|| ring.wait(2, None)), 2, "{way:?}: `wait` did not wait");
            let mut done = reap(&mut ring);
            done.sort_by_key(|done| done.user_data);
            for (done, number) in done.iter().zip(1..) {
                assert_eq!((done.user_data, done.result), (number, Err(EntryError::Cancelled)));
                assert!(done.frame.is_some());
            }
            assert_eq!((done.len(), ring.in_flight()), (2, 0));
            dropping.join().unwrap();
            ring.close().expect("nothing is lost");
        });
    });
}

/// Goal: a slot that comes back after it was given up returns to its pool, and disturbs nothing.
#[test]
fn what_comes_back_after_it_was_lost_disturbs_nothing() {
    guarded(|| {
        every_way(|way, poller| {
            let (interface, keeper) = Keeper::start(AtClose::Keeps);
            let timeout = Duration::from_millis(20);
            let builder = interface.ring(Direction::Both).depth(8).close_timeout(timeout);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            let pool = ring.pools()[0].clone();
            (0..3).for_each(|number| send(&mut ring, number));
            keeper.eventually_keeps(&mut ring, 3);
            ring.control().stop();
            eventually("the slots are lost", || {
                assert_eq!(ring.reap().len(), 0);
                ring.in_flight() == 0
            });
            keeper.drop_slots();
            eventually("the slots are in their pool again", || {
                ring.reap().for_each(drop);
                pool.slots_out() == 0
            });
            assert_eq!((ring.in_flight(), ring.wait(1, None)), (0, 0));
            let _ = ring.close();
            assert_eq!(ring.in_flight(), 0);
        });
    });
}

/// Sleeps on the ring's descriptor as an event loop does, until its next deadline at most.
fn sleep_on_descriptor(ring: &mut Ring) {
    let fd = ring.completion_fd().expect("a descriptor").as_raw_fd();
    if !ring.arm() {
        return;
    }
    let left = ring.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
    let left = left.unwrap_or(LONG).min(LONG);
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: the pointer is to one `pollfd`, which is exclusively borrowed.
    let n = unsafe { libc::poll(&mut poll, 1, left.as_millis() as i32 + 1) };
    assert!(n > 0 || left < LONG, "nobody wakes the event loop");
}

/// Goal: an event loop over the descriptor and the deadline hears of the end as well: when what
/// the device keeps comes back late, and when it is lost.
#[test]
fn an_event_loop_ends_when_what_is_in_flight_is_lost() {
    guarded(|| {
        every_way(|way, poller| {
            for comes in [true, false] {
                let (interface, keeper) = Keeper::start(AtClose::Keeps);
                let timeout = if comes { LONG } else { Duration::from_millis(100) };
                let builder = interface.ring(Direction::Both).depth(8).close_timeout(timeout);
                let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                send(&mut ring, 1);
                keeper.eventually_keeps(&mut ring, 1);
                let control = ring.control();
                let stopping = thread::spawn(move || {
                    thread::sleep(MOMENT);
                    control.stop();
                    if comes {
                        thread::sleep(MOMENT);
                        keeper.drop_slots();
                    }
                });
                stage(format!("{way:?}: the event loop; the slot comes back: {comes}"));
                let (mut rounds, mut reaped) = (0, 0);
                asleep(|| {
                    while ring.in_flight() > 0 {
                        sleep_on_descriptor(&mut ring);
                        reaped += ring.reap().count();
                        rounds += 1;
                        assert!(rounds < 1000, "{way:?}, comes: {comes}: the event loop spins");
                    }
                });
                stopping.join().unwrap();
                assert_eq!(reaped, usize::from(comes));
            }
        });
    });
}

/// Goal: an event loop that sleeps until `next_deadline` never sleeps over a submission of an
/// inline ring. Method: the deadline after each kind of submission, before and after driving the
/// ring.
#[test]
fn what_an_inline_ring_has_not_driven_is_due_now() {
    fn is_due(ring: &Ring) -> bool {
        ring.next_deadline().is_some_and(|at| at <= Instant::now())
    }
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).depth(8).build().unwrap();
        drive_to_rest(&mut ring);
        assert_eq!(ring.next_deadline(), None, "nothing is submitted");
        post(&mut ring, 1);
        assert!(is_due(&ring), "a read is not driven");
        drive_to_rest(&mut ring);
        assert_eq!(ring.next_deadline(), None, "the read is posted");
        send(&mut ring, 2);
        assert!(is_due(&ring), "a write is not driven");
        assert_eq!(reap_n(&mut ring, 2).len(), 2);
        assert_eq!(ring.next_deadline(), None);
        let writes = vec![(filled(&ring, 3), 3), (filled(&ring, 4), 4)];
        ring.split().0.submit_writes(writes).unwrap();
        assert!(is_due(&ring), "a batch is not driven");
        drive_to_rest(&mut ring);
        ring.cancel(5, 6).unwrap();
        assert!(is_due(&ring), "a cancel is not driven");
        assert_eq!(reap_n(&mut ring, 3).len(), 3);
        assert_eq!(ring.next_deadline(), None);

        // The submitting half is on another thread.
        let (mut sq, mut cq) = ring.into_split();
        let frame = sq.alloc().unwrap();
        let sq = Running::start(move || {
            sq.submit_read(frame, 7).unwrap();
            sq
        });
        let _sq = sq.answer("a submit");
        assert!(cq.next_deadline().is_some_and(|at| at <= Instant::now()));
        (0..8).for_each(|_| cq.reap().for_each(drop));
        assert_eq!(cq.next_deadline(), None);
    });
}

/// Goal: a loop that sleeps until `next_deadline`, and on nothing else, drives everything that it
/// submits.
#[test]
fn a_loop_over_deadlines_drives_every_submission() {
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).depth(8).build().unwrap();
        for round in 0..scaled(200) {
            stage(format!("round {round}"));
            post(&mut ring, 1);
            send(&mut ring, 2);
            let mut reaped = 0;
            while reaped < 2 {
                let at = ring.next_deadline().expect("two entries are to be driven");
                thread::sleep(at.saturating_duration_since(Instant::now()));
                reaped += ring.reap().count();
            }
        }
    });
}
