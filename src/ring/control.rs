//! [`RingControl`]: a handle on a ring that any thread may use.

use std::sync::Arc;

use static_assertions::assert_impl_all;

use crate::error::CloseReason;
use crate::mailbox::{RingShared, request};
use crate::stats::RingStats;

/// A handle on a ring that any thread may use. It wakes a thread that waits, cancels, stops the
/// ring and reads its counters. It does not keep the ring open.
#[derive(Clone, Debug)]
pub struct RingControl {
    pub(super) shared: Arc<RingShared>,
}

assert_impl_all!(RingControl: Send, Sync, Clone);

impl RingControl {
    /// Makes the [`wait`](crate::CompletionQueue::wait) under way return, or the next one if none
    /// is under way. An armed descriptor becomes readable, and an armed waker is woken.
    pub fn wake(&self) {
        self.shared.wake_reaper();
    }

    /// Asks for everything in flight to complete now, as cancelled or with its packet. The ring
    /// stays open. Does not wait.
    pub fn cancel_all(&self) {
        self.shared.request_cancel_all();
    }

    /// Closes the ring as [`CompletionQueue::close`](crate::CompletionQueue::close) does, but does
    /// not wait. What is in flight completes later, and submits are refused with
    /// [`CloseReason::Stopped`] from here on.
    pub fn stop(&self) {
        self.shared.close(CloseReason::Stopped);
        self.shared.request(request::STOP);
    }

    /// Returns why the ring takes no more submissions, or `None` if it is open.
    pub fn closed(&self) -> Option<CloseReason> {
        self.shared.why_closed()
    }

    /// Returns a snapshot of the ring's counters since it was built.
    pub fn stats(&self) -> RingStats {
        self.shared.counters.poller.snapshot()
    }

    /// Returns how many doorbells of submissions had to wake the poller. It does not grow while the
    /// poller is awake.
    pub fn doorbells(&self) -> u64 {
        self.shared.counters.doorbells.get()
    }
}
