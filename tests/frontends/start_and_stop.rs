//! Starts, stops and restarts that are awaited: they block no executor and need no runtime.

use std::sync::mpsc;
use std::thread::ThreadId;

use vmring::device::Device;
use vmring::{Drive, Driver, InterfaceConfig, RingOp};

use super::*;
use crate::support::{post, reap_n, send};

/// A driver whose start waits until it is let through.
struct Slow {
    script: Script,
    gate: mpsc::Receiver<()>,
}

impl Driver for Slow {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let _ = self.gate.recv_timeout(LONG);
        Box::new(self.script).start(config)
    }
}

fn idle() -> Script {
    Script::new(|_, _| {
        ScriptQueue::new(|io| {
            take_writes(io);
            Ok(Progress::Idle)
        })
    })
}

fn slow(script: Script) -> (Slow, mpsc::Sender<()>) {
    let (open, gate) = mpsc::channel();
    (Slow { script, gate }, open)
}

/// Goal: a start, a restart and a stop are awaited on every executor, and the interface works between
/// them.
#[test]
fn an_interface_is_started_restarted_and_stopped_in_a_task() {
    guarded(|| {
        for executor in Executor::ALL {
            stage(format!("{executor:?}"));
            executor.run(vec![task(async move {
                let builder = Interface::builder().device(Loopback::new(1500));
                let interface = builder.start_async().await.expect("it starts");
                let ring = interface.ring(Direction::Both).build().expect("a ring");
                let front = AsyncRing::new(ring).expect("reads are posted");
                for number in 0..3 {
                    write(&front, &packet(number, 60)).await;
                    assert_eq!(number_of(&front.read().await.expect("a packet")), number);
                    interface.restart_async(LONG).await.expect("it restarts");
                }
                interface.stop_async(LONG).await.expect("it stops");
                assert!(is_closed(&front.read().await), "{executor:?}");
                interface.stop_async(LONG).await.expect("stopping twice is harmless");
                let refused = interface.restart_async(LONG).await;
                assert!(matches!(refused, Err(Error::Config(_))), "{refused:?}");
            })]);
        }
    });
}

/// Goal: a start blocks no executor. Method: on an executor with one thread, the driver's start waits
/// for something that another task does after it.
#[test]
fn a_start_that_waits_for_another_task_does_not_block_it() {
    guarded(|| {
        let (driver, open) = slow(idle());
        let waits = Arc::new(AtomicBool::new(false));
        let waiting = waits.clone();
        Executor::TokioOne.run(vec![
            task(async move {
                let mut start = Box::pin(Interface::builder().device(driver).start_async());
                let start = std::future::poll_fn(move |cx| {
                    waiting.store(true, Ordering::SeqCst);
                    start.as_mut().poll(cx)
                });
                start.await.expect("it starts");
            }),
            task(async move {
                while !waits.load(Ordering::SeqCst) {
                    Pause::default().await;
                }
                open.send(()).expect("the driver waits");
            }),
        ]);
    });
}

/// Goal: an awaited start ends with its timeout, also on an executor without timers, and with the
/// driver's own error or panic. A device that starts too late is stopped.
#[test]
fn an_awaited_start_that_fails_says_why() {
    struct Fails(bool);
    impl Driver for Fails {
        fn start(self: Box<Self>, _: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
            assert!(!self.0, "this driver panics, as it was told to");
            Err(Status::NotAuthorized.into())
        }
    }
    guarded(|| {
        let script = idle();
        let stops = script.stops();
        let (driver, open) = slow(script);
        let timeout = Duration::from_millis(20);
        let builder = Interface::builder().device(driver).start_timeout(timeout);
        let late = block_on(builder.start_async());
        assert!(matches!(late, Err(Error::StartTimeout(after)) if after == timeout), "{late:?}");
        open.send(()).expect("the driver waits");
        eventually("the late device is stopped", || stops.load(Ordering::SeqCst) == 1);
        let refused = block_on(Interface::builder().device(Fails(false)).start_async());
        assert!(matches!(refused, Err(Error::Status(Status::NotAuthorized))), "{refused:?}");
        let panicked = block_on(Interface::builder().device(Fails(true)).start_async());
        assert!(matches!(panicked, Err(Error::Io { .. })), "{panicked:?}");
    });
}

/// Goal: nothing happens before the first poll of a start, and one that is dropped later stops what it
/// has started, without blocking the thread that drops it. Method: the device's stop waits for that
/// thread.
#[test]
fn a_dropped_start_is_stopped_in_the_background() {
    guarded(|| {
        for finished in [false, true] {
            stage(format!("finished before the drop: {finished}"));
            let (let_stop, may_stop) = mpsc::channel();
            let may_stop = Mutex::new(may_stop);
            let stopped = Arc::new(AtomicBool::new(false));
            let stopping = stopped.clone();
            let script = idle().on_stop(move || {
                let _ = may_stop.lock().expect("no panic").recv_timeout(LONG);
                stopping.store(true, Ordering::SeqCst);
            });
            let stops = script.stops();
            let (driver, open) = slow(script);
            let mut start = Interface::builder().device(driver).start_async();
            let wakes = Arc::default();
            assert!(poll(&mut start, &wakes).is_pending());
            if finished {
                open.send(()).expect("the driver waits");
                eventually("the task is woken", || wakes.count() > 0);
                drop(start);
            } else {
                drop(start);
                open.send(()).expect("the driver waits");
            }
            // This thread goes on while the device has not stopped.
            assert!(!stopped.load(Ordering::SeqCst));
            let_stop.send(()).expect("the device stops, or will");
            eventually("the device is stopped", || stopped.load(Ordering::SeqCst));
            eventually("once", || stops.load(Ordering::SeqCst) == 1);
        }
        let script = idle();
        let stops = script.stops();
        drop(Interface::builder().device(script).start_async());
        assert_eq!(stops.load(Ordering::SeqCst), 0, "never started");
    });
}

/// Drives an inline ring in a task: reaps whenever the ring wakes it, until the ring is closed. Returns
/// what completed.
async fn drive(ring: &mut Ring) -> Vec<(RingOp, Result<usize, EntryError>)> {
    let mut seen = Vec::new();
    std::future::poll_fn(|cx| {
        loop {
            seen.extend(ring.reap().map(|done| (done.op, done.result)));
            if ring.control().closed().is_some() && ring.in_flight() == 0 {
                return Poll::Ready(());
            }
            if ring.poll_ready(cx, 1).is_pending() {
                return Poll::Pending;
            }
        }
    })
    .await;
    seen
}

/// Goal: a stop and a restart are awaited while another task of the same thread drives an inline ring,
/// and the device is stopped and restarted on neither of them. Method: one thread runs both tasks; the
/// device remembers which threads called it.
#[test]
fn a_stop_is_awaited_while_another_task_drives_an_inline_ring() {
    guarded(|| {
        for restarts in 0..2 {
            stage(format!("{restarts} restarts"));
            let threads = Arc::new(Mutex::new(Vec::<ThreadId>::new()));
            let (stop, restart) = (threads.clone(), threads.clone());
            let remember = |threads: &Mutex<Vec<ThreadId>>| {
                threads.lock().expect("no panic").push(thread::current().id());
            };
            let interface = idle()
                .on_stop(move || remember(&stop))
                .on_restart(move || remember(&restart))
                .start();
            let mut ring =
                interface.ring(Direction::Both).drive(Drive::Inline).build().expect("a ring");
            post(&mut ring, 1);
            let driver = Arc::new(Mutex::new(None));
            let driving = driver.clone();
            Executor::TokioOne.run(vec![
                task(async move {
                    *driving.lock().expect("no panic") = Some(thread::current().id());
                    let seen = drive(&mut ring).await;
                    assert_eq!(seen, [(RingOp::Read, Err(EntryError::Cancelled))]);
                }),
                task(async move {
                    for _ in 0..restarts {
                        interface.restart_async(LONG).await.expect("the other task drives");
                    }
                    interface.stop_async(LONG).await.expect("the other task drives");
                }),
            ]);
            let driver = driver.lock().expect("no panic").expect("it ran");
            let threads = threads.lock().expect("no panic").clone();
            assert_eq!(threads.len(), restarts + 1);
            assert!(!threads.contains(&driver), "the executor's thread stopped the device");
        }
    });
}

/// Goal: a device that takes long to stop holds up neither the poller that other rings share nor, if
/// the caller gives up, the stop itself. Method: the device's stop waits until a ring of another
/// interface on the same poller has moved a packet.
#[test]
fn a_slow_stop_holds_up_no_other_ring_of_the_poller() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        let (let_stop, may_stop) = mpsc::channel();
        let may_stop = Mutex::new(may_stop);
        let stopping = Arc::new(AtomicBool::new(false));
        let began = stopping.clone();
        let interface = idle()
            .on_stop(move || {
                began.store(true, Ordering::SeqCst);
                let _ = may_stop.lock().expect("no panic").recv_timeout(LONG);
            })
            .start();
        let shared = |interface: &Interface| {
            interface.ring(Direction::Both).drive(Drive::Shared(&poller)).build().expect("a ring")
        };
        let mut ring = shared(&interface);
        post(&mut ring, 1);
        let other = loopback();
        let mut other = shared(&other);
        let mut stop = interface.stop_async(LONG);
        let wakes = Arc::default();
        assert!(poll(&mut stop, &wakes).is_pending());
        eventually("the device is being stopped", || stopping.load(Ordering::SeqCst));
        post(&mut other, 1);
        send(&mut other, 2);
        assert_eq!(reap_n(&mut other, 2).len(), 2);
        let_stop.send(()).expect("the device waits");
        eventually("the task is woken", || wakes.count() > 0);
        block_on(stop).expect("it stops");
        assert_eq!(reap_n(&mut ring, 1)[0].result, Err(EntryError::Cancelled));
    });
}

/// Goal: a stop whose ring is not driven ends with a timeout, on an executor without timers. The device
/// stops when the ring is driven after all, although nobody waits any more. The same holds for a stop
/// whose future was dropped.
#[test]
fn a_stop_that_nobody_awaits_any_more_still_happens() {
    guarded(|| {
        for dropped in [false, true] {
            stage(format!("dropped: {dropped}"));
            let script = idle();
            let stops = script.stops();
            let interface = script.start();
            let mut ring =
                interface.ring(Direction::Both).drive(Drive::Inline).build().expect("a ring");
            post(&mut ring, 1);
            let timeout = Duration::from_millis(if dropped { 60_000 } else { 20 });
            let mut stop = interface.stop_async(timeout);
            assert!(poll(&mut stop, &Arc::default()).is_pending());
            if dropped {
                drop(stop);
            } else {
                let late = block_on(stop);
                assert!(
                    matches!(late, Err(Error::StopTimeout { timeout: after, .. }) if after == timeout),
                    "{late:?}"
                );
            }
            assert_eq!(stops.load(Ordering::SeqCst), 0, "the ring has its queue");
            eventually("the ring hears of it", || {
                ring.reap().for_each(drop);
                ring.control().closed().is_some()
            });
            eventually("the device is stopped", || stops.load(Ordering::SeqCst) == 1);
        }
        let script = idle();
        let stops = script.stops();
        let interface = script.start();
        drop(interface.stop_async(LONG));
        assert_eq!(stops.load(Ordering::SeqCst), 0, "it was never polled");
        interface.ring(Direction::Both).build().expect("the interface is not stopped");
    });
}

/// Goal: a restart that is asked for while the device is being stopped starts nothing again.
#[test]
fn a_restart_during_a_stop_comes_too_late() {
    guarded(|| {
        let (let_stop, may_stop) = mpsc::channel();
        let may_stop = Mutex::new(may_stop);
        let stopping = Arc::new(AtomicBool::new(false));
        let restarts = Arc::new(AtomicU64::new(0));
        let (began, restarted) = (stopping.clone(), restarts.clone());
        let interface = idle()
            .on_stop(move || {
                began.store(true, Ordering::SeqCst);
                let _ = may_stop.lock().expect("no panic").recv_timeout(LONG);
            })
            .on_restart(move || _ = restarted.fetch_add(1, Ordering::SeqCst))
            .start();
        let mut stop = interface.stop_async(LONG);
        assert!(poll(&mut stop, &Arc::default()).is_pending());
        eventually("the device is being stopped", || stopping.load(Ordering::SeqCst));
        let hasty = interface.restart(Duration::from_millis(20));
        assert!(matches!(hasty, Err(Error::StopTimeout { .. })), "{hasty:?}");
        let mut restart = interface.restart_async(LONG);
        assert!(poll(&mut restart, &Arc::default()).is_pending());
        let_stop.send(()).expect("the device waits");
        block_on(stop).expect("it stops");
        let late = block_on(restart);
        assert!(matches!(late, Err(Error::Config(_))), "{late:?}");
        assert_eq!(restarts.load(Ordering::SeqCst), 0, "a stopped device was started again");
    });
}

/// Goal: the waker of the last poll is the one that is woken, and one that panics does no harm.
#[test]
fn an_awaited_stop_wakes_the_last_waker_and_survives_a_panic() {
    struct Panics(AtomicBool);
    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
            panic!("this waker panics, as it was told to");
        }
    }
    guarded(|| {
        for panics in [false, true] {
            let (let_stop, may_stop) = mpsc::channel();
            let may_stop = Mutex::new(may_stop);
            let interface = idle()
                .on_stop(move || _ = may_stop.lock().expect("no panic").recv_timeout(LONG))
                .start();
            let mut stop = interface.stop_async(LONG);
            let (first, last) = (Arc::default(), Arc::default());
            let bad = Arc::new(Panics(AtomicBool::new(false)));
            assert!(poll(&mut stop, &first).is_pending());
            if panics {
                let waker = Waker::from(bad.clone());
                let mut cx = Context::from_waker(&waker);
                assert!(Pin::new(&mut stop).poll(&mut cx).is_pending());
            } else {
                assert!(poll(&mut stop, &last).is_pending());
            }
            let_stop.send(()).expect("the device waits");
            if panics {
                eventually("it was called", || bad.0.load(Ordering::SeqCst));
            } else {
                eventually("the last waker is woken", || last.count() == 1);
            }
            assert_eq!(first.count(), 0, "it was replaced");
            block_on(stop).expect("it stops");
        }
    });
}
