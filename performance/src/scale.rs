//! The effect of a ring's depth, of a frame's size and of the number of rings, over the loopback.
//!
//! A packet is written, copied once by the device, and read: two submissions and two completions.

mod footprint;

use std::time::{Duration, Instant};

use vmring::pool::PoolBuilder;
use vmring::{Direction, Drive, Frame, Interface, Loopback, Poller, Ring, RingOp};

use crate::common::{pinned, processors, take_turns, time_packets};
use crate::net::ETHERNET;
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::rounds;

/// Reads in flight, and writes in flight.
const BATCH: usize = 32;
const SMALL: usize = 60;
const DEPTHS: [u32; 4] = [64, 512, 4096, 32_768];
const SIZES: [usize; 4] = [SMALL, 1514, 9014, 65_535];
const RINGS: [usize; 5] = [1, 2, 4, 8, 16];
/// Longer than a packet may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many times as slow as the first row another row may be.
const FACTOR: f64 = 1.2;

pub(crate) fn run(plan: Plan) -> Part {
    let (mut tables, mut wants) = pinned(|| {
        let mut all: (Vec<Table>, Vec<Want>) = Default::default();
        for part in [by_depth, by_size, by_rings] {
            let (tables, wants) = part(plan)?;
            all.0.extend(tables);
            all.1.extend(wants);
        }
        Ok(all)
    })?;
    let (more_tables, more_wants) = footprint::run(plan)?;
    tables.extend(more_tables);
    wants.extend(more_wants);
    Ok((tables, wants))
}

/// The contents of packet `number` of a ring.
fn packet(number: usize, size: usize) -> Vec<u8> {
    (0..size).map(|i| (i + number * 7) as u8).collect()
}

/// A ring over an interface of its own, whose packets come back.
struct Echo {
    ring: Ring,
    size: usize,
    _interface: Interface,
}

impl Echo {
    fn start(size: usize, depth: u32, drive: Drive<'_>) -> Result<Self> {
        let mtu = size.saturating_sub(ETHERNET).max(1500);
        let interface = Interface::builder().device(Loopback::new(mtu as u32)).start()?;
        // Only the frames in flight are used, whatever the depth is.
        let builder = interface.ring(Direction::Both).depth(depth).frames(2 * BATCH);
        let ring = builder.prefault(true).drive(drive).build()?;
        let mut echo = Self { ring, size, _interface: interface };
        for i in 0..BATCH {
            let frames = || echo.ring.alloc().ok_or("the ring has too few frames");
            let (room, mut frame) = (frames()?, frames()?);
            echo.ring.submit_read(room, i as u64)?;
            frame.copy_from(&packet(i, size))?;
            echo.ring.submit_write(frame, i as u64)?;
        }
        echo.check()?;
        // Goes through all entries, so that none is touched for the first time during the
        // measurement.
        let mut left = 4 * depth as usize;
        while left > 0 {
            left = left.saturating_sub(echo.turn_in_time()?);
        }
        Ok(echo)
    }

    /// Checks that what is written comes back in order and unchanged.
    fn check(&mut self) -> Result<()> {
        let mut seen = 0;
        let end = Instant::now() + PATIENCE;
        while seen < 2 * BATCH && Instant::now() < end {
            self.ring.wait(1, Some(PATIENCE));
            let (mut sq, mut cq) = self.ring.split();
            for done in cq.reap() {
                let frame = done.take_packet()?;
                if done.op == RingOp::Read {
                    if frame[..] != packet(seen % BATCH, self.size) {
                        return Err(format!("packet {seen} came back changed").into());
                    }
                    seen += 1;
                    sq.submit_read(frame, done.user_data)?;
                } else {
                    sq.submit_write(frame, done.user_data)?;
                }
            }
        }
        if seen < 2 * BATCH {
            return Err(format!("{seen} of {} packets came back", 2 * BATCH).into());
        }
        Ok(())
    }

    /// Reaps what has completed and submits it again. Returns the packets that were read.
    #[inline]
    fn turn(&mut self) -> Result<u64> {
        let (mut sq, mut cq) = self.ring.split();
        let mut read = 0;
        for done in cq.reap() {
            let frame = done.take_packet()?;
            if frame.len() != self.size && done.op == RingOp::Read {
                return Err(format!("a packet of {} bytes came back", frame.len()).into());
            }
            if done.op == RingOp::Read {
                read += 1;
                sq.submit_read(frame, done.user_data)?;
            } else {
                sq.submit_write(frame, done.user_data)?;
            }
        }
        Ok(read)
    }

    /// The same, with an error if nothing comes.
    fn turn_in_time(&mut self) -> Result<usize> {
        match self.ring.wait(1, Some(PATIENCE)) {
            0 => Err("nothing came back within five seconds".into()),
            _ => Ok(self.turn()? as usize),
        }
    }
}

/// A want for each median but the first: not much above the first.
fn flat(wants: &mut Vec<Want>, what: &str, medians: &[(String, f64)]) {
    let Some(((first, least), others)) = medians.split_first() else { return };
    for (label, median) in others {
        let what = format!("scale: {what}: {label} x {first}");
        wants.push(Want::at_most(what, median / least, FACTOR));
    }
}

fn by_depth(plan: Plan) -> Part {
    let about = format!("packets of {SMALL} B over the loopback, inline, {BATCH} in flight");
    let mut table = Table::new("scale, depth", about, &["depth"], &["ns/packet"]);
    let mut echoes = Vec::new();
    for depth in DEPTHS {
        echoes.push(Echo::start(SMALL, depth, Drive::Inline)?);
    }
    let values = take_turns(plan, &mut echoes, |echo| time_packets(plan.time, 64, || echo.turn()))?;
    let mut medians = Vec::new();
    for (depth, values) in DEPTHS.iter().zip(&values) {
        let label = depth.to_string();
        let median = table.row(&[&label], &[values]);
        medians.push((label, median));
    }
    let mut wants = Vec::new();
    flat(&mut wants, "depth", &medians);
    Ok((vec![table], wants))
}

/// Frames like a ring's, for copies like its device's.
struct Copies {
    from: Vec<Frame>,
    to: Vec<Frame>,
}

impl Copies {
    fn new(size: usize) -> Result<Self> {
        let room = size.max(1500 + ETHERNET);
        let pool = PoolBuilder::new(2 * BATCH, room).prefault(true).build()?;
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for i in 0..BATCH {
            // In the same order as the ring's.
            for (frames, number) in [(&mut to, 0), (&mut from, i)] {
                let mut frame = pool.alloc().ok_or("the pool has too few frames")?;
                frame.copy_from(&packet(number, size))?;
                frames.push(frame);
            }
        }
        Ok(Self { from, to })
    }

    #[inline]
    fn turn(&mut self) -> u64 {
        for (from, to) in self.from.iter().zip(&mut self.to) {
            to.copy_from_slice(std::hint::black_box(from));
            std::hint::black_box(&mut to[..]);
        }
        BATCH as u64
    }

    fn check(&self) -> Result<()> {
        let same = self.from.iter().zip(&self.to).all(|(from, to)| from[..] == to[..]);
        if same { Ok(()) } else { Err("a copy is not like what was copied".into()) }
    }
}

fn by_size(plan: Plan) -> Part {
    let about =
        format!("the same by frame size, and a memcpy of it between {BATCH} + {BATCH} frames");
    let figures = &["without memcpy, ns", "ns/packet", "memcpy ns"];
    let mut table = Table::new("scale, size", about, &["bytes"], figures);
    let mut contenders = Vec::new();
    for size in SIZES {
        let mut copies = Copies::new(size)?;
        copies.turn();
        copies.check()?;
        contenders.push((Echo::start(size, 256, Drive::Inline)?, copies, Vec::new()));
    }
    // The copies are timed right after the ring, so that a slow moment hits both.
    let packets = take_turns(plan, &mut contenders, |(echo, copies, copied)| {
        let packet = time_packets(plan.time, 8, || echo.turn())?;
        copied.push(time_packets(plan.time, 8, || Ok(copies.turn()))?);
        Ok(packet)
    })?;
    let mut medians = Vec::new();
    for ((size, packets), (_, _, copied)) in SIZES.iter().zip(&packets).zip(&contenders) {
        let rest: Vec<f64> = packets.iter().zip(copied).map(|(all, copy)| all - copy).collect();
        let median = table.row(&[&size.to_string()], &[&rest, packets, copied]);
        medians.push((format!("{size} B"), median));
    }
    let mut wants = Vec::new();
    flat(&mut wants, "frame size, without the memcpy", &medians);
    Ok((vec![table], wants))
}

/// All rings of a contender.
struct Many {
    echoes: Vec<Echo>,
    /// Successive turns that found nothing.
    idle: u32,
    idle_since: Instant,
}

impl Many {
    fn start(count: usize, poller: Option<&Poller>) -> Result<Self> {
        let mut echoes = Vec::new();
        for _ in 0..count {
            echoes.push(Echo::start(SMALL, 256, poller.map_or(Drive::Inline, Drive::Shared))?);
        }
        Ok(Self { echoes, idle: 0, idle_since: Instant::now() })
    }

    /// One turn of each ring.
    fn turn(&mut self) -> Result<u64> {
        let mut packets = 0;
        for echo in &mut self.echoes {
            packets += echo.turn()?;
        }
        if packets > 0 {
            self.idle = 0;
            return Ok(packets);
        }
        // The poller may need this processor to continue.
        if self.idle == 0 {
            self.idle_since = Instant::now();
        }
        self.idle += 1;
        if self.idle.is_multiple_of(64) {
            std::thread::yield_now();
            if self.idle_since.elapsed() > PATIENCE {
                return Err("nothing came back from a shared poller within five seconds".into());
            }
        }
        std::hint::spin_loop();
        Ok(0)
    }
}

fn by_rings(plan: Plan) -> Part {
    let about = format!("packets of {SMALL} B, {BATCH} in flight on each ring's own loopback");
    let mut table = Table::new("scale, rings", about, &["driven", "rings"], &["ns/packet"]);
    let mut wants = Vec::new();
    for shared in [false, true] {
        let mut contenders = Vec::new();
        for count in RINGS {
            // Each contender has a poller of its own. One that is not being measured sleeps, with
            // its rings.
            let poller = if shared {
                let builder = Poller::builder();
                let two = processors() > 1;
                Some(if two { builder.cpu(1) } else { builder }.start()?)
            } else {
                None
            };
            contenders.push((Many::start(count, poller.as_ref())?, poller));
        }
        let driven = if shared { "by one poller" } else { "inline" };
        let what = format!("rings, {driven}");
        let row = |table: &mut Table, values: &[&Vec<f64>]| {
            let (mut medians, mut wants) = (Vec::new(), Vec::new());
            for (count, values) in RINGS.iter().zip(values) {
                let label = count.to_string();
                let median = table.row(&[driven, &label], &[values]);
                medians.push((label, median));
            }
            flat(&mut wants, &what, &medians);
            wants
        };
        let time = |many: &mut Many| time_packets(plan.time, 64, || many.turn());
        if !shared {
            let values = take_turns(plan, &mut contenders, |(many, _)| time(many))?;
            wants.extend(row(&mut table, &values.iter().collect::<Vec<_>>()));
            continue;
        }
        let halves =
            rounds::take_turns(plan, &mut contenders, |(many, _)| Ok(Some([time(many)?])))?;
        for half in &halves {
            half.begin(&mut table);
            let values: Vec<_> = half.values.iter().map(|[values]| values).collect();
            wants.extend(half.wants(row(&mut table, &values)));
        }
    }
    Ok((vec![table], wants))
}
