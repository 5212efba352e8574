//! Waking and sleeping: what wakes a waiting ring, how the descriptor and the wakers behave, and
//! that no wake-up or processor time is spent without need.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::Progress;
use vmring::{CloseReason, Direction, EntryError, IdlePolicy, Ring, RingOp, SubmitErrorKind};

use crate::support::{
    LONG, Script, ScriptQueue, Way, eventually, every_way, filled, guarded, inline, loopback,
    packet, post, reap, reap_n, scaled, send, stage, take_writes,
};

/// Whether the ring's descriptor becomes readable within `timeout`.
pub(crate) fn readable(ring: &Ring, timeout: Duration) -> bool {
    let fd = ring.completion_fd().expect("a descriptor").as_raw_fd();
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: the pointer is to one `pollfd`, which is exclusively borrowed.
    unsafe { libc::poll(&mut poll, 1, timeout.as_millis() as i32) == 1 }
}

const NOW: Duration = Duration::ZERO;

#[test]
fn a_control_handle_wakes_a_blocked_wait() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            post(&mut ring, 1);
            let control = ring.control();
            for _ in 0..scaled(50) {
                let control = control.clone();
                let waking = thread::spawn(move || control.wake());
                // The wait ends whether the wake comes before or during it.
                assert_eq!(ring.wait(1, None), 0);
                waking.join().unwrap();
            }
            // The wake is used up, so the next wait sleeps until its timeout.
            let start = Instant::now();
            assert_eq!(ring.wait(1, Some(Duration::from_millis(20))), 0);
            assert!(start.elapsed() >= Duration::from_millis(20), "a wake was used twice");
        });
    });
}

/// `wake` reaches an event loop that never calls `wait` through its descriptor, and only once.
#[test]
fn a_control_handle_wakes_an_armed_descriptor_once() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            ring.completion_fd().unwrap();
            post(&mut ring, 1);
            assert!(ring.arm());
            ring.control().wake();
            assert!(readable(&ring, LONG));
            // `arm` may return false once more, but not for ever.
            let again = (0..10).filter(|_| !ring.arm()).count();
            assert!(again <= 1, "{again} of 10 calls said that there is something to reap");
            let waker = Waker::from(Arc::new(Count::default()));
            ring.control().wake();
            let mut cx = Context::from_waker(&waker);
            let again = (0..10).filter(|_| ring.poll_ready(&mut cx, 1).is_ready()).count();
            assert!(again <= 1, "{again} of 10 polls were ready with nothing there");
        });
    });
}

/// Goal: `submit_and_wait` submits reads and writes with one doorbell, and waits. Method: the engine
/// sleeps, and the iterator of writes sees that nothing has been rung for the reads.
#[test]
fn submit_and_wait_rings_once() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).depth(4).drive(way.drive(poller)).build().unwrap();
            let control = ring.control();
            let mut rounds = 0;
            eventually("the engine sleeps before a submission", || {
                // Time for the engine to go to sleep.
                thread::sleep(Duration::from_millis(2));
                let bells = control.doorbells();
                let reads: Vec<_> = (0..2).map(|i| (ring.alloc().unwrap(), i)).collect();
                let writes: Vec<_> = (2..4).map(|i| (filled(&ring, i), i)).collect();
                let writes = writes.into_iter().inspect(|_| assert_eq!(control.doorbells(), bells));
                assert_eq!(ring.submit_and_wait(reads, writes, 4, Some(LONG)).unwrap(), 4);
                assert!(reap_n(&mut ring, 4).iter().all(|done| done.result == Ok(60)));
                rounds += 1;
                rounds >= scaled(20) && (way == Way::Inline || control.doorbells() > 0)
            });
            if way == Way::Inline {
                assert_eq!(control.doorbells(), 0, "nobody sleeps while its owner submits");
            }
            // It takes no more than there are credits, and a timeout ends the wait.
            let frames: Vec<_> = std::iter::from_fn(|| ring.alloc()).take(6).collect();
            let mut reads = frames.into_iter().zip(0..);
            let ready = ring.submit_and_wait(&mut reads, [], 1, Some(Duration::from_millis(1)));
            assert_eq!((ready.unwrap(), ring.in_flight(), reads.count()), (0, 4, 2));
        });
    });
}

/// Goal: a refusal in `submit_and_wait` says how many entries are in flight, and does not wait.
#[test]
fn submit_and_wait_counts_what_came_before_a_refusal() {
    guarded(|| {
        let (interface, other) = (loopback(), loopback());
        let mut ring = inline(&interface, Direction::Both).depth(4).build().unwrap();
        let foreign = inline(&other, Direction::Both).depth(4).build().unwrap();
        let reads: Vec<_> = (0..2).map(|i| (ring.alloc().unwrap(), i)).collect();
        let writes = [(filled(&ring, 2), 2), (filled(&foreign, 3), 3)];
        let refused = ring.submit_and_wait(reads, writes, 4, None).unwrap_err();
        assert_eq!((refused.kind, refused.accepted), (SubmitErrorKind::ForeignPool, 3));
        assert_eq!(ring.in_flight(), 3);
    });
}

/// A ring gives its descriptor to whoever takes `AsFd` or `AsRawFd`: an epoll, tokio's `AsyncFd`.
#[test]
fn a_ring_is_its_descriptor() {
    guarded(|| {
        let interface = loopback();
        let ring = interface.ring(Direction::Both).build().unwrap();
        let fd = ring.completion_fd().unwrap().as_raw_fd();
        assert_eq!((ring.as_fd().as_raw_fd(), ring.as_raw_fd()), (fd, fd));
        let (_sq, cq) = ring.into_split();
        assert_eq!((cq.as_fd().as_raw_fd(), cq.as_raw_fd()), (fd, fd));
    });
}

#[test]
fn a_control_handle_stops_a_ring_from_anywhere() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            (0..8).for_each(|number| post(&mut ring, number));
            let control = ring.control();
            let stopping = thread::spawn({
                let control = control.clone();
                move || control.stop()
            });
            // The wait ends when everything has completed.
            assert_eq!(ring.wait(8, None), 8);
            stopping.join().unwrap();
            assert_eq!(control.closed(), Some(CloseReason::Stopped));
            for done in reap(&mut ring) {
                assert_eq!(done.result, Err(EntryError::Cancelled));
            }
            let frame = ring.alloc().unwrap();
            let kind = ring.submit_read(frame, 1).unwrap_err().kind;
            assert_eq!(kind, SubmitErrorKind::Closed(CloseReason::Stopped));
            drop(ring);
            // A control handle may outlive its ring.
            control.wake();
            control.stop();
            control.cancel_all();
            assert_eq!(control.stats().cancelled, 8);
        });
    });
}

#[test]
fn wait_returns_early_when_fewer_are_in_flight() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            assert_eq!(ring.wait(1, None), 0, "nothing is in flight");
            assert_eq!(ring.wait(0, None), 0);
            (0..3).for_each(|number| send(&mut ring, number));
            assert_eq!(ring.wait(100, None), 3, "three are in flight");
            assert_eq!(ring.wait(usize::MAX, None), 3);
            assert_eq!(reap(&mut ring).len(), 3);
            post(&mut ring, 1);
            post(&mut ring, 2);
            send(&mut ring, 3);
            // Two packets complete the two reads, because the first packet was sent before they
            // were posted.
            assert_eq!(ring.wait(100, None), 3);
        });
    });
}

#[test]
fn wait_ends_at_its_timeout() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            post(&mut ring, 1);
            let start = Instant::now();
            assert_eq!(ring.wait(1, Some(Duration::from_millis(5))), 0);
            assert!(start.elapsed() >= Duration::from_millis(5));
            assert_eq!(ring.wait(1, Some(NOW)), 0);
            // A time that no clock can hold means for ever, and does not panic.
            send(&mut ring, 2);
            assert_eq!(ring.wait(2, Some(Duration::MAX)), 2);
        });
    });
}

#[test]
fn completion_fd_signals_once_per_arm() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            let mut writer = inline(&interface, Direction::Write).build().unwrap();
            let mut arrive = |number| {
                send(&mut writer, number);
                assert_eq!(reap_n(&mut writer, 1)[0].result, Ok(60));
            };
            (0..8).for_each(|number| post(&mut ring, number));
            assert!(!readable(&ring, NOW));
            for round in 0..3 {
                stage(format!("{way:?}: round {round}"));
                assert!(ring.arm());
                assert!(!readable(&ring, NOW));
                arrive(round);
                assert!(readable(&ring, LONG));
                assert_eq!(reap_n(&mut ring, 1).len(), 1);
                // Armed again, the descriptor is not readable: its one signal was for the first
                // packet.
                assert!(ring.arm());
                assert!(!readable(&ring, NOW));
                // Two packets come after one arming. One loop over `reap` sees both.
                arrive(10);
                arrive(11);
                assert!(readable(&ring, LONG));
                // Reap without `wait`, which would arm if the second one has not come yet.
                let mut reaped = 0;
                eventually("both have come", || {
                    reaped += reap(&mut ring).len();
                    reaped == 2
                });
                (0..3).for_each(|number| post(&mut ring, number));
            }
            // Without arming there is no signal.
            let before = ring.stats().rx_packets;
            assert!(ring.arm());
            arrive(20);
            assert!(readable(&ring, LONG));
            let fd = ring.completion_fd().unwrap().as_raw_fd();
            let mut bytes = [0_u8; 64];
            // SAFETY: pointer and length are those of a live array, which is exclusively borrowed.
            let n = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) };
            assert_eq!(n, 8);
            if cfg!(target_os = "linux") {
                assert_eq!(u64::from_ne_bytes(bytes[..8].try_into().unwrap()), 1, "one signal");
            }
            // Reap without `wait`, because `wait` would arm before it sleeps. A signal is counted
            // after it is given, so the first packet's signal is counted when the second packet has
            // come.
            let mut reaped = 0;
            let mut notifications = None;
            for number in 1..=4 {
                if number > 1 {
                    arrive(20 + number);
                }
                eventually("one more packet has come", || {
                    reaped += reap(&mut ring).len() as u64;
                    reaped == number
                });
                assert_eq!(ring.stats().rx_packets, before + number);
                if number == 2 {
                    notifications = Some(ring.stats().notifications);
                }
            }
            assert!(!readable(&ring, NOW), "signalled without being armed");
            assert_eq!(Some(ring.stats().notifications), notifications);
            assert_eq!(fd, ring.completion_fd().unwrap().as_raw_fd(), "always the same");
        });
    });
}

/// Goal: the owner of an inline ring may arm its descriptor, submit, and only then sleep.
#[test]
fn what_an_inline_ring_submits_after_arming_signals() {
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).build().unwrap();
        assert!(!readable(&ring, NOW));
        post(&mut ring, 1);
        assert!(ring.arm());
        assert!(!readable(&ring, NOW));
        send(&mut ring, 2);
        assert!(readable(&ring, NOW));
        assert_eq!(reap_n(&mut ring, 2).len(), 2);
        // The same holds for a submit in a loop over completions.
        post(&mut ring, 3);
        send(&mut ring, 4);
        assert!(!ring.arm());
        let (mut sq, mut cq) = ring.split();
        for done in cq.reap() {
            sq.submit_read(done.take_packet().unwrap(), 5).unwrap();
        }
        assert!(ring.arm());
        let mut frame = ring.alloc().unwrap();
        frame.copy_from(&packet(6, 60)).unwrap();
        let (mut sq, _) = ring.split();
        sq.submit_write(frame, 6).unwrap();
        assert!(readable(&ring, NOW));
    });
}

/// Goal: an owner that was woken by its device's descriptor, and has reaped, is awake: what it submits
/// gives no signal. A wake is not lost for it: the next arming says that there is work.
#[test]
fn an_owner_that_has_reaped_signals_itself_no_more() {
    guarded(|| {
        let (watched, other) = UnixStream::pair().expect("a socket pair");
        watched.set_nonblocking(true).unwrap();
        let watched = Arc::new(watched);
        let interface = Script::new(move |_, _| {
            let (watched, of_queue) = (watched.clone(), watched.try_clone().unwrap());
            ScriptQueue::new(move |io| {
                // One packet of no bytes for each byte.
                while io.reads() > 0
                    && (&*watched).read(&mut [0]).is_ok_and(|count| count == 1)
                    && let Some(slot) = io.take_read()
                {
                    io.complete_read(slot, 0);
                }
                take_writes(io);
                Ok(Progress::Idle)
            })
            .descriptor(of_queue.into(), || ())
        });
        let interface = interface.start();
        let mut ring = inline(&interface, Direction::Both).build().unwrap();
        ring.completion_fd().unwrap();
        (0..4).for_each(|number| post(&mut ring, number));
        let (control, bells) = (ring.control(), ring.control().doorbells());
        for round in 0..3 {
            stage(format!("round {round}"));
            eventually("the ring is armed", || {
                reap(&mut ring);
                ring.arm()
            });
            assert!(!readable(&ring, NOW));
            (&other).write_all(&[1]).unwrap();
            assert!(readable(&ring, LONG));
            let mut reaped = 0;
            eventually("the packet is there", || {
                reaped += reap(&mut ring).iter().filter(|done| done.op == RingOp::Read).count();
                reaped == 1
            });
            post(&mut ring, 9);
            send(&mut ring, 10);
            assert!(!readable(&ring, NOW), "the owner has woken itself");
            assert_eq!(control.doorbells(), bells, "the owner has rung for itself");
            // What was submitted is not forgotten.
            assert!(!ring.arm(), "there is work");
        }
        eventually("the ring is armed", || {
            reap(&mut ring);
            ring.arm()
        });
        control.wake();
        assert!(readable(&ring, LONG), "a control handle wakes an owner that is armed");
    });
}

/// Goal: the submitting half of an inline ring, on a thread of its own, always wakes the reaping
/// half, which drives the ring.
#[test]
fn a_submission_from_another_thread_wakes_who_drives_the_ring() {
    guarded(|| {
        let interface = Script::new(|_, _| {
            ScriptQueue::new(|io| {
                while let Some(slot) = io.take_write() {
                    io.complete_write(slot);
                }
                Ok(Progress::Idle)
            })
        });
        let interface = interface.start();
        let mut ring = inline(&interface, Direction::Both).idle(IdlePolicy::PARK).build().unwrap();
        // No packet fills this read, so the reaping half always has something to wait for.
        post(&mut ring, 0);
        let (mut sq, mut cq) = ring.into_split();
        let count = scaled(20_000);
        let reaped = Arc::new(AtomicU64::new(0));
        let told = reaped.clone();
        let reaping = thread::spawn(move || {
            for number in 0..count {
                assert_eq!(cq.wait(1, Some(LONG)), 1, "packet {number} woke nobody");
                cq.reap().for_each(drop);
                told.store(number + 1, Ordering::Relaxed);
            }
        });
        for number in 0..count {
            let mut frame = sq.alloc().unwrap();
            frame.copy_from(&packet(number, 60)).unwrap();
            sq.submit_write(frame, number).unwrap();
            // Spin, so that the next submit comes just when the other half falls asleep.
            let mut turns = 0;
            while reaped.load(Ordering::Relaxed) <= number && !reaping.is_finished() {
                turns += 1;
                if turns % 1000 == 0 {
                    thread::yield_now();
                }
            }
        }
        reaping.join().unwrap();
    });
}

#[test]
fn arm_rechecks_after_its_fence() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            ring.completion_fd().unwrap();
            send(&mut ring, 1);
            ring.wait(1, None);
            for _ in 0..3 {
                assert!(!ring.arm(), "a completion waits");
            }
            reap_n(&mut ring, 1);
            // The race: whenever a packet comes, either `arm` sees it or the descriptor signals it.
            let patient =
                vmring::RetryPolicy { attempts: u32::MAX, delay: Duration::from_micros(50) };
            let mut writer = interface.ring(Direction::Write).retry(patient).build().unwrap();
            let count = scaled(300);
            let writing = thread::spawn(move || {
                for number in 0..count {
                    send(&mut writer, number);
                    assert_eq!(reap_n(&mut writer, 1)[0].result, Ok(60));
                }
            });
            (0..64).for_each(|number| post(&mut ring, number));
            // One more for the packet that was written above.
            let mut left = count + 1;
            while left > 0 {
                stage(format!("{way:?}: {left} packets left"));
                if ring.arm() {
                    assert!(readable(&ring, LONG), "the wake-up was lost");
                }
                let (mut sq, mut cq) = ring.split();
                for done in cq.reap() {
                    sq.submit_read(done.take_packet().unwrap(), 0).unwrap();
                    left -= 1;
                }
            }
            writing.join().unwrap();
        });
    });
}

/// Goal: `arm_after` coalesces. Method: the n-th completion signals. With fewer, the delay does,
/// counted from the first completion. This does not apply to inline rings: while the owner sleeps,
/// nothing counts completions for it.
#[test]
fn arm_after_coalesces() {
    guarded(|| {
        every_way(|way, poller| {
            if way == Way::Inline {
                return;
            }
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            ring.completion_fd().unwrap();
            let mut writer = inline(&interface, Direction::Write).build().unwrap();
            let mut arrive = |number| {
                send(&mut writer, number);
                assert_eq!(reap_n(&mut writer, 1)[0].result, Ok(60));
            };
            (0..64).for_each(|number| post(&mut ring, number));

            stage(format!("{way:?}: by number"));
            let hour = Duration::from_secs(3600);
            assert!(ring.arm_after(4, Some(hour)));
            (0..3).for_each(&mut arrive);
            eventually("three packets have come", || ring.stats().rx_packets == 3);
            assert!(!readable(&ring, Duration::from_millis(20)), "three are not four");
            arrive(3);
            assert!(readable(&ring, LONG));
            assert_eq!(reap_n(&mut ring, 4).len(), 4);
            // `arm_after` returns `Ready` if enough completions are there already.
            (0..2).for_each(&mut arrive);
            // Nothing is armed meanwhile, which could signal late.
            eventually("two more have come", || ring.split().1.ready() == 2);
            assert!(!ring.arm_after(2, Some(hour)));
            assert!(ring.arm_after(3, None));
            assert!(!readable(&ring, Duration::from_millis(20)), "without a delay, none");
            arrive(2);
            assert!(readable(&ring, LONG));
            assert_eq!(reap_n(&mut ring, 3).len(), 3);

            stage(format!("{way:?}: by time"));
            let delay = Duration::from_millis(30);
            assert!(ring.arm_after(50, Some(delay)));
            assert!(!readable(&ring, delay * 2), "the clock starts with the first completion");
            let start = Instant::now();
            arrive(10);
            assert!(readable(&ring, LONG));
            assert!(start.elapsed() >= delay);
            assert_eq!(reap_n(&mut ring, 1).len(), 1);

            // Goal: each arming has a clock of its own. Method: start the first one's clock and
            // leave it running.
            stage(format!("{way:?}: by time, after one whose time has not come"));
            assert!(ring.arm_after(50, Some(hour)));
            arrive(20);
            eventually("it has come", || ring.stats().rx_packets == 9);
            assert!(!readable(&ring, Duration::from_millis(20)), "an hour is not over");
            assert_eq!(reap_n(&mut ring, 1).len(), 1);
            assert!(ring.arm_after(50, Some(delay)));
            arrive(21);
            assert!(readable(&ring, LONG), "it waits for the first arming's hour");
            assert_eq!(reap_n(&mut ring, 1).len(), 1);

            stage(format!("{way:?}: by time, with one there already"));
            arrive(11);
            eventually("it has come", || ring.stats().rx_packets == 11);
            assert!(ring.arm_after(50, Some(delay)));
            assert!(readable(&ring, LONG));
            assert_eq!(reap_n(&mut ring, 1).len(), 1);
        });
    });
}

#[derive(Default)]
struct Count(AtomicU64);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// One notifier serves the parked thread, the descriptor and the waker.
#[test]
fn a_waker_is_woken_once_when_enough_is_there() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            let mut writer = inline(&interface, Direction::Write).build().unwrap();
            (0..8).for_each(|number| post(&mut ring, number));
            let count = Arc::new(Count::default());
            let waker = Waker::from(count.clone());
            let mut cx = Context::from_waker(&waker);
            assert_eq!(ring.poll_ready(&mut cx, 1), Poll::Pending);
            send(&mut writer, 1);
            reap_n(&mut writer, 1);
            eventually("the waker is woken", || count.0.load(Ordering::SeqCst) == 1);
            eventually("it is ready", || ring.poll_ready(&mut cx, 1) == Poll::Ready(1));
            assert_eq!(reap_n(&mut ring, 1)[0].op, RingOp::Read);
        });
    });
}

/// Goal: while the poller is awake, submitting costs no wake-up. While the reaping side is awake,
/// completing costs none. Method: a device whose call lasts until the test ends it keeps the poller
/// awake. A reaping side that never sleeps must never be notified.
#[test]
fn no_doorbell_while_the_other_side_is_awake() {
    guarded(|| {
        let (inside, release) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (enter, go) = (inside.clone(), release.clone());
        let interface = Script::new(move |_, _| {
            let (enter, go) = (enter.clone(), go.clone());
            ScriptQueue::new(move |io| {
                enter.store(true, Ordering::SeqCst);
                while !go.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                take_writes(io);
                Ok(Progress::Idle)
            })
        })
        .start();
        let mut ring = interface.ring(Direction::Write).idle(IdlePolicy::PARK).build().unwrap();
        let control = ring.control();
        eventually("the poller sleeps", || control.stats().parks == 1);
        assert_eq!(control.doorbells(), 0);
        send(&mut ring, 0);
        assert_eq!(control.doorbells(), 1, "it slept");
        eventually("the device is in its call", || inside.load(Ordering::SeqCst));
        (1..100).for_each(|number| send(&mut ring, number));
        assert_eq!(control.doorbells(), 1, "it is awake");
        release.store(true, Ordering::SeqCst);
        let mut reaped = 0;
        eventually("everything completes", || {
            reaped += reap(&mut ring).len();
            reaped == 100
        });
        assert_eq!(ring.stats().notifications, 0, "this side never slept");
        eventually("the poller sleeps again", || control.stats().parks == 2);
        // A batch rings the doorbell at most once.
        let frames: Vec<_> = (0..50).map(|n| (crate::support::filled(&ring, n), n)).collect();
        ring.submit_writes(frames).unwrap();
        assert_eq!(control.doorbells(), 2);
        reap_n(&mut ring, 50);
        // On an inline ring there is no thread to wake.
        let mut own = inline(&interface, Direction::Write).build().unwrap();
        (0..100).for_each(|number| send(&mut own, number));
        assert_eq!(reap_n(&mut own, 100).len(), 100);
        assert_eq!((own.control().doorbells(), own.stats().notifications), (0, 0));
    });
}

/// Goal: for all entries that borrowed halves submit while reaping, the doorbell is rung once, when
/// the loop ends. At any other time they ring at once. If a loop is forgotten or left by a panic,
/// the poller is still woken.
#[test]
fn borrowed_halves_ring_once_a_loop() {
    guarded(|| {
        let interface = loopback();
        let mut ring = interface.ring(Direction::Both).idle(IdlePolicy::PARK).build().unwrap();
        let control = ring.control();
        let mut parks = 0;
        let mut sleeps = || {
            eventually("the poller sleeps", || control.stats().parks > parks);
            parks = control.stats().parks;
            control.doorbells()
        };
        let before = sleeps();
        // One doorbell, so that the poller sleeps once afterwards, and not in between too.
        let reads: Vec<_> = (0..8).map(|n| (ring.alloc().unwrap(), n)).collect();
        let writes: Vec<_> = (8..16).map(|n| (filled(&ring, n), n)).collect();
        assert_eq!(ring.submit_and_wait(reads, writes, 16, Some(LONG)).unwrap(), 16);
        let rung = sleeps();
        assert!(rung > before);

        let (mut sq, mut cq) = ring.split();
        let mut frames = Vec::new();
        for done in cq.reap() {
            match done.op {
                RingOp::Read => frames.push(done.take_packet().unwrap()),
                _ => sq.submit_write(done.take_packet().unwrap(), done.user_data).unwrap(),
            }
            assert_eq!(control.doorbells(), rung, "rung before the loop's end");
        }
        assert_eq!(control.doorbells(), rung + 1, "eight writes, one doorbell");
        let rung = sleeps();
        // Outside a loop over `reap`, the doorbell is rung at once.
        sq.submit_read(frames.pop().unwrap(), 1).unwrap();
        assert_eq!(control.doorbells(), rung + 1);
        eventually("a packet that waited arrives", || cq.ready() > 0);

        // If a panic leaves the loop, the doorbell is rung while unwinding.
        let rung = sleeps();
        let left = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for done in cq.reap() {
                if done.op == RingOp::Read {
                    sq.submit_read(frames.pop().unwrap(), 2).unwrap();
                    panic!("on purpose");
                }
            }
        }));
        assert!(left.is_err());
        assert_eq!(control.doorbells(), rung + 1);

        let mut seen = Vec::new();
        eventually("what it had submitted is done", || {
            seen.extend(cq.reap().map(|done| (done.op, done.user_data)));
            seen.contains(&(RingOp::Read, 2))
        });

        // If the loop is forgotten, the next `split` rings the doorbell.
        let rung = sleeps();
        std::mem::forget(cq.reap());
        sq.submit_read(frames.pop().unwrap(), 3).unwrap();
        assert_eq!(control.doorbells(), rung);
        let _ = ring.split();
        assert_eq!(control.doorbells(), rung + 1);
        eventually("what the forgotten one had submitted is done", || {
            seen.extend(ring.reap().map(|done| (done.op, done.user_data)));
            seen.contains(&(RingOp::Read, 3))
        });
    });
}

/// User and system time that thread `name` of this process has used.
#[cfg(target_os = "linux")]
fn cpu_time_of(name: &str) -> Option<Duration> {
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let path = task.ok()?.path();
        if std::fs::read_to_string(path.join("comm")).ok()?.trim_end() != name {
            continue;
        }
        // Fields 14 and 15 of proc(5), in ticks. They come after the name, which may contain
        // spaces.
        let stat = std::fs::read_to_string(path.join("stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
        // SAFETY: `sysconf` takes no pointers.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as u64;
        return Some(Duration::from_millis(ticks * 1000 / per_second));
    }
    None
}

/// The processor time of the calling thread.
#[cfg(target_os = "linux")]
pub(crate) fn own_cpu_time() -> Duration {
    // SAFETY: all zeroes is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live rusage, exclusively borrowed.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Goal: an idle ring costs almost no processor time on either side. Method: measure the processor
/// time of the poller's thread and of the waiting thread over 300 ms, with reads posted.
#[cfg(target_os = "linux")]
#[test]
fn idle_costs_nearly_nothing() {
    guarded(|| {
        let interface = loopback();
        let mut ring = interface.ring(Direction::Both).thread_name("idle-probe").build().unwrap();
        (0..8).for_each(|number| post(&mut ring, number));
        let control = ring.control();
        eventually("the poller sleeps", || control.stats().parks > 0);
        let time = || (cpu_time_of("idle-probe").expect("its thread"), own_cpu_time());
        let (parks, before) = (control.stats().parks, time());
        assert_eq!(ring.wait(1, Some(Duration::from_millis(300))), 0);
        let after = time();
        let (poller, waiter) = (after.0 - before.0, after.1 - before.1);
        assert!(poller <= Duration::from_millis(30), "the poller used {poller:?} of 300 ms");
        assert!(waiter <= Duration::from_millis(30), "the waiter used {waiter:?} of 300 ms");
        assert!(control.stats().parks - parks <= 3, "it woke up for nothing");
        // The next packet still comes.
        send(&mut ring, 9);
        assert_eq!(reap_n(&mut ring, 2).len(), 2);

        // An inline ring, whose owner waits.
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).build().unwrap();
        (0..8).for_each(|number| post(&mut ring, number));
        let before = own_cpu_time();
        assert_eq!(ring.wait(1, Some(Duration::from_millis(300))), 0);
        let used = own_cpu_time() - before;
        assert!(used <= Duration::from_millis(30), "the waiter used {used:?} of 300 ms");
    });
}
