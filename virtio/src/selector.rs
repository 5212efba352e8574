//! [`Selector`]: many descriptors behind one, which is readable when one of them is. It is an epoll
//! set on Linux and a kqueue elsewhere. The system calls are in here and nowhere else.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::sys::check;

/// How many ready descriptors one look reports. The others stay ready, and are in the next look.
const BATCH: usize = 32;

/// A set of descriptors that are waited for until they are readable.
#[derive(Debug)]
pub(crate) struct Selector {
    fd: OwnedFd,
}

impl AsFd for Selector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
impl Selector {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: the call takes a number only.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the kernel has just opened this descriptor, and nobody else has it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Adds a descriptor, whose readiness is reported as `token`.
    pub(crate) fn add(&self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token.into() };
        self.control(libc::EPOLL_CTL_ADD, fd, &mut event)
    }

    /// Takes a descriptor out. It must be open still: the kernel goes on reporting a descriptor that
    /// was closed while another process has a copy.
    pub(crate) fn remove(&self, fd: BorrowedFd<'_>) {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // It fails only if the descriptor is not in the set.
        let _ = self.control(libc::EPOLL_CTL_DEL, fd, &mut event);
    }

    fn control(
        &self,
        operation: libc::c_int,
        fd: BorrowedFd<'_>,
        event: &mut libc::epoll_event,
    ) -> io::Result<()> {
        // SAFETY: both descriptors are open, as they are borrowed, and the pointer is to a value that
        // lives until the call returns.
        check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), operation, fd.as_raw_fd(), event) })?;
        Ok(())
    }

    /// Calls `found` with the tokens of descriptors that are readable now. It does not wait.
    pub(crate) fn ready(&self, mut found: impl FnMut(u32)) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        // SAFETY: the pointer and the number are those of `events`, which lives until the call
        // returns.
        let count = unsafe {
            libc::epoll_wait(self.fd.as_raw_fd(), events.as_mut_ptr(), BATCH as libc::c_int, 0)
        };
        // An error is a signal that came in between. What is ready stays ready.
        let count = usize::try_from(count).unwrap_or(0);
        for event in &events[..count] {
            found(event.u64 as u32);
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
impl Selector {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: the call takes nothing.
        let fd = check(unsafe { libc::kqueue() })?;
        // SAFETY: the kernel has just opened this descriptor, and nobody else has it. A kqueue is not
        // inherited by child processes, and closes at exec by itself.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Adds a descriptor, whose readiness is reported as `token`.
    pub(crate) fn add(&self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        self.change(fd, libc::EV_ADD, token)
    }

    /// Takes a descriptor out.
    pub(crate) fn remove(&self, fd: BorrowedFd<'_>) {
        // It fails only if the descriptor is not in the set.
        let _ = self.change(fd, libc::EV_DELETE, 0);
    }

    fn change(&self, fd: BorrowedFd<'_>, flags: u16, token: u32) -> io::Result<()> {
        let change = kevent(fd.as_raw_fd() as usize, flags, token);
        // SAFETY: the pointer is to one change, which lives until the call returns, and there is no
        // space for events.
        check(unsafe {
            libc::kevent(self.fd.as_raw_fd(), &change, 1, std::ptr::null_mut(), 0, std::ptr::null())
        })?;
        Ok(())
    }

    /// Calls `found` with the tokens of descriptors that are readable now. It does not wait.
    pub(crate) fn ready(&self, mut found: impl FnMut(u32)) {
        let mut events = [kevent(0, 0, 0); BATCH];
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointers are to values of this function, and the number is that of `events`.
        let count = unsafe {
            libc::kevent(
                self.fd.as_raw_fd(),
                std::ptr::null(),
                0,
                events.as_mut_ptr(),
                BATCH as libc::c_int,
                &now,
            )
        };
        // An error is a signal that came in between. What is ready stays ready.
        let count = usize::try_from(count).unwrap_or(0);
        for event in &events[..count] {
            found(event.udata as usize as u32);
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn kevent(ident: usize, flags: u16, token: u32) -> libc::kevent {
    libc::kevent {
        ident,
        filter: libc::EVFILT_READ,
        flags,
        fflags: 0,
        data: 0,
        udata: token as usize as *mut libc::c_void,
    }
}

/// What a descriptor is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Read,
    Write,
}

/// Waits until one of the descriptors is as wished, has failed or has lost its other end, or until
/// `timeout` has passed (`None`: for ever). Returns for each descriptor whether it was that one.
pub(crate) fn wait<const N: usize>(
    fds: [Option<(BorrowedFd<'_>, Wish)>; N],
    timeout: Option<Duration>,
) -> [bool; N] {
    let mut entries = fds.map(|fd| libc::pollfd {
        // poll(2) leaves a negative one out.
        fd: fd.map_or(-1, |(fd, _)| fd.as_raw_fd()),
        events: match fd {
            Some((_, Wish::Write)) => libc::POLLOUT,
            _ => libc::POLLIN,
        },
        revents: 0,
    });
    // A millisecond more rather than less: who wakes too early would come again at once.
    let timeout = timeout.map_or(-1, |timeout| {
        let millis = timeout.as_nanos().div_ceil(1_000_000);
        libc::c_int::try_from(millis).unwrap_or(libc::c_int::MAX)
    });
    // SAFETY: the pointer and the number are those of `entries`, which lives until the call returns.
    let result = unsafe { libc::poll(entries.as_mut_ptr(), N as libc::nfds_t, timeout) };
    match result {
        // A signal came in between. The caller looks, and waits again.
        ..0 => [false; N],
        _ => entries.map(|entry| entry.revents != 0),
    }
}
