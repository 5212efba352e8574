//! `drain` and `resume`: a ring comes to rest with nothing lost, and goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::Progress;
use vmring::device::fault::Faults;
use vmring::{
    CloseReason, CompletionQueue, Direction, EntryError, Error, Frame, Interface, Loopback,
    RetryPolicy, Ring, RingOp, SubmissionQueue, SubmitErrorKind,
};

use super::closing::asleep;
use super::{AtClose, Keeper, MOMENT, Running, assert_works, is_closed};
use crate::support::{
    LONG, Script, ScriptQueue, Way, drive_to_rest, eventually, every_way, filled, guarded,
    loopback, number_of, post, quiet_network, reap, reap_n, scaled, send, stage, unique,
};

/// Devices that give posted reads back in order, each in its own way, with a name each.
fn devices() -> Vec<(&'static str, Interface)> {
    let engine = || Faults::seeded(1).engine(Duration::from_millis(1), false);
    let network = || quiet_network(unique("drain"));
    let start = |builder: vmring::InterfaceBuilder| builder.start().unwrap();
    let builder = Interface::builder;
    vec![
        ("loopback", loopback()),
        ("embedded", start(builder().device(network()))),
        ("an engine around loopback", start(builder().device(engine().wrap(Loopback::new(1500))))),
        ("an engine around embedded", start(builder().device(engine().wrap(network())))),
        ("a third-party device", Keeper::start(AtClose::Cancels).0),
    ]
}

/// Asserts that the ring refuses reads, writes and, if there are credits for them, batches, and
/// gives the frames back.
fn assert_draining(ring: &mut Ring) {
    let out = ring.pools()[0].slots_out();
    let check = |kind, frame: Frame, number| {
        assert_eq!((kind, number_of(&frame)), (SubmitErrorKind::Draining, number));
    };
    let frame = filled(ring, 1);
    let refused = ring.submit_read(frame, 1).unwrap_err();
    assert_eq!(refused.kind, SubmitErrorKind::Draining);
    drop(refused);
    let frame = filled(ring, 2);
    let refused = ring.submit_write(frame, 2).unwrap_err();
    check(refused.kind, refused.frame, 2);
    if ring.in_flight() == 0 {
        let frames = [(filled(ring, 3), 3)];
        let refused = ring.submit_reads(frames).unwrap_err();
        assert_eq!((refused.kind, refused.accepted), (SubmitErrorKind::Draining, 0));
        drop(refused);
        let frames = [(filled(ring, 4), 4)];
        let refused = ring.submit_writes(frames).unwrap_err();
        assert_eq!(refused.accepted, 0);
        check(refused.kind, refused.frame, 4);
        let frames = [(filled(ring, 5), 5)];
        let refused = ring.submit_and_wait([], frames, 1, None).unwrap_err();
        assert_eq!(refused.accepted, 0);
        check(refused.kind, refused.frame, 5);
    }
    assert_eq!(ring.pools()[0].slots_out(), out);
}

/// Asserts that `done` are reads that were cancelled, with the numbers of `of` in order.
fn assert_cancelled(done: &[crate::support::Seen], of: impl Iterator<Item = u64>) {
    let brief: Vec<_> = done.iter().map(|done| done.brief()).collect();
    let cancelled = |number| (RingOp::Read, number, Err(EntryError::Cancelled));
    assert_eq!(brief, of.map(cancelled).collect::<Vec<_>>());
    assert!(done.iter().all(|done| done.frame.is_some()));
}

/// Goal: `drain` gives every posted read back in order, refuses every submit until `resume`, and
/// may be called again. Method: the reads are in the SQ in one round and with the device in the
/// other.
#[test]
fn drain_gives_posted_reads_back_in_order() {
    guarded(|| {
        every_way(|way, poller| {
            for (name, interface) in devices() {
                let builder = interface.ring(Direction::Both).depth(16);
                let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                for posted in [false, true, true] {
                    stage(format!("{way:?} on {name}: posted: {posted}"));
                    (0..16).for_each(|number| post(&mut ring, number));
                    if posted {
                        drive_to_rest(&mut ring);
                        thread::sleep(Duration::from_millis(2));
                    }
                    assert_eq!(ring.drain(LONG).unwrap(), 16);
                    assert_draining(&mut ring);
                    assert_eq!(ring.drain(LONG).unwrap(), 16, "the second call");
                    assert_eq!((ring.in_flight(), ring.control().closed()), (16, None));
                    assert_cancelled(&reap(&mut ring), 0..16);
                    assert_eq!((ring.in_flight(), ring.drain(LONG).unwrap()), (0, 0));
                    assert_draining(&mut ring);
                    ring.resume();
                    ring.resume();
                    stage(format!("{way:?} on {name}: after resume"));
                    post(&mut ring, 20);
                    assert_eq!(ring.drain(LONG).unwrap(), 1);
                    assert_cancelled(&reap(&mut ring), 20..21);
                    ring.resume();
                }
                ring.close().unwrap();
            }
        });
    });
}

/// Goal: a drain of a ring with nothing in flight returns 0, also on rings for one direction, and
/// a timeout that no clock can hold means for ever.
#[test]
fn drain_of_a_ring_at_rest_is_nothing() {
    guarded(|| {
        every_way(|way, poller| {
            for direction in [Direction::Both, Direction::Read, Direction::Write] {
                let interface = loopback();
                let builder = interface.ring(direction).depth(8);
                let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                ring.resume();
                assert_eq!(ring.drain(LONG).unwrap(), 0);
                assert_eq!(ring.drain(Duration::MAX).unwrap(), 0);
                ring.resume();
                if direction != Direction::Write {
                    post(&mut ring, 1);
                    assert_eq!(ring.drain(Duration::MAX).unwrap(), 1);
                } else {
                    send(&mut ring, 1);
                    assert_eq!(ring.drain(Duration::MAX).unwrap(), 1);
                }
                assert_eq!(reap(&mut ring).len(), 1);
                ring.resume();
            }
            let interface = loopback();
            let builder = interface.ring(Direction::Both).depth(8);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            for _ in 0..scaled(50) {
                assert_eq!(ring.drain(LONG).unwrap(), 0);
                ring.resume();
                assert_works(&mut ring);
            }
        });
    });
}

/// Goal: every write ends by itself in a drain, with its own result: sent, held for a while, or
/// given up when its retry budget ends. What waited to be reaped before counts as well.
#[test]
fn drain_lets_every_write_end() {
    guarded(|| {
        every_way(|way, poller| {
            let exhausted = Err(EntryError::Device(vmring::Status::BufferExhausted));
            let stalled = Script::new(|_, _| ScriptQueue::new(|_| Ok(Progress::Idle))).start();
            let mut devices = devices();
            // The third-party device keeps writes; see below.
            devices.pop();
            let mut devices: Vec<_> = devices.into_iter().map(|of| (of.0, of.1, Ok(60))).collect();
            devices.push(("a device that takes nothing", stalled, exhausted));
            for (name, interface, result) in devices {
                stage(format!("{way:?} on {name}"));
                let retry = RetryPolicy { attempts: 20, delay: Duration::from_millis(1) };
                let builder = interface.ring(Direction::Both).depth(8).retry(retry);
                let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                send(&mut ring, 100);
                assert_eq!(ring.wait(1, Some(LONG)), 1);
                (0..7).for_each(|number| send(&mut ring, number));
                assert_eq!(ring.drain(LONG).unwrap(), 8);
                let done = reap(&mut ring);
                assert_eq!(done.len(), 8);
                for (done, number) in done.iter().zip([100].into_iter().chain(0..7)) {
                    assert_eq!(done.brief(), (RingOp::Write, number, result), "{name}");
                }
                ring.resume();
            }
        });
    });
}

/// Goal: writes that a device keeps are not cancelled by a drain: it times out, the ring stays
/// draining, and a later call succeeds when they have ended. The reads come back all the same.
#[test]
fn drain_waits_for_writes_that_a_device_keeps() {
    guarded(|| {
        every_way(|way, poller| {
            let (interface, keeper) = Keeper::start(AtClose::Cancels);
            let builder = interface.ring(Direction::Both).depth(8);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            (0..4).for_each(|number| post(&mut ring, number));
            (104..108).for_each(|number| send(&mut ring, number));
            keeper.eventually_keeps(&mut ring, 8);
            for _ in 0..2 {
                let error = ring.drain(Duration::from_millis(20)).unwrap_err();
                assert!(matches!(error, Error::Timeout(_)), "{error}");
                assert_draining(&mut ring);
            }
            stage(format!("{way:?}: the reads are back"));
            assert_cancelled(&reap_n(&mut ring, 4), 0..4);
            assert_eq!(ring.in_flight(), 4);
            // Another thread lets the writes end. A woken handle does not end the drain.
            let control = ring.control();
            let releasing = {
                let keeper = keeper.clone();
                thread::spawn(move || {
                    for _ in 0..5 {
                        thread::sleep(MOMENT);
                        control.wake();
                    }
                    keeper.0.released.store(true, Ordering::SeqCst);
                    keeper.wake();
                })
            };
            stage(format!("{way:?}: the drain waits for the writes"));
            assert_eq!(asleep(|| ring.drain(LONG)).unwrap(), 4);
            releasing.join().unwrap();
            let done = reap(&mut ring);
            for (done, number) in done.iter().zip(104..) {
                assert_eq!(done.brief(), (RingOp::Write, number, Ok(60)), "{way:?}");
            }
            assert_eq!((done.len(), ring.in_flight()), (4, 0));
            assert_draining(&mut ring);
            ring.resume();
            send(&mut ring, 9);
            assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(60));
        });
    });
}

/// Goal: a drain that has timed out can be given up. Method: `resume` while the device keeps a
/// write.
#[test]
fn a_drain_that_timed_out_may_be_resumed() {
    guarded(|| {
        every_way(|way, poller| {
            let (interface, keeper) = Keeper::start(AtClose::Cancels);
            let builder = interface.ring(Direction::Both).depth(8);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            send(&mut ring, 101);
            post(&mut ring, 2);
            keeper.eventually_keeps(&mut ring, 2);
            let error = ring.drain(Duration::from_millis(20)).unwrap_err();
            assert!(matches!(error, Error::Timeout(_)), "{error}");
            assert_cancelled(&reap_n(&mut ring, 1), 2..3);
            ring.resume();
            // New reads stay posted.
            (3..6).for_each(|number| post(&mut ring, number));
            keeper.eventually_keeps(&mut ring, 4);
            assert_eq!(ring.wait(1, Some(MOMENT)), 0, "{way:?}: it is not draining any more");
            keeper.0.released.store(true, Ordering::SeqCst);
            keeper.wake();
            assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Write, 101, Ok(60)));
            assert_eq!(ring.drain(LONG).unwrap(), 3);
            assert_cancelled(&reap(&mut ring), 3..6);
        });
    });
}

/// Goal: no packet is lost by a drain, and none is out of order. Method: another ring sends
/// numbered packets all the while. Those that the loopback has taken come out, through reads that
/// end in a drain or after it.
#[test]
fn drain_loses_no_packet() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let builder = interface.ring(Direction::Read).depth(16);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            let mut writer = interface.ring(Direction::Write).depth(16).build().unwrap();
            let count = scaled(2000);
            let writing = Running::start(move || {
                let mut sent = Vec::new();
                for number in 0..count {
                    send(&mut writer, number);
                    match reap_n(&mut writer, 1)[0].result {
                        Ok(_) => sent.push(number),
                        // Nobody reads for a while.
                        Err(error) => assert!(matches!(error, EntryError::Device(_)), "{error}"),
                    }
                }
                sent
            });
            let mut got = Vec::new();
            let mut take = |ring: &mut Ring| {
                for done in reap(ring) {
                    match done.result {
                        Ok(_) => got.push(number_of(&done.frame.unwrap())),
                        Err(error) => assert_eq!(error, EntryError::Cancelled),
                    }
                }
                got.len()
            };
            let mut round = 0;
            while !writing.thread.is_finished() || round < 3 {
                round += 1;
                stage(format!("{way:?}: round {round}"));
                (ring.in_flight()..16).for_each(|number| post(&mut ring, number as u64));
                ring.wait(1 + round % 4, Some(Duration::from_millis(1)));
                if round % 2 == 0 {
                    take(&mut ring);
                }
                let ready = ring.drain(LONG).unwrap();
                assert_eq!(ready, ring.in_flight(), "{way:?}: everything has completed");
                take(&mut ring);
                ring.resume();
            }
            let sent = writing.answer("the writer");
            eventually("every packet has come", || {
                (ring.in_flight()..16).for_each(|number| post(&mut ring, number as u64));
                take(&mut ring) >= sent.len()
            });
            assert_eq!(got, sent, "{way:?}");
        });
    });
}

/// Submits writes until the ring drains. Returns how many were taken.
fn submit_until_drained(mut sq: SubmissionQueue) -> (SubmissionQueue, u64) {
    let (mut taken, start) = (0, Instant::now());
    loop {
        assert!(start.elapsed() < LONG, "it never drains");
        let Some(mut frame) = sq.alloc() else {
            thread::yield_now();
            continue;
        };
        frame.copy_from(&[0; 60]).unwrap();
        match sq.submit_write(frame, taken) {
            Ok(()) => taken += 1,
            Err(refused) if refused.is_backpressure() => thread::yield_now(),
            Err(refused) => {
                assert_eq!(refused.kind, SubmitErrorKind::Draining);
                return (sq, taken);
            }
        }
    }
}

/// Goal: a drain that races with submits on the other half: what was taken completes once, and
/// what was refused never does.
#[test]
fn drain_races_with_the_submitting_half() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let retry = RetryPolicy { attempts: 1, ..RetryPolicy::default() };
            let builder = interface.ring(Direction::Both).depth(8).retry(retry);
            let ring = builder.drive(way.drive(poller)).build().unwrap();
            let (mut sq, mut cq) = ring.into_split();
            for round in 0..scaled(200) {
                stage(format!("{way:?}: round {round}"));
                let submitting = Running::start(move || submit_until_drained(sq));
                let mut reaped = 0;
                let reap = |cq: &mut CompletionQueue| cq.reap().count() as u64;
                let at = Instant::now() + Duration::from_micros(round * 37 % 500);
                while Instant::now() < at {
                    reaped += reap(&mut cq);
                }
                cq.drain(LONG).unwrap();
                eventually("the submitting half is refused", || {
                    reaped += reap(&mut cq);
                    submitting.thread.is_finished()
                });
                let taken;
                (sq, taken) = submitting.answer("the submitting half");
                // What came past the first drain has completed now.
                let ready = cq.drain(LONG).unwrap();
                assert_eq!(ready, cq.in_flight());
                reaped += reap(&mut cq);
                assert_eq!((reaped, cq.in_flight()), (taken, 0), "{way:?}: round {round}");
                cq.resume();
            }
        });
    });
}

/// Goal: a drained ring can be closed and stopped in every way. What the drain gave back is still
/// there to be reaped. A drain of a closed ring says so, and a resume changes nothing.
#[test]
fn a_drained_ring_is_closed_and_stopped_like_others() {
    guarded(|| {
        every_way(|way, poller| {
            for how in ["close", "control", "interface", "drop"] {
                stage(format!("{way:?}: {how}"));
                let interface = Arc::new(loopback());
                let builder = interface.ring(Direction::Both).depth(8);
                let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                (0..8).for_each(|number| post(&mut ring, number));
                assert_eq!(ring.drain(LONG).unwrap(), 8);
                match how {
                    "close" => ring.close().unwrap(),
                    "control" => ring.control().stop(),
                    "interface" => {
                        let stop = interface.clone();
                        drive_through(&mut ring, move || stop.stop(LONG)).unwrap();
                    }
                    _ => {
                        drop(ring);
                        continue;
                    }
                }
                eventually("the ring is closed", || {
                    let _ = ring.reap().len();
                    ring.control().closed().is_some()
                });
                assert!(is_closed(&ring.drain(LONG)), "{way:?}, {how}");
                ring.resume();
                let refused = ring.submit_write(filled(&ring, 1), 1).unwrap_err();
                assert_eq!(refused.kind, SubmitErrorKind::Closed(CloseReason::Stopped));
                assert_cancelled(&reap(&mut ring), 0..8);
                ring.close().unwrap();
            }
        });
    });
}

/// Calls `f` on another thread, and drives `ring` without reaping until it has returned.
fn drive_through<T: Send + 'static>(ring: &mut Ring, f: impl FnOnce() -> T + Send + 'static) -> T {
    let call = Running::start(f);
    eventually("the call on the other thread returns", || {
        let _ = ring.reap().len();
        call.thread.is_finished()
    });
    call.answer("a call that has returned")
}

/// Goal: a drain that waits ends when the ring is stopped meanwhile. Method: the device keeps a
/// write, and another thread stops the ring or its interface.
#[test]
fn a_stop_ends_a_drain_that_waits() {
    guarded(|| {
        every_way(|way, poller| {
            for whole in [false, true] {
                let (interface, keeper) = Keeper::start(AtClose::Cancels);
                let interface = Arc::new(interface);
                let builder = interface.ring(Direction::Both).depth(8);
                let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                send(&mut ring, 1);
                keeper.eventually_keeps(&mut ring, 1);
                let (stopped, control) = (interface.clone(), ring.control());
                let stopping = Running::start(move || {
                    thread::sleep(MOMENT);
                    match whole {
                        true => stopped.stop(LONG),
                        false => {
                            control.stop();
                            Ok(())
                        }
                    }
                });
                stage(format!("{way:?}, the whole interface: {whole}: the drain ends"));
                let answer = ring.drain(LONG);
                assert!(is_closed(&answer), "{way:?}: {answer:?}");
                eventually("the stop returns", || {
                    let _ = ring.reap().len();
                    stopping.thread.is_finished()
                });
                stopping.answer("the stop").unwrap();
                assert_eq!(reap_n(&mut ring, 1)[0].result, Err(EntryError::Cancelled));
            }
        });
    });
}

/// Goal: a restart does not end a drain: submits are refused before and after it, until `resume`.
/// The ring works afterwards.
#[test]
fn a_restart_does_not_end_a_drain() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = Arc::new(loopback());
            let builder = interface.ring(Direction::Both).depth(8);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            for round in 0..scaled(20) {
                stage(format!("{way:?}: round {round}"));
                (0..4).for_each(|number| post(&mut ring, number));
                assert_eq!(ring.drain(LONG).unwrap(), 4);
                let restarted = interface.clone();
                drive_through(&mut ring, move || restarted.restart(LONG)).unwrap();
                assert_draining(&mut ring);
                assert_eq!(ring.drain(LONG).unwrap(), 4);
                assert_cancelled(&reap(&mut ring), 0..4);
                ring.resume();
                assert_works(&mut ring);
            }
        });
    });
}

/// Goal: a drain that waits goes on through a restart, which ends the writes that a device keeps.
#[test]
fn a_restart_during_a_drain_that_waits_lets_it_end() {
    guarded(|| {
        every_way(|way, poller| {
            let (interface, keeper) = Keeper::start(AtClose::Cancels);
            let interface = Arc::new(interface);
            let builder = interface.ring(Direction::Both).depth(8);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            (0..2).for_each(|number| send(&mut ring, number));
            keeper.eventually_keeps(&mut ring, 2);
            let restarted = interface.clone();
            let restarting = Running::start(move || {
                thread::sleep(MOMENT);
                restarted.restart(LONG)
            });
            stage(format!("{way:?}: the drain goes on"));
            assert_eq!(ring.drain(LONG).unwrap(), 2);
            eventually("the restart returns", || {
                let _ = ring.reap().len();
                restarting.thread.is_finished()
            });
            restarting.answer("the restart").unwrap();
            assert_draining(&mut ring);
            let done = reap(&mut ring);
            assert!(done.iter().all(|done| done.result == Err(EntryError::Cancelled)));
            assert_eq!(done.len(), 2);
            ring.resume();
            keeper.0.released.store(true, Ordering::SeqCst);
            send(&mut ring, 3);
            assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(60));
        });
    });
}

/// Goal: a drain of rings on one poller disturbs no other ring on it.
#[test]
fn a_drain_disturbs_no_other_ring() {
    guarded(|| {
        let poller = vmring::Poller::start().unwrap();
        let [interface, other] = [loopback(), loopback()];
        let build = |interface: &Interface| {
            let builder = interface.ring(Direction::Both).depth(8);
            builder.drive(Way::Shared.drive(&poller)).build().unwrap()
        };
        let [mut ring, mut other] = [build(&interface), build(&other)];
        for _ in 0..scaled(100) {
            (0..4).for_each(|number| post(&mut ring, number));
            assert_eq!(ring.drain(LONG).unwrap(), 4);
            assert_works(&mut other);
            assert_cancelled(&reap(&mut ring), 0..4);
            ring.resume();
        }
    });
}
