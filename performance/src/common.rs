//! What several parts need: taking turns, timing them, pinning a thread to a processor, and a
//! device that costs nothing.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vmring::device::{Capabilities, Device, PollContext, Progress, Queue, QueueConfig, Wake};
use vmring::{Driver, InterfaceConfig, InterfaceInfo, MacAddr6, Status};

use crate::plan::Plan;
use crate::result::Result;

/// Lets all contenders take turns, as often as the plan says. Returns the values of each, in order.
pub(crate) fn take_turns<C>(
    plan: Plan,
    contenders: &mut [C],
    mut measure: impl FnMut(&mut C) -> Result<f64>,
) -> Result<Vec<Vec<f64>>> {
    let mut values = vec![Vec::new(); contenders.len()];
    for _ in 0..plan.rounds {
        for (contender, values) in contenders.iter_mut().zip(&mut values) {
            values.push(measure(contender)?);
        }
    }
    Ok(values)
}

/// Whether the calling thread runs before all others, at a real-time priority.
pub(crate) fn is_real_time() -> bool {
    // SAFETY: the call takes a number only; 0 is the calling thread.
    let policy = unsafe { libc::sched_getscheduler(0) } & !libc::SCHED_RESET_ON_FORK;
    [libc::SCHED_FIFO, libc::SCHED_RR].contains(&policy)
}

/// The number of processors that this program had when it first asked. A thread that is pinned has
/// only one.
pub(crate) fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Pins the calling thread to one processor if there are at least two. Otherwise, and where the
/// system refuses, nothing happens.
pub(crate) fn pin(processor: usize) {
    if processors() < 2 {
        return;
    }
    // SAFETY: a cpu_set_t is a plain bit set, for which all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: 0 and 1 are within the set.
    unsafe { libc::CPU_SET(processor % 2, &mut set) };
    // SAFETY: the pointer and size are those of the set; 0 is the calling thread.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
}

/// Runs `body` on a thread of its own that is pinned to the first processor. So threads that other
/// parts start do not inherit the pinning.
pub(crate) fn pinned<T: Send>(body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin(0);
            body()
        });
        thread.join().unwrap_or_else(|_| Err("a measuring thread panicked".into()))
    })
}

/// Nanoseconds per packet. Takes turns for `time`; each turn says how many packets it carried. The
/// clock is read once in `turns` of them, and the first `turns` are not measured.
pub(crate) fn time_packets(
    time: Duration,
    turns: u32,
    mut turn: impl FnMut() -> Result<u64>,
) -> Result<f64> {
    for _ in 0..turns {
        turn()?;
    }
    let (start, mut packets) = (Instant::now(), 0);
    loop {
        for _ in 0..turns {
            packets += turn()?;
        }
        let passed = start.elapsed();
        if passed >= time {
            if packets == 0 {
                return Err("no packet came back".into());
            }
            return Ok(passed.as_nanos() as f64 / packets as f64);
        }
    }
}

/// A device that completes every slot at once and touches no byte, so that only the rings are
/// measured.
pub(crate) struct Null;

/// The length in bytes of every packet that the null device reads.
pub(crate) const NULL_LENGTH: usize = 60;

impl Driver for Null {
    fn start(
        self: Box<Self>,
        config: &InterfaceConfig,
    ) -> std::result::Result<Arc<dyn Device>, vmring::Error> {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, 1);
        Ok(Arc::new(NullDevice(InterfaceInfo::new(config, mac, 1500, 1514))))
    }
}

struct NullDevice(InterfaceInfo);

impl Device for NullDevice {
    fn name(&self) -> &str {
        "null"
    }

    fn info(&self) -> InterfaceInfo {
        self.0.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(1500, 1514)
    }

    fn queue(&self, _: QueueConfig, _: Wake) -> std::result::Result<Box<dyn Queue>, vmring::Error> {
        Ok(Box::new(NullQueue))
    }
}

struct NullQueue;

impl Queue for NullQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> std::result::Result<Progress, Status> {
        while let Some(slot) = cx.take_read() {
            cx.complete_read(slot, NULL_LENGTH);
        }
        while let Some(slot) = cx.take_write() {
            cx.complete_write(slot);
        }
        Ok(Progress::Idle)
    }
}
