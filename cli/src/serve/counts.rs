//! What guests have counted.

use std::collections::BTreeMap;
use std::iter::Sum;

/// What guests have counted, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// The counters of the device.
    pub(super) device: BTreeMap<&'static str, u64>,
    /// Packets that the port of the network has dropped, by reason.
    pub(super) drops: BTreeMap<&'static str, u64>,
    /// What else the port has counted.
    pub(super) port: BTreeMap<&'static str, u64>,
}

/// The counters of a port, among those of its network.
pub(super) const OF_A_PORT: [&str; 4] =
    ["second copies", "checksums completed", "cut in software", "sent to the router"];

/// Datagrams from a sender that nobody can answer.
const UNNAMED: &str = "tx_unnamed";

/// The counters of packets that did not get where they were to go.
pub(super) const DROPS: [&str; 14] = [
    "rx_too_small",
    "rx_errors",
    "rx_malformed",
    "rx_discarded",
    "tx_short",
    "tx_bad_header",
    "tx_too_big",
    "tx_disabled",
    "tx_errors",
    // Those of wires alone.
    "rx_not_taken",
    "rx_undelivered",
    "tx_undelivered",
    UNNAMED,
    "tx_stranger",
];
#[cfg(test)]
const OF_DEVICES: usize = 9;
/// The port's reasons for packets that it does not take, so that they are among `tx_errors`. It takes every
/// other packet, also one that it drops.
const NOT_TAKEN: [&str; 3] = ["runt", "too big", "bad offload header"];

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        let Self { device, drops, port } = self;
        for (to, from) in [(device, &other.device), (drops, &other.drops), (port, &other.port)] {
            for (name, n) in from {
                *to.entry(name).or_default() += n;
            }
        }
    }

    /// Adds datagrams that came while there was no guest, from senders that nobody can answer.
    pub(super) fn add_unnamed(&mut self, n: u64) {
        if n > 0 {
            *self.device.entry(UNNAMED).or_default() += n;
        }
    }

    fn get(&self, name: &str) -> u64 {
        self.device.get(name).copied().unwrap_or(0)
    }

    pub(crate) fn moved(&self) -> Moved {
        let port = self.drops.iter().filter(|(why, _)| !NOT_TAKEN.contains(why));
        Moved {
            to: (self.get("rx_packets"), self.get("rx_bytes")),
            from: (self.get("tx_packets"), self.get("tx_bytes")),
            dropped: DROPS.iter().map(|name| self.get(name)).chain(port.map(|(_, n)| *n)).sum(),
        }
    }

    /// The drops that occurred, by their counter or reason.
    pub(crate) fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let device = DROPS.into_iter().map(|name| (name, self.get(name)));
        let port = self.drops.iter().map(|(why, n)| (*why, *n));
        device.chain(port).filter(|(_, n)| *n > 0)
    }
}

/// Packets and bytes to guests and from guests, and packets that were dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) to: (u64, u64),
    pub(crate) from: (u64, u64),
    pub(super) dropped: u64,
}

impl Sum for Moved {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self {
            to: (a.to.0 + b.to.0, a.to.1 + b.to.1),
            from: (a.from.0 + b.from.0, a.from.1 + b.from.1),
            dropped: a.dropped + b.dropped,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The counters of a device that count no packet that was lost. A broken chain holds no packet that
    /// anybody could know.
    const NO_DROPS: [&str; 19] = [
        "rx_packets",
        "rx_bytes",
        "tx_packets",
        "tx_bytes",
        "rx_useless",
        "rx_software",
        "rx_copied",
        "rx_no_buffer",
        "tx_copied",
        "broken_chains",
        "broken_queues",
        "interrupts",
        "kicks",
        "wakes",
        "kicks_lost",
        "commands",
        "commands_refused",
        "announcements",
        "announcements_failed",
    ];

    /// Goal: a counter of a device is a drop, or is known to be none. So a new one is noticed here.
    #[test]
    fn each_counter_of_a_device_is_a_drop_or_is_none() {
        let named = vmring_virtio::net::NetStats::default().named();
        let mut names: Vec<_> = named.into_iter().map(|(name, _)| name).collect();
        let mut known = [&DROPS[..OF_DEVICES], &NO_DROPS].concat();
        names.sort_unstable();
        known.sort_unstable();
        assert_eq!(names, known);
    }

    #[test]
    fn counts_add_up() {
        let counts = |device: &[_], drops: &[_]| Counts {
            device: device.iter().copied().collect(),
            drops: drops.iter().copied().collect(),
            port: BTreeMap::new(),
        };
        let mut all = counts(&[("rx_packets", 3), ("tx_short", 1)], &[("spoofed", 1)]);
        let other = [("rx_packets", 4), ("tx_bytes", 60), ("tx_errors", 2)];
        all.add(&counts(&other, &[("no buffer posted", 5), ("runt", 2), ("spoofed", 1)]));
        assert_eq!(all.moved(), Moved { to: (7, 0), from: (0, 60), dropped: 10 });
        let port = [("no buffer posted", 5), ("runt", 2), ("spoofed", 2)];
        let drops = [&[("tx_short", 1), ("tx_errors", 2)][..], &port].concat();
        assert_eq!(all.drops().collect::<Vec<_>>(), drops);
    }
}
