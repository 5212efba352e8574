//! [`Ring`]: submit frames, reap completions.
//!
//! ```
//! use vmring::{Direction, Interface, Loopback};
//!
//! let interface = Interface::builder().device(Loopback::new(1500)).start()?;
//! let mut ring = interface.ring(Direction::Both).build()?;
//!
//! // A frame for a packet to arrive in, and a packet to send.
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
//!
//! # The hot loop
//!
//! [`Ring::split`] borrows the two halves of a ring. A loop over the completions can submit each
//! frame again at once. The doorbell is rung at most once per loop; see [`SubmissionHalf`].
//!
//! A packet that failed must not end the loop. For example, the writes of a TAP fail with
//! [`Status::Os(EIO)`](crate::Status::Os) while its link is down, and the ring goes on.
//!
//! ```
//! use vmring::{CloseReason, CompletionError, Error, Frame, Ring, RingOp};
//!
//! /// Receives packets until the ring closes. `handle` gives each frame back for the next packet.
//! fn run(ring: &mut Ring, handle: impl Fn(Frame) -> Frame) -> Result<Option<CloseReason>, Error> {
//!     // Post reads, because a device receives only into posted frames. The rest is for writes.
//!     let frames: Vec<_> = std::iter::from_fn(|| ring.alloc()).take(256).collect();
//!     ring.submit_reads(frames.into_iter().zip(0..))?;
//!
//!     // Each read is posted again, so reads are in flight until the ring closes or drains.
//!     while ring.in_flight() > 0 {
//!         ring.wait(1, None);
//!         let (mut sq, mut cq) = ring.split();
//!         for done in cq.reap() {
//!             let frame = match (done.op, done.take_packet()) {
//!                 (RingOp::Read, Ok(frame)) => handle(frame),
//!                 // No packet came, for example because the interface was restarted.
//!                 (RingOp::Read, Err(CompletionError { frame: Some(frame), .. })) => frame,
//!                 // This packet was not sent. Its frame returns to its pool here.
//!                 (RingOp::Write, Err(failed)) => {
//!                     eprintln!("write {} failed: {failed}", failed.user_data);
//!                     continue;
//!                 }
//!                 // A packet was sent, and its frame returns to its pool here. Or a cancel has
//!                 // completed, which has no packet.
//!                 _ => continue,
//!             };
//!             // A ring that closes or drains refuses. The frame returns to its pool here.
//!             let _ = sq.submit_read(frame, done.user_data);
//!         }
//!     }
//!     Ok(ring.control().closed())
//! }
//! # use vmring::{Direction, Interface, Loopback};
//! # let interface = Interface::builder().device(Loopback::new(1500)).start()?;
//! # let mut ring = interface.ring(Direction::Both).build()?;
//! # let mut packet = ring.alloc().expect("a fresh ring has free frames");
//! # packet.copy_from(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello")?;
//! # ring.submit_write(packet, 0)?;
//! # ring.cancel(7, 0)?;
//! # let control = ring.control();
//! # let closed = run(&mut ring, |frame| {
//! #     assert_eq!(&frame[14..], b" hello");
//! #     control.stop();
//! #     frame
//! # })?;
//! # assert_eq!(closed, Some(CloseReason::Stopped));
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! # One ring or two
//!
//! A ring for both directions ([`Direction::Both`](crate::Direction::Both)) is right for most
//! callers: one thread sleeps once for both directions, one doorbell serves the reads and the writes
//! of a round, and a frame that came in can go out again without a copy. Each direction has credits of
//! its own, so reads that fill the ring hold up no write. Completions come in one order, but
//! [`Ring::reap_if`] takes the writes and leaves those reads in the ring that cannot be taken yet, for
//! example because the guest has posted no buffer. So a full guest holds up neither its own
//! transmissions nor the frames that they return.
//!
//! Two rings on one interface, one that reads and one that writes, are better in these cases:
//!
//! * **Two threads of yours do the work**, as with a receive and a transmit thread per queue pair. The
//!   halves of one ring can be on two threads, but only one thread can reap. So the thread that reaps
//!   would have to hand each frame of a finished write over to the other one, by a queue of your own
//!   and a second wake-up. With two rings each thread reaps what it has submitted.
//! * **One direction must not wait for the other inside the device.** An engine makes one call to the
//!   device at a time. While a call sends a large batch, or a slow device blocks in it, the same
//!   engine receives nothing. Two rings with two threads ([`Drive::Thread`]) receive meanwhile.
//! * **The directions want different waits.** A ring has one arming. If received packets should
//!   interrupt the guest at once, and finished writes only in batches of 32 or after a millisecond
//!   ([`Ring::arm_after`]), one ring would have to wake for both at the sooner of the two.
//! * **You drain, cancel or close one direction alone.** [`Ring::drain`] and [`Ring::close`] concern the
//!   whole ring. For example, a guest that resets its receive queue only would stop its writes too.
//!
//! Two rings cost a second poller thread, or a second place on a [shared](crate::Drive::Shared) one, a second
//! wake-up where both directions are busy, and some memory. Give both the same
//! [`pool`](crate::RingBuilder::pool) if frames that came in go out again. A ring for each direction
//! counts as one reading and one writing ring, which every device serves
//! ([`Capabilities::reading_rings`]).
//!
//! # Ways to wait
//!
//! | the caller | uses |
//! |---|---|
//! | may block | [`Ring::wait`], [`Ring::submit_and_wait`] |
//! | has an event loop (epoll, kqueue) | [`Ring::completion_fd`] with [`Ring::arm`] or [`Ring::arm_after`]; with [`Drive::Inline`] also [`Ring::next_deadline`] |
//! | is a future | [`Ring::poll_ready`], or [`AsyncRing`](crate::AsyncRing) |
//! | never waits | [`Ring::reap`], which does not block |
//!
//! [`RingControl::wake`] ends a wait from any thread.
//!
//! # Errors
//!
//! * A refused submit returns [`SubmitError`] or [`BatchError`], with the frame inside.
//!   [`SubmitError::is_backpressure`] says whether the same submit can succeed later.
//! * An entry that failed completes as every other one does: [`Completion::result`] has the
//!   [`EntryError`](crate::EntryError), and the frame comes back. [`Completion::take_packet`] makes
//!   a [`CompletionError`](crate::CompletionError) of it.
//! * A closed ring refuses submits with its [`CloseReason`](crate::CloseReason). What is in flight
//!   still completes.
//!
//! # Cancel and close
//!
//! * [`Ring::cancel`] and [`Ring::cancel_all`] ask for entries to complete soon. They have
//!   completions of their own.
//! * [`Ring::cancel_and_wait`] completes everything in flight and keeps the ring open.
//! * [`Ring::close`] completes everything in flight, ends the ring and reports how it went.
//!   Dropping the ring closes it too. [`RingControl::stop`] closes it from any thread without
//!   waiting.
//!
//! # Coming from liburing
//!
//! | liburing | vmring |
//! |---|---|
//! | `io_uring_queue_init_params` | [`Interface::ring`](crate::Interface::ring), [`RingBuilder`](crate::RingBuilder) |
//! | `io_uring_get_sqe` + `io_uring_prep_read`/`_write` + `io_uring_submit` | [`Ring::submit_read`], [`Ring::submit_write`]: one call, which publishes at once |
//! | `io_uring_submit` after many preps | [`Ring::submit_reads`], [`Ring::submit_writes`] |
//! | `io_uring_submit_and_wait` | [`Ring::submit_and_wait`] |
//! | `io_uring_wait_cqes`, `io_uring_wait_cqe_timeout` | [`Ring::wait`] |
//! | `io_uring_for_each_cqe` + `io_uring_cq_advance` | [`Ring::reap`] |
//! | `io_uring_peek_cqe`, and `io_uring_cqe_seen` or not | [`Ring::peek`], and [`Peek::take`] or not; [`Ring::reap_if`] for many |
//! | `io_uring_cqe_get_data64` | [`Completion::user_data`] |
//! | `cqe->res` | [`Completion::result`] |
//! | `IORING_SETUP_SQPOLL` | [`Drive::Thread`] (a thread for the ring), [`Drive::Shared`] (a thread for many rings) |
//! | `IORING_SETUP_SQ_AFF`, `sq_thread_cpu` | [`RingBuilder::cpu`](crate::RingBuilder::cpu); of a shared thread, [`PollerBuilder::cpu`](crate::PollerBuilder::cpu) |
//! | `sq_thread_idle` | [`IdlePolicy`](crate::IdlePolicy), in rounds instead of milliseconds |
//! | `IORING_SQ_NEED_WAKEUP` | the doorbell, which the library rings itself |
//! | `IORING_FEAT_NODROP` | credits: the CQ never overflows, because a submit without a credit is refused ([`SubmitErrorKind::NoCredit`]) |
//! | provided buffers, multishot receive | many posted reads: each takes one frame and completes once |
//! | registered buffers | [`Pool`] |
//! | `IORING_REGISTER_EVENTFD` | [`Ring::completion_fd`] with [`Ring::arm`]: one signal per arming |
//! | `io_uring_prep_cancel64` with `IORING_ASYNC_CANCEL_ALL` | [`Ring::cancel`], which finds every entry of that `user_data` |
//! | `IORING_ASYNC_CANCEL_ANY` | [`Ring::cancel_all`] |
//! | `IOSQE_CQE_SKIP_SUCCESS` | [`Ring::submit_write_skip_success`], for writes; a failure completes |
//! | `io_uring_queue_exit` | [`Ring::close`], or dropping the ring |
//! | `io_uring_enter` with `IORING_ENTER_GETEVENTS` and `IORING_SETUP_DEFER_TASKRUN` | [`Drive::Inline`] with [`Ring::reap`] or [`Ring::wait`] |
//!
//! [`Drive::Thread`]: crate::Drive::Thread
//! [`Drive::Shared`]: crate::Drive::Shared
//! [`Drive::Inline`]: crate::Drive::Inline

mod complete;
mod completion;
mod control;
mod split;
mod submit;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use vmring_core::{Class, Frame, GuestBuffer, Pool};

use crate::device::seam::Capabilities;
use crate::error::{BatchError, Error, GuestSubmitError, SubmitError, SubmitErrorKind};
use crate::stats::RingStats;

pub use complete::{CompletionQueue, Reap};
pub use completion::{Completion, CompletionInfo, Peek, RingOp};
pub use control::RingControl;
pub use split::{CompletionHalf, HalfReap, SubmissionHalf};
pub use submit::SubmissionQueue;

/// A pair of queues between a VMM and a device: both halves of a ring. See the [module](self) for
/// an example.
///
/// The calls that submit are those of the [`SubmissionQueue`], the others those of the
/// [`CompletionQueue`]. [`split`](Self::split) borrows the halves, [`into_split`](Self::into_split)
/// takes the ring apart.
#[derive(Debug)]
pub struct Ring {
    sq: SubmissionQueue,
    cq: CompletionQueue,
}

impl Ring {
    pub(crate) fn new(sq: SubmissionQueue, cq: CompletionQueue) -> Self {
        Self { sq, cq }
    }

    /// Borrows the two halves, so that one can submit while the other is reaped: the hot loop, see
    /// the [module](self#the-hot-loop).
    ///
    /// Both stay on this thread. The doorbell for what is submitted inside a loop over
    /// [`CompletionHalf::reap`] is rung once, when the loop ends; see [`SubmissionHalf`].
    #[inline]
    pub fn split(&mut self) -> (SubmissionHalf<'_>, CompletionHalf<'_>) {
        let Self { sq, cq } = self;
        // Only a `HalfReap` that was forgotten leaves something to publish.
        sq.flush_deferred();
        (SubmissionHalf { sq }, CompletionHalf { cq, sq })
    }

    /// Takes the ring apart into its two halves, which may live on two threads. The ring closes
    /// when the [`CompletionQueue`] is dropped.
    ///
    /// With [`Drive::Inline`](crate::Drive::Inline) the thread that has the [`CompletionQueue`]
    /// drives the device.
    pub fn into_split(self) -> (SubmissionQueue, CompletionQueue) {
        let Self { mut sq, cq } = self;
        sq.drives_engine = false;
        (sq, cq)
    }

    /// Returns the ring's pools. [`alloc`](Self::alloc) takes from the first.
    pub fn pools(&self) -> &[Pool] {
        self.sq.producer.regions().pools()
    }

    /// Takes a free frame from the ring's first pool, or returns `None`. See
    /// [`SubmissionQueue::alloc`].
    pub fn alloc(&self) -> Option<Frame> {
        self.sq.alloc()
    }

    /// Submits a frame that the device fills with the next packet. See
    /// [`SubmissionQueue::submit_read`], also for the errors.
    #[inline]
    pub fn submit_read(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.sq.submit_read(frame, user_data)
    }

    /// Submits a frame whose packet the device sends. See [`SubmissionQueue::submit_write`], also
    /// for the errors.
    #[inline]
    pub fn submit_write(&mut self, frame: Frame, user_data: u64) -> Result<(), SubmitError> {
        self.sq.submit_write(frame, user_data)
    }

    /// Submits a write that has no completion if it succeeds: its frame returns to its pool, and its
    /// credit comes back, by themselves. A failure completes. See
    /// [`SubmissionQueue::submit_write_skip_success`], also for the errors.
    #[doc(alias = "IOSQE_CQE_SKIP_SUCCESS")]
    #[inline]
    pub fn submit_write_skip_success(
        &mut self,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        self.sq.submit_write_skip_success(frame, user_data)
    }

    /// Submits a guest's buffer to be filled with a packet. See
    /// [`SubmissionQueue::submit_read_guest`], also for the errors.
    pub fn submit_read_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.sq.submit_read_guest(buffer, user_data)
    }

    /// Submits a packet in the memory of a guest, which the device sends. See
    /// [`SubmissionQueue::submit_write_guest`], also for the errors.
    pub fn submit_write_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.sq.submit_write_guest(buffer, user_data)
    }

    /// Submits a guest's buffer to be filled, at the next [`publish`](Self::publish) or submission. See
    /// [`SubmissionQueue::stage_read_guest`], also for the errors.
    #[inline]
    pub fn stage_read_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.sq.stage_read_guest(buffer, user_data)
    }

    /// Submits a packet in the memory of a guest, at the next [`publish`](Self::publish) or submission.
    /// See [`SubmissionQueue::stage_write_guest`], also for the errors.
    #[inline]
    pub fn stage_write_guest(
        &mut self,
        buffer: GuestBuffer,
        user_data: u64,
    ) -> Result<(), GuestSubmitError> {
        self.sq.stage_write_guest(buffer, user_data)
    }

    /// Shows the device what was staged. See [`SubmissionQueue::publish`].
    #[inline]
    pub fn publish(&mut self) {
        self.sq.publish();
    }

    /// Submits many reads with at most one doorbell. See [`SubmissionQueue::submit_reads`], also
    /// for the errors.
    pub fn submit_reads(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_reads(frames)
    }

    /// Submits many writes with at most one doorbell. See [`SubmissionQueue::submit_writes`], also
    /// for the errors.
    pub fn submit_writes(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_writes(frames)
    }

    /// Submits many writes that have no completion if they succeed, with at most one doorbell. See
    /// [`SubmissionQueue::submit_writes_skip_success`], also for the errors.
    pub fn submit_writes_skip_success(
        &mut self,
        frames: impl IntoIterator<Item = (Frame, u64)>,
    ) -> Result<usize, BatchError> {
        self.sq.submit_writes_skip_success(frames)
    }

    /// Returns how many reads can be submitted now. See [`SubmissionQueue::read_credits`].
    pub fn read_credits(&mut self) -> u32 {
        self.sq.read_credits()
    }

    /// Returns how many writes can be submitted now. See [`SubmissionQueue::write_credits`].
    pub fn write_credits(&mut self) -> u32 {
        self.sq.write_credits()
    }

    /// Asks for the entries in flight whose `user_data` is `target` to complete now. See
    /// [`SubmissionQueue::cancel`], also for the errors.
    pub fn cancel(&mut self, target: u64, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.sq.cancel(target, user_data)
    }

    /// Asks for every entry in flight to complete now. See [`SubmissionQueue::cancel_all`], also
    /// for the errors.
    pub fn cancel_all(&mut self, user_data: u64) -> Result<(), SubmitErrorKind> {
        self.sq.cancel_all(user_data)
    }

    /// Returns the completions that wait, oldest first. Never blocks. See
    /// [`CompletionQueue::reap`].
    #[inline]
    pub fn reap(&mut self) -> Reap<'_> {
        self.cq.reap()
    }

    /// Returns how many completions wait to be reaped. See [`CompletionQueue::ready`].
    pub fn ready(&mut self) -> usize {
        self.cq.ready()
    }

    /// Looks at the next completion and leaves it in the queue. Never blocks. See
    /// [`CompletionQueue::peek`].
    pub fn peek(&mut self) -> Option<Peek<'_>> {
        self.cq.peek()
    }

    /// Returns the completions that wait and are `wanted`, oldest first, and leaves the others in the
    /// queue. Never blocks. See [`CompletionQueue::reap_if`].
    pub fn reap_if(&mut self, wanted: impl FnMut(&CompletionInfo) -> bool) -> Reap<'_> {
        self.cq.reap_if(wanted)
    }

    /// Submits reads and writes with at most one doorbell for all of them, and then waits as
    /// [`wait`](Self::wait) does. Returns how many completions wait.
    ///
    /// Like [`submit_reads`](Self::submit_reads), it takes no more from an iterator than it can
    /// submit.
    ///
    /// # Errors
    ///
    /// [`BatchError`] with the first frame that was refused for a reason other than backpressure,
    /// and with the number of entries before it, which are in flight. In this case it does not
    /// wait.
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

    /// Sleeps until `min` completions wait or `timeout` has passed, or until nothing is in flight.
    /// Returns how many wait. See [`CompletionQueue::wait`].
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
        self.cq.wait(min, timeout)
    }

    /// Returns the number of submissions that are not reaped yet. See
    /// [`CompletionQueue::in_flight`].
    pub fn in_flight(&self) -> usize {
        self.cq.in_flight()
    }

    /// Cancels everything in flight and waits until it has completed. See
    /// [`CompletionQueue::cancel_and_wait`], also for the errors.
    pub fn cancel_and_wait(&mut self, timeout: Duration) -> Result<usize, Error> {
        self.cq.cancel_and_wait(timeout)
    }

    /// Lets everything in flight end, and refuses new submissions until [`resume`](Self::resume). See
    /// [`CompletionQueue::drain`], also for the errors.
    pub fn drain(&mut self, timeout: Duration) -> Result<usize, Error> {
        self.cq.drain(timeout)
    }

    /// Takes submissions again after [`drain`](Self::drain). See [`CompletionQueue::resume`].
    pub fn resume(&mut self) {
        self.cq.resume();
    }

    /// Whether the ring was built for reading.
    pub(crate) fn has_reads(&self) -> bool {
        self.sq.has(Class::Read)
    }

    /// Whether the ring was built for writing.
    pub(crate) fn has_writes(&self) -> bool {
        self.sq.has(Class::Write)
    }

    /// Whether no entry completes any more, unless a thread of the device drops a slot that it has.
    pub(crate) fn is_over(&self) -> bool {
        self.cq.is_over()
    }

    /// One step of a close that does not wait. See [`CompletionQueue::try_close`].
    pub(crate) fn try_close(&mut self, began: Instant) -> Option<Result<(), Error>> {
        self.cq.try_close(began)
    }

    /// Returns the descriptor for an event loop. See [`CompletionQueue::completion_fd`], also for
    /// the errors.
    pub fn completion_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.cq.completion_fd()
    }

    /// Asks for a signal at the next completion. Returns whether it is armed. See
    /// [`CompletionQueue::arm`].
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm(&mut self) -> bool {
        self.cq.arm()
    }

    /// Asks for a signal when `n` completions wait, or `max_delay` after the first one. Returns
    /// whether it is armed. See [`CompletionQueue::arm_after`].
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm_after(&mut self, n: usize, max_delay: Option<Duration>) -> bool {
        self.cq.arm_after(n, max_delay)
    }

    /// For futures: returns how many completions wait, if they are at least `n`. See
    /// [`CompletionQueue::poll_ready`].
    pub fn poll_ready(&mut self, cx: &mut Context<'_>, n: usize) -> Poll<usize> {
        self.cq.poll_ready(cx, n)
    }

    /// With [`Drive::Inline`](crate::Drive::Inline): returns the time of the next call that the
    /// ring needs even if the descriptor does not become readable. See
    /// [`CompletionQueue::next_deadline`].
    pub fn next_deadline(&self) -> Option<Instant> {
        self.cq.next_deadline()
    }

    /// Returns the ring's counters. See [`CompletionQueue::stats`].
    pub fn stats(&self) -> RingStats {
        self.cq.stats()
    }

    /// Returns what the ring's device can do. See [`CompletionQueue::capabilities`].
    pub fn capabilities(&self) -> Capabilities {
        self.cq.capabilities()
    }

    /// Returns a handle for any thread. See [`CompletionQueue::control`].
    pub fn control(&self) -> RingControl {
        self.cq.control()
    }

    /// Closes the ring, and waits until the device has released everything. See
    /// [`CompletionQueue::close`], also for the errors.
    pub fn close(&mut self) -> Result<(), Error> {
        self.cq.close()
    }
}

/// The descriptor of [`Ring::completion_fd`].
///
/// # Panics
///
/// If the descriptor cannot be created. This cannot happen once `completion_fd` has succeeded.
impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.cq.as_fd()
    }
}

/// The descriptor of [`Ring::completion_fd`], as [`AsFd`] gives it. Panics as [`AsFd`] does.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.cq.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use crate::{Direction, Drive, Interface, Loopback};

    /// Checks the flag alone, because a wake-up that is lost for want of the fence is too rare for
    /// a test to wait for.
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
