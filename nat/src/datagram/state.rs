//! The tables of flows and sockets of datagrams, and who makes way for whom.

use core::net::SocketAddr;
use std::collections::{HashSet, VecDeque};

use crate::datagram::flow::{Flow, Inbound, Key, Outlet, OutletKey, Young};
use crate::io::Io;
use crate::limits::{HEADROOM, MESSAGE_LEN, MESSAGES};
use crate::output::Port;
use crate::policy::Protocol;
use crate::sockets::{Capabilities, Kind, SocketError, Sockets, Token};
use crate::stats::{Counter, Totals};
use crate::table::{FlowId, Table};
use crate::wheel::Wheel;

/// What a port has.
#[derive(Debug, Default)]
pub(crate) struct PortFlows {
    /// Flows of UDP that the guest has opened.
    pub(crate) udp: Young,
    pub(crate) echo: Young,
    /// The sockets that wait until the port takes frames.
    pub(crate) waiting: VecDeque<FlowId>,
}

/// The flows of UDP and ICMP echo.
#[derive(Debug)]
pub(crate) struct Datagrams<T> {
    pub(crate) flows: Table<Flow>,
    pub(crate) outlets: Table<Outlet<T>>,
    pub(crate) wheel: Wheel,
    pub(crate) ports: Vec<PortFlows>,
    /// How many flows there are of UDP and of echo.
    pub(crate) counts: [usize; 2],
    /// Sockets that have more to read when others have had their turn.
    pub(crate) ready: VecDeque<FlowId>,
    /// Sockets of port forwards that have something for guests that nobody knows.
    pub(crate) guestless: VecDeque<FlowId>,
    /// Ports of the host that these sockets have because they are their guests', over IPv4 or over IPv6.
    pub(crate) kept_ports: HashSet<(bool, u16)>,
    /// When the sockets that wait for a port are read even if nobody says that it takes frames, and those
    /// that wait for guests. 0 is never.
    pub(crate) retry_at: u64,
    /// Memory that messages are received into. It has none until there is a socket.
    pub(crate) buffer: Vec<u8>,
    pub(crate) capabilities: Capabilities,
    /// The identification of the next fragmented packet.
    pub(crate) fragment_id: u32,
}

fn index(protocol: Protocol) -> usize {
    usize::from(protocol == Protocol::IcmpEcho)
}

impl<T> Datagrams<T> {
    pub(crate) fn new(
        (udp_flows, echo_flows): (usize, usize),
        capabilities: Capabilities,
        now: u64,
    ) -> Self {
        Self {
            flows: Table::new(udp_flows + echo_flows),
            // Each forward has one too, and they are bounded by their own limit.
            outlets: Table::new(usize::MAX),
            wheel: Wheel::new(now),
            ports: Vec::new(),
            counts: [0; 2],
            ready: VecDeque::new(),
            guestless: VecDeque::new(),
            kept_ports: HashSet::new(),
            retry_at: 0,
            buffer: Vec::new(),
            capabilities,
            fragment_id: 0,
        }
    }

    /// How many flows there are, and how many sockets.
    pub(crate) fn usage(&self) -> (usize, usize) {
        (self.flows.len(), self.outlets.len())
    }

    pub(crate) fn port(&mut self, port: Port) -> &mut PortFlows {
        let index = port.0 as usize;
        if index >= self.ports.len() {
            self.ports.resize_with(index + 1, PortFlows::default);
        }
        &mut self.ports[index]
    }

    /// The list of sockets that wait as one of a port does, or of a port forward.
    pub(crate) fn waiting(&mut self, port: Port, is_forward: bool) -> &mut VecDeque<FlowId> {
        if is_forward { &mut self.guestless } else { &mut self.port(port).waiting }
    }

    /// The list that a flow is counted in.
    pub(crate) fn young(&mut self, key: &Key, forward: Option<FlowId>) -> Option<&mut Young> {
        if let Some(outlet) = forward {
            return Some(&mut self.outlets.get_mut(outlet)?.inbound.as_mut()?.young);
        }
        let flows = self.port(key.port);
        Some(match key.protocol {
            Protocol::IcmpEcho => &mut flows.echo,
            _ => &mut flows.udp,
        })
    }

    /// Looks whether there is a place for another flow, and makes one if older flows of the same port, or
    /// of the same forward, can go.
    pub(crate) fn make_room<S: Sockets<Socket = T>>(
        &mut self,
        key: &Key,
        forward: Option<FlowId>,
        io: &mut Io<'_, S>,
    ) -> Result<(), Counter> {
        let limits = &io.config.limits;
        let (all, own) = match key.protocol {
            Protocol::IcmpEcho => (limits.echo_flows, limits.port.echo_flows),
            _ => (limits.udp_flows, limits.port.udp_flows),
        };
        let cap = match forward.and_then(|id| self.outlets.get_mut(id)) {
            Some(outlet) => outlet.inbound.as_ref().map_or(0, |inbound| inbound.most),
            None => own,
        };
        let full = |this: &mut Self, io: &Io<'_, S>| {
            let count = this.young(key, forward).map_or(0, |young| young.count);
            if count >= cap || this.counts[index(key.protocol)] >= all || this.flows.is_full() {
                return Some(Counter::FlowLimit);
            }
            (forward.is_none() && !io.has_descriptor_for(key.port))
                .then_some(Counter::DescriptorLimit)
        };
        let Some(why) = full(self, io) else { return Ok(()) };
        // The oldest that is no stream.
        while let Some(id) = self.young(key, forward).and_then(|young| young.queue.pop_front()) {
            let Some(flow) = self.flows.peek(id).filter(|flow| !flow.stream) else { continue };
            let (key, mac, has_queries) = (flow.key, flow.mac, flow.dns);
            io.count(key.port, Counter::Evicted);
            self.remove(id, io);
            if has_queries {
                self.fail_queries(&key, mac, io);
            }
            break;
        }
        match full(self, io) {
            None => Ok(()),
            Some(_) => Err(why),
        }
    }

    pub(crate) fn insert_outlet<S: Sockets<Socket = T>>(
        &mut self,
        outlet: Outlet<T>,
        io: &mut Io<'_, S>,
    ) -> FlowId {
        let (port, kept) = (outlet.port, outlet.kept_port.map(|port| (outlet.v4, port)));
        let is_forward = outlet.inbound.is_some();
        if !is_forward {
            io.ports.get(port).sockets += 1;
        }
        let Ok(id) = self.outlets.insert(outlet) else { unreachable!("the table has no limit") };
        io.ports.other_descriptors += 1;
        if let Some((v4, port)) = kept {
            self.kept_ports.insert((v4, port));
        }
        if self.buffer.is_empty() {
            self.buffer = vec![0; MESSAGES * MESSAGE_LEN + HEADROOM];
        }
        // So that the lists do not grow while packets pass.
        let all = self.outlets.len();
        let waiting = self.waiting(port, is_forward);
        waiting.reserve(all.saturating_sub(waiting.len()));
        self.ready.reserve(all.saturating_sub(self.ready.len()));
        id
    }

    /// Adds a flow. There is space for it.
    pub(crate) fn insert<S: Sockets<Socket = T>>(
        &mut self,
        flow: Flow,
        forward: Option<FlowId>,
        io: &mut Io<'_, S>,
    ) -> Option<FlowId> {
        let (key, outlet, lives) = (flow.key, flow.outlet, flow.lives());
        let opened = match key.protocol {
            Protocol::IcmpEcho => Counter::EchoOpened,
            _ => Counter::UdpOpened,
        };
        let id = self.flows.insert(flow).ok()?;
        io.count(key.port, opened);
        self.counts[index(key.protocol)] += 1;
        self.wheel.grow(self.flows.places());
        self.wheel.set(id.index, io.now + lives);
        if let Some(outlet) = self.outlets.get_mut(outlet) {
            outlet.flows += 1;
        }
        let flows = &self.flows;
        // Those that are gone, and streams, are nobody's to evict.
        let stale = |other: &FlowId| flows.peek(*other).is_none_or(|flow| flow.stream);
        let young = match forward {
            Some(outlet) => {
                self.outlets.get_mut(outlet).and_then(|o| o.inbound.as_mut()).map(|i| &mut i.young)
            }
            None => {
                let port = key.port.0 as usize;
                self.ports.get_mut(port).map(|port| match key.protocol {
                    Protocol::IcmpEcho => &mut port.echo,
                    _ => &mut port.udp,
                })
            }
        };
        if let Some(young) = young {
            young.push(id, stale);
        }
        Some(id)
    }

    /// Removes a flow, and its socket if it was its last.
    pub(crate) fn remove<S: Sockets<Socket = T>>(&mut self, id: FlowId, io: &mut Io<'_, S>) {
        let Some(flow) = self.flows.remove(id) else { return };
        self.wheel.clear(id.index);
        self.counts[index(flow.key.protocol)] -= 1;
        let forward = flow.inbound.then_some(flow.outlet);
        if let Some(young) = self.young(&flow.key, forward) {
            young.count -= 1;
        }
        if let Some(outlet) = self.outlets.get_mut(flow.outlet) {
            outlet.flows -= 1;
            if let Some(inbound) = &mut outlet.inbound {
                inbound.carried.add(&flow.carried);
            }
            if outlet.flows == 0 && outlet.inbound.is_none() {
                self.close_outlet(flow.outlet, io);
            }
        }
    }

    pub(crate) fn close_outlet<S: Sockets<Socket = T>>(&mut self, id: FlowId, io: &mut Io<'_, S>) {
        let Some(outlet) = self.outlets.remove(id) else { return };
        io.ports.other_descriptors -= 1;
        if outlet.inbound.is_none() {
            io.ports.get(outlet.port).sockets -= 1;
        }
        if let Some(port) = outlet.kept_port {
            self.kept_ports.remove(&(outlet.v4, port));
        }
        if outlet.waiting {
            self.waiting(outlet.port, outlet.inbound.is_some()).retain(|&other| other != id);
        }
        if outlet.queued {
            self.ready.retain(|&other| other != id);
        }
    }

    /// Opens the socket of a port forward. Its flows are opened by those who send to it.
    pub(crate) fn add_forward<S: Sockets<Socket = T>>(
        &mut self,
        at: SocketAddr,
        number: u64,
        inbound: Inbound,
        io: &mut Io<'_, S>,
    ) -> Result<(FlowId, SocketAddr), SocketError> {
        let token = Token::new(Kind::Datagrams, self.outlets.next_id());
        let socket = io.sockets.bind_udp(at, token)?;
        let at = io.sockets.local_address(&socket)?;
        let mut outlet = Outlet::new(OutletKey::Forward(number), socket, Port(0), at.is_ipv4());
        outlet.inbound = Some(Box::new(inbound));
        Ok((self.insert_outlet(outlet, io), at))
    }

    /// Ends the flows that may have a port of the host because it is their guest's, so that a guest does not
    /// keep a forward from being added. They are opened again with another port.
    pub(crate) fn give_up_port<S: Sockets<Socket = T>>(&mut self, port: u16, io: &mut Io<'_, S>) {
        let is_guests = |flow: &Flow| !flow.inbound && !flow.dns;
        self.remove_where(io, |flow| is_guests(flow) && flow.key.guest.port() == port);
    }

    /// Closes the socket of a port forward, and ends its flows.
    pub(crate) fn remove_forward<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        io: &mut Io<'_, S>,
    ) {
        self.remove_where(io, |flow| flow.outlet == id);
        self.close_outlet(id, io);
    }

    /// How many flows a port forward has, how many it has let in, how many datagrams it has not, and what it
    /// has carried.
    pub(crate) fn forward_totals(&self, id: FlowId) -> Totals {
        let Some(outlet) = self.outlets.peek(id) else { return Totals::default() };
        let Some(inbound) = &outlet.inbound else { return Totals::default() };
        let mut carried = inbound.carried;
        for flow in self.flows.iter().filter(|flow| flow.outlet == id) {
            carried.add(&flow.carried);
        }
        let (accepted, refused) = (inbound.accepted, inbound.refused);
        Totals { flows: outlet.flows, accepted, refused, carried }
    }

    pub(crate) fn remove_where<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        is_one: impl Fn(&Flow) -> bool,
    ) {
        for index in 0..self.flows.places() as u32 {
            let Some(id) = self.flows.at(index) else { continue };
            if let Some(flow) = self.flows.peek(id).filter(|flow| is_one(flow)) {
                io.count(flow.key.port, Counter::PortGone);
                self.remove(id, io);
            }
        }
    }

    /// Ends all flows, or those of one port.
    pub(crate) fn close<S: Sockets<Socket = T>>(&mut self, port: Option<Port>, io: &mut Io<'_, S>) {
        self.remove_where(io, |flow| port.is_none_or(|port| port == flow.key.port));
        if let Some(port) = port {
            let flows = self.port(port);
            (flows.udp, flows.echo) = (Young::default(), Young::default());
        }
    }
}
