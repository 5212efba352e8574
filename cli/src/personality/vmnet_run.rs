//! `vmnet-run`: starts a `vmnet-helper` and a command, with a pair of sockets between them. The command has
//! its socket under the number 4. When the command ends, so does the helper.

use std::env;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use clap::Parser;
use nix::sys::signal::{Signal, killpg};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::{Pid, getpgrp, getpid, setpgid};
use signal_hook::consts::SIGCHLD;
use signal_hook::iterator::Signals;

use super::limits::{
    COMMAND_FD, HELPER_FD, LARGE_RECEIVE_BUFFER, NAMES, RECEIVE_BUFFER, SEND_BUFFER,
};
use super::log::Log;
use super::network::is_vmnet;
use super::program;
use super::vmnet_helper::{InterfaceOptions, version};
use crate::stop::ending_signals;

const NOTES: &str = "\
It takes the part of vmnet-run (github.com/nirs/vmnet-helper), which was called
vmnet-client. vmring is it too when it is called by that name, as a link or a
copy. VMRING_NETWORK names the network of the helper; see 'vmnet-helper --help'.
Example:
  vmring vmnet-run -- vfkit ... --device virtio-net,fd=4,mac=ADDRESS
  vmring vmnet-run -- qemu-system-x86_64 ... -device virtio-net-pci,netdev=n \\
    -netdev dgram,id=n,local.type=fd,local.str=4
Exit code: the command's; 128 and the number of the signal that ended it; 1 if it
could not be started.";

/// Runs a command with the socket of a vmnet-helper as descriptor 4
#[derive(Debug, Parser)]
#[command(
    name = "vmnet-run",
    disable_version_flag = true,
    infer_long_args = true,
    args_override_self = true,
    after_help = NOTES,
    term_width = 80
)]
pub(super) struct Options {
    #[command(flatten)]
    interface: InterfaceOptions,
    /// Print the version
    #[arg(long)]
    version: bool,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true)]
    command: Vec<OsString>,
}

pub(super) fn run(options: Options, log: Log) -> ExitCode {
    let Options { interface, version: wants_version, command } = options;
    let log = log.verbose(interface.verbose);
    if wants_version {
        return log.printed(&version());
    }
    if let Err(sentence) = interface.wanted().and_then(|_| interface.interval()) {
        return log.failed(&sentence);
    }
    let Some((name, arguments)) = command.split_first() else {
        return log.failed("no command specified");
    };
    let mut program = Command::new(name);
    program.args(arguments);
    match supervised(&interface, program, log) {
        Ok(code) => ExitCode::from(code),
        Err(sentence) => log.failed(&sentence),
    }
}

/// Runs the command beside a helper, and returns the exit code.
fn supervised(interface: &InterfaceOptions, mut command: Command, log: Log) -> Result<u8, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    // They are caught before there is anything to end.
    let caught = ending_signals().into_iter().chain([SIGCHLD]);
    let mut signals = Signals::new(caught).map_err(|e| failed("signal", &e))?;
    if getpid() != getpgrp() {
        setpgid(Pid::from_raw(0), Pid::from_raw(0)).map_err(|e| failed("setpgid", &e))?;
    }
    let (ours, theirs) = UnixDatagram::pair().map_err(|e| failed("socketpair", &e))?;
    let receive = if interface.enable_tso { &LARGE_RECEIVE_BUFFER } else { &RECEIVE_BUFFER };
    for socket in [&ours, &theirs] {
        // They make it faster. Without them it works.
        let send = setsockopt(socket, sockopt::SndBuf, &SEND_BUFFER);
        if let Err(error) = send.and_then(|()| setsockopt(socket, sockopt::RcvBuf, receive)) {
            log.warn(&format!("setsockopt: {error}"));
        }
    }
    let mut helper = helper(interface)?;
    helper.stdin(Stdio::null());
    program::give(&mut helper, ours.as_fd(), HELPER_FD);
    program::give(&mut command, theirs.as_fd(), COMMAND_FD);
    let mut group = Group { children: Vec::new(), log };
    group.start("helper", helper)?;
    group.start("command", command)?;
    // Each end is its owner's alone, so that the one sees the other go.
    drop((ours, theirs));
    let mut helper_runs = true;
    for signal in signals.forever() {
        if signal != SIGCHLD {
            return Ok(128 + signal as u8);
        }
        if let Some(status) = group.ended(COMMAND)? {
            let code = code_of(status);
            log.debug(&format!("command terminated with {code}"));
            return Ok(code);
        }
        if helper_runs && let Some(status) = group.ended(HELPER)? {
            helper_runs = false;
            log.error(&format!("the helper has ended with {}", code_of(status)));
        }
    }
    Err("signals cannot be waited for".to_owned())
}

/// The places of the children.
const HELPER: usize = 0;
const COMMAND: usize = 1;

/// The children, which are in this process's group. They are ended with it.
struct Group {
    children: Vec<Child>,
    log: Log,
}

impl Group {
    fn start(&mut self, what: &str, mut command: Command) -> Result<(), String> {
        let child = command
            .spawn()
            .map_err(|error| format!("execvp: \"{}\": {error}", command.get_program().display()))?;
        self.log.debug(&format!("started {what} (pid {})", child.id()));
        self.children.push(child);
        Ok(())
    }

    fn ended(&mut self, place: usize) -> Result<Option<ExitStatus>, String> {
        self.children[place].try_wait().map_err(|error| format!("waitpid: {error}"))
    }
}

impl Drop for Group {
    /// Ends the group, and waits for the children.
    fn drop(&mut self) {
        self.log.debug("terminating process group");
        // This process's own signal is caught, and nobody looks at it any more.
        if let Err(error) = killpg(getpgrp(), Signal::SIGTERM) {
            self.log.error(&format!("failed to terminate process group: {error}"));
            return;
        }
        for child in &mut self.children {
            // One that was waited for is no error.
            let _ = child.wait();
        }
        self.log.debug("children terminated");
    }
}

/// What a shell makes of it.
fn code_of(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 + signal as u8,
        (None, None) => 1,
    }
}

/// The helper's command: this very program. Before macOS 26 vmnet takes root, which sudo(8) gives as the
/// original's users have set it up.
fn helper(interface: &InterfaceOptions) -> Result<Command, String> {
    let program =
        env::current_exe().map_err(|error| format!("the program's path is unknown: {error}"))?;
    let mut command = if is_vmnet() && !nix::unistd::geteuid().is_root() && !has_macos_26() {
        let mut sudo = Command::new("sudo");
        sudo.args(["--non-interactive", &format!("--close-from={}", HELPER_FD + 1)]);
        // A program that is called by the name of a helper is that one.
        match program.file_name().is_some_and(|name| NAMES.iter().any(|one| name == *one)) {
            true => sudo.arg(program.with_file_name("vmnet-helper")),
            false => sudo.arg(program).arg("vmnet-helper"),
        };
        sudo
    } else {
        let mut command = Command::new(program);
        command.arg0("vmnet-helper");
        command
    };
    command.arg(format!("--fd={HELPER_FD}")).args(interface.arguments());
    Ok(command)
}

/// Whether vmnet works without root. What cannot be found out is answered with no.
fn has_macos_26() -> bool {
    let version = Command::new("sw_vers").arg("-productVersion").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let major = version.ok().and_then(|version| version.split('.').next()?.trim().parse().ok());
    major.is_some_and(|major: u32| major >= 26)
}
