//! Limits and timeouts of the TAP driver.

use std::time::Duration;

/// The longest IP packet, in bytes. A TAP with segmentation offload has packets of up to this
/// length.
pub(super) const IP_MAX: u32 = 65_535;
/// The largest number of queues that the kernel gives a TAP (`MAX_TAP_QUEUES`).
pub(super) const QUEUES_MAX: usize = 256;

/// The largest number of reads that the kernel holds at a time for a queue on a poller's thread;
/// further reads stay with the poller. A power of two.
pub(super) const URING_READS: u16 = 1024;
/// The largest number of writes that the kernel holds at a time, and so that one poll submits.
pub(super) const URING_WRITES: u16 = 256;
/// The number of entries of io_uring's completion queue: one for each read and write that the
/// kernel holds, and some for cancels.
pub(super) const URING_COMPLETIONS: u32 = 2048;

/// The largest number of `read(2)` or `write(2)` calls that follow each other with nothing between them.
/// The places of such a run take 512 bytes.
pub(super) const RUN_MAX: usize = 32;

/// The largest number of segments of a guest's packet that the kernel sends by one call: 64 KiB in
/// pages of 4 KiB, a header, and two pages that are not full. A packet with more goes through a frame.
pub(super) const WRITE_SEGMENTS_MAX: usize = 20;
/// The largest number of segments that the kernel fills with one packet. It takes up to 1,024
/// (`UIO_MAXIOV`), and a guest's buffer has no more than 256.
pub(super) const READ_SEGMENTS_MAX: usize = 256;

/// The most reads that one packet fills: as many as a poll takes.
pub(super) const MERGING_READS_MAX: usize = URING_WRITES as usize;
/// How long a packet waits for more reads while some are posted. A Linux guest that has had no memory
/// for buffers tries again after half a second.
pub(super) const SHORT_PATIENCE: Duration = Duration::from_secs(1);

/// How long an opener waits for a TAP that another process may be about to release.
pub(super) const OPEN_PATIENCE: Duration = Duration::from_millis(500);
/// How long the kernel may take to answer a netlink request. It normally answers within the request
/// itself; the timeout is for a kernel that does not.
pub(super) const NETLINK_TIMEOUT: Duration = Duration::from_secs(5);
/// The size of the largest netlink datagram, in bytes: more than the 32 KiB that the kernel puts
/// into one datagram of a list.
pub(super) const NETLINK_DATAGRAM_MAX: usize = 64 * 1024;

/// How long a start sets again what another program changes on the TAP.
pub(super) const SETTLE_PATIENCE: Duration = Duration::from_millis(500);
/// How often the MAC address of a descriptor's TAP is compared, while it changes.
pub(super) const MAC_LOOKS_MAX: u32 = 10;
/// The longest prefix of a route that counts as a default route. Tunnels split it in halves
/// (`0.0.0.0/1` and `128.0.0.0/1`). The largest private network has 8 bits.
pub(super) const DEFAULT_ROUTE_PREFIX_MAX: u8 = 7;
/// How long a process waits for another one that starts or stops a network, which takes milliseconds.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// The largest number of messages in one transaction of nf_tables: the rules of a network, its chains
/// and its table.
pub(super) const NFT_MESSAGES_MAX: u32 = 32;

/// The size of the largest DHCP request, in bytes: one Ethernet frame.
pub(super) const DHCP_REQUEST_MAX: usize = 1514;
