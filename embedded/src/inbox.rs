//! The forwarding mechanism: the buffers a receiver has posted *are* its queue.
//!
//! An [`Inbox`] belongs to one receiver (its [`Collector`]) and may be delivered to by any thread.
//! The receiver posts empty buffers; a sender claims the oldest one, copies its frame into it, and
//! the receiver collects it. That is the only copy. If no buffer is posted, the frame goes to a
//! fixed overflow ring (a second copy when it is collected), and if that is full the frame is
//! dropped and the sender is told. Nothing here blocks, locks, allocates or makes a system call,
//! except that [`Collector::close`] waits for copies that are under way, and senders wait while
//! [`Collector::recall_if`] looks through the posted buffers.
//!
//! # How it works
//!
//! One 64-bit word decides everything: how many posted buffers were ever claimed, how many frames
//! were ever pushed to the overflow ring, whether the ring is in use (the *overflow bit*), whether
//! the receiver is choosing among its posted buffers (the *held bit*), and whether the inbox is
//! closed. A sender changes it with one compare-and-swap, and whoever wins owns the cell it counted
//! until it stores the cell's state.
//!
//! - While the overflow bit is clear, senders claim posted buffers in the order they were posted.
//! - When none is left, a push sets the overflow bit. While it is set no sender claims a posted
//!   buffer; the receiver, and only the receiver, moves frames from the ring to posted buffers,
//!   and clears the bit in the same step that takes the last one.
//! - To take back some posted buffers and leave the others, the receiver sets the held bit. While it
//!   is set no sender changes the word: it waits, for as long as looking at each posted buffer
//!   takes. It does not go to the overflow ring instead, nor drop its frame, because the buffers
//!   that stay may suffice for it. With the overflow bit set there is nothing to hold.
//!
//! So the changes of the word put all frames in one order, and the receiver collects them in that
//! order: frames of one sender are never reordered, and buffers are filled as they were posted.
//!
//! # Invariants
//!
//! 1. *A posted cell has one owner.* Cells `collected..claimed` belong to the sender that made the
//!    claim until it stores the state, then to the collector; cells `claimed..posted` belong to
//!    nobody but whoever next moves `claimed` (the collector alone while the overflow bit or the
//!    held bit is set); all others belong to the collector. Who owns a cell may write to its room.
//! 2. *An overflow cell has one owner.* Cells `popped..pushed` belong to the sender that pushed
//!    until it stores the state, then to the collector; all others to whoever next moves `pushed`.
//! 3. *Once closed, the word counts no new claim,* and `close` returns only when every cell that
//!    was claimed before has its state.
//! 4. *A lent buffer stays where it is.* It lies in the collector's own list, untouched from the moment
//!    its room was noted until it is collected or taken back; who moves it notes its room anew. So a
//!    sender needs the room's address only, and the buffers stay in the receiver's cache.
//!
//! # What crosses between processors
//!
//! A room is 8 bytes and a state is 8 bytes, in two arrays: eight of either to a cache line, the rooms
//! written by the receiver, the states by the senders. A state carries the index it is for, so nobody
//! resets it, and a room that is the same as a lap ago is not written again. A sender that has several
//! frames for the inbox claims their buffers in one step ([`Inbox::claim`]), and a receiver publishes
//! several buffers with one store ([`Collector::stage`]).
//!
//! Indices wrap; a sender would have to sleep for exactly 2^32 claims between its load and its
//! compare-and-swap to mistake one lap for another.

use core::fmt;
use core::marker::PhantomData;
use core::ops::Range;
use core::time::Duration;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use crossbeam_utils::{Backoff, CachePadded};
use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, Ordering, UnsafeCell, spin_loop};

use crate::limits::MAX_INBOX_CELLS;

/// What is called, on a sender's thread, when a receiver that has [armed](Collector::arm) has
/// something to collect. It must not block, and it may still be called once while, or shortly
/// after, the receiver closes.
pub type PortWake = std::sync::Arc<dyn Fn() + Send + Sync>;

/// What became of a frame given to [`Inbox::deliver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Copied into a posted buffer.
    Direct,
    /// Copied into the overflow ring: no buffer was posted, or older frames wait there.
    Overflow,
    /// Not taken.
    Dropped(Refused),
}

/// Why an inbox did not take a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused {
    /// No buffer is posted and the overflow ring is full.
    NoBuffer,
    /// The frame is longer than the inbox's `max_frame`.
    TooBig,
    /// The receiver has closed.
    Closed,
}

/// A packet as it comes out of an inbox.
#[derive(Debug)]
pub struct Collected<B> {
    /// The buffer the receiver posted.
    pub buffer: B,
    /// How many bytes of it the packet fills.
    pub len: usize,
    /// Whether the packet waited in the overflow ring, which cost it a second copy.
    pub overflow: bool,
}

/// The state of an overflow cell without a frame. With one it is the frame's length plus one.
const PENDING: u32 = 0;

/// The state of a posted cell that is filled: for which index, and the frame's length plus one. Any
/// other state is pending, also that of an earlier lap.
#[inline]
fn filled(index: u32, len: usize) -> u64 {
    u64::from(index) << 32 | (len as u64 + 1)
}

/// Beside the length in the state of a posted cell: the frame has waited in the overflow ring.
const WAITED: u32 = 1 << 31;

/// The low half of the state of the posted cell `index`, if it is filled.
#[inline]
fn filled_with(cell_state: u64, index: u32) -> Option<u32> {
    ((cell_state >> 32) as u32 == index && cell_state as u32 != 0).then_some(cell_state as u32)
}

/// The widest index of the overflow ring in the word: 29 bits.
const PUSHED_MASK: u32 = (1 << 29) - 1;
const HELD: u64 = 1 << 61;
const OVERFLOW: u64 = 1 << 62;
const CLOSED: u64 = 1 << 63;

/// The word that decides everything, unpacked.
#[derive(Clone, Copy)]
struct InboxState(u64);

impl InboxState {
    fn new(claimed: u32, pushed: u32, flags: u64) -> Self {
        Self(u64::from(claimed) | u64::from(pushed & PUSHED_MASK) << 32 | flags)
    }

    fn claimed(self) -> u32 {
        self.0 as u32
    }

    fn pushed(self) -> u32 {
        (self.0 >> 32) as u32 & PUSHED_MASK
    }

    fn overflow(self) -> bool {
        self.0 & OVERFLOW != 0
    }

    fn closed(self) -> bool {
        self.0 & CLOSED != 0
    }

    fn held(self) -> bool {
        self.0 & HELD != 0
    }

    fn with_claimed(self, claimed: u32) -> Self {
        Self(self.0 & !u64::from(u32::MAX) | u64::from(claimed))
    }

    fn with_push(self) -> Self {
        Self::new(self.claimed(), self.pushed().wrapping_add(1), self.0 & CLOSED | OVERFLOW)
    }

    fn without(self, flags: u64) -> Self {
        Self(self.0 & !flags)
    }
}

/// The state of one overflow cell. Its bytes lie in [`Overflow::bytes`]; `access` is where loom
/// watches them, and nothing otherwise.
struct OverflowCell {
    state: AtomicU32,
    access: UnsafeCell<()>,
}

struct Overflow {
    cells: Box<[OverflowCell]>,
    /// `cells.len() * max_frame` bytes. Zeroed by the allocator, so that pages nobody has used yet
    /// cost no memory.
    bytes: Box<[core::cell::UnsafeCell<u8>]>,
    max_frame: usize,
}

impl Overflow {
    fn new(cells: usize, max_frame: usize) -> Self {
        let bytes = Box::into_raw(vec![0u8; cells * max_frame].into_boxed_slice());
        Self {
            cells: (0..cells)
                .map(|_| OverflowCell {
                    state: AtomicU32::new(PENDING),
                    access: UnsafeCell::new(()),
                })
                .collect(),
            // SAFETY: `bytes` comes from `Box::into_raw` in the first line of this function and goes
            // nowhere else. `UnsafeCell<u8>` has the layout of `u8`.
            bytes: unsafe { Box::from_raw(bytes as *mut [core::cell::UnsafeCell<u8>]) },
            max_frame,
        }
    }

    fn cell(&self, index: u32) -> &OverflowCell {
        &self.cells[self.cell_index(index)]
    }

    fn cell_index(&self, index: u32) -> usize {
        index as usize & (self.cells.len() - 1)
    }

    /// The bytes of a cell, as a pointer.
    fn bytes_of(&self, index: u32) -> *mut u8 {
        let start = self.cell_index(index) * self.max_frame;
        core::cell::UnsafeCell::raw_get(self.bytes[start..start + self.max_frame].as_ptr())
    }
}

/// Wakes a receiver by calling its callback; the `Park` under the inbox's doorbell.
#[derive(Default)]
struct Callback(Mutex<Option<PortWake>>);

impl Callback {
    fn set(&self, wake: Option<PortWake>) {
        let old =
            core::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), wake);
        drop(old); // outside the lock: it may own anything
    }
}

impl Park for Callback {
    /// An inbox's receiver sleeps by its own means.
    fn park(&self, _timeout: Option<Duration>) {}

    /// Once per wake-up, never per packet, so the lock and the reference count do not matter. The
    /// callback runs outside the lock: it may close the receiver.
    fn unpark(&self) {
        let wake = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(wake) = wake {
            wake();
        }
    }
}

/// A bounded queue of frames made of its receiver's own buffers. See the [module](self).
///
/// `B` is a buffer lent to the network: its exclusive owner, with [`AsMut`] giving all its room.
pub struct Inbox<B> {
    /// The word that decides everything: changed by senders and by the collector.
    state: CachePadded<AtomicU64>,
    /// Written by the collector only, read by senders.
    posted: CachePadded<AtomicU32>,
    /// Written by the collector only, read by senders that found no buffer.
    popped: CachePadded<AtomicU32>,
    doorbell: Doorbell<Callback>,
    /// Whether a [`Collector`] exists.
    has_collector: AtomicBool,
    /// Whether the overflow bit may be set: a hint on a line that hardly ever changes, so that a
    /// receiver that finds nothing does not fetch the word from its senders.
    overflowing: CachePadded<AtomicBool>,
    /// Where the bytes of each posted buffer are; null: it has lost its room.
    buffer_ptrs: Box<[UnsafeCell<*mut u8>]>,
    /// How far each posted buffer has come.
    cell_states: Box<[AtomicU64]>,
    /// The posted buffers; touched by the collector only. None: taken back.
    buffers: Box<[UnsafeCell<Option<B>>]>,
    overflow: Overflow,
    max_frame: usize,
}

// SAFETY: the `UnsafeCell`s are of two kinds. The owner of a cell of invariants 1 and 2 changes only
// through the atomics. The buffer cells of invariant 4 belong to the collector, and `has_collector`
// allows one collector at a time. A buffer moves to another thread or is written by one, hence
// `B: Send`. No `&B` is ever shared, so `B: Sync` is not needed.
unsafe impl<B: Send> Sync for Inbox<B> {}
// SAFETY: the raw pointers point into buffers of `B: Send` that the inbox owns (invariant 4), and
// nothing else in the inbox is tied to a thread.
unsafe impl<B: Send> Send for Inbox<B> {}

impl<B> fmt::Debug for Inbox<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox")
            .field("depth", &self.buffer_ptrs.len())
            .field("overflow", &self.overflow.cells.len())
            .field("max_frame", &self.max_frame)
            .finish_non_exhaustive()
    }
}

impl<B: AsMut<[u8]> + Send> Inbox<B> {
    /// A closed inbox for at most `depth` posted buffers and `overflow` waiting frames (both are
    /// rounded up to a power of two; `overflow` may be 0) of at most `max_frame` bytes.
    /// [`open`](Self::open) opens it. This is the only place that allocates.
    ///
    /// # Panics
    ///
    /// If `depth` is 0, or either number is above 2^24.
    pub fn new(depth: u32, overflow: u32, max_frame: usize) -> Self {
        Self::starting_at(depth, overflow, max_frame, 0)
    }

    /// Like [`new`](Self::new), with every index at `start`, so that tests can cross the wrap.
    #[doc(hidden)]
    pub fn starting_at(depth: u32, overflow: u32, max_frame: usize, start: u32) -> Self {
        assert!(depth > 0, "an inbox needs at least one cell");
        assert!(
            depth <= MAX_INBOX_CELLS && overflow <= MAX_INBOX_CELLS,
            "an inbox of more than 2^24 cells"
        );
        assert!(max_frame < WAITED as usize - 1, "frames of 2 GiB");
        let overflow = if overflow == 0 { 0 } else { overflow.next_power_of_two() };
        let depth = depth.next_power_of_two();
        Self {
            state: CachePadded::new(AtomicU64::new(InboxState::new(start, start, CLOSED).0)),
            posted: CachePadded::new(AtomicU32::new(start)),
            popped: CachePadded::new(AtomicU32::new(start & PUSHED_MASK)),
            doorbell: Doorbell::new(Callback::default()),
            has_collector: AtomicBool::new(false),
            overflowing: CachePadded::new(AtomicBool::new(false)),
            buffer_ptrs: (0..depth).map(|_| UnsafeCell::new(core::ptr::null_mut())).collect(),
            cell_states: (0..depth).map(|_| AtomicU64::new(0)).collect(),
            buffers: (0..depth).map(|_| UnsafeCell::new(None)).collect(),
            overflow: Overflow::new(overflow as usize, max_frame),
            max_frame,
        }
    }

    /// Opens the inbox and gives out its one receiving half; `None` while that half exists.
    /// When the half is dropped, the inbox is closed and empty and may be opened again.
    pub fn open(inbox: &Arc<Self>, wake: PortWake) -> Option<Collector<B>> {
        // Acquire: pairs with the Release in `Collector::drop`, so we see the indices that the last
        // collector left.
        if inbox.has_collector.swap(true, Ordering::Acquire) {
            return None;
        }
        let posted = inbox.posted.load(Ordering::Relaxed);
        let mut collector = Collector {
            inbox: Arc::clone(inbox),
            collected: posted,
            posted,
            published: posted,
            popped: inbox.popped.load(Ordering::Relaxed),
            lent: 0,
            gaps: 0,
            not_sync: PhantomData,
        };
        inbox.doorbell.parker().set(Some(wake));
        collector.reopen();
        Some(collector)
    }

    /// The longest frame it takes, and the least room a posted buffer must have.
    pub fn max_frame(&self) -> usize {
        self.max_frame
    }

    /// How many buffers can be posted at once.
    pub fn depth(&self) -> usize {
        self.buffer_ptrs.len()
    }

    /// Whether deliveries are refused. A hint: it may change at once.
    pub fn is_closed(&self) -> bool {
        InboxState(self.state.load(Ordering::Relaxed)).closed()
    }

    /// Whether frames wait in the overflow ring for buffers to be posted. A hint, unless nobody else
    /// delivers: it may change at once.
    #[inline]
    pub fn frames_wait(&self) -> bool {
        InboxState(self.state.load(Ordering::Relaxed)).overflow()
    }

    /// Copies `frame` to the receiver: into the oldest posted buffer, else into the overflow ring.
    /// Waits for nothing but the receiver's look through its posted buffers in
    /// [`recall_if`](Collector::recall_if). It does not wake the receiver: [`ring`](Self::ring) once
    /// after a batch.
    pub fn deliver(&self, frame: &[u8]) -> Delivery {
        if frame.len() > self.max_frame {
            return Delivery::Dropped(Refused::TooBig);
        }
        // Acquire, here and when a `change` fails: pairs with the Release in `change`, `close`,
        // `discard` and `reopen`, so that `posted` and `popped` are never read older than the state.
        let mut seen = self.state.load(Ordering::Acquire);
        loop {
            let state = InboxState(seen);
            if state.0 & (CLOSED | HELD) != 0 {
                if state.closed() {
                    return Delivery::Dropped(Refused::Closed);
                }
                seen = self.wait_while_held();
                continue;
            }
            // Acquire: pairs with the Release in `publish`; the buffer is in its cell.
            if !state.overflow() && state.claimed() != self.posted.load(Ordering::Acquire) {
                let index = state.claimed();
                match self.change(state, state.with_claimed(index.wrapping_add(1))) {
                    Ok(()) => {
                        // Longer ones were refused above.
                        self.fill(index, frame);
                        return Delivery::Direct;
                    }
                    Err(now) => seen = now,
                }
                continue;
            }
            // Acquire: pairs with the Release in `fill_from_overflow` and `discard`; the collector
            // no longer reads the cell.
            let waiting = state.pushed().wrapping_sub(self.popped.load(Ordering::Acquire));
            if ((waiting & PUSHED_MASK) as usize) < self.overflow.cells.len() {
                match self.change(state, state.with_push()) {
                    Ok(()) => {
                        self.fill_overflow(state.pushed(), frame);
                        // Relaxed: a hint; `arm` looks at the word.
                        self.overflowing.store(true, Ordering::Relaxed);
                        return Delivery::Overflow;
                    }
                    Err(now) => seen = now,
                }
                continue;
            }
            // The ring is full, unless the state is stale: `popped` may be newer than the state and
            // make the difference meaningless. Acquire: as for the first load.
            let now = self.state.load(Ordering::Acquire);
            if now == seen {
                return Delivery::Dropped(Refused::NoBuffer);
            }
            seen = now;
        }
    }

    /// Claims posted buffers for up to `wanted` frames, in one step. `None` if none is to be had: the
    /// receiver has closed or is choosing, frames wait in the overflow ring, or no buffer is posted;
    /// [`deliver`](Self::deliver) knows what to do then.
    ///
    /// What was claimed is to be filled: see [`Claim`].
    #[inline]
    pub fn claim(&self, wanted: usize) -> Option<Claim<'_, B>> {
        // Acquire: pairs with the Release in `change`, `close`, `discard` and `reopen`, so that
        // `posted` is not read older than the state.
        let mut state = InboxState(self.state.load(Ordering::Acquire));
        while state.0 & (CLOSED | HELD | OVERFLOW) == 0 {
            let next = state.claimed();
            // Acquire: pairs with the Release in `publish`; the buffers are in their cells.
            let posted = self.posted.load(Ordering::Acquire).wrapping_sub(next);
            // `posted` may be newer than the state. The number of cells bounds it.
            let count = (posted as usize).min(self.buffer_ptrs.len()).min(wanted) as u32;
            if count == 0 {
                return None;
            }
            let end = next.wrapping_add(count);
            match self.change(state, state.with_claimed(end)) {
                Ok(()) => return Some(Claim { inbox: self, next, end }),
                Err(now) => state = InboxState(now),
            }
        }
        None
    }

    /// The word after the receiver has chosen among its posted buffers.
    #[cold]
    fn wait_while_held(&self) -> u64 {
        let backoff = Backoff::new();
        loop {
            // Acquire: pairs with the Release in `change`, by which the receiver clears the held bit
            // in `Held::drop`; the caller goes on with this state as with one it has loaded itself.
            let seen = self.state.load(Ordering::Acquire);
            if !InboxState(seen).held() {
                return seen;
            }
            pause(&backoff);
        }
    }

    /// Wakes the receiver if it has armed. Call it once after a batch of deliveries: it costs a
    /// fence, and only if the receiver sleeps a call of its wake callback. Returns whether it did.
    ///
    /// A sender that has delivered and does not ring may leave the receiver asleep.
    pub fn ring(&self) -> bool {
        self.doorbell.ring()
    }

    /// Changes the state from `from` to `to`, or returns what it is now.
    fn change(&self, from: InboxState, to: InboxState) -> Result<(), u64> {
        // AcqRel and Acquire: pair with each other, with the loads of the state, and with `close`,
        // `discard` and `reopen`. Release publishes what the caller knows of `posted` and `popped` to
        // every thread that sees the new state. Acquire takes the same from the thread that wrote
        // the old one.
        self.state
            .compare_exchange_weak(from.0, to.0, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }

    /// A place in the three arrays, which are equally long, by a power of two.
    #[inline]
    fn cell_index(&self, index: u32) -> usize {
        index as usize & (self.buffer_ptrs.len() - 1)
    }

    #[inline]
    fn cell_state(&self, index: u32) -> &AtomicU64 {
        // SAFETY: `cell_index` is below the number of buffer pointers, and `starting_at` makes as many
        // cell states.
        unsafe { self.cell_states.get_unchecked(self.cell_index(index)) }
    }

    /// The collector's place for the buffer of the posted cell `index`.
    #[inline]
    fn buffer_cell(&self, index: u32) -> &UnsafeCell<Option<B>> {
        // SAFETY: `cell_index` is below the number of buffer pointers, and `starting_at` makes as many
        // buffer cells.
        unsafe { self.buffers.get_unchecked(self.cell_index(index)) }
    }

    #[inline]
    fn buffer_ptr(&self, index: u32) -> &UnsafeCell<*mut u8> {
        // SAFETY: `cell_index` is below the number of buffer pointers.
        unsafe { self.buffer_ptrs.get_unchecked(self.cell_index(index)) }
    }

    /// Copies `frame`, of at most `max_frame` bytes, into the posted buffer `index`, which the caller
    /// has claimed.
    #[inline]
    fn fill(&self, index: u32, frame: &[u8]) {
        debug_assert!(frame.len() <= self.max_frame);
        let len = self.buffer_ptr(index).with_mut(|ptr| {
            // SAFETY: invariant 1: the caller has moved `claimed` past this cell, so the cell is ours
            // until `end_claim` stores its state.
            let ptr = unsafe { *ptr };
            if ptr.is_null() {
                return 0;
            }
            // SAFETY: invariant 4: the pointer is to a lent buffer, which the collector neither moves
            // nor touches before it sees the cell's state, and `checked_ptr` found at least
            // `max_frame` bytes there. The callers have checked that the frame is no longer. The
            // frame is not in the buffer, because it is borrowed and the collector owns the buffer.
            unsafe { ptr.copy_from_nonoverlapping(frame.as_ptr(), frame.len()) };
            frame.len()
        });
        self.end_claim(index, len);
    }

    /// The cell is filled, and the collector's.
    #[inline]
    fn end_claim(&self, index: u32, len: usize) {
        // Release: pairs with the Acquire in `collect`, `is_ready` and `close`; the bytes are in the
        // buffer.
        self.cell_state(index).store(filled(index, len), Ordering::Release);
    }

    /// Copies `frame` into the overflow cell `index`, which the caller has pushed.
    fn fill_overflow(&self, index: u32, frame: &[u8]) {
        let cell = self.overflow.cell(index);
        cell.access.with_mut(|_| {
            // SAFETY: invariant 2: the caller has moved `pushed` past this cell, so its `max_frame`
            // bytes are ours until the store below. `deliver` has checked that the frame is no
            // longer.
            unsafe {
                self.overflow.bytes_of(index).copy_from_nonoverlapping(frame.as_ptr(), frame.len());
            }
        });
        // Release: pairs with the Acquire in `fill_from_overflow`, `is_ready` and `close`; the bytes
        // are in the cell. The length is at most `max_frame`, which `starting_at` keeps below 2 GiB.
        cell.state.store(frame.len() as u32 + 1, Ordering::Release);
    }
}

/// Posted buffers that a sender has claimed and not filled yet. The receiver waits for them, so they
/// are to be filled at once. Those that are not, because of a panic in between, become packets of no
/// bytes when the claim is dropped.
#[must_use = "a claim that is not filled delivers empty packets"]
pub struct Claim<'a, B: AsMut<[u8]> + Send> {
    inbox: &'a Inbox<B>,
    next: u32,
    end: u32,
}

impl<B: AsMut<[u8]> + Send> fmt::Debug for Claim<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim").field("left", &self.left()).finish_non_exhaustive()
    }
}

impl<B: AsMut<[u8]> + Send> Claim<'_, B> {
    /// Buffers that are still to be filled.
    #[inline]
    pub fn left(&self) -> usize {
        self.end.wrapping_sub(self.next) as usize
    }

    /// Copies `frame` into the next buffer. False if there is none, or if the frame is longer than
    /// [`Inbox::max_frame`]: then nothing has happened.
    #[inline]
    pub fn fill(&mut self, frame: &[u8]) -> bool {
        if self.next == self.end || frame.len() > self.inbox.max_frame {
            return false;
        }
        self.inbox.fill(self.next, frame);
        self.next = self.next.wrapping_add(1);
        true
    }
}

impl<B: AsMut<[u8]> + Send> Drop for Claim<'_, B> {
    #[inline]
    fn drop(&mut self) {
        while self.next != self.end {
            self.inbox.end_claim(self.next, 0);
            self.next = self.next.wrapping_add(1);
        }
    }
}

/// Copies what fits. All of it does, unless a buffer has shrunk since it was posted.
fn copy_what_fits(to: &mut [u8], from: &[u8]) -> usize {
    let len = to.len().min(from.len());
    to[..len].copy_from_slice(&from[..len]);
    len
}

/// Where a buffer's bytes are, if there are enough of them. To be asked of a buffer that stays where it
/// is (invariant 4).
fn checked_ptr<B: AsMut<[u8]>>(buffer: &mut B, max_frame: usize) -> Option<*mut u8> {
    let bytes = buffer.as_mut();
    (bytes.len() >= max_frame).then_some(bytes.as_mut_ptr())
}

/// The receiving half of an [`Inbox`]: posts buffers and collects packets. Dropping it closes the
/// inbox (waiting for copies under way) and drops the buffers that are still in it.
pub struct Collector<B: AsMut<[u8]> + Send> {
    inbox: Arc<Inbox<B>>,
    /// Cells before this one have been taken out.
    collected: u32,
    /// Cells before this one have a buffer, or had one.
    posted: u32,
    /// What `inbox.posted` says: how many of them senders know of.
    published: u32,
    /// What `inbox.popped` says.
    popped: u32,
    /// Buffers in the inbox.
    lent: usize,
    /// Cells that are posted and not collected, and whose buffer was taken back.
    gaps: u32,
    not_sync: PhantomData<core::cell::Cell<()>>,
}

impl<B: AsMut<[u8]> + Send> fmt::Debug for Collector<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").field("posted", &self.lent).finish_non_exhaustive()
    }
}

impl<B: AsMut<[u8]> + Send> Collector<B> {
    /// The inbox this half receives from.
    pub fn inbox(&self) -> &Arc<Inbox<B>> {
        &self.inbox
    }

    /// How many buffers are in the inbox, filled or not.
    pub fn posted(&self) -> usize {
        self.lent
    }

    /// Whether [`post`](Self::post) would find no cell for another buffer.
    pub fn is_full(&self) -> bool {
        self.posted.wrapping_sub(self.collected) as usize >= self.inbox.buffer_ptrs.len()
    }

    /// Lends a buffer to the network. It comes back from [`collect`](Self::collect) with a packet,
    /// in the order of posting, or from [`recall`](Self::recall) without one.
    ///
    /// # Errors
    ///
    /// The buffer comes straight back if the inbox [is full](Self::is_full), or if the buffer has
    /// less room than [`Inbox::max_frame`].
    pub fn post(&mut self, buffer: B) -> Result<(), B> {
        self.stage(buffer)?;
        self.publish();
        Ok(())
    }

    /// As [`post`](Self::post), but senders do not see the buffer before [`publish`](Self::publish):
    /// for several buffers.
    ///
    /// # Errors
    ///
    /// As [`post`](Self::post).
    #[inline(always)]
    pub fn stage(&mut self, buffer: B) -> Result<(), B> {
        if self.is_full() {
            return Err(buffer);
        }
        let inbox = &*self.inbox;
        let ptr = inbox.buffer_cell(self.posted).with_mut(|cell| {
            // SAFETY: invariant 4: only the collector uses the buffer cells, and `&mut self` is it.
            let cell = unsafe { &mut *cell };
            // The cell is empty, so there is nothing to drop.
            core::mem::forget(cell.replace(buffer));
            let ptr = cell.as_mut().and_then(|buffer| checked_ptr(buffer, inbox.max_frame));
            ptr.ok_or_else(|| cell.take())
        });
        match ptr {
            Ok(ptr) => self.store_buffer_ptr(self.posted, ptr),
            Err(Some(buffer)) => return Err(buffer),
            Err(None) => unreachable!("it was put there above"),
        }
        self.posted = self.posted.wrapping_add(1);
        self.lent += 1;
        Ok(())
    }

    /// Writes down where the bytes of the buffer of cell `index` are. The cell is the collector's.
    #[inline(always)]
    fn store_buffer_ptr(&self, index: u32, ptr: *mut u8) {
        self.inbox.buffer_ptr(index).with_mut(|stored| {
            // SAFETY: invariant 1: the callers, `stage` and `Held::drop`, pass a cell that no sender can
            // claim now, so it is ours.
            // A pointer that has not changed is not written, so that its cache line stays with the
            // senders.
            unsafe {
                if *stored != ptr {
                    *stored = ptr;
                }
            }
        });
    }

    /// Shows what was [staged](Self::stage) to the senders, with one store.
    #[inline]
    pub fn publish(&mut self) {
        if self.published != self.posted {
            // Release: pairs with the Acquire in `deliver` and `claim`; a sender that claims the cells
            // sees the buffer pointers.
            self.inbox.posted.store(self.posted, Ordering::Release);
            self.published = self.posted;
        }
    }

    /// The next packet, or `None` if there is none, if its sender is still copying (it will
    /// [ring](Inbox::ring)), or if it waits in the overflow ring for a buffer to be posted.
    #[inline(always)]
    pub fn collect(&mut self) -> Option<Collected<B>> {
        loop {
            if self.collected == self.posted {
                return None;
            }
            // Acquire: pairs with the Release in `end_claim`; the sender's copy is complete.
            let cell_state = self.inbox.cell_state(self.collected).load(Ordering::Acquire);
            if let Some(with) = filled_with(cell_state, self.collected) {
                let buffer = self.take()?;
                if self.gaps > 0 {
                    self.skip_taken_back();
                }
                let (len, overflow) = ((with & !WAITED) as usize - 1, with & WAITED != 0);
                return Some(Collected { buffer, len, overflow });
            }
            // Relaxed: see `overflowing`.
            if !self.inbox.overflowing.load(Ordering::Relaxed) || !self.fill_from_overflow() {
                return None;
            }
        }
    }

    /// Steps over the cells that come next and whose buffer was taken back, if a recall left any behind
    /// a claim.
    #[cold]
    #[inline(never)]
    fn skip_taken_back(&mut self) {
        while self.gaps > 0 && self.collected != self.posted {
            let taken = self.inbox.buffer_cell(self.collected).with(|cell| {
                // SAFETY: invariant 4: only the collector uses the buffer cells, and `&mut self` is it.
                unsafe { (*cell).is_none() }
            });
            if !taken {
                break;
            }
            self.collected = self.collected.wrapping_add(1);
            self.gaps -= 1;
        }
    }

    /// Takes the buffer out of the cell `collected` and steps over it. The caller has made sure
    /// that the cell is the collector's.
    #[inline(always)]
    fn take(&mut self) -> Option<B> {
        let buffer = self.take_from(self.collected);
        self.collected = self.collected.wrapping_add(1);
        buffer
    }

    /// Takes the buffer out of a cell that is the collector's.
    #[inline(always)]
    fn take_from(&mut self, index: u32) -> Option<B> {
        // Where loom sees whether a sender still writes.
        self.inbox.buffer_ptr(index).with_mut(|_| ());
        let buffer = self.inbox.buffer_cell(index).with_mut(|cell| {
            // SAFETY: invariant 4: only the collector uses the buffer cells, and `&mut self` is it. The
            // callers have made sure that no sender writes through the buffer pointer any more: the
            // cell is filled, or was never claimed (invariant 1).
            unsafe { (*cell).take() }
        });
        self.lent -= usize::from(buffer.is_some());
        buffer
    }

    /// Moves the oldest frame of the overflow ring into the oldest posted buffer, if there are
    /// both and no earlier claim is still being filled. Whether it did: then the buffer is to be collected.
    #[cold]
    #[inline(never)]
    fn fill_from_overflow(&mut self) -> bool {
        // We are about to move `claimed`, which must not overtake what senders know.
        self.publish();
        // Acquire: pairs with the Release in `change`.
        let state = InboxState(self.inbox.state.load(Ordering::Acquire));
        if state.claimed() != self.collected || !state.overflow() {
            return false;
        }
        let waiting = self.inbox.overflow.cell(self.popped);
        // Acquire: pairs with the Release in `fill_overflow`; the sender's copy is complete.
        let cell_state = waiting.state.load(Ordering::Acquire);
        if cell_state == PENDING {
            return false;
        }
        let len = cell_state as usize - 1;
        let cell = self.inbox.buffer_cell(self.collected);
        let len = waiting.access.with(|_| {
            cell.with_mut(|cell| {
                // SAFETY: invariant 2: the sender has stored the cell's state, and we have not popped
                // the cell, so it is ours. Its sender wrote the first `len` bytes.
                let frame = unsafe {
                    core::slice::from_raw_parts(self.inbox.overflow.bytes_of(self.popped), len)
                };
                // SAFETY: invariants 1 and 4: the cell is posted and unclaimed, and the overflow bit is
                // set. No sender claims before we clear the bit below, so the cell is ours.
                let buffer = unsafe { &mut *cell };
                buffer.as_mut().map_or(0, |buffer| copy_what_fits(buffer.as_mut(), frame))
            })
        });
        waiting.state.store(PENDING, Ordering::Relaxed); // published by `popped`
        let popped = self.popped.wrapping_add(1) & PUSHED_MASK;
        let mut state = state;
        loop {
            let mut next = state.with_claimed(self.collected.wrapping_add(1));
            let last = state.pushed() == popped;
            if last {
                next = next.without(OVERFLOW); // it was the last: senders may claim again
            }
            // Before the change: who sets the bit again raises the hint after it.
            self.inbox.overflowing.store(!last, Ordering::Relaxed);
            match self.inbox.change(state, next) {
                Ok(()) => break,
                Err(now) => state = InboxState(now), // somebody pushed; nobody claimed
            }
        }
        self.popped = popped;
        // Release: pairs with the Acquire in `deliver`; we no longer read the cell.
        self.inbox.popped.store(popped, Ordering::Release);
        // Relaxed: the cell is ours, as just now, and we are who looks at it next.
        let cell_state = filled(self.collected, len) | u64::from(WAITED);
        self.inbox.cell_state(self.collected).store(cell_state, Ordering::Relaxed);
        true
    }

    /// Takes back every posted buffer that no sender has claimed, and gives each to `f`. Buffers
    /// that are being filled come later, with their packets: a recall drops no packet. Frames in
    /// the overflow ring stay there. Returns how many buffers came back.
    pub fn recall(&mut self, mut f: impl FnMut(B)) -> usize {
        // `claimed` must not overtake what senders know.
        self.publish();
        // Acquire: pairs with the Release in `change`.
        let mut state = InboxState(self.inbox.state.load(Ordering::Acquire));
        while let Err(now) = self.inbox.change(state, state.with_claimed(self.posted)) {
            state = InboxState(now);
        }
        // We moved `claimed` past these cells, so they are ours.
        let cells = state.claimed()..self.posted;
        let mut count = 0;
        for index in indices(&cells) {
            if let Some(buffer) = self.take_from(index) {
                count += 1;
                self.gaps += 1;
                f(buffer);
            }
        }
        self.skip_taken_back();
        count
    }

    /// Takes back the posted buffers that no sender has claimed and that `matches`, and gives each to
    /// `f`, oldest first. The others stay posted, in their order, and are never out of the senders'
    /// reach: a sender that comes meanwhile waits, so `matches` and `f` should be short. Like
    /// [`recall`](Self::recall) it drops no packet. Returns how many buffers came back.
    pub fn recall_if(
        &mut self,
        mut matches: impl FnMut(&mut B) -> bool,
        mut f: impl FnMut(B),
    ) -> usize {
        self.publish();
        // Acquire: pairs with the Release in `change`.
        let mut state = InboxState(self.inbox.state.load(Ordering::Acquire));
        // While the overflow bit is set no sender claims, and only we clear it.
        while !state.overflow() && state.claimed() != self.posted {
            match self.inbox.change(state, InboxState(state.0 | HELD)) {
                Ok(()) => break,
                Err(now) => state = InboxState(now),
            }
        }
        let start = state.claimed();
        let mut held = Held { collector: self, start, taken: 0 };
        for index in indices(&(start..held.collector.posted)) {
            let buffer = held.collector.inbox.buffer_cell(index).with_mut(|cell| {
                // SAFETY: invariants 1 and 4: the cell is posted and unclaimed, and the overflow bit or
                // the held bit is set. No sender claims before `held` is dropped, so the cell is ours.
                let cell = unsafe { &mut *cell };
                if cell.as_mut().is_some_and(&mut matches) { cell.take() } else { None }
            });
            if let Some(buffer) = buffer {
                held.collector.lent -= 1;
                held.collector.gaps += 1;
                held.taken += 1;
                f(buffer);
            }
        }
        held.taken as usize
    }

    /// The receiver wants to sleep. True: nothing can be collected, and the next sender to ring
    /// calls the wake callback, once. False: there is something to collect, and the receiver stays
    /// awake.
    ///
    /// A frame that is still being copied does not count, because its sender has yet to ring; nor
    /// does one that waits in the overflow ring while no buffer is posted: who posts must collect.
    pub fn arm(&mut self) -> bool {
        // The doorbell's fence is between its flag and our look: either the ringer sees the flag
        // or we see its packet (see `vmring_core::doorbell`).
        self.inbox.doorbell.arm();
        let asleep = !self.is_ready();
        if !asleep {
            self.inbox.doorbell.disarm();
        }
        asleep
    }

    /// The receiver is awake again: senders no longer call the wake callback. Returns false if one
    /// has already done so, or is about to.
    pub fn disarm(&mut self) -> bool {
        self.inbox.doorbell.disarm()
    }

    /// Whether [`collect`](Self::collect) would return a packet.
    pub fn is_ready(&self) -> bool {
        let index = self.collected;
        if index == self.posted {
            return false;
        }
        // Acquire: pairs with the Release in `end_claim`.
        if filled_with(self.inbox.cell_state(index).load(Ordering::Acquire), index).is_some() {
            return true;
        }
        // Acquire: pairs with the Release in `change`.
        let state = InboxState(self.inbox.state.load(Ordering::Acquire));
        // Acquire, of the cell's state: pairs with the Release in `fill_overflow`.
        let ready = state.claimed() == index
            && state.overflow()
            && self.inbox.overflow.cell(self.popped).state.load(Ordering::Acquire) != PENDING;
        if ready {
            // Whoever is told that there is something must find it.
            self.inbox.overflowing.store(true, Ordering::Relaxed);
        }
        ready
    }

    /// Refuses further deliveries and waits for those under way, each of which is the copying of
    /// one frame, or of a [`Claim`]'s. When it returns, no sender touches any buffer. Packets that have arrived can
    /// still be collected and the other buffers recalled; [`discard`](Self::discard) drops the
    /// rest.
    pub fn close(&mut self) {
        // AcqRel: pairs with `change`, by which senders claim and push, and with their loads of the
        // state in `deliver` and `claim`.
        let state = InboxState(self.inbox.state.fetch_or(CLOSED, Ordering::AcqRel));
        for index in indices(&(self.collected..state.claimed())) {
            // A buffer that was taken back is no sender's.
            let lent = self.inbox.buffer_cell(index).with(|cell| {
                // SAFETY: invariant 4: only the collector uses the buffer cells, and `&mut self` is it.
                unsafe { (*cell).is_some() }
            });
            if lent {
                // Acquire: pairs with the Release in `end_claim`; the sender no longer uses the buffer.
                wait(|| {
                    filled_with(self.inbox.cell_state(index).load(Ordering::Acquire), index)
                        .is_some()
                });
            }
        }
        let mut index = self.popped;
        while index != state.pushed() {
            // Acquire: pairs with the Release in `fill_overflow`; the sender no longer uses the cell.
            let cell = self.inbox.overflow.cell(index);
            wait(|| cell.state.load(Ordering::Acquire) != PENDING);
            index = index.wrapping_add(1) & PUSHED_MASK;
        }
    }

    /// Closes, then drops every packet that has not been collected and gives every buffer to `f`.
    /// Returns how many packets were dropped.
    pub fn discard(&mut self, mut f: impl FnMut(B)) -> usize {
        self.close();
        let mut dropped = 0;
        while let Some(packet) = self.collect() {
            dropped += 1;
            f(packet.buffer);
        }
        self.recall(&mut f);
        // Nobody else changes the state of a closed inbox. Acquire: pairs with the Release in
        // `change`.
        let state = InboxState(self.inbox.state.load(Ordering::Acquire));
        while self.popped != state.pushed() {
            // Relaxed: published by `popped` below.
            self.inbox.overflow.cell(self.popped).state.store(PENDING, Ordering::Relaxed);
            self.popped = self.popped.wrapping_add(1) & PUSHED_MASK;
            dropped += 1;
        }
        // Release: pairs with the Acquire in `deliver`; we no longer read the cells.
        self.inbox.popped.store(self.popped, Ordering::Release);
        self.inbox.overflowing.store(false, Ordering::Relaxed);
        // Release: pairs with the Acquire in `deliver` and `claim` of senders that come after a
        // `reopen`.
        self.inbox.state.store(state.without(OVERFLOW).0, Ordering::Release);
        dropped
    }

    /// Accepts deliveries again after a [`close`](Self::close). What was not collected before
    /// stays where it was. No effect on an open inbox.
    pub fn reopen(&mut self) {
        // AcqRel: pairs with the loads of the state in `deliver` and `claim`, which then see our
        // indices, and with `change`.
        self.inbox.state.fetch_and(!CLOSED, Ordering::AcqRel);
    }
}

/// The cells `start..posted`, kept from the senders by the overflow bit or the held bit, some without
/// their buffer. Dropped, also by a panic, it gives the senders those that have one.
struct Held<'a, B: AsMut<[u8]> + Send> {
    collector: &'a mut Collector<B>,
    start: u32,
    taken: u32,
}

impl<B: AsMut<[u8]> + Send> Drop for Held<'_, B> {
    fn drop(&mut self) {
        let (start, posted) = (self.start, self.collector.posted);
        let inbox = &*self.collector.inbox;
        // Those that stay move up to the last cells, the newest first. The indices that senders
        // compare only ever grow, so none can mistake what it saw before for what is there now.
        let first = start.wrapping_add(self.taken);
        let mut free = posted;
        for index in indices(&(start..posted)).rev() {
            let buffer = inbox.buffer_cell(index).with_mut(|cell| {
                // SAFETY: invariants 1 and 4: `recall_if` made this guard with the overflow bit or the
                // held bit set, and we clear the held bit only below, so no sender claims the cell.
                unsafe { (*cell).take() }
            });
            if let Some(buffer) = buffer {
                free = free.wrapping_sub(1);
                let ptr = inbox.buffer_cell(free).with_mut(|cell| {
                    // SAFETY: invariants 1 and 4: this cell is in the same range, so no sender claims it
                    // either. It is empty: its buffer was taken in this loop, or was taken back.
                    let buffer = unsafe { (*cell).insert(buffer) };
                    // It may have moved, and whoever was asked about it may have changed it. Senders wait
                    // for us, so not even a buffer that panics may end this: one that has no room any
                    // more gets packets of no bytes.
                    let ask = AssertUnwindSafe(|| checked_ptr(buffer, inbox.max_frame));
                    catch_unwind(ask).ok().flatten().unwrap_or_default()
                });
                self.collector.store_buffer_ptr(free, ptr);
            }
        }
        // Relaxed: `change` below acquires.
        let mut state = InboxState(inbox.state.load(Ordering::Relaxed));
        while let Err(now) = inbox.change(state, state.with_claimed(first).without(HELD)) {
            state = InboxState(now); // somebody pushed; nobody claimed
        }
        self.collector.skip_taken_back();
    }
}

impl<B: AsMut<[u8]> + Send> Drop for Collector<B> {
    fn drop(&mut self) {
        self.inbox.doorbell.disarm();
        self.inbox.doorbell.parker().set(None);
        self.discard(drop);
        // Release: pairs with the Acquire in `open`; the next collector sees our indices.
        self.inbox.has_collector.store(false, Ordering::Release);
    }
}

/// Waits until a claim has ended: as long as copying its frames takes.
fn wait(ended: impl Fn() -> bool) {
    let backoff = Backoff::new();
    while !ended() {
        pause(&backoff);
    }
}

fn pause(backoff: &Backoff) {
    if cfg!(loom) {
        spin_loop();
    } else {
        backoff.snooze();
    }
}

/// The indices of a range that may wrap.
fn indices(range: &Range<u32>) -> impl DoubleEndedIterator<Item = u32> + use<> {
    let start = range.start;
    (0..range.end.wrapping_sub(start)).map(move |offset| start.wrapping_add(offset))
}
