//! Timeouts and pauses of a bridge.

use std::time::Duration;

/// How long packets that were read are given to be written when the bridge ends.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two looks at the counters, when somebody watches.
pub(crate) const TICK: Duration = Duration::from_secs(1);
/// Of an interface to stop.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(10);
