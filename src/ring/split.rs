//! The two halves of a ring, borrowed: [`SubmissionHalf`] and [`CompletionHalf`].

use std::ops::Deref;
use std::time::Duration;

use static_assertions::assert_not_impl_any;
use vmring_core::{Class, Frame, GuestBuffer, SKIP_SUCCESS};

use crate::error::{BatchError, Error, GuestSubmitError, SubmitError, SubmitErrorKind};
use crate::ring::complete::{CompletionQueue, Reap};
use crate::ring::completion::{Completion, CompletionInfo, Peek};
use crate::ring::submit::SubmissionQueue;

/// The submitting half of a ring, borrowed by [`Ring::split`](crate::Ring::split). It dereferences
/// to the [`SubmissionQueue`] for what needs no exclusive access.
///
/// While the other half is reaping, in `for done in cq.reap()`, the doorbell waits for the end of
/// the loop. Entries that fill whole cache lines are published at once, so that an engine that is
/// awake takes them: at most four entries wait for that, or sixteen while 32 or more are in flight.
/// When the loop ends, the rest is published and the doorbell is rung once. That costs a fence
/// (none with `Drive::Inline`), and a wake-up if the engine sleeps.
///
/// Both borrowed halves stay on one thread. [`Ring::into_split`](crate::Ring::into_split) is for
/// two threads.
#[derive(Debug)]
pub struct SubmissionHalf<'a> {
    /// Shared with the other half, which publishes and rings for what was deferred.
    pub(super) sq: &'a SubmissionQueue,
}

/// The reaping half of a ring, borrowed by [`Ring::split`](crate::Ring::split). It dereferences to
/// the [`CompletionQueue`] for what needs no exclusive access. It stays on its thread, as the
/// [submitting half](SubmissionHalf) does.
#[derive(Debug)]
pub struct CompletionHalf<'a> {
    pub(super) cq: &'a mut CompletionQueue,
    pub(super) sq: &'a SubmissionQueue,
}

// Both halves refer to the submission queue, which is not `Sync`, so both are on one thread. So a
// submit sees whether the other half is reaping, without a fence.
assert_not_impl_any!(SubmissionHalf<'_>: Send, Sync);
assert_not_impl_any!(CompletionHalf<'_>: Send, Sync);

impl SubmissionHalf<'_> {
    /// Submits a read, as [`SubmissionQueue::submit_read`] does. While the other half is reaping,
    /// the doorbell waits for the end of its loop.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::submit_read`].
    #[inline]
    pub fn submit_read(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submit::<0>(Class::Read, frame, user_data)
    }

    /// Submits a write, as [`SubmissionQueue::submit_write`] does. While the other half is reaping,
    /// the doorbell waits for the end of its loop.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::submit_write`].
    #[inline]
    pub fn submit_write(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.submit::<0>(Class::Write, frame, user_data)
    }

    /// Submits a write that has no completion if it succeeds, as
    /// [`SubmissionQueue::submit_write_skip_success`] does. While the other half is reaping, the
    /// doorbell waits for the end of its loop.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::submit_write`].
    #[inline]
    pub fn submit_write_skip_success(
        &mut self,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        self.submit::<SKIP_SUCCESS>(Class::Write, frame, user_data)
    }

    /// Submits a read into the memory of a guest, as [`SubmissionQueue::submit_read_guest`] does.
    /// While the other half is reaping, the doorbell waits for the end of its loop.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::submit_read_guest`].
    pub fn submit_read_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.sq.push_guest::<0>(Class::Read, buffer, user_data)?;
        self.sq.ring_or_defer();
        Ok(())
    }

    /// Submits a write from the memory of a guest, as [`SubmissionQueue::submit_write_guest`] does.
    /// While the other half is reaping, the doorbell waits for the end of its loop.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::submit_write_guest`].
    pub fn submit_write_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.sq.push_guest::<0>(Class::Write, buffer, user_data)?;
        self.sq.ring_or_defer();
        Ok(())
    }

    #[inline(always)]
    fn submit<const FLAGS: u32>(
        &mut self,
        class: Class,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        self.sq.push::<FLAGS>(class, frame, user_data)?;
        self.sq.ring_or_defer();
        Ok(())
    }

    /// Submits many reads, as [`SubmissionQueue::submit_reads`] does, and rings the doorbell at
    /// once.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::submit_reads`].
    pub fn submit_reads(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_batch::<0>(Class::Read, frames)
    }

    /// Submits many writes, as [`SubmissionQueue::submit_writes`] does, and rings the doorbell at
    /// once.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::submit_writes`].
    pub fn submit_writes(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_batch::<0>(Class::Write, frames)
    }

    /// Submits many writes that have no completion if they succeed, as
    /// [`SubmissionQueue::submit_writes_skip_success`] does, and rings the doorbell at once.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::submit_writes`].
    pub fn submit_writes_skip_success(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_batch::<SKIP_SUCCESS>(Class::Write, frames)
    }

    /// Submits a cancel, as [`SubmissionQueue::cancel`] does, and rings the doorbell at once.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::cancel`].
    pub fn cancel(&mut self, target: u64, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.sq.submit_cancel(Some(target), user_data)
    }

    /// Submits a cancel of everything, as [`SubmissionQueue::cancel_all`] does, and rings the
    /// doorbell at once.
    ///
    /// # Errors
    ///
    /// Those of [`SubmissionQueue::cancel_all`].
    pub fn cancel_all(&mut self, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.sq.submit_cancel(None, user_data)
    }

    /// Returns how many reads can be submitted now. See [`SubmissionQueue::read_credits`].
    pub fn read_credits(&mut self) -> u32 {
        self.sq.producer.available(Class::Read)
    }

    /// Returns how many writes can be submitted now. See [`SubmissionQueue::write_credits`].
    pub fn write_credits(&mut self) -> u32 {
        self.sq.producer.available(Class::Write)
    }

    pub(crate) fn post_reads(&mut self, user_data: u64) -> Result<(), Error> {
        self.sq.post_reads(user_data)
    }
}

impl CompletionHalf<'_> {
    /// Returns the completions that wait, as [`CompletionQueue::reap`] does. What the other half
    /// submits while the iterator lives is published, and its doorbell rung, at the latest when the
    /// iterator is dropped.
    #[inline]
    pub fn reap(&mut self) -> HalfReap<'_> {
        self.cq.refresh();
        self.begin_reaping()
    }

    /// Returns the completions that wait and are `wanted`, as [`CompletionQueue::reap_if`] does, and
    /// leaves the others in the queue. The doorbell waits as in [`reap`](Self::reap).
    pub fn reap_if(&mut self, wanted: impl FnMut(&CompletionInfo) -> bool) -> HalfReap<'_> {
        self.cq.refresh();
        self.cq.select(wanted);
        self.begin_reaping()
    }

    /// Looks at the next completion and leaves it in the queue. See [`CompletionQueue::peek`].
    pub fn peek(&mut self) -> Option<Peek<'_>> {
        self.cq.peek()
    }

    #[inline(always)]
    fn begin_reaping(&mut self) -> HalfReap<'_> {
        self.sq.producer.begin_run(&self.cq.consumer);
        HalfReap { reap: Reap { consumer: &mut self.cq.consumer }, sq: self.sq }
    }

    /// Returns how many completions wait. See [`CompletionQueue::ready`].
    pub fn ready(&mut self) -> usize {
        self.cq.ready()
    }

    /// Sleeps until `min` completions wait or `timeout` has passed. Returns how many wait. See
    /// [`CompletionQueue::wait`].
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

/// The iterator that [`CompletionHalf::reap`] and [`CompletionHalf::reap_if`] return: the completions
/// that waited at that call.
///
/// When it is dropped, what was submitted meanwhile is published and the doorbell is rung. If it is
/// forgotten instead, that happens at the next [`Ring::split`](crate::Ring::split), or at the next
/// submission through the [`Ring`](crate::Ring) itself.
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
        self.sq.flush_deferred();
    }
}
