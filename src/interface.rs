//! [`Interface`]: a network interface of some system, its identity, and the rings on it.
//! The `t` of `Lwt_vmnet`.

use std::sync::{Arc, Condvar, Mutex, Weak, mpsc};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use macaddr::MacAddr6;
use vmring_core::{DEPTH_MAX, Depths, Pool, Regions, rings};

use crate::Driver;
use crate::config::{
    Config, Direction, InterfaceInfo, Ipv4Range, Mode, Offloads, PortForward, Protocol,
};
use crate::device::catch::{Panicked, guard};
use crate::device::seam::{Capabilities, Device, Lease};
use crate::error::{ConfigError, Error};
use crate::mailbox::{RingPark, RingShared, control, next_ring_number, register};
use crate::notify::Notifier;
use crate::policy::{IdlePolicy, RetryPolicy};
use crate::poller::{Engine, EngineParts, Handoff, Poller, PollerBuilder};
use crate::pool::{HEADROOM_DEFAULT, PoolBuilder};
use crate::ring::{CompletionQueue, Ring, SubmissionQueue};
use crate::sys::{after, lock};

/// Starts an [`Interface`].
pub struct Builder {
    config: Config,
    driver: Option<Box<dyn Driver>>,
    start_timeout: Duration,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Builder {
    /// Which network. Default [`Mode::Shared`], as in `Lwt_vmnet.init`.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.config.mode = mode;
        self
    }

    /// The interface's identity, a UUID: the same gives the same MAC. Default: a random one.
    #[doc(alias = "uuid")]
    pub fn interface_id(mut self, id: [u8; 16]) -> Self {
        self.config.interface_id = id;
        self
    }

    /// The MAC to use, instead of one allocated from the identity.
    pub fn mac(mut self, mac: MacAddr6) -> Self {
        self.config.mac = Some(mac);
        self
    }

    /// The network's addresses. Default: the mode's own range.
    pub fn ipv4(mut self, range: Ipv4Range) -> Self {
        self.config.ipv4 = Some(range);
        self
    }

    /// The MTU in bytes.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.config.mtu = Some(mtu);
        self
    }

    /// Keep packets between this and the other interfaces of the network apart; the gateway stays
    /// reachable.
    pub fn isolated(mut self, yes: bool) -> Self {
        self.config.isolated = yes;
        self
    }

    /// Work that the device is to take off the guest; what it does is in
    /// [`Interface::capabilities`]. Default: none. A device that cannot says so at start.
    #[doc(alias = "vmnet_enable_tso_key")]
    #[doc(alias = "vmnet_enable_checksum_offload_key")]
    #[doc(alias = "vmnet_enable_virtio_header_key")]
    pub fn offloads(mut self, offloads: Offloads) -> Self {
        self.config.offloads = offloads;
        self
    }

    /// Joins a network object (macOS 26): short for [`Vmnet::network`](crate::Vmnet::network) as the
    /// device.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    pub fn network(self, network: &crate::Network) -> Self {
        self.device(crate::Vmnet::new().network(network))
    }

    /// The device to start. Default: vmnet on macOS, else the embedded network `default`.
    pub fn device(mut self, driver: impl Driver) -> Self {
        self.driver = Some(Box::new(driver));
        self
    }

    /// How long [`start`](Self::start) waits. Default 10 seconds.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Starts the interface.
    ///
    /// # Errors
    ///
    /// [`Error::StartTimeout`] if the driver does not answer in time; if it answers later, the
    /// interface is stopped again behind the scenes. Else what the driver says.
    pub fn start(self) -> Result<Interface, Error> {
        let Builder { config, driver, start_timeout } = self;
        let driver = driver.unwrap_or_else(default_driver);
        let (answer, waiting) = mpsc::sync_channel::<Result<Arc<dyn Device>, Error>>(0);
        let starter = thread::Builder::new()
            .name("vmring-start".to_owned())
            .spawn(move || {
                let started = guard(|| driver.start(&config));
                let started = started.unwrap_or_else(|_| {
                    Err(Error::Io {
                        what: "starting the device",
                        source: std::io::Error::other("the driver panicked"),
                    })
                });
                // A rendezvous: it fails if nobody waits any more, and gives the device back.
                if let Err(mpsc::SendError(Ok(device))) = answer.send(started) {
                    tracing::warn!(device = device.name(), "started too late; stopping it");
                    match guard(|| device.stop()) {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::warn!(%error, "the late device did not stop"),
                        Err(Panicked) => tracing::error!("the late device panicked"),
                    }
                }
            })
            .map_err(Error::io("starting the driver's thread"))?;
        let started =
            waiting.recv_timeout(start_timeout).map_err(|_| Error::StartTimeout(start_timeout))?;
        // It has answered and ends; nothing of it stays behind.
        let _ = starter.join();
        let device = started?;
        let info = device.info();
        tracing::info!(device = device.name(), mac = %info.mac, mtu = info.mtu, "started");
        Ok(Interface { group: Arc::new(RingGroup::new(device)) })
    }
}

/// A started network interface.
///
/// It lives until [`stop`](Self::stop), or until it and all its rings are dropped, in any order.
#[derive(Debug)]
pub struct Interface {
    group: Arc<RingGroup>,
}

impl Interface {
    /// Settings, then [`Builder::start`].
    #[doc(alias = "init")]
    pub fn builder() -> Builder {
        let config = Config::new(Mode::default(), random_id());
        Builder { config, driver: None, start_timeout: Duration::from_secs(10) }
    }

    /// Everything negotiated at start.
    pub fn info(&self) -> InterfaceInfo {
        self.group.device.info()
    }

    /// Which network.
    pub fn mode(&self) -> Mode {
        self.info().mode
    }

    /// The MAC the guest is to use.
    pub fn mac(&self) -> MacAddr6 {
        self.info().mac
    }

    /// Largest IP packet, bytes.
    pub fn mtu(&self) -> u32 {
        self.info().mtu
    }

    /// Largest frame that may be written, and least room of a frame to read into, bytes.
    pub fn max_packet_size(&self) -> u32 {
        self.info().max_packet_size
    }

    /// The interface's identity, a UUID.
    #[doc(alias = "uuid")]
    pub fn interface_id(&self) -> [u8; 16] {
        self.info().interface_id
    }

    /// What the device can do.
    pub fn capabilities(&self) -> Capabilities {
        self.group.device.capabilities()
    }

    /// The device's name.
    pub fn device_name(&self) -> &str {
        self.group.device.name()
    }

    /// What the system calls the interface, if it has a name there: `tap0`, for one that the kernel
    /// has named.
    pub fn system_name(&self) -> Option<String> {
        self.group.device.system_name()
    }

    /// A ring on this interface: settings, then [`RingBuilder::build`].
    pub fn ring(&self, direction: Direction) -> RingBuilder<'_> {
        RingBuilder {
            group: &self.group,
            direction,
            read_depth: 256,
            write_depth: 256,
            cancel_depth: 16,
            sq_depth: None,
            pools: Vec::new(),
            frames: None,
            headroom: HEADROOM_DEFAULT,
            prefault: false,
            drive: Drive::Thread,
            poller: Poller::builder(),
            idle: IdlePolicy::default(),
            retry: RetryPolicy::default(),
            close_timeout: Duration::from_secs(2),
            start_index: 0,
        }
    }

    /// Ends the interface: every ring closes, what was in flight completes as cancelled, the device
    /// stops.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if a ring did not let go by then: the device stops when it does. A ring
    /// with `Drive::Inline` lets go when its owner drives it; close such rings first.
    pub fn stop(&self, timeout: Duration) -> Result<(), Error> {
        self.group.stop(timeout)
    }

    /// Stops the device and starts it anew with the same identity, for hosts that come back from
    /// sleep. Rings, frames and pools stay; what was in flight completes as cancelled; what is
    /// submitted meanwhile waits.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if a ring did not let go by then: the restart happens when it does. A
    /// ring with `Drive::Inline` lets go when its owner drives it. Else what the device says; then
    /// the rings close.
    pub fn restart(&self, timeout: Duration) -> Result<(), Error> {
        self.group.restart(timeout)
    }

    /// Forwards a port of the host to a guest.
    #[doc(alias = "vmnet_interface_add_port_forwarding_rule")]
    pub fn add_port_forward(&self, rule: &PortForward) -> Result<(), Error> {
        self.group.device.add_port_forward(rule)
    }

    /// Ends a forwarding.
    #[doc(alias = "vmnet_interface_remove_port_forwarding_rule")]
    pub fn remove_port_forward(&self, protocol: Protocol, port: u16) -> Result<(), Error> {
        self.group.device.remove_port_forward(protocol, port)
    }

    /// The forwardings in force.
    #[doc(alias = "vmnet_interface_get_port_forwarding_rules")]
    pub fn port_forwards(&self) -> Result<Vec<PortForward>, Error> {
        self.group.device.port_forwards()
    }

    /// Names of the interfaces that [`Mode::Bridged`] can share.
    #[doc(alias = "vmnet_copy_shared_interface_list")]
    pub fn shared_interfaces(&self) -> Result<Vec<String>, Error> {
        self.group.device.shared_interfaces()
    }

    /// The address the network gave to `mac`, where the device knows.
    pub fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        self.group.device.lease(mac)
    }

    /// What the device counts of itself beyond packets, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.group.device.counters()
    }

    /// Packets the device (or its whole network) dropped, by reason.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        self.group.device.drops()
    }
}

fn default_driver() -> Box<dyn Driver> {
    #[cfg(target_os = "macos")]
    return Box::new(crate::Vmnet::new());
    #[cfg(not(target_os = "macos"))]
    return Box::new(crate::device::embedded::Embedded::network("default"));
}

/// A version 4 UUID from the standard library's random hasher keys.
fn random_id() -> [u8; 16] {
    use std::hash::{BuildHasher, RandomState};
    let half = || RandomState::new().hash_one(Instant::now()).to_be_bytes();
    let mut id = [0; 16];
    id[..8].copy_from_slice(&half());
    id[8..].copy_from_slice(&half());
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

/// Who turns a ring's engine.
#[derive(Clone, Copy, Debug, Default)]
pub enum Drive<'a> {
    /// A thread of its own. The default.
    #[default]
    Thread,
    /// A thread shared with other rings.
    Shared(&'a Poller),
    /// The caller's own thread, in `reap` and `wait`: for VMMs that already have an I/O thread.
    Inline,
}

/// Builds a [`Ring`]; see [`Interface::ring`].
///
/// # Memory
///
/// All of it is taken when the ring is built. With `entries = read depth + write depth + cancel depth`
/// rounded up to a power of two, a ring has, on a 64-bit machine:
///
/// | what | bytes |
/// |---|---|
/// | SQ and CQ | 32 x `entries` each (the SQ: of [`sq_depth`](Self::sq_depth), if that is set) |
/// | reads and writes posted to the device | 40 x read depth + 40 x write depth |
/// | frames, unless they come from [`pool`](Self::pool)s | slots x slot size, rounded up to pages |
///
/// and some 5 KiB besides. A ring of depth 256 each way over a device of 1,514-byte packets: 64 KiB,
/// 20 KiB, and 832 KiB of frames. What a device may come to owe (lists of 80 bytes for each read and
/// write) is address space until it does. `performance/` compares this with what the system says.
#[derive(Clone, Debug)]
pub struct RingBuilder<'a> {
    group: &'a Arc<RingGroup>,
    direction: Direction,
    read_depth: u32,
    write_depth: u32,
    cancel_depth: u32,
    sq_depth: Option<u32>,
    pools: Vec<Pool>,
    frames: Option<usize>,
    headroom: usize,
    prefault: bool,
    drive: Drive<'a>,
    poller: PollerBuilder,
    idle: IdlePolicy,
    retry: RetryPolicy,
    close_timeout: Duration,
    start_index: u32,
}

impl<'a> RingBuilder<'a> {
    /// Reads and writes that may be in flight, each; a power of two, at most 65,536. Default 256.
    pub fn depth(self, depth: u32) -> Self {
        self.read_depth(depth).write_depth(depth)
    }

    /// Reads that may be in flight; a power of two.
    pub fn read_depth(mut self, depth: u32) -> Self {
        self.read_depth = depth;
        self
    }

    /// Writes that may be in flight; a power of two.
    pub fn write_depth(mut self, depth: u32) -> Self {
        self.write_depth = depth;
        self
    }

    /// Cancels that may be in flight; a power of two. Default 16.
    pub fn cancel_depth(mut self, depth: u32) -> Self {
        self.cancel_depth = depth;
        self
    }

    /// Entries of the SQ; a power of two. Default: room for every credit, so that it is never full.
    pub fn sq_depth(mut self, depth: u32) -> Self {
        self.sq_depth = Some(depth);
        self
    }

    /// A pool whose frames the ring takes; may be called several times, and a pool may serve several
    /// rings. The first is the one that [`Ring::alloc`] takes from. Default: a pool of the ring's
    /// own.
    pub fn pool(mut self, pool: &Pool) -> Self {
        self.pools.push(pool.clone());
        self
    }

    /// Frames of the ring's own pool. Default: one for every read and write credit.
    pub fn frames(mut self, frames: usize) -> Self {
        self.frames = Some(frames);
        self
    }

    /// Bytes in front of a packet, in the ring's own pool.
    pub fn headroom(mut self, bytes: usize) -> Self {
        self.headroom = bytes;
        self
    }

    /// Touch every page of the ring's own pool now.
    pub fn prefault(mut self, yes: bool) -> Self {
        self.prefault = yes;
        self
    }

    /// Who turns the ring's engine. Default [`Drive::Thread`].
    pub fn drive(mut self, drive: Drive<'a>) -> Self {
        self.drive = drive;
        self
    }

    /// With [`Drive::Thread`], the thread's name.
    pub fn thread_name(mut self, name: impl Into<String>) -> Self {
        self.poller = self.poller.name(name);
        self
    }

    /// With [`Drive::Thread`], the processor the thread stays on; see [`PollerBuilder::cpu`].
    pub fn cpu(mut self, cpu: usize) -> Self {
        self.poller = self.poller.cpu(cpu);
        self
    }

    /// How the ring's own poller, and `wait`, wait for work.
    pub fn idle(mut self, idle: IdlePolicy) -> Self {
        self.idle = idle;
        self
    }

    /// What happens when the device takes fewer writes than it was offered.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// How long a close waits for the device to let go. Default 2 seconds.
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.close_timeout = timeout;
        self
    }

    /// Where the queues' free-running indices begin, to exercise their wrap in tests.
    #[doc(hidden)]
    pub fn start_index(mut self, index: u32) -> Self {
        self.start_index = index;
        self
    }

    /// Builds `n` rings alike, for a device with several queues, such as a TAP with
    /// `Tap::queues(n)`: with [`Drive::Thread`] each has a poller of its own, and each has a pool of
    /// its own unless one was given.
    ///
    /// # Errors
    ///
    /// As for [`build`](Self::build); then the rings built before are closed.
    pub fn rings(self, n: usize) -> Result<Vec<Ring>, Error> {
        (0..n).map(|_| self.clone().build()).collect()
    }

    /// Builds the ring, on which nothing is in flight.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for sizes that cannot be, [`Error::Memory`], [`Error::TooManyRings`] if the
    /// device bears no more, [`Error::Io`] for a thread that cannot be had, and what the device says.
    pub fn build(self) -> Result<Ring, Error> {
        let caps = self.group.device.capabilities();
        let read = if self.direction.reads() { self.read_depth } else { 0 };
        let write = if self.direction.writes() { self.write_depth } else { 0 };
        let wanted = [
            ("read depth", read, self.direction.reads()),
            ("write depth", write, self.direction.writes()),
            ("cancel depth", self.cancel_depth, true),
            ("SQ depth", self.sq_depth.unwrap_or(1), true),
        ];
        for (what, value, used) in wanted {
            if used {
                check_depth(what, value)?;
            }
        }
        let mut depths = Depths::new(read, write, self.cancel_depth);
        if let Some(sq) = self.sq_depth {
            depths.sq = sq;
        }
        let packet = caps.max_packet_size as usize;
        let pools = if self.pools.is_empty() {
            let frames = self.frames.unwrap_or((read + write) as usize);
            let headroom = self.headroom.max(caps.headroom as usize);
            let pool = PoolBuilder::new(frames, packet).headroom(headroom);
            vec![pool.prefault(self.prefault).build()?]
        } else {
            self.pools
        };
        for pool in &pools {
            let room = pool.capacity() as usize;
            if self.direction.reads() && room < packet {
                return Err(ConfigError::PoolTooSmall { room, needed: packet }.into());
            }
            let (headroom, needed) = (pool.layout().headroom as usize, caps.headroom as usize);
            if headroom < needed {
                return Err(ConfigError::PoolHeadroom { headroom, needed }.into());
            }
        }
        let regions = Regions::new(pools)
            .ok_or_else(|| ConfigError::Invalid("a ring takes at most 65,536 pools".to_owned()))?;

        let claim = self.group.claim(self.direction)?;
        let number = next_ring_number();
        let notifier = Arc::new(Notifier::default());
        let own_poller;
        let poller = match self.drive {
            Drive::Inline => None,
            Drive::Shared(poller) => Some(poller),
            Drive::Thread => {
                own_poller = self.poller.idle(self.idle).start()?;
                Some(&own_poller)
            }
        };
        let (park, place) = match poller {
            None => (RingPark::Inline(notifier.clone()), None),
            Some(poller) => {
                let place = poller.shared().reserve()?;
                (RingPark::Poller { poller: poller.shared().set.clone(), place }, Some(place))
            }
        };
        let slots = (read + write) as usize;
        let shared = Arc::new(RingShared::new(number, park, notifier.clone(), slots));
        register(&shared);
        self.group.add(&shared);
        let (submitter, reaper, intake, outlet) = rings(depths, regions, self.start_index);
        let engine = Engine::new(EngineParts {
            intake,
            outlet,
            group: self.group.clone(),
            direction: self.direction,
            shared: shared.clone(),
            retry: self.retry,
            close_timeout: self.close_timeout,
            claim,
            depths: (read as usize, write as usize),
        });
        let engine = match (engine, poller, place) {
            (Err(error), Some(poller), Some(place)) => {
                poller.shared().unreserve(place);
                return Err(error);
            }
            (engine, ..) => engine?,
        };
        let (engine, remote) = match (poller, place) {
            (Some(poller), Some(place)) => {
                let handoff = Arc::new(Handoff::default());
                poller.shared().adopt(place, engine, handoff.clone());
                (None, Some((handoff, poller.shared().clone())))
            }
            _ => (Some(Box::new(engine)), None),
        };
        tracing::debug!(ring = number, direction = %self.direction, ?depths, "ring built");
        let sq = SubmissionQueue::new(submitter, shared.clone(), caps);
        let cq = CompletionQueue::new(
            reaper,
            shared,
            notifier,
            engine,
            remote,
            self.idle,
            self.close_timeout,
            caps,
        );
        Ok(Ring::new(sq, cq))
    }
}

fn check_depth(what: &'static str, value: u32) -> Result<(), ConfigError> {
    let (max, wide) = (u64::from(DEPTH_MAX / 4), u64::from(value));
    if value == 0 {
        Err(ConfigError::Zero { what })
    } else if wide > max {
        Err(ConfigError::TooLarge { what, value: wide, max })
    } else if !value.is_power_of_two() {
        Err(ConfigError::NotPowerOfTwo { what, value: wide })
    } else {
        Ok(())
    }
}

pub(crate) const INTERFACE_BUSY: &str = "the interface is stopped, or in the middle of a restart";

/// A device and the rings on it: who may claim a ring, and who goes first when it stops or restarts.
pub(crate) struct RingGroup {
    pub(crate) device: Arc<dyn Device>,
    state: Mutex<GroupState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GroupState {
    rings: Vec<Weak<RingShared>>,
    readers: usize,
    writers: usize,
    /// Queues of the device that exist.
    attached: usize,
    /// What happens to the device when no queue is left.
    then: Then,
    /// The device is being stopped or restarted this moment.
    carrying: bool,
    /// Stops and restarts carried out so far, and how the last one ended.
    carried: u64,
    outcome: Option<Arc<Error>>,
    stopped: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Then {
    #[default]
    Nothing,
    Restart,
    Stop,
}

impl fmt::Debug for RingGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingGroup").field("device", &self.device.name()).finish_non_exhaustive()
    }
}

impl Drop for RingGroup {
    fn drop(&mut self) {
        // The interface and all its rings are gone.
        if lock(&self.state).stopped {
            return;
        }
        match guard(|| self.device.stop()) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the device did not stop cleanly"),
            Err(Panicked) => tracing::error!("the device panicked while it was stopped"),
        }
    }
}

impl RingGroup {
    fn new(device: Arc<dyn Device>) -> Self {
        Self { device, state: Mutex::default(), changed: Condvar::new() }
    }

    fn claim(self: &Arc<Self>, direction: Direction) -> Result<Claim, Error> {
        let caps = self.device.capabilities();
        let mut state = lock(&self.state);
        if state.stopped || state.then != Then::Nothing {
            return Err(ConfigError::Invalid(INTERFACE_BUSY.to_owned()).into());
        }
        let too_many = |direction, limit| Error::TooManyRings {
            device: self.device.name().to_owned(),
            direction,
            limit,
        };
        if direction.reads() && state.readers >= caps.reading_rings {
            return Err(too_many("reading", caps.reading_rings));
        }
        if direction.writes() && state.writers >= caps.writing_rings {
            return Err(too_many("writing", caps.writing_rings));
        }
        state.readers += usize::from(direction.reads());
        state.writers += usize::from(direction.writes());
        drop(state);
        Ok(Claim { group: self.clone(), direction })
    }

    fn add(&self, ring: &Arc<RingShared>) {
        let mut state = lock(&self.state);
        state.rings.retain(|ring| ring.strong_count() > 0);
        state.rings.push(Arc::downgrade(ring));
    }

    /// An engine is about to ask the device for a queue. False while the device is to be stopped or
    /// restarted: that waits until no queue exists. (After a restart every ring is told to ask again.)
    pub(crate) fn try_attach(&self) -> bool {
        let mut state = lock(&self.state);
        let free = !state.carrying && !state.stopped && state.then == Then::Nothing;
        state.attached += usize::from(free);
        free
    }

    /// An engine has let go of its queue. The last one carries out what was asked for.
    pub(crate) fn detached(&self) {
        lock(&self.state).attached -= 1;
        self.carry_out();
    }

    fn wish(&self, bits: u32) {
        // Not under the lock: ringing may run somebody's waker.
        let rings: Vec<_> = lock(&self.state).rings.iter().filter_map(Weak::upgrade).collect();
        for ring in rings {
            ring.wish(bits);
        }
    }

    /// If no queue is left: stops or restarts the device, if that was asked for.
    fn carry_out(&self) {
        let then = {
            let mut state = lock(&self.state);
            if state.attached > 0 || state.carrying || state.then == Then::Nothing {
                return;
            }
            state.carrying = true;
            std::mem::take(&mut state.then)
        };
        let outcome = match then {
            Then::Nothing => return,
            Then::Restart => guard(|| self.device.restart()),
            Then::Stop => guard(|| self.device.stop()),
        };
        let outcome = outcome.unwrap_or_else(|_| {
            Err(Error::Io {
                what: "stopping the device",
                source: std::io::Error::other("the device panicked"),
            })
        });
        let failed = outcome.is_err();
        let mut state = lock(&self.state);
        state.carrying = false;
        state.stopped |= then == Then::Stop;
        state.carried += 1;
        state.outcome = outcome.err().map(Arc::new);
        // Asked for meanwhile.
        let again = state.then != Then::Nothing;
        drop(state);
        self.changed.notify_all();
        match then {
            Then::Restart if failed => self.wish(control::STOP),
            Then::Restart => self.wish(control::REOPEN),
            _ => {}
        }
        if again {
            self.carry_out();
        }
    }

    fn ask(&self, then: Then, bits: u32, timeout: Duration) -> Result<(), Error> {
        let deadline = after(timeout);
        let mut state = lock(&self.state);
        if state.stopped {
            return match then {
                Then::Stop => Ok(()),
                _ => Err(ConfigError::Invalid("the interface is stopped".to_owned()).into()),
            };
        }
        // A stop overrides a restart that waits; a second restart joins it.
        if state.then != Then::Stop {
            state.then = then;
        }
        // One that is carried out this moment does not count: ours comes after it.
        let ours = state.carried + 1 + u64::from(state.carrying);
        drop(state);
        self.wish(bits);
        self.carry_out();
        let mut state = lock(&self.state);
        loop {
            if state.carried >= ours || (then == Then::Stop && state.stopped) {
                return match &state.outcome {
                    None => Ok(()),
                    Some(error) => Err(Error::Device(error.clone())),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout(timeout));
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
    }

    fn stop(&self, timeout: Duration) -> Result<(), Error> {
        self.ask(Then::Stop, control::STOP, timeout)
    }

    fn restart(&self, timeout: Duration) -> Result<(), Error> {
        self.ask(Then::Restart, control::DETACH, timeout)
    }
}

/// One ring's place among those a device bears.
pub(crate) struct Claim {
    group: Arc<RingGroup>,
    direction: Direction,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = lock(&self.group.state);
        state.readers -= usize::from(self.direction.reads());
        state.writers -= usize::from(self.direction.writes());
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim").field("direction", &self.direction).finish_non_exhaustive()
    }
}
