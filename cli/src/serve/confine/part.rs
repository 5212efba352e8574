//! What the server needs, and what became of a part of its confinement.

use std::path::PathBuf;

use serde::Serialize;

use crate::serve::kept::Kept;

/// What the server still needs after its set-up.
#[derive(Clone, Debug, Default)]
// Elsewhere nothing is confined, and nobody asks.
#[cfg_attr(
    not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))),
    allow(dead_code)
)]
pub(crate) struct Needs {
    /// It connects to front ends that listen.
    pub(crate) client: bool,
    /// It has wires.
    pub(crate) wires: bool,
    /// It shows counters on a terminal.
    pub(crate) terminal: bool,
    /// It moves frames of a TAP; by io_uring, if this says so.
    pub(crate) tap: bool,
    pub(crate) io_uring: bool,
    /// Its guests have a way out.
    pub(crate) nat: bool,
    /// The file that names the host's resolvers, or the folder in which it is replaced.
    pub(crate) resolvers: Option<PathBuf>,
    /// What it keeps of its privileges.
    pub(crate) kept: Kept,
    /// It moves frames of the simulated vmnet.
    pub(crate) simulated: bool,
    /// The folders of its sockets, which it removes.
    pub(crate) sockets: Vec<PathBuf>,
    /// The folder of its lease file.
    pub(crate) leases: Option<PathBuf>,
}

/// A part of the confinement, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Part {
    /// Whether all of it is in force.
    pub(crate) complete: bool,
    /// In words.
    pub(crate) state: String,
}

impl Part {
    pub(super) fn off(why: &str) -> Self {
        Self { complete: false, state: format!("off: {why}") }
    }
}
