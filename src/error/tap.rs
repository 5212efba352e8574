//! What can go wrong with a TAP, as sentences with a remedy.

use thiserror::Error as ThisError;

/// A rule of the kernel's TAP that was broken. What lacks a privilege is
/// [`Error::PermissionDenied`](crate::Error::PermissionDenied) instead.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum TapError {
    /// There is no `/dev/net/tun`.
    #[error(
        "there is no /dev/net/tun here: load the kernel's driver (modprobe tun), or give the \
         container the device (--device /dev/net/tun)"
    )]
    NoTun,
    /// The name is none that the kernel takes.
    #[error("'{0}' is no interface name: 1 to 15 bytes, without '/', ':', '%' and blanks")]
    Name(String),
    /// Somebody else has the TAP open.
    #[error(
        "the TAP '{0}' is in use by another process: end it, choose another name, or open the TAP \
         with several queues on both sides"
    )]
    Taken(String),
    /// There is such an interface, and it is no TAP.
    #[error(
        "'{0}' is an interface of another kind: choose another name, or make a TAP with \
         'ip tuntap add {0} mode tap'"
    )]
    NotATap(String),
    /// The TAP was made for several queues and one was asked for, or the other way round.
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
        /// Whether it was made for several.
        multi: bool,
    },
    /// The kernel gives the TAP no further queue.
    #[error(
        "the kernel gives the TAP '{0}' no further queue: ask for fewer (256 are the most, with those \
         of others)"
    )]
    TooManyQueues(String),
    /// A descriptor that is no TAP's, or not set up for this use.
    #[error("the descriptor is no open TAP: {0}")]
    Descriptor(&'static str),
    /// [`Mode::Bridged`](crate::Mode::Bridged) names no bridge.
    #[error(
        "there is no bridge '{0}': make one with 'ip link add {0} type bridge', or name one that \
         is there"
    )]
    NoBridge(String),
    /// The TAP that the interface was on is gone.
    #[error("the TAP '{0}' is gone: make it again, then restart the interface")]
    Gone(String),
    /// A setting is not possible with this TAP.
    #[error("{0}")]
    Setting(&'static str),
}
