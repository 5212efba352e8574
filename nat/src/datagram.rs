//! Datagrams: UDP and ICMP echo.
//!
//! | file | what it holds |
//! |---|---|
//! | `state.rs` | the tables of both, and who makes way for whom |
//! | `flow.rs` | flows, and the sockets that they share or have alone |
//! | `from_guest.rs` | packets of the guest, and how they are sent together |
//! | `to_guest.rs` | messages for the guest, as frames and fragments |
//! | `error.rs` | errors that datagrams meet, as ICMP errors for the guest |
//! | `query.rs` | queries to the gateway's DNS, and their answers |
//!
//! A flow is what a guest sends from an address and port to another, and what comes back. It is open
//! as long as it is used. A socket is a flow's own, connected to its peer, so that the kernel sorts out
//! what others send and tells the flow's errors; or it is shared by the flows of a guest's port
//! ([`NatConfig::endpoint_independent`](crate::NatConfig::endpoint_independent)) or by those of a port
//! forward. A shared socket is not connected. So no datagram comes between bind and connect that would
//! belong to nobody, and flows cost no descriptor.
//!
//! Here are the batch, how a flow is opened, and the sockets that wait for a port, a time or their turn.

mod error;
mod flow;
mod from_guest;
mod query;
mod state;
mod to_guest;

use core::net::{IpAddr, SocketAddr};

use crate::icmp::Reason;
use crate::io::Io;
use crate::limits::{
    BATCH, DATAGRAM_CHARGE, GUEST_LOOK, KEPT_PORT_MIN, MESSAGES, REFUSED_LOOK, SMALL_SOCKET_BUFFER,
    TURNS,
};
use crate::output::Port;
use crate::policy::Protocol;
use crate::sockets::{Kind, Readiness, SocketError, Sockets, Token};
use crate::stats::{Carried, Counter};
use crate::table::FlowId;

pub(crate) use flow::Inbound;
pub(crate) use from_guest::Packets;
pub(crate) use state::Datagrams;

use flow::{Flow, Key, Outlet, OutletKey};
use from_guest::Packet;

/// What can be known about a flow of datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DatagramFlow {
    /// The guest's port on the network.
    pub port: Port,
    /// UDP or ICMP echo.
    pub protocol: Protocol,
    /// The guest's address. Echo has its identifier for a port.
    pub guest: SocketAddr,
    /// The peer's address, as the guest sees it.
    pub remote: SocketAddr,
    /// The peer's address, as the host sees it.
    pub to: SocketAddr,
    /// Whether both sides have sent for a while.
    pub stream: bool,
    /// What has gone through it. Echo's messages count with the header of ICMP.
    pub carried: Carried,
}

impl<T> Datagrams<T> {
    /// What is known about each flow.
    pub(crate) fn infos(&self) -> impl Iterator<Item = DatagramFlow> + '_ {
        self.flows.iter().map(|flow| DatagramFlow {
            port: flow.key.port,
            protocol: flow.key.protocol,
            guest: flow.key.guest,
            remote: flow.key.remote,
            to: flow.to,
            stream: flow.stream,
            carried: flow.carried,
        })
    }

    /// Handles a batch.
    pub(crate) fn handle<S: Sockets<Socket = T>>(
        &mut self,
        packets: &Packets<'_>,
        io: &mut Io<'_, S>,
    ) {
        let packets = &packets.packets[..packets.len];
        let mut done = 0u64;
        for (first, packet) in packets.iter().enumerate() {
            let Some(packet) = packet.as_ref().filter(|_| done & 1 << first == 0) else { continue };
            // The packets of one flow, in order.
            let mut run: [Option<&Packet<'_>>; BATCH] = [None; BATCH];
            let mut len = 0;
            for (index, other) in packets.iter().enumerate().skip(first) {
                if let Some(other) = other.as_ref().filter(|other| other.key == packet.key) {
                    done |= 1 << index;
                    run[len] = Some(other);
                    len += 1;
                }
            }
            if packet.key.protocol == Protocol::Udp && io.config.is_dns(packet.key.remote) {
                self.handle_queries(&run[..len], io);
                continue;
            }
            let found = self.flows.find(&packet.key);
            match found.map_or_else(|| self.open(packet, io), Ok) {
                Ok(id) => self.send(id, &run[..len], io),
                // The guest is told once.
                Err(why) => io.ports.count_n(packet.key.port, why, len as u64),
            }
        }
    }

    /// Opens a flow for a guest's packet, if everybody agrees. If not, tells the guest.
    ///
    /// # Errors
    ///
    /// Why not.
    fn open<S: Sockets<Socket = T>>(
        &mut self,
        packet: &Packet<'_>,
        io: &mut Io<'_, S>,
    ) -> Result<FlowId, Counter> {
        let (key, mac) = (packet.key, packet.datagram.mac);
        let source = match key.protocol {
            Protocol::IcmpEcho => SocketAddr::new(key.guest.ip(), 0),
            _ => key.guest,
        };
        let decided = io.decide((key.port, mac), key.protocol, source, key.remote);
        if decided.is_err() {
            io.send_error_about(key.port, Reason::Prohibited, &packet.datagram);
        }
        let to = decided?;
        if key.protocol == Protocol::IcmpEcho {
            let capabilities = &self.capabilities;
            let may = if to.is_ipv4() { capabilities.echo_v4 } else { capabilities.echo_v6 };
            if !may {
                io.send_error_about(key.port, Reason::Prohibited, &packet.datagram);
                return Err(Counter::EchoForbidden);
            }
        }
        io.ports.may_begin(key.port, io.now)?;
        self.make_room(&key, None, io)?;
        let outlet = self.outlet(&key, to, io).map_err(|error| {
            let (why, reason) = error::refusal(error);
            io.send_error_about(key.port, reason, &packet.datagram);
            why
        })?;
        let flow = Flow::new(key, to, mac, outlet, io.now);
        self.insert(flow, None, io).ok_or(Counter::FlowLimit)
    }

    /// The socket of a new flow.
    fn outlet<S: Sockets<Socket = T>>(
        &mut self,
        key: &Key,
        to: SocketAddr,
        io: &mut Io<'_, S>,
    ) -> Result<FlowId, SocketError> {
        // What leads elsewhere than the guest thinks has a socket of its own, so that answers to a shared
        // one are found by their sender.
        let shared = io.config.endpoint_independent
            && key.protocol != Protocol::IcmpEcho
            && to == key.remote;
        let outlet_key = if shared {
            OutletKey::Mapping(key.port, key.guest, to.is_ipv4())
        } else {
            OutletKey::Own(*key)
        };
        if let Some(id) = self.outlets.find(&outlet_key) {
            return Ok(id);
        }
        let token = Token::new(Kind::Datagrams, self.outlets.next_id());
        // The guest's port, so that peers that look at it are content. One that somebody has is not
        // shared with him.
        // A resolver has no use for it, and the system's choice is harder to guess.
        let kept = key.guest.port();
        let ports = [kept, 0];
        // A socket of another flow may have it. Then an attempt is a socket opened in vain, for each of the
        // flows from one port of a guest to many peers.
        let is_free = !self.kept_ports.contains(&(to.is_ipv4(), kept));
        let is_kept = is_free && kept >= KEPT_PORT_MIN && !io.config.is_dns(key.remote);
        let ports = if is_kept { &ports[..] } else { &ports[1..] };
        let (mut result, mut kept_port) = (Err(SocketError::NoPort), None);
        for &port in ports {
            result = if key.protocol == Protocol::IcmpEcho {
                io.sockets.connect_echo(to.ip(), token)
            } else if shared {
                let any: IpAddr = match to {
                    SocketAddr::V4(_) => core::net::Ipv4Addr::UNSPECIFIED.into(),
                    SocketAddr::V6(_) => core::net::Ipv6Addr::UNSPECIFIED.into(),
                };
                io.sockets.bind_udp(SocketAddr::new(any, port), token)
            } else {
                io.sockets.connect_udp(port, to, token)
            };
            if !matches!(result, Err(SocketError::NoPort | SocketError::NoAddress)) {
                kept_port = (port != 0 && key.protocol != Protocol::IcmpEcho).then_some(port);
                break;
            }
        }
        let socket = result?;
        // TCP's sockets are counted as they are, and the others by what each may have.
        let kernel = io.ports.tcp_kernel + io.ports.other_descriptors as u64 * DATAGRAM_CHARGE;
        let own = io.ports.get(key.port).sockets as u64 * DATAGRAM_CHARGE;
        let limits = &io.config.limits;
        if kernel > limits.kernel_memory || own > limits.port.kernel_memory {
            io.count(key.port, Counter::SmallBuffers);
            io.sockets.set_datagram_buffers(&socket, SMALL_SOCKET_BUFFER);
        }
        let mut outlet = Outlet::new(outlet_key, socket, key.port, to.is_ipv4());
        outlet.kept_port = kept_port;
        Ok(self.insert_outlet(outlet, io))
    }

    /// A socket has become ready.
    pub(crate) fn on_ready<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        readiness: Readiness,
        io: &mut Io<'_, S>,
    ) {
        if readiness.failed {
            self.take_errors(id, io);
        }
        if readiness.readable || readiness.failed || readiness.closed {
            self.read(id, readiness.failed, io);
        }
    }

    /// Reads a socket until it has nothing, its port takes nothing, or others have their turn. What came for
    /// a guest that nobody knows stays in the socket for a while, whose queue is bounded.
    fn read<S: Sockets<Socket = T>>(&mut self, id: FlowId, failed: bool, io: &mut Io<'_, S>) {
        for _ in 0..TURNS {
            let Some(outlet) = self.outlets.get_mut(id) else { return };
            let space = match &mut outlet.inbound {
                Some(inbound) => {
                    let is_known = io.sources.resolve(inbound.guest, outlet.v4).is_some();
                    if inbound.wait.goes_on(is_known, io.now) {
                        return self.wait(id, io.now + GUEST_LOOK);
                    }
                    // The flows of a forward are those of any port.
                    MESSAGES
                }
                None => io.out.space(outlet.port),
            };
            if space == 0 {
                return self.wait(id, io.now + REFUSED_LOOK);
            }
            match self.receive(id, space.min(MESSAGES), io) {
                Ok(true) => {}
                Ok(false) if failed => {}
                Ok(false) | Err(SocketError::WouldBlock) => {
                    let outlet = self.outlets.get_mut(id);
                    if let Some(inbound) = outlet.and_then(|outlet| outlet.inbound.as_mut()) {
                        inbound.wait.end();
                    }
                    return;
                }
                Err(error) => self.take_error(id, error, io),
            }
        }
        if let Some(outlet) = self.outlets.get_mut(id)
            && !outlet.queued
        {
            outlet.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Leaves what a socket has in it, and looks again then at the latest.
    fn wait(&mut self, id: FlowId, at: u64) {
        if let Some(outlet) = self.outlets.get_mut(id)
            && !outlet.waiting
        {
            outlet.waiting = true;
            let (port, is_forward) = (outlet.port, outlet.inbound.is_some());
            self.waiting(port, is_forward).push_back(id);
        }
        self.retry_by(at);
    }

    /// The sockets that wait are looked at then, or sooner.
    fn retry_by(&mut self, at: u64) {
        self.retry_at = if self.retry_at == 0 { at } else { self.retry_at.min(at) };
    }

    /// A port takes frames again.
    pub(crate) fn on_space<S: Sockets<Socket = T>>(&mut self, port: Port, io: &mut Io<'_, S>) {
        let count = self.port(port).waiting.len();
        for _ in 0..count {
            if io.out.space(port) == 0 {
                break;
            }
            let Some(id) = self.port(port).waiting.pop_front() else { break };
            if let Some(outlet) = self.outlets.get_mut(id) {
                outlet.waiting = false;
            }
            self.read(id, true, io);
        }
    }

    /// Handles what is due.
    pub(crate) fn on_time<S: Sockets<Socket = T>>(&mut self, io: &mut Io<'_, S>) {
        self.fail_old_queries(io);
        while let Some(index) = self.wheel.expired(io.now) {
            let Some(id) = self.flows.at(index) else { continue };
            let Some(flow) = self.flows.get_mut(id) else { continue };
            let ends = flow.used_at + flow.lives();
            if ends > io.now {
                self.wheel.set(index, ends);
            } else {
                self.remove(id, io);
            }
        }
        if self.retry_at > 0 && self.retry_at <= io.now {
            self.retry_at = 0;
            for port in 0..self.ports.len() as u32 {
                self.on_space(Port(port), io);
                if !self.ports[port as usize].waiting.is_empty() {
                    self.retry_by(io.now + REFUSED_LOOK);
                }
            }
            for _ in 0..self.guestless.len() {
                let Some(id) = self.guestless.pop_front() else { break };
                if let Some(outlet) = self.outlets.get_mut(id) {
                    outlet.waiting = false;
                }
                self.read(id, true, io);
            }
        }
    }

    /// A socket that has more to read when it has its turn, and the port of its flows, if they are all of
    /// one. Give it a turn with [`resume`](Self::resume).
    pub(crate) fn take_unfinished(&mut self) -> Option<(Option<Port>, FlowId)> {
        let id = self.ready.pop_front()?;
        Some((self.port_of(id), id))
    }

    /// Goes on with a socket that had more to read.
    pub(crate) fn resume<S: Sockets<Socket = T>>(&mut self, id: FlowId, io: &mut Io<'_, S>) {
        if let Some(outlet) = self.outlets.get_mut(id) {
            outlet.queued = false;
        }
        self.read(id, true, io);
    }

    /// The port of a socket's flows. A port forward's may be of several.
    pub(crate) fn port_of(&self, id: FlowId) -> Option<Port> {
        let outlet = self.outlets.peek(id)?;
        outlet.inbound.is_none().then_some(outlet.port)
    }

    /// When [`on_time`](Self::on_time) is next to be called.
    pub(crate) fn deadline(&self, now: u64) -> Option<u64> {
        if !self.ready.is_empty() {
            return Some(now);
        }
        let retry = (self.retry_at > 0).then_some(self.retry_at);
        [self.wheel.next(), retry].into_iter().flatten().min()
    }
}
