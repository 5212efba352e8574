//! Closing in every order and with every kind of device. Nothing that the device gives back is
//! lost. What it does not give back is leaked on purpose and counted.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::fault::Faults;
use vmring::device::{PostedSlot, Progress};
use vmring::pool::{Backing, Layout};
use vmring::{
    CloseReason, CompletionQueue, Direction, Drive, EntryError, Error, Frame, Interface, Loopback,
    Pool, PoolBuilder, RetryPolicy, Ring, RingOp, Status, SubmitErrorKind,
};
use vmring_core::HeapBacking;

use crate::support::{
    LONG, Script, ScriptQueue, eventually, every_way, guarded, inline, loopback, number_of, post,
    quiet_network, reap, reap_n, scaled, send, stage, take_writes, unique,
};

/// Memory that counts how often it is freed.
struct Counted {
    memory: HeapBacking,
    ended: Arc<AtomicUsize>,
}

// SAFETY: every call goes to a `Backing` that this value owns, which keeps the contract.
unsafe impl Backing for Counted {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// A pool, and the number of times its memory was freed.
fn counted_pool(slots: u32) -> (Pool, Arc<AtomicUsize>) {
    let ended = Arc::new(AtomicUsize::new(0));
    let layout = Layout { slots, slot_size: 2048, headroom: 64 };
    let memory = HeapBacking::new(slots as usize * 2048);
    let pool = Pool::new(Box::new(Counted { memory, ended: ended.clone() }), layout).unwrap();
    (pool, ended)
}

/// A device that takes no write.
fn stalled() -> Interface {
    Script::new(|_, _| ScriptQueue::new(|_| Ok(Progress::Idle))).start()
}

const PATIENT: RetryPolicy = RetryPolicy { attempts: u32::MAX, delay: Duration::from_micros(100) };

/// A device that keeps every slot it takes. It releases them at close if `lets_go`, else never.
fn keeping(lets_go: bool) -> Interface {
    keeping_in(lets_go, Arc::default())
}

fn keeping_in(lets_go: bool, kept: Arc<Mutex<Vec<PostedSlot>>>) -> Interface {
    Script::new(move |_, _| {
        let kept = kept.clone();
        let closing = kept.clone();
        ScriptQueue::new(move |io| {
            let mut kept = kept.lock().unwrap();
            kept.extend(std::iter::from_fn(|| io.take_read()));
            kept.extend(std::iter::from_fn(|| io.take_write()));
            Ok(Progress::Idle)
        })
        .on_close(move |io| {
            if lets_go {
                closing.lock().unwrap().drain(..).for_each(|slot| io.cancel(slot));
            }
            lets_go
        })
    })
    .start()
}

#[test]
fn close_completes_everything_in_flight_as_cancelled() {
    guarded(|| {
        every_way(|way, poller| {
            let embedded = quiet_network(unique("close"));
            let embedded = Interface::builder().device(embedded).start().unwrap();
            let hold = Faults::seeded(1).engine(Duration::from_millis(2), true);
            let engine = hold.wrap(Loopback::new(1500));
            let engine = Interface::builder().device(engine).start().unwrap();
            for interface in [loopback(), embedded, engine, stalled(), keeping(true)] {
                stage(format!("{way:?} on {}", interface.device_name()));
                let mut ring = interface
                    .ring(Direction::Both)
                    .depth(16)
                    .retry(PATIENT)
                    .drive(way.drive(poller))
                    .build()
                    .unwrap();
                let stuck = interface.device_name() == "script";
                (0..16).for_each(|number| post(&mut ring, number));
                (0..if stuck { 16 } else { 0 }).for_each(|number| send(&mut ring, 100 + number));
                let in_flight = ring.in_flight();
                ring.close().unwrap();
                let done = reap(&mut ring);
                assert_eq!((done.len(), ring.in_flight()), (in_flight, 0));
                for done in done {
                    assert_eq!(done.result, Err(EntryError::Cancelled));
                    assert!(done.frame.is_some());
                }
                assert_eq!(ring.stats().cancelled, in_flight as u64);
                assert_eq!(ring.control().closed(), Some(CloseReason::Stopped));
                ring.close().expect("closing twice is harmless");
                interface.stop(LONG).unwrap();
                interface.stop(LONG).expect("so is stopping twice");
                assert!(matches!(
                    inline(&interface, Direction::Both).build(),
                    Err(Error::Config(_))
                ));
            }
        });
    });
}

#[test]
fn a_packet_that_has_come_completes_its_read_at_close() {
    guarded(|| {
        let interface = loopback();
        let mut reader = inline(&interface, Direction::Read).build().unwrap();
        let mut writer = inline(&interface, Direction::Write).build().unwrap();
        (0..2).for_each(|number| post(&mut reader, number));
        reader.reap().for_each(drop);
        send(&mut writer, 7);
        writer.reap().for_each(drop);
        reader.close().unwrap();
        let done = reap(&mut reader);
        assert_eq!(done[0].brief(), (RingOp::Read, 0, Ok(60)));
        assert_eq!(number_of(done[0].frame.as_ref().unwrap()), 7);
        assert_eq!(done[1].brief(), (RingOp::Read, 1, Err(EntryError::Cancelled)));
    });
}

#[test]
fn a_device_that_does_not_let_go_is_leaked_and_close_says_so() {
    guarded(|| {
        every_way(|way, poller| {
            let (pool, ended) = counted_pool(32);
            let kept: Arc<Mutex<Vec<PostedSlot>>> = Arc::default();
            let interface = keeping_in(false, kept.clone());
            let timeout = Duration::from_millis(30);
            let mut ring = interface
                .ring(Direction::Both)
                .depth(8)
                .pool(&pool)
                .close_timeout(timeout)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            (0..5).for_each(|number| post(&mut ring, number));
            send(&mut ring, 9);
            eventually("the device has taken everything", || {
                ring.reap().for_each(drop);
                kept.lock().unwrap().len() == 6
            });
            for _ in 0..2 {
                match ring.close() {
                    Err(Error::Leaked { slots, .. }) => assert_eq!(slots, 6),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(ring.reap().len(), 0);
            drop(ring);
            drop(interface);
            assert_eq!(pool.slots_out(), 6, "leaked on purpose");
            drop(pool);
            assert_eq!(ended.load(Ordering::SeqCst), 0, "somebody may still write there");
            // If the device releases them after all, even these slots return to the pool.
            kept.lock().unwrap().clear();
            assert_eq!(ended.load(Ordering::SeqCst), 1);
        });
    });
}

/// The fault wrapper offers users such a device.
/// Goal: a device that keeps its slots at first, and releases them within the close timeout, leaks
/// nothing. Method: it refuses the first three times.
#[test]
fn a_device_that_lets_go_late_leaks_nothing() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = Script::new(|_, _| {
                let kept = Arc::new(Mutex::new(Vec::new()));
                let (closing, mut calls) = (kept.clone(), 0);
                ScriptQueue::new(move |io| {
                    kept.lock().unwrap().extend(std::iter::from_fn(|| io.take_read()));
                    Ok(Progress::Idle)
                })
                .on_close(move |io| {
                    calls += 1;
                    let lets_go = calls > 3;
                    if lets_go {
                        closing.lock().unwrap().drain(..).for_each(|slot| io.cancel(slot));
                    }
                    lets_go
                })
            })
            .start();
            let ring = interface.ring(Direction::Read).depth(4).drive(way.drive(poller));
            let mut ring = ring.close_timeout(LONG).build().unwrap();
            (0..4).for_each(|number| post(&mut ring, number));
            assert_eq!(ring.reap().len(), 0, "no packet comes");
            ring.close().expect("nothing is leaked");
            assert!(reap_n(&mut ring, 4).iter().all(|d| d.result == Err(EntryError::Cancelled)));
        });
    });
}

#[test]
fn a_fault_device_that_is_stuck_at_close_is_leaked() {
    guarded(|| {
        let faults = Faults::seeded(1).engine(Duration::from_secs(3600), false).stuck_at_close();
        let interface =
            Interface::builder().device(faults.wrap(Loopback::new(1500))).start().unwrap();
        let timeout = Duration::from_millis(30);
        let builder = inline(&interface, Direction::Both).close_timeout(timeout);
        let mut ring = builder.build().unwrap();
        (0..3).for_each(|number| send(&mut ring, number));
        assert_eq!(ring.reap().len(), 0, "the engine holds them");
        let pool = ring.pools()[0].clone();
        let error = ring.close().unwrap_err();
        assert!(matches!(error, Error::Leaked { slots: 3, .. }), "{error}");
        drop(ring);
        assert_eq!(pool.slots_out(), 3);
    });
}

/// Goal: close ends even if the device does not return from a call.
#[test]
fn a_device_that_does_not_return_from_a_call_is_leaked_too() {
    guarded(|| {
        let (entered, release) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (enter, go) = (entered.clone(), release.clone());
        let interface = Script::new(move |_, _| {
            let (enter, go) = (enter.clone(), go.clone());
            ScriptQueue::new(move |io| {
                enter.store(true, Ordering::SeqCst);
                while !go.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
                take_writes(io);
                Ok(Progress::Idle)
            })
        })
        .start();
        let (pool, ended) = counted_pool(8);
        let timeout = Duration::from_millis(20);
        let mut ring = interface
            .ring(Direction::Write)
            .write_depth(8)
            .pool(&pool)
            .close_timeout(timeout)
            .build()
            .unwrap();
        (0..4).for_each(|number| send(&mut ring, number));
        eventually("the device is in its call", || entered.load(Ordering::SeqCst));
        let error = ring.close().unwrap_err();
        assert!(matches!(error, Error::Leaked { slots: 4, .. }), "{error}");
        drop(ring);
        drop(interface);
        drop(pool);
        assert_eq!(ended.load(Ordering::SeqCst), 0);
        // If the call returns after all, everything is freed.
        release.store(true, Ordering::SeqCst);
        eventually("the late poller cleans up", || ended.load(Ordering::SeqCst) == 1);
    });
}

/// A device that forgets every write it takes, and how many it has forgotten.
fn forgetful() -> (Interface, Arc<AtomicUsize>) {
    let forgotten = Arc::<AtomicUsize>::default();
    let counter = forgotten.clone();
    let script = Script::new(move |_, _| {
        let counter = counter.clone();
        ScriptQueue::new(move |io| {
            while let Some(slot) = io.take_write() {
                std::mem::forget(slot);
                counter.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Progress::Idle)
        })
    });
    (script.start(), forgotten)
}

/// Sends a packet to a device that forgets it.
fn send_to_be_forgotten(ring: &mut Ring, forgotten: &AtomicUsize) {
    send(ring, 1);
    eventually("the device forgets a packet", || {
        ring.reap().for_each(drop);
        forgotten.load(Ordering::Relaxed) == 1
    });
}

/// Leaked entries never complete, so `wait` must not wait for them.
#[test]
fn wait_does_not_wait_for_what_has_leaked() {
    guarded(|| {
        every_way(|way, poller| {
            let (interface, forgotten) = forgetful();
            let mut ring = interface
                .ring(Direction::Write)
                .close_timeout(Duration::from_millis(30))
                .drive(way.drive(poller))
                .build()
                .unwrap();
            send_to_be_forgotten(&mut ring, &forgotten);
            let error = ring.close().unwrap_err();
            assert!(matches!(error, Error::Leaked { slots: 1, .. }), "{error}");
            stage(format!("{way:?}: waiting for what has leaked"));
            assert_eq!(ring.wait(1, None), 0);
        });
    });
}

/// What a caller sees in flight stays in flight until the caller drives the ring, and the ring says
/// when to do that. So a caller that looks at both, one after the other, does not sleep for ever.
#[test]
fn what_has_leaked_is_in_flight_until_the_ring_is_driven_at_its_deadline() {
    guarded(|| {
        let interface = Script::new(|_, _| {
            ScriptQueue::new(|io| {
                std::mem::forget(io.take_write());
                panic!("on purpose")
            })
        })
        .start();
        let timeout = Duration::from_millis(20);
        let builder = interface.ring(Direction::Write).close_timeout(timeout);
        let mut ring = builder.drive(Drive::Inline).build().unwrap();
        send(&mut ring, 1);
        ring.reap().for_each(drop);
        for _ in 0..2 {
            assert_eq!(ring.in_flight(), 1);
            assert!(ring.next_deadline().is_some(), "nobody would drive it");
            std::thread::sleep(timeout);
        }
        ring.reap().for_each(drop);
        assert_eq!((ring.in_flight(), ring.next_deadline()), (0, None));
        assert_eq!(ring.wait(1, None), 0);
    });
}

/// After a close has timed out, a second close reports the same at once, and a drop does not wait
/// either.
#[test]
fn a_ring_that_has_leaked_is_closed_again_and_dropped_without_waiting() {
    guarded(|| {
        every_way(|way, poller| {
            let timeout = Duration::from_millis(400);
            // This thread may be stopped for longer than that, so there are several attempts.
            eventually("a second close and a drop do not wait again", || {
                let (interface, forgotten) = forgetful();
                let builder = interface.ring(Direction::Write).close_timeout(timeout);
                let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                send_to_be_forgotten(&mut ring, &forgotten);
                assert!(matches!(ring.close(), Err(Error::Leaked { slots: 1, .. })));
                let start = Instant::now();
                assert!(matches!(ring.close(), Err(Error::Leaked { slots: 1, .. })));
                drop(ring);
                start.elapsed() < timeout / 2
            });
        });
    });
}

/// Goal: a slot that a device drops after its ring is gone returns to its pool, although a control
/// handle still refers to the ring.
#[test]
fn a_slot_dropped_after_its_ring_is_freed_while_a_control_handle_lives() {
    guarded(|| {
        every_way(|way, poller| {
            let kept: Arc<Mutex<Vec<PostedSlot>>> = Arc::default();
            let keep = kept.clone();
            let interface = Script::new(move |_, _| {
                let keep = keep.clone();
                ScriptQueue::new(move |io| {
                    while let Some(slot) = io.take_write() {
                        keep.lock().unwrap().push(slot);
                    }
                    Ok(Progress::Idle)
                })
                .on_close(|_| false)
            })
            .start();
            let pool = PoolBuilder::new(4, 1514).build().unwrap();
            let mut ring = interface
                .ring(Direction::Write)
                .pool(&pool)
                .close_timeout(Duration::from_millis(30))
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let control = ring.control();
            send(&mut ring, 1);
            let start = Instant::now();
            while kept.lock().unwrap().is_empty() && start.elapsed() < LONG {
                let _ = ring.wait(1, Some(Duration::from_millis(1)));
            }
            drop(ring);
            assert_eq!(pool.slots_out(), 1);
            let slots = std::mem::take(&mut *kept.lock().unwrap());
            drop(slots);
            // The close of a poller that was slow may end after the ring's drop, and takes it then.
            eventually("the slot is home", || pool.slots_out() == 0);
            assert!(control.closed().is_some());
        });
    });
}

#[test]
fn dropping_rings_before_frames_leaks_nothing() {
    guarded(|| {
        every_way(|way, poller| {
            let (pool, ended) = counted_pool(32);
            let interface = loopback();
            let mut ring = interface
                .ring(Direction::Both)
                .depth(8)
                .pool(&pool)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let mut frames: Vec<Frame> = (0..3).map(|_| pool.alloc().unwrap()).collect();
            send(&mut ring, 1);
            post(&mut ring, 2);
            frames.extend(reap_n(&mut ring, 2).into_iter().filter_map(|done| done.frame));
            // Some entries are in flight, others are complete but not reaped.
            (0..4).for_each(|number| post(&mut ring, number));
            send(&mut ring, 3);
            drop(ring);
            drop(interface);
            assert_eq!(pool.slots_out(), 5, "what was in flight is home");
            drop(pool);
            // The frames still have their bytes.
            assert_eq!(number_of(&frames[3]), 1);
            frames[0].copy_from(b"alive").unwrap();
            assert_eq!(&frames[0][..], b"alive");
            assert_eq!(ended.load(Ordering::SeqCst), 0);
            while let Some(frame) = frames.pop() {
                assert_eq!(ended.load(Ordering::SeqCst), 0);
                drop(frame);
            }
            assert_eq!(ended.load(Ordering::SeqCst), 1, "the last frame home");
        });
    });
}

/// Goal: the last owner frees the memory, once. Method: frames on several threads, the pool's
/// handle and a ring are all dropped at the same time.
#[test]
fn the_last_frame_unmaps() {
    guarded(|| {
        for _ in 0..scaled(50) {
            let (pool, ended) = counted_pool(16);
            let interface = loopback();
            let mut ring = interface.ring(Direction::Both).depth(4).pool(&pool).build().unwrap();
            (0..4).for_each(|number| post(&mut ring, number));
            let frames: Vec<Frame> = (0..4).map(|_| pool.alloc().unwrap()).collect();
            let mut threads: Vec<_> =
                frames.into_iter().map(|frame| thread::spawn(move || drop(frame))).collect();
            threads.push(thread::spawn(move || drop(ring)));
            threads.push(thread::spawn(move || drop(pool)));
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(ended.load(Ordering::SeqCst), 1);
        }
    });
}

#[test]
fn dropping_a_ring_with_everything_in_flight_is_a_close() {
    guarded(|| {
        every_way(|way, poller| {
            for interface in [loopback(), stalled(), keeping(true)] {
                let (pool, ended) = counted_pool(64);
                let mut ring = interface
                    .ring(Direction::Both)
                    .depth(32)
                    .pool(&pool)
                    .retry(PATIENT)
                    .drive(way.drive(poller))
                    .build()
                    .unwrap();
                let control = ring.control();
                (0..32).for_each(|number| post(&mut ring, number));
                (0..32).for_each(|number| send(&mut ring, number));
                ring.cancel(5, 100).unwrap();
                drop(ring);
                assert_eq!(control.closed(), Some(CloseReason::Stopped));
                assert_eq!(pool.slots_out(), 0);
                drop(pool);
                assert_eq!(ended.load(Ordering::SeqCst), 1, "a control handle keeps nothing");
            }
        });
    });
}

/// The halves live on two threads and are dropped in either order.
#[test]
fn the_halves_of_a_ring_can_be_dropped_in_any_order() {
    guarded(|| {
        every_way(|way, poller| {
            for submitter_first in [true, false] {
                let (pool, ended) = counted_pool(16);
                let interface = loopback();
                let builder = interface.ring(Direction::Both).depth(8).pool(&pool);
                let ring = builder.drive(way.drive(poller)).build().unwrap();
                let (mut sq, mut cq) = ring.into_split();
                (0..4).for_each(|n| sq.submit_read(pool.alloc().unwrap(), n).unwrap());
                if submitter_first {
                    drop(sq);
                    cq.close().unwrap();
                    assert_eq!(cq.reap().len(), 4, "what was submitted still completes");
                    drop(cq);
                } else {
                    drop(cq);
                    let refused = sq.submit_read(pool.alloc().unwrap(), 9).unwrap_err();
                    assert_eq!(refused.kind, SubmitErrorKind::Closed(CloseReason::Stopped));
                    drop(refused);
                    drop(sq);
                }
                drop(pool);
                assert_eq!(ended.load(Ordering::SeqCst), 1);
            }
        });
    });
}

#[test]
fn dropping_the_interface_before_its_rings_is_harmless() {
    guarded(|| {
        every_way(|way, poller| {
            let script = Script::new(|_, _| {
                ScriptQueue::new(|io| {
                    take_writes(io);
                    Ok(Progress::Idle)
                })
            });
            let stops = script.stops();
            let interface = script.start();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            drop(interface);
            assert_eq!(stops.load(Ordering::SeqCst), 0, "the ring still needs it");
            send(&mut ring, 1);
            assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Write, 1, Ok(60)));
            drop(ring);
            eventually("the last ring stops the device", || stops.load(Ordering::SeqCst) == 1);
        });
    });
}

/// Stopping an interface closes its rings, and each ring gets its completions.
#[test]
fn stopping_the_interface_closes_its_rings() {
    guarded(|| {
        let interface = loopback();
        let mut reader = interface.ring(Direction::Read).build().unwrap();
        let mut writer = interface.ring(Direction::Write).build().unwrap();
        (0..8).for_each(|number| post(&mut reader, number));
        interface.stop(LONG).unwrap();
        for done in reap_n(&mut reader, 8) {
            assert_eq!(done.result, Err(EntryError::Cancelled));
        }
        let frame = writer.alloc().unwrap();
        let kind = writer.submit_write(frame, 1).unwrap_err().kind;
        assert_eq!(kind, SubmitErrorKind::Closed(CloseReason::Stopped));
        assert!(matches!(interface.restart(LONG), Err(Error::Config(_))));

        // An inline ring releases the device when its owner drives it. Until then a stop returns
        // the typed timeout.
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).build().unwrap();
        post(&mut ring, 1);
        let short = Duration::from_millis(10);
        assert!(matches!(
            interface.stop(short),
            Err(Error::StopTimeout { timeout, rings: 1, .. }) if timeout == short
        ));
        assert_eq!(reap_n(&mut ring, 1)[0].result, Err(EntryError::Cancelled));
        interface.stop(LONG).unwrap();
    });
}

#[test]
fn a_panicking_device_completes_what_it_does_not_hold_as_device_panicked() {
    guarded(|| {
        every_way(|way, poller| {
            for after in [0, 5] {
                let faults = Faults::seeded(1).panic_after(after).wrap(Loopback::new(1500));
                let interface = Interface::builder().device(faults).start().unwrap();
                let mut ring = interface
                    .ring(Direction::Both)
                    .depth(16)
                    .drive(way.drive(poller))
                    .build()
                    .unwrap();
                // Submit them as one batch, so that the first call sees all of them.
                (0..after).for_each(|number| send(&mut ring, number));
                let sent = reap_n(&mut ring, after as usize);
                assert!(sent.iter().all(|done| done.result == Ok(60)));
                let frames: Vec<_> =
                    (100..110).map(|number| (ring.alloc().unwrap(), number)).collect();
                // Submit them as a batch, which is published as one. If they were submitted one by
                // one, the panic might close the ring in between.
                assert_eq!(ring.submit_reads(frames).unwrap(), 10);
                for done in reap_n(&mut ring, 10) {
                    assert_eq!(done.result, Err(EntryError::DevicePanicked));
                    assert!(done.frame.is_some());
                }
                assert_eq!(ring.control().closed(), Some(CloseReason::DevicePanicked));
                let kind = ring.submit_read(ring_frame(&ring), 1).unwrap_err().kind;
                assert_eq!(kind, SubmitErrorKind::Closed(CloseReason::DevicePanicked));
                ring.close().expect("nothing is leaked");
            }
        });
    });
}

fn ring_frame(ring: &Ring) -> Frame {
    ring.alloc().expect("a free frame")
}

/// A device panics while it holds slots. They come back because they are dropped with the queue.
/// The poller's thread survives and serves its other rings.
#[test]
fn slots_that_a_panicking_device_held_come_back() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = Script::new(|_, _| {
                let mut kept = Vec::new();
                ScriptQueue::new(move |io| {
                    kept.extend(std::iter::from_fn(|| io.take_read()));
                    if io.writes() > 0 {
                        let _slot = io.take_write();
                        std::panic::resume_unwind(Box::new("with slots in its hands"));
                    }
                    Ok(Progress::Idle)
                })
            })
            .start();
            let healthy = loopback();
            let mut other = healthy.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            (0..6).for_each(|number| post(&mut ring, number));
            ring.reap().for_each(drop);
            send(&mut ring, 9);
            for done in reap_n(&mut ring, 7) {
                assert_eq!(done.result, Err(EntryError::DevicePanicked));
            }
            ring.close().expect("nothing is leaked");
            post(&mut other, 1);
            send(&mut other, 2);
            assert!(reap_n(&mut other, 2).iter().all(|done| done.result.is_ok()));
        });
    });
}

/// A waker that holds a reaping half and drops it when woken.
struct Holder(Mutex<Option<CompletionQueue>>);

impl Wake for Holder {
    fn wake(self: Arc<Self>) {
        let held = self.0.lock().unwrap().take();
        drop(held);
    }
}

/// A panic in any of a device's functions ends the ring of that device, but not the thread that
/// other rings share.
#[test]
fn no_panic_of_a_device_ends_a_shared_poller() {
    /// A panic payload that panics again when it is dropped.
    struct Twice;
    impl Drop for Twice {
        fn drop(&mut self) {
            std::panic::resume_unwind(Box::new(()));
        }
    }
    fn panics() {
        std::panic::resume_unwind(Box::new("the device's own bug"));
    }
    fn patient() -> ScriptQueue {
        ScriptQueue::new(|_| Ok(Progress::Idle))
    }
    // The builder makes the first call; the poller makes the later ones.
    fn second(calls: &AtomicUsize) -> bool {
        calls.fetch_add(1, Ordering::SeqCst) > 0
    }
    guarded(|| {
        let poller = vmring::Poller::start().unwrap();
        let healthy = loopback();
        let build = |interface: &Interface| {
            interface.ring(Direction::Both).drive(Drive::Shared(&poller)).build().unwrap()
        };
        let mut neighbour = build(&healthy);
        let mut works = || {
            post(&mut neighbour, 1);
            send(&mut neighbour, 2);
            let done = reap_n(&mut neighbour, 2);
            assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
        };
        works();

        let ends = |what: &str, script: Script, restart: bool| {
            stage(what);
            let interface = script.start();
            let mut ring = build(&interface);
            (0..3).for_each(|number| post(&mut ring, number));
            if restart {
                interface.restart(LONG).unwrap();
                reap_n(&mut ring, 3);
            }
            let panicked = Some(CloseReason::DevicePanicked);
            eventually(what, || ring.control().closed() == panicked);
            for done in reap_n(&mut ring, if restart { 0 } else { 3 }) {
                assert_eq!(done.result, Err(EntryError::DevicePanicked));
            }
            ring.close().expect("nothing is leaked");
            // The ring has left no claim behind, and `stop` does not wait for it.
            interface.stop(LONG).unwrap();
        };
        let calls = AtomicUsize::new(0);
        let script = Script::new(move |_, _| {
            second(&calls).then(panics);
            patient()
        });
        ends("queue, after a restart", script, true);
        works();
        let restarted = Arc::new(AtomicBool::new(false));
        let restarting = restarted.clone();
        let script = Script::new(|_, _| patient())
            .on_restart(move || restarting.store(true, Ordering::SeqCst))
            .limits(move |_| {
                restarted.load(Ordering::SeqCst).then(panics);
            });
        ends("capabilities, after a restart", script, true);
        works();
        let script = Script::new(|_, _| {
            let calls = AtomicUsize::new(0);
            let (socket, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
            patient().descriptor(socket.into(), move || {
                second(&calls).then(panics);
            })
        });
        ends("descriptor", script, false);
        works();
        let script =
            Script::new(|_, _| ScriptQueue::new(|_| std::panic::resume_unwind(Box::new(Twice))));
        ends("what a panic carries", script, false);
        works();

        stage("stop, when the last ring goes on its poller's thread");
        let script = Script::new(|_, _| {
            ScriptQueue::new(|io| {
                take_writes(io);
                Ok(Progress::Idle)
            })
        })
        .on_stop(panics);
        let stops = script.stops();
        let interface = script.start();
        let mut ring = build(&interface);
        drop(interface);
        let frame = ring.alloc().unwrap();
        let holder = Arc::new(Holder(Mutex::default()));
        let waker = Waker::from(holder.clone());
        assert!(ring.poll_ready(&mut Context::from_waker(&waker), 1).is_pending());
        let (mut sq, cq) = ring.into_split();
        *holder.0.lock().unwrap() = Some(cq);
        sq.submit_write(frame, 1).unwrap();
        drop(sq);
        eventually("it is stopped", || stops.load(Ordering::SeqCst) == 1);
        works();
    });
}

#[test]
fn a_device_that_fails_for_good_completes_everything_with_its_error_and_later_submits_say_so() {
    guarded(|| {
        every_way(|way, poller| {
            let faults = Faults::seeded(1).fail_after(3, Status::SharingServiceBusy);
            let interface =
                Interface::builder().device(faults.wrap(Loopback::new(1500))).start().unwrap();
            let mut ring =
                interface.ring(Direction::Both).depth(16).drive(way.drive(poller)).build().unwrap();
            (0..3).for_each(|number| send(&mut ring, number));
            assert!(reap_n(&mut ring, 3).iter().all(|done| done.result == Ok(60)));
            let frames: Vec<_> = (0..10).map(|number| (ring_frame(&ring), number)).collect();
            assert_eq!(ring.submit_reads(frames).unwrap(), 10);
            let failed = EntryError::Device(Status::SharingServiceBusy);
            for done in reap_n(&mut ring, 10) {
                assert_eq!(done.result, Err(failed));
                assert!(done.frame.is_some());
            }
            let closed = CloseReason::Failed(Status::SharingServiceBusy);
            assert_eq!(ring.control().closed(), Some(closed));
            let kind = ring.submit_write(ring_frame(&ring), 1).unwrap_err().kind;
            assert_eq!(kind, SubmitErrorKind::Closed(closed));
            ring.close().expect("nothing is leaked");
            assert_eq!(ring.control().closed(), Some(closed), "the first reason stays");
        });
    });
}

/// Goal: a restart keeps rings, frames and pools. Entries in flight complete as cancelled, and
/// entries submitted afterwards go to the new device.
#[test]
fn a_restart_of_the_interface_keeps_its_rings_alive() {
    guarded(|| {
        let poller = vmring::Poller::start().unwrap();
        for drive in [Drive::Thread, Drive::Shared(&poller)] {
            let embedded = quiet_network(unique("restart"));
            let embedded = Interface::builder().device(embedded).start().unwrap();
            for interface in [loopback(), embedded] {
                let mac = interface.mac();
                let mut ring = interface.ring(Direction::Both).drive(drive).build().unwrap();
                // After a restart the writer may be ready before the reader.
                let patient = RetryPolicy { attempts: 1_000_000, delay: Duration::from_micros(50) };
                let writer = interface.ring(Direction::Write).drive(drive).retry(patient);
                let mut writer = writer.build().unwrap();
                for round in 1..=3 {
                    stage(format!("{}: restart {round}", interface.device_name()));
                    (0..4).for_each(|number| post(&mut ring, number));
                    interface.restart(LONG).unwrap();
                    for done in reap_n(&mut ring, 4) {
                        assert_eq!(done.result, Err(EntryError::Cancelled));
                        assert!(done.frame.is_some());
                    }
                    assert_eq!((ring.control().closed(), interface.mac()), (None, mac));
                    send(&mut writer, round);
                    assert_eq!(reap_n(&mut writer, 1)[0].result, Ok(60));
                    if interface.device_name() == "loopback" {
                        // Read both packets: a packet left in the device would complete a read of
                        // the next round.
                        (50..52).for_each(|number| post(&mut ring, number));
                        send(&mut ring, 60);
                        let done = reap_n(&mut ring, 3);
                        assert!(done.iter().all(|done| done.result == Ok(60)), "{done:?}");
                    }
                    eventually("the restart is counted", || ring.stats().restarts == round);
                }
            }
        }
    });
}

/// Goal: before its first poll, a queue knows whether only a poller's thread will drive it. This
/// holds for the queue that a restart makes too. (A TAP's queue makes its io_uring for that
/// thread.)
#[test]
fn a_pollers_queue_is_bound_before_it_is_polled_and_an_owners_never() {
    guarded(|| {
        every_way(|way, poller| {
            // For each queue, the number of `bind_to_thread` calls before its first poll.
            let seen: Arc<Mutex<Vec<usize>>> = Arc::default();
            let told = seen.clone();
            let interface = Script::new(move |_, _| {
                let told = told.clone();
                let bound = Arc::new(AtomicUsize::new(0));
                let before = bound.clone();
                let mut polled = false;
                ScriptQueue::new(move |io| {
                    if !std::mem::replace(&mut polled, true) {
                        told.lock().unwrap().push(before.load(Ordering::SeqCst));
                    }
                    take_writes(io);
                    Ok(Progress::Idle)
                })
                .on_bind(move || {
                    bound.fetch_add(1, Ordering::SeqCst);
                })
            })
            .start();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            send(&mut ring, 1);
            assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(60));
            thread::scope(|scope| {
                let restarting = scope.spawn(|| interface.restart(LONG));
                eventually("the restart", || {
                    ring.reap().for_each(drop);
                    restarting.is_finished() && ring.stats().restarts == 1
                });
                restarting.join().unwrap().unwrap();
            });
            send(&mut ring, 2);
            assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(60));
            let times = usize::from(way != crate::support::Way::Inline);
            assert_eq!(*seen.lock().unwrap(), [times; 2], "{way:?}");
        });
    });
}

/// On an inline ring, the calls of its owner close the old queue and open the new one.
#[test]
fn a_restart_of_an_inline_ring_happens_when_its_owner_drives_it() {
    guarded(|| {
        let interface = Arc::new(loopback());
        let mut ring = inline(&interface, Direction::Both).build().unwrap();
        post(&mut ring, 1);
        ring.reap().for_each(drop);
        let restarting = {
            let interface = interface.clone();
            thread::spawn(move || interface.restart(LONG))
        };
        assert_eq!(reap_n(&mut ring, 1)[0].result, Err(EntryError::Cancelled));
        eventually("the restart", || {
            ring.reap().for_each(drop);
            restarting.is_finished() && ring.stats().restarts == 1
        });
        restarting.join().unwrap().unwrap();
        post(&mut ring, 2);
        send(&mut ring, 3);
        assert!(reap_n(&mut ring, 2).iter().all(|done| done.result == Ok(60)));
    });
}

/// A ring's own mapping is freed with the ring, so rings made in a loop do not accumulate memory.
#[test]
fn a_thousand_rings_leave_no_mapping_and_no_descriptor_behind() {
    guarded(|| {
        let descriptors =
            || std::fs::read_dir("/proc/self/fd").map(|entries| entries.count()).unwrap_or(0);
        let before = descriptors();
        let interface = loopback();
        for _ in 0..scaled(1000) {
            // Each maps 16 MiB that nothing touches. The test would notice a thousand of them.
            let mut ring =
                inline(&interface, Direction::Both).depth(4096).frames(8192).build().unwrap();
            ring.completion_fd().unwrap();
            post(&mut ring, 1);
        }
        assert!(PoolBuilder::new(8192, 1514).build().is_ok());
        // Other tests run at the same time and open a few descriptors.
        assert!(descriptors() < before + 500, "descriptors are left behind");
    });
}
