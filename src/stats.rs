//! Counters of a ring.
//!
//! The poller adds to them once per device call and not per packet; an entry that fails is counted
//! at once. It uses plain stores to a cache line of its own. Any thread may read the counters at
//! any time, without a lock.

// Not through the door of `crate::sync`: counters hand over no data, and loom would explore each.
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

use crate::error::Status;

/// The number of buckets of a [`Histogram`].
pub const BATCH_BUCKETS: usize = 12;

/// A histogram of batch sizes. Bucket `i` counts the batches of 2^i to 2^(i+1) - 1 packets. The
/// last bucket also counts all larger batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram(pub [u64; BATCH_BUCKETS]);

impl Histogram {
    /// Returns how many batches were counted.
    pub fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Returns the smallest batch size of the bucket that contains the median batch, or 0 if no
    /// batch was counted.
    pub fn median(&self) -> u64 {
        let half = self.count().div_ceil(2);
        let mut seen = 0;
        for (i, n) in self.0.iter().enumerate() {
            seen += n;
            if seen >= half && half > 0 {
                return 1 << i;
            }
        }
        0
    }
}

/// How many entries the device refused, by status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals([u64; REASONS]);

/// The number of counts in [`Refusals`]: one for each of the codes 1001 to 1010, one for all other
/// codes, and one for all errors of the operating system.
pub(crate) const REASONS: usize = 12;

/// Returns the index of the count of a status.
pub(crate) fn reason_index(status: Status) -> usize {
    const UNKNOWN: usize = REASONS - 2;
    let Some(code) = status.code() else { return REASONS - 1 };
    code.checked_sub(1001).map_or(UNKNOWN, |i| (i as usize).min(UNKNOWN))
}

impl Refusals {
    /// Returns how many entries were refused with `status`. All [`Status::Unknown`] codes share one
    /// count, and so do all errors of the operating system ([`Status::Os`]).
    pub fn of(&self, status: Status) -> u64 {
        self.0[reason_index(status)]
    }

    /// Returns how many entries were refused.
    pub fn sum(&self) -> u64 {
        self.0.iter().sum()
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// A snapshot of what a ring has counted since it was built. Each number is exact, but the
        /// numbers may be of slightly different moments. So a part can be greater than its whole, and
        /// differences are taken with `saturating_sub`.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct RingStats {
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// The `errors`, by status.
            pub errors_by_status: Refusals,
            /// How many packets the device calls read. Calls that read none are not counted.
            pub read_batches: Histogram,
            /// How many packets the device calls wrote. Calls that wrote none are not counted.
            pub write_batches: Histogram,
        }

        /// The counters that a ring's engine adds to.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)+
            pub(crate) errors_by_status: [Counter; REASONS],
            pub(crate) read_batches: [Counter; BATCH_BUCKETS],
            pub(crate) write_batches: [Counter; BATCH_BUCKETS],
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> RingStats {
                let histogram = |counters: &[Counter; BATCH_BUCKETS]| {
                    Histogram(std::array::from_fn(|i| counters[i].get()))
                };
                RingStats {
                    // The engine adds to a part after it has added to the whole, and the parts are read
                    // first. Without a lock that is likely, and not certain.
                    errors_by_status: Refusals(std::array::from_fn(|i| {
                        self.errors_by_status[i].get()
                    })),
                    $($name: self.$name.get(),)+
                    read_batches: histogram(&self.read_batches),
                    write_batches: histogram(&self.write_batches),
                }
            }
        }
    };
}

counters! {
    /// Packets that were read: received from the device.
    rx_packets,
    /// Bytes that were read.
    rx_bytes,
    /// Packets that were written: sent by the device.
    tx_packets,
    /// Bytes that were written.
    tx_bytes,
    /// Entries that completed as cancelled.
    cancelled,
    /// Those among the `errors` that were posted when the device failed for good. It has refused none of
    /// them by itself.
    errors_at_failure,
    /// Entries that the device refused. Writes that count as `exhausted` are not included.
    errors,
    /// Writes that completed with `BufferExhausted` because the retry budget was used up.
    exhausted,
    /// Entries that the device dropped, or kept when it panicked.
    abandoned,
    /// Reads into the memory of a guest that went through a frame, because the device does not fill
    /// such memory itself. With mergeable reads also those of a packet for which too few were posted.
    bounced_reads,
    /// Writes from the memory of a guest that went through a frame, because the device does not send
    /// such memory itself.
    bounced_writes,
    /// How often the device took fewer writes than it was offered.
    retries,
    /// How often the engine saw a wake-up from the device (a callback or a descriptor).
    device_wakeups,
    /// How often the ring's engine went to sleep because it had no work.
    parks,
    /// How often the poller had to wake the reaping side.
    notifications,
    /// How often the ring got a new queue because its device was restarted.
    restarts,
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the one writer may call this.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        if n > 0 {
            // There is one writer, so no read-modify-write is needed. Relaxed: nothing else depends
            // on the number.
            self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Adds a batch of `n` packets to a histogram. A batch of 0 does not count.
pub(crate) fn add_batch(histogram: &[Counter; BATCH_BUCKETS], n: u32) {
    if n > 0 {
        histogram[(n.ilog2() as usize).min(BATCH_BUCKETS - 1)].add(1);
    }
}

/// The counters of one ring. Those of the poller and that of the submitter are on different cache
/// lines.
#[derive(Debug, Default)]
pub(crate) struct RingCounters {
    pub(crate) poller: CachePadded<Counters>,
    /// How often the submitting side had to wake the engine. The submitting side writes it.
    pub(crate) doorbells: CachePadded<Counter>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_status_has_a_count_of_its_own_and_unknown_ones_share_one() {
        let status = |code| Status::from_code(code).expect("no success");
        let known: Vec<usize> = (1001..=1010).map(|code| reason_index(status(code))).collect();
        assert_eq!(known, (0..10).collect::<Vec<_>>());
        assert!([0, 999, 1011, u32::MAX].iter().all(|code| reason_index(status(*code)) == 10));
        assert!([1, 5, i32::MAX].iter().all(|errno| reason_index(Status::Os(*errno)) == 11));
    }

    #[test]
    fn batches_fall_into_power_of_two_buckets() {
        let counters = Counters::default();
        for n in [0, 1, 2, 3, 4, 200, 1 << 20] {
            add_batch(&counters.read_batches, n);
        }
        let histogram = counters.snapshot().read_batches;
        assert_eq!(histogram.count(), 6);
        assert_eq!((histogram.0[0], histogram.0[1], histogram.0[2]), (1, 2, 1));
        assert_eq!((histogram.0[7], histogram.0[BATCH_BUCKETS - 1]), (1, 1));
        assert_eq!(histogram.median(), 2);
        assert_eq!(Histogram::default().median(), 0);
    }
}
