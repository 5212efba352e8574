//! The submitting half: [`SubmissionQueue`].

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use static_assertions::{assert_impl_all, assert_not_impl_any};
use vmring_core::offload::{self, OffloadHeader};
use vmring_core::sync::Ordering;
use vmring_core::{Class, Frame, PushError, SqProducer};

use crate::device::seam::Capabilities;
use crate::error::{BatchError, CloseReason, Error, SubmitError, SubmitErrorKind};
use crate::mailbox::{RingShared, request};
use crate::ring::control::RingControl;
use crate::software;
use crate::software::Left;

/// The submitting half of a ring.
pub struct SubmissionQueue {
    pub(super) producer: SqProducer,
    pub(crate) shared: Arc<RingShared>,
    caps: Capabilities,
    /// Other than `None` only while the ring's other half, borrowed together with this one, is reaping.
    pub(super) deferred: Cell<Deferred>,
    /// Who submits drives the engine as well: of a ring that is inline and undivided.
    pub(super) drives_engine: bool,
}

assert_impl_all!(SubmissionQueue: Send);
assert_not_impl_any!(SubmissionQueue: Sync, Clone);

/// Whether what is submitted is published and rung for later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deferred {
    /// No: at once.
    Off,
    /// It may be, and nothing is.
    Open,
    /// Something is.
    Pending,
}

impl SubmissionQueue {
    pub(crate) fn new(producer: SqProducer, shared: Arc<RingShared>, caps: Capabilities) -> Self {
        let drives_engine = shared.is_inline();
        Self { producer, shared, caps, deferred: Cell::new(Deferred::Off), drives_engine }
    }

    /// A frame from the ring's first pool: empty, behind the pool's headroom. `None` if all are
    /// out. (For the hot loop, recycle the frames you reap instead.)
    pub fn alloc(&self) -> Option<Frame> {
        self.producer.regions().pools()[0].alloc()
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

    pub(super) fn submit_cancel(
        &self,
        target: Option<u64>,
        data: u64,
    ) -> Result<(), SubmitErrorKind> {
        if let Some(closed) = self.why_closed() {
            return Err(closed.into());
        }
        self.producer.push_cancel(target, data).map_err(|refusal| self.kind(refusal, None))?;
        self.producer.publish();
        // Release: who sees the wish sees the cancel, and what was submitted before it.
        self.shared.requests.fetch_or(request::CANCEL, Ordering::Release);
        self.shared.ring_doorbell(self.drives_engine);
        Ok(())
    }

    /// Reads that can be submitted before backpressure says no. Reaping makes it more.
    pub fn read_credits(&mut self) -> u32 {
        self.producer.available(Class::Read)
    }

    /// Writes that can be submitted before backpressure says no. Reaping makes it more.
    pub fn write_credits(&mut self) -> u32 {
        self.producer.available(Class::Write)
    }

    /// A handle that can be used from anywhere.
    pub fn control(&self) -> RingControl {
        RingControl { shared: self.shared.clone() }
    }

    /// For the front-ends: posts free frames for reading, as many as there are credits, but leaves
    /// some of the pool to writes. A closed ring takes none, which is no error here.
    pub(crate) fn post_reads(&self, user_data: u64) -> Result<(), Error> {
        let pool = &self.producer.regions().pools()[0];
        let slots = pool.layout().slots;
        let reserve = self.producer.depth(Class::Write).min((slots / 4).max(u32::from(slots > 1)));
        let free = slots.saturating_sub(pool.slots_out() + reserve);
        for _ in 0..self.producer.available(Class::Read).min(free) {
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
    pub(super) fn submit(
        &self,
        class: Class,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        self.push(class, frame, user_data)?;
        self.ring_doorbell();
        Ok(())
    }

    /// Writes an entry, which the caller is to publish.
    #[inline(always)]
    pub(super) fn push(
        &self,
        class: Class,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
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
        self.producer.push(class, frame, user_data).map_err(|(refusal, frame)| SubmitError {
            kind: self.kind(refusal, Some(class)),
            frame,
        })
    }

    /// Submits the frames of one class, and rings the doorbell if there were any.
    pub(super) fn submit_batch(
        &self,
        class: Class,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        let result = self.push_batch(class, frames);
        self.ring_after(&result);
        result
    }

    /// Submits reads and then writes, with one doorbell.
    pub(super) fn submit_both(
        &self,
        reads: impl IntoIterator<Item = (Frame, u64)>,
        writes: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        let result = self.push_batch(Class::Read, reads).and_then(|reads| {
            self.push_batch(Class::Write, writes)
                .map(|writes| reads + writes)
                .map_err(|error| BatchError { accepted: reads + error.accepted, ..error })
        });
        self.ring_after(&result);
        result
    }

    /// Rings the doorbell if a batch has left something to publish or to wake the engine for.
    fn ring_after(&self, result: &Result<usize, BatchError>) {
        if result.as_ref().map_or_else(|error| error.accepted, |accepted| *accepted) > 0 {
            self.ring_doorbell();
        }
    }

    /// Writes the entries of one class, as many as there are credits and cells. Full cache lines are
    /// published at once; the caller publishes the rest.
    fn push_batch(
        &self,
        class: Class,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        let mut frames = frames.into_iter();
        let mut accepted = 0;
        loop {
            if self.producer.check(class).is_err() {
                return Ok(accepted);
            }
            let Some((frame, user_data)) = frames.next() else { return Ok(accepted) };
            if let Err(SubmitError { kind, frame }) = self.push(class, frame, user_data) {
                return Err(BatchError { kind, frame, accepted });
            }
            accepted += 1;
            self.producer.publish_lines();
        }
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
            let capacity = frame.capacity();
            if capacity < max {
                return Err(SubmitError {
                    kind: SubmitErrorKind::TooSmall { capacity, needed: max },
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
    fn why_closed(&self) -> Option<CloseReason> {
        if self.shared.is_open() { None } else { self.shared.why_closed() }
    }

    #[cold]
    fn kind(&self, refusal: PushError, class: Option<Class>) -> SubmitErrorKind {
        match refusal {
            PushError::SqFull => SubmitErrorKind::SqFull,
            PushError::NoCredit if class.is_some_and(|class| self.producer.depth(class) == 0) => {
                SubmitErrorKind::WrongDirection
            }
            PushError::NoCredit => SubmitErrorKind::NoCredit,
            PushError::ForeignPool => SubmitErrorKind::ForeignPool,
        }
    }

    /// Publishes and rings for what was submitted while the other half was reaping.
    #[inline]
    pub(super) fn flush_deferred(&self) {
        if self.deferred.replace(Deferred::Off) == Deferred::Pending {
            self.ring_doorbell();
        }
    }

    /// Publishes, which commits, and wakes the engine if it sleeps.
    #[inline]
    pub(super) fn ring_doorbell(&self) {
        self.producer.publish();
        self.shared.ring_doorbell(self.drives_engine);
    }
}

impl fmt::Debug for SubmissionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubmissionQueue").field("producer", &self.producer).finish_non_exhaustive()
    }
}
