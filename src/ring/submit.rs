//! The submitting half: [`SubmissionQueue`].

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use static_assertions::{assert_impl_all, assert_not_impl_any};
use vmring_core::offload::{self, OffloadHeader};
use vmring_core::sync::Ordering;
use vmring_core::{Class, Frame, GuestBuffer, PushError, SKIP_SUCCESS, SqProducer};

use vmring_embedded::software::{self, Left};

use crate::device::seam::Capabilities;
use crate::error::{BatchError, Error, GuestSubmitError, SubmitError, SubmitErrorKind};
use crate::mailbox::{RingShared, request};
use crate::ring::control::RingControl;

/// The submitting half of a ring. [`Ring::into_split`](crate::Ring::into_split) returns it, and
/// [`Ring`](crate::Ring) has the same calls.
///
/// Dropping it does not close the ring.
pub struct SubmissionQueue {
    pub(super) producer: SqProducer,
    pub(crate) shared: Arc<RingShared>,
    caps: Capabilities,
    /// The largest packet that the ring reads, in bytes.
    read_size: u32,
    /// Whether each frame of the first pool fits a read.
    first_fits_reads: bool,
    /// Packets without an offload header that are shorter are sent as they are. 0 if the device reads a
    /// header in front of each.
    bare_end: u64,
    /// Whether the doorbell is to be rung for what was submitted while the ring's other half, which is
    /// borrowed together with this one, is reaping (or after its iterator was forgotten).
    pending: Cell<bool>,
    /// True for an inline ring that has not been taken apart: the submitting thread also drives the
    /// engine.
    pub(super) drives_engine: bool,
}

assert_impl_all!(SubmissionQueue: Send);
assert_not_impl_any!(SubmissionQueue: Sync, Clone);

impl SubmissionQueue {
    pub(crate) fn new(
        producer: SqProducer,
        shared: Arc<RingShared>,
        caps: Capabilities,
        read_size: u32,
    ) -> Self {
        let drives_engine = shared.is_inline();
        let first = producer.regions().pools()[0].layout();
        let first_fits_reads =
            first.headroom >= caps.headroom && first.slot_size - first.headroom >= read_size;
        let bare_end = if caps.headroom > 0 { 0 } else { u64::from(caps.max_packet_size) + 1 };
        Self {
            producer,
            shared,
            caps,
            read_size,
            first_fits_reads,
            bare_end,
            pending: Cell::new(false),
            drives_engine,
        }
    }

    /// Takes a free frame from the ring's first pool. The frame is empty, and the pool's headroom
    /// is in front of it. Returns `None` if no frame is free.
    ///
    /// This touches the pool's free list. In the hot loop, use the frames that were reaped again
    /// instead.
    pub fn alloc(&self) -> Option<Frame> {
        let pool = &self.producer.regions().pools()[0];
        pool.alloc().or_else(|| self.again(|| pool.alloc().ok_or(())).ok())
    }

    /// Submits a read: gives `frame` to the device, which fills it with the next packet. The
    /// frame's view is reset first, so the packet will be behind the pool's headroom.
    ///
    /// After `Ok`, exactly one completion with this `user_data` comes, with the frame. Nothing can
    /// refuse the read any more.
    ///
    /// # Errors
    ///
    /// [`SubmitError`], with the frame inside. [`is_backpressure`](SubmitError::is_backpressure) is
    /// true for [`SqFull`](SubmitErrorKind::SqFull) and [`NoCredit`](SubmitErrorKind::NoCredit): reap,
    /// then submit again. [`Draining`](SubmitErrorKind::Draining) lasts until
    /// [`resume`](crate::CompletionQueue::resume). The other kinds do not pass: change the frame, or
    /// give the ring up. They are [`TooSmall`](SubmitErrorKind::TooSmall),
    /// [`NoHeadroom`](SubmitErrorKind::NoHeadroom), [`ForeignPool`](SubmitErrorKind::ForeignPool),
    /// [`WrongDirection`](SubmitErrorKind::WrongDirection) and [`Closed`](SubmitErrorKind::Closed).
    #[inline]
    pub fn submit_read(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submit::<0>(Class::Read, frame, user_data)
    }

    /// Submits a write: gives `frame` to the device, which sends its packet.
    ///
    /// After `Ok`, exactly one completion with this `user_data` comes, with the frame. Nothing can
    /// refuse the write any more.
    ///
    /// # Errors
    ///
    /// [`SubmitError`], with the frame inside. [`is_backpressure`](SubmitError::is_backpressure) is
    /// true for [`SqFull`](SubmitErrorKind::SqFull) and [`NoCredit`](SubmitErrorKind::NoCredit): reap,
    /// then submit again. [`Draining`](SubmitErrorKind::Draining) lasts until
    /// [`resume`](crate::CompletionQueue::resume). The other kinds do not pass: change the frame, or
    /// give the ring up. They are [`TooBig`](SubmitErrorKind::TooBig),
    /// [`NoHeadroom`](SubmitErrorKind::NoHeadroom), [`Offload`](SubmitErrorKind::Offload),
    /// [`OffloadNotNegotiated`](SubmitErrorKind::OffloadNotNegotiated),
    /// [`ForeignPool`](SubmitErrorKind::ForeignPool),
    /// [`WrongDirection`](SubmitErrorKind::WrongDirection) and [`Closed`](SubmitErrorKind::Closed).
    #[inline]
    pub fn submit_write(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submit::<0>(Class::Write, frame, user_data)
    }

    /// Submits a write whose completion nobody wants: as [`submit_write`](Self::submit_write), but if
    /// the write succeeds, there is no completion. Its frame returns to its pool by itself, and its
    /// credit comes back without reaping.
    ///
    /// If the write does not succeed (the device refuses it, a cancel, a restart or a close ends it),
    /// it completes as every other write does, with `user_data`, the reason and the frame. So a ring
    /// of such writes must be reaped too, now and then: a failure keeps its credit until it is reaped.
    /// Every counter of the ring counts such a write as any other.
    ///
    /// When a submit is refused for want of a credit or of space, or [`alloc`](Self::alloc) finds no
    /// frame, let the reaping half wait ([`wait`](crate::CompletionQueue::wait),
    /// [`arm`](crate::CompletionQueue::arm), [`poll_ready`](crate::CompletionQueue::poll_ready)). The
    /// next write that succeeds without a completion ends that wait, although no completion has come:
    /// submit again. If two threads have the two halves, the reaping thread has to tell the submitting
    /// one.
    ///
    /// # Errors
    ///
    /// Those of [`submit_write`](Self::submit_write).
    ///
    /// # Examples
    ///
    /// ```
    /// use vmring::{Direction, Interface, Loopback};
    ///
    /// let interface = Interface::builder().device(Loopback::new(1500)).start()?;
    /// let mut ring = interface.ring(Direction::Write).depth(16).build()?;
    /// let mut sent = 0;
    /// while sent < 100 {
    ///     if let Some(mut frame) = ring.alloc() {
    ///         frame.copy_from(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello")?;
    ///         match ring.submit_write_skip_success(frame, sent) {
    ///             Ok(()) => {
    ///                 sent += 1;
    ///                 continue;
    ///             }
    ///             Err(refused) if refused.is_backpressure() => {}
    ///             Err(refused) => return Err(refused.into()),
    ///         }
    ///     }
    ///     ring.wait(1, None);
    ///     for failed in ring.reap() {
    ///         eprintln!("packet {} was not sent: {:?}", failed.user_data, failed.result);
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    #[doc(alias = "IOSQE_CQE_SKIP_SUCCESS")]
    #[inline]
    pub fn submit_write_skip_success(
        &mut self,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        self.submit::<SKIP_SUCCESS>(Class::Write, frame, user_data)
    }

    /// Submits a read into the memory of a guest: as [`submit_read`](Self::submit_read), but the next
    /// packet goes into the guest's own buffer. The ring was built with the buffer's
    /// [segment table](crate::RingBuilder::segment_table). Give the completion's buffer back to the
    /// guest, or drop it.
    ///
    /// If the device does not fill such a buffer itself, the packet goes through a frame and is
    /// copied; [`RingStats::bounced_reads`](crate::stats::RingStats::bounced_reads) counts that. A packet
    /// that does not fit completes with [`Status::PacketTooBig`](crate::Status::PacketTooBig) and an
    /// empty buffer, and is lost.
    ///
    /// # Errors
    ///
    /// Those of [`submit_read`](Self::submit_read), with the buffer.
    pub fn submit_read_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.push_guest::<0>(Class::Read, buffer, user_data)?;
        self.ring_doorbell();
        Ok(())
    }

    /// Submits a write from the memory of a guest: as [`submit_write`](Self::submit_write), but the
    /// packet is in the guest's own buffer, which nobody writes to. If the buffer has space for a
    /// header, it has a `virtio_net_hdr`, and the device, or who copies the packet for it, takes it
    /// from there.
    ///
    /// If the device does not send such a buffer itself, the packet is copied into a frame first;
    /// [`RingStats::bounced_writes`](crate::stats::RingStats::bounced_writes) counts that. The guest may
    /// change the packet until the completion. It can only change what is sent in its own name.
    ///
    /// # Errors
    ///
    /// Those of [`submit_write`](Self::submit_write), with the buffer. A header that is wrong, or asks
    /// for what was not negotiated, completes with
    /// [`Status::InvalidArgument`](crate::Status::InvalidArgument).
    pub fn submit_write_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.push_guest::<0>(Class::Write, buffer, user_data)?;
        self.ring_doorbell();
        Ok(())
    }

    /// Submits a read as [`submit_read_guest`](Self::submit_read_guest) does, but the device sees it after
    /// the next [`publish`](Self::publish) or submission, or when the ring is closed. So many buffers cost
    /// one doorbell.
    ///
    /// # Errors
    ///
    /// Those of [`submit_read`](Self::submit_read), with the buffer.
    #[inline(always)]
    pub fn stage_read_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.push_guest::<0>(Class::Read, buffer, user_data)
    }

    /// Submits a write as [`submit_write_guest`](Self::submit_write_guest) does, but the device sees it
    /// after the next [`publish`](Self::publish) or submission, or when the ring is closed.
    ///
    /// # Errors
    ///
    /// Those of [`submit_write_guest`](Self::submit_write_guest).
    #[inline(always)]
    pub fn stage_write_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.push_guest::<0>(Class::Write, buffer, user_data)
    }

    /// Shows the device what was staged, with at most one doorbell.
    #[inline]
    pub fn publish(&mut self) {
        if self.producer.publish() {
            self.shared.ring_doorbell(self.drives_engine);
        }
    }

    /// Submits reads from an iterator of frames and their `user_data`, with at most one doorbell.
    /// Returns how many were submitted.
    ///
    /// It takes no more from the iterator than it can submit, so an iterator passed by
    /// [`by_ref`](Iterator::by_ref) keeps the rest. It ends without an error when a credit or a
    /// place in the SQ is missing.
    ///
    /// The call checks for a credit before it asks the iterator for the next frame. If there is
    /// none, it ends, even if the iterator would reap and so return one. So first collect what was
    /// reaped, then submit it.
    ///
    /// # Errors
    ///
    /// [`BatchError`] with the first frame that was refused for a reason other than backpressure
    /// (see [`submit_read`](Self::submit_read)), and with the number of frames before it, which are
    /// in flight. On a ring without this direction that is the first frame, refused with
    /// [`WrongDirection`](SubmitErrorKind::WrongDirection) after 0 frames that were accepted.
    pub fn submit_reads(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.submit_batch::<0>(Class::Read, frames)
    }

    /// Submits writes from an iterator of packets and their `user_data`, as
    /// [`submit_reads`](Self::submit_reads) does for reads.
    ///
    /// # Errors
    ///
    /// [`BatchError`] with the first frame that was refused for a reason other than backpressure
    /// (see [`submit_write`](Self::submit_write)), and with the number of frames before it, which
    /// are in flight.
    pub fn submit_writes(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.submit_batch::<0>(Class::Write, frames)
    }

    /// Submits writes whose completion nobody wants
    /// ([`submit_write_skip_success`](Self::submit_write_skip_success)) from an iterator of packets and
    /// their `user_data`, as [`submit_writes`](Self::submit_writes) does.
    ///
    /// # Errors
    ///
    /// Those of [`submit_writes`](Self::submit_writes).
    #[doc(alias = "IOSQE_CQE_SKIP_SUCCESS")]
    pub fn submit_writes_skip_success(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.submit_batch::<SKIP_SUCCESS>(Class::Write, frames)
    }

    /// Asks for every read and write in flight whose `user_data` is `target` to complete now: as
    /// cancelled, or with its packet if it has one. A cancel never drops a packet.
    ///
    /// The cancel itself completes too, with `user_data` and without a frame. Its `result` is the
    /// number of entries that it found.
    ///
    /// # Errors
    ///
    /// [`SubmitErrorKind::NoCredit`] and [`SubmitErrorKind::SqFull`], which are backpressure
    /// (cancels have credits of their own). [`SubmitErrorKind::Draining`], which lasts until
    /// [`resume`](crate::CompletionQueue::resume). [`SubmitErrorKind::Closed`].
    pub fn cancel(&mut self, target: u64, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.submit_cancel(Some(target), user_data)
    }

    /// Asks for every read and write in flight to complete now, as [`cancel`](Self::cancel) does
    /// for one `user_data`.
    ///
    /// # Errors
    ///
    /// Those of [`cancel`](Self::cancel).
    pub fn cancel_all(&mut self, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.submit_cancel(None, user_data)
    }

    pub(super) fn submit_cancel(
        &self,
        target: Option<u64>,
        data: u64,
    ) -> Result<(), SubmitErrorKind> {
        if let Some(refusal) = self.refusal() {
            return Err(refusal);
        }
        let push = || self.producer.push_cancel(target, data);
        push().or_else(|_| self.again(push)).map_err(|refusal| self.kind(refusal, None))?;
        self.producer.publish();
        // Release: pairs with the Acquire in `take_requests`. An engine that sees the request also
        // finds the cancel in the SQ, and what was submitted before it.
        self.shared.requests.fetch_or(request::CANCEL, Ordering::Release);
        self.shared.ring_doorbell(self.drives_engine);
        Ok(())
    }

    /// Returns how many reads can be submitted now, if the SQ has space for them. Reaping returns
    /// credits.
    pub fn read_credits(&mut self) -> u32 {
        self.producer.available(Class::Read)
    }

    /// Returns how many writes can be submitted now, if the SQ has space for them. Reaping returns
    /// credits, and so does a write that skips success and succeeds.
    pub fn write_credits(&mut self) -> u32 {
        self.producer.available(Class::Write)
    }

    /// Returns a handle that can be used from any thread.
    pub fn control(&self) -> RingControl {
        RingControl { shared: self.shared.clone() }
    }

    /// For the front-ends: posts free frames for reading, one for each credit, but leaves some
    /// frames of the pool to writes. Backpressure and a closed ring end it without an error.
    pub(crate) fn post_reads(&self, user_data: u64) -> Result<(), Error> {
        let pool = &self.producer.regions().pools()[0];
        let slots = pool.layout().slots;
        let reserve = self.producer.depth(Class::Write).min((slots / 4).max(u32::from(slots > 1)));
        let free = slots.saturating_sub(pool.slots_out() + reserve);
        for _ in 0..self.producer.available(Class::Read).min(free) {
            let Some(frame) = self.alloc() else { break };
            match self.submit::<0>(Class::Read, frame, user_data) {
                Ok(()) => {}
                Err(refused) if refused.is_backpressure() => break,
                Err(SubmitError {
                    kind: SubmitErrorKind::Closed(_) | SubmitErrorKind::Draining,
                    ..
                }) => break,
                Err(refused) => return Err(refused.into()),
            }
        }
        Ok(())
    }

    #[inline(always)]
    pub(super) fn submit<const FLAGS: u32>(
        &self,
        class: Class,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        self.push::<FLAGS>(class, frame, user_data)?;
        self.ring_doorbell();
        Ok(())
    }

    /// Writes an entry with these flags. The caller publishes it.
    ///
    /// The flags of a caller are a constant, and so no submission without them pays for them.
    #[inline(always)]
    pub(super) fn push<const FLAGS: u32>(
        &self,
        class: Class,
        mut frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        if let Some(kind) = self.refusal() {
            return Err(SubmitError { kind, frame });
        }
        let is_usual = match class {
            Class::Read => self.first_fits_reads,
            _ => frame.is_bare_below(self.bare_end),
        };
        if !is_usual || !self.producer.regions().is_of_first(&frame) {
            return self.push_other::<FLAGS>(class, frame, user_data);
        }
        if class == Class::Read {
            frame.reset();
        }
        self.push_fitting::<FLAGS>(class, frame, user_data)
    }

    /// Pushes a frame if it fits: one of another pool than the first, or a write that needs headroom, has an
    /// offload header or is too big. It is a function of its own that is never inlined: it takes
    /// `&mut frame`, and in the hot path that would keep the frame in memory instead of in registers.
    #[inline(never)]
    fn push_other<const FLAGS: u32>(
        &self,
        class: Class,
        mut frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        let fits = if class == Class::Read {
            frame.reset();
            frame.capacity() >= self.read_size as usize
        } else {
            frame.len() <= self.caps.max_packet_size as usize
        };
        if !fits || frame.headroom() < self.caps.headroom as usize {
            let kind = self.misfit(class, frame.len(), frame.capacity(), frame.headroom());
            return Err(SubmitError { kind, frame });
        }
        // A header that was only received stays where the device reads none.
        let has_header = self.caps.headroom > 0 || frame.has_offload_to_send();
        if class == Class::Write
            && has_header
            && let Err(kind) = self.prepare_offload(&mut frame)
        {
            return Err(SubmitError { kind, frame });
        }
        self.push_fitting::<FLAGS>(class, frame, user_data)
    }

    #[inline(always)]
    fn push_fitting<const FLAGS: u32>(
        &self,
        class: Class,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        self.producer.push_flagged(class, FLAGS, frame, user_data).map_err(|(refusal, frame)| {
            self.report_refused(class, refusal);
            SubmitError { kind: self.kind(refusal, Some(class)), frame }
        })
    }

    /// Writes an entry for a buffer of a guest. The caller publishes it.
    #[inline(always)]
    pub(super) fn push_guest<const FLAGS: u32>(
        &self,
        class: Class,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        let (len, max) = (buffer.len(), self.caps.max_packet_size as usize);
        if let Some(kind) = self.refusal() {
            return Err(GuestSubmitError { kind, buffer });
        }
        if class == Class::Write && len > max {
            return Err(GuestSubmitError { kind: SubmitErrorKind::TooBig { len, max }, buffer });
        }
        self.producer.push_guest(class, FLAGS, buffer, user_data).map_err(|(refusal, buffer)| {
            self.report_refused(class, refusal);
            GuestSubmitError { kind: self.kind(refusal, Some(class)), buffer }
        })
    }

    /// Says that an entry was refused. If what is missing may come back without a completion, the
    /// reaping half is told, as by [`again`](Self::again).
    ///
    /// It returns nothing: the compiler sees the caller's own reason, and that the way of an accepted
    /// entry does not meet this one.
    #[cold]
    #[inline(never)]
    fn report_refused(&self, class: Class, refusal: PushError) {
        if matches!(refusal, PushError::NoCredit | PushError::SqFull)
            && self.producer.expects_skips()
        {
            let skipped = self.producer.skipped();
            // What has come back since the push, its caller has missed. Then the count before is
            // reported, so that the next wait ends at once.
            let late = self.producer.check(class).is_ok();
            let skipped = skipped.wrapping_sub(late.into());
            self.shared.report_shortage(skipped, || self.producer.skipped());
        }
    }

    /// Tries once more what has failed for want of a credit, a frame or a place in the SQ, if what is
    /// missing may come back without a completion. If it fails again, the reaping half is told, so
    /// that a wait of it ends when a completion is skipped.
    #[cold]
    #[inline(never)]
    fn again<T, E>(&self, attempt: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let expected = self.producer.expects_skips();
        // The count comes first: what comes back after the attempt is counted after this.
        let skipped = if expected { self.producer.skipped() } else { 0 };
        let result = attempt();
        if result.is_err() && expected {
            self.shared.report_shortage(skipped, || self.producer.skipped());
        }
        result
    }

    /// Submits the frames of one class, and rings the doorbell if any were accepted.
    #[inline(always)]
    pub(super) fn submit_batch<const FLAGS: u32>(
        &self,
        class: Class,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        let result = self.push_batch::<FLAGS>(class, frames);
        self.ring_after(&result);
        result
    }

    /// Submits reads and then writes, with one doorbell for both.
    pub(super) fn submit_both(
        &self,
        reads: impl IntoIterator<Item = (Frame, u64)>,
        writes: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        let result = self.push_batch::<0>(Class::Read, reads).and_then(|reads| {
            self.push_batch::<0>(Class::Write, writes)
                .map(|writes| reads + writes)
                .map_err(|error| BatchError { accepted: reads + error.accepted, ..error })
        });
        self.ring_after(&result);
        result
    }

    /// Publishes and rings the doorbell if a batch has accepted anything.
    fn ring_after(&self, result: &Result<usize, BatchError>) {
        if result.as_ref().map_or_else(|error| error.accepted, |accepted| *accepted) > 0 {
            self.ring_doorbell();
        }
    }

    /// Writes the entries of one class while there are credits and free cells. Full cache lines are
    /// published at once. The caller publishes the rest.
    #[inline(always)]
    fn push_batch<const FLAGS: u32>(
        &self,
        class: Class,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        let mut frames = frames.into_iter();
        let mut accepted = 0;
        loop {
            // An iterator that has no more lacks nothing.
            if self.producer.check(class).is_err()
                && self.must_stop(class, frames.size_hint().1 != Some(0))
            {
                return Ok(accepted);
            }
            let Some((frame, user_data)) = frames.next() else { return Ok(accepted) };
            if let Err(SubmitError { kind, frame }) = self.push::<FLAGS>(class, frame, user_data) {
                return Err(BatchError { kind, frame, accepted });
            }
            accepted += 1;
            self.producer.publish_lines();
        }
    }

    /// Whether a batch ends for want of a credit or of space. With `has_more` it lacks them, so it is
    /// tried once more, as by [`again`](Self::again).
    #[cold]
    #[inline(never)]
    fn must_stop(&self, class: Class, has_more: bool) -> bool {
        // A refusal that is not backpressure is an error, which takes a frame.
        self.producer.depth(class) > 0
            && self.refusal().is_none()
            && !(has_more && self.again(|| self.producer.check(class)).is_ok())
    }

    /// Why a frame does not fit.
    #[cold]
    #[inline(never)]
    fn misfit(
        &self,
        class: Class,
        len: usize,
        capacity: usize,
        headroom: usize,
    ) -> SubmitErrorKind {
        let max = self.caps.max_packet_size as usize;
        if class == Class::Read && capacity < self.read_size as usize {
            return SubmitErrorKind::TooSmall { capacity, needed: self.read_size as usize };
        }
        if class == Class::Write && len > max {
            return SubmitErrorKind::TooBig { len, max };
        }
        SubmitErrorKind::NoHeadroom { headroom, needed: self.caps.headroom as usize }
    }

    /// Writes in front of a packet what the device reads there: the caller's offload header, or
    /// zeroes if there is none. So the device never reads bytes that another packet left there. An
    /// error if the header is not true of the packet, or asks for what was not negotiated.
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
            // The header asks for nothing, and the device reads none.
            frame.clear_offload();
        }
        Ok(())
    }

    /// Whether the ring was built for this class.
    pub(super) fn has(&self, class: Class) -> bool {
        self.producer.depth(class) > 0
    }

    /// Why the ring takes no submission now, whatever it is.
    #[inline(always)]
    fn refusal(&self) -> Option<SubmitErrorKind> {
        if self.shared.is_open() { None } else { self.refusal_of_state() }
    }

    #[cold]
    #[inline(never)]
    fn refusal_of_state(&self) -> Option<SubmitErrorKind> {
        match self.shared.why_closed() {
            Some(closed) => Some(closed.into()),
            None => self.shared.is_draining().then_some(SubmitErrorKind::Draining),
        }
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
            PushError::WrongClass => SubmitErrorKind::WrongDirection, // no caller of `push` cancels
        }
    }

    /// Rings the doorbell for what was pushed, or leaves that to [`flush_deferred`](Self::flush_deferred)
    /// while the other half is reaping.
    #[inline(always)]
    pub(super) fn ring_or_defer(&self) {
        self.pending.set(true);
        if self.producer.ends_piece() {
            if self.producer.is_in_run() {
                self.producer.publish();
            } else {
                self.flush_deferred();
            }
        }
    }

    /// Ends the deferral: publishes and rings for what was submitted while the other half was
    /// reaping.
    #[inline]
    pub(super) fn flush_deferred(&self) {
        self.producer.end_run();
        if self.pending.replace(false) {
            self.ring_doorbell();
        }
    }

    /// Publishes all entries, which is the commit point, and wakes the engine if it sleeps.
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
