//! [`Idle`]: how a thread waits before it lets a device sleep.

use std::thread;

use vmring::IdlePolicy;

use crate::net::device::{NetSettings, Progress};

/// Counts polls that move nothing. A sleep and the kick that ends it cost several microseconds on both
/// sides, so a thread looks a few times more before it sleeps.
#[derive(Debug)]
pub(super) struct Idle {
    policy: IdlePolicy,
    /// Whether it never lets the device sleep.
    busy_poll: bool,
    rounds: u32,
}

impl Idle {
    pub(super) fn new(settings: &NetSettings) -> Self {
        Self { policy: settings.idle, busy_poll: settings.busy_poll, rounds: 0 }
    }

    /// Waits a little after a poll. Returns whether to poll again at once.
    pub(super) fn stays_awake(&mut self, progress: &Progress) -> bool {
        if progress.moved || progress.again {
            self.rounds = 0;
            return progress.again || self.pause();
        }
        self.pause()
    }

    fn pause(&mut self) -> bool {
        let IdlePolicy { spins, yields } = self.policy;
        let round = self.rounds;
        if round < spins {
            std::hint::spin_loop();
        } else if round - spins < yields {
            thread::yield_now();
        } else if self.busy_poll {
            // Another guest's thread may be on the same processor.
            thread::yield_now();
            return true;
        } else {
            // The next round without work after a wake-up sleeps at once.
            return false;
        }
        self.rounds += 1;
        true
    }
}
