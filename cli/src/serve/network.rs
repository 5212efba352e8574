//! The network that the guests are on.

use std::fmt;
use std::time::Instant;

use sha2::{Digest, Sha256};
use vmring::device::Offloads;
use vmring::device::embedded::nat::{Counter, NatControl, NatReport};
use vmring::device::embedded::{LimitsControl, QUEUES_MAX, SourceRule};
use vmring::{
    Embedded, Error, Interface, InterfaceBuilder, Ipv4Range, MacAddr6, Mode, RingControl, Socket,
};
use vmring_virtio::net::{NetSettings, VhostUserNet};
use vmring_virtio::vhost_user::Settings;

use super::limits::{
    FEW_CONNECTIONS, LINK_READS, LINK_READS_OF_LARGE, LINK_READS_OF_MANY, STOP_TIMEOUT,
    WAITING_BYTES, WAITING_MAX, WAITING_MIN,
};
use super::own_interface::OwnInterfaces;
use super::spec::{ListenSpec, MacRule, NetworkSpec};
use super::teller::NetworkFacts;
use crate::args::ServeArgs;
use crate::bridge::forwarding::Bridge;
use crate::bridge::spec::{End, InSoftware, NetworkArgs, Spec, start_with_most};
use crate::bridge::summary::Summary as UplinkSummary;
use crate::failure::Failure;
use crate::recording::Recording;
use crate::stop::Stop;
use crate::system;

/// Packets that may be on their way in each direction between the switch and its uplink.
const DEPTH: u32 = 512;
/// The same, if each of them may be 64 KiB long.
const DEPTH_OF_LARGE: u32 = 256;

/// A started network.
pub(super) struct Network {
    name: String,
    /// The pairs of queues that a port has at most.
    pairs: usize,
    ports: Source,
    /// Whether the threads of guests never sleep.
    busy_poll: bool,
    /// Packets that are on their way between a wire without offload and its port: from each of them.
    link_reads: [u32; 2],
    /// Keeps a network without an uplink while nobody is connected. It is isolated, and so it receives
    /// nothing.
    keeper: Option<Interface>,
    /// Shows what an embedded network's way out does.
    nat: Option<NatControl>,
    /// The way to the TAP or vmnet, until it has a thread.
    relay: Option<Relay>,
    /// Ends that thread.
    stop: Option<Stop>,
    /// The ring of the TAP or vmnet.
    uplink: Option<RingControl>,
    facts: NetworkFacts,
}

/// Where the interfaces of guests come from.
#[derive(Clone, Debug)]
enum Source {
    /// They are ports of one switch.
    Switch(Box<Ports>),
    Own(OwnInterfaces),
}

/// How a port of the network is made.
#[derive(Clone, Debug)]
struct Ports {
    driver: Embedded,
    mode: Mode,
    /// The address of the first guest.
    mac: Option<MacAddr6>,
    subnet: Option<Ipv4Range>,
    mtu: Option<u32>,
}

impl Ports {
    fn builder(&self) -> InterfaceBuilder {
        let builder = Interface::builder().mode(self.mode.clone());
        let builder = match self.subnet {
            Some(range) => builder.ipv4(range),
            None => builder,
        };
        match self.mtu {
            Some(mtu) => builder.mtu(mtu),
            None => builder,
        }
    }

    /// A port for a guest.
    fn guest(
        &self,
        spec: &ListenSpec,
        id: [u8; 16],
        mac: Option<MacAddr6>,
        recorded: Option<(&Recording, String)>,
    ) -> Result<Interface, Error> {
        // What a guest does not accept, the senders complete or cut.
        let offloads = spec.offloads();
        let builder = self.builder().interface_id(id).isolated(spec.isolated).offloads(offloads);
        let limits = LimitsControl::new(spec.limits);
        let queues = spec.queues.unwrap_or(1).into();
        let driver = self.driver.clone().limits(&limits).queues(queues);
        let builder = match mac {
            Some(mac) => builder.mac(mac),
            None => builder,
        };
        let (builder, rule) = match spec.mac.unwrap_or(MacRule::Any) {
            MacRule::Any => (builder, SourceRule::Any),
            MacRule::Learn => (builder, SourceRule::LearnOnce),
            MacRule::Fixed(mac) => (builder.mac(mac), SourceRule::Fixed),
        };
        let driver = driver.source(rule);
        match recorded {
            Some((recording, name)) => builder.device(recording.capture.wrap(name, driver)).start(),
            None => builder.device(driver).start(),
        }
    }
}

/// How many packets may wait for a guest.
fn waiting(args: &ServeArgs) -> u32 {
    // The usual MTU, an Ethernet header and a VLAN tag.
    let frame = u64::from(args.mtu.unwrap_or(1500)) + 18;
    let each = WAITING_BYTES / u64::from(args.connections) / frame;
    u32::try_from(each).unwrap_or(u32::MAX).clamp(WAITING_MIN, WAITING_MAX)
}

impl Network {
    /// Starts the network. If some guest `may_offload`, the TAP or vmnet gets the offloads that it
    /// grants, and the switch does the rest for each port.
    pub(super) fn start(
        spec: &NetworkSpec,
        args: &ServeArgs,
        may_offload: bool,
    ) -> Result<Self, Failure> {
        let name = spec.to_string();
        let failed = |error| match Failure::starting(error) {
            Failure::Usage(sentence) => Failure::Usage(format!("{name}: {sentence}")),
            Failure::Step(sentence) => Failure::Step(format!("{name}: {sentence}")),
        };
        let link_reads = match args.connections {
            0..=FEW_CONNECTIONS => LINK_READS,
            _ => LINK_READS_OF_MANY,
        };
        let of = |ports, facts| Self {
            name: name.clone(),
            pairs: QUEUES_MAX,
            ports,
            busy_poll: args.busy_poll,
            link_reads,
            keeper: None,
            nat: None,
            relay: None,
            stop: None,
            uplink: None,
            facts,
        };
        if let (Spec::Embedded { network, subnet }, false) = (&spec.0, args.per_client) {
            let driver = args.dhcp.embedded(Embedded::network(network).overflow(waiting(args)));
            let nat = NatControl::default();
            let driver = args.nat.embedded(driver).nat_control(&nat);
            let nat = (!args.nat.no_nat).then_some(nat);
            let (mode, mac) = (args.settings.mode.clone(), args.settings.guest_mac);
            let ports = Ports { driver, mode, mac, subnet: *subnet, mtu: args.mtu };
            let keeper = ports.builder().isolated(true).device(ports.driver.clone());
            let keeper = keeper.start().map_err(failed)?;
            let ports = Source::Switch(Box::new(ports));
            let facts = Self::facts_of(&keeper, args);
            return Ok(Self { keeper: Some(keeper), nat, ..of(ports, facts) });
        }
        let wanted = if may_offload { Offloads::ALL } else { Offloads::default() };
        if args.per_client {
            let (own, facts) = OwnInterfaces::try_one(&spec.0, wanted, args.mtu)?;
            return Ok(Self { pairs: 1, ..of(Source::Own(own), facts) });
        }
        #[cfg(target_os = "linux")]
        let outer = spec.0.clone().driven_by(args.engine);
        #[cfg(not(target_os = "linux"))]
        let outer = spec.0.clone();
        let settings = NetworkArgs { dhcp: &args.dhcp, nat: &args.nat };
        let object = match &outer {
            Spec::Vmnet(vmnet) => args.settings.create(vmnet, args.mtu).map_err(failed)?,
            _ => None,
        };
        let outer = start_with_most(wanted, |offloads| match &outer {
            Spec::Vmnet(vmnet) => {
                let builder = Interface::builder().offloads(offloads);
                let place = vmnet.place(object.as_ref(), args.mtu, builder);
                let interface = args.settings.vmnet(place).map_err(failed)?;
                Ok(End::of(&name, interface))
            }
            outer => outer.start(offloads, args.mtu, settings),
        })?;
        let mut facts = Self::facts_of(&outer.interface, args);
        if matches!(spec.0, Spec::Vmnet(_)) {
            facts.mac = outer.interface.mac();
        }
        let offloads = outer.offloads();
        let driver = Embedded::switch(&name).overflow(waiting(args));
        let mac = args.settings.guest_mac.filter(|_| !matches!(spec.0, Spec::Vmnet(_)));
        let (mode, mtu) = (Mode::default(), Some(facts.mtu));
        let ports = Ports { driver, mode, mac, subnet: None, mtu };
        // The switch grants what is asked for. So each packet passes between the two as it is.
        let uplink = ports.builder().offloads(offloads).device(ports.driver.clone().uplink());
        let uplink = uplink.start().map_err(failed)?;
        let ends = [outer, End::of("the guests", uplink)];
        let large = offloads.tso4 || offloads.tso6 || offloads.uso;
        let depth = if large { DEPTH_OF_LARGE } else { DEPTH };
        // A guest that sends no large packets costs the kernel less if its packets are merged. What
        // comes from there is large already, or is alone.
        let software = [InSoftware::CutAndMerge, InSoftware::Nothing];
        let bridge = Bridge::new(ends, software, [depth; 2]).map_err(failed)?;
        let stop = Stop::new()?;
        let uplink = Some(bridge.control(0));
        let relay = Some(Relay { bridge, stop: stop.clone() });
        let ports = Source::Switch(Box::new(ports));
        Ok(Self { relay, stop: Some(stop), uplink, ..of(ports, facts) })
    }

    /// The properties of the network that has this interface.
    fn facts_of(interface: &Interface, args: &ServeArgs) -> NetworkFacts {
        let mut facts = NetworkFacts::of(interface);
        facts.mac = args.settings.guest_mac.unwrap_or(facts.mac);
        facts.interface_id = args.settings.interface_id.unwrap_or(facts.interface_id);
        facts
    }

    pub(super) fn facts(&self) -> &NetworkFacts {
        &self.facts
    }

    /// Refuses a socket whose guests would have more pairs of queues than a port has.
    pub(super) fn check(&self, spec: &ListenSpec) -> Result<(), Failure> {
        if let Source::Own(own) = &self.ports {
            own.check(spec)?;
        }
        let asked = spec.queues.unwrap_or(1);
        if usize::from(asked) <= self.pairs {
            return Ok(());
        }
        Err(Failure::Usage(format!(
            "{spec}: {asked} pairs of queues are asked for, and a guest of {} has at most {}",
            self.name, self.pairs
        )))
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn mtu(&self) -> u32 {
        self.facts.mtu
    }

    pub(super) fn max_packet_size(&self) -> u32 {
        self.facts.max_packet_size
    }

    /// What the gateway did and did not answer, if there is one.
    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.keeper.as_ref().map(Interface::counters).unwrap_or_default();
        counters.retain(|(_, n)| *n > 0);
        counters
    }

    /// What the way out does, if there is one and it has been used.
    pub(super) fn way_out(&self) -> Option<NatReport> {
        // A translator that does not answer in time is left out.
        let report = self.nat.as_ref()?.report().ok()?;
        let is_used = report.counters[Counter::Frames] > 0 || !report.forwards.is_empty();
        is_used.then_some(report)
    }

    /// Packets and bytes that the uplink has brought for the guests and taken from them, if there is one.
    pub(super) fn uplink(&self) -> Option<[(u64, u64); 2]> {
        let stats = self.uplink.as_ref()?.stats();
        Some([(stats.rx_packets, stats.rx_bytes), (stats.tx_packets, stats.tx_bytes)])
    }

    fn interface(
        &self,
        spec: &ListenSpec,
        number: usize,
        recording: Option<&Recording>,
    ) -> Result<Interface, Failure> {
        // The same guest gets the same address again.
        let hash = Sha256::new().chain_update(spec.to_string()).chain_update(number.to_le_bytes());
        let id = hash.finalize()[..16].try_into().expect("sixteen of 32 bytes");
        let recorded = recording.map(|recording| (recording, format!("{spec} {number}")));
        let failed = |error| Failure::Step(format!("it has no port: {error}"));
        match &self.ports {
            Source::Switch(ports) => {
                let mac = ports.mac.filter(|_| number == 0);
                ports.guest(spec, id, mac, recorded)
            }
            Source::Own(own) => own.start(spec, id, recorded),
        }
        .map_err(failed)
    }

    /// A wire that is joined to a port for its guest: the ends [`WIRE`](super::wire_stats::WIRE) and
    /// [`PORT`](super::wire_stats::PORT) of a bridge. See [`port`](Self::port).
    pub(super) fn link(
        &self,
        spec: &ListenSpec,
        number: usize,
        recording: Option<&Recording>,
        socket: Socket,
    ) -> Result<Bridge, Failure> {
        let port = self.interface(spec, number, recording)?;
        let (wanted, software) = match &self.ports {
            // Both have the same offloads, so each packet passes as it is, and the switch does the rest.
            Source::Switch(_) => {
                (port.capabilities().offloads & spec.offloads(), InSoftware::Nothing)
            }
            Source::Own(_) if !spec.may_offload() => (Offloads::default(), InSoftware::Nothing),
            // What its interface does not do is done here.
            Source::Own(_) => (spec.offloads(), InSoftware::Cut),
        };
        let socket = socket.implied_offload(spec.implied);
        let wire = Interface::builder().mtu(self.mtu()).offloads(wanted).device(socket).start();
        let failed = |error| Failure::Step(format!("its wire cannot start: {error}"));
        let ends = [End::of(&spec.to_string(), wire.map_err(failed)?), End::of("its port", port)];
        let reads = if spec.may_offload() { LINK_READS_OF_LARGE } else { self.link_reads };
        Bridge::new(ends, [software; 2], reads).map_err(failed)
    }

    /// A port for a guest of this socket. `number` tells it from the other guests that are connected
    /// there. Its packets are recorded, if there is a recording.
    pub(super) fn port(
        &self,
        spec: &ListenSpec,
        number: usize,
        recording: Option<&Recording>,
    ) -> Result<(VhostUserNet, Settings), Failure> {
        let failed = |error: &dyn fmt::Display| Failure::Step(format!("it has no port: {error}"));
        let interface = self.interface(spec, number, recording)?;
        let mut net = NetSettings::default();
        net.queue_pairs = spec.queues.unwrap_or(1);
        net.guest_announce = spec.announce;
        net.busy_poll = self.busy_poll;
        let device = VhostUserNet::new(interface, net).map_err(|error| failed(&error))?;
        let mut settings = device.session_settings();
        settings.config = spec.config;
        settings.demand_seals = spec.demand_seals;
        Ok((device, settings))
    }

    /// The way to the TAP or vmnet, which needs a thread.
    pub(super) fn take_relay(&mut self) -> Option<Relay> {
        self.relay.take()
    }

    /// Tells that thread to end.
    pub(super) fn end_relay(&self) {
        if let Some(stop) = &self.stop {
            stop.tell();
        }
    }

    /// Stops the network's own interfaces.
    pub(super) fn stop(&self) -> Result<(), Failure> {
        let failed = |error| Failure::Step(format!("{}: {error}", self.name));
        self.keeper.as_ref().map_or(Ok(()), |keeper| keeper.stop(STOP_TIMEOUT)).map_err(failed)
    }
}

/// Moves packets between the switch and its uplink.
pub(super) struct Relay {
    bridge: Bridge,
    stop: Stop,
}

/// What it has moved, and whether it ended well.
pub(super) type Relayed = (UplinkSummary, Result<(), Failure>);

impl Relay {
    /// Moves packets on this thread, until it is told to stop or an end fails. It stops the ends then,
    /// which puts the host's end of a TAP back.
    pub(super) fn run(mut self) -> Relayed {
        let (start, cpu) = (Instant::now(), system::cpu_time());
        let moving = self.bridge.run(&self.stop, None, None, |_| {});
        let ended = self.bridge.end();
        let cpu = system::cpu_time().saturating_sub(cpu);
        let mut summary = UplinkSummary::of(&self.bridge, start.elapsed(), cpu);
        let outcome = moving.and(ended).and(self.bridge.stop());
        summary.end(&outcome);
        (summary, outcome)
    }
}
