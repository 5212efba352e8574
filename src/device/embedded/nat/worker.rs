//! A thread that translates for a network: one of its workers.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use vmring_core::offload::OffloadHeader;
use vmring_embedded::limits::{ROUTER_BATCH, ROUTER_FRAMES};
use vmring_embedded::{Ipv6Config, NetworkConfig, RouterBatch, RouterEnd};
use vmring_nat::dns::names::{GATEWAY_NAME, HOST_NAME, Names};
use vmring_nat::sys::{Events, Host};
use vmring_nat::{
    Counters, DatagramFlow, FlowInfo, ForwardError, ForwardInfo, ForwardRule, GuestFrame, Nat,
    NatConfig, PolicyRules, Port, Prefix, Protocol, Sockets, Sources,
};

use super::guests::{Directory, Guests};
use super::ipv6::Discovery;
use super::limits::{EVENTS, ROUND_COST};
use super::settings::NatSettings;
use crate::device::slot::PostedSlot;
use crate::sync::{AtomicBool, Mutex, Ordering};
use crate::sys::lock;

/// The gateway's address over IPv6 on a network without IPv6. No guest is told of it, and none of its
/// packets of IPv6 comes here.
const NO_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd76, 0x6d72, 0x696e, 0x67, 0, 0, 0, 1);

/// What a translator does at one moment.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct NatReport {
    /// What was counted for all guests.
    pub counters: Counters,
    /// The flows of TCP that are open or being opened.
    pub tcp_flows: Vec<FlowInfo>,
    /// The flows of UDP and ICMP echo.
    pub datagram_flows: Vec<DatagramFlow>,
    /// The port forwards.
    pub forwards: Vec<ForwardInfo>,
    /// How many entries the tables of flows have, with those that wait for late segments.
    pub entries: usize,
    /// How many descriptors are open.
    pub descriptors: usize,
}

impl NatReport {
    /// Adds what another thread of the network does.
    pub(super) fn add(&mut self, other: Self) {
        self.counters.add_all(&other.counters);
        self.tcp_flows.extend(other.tcp_flows);
        self.datagram_flows.extend(other.datagram_flows);
        self.forwards.extend(other.forwards);
        self.entries += other.entries;
        self.descriptors += other.descriptors;
    }
}

/// What the thread is asked to do, besides translating.
pub(super) enum Command {
    Add(ForwardRule, SyncSender<Result<SocketAddr, ForwardError>>),
    Remove(Protocol, SocketAddr, bool, SyncSender<bool>),
    /// Where forwards listen.
    Places(SyncSender<Vec<(Protocol, SocketAddr)>>),
    /// Gives up a port of the host that flows of UDP have, because another thread has a forward for it.
    GiveUp(u16, SyncSender<()>),
    Report(SyncSender<NatReport>),
}

/// What a thread is to do.
#[derive(Default)]
pub(super) struct Commands {
    waiting: Mutex<Vec<Command>>,
    /// Whether there may be some.
    any: AtomicBool,
    stopped: AtomicBool,
}

impl Commands {
    /// Adds a command. Wake the thread then.
    pub(super) fn push(&self, command: Command) {
        lock(&self.waiting).push(command);
        // Release: pairs with the Acquire in `take`.
        self.any.store(true, Ordering::Release);
    }

    fn take(&self) -> Vec<Command> {
        // Acquire: pairs with the Release in `push`.
        match self.any.load(Ordering::Relaxed) && self.any.swap(false, Ordering::Acquire) {
            true => std::mem::take(&mut *lock(&self.waiting)),
            false => Vec::new(),
        }
    }

    /// Ends the thread. Wake it then.
    pub(super) fn stop(&self) {
        // Relaxed: the wake comes after it.
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// What a thread works with, as it is before the thread starts.
pub(super) struct Worker {
    host: Host,
    config: NatConfig,
    policy: PolicyRules,
    mtu: u32,
    has_ipv6: bool,
}

impl Worker {
    pub(super) fn new(
        host: Host,
        settings: &NatSettings,
        network: &NetworkConfig,
        gateway_mac: [u8; 6],
    ) -> Self {
        let gateway = network.ipv4.gateway;
        let gateway_v6 = network.ipv6.as_ref().map(Ipv6Config::gateway);
        let mut config = NatConfig::new(gateway_mac, gateway, gateway_v6.unwrap_or(NO_GATEWAY_V6));
        let bits = u32::from(network.ipv4.mask).leading_ones() as u8;
        config.subnet_v4 = Prefix::new(gateway.into(), bits).unwrap_or(config.subnet_v4);
        config.limits = settings.limits;
        // What the process may have is shared as well.
        let descriptors = host.capabilities().descriptors;
        config.limits.descriptors = config.limits.descriptors.min(descriptors);
        let own = &mut config.limits.port.descriptors;
        *own = (*own).min(descriptors - descriptors / 4);
        config.limits = config.limits.share(settings.workers);
        config.endpoint_independent = settings.endpoint_independent;
        config.resolvers = settings.resolvers.clone();
        // What a port's guest may send at once has a place in its outbox.
        config.limits.port.inbox_frames = match config.limits.port.inbox_frames {
            0 => ROUTER_FRAMES,
            frames => frames.min(ROUTER_FRAMES),
        };
        let mut policy = PolicyRules::new([config.subnet_v4, config.subnet_v6]);
        policy.allow.clone_from(&settings.allow);
        policy.deny.clone_from(&settings.deny);
        policy.host_access = settings.host_access;
        if !settings.host_ports.is_empty() {
            let addresses = [Some(gateway.into()), gateway_v6.map(IpAddr::from)];
            policy.host_address = addresses.into_iter().flatten().collect();
            policy.host_ports.clone_from(&settings.host_ports);
        }
        Self { host, config, policy, mtu: network.mtu, has_ipv6: gateway_v6.is_some() }
    }

    /// What the first worker of a network knows of its guests, for all of them.
    pub(super) fn directory(&self, network: &NetworkConfig) -> Directory {
        let config = &self.config;
        let subnets = [config.subnet_v4, config.subnet_v6];
        let gateway = [config.gateway_v4.into(), config.gateway_v6.into()];
        let sources = Sources::new(subnets, gateway);
        let gateway: &[IpAddr] = if self.has_ipv6 { &gateway } else { &gateway[..1] };
        // Without a port of the host, nothing is worth a try over IPv6.
        let has_ports = !self.policy.host_ports.is_empty();
        let host_address = if has_ports { gateway } else { &gateway[..1] };
        let mut names = Names::new(subnets);
        for (name, addresses) in [(HOST_NAME, host_address), (GATEWAY_NAME, gateway)] {
            // Both are names of the right form, and the first two of the table.
            let _ = names.set(name, addresses);
        }
        let reservations = &network.reservations;
        let reservations = reservations.iter().map(|(mac, address)| (mac.into_array(), *address));
        Directory::new(sources, names, reservations)
    }
}

/// Translates until it is stopped.
pub(super) fn run(
    worker: Worker,
    end: RouterEnd<PostedSlot>,
    directory: &Directory,
    commands: &Commands,
) {
    let Worker { host, config, policy, mtu, has_ipv6 } = worker;
    let is_first = end.worker() == 0;
    let mut nat = Nat::with_policy(config, host, Box::new(policy), directory.now());
    nat.share_sources(directory.sources());
    if is_first {
        directory.set_first(nat.sockets().waker());
    }
    let mut discovery = Discovery::new(has_ipv6, is_first);
    let mut names_told = 0;
    let mut guests = Guests::new(end, mtu);
    let mut batch = RouterBatch::new();
    let mut events = Events::new(EVENTS);
    // Relaxed: the wake comes after the store.
    while !commands.stopped.load(Ordering::Relaxed) {
        let now = directory.now();
        forget_ports(&mut nat, &mut guests, &mut names_told, now);
        directory.follow(&guests, &mut nat, &mut names_told, now);
        take_turns(&mut nat, &mut guests, &mut batch, now);
        discovery.turn(&mut nat, &mut guests, directory, now);
        guests.ask_for_silent(&mut nat, now);
        for command in commands.take() {
            obey(command, &mut nat, &mut guests, now);
        }
        guests.look_for_space(&mut nat, now);
        let due = nat.on_timers(now, &mut guests);
        guests.end.flush();
        let next = [guests.next_look(now), due, discovery.next()].into_iter().flatten().min();
        let mut timeout = next.map(|next| next.saturating_sub(now));
        // The look comes after the doorbell is armed.
        if timeout != Some(Duration::ZERO) && !guests.end.arm() {
            timeout = Some(Duration::ZERO);
        }
        if nat.sockets().wait(timeout, &mut events).is_err() {
            // The system has no memory for it, perhaps. Nothing is lost.
            std::thread::sleep(Duration::from_millis(1));
        }
        guests.end.disarm();
        for (token, readiness) in events.iter() {
            nat.note_ready(token, readiness);
        }
    }
    nat.close(directory.now(), &mut guests);
    guests.end.flush();
}

/// Looks which ports have frames, and forgets those that have left.
fn forget_ports(nat: &mut Nat<Host>, guests: &mut Guests, names_told: &mut u64, now: Duration) {
    let mut left = Vec::new();
    guests.end.look(|port, generation| left.push((Port(port), generation)));
    for (port, generation) in left {
        guests.port_left(port);
        nat.sources().set_generation(port, generation);
        nat.port_left(port, now, guests);
        // The names of a port that has the number now are gone with its own.
        *names_told = 0;
    }
}

/// Gives ports their turns: to a batch of what their guests have sent, and to their sockets that are
/// ready. The port that has cost least is the next, until everybody is served or it is time to look again.
fn take_turns(nat: &mut Nat<Host>, guests: &mut Guests, batch: &mut RouterBatch, now: Duration) {
    let before = nat.cost();
    while nat.cost() - before < ROUND_COST
        && let Some(port) = nat.next_port(guests.end.waiting().map(Port))
    {
        // Frames first: an acknowledgment makes room for what a socket has.
        if guests.end.receive_from(port.0, batch) {
            let nothing: (&[u8], OffloadHeader) = (&[], OffloadHeader::NONE);
            let frames: [GuestFrame<'_>; ROUTER_BATCH] = std::array::from_fn(|index| {
                let (bytes, header) = batch.get(index).unwrap_or(nothing);
                GuestFrame { bytes, header }
            });
            nat.sources().set_generation(port, batch.generation());
            nat.from_guest(port, &frames[..batch.len()], now, guests);
        }
        nat.on_turn(port, now, guests);
    }
    guests.end.give_back(batch);
}

fn obey(command: Command, nat: &mut Nat<Host>, guests: &mut Guests, now: Duration) {
    match command {
        Command::Add(rule, answer) => {
            let added = nat.add_forward(&rule, now, guests);
            if added.is_ok() {
                // A peer on the host's loopback address has the gateway's address for the guest.
                guests.end.set_all_of_gateway(true);
            }
            // The thread that has asked may have given up.
            if let Err(lost) = answer.try_send(added)
                && let TrySendError::Disconnected(Ok(at)) = lost
            {
                for index in 0..rule.count {
                    let at = SocketAddr::new(at.ip(), at.port() + index);
                    nat.remove_forward(rule.protocol, at, true, now, guests);
                }
            }
        }
        Command::Remove(protocol, at, cut, answer) => {
            let removed = nat.remove_forward(protocol, at, cut, now, guests);
            let _ = answer.try_send(removed);
        }
        Command::Places(answer) => {
            let _ = answer.try_send(nat.forward_places().collect());
        }
        Command::GiveUp(port, answer) => {
            nat.give_up_port(port, now, guests);
            let _ = answer.try_send(());
        }
        Command::Report(answer) => {
            let (entries, descriptors) = nat.usage();
            let _ = answer.try_send(NatReport {
                counters: nat.counters(),
                tcp_flows: nat.tcp_flows().collect(),
                datagram_flows: nat.datagram_flows().collect(),
                forwards: nat.forwards().collect(),
                entries,
                descriptors,
            });
        }
    }
}
