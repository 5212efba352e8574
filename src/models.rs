//! Models of the mailbox, the engine, the interface's lifecycle and the poller: loom runs exactly this
//! library's code in every interleaving (within a preemption bound), and with every value that the
//! memory model lets a load return.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p vmring --lib models::`
//!
//! `LOOM_MAX_PREEMPTIONS` sets another bound; `-- --nocapture` shows how much was explored.
//!
//! The device is the models' own ([`Desk`]). The engine is driven by the reaping half, or by a poller
//! whose thread is loom's. Nothing here has a descriptor, so no system call is reached. Time stands
//! still, and loom's condition variables never time out: a sleep that only its timeout would end is a
//! deadlock, which loom reports. An engine or a waiter that spins exceeds the number of branches,
//! which loom reports too. Counters (`stats.rs`) and reference counts are std's, so loom sees no
//! ordering in them.
//!
//! Loom misses one order: if a thread loads a word and then exchanges it, the exchange is not tried
//! before another thread's load. So the code under test does not do that where others only load.
//!
//! Each model ends when what must complete has completed, and the engine has gone to sleep.

mod arming;
mod cancelling;
mod closing;
mod draining;
mod restarting;
mod skipping;
mod sleeping;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize as Uncounted;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::thread::{self, JoinHandle};
use macaddr::MacAddr6;
use vmring_core::{HeapBacking, Layout, Pool};

use crate::config::{Direction, InterfaceConfig, InterfaceInfo, Mode};
use crate::device::context::PollContext;
use crate::device::seam::{Capabilities, Device, Progress, Queue, QueueConfig, Wake};
use crate::device::slot::PostedSlot;
use crate::error::{EntryError, Error, Status};
use crate::lifecycle::InterfaceShared;
use crate::policy::IdlePolicy;
use crate::poller::Poller;
use crate::ring::{CompletionQueue, SubmissionQueue};
use crate::ring_builder::{Drive, RingBuilder};
use crate::sync::{Condvar, Mutex};
use crate::sys::lock;

/// Long enough that no model reaches it.
const LONG: Duration = Duration::from_secs(60);

/// Explores `model` with at most `preemptions` preemptions in one run.
fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    builder.max_branches = builder.max_branches.max(10_000);
    let bound = builder.preemption_bound;
    let runs = Arc::new(Uncounted::new(0));
    let counted = runs.clone();
    let start = std::time::Instant::now();
    builder.check(move || {
        // An atomic of std: loom does not see it, so it adds no ordering.
        counted.fetch_add(1, Relaxed);
        model();
    });
    let (runs, name) = (runs.load(Relaxed), std::thread::current());
    println!("{:?}: {runs} runs, bound {bound:?}, {:?}", name.name(), start.elapsed());
    assert!(runs > 1, "nothing was explored");
}

/// Runs what comes before the part that is explored, in one order only.
fn setup<T>(setup: impl FnOnce() -> T) -> T {
    loom::stop_exploring();
    let result = setup();
    loom::explore();
    result
}

/// Says that only the end of the model follows, which is not explored.
fn explored() {
    loom::skip_branch();
}

/// What a device does with the reads that are posted. It completes writes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reads {
    /// It leaves them posted.
    Leave,
    /// It completes them at once, with a packet of no bytes.
    Fill,
    /// It keeps them, for a thread to take.
    Keep,
}

/// A device without a network. Its queues share one list of kept reads.
struct Desk {
    reads: Reads,
    /// Whether closing a queue waits for the slots that threads have taken.
    waits_for_threads: bool,
    /// Read in each poll.
    read_by_polls: Option<Mark>,
    state: Mutex<DeskState>,
    calls: Calls,
}

#[derive(Default)]
struct DeskState {
    /// The reads that the device keeps.
    kept: Vec<PostedSlot>,
    /// The reads that the next poll completes, with a packet or as cancelled.
    filled: Vec<PostedSlot>,
    cancelled: Vec<PostedSlot>,
    /// How many slots threads have taken.
    taken: usize,
    wake: Option<Wake>,
}

/// What was called how often. Loom does not see these counts.
#[derive(Debug, Default)]
struct Calls {
    polls: Uncounted,
    restarts: Uncounted,
    stops: Uncounted,
}

impl Desk {
    /// How many reads the device keeps.
    fn kept(&self) -> usize {
        lock(&self.state).kept.len()
    }

    /// Takes a kept read, as a thread of the device does.
    fn take(&self) -> PostedSlot {
        let mut state = lock(&self.state);
        state.taken += 1;
        state.kept.pop().expect("a read that the device keeps")
    }

    /// Gives back a slot that was taken: a packet has come for it.
    fn fill(&self, slot: PostedSlot) {
        let mut state = lock(&self.state);
        state.taken -= 1;
        state.filled.push(slot);
    }

    /// The wake of the queue that was opened last.
    fn wake(&self) -> Wake {
        lock(&self.state).wake.clone().expect("a queue was opened")
    }
}

/// The device of an interface. (A queue needs the desk too.)
struct DeskDevice(Arc<Desk>);

impl Device for DeskDevice {
    fn name(&self) -> &str {
        "desk"
    }

    fn info(&self) -> InterfaceInfo {
        let config = InterfaceConfig::new(Mode::Shared, [0; 16]);
        InterfaceInfo::new(&config, MacAddr6::nil(), 16, 16)
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(16, 16);
        (caps.reading_rings, caps.writing_rings) = (2, 2);
        caps
    }

    fn queue(&self, _: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        lock(&self.0.state).wake = Some(wake);
        Ok(Box::new(DeskQueue(self.0.clone())))
    }

    fn stop(&self) -> Result<(), Error> {
        self.0.calls.stops.fetch_add(1, Relaxed);
        Ok(())
    }

    fn restart(&self) -> Result<(), Error> {
        self.0.calls.restarts.fetch_add(1, Relaxed);
        Ok(())
    }
}

struct DeskQueue(Arc<Desk>);

impl Queue for DeskQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        self.0.calls.polls.fetch_add(1, Relaxed);
        self.0.read_by_polls.iter().for_each(Mark::read);
        while let Some(slot) = cx.take_write() {
            cx.complete_write(slot);
        }
        match self.0.reads {
            Reads::Leave => {}
            Reads::Fill => {
                while let Some(slot) = cx.take_read() {
                    cx.complete_read(slot, 0);
                }
            }
            Reads::Keep => {
                let mut state = lock(&self.0.state);
                while let Some(slot) = cx.take_read() {
                    state.kept.push(slot);
                }
                for slot in state.filled.drain(..) {
                    cx.complete_read(slot, 0);
                }
                for slot in state.cancelled.drain(..) {
                    cx.cancel(slot);
                }
            }
        }
        Ok(Progress::Idle)
    }

    fn cancel(&mut self, _: Option<u64>) -> u32 {
        if self.0.reads != Reads::Keep {
            return 0;
        }
        let mut state = lock(&self.0.state);
        let kept = std::mem::take(&mut state.kept);
        state.cancelled.extend(kept);
        state.cancelled.len() as u32
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        if self.0.reads != Reads::Keep {
            return true;
        }
        let mut state = lock(&self.0.state);
        let DeskState { kept, filled, cancelled, .. } = &mut *state;
        for slot in filled.drain(..) {
            cx.complete_read(slot, 0);
        }
        for slot in kept.drain(..).chain(cancelled.drain(..)) {
            cx.cancel(slot);
        }
        state.taken == 0 || !self.0.waits_for_threads
    }
}

/// An interface over a [`Desk`], and a pool for its rings.
struct Rig {
    desk: Arc<Desk>,
    interface: Arc<InterfaceShared>,
    pool: Pool,
}

impl Rig {
    fn new(reads: Reads) -> Self {
        Self::over(reads, true)
    }

    fn over(reads: Reads, waits_for_threads: bool) -> Self {
        Self::with(|desk| {
            desk.reads = reads;
            desk.waits_for_threads = waits_for_threads;
        })
    }

    fn with(change: impl FnOnce(&mut Desk)) -> Self {
        let mut desk = Desk {
            reads: Reads::Leave,
            waits_for_threads: true,
            read_by_polls: None,
            state: Mutex::default(),
            calls: Calls::default(),
        };
        change(&mut desk);
        let desk = Arc::new(desk);
        let interface = Arc::new(InterfaceShared::new(Arc::new(DeskDevice(desk.clone()))));
        let layout = Layout { slots: 4, slot_size: 16, headroom: 0 };
        let pool = Pool::new(Box::new(HeapBacking::new(64)), layout).unwrap();
        Self { desk, interface, pool }
    }

    /// Builds a ring, in its two halves.
    fn ring(&self, drive: Drive<'_>) -> (SubmissionQueue, CompletionQueue) {
        self.try_ring(drive).unwrap()
    }

    fn try_ring(&self, drive: Drive<'_>) -> Result<(SubmissionQueue, CompletionQueue), Error> {
        let builder = RingBuilder::new(&self.interface, Direction::Both);
        let builder = builder.depth(2).cancel_depth(1).pool(&self.pool).idle(IdlePolicy::PARK);
        // The indices wrap.
        Ok(builder.start_index(u32::MAX).drive(drive).build()?.into_split())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.pool.slots_out(), 0, "a slot was lost");
        }
    }
}

/// A word that is no atomic. Loom reports a read that does not come after the write.
#[derive(Clone, Default)]
struct Mark(Arc<UnsafeCell<u64>>);

// SAFETY: all accesses go through loom's cell, which reports accesses that race.
unsafe impl Send for Mark {}
// SAFETY: shared accesses go through loom's cell too, which reports accesses that race.
unsafe impl Sync for Mark {}

impl Mark {
    fn write(&self) {
        // SAFETY: loom's `with_mut` has just checked that nobody else has access.
        self.0.with_mut(|mark| unsafe { *mark = 1 });
    }

    /// Reads what the other thread has written.
    fn read(&self) {
        // SAFETY: loom's `with` has just checked that nobody writes.
        assert_eq!(self.0.with(|mark| unsafe { *mark }), 1);
    }
}

/// The waker of a task. It counts.
#[derive(Default)]
struct Task {
    woken: Mutex<u32>,
    wakeup: Condvar,
}

impl Task {
    /// Sleeps until somebody has woken the task since the last sleep.
    fn sleep(&self) {
        let mut woken = lock(&self.woken);
        while *woken == 0 {
            woken = self.wakeup.wait(woken).unwrap();
        }
        *woken = 0;
    }
}

impl std::task::Wake for Task {
    fn wake(self: Arc<Self>) {
        *lock(&self.woken) += 1;
        self.wakeup.notify_one();
    }
}

/// Starts a poller on a thread of loom's.
fn poller() -> (Poller, JoinHandle<()>) {
    let poller = Poller::unstarted();
    let thread = thread::spawn(poller.thread());
    (poller, thread)
}

/// A ring on a poller, whose thread is loom's.
struct Polled {
    sq: SubmissionQueue,
    cq: CompletionQueue,
    poller: Poller,
    thread: JoinHandle<()>,
}

impl Polled {
    fn new(rig: &Rig) -> Self {
        let (poller, thread) = poller();
        let (sq, cq) = rig.ring(Drive::Shared(&poller));
        Self { sq, cq, poller, thread }
    }

    /// Ends the poller. The ring has ended, or ends with it.
    fn end(self) {
        let Self { sq, cq, poller, thread } = self;
        drop((sq, cq, poller));
        thread.join().unwrap();
    }
}

/// Submits `N` reads, and takes their slots when the device keeps them.
fn take_reads<const N: usize>(
    rig: &Rig,
    sq: &mut SubmissionQueue,
    cq: &mut CompletionQueue,
) -> [PostedSlot; N] {
    for user_data in 1..=N as u64 {
        read(sq, user_data);
    }
    while rig.desk.kept() < N {
        assert_eq!(reap(cq), []);
        thread::yield_now();
    }
    [(); N].map(|()| rig.desk.take())
}

/// Submits a read.
fn read(sq: &mut SubmissionQueue, user_data: u64) {
    let frame = sq.alloc().unwrap();
    sq.submit_read(frame, user_data).unwrap();
}

type Done = (u64, Result<usize, EntryError>);

/// Reaps what waits.
fn reap(cq: &mut CompletionQueue) -> Vec<Done> {
    cq.reap().map(|done| (done.user_data, done.result)).collect()
}

/// Waits until `n` entries have completed, and reaps them.
fn complete(cq: &mut CompletionQueue, n: usize) -> Vec<Done> {
    let mut all = Vec::new();
    while all.len() < n {
        assert!(cq.in_flight() > 0, "{all:?} of {n} have completed");
        cq.wait(1, None);
        all.append(&mut reap(cq));
    }
    all
}

/// What is in flight completes, and no more. Then the ring goes to sleep.
fn ends(cq: &mut CompletionQueue) -> Vec<Done> {
    let in_flight = cq.in_flight();
    let all = complete(cq, in_flight);
    assert_eq!(cq.in_flight(), 0);
    sleeps(cq);
    all
}

/// Nothing more is to be done: the ring goes to sleep after a few looks.
fn sleeps(cq: &mut CompletionQueue) {
    assert!((0..4).any(|_| cq.arm()), "the engine does not go to sleep");
    // Nobody rings in vain.
    assert_eq!(reap(cq), []);
}

/// The poller goes to sleep, because none of its rings has anything to do.
fn poller_sleeps(poller: &Poller) {
    while !poller.shared().set.bell.is_armed() {
        thread::yield_now();
    }
}
