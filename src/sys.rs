//! Small functions over the standard library and the system: locks, clocks, threads, poll(2).

use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::sync::{Mutex, MutexGuard};

/// Locks a mutex, even if a thread panicked while it held the lock. The data under this crate's
/// mutexes is valid at every point at which a panic can occur.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Returns the time.
#[cfg(not(loom))]
#[inline(always)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Returns the time. In a model it passes only in [`pass_time`], because loom needs runs that repeat.
#[cfg(loom)]
pub(crate) fn now() -> Instant {
    pass_time(Duration::ZERO)
}

/// Lets time pass in a model, and returns the new time.
#[cfg(loom)]
pub(crate) fn pass_time(time: Duration) -> Instant {
    // One thread of the system runs all threads of a model.
    thread_local!(static NOW: std::cell::Cell<Instant> = std::cell::Cell::new(Instant::now()));
    NOW.set(NOW.get() + time);
    NOW.get()
}

/// Blocks the calling thread for `time`. In a model it lets the other threads run instead.
pub(crate) fn sleep(time: Duration) {
    #[cfg(not(loom))]
    thread::sleep(time);
    #[cfg(loom)]
    {
        let _ = time;
        loom::thread::yield_now();
    }
}

/// Returns the time that is `delay` from now. If the clock cannot represent it, returns the time in
/// a century, which is as good as never.
pub(crate) fn after(delay: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    let now = now();
    now.checked_add(delay).unwrap_or_else(|| now + CENTURY)
}

/// Runs `body` on a thread of its own, for which nobody waits.
///
/// `body` begins when the thread is detached. If a thread ends while it is detached, glibc may free the
/// memory of another thread (its bug 19951).
pub(crate) fn spawn_detached(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let (detached, is_detached) = mpsc::channel::<()>();
    let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Nothing is ever sent. The end of the channel is the signal.
        let _ = is_detached.recv();
        body();
    })?;
    drop(thread);
    drop(detached);
    Ok(())
}

/// Returns an element for [`poll`] that asks whether `fd` is readable. With -1 the kernel ignores
/// the element.
pub(crate) fn poll_in(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

/// Sets `revents` of the elements of `polls` that are readable. Waits up to `millis` milliseconds
/// for one (-1: without a limit).
pub(crate) fn poll(polls: &mut [libc::pollfd], millis: libc::c_int) {
    // SAFETY: pointer and length are those of `polls`, which is exclusively borrowed through the
    // call. The kernel writes only `revents`, for which every value is valid.
    unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, millis) };
}

/// Blocks SIGPIPE for the calling thread, so that writing to a pipe or socket without a reader is
/// an error, in programs that leave the signal at its default too.
#[cfg(feature = "pcap")]
pub(crate) fn block_sigpipe() {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initializes the set before the others read it, and the pointers are
    // used during the calls only. The mask is the calling thread's own.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}

/// Makes reads and writes of `fd` wait.
#[cfg(feature = "pcap")]
pub(crate) fn set_blocking(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    use std::os::fd::AsRawFd;

    // SAFETY: F_GETFL takes no argument, and the borrow keeps the descriptor open.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    let flags = if flags < 0 { flags } else { flags & !libc::O_NONBLOCK };
    // SAFETY: F_SETFL takes a number and no pointer, and the borrow keeps the descriptor open.
    if flags < 0 || unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
