//! The translator: frames of guests in, frames for guests out, sockets in between.

use core::fmt;
use core::net::{IpAddr, SocketAddr};
use core::time::Duration;

use vmring_core::offload::OffloadHeader;

use crate::config::NatConfig;
use crate::cost::Metered;
use crate::datagram::{DatagramFlow, Datagrams, Packets};
use crate::dns::Dns;
use crate::dns::names::Names;
use crate::dns::resolvers::Resolvers;
use crate::forward::{ForwardError, ForwardInfo, ForwardRule, Forwards};
use crate::icmp::Reason;
use crate::io::Io;
use crate::limits::{BATCH, COST_EVENT, COST_FRAME, MAX_PORTS, SCRATCH_LEN, TURN_COST};
use crate::output::{Output, Port};
use crate::packet::Datagram;
use crate::policy::rules::PolicyRules;
use crate::policy::sources::{Guest, Sources};
use crate::policy::{Policy, Protocol};
use crate::ports::Ports;
use crate::sockets::{Kind, Readiness, Sockets, Token};
use crate::stats::{Counter, Counters};
use crate::tcp::{self, Batch, FlowInfo, Tcp};
use crate::turns::{Due, Turns};

// IP's numbers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// The holder of the turns of port forwards' sockets, which are no port's of the network.
const WORLD: Port = Port(MAX_PORTS as u32);

/// A frame of a guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestFrame<'f> {
    /// The frame, from its Ethernet header on.
    pub bytes: &'f [u8],
    /// What the guest has left to others. A checksum that it left out is not needed, and a packet that
    /// it left to be cut is sent as it is.
    pub header: OffloadHeader,
}

/// The settings with which a translator decides and limits, and the memory that all flows share.
struct Shared {
    policy: Box<dyn Policy + Send>,
    sources: Sources,
    addresses_at: u64,
    dns: Dns,
    config: NatConfig,
    ports: Ports,
    scratch: Box<[u8]>,
}

/// What translates each protocol.
struct Flows<'a, T> {
    tcp: &'a mut Tcp<T>,
    datagrams: &'a mut Datagrams<T>,
    forwards: &'a mut Forwards<T>,
}

/// Translates the flows of all guests of a network onto sockets of the host.
///
/// It makes no system call and reads no clock. Its caller passes the time, which starts anywhere and
/// never goes back, and tells it of frames, of sockets that are ready, of ports that take frames
/// again, and of the time that it asked for.
///
/// # Turns
///
/// A caller that serves several ports asks whose turn it is: [`next_port`](Self::next_port), with the ports
/// whose frames wait. It then calls [`on_turn`](Self::on_turn) and gives the translator a batch of that
/// port's frames. What is ready it tells by [`note_ready`](Self::note_ready), and the time by
/// [`on_timers`](Self::on_timers). So each port that has work gets an equal share of the translator's
/// time, by what the work costs. A caller with one port may call [`on_ready`](Self::on_ready) and
/// [`on_time`](Self::on_time) instead, which do everything at once.
///
/// See the [crate] for an example.
pub struct Nat<S: Sockets> {
    // The flows first: dropping them closes their sockets, of which `sockets` may keep a list.
    tcp: Tcp<S::Socket>,
    datagrams: Datagrams<S::Socket>,
    forwards: Forwards<S::Socket>,
    sockets: Metered<S>,
    turns: Turns,
    shared: Shared,
}

impl<S: Sockets + fmt::Debug> fmt::Debug for Nat<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tcp_flows, tcp_sockets) = self.tcp.usage();
        let (datagram_flows, datagram_sockets) = self.datagrams.usage();
        f.debug_struct("Nat")
            .field("sockets", &self.sockets.sockets)
            .field("tcp_flows", &tcp_flows)
            .field("datagram_flows", &datagram_flows)
            .field("descriptors", &(tcp_sockets + datagram_sockets + self.forwards.descriptors()))
            .field("counters", &self.shared.ports.counters)
            .finish_non_exhaustive()
    }
}

fn micros(now: Duration) -> u64 {
    // Far from the end of the numbers, so that sums do not overflow.
    now.as_micros().min(1 << 62) as u64
}

impl<S: Sockets> Nat<S> {
    /// A translator that lets guests into the outside world only: [`PolicyRules`] without a rule.
    pub fn new(config: NatConfig, sockets: S, now: Duration) -> Self {
        let policy = PolicyRules::new([config.subnet_v4, config.subnet_v6]);
        Self::with_policy(config, sockets, Box::new(policy), now)
    }

    /// A translator that asks `policy` about each new flow.
    pub fn with_policy(
        config: NatConfig,
        sockets: S,
        policy: Box<dyn Policy + Send>,
        now: Duration,
    ) -> Self {
        let tcp = Tcp::new(config.limits.flows, sockets.capabilities(), micros(now));
        let limits = (config.limits.udp_flows, config.limits.echo_flows);
        let datagrams = Datagrams::new(limits, sockets.capabilities(), micros(now));
        let ports = Ports::new(config.limits);
        let scratch = vec![0; SCRATCH_LEN].into();
        let subnets = [config.subnet_v4, config.subnet_v6];
        let sources = Sources::new(subnets, [config.gateway_v4.into(), config.gateway_v6.into()]);
        let most = config.limits.dns_pending;
        let dns = Dns::new(subnets, config.resolvers.clone(), most, micros(now));
        let shared = Shared { policy, sources, addresses_at: 0, dns, config, ports, scratch };
        let (sockets, turns) = (Metered::new(sockets), Turns::default());
        Self { tcp, datagrams, forwards: Forwards::new(), sockets, turns, shared }
    }

    /// The flows, and what they need.
    fn parts<'a>(
        &'a mut self,
        now: Duration,
        out: &'a mut dyn Output,
    ) -> (Flows<'a, S::Socket>, Io<'a, Metered<S>>) {
        let Shared { policy, sources, addresses_at, dns, config, ports, scratch } =
            &mut self.shared;
        let sockets = &mut self.sockets;
        let now = micros(now);
        let policy = &mut **policy;
        let (tcp, datagrams) = (&mut self.tcp, &mut self.datagrams);
        (ports.tcp_descriptors, ports.tcp_kernel) = (tcp.usage().1, tcp.kernel_memory());
        let io =
            Io { sockets, policy, sources, addresses_at, dns, config, ports, scratch, out, now };
        (Flows { tcp, datagrams, forwards: &mut self.forwards }, io)
    }

    /// Handles frames that a port's guest has sent to the gateway for others. All frames of a batch
    /// are used up. Their data is sent in one call for each flow, and acknowledged once.
    ///
    /// Up to [`BATCH`] frames are handled together; more are several batches.
    ///
    /// # Panics
    ///
    /// If the port's number is not less than [`MAX_PORTS`].
    pub fn from_guest(
        &mut self,
        port: Port,
        frames: &[GuestFrame<'_>],
        now: Duration,
        out: &mut dyn Output,
    ) {
        let before = self.cost();
        let (Flows { tcp, datagrams, .. }, mut io) = self.parts(now, out);
        for frames in frames.chunks(BATCH) {
            io.ports.spent += COST_FRAME * frames.len() as u64;
            io.ports.count_n(port, Counter::Frames, frames.len() as u64);
            let (mut batch, mut packets) = (Batch::new(), Packets::new());
            for frame in frames {
                if let Err(why) = sort(port, frame, &mut batch, &mut packets, &mut io) {
                    io.count(port, why);
                }
            }
            tcp.handle(&batch, &mut io);
            io.ports.tcp_descriptors = tcp.usage().1;
            datagrams.handle(&packets, &mut io);
        }
        self.turns.charge(port, self.cost() - before);
    }

    /// What everything has cost, in units of the table of prices ([`limits`](crate::limits)). It only
    /// grows.
    pub fn cost(&self) -> u64 {
        self.sockets.spent + self.shared.ports.spent
    }

    /// The port whose turn it is, of those that have something to do: `waiting` are the ports with frames
    /// for the translator, and those to whose sockets something is due come on top. It is the one that
    /// has cost least. `None` if there is none.
    ///
    /// Sockets that belong to no port of the network, such as a port forward's, have turns too. Then this
    /// is a number that no port has.
    pub fn next_port(&mut self, waiting: impl Iterator<Item = Port>) -> Option<Port> {
        while let Some((port, id)) = self.tcp.take_unfinished() {
            let due = Due { readiness: None, unfinished: true };
            self.turns.add(port, Token::new(Kind::Tcp, id), due);
        }
        while let Some((port, id)) = self.datagrams.take_unfinished() {
            let due = Due { readiness: None, unfinished: true };
            self.turns.add(port.unwrap_or(WORLD), Token::new(Kind::Datagrams, id), due);
        }
        self.turns.next(waiting)
    }

    /// Notes that a socket has become ready. It has its turn with its port.
    pub fn note_ready(&mut self, token: Token, readiness: Readiness) {
        let due = Due { readiness: Some(readiness), unfinished: false };
        self.turns.add(self.port_of(token), token, due);
    }

    /// Whether something is due to a socket: it is somebody's turn.
    pub fn has_due(&self) -> bool {
        self.turns.due() > 0
    }

    /// Handles sockets of the port that has the turn, until they are all served or the turn has cost
    /// enough.
    pub fn on_turn(&mut self, port: Port, now: Duration, out: &mut dyn Output) {
        let before = self.cost();
        while self.cost() - before < TURN_COST && self.serve(port, now, out) {}
    }

    /// Handles one socket of a port, if something is due to one.
    fn serve(&mut self, port: Port, now: Duration, out: &mut dyn Output) -> bool {
        let Some((token, due)) = self.turns.take(port) else { return false };
        if let Some(readiness) = due.readiness {
            self.on_ready(token, readiness, now, out);
        }
        if due.unfinished {
            let before = self.cost();
            let (Flows { tcp, datagrams, .. }, mut io) = self.parts(now, out);
            match token.split() {
                Some((Kind::Tcp, id)) => tcp.resume(id, &mut io),
                Some((Kind::Datagrams, id)) => datagrams.resume(id, &mut io),
                _ => {}
            }
            self.turns.charge(port, self.cost() - before);
        }
        true
    }

    /// The port of a socket's flows.
    fn port_of(&self, token: Token) -> Port {
        let port = match token.split() {
            Some((Kind::Tcp, id)) => self.tcp.port_of(id),
            Some((Kind::Datagrams, id)) => self.datagrams.port_of(id),
            _ => None,
        };
        port.unwrap_or(WORLD)
    }

    /// Handles a socket that has become ready, at once. A token of a socket that is gone is ignored.
    pub fn on_ready(
        &mut self,
        token: Token,
        readiness: Readiness,
        now: Duration,
        out: &mut dyn Output,
    ) {
        let (port, before) = (self.port_of(token), self.cost());
        let (Flows { tcp, datagrams, forwards }, mut io) = self.parts(now, out);
        io.ports.spent += COST_EVENT;
        match token.split() {
            Some((Kind::Tcp, id)) => tcp.on_ready(id, readiness, &mut io),
            Some((Kind::Datagrams, id)) => datagrams.on_ready(id, readiness, &mut io),
            Some((Kind::Forward, id)) => forwards.on_ready(id, tcp, &mut io),
            None => {}
        }
        self.turns.charge(port, self.cost() - before);
    }

    /// Says that a port takes frames again, after it has refused one.
    pub fn on_space(&mut self, port: Port, now: Duration, out: &mut dyn Output) {
        let before = self.cost();
        let (Flows { tcp, datagrams, .. }, mut io) = self.parts(now, out);
        tcp.on_space(port, &mut io);
        datagrams.on_space(port, &mut io);
        self.turns.charge(port, self.cost() - before);
    }

    /// Handles what is due, and returns the time of the next call: at once if it is not later than
    /// `now`, or none if nothing is to come. Call it after each round of the other calls.
    pub fn on_time(&mut self, now: Duration, out: &mut dyn Output) -> Option<Duration> {
        self.on_timers(now, out);
        let mut turn = self.next_port(core::iter::empty());
        // What is due again after its turn waits for the next call.
        for _ in 0..self.turns.due() {
            let Some(port) = turn else { break };
            self.serve(port, now, out);
            turn = self.next_port(core::iter::empty());
        }
        self.deadline(now)
    }

    /// [`on_time`](Self::on_time) without the sockets that wait for their turn.
    pub fn on_timers(&mut self, now: Duration, out: &mut dyn Output) -> Option<Duration> {
        let (Flows { tcp, datagrams, forwards }, mut io) = self.parts(now, out);
        tcp.on_time(&mut io);
        datagrams.on_time(&mut io);
        forwards.on_time(tcp, &mut io);
        self.deadline(now)
    }

    /// When [`on_timers`](Self::on_timers) is next to be called, or somebody has a turn.
    fn deadline(&self, now: Duration) -> Option<Duration> {
        if self.turns.due() > 0 {
            return Some(now);
        }
        let now = micros(now);
        let deadlines = [
            self.tcp.deadline(now),
            self.datagrams.deadline(now),
            self.shared.dns.deadline(),
            self.forwards.deadline(),
        ];
        deadlines.into_iter().flatten().min().map(Duration::from_micros)
    }

    /// Gives a guest a connection that a peer has made to the host. The guest gets SYN from `source`,
    /// which is its peer from then on; `from` is where the socket is connected to. The connection is
    /// reset if the guest does not answer or refuses it.
    ///
    /// # Errors
    ///
    /// Why the flow was not opened. The peer got a reset.
    #[allow(clippy::too_many_arguments)]
    pub fn accept_tcp(
        &mut self,
        socket: S::Socket,
        from: SocketAddr,
        port: Port,
        guest: (SocketAddr, [u8; 6]),
        source: SocketAddr,
        now: Duration,
        out: &mut dyn Output,
    ) -> Result<(), Counter> {
        let (Flows { tcp, .. }, mut io) = self.parts(now, out);
        tcp.accept(socket, from, (tcp::key(port, guest.0, source), guest.1), 0, &mut io)
    }

    /// Ends the flows of a port that has left the network. Their peers get resets. The port's number
    /// may be another's afterwards.
    pub fn port_left(&mut self, port: Port, now: Duration, out: &mut dyn Output) {
        let (Flows { tcp, datagrams, .. }, mut io) = self.parts(now, out);
        tcp.close(Some(port), false, &mut io);
        datagrams.close(Some(port), &mut io);
        io.ports.forget(port);
        io.dns.port_left(port);
        io.sources.port_left(port);
        self.turns.forget(port);
    }

    /// Forwards a port of the host to a guest, or a range of ports: all of them or none. Returns the
    /// address and the port that the first is listened at.
    ///
    /// The guest sees the peer's own address, unless that is no place in the world, as loopback is: such
    /// a peer has the gateway's address. A guest need not be there yet.
    ///
    /// # Errors
    ///
    /// Why not. Nothing has changed then.
    pub fn add_forward(
        &mut self,
        rule: &ForwardRule,
        now: Duration,
        out: &mut dyn Output,
    ) -> Result<SocketAddr, ForwardError> {
        let (Flows { tcp, datagrams, forwards }, mut io) = self.parts(now, out);
        forwards.add(rule, tcp, datagrams, &mut io)
    }

    /// Removes the forward of a port at an address of the host. Connections of TCP that have come through
    /// it stay, unless `cut` is set. Flows of UDP end with it. Returns whether there was one.
    pub fn remove_forward(
        &mut self,
        protocol: Protocol,
        at: SocketAddr,
        cut: bool,
        now: Duration,
        out: &mut dyn Output,
    ) -> bool {
        let (Flows { tcp, datagrams, forwards }, mut io) = self.parts(now, out);
        let Some((guest, port)) = forwards.remove(protocol, at, tcp, datagrams, &mut io) else {
            return false;
        };
        if cut && protocol == Protocol::Tcp {
            let address = match guest {
                Guest::Address(address) => Some(address),
                Guest::Mac(_) => io.sources.resolve(guest, at.is_ipv4()).map(|found| found.2),
            };
            let is_one = |key: &tcp::Key| {
                key.guest.port() == port && address.is_some_and(|ip| ip == key.guest.ip())
            };
            tcp.close_where(is_one, true, &mut io);
        }
        true
    }

    /// Where the port forwards listen, in no particular order.
    pub fn forward_places(&self) -> impl Iterator<Item = (Protocol, SocketAddr)> + '_ {
        self.forwards.places_of_all()
    }

    /// The guest of each port forward, in no particular order.
    pub fn forward_guests(&self) -> impl Iterator<Item = Guest> + '_ {
        self.forwards.guests()
    }

    /// Ends the flows of UDP that have a port of the host which a forward is to have, at any address of the
    /// host. A guest's next datagram has another port.
    pub fn give_up_port(&mut self, port: u16, now: Duration, out: &mut dyn Output) {
        let (Flows { datagrams, .. }, mut io) = self.parts(now, out);
        datagrams.give_up_port(port, &mut io);
    }

    /// The port forwards, in no particular order.
    pub fn forwards(&self) -> impl Iterator<Item = ForwardInfo> + '_ {
        self.forwards.infos(&self.tcp, &self.datagrams)
    }

    /// Ends all flows and all forwards. Guests and peers get resets.
    pub fn close(&mut self, now: Duration, out: &mut dyn Output) {
        let (Flows { tcp, datagrams, forwards }, mut io) = self.parts(now, out);
        tcp.close(None, true, &mut io);
        forwards.close(tcp, datagrams, &mut io);
        datagrams.close(None, &mut io);
    }

    /// Which guest each address belongs to. Tell it of leases and reservations, and by
    /// [`check`](Sources::check) of what guests say of their addresses in ARP and neighbour discovery.
    pub fn sources(&mut self) -> &mut Sources {
        &mut self.shared.sources
    }

    /// Asks this handle whose an address is from now on, which several translators of one network share. What
    /// this one knew of addresses is forgotten.
    pub fn share_sources(&mut self, sources: Sources) {
        self.shared.sources = sources;
    }

    /// The names that the network answers for itself. Tell it of the host, of the gateway and of leases.
    pub fn names_mut(&mut self) -> &mut Names {
        &mut self.shared.dns.names
    }

    /// Counts that a port's guest did not get the name that it calls itself ([`Names::lease`]).
    ///
    /// # Panics
    ///
    /// If the port's number is not less than [`MAX_PORTS`].
    pub fn count_refused_name(&mut self, port: Port) {
        self.shared.ports.count(port, Counter::NameRefused);
    }

    /// The names that the network answers for itself.
    pub fn names(&self) -> &Names {
        &self.shared.dns.names
    }

    /// Asks other resolvers from now on. With [`Resolvers::Host`], the host's are read with the next query.
    /// Flows to a resolver that is not asked any more end with the guest's next query.
    pub fn set_resolvers(&mut self, resolvers: Resolvers) {
        self.shared.dns.set_source(resolvers);
    }

    /// Where the resolvers come from.
    pub fn resolvers(&self) -> &Resolvers {
        self.shared.dns.source()
    }

    /// The resolvers that are asked, as they were last read: none before the first query if they are the
    /// host's.
    pub fn current_resolvers(&self) -> &[SocketAddr] {
        self.shared.dns.list()
    }

    /// Decides about new flows by another policy from now on. Flows that are open stay open.
    pub fn set_policy(&mut self, policy: Box<dyn Policy + Send>) {
        self.shared.policy = policy;
        self.shared.addresses_at = 0;
    }

    /// What was counted for all ports.
    pub fn counters(&self) -> Counters {
        self.shared.ports.counters
    }

    /// What was counted for one port since it came.
    pub fn port_counters(&self, port: Port) -> Counters {
        self.shared.ports.counters_of(port)
    }

    /// The flows of TCP that are open or being opened, in no particular order.
    pub fn tcp_flows(&self) -> impl Iterator<Item = FlowInfo> + '_ {
        self.tcp.infos()
    }

    /// The flows of UDP and ICMP echo, in no particular order.
    pub fn datagram_flows(&self) -> impl Iterator<Item = DatagramFlow> + '_ {
        self.datagrams.infos()
    }

    /// How many entries the tables of flows have, with those that wait for late segments, and how many
    /// descriptors are open.
    pub fn usage(&self) -> (usize, usize) {
        let (tcp, datagrams) = (self.tcp.usage(), self.datagrams.usage());
        (tcp.0 + datagrams.0, tcp.1 + datagrams.1 + self.forwards.descriptors())
    }

    /// The sockets.
    pub fn sockets(&mut self) -> &mut S {
        &mut self.sockets.sockets
    }
}

/// Reads a frame, and puts it where its protocol is translated.
fn sort<'f, S: Sockets>(
    port: Port,
    frame: &GuestFrame<'f>,
    batch: &mut Batch<'f>,
    packets: &mut Packets<'f>,
    io: &mut Io<'_, S>,
) -> Result<(), Counter> {
    let datagram = Datagram::parse(frame.bytes)?;
    // What is for the gateway goes no further, so its hop limit is enough.
    if datagram.hop_limit <= 1 && !datagram.is_dns(io.config) {
        io.send_error_about(port, Reason::HopLimit, &datagram);
        return Err(Counter::HopLimit);
    }
    if let IpAddr::V6(source) = datagram.source
        && source.is_unicast_link_local()
    {
        // No router forwards it (RFC 4291, 2.5.6), and the guest is told (RFC 4443, 3.1).
        io.send_error_about(port, Reason::Scope, &datagram);
        return Err(Counter::BadSource);
    }
    match datagram.protocol {
        TCP => Tcp::<S::Socket>::gather(port, datagram, batch),
        UDP => packets.add_udp(port, datagram, &frame.header),
        ICMP if datagram.source.is_ipv4() => packets.add_echo(port, datagram),
        ICMPV6 if datagram.source.is_ipv6() => packets.add_echo(port, datagram),
        _ => Err(Counter::Protocol),
    }
}
