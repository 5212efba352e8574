//! No ring is ever stuck, and no waiter ever spins. Each test shows a fault that was found once,
//! or checks a promise about what must not happen.

mod closing;
mod drain;
mod fronts;
mod hostile;
mod races;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmring::device::{PostedSlot, Progress, Wake};
use vmring::{Error, Interface, Ring};

use crate::support::{LONG, Script, ScriptQueue, eventually, myself, post, reap_n, send, stage};

/// A function that runs on a thread of its own.
struct Running<T> {
    answer: Receiver<T>,
    thread: JoinHandle<()>,
}

impl<T: Send + 'static> Running<T> {
    fn start(f: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, answer) = mpsc::sync_channel(1);
        let thread = thread::spawn(move || {
            let _ = sender.send(f());
        });
        Self { answer, thread }
    }

    /// What the function returns. Panics if it does not end, or panics.
    fn answer(self, what: &str) -> T {
        stage(what);
        match self.answer.recv_timeout(LONG) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => panic!("it does not end: {what}"),
            Err(RecvTimeoutError::Disconnected) => match self.thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("it sends before it returns"),
            },
        }
    }
}

/// Calls `f` on a thread of its own. Panics if it does not return.
fn ends<T: Send + 'static>(what: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    Running::start(f).answer(what)
}

/// Asserts that a loopback's packets go out and come in through `ring`, which has nothing in
/// flight.
fn assert_works(ring: &mut Ring) {
    post(ring, 1);
    send(ring, 2);
    assert!(reap_n(ring, 2).iter().all(|done| done.result == Ok(60)));
    assert_eq!(ring.in_flight(), 0);
}

fn is_closed<T>(answer: &Result<T, Error>) -> bool {
    matches!(answer, Err(Error::Closed(_)))
}

/// What a [`Keeper`] does with its slots when it is asked to close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtClose {
    /// It gives them back, cancelled.
    Cancels,
    /// It keeps them and says that it does not.
    Keeps,
    /// It keeps them and says so.
    Refuses,
}

/// A third-party device that takes every slot, and keeps it.
#[derive(Clone)]
struct Keeper(Arc<KeeperState>);

struct KeeperState {
    at_close: AtClose,
    slots: Mutex<Vec<PostedSlot>>,
    wakes: Mutex<Vec<Wake>>,
    /// Its next poll completes the writes and keeps no more of them.
    released: AtomicBool,
    /// Targets to cancel at the next poll.
    cancels: Mutex<Vec<Option<u64>>>,
    /// The next poll cancels the reads.
    cancels_reads: AtomicBool,
    closes: AtomicU64,
}

impl Keeper {
    fn start(at_close: AtClose) -> (Interface, Self) {
        let keeper = Self(Arc::new(KeeperState {
            at_close,
            slots: Mutex::default(),
            wakes: Mutex::default(),
            released: AtomicBool::new(false),
            cancels: Mutex::default(),
            cancels_reads: AtomicBool::new(false),
            closes: AtomicU64::new(0),
        }));
        let state = keeper.0.clone();
        let device = Script::new(move |_, wake| {
            state.wakes.lock().unwrap().push(wake);
            state.queue()
        });
        (device.start(), keeper)
    }

    /// Slots that it keeps.
    fn kept(&self) -> usize {
        self.0.slots.lock().unwrap().len()
    }

    /// Waits until it keeps `n` slots. Drives `ring` meanwhile, without reaping.
    fn eventually_keeps(&self, ring: &mut Ring, n: usize) {
        eventually("the device keeps the slots", || {
            let _ = ring.reap().len();
            self.kept() == n
        });
    }

    /// How often it was asked to close.
    fn closes(&self) -> u64 {
        self.0.closes.load(Ordering::SeqCst)
    }

    /// Rings, for every queue it ever had.
    fn wake(&self) {
        let wakes = self.0.wakes.lock().unwrap().clone();
        wakes.iter().for_each(Wake::wake);
    }

    /// Drops what it keeps, wherever that belongs.
    fn drop_slots(&self) {
        drop(std::mem::take(&mut *self.0.slots.lock().unwrap()));
    }
}

impl KeeperState {
    fn queue(self: &Arc<Self>) -> ScriptQueue {
        let [polled, cancelled, reading, closed] = [(); 4].map(|()| self.clone());
        ScriptQueue::new(move |cx| {
            let mut slots = polled.slots.lock().unwrap();
            slots.extend(std::iter::from_fn(|| cx.take_read()));
            slots.extend(std::iter::from_fn(|| cx.take_write()));
            let cancels = std::mem::take(&mut *polled.cancels.lock().unwrap());
            let reads = polled.cancels_reads.swap(false, Ordering::SeqCst);
            let released = polled.released.load(Ordering::SeqCst);
            for slot in std::mem::take(&mut *slots) {
                let target = slot.user_data();
                let cancelled = cancels.iter().any(|of| of.is_none_or(|of| of == target));
                if cancelled || (reads && slot.is_read()) {
                    cx.cancel(slot);
                } else if released && !slot.is_read() {
                    cx.complete_write(slot);
                } else {
                    slots.push(slot);
                }
            }
            Ok(Progress::Idle)
        })
        .on_cancel(move |target| {
            let slots = cancelled.slots.lock().unwrap();
            let found = slots.iter().filter(|slot| target.is_none_or(|of| of == slot.user_data()));
            let found = found.count() as u32;
            cancelled.cancels.lock().unwrap().push(target);
            found
        })
        .on_cancel_reads(move || {
            reading.cancels_reads.store(true, Ordering::SeqCst);
            reading.slots.lock().unwrap().iter().filter(|slot| slot.is_read()).count() as u32
        })
        .on_close(move |cx| {
            closed.closes.fetch_add(1, Ordering::SeqCst);
            if closed.at_close == AtClose::Cancels {
                closed.slots.lock().unwrap().drain(..).for_each(|slot| cx.cancel(slot));
            }
            closed.at_close != AtClose::Refuses
        })
    }
}

/// Runs `body` in a process of its own, because it changes or ends the process. `test` is the
/// whole path of the calling test.
fn in_child(test: &str, body: impl FnOnce()) {
    const CHILD: &str = "VMRING_TEST_CHILD";
    let name = test.split_once("::").expect("the crate's name comes first").1;
    if std::env::var_os(CHILD).is_some_and(|child| child == name) {
        return body();
    }
    stage("the child process runs");
    // It has a watchdog of its own, which ends it.
    let output = myself()
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .output()
        .expect("a child process");
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{name}: {}\n{out}{err}", output.status);
    assert!(out.contains("1 passed"), "{name} is not the test's name:\n{out}");
}

/// How long a test sleeps for what it cannot see, for example that another thread is asleep. A
/// test may find less if this is too short, but it does not fail.
const MOMENT: Duration = Duration::from_millis(50);
