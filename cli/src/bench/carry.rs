//! Packets from a sender to a receiver, each on a thread and a processor of its own: [`Run::carry`].

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::check::{Account, Totals};
use super::limits::{PATIENCE, QUIET, SPINS, TURNS};
use super::place::Processors;
use super::queue::Line;
use crate::failure::Failure;

/// The side that sends.
pub(crate) trait Sends: Send {
    /// Sends at most a batch, with numbers from `number` on, which it advances. `arrived` says which numbers
    /// the receiver has seen: those below it. Returns whether anything was done.
    fn send(&mut self, number: &mut u64, arrived: u64) -> Result<bool, Failure>;

    /// Sends nothing new. Returns whether nothing is under way here any more.
    fn finish(&mut self) -> Result<bool, Failure>;

    /// How many packets the device has refused.
    fn refused(&self) -> u64;
}

/// The side that receives.
pub(crate) trait Receives: Send {
    /// Takes what has arrived. Returns whether there was anything.
    fn receive(&mut self, account: &mut Account) -> Result<bool, Failure>;
}

/// What is carried one way, interval after interval.
pub(crate) struct Run<'a> {
    processors: &'a Processors,
    /// How long nothing arrives until what is missing counts as lost.
    patience: Duration,
    number: u64,
    account: Account,
}

/// What the two threads share.
#[derive(Default)]
struct SharedState {
    /// The numbers below this have arrived.
    arrived: Line<AtomicU64>,
    stop: Line<AtomicBool>,
    /// How many were sent in all, once the sender has ended.
    sent: Line<AtomicU64>,
}

/// The sender has not ended.
const UNKNOWN: u64 = u64::MAX;

impl<'a> Run<'a> {
    pub(crate) fn new(processors: &'a Processors, may_lose: bool) -> Self {
        let patience = if may_lose { QUIET } else { 2 * PATIENCE };
        Self { processors, patience, number: 0, account: Account::default() }
    }

    pub(crate) fn totals(&self) -> Totals {
        self.account.totals()
    }

    /// Carries packets for `time`, and waits until all have arrived. Returns packets per second.
    pub(crate) fn carry(
        &mut self,
        sender: &mut impl Sends,
        receiver: &mut impl Receives,
        time: Duration,
    ) -> Result<f64, Failure> {
        let shared = &SharedState::default();
        shared.arrived.0.store(self.number, Ordering::Relaxed);
        shared.sent.0.store(UNKNOWN, Ordering::Relaxed);
        let Self { processors, patience, number, account } = self;
        let (processors, patience) = (*processors, *patience);
        // While packets arrive, nobody knows how many were sent.
        account.sent = u64::MAX;
        let (sent, received) = thread::scope(|scope| {
            let sending = scope.spawn(move || {
                processors.pin(0);
                let sent = send_all(sender, number, shared);
                // Release: pairs with the Acquire in `receive_all`. What was sent is on its way.
                shared.sent.0.store(*number, Ordering::Release);
                sent.map(|refused| (refused, *number))
            });
            let receiving = scope.spawn(move || {
                processors.pin(1);
                let received = receive_all(receiver, account, time, patience, shared);
                shared.stop.0.store(true, Ordering::Relaxed);
                received
            });
            let panicked = || Failure::Step("a thread of the measurement panicked".to_owned());
            let sent = sending.join().unwrap_or_else(|_| Err(panicked()));
            (sent, receiving.join().unwrap_or_else(|_| Err(panicked())))
        });
        let ((refused, sent), rate) = (sent?, received?);
        self.account.sent = sent;
        self.account.refused += refused;
        if self.account.next > sent {
            return Err(Failure::Step("a packet arrived that nobody has sent".to_owned()));
        }
        Ok(rate)
    }
}

/// Waits for the other thread: spins, and lets others run now and then.
struct Idle(u32);

impl Idle {
    #[inline]
    fn turn(&mut self, worked: bool) {
        if worked {
            self.0 = 0;
            return;
        }
        self.0 += 1;
        if self.0.is_multiple_of(SPINS) { thread::yield_now() } else { hint::spin_loop() }
    }
}

/// Returns how many packets the device has refused.
fn send_all(
    sender: &mut impl Sends,
    number: &mut u64,
    shared: &SharedState,
) -> Result<u64, Failure> {
    let mut idle = Idle(0);
    while !shared.stop.0.load(Ordering::Relaxed) {
        // Acquire: pairs with the Release in `receive_all`. What has arrived is out of its place.
        idle.turn(sender.send(number, shared.arrived.0.load(Ordering::Acquire))?);
    }
    let start = Instant::now();
    while !sender.finish()? && start.elapsed() < PATIENCE {
        thread::yield_now();
    }
    Ok(sender.refused())
}

/// Returns packets per second.
fn receive_all(
    receiver: &mut impl Receives,
    account: &mut Account,
    time: Duration,
    patience: Duration,
    shared: &SharedState,
) -> Result<f64, Failure> {
    let mut idle = Idle(0);
    let mut turn = |account: &mut Account| {
        let worked = receiver.receive(account)?;
        if worked {
            // Release: pairs with the Acquire in `send_all`.
            shared.arrived.0.store(account.next, Ordering::Release);
        }
        idle.turn(worked);
        Ok(worked)
    };
    let (start, before) = (Instant::now(), account.arrived);
    let rate = loop {
        for _ in 0..TURNS {
            turn(account)?;
        }
        let elapsed = start.elapsed();
        // On a busy machine nothing may have come in that time. If the sender has failed, nothing more comes.
        let has_come = account.arrived > before || elapsed >= time + PATIENCE;
        if (elapsed >= time && has_come) || shared.sent.0.load(Ordering::Relaxed) != UNKNOWN {
            break (account.arrived - before) as f64 / elapsed.as_secs_f64();
        }
    };
    shared.stop.0.store(true, Ordering::Relaxed);
    let mut last = Instant::now();
    loop {
        if turn(account)? {
            last = Instant::now();
        }
        // Acquire: pairs with the Release in `Run::carry`.
        let sent = shared.sent.0.load(Ordering::Acquire);
        // What was lost at the end does not come.
        if sent != UNKNOWN && (account.next >= sent || last.elapsed() >= patience) {
            return Ok(rate);
        }
    }
}
