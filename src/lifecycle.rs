//! The life of an interface: which rings it may have, and how it stops and restarts.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::config::Direction;
use crate::device::catch::{Panicked, catch_panic};
use crate::device::seam::Device;
use crate::error::{ConfigError, Error};
use crate::mailbox::{RingShared, request};
use crate::sys::{after, lock};

/// The message of the error for a ring that cannot be built now.
pub(crate) const INTERFACE_BUSY: &str = "the interface is stopped, or in the middle of a restart";

/// A device and the rings on it. It hands out permits for rings, and stops or restarts the device
/// when no queue of it is left.
pub(crate) struct InterfaceShared {
    pub(crate) device: Arc<dyn Device>,
    state: Mutex<LifecycleState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct LifecycleState {
    rings: Vec<Weak<RingShared>>,
    readers: usize,
    writers: usize,
    /// The number of the device's queues that exist.
    attached: usize,
    /// What to do with the device when no queue is left.
    pending: PendingAction,
    /// Whether the device is being stopped or restarted at this moment.
    applying: bool,
    /// The number of stops and restarts so far.
    applied: u64,
    /// How the last of them failed, if it did.
    outcome: Option<Arc<Error>>,
    stopped: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum PendingAction {
    #[default]
    Nothing,
    Restart,
    Stop,
}

impl fmt::Debug for InterfaceShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterfaceShared")
            .field("device", &self.device.name())
            .finish_non_exhaustive()
    }
}

impl Drop for InterfaceShared {
    fn drop(&mut self) {
        // The interface and all its rings were dropped.
        if lock(&self.state).stopped {
            return;
        }
        match catch_panic(|| self.device.stop()) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the device did not stop cleanly"),
            Err(Panicked) => tracing::error!("the device panicked while it was stopped"),
        }
    }
}

impl InterfaceShared {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        Self { device, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Takes a permit for a ring of `direction`.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`] while the interface is stopped or restarts, [`Error::TooManyRings`]
    /// if the device has as many rings of this direction as it can serve.
    pub(crate) fn acquire(self: &Arc<Self>, direction: Direction) -> Result<RingPermit, Error> {
        let caps = self.device.capabilities();
        let mut state = lock(&self.state);
        if state.stopped || state.pending != PendingAction::Nothing {
            return Err(ConfigError::Invalid(INTERFACE_BUSY.to_owned()).into());
        }
        let too_many = |direction, limit| Error::TooManyRings {
            device: self.device.name().to_owned(),
            direction,
            limit,
        };
        if direction.reads() && state.readers >= caps.reading_rings {
            return Err(too_many("reading", caps.reading_rings));
        }
        if direction.writes() && state.writers >= caps.writing_rings {
            return Err(too_many("writing", caps.writing_rings));
        }
        state.readers += usize::from(direction.reads());
        state.writers += usize::from(direction.writes());
        drop(state);
        Ok(RingPermit { interface: self.clone(), direction })
    }

    /// Adds a ring, which gets the requests of a stop or a restart from then on.
    pub(crate) fn add(&self, ring: &Arc<RingShared>) {
        let mut state = lock(&self.state);
        state.rings.retain(|ring| ring.strong_count() > 0);
        state.rings.push(Arc::downgrade(ring));
    }

    /// Counts the queue that an engine is about to ask the device for. Returns false while the
    /// device is to be stopped or restarted, which waits until no queue exists. After a restart
    /// every ring is requested to ask again.
    pub(crate) fn try_attach(&self) -> bool {
        let mut state = lock(&self.state);
        let free = !state.applying && !state.stopped && state.pending == PendingAction::Nothing;
        state.attached += usize::from(free);
        free
    }

    /// Counts an engine's queue as gone. If it was the last one, carries out the pending stop or
    /// restart.
    pub(crate) fn detach(&self) {
        lock(&self.state).attached -= 1;
        self.apply_pending();
    }

    /// Makes a request of every ring.
    fn request(&self, bits: u32) {
        // After the lock is released, because ringing may run the code of a waker.
        let rings: Vec<_> = lock(&self.state).rings.iter().filter_map(Weak::upgrade).collect();
        for ring in rings {
            ring.request(bits);
        }
    }

    /// Stops or restarts the device, if that is pending and no queue is left.
    fn apply_pending(&self) {
        let action = {
            let mut state = lock(&self.state);
            if state.attached > 0 || state.applying || state.pending == PendingAction::Nothing {
                return;
            }
            state.applying = true;
            std::mem::take(&mut state.pending)
        };
        let outcome = match action {
            PendingAction::Nothing => return,
            PendingAction::Restart => catch_panic(|| self.device.restart()),
            PendingAction::Stop => catch_panic(|| self.device.stop()),
        };
        let outcome = outcome.unwrap_or_else(|_| {
            Err(Error::Io {
                what: "stopping the device",
                source: std::io::Error::other("the device panicked"),
            })
        });
        let failed = outcome.is_err();
        let mut state = lock(&self.state);
        state.applying = false;
        state.stopped |= action == PendingAction::Stop;
        state.applied += 1;
        state.outcome = outcome.err().map(Arc::new);
        // Another stop or restart may have been requested meanwhile.
        let again = state.pending != PendingAction::Nothing;
        drop(state);
        self.changed.notify_all();
        match action {
            PendingAction::Restart if failed => self.request(request::STOP),
            PendingAction::Restart => self.request(request::REOPEN),
            _ => {}
        }
        if again {
            self.apply_pending();
        }
    }

    /// Makes `action` pending, requests `bits` of every ring, and waits up to `timeout` until the
    /// action was carried out.
    fn request_and_wait(
        &self,
        action: PendingAction,
        bits: u32,
        timeout: Duration,
    ) -> Result<(), Error> {
        let deadline = after(timeout);
        let mut state = lock(&self.state);
        if state.stopped {
            return match action {
                PendingAction::Stop => Ok(()),
                _ => Err(ConfigError::Invalid("the interface is stopped".to_owned()).into()),
            };
        }
        // A stop overrides a pending restart. A second restart joins the first.
        if state.pending != PendingAction::Stop {
            state.pending = action;
        }
        // An action that is being applied at this moment does not count: ours comes after it.
        let ours = state.applied + 1 + u64::from(state.applying);
        drop(state);
        self.request(bits);
        self.apply_pending();
        let mut state = lock(&self.state);
        loop {
            if state.applied >= ours || (action == PendingAction::Stop && state.stopped) {
                return match &state.outcome {
                    None => Ok(()),
                    Some(error) => Err(Error::Device(error.clone())),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout(timeout));
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
    }

    pub(crate) fn stop(&self, timeout: Duration) -> Result<(), Error> {
        self.request_and_wait(PendingAction::Stop, request::STOP, timeout)
    }

    pub(crate) fn restart(&self, timeout: Duration) -> Result<(), Error> {
        self.request_and_wait(PendingAction::Restart, request::DETACH, timeout)
    }
}

/// The permission to have a ring on a device. Dropping it lets another ring take its place.
pub(crate) struct RingPermit {
    interface: Arc<InterfaceShared>,
    direction: Direction,
}

impl Drop for RingPermit {
    fn drop(&mut self) {
        let mut state = lock(&self.interface.state);
        state.readers -= usize::from(self.direction.reads());
        state.writers -= usize::from(self.direction.writes());
    }
}

impl fmt::Debug for RingPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingPermit").field("direction", &self.direction).finish_non_exhaustive()
    }
}
