//! [`Selector`]: many descriptors behind one, which is readable when one of them is. It is an epoll
//! set on Linux and a kqueue elsewhere. A sleep on it costs the same for ten descriptors and for
//! thousands.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// How many ready descriptors one look reports. The others stay ready. The kernel reports them at the
/// next look, before these.
const BATCH: usize = 32;

/// A set of descriptors that are waited for until they are readable.
///
/// The kernel takes a descriptor out when it is closed, unless a copy of it is open, perhaps in another
/// process. Then it goes on reporting the closed one, and only a new set does not.
#[derive(Debug)]
pub(crate) struct Selector {
    fd: OwnedFd,
}

impl AsFd for Selector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(target_os = "linux")]
impl Selector {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: epoll_create1 takes no pointers.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the kernel has just opened this descriptor, and nobody else owns it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Adds a descriptor, whose readiness is reported as `token`. If it is in the set, `token` takes the
    /// place of its token.
    ///
    /// # Errors
    ///
    /// What the system says of a descriptor that it cannot wait for, such as that of a regular file.
    pub(crate) fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        match self.control(libc::EPOLL_CTL_ADD, fd, token) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.control(libc::EPOLL_CTL_MOD, fd, token)
            }
            outcome => outcome,
        }
    }

    /// Takes a descriptor out, which is open.
    pub(crate) fn remove(&self, fd: RawFd) {
        // It fails only if the descriptor is not in the set.
        let _ = self.control(libc::EPOLL_CTL_DEL, fd, 0);
    }

    fn control(&self, operation: libc::c_int, fd: RawFd, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        // SAFETY: `event` is a local variable, so the pointer is valid through the call. The kernel
        // copies the event and keeps no pointer to it. Any number may be given as a descriptor.
        check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), operation, fd, &mut event) })?;
        Ok(())
    }

    /// Waits up to `timeout` (`None`: without a limit) for a descriptor that is readable. Calls `found`
    /// with the token of each one that is.
    pub(crate) fn wait(&self, timeout: Option<Duration>, mut found: impl FnMut(u64)) {
        // Rounded up, so that a short sleep does not become a busy loop.
        let millis =
            timeout.map_or(-1, |t| i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        // SAFETY: the pointer and the number are those of `events`, which lives through the call.
        let count = unsafe {
            libc::epoll_wait(self.fd.as_raw_fd(), events.as_mut_ptr(), BATCH as libc::c_int, millis)
        };
        // An error is a signal that came in between. What is readable stays readable.
        for event in events.iter().take(usize::try_from(count).unwrap_or(0)) {
            found(event.u64);
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Selector {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: kqueue takes no arguments.
        let fd = check(unsafe { libc::kqueue() })?;
        // SAFETY: the kernel has just opened this descriptor, and nobody else owns it. A child process
        // does not inherit a kqueue.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Adds a descriptor, whose readiness is reported as `token`. If it is in the set, `token` takes the
    /// place of its token.
    ///
    /// # Errors
    ///
    /// What the system says of a descriptor that it cannot wait for.
    pub(crate) fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.change(fd, libc::EV_ADD, token)
    }

    /// Takes a descriptor out, which is open.
    pub(crate) fn remove(&self, fd: RawFd) {
        // It fails only if the descriptor is not in the set.
        let _ = self.change(fd, libc::EV_DELETE, 0);
    }

    fn change(&self, fd: RawFd, flags: u16, token: u64) -> io::Result<()> {
        let change = kevent(fd as usize, flags, token);
        // SAFETY: the pointer is to one change, which lives through the call, and there is no space for
        // events.
        check(unsafe {
            libc::kevent(self.fd.as_raw_fd(), &change, 1, std::ptr::null_mut(), 0, std::ptr::null())
        })?;
        Ok(())
    }

    /// Waits up to `timeout` (`None`: without a limit) for a descriptor that is readable. Calls `found`
    /// with the token of each one that is.
    pub(crate) fn wait(&self, timeout: Option<Duration>, mut found: impl FnMut(u64)) {
        let timeout = timeout.map(|timeout| libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let mut events = [kevent(0, 0, 0); BATCH];
        // SAFETY: the pointers are to values of this function, or null, and the number is that of
        // `events`.
        let count = unsafe {
            libc::kevent(
                self.fd.as_raw_fd(),
                std::ptr::null(),
                0,
                events.as_mut_ptr(),
                BATCH as libc::c_int,
                timeout,
            )
        };
        // An error is a signal that came in between. What is readable stays readable.
        for event in events.iter().take(usize::try_from(count).unwrap_or(0)) {
            found(event.udata as usize as u64);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn kevent(ident: usize, flags: u16, token: u64) -> libc::kevent {
    libc::kevent {
        ident,
        filter: libc::EVFILT_READ,
        flags,
        fflags: 0,
        data: 0,
        udata: token as usize as *mut libc::c_void,
    }
}

/// Returns the error of a call that returned a negative number.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The descriptor of a device in a [`Selector`], or none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Watch {
    /// The descriptor, the number of the queue that it belongs to, and its token.
    of: Option<(RawFd, u64, u64)>,
}

impl Watch {
    /// Returns the descriptor that is watched.
    pub(crate) fn descriptor(&self) -> Option<RawFd> {
        self.of.map(|(fd, ..)| fd)
    }

    /// Returns the token of the descriptor that is watched.
    pub(crate) fn token(&self) -> Option<u64> {
        self.of.map(|(_, _, token)| token)
    }

    /// Watches the descriptor `device` of queue number `queue`, as `token()`. `None` watches none.
    ///
    /// The number tells the queues of one ring apart. When a queue is closed, its descriptor is closed,
    /// and another file may have that descriptor by now. So it must not be taken out here.
    ///
    /// # Errors
    ///
    /// What the system says of the descriptor. Nothing is watched in this case.
    pub(crate) fn set(
        &mut self,
        selector: &Selector,
        device: Option<RawFd>,
        queue: u64,
        token: impl FnOnce() -> u64,
    ) -> io::Result<()> {
        if self.of.map(|(fd, of, _)| (fd, of)) == device.map(|fd| (fd, queue)) {
            return Ok(());
        }
        if let Some((fd, of, _)) = self.of.take()
            && of == queue
        {
            selector.remove(fd);
        }
        if let Some(fd) = device {
            let token = token();
            selector.add(fd, token)?;
            self.of = Some((fd, queue, token));
        }
        Ok(())
    }

    /// Adds the descriptor to a new set, in place of the old one.
    ///
    /// # Errors
    ///
    /// What the system says of the descriptor. Nothing is watched in this case.
    pub(crate) fn renew(&mut self, selector: &Selector) -> io::Result<()> {
        let Some((fd, _, token)) = self.of else { return Ok(()) };
        selector.add(fd, token).inspect_err(|_| self.of = None)
    }
}
