//! Port forwards: connections and datagrams that come in from the world to a guest.
//!
//! A forward of TCP has a listener. What connects to it is accepted first, and the guest gets SYN after;
//! if the guest refuses, the peer gets a reset. As long as no guest has the address, connections wait in
//! the listener's backlog, since the guest may be starting; after a while they get resets.
//!
//! A forward of UDP has a socket, which all its flows share. Datagrams wait in its receive queue for the
//! guest, as long as connections do, and are dropped then.
//!
//! What is ready is told once, so a forward that cannot go on (its flows are as many as it may have, or
//! the process has no descriptor left) remembers that and looks again later: it spins on nothing.

pub(crate) mod text;

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::datagram::{Datagrams, Inbound};
use crate::io::Io;
use crate::limits::{ACCEPTS_AT_ONCE, BACKLOG, FORWARD_FLOWS, FORWARD_LOOK, FORWARDS, GUEST_LOOK};
use crate::policy::Protocol;
use crate::policy::sources::Guest;
use crate::sockets::{Kind, SocketError, Sockets, Token};
use crate::stats::{Carried, Counter, Totals};
use crate::table::{FlowId, Keyed, Table};
use crate::tcp::{self, Forwarded, Tcp};
use crate::wait::GuestWait;

/// A port forward, or a range of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForwardRule {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The address of the host that is listened at. Loopback lets only the host itself in; unspecified
    /// lets everybody in who reaches the host.
    pub bind: IpAddr,
    /// The first port of the host. 0 lets the system choose one.
    pub port: u16,
    /// How many ports, one after the other.
    pub count: u16,
    /// The guest.
    pub guest: Guest,
    /// The first port of the guest.
    pub guest_port: u16,
    /// The most flows that each port has at a time.
    pub max_flows: usize,
}

impl ForwardRule {
    /// A forward of one port, from the host's loopback address.
    pub fn new(protocol: Protocol, port: u16, guest: Guest, guest_port: u16) -> Self {
        let bind = match guest {
            Guest::Address(IpAddr::V6(_)) => Ipv6Addr::LOCALHOST.into(),
            _ => Ipv4Addr::LOCALHOST.into(),
        };
        Self { protocol, bind, port, count: 1, guest, guest_port, max_flows: FORWARD_FLOWS }
    }

    /// The forward of each port of the rule.
    ///
    /// # Errors
    ///
    /// [`Range`](ForwardError::Range) if the rule names no ports that there are.
    pub fn ports(&self) -> Result<impl Iterator<Item = Self> + use<>, ForwardError> {
        let last = |first: u16| first.checked_add(self.count.checked_sub(1)?);
        if self.guest_port == 0
            || last(self.port).is_none()
            || last(self.guest_port).is_none()
            || self.count > 1 && self.port == 0
        {
            return Err(ForwardError::Range);
        }
        let rule = *self;
        Ok((0..rule.count).map(move |index| Self {
            port: rule.port + index,
            guest_port: rule.guest_port + index,
            count: 1,
            ..rule
        }))
    }
}

/// A port forward that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForwardInfo {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where the host listens.
    pub at: SocketAddr,
    /// The guest.
    pub guest: Guest,
    /// The port of the guest.
    pub guest_port: u16,
    /// How many flows it has.
    pub flows: usize,
    /// How many connections of TCP, or flows of UDP, it has let in.
    pub accepted: u64,
    /// How many connections of TCP got a reset from it, or how many datagrams of UDP were dropped, because
    /// there was no guest or no space.
    pub refused: u64,
    /// What has gone through its flows.
    pub carried: Carried,
}

/// Why a port forward cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForwardError {
    /// Another forward, or another program, has this port at this address.
    InUse(u16),
    /// This process has no privilege for this port.
    NoPrivilege(u16),
    /// The host does not have the address that is to be listened at.
    NoAddress,
    /// No guest can have the address.
    NoGuest,
    /// The ports are no range, the guest's port is 0, or port 0 is the first of several.
    Range,
    /// The network has too many forwards.
    TooMany,
    /// The process has no descriptor left.
    NoDescriptor,
    /// The protocol has no ports.
    Protocol,
    /// The system refused in another way.
    System(SocketError),
}

impl fmt::Display for ForwardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse(port) => write!(f, "port {port} is in use"),
            Self::NoPrivilege(port) => write!(f, "this process may not listen at port {port}"),
            Self::NoAddress => f.write_str("the host does not have this address"),
            Self::NoGuest => f.write_str("no guest of this network can have this address"),
            Self::Range => f.write_str("these ports are no range"),
            Self::TooMany => write!(f, "a network has at most {FORWARDS} port forwards"),
            Self::NoDescriptor => f.write_str("no descriptor is left"),
            Self::Protocol => f.write_str("only TCP and UDP have ports"),
            Self::System(error) => write!(f, "the system refused: {error:?}"),
        }
    }
}

impl std::error::Error for ForwardError {}

/// What takes connections or datagrams.
#[derive(Debug)]
enum Listener<T> {
    Tcp(T),
    /// The socket is one of the datagrams'.
    Udp(FlowId),
}

#[derive(Debug)]
struct Forward<T> {
    /// What [`Tcp`] knows it by.
    place: u16,
    protocol: Protocol,
    at: SocketAddr,
    guest: Guest,
    guest_port: u16,
    max_flows: usize,
    listener: Listener<T>,
    wait: GuestWait,
    /// When to look again, because there may be connections in the backlog. 0 is never.
    look_at: u64,
    accepted: u64,
    refused: u64,
}

impl<T> Keyed for Forward<T> {
    type Key = (Protocol, SocketAddr);
    fn key(&self) -> (Protocol, SocketAddr) {
        (self.protocol, self.at)
    }
}

/// The port forwards.
#[derive(Debug)]
pub(crate) struct Forwards<T> {
    forwards: Table<Forward<T>>,
    /// The number of the next one of UDP.
    number: u64,
    /// When one of them is to look again. 0 is never.
    look_at: u64,
}

impl<T> Forwards<T> {
    pub(crate) fn new() -> Self {
        Self { forwards: Table::new(FORWARDS), number: 0, look_at: 0 }
    }

    /// Where each forward listens.
    pub(crate) fn places_of_all(&self) -> impl Iterator<Item = (Protocol, SocketAddr)> + '_ {
        self.forwards.iter().map(Keyed::key)
    }

    /// Where each forward leads to.
    pub(crate) fn guests(&self) -> impl Iterator<Item = Guest> + '_ {
        self.forwards.iter().map(|forward| forward.guest)
    }

    /// How many listeners of TCP there are. Those of UDP are the datagrams'.
    pub(crate) fn descriptors(&self) -> usize {
        let is_tcp = |forward: &&Forward<T>| matches!(forward.listener, Listener::Tcp(_));
        self.forwards.iter().filter(is_tcp).count()
    }

    /// Adds forwards for all ports of a rule, or for none. Returns where the first listens.
    pub(crate) fn add<S: Sockets<Socket = T>>(
        &mut self,
        rule: &ForwardRule,
        tcp: &mut Tcp<T>,
        datagrams: &mut Datagrams<T>,
        io: &mut Io<'_, S>,
    ) -> Result<SocketAddr, ForwardError> {
        let ports = rule.ports()?;
        if let Guest::Address(address) = rule.guest
            && io.sources.is_possible(address).is_err()
        {
            return Err(ForwardError::NoGuest);
        }
        if rule.protocol == Protocol::IcmpEcho {
            return Err(ForwardError::Protocol);
        }
        if self.forwards.len() + usize::from(rule.count) > FORWARDS {
            return Err(ForwardError::TooMany);
        }
        let mut first = None;
        for one in ports {
            match self.add_one(&one, tcp, datagrams, io) {
                Ok(at) => {
                    first.get_or_insert(at);
                }
                Err(error) => {
                    for port in rule.port..one.port {
                        let at = SocketAddr::new(rule.bind, port);
                        self.remove(rule.protocol, at, tcp, datagrams, io);
                    }
                    return Err(error);
                }
            }
        }
        first.ok_or(ForwardError::Range)
    }

    fn add_one<S: Sockets<Socket = T>>(
        &mut self,
        rule: &ForwardRule,
        tcp: &mut Tcp<T>,
        datagrams: &mut Datagrams<T>,
        io: &mut Io<'_, S>,
    ) -> Result<SocketAddr, ForwardError> {
        let (port, guest_port) = (rule.port, rule.guest_port);
        let at = SocketAddr::new(rule.bind, port);
        let refused = |error| match error {
            SocketError::NoPort => ForwardError::InUse(port),
            SocketError::Denied => ForwardError::NoPrivilege(port),
            SocketError::NoAddress => ForwardError::NoAddress,
            SocketError::NoDescriptor => ForwardError::NoDescriptor,
            error => ForwardError::System(error),
        };
        // A rule of the system may let two sockets have one port.
        if port != 0 && self.forwards.find(&(rule.protocol, at)).is_some() {
            return Err(ForwardError::InUse(port));
        }
        if !io.has_descriptor() {
            return Err(ForwardError::NoDescriptor);
        }
        let (listener, at) = if rule.protocol == Protocol::Tcp {
            let token = Token::new(Kind::Forward, self.forwards.next_id());
            let listener = io.sockets.listen(at, BACKLOG, token).map_err(refused)?;
            let at = io.sockets.local_address(&listener).map_err(refused)?;
            io.ports.other_descriptors += 1;
            (Listener::Tcp(listener), at)
        } else {
            self.number += 1;
            let open = |datagrams: &mut Datagrams<T>, io: &mut Io<'_, S>| {
                let inbound = Inbound::new(rule.guest, guest_port, rule.max_flows);
                datagrams.add_forward(at, self.number, inbound, io)
            };
            let mut opened = open(datagrams, io);
            if matches!(opened, Err(SocketError::NoPort)) {
                datagrams.give_up_port(port, io);
                opened = open(datagrams, io);
            }
            let (id, at) = opened.map_err(refused)?;
            (Listener::Udp(id), at)
        };
        const { assert!(FORWARDS < u16::MAX as usize) };
        let place = self.forwards.next_id().index as u16 + 1;
        let forward = Forward {
            place,
            protocol: rule.protocol,
            at,
            guest: rule.guest,
            guest_port,
            max_flows: rule.max_flows,
            listener,
            wait: GuestWait::default(),
            look_at: 0,
            accepted: 0,
            refused: 0,
        };
        self.forwards.insert(forward).map_err(|_| ForwardError::TooMany)?;
        if rule.protocol == Protocol::Tcp {
            tcp.add_forward(place);
        }
        Ok(at)
    }

    /// Removes a forward. Connections that wait in its backlog get resets, and its flows of UDP end.
    /// Returns the guest's port of one that was there.
    pub(crate) fn remove<S: Sockets<Socket = T>>(
        &mut self,
        protocol: Protocol,
        at: SocketAddr,
        tcp: &mut Tcp<T>,
        datagrams: &mut Datagrams<T>,
        io: &mut Io<'_, S>,
    ) -> Option<(Guest, u16)> {
        let id = self.forwards.find(&(protocol, at))?;
        let forward = self.forwards.remove(id)?;
        match forward.listener {
            Listener::Tcp(_) => {
                io.ports.other_descriptors -= 1;
                tcp.remove_forward(forward.place);
            }
            Listener::Udp(id) => datagrams.remove_forward(id, io),
        }
        Some((forward.guest, forward.guest_port))
    }

    /// Removes all forwards.
    pub(crate) fn close<S: Sockets<Socket = T>>(
        &mut self,
        tcp: &mut Tcp<T>,
        datagrams: &mut Datagrams<T>,
        io: &mut Io<'_, S>,
    ) {
        for index in 0..self.forwards.places() as u32 {
            let found = self.forwards.at(index).and_then(|id| self.forwards.peek(id));
            if let Some((protocol, at)) = found.map(Keyed::key) {
                self.remove(protocol, at, tcp, datagrams, io);
            }
        }
    }

    /// What is known about each forward.
    pub(crate) fn infos<'a>(
        &'a self,
        tcp: &'a Tcp<T>,
        datagrams: &'a Datagrams<T>,
    ) -> impl Iterator<Item = ForwardInfo> + 'a {
        let forwarded = tcp.forwarded();
        self.forwards.iter().map(move |forward| {
            let totals = match forward.listener {
                Listener::Tcp(_) => {
                    let Forwarded { flows, carried } = forwarded[usize::from(forward.place)];
                    let (accepted, refused) = (forward.accepted, forward.refused);
                    Totals { flows, accepted, refused, carried }
                }
                Listener::Udp(id) => datagrams.forward_totals(id),
            };
            let Totals { flows, accepted, refused, carried } = totals;
            let Forward { protocol, at, guest, guest_port, .. } = *forward;
            ForwardInfo { protocol, at, guest, guest_port, flows, accepted, refused, carried }
        })
    }

    /// A listener has connections.
    pub(crate) fn on_ready<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        tcp: &mut Tcp<T>,
        io: &mut Io<'_, S>,
    ) {
        // A connection that waits for a time goes on waiting.
        if let Some(forward) = self.forwards.get_mut(id)
            && forward.look_at == 0
        {
            let next = forward.take(tcp, io);
            self.look_again(id, next);
        }
    }

    fn look_again(&mut self, id: FlowId, at: u64) {
        if let Some(forward) = self.forwards.get_mut(id) {
            forward.look_at = at;
            if at > 0 && (self.look_at == 0 || at < self.look_at) {
                self.look_at = at;
            }
        }
    }

    /// Handles what is due.
    pub(crate) fn on_time<S: Sockets<Socket = T>>(&mut self, tcp: &mut Tcp<T>, io: &mut Io<'_, S>) {
        if self.look_at == 0 || self.look_at > io.now {
            return;
        }
        self.look_at = 0;
        for index in 0..self.forwards.places() as u32 {
            let Some(id) = self.forwards.at(index) else { continue };
            let Some(forward) = self.forwards.get_mut(id) else { continue };
            let mut next = forward.look_at;
            if next > 0 && next <= io.now {
                next = forward.take(tcp, io);
            }
            self.look_again(id, next);
        }
    }

    /// When [`on_time`](Self::on_time) is next to be called.
    pub(crate) fn deadline(&self) -> Option<u64> {
        (self.look_at > 0).then_some(self.look_at)
    }
}

impl<T> Forward<T> {
    /// Takes connections from the backlog, and returns when to look again, or 0.
    fn take<S: Sockets<Socket = T>>(&mut self, tcp: &mut Tcp<T>, io: &mut Io<'_, S>) -> u64 {
        let Listener::Tcp(listener) = &self.listener else { return 0 };
        for _ in 0..ACCEPTS_AT_ONCE {
            let guest = io.sources.resolve(self.guest, self.at.is_ipv4());
            if self.wait.goes_on(guest.is_some(), io.now) {
                return io.now + GUEST_LOOK;
            }
            if let Some((port, ..)) = guest {
                let why = if tcp.forward_flows(self.place) >= self.max_flows {
                    Some(Counter::ForwardLimit)
                } else if !io.has_descriptor_for(port) {
                    Some(Counter::DescriptorLimit)
                } else {
                    None
                };
                if let Some(why) = why {
                    io.count(port, why);
                    return io.now + FORWARD_LOOK;
                }
            }
            let (socket, from) = match io.sockets.accept(listener) {
                Ok(accepted) => accepted,
                Err(SocketError::WouldBlock) => {
                    self.wait.end();
                    return 0;
                }
                // The peer has gone in the meantime.
                Err(SocketError::Reset | SocketError::TimedOut) => continue,
                Err(error) => {
                    let why = match error {
                        SocketError::NoDescriptor => Counter::NoDescriptor,
                        SocketError::NoMemory => Counter::NoMemory,
                        _ => Counter::OtherError,
                    };
                    io.ports.counters.add(why, 1);
                    return io.now + FORWARD_LOOK;
                }
            };
            let Some((port, mac, address)) = guest else {
                io.ports.counters.add(Counter::NoGuest, 1);
                self.refused += 1;
                io.sockets.reset(socket);
                continue;
            };
            let seen = io.seen_source(from, address);
            let key = tcp::key(port, SocketAddr::new(address, self.guest_port), seen);
            match tcp.accept(socket, from, (key, mac), self.place, io) {
                Ok(()) => self.accepted += 1,
                Err(_) => self.refused += 1,
            }
            io.ports.tcp_descriptors = tcp.usage().1;
        }
        // Others have their turn.
        io.now
    }
}
