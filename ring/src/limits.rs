//! The limits of a ring and the numbers that tune it.

/// The largest sum of credits that a ring may have: 262,144. A class may then have a quarter of it,
/// 65,536, which is twice the largest virtqueue. The queues of such a ring take about 16 MB.
pub const DEPTH_MAX: u32 = 1 << 18;

/// Entries that are published together in a run of entries: two cache lines. The other side begins
/// with the first entries while the rest are still being written.
pub(crate) const PUBLISH_BATCH: u32 = 4;
/// Entries that are published together while at least [`BUSY_IN_FLIGHT`] are in flight: eight cache
/// lines. The other side has enough to do. It takes entries in the pieces in which they are
/// published, and each piece costs both sides cache-line transfers, so fewer and larger pieces cost
/// less.
pub(crate) const PUBLISH_BATCH_BUSY: u32 = 16;
/// With at least this many entries in flight, the ring is busy and [`PUBLISH_BATCH_BUSY`] applies.
/// With fewer in flight, pieces of that size would leave the other side without work.
pub(crate) const BUSY_IN_FLIGHT: u32 = 32;
/// Packets that are shown to a device together: as many as the entries that are prefetched together.
pub(crate) const RUN_MAX: usize = PREFETCH_ENTRIES as usize;
/// Entries whose cache lines are prefetched together: sixteen lines, which is about as many
/// transfers as a core can have in progress.
pub(crate) const PREFETCH_ENTRIES: u32 = 32;
