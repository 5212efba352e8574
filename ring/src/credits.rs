//! Credits: why the completion queue cannot overflow.
//!
//! Every submission takes a credit of its class, and every reaped completion gives it back. The
//! completion queue has at least as many cells as the ring has credits, and each submission
//! completes exactly once. So there is always a free cell for a completion.
//!
//! # Writes that skip success
//!
//! A write that skips success has no completion if it succeeds. The poller counts it, and its credit
//! comes back through that count. There is still always a free cell. For one class, let `taken` be the
//! submissions that the poller has taken, `pushed` those that it has completed, and `skipped` those
//! that it has counted. Let `returned` and `seen` be the two counts that the submitter had loaded when
//! it took the credit of the last of them. Then:
//!
//! 1. `pushed + skipped <= taken`, because a submission ends in one of the two ways.
//! 2. `taken <= depth + returned + seen`, by the check in [`CreditTaker::has`].
//! 3. `seen <= skipped`, because the poller itself counts, and its count only grows.
//!
//! So `pushed - returned <= depth`. The cells of the `returned` completions are free, and the poller
//! sees that (see the comment in [`CreditTaker::available`]). So at most `depth` cells are occupied by
//! this class.

use crate::entry::Opcode;
use crate::sync::{Arc, AtomicU32, Ordering};
use core::cell::Cell;
use crossbeam_utils::CachePadded;
use static_assertions::const_assert_eq;

/// What a credit is for. Each class has credits of its own, so reads that fill the ring never block
/// a write or a cancel.
///
/// A class is what the ring counts, an [`Opcode`] is what an entry asks for. The two differ for
/// cancels: [`Opcode::Cancel`] and [`Opcode::CancelAll`] are both of class `Cancel`. The set is
/// closed, so code may match it without a wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Class {
    /// Posted reads.
    Read,
    /// Posted writes.
    Write,
    /// Cancel requests.
    Cancel,
}

/// The credits that have come back so far, in one cache line. It belongs to the reaper. If no write
/// skips success, the poller does not touch it.
#[derive(Debug)]
struct Returned {
    /// By reaping, indexed by opcode. For reads and writes the index is also that of the class; the
    /// two cancel opcodes share a class. Indexing by opcode saves the step from opcode to class for
    /// each completion.
    reaped: [AtomicU32; OPCODES],
    /// Credits for writes that have succeeded and skipped their completion.
    skipped: AtomicU32,
}

impl Returned {
    fn skipped(&self) -> u32 {
        // Acquire: pairs with the Release in `SkipCounter::publish`. The frames of these writes are in
        // their pools, and the SQ's tail, loaded after this, includes these writes.
        self.skipped.load(Ordering::Acquire)
    }
}

const OPCODES: usize = Opcode::CancelAll as usize + 1;
const_assert_eq!(Opcode::Read as usize, Class::Read as usize);
const_assert_eq!(Opcode::Write as usize, Class::Write as usize);
const_assert_eq!(Opcode::Cancel as usize, Class::Cancel as usize);

/// The submitting side. Like the queue's producer, it works through `&self` on one thread.
#[derive(Debug)]
pub(crate) struct CreditTaker {
    depth: [u32; 3],
    /// The credits that can be taken without a look at those that have come back.
    left: [Cell<u32>; 3],
    /// How many had come back at the last look. They are among `left`, or taken again.
    returned_seen: [Cell<u32>; 3],
    /// Whether a write that skips success was ever submitted. Until then none is counted.
    skips: Cell<bool>,
    returned: Arc<CachePadded<Returned>>,
}

/// The reaping side.
#[derive(Debug)]
pub(crate) struct CreditReturner {
    /// The credits that were counted and not returned.
    counted: [u32; OPCODES],
    returned: Arc<CachePadded<Returned>>,
}

/// The poller's side: it counts the writes that have skipped their completion.
#[derive(Debug)]
pub(crate) struct SkipCounter {
    skipped: u32,
    published: u32,
    returned: Arc<CachePadded<Returned>>,
}

pub(crate) fn credits(depth: [u32; 3]) -> (CreditTaker, CreditReturner, SkipCounter) {
    let reaped = [0; OPCODES].map(AtomicU32::new);
    let returned = Arc::new(CachePadded::new(Returned { reaped, skipped: AtomicU32::new(0) }));
    let returner = CreditReturner { counted: [0; OPCODES], returned: returned.clone() };
    let counter = SkipCounter { skipped: 0, published: 0, returned: returned.clone() };
    let (left, returned_seen) = (depth.map(Cell::new), [0; 3].map(Cell::new));
    let skips = Cell::new(false);
    (CreditTaker { depth, left, returned_seen, skips, returned }, returner, counter)
}

impl CreditTaker {
    /// Credits of `class` that can be taken now.
    pub(crate) fn available(&self, class: Class) -> u32 {
        let i = class as usize;
        // Acquire (both): pairs with the Release in `give_back`. The reaper had copied the
        // completion out of its cell before. We publish an SQE after this load, and the poller
        // takes that SQE before it writes a completion, so the cell may be written again.
        let mut returned = self.returned.reaped[i].load(Ordering::Acquire);
        if class == Class::Cancel {
            let others = &self.returned.reaped[Opcode::CancelAll as usize];
            returned = returned.wrapping_add(others.load(Ordering::Acquire));
        }
        if class == Class::Write && self.skips.get() {
            returned = returned.wrapping_add(self.returned.skipped());
        }
        let fresh = returned.wrapping_sub(self.returned_seen[i].replace(returned));
        self.left[i].set(self.left[i].get() + fresh);
        self.left[i].get()
    }

    /// Whether a credit of `class` can be taken now.
    #[inline]
    pub(crate) fn has(&self, class: Class) -> bool {
        self.left[class as usize].get() > 0 || self.available(class) > 0
    }

    /// Takes one. The caller has checked with [`has`](Self::has) that there is one.
    #[inline]
    pub(crate) fn take(&self, class: Class) {
        let left = &self.left[class as usize];
        left.set(left.get() - 1);
    }

    /// Says that a credit may come back by the count of skipped completions from now on.
    #[inline]
    pub(crate) fn expect_skips(&self) {
        self.skips.set(true);
    }

    /// Whether a credit may come back by the count of skipped completions.
    pub(crate) fn expects_skips(&self) -> bool {
        self.skips.get()
    }

    /// The number of skipped completions.
    pub(crate) fn skipped(&self) -> u32 {
        self.returned.skipped()
    }

    pub(crate) fn depth(&self, class: Class) -> u32 {
        self.depth[class as usize]
    }
}

impl CreditReturner {
    #[inline]
    pub(crate) fn give_back(&mut self, of: Opcode) {
        self.add(of as usize, 1);
    }

    /// Counts a credit that the next [`give_all_back`](Self::give_all_back) returns.
    #[inline]
    pub(crate) fn count(&mut self, of: Opcode) {
        self.counted[of as usize] += 1;
    }

    /// Returns the credits that were counted.
    #[inline]
    pub(crate) fn give_all_back(&mut self) {
        for (i, count) in core::mem::take(&mut self.counted).into_iter().enumerate() {
            self.add(i, count);
        }
    }

    #[inline]
    fn add(&self, i: usize, count: u32) {
        let reaped = &self.returned.reaped[i];
        // Relaxed: only the reaper stores.
        let sum = reaped.load(Ordering::Relaxed).wrapping_add(count);
        // Release: pairs with the Acquire in `available`. The completion has been copied out of its
        // cell.
        reaped.store(sum, Ordering::Release);
    }

    /// The number of skipped completions.
    #[inline]
    pub(crate) fn skipped(&self) -> u32 {
        self.returned.skipped()
    }
}

impl SkipCounter {
    /// Counts a write whose credit comes back with the next [`publish`](Self::publish).
    #[inline]
    pub(crate) fn count(&mut self) {
        self.skipped = self.skipped.wrapping_add(1);
    }

    /// Publishes the count. Returns whether it has grown.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        let grown = self.published != self.skipped;
        if grown {
            self.published = self.skipped;
            // Release: pairs with the Acquire in `Returned::skipped`. The frames have returned to
            // their pools before, and the writes were taken from the SQ.
            self.returned.skipped.store(self.published, Ordering::Release);
        }
        grown
    }

    /// The count that is published.
    #[inline]
    pub(crate) fn published(&self) -> u32 {
        self.published
    }
}
