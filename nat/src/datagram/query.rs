//! Queries to the gateway's DNS over UDP, and their answers.
//!
//! A query goes through a flow to a resolver in place of the gateway. The flow moves when its next query
//! is for another resolver, and ends with its last answer, so that guests that ask from a new port each
//! time keep few sockets.

use core::net::SocketAddr;

use smoltcp::wire::{IpProtocol, UdpPacket};

use crate::datagram::error;
use crate::datagram::flow::{Flow, Key};
use crate::datagram::from_guest::Packet;
use crate::datagram::state::Datagrams;
use crate::dns::Asked;
use crate::icmp::Reason;
use crate::io::Io;
use crate::limits::{DNS_ANSWER_MAX, DNS_PORT, HEADROOM};
use crate::packet::Addresses;
use crate::policy::Protocol;
use crate::sockets::{Incoming, Sockets};
use crate::stats::Counter;
use crate::table::FlowId;

/// The bytes of the header of UDP.
const UDP_LEN: usize = 8;
/// The bytes of the longest frame with an answer.
const FRAME_MAX: usize = 14 + 40 + UDP_LEN + DNS_ANSWER_MAX;

impl<T> Datagrams<T> {
    /// Handles queries of one flow, in order.
    pub(crate) fn handle_queries<S: Sockets<Socket = T>>(
        &mut self,
        run: &[Option<&Packet<'_>>],
        io: &mut Io<'_, S>,
    ) {
        for packet in run.iter().copied().flatten() {
            let step = match usize::from(packet.segment) {
                0 => packet.payload.len().max(1),
                segment => segment,
            };
            let (port, mac) = (packet.key.port, packet.datagram.mac);
            if let Err(why) = io.sources.check(port, mac, packet.datagram.source, io.now) {
                let count = packet.payload.len().div_ceil(step).max(1);
                io.ports.count_n(port, why, count as u64);
                io.send_error_about(port, Reason::Prohibited, &packet.datagram);
                continue;
            }
            io.look_at_resolvers(port);
            if packet.payload.is_empty() {
                io.count(port, Counter::DnsMalformed);
            }
            for message in packet.payload.chunks(step) {
                self.handle_query(packet, message, io);
            }
        }
    }

    fn handle_query<S: Sockets<Socket = T>>(
        &mut self,
        packet: &Packet<'_>,
        message: &[u8],
        io: &mut Io<'_, S>,
    ) {
        let key = packet.key;
        let mut out = [0; DNS_ANSWER_MAX];
        // A resolver that fails at once is passed over, until each has been asked.
        for _ in 0..io.dns.list().len().max(1) {
            let asker = (key.port, key.guest);
            match io.dns.ask(asker, message, &mut out, io.ports, io.now) {
                Asked::Nothing => return,
                Asked::Answer(len) => {
                    return answer(&key, packet.datagram.mac, &out[..len], io);
                }
                Asked::Forward { to, is_new } => {
                    let opened = self.query_flow(packet, to, io);
                    if let Ok(id) = opened
                        && let Some(flow) = self.flows.get_mut(id)
                    {
                        flow.queries += u32::from(is_new);
                        io.count(key.port, Counter::DnsForwarded);
                        let packet = Packet { payload: message, segment: 0, ..*packet };
                        return self.send(id, &[Some(&packet)], io);
                    }
                    let (counter, is_resolvers) =
                        opened.err().unwrap_or((Counter::FlowLimit, false));
                    io.count(key.port, counter);
                    if !is_resolvers {
                        break;
                    }
                    io.dns.failed(key.port, to.ip(), io.ports, io.now);
                }
            }
        }
        self.fail_queries(&key, packet.datagram.mac, io);
    }

    /// Gives up all queries of a flow, which has ended or cannot be opened, and tells the guest of each.
    pub(crate) fn fail_queries<S: Sockets<Socket = T>>(
        &mut self,
        key: &Key,
        mac: [u8; 6],
        io: &mut Io<'_, S>,
    ) {
        while self.fail_query(key, mac, None, io) {}
    }

    /// Gives up a query, or without an identifier any of this flow, and tells the guest. Returns whether
    /// there was one.
    pub(crate) fn fail_query<S: Sockets<Socket = T>>(
        &mut self,
        key: &Key,
        mac: [u8; 6],
        id: Option<u16>,
        io: &mut Io<'_, S>,
    ) -> bool {
        let mut out = [0; DNS_ANSWER_MAX];
        let asker = (key.port, key.guest);
        let Some(len) = io.dns.give_up(asker, id, &mut out, io.ports) else { return false };
        answer(key, mac, &out[..len], io);
        self.query_ended(key, io);
        true
    }

    /// Tells guests of queries that no resolver has answered in time.
    pub(crate) fn fail_old_queries<S: Sockets<Socket = T>>(&mut self, io: &mut Io<'_, S>) {
        let mut out = [0; DNS_ANSWER_MAX];
        while let Some((port, guest, len)) = io.dns.expired(&mut out, io.ports, io.now) {
            let gateway = match guest {
                SocketAddr::V4(_) => io.config.gateway_v4.into(),
                SocketAddr::V6(_) => io.config.gateway_v6.into(),
            };
            let remote = SocketAddr::new(gateway, DNS_PORT);
            let key = Key { port, protocol: Protocol::Udp, guest, remote };
            // It may be another port's by now.
            if let Some((holder, mac)) = io.sources.find(guest.ip())
                && holder == port
            {
                answer(&key, mac, &out[..len], io);
            }
            self.query_ended(&key, io);
        }
    }

    /// One query of a flow waits no longer. The flow ends with its last one.
    fn query_ended<S: Sockets<Socket = T>>(&mut self, key: &Key, io: &mut Io<'_, S>) {
        let Some(id) = self.flows.find(key) else { return };
        let Some(flow) = self.flows.get_mut(id).filter(|flow| flow.dns) else { return };
        flow.queries = flow.queries.saturating_sub(1);
        if flow.queries == 0 {
            self.remove(id, io);
        }
    }

    /// The flow of a query to a resolver.
    ///
    /// # Errors
    ///
    /// Why there is none, and whether another resolver may have one.
    fn query_flow<S: Sockets<Socket = T>>(
        &mut self,
        packet: &Packet<'_>,
        to: SocketAddr,
        io: &mut Io<'_, S>,
    ) -> Result<FlowId, (Counter, bool)> {
        let key = packet.key;
        let mut queries = 0;
        if let Some(id) = self.flows.find(&key) {
            match self.flows.peek(id) {
                Some(flow) if flow.to == to => return Ok(id),
                // The answers to these may come no more.
                Some(flow) => queries = flow.queries,
                None => {}
            }
            self.remove(id, io);
        }
        let limit = |why| (why, false);
        io.ports.may_begin(key.port, io.now).map_err(limit)?;
        self.make_room(&key, None, io).map_err(limit)?;
        let outlet = self.outlet(&key, to, io).map_err(|error| (error::refusal(error).0, true))?;
        let mut flow = Flow::new(key, to, packet.datagram.mac, outlet, io.now);
        (flow.dns, flow.queries) = (true, queries);
        self.insert(flow, None, io).ok_or((Counter::FlowLimit, false))
    }

    /// Gives a guest what a resolver has sent, in one datagram or in several that the system has put
    /// together: what answers a query.
    pub(crate) fn deliver_answers<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        piece: &mut [u8],
        incoming: &Incoming,
        io: &mut Io<'_, S>,
    ) {
        let Some(flow) = self.flows.peek(id) else { return };
        let (key, from) = (flow.key, flow.to.ip());
        let step = match usize::from(incoming.segment) {
            0 => incoming.len.max(1),
            segment => segment,
        };
        for start in (0..incoming.len.max(1)).step_by(step) {
            let len = step.min(incoming.len - start);
            let message = &piece[HEADROOM + start..][..len];
            let asker = (key.port, key.guest);
            if let Err(why) = io.dns.answered(asker, from, message, io.ports, io.now) {
                io.count(key.port, why);
                continue;
            }
            io.count(key.port, Counter::DnsAnswered);
            if let Some(flow) = self.flows.get_mut(id) {
                flow.queries = flow.queries.saturating_sub(1);
            }
            let one = Incoming { len, segment: 0, ..*incoming };
            // The headers are where the message before was, which is sent.
            self.deliver(id, &mut piece[start..], &one, io);
        }
    }
}

/// Gives a guest an answer of the translator's own. One that its port does not take is lost, as on any
/// link.
fn answer<S: Sockets>(key: &Key, to_mac: [u8; 6], message: &[u8], io: &mut Io<'_, S>) {
    let addresses = Addresses {
        from_mac: io.config.gateway_mac,
        to_mac,
        from: key.remote.ip(),
        to: key.guest.ip(),
    };
    let mut frame = [0; FRAME_MAX];
    let len = addresses.header_len() + UDP_LEN + message.len();
    let udp = addresses.emit(IpProtocol::Udp, &mut frame[..len]);
    udp[UDP_LEN..].copy_from_slice(message);
    let mut udp = UdpPacket::new_unchecked(udp);
    udp.set_src_port(key.remote.port());
    udp.set_dst_port(key.guest.port());
    udp.set_len((UDP_LEN + message.len()) as u16);
    udp.fill_checksum(&addresses.from.into(), &addresses.to.into());
    let _ = io.send_plain(key.port, &mut frame, len);
}
