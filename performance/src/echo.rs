//! What an entry costs on its way to another thread and back: a submission with its completion, beside
//! the bare queue of a well-kept crate, a channel, and the kernel's own ring.

use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode};
use vmring::{Direction, Drive, Frame, IdlePolicy, Interface, Loopback, Op, Poller, Ring};

use crate::common::{NULL_LENGTH, Null, pin, pinned, processors, take_turns, time_packets};
use crate::report::{Table, Want};
use crate::{Part, Plan, Result};

const BATCHES: [usize; 4] = [1, 8, 32, 128];
/// Longer than an entry may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Turns between two looks at the clock.
const TURNS: u32 = 64;
/// Rounds of spinning before a thread gives its processor away.
const SPINS: u32 = 2_000;
const LENGTH: usize = 60;

/// What is sent around beside our entries, which have 32 bytes.
type Entry = [u64; 4];

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Rtrb,
    RtrbChunks,
    Channel,
    Nop,
    /// The null device, submitted one by one in the reap loop.
    Null,
    /// The loopback, in the same way.
    Loopback,
    /// The loopback, each kind submitted as one batch.
    LoopbackBatch,
}

impl Way {
    const ALL: [Self; 7] = [
        Self::Rtrb,
        Self::RtrbChunks,
        Self::Channel,
        Self::Nop,
        Self::Null,
        Self::Loopback,
        Self::LoopbackBatch,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Rtrb => "rtrb, one by one",
            Self::RtrbChunks => "rtrb, in chunks",
            Self::Channel => "crossbeam-channel",
            Self::Nop => "io_uring NOP",
            Self::Null => "vmring, null device",
            Self::Loopback => "vmring, loopback",
            Self::LoopbackBatch => "vmring, loopback, in batches",
        }
    }
}

pub(crate) fn run(plan: Plan) -> Part {
    let mut contenders: Vec<(usize, Way)> =
        BATCHES.iter().flat_map(|batch| Way::ALL.map(|way| (*batch, way))).collect();
    let values = pinned(|| {
        take_turns(plan, &mut contenders, |(batch, way)| {
            measure(*way, *batch, plan.time)
                .map_err(|e| format!("echo, {}: {e}", way.name()).into())
        })
    })?;
    let mut table = Table::new(
        "echo",
        "an entry to another thread and back, so many on their way; a packet over the loopback is two",
        &["batch", "contender"],
        &["ns/entry"],
    );
    let mut medians = Vec::new();
    for ((batch, way), values) in contenders.iter().zip(&values) {
        let median = table.row(&[&batch.to_string(), way.name()], &[values]);
        medians.push((*batch, *way, median));
    }
    let of = |wanted: Way| {
        let found = medians.iter().find(|(batch, way, _)| *batch == 32 && *way == wanted);
        found.map_or(f64::NAN, |row| row.2)
    };
    let bare = of(Way::Rtrb).min(of(Way::RtrbChunks));
    let mut wants = Vec::new();
    for ours in [Way::Null, Way::Loopback] {
        let name = ours.name();
        wants.push(Want::at_least(format!("echo, 32: {name}, / rtrb"), bare / of(ours), 0.8));
        let what = format!("echo, 32: {name}, / io_uring NOP");
        wants.push(Want::at_least(what, of(Way::Nop) / of(ours), 8.0));
    }
    Ok((vec![table], wants))
}

fn measure(way: Way, batch: usize, time: Duration) -> Result<f64> {
    match way {
        Way::Rtrb => rtrb(batch, time, false),
        Way::RtrbChunks => rtrb(batch, time, true),
        Way::Channel => channel(batch, time),
        Way::Nop => nop(batch, time),
        Way::Null => ours(batch, time, false, false),
        Way::Loopback => ours(batch, time, true, false),
        Way::LoopbackBatch => ours(batch, time, true, true),
    }
}

/// Waits out a round without work, and not for ever.
struct Patience {
    rounds: u32,
    since: Instant,
}

impl Patience {
    fn new() -> Self {
        Self { rounds: 0, since: Instant::now() }
    }

    fn wait(&mut self) -> Result<()> {
        self.rounds += 1;
        if !self.rounds.is_multiple_of(SPINS) {
            hint::spin_loop();
            return Ok(());
        }
        if self.since.elapsed() > PATIENCE {
            return Err("nothing came back".into());
        }
        thread::yield_now();
        Ok(())
    }
}

/// Two queues between two threads, in each `batch` entries at most.
fn rtrb(batch: usize, time: Duration, chunks: bool) -> Result<f64> {
    let (mut out, mut far_in) = rtrb::RingBuffer::<Entry>::new(256);
    let (mut far_out, mut back) = rtrb::RingBuffer::<Entry>::new(256);
    thread::scope(move |scope| {
        let far = scope.spawn(move || {
            pin(1);
            let mut idle = 0_u32;
            // Until the near end is gone.
            while !far_in.is_abandoned() || !far_in.is_empty() {
                if pass(&mut far_in, &mut far_out, chunks) > 0 {
                    idle = 0;
                } else if idle < SPINS {
                    idle += 1;
                    hint::spin_loop();
                } else {
                    idle = 0;
                    thread::yield_now();
                }
            }
        });
        for i in 0..batch as u64 {
            out.push([i; 4])?;
        }
        let mut patience = Patience::new();
        let ns = time_packets(time, TURNS, || {
            let passed = pass(&mut back, &mut out, chunks);
            if passed == 0 {
                patience.wait()?
            } else {
                patience = Patience::new()
            }
            Ok(passed as u64)
        });
        // All that was sent is still there, each once.
        let mut seen = vec![false; batch];
        let mut patience = Patience::new();
        while seen.contains(&false) {
            match back.pop() {
                Ok([i, ..]) => seen[i as usize] = true,
                Err(_) => patience.wait()?,
            }
        }
        drop(out);
        far.join().map_err(|_| "the far end panicked")?;
        ns
    })
}

/// Everything from one queue into the other.
fn pass(from: &mut rtrb::Consumer<Entry>, to: &mut rtrb::Producer<Entry>, chunks: bool) -> usize {
    if !chunks {
        let mut passed = 0;
        while let Ok(entry) = from.pop() {
            if to.push(entry).is_err() {
                break;
            }
            passed += 1;
        }
        return passed;
    }
    let count = from.slots().min(to.slots());
    if count == 0 {
        return 0;
    }
    let (Ok(entries), Ok(room)) = (from.read_chunk(count), to.write_chunk_uninit(count)) else {
        return 0;
    };
    room.fill_from_iter(entries)
}

fn channel(batch: usize, time: Duration) -> Result<f64> {
    let (out, far_in) = crossbeam_channel::bounded::<Entry>(256);
    let (far_out, back) = crossbeam_channel::bounded::<Entry>(256);
    thread::scope(move |scope| {
        let far = scope.spawn(move || {
            pin(1);
            while let Ok(entry) = far_in.recv() {
                if far_out.send(entry).is_err() {
                    break;
                }
            }
        });
        for i in 0..batch as u64 {
            out.send([i; 4])?;
        }
        let ns = time_packets(time, TURNS, || {
            out.send(back.recv_timeout(PATIENCE)?)?;
            Ok(1)
        });
        drop((out, back));
        far.join().map_err(|_| "the far end panicked")?;
        ns
    })
}

fn nop(batch: usize, time: Duration) -> Result<f64> {
    let mut ring = IoUring::new(256)?;
    time_packets(time, TURNS, || {
        for i in 0..batch as u64 {
            let entry = opcode::Nop::new().build().user_data(i);
            // SAFETY: a NOP has no buffers.
            unsafe { ring.submission().push(&entry)? };
        }
        ring.submit_and_wait(batch)?;
        let done = ring.completion().filter(|done| done.result() == 0).count();
        if done == batch {
            Ok(done as u64)
        } else {
            Err(format!("{done} of {batch} came back").into())
        }
    })
}

/// A ring whose poller has the other processor; packets over the loopback, or reads of nothing.
fn ours(batch: usize, time: Duration, loopback: bool, batches: bool) -> Result<f64> {
    let idle = IdlePolicy { spins: SPINS, yields: 1_000 };
    let poller = Poller::builder().idle(idle);
    let poller = if processors() > 1 { poller.cpu(1) } else { poller }.start()?;
    let builder = Interface::builder();
    let interface = match loopback {
        true => builder.device(Loopback::new(1500)).start()?,
        false => builder.device(Null).start()?,
    };
    let ring = interface.ring(Direction::Both).depth(256).prefault(true);
    let mut ring = ring.drive(Drive::Shared(&poller)).build()?;
    let packet: Vec<u8> = (0..LENGTH as u8).collect();
    for i in 0..batch as u64 {
        let frame = ring.alloc().ok_or("a fresh ring has free frames")?;
        ring.submit_read(frame, i)?;
        if loopback {
            let mut frame = ring.alloc().ok_or("a fresh ring has free frames")?;
            frame.copy_from(&packet)?;
            ring.submit_write(frame, i)?;
        }
    }
    let mut patience = Patience::new();
    let mut lists = (Vec::with_capacity(256), Vec::with_capacity(256));
    let ns = time_packets(time, TURNS, || {
        let done = if batches { in_batches(&mut ring, &mut lists)? } else { turn(&mut ring)? };
        if done == 0 {
            patience.wait()?
        } else {
            patience = Patience::new()
        }
        Ok(done)
    })?;
    // Nothing was lost, and what came is what was sent.
    let mut back = 0;
    let in_flight = ring.in_flight();
    let end = Instant::now() + PATIENCE;
    while back < in_flight.min(batch) && Instant::now() < end {
        for done in ring.reap() {
            let read = done.op == Op::Read;
            let frame = done.frame_ok()?;
            if frame.len() != LENGTH || (loopback && read && frame[..] != packet[..]) {
                return Err("a packet is not what was sent".into());
            }
            back += 1;
        }
        thread::yield_now();
    }
    let expected = if loopback { 2 * batch } else { batch };
    if back < in_flight.min(batch) || in_flight != expected {
        return Err(format!("{in_flight} of {expected} entries are in flight").into());
    }
    Ok(ns)
}

/// The hot loop, as a user writes it.
#[inline]
fn turn(ring: &mut Ring) -> Result<u64> {
    let (mut sq, mut cq) = ring.split();
    let mut done = 0;
    for completion in cq.reap() {
        let frame = completion.frame_ok()?;
        if frame.len() != NULL_LENGTH {
            return Err("a packet of another length".into());
        }
        match completion.op {
            Op::Read => sq.submit_read(frame, completion.user_data)?,
            _ => sq.submit_write(frame, completion.user_data)?,
        }
        done += 1;
    }
    Ok(done)
}

/// Frames to submit.
type Entries = Vec<(Frame, u64)>;

/// The same, with one submission for the reads and one for the writes.
#[inline]
fn in_batches(ring: &mut Ring, (reads, writes): &mut (Entries, Entries)) -> Result<u64> {
    let (mut sq, mut cq) = ring.split();
    for completion in cq.reap() {
        let list = if completion.op == Op::Read { &mut *reads } else { &mut *writes };
        list.push((completion.frame_ok()?, completion.user_data));
    }
    let done = (reads.len() + writes.len()) as u64;
    if done > 0 {
        sq.submit_reads(reads.drain(..))?;
        sq.submit_writes(writes.drain(..))?;
    }
    Ok(done)
}
