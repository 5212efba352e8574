//! Limits and timeouts of the TAP driver.

use std::time::Duration;

/// The longest IP packet, and with it the longest packet of a TAP with segmentation offload.
pub(super) const IP_MAX: u32 = 65_535;
/// The most queues that the kernel gives a TAP (`MAX_TAP_QUEUES`).
pub(super) const QUEUES_MAX: usize = 256;

/// Reads that the kernel has at a time on a poller's thread; more stay with the poller. A power of
/// two.
pub(super) const URING_READS: u16 = 1024;
/// Writes that one poll hands to the kernel.
pub(super) const URING_WRITES: u16 = 256;
/// Entries of the kernel's completion queue: one for each read and write that the kernel has, and
/// some for cancels.
pub(super) const URING_COMPLETIONS: u32 = 2048;

/// How long an opener waits for a TAP that another process is about to release.
pub(super) const OPEN_PATIENCE: Duration = Duration::from_millis(500);
/// How long the kernel may take to answer a netlink request. It answers during the request, so this
/// is for kernels that do not.
pub(super) const NETLINK_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of the largest netlink datagram: more than the kernel puts in one datagram of a list
/// (32 KiB).
pub(super) const NETLINK_DATAGRAM_MAX: usize = 64 * 1024;

/// How long a DHCP lease lasts unless asked otherwise.
pub(super) const LEASE_TIME: Duration = Duration::from_secs(86_400);
/// Bytes of the largest DHCP reply (`DhcpServer::handle`), rounded up.
pub(super) const DHCP_REPLY_MAX: usize = 512;
/// Bytes of the largest DHCP request: one Ethernet frame.
pub(super) const DHCP_REQUEST_MAX: usize = 1514;
