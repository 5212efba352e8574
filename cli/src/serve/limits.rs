//! Limits, intervals and timeouts of the server.

use std::time::Duration;

use vmring::device::embedded::QUEUES_MAX;

/// The mappings that a connection may have at once: twice the 509 regions that it may share, because
/// a new table is mapped before the old one goes, and its dirty logs.
pub(crate) const MAPPINGS_PER_CONNECTION: usize = 1024;

/// How long a socket rests after it has failed, or after the front end that it connects to has gone or
/// was not there.
pub(crate) const RETRY: Duration = Duration::from_millis(500);
/// The interval between two looks at the counters, if somebody watches.
pub(crate) const TICK: Duration = Duration::from_secs(1);
/// How long the connections, when the server ends, may take to end.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an interface may take to stop.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// The most connections at once, if nothing else is said.
pub(crate) const CONNECTIONS: u32 = 64;
/// The most that can be asked for: a network has 1,024 ports, and one is the server's own.
pub(crate) const CONNECTIONS_MAX: u32 = 1023;
/// The most pairs of queues of a guest: as many as a port of a network has.
pub(crate) const PAIRS_MAX: u16 = QUEUES_MAX as u16;
/// The most over vhost-user, whose mappings have a table each.
pub(crate) const SEATS_MAX: u32 = 512;
/// Packets that may be on their way between a wire and its port: those from the wire, and those from the
/// port. A turn of a wire brings at most half of what a port has posted. So what two guests send each other
/// finds posted reads, though the port posts again only after the sender's next turn.
pub(crate) const LINK_READS: [u32; 2] = [64, 128];
/// The same, if more guests than [`FEW_CONNECTIONS`] may be connected. Their frames stay resident once they
/// were used, and an idle guest is to take less than 1 MiB.
pub(crate) const LINK_READS_OF_MANY: [u32; 2] = [32, 64];
pub(crate) const FEW_CONNECTIONS: u32 = 256;
/// The same, if each of them may be 64 KiB long.
pub(crate) const LINK_READS_OF_LARGE: [u32; 2] = [16, 64];
/// The least and the most packets that can wait in a guest's port while it posts no buffers.
pub(crate) const WAITING_MIN: u32 = 128;
pub(crate) const WAITING_MAX: u32 = 2048;
/// The bytes of all packets that can wait in ports, unless each port has the least.
pub(crate) const WAITING_BYTES: u64 = 192 << 20;
/// Open files of the server itself, of a guest on a wire, and of a guest over vhost-user with one pair of
/// queues. Those of each further pair come to the last.
pub(crate) const FILES: u32 = 128;
pub(crate) const FILES_PER_WIRE: u32 = 12;
pub(crate) const FILES_PER_DEVICE: u32 = 64;
pub(crate) const FILES_PER_PAIR: u32 = 8;
/// How many requests of other threads may wait for the main thread.
pub(crate) const REQUESTS: usize = 8;
/// How many guests a table on a terminal shows.
pub(crate) const LIVE_ROWS: usize = 12;
/// How many of the last ends of connections a report shows for each socket.
pub(crate) const LAST_ENDS: usize = 8;
