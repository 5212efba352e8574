//! Errors that datagrams meet, as ICMP errors for the guest.

use core::net::{IpAddr, SocketAddr};

use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, IpProtocol, UdpPacket};

use crate::datagram::flow::{Flow, Key, OutletKey};
use crate::datagram::state::Datagrams;
use crate::icmp::Reason;
use crate::io::Io;
use crate::limits::ERRORS_AT_ONCE;
use crate::packet::Addresses;
use crate::policy::Protocol;
use crate::sockets::{DatagramError, SocketError, Sockets};
use crate::stats::Counter;
use crate::table::FlowId;

/// The most bytes of a datagram that an error quotes: what fits into an error over IPv6.
const QUOTED: usize = 1280 - 40 - 8 - 40 - 8;

impl<T> Datagrams<T> {
    /// Takes the errors of a socket, and tells the guest. Returns how many there were.
    pub(crate) fn take_errors<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        io: &mut Io<'_, S>,
    ) -> usize {
        let mut quoted = [0; QUOTED];
        for count in 0..ERRORS_AT_ONCE {
            let Some(outlet) = self.outlets.get_mut(id) else { return count };
            let Ok(Some(error)) = io.sockets.take_datagram_error(&outlet.socket, &mut quoted)
            else {
                return count;
            };
            let Some(flow) = self.flow_to(id, error.to, io) else { continue };
            let quoted = &quoted[..error.quoted];
            if flow.dns {
                let (key, mac, to) = (flow.key, flow.mac, flow.to);
                self.query_failed(&key, mac, (to.ip(), quoted), io);
            } else {
                pass(flow, &error, quoted, io);
            }
        }
        ERRORS_AT_ONCE
    }

    /// A call on the socket has failed because of an earlier datagram.
    pub(crate) fn take_error<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        error: SocketError,
        io: &mut Io<'_, S>,
    ) {
        if self.take_errors(id, io) > 0 {
            return;
        }
        // The system keeps no errors, or this one came in between. Only a connected socket's is known
        // to be about its flow.
        let Some(outlet) = self.outlets.get_mut(id) else { return };
        let OutletKey::Own(key) = outlet.key else { return };
        let Some(flow) = self.flows.find(&key).and_then(|id| self.flows.peek(id)) else { return };
        let (counter, reason) = refusal(error);
        io.count(key.port, counter);
        if flow.dns {
            let (mac, to) = (flow.mac, flow.to.ip());
            self.query_failed(&key, mac, (to, &[]), io);
        } else {
            tell(flow, key.remote.ip(), reason, &[], io);
        }
    }

    /// A query has met an error, which may quote it: the next one goes to another resolver. The guest gets
    /// an answer that says that it has failed, so that it need not wait before it asks again. It knows
    /// nothing of the resolver, which no ICMP error can be about.
    fn query_failed<S: Sockets<Socket = T>>(
        &mut self,
        key: &Key,
        mac: [u8; 6],
        (resolver, quoted): (IpAddr, &[u8]),
        io: &mut Io<'_, S>,
    ) {
        io.dns.failed(key.port, resolver, io.ports, io.now);
        match *quoted {
            [high, low, ..] => {
                // One that has been answered meanwhile is not told of.
                self.fail_query(key, mac, Some(u16::from_be_bytes([high, low])), io);
            }
            _ => self.fail_queries(key, mac, io),
        }
    }

    /// The flow of a socket that leads to a peer.
    fn flow_to<S: Sockets<Socket = T>>(
        &self,
        id: FlowId,
        to: SocketAddr,
        io: &Io<'_, S>,
    ) -> Option<&Flow> {
        let outlet = self.outlets.peek(id)?;
        let protocol = Protocol::Udp;
        let key = match outlet.key {
            OutletKey::Own(key) => key,
            OutletKey::Mapping(port, guest, _) => Key { port, protocol, guest, remote: to },
            OutletKey::Forward(_) => {
                let inbound = outlet.inbound.as_ref()?;
                let (port, _, address) = io.sources.resolve(inbound.guest, outlet.v4)?;
                let guest = SocketAddr::new(address, inbound.guest_port);
                Key { port, protocol, guest, remote: io.seen_source(to, address) }
            }
        };
        self.flows.peek(self.flows.find(&key)?)
    }
}

/// Passes an error on.
fn pass<S: Sockets>(flow: &Flow, error: &DatagramError, quoted: &[u8], io: &mut Io<'_, S>) {
    let (port, remote, guest) = (flow.key.port, flow.key.remote.ip(), flow.key.guest.ip());
    match io.passed(error, flow.to, remote, guest) {
        Some((from, reason)) => {
            io.count(port, Counter::ErrorsPassed);
            tell(flow, from, reason, quoted, io);
        }
        // The guest would send fragments from now on, which are dropped. The host knows the way's MTU,
        // and sends fragments itself.
        None => io.count(port, Counter::TooLong),
    }
}

/// Tells a guest of an error, about a packet that is written as the guest has sent it.
fn tell<S: Sockets>(flow: &Flow, from: IpAddr, reason: Reason, quoted: &[u8], io: &mut Io<'_, S>) {
    let Key { port, protocol, guest, remote } = flow.key;
    let addresses =
        Addresses { from_mac: [0; 6], to_mac: [0; 6], from: guest.ip(), to: remote.ip() };
    let headers = addresses.header_len();
    let mut frame = [0; 14 + 40 + 8 + QUOTED];
    let quoted = &quoted[..quoted.len().min(QUOTED)];
    let len = match protocol {
        // The quoted bytes begin with the header of ICMP.
        Protocol::IcmpEcho => headers + quoted.len().max(8),
        _ => headers + 8 + quoted.len(),
    };
    if protocol == Protocol::IcmpEcho {
        let kind = if guest.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
        let message = addresses.emit(kind, &mut frame[..len]);
        message[..quoted.len()].copy_from_slice(quoted);
        message[0] = if guest.is_ipv4() { 8 } else { 128 };
        message[4..6].copy_from_slice(&guest.port().to_be_bytes());
        match (guest.ip(), remote.ip()) {
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                Icmpv6Packet::new_unchecked(message).fill_checksum(&from, &to);
            }
            _ => Icmpv4Packet::new_unchecked(message).fill_checksum(),
        }
    } else {
        let datagram = addresses.emit(IpProtocol::Udp, &mut frame[..len]);
        datagram[8..].copy_from_slice(quoted);
        let mut udp = UdpPacket::new_unchecked(datagram);
        udp.set_src_port(guest.port());
        udp.set_dst_port(remote.port());
        udp.set_len(8 + quoted.len() as u16);
    }
    io.send_error_from(port, from, reason, flow.mac, &frame[14..len], guest.ip());
}

/// How a failure is counted, and what the guest is told.
pub(crate) fn refusal(error: SocketError) -> (Counter, Reason) {
    match error {
        SocketError::Refused | SocketError::Reset => (Counter::ConnectRefused, Reason::NoPort),
        SocketError::NetworkUnreachable => (Counter::ConnectUnreachable, Reason::NoRoute),
        SocketError::HostUnreachable => (Counter::ConnectUnreachable, Reason::NoHost),
        SocketError::TimedOut => (Counter::ConnectTimedOut, Reason::NoHost),
        SocketError::Denied => (Counter::ConnectDenied, Reason::Prohibited),
        SocketError::NoDescriptor => (Counter::NoDescriptor, Reason::NoHost),
        SocketError::NoMemory => (Counter::NoMemory, Reason::NoHost),
        SocketError::NoPort | SocketError::NoAddress => (Counter::NoPort, Reason::NoHost),
        SocketError::WouldBlock | SocketError::TooLong | SocketError::Other(_) => {
            (Counter::OtherError, Reason::NoHost)
        }
    }
}
