//! How connections are made: front ends connect, or are connected to, or were by somebody else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use vmring_virtio::vhost_user::{Adopted, Listener, adopt, connect};

use super::limits::RETRY;
use super::spec::{ListenSpec, Place};
use crate::failure::Failure;

/// A `--listen` at work.
#[derive(Debug)]
pub(super) struct Listening {
    source: Source,
    /// Nothing is tried before this time.
    not_before: Option<Instant>,
}

#[derive(Debug)]
enum Source {
    Listener(Listener),
    Client(PathBuf),
    Given(Option<UnixStream>),
}

impl Listening {
    /// Takes over an inherited descriptor. It is done before anything else is opened, so that no number
    /// is one of this process's own descriptors.
    pub(super) fn adopted(spec: &ListenSpec) -> Result<Option<Self>, Failure> {
        let Place::Descriptor(number) = spec.place else { return Ok(None) };
        let failed = |error: io::Error| Failure::Usage(format!("{spec}: {error}"));
        // SAFETY: the call takes numbers only.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: it is open. Nothing in this process has opened it: whoever started the process did,
        // and says so on the command line, once.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let source = match adopt(fd).map_err(failed)? {
            Adopted::Listening(listener) => Source::Listener(listener),
            Adopted::Connected(socket) => Source::Given(Some(socket)),
        };
        Ok(Some(Self { source, not_before: None }))
    }

    /// Makes the socket, if there is one to make.
    pub(super) fn open(spec: &ListenSpec) -> Result<Self, Failure> {
        let source = match &spec.place {
            Place::Server(path) => Source::Listener(Listener::bind(path).map_err(|error| {
                let sentence = format!("{spec}: {error}");
                match error.kind() {
                    io::ErrorKind::AddrInUse => Failure::Step(sentence),
                    _ => Failure::Usage(sentence),
                }
            })?),
            Place::Client(path) => Source::Client(path.clone()),
            Place::Descriptor(_) => unreachable!("it was adopted"),
        };
        Ok(Self { source, not_before: None })
    }

    /// The next connection, if there is one now. After an error nothing is tried for a while.
    pub(super) fn next(&mut self, now: Instant) -> io::Result<Option<UnixStream>> {
        if self.not_before.is_some_and(|at| now < at) {
            return Ok(None);
        }
        self.not_before = None;
        let next = match &mut self.source {
            Source::Listener(listener) => listener.accept(),
            Source::Given(socket) => Ok(socket.take()),
            Source::Client(path) => match connect(path) {
                Ok(socket) => Ok(Some(socket)),
                // The front end is not there yet, or has no time.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound
                            | io::ErrorKind::ConnectionRefused
                            | io::ErrorKind::WouldBlock
                    ) =>
                {
                    self.not_before = Some(now + RETRY);
                    Ok(None)
                }
                Err(error) => Err(error),
            },
        };
        next.inspect_err(|_| self.not_before = Some(now + RETRY))
    }

    /// What is readable when there is a connection.
    pub(super) fn descriptor(&self, now: Instant) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::Listener(listener) if self.not_before.is_none_or(|at| now >= at) => {
                Some(listener.as_fd())
            }
            _ => None,
        }
    }

    /// When to try again, without being told.
    pub(super) fn due(&self) -> Option<Instant> {
        self.not_before
    }

    /// Whether no connection comes any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.source, Source::Given(None))
    }

    /// Takes no further connection, and removes the socket's file.
    pub(super) fn close(&mut self) {
        self.source = Source::Given(None);
    }

    /// After a connection that could not be served, nothing is tried for a while.
    pub(super) fn fail(&mut self, now: Instant) {
        self.not_before = Some(now + RETRY);
    }

    /// After a front end has gone, the next one is not tried at once, so that one that breaks every
    /// connection does not keep the server busy.
    pub(super) fn rest(&mut self, now: Instant) {
        if let Source::Client(_) = self.source {
            self.not_before = Some(now + RETRY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: after a connection that could not be served the socket rests, and whoever connects
    /// again and again does not keep the main thread.
    #[test]
    fn a_socket_rests_after_a_connection_that_was_not_served() {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("vmring-rest-{}", std::process::id()));
        let source = Source::Listener(Listener::bind(&path).expect("a socket"));
        let mut listening = Listening { source, not_before: None };
        let _waiting: Vec<_> = (0..3).map(|_| connect(&path).expect("it listens")).collect();
        let now = Instant::now();
        assert!(listening.next(now).expect("it is accepted").is_some());
        listening.fail(now);
        assert!(listening.next(now).expect("it rests").is_none());
        assert!(listening.descriptor(now).is_none(), "nothing wakes the main thread");
        let later = listening.due().expect("it is tried again");
        assert_eq!(later, now + RETRY);
        assert!(listening.descriptor(later).is_some());
        assert!(listening.next(later).expect("it is accepted").is_some());
    }
}
