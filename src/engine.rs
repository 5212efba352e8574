//! One ring's share of polling: submission queue -> batches -> device -> completion queue.
//!
//! An engine is a state machine that never blocks: `Open -> Closing -> Closed`, or `Open -> Closing
//! -> Detached -> Open` for a restart.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmring_core::{CqProducer, Outcome, SqConsumer, Submission};

use crate::device::bounce::Bounce;
use crate::device::catch::{Panicked, catch_panic};
use crate::device::completions::Completions;
use crate::device::context::{PollContext, Posted, Sink};
use crate::device::seam::{Capabilities, Device, Progress, Queue, QueueConfig, Wake};
use crate::device::slot::class_index;
use crate::error::{CloseReason, ConfigError, Error, Status};
use crate::fifo::Fifo;
use crate::lifecycle::{INTERFACE_BUSY, InterfaceShared, RingPermit, Step};
use crate::limits::CLOSE_RETRY;
use crate::mailbox::{DroppedSlot, RingShared, request};
use crate::policy::RetryPolicy;
use crate::sync::{Condvar, Mutex};
use crate::sys::{after, lock, now};

/// The device has stopped taking writes.
#[derive(Debug)]
struct Stall {
    /// Attempts in this stall so far, up to the budget of the [`RetryPolicy`].
    attempts: u32,
    /// The time of the next attempt.
    next: Instant,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Open,
    /// The queue is being asked to release its slots.
    Closing {
        deadline: Instant,
        /// `None`: the queue will be opened again by a restart.
        reason: Option<CloseReason>,
    },
    /// Between the two halves of a restart. Submissions wait.
    Detached,
    Closed(CloseReason),
}

/// How far the engine is with taking the posted reads back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drain {
    /// The ring does not drain.
    Off,
    /// The queue was not asked yet for the reads that it keeps.
    Begun,
    /// The queue was asked.
    Asked,
}

/// All that an engine is built from.
pub(crate) struct EngineParts {
    pub(crate) sq_consumer: SqConsumer,
    pub(crate) cq_producer: CqProducer,
    pub(crate) bounce: Option<Bounce>,
    /// The depth of the reads, if one packet can fill several of them.
    pub(crate) merging_depth: Option<u32>,
    pub(crate) interface: Arc<InterfaceShared>,
    pub(crate) queue: QueueConfig,
    pub(crate) shared: Arc<RingShared>,
    pub(crate) retry: RetryPolicy,
    pub(crate) close_timeout: Duration,
    pub(crate) permit: RingPermit,
    pub(crate) depths: (usize, usize),
}

/// One ring's share of polling. See the [module](self).
pub(crate) struct Engine {
    sq_consumer: SqConsumer,
    completions: Completions,
    posted: Posted,
    /// The slots that the queue keeps: reads and writes.
    kept: [i64; 2],
    queue: Option<Box<dyn Queue>>,
    /// The queue's descriptor, as the queue returned it when it was opened or last armed.
    descriptor: Option<RawFd>,
    /// A queue of the device has had a descriptor.
    has_descriptor: bool,
    /// Whether the queue has still to send something of completed writes, as it said when last armed.
    is_sending: bool,
    interface: Arc<InterfaceShared>,
    caps: Capabilities,
    config: QueueConfig,
    pub(crate) shared: Arc<RingShared>,
    retry: RetryPolicy,
    close_timeout: Duration,
    permit: Option<RingPermit>,
    phase: Phase,
    drain: Drain,
    /// The time from which the slots that the device of a closed ring keeps may be given up.
    lost_at: Option<Instant>,
    /// Whether they were. Only a poll at that time or later, or a close, sets this. So a caller that
    /// has seen that it waits for them also sees the deadline of that poll, even if it has passed.
    given_up: bool,
    stall: Option<Stall>,
    /// When to notify a reaper that waits for more completions than there are, and the number of
    /// the arming that asked for it.
    coalesce: Option<(u64, Instant)>,
    /// The list that takes the place of the shared list of dropped slots. Empty between calls; kept
    /// to use its memory again.
    dropped: Vec<DroppedSlot>,
    /// True once `bind_to_thread` was called: one poller thread makes all calls from then on.
    bound: bool,
    /// The interface counts this ring among those that are detached for a restart.
    counted_detached: bool,
    /// The number of queues that this engine has had and dropped.
    queues_closed: u64,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("posted", &(self.posted.reads.len(), self.posted.writes.len()))
            .field("kept", &self.kept)
            .field("phase", &self.phase)
            .field("queues_closed", &self.queues_closed)
            .finish_non_exhaustive()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.refuse_dropped();
        self.leave_detached();
    }
}

impl Engine {
    pub(crate) fn new(parts: EngineParts) -> Result<Self, Error> {
        let EngineParts { sq_consumer, cq_producer, interface, queue, shared, retry, .. } = parts;
        let config = queue;
        let (reads, writes) = parts.depths;
        if !interface.try_attach() {
            return Err(ConfigError::Invalid(INTERFACE_BUSY.to_owned()).into());
        }
        let opened = catch_panic(|| open(&*interface.device, config, &shared));
        let Opened { queue, mut caps, descriptor } = match opened.unwrap_or_else(|Panicked| {
            let source = std::io::Error::other("the device panicked");
            Err(Error::Io { what: "opening a queue of the device", source })
        }) {
            Ok(opened) => opened,
            Err(error) => {
                interface.detach();
                return Err(error);
            }
        };
        // A ring without reads offers none, so a device that asks for them looks at nothing.
        caps.max_read_batch = caps.max_read_batch.min(u32::try_from(reads).unwrap_or(u32::MAX));
        Ok(Self {
            sq_consumer,
            completions: Completions::new(
                cq_producer,
                parts.bounce,
                parts.merging_depth,
                shared.clone(),
            ),
            posted: Posted {
                reads: Fifo::with_capacity(reads),
                writes: Fifo::with_capacity(writes),
            },
            kept: [0; 2],
            queue: Some(queue),
            descriptor,
            has_descriptor: descriptor.is_some(),
            is_sending: false,
            caps,
            interface,
            config,
            shared,
            retry,
            close_timeout: parts.close_timeout,
            permit: Some(parts.permit),
            phase: Phase::Open,
            drain: Drain::Off,
            lost_at: None,
            given_up: false,
            stall: None,
            coalesce: None,
            dropped: Vec::with_capacity(reads + writes),
            bound: false,
            counted_detached: false,
            queues_closed: 0,
        })
    }

    /// Says that the calling thread makes all calls from here on. Called by a poller before its
    /// first `poll_once`, never by an inline ring.
    pub(crate) fn bind_to_thread(&mut self) {
        self.bound = true;
        if let Some(queue) = &mut self.queue
            && catch_panic(|| queue.bind_to_thread()).is_err()
        {
            self.close_panicked();
        }
    }

    /// Polls once: handles requests, takes submissions, lets the device make progress once,
    /// completes dropped slots, publishes completions and notifies. Never blocks. Returns whether
    /// anything was done, in which case there may be more to do.
    pub(crate) fn poll_once(&mut self) -> bool {
        let mut worked = self.handle_requests();
        // Taken in every phase: while it is set, the engine does not sleep.
        let rang = self.shared.take_device_rang();
        if self.sq_consumer.ready() > 0 && !self.shared.is_inline() {
            self.sq_consumer.prefetch();
        }
        worked |= match self.phase {
            Phase::Open => self.poll_device(rang),
            Phase::Closing { .. } => self.take_submissions() | self.poll_close(),
            Phase::Detached => self.take_submissions(),
            Phase::Closed(_) => self.take_submissions() | self.poll_kept(),
        };
        if self.shared.has_dropped() {
            self.complete_dropped();
            worked = true;
        }
        if self.drain != Drain::Off {
            worked |= self.take_back_reads();
        }
        self.publish_and_notify();
        worked
    }

    /// Whether the closing has ended: no queue is left, and every posted entry has completed. Slots
    /// that the device took may still be missing; see `slots_kept`.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed(_))
    }

    fn handle_requests(&mut self) -> bool {
        let requests = self.shared.take_requests();
        if requests == 0 {
            return false;
        }
        let asked = self.shared.cancels_requested();
        if requests & (request::CANCEL | request::CANCEL_ALL) != 0 {
            // Takes what is in the SQ before the device can take it: the cancels are performed, and
            // the packets are posted, where a cancel finds them.
            self.sq_consumer.ready();
            self.take_submissions();
        }
        if requests & request::CANCEL_ALL != 0 {
            self.cancel(None);
            self.completions.publish();
            self.shared.mark_cancels_done(asked);
        }
        if requests & request::STOP != 0 {
            self.begin_close(Some(CloseReason::Stopped));
        }
        if requests & request::LOOK != 0 {
            self.look();
        }
        true
    }

    /// Asks the ring and the interface what the engine has to do, and does it.
    fn look(&mut self) {
        match (self.shared.is_draining(), self.drain) {
            (true, Drain::Off) => self.drain = Drain::Begun,
            (true, _) => {}
            (false, _) => self.drain = Drain::Off,
        }
        let detached = match self.phase {
            // A restart's closing may become one for good.
            Phase::Open | Phase::Closing { reason: None, .. } => false,
            Phase::Detached => true,
            Phase::Closing { .. } | Phase::Closed(_) => return,
        };
        match self.interface.step(detached) {
            Step::Detach if matches!(self.phase, Phase::Open) => {
                // A restart cancels what was submitted before it.
                self.sq_consumer.ready();
                self.take_submissions();
                self.begin_close(None);
            }
            Step::Stay | Step::Detach => {}
            Step::Attach => self.reopen(),
            Step::Close => self.begin_close(Some(CloseReason::Stopped)),
        }
    }

    /// While the ring drains: cancels the posted reads, oldest first. The reads that the queue keeps
    /// are older than the posted ones, so the queue is asked for them first. Returns whether anything
    /// was done.
    fn take_back_reads(&mut self) -> bool {
        let taken = self.take_submissions();
        // This look comes after the one at the SQ. A read that was submitted after a resume is known
        // only to an engine that also sees the resume: the Acquire in `is_draining` follows the one
        // of the SQ's tail, and both of the caller's stores are Releases.
        if !self.shared.is_draining() {
            self.drain = Drain::Off;
            return taken;
        }
        if self.kept[0] > 0 {
            if self.drain == Drain::Begun
                && let Some(queue) = &mut self.queue
            {
                self.drain = Drain::Asked;
                if catch_panic(|| queue.cancel_reads()).is_err() {
                    self.close_panicked();
                }
                return true;
            }
            return taken;
        }
        let any = !self.posted.reads.is_empty();
        while let Some(slot) = self.posted.reads.pop_front() {
            self.completions.complete(slot, Outcome::Cancelled);
        }
        taken | any
    }

    /// Posts or refuses all known submissions, and performs the cancels among them. Returns whether
    /// there were any.
    fn take_submissions(&mut self) -> bool {
        if self.sq_consumer.known() == 0 {
            return false;
        }
        loop {
            match self.refusal() {
                None => self.posted.post_from_sq(&mut self.sq_consumer, self.shared.number),
                Some(outcome) => {
                    while let Some(sqe) = self.sq_consumer.front() {
                        let class = sqe.class();
                        let (buffer, user_data) = sqe.take();
                        self.completions.push(class, buffer, user_data, outcome);
                    }
                }
            }
            self.sq_consumer.retire();
            // A packet run ends at a cancel.
            let Some(submission) = self.sq_consumer.pop() else { return true };
            let Submission::Cancel { user_data, target } = submission else {
                unreachable!("the packets were taken")
            };
            let matched = self.cancel(target);
            self.completions.push_cancel(target.is_none(), matched, user_data);
        }
    }

    /// The outcome of an entry that came too late for the device, or `None` if entries are posted.
    fn refusal(&self) -> Option<Outcome> {
        match self.phase {
            Phase::Open | Phase::Detached | Phase::Closing { reason: None, .. } => None,
            Phase::Closing { reason: Some(closed), .. } | Phase::Closed(closed) => {
                Some(closed.outcome())
            }
        }
    }

    /// Completes the posted entries of `target` (`None`: all of them) as cancelled, and asks the
    /// queue for those that it keeps. Returns how many there are.
    fn cancel(&mut self, target: Option<u64>) -> u32 {
        let mut matched = 0;
        for list in [&mut self.posted.reads, &mut self.posted.writes] {
            for _ in 0..list.len() {
                let slot = list.pop_front().expect("counted");
                if target.is_none_or(|target| target == slot.user_data()) {
                    matched += 1;
                    self.completions.complete(slot, Outcome::Cancelled);
                } else {
                    list.push_back(slot);
                }
            }
        }
        if let Some(queue) = &mut self.queue {
            match catch_panic(|| queue.cancel(target)) {
                Ok(kept) => matched += kept,
                Err(Panicked) => self.close_panicked(),
            }
        }
        matched
    }

    /// Lets the device make progress once, with the slots it has left posted and with those in the
    /// SQ. Returns whether anything was done.
    fn poll_device(&mut self, rang: bool) -> bool {
        let kept = self.kept != [0; 2];
        let submitted = self.sq_consumer.known() > 0;
        if !rang
            && !kept
            && !submitted
            && self.posted.reads.is_empty()
            && self.posted.writes.is_empty()
        {
            return false;
        }
        let Some(queue) = &mut self.queue else { return false };
        let waits = self.stall.as_ref().is_some_and(|stall| now() < stall.next);
        let write_limit = if waits { 0 } else { self.caps.max_write_batch };
        let number = self.shared.number;
        let read_limit = if self.drain == Drain::Off { self.caps.max_read_batch } else { 0 };
        let limits = [read_limit, write_limit];
        let (limits, sq_consumer) = if self.completions.may_have_guests() {
            // The device sees no more than what it takes: the slots in front that fit it.
            self.posted.post_from_sq(&mut self.sq_consumer, number);
            (self.posted.make_fit(&mut self.completions, limits), None)
        } else {
            (limits, Some(&mut self.sq_consumer))
        };
        let write_limit = limits[1];
        let sink = Sink::Ring(&mut self.completions);
        let mut cx = PollContext::new(number, &mut self.posted, sq_consumer, sink, limits);
        let result = catch_panic(|| queue.poll(&mut cx));
        let taken = cx.taken();
        self.sq_consumer.retire();
        let completed = self.account_kept(taken);
        self.shared.counters.poller.device_wakeups.add(rang.into());
        let moved = submitted || completed || taken != [0; 2];
        match result {
            Ok(Ok(progress)) => {
                // The device was offered these entries too, although it did not look at them.
                if self.sq_consumer.known() > 0 {
                    self.take_submissions();
                }
                // Not below 0, because a device may also put back slots that it took in an earlier
                // call.
                let taken = taken[1].max(0) as usize;
                let offered = (taken + self.posted.writes.len()).min(write_limit as usize);
                if offered > 0 {
                    self.account_writes(taken, offered);
                }
                moved || (progress == Progress::More && !self.posted.reads.is_empty())
            }
            Ok(Err(status)) => {
                tracing::warn!(ring = number, %status, "the device failed for good");
                self.begin_close(Some(CloseReason::Failed(status)));
                true
            }
            Err(Panicked) => {
                self.close_panicked();
                true
            }
        }
    }

    /// Accounts for a device call that has taken `taken` reads and writes: the queue keeps those
    /// that it has not completed. Returns whether it completed any.
    fn account_kept(&mut self, taken: [i64; 2]) -> bool {
        let ended = self.completions.end_batch();
        for i in 0..2 {
            self.kept[i] += taken[i] - i64::from(ended[i]);
        }
        ended != [0; 2]
    }

    /// Accounts for a stall: the device took `taken` of `offered` writes.
    fn account_writes(&mut self, taken: usize, offered: usize) {
        if taken == offered {
            self.stall = None;
            return;
        }
        let attempts = match &self.stall {
            // The device made progress, so any stall after this is a new one, with a budget of its
            // own.
            _ if taken > 0 => 1,
            None => 1,
            Some(stall) => stall.attempts + 1,
        };
        self.shared.counters.poller.retries.add(1);
        if attempts >= self.retry.attempts {
            // Traced once per stall, because past the budget every later write comes here.
            let budget = self.retry.attempts;
            let first = self.stall.as_ref().is_none_or(|stall| stall.attempts < budget);
            let given_up = self.posted.writes.len();
            while let Some(slot) = self.posted.writes.pop_front() {
                self.completions.give_up(slot, Status::BufferExhausted.into());
            }
            if first {
                tracing::debug!(ring = self.shared.number, given_up, "the device takes no packets");
            }
        }
        // Past the budget the count stays, so each later write gets one attempt.
        let attempts = attempts.min(self.retry.attempts);
        self.stall = Some(Stall { attempts, next: after(self.retry.delay) });
    }

    /// Begins to close the queue: for good, or to open it again (`None`).
    fn begin_close(&mut self, reason: Option<CloseReason>) {
        if let Some(closed) = reason {
            self.shared.close(closed);
        }
        match self.phase {
            Phase::Closed(_) => return,
            // A close for a restart can become a close for good.
            Phase::Closing { deadline, reason: before } => {
                self.phase = Phase::Closing { deadline, reason: before.or(reason) };
            }
            Phase::Open => {
                let deadline = after(self.close_timeout);
                self.phase = Phase::Closing { deadline, reason };
            }
            Phase::Detached => {
                if let Some(closed) = reason {
                    self.phase = Phase::Closed(closed);
                    self.lost_at = Some(after(self.close_timeout));
                    self.permit = None;
                }
            }
        }
        let outcome = reason.map_or(Outcome::Cancelled, CloseReason::outcome);
        self.complete_posted(outcome);
        self.stall = None;
        if self.is_closed() && self.counted_detached {
            // The ring was detached and is closed now. A stop waits until what was submitted
            // meanwhile can be reaped.
            self.sq_consumer.ready();
            self.take_submissions();
            self.publish_and_notify();
            self.leave_detached();
        }
    }

    /// Says that the ring is not detached any more, if the interface counts it.
    fn leave_detached(&mut self) {
        if std::mem::take(&mut self.counted_detached) {
            self.interface.leave_detached();
        }
    }

    fn complete_posted(&mut self, outcome: Outcome) {
        for list in [&mut self.posted.reads, &mut self.posted.writes] {
            while let Some(slot) = list.pop_front() {
                self.completions.complete_undone(slot, outcome);
            }
        }
    }

    /// Asks the queue to release its slots. Ends the closing when it has, or when the time is up.
    /// Returns whether anything was done.
    fn poll_close(&mut self) -> bool {
        let Phase::Closing { deadline, reason } = self.phase else { return false };
        let before = self.kept;
        let mut free = true;
        if let Some(queue) = &mut self.queue {
            let number = self.shared.number;
            let mut nothing = Posted::default();
            let undone = reason.map_or(Outcome::Cancelled, CloseReason::outcome);
            self.completions.set_undone(undone);
            let sink = Sink::Ring(&mut self.completions);
            let mut cx = PollContext::new(number, &mut nothing, None, sink, [0; 2]);
            let result = catch_panic(|| queue.close(&mut cx));
            let taken = cx.taken();
            self.completions.set_undone(Outcome::Cancelled);
            // For a device that puts slots back instead of cancelling them.
            self.posted.reads.append(&mut nothing.reads);
            self.posted.writes.append(&mut nothing.writes);
            self.account_kept(taken);
            if reason.is_some() {
                self.complete_posted(undone);
            }
            match result {
                Ok(closed) => free = closed,
                Err(Panicked) => {
                    self.close_panicked();
                    return true;
                }
            }
        }
        if free {
            self.drop_queue();
            self.finish_close(reason);
            return true;
        }
        if now() >= deadline {
            let slots = self.slots_kept();
            let ring = self.shared.number;
            tracing::error!(ring, slots, "leaked: the device did not release them");
            // Leaked on purpose, because the device or its system may still write to these slots.
            self.descriptor = None;
            if let Some(queue) = self.queue.take() {
                std::mem::forget(queue);
                std::mem::forget(self.interface.device.clone());
                std::mem::forget(self.permit.take());
            }
            self.lost_at = Some(deadline);
            self.finish_close(Some(reason.unwrap_or(CloseReason::Failed(Status::Failure))));
            return true;
        }
        self.kept != before
    }

    /// The number of slots that the device took and has not given back. On a closed ring they may
    /// still come, when another thread drops them. Those that never come are leaked.
    pub(crate) fn slots_kept(&self) -> usize {
        (self.kept[0] + self.kept[1]).max(0) as usize
    }

    /// The number of slots that the device keeps on a closed ring, and that count as leaked, because
    /// they were [given up](Self::give_up_kept).
    pub(crate) fn slots_lost(&self) -> usize {
        if self.given_up { self.slots_kept() } else { 0 }
    }

    /// Gives up the slots that the device of a closed ring keeps: nobody waits for them any more.
    pub(crate) fn give_up_kept(&mut self) {
        self.given_up = self.is_closed();
    }

    /// Gives up what the device of a closed ring keeps, if it had the ring's close timeout to release
    /// it. Returns whether anything is given up by this call.
    fn poll_kept(&mut self) -> bool {
        let is_due = !self.given_up && self.lost_at.is_some_and(|at| now() >= at);
        self.given_up |= is_due;
        is_due && self.slots_kept() > 0
    }

    /// Ends the closing, after the queue was dropped or leaked.
    #[cold]
    #[inline(never)]
    fn finish_close(&mut self, reason: Option<CloseReason>) {
        self.complete_dropped();
        match reason {
            Some(closed) => {
                self.shared.close(closed);
                self.phase = Phase::Closed(closed);
                self.lost_at.get_or_insert_with(|| after(self.close_timeout));
                self.complete_posted(closed.outcome());
                self.permit = None;
                tracing::debug!(ring = self.shared.number, ?closed, "ring closed");
            }
            None => {
                self.phase = Phase::Detached;
                if self.bound {
                    self.counted_detached = true;
                    self.interface.enter_detached();
                }
            }
        }
        // Before the device is stopped or restarted. The caller of `stop` or `restart` waits for
        // that, and finds the completions afterwards. Also, stopping may take long.
        self.publish_and_notify();
        self.interface.detach();
    }

    /// Opens a queue again after a restart of the device.
    fn reopen(&mut self) {
        if !self.interface.try_attach() {
            // The device is to be stopped or restarted again. When that is over, `apply_pending`
            // requests LOOK from every ring, and `look` asks again what to do.
            return;
        }
        match catch_panic(|| open(&*self.interface.device, self.config, &self.shared)) {
            Ok(Ok(Opened { queue, caps, descriptor })) => {
                (self.caps, self.descriptor) = (caps, descriptor);
                self.has_descriptor |= descriptor.is_some();
                self.queue = Some(queue);
                self.phase = Phase::Open;
                if self.bound {
                    self.bind_to_thread();
                }
                self.shared.counters.poller.restarts.add(1);
                // Poll the new queue once, for what came in between.
                self.shared.ring_from_device();
                self.leave_detached();
            }
            Err(Panicked) => {
                self.close_panicked();
                self.interface.detach();
            }
            Ok(Err(error)) => {
                let ring = self.shared.number;
                tracing::error!(ring, %error, "could not open a queue after the restart");
                let status = match error {
                    Error::Status(status) => status,
                    _ => Status::Failure,
                };
                self.begin_close(Some(CloseReason::Failed(status)));
                self.interface.detach();
            }
        }
    }

    /// Closes the ring after a panic of the device. The device is not called again. The slots that
    /// its queue kept are dropped with it, and complete.
    pub(crate) fn close_panicked(&mut self) {
        tracing::error!(ring = self.shared.number, "the device panicked");
        self.shared.close(CloseReason::DevicePanicked);
        let attached = self.queue.is_some();
        self.drop_queue();
        self.phase = Phase::Closed(CloseReason::DevicePanicked);
        self.lost_at.get_or_insert_with(|| after(self.close_timeout));
        self.complete_posted(Outcome::DevicePanicked);
        self.permit = None;
        if self.counted_detached {
            self.publish_and_notify();
            self.leave_detached();
        }
        if attached {
            self.finish_close(Some(CloseReason::DevicePanicked));
        }
    }

    /// Drops the queue. This drops the slots that it kept, which then complete as dropped slots.
    fn drop_queue(&mut self) {
        (self.descriptor, self.is_sending) = (None, false);
        self.queues_closed += 1;
        if let Some(queue) = self.queue.take()
            && catch_panic(|| drop(queue)).is_err()
        {
            tracing::error!(ring = self.shared.number, "the device panicked while dropped");
        }
    }

    /// Completes the slots that the device dropped.
    fn complete_dropped(&mut self) {
        let outcome = match self.phase {
            Phase::Open | Phase::Detached => Outcome::Abandoned,
            Phase::Closing { reason: None, .. } => Outcome::Cancelled,
            Phase::Closing { reason: Some(closed), .. } | Phase::Closed(closed) => closed.outcome(),
        };
        let mut dropped = std::mem::take(&mut self.dropped);
        self.shared.take_dropped(&mut dropped);
        for slot in dropped.drain(..) {
            self.kept[class_index(slot.class)] -= 1;
            self.completions.push(slot.class, slot.buffer, slot.user_data, outcome);
        }
        self.dropped = dropped;
    }

    /// Publishes completions and the count of the skipped ones. Notifies a sleeping reaper if there are
    /// as many completions as it waits for, if none can come any more, if a shortage of the submitter
    /// is over, or if the reaper's delay is over.
    ///
    /// Inlined into `poll_once`, whatever else calls it.
    #[inline(always)]
    fn publish_and_notify(&mut self) {
        let news = self.completions.publish();
        if !news && self.coalesce.is_none() && !self.shared.wants_coalescing() {
            return;
        }
        let index = self.completions.index();
        // The owner of an inline ring drives this engine, so it is awake.
        if news
            && !self.shared.is_inline()
            && self
                .shared
                .notify_if_due(index, self.completions.skipped(), || self.sq_consumer.submitted())
        {
            self.coalesce = None;
            self.shared.counters.poller.notifications.add(1);
            return;
        }
        // The reaper waits for more completions than there are. Its delay runs from the first
        // completion on.
        match self.shared.coalescing() {
            Some((arming, delay)) if self.completions.backlog() > 0 => {
                // A deadline of an older arming does not count for this one.
                self.coalesce = self.coalesce.filter(|(of, _)| *of == arming);
                let (_, due) = *self.coalesce.get_or_insert_with(|| (arming, after(delay)));
                if now() >= due {
                    self.coalesce = None;
                    self.shared.notify();
                    self.shared.counters.poller.notifications.add(1);
                }
            }
            _ => self.coalesce = None,
        }
    }

    /// Arms the ring's doorbell. Returns false, with the doorbell disarmed, if there is something
    /// to do after all. Otherwise the thread that brings work rings.
    ///
    /// This look comes after the fence in `arm`, so it sees all work that was published by a ringer
    /// that did not see the bell armed.
    pub(crate) fn try_sleep(&mut self) -> bool {
        self.shared.bell.arm();
        let nothing =
            self.sq_consumer.ready() == 0 && !self.shared.has_requests() && self.arm_queue();
        if nothing {
            self.shared.counters.poller.parks.add(1);
        } else {
            self.shared.bell.disarm();
        }
        nothing
    }

    fn arm_queue(&mut self) -> bool {
        let Some(queue) = &mut self.queue else { return true };
        match catch_panic(|| (queue.arm(), queue.is_sending(), fd_of(&**queue))) {
            Ok((armed, is_sending, descriptor)) => {
                (self.is_sending, self.descriptor) = (is_sending, descriptor);
                self.has_descriptor |= descriptor.is_some();
                // A queue that has packets has nothing to do while no read is posted, nor one that
                // closes: it is not polled any more, and is asked to close at its time.
                armed || !matches!(self.phase, Phase::Open) || !self.device_has_slots()
            }
            Err(Panicked) => {
                self.close_panicked();
                false
            }
        }
    }

    /// Whether something waits for the engine that it has not seen yet.
    pub(crate) fn has_work(&self) -> bool {
        self.sq_consumer.has_more() || self.shared.has_requests()
    }

    /// The time at which the engine must be polled even if nobody rings.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let closing = match self.phase {
            Phase::Closing { deadline, .. } => Some(deadline.min(now() + CLOSE_RETRY)),
            _ => None,
        };
        let stall = self.stall.as_ref().filter(|_| !self.posted.writes.is_empty()).map(|s| s.next);
        let (safety, queue) = match self.phase {
            Phase::Open => (self.caps.safety_poll.map(after), self.queue_deadline()),
            _ => (None, None),
        };
        let lost = self.lost_at.filter(|_| !self.given_up && self.slots_kept() > 0);
        let coalesce = self.coalesce.map(|(_, due)| due);
        [closing, stall, safety, queue, lost, coalesce].into_iter().flatten().min()
    }

    /// When the queue wants to be polled. The caller of an inline ring may ask before it arms.
    fn queue_deadline(&self) -> Option<Instant> {
        let queue = self.queue.as_ref().filter(|_| self.device_has_slots())?;
        // This function changes nothing, so it does not close a queue that panics here.
        catch_panic(|| queue.deadline()).unwrap_or_default()
    }

    /// The descriptor that the thread that drives this engine also sleeps on. `None` while no read
    /// is posted, the device keeps no slot and sends nothing, and while the queue closes: a packet that
    /// cannot be taken would end each sleep at once. A queue that closes is asked again at the
    /// [`deadline`](Self::deadline).
    pub(crate) fn descriptor(&self) -> Option<RawFd> {
        let waits = self.device_has_slots() || self.is_sending;
        self.descriptor.filter(|_| waits && matches!(self.phase, Phase::Open))
    }

    /// Whether reads are posted or the device keeps slots. Otherwise nothing that happens at the device
    /// needs a poll.
    fn device_has_slots(&self) -> bool {
        !self.posted.reads.is_empty() || self.kept != [0; 2]
    }

    /// A number that tells the descriptor of one queue from that of the next, which may be the same
    /// number.
    pub(crate) fn queues_closed(&self) -> u64 {
        self.queues_closed
    }

    /// Whether the device has descriptors, also if its queue asks not to be woken by one now.
    pub(crate) fn has_descriptor(&self) -> bool {
        self.has_descriptor
    }

    /// Makes the next poll call the device although it did not ring, because its descriptor is
    /// readable or the safety poll is due.
    pub(crate) fn request_device_poll(&self) {
        self.shared.ring_from_device();
    }
}

/// A queue of a device, with what is asked for only when it is opened.
struct Opened {
    queue: Box<dyn Queue>,
    caps: Capabilities,
    descriptor: Option<RawFd>,
}

fn open(
    device: &dyn Device,
    config: QueueConfig,
    shared: &Arc<RingShared>,
) -> Result<Opened, Error> {
    let queue = device.queue(config, Wake::ring(shared.clone()))?;
    let descriptor = fd_of(&*queue);
    Ok(Opened { queue, caps: device.capabilities(), descriptor })
}

fn fd_of(queue: &dyn Queue) -> Option<RawFd> {
    queue.descriptor().map(|fd| fd.as_raw_fd())
}

/// Where a poller leaves the engine of a closed ring, for the reaping half to take.
#[derive(Debug, Default)]
pub(crate) struct Handoff {
    state: Mutex<HandoffState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
enum HandoffState {
    #[default]
    Running,
    Returned(Box<Engine>),
    /// The reaping half will not come for it.
    Abandoned,
}

impl Handoff {
    /// Leaves `engine` for the reaping half, or drops it if the reaping half will not come.
    pub(crate) fn give(&self, engine: Engine) {
        let mut state = lock(&self.state);
        if matches!(*state, HandoffState::Running) {
            *state = HandoffState::Returned(Box::new(engine));
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Says that the reaping half will not come. Drops the engine if it is there.
    pub(crate) fn abandon(&self) {
        // Dropped outside the lock.
        let before = std::mem::replace(&mut *lock(&self.state), HandoffState::Abandoned);
        drop(before);
    }

    /// Takes the engine, waiting up to `timeout` for it. `None` if it did not come, or was taken
    /// before.
    pub(crate) fn take(&self, timeout: Duration) -> Option<Box<Engine>> {
        let deadline = after(timeout);
        let mut state = lock(&self.state);
        loop {
            if matches!(*state, HandoffState::Returned(_)) {
                let taken = std::mem::replace(&mut *state, HandoffState::Abandoned);
                let HandoffState::Returned(engine) = taken else { unreachable!("just seen") };
                return Some(engine);
            }
            let left = deadline.saturating_duration_since(now());
            if left.is_zero() || matches!(*state, HandoffState::Abandoned) {
                return None;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
    }
}
