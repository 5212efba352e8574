//! The numbers by which the rings are tuned and bounded.

/// The largest sum of credits a ring may have: 262,144, so that each class may have a quarter of it,
/// 65,536, twice the largest virtqueue. The queues of such a ring take some 16 MB.
pub const DEPTH_MAX: u32 = 1 << 18;

/// Entries that are published together in a run of them: two lines. So the other side begins with the
/// first while the others are still being written.
pub(crate) const PUBLISH_BATCH: u32 = 4;
/// The same while many are on their way: the other side has enough to do, and what is published in
/// smaller pieces it takes in smaller pieces, each of which costs both sides transfers of lines.
pub(crate) const PUBLISH_BATCH_BUSY: u32 = 16;
/// So many: with fewer, pieces of that size would leave the other side without work.
pub(crate) const BUSY_IN_FLIGHT: u32 = 32;
/// Entries whose lines are asked for together: sixteen lines, about as many transfers as a core can
/// have under way.
pub(crate) const PREFETCH_ENTRIES: u32 = 32;
