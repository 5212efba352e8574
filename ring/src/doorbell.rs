//! The doorbell: who sleeps, who wakes, and why no wake-up is lost.
//!
//! One side (the *sleeper*) runs out of work and wants to stop using the processor; the other side
//! (a *ringer*, of which there may be many) publishes work and must wake it, but must not pay a
//! system call while it is awake. Both do a store followed by a load of what the other stored:
//!
//! | sleeper                               | ringer                                   |
//! |---------------------------------------|------------------------------------------|
//! | 1. `asleep = 1`                       | a. publish work (a Release store)        |
//! | 2. `fence(SeqCst)`                    | b. `fence(SeqCst)`                       |
//! | 3. look for work; found: stay awake   | c. read `asleep`; 0: nothing to do       |
//! | 4. park                               | d. `asleep` 1 -> 0, then unpark          |
//!
//! The two fences are totally ordered. If the sleeper's fence comes first, the ringer's read at (c)
//! sees the store of (1) and wakes it. If the ringer's fence comes first, the sleeper's look at (3)
//! sees the work of (a) and does not park. There is no third case, so no wake-up is lost. The
//! exchange at (d) lets exactly one of several ringers pay for the wake-up.
//!
//! How a thread parks is a parameter ([`Park`]): an operating-system primitive in `vmring`, a bit
//! in a poller's ready set for a ring that shares a thread with others, a model of either under
//! loom. A `Park` must remember one `unpark` that comes before its `park` (step d may overtake
//! step 4), as `std::thread::park` does.

use crate::sync::{AtomicU32, Ordering, fence};
use core::fmt;
use core::time::Duration;
use crossbeam_utils::CachePadded;

/// How the sleeper gives up the processor, and how a ringer gives it back.
pub trait Park {
    /// Blocks until [`unpark`](Park::unpark) or until `timeout` has passed (`None`: for ever). An
    /// `unpark` that came before makes it return at once. May return early for no reason.
    fn park(&self, timeout: Option<Duration>);

    /// Ends the current `park`, or the next one if none is under way.
    fn unpark(&self);
}

impl<P: Park + ?Sized> Park for alloc::sync::Arc<P> {
    fn park(&self, timeout: Option<Duration>) {
        (**self).park(timeout);
    }

    fn unpark(&self) {
        (**self).unpark();
    }
}

/// A need-wakeup flag and the thing that wakes. See the [module](self) for the protocol.
pub struct Doorbell<P> {
    asleep: CachePadded<AtomicU32>,
    park: P,
}

impl<P> fmt::Debug for Doorbell<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbell").field("asleep", &self.is_armed()).finish_non_exhaustive()
    }
}

impl<P> Doorbell<P> {
    /// A doorbell whose sleeper is awake.
    pub fn new(park: P) -> Self {
        Self { asleep: CachePadded::new(AtomicU32::new(0)), park }
    }

    /// The thing that parks.
    pub fn parker(&self) -> &P {
        &self.park
    }

    /// Whether the sleeper has armed and nobody has rung since. A hint: it may change at once.
    pub fn is_armed(&self) -> bool {
        self.asleep.load(Ordering::Relaxed) != 0
    }
}

impl<P: Park> Doorbell<P> {
    /// Steps 1 and 2 of the sleeper. After this call it must look for work once more (step 3) and
    /// then either [`disarm`](Self::disarm) or park.
    pub fn arm(&self) {
        // Release: pairs with the Acquire in `ring_if`: what the sleeper wrote about its wishes.
        // A store would do. But loom lets a store and an exchange that race both come last, which no
        // exchange may, and then finds wake-ups lost that cannot be; and the fence costs more.
        self.asleep.swap(1, Ordering::Release);
        // Pairs with the fence in `ring`: either that ringer sees our store, or we see its work.
        fence(Ordering::SeqCst);
    }

    /// The sleeper is awake again: ringers stay silent. Returns false if a ringer was faster, in
    /// which case an `unpark` is under way and the next `park` may return early.
    pub fn disarm(&self) -> bool {
        // Relaxed: the sleeper reads the work itself with Acquire loads; this flag carries none.
        self.asleep.swap(0, Ordering::Relaxed) == 1
    }

    /// The sleeper's steps 1 to 4 in one: parks unless `has_work` finds something after arming.
    /// Returns whether it parked. When it returns the doorbell is disarmed.
    pub fn sleep(&self, timeout: Option<Duration>, has_work: impl FnOnce() -> bool) -> bool {
        self.arm();
        let parked = !has_work();
        if parked {
            self.park.park(timeout);
        }
        self.disarm();
        parked
    }

    /// The ringer's steps b to d, after it has published its work. Returns whether it had to wake
    /// the sleeper. Cannot fail.
    #[inline]
    pub fn ring(&self) -> bool {
        self.ring_if(|| true)
    }

    /// As [`ring`](Self::ring), but leaves the sleeper asleep unless `due` says that the published
    /// work is what it waits for. What the sleeper stored before [`arm`](Self::arm) is visible in
    /// `due`; if it arms anew with another wish, its own look (step 3) comes after.
    #[inline]
    pub fn ring_if(&self, due: impl FnOnce() -> bool) -> bool {
        // Pairs with the fence in `arm`: either we see `asleep`, or the sleeper sees our work.
        fence(Ordering::SeqCst);
        // Acquire: pairs with the Release in `arm`.
        self.asleep.load(Ordering::Acquire) != 0 && due() && self.wake()
    }

    /// As [`ring`](Self::ring), by the sleeper itself, which may have armed but does not sleep yet. It costs
    /// no fence: flag and work are of one thread, so its program order is enough.
    #[inline]
    pub fn ring_oneself(&self) -> bool {
        // Armed, and not so any more, it was rung by another, whose `unpark` is under way.
        self.is_armed() && self.wake()
    }

    #[cold]
    #[inline(never)]
    fn wake(&self) -> bool {
        // Relaxed: only decides who pays; the sleeper's Acquire loads of the work do the rest.
        let ours = self.asleep.swap(0, Ordering::Relaxed) == 1;
        if ours {
            self.park.unpark();
        }
        ours
    }
}
