//! The asynchronous front-end: futures on `Waker`, for any executor.
//!
//! ```
//! use vmring::{Async, Direction, Interface, Loopback, block_on};
//!
//! let interface = Interface::builder().device(Loopback::new(1500)).start()?;
//! let packets = Async::new(interface.ring(Direction::Both).build()?)?;
//! block_on(async {
//!     packets.write(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello").await?;
//!     let packet = packets.read().await?;
//!     assert_eq!(&packet[14..], b" hello");
//!     Ok::<(), vmring::Error>(())
//! })?;
//! # Ok::<(), vmring::Error>(())
//! ```
//!
//! Unlike the ring it locks: many tasks may read and write through one [`Async`].

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use vmring_core::Frame;

use crate::error::{Closed, EntryError, Error, Status, SubmitErrorKind};
use crate::notify::lock;
use crate::ring::{Op, Ring, RingControl};

/// A ring behind futures. Clone it for other tasks.
#[derive(Clone)]
pub struct Async {
    state: Arc<Mutex<State>>,
    sleepers: Arc<Sleepers>,
}

impl fmt::Debug for Async {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Async").finish_non_exhaustive()
    }
}

struct State {
    ring: Ring,
    /// Packets that came and no reader has taken yet.
    ready: VecDeque<Frame>,
    /// Writes in flight whose future lives: `None` until the completion comes.
    writes: BTreeMap<u64, Option<Result<(), EntryError>>>,
    next: u64,
    /// The first error a read met, for the next reader.
    failed: Option<EntryError>,
}

/// Tasks to wake when completions come: all of them, since any may be able to proceed.
#[derive(Default)]
struct Sleepers(Mutex<BTreeMap<u64, Waker>>);

impl Sleepers {
    fn wake_all(&self) {
        // Woken outside the lock: a waker may run anything.
        let wakers = std::mem::take(&mut *lock(&self.0));
        wakers.into_values().for_each(Waker::wake);
    }
}

impl Wake for Sleepers {
    fn wake(self: Arc<Self>) {
        self.wake_all();
    }
}

/// The `user_data` of reads; writes count from 0.
const READ: u64 = u64::MAX;

impl Async {
    /// Takes over a ring on which nothing is in flight. A ring with a poller of its own is the
    /// usual one; one with `Drive::Inline` makes progress when a future is polled.
    pub fn new(ring: Ring) -> Result<Self, Error> {
        let mut state =
            State { ring, ready: VecDeque::new(), writes: BTreeMap::new(), next: 0, failed: None };
        state.post_reads()?;
        Ok(Self { state: Arc::new(Mutex::new(state)), sleepers: Arc::default() })
    }

    /// The next packet. Readers may come in any number; a packet goes to one of them. Dropping the
    /// future loses no packet: it goes to the next reader.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`] when the ring is closed and no packet is left, [`Error::Entry`] if the
    /// device refused a read.
    pub fn read(&self) -> ReadFuture {
        let number = lock(&self.state).number();
        ReadFuture { front: self.clone(), number }
    }

    /// Sends a packet; done when the device has taken it. Nothing is sent before the first poll.
    /// Dropping the future afterwards does not take the packet back.
    ///
    /// # Errors
    ///
    /// [`Status::PacketTooBig`] before anything is sent if it is longer than `max_packet_size`;
    /// [`Error::Closed`]; [`Error::Entry`] if the device refused it.
    pub fn write<'a>(&self, packet: &'a [u8]) -> WriteFuture<'a> {
        let number = lock(&self.state).number();
        WriteFuture { front: self.clone(), number, packet, sent: false }
    }

    /// The ring's control handle, for its counters and to close it.
    pub fn control(&self) -> RingControl {
        lock(&self.state).ring.control()
    }

    /// Lets `cx` be woken with the others at the next completion; polls again if there is one
    /// already.
    fn sleep(&self, state: &mut State, number: u64, cx: &Context<'_>) -> Poll<()> {
        lock(&self.sleepers.0).insert(number, cx.waker().clone());
        let all = Waker::from(self.sleepers.clone());
        state.ring.poll_ready(&mut Context::from_waker(&all), 1).map(drop)
    }

    /// Takes in what has come. If that lets somebody else proceed, wakes everybody.
    fn pump(&self, state: &mut State) -> Result<(), Error> {
        let news = state.pump();
        state.post_reads()?;
        if news {
            self.sleepers.wake_all();
        }
        Ok(())
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn post_reads(&mut self) -> Result<(), Error> {
        let (mut sq, _) = self.ring.split();
        for _ in 0..sq.read_credits() {
            let Some(frame) = sq.alloc() else { break };
            match sq.submit_read(frame, READ) {
                Ok(()) => {}
                Err(refused) if refused.is_backpressure() => break,
                Err(refused) if matches!(refused.kind, SubmitErrorKind::Closed(_)) => break,
                Err(refused) => return Err(refused.into()),
            }
        }
        Ok(())
    }

    fn pump(&mut self) -> bool {
        let mut news = false;
        for done in self.ring.reap() {
            match (done.op, done.result) {
                (Op::Read, Ok(_)) => self.ready.extend(done.frame()),
                (Op::Read, Err(EntryError::Cancelled)) => {}
                (Op::Read, Err(error)) => self.failed = self.failed.or(Some(error)),
                (_, result) => {
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

    fn closed(&self) -> Option<Closed> {
        self.ring.control().closed()
    }
}

/// The future of [`Async::read`].
#[derive(Debug)]
pub struct ReadFuture {
    front: Async,
    number: u64,
}

impl Future for ReadFuture {
    type Output = Result<Frame, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let state = &mut *lock(&self.front.state);
        loop {
            self.front.pump(state)?;
            if let Some(packet) = state.ready.pop_front() {
                return Poll::Ready(Ok(packet));
            }
            if let Some(closed) = state.closed() {
                return Poll::Ready(Err(closed.into()));
            }
            if let Some(error) = state.failed.take() {
                return Poll::Ready(Err(error.into()));
            }
            if self.front.sleep(state, self.number, cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl Drop for ReadFuture {
    fn drop(&mut self) {
        lock(&self.front.sleepers.0).remove(&self.number);
    }
}

/// The future of [`Async::write`].
#[derive(Debug)]
pub struct WriteFuture<'a> {
    front: Async,
    number: u64,
    packet: &'a [u8],
    sent: bool,
}

impl WriteFuture<'_> {
    /// Submits the packet if the ring takes it now.
    fn send(&mut self, state: &mut State) -> Result<(), Error> {
        if self.packet.len() > state.ring.capabilities().max_packet_size as usize {
            return Err(Status::PacketTooBig.into());
        }
        let Some(mut frame) = state.ring.alloc() else { return Ok(()) };
        frame.copy_from(self.packet).map_err(|_| Status::PacketTooBig)?;
        match state.ring.submit_write(frame, self.number) {
            Ok(()) => {
                state.writes.insert(self.number, None);
                self.sent = true;
                Ok(())
            }
            Err(refused) if refused.is_backpressure() => Ok(()),
            Err(refused) => match refused.kind {
                SubmitErrorKind::Closed(closed) => Err(closed.into()),
                kind => Err(Error::Submit(kind)),
            },
        }
    }
}

impl Future for WriteFuture<'_> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let front = self.front.clone();
        let state = &mut *lock(&front.state);
        loop {
            front.pump(state)?;
            if !self.sent {
                self.send(state)?;
            }
            if let Some(answer) = state.writes.get_mut(&self.number).and_then(Option::take) {
                state.writes.remove(&self.number);
                return Poll::Ready(answer.map_err(|error| match (error, state.closed()) {
                    (EntryError::Cancelled, Some(closed)) => Error::Closed(closed),
                    (error, _) => Error::Entry(error),
                }));
            }
            if front.sleep(state, self.number, cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl Drop for WriteFuture<'_> {
    fn drop(&mut self) {
        lock(&self.front.sleepers.0).remove(&self.number);
        if self.sent {
            lock(&self.front.state).writes.remove(&self.number);
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
