//! Packet buffers. Every contender fills and empties the same number of them in turn, like a
//! program that passes its packets on. A single hot buffer would flatter contenders that can work
//! with one.

/// The number of buffers.
pub(crate) const SLOTS: usize = 256;
/// The length of each buffer.
pub(crate) const SLOT_SIZE: usize = 2048;
/// How many packets a contender with batches takes at once.
pub(crate) const BATCH: usize = 64;

/// One packet buffer.
#[repr(C, align(2048))]
#[derive(Clone, Copy)]
pub(crate) struct Slot(pub(crate) [u8; SLOT_SIZE]);

/// A fresh set of buffers that all begin with `frame`.
pub(crate) fn filled(frame: &[u8]) -> Vec<Slot> {
    let mut slot = Slot([0; SLOT_SIZE]);
    slot.0[..frame.len()].copy_from_slice(frame);
    vec![slot; SLOTS]
}
