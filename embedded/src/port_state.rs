//! The part of a port that other threads reach.

use vmring_core::sync::AtomicU32;

use crate::policy::PolicyState;
use crate::receive_queue::ReceiveQueues;
use crate::stats::{PortCounters, PortStats};

/// The part of a port that other threads reach. It is kept when the port leaves, and reused.
pub(crate) struct PortState<B> {
    pub(crate) queues: ReceiveQueues<B>,
    /// Increases when a port leaves, so that an old [`Monitor`](crate::port::Monitor) sees that the
    /// counters are another port's.
    pub(crate) generation: AtomicU32,
    pub(crate) policy: PolicyState,
    pub(crate) counters: PortCounters,
}

impl<B> PortState<B> {
    pub(crate) fn new() -> Self {
        Self {
            queues: ReceiveQueues::new(),
            generation: AtomicU32::new(0),
            policy: PolicyState::default(),
            counters: PortCounters::default(),
        }
    }

    pub(crate) fn stats(&self) -> PortStats {
        self.counters.stats(self.queues.received())
    }
}
