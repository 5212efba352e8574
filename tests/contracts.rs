//! The contracts. Each has a test of its name, in a module by subject. Closing, polling and waking
//! are in `close`, `pollers` and `notify`.

mod cancel;
mod config;
mod credits;
mod device;
mod guests;
mod interfaces;
pub(crate) mod merging;
mod order;
mod ownership;
mod peek;
mod retry;
mod skip_success;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use vmring::device::{Capabilities, PollContext, Progress};
use vmring::{Interface, Pool, PoolBuilder, RetryPolicy, Ring};

use crate::support::{Script, ScriptQueue};

/// Retries without end, for tests whose stalls are meant to end.
const PATIENT: RetryPolicy = RetryPolicy { attempts: u32::MAX, delay: Duration::from_micros(50) };

fn pool(frames: usize) -> Pool {
    PoolBuilder::new(frames, 1514).build().expect("a pool")
}

fn full(cx: &mut PollContext<'_>) -> usize {
    cx.writes()
}

fn credits(ring: &mut Ring) -> (u32, u32) {
    let (mut sq, _) = ring.split();
    (sq.read_credits(), sq.write_credits())
}

/// A device that takes as many writes per call as the test says. It counts the calls that offered
/// writes.
#[derive(Clone, Default)]
struct Gate {
    open: Arc<AtomicUsize>,
    offers: Arc<AtomicU64>,
    /// How many reads it completes per call, each with 60 bytes that it does not write.
    reads: Arc<AtomicUsize>,
}

impl Gate {
    fn start(&self) -> Interface {
        self.start_with(|_| ())
    }

    fn start_with(&self, limits: fn(&mut Capabilities)) -> Interface {
        let gate = self.clone();
        Script::new(move |_, _| {
            let gate = gate.clone();
            ScriptQueue::new(move |cx| {
                if full(cx) > 0 {
                    gate.offers.fetch_add(1, Ordering::SeqCst);
                }
                for _ in 0..gate.open.load(Ordering::SeqCst) {
                    let Some(slot) = cx.take_write() else { break };
                    cx.complete_write(slot);
                }
                for _ in 0..gate.reads.load(Ordering::SeqCst) {
                    let Some(slot) = cx.take_read() else { break };
                    cx.complete_read(slot, 60);
                }
                Ok(Progress::Idle)
            })
        })
        .limits(limits)
        .start()
    }

    fn take(&self, writes: usize) {
        self.open.store(writes, Ordering::SeqCst);
    }

    fn offers(&self) -> u64 {
        self.offers.swap(0, Ordering::SeqCst)
    }
}
