//! The blocking and the asynchronous front-end: every call gets its answer, also when the device
//! never gives one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use vmring::{
    AsyncRing, BlockingRing, Direction, Error, Interface, Poller, Ring, RingControl,
    SubmitErrorKind, block_on,
};

use super::{AtClose, Keeper, Running, ends, is_closed};
use crate::support::{LONG, Way, eventually, every_way, guarded, loopback, packet, stage};

/// A ring whose close is soon over, over a device that keeps every slot for ever.
fn lossy(at_close: AtClose, way: Way, poller: &Poller) -> (Ring, RingControl, Keeper, Interface) {
    let (interface, keeper) = Keeper::start(at_close);
    let builder = interface.ring(Direction::Both).depth(8);
    let builder = builder.close_timeout(Duration::from_millis(50)).drive(way.drive(poller));
    let ring = builder.build().expect("a ring");
    let control = ring.control();
    (ring, control, keeper, interface)
}

/// The ways that serve both front-ends.
const ON_A_POLLER: [Way; 2] = [Way::Thread, Way::Shared];

/// The two ways to lose a slot.
const LOSSES: [AtClose; 2] = [AtClose::Keeps, AtClose::Refuses];

/// Goal: a blocking write whose slot is lost answers "closed" once nothing can come any more, and
/// so do the calls after it.
#[test]
fn a_blocking_write_whose_slot_is_lost_says_closed() {
    guarded(|| {
        every_way(|way, poller| {
            for at_close in LOSSES {
                let (ring, control, keeper, _interface) = lossy(at_close, way, poller);
                let mut front = BlockingRing::new(ring).unwrap();
                let reads = front.ring().in_flight();
                let writing = Running::start(move || {
                    let answer = front.write(&packet(1, 60));
                    (front, answer)
                });
                eventually("the device keeps the write", || keeper.kept() == reads + 1);
                control.stop();
                let what = format!("{way:?}, {at_close:?}: a blocking write");
                let (mut front, answer) = writing.answer(&what);
                assert!(is_closed(&answer), "{way:?}, {at_close:?}: {answer:?}");
                let answers = ends("the calls on a closed ring", move || {
                    let alloc = front.alloc().and_then(|first| {
                        let rest: Vec<_> = std::iter::from_fn(|| front.ring().alloc()).collect();
                        let none = front.alloc();
                        drop((first, rest));
                        none
                    });
                    let read = front.read();
                    let timed = front.read_timeout(LONG);
                    [alloc.map(drop), read.map(drop), timed.map(drop), front.write(&[0; 60])]
                });
                assert!(answers.iter().all(is_closed), "{way:?}, {at_close:?}: {answers:?}");
            }
        });
    });
}

/// Goal: a blocking read answers "closed" when its slot is lost.
#[test]
fn a_blocking_read_whose_slot_is_lost_says_closed() {
    guarded(|| {
        every_way(|way, poller| {
            for at_close in LOSSES {
                let (ring, control, keeper, _interface) = lossy(at_close, way, poller);
                let mut front = BlockingRing::new(ring).unwrap();
                let reads = front.ring().in_flight();
                let reading = Running::start(move || front.read().map(drop));
                eventually("the device keeps the reads", || keeper.kept() == reads);
                control.stop();
                let answer = reading.answer(&format!("{way:?}, {at_close:?}: a blocking read"));
                assert!(is_closed(&answer), "{way:?}, {at_close:?}: {answer:?}");
            }
        });
    });
}

/// Goal: a write on a ring that only reads is refused at once. Method: every frame is posted, so a
/// write that first waits for a frame waits for ever.
#[test]
fn a_blocking_write_on_a_ring_that_reads_is_refused() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let builder = interface.ring(Direction::Read).depth(8).drive(way.drive(poller));
            let mut front = BlockingRing::new(builder.build().unwrap()).unwrap();
            let answer = ends("a write in the wrong direction", move || front.write(&[0; 60]));
            let refused = matches!(answer, Err(Error::Submit(SubmitErrorKind::WrongDirection)));
            assert!(refused, "{way:?}: {answer:?}");
        });
    });
}

/// Goal: when the caller holds every frame that is not posted for reading, `alloc` says so,
/// because no write in flight brings one back.
#[test]
fn a_blocking_alloc_that_nothing_can_serve_says_so() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let builder = interface.ring(Direction::Both).depth(8).drive(way.drive(poller));
            let mut front = BlockingRing::new(builder.build().unwrap()).unwrap();
            let front = ends("taking every frame", move || {
                let mut held = Vec::new();
                let error = loop {
                    match front.alloc() {
                        Ok(frame) => held.push(frame),
                        Err(error) => break error,
                    }
                };
                assert!(matches!(error, Error::OutOfFrames), "{error}");
                let error = front.write(&[0; 60]).unwrap_err();
                assert!(matches!(error, Error::OutOfFrames), "{error}");
                drop(held);
                front
            });
            let mut front = front;
            let bytes = ends("a write and a read afterwards", move || {
                front.write(&packet(1, 60)).unwrap();
                front.read().unwrap().to_vec()
            });
            assert_eq!(bytes, packet(1, 60));
        });
    });
}

/// Goal: an async write whose slot is lost answers "closed", and so does a read.
#[test]
fn async_calls_whose_slots_are_lost_say_closed() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        for way in ON_A_POLLER {
            for at_close in LOSSES {
                let (ring, control, keeper, _interface) = lossy(at_close, way, &poller);
                let reads = {
                    let front = AsyncRing::new(ring).unwrap();
                    let writer = front.clone();
                    let bytes = packet(1, 60);
                    let writing = Running::start(move || block_on(writer.write(&bytes)));
                    let reading = Running::start(move || block_on(front.read()).map(drop));
                    eventually("the device keeps the write", || {
                        keeper.0.slots.lock().unwrap().iter().any(|slot| !slot.is_read())
                    });
                    control.stop();
                    [writing, reading]
                };
                for (call, what) in reads.into_iter().zip(["write", "read"]) {
                    let answer = call.answer(&format!("{way:?}, {at_close:?}: an async {what}"));
                    assert!(is_closed(&answer), "{way:?}, {at_close:?}: {what}: {answer:?}");
                }
            }
        }
    });
}

/// Goal: one poll of a future returns, also on a ring that was closed with slots lost. Method: the
/// close times out, so the ring's engine keeps being told of its device, and nothing comes.
#[test]
fn one_poll_of_a_future_returns() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        for way in ON_A_POLLER {
            for at_close in LOSSES {
                let (ring, control, keeper, _interface) = lossy(at_close, way, &poller);
                let front = AsyncRing::new(ring).unwrap();
                let bytes: &'static [u8] = Box::leak(packet(1, 60).into_boxed_slice());
                let mut write = Box::pin(front.write(bytes));
                let mut cx = Context::from_waker(Waker::noop());
                assert!(write.as_mut().poll(&mut cx).is_pending());
                eventually("the device keeps the write", || {
                    keeper.0.slots.lock().unwrap().iter().any(|slot| !slot.is_read())
                });
                control.stop();
                eventually("the ring is closed", || control.closed().is_some());
                // Past the close timeout, nobody drives the ring but the futures.
                std::thread::sleep(Duration::from_millis(150));
                keeper.wake();
                let what = format!("{way:?}, {at_close:?}: one poll of a write");
                let write = ends(&what, move || {
                    let mut cx = Context::from_waker(Waker::noop());
                    let _ = write.as_mut().poll(&mut cx);
                    write
                });
                let read = ends("another task's read", {
                    let front = front.clone();
                    move || block_on(front.read()).map(drop)
                });
                assert!(is_closed(&read), "{way:?}, {at_close:?}: {read:?}");
                ends("the write's drop", move || drop(write));
            }
        }
    });
}

/// Goal: an async write on a ring that only reads is refused as such.
#[test]
fn an_async_write_on_a_ring_that_reads_is_refused() {
    guarded(|| {
        let interface = loopback();
        let ring = interface.ring(Direction::Read).depth(8).build().unwrap();
        let front = AsyncRing::new(ring).unwrap();
        let answer =
            ends("a write in the wrong direction", move || block_on(front.write(&[0; 60])));
        let refused = matches!(answer, Err(Error::Submit(SubmitErrorKind::WrongDirection)));
        assert!(refused, "{answer:?}");
    });
}

/// Calls a function when it is woken, and counts the times.
struct OnWake(AtomicU64, Box<dyn Fn() + Send + Sync>);

impl OnWake {
    fn new(f: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(0), Box::new(f)))
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl Wake for OnWake {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
        (self.1)();
    }
}

/// Goal: a waker that panics takes no other task's wake-up with it, and its panic comes out of
/// nobody else's poll. Method: two of four readers have such a waker, which are called before,
/// between and after the good ones, and another task writes.
#[test]
fn a_waker_that_panics_keeps_nobody_asleep() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        for way in ON_A_POLLER {
            let interface = loopback();
            let builder = interface.ring(Direction::Both).depth(8).drive(way.drive(&poller));
            let front = AsyncRing::new(builder.build().unwrap()).unwrap();
            let mut reads: Vec<_> = (0..4).map(|_| Box::pin(front.read())).collect();
            let wakers: Vec<_> = (0..4)
                .map(|i| {
                    OnWake::new(move || assert!(i % 2 == 1, "this waker panics, as it was told to"))
                })
                .collect();
            for (read, waker) in reads.iter_mut().zip(&wakers) {
                let waker = Waker::from(waker.clone());
                assert!(read.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            }
            let writer = front.clone();
            let writing = Running::start(move || {
                let bytes = packet(1, 60);
                let write = AssertUnwindSafe(|| block_on(writer.write(&bytes)));
                catch_unwind(write).map_err(|_| "a stranger's panic")
            });
            let answer = writing.answer(&format!("{way:?}: the write of another task"));
            answer.expect("its own panics only").expect("the packet is sent");
            for waker in &wakers {
                eventually(&format!("{way:?}: every reader is woken"), || waker.count() > 0);
            }
            // Those that are woken read.
            let mut cx = Context::from_waker(Waker::noop());
            let read = reads.iter_mut().map(|read| read.as_mut().poll(&mut cx).is_ready());
            assert_eq!(read.filter(|ready| *ready).count(), 1);
            drop(reads);
            // The ring goes on.
            let bytes = ends("a write and a read afterwards", move || {
                block_on(front.write(&packet(2, 60))).unwrap();
                block_on(front.read()).unwrap().to_vec()
            });
            assert_eq!(bytes, packet(2, 60));
        }
    });
}

/// Goal: a waker may own anything, also another future of the same front-end. Method: a poll with
/// another waker drops the first one, and with it a read and a write that were sent.
#[test]
fn a_waker_that_owns_futures_may_be_replaced() {
    guarded(|| {
        let (interface, _keeper) = Keeper::start(AtClose::Cancels);
        let front = AsyncRing::new(interface.ring(Direction::Both).depth(8).build().unwrap());
        let front = front.unwrap();
        let gone = Arc::new(AtomicBool::new(false));
        let dropped = gone.clone();
        ends("a poll that drops a waker that owns futures", move || {
            struct SetsOnDrop(Arc<AtomicBool>);
            impl Drop for SetsOnDrop {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::SeqCst);
                }
            }
            let mut cx = Context::from_waker(Waker::noop());
            let mut write = Box::pin(front.write(&[0; 60]));
            assert!(write.as_mut().poll(&mut cx).is_pending());
            let mut other = Box::pin(front.read());
            assert!(other.as_mut().poll(&mut cx).is_pending());
            let owned = Mutex::new((write, other, SetsOnDrop(dropped)));
            let owner = OnWake::new(move || drop(owned.lock()));
            let mut read = pin!(front.read());
            let waker = Waker::from(owner);
            assert!(read.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            // The front-end's is the last one.
            drop(waker);
            assert!(read.as_mut().poll(&mut cx).is_pending());
        });
        assert!(gone.load(Ordering::SeqCst), "the old waker is kept");
        stage("the end");
    });
}
