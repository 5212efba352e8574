//! Credits: why the completion queue cannot overflow.
//!
//! Every submission takes a credit of its class, and every reaped completion gives it back. The
//! completion queue has at least as many cells as the ring has credits, and each submission
//! completes exactly once. So there is always a free cell for a completion.

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

/// Credits returned so far, indexed by opcode. For reads and writes the index is also that of the
/// class; the two cancel opcodes share a class. Indexing by opcode saves the step from opcode to
/// class for each completion.
type Returned = Arc<CachePadded<[AtomicU32; OPCODES]>>;

const OPCODES: usize = Opcode::CancelAll as usize + 1;
const_assert_eq!(Opcode::Read as usize, Class::Read as usize);
const_assert_eq!(Opcode::Write as usize, Class::Write as usize);
const_assert_eq!(Opcode::Cancel as usize, Class::Cancel as usize);

/// The submitting side. Like the queue's producer, it works through `&self` on one thread.
#[derive(Debug)]
pub(crate) struct CreditTaker {
    depth: [u32; 3],
    taken: [Cell<u32>; 3],
    returned_seen: [Cell<u32>; 3],
    returned: Returned,
}

/// The reaping side.
#[derive(Debug)]
pub(crate) struct CreditReturner {
    given: [u32; OPCODES],
    returned: Returned,
}

pub(crate) fn credits(depth: [u32; 3]) -> (CreditTaker, CreditReturner) {
    let returned: Returned = Arc::new(CachePadded::new([0; OPCODES].map(AtomicU32::new)));
    let returner = CreditReturner { given: [0; OPCODES], returned: returned.clone() };
    let zeros = || [0, 0, 0].map(Cell::new);
    (CreditTaker { depth, taken: zeros(), returned_seen: zeros(), returned }, returner)
}

impl CreditTaker {
    /// Credits of `class` that can be taken now.
    pub(crate) fn available(&self, class: Class) -> u32 {
        let i = class as usize;
        // Acquire (both): pairs with the Release in `give_back`. The reaper had copied the
        // completion out of its cell before. We publish an SQE after this load, and the poller
        // takes that SQE before it writes a completion, so the cell may be written again.
        let mut returned = self.returned[i].load(Ordering::Acquire);
        if class == Class::Cancel {
            let others = &self.returned[Opcode::CancelAll as usize];
            returned = returned.wrapping_add(others.load(Ordering::Acquire));
        }
        self.returned_seen[i].set(returned);
        self.depth[i] - self.taken[i].get().wrapping_sub(self.returned_seen[i].get())
    }

    /// Whether a credit of `class` can be taken now.
    #[inline]
    pub(crate) fn has(&self, class: Class) -> bool {
        let i = class as usize;
        self.taken[i].get().wrapping_sub(self.returned_seen[i].get()) < self.depth[i]
            || self.available(class) > 0
    }

    /// Takes one. The caller has checked with [`has`](Self::has) that there is one.
    #[inline]
    pub(crate) fn take(&self, class: Class) {
        let taken = &self.taken[class as usize];
        taken.set(taken.get().wrapping_add(1));
    }

    pub(crate) fn depth(&self, class: Class) -> u32 {
        self.depth[class as usize]
    }
}

impl CreditReturner {
    #[inline]
    pub(crate) fn give_back(&mut self, of: Opcode) {
        let i = of as usize;
        self.given[i] = self.given[i].wrapping_add(1);
        // Release: pairs with the Acquire in `available`. The completion has been copied out of its
        // cell.
        self.returned[i].store(self.given[i], Ordering::Release);
    }
}
