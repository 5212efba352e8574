//! What the halves of a ring, its engine, its device and its control handles share.

pub(crate) mod ready;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use vmring_core::{Class, Frame};

use crate::error::{CloseReason, Status};
use crate::mailbox::ready::ReadySet;
use crate::notify::Notifier;
use crate::stats::RingCounters;
use crate::sys::lock;

/// Bits of [`RingShared::requests`].
pub(crate) mod request {
    pub(crate) const STOP: u32 = 1;
    pub(crate) const CANCEL_ALL: u32 = 2;
    pub(crate) const DETACH: u32 = 4;
    pub(crate) const REOPEN: u32 = 8;
    /// A cancel stands in the SQ.
    pub(crate) const CANCEL: u32 = 16;
}

/// How a ring's engine sleeps: by leaving its poller's active list, or, when its owner drives it,
/// by parking the owner.
#[derive(Debug)]
pub(crate) enum RingPark {
    Poller { poller: Arc<ReadySet>, place: usize },
    Inline(Arc<Notifier>),
}

impl Park for RingPark {
    fn park(&self, timeout: Option<Duration>) {
        match self {
            // An engine on a poller parks by leaving the active list; see `Engine::try_sleep`.
            RingPark::Poller { .. } => {}
            RingPark::Inline(notifier) => notifier.park(timeout),
        }
    }

    fn unpark(&self) {
        match self {
            RingPark::Poller { poller, place } => poller.set_ready(*place),
            RingPark::Inline(notifier) => notifier.unpark(),
        }
    }
}

const OPEN: u64 = 0;
const STOPPED: u64 = 1;
const PANICKED: u64 = 2;
const FAILED: u64 = 3 << 32;

/// What a ring's halves, its engine, its device and its control handles share.
pub(crate) struct RingShared {
    pub(crate) number: u32,
    /// Wakes the engine.
    pub(crate) bell: Doorbell<RingPark>,
    /// Wakes the reaping half.
    pub(crate) cq_bell: Doorbell<Arc<Notifier>>,
    /// The CQ index that the sleeping reaper waits for.
    pub(crate) wanted: AtomicU32,
    /// Microseconds after which it wants to be woken with less; 0: never.
    pub(crate) coalesce: AtomicU64,
    /// Why the ring is closed; `OPEN` while it is not.
    closed: AtomicU64,
    pub(crate) requests: AtomicU32,
    device_rang: AtomicBool,
    has_dropped: AtomicBool,
    /// `None`: the engine is gone, and nobody completes them any more.
    dropped: Mutex<Option<Vec<DroppedSlot>>>,
    /// A control handle wants `wait` to return.
    pub(crate) woken: AtomicBool,
    /// `CANCEL_ALL` wishes ever made, and those carried out.
    cancels: [AtomicU32; 2],
    pub(crate) counters: RingCounters,
}

impl fmt::Debug for RingShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingShared")
            .field("number", &self.number)
            .field("closed", &self.why_closed())
            .finish_non_exhaustive()
    }
}

impl Drop for RingShared {
    fn drop(&mut self) {
        deregister(self.number);
    }
}

impl RingShared {
    pub(crate) fn new(number: u32, park: RingPark, notifier: Arc<Notifier>, depth: usize) -> Self {
        Self {
            number,
            bell: Doorbell::new(park),
            cq_bell: Doorbell::new(notifier),
            wanted: AtomicU32::new(0),
            coalesce: AtomicU64::new(0),
            closed: AtomicU64::new(OPEN),
            requests: AtomicU32::new(0),
            device_rang: AtomicBool::new(false),
            has_dropped: AtomicBool::new(false),
            dropped: Mutex::new(Some(Vec::with_capacity(depth))),
            woken: AtomicBool::new(false),
            cancels: [0, 0].map(AtomicU32::new),
            counters: RingCounters::default(),
        }
    }

    /// The first reason stays.
    pub(crate) fn close(&self, why: CloseReason) {
        let code = match why {
            CloseReason::Stopped => STOPPED,
            CloseReason::DevicePanicked => PANICKED,
            CloseReason::Failed(status) => FAILED | u64::from(status.to_raw()),
        };
        // Release: who sees the reason sees what led to it.
        let _ = self.closed.compare_exchange(OPEN, code, Ordering::Release, Ordering::Relaxed);
    }

    /// Whether the owner of the reaping half drives the engine, always.
    #[inline]
    pub(crate) fn is_inline(&self) -> bool {
        matches!(self.bell.parker(), RingPark::Inline(_))
    }

    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        // Acquire: pairs with `close`.
        self.closed.load(Ordering::Acquire) == OPEN
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn why_closed(&self) -> Option<CloseReason> {
        match self.closed.load(Ordering::Acquire) {
            OPEN => None,
            STOPPED => Some(CloseReason::Stopped),
            PANICKED => Some(CloseReason::DevicePanicked),
            failed => Some(CloseReason::Failed(Status::from_raw(failed as u32))),
        }
    }

    /// Wakes the engine if it sleeps, wherever it is. Returns whether it had to.
    #[inline]
    pub(crate) fn ring_engine(&self) -> bool {
        let rang = self.bell.ring();
        if rang && !self.is_open() {
            // The poller may have handed the engine to the reaping half, which sleeps on its own
            // bell. That it closed is visible: the Acquire in `ring_if` saw what it armed after.
            self.cq_bell.ring();
        }
        rang
    }

    /// The submitter's doorbell, after it has published; `oneself`: it drives the engine as well.
    #[inline]
    pub(crate) fn ring_doorbell(&self, oneself: bool) {
        let rang = if oneself { self.bell.ring_oneself() } else { self.ring_engine() };
        if rang {
            self.counters.doorbells.add(1);
        }
    }

    /// Something for the engine to do besides submissions.
    pub(crate) fn request(&self, bits: u32) {
        // Release: pairs with the Acquire in `take_requests`: submissions published before are seen.
        self.requests.fetch_or(bits, Ordering::Release);
        self.ring_engine();
        // An engine driven by a sleeping owner sleeps on both bells at once.
        if self.is_inline() {
            self.cq_bell.ring();
        }
    }

    #[inline]
    pub(crate) fn take_requests(&self) -> u32 {
        if self.requests.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.requests.swap(0, Ordering::Acquire)
    }

    /// The device says that there may be packets.
    pub(crate) fn ring_from_device(&self) {
        // Release: pairs with the Acquire in `take_device_rang`.
        self.device_rang.store(true, Ordering::Release);
        self.ring_engine();
    }

    #[inline]
    pub(crate) fn take_device_rang(&self) -> bool {
        self.device_rang.load(Ordering::Relaxed) && self.device_rang.swap(false, Ordering::Acquire)
    }

    /// Whether anything but a submission waits for the engine.
    pub(crate) fn has_requests(&self) -> bool {
        self.requests.load(Ordering::Relaxed) != 0
            || self.device_rang.load(Ordering::Relaxed)
            || self.has_dropped.load(Ordering::Relaxed)
            || self.wants_clock()
    }

    /// Takes in a slot that the device dropped; without an engine it goes home to its pool.
    pub(crate) fn slot_dropped(&self, slot: DroppedSlot) {
        match &mut *lock(&self.dropped) {
            Some(dropped) => dropped.push(slot),
            // Dropped behind the lock, which is not on any packet's way.
            None => return drop(slot),
        }
        self.has_dropped.store(true, Ordering::Release);
        self.ring_engine();
    }

    #[inline]
    pub(crate) fn has_dropped(&self) -> bool {
        self.has_dropped.load(Ordering::Relaxed)
    }

    /// Swaps the dropped into `empty`.
    pub(crate) fn take_dropped(&self, empty: &mut Vec<DroppedSlot>) {
        if let Some(dropped) = &mut *lock(&self.dropped) {
            std::mem::swap(dropped, empty);
        }
        self.has_dropped.store(false, Ordering::Relaxed);
    }

    /// The engine is gone: what comes from now on goes home.
    pub(crate) fn refuse_dropped(&self) {
        let dropped = lock(&self.dropped).take();
        drop(dropped);
    }

    /// Asks for everything in flight to be cancelled; returns the number to wait for.
    pub(crate) fn request_cancel_all(&self) -> u32 {
        // Relaxed: published with the wish.
        let asked = self.cancels[0].fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        self.request(request::CANCEL_ALL);
        asked
    }

    /// How many were asked for: the engine looks before it cancels.
    pub(crate) fn cancels_requested(&self) -> u32 {
        self.cancels[0].load(Ordering::Relaxed)
    }

    /// All that were asked for up to `asked` are carried out, and their completions shown.
    pub(crate) fn mark_cancels_done(&self, asked: u32) {
        // Release: pairs with the Acquire in `are_cancelled`.
        self.cancels[1].store(asked, Ordering::Release);
        self.notify();
    }

    pub(crate) fn are_cancelled(&self, asked: u32) -> bool {
        self.cancels[1].load(Ordering::Acquire).wrapping_sub(asked) < 1 << 31
    }

    /// After publishing up to `index`: wakes the reaper if it sleeps and that is enough for it.
    #[inline]
    pub(crate) fn notify_if_due(&self, index: u32) -> bool {
        self.cq_bell.ring_if(|| {
            // Relaxed: stored before arming; the Acquire in `ring_if` makes it visible.
            index.wrapping_sub(self.wanted.load(Ordering::Relaxed)) < 1 << 31
        })
    }

    /// Wakes the reaper if it sleeps, whatever it waits for.
    pub(crate) fn notify(&self) {
        self.cq_bell.ring();
    }

    #[inline]
    pub(crate) fn wants_coalescing(&self) -> bool {
        self.coalesce.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn wants_clock(&self) -> bool {
        // Set to the high bit by `arm_after` when completions wait already: the engine must start
        // the clock.
        self.coalesce.load(Ordering::Relaxed) & START_CLOCK != 0
    }

    /// How long a sleeping reaper puts up with fewer completions than it wants, and the number of
    /// the arming that said so: each has a clock of its own.
    pub(crate) fn coalescing(&self) -> Option<(u64, Duration)> {
        let wish = self.coalesce.load(Ordering::Relaxed);
        if wish == 0 {
            return None;
        }
        if wish & START_CLOCK != 0 {
            // Cleared in any case, or the engine would never sleep again; only the bit, so that a
            // newer wish stays. Acquire: the look at the bell comes after.
            self.coalesce.fetch_and(!START_CLOCK, Ordering::Acquire);
        }
        if !self.cq_bell.is_armed() {
            return None;
        }
        let wish = wish & !START_CLOCK;
        Some((wish >> DELAY_BITS, Duration::from_micros(wish & DELAY_MAX_US)))
    }
}

// A wish for coalescing: a bit, the number of the arming, and microseconds (up to twelve days).
pub(crate) const START_CLOCK: u64 = 1 << 63;
pub(crate) const DELAY_BITS: u32 = 40;
pub(crate) const DELAY_MAX_US: u64 = (1 << DELAY_BITS) - 1;

/// An entry whose slot the device dropped.
#[derive(Debug)]
pub(crate) struct DroppedSlot {
    pub(crate) frame: Frame,
    pub(crate) user_data: u64,
    pub(crate) class: Class,
}

/// The rings of the process by number, so that a dropped slot finds its ring, or finds that it is
/// gone. Locked when a ring is built or dropped, and when a device drops a slot: never on a packet's
/// way.
#[derive(Default)]
struct Registry {
    rings: HashMap<u32, Weak<RingShared>>,
    /// The last number given.
    last: u32,
}

fn registry() -> &'static Mutex<Registry> {
    static REGISTRY: OnceLock<Mutex<Registry>> = OnceLock::new();
    REGISTRY.get_or_init(Mutex::default)
}

/// The number of a ring that is being built. Number 0 is no ring's: a wrapper's
/// [`PollContext`](crate::device::PollContext) has it.
pub(crate) fn new_ring_number() -> u32 {
    let mut registry = lock(registry());
    loop {
        registry.last = registry.last.wrapping_add(1);
        // After 2^32 rings the numbers begin anew, and some may still be in use.
        if registry.last != 0 && !registry.rings.contains_key(&registry.last) {
            return registry.last;
        }
    }
}

pub(crate) fn register(shared: &Arc<RingShared>) {
    lock(registry()).rings.insert(shared.number, Arc::downgrade(shared));
}

fn deregister(number: u32) {
    lock(registry()).rings.remove(&number);
}

#[cold]
pub(crate) fn report_dropped(ring: u32, slot: DroppedSlot) {
    let shared = lock(registry()).rings.get(&ring).and_then(Weak::upgrade);
    match shared {
        Some(shared) => shared.slot_dropped(slot),
        // The ring is gone: the frame goes home to its pool.
        None => drop(slot),
    }
}
