//! A wrapper that makes any device misbehave. A seed decides when. It is for testing vmring and the
//! programs that use it.
//!
//! ```
//! use vmring::device::fault::Faults;
//! use vmring::{Direction, Interface, Loopback};
//!
//! let faults = Faults::seeded(7).short_batches(0.5).exhaustion(0.1).duplicate_wakes(0.2);
//! let interface = Interface::builder().device(faults.wrap(Loopback::new(1500))).start()?;
//! let ring = interface.ring(Direction::Both).build()?;
//! # Ok::<(), vmring::Error>(())
//! ```

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use fastrand::Rng;
use vmring_core::sync::{AtomicU64, Ordering};

use crate::config::InterfaceConfig;
use crate::device::context::{CompletedSlot, PollContext};
use crate::device::relay::{Relay, delegate_device};
use crate::device::seam::{Device, Driver, Progress, Queue, QueueConfig, Wake};
use crate::error::{Error, Status};
use crate::sync::Mutex;
use crate::sys::{lock, spawn_detached};

/// What goes wrong, and how often.
///
/// A probability is a number from 0.0, which means never and is the default, to 1.0, which means
/// always.
#[derive(Clone, Debug)]
pub struct Faults {
    seed: u64,
    short_batches: f64,
    exhaustion: f64,
    errors: Option<(f64, Status)>,
    abandon: f64,
    corruption: f64,
    late_wakes: Option<(f64, Duration)>,
    duplicate_wakes: f64,
    fail_after: Option<(u64, Status)>,
    panic_after: Option<u64>,
    engine: Option<Engine>,
    stuck: bool,
    start_delay: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Engine {
    hold: Duration,
    reorder: bool,
}

impl Faults {
    /// Returns settings under which nothing goes wrong yet. The same seed makes the same decisions
    /// for the same calls.
    pub fn seeded(seed: u64) -> Self {
        Self {
            seed,
            short_batches: 0.0,
            exhaustion: 0.0,
            errors: None,
            abandon: 0.0,
            corruption: 0.0,
            late_wakes: None,
            duplicate_wakes: 0.0,
            fail_after: None,
            panic_after: None,
            engine: None,
            stuck: false,
            start_delay: Duration::ZERO,
        }
    }

    /// Sets the probability that a poll takes only a random part of what is posted.
    pub fn short_batches(mut self, probability: f64) -> Self {
        self.short_batches = probability;
        self
    }

    /// Sets the probability that a poll takes no writes, as if the system's buffers were full for a
    /// moment.
    pub fn exhaustion(mut self, probability: f64) -> Self {
        self.exhaustion = probability;
        self
    }

    /// Sets the probability that a write fails with `status`.
    pub fn errors(mut self, probability: f64, status: Status) -> Self {
        self.errors = Some((probability, status));
        self
    }

    /// Sets the probability that the slot of a write is dropped instead of being completed.
    pub fn abandon(mut self, probability: f64) -> Self {
        self.abandon = probability;
        self
    }

    /// Sets the probability that one bit of a read packet is flipped.
    pub fn corruption(mut self, probability: f64) -> Self {
        self.corruption = probability;
        self
    }

    /// Sets the probability that a wake-up of the device comes late, after `delay`.
    pub fn late_wakes(mut self, probability: f64, delay: Duration) -> Self {
        self.late_wakes = Some((probability, delay));
        self
    }

    /// Sets the probability that a wake-up of the device comes twice.
    pub fn duplicate_wakes(mut self, probability: f64) -> Self {
        self.duplicate_wakes = probability;
        self
    }

    /// Lets the device fail for good, with `status`, when a queue has completed `packets` packets.
    pub fn fail_after(mut self, packets: u64, status: Status) -> Self {
        self.fail_after = Some((packets, status));
        self
    }

    /// Lets the device panic when a queue has completed `packets` packets.
    pub fn panic_after(mut self, packets: u64) -> Self {
        self.panic_after = Some(packets);
        self
    }

    /// Makes the device a completion engine: it holds each finished slot for `hold` on a thread of
    /// its own and gives it back afterwards, also after a cancel. With `reorder` it holds each slot
    /// for a random part of `hold`, so that slots come back in another order.
    pub fn engine(mut self, hold: Duration, reorder: bool) -> Self {
        self.engine = Some(Engine { hold, reorder });
        self
    }

    /// Lets a queue never finish closing, so that the slots that it holds are leaked.
    pub fn stuck_at_close(mut self) -> Self {
        self.stuck = true;
        self
    }

    /// Delays the start of the device by `delay`.
    pub fn start_delay(mut self, delay: Duration) -> Self {
        self.start_delay = delay;
        self
    }

    /// Returns a driver that starts `inner` and adds these faults to it.
    pub fn wrap(self, inner: impl Driver) -> Faulty {
        Faulty { faults: self, inner: Box::new(inner) }
    }
}

/// A driver whose device misbehaves; see [`Faults::wrap`].
pub struct Faulty {
    faults: Faults,
    inner: Box<dyn Driver>,
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty").field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl Driver for Faulty {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        thread::sleep(self.faults.start_delay);
        let device = self.inner.start(config)?;
        Ok(Arc::new(FaultyDevice { device, faults: self.faults, queues: AtomicU64::new(0) }))
    }
}

struct FaultyDevice {
    device: Arc<dyn Device>,
    faults: Faults,
    /// How many queues were made. Each queue has random numbers of its own.
    queues: AtomicU64,
}

delegate_device!(FaultyDevice {
    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let n = self.queues.fetch_add(1, Ordering::Relaxed);
        let rng = Rng::with_seed(self.faults.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n);
        let faults = self.faults.clone();
        let inner = self.device.queue(config, faulty_wake(&faults, rng.clone(), wake.clone()))?;
        let engine = faults.engine.map(|engine| Held::start(engine, rng.clone(), wake));
        Ok(Box::new(FaultyQueue {
            inner,
            relay: Relay::default(),
            held: engine,
            rng,
            completed: 0,
            left_some: false,
            faults,
        }))
    }
});

/// Wraps a wake so that it sometimes comes late and sometimes comes twice.
fn faulty_wake(faults: &Faults, rng: Rng, wake: Wake) -> Wake {
    let (late, twice) = (faults.late_wakes, faults.duplicate_wakes);
    if late.is_none() && twice == 0.0 {
        return wake;
    }
    let rng = Mutex::new(rng);
    Wake::from_fn(move || {
        let draw = |p| chance(&mut lock(&rng), p);
        if draw(twice) {
            wake.wake();
        }
        match late {
            Some((p, delay)) if draw(p) => {
                let late = wake.clone();
                let wake_late = move || {
                    thread::sleep(delay);
                    late.wake();
                };
                if spawn_detached("vmring-late", wake_late).is_err() {
                    wake.wake();
                }
            }
            _ => wake.wake(),
        }
    })
}

fn chance(rng: &mut Rng, probability: f64) -> bool {
    probability > 0.0 && rng.f64() < probability
}

struct FaultyQueue {
    inner: Box<dyn Queue>,
    relay: Relay,
    held: Option<Held>,
    rng: Rng,
    completed: u64,
    /// Whether the last poll left something posted that the inner queue could have used.
    left_some: bool,
    faults: Faults,
}

impl FaultyQueue {
    /// How many of `n` slots the inner queue gets in this poll.
    fn part(&mut self, n: usize) -> usize {
        if n > 0 && chance(&mut self.rng, self.faults.short_batches) {
            self.rng.usize(0..n)
        } else {
            n
        }
    }

    fn finish(&mut self, mut done: CompletedSlot, cx: &mut PollContext<'_>) {
        self.completed += 1;
        if done.slot().is_read()
            && done.result().is_ok_and(|len| len > 0)
            && chance(&mut self.rng, self.faults.corruption)
            && let Some(packet) = done.packet_mut()
        {
            let at = self.rng.usize(0..packet.len());
            packet[at] ^= 1 << self.rng.u8(0..8);
        }
        match &mut self.held {
            Some(held) => held.hold(done),
            None => cx.forward(done),
        }
    }

    fn give_back(&mut self, cx: &mut PollContext<'_>) {
        if let Some(held) = &mut self.held {
            while let Some(done) = held.next() {
                cx.forward(done);
            }
        }
    }
}

impl Queue for FaultyQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        if self.faults.panic_after.is_some_and(|after| self.completed >= after) {
            panic!("the fault device panics, as configured");
        }
        if let Some((after, status)) = self.faults.fail_after
            && self.completed >= after
        {
            return Err(status);
        }
        self.give_back(cx);
        for _ in 0..self.part(cx.reads()) {
            let Some(slot) = cx.take_read() else { break };
            self.relay.post(slot);
        }
        let exhausted = chance(&mut self.rng, self.faults.exhaustion);
        let writes = if exhausted { 0 } else { self.part(cx.writes()) };
        for _ in 0..writes {
            let Some(slot) = cx.take_write() else { break };
            match self.faults.errors {
                Some((p, status)) if chance(&mut self.rng, p) => cx.fail(slot, status),
                _ if chance(&mut self.rng, self.faults.abandon) => drop(slot),
                _ => self.relay.post(slot),
            }
        }
        self.left_some = cx.reads() + cx.writes() > 0;
        let result = self.relay.poll(&mut *self.inner);
        self.relay.put_back(cx);
        while let Some(done) = self.relay.next_done() {
            self.finish(done, cx);
        }
        result
    }

    fn bind_to_thread(&mut self) {
        self.inner.bind_to_thread();
    }

    fn arm(&mut self) -> bool {
        !self.left_some
            && self.inner.arm()
            && self.held.as_mut().is_none_or(|held| held.returned.is_empty())
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        // The engine gives back what it holds when its time has passed, as a kernel would that has
        // already finished with a slot.
        self.inner.cancel(target)
    }

    fn cancel_reads(&mut self) -> u32 {
        self.inner.cancel_reads()
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        let closed = self.relay.close(&mut *self.inner);
        while let Some(done) = self.relay.next_done() {
            self.finish(done, cx);
        }
        if self.faults.stuck {
            return false;
        }
        self.give_back(cx);
        closed && self.held.as_ref().is_none_or(|held| held.out == 0)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }

    fn deadline(&self) -> Option<Instant> {
        self.inner.deadline()
    }

    fn is_sending(&self) -> bool {
        self.inner.is_sending()
    }
}

/// The completion engine: a thread that holds finished slots for a while.
struct Held {
    to_thread: Sender<CompletedSlot>,
    from_thread: Receiver<CompletedSlot>,
    /// Slots that came back from the thread, or never got there, and are still to be given back.
    returned: Vec<CompletedSlot>,
    out: usize,
}

impl Held {
    fn start(engine: Engine, mut rng: Rng, wake: Wake) -> Self {
        let (to_thread, inbox) = mpsc::channel::<CompletedSlot>();
        let (outbox, from_thread) = mpsc::channel();
        let hold = move || {
            let mut held: Vec<(Instant, CompletedSlot)> = Vec::new();
            loop {
                let next = held.iter().map(|(due, _)| *due).min();
                let wait = next.map_or(Duration::from_secs(3600), |due| {
                    due.saturating_duration_since(Instant::now())
                });
                match inbox.recv_timeout(wait) {
                    Ok(done) => {
                        let hold = engine.hold.mul_f64(rng.f64());
                        let hold = if engine.reorder { hold } else { engine.hold };
                        held.push((Instant::now() + hold, done));
                        continue;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    // The queue is gone. Slots that are held are dropped, which reports each to its
                    // ring.
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                let now = Instant::now();
                while let Some(i) = held.iter().position(|(due, _)| *due <= now) {
                    let (_, done) =
                        if engine.reorder { held.swap_remove(i) } else { held.remove(i) };
                    if outbox.send(done).is_err() {
                        return;
                    }
                    wake.wake();
                }
            }
        };
        spawn_detached("vmring-hold", hold).expect("a thread");
        Self { to_thread, from_thread, returned: Vec::new(), out: 0 }
    }

    fn hold(&mut self, done: CompletedSlot) {
        match self.to_thread.send(done) {
            Ok(()) => self.out += 1,
            // The thread has died, so the slot is given back without being held.
            Err(mpsc::SendError(done)) => self.returned.push(done),
        }
    }

    fn next(&mut self) -> Option<CompletedSlot> {
        if let Some(done) = self.returned.pop() {
            return Some(done);
        }
        let done = self.from_thread.try_recv().ok()?;
        self.out -= 1;
        Some(done)
    }
}
