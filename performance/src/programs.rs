//! What this machine has to have for some parts, and what those parts are given.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::plan::Part;
use crate::report::{Table, Want};
use crate::result::Result;

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
    find_program(name).is_some()
}

/// The program of this name that is on the path.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let programs = std::env::split_paths(&path).map(|folder| folder.join(name));
    programs.into_iter().find(|program| program.is_file())
}

/// What a program says is its version: the last word of its first line.
pub(crate) fn version_of(program: &Path) -> Option<String> {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.lines().next()?.split_whitespace().last().map(str::to_owned)
}

/// Other programs that part `nat` runs, if they are here.
#[derive(Clone, Copy)]
pub(crate) struct Rivals<'a> {
    pub(crate) pasta: Option<&'a Path>,
    pub(crate) passt: Option<&'a Path>,
    pub(crate) slirp4netns: Option<&'a Path>,
    /// How long each rate of datagrams is tried.
    pub(crate) datagram_time: Duration,
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

/// A table of a part: its name, and what measures it.
pub(crate) type Step<'a> = (&'static str, &'a dyn Fn() -> Result<Measured>);

/// Measures those tables whose name contains `only`. A table that fails says why, and the others are
/// measured all the same.
pub(crate) fn run_tables(steps: &[Step<'_>], only: &str) -> Part {
    let (mut tables, mut wants) = (Vec::new(), Vec::new());
    for (name, measure) in steps.iter().filter(|(name, _)| name.contains(only)) {
        // A guest that does not start panics.
        let measured = catch_unwind(AssertUnwindSafe(measure));
        match measured.unwrap_or_else(|_| Err("it panicked".into())) {
            Ok(Ok((table, more))) => {
                tables.push(table);
                wants.extend(more);
            }
            Ok(Err(why)) => {
                tables.push(Table::new(name, format!("skipped: {why}"), &[""], &[""]));
            }
            Err(error) => tables.push(Table::failed(name, &error.to_string())),
        }
    }
    Ok((tables, wants))
}
