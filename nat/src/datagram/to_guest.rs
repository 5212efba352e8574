//! From the world to the guest: messages of sockets, as frames and fragments.
//!
//! A message is received behind space for its headers, and its frame is written around it. The frames of
//! a message that is several datagrams, or that is cut into fragments, are written one after the other:
//! the headers of each are where the frame before it ended, which has been sent.

use core::net::{IpAddr, SocketAddr};

use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, IpProtocol, Ipv4Packet, UdpPacket};
use vmring_core::offload::{Checksum, Gso, OffloadHeader};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::limits::MIN_FRAME_LEN;
use vmring_embedded::software;

use crate::datagram::flow::{Flow, Key, OutletKey};
use crate::datagram::state::Datagrams;
use crate::io::Io;
use crate::limits::{HEADROOM, MESSAGE_LEN, MESSAGES};
use crate::output::{Full, Link};
use crate::packet::Addresses;
use crate::policy::Protocol;
use crate::sockets::{Incoming, SocketError, Sockets};
use crate::stats::Counter;
use crate::table::FlowId;

/// The bytes of the header of UDP.
const UDP_LEN: usize = 8;
/// Where the checksum is in it.
const CHECKSUM_AT: u16 = 6;
/// The bytes of the Fragment header of IPv6 (RFC 8200, 4.5).
const FRAGMENT_LEN: usize = 8;

/// Where a flow's frames go, and with which headers.
struct Way {
    key: Key,
    addresses: Addresses,
    link: Link,
}

impl<T> Datagrams<T> {
    /// Receives up to `most` messages of a socket, and gives them to their guests. Returns whether there
    /// may be more.
    pub(crate) fn receive<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        most: usize,
        io: &mut Io<'_, S>,
    ) -> Result<bool, SocketError> {
        let Some(outlet) = self.outlets.peek(id) else { return Err(SocketError::WouldBlock) };
        let mut found = [Incoming::NONE; MESSAGES];
        let found = &mut found[..most.min(MESSAGES)];
        let into = &mut self.buffer[HEADROOM..];
        let got = io.sockets.receive_datagrams(&outlet.socket, into, MESSAGE_LEN, found)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut asking = None;
        for (index, incoming) in found[..got].iter().enumerate() {
            let at = index * MESSAGE_LEN;
            // The next one's headers begin where this one's space ends.
            let piece = &mut buffer[at..at + HEADROOM + MESSAGE_LEN];
            match self.flow_of(id, incoming, io) {
                Ok(flow) if self.flows.peek(flow).is_some_and(|flow| flow.dns) => {
                    self.deliver_answers(flow, piece, incoming, io);
                    asking = Some(flow);
                }
                Ok(flow) => self.deliver(flow, piece, incoming, io),
                Err(refused) => {
                    let count = incoming.datagrams();
                    match refused {
                        Some((key, why)) => io.ports.count_n(key.port, why, count),
                        None => io.ports.counters.add(Counter::NoGuest, count),
                    }
                    self.count_refused(id, count);
                }
            }
        }
        self.buffer = buffer;
        if let Some(id) = asking
            && self.flows.peek(id).is_some_and(|flow| flow.queries == 0)
        {
            // All that it has asked is answered.
            self.remove(id, io);
        }
        Ok(got == found.len())
    }

    /// Counts datagrams that a port forward has not let in, if the socket is one's.
    fn count_refused(&mut self, id: FlowId, count: u64) {
        let outlet = self.outlets.get_mut(id);
        if let Some(inbound) = outlet.and_then(|outlet| outlet.inbound.as_mut()) {
            inbound.refused += count;
        }
    }

    /// The flow of a message. A port forward's may be new.
    ///
    /// # Errors
    ///
    /// Why there is none, or `None` if there is no guest.
    fn flow_of<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        incoming: &Incoming,
        io: &mut Io<'_, S>,
    ) -> Result<FlowId, Option<(Key, Counter)>> {
        let Some(outlet) = self.outlets.peek(id) else { return Err(None) };
        let (key, from) = match outlet.key {
            OutletKey::Own(key) => (key, incoming.from),
            OutletKey::Mapping(port, guest, _) => {
                let remote = incoming.from;
                (Key { port, protocol: Protocol::Udp, guest, remote }, incoming.from)
            }
            OutletKey::Forward(_) => {
                let Some(inbound) = &outlet.inbound else { return Err(None) };
                let found = io.sources.resolve(inbound.guest, outlet.v4);
                let Some((port, mac, address)) = found else { return Err(None) };
                let guest = SocketAddr::new(address, inbound.guest_port);
                let remote = io.seen_source(incoming.from, guest.ip());
                let key = Key { port, protocol: Protocol::Udp, guest, remote };
                if self.flows.find(&key).is_none() {
                    self.make_room(&key, Some(id), io).map_err(|why| Some((key, why)))?;
                    let mut flow = Flow::new(key, incoming.from, mac, id, io.now);
                    (flow.inbound, flow.from) = (true, incoming.to);
                    self.insert(flow, Some(id), io);
                    if let Some(inbound) =
                        self.outlets.get_mut(id).and_then(|outlet| outlet.inbound.as_mut())
                    {
                        inbound.accepted += 1;
                    }
                }
                (key, incoming.from)
            }
        };
        let refused = Err(Some((key, Counter::NotAsked)));
        let Some(found) = self.flows.find(&key) else { return refused };
        let Some(flow) = self.flows.get_mut(found) else { return refused };
        let asked = match key.protocol {
            Protocol::IcmpEcho => flow.to.ip() == from.ip(),
            _ => flow.to == from,
        };
        if !asked {
            return refused;
        }
        flow.used(false, io.now);
        Ok(found)
    }

    /// Gives a guest a message, which is in `piece` behind [`HEADROOM`] bytes.
    pub(crate) fn deliver<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        piece: &mut [u8],
        incoming: &Incoming,
        io: &mut Io<'_, S>,
    ) {
        let Some(flow) = self.flows.peek(id) else { return };
        let key = flow.key;
        let way = Way {
            key,
            addresses: Addresses {
                from_mac: io.config.gateway_mac,
                to_mac: flow.mac,
                from: key.remote.ip(),
                to: key.guest.ip(),
            },
            link: io.out.link(key.port),
        };
        let end = HEADROOM + incoming.len;
        if key.protocol == Protocol::IcmpEcho {
            let start = HEADROOM + way.skip_ip_header(&piece[HEADROOM..end]);
            let sent = way.send_echo(piece, start, end, &mut self.fragment_id, io);
            match sent {
                Ok(true) => self.delivered(id, Counter::EchoReceived, end - start, 1, io),
                Ok(false) => io.count(key.port, Counter::IcmpType),
                Err(Full) => self.refused(id, 1, io),
            }
            return;
        }
        let segment = usize::from(incoming.segment);
        if segment > 0 && incoming.len > segment && way.takes(segment, incoming.len) {
            let count = incoming.datagrams();
            return match way.send_udp(piece, HEADROOM, end, incoming.segment, &mut 0, io) {
                Ok(()) => self.delivered(id, Counter::UdpReceived, incoming.len, count, io),
                Err(Full) => self.refused(id, count, io),
            };
        }
        let step = if segment > 0 { segment } else { incoming.len.max(1) };
        let mut start = HEADROOM;
        loop {
            let next = (start + step).min(end);
            match way.send_udp(piece, start, next, 0, &mut self.fragment_id, io) {
                Ok(()) => self.delivered(id, Counter::UdpReceived, next - start, 1, io),
                Err(Full) => self.refused(id, 1, io),
            }
            start = next;
            if start == end {
                return;
            }
        }
    }

    /// Counts datagrams that a guest's port has taken.
    fn delivered<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        counter: Counter,
        len: usize,
        count: u64,
        io: &mut Io<'_, S>,
    ) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.carried.bytes_received += len as u64;
        flow.carried.datagrams_received += count;
        io.ports.count_n(flow.key.port, counter, count);
    }

    /// Counts datagrams that a guest's port has not taken.
    fn refused<S: Sockets<Socket = T>>(&mut self, id: FlowId, count: u64, io: &mut Io<'_, S>) {
        let Some(flow) = self.flows.peek(id) else { return };
        io.ports.count_n(flow.key.port, Counter::DatagramRefused, count);
        self.count_refused(flow.outlet, count);
    }
}

impl Way {
    /// Whether the guest takes datagrams of this size in one frame.
    fn takes(&self, segment: usize, len: usize) -> bool {
        let offloads = &self.link.offloads;
        let ip = self.addresses.header_len() - ETHERNET_HEADER_LEN;
        offloads.uso
            && offloads.checksum
            && offloads.virtio_header
            && ip + UDP_LEN + segment <= self.link.mtu as usize
            && ip + UDP_LEN + len <= usize::from(u16::MAX)
            && self.addresses.header_len() + UDP_LEN + len <= self.link.longest
            // A frame to be cut cannot be padded.
            && self.addresses.header_len() + UDP_LEN + len >= MIN_FRAME_LEN
    }

    /// The bytes in front of a reply: macOS gives the IP header too, which no reply looks like, because
    /// its first byte is its type, 0.
    fn skip_ip_header(&self, message: &[u8]) -> usize {
        match message {
            [first, ..] if self.addresses.to.is_ipv4() && first >> 4 == 4 => {
                (usize::from(first & 0xf) * 4).min(message.len())
            }
            _ => 0,
        }
    }

    /// Sends an echo reply, with the identifier that the guest has chosen. Returns whether it is one.
    fn send_echo<S: Sockets>(
        &self,
        piece: &mut [u8],
        start: usize,
        end: usize,
        fragment_id: &mut u32,
        io: &mut Io<'_, S>,
    ) -> Result<bool, Full> {
        let message = &mut piece[start..end];
        let reply = if self.addresses.to.is_ipv4() { 0 } else { 129 };
        if message.len() < 8 || message[0] != reply || message[1] != 0 {
            return Ok(false);
        }
        message[4..6].copy_from_slice(&self.key.guest.port().to_be_bytes());
        let protocol = match (self.addresses.from, self.addresses.to) {
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                Icmpv6Packet::new_unchecked(message).fill_checksum(&from, &to);
                IpProtocol::Icmpv6
            }
            _ => {
                Icmpv4Packet::new_unchecked(message).fill_checksum();
                IpProtocol::Icmp
            }
        };
        self.send_ip(protocol, piece, start, end, &OffloadHeader::NONE, fragment_id, io)?;
        Ok(true)
    }

    /// Sends what is from `start` to `end` as one datagram, or as several of `segment` bytes that the
    /// guest takes in one frame.
    fn send_udp<S: Sockets>(
        &self,
        piece: &mut [u8],
        start: usize,
        end: usize,
        segment: u16,
        fragment_id: &mut u32,
        io: &mut Io<'_, S>,
    ) -> Result<(), Full> {
        let udp = &mut piece[start - UDP_LEN..end];
        let len = udp.len();
        udp[..UDP_LEN].fill(0);
        let mut packet = UdpPacket::new_unchecked(&mut *udp);
        packet.set_src_port(self.key.remote.port());
        packet.set_dst_port(self.key.guest.port());
        packet.set_len(len as u16);
        packet.set_checksum(self.addresses.pseudo_sum(IpProtocol::Udp, len));
        let header_len = self.addresses.header_len();
        let mut offload = OffloadHeader {
            checksum: Checksum::Partial { start: header_len as u16, offset: CHECKSUM_AT },
            ..OffloadHeader::NONE
        };
        if segment > 0 {
            offload.gso = Gso::UdpL4;
            offload.segment_size = segment;
            offload.header_len = (header_len + UDP_LEN) as u16;
        }
        self.send_ip(IpProtocol::Udp, piece, start - UDP_LEN, end, &offload, fragment_id, io)
    }

    /// Sends what is from `start` to `end` in an IP packet, or in fragments if it is too long for one.
    #[allow(clippy::too_many_arguments)]
    fn send_ip<S: Sockets>(
        &self,
        protocol: IpProtocol,
        piece: &mut [u8],
        start: usize,
        end: usize,
        offload: &OffloadHeader,
        fragment_id: &mut u32,
        io: &mut Io<'_, S>,
    ) -> Result<(), Full> {
        let header_len = self.addresses.header_len();
        let frame = &mut piece[start - header_len..end];
        self.addresses.emit(protocol, frame);
        let len = frame.len();
        let too_long = len - ETHERNET_HEADER_LEN > self.link.mtu as usize;
        let fragmented = too_long && offload.gso == Gso::None;
        let offloads = &self.link.offloads;
        let leaves_checksum = offloads.checksum && offloads.virtio_header;
        let mut offload = *offload;
        // The first fragment has the checksum of all, and padding is not summed.
        if fragmented || !leaves_checksum || len < MIN_FRAME_LEN {
            offload = software::complete_checksum(&offload, frame)
                .expect("the header describes the frame");
        }
        if !fragmented {
            return self.send(frame, &offload, io);
        }
        *fragment_id = fragment_id.wrapping_add(1);
        io.count(self.key.port, Counter::Fragmented);
        let v4 = self.addresses.to.is_ipv4();
        let extra = if v4 { 0 } else { FRAGMENT_LEN };
        let most = self.link.mtu as usize - (header_len - ETHERNET_HEADER_LEN) - extra;
        // The offset counts units of 8 bytes (RFC 791, 3.1; RFC 8200, 4.5).
        let most = most / 8 * 8;
        let mut at = start;
        while at < end {
            let next = (at + most).min(end);
            let (offset, more) = (at - start, next < end);
            let frame = &mut piece[at - extra - header_len..next];
            if v4 {
                self.addresses.emit(protocol, frame);
                let mut ip = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_HEADER_LEN..]);
                ip.set_ident(*fragment_id as u16);
                ip.set_dont_frag(false);
                ip.set_more_frags(more);
                ip.set_frag_offset(offset as u16);
                ip.fill_checksum();
            } else {
                let payload = self.addresses.emit(IpProtocol::Ipv6Frag, frame);
                payload[..2].copy_from_slice(&[protocol.into(), 0]);
                payload[2..4].copy_from_slice(&(offset as u16 | u16::from(more)).to_be_bytes());
                payload[4..8].copy_from_slice(&fragment_id.to_be_bytes());
            }
            // Without one of its fragments, the guest drops the packet.
            self.send(frame, &OffloadHeader::NONE, io)?;
            at = next;
        }
        Ok(())
    }

    /// Gives the port a frame. What is behind a short one stays as it is.
    fn send<S: Sockets>(
        &self,
        frame: &[u8],
        offload: &OffloadHeader,
        io: &mut Io<'_, S>,
    ) -> Result<(), Full> {
        if frame.len() >= MIN_FRAME_LEN {
            return io.send(self.key.port, frame, offload);
        }
        let mut padded = [0; MIN_FRAME_LEN];
        padded[..frame.len()].copy_from_slice(frame);
        io.send(self.key.port, &padded, offload)
    }
}
