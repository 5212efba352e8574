//! What a driver implements: [`Driver`], [`Device`] and [`Queue`].

use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use macaddr::MacAddr6;

use crate::config::{Direction, InterfaceConfig, InterfaceInfo, Offloads, PortForward, Protocol};
use crate::device::context::PollContext;
use crate::error::{Error, Status};
use crate::limits::PACKETS_PER_CALL;
use crate::mailbox::RingShared;

/// Something that can start a device: what [`InterfaceBuilder::device`] takes.
pub trait Driver: Send + 'static {
    /// Starts the interface. May block; the builder's start timeout runs meanwhile.
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error>;
}

impl<D: Driver + ?Sized> Driver for Box<D> {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        (*self).start(config)
    }
}

/// A network interface of some system. [`Interface`](crate::Interface) owns one; rings drive its
/// queues.
pub trait Device: Send + Sync {
    /// The device's name, as the command's `--device` takes it.
    fn name(&self) -> &str;

    /// What was negotiated at start.
    fn info(&self) -> InterfaceInfo;

    /// What the queues can do. Does not change while the device runs.
    fn capabilities(&self) -> Capabilities;

    /// An endpoint for one ring. The queue calls `wake` whenever packets may have come since it
    /// last said that there were none. The caller keeps to the number of rings in
    /// [`Capabilities`].
    fn queue(&self, direction: Direction, wake: Wake) -> Result<Box<dyn Queue>, Error>;

    /// Ends the interface. Queues that are still there say so when polled.
    fn stop(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Stops and starts anew with the same identity. The poller has closed every queue and asks for
    /// new ones afterwards.
    fn restart(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Forwards a port of the host.
    fn add_port_forward(&self, rule: &PortForward) -> Result<(), Error> {
        let _ = rule;
        Err(self.not_supported("port forwarding"))
    }

    /// Ends a forwarding.
    fn remove_port_forward(&self, protocol: Protocol, external_port: u16) -> Result<(), Error> {
        let _ = (protocol, external_port);
        Err(self.not_supported("port forwarding"))
    }

    /// The forwardings in force.
    fn port_forwards(&self) -> Result<Vec<PortForward>, Error> {
        Err(self.not_supported("port forwarding"))
    }

    /// What the system calls the interface, if it has a name there: `tap0`.
    fn system_name(&self) -> Option<String> {
        None
    }

    /// Names of the interfaces that bridged mode can share.
    fn shared_interfaces(&self) -> Result<Vec<String>, Error> {
        Err(self.not_supported("listing shared interfaces"))
    }

    /// The address the network has given to `mac`, if this device hands out addresses and knows.
    fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        let _ = mac;
        None
    }

    /// What the device counts of itself beyond packets, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Packets the device dropped by itself since it started, by reason; the sum of a network.
    fn drops(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// The error for a function that this device lacks.
    fn not_supported(&self, what: &'static str) -> Error {
        Error::NotSupported { what, device: self.name().to_owned() }
    }
}

/// One ring's endpoint of a device, driven by one thread at a time.
pub trait Queue: Send {
    /// Makes progress without blocking: takes posted slots from `cx` and completes them, or keeps
    /// them to complete in a later call. What it leaves, or puts back, stays posted in its order.
    /// `Err` means that the device is dead for good: everything in flight completes with the
    /// status and the ring closes.
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status>;

    /// From here on one thread drives the queue, a poller's, and this is it. Without this call, which
    /// comes before the first [`poll`](Self::poll), the queue may be driven by another thread each
    /// time.
    fn bind_to_thread(&mut self) {}

    /// The poller is about to sleep: from here on a packet must ring the `wake`. False if there is
    /// something to do already.
    fn arm(&mut self) -> bool {
        true
    }

    /// Asks for slots that the queue keeps, all or those of one `user_data`, to be completed soon:
    /// with their packet, or by [`PollContext::cancel`]. Returns how many match. A packet must not get
    /// lost by it.
    fn cancel(&mut self, target: Option<u64>) -> u32 {
        let _ = target;
        0
    }

    /// Lets go of everything: gives back what it keeps, through `cx`. Called until it answers true
    /// (nothing kept) or the close has waited long enough.
    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        let _ = cx;
        true
    }

    /// A descriptor that is readable when there is something to do; the poller sleeps on it. Asked
    /// for when the queue is opened, and anew after each [`arm`](Self::arm).
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What a [`Queue::poll`] left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// No more packets can be read now.
    Idle,
    /// Packets may still wait: call again when slots are posted.
    More,
}

/// A device's way to say that there is something to do. Cheap while the poller is awake.
#[derive(Clone)]
pub struct Wake(Inner);

#[derive(Clone)]
enum Inner {
    Ring(Arc<RingShared>),
    Call(Arc<dyn Fn() + Send + Sync>),
}

impl Wake {
    pub(crate) fn ring(shared: Arc<RingShared>) -> Self {
        Self(Inner::Ring(shared))
    }

    /// A wake that calls a function: for wrappers, and for driving a queue by hand.
    pub fn from_fn(f: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Inner::Call(Arc::new(f)))
    }

    /// Rings. Callable from any thread, at any time, any number of times.
    pub fn wake(&self) {
        match &self.0 {
            Inner::Ring(shared) => shared.ring_from_device(),
            Inner::Call(f) => f(),
        }
    }
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wake")
    }
}

/// What a device can do, as values to ask for instead of systems to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// Largest frame that may be written, and the least room of a frame to read into, bytes.
    pub max_packet_size: u32,
    /// Packets per read call.
    pub max_read_batch: u32,
    /// Packets per write call.
    pub max_write_batch: u32,
    /// Bytes the device needs in front of a packet.
    pub headroom: u32,
    /// What the device does to packets on the way.
    pub offloads: Offloads,
    /// Rings that may read at a time.
    pub reading_rings: usize,
    /// Rings that may write at a time.
    pub writing_rings: usize,
    /// How often the poller looks at an idle device although it has not rung. `None`: never.
    pub safety_poll: Option<Duration>,
}

impl Capabilities {
    /// A device of one ring each way, with vmnet's documented batch limit of 200 packets per call
    /// where nothing else is said.
    pub fn new(mtu: u32, max_packet_size: u32) -> Self {
        Self {
            mtu,
            max_packet_size,
            max_read_batch: PACKETS_PER_CALL,
            max_write_batch: PACKETS_PER_CALL,
            headroom: 0,
            offloads: Offloads::default(),
            reading_rings: 1,
            writing_rings: 1,
            safety_poll: None,
        }
    }
}

/// An address in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: Ipv4Addr,
    /// How long it is valid, from the last renewal.
    pub duration: Duration,
}
