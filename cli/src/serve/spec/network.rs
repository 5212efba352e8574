//! The network of a server, as the command line has it.

use std::fmt;
use std::str::FromStr;

use crate::bridge::spec::Spec;
use crate::device::VMNET;

/// One `--network`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkSpec(pub(crate) Spec);

impl FromStr for NetworkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = text.split(':').next().unwrap_or_default();
        let tap = if cfg!(target_os = "linux") { ", tap:NAME" } else { "" };
        match kind {
            "embedded" | VMNET => text.parse().map(Self),
            #[cfg(target_os = "linux")]
            "tap" => text.parse().map(Self),
            _ if kind == "vmnet" => Err(format!(
                "the vmnet device exists on macOS only; use embedded:NAME{tap} or {VMNET}"
            )),
            _ => Err(format!(
                "'{text}' is no network of a server; use embedded:NAME{tap} or {VMNET}"
            )),
        }
    }
}

impl fmt::Display for NetworkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl NetworkSpec {
    /// Whether it leads to a network outside of this process, which takes privileges to start. The
    /// simulated vmnet is inside.
    pub(crate) fn needs_privileges(&self) -> bool {
        !matches!(self.0, Spec::Embedded { .. }) && !self.is_simulated()
    }

    /// Whether it has a DHCP server of ours.
    pub(crate) fn has_dhcp(&self) -> bool {
        self.0.has_dhcp()
    }

    /// What keeps the guests from what the network promises, as far as it is known.
    pub(crate) fn obstacle(&self) -> Option<String> {
        self.0.obstacle()
    }

    pub(crate) fn is_tap(&self) -> bool {
        #[cfg(target_os = "linux")]
        if matches!(self.0, Spec::Tap { .. }) {
            return true;
        }
        false
    }

    pub(crate) fn is_simulated(&self) -> bool {
        matches!(self.0, Spec::Vmnet(_)) && !cfg!(target_os = "macos")
    }

    /// Whether the host's end of a TAP is set up, and is put back at the end.
    pub(crate) fn changes_host(&self) -> bool {
        #[cfg(target_os = "linux")]
        if matches!(self.0, Spec::Tap { mode: Some(_), .. }) {
            return true;
        }
        false
    }
}
