//! The two halves, borrowed: [`SubmissionHalf`] and [`CompletionHalf`].

use std::ops::Deref;
use std::time::Duration;

use static_assertions::assert_not_impl_any;
use vmring_core::{Class, Frame};

use crate::error::{BatchError, Error, SubmitError, SubmitErrorKind};
use crate::ring::complete::{CompletionQueue, Reap};
use crate::ring::completion::Completion;
use crate::ring::submit::{Deferred, SubmissionQueue};

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
    pub(super) sq: &'a SubmissionQueue,
}

/// The reaping half, borrowed from its ring by [`Ring::split`]. It dereferences to the
/// [`CompletionQueue`] for what needs no exclusive access, and stays on its thread as the
/// [other](SubmissionHalf).
#[derive(Debug)]
pub struct CompletionHalf<'a> {
    pub(super) cq: &'a mut CompletionQueue,
    pub(super) sq: &'a SubmissionQueue,
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
        if self.sq.deferred.get() == Deferred::Off {
            self.sq.ring_doorbell();
        } else {
            self.sq.deferred.set(Deferred::Pending);
            self.sq.producer.publish_lines();
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
        self.sq.producer.available(Class::Read)
    }

    /// See [`SubmissionQueue::write_credits`].
    pub fn write_credits(&mut self) -> u32 {
        self.sq.producer.available(Class::Write)
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
        self.cq.refresh();
        self.sq.producer.begin_run(&self.cq.consumer);
        if self.sq.deferred.get() == Deferred::Off {
            self.sq.deferred.set(Deferred::Open);
        }
        HalfReap { reap: Reap { consumer: &mut self.cq.consumer }, sq: self.sq }
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
        self.sq.flush_deferred();
    }
}
