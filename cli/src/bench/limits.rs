//! Sizes, times and counts of a measurement.

use std::time::Duration;

/// An Ethernet frame of 1,500 bytes of IP.
pub(crate) const SIZE: u32 = 1514;
/// The shortest interval, if there are enough of them; and the least number of intervals.
pub(crate) const INTERVAL: Duration = Duration::from_millis(100);
pub(crate) const INTERVALS: u32 = 5;
/// Rounds of spinning before the thread yields its processor.
pub(crate) const SPINS: u32 = 128;
/// How long both endpoints may take to see each other. A port of a bridge may take a while.
pub(crate) const CONTACT_TIMEOUT: Duration = Duration::from_secs(5);
pub(crate) const CONTACT_PAUSE: Duration = Duration::from_millis(10);
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The body of one packet in this many is written and compared. Of the others only the header, the
/// number and its guard are. With all bodies of 1,514 bytes, a packet on the embedded network takes
/// 201 ns instead of 132.
pub(crate) const SAMPLE: u64 = 16;
/// How long it takes until caches and branch predictors are warm.
pub(crate) const WARM_UP: Duration = Duration::from_millis(50);
/// Packets that have not arrived after this time count as lost, so that others may be sent. On a
/// busy machine a thread may well wait for its processor for a while.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// How long nothing arrives on a device that may lose packets until what is missing counts as lost.
pub(crate) const QUIET: Duration = Duration::from_millis(50);
/// How long the round trip of a cache line is measured in one look at the processors.
pub(crate) const LOOK: Duration = Duration::from_millis(2);
/// The time between two looks while the other place is waited for.
pub(crate) const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// The longest sleep between two looks at the clock.
pub(crate) const NAP: Duration = Duration::from_millis(10);
/// Turns between two looks at the clock while packets move. A look costs as much as a packet.
pub(crate) const TURNS: u32 = 16;
/// Trips before those that count.
pub(crate) const WARM_UP_TRIPS: u32 = 200;

/// Packets in flight in all: enough that neither side waits for the other, and fewer than the
/// kernel queues for a TAP (1,000).
pub(crate) fn window(batch: usize) -> usize {
    (4 * batch).clamp(64, 512)
}
