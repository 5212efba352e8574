//! One connection: a guest, its port of the network, and its thread.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vmring::InterfaceMonitor;
use vmring_virtio::net::{
    Ended as Served, ServeError, StatsHandle, VhostUserNet, serve_connection,
};
use vmring_virtio::vhost_user::Settings;

use super::counts::{Counts, OF_A_PORT};
use super::sigbus::Seat;

/// What other threads know of a guest.
#[derive(Debug)]
pub(super) struct Guest {
    since: Instant,
    stats: StatsHandle,
    monitor: InterfaceMonitor,
    /// What its port has dropped, and what else it has counted, when it has ended.
    port: OnceLock<[BTreeMap<&'static str, u64>; 2]>,
}

impl Guest {
    pub(super) fn counts(&self) -> Counts {
        let device = self.stats.stats().named().into_iter().collect();
        let [drops, port] = match self.port.get() {
            Some(counted) => counted.clone(),
            None => counted(self.monitor.drops(), self.monitor.counters()),
        };
        Counts { device, drops, port }
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
pub(super) enum Ended {
    /// The front end has gone.
    Left,
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
            Ended::Stopped => f.write_str("was connected when the server ended"),
            Ended::Shrunk => f.write_str(
                "is cut off: its front end has made the memory shorter that it shares, or has no \
                 space for it",
            ),
            Ended::Failed(why) => write!(f, "is cut off: {why}"),
        }
    }
}

/// A connection that nobody serves yet.
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
        let (stats, monitor) =
            (device.device().stats_handle(), device.device().interface().monitor());
        let guest = Guest { since: Instant::now(), stats, monitor, port: OnceLock::new() };
        let guest = Arc::new(guest);
        (Self { socket, device, settings, seat, guest: guest.clone() }, guest)
    }

    /// Serves the guest on this thread, until either side ends it.
    pub(super) fn serve(self) -> Ended {
        let Self { socket, device, settings, seat, guest } = self;
        let (device, result) = serve_connection(socket, device, settings, seat.bell());
        let interface = device.device().interface();
        // It is set once.
        let _ = guest.port.set(counted(interface.drops(), interface.counters()));
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
