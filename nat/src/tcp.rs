//! TCP: each connection of a guest is one flow, and each flow one socket of the host.
//!
//! | file | what it holds |
//! |---|---|
//! | `flow.rs` | the state of a flow, and how it ends |
//! | `open.rs` | how it begins, in both directions |
//! | `from_guest.rs` | segments of the guest: sequence, acknowledgments, windows, data to the socket |
//! | `to_guest.rs` | data, FIN, acknowledgments and probes to the guest; readiness and time |
//! | `segment.rs` | the TCP header, read and written |
//! | `memory.rs` | what the flows share |
//!
//! Here are the table of flows, the batch, and the lists of flows that wait for a time, for a port or
//! for their turn.

mod flow;
mod from_guest;
mod memory;
mod open;
mod segment;
mod to_guest;

use core::net::SocketAddr;
use std::collections::VecDeque;

use crate::dns::stream::Stream;
use crate::icmp::Reason;
use crate::io::Io;
use crate::limits::{
    BATCH, DNS_CONNECT_TIMEOUT, REFUSED_LOOK, SMALL_SOCKET_BUFFER, TIME_WAIT_FLOWS, TRACED_HOPS,
};
use crate::output::Port;
use crate::packet::Datagram;
use crate::policy::{Protocol, is_source};
use crate::sockets::{Capabilities, ConnectOptions, Kind, Readiness, Sockets, Token};
use crate::stats::{Carried, Counter};
use crate::table::{FlowId, Table};
use crate::wheel::Wheel;

use flow::{Ending, Flow, Phase};
use from_guest::{Run, Taken, answer_reset, reset_unknown};
use memory::Memory;
pub(crate) use segment::Key;
use segment::Segment;

/// The end of a chain of segments.
const NONE: u8 = u8::MAX;

/// What can be known about a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowInfo {
    /// The guest's port on the network.
    pub port: Port,
    /// The guest's address.
    pub guest: SocketAddr,
    /// The peer's address, as the guest sees it.
    pub remote: SocketAddr,
    /// Where the host's socket is connected to, or from.
    pub to: SocketAddr,
    /// Whether the handshake is complete.
    pub established: bool,
    /// What has gone through it.
    pub carried: Carried,
}

/// The flows of TCP.
#[derive(Debug)]
pub(crate) struct Tcp<T> {
    flows: Table<Flow<T>>,
    wheel: Wheel,
    memory: Memory,
    /// Flows that have more to do when others have had their turn.
    ready: VecDeque<FlowId>,
    /// For each port, the flows that wait until it takes frames.
    waiting: Vec<VecDeque<FlowId>>,
    /// How many flows have no socket.
    lingering: usize,
    /// What each port forward has, by its place.
    forwards: Vec<Forwarded>,
}

/// What a port forward has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Forwarded {
    pub(crate) flows: usize,
    /// What has gone through it: while flows are open, what went through those that are not.
    pub(crate) carried: Carried,
}

/// The segments of one batch. Those of one flow are a chain, in order.
pub(crate) struct Batch<'f> {
    segments: [Option<Segment<'f>>; BATCH],
    next: [u8; BATCH],
    /// The first and the last segment of each chain.
    chains: [(u8, u8); BATCH],
    len: usize,
    chain_count: usize,
}

impl<'f> Batch<'f> {
    pub(crate) fn new() -> Self {
        Self {
            segments: [None; BATCH],
            next: [NONE; BATCH],
            chains: [(NONE, NONE); BATCH],
            len: 0,
            chain_count: 0,
        }
    }

    /// Adds a segment. There are at most [`BATCH`].
    fn add(&mut self, segment: Segment<'f>) {
        let index = self.len as u8;
        let chains = &mut self.chains[..self.chain_count];
        // The last chain first: mostly there is one.
        let chain = chains.iter_mut().rev().find(|(first, _)| {
            self.segments[usize::from(*first)].is_some_and(|other| other.key == segment.key)
        });
        match chain {
            Some((_, last)) => {
                self.next[usize::from(*last)] = index;
                *last = index;
            }
            None => {
                self.chains[self.chain_count] = (index, index);
                self.chain_count += 1;
            }
        }
        self.segments[self.len] = Some(segment);
        self.len += 1;
    }
}

impl<T> Tcp<T> {
    pub(crate) fn new(flows: usize, capabilities: Capabilities, now: u64) -> Self {
        Self {
            flows: Table::new(flows + TIME_WAIT_FLOWS),
            wheel: Wheel::new(now),
            memory: Memory::new(capabilities),
            ready: VecDeque::new(),
            waiting: Vec::new(),
            lingering: 0,
            forwards: Vec::new(),
        }
    }

    /// What is known about each flow.
    pub(crate) fn infos(&self) -> impl Iterator<Item = FlowInfo> + '_ {
        self.flows.iter().filter(|flow| flow.counts()).map(|flow| FlowInfo {
            port: flow.key.port,
            guest: flow.key.guest.into(),
            remote: flow.key.remote.into(),
            to: flow.to.into(),
            established: flow.phase == Phase::Open,
            carried: flow.carried(),
        })
    }

    /// Adds a port forward, which nothing has gone through.
    pub(crate) fn add_forward(&mut self, place: u16) {
        let place = usize::from(place);
        if place >= self.forwards.len() {
            self.forwards.resize_with(place + 1, Forwarded::default);
        }
        self.forwards[place] = Forwarded::default();
    }

    /// Forgets a port forward. Its flows stay, and are no forward's.
    pub(crate) fn remove_forward(&mut self, place: u16) {
        for index in 0..self.flows.places() as u32 {
            if let Some(flow) = self.flows.at(index).and_then(|id| self.flows.get_mut(id))
                && flow.forward == place
            {
                flow.forward = 0;
            }
        }
    }

    /// How many flows a port forward has.
    pub(crate) fn forward_flows(&self, place: u16) -> usize {
        self.forwards.get(usize::from(place)).map_or(0, |forward| forward.flows)
    }

    /// What the port forwards have, by their places, with what has gone through flows that are open.
    pub(crate) fn forwarded(&self) -> Vec<Forwarded> {
        let mut all = self.forwards.clone();
        for flow in self.flows.iter().filter(|flow| flow.forward != 0 && flow.counts()) {
            all[usize::from(flow.forward)].carried.add(&flow.carried());
        }
        all
    }

    /// What the sockets may cost the kernel, in bytes.
    pub(crate) fn kernel_memory(&self) -> u64 {
        self.memory.kernel
    }

    /// How many entries the table has, and how many descriptors are open.
    pub(crate) fn usage(&self) -> (usize, usize) {
        (self.flows.len(), self.memory.descriptors)
    }

    /// Puts a packet into the batch.
    ///
    /// # Errors
    ///
    /// Why the packet is no segment.
    pub(crate) fn gather<'f>(
        port: Port,
        datagram: Datagram<'f>,
        batch: &mut Batch<'f>,
    ) -> Result<(), Counter> {
        if !is_source(datagram.source) {
            return Err(Counter::BadSource);
        }
        batch.add(Segment::parse(port, datagram)?);
        Ok(())
    }

    /// Handles a batch.
    pub(crate) fn handle<S: Sockets<Socket = T>>(&mut self, batch: &Batch<'_>, io: &mut Io<'_, S>) {
        for &(first, _) in &batch.chains[..batch.chain_count] {
            self.handle_chain(batch, first, io);
        }
    }

    /// Handles the segments of one flow, and of those that follow it with the same addresses and
    /// ports.
    fn handle_chain<S: Sockets<Socket = T>>(
        &mut self,
        batch: &Batch<'_>,
        first: u8,
        io: &mut Io<'_, S>,
    ) {
        let chain = || {
            let mut next = first;
            std::iter::from_fn(move || {
                let index = usize::from(next);
                let segment = batch.segments.get(index)?.as_ref()?;
                next = batch.next[index];
                Some((index, segment))
            })
        };
        let mut run = Run::new();
        let mut early = 0u64;
        let mut current = None;
        for (index, segment) in chain() {
            let id = current.or_else(|| self.flows.find(&segment.key));
            if let Some(id) = id
                && segment.flags.syn
                && !run.is_empty()
            {
                // It may begin another flow. This one has its data and FIN before it ends.
                self.with(id, io, |flow, io, memory| flow.finish(&run, io, memory));
                (run, early) = (Run::new(), 0);
            }
            let taken = id.map(|id| {
                let taken =
                    self.with(id, io, |flow, io, memory| flow.take(segment, &mut run, io, memory));
                (id, taken)
            });
            match taken {
                Some((id, Some(Taken::Done))) => {
                    current = self.flows.get_mut(id).is_some().then_some(id);
                    if current.is_none() {
                        (run, early) = (Run::new(), 0);
                    }
                }
                Some((id, Some(Taken::Early))) => {
                    current = Some(id);
                    early |= 1 << index;
                }
                Some((id, Some(Taken::Replaces))) => {
                    self.with(id, io, |flow, io, memory| {
                        if flow.phase != Phase::TimeWait && flow.phase != Phase::Closed {
                            io.count(flow.key.port, Counter::Restarted);
                            flow.end_socket(io, memory, Ending::Reset);
                        }
                        flow.phase = Phase::Closed;
                    });
                    (run, early) = (Run::new(), 0);
                    current = self.open(segment, io);
                }
                Some((_, None)) | None => {
                    current = None;
                    if segment.flags.syn && !segment.flags.ack {
                        current = self.open(segment, io);
                    } else {
                        reset_unknown(segment, io);
                    }
                }
            }
        }
        let Some(id) = current else { return };
        self.with(id, io, |flow, io, memory| {
            // Segments whose predecessors came later. Each round takes one at least.
            let mut progress = early != 0;
            while progress && flow.phase == Phase::Open {
                progress = false;
                for (index, segment) in chain() {
                    if early & 1 << index != 0
                        && flow.take(segment, &mut run, io, memory) != Taken::Early
                    {
                        early &= !(1 << index);
                        progress = early != 0;
                    }
                }
            }
            run.early = early.count_ones();
            flow.finish(&run, io, memory);
        });
    }

    /// Opens a flow for a guest's SYN, if everybody agrees.
    fn open<S: Sockets<Socket = T>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, S>,
    ) -> Option<FlowId> {
        let key = segment.key;
        let port = key.port;
        let (source, destination) = (SocketAddr::from(key.guest), SocketAddr::from(key.remote));
        let mac = segment.datagram.mac;
        let is_dns = io.config.is_dns(destination);
        let decided = match is_dns {
            true => io.resolver((port, mac), source.ip()),
            false => io.decide((port, mac), Protocol::Tcp, source, destination),
        };
        let to = match decided {
            Ok(to) => to,
            Err(why) => {
                io.count(port, why);
                io.send_error_about(port, Reason::Prohibited, &segment.datagram);
                return None;
            }
        };
        // A SYN beyond a limit is dropped. The guest sends it again.
        if let Err(why) = self.may_open(port, io) {
            io.count(port, why);
            return None;
        }
        let options = self.connect_options(port, &segment.datagram, io);
        let token = Token::new(Kind::Tcp, self.flows.next_id());
        let socket = match io.sockets.connect_tcp(to, &options, token) {
            Ok(socket) => socket,
            Err(error) => {
                let (counter, reason) = open::refusal(error);
                io.count(port, counter);
                if is_dns {
                    io.dns.failed(port, to.ip(), io.ports, io.now);
                }
                match reason {
                    Some(reason) => io.send_error_about(port, reason, &segment.datagram),
                    None => answer_reset(segment, io),
                }
                return None;
            }
        };
        let place = Flow::<T>::place_for(port, to, &self.memory, io.config.rings_only);
        let mut flow = Flow::connecting(segment, to, (socket, token), place, io, &mut self.memory);
        if is_dns {
            flow.queries = Some(Box::new(Stream::new()));
            flow.retry_at = io.now + DNS_CONNECT_TIMEOUT;
        }
        self.insert(flow, io)
    }

    /// Opens a flow for a peer that has connected to the host: the guest gets SYN from `remote`, which
    /// is where the guest's answers go. `forward` is the place of the port forward, or 0.
    ///
    /// # Errors
    ///
    /// Why not. The peer gets a reset.
    pub(crate) fn accept<S: Sockets<Socket = T>>(
        &mut self,
        socket: T,
        from: SocketAddr,
        (key, mac): (Key, [u8; 6]),
        forward: u16,
        io: &mut Io<'_, S>,
    ) -> Result<(), Counter> {
        // A flow that only waits for late segments makes way, as it does for a guest's SYN.
        if let Some(id) = self.flows.find(&key) {
            self.with(id, io, |flow, _, _| {
                if flow.phase == Phase::TimeWait {
                    flow.phase = Phase::Closed;
                }
            });
        }
        let refused = match self.flows.find(&key) {
            Some(_) => Err(Counter::NoPort),
            None => self.may_open(key.port, io),
        };
        let token = Token::new(Kind::Tcp, self.flows.next_id());
        let adopted = refused.and_then(|()| {
            io.sockets.adopt_tcp(&socket, token).map_err(|error| open::refusal(error).0)
        });
        if let Err(why) = adopted {
            io.count(key.port, why);
            io.sockets.reset(socket);
            return Err(why);
        }
        let place = Flow::<T>::place_for(key.port, from, &self.memory, io.config.rings_only);
        let mut flow = Flow::accepted(key, from, mac, (socket, token), place, io, &mut self.memory);
        flow.forward = forward;
        if let Some(id) = self.insert(flow, io) {
            if forward != 0 {
                self.forwards[usize::from(forward)].flows += 1;
            }
            self.with(id, io, |flow, io, memory| flow.finish(&Run::new(), io, memory));
        }
        Ok(())
    }

    fn may_open<S: Sockets<Socket = T>>(
        &mut self,
        port: Port,
        io: &mut Io<'_, S>,
    ) -> Result<(), Counter> {
        io.ports.tcp_descriptors = self.memory.descriptors;
        if !io.has_descriptor_for(port) {
            return Err(Counter::DescriptorLimit);
        }
        if self.flows.is_full() {
            return Err(Counter::FlowLimit);
        }
        io.ports.may_open(port, io.now)
    }

    fn connect_options<S: Sockets<Socket = T>>(
        &self,
        port: Port,
        datagram: &Datagram<'_>,
        io: &mut Io<'_, S>,
    ) -> ConnectOptions {
        let Datagram { dscp, hop_limit, .. } = datagram;
        let small = self.memory.is_short(port, &io.config.limits);
        if small {
            io.count(port, Counter::SmallBuffers);
        }
        // This is one hop of the way, unless the gateway is where it leads to.
        let is_traced = *hop_limit < TRACED_HOPS && !datagram.is_dns(io.config);
        let hop_limit = is_traced.then(|| hop_limit.saturating_sub(1).max(1));
        let buffers = small.then_some(SMALL_SOCKET_BUFFER);
        ConnectOptions { dscp: *dscp, hop_limit, buffers }
    }

    /// Adds a flow. There is space for it.
    fn insert<S: Sockets<Socket = T>>(
        &mut self,
        flow: Flow<T>,
        io: &mut Io<'_, S>,
    ) -> Option<FlowId> {
        let port = flow.key.port;
        io.count(port, Counter::TcpOpened);
        let id = self.flows.insert(flow).ok()?;
        self.wheel.grow(self.flows.places());
        self.memory.grow(port);
        let state = io.ports.get(port);
        (state.flows, state.half_open) = (state.flows + 1, state.half_open + 1);
        let flows = state.flows;
        (io.ports.flows, io.ports.half_open) = (io.ports.flows + 1, io.ports.half_open + 1);
        // So that the lists do not grow while packets pass.
        let index = port.0 as usize;
        if index >= self.waiting.len() {
            self.waiting.resize_with(index + 1, VecDeque::new);
        }
        let lingering = TIME_WAIT_FLOWS.min(self.lingering);
        reserve(&mut self.waiting[index], flows + lingering);
        reserve(&mut self.ready, self.flows.len());
        self.settle(id, (false, false), io);
        Some(id)
    }

    /// Calls `f` with a flow, and then brings what depends on the flow in line with it.
    fn with<S: Sockets<Socket = T>, R>(
        &mut self,
        id: FlowId,
        io: &mut Io<'_, S>,
        f: impl FnOnce(&mut Flow<T>, &mut Io<'_, S>, &mut Memory) -> R,
    ) -> Option<R> {
        let flow = self.flows.get_mut(id)?;
        let before = (flow.counts(), flow.is_half_open());
        let result = f(flow, io, &mut self.memory);
        let after = (flow.counts(), flow.is_half_open());
        if before != after {
            self.account(id, before, after, io);
        }
        self.settle(id, after, io);
        Some(result)
    }

    /// Counts a flow that has moved on.
    fn account<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        before: (bool, bool),
        after: (bool, bool),
        io: &mut Io<'_, S>,
    ) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let less = (usize::from(before.0 && !after.0), usize::from(before.1 && !after.1));
        let state = io.ports.get(flow.key.port);
        (state.flows, state.half_open) = (state.flows - less.0, state.half_open - less.1);
        io.ports.flows -= less.0;
        io.ports.half_open -= less.1;
        if before.0 && !after.0 {
            if flow.forward != 0 {
                let forward = &mut self.forwards[usize::from(flow.forward)];
                forward.flows -= 1;
                forward.carried.add(&flow.carried());
            }
            if flow.phase != Phase::Closed && self.lingering == TIME_WAIT_FLOWS {
                flow.phase = Phase::Closed;
            }
            self.lingering += 1;
        }
    }

    /// Removes a flow that is closed. Sets the timer of another, and puts it into its lists.
    fn settle<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        (counts, _): (bool, bool),
        io: &mut Io<'_, S>,
    ) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let port = flow.key.port.0 as usize;
        if flow.phase == Phase::Closed {
            let (queued, waiting) = (flow.queued, flow.waiting);
            self.wheel.clear(id.index);
            self.flows.remove(id);
            debug_assert!(!counts, "a closed flow has no socket");
            self.lingering -= 1;
            if queued {
                self.ready.retain(|&other| other != id);
            }
            if waiting {
                self.waiting[port].retain(|&other| other != id);
            }
            return;
        }
        if std::mem::take(&mut flow.refused) {
            if !flow.waiting {
                flow.waiting = true;
                self.waiting[port].push_back(id);
            }
            flow.look_at = io.now + REFUSED_LOOK;
        }
        if flow.unfinished && !flow.queued {
            flow.queued = true;
            self.ready.push_back(id);
        }
        let deadline = flow.deadline();
        if deadline > 0 && (flow.timer_at == 0 || deadline < flow.timer_at) {
            flow.timer_at = deadline;
            self.wheel.set(id.index, deadline);
        }
    }

    /// A socket has become ready.
    pub(crate) fn on_ready<S: Sockets<Socket = T>>(
        &mut self,
        id: FlowId,
        readiness: Readiness,
        io: &mut Io<'_, S>,
    ) {
        self.with(id, io, |flow, io, memory| flow.on_ready(readiness, io, memory));
    }

    /// A port takes frames again.
    pub(crate) fn on_space<S: Sockets<Socket = T>>(&mut self, port: Port, io: &mut Io<'_, S>) {
        let index = port.0 as usize;
        let count = self.waiting.get(index).map_or(0, VecDeque::len);
        for _ in 0..count {
            if io.out.space(port) == 0 {
                break;
            }
            let Some(id) = self.waiting[index].pop_front() else { break };
            self.with(id, io, |flow, io, memory| {
                flow.waiting = false;
                match flow.phase {
                    Phase::Resetting => flow.reset_guest(io, memory, Ending::Reset),
                    _ => flow.finish(&Run::new(), io, memory),
                }
            });
        }
    }

    /// Handles what is due.
    pub(crate) fn on_time<S: Sockets<Socket = T>>(&mut self, io: &mut Io<'_, S>) {
        while let Some(index) = self.wheel.expired(io.now) {
            let Some(id) = self.flows.at(index) else { continue };
            self.with(id, io, |flow, io, memory| {
                flow.timer_at = 0;
                flow.on_time(io, memory);
            });
        }
    }

    /// A flow that has more to do when it has its turn, and its port. Give it one with
    /// [`resume`](Self::resume).
    pub(crate) fn take_unfinished(&mut self) -> Option<(Port, FlowId)> {
        while let Some(id) = self.ready.pop_front() {
            if let Some(port) = self.port_of(id) {
                return Some((port, id));
            }
        }
        None
    }

    /// Goes on with a flow that had more to do.
    pub(crate) fn resume<S: Sockets<Socket = T>>(&mut self, id: FlowId, io: &mut Io<'_, S>) {
        self.with(id, io, |flow, io, memory| {
            flow.queued = false;
            flow.finish(&Run::new(), io, memory);
        });
    }

    /// The port of a flow, if there is such a flow.
    pub(crate) fn port_of(&self, id: FlowId) -> Option<Port> {
        self.flows.peek(id).map(|flow| flow.key.port)
    }

    /// When [`on_time`](Self::on_time) is next to be called.
    pub(crate) fn deadline(&self, now: u64) -> Option<u64> {
        if self.ready.is_empty() { self.wheel.next() } else { Some(now) }
    }

    /// Ends all flows, or those of one port, with a reset on both sides if the port is still there.
    pub(crate) fn close<S: Sockets<Socket = T>>(
        &mut self,
        port: Option<Port>,
        tell_guest: bool,
        io: &mut Io<'_, S>,
    ) {
        let is_one = |key: &Key| port.is_none_or(|port| port == key.port);
        self.close_where(is_one, tell_guest, io);
    }

    /// Ends the flows whose guest is one of these, with a reset on both sides if the port is still there.
    pub(crate) fn close_where<S: Sockets<Socket = T>>(
        &mut self,
        is_one: impl Fn(&Key) -> bool,
        tell_guest: bool,
        io: &mut Io<'_, S>,
    ) {
        for index in 0..self.flows.places() as u32 {
            let Some(id) = self.flows.at(index) else { continue };
            self.with(id, io, |flow, io, memory| {
                if !is_one(&flow.key) {
                    return;
                }
                io.count(flow.key.port, Counter::PortGone);
                if tell_guest && flow.counts() {
                    flow.reset_guest(io, memory, Ending::Reset);
                } else {
                    flow.end_socket(io, memory, Ending::Reset);
                }
                flow.phase = Phase::Closed;
            });
        }
    }
}

/// Makes room for so many, and for a few more, but not for twice as many.
fn reserve<E>(list: &mut VecDeque<E>, len: usize) {
    if len > list.capacity() {
        list.reserve_exact(len + len / 8 + 8 - list.len());
    }
}

/// The key of a flow from a peer to a guest.
pub(crate) fn key(port: Port, guest: SocketAddr, remote: SocketAddr) -> Key {
    Key { port, guest: guest.into(), remote: remote.into() }
}
