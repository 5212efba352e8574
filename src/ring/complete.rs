//! The reaping half of a ring: [`CompletionQueue`].

use std::cell::OnceCell;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use static_assertions::{assert_impl_all, assert_not_impl_any};
use vmring_core::CqConsumer;
use vmring_core::doorbell::Park;

use crate::device::seam::Capabilities;
use crate::engine::{Engine, Handoff};
use crate::error::{CloseReason, Error};
use crate::limits::CLOSE_POLL;
use crate::mailbox::{DELAY_BITS, DELAY_MAX_US, RingShared, START_CLOCK, UNTIL_THE_END, request};
use crate::notify::{Notifier, SelectorPair};
use crate::policy::IdlePolicy;
use crate::poller::PollerShared;
use crate::ring::completion::{Completion, CompletionInfo, Peek};
use crate::ring::control::RingControl;
use crate::stats::RingStats;
use crate::sync::{Ordering, Overwrite};
use crate::sys::{after, now, sleep};

/// The reaping half of a ring. [`Ring::into_split`](crate::Ring::into_split) returns it, and
/// [`Ring`](crate::Ring) has the same calls.
///
/// Dropping it closes the ring.
pub struct CompletionQueue {
    pub(super) consumer: CqConsumer,
    pub(crate) shared: Arc<RingShared>,
    notifier: Arc<Notifier>,
    /// The engine, if this half drives it: with `Drive::Inline`, or after the poller has handed it
    /// back.
    engine: Option<Box<Engine>>,
    /// Where the poller leaves the engine of a closed ring. `None` with `Drive::Inline`.
    remote: Option<(Arc<Handoff>, Arc<PollerShared>)>,
    idle: IdlePolicy,
    close_timeout: Duration,
    caps: Capabilities,
    /// The poller did not give the engine back at close.
    engine_lost: bool,
    /// An earlier close has waited for the device in vain, so the next one does not wait again.
    waited: bool,
    /// The number of the last arming; see `arm_bells`.
    armings: u64,
    /// The set of the notifier's and the device's descriptor. Created on first use, and only for
    /// inline rings over a device that has a descriptor.
    pair: OnceCell<SelectorPair>,
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
            pair: OnceCell::new(),
        }
    }

    /// Returns the completions that wait, oldest first. Never blocks. With `Drive::Inline` the
    /// device makes progress first.
    ///
    /// Each completion is retired when the iterator yields it, or with
    /// [`for_each`](Iterator::for_each) when that returns. Those that the caller does not take
    /// from the iterator stay for the next call.
    #[inline]
    pub fn reap(&mut self) -> Reap<'_> {
        self.refresh();
        Reap { consumer: &mut self.consumer }
    }

    /// Looks at the next completion and leaves it in the queue. Returns `None` if none waits. Never
    /// blocks. With `Drive::Inline` the device makes progress first.
    ///
    /// [`Peek::take`] takes the completion. This call looks at the queue afresh each time, so a loop
    /// over many completions is better made with [`reap`](Self::reap) or [`reap_if`](Self::reap_if).
    ///
    /// # Examples
    ///
    /// A completed read stays in the ring while the guest has no buffer for its packet.
    ///
    /// ```
    /// use vmring::{Completion, Ring, RingOp};
    ///
    /// fn next(ring: &mut Ring, guest_has_buffer: bool) -> Option<Completion> {
    ///     let next = ring.peek()?;
    ///     if next.op == RingOp::Read && !guest_has_buffer {
    ///         return None;
    ///     }
    ///     Some(next.take())
    /// }
    /// # use vmring::{Direction, Interface, Loopback};
    /// # let interface = Interface::builder().device(Loopback::new(1500)).start()?;
    /// # let mut ring = interface.ring(Direction::Both).build()?;
    /// # let frames = [ring.alloc().unwrap(), ring.alloc().unwrap()];
    /// # ring.submit_reads(frames.into_iter().zip([1, 2]))?;
    /// # ring.cancel(1, 3)?;
    /// # ring.wait(2, None);
    /// # assert!(next(&mut ring, false).is_none());
    /// # assert_eq!(next(&mut ring, true).map(|done| done.user_data), Some(1));
    /// # assert_eq!(next(&mut ring, false).map(|done| done.user_data), Some(3));
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    #[doc(alias = "io_uring_peek_cqe")]
    pub fn peek(&mut self) -> Option<Peek<'_>> {
        self.refresh();
        self.consumer.front().map(Peek::new)
    }

    /// Returns those of the completions that wait for which `wanted` returns true, oldest first. The
    /// others stay in the queue, in their order. Never blocks. With `Drive::Inline` the device makes
    /// progress first.
    ///
    /// So a completion that cannot be taken yet holds up none behind it. For example, a read whose
    /// packet the guest has no buffer for stays in the ring, and the writes behind it are taken. What
    /// stays keeps its credit and its frame, so it slows down nobody but its own direction.
    ///
    /// `wanted` sees each completion that waits once, oldest first, before this call returns. Those
    /// that the caller does not take from the iterator stay, before the others. If `wanted` panics,
    /// every completion is still in the queue, in some order. For n completions that wait, the call
    /// takes O(n log n) steps, and it allocates nothing.
    ///
    /// To sleep while some completions stay, wait for one more than stay: call
    /// [`arm_after(n + 1, None)`](Self::arm_after), where n is [`ready()`](Self::ready) after the loop,
    /// and sleep on the descriptor and on what lets the others be taken, such as the guest's kick.
    /// [`wait(n + 1, ..)`](Self::wait) does the same for the ring alone. It returns at once if nothing
    /// but the n completions is in flight.
    ///
    /// # Examples
    ///
    /// ```
    /// use vmring::{Ring, RingOp};
    ///
    /// /// Takes what can be taken while the guest has `buffers` for packets to it.
    /// fn serve(ring: &mut Ring, mut buffers: usize) -> Vec<u64> {
    ///     let can_be_taken = ring.reap_if(|next| {
    ///         let is_packet = next.op == RingOp::Read && next.result.is_ok();
    ///         if is_packet && buffers == 0 {
    ///             return false;
    ///         }
    ///         buffers -= usize::from(is_packet);
    ///         true
    ///     });
    ///     can_be_taken.map(|done| done.user_data).collect()
    /// }
    /// # use vmring::{Direction, Interface, Loopback};
    /// # let interface = Interface::builder().device(Loopback::new(1500)).start()?;
    /// # let mut ring = interface.ring(Direction::Both).build()?;
    /// # let frames: Vec<_> = std::iter::from_fn(|| ring.alloc()).take(3).collect();
    /// # ring.submit_reads(frames.into_iter().zip(1..))?;
    /// # let mut packet = ring.alloc().expect("a fresh ring has free frames");
    /// # packet.copy_from(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello")?;
    /// # ring.submit_write(packet, 9)?;
    /// # ring.wait(2, None);
    /// # assert_eq!(serve(&mut ring, 0), [9]);
    /// # assert_eq!(serve(&mut ring, 1), [1]);
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    pub fn reap_if(&mut self, wanted: impl FnMut(&CompletionInfo) -> bool) -> Reap<'_> {
        self.refresh();
        self.select(wanted);
        Reap { consumer: &mut self.consumer }
    }

    /// Brings those of the completions that the last look saw and that are `wanted` before the others,
    /// and leaves the others out of sight until the next look.
    pub(super) fn select(&mut self, mut wanted: impl FnMut(&CompletionInfo) -> bool) {
        self.consumer.select(|cqe| wanted(&CompletionInfo::new(cqe)));
    }

    /// Drives the engine if this half has it, and then loads how many completions wait. If a poller
    /// wrote them, perhaps on another processor, their cache lines are prefetched.
    #[inline]
    pub(super) fn refresh(&mut self) {
        self.drive();
        self.consumer.ready();
        if self.engine.is_none() {
            self.consumer.prefetch();
        }
    }

    /// Returns how many completions wait to be reaped. With `Drive::Inline` the device makes
    /// progress first.
    pub fn ready(&mut self) -> usize {
        self.drive();
        self.consumer.ready() as usize
    }

    /// Returns the number of submissions, cancels included, that are not reaped yet. Those that
    /// another thread submits meanwhile may be missing. A write that
    /// [skips success](crate::SubmissionQueue::submit_write_skip_success) counts until it has
    /// succeeded, or until its failure is reaped.
    ///
    /// Entries that have leaked do not count. An entry leaks if the ring is closed and the device does
    /// not release its slot within the ring's
    /// [close timeout](crate::RingBuilder::close_timeout). So a loop that waits and reaps until nothing
    /// is in flight ends, whatever the device does.
    pub fn in_flight(&self) -> usize {
        self.outstanding() as usize
    }

    fn outstanding(&self) -> u32 {
        if self.engine_lost {
            // Nobody completes anything any more. This looks at the queue, because `reap_if` leaves
            // completions out of what is known.
            return self.consumer.waiting();
        }
        let lost = self.engine.as_ref().map_or(0, |engine| engine.slots_lost());
        self.consumer.in_flight().saturating_sub(u32::try_from(lost).unwrap_or(u32::MAX))
    }

    /// Sleeps until `min` completions wait, and returns how many wait. With `Drive::Inline` the
    /// device makes progress in this call.
    ///
    /// It returns earlier in these cases:
    ///
    /// * All entries in flight have ended, although their completions are fewer than `min`. So it
    ///   returns at once if nothing is in flight, and when the last write that skips success has
    ///   succeeded. Entries that have leaked are not waited for; see [`in_flight`](Self::in_flight).
    /// * A submit was refused, or no frame was free, and a write that skips success has succeeded
    ///   since: submit again. This ends one wait or arming for each refusal; see
    ///   [`submit_write_skip_success`](crate::SubmissionQueue::submit_write_skip_success).
    /// * `timeout` has passed (`None`: it has no limit).
    /// * [`RingControl::wake`] was called.
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
        let deadline = timeout.map(after);
        let mut round = 0;
        loop {
            let worked = self.drive();
            let ready = self.consumer.ready();
            let want = u32::try_from(min).unwrap_or(u32::MAX).min(self.outstanding());
            if ready >= want
                || self.shared.take_woken()
                || self.shared.take_shortage_over(self.consumer.skipped())
            {
                return ready as usize;
            }
            if worked {
                round = 0;
                continue;
            }
            if deadline.is_some_and(|deadline| now() >= deadline) {
                return ready as usize;
            }
            if self.idle.pause(round) {
                round += 1;
                continue;
            }
            // The loop takes the wake, and the end of a shortage.
            self.sleep(want, true, deadline, |shared, skipped| {
                shared.is_woken() || shared.is_shortage_over(skipped)
            });
        }
    }

    /// With `Drive::Inline`, returns the time at which the caller must call [`reap`](Self::reap) or
    /// [`wait`](Self::wait) even if the descriptor has not become readable: to try a device again
    /// that took no packets, or to poll it for safety. The time is now if something was submitted, or
    /// requested by another thread, that the engine has not seen yet. `None` if there is no such time.
    pub fn next_deadline(&self) -> Option<Instant> {
        let engine = self.engine.as_ref()?;
        if engine.has_work() { Some(now()) } else { engine.deadline() }
    }

    /// Returns a descriptor for an event loop. After [`arm`](Self::arm) has returned true, it
    /// becomes readable when there are completions.
    ///
    /// The first call creates it: an eventfd on Linux, a pipe elsewhere. Before that call it costs
    /// nothing. Afterwards it costs one signal per arming. Every call returns the same one. With
    /// `Drive::Inline` over a device that has a descriptor, or may have one later, it is an epoll set or a
    /// kqueue of both. [`AsFd`] and [`AsRawFd`] give the same descriptor.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system refuses the descriptor.
    pub fn completion_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        let failed = Error::io("creating the completion descriptor");
        let has_descriptor = || {
            self.pair.get().is_some()
                || self.caps.late_descriptor
                || self.engine.as_ref().is_some_and(|engine| engine.has_descriptor())
        };
        if self.remote.is_none() && has_descriptor() {
            if self.pair.get().is_none() {
                let _ = self.pair.set(SelectorPair::new(&self.notifier).map_err(failed)?);
            }
            return Ok(self.pair.get().expect("set above").readable());
        }
        self.notifier.descriptor().map_err(failed)
    }

    /// Asks for a signal at the next completion: empties the descriptor of
    /// [`completion_fd`](Self::completion_fd), which then becomes readable once.
    ///
    /// Returns whether it is armed. If so, the caller may sleep. If it returns false, nothing is
    /// armed, because completions wait already, the engine has work to do, or [`RingControl::wake`]
    /// was called. In this case reap, and then arm again.
    ///
    /// With `Drive::Inline`, the next call that drives the device, such as [`reap`](Self::reap) or
    /// [`ready`](Self::ready), ends the arming, because its thread is awake. Arm again before you sleep.
    ///
    /// A write that skips success gives no signal when it succeeds, with one exception. If a submit
    /// was refused, or no frame was free, the next such success signals as a completion does, or makes
    /// this call return false: submit again. See
    /// [`submit_write_skip_success`](crate::SubmissionQueue::submit_write_skip_success).
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm(&mut self) -> bool {
        self.arm_after(1, None)
    }

    /// Asks for a signal when `n` completions wait, or when `max_delay` has passed since the first
    /// one (`None`: it has no limit). This is for a VMM that injects one interrupt per batch.
    /// Returns what [`arm`](Self::arm) returns.
    ///
    /// With `Drive::Inline` nobody counts while the caller sleeps, so the signal comes with the
    /// first packet.
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm_after(&mut self, n: usize, max_delay: Option<Duration>) -> bool {
        self.notifier.arm_descriptor();
        let armed = self.arm_notifier(n, max_delay);
        if armed
            && let Some(pair) = self.pair.get_mut()
            && let Some(engine) = &self.engine
            && pair.watch(engine.descriptor(), engine.queues_closed()).is_err()
        {
            // A packet would give no signal, so the caller must not sleep.
            self.disarm();
            return false;
        }
        armed
    }

    /// For futures: returns `Ready` with the number of completions that wait, if they are at least
    /// `n`. Else the waker of `cx` is woken when they are. May return `Ready` with fewer after
    /// [`RingControl::wake`], when the engine has work to do, or when a submit was refused and can be
    /// tried again, as [`arm`](Self::arm) says.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>, n: usize) -> Poll<usize> {
        self.notifier.set_waker(cx.waker());
        if self.arm_notifier(n, None) {
            Poll::Pending
        } else {
            Poll::Ready(self.consumer.ready() as usize)
        }
    }

    /// Returns a snapshot of the ring's counters since it was built.
    pub fn stats(&self) -> RingStats {
        self.shared.counters.poller.snapshot()
    }

    /// Returns what the ring's device can do.
    pub fn capabilities(&self) -> Capabilities {
        self.caps
    }

    /// Returns a handle that can be used from any thread.
    pub fn control(&self) -> RingControl {
        RingControl { shared: self.shared.clone() }
    }

    /// Asks the engine to complete everything in flight, as cancelled or with its packet, and waits
    /// until it has. Returns how many completions wait to be reaped, with their frames. The ring
    /// stays open.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if the device has not released everything within `timeout`. Nothing is
    /// lost: what the device keeps completes later.
    pub fn cancel_and_wait(&mut self, timeout: Duration) -> Result<usize, Error> {
        let asked = self.shared.request_cancel_all();
        let deadline = after(timeout);
        loop {
            let worked = self.drive();
            let ready = self.consumer.ready();
            // A closed ring cancels everything without being asked.
            let cancelled = self.shared.are_cancelled(asked) || self.shared.is_closed();
            if cancelled && ready >= self.outstanding() {
                return Ok(ready as usize);
            }
            if now() >= deadline {
                return Err(Error::Timeout(timeout));
            }
            if worked {
                continue;
            }
            // Before the engine has answered, it does not matter whether anything is in flight.
            self.sleep(ready + 1, cancelled, Some(deadline), |shared, _| {
                !cancelled && (shared.are_cancelled(asked) || shared.is_closed())
            });
        }
    }

    /// Lets everything in flight end, and refuses new submissions until [`resume`](Self::resume): for a
    /// pause or a snapshot of the guest. Returns how many completions wait to be reaped.
    ///
    /// Submits are refused with [`SubmitErrorKind::Draining`](crate::SubmitErrorKind::Draining) from
    /// here on. Posted reads come back in the order in which they were posted, as cancelled or with
    /// their packet; no packet is lost. Every write ends by itself. After `Ok` nothing is in flight but
    /// the completions that wait. Draining a drained ring does nothing.
    ///
    /// A submit that runs on another thread at the same time may still be accepted. It completes, and
    /// another `drain` waits for it. A restart of the interface does not end the draining.
    ///
    /// # Errors
    ///
    /// * [`Error::Timeout`] if some writes have not ended within `timeout`. Nothing is lost, and the
    ///   ring goes on draining: call `drain` again, or `resume`.
    /// * [`Error::Closed`] if the ring is closed, before or meanwhile.
    #[doc(alias = "quiesce")]
    pub fn drain(&mut self, timeout: Duration) -> Result<usize, Error> {
        self.shared.start_draining();
        let deadline = after(timeout);
        loop {
            let worked = self.drive();
            let ready = self.consumer.ready();
            if let Some(closed) = self.shared.why_closed() {
                return Err(closed.into());
            }
            if ready >= self.outstanding() {
                return Ok(ready as usize);
            }
            if now() >= deadline {
                return Err(Error::Timeout(timeout));
            }
            if worked {
                continue;
            }
            self.sleep(ready + 1, true, Some(deadline), |shared, _| shared.is_closed());
        }
    }

    /// Takes submissions again after [`drain`](Self::drain). Does nothing to a ring that does not
    /// drain.
    pub fn resume(&mut self) {
        self.shared.resume();
    }

    /// Closes the ring, and waits until the device has released everything. Every entry in flight
    /// completes, as cancelled or with its packet, and can still be reaped. The poller ends its
    /// work for the ring. Submits are refused with [`CloseReason::Stopped`] from here on. Closing
    /// twice is harmless.
    ///
    /// It waits at most as long as
    /// [`RingBuilder::close_timeout`](crate::RingBuilder::close_timeout) says, or twice as long for
    /// a device that does not return from a call. On the ring's own poller thread, for example
    /// inside a waker, it does not wait and returns `Ok`: the poller closes the ring afterwards.
    ///
    /// # Errors
    ///
    /// [`Error::Leaked`] if the device did not release some slots in this time, or the poller did
    /// not come back. What they hold is leaked on purpose.
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
                // We are on the poller's thread, inside a waker. The poller sees the request when
                // we return. Waiting for it here would never end.
                return Ok(());
            }
            // The engine's own close takes at most `timeout`. If the engine has not come back after
            // twice that time, the device does not return from a call.
            self.engine = handoff.take(if self.engine_lost { Duration::ZERO } else { twice });
        }
        let Some(engine) = &mut self.engine else {
            let slots = self.consumer.in_flight().saturating_sub(self.consumer.ready()) as usize;
            // If the poller comes back after all, it finds the handoff abandoned and drops the
            // engine.
            if let Some((handoff, _)) = &self.remote {
                handoff.abandon();
            }
            self.engine_lost = true;
            tracing::error!(ring = self.shared.number, slots, "leaked: the poller is stuck");
            return Err(Error::Leaked { slots, timeout });
        };
        // A closed engine may still wait for slots that another thread drops, as after a panic of
        // the device.
        while (!engine.is_closed() && now() < deadline)
            || (engine.slots_kept() > 0 && !self.waited && now() < half)
        {
            if !engine.poll_once() {
                sleep(CLOSE_POLL);
            }
        }
        engine.poll_once();
        self.waited = true;
        match engine.slots_kept() {
            0 => Ok(()),
            slots => {
                engine.give_up_kept();
                Err(Error::Leaked { slots, timeout })
            }
        }
    }

    /// One step of a close that does not wait, on a ring of a poller that was told to stop at the time
    /// `began`. Returns the answer of [`close`](Self::close) when there is one. The caller calls again
    /// a little later otherwise.
    pub(crate) fn try_close(&mut self, began: Instant) -> Option<Result<(), Error>> {
        self.drive();
        let waited = now().saturating_duration_since(began);
        match &self.engine {
            Some(engine) if engine.is_closed() => {
                // As `close` does, this waits for slots that another thread drops.
                if engine.slots_kept() > 0 && !self.waited && waited < self.close_timeout {
                    return None;
                }
                self.waited = true;
            }
            _ if waited < self.close_timeout.saturating_mul(2) => return None,
            _ => (self.engine_lost, self.waited) = (true, true),
        }
        // There is nothing left to wait for.
        Some(self.close())
    }

    /// Drives the engine if this half has it. If a poller has closed the ring, takes the engine
    /// over. Returns whether anything was done.
    #[inline]
    fn drive(&mut self) -> bool {
        if self.engine.is_some() && self.shared.cq_bell.is_armed() {
            // This thread drives the engine and reaps, so it is awake and needs no signal. If it was
            // woken by a device's descriptor, nobody has cleared the bells.
            self.disarm();
        }
        if let Some(engine) = &mut self.engine {
            return engine.poll_once();
        }
        self.shared.is_closed() && self.take_over()
    }

    #[cold]
    fn take_over(&mut self) -> bool {
        let Some((handoff, _)) = &self.remote else { return false };
        self.engine = handoff.take(Duration::ZERO);
        self.engine.as_mut().is_some_and(|engine| engine.poll_once())
    }

    /// Whether the engine is closed, or does not come back. No entry completes any more, unless a thread
    /// of the device drops a slot that it has.
    pub(crate) fn is_over(&self) -> bool {
        self.engine_lost || self.engine.as_ref().is_some_and(|engine| engine.is_closed())
    }

    /// Arms for `want` completions, and with `until_the_end` also for the moment at which nothing is in
    /// flight any more. Looks once more, and parks until a signal or the deadline. Does not park if
    /// `is_over` finds that the caller waits no longer.
    fn sleep(
        &mut self,
        want: u32,
        until_the_end: bool,
        deadline: Option<Instant>,
        is_over: impl FnOnce(&RingShared, u32) -> bool,
    ) {
        if self.arm_bells(want, until_the_end, None, is_over) {
            let engine_deadline = self.engine.as_ref().and_then(|engine| engine.deadline());
            let wake_at = [deadline, engine_deadline].into_iter().flatten().min();
            let timeout = wake_at.map(|at| at.saturating_duration_since(now()));
            match self.engine.as_ref().and_then(|engine| engine.descriptor()) {
                None => self.notifier.park(timeout),
                Some(fd) => self.notifier.park_on(timeout, fd),
            }
            if engine_deadline.is_some_and(|at| at <= now())
                || self.engine.as_ref().is_some_and(|engine| engine.descriptor().is_some())
            {
                self.engine
                    .as_ref()
                    .expect("the deadline or descriptor is an engine's")
                    .request_device_poll();
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
        if self.shared.take_woken() {
            return false;
        }
        // An inline engine does what there is to do now, not after a signal.
        while self.drive() {
            if self.consumer.ready() >= want {
                return false;
            }
        }
        self.arm_bells(want, false, max_delay, |shared, skipped| {
            shared.take_woken() || shared.take_shortage_over(skipped)
        })
    }

    /// Arms all that can bring `want` completions, or with `until_the_end` the end of all that is in
    /// flight. Looks once more, also with `is_over`, which gets the number of skipped completions.
    /// Returns false, with nothing armed, if the caller must not sleep.
    fn arm_bells(
        &mut self,
        want: u32,
        until_the_end: bool,
        max_delay: Option<Duration>,
        is_over: impl FnOnce(&RingShared, u32) -> bool,
    ) -> bool {
        self.armings = self.armings.wrapping_add(1) & ((START_CLOCK >> DELAY_BITS) - 1);
        let coalesce = max_delay.map_or(0, |delay| {
            let us = delay.as_micros().clamp(1, DELAY_MAX_US.into()) as u64;
            self.armings << DELAY_BITS | us
        });
        // Relaxed, both: the Release in `arm` publishes them to the Acquire in `ring_if`, after
        // which `notify_if_due` reads `wanted`.
        let end = if until_the_end { UNTIL_THE_END } else { 0 };
        let wanted = u64::from(self.consumer.index_of(want)) | end;
        self.shared.wanted.store(wanted, Ordering::Relaxed);
        self.shared.coalesce.overwrite(coalesce, Ordering::Relaxed);
        self.shared.cq_bell.arm();
        // This look comes after the fence in `arm`, which pairs with the fence in `ring_if`. A
        // completion that was published before it is seen here. The engine that publishes one later
        // sees the bell armed. The same holds for the count of skipped completions, and for what
        // `is_over` looks at, such as a wake by a control handle.
        let ready = self.consumer.ready();
        let mut awake = ready >= want
            || (until_the_end && ready >= self.outstanding())
            || is_over(&self.shared, self.consumer.skipped());
        if self.engine.is_none() && self.shared.is_closed() {
            // The poller may have closed the ring and handed the engine over before this half
            // armed, so its notification is gone.
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
            // Some completions wait, but too few. The engine may not publish another, so it must
            // start the clock now.
            //
            // Relaxed: the fence in `arm` above is sequenced before, and pairs with the Acquire in
            // `coalescing`, which sees the bell armed.
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
/// If the descriptor cannot be created. This cannot happen once `completion_fd` has succeeded.
impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.completion_fd().expect("call `completion_fd` first to handle this error")
    }
}

/// The descriptor of [`CompletionQueue::completion_fd`], as [`AsFd`] gives it. Panics as [`AsFd`]
/// does.
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

/// The iterator that [`CompletionQueue::reap`] and [`CompletionQueue::reap_if`] return: the
/// completions that waited at that call.
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
        // This iterator borrows the consumer exclusively, so `known` only shrinks while it lives.
        let left = self.consumer.known() as usize;
        (left, Some(left))
    }

    /// Retires all completions together at its end, which costs less than one by one.
    #[inline]
    fn for_each<F: FnMut(Completion)>(self, mut f: F) {
        self.consumer.pop_all(|reaped| f(Completion::new(reaped)));
    }
}

impl ExactSizeIterator for Reap<'_> {}
