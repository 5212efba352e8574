//! Where a network gets its time from.

use core::time::Duration;
use std::time::Instant;

use vmring_core::sync::{AtomicU64, Ordering};

/// The time source of a network, which reads it once per batch.
pub trait Clock: Send + Sync {
    /// Returns the time since some fixed moment. It never goes back.
    fn now(&self) -> Duration;
}

/// The system's monotonic clock.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl SystemClock {
    /// Makes a clock that starts now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A clock for tests: it moves only by [`advance`](Self::advance).
#[derive(Debug)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// Makes a clock that shows zero.
    pub fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Moves the clock forward, in whole milliseconds.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_millis() as u64, Ordering::Relaxed);
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}
