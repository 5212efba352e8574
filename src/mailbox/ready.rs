//! Which rings of a poller have work.

use crossbeam_utils::CachePadded;
use vmring_core::doorbell::Doorbell;
use vmring_core::sync::{AtomicBool, AtomicU64, Ordering};

use crate::limits::RINGS_PER_POLLER_MAX;
use crate::notify::Notifier;

/// The part of a poller that rings and ringers see.
#[derive(Debug)]
pub(crate) struct ReadySet {
    pub(crate) bell: Doorbell<Notifier>,
    /// Rings whose doorbell was rung: a bit each, and a bit per word in `words`.
    ready: Box<[AtomicU64]>,
    words: CachePadded<AtomicU64>,
    /// There are new engines, or the last handle to the poller is gone.
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

    /// Marks a ring as having work. Called by whoever found its doorbell armed.
    pub(crate) fn set_ready(&self, place: usize) {
        let word = place / 64;
        // Release, both: pairs with the Acquire in `collect`; the word's bit comes first, so that
        // who sees the summary sees the word.
        self.ready[word].fetch_or(1 << (place % 64), Ordering::Release);
        self.words.fetch_or(1 << word, Ordering::Release);
        self.bell.ring();
    }

    pub(crate) fn collect(&self, mut each: impl FnMut(usize)) {
        if self.words.load(Ordering::Relaxed) == 0 {
            return;
        }
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

    pub(crate) fn has_news(&self) -> bool {
        self.words.load(Ordering::Acquire) != 0 || self.arrived.load(Ordering::Acquire)
    }
}
