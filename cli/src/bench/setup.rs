//! What a measurement is asked for.

use std::time::Duration;

use super::limits::{INTERVAL, INTERVALS};
use crate::device::DeviceName;

/// What a measurement is asked for.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) device: DeviceName,
    pub(crate) size: usize,
    pub(crate) batch: usize,
    /// The time for each thing that is measured.
    pub(crate) time: Duration,
}

impl Setup {
    /// The number of intervals, and their length.
    pub(crate) fn intervals(&self) -> (u32, Duration) {
        let n = (self.time.as_millis() / INTERVAL.as_millis()) as u32;
        let n = n.max(INTERVALS);
        (n, self.time / n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_time_has_enough_intervals() {
        let intervals = |millis| {
            let time = Duration::from_millis(millis);
            Setup { device: DeviceName::Embedded, size: 60, batch: 1, time }.intervals()
        };
        assert_eq!(intervals(1000), (10, Duration::from_millis(100)));
        assert_eq!(intervals(200), (5, Duration::from_millis(40)));
    }
}
