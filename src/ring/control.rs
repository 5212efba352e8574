//! [`RingControl`]: a handle on a ring for any thread.

use std::sync::Arc;

use static_assertions::assert_impl_all;
use vmring_core::sync::Ordering;

use crate::error::CloseReason;
use crate::mailbox::{RingShared, request};
use crate::stats::RingStats;

/// A handle on a ring for any thread: wakes a blocked `wait`, stops the ring, reads its counters.
/// Does not keep the ring alive.
#[derive(Clone, Debug)]
pub struct RingControl {
    pub(super) shared: Arc<RingShared>,
}

assert_impl_all!(RingControl: Send, Sync, Clone);

impl RingControl {
    /// Makes the `wait` under way return, or the next one if none is.
    pub fn wake(&self) {
        self.shared.woken.store(true, Ordering::Release);
        self.shared.notify();
    }

    /// Asks for everything in flight to complete as cancelled; the ring stays open. Does not wait.
    pub fn cancel_all(&self) {
        self.shared.request_cancel_all();
    }

    /// Closes the ring as [`CompletionQueue::close`] does, but does not wait: the completions of
    /// what was in flight come in their time, and submits say [`CloseReason::Stopped`].
    pub fn stop(&self) {
        self.shared.close(CloseReason::Stopped);
        self.shared.request(request::STOP);
    }

    /// Why the ring takes no more submissions, or `None` if it does.
    pub fn closed(&self) -> Option<CloseReason> {
        self.shared.why_closed()
    }

    /// Counters of the ring so far.
    pub fn stats(&self) -> RingStats {
        self.shared.counters.poller.snapshot()
    }

    /// Doorbells that had to wake the poller. None are rung while it is awake.
    pub fn doorbells(&self) -> u64 {
        self.shared.counters.doorbells.get()
    }
}
