//! Sizes, times and counts of the demo.

use std::time::Duration;

/// Pings from each guest to each target.
pub(crate) const PINGS: u32 = 50;
/// Bytes transferred unless told otherwise.
pub(crate) const BYTES: u64 = 1 << 30;
/// DHCP clients repeat a lost packet after ten seconds.
pub(crate) const LEASE_TIMEOUT: Duration = Duration::from_secs(30);
/// A guest gives up on a ping after a second.
pub(crate) const PINGS_TIMEOUT: Duration = Duration::from_secs(PINGS as u64 + 10);
/// A transfer that has not moved for so long is over.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_secs(30);
pub(crate) const TICK: Duration = Duration::from_millis(100);
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(10);
/// Of a ring to close.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Packets the stack takes in, and makes, before the other side of the ring hears of it: enough to
/// pay for a wake-up, few enough that both guests work at the same time.
pub(crate) const BATCH: usize = 64;
/// An upper limit for any sleep.
pub(crate) const SLEEP_MAX: Duration = Duration::from_secs(10);
/// How long a ping is waited for.
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the first one is, which has to find out the target's MAC: the stack asks for one MAC a
/// second, whoever's it is.
pub(crate) const CONTACT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a socket sleeps before it looks for a command to end.
#[cfg(target_os = "linux")]
pub(crate) const PATIENCE: Duration = Duration::from_millis(250);
/// The same for a connection to come, which nothing else can wait for.
#[cfg(target_os = "linux")]
pub(crate) const ACCEPT_PATIENCE: Duration = Duration::from_micros(100);
#[cfg(target_os = "linux")]
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What one call of the kernel takes or brings at most.
#[cfg(target_os = "linux")]
pub(crate) const CHUNK: usize = 256 << 10;

/// Bytes of the TCP window: the amount under way between the guests. Large enough that neither
/// waits for the other, small enough for the processors' caches.
pub(crate) fn window(mtu: u32) -> usize {
    (32 * mtu as usize).clamp(512 << 10, 2 << 20)
}

/// Frames a ring has in flight each way: a TCP window and its acknowledgements.
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
