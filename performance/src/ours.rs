//! vmring's own TAP device among the contenders.

use std::time::Duration;

use vmring::{Direction, Drive, Frame, Interface, Ring, Tap, TapEngine};

use crate::contender::{Reader, Taken, Writer};
use crate::net;
use crate::result::Result;
use crate::slots::SLOTS;

/// The choices that a user of vmring has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ours {
    engine: TapEngine,
    /// Whether the measuring thread drives the device. Otherwise the ring has a thread of its own.
    inline: bool,
}

impl Ours {
    pub(crate) const URING_INLINE: Self = Self { engine: TapEngine::IoUring, inline: true };
    pub(crate) const URING_THREAD: Self = Self { engine: TapEngine::IoUring, inline: false };
    pub(crate) const PLAIN_INLINE: Self = Self { engine: TapEngine::Plain, inline: true };
    pub(crate) const PLAIN_THREAD: Self = Self { engine: TapEngine::Plain, inline: false };

    pub(crate) fn name(self) -> &'static str {
        match (self.engine, self.inline) {
            (TapEngine::Plain, true) => "vmring, plain calls, inline",
            (TapEngine::Plain, false) => "vmring, plain calls, own thread",
            (_, true) => "vmring, io_uring, inline",
            (_, false) => "vmring, io_uring, own thread",
        }
    }

    /// A ring over the TAP, which keeps its setup.
    fn start(self, tap: &net::Tap, direction: Direction) -> Result<(Interface, Ring)> {
        let device = Tap::from_fd(tap.duplicate()?).engine(self.engine);
        let interface = Interface::builder().device(device).start()?;
        let drive = if self.inline { Drive::Inline } else { Drive::Thread };
        let ring = interface.ring(direction).depth(SLOTS as u32).prefault(true).drive(drive);
        let ring = ring.build()?;
        Ok((interface, ring))
    }

    pub(crate) fn writer(self, tap: &net::Tap, frame: &[u8]) -> Result<Box<dyn Writer>> {
        let (interface, ring) = self.start(tap, Direction::Write)?;
        let mut idle = Vec::with_capacity(SLOTS);
        for _ in 0..SLOTS {
            let mut slot = ring.alloc().ok_or("the ring has too few frames")?;
            slot.copy_from(frame)?;
            idle.push(slot);
        }
        Ok(Box::new(RingWriter { ring, idle, _interface: interface, length: frame.len() }))
    }

    pub(crate) fn reader(self, tap: &net::Tap) -> Result<Box<dyn Reader>> {
        let (interface, ring) = self.start(tap, Direction::Read)?;
        let mut idle = Vec::with_capacity(SLOTS);
        for _ in 0..SLOTS {
            idle.push(ring.alloc().ok_or("the ring has too few frames")?);
        }
        Ok(Box::new(RingReader { ring, idle, _interface: interface }))
    }
}

/// Longer than a write or a cancel may take.
const PATIENCE: Duration = Duration::from_secs(1);

struct RingWriter {
    ring: Ring,
    /// Frames that are not in flight, each with its packet.
    idle: Vec<Frame>,
    length: usize,
    _interface: Interface,
}

impl Writer for RingWriter {
    fn write(&mut self, count: usize) -> Result<()> {
        let (mut left, mut sent) = (count, 0);
        while sent < count {
            let now = left.min(self.idle.len());
            let frames = self.idle.drain(self.idle.len() - now..);
            if self.ring.submit_writes(frames.zip(0..))? != now {
                return Err("a ring with free frames had no room for them".into());
            }
            left -= now;
            if self.ring.wait(1, Some(PATIENCE)) == 0 {
                return Err(format!("{sent} of {count} packets were sent").into());
            }
            for done in self.ring.reap() {
                let frame = done.take_packet()?;
                if done.result != Ok(self.length) {
                    return Err(format!("a write gave {:?}", done.result).into());
                }
                self.idle.push(frame);
                sent += 1;
            }
        }
        Ok(())
    }
}

struct RingReader {
    ring: Ring,
    /// Frames that are not posted.
    idle: Vec<Frame>,
    _interface: Interface,
}

impl Reader for RingReader {
    fn read(&mut self, patience: Duration) -> Result<Taken> {
        let back = self.idle.len();
        if self.ring.submit_reads(self.idle.drain(..).zip(0..))? != back {
            return Err("a ring had no room for the frames that came out of it".into());
        }
        let mut taken = Taken::default();
        self.ring.wait(1, Some(patience));
        for done in self.ring.reap() {
            let frame = done.take_packet()?;
            taken.add(frame.len());
            self.idle.push(frame);
        }
        Ok(taken)
    }

    /// Cancels the posted reads, which the device's thread, or the kernel, would fill as packets
    /// arrive.
    fn rest(&mut self) -> Result<()> {
        self.ring.cancel_all(0)?;
        while self.ring.in_flight() > 0 {
            if self.ring.wait(1, Some(PATIENCE)) == 0 {
                return Err("a ring does not give its frames back".into());
            }
            self.idle.extend(self.ring.reap().filter_map(|done| done.take_frame()));
        }
        Ok(())
    }
}
