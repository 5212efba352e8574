//! The errors of a socket wire. Each message is a sentence that says how to solve the problem.

use std::path::PathBuf;

use thiserror::Error as ThisError;

/// A rule of sockets that was broken. What the system refuses for another reason is
/// [`Error::Io`](crate::Error::Io).
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum SocketError {
    /// The path has more bytes than the address of a Unix socket holds.
    #[error(
        "the path of the socket, {}, has {} bytes, and the system takes at most {max}: use a shorter \
         one",
        .path.display(),
        .path.as_os_str().len()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// How many bytes a path may have.
        max: usize,
    },
    /// A live process has the socket of this path.
    #[error("{} is the socket of a process that runs: stop that one, or use another path", .0.display())]
    Taken(PathBuf),
    /// A process has locked the folder of the socket (flock(2)), and goes on holding the lock.
    #[error(
        "another process holds a lock of the folder {}, in which the socket is to be: end that one \
         (lslocks(8) lists who holds which), or use a folder that only you can read",
        .0.display()
    )]
    FolderLocked(PathBuf),
    /// The path exists and is not a socket.
    #[error("{} exists and is no socket: remove it, or use another path", .0.display())]
    NotASocket(PathBuf),
    /// A descriptor is not a socket of the kind that the wire needs.
    #[error("the descriptor cannot be used for this wire: {0}")]
    Descriptor(&'static str),
    /// A setting is missing, or is not possible with this wire.
    #[error("{0}")]
    Setting(&'static str),
}
