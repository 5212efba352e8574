//! The poller: submission queue -> batches -> device -> completion queue.
//!
//! An *engine* is one ring's share of that work; it never blocks. A [`Poller`] is a thread that turns
//! the engines of one ring or of many; with `Drive::Inline` the reaping half turns its engine itself.
//!
//! A poller turns only engines that have something to do. An engine that runs dry arms its ring's
//! doorbell and leaves the active list; whoever rings puts a bit into the poller's ready set and
//! rings the poller's own doorbell, which costs a system call only if the thread sleeps. So the cost
//! of a turn does not grow with the number of idle rings.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, OnceLock, mpsc};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use vmring_core::{Intake, Outcome, Outlet, Submission};

use crate::config::Direction;
use crate::device::catch::{Panicked, guard};
use crate::device::completions::Completions;
use crate::device::io::{Io, Posted, Sink};
use crate::device::seam::{Capabilities, Device, Progress, Queue, Wake};
use crate::device::slot::list_of;
use crate::error::{Closed, ConfigError, Error, Status};
use crate::fifo::Fifo;
use crate::lifecycle::{Claim, INTERFACE_BUSY, RingGroup};
use crate::mailbox::ready::{RINGS_MAX, ReadySet};
use crate::mailbox::{RingShared, control};
use crate::policy::{IdlePolicy, RetryPolicy};
use crate::sys::{after, lock, poll, poll_in};

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
    pub(crate) intake: Intake,
    pub(crate) outlet: Outlet,
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
    intake: Intake,
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
        let EngineParts { intake, outlet, group, direction, shared, retry, .. } = parts;
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
            intake,
            completions: Completions::new(outlet, shared.clone()),
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
    fn settle(&mut self) {
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
        if self.intake.ready() > 0 && !self.shared.is_inline() {
            self.intake.prefetch();
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
            self.intake.ready();
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
                self.intake.ready();
                self.take_submissions();
                self.begin_close(None);
            }
        }
        true
    }

    /// Posts the submissions that are known, or refuses them, and carries out the cancels among them.
    /// Returns whether there were any.
    fn take_submissions(&mut self) -> bool {
        if self.intake.known() == 0 {
            return false;
        }
        loop {
            match self.refusal() {
                None => self.posted.take_in(&mut self.intake, self.shared.number),
                Some(outcome) => {
                    while let Some(parcel) = self.intake.front() {
                        let class = parcel.class();
                        let (frame, user_data) = parcel.open();
                        self.completions.push(class, frame, user_data, outcome);
                    }
                }
            }
            self.intake.retire();
            // What comes behind the packets is a cancel.
            let Some(submission) = self.intake.pop() else { return true };
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
        let submitted = self.intake.known() > 0;
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
        let intake = Some(&mut self.intake);
        let mut io = Io::new(number, &mut self.posted, intake, sink, limits);
        let result = guard(|| queue.poll(&mut io));
        let taken = io.taken();
        self.intake.retire();
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
        let nothing = self.intake.ready() == 0 && !self.shared.has_wishes() && self.arm_queue();
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
            Phase::Closing { deadline, .. } => {
                Some(deadline.min(Instant::now() + Duration::from_millis(1)))
            }
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

impl Closed {
    /// How an entry ends on a ring closed for this reason.
    fn outcome(self) -> Outcome {
        match self {
            Closed::Stopped => Outcome::Cancelled,
            Closed::Failed(status) => status.into(),
            Closed::DevicePanicked => Outcome::DevicePanicked,
        }
    }
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
    fn give(&self, engine: Engine) {
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

/// The part of a poller that rings and ringers see.
#[derive(Debug)]
pub(crate) struct PollerShared {
    pub(crate) set: Arc<ReadySet>,
    arrivals: Mutex<Arrivals>,
    thread: OnceLock<ThreadId>,
}

#[derive(Debug, Default)]
struct Arrivals {
    engines: Vec<(usize, Engine, Arc<Handoff>)>,
    free: Vec<usize>,
    used: usize,
    /// The last handle to the poller is gone: end when the last ring is.
    orphaned: bool,
}

impl PollerShared {
    /// A place in the ready set.
    pub(crate) fn reserve(&self) -> Result<usize, Error> {
        let mut arrivals = lock(&self.arrivals);
        if let Some(place) = arrivals.free.pop() {
            return Ok(place);
        }
        if arrivals.used == RINGS_MAX {
            let (value, max) = (RINGS_MAX as u64 + 1, RINGS_MAX as u64);
            let what = "number of rings on one poller";
            return Err(ConfigError::TooLarge { what, value, max }.into());
        }
        arrivals.used += 1;
        Ok(arrivals.used - 1)
    }

    pub(crate) fn unreserve(&self, place: usize) {
        lock(&self.arrivals).free.push(place);
    }

    pub(crate) fn adopt(&self, place: usize, engine: Engine, handoff: Arc<Handoff>) {
        lock(&self.arrivals).engines.push((place, engine, handoff));
        self.set.arrived.store(true, Ordering::Release);
        self.set.bell.ring();
    }

    pub(crate) fn is_current_thread(&self) -> bool {
        self.thread.get() == Some(&thread::current().id())
    }
}

/// A thread that drives rings: `Drive::Shared(&poller)`.
///
/// It ends when this handle is gone and the last of its rings is closed.
#[derive(Debug)]
pub struct Poller {
    shared: Arc<PollerShared>,
}

/// Makes a [`Poller`].
#[derive(Clone, Debug, Default)]
pub struct PollerBuilder {
    name: Option<String>,
    cpu: Option<usize>,
    idle: IdlePolicy,
}

impl PollerBuilder {
    /// The thread's name. Default `vmring-poller`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Keeps the thread on one processor, counted from 0. Linux only: macOS offers no such call.
    pub fn cpu(mut self, cpu: usize) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// How the thread waits for work.
    pub fn idle(mut self, idle: IdlePolicy) -> Self {
        self.idle = idle;
        self
    }

    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system refuses the thread or the processor, [`Error::NotSupported`] for
    /// a processor on a system that cannot.
    pub fn start(self) -> Result<Poller, Error> {
        let shared = Arc::new(PollerShared {
            set: Arc::new(ReadySet::new()),
            arrivals: Mutex::default(),
            thread: OnceLock::new(),
        });
        let (started, starting) = mpsc::sync_channel(1);
        let thread = {
            let shared = shared.clone();
            thread::Builder::new()
                .name(self.name.unwrap_or_else(|| "vmring-poller".to_owned()))
                .spawn(move || {
                    let pinned = self.cpu.map_or(Ok(()), pin_to);
                    let go = pinned.is_ok();
                    let _ = shared.thread.set(thread::current().id());
                    let _ = started.send(pinned);
                    if go {
                        run(&shared, self.idle);
                    }
                })
        };
        thread.map_err(Error::io("starting the poller's thread"))?;
        starting.recv().unwrap_or_else(|_| {
            Err(Error::Io {
                what: "starting the poller's thread",
                source: std::io::ErrorKind::BrokenPipe.into(),
            })
        })?;
        Ok(Poller { shared })
    }
}

#[cfg(target_os = "linux")]
fn pin_to(cpu: usize) -> Result<(), Error> {
    // SAFETY: a cpu_set_t is a plain bit set, for which all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= libc::CPU_SETSIZE as usize {
        let source = std::io::ErrorKind::InvalidInput.into();
        return Err(Error::Io { what: "pinning the poller's thread", source });
    }
    // SAFETY: `cpu` is within the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer and size are those of the set; 0 is the calling thread.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } != 0 {
        return Err(Error::io("pinning the poller's thread")(std::io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn pin_to(_cpu: usize) -> Result<(), Error> {
    Err(Error::NotSupported {
        what: "pinning a thread to a processor",
        device: std::env::consts::OS.to_owned(),
    })
}

impl Poller {
    /// A poller thread with the defaults.
    pub fn start() -> Result<Self, Error> {
        Self::builder().start()
    }

    /// A poller thread with settings.
    pub fn builder() -> PollerBuilder {
        PollerBuilder::default()
    }

    pub(crate) fn shared(&self) -> &Arc<PollerShared> {
        &self.shared
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        lock(&self.shared.arrivals).orphaned = true;
        self.shared.set.arrived.store(true, Ordering::Release);
        self.shared.set.bell.ring();
    }
}

/// A ring's place on a poller's thread.
struct Seat {
    engine: Engine,
    handoff: Arc<Handoff>,
    /// Rounds without work.
    idle: u32,
    active: bool,
    /// Whether it stands in the list of those with a time or a descriptor.
    watched: bool,
    /// When it wants to be turned although nobody rings; looked at only while inactive.
    wake_at: Option<Instant>,
}

/// What became of a seat's turn.
enum Turned {
    Worked,
    /// For that many rounds before this one as well.
    Idle(u32),
    Asleep,
    Closed,
}

impl Seat {
    fn turn(&mut self, idle: IdlePolicy) -> Turned {
        // The engine catches what its device does. Whatever panics besides (what a panic carried,
        // when it is dropped; a subscriber of our traces) is this ring's end and nobody else's.
        guard(|| self.turn_unguarded(idle)).unwrap_or_else(|Panicked| {
            let _ = guard(|| self.engine.panicked());
            Turned::Closed
        })
    }

    fn turn_unguarded(&mut self, idle: IdlePolicy) -> Turned {
        let worked = self.engine.turn();
        if self.engine.is_closed() {
            Turned::Closed
        } else if worked {
            self.idle = 0;
            Turned::Worked
        } else if self.idle < idle.rounds() {
            self.idle += 1;
            Turned::Idle(self.idle - 1)
        } else if self.engine.try_sleep() {
            self.active = false;
            self.wake_at = self.engine.deadline();
            Turned::Asleep
        } else {
            Turned::Worked
        }
    }
}

fn run(shared: &PollerShared, idle: IdlePolicy) {
    let mut seats: Vec<Option<Seat>> = Vec::new();
    let mut active: Vec<usize> = Vec::new();
    let mut watched: Vec<usize> = Vec::new();
    let mut descriptors: Vec<libc::pollfd> = Vec::new();
    let mut seated = 0;
    let mut orphaned = false;
    let mut look = Look::default();
    loop {
        if shared.set.arrived.swap(false, Ordering::AcqRel) {
            let mut arrivals = lock(&shared.arrivals);
            orphaned |= arrivals.orphaned;
            for (place, mut engine, handoff) in arrivals.engines.drain(..) {
                engine.settle();
                if seats.len() <= place {
                    seats.resize_with(place + 1, || None);
                }
                let wake_at = None;
                let (active_now, watched) = (true, false);
                seats[place] =
                    Some(Seat { engine, handoff, idle: 0, active: active_now, wake_at, watched });
                active.push(place);
                seated += 1;
            }
            // Room for all, now, so that nothing grows on a packet's way.
            active.reserve(seats.len().saturating_sub(active.len()));
            watched.reserve(seats.len().saturating_sub(watched.len()));
            descriptors.reserve(seats.len() + 1);
        }
        shared.set.collect(|place| activate(&mut seats, &mut active, place));

        let mut worked = false;
        let mut rounds = u32::MAX;
        let mut i = 0;
        while let Some(&place) = active.get(i) {
            let seat = seats[place].as_mut().expect("an active place is taken");
            match seat.turn(idle) {
                Turned::Worked => worked = true,
                Turned::Idle(round) => rounds = rounds.min(round),
                Turned::Asleep => {
                    let watch = seat.wake_at.is_some() || seat.engine.descriptor().is_some();
                    if watch && !seat.watched {
                        seat.watched = true;
                        watched.push(place);
                    }
                    active.swap_remove(i);
                    continue;
                }
                Turned::Closed => {
                    let seat = seats[place].take().expect("as above");
                    active.swap_remove(i);
                    if seat.watched {
                        // Or whoever takes the place next would stand there twice.
                        watched.retain(|watched| *watched != place);
                    }
                    seated -= 1;
                    leave(shared, place, seat);
                    worked = true;
                    continue;
                }
            }
            i += 1;
        }
        if !active.is_empty() && !watched.is_empty() && look.is_due(active.len()) {
            // Those who sleep are not to wait until everybody does.
            look.at(&mut seats, &mut active, &mut watched, &mut descriptors);
        }
        if worked {
            continue;
        }
        if !active.is_empty() {
            idle.pause(rounds);
            continue;
        }
        if orphaned && seated == 0 {
            // No handle, so nobody can add a ring; no ring, so nobody rings.
            return;
        }
        sleep(shared, &mut seats, &mut active, &mut watched, &mut descriptors);
    }
}

fn activate(seats: &mut [Option<Seat>], active: &mut Vec<usize>, place: usize) {
    // A bit may outlive its ring.
    if let Some(Some(seat)) = seats.get_mut(place)
        && !seat.active
    {
        seat.active = true;
        seat.idle = 0;
        active.push(place);
    }
}

/// A closed ring leaves: its engine goes to the reaping half, which may be waiting for it.
fn leave(shared: &PollerShared, place: usize, seat: Seat) {
    let Seat { engine, handoff, .. } = seat;
    let ring = engine.shared.clone();
    // Nobody may want it any more; then the device may end here, whose code that is.
    if guard(|| handoff.give(engine)).is_err() {
        tracing::error!(ring = ring.number, "the device panicked while dropped");
    }
    shared.unreserve(place);
    ring.notify();
}

/// Nothing is active: sleeps until somebody rings, a descriptor is readable, or a ring's time has
/// come. `watched` are the places of the rings with a time or a descriptor: the others cost nothing
/// here.
fn sleep(
    shared: &PollerShared,
    seats: &mut [Option<Seat>],
    active: &mut Vec<usize>,
    watched: &mut Vec<usize>,
    descriptors: &mut Vec<libc::pollfd>,
) {
    let wake_at = gather(seats, watched, descriptors);
    // The notifier's own.
    descriptors.push(poll_in(-1));
    let timeout = wake_at.map(|at| at.saturating_duration_since(Instant::now()));
    shared.set.bell.arm();
    if !shared.set.has_news() {
        shared.set.bell.parker().park_on(timeout, descriptors);
    }
    shared.set.bell.disarm();
    if !watched.is_empty() {
        attend(seats, active, watched, descriptors, Instant::now());
    }
}

/// The descriptors of those who sleep, and the first of their times.
fn gather(
    seats: &[Option<Seat>],
    watched: &[usize],
    descriptors: &mut Vec<libc::pollfd>,
) -> Option<Instant> {
    let mut wake_at: Option<Instant> = None;
    descriptors.clear();
    for &place in watched {
        let Some(seat) = seats[place].as_ref().filter(|seat| !seat.active) else { continue };
        wake_at = [wake_at, seat.wake_at].into_iter().flatten().min();
        if let Some(fd) = seat.engine.descriptor() {
            descriptors.push(poll_in(fd));
        }
    }
    wake_at
}

/// When a poller that is busy looks after those who sleep: now and then, and never in a packet's
/// share of a round.
#[derive(Debug, Default)]
struct Look {
    turns: usize,
    /// Before then no descriptor is polled again.
    next: Option<Instant>,
}

impl Look {
    /// Turns of rings between two looks at the clock.
    const EVERY: usize = 32;
    /// The least time between two system calls for descriptors: a few times what one costs.
    const PAUSE: Duration = Duration::from_micros(50);

    /// Counts a round of so many turns.
    fn is_due(&mut self, turns: usize) -> bool {
        self.turns += turns;
        let due = self.turns >= Self::EVERY;
        if due {
            self.turns = 0;
        }
        due
    }

    fn at(
        &mut self,
        seats: &mut [Option<Seat>],
        active: &mut Vec<usize>,
        watched: &mut Vec<usize>,
        descriptors: &mut Vec<libc::pollfd>,
    ) {
        let now = Instant::now();
        let wake_at = gather(seats, watched, descriptors);
        if self.next.is_some_and(|next| now < next) {
            descriptors.clear();
        }
        if !descriptors.is_empty() {
            self.next = now.checked_add(Self::PAUSE);
            poll(descriptors, 0);
        }
        if !descriptors.is_empty() || wake_at.is_some_and(|at| at <= now) {
            attend(seats, active, watched, descriptors, now);
        }
    }
}

/// Turns those again whose time has come or whose descriptor is readable.
fn attend(
    seats: &mut [Option<Seat>],
    active: &mut Vec<usize>,
    watched: &mut Vec<usize>,
    descriptors: &[libc::pollfd],
    now: Instant,
) {
    watched.retain(|&place| {
        let Some(seat) = &mut seats[place] else { return false };
        let due = seat.wake_at.is_some_and(|at| at <= now);
        let readable = seat
            .engine
            .descriptor()
            .is_some_and(|fd| descriptors.iter().any(|poll| poll.fd == fd && poll.revents != 0));
        if !seat.active && (due || readable) {
            // It was not rung awake, so its doorbell is still armed.
            seat.engine.shared.bell.disarm();
            seat.engine.look_at_device();
            seat.active = true;
            seat.idle = 0;
            active.push(place);
        }
        seat.watched = !seat.active;
        seat.watched
    });
}
