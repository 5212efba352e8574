//! The blocking front-end: `read` and `write` over a ring of its own. These are `Lwt_vmnet`'s
//! `read` and `write`, without Lwt.
//!
//! ```
//! use std::time::Duration;
//! use vmring::{BlockingRing, Direction, Interface, Loopback};
//!
//! let interface = Interface::builder().device(Loopback::new(1500)).start()?;
//! let mut packets = BlockingRing::new(interface.ring(Direction::Both).build()?)?;
//! packets.write(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello")?;
//! let packet = packets.read_timeout(Duration::from_secs(5))?.expect("it came back");
//! assert_eq!(&packet[14..], b" hello");
//! # Ok::<(), vmring::Error>(())
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmring_core::Frame;

use crate::error::{EntryError, Error, Status, SubmitErrorKind};
use crate::ring::{Ring, RingOp};

/// A ring behind blocking calls. It posts reads ahead, as many as the ring has credits, but leaves
/// some frames to writes.
#[derive(Debug)]
pub struct BlockingRing {
    ring: Ring,
    /// Packets that came while a write waited.
    ready: VecDeque<Frame>,
    /// The first error of a read that no `read` has returned yet.
    failed: Option<EntryError>,
    /// The number of writes so far, which is the `user_data` of the next one.
    writes: u64,
}

/// The `user_data` of reads. Writes count from 0.
const READ: u64 = u64::MAX;

/// The longest sleep between two attempts while the SQ is full. The doorbell was rung, so the
/// engine empties the SQ soon.
const NAP: Duration = Duration::from_micros(50);

impl BlockingRing {
    /// Takes over a ring on which nothing is in flight, and posts reads.
    ///
    /// # Errors
    ///
    /// [`Error::Submit`] if the ring refuses to read into a frame of its own first pool.
    pub fn new(ring: Ring) -> Result<Self, Error> {
        let mut front = Self { ring, ready: VecDeque::new(), failed: None, writes: 0 };
        front.ring.split().0.post_reads(READ)?;
        Ok(front)
    }

    /// Returns the next packet, and waits until there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`] when the ring is closed and no packet is left, [`Error::Entry`] if the
    /// device refused a read, [`Error::OutOfFrames`] if the caller holds so many frames that none
    /// is left to read into.
    pub fn read(&mut self) -> Result<Frame, Error> {
        loop {
            if let Some(packet) = self.next_packet(None)? {
                return Ok(packet);
            }
        }
    }

    /// Returns the next packet, or `None` if none came within `timeout`.
    ///
    /// # Errors
    ///
    /// Those of [`read`](Self::read).
    pub fn read_timeout(&mut self, timeout: Duration) -> Result<Option<Frame>, Error> {
        self.next_packet(Some(timeout))
    }

    /// Sends a packet, and waits until the device has taken it. The bytes are copied into a frame.
    /// [`write_frame`](Self::write_frame) sends a frame without this copy.
    ///
    /// # Errors
    ///
    /// [`Status::PacketTooBig`] if the packet is longer than `max_packet_size`, in which case
    /// nothing is sent; [`Error::Closed`]; [`Error::Entry`] if the device refused it;
    /// [`Error::Submit`] if the ring refused it; [`Error::OutOfFrames`] if the caller holds every
    /// frame.
    pub fn write(&mut self, packet: &[u8]) -> Result<(), Error> {
        if packet.len() > self.ring.capabilities().max_packet_size as usize {
            return Err(Status::PacketTooBig.into());
        }
        let mut frame = self.alloc()?;
        frame.copy_from(packet).map_err(|_| Status::PacketTooBig)?;
        self.write_frame(frame)
    }

    /// Takes a free frame, to be filled and written.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`]; [`Error::OutOfFrames`] if no frame is free. The frames that this front-end
    /// posts for reading leave some for writes, so that happens if the caller holds the others, or if
    /// another ring on the same pool does. [`Error::Submit`] with
    /// [`WrongDirection`](SubmitErrorKind::WrongDirection) on a ring that only reads, whose frames are
    /// for packets to arrive in.
    pub fn alloc(&mut self) -> Result<Frame, Error> {
        if !self.ring.has_writes() {
            return Err(SubmitErrorKind::WrongDirection.into());
        }
        if let Some(frame) = self.ring.alloc() {
            return Ok(frame);
        }
        // A completion that waits already may bring a frame back.
        self.pump(Some(Duration::ZERO));
        self.closed()?;
        self.ring.alloc().ok_or(Error::OutOfFrames)
    }

    /// Sends the packet of `frame` without a copy, and waits until the device has taken it.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write), apart from [`Error::OutOfFrames`]. A frame that was not
    /// sent returns to its pool.
    pub fn write_frame(&mut self, frame: Frame) -> Result<(), Error> {
        let number = self.writes;
        self.writes += 1;
        let mut frame = frame;
        loop {
            match self.ring.submit_write(frame, number) {
                Ok(()) => break,
                Err(refused) if refused.is_backpressure() => {
                    // A completion brings a credit, and wakes us. Space in the SQ comes when the
                    // engine takes the entries, which wakes nobody.
                    let full = refused.kind == SubmitErrorKind::SqFull;
                    frame = refused.frame;
                    self.pump(full.then_some(NAP));
                }
                Err(refused) => {
                    return Err(match refused.kind {
                        SubmitErrorKind::TooBig { .. } => Status::PacketTooBig.into(),
                        kind => kind.into(),
                    });
                }
            }
        }
        loop {
            let result = self.pump_for(number, None);
            let closed = self.ring.control().closed();
            match (result, closed) {
                (Some(Ok(())), _) => return Ok(()),
                (Some(Err(EntryError::Cancelled)), Some(closed)) => return Err(closed.into()),
                (Some(Err(error)), _) => return Err(error.into()),
                // The device of a closed ring has kept the slot.
                (None, Some(closed)) if self.ring.in_flight() == 0 => return Err(closed.into()),
                (None, _) => {}
            }
        }
    }

    /// Returns the ring, for its counters and its control handle.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Returns the ring. What is in flight stays in flight.
    pub fn into_ring(self) -> Ring {
        self.ring
    }

    fn closed(&self) -> Result<(), Error> {
        self.ring.control().closed().map_or(Ok(()), |closed| Err(closed.into()))
    }

    fn next_packet(&mut self, timeout: Option<Duration>) -> Result<Option<Frame>, Error> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if let Some(packet) = self.ready.pop_front() {
                return Ok(Some(packet));
            }
            if let Some(error) = self.failed.take() {
                if self.ring.control().closed().is_none() {
                    return Err(error.into());
                }
                // The close is the reason, and the answer once nothing can come any more.
                if self.ring.in_flight() == 0 {
                    self.closed()?;
                }
            }
            if !self.ring.has_reads() {
                return Err(SubmitErrorKind::WrongDirection.into());
            }
            self.ring.split().0.post_reads(READ)?;
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let posted = self.ring.in_flight() > 0;
            self.pump(left);
            if self.ready.is_empty() && self.failed.is_none() {
                // On a ring that closes, what is in flight may still bring a packet.
                if self.ring.in_flight() == 0 {
                    self.closed()?;
                }
                if !posted {
                    return Err(Error::OutOfFrames);
                }
                if left.is_some_and(|left| left.is_zero()) {
                    return Ok(None);
                }
            }
        }
    }

    fn pump(&mut self, timeout: Option<Duration>) {
        let _ = self.pump_for(u64::MAX - 1, timeout);
    }

    /// Waits for completions and sorts them. Returns the result of write number `number` if it is
    /// among them.
    fn pump_for(
        &mut self,
        number: u64,
        timeout: Option<Duration>,
    ) -> Option<Result<(), EntryError>> {
        self.ring.wait(1, timeout);
        let mut answer = None;
        for done in self.ring.reap() {
            match (done.op, done.result) {
                (RingOp::Read, Ok(_)) => self.ready.extend(done.take_frame()),
                (RingOp::Read, Err(EntryError::Cancelled)) => {}
                // Kept for the next `read`, because the caller may be a write.
                (RingOp::Read, Err(error)) => self.failed = self.failed.or(Some(error)),
                (_, result) if done.user_data == number => answer = Some(result.map(drop)),
                _ => {}
            }
        }
        answer
    }
}
