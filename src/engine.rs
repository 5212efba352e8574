//! One ring's share of polling: submission queue -> batches -> device -> completion queue.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vmring_core::{CqProducer, Outcome, SqConsumer, Submission};

use crate::config::Direction;
use crate::device::catch::{Panicked, guard};
use crate::device::completions::Completions;
use crate::device::io::{Io, Posted, Sink};
use crate::device::seam::{Capabilities, Device, Progress, Queue, Wake};
use crate::device::slot::list_of;
use crate::error::{Closed, ConfigError, Error, Status};
use crate::fifo::Fifo;
use crate::lifecycle::{Claim, INTERFACE_BUSY, RingGroup};
use crate::limits::CLOSE_RETRY;
use crate::mailbox::{RingShared, control};
use crate::policy::RetryPolicy;
use crate::sys::{after, lock};

#[derive(Debug)]
struct Stall {
    attempts: u32,
    /// When to try again.
    next: Instant,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Open,
    /// The queue is being asked to let go.
    Closing {
        deadline: Instant,
        /// `None`: to be opened again by a restart.
        then: Option<Closed>,
    },
    /// Between the two halves of a restart: submissions wait.
    Detached,
    Closed(Closed),
}

/// Everything an engine is built from.
pub(crate) struct EngineParts {
    pub(crate) sq_consumer: SqConsumer,
    pub(crate) cq_producer: CqProducer,
    pub(crate) group: Arc<RingGroup>,
    pub(crate) direction: Direction,
    pub(crate) shared: Arc<RingShared>,
    pub(crate) retry: RetryPolicy,
    pub(crate) close_timeout: Duration,
    pub(crate) claim: Claim,
    pub(crate) depths: (usize, usize),
}

/// One ring's poller work.
pub(crate) struct Engine {
    sq_consumer: SqConsumer,
    completions: Completions,
    posted: Posted,
    /// Slots that the queue keeps: reads, writes.
    kept: [i64; 2],
    queue: Option<Box<dyn Queue>>,
    /// The queue's own, as it said when it was opened or last armed.
    descriptor: Option<RawFd>,
    group: Arc<RingGroup>,
    caps: Capabilities,
    direction: Direction,
    pub(crate) shared: Arc<RingShared>,
    retry: RetryPolicy,
    close_timeout: Duration,
    claim: Option<Claim>,
    phase: Phase,
    stall: Option<Stall>,
    /// When to notify a reaper that waits for more completions than there are.
    coalesce: Option<(u64, Instant)>,
    /// Orphans taken out of the shared list, kept to reuse its memory.
    orphans: Vec<crate::mailbox::Orphan>,
    /// A poller's thread drives it, and no other will.
    settled: bool,
    /// Queues that it has had and that are gone.
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
        self.shared.send_orphans_home();
    }
}

impl Engine {
    pub(crate) fn new(parts: EngineParts) -> Result<Self, Error> {
        let EngineParts { sq_consumer, cq_producer, group, direction, shared, retry, .. } = parts;
        let (reads, writes) = parts.depths;
        if !group.try_attach() {
            return Err(ConfigError::Invalid(INTERFACE_BUSY.to_owned()).into());
        }
        let opened = guard(|| open(&*group.device, direction, &shared));
        let Opened { queue, caps, descriptor } = match opened.unwrap_or_else(|Panicked| {
            let source = std::io::Error::other("the device panicked");
            Err(Error::Io { what: "opening a queue of the device", source })
        }) {
            Ok(opened) => opened,
            Err(error) => {
                group.detached();
                return Err(error);
            }
        };
        Ok(Self {
            sq_consumer,
            completions: Completions::new(cq_producer, shared.clone()),
            posted: Posted {
                reads: Fifo::with_capacity(reads),
                writes: Fifo::with_capacity(writes),
            },
            kept: [0; 2],
            queue: Some(queue),
            descriptor,
            caps,
            group,
            direction,
            shared,
            retry,
            close_timeout: parts.close_timeout,
            claim: Some(parts.claim),
            phase: Phase::Open,
            stall: None,
            coalesce: None,
            orphans: Vec::with_capacity(reads + writes),
            settled: false,
            queues_closed: 0,
        })
    }

    /// From here on this thread drives it.
    pub(crate) fn settle(&mut self) {
        self.settled = true;
        if let Some(queue) = &mut self.queue
            && guard(|| queue.settle()).is_err()
        {
            self.panicked();
        }
    }

    /// One round: takes submissions, lets the device make progress once, shows completions. Never
    /// blocks. Returns whether anything was done, so that there may be more.
    pub(crate) fn turn(&mut self) -> bool {
        let mut worked = self.attend_control();
        if self.sq_consumer.ready() > 0 && !self.shared.is_inline() {
            self.sq_consumer.prefetch();
        }
        worked |= match self.phase {
            Phase::Open => self.drive(),
            Phase::Closing { .. } => self.take_submissions() | self.let_go(),
            Phase::Detached | Phase::Closed(_) => self.take_submissions(),
        };
        if self.shared.has_orphans() {
            self.bury_orphans();
            worked = true;
        }
        self.show();
        worked
    }

    /// Whether the ring is closed and every entry that was with the device has completed.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed(_))
    }

    fn attend_control(&mut self) -> bool {
        let wishes = self.shared.take_control();
        if wishes == 0 {
            return false;
        }
        let asked = self.shared.cancels_asked();
        if wishes & (control::CANCEL | control::CANCEL_ALL) != 0 {
            // What a cancel finds in the SQ is not the device's any more.
            self.sq_consumer.ready();
            self.take_submissions();
        }
        if wishes & control::CANCEL_ALL != 0 {
            self.cancel(None);
            self.completions.publish();
            self.shared.cancels_done(asked);
        }
        if wishes & control::STOP != 0 {
            self.begin_close(Some(Closed::Stopped));
        } else {
            // With both pending, REOPEN is the older: it comes only when nobody is attached.
            if wishes & control::REOPEN != 0 && matches!(self.phase, Phase::Detached) {
                self.reopen();
            }
            if wishes & control::DETACH != 0 && matches!(self.phase, Phase::Open) {
                // What was submitted before the restart is cancelled by it.
                self.sq_consumer.ready();
                self.take_submissions();
                self.begin_close(None);
            }
        }
        true
    }

    /// Posts the submissions that are known, or refuses them, and carries out the cancels among them.
    /// Returns whether there were any.
    fn take_submissions(&mut self) -> bool {
        if self.sq_consumer.known() == 0 {
            return false;
        }
        loop {
            match self.refusal() {
                None => self.posted.take_in(&mut self.sq_consumer, self.shared.number),
                Some(outcome) => {
                    while let Some(sqe) = self.sq_consumer.front() {
                        let class = sqe.class();
                        let (frame, user_data) = sqe.take();
                        self.completions.push(class, frame, user_data, outcome);
                    }
                }
            }
            self.sq_consumer.retire();
            // What comes behind the packets is a cancel.
            let Some(submission) = self.sq_consumer.pop() else { return true };
            let Submission::Cancel { user_data, target } = submission else {
                unreachable!("the packets were taken")
            };
            let matched = self.cancel(target);
            self.completions.cancelled(target.is_none(), matched, user_data);
        }
    }

    /// How an entry ends that came too late for the device.
    fn refusal(&self) -> Option<Outcome> {
        match self.phase {
            Phase::Open | Phase::Detached | Phase::Closing { then: None, .. } => None,
            Phase::Closing { then: Some(closed), .. } | Phase::Closed(closed) => {
                Some(closed.outcome())
            }
        }
    }

    /// Completes the posted entries of `target` (or all) as cancelled and asks the queue for those
    /// it keeps. Returns how many there are.
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
            match guard(|| queue.cancel(target)) {
                Ok(kept) => matched += kept,
                Err(Panicked) => self.panicked(),
            }
        }
        matched
    }

    /// Lets the device make progress once, with what it has left and what is in the SQ.
    fn drive(&mut self) -> bool {
        let rang = self.shared.take_device_rang();
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
        let waits = self.stall.as_ref().is_some_and(|stall| Instant::now() < stall.next);
        let write_limit = if waits { 0 } else { self.caps.max_write_batch };
        let number = self.shared.number;
        let limits = [self.caps.max_read_batch, write_limit];
        let sink = Sink::Ring(&mut self.completions);
        let sq_consumer = Some(&mut self.sq_consumer);
        let mut io = Io::new(number, &mut self.posted, sq_consumer, sink, limits);
        let result = guard(|| queue.poll(&mut io));
        let taken = io.taken();
        self.sq_consumer.retire();
        let completed = self.settle_kept(taken);
        self.shared.counters.poller.device_wakeups.add(rang.into());
        let moved = submitted || completed || taken != [0; 2];
        match result {
            Ok(Ok(progress)) => {
                // What the device has not looked at in the SQ was offered as well.
                self.take_submissions();
                // A device may also put back what it took in an earlier call.
                let taken = taken[1].max(0) as usize;
                let offered = (taken + self.posted.writes.len()).min(write_limit as usize);
                if offered > 0 {
                    self.writes_taken(taken, offered);
                }
                moved || (progress == Progress::More && !self.posted.reads.is_empty())
            }
            Ok(Err(status)) => {
                tracing::warn!(ring = number, %status, "the device failed for good");
                self.begin_close(Some(Closed::Failed(status)));
                true
            }
            Err(Panicked) => {
                self.panicked();
                true
            }
        }
    }

    /// Keeps the books of a device call that has taken so many reads and writes: what it has not brought
    /// back, it keeps. Returns whether it completed anything.
    fn settle_kept(&mut self, taken: [i64; 2]) -> bool {
        let ended = self.completions.end_batch();
        for i in 0..2 {
            self.kept[i] += taken[i] - i64::from(ended[i]);
        }
        ended != [0; 2]
    }

    /// Keeps the books of a stall: the device took `taken` of `offered` writes.
    fn writes_taken(&mut self, taken: usize, offered: usize) {
        if taken == offered {
            self.stall = None;
            return;
        }
        let attempts = match &self.stall {
            // It moves: a new stall, with a budget of its own, begins at most here.
            _ if taken > 0 => 1,
            None => 1,
            Some(stall) => stall.attempts + 1,
        };
        self.shared.counters.poller.retries.add(1);
        if attempts >= self.retry.attempts {
            // Once a stall: past its budget every later write comes here.
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
        // Past the budget the count stays, so that later writes get one attempt each.
        let attempts = attempts.min(self.retry.attempts);
        self.stall = Some(Stall { attempts, next: after(self.retry.delay) });
    }

    /// Begins to close the queue: for good, or (`None`) to open it anew.
    fn begin_close(&mut self, then: Option<Closed>) {
        if let Some(closed) = then {
            self.shared.close(closed);
        }
        match self.phase {
            Phase::Closed(_) => return,
            // A restart's close becomes a close for good.
            Phase::Closing { deadline, then: before } => {
                self.phase = Phase::Closing { deadline, then: before.or(then) };
            }
            Phase::Open => {
                let deadline = after(self.close_timeout);
                self.phase = Phase::Closing { deadline, then };
            }
            Phase::Detached => {
                if let Some(closed) = then {
                    self.phase = Phase::Closed(closed);
                    self.claim = None;
                }
            }
        }
        let outcome = then.map_or(Outcome::Cancelled, Closed::outcome);
        self.complete_posted(outcome);
        self.stall = None;
    }

    fn complete_posted(&mut self, outcome: Outcome) {
        for list in [&mut self.posted.reads, &mut self.posted.writes] {
            while let Some(slot) = list.pop_front() {
                self.completions.complete(slot, outcome);
            }
        }
    }

    /// Asks the queue to let go; ends the closing when it has, or when the time is up.
    fn let_go(&mut self) -> bool {
        let Phase::Closing { deadline, then } = self.phase else { return false };
        let before = self.kept;
        let mut free = true;
        if let Some(queue) = &mut self.queue {
            let number = self.shared.number;
            let mut nothing = Posted::default();
            let undone = then.map_or(Outcome::Cancelled, Closed::outcome);
            self.completions.set_undone(undone);
            let sink = Sink::Ring(&mut self.completions);
            let mut io = Io::new(number, &mut nothing, None, sink, [0; 2]);
            let result = guard(|| queue.close(&mut io));
            let taken = io.taken();
            self.completions.set_undone(Outcome::Cancelled);
            // A device that puts slots back instead of cancelling them.
            self.posted.reads.append(&mut nothing.reads);
            self.posted.writes.append(&mut nothing.writes);
            self.settle_kept(taken);
            if then.is_some() {
                self.complete_posted(undone);
            }
            match result {
                Ok(closed) => free = closed,
                Err(Panicked) => {
                    self.panicked();
                    return true;
                }
            }
        }
        if free {
            self.drop_queue();
            self.closed(then);
            return true;
        }
        if Instant::now() >= deadline {
            let slots = self.slots_kept();
            tracing::error!(ring = self.shared.number, slots, "leaked: the device holds on");
            // On purpose: somebody may still write to these slots.
            self.descriptor = None;
            if let Some(queue) = self.queue.take() {
                std::mem::forget(queue);
                std::mem::forget(self.group.device.clone());
                std::mem::forget(self.claim.take());
            }
            self.closed(Some(then.unwrap_or(Closed::Failed(Status::Failure))));
            return true;
        }
        self.kept != before
    }

    /// Slots that the device took and has not given back. On a closed ring they may still come, when
    /// somebody drops them; what never comes is leaked.
    pub(crate) fn slots_kept(&self) -> usize {
        (self.kept[0] + self.kept[1]).max(0) as usize
    }

    /// The queue is gone.
    fn closed(&mut self, then: Option<Closed>) {
        self.bury_orphans();
        match then {
            Some(closed) => {
                self.shared.close(closed);
                self.phase = Phase::Closed(closed);
                self.complete_posted(closed.outcome());
                self.claim = None;
                tracing::debug!(ring = self.shared.number, ?closed, "ring closed");
            }
            None => self.phase = Phase::Detached,
        }
        self.group.detached();
    }

    fn reopen(&mut self) {
        if !self.group.try_attach() {
            // Another restart is under way, and will say when it is over.
            return;
        }
        match guard(|| open(&*self.group.device, self.direction, &self.shared)) {
            Ok(Ok(Opened { queue, caps, descriptor })) => {
                (self.caps, self.descriptor) = (caps, descriptor);
                self.queue = Some(queue);
                self.phase = Phase::Open;
                if self.settled {
                    self.settle();
                }
                self.shared.counters.poller.restarts.add(1);
                // Whatever came between is looked at once.
                self.shared.device_rang();
            }
            Err(Panicked) => {
                self.panicked();
                self.group.detached();
            }
            Ok(Err(error)) => {
                tracing::error!(ring = self.shared.number, %error, "no queue after the restart");
                let status = match error {
                    Error::Vmnet(status) => status,
                    _ => Status::Failure,
                };
                self.begin_close(Some(Closed::Failed(status)));
                self.group.detached();
            }
        }
    }

    /// The device panicked: it is not called again, and what it held comes home.
    pub(crate) fn panicked(&mut self) {
        tracing::error!(ring = self.shared.number, "the device panicked");
        self.shared.close(Closed::DevicePanicked);
        let attached = self.queue.is_some();
        self.drop_queue();
        self.phase = Phase::Closed(Closed::DevicePanicked);
        self.complete_posted(Outcome::DevicePanicked);
        self.claim = None;
        if attached {
            self.closed(Some(Closed::DevicePanicked));
        }
    }

    /// Drops the queue; the slots it kept become orphans.
    fn drop_queue(&mut self) {
        self.descriptor = None;
        self.queues_closed += 1;
        if let Some(queue) = self.queue.take()
            && guard(|| drop(queue)).is_err()
        {
            tracing::error!(ring = self.shared.number, "the device panicked while dropped");
        }
    }

    /// Completes what a device dropped.
    fn bury_orphans(&mut self) {
        let outcome = match self.phase {
            Phase::Open | Phase::Detached => Outcome::Abandoned,
            Phase::Closing { then: None, .. } => Outcome::Cancelled,
            Phase::Closing { then: Some(closed), .. } | Phase::Closed(closed) => closed.outcome(),
        };
        let mut orphans = std::mem::take(&mut self.orphans);
        self.shared.take_orphans(&mut orphans);
        for orphan in orphans.drain(..) {
            self.kept[list_of(orphan.class)] -= 1;
            self.completions.push(orphan.class, orphan.frame, orphan.user_data, outcome);
        }
        self.orphans = orphans;
    }

    /// Publishes completions and notifies a sleeping reaper when its wish is met.
    fn show(&mut self) {
        let news = self.completions.publish();
        if !news && self.coalesce.is_none() && !self.shared.wants_coalescing() {
            return;
        }
        let index = self.completions.index();
        // Whoever drives the engine himself is awake.
        if news && !self.shared.is_inline() && self.shared.notify_if_due(index) {
            self.coalesce = None;
            self.shared.counters.poller.notifications.add(1);
            return;
        }
        // Somebody waits for more than there is: from the first completion on, the clock runs.
        match self.shared.coalescing() {
            Some((arming, delay)) if self.completions.backlog() > 0 => {
                // An older arming's clock is not this one's.
                self.coalesce = self.coalesce.filter(|(of, _)| *of == arming);
                let (_, due) = *self.coalesce.get_or_insert_with(|| (arming, after(delay)));
                if Instant::now() >= due {
                    self.coalesce = None;
                    self.shared.notify();
                    self.shared.counters.poller.notifications.add(1);
                }
            }
            _ => self.coalesce = None,
        }
    }

    /// Arms the ring's doorbell. False (and disarmed) if there is something to do after all; else
    /// whoever brings work rings.
    pub(crate) fn try_sleep(&mut self) -> bool {
        self.shared.bell.arm();
        let nothing =
            self.sq_consumer.ready() == 0 && !self.shared.has_wishes() && self.arm_queue();
        if nothing {
            self.shared.counters.poller.parks.add(1);
        } else {
            self.shared.bell.disarm();
        }
        nothing
    }

    fn arm_queue(&mut self) -> bool {
        let Some(queue) = &mut self.queue else { return true };
        match guard(|| (queue.arm(), fd_of(&**queue))) {
            Ok((armed, descriptor)) => {
                self.descriptor = descriptor;
                // A queue that has packets but no posted read has nothing to do.
                armed || (self.posted.reads.is_empty() && self.kept == [0; 2])
            }
            Err(Panicked) => {
                self.panicked();
                false
            }
        }
    }

    /// When the engine wants to be turned although nobody rings.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let closing = match self.phase {
            Phase::Closing { deadline, .. } => Some(deadline.min(Instant::now() + CLOSE_RETRY)),
            _ => None,
        };
        let stall = self.stall.as_ref().filter(|_| !self.posted.writes.is_empty()).map(|s| s.next);
        let safety = match self.phase {
            Phase::Open => self.caps.safety_poll.map(after),
            _ => None,
        };
        [closing, stall, safety, self.coalesce.map(|(_, due)| due)].into_iter().flatten().min()
    }

    /// What its sleeper sleeps on as well. None while nothing is posted: a packet that nobody can
    /// take would end each sleep at once.
    pub(crate) fn descriptor(&self) -> Option<RawFd> {
        let waits = !self.posted.reads.is_empty() || self.kept != [0; 2];
        self.descriptor.filter(|_| waits)
    }

    /// Tells the descriptors of one queue from those of the next, whose numbers may be the same.
    #[cfg(target_os = "linux")]
    pub(crate) fn queues_closed(&self) -> u64 {
        self.queues_closed
    }

    /// Whether its device has one.
    pub(crate) fn has_descriptor(&self) -> bool {
        self.descriptor.is_some()
    }

    /// The device is to be polled even if it did not ring: its descriptor or the safety poll says
    /// so.
    pub(crate) fn look_at_device(&self) {
        self.shared.device_rang();
    }
}

/// A queue of a device, and what is asked only when it is opened.
struct Opened {
    queue: Box<dyn Queue>,
    caps: Capabilities,
    descriptor: Option<RawFd>,
}

fn open(
    device: &dyn Device,
    direction: Direction,
    shared: &Arc<RingShared>,
) -> Result<Opened, Error> {
    let queue = device.queue(direction, Wake::ring(shared.clone()))?;
    let descriptor = fd_of(&*queue);
    Ok(Opened { queue, caps: device.capabilities(), descriptor })
}

fn fd_of(queue: &dyn Queue) -> Option<RawFd> {
    queue.descriptor().map(|fd| fd.as_raw_fd())
}

/// Where a poller leaves an engine whose ring is closed, for the reaping half to take.
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
    /// Nobody will come for it.
    Abandoned,
}

impl Handoff {
    pub(crate) fn give(&self, engine: Engine) {
        let mut state = lock(&self.state);
        if matches!(*state, HandoffState::Running) {
            *state = HandoffState::Returned(Box::new(engine));
            drop(state);
            self.changed.notify_all();
        }
    }

    pub(crate) fn abandon(&self) {
        // Dropped outside the lock.
        let before = std::mem::replace(&mut *lock(&self.state), HandoffState::Abandoned);
        drop(before);
    }

    /// Takes the engine if it is there, waiting up to `timeout` for it.
    pub(crate) fn take(&self, timeout: Duration) -> Option<Box<Engine>> {
        let deadline = after(timeout);
        let mut state = lock(&self.state);
        loop {
            if matches!(*state, HandoffState::Returned(_)) {
                let taken = std::mem::replace(&mut *state, HandoffState::Abandoned);
                let HandoffState::Returned(engine) = taken else { unreachable!("just seen") };
                return Some(engine);
            }
            let left = deadline.saturating_duration_since(Instant::now());
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
