//! How long to wait, and how often to try: [`IdlePolicy`] and [`RetryPolicy`].

use std::thread;
use std::time::Duration;

/// How a thread waits for work: first spinning, then giving up its time slice, then sleeping until
/// the doorbell rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdlePolicy {
    /// Rounds without work that spin.
    pub spins: u32,
    /// Rounds after those that call `yield_now`.
    pub yields: u32,
}

impl Default for IdlePolicy {
    /// Right for the machine, or for the processors that the calling thread is kept on, if it is: on
    /// one or two no spinning, because the other side needs the processor to make the work we wait
    /// for; with more, about ten microseconds of it.
    fn default() -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        if processors <= 2 {
            Self { spins: 0, yields: 16 }
        } else {
            Self { spins: 2000, yields: 8 }
        }
    }
}

impl IdlePolicy {
    /// Sleep at once.
    pub const PARK: IdlePolicy = IdlePolicy { spins: 0, yields: 0 };

    /// Waits out round number `round`; false when it is time to sleep.
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

/// What happens when the device takes fewer writes than it was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in one stall; afterwards what is posted completes with `BufferExhausted`, and
    /// later writes get one attempt each until the device takes something again.
    pub attempts: u32,
    /// Time between attempts.
    pub delay: Duration,
}

impl Default for RetryPolicy {
    /// Ten attempts, 50 microseconds apart: the budget vmnet-helper arrived at for the same stall.
    fn default() -> Self {
        Self { attempts: 10, delay: Duration::from_micros(50) }
    }
}
