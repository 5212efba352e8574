//! Sizes and times of this part, and how a thread waits.

use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use crate::result::Result;

/// Entries that a queue has space for.
pub(crate) const CAPACITY: usize = 256;
/// Entries that are compared before anything is timed, so that each cell of a queue is used twice.
pub(crate) const COMPARED: usize = 4 * CAPACITY;
/// Longer than an entry may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// Turns between two looks at the clock.
pub(crate) const TURNS: u32 = 64;
/// Rounds of spinning before a thread yields its processor.
pub(crate) const SPINS: u32 = 2_000;

/// Waits during rounds without work, but not for ever.
pub(crate) struct Patience {
    rounds: u32,
    /// When the first rounds without work had passed.
    since: Instant,
}

impl Patience {
    pub(crate) fn new() -> Self {
        Self { rounds: 0, since: Instant::now() }
    }

    /// Called once per round. `worked` says whether the round did something.
    #[inline]
    pub(crate) fn turn(&mut self, worked: bool) -> Result<()> {
        if worked {
            self.rounds = 0;
            return Ok(());
        }
        self.rounds += 1;
        if !self.rounds.is_multiple_of(SPINS) {
            hint::spin_loop();
            return Ok(());
        }
        // So the clock is not read in each round that did something.
        if self.rounds == SPINS {
            self.since = Instant::now();
        }
        if self.since.elapsed() > PATIENCE {
            return Err("nothing came back".into());
        }
        thread::yield_now();
        Ok(())
    }
}
