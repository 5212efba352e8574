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
        "'{0}' cannot be the name of an interface: use 1 to 15 bytes (it has {len}), without '/', \
         ':', '%' and blanks",
        len = .0.len()
    )]
    Name(String),
    /// Another process has the TAP open.
    #[error(
        "another process uses the TAP '{0}' already: stop that one, choose another name, or open \
         the TAP with several queues on both sides"
    )]
    Taken(String),
    /// This process has the TAP open, for another interface.
    #[error(
        "this process uses the TAP '{0}' already: stop that interface, choose another name, or ask \
         for several queues and build several rings on one interface"
    )]
    TakenHere(String),
    /// An interface of that name exists, but it is not a TAP.
    #[error(
        "'{0}' is an interface of this host, but no TAP: choose another name ('ip link' lists those \
         that are there)"
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
        "there is no bridge '{0}': name one that is there ('ip link show type bridge' lists them), \
         or make one ('ip link add br0 type bridge')"
    )]
    NoBridge(String),
    /// The interface's TAP no longer exists.
    #[error("the TAP '{0}' is gone: make it again, then restart the interface")]
    Gone(String),
    /// The range that was asked for overlaps with a network of the host.
    #[error(
        "the network {subnet} is taken here, because {by}: ask for another range{}",
        .free.as_ref().map(|free| format!(", such as {free}")).unwrap_or_default()
    )]
    SubnetTaken {
        /// The network that was asked for, like `192.168.64.0/24`.
        subnet: String,
        /// The words that say who has it, like `'eth0' has the address 192.168.64.7/24`.
        by: String,
        /// A range that is free, like `192.168.65.1/24`.
        free: Option<String>,
    },
    /// No range was asked for, and the host has networks in all that are tried.
    #[error(
        "each range that a TAP's network has by default overlaps with a network of this host: ask \
         for a range that is free"
    )]
    NoFreeSubnet,
    /// Another program has changed the TAP during the setup, again and again.
    #[error(
        "another program keeps changing the TAP '{name}', so that {what}: keep udev, \
         systemd-networkd or NetworkManager away from it, or make it yourself ('ip tuntap add')"
    )]
    Changed {
        /// The TAP's name.
        name: String,
        /// What is not as it was asked for.
        what: String,
    },
    /// A setting is not possible with this TAP.
    #[error("{0}")]
    Setting(&'static str),
}
