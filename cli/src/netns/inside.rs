//! The child process, until it becomes the command.

use std::fmt::Display;
use std::io::{self, BufRead, BufReader, ErrorKind, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{self, Command};

use caps::{CapSet, Capability};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{getegid, geteuid};

use super::settings::Settings;
use super::{link, resolver};
use crate::args::RunNetnsArgs;
use crate::system;

/// What a shell returns for a command that cannot be run, and for one that is not there.
pub(super) const CANNOT_RUN: i32 = 126;
const NOT_FOUND: i32 = 127;
/// What the command may do in its namespace: set up its network, ping, capture, and listen on the
/// ports below 1024.
const CAPABILITIES: [Capability; 3] =
    [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW, Capability::CAP_NET_BIND_SERVICE];

/// Makes the namespace, and becomes the command in it. A failure is said on stderr.
pub(super) fn become_the_command(parent: UnixStream, args: &RunNetnsArgs) -> ! {
    let (sentence, code) = match prepare(parent, args) {
        Err(sentence) => (sentence, 1),
        Ok(()) => {
            let (name, rest) = args.command.split_first().expect("it is not empty");
            let error = Command::new(name).args(rest).exec();
            let code = if error.kind() == ErrorKind::NotFound { NOT_FOUND } else { CANNOT_RUN };
            (format!("'{}' cannot be run: {error}", name.to_string_lossy()), code)
        }
    };
    // If this fails there is nobody to report it to.
    let _ = writeln!(io::stderr(), "vmring: {sentence}");
    process::exit(code);
}

fn failed(what: &str, error: &dyn Display) -> String {
    format!("{what} failed: {error}")
}

fn prepare(parent: UnixStream, args: &RunNetnsArgs) -> Result<(), String> {
    // A command whose network has gone ends too.
    prctl::set_pdeathsig(Signal::SIGTERM).map_err(|e| failed("setting a signal", &e))?;
    enter()?;
    let tap = link::create(args.mtu(), args.offload)?;
    let fds = [tap.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&fds)];
    let piece = [IoSlice::new(&[0])];
    sendmsg::<()>(parent.as_raw_fd(), &piece, &message, MsgFlags::empty(), None)
        .map_err(|e| failed("passing the TAP on", &e))?;
    drop(tap);
    let mut line = String::new();
    let read = BufReader::new(parent).read_line(&mut line);
    if read.map_err(|e| failed("waiting for the network", &e))? == 0 {
        // The parent has ended, and has said why.
        process::exit(1);
    }
    let settings: Settings =
        serde_json::from_str(&line).map_err(|e| failed("reading the network's addresses", &e))?;
    link::set_up(&settings)?;
    resolver::name(settings.gateway)?;
    keep_capabilities()
}

/// Enters new namespaces for the network and for mounts, and for users if this process needs that to
/// make the others.
fn enter() -> Result<(), String> {
    let (user, group) = (geteuid(), getegid());
    let both = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    // Root stays what it is, if it may.
    if system::is_root() && unshare(both).is_ok() {
        return resolver::detach();
    }
    unshare(both | CloneFlags::CLONE_NEWUSER).map_err(|error| {
        format!(
            "this machine lets no user make a network namespace ({error}): see the settings \
             user.max_user_namespaces, kernel.unprivileged_userns_clone and \
             kernel.apparmor_restrict_unprivileged_userns"
        )
    })?;
    // The command sees the same user and group as the caller. The kernel takes the map of groups only from
    // a process that has given up to change its groups.
    let write = |file: &str, text: String| {
        std::fs::write(file, text).map_err(|e| failed(&format!("writing {file}"), &e))
    };
    write("/proc/self/setgroups", "deny".to_owned())?;
    write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    write("/proc/self/gid_map", format!("{group} {group} 1"))?;
    resolver::detach()
}

/// Lets the command have [`CAPABILITIES`], which a program without privileges otherwise loses.
fn keep_capabilities() -> Result<(), String> {
    if system::is_root() {
        return Ok(());
    }
    for one in CAPABILITIES {
        caps::raise(None, CapSet::Inheritable, one)
            .and_then(|()| caps::raise(None, CapSet::Ambient, one))
            .map_err(|e| failed(&format!("keeping {one}"), &e))?;
    }
    Ok(())
}
