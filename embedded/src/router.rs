//! The way to other networks: frames that guests send to the gateway for somebody beyond it, and
//! frames that come back.
//!
//! A [`Network`](crate::Network) forwards between its ports and knows no other network. If its
//! [configuration](crate::NetworkConfig::router) says that it has a router, and its owner has set one
//! ([`Network::set_router`](crate::Network::set_router)), the gateway keeps ARP, DHCP and ICMP echo to
//! itself, and gives the router what is for others: [`RouterEnd`], which one thread drives.
//!
//! # Towards the router
//!
//! Each port has an [`Inbox`] of its own, an outbox, in which [`ROUTER_FRAMES`] frames wait for the
//! router, and a few more before it has begun. The frames that the router is at work on have buffers
//! besides these, because what it sends to a guest meanwhile makes that guest send more. A sender copies
//! a frame there as into any other port's: without a lock, an allocation or a system call. When it
//! flushes, it notes in a set of ports that the outbox has something, and wakes the router if that
//! sleeps, once per batch. A port whose outbox is full loses its own frames and nobody else's. They are
//! counted.
//!
//! The router takes a few frames of one port, then of the next ([`RouterEnd::receive`]), so that the
//! ports have equal shares of it. One that knows better what the frames of each port cost chooses the port
//! itself ([`RouterEnd::receive_from`]).
//!
//! The first frame for another network starts the router, on the thread of its sender.
//!
//! # Several workers
//!
//! A router can have several ends ([`NetworkConfig::router_workers`](crate::NetworkConfig::router_workers)),
//! each with a thread of its own, a worker. They share nothing that a packet needs: each port has an
//! outbox for each worker, and each worker has its own doorbell and its own list of ports. The sender
//! chooses the worker by a keyed hash of the protocol and of the guest's own port, or of its ICMP
//! identifier (`router/worker.rs`). So everything that a guest sends from one of its ports comes to one
//! worker, whomever it goes to, and what comes in for that port is with the same worker
//! ([`Network::router_worker`](crate::Network::router_worker)). Packets without a port go to the first one.
//!
//! Over IPv6, packets from and to link-local addresses stay with the gateway, and so do those to groups.
//!
//! # Towards guests
//!
//! [`RouterEnd::send`] copies a frame straight into a buffer that a port's guest has posted, with an
//! offload header. What the guest's receiver does not accept undone is done before, as between ports. A
//! port that takes no frame says so, and the router keeps it.
//!
//! # Ports that come and leave
//!
//! The number of a port that has left may be another's. The router is told in order which port has left
//! and which has come ([`RouterEnd::look`]). What it sends to a port that has left reaches nobody.

mod worker;

use core::any::Any;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam_utils::CachePadded;
use macaddr::MacAddr6;
use smoltcp::wire::{DHCP_SERVER_PORT, EthernetProtocol, IpProtocol};
use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::offload::{self, OffloadHeader, Offloads};
use vmring_core::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::clock::Clock;
use crate::frame;
use crate::gateway::{DHCPV6_SERVER_PORT, Gateway};
use crate::inbox::{Collected, Collector, Delivery, Inbox, PortWake, Refused};
use crate::limits::{
    LARGE_PACKET, MAX_PORTS, QUEUES_MAX, ROUTER_BATCH, ROUTER_FRAMES, ROUTER_OVERFLOW, VLAN_TAG_LEN,
};
use crate::packet::{Packet, PacketBuffer};
use crate::policy::{Moment, Way};
use crate::port_state::PortState;
use crate::receive_queue::{Shape, Touched};
use crate::software::Left;
use crate::work::Work;

/// More than the bytes of a message of neighbour discovery of the gateway: its headers, a prefix, an MTU, an
/// address and three name servers.
pub(crate) const DISCOVERY_MAX: usize = 256;
/// The 64-bit words of a set of ports.
const WORDS: usize = MAX_PORTS / 64;

/// Takes what guests send to other networks; see the [module](self).
pub trait Router<B>: Send + Sync {
    /// Starts a thread that drives `end`, because the first frame for another network has come, or because
    /// [`Network::start_router`](crate::Network::start_router) was called. It is called for each worker of
    /// the router ([`RouterEnd::worker`]), and the calls for several may overlap. It is called again if the
    /// thread has dropped `end`, or if the call has failed; after a failure no earlier than a second later.
    ///
    /// # Errors
    ///
    /// If there is no such thread. Until the next attempt, the gateway answers what is for this worker that
    /// there is no way.
    fn start(&self, end: RouterEnd<B>) -> std::io::Result<()>;

    /// Ends all threads, because the network has ended. No other call is under way or follows. It is
    /// called on the thread that lets go of the network last.
    fn stop(&self);

    /// The router as whatever it is, for its owner.
    fn as_any(self: std::sync::Arc<Self>) -> std::sync::Arc<dyn Any + Send + Sync>;

    /// The ports of TCP and UDP at the gateway's own address that are the router's, each with the number of
    /// its protocol. They do not change.
    fn ports_of_gateway(&self) -> Vec<(u8, u16)> {
        Vec::new()
    }
}

/// Why a port did not take a frame from the router. It has no buffer posted and its overflow ring is
/// full, it is over its limit, or its receivers are closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the port takes no frame now")]
pub struct PortFull;

/// What a port takes from the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouterLink {
    /// The work that the port's open receivers accept undone.
    pub offloads: Offloads,
    /// The longest frame that they take, in bytes, without a tag.
    pub longest: usize,
}

/// The place where a router sleeps.
#[derive(Default)]
struct Sleeper(Mutex<Option<PortWake>>);

impl Park for Sleeper {
    /// Does nothing: the router sleeps by its own means.
    fn park(&self, _timeout: Option<Duration>) {}

    /// Runs once per wake-up, and never per packet.
    fn unpark(&self) {
        let wake = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(wake) = wake {
            wake();
        }
    }
}

/// A buffer of an outbox: an offload header and the bytes of a frame.
type OutboxBuffer = Box<[u8]>;

/// Where a port's senders put frames for the router's workers.
pub(crate) struct Outbox {
    first: Arc<Inbox<OutboxBuffer>>,
    /// Those of the workers after the first.
    others: Box<[Arc<Inbox<OutboxBuffer>>]>,
}

impl Outbox {
    /// Gives a packet to a worker of the router.
    #[inline]
    pub(crate) fn deliver(&self, worker: usize, packet: Packet<'_>) -> Delivery {
        let other = worker.checked_sub(1).and_then(|other| self.others.get(other));
        other.unwrap_or(&self.first).deliver_packet(packet)
    }
}

/// A port that joins.
pub(crate) struct NewPort<B> {
    pub(crate) number: u32,
    /// The generation of the port's state in which the port is there.
    pub(crate) generation: u32,
    pub(crate) mac: MacAddr6,
    pub(crate) is_uplink: bool,
    pub(crate) state: std::sync::Arc<PortState<B>>,
}

/// What the router has of a port.
pub(crate) struct PortEnd<B> {
    pub(crate) number: u32,
    /// The generation of the port's state in which the port is there.
    pub(crate) generation: u32,
    pub(crate) mac: MacAddr6,
    /// Behind the uplink are stations of another network, which have routers of their own.
    is_uplink: bool,
    pub(crate) state: std::sync::Arc<PortState<B>>,
    /// What a receiver is like that accepts all offloads of the port.
    pub(crate) shape: Shape,
    outbox: Collector<OutboxBuffer>,
    /// Buffers that take the places of those that the router is at work on, so that as many frames can
    /// wait as ever.
    spare: Vec<OutboxBuffer>,
    has_buffers: bool,
}

/// What a worker is told of ports, in order.
enum Event<B> {
    Joined(PortEnd<B>),
    /// The number of the port and its generation.
    Left(u32, u32),
}

/// No thread drives the router's end.
const IDLE: u32 = 0;
/// A thread drives it, or is about to.
const RUNNING: u32 = 1;

/// What a worker and the senders share.
struct Lane<B> {
    /// The ports that have put something into their outboxes since the worker looked.
    pending: [AtomicU64; WORDS],
    /// Whether `events` may have something.
    has_events: AtomicBool,
    events: Mutex<Vec<Event<B>>>,
    doorbell: Doorbell<Sleeper>,
    state: AtomicU32,
    /// The second in which the last attempt to start failed, plus one. 0 is never.
    failed_in: AtomicU32,
}

impl<B> Lane<B> {
    fn new() -> Self {
        Self {
            pending: core::array::from_fn(|_| AtomicU64::new(0)),
            has_events: AtomicBool::new(false),
            events: Mutex::new(Vec::new()),
            doorbell: Doorbell::new(Sleeper::default()),
            state: AtomicU32::new(IDLE),
            failed_in: AtomicU32::new(0),
        }
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event<B>>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to what the worker is told.
    fn tell(&self, event: Event<B>) {
        self.events().push(event);
        // Release: pairs with the Acquire in `RouterEnd::look`.
        self.has_events.store(true, Ordering::Release);
    }

    /// Whether an attempt to start has failed in this second, and there was none since.
    fn has_failed(&self, now: u32) -> bool {
        // Relaxed, both: these decide nothing about memory.
        self.failed_in.load(Ordering::Relaxed) == now.wrapping_add(1)
            && self.state.load(Ordering::Relaxed) == IDLE
    }

    /// Says that a port has left.
    fn port_left(&self, number: u32, generation: u32) {
        let mut events = self.events();
        // A worker that does not know it yet need not know it.
        let joined = |event: &Event<B>| matches!(event, Event::Joined(end) if end.number == number);
        if let Some(at) = events.iter().rposition(joined) {
            events.remove(at);
            return;
        }
        drop(events);
        self.tell(Event::Left(number, generation));
        self.doorbell.ring();
    }
}

/// What the router and the senders share.
struct Shared<B> {
    /// One for each worker, and at least one.
    lanes: Box<[CachePadded<Lane<B>>]>,
    /// Whether all ports of TCP and UDP at the gateway's address are the router's, but for DHCP.
    all_of_gateway: AtomicBool,
}

/// What a network has of its router.
pub(crate) struct RouterSide<B> {
    shared: std::sync::Arc<Shared<B>>,
    gateway: std::sync::Arc<Gateway>,
    clock: std::sync::Arc<dyn Clock>,
    flow_key: u64,
    /// The longest frame without a tag, and with one.
    max_untagged_size: usize,
    max_packet_size: usize,
    router: OnceLock<SetRouter<B>>,
}

/// The router, and what it has said of itself.
struct SetRouter<B> {
    router: std::sync::Arc<dyn Router<B>>,
    ports_of_gateway: Box<[(u8, u16)]>,
}

impl<B> RouterSide<B> {
    pub(crate) fn new(
        gateway: std::sync::Arc<Gateway>,
        clock: std::sync::Arc<dyn Clock>,
        flow_key: u64,
        workers: usize,
        max_untagged_size: usize,
        max_packet_size: usize,
    ) -> Self {
        let lanes = (0..workers.max(1)).map(|_| CachePadded::new(Lane::new())).collect();
        let shared = Shared { lanes, all_of_gateway: AtomicBool::new(false) };
        let (shared, router) = (std::sync::Arc::new(shared), OnceLock::new());
        Self { shared, gateway, clock, flow_key, max_untagged_size, max_packet_size, router }
    }

    /// Sets the router, unless there is one. Returns the one that there is.
    pub(crate) fn set(
        &self,
        router: std::sync::Arc<dyn Router<B>>,
    ) -> &std::sync::Arc<dyn Router<B>> {
        let make = || SetRouter { ports_of_gateway: router.ports_of_gateway().into(), router };
        &self.router.get_or_init(make).router
    }

    pub(crate) fn get(&self) -> Option<&std::sync::Arc<dyn Router<B>>> {
        self.router.get().map(|set| &set.router)
    }

    /// The worker of the router that a packet to the gateway's MAC address is for, or `None` if it is not
    /// the router's. `now` is in seconds.
    pub(crate) fn takes(&self, packet: &Packet<'_>, now: u32) -> Option<usize> {
        let SetRouter { ports_of_gateway, .. } = self.router.get()?;
        let lanes = &self.shared.lanes;
        if lanes.len() == 1 && lanes[0].has_failed(now) {
            return None;
        }
        let head = packet.head();
        let (header, ip) = frame::split(head).ok()?;
        let at = head.len() - ip.len();
        let is_ours = match header.ethertype {
            EthernetProtocol::Ipv4 => self.takes_v4(packet, ip, at, ports_of_gateway),
            EthernetProtocol::Ipv6 => self.takes_v6(packet, at, ports_of_gateway),
            _ => false,
        };
        if !is_ours || lanes.len() == 1 {
            return is_ours.then_some(0);
        }
        let worker = worker::of_packet(packet, at, self.flow_key, lanes.len());
        (!lanes[worker].has_failed(now)).then_some(worker)
    }

    /// [`takes`](Self::takes) for a packet of IPv4, whose header `ip` begins at byte `at`.
    fn takes_v4(
        &self,
        packet: &Packet<'_>,
        ip: &[u8],
        at: usize,
        ports_of_gateway: &[(u8, u16)],
    ) -> bool {
        // Without options these are the first 20 bytes of the header (RFC 791, 3.1).
        let Some(
            &[version, _, _, _, _, _, fragment, offset, _, protocol, _, _, _, _, _, _, to @ ..],
        ) = ip.first_chunk::<20>()
        else {
            return false;
        };
        let (to, dhcp) = (Ipv4Addr::from(to), self.gateway.dhcp().config());
        if to != self.gateway.address() {
            return !to.is_broadcast() && !to.is_multicast() && !dhcp.is_on_subnet(to);
        }
        let is_fragment = u16::from_be_bytes([fragment, offset]) & 0x3fff != 0;
        if is_fragment || !matches!(protocol.into(), IpProtocol::Tcp | IpProtocol::Udp) {
            return false;
        }
        let ports_at = at + usize::from(version & 0xf) * 4;
        let mut port = [0; 2];
        if packet.read_at(ports_at + 2, &mut port) < port.len() {
            return false;
        }
        let port = (protocol, u16::from_be_bytes(port));
        port != (u8::from(IpProtocol::Udp), DHCP_SERVER_PORT)
            && self.takes_port(port, ports_of_gateway)
    }

    /// [`takes`](Self::takes) for a packet of IPv6, whose header begins at byte `at`.
    fn takes_v6(&self, packet: &Packet<'_>, at: usize, ports_of_gateway: &[(u8, u16)]) -> bool {
        let Some(config) = self.gateway.ipv6() else { return false };
        // The first bytes do not show all of the addresses (RFC 8200, 3).
        let mut header = [0; 40];
        if packet.read_at(at, &mut header) < header.len() || header[0] >> 4 != 6 {
            return false;
        }
        let address = |at: usize| {
            let bytes = header[at..].first_chunk::<16>();
            bytes.map_or(Ipv6Addr::UNSPECIFIED, |bytes| Ipv6Addr::from(*bytes))
        };
        let (from, to) = (address(8), address(24));
        // No router forwards these (RFC 4291, 2.5.2 and 2.5.6). The gateway says so.
        if from.is_unspecified()
            || from.is_unicast_link_local()
            || to.is_unicast_link_local()
            || to.is_multicast()
        {
            return false;
        }
        if to != config.gateway() {
            return !config.contains(to);
        }
        let transport = worker::transport_v6(packet, header[6], at + header.len());
        let Some((protocol, at)) = transport else { return false };
        let mut port = [0; 2];
        if !matches!(protocol.into(), IpProtocol::Tcp | IpProtocol::Udp)
            || packet.read_at(at + 2, &mut port) < port.len()
        {
            return false;
        }
        let port = (protocol, u16::from_be_bytes(port));
        port != (u8::from(IpProtocol::Udp), DHCPV6_SERVER_PORT)
            && self.takes_port(port, ports_of_gateway)
    }

    /// Whether a port of TCP or UDP at the gateway's address is the router's.
    fn takes_port(&self, port: (u8, u16), ports_of_gateway: &[(u8, u16)]) -> bool {
        // Relaxed: it decides nothing about memory.
        self.shared.all_of_gateway.load(Ordering::Relaxed) || ports_of_gateway.contains(&port)
    }

    /// Says that a port has left. Nobody sends for it any more.
    pub(crate) fn port_left(&self, number: u32, generation: u32) {
        self.shared.lanes.iter().for_each(|lane| lane.port_left(number, generation));
    }

    /// The worker that has what a guest sends from one of its ports, or gets there.
    pub(crate) fn worker_of(&self, protocol: u8, port: u16) -> usize {
        match self.shared.lanes.len() {
            1 => 0,
            workers => worker::of_port(protocol, port, self.flow_key, workers),
        }
    }
}

impl<B: PacketBuffer> RouterSide<B> {
    /// Makes an outbox for a port that joins, and tells the router of the port.
    pub(crate) fn port_joined(&self, port: NewPort<B>, (shape, longest): (Shape, usize)) -> Outbox {
        let NewPort { number, generation, mac, is_uplink, state } = port;
        let join = |lane: &CachePadded<Lane<B>>| {
            let inbox = Arc::new(Inbox::with_headers(ROUTER_FRAMES, ROUTER_OVERFLOW, longest));
            let nobody: PortWake = std::sync::Arc::new(|| ());
            let outbox = Inbox::open(&inbox, nobody).expect("a new inbox has no collector");
            let (spare, has_buffers) = (Vec::new(), false);
            let state = std::sync::Arc::clone(&state);
            lane.tell(Event::Joined(PortEnd {
                number,
                generation,
                mac,
                is_uplink,
                state,
                shape,
                outbox,
                spare,
                has_buffers,
            }));
            inbox
        };
        let lanes = &self.shared.lanes;
        Outbox { first: join(&lanes[0]), others: lanes[1..].iter().map(join).collect() }
    }

    /// Tells workers of the router that a port's outbox has something for them, and starts the router if it
    /// does not run. `workers` has a bit for each of them. This comes after the frames were put there.
    pub(crate) fn ring(&self, number: usize, workers: u8) {
        let mut rest = workers;
        let mut is_idle = false;
        while rest != 0 {
            let lane = &self.shared.lanes[rest.trailing_zeros() as usize];
            // Release: pairs with the Acquire in `RouterEnd::look`.
            lane.pending[number / 64].fetch_or(1 << (number % 64), Ordering::Release);
            lane.doorbell.ring();
            // Relaxed: the exchange in `start` decides.
            is_idle |= lane.state.load(Ordering::Relaxed) == IDLE;
            rest &= rest - 1;
        }
        if is_idle {
            // The gateway refuses the next frames if it fails.
            let _ = self.start();
        }
    }

    /// Starts each worker of the router that does not run. Returns the first error, after it has tried all.
    #[cold]
    pub(crate) fn start(&self) -> std::io::Result<()> {
        let Some(router) = self.get() else { return Ok(()) };
        let mut all = Ok(());
        for (worker, lane) in self.shared.lanes.iter().enumerate() {
            // Acquire: pairs with the Release in `RouterEnd::drop`.
            let order = (Ordering::Acquire, Ordering::Relaxed);
            if lane.state.compare_exchange(IDLE, RUNNING, order.0, order.1).is_err() {
                continue;
            }
            let started = router.start(RouterEnd::new(self, worker));
            if let Err(error) = &started {
                tracing::warn!(%error, worker, "the network's router did not start");
            }
            all = all.and(started);
        }
        all
    }
}

/// Frames that a router has received from one port. It is used again and again; each place keeps its
/// memory.
#[derive(Default)]
pub struct RouterBatch {
    /// Whose frames these are: the port's number, and its generation.
    port: (u32, u32),
    frames: Vec<Collected<OutboxBuffer>>,
}

impl fmt::Debug for RouterBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterBatch")
            .field("port", &self.port.0)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl RouterBatch {
    /// A batch without frames, with space for as many as one has.
    pub fn new() -> Self {
        Self { port: (0, 0), frames: Vec::with_capacity(ROUTER_BATCH) }
    }

    /// How many frames there are, at most [`ROUTER_BATCH`].
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// The generation of the port that the frames are of. A port that joins later with the same number has
    /// a greater one.
    pub fn generation(&self) -> u32 {
        self.port.1
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// A frame, from its Ethernet header on, and what its sender has left to others. `None` if there are
    /// not so many.
    pub fn get(&self, index: usize) -> Option<(&[u8], OffloadHeader)> {
        let Collected { buffer, len, .. } = self.frames.get(index)?;
        let (header, bytes) = buffer.split_first_chunk::<{ offload::LEN }>()?;
        // The network has written it, so it can be read.
        let header = OffloadHeader::parse_ignoring_reserved(header).unwrap_or(OffloadHeader::NONE);
        Some((bytes.get(..*len)?, header))
    }
}

/// A worker's side of a network, which one thread drives; see the [module](self).
///
/// It keeps nothing of the network's ports there. If it is dropped before the network has ended, what
/// waits for it waits for the next one.
pub struct RouterEnd<B> {
    shared: std::sync::Arc<Shared<B>>,
    worker: usize,
    gateway: std::sync::Arc<Gateway>,
    clock: std::sync::Arc<dyn Clock>,
    flow_key: u64,
    max_untagged_size: usize,
    ports: Vec<Option<PortEnd<B>>>,
    /// The ports whose outboxes may have something.
    taken: [u64; WORDS],
    /// The port that has the next turn.
    turn: usize,
    /// The ports that got a frame since the last flush, and their queues that did.
    touched: [u64; WORDS],
    touched_queues: Box<[Touched]>,
    work: Work,
}

impl<B> fmt::Debug for RouterEnd<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = self.ports.iter().flatten().count();
        f.debug_struct("RouterEnd").field("ports", &ports).finish_non_exhaustive()
    }
}

impl<B> RouterEnd<B> {
    fn new(side: &RouterSide<B>, worker: usize) -> Self {
        let mut all = Offloads::ALL;
        all.virtio_header = true;
        let longest = LARGE_PACKET + ETHERNET_HEADER_LEN + VLAN_TAG_LEN;
        Self {
            shared: std::sync::Arc::clone(&side.shared),
            worker,
            gateway: std::sync::Arc::clone(&side.gateway),
            clock: std::sync::Arc::clone(&side.clock),
            flow_key: side.flow_key,
            max_untagged_size: side.max_untagged_size,
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            taken: [0; WORDS],
            turn: 0,
            touched: [0; WORDS],
            touched_queues: vec![Touched::default(); MAX_PORTS].into(),
            work: Work::new(&all, longest, side.max_packet_size),
        }
    }

    /// Which of the router's workers this is for, from 0 on.
    pub fn worker(&self) -> usize {
        self.worker
    }

    fn lane(&self) -> &Lane<B> {
        &self.shared.lanes[self.worker]
    }

    /// Sets what wakes the thread that drives this, from any thread. Call it first. It must not block.
    pub fn set_wake(&mut self, wake: PortWake) {
        let sleeper = self.lane().doorbell.parker();
        *sleeper.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }

    /// The network's gateway. Its DHCP server knows whose an address is.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// The time of the network's clock.
    pub fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Takes the ports of TCP and UDP at the gateway's address for the router, but for DHCP, or leaves
    /// them to the gateway, apart from [`Router::ports_of_gateway`].
    pub fn set_all_of_gateway(&self, all: bool) {
        // Relaxed: a sender that sees it late gives a frame to the other one.
        self.shared.all_of_gateway.store(all, Ordering::Relaxed);
    }

    /// The ports that are there, by number, each with the MAC address that the network has assigned to it.
    pub fn ports(&self) -> impl Iterator<Item = (u32, MacAddr6)> + '_ {
        self.ports.iter().flatten().map(|port| (port.number, port.mac))
    }

    /// The generation of a port that is there, as far as [`look`](Self::look) has found.
    pub fn generation(&self, port: u32) -> Option<u32> {
        Some(self.ports.get(port as usize)?.as_ref()?.generation)
    }

    /// Looks which ports have frames for this worker, and which have come and left. `left` is called with
    /// the number and the generation of each port that has left. [`receive`](Self::receive) returns no frame
    /// of it any more.
    pub fn look(&mut self, mut left: impl FnMut(u32, u32)) {
        let lane = &self.shared.lanes[self.worker];
        for (taken, pending) in self.taken.iter_mut().zip(&lane.pending) {
            // Relaxed: the exchange looks again.
            if pending.load(Ordering::Relaxed) != 0 {
                // Acquire: pairs with the Release in `RouterSide::ring`. What was told of a port before its
                // first frame is seen below.
                *taken |= pending.swap(0, Ordering::Acquire);
            }
        }
        // Acquire: pairs with the Release in `Lane::tell`.
        if !lane.has_events.load(Ordering::Relaxed)
            || !lane.has_events.swap(false, Ordering::Acquire)
        {
            return;
        }
        let events = core::mem::take(&mut *lane.events());
        for event in events {
            match event {
                Event::Joined(end) => {
                    let place = end.number as usize;
                    self.ports[place] = Some(end);
                }
                Event::Left(number, generation) => {
                    self.ports[number as usize] = None;
                    left(number, generation);
                }
            }
        }
    }

    /// The ports that may have frames for the router, as far as [`look`](Self::look) has found, by number.
    pub fn waiting(&self) -> impl Iterator<Item = u32> + '_ {
        self.taken.iter().enumerate().flat_map(|(word, &bits)| {
            let mut left = bits;
            core::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(word as u32 * 64 + bit)
            })
        })
    }

    /// Announces that the thread wants to sleep. Returns true if there is nothing to look at: the wake
    /// callback will be called once when that changes. Call [`disarm`](Self::disarm) after the sleep.
    pub fn arm(&mut self) -> bool {
        let lane = self.lane();
        lane.doorbell.arm();
        let is_idle = self.taken.iter().all(|word| *word == 0)
            && lane.pending.iter().all(|word| word.load(Ordering::Relaxed) == 0)
            && !lane.has_events.load(Ordering::Relaxed);
        if !is_idle {
            self.disarm();
        }
        is_idle
    }

    /// Says that the thread is awake.
    pub fn disarm(&mut self) {
        self.lane().doorbell.disarm();
    }

    /// The next port in turn that may have something.
    fn next(&mut self) -> Option<usize> {
        let (word, bit) = (self.turn / 64, self.turn % 64);
        let rest = self.taken[word] & (!0 << bit);
        let found = if rest != 0 {
            word * 64 + rest.trailing_zeros() as usize
        } else {
            let words = (1..=WORDS).map(|step| (word + step) % WORDS);
            let word = words.into_iter().find(|word| self.taken[*word] != 0)?;
            word * 64 + self.taken[word].trailing_zeros() as usize
        };
        self.turn = (found + 1) % MAX_PORTS;
        Some(found)
    }
}

impl<B: PacketBuffer> RouterEnd<B> {
    /// Receives frames of the port that has the next turn, at most [`ROUTER_BATCH`], in their order, and
    /// returns the port's number. Returns `None` if no port has any, as far as [`look`](Self::look) has
    /// found. What `batch` had before is gone.
    pub fn receive(&mut self, batch: &mut RouterBatch) -> Option<u32> {
        self.give_back(batch);
        while let Some(index) = self.next() {
            if self.receive_from(index as u32, batch) {
                return Some(batch.port.0);
            }
        }
        None
    }

    /// Receives frames of a port, at most [`ROUTER_BATCH`], in their order, and returns whether it had
    /// any. What `batch` had before is gone. [`waiting`](Self::waiting) names the ports that may have some.
    ///
    /// It is for a router that shares its time out by another measure than [`receive`](Self::receive),
    /// which gives each port as many frames as another.
    pub fn receive_from(&mut self, port: u32, batch: &mut RouterBatch) -> bool {
        self.give_back(batch);
        let index = port as usize;
        let bit = 1 << (index % 64);
        if self.taken.get(index / 64).is_none_or(|word| word & bit == 0) {
            return false;
        }
        let Some(port) = &mut self.ports[index] else {
            self.taken[index / 64] &= !bit;
            return false;
        };
        let len = offload::LEN + port.outbox.inbox().max_frame();
        if !core::mem::replace(&mut port.has_buffers, true) {
            while port.outbox.stage(vec![0; len].into()).is_ok() {}
        }
        // The first time, or a batch has ended with the router that had it.
        while port.spare.len() < ROUTER_BATCH {
            port.spare.push(vec![0; len].into());
        }
        batch.port = (port.number, port.generation);
        while batch.frames.len() < ROUTER_BATCH
            && let Some(frame) = port.outbox.collect()
        {
            batch.frames.push(frame);
            // The frame has left a place, and there are as many spare buffers as a batch has frames.
            if let Some(buffer) = port.spare.pop() {
                let _ = port.outbox.stage(buffer);
            }
        }
        port.outbox.publish();
        if batch.frames.len() < ROUTER_BATCH {
            // A frame that is still being copied is followed by a ring.
            self.taken[index / 64] &= !bit;
        }
        !batch.is_empty()
    }

    /// Gives the buffers of a batch back to the port that they are of.
    pub fn give_back(&mut self, batch: &mut RouterBatch) {
        if batch.is_empty() {
            return;
        }
        let (number, generation) = batch.port;
        let port = self.ports[number as usize].as_mut();
        match port.filter(|port| port.generation == generation) {
            Some(port) => {
                port.spare.extend(batch.frames.drain(..).map(|frame| frame.buffer));
                port.spare.truncate(ROUTER_BATCH);
            }
            None => batch.frames.clear(),
        }
    }

    /// What a port takes now. A port that is not there takes nothing but ordinary frames.
    pub fn link(&self, port: u32) -> RouterLink {
        let port = self.ports.get(port as usize).and_then(Option::as_ref);
        let shape = port.map(|port| port.state.queues.accepted_by_all().unwrap_or(port.shape));
        let shape = shape.unwrap_or(Shape::new(Offloads::default()));
        let longest = match shape.is_large() {
            true => LARGE_PACKET + ETHERNET_HEADER_LEN,
            false => self.max_untagged_size,
        };
        RouterLink { offloads: shape.offloads(), longest }
    }

    /// About how many frames a port takes now. 0 if it is not there.
    pub fn space(&self, port: u32) -> usize {
        let port = self.ports.get(port as usize).and_then(Option::as_ref);
        port.map_or(0, |port| port.state.queues.space())
    }

    /// Copies a frame to a port. `header` says what is left to do in it. What the port's receiver does
    /// not accept undone is done before. A receiver that sleeps is woken at the next
    /// [`flush`](Self::flush).
    ///
    /// A frame to a port that is not there any more is lost.
    ///
    /// # Errors
    ///
    /// If the port takes none now. Of a frame that was cut on the way, a part may have arrived.
    pub fn send(
        &mut self,
        port: u32,
        frame: &[u8],
        header: &OffloadHeader,
    ) -> Result<(), PortFull> {
        let index = port as usize;
        let Some(end) = self.ports.get(index).and_then(Option::as_ref) else { return Ok(()) };
        let packet = Packet::from(frame).with_offload(header);
        // A port without a limit needs no time.
        let is_limited = end.state.policy.is_limited(Way::Receive);
        let moment = if is_limited { Moment::new(self.clock.now()) } else { Moment::ZERO };
        let (frames, len) = (packet.segments().0, packet.len());
        if is_limited && !end.state.policy.admits(Way::Receive, frames, len, moment) {
            return Err(PortFull);
        }
        let touched = &mut self.touched_queues[index];
        self.touched[index / 64] |= 1 << (index % 64);
        let left = match end.deliver(self.flow_key, packet, touched) {
            Ok(()) => return Ok(()),
            Err(Refusal::Full) => return Err(PortFull),
            Err(Refusal::Work(left)) => left,
        };
        let mut delivered = Err(PortFull);
        let finished = self.work.finish(packet, left, self.max_untagged_size, |frame| {
            let result = end.deliver(self.flow_key, frame, touched);
            if delivered.is_err() {
                delivered = result.map_err(|_| PortFull);
            }
        });
        finished.map_err(|_| PortFull).and(delivered)
    }

    /// Sets whether guests use the gateway as their default router of IPv6, and tells all guests if that has
    /// changed, as [`Network::set_ipv6_router`](crate::Network::set_ipv6_router) does. Returns whether it
    /// has. They are told with the next [`flush`](Self::flush).
    pub fn set_ipv6_router(&mut self, is_router: bool) -> bool {
        // A network that has no router for guests leads nowhere.
        let leads = self.gateway.dhcp().config().router.is_some();
        let has_changed = self.gateway.set_ipv6_router(is_router && leads);
        if has_changed {
            self.advertise_ipv6();
        }
        has_changed
    }

    /// Sends a router advertisement to each port but the uplink. A port that takes no frame now misses it,
    /// so a change is worth being told again (RFC 4861, 6.2.4). It does nothing on a network without
    /// [IPv6](crate::NetworkConfig::ipv6).
    pub fn advertise_ipv6(&mut self) {
        let gateway = std::sync::Arc::clone(&self.gateway);
        self.send_to_all(|out| gateway.router_advertisement(out));
    }

    /// Asks the stations behind each port but the uplink who uses an address. Some time later the answer is
    /// among the gateway's [neighbours](Gateway::neighbors), or with IPv4 among the
    /// [holders](crate::dhcp::DhcpServer::holders) that its DHCP server knows.
    pub fn ask_for(&mut self, address: IpAddr) {
        let gateway = std::sync::Arc::clone(&self.gateway);
        self.send_to_all(|out| match address {
            IpAddr::V4(address) => gateway.arp_request(address, out),
            IpAddr::V6(address) => gateway.neighbor_solicitation(address, out),
        });
    }

    /// Sends what `write` writes to each port but the uplink.
    fn send_to_all(&mut self, write: impl FnOnce(&mut [u8]) -> Option<usize>) {
        let mut frame = [0; DISCOVERY_MAX];
        let Some(len) = write(&mut frame) else { return };
        for index in 0..self.ports.len() {
            let Some(port) = self.ports[index].as_ref().filter(|port| !port.is_uplink) else {
                continue;
            };
            // A port that takes none misses it.
            let _ = self.send(port.number, &frame[..len], &OffloadHeader::NONE);
        }
    }

    /// Wakes every receiver that sleeps and got a frame since the last flush, each once.
    pub fn flush(&mut self) {
        for (word, touched) in self.touched.iter_mut().enumerate() {
            let mut ports = core::mem::take(touched);
            while ports != 0 {
                let index = word * 64 + ports.trailing_zeros() as usize;
                let queues = self.touched_queues[index].take();
                if let Some(port) = &self.ports[index] {
                    port.state.queues.ring(queues);
                }
                ports &= ports - 1;
            }
        }
    }
}

impl<B> Drop for RouterEnd<B> {
    fn drop(&mut self) {
        // The next thread that drives the end gets the ports in front of what has happened since.
        let lane = &self.shared.lanes[self.worker];
        let mut events = lane.events();
        let ports = self.ports.iter_mut().filter_map(Option::take);
        events.splice(0..0, ports.map(Event::Joined));
        let mut position = 0;
        while position < events.len() {
            let Event::Left(number, _) = events[position] else {
                position += 1;
                continue;
            };
            events.remove(position);
            let of_it =
                |event: &Event<B>| matches!(event, Event::Joined(end) if end.number == number);
            if let Some(joined) = events[..position].iter().rposition(of_it) {
                events.remove(joined);
                position -= 1;
            }
        }
        drop(events);
        // Release, both: they pair with the Acquires in `look` of the next end.
        lane.has_events.store(true, Ordering::Release);
        for (taken, pending) in self.taken.iter().zip(&lane.pending) {
            pending.fetch_or(*taken, Ordering::Release);
        }
        let now = self.clock.now().as_secs() as u32;
        lane.failed_in.store(now.wrapping_add(1), Ordering::Relaxed);
        // Release: pairs with the Acquire in `RouterSide::start`.
        lane.state.store(IDLE, Ordering::Release);
    }
}

/// Why a port's end did not deliver a packet.
enum Refusal {
    Full,
    /// The receiver does not accept this work undone.
    Work(Left),
}

impl<B: PacketBuffer> PortEnd<B> {
    /// Copies a packet to the receiver of its flow.
    fn deliver(&self, key: u64, packet: Packet<'_>, touched: &mut Touched) -> Result<(), Refusal> {
        // A queue that has closed since it was picked gives its frames to another. So often can that be.
        for _ in 0..=QUEUES_MAX {
            let Some((number, queue)) = self.state.queues.pick(|| packet.flow(key)) else { break };
            let shape = queue.shape();
            let left = shape.left_by(packet.offload());
            if left != Left::Nothing {
                return Err(Refusal::Work(left));
            }
            // Relaxed: it changes only while the inbox is closed, whose state has been loaded before.
            let is_here = || self.state.generation.load(Ordering::Relaxed) == self.generation;
            match queue.deliver(shape, packet, is_here) {
                Delivery::Direct | Delivery::Overflow => {
                    touched.add(number);
                    return Ok(());
                }
                Delivery::Dropped(Refused::NoBuffer | Refused::TooBig) => break,
                Delivery::Dropped(Refused::Closed | Refused::Stale) => {}
            }
        }
        Err(Refusal::Full)
    }
}
