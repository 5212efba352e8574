//! One connection: a guest, its port of the network, and, over vhost-user, its thread.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vmring::InterfaceMonitor;
use vmring_virtio::net::{
    Ended as Served, FrontEndHandle, ServeError, StatsHandle, VhostUserNet, serve_connection,
};
use vmring_virtio::vhost_user::Settings;

use super::counts::{Counts, OF_A_PORT};
use super::sigbus::Seat;
use super::wire_stats::WireStats;

/// The regions of a guest's memory whose files its front end can shorten, because they cannot be
/// sealed. The server survives that, and the guest does not.
const UNSEALED: &str = "unsealed_regions";

/// What other threads know of a guest.
#[derive(Debug)]
pub(super) struct Guest {
    since: Instant,
    stats: Stats,
    port: InterfaceMonitor,
    /// What it had counted when it ended.
    last: OnceLock<Counts>,
}

/// The counters of what is between a guest and its port.
#[derive(Debug)]
pub(super) enum Stats {
    /// A device of virtio, and what is known of its front end.
    Device(StatsHandle, FrontEndHandle),
    Wire(WireStats),
}

impl Guest {
    pub(super) fn new(stats: Stats, port: InterfaceMonitor) -> Self {
        Self { since: Instant::now(), stats, port, last: OnceLock::new() }
    }

    pub(super) fn counts(&self) -> Counts {
        if let Some(counts) = self.last.get() {
            return counts.clone();
        }
        let device = match &self.stats {
            Stats::Device(stats, front_end) => {
                let unsealed = (UNSEALED, front_end.get().session.unsealed);
                stats.stats().named().into_iter().chain([unsealed]).collect()
            }
            Stats::Wire(stats) => stats.named(),
        };
        let [drops, port] = counted(self.port.drops(), self.port.counters());
        Counts { device, drops, port }
    }

    /// Keeps what it has counted, and these counters too. It is called at the end, while there is still a
    /// port.
    pub(super) fn freeze(&self, more: impl IntoIterator<Item = (&'static str, u64)>) {
        let mut counts = self.counts();
        counts.device.extend(more);
        // It is set once.
        let _ = self.last.set(counts);
    }

    /// How long it has been connected.
    pub(super) fn time(&self) -> Duration {
        self.since.elapsed()
    }
}

/// What a port has dropped, and what else it has counted.
fn counted(
    drops: Vec<(&'static str, u64)>,
    mut counters: Vec<(&'static str, u64)>,
) -> [BTreeMap<&'static str, u64>; 2] {
    // The others are those of the whole network.
    counters.retain(|(name, _)| OF_A_PORT.contains(name));
    [drops, counters].map(|all| all.into_iter().filter(|(_, n)| *n > 0).collect())
}

/// How a connection has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The front end, or the peer of a wire, has gone.
    Left,
    /// The peer of a wire has gone, in the middle of a packet.
    LeftWithin,
    /// The server ends.
    Stopped,
    /// The front end has made its memory shorter.
    Shrunk,
    /// In words.
    Failed(String),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::Left => f.write_str("has left"),
            Ended::LeftWithin => f.write_str("has left in the middle of a packet"),
            Ended::Stopped => f.write_str("was connected when the server ended"),
            Ended::Shrunk => f.write_str(
                "is cut off: its front end has made the memory shorter that it shares, or has no \
                 space for it",
            ),
            Ended::Failed(why) => write!(f, "is cut off: {why}"),
        }
    }
}

/// A connection over vhost-user that nobody serves yet.
pub(super) struct Connection {
    socket: UnixStream,
    device: VhostUserNet,
    settings: Settings,
    seat: Seat,
    guest: Arc<Guest>,
}

impl Connection {
    pub(super) fn new(
        socket: UnixStream,
        device: VhostUserNet,
        mut settings: Settings,
        seat: Seat,
    ) -> (Self, Arc<Guest>) {
        settings.observer = Some(seat.observer());
        let stats = Stats::Device(device.device().stats_handle(), device.front_end());
        let guest = Arc::new(Guest::new(stats, device.device().interface().monitor()));
        (Self { socket, device, settings, seat, guest: guest.clone() }, guest)
    }

    /// Serves the guest on this thread, until either side ends it.
    pub(super) fn serve(self) -> Ended {
        let Self { socket, device, settings, seat, guest } = self;
        let (device, result) = serve_connection(socket, device, settings, seat.bell());
        guest.freeze([]);
        // The port of the network goes with the device, before the seat is another's.
        drop(device);
        // What the device found in memory that had shrunk is no reason of its own.
        if seat.has_shrunk() {
            return Ended::Shrunk;
        }
        match result {
            Ok(Served::Closed) => Ended::Left,
            Ok(Served::Stopped) => Ended::Stopped,
            Err(error) => Ended::Failed(in_words(&error)),
        }
    }
}

/// An error with its causes, in one sentence.
fn in_words(error: &ServeError) -> String {
    let mut sentence = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        sentence.push_str(&format!(": {error}"));
        source = error.source();
    }
    sentence
}
