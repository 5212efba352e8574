//! A ring and its four halves: the caller has [`SqProducer`] and [`CqConsumer`], the poller has
//! [`SqConsumer`] and [`CqProducer`].
//!
//! Each half is `Send` and not `Sync`. All but the [`SqProducer`] work through `&mut self`. The
//! [`SqProducer`] works through `&self`, because two places of its thread use it: the code that
//! submits, and the end of a loop in which something was submitted.

use crate::cq::{CqConsumer, CqProducer};
use crate::credits::credits;
use crate::limits::DEPTH_MAX;
use crate::queue::queue;
use crate::regions::Regions;
use crate::sq::{SqConsumer, SqProducer};

/// The size of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    /// Reads that may be in flight.
    pub read: u32,
    /// Writes that may be in flight.
    pub write: u32,
    /// Cancel requests that may be in flight.
    pub cancel: u32,
    /// Entries of the SQ, a power of two. If it is smaller than the sum of the others, which is
    /// allowed, a submit can find the SQ full.
    pub sq: u32,
}

impl Depths {
    /// A ring whose SQ has space for every credit.
    pub fn new(read: u32, write: u32, cancel: u32) -> Self {
        let sum = read.saturating_add(write).saturating_add(cancel).min(DEPTH_MAX);
        Self { read, write, cancel, sq: sum.next_power_of_two() }
    }

    /// The number of entries of the CQ: at least one for every credit.
    fn cq(&self) -> u32 {
        let sum = u64::from(self.read) + u64::from(self.write) + u64::from(self.cancel);
        assert!(sum <= u64::from(DEPTH_MAX), "a ring of more than {DEPTH_MAX} credits");
        (sum as u32).next_power_of_two()
    }
}

/// Makes a ring with `depths` over `regions` and returns its four halves. Indices begin at `start`:
/// 0, or any other number to exercise the wrap.
///
/// # Panics
///
/// If the SQ's size is not a power of two, or the sum of the credits is above [`DEPTH_MAX`].
pub fn rings(
    depths: Depths,
    regions: Regions,
    start: u32,
) -> (SqProducer, CqConsumer, SqConsumer, CqProducer) {
    let (sq_in, sq_out) = queue(depths.sq, regions.clone(), start);
    let (cq_in, cq_out) = queue(depths.cq(), regions, start);
    let (taker, returner, skips) = credits([depths.read, depths.write, depths.cancel]);
    let submitted = sq_in.watch();
    (
        SqProducer::new(sq_in, taker),
        CqConsumer::new(cq_out, returner, submitted),
        SqConsumer::new(sq_out),
        CqProducer::new(cq_in, skips),
    )
}
