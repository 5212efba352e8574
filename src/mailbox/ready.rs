//! The set of a poller's rings that have work.

use crossbeam_utils::CachePadded;
use vmring_core::doorbell::Doorbell;
use vmring_core::sync::{AtomicBool, AtomicU64, Ordering};

use crate::limits::RINGS_PER_POLLER_MAX;
use crate::notify::Notifier;

/// The part of a poller that other threads use, to say that a ring has work and to wake the poller.
#[derive(Debug)]
pub(crate) struct ReadySet {
    pub(crate) bell: Doorbell<Notifier>,
    /// The rings whose doorbell was rung: a bit each.
    ready: Box<[AtomicU64]>,
    /// The words of `ready` that may have a bit set: a bit each.
    words: CachePadded<AtomicU64>,
    /// Whether there are new engines, or the poller's handle was dropped.
    pub(crate) arrived: AtomicBool,
}

impl ReadySet {
    pub(crate) fn new() -> Self {
        Self {
            bell: Doorbell::new(Notifier::default()),
            ready: (0..RINGS_PER_POLLER_MAX / 64).map(|_| AtomicU64::new(0)).collect(),
            words: CachePadded::new(AtomicU64::new(0)),
            arrived: AtomicBool::new(false),
        }
    }

    /// Marks a ring as having work, and wakes the poller. Called by the thread that found the
    /// ring's doorbell armed.
    pub(crate) fn set_ready(&self, place: usize) {
        let word = place / 64;
        // Release (both): pairs with the Acquires in `collect`. The poller sees what this thread
        // wrote before, also the flags in `RingShared`. The word's own bit comes first, so that a
        // poller that sees its bit in `words` also sees the ring's bit.
        self.ready[word].fetch_or(1 << (place % 64), Ordering::Release);
        self.words.fetch_or(1 << word, Ordering::Release);
        self.bell.ring();
    }

    /// Takes the rings that have work, and calls `each` with the place of each.
    pub(crate) fn collect(&self, mut each: impl FnMut(usize)) {
        if self.words.load(Ordering::Relaxed) == 0 {
            return;
        }
        // Acquire (both): pairs with the Releases in `set_ready`.
        let mut words = self.words.swap(0, Ordering::Acquire);
        while words != 0 {
            let word = words.trailing_zeros() as usize;
            words &= words - 1;
            let mut bits = self.ready[word].swap(0, Ordering::Acquire);
            while bits != 0 {
                each(word * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    /// Whether a ring has work, or something has arrived. Called after the fence in `arm`.
    pub(crate) fn has_news(&self) -> bool {
        // Acquire (both): pairs with the Releases in `set_ready`, in `adopt` and in the drop of
        // `Poller`. Relaxed would do after the fence in `arm`: nothing is read here because of
        // them, and `collect` and `run` acquire on their own.
        self.words.load(Ordering::Acquire) != 0 || self.arrived.load(Ordering::Acquire)
    }
}
