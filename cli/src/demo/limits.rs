//! Sizes, times and counts of the demo.

use std::time::Duration;

/// Pings from each guest to each target.
pub(crate) const PINGS: u32 = 50;
/// Bytes that are transferred by default.
pub(crate) const BYTES: u64 = 1 << 30;
/// Bytes that a guest fetches from the host's side, at most.
pub(crate) const FETCH: u64 = 64 << 20;
/// How long a guest may take to get a lease. A DHCP client repeats a lost packet after ten seconds.
pub(crate) const LEASE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long all pings of a guest may take.
pub(crate) const PINGS_TIMEOUT: Duration = Duration::from_secs(5 * PINGS as u64 + 10);
/// A transfer that has made no progress for this long has failed.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_secs(30);
pub(crate) const TICK: Duration = Duration::from_millis(100);
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a guest that ends waits for its last packets to be sent.
pub(crate) const LAST_WRITES_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a ring may take to close.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Packets that the stack receives and sends before the other side of the ring is told. It is
/// enough to pay for a wake-up, and few enough that both guests work at the same time.
pub(crate) const BATCH: usize = 64;
/// The longest sleep.
pub(crate) const SLEEP_MAX: Duration = Duration::from_secs(10);
/// How long to wait for the answer to a ping. Nothing is lost between the guests, but a busy machine may
/// let one of them wait for a processor.
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for the answer to the first ping, which has to resolve the target's MAC. The
/// stack asks for one MAC a second, whichever it is.
pub(crate) const CONTACT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a socket blocks before it looks for the command to end.
#[cfg(target_os = "linux")]
pub(crate) const PATIENCE: Duration = Duration::from_millis(250);
/// How long to pause between two attempts to accept a connection, because nothing else can wait for
/// one.
#[cfg(target_os = "linux")]
pub(crate) const ACCEPT_PATIENCE: Duration = Duration::from_micros(100);
#[cfg(target_os = "linux")]
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The most bytes that one call of the kernel reads or writes.
pub(crate) const CHUNK: usize = 256 << 10;

/// The longest IP packet that a guest sends with segmentation offload: the longest that IPv4 has, with
/// space for an Ethernet header in 65,535 bytes.
pub(crate) const LARGE_PACKET: u32 = 65_521;

/// Bytes of the TCP window, which is the amount in flight between the guests. It is large enough
/// that neither waits for the other, and small enough for the processors' caches.
pub(crate) fn window(mtu: u32) -> usize {
    (32 * mtu as usize).clamp(512 << 10, 2 << 20)
}

/// Frames that a ring has in flight in each direction: a TCP window and its acknowledgements.
pub(crate) fn depth(mtu: u32) -> u32 {
    let packets = window(mtu) as u32 / (mtu - 40);
    packets.next_power_of_two().clamp(64, 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::QUEUE;

    #[test]
    fn a_window_fits_into_the_queues_at_every_mtu() {
        for mtu in (1280..=65_521).step_by(7) {
            let packets = window(mtu) / (mtu as usize - 40);
            assert!(packets >= 16, "mtu {mtu}: too few to keep two guests busy");
            assert!(packets <= depth(mtu) as usize, "mtu {mtu}");
            assert!(depth(mtu) <= QUEUE / 2, "mtu {mtu}");
        }
    }
}
