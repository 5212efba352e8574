//! [`Receiver`]: what a guest receives, from a ring into its queue.

use std::task::Poll;
use std::time::{Duration, Instant};

use vmring::config::Offloads;
use vmring::device::Capabilities;
use vmring::guest::{GuestBufferError, GuestMemory, GuestSlice};
use vmring::stats::RingStats;
use vmring::{
    CloseReason, Completion, Direction, Drive, EntryError, Error, GuestBuffer, Interface, Ring,
    SegmentTable, Status, SubmitErrorKind,
};

use crate::net::copying::{Copier, FRAMES, Wanted};
use crate::net::header::HEADER_LEN;
use crate::net::limits::{
    DISCARD_MAX, DRAIN_ROUNDS, MERGEABLE_BUFFER, SEGMENTS_MAX, bytes_for, segments,
};
use crate::net::readiness::Readiness;
use crate::net::running::{BURST, Context, RunningQueue, Serve, Turn, Verdict};
use crate::net::window::State;
use crate::queue::{Chain, Single};

/// The receive queue of a pair, and its ring.
#[derive(Debug)]
pub(super) struct Receiver {
    table: SegmentTable,
    ring: Option<Ring>,
    /// The depth that was asked for.
    depth: u32,
    pub(super) running: Option<RunningQueue>,
    /// Why the ring takes nothing any more.
    pub(super) failed: Option<CloseReason>,
    /// How the guest gets its packets, and the copies if it gets copies.
    mode: Mode,
    /// How many reads the ring takes.
    reads: u32,
    copier: Option<Copier>,
    /// How many bytes of a buffer a packet can fill, with its header.
    bytes: u32,
    /// Where the buffers are that are on their way, by their places in the window. It is empty if the
    /// memory has no dirty log.
    logged: Box<[Vec<(u64, u32)>]>,
    /// Whether the ring gives the posted buffers back, and takes no more.
    draining: bool,
    /// How many of the next completions belong to the packet of the last one.
    rest: u16,
    /// Whether the guest had buffers at the last look.
    has_buffers: bool,
}

/// How a guest gets its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// The interface fills the guest's buffers, one with each packet, or several if `merging`. What is
    /// in them leaves no other work than this, and TCP with ECN only if `ecn`.
    Direct { merging: bool, offloads: Offloads, ecn: bool },
    /// The interface fills frames, which are copied.
    Copying(Wanted),
}

impl Mode {
    /// The way for a guest that takes what is `wanted`.
    ///
    /// A device that lets each ring accept what it will needs no copies for a guest that accepts less.
    pub(super) fn of(caps: &Capabilities, wanted: Wanted) -> Self {
        let Offloads { checksum, tso4, tso6, uso, virtio_header, .. } = caps.offloads;
        let delivers = checksum && virtio_header && !caps.receive_offloads;
        let takes = wanted.offloads;
        let lacks = !takes.checksum
            || tso4 && !takes.tso4
            || tso6 && !takes.tso6
            || uso && !takes.uso
            || (tso4 || tso6) && !wanted.ecn;
        // A driver with mergeable buffers makes them large enough for an Ethernet frame, if not for
        // more.
        let direct = |merging| match caps.receive_offloads {
            true => Mode::Direct { merging, offloads: takes & caps.offloads, ecn: wanted.ecn },
            // The ring gets what the interface gives.
            false => Mode::Direct { merging, offloads: caps.offloads, ecn: true },
        };
        let is_long = bytes_for(direct(false).longest(caps)) > MERGEABLE_BUFFER;
        let cannot_merge = wanted.merging && !caps.merges_reads && is_long;
        if delivers && lacks || cannot_merge {
            return Mode::Copying(wanted);
        }
        direct(wanted.merging && caps.merges_reads)
    }

    /// The length of the longest packet that a ring of this mode reads, in bytes.
    fn longest(&self, caps: &Capabilities) -> u32 {
        match self {
            Mode::Direct { offloads: Offloads { tso4, tso6, uso, .. }, .. }
                if caps.receive_offloads && !(*tso4 || *tso6 || *uso) =>
            {
                caps.max_frame_size
            }
            _ => caps.max_packet_size,
        }
    }
}

impl Receiver {
    pub(super) fn new(interface: &Interface, depth: u32, memory: &GuestMemory) -> Self {
        let table = SegmentTable::new(memory.clone(), segments(depth));
        Self {
            table: table.expect("a depth has a bound"),
            ring: None,
            depth,
            running: None,
            failed: None,
            mode: Mode::Direct { merging: false, offloads: Offloads::ALL, ecn: true },
            reads: 0,
            copier: None,
            bytes: bytes_for(interface.capabilities().max_packet_size),
            logged: Box::default(),
            draining: false,
            rest: 0,
            has_buffers: true,
        }
    }

    /// Makes the ring, if there is none of this mode, for a queue of `size` entries. Nothing is on its
    /// way.
    pub(super) fn build(
        &mut self,
        cx: Context<'_>,
        interface: &Interface,
        readiness: &Readiness,
        mode: Mode,
        size: u32,
    ) -> Result<(), Error> {
        if self.has_ring(mode, size) {
            return Ok(());
        }
        let reads = self.reads_for(mode, size);
        self.dismantle(cx, readiness);
        let builder = interface.ring(Direction::Read).drive(Drive::Inline);
        let longest = mode.longest(&interface.capabilities());
        let (builder, copier) = match mode {
            Mode::Direct { merging, offloads, ecn } => {
                // Guests' buffers need no frames, but a ring has a pool.
                let builder = builder.read_depth(reads).frames(1);
                let builder = builder.receive_offloads(offloads).receive_ecn(ecn);
                (builder.segment_table(&self.table).mergeable_reads(merging), None)
            }
            Mode::Copying(wanted) => {
                let builder = builder.read_depth(reads).frames(FRAMES);
                (builder, Some(Copier::new(wanted, longest)))
            }
        };
        let ring = builder.build()?;
        readiness
            .add_ring(ring.completion_fd()?)
            .map_err(|source| Error::Io { what: "waiting for a ring", source })?;
        (self.ring, self.failed) = (Some(ring), None);
        (self.mode, self.reads, self.copier) = (mode, reads, copier);
        self.bytes = bytes_for(longest);
        Ok(())
    }

    /// Whether there is a ring of this mode for a queue of `size` entries.
    pub(super) fn has_ring(&self, mode: Mode, size: u32) -> bool {
        self.ring.is_some() && self.mode == mode && self.reads == self.reads_for(mode, size)
    }

    /// How many reads a ring takes. They are no more than the queue can have, so that the interface
    /// knows when a guest has posted all that it can, and a packet waits for more in vain.
    fn reads_for(&self, mode: Mode, size: u32) -> u32 {
        match mode {
            Mode::Direct { .. } => self.depth.min(size).max(1),
            Mode::Copying(_) => FRAMES as u32,
        }
    }

    /// Takes what waits for the guest in the network, up to a bound, and drops it. Nothing is on its way.
    pub(super) fn discard(&mut self, cx: Context<'_>) {
        self.discard_copies(cx);
        let Some(ring) = self.ring.as_mut().filter(|_| self.failed.is_none()) else { return };
        for _ in 0..DISCARD_MAX {
            // If there is none, all are posted.
            if let Some(frame) = ring.alloc()
                && ring.submit_read(frame, 0).is_err()
            {
                break;
            }
            let came = ring.reap().filter(|done| done.result.is_ok()).count();
            cx.counters.rx_discarded.add(came as u64);
            if came == 0 {
                break;
            }
        }
        // What is still posted comes back, and its frame with it, when the ring is given up.
    }

    /// Drops the packets that wait for the guest's buffers in frames of the device.
    fn discard_copies(&mut self, cx: Context<'_>) {
        let waiting = self.copier.take().map_or(0, |copier| copier.waiting());
        cx.counters.rx_discarded.add(waiting as u64);
    }

    /// Gives the ring up. Nothing is on its way.
    pub(super) fn dismantle(&mut self, cx: Context<'_>, readiness: &Readiness) {
        if let Some(ring) = self.ring.take()
            && let Ok(fd) = ring.completion_fd()
        {
            readiness.remove_ring(fd);
        }
        self.discard_copies(cx);
        (self.failed, self.draining, self.rest) = (None, false, 0);
    }

    pub(super) fn start(&mut self, running: RunningQueue) {
        let memory = running.queue.memory();
        let is_logged = memory.has_dirty_log();
        let places = if is_logged { running.queue.layout().size as usize } else { 0 };
        self.logged = vec![Vec::new(); places].into();
        self.running = Some(running);
    }

    /// Replaces the memory. Nothing is on its way.
    pub(super) fn set_memory(&mut self, memory: &GuestMemory) {
        self.table.set_memory(memory.clone());
        if let Some(running) = self.running.take() {
            self.start(running);
        }
    }

    /// Posts the guest's buffers, and gives back those that have packets, about `budget` of each.
    /// Without `serving`, the posted buffers come back.
    pub(super) fn poll(&mut self, cx: Context<'_>, serving: bool, budget: u16) -> Turn {
        let serving = serving
            && self.running.as_ref().is_some_and(|running| running.enabled && !running.stopping);
        if !serving {
            let _ = self.quiesce(cx);
            return Turn::default();
        }
        if self.draining && self.quiesce(cx).is_pending() {
            return Turn::default();
        }
        if self.copier.is_some() {
            return self.poll_copies(cx, budget);
        }
        let mut left = budget;
        loop {
            let posted = self.post(cx, left.min(BURST));
            let reaped = self.reap(cx);
            let moved = posted.max(reaped);
            left = left.saturating_sub(moved);
            if moved == 0 {
                self.count_empty(cx);
                return Turn { moved: left < budget, again: false };
            }
            if left == 0 {
                return Turn { moved: true, again: true };
            }
        }
    }

    /// Lets frames fill, and copies what is in them.
    fn poll_copies(&mut self, cx: Context<'_>, budget: u16) -> Turn {
        let mut left = budget;
        loop {
            let Self { ring, copier, failed, .. } = self;
            let (Some(ring), Some(copier)) = (ring, copier) else { return Turn::default() };
            if failed.is_none()
                && let Err(SubmitErrorKind::Closed(reason)) = copier.post(ring)
            {
                *failed = Some(reason);
            }
            self.reap(cx);
            let (Some(copier), Some(running)) = (&mut self.copier, &mut self.running) else {
                return Turn::default();
            };
            let delivered = copier.deliver(cx, running, left);
            running.settle(cx);
            left -= delivered;
            if delivered == 0 || left == 0 {
                return Turn { moved: left < budget, again: left == 0 };
            }
        }
    }

    /// Counts when the guest's buffers run out.
    fn count_empty(&mut self, cx: Context<'_>) {
        let Some(running) = &self.running else { return };
        let has_buffers = running.window.posted() > 0;
        if self.has_buffers && !has_buffers {
            cx.counters.rx_no_buffer.add(1);
        }
        self.has_buffers = has_buffers;
    }

    fn post(&mut self, cx: Context<'_>, most: u16) -> u16 {
        let Self { table, ring, running, failed, mode, bytes, logged, .. } = self;
        let Some(running) = running else { return 0 };
        let Some(ring) = ring.as_mut().filter(|_| failed.is_none()) else { return 0 };
        let mask = running.queue.layout().size as usize - 1;
        // A buffer that holds a header alone is one only if more can follow.
        let least = HEADER_LEN + u32::from(!matches!(mode, Mode::Direct { merging: true, .. }));
        let mut poster = Poster { cx, table, ring, failed, logged, mask, bytes: *bytes, least };
        let taken = running.take(cx, most, &mut poster);
        ring.publish();
        taken
    }

    /// Lets the device work, and gives back what has a packet. Returns how many completions there
    /// were.
    fn reap(&mut self, cx: Context<'_>) -> u16 {
        let Self { ring, running, logged, rest, copier, .. } = self;
        let mut reaped = 0u16;
        let mut moved = Moved::default();
        let mut left = *rest;
        match (ring, copier, &mut *running) {
            (Some(ring), Some(copier), _) => ring.reap().for_each(|done| {
                reaped = reaped.saturating_add(1);
                copier.take(cx, &done);
            }),
            (Some(ring), None, Some(running)) => ring.reap().for_each(|done| {
                reaped = reaped.saturating_add(1);
                let (state, written) = outcome(cx, &done, &mut left, &mut moved);
                // Most memories have no dirty log.
                if running.end(done.user_data, state) && !logged.is_empty() {
                    // There are as many places as the queue has entries, which is a power of two.
                    let place = done.user_data as usize & (logged.len() - 1);
                    mark(running.queue.memory(), &logged[place], written);
                }
            }),
            // Nothing is posted without a queue.
            (Some(ring), None, None) => reaped = ring.reap().count() as u16,
            (None, ..) => {}
        }
        *rest = left;
        cx.counters.rx_packets.add(moved.packets);
        cx.counters.rx_bytes.add(moved.bytes);
        if let Some(running) = running {
            running.settle(cx);
        }
        reaped
    }

    /// Lets the posted buffers come back: those without a packet are available again. It is ready when
    /// nothing is on its way.
    pub(super) fn quiesce(&mut self, cx: Context<'_>) -> Poll<()> {
        // The ring is driven even if it has nothing, as it may have to do with itself.
        self.reap(cx);
        for _ in 0..DRAIN_ROUNDS {
            if self.is_empty() {
                break;
            }
            let Some(ring) = &mut self.ring else { break };
            self.draining = true;
            // An error is that not all have come back yet, or that the ring is closed. Then they come
            // back by themselves.
            let _ = ring.drain(Duration::ZERO);
            self.reap(cx);
        }
        if !self.is_empty() {
            return Poll::Pending;
        }
        if std::mem::take(&mut self.draining)
            && let Some(ring) = &mut self.ring
        {
            ring.resume();
        }
        Poll::Ready(())
    }

    fn is_empty(&self) -> bool {
        self.running.as_ref().is_none_or(|running| running.window.is_empty())
    }

    /// Prepares for sleep. Returns whether the device may sleep.
    pub(super) fn arm(&mut self, quiet: bool) -> bool {
        let ring = self.ring.as_mut().filter(|_| self.failed.is_none());
        if ring.is_some_and(|ring| !ring.arm()) {
            return false;
        }
        let is_served =
            |running: &&mut RunningQueue| running.enabled && !running.stopping && !quiet;
        let Some(running) = self.running.as_mut().filter(is_served) else { return true };
        match &mut self.copier {
            Some(copier) => copier.arm(running),
            None => running.arm(),
        }
    }

    /// What the ring has counted, if there is one.
    pub(super) fn ring_stats(&self) -> Option<RingStats> {
        self.ring.as_ref().map(Ring::stats)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.ring.as_ref()?.next_deadline()
    }
}

/// What it takes to post one buffer.
struct Poster<'t> {
    cx: Context<'t>,
    table: &'t mut SegmentTable,
    ring: &'t mut Ring,
    failed: &'t mut Option<CloseReason>,
    logged: &'t mut [Vec<(u64, u32)>],
    /// The place of a buffer in `logged` is in these bits of its number.
    mask: usize,
    /// How many bytes of a buffer a packet can fill, and how many a buffer has at least.
    bytes: u32,
    least: u32,
}

impl Serve for Poster<'_> {
    fn room(&mut self) -> u16 {
        u16::try_from(self.ring.read_credits()).unwrap_or(u16::MAX)
    }

    #[inline(always)]
    fn serve_single(&mut self, single: Single<'_>, number: u32) -> Verdict {
        let space = single.writable().filter(|space| space.len() >= self.least);
        let Some(space) = space else { return self.drop_useless() };
        let buffer = self.table.buffer_of(first_bytes(space, self.bytes), HEADER_LEN);
        let verdict = self.post(buffer, number);
        if !self.logged.is_empty() {
            self.log(&single.chain(), number);
        }
        verdict
    }

    fn serve(&mut self, chain: Chain<'_>, number: u32) -> Verdict {
        if chain.writable_len() < self.least.into() {
            return self.drop_useless();
        }
        let buffer = self.table.buffer_of(useful(&chain, self.bytes), HEADER_LEN);
        let verdict = self.post(buffer, number);
        if !self.logged.is_empty() {
            self.log(&chain, number);
        }
        verdict
    }
}

impl Poster<'_> {
    #[cold]
    fn drop_useless(&mut self) -> Verdict {
        self.cx.counters.rx_useless.add(1);
        Verdict::Dropped
    }

    #[inline(always)]
    fn post(&mut self, buffer: Result<GuestBuffer, GuestBufferError>, number: u32) -> Verdict {
        // If there is none, the table's slots are all in use.
        let Ok(buffer) = buffer else { return Verdict::Later };
        if let Err(refused) = self.ring.stage_read_guest(buffer, number.into()) {
            if let SubmitErrorKind::Closed(reason) = refused.kind {
                *self.failed = Some(reason);
            }
            return Verdict::Later;
        }
        Verdict::Posted
    }

    /// Notes where a buffer is that is on its way.
    #[cold]
    fn log(&mut self, chain: &Chain<'_>, number: u32) {
        if let Some(list) = self.logged.get_mut(number as usize & self.mask) {
            list.clear();
            let pieces = useful(chain, self.bytes);
            list.extend(pieces.map(|slice| (slice.guest_address(), slice.len())));
        }
    }
}

/// The parts of a chain that a packet can reach: the first ones, up to `bytes`.
fn useful<'q>(chain: &Chain<'q>, bytes: u32) -> impl Iterator<Item = GuestSlice<'q>> {
    let mut left = bytes;
    chain.writable().take(SEGMENTS_MAX).map_while(move |slice| {
        let slice = first_bytes(slice, left)?;
        left -= slice.len();
        (!slice.is_empty()).then_some(slice)
    })
}

/// The first bytes of a segment, at most so many.
#[inline]
fn first_bytes(slice: GuestSlice<'_>, bytes: u32) -> Option<GuestSlice<'_>> {
    slice.split_at(slice.len().min(bytes)).map(|(first, _)| first)
}

/// What was received, before it is counted.
#[derive(Default)]
struct Moved {
    packets: u64,
    bytes: u64,
}

/// What became of a buffer, and how many of its bytes were written.
#[inline]
fn outcome(cx: Context<'_>, done: &Completion, rest: &mut u16, moved: &mut Moved) -> (State, u32) {
    match done.result {
        Ok(len) => {
            let header = if *rest == 0 {
                moved.packets += 1;
                *rest = done.more;
                HEADER_LEN
            } else {
                // A later buffer of a packet has no header.
                *rest -= 1;
                0
            };
            moved.bytes += len as u64;
            // No packet is as long as 2^32.
            let written = len as u32 + header;
            (State::Done(written), written)
        }
        Err(EntryError::Device(Status::PacketTooBig)) => {
            cx.counters.rx_too_small.add(1);
            (State::Done(0), 0)
        }
        Err(EntryError::Cancelled | EntryError::DevicePanicked | EntryError::Abandoned) => {
            (State::Cancelled, 0)
        }
        Err(_) => {
            // The buffer goes back to the guest, so that a device that fails again and again is not
            // asked again and again.
            cx.counters.rx_errors.add(1);
            (State::Done(0), 0)
        }
    }
}

/// Enters the written bytes of a buffer into the dirty log.
#[cold]
fn mark(memory: &GuestMemory, list: &[(u64, u32)], written: u32) {
    let mut left = written;
    for &(address, len) in list {
        let len = len.min(left);
        if len == 0 {
            break;
        }
        memory.mark_dirty(address, len);
        left -= len;
    }
}
