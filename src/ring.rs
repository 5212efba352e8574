//! [`Ring`]: submit frames, reap completions.
//!
//! ```
//! use vmring::{Direction, Interface, Loopback};
//!
//! let interface = Interface::builder().device(Loopback::new(1500)).start()?;
//! let mut ring = interface.ring(Direction::Both).build()?;
//!
//! // Somewhere for packets to arrive, and a packet.
//! let frame = ring.alloc().expect("a fresh ring has free frames");
//! ring.submit_read(frame, 1)?;
//! let mut frame = ring.alloc().expect("as above");
//! frame.copy_from(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello")?;
//! ring.submit_write(frame, 2)?;
//!
//! while ring.in_flight() > 0 {
//!     ring.wait(1, None);
//!     for done in ring.reap() {
//!         let frame = done.frame_ok()?;
//!         if done.user_data == 1 {
//!             assert_eq!(frame.view().be16(12), Some(0x88b5));
//!         }
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```

use std::cell::Cell;
use std::fmt;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use static_assertions::{assert_impl_all, assert_not_impl_any};
use vmring_core::doorbell::Park;
use vmring_core::offload::{self, OffloadHeader};
use vmring_core::{Class, Frame, Opcode, Outcome, Pool, Reaped, Reaper, Refusal, Submitter};

use crate::device::seam::Capabilities;
use crate::engine::{Engine, Handoff};
use crate::error::{
    BatchError, Closed, CompletionError, EntryError, Error, SubmitError, SubmitErrorKind,
};
use crate::mailbox::{DELAY_BITS, DELAY_MAX_US, RingShared, START_CLOCK, control};
use crate::notify::Notifier;
use crate::policy::IdlePolicy;
use crate::poller::PollerShared;
use crate::software::{self, Left};
use crate::stats::RingStats;
use crate::sys::{after, poll_in};

#[cfg(target_os = "linux")]
use std::cell::OnceCell;

#[cfg(target_os = "linux")]
use crate::notify::Both;

/// Whether what is submitted is published and rung for later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Debt {
    /// No: at once.
    None,
    /// It may be, and nothing is.
    Allowed,
    /// Something is.
    Owed,
}

/// What a submit asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A packet into the frame.
    Read,
    /// The frame's packet out.
    Write,
    /// Entries to be completed now.
    Cancel,
}

/// What became of one submission.
///
/// The frame comes back on success **and** on error; a cancel has none. Take it with
/// [`frame_ok`](Self::frame_ok) (an error if there is no packet), [`frame`](Self::frame) (in any
/// case) or all at once with [`into_parts`](Self::into_parts).
pub struct Completion {
    /// The number given at submit.
    pub user_data: u64,
    /// What was asked.
    pub op: Op,
    /// The packet's length in bytes; of a cancel, the number of entries that matched.
    pub result: Result<usize, EntryError>,
    /// A cell, so that the frame can be taken while `user_data` is still read, as the hot loop
    /// wants.
    frame: Cell<Option<Frame>>,
}

assert_impl_all!(Completion: Send);

impl Completion {
    #[inline]
    fn new(reaped: Reaped) -> Self {
        let op = match reaped.opcode {
            Opcode::Read => Op::Read,
            Opcode::Write => Op::Write,
            Opcode::Cancel | Opcode::CancelAll => Op::Cancel,
        };
        let result = match reaped.outcome {
            Outcome::Done => Ok(reaped.len as usize),
            failed => Err(Self::error(failed)),
        };
        Self { user_data: reaped.user_data, op, result, frame: Cell::new(reaped.frame) }
    }

    #[cold]
    fn error(outcome: Outcome) -> EntryError {
        EntryError::from_outcome(outcome).err().unwrap_or(EntryError::Abandoned)
    }

    /// The frame of a read or write that succeeded. Otherwise the error, with the frame inside. The
    /// frame is taken: a second call gives an error without one.
    #[inline]
    pub fn frame_ok(&self) -> Result<Frame, CompletionError> {
        let (error, frame) = match (self.result, self.frame.take()) {
            (Ok(_), Some(frame)) => return Ok(frame),
            (Ok(_), None) => (EntryError::Abandoned, None),
            (Err(error), frame) => (error, frame),
        };
        Err(CompletionError { error, user_data: self.user_data, frame })
    }

    /// The frame, however it ended; `None` for a cancel, or when it was taken before.
    #[inline]
    pub fn frame(&self) -> Option<Frame> {
        self.frame.take()
    }

    /// Everything.
    pub fn into_parts(self) -> (u64, Result<usize, EntryError>, Option<Frame>) {
        (self.user_data, self.result, self.frame.into_inner())
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("user_data", &self.user_data)
            .field("op", &self.op)
            .field("result", &self.result)
            .finish_non_exhaustive()
    }
}

/// The submitting half of a ring.
pub struct SubmissionQueue {
    submitter: Submitter,
    pub(crate) shared: Arc<RingShared>,
    caps: Capabilities,
    /// Other than `None` only while the ring's other half, borrowed together with this one, is reaping.
    debt: Cell<Debt>,
    /// Who submits drives the engine as well: of a ring that is inline and undivided.
    drives: bool,
}

/// The reaping half of a ring. Dropping it closes the ring.
pub struct CompletionQueue {
    reaper: Reaper,
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
    lost: bool,
    /// A close has waited for the device in vain: the next does not wait again.
    waited: bool,
    /// Counts the times it has armed.
    armings: u64,
    /// Of an inline ring over a device that is a descriptor, if somebody has asked for one.
    #[cfg(target_os = "linux")]
    both: OnceCell<Both>,
}

assert_impl_all!(SubmissionQueue: Send);
assert_impl_all!(CompletionQueue: Send);
assert_not_impl_any!(SubmissionQueue: Sync, Clone);
assert_not_impl_any!(CompletionQueue: Sync, Clone);

/// Both halves of a ring. See the [module](self) for an example.
#[derive(Debug)]
pub struct Ring {
    sq: SubmissionQueue,
    cq: CompletionQueue,
}

/// The submitting half, borrowed from its ring by [`Ring::split`]. It dereferences to the
/// [`SubmissionQueue`] for what needs no exclusive access.
///
/// What it submits inside `for done in cq.reap()` is shown to an engine that is awake as soon as it fills
/// cache lines (which takes at most four entries, or sixteen while 32 or more are in flight), the rest when
/// the loop over [`CompletionHalf::reap`] ends; and then the doorbell is rung once, which costs a fence (none
/// with `Drive::Inline`), and a wake-up if the engine sleeps.
///
/// Both borrowed halves stay on one thread; [`Ring::into_split`] is for two.
#[derive(Debug)]
pub struct SubmissionHalf<'a> {
    /// Shared with the other half, which pays its debts.
    sq: &'a SubmissionQueue,
}

/// The reaping half, borrowed from its ring by [`Ring::split`]. It dereferences to the
/// [`CompletionQueue`] for what needs no exclusive access, and stays on its thread as the
/// [other](SubmissionHalf).
#[derive(Debug)]
pub struct CompletionHalf<'a> {
    cq: &'a mut CompletionQueue,
    sq: &'a SubmissionQueue,
}

// Both reach the submission queue, which is not `Sync`. So whoever submits knows whether the other half is
// reaping, without a fence.
assert_not_impl_any!(SubmissionHalf<'_>: Send, Sync);
assert_not_impl_any!(CompletionHalf<'_>: Send, Sync);

impl SubmissionHalf<'_> {
    /// As [`SubmissionQueue::submit_read`]; while the other half is reaping, the doorbell waits for the
    /// end of it.
    ///
    /// # Errors
    ///
    /// As there.
    #[inline]
    pub fn submit_read(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submit(Class::Read, frame, user_data)
    }

    /// As [`SubmissionQueue::submit_write`]; while the other half is reaping, the doorbell waits for
    /// the end of it.
    ///
    /// # Errors
    ///
    /// As there.
    #[inline]
    pub fn submit_write(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submit(Class::Write, frame, user_data)
    }

    #[inline(always)]
    fn submit(&mut self, class: Class, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.sq.push(class, frame, user_data)?;
        if self.sq.debt.get() == Debt::None {
            self.sq.ring_doorbell();
        } else {
            self.sq.debt.set(Debt::Owed);
            self.sq.submitter.publish_lines();
        }
        Ok(())
    }

    /// See [`SubmissionQueue::submit_reads`].
    pub fn submit_reads(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_batch(Class::Read, frames)
    }

    /// See [`SubmissionQueue::submit_writes`].
    pub fn submit_writes(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_batch(Class::Write, frames)
    }

    /// See [`SubmissionQueue::cancel`].
    pub fn cancel(&mut self, target: u64, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.sq.submit_cancel(Some(target), user_data)
    }

    /// See [`SubmissionQueue::cancel_all`].
    pub fn cancel_all(&mut self, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.sq.submit_cancel(None, user_data)
    }

    /// See [`SubmissionQueue::read_credits`].
    pub fn read_credits(&mut self) -> u32 {
        self.sq.submitter.available(Class::Read)
    }

    /// See [`SubmissionQueue::write_credits`].
    pub fn write_credits(&mut self) -> u32 {
        self.sq.submitter.available(Class::Write)
    }

    pub(crate) fn post_reads(&mut self, user_data: u64) -> Result<(), Error> {
        self.sq.post_reads(user_data)
    }
}

impl CompletionHalf<'_> {
    /// As [`CompletionQueue::reap`]. What is submitted meanwhile through the other half is published, and
    /// its doorbell rung, when the iterator is dropped at the latest.
    #[inline]
    pub fn reap(&mut self) -> HalfReap<'_> {
        self.cq.look();
        self.sq.submitter.begin_run(&self.cq.reaper);
        if self.sq.debt.get() == Debt::None {
            self.sq.debt.set(Debt::Allowed);
        }
        HalfReap { reap: Reap { reaper: &mut self.cq.reaper }, sq: self.sq }
    }

    /// See [`CompletionQueue::ready`].
    pub fn ready(&mut self) -> usize {
        self.cq.ready()
    }

    /// See [`CompletionQueue::wait`].
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
        self.cq.wait(min, timeout)
    }
}

impl Deref for SubmissionHalf<'_> {
    type Target = SubmissionQueue;

    #[inline]
    fn deref(&self) -> &SubmissionQueue {
        self.sq
    }
}

impl Deref for CompletionHalf<'_> {
    type Target = CompletionQueue;

    #[inline]
    fn deref(&self) -> &CompletionQueue {
        self.cq
    }
}

impl SubmissionQueue {
    pub(crate) fn new(submitter: Submitter, shared: Arc<RingShared>, caps: Capabilities) -> Self {
        let drives = shared.is_inline();
        Self { submitter, shared, caps, debt: Cell::new(Debt::None), drives }
    }

    /// A frame from the ring's first pool: empty, behind the pool's headroom. `None` if all are
    /// out. (For the hot loop, recycle the frames you reap instead.)
    pub fn alloc(&self) -> Option<Frame> {
        self.submitter.regions().pools()[0].alloc()
    }

    /// Gives `frame` to the device to fill with the next packet. The frame's view is reset first:
    /// the packet will stand behind the pool's headroom.
    ///
    /// After `Ok` exactly one completion with this `user_data` will come, and nothing can refuse it
    /// any more.
    ///
    /// # Errors
    ///
    /// [`SubmitError`] with the frame inside; [`SubmitError::is_backpressure`] tells "later" from
    /// "never".
    #[inline]
    pub fn submit_read(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submit(Class::Read, frame, user_data)
    }

    /// Gives `frame`'s packet to the device to send.
    ///
    /// After `Ok` exactly one completion with this `user_data` will come, with the frame.
    ///
    /// # Errors
    ///
    /// As [`submit_read`](Self::submit_read).
    #[inline]
    pub fn submit_write(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submit(Class::Write, frame, user_data)
    }

    /// Submits reads from an iterator of frames and their `user_data`, with at most one doorbell. Takes
    /// no more from the iterator than it can submit, so a `by_ref` iterator keeps the rest. Returns how
    /// many were submitted.
    ///
    /// How many it can is seen before the iterator is: credits that come back while it runs, because
    /// it reaps, count from the next call on. So collect what was reaped, then submit it.
    ///
    /// # Errors
    ///
    /// [`BatchError`] with the frame that could not be taken for a reason other than backpressure,
    /// and the number of those before it, which are in flight.
    pub fn submit_reads(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.submit_batch(Class::Read, frames)
    }

    /// As [`submit_reads`](Self::submit_reads), for writes.
    pub fn submit_writes(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.submit_batch(Class::Write, frames)
    }

    /// Asks for every entry in flight whose `user_data` is `target` to complete now: cancelled, or
    /// with its packet if it has one (a packet is never dropped by a cancel). The cancel has its own
    /// completion, `user_data`, without a frame; its `result` is the number of entries found.
    ///
    /// # Errors
    ///
    /// Backpressure of the cancels' own credits, or a closed ring.
    pub fn cancel(&mut self, target: u64, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.submit_cancel(Some(target), user_data)
    }

    /// As [`cancel`](Self::cancel), for every entry in flight.
    pub fn cancel_all(&mut self, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.submit_cancel(None, user_data)
    }

    fn submit_cancel(&self, target: Option<u64>, data: u64) -> Result<(), SubmitErrorKind> {
        if let Some(closed) = self.why_closed() {
            return Err(closed.into());
        }
        self.submitter.push_cancel(target, data).map_err(|refusal| self.kind(refusal, None))?;
        self.submitter.publish();
        // Release: who sees the wish sees the cancel, and what was submitted before it.
        self.shared.control.fetch_or(control::CANCEL, Ordering::Release);
        self.shared.ring_doorbell(self.drives);
        Ok(())
    }

    /// Reads that can be submitted before backpressure says no. Reaping makes it more.
    pub fn read_credits(&mut self) -> u32 {
        self.submitter.available(Class::Read)
    }

    /// Writes that can be submitted before backpressure says no. Reaping makes it more.
    pub fn write_credits(&mut self) -> u32 {
        self.submitter.available(Class::Write)
    }

    /// A handle that can be used from anywhere.
    pub fn control(&self) -> RingControl {
        RingControl { shared: self.shared.clone() }
    }

    /// For the front-ends: posts free frames for reading, as many as there are credits, but leaves
    /// some of the pool to writes. A closed ring takes none, which is no error here.
    pub(crate) fn post_reads(&self, user_data: u64) -> Result<(), Error> {
        let pool = &self.submitter.regions().pools()[0];
        let slots = pool.layout().slots;
        let reserve = self.submitter.depth(Class::Write).min((slots / 4).max(u32::from(slots > 1)));
        let free = slots.saturating_sub(pool.slots_out() + reserve);
        for _ in 0..self.submitter.available(Class::Read).min(free) {
            let Some(frame) = self.alloc() else { break };
            match self.submit(Class::Read, frame, user_data) {
                Ok(()) => {}
                Err(refused) if refused.is_backpressure() => break,
                Err(SubmitError { kind: SubmitErrorKind::Closed(_), .. }) => break,
                Err(refused) => return Err(refused.into()),
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn submit(&self, class: Class, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.push(class, frame, user_data)?;
        self.ring_doorbell();
        Ok(())
    }

    /// Writes an entry, which the caller is to publish.
    #[inline(always)]
    fn push(&self, class: Class, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        let frame = self.fitting(class, frame)?;
        if class == Class::Write && (self.caps.headroom > 0 || frame.has_offload_to_send()) {
            return self.push_prepared(frame, user_data);
        }
        self.push_fitting(class, frame, user_data)
    }

    /// Of a write where something may stand in front of the packet. Apart, so that the address of a frame
    /// is given away here only: else it would live in memory on every way.
    #[inline(never)]
    fn push_prepared(&self, mut frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        match self.prepare_offload(&mut frame) {
            Ok(()) => self.push_fitting(Class::Write, frame, user_data),
            Err(kind) => Err(SubmitError { kind, frame }),
        }
    }

    #[inline(always)]
    fn push_fitting(&self, class: Class, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submitter.push(class, frame, user_data).map_err(|(refusal, frame)| SubmitError {
            kind: self.kind(refusal, Some(class)),
            frame,
        })
    }

    fn submit_batch(
        &self,
        class: Class,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        let mut frames = frames.into_iter();
        let mut accepted = 0;
        let result = loop {
            if self.submitter.check(class).is_err() {
                break Ok(accepted);
            }
            let Some((frame, user_data)) = frames.next() else { break Ok(accepted) };
            if let Err(SubmitError { kind, frame }) = self.push(class, frame, user_data) {
                break Err(BatchError { kind, frame, accepted });
            }
            accepted += 1;
            self.submitter.publish_lines();
        };
        if accepted > 0 {
            self.ring_doorbell();
        }
        result
    }

    /// The frame, if nothing refuses it but perhaps the queue.
    #[inline(always)]
    fn fitting(&self, class: Class, mut frame: Frame) -> Result<Frame, SubmitError> {
        if let Some(closed) = self.why_closed() {
            return Err(SubmitError { kind: closed.into(), frame });
        }
        let max = self.caps.max_packet_size as usize;
        if class == Class::Read {
            frame.reset();
            let room = frame.capacity();
            if room < max {
                return Err(SubmitError {
                    kind: SubmitErrorKind::TooSmall { room, needed: max },
                    frame,
                });
            }
        } else if frame.len() > max {
            let kind = SubmitErrorKind::TooBig { len: frame.len(), max };
            return Err(SubmitError { kind, frame });
        }
        let (headroom, needed) = (frame.headroom(), self.caps.headroom as usize);
        if headroom < needed {
            let kind = SubmitErrorKind::NoHeadroom { headroom, needed };
            return Err(SubmitError { kind, frame });
        }
        Ok(frame)
    }

    /// Makes what stands in front of a packet to be sent what the device is to read there: the header
    /// that the caller has set, if it is true and was negotiated, or zeroes. Never what was left there
    /// by another packet.
    fn prepare_offload(&self, frame: &mut Frame) -> Result<(), SubmitErrorKind> {
        let offloads = &self.caps.offloads;
        let header = match frame.has_offload_to_send() {
            true => frame.offload().map_err(SubmitErrorKind::Offload)?.unwrap_or_default(),
            false => OffloadHeader::NONE,
        };
        header.validate(frame.len()).map_err(SubmitErrorKind::Offload)?;
        if software::left_by(offloads, &header) != Left::Nothing {
            return Err(SubmitErrorKind::OffloadNotNegotiated);
        }
        if offloads.virtio_header {
            let room = frame.headroom();
            let needed = offload::LEN;
            frame
                .set_offload(&header.for_sending())
                .map_err(|_| SubmitErrorKind::NoHeadroom { headroom: room, needed })?;
        } else {
            // Plain, and the device takes none.
            frame.clear_offload();
        }
        Ok(())
    }

    #[inline(always)]
    fn why_closed(&self) -> Option<Closed> {
        if self.shared.is_open() { None } else { self.shared.why_closed() }
    }

    #[cold]
    fn kind(&self, refusal: Refusal, class: Option<Class>) -> SubmitErrorKind {
        match refusal {
            Refusal::SqFull => SubmitErrorKind::SqFull,
            Refusal::NoCredit if class.is_some_and(|class| self.submitter.depth(class) == 0) => {
                SubmitErrorKind::WrongDirection
            }
            Refusal::NoCredit => SubmitErrorKind::NoCredit,
            Refusal::ForeignPool => SubmitErrorKind::ForeignPool,
        }
    }

    /// Publishes and rings for what was submitted while the other half was reaping.
    #[inline]
    fn pay(&self) {
        if self.debt.replace(Debt::None) == Debt::Owed {
            self.ring_doorbell();
        }
    }

    /// Publishes, which commits, and wakes the engine if it sleeps.
    #[inline]
    fn ring_doorbell(&self) {
        self.submitter.publish();
        self.shared.ring_doorbell(self.drives);
    }
}

impl fmt::Debug for SubmissionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubmissionQueue")
            .field("submitter", &self.submitter)
            .finish_non_exhaustive()
    }
}

/// Whether to go to sleep on [`CompletionQueue::completion_fd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// Completions wait: reap them first.
    Ready,
    /// The descriptor becomes readable when the wish is met, once.
    Armed,
}

impl CompletionQueue {
    #[allow(clippy::too_many_arguments)] // a private constructor, each argument a field
    pub(crate) fn new(
        reaper: Reaper,
        shared: Arc<RingShared>,
        notifier: Arc<Notifier>,
        engine: Option<Box<Engine>>,
        remote: Option<(Arc<Handoff>, Arc<PollerShared>)>,
        idle: IdlePolicy,
        close_timeout: Duration,
        caps: Capabilities,
    ) -> Self {
        let lost = false;
        let (armings, waited) = (0, false);
        Self {
            reaper,
            shared,
            notifier,
            engine,
            remote,
            idle,
            close_timeout,
            caps,
            lost,
            waited,
            armings,
            #[cfg(target_os = "linux")]
            both: OnceCell::new(),
        }
    }

    /// The completions that are there, oldest first. With `Drive::Inline` the device makes progress
    /// first. Never blocks.
    ///
    /// Each completion is retired as the iterator yields it; those not taken from the iterator stay
    /// for the next call.
    #[inline]
    pub fn reap(&mut self) -> Reap<'_> {
        self.look();
        Reap { reaper: &mut self.reaper }
    }

    /// Looks for completions that are to be reaped now.
    #[inline]
    fn look(&mut self) {
        self.drive();
        self.reaper.ready();
        if self.engine.is_none() {
            self.reaper.prefetch();
        }
    }

    /// Completions that wait to be reaped.
    pub fn ready(&mut self) -> usize {
        self.drive();
        self.reaper.ready() as usize
    }

    /// Submissions not reaped yet. What another thread submits meanwhile may be missing.
    pub fn in_flight(&self) -> usize {
        self.reaper.in_flight() as usize
    }

    /// Sleeps until `min` completions wait, or as many as are in flight if those are fewer, or until
    /// `timeout` has passed (`None`: for ever) or [`RingControl::wake`] was called. Returns how
    /// many wait.
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
        let deadline = timeout.map(after);
        let mut round = 0;
        loop {
            let worked = self.drive();
            let ready = self.reaper.ready();
            let want = u32::try_from(min).unwrap_or(u32::MAX).min(self.reaper.in_flight());
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

    /// A descriptor for an event loop: after [`arm`](Self::arm) said `Armed`, it becomes readable
    /// when there are completions. Created by the first call (an eventfd on Linux, a pipe
    /// elsewhere); costs nothing before, and one signal per arming after. With `Drive::Inline` over
    /// a device that itself is a descriptor it is an epoll of both.
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
                if self.both.get().is_none() {
                    let _ = self.both.set(Both::new(&self.notifier).map_err(failed)?);
                }
                return Ok(self.both.get().expect("set above").readable());
            }
            #[cfg(not(target_os = "linux"))]
            return Err(Error::NotSupported {
                what: "a completion descriptor with inline driving",
                device: "descriptor-driven".to_owned(),
            });
        }
        self.notifier.descriptor().map_err(failed)
    }

    /// Empties the descriptor and asks for a signal at the next completion. `Ready` if there is one
    /// already: then nothing was armed.
    pub fn arm(&mut self) -> Armed {
        self.arm_after(1, None)
    }

    /// As [`arm`](Self::arm), for a VMM that injects one interrupt per batch: the signal comes when
    /// `n` completions wait, or `max_delay` after the first one. With `Drive::Inline` nobody counts
    /// while the caller sleeps, so the signal comes with the first packet.
    pub fn arm_after(&mut self, n: usize, max_delay: Option<Duration>) -> Armed {
        self.notifier.arm_descriptor();
        let armed = self.arm_notifier(n, max_delay);
        #[cfg(target_os = "linux")]
        if armed == Armed::Armed
            && let Some(both) = self.both.get_mut()
            && let Some(engine) = &self.engine
            && both.watch(engine.descriptor(), engine.queues_closed()).is_err()
        {
            // Nobody would tell of a packet: the caller must not sleep.
            self.disarm();
            return Armed::Ready;
        }
        armed
    }

    /// For futures: whether `n` completions wait; if not, `cx`'s waker is woken when they do.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>, n: usize) -> Poll<usize> {
        self.notifier.set_waker(cx.waker());
        match self.arm_notifier(n, None) {
            Armed::Ready => Poll::Ready(self.reaper.ready() as usize),
            Armed::Armed => Poll::Pending,
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
    pub fn quiesce(&mut self, timeout: Duration) -> Result<usize, Error> {
        // A short nap, for the moment between a look and going to sleep; the engine's
        // notification ends it early.
        const NAP: Duration = Duration::from_millis(1);
        let asked = self.shared.ask_cancel_all();
        let deadline = after(timeout);
        loop {
            self.drive();
            let ready = self.reaper.ready();
            // A closed ring cancels everything anyway.
            let carried_out = self.shared.are_cancelled(asked) || !self.shared.is_open();
            if carried_out && ready >= self.reaper.in_flight() {
                return Ok(ready as usize);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::Timeout(timeout));
            }
            self.sleep(ready + 1, Some(deadline.min(now + NAP)));
        }
    }

    /// Closes the ring: the device lets go of everything, the poller ends its work for it, every
    /// entry in flight completes as cancelled and can still be reaped. Submits say
    /// [`Closed::Stopped`] from here on. Closing twice is harmless.
    ///
    /// # Errors
    ///
    /// [`Error::Leaked`] if the device did not let go of some slots within the ring's close
    /// timeout, or the poller did not come back: what they hold is leaked on purpose.
    pub fn close(&mut self) -> Result<(), Error> {
        let timeout = self.close_timeout;
        self.shared.close(Closed::Stopped);
        self.shared.wish(control::STOP);
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
            self.engine = handoff.take(if self.lost { Duration::ZERO } else { twice });
        }
        let Some(engine) = &mut self.engine else {
            let slots = self.in_flight() - self.reaper.ready() as usize;
            // Should it come back after all, it finds nobody waiting, and cleans up.
            if let Some((handoff, _)) = &self.remote {
                handoff.abandon();
            }
            self.lost = true;
            tracing::error!(ring = self.shared.number, slots, "leaked: the poller is stuck");
            return Err(Error::Leaked { slots, timeout });
        };
        // A closed engine may still wait for slots that somebody drops, as after a panic.
        while (!engine.is_closed() && Instant::now() < deadline)
            || (engine.slots_kept() > 0 && !self.waited && Instant::now() < half)
        {
            if !engine.turn() {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        engine.turn();
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
            return engine.turn();
        }
        !self.shared.is_open() && self.take_over()
    }

    #[cold]
    fn take_over(&mut self) -> bool {
        let Some((handoff, _)) = &self.remote else { return false };
        self.engine = handoff.take(Duration::ZERO);
        self.engine.as_mut().is_some_and(|engine| engine.turn())
    }

    /// Whether nothing can complete any more.
    fn is_over(&self) -> bool {
        self.lost || self.engine.as_ref().is_some_and(|engine| engine.is_closed())
    }

    fn take_woken(&self) -> bool {
        self.shared.woken.load(Ordering::Relaxed)
            && self.shared.woken.swap(false, Ordering::Acquire)
    }

    /// Arms for `want` completions, looks once more, and parks.
    fn sleep(&mut self, want: u32, deadline: Option<Instant>) {
        if self.arm_bells(want, None) == Armed::Armed {
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
                self.engine.as_ref().expect("it has a deadline").look_at_device();
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

    fn arm_notifier(&mut self, n: usize, max_delay: Option<Duration>) -> Armed {
        let want = u32::try_from(n).unwrap_or(u32::MAX).clamp(1, 1 << 30);
        if self.take_woken() {
            return Armed::Ready;
        }
        // Inline, what there is to do is done now rather than after a signal.
        while self.drive() {
            if self.reaper.ready() >= want {
                return Armed::Ready;
            }
        }
        self.arm_bells(want, max_delay)
    }

    /// Arms whatever can bring `want` completions, and looks once more. `Ready`: nothing is armed.
    fn arm_bells(&mut self, want: u32, max_delay: Option<Duration>) -> Armed {
        self.armings = self.armings.wrapping_add(1) & ((START_CLOCK >> DELAY_BITS) - 1);
        let coalesce = max_delay.map_or(0, |delay| {
            let us = delay.as_micros().clamp(1, DELAY_MAX_US.into()) as u64;
            self.armings << DELAY_BITS | us
        });
        self.shared.wanted.store(self.reaper.index_of(want), Ordering::Relaxed);
        self.shared.coalesce.store(coalesce, Ordering::Relaxed);
        self.shared.cq_bell.arm();
        // The look after the fence: a completion published before it is seen here, one after it
        // sees us armed.
        let ready = self.reaper.ready();
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
            return Armed::Ready;
        }
        if coalesce != 0 && ready > 0 {
            // Too few are here already: the engine must start the clock now.
            self.shared.coalesce.fetch_or(START_CLOCK, Ordering::Relaxed);
            self.shared.bell.ring();
        }
        Armed::Armed
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
        f.debug_struct("CompletionQueue").field("reaper", &self.reaper).finish_non_exhaustive()
    }
}

/// The completions that were there when [`CompletionQueue::reap`] was called.
#[derive(Debug)]
pub struct Reap<'a> {
    reaper: &'a mut Reaper,
}

impl Iterator for Reap<'_> {
    type Item = Completion;

    #[inline]
    fn next(&mut self) -> Option<Completion> {
        self.reaper.pop().map(Completion::new)
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        // Nobody looks at the queue anew while we have it.
        let left = self.reaper.known() as usize;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Reap<'_> {}

/// The completions that were there when [`CompletionHalf::reap`] was called. When it is dropped, what was
/// submitted meanwhile is published and the doorbell rung; should it be forgotten instead, with the next
/// [`Ring::split`], or the next submission through the [`Ring`] itself.
#[derive(Debug)]
pub struct HalfReap<'a> {
    reap: Reap<'a>,
    sq: &'a SubmissionQueue,
}

impl Iterator for HalfReap<'_> {
    type Item = Completion;

    #[inline]
    fn next(&mut self) -> Option<Completion> {
        self.reap.next()
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        self.reap.size_hint()
    }
}

impl ExactSizeIterator for HalfReap<'_> {}

impl Drop for HalfReap<'_> {
    #[inline]
    fn drop(&mut self) {
        self.sq.pay();
    }
}

impl Ring {
    pub(crate) fn new(sq: SubmissionQueue, cq: CompletionQueue) -> Self {
        Self { sq, cq }
    }

    /// The two halves, borrowed: one submits while the other is reaped. They stay on this thread, and
    /// the doorbell of what is submitted is rung once, at the end of the loop; see [`SubmissionHalf`].
    #[inline]
    pub fn split(&mut self) -> (SubmissionHalf<'_>, CompletionHalf<'_>) {
        let Self { sq, cq } = self;
        // Should somebody have forgotten a `HalfReap`.
        sq.pay();
        (SubmissionHalf { sq }, CompletionHalf { cq, sq })
    }

    /// The two halves, owned; they may live on two threads. The ring closes when the reaping half is
    /// dropped.
    pub fn into_split(self) -> (SubmissionQueue, CompletionQueue) {
        let Self { mut sq, cq } = self;
        sq.drives = false;
        (sq, cq)
    }

    /// The ring's pools; [`alloc`](Self::alloc) takes from the first.
    pub fn pools(&self) -> &[Pool] {
        self.sq.submitter.regions().pools()
    }

    /// See [`SubmissionQueue::alloc`].
    pub fn alloc(&self) -> Option<Frame> {
        self.sq.alloc()
    }

    /// See [`SubmissionQueue::submit_read`].
    #[inline]
    pub fn submit_read(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.sq.submit_read(frame, user_data)
    }

    /// See [`SubmissionQueue::submit_write`].
    #[inline]
    pub fn submit_write(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.sq.submit_write(frame, user_data)
    }

    /// See [`SubmissionQueue::submit_reads`].
    pub fn submit_reads(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_reads(frames)
    }

    /// See [`SubmissionQueue::submit_writes`].
    pub fn submit_writes(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_writes(frames)
    }

    /// See [`SubmissionQueue::cancel`].
    pub fn cancel(&mut self, target: u64, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.sq.cancel(target, user_data)
    }

    /// See [`SubmissionQueue::cancel_all`].
    pub fn cancel_all(&mut self, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.sq.cancel_all(user_data)
    }

    /// See [`CompletionQueue::reap`].
    #[inline]
    pub fn reap(&mut self) -> Reap<'_> {
        self.cq.reap()
    }

    /// See [`CompletionQueue::wait`].
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
        self.cq.wait(min, timeout)
    }

    /// See [`CompletionQueue::in_flight`].
    pub fn in_flight(&self) -> usize {
        self.cq.in_flight()
    }

    /// See [`CompletionQueue::quiesce`].
    pub fn quiesce(&mut self, timeout: Duration) -> Result<usize, Error> {
        self.cq.quiesce(timeout)
    }

    /// See [`CompletionQueue::completion_fd`].
    pub fn completion_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.cq.completion_fd()
    }

    /// See [`CompletionQueue::arm`].
    pub fn arm(&mut self) -> Armed {
        self.cq.arm()
    }

    /// See [`CompletionQueue::arm_after`].
    pub fn arm_after(&mut self, n: usize, max_delay: Option<Duration>) -> Armed {
        self.cq.arm_after(n, max_delay)
    }

    /// See [`CompletionQueue::poll_ready`].
    pub fn poll_ready(&mut self, cx: &mut Context<'_>, n: usize) -> Poll<usize> {
        self.cq.poll_ready(cx, n)
    }

    /// See [`CompletionQueue::next_deadline`].
    pub fn next_deadline(&self) -> Option<Instant> {
        self.cq.next_deadline()
    }

    /// See [`CompletionQueue::stats`].
    pub fn stats(&self) -> RingStats {
        self.cq.stats()
    }

    /// See [`CompletionQueue::capabilities`].
    pub fn capabilities(&self) -> Capabilities {
        self.cq.capabilities()
    }

    /// See [`CompletionQueue::control`].
    pub fn control(&self) -> RingControl {
        self.cq.control()
    }

    /// See [`CompletionQueue::close`].
    pub fn close(&mut self) -> Result<(), Error> {
        self.cq.close()
    }
}

/// A handle on a ring for any thread: wakes a blocked `wait`, stops the ring, reads its counters.
/// Does not keep the ring alive.
#[derive(Clone, Debug)]
pub struct RingControl {
    shared: Arc<RingShared>,
}

assert_impl_all!(RingControl: Send, Sync, Clone);

impl RingControl {
    /// Makes the `wait` under way return, or the next one if none is.
    pub fn wake(&self) {
        self.shared.woken.store(true, Ordering::Release);
        self.shared.notify();
    }

    /// Asks for everything in flight to complete as cancelled; the ring stays open. Does not wait.
    pub fn cancel_all(&self) {
        self.shared.ask_cancel_all();
    }

    /// Closes the ring as [`CompletionQueue::close`] does, but does not wait: the completions of
    /// what was in flight come in their time, and submits say [`Closed::Stopped`].
    pub fn stop(&self) {
        self.shared.close(Closed::Stopped);
        self.shared.wish(control::STOP);
    }

    /// Why the ring takes no more submissions, or `None` if it does.
    pub fn closed(&self) -> Option<Closed> {
        self.shared.why_closed()
    }

    /// Counters of the ring so far.
    pub fn stats(&self) -> RingStats {
        self.shared.counters.poller.snapshot()
    }

    /// Doorbells that had to wake the poller. None are rung while it is awake.
    pub fn doorbells(&self) -> u64 {
        self.shared.counters.doorbells.get()
    }
}

#[cfg(test)]
mod tests {
    use crate::{Direction, Drive, Interface, Loopback};

    /// A wake-up that is lost for want of the fence is too rare for a test to wait for.
    #[test]
    fn only_who_drives_the_engine_rings_without_a_fence() {
        let interface = Interface::builder().device(Loopback::new(1500)).start().unwrap();
        let ring = |drive| interface.ring(Direction::Write).drive(drive).build().unwrap();
        assert!(!ring(Drive::Thread).sq.drives);
        let inline = ring(Drive::Inline);
        assert!(inline.sq.drives);
        let (sq, _cq) = inline.into_split();
        assert!(!sq.drives);
    }
}
