//! Limits: of vmnet, and of the simulated network.

/// `max_packet_size` with TSO.
pub(crate) const TSO_MAX: u64 = 65_550;
/// Bytes of a virtio header.
pub(crate) const HEADER: usize = 12;
/// Packets per call where the keys do not say.
pub(crate) const BATCH: usize = 200;
/// Buffers lent to the network; what they receive is collected at every flush.
pub(crate) const LENT: usize = 64;
/// Packets sent between two flushes.
pub(crate) const FLUSH: usize = 16;
