//! From the guest to the world: what a segment says, and where its data goes.
//!
//! All segments of one batch are looked at before anything is sent. Their data, in order, is one
//! [`Run`], which the socket gets in one call. What the kernel takes is acknowledged. Nothing is kept
//! of what is out of order across batches, because between a guest and this process nothing is
//! reordered for long.

use std::io::IoSlice;

use crate::io::Io;
use crate::limits::{
    ASK_AFTER, BATCH, DUPLICATE_ACKS, LOOK_AGAIN, MAX_WINDOW, SMALL_SOCKET_BUFFER, SPILL_BLOCK,
    TIME_WAIT,
};
use crate::retained::Retained;
use crate::seq::Seq;
use crate::sockets::{SocketError, Sockets};
use crate::stats::Counter;
use crate::tcp::flow::{Ending, Flow, Phase, asked_mss, send_header};
use crate::tcp::memory::Memory;
use crate::tcp::segment::{Flags, Header, Segment};

/// The data of one batch, in order.
pub(crate) struct Run<'f> {
    parts: [&'f [u8]; BATCH],
    count: usize,
    bytes: u32,
    fin: bool,
    /// The segments that lie behind a gap, and were not taken.
    pub(crate) early: u32,
}

impl<'f> Run<'f> {
    pub(crate) fn new() -> Self {
        Self { parts: [&[]; BATCH], count: 0, bytes: 0, fin: false, early: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0 && !self.fin
    }

    fn push(&mut self, part: &'f [u8]) {
        self.parts[self.count] = part;
        self.count += 1;
        self.bytes += part.len() as u32;
    }
}

/// What became of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is done with.
    Done,
    /// Something in front of it is missing. It may be in the same batch.
    Early,
    /// It begins another flow. This one is to end.
    Replaces,
}

impl<T> Flow<T> {
    /// Takes a segment of the guest. Its data goes to `run`.
    pub(crate) fn take<'f, S: Sockets<Socket = T>>(
        &mut self,
        segment: &Segment<'f>,
        run: &mut Run<'f>,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Taken {
        let flags = segment.flags;
        if flags.syn && !flags.ack && self.is_replaced_by(segment) {
            return Taken::Replaces;
        }
        match self.phase {
            Phase::Closed | Phase::Resetting => Taken::Done,
            Phase::Connecting => {
                // The guest gives up. Its sequence is at SYN, or behind it.
                if flags.rst && (segment.seq == self.irs || segment.seq == self.rcv_nxt) {
                    self.guest_failed(Counter::GuestReset, io, memory);
                }
                Taken::Done
            }
            Phase::SynSent => self.take_answer(segment, io, memory),
            Phase::TimeWait => {
                if flags.rst {
                    self.phase = Phase::Closed;
                } else if segment.end() != segment.seq {
                    self.ack_due = true;
                }
                Taken::Done
            }
            Phase::SynReceived | Phase::Open => self.take_in_sequence(segment, run, io, memory),
        }
    }

    /// The guest answers SYN of the host (RFC 9293, 3.10.7.3).
    fn take_answer<S: Sockets<Socket = T>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Taken {
        let flags = segment.flags;
        if flags.ack && segment.ack != self.snd_nxt {
            io.count(self.key.port, Counter::TcpSequence);
            if !flags.rst {
                answer_reset(segment, io);
            }
        } else if flags.rst && flags.ack {
            self.guest_failed(Counter::GuestReset, io, memory);
        } else if flags.syn && flags.ack {
            let link = io.out.link(self.key.port);
            self.take_syn(segment, &link);
            self.heard = io.now;
            self.establish(io);
            self.ask_space(io, memory);
            // Some servers send nothing before they get this.
            self.ack_due = true;
        }
        Taken::Done
    }

    /// A segment of a flow whose sequence numbers are known (RFC 9293, 3.10.7.4).
    fn take_in_sequence<'f, S: Sockets<Socket = T>>(
        &mut self,
        segment: &Segment<'f>,
        run: &mut Run<'f>,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Taken {
        let (flags, port) = (segment.flags, self.key.port);
        let expected = self.rcv_nxt.add(run.bytes + u32::from(run.fin));
        let edge = self.rcv_edge.max(expected);
        if flags.rst {
            if segment.seq.before(self.rcv_nxt) || segment.seq.after(edge) {
                io.count(port, Counter::TcpSequence);
            } else if self.shut && self.fin == Some(self.snd_una) {
                // Both sides have said everything, and the guest has forgotten the flow before it got
                // FIN for the last time. What it has sent still goes out.
                io.count(port, Counter::GuestReset);
                self.end_socket(io, memory, Ending::Close);
                self.phase = Phase::Closed;
            } else if self.guest_fin
                && self.spill.is_some()
                && self.fin.is_some_and(|fin| !self.snd_una.before(fin))
            {
                // The same, but the kernel has yet to take what was acknowledged. The flow ends when it
                // has: a guest that has not got FIN answers the next one with another reset.
                io.count(port, Counter::GuestReset);
            } else {
                self.guest_failed(Counter::GuestReset, io, memory);
            }
            return Taken::Done;
        }
        self.heard = io.now;
        if flags.syn {
            // The guest sends its SYN again, or is told where the flow is.
            self.ack_due = true;
            return Taken::Done;
        }
        if !flags.ack {
            io.count(port, Counter::TcpFlags);
            return Taken::Done;
        }
        if segment.seq.after(edge) || segment.end().before(self.rcv_nxt.sub(MAX_WINDOW)) {
            io.count(port, Counter::TcpSequence);
            self.ack_due = true;
            return Taken::Done;
        }
        if self.phase == Phase::SynReceived {
            if segment.ack != self.snd_nxt {
                io.count(port, Counter::TcpSequence);
                answer_reset(segment, io);
                return Taken::Done;
            }
            self.establish(io);
            self.wl1 = segment.seq.sub(1);
        }
        if !self.take_ack(segment, io) {
            return Taken::Done;
        }
        self.take_data(segment, expected, run)
    }

    /// Takes what a segment says about data to the guest. Returns whether the rest of the segment
    /// counts.
    fn take_ack<S: Sockets<Socket = T>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, S>,
    ) -> bool {
        let (ack, port) = (segment.ack, self.key.port);
        if ack.after(self.snd_max) {
            io.count(port, Counter::TcpSequence);
            self.ack_due = true;
            return false;
        }
        let window = (u32::from(segment.window) << self.snd_shift).min(MAX_WINDOW);
        // A keep-alive has an old sequence number and a new window.
        let keep_alive = segment.payload.len() <= 1 && segment.seq == self.rcv_nxt.sub(1);
        let seq = if keep_alive { self.rcv_nxt } else { segment.seq };
        let newer = self.wl1.before(seq) || self.wl1 == seq && !self.wl2.after(ack);
        if ack.after(self.snd_una) {
            let fin = self.fin.is_some_and(|fin| ack.after(fin) && !self.snd_una.after(fin));
            let bytes = ack.since(self.snd_una) - u32::from(fin);
            self.acked += bytes;
            self.received += u64::from(bytes);
            io.ports.count_n(port, Counter::TcpBytesReceived, bytes.into());
            self.snd_una = ack;
            self.snd_nxt = self.snd_nxt.max(ack);
            (self.attempts, self.backoff, self.dup_acks) = (0, 0, 0);
            (self.slow, self.probed) = (false, false);
            if self.snd_una == self.snd_max {
                self.retry_at = 0;
            } else {
                self.expect_answer(io.now);
            }
        } else if ack == self.snd_una
            && segment.end() == segment.seq
            && window == self.snd_wnd
            && self.snd_una != self.snd_max
        {
            self.take_duplicate(io);
        }
        if newer && !ack.before(self.snd_una) {
            let edge = self.snd_una.add(window);
            // A guest without memory closes its window and drops what it has not acknowledged. One
            // that takes back a part of its window has dropped what is behind it.
            let to = if window == 0 { self.snd_una } else { edge };
            if to.before(self.snd_nxt) {
                self.snd_nxt = to.max(self.snd_una);
                io.count(port, Counter::WindowRewind);
            }
            if window > 0 && self.snd_wnd == 0 {
                (self.attempts, self.backoff) = (0, 0);
                if self.snd_una == self.snd_max {
                    self.retry_at = 0;
                }
            }
            if window == 0 {
                // It answers, so it may keep its window closed for as long as it likes (RFC 9293,
                // 3.8.6.1).
                self.attempts = 0;
            }
            (self.snd_wnd, self.wl1, self.wl2) = (window, seq, ack);
            self.max_wnd = self.max_wnd.max(window);
        }
        true
    }

    /// The guest acknowledges the same byte again: something behind it is missing (RFC 5681, 3.2).
    fn take_duplicate<S: Sockets<Socket = T>>(&mut self, io: &mut Io<'_, S>) {
        self.dup_acks = self.dup_acks.saturating_add(1);
        let frame = self.frame_len(&io.out.link(self.key.port)).max(1);
        let on_their_way = self.snd_max.since(self.snd_una).div_ceil(frame);
        // The answer to a probe comes behind the answers to everything that was sent before it.
        let most = if self.probed { 1 } else { DUPLICATE_ACKS };
        let enough = on_their_way.saturating_sub(1).min(most);
        // At or before `recover` it may be about a duplicate (RFC 6582, 3.2).
        if enough > 0 && u32::from(self.dup_acks) == enough && self.snd_una.after(self.recover) {
            io.count(self.key.port, Counter::FastRetransmit);
            self.recover = self.snd_max;
            self.snd_nxt = self.snd_una;
            self.expect_answer(io.now);
        }
    }

    /// Takes a segment's data and FIN. `expected` is the next byte that is not in `run`.
    fn take_data<'f>(&mut self, segment: &Segment<'f>, expected: Seq, run: &mut Run<'f>) -> Taken {
        let len = segment.payload.len() as u32;
        if segment.end() == segment.seq {
            // Nothing in it. Before the expected byte it asks for an answer, as keep-alives do.
            self.ack_due |= segment.seq.before(expected);
            return Taken::Done;
        }
        self.ack_due = true;
        if self.guest_fin || run.fin {
            return Taken::Done;
        }
        if segment.seq.after(expected) {
            return Taken::Early;
        }
        let skip = expected.since(segment.seq);
        if skip > len {
            return Taken::Done;
        }
        let room = self.rcv_edge.since(expected);
        let part = &segment.payload[skip as usize..];
        let part = &part[..part.len().min(room as usize)];
        if !part.is_empty() {
            run.push(part);
        }
        // FIN counts only right behind the last byte that was taken.
        run.fin = segment.flags.fin && skip as usize + part.len() == segment.payload.len();
        Taken::Done
    }

    /// Ends a batch: sends its data, forgets what the guest has acknowledged, and sends what the guest
    /// is to get.
    pub(crate) fn finish<S: Sockets<Socket = T>>(
        &mut self,
        run: &Run<'_>,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        self.look_at = 0;
        if self.phase == Phase::Open
            && let Err(error) = self.finish_open(run, io, memory)
        {
            self.world_failed(error, io, memory);
        }
        match self.phase {
            Phase::Open if self.ack_due => {
                // A guest whose segment is lost finds out by an acknowledgment for each segment behind it
                // (RFC 5681, 3.2 and 4.2). Those of one batch are enough if they are as many as it
                // waits for.
                if !run.is_empty() || run.early == 0 {
                    self.send_ack(io, memory);
                }
                self.send_duplicates(run.early.min(DUPLICATE_ACKS), io);
            }
            Phase::TimeWait if self.ack_due => self.send_ack(io, memory),
            Phase::SynSent | Phase::SynReceived if self.ack_due => self.send_handshake(io, memory),
            _ => {}
        }
        // What was sent may have offered more, so this comes last.
        if self.phase == Phase::Open
            && let Err(error) = self.arm_if_low(io)
        {
            self.world_failed(error, io, memory);
        }
    }

    fn finish_open<S: Sockets<Socket = T>>(
        &mut self,
        run: &Run<'_>,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Result<(), SocketError> {
        if run.bytes > 0 || run.fin {
            if let Err(why) = self.look_at_queries(run, io) {
                io.count(self.key.port, why);
                self.reset_guest(io, memory, Ending::Reset);
                return Ok(());
            }
            let before = self.rcv_nxt;
            self.send_run(run, io, memory)?;
            self.note_queries(run, self.rcv_nxt.since(before), io);
        }
        self.flush_spill(io, memory)?;
        if let Some(socket) = &self.socket {
            if self.acked > 0 {
                let acked = core::mem::take(&mut self.acked);
                self.place.discard(io.sockets, socket, &mut memory.rings, acked)?;
                self.since_asked = self.since_asked.saturating_add(acked);
            }
            if self.guest_fin && !self.shut && self.spill.is_none() {
                self.shut = true;
                // If the other direction has ended, the socket is closed now, which says the same.
                if !self.fin_acked() {
                    io.sockets.shutdown(socket)?;
                }
            }
            if self.since_asked >= ASK_AFTER {
                // The kernel makes the receive buffer larger as bytes are taken out of it.
                self.ask_space(io, memory);
            }
        }
        if self.guest_fin && self.shut && self.fin_acked() {
            self.end(io, memory);
            return Ok(());
        }
        self.push(io, memory)
    }

    /// Looks whether what the guest sends to the gateway's DNS may go to the resolver.
    ///
    /// # Errors
    ///
    /// Why not.
    fn look_at_queries<S: Sockets<Socket = T>>(
        &self,
        run: &Run<'_>,
        io: &mut Io<'_, S>,
    ) -> Result<(), Counter> {
        let Some(queries) = &self.queries else { return Ok(()) };
        // The guest sends again what is not taken.
        let mut queries = queries.clone();
        run.parts[..run.count].iter().try_for_each(|part| queries.look(part, &io.dns.names))
    }

    /// Notes how much of a run was taken.
    fn note_queries<S: Sockets<Socket = T>>(
        &mut self,
        run: &Run<'_>,
        taken: u32,
        io: &mut Io<'_, S>,
    ) {
        let Some(queries) = &mut self.queries else { return };
        let mut left = taken as usize;
        for part in &run.parts[..run.count] {
            let part = &part[..part.len().min(left)];
            left -= part.len();
            let looked = queries.look(part, &io.dns.names);
            debug_assert_eq!(looked, Ok(()), "it was looked at before");
        }
    }

    /// Both directions have ended.
    fn end<S: Sockets<Socket = T>>(&mut self, io: &mut Io<'_, S>, memory: &mut Memory) {
        self.end_socket(io, memory, Ending::Close);
        // A guest whose FIN was acknowledged by the FIN that it has acknowledged knows everything.
        // Another may not get the last acknowledgment, and send its FIN again.
        self.phase = if self.fin_acks_fin { Phase::Closed } else { Phase::TimeWait };
        self.retry_at = io.now + TIME_WAIT;
    }

    /// Gives the batch's data to the socket, in one call. What the kernel does not take is spilled.
    fn send_run<S: Sockets<Socket = T>>(
        &mut self,
        run: &Run<'_>,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Result<(), SocketError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let port = self.key.port;
        let parts = &run.parts[..run.count];
        if run.bytes > 0 {
            (self.just_writable, self.reopened) = (false, false);
            io.ports.note_active(port, &mut self.share, run.bytes, io.now);
            let each = (run.bytes / run.count as u32).min(u16::MAX.into()) as u16;
            let average = &mut self.share.per_frame;
            *average = *average - *average / 4 + each / 4;
        }
        let mut sent = 0;
        if self.spill.is_none() && run.bytes > 0 {
            let mut slices = [IoSlice::new(&[]); BATCH];
            for (slice, part) in slices.iter_mut().zip(parts) {
                *slice = IoSlice::new(part);
            }
            sent = match io.sockets.send(socket, &slices[..run.count]) {
                Ok(sent) => sent,
                Err(SocketError::WouldBlock) => 0,
                Err(SocketError::NoMemory) => {
                    io.count(port, Counter::NoMemory);
                    0
                }
                Err(error) => return Err(error),
            };
            self.space.free = self.space.free.saturating_sub(sent as u32);
            self.sent += sent as u64;
            io.ports.count_n(port, Counter::TcpBytesSent, sent as u64);
        }
        let mut taken = sent;
        if sent < run.bytes as usize {
            self.space.free = 0;
            if self.spill.is_none() {
                self.spill = memory.spill.take(port);
            }
            if let Some(spill) = &mut self.spill {
                let mut skip = sent;
                for part in parts {
                    let skipped = skip.min(part.len());
                    skip -= skipped;
                    let pushed = spill.push(&part[skipped..]);
                    taken += pushed;
                    if pushed < part.len() - skipped {
                        break;
                    }
                }
            }
            io.ports.count_n(port, Counter::Spilled, (taken - sent) as u64);
            io.ports.count_n(port, Counter::SpillFull, (run.bytes as usize - taken) as u64);
        }
        self.rcv_nxt = self.rcv_nxt.add(taken as u32);
        if run.fin && taken == run.bytes as usize {
            self.rcv_nxt = self.rcv_nxt.add(1);
            self.guest_fin = true;
        }
        Ok(())
    }

    /// Gives the socket what is spilled.
    fn flush_spill<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Result<(), SocketError> {
        let (Some(socket), Some(spill)) = (&self.socket, &mut self.spill) else { return Ok(()) };
        while !self.armed && !spill.is_empty() {
            match io.sockets.send(socket, &spill.bytes()) {
                Ok(sent) => {
                    spill.remove(sent);
                    self.just_writable = false;
                    self.sent += sent as u64;
                    io.ports.count_n(self.key.port, Counter::TcpBytesSent, sent as u64);
                }
                Err(SocketError::WouldBlock) => break,
                Err(SocketError::NoMemory) => {
                    // The socket may say that it takes bytes all the same.
                    self.look_at = io.now + LOOK_AGAIN;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if spill.is_empty()
            && let Some(spill) = self.spill.take()
        {
            memory.spill.give_back(spill);
            // The guest may wait for its window, and the socket has already said that it takes bytes.
            self.ask_space(io, memory);
            self.ack_due |= self.has_room(io, memory);
        }
        Ok(())
    }

    /// What the guest may send: moves the right edge of its window if that is worth it (RFC 9293,
    /// 3.8.6.2.2), and returns the field of the header, with this shift.
    pub(crate) fn offer<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
        shift: u8,
    ) -> u16 {
        if !self.guest_fin && self.socket.is_some() {
            if self.space.free <= self.space.capacity / 2 {
                self.ask_space(io, memory);
            }
            let window = self.room(io, memory).min(u32::from(u16::MAX) << shift);
            let edge = self.rcv_nxt.add(window);
            let worthwhile = self.worthwhile(io);
            if edge.since(self.rcv_edge) >= worthwhile {
                let closed = self.rcv_edge.since(self.rcv_nxt) < worthwhile;
                self.reopened |= closed && self.phase == Phase::Open;
                self.rcv_edge = edge;
            }
        }
        let left = self.rcv_edge.since(self.rcv_nxt);
        let (_, frame) = self.guest_frame(io);
        io.ports.note_offer(self.key.port, &mut self.share, (left, frame), io.now);
        // Rounded down: up to the edge is taken all the same. Rounded up, every segment would move the
        // edge on, whatever space there is.
        (left >> shift).min(u16::MAX.into()) as u16
    }

    /// How many bytes the guest may send from `rcv_nxt` on, as far as the socket is known.
    fn room<S: Sockets<Socket = T>>(&self, io: &mut Io<'_, S>, memory: &Memory) -> u32 {
        let spilled = self.spill.as_ref().map_or(0, |spill| spill.len() as u32);
        let room = self.space.free.saturating_add(self.overfill(memory));
        let mut room = room.saturating_sub(spilled).min(MAX_WINDOW);
        if memory.is_short(self.key.port, &io.config.limits) {
            // The flow may have as much in the kernel as a small buffer holds.
            let used = self.space.capacity.saturating_sub(self.space.free);
            room = room.min(SMALL_SOCKET_BUFFER.saturating_sub(used));
        }
        let frame = self.guest_frame(io);
        room.min(io.ports.share(self.key.port, frame, &self.share, io.now))
    }

    /// How many bytes the guest may be offered beyond what the socket takes: as many as the socket takes
    /// when it is empty, and as a block of the spill holds.
    ///
    /// A system makes a socket's send buffer larger if the peer takes what is in it, but only after
    /// somebody has found it full (`tcp_check_space` in net/ipv4/tcp_input.c). A guest that is offered no
    /// more than the buffer takes never fills it, and its stream stays at the first size: 51 KiB at a
    /// time. So it may fill a buffer that the peer empties, which is one that is less than half full.
    fn overfill(&self, memory: &Memory) -> u32 {
        let drains = self.spill.is_none() && self.space.free > self.space.capacity / 2;
        if drains && memory.spill.has_block(self.key.port) {
            self.space.capacity.min(SPILL_BLOCK as u32)
        } else {
            0
        }
    }

    /// The longest segment that the guest may send, and about how many bytes it puts into one frame: more
    /// than that if it leaves the cutting to others. Half of the average is counted on, so that a guest
    /// whose frames become shorter fills no more places at once.
    fn guest_frame<S: Sockets<Socket = T>>(&self, io: &Io<'_, S>) -> (u32, u32) {
        let mss = u32::from(asked_mss(self.key.guest, &io.out.link(self.key.port)));
        (mss, mss.max(u32::from(self.share.per_frame) / 2))
    }

    /// Whether the guest could be offered so much more that it is to be told.
    pub(crate) fn has_room<S: Sockets<Socket = T>>(
        &self,
        io: &mut Io<'_, S>,
        memory: &Memory,
    ) -> bool {
        let edge =
            self.rcv_nxt.add(self.room(io, memory).min(u32::from(u16::MAX) << self.rcv_shift));
        !self.guest_fin && edge.since(self.rcv_edge) >= self.worthwhile(io)
    }

    /// By how much the window has to grow before the guest is told.
    fn worthwhile<S: Sockets<Socket = T>>(&self, io: &mut Io<'_, S>) -> u32 {
        let (mss, _) = self.guest_frame(io);
        mss.min(self.space.capacity / 4).max(1)
    }

    /// If the guest may soon have to wait for its window, asks the socket to tell when it takes bytes.
    fn arm_if_low<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
    ) -> Result<(), SocketError> {
        let (segment, _) = self.guest_frame(io);
        let low = segment.max(2 * self.worthwhile(io));
        let is_low = !self.guest_fin && self.rcv_edge.since(self.rcv_nxt) < low;
        let Some(socket) = &self.socket else { return Ok(()) };
        if is_low && self.just_writable && self.spill.is_none() {
            // The socket takes bytes, and has just said so. It would say so again at once.
            self.look_at = io.now + LOOK_AGAIN;
        } else if (is_low || self.spill.is_some()) && !self.armed && self.look_at == 0 {
            io.sockets.arm_writable(socket, self.token)?;
            self.armed = true;
        }
        Ok(())
    }
}

/// Answers a segment that belongs to no flow, unless it is a reset.
pub(crate) fn reset_unknown<S: Sockets>(segment: &Segment<'_>, io: &mut Io<'_, S>) {
    if !segment.flags.rst {
        io.count(segment.key.port, Counter::NoFlow);
        answer_reset(segment, io);
    }
}

/// Answers a segment with a reset (RFC 9293, 3.10.7.1), unless the port gets too many.
pub(crate) fn answer_reset<S: Sockets>(segment: &Segment<'_>, io: &mut Io<'_, S>) {
    let port = segment.key.port;
    if !io.ports.may_err(port, io.now) {
        return;
    }
    let (seq, ack, has_ack) = if segment.flags.ack {
        (segment.ack, Seq(0), false)
    } else {
        (Seq(0), segment.end(), true)
    };
    let header = Header {
        addresses: crate::packet::Addresses {
            from_mac: io.config.gateway_mac,
            to_mac: segment.datagram.mac,
            from: segment.key.remote.ip(),
            to: segment.key.guest.ip(),
        },
        from_port: segment.key.remote.port(),
        to_port: segment.key.guest.port(),
        seq,
        ack,
        flags: Flags { rst: true, ack: has_ack, ..Flags::default() },
        window: 0,
        options: None,
    };
    // If the port does not take it, the guest sends its segment again.
    let _ = send_header(io, port, &header);
}
