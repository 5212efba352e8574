//! The blocking front-end: `read` and `write` over a ring of its own. What `Lwt_vmnet`'s `read` and
//! `write` are, without Lwt.
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

use crate::error::{CloseReason, EntryError, Error, Status, SubmitErrorKind};
use crate::ring::{Ring, RingOp};

/// A ring behind blocking calls. Reads are posted ahead, as many as the ring has credits.
#[derive(Debug)]
pub struct BlockingRing {
    ring: Ring,
    /// Packets that came while a write was waited for.
    ready: VecDeque<Frame>,
    /// The first error a read met and no `read` has told of yet.
    failed: Option<EntryError>,
    /// Writes submitted so far: the next one's `user_data`.
    writes: u64,
}

/// The `user_data` of reads; writes count from 0.
const READ: u64 = u64::MAX;

/// The longest sleep between two looks at a full SQ. The engine has been rung for, so it is empty
/// soon.
const NAP: Duration = Duration::from_micros(50);

impl BlockingRing {
    /// Takes over a ring on which nothing is in flight.
    pub fn new(ring: Ring) -> Result<Self, Error> {
        let mut front = Self { ring, ready: VecDeque::new(), failed: None, writes: 0 };
        front.ring.split().0.post_reads(READ)?;
        Ok(front)
    }

    /// The next packet; waits for it.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`] when the ring is closed and no packet is left, [`Error::Entry`] if the
    /// device refused the read, [`Error::OutOfFrames`] if the caller holds so many frames that none
    /// is left to read into.
    pub fn read(&mut self) -> Result<Frame, Error> {
        loop {
            if let Some(packet) = self.next_packet(None)? {
                return Ok(packet);
            }
        }
    }

    /// The next packet, or `None` if none came within `timeout`.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn read_timeout(&mut self, timeout: Duration) -> Result<Option<Frame>, Error> {
        self.next_packet(Some(timeout))
    }

    /// Sends a packet; waits until the device has taken it. The bytes are copied into a frame;
    /// [`write_frame`](Self::write_frame) does without.
    ///
    /// # Errors
    ///
    /// [`Status::PacketTooBig`] before anything is sent if it is longer than `max_packet_size`;
    /// [`Error::Closed`]; [`Error::Entry`] if the device refused it.
    pub fn write(&mut self, packet: &[u8]) -> Result<(), Error> {
        if packet.len() > self.ring.capabilities().max_packet_size as usize {
            return Err(Status::PacketTooBig.into());
        }
        let mut frame = self.alloc()?;
        frame.copy_from(packet).map_err(|_| Status::PacketTooBig)?;
        self.write_frame(frame)
    }

    /// A frame to be filled and written. Waits for one to come home if all are out.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfFrames`] if the caller holds them all, [`Error::Closed`].
    pub fn alloc(&mut self) -> Result<Frame, Error> {
        loop {
            if let Some(frame) = self.ring.alloc() {
                return Ok(frame);
            }
            self.closed()?;
            if self.ring.in_flight() == 0 {
                return Err(Error::OutOfFrames);
            }
            self.pump(Some(Duration::from_millis(10)));
        }
    }

    /// As [`write`](Self::write), without a copy.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_frame(&mut self, frame: Frame) -> Result<(), Error> {
        let number = self.writes;
        self.writes += 1;
        let mut frame = frame;
        loop {
            match self.ring.submit_write(frame, number) {
                Ok(()) => break,
                Err(refused) if refused.is_backpressure() => {
                    // A credit comes with a completion. Room in the SQ comes when the engine takes
                    // what is there, which wakes nobody.
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
            if let Some(result) = self.pump_for(number, None) {
                return result.map_err(|error| match error {
                    EntryError::Cancelled => Error::Closed(CloseReason::Stopped),
                    other => Error::Entry(other),
                });
            }
        }
    }

    /// The ring, for its counters and its control handle.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Gives the ring back. What is in flight stays so.
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
                self.closed()?;
                return Err(error.into());
            }
            self.ring.split().0.post_reads(READ)?;
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let posted = self.ring.in_flight() > 0;
            self.pump(left);
            if self.ready.is_empty() && self.failed.is_none() {
                self.closed()?;
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

    /// Waits for completions and sorts them; returns that of write `number` if it is among them.
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
                // For the next `read`: whoever waits here may wait for a write.
                (RingOp::Read, Err(error)) => self.failed = self.failed.or(Some(error)),
                (_, result) if done.user_data == number => answer = Some(result.map(drop)),
                _ => {}
            }
        }
        answer
    }
}
