//! The device side of a split virtqueue (virtio 1.2, section 2.7): chains of a guest's buffers come
//! in, and elements of the used ring go out. It knows neither rings nor networks.
//!
//! ```
//! use std::sync::Arc;
//! use vmring_core::HeapBacking;
//! use vmring_core::guest::{GuestMemory, GuestRegion};
//! use vmring_virtio::queue::{AddressSpace, Queue, QueueFeatures, QueueLayout, QueueState};
//!
//! let mapping = Arc::new(HeapBacking::new(0x4000));
//! let memory = GuestMemory::new([GuestRegion::new(0, mapping)])?;
//! let layout = QueueLayout {
//!     size: 256,
//!     descriptors: 0,
//!     available: 0x1000,
//!     used: 0x2000,
//!     addresses: AddressSpace::Guest,
//!     used_log: None,
//! };
//! let mut queue = Queue::new(memory, layout, QueueFeatures::default(), QueueState::default())?;
//!
//! // One burst.
//! for _ in 0..queue.fetch(32)? {
//!     match queue.pop() {
//!         Some(Ok(chain)) => {
//!             for segment in chain.readable() {
//!                 println!("{} bytes to send", segment.len());
//!             }
//!             queue.push(0);
//!         }
//!         Some(Err(error)) => eprintln!("a chain is broken: {error}"),
//!         None => break,
//!     }
//! }
//! queue.flush();
//! if queue.needs_interrupt() {
//!     println!("raise the queue's interrupt");
//! }
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! # Order
//!
//! Chains are given back in the order in which they were popped: [`push`](Queue::push) ends the
//! oldest, [`unpop`](Queue::unpop) gives up the newest. So each chain comes back exactly once, a
//! queue that goes on elsewhere needs two indices ([`QueueState`]), and a front end that lost its
//! back end may make everything available again that is behind the used index.
//!
//! # Guests that break the rules
//!
//! A broken chain costs that chain. [`pop`](Queue::pop) says what is wrong, for a counter, and the
//! queue gives the chain back with the used length 0 when it is the chain's turn. A broken available
//! index costs the queue: see [`BrokenQueue`]. The work for an entry is bounded by
//! [`DESCRIPTORS_MAX`], and for a burst by what was asked of [`fetch`](Queue::fetch). Everything that
//! decides is copied out of the guest's memory once, and the copy is checked.
//!
//! # Orderings
//!
//! The driver is another program. Its side of each pair is named as in Linux's
//! `drivers/virtio/virtio_ring.c`.
//!
//! | here | pairs with the driver's | so that |
//! |---|---|---|
//! | [`fetch`](Queue::fetch) loads the available index, Acquire | `virtio_wmb` before its store, in `virtqueue_add_split` (2.7.13.3) | entries and descriptors are the new ones |
//! | [`flush`](Queue::flush) stores the used index, Release, after buffers, elements and dirty marks | `virtio_rmb` after its load, in `virtqueue_get_buf_ctx_split` (2.7.14) | the driver sees what was written |
//! | [`flush`](Queue::flush) stores the used index; then [`needs_interrupt`](Queue::needs_interrupt) has a fence and loads `used_event` or the flags | `virtqueue_enable_cb_prepare_split` stores `used_event` or the flags; then `virtqueue_poll` has `virtio_mb` and loads the used index (2.7.14) | one of the two sees the other's store, and no interrupt is lost |
//! | [`enable_notifications`](Queue::enable_notifications) stores `avail_event` or the flags; then it has a fence and loads the available index | `virtqueue_add_split` stores the available index; then `virtqueue_kick_prepare_split` has `virtio_mb` and loads `avail_event` or the flags (2.7.13.4) | one of the two sees the other's store, and no kick is lost |

#![forbid(unsafe_code)]

mod chain;
mod layout;
mod rings;
mod used;

pub use chain::{Chain, ChainError, DESCRIPTORS_MAX, Segments, Single};
pub use layout::{
    AddressSpace, BrokenQueue, Part, QueueError, QueueFeatures, QueueLayout, QueueState, SIZE_MAX,
};

use crate::queue::chain::Walker;
use crate::queue::rings::Rings;
use crate::queue::used::UsedElements;
use core::{fmt, mem};
use vmring_core::guest::GuestMemory;
use vmring_core::sync::Ordering;
use vmring_core::sync::foreign::fence;

/// How many segments a chain may have by default; see [`Queue::with_segments_max`].
pub const SEGMENTS_MAX: usize = 256;

/// How many chains [`Queue::pop_singles`] looks at together.
const LOOK: usize = 32;

/// The device side of a split virtqueue. See the [module](self).
///
/// All indices count modulo 2^16, and a place in a ring is an index modulo the queue's size. They
/// are in this order:
///
/// ```text
/// published <= next_used <= next_available <= fetched <= the driver's available index
/// ```
///
/// From the first to the last there are at most as many as the queue has entries, which
/// [`fetch`](Self::fetch) checks. So the entries between have places of their own.
pub struct Queue {
    memory: GuestMemory,
    layout: QueueLayout,
    features: QueueFeatures,
    rings: Rings,
    walker: Walker,
    /// The entries of the available ring from `published` to `fetched`, as they were copied.
    heads: Box<[[u8; 2]]>,
    /// How many bytes the device may report as written, for each chain from `next_used` to
    /// `next_available`.
    len_max: Box<[u32]>,
    /// Which of these chains are broken, and how many are.
    is_broken: Box<[bool]>,
    broken_popped: u16,
    used: UsedElements,
    fetched: u16,
    next_available: u16,
    next_used: u16,
    /// The used index that the driver sees.
    published: u16,
    /// How many elements were published since the driver's wish for interrupts was looked at.
    unsignalled: u32,
    /// Whether the used index of the last such look is known (`signalled_used_valid` elsewhere).
    signalled_is_known: bool,
    /// Whether the flags of the used ring say that notifications are wanted.
    wants_notifications: bool,
    broken: Option<BrokenQueue>,
}

impl Queue {
    /// The queue at a place in the guest's memory. It goes on at `state`, and asks the driver for
    /// notifications.
    ///
    /// If chains are between the two indices of `state`, another queue has popped them. They are
    /// popped again, because nobody else gives them back.
    ///
    /// The driver may have been told not to notify before, and a notification may have been lost: so
    /// look at the queue first, without waiting for one.
    ///
    /// # Errors
    ///
    /// [`QueueError`], if the parts are not where a queue can have them, or the state is none.
    pub fn new(
        memory: GuestMemory,
        layout: QueueLayout,
        features: QueueFeatures,
        state: QueueState,
    ) -> Result<Self, QueueError> {
        let rings = Rings::new(&memory, &layout)?;
        let size = rings.size();
        if state.next_available.wrapping_sub(state.next_used) > size {
            return Err(QueueError::State { state });
        }
        let next = state.next_used;
        rings.set_wants_notifications(true);
        if features.event_idx {
            rings.set_available_event(next);
        }
        Ok(Self {
            memory,
            layout,
            features,
            rings,
            walker: Walker::new(SEGMENTS_MAX),
            heads: vec![[0; 2]; size.into()].into(),
            len_max: vec![0; size.into()].into(),
            is_broken: vec![false; size.into()].into(),
            broken_popped: 0,
            used: UsedElements::new(size),
            fetched: next,
            next_available: next,
            next_used: next,
            published: next,
            unsignalled: 0,
            signalled_is_known: false,
            wants_notifications: true,
            broken: None,
        })
    }

    /// Sets how many segments a chain may have, [`SEGMENTS_MAX`] by default. A chain with more is
    /// [`ChainError::TooManySegments`], and is given back empty. Whoever copies long chains into a
    /// buffer of its own sets a larger number.
    #[must_use]
    pub fn with_segments_max(mut self, segments_max: usize) -> Self {
        self.walker = Walker::new(segments_max);
        self
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where the queue is.
    pub fn layout(&self) -> &QueueLayout {
        &self.layout
    }

    /// What was negotiated.
    pub fn features(&self) -> QueueFeatures {
        self.features
    }

    /// Replaces the guest's memory, when the guest gets or loses a region or its dirty log. The queue
    /// is looked up again. Chains that were popped before stay popped.
    ///
    /// # Errors
    ///
    /// [`QueueError`], if the queue is not in the new memory. Then nothing has changed, and the queue
    /// must not be used any more if the old memory goes away.
    pub fn set_memory(&mut self, memory: GuestMemory) -> Result<(), QueueError> {
        self.rings = Rings::new(&memory, &self.layout)?;
        self.memory = memory;
        Ok(())
    }

    /// Changes where writes to the used ring are logged; see [`QueueLayout::used_log`]. A front end
    /// does that when a migration begins or ends.
    ///
    /// # Errors
    ///
    /// [`QueueError::UsedLog`], and nothing has changed.
    pub fn set_used_log(&mut self, used_log: Option<u64>) -> Result<(), QueueError> {
        let layout = QueueLayout { used_log, ..self.layout };
        self.rings = Rings::new(&self.memory, &layout)?;
        self.layout = layout;
        Ok(())
    }

    /// How far the queue is, for another queue that goes on. What was pushed and not
    /// [flushed](Self::flush) counts as not used.
    pub fn state(&self) -> QueueState {
        QueueState { next_available: self.next_available, next_used: self.published }
    }

    /// How many chains were popped and neither pushed nor given up. Broken ones do not count.
    pub fn outstanding(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used) - self.broken_popped
    }

    /// Begins a burst: looks at what the driver has made available and takes at most `most` entries.
    /// Returns how many chains [`pop`](Self::pop) has for the caller. The available index is loaded
    /// only if no entry of the burst before is left.
    ///
    /// # Errors
    ///
    /// [`BrokenQueue`], now and at every later call, if the driver's index is impossible.
    pub fn fetch(&mut self, most: u16) -> Result<u16, BrokenQueue> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        if self.fetched == self.next_available {
            self.load_entries(most)?;
        }
        Ok(self.fetched.wrapping_sub(self.next_available).min(most))
    }

    fn load_entries(&mut self, most: u16) -> Result<(), BrokenQueue> {
        let index = self.rings.available_index();
        let ahead = index.wrapping_sub(self.fetched);
        // The driver cannot make available what it has not got back. An index that moved backwards
        // is far ahead.
        if ahead > self.rings.size() - self.fetched.wrapping_sub(self.published) {
            let broken = BrokenQueue { index, fetched: self.fetched };
            self.broken = Some(broken);
            return Err(broken);
        }
        let mut left = usize::from(ahead.min(most));
        while left > 0 {
            let slot = self.rings.slot(self.fetched);
            let count = left.min(self.heads.len() - slot);
            self.rings.copy_heads(self.fetched, &mut self.heads[slot..slot + count]);
            self.fetched = self.fetched.wrapping_add(count as u16);
            left -= count;
        }
        Ok(())
    }

    /// The next chain of the burst. `None` at its end; see [`fetch`](Self::fetch).
    ///
    /// # Errors
    ///
    /// [`ChainError`], if the driver has not followed the rules. The chain needs no
    /// [`push`](Self::push): the queue gives it back, with the used length 0, after those before it.
    /// A flush must follow even if no chain of the burst was whole.
    pub fn pop(&mut self) -> Option<Result<Chain<'_>, ChainError>> {
        (self.next_available != self.fetched).then(|| self.pop_next())
    }

    #[inline(never)]
    fn pop_next(&mut self) -> Result<Chain<'_>, ChainError> {
        let slot = self.rings.slot(self.next_available);
        self.next_available = self.next_available.wrapping_add(1);
        let head = u16::from_le_bytes(self.heads[slot]);
        match self.walker.walk(&self.memory, &self.rings, head, self.features.indirect) {
            Ok(shape) => {
                self.len_max[slot] = shape.used_len_max();
                Ok(self.walker.chain(&self.memory, shape))
            }
            Err(error) => {
                self.is_broken[slot] = true;
                self.broken_popped += 1;
                self.return_broken();
                Err(error)
            }
        }
    }

    /// Pops the next chains of the burst, at most `most`, as long as each is a single buffer in one region,
    /// as most are. Calls `serve` with each of them. A chain for which `serve` returns false, or panics,
    /// stays in the queue with those behind it. Returns how many were popped. This may be fewer than there
    /// are: it is 0 if the next chain is one for [`pop`](Self::pop).
    ///
    /// It looks at the descriptors of all these chains before it calls `serve`, and asks for the first
    /// bytes of what the device will read. So the bytes of a burst arrive together from the driver's
    /// processor.
    #[inline(always)]
    pub fn pop_singles(&mut self, most: u16, mut serve: impl FnMut(Single<'_>) -> bool) -> u16 {
        let slot = self.rings.slot(self.next_available);
        let known = self.fetched.wrapping_sub(self.next_available);
        let count = usize::from(most.min(known)).min(LOOK).min(self.heads.len() - slot);
        let (heads, len_max) =
            (&self.heads[slot..slot + count], &mut self.len_max[slot..slot + count]);
        let mut found = [None; LOOK];
        self.walker.look(&self.memory, &self.rings, heads, &mut found, len_max);
        let mut popped = 0;
        for (buffer, len_max) in found.iter().zip(len_max) {
            let Some(buffer) = *buffer else { break };
            if !serve(Single::new(&self.memory, buffer, *len_max > 0)) {
                break;
            }
            self.next_available = self.next_available.wrapping_add(1);
            popped += 1;
        }
        popped
    }

    /// Gives up the last `count` chains that were popped and not pushed, and what was popped behind
    /// them: the available index moves back, and [`pop`](Self::pop) has them again. This is for what
    /// the device could not serve before a pause. The driver learns nothing of it.
    ///
    /// # Panics
    ///
    /// If fewer are [outstanding](Self::outstanding).
    pub fn unpop(&mut self, count: u16) {
        assert!(count <= self.outstanding(), "{count} of {} chains", self.outstanding());
        let mut left = count;
        while left > 0 {
            self.next_available = self.next_available.wrapping_sub(1);
            match mem::take(&mut self.is_broken[self.rings.slot(self.next_available)]) {
                true => self.broken_popped -= 1,
                false => left -= 1,
            }
        }
    }

    /// Gives back the oldest chain that was popped. The driver sees it after a
    /// [`flush`](Self::flush).
    ///
    /// `written` is the used length: the number of bytes that the device has written, from the
    /// chain's first device-writable byte on and without a gap (virtio 1.2, section 2.7.8.2). The
    /// driver believes that these bytes are the device's, so a number that is too large shows its
    /// users old memory. So it is 0 for a chain that only was read, and the virtio-net header counts
    /// for a received packet. More than the chain has room for is taken as its room.
    ///
    /// # Panics
    ///
    /// If no chain is [outstanding](Self::outstanding).
    #[inline(always)]
    pub fn push(&mut self, written: u32) {
        assert!(self.outstanding() > 0, "a chain is outstanding");
        let slot = self.rings.slot(self.next_used);
        // `return_broken` leaves no broken chain as the oldest.
        let (head, len_max) = (u16::from_le_bytes(self.heads[slot]), self.len_max[slot]);
        // Skipped chains count as wholly used (virtio 1.2, section 2.7.9). For a chain with room to
        // write, that would be its whole room. DPDK's driver reads each length that it needs from the
        // chain's own element, so such chains always have one.
        let skippable = self.features.in_order && len_max == 0;
        self.push_element(head, written.min(len_max), skippable);
        if self.broken_popped > 0 {
            self.return_broken();
        }
    }

    /// Gives back the oldest chains with these used lengths, as [`push`](Self::push) does.
    ///
    /// # Panics
    ///
    /// If fewer chains are [outstanding](Self::outstanding).
    #[inline]
    pub fn push_all(&mut self, written: &[u32]) {
        assert!(written.len() <= self.outstanding().into(), "as many chains are outstanding");
        if self.broken_popped > 0 {
            return written.iter().for_each(|written| self.push(*written));
        }
        let before_end = self.heads.len() - self.rings.slot(self.next_used);
        let (first, rest) = written.split_at(written.len().min(before_end));
        self.push_run(first);
        if !rest.is_empty() {
            self.push_run(rest);
        }
    }

    /// As [`push_all`](Self::push_all), if no broken chain was popped, and no chain is behind the end of
    /// the rings.
    #[inline]
    fn push_run(&mut self, written: &[u32]) {
        let Self { heads, len_max, rings, used, .. } = self;
        let (slot, index, count) = (rings.slot(self.next_used), self.next_used, written.len());
        let (heads, len_max) = (&heads[slot..slot + count], &len_max[slot..slot + count]);
        let heads = heads.iter().map(|head| u16::from_le_bytes(*head));
        // Chains with room to write are not skipped, as in `push`.
        let skippable = match self.features.in_order {
            true => len_max.iter().filter(|len_max| **len_max == 0).count(),
            false => 0,
        };
        let chains = heads.clone().zip(written.iter().zip(len_max));
        let mut chains = chains.map(|(head, (written, len_max))| (head, *written.min(len_max)));
        if skippable == 0 && !used.batch_is_open() {
            used.push_run(rings, index, chains);
        } else if skippable == count {
            // The element of the last one stands for all.
            if let Some((head, len)) = chains.next_back() {
                used.push(rings, index, head, len, true);
            }
        } else {
            for (i, (head, len)) in chains.enumerate() {
                used.push(rings, index.wrapping_add(i as u16), head, len, len_max[i] == 0);
            }
        }
        self.next_used = index.wrapping_add(count as u16);
    }

    /// Gives back the broken chains before the oldest whole one.
    #[cold]
    #[inline(never)]
    fn return_broken(&mut self) {
        while self.broken_popped > 0 {
            let slot = self.rings.slot(self.next_used);
            if !mem::take(&mut self.is_broken[slot]) {
                break;
            }
            let head = u16::from_le_bytes(self.heads[slot]);
            self.broken_popped -= 1;
            self.push_element(head, 0, false);
        }
    }

    #[inline]
    fn push_element(&mut self, head: u16, len: u32, skippable: bool) {
        self.used.push(&self.rings, self.next_used, head, len, skippable);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver everything that was pushed, at once. Call it at the end of each burst, and
    /// [`needs_interrupt`](Self::needs_interrupt) after it.
    pub fn flush(&mut self) {
        self.used.flush(&self.rings);
        let count = self.next_used.wrapping_sub(self.published);
        if count > 0 {
            self.rings.publish(self.next_used);
            self.published = self.next_used;
            self.unsignalled = self.unsignalled.saturating_add(count.into());
        }
    }

    /// Whether the driver wants an interrupt for what was flushed since the last call. So there is at
    /// most one interrupt for each call, however many chains were flushed.
    #[must_use = "the driver waits for the interrupt"]
    pub fn needs_interrupt(&mut self) -> bool {
        let count = mem::take(&mut self.unsignalled);
        if count == 0 {
            return false;
        }
        // The store of the used index, in `flush`, comes before the load of the driver's wish. It
        // pairs with the driver's fence between its wish and its last look at the used index.
        fence(Ordering::SeqCst);
        if !self.features.event_idx {
            return self.rings.wants_interrupts();
        }
        // The indices say nothing about what another queue has signalled, nor about a whole round.
        let old = self.published.wrapping_sub(count as u16);
        let is_known = mem::replace(&mut self.signalled_is_known, true) && count <= 0xffff;
        !is_known || need_event(self.rings.used_event(), self.published, old)
    }

    /// Asks the driver for notifications of what it makes available from now on. Returns whether
    /// there is something to pop already: then look again instead of sleeping.
    #[must_use = "what came meanwhile is not notified"]
    pub fn enable_notifications(&mut self) -> bool {
        self.ask_for_notifications() != self.next_available
    }

    /// Like [`enable_notifications`](Self::enable_notifications), for a device that has given up what
    /// there is because it needs more. Returns whether there is something that [`fetch`](Self::fetch)
    /// has not seen.
    #[must_use = "what came meanwhile is not notified"]
    pub fn enable_notifications_for_more(&mut self) -> bool {
        self.ask_for_notifications() != self.fetched
    }

    /// Asks for notifications, and returns the available index after that.
    fn ask_for_notifications(&mut self) -> u16 {
        if self.features.event_idx {
            self.rings.set_available_event(self.fetched);
        } else if !mem::replace(&mut self.wants_notifications, true) {
            self.rings.set_wants_notifications(true);
        }
        // The store of our wish comes before the load of the available index. It pairs with the
        // driver's fence between its store of the index and its load of our wish.
        fence(Ordering::SeqCst);
        self.rings.available_index()
    }

    /// Tells the driver that notifications are not needed. It may send some all the same. With
    /// `VIRTIO_F_EVENT_IDX` nothing is written: a driver that has passed the last wish sends no more
    /// until the next, except once in 65,536 entries.
    pub fn disable_notifications(&mut self) {
        if !self.features.event_idx && mem::replace(&mut self.wants_notifications, false) {
            self.rings.set_wants_notifications(false);
        }
    }
}

/// Whether an index that moved from `old` to `new` has passed `event` (`vring_need_event` in virtio
/// 1.2, section 2.7.11).
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("layout", &self.layout)
            .field("features", &self.features)
            .field("published", &self.published)
            .field("next_used", &self.next_used)
            .field("next_available", &self.next_available)
            .field("fetched", &self.fetched)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}
