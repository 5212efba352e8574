//! Small helpers over the standard library and the system: locks, clocks, poll(2).

use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Locks, also after a panic elsewhere: what the mutexes here guard is valid at every point.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The time `delay` from now. One too far for the clock is a century away, which is for ever.
pub(crate) fn after(delay: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    let now = Instant::now();
    now.checked_add(delay).unwrap_or_else(|| now + CENTURY)
}

/// The wish to know whether `fd` is readable. With -1, a place that is never.
pub(crate) fn poll_in(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

/// Finds out which of `polls` are readable, waiting up to `millis` for one (-1: for ever).
pub(crate) fn poll(polls: &mut [libc::pollfd], millis: libc::c_int) {
    // SAFETY: the pointer and length are of a live, exclusively borrowed slice; the kernel writes
    // `revents` only.
    unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, millis) };
}
