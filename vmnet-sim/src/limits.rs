//! Limits of vmnet and of the simulated network.

/// `max_packet_size` with TSO.
pub(crate) const TSO_MAX: u64 = 65_550;
/// Bytes of a virtio header.
pub(crate) const HEADER: usize = 12;
/// Packets per call on a macOS that has no keys for this limit.
pub(crate) const BATCH: usize = 200;
/// Buffers lent to the network. What they receive is collected at every flush.
pub(crate) const LENT: usize = 64;
/// Packets sent between two flushes.
pub(crate) const FLUSH: usize = 16;
