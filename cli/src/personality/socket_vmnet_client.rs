//! `socket_vmnet_client`: connects to a socket, and becomes a command that has the connection under the
//! number 3.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Parser;

use super::limits::CLIENT_FD;
use super::log::Log;
use super::options::check_length;
use super::program;

const NOTES: &str = "\
It takes the part of socket_vmnet_client (github.com/lima-vm/socket_vmnet). vmring
is it too when it is called by that name, as a link or a copy.
Example:
  vmring socket_vmnet_client /var/run/socket_vmnet qemu-system-x86_64 ... \\
    -device virtio-net-pci,netdev=n -netdev socket,id=n,fd=3
Exit code: the command's, or 1 if there is no connection or no such command.";

/// Runs a command with a connection to socket_vmnet as descriptor 3
#[derive(Debug, Parser)]
#[command(
    name = "socket_vmnet_client",
    disable_version_flag = true,
    after_help = NOTES,
    term_width = 80
)]
pub(super) struct Options {
    /// The socket of socket_vmnet
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    command: Vec<OsString>,
}

pub(super) fn run(options: Options, log: Log) -> ExitCode {
    let Options { socket, command } = options;
    let shown = socket.display();
    if check_length(&socket).is_err() {
        return log.failed(&format!("The socket path \"{shown}\" is too long"));
    }
    let connection = match UnixStream::connect(&socket) {
        Ok(connection) => connection,
        Err(error) => {
            return log.failed(&format!("Failed to connect to \"{shown}\": {}", words(&error)));
        }
    };
    if std::env::var_os("DEBUG").is_some() {
        for (i, word) in command.iter().enumerate() {
            log.plain(&format!("child_argv[{i}]: \"{}\"", word.display()));
        }
    }
    let (name, arguments) = command.split_first().expect("clap requires a command");
    let mut program = Command::new(name);
    program.args(arguments);
    program::give(&mut program, connection.as_fd(), CLIENT_FD);
    let error = program.exec();
    log.failed(&format!("Failed to exec \"{}\": {}", name.display(), words(&error)))
}

/// An error as strerror(3) has it.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
