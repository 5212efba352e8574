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
//!
//! [`Port`]: crate::port::Port
//! [`Receiver`]: crate::port::Receiver
//! [`Sender`]: crate::port::Sender

use core::fmt;
use core::time::Duration;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crossbeam_utils::CachePadded;
use macaddr::MacAddr6;
use vmring_core::sync::{self, AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::clock::{Clock, SystemClock};
use crate::config::{NetworkConfig, NetworkConfigError, NetworkMode};
use crate::dhcp::{DhcpConfig, DhcpLease};
use crate::gateway::Gateway;
use crate::inbox::{Collector, Inbox, PortWake};
use crate::limits::MAX_PORTS;
use crate::stats::{PortCounters, PortStats};
use crate::table::{Learned, Mac, MacTable, PortRef, mix};

pub(crate) const WORDS: usize = MAX_PORTS / 64;

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
    Config(#[from] NetworkConfigError),
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
    pub wake: PortWake,
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

/// The part of a port others reach. Kept when the port leaves, and reused.
pub(crate) struct PortState<B> {
    pub(crate) inbox: sync::Arc<Inbox<B>>,
    /// Goes up when a port leaves, so that a late [`Monitor`](crate::port::Monitor) sees that it is another's.
    pub(crate) generation: AtomicU32,
    pub(crate) counters: PortCounters,
}

/// Who is on the network. Behind a lock that only joining and leaving take.
struct Members {
    macs: Vec<Option<MacAddr6>>,
    count: usize,
}

/// A network. See the [module](self).
pub struct Network<B> {
    config: NetworkConfig,
    pub(crate) max_packet_size: usize,
    pub(crate) gateway: Gateway,
    pub(crate) gateway_mac: Mac,
    clock: Box<dyn Clock>,
    /// The clock's seconds when somebody last looked.
    seconds: CachePadded<AtomicU32>,
    pub(crate) table: MacTable,
    ports: Box<[OnceLock<Arc<PortState<B>>>]>,
    /// Ports that get what is sent to all: present, open, not isolated.
    pub(crate) floodable: [AtomicU64; WORDS],
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
    pub fn leases(&self) -> Vec<DhcpLease> {
        self.gateway.dhcp().leases(Duration::from_secs(self.read_clock().into()))
    }

    /// The DHCP lease of one MAC address, if it is running.
    pub fn lease_of(&self, mac: MacAddr6) -> Option<DhcpLease> {
        self.gateway.dhcp().lease_of(mac, Duration::from_secs(self.read_clock().into()))
    }

    /// What has passed through each port that is on it, with its MAC address.
    pub fn stats(&self) -> Vec<(MacAddr6, PortStats)> {
        let members = self.members();
        let stats = |(index, mac): (usize, &Option<MacAddr6>)| {
            Some(((*mac)?, self.ports[index].get()?.counters.stats()))
        };
        members.macs.iter().enumerate().filter_map(stats).collect()
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn port_state(&self, index: usize) -> Option<&PortState<B>> {
        self.ports.get(index)?.get().map(|state| &**state)
    }

    /// Reads the clock, for everybody.
    pub(crate) fn read_clock(&self) -> u32 {
        let now = self.clock.now().as_secs() as u32;
        if self.seconds.load(Ordering::Relaxed) != now {
            self.seconds.store(now, Ordering::Relaxed);
        }
        now
    }

    pub(crate) fn set_floodable(&self, index: usize, on: bool) {
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
    pub fn new(config: NetworkConfig) -> Result<Arc<Self>, NetworkConfigError> {
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
    ) -> Result<Arc<Self>, NetworkConfigError> {
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
            ports: (0..MAX_PORTS).map(|_| OnceLock::new()).collect(),
            floodable: core::array::from_fn(|_| AtomicU64::new(0)),
            members: Mutex::new(Members { macs: vec![None; MAX_PORTS], count: 0 }),
            config,
        }))
    }

    /// Gives an interface its place on the network, and opens the inbox there.
    pub(crate) fn admit(self: &Arc<Self>, config: PortConfig) -> Result<Admitted<B>, JoinError> {
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
        let state = self.ports[index].get_or_init(|| {
            Arc::new(PortState {
                inbox: sync::Arc::new(Inbox::new(
                    self.config.inbox_depth,
                    self.config.overflow(),
                    self.max_packet_size,
                )),
                generation: AtomicU32::new(0),
                counters: PortCounters::default(),
            })
        });
        state.counters.reset();
        // The last owner's collector was dropped before its port left, so this opens.
        let collector = Inbox::open(&state.inbox, config.wake).ok_or(JoinError::Full)?;
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
            generation: state.generation.load(Ordering::Relaxed),
            port,
            mac,
            receiver_open: AtomicBool::new(true),
        });
        Ok(Admitted { collector, state: Arc::clone(state), membership })
    }
}

/// An interface that is on the network: what its two halves are made of.
pub(crate) struct Admitted<B: AsMut<[u8]> + Send> {
    // In this order: the inbox is closed and empty before the port leaves.
    pub(crate) collector: Collector<B>,
    pub(crate) state: Arc<PortState<B>>,
    pub(crate) membership: Arc<Membership<B>>,
}

/// A port's place on the network, left when its receiver and all its senders are gone.
pub(crate) struct Membership<B> {
    pub(crate) network: Arc<Network<B>>,
    pub(crate) index: usize,
    pub(crate) generation: u32,
    pub(crate) port: PortRef,
    pub(crate) mac: MacAddr6,
    /// Whether the receiver is open; it alone writes this.
    pub(crate) receiver_open: AtomicBool,
}

impl<B> Membership<B> {
    pub(crate) fn port_state(&self) -> Option<&PortState<B>> {
        self.network.port_state(self.index)
    }

    pub(crate) fn stats(&self) -> PortStats {
        self.port_state().map(|state| state.counters.stats()).unwrap_or_default()
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
        if let Some(state) = self.port_state() {
            state.generation.fetch_add(1, Ordering::Relaxed);
        }
        members.macs[self.index] = None;
        members.count -= 1;
        drop(members);
        tracing::debug!(mac = %self.mac, index = self.index, "port left");
    }
}

/// Whether a frame with this source address may come from this port; if so, its way back is learned.
pub(crate) fn learn_source<B>(network: &Network<B>, port: PortRef, from: Mac, now: u32) -> bool {
    from.is_unicast()
        && from != network.gateway_mac
        && network.table.learn(from, port, now) == Learned::Here
}
