//! What a wire counts.

use super::framing::Unfit;
use crate::sync::{AtomicU64, Ordering};

/// The counters of one wire. Its queues share them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Peers that were connected, or learned.
    pub(super) peers: AtomicU64,
    /// Peers that have gone.
    pub(super) ended: AtomicU64,
    /// Peers that went within a payload.
    pub(super) ended_within: AtomicU64,
    /// Peers whose connection was ended because of a length above the maximum.
    pub(super) above_maximum: AtomicU64,
    /// Connections that could not be accepted or made.
    pub(super) failed: AtomicU64,
    /// Payloads of which the system took a part, so that the rest was kept.
    pub(super) partial: AtomicU64,
    runt: AtomicU64,
    too_big: AtomicU64,
    /// Payloads whose virtio header is wrong, or asks for work that was not negotiated.
    pub(super) bad_header: AtomicU64,
    /// Writes while there was no peer.
    pub(super) no_peer: AtomicU64,
    /// Messages from a socket without a name.
    pub(super) unnamed: AtomicU64,
    /// Messages from another sender than the peer.
    pub(super) stranger: AtomicU64,
}

impl Counters {
    pub(super) fn count_unfit(&self, unfit: Unfit) {
        add_one(match unfit {
            Unfit::Runt => &self.runt,
            Unfit::TooBig => &self.too_big,
        });
    }

    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("peers", get(&self.peers)),
            ("peers gone", get(&self.ended)),
            ("peers gone within a packet", get(&self.ended_within)),
            ("connections ended by a length above the maximum", get(&self.above_maximum)),
            ("connections failed", get(&self.failed)),
            ("partial writes", get(&self.partial)),
        ]
    }

    pub(super) fn drops(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("runt", get(&self.runt)),
            ("too big", get(&self.too_big)),
            ("bad offload header", get(&self.bad_header)),
            ("no peer", get(&self.no_peer)),
            ("sender without a name", get(&self.unnamed)),
            ("other sender", get(&self.stranger)),
        ]
    }
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

pub(super) fn add_one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
