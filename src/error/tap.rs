//! The errors of a TAP. Each message is a sentence that says how to solve the problem.

use thiserror::Error as ThisError;

/// A rule of the kernel's TAP that was broken. A missing privilege is not among them: it is
/// [`Error::PermissionDenied`](crate::Error::PermissionDenied).
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum TapError {
    /// There is no `/dev/net/tun`.
    #[error(
        "there is no /dev/net/tun here: load the kernel's driver (modprobe tun), or give the \
         container the device (--device /dev/net/tun)"
    )]
    NoTun,
    /// The name is not valid for a network interface.
    #[error(
        "'{0}' is not a valid interface name: use 1 to 15 bytes, without '/', ':', '%' and blanks"
    )]
    Name(String),
    /// The TAP is open already, in another process or for another interface.
    #[error(
        "the TAP '{0}' is in use already, by another interface of this process or by another \
         process: stop that one, choose another name, or open the TAP with several queues on both \
         sides"
    )]
    Taken(String),
    /// An interface of that name exists, but it is not a TAP.
    #[error(
        "'{0}' is an interface of another kind: choose another name, or make a TAP with \
         'ip tuntap add {0} mode tap'"
    )]
    NotATap(String),
    /// The TAP was created for several queues and one was requested, or the other way round.
    #[error(
        "the TAP '{name}' was made {}: {}",
        if *.multi { "for several queues" } else { "for one queue" },
        if *.multi {
            "ask for 2 queues or more, or make it without 'multi_queue'"
        } else {
            "ask for 1 queue, or make it with 'ip tuntap add ... multi_queue'"
        }
    )]
    QueueMismatch {
        /// The TAP's name.
        name: String,
        /// Whether the TAP was created for several queues.
        multi: bool,
    },
    /// The TAP has as many queues as the kernel allows (256).
    #[error(
        "the kernel gives the TAP '{0}' no more queues: ask for fewer (at most 256, including \
         those of other processes)"
    )]
    TooManyQueues(String),
    /// A descriptor is not that of a TAP, or is not set up for this use.
    #[error("the descriptor cannot be used as a TAP: {0}")]
    Descriptor(&'static str),
    /// [`Mode::Bridged`](crate::Mode::Bridged) names an interface that does not exist or is not a
    /// bridge.
    #[error(
        "there is no bridge '{0}': make one with 'ip link add {0} type bridge', or name one that \
         is there"
    )]
    NoBridge(String),
    /// The interface's TAP no longer exists.
    #[error("the TAP '{0}' is gone: make it again, then restart the interface")]
    Gone(String),
    /// A setting is not possible with this TAP.
    #[error("{0}")]
    Setting(&'static str),
}
