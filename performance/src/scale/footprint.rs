//! The memory that a ring takes, and how long it takes to get a ring.

use std::fs;
use std::time::{Duration, Instant};

use vmring::{Direction, Drive, Driver, Embedded, Interface, Loopback, Ring, RingOp, page_size};

use crate::common::{Null, take_turns};
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;

/// Rings, each on its own interface, among which the memory is divided.
const RINGS: usize = 16;
const DEPTHS: [u32; 2] = [256, 4096];
/// Bytes of an entry of an SQ or a CQ.
const ENTRY: usize = 32;
/// Bytes of an entry in the lists of what is posted to the device.
const POSTED: usize = 40;
/// Cancels in flight, by default.
const CANCELS: usize = 16;
/// Longer than the null device may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Starts in one round.
const STARTS: usize = 5;

pub(super) fn run(plan: Plan) -> Part {
    let (memory, wants) = memory(plan)?;
    Ok((vec![memory, start(plan)?], wants))
}

/// Bytes of memory that this process uses. Memory that earlier rings freed is first returned to the
/// system; otherwise the next rings would seem to need less.
fn resident() -> Result<usize> {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointers, and only returns memory that nothing uses.
    unsafe {
        libc::malloc_trim(0);
    }
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kibibytes.ok_or("/proc/self/status has no VmRSS")?.trim().parse::<usize>()? * 1024)
}

/// The bytes that a ring should take: its queues, the lists of what is posted, its frames.
fn formula(ring: &Ring, depth: usize) -> usize {
    let queue = (2 * depth + CANCELS).next_power_of_two() * ENTRY;
    let frames = ring.pools().iter().map(|pool| {
        let layout = pool.layout();
        (layout.slots as usize * layout.slot_size as usize).next_multiple_of(page_size())
    });
    2 * queue + 2 * depth * POSTED + frames.sum::<usize>()
}

/// A ring whose whole memory has been used.
fn used(depth: usize) -> Result<(Interface, Ring)> {
    let interface = Interface::builder().device(Null).start()?;
    let builder = interface.ring(Direction::Both).drive(Drive::Inline);
    let mut ring = builder.depth(depth as u32).prefault(true).build()?;
    for i in 0..2 * depth {
        let mut frame = ring.alloc().ok_or("the ring has too few frames")?;
        if i % 2 == 0 {
            ring.submit_read(frame, i as u64)?;
        } else {
            frame.copy_from(&[0x5a; 60])?;
            ring.submit_write(frame, i as u64)?;
        }
    }
    // Its queues have the next power of two of cells, so they are twice as long as there are
    // frames. Four times through the frames is twice through the queues.
    let (mut left, end) = (6 * depth, Instant::now() + PATIENCE);
    while left > 0 {
        if Instant::now() > end || ring.wait(1, Some(PATIENCE)) == 0 {
            return Err("the null device completes nothing".into());
        }
        let (mut sq, mut cq) = ring.split();
        for done in cq.reap() {
            left = left.saturating_sub(1);
            let frame = done.take_packet()?;
            match done.op {
                RingOp::Read => sq.submit_read(frame, done.user_data)?,
                _ => sq.submit_write(frame, done.user_data)?,
            }
        }
    }
    Ok((interface, ring))
}

fn memory(plan: Plan) -> Result<(Table, Vec<Want>)> {
    let about = format!("VmRSS that each of {RINGS} rings adds, whose memory is all used");
    let figures = &["KiB a ring", "formula, KiB", "frames' part, KiB"];
    let mut table = Table::new("scale, memory", about, &["depth"], figures);
    let mut wants = Vec::new();
    // What is allocated once for the whole process does not belong to a ring.
    drop(used(DEPTHS[0] as usize)?);
    for depth in DEPTHS.map(|depth| depth as usize) {
        let (mut measured, mut computed, mut frames) = (Vec::new(), 0.0, 0.0);
        for _ in 0..plan.rounds {
            let before = resident()?;
            let mut rings = Vec::with_capacity(RINGS);
            for _ in 0..RINGS {
                rings.push(used(depth)?);
            }
            let added = resident()?.saturating_sub(before);
            measured.push(added as f64 / RINGS as f64 / 1024.0);
            computed = formula(&rings[0].1, depth) as f64 / 1024.0;
            let layout = rings[0].1.pools()[0].layout();
            frames = f64::from(layout.slots) * f64::from(layout.slot_size) / 1024.0;
        }
        let median = table.row(&[&depth.to_string()], &[&measured, &[computed], &[frames]]);
        let what = format!("scale: memory of a ring of depth {depth}, x what the formula says");
        wants.push(Want::at_most(what, median / computed, 1.1));
        let what = format!("scale: what the formula says, x memory of a ring of depth {depth}");
        wants.push(Want::at_most(what, computed / median, 1.1));
    }
    Ok((table, wants))
}

#[derive(Clone, Copy)]
enum Kind {
    Embedded,
    Loopback,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Loopback => "loopback",
        }
    }

    /// Microseconds until there is an interface, and then until it has a ring that takes a frame.
    fn start(self, thread: bool) -> Result<(f64, f64)> {
        fn start(driver: impl Driver + 'static, thread: bool) -> Result<(f64, f64)> {
            let begin = Instant::now();
            let interface = Interface::builder().device(driver).start()?;
            let started = begin.elapsed();
            let drive = if thread { Drive::Thread } else { Drive::Inline };
            let begin = Instant::now();
            let mut ring = interface.ring(Direction::Both).depth(256).drive(drive).build()?;
            let built = begin.elapsed();
            let frame = ring.alloc().ok_or("the ring has too few frames")?;
            ring.submit_read(frame, 0)?;
            Ok((started.as_nanos() as f64 / 1e3, built.as_nanos() as f64 / 1e3))
        }
        match self {
            Self::Embedded => start(Embedded::network("performance-start"), thread),
            Self::Loopback => start(Loopback::new(1500), thread),
        }
    }
}

fn start(plan: Plan) -> Result<Table> {
    let about = "microseconds until an interface is there, and then until a ring of depth 256 is";
    let figures = &["ring us", "interface us", "both us"];
    let mut table = Table::new("scale, start", about, &["interface", "driven"], figures);
    let mut contenders = Vec::new();
    for kind in [Kind::Embedded, Kind::Loopback] {
        for thread in [false, true] {
            contenders.push((kind, thread, Vec::new()));
        }
    }
    let rings = take_turns(plan, &mut contenders, |(kind, thread, interfaces)| {
        let mut sum = (0.0, 0.0);
        for _ in 0..STARTS {
            let (started, built) = kind.start(*thread)?;
            sum = (sum.0 + started / STARTS as f64, sum.1 + built / STARTS as f64);
        }
        interfaces.push(sum.0);
        Ok(sum.1)
    })?;
    for ((kind, thread, interfaces), rings) in contenders.iter().zip(&rings) {
        let both: Vec<f64> = interfaces.iter().zip(rings).map(|(a, b)| a + b).collect();
        let driven = if *thread { "own thread" } else { "inline" };
        table.row(&[kind.name(), driven], &[rings, interfaces, &both]);
    }
    Ok(table)
}
