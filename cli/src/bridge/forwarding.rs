//! Two joined ends: the loop that moves packets, its sleep and its end.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use vmring::software::FLOWS_MERGED;
use vmring::{
    Direction, Drive, Error, IdlePolicy, Interface, InterfaceMonitor, OFFLOAD_LEN, PoolBuilder,
    Ring, RingControl, RingOp,
};

use super::direction::{BridgeDirection, READ};
use super::limits::{END_TIMEOUT, STALL, STOP_TIMEOUT};
use super::spec::{End, InSoftware};
use crate::failure::Failure;
use crate::recording::Recording;
use crate::stop::Stop;
use crate::system;

const NOT_REPLAYED: &str = "not replayed before the end";

/// Two joined ends. `directions[i]` leads from `ends[i]` to the other end.
pub(crate) struct Bridge {
    pub(super) directions: [BridgeDirection; 2],
    pub(super) rings: [Ring; 2],
    pub(super) controls: [RingControl; 2],
    pub(super) ends: [End; 2],
    /// Packets that the kernel had dropped for each end when the bridge began.
    dropped_before: [u64; 2],
    /// The bridge is ending, and posts no more reads.
    is_ending: bool,
}

impl Bridge {
    /// Joins the ends, with up to `reads[i]` packets in flight that come from `ends[i]`. What is done for an
    /// end is at its place in `software`. If the ends cannot be joined, no new file is left behind.
    pub(crate) fn new(
        ends: [End; 2],
        software: [InSoftware; 2],
        reads: [u32; 2],
    ) -> Result<Self, Error> {
        let joined = Self::join([&ends[0].interface, &ends[1].interface], software, reads);
        let (rings, directions) = joined.inspect_err(|_| {
            ends.iter().filter_map(|end| end.recording.as_ref()).for_each(Recording::discard);
        })?;
        let controls = [rings[0].control(), rings[1].control()];
        let dropped_before = ends.each_ref().map(End::dropped_by_kernel);
        Ok(Self { directions, rings, controls, ends, dropped_before, is_ending: false })
    }

    fn join(
        interfaces: [&Interface; 2],
        software: [InSoftware; 2],
        reads: [u32; 2],
    ) -> Result<([Ring; 2], [BridgeDirection; 2]), Error> {
        let caps = interfaces.map(Interface::capabilities);
        let most =
            |f: fn(&vmring::device::Capabilities) -> u32| caps.iter().map(f).max().unwrap_or(0);
        // Space for any packet of either end, and for its header.
        let packet = most(|caps| caps.max_packet_size) as usize;
        let headroom = vmring::pool::HEADROOM_DEFAULT.max(OFFLOAD_LEN);
        let headroom = headroom.max(most(|caps| caps.headroom) as usize);
        let differ = caps[0].offloads != caps[1].offloads;
        let frames_of = reads.map(|reads| reads as usize);
        let segments = [0, 1].map(|to: usize| match software[to] {
            InSoftware::Cut | InSoftware::CutAndMerge if differ => frames_of[1 - to],
            _ => 0,
        });
        let merged =
            software.map(|work| if work == InSoftware::CutAndMerge { FLOWS_MERGED } else { 0 });
        let frames = |i: usize| 2 * frames_of[i] + segments[i] + merged[i];
        let pool = PoolBuilder::new(frames(0) + frames(1), packet).headroom(headroom).build()?;
        // Both rings are on this thread: a frame that one has read is still in the cache when the
        // other writes it.
        let ring = |i: usize| {
            let ring = interfaces[i].ring(Direction::Both).pool(&pool);
            let ring = ring.read_depth(reads[i]).write_depth(reads[1 - i]).retry(STALL);
            ring.drive(Drive::Inline).build()
        };
        let rings = [ring(0)?, ring(1)?];
        let direction = |to: usize| {
            let to_tap = interfaces[to].device_name() == "tap";
            let (reads, software) = (frames_of[1 - to], software[to]);
            let (segments, merged) = (segments[to], merged[to]);
            BridgeDirection::new(&caps[to], to_tap, software, &pool, reads, segments, merged)
        };
        Ok((rings, [direction(1), direction(0)]))
    }

    /// Moves packets until it is told to stop, the `deadline` is reached, or neither end has
    /// anything more. Calls `tick` at the interval `every`, if there is one.
    pub(crate) fn run(
        &mut self,
        stop: &Stop,
        deadline: Option<Instant>,
        every: Option<Duration>,
        mut tick: impl FnMut(&Self),
    ) -> Result<(), Failure> {
        let mut next_tick = every.map(|every| Instant::now() + every);
        let idle = IdlePolicy::default();
        let mut rounds = 0;
        loop {
            let moved = self.turn()?;
            let now = Instant::now();
            if stop.is_wanted() || deadline.is_some_and(|deadline| now >= deadline) {
                return Ok(());
            }
            if let (Some(at), Some(every)) = (next_tick, every)
                && now >= at
            {
                next_tick = Some(now + every);
                tick(self);
            }
            if moved {
                rounds = 0;
                continue;
            }
            if self.ends.iter().all(End::is_exhausted) {
                return Ok(());
            }
            if rounds < idle.spins {
                std::hint::spin_loop();
            } else if rounds - idle.spins < idle.yields {
                thread::yield_now();
            } else {
                let until = [deadline, next_tick].into_iter().flatten().min();
                self.sleep(Some(stop), until)?;
            }
            rounds = rounds.saturating_add(1);
        }
    }

    /// Handles what has completed and submits what can be submitted. Returns whether there was
    /// anything. An end that has failed returns its reads, and the failure is found when they are
    /// posted again.
    pub(crate) fn turn(&mut self) -> Result<bool, Failure> {
        let mut moved = 0;
        for i in 0..2 {
            for done in self.rings[i].reap() {
                moved += 1;
                match done.op {
                    RingOp::Read => {
                        let is_closed = self.controls[i].closed().is_some();
                        self.directions[i].read_done(done, is_closed);
                    }
                    RingOp::Write => self.directions[1 - i].write_done(done),
                    _ => {}
                }
            }
        }
        for i in 0..2 {
            let (mut sq, _) = self.rings[1 - i].split();
            moved +=
                self.directions[i].write(&mut sq).map_err(|error| self.failed(1 - i, error))?;
        }
        for i in 0..2 {
            if !self.is_ending {
                let (mut sq, _) = self.rings[i].split();
                moved += self.directions[i].post(&mut sq).map_err(|error| self.failed(i, error))?;
            }
        }
        Ok(moved > 0)
    }

    fn failed(&self, end: usize, error: Error) -> Failure {
        Failure::Step(format!("{}: {error}", self.ends[end].name))
    }

    /// The descriptors of which one is readable when there is something to do, once the bridge is
    /// [armed](Self::arm). They are the same ones as long as the bridge lives.
    pub(crate) fn descriptors(&self) -> Result<[BorrowedFd<'_>; 2], Failure> {
        let fd = |i: usize| self.rings[i].completion_fd().map_err(|error| self.failed(i, error));
        Ok([fd(0)?, fd(1)?])
    }

    /// Asks for a signal at the next completion. Returns false if there is something to do now.
    pub(crate) fn arm(&mut self) -> bool {
        self.rings.iter_mut().all(Ring::arm)
    }

    /// When [`turn`](Self::turn) is to be called even if no descriptor is readable. It is asked for after
    /// [`arm`](Self::arm).
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.rings.iter().filter_map(Ring::next_deadline).min()
    }

    /// Sleeps until either ring has a completion or `stop` is requested, at most until `deadline`.
    fn sleep(&mut self, stop: Option<&Stop>, deadline: Option<Instant>) -> Result<(), Failure> {
        let [a, b] = self.descriptors()?.map(|fd| fd.as_raw_fd());
        if !self.arm() {
            return Ok(());
        }
        let bell = stop.map_or(-1, Stop::bell);
        let mut polls =
            [a, b, bell].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        let due = self.next_deadline().into_iter().chain(deadline).min();
        // Rounded up, so that a short sleep does not become a busy loop.
        let millis = due.map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now());
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        system::poll(&mut polls, millis);
        Ok(())
    }

    /// Ends the reading, writes what was read, and closes the rings.
    pub(crate) fn end(&mut self) -> Result<(), Failure> {
        self.end_within(END_TIMEOUT)
    }

    /// The same, but what an end does not take within this time is dropped.
    pub(crate) fn end_within(&mut self, time: Duration) -> Result<(), Failure> {
        self.is_ending = true;
        for ring in &mut self.rings {
            // Only a closed ring refuses this, and on a closed ring nothing is in flight.
            let _ = ring.cancel(READ, READ);
        }
        let deadline = Instant::now() + time;
        let mut outcome = Ok(());
        while self.rings.iter().any(|ring| ring.in_flight() > 0)
            || self.directions.iter().any(BridgeDirection::is_busy)
        {
            match self.turn() {
                Ok(true) => {}
                Ok(false) if Instant::now() < deadline => self.sleep(None, Some(deadline))?,
                Ok(false) => break,
                Err(failure) => {
                    outcome = Err(failure);
                    break;
                }
            }
        }
        for i in 0..2 {
            let closed = self.rings[i].close();
            outcome = outcome.and(closed.map_err(|error| self.failed(i, error)));
            for done in self.rings[i].reap() {
                if done.op == RingOp::Write {
                    self.directions[1 - i].write_done(done);
                }
            }
        }
        self.directions.iter_mut().for_each(BridgeDirection::abandon);
        outcome
    }

    /// Stops the interfaces and finishes the files.
    pub(crate) fn stop(&self) -> Result<(), Failure> {
        for (i, end) in self.ends.iter().enumerate() {
            end.interface.stop(STOP_TIMEOUT).map_err(|error| self.failed(i, error))?;
            if let Some(recording) = &end.recording {
                recording.finish()?;
            }
        }
        Ok(())
    }

    /// A handle to the ring of an end, which reads its counters on any thread.
    pub(crate) fn control(&self, end: usize) -> RingControl {
        self.controls[end].clone()
    }

    /// Reads the counters of an end's interface on any thread.
    pub(crate) fn monitor(&self, end: usize) -> InterfaceMonitor {
        self.ends[end].interface.monitor()
    }

    /// A counter of an end's interface, by its name.
    pub(crate) fn counter(&self, end: usize, name: &str) -> u64 {
        let counters = self.ends[end].interface.counters();
        counters.iter().find(|(is, _)| *is == name).map_or(0, |(_, n)| *n)
    }

    /// Packets from this end that have not arrived at the other.
    pub(crate) fn lost(&self, from: usize) -> u64 {
        self.directions[from].counts.drops.values().sum()
    }

    /// Packets and bytes written so far, in each direction.
    pub(super) fn moved(&self) -> [(u64, u64); 2] {
        self.directions
            .each_ref()
            .map(|direction| (direction.counts.packets_written, direction.counts.bytes_written))
    }

    /// Packets that have not arrived so far.
    pub(super) fn dropped(&self) -> u64 {
        let counts = self.directions.iter().flat_map(|direction| direction.counts.drops.values());
        // What a file still holds may arrive yet.
        let ends = (0..2).flat_map(|i| self.dropped_at(i)).filter(|(why, _)| *why != NOT_REPLAYED);
        counts.sum::<u64>() + ends.map(|(_, n)| n).sum::<u64>()
    }

    /// Packets that did not get into, out of or beyond this end, by reason. Those that failed to be
    /// read or written are not among them: [`directions`](Self::directions) count them.
    pub(super) fn dropped_at(&self, i: usize) -> Vec<(&'static str, u64)> {
        let end = &self.ends[i];
        let mut drops = end.interface.drops();
        let kernel = end.dropped_by_kernel().saturating_sub(self.dropped_before[i]);
        drops.push(("for a full TAP", kernel));
        let unrecorded = end.recording.as_ref().map_or(0, |recording| recording.capture.lost());
        drops.push(("not recorded in time", unrecorded));
        if let Some(replay) = &end.replay {
            let counters = end.interface.counters();
            let discarded = counters.iter().find(|(name, _)| *name == "discarded");
            drops.push((
                "written to a file that is only replayed",
                discarded.map_or(0, |(_, n)| *n),
            ));
            drops.push((NOT_REPLAYED, replay.left()));
        }
        drops.retain(|(_, n)| *n > 0);
        drops
    }
}
