//! A network: ports that a learning switch connects, and a gateway unless it is left out.
//!
//! A [`Port`] splits into a [`Receiver`], which posts buffers and collects packets, and a
//! [`Sender`], which forwards frames on its caller's own thread. The network has no thread of its
//! own. Forwarding takes no lock, allocates nothing, changes no reference count and makes no system
//! call per packet. A unicast frame costs the same on a network of 2 ports and of 1,024. A receiver
//! that is slow, closed or gone costs its senders only the packets that it does not accept.
//!
//! # Rules of forwarding
//!
//! - A frame must be at least 14 bytes long, and at most as long as the MTU and the Ethernet header.
//!   With a VLAN or priority tag it may be 4 bytes longer, which is `max_packet_size`. Its source
//!   must be a unicast address that is neither the gateway's nor another port's, and one from which
//!   the port may send.
//! - A frame must be within the limits of its port and of each port that it reaches; see
//!   [`policy`](crate::policy).
//! - A frame to one of the addresses 01:80:C2:00:00:00 to 01:80:C2:00:00:0F goes nowhere: such
//!   frames are between a station and its bridge (IEEE 802.1Q, table 8-1).
//! - Frames are forwarded as they are. A short one is not padded, as on a TAP and on vmnet: Ethernet
//!   leaves that to the sender. A VMM whose network card needs 60 bytes pads what it receives.
//! - A frame to the gateway's address goes to the gateway only. A frame to a known address goes to
//!   the port that has the address and to no other. No frame goes back to the port that sent it.
//! - A network that is configured [without a gateway](NetworkConfig::switch) answers nothing itself,
//!   and no address is the gateway's.
//! - VLANs are not told apart: a tag is a part of the frame.
//! - A broadcast goes to all other ports and to the gateway, and so does a frame to a group of IPv6 that
//!   the gateway is a member of. Another multicast and a frame to an unknown address go to all other
//!   ports. The address 00:00:00:00:00:00, which no interface can have, is
//!   always unknown.
//! - An isolated port exchanges frames with the gateway and the uplink only. What the gateway sends to all, which is
//!   the question whether somebody uses an address, goes to isolated ports as well.
//! - Every frame that is not delivered is counted, by reason (see [`PortStats`]).
//!
//! # Other networks
//!
//! A network whose [configuration](NetworkConfig::router) says so has a [router](crate::router). Frames to
//! the gateway's MAC address whose IP packets are for an address outside of the subnet go to it instead of
//! the gateway. Isolated ports reach it too.
//!
//! # The uplink
//!
//! One port can be the [uplink](PortConfig::uplink): it leads to another network, such as a TAP's,
//! where any number of stations are. The other ports are guests. Isolated guests reach the uplink
//! too.
//!
//! - A guest's frame to an unknown address goes to the uplink and to no other guest. A network that
//!   has had an uplink drops such a frame while the uplink is away.
//! - A frame from the uplink to an unknown address goes to the guests that send from
//!   [any source](SourceRule::Any), because behind them stations can be that are silent. It goes to no
//!   guest whose port has one source. If all guests are such, it is dropped.
//! - Broadcasts and multicasts go to all other ports, and so to the uplink and from it.
//! - No address is learned at the uplink, so a network of any size behind it takes no space in the
//!   table. An address that was learned behind a guest and is seen at the uplink is forgotten: its
//!   station has moved. An address that is assigned to a guest, or that the guest's port is bound to,
//!   stays with it: frames in its name that come from the uplink are dropped.
//!
//! So a silent guest whose port is to learn its address once gets no unicast frame before its own
//! first frame. Stations find it all the same, because they ask for an address by broadcast, at the
//! latest when an unicast question gets no answer (RFC 4861, 7.3.3; RFC 1122, 2.3.2.1). Otherwise a
//! guest that stays silent would see the frames of others.
//!
//! # IPv6
//!
//! The gateway of a network with [IPv6](NetworkConfig::ipv6) gives its guests a prefix, by the rules of the
//! [`gateway`](crate::gateway) module. Guests use it as their default router in
//! [shared mode](NetworkMode::Shared), while [`set_ipv6_router`](Network::set_ipv6_router) says so.
//!
//! The network has no thread of its own, and so no timer. A router advertisement goes to a port
//!
//! - when a station behind it asks for one,
//! - with the first frame that the port sends to the gateway after it has joined, and later with such a
//!   frame if it has got none for [`ADVERTISEMENT_INTERVAL`]. Each guest that uses the gateway sends such
//!   frames, because it checks from time to time that the gateway is there (RFC 4861, 7.3),
//! - when [`set_ipv6_router`](Network::set_ipv6_router) changes something, and when somebody who has a timer
//!   calls [`advertise_ipv6`](Network::advertise_ipv6). Both are to all ports. Whoever drives the network's
//!   [router](crate::router) has the same at its end.
//!
//! The uplink gets none, and the gateway answers no question for routers that comes from there: stations
//! behind the uplink have routers of their own.
//!
//! [`ADVERTISEMENT_INTERVAL`]: crate::limits::ADVERTISEMENT_INTERVAL
//!
//! # Offload
//!
//! A port can have [offloads](PortConfig::offloads), and the ports of one network can differ. Such a
//! port may send packets whose checksum is to be completed, and packets of up to 64 KiB that are to be
//! cut into segments. [`Packet::with_offload`] says so. It receives such packets as well, each
//! behind an offload header ([`PacketBuffer::header_and_bytes`]).
//!
//! - A port gets a packet as it is if its receiver accepts the work that is left: all work that the
//!   port's offloads include, unless the receiver [accepts](crate::port::Receiver::accept) less. Otherwise the
//!   sender does it in software: it completes the checksum, or cuts the packet into segments, which
//!   arrive in order like packets that were sent one by one. The gateway gets every packet complete.
//! - Every packet is still decided upon by its first bytes alone, and once.
//! - A packet that is to be cut has at most 65,535 bytes behind its Ethernet header and tag. Each of its
//!   segments must be as short as any frame. It has at most [`SEGMENTS_PER_PACKET`] segments.
//! - The limits count it as its segments, because it costs its receivers as much. Its bytes count as
//!   they are, each header once.
//! - A checksum is that of a transport header behind an IP header. No other part of a frame is changed,
//!   so nothing that the network has decided by changes after that.
//! - A header that is not true of its packet, or that asks for what the port did not negotiate, costs
//!   its packet. So does a packet that software cannot cut, if its receiver does not cut it.
//!
//! # Several queues
//!
//! A port can have [several queues](PortConfig::queues), each with a receiver, an inbox and buffers of its
//! own, for a guest with several processors. A frame goes to one of those whose receiver is open.
//!
//! - The frames of one flow go to one queue, in their order. A flow is the addresses, the protocol and the
//!   ports of TCP and UDP over IP, both directions together; the addresses of fragments and of other IP
//!   packets; the MAC addresses of other frames.
//! - A receiver that closes gives its flows to the others, and no other flow moves. One that opens takes
//!   its flows back. A flow that moves may have frames in both queues for a moment.
//! - Frames that wait in a queue when its receiver closes stay there for it. If the receiver is dropped,
//!   they are dropped and counted.
//! - What a port is limited to, and counts, holds for all its queues together.
//!
//! # Memory
//!
//! A network takes about 190 KiB, and 16 KiB more with IPv6. Each port adds an inbox for each queue: 24 bytes and a buffer handle for each
//! of `inbox_depth` cells, and `overflow_depth * max_packet_size` bytes, of which only those that
//! are used become resident. A port with offloads has 8 bytes more for each cell and 12 for each waiting
//! packet, and its longest packet counts. Each sender adds two buffers of `max_packet_size` bytes if the
//! network has a gateway, and with offloads one of the port's longest packet and one of
//! `max_packet_size`. The memory of a port that leaves is kept and reused, so senders need no reference
//! count to reach a port. A queue of a place that receivers of different offloads have had keeps up to
//! three inboxes.
//!
//! [`Packet::with_offload`]: crate::packet::Packet::with_offload
//! [`SEGMENTS_PER_PACKET`]: crate::limits::SEGMENTS_PER_PACKET
//! [`Port`]: crate::port::Port
//! [`Receiver`]: crate::port::Receiver
//! [`Sender`]: crate::port::Sender

use core::fmt;
use core::time::Duration;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use macaddr::MacAddr6;
use vmring_core::offload::Offloads;
use vmring_core::sync::{AtomicU32, AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::clock::{Clock, SystemClock};
use crate::config::{NetworkConfig, NetworkConfigError, NetworkMode};
use crate::dhcp::{DhcpConfig, DhcpLease, LeaseFile};
use crate::gateway::Gateway;
use crate::inbox::{Inbox, PortWake};
use crate::limits::{LARGE_PACKET, MAX_PORTS, QUEUES_MAX, VLAN_TAG_LEN};
use crate::packet::PacketBuffer;
use crate::policy::{Moment, PortLimits, PortPolicy, PortRole, SourceRule};
use crate::port_state::PortState;
use crate::receive_queue::{QueueEnd, ReceiveQueue, Shape};
use crate::router::{NewPort, Outbox, Router, RouterSide};
use crate::stats::{DropReason, PortStats};
use crate::table::{Learned, Located, Mac, MacTable, PortRef, mix};

/// The 64-bit words of a set of ports.
pub(crate) const WORDS: usize = MAX_PORTS / 64;

/// The error when an interface cannot join a network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The network has [`MAX_PORTS`] ports already.
    #[error("the network is full: it has {MAX_PORTS} interfaces, so one must be stopped first")]
    Full,
    /// Another port or the gateway has the MAC address.
    #[error("the MAC address {mac} is already in use on this network: choose another")]
    DuplicateMac {
        /// The address.
        mac: MacAddr6,
    },
    /// A port has from 1 to [`QUEUES_MAX`] queues.
    #[error("an interface has 1 to {QUEUES_MAX} queues, and not {asked}")]
    Queues {
        /// The number that was asked for.
        asked: usize,
    },
    /// The network has an uplink already.
    #[error("the network has an uplink already: stop that interface first")]
    SecondUplink,
    /// An uplink is isolated, or bound to one source address.
    #[error("an uplink leads to many stations, so it is not isolated and has no source rule")]
    BoundUplink,
    /// The MAC address is not unicast, so no interface can have it.
    #[error(
        "{mac} cannot be an interface's MAC address, because it is not unicast: the first byte must \
         be even, and not every byte 0"
    )]
    NotUnicast {
        /// The address.
        mac: MacAddr6,
    },
}

/// The error when a named network cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The network exists, with another configuration.
    #[error(
        "the network '{name}' exists already, {}: join it with its own settings, or name another",
        .existing.differences(.asked)
    )]
    Conflict {
        /// Its name.
        name: String,
        /// The configuration it has.
        existing: Box<NetworkConfig>,
        /// The configuration that was asked for.
        asked: Box<NetworkConfig>,
    },
    /// The network does not exist, and the configuration is invalid.
    #[error(transparent)]
    Config(#[from] NetworkConfigError),
}

/// The named networks of a process.
///
/// The registry does not keep a network alive. A network lives as long as an `Arc` of it does, and
/// each port holds one. A registry can be a `static`.
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
    /// Makes an empty registry.
    pub const fn new() -> Self {
        Self { networks: Mutex::new(Vec::new()) }
    }
}

impl<B: PacketBuffer> Registry<B> {
    /// Returns the network of this name, and makes it if it does not exist.
    ///
    /// # Errors
    ///
    /// If the network exists with another configuration, or if the configuration is invalid.
    pub fn open(&self, name: &str, config: &NetworkConfig) -> Result<Arc<Network<B>>, OpenError> {
        let mut networks = self.networks.lock().unwrap_or_else(PoisonError::into_inner);
        networks.retain(|(_, network)| network.strong_count() > 0);
        let existing = networks.iter().find(|(existing, _)| existing == name);
        if let Some(network) = existing.and_then(|(_, network)| network.upgrade()) {
            if network.config != *config {
                let existing = Box::new(network.config.clone());
                let asked = Box::new(config.clone());
                return Err(OpenError::Conflict { name: name.to_owned(), existing, asked });
            }
            return Ok(network);
        }
        let network = Network::new(config.clone())?;
        networks.retain(|(existing, _)| existing != name);
        networks.push((name.to_owned(), Arc::downgrade(&network)));
        let gateway = config.gateway.then_some(config.ipv4.gateway);
        tracing::debug!(name, ?gateway, mtu = config.mtu, "network made");
        Ok(network)
    }
}

/// The settings of an interface that joins a network. Start from [`PortConfig::new`] and change the
/// public fields.
#[derive(Clone)]
pub struct PortConfig {
    /// The identity of the interface. The MAC address is computed from it, and is always the same.
    pub interface_id: [u8; 16],
    /// The MAC address, if it is not to be computed from the identity.
    pub mac: Option<MacAddr6>,
    /// Whether the interface exchanges frames with the gateway and the uplink only.
    pub isolated: bool,
    /// Whether the interface is the network's uplink, behind which any number of stations are. A
    /// network has one uplink at a time. It is not isolated, and its policy has the rule
    /// [`SourceRule::Any`].
    pub uplink: bool,
    /// What the interface may do.
    pub policy: PortPolicy,
    /// The work that the interface leaves to others, and accepts from others. Each packet that it
    /// receives has an offload header then; see the [module](self).
    pub offloads: Offloads,
    /// The number of queues, from 1 to [`QUEUES_MAX`], each with a receiver of its own
    /// ([`Port::split_queues`](crate::port::Port::split_queues)). The packets of one flow go to one queue;
    /// see the [module](self).
    pub queues: usize,
    /// The callback that wakes a receiver, unless it [sets](crate::port::Receiver::set_wake) another.
    pub wake: PortWake,
}

impl PortConfig {
    /// Returns the settings of an interface with this identity and callback: its MAC address is
    /// computed, it is not isolated and not the uplink, and it has the default policy, no offloads and one
    /// queue.
    pub fn new(interface_id: [u8; 16], wake: PortWake) -> Self {
        let (policy, offloads) = (PortPolicy::default(), Offloads::default());
        let (isolated, uplink, queues) = (false, false, 1);
        Self { interface_id, mac: None, isolated, uplink, policy, offloads, queues, wake }
    }
}

impl fmt::Debug for PortConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortConfig")
            .field("interface_id", &self.interface_id)
            .field("mac", &self.mac)
            .field("isolated", &self.isolated)
            .field("uplink", &self.uplink)
            .field("policy", &self.policy)
            .field("offloads", &self.offloads)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// Computes the MAC address of an interface from its identity.
///
/// The address is locally administered and unicast, and it is the same in every process and every
/// version. The probability that two of a thousand interfaces get the same address is about 2^-27;
/// in that case [`join`](Network::join) fails for the second.
pub fn mac_of_interface(interface_id: [u8; 16]) -> MacAddr6 {
    let id = u128::from_le_bytes(interface_id);
    local_mac(mix(mix(id as u64 ^ 0x766d_7269_6e67_0001) ^ (id >> 64) as u64))
}

/// Computes the MAC address of the gateway of a network with this configuration.
fn mac_of_gateway(config: &NetworkConfig) -> MacAddr6 {
    local_mac(mix(u64::from(u32::from(config.ipv4.gateway)) ^ 0x766d_7269_6e67_0002))
}

/// Makes the gateway of a network with this configuration, which has been checked, and opens its
/// lease file.
fn gateway_of(
    config: &NetworkConfig,
    now: Duration,
) -> Result<(Gateway, Option<LeaseFile>), NetworkConfigError> {
    let gateway = Gateway::new(DhcpConfig {
        server: config.ipv4.gateway,
        server_mac: mac_of_gateway(config),
        first: config.dhcp_first(),
        last: config.ipv4.end,
        mask: config.ipv4.mask,
        router: (config.mode == NetworkMode::Shared).then_some(config.ipv4.gateway),
        dns: config.dns.clone(),
        mtu: Some(config.mtu as u16), // checked: at most 65,521
        lease_time: config.lease_time,
    });
    let gateway = match &config.ipv6 {
        Some(ipv6) => gateway.with_ipv6(ipv6.clone()),
        None => gateway,
    };
    for (mac, address) in &config.reservations {
        gateway
            .dhcp()
            .reserve(*mac, *address, now)
            .map_err(|error| NetworkConfigError::Reservation { error })?;
    }
    // The leases come after the reservations, which say what a client can have.
    let lease_file = config.lease_file.as_deref().map(|path| {
        gateway
            .dhcp()
            .open_lease_file(path, now)
            .map_err(|error| NetworkConfigError::LeaseFile { error })
    });
    let lease_file = lease_file.transpose()?;
    Ok((gateway, lease_file))
}

/// A locally administered unicast address from the first six bytes of a hash.
fn local_mac(hash: u64) -> MacAddr6 {
    let [a, b, c, d, e, f, ..] = hash.to_be_bytes();
    MacAddr6::new(a & 0xfc | 0x02, b, c, d, e, f)
}

/// The network has never had an uplink.
const NO_UPLINK: u32 = u32::MAX;
/// The network has had an uplink, which has left.
const UPLINK_AWAY: u32 = u32::MAX - 1;

/// The ports that get a frame which is not for the gateway and not for one known address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// One port, which is the uplink.
    Uplink(usize),
    /// All other ports that are not isolated.
    NotIsolated,
    /// All other ports.
    All,
    /// All other ports behind which an unknown address can be.
    Anonymous,
    /// Nobody, for this reason.
    Nobody(DropReason),
}

/// Why a frame is for the port with an index. It is looked at again when the frame is accepted, because
/// another port may have the place by then.
pub(crate) enum Route<B> {
    /// The port is the sender's own, which stays.
    Own,
    /// Its address is behind the port.
    Known(Located),
    /// Its address is unknown, and the port is the uplink.
    Uplink,
    /// It is for all ports of a set, and the port is one of them.
    Member(fn(&Network<B>) -> &[AtomicU64; WORDS]),
}

impl<B> Clone for Route<B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Route<B> {}

impl<B> Route<B> {
    /// Whether the frame is for the port that has the place now.
    ///
    /// Everything that this looks at is set after an inbox of the port was opened first, and cleared
    /// after all of them were closed, before another port gets the place.
    #[inline]
    pub(crate) fn holds(&self, network: &Network<B>, index: usize) -> bool {
        match self {
            Route::Own => true,
            Route::Known(located) => network.table.holds(located),
            // Acquire: pairs with the Release in `admit`.
            Route::Uplink => network.uplink.load(Ordering::Acquire) as usize == index,
            // Acquire: pairs with the Release in `set_open`.
            Route::Member(set) => {
                set(network)[index / 64].load(Ordering::Acquire) >> (index % 64) & 1 != 0
            }
        }
    }
}

/// The members of a network. Joining, leaving and reading statistics take its lock; forwarding does
/// not.
struct Members {
    macs: Vec<Option<MacAddr6>>,
    count: usize,
}

/// A network. See the [module](self).
pub struct Network<B> {
    config: NetworkConfig,
    pub(crate) max_packet_size: usize,
    /// The length of the longest frame without a tag.
    pub(crate) max_untagged_size: usize,
    pub(crate) gateway: Option<Arc<Gateway>>,
    pub(crate) gateway_mac: Option<Mac>,
    clock: Arc<dyn Clock>,
    /// What it has of its router, if it is configured with one.
    pub(crate) router: Option<RouterSide<B>>,
    /// The key of the flows' hash.
    pub(crate) flow_key: u64,
    pub(crate) table: MacTable,
    ports: Box<[OnceLock<Arc<PortState<B>>>]>,
    /// A bit for each port that gets what the gateway sends to all: it is present and open.
    pub(crate) open: [AtomicU64; WORDS],
    /// A bit for each port that gets flooded frames: it is present, open, and not isolated.
    pub(crate) floodable: [AtomicU64; WORDS],
    /// A bit for each port behind which an unknown address can be: it is present, open, sends from any
    /// source, and is not the uplink.
    pub(crate) anonymous: [AtomicU64; WORDS],
    /// The index of the uplink's port, or [`NO_UPLINK`], or [`UPLINK_AWAY`]. Writers hold the lock of
    /// the members.
    uplink: AtomicU32,
    members: Mutex<Members>,
    /// Writes the leases until the network ends.
    _lease_file: Option<LeaseFile>,
}

impl<B> fmt::Debug for Network<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("config", &self.config).finish_non_exhaustive()
    }
}

impl<B> Network<B> {
    /// Returns the configuration the network was made with.
    pub fn config(&self) -> &NetworkConfig {
        &self.config
    }

    /// Returns the length of the longest frame the network carries.
    pub fn max_packet_size(&self) -> usize {
        self.max_packet_size
    }

    /// Returns the network's gateway, unless it is a [switch](NetworkConfig::switch).
    pub fn gateway(&self) -> Option<&Gateway> {
        self.gateway.as_deref()
    }

    /// Returns how many ports are on the network.
    pub fn ports(&self) -> usize {
        self.members().count
    }

    /// Returns the DHCP leases that are running, sorted by address. Without a gateway there are none.
    pub fn leases(&self) -> Vec<DhcpLease> {
        let leases = |gateway: &Gateway| gateway.dhcp().leases(self.clock.now());
        self.gateway().map(leases).unwrap_or_default()
    }

    /// Returns the DHCP lease of one MAC address, if it is running.
    pub fn lease_of(&self, mac: MacAddr6) -> Option<DhcpLease> {
        self.gateway()?.dhcp().lease_of(mac, self.clock.now())
    }

    /// Returns the MAC address and the counters of each port on the network.
    pub fn stats(&self) -> Vec<(MacAddr6, PortStats)> {
        let members = self.members();
        let stats = |(index, mac): (usize, &Option<MacAddr6>)| {
            Some(((*mac)?, self.ports[index].get()?.stats()))
        };
        members.macs.iter().enumerate().filter_map(stats).collect()
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn port_state(&self, index: usize) -> Option<&PortState<B>> {
        self.ports.get(index)?.get().map(|state| &**state)
    }

    /// The length of the longest packet of a port or a receiver of this shape.
    pub(crate) fn longest_of(&self, shape: Shape) -> usize {
        match shape.is_large() {
            true => LARGE_PACKET + ETHERNET_HEADER_LEN + VLAN_TAG_LEN,
            false => self.max_packet_size,
        }
    }

    /// Reads the clock.
    pub(crate) fn read_clock(&self) -> Duration {
        self.clock.now()
    }

    /// Replaces the limits of a port. Returns false if the port has left.
    pub(crate) fn set_limits(&self, index: usize, generation: u32, limits: PortLimits) -> bool {
        // The lock keeps the port where it is, and a second change away.
        let _members = self.members();
        let Some(state) = self.port_state(index) else { return false };
        let present = state.generation.load(Ordering::Relaxed) == generation;
        if present {
            state.policy.set_limits(limits, Moment::new(self.clock.now()));
        }
        present
    }

    /// Returns whether the port with this index is the uplink.
    pub(crate) fn is_uplink(&self, index: usize) -> bool {
        // Relaxed: the index publishes nothing.
        self.uplink.load(Ordering::Relaxed) as usize == index
    }

    /// Returns whether a frame of `from` to a group is for the gateway too. Behind the uplink is another
    /// network, whose IPv6 is its own.
    pub(crate) fn gateway_hears(&self, from: PortRef, group: Mac) -> bool {
        let Some(gateway) = &self.gateway else { return false };
        let [_, _, bytes @ ..] = group.bits().to_be_bytes();
        group == Mac::BROADCAST || !from.is_uplink() && gateway.hears(bytes.into())
    }

    /// Returns who gets a frame of `from` that is for a group.
    pub(crate) fn audience_of_group(&self, from: PortRef) -> Audience {
        if from.is_uplink() {
            return Audience::All;
        }
        if !from.isolated() {
            return Audience::NotIsolated;
        }
        match self.uplink.load(Ordering::Relaxed) {
            NO_UPLINK | UPLINK_AWAY => Audience::Nobody(DropReason::Isolated),
            uplink => Audience::Uplink(uplink as usize),
        }
    }

    /// Returns who gets a frame of `from` that is for an unknown address. The [module](self) says why.
    pub(crate) fn audience_of_unknown(&self, from: PortRef) -> Audience {
        if from.is_uplink() {
            // Relaxed: whether there are any is only a reason to count. `Sender::send_to_all` looks
            // again.
            let any = self.anonymous.iter().any(|word| word.load(Ordering::Relaxed) != 0);
            return if any { Audience::Anonymous } else { Audience::Nobody(DropReason::Unknown) };
        }
        // Relaxed: the index publishes nothing. A port that has left has a closed inbox.
        match self.uplink.load(Ordering::Relaxed) {
            NO_UPLINK if from.isolated() => Audience::Nobody(DropReason::Isolated),
            NO_UPLINK => Audience::NotIsolated,
            UPLINK_AWAY => Audience::Nobody(DropReason::Unknown),
            uplink => Audience::Uplink(uplink as usize),
        }
    }

    /// Adds a queue of a port to those that senders pick from, or takes it away. Its inbox is open.
    pub(crate) fn set_queue_open(&self, membership: &Membership<B>, number: usize, on: bool) {
        // The lock keeps the sets of ports in step with the queues of the port.
        let _members = self.members();
        let Some(state) = membership.port_state() else { return };
        let (before, after) = state.queues.set_open(number, on);
        if before.is_empty() != after.is_empty() {
            self.set_open(membership.port, membership.source, on);
        }
    }

    /// Sets whether a port gets frames to all: those of the gateway and the uplink, also those of the
    /// other ports if it is not isolated, and also those to unknown addresses if one can be behind it.
    fn set_open(&self, port: PortRef, source: SourceRule, on: bool) {
        let (word, bit) = (port.index() / 64, 1 << (port.index() % 64));
        let anonymous = source == SourceRule::Any && !port.is_uplink();
        let sets = [
            Some(&self.open),
            (!port.isolated()).then_some(&self.floodable),
            anonymous.then_some(&self.anonymous),
        ];
        for set in sets.into_iter().flatten() {
            // Release: pairs with the Acquire in `Sender::send_to_all`; a sender that sees the bit
            // finds the port ready.
            if on {
                set[word].fetch_or(bit, Ordering::Release);
            } else {
                set[word].fetch_and(!bit, Ordering::Release);
            }
        }
    }
}

impl<B> Drop for Network<B> {
    fn drop(&mut self) {
        if let Some(router) = self.router.as_ref().and_then(RouterSide::get) {
            router.stop();
        }
    }
}

impl<B: PacketBuffer> Network<B> {
    /// Sets what routes to other networks, unless the network has such a router already. Returns the one
    /// that it has from now on, or `None` if its [configuration](NetworkConfig::router) has none.
    pub fn set_router(&self, router: Arc<dyn Router<B>>) -> Option<&Arc<dyn Router<B>>> {
        Some(self.router.as_ref()?.set(router))
    }

    /// Returns what routes to other networks, if it was set.
    pub fn router(&self) -> Option<&Arc<dyn Router<B>>> {
        self.router.as_ref()?.get()
    }

    /// Starts the router, if one is set and it does not run. Otherwise the first frame for another network
    /// does so.
    ///
    /// # Errors
    ///
    /// That of [`Router::start`].
    pub fn start_router(&self) -> std::io::Result<()> {
        self.router.as_ref().map_or(Ok(()), RouterSide::start)
    }

    /// The [worker](crate::router) of the router that has what guests send from a port of theirs. `protocol`
    /// is the protocol's number, and `port` the guest's port, or its identifier of ICMP echo. What comes in
    /// for that port from outside is best with the same worker. It is less than
    /// [`NetworkConfig::router_workers`], and does not change.
    pub fn router_worker(&self, protocol: u8, port: u16) -> usize {
        self.router.as_ref().map_or(0, |router| router.worker_of(protocol, port))
    }

    /// Makes a network without ports. It is in no registry.
    ///
    /// # Errors
    ///
    /// If the configuration is invalid.
    pub fn new(config: NetworkConfig) -> Result<Arc<Self>, NetworkConfigError> {
        Self::with_clock(config, Box::new(SystemClock::new()))
    }

    /// Like [`new`](Self::new), but with this clock.
    ///
    /// # Errors
    ///
    /// If the configuration is invalid.
    pub fn with_clock(
        config: NetworkConfig,
        clock: Box<dyn Clock>,
    ) -> Result<Arc<Self>, NetworkConfigError> {
        config.check()?;
        let (gateway, lease_file) = if config.gateway {
            let (gateway, lease_file) = gateway_of(&config, clock.now())?;
            (Some(Arc::new(gateway)), lease_file)
        } else {
            (None, None)
        };
        let clock = Arc::from(clock);
        let flow_key = RandomState::new().hash_one(0u64);
        let max_packet_size = config.max_packet_size();
        let max_untagged_size = max_packet_size - VLAN_TAG_LEN;
        let router = gateway.as_ref().filter(|_| config.router.is_some()).map(|gateway| {
            let (gateway, clock) = (Arc::clone(gateway), Arc::clone(&clock));
            let workers = config.router_workers;
            RouterSide::new(gateway, clock, flow_key, workers, max_untagged_size, max_packet_size)
        });
        Ok(Arc::new(Self {
            max_packet_size,
            max_untagged_size,
            router,
            gateway_mac: gateway.as_ref().map(|gateway| Mac::new(gateway.mac().into_array())),
            gateway,
            clock,
            flow_key,
            table: MacTable::new(config.mac_ageing.as_secs() as u32),
            ports: (0..MAX_PORTS).map(|_| OnceLock::new()).collect(),
            open: core::array::from_fn(|_| AtomicU64::new(0)),
            floodable: core::array::from_fn(|_| AtomicU64::new(0)),
            anonymous: core::array::from_fn(|_| AtomicU64::new(0)),
            uplink: AtomicU32::new(NO_UPLINK),
            _lease_file: lease_file,
            members: Mutex::new(Members { macs: vec![None; MAX_PORTS], count: 0 }),
            config,
        }))
    }

    /// Gives an interface its place on the network, and opens the inbox of that place.
    pub(crate) fn admit(self: &Arc<Self>, config: PortConfig) -> Result<Admitted<B>, JoinError> {
        let mac = config.mac.unwrap_or_else(|| mac_of_interface(config.interface_id));
        let key = Mac::new(mac.into_array());
        if !key.is_unicast() {
            return Err(JoinError::NotUnicast { mac });
        }
        if config.uplink && (config.isolated || config.policy.source != SourceRule::Any) {
            return Err(JoinError::BoundUplink);
        }
        if !(1..=QUEUES_MAX).contains(&config.queues) {
            return Err(JoinError::Queues { asked: config.queues });
        }
        let mut members = self.members();
        if config.uplink && !matches!(self.uplink.load(Ordering::Relaxed), NO_UPLINK | UPLINK_AWAY)
        {
            return Err(JoinError::SecondUplink);
        }
        if Some(key) == self.gateway_mac || self.table.assigned(key).is_some() {
            return Err(JoinError::DuplicateMac { mac });
        }
        let index = members.macs.iter().position(Option::is_none).ok_or(JoinError::Full)?;
        let state = self.ports[index].get_or_init(|| Arc::new(PortState::new()));
        let shape = Shape::new(config.offloads);
        state.counters.reset(state.queues.received());
        state.policy.reset(config.policy.limits, Moment::new(self.clock.now()));
        // The last owners dropped their collectors before their port left, so the inboxes can be opened.
        let open = |queue: &ReceiveQueue<B>| {
            queue.open(shape, config.wake.clone(), |shape| self.make_inbox(shape))
        };
        let queues = (0..config.queues).filter_map(|number| state.queues.get(number));
        let ends = queues.map(open).collect::<Option<Vec<_>>>().ok_or(JoinError::Full)?;
        members.macs[index] = Some(mac);
        members.count += 1;
        if let Some(gateway) = &self.gateway {
            gateway.port_joined(index as u32);
        }
        let (isolated, uplink) = (config.isolated, config.uplink);
        let port = if uplink { PortRef::uplink(index) } else { PortRef::new(index, isolated) };
        self.table.pin(key, port);
        if uplink {
            // Release: pairs with the Acquire in `Route::holds`.
            self.uplink.store(index as u32, Ordering::Release);
        }
        let generation = state.generation.load(Ordering::Relaxed);
        let longest = self.longest_of(shape);
        // The lock keeps this in order with other ports that have the place.
        let outbox = self.router.as_ref().map(|router| {
            let state = Arc::clone(state);
            let end = NewPort { number: index as u32, generation, mac, is_uplink: uplink, state };
            router.port_joined(end, (shape, longest))
        });
        drop(members);
        tracing::debug!(%mac, index, isolated, uplink, "port joined");
        let membership = Arc::new(Membership {
            network: Arc::clone(self),
            index,
            generation,
            outbox,
            port,
            mac,
            source: config.policy.source,
            role: config.policy.role,
            shape,
            offloads: shape.offloads(),
            longest,
        });
        Ok(Admitted { ends, state: Arc::clone(state), membership })
    }

    /// Makes an inbox for a receiver of this shape.
    pub(crate) fn make_inbox(&self, shape: Shape) -> Inbox<B> {
        let longest = self.longest_of(shape);
        let (depth, overflow) = (self.config.inbox_depth, self.config.overflow(longest));
        let make = if shape.has_header() { Inbox::with_headers } else { Inbox::new };
        make(depth, overflow, longest)
    }
}

/// What [`Network::admit`] returns: the parts of a port's two halves.
pub(crate) struct Admitted<B: PacketBuffer> {
    // This order matters: the ends are dropped first, so the inboxes are closed and empty before
    // the port leaves.
    /// One for each queue. They are closed.
    pub(crate) ends: Vec<QueueEnd<B>>,
    pub(crate) state: Arc<PortState<B>>,
    pub(crate) membership: Arc<Membership<B>>,
}

/// A port's place on the network. The port leaves when its receiver and all its senders are
/// dropped.
pub(crate) struct Membership<B> {
    pub(crate) network: Arc<Network<B>>,
    pub(crate) index: usize,
    pub(crate) generation: u32,
    pub(crate) port: PortRef,
    pub(crate) mac: MacAddr6,
    pub(crate) source: SourceRule,
    /// Where frames for the network's router go, if there is one.
    pub(crate) outbox: Option<Outbox>,
    pub(crate) role: PortRole,
    /// The shape of a receiver that accepts all offloads of the port.
    pub(crate) shape: Shape,
    pub(crate) offloads: Offloads,
    /// The length of the longest packet that the port sends, and that such a receiver receives.
    pub(crate) longest: usize,
}

impl<B> Membership<B> {
    pub(crate) fn port_state(&self) -> Option<&PortState<B>> {
        self.network.port_state(self.index)
    }

    pub(crate) fn stats(&self) -> PortStats {
        self.port_state().map(PortState::stats).unwrap_or_default()
    }
}

impl<B> Membership<B> {
    /// Checks whether the port may send a frame with this source address, and learns the address if
    /// so. `own` is the address that needs no check; a port that is bound to its first address gets
    /// its own here. `now` is the batch's time in seconds.
    #[inline]
    pub(crate) fn admit_source(
        &self,
        own: &mut Option<Mac>,
        from: Mac,
        now: u32,
    ) -> Result<(), DropReason> {
        if *own == Some(from) {
            return Ok(());
        }
        let network = &*self.network;
        if !from.is_unicast() || Some(from) == network.gateway_mac {
            return Err(DropReason::BadSource);
        }
        if self.port.is_uplink() {
            // An unknown address is behind the uplink anyway, so none is learned there.
            return match network.table.move_away(from) {
                Some(owner) if owner != self.port => Err(DropReason::Spoofed),
                _ => Ok(()),
            };
        }
        match self.source {
            SourceRule::Any => match network.table.learn(from, self.port, now) {
                Learned::Here => Ok(()),
                Learned::Elsewhere => Err(DropReason::BadSource),
            },
            SourceRule::Fixed => Err(DropReason::Spoofed),
            SourceRule::LearnOnce => {
                *own = Some(self.bind(from)?);
                Ok(())
            }
        }
    }

    /// Binds the port to its first source address, or checks that it is the one that the port is
    /// bound to.
    #[cold]
    fn bind(&self, from: Mac) -> Result<Mac, DropReason> {
        let network = &*self.network;
        let state = self.port_state().ok_or(DropReason::Closed)?;
        let verdict = |bound| if bound == from { Ok(from) } else { Err(DropReason::Spoofed) };
        // These two looks are without the lock, so that a guest cannot hold it by its frames.
        if let Some(bound) = state.policy.bound() {
            return verdict(bound);
        }
        let elsewhere = || network.table.assigned(from).is_some_and(|port| port != self.port);
        if elsewhere() {
            return Err(DropReason::BadSource);
        }
        let _members = network.members();
        if let Some(bound) = state.policy.bound() {
            // Another sender of this port has bound it meanwhile.
            return verdict(bound);
        }
        if elsewhere() {
            return Err(DropReason::BadSource);
        }
        if network.table.assigned(from).is_none() {
            network.table.pin(from, self.port);
        }
        state.policy.bind(from);
        tracing::debug!(mac = %self.mac, index = self.index, "port bound to its first source");
        Ok(from)
    }
}

impl<B> Drop for Membership<B> {
    fn drop(&mut self) {
        let network = &*self.network;
        // All senders of the port are gone, so nothing more is learned about it. Its receivers are gone,
        // so its inboxes are closed and empty, and no frame to all comes here.
        let mut members = network.members();
        if self.port.is_uplink() {
            network.uplink.store(UPLINK_AWAY, Ordering::Relaxed);
        }
        network.table.forget(Mac::new(self.mac.into_array()), self.index);
        if let Some(state) = self.port_state() {
            if let Some(bound) = state.policy.bound() {
                network.table.forget(bound, self.index);
            }
            state.generation.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(gateway) = &network.gateway {
            gateway.port_left(self.index as u32);
        }
        if let Some(router) = &network.router {
            router.port_left(self.index as u32, self.generation);
        }
        members.macs[self.index] = None;
        members.count -= 1;
        drop(members);
        tracing::debug!(mac = %self.mac, index = self.index, "port left");
    }
}
