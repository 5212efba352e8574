//! What the rings cost alone: one thread, and a device that does nothing.

use std::time::Duration;

use vmring::{Direction, Drive, Interface, Ring};

use crate::common::{NULL_LENGTH, Null, pinned, take_turns, time_packets};
use crate::plan::{Part, Plan};
use crate::queues::{Entry, Queues};
use crate::report::{Table, Want};
use crate::result::Result;

const TURNS: u32 = 256;
/// The longest time per packet in ns, by batch.
const WANTED: [(u64, f64); 2] = [(1, 40.0), (32, 12.0)];

#[derive(Clone, Copy, PartialEq)]
enum Method {
    OneByOne,
    OneBatch,
    Bare,
}

impl Method {
    const ALL: [Self; 3] = [Self::OneByOne, Self::OneBatch, Self::Bare];

    fn name(self) -> &'static str {
        match self {
            Self::OneByOne => "vmring, one by one",
            Self::OneBatch => "vmring, as one batch",
            Self::Bare => "two rtrb queues and no device",
        }
    }

    /// For our methods, whether a batch is one submission.
    fn as_one_batch(self) -> Option<bool> {
        match self {
            Self::OneByOne => Some(false),
            Self::OneBatch => Some(true),
            Self::Bare => None,
        }
    }
}

/// Only moves entries from one queue to the other and back.
fn bare(batch: u64, time: Duration) -> Result<f64> {
    let mut queues = Queues::new(64);
    queues.fill(batch as u32)?;
    time_packets(time, TURNS, || {
        let waiting = queues.waiting();
        queues.complete(waiting, |entry| Entry { length: NULL_LENGTH as u32, ..entry })?;
        let mut right = true;
        let done = queues.turn(waiting, |entry| {
            right &= entry.length == NULL_LENGTH as u32;
            Entry { length: 0, ..entry }
        })?;
        if right { Ok(done as u64) } else { Err("an entry of another length".into()) }
    })
}

pub(crate) fn run(plan: Plan) -> Part {
    let mut contenders: Vec<(u64, Method)> =
        WANTED.iter().flat_map(|(batch, _)| Method::ALL.map(|method| (*batch, method))).collect();
    let mut instructions: Vec<Vec<f64>> = vec![Vec::new(); contenders.len()];
    let mut counted = instructions.iter_mut();
    let values = pinned(|| {
        for (batch, method) in &contenders {
            let Some(list) = counted.next() else { break };
            if let Some(one) = method.as_one_batch() {
                list.extend(count(*batch, one)?);
            }
        }
        take_turns(plan, &mut contenders, |(batch, method)| {
            let Some(one) = method.as_one_batch() else { return bare(*batch, plan.time) };
            let mut ring = ring(*batch)?;
            let ns = time_packets(plan.time, TURNS, || turn(&mut ring, one))?;
            // What was posted must still be posted: none was lost on the way.
            match ring.in_flight() as u64 {
                all if all == *batch => Ok(ns),
                some => Err(format!("inline: {some} of {batch} reads are in flight").into()),
            }
        })
    })?;
    let mut table = Table::new(
        "inline",
        "a read posted and reaped by one thread, over a device that does nothing",
        &["batch", "contender"],
        &["ns/packet", "instructions"],
    );
    let mut wants = Vec::new();
    for (((batch, method), values), counts) in contenders.iter().zip(&values).zip(&instructions) {
        let name = method.name();
        let median = table.row(&[&batch.to_string(), name], &[values, counts]);
        let wanted = WANTED.iter().find(|(of, _)| of == batch && *method != Method::Bare);
        if let Some((_, most)) = wanted {
            let name = format!("inline, {batch}, {name}: ns a packet");
            wants.push(Want::at_most(name, median, *most));
        }
    }
    Ok((vec![table], wants))
}

fn ring(batch: u64) -> Result<Ring> {
    let interface = Interface::builder().device(Null).start()?;
    let ring = interface.ring(Direction::Read).depth(64).prefault(true);
    let mut ring = ring.drive(Drive::Inline).build()?;
    for i in 0..batch {
        let frame = ring.alloc().ok_or("a fresh ring has free frames")?;
        ring.submit_read(frame, i)?;
    }
    Ok(ring)
}

#[inline]
fn turn(ring: &mut Ring, one: bool) -> Result<u64> {
    let (mut sq, mut cq) = ring.split();
    if one {
        let mut wrong = false;
        let frames = cq.reap().filter_map(|done| {
            let frame = done.take_packet().ok().filter(|frame| frame.len() == NULL_LENGTH);
            wrong |= frame.is_none();
            Some((frame?, done.user_data))
        });
        let count = sq.submit_reads(frames)? as u64;
        return if wrong { Err("a packet is not as it should be".into()) } else { Ok(count) };
    }
    let mut count = 0;
    for done in cq.reap() {
        let frame = done.take_packet()?;
        if frame.len() != NULL_LENGTH {
            return Err("a packet of another length".into());
        }
        sq.submit_read(frame, done.user_data)?;
        count += 1;
    }
    Ok(count)
}

/// Instructions per packet by the processor's own counter. `None` if we may not use it, as in many
/// virtual machines. (`.ci/instructions` counts them by simulation.)
fn count(batch: u64, one: bool) -> Result<Option<f64>> {
    const PACKETS: u64 = 100_000;
    let mut ring = ring(batch)?;
    let Some(counter) = Counter::open() else { return Ok(None) };
    turn(&mut ring, one)?;
    let (mut packets, before) = (0, counter.read());
    while packets < PACKETS {
        packets += turn(&mut ring, one)?;
    }
    let counted = counter.read().zip(before).map(|(after, before)| after - before);
    Ok(counted.filter(|count| *count > 0).map(|count| count as f64 / packets as f64))
}

/// The instructions that this thread has executed in user space.
struct Counter(std::fs::File);

impl Counter {
    fn open() -> Option<Self> {
        use std::os::fd::FromRawFd;
        const HARDWARE: u32 = 0;
        const INSTRUCTIONS: u64 = 1;
        /// `exclude_kernel` and `exclude_hv` of `struct perf_event_attr`.
        const USER_ONLY: u64 = 1 << 5 | 1 << 6;
        // The first fields of `struct perf_event_attr` in its oldest size: type, size, config, then
        // four words. The last but one of these is the flags (perf_event_open(2)).
        let mut attributes = [0_u64; 8];
        attributes[0] = u64::from(HARDWARE) | (size_of_val(&attributes) as u64) << 32;
        attributes[1] = INSTRUCTIONS;
        attributes[5] = USER_ONLY;
        // SAFETY: the pointer is to a structure of the size that it states. The other arguments ask
        // for this thread, any processor, no group, no flags.
        let fd = unsafe {
            libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0_u64)
        };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the system has just given us this descriptor, and nothing else owns it.
        Some(Self(unsafe { std::fs::File::from_raw_fd(fd) }))
    }

    fn read(&self) -> Option<u64> {
        use std::io::Read;
        let mut bytes = [0; 8];
        (&self.0).read_exact(&mut bytes).ok()?;
        Some(u64::from_ne_bytes(bytes))
    }
}
