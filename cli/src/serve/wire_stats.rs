//! What a link between a wire and its port counts.

use std::collections::BTreeMap;

use vmring::{InterfaceMonitor, RingControl};

use crate::bridge::forwarding::Bridge;

/// The ends of the bridge that is a link.
pub(super) const WIRE: usize = 0;
pub(super) const PORT: usize = 1;

/// What a link counts, for any thread.
#[derive(Debug)]
pub(super) struct WireStats {
    /// By their ends.
    rings: [RingControl; 2],
    wire: InterfaceMonitor,
}

/// The names of the wire's drops, beside those of the device of a guest on vhost-user. Writes without a
/// peer fail, and so they are among `rx_errors` too.
const DROPS: [(&str, &str); 6] = [
    ("runt", "tx_short"),
    ("too big", "tx_too_big"),
    ("bad offload header", "tx_bad_header"),
    ("sender without a name", "tx_unnamed"),
    ("other sender", "tx_stranger"),
    ("no peer", "rx_no_peer"),
];

impl WireStats {
    pub(super) fn of(bridge: &Bridge) -> Self {
        let rings = [bridge.control(WIRE), bridge.control(PORT)];
        Self { rings, wire: bridge.monitor(WIRE) }
    }

    /// What it has counted, by name: `rx` is what the guest receives, and `tx` what it sends.
    pub(super) fn named(&self) -> BTreeMap<&'static str, u64> {
        let [wire, port] = self.rings.each_ref().map(RingControl::stats);
        let [wire_errors, port_errors] = self.rings.each_ref().map(errors);
        let rings = [
            ("rx_packets", wire.tx_packets),
            ("rx_bytes", wire.tx_bytes),
            ("rx_not_taken", wire.exhausted),
            ("rx_errors", wire_errors),
            ("tx_packets", port.tx_packets),
            ("tx_bytes", port.tx_bytes),
            ("tx_errors", port_errors + port.exhausted),
        ];
        let name = |why| DROPS.iter().find(|(is, _)| *is == why).map_or(why, |(_, name)| *name);
        let drops = self.wire.drops().into_iter().map(|(why, n)| (name(why), n));
        let counted = drops.chain(self.wire.counters()).filter(|(_, n)| *n > 0);
        rings.into_iter().chain(counted).collect()
    }
}

/// What a ring's device has refused. When the device fails for good, each read that was posted is refused
/// too, and was for no packet.
pub(super) fn errors(ring: &RingControl) -> u64 {
    let stats = ring.stats();
    // The numbers may be of different moments.
    stats.errors.saturating_sub(stats.errors_at_failure)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use vmring::{Interface, Socket};

    use super::*;
    use crate::serve::counts;

    /// Goal: each drop of a wire has a name here, and each name is among the drops that are shown. So a new
    /// drop of the library is noticed here.
    #[test]
    fn each_drop_of_a_wire_has_a_name_and_is_shown() {
        let (ours, _peer) = UnixDatagram::pair().expect("a pair of sockets");
        let wire = Interface::builder().device(Socket::datagram().from_fd(ours.into())).start();
        let drops = wire.expect("a wire").drops();
        let mut reasons: Vec<_> = drops.into_iter().map(|(why, _)| why).collect();
        let mut named = DROPS.map(|(why, _)| why);
        reasons.sort_unstable();
        named.sort_unstable();
        assert_eq!(reasons, named);
        for (_, name) in DROPS {
            // What has no peer is among `rx_errors`, and must not be there twice.
            assert_eq!(counts::DROPS.contains(&name), name != "rx_no_peer", "{name}");
        }
    }
}
