//! Counters. The poller writes them once per device call, not per packet (what fails, when it does),
//! with plain stores to a line of its own; anybody may read them at any time and never slows it.

use crossbeam_utils::CachePadded;
use vmring_core::sync::{AtomicU64, Ordering};

use crate::error::Status;

/// Number of buckets of [`Histogram`].
pub const BATCH_BUCKETS: usize = 12;

/// Batch sizes: bucket `i` counts the batches of 2^i to 2^(i+1) - 1 packets, the last one all above.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram(pub [u64; BATCH_BUCKETS]);

impl Histogram {
    /// Batches counted.
    pub fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The smallest batch size of the bucket in which the median batch lies; 0 if there is none.
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

/// Refused entries by the status they were refused with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals([u64; REASONS]);

/// One each for the codes 1001 to 1010, one for all other codes, one for errors of the system.
pub(crate) const REASONS: usize = 12;

/// The place of a status's count.
pub(crate) fn reason_index(status: Status) -> usize {
    const UNKNOWN: usize = REASONS - 2;
    let Some(code) = status.code() else { return REASONS - 1 };
    code.checked_sub(1001).map_or(UNKNOWN, |i| (i as usize).min(UNKNOWN))
}

impl Refusals {
    /// How many were refused with `status`. All [`Status::Unknown`] codes are counted together, and so
    /// are all errors of the system ([`Status::Os`]).
    pub fn of(&self, status: Status) -> u64 {
        self.0[reason_index(status)]
    }

    /// How many were refused.
    pub fn sum(&self) -> u64 {
        self.0.iter().sum()
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// A snapshot of a ring's counters since it was built. Each number is exact; together they
        /// may be of slightly different moments.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct RingStats {
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// The `errors` by their status.
            pub errors_by_status: Refusals,
            /// Packets read per device call that read any.
            pub read_batches: Histogram,
            /// Packets written per device call that wrote any.
            pub write_batches: Histogram,
        }

        /// The counters as the poller adds them up.
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
                    $($name: self.$name.get(),)+
                    errors_by_status: Refusals(std::array::from_fn(|i| {
                        self.errors_by_status[i].get()
                    })),
                    read_batches: histogram(&self.read_batches),
                    write_batches: histogram(&self.write_batches),
                }
            }
        }
    };
}

counters! {
    /// Packets read.
    rx_packets,
    /// Bytes read.
    rx_bytes,
    /// Packets written.
    tx_packets,
    /// Bytes written.
    tx_bytes,
    /// Entries completed as cancelled.
    cancelled,
    /// Entries the device refused, `BufferExhausted` not counted.
    errors,
    /// Writes given up after the retry budget, completed with `BufferExhausted`.
    exhausted,
    /// Entries the device let go of, or held when it panicked.
    abandoned,
    /// Times the device took fewer writes than it was offered and was tried again.
    retries,
    /// Times the device's own wake-up (callback or descriptor) was seen.
    device_wakeups,
    /// Times the poller gave up its processor for this ring's lack of work.
    parks,
    /// Times the poller had to wake the reaping side.
    notifications,
    /// Times the ring's device was started anew.
    restarts,
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the one writer may call it.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        if n > 0 {
            // One writer, so no read-modify-write is needed. Relaxed: a number, nothing hangs on it.
            self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Adds a batch of `n` packets to a histogram.
pub(crate) fn add_batch(histogram: &[Counter; BATCH_BUCKETS], n: u32) {
    if n > 0 {
        histogram[(n.ilog2() as usize).min(BATCH_BUCKETS - 1)].add(1);
    }
}

/// The counters of one ring: the poller's on a line apart from the submitter's.
#[derive(Debug, Default)]
pub(crate) struct RingCounters {
    pub(crate) poller: CachePadded<Counters>,
    /// Doorbells that cost a wake-up, written by the submitting side.
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
