//! The reaping half: [`CompletionQueue`].

#[cfg(target_os = "linux")]
use std::cell::OnceCell;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use static_assertions::{assert_impl_all, assert_not_impl_any};
use vmring_core::CqConsumer;
use vmring_core::doorbell::Park;
use vmring_core::sync::Ordering;

use crate::device::seam::Capabilities;
use crate::engine::{Engine, Handoff};
use crate::error::{CloseReason, Error};
use crate::limits::{CANCEL_WAIT, CLOSE_POLL};
use crate::mailbox::{DELAY_BITS, DELAY_MAX_US, RingShared, START_CLOCK, request};
use crate::notify::Notifier;
use crate::policy::IdlePolicy;
use crate::poller::PollerShared;
use crate::ring::completion::Completion;
use crate::ring::control::RingControl;
use crate::stats::RingStats;
use crate::sys::{after, poll_in};

#[cfg(target_os = "linux")]
use crate::notify::EpollPair;

/// The reaping half of a ring. Dropping it closes the ring.
pub struct CompletionQueue {
    pub(super) consumer: CqConsumer,
    pub(crate) shared: Arc<RingShared>,
    notifier: Arc<Notifier>,
    /// Ours to turn: with `Drive::Inline`, or after the poller has handed it back.
    engine: Option<Box<Engine>>,
    /// Where the poller leaves the engine; `None` with `Drive::Inline`.
    remote: Option<(Arc<Handoff>, Arc<PollerShared>)>,
    idle: IdlePolicy,
    close_timeout: Duration,
    caps: Capabilities,
    /// The poller did not give the engine back at close.
    engine_lost: bool,
    /// A close has waited for the device in vain: the next does not wait again.
    waited: bool,
    /// Counts the times it has armed.
    armings: u64,
    /// Of an inline ring over a device that is a descriptor, if somebody has asked for one.
    #[cfg(target_os = "linux")]
    epoll: OnceCell<EpollPair>,
}

assert_impl_all!(CompletionQueue: Send);
assert_not_impl_any!(CompletionQueue: Sync, Clone);

impl CompletionQueue {
    #[allow(clippy::too_many_arguments)] // a private constructor, each argument a field
    pub(crate) fn new(
        consumer: CqConsumer,
        shared: Arc<RingShared>,
        notifier: Arc<Notifier>,
        engine: Option<Box<Engine>>,
        remote: Option<(Arc<Handoff>, Arc<PollerShared>)>,
        idle: IdlePolicy,
        close_timeout: Duration,
        caps: Capabilities,
    ) -> Self {
        let engine_lost = false;
        let (armings, waited) = (0, false);
        Self {
            consumer,
            shared,
            notifier,
            engine,
            remote,
            idle,
            close_timeout,
            caps,
            engine_lost,
            waited,
            armings,
            #[cfg(target_os = "linux")]
            epoll: OnceCell::new(),
        }
    }

    /// The completions that are there, oldest first. With `Drive::Inline` the device makes progress
    /// first. Never blocks.
    ///
    /// Each completion is retired as the iterator yields it; those not taken from the iterator stay
    /// for the next call.
    #[inline]
    pub fn reap(&mut self) -> Reap<'_> {
        self.refresh();
        Reap { consumer: &mut self.consumer }
    }

    /// Looks for completions that are to be reaped now.
    #[inline]
    pub(super) fn refresh(&mut self) {
        self.drive();
        self.consumer.ready();
        if self.engine.is_none() {
            self.consumer.prefetch();
        }
    }

    /// Completions that wait to be reaped.
    pub fn ready(&mut self) -> usize {
        self.drive();
        self.consumer.ready() as usize
    }

    /// Submissions not reaped yet. What another thread submits meanwhile may be missing.
    pub fn in_flight(&self) -> usize {
        self.consumer.in_flight() as usize
    }

    /// Sleeps until `min` completions wait, or as many as are in flight if those are fewer, or until
    /// `timeout` has passed (`None`: for ever) or [`RingControl::wake`] was called. Returns how
    /// many wait.
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
        let deadline = timeout.map(after);
        let mut round = 0;
        loop {
            let worked = self.drive();
            let ready = self.consumer.ready();
            let want = u32::try_from(min).unwrap_or(u32::MAX).min(self.consumer.in_flight());
            if ready >= want || self.take_woken() {
                return ready as usize;
            }
            if !worked && self.is_over() {
                // What is still in flight has leaked.
                return ready as usize;
            }
            if worked {
                round = 0;
                continue;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return ready as usize;
            }
            if self.idle.pause(round) {
                round += 1;
                continue;
            }
            self.sleep(want, deadline);
        }
    }

    /// With `Drive::Inline`: when to call [`reap`](Self::reap) or [`wait`](Self::wait) at the latest
    /// although the descriptor has not become readable, because a device that took no packets is to
    /// be tried again, or is polled for safety. `None`: no need.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.engine.as_ref().and_then(|engine| engine.deadline())
    }

    /// A descriptor for an event loop: after [`arm`](Self::arm) has returned true, it becomes readable
    /// when there are completions.
    ///
    /// The first call creates it: an eventfd on Linux, a pipe elsewhere. Before that call it costs
    /// nothing; afterwards it costs one signal per arming. With `Drive::Inline` over a device that
    /// itself is a descriptor, it is an epoll of both. [`AsFd`] and [`AsRawFd`] give the same
    /// descriptor.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system has no more descriptors. [`Error::NotSupported`] with
    /// `Drive::Inline` over a device that itself is a descriptor, elsewhere than on Linux.
    pub fn completion_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        let failed = Error::io("creating the completion descriptor");
        if self.remote.is_none()
            && self.engine.as_ref().is_some_and(|engine| engine.has_descriptor())
        {
            #[cfg(target_os = "linux")]
            {
                if self.epoll.get().is_none() {
                    let _ = self.epoll.set(EpollPair::new(&self.notifier).map_err(failed)?);
                }
                return Ok(self.epoll.get().expect("set above").readable());
            }
            #[cfg(not(target_os = "linux"))]
            return Err(Error::NotSupported {
                what: "a completion descriptor with inline driving",
                device: "descriptor-driven".to_owned(),
            });
        }
        self.notifier.descriptor().map_err(failed)
    }

    /// Empties the descriptor and asks for a signal at the next completion.
    ///
    /// Returns whether it is armed, so that the caller may sleep. If it returns false, completions
    /// wait already and nothing is armed: reap them first.
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm(&mut self) -> bool {
        self.arm_after(1, None)
    }

    /// As [`arm`](Self::arm), for a VMM that injects one interrupt per batch: the signal comes when
    /// `n` completions wait, or `max_delay` after the first one. With `Drive::Inline` nobody counts
    /// while the caller sleeps, so the signal comes with the first packet.
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm_after(&mut self, n: usize, max_delay: Option<Duration>) -> bool {
        self.notifier.arm_descriptor();
        let armed = self.arm_notifier(n, max_delay);
        #[cfg(target_os = "linux")]
        if armed
            && let Some(epoll) = self.epoll.get_mut()
            && let Some(engine) = &self.engine
            && epoll.watch(engine.descriptor(), engine.queues_closed()).is_err()
        {
            // Nobody would tell of a packet: the caller must not sleep.
            self.disarm();
            return false;
        }
        armed
    }

    /// For futures: whether `n` completions wait; if not, `cx`'s waker is woken when they do.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>, n: usize) -> Poll<usize> {
        self.notifier.set_waker(cx.waker());
        if self.arm_notifier(n, None) {
            Poll::Pending
        } else {
            Poll::Ready(self.consumer.ready() as usize)
        }
    }

    /// Counters of the ring so far.
    pub fn stats(&self) -> RingStats {
        self.shared.counters.poller.snapshot()
    }

    /// What the ring's device can do.
    pub fn capabilities(&self) -> Capabilities {
        self.caps
    }

    /// A handle that can be used from anywhere.
    pub fn control(&self) -> RingControl {
        RingControl { shared: self.shared.clone() }
    }

    /// Asks the engine to complete everything in flight as cancelled and waits until it has. The
    /// ring stays open. The completions wait to be reaped, with their frames; returns how many.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if the device has not let go of everything by then. Nothing is lost; what
    /// it keeps completes later.
    pub fn cancel_and_wait(&mut self, timeout: Duration) -> Result<usize, Error> {
        let asked = self.shared.request_cancel_all();
        let deadline = after(timeout);
        loop {
            self.drive();
            let ready = self.consumer.ready();
            // A closed ring cancels everything anyway.
            let carried_out = self.shared.are_cancelled(asked) || !self.shared.is_open();
            if carried_out && ready >= self.consumer.in_flight() {
                return Ok(ready as usize);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::Timeout(timeout));
            }
            self.sleep(ready + 1, Some(deadline.min(now + CANCEL_WAIT)));
        }
    }

    /// Closes the ring: the device lets go of everything, the poller ends its work for it, every
    /// entry in flight completes as cancelled and can still be reaped. Submits say
    /// [`CloseReason::Stopped`] from here on. Closing twice is harmless.
    ///
    /// # Errors
    ///
    /// [`Error::Leaked`] if the device did not let go of some slots within the ring's close
    /// timeout, or the poller did not come back: what they hold is leaked on purpose.
    pub fn close(&mut self) -> Result<(), Error> {
        let timeout = self.close_timeout;
        self.shared.close(CloseReason::Stopped);
        self.shared.request(request::STOP);
        let twice = timeout.saturating_mul(2);
        let (half, deadline) = (after(timeout), after(twice));
        if self.engine.is_none()
            && let Some((handoff, poller)) = &self.remote
        {
            if poller.is_current_thread() {
                // We are inside the poller (in a waker): it will see the wish when we return, and
                // nobody can wait for it here.
                return Ok(());
            }
            // The engine's own close takes at most `timeout`; twice that means that the device
            // does not return from a call.
            self.engine = handoff.take(if self.engine_lost { Duration::ZERO } else { twice });
        }
        let Some(engine) = &mut self.engine else {
            let slots = self.in_flight() - self.consumer.ready() as usize;
            // Should it come back after all, it finds nobody waiting, and cleans up.
            if let Some((handoff, _)) = &self.remote {
                handoff.abandon();
            }
            self.engine_lost = true;
            tracing::error!(ring = self.shared.number, slots, "leaked: the poller is stuck");
            return Err(Error::Leaked { slots, timeout });
        };
        // A closed engine may still wait for slots that somebody drops, as after a panic.
        while (!engine.is_closed() && Instant::now() < deadline)
            || (engine.slots_kept() > 0 && !self.waited && Instant::now() < half)
        {
            if !engine.poll_once() {
                std::thread::sleep(CLOSE_POLL);
            }
        }
        engine.poll_once();
        self.waited = true;
        match engine.slots_kept() {
            0 => Ok(()),
            slots => Err(Error::Leaked { slots, timeout }),
        }
    }

    /// Turns the engine if it is ours; takes it over from a poller that is done with it.
    #[inline]
    fn drive(&mut self) -> bool {
        if let Some(engine) = &mut self.engine {
            // Whoever drives is awake: the engine need not signal its own reaper.
            if self.shared.cq_bell.is_armed() {
                self.shared.cq_bell.disarm();
            }
            return engine.poll_once();
        }
        !self.shared.is_open() && self.take_over()
    }

    #[cold]
    fn take_over(&mut self) -> bool {
        let Some((handoff, _)) = &self.remote else { return false };
        self.engine = handoff.take(Duration::ZERO);
        self.engine.as_mut().is_some_and(|engine| engine.poll_once())
    }

    /// Whether nothing can complete any more.
    fn is_over(&self) -> bool {
        self.engine_lost || self.engine.as_ref().is_some_and(|engine| engine.is_closed())
    }

    fn take_woken(&self) -> bool {
        self.shared.woken.load(Ordering::Relaxed)
            && self.shared.woken.swap(false, Ordering::Acquire)
    }

    /// Arms for `want` completions, looks once more, and parks.
    fn sleep(&mut self, want: u32, deadline: Option<Instant>) {
        if self.arm_bells(want, None) {
            let engine_deadline = self.engine.as_ref().and_then(|engine| engine.deadline());
            let wake_at = [deadline, engine_deadline].into_iter().flatten().min();
            let timeout = wake_at.map(|at| at.saturating_duration_since(Instant::now()));
            match self.engine.as_ref().and_then(|engine| engine.descriptor()) {
                None => self.notifier.park(timeout),
                Some(fd) => {
                    self.notifier.park_on(timeout, &mut [poll_in(fd), poll_in(-1)]);
                }
            }
            if engine_deadline.is_some_and(|at| at <= Instant::now())
                || self.engine.as_ref().is_some_and(|engine| engine.descriptor().is_some())
            {
                self.engine.as_ref().expect("it has a deadline").request_device_poll();
            }
        }
        self.disarm();
    }

    fn disarm(&self) {
        self.shared.cq_bell.disarm();
        if self.engine.is_some() {
            self.shared.bell.disarm();
        }
    }

    fn arm_notifier(&mut self, n: usize, max_delay: Option<Duration>) -> bool {
        let want = u32::try_from(n).unwrap_or(u32::MAX).clamp(1, 1 << 30);
        if self.take_woken() {
            return false;
        }
        // Inline, what there is to do is done now rather than after a signal.
        while self.drive() {
            if self.consumer.ready() >= want {
                return false;
            }
        }
        self.arm_bells(want, max_delay)
    }

    /// Arms whatever can bring `want` completions, and looks once more. Returns false if nothing is
    /// armed, because completions wait.
    fn arm_bells(&mut self, want: u32, max_delay: Option<Duration>) -> bool {
        self.armings = self.armings.wrapping_add(1) & ((START_CLOCK >> DELAY_BITS) - 1);
        let coalesce = max_delay.map_or(0, |delay| {
            let us = delay.as_micros().clamp(1, DELAY_MAX_US.into()) as u64;
            self.armings << DELAY_BITS | us
        });
        self.shared.wanted.store(self.consumer.index_of(want), Ordering::Relaxed);
        self.shared.coalesce.store(coalesce, Ordering::Relaxed);
        self.shared.cq_bell.arm();
        // The look after the fence: a completion published before it is seen here, one after it
        // sees us armed.
        let ready = self.consumer.ready();
        let mut awake = ready >= want || self.shared.woken.load(Ordering::Relaxed);
        if self.engine.is_none() && !self.shared.is_open() {
            // A poller that has just closed the ring may have handed the engine over unseen.
            awake |= self.take_over();
        }
        if let Some(engine) = &mut self.engine {
            awake = awake || !engine.try_sleep();
        }
        if awake {
            self.disarm();
            return false;
        }
        if coalesce != 0 && ready > 0 {
            // Too few are here already: the engine must start the clock now.
            self.shared.coalesce.fetch_or(START_CLOCK, Ordering::Relaxed);
            self.shared.bell.ring();
        }
        true
    }
}

/// The descriptor of [`CompletionQueue::completion_fd`].
///
/// # Panics
///
/// If the descriptor cannot be created. Once `completion_fd` has succeeded, this cannot happen.
impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.completion_fd().expect("call `completion_fd` first to handle this error")
    }
}

/// As [`AsFd`].
impl AsRawFd for CompletionQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "a dropped ring did not close cleanly");
        }
        if let Some((handoff, _)) = &self.remote {
            handoff.abandon();
        }
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue").field("consumer", &self.consumer).finish_non_exhaustive()
    }
}

/// The completions that were there when [`CompletionQueue::reap`] was called.
#[derive(Debug)]
pub struct Reap<'a> {
    pub(super) consumer: &'a mut CqConsumer,
}

impl Iterator for Reap<'_> {
    type Item = Completion;

    #[inline]
    fn next(&mut self) -> Option<Completion> {
        self.consumer.pop().map(Completion::new)
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        // Nobody looks at the queue anew while we have it.
        let left = self.consumer.known() as usize;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Reap<'_> {}
