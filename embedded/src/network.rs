//! A network: ports joined by a learning switch, with a gateway.
//!
//! A [`Port`] splits into a [`Receiver`], which posts buffers and collects packets, and a
//! [`Sender`], which forwards frames on its caller's own thread: there is no thread in here.
//! Forwarding takes no lock, allocates nothing, changes no reference count and makes no system
//! call per packet, and a unicast frame costs the same on a network of 2 ports and of 1,024. A
//! receiver that is slow, closed or gone costs its senders nothing but the packets it does not
//! take.
//!
//! # Rules of forwarding
//!
//! - A frame must be from 14 bytes to `max_packet_size` long and come from a unicast address that
//!   is neither the gateway's nor assigned to another port.
//! - A frame to the gateway's address goes to the gateway only; one to a known address to its port
//!   only; never back to where it came from. Broadcasts go to all other ports and the gateway,
//!   multicasts and unknown addresses (also 00:00:00:00:00:00, which can be nobody's) to all other
//!   ports.
//! - An isolated port exchanges frames with the gateway only.
//! - Every frame that is not delivered is counted, by reason (see [`PortStats`]).
//!
//! # Memory
//!
//! A network takes about 190 KiB. A port adds its inbox (24 bytes and a buffer handle for each of
//! `inbox_depth` cells, and `overflow_depth * max_packet_size` bytes of which only those ever used
//! become resident) and each sender a reply of `max_packet_size` bytes. Ports that leave are kept
//! and reused, so senders need no reference count to reach one.

use core::fmt;
use core::marker::PhantomData;
use core::time::Duration;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use crossbeam_utils::CachePadded;
use macaddr::MacAddr6;
use smoltcp::wire::EthernetFrame;
use vmring_core::sync::{self, AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::config::{ConfigError, NetworkConfig, NetworkMode};
use crate::dhcp::{DhcpConfig, Lease};
use crate::gateway::Gateway;
use crate::inbox::{Claim, Collector, Delivery, Inbox, Refused, Wake};
use crate::table::{Learned, Mac, MacTable, PortRef, mix};

/// How many ports one network can have.
pub const MAX_PORTS: usize = 1024;

const WORDS: usize = MAX_PORTS / 64;

/// The time, as a network sees it. Read once per batch.
pub trait Clock: Send + Sync {
    /// The time since any fixed moment. Never goes back.
    fn now(&self) -> Duration;
}

/// The system's monotonic clock.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl SystemClock {
    /// A clock that starts now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A clock that moves only when told to, for tests.
#[derive(Debug)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// A clock at zero.
    pub fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Moves the clock on.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_millis() as u64, Ordering::Relaxed);
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// Why an interface cannot join a network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The network has all the ports it can have.
    #[error("the network is full: it has {MAX_PORTS} interfaces")]
    Full,
    /// Another port, or the gateway, has the MAC address.
    #[error("the MAC address {mac} is already in use on this network")]
    DuplicateMac {
        /// The address.
        mac: MacAddr6,
    },
    /// The MAC address is not one an interface can have.
    #[error("{mac} cannot be an interface's MAC address: it is not unicast")]
    NotUnicast {
        /// The address.
        mac: MacAddr6,
    },
}

/// Why a named network cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The network exists and is different.
    #[error("the network \"{name}\" already exists with another configuration")]
    Conflict {
        /// Its name.
        name: String,
        /// What it is like.
        existing: Box<NetworkConfig>,
    },
    /// It cannot be made as asked.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The named networks of a process. A network lives as long as somebody holds it: a port does.
///
/// Can be a `static`.
pub struct Registry<B> {
    networks: Mutex<Vec<(String, Weak<Network<B>>)>>,
}

impl<B> fmt::Debug for Registry<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl<B> Default for Registry<B> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B> Registry<B> {
    /// A registry of no networks.
    pub const fn new() -> Self {
        Self { networks: Mutex::new(Vec::new()) }
    }
}

impl<B: AsMut<[u8]> + Send> Registry<B> {
    /// The network of this name: the one that exists, or a new one.
    ///
    /// # Errors
    ///
    /// If one exists with another configuration, or the configuration is impossible.
    pub fn open(&self, name: &str, config: &NetworkConfig) -> Result<Arc<Network<B>>, OpenError> {
        let mut networks = self.networks.lock().unwrap_or_else(PoisonError::into_inner);
        networks.retain(|(_, network)| network.strong_count() > 0);
        let existing = networks.iter().find(|(existing, _)| existing == name);
        if let Some(network) = existing.and_then(|(_, network)| network.upgrade()) {
            if network.config != *config {
                let existing = Box::new(network.config.clone());
                return Err(OpenError::Conflict { name: name.to_owned(), existing });
            }
            return Ok(network);
        }
        let network = Network::new(config.clone())?;
        networks.retain(|(existing, _)| existing != name);
        networks.push((name.to_owned(), Arc::downgrade(&network)));
        tracing::debug!(name, gateway = %config.ipv4.gateway, mtu = config.mtu, "network made");
        Ok(network)
    }
}

/// What an interface asks for when it joins a network.
#[derive(Clone)]
pub struct PortConfig {
    /// Who it is. The MAC address follows from it, always the same.
    pub interface_id: [u8; 16],
    /// The MAC address, if the identity is not to decide.
    pub mac: Option<MacAddr6>,
    /// Whether it exchanges frames with the gateway only.
    pub isolated: bool,
    /// What wakes its receiver.
    pub wake: Wake,
}

impl fmt::Debug for PortConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortConfig")
            .field("interface_id", &self.interface_id)
            .field("mac", &self.mac)
            .field("isolated", &self.isolated)
            .finish_non_exhaustive()
    }
}

/// The MAC address of an interface, from its identity alone: locally administered, unicast, and
/// the same in every process and every version. Two of a thousand interfaces share one with a
/// probability of about 2^-27; joining says so.
pub fn mac_of_interface(interface_id: [u8; 16]) -> MacAddr6 {
    let id = u128::from_le_bytes(interface_id);
    local_mac(mix(mix(id as u64 ^ 0x766d_7269_6e67_0001) ^ (id >> 64) as u64))
}

/// The MAC address of the gateway of a network with this configuration.
fn mac_of_gateway(config: &NetworkConfig) -> MacAddr6 {
    local_mac(mix(u64::from(u32::from(config.ipv4.gateway)) ^ 0x766d_7269_6e67_0002))
}

fn local_mac(hash: u64) -> MacAddr6 {
    let [a, b, c, d, e, f, ..] = hash.to_be_bytes();
    MacAddr6::new(a & 0xfc | 0x02, b, c, d, e, f)
}

/// Counters of what a port's receiver got, written by its receiver only.
#[derive(Default)]
struct Received {
    direct: AtomicU64,
    overflow: AtomicU64,
    bytes: AtomicU64,
}

/// Counters of what a port's receiver did not get, written by senders when they drop.
#[derive(Default)]
struct Missed {
    no_buffer: AtomicU64,
    closed: AtomicU64,
}

/// What senders count for themselves and publish once per batch.
#[derive(Clone, Copy)]
enum Count {
    Packets,
    Bytes,
    Floods,
    ToGateway,
    Runt,
    TooBig,
    BadSource,
    Isolated,
    OwnPort,
    NoReceiver,
}

const COUNTS: usize = Count::NoReceiver as usize + 1;

/// The counters of one port, on a cache line for each of their writers.
#[derive(Default)]
struct PortCounters {
    received: CachePadded<Received>,
    missed: CachePadded<Missed>,
    sent: CachePadded<[AtomicU64; COUNTS]>,
}

impl PortCounters {
    fn sent(&self, count: Count) -> u64 {
        self.sent[count as usize].load(Ordering::Relaxed)
    }

    fn stats(&self) -> PortStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PortStats {
            received_direct: get(&self.received.direct),
            received_overflow: get(&self.received.overflow),
            received_bytes: get(&self.received.bytes),
            missed_no_buffer: get(&self.missed.no_buffer),
            missed_closed: get(&self.missed.closed),
            sent_packets: self.sent(Count::Packets),
            sent_bytes: self.sent(Count::Bytes),
            sent_floods: self.sent(Count::Floods),
            sent_to_gateway: self.sent(Count::ToGateway),
            dropped_runt: self.sent(Count::Runt),
            dropped_too_big: self.sent(Count::TooBig),
            dropped_bad_source: self.sent(Count::BadSource),
            dropped_isolated: self.sent(Count::Isolated),
            dropped_own_port: self.sent(Count::OwnPort),
            dropped_no_receiver: self.sent(Count::NoReceiver),
        }
    }

    fn reset(&self) {
        let all = [
            &self.received.direct,
            &self.received.overflow,
            &self.received.bytes,
            &self.missed.no_buffer,
            &self.missed.closed,
        ];
        for counter in all.into_iter().chain(self.sent.iter()) {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

/// The part of a port others reach. Kept when the port leaves, and reused.
struct Slot<B> {
    inbox: sync::Arc<Inbox<B>>,
    /// Goes up when a port leaves, so that a late [`Monitor`] sees that it is another's.
    generation: AtomicU32,
    counters: PortCounters,
}

/// What has passed through a port. What senders count appears when they flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortStats {
    /// Packets collected that were copied straight into a posted buffer.
    pub received_direct: u64,
    /// Packets collected that waited in the overflow ring.
    pub received_overflow: u64,
    /// Their bytes, of both.
    pub received_bytes: u64,
    /// Packets for this port dropped because no buffer was posted and the overflow ring was full.
    pub missed_no_buffer: u64,
    /// Packets for this port dropped because its receiver was closed.
    pub missed_closed: u64,
    /// Frames this port sent that went somewhere.
    pub sent_packets: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Those of them that went to all other ports: broadcasts, multicasts, unknown addresses.
    pub sent_floods: u64,
    /// Those of them the gateway has seen.
    pub sent_to_gateway: u64,
    /// Frames too short for an Ethernet header.
    pub dropped_runt: u64,
    /// Frames longer than the network's `max_packet_size`.
    pub dropped_too_big: u64,
    /// Frames whose source address is not unicast, is the gateway's, or is another port's.
    pub dropped_bad_source: u64,
    /// Frames that isolation keeps from their destination.
    pub dropped_isolated: u64,
    /// Frames whose destination is behind the port they come from.
    pub dropped_own_port: u64,
    /// Frames whose receiver did not take them; counted at the receiver as missed.
    pub dropped_no_receiver: u64,
}

impl PortStats {
    /// Every packet that was on its way to or from this port and was dropped. Those whose receiver
    /// did not take them count at the receiver, once.
    pub fn drops(&self) -> u64 {
        self.missed_no_buffer
            + self.missed_closed
            + self.dropped_runt
            + self.dropped_too_big
            + self.dropped_bad_source
            + self.dropped_isolated
            + self.dropped_own_port
    }
}

/// Who is on the network. Behind a lock that only joining and leaving take.
struct Members {
    macs: Vec<Option<MacAddr6>>,
    count: usize,
}

/// A network. See the [module](self).
pub struct Network<B> {
    config: NetworkConfig,
    max_packet_size: usize,
    gateway: Gateway,
    gateway_mac: Mac,
    clock: Box<dyn Clock>,
    /// The clock's seconds when somebody last looked.
    seconds: CachePadded<AtomicU32>,
    table: MacTable,
    slots: Box<[OnceLock<Arc<Slot<B>>>]>,
    /// Ports that get what is sent to all: present, open, not isolated.
    floodable: [AtomicU64; WORDS],
    members: Mutex<Members>,
}

impl<B> fmt::Debug for Network<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("config", &self.config).finish_non_exhaustive()
    }
}

impl<B> Network<B> {
    /// How it was made.
    pub fn config(&self) -> &NetworkConfig {
        &self.config
    }

    /// The longest frame it carries.
    pub fn max_packet_size(&self) -> usize {
        self.max_packet_size
    }

    /// Its gateway.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// How many ports are on it.
    pub fn ports(&self) -> usize {
        self.members().count
    }

    /// The DHCP leases that are running, by address.
    pub fn leases(&self) -> Vec<Lease> {
        self.gateway.dhcp().leases(Duration::from_secs(self.refresh().into()))
    }

    /// The DHCP lease of one MAC address, if it is running.
    pub fn lease_of(&self, mac: MacAddr6) -> Option<Lease> {
        self.gateway.dhcp().lease_of(mac, Duration::from_secs(self.refresh().into()))
    }

    /// What has passed through each port that is on it, with its MAC address.
    pub fn stats(&self) -> Vec<(MacAddr6, PortStats)> {
        let members = self.members();
        let stats = |(index, mac): (usize, &Option<MacAddr6>)| {
            Some(((*mac)?, self.slots[index].get()?.counters.stats()))
        };
        members.macs.iter().enumerate().filter_map(stats).collect()
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, index: usize) -> Option<&Slot<B>> {
        self.slots.get(index)?.get().map(|slot| &**slot)
    }

    /// Reads the clock, for everybody.
    fn refresh(&self) -> u32 {
        let now = self.clock.now().as_secs() as u32;
        if self.seconds.load(Ordering::Relaxed) != now {
            self.seconds.store(now, Ordering::Relaxed);
        }
        now
    }

    fn set_floodable(&self, index: usize, on: bool) {
        let (word, bit) = (&self.floodable[index / 64], 1 << (index % 64));
        // Release: pairs with the Acquire in `Sender::flood`; the port is ready.
        if on {
            word.fetch_or(bit, Ordering::Release);
        } else {
            word.fetch_and(!bit, Ordering::Release);
        }
    }
}

impl<B: AsMut<[u8]> + Send> Network<B> {
    /// A network with no ports, and no name.
    ///
    /// # Errors
    ///
    /// If the configuration is impossible.
    pub fn new(config: NetworkConfig) -> Result<Arc<Self>, ConfigError> {
        Self::with_clock(config, Box::new(SystemClock::new()))
    }

    /// Like [`new`](Self::new), with another clock.
    ///
    /// # Errors
    ///
    /// If the configuration is impossible.
    pub fn with_clock(
        config: NetworkConfig,
        clock: Box<dyn Clock>,
    ) -> Result<Arc<Self>, ConfigError> {
        config.check()?;
        let gateway_mac = mac_of_gateway(&config);
        let first = u32::from(config.ipv4.gateway) + 1;
        let gateway = Gateway::new(DhcpConfig {
            server: config.ipv4.gateway,
            server_mac: gateway_mac,
            first: first.into(),
            last: config.ipv4.end,
            mask: config.ipv4.mask,
            router: (config.mode == NetworkMode::Shared).then_some(config.ipv4.gateway),
            dns: config.dns.clone(),
            mtu: Some(config.mtu as u16), // checked: at most 65,521
            lease_time: config.lease_time,
        });
        Ok(Arc::new(Self {
            max_packet_size: config.max_packet_size(),
            gateway,
            gateway_mac: Mac::new(gateway_mac.into_array()),
            clock,
            seconds: CachePadded::new(AtomicU32::new(0)),
            table: MacTable::new(config.mac_ageing.as_secs() as u32),
            slots: (0..MAX_PORTS).map(|_| OnceLock::new()).collect(),
            floodable: core::array::from_fn(|_| AtomicU64::new(0)),
            members: Mutex::new(Members { macs: vec![None; MAX_PORTS], count: 0 }),
            config,
        }))
    }

    /// Gives an interface its place on the network, and opens the inbox there.
    fn admit(self: &Arc<Self>, config: PortConfig) -> Result<Admitted<B>, JoinError> {
        let mac = config.mac.unwrap_or_else(|| mac_of_interface(config.interface_id));
        let key = Mac::new(mac.into_array());
        if !key.is_unicast() {
            return Err(JoinError::NotUnicast { mac });
        }
        let mut members = self.members();
        if key == self.gateway_mac || self.table.assigned(key).is_some() {
            return Err(JoinError::DuplicateMac { mac });
        }
        let index = members.macs.iter().position(Option::is_none).ok_or(JoinError::Full)?;
        let slot = self.slots[index].get_or_init(|| {
            Arc::new(Slot {
                inbox: sync::Arc::new(Inbox::new(
                    self.config.inbox_depth,
                    self.config.overflow(),
                    self.max_packet_size,
                )),
                generation: AtomicU32::new(0),
                counters: PortCounters::default(),
            })
        });
        slot.counters.reset();
        // The last owner's collector was dropped before its port left, so this opens.
        let collector = Inbox::open(&slot.inbox, config.wake).ok_or(JoinError::Full)?;
        members.macs[index] = Some(mac);
        members.count += 1;
        let port = PortRef::new(index, config.isolated);
        self.table.pin(key, port);
        self.set_floodable(index, !config.isolated);
        drop(members);
        tracing::debug!(%mac, index, isolated = config.isolated, "port joined");
        let membership = Arc::new(Membership {
            network: Arc::clone(self),
            index,
            generation: slot.generation.load(Ordering::Relaxed),
            port,
            mac,
            open: AtomicBool::new(true),
        });
        Ok(Admitted { collector, slot: Arc::clone(slot), membership })
    }
}

impl<B: AsMut<[u8]> + Send> Network<B> {
    /// Puts an interface on the network.
    ///
    /// # Errors
    ///
    /// If the network is full, or the MAC address is taken or impossible.
    pub fn join(self: &Arc<Self>, config: PortConfig) -> Result<Port<B>, JoinError> {
        let Admitted { collector, slot, membership } = self.admit(config)?;
        Ok(Port {
            sender: Sender::new(Arc::clone(&membership)),
            receiver: Receiver { collector, slot, membership },
        })
    }
}

/// An interface that is on the network: what its two halves are made of.
struct Admitted<B: AsMut<[u8]> + Send> {
    // In this order: the inbox is closed and empty before the port leaves.
    collector: Collector<B>,
    slot: Arc<Slot<B>>,
    membership: Arc<Membership<B>>,
}

/// A port's place on the network, left when its receiver and all its senders are gone.
struct Membership<B> {
    network: Arc<Network<B>>,
    index: usize,
    generation: u32,
    port: PortRef,
    mac: MacAddr6,
    /// Whether the receiver is open; it alone writes this.
    open: AtomicBool,
}

impl<B> Membership<B> {
    fn slot(&self) -> Option<&Slot<B>> {
        self.network.slot(self.index)
    }

    fn stats(&self) -> PortStats {
        self.slot().map(|slot| slot.counters.stats()).unwrap_or_default()
    }
}

impl<B> Drop for Membership<B> {
    fn drop(&mut self) {
        let network = &*self.network;
        // All senders of the port are gone, so nothing is learned about it any more; its receiver
        // is gone, so its inbox is closed and empty.
        network.set_floodable(self.index, false);
        let mut members = network.members();
        network.table.forget(Mac::new(self.mac.into_array()), self.index);
        if let Some(slot) = self.slot() {
            slot.generation.fetch_add(1, Ordering::Relaxed);
        }
        members.macs[self.index] = None;
        members.count -= 1;
        drop(members);
        tracing::debug!(mac = %self.mac, index = self.index, "port left");
    }
}

/// An interface's place on a network: a [`Receiver`] and a [`Sender`]. It leaves the network when
/// the receiver and all senders are dropped, in any order and on any thread.
pub struct Port<B: AsMut<[u8]> + Send> {
    // In this order: a sender flushes when it is dropped, which may ring the receiver.
    sender: Sender<B>,
    receiver: Receiver<B>,
}

impl<B: AsMut<[u8]> + Send> fmt::Debug for Port<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("mac", &self.mac()).finish_non_exhaustive()
    }
}

impl<B: AsMut<[u8]> + Send> Port<B> {
    /// The two halves; they may go to different threads.
    pub fn split(self) -> (Receiver<B>, Sender<B>) {
        (self.receiver, self.sender)
    }

    /// The MAC address the network assigned to it.
    pub fn mac(&self) -> MacAddr6 {
        self.receiver.membership.mac
    }

    /// The network it is on.
    pub fn network(&self) -> &Arc<Network<B>> {
        &self.receiver.membership.network
    }

    /// A handle that reads the port's counters. It keeps the network, but not the port's place on it.
    pub fn monitor(&self) -> Monitor<B> {
        self.receiver.monitor()
    }
}

/// Reads a port's counters, from any thread. The port can leave while it exists; the network lives on
/// with it.
pub struct Monitor<B> {
    network: Arc<Network<B>>,
    index: usize,
    generation: u32,
    mac: MacAddr6,
}

impl<B> Clone for Monitor<B> {
    fn clone(&self) -> Self {
        Self { network: Arc::clone(&self.network), ..*self }
    }
}

impl<B> fmt::Debug for Monitor<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("mac", &self.mac).finish_non_exhaustive()
    }
}

impl<B> Monitor<B> {
    fn new(membership: &Membership<B>) -> Self {
        Self {
            network: Arc::clone(&membership.network),
            index: membership.index,
            generation: membership.generation,
            mac: membership.mac,
        }
    }

    /// The port's counters, or `None` once it has left.
    pub fn stats(&self) -> Option<PortStats> {
        let slot = self.network.slot(self.index)?;
        let stats = slot.counters.stats();
        (slot.generation.load(Ordering::Relaxed) == self.generation).then_some(stats)
    }

    /// The port's MAC address.
    pub fn mac(&self) -> MacAddr6 {
        self.mac
    }

    /// The network the port is on.
    pub fn network(&self) -> &Arc<Network<B>> {
        &self.network
    }
}

/// The half of a port that receives. Dropping it closes it: packets and buffers that are still in
/// it are dropped, after waiting for copies that are under way.
pub struct Receiver<B: AsMut<[u8]> + Send> {
    // In this order: the inbox is closed and empty before the port leaves.
    collector: Collector<B>,
    /// Its own, for the counters.
    slot: Arc<Slot<B>>,
    membership: Arc<Membership<B>>,
}

impl<B: AsMut<[u8]> + Send> fmt::Debug for Receiver<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("mac", &self.membership.mac)
            .field("posted", &self.posted())
            .finish_non_exhaustive()
    }
}

impl<B: AsMut<[u8]> + Send> Receiver<B> {
    /// The MAC address the network assigned to the port.
    pub fn mac(&self) -> MacAddr6 {
        self.membership.mac
    }

    /// The network the port is on.
    pub fn network(&self) -> &Arc<Network<B>> {
        &self.membership.network
    }

    /// What has passed through the port.
    pub fn stats(&self) -> PortStats {
        self.membership.stats()
    }

    /// A handle that reads the port's counters. It keeps the network, but not the port's place on it.
    pub fn monitor(&self) -> Monitor<B> {
        Monitor::new(&self.membership)
    }

    /// Lends a buffer to the network; see [`Collector::post`]. A receiver that finds packets
    /// waiting for a buffer gets no wake-up for them: after posting, collect.
    ///
    /// # Errors
    ///
    /// The buffer comes straight back if `inbox_depth` buffers are posted, or if it has less room
    /// than the network's `max_packet_size`.
    pub fn post(&mut self, buffer: B) -> Result<(), B> {
        self.collector.post(buffer)
    }

    /// As [`post`](Self::post), not shown to senders before [`publish`](Self::publish).
    ///
    /// # Errors
    ///
    /// As [`post`](Self::post).
    #[inline(always)]
    pub fn stage(&mut self, buffer: B) -> Result<(), B> {
        self.collector.stage(buffer)
    }

    /// Shows what was [staged](Self::stage), with one store.
    #[inline]
    pub fn publish(&mut self) {
        self.collector.publish();
    }

    /// How many buffers are lent, filled or not.
    pub fn posted(&self) -> usize {
        self.collector.posted()
    }

    /// Whether no further buffer can be posted.
    pub fn is_full(&self) -> bool {
        self.collector.is_full()
    }

    /// The next packet and its length, or `None`; see [`Collector::collect`].
    #[inline(always)]
    pub fn collect(&mut self) -> Option<(B, usize)> {
        let packet = self.collector.collect()?;
        let received = &self.slot.counters.received;
        add(if packet.overflow { &received.overflow } else { &received.direct }, 1);
        add(&received.bytes, packet.len as u64);
        Some((packet.buffer, packet.len))
    }

    /// Takes back every posted buffer no sender has claimed; see [`Collector::recall`].
    pub fn recall(&mut self, f: impl FnMut(B)) -> usize {
        self.collector.recall(f)
    }

    /// Takes back those of them that match and leaves the others posted; see
    /// [`Collector::recall_if`].
    pub fn recall_if(&mut self, matches: impl FnMut(&mut B) -> bool, f: impl FnMut(B)) -> usize {
        self.collector.recall_if(matches, f)
    }

    /// True: nothing can be collected, and the wake callback will be called once when that
    /// changes. False: there is something to collect. See [`Collector::arm`].
    pub fn arm(&mut self) -> bool {
        self.collector.arm()
    }

    /// The receiver is awake; see [`Collector::disarm`].
    pub fn disarm(&mut self) -> bool {
        self.collector.disarm()
    }

    /// Refuses further packets and waits for the copies under way, each no longer than one frame
    /// takes, or a [`Run`]. Afterwards no sender touches a buffer; what has arrived can be
    /// [collected](Self::collect), the rest [recalled](Self::recall). The port's senders can still
    /// send.
    pub fn close(&mut self) {
        self.membership.network.set_floodable(self.membership.index, false);
        self.membership.open.store(false, Ordering::Relaxed);
        self.collector.close();
    }

    /// Accepts packets again after [`close`](Self::close).
    pub fn reopen(&mut self) {
        self.collector.reopen();
        self.membership.open.store(true, Ordering::Relaxed);
        let membership = &self.membership;
        membership.network.set_floodable(membership.index, !membership.port.isolated());
    }

    /// Whether [`close`](Self::close) was called, and [`reopen`](Self::reopen) not since.
    pub fn is_closed(&self) -> bool {
        !self.membership.open.load(Ordering::Relaxed)
    }
}

impl<B: AsMut<[u8]> + Send> Drop for Receiver<B> {
    fn drop(&mut self) {
        self.close(); // no more floods; the collector's own drop does the rest
    }
}

/// Adds to a counter that only one thread writes.
#[inline]
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Delivered to the one port its destination is behind.
    Forwarded,
    /// Offered to all other ports: `reached` of them took it. A broadcast also reached the
    /// gateway.
    Flooded {
        /// How many took it.
        reached: u32,
    },
    /// Given to the gateway.
    Gateway,
    /// Not delivered.
    Dropped(DropReason),
}

/// Why a frame was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DropReason {
    /// Too short.
    #[error("the frame is shorter than an Ethernet header")]
    Runt,
    /// Too long.
    #[error("the frame is longer than the network's largest packet")]
    TooBig,
    /// Its source address is not the sender's to use.
    #[error("the source address is not unicast, or belongs to the gateway or another interface")]
    BadSource,
    /// Isolation.
    #[error("an isolated interface exchanges frames with the gateway only")]
    Isolated,
    /// Its destination is behind the port it came from.
    #[error("the destination is where the frame came from")]
    OwnPort,
    /// The receiver has no buffer posted and its overflow ring is full.
    #[error("the receiver has no buffer for it")]
    NoBuffer,
    /// The receiver is closed.
    #[error("the receiver is closed")]
    Closed,
}

/// The half of a port that sends, on the thread that calls it. A port can have several, made by
/// [`another`](Self::another); frames of one keep their order.
///
/// Receivers are woken by [`flush`](Self::flush), once each: call it after every batch. Dropping a
/// sender flushes.
pub struct Sender<B: AsMut<[u8]> + Send> {
    membership: Arc<Membership<B>>,
    /// Where the gateway writes its replies.
    reply: Box<[u8]>,
    /// The ports that were delivered to since the last flush.
    touched: [u64; WORDS],
    counts: [u64; COUNTS],
    /// Whether anything was sent since the last flush.
    busy: bool,
    /// The clock's seconds when the batch began.
    now: u32,
    mac: Mac,
    not_sync: PhantomData<core::cell::Cell<()>>,
}

impl<B: AsMut<[u8]> + Send> fmt::Debug for Sender<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("mac", &self.membership.mac).finish_non_exhaustive()
    }
}

impl<B: AsMut<[u8]> + Send> Sender<B> {
    fn new(membership: Arc<Membership<B>>) -> Self {
        // DHCP replies are shorter than the smallest MTU.
        let reply = vec![0; membership.network.max_packet_size].into_boxed_slice();
        Self {
            reply,
            touched: [0; WORDS],
            counts: [0; COUNTS],
            busy: false,
            now: 0,
            mac: Mac::new(membership.mac.into_array()),
            membership,
            not_sync: PhantomData,
        }
    }

    /// Another sender of the same port, for another thread.
    pub fn another(&self) -> Self {
        Self::new(Arc::clone(&self.membership))
    }

    /// The MAC address the network assigned to the port.
    pub fn mac(&self) -> MacAddr6 {
        self.membership.mac
    }

    /// The network the port is on.
    pub fn network(&self) -> &Arc<Network<B>> {
        &self.membership.network
    }

    /// What has passed through the port.
    pub fn stats(&self) -> PortStats {
        self.membership.stats()
    }

    /// A handle that reads the port's counters. It keeps the network, but not the port's place on it.
    pub fn monitor(&self) -> Monitor<B> {
        Monitor::new(&self.membership)
    }

    /// Forwards one frame. Waits for no packet and no buffer (only for a receiver that is in the
    /// middle of [`recall_if`](Receiver::recall_if)); what cannot be delivered is dropped and
    /// counted.
    /// Receivers that sleep learn of it at the next [`flush`](Self::flush).
    pub fn send(&mut self, frame: &[u8]) -> Sent {
        self.begin();
        let sent = self.forward(frame);
        let count = match sent {
            Sent::Forwarded => Count::Packets,
            Sent::Flooded { .. } => {
                self.count(Count::Floods, 1);
                Count::Packets
            }
            Sent::Gateway => Count::Packets,
            Sent::Dropped(reason) => match reason {
                DropReason::Runt => Count::Runt,
                DropReason::TooBig => Count::TooBig,
                DropReason::BadSource => Count::BadSource,
                DropReason::Isolated => Count::Isolated,
                DropReason::OwnPort => Count::OwnPort,
                DropReason::NoBuffer | DropReason::Closed => Count::NoReceiver,
            },
        };
        self.count(count, 1);
        if matches!(count, Count::Packets) {
            self.count(Count::Bytes, frame.len() as u64);
        }
        sent
    }

    /// Prepares up to `wanted` frames that all begin with these addresses: asks once where they go, and
    /// claims buffers there in one step. `None` if they do not all go to one port, or if it has no buffer
    /// posted: then [`send`](Self::send) knows what becomes of each.
    ///
    /// Like frames that are sent, those of a run reach a sleeping receiver at the next
    /// [`flush`](Self::flush).
    pub fn run(&mut self, addresses: [u8; ADDRESSES], wanted: usize) -> Option<Run<'_, B>> {
        let [a, b, c, d, e, f, from @ ..] = addresses;
        let (to, from) = (Mac::new([a, b, c, d, e, f]), Mac::new(from));
        if to.is_group() {
            return None;
        }
        self.begin();
        let Self { membership, touched, counts, now, mac, .. } = self;
        let network = &*membership.network;
        let port = membership.port;
        if from != *mac && !is_ours(network, port, from, *now) {
            return None;
        }
        // The gateway's address is behind no port.
        let target = network.table.lookup(to, *now)?;
        if target.index() == port.index() || target.isolated() || port.isolated() {
            return None;
        }
        let index = target.index();
        let claim = network.slot(index)?.inbox.claim(wanted)?;
        touched[index / 64] |= 1 << (index % 64);
        Some(Run { claim, counts })
    }

    /// The first frame of a batch reads the clock, for all.
    #[inline]
    fn begin(&mut self) {
        if !self.busy {
            self.busy = true;
            self.now = self.membership.network.refresh();
        }
    }

    fn count(&mut self, count: Count, amount: u64) {
        self.counts[count as usize] += amount;
    }

    fn forward(&mut self, frame: &[u8]) -> Sent {
        let port = self.membership.port;
        let network = &*self.membership.network;
        if frame.len() > network.max_packet_size {
            return Sent::Dropped(DropReason::TooBig);
        }
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else {
            return Sent::Dropped(DropReason::Runt);
        };
        let from = Mac::new(ethernet.src_addr().0);
        let to = Mac::new(ethernet.dst_addr().0);
        if from != self.mac && !is_ours(network, port, from, self.now) {
            return Sent::Dropped(DropReason::BadSource);
        }
        if to.is_group() {
            let gateway = to == Mac::BROADCAST;
            if gateway {
                self.ask_gateway(frame);
            }
            if port.isolated() {
                return if gateway { Sent::Gateway } else { Sent::Dropped(DropReason::Isolated) };
            }
            return self.flood(frame);
        }
        if to == network.gateway_mac {
            self.ask_gateway(frame);
            return Sent::Gateway;
        }
        match network.table.lookup(to, self.now) {
            Some(target) if target.index() == port.index() => Sent::Dropped(DropReason::OwnPort),
            Some(target) if target.isolated() || port.isolated() => {
                Sent::Dropped(DropReason::Isolated)
            }
            Some(target) => match self.deliver(target.index(), frame) {
                Ok(()) => Sent::Forwarded,
                Err(reason) => Sent::Dropped(reason),
            },
            None if port.isolated() => Sent::Dropped(DropReason::Isolated),
            None => self.flood(frame),
        }
    }

    /// Copies a frame to one port.
    ///
    /// The index may be stale by a moment: a port that left has a closed inbox, and one that took
    /// its place gets a frame it might as well have got in a flood.
    fn deliver(&mut self, index: usize, frame: &[u8]) -> Result<(), DropReason> {
        let Some(slot) = self.membership.network.slot(index) else {
            return Err(DropReason::Closed);
        };
        match slot.inbox.deliver(frame) {
            Delivery::Direct | Delivery::Overflow => {
                self.touched[index / 64] |= 1 << (index % 64);
                Ok(())
            }
            Delivery::Dropped(Refused::NoBuffer) => {
                slot.counters.missed.no_buffer.fetch_add(1, Ordering::Relaxed);
                Err(DropReason::NoBuffer)
            }
            Delivery::Dropped(Refused::Closed) => {
                slot.counters.missed.closed.fetch_add(1, Ordering::Relaxed);
                Err(DropReason::Closed)
            }
            Delivery::Dropped(Refused::TooBig) => Err(DropReason::TooBig),
        }
    }

    #[cold]
    fn flood(&mut self, frame: &[u8]) -> Sent {
        let own = self.membership.index;
        let mut reached = 0;
        for word in 0..WORDS {
            // Acquire: pairs with the Release in `set_floodable`.
            let mut ports = self.membership.network.floodable[word].load(Ordering::Acquire);
            if word == own / 64 {
                ports &= !(1 << (own % 64));
            }
            while ports != 0 {
                let index = word * 64 + ports.trailing_zeros() as usize;
                ports &= ports - 1;
                reached += u32::from(self.deliver(index, frame).is_ok());
            }
        }
        Sent::Flooded { reached }
    }

    /// Lets the gateway see a frame; its reply comes back to this port and no other.
    fn ask_gateway(&mut self, frame: &[u8]) {
        self.count(Count::ToGateway, 1);
        let network = &*self.membership.network;
        let now = Duration::from_secs(self.now.into());
        if let Some(len) = network.gateway.handle(frame, &mut self.reply, now) {
            let reply = core::mem::take(&mut self.reply);
            // If the port has no buffer for it the drop is counted there.
            let _ = self.deliver(self.membership.index, &reply[..len]);
            self.reply = reply;
        }
    }

    /// Wakes every receiver that was delivered to since the last flush and sleeps, once, and
    /// publishes this sender's counters. Costs almost nothing if nothing was sent.
    pub fn flush(&mut self) {
        if !core::mem::take(&mut self.busy) {
            return;
        }
        let network = &*self.membership.network;
        if let Some(slot) = self.membership.slot() {
            for (counter, count) in slot.counters.sent.iter().zip(&mut self.counts) {
                if *count != 0 {
                    counter.fetch_add(core::mem::take(count), Ordering::Relaxed);
                }
            }
        }
        for (word, touched) in self.touched.iter_mut().enumerate() {
            let mut ports = core::mem::take(touched);
            while ports != 0 {
                if let Some(slot) = network.slot(word * 64 + ports.trailing_zeros() as usize) {
                    slot.inbox.ring();
                }
                ports &= ports - 1;
            }
        }
    }
}

/// Whether a frame with this source address may come from this port; if so, its way back is learned.
fn is_ours<B>(network: &Network<B>, port: PortRef, from: Mac, now: u32) -> bool {
    from.is_unicast()
        && from != network.gateway_mac
        && network.table.learn(from, port, now) == Learned::Here
}

/// Bytes of an Ethernet frame's two addresses, the destination first.
pub const ADDRESSES: usize = 12;

/// Frames of one sender to one port, whose buffers are claimed; see [`Sender::run`].
pub struct Run<'a, B: AsMut<[u8]> + Send> {
    claim: Claim<'a, B>,
    counts: &'a mut [u64; COUNTS],
}

impl<B: AsMut<[u8]> + Send> fmt::Debug for Run<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("left", &self.left()).finish_non_exhaustive()
    }
}

impl<B: AsMut<[u8]> + Send> Run<'_, B> {
    /// Frames that are still to be put. The receiver waits for them.
    #[inline]
    pub fn left(&self) -> usize {
        self.claim.left()
    }

    /// Copies the next frame to the port. It begins with the run's addresses, is an Ethernet frame, and
    /// no longer than the network carries. False if it is longer, or if none is left to put: then
    /// nothing has happened.
    #[inline]
    pub fn put(&mut self, frame: &[u8]) -> bool {
        let done = self.claim.fill(frame);
        if done {
            self.counts[Count::Packets as usize] += 1;
            self.counts[Count::Bytes as usize] += frame.len() as u64;
        }
        done
    }
}

impl<B: AsMut<[u8]> + Send> Drop for Sender<B> {
    fn drop(&mut self) {
        self.flush();
    }
}
