//! [`VirtioNet`]: a device from its activation to its reset, in the types of rust-vmm.

use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use thiserror::Error as ThisError;
use vmring::{GuestMemory, Interface};
use vmring_virtio::Event;
use vmring_virtio::net::{
    Features, Interrupt, NetConfig, NetDevice, NetError, NetSettings, NetThread, QueueSetup,
    SavedQueue,
};
use vmring_virtio::queue::QueueState;

use crate::interrupt::CurrentInterrupt;
use crate::memory::{MemoryError, MemorySource};
use crate::queue::{QueueConversionError, QueueDescription};

/// Why a device does not do what the VMM asks for.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// The device is active. It is to be reset first.
    #[error("the device is active")]
    Active,
    /// Something of the device is still on its way: poll the device, and try again.
    #[error("the device still has packets on their way")]
    Busy,
    /// The guest's memory is none for a device.
    #[error("the guest's memory cannot be used")]
    Memory(#[from] MemoryError),
    /// A queue cannot be converted.
    #[error("queue {index} cannot be converted")]
    Queue {
        /// The queue.
        index: u16,
        /// Why.
        source: QueueConversionError,
    },
    /// The device refuses.
    #[error("the device refuses")]
    Net(#[from] NetError),
}

/// A queue of a transport, as it is when the driver sets DRIVER_OK.
#[derive(Clone, Debug)]
pub struct ActiveQueue {
    index: u16,
    queue: virtio_queue::QueueState,
    kick: Option<Arc<Event>>,
}

impl ActiveQueue {
    /// The queue with this index, without a kick descriptor: the VMM calls
    /// [`Notifier::notify`](vmring_virtio::net::Notifier::notify). A queue that is not ready does not
    /// run.
    pub fn new(index: u16, queue: virtio_queue::QueueState) -> Self {
        Self { index, queue, kick: None }
    }

    /// Sets the descriptor that is readable when the guest has kicked the queue.
    #[must_use]
    pub fn kick(self, kick: Arc<Event>) -> Self {
        Self { kick: Some(kick), ..self }
    }
}

/// A queue and its kick descriptor, as cloud-hypervisor hands them over.
#[cfg(target_os = "linux")]
impl TryFrom<(u16, virtio_queue::Queue, vmm_sys_util::eventfd::EventFd)> for ActiveQueue {
    type Error = io::Error;

    fn try_from(
        (index, queue, kick): (u16, virtio_queue::Queue, vmm_sys_util::eventfd::EventFd),
    ) -> io::Result<Self> {
        Ok(Self::new(index, queue.state()).kick(crate::eventfd::kick_event(&kick)?))
    }
}

/// What the driver has negotiated.
#[derive(Clone, Copy, Debug)]
pub enum Negotiated<'s> {
    /// The feature bits that it has accepted. All were offered ([`VirtioNet::features`]).
    Features(u64),
    /// What [`VirtioNet::snapshot`] returned for the device that goes on here.
    Snapshot(&'s [u8]),
}

impl From<u64> for Negotiated<'_> {
    fn from(features: u64) -> Self {
        Negotiated::Features(features)
    }
}

impl<'s> From<&'s [u8]> for Negotiated<'s> {
    fn from(snapshot: &'s [u8]) -> Self {
        Negotiated::Snapshot(snapshot)
    }
}

/// A virtio-net device over an interface, from its activation to its reset and to the next activation.
///
/// It belongs to the thread that polls it: that of an event loop ([`device_mut`](Self::device_mut)), or
/// one of its own ([`spawn`](Self::spawn)). See the [crate's documentation](crate).
#[derive(Debug)]
pub struct VirtioNet {
    device: NetDevice,
    active: Active,
}

/// What this crate knows of a device besides the device itself.
#[derive(Debug, Default)]
struct Active {
    interrupt: Arc<CurrentInterrupt>,
    /// The queues that were started, as they were then.
    queues: Vec<(u16, QueueDescription)>,
    /// Whether a reset has begun and not ended.
    resetting: bool,
}

impl Active {
    /// The queues in the state that the device says they are in.
    fn states(
        &self,
        features: Features,
        states: impl IntoIterator<Item = (u16, QueueState)>,
    ) -> Vec<(u16, virtio_queue::QueueState)> {
        let event_idx = features.has(Features::EVENT_IDX);
        let state = |(index, state)| {
            let (_, description) = self.queues.iter().find(|(own, _)| *own == index)?;
            let now = QueueDescription { state, event_idx, ..*description };
            // It was converted when it was started, and a device keeps its indices together.
            Some((index, now.try_into().ok()?))
        };
        states.into_iter().filter_map(state).collect()
    }
}

impl VirtioNet {
    /// A device that waits for its driver.
    ///
    /// # Errors
    ///
    /// [`NetError::System`].
    pub fn new(interface: Interface, settings: NetSettings) -> Result<Self, NetError> {
        let active = Active::default();
        let device = NetDevice::new(interface, active.interrupt.clone(), settings)?;
        Ok(Self { device, active })
    }

    /// The feature bits that the device offers.
    pub fn features(&self) -> u64 {
        self.device.features().bits()
    }

    /// Reads the configuration space from `offset` on. What is behind its end reads as zeros.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(self.device.config(), offset, data);
    }

    /// The device itself: to poll it, to notify it, and for its counters.
    pub fn device(&self) -> &NetDevice {
        &self.device
    }

    /// The device itself.
    pub fn device_mut(&mut self) -> &mut NetDevice {
        &mut self.device
    }

    /// Starts the queues, when the driver sets DRIVER_OK or when a device of elsewhere goes on here.
    /// They are looked at at the next poll: the guest may have kicked them before.
    ///
    /// # Errors
    ///
    /// [`Error`]. In this case no queue runs, and the device can be activated again. With
    /// [`Error::Busy`] it can when it was polled.
    pub fn activate<'s>(
        &mut self,
        memory: &dyn MemorySource,
        interrupt: Arc<dyn Interrupt>,
        negotiated: impl Into<Negotiated<'s>>,
        queues: impl IntoIterator<Item = ActiveQueue>,
    ) -> Result<(), Error> {
        if self.active.resetting && self.reset().is_pending() {
            return Err(Error::Busy);
        }
        if !self.active.queues.is_empty() {
            return Err(Error::Active);
        }
        let memory = memory.snapshot()?;
        self.active.interrupt.set(Some(interrupt));
        let result = self.start(&memory, negotiated.into(), queues);
        if result.is_err() {
            let _ = self.reset();
        }
        result
    }

    fn start(
        &mut self,
        memory: &GuestMemory,
        negotiated: Negotiated<'_>,
        queues: impl IntoIterator<Item = ActiveQueue>,
    ) -> Result<(), Error> {
        let mut saved = Vec::new();
        match negotiated {
            Negotiated::Features(bits) => self.device.set_features(Features::from_bits(bits))?,
            Negotiated::Snapshot(bytes) => saved = self.device.restore(bytes)?,
        }
        let Poll::Ready(result) = self.device.set_memory(memory) else { return Err(Error::Busy) };
        result?;
        for queue in queues.into_iter().filter(|queue| queue.queue.ready) {
            let enabled = |saved: &SavedQueue| saved.index != queue.index || saved.enabled;
            let enabled = saved.iter().all(enabled);
            self.start_one(queue, enabled)?;
        }
        Ok(())
    }

    fn start_one(&mut self, queue: ActiveQueue, enabled: bool) -> Result<(), Error> {
        let ActiveQueue { index, queue, kick } = queue;
        let failed = |source| Error::Queue { index, source };
        let description = QueueDescription::try_from(queue).map_err(failed)?;
        let mut setup = QueueSetup::try_from(description).map_err(failed)?;
        (setup.kick, setup.enabled) = (kick, enabled);
        self.device.start_queue(index, setup)?;
        self.active.queues.retain(|(own, _)| *own != index);
        self.active.queues.push((index, description));
        Ok(())
    }

    /// Starts one queue of a device that is active, after [`stop_queue`](Self::stop_queue)
    /// (`VIRTIO_F_RING_RESET`).
    ///
    /// # Errors
    ///
    /// [`Error`], and the queue does not run.
    pub fn start_queue(&mut self, queue: ActiveQueue) -> Result<(), Error> {
        self.start_one(queue, true)
    }

    /// Stops one queue; see [`NetDevice::stop_queue`]. Returns how far it is, or `None` if it did not
    /// run.
    pub fn stop_queue(&mut self, index: u16) -> Poll<Option<virtio_queue::QueueState>> {
        let stopped = self.device.stop_queue(index);
        stopped.map(|state| {
            let states = self.active.states(self.device.accepted_features(), Some((index, state?)));
            self.active.queues.retain(|(own, _)| *own != index);
            states.first().map(|(_, state)| *state)
        })
    }

    /// Replaces the guest's memory by what the VMM has now, when it has added or removed a region; see
    /// [`NetDevice::set_memory`]. When it is ready, the earlier mappings are given up. Until then poll
    /// the device and call this again.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], and nothing has changed; or [`Error::Net`] if a queue is not in the memory
    /// any more. That queue is stopped.
    pub fn update_memory(&mut self, memory: &dyn MemorySource) -> Poll<Result<(), Error>> {
        let memory = memory.snapshot()?;
        self.device.set_memory(&memory).map(|result| Ok(result?))
    }

    /// Lets everything end that is on its way, and begins nothing more; see [`NetDevice::pause`]. When
    /// it is ready, nothing accesses the guest's memory. Until then poll the device and call this again.
    /// Returns the queues that run, by their indices. Another device goes on with them, of this crate or
    /// of others.
    pub fn pause(&mut self) -> Poll<Vec<(u16, virtio_queue::QueueState)>> {
        self.device.pause().map(|()| {
            let states = self.device.queue_states();
            self.active.states(self.device.accepted_features(), states)
        })
    }

    /// Goes on after [`pause`](Self::pause).
    pub fn resume(&mut self) {
        self.device.resume();
    }

    /// What another device must know to go on with this guest, besides the queues: see
    /// [`NetDevice::snapshot`]. It is whole while the device is [paused](Self::pause).
    pub fn snapshot(&self) -> Vec<u8> {
        self.device.snapshot()
    }

    /// Stops everything and forgets the driver, as when it writes the status 0; see
    /// [`NetDevice::reset`]. When it is ready, the device gives up the guest's memory and the interrupt,
    /// and can be activated again. Until then poll the device and call this again.
    pub fn reset(&mut self) -> Poll<()> {
        self.active.resetting = self.device.reset().is_pending();
        if self.active.resetting {
            return Poll::Pending;
        }
        self.active.queues.clear();
        self.active.interrupt.set(None);
        let none = GuestMemory::new([]).expect("no region overlaps another");
        self.device.set_memory(&none).map(|_| ())
    }

    /// Starts a thread of this name that polls the device; see [`NetDevice::spawn`].
    ///
    /// # Errors
    ///
    /// What the system says. The device is dropped.
    pub fn spawn(self, name: &str) -> io::Result<VirtioNetThread> {
        Ok(VirtioNetThread { thread: self.device.spawn(name)?, active: self.active })
    }
}

/// A device on a thread of its own. Dropping it stops the thread and drops the device.
///
/// The functions wait until the device's thread has done what they ask for, between two polls. They must
/// not be called by that thread, as from inside of an interrupt.
#[derive(Debug)]
pub struct VirtioNetThread {
    thread: NetThread,
    active: Active,
}

impl VirtioNetThread {
    /// The thread: to notify the device, for its counters, and to call a function on the device.
    pub fn thread(&self) -> &NetThread {
        &self.thread
    }

    /// As [`VirtioNet::read_config`].
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(self.thread.call(|device| device.config()), offset, data);
    }

    /// As [`VirtioNet::update_memory`].
    ///
    /// # Errors
    ///
    /// Those of that function, and [`Error::Busy`] if the earlier memory is still in use after
    /// `timeout`. In this case it is replaced later: do not take its mappings for unused.
    pub fn update_memory(&self, memory: &dyn MemorySource, timeout: Duration) -> Result<(), Error> {
        let memory = memory.snapshot()?;
        let result =
            self.thread.call_until(Some(timeout), move |device| device.set_memory(&memory));
        Ok(result.ok_or(Error::Busy)??)
    }

    /// As [`VirtioNet::pause`]. `None` if packets are still on their way after `timeout`. In this case
    /// the device goes on pausing.
    pub fn pause(&self, timeout: Duration) -> Option<Vec<(u16, virtio_queue::QueueState)>> {
        let (features, states) = self.thread.call_until(Some(timeout), |device| {
            let paused = device.pause();
            paused.map(|()| (device.accepted_features(), device.queue_states()))
        })?;
        Some(self.active.states(features, states))
    }

    /// As [`VirtioNet::resume`].
    pub fn resume(&self) {
        self.thread.resume();
    }

    /// As [`VirtioNet::snapshot`].
    pub fn snapshot(&self) -> Vec<u8> {
        self.thread.call(|device| device.snapshot())
    }

    /// Stops the thread, and returns the device after a [`reset`](VirtioNet::reset). What is still on
    /// its way after `timeout` is given up; see [`NetDevice::abandon`].
    ///
    /// # Panics
    ///
    /// If the thread has panicked.
    pub fn reset(self, timeout: Duration) -> VirtioNet {
        let is_reset = self.thread.call_until(Some(timeout), NetDevice::reset).is_some();
        let mut net = self.stop();
        if !is_reset {
            net.device.abandon();
        }
        // Nothing is on its way any more, so it is ready.
        let _ = net.reset();
        net
    }

    /// Stops the thread, and returns the device, which is still active.
    ///
    /// # Panics
    ///
    /// If the thread has panicked.
    pub fn stop(self) -> VirtioNet {
        VirtioNet { device: self.thread.stop(), active: self.active }
    }
}

fn read_config(config: NetConfig, offset: u64, data: &mut [u8]) {
    let bytes = config.bytes();
    let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or(&[]);
    data.fill(0);
    data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}
