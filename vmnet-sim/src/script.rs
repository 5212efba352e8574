//! What an interface's vmnet answers, and when.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

/// How the simulated vmnet treats one interface. Made with its defaults, which are what a healthy
/// macOS 26 was seen to do; changed through [`World::script`](crate::World::script), also while the
/// interface runs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Script {
    /// How the start goes.
    pub start: StartPlan,
    /// What the parameters say instead of what was asked for.
    pub mtu: Option<u64>,
    /// As above.
    pub max_packet_size: Option<u64>,
    /// Packets per read, told by `vmnet_read_max_packets_key` from macOS 15 on; `None`: not told, and
    /// 200.
    pub read_max_packets: Option<u32>,
    /// Packets per write, as above.
    pub write_max_packets: Option<u32>,
    /// Whether `vmnet_mac_address_key` in a description decides the MAC.
    pub honours_mac: bool,
    /// Whether the `max_packet_size` of an interface with the virtio header counts it.
    pub header_in_max: bool,
    /// When there are events.
    pub events: Events,
    /// What `vmnet_estimated_packets_available_key` says: `None`: it is not there; `Some(None)`: the
    /// truth; else this.
    pub estimate: Option<Option<u64>>,
    /// How long an event waits on its queue before its callback is called.
    pub event_delay: Duration,
    /// Plans for the next reads, one a call; afterwards they go well.
    pub reads: VecDeque<CallPlan>,
    /// Plans for the next writes.
    pub writes: VecDeque<CallPlan>,
    /// What becomes of a batch with a packet that cannot be sent (too short, too long): whether those
    /// before it are sent, and what the count says.
    pub failed_batch: (bool, Reported),
    /// Whether a packet may stand in several iovecs; else such a call fails with 1003. Reports differ.
    pub several_iovecs: bool,
    /// How a stop goes.
    pub stop: StopPlan,
    /// How long the handler of a start or a stop waits on its queue; then that counts as blocked,
    /// which is a misuse.
    pub patience: Duration,
    /// Packets that wait unread before some are dropped.
    pub queue_depth: usize,
    /// For benchmarks, fixed at the start: reads deliver this many bytes at once and in any number,
    /// writes are taken, and nothing is checked, copied or sent.
    pub free_of_charge: Option<usize>,
    /// What every read and write costs, as a system call would; fixed at the start.
    pub call_cost: Duration,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            start: StartPlan::default(),
            mtu: None,
            max_packet_size: None,
            read_max_packets: Some(256),
            write_max_packets: Some(256),
            honours_mac: false,
            header_in_max: false,
            events: Events::Arrival,
            estimate: Some(None),
            event_delay: Duration::ZERO,
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            failed_batch: (false, Reported::Asked),
            several_iovecs: true,
            stop: StopPlan::default(),
            patience: Duration::from_secs(20),
            queue_depth: 1024,
            free_of_charge: None,
            call_cost: Duration::ZERO,
        }
    }
}

/// How a start goes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StartPlan {
    /// What the handler is told; 1000 is success.
    pub status: u32,
    /// Whether a start that fails has a handle all the same.
    pub handle_on_failure: bool,
    /// Whether a start has no handle whatever the handler is told.
    pub no_handle: bool,
    /// When the handler is called.
    pub handler: StartHandler,
    /// Whether a start that succeeds has no parameters.
    pub no_parameters: bool,
    /// Parameters left out, by their keys' names without `vmnet_` and `_key`.
    pub missing: Vec<&'static str>,
}

impl Default for StartPlan {
    fn default() -> Self {
        Self {
            status: 1000,
            handle_on_failure: false,
            no_handle: false,
            handler: StartHandler::Prompt,
            no_parameters: false,
            missing: Vec::new(),
        }
    }
}

/// When the handler of a start is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartHandler {
    /// At once, on the queue.
    Prompt,
    /// After a time.
    After(Duration),
    /// Not at all.
    Never,
    /// At once, and a second time from another thread.
    Twice,
}

/// When there are events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Events {
    /// When packets arrive.
    Arrival,
    /// When packets arrive and none was waiting.
    Edge,
    /// When packets arrive, and again and again while some wait.
    Level,
    /// Never: they get lost.
    Lost,
}

/// How one read or write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallPlan {
    /// Well.
    Well,
    /// It succeeds, and takes or delivers no more than this.
    Takes(usize),
    /// It fails.
    Fails {
        /// With this status.
        status: u32,
        /// Having sent so many; a read delivers none.
        sent: usize,
        /// And saying so.
        reported: Reported,
    },
}

/// What the count says after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// What was asked for: it is left as it was.
    Asked,
    /// What was done.
    Done,
    /// Nothing.
    Zero,
}

/// How a stop goes.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StopPlan {
    /// The stop is refused with this status, and no handler comes.
    pub refused: Option<u32>,
    /// After how long the handler is called; `None`: never.
    pub handler: Option<Duration>,
    /// What it is told.
    pub status: u32,
}

impl Default for StopPlan {
    fn default() -> Self {
        Self { refused: None, handler: Some(Duration::ZERO), status: 1000 }
    }
}

/// What the host's sleep made of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dead {
    /// Reads find nothing, writes go nowhere, events do not come.
    Silent,
    /// Reads and writes fail with this status.
    Fails(u32),
}

/// A value of a description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number.
    U64(u64),
    /// A yes or no.
    Bool(bool),
    /// A text.
    Str(String),
    /// A UUID.
    Uuid([u8; 16]),
}

/// What an interface has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Starts, successful or not.
    pub starts: u64,
    /// Stops that were accepted.
    pub stops: u64,
    /// Calls of `vmnet_read`.
    pub reads: u64,
    /// Packets they delivered.
    pub packets_read: u64,
    /// Calls of `vmnet_write`.
    pub writes: u64,
    /// Packets they took.
    pub packets_written: u64,
    /// Events.
    pub events: u64,
    /// Packets that arrived and were dropped because too many waited, or because they are longer than
    /// the interface takes.
    pub dropped: u64,
}

/// How the creation of network objects goes.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct NetworkPlan {
    /// What it ends with; 1000 is success.
    pub status: u32,
    /// How long it takes.
    pub delay: Duration,
}

impl Default for NetworkPlan {
    fn default() -> Self {
        Self { status: 1000, delay: Duration::ZERO }
    }
}

/// A network object, as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetworkMade {
    /// 1000 is host, 1001 shared mode.
    pub mode: u64,
    /// The gateway.
    pub gateway: Ipv4Addr,
    /// The subnet mask.
    pub mask: Ipv4Addr,
    /// The IPv6 prefix and its length.
    pub prefix: Option<([u8; 16], u8)>,
    /// The MTU.
    pub mtu: u32,
    /// The way out.
    pub external: Option<String>,
    /// What was turned off.
    pub off: Vec<&'static str>,
    /// Addresses kept for clients.
    pub reservations: Vec<([u8; 6], Ipv4Addr)>,
    /// Forwarding rules.
    pub rules: Vec<ForwardMade>,
}

/// A forwarding rule of a network object.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForwardMade {
    /// 6 is TCP, 17 UDP.
    pub protocol: u8,
    /// The host's port.
    pub external_port: u16,
    /// The guest's address, 4 or 16 bytes.
    pub address: Vec<u8>,
    /// The guest's port.
    pub internal_port: u16,
}
