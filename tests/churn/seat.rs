//! One ring, in one of its shapes, and what the model knows of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use vmring::{
    CompletionQueue, Error, Frame, Ring, RingControl, RingOp, SubmissionQueue, SubmitError,
    SubmitErrorKind,
};

use crate::churn::frontend::Front;
use crate::churn::lock;
use crate::churn::operation::Plan;

/// The next submission's number: no two of the process are the same.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

pub(crate) fn new_number() -> u64 {
    NUMBERS.fetch_add(1, Ordering::Relaxed)
}

/// What submits: a ring or its half.
pub(crate) trait Submits {
    fn alloc(&self) -> Option<Frame>;
    fn read(&mut self, frame: Frame, number: u64) -> Result<(), SubmitError>;
    fn write(&mut self, frame: Frame, number: u64) -> Result<(), SubmitError>;
    /// A write that skips success.
    fn write_only(&mut self, frame: Frame, number: u64) -> Result<(), SubmitError>;
    fn cancel(&mut self, target: Option<u64>, number: u64) -> Result<(), SubmitErrorKind>;
}

/// What reaps: a ring or its half.
pub(crate) trait Reaps {
    /// Hands everything that is there to `each`: number, kind, whether it went well.
    fn reap(&mut self, each: &mut dyn FnMut(u64, RingOp, bool));
    fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize;
    fn in_flight(&self) -> usize;
    fn arm(&mut self) -> bool;
    fn arm_waker(&mut self) -> bool;
    fn next_deadline(&self) -> Option<Instant>;
    fn cancel_and_wait(&mut self, timeout: Duration) -> Result<usize, Error>;
    fn drain(&mut self, timeout: Duration) -> Result<usize, Error>;
    fn resume(&mut self);
    fn close(&mut self) -> Result<(), Error>;
}

macro_rules! submits {
    ($($half:ty),*) => {$(
        impl Submits for $half {
            fn alloc(&self) -> Option<Frame> {
                self.alloc()
            }

            fn read(&mut self, frame: Frame, number: u64) -> Result<(), SubmitError> {
                self.submit_read(frame, number)
            }

            fn write(&mut self, frame: Frame, number: u64) -> Result<(), SubmitError> {
                self.submit_write(frame, number)
            }

            fn write_only(&mut self, frame: Frame, number: u64) -> Result<(), SubmitError> {
                self.submit_write_skip_success(frame, number)
            }

            fn cancel(&mut self, target: Option<u64>, number: u64) -> Result<(), SubmitErrorKind> {
                match target {
                    Some(target) => self.cancel(target, number),
                    None => self.cancel_all(number),
                }
            }
        }
    )*};
}

macro_rules! reaps {
    ($($half:ty),*) => {$(
        impl Reaps for $half {
            fn reap(&mut self, each: &mut dyn FnMut(u64, RingOp, bool)) {
                for done in self.reap() {
                    each(done.user_data, done.op, done.result.is_ok());
                }
            }

            fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
                self.wait(min, timeout)
            }

            fn in_flight(&self) -> usize {
                self.in_flight()
            }

            fn arm(&mut self) -> bool {
                self.arm()
            }

            fn arm_waker(&mut self) -> bool {
                self.poll_ready(&mut Context::from_waker(Waker::noop()), 1).is_pending()
            }

            fn next_deadline(&self) -> Option<Instant> {
                self.next_deadline()
            }

            fn cancel_and_wait(&mut self, timeout: Duration) -> Result<usize, Error> {
                self.cancel_and_wait(timeout)
            }

            fn drain(&mut self, timeout: Duration) -> Result<usize, Error> {
                self.drain(timeout)
            }

            fn resume(&mut self) {
                self.resume();
            }

            fn close(&mut self) -> Result<(), Error> {
                self.close()
            }
        }
    )*};
}

submits!(Ring, SubmissionQueue);
reaps!(Ring, CompletionQueue);

/// One ring. Any thread may use any part of it, one after the other.
pub(crate) struct Seat {
    pub(crate) plan: Plan,
    pub(crate) control: RingControl,
    whole: Mutex<Option<Ring>>,
    submitter: Mutex<Option<SubmissionQueue>>,
    reaper: Mutex<Option<CompletionQueue>>,
    pub(crate) front: Mutex<Option<Front>>,
    /// What was submitted and has not completed. Locked through each submit.
    pub(crate) ledger: Mutex<BTreeMap<u64, RingOp>>,
    /// The writes that skip success, and of which it is not known that they have ended. Locked after
    /// the ledger.
    pub(crate) skipping: Mutex<BTreeSet<u64>>,
    /// It drains, or will in a moment, or did a moment ago.
    pub(crate) drains: AtomicBool,
    /// Restarts of its device before it was built.
    pub(crate) restarts_before: u64,
}

impl Seat {
    pub(crate) fn new(plan: Plan, control: RingControl, restarts_before: u64) -> Self {
        Self {
            plan,
            control,
            whole: Mutex::default(),
            submitter: Mutex::default(),
            reaper: Mutex::default(),
            front: Mutex::default(),
            ledger: Mutex::default(),
            skipping: Mutex::default(),
            drains: AtomicBool::new(false),
            restarts_before,
        }
    }

    pub(crate) fn whole(plan: Plan, ring: Ring, restarts_before: u64) -> Self {
        let seat = Self::new(plan, ring.control(), restarts_before);
        *lock(&seat.whole) = Some(ring);
        seat
    }

    pub(crate) fn split(plan: Plan, ring: Ring, restarts_before: u64) -> Self {
        let seat = Self::new(plan, ring.control(), restarts_before);
        let (submitter, reaper) = ring.into_split();
        *lock(&seat.submitter) = Some(submitter);
        *lock(&seat.reaper) = Some(reaper);
        seat
    }

    pub(crate) fn submits<T>(&self, f: impl FnOnce(&mut dyn Submits) -> T) -> Option<T> {
        if let Some(ring) = &mut *lock(&self.whole) {
            return Some(f(ring));
        }
        lock(&self.submitter).as_mut().map(|half| f(half))
    }

    pub(crate) fn reaps<T>(&self, f: impl FnOnce(&mut dyn Reaps) -> T) -> Option<T> {
        if let Some(ring) = &mut *lock(&self.whole) {
            return Some(f(ring));
        }
        lock(&self.reaper).as_mut().map(|half| f(half))
    }

    /// As [`reaps`](Self::reaps), unless another thread has it.
    pub(crate) fn try_reaps<T>(&self, f: impl FnOnce(&mut dyn Reaps) -> T) -> Option<T> {
        if let Some(ring) = &mut *self.whole.try_lock().ok()? {
            return Some(f(ring));
        }
        self.reaper.try_lock().ok()?.as_mut().map(|half| f(half))
    }

    pub(crate) fn drop_submitter(&self) {
        let half = lock(&self.submitter).take();
        drop(half);
    }

    pub(crate) fn drop_reaper(&self) {
        let half = lock(&self.reaper).take();
        drop(half);
    }

    /// Takes what `reaper` has completed into the books. Returns how much it was.
    pub(crate) fn take_in(&self, reaper: &mut dyn Reaps) -> usize {
        let mut n = 0;
        reaper.reap(&mut |number, op, ok| {
            n += 1;
            let known = lock(&self.ledger).remove(&number);
            if known.is_none() && op == RingOp::Write && lock(&self.skipping).remove(&number) {
                assert!(!ok, "the success of {number} is to be skipped, and completes");
                return;
            }
            assert_eq!(known, Some(op), "{number} completes twice, or was never submitted");
        });
        n
    }

    pub(crate) fn in_flight(&self, kinds: &[RingOp]) -> Vec<u64> {
        let ledger = lock(&self.ledger);
        ledger.iter().filter(|(_, op)| kinds.contains(op)).map(|(number, _)| *number).collect()
    }

    /// Whether it has taken part in each restart of its device so far. One that is still detached has
    /// not been opened since the last.
    pub(crate) fn is_attached(&self, restarts: u64) -> bool {
        self.restarts_before + self.control.stats().restarts == restarts
    }

    /// What was done so far.
    pub(crate) fn activity(&self) -> Activity {
        let stats = self.control.stats();
        Activity {
            parks: stats.parks,
            notifications: stats.notifications,
            doorbells: self.control.doorbells(),
        }
    }
}

/// What an engine does not do while it sleeps.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Activity {
    parks: u64,
    notifications: u64,
    doorbells: u64,
}
