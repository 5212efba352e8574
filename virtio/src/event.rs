//! [`Event`]: the descriptor with which one side tells the other that a ring has changed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use crate::sys::{self, kind};

/// A kick, call or error descriptor of a ring: an eventfd, one end of a pipe, or a socket, which
/// user-mode Linux uses.
///
/// The eight bytes that are written mean nothing (section "Support for platforms other than
/// Linux"). A read or write does not wait. An eventfd is one object for both sides, so a front end
/// that makes it wait again, and fills its counter, can make its own signals wait: use one thread per
/// front end where that matters.
///
/// A pipe or socket that nobody reads raises no SIGPIPE. For that, signalling a pipe costs three system calls
/// more than signalling an eventfd.
#[derive(Debug)]
pub struct Event {
    file: File,
    /// The type of the file; see [`kind`].
    kind: u32,
}

impl Event {
    /// Takes over a descriptor on which the other side is [signalled](Self::signal): the call of a front
    /// end, or an `irqfd`. `None` if it is no eventfd, pipe or socket.
    ///
    /// # Errors
    ///
    /// What the system says, for example if the descriptor only names a file (`O_PATH`).
    pub fn new(fd: OwnedFd) -> io::Result<Option<Self>> {
        let file = File::from(fd);
        let kind = sys::file_type(file.metadata()?.mode());
        match kind {
            kind::PIPE | kind::NONE => {}
            kind::SOCKET => sys::no_signal(file.as_fd())?,
            _ => return Ok(None),
        }
        sys::set_nonblocking(file.as_fd())?;
        Ok(Some(Self { file, kind }))
    }

    /// Like [`new`](Self::new), for a descriptor that is waited for: the kick of a front end, or an
    /// `ioeventfd`.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new).
    pub fn kick(fd: OwnedFd) -> io::Result<Option<Self>> {
        let Some(event) = Self::new(fd)? else { return Ok(None) };
        if event.kind == kind::NONE {
            // Many things of Linux have no type, and some are costly to wait for, such as an epoll
            // descriptor with thousands of others in it. Only an eventfd takes a zero, which adds
            // nothing to it.
            #[allow(clippy::unused_io_amount)]
            let taken = (&event.file).write(&0u64.to_ne_bytes());
            if taken.is_err() {
                return Ok(None);
            }
        }
        Ok(Some(event))
    }

    /// Signals the other side. If there is no space for one more signal, the other side has not
    /// taken the last one, which is as good.
    ///
    /// # Errors
    ///
    /// What the system says, for example if nobody reads the pipe any more.
    pub fn signal(&self) -> io::Result<()> {
        loop {
            // Eight bytes are written whole or not at all. If a socket takes fewer, they signal too.
            let bytes = 1u64.to_ne_bytes();
            let written = match self.kind {
                kind::PIPE => sys::write(self.file.as_fd(), &bytes),
                kind::SOCKET => sys::send(self.file.as_fd(), &bytes),
                _ => (&self.file).write(&bytes),
            };
            match written {
                Ok(_) => return Ok(()),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Takes the signals of the other side. Returns whether there was one. If more signals arrived
    /// than fit into one read, the descriptor stays readable.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` if nobody can write to the pipe or socket any more. It stays readable then, so do not
    /// wait for it again. Otherwise what the system says.
    pub fn clear(&self) -> io::Result<bool> {
        let mut bytes = [0; 512];
        loop {
            match (&self.file).read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => return Ok(true),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(false),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
