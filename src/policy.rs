//! Policies: [`IdlePolicy`] (how a thread waits for work) and [`RetryPolicy`] (how often a write is
//! tried).

use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

/// How a thread waits for work.
///
/// It first spins, then yields its processor, and then sleeps until the doorbell rings. A round is
/// one look for work that finds none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdlePolicy {
    /// How many rounds without work spin ([`spin_loop`](std::hint::spin_loop)).
    pub spins: u32,
    /// How many rounds after those call [`yield_now`](std::thread::yield_now).
    pub yields: u32,
}

impl Default for IdlePolicy {
    /// Returns the policy for the number of processors that this process may use. With one or two
    /// there is no spinning, because the other side needs the processor to produce the work. With
    /// more, a thread spins for about ten microseconds.
    ///
    /// The first call of the process asks the system, on the thread that makes it. Later calls
    /// remember, and so they make no system call: the question opens files, which a process that has
    /// confined itself may not.
    fn default() -> Self {
        static PROCESSORS: OnceLock<usize> = OnceLock::new();
        let ask = || thread::available_parallelism().map_or(1, usize::from);
        if *PROCESSORS.get_or_init(ask) <= 2 {
            Self { spins: 0, yields: 16 }
        } else {
            Self { spins: 2000, yields: 8 }
        }
    }
}

impl IdlePolicy {
    /// Sleeps at once.
    pub const PARK: IdlePolicy = IdlePolicy { spins: 0, yields: 0 };

    /// Waits in round number `round` (from 0). Returns false if it is time to sleep.
    #[inline]
    pub(crate) fn pause(&self, round: u32) -> bool {
        if round < self.spins {
            std::hint::spin_loop();
        } else if round - self.spins < self.yields {
            thread::yield_now();
        } else {
            return false;
        }
        true
    }

    pub(crate) fn rounds(&self) -> u32 {
        self.spins.saturating_add(self.yields)
    }
}

/// How often writes are offered to a device again that did not take them.
///
/// A stall begins when the device takes fewer writes than it was offered. Each write that the
/// device takes begins the count of attempts anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How many attempts are made in one stall. After them the posted writes complete with
    /// [`BufferExhausted`](crate::Status::BufferExhausted), and later writes get one attempt each
    /// until the device takes one again.
    pub attempts: u32,
    /// The time between two attempts.
    pub delay: Duration,
}

impl Default for RetryPolicy {
    /// Returns a policy of ten attempts that are 50 microseconds apart. vmnet-helper has the same
    /// budget for the same stall.
    fn default() -> Self {
        Self { attempts: 10, delay: Duration::from_micros(50) }
    }
}
