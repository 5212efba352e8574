//! Two guests: packets one way from one thread to another, which looks at them or at their lengths.
//!
//! Nothing may be lost. Where the way itself does not hold the sender back, the receiver says how many
//! packets it has room for.

mod bare;
mod look;
mod ours;
mod sockets;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crate::common::{pin, take_turns};
use crate::net::{FULL_FRAME, SMALL_FRAME};
use crate::report::{Table, Want};
use crate::{Part, Plan, Result};
use look::{Depth, Look, words};

/// Packets that either side handles at once.
const BATCH: usize = 32;
/// Packets that may be on their way.
const WINDOW: usize = 64;
/// The longest packet of the network with the greatest MTU.
const LONG_PACKET: usize = 65_535;
const LENGTHS: [usize; 3] = [SMALL_FRAME, FULL_FRAME, LONG_PACKET];
/// Packets that are compared byte by byte before anything is timed: each buffer's second lap too.
const COMPARED: u64 = 4 * 256;
/// Longer than any side has to wait for the other.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Bare,
    /// The bare loop behind the least that a ring on each side can be.
    Queued,
    Ours(ours::Driven),
    Datagrams,
    Stream,
}

impl Way {
    const INLINE: Self = Self::Ours(ours::Driven::Inline);
    const ALL: [Self; 7] = [
        Self::Bare,
        Self::Queued,
        Self::INLINE,
        Self::Ours(ours::Driven::TwoPollers),
        Self::Ours(ours::Driven::SharedPoller),
        Self::Datagrams,
        Self::Stream,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare loop",
            Self::Queued => "bare loop behind rtrb queues",
            Self::Ours(driven) => driven.name(),
            Self::Datagrams => "Unix datagrams",
            Self::Stream => "Unix stream",
        }
    }
}

#[derive(Clone, Copy)]
struct Contender {
    way: Way,
    length: usize,
    touched: bool,
}

impl Contender {
    /// Nanoseconds a packet.
    fn measure(&self, time: Duration) -> Result<f64> {
        let Self { way, length, touched } = *self;
        let traffic = Traffic { length, touched, time };
        let measured = match way {
            Way::Bare => bare::measure(traffic, false),
            Way::Queued => bare::measure(traffic, true),
            Way::Ours(driven) => ours::measure(driven, traffic),
            Way::Datagrams => sockets::measure_datagrams(traffic),
            Way::Stream => sockets::measure_stream(traffic),
        };
        measured.map_err(|error| format!("{}, {length} B: {error}", way.name()).into())
    }
}

/// What tells the table's rows apart.
pub(crate) const LABELS: &[&str] = &["bytes", "receiver", "contender"];

/// How a variant is called.
fn seen(touched: bool) -> &'static str {
    if touched { "touched" } else { "untouched" }
}

pub(crate) fn run(plan: Plan) -> Part {
    let (mut contenders, mut refused) = (Vec::new(), Vec::new());
    for length in LENGTHS {
        let datagrams = sockets::takes_datagrams_of(length)?;
        for touched in [false, true] {
            for way in Way::ALL {
                let taken = way != Way::Datagrams || datagrams;
                let list = if taken { &mut contenders } else { &mut refused };
                list.push(Contender { way, length, touched });
            }
        }
    }
    let values = take_turns(plan, &mut contenders, |contender| contender.measure(plan.time))?;
    let mut table = Table::new(
        "guests",
        "packets one way between two threads; touched: the receiver reads a word of each cache line",
        LABELS,
        &["ns/packet", "packets/s"],
    );
    let mut medians = Vec::new();
    for (contender, values) in contenders.iter().zip(&values) {
        let Contender { way, length, touched } = *contender;
        let rates: Vec<f64> = values.iter().map(|ns| 1e9 / ns).collect();
        let labels = [&length.to_string(), seen(touched), way.name()];
        medians.push((*contender, table.row(&labels, &[values, &rates])));
    }
    for Contender { way, length, touched } in refused {
        let name = format!("{}: the system refuses that length", way.name());
        table.row(&[&length.to_string(), seen(touched), &name], &[&[], &[]]);
    }
    Ok((vec![table], wants(&medians)))
}

/// At most 1.4 times the bare loop, and so many times faster than the sockets.
fn wants(medians: &[(Contender, f64)]) -> Vec<Want> {
    let of = |way: Way, length, touched| {
        let row =
            medians.iter().find(|(c, _)| (c.way, c.length, c.touched) == (way, length, touched));
        row.map_or(f64::NAN, |row| row.1)
    };
    let mut wants = Vec::new();
    for length in LENGTHS {
        for touched in [false, true] {
            let ratio = of(Way::INLINE, length, touched) / of(Way::Bare, length, touched);
            let name = format!("{length} B {}: vmring, inline / bare loop", seen(touched));
            wants.push(Want::at_most(name, ratio, 1.4));
        }
    }
    for rival in [Way::Datagrams, Way::Stream] {
        for (touched, least) in [(false, 15.0), (true, 4.0)] {
            let ratio = of(rival, FULL_FRAME, touched) / of(Way::INLINE, FULL_FRAME, touched);
            let rival = rival.name();
            let name = format!("{FULL_FRAME} B {}: {rival} / vmring, inline", seen(touched));
            wants.push(Want::at_least(name, ratio, least));
        }
    }
    wants
}

/// What one measurement carries.
#[derive(Clone, Copy)]
struct Traffic {
    length: usize,
    touched: bool,
    time: Duration,
}

trait Sender: Send {
    /// Sends what may go now, a batch at most. `false`: nothing could be done.
    fn send(&mut self) -> Result<bool>;

    /// Ends what has begun, and begins nothing. Gives the number of packets sent once all is done.
    fn finish(&mut self) -> Result<Option<u64>>;
}

trait Receiver: Send {
    /// Looks at the packets that are there, a batch at most. `false`: none were.
    fn receive(&mut self, look: &mut Look) -> Result<bool>;
}

/// Waiting for the other side: spinning, but giving the processor away now and then, and not for ever.
struct Idle {
    what: &'static str,
    turns: u32,
    since: Option<Instant>,
}

impl Idle {
    fn new(what: &'static str) -> Self {
        Self { what, turns: 0, since: None }
    }

    /// Once around a loop that did something or did not.
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

/// What the two threads tell each other.
struct Told {
    stop: AtomicBool,
    /// The packets that were sent in all, once that is known.
    sent: AtomicU64,
}

const UNKNOWN: u64 = u64::MAX;

/// Carries packets that look like `expected` for a while. Gives nanoseconds a packet.
fn carry(
    sender: impl Sender,
    receiver: impl Receiver,
    expected: Vec<u8>,
    traffic: Traffic,
) -> Result<f64> {
    let told = &Told { stop: AtomicBool::new(false), sent: AtomicU64::new(UNKNOWN) };
    thread::scope(|scope| {
        let sending = scope.spawn(move || send_all(sender, told));
        let receiving = scope.spawn(move || receive_all(receiver, expected, traffic, told));
        let received = join(receiving);
        told.stop.store(true, Ordering::Relaxed);
        // A sender that failed is why the receiver waited in vain.
        join(sending)?;
        received
    })
}

fn join<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err("a guest panicked".into()))
}

fn send_all(mut sender: impl Sender, told: &Told) -> Result<()> {
    pin(0);
    let mut idle = Idle::new("sending");
    while !told.stop.load(Ordering::Relaxed) {
        idle.turn(sender.send()?)?;
    }
    let mut idle = Idle::new("sending the last packets");
    loop {
        if let Some(sent) = sender.finish()? {
            told.sent.store(sent, Ordering::Release);
            return Ok(());
        }
        idle.turn(false)?;
    }
}

fn receive_all(
    mut receiver: impl Receiver,
    expected: Vec<u8>,
    traffic: Traffic,
    told: &Told,
) -> Result<f64> {
    pin(1);
    let depth = Depth::Everything;
    let mut look = Look { depth, expected, packets: 0, words: 0, wrong: 0 };
    let mut idle = Idle::new("receiving");
    while look.packets < COMPARED {
        idle.turn(receiver.receive(&mut look)?)?;
    }
    look.depth = if traffic.touched { Depth::Words } else { Depth::Lengths };
    let (before, start) = (look.packets, Instant::now());
    let elapsed = loop {
        // The clock costs something: not at each turn.
        for _ in 0..8 {
            idle.turn(receiver.receive(&mut look)?)?;
        }
        let elapsed = start.elapsed();
        if elapsed >= traffic.time {
            break elapsed;
        }
    };
    let packets = look.packets - before;
    look.depth = Depth::Everything;
    told.stop.store(true, Ordering::Relaxed);
    let mut idle = Idle::new("receiving the last packets");
    while look.packets < told.sent.load(Ordering::Acquire) {
        idle.turn(receiver.receive(&mut look)?)?;
    }
    let sent = told.sent.load(Ordering::Acquire);
    if (look.packets, look.wrong) != (sent, 0) || packets == 0 {
        let (came, wrong) = (look.packets, look.wrong);
        return Err(format!("{sent} sent, {came} came, {wrong} of them wrong").into());
    }
    let added = if traffic.touched { packets } else { 0 };
    if look.words != words(&look.expected).wrapping_mul(added) {
        return Err("a packet's words are wrong".into());
    }
    Ok(elapsed.as_nanos() as f64 / packets as f64)
}
