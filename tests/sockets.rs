//! Pairs of sockets, and peers that do what a test says.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};

use vmring::Socket;

/// A kind of wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    Stream,
    StreamWithHeaders,
    Datagram,
    DatagramWithHeaders,
    #[cfg(target_os = "linux")]
    Seqpacket,
}

impl Wire {
    pub(crate) const ALL: &[Wire] = &[
        Wire::Stream,
        Wire::StreamWithHeaders,
        Wire::Datagram,
        Wire::DatagramWithHeaders,
        #[cfg(target_os = "linux")]
        Wire::Seqpacket,
    ];

    /// A driver of this kind that has no socket yet.
    pub(crate) fn driver(self) -> Socket {
        match self {
            Wire::Stream => Socket::stream(),
            Wire::StreamWithHeaders => Socket::stream().virtio_header(true),
            Wire::Datagram => Socket::datagram(),
            Wire::DatagramWithHeaders => Socket::datagram().virtio_header(true),
            #[cfg(target_os = "linux")]
            Wire::Seqpacket => Socket::seqpacket(),
        }
    }

    /// Two sockets that are connected to each other.
    pub(crate) fn sockets(self) -> [OwnedFd; 2] {
        match self {
            Wire::Stream | Wire::StreamWithHeaders => {
                let (one, other) = UnixStream::pair().expect("a pair of sockets");
                [one.into(), other.into()]
            }
            Wire::Datagram | Wire::DatagramWithHeaders => {
                let (one, other) = UnixDatagram::pair().expect("a pair of sockets");
                [one.into(), other.into()]
            }
            #[cfg(target_os = "linux")]
            Wire::Seqpacket => seqpacket_pair(),
        }
    }

    /// Drivers for the two ends of a wire.
    pub(crate) fn pair(self) -> [Socket; 2] {
        self.sockets().map(|socket| self.driver().from_fd(socket))
    }
}

#[cfg(target_os = "linux")]
fn seqpacket_pair() -> [OwnedFd; 2] {
    use std::os::fd::FromRawFd;

    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the call writes two numbers.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the system has just opened them, and nobody else knows their numbers.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}
