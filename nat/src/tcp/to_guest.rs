//! From the world to the guest: data, FIN, acknowledgments and probes.
//!
//! Data is read into the scratch memory, where each frame has space for its headers in front. A frame
//! that the port does not take counts as never sent.

use std::io::IoSliceMut;

use vmring_embedded::software;

use crate::cost;
use crate::io::Io;
use crate::limits::{FRAMES_AT_ONCE, IDLE_TIMEOUT, REFUSED_LOOK, RETRANSMITS, SCRATCH_LEN, TURNS};
use crate::output::Link;
use crate::packet::padded;
use crate::ports::SECOND;
use crate::retained::{Found, Retained};
use crate::sockets::{Readiness, SocketError, Sockets};
use crate::stats::Counter;
use crate::tcp::flow::{Ending, Flow, Phase};
use crate::tcp::from_guest::Run;
use crate::tcp::memory::Memory;
use crate::tcp::segment::{Flags, HEADER_LEN};

impl<T> Flow<T> {
    /// The most data in one frame for the guest: several segments if its port cuts them, else one.
    pub(crate) fn frame_len(&self, link: &Link) -> u32 {
        let (cuts, headers) = if self.key.guest.is_ipv4() {
            (link.offloads.tso4, 20 + HEADER_LEN)
        } else {
            // The length of an IPv6 packet is counted without its header, but not every receiver
            // takes longer packets than IPv4's.
            (link.offloads.tso6, 40 + HEADER_LEN)
        };
        let mss = u32::from(self.mss);
        if !cuts || !link.offloads.checksum || !link.offloads.virtio_header {
            return mss;
        }
        let longest = link.longest.saturating_sub(14).min(usize::from(u16::MAX));
        let data = longest.saturating_sub(headers) as u32;
        (data / mss * mss).max(mss)
    }

    /// How many bytes may be sent from `snd_nxt` on. FIN counts as one.
    fn sendable(&self, frame: u32, limit: u32) -> u32 {
        let on_their_way = self.snd_nxt.since(self.snd_una);
        let mut window = self.snd_wnd.min(limit);
        if self.slow {
            window = window.min(frame);
        }
        let space = window.saturating_sub(on_their_way);
        if self.fin == Some(self.snd_nxt) {
            return space;
        }
        // A small piece of window is not worth a segment while an answer is to come that brings more
        // (RFC 9293, 3.8.6.2.1).
        if space < u32::from(self.mss) && space < self.max_wnd / 2 && on_their_way > 0 {
            return 0;
        }
        // Whole segments. What the socket has less is a smaller one.
        let mss = u32::from(self.mss);
        if space > mss { space / mss * mss } else { space }
    }

    /// Sends the guest what the socket has, as far as window, port and budget allow.
    pub(crate) fn push<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Result<(), SocketError> {
        self.unfinished = false;
        if self.phase != Phase::Open {
            return Ok(());
        }
        let link = io.out.link(self.key.port);
        let frame = self.frame_len(&link);
        for turn in 0.. {
            if !self.has_more() {
                break;
            }
            let limit = Retained::<S>::limit(&self.place, &memory.rings);
            let space = self.sendable(frame, limit);
            if space == 0 {
                break;
            }
            if self.fin == Some(self.snd_nxt) {
                self.send_fin(io, memory);
                break;
            }
            if turn == TURNS {
                self.unfinished = true;
                break;
            }
            if !self.push_once(&link, frame, space, io, memory)? {
                break;
            }
        }
        let waits = self.refused || self.unfinished || self.look_at > 0;
        if self.retry_at == 0 && self.has_more() && !waits {
            // The window is closed, or too small. The guest may open it in a segment that gets lost.
            self.expect_answer(io.now);
        }
        Ok(())
    }

    /// Reads once from the socket, and sends what it has. Returns whether there may be more to do.
    fn push_once<S: Sockets<Socket = T>>(
        &mut self,
        link: &Link,
        frame: u32,
        space: u32,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Result<bool, SocketError> {
        let Some(socket) = &self.socket else { return Ok(false) };
        let port = self.key.port;
        let mac = io.config.gateway_mac;
        let header_len = self.data_header(0, mac).len();
        let stride = header_len + frame as usize;
        let frames = io.out.space(port).min(FRAMES_AT_ONCE).min(SCRATCH_LEN / stride);
        if frames == 0 {
            self.refused = true;
            return Ok(false);
        }
        let wanted = (space as usize).min(frames * frame as usize);
        let mut left = wanted;
        let mut chunks = io.scratch.chunks_mut(stride);
        let mut slices: [IoSliceMut<'_>; FRAMES_AT_ONCE] = std::array::from_fn(|_| {
            let len = left.min(frame as usize);
            left -= len;
            match chunks.next() {
                Some(chunk) if len > 0 => IoSliceMut::new(&mut chunk[header_len..header_len + len]),
                _ => IoSliceMut::new(&mut []),
            }
        });
        let slices = &mut slices[..wanted.div_ceil(frame as usize)];
        let offset = self.snd_nxt.since(self.snd_una);
        let found = self.place.copy(io.sockets, socket, &mut memory.rings, offset, slices)?;
        let all = match found {
            Found::Bytes(len) => len,
            Found::Nothing => {
                self.readable = false;
                return Ok(false);
            }
            Found::End => {
                self.readable = false;
                self.fin = Some(self.snd_nxt);
                return Ok(true);
            }
            Found::NoMemory => {
                io.count(port, Counter::RingsUsedUp);
                self.look_at = io.now + REFUSED_LOOK;
                return Ok(false);
            }
        };
        let mut after = Ok(());
        if all < wanted {
            if !self.reads_short {
                // Fewer than asked for: there are no more now.
                self.readable = false;
            } else if self.fin.is_none() {
                // What ends behind these bytes is told with them.
                let mut byte = [0];
                let mut next = [IoSliceMut::new(&mut byte)];
                let behind = offset + all as u32;
                match self.place.copy(io.sockets, socket, &mut memory.rings, behind, &mut next) {
                    Ok(Found::End) => {
                        self.readable = false;
                        self.fin = Some(self.snd_nxt.add(all as u32));
                    }
                    Ok(Found::Nothing) => self.readable = false,
                    Ok(Found::Bytes(_) | Found::NoMemory) => {}
                    // The guest gets the bytes first.
                    Err(error) => after = Err(error),
                }
            }
        }
        // FIN takes a place in the window.
        let fin = self.fin.filter(|_| all < space as usize);
        let shift = self.rcv_shift;
        let window = self.offer(io, memory, shift);
        let mut done = 0;
        for index in 0..all.div_ceil(frame as usize) {
            let data = (all - done).min(frame as usize);
            let mut header = self.data_header(window, mac);
            header.flags.psh = done + data == all;
            header.flags.fin = fin == Some(self.snd_nxt.add(data as u32));
            let at = index * stride;
            let len = header_len + data;
            let bytes = &mut io.scratch[at..at + len];
            let mut offload = header.emit(bytes, self.mss);
            // Padding is not summed, so a frame that needs some has its checksum.
            if !link.offloads.checksum || !link.offloads.virtio_header || len < padded(len) {
                offload = software::complete_checksum(&offload, bytes)
                    .expect("the header describes the frame");
            }
            // Only the last frame is so short, and there is space behind it.
            io.scratch[at + len..at + padded(len)].fill(0);
            let sent = io.out.send(port, &io.scratch[at..at + padded(len)], &offload);
            if sent.is_err() {
                io.count(port, Counter::OutputFull);
                self.refused = true;
                break;
            }
            io.count(port, Counter::FramesOut);
            io.ports.spent += cost::frame(len);
            self.ack_due = false;
            done += data;
            self.snd_nxt = self.snd_nxt.add(data as u32);
            if header.flags.fin {
                self.fin_acks_fin |= self.guest_fin;
                self.snd_nxt = self.snd_nxt.add(1);
            }
        }
        self.sent(io.now);
        after?;
        if done < all {
            // What was read and not sent is read again.
            self.readable = true;
            return Ok(false);
        }
        Ok(self.readable || self.snd_nxt.before(self.snd_max))
    }

    /// Notes that `snd_nxt` has moved.
    fn sent(&mut self, now: u64) {
        self.snd_max = self.snd_max.max(self.snd_nxt);
        if self.retry_at == 0 && self.snd_una != self.snd_max {
            self.expect_answer(now);
        }
    }

    /// Sends FIN.
    fn send_fin<S: Sockets<Socket = T>>(&mut self, io: &mut Io<'_, S>, memory: &mut Memory) {
        let shift = self.rcv_shift;
        let window = self.offer(io, memory, shift);
        let flags = Flags { fin: true, ..Flags::ACK };
        if self.send_control(io, flags, self.snd_nxt, window).is_err() {
            self.refused = true;
            return;
        }
        self.ack_due = false;
        self.fin_acks_fin |= self.guest_fin;
        self.snd_nxt = self.snd_nxt.add(1);
        self.sent(io.now);
    }

    /// Sends an acknowledgment without data.
    pub(crate) fn send_ack<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        let shift = self.rcv_shift;
        let window = self.offer(io, memory, shift);
        match self.send_control(io, Flags::ACK, self.snd_nxt, window) {
            Ok(()) => self.ack_due = false,
            Err(_) => self.refused = true,
        }
    }

    /// Acknowledges again what was acknowledged last, so many times. The window is the same too, because
    /// an acknowledgment with another window counts as no duplicate (RFC 5681, 2).
    pub(crate) fn send_duplicates<S: Sockets<Socket = T>>(
        &mut self,
        count: u32,
        io: &mut Io<'_, S>,
    ) {
        let window = self.rcv_edge.since(self.rcv_nxt) >> self.rcv_shift;
        for _ in 0..count {
            match self.send_control(io, Flags::ACK, self.snd_nxt, window as u16) {
                Ok(()) => self.ack_due = false,
                Err(_) => {
                    self.refused |= self.ack_due;
                    break;
                }
            }
        }
    }

    /// Sends a segment that is no news, so that the guest answers with its window (RFC 9293, 3.8.4).
    fn probe<S: Sockets<Socket = T>>(
        &mut self,
        counter: Counter,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        io.count(self.key.port, counter);
        let shift = self.rcv_shift;
        let window = self.offer(io, memory, shift);
        // One that the port does not take is as good as lost: another follows.
        let _ = self.send_control(io, Flags::ACK, self.snd_una.sub(1), window);
    }

    /// The socket has become ready.
    pub(crate) fn on_ready<S: Sockets<Socket = T>>(
        &mut self,
        readiness: Readiness,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        match self.phase {
            Phase::Connecting => return self.look_at_connection(readiness, io, memory),
            Phase::SynReceived | Phase::SynSent | Phase::Open => {}
            Phase::TimeWait | Phase::Resetting | Phase::Closed => return,
        }
        if readiness.failed
            && let Some(socket) = &self.socket
            && let Err(error) = io.sockets.take_error(socket)
            && error != SocketError::WouldBlock
        {
            // The next look at the socket would find the end of the stream.
            return self.world_failed(error, io, memory);
        }
        self.readable |= readiness.readable || readiness.closed;
        self.reads_short |= readiness.closed || readiness.urgent;
        if readiness.writable && self.armed {
            self.armed = false;
            self.just_writable = true;
            if self.phase == Phase::Open && self.spill.is_none() {
                self.ask_space(io, memory);
                self.ack_due |= self.has_room(io, memory);
            }
        }
        self.finish(&Run::new(), io, memory);
    }

    /// The timer has expired.
    pub(crate) fn on_time<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        let now = io.now;
        if self.retry_at > 0 && self.retry_at <= now {
            self.retry_at = 0;
            match self.phase {
                Phase::Connecting | Phase::SynReceived | Phase::SynSent => {
                    self.handshake_timeout(io, memory);
                }
                Phase::Open => self.answer_timeout(io, memory),
                Phase::Resetting if self.attempts < RETRANSMITS => {
                    let attempts = self.attempts + 1;
                    self.reset_guest(io, memory, Ending::Reset);
                    (self.attempts, self.backoff) = (attempts, attempts);
                }
                Phase::TimeWait | Phase::Resetting | Phase::Closed => self.phase = Phase::Closed,
            }
        }
        if self.look_at > 0 && self.look_at <= now {
            self.just_writable = false;
            self.finish(&Run::new(), io, memory);
        }
        if self.phase == Phase::Open {
            if now.saturating_sub(self.heard) >= IDLE_TIMEOUT {
                io.count(self.key.port, Counter::IdleTimeout);
                self.reset_guest(io, memory, Ending::Reset);
            } else if now >= self.probe_at() {
                if self.asked == 0
                    && let Some(socket) = &self.socket
                {
                    // The peer may be gone too. Most connections do not live as long as this.
                    io.sockets.keep_alive(socket);
                }
                self.asked = (now / SECOND) as u32;
                if self.reopened {
                    // If this was lost, and the guest does not ask, it would wait for ever. The
                    // question itself is no news, so its window may not be taken.
                    self.send_ack(io, memory);
                }
                self.probe(Counter::KeepAlive, io, memory);
            }
        }
    }

    /// The guest has not acknowledged in time, or its window is still closed.
    fn answer_timeout<S: Sockets<Socket = T>>(&mut self, io: &mut Io<'_, S>, memory: &mut Memory) {
        if !self.has_more() && self.snd_una == self.snd_max {
            return;
        }
        if self.may_probe_tail() && self.snd_wnd > 0 && self.snd_nxt == self.snd_max {
            io.count(self.key.port, Counter::TailProbe);
            self.probed = true;
            self.snd_nxt = self.snd_max.sub(u32::from(self.mss));
            self.expect_answer(io.now);
            return self.finish(&Run::new(), io, memory);
        }
        if self.attempts >= RETRANSMITS {
            io.count(self.key.port, Counter::GuestSilent);
            return self.reset_guest(io, memory, Ending::Reset);
        }
        self.attempts += 1;
        self.backoff = self.backoff.saturating_add(1);
        if self.snd_una != self.snd_max && self.snd_wnd > 0 {
            io.count(self.key.port, Counter::TimeoutRetransmit);
            (self.snd_nxt, self.recover, self.slow) = (self.snd_una, self.snd_max, true);
            self.dup_acks = 0;
        } else {
            self.probe(Counter::WindowProbe, io, memory);
        }
        self.expect_answer(io.now);
        self.finish(&Run::new(), io, memory);
    }
}
