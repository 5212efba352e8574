//! A descriptor that is readable when a socket takes more bytes: the poller sleeps on readable
//! descriptors only. It is made for a connection when something is left to be sent, which is when the
//! peer is slower than the ring.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Watch {
    set: Option<Set>,
}

#[derive(Debug)]
struct Set {
    queue: OwnedFd,
    /// The number of the connection whose socket is watched.
    connection: u64,
    reads: bool,
}

impl Watch {
    /// Watches whether the socket of connection number `connection` takes bytes, and, if `reads`,
    /// whether it has bytes.
    ///
    /// If the system has no more descriptors, nothing is watched. Then the bytes go with the next poll.
    pub(super) fn set(&mut self, connection: u64, socket: &OwnedFd, reads: bool) {
        let is_watched = |set: &Set| set.connection == connection && set.reads == reads;
        if self.set.as_ref().is_some_and(is_watched) {
            return;
        }
        // The old set is closed after the new one is open. Otherwise the new one could have the old
        // one's number, and a poller takes an equal number for the same file.
        let new = watch(socket.as_raw_fd(), reads);
        self.set = match new {
            Ok(queue) => Some(Set { queue, connection, reads }),
            Err(error) => {
                tracing::warn!(%error, "a wire cannot wait for its peer");
                None
            }
        };
    }

    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.set.as_ref().map(|set| set.queue.as_fd())
    }
}

#[cfg(target_os = "linux")]
fn watch(socket: RawFd, reads: bool) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers only.
    let queue = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if queue < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system has just opened it, and nobody else knows its number.
    let queue = unsafe { OwnedFd::from_raw_fd(queue) };
    let events = libc::EPOLLOUT | if reads { libc::EPOLLIN } else { 0 };
    let mut event = libc::epoll_event { events: events as u32, u64: 0 };
    // SAFETY: the event is borrowed through the call.
    let added =
        unsafe { libc::epoll_ctl(queue.as_raw_fd(), libc::EPOLL_CTL_ADD, socket, &mut event) };
    if added < 0 { Err(io::Error::last_os_error()) } else { Ok(queue) }
}

#[cfg(not(target_os = "linux"))]
fn watch(socket: RawFd, reads: bool) -> io::Result<OwnedFd> {
    // SAFETY: the call has no arguments.
    let queue = unsafe { libc::kqueue() };
    if queue < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system has just opened it, and nobody else knows its number. (kqueues are not
    // inherited by a child.)
    let queue = unsafe { OwnedFd::from_raw_fd(queue) };
    // SAFETY: it consists of numbers and a pointer, for which zero is valid.
    let mut change: libc::kevent = unsafe { std::mem::zeroed() };
    change.ident = socket as usize;
    change.flags = libc::EV_ADD;
    change.filter = libc::EVFILT_WRITE;
    let mut changes = [change, change];
    changes[1].filter = libc::EVFILT_READ;
    let count = if reads { 2 } else { 1 };
    // SAFETY: the changes are borrowed through the call, which writes no events.
    let added = unsafe {
        let none = std::ptr::null_mut();
        libc::kevent(queue.as_raw_fd(), changes.as_ptr(), count, none, 0, std::ptr::null())
    };
    if added < 0 { Err(io::Error::last_os_error()) } else { Ok(queue) }
}
