//! What a third-party device can and cannot do.

use crate::support::eventually;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmring::device::{PollContext, PostedSlot, Progress};
use vmring::{
    CloseReason, Direction, EntryError, Error, IdlePolicy, Interface, Pool, RingOp, Status,
};

use super::{PATIENT, pool};
use crate::support::{
    LONG, Script, ScriptQueue, every_way, filled, guarded, inline, number_of, post, reap_n, send,
    stage, take_writes,
};

const SOON: Duration = Duration::from_millis(30);

/// Goal: a device cannot return a slot twice or keep its memory. A dropped slot completes as
/// abandoned, a forgotten slot is counted at close, and each entry completes once.
#[test]
fn a_third_party_device_cannot_return_a_slot_twice_or_keep_its_memory() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = Script::new(|_, _| {
                ScriptQueue::new(|cx| {
                    while let Some(slot) = cx.take_write() {
                        match slot.user_data() {
                            0 => drop(slot),
                            1 => std::mem::forget(slot),
                            _ => cx.complete_write(slot),
                        }
                    }
                    Ok(Progress::Idle)
                })
            })
            .start();
            let pool = pool(16);
            let mut ring = interface
                .ring(Direction::Both)
                .depth(8)
                .pool(&pool)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            (0..3).for_each(|number| send(&mut ring, number));
            let mut done = reap_n(&mut ring, 2);
            done.sort_by_key(|done| done.user_data);
            assert_eq!(done[0].brief(), (RingOp::Write, 0, Err(EntryError::Abandoned)));
            assert_eq!(number_of(done[0].frame.as_ref().unwrap()), 0);
            assert_eq!(done[1].brief(), (RingOp::Write, 2, Ok(60)));
            assert_eq!((ring.in_flight(), ring.stats().abandoned), (1, 1));
            drop(done);
            let error = ring.close().unwrap_err();
            assert!(matches!(error, Error::Leaked { slots: 1, .. }), "{error}");
            drop(ring);
            assert_eq!(pool.slots_out(), 1, "lost, and not copied");
        });
    });
}

/// Goal: a length beyond the slot makes no code read outside the slot. Method: a device that
/// reports arbitrary lengths. A length that fits is accepted; any other completes as an invalid
/// argument.
#[test]
fn hostile_lengths_never_reach_outside_the_slot() {
    guarded(|| {
        let interface = Script::new(|_, _| {
            ScriptQueue::new(|cx| {
                while let Some(mut slot) = cx.take_read() {
                    let hostile = slot.user_data() as usize;
                    let buffer = slot.buffer_mut().unwrap();
                    buffer.fill(0xaa);
                    let room = buffer.len();
                    let len = if hostile < 2 { room + hostile } else { hostile };
                    cx.complete_read(slot, len);
                }
                Ok(Progress::Idle)
            })
        })
        .start();
        let mut ring = inline(&interface, Direction::Read).build().unwrap();
        let hostile = [0, 1, 14, 1 << 16, 1 << 31, (1 << 32) + 14, u64::MAX, u64::MAX - 63];
        hostile.iter().for_each(|len| post(&mut ring, *len));
        for (number, done) in reap_n(&mut ring, hostile.len()).iter().enumerate() {
            let frame = done.frame.as_ref().expect("its frame, in any case");
            match hostile[number] {
                0 => assert_eq!(done.result, Ok(frame.capacity())),
                14 => assert_eq!((done.result, &frame[..]), (Ok(14), &[0xaa; 14][..])),
                _ => {
                    assert_eq!(done.result, Err(Status::InvalidArgument.into()));
                    assert_eq!(frame.len(), 0);
                }
            }
        }
        assert_eq!((ring.stats().errors, ring.stats().rx_packets), (6, 2));
    });
}

/// Goal: an error of the system reaches the caller with its errno: in a completion, in the reason of a
/// close, and in the counters. Method: a device that refuses one write, and then fails for good.
#[test]
fn an_errno_reaches_the_caller() {
    guarded(|| {
        let interface = Script::new(|_, _| {
            ScriptQueue::new(|cx| {
                while let Some(slot) = cx.take_write() {
                    if slot.user_data() == 2 {
                        return Err(Status::Os(19));
                    }
                    cx.fail(slot, Status::Os(5));
                }
                Ok(Progress::Idle)
            })
        })
        .start();
        let mut ring = inline(&interface, Direction::Both).build().unwrap();
        post(&mut ring, 7);
        send(&mut ring, 1);
        let refused = EntryError::Device(Status::Os(5));
        assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Write, 1, Err(refused)));
        assert_eq!(refused.to_string(), std::io::Error::from_raw_os_error(5).to_string());
        assert_eq!(ring.stats().errors_by_status.of(Status::Os(5)), 1);
        assert_eq!(ring.stats().errors_by_status.of(Status::Unknown(4711)), 0);
        send(&mut ring, 2);
        reap_n(&mut ring, 2);
        assert_eq!(ring.control().closed(), Some(CloseReason::Failed(Status::Os(19))));
        // The two writes were the device's to refuse. It has never looked at the read.
        let stats = ring.stats();
        assert_eq!((stats.errors, stats.errors_at_failure, stats.abandoned), (3, 1, 0));
    });
}

/// A device with two queues. The first takes writes, and the second passes them to `give`.
fn mixed_up(
    give: impl Fn(&mut PollContext<'_>, PostedSlot) + Send + Sync + 'static,
) -> (Interface, Arc<AtomicU64>) {
    let taken: Arc<Mutex<Vec<PostedSlot>>> = Arc::default();
    let (queues, count) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
    let counted = count.clone();
    let give = Arc::new(give);
    let device = Script::new(move |_, _| {
        let (taken, give, count) = (taken.clone(), give.clone(), count.clone());
        let first = queues.fetch_add(1, Ordering::SeqCst) == 0;
        ScriptQueue::new(move |cx| {
            let mut taken = taken.lock().unwrap();
            if first {
                while let Some(slot) = cx.take_write() {
                    taken.push(slot);
                    count.fetch_add(1, Ordering::SeqCst);
                }
            } else {
                taken.drain(..).for_each(|slot| give(cx, slot));
                take_writes(cx);
            }
            Ok(Progress::Idle)
        })
    });
    (device.start(), counted)
}

/// If the device gives a slot of ring A to ring B, the slot completes on A as abandoned, and
/// nothing happens to B.
fn a_slot_given_to_another_ring_completes_on_its_own(
    give: impl Fn(&mut PollContext<'_>, PostedSlot) + Send + Sync + Copy + 'static,
) {
    for shared_pool in [false, true] {
        every_way(|way, poller| {
            let (interface, taken) = mixed_up(give);
            let (first, second) = (pool(8), pool(8));
            let build = |pool: &Pool| {
                let builder = interface.ring(Direction::Write).write_depth(4).pool(pool);
                builder.drive(way.drive(poller)).build().unwrap()
            };
            let mut a = build(&first);
            let mut b = build(if shared_pool { &first } else { &second });
            send(&mut a, 1);
            stage(format!("{way:?}: the slot is taken"));
            // If the rings are inline, A must be driven before B, so that the device has the slot
            // when B is driven.
            eventually("A's queue has taken the slot", || {
                let _ = a.reap().len();
                taken.load(Ordering::SeqCst) == 1
            });
            for number in 10..14 {
                send(&mut b, number);
                assert_eq!(reap_n(&mut b, 1)[0].brief(), (RingOp::Write, number, Ok(60)));
            }
            stage(format!("{way:?}: it comes back"));
            let done = reap_n(&mut a, 1).remove(0);
            assert_eq!(done.brief(), (RingOp::Write, 1, Err(EntryError::Abandoned)));
            assert!(first.owns(&done.frame.unwrap()));
            // Both rings still work.
            send(&mut b, 20);
            assert_eq!(reap_n(&mut b, 1)[0].brief(), (RingOp::Write, 20, Ok(60)));
            assert_eq!((a.control().closed(), b.control().closed()), (None, None));
            b.cancel_and_wait(LONG).unwrap();
            b.close().unwrap();
            a.close().unwrap();
        });
    }
}

#[test]
fn a_slot_completed_on_another_ring_comes_back_on_its_own() {
    guarded(|| {
        a_slot_given_to_another_ring_completes_on_its_own(|cx, slot| cx.complete_write(slot))
    });
}

#[test]
fn a_slot_put_back_to_another_ring_comes_back_on_its_own() {
    guarded(|| a_slot_given_to_another_ring_completes_on_its_own(|cx, slot| cx.put_back(slot)));
}

/// A device may keep a slot for some calls and put it back later. The slot is then posted as
/// before.
#[test]
fn a_slot_put_back_in_a_later_call_is_posted_again() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = Script::new(|_, _| {
                let (mut kept, mut calls) = (Vec::new(), 0);
                ScriptQueue::new(move |cx| {
                    calls += 1;
                    match calls {
                        1 => kept.extend(std::iter::from_fn(|| cx.take_write())),
                        2 => kept.drain(..).rev().for_each(|slot| cx.put_back(slot)),
                        _ => take_writes(cx),
                    }
                    Ok(Progress::Idle)
                })
            })
            .start();
            let mut ring = interface
                .ring(Direction::Write)
                .retry(PATIENT)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let frames: Vec<_> = (0..3).map(|number| (filled(&ring, number), number)).collect();
            ring.submit_writes(frames).unwrap();
            for (number, done) in reap_n(&mut ring, 3).iter().enumerate() {
                assert_eq!(done.brief(), (RingOp::Write, number as u64, Ok(60)));
            }
        });
    });
}

/// A slot that was put back may be taken again, in its order, and does not count against the limit
/// of the call. Entries in the SQ come after it.
#[test]
fn a_slot_that_is_put_back_may_be_taken_again_in_the_same_call() {
    guarded(|| {
        let interface = Script::new(|_, _| {
            ScriptQueue::new(|cx| {
                for _ in 0..3 {
                    let taken: Vec<_> = std::iter::from_fn(|| cx.take_write()).collect();
                    assert!(taken.len() <= 2, "the limit of a call");
                    taken.into_iter().rev().for_each(|slot| cx.put_back(slot));
                }
                take_writes(cx);
                Ok(Progress::Idle)
            })
        })
        .limits(|caps| caps.max_write_batch = 2)
        .start();
        let mut ring = inline(&interface, Direction::Write).build().unwrap();
        let frames: Vec<_> = (0..5).map(|number| (filled(&ring, number), number)).collect();
        ring.submit_writes(frames).unwrap();
        for calls in [2, 2, 1] {
            assert_eq!(ring.reap().count(), calls);
        }
        assert_eq!((ring.in_flight(), ring.stats().retries), (0, 0));
    });
}

/// A driver that starts too slowly.
#[test]
fn a_start_that_takes_too_long_times_out_and_is_undone() {
    use vmring::device::fault::Faults;
    guarded(|| {
        let script = Script::new(|_, _| ScriptQueue::new(|_| Ok(Progress::Idle)));
        let stops = script.stops();
        let slow = Faults::seeded(1).start_delay(Duration::from_millis(100)).wrap(script);
        let timeout = Duration::from_millis(10);
        let start = Interface::builder().device(slow).start_timeout(timeout).start();
        assert!(matches!(start, Err(Error::StartTimeout(after)) if after == timeout), "{start:?}");
        crate::support::eventually("the late device is stopped", || {
            stops.load(Ordering::SeqCst) == 1
        });
    });
}

/// Goal: a queue without a descriptor is polled at its deadline, in each way to drive a ring. Method: it
/// completes the read when its time has come, and nothing else wakes it.
#[test]
fn a_queue_is_polled_at_its_deadline() {
    guarded(|| {
        every_way(|way, poller| {
            let due = Arc::new(Mutex::new(None));
            let interface = Script::new(move |_, _| {
                let (seen, asked) = (due.clone(), due.clone());
                ScriptQueue::new(move |cx| {
                    let mut due = seen.lock().unwrap();
                    let due = due.get_or_insert_with(|| Instant::now() + SOON);
                    if *due <= Instant::now()
                        && let Some(slot) = cx.take_read()
                    {
                        cx.complete_read(slot, 60);
                    }
                    Ok(Progress::Idle)
                })
                .on_deadline(move || *asked.lock().unwrap())
            })
            .start();
            let ring = interface.ring(Direction::Both).depth(8).drive(way.drive(poller));
            let mut ring = ring.build().unwrap();
            post(&mut ring, 1);
            assert_eq!(ring.wait(1, Some(LONG)), 1, "{way:?}");
            assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Read, 1, Ok(60)));
        });
    });
}

/// Goal: a packet that came just before its queue was armed reaches a read, although the device does
/// not ring for it. Method: the packet comes in `arm`, which says no. The read is still posted, or
/// the device keeps it.
#[test]
fn a_queue_that_refuses_to_be_armed_is_polled_again() {
    guarded(|| {
        every_way(|way, poller| {
            for keeps in [false, true] {
                stage(format!("{way:?}: the device keeps the read: {keeps}"));
                let interface = Script::new(move |_, _| {
                    // 0: no read was seen; 1: one was; 2: a packet has come; 3: it was read.
                    let stage = Arc::new(AtomicU32::new(0));
                    let (at_arming, mut kept) = (stage.clone(), None);
                    ScriptQueue::new(move |io| {
                        if keeps && kept.is_none() {
                            kept = io.take_read();
                        }
                        if kept.is_some() || io.reads() > 0 {
                            stage.fetch_max(1, Ordering::SeqCst);
                        }
                        if stage.load(Ordering::SeqCst) == 2 {
                            let slot = kept.take().or_else(|| io.take_read()).expect("seen");
                            io.complete_read(slot, 60);
                            stage.store(3, Ordering::SeqCst);
                        }
                        Ok(Progress::Idle)
                    })
                    .on_arm(move || {
                        let order = Ordering::SeqCst;
                        at_arming.compare_exchange(1, 2, order, order).is_err()
                    })
                })
                .start();
                let ring = interface.ring(Direction::Read).depth(4).drive(way.drive(poller));
                let mut ring = ring.idle(IdlePolicy::PARK).build().unwrap();
                post(&mut ring, 1);
                assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(60));
            }
        });
    });
}
