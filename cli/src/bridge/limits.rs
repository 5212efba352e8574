//! Timeouts and intervals of a bridge.

use std::time::Duration;

/// How long the bridge, when it ends, waits for packets that were read to be written.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval between two looks at the counters, if somebody watches.
pub(crate) const TICK: Duration = Duration::from_secs(1);
/// How long an interface may take to stop.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(10);
