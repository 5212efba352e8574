//! What this machine has to have for some parts, and what those parts are given.

use std::path::Path;

use crate::report::{Table, Want};

/// Why a part cannot run that needs the `vmring` command.
pub(crate) const NO_VMRING: &str = "no vmring command: `cargo build --release` in the folder above makes it, \
    or --bridge says where it is";

/// The reason why the parts that need a TAP cannot run here, if there is one.
pub(crate) fn no_tap() -> Option<&'static str> {
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Some("root is needed: network namespaces and TAPs are made");
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("this machine has no /dev/net/tun");
    }
    (!has_program("ip")).then_some("the program ip (iproute2) is not here")
}

/// Whether a program is on the path.
pub(crate) fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// What a part with the `vmring` command needs besides the plan.
#[derive(Clone, Copy)]
pub(crate) struct Programs<'a> {
    /// The `vmring` command.
    pub(crate) vmring: Option<&'a Path>,
    /// How long one TCP stream takes, in seconds.
    pub(crate) stream_seconds: u32,
    /// Only the tables whose name contains this text are measured.
    pub(crate) only: &'a str,
}

/// A table, or the reason why it cannot be measured here.
pub(crate) type Measured = std::result::Result<(Table, Vec<Want>), String>;
