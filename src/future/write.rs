//! The sending side of an [`AsyncRing`]: `alloc`, `write` and `write_frame`.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread;

use vmring_core::Frame;

use crate::error::{EntryError, Error, Status, SubmitError, SubmitErrorKind};
use crate::future::{AsyncRing, State};

impl AsyncRing {
    /// Returns a future that sends a packet, and is ready when the device has taken it. The bytes are
    /// copied into a frame. [`write_frame`](Self::write_frame) sends a frame without this copy.
    ///
    /// Nothing is sent before the first poll. Dropping the future after that does not take the packet
    /// back.
    ///
    /// # Errors
    ///
    /// * [`Status::PacketTooBig`] if the packet is longer than `max_packet_size`, in which case
    ///   nothing is sent.
    /// * [`Error::Closed`] if the ring is closed.
    /// * [`Error::Entry`] if the device refused the packet.
    /// * [`Error::Submit`] if the ring refused it for a reason other than backpressure.
    /// * [`Error::OutOfFrames`] if no frame is free and no write is in flight that will bring one
    ///   back. A frame that is dropped wakes nobody, so the future does not wait for one. Packets
    ///   that were read and are held do not cause this error, because reading leaves frames to
    ///   writes. Frames that the caller allocated, or other rings on the pool, may cause it.
    pub fn write<'a>(&self, packet: &'a [u8]) -> WriteFuture<'a> {
        WriteFuture(Outgoing::new(self, Some(Bytes(packet))))
    }

    /// Returns a future of a free frame, to be filled and written with
    /// [`write_frame`](Self::write_frame). It waits only while a write in flight will bring a frame
    /// back. Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// * [`Error::OutOfFrames`] if no frame is free and no write is in flight, as for
    ///   [`write`](Self::write).
    /// * [`Error::Closed`] if the ring is closed and no frame is free.
    /// * [`Error::Submit`] with [`WrongDirection`](SubmitErrorKind::WrongDirection) on a ring that only
    ///   reads, whose frames are for packets to arrive in.
    pub fn alloc(&self) -> AllocFuture {
        AllocFuture { front: self.clone(), number: self.new_number() }
    }

    /// Returns a future that sends the packet of `frame` without a copy, and is ready when the device
    /// has taken it.
    ///
    /// Nothing is sent before the first poll. If the future is dropped, a frame that is not sent yet
    /// returns to its pool, and one that is sent is not taken back.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write), apart from [`Error::OutOfFrames`]. A frame that was not sent
    /// returns to its pool.
    pub fn write_frame(&self, frame: Frame) -> WriteFrameFuture {
        WriteFrameFuture(Outgoing::new(self, Some(frame)))
    }
}

impl State {
    /// Returns a free frame to write with, or `None` if a write in flight will bring one.
    fn frame_to_write(&mut self) -> Result<Option<Frame>, Error> {
        if !self.ring.has_writes() {
            return Err(SubmitErrorKind::WrongDirection.into());
        }
        if let Some(frame) = self.ring.alloc() {
            return Ok(Some(frame));
        }
        if let Some(closed) = self.closed() {
            return Err(closed.into());
        }
        // A write in flight brings its frame back and wakes us. Posted reads do not bring theirs back,
        // and a frame that the caller drops wakes nobody.
        if self.writes_in_flight == 0 { Err(Error::OutOfFrames) } else { Ok(None) }
    }

    fn submit_write(&mut self, frame: Frame, number: u64) -> Result<(), SubmitError> {
        self.ring.submit_write(frame, number)?;
        self.writes.entry(number).or_default().in_flight += 1;
        self.writes_in_flight += 1;
        Ok(())
    }
}

/// What can be sent: a frame, or bytes that are copied into one.
pub(super) trait Packet: Sized {
    /// Submits the packet of `next` if the ring takes it now, and leaves it there otherwise. Returns
    /// whether the caller must try again although no completion will come: the SQ is full until the
    /// poller takes its entries.
    fn submit(next: &mut Option<Self>, state: &mut State, number: u64) -> Result<bool, Error>;
}

/// Bytes that are copied into a frame.
#[derive(Debug)]
pub(super) struct Bytes<B>(pub(super) B);

impl<B: AsRef<[u8]>> Packet for Bytes<B> {
    fn submit(next: &mut Option<Self>, state: &mut State, number: u64) -> Result<bool, Error> {
        let Some(Bytes(packet)) = next.take() else { return Ok(false) };
        if packet.as_ref().len() > state.ring.capabilities().max_packet_size as usize {
            return Err(Status::PacketTooBig.into());
        }
        if let Some(closed) = state.closed() {
            return Err(closed.into());
        }
        let mut full = false;
        if let Some(mut frame) = state.frame_to_write()? {
            frame.copy_from(packet.as_ref()).map_err(|_| Status::PacketTooBig)?;
            match state.submit_write(frame, number) {
                Ok(()) => return Ok(false),
                // The frame returns to its pool meanwhile.
                Err(refused) if refused.is_backpressure() => {
                    full = refused.kind == SubmitErrorKind::SqFull;
                }
                Err(refused) => return Err(refused.into()),
            }
        }
        *next = Some(Bytes(packet));
        Ok(full)
    }
}

impl Packet for Frame {
    fn submit(next: &mut Option<Self>, state: &mut State, number: u64) -> Result<bool, Error> {
        let Some(frame) = next.take() else { return Ok(false) };
        match state.submit_write(frame, number) {
            Ok(()) => Ok(false),
            Err(refused) if refused.is_backpressure() => {
                *next = Some(refused.frame);
                Ok(refused.kind == SubmitErrorKind::SqFull)
            }
            Err(refused) => Err(match refused.kind {
                SubmitErrorKind::TooBig { .. } => Status::PacketTooBig.into(),
                kind => kind.into(),
            }),
        }
    }
}

/// How far a poll of an [`Outgoing`] goes before it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// The ring has taken the packet.
    #[cfg_attr(not(feature = "futures"), allow(dead_code))] // only a sink stops here
    Submitted,
    /// The device has taken all packets that were sent.
    Completed,
}

/// A packet on its way into the ring, and the writes that were sent before it: the state of a future or
/// a sink.
#[derive(Debug)]
pub(super) struct Outgoing<P> {
    front: AsyncRing,
    number: u64,
    /// The packet that the ring has not taken yet.
    next: Option<P>,
    /// Something may have been sent.
    used: bool,
}

impl<P: Packet> Outgoing<P> {
    pub(super) fn new(front: &AsyncRing, next: Option<P>) -> Self {
        Self { front: front.clone(), number: front.new_number(), next, used: false }
    }

    pub(super) fn poll(&mut self, until: Until, cx: &Context<'_>) -> Poll<Result<(), Error>> {
        let Self { front, number, next, used } = self;
        *used = true;
        let mut full = false;
        let answer = front.advance(*number, cx, |state| {
            full = P::submit(next, state, *number)?;
            // After the write. Before it, the reads would take its place in a small SQ each time.
            state.post_reads()?;
            let answers = state.writes.get_mut(number);
            if let Some(error) = answers.and_then(|answers| answers.failed.take()) {
                return Err(match (error, state.closed()) {
                    (EntryError::Cancelled, Some(closed)) => Error::Closed(closed),
                    (error, _) => Error::Entry(error),
                });
            }
            let in_flight = state.writes.get(number).map_or(0, |answers| answers.in_flight);
            if next.is_none() && (until == Until::Submitted || in_flight == 0) {
                return Ok(Some(()));
            }
            // The device of a closed ring may have kept the slot.
            state.is_over().map_or(Ok(None), |closed| Err(closed.into()))
        });
        if answer.is_pending() && full {
            // The doorbell was rung, so the poller takes the entries soon. It may need this
            // processor.
            thread::yield_now();
            cx.waker().wake_by_ref();
        }
        answer
    }

    /// Takes a packet. The ring takes it at once if it can, and otherwise a later
    /// [`poll`](Self::poll) tries again.
    #[cfg(feature = "futures")]
    pub(super) fn send(&mut self, packet: P) -> Result<(), Error> {
        assert!(self.next.is_none(), "`poll_ready` comes before `start_send`");
        let Self { front, number, next, used } = self;
        (*next, *used) = (Some(packet), true);
        front.locked(|state| P::submit(next, state, *number).map(drop))
    }
}

impl<P> Drop for Outgoing<P> {
    fn drop(&mut self) {
        self.front.forget_waker(self.number);
        if self.used {
            self.front.locked(|state| state.writes.remove(&self.number));
        }
    }
}

/// The future of [`AsyncRing::write`].
#[derive(Debug)]
pub struct WriteFuture<'a>(Outgoing<Bytes<&'a [u8]>>);

impl Future for WriteFuture<'_> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(Until::Completed, cx)
    }
}

/// The future of [`AsyncRing::write_frame`].
#[derive(Debug)]
pub struct WriteFrameFuture(Outgoing<Frame>);

impl Future for WriteFrameFuture {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(Until::Completed, cx)
    }
}

/// The future of [`AsyncRing::alloc`].
#[derive(Debug)]
pub struct AllocFuture {
    front: AsyncRing,
    number: u64,
}

impl Future for AllocFuture {
    type Output = Result<Frame, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.front.advance(self.number, cx, State::frame_to_write)
    }
}

impl Drop for AllocFuture {
    fn drop(&mut self) {
        self.front.forget_waker(self.number);
    }
}
