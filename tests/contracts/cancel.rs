//! Cancelling entries, and emptying a ring.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::{PostedSlot, Progress};
use vmring::{Direction, EntryError, Error, Interface, Ring, RingOp};

use super::{Gate, PATIENT, credits};
use crate::support::{
    Dice, LONG, Script, ScriptQueue, Way, drive_to_rest, every_way, guarded, inline, loopback,
    number_of, packet_between, post, quiet_network, reap, reap_n, scaled, send, stage, unique,
};

#[test]
fn cancel_has_its_own_completion_and_all_matching_entries_complete() {
    guarded(|| {
        every_way(|way, poller| {
            // One device keeps posted reads itself, the other leaves them with the poller.
            for interface in [loopback(), Gate::default().start()] {
                let mut ring = interface
                    .ring(Direction::Both)
                    .drive(way.drive(poller))
                    .retry(PATIENT)
                    .build()
                    .unwrap();
                for user_data in [7, 8, 7, 8, 7] {
                    post(&mut ring, user_data);
                }
                ring.cancel(7, 99).unwrap();
                let done = reap_n(&mut ring, 4);
                let (cancel, others): (Vec<_>, Vec<_>) =
                    done.iter().partition(|done| done.op == RingOp::Cancel);
                assert_eq!(cancel.len(), 1);
                assert_eq!(cancel[0].brief(), (RingOp::Cancel, 99, Ok(3)));
                assert!(cancel[0].frame.is_none());
                for done in others {
                    assert_eq!(done.brief(), (RingOp::Read, 7, Err(EntryError::Cancelled)));
                    assert!(done.frame.is_some());
                }
                assert_eq!(ring.in_flight(), 2);
                ring.cancel(7, 100).unwrap();
                assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Cancel, 100, Ok(0)));
                assert_eq!(ring.stats().cancelled, 3);
                drop(done);
                ring.cancel_all(101).unwrap();
                let done = reap_n(&mut ring, 3);
                let cancel = done.iter().find(|done| done.op == RingOp::Cancel).unwrap();
                assert_eq!(cancel.brief(), (RingOp::Cancel, 101, Ok(2)));
            }
        });
    });
}

#[test]
fn a_completion_without_a_frame_has_no_packet() {
    guarded(|| {
        let mut ring = inline(&loopback(), Direction::Both).build().unwrap();
        post(&mut ring, 1);
        send(&mut ring, 2);
        ring.cancel(7, 3).unwrap();
        assert_eq!(ring.wait(3, Some(LONG)), 3);
        for done in ring.reap() {
            if done.op != RingOp::Cancel {
                done.take_packet().unwrap();
            }
            let error = done.take_packet().unwrap_err();
            assert_eq!((error.error, error.user_data), (EntryError::NoPacket, done.user_data));
            assert!(error.frame.is_none());
        }
    });
}

/// Goal: the device does not get an entry that was cancelled before the device is called. Method:
/// an inline ring, where the order of the steps is certain.
#[test]
fn a_cancel_comes_before_the_device() {
    let gate = Gate::default();
    gate.take(10);
    let interface = gate.start();
    let mut ring = inline(&interface, Direction::Both).build().unwrap();
    for user_data in [1, 2] {
        let frame = ring.alloc().unwrap();
        ring.submit_write(frame, user_data).unwrap();
    }
    ring.cancel(1, 3).unwrap();
    let mut done: Vec<_> = reap(&mut ring).iter().map(|seen| seen.brief()).collect();
    done.sort_by_key(|(_, user_data, _)| *user_data);
    let cancelled = Err(EntryError::Cancelled);
    assert_eq!(
        done,
        [(RingOp::Write, 1, cancelled), (RingOp::Write, 2, Ok(0)), (RingOp::Cancel, 3, Ok(1))]
    );
}

/// Goal: cancels at any moment lose no packet. Method: a writer sends numbered packets while the
/// reader posts and cancels; every number must arrive, in order.
#[test]
fn a_packet_is_never_dropped_by_a_cancel() {
    guarded(|| {
        every_way(|way, poller| {
            let count = scaled(3000);
            let interface = loopback();
            let build = |direction| {
                interface.ring(direction).drive(way.drive(poller)).retry(PATIENT).build().unwrap()
            };
            let (mut reader, mut writer) = (build(Direction::Read), build(Direction::Write));
            let writing = thread::spawn(move || {
                let mut sent = 0;
                while sent < count || writer.in_flight() > 0 {
                    while sent < count && credits(&mut writer).1 > 0 {
                        send(&mut writer, sent);
                        sent += 1;
                    }
                    writer.wait(1, Some(Duration::from_millis(1)));
                    for done in reap(&mut writer) {
                        assert!(done.result.is_ok(), "{done:?}");
                    }
                }
            });
            let mut dice = Dice::new(11);
            let mut next = 0;
            let mut take = |ring: &mut Ring| {
                for done in reap(ring) {
                    match done.result {
                        Ok(_) if done.op == RingOp::Read => {
                            assert_eq!(number_of(&done.frame.unwrap()), next);
                            next += 1;
                        }
                        Ok(_) => {}
                        error => assert_eq!(error, Err(EntryError::Cancelled)),
                    }
                }
                next
            };
            loop {
                for _ in 0..dice.below(16) {
                    if credits(&mut reader).0 > 0 {
                        post(&mut reader, dice.below(4));
                    }
                }
                match dice.below(6) {
                    0 => drop(reader.cancel(dice.below(4), 0)),
                    1 => drop(reader.cancel_all(0)),
                    2 => reader.control().cancel_all(),
                    3 => drop(reader.cancel_and_wait(LONG).unwrap()),
                    _ => drop(reader.wait(1, Some(Duration::from_micros(200)))),
                }
                let seen = take(&mut reader);
                stage(format!("{way:?}: {seen} of {count}"));
                if seen == count {
                    break;
                }
            }
            writing.join().unwrap();
        });
    });
}

/// Goal: the embedded network drops a packet that finds no posted read, so a cancel must take
/// nothing but its target from the senders. Method: no overflow, and far more posted reads than
/// packets under way. Cancels, with and without a target that exists, come all the time. Nothing
/// may be dropped.
#[test]
fn a_packet_is_never_dropped_by_a_cancel_on_the_embedded_network() {
    guarded(|| {
        every_way(|way, poller| {
            const READS: u64 = 256;
            const UNDER_WAY: u64 = 64;
            let count = scaled(10_000);
            let name = unique("cancel");
            let port = || {
                let driver = quiet_network(name.clone()).overflow(0);
                Interface::builder().device(driver).start().unwrap()
            };
            let (to, from) = (port(), port());
            let bytes = packet_between(from.mac().into_array(), to.mac().into_array(), 0, 60);
            let mut reader =
                to.ring(Direction::Read).cancel_depth(4).drive(way.drive(poller)).build().unwrap();
            let mut writer = from.ring(Direction::Write).drive(way.drive(poller)).build().unwrap();
            (0..READS).for_each(|number| post(&mut reader, number));
            if way == Way::Inline {
                drive_to_rest(&mut reader);
            } else {
                // When the cancel submitted after the reads has completed, the poller has taken
                // them all.
                reader.cancel(u64::MAX, 0).unwrap();
                assert_eq!(reap_n(&mut reader, 1)[0].op, RingOp::Cancel);
            }
            let posted_again = Arc::new(AtomicU64::new(0));
            let writing = thread::spawn({
                let posted_again = posted_again.clone();
                move || {
                    let (mut sent, start) = (0, Instant::now());
                    while sent < count || writer.in_flight() > 0 {
                        while sent < count
                            && sent - posted_again.load(Ordering::SeqCst) < UNDER_WAY
                            && credits(&mut writer).1 > 0
                        {
                            let mut frame = writer.alloc().unwrap();
                            frame.copy_from(&bytes).unwrap();
                            writer.submit_write(frame, sent).unwrap();
                            sent += 1;
                        }
                        writer.wait(1, Some(Duration::from_micros(200)));
                        assert!(reap(&mut writer).iter().all(|done| done.result.is_ok()));
                        assert!(start.elapsed() < LONG, "{sent} of {count} were sent");
                    }
                }
            });
            let (mut received, mut cancelled, mut asked) = (0, 0, 0);
            let start = Instant::now();
            while received < count {
                reader.wait(1, Some(Duration::from_micros(200)));
                for done in reap(&mut reader) {
                    match done.brief() {
                        (RingOp::Cancel, ..) => continue,
                        (_, _, Ok(_)) => received += 1,
                        (_, _, result) => {
                            assert_eq!(result, Err(EntryError::Cancelled));
                            cancelled += 1;
                        }
                    }
                    reader.submit_read(done.frame.unwrap(), done.user_data).unwrap();
                }
                posted_again.store(received, Ordering::SeqCst);
                asked += 1;
                let target = if asked % 4 == 0 { asked / 4 % READS } else { u64::MAX };
                let _ = reader.cancel(target, 0);
                stage(format!("{way:?}: {received} of {count}, {cancelled} reads cancelled"));
                assert!(start.elapsed() < LONG, "{received} of {count}, {:?}", to.drops());
            }
            writing.join().unwrap();
            assert!(to.drops().iter().all(|(_, packets)| *packets == 0), "{:?}", to.drops());
        });
    });
}

/// Goal: a cancel of one read leaves the others posted. This holds even if the device keeps as many
/// reads as it can and a packet has just come for the first of them.
#[test]
fn a_cancel_touches_nothing_but_its_target() {
    guarded(|| {
        let interface = loopback();
        let mut reader = inline(&interface, Direction::Read).read_depth(1024).build().unwrap();
        let mut writer = inline(&interface, Direction::Write).build().unwrap();
        (0..1024).for_each(|number| post(&mut reader, number));
        drive_to_rest(&mut reader);
        send(&mut writer, 0);
        drive_to_rest(&mut writer);
        reader.cancel(5, 5000).unwrap();
        let mut done: Vec<_> = reap_n(&mut reader, 3).iter().map(|done| done.brief()).collect();
        done.sort_by_key(|(_, user_data, _)| *user_data);
        let cancelled = Err(EntryError::Cancelled);
        assert_eq!(
            done,
            [
                (RingOp::Read, 0, Ok(60)),
                (RingOp::Read, 5, cancelled),
                (RingOp::Cancel, 5000, Ok(1))
            ]
        );
        drive_to_rest(&mut reader);
        assert_eq!(reap(&mut reader).len(), 0, "nothing else has completed");
        assert_eq!(reader.in_flight(), 1022);
        // The others are still filled, in their order.
        for number in (1..1024).filter(|number| *number != 5) {
            send(&mut writer, number);
            assert_eq!(reap_n(&mut writer, 1)[0].result, Ok(60));
            let done = reap_n(&mut reader, 1).remove(0);
            assert_eq!(done.brief(), (RingOp::Read, number, Ok(60)));
            assert_eq!(number_of(&done.frame.unwrap()), number);
        }
    });
}

#[test]
fn cancel_and_wait_empties_the_ring_and_keeps_it_alive() {
    guarded(|| {
        every_way(|way, poller| {
            for interface in [loopback(), Gate::default().start()] {
                let mut ring = interface
                    .ring(Direction::Both)
                    .depth(16)
                    .drive(way.drive(poller))
                    .retry(PATIENT)
                    .build()
                    .unwrap();
                for _ in 0..3 {
                    assert_eq!(ring.cancel_and_wait(LONG).unwrap(), 0, "nothing to do");
                    (0..16).for_each(|number| post(&mut ring, number));
                    assert_eq!(ring.cancel_and_wait(LONG).unwrap(), 16);
                    assert_eq!(ring.in_flight(), 16, "they wait to be reaped");
                    for done in reap(&mut ring) {
                        assert_eq!(done.result, Err(EntryError::Cancelled));
                        assert!(done.frame.is_some());
                    }
                    assert_eq!((ring.in_flight(), ring.control().closed()), (0, None));
                }
            }
            // The ring still works: packets go round.
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            post(&mut ring, 1);
            ring.cancel_and_wait(LONG).unwrap();
            drop(reap(&mut ring));
            post(&mut ring, 2);
            send(&mut ring, 3);
            assert!(reap_n(&mut ring, 2).iter().all(|done| done.result.is_ok()));
        });
    });
}

/// If a device does not release its slots in time, `cancel_and_wait` returns an error and nothing is lost.
#[test]
fn a_cancel_and_wait_that_does_not_end_in_time_loses_nothing() {
    guarded(|| {
        let held: Arc<Mutex<Vec<PostedSlot>>> = Arc::default();
        let release = Arc::new(AtomicBool::new(false));
        let (keep, go) = (held.clone(), release.clone());
        let interface = Script::new(move |_, _| {
            let (keep, go) = (keep.clone(), go.clone());
            ScriptQueue::new(move |io| {
                let mut kept = keep.lock().unwrap();
                while let Some(slot) = io.take_read() {
                    kept.push(slot);
                }
                if go.load(Ordering::SeqCst) {
                    kept.drain(..).for_each(|slot| io.complete_read(slot, 14));
                }
                Ok(Progress::Idle)
            })
        })
        .start();
        let mut ring = inline(&interface, Direction::Read).build().unwrap();
        (0..4).for_each(|number| post(&mut ring, number));
        drive_to_rest(&mut ring);
        let short = Duration::from_millis(20);
        let error = ring.cancel_and_wait(short).unwrap_err();
        assert!(matches!(error, Error::Timeout(timeout) if timeout == short), "{error}");
        assert_eq!((ring.in_flight(), held.lock().unwrap().len()), (4, 4));
        release.store(true, Ordering::SeqCst);
        assert!(reap_n(&mut ring, 4).iter().all(|done| done.result == Ok(14)));
    });
}

#[test]
fn cancel_all_from_a_control_handle_empties_the_ring() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            (0..20).for_each(|number| post(&mut ring, number));
            let control = ring.control();
            thread::spawn(move || control.cancel_all()).join().unwrap();
            for (number, done) in reap_n(&mut ring, 20).iter().enumerate() {
                let cancelled = Err(EntryError::Cancelled);
                assert_eq!(done.brief(), (RingOp::Read, number as u64, cancelled));
            }
            assert_eq!(ring.control().closed(), None);
        });
    });
}
