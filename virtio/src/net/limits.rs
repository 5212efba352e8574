//! Sizes and bounds of a device.

use vmring::IdlePolicy;

use crate::net::header::HEADER_LEN;

/// How many reads and how many writes of a pair may be in its rings, by default.
pub(super) const DEPTH: u32 = 256;
/// The largest depth that can be asked for.
pub(super) const DEPTH_MAX: u32 = 32768;
/// The most pairs of queues: VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX is larger, but vhost-user names a queue
/// by eight bits.
pub(super) const PAIRS_MAX: u16 = 128;
/// The frames of a ring that writes: for packets of very many segments, and for the device's own.
pub(super) const COPY_FRAMES: usize = 16;
/// The most segments of one buffer in a ring.
pub(super) const SEGMENTS_MAX: usize = 256;
/// The smallest mergeable buffers of the drivers that are known: Linux's have space for a header of 12
/// bytes and a frame of 1,518, rounded up to a line of memory.
pub(super) const MERGEABLE_BUFFER: u32 = 1536;
/// How many chains a poll takes from each queue by default. With more, the buffers for receiving of
/// another guest of the same thread or processor are used up before it has its turn.
pub(super) const BUDGET: u16 = 32;
/// How a thread waits before it sleeps, by default.
pub(super) const IDLE: IdlePolicy = IdlePolicy { spins: 0, yields: 16 };
/// How many packets are dropped at most that wait for a driver that is gone. The embedded network keeps
/// fewer; others go on arriving while they are dropped.
pub(super) const DISCARD_MAX: u32 = 4096;
/// How often a ring is driven to let posted reads come back, before the caller is asked to wait.
pub(super) const DRAIN_ROUNDS: u32 = 16;

/// The segments of a table for a ring of this depth: four for each entry, and enough for the longest
/// chain.
pub(super) fn segments(depth: u32) -> u32 {
    (depth.min(DEPTH_MAX) * 4).max(SEGMENTS_MAX as u32)
}

/// How many bytes of a buffer a packet of this length can fill.
pub(super) fn bytes_for(max_packet_size: u32) -> u32 {
    max_packet_size.saturating_add(HEADER_LEN)
}
