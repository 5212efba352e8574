//! Scripts: what an interface's vmnet answers, and when.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

/// How the simulated vmnet treats one interface. The defaults are what a healthy macOS 26 was seen
/// to do. [`World::script`](crate::World::script) changes a script, also while the interface runs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Script {
    /// How the start goes.
    pub start: StartPlan,
    /// The MTU in the parameters, instead of the one that was asked for.
    pub mtu: Option<u64>,
    /// The `max_packet_size` in the parameters, instead of the computed one.
    pub max_packet_size: Option<u64>,
    /// Packets per read. From macOS 15 on the parameters have it under
    /// `vmnet_read_max_packets_key`. With `None` they do not, and the limit is 200.
    pub read_max_packets: Option<u32>,
    /// Packets per write, in the same way, under `vmnet_write_max_packets_key`.
    pub write_max_packets: Option<u32>,
    /// Whether `vmnet_mac_address_key` in a description decides the MAC.
    pub honours_mac: bool,
    /// Whether `max_packet_size` includes the virtio header, on an interface that has it.
    pub header_in_max: bool,
    /// When there are events.
    pub events: Events,
    /// The value of `vmnet_estimated_packets_available_key`. `None`: the key is missing.
    /// `Some(None)`: the true number. `Some(Some(n))`: `n`.
    pub estimate: Option<Option<u64>>,
    /// How long an event waits on its queue before its callback is called.
    pub event_delay: Duration,
    /// Plans for the next reads, one for each call. Reads without a plan go well.
    pub reads: VecDeque<CallPlan>,
    /// Plans for the next writes.
    pub writes: VecDeque<CallPlan>,
    /// What happens to a batch that has a packet which cannot be sent (too short, too long):
    /// whether the packets before it are sent, and what the count says.
    pub failed_batch: (bool, Reported),
    /// Whether a packet may be spread over several iovecs. If not, such a call fails with 1003.
    /// Reports differ on what vmnet does.
    pub several_iovecs: bool,
    /// How a stop goes.
    pub stop: StopPlan,
    /// How long the handler of a start or a stop may wait on its queue. After that the queue counts
    /// as blocked, which is a misuse.
    pub patience: Duration,
    /// Packets that may wait unread. Packets beyond that are dropped.
    pub queue_depth: usize,
    /// For benchmarks, fixed at the start. Reads deliver this many bytes at once and in any number,
    /// writes are accepted, and nothing is checked, copied or sent.
    pub free_of_charge: Option<usize>,
    /// What every read and write costs, as a system call would. Fixed at the start.
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
    /// The status that the handler gets; 1000 is success.
    pub status: u32,
    /// Whether a start that fails returns a handle nevertheless.
    pub handle_on_failure: bool,
    /// Whether a start returns no handle, whatever status the handler gets.
    pub no_handle: bool,
    /// When the handler is called.
    pub handler: StartHandler,
    /// Whether a start that succeeds has no parameters.
    pub no_parameters: bool,
    /// Parameters that are left out, by the names of their keys without `vmnet_` and `_key`.
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
    /// After this time.
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
    /// When packets arrive and no packet was waiting.
    Edge,
    /// When packets arrive, and repeatedly as long as packets wait.
    Level,
    /// Never: events get lost.
    Lost,
}

/// How one read or write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallPlan {
    /// It succeeds.
    Well,
    /// It succeeds, but takes or delivers at most this many packets.
    Takes(usize),
    /// It fails.
    Fails {
        /// With this status.
        status: u32,
        /// After this many packets were sent. A read delivers none.
        sent: usize,
        /// With this count.
        reported: Reported,
    },
}

/// What the count says after a call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// The number that was asked for: the count stays as it was.
    Asked,
    /// The number that was done.
    Done,
    /// Zero.
    Zero,
}

/// How a stop goes.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StopPlan {
    /// The stop is refused with this status, and the handler is never called.
    pub refused: Option<u32>,
    /// How long after the stop the handler is called; `None`: never.
    pub handler: Option<Duration>,
    /// The status that the handler gets.
    pub status: u32,
}

impl Default for StopPlan {
    fn default() -> Self {
        Self { refused: None, handler: Some(Duration::ZERO), status: 1000 }
    }
}

/// What the host's sleep has done to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dead {
    /// Reads find nothing, writes go nowhere, and there are no events.
    Silent,
    /// Reads and writes fail with this status.
    Fails(u32),
}

/// A value in a description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number.
    U64(u64),
    /// A boolean.
    Bool(bool),
    /// A string.
    Str(String),
    /// A UUID.
    Uuid([u8; 16]),
}

/// What an interface has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Starts, successful or not.
    pub starts: u64,
    /// Stops that were accepted.
    pub stops: u64,
    /// Calls of `vmnet_read`.
    pub reads: u64,
    /// Packets that they delivered.
    pub packets_read: u64,
    /// Calls of `vmnet_write`.
    pub writes: u64,
    /// Packets that they took.
    pub packets_written: u64,
    /// Events.
    pub events: u64,
    /// Packets that arrived and were dropped, because too many were waiting or because they are
    /// longer than the interface accepts.
    pub dropped: u64,
}

/// How the creation of network objects goes.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct NetworkPlan {
    /// The status of the creation; 1000 is success.
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
    /// 1000 is host mode, 1001 is shared mode.
    pub mode: u64,
    /// The gateway.
    pub gateway: Ipv4Addr,
    /// The subnet mask.
    pub mask: Ipv4Addr,
    /// The IPv6 prefix and its length.
    pub prefix: Option<([u8; 16], u8)>,
    /// The MTU.
    pub mtu: u32,
    /// The external interface.
    pub external: Option<String>,
    /// What was disabled.
    pub off: Vec<&'static str>,
    /// Addresses that are reserved for clients.
    pub reservations: Vec<([u8; 6], Ipv4Addr)>,
    /// Forwarding rules.
    pub rules: Vec<ForwardMade>,
}

/// A forwarding rule of a network object.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForwardMade {
    /// 6 is TCP, 17 is UDP.
    pub protocol: u8,
    /// The host's port.
    pub external_port: u16,
    /// The guest's address, 4 or 16 bytes.
    pub address: Vec<u8>,
    /// The guest's port.
    pub internal_port: u16,
}
