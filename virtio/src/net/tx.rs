//! [`Transmitter`]: what a guest sends, from its queue into a ring.

use std::task::Poll;
use std::time::Instant;

use vmring::config::Offloads;
use vmring::guest::{GuestBufferError, GuestMemory, GuestSlice};
use vmring::stats::RingStats;
use vmring::{
    CloseReason, Direction, Drive, Error, Interface, OffloadHeader, Ring, SegmentTable,
    SubmitErrorKind,
};

use crate::net::header::{self, BadPacket, HEADER_LEN};
use crate::net::limits::{COPY_FRAMES, segments};
use crate::net::readiness::Readiness;
use crate::net::running::{BURST, Context, RunningQueue, Serve, Turn, Verdict};
use crate::net::window::State;
use crate::queue::{Chain, Single};

/// The `user_data` of a packet that is no guest's chain.
const OWN: u64 = u64::MAX;

/// The transmit queue of a pair, and its ring.
#[derive(Debug)]
pub(super) struct Transmitter {
    table: SegmentTable,
    ring: Option<Ring>,
    depth: u32,
    pub(super) running: Option<RunningQueue>,
    /// Why the ring takes nothing any more.
    pub(super) failed: Option<CloseReason>,
    max_packet_size: u64,
    /// The work that the guest may leave undone.
    left: Offloads,
    ecn: bool,
    has_virtio_header: bool,
    /// Whether the interface reads a header in front of each packet.
    reads_headers: bool,
}

impl Transmitter {
    pub(super) fn new(interface: &Interface, depth: u32, memory: &GuestMemory) -> Self {
        let caps = interface.capabilities();
        let table = SegmentTable::new(memory.clone(), segments(depth));
        Self {
            table: table.expect("a depth has a bound"),
            ring: None,
            depth,
            running: None,
            failed: None,
            max_packet_size: caps.max_packet_size.into(),
            left: Offloads::default(),
            ecn: false,
            has_virtio_header: caps.offloads.virtio_header,
            reads_headers: caps.headroom > 0,
        }
    }

    /// Makes the ring, if there is none.
    pub(super) fn build(
        &mut self,
        interface: &Interface,
        readiness: &Readiness,
    ) -> Result<(), Error> {
        if self.ring.is_some() {
            return Ok(());
        }
        let ring = (interface.ring(Direction::Write))
            .write_depth(self.depth)
            .segment_table(&self.table)
            .frames(COPY_FRAMES)
            .drive(Drive::Inline)
            .build()?;
        readiness
            .add_ring(ring.completion_fd()?)
            .map_err(|source| Error::Io { what: "waiting for a ring", source })?;
        (self.ring, self.failed) = (Some(ring), None);
        Ok(())
    }

    /// Gives the ring up. Nothing is on its way.
    pub(super) fn dismantle(&mut self, readiness: &Readiness) {
        if let Some(ring) = self.ring.take()
            && let Ok(fd) = ring.completion_fd()
        {
            readiness.remove_ring(fd);
        }
        self.failed = None;
    }

    /// Starts with the queue of a driver that leaves this work undone, and TCP with ECN if `ecn`.
    pub(super) fn start(&mut self, running: RunningQueue, left: Offloads, ecn: bool) {
        (self.running, self.left, self.ecn) = (Some(running), left, ecn);
    }

    /// Replaces the memory. Nothing is on its way.
    pub(super) fn set_memory(&mut self, memory: &GuestMemory) {
        self.table.set_memory(memory.clone());
    }

    /// Takes packets from the guest, at most `budget`, and gives back those that are sent. With
    /// `serving` unset they are taken and dropped.
    pub(super) fn poll(&mut self, cx: Context<'_>, serving: bool, budget: u16) -> Turn {
        let (mut left, mut moved) = (budget, false);
        loop {
            let most = left.min(BURST);
            let taken = self.take(cx, serving, most);
            let ended = self.reap(cx);
            left -= taken;
            moved |= taken > 0 || ended > 0;
            if left == 0 {
                return Turn { moved, again: true };
            }
            // If the ring was full, what has ended has made space. Otherwise nothing would wake the
            // device for the rest.
            let has_space =
                ended > 0 && self.running.as_ref().is_some_and(|running| running.blocked);
            if taken < most && !has_space {
                return Turn { moved, again: false };
            }
        }
    }

    fn take(&mut self, cx: Context<'_>, serving: bool, most: u16) -> u16 {
        let Self {
            table,
            ring,
            running,
            failed,
            max_packet_size,
            left,
            ecn,
            has_virtio_header,
            reads_headers,
            ..
        } = self;
        let Some(running) = running else { return 0 };
        let ring = ring.as_mut().filter(|_| serving && running.enabled);
        let Some(ring) = ring else {
            return running
                .take(cx, most, &mut |_: Chain<'_>, _: u32| drop_one(&cx.counters.tx_disabled));
        };
        let mut sender = Sender {
            cx,
            table,
            ring,
            failed,
            max_packet_size: *max_packet_size,
            left,
            ecn: *ecn,
            has_virtio_header: *has_virtio_header,
            reads_headers: *reads_headers,
        };
        let taken = running.take(cx, most, &mut sender);
        sender.ring.publish();
        taken
    }

    /// Lets the device work, and gives back what it has ended. Returns how many packets that are.
    fn reap(&mut self, cx: Context<'_>) -> u32 {
        let Self { ring, running, .. } = self;
        let (mut ended, mut packets, mut bytes) = (0, 0, 0);
        if let Some(ring) = ring {
            ring.reap().for_each(|done| {
                ended += 1;
                if done.user_data == OWN {
                    match done.result {
                        Ok(_) => cx.counters.announcements.add(1),
                        Err(_) => cx.counters.announcements_failed.add(1),
                    }
                    return;
                }
                match done.result {
                    Ok(len) => {
                        packets += 1;
                        bytes += len as u64;
                    }
                    Err(_) => cx.counters.tx_errors.add(1),
                }
                if let Some(running) = running {
                    // Nothing was written into the chain.
                    running.end(done.user_data, State::Done(0));
                }
            });
        }
        cx.counters.tx_packets.add(packets);
        cx.counters.tx_bytes.add(bytes);
        if let Some(running) = running {
            running.settle(cx);
        }
        ended
    }

    /// Lets what is on its way end. It is ready when nothing is.
    pub(super) fn quiesce(&mut self, cx: Context<'_>) -> Poll<()> {
        loop {
            let ended = self.reap(cx);
            if self.running.as_ref().is_none_or(|running| running.window.is_empty()) {
                return Poll::Ready(());
            }
            // What has ended may have made space for the rest.
            if ended == 0 {
                return Poll::Pending;
            }
        }
    }

    /// Sends a packet of the device's own. Returns whether it is on its way.
    pub(super) fn send_own(&mut self, packet: &[u8]) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        let Some(mut frame) = ring.alloc() else { return false };
        frame.copy_from(packet).is_ok() && ring.submit_write(frame, OWN).is_ok()
    }

    /// Prepares for sleep. Returns whether the device may sleep.
    pub(super) fn arm(&mut self, quiet: bool) -> bool {
        let ring = self.ring.as_mut().filter(|_| self.failed.is_none());
        if ring.is_some_and(|ring| !ring.arm()) {
            return false;
        }
        let running = self.running.as_mut().filter(|_| !quiet);
        running.is_none_or(|running| running.arm())
    }

    /// What the ring has counted, if there is one.
    pub(super) fn ring_stats(&self) -> Option<RingStats> {
        self.ring.as_ref().map(Ring::stats)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.ring.as_ref()?.next_deadline()
    }
}

/// What it takes to send one packet.
struct Sender<'t> {
    cx: Context<'t>,
    table: &'t mut SegmentTable,
    ring: &'t mut Ring,
    failed: &'t mut Option<CloseReason>,
    max_packet_size: u64,
    left: &'t Offloads,
    ecn: bool,
    has_virtio_header: bool,
    reads_headers: bool,
}

impl Serve for Sender<'_> {
    fn room(&mut self) -> u16 {
        u16::try_from(self.ring.write_credits()).unwrap_or(u16::MAX)
    }

    #[inline(always)]
    fn serve_single(&mut self, single: Single<'_>, number: u32) -> Verdict {
        let number = number.into();
        match single.readable().and_then(|packet| self.send_plain(packet, number)) {
            Some(sent) => sent.unwrap_or_else(|kind| self.refused(kind)),
            None => self.send_other(single.chain(), number),
        }
    }

    fn serve(&mut self, chain: Chain<'_>, number: u32) -> Verdict {
        let number = number.into();
        match chain.only_readable().and_then(|packet| self.send_plain(packet, number)) {
            Some(sent) => sent.unwrap_or_else(|kind| self.refused(kind)),
            None => self.send_other(chain, number),
        }
    }
}

impl Sender<'_> {
    /// Sends the usual packet, which is in one piece with its header and leaves nothing to do. `None` if
    /// this is another.
    #[inline(always)]
    fn send_plain(
        &mut self,
        packet: GuestSlice<'_>,
        number: u64,
    ) -> Option<Result<Verdict, SubmitErrorKind>> {
        let is_long = u64::from(packet.len()) > self.max_packet_size + u64::from(HEADER_LEN);
        if packet.len() == HEADER_LEN || is_long || !header::is_plain(&packet.read()?) {
            return None;
        }
        // An interface that reads no header in front of packets need not look at this one.
        let (packet, header_len) = match self.reads_headers {
            true => (packet, HEADER_LEN),
            false => (packet.skip(HEADER_LEN)?, 0),
        };
        let buffer = match self.table.buffer_of(Some(packet), header_len) {
            Ok(buffer) => buffer,
            Err(GuestBufferError::NoSlots) => return Some(Ok(Verdict::Later)),
            Err(_) => return None,
        };
        let posted = self.ring.stage_write_guest(buffer, number);
        Some(posted.map(|()| Verdict::Posted).map_err(|refused| refused.kind))
    }

    #[inline(never)]
    fn send_other(&mut self, chain: Chain<'_>, number: u64) -> Verdict {
        let cx = self.cx;
        let checked = match header::read(&chain, self.left, self.ecn) {
            Ok(checked) => checked,
            Err(BadPacket::Short) => return drop_one(&cx.counters.tx_short),
            Err(BadPacket::Header) => return drop_one(&cx.counters.tx_bad_header),
        };
        if chain.readable_len() - u64::from(HEADER_LEN) > self.max_packet_size {
            return drop_one(&cx.counters.tx_too_big);
        }
        if checked.has_unknown_flags {
            return self.send_copy(&chain, checked.header, number);
        }
        match self.table.buffer_of(chain.readable(), HEADER_LEN) {
            Ok(buffer) => match self.ring.stage_write_guest(buffer, number) {
                Ok(()) => Verdict::Posted,
                Err(refused) => self.refused(refused.kind),
            },
            Err(GuestBufferError::NoSlots) => Verdict::Later,
            Err(GuestBufferError::TooManySegments) => {
                self.send_copy(&chain, checked.header, number)
            }
            Err(_) => drop_one(&cx.counters.tx_errors),
        }
    }

    /// Sends a copy of a packet, which the interface cannot take from where it is.
    #[cold]
    fn send_copy(&mut self, chain: &Chain<'_>, header: OffloadHeader, number: u64) -> Verdict {
        match self.copy(chain, header, number) {
            None => Verdict::Later,
            Some(Ok(())) => {
                self.cx.counters.tx_copied.add(1);
                Verdict::Posted
            }
            Some(Err(kind)) => self.refused(kind),
        }
    }

    /// Copies a packet into a frame. `None` if no frame is free.
    fn copy(
        &mut self,
        chain: &Chain<'_>,
        header: OffloadHeader,
        number: u64,
    ) -> Option<Result<(), SubmitErrorKind>> {
        let mut frame = self.ring.alloc()?;
        let len = (chain.readable_len() - u64::from(HEADER_LEN)) as usize;
        let (max, has_space) = (self.max_packet_size as usize, frame.set_len(len).is_ok());
        if !has_space {
            return Some(Err(SubmitErrorKind::TooBig { len, max }));
        }
        let mut skip = HEADER_LEN;
        let mut copied = 0;
        for segment in chain.readable() {
            let skipped = skip.min(segment.len());
            skip -= skipped;
            if let Some(rest) = segment.skip(skipped) {
                copied += rest.copy_to(&mut frame[copied..]);
            }
        }
        if self.has_virtio_header && frame.set_offload(&header.for_sending()).is_err() {
            return Some(Err(SubmitErrorKind::OffloadNotNegotiated));
        }
        Some(self.ring.submit_write(frame, number).map_err(|refused| refused.kind))
    }

    #[cold]
    fn refused(&mut self, kind: SubmitErrorKind) -> Verdict {
        let cx = self.cx;
        match kind {
            SubmitErrorKind::SqFull | SubmitErrorKind::NoCredit | SubmitErrorKind::Draining => {
                Verdict::Later
            }
            SubmitErrorKind::Closed(reason) => {
                *self.failed = Some(reason);
                drop_one(&cx.counters.tx_errors)
            }
            SubmitErrorKind::TooBig { .. } => drop_one(&cx.counters.tx_too_big),
            _ => drop_one(&cx.counters.tx_errors),
        }
    }
}

#[cold]
fn drop_one(counter: &crate::net::stats::Counter) -> Verdict {
    counter.add(1);
    Verdict::Dropped
}
