//! What is ready, by macOS's kqueue.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

use crate::sockets::{Readiness, Token};

/// The identifier of the waker's event. Its filter is its own, so it is no descriptor.
const WAKER: usize = 0;

/// Space for what is ready.
#[derive(Debug)]
pub struct Events {
    events: Vec<libc::kevent>,
}

// SAFETY: the pointers in the events are numbers that this module has chosen, and nobody follows them.
unsafe impl Send for Events {}

impl Events {
    /// Space for so many at once, at least one.
    pub fn new(len: usize) -> Self {
        Self { events: Vec::with_capacity(len.clamp(1, i32::MAX as usize)) }
    }

    /// What is ready.
    pub fn iter(&self) -> impl Iterator<Item = (Token, Readiness)> + '_ {
        let events = self.events.iter().filter(|event| event.filter != libc::EVFILT_USER);
        events.map(|event| {
            let ends = event.flags & libc::EV_EOF != 0;
            let reads = event.filter == libc::EVFILT_READ;
            let readiness = Readiness {
                readable: reads,
                writable: !reads,
                closed: reads && ends,
                urgent: event.flags & libc::EV_OOBAND != 0,
                // At the end of a stream, `fflags` is the socket's error.
                failed: event.flags & libc::EV_ERROR != 0 || ends && (event.fflags != 0 || !reads),
            };
            (Token(event.udata.addr() as u64), readiness)
        })
    }
}

/// A kqueue.
#[derive(Debug)]
pub(super) struct Poll {
    queue: OwnedFd,
}

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: the call takes nothing.
        let queue = unsafe { libc::kqueue() };
        if queue < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the system has just opened this descriptor, and nobody else knows its number.
        let queue = unsafe { OwnedFd::from_raw_fd(queue) };
        // SAFETY: the call takes numbers only.
        if unsafe { libc::fcntl(queue.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let poll = Self { queue };
        poll.change(&[event(WAKER, libc::EVFILT_USER, libc::EV_ADD | libc::EV_CLEAR, Token(0))])?;
        Ok(poll)
    }

    fn change(&self, changes: &[libc::kevent]) -> io::Result<()> {
        // SAFETY: the pointer and the length are those of `changes`, which the call only reads, and
        // there is no space for events.
        let result = unsafe {
            libc::kevent(
                self.queue.as_raw_fd(),
                changes.as_ptr(),
                changes.len() as i32,
                ptr::null_mut(),
                0,
                ptr::null(),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The end of an attempt to connect is told by the filter for writing.
    pub(super) fn add(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let fd = socket.as_raw_fd() as usize;
        self.change(&[
            event(fd, libc::EVFILT_READ, libc::EV_ADD | libc::EV_CLEAR, token),
            event(fd, libc::EVFILT_WRITE, libc::EV_ADD | libc::EV_ONESHOT, token),
        ])
    }

    /// Tells what can be read, and errors.
    pub(super) fn add_reader(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let fd = socket.as_raw_fd() as usize;
        self.change(&[event(fd, libc::EVFILT_READ, libc::EV_ADD | libc::EV_CLEAR, token)])
    }

    pub(super) fn arm_writable(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let flags = libc::EV_ADD | libc::EV_ONESHOT;
        self.change(&[event(socket.as_raw_fd() as usize, libc::EVFILT_WRITE, flags, token)])
    }

    pub(super) fn wait(&self, timeout: Option<Duration>, events: &mut Events) -> io::Result<()> {
        let events = &mut events.events;
        events.clear();
        let timeout = timeout.map(|timeout| libc::timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: the pointer and the length are those of the vector's memory, which nobody else uses,
        // and the time lives until the call returns.
        let count = unsafe {
            libc::kevent(
                self.queue.as_raw_fd(),
                ptr::null(),
                0,
                events.as_mut_ptr(),
                events.capacity() as i32,
                timeout,
            )
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
        };
        // SAFETY: the kernel has written so many events, which is at most the capacity.
        unsafe { events.set_len(count) };
        Ok(())
    }

    pub(super) fn wake(&self) {
        let mut wake = event(WAKER, libc::EVFILT_USER, 0, Token(0));
        wake.fflags = libc::NOTE_TRIGGER;
        // It cannot fail: the event exists as long as the queue does.
        let _ = self.change(&[wake]);
    }
}

fn event(ident: usize, filter: i16, flags: u16, token: Token) -> libc::kevent {
    let udata = ptr::without_provenance_mut(token.0 as usize);
    libc::kevent { ident, filter, flags, fflags: 0, data: 0, udata }
}
