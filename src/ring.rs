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
//!         let frame = done.take_packet()?;
//!         if done.user_data == 1 {
//!             assert_eq!(frame.view().be16(12), Some(0x88b5));
//!         }
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```

mod complete;
mod completion;
mod control;
mod split;
mod submit;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use vmring_core::{Frame, Pool};

use crate::device::seam::Capabilities;
use crate::error::{BatchError, Error, SubmitError, SubmitErrorKind};
use crate::stats::RingStats;

pub use complete::{CompletionQueue, Reap};
pub use completion::{Completion, RingOp};
pub use control::RingControl;
pub use split::{CompletionHalf, HalfReap, SubmissionHalf};
pub use submit::SubmissionQueue;

/// Both halves of a ring. See the [module](self) for an example.
#[derive(Debug)]
pub struct Ring {
    sq: SubmissionQueue,
    cq: CompletionQueue,
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
        sq.flush_deferred();
        (SubmissionHalf { sq }, CompletionHalf { cq, sq })
    }

    /// The two halves, owned; they may live on two threads. The ring closes when the reaping half is
    /// dropped.
    pub fn into_split(self) -> (SubmissionQueue, CompletionQueue) {
        let Self { mut sq, cq } = self;
        sq.drives_engine = false;
        (sq, cq)
    }

    /// The ring's pools; [`alloc`](Self::alloc) takes from the first.
    pub fn pools(&self) -> &[Pool] {
        self.sq.producer.regions().pools()
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

    /// Submits reads and writes, with at most one doorbell for all of them, and then waits as
    /// [`wait`](Self::wait) does. Returns how many completions wait.
    ///
    /// Like [`submit_reads`](Self::submit_reads), it takes no more from an iterator than it can submit.
    ///
    /// # Errors
    ///
    /// [`BatchError`] with the frame that could not be taken for a reason other than backpressure, and
    /// the number of entries before it, which are in flight. In that case it does not wait.
    ///
    /// # Examples
    ///
    /// ```
    /// use vmring::{Direction, Interface, Loopback, RingOp};
    ///
    /// let interface = Interface::builder().device(Loopback::new(1500)).start()?;
    /// let mut ring = interface.ring(Direction::Both).build()?;
    /// let read = ring.alloc().expect("a fresh ring has free frames");
    /// let mut write = ring.alloc().expect("a fresh ring has free frames");
    /// write.copy_from(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello")?;
    ///
    /// assert_eq!(ring.submit_and_wait([(read, 1)], [(write, 2)], 2, None)?, 2);
    /// assert!(ring.reap().all(|done| done.result == Ok(20)));
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    #[doc(alias = "io_uring_submit_and_wait")]
    #[doc(alias = "io_uring_submit_and_wait_timeout")]
    pub fn submit_and_wait(
        &mut self,
        reads: impl IntoIterator<Item = (Frame, u64)>,
        writes: impl IntoIterator<Item = (Frame, u64)>,
        min: usize,
        timeout: Option<Duration>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_both(reads, writes)?;
        Ok(self.cq.wait(min, timeout))
    }

    /// See [`CompletionQueue::wait`].
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
        self.cq.wait(min, timeout)
    }

    /// See [`CompletionQueue::in_flight`].
    pub fn in_flight(&self) -> usize {
        self.cq.in_flight()
    }

    /// See [`CompletionQueue::cancel_and_wait`].
    pub fn cancel_and_wait(&mut self, timeout: Duration) -> Result<usize, Error> {
        self.cq.cancel_and_wait(timeout)
    }

    /// See [`CompletionQueue::completion_fd`].
    pub fn completion_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.cq.completion_fd()
    }

    /// See [`CompletionQueue::arm`].
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm(&mut self) -> bool {
        self.cq.arm()
    }

    /// See [`CompletionQueue::arm_after`].
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm_after(&mut self, n: usize, max_delay: Option<Duration>) -> bool {
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

/// As for [`CompletionQueue`].
impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.cq.as_fd()
    }
}

/// As for [`CompletionQueue`].
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.cq.as_raw_fd()
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
        assert!(!ring(Drive::Thread).sq.drives_engine);
        let inline = ring(Drive::Inline);
        assert!(inline.sq.drives_engine);
        let (sq, _cq) = inline.into_split();
        assert!(!sq.drives_engine);
    }
}
