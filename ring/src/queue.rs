//! The single-producer single-consumer queue of plain entries under both SQ and CQ.
//!
//! Indices are free-running `u32`s that wrap; masking an index gives its cell. Each side keeps a
//! copy of the other side's index. The producer loads the shared index only when its copy says
//! "full". The consumer loads it when [`refresh`](Consumer::refresh) is called.
//!
//! Orderings: the producer stores `tail` with Release after it has written the entry
//! ([`store_tail`](Producer::store_tail)), and the consumer loads it with Acquire before it reads
//! the entry ([`refresh`](Consumer::refresh)). The consumer stores `head` with Release after it has
//! copied the entry out ([`retire`](Consumer::retire)), and the producer loads it with Acquire
//! before it writes the cell again ([`refresh_space`](Producer::refresh_space)). No fence takes
//! part, so ThreadSanitizer can follow.

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
use static_assertions::const_assert_eq;

struct Shared<T: Entry> {
    /// Entries published so far. Written by the producer.
    tail: CachePadded<AtomicU32>,
    /// Entries retired so far. Written by the consumer.
    head: CachePadded<AtomicU32>,
    mask: u32,
    cells: Box<[UnsafeCell<MaybeUninit<T>>]>,
    regions: Regions,
}

// SAFETY: the one producer writes a cell while its index is outside head..tail, in the two `push` and in
// `move_to`. The one consumer reads it while its index is inside, in `peek`, and exchanges two of these
// cells, in `swap`. The two indices hand the cell over (see the module's documentation). `queue` makes one
// producer and one consumer, and neither is `Clone`. `T` is plain data.
unsafe impl<T: Entry + Send> Sync for Shared<T> {}
// SAFETY: the fields are atomics, plain data that is `Send`, and pools, which are `Send`.
unsafe impl<T: Entry + Send> Send for Shared<T> {}

impl<T: Entry> Shared<T> {
    #[inline]
    fn cell(&self, index: u32) -> &UnsafeCell<MaybeUninit<T>> {
        self.cells().get(index)
    }

    #[inline(always)]
    fn cells(&self) -> Cells<'_, T> {
        Cells { cells: &self.cells, mask: self.mask }
    }
}

/// The cells of a queue, for a loop that finds many of them.
#[derive(Clone, Copy)]
struct Cells<'q, T> {
    cells: &'q [UnsafeCell<MaybeUninit<T>>],
    mask: u32,
}

impl<'q, T> Cells<'q, T> {
    #[inline(always)]
    fn get(self, index: u32) -> &'q UnsafeCell<MaybeUninit<T>> {
        // SAFETY: `queue` made `mask + 1` cells, and neither the mask nor the cells change
        // afterwards.
        unsafe { self.cells.get_unchecked((index & self.mask) as usize) }
    }
}

/// Calls `look` with the entry of a cell.
///
/// # Safety
///
/// The caller is the consumer or the drop of the queue. The cell's index is in head..tail of the
/// shared indices: the caller has loaded that tail with Acquire, and `retire` has not stored a head
/// beyond the index.
#[inline(always)]
unsafe fn peek<T, R>(cell: &UnsafeCell<MaybeUninit<T>>, look: impl FnOnce(&T) -> R) -> R {
    cell.with(|cell| {
        // SAFETY: the caller says that the index is in head..tail. So the producer wrote the cell
        // before the Release in `store_tail`, which the caller's Acquire has seen, and does not
        // write it again before `retire` has stored a head beyond it.
        look(unsafe { (*cell).assume_init_ref() })
    })
}

impl<T: Entry> Drop for Shared<T> {
    fn drop(&mut self) {
        // This is the last reference, so both halves are gone. The slots of the entries that are
        // left return to their pools.
        // Acquire: pairs with the Release in `store_tail` (tail) and the one in `retire` (head).
        let tail = self.tail.load(Ordering::Acquire);
        let mut head = self.head.load(Ordering::Acquire);
        while head != tail {
            // SAFETY: `head` is not `tail` yet, both were loaded with Acquire, and no half is left.
            let entry = unsafe { peek(self.cell(head), |entry| *entry) };
            head = head.wrapping_add(1);
            // SAFETY: the producers of `sq.rs` and `cq.rs` wrote the entry by a frame of these
            // regions. No consumer has taken it, since `head` was not stored beyond it and no half
            // is left, and this loop takes it once.
            drop(unsafe { self.regions.frame(&entry) });
        }
    }
}

/// Makes a half `Send` and not `Sync`: two threads must not share one.
type NotSync = PhantomData<Cell<()>>;

/// The writing half. It works through `&self`, so that both borrowed halves of a ring can reach it.
/// Its `Cell`s keep it on one thread.
pub(crate) struct Producer<T: Entry> {
    shared: Arc<Shared<T>>,
    /// The next index to write. The entries from `published` up to here are written and not
    /// published.
    tail: Cell<u32>,
    published: Cell<u32>,
    /// The first index whose cell is not known to be free: the consumer's index when it was last loaded,
    /// and the capacity.
    full_at: Cell<u32>,
    /// How many entries [`publish_lines`](Self::publish_lines) publishes together, a power of two, minus one.
    batch_mask: Cell<u32>,
    /// The same during a run of entries, and 0 otherwise.
    run_mask: Cell<u32>,
}

/// The reading half.
pub(crate) struct Consumer<T: Entry> {
    shared: Arc<Shared<T>>,
    head: u32,
    tail_seen: u32,
    _not_sync: NotSync,
}

/// Entries in a cache line of 64 bytes.
const ENTRIES_PER_LINE: usize = 64 / size_of::<Sqe>();
const_assert_eq!(ENTRIES_PER_LINE, 2);

/// Reads how many entries were ever published.
pub(crate) struct Published<T: Entry>(Arc<Shared<T>>);

/// Makes a queue of `capacity` entries, a power of two. Its indices begin at `start`.
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
        full_at: Cell::new(start.wrapping_add(capacity)),
        batch_mask: Cell::new(PUBLISH_BATCH - 1),
        run_mask: Cell::new(0),
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
    #[inline(always)]
    pub(crate) fn has_space(&self) -> bool {
        self.tail != self.full_at || self.refresh_space() > 0
    }

    /// How many entries fit, if they are fewer than `wanted`. Else it may be fewer than really fit.
    #[inline]
    pub(crate) fn space_for(&self, wanted: u32) -> u32 {
        let space = self.known_space();
        if space >= wanted { space } else { self.refresh_space() }
    }

    /// Loads the consumer's index and returns how many entries fit now. More may fit at any time
    /// later.
    #[inline]
    pub(crate) fn refresh_space(&self) -> u32 {
        // Acquire: pairs with the Release in `retire`. The consumer has copied these cells out.
        let head = self.shared.head.load(Ordering::Acquire);
        self.full_at.set(head.wrapping_add(self.capacity()));
        self.known_space()
    }

    /// How many entries fit, by the consumer's index when it was last loaded.
    #[inline]
    fn known_space(&self) -> u32 {
        self.full_at.get().wrapping_sub(self.tail.get())
    }

    /// Writes an entry, which the consumer sees after [`publish`](Self::publish). If the queue is
    /// full, writes nothing and returns false.
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
            // SAFETY: `has_space` saw `tail - head < capacity` for this very tail, since only this
            // producer changes it, on this thread (`Producer` is not `Sync`). So the cell is
            // outside head..tail. The consumer has copied the old entry out (Acquire in
            // `refresh_space`), and does not look at the cell again before `store_tail` publishes
            // it.
            unsafe { (*cell).write(entry) };
        });
        self.tail.set(tail.wrapping_add(1));
        true
    }

    /// Free cells for up to `wanted` entries, which are written one after the other.
    #[inline(always)]
    pub(crate) fn free_cells(&mut self, wanted: u32) -> FreeCells<'_, T> {
        let count = self.space_for(wanted).min(wanted);
        let Self { shared, tail, .. } = self;
        let next = tail.get();
        FreeCells { cells: shared.cells(), tail, next, end: next.wrapping_add(count) }
    }

    /// Publishes all entries that were written: the commit point. The consumer sees them from here
    /// on. Returns whether there were any.
    #[inline]
    pub(crate) fn publish(&self) -> bool {
        let anything = self.has_unpublished();
        if anything {
            self.store_tail();
        }
        anything
    }

    /// Publishes without a check: for callers that know that an entry was written.
    #[inline]
    pub(crate) fn store_tail(&self) {
        // Release: pairs with the Acquires in `refresh`, in `Published::count` and in the drop of
        // `Shared`. A thread that sees this tail also sees the entries, and the packets'
        // bytes.
        self.shared.tail.store(self.tail.get(), Ordering::Release);
        self.published.set(self.tail.get());
    }

    /// Publishes if the entries fill a batch of whole cache lines. So no entry is written into a
    /// line that the other side already reads.
    #[inline]
    pub(crate) fn publish_lines(&self) {
        if self.tail.get() & self.batch_mask.get() == 0 {
            self.store_tail();
        }
    }

    /// Whether the entries from the index `since` on are many, for [`begin_run`](Self::begin_run).
    #[inline]
    pub(crate) fn are_many_since(&self, since: u32) -> bool {
        self.tail.get().wrapping_sub(since) >= BUSY_IN_FLIGHT
    }

    /// Begins a run of entries: chooses the batch of [`publish_lines`](Self::publish_lines) by
    /// whether many entries are in flight.
    #[inline]
    pub(crate) fn begin_run(&self, many: bool) {
        let mask = if many { PUBLISH_BATCH_BUSY } else { PUBLISH_BATCH } - 1;
        self.batch_mask.set(mask);
        self.run_mask.set(mask);
    }

    #[inline]
    pub(crate) fn end_run(&self) {
        self.run_mask.set(0);
    }

    pub(crate) fn is_in_run(&self) -> bool {
        self.run_mask.get() != 0
    }

    /// Whether the entries fill a batch of whole cache lines. Without a run, each entry does.
    #[inline(always)]
    pub(crate) fn ends_piece(&self) -> bool {
        self.tail.get() & self.run_mask.get() == 0
    }

    /// The number of entries ever published, plus the start index.
    #[inline]
    pub(crate) fn published(&self) -> u32 {
        self.published.get()
    }

    /// Whether an entry was written and not published.
    #[inline]
    pub(crate) fn has_unpublished(&self) -> bool {
        self.published != self.tail
    }

    /// The entries that are published and not retired. A snapshot.
    pub(crate) fn backlog(&self) -> u32 {
        // Relaxed: only a count is wanted, and no cell is touched because of it.
        self.published.get().wrapping_sub(self.shared.head.load(Ordering::Relaxed))
    }

    /// A view of how many entries this producer has published.
    pub(crate) fn watch(&self) -> Published<T> {
        Published(self.shared.clone())
    }
}

impl<T: Entry> Drop for Producer<T> {
    fn drop(&mut self) {
        // An entry that is written and not published owns a slot. Once published, the consumer
        // takes it or the drop of the queue frees it.
        self.publish();
    }
}

impl<T: Entry> Consumer<T> {
    pub(crate) fn regions(&self) -> &Regions {
        &self.shared.regions
    }

    /// Loads the producer's index and returns how many entries wait.
    #[inline]
    pub(crate) fn refresh(&mut self) -> u32 {
        // Acquire: pairs with the Release in `store_tail`. We see the entries, and the packets'
        // bytes.
        self.tail_seen = self.shared.tail.load(Ordering::Acquire);
        self.known()
    }

    /// The number of entries ever published, plus the start index. A snapshot.
    pub(crate) fn published(&self) -> u32 {
        // Relaxed: nothing is read of the entries.
        self.shared.tail.load(Ordering::Relaxed)
    }

    /// How many entries wait, after a look at the queue that [`known`](Self::known) does not count.
    pub(crate) fn waiting(&self) -> u32 {
        self.published().wrapping_sub(self.head)
    }

    /// How many entries wait, as of the last [`refresh`](Self::refresh).
    #[inline]
    pub(crate) fn known(&self) -> u32 {
        self.tail_seen.wrapping_sub(self.head)
    }

    /// Prefetches the cache lines of the first known entries, all together; see
    /// [`prefetch`](crate::prefetch).
    #[inline]
    pub(crate) fn prefetch(&self) {
        for i in (0..self.known().min(PREFETCH_ENTRIES)).step_by(ENTRIES_PER_LINE) {
            self.shared.cell(self.head.wrapping_add(i)).with(prefetch);
        }
    }

    /// The number of entries ever taken, plus the start index.
    pub(crate) fn head(&self) -> u32 {
        self.head
    }

    /// Copies the next known entry out, retires it, and then calls `make` with the copy. The slot
    /// may become a frame only in `make`. So if `make` panics, a slot can be lost, but nothing is
    /// owned twice.
    #[inline]
    pub(crate) fn pop<R>(&mut self, make: impl FnOnce(T, &Regions) -> R) -> Option<R> {
        let entry = self.front()?.take(|entry, _| *entry);
        self.retire();
        Some(make(entry, self.regions()))
    }

    /// The oldest known entry, which the caller may take or leave.
    #[inline(always)]
    pub(crate) fn front(&mut self) -> Option<Front<'_, T>> {
        let Self { shared, head, tail_seen, .. } = self;
        (head != tail_seen).then(|| Front {
            cell: shared.cell(*head),
            regions: &shared.regions,
            head,
        })
    }

    /// The oldest known entries, at most `most`, which are taken one after the other.
    #[inline(always)]
    pub(crate) fn oldest(&mut self, most: u32) -> Oldest<'_, T> {
        let count = self.known().min(most);
        let Self { shared, head, .. } = self;
        let (cells, next) = (shared.cells(), *head);
        Oldest { cells, regions: &shared.regions, head, next, end: next.wrapping_add(count) }
    }

    /// Lets the producer write the cells of all entries that were taken. Taking an entry does not.
    #[inline]
    pub(crate) fn retire(&mut self) {
        // Release: pairs with the Acquire in `refresh_space` and the one in the drop of `Shared`.
        // We have copied the entries out before their cells are written again.
        self.shared.head.store(self.head, Ordering::Release);
    }

    /// Moves the oldest known entries to another queue, `N` at a time and at most `most` times: `make`
    /// sees copies of `N` of them, and returns the entries that take their places. Returns how often this
    /// was done. It ends when `make` returns `None`, or when there are no `N` entries or free cells more.
    ///
    /// While `make` runs, the entries are still in this queue. So if it panics, they stay there, and the
    /// other queue has those before them. Nothing between the two queues can panic.
    #[inline(always)]
    pub(crate) fn move_to<U: Entry, const N: usize>(
        &mut self,
        to: &mut Producer<U>,
        most: u32,
        mut make: impl FnMut([T; N], &Regions) -> Option<[U; N]>,
    ) -> u32 {
        let count = N as u32;
        let most = most.min(self.known() / count);
        let most = most.min(to.space_for(most.saturating_mul(count)) / count);
        // `make` writes to memory. In variables of this function, these are not loaded again after that.
        let (from_cells, to_cells) = (self.shared.cells(), to.shared.cells());
        let regions = &self.shared.regions;
        let mut at =
            Moving { tail: &to.tail, to: to.tail.get(), from: self.head, head: &mut self.head };
        for moved in 0..most {
            let (head, tail) = (at.from, at.to);
            let entries = core::array::from_fn(|i| {
                let cell = from_cells.get(head.wrapping_add(i as u32));
                // SAFETY: `moved < known / N`, so the index is before `tail_seen`, which `refresh` loaded
                // with Acquire. The entry is not taken, so no `retire` has stored a head beyond it.
                unsafe { peek(cell, |entry| *entry) }
            });
            let Some(made) = make(entries, regions) else { return moved };
            at.from = head.wrapping_add(count);
            for (i, entry) in made.into_iter().enumerate() {
                to_cells.get(tail.wrapping_add(i as u32)).with_mut(|cell| {
                    // SAFETY: `space_for` saw that this cell is free, as `has_space` does for `push`, and
                    // `to` is exclusively borrowed since then.
                    unsafe { (*cell).write(entry) };
                });
            }
            at.to = tail.wrapping_add(count);
        }
        most
    }

    /// The length of the leading run, at most `most`, of known entries for which `like` returns
    /// true.
    #[inline(always)]
    pub(crate) fn leading(&self, most: u32, mut like: impl FnMut(&T, &Regions) -> bool) -> u32 {
        let most = self.known().min(most);
        let (cells, regions, head) = (self.shared.cells(), &self.shared.regions, self.head);
        let mut count = 0;
        while count < most {
            let cell = cells.get(head.wrapping_add(count));
            // SAFETY: `count < known`, so the index is before `tail_seen`, which `refresh` loaded
            // with Acquire. The entry is not taken, so no `retire` has stored a head beyond it.
            if !unsafe { peek(cell, |entry| like(entry, regions)) } {
                break;
            }
            count += 1;
        }
        count
    }

    /// Moves the known entries for which `first` returns true to the front, before the others. Both
    /// groups keep their order. Returns the number of entries in the first group.
    ///
    /// `first` sees each known entry once, oldest first. No entry enters or leaves the queue. So if
    /// `first` panics, every entry is still there, in some order.
    ///
    /// This takes O(n log n) steps for n known entries, and no memory.
    pub(crate) fn partition(&mut self, mut first: impl FnMut(&T) -> bool) -> u32 {
        self.partition_range(0, self.known(), &mut first)
    }

    /// Does the work of [`partition`](Self::partition) for the `count` entries from the known entry
    /// number `from` on.
    fn partition_range(
        &mut self,
        from: u32,
        count: u32,
        first: &mut impl FnMut(&T) -> bool,
    ) -> u32 {
        match count {
            0 => 0,
            1 => u32::from(self.look_at(from, first)),
            _ => {
                let older = count / 2;
                let left = self.partition_range(from, older, first);
                let right = self.partition_range(from + older, count - older, first);
                self.exchange_blocks(from + left, older - left, right);
                left + right
            }
        }
    }

    /// Exchanges two neighbouring blocks of known entries, of `left` and `right` entries. The left
    /// one begins at the known entry number `from`.
    fn exchange_blocks(&mut self, from: u32, left: u32, right: u32) {
        if left == 0 || right == 0 {
            return;
        }
        self.reverse(from, left);
        self.reverse(from + left, right);
        self.reverse(from, left + right);
    }

    fn reverse(&mut self, from: u32, count: u32) {
        for i in 0..count / 2 {
            self.swap(from + i, from + count - 1 - i);
        }
    }

    /// Calls `look` with the known entry number `i`, counted from the oldest.
    fn look_at<R>(&self, i: u32, look: impl FnOnce(&T) -> R) -> R {
        assert!(i < self.known(), "the entry is known");
        // SAFETY: the index is before `tail_seen`, which `refresh` loaded with Acquire. The entry is
        // not taken, so no `retire` has stored a head beyond it.
        unsafe { peek(self.shared.cell(self.head.wrapping_add(i)), look) }
    }

    /// Exchanges the known entries number `i` and `j`, counted from the oldest.
    fn swap(&mut self, i: u32, j: u32) {
        let (one, other) = (self.look_at(i, |entry| *entry), self.look_at(j, |entry| *entry));
        for (index, entry) in [(i, other), (j, one)] {
            self.shared.cell(self.head.wrapping_add(index)).with_mut(|cell| {
                // SAFETY: `look_at` has checked that the index is of a known entry, so it is in
                // head..tail. The producer writes the cell again only after `retire` has stored a
                // head beyond it (Acquire in `refresh_space`), and this is the one consumer,
                // exclusively borrowed. Between the two writes one entry is in two cells, and
                // nothing here can panic or look.
                unsafe { (*cell).write(entry) };
            });
        }
    }

    /// Forgets the known entries beyond the first `n`, until the next [`refresh`](Self::refresh).
    /// They stay in the queue.
    pub(crate) fn limit_known(&mut self, n: u32) {
        self.tail_seen = self.head.wrapping_add(n.min(self.known()));
    }
}

impl<T: Entry> Drop for Consumer<T> {
    fn drop(&mut self) {
        // Taken entries are no longer the queue's: its drop must not free their slots.
        self.retire();
    }
}

/// Where a move of entries from one queue to another is. The indices are stored when this is dropped, and
/// so after a panic too.
struct Moving<'a> {
    head: &'a mut u32,
    from: u32,
    tail: &'a Cell<u32>,
    to: u32,
}

impl Drop for Moving<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.head = self.from;
        self.tail.set(self.to);
    }
}

/// The oldest known entry of a queue. If it is dropped and not taken, it stays in the queue.
pub(crate) struct Front<'a, T: Entry> {
    /// The cell of the index `head`.
    cell: &'a UnsafeCell<MaybeUninit<T>>,
    regions: &'a Regions,
    head: &'a mut u32,
}

impl<T: Entry> Front<'_, T> {
    #[inline(always)]
    pub(crate) fn peek<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        // SAFETY: `front` saw that `head` is before `tail_seen`, which `refresh` loaded with
        // Acquire. The entry is not taken, so no `retire` has stored a head beyond it.
        unsafe { peek(self.cell, look) }
    }

    /// Takes the entry: `make` sees it in its cell, and nobody sees it again. The cell stays
    /// occupied until [`retire`](Consumer::retire), so that several entries cost one store.
    #[inline(always)]
    pub(crate) fn take<R>(self, make: impl FnOnce(&T, &Regions) -> R) -> R {
        // Before `make`, which may panic: the entry must not be taken twice.
        *self.head = self.head.wrapping_add(1);
        // SAFETY: `front` saw that the index was before `tail_seen`, which `refresh` loaded with
        // Acquire. `retire` stores the head beyond it only later: we still borrow the consumer.
        unsafe { peek(self.cell, |entry| make(entry, self.regions)) }
    }
}

/// The oldest known entries of a queue. Those that are not taken stay in the queue.
pub(crate) struct Oldest<'a, T: Entry> {
    cells: Cells<'a, T>,
    regions: &'a Regions,
    head: &'a mut u32,
    /// The value of `head`, and where it ends.
    next: u32,
    end: u32,
}

impl<T: Entry> Oldest<'_, T> {
    /// Takes the next entry, if it is `wanted`, as [`Front::take`] does.
    #[inline(always)]
    pub(crate) fn take_if<R>(
        &mut self,
        wanted: impl FnOnce(&T) -> bool,
        make: impl FnOnce(&T, &Regions) -> R,
    ) -> Option<R> {
        let cell = self.cells.get(self.next);
        // SAFETY: the index is before `end`, which `oldest` took from `tail_seen`, and `refresh` loaded
        // that with Acquire. The entry is not taken, so no `retire` has stored a head beyond it.
        if self.next == self.end || !unsafe { peek(cell, wanted) } {
            return None;
        }
        self.next = self.next.wrapping_add(1);
        // Before `make`, which may panic: the entry must not be taken twice.
        *self.head = self.next;
        // SAFETY: as above. `retire` stores the head beyond the entry only later: we still borrow the
        // consumer.
        Some(unsafe { peek(cell, |entry| make(entry, self.regions)) })
    }
}

/// Free cells of a queue. What is written into them is the queue's when this is dropped, and is seen after
/// [`publish`](Producer::publish). If it is forgotten, the slots of these entries are lost.
pub(crate) struct FreeCells<'a, T: Entry> {
    cells: Cells<'a, T>,
    tail: &'a Cell<u32>,
    /// The next free cell, and where they end.
    next: u32,
    end: u32,
}

impl<T: Entry> Drop for FreeCells<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.tail.set(self.next);
    }
}

impl<T: Entry> FreeCells<'_, T> {
    /// Whether a cell is left.
    #[inline(always)]
    pub(crate) fn has_space(&self) -> bool {
        self.next != self.end
    }

    /// Writes an entry. If no cell is left, writes nothing and returns false.
    #[inline(always)]
    #[must_use = "false means that the entry, and the slot it names, is still the caller's"]
    pub(crate) fn push(&mut self, entry: T) -> bool {
        if !self.has_space() {
            return false;
        }
        self.cells.get(self.next).with_mut(|cell| {
            // SAFETY: `space_for` saw that this cell is free, as `has_space` does for `push`, and the
            // producer is exclusively borrowed since then.
            unsafe { (*cell).write(entry) };
        });
        self.next = self.next.wrapping_add(1);
        true
    }
}

impl<T: Entry> Published<T> {
    /// The number of entries ever published, plus the start index.
    pub(crate) fn count(&self) -> u32 {
        // Acquire: pairs with the Release in `store_tail`. A thread that sees a submission also
        // sees what the submitting thread did before.
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

/// Implements `Debug` for a half by the `Debug` of its queue.
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
