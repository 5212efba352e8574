//! The traits that the author of a device implements: [`Driver`], [`Device`] and [`Queue`].

use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use macaddr::MacAddr6;

use crate::config::{Direction, InterfaceConfig, InterfaceInfo, Offloads, PortForward, Protocol};
use crate::device::context::PollContext;
use crate::error::{Error, Status};
use crate::limits::PACKETS_PER_CALL;
use crate::mailbox::RingShared;

/// Starts a device. [`InterfaceBuilder::device`](crate::InterfaceBuilder::device) takes a driver.
pub trait Driver: Send + 'static {
    /// Starts an interface as `config` describes it and returns its device.
    ///
    /// The call may block: it runs on a thread of its own, and
    /// [`InterfaceBuilder::start`](crate::InterfaceBuilder::start) waits for it no longer than the
    /// start timeout. A device that is returned after the timeout is stopped at once.
    ///
    /// # Errors
    ///
    /// The driver's own. The drivers of this crate return [`Error::NotSupported`] or
    /// [`Error::Config`] for a setting that they do not accept.
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error>;
}

impl<D: Driver + ?Sized> Driver for Box<D> {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        (*self).start(config)
    }
}

/// A running network interface. An [`Interface`](crate::Interface) and its rings share one device.
pub trait Device: Send + Sync {
    /// Returns the name of this kind of device, for example `tap`. Errors and log messages contain
    /// it.
    fn name(&self) -> &str;

    /// Returns what was negotiated when the device was started.
    fn info(&self) -> InterfaceInfo;

    /// Returns what the device's queues can do. The answer must not change while the device runs.
    fn capabilities(&self) -> Capabilities;

    /// Opens an endpoint for one ring, which `config` describes.
    ///
    /// The queue keeps `wake`, to wake the poller with it. [`Queue::arm`] says when it must. The
    /// library never opens more queues at a time than [`Capabilities`] allows.
    ///
    /// # Errors
    ///
    /// The device's own. Building the ring fails with this error. After a restart the ring closes
    /// instead.
    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error>;

    /// Stops the interface. A queue that still exists returns an error from its next
    /// [`poll`](Queue::poll).
    ///
    /// # Errors
    ///
    /// The device's own, if it did not stop cleanly.
    fn stop(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Stops the interface and starts it again with the same identity. Every queue has been closed
    /// before the call, and the rings open new ones after it.
    ///
    /// # Errors
    ///
    /// The device's own. Every ring of the interface closes if the restart fails.
    fn restart(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Forwards a port of the host to a guest.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] if the device cannot forward ports, which is the default, or the
    /// device's own.
    fn add_port_forward(&self, rule: &PortForward) -> Result<(), Error> {
        let _ = rule;
        Err(self.not_supported("port forwarding"))
    }

    /// Removes the forwarding of a port of the host.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] if the device cannot forward ports, which is the default, or the
    /// device's own.
    fn remove_port_forward(&self, protocol: Protocol, external_port: u16) -> Result<(), Error> {
        let _ = (protocol, external_port);
        Err(self.not_supported("port forwarding"))
    }

    /// Returns the forwardings in effect.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] if the device cannot forward ports, which is the default, or the
    /// device's own.
    fn port_forwards(&self) -> Result<Vec<PortForward>, Error> {
        Err(self.not_supported("port forwarding"))
    }

    /// Returns the kernel's name for the interface, such as `tap0`, if there is one.
    fn system_name(&self) -> Option<String> {
        None
    }

    /// Returns the names of the host's interfaces that bridged mode can share.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] if the device has no such list, which is the default, or the
    /// device's own.
    fn shared_interfaces(&self) -> Result<Vec<String>, Error> {
        Err(self.not_supported("listing shared interfaces"))
    }

    /// Returns the address that the network has given to `mac`. Returns `None` if there is none, or
    /// if the device hands out no addresses or does not know them.
    fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        let _ = mac;
        None
    }

    /// Returns what the device counts besides packets, as names and counts.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Returns how many packets the device itself has dropped since it was started, by reason. A
    /// network of several interfaces reports the sum.
    fn drops(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Returns the error that says that this device does not support `what`.
    fn not_supported(&self, what: &'static str) -> Error {
        Error::NotSupported { what, device: self.name().to_owned() }
    }
}

/// What a ring wants of its endpoint; see [`Device::queue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueConfig {
    /// Whether the ring reads, writes, or both.
    pub direction: Direction,
    /// The work that the ring accepts undone in what it reads, of the interface's
    /// [offloads](Capabilities::offloads); see [`RingBuilder::receive_offloads`]. They are the
    /// interface's unless the device has [`Capabilities::receive_offloads`]. Whether there is a header
    /// does not change.
    ///
    /// [`RingBuilder::receive_offloads`]: crate::RingBuilder::receive_offloads
    pub receive_offloads: Offloads,
    /// Whether TCP packets with ECN are among those that the ring accepts uncut; see
    /// [`RingBuilder::receive_ecn`](crate::RingBuilder::receive_ecn).
    pub receive_ecn: bool,
}

impl QueueConfig {
    /// The endpoint of a ring that accepts all work undone that its interface may leave.
    pub fn new(direction: Direction) -> Self {
        Self { direction, receive_offloads: Offloads::ALL, receive_ecn: true }
    }
}

/// The endpoint of one ring at a device. One thread at a time calls it.
pub trait Queue: Send {
    /// Makes progress without blocking: takes posted slots from `cx`, and completes them or keeps
    /// them to complete them in a later call.
    ///
    /// Slots that it does not take, or puts back, stay posted in their order. Reads wait as long as
    /// they must. Writes that a poll leaves are offered again within the ring's
    /// [`RetryPolicy`](crate::RetryPolicy), and then complete with [`Status::BufferExhausted`]; a
    /// device that needs longer takes and keeps them.
    ///
    /// # Errors
    ///
    /// An error means that the device has failed for good. Every entry in flight completes with the
    /// status, and the ring closes. The failure of one entry is not such an error: complete that
    /// entry with [`PollContext::fail`].
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status>;

    /// Says that the calling thread, a poller's, is the one that makes every later call.
    ///
    /// It is called once, before the first [`poll`](Self::poll), if a poller's thread drives the
    /// ring. It is not called if the ring is inline ([`Drive::Inline`](crate::Drive::Inline)). In
    /// that case each call may come from another thread.
    fn bind_to_thread(&mut self) {}

    /// Called before the poller sleeps. Return false if a packet waits already: the poller polls
    /// again. After true, the next packet must call [`Wake`], or make
    /// [`descriptor`](Self::descriptor) readable; one of the two is enough.
    ///
    /// The same holds for a slot that the queue keeps, when it can be completed. A queue for which
    /// nothing happens between two polls returns true, which is the default, and never calls
    /// [`Wake`].
    fn arm(&mut self) -> bool {
        true
    }

    /// Requests that slots the queue keeps are completed soon: all of them, or those whose
    /// `user_data` is `target`. Returns how many slots match.
    ///
    /// The queue completes them in a later [`poll`](Self::poll): with their packet if there is one,
    /// otherwise by [`PollContext::cancel`]. A cancel must not lose a packet.
    fn cancel(&mut self, target: Option<u64>) -> u32 {
        let _ = target;
        0
    }

    /// Requests that the reads that the queue keeps are completed soon, as [`cancel`](Self::cancel)
    /// does, and leaves the writes that it keeps to end by themselves. Returns how many reads it
    /// keeps. A drain of the ring ([`Ring::drain`](crate::Ring::drain)) calls it at most once. No reads
    /// are offered until the ring is resumed.
    ///
    /// Implement it if the queue keeps writes and its `cancel` ends them, because the default cancels
    /// everything.
    fn cancel_reads(&mut self) -> u32 {
        self.cancel(None)
    }

    /// Gives back every slot that the queue keeps, through `cx`. Returns whether it keeps none any
    /// more.
    ///
    /// The call is repeated until it returns true or the ring's close timeout ends. If the queue
    /// still keeps slots by then, the queue and its slots are leaked on purpose, because something
    /// may still write to them.
    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        let _ = cx;
        true
    }

    /// Returns a descriptor that is readable when there is something to do, if the device has one.
    /// The poller sleeps on it, while reads are posted or the queue keeps slots. It calls this method
    /// when the queue is opened and after each [`arm`](Self::arm).
    ///
    /// The poller takes an equal number for the same file. So a queue that goes from one file to another
    /// opens the second before it closes the first.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns the time at which the queue wants to be polled even if nothing wakes the poller. The
    /// default is none. It counts while reads are posted or the queue keeps slots. The poller calls
    /// this method before it sleeps.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Returns whether the queue has still to send something of writes that it has completed. Then the
    /// poller sleeps on the [`descriptor`](Self::descriptor) even while no read is posted and the queue
    /// keeps no slot, so the descriptor must be readable when sending can go on. It is called after each
    /// [`arm`](Self::arm). The default is false.
    fn is_sending(&self) -> bool {
        false
    }
}

/// Whether a [`Queue::poll`] has read everything that there was to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// No packet is left to read. The poller may sleep; [`Queue::arm`] says how the next packet wakes
    /// it.
    Idle,
    /// Packets may be waiting. The poller polls again if reads are posted.
    More,
}

/// Wakes the poller of a ring. [`Queue::arm`] says when a device must call it. A call is cheap while
/// the poller is awake.
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

    /// Makes a wake that calls `f`. This is for wrappers, and for code that drives a queue itself.
    pub fn from_fn(f: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Inner::Call(Arc::new(f)))
    }

    /// Wakes the poller. It may be called from any thread, at any time, and any number of times.
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

/// What a device can do. A caller decides by these values, not by the system that it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The largest IP packet, in bytes.
    pub mtu: u32,
    /// The largest Ethernet frame that may be written, in bytes. A frame that is posted for a read
    /// must have space for this many bytes.
    pub max_packet_size: u32,
    /// How many reads one [`Queue::poll`] may take.
    pub max_read_batch: u32,
    /// How many writes one [`Queue::poll`] may take.
    pub max_write_batch: u32,
    /// How many bytes the device needs in front of a packet.
    pub headroom: u32,
    /// The work that the device does for the guest.
    pub offloads: Offloads,
    /// Whether each ring that reads can accept less than these offloads
    /// ([`QueueConfig::receive_offloads`]). The default is no: what is read leaves what the interface's
    /// offloads allow.
    pub receive_offloads: bool,
    /// The largest packet that is not to be cut into segments, in bytes. It is the largest that a ring
    /// reads which accepts no segmentation, if the device has [`receive_offloads`](Self::receive_offloads).
    /// The default is `max_packet_size`.
    pub max_frame_size: u32,
    /// The largest number of segments of a guest's buffer that the device can fill itself
    /// ([`PostedSlot::guest`](crate::device::PostedSlot::guest)). The default is 0: it takes frames
    /// only, and the library copies each packet from a frame into the guest's memory. It gets no
    /// buffer that has less space than `max_packet_size`, or a shorter header than `headroom`.
    pub read_segments: u32,
    /// The largest number of segments of a guest's buffer that the device can send itself. The
    /// default is 0: it takes frames only, and the library copies each packet from the guest's memory
    /// into a frame. It gets no buffer that has a shorter header than `headroom`, and if `headroom` is
    /// 0, none whose header asks for work.
    pub write_segments: u32,
    /// Whether one packet can fill several posted reads
    /// ([`PollContext::complete_read_parts`](crate::device::PollContext::complete_read_parts)). The
    /// default is no. On a ring with [mergeable reads](crate::RingBuilder::mergeable_reads) such a
    /// device gets buffers of a guest that have less space than `max_packet_size`.
    pub merges_reads: bool,
    /// Whether the device looks itself whether the header of what a guest sends asks for work, and fails
    /// what it does not do. The default is no: the library looks at each such header before the device
    /// gets the buffer.
    pub checks_headers: bool,
    /// How many rings may read at the same time.
    pub reading_rings: usize,
    /// How many rings may write at the same time.
    pub writing_rings: usize,
    /// How often the poller polls an idle device that has not called its [`Wake`]. `None`: never.
    pub safety_poll: Option<Duration>,
    /// Whether a queue that has no [`descriptor`](Queue::descriptor) when it is opened may have one
    /// later, as a socket that waits for its peer. The default is no. The descriptor of an inline ring
    /// ([`completion_fd`](crate::Ring::completion_fd)) is the same one as long as the ring lives, so the
    /// ring must know.
    pub late_descriptor: bool,
}

impl Capabilities {
    /// Returns the capabilities of a simple device: one ring in each direction, 200 packets per
    /// poll (vmnet's documented limit of a call), no headroom, no offloads, no buffers of a guest and
    /// no safety poll.
    pub fn new(mtu: u32, max_packet_size: u32) -> Self {
        Self {
            mtu,
            max_packet_size,
            max_read_batch: PACKETS_PER_CALL,
            max_write_batch: PACKETS_PER_CALL,
            headroom: 0,
            offloads: Offloads::default(),
            receive_offloads: false,
            max_frame_size: max_packet_size,
            read_segments: 0,
            write_segments: 0,
            merges_reads: false,
            checks_headers: false,
            reading_rings: 1,
            writing_rings: 1,
            safety_poll: None,
            late_descriptor: false,
        }
    }
}

/// An address that a network has given to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: Ipv4Addr,
    /// How long the address is valid after the last renewal.
    pub duration: Duration,
}
