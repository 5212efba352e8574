//! How a flow begins: from a guest's SYN to a connection of the host, and from a peer's connection
//! to SYN of the host.

use core::net::SocketAddr;

use smoltcp::wire::{IpProtocol, TcpPacket, TcpSeqNumber};

use crate::icmp::Reason;
use crate::io::Io;
use crate::limits::{CONNECT_TIMEOUT, HANDSHAKE_FIRST, HANDSHAKE_RETRANSMITS, MAX_WINDOW};
use crate::packet::Addresses;
use crate::retained::place::Place;
use crate::sockets::{Readiness, SocketError, Sockets, Token};
use crate::stats::Counter;
use crate::tcp::flow::{Ending, Flow, Phase};
use crate::tcp::memory::Memory;
use crate::tcp::segment::{Flags, HEADER_LEN, Key, Segment};

impl<T> Flow<T> {
    /// The flow of a guest's SYN. The host's socket is connecting.
    pub(crate) fn connecting<S: Sockets<Socket = T>>(
        segment: &Segment<'_>,
        to: SocketAddr,
        (socket, token): (T, Token),
        place: Place,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Self {
        let mut flow =
            Self::new(segment.key, to, segment.datagram.mac, Phase::Connecting, place, token);
        flow.begin_socket(socket, memory);
        flow.take_syn(segment, &io.out.link(segment.key.port));
        flow.heard = io.now;
        flow.retry_at = io.now + CONNECT_TIMEOUT;
        flow
    }

    /// The flow of a peer that has connected to the host. The guest is to get SYN.
    pub(crate) fn accepted<S: Sockets<Socket = T>>(
        key: Key,
        from: SocketAddr,
        mac: [u8; 6],
        (socket, token): (T, Token),
        place: Place,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) -> Self {
        let mut flow = Self::new(key, from, mac, Phase::SynSent, place, token);
        flow.begin_socket(socket, memory);
        flow.start_sequence(io.now, memory);
        flow.heard = io.now;
        flow.retry_at = io.now + HANDSHAKE_FIRST;
        flow.ack_due = true;
        flow
    }

    fn start_sequence(&mut self, now: u64, memory: &Memory) {
        let first = memory.initial_sequence(&self.key, now);
        (self.snd_una, self.recover) = (first, first);
        (self.snd_nxt, self.snd_max) = (first.add(1), first.add(1));
    }

    /// Looks whether the host's connection is made.
    pub(crate) fn look_at_connection<S: Sockets<Socket = T>>(
        &mut self,
        readiness: Readiness,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        if !readiness.writable && !readiness.failed && !readiness.closed {
            return;
        }
        let Some(socket) = &self.socket else { return };
        // A socket that takes bytes, with no error and not closed, is connected.
        let is_connected = readiness.writable && !readiness.failed && !readiness.closed;
        let result = if is_connected { Ok(()) } else { io.sockets.take_error(socket) };
        match result {
            Err(SocketError::WouldBlock) => {}
            Err(error) => self.refuse(error, io, memory),
            Ok(()) => {
                self.start_sequence(io.now, memory);
                self.phase = Phase::SynReceived;
                // What comes later is told.
                self.readable = readiness.readable || readiness.closed;
                self.reads_short = readiness.closed || readiness.urgent;
                self.ask_space(io, memory);
                self.ack_due = true;
                self.retry_at = io.now + HANDSHAKE_FIRST;
                self.send_handshake(io, memory);
            }
        }
    }

    /// Sends SYN or SYN,ACK.
    pub(crate) fn send_handshake<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        let ack = self.phase == Phase::SynReceived;
        // The window is not scaled in either, and in SYN it means nothing.
        let window = if ack { self.offer(io, memory, 0) } else { u16::MAX };
        let flags = Flags { syn: true, ack, ..Flags::default() };
        match self.send_control(io, flags, self.snd_una, window) {
            Ok(()) => self.ack_due = false,
            Err(_) => self.refused = true,
        }
    }

    /// The handshake is complete.
    pub(crate) fn establish<S: Sockets<Socket = T>>(&mut self, io: &mut Io<'_, S>) {
        self.phase = Phase::Open;
        self.snd_una = self.snd_nxt;
        (self.attempts, self.backoff, self.retry_at, self.ack_due) = (0, 0, 0, false);
        io.count(self.key.port, Counter::TcpEstablished);
    }

    /// The handshake has taken too long, or a part of it has to be sent again.
    pub(crate) fn handshake_timeout<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        if self.phase == Phase::Connecting {
            self.refuse(SocketError::TimedOut, io, memory);
        } else if self.attempts >= HANDSHAKE_RETRANSMITS {
            self.guest_failed(Counter::GuestSilent, io, memory);
        } else {
            self.attempts += 1;
            self.retry_at = io.now + (HANDSHAKE_FIRST << self.attempts);
            self.send_handshake(io, memory);
        }
    }

    /// The host could not connect. Tells the guest why.
    fn refuse<S: Sockets<Socket = T>>(
        &mut self,
        error: SocketError,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        let (counter, answer) = refusal(error);
        io.count(self.key.port, counter);
        if self.queries.is_some() {
            io.dns.failed(self.key.port, self.to.ip(), io.ports, io.now);
        }
        match answer {
            None => self.reset_guest(io, memory, Ending::Close),
            Some(reason) => {
                // A hop of the way may have said why.
                let told = match &self.socket {
                    Some(socket) => io.sockets.take_datagram_error(socket, &mut []),
                    None => Ok(None),
                };
                let told = told.ok().flatten().and_then(|error| {
                    io.passed(&error, self.to.into(), self.key.remote.ip(), self.key.guest.ip())
                });
                self.end_socket(io, memory, Ending::Close);
                self.phase = Phase::Closed;
                // The guest finds its connection by these headers, which are those of its SYN.
                let (guest, remote) = (self.key.guest, self.key.remote);
                let addresses = Addresses {
                    from_mac: [0; 6],
                    to_mac: [0; 6],
                    from: guest.ip(),
                    to: remote.ip(),
                };
                let len = addresses.header_len() + HEADER_LEN;
                let mut frame = [0; 14 + 40 + HEADER_LEN];
                let mut tcp =
                    TcpPacket::new_unchecked(addresses.emit(IpProtocol::Tcp, &mut frame[..len]));
                tcp.set_src_port(guest.port());
                tcp.set_dst_port(remote.port());
                tcp.set_seq_number(TcpSeqNumber(self.irs.0 as i32));
                tcp.set_header_len(HEADER_LEN as u8);
                tcp.set_syn(true);
                let (port, mac, cause) = (self.key.port, self.mac, &frame[14..len]);
                match told {
                    Some((from, reason)) => {
                        io.count(port, Counter::ErrorsPassed);
                        io.send_error_from(port, from, reason, mac, cause, guest.ip());
                    }
                    None => io.send_error(port, reason, mac, cause, guest.ip()),
                }
            }
        }
    }

    /// Whether SYN on this flow's addresses and ports begins another flow.
    pub(crate) fn is_replaced_by(&self, segment: &Segment<'_>) -> bool {
        if segment.seq == self.irs {
            return false;
        }
        match self.phase {
            Phase::Connecting | Phase::SynReceived => true,
            Phase::TimeWait | Phase::Resetting | Phase::Closed => true,
            // Only a guest that has forgotten the flow has a sequence that is not the flow's. Another
            // is told where the flow is, and a guest that has forgotten it answers with a reset
            // (RFC 9293, 3.10.7.4).
            Phase::Open => {
                let near = self.rcv_nxt.sub(MAX_WINDOW).before(segment.seq)
                    && !segment.seq.after(self.rcv_edge);
                !near || self.guest_fin && segment.seq.after(self.rcv_nxt)
            }
            Phase::SynSent => false,
        }
    }
}

/// How a failure to connect is counted, and what the guest gets: an ICMP error, or a reset if there
/// is none.
pub(crate) fn refusal(error: SocketError) -> (Counter, Option<Reason>) {
    match error {
        SocketError::Refused | SocketError::Reset => (Counter::ConnectRefused, None),
        SocketError::NetworkUnreachable => (Counter::ConnectUnreachable, Some(Reason::NoRoute)),
        SocketError::HostUnreachable => (Counter::ConnectUnreachable, Some(Reason::NoHost)),
        SocketError::TimedOut => (Counter::ConnectTimedOut, Some(Reason::NoHost)),
        SocketError::Denied => (Counter::ConnectDenied, Some(Reason::Prohibited)),
        SocketError::NoDescriptor => (Counter::NoDescriptor, Some(Reason::NoHost)),
        SocketError::NoMemory => (Counter::NoMemory, Some(Reason::NoHost)),
        // Without a port left to connect from, the system has no address for it.
        SocketError::NoPort | SocketError::NoAddress => (Counter::NoPort, Some(Reason::NoHost)),
        SocketError::WouldBlock | SocketError::TooLong | SocketError::Other(_) => {
            (Counter::OtherError, Some(Reason::NoHost))
        }
    }
}
