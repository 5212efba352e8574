//! Programs that are started with a socket under a number that their command lines have.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Lets the program that `command` starts have the socket under this number, whatever the number was used
/// for. The socket must stay open in this process until the program has started.
pub(super) fn give(command: &mut Command, socket: BorrowedFd<'_>, number: RawFd) {
    let from = socket.as_raw_fd();
    let give = move || {
        // SAFETY: the calls take numbers only. They may be made between fork and exec.
        let given = unsafe {
            match from == number {
                // A copy is inherited; this one is told to be.
                true => libc::fcntl(from, libc::F_SETFD, 0),
                false => libc::dup2(from, number),
            }
        };
        if given < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes one system call, and allocates nothing. What it replaces is nothing that
    // the standard library has opened for itself: that was opened after the socket, and so has a number
    // above it, or the number was in use before.
    unsafe { command.pre_exec(give) };
}
