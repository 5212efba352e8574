//! The lifecycle of an interface: which rings it has, and how it stops and restarts.
//!
//! A stop and a restart concern all rings of an interface. Each ring's engine must detach from the
//! device (drop its queue) before the device is stopped or restarted. After that, a caller that waits
//! applies what is pending; if none waits, the last engine to detach does. The state under the lock
//! says what is pending. A ring gets only a request to look ([`request::LOOK`]), and its engine asks
//! [`InterfaceShared::step`] what to do. So a request that comes late, twice, or to a ring that was
//! just built finds nothing to do, and any number of stops, restarts and builds may meet.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::config::Direction;
use crate::device::catch::{Panicked, catch_panic};
use crate::device::seam::Device;
use crate::error::{CloseReason, ConfigError, Error};
use crate::mailbox::{RingShared, request};
use crate::sync::{Condvar, Mutex};
use crate::sys::{after, lock, now};

pub(crate) const INTERFACE_BUSY: &str = "the interface is stopped, or in the middle of a stop or restart: wait for a restart to end, \
     or start another interface";
const INTERFACE_STOPPED: &str = "the interface is stopped for good: start another one";

/// A device and the rings on it.
pub(crate) struct InterfaceShared {
    pub(crate) device: Arc<dyn Device>,
    state: Mutex<LifecycleState>,
    /// The last engine has left what is pending to a caller that waits, or the rings were told what
    /// was applied.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct LifecycleState {
    rings: Vec<Weak<RingShared>>,
    readers: usize,
    writers: usize,
    /// Queues of the device that exist.
    attached: usize,
    /// Rings on pollers that are detached for a restart. What was submitted to them waits.
    detached: usize,
    /// What happens to the device when no queue is left.
    pending: PendingAction,
    /// The device is being stopped or restarted at this moment.
    applying: bool,
    /// Stops and restarts applied so far, and how the last one ended.
    applied: u64,
    outcome: Option<Arc<Error>>,
    /// How many of those that were applied the rings were told about. Callers wait for this, so that
    /// they find the rings told.
    announced: u64,
    stopped: bool,
    /// Callers that wait for a stop or a restart. While there is one, it applies what is pending, and
    /// the thread of the last engine does not.
    waiting: usize,
}

impl LifecycleState {
    /// Whether something is pending that can be applied now.
    fn can_apply(&self) -> bool {
        self.attached == 0 && !self.applying && self.pending != PendingAction::Nothing
    }

    /// Whether an engine may attach.
    fn is_free(&self) -> bool {
        !self.applying && !self.stopped && self.pending == PendingAction::Nothing
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum PendingAction {
    #[default]
    Nothing,
    Restart,
    Stop,
}

/// What an engine has to do for its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing.
    Stay,
    /// Detach, and wait until it may attach again.
    Detach,
    /// Try to attach.
    Attach,
    /// Close for good.
    Close,
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
        // The interface and all its rings are gone.
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

    /// Takes one of the places that the device has for rings of this direction.
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

    /// Adds a ring to those that get [`request::LOOK`]. The caller does this before the ring's
    /// engine attaches, so that the engine misses no request.
    pub(crate) fn add(&self, ring: &Arc<RingShared>) {
        let mut state = lock(&self.state);
        state.rings.retain(|ring| ring.strong_count() > 0);
        state.rings.push(Arc::downgrade(ring));
    }

    /// Returns what an engine has to do. `detached` says that it is detached and is to attach again.
    pub(crate) fn step(&self, detached: bool) -> Step {
        let state = lock(&self.state);
        if state.stopped || state.pending == PendingAction::Stop {
            Step::Close
        } else if !detached {
            if state.pending == PendingAction::Restart { Step::Detach } else { Step::Stay }
        } else if !state.is_free() {
            Step::Stay
        } else if state.outcome.is_some() {
            // The restart for which it detached has failed.
            Step::Close
        } else {
            Step::Attach
        }
    }

    /// Attaches an engine, which asks the device for a queue afterwards. Returns false while the
    /// device is to be stopped or restarted, which waits until no queue exists. When that is over,
    /// [`apply_pending`](Self::apply_pending) requests LOOK from all rings.
    pub(crate) fn try_attach(&self) -> bool {
        let mut state = lock(&self.state);
        let free = state.is_free();
        state.attached += usize::from(free);
        free
    }

    /// Detaches an engine, which has dropped its queue. When no engine is attached any more, what is
    /// pending is applied: by a caller that waits for it, or by this thread if none waits.
    ///
    /// A stop or a restart may take long, and this thread may be a poller's, which drives other rings
    /// too, or an executor's.
    pub(crate) fn detach(&self) {
        let mut state = lock(&self.state);
        state.attached -= 1;
        if state.waiting > 0 {
            drop(state);
            self.changed.notify_all();
        } else {
            drop(state);
            self.apply_pending();
        }
    }

    /// Says that a ring on a poller is about to detach for a restart. A stop then also waits for its
    /// [`leave_detached`](Self::leave_detached), because its entries complete only when its engine has
    /// looked. The owner of an inline ring drives the engine before it reaps, so nobody waits for that.
    pub(crate) fn enter_detached(&self) {
        lock(&self.state).detached += 1;
    }

    /// Says that a ring which was detached has attached again, or that it is closed and everything that
    /// waited has completed.
    pub(crate) fn leave_detached(&self) {
        lock(&self.state).detached -= 1;
        self.changed.notify_all();
    }

    /// Requests from every ring's engine that it asks [`step`](Self::step). If the interface is
    /// stopped, every ring is closed afterwards, also one that was detached for a restart and whose
    /// engine has not looked yet.
    fn notify_rings(&self) {
        // The rings are told after the lock is released, because ringing may run somebody's waker.
        let (rings, stopped) = {
            let state = lock(&self.state);
            let rings: Vec<_> = state.rings.iter().filter_map(Weak::upgrade).collect();
            (rings, state.stopped)
        };
        for ring in rings {
            if stopped {
                // No engine attaches any more. An engine that closed for another reason has said so
                // before it detached, and the first reason stays.
                ring.close(CloseReason::Stopped);
            }
            ring.request(request::LOOK);
        }
    }

    /// Stops or restarts the device, if that is pending and no queue is left.
    fn apply_pending(&self) {
        loop {
            let action = {
                let mut state = lock(&self.state);
                if !state.can_apply() {
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
            let mut state = lock(&self.state);
            state.applying = false;
            if action == PendingAction::Stop {
                state.stopped = true;
                // A restart that was asked for meanwhile came too late.
                state.pending = PendingAction::Nothing;
            }
            state.applied += 1;
            let applied = state.applied;
            state.outcome = outcome.err().map(Arc::new);
            drop(state);
            self.notify_rings();
            // Another thread may have applied a later one and told the rings of both.
            let mut state = lock(&self.state);
            state.announced = state.announced.max(applied);
            drop(state);
            self.changed.notify_all();
            // The loop looks again, because another stop or restart may be pending by now.
        }
    }

    fn request_and_wait(&self, action: PendingAction, timeout: Duration) -> Result<(), Error> {
        let stopped = || Err(ConfigError::Invalid(INTERFACE_STOPPED.to_owned()).into());
        let deadline = after(timeout);
        let mut state = lock(&self.state);
        let late = state.stopped;
        // A stop overrides a restart that waits; a second restart joins it.
        if !late && state.pending != PendingAction::Stop {
            state.pending = action;
        }
        // The one that is being applied does not count: ours comes after it.
        let ours = state.applied + 1 + u64::from(state.applying);
        state.waiting += 1;
        drop(state);
        self.notify_rings();
        let mut state = lock(&self.state);
        let answer = loop {
            // This comes before the answer, because the last engine may have left it to us, also for
            // another caller that has given up waiting.
            if state.can_apply() {
                drop(state);
                self.apply_pending();
                state = lock(&self.state);
                continue;
            }
            // Nothing is applied after a stop, so the stop is announced when all are.
            let stop_announced = state.stopped && state.announced == state.applied;
            if action == PendingAction::Restart && stop_announced {
                // A stop has overridden it, or has followed.
                break stopped();
            }
            let all_visible = action == PendingAction::Restart || state.detached == 0;
            if (state.announced >= ours || stop_announced) && all_visible {
                break match &state.outcome {
                    Some(error) if !late => Err(Error::Device(error.clone())),
                    _ => Ok(()),
                };
            }
            let left = deadline.saturating_duration_since(now());
            if left.is_zero() {
                let (action, rings) = match action {
                    PendingAction::Stop => ("stop", state.attached + state.detached),
                    _ => ("restart", state.attached),
                };
                break Err(Error::StopTimeout { action, rings, timeout });
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        };
        // This is done under the lock under which nothing was found to apply. So what is pending from
        // here on is applied by another caller that waits, or by the last engine.
        state.waiting -= 1;
        answer
    }

    pub(crate) fn stop(&self, timeout: Duration) -> Result<(), Error> {
        self.request_and_wait(PendingAction::Stop, timeout)
    }

    pub(crate) fn restart(&self, timeout: Duration) -> Result<(), Error> {
        self.request_and_wait(PendingAction::Restart, timeout)
    }
}

/// The permit of one ring: its place among the rings that the device can serve.
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
