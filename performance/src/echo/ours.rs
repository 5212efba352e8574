//! A ring whose poller is on the other processor: packets over the loopback, or reads of nothing.

use std::time::Duration;

use vmring::{Direction, Drive, Frame, IdlePolicy, Interface, Loopback, Poller, Ring, RingOp};

use super::limits::{CAPACITY, COMPARED, PATIENCE, Patience, SPINS, TURNS};
use crate::common::{NULL_LENGTH, Null, processors, time_packets};
use crate::result::Result;

const LENGTH: usize = NULL_LENGTH;

#[derive(Clone, Copy, PartialEq)]
pub(super) struct Kind {
    pub(super) loopback: bool,
    /// Whether entries are submitted a batch at a time. Otherwise the reap loop submits them one by
    /// one.
    pub(super) batches: bool,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match (self.loopback, self.batches) {
            (false, false) => "vmring, null device",
            (false, true) => "vmring, null device, in batches",
            (true, false) => "vmring, loopback",
            (true, true) => "vmring, loopback, in batches",
        }
    }
}

/// The contents of packet `number`.
fn packet(number: u64) -> [u8; LENGTH] {
    std::array::from_fn(|at| (at as u64 + 7 * number) as u8)
}

pub(super) fn measure(kind: Kind, batch: usize, time: Duration) -> Result<f64> {
    let idle = IdlePolicy { spins: SPINS, yields: 1_000 };
    let poller = Poller::builder().idle(idle);
    let poller = if processors() > 1 { poller.cpu(1) } else { poller }.start()?;
    let builder = Interface::builder();
    let interface = match kind.loopback {
        true => builder.device(Loopback::new(1500)).start()?,
        false => builder.device(Null).start()?,
    };
    let ring = interface.ring(Direction::Both).depth(CAPACITY as u32).prefault(true);
    let mut ring = ring.drive(Drive::Shared(&poller)).build()?;
    for i in 0..batch as u64 {
        let frame = ring.alloc().ok_or("a fresh ring has too few frames")?;
        ring.submit_read(frame, i)?;
        if kind.loopback {
            let mut frame = ring.alloc().ok_or("a fresh ring has too few frames")?;
            frame.copy_from(&packet(i))?;
            ring.submit_write(frame, i)?;
        }
    }
    let mut reads = 0;
    let entries = if kind.loopback { 2 * batch } else { batch };
    check(&mut ring, kind, batch, &mut reads, COMPARED.next_multiple_of(entries))?;
    let mut lists = (Vec::with_capacity(CAPACITY), Vec::with_capacity(CAPACITY));
    let mut patience = Patience::new();
    let ns = time_packets(time, TURNS, || {
        let done = match (kind.loopback, kind.batches) {
            (loopback, false) => one_by_one(&mut ring, loopback, &mut reads)?,
            (false, true) => reads_in_batches(&mut ring, &mut reads)?,
            (true, true) => both_in_batches(&mut ring, &mut lists, &mut reads)?,
        };
        patience.turn(done > 0)?;
        Ok(done)
    })?;
    // Nothing was lost, and what arrives is still what is sent.
    if ring.in_flight() != entries {
        return Err(format!("{} of {entries} entries are in flight", ring.in_flight()).into());
    }
    check(&mut ring, kind, batch, &mut reads, 2 * entries)?;
    Ok(ns)
}

/// Checks this many entries: the numbers must be in order, and the packets as they were sent.
fn check(
    ring: &mut Ring,
    kind: Kind,
    batch: usize,
    reads: &mut u64,
    mut entries: usize,
) -> Result<()> {
    while entries > 0 {
        if ring.wait(1, Some(PATIENCE)) == 0 {
            return Err("nothing came back".into());
        }
        let (mut sq, mut cq) = ring.split();
        for done in cq.reap() {
            let number = done.user_data;
            let frame = done.take_packet()?;
            entries = entries.saturating_sub(1);
            if done.op != RingOp::Read {
                sq.submit_read(frame, number)?;
                continue;
            }
            // Packets and reads go around in the same order, so each read gets the packet with its
            // own number.
            let expected = *reads % batch as u64;
            *reads += 1;
            if (number, frame.len()) != (expected, LENGTH) {
                return Err(format!("read {number} of {} B, not {expected}", frame.len()).into());
            }
            if kind.loopback && frame[..] != packet(number) {
                return Err(format!("packet {number} came back changed").into());
            }
            match kind.loopback {
                true => sq.submit_write(frame, number)?,
                false => sq.submit_read(frame, number)?,
            }
        }
    }
    Ok(())
}

/// The hot loop, as a user writes it. Over the loopback, what was read is written, and the frame of
/// what was written takes the next packet. So as many packets stay in flight as at first, and none
/// waits in the device for a read, which would mean a second copy.
#[inline]
fn one_by_one(ring: &mut Ring, loopback: bool, reads: &mut u64) -> Result<u64> {
    let (mut sq, mut cq) = ring.split();
    let mut done = 0;
    for completion in cq.reap() {
        let frame = completion.take_packet()?;
        if frame.len() != LENGTH {
            return Err("a packet of another length".into());
        }
        match completion.op {
            RingOp::Read => {
                *reads += 1;
                match loopback {
                    true => sq.submit_write(frame, completion.user_data)?,
                    false => sq.submit_read(frame, completion.user_data)?,
                }
            }
            _ => sq.submit_read(frame, completion.user_data)?,
        }
        done += 1;
    }
    Ok(done)
}

/// Only reads: everything that is reaped is one submission.
#[inline]
fn reads_in_batches(ring: &mut Ring, reads: &mut u64) -> Result<u64> {
    let (mut sq, mut cq) = ring.split();
    // A read that failed is missing from those in flight, which are counted at the end.
    let frames = cq.reap().filter_map(|done| {
        let frame = done.take_packet().ok().filter(|frame| frame.len() == LENGTH)?;
        Some((frame, done.user_data))
    });
    let done = sq.submit_reads(frames)? as u64;
    *reads += done;
    Ok(done)
}

/// Frames to submit.
type Entries = Vec<(Frame, u64)>;

/// The same, with one submission for the reads and one for the writes.
#[inline]
fn both_in_batches(
    ring: &mut Ring,
    (to_read, to_write): &mut (Entries, Entries),
    reads: &mut u64,
) -> Result<u64> {
    let (mut sq, mut cq) = ring.split();
    for completion in cq.reap() {
        let frame = completion.take_packet()?;
        if frame.len() != LENGTH {
            return Err("a packet of another length".into());
        }
        let read = completion.op == RingOp::Read;
        *reads += u64::from(read);
        let list = if read { &mut *to_write } else { &mut *to_read };
        list.push((frame, completion.user_data));
    }
    let done = (to_read.len() + to_write.len()) as u64;
    if done > 0 {
        sq.submit_reads(to_read.drain(..))?;
        sq.submit_writes(to_write.drain(..))?;
    }
    Ok(done)
}
