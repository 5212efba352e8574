//! The device behind a vhost-user session, and [`serve_connection`], which is all that a program needs.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use thiserror::Error as ThisError;
use vmring::guest::GuestMemory;
use vmring::{CloseReason, Interface};

use crate::config::NetConfig;
use crate::event::Event;
use crate::net::device::{NetDevice, NetError, NetSettings, QueueSetup};
use crate::net::features::Features;
use crate::net::idle::Idle;
use crate::net::interrupt::EventInterrupt;
use crate::queue::{AddressSpace, QueueLayout, QueueState};
use crate::selector::{Wish, wait};
use crate::vhost_user::message::StateDirection;
use crate::vhost_user::{Backend, Error, Progress, RingSetup, Session, SessionStats, Settings};

/// How often a busy device is polled before the socket and the stop are looked at.
const POLLS_PER_LOOK: u32 = 16;
/// How long a connection waits for the device to release the guest's memory, when a ring stops and at
/// its end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// A [`NetDevice`] as the [`Backend`] of a [`Session`].
#[derive(Debug)]
pub struct VhostUserNet {
    device: NetDevice,
    interrupt: Arc<EventInterrupt>,
    /// Why the front end's features are not served.
    refused: Option<NetError>,
    /// Whether the front end cannot read the configuration space.
    hides_config: bool,
    front_end: FrontEndHandle,
}

/// What is known of the front end of a device, for a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrontEnd {
    /// Whether there is a connection.
    pub connected: bool,
    /// What the front end has negotiated.
    pub features: Features,
    /// The MAC address that it is told.
    pub mac: [u8; 6],
    /// Whether there is memory, and every file of it is sealed against shrinking.
    pub sealed: bool,
    /// What the session has counted.
    pub session: SessionStats,
}

/// Tells any thread about the front end of a device, also after the device is gone.
#[derive(Clone, Debug, Default)]
pub struct FrontEndHandle(Arc<Mutex<FrontEnd>>);

impl FrontEndHandle {
    /// What was known after the last message.
    pub fn get(&self) -> FrontEnd {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut FrontEnd)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl VhostUserNet {
    /// A device on an interface. There is no control queue, since front ends have it themselves.
    ///
    /// # Errors
    ///
    /// Those of [`NetDevice::new`].
    pub fn new(interface: Interface, settings: NetSettings) -> Result<Self, NetError> {
        let settings = NetSettings { control_queue: false, ring_reset: true, ..settings };
        let interrupt = Arc::new(EventInterrupt::new(settings.queue_pairs.saturating_mul(2)));
        let device = NetDevice::new(interface, interrupt.clone(), settings)?;
        let front_end = FrontEndHandle::default();
        front_end.change(|front_end| front_end.mac = device.config().mac);
        Ok(Self { device, interrupt, refused: None, hides_config: false, front_end })
    }

    /// The settings of a session with this device. Change `config`, `memory_max` and `demand_seals` as
    /// you need them.
    pub fn session_settings(&self) -> Settings {
        Settings::new(self.device.queue_pairs())
    }

    /// Tells any thread about the front end.
    pub fn front_end(&self) -> FrontEndHandle {
        self.front_end.clone()
    }

    /// The device.
    pub fn device(&self) -> &NetDevice {
        &self.device
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut NetDevice {
        &mut self.device
    }
}

impl VhostUserNet {
    fn publish(&self, session: SessionStats) {
        let mac = self.device.config().mac;
        self.front_end.change(|front_end| (front_end.session, front_end.mac) = (session, mac));
    }
}

impl Backend for VhostUserNet {
    fn features(&self) -> u64 {
        let features = self.device.features();
        match self.hides_config {
            // User-mode Linux would read a MAC address and a status that nobody has written. Front ends
            // that have a space of their own, such as QEMU, add these bits themselves.
            true => features.without(Features::MAC | Features::STATUS).bits(),
            false => features.bits(),
        }
    }

    fn set_features(&mut self, features: u64) {
        // The session has seen that nothing else was offered. What is missing is said when a ring
        // starts, because only that can be refused.
        let features = Features::from_bits(features);
        self.refused = self.device.set_features(features).err();
        self.front_end.change(|front_end| front_end.features = features);
    }

    fn set_memory(&mut self, memory: &GuestMemory, sealed: bool) {
        let sealed = sealed && !memory.regions().is_empty();
        self.front_end.change(|front_end| front_end.sealed = sealed);
        // No ring runs, so nothing is on its way, and no queue can be missing in it.
        let _ = self.device.set_memory(memory);
    }

    fn start_ring(
        &mut self,
        index: u16,
        ring: RingSetup,
    ) -> Result<(), Box<dyn core::error::Error + Send + Sync>> {
        if let Some(refused) = self.refused.take() {
            return Err(refused.into());
        }
        let Some(kick) = ring.kick else {
            return Err("a ring without a kick descriptor would have to be polled".into());
        };
        self.interrupt.set_queue(index, ring.call);
        let setup = QueueSetup {
            layout: QueueLayout {
                size: ring.size.into(),
                descriptors: ring.descriptors,
                available: ring.available,
                used: ring.used,
                addresses: AddressSpace::Guest,
                used_log: ring.used_log.map(|log| log.guest_address()),
            },
            state: state_of(&ring.memory, ring.used, ring.base),
            kick: Some(kick),
            enabled: ring.enabled,
        };
        Ok(self.device.start_queue(index, setup)?)
    }

    fn stop_ring(&mut self, index: u16) -> Poll<u16> {
        let stopped = self.device.stop_queue(index);
        stopped.map(|state| state.unwrap_or_default().next_available)
    }

    fn enable_ring(&mut self, index: u16, enabled: bool) {
        self.device.enable_queue(index, enabled);
    }

    fn set_call(&mut self, index: u16, call: Option<Arc<Event>>) {
        self.interrupt.set_queue(index, call);
    }

    fn config(&self) -> NetConfig {
        self.device.config()
    }

    fn set_mtu(&mut self, mtu: u16) -> bool {
        self.device.set_mtu(mtu)
    }

    fn announce(&mut self, mac: [u8; 6]) {
        self.device.announce(mac);
    }

    fn reset(&mut self) {
        // No ring runs, so this is ready.
        let _ = self.device.reset();
        self.refused = None;
    }

    fn save(&mut self) -> Vec<u8> {
        self.device.snapshot()
    }

    fn load(&mut self, state: &[u8]) -> bool {
        let accepted = self.device.accepted_features();
        let good = self.device.restore(state).is_ok();
        if good && accepted != Features::NONE {
            // The front end has negotiated before, and what it says counts.
            self.refused = self.device.set_features(accepted).err();
        }
        good
    }
}

/// How far a ring is. The used index is the one that is in the ring, and what is behind it is popped
/// again, whatever the front end says: chains are used in order, so nothing behind it was used. After
/// the end of another back end a front end may know an older or a newer index.
fn state_of(memory: &GuestMemory, used: u64, base: u16) -> QueueState {
    let index = used.checked_add(2).and_then(|address| memory.slice(address, 2)?.read());
    let next = index.map_or(base, u16::from_le_bytes);
    QueueState { next_available: next, next_used: next }
}

/// How a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The front end has closed it.
    Closed,
    /// The stop descriptor is readable.
    Stopped,
}

/// Why a connection has ended before its time.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum ServeError {
    /// The front end has broken the protocol.
    #[error("the front end has broken the protocol")]
    Protocol(#[from] Error),
    /// The interface moves no packets any more.
    #[error("the interface moves no packets any more: {0}")]
    Interface(CloseReason),
    /// The interface did not release the guest's memory. What it holds stays mapped.
    #[error("the interface did not release the guest's memory within {0:?}")]
    Stuck(Duration),
}

/// Serves one front end on the calling thread, until it or the stop ends the connection. The thread
/// sleeps while there is nothing to do. Returns the device, reset, for the next connection.
///
/// `stop` ends it when it is readable, for example a pipe or a `signalfd`. It is not read. At the end,
/// whatever its reason, every ring is stopped and the guest's memory is unmapped. That waits for packets
/// that the interface is sending, for 5 seconds and then for the close timeout of a ring (2 seconds). What
/// the interface holds even after that is leaked on purpose, and its memory stays mapped. A front end
/// that stops a ring is not kept waiting for longer than that either: its connection ends.
///
/// # Errors
///
/// [`ServeError`], with the device, which is reset in this case too.
///
/// # System calls
///
/// Beside those that the [module](crate::net) lists: `recvmsg` and `sendto` on the socket, `fstat`, and
/// `mmap` and `munmap` for the guest's memory. A ring is made when the guest starts its queue, so the
/// calls that make one come after the connection has begun.
pub fn serve_connection(
    socket: UnixStream,
    mut device: VhostUserNet,
    settings: Settings,
    stop: BorrowedFd<'_>,
) -> (VhostUserNet, Result<Ended, ServeError>) {
    device.hides_config = !settings.config;
    device.front_end.change(|front_end| {
        *front_end = FrontEnd { connected: true, ..FrontEnd::default() };
    });
    let mut session = Session::new(socket, device, settings);
    let mut result = serve(&mut session, stop);
    let is_stuck = matches!(result, Err(ServeError::Stuck(_)));
    if is_stuck || !end(&mut session) {
        session.backend_mut().device.abandon();
        result = Err(ServeError::Stuck(END_TIMEOUT));
    }
    let mut device = session.into_backend();
    device.reset();
    device.front_end.change(|front_end| front_end.connected = false);
    (device, result)
}

fn serve(session: &mut Session<VhostUserNet>, stop: BorrowedFd<'_>) -> Result<Ended, ServeError> {
    let mut progress = Progress::More;
    let mut config = session.backend().device.config();
    let (mut polls, mut draining) = (0, None);
    let mut idle = Idle::new(session.backend().device.settings());
    loop {
        let moved = session.backend_mut().device.poll();
        // It comes after the poll, which may have ended what the session waits for. What ends later
        // lets `arm` fail, or wakes this thread.
        if matches!(progress, Progress::More | Progress::Draining) {
            let processed = session.process();
            session.backend().publish(session.stats());
            progress = processed?;
        }
        if progress == Progress::Closed {
            return Ok(Ended::Closed);
        }
        // While the front end waits, it is not heard, even if it goes.
        let waited = match progress {
            Progress::Draining => draining.get_or_insert_with(Instant::now).elapsed(),
            _ => {
                draining = None;
                Duration::ZERO
            }
        };
        let Some(patience) = END_TIMEOUT.checked_sub(waited) else {
            return Err(ServeError::Stuck(END_TIMEOUT));
        };
        report(session, &mut config);
        if let Some(reason) = session.backend().device.failure() {
            return Err(ServeError::Interface(reason));
        }
        // A device that has work is looked at more often than the others, which cost a system call.
        polls += 1;
        let busy = idle.stays_awake(&moved) || progress == Progress::More;
        if busy && polls % POLLS_PER_LOOK != 0 {
            continue;
        }
        let may_sleep = !busy && session.backend_mut().device.arm();
        let timeout = match may_sleep {
            true => {
                let deadline =
                    moved.deadline.map(|at| at.saturating_duration_since(Instant::now()));
                [deadline, draining.map(|_| patience)].into_iter().flatten().min()
            }
            false => Some(Duration::ZERO),
        };
        let socket = match progress {
            Progress::Blocked => Some((session.as_fd(), Wish::Write)),
            // Until the device or the transfer has ended, nothing more is read.
            Progress::Draining | Progress::Transferring => None,
            _ => Some((session.as_fd(), Wish::Read)),
        };
        let transfer = session.transfer().map(|(fd, direction)| match direction {
            StateDirection::Save => (fd, Wish::Write),
            StateDirection::Load => (fd, Wish::Read),
        });
        let device = (session.backend().device.as_fd(), Wish::Read);
        let ready = wait([Some((stop, Wish::Read)), socket, transfer, Some(device)], timeout);
        let [is_stopped, has_message, has_transferred, _] = ready;
        if is_stopped {
            return Ok(Ended::Stopped);
        }
        if has_message || has_transferred {
            progress = Progress::More;
        }
    }
}

/// Tells the front end what has changed at the device itself.
fn report(session: &mut Session<VhostUserNet>, config: &mut NetConfig) {
    while let Some(index) = session.backend_mut().device.take_broken_queue() {
        session.set_needs_reset(index);
    }
    let now = session.backend().device.config();
    if now != *config {
        *config = now;
        session.notify_config();
    }
}

/// Ends the connection. Returns whether the guest's memory was released.
fn end(session: &mut Session<VhostUserNet>) -> bool {
    let began = Instant::now();
    loop {
        let moved = session.backend_mut().device.poll();
        if session.end().is_ready() {
            return true;
        }
        let left = END_TIMEOUT.saturating_sub(began.elapsed());
        if left.is_zero() {
            return false;
        }
        let device = &mut session.backend_mut().device;
        if !moved.again && device.arm() {
            let deadline = moved.deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = deadline.map_or(left, |deadline| deadline.min(left));
            wait([Some((device.as_fd(), Wish::Read))], Some(timeout));
        }
    }
}
