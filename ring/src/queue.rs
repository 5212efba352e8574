//! The single-producer single-consumer queue of plain entries under both SQ and CQ.
//!
//! Indices are free-running `u32`s that wrap; a cell is found by masking. Each side keeps a copy of
//! the other's index and reads the shared one only when the copy says "full" or "empty".
//!
//! Orderings: `tail` is stored with Release after the entry is written and loaded with Acquire
//! before it is read; `head` is stored with Release after the entry is copied out and loaded with
//! Acquire before the cell is written again. No fence takes part, so ThreadSanitizer can follow.

use crate::entry::{Entry, Sqe};
use crate::limits::{BUSY_IN_FLIGHT, PREFETCH_ENTRIES, PUBLISH_BATCH, PUBLISH_BATCH_BUSY};
use crate::prefetch::prefetch;
use crate::regions::Regions;
use crate::sync::{Arc, AtomicU32, Ordering, UnsafeCell};
use alloc::boxed::Box;
use core::cell::Cell;
use core::fmt;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use crossbeam_utils::CachePadded;

struct Shared<T: Entry> {
    /// Entries published so far. Written by the producer.
    tail: CachePadded<AtomicU32>,
    /// Entries retired so far. Written by the consumer.
    head: CachePadded<AtomicU32>,
    mask: u32,
    cells: Box<[UnsafeCell<MaybeUninit<T>>]>,
    regions: Regions,
}

// SAFETY: a cell is written by the one producer while it is outside head..tail and read by the one
// consumer while it is inside; the two indices hand it over (module documentation). `T` is plain
// data.
unsafe impl<T: Entry + Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Entry + Send> Send for Shared<T> {}

impl<T: Entry> Shared<T> {
    #[inline]
    fn cell(&self, index: u32) -> &UnsafeCell<MaybeUninit<T>> {
        // SAFETY: `queue` made `mask + 1` cells, and neither changes afterwards.
        unsafe { self.cells.get_unchecked((index & self.mask) as usize) }
    }
}

/// Shows the entry of a cell that the caller, the consumer, knows of and has not retired.
#[inline(always)]
fn peek<T, R>(cell: &UnsafeCell<MaybeUninit<T>>, look: impl FnOnce(&T) -> R) -> R {
    cell.with(|cell| {
        // SAFETY: the cell's index is in head..tail, so the producer wrote it before its Release store of
        // `tail`, which the caller has loaded with Acquire, and will not write it again before `head` has
        // passed.
        look(unsafe { (*cell).assume_init_ref() })
    })
}

impl<T: Entry> Drop for Shared<T> {
    fn drop(&mut self) {
        // Both halves are gone (we are the last reference): whatever stands in the queue goes home.
        let tail = self.tail.load(Ordering::Acquire);
        let mut head = self.head.load(Ordering::Acquire);
        while head != tail {
            let entry = peek(self.cell(head), |entry| *entry);
            head = head.wrapping_add(1);
            // SAFETY: the queue is gone, and what was not taken of it is taken here, once.
            drop(unsafe { self.regions.frame(&entry) });
        }
    }
}

/// Makes `Send` halves that are not `Sync`: two threads must not share one.
type NotSync = PhantomData<Cell<()>>;

/// Works through `&self`, so that the borrowed halves of a ring can both reach it; its cells keep it on
/// one thread.
pub(crate) struct Producer<T: Entry> {
    shared: Arc<Shared<T>>,
    /// Next index to write; up to here entries may be unpublished.
    tail: Cell<u32>,
    published: Cell<u32>,
    head_seen: Cell<u32>,
    /// Entries that [`publish_lines`](Self::publish_lines) publishes together.
    batch: Cell<u32>,
}

pub(crate) struct Consumer<T: Entry> {
    shared: Arc<Shared<T>>,
    head: u32,
    tail_seen: u32,
    _not_sync: NotSync,
}

/// Entries to a cache line of 64 bytes.
const ENTRIES_PER_LINE: usize = 64 / size_of::<Sqe>();
/// A view of how many entries were ever published.
pub(crate) struct Published<T: Entry>(Arc<Shared<T>>);

/// A queue of `capacity` (a power of two) entries whose indices begin at `start`.
pub(crate) fn queue<T: Entry>(
    capacity: u32,
    regions: Regions,
    start: u32,
) -> (Producer<T>, Consumer<T>) {
    assert!(capacity.is_power_of_two() && capacity <= 1 << 30, "a queue's size is a power of two");
    let shared = Arc::new(Shared {
        tail: CachePadded::new(AtomicU32::new(start)),
        head: CachePadded::new(AtomicU32::new(start)),
        mask: capacity - 1,
        cells: (0..capacity).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect(),
        regions,
    });
    let producer = Producer {
        shared: shared.clone(),
        tail: Cell::new(start),
        published: Cell::new(start),
        head_seen: Cell::new(start),
        batch: Cell::new(PUBLISH_BATCH),
    };
    (producer, Consumer { shared, head: start, tail_seen: start, _not_sync: PhantomData })
}

impl<T: Entry> Producer<T> {
    pub(crate) fn regions(&self) -> &Regions {
        &self.shared.regions
    }

    #[inline]
    pub(crate) fn capacity(&self) -> u32 {
        self.shared.mask + 1
    }

    /// Whether one more entry fits.
    #[inline]
    pub(crate) fn has_space(&self) -> bool {
        if self.tail.get().wrapping_sub(self.head_seen.get()) < self.capacity() {
            return true;
        }
        self.refresh_space() > 0
    }

    /// Entries that fit now; more may fit at any time later.
    #[inline]
    pub(crate) fn refresh_space(&self) -> u32 {
        // Acquire: pairs with the Release in `pop`: the consumer has copied these cells out.
        self.head_seen.set(self.shared.head.load(Ordering::Acquire));
        self.capacity() - self.tail.get().wrapping_sub(self.head_seen.get())
    }

    /// Writes an entry, which the consumer sees after [`publish`](Self::publish). If the queue is full,
    /// writes nothing and returns false.
    ///
    /// The check and the write are one call, and no caller's code runs between them: with a closure
    /// in between, that closure could push through the same `&self` and fill the cell.
    #[inline(always)]
    #[must_use = "false means that the entry, and the slot it names, is still the caller's"]
    pub(crate) fn push(&self, entry: T) -> bool {
        if !self.has_space() {
            return false;
        }
        let tail = self.tail.get();
        self.shared.cell(tail).with_mut(|cell| {
            // SAFETY: `has_space` saw `tail - head < capacity` with this tail, and only this producer
            // moves it, on this thread (`Producer` is not `Sync`). So the cell is outside head..tail:
            // the consumer has copied its old entry out (Acquire in `refresh_space`) and does not look
            // at it again before `store_tail` publishes it.
            unsafe { (*cell).write(entry) };
        });
        self.tail.set(tail.wrapping_add(1));
        true
    }

    /// Shows everything written to the consumer; the commit point. Returns whether there was
    /// anything.
    #[inline]
    pub(crate) fn publish(&self) -> bool {
        let anything = self.has_unpublished();
        if anything {
            self.store_tail();
        }
        anything
    }

    /// As [`publish`](Self::publish), for who knows that there is something.
    #[inline]
    pub(crate) fn store_tail(&self) {
        // Release: pairs with the Acquire in `refresh`: the entries, and the packet bytes written
        // before them, come first.
        self.shared.tail.store(self.tail.get(), Ordering::Release);
        self.published.set(self.tail.get());
    }

    /// As [`publish`](Self::publish), if the entries fill cache lines to their ends: a line that the
    /// other side already reads is not written to.
    #[inline]
    pub(crate) fn publish_lines(&self) {
        // `batch` is a power of two.
        if self.tail.get() & (self.batch.get() - 1) == 0 {
            self.store_tail();
        }
    }

    /// A run of entries begins, while those from the index `since` on are on their way.
    #[inline]
    pub(crate) fn begin_run(&self, since: u32) {
        let many = self.tail.get().wrapping_sub(since) >= BUSY_IN_FLIGHT;
        self.batch.set(if many { PUBLISH_BATCH_BUSY } else { PUBLISH_BATCH });
    }

    /// Entries ever published (plus the start index).
    #[inline]
    pub(crate) fn published(&self) -> u32 {
        self.published.get()
    }

    /// Whether something was written and not published.
    #[inline]
    pub(crate) fn has_unpublished(&self) -> bool {
        self.published != self.tail
    }

    /// Entries published and not retired. A snapshot.
    pub(crate) fn backlog(&self) -> u32 {
        self.published.get().wrapping_sub(self.shared.head.load(Ordering::Relaxed))
    }

    pub(crate) fn watch(&self) -> Published<T> {
        Published(self.shared.clone())
    }
}

impl<T: Entry> Drop for Producer<T> {
    fn drop(&mut self) {
        // An entry written but not published owns a slot: let the other half, or the end of the
        // queue, bring it home.
        self.publish();
    }
}

impl<T: Entry> Consumer<T> {
    pub(crate) fn regions(&self) -> &Regions {
        &self.shared.regions
    }

    /// Looks at the producer's index; returns how many entries wait.
    #[inline]
    pub(crate) fn refresh(&mut self) -> u32 {
        // Acquire: pairs with the Release in `publish`.
        self.tail_seen = self.shared.tail.load(Ordering::Acquire);
        self.known()
    }

    /// How many entries wait, as of the last look.
    #[inline]
    pub(crate) fn known(&self) -> u32 {
        self.tail_seen.wrapping_sub(self.head)
    }

    /// Asks for the cache lines of the first of the known entries, together; see
    /// [`prefetch`](crate::prefetch).
    #[inline]
    pub(crate) fn prefetch(&self) {
        for i in (0..self.known().min(PREFETCH_ENTRIES)).step_by(ENTRIES_PER_LINE) {
            self.shared.cell(self.head.wrapping_add(i)).with(prefetch);
        }
    }

    /// Entries ever retired (plus the start index).
    pub(crate) fn head(&self) -> u32 {
        self.head
    }

    /// Copies the next known entry out, retires it, and makes something of it. Only then may its slot
    /// become a frame: what `make` loses is lost, but nothing is owned twice.
    #[inline]
    pub(crate) fn pop<R>(&mut self, make: impl FnOnce(T, &Regions) -> R) -> Option<R> {
        let entry = self.front()?.take(|entry, _| *entry);
        self.retire();
        Some(make(entry, self.regions()))
    }

    /// The oldest known entry, to be taken or left.
    #[inline(always)]
    pub(crate) fn front(&mut self) -> Option<Front<'_, T>> {
        let Self { shared, head, tail_seen, .. } = self;
        (head != tail_seen).then(|| Front {
            cell: shared.cell(*head),
            regions: &shared.regions,
            head,
        })
    }

    /// Tells the producer of all that was taken; a [`Front`] does not.
    #[inline]
    pub(crate) fn retire(&mut self) {
        // Release: pairs with the Acquire in `refresh_space`: what we copied out comes before the next write.
        self.shared.head.store(self.head, Ordering::Release);
    }

    /// How many of the known entries, from the oldest on and up to `most`, are like that.
    #[inline(always)]
    pub(crate) fn leading(&self, most: u32, mut like: impl FnMut(&T, &Regions) -> bool) -> u32 {
        let most = self.known().min(most);
        let mut count = 0;
        while count < most
            && peek(self.shared.cell(self.head.wrapping_add(count)), |entry| {
                like(entry, &self.shared.regions)
            })
        {
            count += 1;
        }
        count
    }
}

impl<T: Entry> Drop for Consumer<T> {
    fn drop(&mut self) {
        // What was taken is not the queue's to bring home.
        self.retire();
    }
}

/// The oldest entry of a queue, still there: let go, it stays.
pub(crate) struct Front<'a, T: Entry> {
    /// Where `head` is.
    cell: &'a UnsafeCell<MaybeUninit<T>>,
    regions: &'a Regions,
    head: &'a mut u32,
}

impl<T: Entry> Front<'_, T> {
    #[inline(always)]
    pub(crate) fn peek<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        peek(self.cell, look)
    }

    /// Takes it: `make` sees it where it is, and nobody sees it again. The producer learns of it by
    /// [`retire`](Consumer::retire), so several entries cost one store.
    #[inline(always)]
    pub(crate) fn take<R>(self, make: impl FnOnce(&T, &Regions) -> R) -> R {
        // Before `make`, which may panic.
        *self.head = self.head.wrapping_add(1);
        peek(self.cell, |entry| make(entry, self.regions))
    }
}

impl<T: Entry> Published<T> {
    pub(crate) fn count(&self) -> u32 {
        // Acquire: a reader that sees a submission also sees what its thread did before.
        self.0.tail.load(Ordering::Acquire)
    }
}

impl<T: Entry> fmt::Debug for Producer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("capacity", &self.capacity())
            .field("tail", &self.tail.get())
            .field("backlog", &self.backlog())
            .finish_non_exhaustive()
    }
}

impl<T: Entry> fmt::Debug for Consumer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("head", &self.head)
            .field("known", &self.known())
            .finish_non_exhaustive()
    }
}

impl<T: Entry> fmt::Debug for Published<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Published").field(&self.count()).finish()
    }
}

macro_rules! debug_by_queue {
    ($($half:ident.$queue:ident),*) => {$(
        impl fmt::Debug for $half {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_tuple(stringify!($half)).field(&self.$queue).finish()
            }
        }
    )*};
}
pub(crate) use debug_by_queue;
