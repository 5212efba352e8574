//! What a measurement is asked for.

use std::time::Duration;

use super::limits::{INTERVAL, INTERVALS};
use vmring::device::Offloads;
use vmring::{Checksum, ETHERNET_HEADER_LEN, Gso, OffloadHeader};

use super::check::{LARGE_HEADERS, Pattern};
use crate::device::DeviceName;
use crate::nat::NatArgs;

/// What a measurement is asked for.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) device: DeviceName,
    pub(crate) size: usize,
    /// Whether packets leave their checksum to the device, and their segments if they are longer than a
    /// frame.
    pub(crate) offload: bool,
    pub(crate) batch: usize,
    /// The way out of an embedded network, if there are options of it.
    pub(crate) nat: NatArgs,
    /// The time for each thing that is measured.
    pub(crate) time: Duration,
    /// How long each row of two threads may take to be measured in both places of the processors. If there
    /// is no such time, the places that are seen meanwhile are enough.
    pub(crate) both: Option<Duration>,
    /// The processor of a poller thread. Otherwise it may run on any.
    pub(crate) cpu: Option<usize>,
}

/// The offloads that an interface is asked for, with `--offload` or without.
pub(crate) fn offloads(offload: bool) -> Offloads {
    let mut offloads = Offloads::default();
    (offloads.checksum, offloads.tso4) = (offload, offload);
    offloads
}

/// The header of a packet of TCP of `size` bytes, on a network with this MTU.
pub(crate) fn header_of_tcp(size: usize, mtu: usize) -> OffloadHeader {
    let longest = mtu + ETHERNET_HEADER_LEN;
    let is_large = size > longest;
    OffloadHeader {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: if is_large { Gso::TcpV4 } else { Gso::None },
        segment_size: if is_large { (longest - LARGE_HEADERS) as u16 } else { 0 },
        header_len: LARGE_HEADERS as u16,
        ..OffloadHeader::NONE
    }
}

impl Setup {
    /// The pattern of the packets from one address to another. The body of one in `every` is compared.
    pub(crate) fn pattern(&self, from: [u8; 6], to: [u8; 6], every: u64) -> Pattern {
        let pattern = Pattern::new(from, to, every);
        if self.offload { pattern.of_tcp(self.size) } else { pattern }
    }

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
    use crate::bench::faulty;

    #[test]
    fn a_short_time_has_enough_intervals() {
        let intervals = |millis| {
            let time = Duration::from_millis(millis);
            Setup { time, ..faulty::setup() }.intervals()
        };
        assert_eq!(intervals(1000), (10, Duration::from_millis(100)));
        assert_eq!(intervals(200), (5, Duration::from_millis(40)));
    }
}
