//! Limits and timeouts of the vmnet driver.

use std::time::Duration;

/// How often the poller looks at an idle interface although no event came, unless asked otherwise.
pub(crate) const SAFETY_POLL: Duration = Duration::from_millis(200);
/// How long a start waits for vmnet unless asked otherwise.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stop waits for vmnet unless asked otherwise.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a start waits for the handler after the call has answered null, which says only that the
/// start failed.
pub(crate) const FAILED_START_GRACE: Duration = Duration::from_millis(500);
/// How long a change of a port forwarding waits for vmnet's answer.
pub(crate) const FORWARDING_TIMEOUT: Duration = Duration::from_secs(5);

/// Packets per call where vmnet does not say (Apple's documentation).
pub(crate) const PACKETS_PER_CALL: u32 = 200;
/// The most packets per call, whatever vmnet says.
pub(crate) const PACKETS_PER_CALL_MAX: u64 = 1024;
/// Reads that a call offers at least, if as many are posted. Each offered descriptor must be reset,
/// so the number follows the traffic: twice the last batch.
pub(crate) const READS_OFFERED_MIN: usize = 32;
/// The largest frame in bytes: an IP packet of 64 KiB, Ethernet, and a reserve for headers that we do
/// not know of.
pub(crate) const PACKET_MAX: u64 = 128 * 1024;
