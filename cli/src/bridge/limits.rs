//! Timeouts and intervals of a bridge.

use std::time::Duration;

use vmring::RetryPolicy;

/// How long the bridge, when it ends, waits for packets that were read to be written.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval between two looks at the counters, if somebody watches.
pub(crate) const TICK: Duration = Duration::from_secs(1);
/// How long an interface may take to stop.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an end may take nothing before packets for it are dropped: 20 ms. The process behind a socket gets
/// a processor again by then on a busy machine, and meanwhile the other end holds back what it has. With
/// the default of 0.5 ms, a peer that waits for its processor loses all that is on its way to it.
pub(crate) const STALL: RetryPolicy =
    RetryPolicy { attempts: 100, delay: Duration::from_micros(200) };
