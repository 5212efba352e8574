//! What a packet costs as a network grows: the network has 2 to 1,024 interfaces, of which one
//! pair, or several in turn, carry packets.

use std::time::{Duration, Instant};

use vmring::{Direction, Drive, Embedded, Interface, Ring, RingOp};

use crate::common::{pinned, take_turns};
use crate::net::SMALL_FRAME;
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;

/// Interfaces on a network. The last number is the most that a network takes.
const SIZES: [usize; 6] = [2, 4, 16, 64, 256, 1024];
const BATCH: usize = 32;
/// At most this many pairs carry packets in turn.
const PAIRS: usize = 32;
const DEPTH: u32 = 64;
/// The depth of a ring that only waits. It is small because there are a thousand of them.
const IDLE_DEPTH: u32 = 8;
/// Longer than packets take if one thread, which waits, drives both ends.
const LIMIT: Duration = Duration::from_secs(5);

/// Two guests that the same thread drives.
struct Pair {
    sender: Ring,
    receiver: Ring,
}

/// A packet whose bytes tell their position in it.
fn packet(to: &Interface, from: &Interface) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..SMALL_FRAME as u8).collect();
    packet[..6].copy_from_slice(&to.mac().into_array());
    packet[6..12].copy_from_slice(&from.mac().into_array());
    packet
}

impl Pair {
    fn new(from: &Interface, to: &Interface) -> Result<Self> {
        let (mut sender, mut receiver) = (ring(from, DEPTH)?, ring(to, DEPTH)?);
        let packet = packet(to, from);
        for _ in 0..BATCH {
            let frame = receiver.alloc().ok_or("the receiver's ring has too few frames")?;
            receiver.submit_read(frame, 0)?;
            let mut frame = sender.alloc().ok_or("the sender's ring has too few frames")?;
            frame.copy_from(&packet)?;
            sender.submit_write(frame, 0)?;
        }
        Ok(Self { sender, receiver })
    }

    /// Sends a batch from one to the other. `check` sees each packet that arrives.
    #[inline]
    fn turn(&mut self, mut check: impl FnMut(&[u8]) -> bool) -> Result<()> {
        // The reads of the last turn have to be posted before anything is sent.
        self.receiver.wait(0, None);
        let sent = turn(&mut self.sender, |_| true)?;
        let came = turn(&mut self.receiver, &mut check)?;
        if (sent, came) == (BATCH, BATCH) {
            return Ok(());
        }
        Err(format!("a batch of {BATCH}: {sent} sent, {came} came").into())
    }
}

/// Reaps what has completed and submits it again. Returns the number of completions.
#[inline]
fn turn(ring: &mut Ring, mut check: impl FnMut(&[u8]) -> bool) -> Result<usize> {
    ring.wait(1, Some(LIMIT));
    let (mut sq, mut cq) = ring.split();
    let mut count = 0;
    for done in cq.reap() {
        let frame = done.take_packet()?;
        if frame.len() != SMALL_FRAME || !check(frame.view().bytes()) {
            return Err("a packet is not what was sent".into());
        }
        count += 1;
        match done.op {
            RingOp::Read => sq.submit_read(frame, 0)?,
            _ => sq.submit_write(frame, 0)?,
        }
    }
    Ok(count)
}

fn ring(interface: &Interface, depth: u32) -> Result<Ring> {
    let ring = interface.ring(Direction::Both).drive(Drive::Inline);
    Ok(ring.depth(depth).prefault(true).build()?)
}

/// A network with all its interfaces.
struct Network {
    interfaces: Vec<Interface>,
    /// The pairs that carry packets.
    pairs: Vec<Pair>,
    /// The rings of the other interfaces, each with one read posted.
    idle: Vec<Ring>,
}

impl Network {
    fn new(size: usize) -> Result<Self> {
        let name = format!("performance-growth-{size}");
        let start = |_| Interface::builder().device(Embedded::network(name.as_str())).start();
        let interfaces = (0..size).map(start).collect::<std::result::Result<Vec<_>, _>>()?;
        let (ends, rest) = interfaces.split_at(size.min(2 * PAIRS));
        let mut pairs = Vec::new();
        for [from, to] in ends.as_chunks().0 {
            pairs.push(Pair::new(from, to)?);
        }
        let mut idle = Vec::new();
        for interface in rest {
            let mut ring = ring(interface, IDLE_DEPTH)?;
            let frame = ring.alloc().ok_or("a ring has too few frames")?;
            ring.submit_read(frame, 0)?;
            if ring.wait(0, None) != 0 {
                return Err("a packet came before any was sent".into());
            }
            idle.push(ring);
        }
        // Before anything is timed, every byte is checked on every pair; twice, for the second lap
        // of the buffers.
        for _ in 0..2 {
            for (pair, ends) in pairs.iter_mut().zip(ends.as_chunks::<2>().0) {
                let expected = packet(&ends[1], &ends[0]);
                pair.turn(|packet| packet == expected)?;
            }
        }
        Ok(Self { interfaces, pairs, idle })
    }

    /// Nanoseconds per packet, over this many pairs in turn.
    fn measure(&mut self, pairs: usize, time: Duration) -> Result<f64> {
        let pairs = &mut self.pairs[..pairs];
        let (start, mut packets) = (Instant::now(), 0);
        loop {
            // The clock costs something, so it is read only once in as many turns as there can be
            // pairs.
            for turn in 0..PAIRS {
                pairs[turn % pairs.len()].turn(|_| true)?;
            }
            packets += PAIRS * BATCH;
            let elapsed = start.elapsed();
            if elapsed >= time {
                return Ok(elapsed.as_nanos() as f64 / packets as f64);
            }
        }
    }

    /// Checks that nothing was lost, and that nothing arrived at the interfaces to which nothing
    /// was sent.
    fn check(mut self) -> Result<()> {
        if self.idle.iter_mut().any(|ring| ring.wait(0, None) != 0) {
            return Err("a packet came to the wrong interface".into());
        }
        let drops: Vec<_> = self.interfaces.iter().flat_map(Interface::drops).collect();
        match drops.iter().find(|(_, count)| *count != 0) {
            Some((why, count)) => Err(format!("{count} packets were dropped: {why}").into()),
            None => Ok(()),
        }
    }
}

/// The labels that tell the rows of the table apart.
pub(crate) const LABELS: &[&str] = &["interfaces", "pairs", "traffic"];
const ONE: &str = "one pair";
const IN_TURN: &str = "pairs in turn";

pub(crate) fn run(plan: Plan) -> Part {
    let values = pinned(|| measure(plan))?;
    let about =
        format!("{SMALL_FRAME} B from one interface to another, {BATCH} at once, one thread");
    let figures = &["ns/packet"];
    let mut table = Table::new("growth", about, LABELS, figures);
    let mut medians = Vec::new();
    for (size, pairs, traffic, values) in &values {
        let labels = [&size.to_string(), &pairs.to_string(), *traffic];
        medians.push((*size, *traffic, table.row(&labels, &[values])));
    }
    // The worst of all sizes is compared, because the time could go up and down again. Pairs in
    // turn are compared only where there are equally many of them: more pairs have more frames,
    // which take more of the processor's cache.
    let want = |traffic, few| {
        let of = |wanted: fn(usize, usize) -> bool| {
            let rows = medians.iter().filter(move |row| row.1 == traffic && wanted(row.0, few));
            rows.map(|row| row.2).fold(f64::NAN, f64::max)
        };
        let name = format!("{traffic}: the slowest of more interfaces / {few}");
        Want::at_most(name, of(|size, few| size > few) / of(|size, few| size == few), 1.2)
    };
    Ok((vec![table], vec![want(ONE, SIZES[0]), want(IN_TURN, 2 * PAIRS)]))
}

/// The number of interfaces, the number of pairs that carry packets, the name of that traffic, and
/// the values of all rounds.
type Measured = (usize, usize, &'static str, Vec<f64>);

fn measure(plan: Plan) -> Result<Vec<Measured>> {
    let networks = SIZES.into_iter().map(Network::new);
    let mut networks: Vec<Network> = networks.collect::<Result<_>>()?;
    let mut contenders: Vec<(usize, usize, &'static str)> = [ONE, IN_TURN]
        .into_iter()
        .flat_map(|traffic| (0..SIZES.len()).map(move |at| (at, traffic)))
        .map(|(at, traffic)| {
            let pairs = if traffic == ONE { 1 } else { networks[at].pairs.len() };
            (at, pairs, traffic)
        })
        .collect();
    let values = take_turns(plan, &mut contenders, |(at, pairs, _)| {
        networks[*at].measure(*pairs, plan.time)
    })?;
    for network in networks {
        network.check()?;
    }
    let named = contenders.into_iter().zip(values);
    Ok(named.map(|((at, pairs, traffic), values)| (SIZES[at], pairs, traffic, values)).collect())
}
