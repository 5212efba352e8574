//! How long what comes in from the world waits for its guest.

use crate::limits::GUEST_WAIT;

/// How long what has come for a guest waits, because no guest has the address.
#[derive(Debug, Default)]
pub(crate) struct GuestWait {
    /// Since when, in microseconds. 0 is never.
    since: u64,
}

impl GuestWait {
    /// Whether to wait on, now that the guest was looked for. What waits goes on to a guest that is known,
    /// and is refused after [`GUEST_WAIT`].
    pub(crate) fn goes_on(&mut self, is_known: bool, now: u64) -> bool {
        if is_known {
            self.since = 0;
            return false;
        }
        if self.since == 0 {
            self.since = now;
        }
        now < self.since + GUEST_WAIT
    }

    /// Nothing is left that waits. What comes next has its own time.
    pub(crate) fn end(&mut self) {
        self.since = 0;
    }
}
