//! From the guest to the world: packets, and how they are sent together.
//!
//! What one flow sends in a batch goes out in few calls: datagrams of equal size in one piece, where the
//! system can (`UDP_SEGMENT`), and what is left in one call (sendmmsg(2)).

use core::net::SocketAddr;
use std::io::IoSlice;

use vmring_core::offload::{Gso, OffloadHeader};

use crate::datagram::error;
use crate::datagram::flow::{Key, OutletKey};
use crate::datagram::state::Datagrams;
use crate::io::Io;
use crate::limits::{BATCH, GUEST_SEGMENTS, MESSAGES};
use crate::output::Port;
use crate::packet::{Datagram, HOP_LIMIT};
use crate::policy::{Protocol, is_source};
use crate::sockets::{Outgoing, Route, SocketError, Sockets};
use crate::stats::Counter;
use crate::table::FlowId;

/// The bytes of a header of UDP or of ICMP echo.
const HEADER_LEN: usize = 8;
/// The most bytes of datagrams that are sent in one piece. With the headers of one, the kernel takes
/// 65,535.
const PIECE_MAX: usize = 65_000;

/// A packet of a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet<'f> {
    pub(crate) key: Key,
    /// The packet that it is in.
    pub(crate) datagram: Datagram<'f>,
    /// What the socket is given.
    pub(crate) payload: &'f [u8],
    /// The bytes of each datagram of `payload`, of which the last may have fewer. 0 if it is one.
    pub(crate) segment: u16,
}

impl Packet<'_> {
    /// How many datagrams it is.
    fn count(&self) -> u64 {
        match usize::from(self.segment) {
            0 => 1,
            segment => self.payload.len().div_ceil(segment) as u64,
        }
    }
}

/// The packets of one batch.
pub(crate) struct Packets<'f> {
    pub(crate) packets: [Option<Packet<'f>>; BATCH],
    pub(crate) len: usize,
}

impl<'f> Packets<'f> {
    pub(crate) fn new() -> Self {
        Self { packets: [None; BATCH], len: 0 }
    }

    /// Adds a datagram of UDP. There are at most [`BATCH`]. Its checksum is not verified: between a guest
    /// and this process there is no wire.
    ///
    /// # Errors
    ///
    /// Why the packet is no datagram.
    pub(crate) fn add_udp(
        &mut self,
        port: Port,
        datagram: Datagram<'f>,
        header: &OffloadHeader,
    ) -> Result<(), Counter> {
        let Some((head, payload)) = datagram.payload.split_at_checked(HEADER_LEN) else {
            return Err(Counter::Malformed);
        };
        let field = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let (from, to, len) = (field(0), field(2), usize::from(field(4)));
        if from == 0 || to == 0 {
            return Err(Counter::Malformed);
        }
        let (payload, segment) = if header.gso == Gso::UdpL4 {
            let segment = usize::from(header.segment_size);
            if segment == 0 || payload.len() > segment * GUEST_SEGMENTS {
                return Err(Counter::Malformed);
            }
            (payload, if payload.len() > segment { header.segment_size } else { 0 })
        } else {
            let len = len.checked_sub(HEADER_LEN).ok_or(Counter::Malformed)?;
            (payload.get(..len).ok_or(Counter::Malformed)?, 0)
        };
        let key = Key {
            port,
            protocol: Protocol::Udp,
            guest: SocketAddr::new(datagram.source, from),
            remote: SocketAddr::new(datagram.destination, to),
        };
        self.add(Packet { key, datagram, payload, segment })
    }

    /// Adds a message of ICMP, if it is an echo request.
    ///
    /// # Errors
    ///
    /// Why it is none.
    pub(crate) fn add_echo(&mut self, port: Port, datagram: Datagram<'f>) -> Result<(), Counter> {
        let request = if datagram.source.is_ipv4() { 8 } else { 128 };
        let id = match *datagram.payload {
            [kind, 0, _, _, high, low, _, _, ..] if kind == request => {
                u16::from_be_bytes([high, low])
            }
            [_, _, _, _, _, _, _, _, ..] => return Err(Counter::IcmpType),
            _ => return Err(Counter::Malformed),
        };
        let key = Key {
            port,
            protocol: Protocol::IcmpEcho,
            guest: SocketAddr::new(datagram.source, id),
            remote: SocketAddr::new(datagram.destination, 0),
        };
        self.add(Packet { key, datagram, payload: datagram.payload, segment: 0 })
    }

    fn add(&mut self, packet: Packet<'f>) -> Result<(), Counter> {
        if !is_source(packet.datagram.source) {
            return Err(Counter::BadSource);
        }
        self.packets[self.len] = Some(packet);
        self.len += 1;
        Ok(())
    }
}

/// What is to be sent in one call.
struct Calls<'f> {
    slices: [IoSlice<'f>; BATCH],
    slice_count: usize,
    /// For each message, its first slice, how many it has, and the bytes of each datagram.
    messages: [(usize, usize, u16); MESSAGES],
    count: usize,
}

impl<'f> Calls<'f> {
    fn new() -> Self {
        Self {
            slices: [IoSlice::new(&[]); BATCH],
            slice_count: 0,
            messages: [(0, 0, 0); MESSAGES],
            count: 0,
        }
    }

    fn is_full(&self) -> bool {
        self.count == MESSAGES || self.slice_count == BATCH
    }

    /// Adds a message of one slice.
    fn push(&mut self, bytes: &'f [u8], segment: u16) {
        self.slices[self.slice_count] = IoSlice::new(bytes);
        self.messages[self.count] = (self.slice_count, 1, segment);
        self.slice_count += 1;
        self.count += 1;
    }

    /// Adds a datagram to the last message, if the system then sends both.
    fn join(&mut self, bytes: &'f [u8], most: usize) -> bool {
        let Some(index) = self.count.checked_sub(1) else { return false };
        let (first, count, segment) = self.messages[index];
        let len = self.slices[first].len();
        let last = self.slices[first + count - 1].len();
        let is_one = count > 1 || segment == 0;
        let fits = count < most && (count + 1) * len <= PIECE_MAX && self.slice_count < BATCH;
        if !is_one || !fits || last != len || bytes.is_empty() || bytes.len() > len {
            return false;
        }
        self.slices[self.slice_count] = IoSlice::new(bytes);
        self.slice_count += 1;
        self.messages[index] = (first, count + 1, len as u16);
        true
    }
}

impl<T> Datagrams<T> {
    /// Sends packets of one flow, in order.
    pub(crate) fn send<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        mut run: &[Option<&Packet<'_>>],
        io: &mut Io<'_, S>,
    ) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.used(true, io.now);
        let (outlet, dns) = (flow.outlet, flow.dns);
        // This is one hop of the way. The way to the gateway ends here, and another begins.
        let fields = |packet: &Packet<'_>| {
            let left = packet.datagram.hop_limit.saturating_sub(1).max(1);
            (if dns { HOP_LIMIT } else { left }, packet.datagram.dscp)
        };
        while let Some(first) = run.first().copied().flatten() {
            let wanted = fields(first);
            let alike = |other: &&Option<&Packet<'_>>| other.is_some_and(|p| fields(p) == wanted);
            let (now, later) = run.split_at(run.iter().take_while(alike).count());
            run = later;
            let Some(outlet) = self.outlets.get_mut(outlet) else { return };
            if outlet.ip_fields != Some(wanted) {
                io.sockets.set_ip_fields(&outlet.socket, outlet.v4, wanted.0, wanted.1);
                outlet.ip_fields = Some(wanted);
            }
            self.send_alike(id, now, io);
        }
    }

    /// Sends packets of one flow whose IP fields are the socket's.
    fn send_alike<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        run: &[Option<&Packet<'_>>],
        io: &mut Io<'_, S>,
    ) {
        let mut calls = Calls::new();
        for packet in run.iter().flatten() {
            let most = self.most_segments(id, packet.key.protocol);
            if packet.segment == 0 {
                if most > 1 && calls.join(packet.payload, most) {
                    continue;
                }
                if calls.is_full() {
                    self.transmit(id, &mut calls, io);
                }
                calls.push(packet.payload, 0);
                continue;
            }
            let segment = usize::from(packet.segment);
            let datagrams = most.min(PIECE_MAX / segment).max(1);
            for piece in packet.payload.chunks(segment * datagrams) {
                if calls.is_full() {
                    self.transmit(id, &mut calls, io);
                }
                calls.push(piece, if piece.len() > segment { packet.segment } else { 0 });
            }
            debug_assert!(packet.count() <= GUEST_SEGMENTS as u64);
        }
        self.transmit(id, &mut calls, io);
    }

    /// How many datagrams the flow's socket takes in one piece.
    fn most_segments(&self, id: FlowId, protocol: Protocol) -> usize {
        let outlet = self.flows.peek(id).and_then(|flow| self.outlets.peek(flow.outlet));
        match outlet {
            Some(outlet) if protocol == Protocol::Udp && !outlet.no_segments => {
                self.capabilities.udp_segments.max(1)
            }
            _ => 1,
        }
    }

    /// Counts datagrams that the flow's socket has taken.
    fn sent<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        counter: Counter,
        len: usize,
        count: u64,
        io: &mut Io<'_, S>,
    ) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.carried.bytes_sent += len as u64;
        flow.carried.datagrams_sent += count;
        io.ports.count_n(flow.key.port, counter, count);
    }

    /// Makes the calls, and empties the list.
    fn transmit<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        calls: &mut Calls<'_>,
        io: &mut Io<'_, S>,
    ) {
        let calls = std::mem::replace(calls, Calls::new());
        let mut batch = [Outgoing { parts: &[], segment: 0 }; MESSAGES];
        for (outgoing, &(first, count, segment)) in batch.iter_mut().zip(&calls.messages) {
            let parts = &calls.slices[first..first + count];
            *outgoing = Outgoing { parts, segment };
        }
        let mut rest = &batch[..calls.count];
        // An error may be about an earlier datagram. Then the call is made again, once.
        let mut again = true;
        while let Some(&first) = rest.first() {
            let Some(flow) = self.flows.peek(id) else { return };
            let (port, outlet_id) = (flow.key.port, flow.outlet);
            let (sent, lost) = match flow.key.protocol {
                Protocol::IcmpEcho => (Counter::EchoSent, Counter::DatagramLost),
                _ => (Counter::UdpSent, Counter::DatagramLost),
            };
            let Some(outlet) = self.outlets.get_mut(outlet_id) else { return };
            let route = match outlet.key {
                OutletKey::Own(_) => None,
                _ => Some(Route { to: flow.to, from: flow.from }),
            };
            match io.sockets.send_datagrams(&outlet.socket, route, rest) {
                Ok(n) => {
                    let (taken, later) = rest.split_at(n.clamp(1, rest.len()));
                    let count = taken.iter().map(datagrams).sum();
                    let bytes = taken.iter().map(bytes).sum();
                    self.sent(id, sent, bytes, count, io);
                    rest = later;
                    again = true;
                }
                Err(SocketError::WouldBlock | SocketError::NoMemory) => {
                    io.ports.count_n(port, lost, rest.iter().map(datagrams).sum());
                    return;
                }
                // A segment that is longer than the way's MTU, or an interface that cannot.
                Err(SocketError::TooLong | SocketError::Other(libc::EINVAL | libc::EIO))
                    if first.segment > 0 =>
                {
                    outlet.no_segments = true;
                    io.count(port, Counter::SegmentsRefused);
                    let mut count = 0;
                    for part in first.parts {
                        for datagram in part.chunks(first.segment.into()) {
                            let parts = &[IoSlice::new(datagram)];
                            let outgoing = Outgoing { parts, segment: 0 };
                            let Some(outlet) = self.outlets.get_mut(outlet_id) else { return };
                            let result =
                                io.sockets.send_datagrams(&outlet.socket, route, &[outgoing]);
                            match result {
                                Ok(_) => self.sent(id, sent, datagram.len(), 1, io),
                                Err(_) => io.count(port, lost),
                            }
                            count += 1;
                        }
                    }
                    debug_assert_eq!(count, datagrams(&first));
                    rest = &rest[1..];
                }
                Err(SocketError::TooLong) => {
                    io.count(port, Counter::TooLong);
                    rest = &rest[1..];
                }
                Err(error) if again => {
                    again = false;
                    self.take_error(outlet_id, error, io);
                }
                Err(error) => {
                    io.count(port, error::refusal(error).0);
                    io.ports.count_n(port, lost, datagrams(&first));
                    rest = &rest[1..];
                    again = true;
                }
            }
        }
    }
}

/// How many bytes a message has.
fn bytes(outgoing: &Outgoing<'_>) -> usize {
    outgoing.parts.iter().map(|part| part.len()).sum()
}

/// How many datagrams a message is.
fn datagrams(outgoing: &Outgoing<'_>) -> u64 {
    match usize::from(outgoing.segment) {
        0 => 1,
        segment => bytes(outgoing).div_ceil(segment) as u64,
    }
}
