//! The embedded network as a device. It does what vmnet does, in this process and without
//! privileges. See [`vmring_embedded`].
//!
//! # Several guests below one TAP or vmnet
//!
//! A queue of a TAP per guest leaves it to the kernel which guest gets a packet. So the guests are
//! ports of a [switch](Embedded::switch), a network without a gateway and DHCP, and the TAP or vmnet
//! is behind its [uplink](Embedded::uplink). Something that forwards packets both ways between the
//! uplink's interface and the TAP's connects them. A guest that is not trusted gets a
//! [source rule](Embedded::source).
//!
//! ```
//! use vmring::device::embedded::SourceRule;
//! use vmring::{Embedded, Interface};
//!
//! let join = |driver: Embedded| Interface::builder().device(driver).start();
//! let uplink = join(Embedded::switch("below the TAP").uplink())?;
//! let guest = join(Embedded::switch("below the TAP").source(SourceRule::LearnOnce))?;
//! # drop((uplink, guest));
//! # Ok::<(), vmring::Error>(())
//! ```
//!
//! # Offload
//!
//! Each interface can ask for its own [offloads](crate::InterfaceBuilder::offloads) and gets them. With
//! any of them its frames need 12 bytes of headroom, for a `virtio_net_hdr` in front of each packet. With
//! a segmentation offload its `max_packet_size` is 65,553 bytes, whatever the MTU is, and packets of 64
//! KiB pass uncut between such interfaces. For an interface that does not do what a packet leaves, the
//! sender's thread completes the checksum or cuts the packet into segments.
//! [`Interface::counters`](crate::Interface::counters) says how often.
//!
//! A ring can accept less than its interface ([`RingBuilder::receive_offloads`]), such as that of a guest
//! which has not negotiated as much. Senders do the rest, and the ring's reads need no more space than
//! its packets.
//!
//! # Several rings
//!
//! Several rings can read from one interface ([`Embedded::queues`]), each the packets of its own flows.
//! The ring that opens first has all flows, and each further one takes its share.
//!
//! # The way out
//!
//! With the feature `nat`, guests of a network in shared mode reach the world through sockets of this
//! process, and ports of the host can lead to guests: see the module `nat`. A thread of the network does
//! that, which starts with the first packet for outside. Without the feature, and in host mode, the gateway
//! answers that there is no way.
//!
//! # What a write may be
//!
//! A packet that leaves work to others is copied by itself: several of them are not claimed together.
//! A header that is not true of its packet fails the write with
//! [`Status::InvalidArgument`].
//!
//! [`RingBuilder::receive_offloads`]: crate::RingBuilder::receive_offloads

mod ipv6;
mod limits_control;
#[cfg(feature = "nat")]
pub mod nat;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use macaddr::MacAddr6;
use vmring_core::guest::SEGMENTS_MAX;
use vmring_core::offload::{self, OffloadHeader};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_core::{Buffer, Frame, GuestBuffer};
use vmring_embedded::inbox::{Collected, PortWake};
use vmring_embedded::network::{PortConfig, Registry};
use vmring_embedded::packet::Packet;
use vmring_embedded::port::{Port, Receiver, Run, Sender};
use vmring_embedded::{
    Accepted, AddressRange, DropReason, Monitor, Network, NetworkConfig, NetworkMode, NextFrame,
    PortPolicy, Sent,
};

use crate::config::{InterfaceConfig, InterfaceInfo, Ipv4Range, Mode, Offloads};
#[cfg(feature = "nat")]
use crate::config::{PortForward, Protocol};
use crate::device::bounce::{header_of, is_complete};
use crate::device::context::PollContext;
use crate::device::dhcp_settings::{DhcpSettings, dhcp_counters};
use crate::device::inbox_reader::{InboxEnd, InboxReader};
use crate::device::seam::{
    Capabilities, Device, Driver, Lease, Progress, Queue, QueueConfig, Wake,
};
use crate::device::slot::PostedSlot;
use crate::error::{ConfigError, Error, Status};
use crate::sync::Mutex;
use crate::sys::lock;
use limits_control::PortMonitor;
#[cfg(feature = "nat")]
use nat::{NatControl, NatSettings};

pub use limits_control::LimitsControl;
pub use vmring_embedded::limits::QUEUES_MAX;
pub use vmring_embedded::{PortLimits, PortRole, Rate, RateLimit, SourceRule};

/// The networks of this process, by name.
static NETWORKS: Registry<PostedSlot> = Registry::new();

/// A driver for [`Interface::builder`](crate::Interface::builder) whose interface is a port of a
/// network in this process.
///
/// Interfaces of one process that name the same network can reach each other. A network exists as
/// long as an interface is on it; an interface that is stopped is not on it. All interfaces of a
/// network must agree on its mode, addresses and MTU.
#[derive(Clone, Debug)]
pub struct Embedded {
    network: String,
    /// Whether the network has a gateway.
    gateway: bool,
    uplink: bool,
    source: SourceRule,
    role: PortRole,
    limits: LimitsControl,
    queues: usize,
    dhcp: DhcpSettings,
    overflow: Option<u32>,
    dns: Vec<Ipv4Addr>,
    /// The way out of a shared network. `None` if it was turned off.
    #[cfg(feature = "nat")]
    nat: Option<NatSettings>,
    #[cfg(feature = "nat")]
    nat_control: NatControl,
    ipv6: ipv6::Choice,
}

impl Embedded {
    /// Returns a driver for a port of the network `name`. A host network and a shared network of
    /// one name are two networks.
    pub fn network(name: impl Into<String>) -> Self {
        Self {
            network: name.into(),
            gateway: true,
            uplink: false,
            source: SourceRule::Any,
            role: PortRole::Any,
            limits: LimitsControl::default(),
            queues: 1,
            dhcp: DhcpSettings::default(),
            overflow: None,
            dns: Vec::new(),
            #[cfg(feature = "nat")]
            nat: Some(NatSettings::default()),
            #[cfg(feature = "nat")]
            nat_control: NatControl::default(),
            ipv6: ipv6::Choice::default(),
        }
    }

    /// Returns a driver for a port of the switch `name`: a network without a gateway and DHCP, which
    /// answers nothing itself. A network of that name is another one. The mode of the interface means
    /// nothing here, and the settings of addresses and DHCP are refused.
    pub fn switch(name: impl Into<String>) -> Self {
        Self { gateway: false, ..Self::network(name) }
    }

    /// Makes the interface the uplink of its network, which leads to many other stations. Frames to
    /// unknown addresses go there and not to the guests, and isolated interfaces reach it; see
    /// [`vmring_embedded::network`]. A network has one uplink at a time.
    pub fn uplink(mut self) -> Self {
        self.uplink = true;
        self
    }

    /// Sets from which MAC addresses the interface sends. Frames from others, and ARP packets that
    /// name others, are dropped and counted as "spoofed". The default is [`SourceRule::Any`].
    pub fn source(mut self, rule: SourceRule) -> Self {
        self.source = rule;
        self
    }

    /// Sets what the guest may be for others: with [`PortRole::Host`], neither a router nor a DHCP server. What
    /// it sends as such is dropped and counted as "forbidden role". The default is [`PortRole::Any`].
    pub fn role(mut self, role: PortRole) -> Self {
        self.role = role;
        self
    }

    /// Gives the interface the limits of this handle, which can change them later. The default is
    /// [`PortLimits::default`].
    pub fn limits(mut self, control: &LimitsControl) -> Self {
        self.limits = control.clone();
        self
    }

    /// Sets how many rings can read at the same time, from 1 to 16, for a guest with several processors
    /// ([`Capabilities::reading_rings`]). The packets of one flow go to one ring. A ring that closes gives
    /// its flows to those that are left; packets that wait for a buffer of it are dropped then, and counted
    /// as "closed", at most as many as [`overflow`](Self::overflow) says. The packets of the last ring wait
    /// for the next one. The default is 1.
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    /// Sets how long an address that the network gives out is valid. The default is 24 hours, as in
    /// Apple's `bootpd`.
    pub fn lease_time(mut self, time: Duration) -> Self {
        self.dhcp.lease_time = Some(time);
        self
    }

    /// Sets the addresses for guests without a reservation, the first and the last. They must lie
    /// after the gateway's. The default is every address after the gateway's, up to the end of the
    /// network's range.
    pub fn dhcp_range(mut self, first: Ipv4Addr, last: Ipv4Addr) -> Self {
        self.dhcp.range = Some((first, last));
        self
    }

    /// Reserves an address of the subnet for the guest with this MAC address. It can be called
    /// several times, for several guests.
    pub fn reserve(mut self, mac: MacAddr6, address: Ipv4Addr) -> Self {
        self.dhcp.reservations.push((mac, address));
        self
    }

    /// Sets the file that remembers the leases when the network ends; it is made if it does not
    /// exist. Each network needs a file of its own. A thread of the network writes to it. Without a
    /// file most guests get their old addresses too, because a guest's first choice follows from
    /// its MAC address; see [`vmring_embedded::dhcp`].
    pub fn lease_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.dhcp.lease_file = Some(path.into());
        self
    }

    /// Sets how many packets wait for a port that has no posted read. Further packets are dropped.
    pub fn overflow(mut self, packets: u32) -> Self {
        self.overflow = Some(packets);
        self
    }

    /// Gives the network IPv6: a prefix of 64 bits, from which guests choose their addresses, and a gateway
    /// in it. Without an argument it is a unique local prefix that follows from the network's mode and
    /// name, so that guests keep their addresses when the network is made again. By default a network with
    /// a way out has such a prefix, and another one has no IPv6. See [`vmring_embedded::gateway`].
    pub fn ipv6(mut self, prefix: Option<Ipv6Addr>) -> Self {
        self.ipv6 = prefix.map_or(ipv6::Choice::OfName, ipv6::Choice::Prefix);
        self
    }

    /// Leaves the network without IPv6: the gateway has no address of it, and guests are told none.
    pub fn no_ipv6(mut self) -> Self {
        self.ipv6 = ipv6::Choice::No;
        self
    }

    /// Adds name servers that the network announces. Without any, a network with a way out announces its
    /// gateway, which asks the host's resolvers. Another one announces none.
    pub fn dns(mut self, servers: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        self.dns.extend(servers);
        self
    }
}

/// The way out. With the feature `nat`.
#[cfg(feature = "nat")]
impl Embedded {
    /// Sets what the guests of a shared network reach outside, and which ports of the host lead to them;
    /// see the module [`nat`]. All interfaces of a network must agree on it. It means nothing in host mode
    /// and on a switch.
    pub fn nat(mut self, settings: NatSettings) -> Self {
        self.nat = Some(settings);
        self
    }

    /// Leaves a shared network without a way out: the gateway answers that there is none.
    pub fn no_nat(mut self) -> Self {
        self.nat = None;
        self
    }

    /// Makes a handle that of the interface's network. It adds and removes port forwards, and shows flows
    /// and counters.
    pub fn nat_control(mut self, control: &NatControl) -> Self {
        self.nat_control = control.clone();
        self
    }
}

impl Driver for Embedded {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let mode = match &config.mode {
            Mode::Host => NetworkMode::Host,
            Mode::Shared => NetworkMode::Shared,
            Mode::Bridged(_) => {
                let device = "embedded".to_owned();
                return Err(Error::NotSupported { what: "bridged mode", device });
            }
        };
        if !self.gateway {
            return self.start_on_switch(config);
        }
        let addresses = match config.ipv4 {
            Some(Ipv4Range { start: gateway, end, mask }) => AddressRange { gateway, end, mask },
            None => AddressRange::of(mode),
        };
        let mut network = self.dhcp.network(mode, addresses)?;
        network.mtu = config.mtu.unwrap_or(network.mtu);
        network.overflow_depth = self.overflow.or(network.overflow_depth);
        network.dns = self.dns.clone();
        #[cfg(feature = "nat")]
        if let Some(settings) = self.nat.as_ref().filter(|_| mode == NetworkMode::Shared) {
            network.router = Some(settings.rows());
            network.router_workers = settings.number_of_workers();
        }
        let has_way_out = network.router.is_some();
        let name = format!("{}/{}", config.mode, self.network);
        network.ipv6 = self.ipv6.settings(&name, has_way_out);
        if has_way_out && network.dns.is_empty() {
            network.dns.push(addresses.gateway);
            // A caller that names servers over IPv4 wants no other to be asked.
            if let Some(ipv6) = &mut network.ipv6 {
                ipv6.dns.push(ipv6.gateway());
            }
        }
        Ok(Arc::new(EmbeddedPort::join(name, network, self.settings(config))?))
    }
}

impl Embedded {
    /// Starts an interface on a network without a gateway.
    fn start_on_switch(&self, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let of_the_gateway = [
            ("address range", config.ipv4.is_some()),
            ("lease time", self.dhcp.lease_time.is_some()),
            ("DHCP range", self.dhcp.range.is_some()),
            ("reservation", !self.dhcp.reservations.is_empty()),
            ("lease file", self.dhcp.lease_file.is_some()),
            ("name server", !self.dns.is_empty()),
            ("IPv6 prefix", !matches!(self.ipv6, ipv6::Choice::WithWayOut | ipv6::Choice::No)),
        ];
        if let Some((what, _)) = of_the_gateway.into_iter().find(|(_, set)| *set) {
            let why = "a switch has no gateway and no DHCP server";
            return Err(ConfigError::NotApplicable { what, why }.into());
        }
        let mut network = NetworkConfig::switch();
        network.mtu = config.mtu.unwrap_or(network.mtu);
        network.overflow_depth = self.overflow.or(network.overflow_depth);
        let name = format!("switch/{}", self.network);
        Ok(Arc::new(EmbeddedPort::join(name, network, self.settings(config))?))
    }

    /// The settings of a port for an interface with this configuration.
    fn settings(&self, config: &InterfaceConfig) -> PortSettings {
        PortSettings {
            config: config.clone(),
            uplink: self.uplink,
            source: self.source,
            role: self.role,
            limits: self.limits.clone(),
            queues: self.queues,
            #[cfg(feature = "nat")]
            nat: (self.nat.clone(), self.nat_control.clone()),
        }
    }
}

/// What a port is asked for, each time that it joins its network.
struct PortSettings {
    config: InterfaceConfig,
    uplink: bool,
    source: SourceRule,
    role: PortRole,
    limits: LimitsControl,
    queues: usize,
    #[cfg(feature = "nat")]
    nat: (Option<NatSettings>, NatControl),
}

impl PortSettings {
    /// Gives the port's network its way out, if that is wanted and it has none yet.
    fn set_up(&self, network: &Arc<Network<PostedSlot>>) -> Result<(), Error> {
        #[cfg(feature = "nat")]
        if let (Some(settings), control) = &self.nat {
            nat::translator::set_up(network, settings)?;
            control.attach(network);
        }
        let _ = network;
        Ok(())
    }
}

/// Opens the network `name`. If it exists, its settings must be those of `config`.
fn open(name: &str, config: &NetworkConfig) -> Result<Arc<Network<PostedSlot>>, Error> {
    NETWORKS.open(name, config).map_err(|error| ConfigError::Invalid(error.to_string()).into())
}

struct EmbeddedPort {
    info: InterfaceInfo,
    /// What was asked for, and the header with any of it.
    offloads: Offloads,
    /// The longest packet of the network that is not to be cut.
    max_frame_size: u32,
    /// The network's name and settings, to join it again after a stop.
    name: String,
    network: NetworkConfig,
    settings: PortSettings,
    ends: Arc<Mutex<Option<Ends>>>,
    monitor: Arc<PortMonitor>,
}

/// The two halves of a port, from which rings get theirs.
struct Ends {
    /// The receivers that no ring has. They are closed, unless no ring reads: then one is open, in which
    /// packets wait for the next ring.
    idle: Vec<Receiver<PostedSlot>>,
    sender: Sender<PostedSlot>,
}

impl Ends {
    /// Takes the receiver in which packets wait, or any other.
    fn take(&mut self) -> Option<Receiver<PostedSlot>> {
        let open = self.idle.iter().position(|receiver| !receiver.is_closed());
        (!self.idle.is_empty()).then(|| self.idle.swap_remove(open.unwrap_or(0)))
    }
}

/// What wakes a receiver that no ring has.
fn nobody() -> PortWake {
    Arc::new(|| ())
}

impl EmbeddedPort {
    fn join(
        name: String,
        configuration: NetworkConfig,
        settings: PortSettings,
    ) -> Result<Self, Error> {
        let network = open(&name, &configuration)?;
        settings.set_up(&network)?;
        let monitor: Arc<PortMonitor> = Arc::default();
        let config = &settings.config;
        let (port, limits) = Self::port(&network, &settings, config.mac)?;
        let (offloads, max) = (port.offloads(), port.max_packet_size() as u32);
        let max_frame_size = network.max_packet_size() as u32;
        let mut info = InterfaceInfo::new(config, port.mac(), configuration.mtu, max);
        let ends = Self::ends(port, limits, &monitor, &settings);
        let range = configuration.ipv4;
        info.ipv4 = configuration.gateway.then_some(Ipv4Range {
            start: range.gateway,
            end: range.end,
            mask: range.mask,
        });
        let shared = configuration.ipv6.as_ref().filter(|_| config.mode == Mode::Shared);
        info.nat66_prefix = shared.map(|ipv6| ipv6.prefix);
        let ends = Arc::new(Mutex::new(Some(ends)));
        Ok(Self {
            info,
            offloads,
            max_frame_size,
            name,
            network: configuration,
            settings,
            ends,
            monitor,
        })
    }

    /// Joins the network. Returns the port, and the limits that it has now.
    fn port(
        network: &Arc<Network<PostedSlot>>,
        settings: &PortSettings,
        mac: Option<MacAddr6>,
    ) -> Result<(Port<PostedSlot>, PortLimits), Error> {
        let limits = settings.limits.get();
        let InterfaceConfig { interface_id, isolated, offloads, .. } = settings.config;
        let port = PortConfig {
            mac,
            isolated,
            uplink: settings.uplink,
            policy: PortPolicy { source: settings.source, role: settings.role, limits },
            offloads,
            queues: settings.queues,
            ..PortConfig::new(interface_id, nobody())
        };
        let port = network.join(port).map_err(|error| ConfigError::Invalid(error.to_string()))?;
        Ok((port, limits))
    }

    /// Makes a port known to `monitor` and to the handle of its limits, and takes it apart.
    fn ends(
        port: Port<PostedSlot>,
        limits: PortLimits,
        monitor: &Arc<PortMonitor>,
        settings: &PortSettings,
    ) -> Ends {
        let (mut idle, sender) = port.split_queues();
        idle.iter_mut().skip(1).for_each(Receiver::close);
        *lock(monitor) = Some(sender.monitor());
        settings.limits.attach(monitor, limits);
        Ends { idle, sender }
    }
}

impl EmbeddedPort {
    /// The network, unless the interface is stopped.
    #[cfg(feature = "nat")]
    fn running(&self) -> Result<Arc<Network<PostedSlot>>, Error> {
        let monitor = lock(&self.monitor);
        let network = monitor.as_ref().map(|monitor| monitor.network().clone());
        Ok(network.ok_or(Status::SetupIncomplete)?)
    }
}

impl Device for EmbeddedPort {
    fn name(&self) -> &str {
        "embedded"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(self.info.mtu, self.info.max_packet_size);
        caps.writing_rings = usize::MAX;
        caps.reading_rings = self.settings.queues;
        (caps.read_segments, caps.write_segments) = (SEGMENTS_MAX, SEGMENTS_MAX);
        caps.merges_reads = true;
        caps.checks_headers = true;
        caps.offloads = self.offloads;
        caps.receive_offloads = true;
        caps.max_frame_size = self.max_frame_size;
        caps.headroom = if self.offloads.virtio_header { offload::LEN as u32 } else { 0 };
        caps
    }

    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let direction = config.direction;
        let mut ends = lock(&self.ends);
        let ends_now = ends.as_mut().ok_or(Status::SetupIncomplete)?;
        let rx = if direction.reads() {
            let mut receiver = ends_now.take().ok_or(Status::SetupIncomplete)?;
            let mut accepted = Accepted::new(config.receive_offloads);
            accepted.ecn = config.receive_ecn;
            // The ring before this one has let go of its buffers, so none is posted.
            receiver.accept(accepted);
            receiver.reopen();
            receiver.set_wake(Arc::new(move || wake.wake()));
            Some(InboxReader::with_headers(receiver, self.offloads.virtio_header))
        } else {
            None
        };
        let tx = direction.writes().then(|| ends_now.sender.new_sender());
        let max = self.info.mtu as usize + ETHERNET_HEADER_LEN;
        let (ends, offloads, queues) = (self.ends.clone(), self.offloads, self.settings.queues);
        Ok(Box::new(EmbeddedQueue { max, offloads, queues, rx, tx, ends }))
    }

    fn stop(&self) -> Result<(), Error> {
        // Dropping these removes the port from the network. The network ends with its last port.
        let ends = lock(&self.ends).take();
        let monitor = lock(&self.monitor).take();
        drop((ends, monitor));
        Ok(())
    }

    fn restart(&self) -> Result<(), Error> {
        // Keep the network alive during the stop. Otherwise it would lose its leases if no other
        // interface is on it.
        let network = lock(&self.monitor).as_ref().map(|monitor| monitor.network().clone());
        self.stop()?;
        let network = match network {
            Some(network) => network,
            None => open(&self.name, &self.network)?,
        };
        self.settings.set_up(&network)?;
        let mac = Some(self.info.mac);
        let (port, limits) = Self::port(&network, &self.settings, mac)?;
        *lock(&self.ends) = Some(Self::ends(port, limits, &self.monitor, &self.settings));
        Ok(())
    }

    #[cfg(feature = "nat")]
    fn add_port_forward(&self, rule: &PortForward) -> Result<(), Error> {
        let network = self.running()?;
        let added = nat::control::add_port_forward(&network, rule);
        added.unwrap_or_else(|| Err(self.not_supported("port forwarding")))
    }

    #[cfg(feature = "nat")]
    fn remove_port_forward(&self, protocol: Protocol, external_port: u16) -> Result<(), Error> {
        let network = self.running()?;
        let removed = nat::control::remove_port_forward(&network, protocol, external_port);
        removed.unwrap_or_else(|| Err(self.not_supported("port forwarding")))
    }

    #[cfg(feature = "nat")]
    fn port_forwards(&self) -> Result<Vec<PortForward>, Error> {
        let forwards = nat::control::port_forwards(&self.running()?);
        forwards.unwrap_or_else(|| Err(self.not_supported("port forwarding")))
    }

    fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        let lease = lock(&self.monitor).as_ref()?.network().lease_of(mac)?;
        Some(Lease { address: lease.address, duration: self.network.lease_time })
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        let monitor = lock(&self.monitor);
        let Some(stats) = monitor.as_ref().and_then(Monitor::stats) else { return Vec::new() };
        vec![
            ("no buffer posted", stats.missed_no_buffer),
            ("closed", stats.missed_closed),
            ("runt", stats.dropped_runt),
            ("too big", stats.dropped_too_big),
            ("bad source", stats.dropped_bad_source),
            ("isolated", stats.dropped_isolated),
            ("reserved address", stats.dropped_reserved),
            ("own port", stats.dropped_own_port),
            ("spoofed", stats.dropped_spoofed),
            ("forbidden role", stats.dropped_role),
            ("unknown address", stats.dropped_unknown),
            ("send limit", stats.dropped_send_limit),
            ("flood limit", stats.dropped_flood_limit),
            ("receive limit", stats.missed_receive_limit),
            ("bad offload header", stats.dropped_bad_offload),
            ("cannot be segmented", stats.dropped_not_segmentable),
            ("router busy", stats.dropped_router_busy),
        ]
    }

    /// The packets of this port that were copied twice, completed or cut, and what the network's gateway
    /// did and did not answer.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        // The lock is not held while the translator answers.
        let Some(monitor) = lock(&self.monitor).clone() else { return Vec::new() };
        let Some(port) = monitor.stats() else { return Vec::new() };
        let own = [
            ("second copies", port.received_overflow),
            ("checksums completed", port.completed_in_software),
            ("cut in software", port.cut_in_software),
            ("sent to the router", port.sent_to_router),
        ];
        let Some(gateway) = monitor.network().gateway() else { return own.to_vec() };
        let (asked, dhcp) = (gateway.stats(), gateway.dhcp().stats());
        let of_the_gateway = [
            ("gateway ARP replies", asked.arp_replies),
            ("gateway echo replies", asked.echo_replies),
            ("gateway refused TCP", asked.refused_tcp),
            ("gateway refused UDP", asked.refused_udp),
            ("gateway refused protocols", asked.refused_protocol),
            ("gateway refused fragments", asked.refused_fragments),
            ("gateway refused routes", asked.refused_route),
            ("gateway errors limited", asked.errors_limited),
            ("gateway other ARP", asked.other_arp),
            ("gateway other ICMP", asked.other_icmp),
            ("gateway resets", asked.resets),
            ("gateway later fragments", asked.later_fragments),
            ("gateway broadcasts", asked.broadcasts),
            ("gateway other protocols", asked.other_ethertype),
            ("gateway VLAN frames", asked.vlan),
            ("gateway frames for others", asked.not_for_us),
            ("gateway bad source", asked.bad_source),
            ("gateway malformed", asked.malformed),
            ("gateway unsent", asked.unsent),
            ("gateway ARP conflicts", asked.arp_conflicts),
            ("DHCP messages", asked.dhcp_messages),
            ("DHCP messages limited", asked.dhcp_limited),
        ];
        let counters = own.into_iter().chain(of_the_gateway).chain(ipv6::counters(&asked.ipv6));
        let counters = counters.chain(dhcp_counters(&dhcp));
        #[cfg(feature = "nat")]
        let counters = counters.chain(nat::control::counters(monitor.network()));
        counters.collect()
    }
}

struct EmbeddedQueue {
    /// The longest frame without a tag that the network takes.
    max: usize,
    offloads: Offloads,
    /// How many receivers the port has.
    queues: usize,
    rx: Option<InboxReader<Receiver<PostedSlot>>>,
    tx: Option<Sender<PostedSlot>>,
    /// Where the receiver is returned to.
    ends: Arc<Mutex<Option<Ends>>>,
}

impl Queue for EmbeddedQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        // Start with what was submitted first. Looking for reads behind writes would move the
        // writes out of the SQ.
        let writes_first = cx.is_write_next();
        if let Some(rx) = &mut self.rx {
            rx.begin_poll(cx);
            if !writes_first {
                rx.post(cx);
            }
        }
        if let Some(tx) = &mut self.tx {
            match self.offloads.virtio_header {
                false => send::<false>(cx, tx, self.max, &self.offloads),
                true => send_asking(cx, tx, self.max, &self.offloads),
            }
        }
        let Some(rx) = &mut self.rx else { return Ok(Progress::Idle) };
        if writes_first {
            rx.post(cx);
        }
        Ok(rx.collect(cx))
    }

    fn arm(&mut self) -> bool {
        self.rx.as_mut().is_none_or(InboxReader::arm)
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        self.rx.as_mut().map_or(0, |rx| rx.cancel(target))
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        if let Some(mut rx) = self.rx.take() {
            rx.close(cx);
            self.return_receiver(rx);
        }
        self.tx = None;
        true
    }
}

/// As [`send`], for a port whose packets may leave work to others. It is apart from the other, so that
/// writes of ports without offload do not pay for it.
#[inline(never)]
fn send_asking(
    cx: &mut PollContext<'_>,
    tx: &mut Sender<PostedSlot>,
    max: usize,
    offloads: &Offloads,
) {
    send::<true>(cx, tx, max, offloads);
}

/// Sends the poller's writes. A run of writes to one port is sent together. A packet that leaves work to
/// others is sent by itself; there are such packets only if `MAY_ASK`.
#[inline(always)]
fn send<const MAY_ASK: bool>(
    cx: &mut PollContext<'_>,
    tx: &mut Sender<PostedSlot>,
    max: usize,
    offloads: &Offloads,
) {
    while cx.may_have_writes() {
        match send_frames::<MAY_ASK>(cx, tx, max) {
            Some(Ok(())) => continue,
            Some(Err(NotClaimed { count })) => {
                send_singly(cx, tx, count, offloads);
                continue;
            }
            None => {}
        }
        let mut first = None;
        let wanted = cx.leading_writes(|packet| {
            let header = ethernet_of(packet, max).filter(|_| !MAY_ASK || !asks(packet));
            *first.get_or_insert(header) == header && header.is_some()
        });
        let Some(header) = first else { break };
        if let Some(header) = header
            && let Some(mut run) = tx.run(header.bytes(), wanted, |each| next_writes(cx, each))
        {
            cx.end_writes(run.left(), |packet| put(&mut run, packet));
            // Those that skip their completions, or are not in the SQ.
            if run.left() > 0 {
                put_slots(cx, &mut run);
            }
        } else {
            send_singly(cx, tx, wanted.max(1), offloads);
        }
    }
    tx.flush();
}

/// No buffers can be claimed for a run of `count` writes together.
struct NotClaimed {
    count: usize,
}

/// Sends the oldest writes together, if they are of frames, begin with the same Ethernet header and leave no
/// work to others. Returns `None` if the oldest is not such a one.
#[inline(always)]
fn send_frames<const MAY_ASK: bool>(
    cx: &mut PollContext<'_>,
    tx: &mut Sender<PostedSlot>,
    max: usize,
) -> Option<Result<(), NotClaimed>> {
    let mut first = None;
    let is_like = |buffer: &Buffer, packet: &[u8]| match packet.first_chunk().map(Header::new) {
        Some(header) if packet.len() <= max && (!MAY_ASK || !asks(buffer)) => {
            *first.get_or_insert(header) == header
        }
        _ => false,
    };
    let sent = cx.with_leading_frames(is_like, |writes| {
        let count = writes.len();
        let header = *writes.packets().next()?.first_chunk()?;
        let run = tx.run(header, count, |each| {
            writes.packets().take_while(|packet| each(NextFrame::Bytes(packet))).for_each(drop);
        });
        let (sent, bytes) = run.map_or((0, 0), |mut run| run.put_all(writes.packets()));
        writes.end(sent, bytes);
        Some(if sent > 0 { Ok(()) } else { Err(NotClaimed { count }) })
    });
    sent.flatten()
}

/// Sends writes of a run that [`PollContext::end_writes`] has left.
#[cold]
#[inline(never)]
fn put_slots(cx: &mut PollContext<'_>, run: &mut Run<'_, PostedSlot>) {
    while run.left() > 0
        && let Some(slot) = cx.take_write()
    {
        put(run, slot.buffer());
        cx.complete_write(slot);
    }
}

/// Copies a packet of a run. Returns true.
#[inline(always)]
fn put(run: &mut Run<'_, PostedSlot>, packet: &Buffer) -> bool {
    match packet.bytes() {
        Some(bytes) => run.put(bytes),
        None => packet.guest().is_some_and(|guest| run.put_guest(guest)),
    };
    true
}

/// Shows the next writes, in order, until `each` returns false.
#[inline(never)]
fn next_writes(cx: &mut PollContext<'_>, each: &mut dyn FnMut(NextFrame<'_>) -> bool) {
    cx.leading_writes(|packet| match packet.bytes() {
        Some(bytes) => each(NextFrame::Bytes(bytes)),
        None => packet.guest().is_some_and(|guest| each(NextFrame::Guest(guest))),
    });
}

/// Sends `count` writes one by one, because no buffers can be claimed for them together. All at
/// once: otherwise the run would be searched for again after each packet.
#[inline(never)]
fn send_singly(
    cx: &mut PollContext<'_>,
    tx: &mut Sender<PostedSlot>,
    count: usize,
    offloads: &Offloads,
) {
    for _ in 0..count {
        let Some(slot) = cx.take_write() else { break };
        let sent = match slot.guest() {
            None => match header_in_front(slot.frame()) {
                None => tx.send(slot.frame_bytes()),
                Some(header) => {
                    tx.send_packet(Packet::from(slot.frame_bytes()).with_offload(&header))
                }
            },
            Some(guest) => match header_of(guest, offloads) {
                Some(header) => tx.send_packet(Packet::from(guest).with_offload(&header)),
                None => {
                    cx.fail(slot, Status::InvalidArgument);
                    continue;
                }
            },
        };
        match sent {
            // vmnet's answer to a packet that is not an Ethernet frame.
            Sent::Dropped(DropReason::Runt | DropReason::BadOffload) => {
                cx.fail(slot, Status::InvalidArgument);
            }
            Sent::Dropped(DropReason::TooBig) => cx.fail(slot, Status::PacketTooBig),
            // The network takes every other frame, and counts those that it drops.
            _ => cx.complete_write(slot),
        }
    }
}

/// The header in front of a write's packet, if the packet leaves work to others. It was checked when the
/// write was submitted.
#[inline]
fn header_in_front(frame: Option<&Frame>) -> Option<OffloadHeader> {
    let frame = frame.filter(|frame| frame.has_offload_to_send())?;
    frame.offload().ok().flatten().filter(|header| !header.is_plain())
}

/// Whether a write's packet in a frame leaves work to others. One in the memory of a guest has been asked
/// when its Ethernet header was read.
#[inline]
fn asks(packet: &Buffer) -> bool {
    header_in_front(packet.frame()).is_some()
}

/// The Ethernet header of a frame as two numbers, which are compared in two steps: its first eight
/// bytes and its last eight.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Header {
    first: u64,
    last: u64,
}

impl Header {
    #[inline(always)]
    fn new(bytes: &[u8; ETHERNET_HEADER_LEN]) -> Self {
        // Two loads: from an array that is taken apart, the compiler loads byte by byte.
        let number = |bytes: Option<&[u8; 8]>| bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Self { first: number(bytes.first_chunk()), last: number(bytes.last_chunk()) }
    }

    /// As [`new`](Self::new), of bytes in registers. The compiler would put the second number together byte
    /// by byte.
    #[inline(always)]
    fn of_copy(bytes: [u8; ETHERNET_HEADER_LEN]) -> Self {
        let mut wide = [0; 16];
        wide[..ETHERNET_HEADER_LEN].copy_from_slice(&bytes);
        let number = u128::from_le_bytes(wide);
        Self { first: number as u64, last: (number >> 48) as u64 }
    }

    fn bytes(self) -> [u8; ETHERNET_HEADER_LEN] {
        let mut bytes = [0; ETHERNET_HEADER_LEN];
        bytes[..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[ETHERNET_HEADER_LEN - 8..].copy_from_slice(&self.last.to_le_bytes());
        bytes
    }
}

/// The Ethernet header of a frame, if the network takes frames of this length: the header alone to
/// `max` bytes. `None` otherwise; `send_singly` finds out what is wrong.
#[inline(always)]
fn ethernet_of(packet: &Buffer, max: usize) -> Option<Header> {
    if packet.len() > max {
        return None;
    }
    match packet.bytes() {
        Some(bytes) => bytes.first_chunk().map(Header::new),
        None => ethernet_of_guest(packet),
    }
}

/// The Ethernet header of a guest's packet, if the packet can be sent as it is.
#[inline(always)]
fn ethernet_of_guest(packet: &Buffer) -> Option<Header> {
    let guest = packet.guest()?;
    match guest.in_one_piece() {
        // The usual packet has no header, as whoever submitted it has looked at that.
        Some((header, space)) if header.is_empty() && guest.len() >= ETHERNET_HEADER_LEN => {
            space.read().map(Header::of_copy)
        }
        _ => ethernet_of_other_guest(guest),
    }
}

#[inline(never)]
fn ethernet_of_other_guest(guest: &GuestBuffer) -> Option<Header> {
    if !is_complete(guest) {
        return None;
    }
    guest.packet().read_first().map(Header::of_copy)
}

impl EmbeddedQueue {
    /// Returns the emptied receiver to the port, for the next ring that reads. If the interface has
    /// been stopped, the receiver is dropped.
    fn return_receiver(&self, rx: InboxReader<Receiver<PostedSlot>>) {
        let mut receiver = rx.into_inner();
        receiver.set_wake(nobody());
        if let Some(ends) = &mut *lock(&self.ends) {
            match ends.idle.len() + 1 == self.queues {
                // No other ring reads: packets wait for the next one.
                true => receiver.reopen(),
                // The others get its packets from now on. Those that waited would be old for its next ring.
                false => drop(receiver.discard()),
            }
            ends.idle.push(receiver);
        }
    }
}

impl Drop for EmbeddedQueue {
    fn drop(&mut self) {
        // A queue that is dropped without being closed: its caller has panicked.
        if let Some(mut rx) = self.rx.take() {
            rx.abandon();
            self.return_receiver(rx);
        }
    }
}

impl InboxEnd for Receiver<PostedSlot> {
    #[inline(always)]
    fn stage(&mut self, slot: PostedSlot) -> Result<(), PostedSlot> {
        Receiver::stage(self, slot)
    }

    #[inline(always)]
    fn stage_all(&mut self, next: impl FnMut() -> Option<PostedSlot>) -> Result<(), PostedSlot> {
        Receiver::stage_all(self, next)
    }

    #[inline]
    fn publish(&mut self) {
        Receiver::publish(self);
    }

    #[inline(always)]
    fn posted(&self) -> usize {
        Receiver::posted(self)
    }

    #[inline(always)]
    fn collect(&mut self) -> Option<Collected<PostedSlot>> {
        Receiver::collect_part(self)
    }

    #[inline(always)]
    fn collect_run(
        &mut self,
        most: u32,
        each: impl FnMut(&mut Option<PostedSlot>, usize) -> bool,
    ) -> (u32, u64) {
        Receiver::collect_run(self, most, each)
    }

    fn recall(&mut self, f: &mut dyn FnMut(PostedSlot)) {
        Receiver::recall(self, f);
    }

    fn recall_target(&mut self, target: u64, f: &mut dyn FnMut(PostedSlot)) {
        Receiver::recall_if(self, |slot| slot.user_data() == target, f);
    }

    fn arm(&mut self) -> bool {
        Receiver::arm(self)
    }

    fn disarm(&mut self) {
        Receiver::disarm(self);
    }

    fn close(&mut self) {
        Receiver::close(self);
    }
}
