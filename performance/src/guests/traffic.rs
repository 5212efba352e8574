//! Packets from a sender to a receiver, each on a thread of its own. They are counted and timed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use super::inspection::{Depth, Inspection, words};
use crate::clock::Processor;
use crate::common::pin;
use crate::result::Result;

/// Packets that either side handles at once.
pub(crate) const BATCH: usize = 32;
/// Packets that may be in flight.
pub(crate) const WINDOW: usize = 64;
/// Packets that are compared byte by byte before anything is timed, which includes the second lap
/// of each buffer.
const COMPARED: u64 = 4 * 256;
/// Longer than either side has to wait for the other.
const LIMIT: Duration = Duration::from_secs(5);

/// The packets of one measurement.
#[derive(Clone, Copy)]
pub(crate) struct Traffic {
    pub(crate) length: usize,
    pub(crate) touched: bool,
    pub(crate) time: Duration,
    /// Whether to measure how long each side waits, which costs looks at the clock.
    pub(crate) watched: bool,
}

/// What was measured of one carriage of packets.
#[derive(Clone, Copy)]
pub(crate) struct Carried {
    /// Nanoseconds per packet.
    pub(crate) ns: f64,
    /// How many packets the receiver took at once, on average.
    pub(crate) at_once: f64,
    /// The shares of the time in which the sender and the receiver found nothing to do. They are zero
    /// if the traffic was not watched.
    pub(crate) waiting: [f64; 2],
    /// The share of the time in which the sender and the receiver had their processors.
    pub(crate) running: [f64; 2],
}

pub(crate) trait Sender: Send {
    /// Sends what may be sent now, at most a batch. Returns `false` if nothing could be done.
    fn send(&mut self) -> Result<bool>;

    /// Completes what has begun, and begins nothing new. Returns the number of packets sent, once
    /// all of them are done.
    fn finish(&mut self) -> Result<Option<u64>>;
}

pub(crate) trait Receiver: Send {
    /// Inspects the packets that are there, at most a batch. Returns `false` if there were none.
    fn receive(&mut self, inspection: &mut Inspection) -> Result<bool>;
}

/// Waits for the other side: spins, but yields the processor now and then, and does not wait for
/// ever.
struct Idle {
    what: &'static str,
    watched: bool,
    turns: u32,
    since: Option<Instant>,
    /// The rounds that did something, and the time of the others if it is watched.
    worked: u64,
    waited: Duration,
}

impl Idle {
    fn new(what: &'static str, watched: bool) -> Self {
        Self { what, watched, turns: 0, since: None, worked: 0, waited: Duration::ZERO }
    }

    /// Called once per round. `worked` says whether the round did something.
    #[inline]
    fn turn(&mut self, worked: bool) -> Result<()> {
        if worked {
            self.worked += 1;
            if let Some(since) = self.since.take()
                && self.watched
            {
                self.waited += since.elapsed();
            }
            self.turns = 0;
            return Ok(());
        }
        if self.watched && self.turns == 0 {
            self.since = Some(Instant::now());
        }
        self.turns += 1;
        std::hint::spin_loop();
        if self.turns.is_multiple_of(64) { self.give_way() } else { Ok(()) }
    }

    #[cold]
    fn give_way(&mut self) -> Result<()> {
        thread::yield_now();
        if self.since.get_or_insert_with(Instant::now).elapsed() > LIMIT {
            return Err(format!("{}: nothing moves", self.what).into());
        }
        Ok(())
    }
}

/// What the two threads share.
struct SharedState {
    stop: AtomicBool,
    /// The number of packets that were sent in all, once it is known.
    sent: AtomicU64,
}

const UNKNOWN: u64 = u64::MAX;

/// Carries packets that look like `expected` for a while.
pub(crate) fn carry(
    sender: impl Sender,
    receiver: impl Receiver,
    expected: Vec<u8>,
    traffic: Traffic,
) -> Result<Carried> {
    let shared = &SharedState { stop: AtomicBool::new(false), sent: AtomicU64::new(UNKNOWN) };
    thread::scope(|scope| {
        let sending = scope.spawn(move || send_all(sender, traffic.watched, shared));
        let receiving = scope.spawn(move || receive_all(receiver, expected, traffic, shared));
        let received = join(receiving);
        shared.stop.store(true, Ordering::Relaxed);
        // If the sender failed, that is why the receiver waited in vain.
        let sent = join(sending)?;
        let (ns, at_once, received) = received?;
        let waiting = [sent.waiting, received.waiting];
        Ok(Carried { ns, at_once, waiting, running: [sent.running, received.running] })
    })
}

fn join<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err("a guest panicked".into()))
}

/// How one side spent its time, in shares of it.
struct Spent {
    waiting: f64,
    running: f64,
}

/// Measures how the calling thread spends its time.
struct Watch {
    processor: Processor,
    start: (Instant, Duration),
}

impl Watch {
    fn start() -> Result<Self> {
        let processor = Processor::of_this_thread()?;
        Ok(Self { processor, start: (Instant::now(), processor.time()) })
    }

    fn stop(self, idle: &Idle) -> Spent {
        let (wall, cpu) = (self.start.0.elapsed(), self.processor.time() - self.start.1);
        let share = |time: Duration| time.as_secs_f64() / wall.as_secs_f64();
        Spent { waiting: share(idle.waited), running: share(cpu) }
    }
}

fn send_all(mut sender: impl Sender, watched: bool, shared: &SharedState) -> Result<Spent> {
    pin(0);
    let watch = Watch::start()?;
    let mut idle = Idle::new("sending", watched);
    while !shared.stop.load(Ordering::Relaxed) {
        idle.turn(sender.send()?)?;
    }
    let spent = watch.stop(&idle);
    let mut idle = Idle::new("sending the last packets", false);
    loop {
        if let Some(sent) = sender.finish()? {
            shared.sent.store(sent, Ordering::Release);
            return Ok(spent);
        }
        idle.turn(false)?;
    }
}

/// Returns the nanoseconds per packet, the packets per turn, and how the receiver spent its time.
fn receive_all(
    mut receiver: impl Receiver,
    expected: Vec<u8>,
    traffic: Traffic,
    shared: &SharedState,
) -> Result<(f64, f64, Spent)> {
    pin(1);
    let depth = Depth::Everything;
    let mut inspection = Inspection { depth, expected, packets: 0, words: 0, wrong: 0 };
    let mut idle = Idle::new("receiving", false);
    while inspection.packets < COMPARED {
        idle.turn(receiver.receive(&mut inspection)?)?;
    }
    let mut idle = Idle::new("receiving", traffic.watched);
    inspection.depth = if traffic.touched { Depth::Words } else { Depth::Lengths };
    let watch = Watch::start()?;
    let (before, start) = (inspection.packets, Instant::now());
    let elapsed = loop {
        // The clock costs something, so it is not read in each round.
        for _ in 0..8 {
            idle.turn(receiver.receive(&mut inspection)?)?;
        }
        let elapsed = start.elapsed();
        // On a busy machine nothing may have come in that time.
        if elapsed >= traffic.time && inspection.packets > before {
            break elapsed;
        }
    };
    let packets = inspection.packets - before;
    let (turns, spent) = (idle.worked, watch.stop(&idle));
    inspection.depth = Depth::Everything;
    shared.stop.store(true, Ordering::Relaxed);
    let mut idle = Idle::new("receiving the last packets", false);
    while inspection.packets < shared.sent.load(Ordering::Acquire) {
        idle.turn(receiver.receive(&mut inspection)?)?;
    }
    let sent = shared.sent.load(Ordering::Acquire);
    if (inspection.packets, inspection.wrong) != (sent, 0) {
        let (came, wrong) = (inspection.packets, inspection.wrong);
        return Err(format!("{sent} sent, {came} came, {wrong} of them wrong").into());
    }
    let added = if traffic.touched { packets } else { 0 };
    if inspection.words != words(&inspection.expected).wrapping_mul(added) {
        return Err("a packet's words are wrong".into());
    }
    let ns = elapsed.as_nanos() as f64 / packets as f64;
    Ok((ns, packets as f64 / turns as f64, spent))
}
