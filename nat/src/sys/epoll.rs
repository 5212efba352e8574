//! What is ready, by Linux's epoll.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::sockets::{Readiness, Token};

/// The data of the event of the waker. No socket has this token.
const WAKER: u64 = u64::MAX;
/// What a socket is told of. `EPOLLHUP` and `EPOLLERR` always are.
const INTEREST: i32 =
    libc::EPOLLIN | libc::EPOLLPRI | libc::EPOLLRDHUP | libc::EPOLLOUT | libc::EPOLLET;

/// Space for what is ready.
#[derive(Debug)]
pub struct Events {
    events: Vec<libc::epoll_event>,
}

impl Events {
    /// Space for so many at once, at least one.
    pub fn new(len: usize) -> Self {
        Self { events: Vec::with_capacity(len.clamp(1, i32::MAX as usize)) }
    }

    /// What is ready.
    pub fn iter(&self) -> impl Iterator<Item = (Token, Readiness)> + '_ {
        // The fields are copied, because they are not aligned.
        let events = self.events.iter().map(|event| ({ event.u64 }, { event.events } as i32));
        events.filter(|&(data, _)| data != WAKER).map(|(data, events)| {
            let has = |flag| events & flag != 0;
            let readiness = Readiness {
                readable: has(libc::EPOLLIN),
                writable: has(libc::EPOLLOUT),
                closed: has(libc::EPOLLRDHUP | libc::EPOLLHUP),
                urgent: has(libc::EPOLLPRI),
                // EPOLLHUP alone means that both directions have ended, which is no error. To ask for
                // one would take two calls for each connection that ends well.
                failed: has(libc::EPOLLERR),
            };
            (Token(data), readiness)
        })
    }
}

/// An epoll set and an eventfd.
#[derive(Debug)]
pub(super) struct Poll {
    set: OwnedFd,
    waker: OwnedFd,
}

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: the call takes a number only.
        let set = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the call takes numbers only.
        let waker = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        let poll = Self { set, waker };
        let interest = libc::EPOLLIN | libc::EPOLLET;
        poll.control(libc::EPOLL_CTL_ADD, poll.waker.as_fd(), interest, WAKER)?;
        Ok(poll)
    }

    fn control(&self, what: i32, fd: BorrowedFd<'_>, interest: i32, data: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest as u32, u64: data };
        // SAFETY: the pointer is to `event`, which the call only reads.
        let result =
            unsafe { libc::epoll_ctl(self.set.as_raw_fd(), what, fd.as_raw_fd(), &raw mut event) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(super) fn add(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, socket, INTEREST, token.0)
    }

    /// Tells what can be read, and errors, and not that the socket takes something again: a socket of
    /// datagrams would say so for each that it has sent (`sock_wfree` in net/core/sock.c).
    pub(super) fn add_reader(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, socket, libc::EPOLLIN | libc::EPOLLET, token.0)
    }

    /// A change looks at the socket anew: if it takes bytes, that is told, and if not, the kernel notes
    /// that somebody waits for it (`tcp_poll` in net/ipv4/tcp.c).
    pub(super) fn arm_writable(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, socket, INTEREST, token.0)
    }

    pub(super) fn wait(&self, timeout: Option<Duration>, events: &mut Events) -> io::Result<()> {
        let events = &mut events.events;
        events.clear();
        // Rounded up, so that nobody is woken just before the time that he waits for.
        let timeout = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        // SAFETY: the pointer and the length are those of the vector's memory, which nobody else uses.
        let count = unsafe {
            libc::epoll_wait(
                self.set.as_raw_fd(),
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
        // The waker's count is not read: its readiness is told once for each write (`EPOLLET`), and the
        // count does not come to its end.
        Ok(())
    }

    pub(super) fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the pointer and the length are those of `one`. It fails after 2^64 - 2 writes.
        unsafe { libc::write(self.waker.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system has just opened this descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
