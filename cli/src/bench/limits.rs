//! Sizes, times and counts of a measurement.

use std::time::Duration;

/// An Ethernet frame of 1,500 bytes of IP.
pub(crate) const SIZE: u32 = 1514;
/// How long an interval is at least, if there are enough of them; and how many there are at least.
pub(crate) const INTERVAL: Duration = Duration::from_millis(100);
pub(crate) const INTERVALS: u32 = 5;
/// Rounds of spinning before the processor is offered to others.
pub(crate) const SPINS: u32 = 128;
/// For how long both ends are given to see each other: a bridge's port may take its time.
pub(crate) const CONTACT_TIMEOUT: Duration = Duration::from_secs(5);
pub(crate) const CONTACT_PAUSE: Duration = Duration::from_millis(10);
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// One body in so many is written and compared; of the others the header, the number and its guard.
/// With all bodies of 1,514 bytes, a packet on the embedded network takes 201 ns instead of 132.
pub(crate) const SAMPLE: u64 = 16;
/// Until caches and branch predictors know the way.
pub(crate) const WARM_UP: Duration = Duration::from_millis(50);
/// Packets that have not arrived by then are taken for lost, so that others may be sent. On a busy
/// machine a thread may well wait for its processor a while.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// The longest sleep between two looks at the clock.
pub(crate) const NAP: Duration = Duration::from_millis(10);
/// Turns between them while packets move: looking costs as much as a packet.
pub(crate) const TURNS: u32 = 16;
/// Trips before those that count.
pub(crate) const WARM_UP_TRIPS: u32 = 200;
/// Between two looks at the wish to end.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// Packets under way in all: enough that neither side waits for the other, and below what the kernel
/// keeps for a TAP (1,000).
pub(crate) fn window(batch: usize) -> usize {
    (4 * batch).clamp(64, 512)
}
