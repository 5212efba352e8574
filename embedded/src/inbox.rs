//! The forwarding mechanism: the buffers a receiver has posted *are* its queue.
//!
//! An [`Inbox`] belongs to one receiver (its [`Collector`]), and any thread may deliver to it. The
//! receiver posts empty buffers. A sender claims the oldest one and copies its frame into it, and
//! the receiver collects it. That is the only copy. Frames and buffers may be in the memory of
//! guests. If no buffer is posted, the frame goes to a
//! fixed overflow ring, which costs a second copy when the frame is collected. If the ring is full
//! too, the frame is dropped and the sender gets that result. Nothing here blocks, locks, allocates
//! or makes a system call, with two exceptions: [`Collector::close`] waits for copies that are
//! under way, and senders wait while [`Collector::recall_if`] looks through the posted buffers.
//!
//! # Words
//!
//! An inbox is not a ring of entries, so it has words of its own:
//!
//! | Here | Meaning | io_uring or rtrb |
//! |---|---|---|
//! | [`post`](Collector::post) | lends a buffer and publishes it | add to a provided-buffer ring and advance its tail |
//! | [`stage`](Collector::stage) | lends a buffer that senders do not see yet | `io_uring_buf_ring_add`; rtrb's write chunk |
//! | [`publish`](Collector::publish) | shows all staged buffers, with one store | `io_uring_buf_ring_advance`; rtrb's `commit` |
//! | lent | between `stage` and its return: the inbox has the buffer | a provided buffer |
//! | [`deliver`](Inbox::deliver) | claims a buffer and fills it | the kernel picks a provided buffer for a receive |
//! | [`claim`](Inbox::claim) | takes several posted buffers in one step, to fill them | a receive that takes a bundle of provided buffers |
//! | [`ring`](Inbox::ring) | wakes the receiver if it sleeps | the eventfd of a completion queue |
//! | [`collect`](Collector::collect) | takes a filled buffer out | reap a completion; rtrb's `pop` |
//! | [`recall`](Collector::recall) | takes buffers back that are not claimed | cancel the receives |
//! | overflow | frames that came while no buffer was posted | a socket's receive queue |
//!
//! # How it works
//!
//! One 64-bit atomic, the *state*, decides everything. It says how many posted buffers were ever
//! claimed, how many frames were ever pushed to the overflow ring, whether that ring is in use (the
//! *overflow bit*), whether the receiver is choosing among its posted buffers (the *held bit*),
//! whether some posted buffers are small, and whether the inbox is closed. A sender changes the
//! state with one compare-and-swap. If that succeeds, the sender owns the cell it counted until it
//! stores the cell's own state.
//!
//! - While the overflow bit is clear, senders claim posted buffers in the order they were posted.
//! - If a posted buffer may be smaller than the longest frame (the *small bit*), a sender looks how
//!   much space there is in each before it claims. A frame that is longer than the first claims the
//!   next ones too, in the same step. It claims all that it needs, or goes to the overflow ring.
//! - When none is left, a push sets the overflow bit. While it is set no sender claims a posted
//!   buffer. Only the receiver moves frames from the ring to posted buffers, and it clears the bit
//!   in the same step that takes the last frame.
//! - To take back some posted buffers and leave the others, the receiver sets the held bit. While
//!   it is set no sender changes the state: it waits, for as long as it takes to look at each
//!   posted buffer. The sender does not use the overflow ring instead, nor does it drop its frame,
//!   because the buffers that stay may suffice. If the overflow bit is set, senders claim nothing,
//!   so the receiver does not set the held bit.
//! - The receiver drops the oldest frame of the overflow ring, and counts it, if it is about to sleep
//!   and all posted buffers together are too small for that frame.
//!
//! The changes of the state put all frames in one order, and the receiver collects them in that
//! order: frames of one sender are never reordered, and buffers are filled in the order of posting.
//!
//! # Invariants
//!
//! 1. *A posted cell has one owner.* Cells `collected..claimed` belong to the sender that made the
//!    claim until it stores the cell's state, and to the collector after that. Cells
//!    `claimed..posted` belong to the thread that next moves `claimed`, and to no other; while the
//!    overflow bit or the held bit is set, only the collector moves it. All other cells belong to
//!    the collector. The owner of a cell may write to its buffer.
//! 2. *An overflow cell has one owner.* Cells `popped..pushed` belong to the sender that pushed
//!    until it stores the cell's state, and to the collector after that. All other cells belong to
//!    the thread that next moves `pushed`.
//! 3. *Once closed, the state counts no new claim.* `close` returns only when every cell that was
//!    claimed before has its own state.
//! 4. *A lent buffer stays where it is.* It lies in the collector's own list and is not touched
//!    from the moment its buffer pointer is stored until it is collected or taken back. If the
//!    collector moves a buffer, it stores the pointer anew. So a sender needs the pointer only, and
//!    the buffers stay in the receiver's cache.
//! 5. *A claim ends, whoever made it.* If a copy panics, its packet becomes one of no bytes, in the same
//!    buffers. So does the rest of a [`Claim`] that is dropped. If the receiver's own copy panics, out of
//!    the overflow ring, that frame leaves the ring all the same.
//!
//! # What crosses between processors
//!
//! A buffer pointer is 8 bytes and a cell state is 8 bytes, in two arrays: eight of either to a
//! cache line. The receiver writes the pointers, the senders write the states. A cell state carries
//! the index it is for, so nobody resets it, and a pointer that is the same as a lap ago is not
//! written again. A sender that has several frames for the inbox claims their buffers in one step
//! ([`Inbox::claim`]) and stores the states of a cache line together, and a receiver publishes
//! several buffers with one store ([`Collector::stage`]). For a guest's buffer there are two more
//! arrays: where the buffer is, and how much space there is. Senders do not look at these for other
//! buffers.
//!
//! An inbox [with headers](Inbox::with_headers) keeps the pointers to its buffers in an array of its
//! own, and the pointers above are null. So a sender to an inbox without headers need not ask which
//! of the two it is.
//!
//! All parts of a frame that fills several buffers are one claim. The sender stores the state of the
//! first buffer last, so a receiver that sees it finds the others too.
//!
//! # Periods
//!
//! A sender decides by what it knows of the receiver before it claims: where an address is, and which
//! work the receiver does itself. Both may change. They change only while the inbox is closed and empty
//! of buffers, and each such change begins a *period*: the indices move on by one, past a cell that
//! nobody gets. So no state of an earlier period comes back, and a sender that looks at what it has
//! decided by *after* it has loaded the state (`Inbox::deliver_if`) succeeds only if that held when
//! it changed the state.
//!
//! Indices wrap. To mistake one lap for another, a sender would have to sleep for exactly 2^32
//! claims between its load and its compare-and-swap.

use core::fmt;
use core::marker::PhantomData;
use core::ops::Range;
use core::time::Duration;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use crossbeam_utils::{Backoff, CachePadded};
use vmring_core::GuestBuffer;
use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::guest::Segments;
use vmring_core::offload::{self, OffloadHeader};
use vmring_core::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, Ordering, UnsafeCell, spin_loop};
use vmring_core::view::ETHERNET_HEADER_LEN;

use vmring_core::{prefetch_for_writing, prefetch_line_for_writing};

use crate::limits::{
    ASKED_AHEAD, GROUP_MAX, LONG_PACKET, MAX_INBOX_CELLS, SHORT_LOOKS, SHORT_PACKET, STATES_AT_ONCE,
};
use crate::packet::{Packet, PacketBuffer, copy_in_one_piece};

/// The callback that wakes a receiver. A sender's thread calls it when a receiver that has
/// [armed](Collector::arm) has something to collect. It must not block. It may still be called once
/// while the receiver closes, or shortly after.
pub type PortWake = std::sync::Arc<dyn Fn() + Send + Sync>;

/// What happened to a frame given to [`Inbox::deliver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Copied into a posted buffer.
    Direct,
    /// Copied into the overflow ring, because no buffer was posted or older frames wait there.
    Overflow,
    /// Not accepted, for this reason.
    Dropped(Refused),
}

/// Why an inbox did not accept a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused {
    /// No buffer is posted and the overflow ring is full.
    NoBuffer,
    /// The frame is longer than the inbox's `max_frame`.
    TooBig,
    /// The receiver has closed the inbox.
    Closed,
    /// What the sender has decided by no longer holds. Only `Inbox::deliver_if` says this.
    Stale,
}

/// A packet as it comes out of an inbox.
#[derive(Debug)]
pub struct Collected<B> {
    /// The buffer the receiver posted.
    pub buffer: B,
    /// How many bytes of it the packet fills. In a guest's buffer, the header does not count.
    pub len: usize,
    /// Whether the packet goes on in the next buffer, which is collected next.
    pub more: bool,
    /// Whether the packet waited in the overflow ring, which cost it a second copy.
    pub overflow: bool,
}

/// The state of an overflow cell that holds no frame. If it holds one, the state is the frame's
/// length plus one.
const PENDING: u32 = 0;

/// The state of a posted cell that is filled: the index it is for, and the length of what is in it
/// plus one, with flags. Any other value means that the cell is pending, and so does the value of an
/// earlier lap.
#[inline]
fn filled(index: u32, len: usize, flags: u32) -> u64 {
    u64::from(index) << 32 | (len as u64 + 1) | u64::from(flags)
}

/// A flag beside the length in the state of a posted cell: the frame has waited in the overflow
/// ring.
const WAITED: u32 = 1 << 31;
/// A flag beside it: the frame goes on in the next cell.
const MORE: u32 = 1 << 30;

/// The low half of the state of the posted cell `index` (the flags and the length plus one), if the
/// cell is filled.
#[inline]
fn filled_with(cell_state: u64, index: u32) -> Option<u32> {
    ((cell_state >> 32) as u32 == index && cell_state as u32 != 0).then_some(cell_state as u32)
}

/// The length of the packet in the posted cell `index`, if the cell is filled, and its state has no flags.
#[inline(always)]
fn filled_alone(cell_state: u64, index: u32) -> Option<usize> {
    // For another index the difference is too large.
    let len = cell_state.wrapping_sub(filled(index, 0, 0));
    (len < u64::from(MORE) - 1).then_some(len as usize)
}

/// How many bytes fit into a posted buffer: those of all its segments, times two, plus one if a header
/// of a guest is among them.
#[derive(Clone, Copy)]
struct Room(u32);

impl Room {
    /// The room in a buffer that has space for every frame.
    const ANY: Self = Self(u32::MAX);

    fn of(guest: &GuestBuffer) -> Self {
        // A guest's buffer has less than 2 GiB.
        let total = guest.header_len() + guest.capacity();
        Self((total as u32) << 1 | u32::from(guest.header_len() > 0))
    }

    /// The space for a part of a packet. Only the first part has the header in front of it.
    fn of_part(self, is_first: bool) -> usize {
        let header = if is_first && self.0 & 1 != 0 { offload::LEN } else { 0 };
        ((self.0 >> 1) as usize).saturating_sub(header)
    }
}

/// Where the bytes of a posted buffer are. At most one of the pointers is not null.
struct Place {
    bytes: *mut u8,
    header: *mut u8,
    guest: *const GuestBuffer,
    room: Room,
}

impl Place {
    /// The place of a buffer that has become too small. It gets packets of no bytes.
    const NOWHERE: Self = Self {
        bytes: core::ptr::null_mut(),
        header: core::ptr::null_mut(),
        guest: core::ptr::null(),
        room: Room::ANY,
    };
}

/// The index of the overflow ring takes 28 bits of the state.
const PUSHED_MASK: u32 = (1 << 28) - 1;
/// A posted buffer may be smaller than the longest frame, so senders look how much space there is.
const SMALL: u64 = 1 << 60;
/// The receiver is choosing among its posted buffers.
const HELD: u64 = 1 << 61;
/// The overflow ring is in use.
const OVERFLOW: u64 = 1 << 62;
/// The inbox accepts no frame.
const CLOSED: u64 = 1 << 63;

/// The value that decides everything: `claimed` in bits 0 to 31, `pushed` in bits 32 to 59, and the
/// four flags.
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

    fn small(self) -> bool {
        self.0 & SMALL != 0
    }

    fn with_claimed(self, claimed: u32) -> Self {
        Self(self.0 & !u64::from(u32::MAX) | u64::from(claimed))
    }

    fn with_push(self) -> Self {
        Self::new(
            self.claimed(),
            self.pushed().wrapping_add(1),
            self.0 & (CLOSED | SMALL) | OVERFLOW,
        )
    }

    fn without(self, flags: u64) -> Self {
        Self(self.0 & !flags)
    }
}

/// One of an inbox's arrays, which have an element for each posted cell. A loop over many cells keeps it in
/// registers: what it writes into buffers might be the inbox itself, for all that the compiler knows.
struct Cells<'a, T> {
    cells: &'a [T],
    mask: usize,
}

impl<'a, T> Cells<'a, T> {
    #[inline(always)]
    fn get(&self, index: u32) -> &'a T {
        // SAFETY: `build` makes `mask + 1` elements of each array, and neither changes afterwards.
        unsafe { self.cells.get_unchecked(index as usize & self.mask) }
    }
}

/// The state of one overflow cell. Its bytes lie in [`Overflow::bytes`]. Loom watches accesses to
/// them through `access`, which is empty.
struct OverflowCell {
    state: AtomicU32,
    access: UnsafeCell<()>,
}

/// The ring of frames that wait for a buffer.
struct Overflow {
    cells: Box<[OverflowCell]>,
    /// `cells.len() * cell_len` bytes. The allocator zeroes them, so pages that were never used
    /// cost no memory.
    bytes: Box<[core::cell::UnsafeCell<u8>]>,
    /// The longest frame, and the header in front of it if the inbox has headers.
    cell_len: usize,
}

impl Overflow {
    fn new(cells: usize, cell_len: usize) -> Self {
        let bytes = Box::into_raw(vec![0u8; cells * cell_len].into_boxed_slice());
        Self {
            cells: (0..cells)
                .map(|_| OverflowCell {
                    state: AtomicU32::new(PENDING),
                    access: UnsafeCell::new(()),
                })
                .collect(),
            // SAFETY: `bytes` comes from `Box::into_raw` in the first line of this function and
            // goes nowhere else. `UnsafeCell<u8>` has the layout of `u8`.
            bytes: unsafe { Box::from_raw(bytes as *mut [core::cell::UnsafeCell<u8>]) },
            cell_len,
        }
    }

    fn cell(&self, index: u32) -> &OverflowCell {
        &self.cells[self.cell_index(index)]
    }

    fn cell_index(&self, index: u32) -> usize {
        index as usize & (self.cells.len() - 1)
    }

    /// A pointer to the `cell_len` bytes of a cell.
    fn bytes_of(&self, index: u32) -> *mut u8 {
        let start = self.cell_index(index) * self.cell_len;
        core::cell::UnsafeCell::raw_get(self.bytes[start..start + self.cell_len].as_ptr())
    }
}

/// The `Park` under the inbox's doorbell: wakes a receiver by calling its callback.
#[derive(Default)]
struct Callback(Mutex<Option<PortWake>>);

impl Callback {
    fn set(&self, wake: Option<PortWake>) {
        let old =
            core::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), wake);
        drop(old); // outside the lock, because it may own anything
    }
}

impl Park for Callback {
    /// Does nothing: an inbox's receiver sleeps by its own means.
    fn park(&self, _timeout: Option<Duration>) {}

    /// Runs once per wake-up and never per packet, so the cost of the lock and of the reference
    /// count does not matter. The callback runs outside the lock, because it may close the
    /// receiver.
    fn unpark(&self) {
        let wake = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(wake) = wake {
            wake();
        }
    }
}

/// A bounded queue of frames, made of its receiver's own buffers. See the [module](self).
///
/// `B` is a buffer that is lent to the network. It owns its bytes exclusively, and [`AsMut`] gives
/// all of them.
pub struct Inbox<B> {
    /// The [`InboxState`]. Senders and the collector change it.
    state: CachePadded<AtomicU64>,
    /// How many buffers were ever published. The collector writes it, senders read it.
    posted: CachePadded<AtomicU32>,
    /// How many frames ever left the overflow ring. The collector writes it, senders that found no
    /// buffer read it.
    popped: CachePadded<AtomicU32>,
    doorbell: Doorbell<Callback>,
    /// Whether a [`Collector`] exists.
    has_collector: AtomicBool,
    /// Whether the overflow bit may be set. This hint is on a cache line that rarely changes, so a
    /// receiver that finds no packet does not fetch the state's line from its senders.
    overflowing: CachePadded<AtomicBool>,
    /// Where the bytes of each posted buffer are. Null if they are in the memory of a guest, if the
    /// inbox has headers, or if the buffer has become too small.
    buffer_ptrs: Box<[UnsafeCell<*mut u8>]>,
    /// Where the header of each posted buffer is, which has the bytes behind it. Null if they are in
    /// the memory of a guest, or if the buffer has become too small. Empty unless the inbox has
    /// headers.
    header_ptrs: Box<[UnsafeCell<*mut u8>]>,
    /// Each posted buffer that is in the memory of a guest. Only meaningful if the pointer above is
    /// null.
    guests: Box<[UnsafeCell<*const GuestBuffer>]>,
    /// The [`Room`] in each posted buffer. Senders read it before they own the cell. If their claim
    /// succeeds, it has not changed meanwhile.
    rooms: Box<[AtomicU32]>,
    /// The state of each posted cell: see [`filled`].
    cell_states: Box<[AtomicU64]>,
    /// The posted buffers, which only the collector touches. `None` if the buffer was taken back.
    buffers: Box<[UnsafeCell<Option<B>>]>,
    overflow: Overflow,
    max_frame: usize,
    /// In which of the next copies the models panic; see [`Inbox::die_at`].
    #[cfg(loom)]
    dies_at: std::sync::atomic::AtomicU32,
    /// The number of posted cells minus one.
    mask: usize,
    /// The least bytes of a buffer whose pointer is in `buffer_ptrs`. No buffer has as many if the
    /// inbox has headers, so senders to other inboxes need not ask.
    least_bytes: usize,
}

// SAFETY: the `UnsafeCell`s are of two kinds. The owner of a cell of invariants 1 and 2 changes
// only through the atomics. The buffer cells of invariant 4 belong to the collector, and
// `has_collector` allows one collector at a time. A buffer moves to another thread or is written by
// one, hence `B: Send`. No `&B` is ever shared, so `B: Sync` is not needed.
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

impl<B: PacketBuffer> Inbox<B> {
    /// Makes a closed inbox for at most `depth` posted buffers and `overflow` waiting frames of at
    /// most `max_frame` bytes. Both numbers are rounded up to a power of two; `overflow` may be 0.
    /// [`open`](Self::open) opens the inbox. Only this function allocates.
    ///
    /// # Panics
    ///
    /// If `depth` is 0, or either number is above 2^24.
    pub fn new(depth: u32, overflow: u32, max_frame: usize) -> Self {
        Self::starting_at(depth, overflow, max_frame, 0)
    }

    /// As [`new`](Self::new), for a receiver that gets an offload header with each packet, in front of
    /// it ([`PacketBuffer::header_and_bytes`]). The header says what the packet's sender has left to
    /// others, and in how many buffers the packet is. It does not count as a part of the packet.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new).
    pub fn with_headers(depth: u32, overflow: u32, max_frame: usize) -> Self {
        Self::build(depth, overflow, max_frame, 0, true)
    }

    /// Like [`new`](Self::new), but every index begins at `start`, so that tests can cross the
    /// wrap.
    #[doc(hidden)]
    pub fn starting_at(depth: u32, overflow: u32, max_frame: usize, start: u32) -> Self {
        Self::build(depth, overflow, max_frame, start, false)
    }

    /// For models: the copy of this number panics, on whichever thread that is, once. Each part of a
    /// packet is a copy, and they count from 1. The counter is not loom's, so it adds no interleavings.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn die_at(&self, copy: u32) {
        self.dies_at.store(copy, Ordering::Relaxed);
    }

    /// Stands for a mistake in the code that copies, which runs no code of others.
    #[inline(always)]
    fn begin_copy(&self) {
        #[cfg(loom)]
        if self.dies_at.fetch_sub(1, Ordering::Relaxed) == 1 {
            std::panic::resume_unwind(Box::new("on purpose"));
        }
    }

    fn build(depth: u32, overflow: u32, max_frame: usize, start: u32, headers: bool) -> Self {
        assert!(depth > 0, "an inbox needs at least one cell");
        assert!(
            depth <= MAX_INBOX_CELLS && overflow <= MAX_INBOX_CELLS,
            "an inbox of more than 2^24 cells"
        );
        assert!(max_frame < MORE as usize - 1, "frames of 1 GiB");
        let overflow = if overflow == 0 { 0 } else { overflow.next_power_of_two() };
        let depth = depth.next_power_of_two();
        let header_len = if headers { offload::LEN } else { 0 };
        // The first period begins one further on.
        let before = start.wrapping_sub(1);
        let null = || UnsafeCell::new(core::ptr::null_mut());
        Self {
            state: CachePadded::new(AtomicU64::new(InboxState::new(before, start, CLOSED).0)),
            posted: CachePadded::new(AtomicU32::new(before)),
            popped: CachePadded::new(AtomicU32::new(start & PUSHED_MASK)),
            doorbell: Doorbell::new(Callback::default()),
            has_collector: AtomicBool::new(false),
            overflowing: CachePadded::new(AtomicBool::new(false)),
            buffer_ptrs: (0..depth).map(|_| null()).collect(),
            header_ptrs: (0..if headers { depth } else { 0 }).map(|_| null()).collect(),
            guests: (0..depth).map(|_| UnsafeCell::new(core::ptr::null())).collect(),
            rooms: (0..depth).map(|_| AtomicU32::new(Room::ANY.0)).collect(),
            cell_states: (0..depth).map(|_| AtomicU64::new(0)).collect(),
            buffers: (0..depth).map(|_| UnsafeCell::new(None)).collect(),
            overflow: Overflow::new(overflow as usize, header_len + max_frame),
            max_frame,
            #[cfg(loom)]
            dies_at: std::sync::atomic::AtomicU32::new(0),
            mask: depth as usize - 1,
            least_bytes: if headers { usize::MAX } else { max_frame },
        }
    }

    /// Opens the inbox and returns its one receiving half, or `None` while that half exists. When
    /// the half is dropped, the inbox is closed and empty and may be opened again.
    pub fn open(inbox: &Arc<Self>, wake: PortWake) -> Option<Collector<B>> {
        let mut collector = Self::open_later(inbox, wake)?;
        collector.reopen();
        Some(collector)
    }

    /// As [`open`](Self::open), but the inbox stays closed until its half [reopens](Collector::reopen)
    /// it.
    pub(crate) fn open_later(inbox: &Arc<Self>, wake: PortWake) -> Option<Collector<B>> {
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
            gaps: 0,
            kinds: Kinds::default(),
            short: Short::default(),
            not_sync: PhantomData,
        };
        inbox.doorbell.parker().set(Some(wake));
        collector.begin_period();
        Some(collector)
    }

    /// The longest frame it accepts. A posted buffer must have at least this many bytes.
    pub fn max_frame(&self) -> usize {
        self.max_frame
    }

    /// Whether the receiver gets an offload header with each packet.
    pub fn has_headers(&self) -> bool {
        !self.header_ptrs.is_empty()
    }

    /// How many buffers can be posted at once.
    pub fn depth(&self) -> usize {
        self.buffer_ptrs.len()
    }

    /// Whether deliveries are refused. This is a hint: it may change at once.
    pub fn is_closed(&self) -> bool {
        InboxState(self.state.load(Ordering::Relaxed)).closed()
    }

    /// Whether frames wait in the overflow ring for buffers to be posted. Unless nobody else
    /// delivers, this is a hint: it may change at once.
    #[inline]
    pub fn frames_wait(&self) -> bool {
        InboxState(self.state.load(Ordering::Relaxed)).overflow()
    }

    /// About how many frames it takes now. This is a hint: it may change at once. A frame that fills
    /// several small buffers needs more than one.
    pub fn space(&self) -> usize {
        // Relaxed, all of them: nothing is decided by these.
        let state = InboxState(self.state.load(Ordering::Relaxed));
        if state.closed() {
            return 0;
        }
        let posted = match state.overflow() {
            true => 0,
            false => self.posted.load(Ordering::Relaxed).wrapping_sub(state.claimed()) as usize,
        };
        let waiting = state.pushed().wrapping_sub(self.popped.load(Ordering::Relaxed));
        let waiting = (waiting & PUSHED_MASK) as usize;
        let cells = self.overflow.cells.len();
        posted.min(self.buffer_ptrs.len()) + cells - waiting.min(cells)
    }

    /// Copies `frame` to the receiver: into the oldest posted buffer, or else into the overflow
    /// ring.
    ///
    /// It waits only while the receiver looks through its posted buffers in
    /// [`recall_if`](Collector::recall_if). It does not wake the receiver: call
    /// [`ring`](Self::ring) once after a batch.
    pub fn deliver(&self, frame: &[u8]) -> Delivery {
        self.deliver_packet(Packet::from(frame))
    }

    /// As [`deliver`](Self::deliver), for a packet that may be in the memory of a guest.
    ///
    /// If the oldest posted buffer is smaller than the packet, the packet fills the next ones too
    /// ([`Collected::more`]), if there are enough of them. Else it goes to the overflow ring.
    #[inline]
    pub fn deliver_packet(&self, packet: Packet<'_>) -> Delivery {
        self.deliver_if(packet, || true)
    }

    /// As [`deliver_packet`](Self::deliver_packet), but refuses the packet as [`Refused::Stale`] unless
    /// `holds` returns true. If the packet is accepted, what `holds` looks at has held at the moment at
    /// which it was, provided that it changes only while the inbox is closed and before a new period
    /// begins; see the [module](self).
    pub(crate) fn deliver_if(&self, packet: Packet<'_>, holds: impl Fn() -> bool) -> Delivery {
        let len = packet.len();
        if len > self.max_frame {
            return Delivery::Dropped(Refused::TooBig);
        }
        // Acquire, here and when a `change` fails: pairs with the Release in `change`, `close`,
        // `discard` and `reopen`, so that `posted` and `popped` are never read older than the
        // state.
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
            // This comes after the load of the state.
            if !holds() {
                return Delivery::Dropped(Refused::Stale);
            }
            // Acquire: pairs with the Release in `publish`; the buffers are in their cells.
            if !state.overflow()
                && let Some(end) = self.cells_for(state, self.posted.load(Ordering::Acquire), len)
            {
                match self.change(state, state.with_claimed(end)) {
                    Ok(()) => {
                        // The length was checked above.
                        self.fill(state.claimed(), end, packet, 0);
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
                        self.fill_overflow(state.pushed(), packet);
                        // Relaxed: this is a hint; `arm` looks at the state.
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

    /// Claims posted buffers for up to `wanted` frames, in one step.
    ///
    /// Returns `None` if no buffer can be claimed: the receiver has closed or is choosing among its
    /// buffers, frames wait in the overflow ring, or no buffer is posted. Use
    /// [`deliver`](Self::deliver) in these cases; it handles each.
    ///
    /// The caller must fill what it has claimed: see [`Claim`].
    #[inline]
    pub fn claim(&self, wanted: usize) -> Option<Claim<'_, B>> {
        self.claim_for(wanted, || self.max_frame)
    }

    /// As [`claim`](Self::claim), for frames of at most `longest()` bytes. Each buffer that is claimed
    /// has space for as many. `longest` is called at most once, and only if a posted buffer may be
    /// smaller than [`max_frame`](Self::max_frame).
    #[inline]
    pub fn claim_for(
        &self,
        wanted: usize,
        longest: impl FnOnce() -> usize,
    ) -> Option<Claim<'_, B>> {
        self.claim_if(wanted, longest, || true)
    }

    /// As [`claim_for`](Self::claim_for), but claims nothing unless `holds` returns true; see
    /// [`deliver_if`](Self::deliver_if).
    #[inline]
    pub(crate) fn claim_if(
        &self,
        wanted: usize,
        longest: impl FnOnce() -> usize,
        holds: impl Fn() -> bool,
    ) -> Option<Claim<'_, B>> {
        let (mut ask, mut longest) = (Some(longest), self.max_frame);
        // Acquire: pairs with the Release in `change`, `close`, `discard` and `reopen`, so that
        // `posted` is not read older than the state.
        let mut state = InboxState(self.state.load(Ordering::Acquire));
        // `holds` comes after the load of the state.
        while state.0 & (CLOSED | HELD | OVERFLOW) == 0 && holds() {
            let next = state.claimed();
            // Acquire: pairs with the Release in `publish`; the buffers are in their cells.
            let posted = self.posted.load(Ordering::Acquire).wrapping_sub(next);
            // `posted` may be newer than the state. The number of cells bounds it.
            let mut count = (posted as usize).min(self.buffer_ptrs.len()).min(wanted) as u32;
            if state.small() {
                longest = ask.take().map_or(longest, |ask| ask().min(longest));
                count = self.large_cells(next, count, longest);
            }
            if count == 0 {
                return None;
            }
            let end = next.wrapping_add(count);
            match self.change(state, state.with_claimed(end)) {
                Ok(()) => return Some(Claim::new(self, next..end, longest)),
                Err(now) => state = InboxState(now),
            }
        }
        None
    }

    /// The end of the posted cells that a frame of `len` bytes fills, from the first one that is not
    /// claimed. `None` if those are too few.
    #[inline]
    fn cells_for(&self, state: InboxState, posted: u32, len: usize) -> Option<u32> {
        let first = state.claimed();
        match state.small() {
            false => (first != posted).then(|| first.wrapping_add(1)),
            true => self.small_cells_for(first, posted, len),
        }
    }

    #[inline(never)]
    fn small_cells_for(&self, first: u32, posted: u32, len: usize) -> Option<u32> {
        let mut left = len;
        let mut index = first;
        while index != posted && index.wrapping_sub(first) < GROUP_MAX {
            left = left.saturating_sub(self.room(index).of_part(index == first));
            index = index.wrapping_add(1);
            if left == 0 {
                return Some(index);
            }
        }
        None
    }

    /// How many of the `count` cells from `first` on have space for `len` bytes, up to the first that
    /// has not.
    #[inline(never)]
    fn large_cells(&self, first: u32, count: u32, len: usize) -> u32 {
        let cells = (0..count).map(|i| self.room(first.wrapping_add(i)));
        cells.take_while(|room| room.of_part(true) >= len).count() as u32
    }

    fn room(&self, index: u32) -> Room {
        // Relaxed: the Acquire of `posted` pairs with the Release in `publish`, so this is not older
        // than the cell's posting. It is not newer either if the claim succeeds: the collector changes
        // it after it has seen a later claim, by which `change` is ordered after this load.
        Room(self.rooms[self.cell_index(index)].load(Ordering::Relaxed))
    }

    /// Waits until the receiver has chosen among its posted buffers, and returns the state after
    /// that.
    #[cold]
    fn wait_while_held(&self) -> u64 {
        let backoff = Backoff::new();
        loop {
            // Acquire: pairs with the Release in `change`, by which the receiver clears the held
            // bit in `Held::drop`; the caller goes on with this state as with one it has loaded
            // itself.
            let seen = self.state.load(Ordering::Acquire);
            if !InboxState(seen).held() {
                return seen;
            }
            pause(&backoff);
        }
    }

    /// Wakes the receiver if it has armed. Call it once after a batch of deliveries: it costs a
    /// fence, and a call of the wake callback if the receiver sleeps. Returns whether it called the
    /// callback.
    ///
    /// If a sender delivers and does not ring, the receiver may stay asleep.
    pub fn ring(&self) -> bool {
        self.doorbell.ring()
    }

    /// Changes the state from `from` to `to`, or returns what it is now.
    fn change(&self, from: InboxState, to: InboxState) -> Result<(), u64> {
        // AcqRel and Acquire: pair with each other, with the loads of the state, and with `close`,
        // `discard` and `reopen`. Release publishes what the caller knows of `posted` and `popped`
        // to every thread that sees the new state. Acquire takes the same from the thread that
        // wrote the old one.
        self.state
            .compare_exchange_weak(from.0, to.0, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }

    /// The position of a cell in the arrays. They have the same length, a power of two.
    #[inline]
    fn cell_index(&self, index: u32) -> usize {
        index as usize & self.mask
    }

    /// The states of the posted cells.
    #[inline(always)]
    fn cell_states(&self) -> Cells<'_, AtomicU64> {
        Cells { cells: &self.cell_states, mask: self.mask }
    }

    /// The state of the posted cell `index`.
    #[inline]
    fn cell_state(&self, index: u32) -> &AtomicU64 {
        self.cell_states().get(index)
    }

    /// Where the collector keeps the buffers of the posted cells.
    #[inline(always)]
    fn buffer_cells(&self) -> Cells<'_, UnsafeCell<Option<B>>> {
        Cells { cells: &self.buffers, mask: self.mask }
    }

    /// Where the collector keeps the buffer of the posted cell `index`.
    #[inline]
    fn buffer_cell(&self, index: u32) -> &UnsafeCell<Option<B>> {
        self.buffer_cells().get(index)
    }

    /// Where the bytes of a buffer are. The buffer must already be in its buffer cell, where it stays
    /// (invariant 4). `None` if it has too few bytes and is not in the memory of a guest.
    fn place_of(&self, buffer: &mut B) -> Option<Place> {
        if let Some(guest) = buffer.guest() {
            let (guest, room) = (core::ptr::from_ref(guest), Room::of(guest));
            return Some(Place { guest, room, ..Place::NOWHERE });
        }
        if let Some(bytes) = checked_ptr(buffer, self.least_bytes) {
            return Some(Place { bytes, ..Place::NOWHERE });
        }
        let header = self.has_headers().then(|| checked_header_ptr(buffer, self.max_frame));
        header.flatten().map(|header| Place { header, ..Place::NOWHERE })
    }

    /// Where the bytes of the buffers of the posted cells are.
    #[inline(always)]
    fn buffer_ptrs(&self) -> Cells<'_, UnsafeCell<*mut u8>> {
        Cells { cells: &self.buffer_ptrs, mask: self.mask }
    }

    /// Where the bytes of the buffer of the posted cell `index` are.
    #[inline]
    fn buffer_ptr(&self, index: u32) -> &UnsafeCell<*mut u8> {
        self.buffer_ptrs().get(index)
    }

    /// Fills the cells `first..end` with a packet, and hands them over. The caller owns the cells, they
    /// have enough space, and the packet is at most `max_frame` bytes long.
    #[inline]
    fn fill(&self, first: u32, end: u32, packet: Packet<'_>, flags: u32) {
        if first.wrapping_add(1) == end {
            let filling = Filling { inbox: self, first, end, flags };
            let len = self.copy_part(first, packet, 0..packet.len(), Some(1), None);
            filling.end(len);
        } else {
            self.fill_group(first, end, packet, flags);
        }
    }

    /// Fills several cells with one packet. The state of the first is stored last: until then the
    /// collector looks at none of them.
    #[inline(never)]
    fn fill_group(&self, first: u32, end: u32, packet: Packet<'_>, flags: u32) {
        let filling = Filling { inbox: self, first, end, flags: flags | MORE };
        let count = end.wrapping_sub(first);
        let mut at = 0;
        let mut first_len = 0;
        let mut rest = packet.guest_segments();
        for index in indices(&(first..end)) {
            let is_first = index == first;
            let len = self.room(index).of_part(is_first).min(packet.len() - at);
            let part = at..at + len;
            self.copy_part(index, packet, part, is_first.then_some(count as u16), rest.as_ref());
            at += len;
            rest = rest.map(|rest| rest.step_over(len));
            match is_first {
                true => first_len = len,
                false => {
                    let more = if index.wrapping_add(1) == end { 0 } else { MORE };
                    self.end_claim(index, filled(index, len, flags | more));
                }
            }
        }
        filling.end(first_len);
    }

    /// Copies `frame` into the posted buffer `index`, which has space for it. Returns its length, or 0
    /// if the buffer has become too small. The caller owns the cell.
    #[inline]
    fn copy(&self, index: u32, frame: &[u8]) -> usize {
        self.copy_to_ptr(self.buffer_ptr(index), index, frame)
    }

    /// As [`copy`](Self::copy), for a caller that has found the [`buffer_ptr`](Self::buffer_ptr) of `index`.
    #[inline(always)]
    fn copy_to_ptr(&self, ptr: &UnsafeCell<*mut u8>, index: u32, frame: &[u8]) -> usize {
        debug_assert!(frame.len() <= self.max_frame);
        self.begin_copy();
        ptr.with_mut(|ptr| {
            // SAFETY: invariant 1: the caller owns the cell until `end_claim` stores its state.
            let ptr = unsafe { *ptr };
            if ptr.is_null() {
                return self.copy_to_other(
                    index,
                    Packet::from(frame),
                    0..frame.len(),
                    Some(1),
                    None,
                );
            }
            // SAFETY: invariant 4: the pointer is to a lent buffer, which the collector neither
            // moves nor touches before it sees the cell's state, and `checked_ptr` found at least
            // `max_frame` bytes there. The callers have checked that the frame is no longer. The
            // frame is not in the buffer, because it is borrowed and the collector owns the buffer.
            unsafe { copy_bytes(frame, ptr) };
            frame.len()
        })
    }

    /// Asks for the cache lines of the first `len` bytes of the posted buffer `index`, which is about to be
    /// filled. The caller owns the cell.
    #[inline(always)]
    fn ask_for(&self, index: u32, len: usize) {
        self.buffer_ptr(index).with(|ptr| {
            // SAFETY: invariant 1: the caller owns the cell.
            let ptr = unsafe { *ptr };
            if !ptr.is_null() {
                prefetch_for_writing(ptr, len.min(ASKED_AHEAD));
            }
        });
    }

    /// Copies a part of a packet into the posted buffer `index`, which has space for it. The caller
    /// owns the cell. The first part has the `count` of all. `rest` is as in [`Packet::copy_to_guest`].
    fn copy_part(
        &self,
        index: u32,
        packet: Packet<'_>,
        part: Range<usize>,
        count: Option<u16>,
        rest: Option<&Segments<'_>>,
    ) -> usize {
        self.begin_copy();
        self.buffer_ptr(index).with_mut(|ptr| {
            // SAFETY: as in `copy`.
            let ptr = unsafe { *ptr };
            if ptr.is_null() {
                return self.copy_to_other(index, packet, part, count, rest);
            }
            // SAFETY: as in `copy`. The part is no longer than the packet.
            let space = unsafe { core::slice::from_raw_parts_mut(ptr, part.len()) };
            packet.copy_to(part.start, space)
        })
    }

    /// Copies a part of a packet into the posted buffer `index`, which has space for it, if the buffer
    /// has a header or is in the memory of a guest. Returns the part's length, or 0. The first part is
    /// behind the header, which says what work is left, and in how many buffers the packet is.
    #[inline(never)]
    fn copy_to_other(
        &self,
        index: u32,
        packet: Packet<'_>,
        part: Range<usize>,
        count: Option<u16>,
        rest: Option<&Segments<'_>>,
    ) -> usize {
        if let Some(header_ptr) = self.header_ptrs.get(self.cell_index(index)) {
            let ptr = header_ptr.with_mut(|ptr| {
                // SAFETY: invariant 1: the caller owns the cell.
                unsafe { *ptr }
            });
            if !ptr.is_null() {
                // SAFETY: invariant 4: the pointer is to a lent buffer, which the collector neither
                // moves nor touches before it sees the cell's state, and `checked_header_ptr` found
                // space for a header and `max_frame` bytes there. The callers have checked that the
                // part is no longer. The packet is not in the buffer, because it is borrowed and the
                // collector owns the buffer.
                let space =
                    unsafe { core::slice::from_raw_parts_mut(ptr, offload::LEN + part.len()) };
                let (header, bytes) = space.split_at_mut(offload::LEN);
                if let Some(count) = count {
                    header.copy_from_slice(&packet.header_for(count));
                }
                return packet.copy_to(part.start, bytes);
            }
        }
        let Some(buffer) = self.guest_of(index) else { return 0 };
        let header = match count {
            Some(count) if buffer.header_len() == offload::LEN => {
                buffer.segments().write_first(&packet.header_for(count));
                offload::LEN
            }
            Some(_) => buffer.header_len(),
            None => 0,
        };
        packet.copy_to_guest(part.start, part.len(), buffer, header, rest);
        part.len()
    }

    /// Copies a packet that leaves nothing to do from a guest's memory to the posted buffer `index`, if both
    /// are in one piece. `None` if it has copied nothing. The caller owns the cell.
    #[inline]
    fn copy_guest(
        &self,
        index: u32,
        frame: &GuestBuffer,
        header: &[u8; ETHERNET_HEADER_LEN],
    ) -> Option<()> {
        // SAFETY: invariant 1: the caller owns the cell.
        let is_bytes = self.buffer_ptr(index).with(|ptr| unsafe { !(*ptr).is_null() });
        let buffer = if is_bytes { None } else { self.guest_of(index) }?;
        let (header_room, space) = buffer.in_one_piece()?;
        copy_in_one_piece(header, frame, frame.len(), space)?;
        if header_room.len() as usize == offload::LEN {
            let mut plain = [0; offload::LEN];
            offload::set_num_buffers(&mut plain, 1);
            header_room.write(&plain);
        }
        Some(())
    }

    /// The guest's buffer `index`, if its bytes are not this program's own. The caller owns the cell.
    #[inline]
    fn guest_of(&self, index: u32) -> Option<&GuestBuffer> {
        self.guests[self.cell_index(index)].with(|guest| {
            // SAFETY: invariant 1: the caller owns the cell.
            let guest = unsafe { *guest };
            // SAFETY: invariant 4: the pointer is null, or to a lent buffer, which the collector
            // neither moves nor changes before it sees the cell's state. Others only read it.
            unsafe { guest.as_ref() }
        })
    }

    /// Marks a cell as [`filled`], which makes it the collector's.
    #[inline]
    fn end_claim(&self, index: u32, state: u64) {
        // Release: pairs with the Acquire in `collect`, `is_ready` and `close`; the bytes are in
        // the buffer.
        self.cell_state(index).store(state, Ordering::Release);
    }

    /// Ends [`Collector::stage`] for a buffer that has a header, or whose bytes are not this program's own.
    /// Returns false if it has too few bytes. The cell is the collector's.
    #[inline(never)]
    fn stage_other(&self, index: u32, kinds: &mut Kinds) -> bool {
        let place = self.buffer_cell(index).with_mut(|cell| {
            // SAFETY: invariant 4: only the collector uses the buffer cells, and it calls this.
            let cell = unsafe { &mut *cell };
            cell.as_mut().and_then(|buffer| self.place_of(buffer))
        });
        let Some(place) = place else { return false };
        kinds.has_guests |= !place.guest.is_null();
        self.store_place(index, &place, kinds.has_guests);
        if !kinds.is_small && place.room.of_part(true) < self.max_frame {
            kinds.is_small = true;
            // AcqRel: as in `change`. It comes before the buffer is published, so whoever claims the
            // buffer sees it.
            self.state.fetch_or(SMALL, Ordering::AcqRel);
        }
        true
    }

    /// Returns the buffer that could not be staged. The cell is the collector's.
    #[cold]
    #[inline(never)]
    fn refuse_staged(&self, index: u32) -> Result<(), B> {
        let buffer = self.buffer_cell(index).with_mut(|cell| {
            // SAFETY: invariant 4: only the collector uses the buffer cells, and it calls this.
            unsafe { (*cell).take() }
        });
        buffer.map_or(Ok(()), Err)
    }

    /// Stores where the bytes of the buffer of cell `index` are. The cell must be the collector's.
    fn store_place(&self, index: u32, place: &Place, has_guests: bool) {
        store_buffer_ptr(self.buffer_ptr(index), place.bytes);
        if let Some(stored) = self.header_ptrs.get(self.cell_index(index)) {
            // SAFETY: invariant 1: as in `store_buffer_ptr`.
            stored.with_mut(|stored| unsafe { *stored = place.header });
        }
        if place.bytes.is_null() || has_guests {
            self.store_guest(index, place.guest);
            self.store_room(index, place.room);
        }
    }

    /// Stores where the guest's buffer of cell `index` is. The cell must be the collector's. As with the
    /// pointers to bytes, what has not changed is not written.
    fn store_guest(&self, index: u32, guest: *const GuestBuffer) {
        // SAFETY: invariant 1: as in `store_buffer_ptr`.
        self.guests[self.cell_index(index)].with_mut(|stored| unsafe {
            if *stored != guest {
                *stored = guest;
            }
        });
    }

    /// Stores the room of the buffer of cell `index`, if it has changed. The cell must be the collector's.
    fn store_room(&self, index: u32, room: Room) {
        let stored = &self.rooms[self.cell_index(index)];
        // Relaxed, both: only the collector stores, and `publish` shows it to the senders.
        if stored.load(Ordering::Relaxed) != room.0 {
            stored.store(room.0, Ordering::Relaxed);
        }
    }

    /// The bytes of an overflow cell in front of the packet.
    fn overflow_header_len(&self) -> usize {
        self.overflow.cell_len - self.max_frame
    }

    /// Copies a packet into the overflow cell `index`, and hands it over. The caller has moved `pushed`
    /// past the cell.
    fn fill_overflow(&self, index: u32, packet: Packet<'_>) {
        let mut pushing = Pushing { inbox: self, index, len: 0 };
        self.copy_to_overflow(index, packet);
        pushing.len = packet.len();
    }

    /// Copies a packet into the overflow cell `index`, which the caller owns.
    fn copy_to_overflow(&self, index: u32, packet: Packet<'_>) {
        self.overflow.cell(index).access.with_mut(|_| {
            self.begin_copy();
            let header_len = self.overflow_header_len();
            // SAFETY: invariant 2: the caller owns this cell, so its bytes are ours until its state is
            // stored: as many as a header, if the inbox has headers, and `max_frame`. The callers have
            // checked that the packet is no longer.
            let space = unsafe {
                let len = header_len + packet.len();
                core::slice::from_raw_parts_mut(self.overflow.bytes_of(index), len)
            };
            let (header, bytes) = space.split_at_mut(header_len);
            header.copy_from_slice(&packet.header_for(1)[..header_len]);
            packet.copy_to(0, bytes);
        });
    }

    /// Marks an overflow cell as one that has a frame of `len` bytes, which makes it the collector's.
    fn end_push(&self, index: u32, len: usize) {
        // Release: pairs with the Acquire in `fill_from_overflow`, `is_ready` and `close`; the
        // bytes are in the cell. The length is at most `max_frame`, which `starting_at` keeps below
        // 1 GiB.
        self.overflow.cell(index).state.store(len as u32 + 1, Ordering::Release);
    }
}

/// The overflow cell that a sender has pushed. Dropping this guard hands it over: with the frame, or
/// with no bytes if the copy panics.
struct Pushing<'a, B: PacketBuffer> {
    inbox: &'a Inbox<B>,
    index: u32,
    len: usize,
}

impl<B: PacketBuffer> Drop for Pushing<'_, B> {
    #[inline]
    fn drop(&mut self) {
        self.inbox.end_push(self.index, self.len);
    }
}

/// The cells `first..end`, which one packet is being copied into. If the copy panics, this guard makes
/// the packet one of no bytes, in as many buffers. The copy runs no code of others, so that would be a
/// mistake in this crate; but whoever catches the panic must not leave a receiver that waits for ever.
struct Filling<'a, B: PacketBuffer> {
    inbox: &'a Inbox<B>,
    first: u32,
    end: u32,
    /// The flags of the first cell.
    flags: u32,
}

impl<B: PacketBuffer> Filling<'_, B> {
    /// Hands the first cell over, with `len` bytes in it. The others have their states.
    #[inline(always)]
    fn end(self, len: usize) {
        self.inbox.end_claim(self.first, filled(self.first, len, self.flags));
        core::mem::forget(self);
    }
}

impl<B: PacketBuffer> Drop for Filling<'_, B> {
    #[cold]
    fn drop(&mut self) {
        // The first is the last again. Some of the others may have a state already, which nobody has
        // looked at.
        for index in indices(&(self.first..self.end)).rev() {
            let is_last = index.wrapping_add(1) == self.end;
            let more = if is_last { 0 } else { MORE };
            self.inbox.end_claim(index, filled(index, 0, self.flags & WAITED | more));
        }
    }
}

/// Posted buffers that a sender has claimed and not filled yet.
///
/// The receiver waits for them, so fill them at once. Buffers that are not filled, for example
/// because of a panic in between, become packets of no bytes when the claim is dropped.
///
/// # Leaks
///
/// Do not forget a claim, for example with [`mem::forget`](core::mem::forget) or in a cycle of
/// reference counts. The receiver gets no later packet, and [`Collector::close`],
/// [`Collector::discard`] and the drop of the [`Collector`] wait for ever. They cannot give up: a
/// claim that is forgotten looks like one whose sender is slow, and if the receiver took its
/// buffers back, a slow sender would write to memory that is no longer the inbox's.
#[must_use = "a claim that is not filled delivers empty packets"]
pub struct Claim<'a, B: PacketBuffer> {
    inbox: &'a Inbox<B>,
    /// The cells from here on have been filled and not handed over.
    handed: u32,
    next: u32,
    end: u32,
    /// The states of the cells `handed..next`.
    states: [u64; STATES_AT_ONCE as usize],
    longest: usize,
}

impl<B: PacketBuffer> fmt::Debug for Claim<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim").field("left", &self.left()).finish_non_exhaustive()
    }
}

impl<'a, B: PacketBuffer> Claim<'a, B> {
    #[inline]
    fn new(inbox: &'a Inbox<B>, cells: Range<u32>, longest: usize) -> Self {
        let Range { start, end } = cells;
        let states = [0; STATES_AT_ONCE as usize];
        Self { inbox, handed: start, next: start, end, states, longest }
    }

    /// The number of buffers that are still to be filled.
    #[inline]
    pub fn left(&self) -> usize {
        self.end.wrapping_sub(self.next) as usize
    }

    /// Copies `frame` into the next buffer. Returns false, and does nothing, if there is no buffer
    /// left or if the frame is longer than the claim was made for.
    ///
    /// The receiver sees the frame together with its neighbours, at the latest when the claim is
    /// dropped.
    #[inline(always)]
    pub fn fill(&mut self, frame: &[u8]) -> bool {
        if self.next == self.end || frame.len() > self.longest {
            return false;
        }
        let len = self.inbox.copy(self.next, frame);
        self.end_packet(self.inbox.cell_state(self.next), len);
        true
    }

    /// Fills the next buffers with `frames`, until one is longer than `longest` or than the claim was made
    /// for, or no buffer is left. Returns how many frames there were, and their bytes.
    #[inline(always)]
    pub fn fill_all<'f>(
        &mut self,
        frames: impl Iterator<Item = &'f [u8]>,
        longest: usize,
    ) -> (usize, u64) {
        let (inbox, first, longest) = (self.inbox, self.next, longest.min(self.longest));
        let (mut next, is_none_waiting) = (first, self.handed == first);
        let (ptrs, states) = (inbox.buffer_ptrs(), inbox.cell_states());
        let mut frames = frames.take(self.left());
        let (mut frame, mut bytes) = (frames.next(), 0);
        // Most packets are alike. Each of the two loops has what it needs in registers.
        while let Some(short) = frame
            && is_none_waiting
            && short.len() <= longest.min(SHORT_PACKET)
        {
            let len = inbox.copy_to_ptr(ptrs.get(next), next, short);
            self.hand_over_at_once(states.get(next), next, len);
            // One line holds the shortest frames. A receiver that is far has read it, so it takes long to come.
            if self.left() > 1 {
                ask_for_line(ptrs.get(self.next.wrapping_add(1)));
            }
            (next, bytes) = (self.next, bytes + short.len() as u64);
            frame = frames.next();
        }
        while let Some(other) = frame
            && other.len() <= longest
        {
            let len = inbox.copy_to_ptr(ptrs.get(next), next, other);
            self.end_packet(states.get(next), len);
            (next, bytes) = (self.next, bytes + other.len() as u64);
            frame = frames.next();
        }
        (next.wrapping_sub(first) as usize, bytes)
    }

    /// As [`fill`](Self::fill), for a packet that may be in the memory of a guest.
    #[inline(never)]
    pub fn fill_packet(&mut self, packet: Packet<'_>) -> bool {
        if self.next == self.end || packet.len() > self.longest {
            return false;
        }
        let len = self.inbox.copy_part(self.next, packet, 0..packet.len(), Some(1), None);
        self.end_packet(self.inbox.cell_state(self.next), len);
        true
    }

    /// As [`fill_packet`](Self::fill_packet), for a packet in the memory of a guest that leaves nothing to
    /// do. It gets this Ethernet header, whatever the guest has written there.
    #[inline]
    pub(crate) fn fill_guest(
        &mut self,
        frame: &GuestBuffer,
        header: &[u8; ETHERNET_HEADER_LEN],
    ) -> bool {
        if self.next != self.end
            && frame.len() <= self.longest
            && self.inbox.copy_guest(self.next, frame, header).is_some()
        {
            self.end_packet(self.inbox.cell_state(self.next), frame.len());
            return true;
        }
        self.fill_other_guest(frame, header)
    }

    /// As [`fill_guest`](Self::fill_guest), for buffers of any shape. It is apart, so that the usual packet
    /// stays in registers.
    #[inline(never)]
    fn fill_other_guest(
        &mut self,
        frame: &GuestBuffer,
        header: &[u8; ETHERNET_HEADER_LEN],
    ) -> bool {
        self.fill_packet(Packet::with_header(frame, header))
    }

    /// Counts the next buffer as filled. `cell` is where its state is stored.
    #[inline(always)]
    fn end_packet(&mut self, cell: &AtomicU64, len: usize) {
        if len <= SHORT_PACKET && self.handed == self.next {
            return self.hand_over_at_once(cell, self.next, len);
        }
        let state = filled(self.next, len, 0);
        self.states[(self.next % STATES_AT_ONCE) as usize] = state;
        self.next = self.next.wrapping_add(1);
        // The states of a cache line are stored together: the receiver, which may be far, fetches the
        // line once and not once for each. A long packet takes longer to copy than that.
        if self.next.is_multiple_of(STATES_AT_ONCE) || len > LONG_PACKET {
            self.hand_over();
        }
        if self.left() > 1 {
            self.inbox.ask_for(self.next.wrapping_add(1), len);
        }
    }

    /// Counts the next buffer, which is `next`, as filled, and makes it the collector's. No packet waits.
    #[inline(always)]
    fn hand_over_at_once(&mut self, cell: &AtomicU64, next: u32, len: usize) {
        // Release: as in `end_claim`.
        cell.store(filled(next, len, 0), Ordering::Release);
        self.next = next.wrapping_add(1);
        self.handed = self.next;
    }

    /// Makes what was filled the collector's.
    #[inline(always)]
    fn hand_over(&mut self) {
        while self.handed != self.next {
            let state = self.states[(self.handed % STATES_AT_ONCE) as usize];
            self.inbox.end_claim(self.handed, state);
            self.handed = self.handed.wrapping_add(1);
        }
    }
}

impl<B: PacketBuffer> Drop for Claim<'_, B> {
    #[inline]
    fn drop(&mut self) {
        self.hand_over();
        while self.next != self.end {
            self.inbox.end_claim(self.next, filled(self.next, 0, 0));
            self.next = self.next.wrapping_add(1);
        }
    }
}

/// Copies the bytes of a frame to `to`. The shortest frames need no call: two copies of a fixed size, which
/// overlap, have all their bytes.
///
/// # Safety
///
/// At `to` is space for as many bytes, which nobody else has, and none of which is the frame's.
#[inline(always)]
unsafe fn copy_bytes(frame: &[u8], to: *mut u8) {
    const HALF: usize = 32;
    if let (Some(first), Some(last)) = (frame.first_chunk::<HALF>(), frame.last_chunk::<HALF>())
        && frame.len() <= 2 * HALF
    {
        // SAFETY: the caller says that there is space. The last bytes begin where they do in the frame.
        unsafe {
            to.cast::<[u8; HALF]>().write_unaligned(*first);
            to.add(frame.len() - HALF).cast::<[u8; HALF]>().write_unaligned(*last);
        }
        return;
    }
    // SAFETY: the caller says the same.
    unsafe { to.copy_from_nonoverlapping(frame.as_ptr(), frame.len()) };
}

/// Asks for the first cache line of a posted buffer that is about to be filled. The caller owns the cell.
#[inline(always)]
fn ask_for_line(ptr: &UnsafeCell<*mut u8>) {
    ptr.with(|ptr| {
        // SAFETY: invariant 1: the caller owns the cell.
        let ptr = unsafe { *ptr };
        if !ptr.is_null() {
            prefetch_line_for_writing(ptr);
        }
    });
}

/// Takes the buffer out of a cell that is the collector's, who calls this.
#[inline(always)]
fn take_from<B>(cell: &UnsafeCell<Option<B>>, ptr: &UnsafeCell<*mut u8>) -> Option<B> {
    // This access lets loom see whether a sender still writes.
    ptr.with_mut(|_| ());
    cell.with_mut(|cell| {
        // SAFETY: invariant 4: only the collector uses the buffer cells. The callers have made sure that
        // no sender writes through the buffer pointer any more: the cell is filled, or was never claimed
        // (invariant 1).
        unsafe { (*cell).take() }
    })
}

/// Stores where the bytes of a cell's buffer are. The cell must be the collector's.
#[inline(always)]
fn store_buffer_ptr(stored: &UnsafeCell<*mut u8>, ptr: *mut u8) {
    stored.with_mut(|stored| {
        // SAFETY: invariant 1: the callers, which stage or hold the cell, pass one that no sender can
        // claim now, so it is the collector's, who calls this. A pointer that has not changed is not
        // written, so that its cache line stays with the senders.
        unsafe {
            if *stored != ptr {
                *stored = ptr;
            }
        }
    });
}

/// Where a buffer's bytes are, if there are enough of them. The buffer must already be in its
/// buffer cell, where it stays (invariant 4).
fn checked_ptr<B: AsMut<[u8]>>(buffer: &mut B, max_frame: usize) -> Option<*mut u8> {
    let bytes = buffer.as_mut();
    (bytes.len() >= max_frame).then_some(bytes.as_mut_ptr())
}

/// Where a buffer's header is, if there are enough bytes behind it. The buffer must already be in its
/// buffer cell, where it stays (invariant 4).
fn checked_header_ptr<B: PacketBuffer>(buffer: &mut B, max_frame: usize) -> Option<*mut u8> {
    let bytes = buffer.header_and_bytes();
    (bytes.len() >= offload::LEN + max_frame).then_some(bytes.as_mut_ptr())
}

/// The receiving half of an [`Inbox`]: posts buffers and collects packets.
///
/// Dropping it closes the inbox, which waits for copies that are under way, and drops the buffers
/// that are still in it.
pub struct Collector<B: PacketBuffer> {
    inbox: Arc<Inbox<B>>,
    /// Cells before this one have been taken out.
    collected: u32,
    /// Cells before this one have been given a buffer.
    posted: u32,
    /// The value of `inbox.posted`: senders know of the cells before this one.
    published: u32,
    /// The value of `inbox.popped`.
    popped: u32,
    /// The number of posted, uncollected cells whose buffer was taken back.
    gaps: u32,
    kinds: Kinds,
    short: Short,
    not_sync: PhantomData<core::cell::Cell<()>>,
}

/// Which kinds of buffers a collector has posted.
#[derive(Default)]
struct Kinds {
    /// Whether a guest's buffer was ever posted. If not, each room is [`Room::ANY`].
    has_guests: bool,
    /// Whether the state has [`SMALL`].
    is_small: bool,
}

/// What a collector knows of a frame in the overflow ring for which too few buffers are posted.
#[derive(Default)]
struct Short {
    /// The value of `posted` at the last look, and how often it was the same.
    posted: u32,
    looks: u32,
    /// How many such frames were dropped.
    dropped: u64,
}

/// An index of a collector that a loop moves on. It is stored when this is dropped, and so after a panic
/// too.
struct Advancing<'a> {
    index: &'a mut u32,
    next: u32,
}

impl Drop for Advancing<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.index = self.next;
    }
}

impl<B: PacketBuffer> fmt::Debug for Collector<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").field("posted", &self.posted()).finish_non_exhaustive()
    }
}

impl<B: PacketBuffer> Collector<B> {
    /// The inbox this half receives from.
    pub fn inbox(&self) -> &Arc<Inbox<B>> {
        &self.inbox
    }

    /// Sets the callback that wakes the receiver from now on.
    pub fn set_wake(&mut self, wake: PortWake) {
        self.inbox.doorbell.parker().set(Some(wake));
    }

    /// How many buffers are in the inbox, whether filled or not.
    pub fn posted(&self) -> usize {
        self.posted.wrapping_sub(self.collected).wrapping_sub(self.gaps) as usize
    }

    /// Whether there is no cell for another buffer, so that [`post`](Self::post) would fail.
    pub fn is_full(&self) -> bool {
        self.posted.wrapping_sub(self.collected) as usize >= self.inbox.buffer_ptrs.len()
    }

    /// Lends a buffer to the network. The buffer comes back from [`collect`](Self::collect) with a
    /// packet, in the order of posting, or from [`recall`](Self::recall) without one.
    ///
    /// # Errors
    ///
    /// Returns the buffer if the inbox [is full](Self::is_full), or if the buffer has fewer bytes
    /// than [`Inbox::max_frame`] and is not in the memory of a guest.
    pub fn post(&mut self, buffer: B) -> Result<(), B> {
        self.stage(buffer)?;
        self.publish();
        Ok(())
    }

    /// Like [`post`](Self::post), but senders do not see the buffer before
    /// [`publish`](Self::publish), so that several buffers are published with one store.
    ///
    /// # Errors
    ///
    /// Returns the buffer in the cases in which [`post`](Self::post) does.
    #[inline]
    pub fn stage(&mut self, buffer: B) -> Result<(), B> {
        if self.is_full() {
            return Err(buffer);
        }
        let mut buffer = Some(buffer);
        self.stage_all(|| buffer.take())
    }

    /// Stages the buffers that `next` returns, until it returns `None` or the inbox [is
    /// full](Self::is_full).
    ///
    /// # Errors
    ///
    /// Returns the buffer that has fewer bytes than [`Inbox::max_frame`] and is not in the memory of a
    /// guest. Those before it are staged.
    #[inline(always)]
    pub fn stage_all(&mut self, mut next: impl FnMut() -> Option<B>) -> Result<(), B> {
        let Self { inbox, collected, posted, kinds, .. } = self;
        let inbox = &**inbox;
        let (cells, ptrs) = (inbox.buffer_cells(), inbox.buffer_ptrs());
        // Beside guests' buffers, each needs what `stage_other` does.
        let least_bytes = |kinds: &Kinds| match kinds.has_guests {
            true => usize::MAX,
            false => inbox.least_bytes,
        };
        let mut least = least_bytes(kinds);
        let end = collected.wrapping_add(inbox.buffer_ptrs.len() as u32);
        let mut at = Advancing { next: *posted, index: posted };
        while at.next != end
            && let Some(buffer) = next()
        {
            let index = at.next;
            let ptr = cells.get(index).with_mut(|cell| {
                // SAFETY: invariant 4: only the collector uses the buffer cells, and `&mut self` is it.
                let cell = unsafe { &mut *cell };
                // The cell is empty, so `forget` leaks nothing.
                core::mem::forget(cell.replace(buffer));
                cell.as_mut().and_then(|buffer| checked_ptr(buffer, least))
            });
            match ptr {
                Some(ptr) => store_buffer_ptr(ptrs.get(index), ptr),
                None if inbox.stage_other(index, kinds) => least = least_bytes(kinds),
                None => return inbox.refuse_staged(index),
            }
            at.next = index.wrapping_add(1);
        }
        Ok(())
    }

    /// Shows the senders all buffers that were [staged](Self::stage), with one store.
    #[inline]
    pub fn publish(&mut self) {
        if self.published != self.posted {
            // Release: pairs with the Acquire in `deliver` and `claim`; a sender that claims the
            // cells sees the buffer pointers.
            self.inbox.posted.store(self.posted, Ordering::Release);
            self.published = self.posted;
        }
    }

    /// Returns the next packet. Returns `None` if there is no packet, if its sender is still
    /// copying it (that sender will [ring](Inbox::ring)), or if it waits in the overflow ring for a
    /// buffer to be posted.
    #[inline(always)]
    pub fn collect(&mut self) -> Option<Collected<B>> {
        loop {
            if self.collected == self.posted {
                return None;
            }
            if let Some(packet) = self.collect_filled() {
                return Some(packet);
            }
            // Relaxed: a hint, see `overflowing`.
            if !self.inbox.overflowing.load(Ordering::Relaxed) || !self.fill_from_overflow() {
                return None;
            }
        }
    }

    /// As [`collect`](Self::collect), but leaves the frames of the overflow ring where they are. A
    /// buffer is posted.
    #[inline(always)]
    fn collect_filled(&mut self) -> Option<Collected<B>> {
        // Acquire: pairs with the Release in `end_claim`; the sender's copy is complete.
        let cell_state = self.inbox.cell_state(self.collected).load(Ordering::Acquire);
        let with = filled_with(cell_state, self.collected)?;
        let buffer = self.take()?;
        if self.gaps > 0 {
            self.skip_taken_back();
        }
        let len = (with & !(WAITED | MORE)) as usize - 1;
        let (more, overflow) = (with & MORE != 0, with & WAITED != 0);
        Some(Collected { buffer, len, more, overflow })
    }

    /// Shows each of the next packets to `each`, at most `most`: the buffer, and the packet's length. `each`
    /// takes the buffer and returns true, or leaves it and returns false, which ends the run. The run also
    /// ends at a packet that is in several buffers or has waited in the overflow ring.
    /// [`collect`](Self::collect) takes what is left. Returns how many packets were taken, and their bytes.
    ///
    /// So a buffer goes from where it lies to where it belongs, and nowhere else in between.
    #[inline(always)]
    pub fn collect_run(
        &mut self,
        most: u32,
        mut each: impl FnMut(&mut Option<B>, usize) -> bool,
    ) -> (u32, u64) {
        let Self { inbox, collected, posted, gaps, .. } = self;
        let (states, ptrs, cells) =
            (inbox.cell_states(), inbox.buffer_ptrs(), inbox.buffer_cells());
        let first = *collected;
        // Cells whose buffer was taken back would have to be stepped over.
        let most = if *gaps == 0 { posted.wrapping_sub(first).min(most) } else { 0 };
        let (end, mut bytes) = (first.wrapping_add(most), 0);
        let mut at = Advancing { index: collected, next: first };
        while at.next != end {
            let index = at.next;
            // Acquire: pairs with the Release in `end_claim`; the sender's copy is complete.
            let cell_state = states.get(index).load(Ordering::Acquire);
            let Some(len) = filled_alone(cell_state, index) else { break };
            // This access lets loom see whether a sender still writes.
            ptrs.get(index).with_mut(|_| ());
            let is_taken = cells.get(index).with_mut(|cell| {
                // SAFETY: invariant 4: only the collector uses the buffer cells, and `&mut self` is it. The
                // cell is filled, so no sender writes to the buffer any more.
                each(unsafe { &mut *cell }, len)
            });
            if !is_taken {
                break;
            }
            bytes += len as u64;
            at.next = index.wrapping_add(1);
        }
        (at.next.wrapping_sub(first), bytes)
    }

    /// Steps over the next cells, as long as their buffer was taken back. A recall leaves such
    /// cells behind if older cells were claimed.
    #[cold]
    #[inline(never)]
    fn skip_taken_back(&mut self) {
        while self.gaps > 0 && self.collected != self.posted {
            let taken = self.inbox.buffer_cell(self.collected).with(|cell| {
                // SAFETY: invariant 4: only the collector uses the buffer cells, and `&mut self` is
                // it.
                unsafe { (*cell).is_none() }
            });
            if !taken {
                break;
            }
            self.collected = self.collected.wrapping_add(1);
            self.gaps -= 1;
        }
    }

    /// Takes the buffer out of the cell `collected` and steps over the cell. The caller has made
    /// sure that the cell is the collector's.
    #[inline(always)]
    fn take(&mut self) -> Option<B> {
        let buffer = self.take_from(self.collected);
        self.collected = self.collected.wrapping_add(1);
        buffer
    }

    /// Takes the buffer out of a cell that is the collector's.
    #[inline(always)]
    fn take_from(&mut self, index: u32) -> Option<B> {
        take_from(self.inbox.buffer_cell(index), self.inbox.buffer_ptr(index))
    }

    /// Moves the oldest frame of the overflow ring into the oldest posted buffers, if there are both
    /// and no earlier claim is still being filled. Returns true if it did, and `collect` finds the
    /// packet.
    #[cold]
    #[inline(never)]
    fn fill_from_overflow(&mut self) -> bool {
        // We are about to move `claimed`, which must not overtake the `posted` that senders see.
        self.publish();
        // Acquire: pairs with the Release in `change`.
        let state = InboxState(self.inbox.state.load(Ordering::Acquire));
        if state.claimed() != self.collected || !state.overflow() {
            return false;
        }
        let waiting = self.inbox.overflow.cell(self.popped);
        // Acquire: pairs with the Release in `end_push`; the sender's copy is complete.
        let cell_state = waiting.state.load(Ordering::Acquire);
        if cell_state == PENDING {
            return false;
        }
        let len = cell_state as usize - 1;
        let end = self.inbox.cells_for(state, self.posted, len);
        if end.is_none() && !self.gives_up() {
            return false;
        }
        // Whatever becomes of the copy, the frame leaves the ring, and the buffers come back.
        let popping = Popping { state, end: end.unwrap_or(self.collected), collector: self };
        if let Some(end) = end {
            let collector = &*popping.collector;
            collector.inbox.overflow.cell(collector.popped).access.with(|_| {
                let (header, frame) = collector.waiting_frame(collector.popped, len);
                let packet = Packet::from(frame).with_offload(&header);
                // The posted cells are ours (invariant 1): they are not claimed, and the overflow bit
                // is set. No sender claims before `popping` clears the bit.
                collector.inbox.fill(collector.collected, end, packet, WAITED);
            });
        }
        true
    }

    /// Whether a frame that waits is to be dropped, for which the posted buffers are too few: because
    /// no packet can have that many, or because no more were posted for a long time. Without this, a
    /// guest that posts buffers only when packets arrive would never get one again.
    fn gives_up(&mut self) -> bool {
        let lent = self.posted.wrapping_sub(self.collected);
        let full = lent >= GROUP_MAX || self.is_full();
        let Short { posted, looks, dropped } = &mut self.short;
        *looks = if *posted == self.posted { looks.saturating_add(1) } else { 0 };
        *posted = self.posted;
        let gives_up = lent > 0 && (full || *looks >= SHORT_LOOKS);
        if gives_up {
            *looks = 0;
            *dropped += 1;
        }
        gives_up
    }

    /// Returns how many frames were dropped since the last call because the posted buffers were too
    /// few for them.
    #[inline]
    pub fn take_dropped(&mut self) -> u64 {
        core::mem::take(&mut self.short.dropped)
    }

    /// Takes back every posted buffer that no sender has claimed, and gives each to `f`. Returns
    /// how many there were.
    ///
    /// A recall drops no packet: buffers that are being filled come later, with their packets, and
    /// frames in the overflow ring stay there.
    pub fn recall(&mut self, mut f: impl FnMut(B)) -> usize {
        // `claimed` must not overtake the `posted` that senders see.
        self.publish();
        // Acquire: pairs with the Release in `change`.
        let mut state = InboxState(self.inbox.state.load(Ordering::Acquire));
        while let Err(now) = self.inbox.change(state, state.with_claimed(self.posted)) {
            state = InboxState(now);
        }
        // We moved `claimed` past these cells, so they are ours.
        let mut recalled = Recalled { cells: state.claimed()..self.posted, collector: self };
        let mut count = 0;
        while let Some(buffer) = recalled.next() {
            count += 1;
            f(buffer);
        }
        count
    }

    /// Takes back the posted buffers that no sender has claimed and for which `matches` returns
    /// true, and gives each to `f`, oldest first. Returns how many there were.
    ///
    /// The other buffers stay posted, in their order, and no frame is dropped for want of them. A
    /// sender that comes meanwhile waits, so `matches` and `f` should be short. Like
    /// [`recall`](Self::recall) it drops no packet.
    pub fn recall_if(
        &mut self,
        mut matches: impl FnMut(&mut B) -> bool,
        mut f: impl FnMut(B),
    ) -> usize {
        self.publish();
        // Acquire: pairs with the Release in `change`.
        let mut state = InboxState(self.inbox.state.load(Ordering::Acquire));
        // While the overflow bit is set no sender claims, and only we clear the bit, so the held
        // bit is not needed.
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
                // SAFETY: invariants 1 and 4: the cell is posted and unclaimed, and the overflow
                // bit or the held bit is set. No sender claims before `held` is dropped, so the
                // cell is ours.
                let cell = unsafe { &mut *cell };
                if cell.as_mut().is_some_and(&mut matches) { cell.take() } else { None }
            });
            if let Some(buffer) = buffer {
                held.collector.gaps += 1;
                held.taken += 1;
                f(buffer);
            }
        }
        held.taken as usize
    }

    /// Announces that the receiver wants to sleep.
    ///
    /// Returns true if nothing can be collected: the next sender to ring calls the wake callback,
    /// once. Returns false if there is something to collect: the receiver stays awake.
    ///
    /// A frame that is still being copied does not count, because its sender has yet to ring. A
    /// frame that waits in the overflow ring while no buffer is posted does not count either, so a
    /// receiver must collect after it has posted. If buffers are posted, but too few for the frame, it
    /// is dropped ([`take_dropped`](Self::take_dropped)).
    pub fn arm(&mut self) -> bool {
        self.drop_short();
        // The doorbell's fence is between its flag and our check: either the ringer sees the flag,
        // or we see its packet (see `vmring_core::doorbell`).
        self.inbox.doorbell.arm();
        let asleep = !self.is_ready();
        if !asleep {
            self.inbox.doorbell.disarm();
        }
        asleep
    }

    /// Announces that the receiver is awake again, so that senders no longer call the wake
    /// callback. Returns false if a sender has already called it or is about to.
    pub fn disarm(&mut self) -> bool {
        self.inbox.doorbell.disarm()
    }

    /// Drops the frames at the front of the overflow ring for which the posted buffers are too few.
    fn drop_short(&mut self) {
        while self.kinds.is_small
            && self.inbox.overflowing.load(Ordering::Relaxed)
            && !self.is_ready()
        {
            self.short.looks = SHORT_LOOKS;
            self.short.posted = self.posted;
            if !self.fill_from_overflow() {
                break;
            }
        }
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
        // Acquire, of the cell's state: pairs with the Release in `end_push`.
        let len = || match self.inbox.overflow.cell(self.popped).state.load(Ordering::Acquire) {
            PENDING => None,
            cell_state => Some(cell_state as usize - 1),
        };
        let ready = state.claimed() == index
            && state.overflow()
            && len().is_some_and(|len| self.inbox.cells_for(state, self.posted, len).is_some());
        if ready {
            // The sender may not have set the hint yet. A receiver that gets `true` here must find
            // the frame when it collects.
            self.inbox.overflowing.store(true, Ordering::Relaxed);
        }
        ready
    }

    /// Refuses further deliveries and waits for those under way. Each takes as long as copying one
    /// frame, or the frames of one [`Claim`]; a claim that was forgotten takes for ever. When
    /// `close` returns, no sender touches any buffer.
    ///
    /// Packets that have arrived can still be collected, and the other buffers can be recalled.
    /// [`discard`](Self::discard) drops the packets instead.
    pub fn close(&mut self) {
        // AcqRel: pairs with `change`, by which senders claim and push, and with their loads of the
        // state in `deliver` and `claim`.
        let state = InboxState(self.inbox.state.fetch_or(CLOSED, Ordering::AcqRel));
        for index in indices(&(self.collected..state.claimed())) {
            // No sender has a cell whose buffer was taken back.
            let lent = self.inbox.buffer_cell(index).with(|cell| {
                // SAFETY: invariant 4: only the collector uses the buffer cells, and `&mut self` is
                // it.
                unsafe { (*cell).is_some() }
            });
            if lent {
                // Acquire: pairs with the Release in `end_claim`; the sender no longer uses the
                // buffer.
                wait(|| {
                    filled_with(self.inbox.cell_state(index).load(Ordering::Acquire), index)
                        .is_some()
                });
            }
        }
        let mut index = self.popped;
        if index != state.pushed() {
            // A sender sets the hint after it has stored the cell's state, which is all that we
            // wait for below. A receiver that collects after `close` must find the frame.
            self.inbox.overflowing.store(true, Ordering::Relaxed);
        }
        while index != state.pushed() {
            // Acquire: pairs with the Release in `end_push`; the sender no longer uses the
            // cell.
            let cell = self.inbox.overflow.cell(index);
            wait(|| cell.state.load(Ordering::Acquire) != PENDING);
            index = index.wrapping_add(1) & PUSHED_MASK;
        }
    }

    /// Closes the inbox, drops every packet that has not been collected, and gives every buffer to
    /// `f`. Returns how many packets were dropped.
    pub fn discard(&mut self, mut f: impl FnMut(B)) -> usize {
        self.close();
        let mut dropped = 0;
        // Nothing is copied for it: frames that wait are dropped where they are, below.
        while self.collected != self.posted
            && let Some(packet) = self.collect_filled()
        {
            dropped += usize::from(!packet.more);
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
        if self.kinds.has_guests {
            self.inbox.rooms.iter().for_each(|room| room.store(Room::ANY.0, Ordering::Relaxed));
            self.kinds = Kinds::default();
        }
        // Release: pairs with the Acquire in `deliver` and `claim` of senders that come after a
        // `reopen`.
        self.inbox.state.store(state.without(OVERFLOW | SMALL).0, Ordering::Release);
        dropped
    }

    /// Begins a period: moves the indices on by one. The inbox is closed, and no buffer is in it.
    fn begin_period(&mut self) {
        let (lent, left) = (self.posted(), self.posted.wrapping_sub(self.collected));
        assert_eq!((lent, left), (0, 0), "a period begins without buffers");
        // Nobody else changes the state of a closed inbox. Acquire: pairs with the Release in
        // `change`, as in `discard`.
        let state = InboxState(self.inbox.state.load(Ordering::Acquire));
        debug_assert!(state.closed() && state.claimed() == self.posted);
        let next = self.posted.wrapping_add(1);
        (self.collected, self.posted) = (next, next);
        // Release: pairs with the Acquire in `deliver_if` and `claim_if`, of senders that come after a
        // `reopen`.
        self.publish();
        self.inbox.state.store(state.with_claimed(next).0, Ordering::Release);
    }

    /// Takes the frames out that wait in the overflow ring of a closed inbox without buffers, oldest
    /// first, and begins a period. Only a change of the receiver's offloads calls it, so it may
    /// allocate.
    pub(crate) fn take_waiting(&mut self) -> Vec<(OffloadHeader, Box<[u8]>)> {
        // Nobody else changes the state of a closed inbox. Acquire: pairs with the Release in
        // `change`, as in `discard`.
        let state = InboxState(self.inbox.state.load(Ordering::Acquire));
        let mut waiting = Vec::new();
        let mut index = self.popped;
        while index != state.pushed() {
            let cell = self.inbox.overflow.cell(index);
            // Acquire: pairs with the Release in `end_push`. `close` has waited for it.
            let len = cell.state.load(Ordering::Acquire) as usize - 1;
            waiting.push(cell.access.with(|_| {
                let (header, frame) = self.waiting_frame(index, len);
                (header, Box::from(frame))
            }));
            index = index.wrapping_add(1) & PUSHED_MASK;
        }
        self.discard(drop);
        self.begin_period();
        waiting
    }

    /// Puts a frame into the overflow ring of a closed inbox, behind those that wait. Returns whether
    /// there was space.
    pub(crate) fn put_waiting(&mut self, packet: Packet<'_>) -> bool {
        let inbox = &*self.inbox;
        // Nobody else changes the state of a closed inbox. Acquire: as in `discard`.
        let state = InboxState(inbox.state.load(Ordering::Acquire));
        debug_assert!(state.closed());
        let waiting = state.pushed().wrapping_sub(self.popped) & PUSHED_MASK;
        let fits =
            packet.len() <= inbox.max_frame && (waiting as usize) < inbox.overflow.cells.len();
        if fits {
            inbox.copy_to_overflow(state.pushed(), packet);
            inbox.end_push(state.pushed(), packet.len());
            // Release: pairs with the Acquire in `deliver_if` and `claim_if`.
            inbox.state.store(state.with_push().0, Ordering::Release);
            inbox.overflowing.store(true, Ordering::Relaxed);
        }
        fits
    }

    /// The frame of `len` bytes in the overflow cell `index`, and its header. The cell is the
    /// collector's: its sender has stored its state, and it has not been popped.
    fn waiting_frame(&self, index: u32, len: usize) -> (OffloadHeader, &[u8]) {
        let header_len = self.inbox.overflow_header_len();
        // SAFETY: invariant 2: the callers have seen the cell's state and not popped the cell, so it is
        // ours. Its sender wrote the header, if the inbox has headers, and `len` bytes behind it.
        let cell = unsafe {
            let bytes = self.inbox.overflow.bytes_of(index);
            core::slice::from_raw_parts(bytes, header_len + len)
        };
        let (header, frame) = cell.split_at(header_len);
        let header = header.first_chunk().map(OffloadHeader::parse);
        // A header that a sender wrote can be parsed.
        (header.and_then(Result::ok).unwrap_or(OffloadHeader::NONE), frame)
    }

    /// Accepts deliveries again after a [`close`](Self::close). Packets that were not collected
    /// before are still there. This has no effect on an open inbox.
    pub fn reopen(&mut self) {
        // AcqRel: pairs with the loads of the state in `deliver` and `claim`, which then see our
        // indices, and with `change`.
        self.inbox.state.fetch_and(!CLOSED, Ordering::AcqRel);
    }
}

/// The cells `start..posted`, some of them without their buffer. The overflow bit or the held bit
/// keeps them from the senders. Dropping this guard, also by a panic, gives the senders the cells
/// that have a buffer.
struct Held<'a, B: PacketBuffer> {
    collector: &'a mut Collector<B>,
    start: u32,
    taken: u32,
}

impl<B: PacketBuffer> Drop for Held<'_, B> {
    fn drop(&mut self) {
        let (start, posted) = (self.start, self.collector.posted);
        let inbox = &*self.collector.inbox;
        // The buffers that stay move up to the last cells, the newest first. The indices that
        // senders compare only ever grow, so no sender can mistake an earlier state for this one.
        let first = start.wrapping_add(self.taken);
        let mut free = posted;
        for index in indices(&(start..posted)).rev() {
            let buffer = inbox.buffer_cell(index).with_mut(|cell| {
                // SAFETY: invariants 1 and 4: `recall_if` made this guard with the overflow bit or
                // the held bit set, and we clear the held bit only below, so no sender claims the
                // cell.
                unsafe { (*cell).take() }
            });
            if let Some(buffer) = buffer {
                free = free.wrapping_sub(1);
                let place = inbox.buffer_cell(free).with_mut(|cell| {
                    // SAFETY: invariants 1 and 4: this cell is in the same range, so no sender
                    // claims it either. It is empty: its buffer was taken in this loop, or was
                    // taken back.
                    let buffer = unsafe { (*cell).insert(buffer) };
                    // The buffer may have moved, and the caller's `matches` may have changed it, so
                    // its pointer is asked for anew. Senders wait for us, so not even a buffer that
                    // panics may end this loop. A buffer that is now too small gets packets of no
                    // bytes.
                    let ask = AssertUnwindSafe(|| inbox.place_of(buffer).unwrap_or(Place::NOWHERE));
                    catch_unwind(ask).unwrap_or(Place::NOWHERE)
                });
                inbox.store_place(free, &place, self.collector.kinds.has_guests);
            }
        }
        // Relaxed: `change` below acquires.
        let mut state = InboxState(inbox.state.load(Ordering::Relaxed));
        while let Err(now) = inbox.change(state, state.with_claimed(first).without(HELD)) {
            state = InboxState(now); // a sender pushed; none can claim
        }
        self.collector.skip_taken_back();
    }
}

impl<B: PacketBuffer> Drop for Collector<B> {
    fn drop(&mut self) {
        self.inbox.doorbell.disarm();
        self.inbox.doorbell.parker().set(None);
        self.discard(drop);
        // Release: pairs with the Acquire in `open`; the next collector sees our indices.
        self.inbox.has_collector.store(false, Ordering::Release);
    }
}

/// The oldest frame of the overflow ring, which goes into the posted cells before `end`, or nowhere.
/// Dropping this guard, also by a panic, takes the frame out of the ring and the cells from those that
/// senders may claim.
struct Popping<'a, B: PacketBuffer> {
    collector: &'a mut Collector<B>,
    /// The inbox's state as it was, with the overflow bit set.
    state: InboxState,
    end: u32,
}

impl<B: PacketBuffer> Drop for Popping<'_, B> {
    #[inline]
    fn drop(&mut self) {
        let (end, mut state) = (self.end, self.state);
        let collector = &mut *self.collector;
        let inbox = &*collector.inbox;
        // Relaxed: published by `popped` below.
        inbox.overflow.cell(collector.popped).state.store(PENDING, Ordering::Relaxed);
        let popped = collector.popped.wrapping_add(1) & PUSHED_MASK;
        loop {
            let mut next = state.with_claimed(end);
            let last = state.pushed() == popped;
            if last {
                next = next.without(OVERFLOW); // that was the last frame: senders may claim again
            }
            // This store comes before the change: a sender that sets the bit again sets the hint
            // after its own change.
            inbox.overflowing.store(!last, Ordering::Relaxed);
            match inbox.change(state, next) {
                Ok(()) => break,
                Err(now) => state = InboxState(now), // a sender pushed; none can claim
            }
        }
        // Release: pairs with the Acquire in `deliver`; we no longer read the cell.
        inbox.popped.store(popped, Ordering::Release);
        collector.popped = popped;
    }
}

/// The cells that a recall has claimed and not looked at yet. Dropping this guard, also by a panic of
/// the caller's function, takes the buffers out that are left, and drops them.
struct Recalled<'a, B: PacketBuffer> {
    collector: &'a mut Collector<B>,
    cells: Range<u32>,
}

impl<B: PacketBuffer> Recalled<'_, B> {
    fn next(&mut self) -> Option<B> {
        while self.cells.start != self.cells.end {
            let index = self.cells.start;
            self.cells.start = index.wrapping_add(1);
            // It is `None` if this buffer was taken back before.
            if let Some(buffer) = self.collector.take_from(index) {
                self.collector.gaps += 1;
                return Some(buffer);
            }
        }
        None
    }
}

impl<B: PacketBuffer> Drop for Recalled<'_, B> {
    fn drop(&mut self) {
        while self.next().is_some() {}
        self.collector.skip_taken_back();
    }
}

/// Waits until a claim has ended, which takes as long as copying its frames.
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
