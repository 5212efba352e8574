//! What the server needs, and what became of a part of its confinement.

use std::path::PathBuf;

use serde::Serialize;

/// What the server still needs after its set-up.
#[derive(Clone, Debug, Default)]
// Elsewhere nothing is confined, and nobody asks.
#[cfg_attr(
    not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))),
    allow(dead_code)
)]
pub(in crate::serve) struct Needs {
    /// It connects to front ends that listen.
    pub(in crate::serve) client: bool,
    /// It shows counters on a terminal.
    pub(in crate::serve) terminal: bool,
    /// It moves frames of a TAP; by io_uring, if this says so.
    pub(in crate::serve) tap: bool,
    pub(in crate::serve) io_uring: bool,
    /// It has changed the host's end of a TAP, and puts it back.
    pub(in crate::serve) hosts_end: bool,
    /// It moves frames of the simulated vmnet.
    pub(in crate::serve) simulated: bool,
    /// The folders of its sockets, which it removes.
    pub(in crate::serve) sockets: Vec<PathBuf>,
    /// The folder of its lease file.
    pub(in crate::serve) leases: Option<PathBuf>,
}

/// A part of the confinement, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in crate::serve) struct Part {
    /// Whether all of it is in force.
    pub(in crate::serve) complete: bool,
    /// In words.
    pub(in crate::serve) state: String,
}

impl Part {
    pub(super) fn off(why: &str) -> Self {
        Self { complete: false, state: format!("off: {why}") }
    }
}
