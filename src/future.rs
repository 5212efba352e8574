//! The asynchronous front-end: futures that wake by [`Waker`], for any executor.
//!
//! ```
//! use vmring::{AsyncRing, Direction, Interface, Loopback, block_on};
//!
//! let interface = Interface::builder().device(Loopback::new(1500)).start()?;
//! let packets = AsyncRing::new(interface.ring(Direction::Both).build()?)?;
//! block_on(async {
//!     packets.write(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello").await?;
//!     let packet = packets.read().await?;
//!     assert_eq!(&packet[14..], b" hello");
//!     Ok::<(), vmring::Error>(())
//! })?;
//! # Ok::<(), vmring::Error>(())
//! ```
//!
//! Unlike a ring, an [`AsyncRing`] has a lock: many tasks may read and write through it.

#[cfg(feature = "futures")]
pub(crate) mod streams;
pub(crate) mod write;

use crate::background::Background;
use crate::device::catch::catch_panic;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use vmring_core::Frame;
use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::sync::{AtomicBool, AtomicU64, Ordering};

use crate::error::{CloseReason, ConfigError, EntryError, Error, SubmitErrorKind};
use crate::limits::CLOSE_RETRY;
use crate::mailbox::RingPark;
use crate::ring::{Ring, RingControl, RingOp};
use crate::sync::Mutex;
use crate::sys::{lock, sleep};

/// A ring behind futures. A clone is a handle on the same ring, for another task.
///
/// It has what [`BlockingRing`](crate::BlockingRing) has, apart from a read with a timeout: that is the
/// executor's timeout around [`read`](Self::read), whose future can be dropped at any time. With the
/// feature `futures`, `packets` returns a `Stream` of packets, and `frame_sink` and `packet_sink` a
/// `Sink` for them.
///
/// When the last handle and the last future are dropped, the ring closes, and the thread that drops
/// waits for the device. In a task, await [`close`](Self::close) before.
#[derive(Clone)]
pub struct AsyncRing {
    state: Arc<Mutex<State>>,
    sleepers: Arc<Sleepers>,
    /// The number of the next future, stream or sink, which is the `user_data` of its writes.
    numbers: Arc<AtomicU64>,
}

impl fmt::Debug for AsyncRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncRing").finish_non_exhaustive()
    }
}

struct State {
    ring: Ring,
    /// Packets that have come and that no reader has taken yet.
    ready: VecDeque<Frame>,
    /// What became of the writes of each future or sink that lives and has sent something, by its
    /// number.
    writes: BTreeMap<u64, Answers>,
    /// The number of writes in flight, including those whose future was dropped.
    writes_in_flight: usize,
    /// The first error of a read that no reader has returned yet.
    failed: Option<EntryError>,
    /// Wakers that others have replaced, to be dropped outside the lock.
    replaced: Vec<Waker>,
}

/// What became of the writes of one future or sink.
#[derive(Debug, Default)]
struct Answers {
    in_flight: usize,
    /// The first failure that was not reported yet.
    failed: Option<EntryError>,
}

/// Wakes the tasks when the ring has completions. All of them are woken, because each may be able
/// to proceed.
///
/// The ring's waker may be called inside a submit, by the very thread that works on the state. It
/// must not run tasks at that moment, because they would lock the state again. So the bell is armed
/// only while nobody works on the state. A call that finds it disarmed leaves `called` behind, and
/// the thread that unlocks the state looks at that after arming. The doorbell's protocol guarantees
/// that one of the two sees the other.
///
/// The state's own lock cannot tell the ring's waker whether somebody works on the state. To ask
/// the lock, the waker would need a reference to the ring, and the poller could be the one that
/// drops the last reference.
struct Sleepers(Doorbell<Tasks>);

#[derive(Default)]
struct Tasks {
    wakers: Mutex<BTreeMap<u64, Waker>>,
    /// The ring has called its waker, and the tasks are not woken yet.
    called: AtomicBool,
}

impl Tasks {
    fn wake_all(&self) {
        // Wakes outside the lock, because a waker may run any code.
        let wakers = std::mem::take(&mut *lock(&self.wakers));
        for waker in wakers.into_values() {
            // A waker that panics must not take the wake-ups of the others with it.
            if catch_panic(|| waker.wake()).is_err() {
                tracing::error!("a waker panicked");
            }
        }
    }

    /// Wakes the tasks if the ring has called.
    fn wake_if_called(&self) {
        // Acquire: pairs with the Release in `Sleepers::wake`.
        if self.called.swap(false, Ordering::Acquire) {
            self.wake_all();
        }
    }
}

impl Park for Tasks {
    /// Does nothing: a task sleeps in its executor.
    fn park(&self, _timeout: Option<Duration>) {}

    /// Wakes the tasks, also if another thread has answered the call meanwhile. This ring has disarmed
    /// the bell, perhaps after a task armed it again and went to sleep, and only a task that is polled
    /// arms it.
    fn unpark(&self) {
        // Acquire: pairs with the Release in `Sleepers::wake`.
        self.called.swap(false, Ordering::Acquire);
        self.wake_all();
    }
}

impl Sleepers {
    fn tasks(&self) -> &Tasks {
        self.0.parker()
    }
}

impl Wake for Sleepers {
    fn wake(self: Arc<Self>) {
        // Release: pairs with the Acquire in `wake_if_called`.
        self.tasks().called.store(true, Ordering::Release);
        self.0.ring();
    }
}

/// The most times that one poll of a future takes in completions and looks for its own.
const ROUNDS_OF_A_POLL: usize = 16;

/// The `user_data` of reads. Writes count from 0.
const READ: u64 = u64::MAX;

const INLINE: &str = "an async front-end needs a ring that a poller drives (Drive::Thread or \
                      Drive::Shared): nobody drives a ring with Drive::Inline while the tasks sleep";

impl AsyncRing {
    /// Takes over a ring on which nothing is in flight, and posts reads. A poller must drive the
    /// ring: its own ([`Drive::Thread`](crate::Drive::Thread), the default) or one for many rings
    /// ([`Drive::Shared`](crate::Drive::Shared)).
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a ring with [`Drive::Inline`](crate::Drive::Inline). While every task
    /// sleeps, nobody would drive such a ring when a device that took no packets must be tried
    /// again, or when a device's descriptor becomes readable. That needs a timer and a reactor, and
    /// so a particular runtime, but this front-end works with any. [`Error::Submit`] if the ring
    /// refuses to read into a frame of its own first pool.
    pub fn new(mut ring: Ring) -> Result<Self, Error> {
        if matches!(ring.split().0.shared.bell.parker(), RingPark::Inline(_)) {
            return Err(ConfigError::Invalid(INLINE.to_owned()).into());
        }
        let mut state = State {
            ring,
            ready: VecDeque::new(),
            writes: BTreeMap::new(),
            writes_in_flight: 0,
            failed: None,
            replaced: Vec::new(),
        };
        state.post_reads()?;
        let state = Arc::new(Mutex::new(state));
        let sleepers = Arc::new(Sleepers(Doorbell::new(Tasks::default())));
        Ok(Self { state, sleepers, numbers: Arc::default() })
    }

    /// Returns a future of the next packet. There may be any number of readers, and each packet
    /// goes to one of them. Dropping the future loses no packet: the packet goes to the next
    /// reader.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`] when the ring is closed and no packet is left or can still come,
    /// [`Error::Submit`] on a ring that only writes, [`Error::Entry`] if the
    /// device refused a read, [`Error::OutOfFrames`] if the caller holds so many frames that none
    /// is left to read into.
    pub fn read(&self) -> ReadFuture {
        ReadFuture { front: self.clone(), number: self.new_number() }
    }

    /// Returns the ring's control handle, for its counters and to close it.
    pub fn control(&self) -> RingControl {
        self.locked(|state| state.ring.control())
    }

    /// Returns a future that closes the ring, and is ready when the device has released everything.
    ///
    /// Everything in flight completes, as cancelled or with its packet. Packets that have come can
    /// still be read, also afterwards, and then the readers get [`Error::Closed`]. Writes are refused
    /// with that error from the first poll on. Closing twice is harmless, and closing does not need the
    /// other handles to be gone. After it, dropping the last handle does not wait.
    ///
    /// It blocks no executor and needs no runtime: a thread of the library's waits for the device,
    /// wakes the task, and ends. Nothing happens before the first poll of the future. If the future is
    /// dropped after that, the close goes on, and nobody hears how it ended.
    ///
    /// # Errors
    ///
    /// [`Error::Leaked`] as for [`Ring::close`]. [`Error::Io`] if the system refuses the thread. In the
    /// latter case nothing was closed.
    ///
    /// # Panics
    ///
    /// If the future is polled again after it was ready.
    pub fn close(&self) -> impl Future<Output = Result<(), Error>> + Send + Unpin + use<> {
        let front = self.clone();
        Background::new("vmring-waiter", "closing the ring", move || front.close_and_wait())
    }

    /// Closes the ring and waits, without holding the lock meanwhile, so that no task waits for it.
    fn close_and_wait(&self) -> Result<(), Error> {
        self.control().stop();
        let began = Instant::now();
        loop {
            let mut news = false;
            let answer = self.locked(|state| {
                let was_over = state.ring.is_over();
                let answer = state.ring.try_close(began);
                news = state.pump() || state.ring.is_over() != was_over;
                answer
            });
            // This thread may have taken the engine over, and then it is the one that hears of the
            // completions.
            if news || answer.is_some() {
                self.sleepers.tasks().wake_all();
            }
            match answer {
                Some(answer) => return answer,
                None => sleep(CLOSE_RETRY),
            }
        }
    }

    /// Locks the state and runs `f` on it, while the bell is disarmed. All access to the state goes
    /// through here.
    fn locked<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        /// Arms the bell, also if `f` panics.
        struct Working<'a>(&'a Sleepers);
        impl Drop for Working<'_> {
            fn drop(&mut self) {
                self.0.0.arm();
            }
        }
        let mut state = lock(&self.state);
        self.sleepers.0.disarm();
        let working = Working(&self.sleepers);
        let result = f(&mut state);
        // Armed before the state is unlocked, because another thread may work on it from then on.
        drop(working);
        let replaced = std::mem::take(&mut state.replaced);
        drop(state);
        // Dropped outside the lock, because dropping a waker may drop a task, which may drop one of
        // our futures.
        drop(replaced);
        self.sleepers.tasks().wake_if_called();
        result
    }

    /// Returns a number for a future, a stream or a sink.
    fn new_number(&self) -> u64 {
        // Relaxed: only the number is wanted.
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Removes the waker of a future that is dropped.
    fn forget_waker(&self, number: u64) {
        let waker = lock(&self.sleepers.tasks().wakers).remove(&number);
        // Dropped outside the lock, because dropping a waker may run any code.
        drop(waker);
    }

    /// Registers `cx` to be woken, with the others, at the next completion. Returns `Ready` if
    /// there is a completion already.
    fn sleep(&self, state: &mut State, number: u64, cx: &Context<'_>) -> Poll<()> {
        let replaced = lock(&self.sleepers.tasks().wakers).insert(number, cx.waker().clone());
        state.replaced.extend(replaced);
        let all = Waker::from(self.sleepers.clone());
        state.ring.poll_ready(&mut Context::from_waker(&all), 1).map(drop)
    }

    /// Runs `step` on the state until it is done or no completion waits. Takes in the completions
    /// before each step. If there were any, wakes all tasks, because each may be able to proceed.
    fn advance<T>(
        &self,
        number: u64,
        cx: &Context<'_>,
        mut step: impl FnMut(&mut State) -> Result<Option<T>, Error>,
    ) -> Poll<Result<T, Error>> {
        let mut news = false;
        let mut again = false;
        let answer = self.locked(|state| {
            let over_before = state.ring.is_over();
            let answer = self.rounds(state, number, cx, &mut step, &mut news);
            again = answer.is_none();
            // If this task has taken the engine over from the poller, the others hear of the end from
            // it: the poller's own signal may find the ring's bell disarmed by now.
            news |= state.ring.is_over() != over_before;
            answer.unwrap_or(Poll::Pending)
        });
        if again {
            // Completions keep coming, and none is the one that this task waits for.
            cx.waker().wake_by_ref();
        }
        // Outside the lock, because a waker may run any code.
        if news {
            self.sleepers.tasks().wake_all();
        }
        answer
    }

    /// Runs the rounds of [`advance`](Self::advance). Returns `None` if there may be more to do.
    fn rounds<T>(
        &self,
        state: &mut State,
        number: u64,
        cx: &Context<'_>,
        step: &mut impl FnMut(&mut State) -> Result<Option<T>, Error>,
        news: &mut bool,
    ) -> Option<Poll<Result<T, Error>>> {
        for _ in 0..ROUNDS_OF_A_POLL {
            *news |= state.pump();
            let was_over = state.ring.is_over();
            match step(state) {
                Ok(Some(answer)) => return Some(Poll::Ready(Ok(answer))),
                Err(error) => return Some(Poll::Ready(Err(error))),
                Ok(None) => {}
            }
            let asleep = self.sleep(state, number, cx).is_pending();
            // Going to sleep may take the engine over from the poller, which has told so already.
            // Then the step has more to say.
            if asleep && state.ring.is_over() == was_over {
                return Some(Poll::Pending);
            }
        }
        None
    }
}

impl State {
    /// Takes in the completions that wait. Returns whether there were any.
    fn pump(&mut self) -> bool {
        let mut news = false;
        for done in self.ring.reap() {
            match (done.op, done.result) {
                (RingOp::Read, Ok(_)) => self.ready.extend(done.take_frame()),
                (RingOp::Read, Err(EntryError::Cancelled)) => {}
                (RingOp::Read, Err(error)) => self.failed = self.failed.or(Some(error)),
                (RingOp::Cancel, _) => {}
                (RingOp::Write, result) => {
                    // Saturating, because a caller may have handed over a ring with writes in
                    // flight, which is a mistake of its own.
                    self.writes_in_flight = self.writes_in_flight.saturating_sub(1);
                    // A write whose future was dropped has no entry.
                    if let Some(answers) = self.writes.get_mut(&done.user_data) {
                        answers.in_flight = answers.in_flight.saturating_sub(1);
                        answers.failed = answers.failed.or(result.err());
                    }
                }
            }
            news = true;
        }
        news
    }

    fn post_reads(&mut self) -> Result<(), Error> {
        self.ring.split().0.post_reads(READ)
    }

    fn closed(&self) -> Option<CloseReason> {
        self.ring.control().closed()
    }

    /// Why the ring is closed, once nothing completes any more. (Slots that a thread of the device still
    /// has may come back. Nobody would wake the tasks when the time for that is over.)
    fn is_over(&self) -> Option<CloseReason> {
        self.closed().filter(|_| self.ring.is_over())
    }
}

impl AsyncRing {
    /// Polls for the next packet, for the future or stream of this number.
    fn poll_read(&self, number: u64, cx: &Context<'_>) -> Poll<Result<Frame, Error>> {
        self.advance(number, cx, |state| {
            state.post_reads()?;
            if let Some(packet) = state.ready.pop_front() {
                return Ok(Some(packet));
            }
            if let Some(closed) = state.closed() {
                // What is in flight may still bring a packet.
                let ended = state.ring.in_flight() == 0 || state.ring.is_over();
                return if ended { Err(closed.into()) } else { Ok(None) };
            }
            if let Some(error) = state.failed.take() {
                return Err(error.into());
            }
            if !state.ring.has_reads() {
                return Err(SubmitErrorKind::WrongDirection.into());
            }
            if state.ring.in_flight() == 0 {
                return Err(Error::OutOfFrames);
            }
            Ok(None)
        })
    }
}

/// The future of [`AsyncRing::read`].
#[derive(Debug)]
pub struct ReadFuture {
    front: AsyncRing,
    number: u64,
}

impl Future for ReadFuture {
    type Output = Result<Frame, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.front.poll_read(self.number, cx)
    }
}

impl Drop for ReadFuture {
    fn drop(&mut self) {
        self.front.forget_waker(self.number);
    }
}

/// Runs one future on this thread, which sleeps while the future waits. The smallest executor, for
/// programs and tests without a runtime.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Goal: no task sleeps through a call. Method: the ring's waker is called, and between its two
    /// steps another thread answers the call and a task goes to sleep. Then the ring calls again.
    #[test]
    fn a_call_that_another_thread_has_answered_keeps_no_later_task_asleep() {
        let sleepers = Arc::new(Sleepers(Doorbell::new(Tasks::default())));
        let tasks = sleepers.tasks();
        // The first step of `wake`.
        tasks.called.store(true, Ordering::Release);
        // A thread unlocks the state, and a task goes to sleep afterwards.
        sleepers.0.arm();
        tasks.wake_if_called();
        let wakes = Arc::<Wakes>::default();
        lock(&tasks.wakers).insert(1, Waker::from(wakes.clone()));
        sleepers.0.arm();
        // The second step of `wake`, and another call.
        sleepers.0.ring();
        sleepers.clone().wake();
        assert!(wakes.0.load(Ordering::SeqCst) > 0, "the task sleeps through the call");
    }
}
