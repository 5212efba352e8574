//! What goes there and back in comparison: entries of the same size as ours, and as many in flight.

use std::hint;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, opcode};

use super::limits::{CAPACITY, COMPARED, PATIENCE, Patience, SPINS, TURNS};
use crate::common::{pin, time_packets};
use crate::result::Result;

/// Our entries have 32 bytes, too.
type Entry = [u64; 4];

/// The entry that goes around as number `n` of all. The entries stay in order.
fn entry(n: usize, batch: usize) -> Entry {
    [(n % batch) as u64; 4]
}

/// Returns an error if this is not the entry with number `n`.
fn compare(came: Entry, n: usize, batch: usize) -> Result<()> {
    if came == entry(n, batch) { Ok(()) } else { Err(format!("entry {n} came as {came:?}").into()) }
}

/// Two queues between two threads, with `batch` entries in flight.
pub(super) fn rtrb(batch: usize, time: Duration, chunks: bool) -> Result<f64> {
    let (mut out, mut far_in) = rtrb::RingBuffer::<Entry>::new(CAPACITY);
    let (mut far_out, mut back) = rtrb::RingBuffer::<Entry>::new(CAPACITY);
    thread::scope(move |scope| {
        let far = scope.spawn(move || {
            pin(1);
            let mut idle = 0_u32;
            // Runs until the near end is gone.
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
        for n in 0..batch {
            out.push(entry(n, batch))?;
        }
        let mut patience = Patience::new();
        let mut next = |back: &mut rtrb::Consumer<Entry>| -> Result<Entry> {
            loop {
                let came = back.pop();
                patience.turn(came.is_ok())?;
                if let Ok(entry) = came {
                    return Ok(entry);
                }
            }
        };
        for n in 0..COMPARED.next_multiple_of(batch) {
            let entry = next(&mut back)?;
            compare(entry, n, batch)?;
            out.push(entry)?;
        }
        let (mut passed, mut timed) = (0, Patience::new());
        let ns = time_packets(time, TURNS, || {
            let now = pass(&mut back, &mut out, chunks);
            timed.turn(now > 0)?;
            passed += now;
            Ok(now as u64)
        })?;
        // Everything that was sent is still there, in order.
        for n in passed..passed + batch {
            compare(next(&mut back)?, n, batch)?;
        }
        drop(out);
        far.join().map_err(|_| "the far end panicked")?;
        Ok(ns)
    })
}

/// Moves everything from one queue into the other.
fn pass(from: &mut rtrb::Consumer<Entry>, to: &mut rtrb::Producer<Entry>, chunks: bool) -> usize {
    if !chunks {
        let mut passed = 0;
        while let Ok(entry) = from.pop() {
            if to.push(entry).is_err() {
                // This is impossible, because both queues have space for all. The check at the end
                // would find it.
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
    let (Ok(entries), Ok(chunk)) = (from.read_chunk(count), to.write_chunk_uninit(count)) else {
        return 0;
    };
    chunk.fill_from_iter(entries)
}

pub(super) fn channel(batch: usize, time: Duration) -> Result<f64> {
    let (out, far_in) = crossbeam_channel::bounded::<Entry>(CAPACITY);
    let (far_out, back) = crossbeam_channel::bounded::<Entry>(CAPACITY);
    thread::scope(move |scope| {
        let far = scope.spawn(move || {
            pin(1);
            while let Ok(entry) = far_in.recv() {
                if far_out.send(entry).is_err() {
                    break;
                }
            }
        });
        for n in 0..batch {
            out.send(entry(n, batch))?;
        }
        for n in 0..COMPARED.next_multiple_of(batch) {
            let entry = back.recv_timeout(PATIENCE)?;
            compare(entry, n, batch)?;
            out.send(entry)?;
        }
        let mut passed = 0;
        let ns = time_packets(time, TURNS, || {
            out.send(back.recv_timeout(PATIENCE)?)?;
            passed += 1;
            Ok(1)
        })?;
        for n in passed..passed + batch {
            compare(back.recv_timeout(PATIENCE)?, n, batch)?;
        }
        drop((out, back));
        far.join().map_err(|_| "the far end panicked")?;
        Ok(ns)
    })
}

pub(super) fn nop(batch: usize, time: Duration) -> Result<f64> {
    let mut ring = IoUring::new(CAPACITY as u32)?;
    let mut turn = |mut see: Option<&mut Vec<u64>>| -> Result<u64> {
        for n in 0..batch as u64 {
            let entry = opcode::Nop::new().build().user_data(n);
            // SAFETY: a NOP has no buffers.
            unsafe { ring.submission().push(&entry)? };
        }
        ring.submit_and_wait(batch)?;
        let mut done = 0;
        for completion in ring.completion() {
            done += u64::from(completion.result() == 0);
            if let Some(seen) = &mut see {
                seen.push(completion.user_data());
            }
        }
        if done == batch as u64 {
            Ok(done)
        } else {
            Err(format!("{done} of {batch} came back").into())
        }
    };
    for _ in 0..COMPARED / batch {
        let mut seen = Vec::with_capacity(batch);
        turn(Some(&mut seen))?;
        seen.sort_unstable();
        if !seen.iter().copied().eq(0..batch as u64) {
            return Err(format!("these came back: {seen:?}").into());
        }
    }
    time_packets(time, TURNS, || turn(None))
}
