//! The state that the halves of a ring, its engine, its device and its control handles share.
//!
//! Three rules hold for every word below.
//!
//! 1. **Clear, then look.** The consumer of a word clears it first, and looks at what it announces
//!    afterwards. What a producer adds in between is seen by that look, or leaves the word set.
//! 2. **A word says "look", not "do".** What is to be done is in one place, and is removed there when it
//!    is done: the interface's state under its lock, the ring's own state in `state`, a list, a
//!    queue. A late or double "look" finds nothing to do. The exceptions are requests that stay true
//!    for ever ([`request::STOP`]) or that carry a number ([`request::CANCEL_ALL`]).
//! 3. **What keeps the engine awake is consumed by it in every phase.** `Engine::try_sleep` refuses to
//!    sleep while [`has_requests`](RingShared::has_requests) finds one of these words set, so
//!    `Engine::poll_once` consumes each of them, whatever phase the engine is in.
//!
//! | word | set by | cleared by | seen before it is cleared | looked at in |
//! |---|---|---|---|---|
//! | `requests`: `STOP`, `CANCEL`, `CANCEL_ALL`, `LOOK` | halves, control handles, the interface | `take_requests` | nothing | every phase |
//! | `device_rang` | the device's `Wake`; the sleeper, when a descriptor is readable or a time has come | `take_device_rang` | nothing; the device is polled afterwards | every phase; only an open engine acts on it |
//! | `has_dropped`, `dropped` | `report_dropped`, under the list's lock | `take_dropped`, before it locks the list | nothing | every phase |
//! | `wanted`, `coalesce`, armed `cq_bell` | the reaper, before it sleeps | the reaper, when it is awake; the thread that rings | the reaper's own look at the CQ, after arming | `publish_and_notify`, every phase |
//! | `shortage` | the submitting half, when a submit is refused | `take_shortage_over`, by the `wait` or the arming that it ends; only a value that it has looked at | the submitter's own look at the count of skipped completions, behind the fence; the reaper's, after arming | `publish_and_notify`, every phase |
//! | `START_CLOCK` in `coalesce` | `arm_after`, when too few completions wait already | `coalescing`, which acts on the very value that it cleared | nothing | `publish_and_notify`, every phase |
//! | `woken` | `RingControl::wake` | `take_woken`, by the `wait` or the arming that it ends | nothing | before every sleep of these two |
//! | `cancels` | requested: `request_cancel_all`; done: the engine | never: both count | the engine reads the number before it cancels, and publishes before it stores `done` | every phase |
//! | `state`: open, draining, closed and why | open to draining and back: the reaping half; to closed: anybody | never leaves closed | | every submit; the engine after `LOOK` and `STOP` |
//! | bits of the [ready set](ready) | the thread that found the ring's bell armed | the poller, summary first | nothing | every round of the poller |
//!
//! The engine reads most flags here with Relaxed loads. Two things make that right:
//!
//! * The doorbell's fences, argued in `vmring_core::doorbell`. An engine that goes to sleep sees a
//!   flag that it has not taken, or the thread that set the flag sees the engine asleep and wakes
//!   it.
//! * The Release in `ReadySet::set_ready`, which pairs with the Acquire in `ReadySet::collect`. An
//!   engine that was woken on a poller sees the flags that were set before.

pub(crate) mod ready;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::{Buffer, Class};

use crate::error::{CloseReason, Status};
use crate::mailbox::ready::ReadySet;
use crate::notify::Notifier;
use crate::stats::RingCounters;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, Ordering, Overwrite};
use crate::sys::lock;

/// Bits of [`RingShared::requests`].
pub(crate) mod request {
    /// The ring is to be closed.
    pub(crate) const STOP: u32 = 1;
    /// Everything in flight is to be cancelled. `cancels` has the number of the request.
    pub(crate) const CANCEL_ALL: u32 = 2;
    /// There is a cancel in the SQ.
    pub(crate) const CANCEL: u32 = 4;
    /// The state of the interface or of the ring has changed. The engine asks them what to do.
    pub(crate) const LOOK: u32 = 8;
}

/// How a ring's engine sleeps: by leaving its poller's active list, or, if the ring's owner drives
/// it, by parking the owner.
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

// The values of `state`.
const OPEN: u64 = 0;
const DRAINING: u64 = 4;
const STOPPED: u64 = 1;
const PANICKED: u64 = 2;
const FAILED: u64 = 3 << 32;

/// The state that the halves of a ring, its engine, its device and its control handles share.
pub(crate) struct RingShared {
    pub(crate) number: u32,
    /// Wakes the engine.
    pub(crate) bell: Doorbell<RingPark>,
    /// Wakes the reaping half.
    pub(crate) cq_bell: Doorbell<Arc<Notifier>>,
    /// The CQ index that the sleeping reaper waits for, and perhaps [`UNTIL_THE_END`].
    pub(crate) wanted: AtomicU64,
    /// The delay after which a sleeping reaper wants to be woken even with fewer completions than
    /// it waits for. 0: it does not. The format is at [`START_CLOCK`].
    pub(crate) coalesce: AtomicU64,
    /// Whether the ring is open, draining, or closed and why.
    state: AtomicU64,
    /// The bits of [`request`] that the engine has not taken yet.
    pub(crate) requests: AtomicU32,
    /// Whether the device has rung since the engine last took this flag.
    device_rang: AtomicBool,
    /// Whether `dropped` may have slots for the engine to complete.
    has_dropped: AtomicBool,
    /// `None` once the engine was dropped, so that nobody completes dropped slots any more.
    dropped: Mutex<Option<Vec<DroppedSlot>>>,
    /// Whether a control handle wants `wait` to return.
    woken: AtomicBool,
    /// The number of skipped completions at which the submitter had no credit, no frame or no space,
    /// and the bit [`SHORT`]. 0: it lacks nothing. Only a submitter whose writes skip success sets it,
    /// because what others lack comes back by reaping.
    shortage: AtomicU64,
    /// The number of `CANCEL_ALL` requests made so far, and how many of them are done. They wrap.
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
            wanted: AtomicU64::new(0),
            coalesce: AtomicU64::new(0),
            state: AtomicU64::new(OPEN),
            requests: AtomicU32::new(0),
            device_rang: AtomicBool::new(false),
            has_dropped: AtomicBool::new(false),
            dropped: Mutex::new(Some(Vec::with_capacity(depth))),
            woken: AtomicBool::new(false),
            shortage: AtomicU64::new(0),
            cancels: [0, 0].map(AtomicU32::new),
            counters: RingCounters::default(),
        }
    }

    /// Closes the ring for `why`. If it is closed already, the first reason stays.
    pub(crate) fn close(&self, why: CloseReason) {
        let code = match why {
            CloseReason::Stopped => STOPPED,
            CloseReason::DevicePanicked => PANICKED,
            CloseReason::Failed(status) => FAILED | u64::from(status.to_raw()),
        };
        // Release: pairs with the Acquires in `is_open`, `is_closed` and `why_closed`. A thread that
        // sees the reason sees what this thread wrote before.
        //
        // Relaxed for the failure: the earlier reason is not looked at.
        let mut seen = OPEN;
        while matches!(seen, OPEN | DRAINING)
            && let Err(state) =
                self.state.compare_exchange(seen, code, Ordering::Release, Ordering::Relaxed)
        {
            seen = state;
        }
    }

    /// Refuses submissions from now on, until [`resume`](Self::resume). Does nothing to a closed ring.
    pub(crate) fn start_draining(&self) {
        // Release: pairs with the Acquire in `is_draining`. Relaxed for the failure: a closed ring
        // stays closed.
        let (done, refused) = (Ordering::Release, Ordering::Relaxed);
        let _ = self.state.compare_exchange(OPEN, DRAINING, done, refused);
        self.request(request::LOOK);
    }

    /// Ends [`start_draining`](Self::start_draining).
    pub(crate) fn resume(&self) {
        // Release: pairs with the Acquires in `is_open` and `is_draining`. Relaxed for the failure: a
        // closed ring stays closed.
        let (done, refused) = (Ordering::Release, Ordering::Relaxed);
        let _ = self.state.compare_exchange(DRAINING, OPEN, done, refused);
        self.request(request::LOOK);
    }

    /// Whether submissions are refused until [`resume`](Self::resume).
    pub(crate) fn is_draining(&self) -> bool {
        // Acquire: pairs with the Releases in `start_draining` and `resume`.
        self.state.load(Ordering::Acquire) == DRAINING
    }

    /// Whether the owner of the reaping half drives the engine, from the beginning.
    #[inline]
    pub(crate) fn is_inline(&self) -> bool {
        matches!(self.bell.parker(), RingPark::Inline(_))
    }

    /// Whether the ring takes submissions.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        // Acquire: pairs with the Releases in `close` and `resume`.
        self.state.load(Ordering::Acquire) == OPEN
    }

    /// Whether the ring is closed for good.
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        // Acquire: pairs with the Release in `close`.
        !matches!(self.state.load(Ordering::Acquire), OPEN | DRAINING)
    }

    /// Why the ring is closed. `None` if it is not.
    #[cold]
    #[inline(never)]
    pub(crate) fn why_closed(&self) -> Option<CloseReason> {
        // Acquire: pairs with the Release in `close`.
        match self.state.load(Ordering::Acquire) {
            OPEN | DRAINING => None,
            STOPPED => Some(CloseReason::Stopped),
            PANICKED => Some(CloseReason::DevicePanicked),
            failed => Some(CloseReason::Failed(Status::from_raw(failed as u32))),
        }
    }

    /// Wakes the engine if it sleeps, whether the poller or the reaping half has it. Returns
    /// whether it slept.
    #[inline]
    pub(crate) fn ring_engine(&self) -> bool {
        let rang = self.bell.ring();
        if rang && self.is_closed() {
            // The poller may have handed the engine to the reaping half, which sleeps on its own
            // bell too. We see that the ring is closed: the Acquire in `ring_if` pairs with the
            // Release in the `arm` by which the reaping half put the engine to sleep, and the ring
            // was closed before.
            self.cq_bell.ring();
        }
        rang
    }

    /// Rings for a submission, after it was published. With `oneself`, the submitting thread also
    /// drives the engine.
    #[inline]
    pub(crate) fn ring_doorbell(&self, oneself: bool) {
        let rang = if oneself { self.bell.ring_oneself() } else { self.ring_engine() };
        if rang {
            self.counters.doorbells.add(1);
        }
    }

    /// Requests the actions of `bits` ([`request`]) from the engine, and wakes it.
    pub(crate) fn request(&self, bits: u32) {
        // Release: pairs with the Acquire in `take_requests`. An engine that sees the request also
        // sees the submissions that were published before it.
        self.requests.fetch_or(bits, Ordering::Release);
        self.ring_engine();
        // The owner of an inline ring sleeps on both bells at once.
        if self.is_inline() {
            self.cq_bell.ring();
        }
    }

    /// Takes all requests.
    #[inline]
    pub(crate) fn take_requests(&self) -> u32 {
        if self.requests.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        // Acquire: pairs with the Releases in `request` and in `SubmissionQueue::submit_cancel`.
        // The Relaxed load above only saves the exchange.
        self.requests.swap(0, Ordering::Acquire)
    }

    /// Called by the device when there may be packets.
    pub(crate) fn ring_from_device(&self) {
        // Release: pairs with the Acquire in `take_device_rang`.
        self.device_rang.overwrite(true, Ordering::Release);
        self.ring_engine();
    }

    /// Takes the flag that the device sets.
    #[inline]
    pub(crate) fn take_device_rang(&self) -> bool {
        // Acquire: pairs with the Release in `ring_from_device`. The Relaxed load only saves the
        // exchange.
        self.device_rang.load(Ordering::Relaxed) && self.device_rang.swap(false, Ordering::Acquire)
    }

    /// Whether anything other than a submission waits for the engine. Called after the fence in
    /// `arm`, so Relaxed loads are enough: what is found is acquired when it is taken.
    pub(crate) fn has_requests(&self) -> bool {
        self.requests.load(Ordering::Relaxed) != 0
            || self.device_rang.load(Ordering::Relaxed)
            || self.has_dropped.load(Ordering::Relaxed)
            || self.wants_clock()
    }

    /// Takes over a slot that the device dropped. Without an engine the slot returns to its pool.
    pub(crate) fn slot_dropped(&self, slot: DroppedSlot) {
        match &mut *lock(&self.dropped) {
            Some(dropped) => {
                dropped.push(slot);
                // Under the lock, so that the flag is never set for a slot that was taken already.
                // Relaxed: the lock hands the slot over. That the engine sees the flag before it
                // sleeps is the doorbell's doing.
                self.has_dropped.store(true, Ordering::Relaxed);
            }
            // Dropped behind the lock, which is not on any packet's way.
            None => return drop(slot),
        }
        self.ring_engine();
    }

    #[inline]
    pub(crate) fn has_dropped(&self) -> bool {
        self.has_dropped.load(Ordering::Relaxed)
    }

    /// Swaps the dropped slots into `empty`.
    pub(crate) fn take_dropped(&self, empty: &mut Vec<DroppedSlot>) {
        // Cleared first: a slot that comes after the look at the list sets it again. Relaxed: if this
        // store comes after the one in `slot_dropped`, so does the lock below.
        self.has_dropped.store(false, Ordering::Relaxed);
        if let Some(dropped) = &mut *lock(&self.dropped) {
            std::mem::swap(dropped, empty);
        }
    }

    /// The engine is gone: slots that are dropped from now on return to their pool.
    pub(crate) fn refuse_dropped(&self) {
        let dropped = lock(&self.dropped).take();
        drop(dropped);
    }

    /// A control handle asks `wait`, or an armed descriptor or waker, to return.
    pub(crate) fn wake_reaper(&self) {
        // Release: pairs with the Acquire in `take_woken`. The thread that returns from `wait` sees what
        // this thread wrote before.
        self.woken.overwrite(true, Ordering::Release);
        self.notify();
    }

    /// Whether a control handle has asked since the last `take_woken`. Called after the fence in `arm`, so
    /// a Relaxed load is enough: `take_woken` acquires.
    pub(crate) fn is_woken(&self) -> bool {
        self.woken.load(Ordering::Relaxed)
    }

    /// Whether a control handle has asked since the last call.
    pub(crate) fn take_woken(&self) -> bool {
        // Acquire: pairs with the Release in `wake_reaper`. The Relaxed load only saves the exchange.
        self.woken.load(Ordering::Relaxed) && self.woken.swap(false, Ordering::Acquire)
    }

    /// Says that a submit was refused when `skipped` completions were skipped. When the count moves
    /// on, the `wait` or the arming of the reaper ends. `now` returns the count.
    #[cold]
    pub(crate) fn report_shortage(&self, skipped: u32, now: impl FnOnce() -> u32) {
        // Relaxed: the word hands over no data. The fence in `ring_if` pairs with its own in the
        // engine, which publishes the count and then looks at this word, and with the fence in `arm`.
        // Of any two of submitter, engine and reaper, the one whose fence comes last sees what the
        // other has stored. So whichever of the three comes last sees the shortage, the new count
        // and the armed bell.
        self.shortage.overwrite(SHORT | u64::from(skipped), Ordering::Relaxed);
        self.cq_bell.ring_if(|| now() != skipped);
    }

    /// Whether the submitter lacked something, and a completion was skipped since. Called after a
    /// fence, as [`report_shortage`](Self::report_shortage) says, so a Relaxed load is enough.
    pub(crate) fn is_shortage_over(&self, skipped: u32) -> bool {
        let shortage = self.shortage.load(Ordering::Relaxed);
        shortage != 0 && shortage as u32 != skipped
    }

    /// As [`is_shortage_over`](Self::is_shortage_over), and if so, forgets the shortage.
    pub(crate) fn take_shortage_over(&self, skipped: u32) -> bool {
        let shortage = self.shortage.load(Ordering::Relaxed);
        let over = shortage != 0 && shortage as u32 != skipped;
        if over {
            // Fails if the submitter has reported another meanwhile, which stays. Relaxed: the word
            // hands over no data.
            let relaxed = Ordering::Relaxed;
            let _ = self.shortage.compare_exchange(shortage, 0, relaxed, relaxed);
        }
        over
    }

    /// Requests that everything in flight is cancelled. Returns the number of the request, for
    /// [`are_cancelled`](Self::are_cancelled).
    pub(crate) fn request_cancel_all(&self) -> u32 {
        // Relaxed: the Release in `request` publishes it.
        let asked = self.cancels[0].fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        self.request(request::CANCEL_ALL);
        asked
    }

    /// Returns how many `CANCEL_ALL` requests were made. The engine calls this before it cancels.
    pub(crate) fn cancels_requested(&self) -> u32 {
        // Relaxed: the Acquire in `take_requests` has made the number of each taken request
        // visible.
        self.cancels[0].load(Ordering::Relaxed)
    }

    /// Says that the `CANCEL_ALL` requests up to number `asked` are done, and their completions
    /// published.
    pub(crate) fn mark_cancels_done(&self, asked: u32) {
        // Release: pairs with the Acquire in `are_cancelled`. A reaper that sees the number sees
        // the completions at its next look.
        self.cancels[1].store(asked, Ordering::Release);
        self.notify();
    }

    /// Whether the `CANCEL_ALL` request of number `asked` is done.
    pub(crate) fn are_cancelled(&self, asked: u32) -> bool {
        // Acquire: pairs with the Release in `mark_cancels_done`.
        self.cancels[1].load(Ordering::Acquire).wrapping_sub(asked) < 1 << 31
    }

    /// Wakes the reaper if it sleeps and what it waits for has come. Returns whether it did.
    ///
    /// `index` is the CQ's tail, and `skipped` the number of skipped completions; both are published.
    /// `submitted` returns the SQ's tail.
    #[inline]
    pub(crate) fn notify_if_due(
        &self,
        index: u32,
        skipped: u32,
        submitted: impl FnOnce() -> u32,
    ) -> bool {
        self.cq_bell.ring_if(|| {
            // Relaxed: stored in `arm_bells` before the Release in `arm`, which pairs with the
            // Acquire in `ring_if`.
            let wanted = self.wanted.load(Ordering::Relaxed);
            // All three are exact. In the second, each submission has ended in a completion or
            // without one. If the submitter goes on meanwhile, the engine takes that submission
            // later, and comes here again when it has ended.
            index.wrapping_sub(wanted as u32) < 1 << 31
                || (wanted & UNTIL_THE_END != 0 && index.wrapping_add(skipped) == submitted())
                || self.is_shortage_over(skipped)
        })
    }

    /// Wakes the reaper if it sleeps, however many completions it waits for.
    pub(crate) fn notify(&self) {
        self.cq_bell.ring();
    }

    /// Whether the last arming of the reaper has set a delay.
    #[inline]
    pub(crate) fn wants_coalescing(&self) -> bool {
        self.coalesce.load(Ordering::Relaxed) != 0
    }

    /// Whether the engine must start the clock of the reaper's delay now.
    pub(crate) fn wants_clock(&self) -> bool {
        // The bit is set by `arm_after` if completions wait already when it arms, because the
        // engine may publish no other that would start the clock. Relaxed: `coalescing` acquires
        // it.
        self.coalesce.load(Ordering::Relaxed) & START_CLOCK != 0
    }

    /// Returns the delay that a sleeping reaper has set, and the number of the arming that set it,
    /// because each arming has a clock of its own. `None` if it has set none, or does not sleep.
    pub(crate) fn coalescing(&self) -> Option<(u64, Duration)> {
        let mut delay = self.coalesce.load(Ordering::Relaxed);
        if delay & START_CLOCK != 0 {
            // Cleared in any case, because with the bit set the engine never sleeps. The value that
            // counts is the one of which the bit was cleared: a newer arming may have stored its own
            // since the load.
            //
            // Acquire: pairs with the fence in `arm`, after which `arm_bells` sets the bit. So the
            // look at the bell below sees it armed.
            delay = self.coalesce.fetch_and(!START_CLOCK, Ordering::Acquire) & !START_CLOCK;
        }
        if delay == 0 || !self.cq_bell.is_armed() {
            return None;
        }
        Some((delay >> DELAY_BITS, Duration::from_micros(delay & DELAY_MAX_US)))
    }
}

/// In `RingShared::wanted`: the reaper also waits for the moment at which nothing is in flight.
pub(crate) const UNTIL_THE_END: u64 = 1 << 32;

/// In `RingShared::shortage`: the submitter lacks something.
const SHORT: u64 = 1 << 32;

// The format of `RingShared::coalesce`: the bit `START_CLOCK`, 23 bits of the number of the arming,
// and 40 bits of microseconds (up to twelve days).
pub(crate) const START_CLOCK: u64 = 1 << 63;
pub(crate) const DELAY_BITS: u32 = 40;
pub(crate) const DELAY_MAX_US: u64 = (1 << DELAY_BITS) - 1;

/// An entry whose slot the device dropped without completing it.
#[derive(Debug)]
pub(crate) struct DroppedSlot {
    pub(crate) buffer: Buffer,
    pub(crate) user_data: u64,
    pub(crate) class: Class,
}

/// The rings of the process by number. A dropped slot finds its ring here, or finds that the ring
/// is gone. The lock is taken when a ring is built or dropped, and when a device drops a slot, so
/// never in the path of a packet.
#[derive(Default)]
struct Registry {
    rings: HashMap<u32, Weak<RingShared>>,
    /// The number that was given last.
    last: u32,
}

fn registry() -> MutexGuard<'static, Registry> {
    // Not through the door of `crate::sync`: it outlives every run of a model, and no atomic is touched
    // while it is locked.
    static REGISTRY: OnceLock<std::sync::Mutex<Registry>> = OnceLock::new();
    let registry = REGISTRY.get_or_init(Default::default);
    registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The greatest number of a ring. A slot has its ring's number and three flags in 32 bits.
pub(crate) const LAST_RING_NUMBER: u32 = u32::MAX >> 3;

/// Returns a number for a ring that is being built. No ring has number 0, which a wrapper's
/// [`PollContext`](crate::device::PollContext) has.
pub(crate) fn new_ring_number() -> u32 {
    let mut registry = registry();
    loop {
        registry.last = registry.last.wrapping_add(1) & LAST_RING_NUMBER;
        // After 2^29 rings the numbers start again, and some may still be in use.
        if registry.last != 0 && !registry.rings.contains_key(&registry.last) {
            return registry.last;
        }
    }
}

/// Makes a ring known by its number.
pub(crate) fn register(shared: &Arc<RingShared>) {
    registry().rings.insert(shared.number, Arc::downgrade(shared));
}

fn deregister(number: u32) {
    registry().rings.remove(&number);
}

/// Gives a slot that the device dropped to the ring of number `ring`, which may have a slot's other
/// bit. It is masked here, because the compiler inlines the drop of a slot, and keeps slots in
/// registers then, only while that drop is short.
#[cold]
pub(crate) fn report_dropped(ring: u32, slot: DroppedSlot) {
    let ring = ring & LAST_RING_NUMBER;
    let shared = registry().rings.get(&ring).and_then(Weak::upgrade);
    match shared {
        Some(shared) => shared.slot_dropped(slot),
        // The ring is gone, so the frame returns to its pool.
        None => drop(slot),
    }
}
