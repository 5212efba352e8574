//! Packets from a sender to a receiver, each on a thread of its own. They are counted and timed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use super::inspection::{Depth, Inspection, words};
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
    turns: u32,
    since: Option<Instant>,
}

impl Idle {
    fn new(what: &'static str) -> Self {
        Self { what, turns: 0, since: None }
    }

    /// Called once per round. `worked` says whether the round did something.
    #[inline]
    fn turn(&mut self, worked: bool) -> Result<()> {
        if worked {
            (self.turns, self.since) = (0, None);
            return Ok(());
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

/// Carries packets that look like `expected` for a while. Returns nanoseconds per packet.
pub(crate) fn carry(
    sender: impl Sender,
    receiver: impl Receiver,
    expected: Vec<u8>,
    traffic: Traffic,
) -> Result<f64> {
    let shared = &SharedState { stop: AtomicBool::new(false), sent: AtomicU64::new(UNKNOWN) };
    thread::scope(|scope| {
        let sending = scope.spawn(move || send_all(sender, shared));
        let receiving = scope.spawn(move || receive_all(receiver, expected, traffic, shared));
        let received = join(receiving);
        shared.stop.store(true, Ordering::Relaxed);
        // If the sender failed, that is why the receiver waited in vain.
        join(sending)?;
        received
    })
}

fn join<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err("a guest panicked".into()))
}

fn send_all(mut sender: impl Sender, shared: &SharedState) -> Result<()> {
    pin(0);
    let mut idle = Idle::new("sending");
    while !shared.stop.load(Ordering::Relaxed) {
        idle.turn(sender.send()?)?;
    }
    let mut idle = Idle::new("sending the last packets");
    loop {
        if let Some(sent) = sender.finish()? {
            shared.sent.store(sent, Ordering::Release);
            return Ok(());
        }
        idle.turn(false)?;
    }
}

fn receive_all(
    mut receiver: impl Receiver,
    expected: Vec<u8>,
    traffic: Traffic,
    shared: &SharedState,
) -> Result<f64> {
    pin(1);
    let depth = Depth::Everything;
    let mut inspection = Inspection { depth, expected, packets: 0, words: 0, wrong: 0 };
    let mut idle = Idle::new("receiving");
    while inspection.packets < COMPARED {
        idle.turn(receiver.receive(&mut inspection)?)?;
    }
    inspection.depth = if traffic.touched { Depth::Words } else { Depth::Lengths };
    let (before, start) = (inspection.packets, Instant::now());
    let elapsed = loop {
        // The clock costs something, so it is not read in each round.
        for _ in 0..8 {
            idle.turn(receiver.receive(&mut inspection)?)?;
        }
        let elapsed = start.elapsed();
        if elapsed >= traffic.time {
            break elapsed;
        }
    };
    let packets = inspection.packets - before;
    inspection.depth = Depth::Everything;
    shared.stop.store(true, Ordering::Relaxed);
    let mut idle = Idle::new("receiving the last packets");
    while inspection.packets < shared.sent.load(Ordering::Acquire) {
        idle.turn(receiver.receive(&mut inspection)?)?;
    }
    let sent = shared.sent.load(Ordering::Acquire);
    if (inspection.packets, inspection.wrong) != (sent, 0) || packets == 0 {
        let (came, wrong) = (inspection.packets, inspection.wrong);
        return Err(format!("{sent} sent, {came} came, {wrong} of them wrong").into());
    }
    let added = if traffic.touched { packets } else { 0 };
    if inspection.words != words(&inspection.expected).wrapping_mul(added) {
        return Err("a packet's words are wrong".into());
    }
    Ok(elapsed.as_nanos() as f64 / packets as f64)
}
