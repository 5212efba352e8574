//! Apple's vmnet, driven in batches by the poller.
//!
//! On macOS this is the driver that [`Interface::builder`](crate::Interface::builder) starts by
//! default. On other systems the same files run against a simulated vmnet (feature `vmnet-sim`).
//! The tests use that simulation: nobody has run these files on a Mac yet. The [guide] lists what
//! the simulation cannot prove.
//!
//! Each subject has a small file: the C declarations (`ffi`), what only newer systems have
//! (`availability`), what an interface is asked for (`description`), an interface from its start to
//! its stop (`started`), events (`events`), the batches (`queue`), port forwarding (`forwarding`)
//! and network objects (`network`).

mod address;
mod availability;
mod description;
mod events;
mod ffi;
mod forwarding;
mod guest_memory;
pub mod guide;
mod limits;
mod network;
mod permission;
pub mod probe;
mod queue;
mod started;
mod system;
mod xpc;

use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use availability::System;
use description::{Extras, describe};
use limits::{SAFETY_POLL, START_TIMEOUT, STOP_TIMEOUT};
use queue::VmnetQueue;
use started::{StartedInterface, Timeouts};
use vmring_core::offload;
use vmring_core::sync::Ordering;

use crate::config::{InterfaceConfig, InterfaceInfo, Mode, PortForward, Protocol};
use crate::device::common::mac_of;
use crate::device::seam::{Capabilities, Device, Driver, Queue, QueueConfig, Wake};
use crate::error::{ConfigError, Error, Status};
use crate::sync::Mutex;
use crate::sys::lock;

pub use description::IsolatedNetwork;
pub use network::{SerializedNetwork, Service, VmnetNetwork, VmnetNetworkBuilder};

/// The vmnet driver, with the settings that only vmnet has. Pass it to
/// [`InterfaceBuilder::device`](crate::InterfaceBuilder::device). On macOS it is the default
/// driver.
#[derive(Clone, Debug)]
pub struct Vmnet {
    extras: Extras,
    network: Option<VmnetNetwork>,
    timeouts: Timeouts,
    safety_poll: Option<Duration>,
    system: System,
}

impl Default for Vmnet {
    fn default() -> Self {
        Self::new()
    }
}

impl Vmnet {
    /// Creates a driver with the default settings.
    pub fn new() -> Self {
        Self {
            extras: Extras::default(),
            network: None,
            timeouts: Timeouts { start: START_TIMEOUT, stop: STOP_TIMEOUT },
            safety_poll: Some(SAFETY_POLL),
            system: System::look(),
        }
    }

    /// Sets the IPv6 prefix of a shared network. It must be in fd00::/8.
    #[doc(alias = "vmnet_nat66_prefix_key")]
    pub fn nat66_prefix(mut self, prefix: Ipv6Addr) -> Self {
        self.extras.nat66_prefix = Some(prefix);
        self
    }

    /// Puts the interface on an isolated host-mode network.
    #[doc(alias = "vmnet_network_identifier_key")]
    pub fn isolated_network(mut self, network: IsolatedNetwork) -> Self {
        self.extras.isolated_network = Some(network);
        self
    }

    /// Puts the interface on a network object (macOS 26). The network decides the mode, the
    /// addresses and the MTU.
    #[doc(alias = "vmnet_interface_start_with_network")]
    pub fn network(mut self, network: &VmnetNetwork) -> Self {
        self.extras.on_network = true;
        self.network = Some(network.clone());
        self
    }

    /// Sets how long a start waits for vmnet's answer. Default 60 seconds.
    ///
    /// After that the interface, its queue and its handler are leaked on purpose, because the
    /// answer may still come. The timeout should be longer than
    /// [`InterfaceBuilder::start_timeout`](crate::InterfaceBuilder::start_timeout): an interface
    /// whose answer comes between the two is stopped instead of leaked.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.start = timeout;
        self
    }

    /// Sets how long a stop waits for the last event callback, and then again for vmnet's answer to
    /// the stop. Default 5 seconds. What has not ended by then is leaked on purpose.
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.stop = timeout;
        self
    }

    /// Sets how often the poller reads from an idle interface although no event came. Default 200
    /// milliseconds; `None` means never.
    ///
    /// This safety poll finds packets whose event was lost. Nobody has reported a lost event, but
    /// no document rules one out. [`Interface::counters`](crate::Interface::counters) says how
    /// often the safety poll found packets.
    pub fn safety_poll(mut self, every: Option<Duration>) -> Self {
        self.safety_poll = every;
        self
    }

    fn start_interface(&self, config: &InterfaceConfig) -> Result<StartedInterface, Error> {
        let description = describe(config, &self.extras, &self.system)?;
        let network = self.network.as_ref();
        StartedInterface::start(&description, network, self.system, self.timeouts)
            .map_err(|error| unknown_interface(config).map_or(error, Error::from))
    }
}

/// Returns the error of a start in bridged mode that failed because the interface is none of those
/// that can be shared. vmnet gives no reason for that failure.
fn unknown_interface(config: &InterfaceConfig) -> Option<ConfigError> {
    let Mode::Bridged(name) = &config.mode else { return None };
    let known = shared_interfaces();
    if known.is_empty() || known.contains(name) {
        return None;
    }
    let known = known.join(", ");
    Some(ConfigError::Invalid(format!("vmnet cannot bridge to '{name}', but to these: {known}")))
}

/// Returns the names of the host's interfaces that [`Mode::Bridged`] can share.
#[doc(alias = "vmnet_copy_shared_interface_list")]
pub fn shared_interfaces() -> Vec<String> {
    // SAFETY: the call has no arguments. By its name ("copy", see xpc_object(3)) it gives us one
    // reference to the array that it returns, or null; `Owned` releases that reference once.
    let list = unsafe { xpc::Owned::from_raw(ffi::vmnet_copy_shared_interface_list()) };
    list.map(|list| list.borrow().strings()).unwrap_or_default()
}

impl Driver for Vmnet {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let mut config = config.clone();
        if let Some(network) = &self.network {
            config.mode = network.mode().clone();
        }
        let started = self.start_interface(&config)?;
        let (info, caps) = self.negotiated(&config, &started)?;
        // Keep the identity that vmnet assigned, so that a restart asks for the same one.
        config.interface_id = info.interface_id;
        Ok(Arc::new(VmnetDevice {
            driver: *self,
            config,
            negotiated: Mutex::new((info, caps)),
            started: Mutex::new(Some(Arc::new(started))),
            forwards: Mutex::default(),
        }))
    }
}

impl Vmnet {
    /// Returns the properties that vmnet reported for the interface, after checking them.
    ///
    /// # Errors
    ///
    /// [`Status::SetupIncomplete`] if the MTU or the packet size is missing or impossible.
    fn negotiated(
        &self,
        config: &InterfaceConfig,
        started: &StartedInterface,
    ) -> Result<(InterfaceInfo, Capabilities), Error> {
        let parameters = &started.parameters;
        let (mtu, max) = parameters.sizes().ok_or(Status::SetupIncomplete)?;
        // A MAC that the caller asked for wins over vmnet's. Apple does not document whether vmnet
        // uses it, but users of vmnet report that it carries frames of any MAC.
        let mac = config.mac.or(parameters.mac).unwrap_or_else(|| mac_of(config));
        let mut info = InterfaceInfo::new(config, mac, mtu, max);
        info.interface_id = parameters.interface_id.unwrap_or(config.interface_id);
        info.ipv4 = parameters.ipv4.or(config.ipv4);
        info.nat66_prefix = parameters.nat66_prefix;
        let mut caps = Capabilities::new(mtu, max);
        (caps.max_read_batch, caps.max_write_batch) = parameters.batches();
        caps.writing_rings = usize::MAX;
        caps.safety_poll = self.safety_poll;
        // One piece: reports differ on whether vmnet takes more. The header that a guest sends must
        // be checked on a copy, so with headers its packets are copied.
        caps.read_segments = 1;
        caps.write_segments = if config.offloads.virtio_header { 0 } else { 1 };
        caps.offloads = config.offloads;
        if config.offloads.virtio_header {
            caps.headroom = offload::LEN as u32;
            // `vmnet_enable_tso_key` covers both IPv4 and IPv6. Checksums need no key of their own:
            // the header describes them.
            let tso = config.offloads.tso4 || config.offloads.tso6;
            (caps.offloads.tso4, caps.offloads.tso6) = (tso, tso);
            caps.offloads.checksum = true;
        }
        Ok((info, caps))
    }
}

struct VmnetDevice {
    driver: Vmnet,
    config: InterfaceConfig,
    /// What the last start has negotiated.
    negotiated: Mutex<(InterfaceInfo, Capabilities)>,
    /// `None` while stopped.
    started: Mutex<Option<Arc<StartedInterface>>>,
    /// Forwarding rules added through this device. A restart adds them again.
    forwards: Mutex<Vec<PortForward>>,
}

impl VmnetDevice {
    /// Calls `f` with the interface. The lock is held during the call, so `stop` and `restart` wait
    /// until `f` has returned.
    ///
    /// # Errors
    ///
    /// [`Status::SetupIncomplete`] while the device is stopped, and the errors of `f`.
    fn with_started<T>(
        &self,
        f: impl FnOnce(&Arc<StartedInterface>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        f(lock(&self.started).as_ref().ok_or(Status::SetupIncomplete)?)
    }

    /// As [`with_started`](Self::with_started), for port forwards. vmnet refuses those of an interface of a
    /// network object, without a reason.
    fn with_forwarding<T>(
        &self,
        f: impl FnOnce(&Arc<StartedInterface>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.with_started(f).map_err(|error| match error {
            Error::Status(Status::Failure) if self.driver.network.is_some() => {
                let sentence = "vmnet forwards ports to an interface of a network object only as its \
                                network was made: name them with VmnetNetworkBuilder::forward";
                ConfigError::Invalid(sentence.to_owned()).into()
            }
            error => error,
        })
    }
}

impl Device for VmnetDevice {
    fn name(&self) -> &str {
        if cfg!(target_os = "macos") { "vmnet" } else { "vmnet-sim" }
    }

    fn info(&self) -> InterfaceInfo {
        lock(&self.negotiated).0.clone()
    }

    fn capabilities(&self) -> Capabilities {
        lock(&self.negotiated).1
    }

    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let direction = config.direction;
        let caps = self.capabilities();
        let batches = (caps.max_read_batch, caps.max_write_batch);
        let header = caps.headroom as usize;
        self.with_started(|started| {
            let queue = VmnetQueue::new(started.clone(), direction, wake, batches, header)?;
            Ok(Box::new(queue) as Box<dyn Queue>)
        })
    }

    /// # Errors
    ///
    /// [`Status::SetupIncomplete`] while a queue exists; nothing in this crate stops a device then.
    /// [`Error::Status`] if vmnet refuses the stop, [`Error::Timeout`] if it does not answer in
    /// time.
    fn stop(&self) -> Result<(), Error> {
        let Some(started) = lock(&self.started).take() else { return Ok(()) };
        match Arc::try_unwrap(started) {
            Ok(started) => started.stop(),
            Err(started) => {
                // A queue still owns a share and may be reading or writing: do not stop under it.
                *lock(&self.started) = Some(started);
                Err(Status::SetupIncomplete.into())
            }
        }
    }

    fn restart(&self) -> Result<(), Error> {
        if let Err(error) = self.stop() {
            // After a sleep of the host the old interface may be dead. Start the new one anyway.
            tracing::warn!(%error, "the interface before the restart did not stop cleanly");
        }
        let started = self.driver.start_interface(&self.config)?;
        let (info, caps) = self.driver.negotiated(&self.config, &started)?;
        let (info_before, caps_before) = lock(&self.negotiated).clone();
        let changed = if (info.max_packet_size, caps.headroom)
            != (info_before.max_packet_size, caps_before.headroom)
        {
            // The rings sized their frames by the old values and have promised them to callers.
            Some("another packet size after a restart")
        } else if (info.mac, info.interface_id) != (info_before.mac, info_before.interface_id) {
            // The guest was told the old address.
            Some("another MAC or identity after a restart")
        } else {
            None
        };
        if let Some(what) = changed {
            started.stop()?;
            return Err(Error::Answer { device: "vmnet", what });
        }
        // Batch limits and the MTU may be others. The rings ask for new queues, which keep to them.
        *lock(&self.negotiated) = (info, caps);
        for rule in lock(&self.forwards).iter() {
            if let Err(error) = forwarding::add(&started, &self.driver.system, rule) {
                tracing::warn!(%error, ?rule, "a port is not forwarded any more");
            }
        }
        *lock(&self.started) = Some(Arc::new(started));
        Ok(())
    }

    fn add_port_forward(&self, rule: &PortForward) -> Result<(), Error> {
        self.with_forwarding(|started| forwarding::add(started, &self.driver.system, rule))?;
        lock(&self.forwards).push(*rule);
        Ok(())
    }

    fn remove_port_forward(&self, protocol: Protocol, external_port: u16) -> Result<(), Error> {
        let system = &self.driver.system;
        self.with_forwarding(|started| {
            forwarding::remove(started, system, protocol, external_port)
        })?;
        lock(&self.forwards)
            .retain(|rule| (rule.protocol, rule.external_port) != (protocol, external_port));
        Ok(())
    }

    fn port_forwards(&self) -> Result<Vec<PortForward>, Error> {
        self.with_forwarding(|started| forwarding::list(started, &self.driver.system))
    }

    fn shared_interfaces(&self) -> Result<Vec<String>, Error> {
        Ok(shared_interfaces())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Some(started) = &*lock(&self.started) else { return Vec::new() };
        // Relaxed: a statistic that guards nothing.
        let rescued = started.events.rescued.load(Ordering::Relaxed);
        vec![("events", started.events.count()), ("safety polls that found packets", rescued)]
    }
}
