//! [`Interface`]: a network interface, its identity, and the rings on it.
//!
//! Start here: `Interface::builder().device(..).start()`, then `ring(..)`.
//!
//! ```
//! use vmring::{Direction, Interface, Loopback};
//!
//! let interface = Interface::builder().device(Loopback::new(1500)).start()?;
//! let ring = interface.ring(Direction::Both).build()?;
//! # Ok::<(), vmring::Error>(())
//! ```

use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use macaddr::MacAddr6;

use crate::RingBuilder;
use crate::background::Background;
use crate::config::{
    Direction, InterfaceConfig, InterfaceInfo, Ipv4Range, Mode, Offloads, PortForward, Protocol,
};
use crate::device::catch::{Panicked, catch_panic};
use crate::device::seam::{Capabilities, Device, Driver, Lease};
use crate::error::Error;
use crate::lifecycle::InterfaceShared;
use crate::limits::START_TIMEOUT;

/// Starts an [`Interface`]. [`Interface::builder`] returns one.
pub struct InterfaceBuilder {
    config: InterfaceConfig,
    driver: Option<Box<dyn Driver>>,
    start_timeout: Duration,
}

impl fmt::Debug for InterfaceBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterfaceBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl InterfaceBuilder {
    /// Sets which network the interface is on. Default: [`Mode::Shared`], as in `Lwt_vmnet.init`.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.config.mode = mode;
        self
    }

    /// Sets the interface's identity, a UUID. The same identity gives the same MAC. Default: a
    /// random one.
    #[doc(alias = "uuid")]
    pub fn interface_id(mut self, id: [u8; 16]) -> Self {
        self.config.interface_id = id;
        self
    }

    /// Sets the MAC. Default: one that the device allocates from the identity.
    pub fn mac(mut self, mac: MacAddr6) -> Self {
        self.config.mac = Some(mac);
        self
    }

    /// Sets the network's addresses. Default: the mode's own range, or on a TAP the first range that
    /// the host does not use.
    pub fn ipv4(mut self, range: Ipv4Range) -> Self {
        self.config.ipv4 = Some(range);
        self
    }

    /// Sets the MTU in bytes. Default: the device's own.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.config.mtu = Some(mtu);
        self
    }

    /// Sets whether packets between this interface and the other interfaces of the network are kept
    /// apart. The gateway and an uplink stay reachable. Default: false.
    pub fn isolated(mut self, yes: bool) -> Self {
        self.config.isolated = yes;
        self
    }

    /// Requests checksum and segmentation offload. What was granted is in
    /// [`Interface::capabilities().offloads`](Interface::capabilities). Default: none.
    ///
    /// A TAP grants what its kernel knows. The other devices refuse to start if they cannot do what
    /// was requested.
    #[doc(alias = "vmnet_enable_tso_key")]
    #[doc(alias = "vmnet_enable_checksum_offload_key")]
    #[doc(alias = "vmnet_enable_virtio_header_key")]
    pub fn offloads(mut self, offloads: Offloads) -> Self {
        self.config.offloads = offloads;
        self
    }

    /// Joins a network object (macOS 26). Short for [`Vmnet::network`](crate::Vmnet::network) as
    /// the device.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    pub fn network(self, network: &crate::VmnetNetwork) -> Self {
        self.device(crate::Vmnet::new().network(network))
    }

    /// Sets the device to start. Default: vmnet on macOS, elsewhere the embedded network `default`.
    pub fn device(mut self, driver: impl Driver) -> Self {
        self.driver = Some(Box::new(driver));
        self
    }

    /// Sets how long [`start`](Self::start) waits for the device. Default: 10 seconds.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Starts the interface, and waits until it has started.
    ///
    /// # Errors
    ///
    /// [`Error::StartTimeout`] if the driver does not answer in time. If it answers later, the
    /// interface is stopped again in the background. [`Error::Io`] if the system refuses the thread
    /// that starts the driver, or if the driver panics. Otherwise the driver's own error.
    ///
    /// [`start_async`](Self::start_async) does the same for an executor.
    pub fn start(self) -> Result<Interface, Error> {
        let InterfaceBuilder { config, driver, start_timeout } = self;
        let driver = driver.unwrap_or_else(default_driver);
        let (answer, waiting) = mpsc::sync_channel::<Result<Arc<dyn Device>, Error>>(0);
        let starter = thread::Builder::new()
            .name("vmring-start".to_owned())
            .spawn(move || {
                let started = catch_panic(|| driver.start(&config));
                let started = started.unwrap_or_else(|_| {
                    Err(Error::Io {
                        what: "starting the device",
                        source: std::io::Error::other("the driver panicked"),
                    })
                });
                // The channel has no buffer, so the send fails if `start` no longer waits, and
                // gives the device back.
                if let Err(mpsc::SendError(Ok(device))) = answer.send(started) {
                    tracing::warn!(device = device.name(), "started too late; stopping it");
                    match catch_panic(|| device.stop()) {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::warn!(%error, "the late device did not stop"),
                        Err(Panicked) => tracing::error!("the late device panicked"),
                    }
                }
            })
            .map_err(Error::io("starting the driver's thread"))?;
        let started =
            waiting.recv_timeout(start_timeout).map_err(|_| Error::StartTimeout(start_timeout))?;
        // The thread has answered and ends. After the join nothing of it stays behind.
        let _ = starter.join();
        let device = started?;
        let info = device.info();
        tracing::info!(device = device.name(), mac = %info.mac, mtu = info.mtu, "started");
        Ok(Interface { shared: Arc::new(InterfaceShared::new(device)) })
    }

    /// Starts the interface, as [`start`](Self::start) does, without blocking an executor. It needs no
    /// runtime: a thread of the library's does the work, wakes the task, and ends.
    ///
    /// Nothing happens before the first poll of the future. The start timeout counts from there. If the
    /// future is dropped after that, the start goes on in the background, and the interface is stopped
    /// again as soon as it has started. The drop does not wait for that.
    ///
    /// # Errors
    ///
    /// Those of [`start`](Self::start).
    ///
    /// # Panics
    ///
    /// If the future is polled again after it was ready.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use vmring::{AsyncRing, Direction, Interface, Loopback, block_on};
    ///
    /// block_on(async {
    ///     let interface = Interface::builder().device(Loopback::new(1500)).start_async().await?;
    ///     let packets = AsyncRing::new(interface.ring(Direction::Both).build()?)?;
    ///     // ...
    ///     packets.close().await?;
    ///     interface.stop_async(Duration::from_secs(5)).await
    /// })?;
    /// # Ok::<(), vmring::Error>(())
    /// ```
    pub fn start_async(
        self,
    ) -> impl Future<Output = Result<Interface, Error>> + Send + Unpin + 'static {
        Background::new("vmring-waiter", "starting the interface", move || self.start())
    }
}

/// A started network interface. [`Interface::builder`] makes one, [`ring`](Self::ring) a ring on
/// it.
///
/// It lives until [`stop`](Self::stop), or until it and all its rings are dropped, in any order. It
/// corresponds to the type `t` of `Lwt_vmnet`.
#[derive(Debug)]
pub struct Interface {
    shared: Arc<InterfaceShared>,
}

impl Interface {
    /// Returns a builder for the settings. [`InterfaceBuilder::start`] starts the interface.
    #[doc(alias = "init")]
    pub fn builder() -> InterfaceBuilder {
        let config = InterfaceConfig::new(Mode::default(), random_id());
        InterfaceBuilder { config, driver: None, start_timeout: START_TIMEOUT }
    }

    /// Returns everything that was negotiated at start.
    pub fn info(&self) -> InterfaceInfo {
        self.shared.device.info()
    }

    /// Returns which network the interface is on.
    pub fn mode(&self) -> Mode {
        self.info().mode
    }

    /// Returns the MAC that the guest is to use.
    pub fn mac(&self) -> MacAddr6 {
        self.info().mac
    }

    /// Returns the size of the largest IP packet, in bytes.
    pub fn mtu(&self) -> u32 {
        self.info().mtu
    }

    /// Returns the size of the largest packet, with its Ethernet header, in bytes. A write may not
    /// be longer, and a frame to read into must have space for as much. On the embedded network and
    /// on a TAP, 4 bytes of it are for a VLAN tag; a packet without a tag is shorter by as much.
    pub fn max_packet_size(&self) -> u32 {
        self.info().max_packet_size
    }

    /// Returns the interface's identity, a UUID.
    #[doc(alias = "uuid")]
    pub fn interface_id(&self) -> [u8; 16] {
        self.info().interface_id
    }

    /// Returns what the device can do.
    pub fn capabilities(&self) -> Capabilities {
        self.shared.device.capabilities()
    }

    /// Returns the device's name.
    pub fn device_name(&self) -> &str {
        self.shared.device.name()
    }

    /// Returns the kernel's name for the interface, such as `tap0`, if there is one.
    pub fn system_name(&self) -> Option<String> {
        self.shared.device.system_name()
    }

    /// Returns a builder for a ring on this interface. [`RingBuilder::build`] builds the ring.
    pub fn ring(&self, direction: Direction) -> RingBuilder<'_> {
        RingBuilder::new(&self.shared, direction)
    }

    /// Ends the interface: every ring closes, what is in flight completes, and then the device
    /// stops. After `Ok` no ring takes a submission, also none that was built meanwhile. Stopping twice
    /// is harmless.
    ///
    /// # Errors
    ///
    /// [`Error::StopTimeout`] if a ring did not release its queue within `timeout`. The device stops
    /// when the ring does. A ring with `Drive::Inline` does so only when its owner drives it, so
    /// close such rings first. [`Error::Device`] if the device did not stop cleanly.
    pub fn stop(&self, timeout: Duration) -> Result<(), Error> {
        self.shared.stop(timeout)
    }

    /// Ends the interface, as [`stop`](Self::stop) does, without blocking an executor. It needs no
    /// runtime: a thread of the library's waits for the rings, stops the device, wakes the task, and
    /// ends. The future borrows nothing, so a task of its own can await it.
    ///
    /// A ring with `Drive::Inline` may be driven by another task of the same executor, also on the same
    /// thread: the stop wakes it as a completion does, and it releases the ring's queue when it reaps.
    ///
    /// Nothing happens before the first poll of the future. `timeout` counts from there. If the future
    /// is dropped after that, the stop goes on, and nobody hears how it ended. Await the stop before
    /// you drop the last handle on an interface in a task, because that drop stops the device on its
    /// own thread, and waits for it.
    ///
    /// # Errors
    ///
    /// Those of [`stop`](Self::stop), and [`Error::Io`] if the system refuses the thread. In the latter
    /// case nothing was stopped.
    ///
    /// # Panics
    ///
    /// If the future is polled again after it was ready.
    pub fn stop_async(
        &self,
        timeout: Duration,
    ) -> impl Future<Output = Result<(), Error>> + Send + Unpin + use<> {
        let shared = self.shared.clone();
        Background::new("vmring-waiter", "stopping the interface", move || shared.stop(timeout))
    }

    /// Stops the device and starts it again with the same identity. This is for hosts that come
    /// back from sleep. Rings, frames and pools stay. What was in flight completes as cancelled, or
    /// with its packet. What is submitted meanwhile waits.
    ///
    /// # Errors
    ///
    /// [`Error::StopTimeout`] if a ring did not release its queue within `timeout`. The restart happens
    /// when the ring does. A ring with `Drive::Inline` does so only when its owner drives it.
    /// [`Error::Device`] if the device did not start again: the rings are closed. [`Error::Config`]
    /// if the interface is stopped.
    pub fn restart(&self, timeout: Duration) -> Result<(), Error> {
        self.shared.restart(timeout)
    }

    /// Stops the device and starts it again, as [`restart`](Self::restart) does, without blocking an
    /// executor. The future is like that of [`stop_async`](Self::stop_async): it begins at its first
    /// poll, and if it is dropped after that, the restart goes on.
    ///
    /// # Errors
    ///
    /// Those of [`restart`](Self::restart), and [`Error::Io`] if the system refuses the thread. In the
    /// latter case nothing was restarted.
    ///
    /// # Panics
    ///
    /// If the future is polled again after it was ready.
    pub fn restart_async(
        &self,
        timeout: Duration,
    ) -> impl Future<Output = Result<(), Error>> + Send + Unpin + use<> {
        let shared = self.shared.clone();
        Background::new("vmring-waiter", "restarting the interface", move || {
            shared.restart(timeout)
        })
    }

    /// Forwards a port of the host to a guest.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] if the device does not forward ports, and the errors of the device.
    #[doc(alias = "vmnet_interface_add_port_forwarding_rule")]
    pub fn add_port_forward(&self, rule: &PortForward) -> Result<(), Error> {
        self.shared.device.add_port_forward(rule)
    }

    /// Ends a forwarding.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] if the device does not forward ports, and the errors of the device.
    #[doc(alias = "vmnet_interface_remove_port_forwarding_rule")]
    pub fn remove_port_forward(&self, protocol: Protocol, port: u16) -> Result<(), Error> {
        self.shared.device.remove_port_forward(protocol, port)
    }

    /// Returns the forwardings in force.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] if the device does not forward ports, and the errors of the device.
    #[doc(alias = "vmnet_interface_get_port_forwarding_rules")]
    pub fn port_forwards(&self) -> Result<Vec<PortForward>, Error> {
        self.shared.device.port_forwards()
    }

    /// Returns the names of the interfaces that [`Mode::Bridged`] can share.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] if the device cannot list them, and the errors of the device.
    #[doc(alias = "vmnet_copy_shared_interface_list")]
    pub fn shared_interfaces(&self) -> Result<Vec<String>, Error> {
        self.shared.device.shared_interfaces()
    }

    /// Returns the address that the network gave to `mac`, if the device knows it.
    pub fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        self.shared.device.lease(mac)
    }

    /// Returns the device's own counters, beyond packets, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.device.counters()
    }

    /// Returns the packets that the device, or its whole network, dropped, by reason.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        self.shared.device.drops()
    }

    /// Returns a handle that reads [`counters`](Self::counters) and [`drops`](Self::drops) on any
    /// thread.
    pub fn monitor(&self) -> InterfaceMonitor {
        InterfaceMonitor { device: Arc::downgrade(&self.shared.device) }
    }
}

/// Reads the counters of an interface from any thread. It keeps nothing of the interface alive.
///
/// ```
/// use vmring::{Interface, Loopback};
///
/// let interface = Interface::builder().device(Loopback::new(1500)).start()?;
/// let monitor = interface.monitor();
/// assert_eq!(monitor.drops(), interface.drops());
/// drop(interface);
/// assert!(monitor.drops().is_empty() && monitor.counters().is_empty());
/// # Ok::<(), vmring::Error>(())
/// ```
#[derive(Clone)]
pub struct InterfaceMonitor {
    device: Weak<dyn Device>,
}

impl InterfaceMonitor {
    /// Returns what [`Interface::counters`] returns. It is empty once the interface is gone.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.device.upgrade().map(|device| device.counters()).unwrap_or_default()
    }

    /// Returns what [`Interface::drops`] returns. It is empty once the interface is gone.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        self.device.upgrade().map(|device| device.drops()).unwrap_or_default()
    }
}

impl fmt::Debug for InterfaceMonitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterfaceMonitor").finish_non_exhaustive()
    }
}

fn default_driver() -> Box<dyn Driver> {
    #[cfg(target_os = "macos")]
    return Box::new(crate::Vmnet::new());
    #[cfg(not(target_os = "macos"))]
    return Box::new(crate::device::embedded::Embedded::network("default"));
}

/// Makes a version 4 UUID from the keys of the standard library's random hasher.
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
