//! [`NetDevice`]: the queues of one guest over the rings of one interface.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use thiserror::Error as ThisError;
use vmring::guest::GuestMemory;
use vmring::stats::RingStats;
use vmring::{CloseReason, IdlePolicy, Interface};

use crate::config::NetConfig;
use crate::event::Event;
use crate::net::control::{self, Command, Controller};
use crate::net::copying::Wanted;
use crate::net::features::Features;
use crate::net::interrupt::Interrupt;
use crate::net::limits::{BUDGET, DEPTH, DEPTH_MAX, IDLE, PAIRS_MAX};
use crate::net::readiness::{Notifier, Readiness};
use crate::net::running::{Context, RunningQueue, Turn};
use crate::net::rx::{Mode, Receiver};
use crate::net::snapshot::{SavedQueue, Snapshot};
use crate::net::stats::{Counters, NetStats, StatsHandle};
use crate::net::tx::Transmitter;
use crate::queue::{Queue, QueueError, QueueFeatures, QueueLayout, QueueState};

/// Bits of the status in the configuration space (virtio 1.2, section 5.1.4).
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;
/// The smallest MTU that a guest may be told: that of every IPv4 link (RFC 791).
const MTU_MIN: u16 = 68;

/// How a device is made.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct NetSettings {
    /// The number of pairs of a receive and a transmit queue, from 1 to 128. There are no more than
    /// the interface has rings for. The default is 1.
    pub queue_pairs: u16,
    /// How many buffers of each queue may be in its ring, from 1 to 32,768. The default is 256. A
    /// queue may have more; they wait in the guest's memory.
    pub depth: u32,
    /// Whether there is a control queue. It is for transports inside the VMM. Over vhost-user the
    /// front end has it. It is off by default.
    pub control_queue: bool,
    /// Whether the transport lets the driver reset one queue (`VIRTIO_F_RING_RESET`): by
    /// [`stop_queue`](NetDevice::stop_queue), and [`start_queue`](NetDevice::start_queue) later. It is
    /// off by default, and on over vhost-user.
    pub ring_reset: bool,
    /// Whether a guest over vhost-user is to announce itself after a migration
    /// (`VIRTIO_NET_F_GUEST_ANNOUNCE`), where the front end has a control queue, as QEMU has. It is off
    /// by default: QEMU asks the back end to announce the guest then, and Linux behind a front end
    /// without a control queue, such as user-mode Linux, refuses a device with it. A device with a
    /// [control queue](Self::control_queue) offers it always.
    pub guest_announce: bool,
    /// The MAC address that the guest is told. The default is the interface's.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the guest is told, in bytes. The default is the interface's. A larger one is cut to
    /// that.
    pub mtu: Option<u16>,
    /// How many chains [`NetDevice::poll`] takes from each queue, before it lets others have their
    /// turn. The default is 32.
    pub budget: u16,
    /// How a thread of this crate waits before it sleeps, in polls that move nothing. The default is 16
    /// polls that yield the processor in between, which is some ten microseconds.
    pub idle: IdlePolicy,
    /// Whether a thread of this crate polls for ever and never sleeps (busy polling). It then answers
    /// sooner and needs no kicks, and takes its whole processor. It yields the processor after each
    /// poll that moves nothing. The default is no.
    pub busy_poll: bool,
}

impl Default for NetSettings {
    fn default() -> Self {
        Self {
            queue_pairs: 1,
            depth: DEPTH,
            control_queue: false,
            ring_reset: false,
            guest_announce: false,
            mac: None,
            mtu: None,
            budget: BUDGET,
            idle: IDLE,
            busy_poll: false,
        }
    }
}

/// What [`NetDevice::poll`] has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Progress {
    /// There may be more to do now: poll again, after others had their turn. Otherwise
    /// [`arm`](NetDevice::arm), and sleep until the descriptor is readable.
    pub again: bool,
    /// Whether anything was taken from the guest or given back to it. A loop that would rather wait a
    /// little than sleep counts the polls without it.
    pub moved: bool,
    /// Poll at this time, even if the descriptor is not readable.
    pub deadline: Option<Instant>,
}

/// A queue that a driver has set up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QueueSetup {
    /// Where the queue is.
    pub layout: QueueLayout,
    /// How far it is. A driver that has just set it up has both indices at 0.
    pub state: QueueState,
    /// A descriptor that is readable when the guest has kicked the queue, such as an `ioeventfd`. A VMM
    /// without one calls [`Notifier::notify`].
    pub kick: Option<Arc<Event>>,
    /// Whether the queue moves packets; see [`NetDevice::enable_queue`].
    pub enabled: bool,
}

impl QueueSetup {
    /// A queue that a driver has just set up, without a kick descriptor.
    pub fn new(layout: QueueLayout) -> Self {
        Self { layout, state: QueueState::default(), kick: None, enabled: true }
    }
}

/// Why a device does not do what it was asked for.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum NetError {
    /// The driver has accepted bits that were not offered.
    #[error("the driver accepts the feature bits {bits:#x}, which were not offered")]
    NotOffered {
        /// The bits.
        bits: u64,
    },
    /// The driver is a legacy driver, or has not negotiated yet. Its headers would have another
    /// length.
    #[error("the driver has not accepted VIRTIO_F_VERSION_1: legacy drivers are not served")]
    Legacy,
    /// There is no queue with this index.
    #[error("the device has no queue {index}")]
    QueueIndex {
        /// The index.
        index: u16,
    },
    /// The queue runs.
    #[error("queue {index} runs already")]
    Running {
        /// The index.
        index: u16,
    },
    /// The driver's queue is none.
    #[error("queue {index} cannot start")]
    Queue {
        /// The index.
        index: u16,
        /// Why.
        source: QueueError,
    },
    /// The interface has no ring for the queue.
    #[error("the interface has no ring for queue {index}")]
    Ring {
        /// The index.
        index: u16,
        /// Why.
        source: vmring::Error,
    },
    /// The system refused a descriptor.
    #[error("the system refused a descriptor of the device")]
    System(#[from] std::io::Error),
    /// A snapshot is none of this device.
    #[error("the snapshot is not one of this device: {0}")]
    Snapshot(&'static str),
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
}

/// A pair of queues.
#[derive(Debug)]
struct Pair {
    rx: Receiver,
    tx: Transmitter,
}

/// The virtio-net device of one guest, over one interface. See the [module](crate::net).
///
/// It belongs to the thread that calls it. It owns no thread and no loop.
pub struct NetDevice {
    settings: NetSettings,
    pairs: Box<[Pair]>,
    controller: Controller,
    readiness: Readiness,
    counters: Arc<Counters>,
    interrupt: Arc<dyn Interrupt>,
    memory: GuestMemory,
    offered: Features,
    accepted: Features,
    /// What the driver accepts in received packets now.
    guest_offloads: Features,
    mac: [u8; 6],
    mtu: u16,
    link_up: bool,
    announcing: bool,
    /// How many pairs the driver uses, if it has the control queue.
    active_pairs: u16,
    paused: bool,
    /// Whether the rings that read may not be those that the driver wants.
    rings_changed: bool,
    /// Whether NEEDS_RESET was seen by the owner, by queues.
    reported: Vec<u16>,
    /// It is the last field, as rings are dropped before their interface.
    interface: Interface,
}

impl NetDevice {
    /// A device without memory and without queues. Nothing has been negotiated.
    ///
    /// # Errors
    ///
    /// [`NetError::System`] if the system refuses the descriptor that the device is waited for on.
    pub fn new(
        interface: Interface,
        interrupt: Arc<dyn Interrupt>,
        settings: NetSettings,
    ) -> Result<Self, NetError> {
        let caps = interface.capabilities();
        let rings = caps.reading_rings.min(caps.writing_rings).max(1);
        let rings = u16::try_from(rings).unwrap_or(u16::MAX);
        let settings = NetSettings {
            queue_pairs: settings.queue_pairs.clamp(1, PAIRS_MAX).min(rings),
            depth: settings.depth.clamp(1, DEPTH_MAX).next_power_of_two(),
            budget: settings.budget.max(1),
            ..settings
        };
        let memory = GuestMemory::new([]).expect("no region overlaps another");
        let pairs = (0..settings.queue_pairs)
            .map(|_| Pair {
                rx: Receiver::new(&interface, settings.depth, &memory),
                tx: Transmitter::new(&interface, settings.depth, &memory),
            })
            .collect();
        let own_mtu = u16::try_from(interface.mtu()).unwrap_or(u16::MAX);
        let mtu = settings.mtu.map_or(own_mtu, |mtu| mtu.clamp(MTU_MIN, own_mtu.max(MTU_MIN)));
        let has_mtu = own_mtu >= MTU_MIN;
        Ok(Self {
            pairs,
            controller: Controller::new(),
            readiness: Readiness::new()?,
            counters: Arc::default(),
            interrupt,
            memory,
            offered: Features::offered(
                &caps,
                settings.queue_pairs,
                settings.control_queue,
                has_mtu,
            )
            .with_if(settings.ring_reset, Features::RING_RESET)
            .with_if(settings.guest_announce, Features::GUEST_ANNOUNCE),
            accepted: Features::NONE,
            guest_offloads: Features::NONE,
            mac: settings.mac.unwrap_or_else(|| interface.mac().into_array()),
            mtu,
            link_up: true,
            announcing: false,
            active_pairs: 1,
            paused: false,
            rings_changed: false,
            reported: Vec::new(),
            settings,
            interface,
        })
    }

    // ---- What the driver sees ----

    /// The features that the device offers.
    pub fn features(&self) -> Features {
        self.offered
    }

    /// What the driver has accepted of them, without features whose conditions it has not accepted.
    pub fn accepted_features(&self) -> Features {
        self.accepted
    }

    /// Takes what the driver has accepted. No queue runs.
    ///
    /// # Errors
    ///
    /// [`NetError::NotOffered`]. In this case nothing has changed, and the transport does not keep
    /// FEATURES_OK set (virtio 1.2, section 3.1.1).
    pub fn set_features(&mut self, accepted: Features) -> Result<(), NetError> {
        let bits = accepted.without(self.offered).bits();
        if bits != 0 {
            return Err(NetError::NotOffered { bits });
        }
        self.accepted = accepted.consistent();
        self.guest_offloads = self.accepted & Features::GUEST_OFFLOADS;
        Ok(())
    }

    /// The configuration space.
    pub fn config(&self) -> NetConfig {
        let announce = if self.announcing { ANNOUNCE } else { 0 };
        NetConfig {
            mac: self.mac,
            status: if self.link_up { LINK_UP } else { 0 } | announce,
            max_virtqueue_pairs: self.settings.queue_pairs,
            mtu: self.mtu,
        }
    }

    /// The number of queues: two for each pair, and the control queue if there is one.
    pub fn queue_count(&self) -> u16 {
        self.settings.queue_pairs * 2 + u16::from(self.settings.control_queue)
    }

    /// The number of pairs of queues.
    pub fn queue_pairs(&self) -> u16 {
        self.settings.queue_pairs
    }

    /// The largest MTU that the interface carries, in bytes.
    pub fn mtu_max(&self) -> u32 {
        self.interface.mtu()
    }

    /// Whether a queue has broken the rules, so that the driver must reset the device: the bit
    /// DEVICE_NEEDS_RESET (virtio 1.2, section 2.1). [`Interrupt::config`] has told it.
    pub fn needs_reset(&self) -> bool {
        self.running_queues().any(|running| running.broken)
    }

    /// The index of a queue that has broken the rules and was not returned before.
    pub fn take_broken_queue(&mut self) -> Option<u16> {
        let index = self
            .running_queues()
            .find(|running| running.broken && !self.reported.contains(&running.index))
            .map(|running| running.index)?;
        self.reported.push(index);
        Some(index)
    }

    /// Why the interface moves no packets any more, if one of its rings has closed. The guest's packets
    /// are dropped, and it receives none.
    pub fn failure(&self) -> Option<CloseReason> {
        self.pairs.iter().find_map(|pair| pair.rx.failed.or(pair.tx.failed))
    }

    // ---- Queues and memory ----

    fn role(&self, index: u16) -> Result<Role, NetError> {
        let pair = usize::from(index / 2);
        if self.settings.control_queue && index == self.control_index() {
            Ok(Role::Control)
        } else if pair >= self.pairs.len() {
            Err(NetError::QueueIndex { index })
        } else if index.is_multiple_of(2) {
            Ok(Role::Receive(pair))
        } else {
            Ok(Role::Transmit(pair))
        }
    }

    /// The index of the control queue: behind all pairs if the driver has accepted MQ, and behind the
    /// first one otherwise (virtio 1.2, section 5.1.2).
    pub fn control_index(&self) -> u16 {
        if self.accepted.has(Features::MQ) { self.settings.queue_pairs * 2 } else { 2 }
    }

    fn running(&self, role: Role) -> Option<&RunningQueue> {
        match role {
            Role::Receive(pair) => self.pairs[pair].rx.running.as_ref(),
            Role::Transmit(pair) => self.pairs[pair].tx.running.as_ref(),
            Role::Control => self.controller.running.as_ref(),
        }
    }

    fn running_mut(&mut self, role: Role) -> Option<&mut RunningQueue> {
        match role {
            Role::Receive(pair) => self.pairs[pair].rx.running.as_mut(),
            Role::Transmit(pair) => self.pairs[pair].tx.running.as_mut(),
            Role::Control => self.controller.running.as_mut(),
        }
    }

    fn running_queues(&self) -> impl Iterator<Item = &RunningQueue> {
        let pairs = self.pairs.iter().flat_map(|pair| [&pair.rx.running, &pair.tx.running]);
        pairs.chain([&self.controller.running]).flatten()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Replaces the guest's memory, when a region is added or removed, or its dirty log begins or ends.
    /// It is ready when nothing of the earlier memory is in use: its mappings are given up. Until then
    /// poll the device and call this again. Queues that run go on in the new memory.
    ///
    /// # Errors
    ///
    /// [`NetError::Queue`] if a queue that runs is not in the new memory. It is stopped.
    pub fn set_memory(&mut self, memory: &GuestMemory) -> Poll<Result<(), NetError>> {
        self.set_stopping(true);
        if self.quiesce().is_pending() {
            return Poll::Pending;
        }
        self.set_stopping(false);
        self.readiness.notifier().wake();
        self.memory = memory.clone();
        let mut result = Ok(());
        for index in 0..self.queue_count() {
            let Ok(role) = self.role(index) else { continue };
            if let Some(running) = self.running_mut(role)
                && let Err(source) = running.queue.set_memory(memory.clone())
            {
                result = Err(NetError::Queue { index, source });
                self.remove_running(role);
            }
        }
        for pair in &mut self.pairs {
            pair.rx.set_memory(memory);
            pair.tx.set_memory(memory);
        }
        Poll::Ready(result)
    }

    /// Starts a queue, and looks at it at the next [`poll`](Self::poll): the guest may have kicked it
    /// before.
    ///
    /// # Errors
    ///
    /// [`NetError`], and the queue does not run.
    pub fn start_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), NetError> {
        let role = self.role(index)?;
        if !self.accepted.has(Features::VERSION_1) {
            return Err(NetError::Legacy);
        }
        if self.running(role).is_some() {
            return Err(NetError::Running { index });
        }
        let features = QueueFeatures::from_bits(self.accepted.bits());
        let queue = Queue::new(self.memory.clone(), setup.layout, features, setup.state)
            .map_err(|source| NetError::Queue { index, source })?;
        self.build_ring(role, setup.layout.size)
            .map_err(|source| NetError::Ring { index, source })?;
        if let Some(kick) = &setup.kick {
            self.readiness.add_kick(index, kick)?;
        }
        let running = RunningQueue::new(index, queue, setup.kick, setup.enabled);
        match role {
            Role::Receive(pair) => self.pairs[pair].rx.start(running),
            Role::Transmit(pair) => {
                let ecn = self.accepted.has(Features::HOST_ECN);
                self.pairs[pair].tx.start(running, self.accepted.left_by_driver(), ecn);
            }
            Role::Control => self.controller.running = Some(running),
        }
        self.change_rings();
        self.readiness.notifier().wake();
        Ok(())
    }

    /// How the driver gets its packets.
    fn receive_mode(&self) -> Mode {
        let wanted = Wanted {
            offloads: self.guest_offloads.accepted_by_driver(),
            ecn: self.guest_offloads.has(Features::GUEST_ECN),
            merging: self.accepted.has(Features::MRG_RXBUF),
        };
        Mode::of(&self.interface.capabilities(), wanted)
    }

    fn build_ring(&mut self, role: Role, size: u32) -> Result<(), vmring::Error> {
        match role {
            // The others are made when there is a queue that is enabled.
            Role::Receive(pair) if pair > 0 => Ok(()),
            Role::Receive(pair) => {
                let mode = self.receive_mode();
                let cx = context(&self.counters, &self.interrupt);
                self.pairs[pair].rx.build(cx, &self.interface, &self.readiness, mode, size)
            }
            Role::Transmit(pair) => self.pairs[pair].tx.build(&self.interface, &self.readiness),
            Role::Control => Ok(()),
        }
    }

    /// Whether a queue runs.
    pub fn is_running(&self, index: u16) -> bool {
        self.role(index).is_ok_and(|role| self.running(role).is_some())
    }

    /// Enables or disables a queue that runs. A disabled transmit queue is emptied, and its packets are
    /// dropped. A disabled receive queue gets nothing: its posted buffers are available again when this
    /// returns, unless the interface holds on to them. A queue that is enabled is looked at at the next
    /// [`poll`](Self::poll).
    pub fn enable_queue(&mut self, index: u16, enabled: bool) {
        let Ok(role) = self.role(index) else { return };
        let Some(running) = self.running_mut(role) else { return };
        running.enabled = enabled;
        if !enabled && let Role::Receive(pair) = role {
            let cx = context(&self.counters, &self.interrupt);
            let _ = self.pairs[pair].rx.quiesce(cx);
        }
        self.change_rings();
        self.readiness.notifier().wake();
    }

    /// Stops a queue. It is ready when nothing of it is on its way: posted buffers without a packet are
    /// available again, every packet that was taken is sent, and the used index is published. Until
    /// then poll the device and call this again. Returns how far the queue is, or `None` if it did not
    /// run.
    pub fn stop_queue(&mut self, index: u16) -> Poll<Option<QueueState>> {
        let Ok(role) = self.role(index) else { return Poll::Ready(None) };
        let Some(running) = self.running_mut(role) else { return Poll::Ready(None) };
        running.stopping = true;
        if self.quiesce_one(role).is_pending() {
            return Poll::Pending;
        }
        Poll::Ready(self.remove_running(role).map(|running| running.state()))
    }

    fn quiesce_one(&mut self, role: Role) -> Poll<()> {
        let cx = context(&self.counters, &self.interrupt);
        match role {
            Role::Receive(pair) => self.pairs[pair].rx.quiesce(cx),
            Role::Transmit(pair) => self.pairs[pair].tx.quiesce(cx),
            // A command is carried out in one step, and answered when the rings are changed.
            Role::Control if self.rings_changed => Poll::Pending,
            Role::Control => {
                self.controller.answer(cx);
                Poll::Ready(())
            }
        }
    }

    fn set_stopping(&mut self, stopping: bool) {
        for pair in &mut self.pairs {
            for running in [&mut pair.rx.running, &mut pair.tx.running].into_iter().flatten() {
                running.stopping = stopping;
            }
        }
    }

    fn quiesce(&mut self) -> Poll<()> {
        let mut all = Poll::Ready(());
        for pair in 0..self.pairs.len() {
            for role in [Role::Receive(pair), Role::Transmit(pair)] {
                if self.quiesce_one(role).is_pending() {
                    all = Poll::Pending;
                }
            }
        }
        all
    }

    fn remove_running(&mut self, role: Role) -> Option<RunningQueue> {
        let running = match role {
            Role::Receive(pair) => self.pairs[pair].rx.running.take(),
            Role::Transmit(pair) => self.pairs[pair].tx.running.take(),
            Role::Control => self.controller.running.take(),
        }?;
        if let Some(kick) = &running.kick {
            self.readiness.remove_kick(kick);
        }
        self.reported.retain(|index| *index != running.index);
        Some(running)
    }

    // ---- Life cycle ----

    /// Lets everything end that is on its way, and begins nothing more until [`resume`](Self::resume).
    /// When it is ready, nothing accesses the guest's memory, and the queues' states are whole: the
    /// guest can be copied. Until then poll the device and call this again.
    pub fn pause(&mut self) -> Poll<()> {
        self.paused = true;
        let quiesced = self.quiesce();
        if quiesced.is_ready() {
            // No packet comes any more from rings that are still to be changed.
            self.controller.answer(context(&self.counters, &self.interrupt));
        }
        quiesced
    }

    /// Goes on after [`pause`](Self::pause). Every queue is looked at.
    pub fn resume(&mut self) {
        self.paused = false;
        self.readiness.notifier().wake();
    }

    /// How far each queue that runs is, by its index. They are whole while the device is
    /// [paused](Self::pause).
    pub fn queue_states(&self) -> Vec<(u16, QueueState)> {
        self.running_queues().map(|running| (running.index, running.queue.state())).collect()
    }

    /// What another device must know to go on with this guest, as a small number of bytes: what the
    /// driver has set, and how far the queues are. It is whole while the device is
    /// [paused](Self::pause). Where the queues are, the transport knows; what is in them, the guest's
    /// memory.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut queues: Vec<_> = (self.running_queues())
            .map(|running| SavedQueue {
                index: running.index,
                state: running.queue.state(),
                enabled: running.enabled,
            })
            .collect();
        queues.sort_by_key(|queue| queue.index);
        let snapshot = Snapshot {
            accepted: self.accepted,
            guest_offloads: self.guest_offloads,
            mac: self.mac,
            mtu: self.mtu,
            link_up: self.link_up,
            announcing: self.announcing,
            pairs: self.settings.queue_pairs,
            active_pairs: self.active_pairs,
            queues,
        };
        snapshot.write()
    }

    /// Takes over what [`snapshot`](Self::snapshot) returned elsewhere. No queue runs. Returns the
    /// queues that ran there: [start](Self::start_queue) them with these states.
    ///
    /// # Errors
    ///
    /// [`NetError::Snapshot`] if the bytes are no snapshot, or if this device does not offer what the
    /// driver uses, or [`NetError::Running`]. In these cases nothing has changed.
    pub fn restore(&mut self, snapshot: &[u8]) -> Result<Vec<SavedQueue>, NetError> {
        if let Some(running) = self.running_queues().next() {
            return Err(NetError::Running { index: running.index });
        }
        let snapshot = Snapshot::read(snapshot).map_err(NetError::Snapshot)?;
        if !self.offered.has(snapshot.accepted) {
            return Err(NetError::Snapshot("the driver uses features that are not offered here"));
        }
        if snapshot.pairs != self.settings.queue_pairs {
            return Err(NetError::Snapshot("it has another number of pairs of queues"));
        }
        if u32::from(snapshot.mtu) > self.interface.mtu() {
            return Err(NetError::Snapshot("the interface does not carry its MTU"));
        }
        let Snapshot { mac, mtu, link_up, announcing, active_pairs, .. } = snapshot;
        self.accepted = snapshot.accepted.consistent();
        self.guest_offloads = snapshot.guest_offloads & self.accepted;
        (self.mac, self.mtu, self.link_up) = (mac, mtu, link_up);
        (self.announcing, self.active_pairs) = (announcing, active_pairs);
        Ok(snapshot.queues)
    }

    /// Stops every queue, and forgets everything that the driver has set, as when it writes the status
    /// 0. It is ready when nothing is on its way. Until then poll the device and call this again.
    pub fn reset(&mut self) -> Poll<()> {
        self.paused = true;
        if self.quiesce().is_pending() {
            return Poll::Pending;
        }
        for index in 0..self.queue_count() {
            if let Ok(role) = self.role(index) {
                self.remove_running(role);
            }
        }
        self.remove_running(Role::Control);
        let cx = context(&self.counters, &self.interrupt);
        for pair in &mut self.pairs {
            // What waits in the network below is not for the next driver, which may be another guest's.
            pair.rx.discard(cx);
            pair.rx.dismantle(cx, &self.readiness);
            pair.tx.dismantle(&self.readiness);
        }
        self.accepted = Features::NONE;
        self.guest_offloads = Features::NONE;
        self.mac = self.settings.mac.unwrap_or_else(|| self.interface.mac().into_array());
        self.controller.forget();
        (self.announcing, self.active_pairs, self.paused) = (false, 1, false);
        self.rings_changed = false;
        Poll::Ready(())
    }

    /// Gives everything up at once, when a [`reset`](Self::reset) takes too long: the rings are closed,
    /// which waits for the interface no longer than their close timeout. What the interface does not
    /// release even then is leaked on purpose, and the guest's memory that it is in stays mapped.
    pub fn abandon(&mut self) {
        for index in 0..self.queue_count().max(3) {
            if let Ok(role) = self.role(index) {
                self.remove_running(role);
            }
        }
        self.memory = GuestMemory::new([]).expect("no region overlaps another");
        let cx = context(&self.counters, &self.interrupt);
        for pair in &mut self.pairs {
            pair.rx.dismantle(cx, &self.readiness);
            pair.tx.dismantle(&self.readiness);
            pair.rx = Receiver::new(&self.interface, self.settings.depth, &self.memory);
            pair.tx = Transmitter::new(&self.interface, self.settings.depth, &self.memory);
        }
    }

    // ---- The link ----

    /// Sets whether the guest's link is up, and tells it. While the link is down, nothing is received,
    /// and what the guest sends is dropped.
    pub fn set_link(&mut self, up: bool) {
        if std::mem::replace(&mut self.link_up, up) != up {
            if !up {
                let cx = context(&self.counters, &self.interrupt);
                for pair in &mut self.pairs {
                    let _ = pair.rx.quiesce(cx);
                }
            }
            self.interrupt.config();
            self.readiness.notifier().wake();
        }
    }

    /// Sets the MTU that the guest is told when it looks, in bytes. Returns whether the interface
    /// carries it; if not, nothing has changed.
    pub fn set_mtu(&mut self, mtu: u16) -> bool {
        let good = mtu >= MTU_MIN && u32::from(mtu) <= self.interface.mtu();
        if good {
            self.mtu = mtu;
        }
        good
    }

    /// Tells the network where a MAC address is now, with a RARP packet to everybody, as QEMU does
    /// after a migration. Returns whether it is on its way.
    pub fn announce(&mut self, mac: [u8; 6]) -> bool {
        let built = self.pairs[0].tx.build(&self.interface, &self.readiness).is_ok();
        let sent = built && self.pairs[0].tx.send_own(&control::rarp(mac));
        if !sent {
            self.counters.announcements_failed.add(1);
        }
        self.readiness.notifier().wake();
        sent
    }

    /// Lets the guest tell the network where it is now, after a migration, if it can
    /// (`VIRTIO_NET_F_GUEST_ANNOUNCE`). If it cannot, the device does; see
    /// [`announce`](Self::announce).
    pub fn request_announcement(&mut self) {
        if self.accepted.has(Features::GUEST_ANNOUNCE | Features::STATUS | Features::CTRL_VQ) {
            self.announcing = true;
            self.interrupt.config();
        } else {
            self.announce(self.mac);
        }
    }

    // ---- Work ----

    /// Moves packets, without waiting. Each queue has its turn, with the budget of the settings.
    pub fn poll(&mut self) -> Progress {
        self.wake_up();
        if self.rings_changed {
            self.change_rings();
        }
        let cx = context(&self.counters, &self.interrupt);
        let mut turn = Turn::default();
        let budget = self.settings.budget;
        let active = usize::from(self.active());
        for (number, pair) in self.pairs.iter_mut().enumerate() {
            let serving = self.link_up && number < active;
            turn |= pair.rx.poll(cx, serving && !self.paused, budget);
            if self.paused {
                // What is on its way ends.
                let _ = pair.tx.quiesce(cx);
            } else {
                turn |= pair.tx.poll(cx, serving, budget);
            }
        }
        if !self.paused && self.controller.running.is_some() {
            turn |= self.serve_commands();
        }
        let deadline = self.deadline();
        let is_due = deadline.is_some_and(|deadline| deadline <= Instant::now());
        Progress { again: turn.again || is_due, moved: turn.moved, deadline }
    }

    /// Whether the ring that reads for a pair is to exist. The network below spreads packets over such
    /// rings, so a queue that gets none has none. The first pair keeps its ring, with what waits in the
    /// network, while its queue is disabled or stopped for a moment and no other pair receives.
    fn reads(&self, pair: usize) -> bool {
        let active = usize::from(self.active());
        let receives = |pair: usize| {
            let running = self.pairs[pair].rx.running.as_ref();
            pair < active && running.is_some_and(|running| running.enabled)
        };
        receives(pair) || pair == 0 && !(1..self.pairs.len()).any(receives)
    }

    /// Makes the rings that read anew, after the driver has changed what it accepts, or how many pairs
    /// it uses.
    #[cold]
    fn change_rings(&mut self) {
        let mode = self.receive_mode();
        let mut all = true;
        for pair in 0..self.pairs.len() {
            let reads = self.reads(pair);
            let cx = context(&self.counters, &self.interrupt);
            let rx = &mut self.pairs[pair].rx;
            // A queue that is stopped may be started again at once, as when memory is added.
            let Some(running) = &rx.running else { continue };
            let size = running.queue.layout().size;
            if reads && rx.has_ring(mode, size) {
                continue;
            }
            if rx.quiesce(cx).is_pending() {
                all = false;
            } else if !reads {
                rx.dismantle(cx, &self.readiness);
            } else if rx.build(cx, &self.interface, &self.readiness, mode, size).is_err() {
                // Without a ring nothing is received: the system has run out of memory or of
                // descriptors, or the interface was stopped.
                self.counters.rx_errors.add(1);
                rx.failed = Some(CloseReason::Stopped);
            }
        }
        self.rings_changed = !all;
    }

    /// How many pairs the driver uses.
    fn active(&self) -> u16 {
        match self.accepted.has(Features::CTRL_VQ) {
            true => self.active_pairs,
            // The front end of vhost-user enables each queue by itself.
            false => self.settings.queue_pairs,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let deadlines = self.pairs.iter().flat_map(|pair| [pair.rx.deadline(), pair.tx.deadline()]);
        deadlines.flatten().min()
    }

    /// Looks at what has woken the device, if it may have slept.
    fn wake_up(&mut self) {
        if self.readiness.is_armed() {
            self.collect_kicks();
        }
        self.counters.kicks.add(self.readiness.take_notified().into());
        for pair in &mut self.pairs {
            for running in [&mut pair.rx.running, &mut pair.tx.running].into_iter().flatten() {
                running.queue.disable_notifications();
            }
        }
    }

    #[cold]
    fn collect_kicks(&mut self) {
        self.counters.wakes.add(1);
        let mut kicked = [false; PAIRS_MAX as usize * 2 + 1];
        self.readiness.wake_up(|index| {
            if let Some(kicked) = kicked.get_mut(usize::from(index)) {
                *kicked = true;
            }
        });
        for index in (0..self.queue_count()).filter(|index| kicked[usize::from(*index)]) {
            self.clear_kick(index);
        }
    }

    #[cold]
    fn clear_kick(&mut self, index: u16) {
        let Ok(role) = self.role(index) else { return };
        let Some(kick) = self.running(role).and_then(|running| running.kick.clone()) else {
            return;
        };
        match kick.clear() {
            Ok(_) => self.counters.kicks.add(1),
            Err(_) => {
                // It would be readable for ever.
                self.counters.kicks_lost.add(1);
                self.readiness.remove_kick(&kick);
                if let Some(running) = self.running_mut(role) {
                    running.kick = None;
                }
            }
        }
    }

    /// Prepares for sleep: asks the guest for kicks and the rings for signals. If it returns true, the
    /// [descriptor](Self::as_fd) becomes readable when there is something to do. If it returns false,
    /// there is already: poll again.
    #[must_use = "if it is not armed, the descriptor does not become readable"]
    pub fn arm(&mut self) -> bool {
        let active = usize::from(self.active());
        for (number, pair) in self.pairs.iter_mut().enumerate() {
            let serving = self.link_up && number < active;
            if !pair.rx.arm(self.paused || !serving) || !pair.tx.arm(self.paused) {
                return false;
            }
        }
        let control = self.controller.running.as_mut().filter(|_| !self.paused);
        control.is_none_or(RunningQueue::arm) && self.readiness.arm()
    }

    fn serve_commands(&mut self) -> Turn {
        let mut controller = std::mem::take(&mut self.controller);
        let counters = self.counters.clone();
        let interrupt = self.interrupt.clone();
        let cx = context(&counters, &interrupt);
        // The answers come after the rings are changed. After them the driver expects no packet with
        // work that it does not accept any more.
        let turn = match self.rings_changed {
            true => Turn::default(),
            false => controller.poll(cx, |command| self.carry_out(command)),
        };
        if !self.rings_changed {
            controller.answer(cx);
        }
        self.controller = controller;
        turn
    }

    /// Carries a command of the driver out. Returns whether it is one that it may give.
    fn carry_out(&mut self, command: Command) -> bool {
        match command {
            Command::AcknowledgeAnnouncement => {
                let good = self.accepted.has(Features::GUEST_ANNOUNCE);
                self.announcing &= !good;
                good
            }
            Command::SetPairs(pairs) => {
                let good = self.accepted.has(Features::MQ)
                    && (1..=self.settings.queue_pairs).contains(&pairs);
                if good {
                    self.set_pairs(pairs);
                }
                good
            }
            Command::SetMac(mac) => {
                // A group address is nobody's.
                let good =
                    self.accepted.has(Features::CTRL_MAC_ADDR) && mac[0] & 1 == 0 && mac != [0; 6];
                if good {
                    self.mac = mac;
                }
                good
            }
            Command::SetOffloads(bits) => {
                let wanted = Features::from_bits(bits);
                let may = self.accepted & Features::GUEST_OFFLOADS;
                let good = self.accepted.has(Features::CTRL_GUEST_OFFLOADS) && may.has(wanted);
                if good {
                    self.guest_offloads =
                        (wanted | Features::CSUM).consistent() & Features::GUEST_OFFLOADS;
                    self.change_rings();
                    self.readiness.notifier().wake();
                }
                good
            }
            // The network below sends a guest what is for it, and what nobody is known for. A device
            // may give a driver more than it asks for.
            Command::Filter => self.accepted.has(Features::CTRL_RX),
        }
    }

    fn set_pairs(&mut self, pairs: u16) {
        self.active_pairs = pairs;
        self.change_rings();
        self.readiness.notifier().wake();
    }

    // ---- Handles ----

    /// How the device was made. What exceeds the interface was cut to it.
    pub fn settings(&self) -> &NetSettings {
        &self.settings
    }

    /// Tells the device that the guest has notified it, from any thread.
    pub fn notifier(&self) -> Notifier {
        self.readiness.notifier()
    }

    /// What was counted.
    pub fn stats(&self) -> NetStats {
        self.stats_handle().stats()
    }

    /// Reads the counters from any thread.
    pub fn stats_handle(&self) -> StatsHandle {
        StatsHandle(self.counters.clone())
    }

    /// What the ring of a queue has counted: batches, and the packets that were copied because the
    /// interface does not take a guest's memory. `None` if the queue has no ring now.
    pub fn ring_stats(&self, index: u16) -> Option<RingStats> {
        let pair = self.pairs.get(usize::from(index / 2))?;
        if index.is_multiple_of(2) { pair.rx.ring_stats() } else { pair.tx.ring_stats() }
    }

    /// The interface.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }
}

fn context<'d>(counters: &'d Counters, interrupt: &'d Arc<dyn Interrupt>) -> Context<'d> {
    Context { counters, interrupt: &**interrupt }
}

impl AsFd for NetDevice {
    /// The descriptor that is readable when there is something to do, after [`arm`](Self::arm) has
    /// returned true.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readiness.as_fd()
    }
}

impl fmt::Debug for NetDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetDevice")
            .field("settings", &self.settings)
            .field("accepted", &self.accepted)
            .field("config", &self.config())
            .field("paused", &self.paused)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
