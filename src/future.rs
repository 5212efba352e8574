//! The asynchronous front-end: futures on `Waker`, for any executor.
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
//! Unlike the ring it locks: many tasks may read and write through one [`AsyncRing`].

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use vmring_core::Frame;
use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::sync::{AtomicBool, AtomicU64, Ordering};

use crate::error::{CloseReason, ConfigError, EntryError, Error, Status, SubmitErrorKind};
use crate::mailbox::RingPark;
use crate::ring::{Ring, RingControl, RingOp};
use crate::sys::lock;

/// A ring behind futures. Clone it for other tasks.
#[derive(Clone)]
pub struct AsyncRing {
    state: Arc<Mutex<State>>,
    sleepers: Arc<Sleepers>,
    /// The next future's number, and its write's `user_data`.
    numbers: Arc<AtomicU64>,
}

impl fmt::Debug for AsyncRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncRing").finish_non_exhaustive()
    }
}

struct State {
    ring: Ring,
    /// Packets that came and no reader has taken yet.
    ready: VecDeque<Frame>,
    /// Writes in flight whose future lives: `None` until the completion comes.
    writes: BTreeMap<u64, Option<Result<(), EntryError>>>,
    /// Writes in flight, with those whose future is gone.
    writes_in_flight: usize,
    /// The first error a read met, for the next reader.
    failed: Option<EntryError>,
}

/// Wakes the tasks when the ring has completions. All of them are woken, because each may be able to
/// proceed.
///
/// The ring's waker may be called inside a submit, by the very thread that works on the state. It
/// must not run tasks at that moment, because they would lock the state again. So the bell is armed
/// only while nobody works on the state. A call that finds it disarmed leaves `called` behind, and
/// whoever unlocks the state looks at that after arming. The doorbell's protocol guarantees that one
/// of the two sees the other.
///
/// The state's own lock cannot tell whether somebody works on it: asking it takes a reference to the
/// ring, and the poller could be the one to drop that.
struct Sleepers(Doorbell<Tasks>);

#[derive(Default)]
struct Tasks {
    wakers: Mutex<BTreeMap<u64, Waker>>,
    /// The ring has called its waker, and the tasks are not woken yet.
    called: AtomicBool,
}

impl Tasks {
    fn wake_all(&self) {
        // Woken outside the lock: a waker may run anything.
        let wakers = std::mem::take(&mut *lock(&self.wakers));
        wakers.into_values().for_each(Waker::wake);
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

    fn unpark(&self) {
        self.wake_if_called();
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

/// The `user_data` of reads; writes count from 0.
const READ: u64 = u64::MAX;

const INLINE: &str = "an async front-end needs a ring that a poller drives: with Drive::Inline \
                      nobody would while its tasks sleep";

impl AsyncRing {
    /// Takes over a ring on which nothing is in flight, driven by a poller: its own
    /// ([`Drive::Thread`](crate::Drive::Thread), the default) or one for many rings
    /// ([`Drive::Shared`](crate::Drive::Shared)).
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a ring with [`Drive::Inline`](crate::Drive::Inline). While every task
    /// sleeps nobody would drive it: not when a device that took no packets is to be tried again,
    /// nor when one that is a descriptor has packets. That takes a timer and a reactor, so a
    /// runtime; this front-end works with any.
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
        };
        state.post_reads()?;
        let state = Arc::new(Mutex::new(state));
        let sleepers = Arc::new(Sleepers(Doorbell::new(Tasks::default())));
        Ok(Self { state, sleepers, numbers: Arc::default() })
    }

    /// The next packet. Readers may come in any number; a packet goes to one of them. Dropping the
    /// future loses no packet: it goes to the next reader.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`] when the ring is closed and no packet is left, [`Error::Entry`] if the
    /// device refused a read, [`Error::OutOfFrames`] if the caller holds so many frames that none is
    /// left to read into.
    pub fn read(&self) -> ReadFuture {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        ReadFuture { front: self.clone(), number }
    }

    /// Sends a packet; done when the device has taken it. Nothing is sent before the first poll.
    /// Dropping the future afterwards does not take the packet back.
    ///
    /// # Errors
    ///
    /// [`Status::PacketTooBig`] before anything is sent if it is longer than `max_packet_size`;
    /// [`Error::Closed`]; [`Error::Entry`] if the device refused it; [`Error::OutOfFrames`] if no frame
    /// is free and no write is in flight that will bring one back. A frame given back wakes nobody, so
    /// this does not wait for it. Packets that were read and are held do not lead here, since reading
    /// leaves frames to writes; frames that the caller allocated, or other rings on the pool, may.
    pub fn write<'a>(&self, packet: &'a [u8]) -> WriteFuture<'a> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        WriteFuture { front: self.clone(), number, packet, sent: false }
    }

    /// The ring's control handle, for its counters and to close it.
    pub fn control(&self) -> RingControl {
        self.locked(|state| state.ring.control())
    }

    /// The one way to the state.
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
        // Armed before the state is unlocked: afterwards somebody else may work on it.
        drop(working);
        drop(state);
        self.sleepers.tasks().wake_if_called();
        result
    }

    /// Lets `cx` be woken with the others at the next completion; polls again if there is one
    /// already.
    fn sleep(&self, state: &mut State, number: u64, cx: &Context<'_>) -> Poll<()> {
        lock(&self.sleepers.tasks().wakers).insert(number, cx.waker().clone());
        let all = Waker::from(self.sleepers.clone());
        state.ring.poll_ready(&mut Context::from_waker(&all), 1).map(drop)
    }

    /// Runs `step` on the state until it is done or nothing comes any more, taking in what has come
    /// before each. If anything came, everybody is woken: any of them may proceed.
    fn advance<T>(
        &self,
        number: u64,
        cx: &Context<'_>,
        mut step: impl FnMut(&mut State) -> Result<Option<T>, Error>,
    ) -> Poll<Result<T, Error>> {
        let mut news = false;
        let answer = self.locked(|state| {
            loop {
                news |= state.pump();
                match step(state) {
                    Ok(Some(answer)) => break Poll::Ready(Ok(answer)),
                    Err(error) => break Poll::Ready(Err(error)),
                    Ok(None) if self.sleep(state, number, cx).is_pending() => break Poll::Pending,
                    Ok(None) => {}
                }
            }
        });
        // Outside the lock: a waker may run anything.
        if news {
            self.sleepers.tasks().wake_all();
        }
        answer
    }
}

impl State {
    fn pump(&mut self) -> bool {
        let mut news = false;
        for done in self.ring.reap() {
            match (done.op, done.result) {
                (RingOp::Read, Ok(_)) => self.ready.extend(done.take_frame()),
                (RingOp::Read, Err(EntryError::Cancelled)) => {}
                (RingOp::Read, Err(error)) => self.failed = self.failed.or(Some(error)),
                (RingOp::Cancel, _) => {}
                (RingOp::Write, result) => {
                    // Saturating: a ring taken over with writes in flight is the caller's mistake.
                    self.writes_in_flight = self.writes_in_flight.saturating_sub(1);
                    // A write whose future is gone has no entry.
                    if let Some(answer) = self.writes.get_mut(&done.user_data) {
                        *answer = Some(result.map(drop));
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
        self.front.advance(self.number, cx, |state| {
            state.post_reads()?;
            if let Some(packet) = state.ready.pop_front() {
                return Ok(Some(packet));
            }
            if let Some(closed) = state.closed() {
                return Err(closed.into());
            }
            if let Some(error) = state.failed.take() {
                return Err(error.into());
            }
            if state.ring.in_flight() == 0 {
                return Err(Error::OutOfFrames);
            }
            Ok(None)
        })
    }
}

impl Drop for ReadFuture {
    fn drop(&mut self) {
        lock(&self.front.sleepers.tasks().wakers).remove(&self.number);
    }
}

/// The future of [`AsyncRing::write`].
#[derive(Debug)]
pub struct WriteFuture<'a> {
    front: AsyncRing,
    number: u64,
    packet: &'a [u8],
    sent: bool,
}

impl WriteFuture<'_> {
    /// Submits the packet if the ring takes it now. Returns whether it is to be tried again although
    /// no completion comes: the SQ is full until the poller takes what is there.
    fn send(&mut self, state: &mut State) -> Result<bool, Error> {
        if self.packet.len() > state.ring.capabilities().max_packet_size as usize {
            return Err(Status::PacketTooBig.into());
        }
        if let Some(closed) = state.closed() {
            return Err(closed.into());
        }
        let Some(mut frame) = state.ring.alloc() else {
            // A write in flight brings its frame back and wakes us. Posted reads do not, and a frame
            // that the caller drops wakes nobody.
            return if state.writes_in_flight == 0 { Err(Error::OutOfFrames) } else { Ok(false) };
        };
        frame.copy_from(self.packet).map_err(|_| Status::PacketTooBig)?;
        match state.ring.submit_write(frame, self.number) {
            Ok(()) => {
                state.writes.insert(self.number, None);
                state.writes_in_flight += 1;
                self.sent = true;
                Ok(false)
            }
            Err(refused) if refused.is_backpressure() => {
                Ok(refused.kind == SubmitErrorKind::SqFull)
            }
            Err(refused) => Err(refused.into()),
        }
    }
}

impl Future for WriteFuture<'_> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (front, number) = (self.front.clone(), self.number);
        let mut full = false;
        let answer = front.advance(number, cx, |state| {
            full = !self.sent && self.send(state)?;
            // After the write, or they would take its place in a small SQ each time.
            state.post_reads()?;
            let Some(answer) = state.writes.get_mut(&number).and_then(Option::take) else {
                return Ok(None);
            };
            state.writes.remove(&number);
            answer.map(Some).map_err(|error| match (error, state.closed()) {
                (EntryError::Cancelled, Some(closed)) => Error::Closed(closed),
                (error, _) => Error::Entry(error),
            })
        });
        if answer.is_pending() && full {
            // The poller has been rung for, so it is there soon. It may want this processor.
            thread::yield_now();
            cx.waker().wake_by_ref();
        }
        answer
    }
}

impl Drop for WriteFuture<'_> {
    fn drop(&mut self) {
        lock(&self.front.sleepers.tasks().wakers).remove(&self.number);
        if self.sent {
            self.front.locked(|state| state.writes.remove(&self.number));
        }
    }
}

/// The smallest executor: runs one future on this thread, sleeping while it waits. For programs
/// and tests without a runtime.
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
