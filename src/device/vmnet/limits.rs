//! Limits and timeouts of the vmnet driver.

use std::time::Duration;

/// The default interval at which the poller reads from an idle interface although no event came.
pub(crate) const SAFETY_POLL: Duration = Duration::from_millis(200);
/// How long a start waits for vmnet's answer by default.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stop waits for each of vmnet's answers by default.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a start waits for the handler after the call has returned null. Null says only that the
/// start failed; the handler, if it runs, says why.
pub(crate) const FAILED_START_GRACE: Duration = Duration::from_millis(500);
/// How long a call that adds, removes or lists port forwardings waits for vmnet's answer.
pub(crate) const FORWARDING_TIMEOUT: Duration = Duration::from_secs(5);

/// The most packets per call if vmnet does not report a limit, which it does from macOS 15 on. The
/// number is from Apple's documentation.
pub(crate) const PACKETS_PER_CALL: u32 = 200;
/// The most packets per call, even if vmnet reports more. It bounds the memory for descriptors.
pub(crate) const PACKETS_PER_CALL_MAX: u64 = 1024;
/// The least number of reads that a call offers, if as many are posted. Each offered descriptor
/// must be reset before the call, so the number follows the traffic: it is twice the last batch.
pub(crate) const READS_OFFERED_MIN: usize = 32;
/// The largest frame in bytes that the driver accepts as vmnet's maximum: an IP packet of 64 KiB,
/// the Ethernet header, and a reserve for headers that future systems may add.
pub(crate) const PACKET_MAX: u64 = 128 * 1024;
