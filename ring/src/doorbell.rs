//! The doorbell: how one side sleeps, how the other wakes it, and why no wake-up is lost.
//!
//! One side (the *sleeper*) runs out of work and wants to stop using the processor. The other side
//! (a *ringer*; there may be many) publishes work and must wake the sleeper, but must not pay for a
//! system call while the sleeper is awake. Each side does a store and then a load of what the other
//! side stored:
//!
//! | sleeper                               | ringer                                   |
//! |---------------------------------------|------------------------------------------|
//! | 1. `asleep = 1`                       | a. publish work (a Release store)        |
//! | 2. `fence(SeqCst)`                    | b. `fence(SeqCst)`                       |
//! | 3. look for work; found: stay awake   | c. read `asleep`; 0: nothing to do       |
//! | 4. park                               | d. `asleep` 1 -> 0, then unpark          |
//!
//! The two fences are totally ordered. If the sleeper's fence comes first, the ringer's load at (c)
//! sees the store of (1), and the ringer wakes the sleeper. If the ringer's fence comes first, the
//! sleeper's look at (3) sees the work of (a), and the sleeper does not park. There is no third
//! case, so no wake-up is lost. The exchange at (d) lets exactly one of several ringers pay for the
//! wake-up.
//!
//! How a thread parks is a parameter ([`Park`]): an operating-system primitive in `vmring`, a bit
//! in a poller's ready set for a ring that shares a thread with others, and a model of either under
//! loom. Step (d) may overtake step (4), so a `Park` must remember one `unpark` that comes before
//! its `park`, as `std::thread::park` does.

use crate::sync::{AtomicU32, Ordering, fence};
use core::fmt;
use core::time::Duration;
use crossbeam_utils::CachePadded;

/// How the sleeper gives up the processor, and how a ringer gives it back.
pub trait Park {
    /// Blocks until [`unpark`](Park::unpark) is called or `timeout` has passed (`None`: for ever).
    /// If `unpark` was called before, returns at once. May return early for no reason.
    fn park(&self, timeout: Option<Duration>);

    /// Ends the current `park`, or the next one if the sleeper is not in `park`.
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

/// A need-wakeup flag and a [`Park`] that wakes the sleeper. See the [module](self) for the
/// protocol.
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

    /// The [`Park`] that this doorbell was made with.
    pub fn parker(&self) -> &P {
        &self.park
    }

    /// Whether the sleeper has armed and nobody has rung since. A hint: the answer may be out of
    /// date at once.
    pub fn is_armed(&self) -> bool {
        self.asleep.load(Ordering::Relaxed) != 0
    }
}

impl<P: Park> Doorbell<P> {
    /// Steps 1 and 2 of the sleeper. After this call the sleeper must look for work once more (step
    /// 3) and then either [`disarm`](Self::disarm) or park.
    pub fn arm(&self) {
        // Release: pairs with the Acquire in `ring_if`, whose `due` reads what the sleeper wrote
        // before about the work it waits for.
        // A store would be enough. But if a store and an exchange race, loom lets both come last in
        // the flag's order, which an exchange never may, and then reports lost wake-ups that cannot
        // happen. The exchange costs less than the fence below.
        self.asleep.swap(1, Ordering::Release);
        // Pairs with the fence in `ring_if`: either that ringer sees our store, or we see its work.
        fence(Ordering::SeqCst);
    }

    /// Says that the sleeper is awake again, so that ringers do not wake it. Returns false if a
    /// ringer was faster. In that case its `unpark` is on the way, and the next `park` may return
    /// early.
    pub fn disarm(&self) -> bool {
        // Relaxed: the flag hands over no data. The sleeper reads the work itself with Acquire
        // loads.
        self.asleep.swap(0, Ordering::Relaxed) == 1
    }

    /// The sleeper's steps 1 to 4 in one call: arms, and parks unless `has_work` finds something.
    /// Returns whether it parked. Afterwards the doorbell is disarmed.
    pub fn sleep(&self, timeout: Option<Duration>, has_work: impl FnOnce() -> bool) -> bool {
        self.arm();
        let parked = !has_work();
        if parked {
            self.park.park(timeout);
        }
        self.disarm();
        parked
    }

    /// The ringer's steps b to d, which follow the publishing of its work. Returns whether it had
    /// to wake the sleeper. Cannot fail.
    #[inline]
    pub fn ring(&self) -> bool {
        self.ring_if(|| true)
    }

    /// Like [`ring`](Self::ring), but wakes the sleeper only if `due` returns true, which means
    /// that the published work is what the sleeper waits for. `due` sees what the sleeper stored
    /// before it called [`arm`](Self::arm). If the sleeper arms again and waits for something else,
    /// its own look (step 3) comes after that.
    #[inline]
    pub fn ring_if(&self, due: impl FnOnce() -> bool) -> bool {
        // Pairs with the fence in `arm`: either we see `asleep`, or the sleeper sees our work.
        fence(Ordering::SeqCst);
        // Acquire: pairs with the Release in `arm`, so that `due` sees what the sleeper waits for.
        self.asleep.load(Ordering::Acquire) != 0 && due() && self.wake()
    }

    /// Like [`ring`](Self::ring), but called by the sleeper's own thread, which may have armed but
    /// does not sleep yet. It needs no fence, because one thread writes both the flag and the work,
    /// and program order is enough.
    #[inline]
    pub fn ring_oneself(&self) -> bool {
        // If the flag is already clear, another ringer cleared it, and its `unpark` is on the way.
        self.is_armed() && self.wake()
    }

    #[cold]
    #[inline(never)]
    fn wake(&self) -> bool {
        // Relaxed: this only decides which ringer wakes the sleeper. The sleeper reads the work
        // itself with Acquire loads.
        let ours = self.asleep.swap(0, Ordering::Relaxed) == 1;
        if ours {
            self.park.unpark();
        }
        ours
    }
}
