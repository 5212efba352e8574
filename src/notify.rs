//! The notifier, which wakes a sleeper in the way that the sleeper has chosen: a thread that parks,
//! a descriptor that becomes readable, or a `Waker`. The other side calls [`unpark`](Park::unpark)
//! in each case.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::task::Waker;
use std::time::Duration;

use vmring_core::doorbell::Park;

use crate::selector::{Selector, Watch};
use crate::sync::{AtomicBool, AtomicU32, Condvar, Mutex, Ordering};
use crate::sys::{after, lock, now, poll, poll_in};

/// The token of a notifier's own descriptor in a [`Selector`].
pub(crate) const OWN_TOKEN: u64 = u64::MAX;

/// Wakes one sleeper. See the [module](self).
#[derive(Default)]
pub(crate) struct Notifier {
    state: Mutex<State>,
    wakeup: Condvar,
    descriptor: OnceLock<Descriptor>,
    /// Whether the next `unpark` must signal the descriptor. Each arming causes at most one signal.
    descriptor_armed: AtomicBool,
    /// How many signals were begun, and how many the sleeper has read from the descriptor. They wrap.
    /// While they are equal, the descriptor is empty.
    signals: [AtomicU32; 2],
}

#[derive(Default)]
struct State {
    /// Whether there was an `unpark` that no `park` has consumed.
    token: bool,
    /// Whether the sleeper waits for `wakeup`.
    is_parked: bool,
    waker: Option<Waker>,
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier").field("descriptor", &self.descriptor).finish_non_exhaustive()
    }
}

impl Notifier {
    /// Returns the descriptor, which the first call creates. It becomes readable at the first
    /// `unpark` after each [`arm_descriptor`](Self::arm_descriptor).
    pub(crate) fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        if self.descriptor.get().is_none() {
            let created = Descriptor::new()?;
            // If another thread was faster, its descriptor stays and this one is closed.
            let _ = self.descriptor.set(created);
        }
        Ok(self.descriptor.get().expect("set above").readable())
    }

    /// Empties the descriptor, and arms it so that the next `unpark` signals it. Without a
    /// descriptor this does nothing.
    pub(crate) fn arm_descriptor(&self) {
        if let Some(descriptor) = self.descriptor.get() {
            let [begun, read] = &self.signals;
            // Relaxed, all: a signal is counted before it is given. If the count is not seen here, the
            // signal may end one sleep without a reason, and the arming after that reads it.
            let seen = read.load(Ordering::Relaxed);
            if begun.load(Ordering::Relaxed) != seen {
                read.store(seen.wrapping_add(descriptor.drain()), Ordering::Relaxed);
            }
            // Release: pairs with the Acquire in `unpark`, so that the signal comes after the drain
            // and is not emptied by it. (That an `unpark` sees the flag at all is not this
            // ordering's work: the sleeper looks for work after this, behind the fence of
            // `Doorbell::arm` or under the lock of `state`.)
            self.descriptor_armed.store(true, Ordering::Release);
        }
    }

    /// Sets the waker that the next `unpark` wakes.
    pub(crate) fn set_waker(&self, waker: &Waker) {
        let mut state = lock(&self.state);
        match &mut state.waker {
            Some(old) => old.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    /// Parks like [`park`](Park::park), but also returns when `device` is readable.
    pub(crate) fn park_on(&self, timeout: Option<Duration>, device: RawFd) {
        let Ok(own) = self.descriptor() else {
            // Without a descriptor of its own the notifier cannot end the sleep, so the other one is
            // polled for a short time only.
            if !std::mem::take(&mut lock(&self.state).token) {
                let short = timeout.is_none_or(|timeout| !timeout.is_zero());
                poll(&mut [poll_in(device)], short.into());
                lock(&self.state).token = false;
            }
            return;
        };
        let mut polls = [poll_in(device), poll_in(own.as_raw_fd())];
        self.park_in(|| {
            // Rounded up, so that a short sleep does not become a busy loop.
            let millis = timeout
                .map_or(-1, |t| i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
            poll(&mut polls, millis);
        });
    }

    /// Parks like [`park`](Park::park), but also returns when a descriptor of `selector` is readable.
    /// Calls `found` with the token of each one that is. The notifier's own descriptor is in the set,
    /// as [`OWN_TOKEN`].
    pub(crate) fn park_selecting(
        &self,
        timeout: Option<Duration>,
        selector: &Selector,
        mut found: impl FnMut(u64),
    ) {
        self.park_in(|| {
            selector.wait(timeout, |token| {
                if token != OWN_TOKEN {
                    found(token);
                }
            });
        });
    }

    /// Sleeps in `wait`, which ends when the notifier's descriptor is readable.
    fn park_in(&self, wait: impl FnOnce()) {
        self.arm_descriptor();
        if std::mem::take(&mut lock(&self.state).token) {
            return;
        }
        wait();
        lock(&self.state).token = false;
    }
}

impl Park for Notifier {
    fn park(&self, timeout: Option<Duration>) {
        let deadline = timeout.map(after);
        let mut state = lock(&self.state);
        state.is_parked = true;
        while !state.token {
            state = match deadline {
                None => self.wakeup.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(now());
                    if left.is_zero() {
                        break;
                    }
                    self.wakeup
                        .wait_timeout(state, left)
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .0
                }
            };
        }
        (state.token, state.is_parked) = (false, false);
    }

    fn unpark(&self) {
        let (is_parked, waker) = {
            let mut state = lock(&self.state);
            state.token = true;
            (state.is_parked, state.waker.take())
        };
        if is_parked {
            // The lock has been released, so that the woken thread does not wait for it. Without a
            // thread that waits this would be a system call for nothing.
            self.wakeup.notify_one();
        }
        // Acquire: pairs with the Release in `arm_descriptor`, so that the drain there comes before
        // the signal here. The Release half has no partner: only another `unpark` reads the false
        // that is stored here, and it does nothing in that case. Acquire alone would do.
        if self.descriptor_armed.swap(false, Ordering::AcqRel)
            && let Some(descriptor) = self.descriptor.get()
        {
            // Relaxed: see `arm_descriptor`.
            self.signals[0].fetch_add(1, Ordering::Relaxed);
            descriptor.signal();
        }
        if let Some(waker) = waker {
            // The waker is the caller's code and runs on a poller's thread. Its panic must not end
            // the poller.
            if catch_unwind(AssertUnwindSafe(|| waker.wake())).is_err() {
                tracing::error!("a waker panicked");
            }
        }
    }
}

/// A descriptor that one side makes readable and the other side empties: an eventfd on Linux, a
/// pipe elsewhere.
#[derive(Debug)]
struct Descriptor {
    readable: File,
    #[cfg(not(target_os = "linux"))]
    writable: File,
}

impl Descriptor {
    #[cfg(target_os = "linux")]
    fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes two numbers and no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        Ok(Self { readable: own(fd)? })
    }

    #[cfg(not(target_os = "linux"))]
    fn new() -> io::Result<Self> {
        let mut ends = [-1; 2];
        // SAFETY: pipe writes two integers, and `ends` is an array of two that lives through the
        // call.
        if unsafe { libc::pipe(ends.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let [readable, writable] = [own(ends[0])?, own(ends[1])?];
        for end in [&readable, &writable] {
            for (get, set, flag) in [
                (libc::F_GETFD, libc::F_SETFD, libc::FD_CLOEXEC),
                (libc::F_GETFL, libc::F_SETFL, libc::O_NONBLOCK),
            ] {
                let fd = end.as_raw_fd();
                // SAFETY: F_GETFD and F_GETFL take no argument, and `end` keeps the descriptor
                // open.
                let flags = unsafe { libc::fcntl(fd, get) };
                // SAFETY: F_SETFD and F_SETFL take an integer, and `end` keeps the descriptor open.
                if flags < 0 || unsafe { libc::fcntl(fd, set, flags | flag) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(Self { readable, writable })
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }

    fn signal(&self) {
        #[cfg(target_os = "linux")]
        let mut end = &self.readable;
        #[cfg(not(target_os = "linux"))]
        let mut end = &self.writable;
        // This fails only if the counter or the pipe is full. In this case the descriptor is
        // readable already.
        let _ = end.write(&1_u64.to_ne_bytes());
    }

    /// Empties it, and returns how many signals it had.
    fn drain(&self) -> u32 {
        let mut signals = 0;
        // The descriptor is non-blocking: an error or a short read means that nothing is left.
        let mut bytes = [0; 64];
        while let Ok(n) = (&self.readable).read(&mut bytes) {
            // An eventfd has one number, which counts the signals; a pipe has eight bytes for each.
            #[cfg(target_os = "linux")]
            let found = bytes.first_chunk().map_or(0, |count| u64::from_ne_bytes(*count) as u32);
            #[cfg(not(target_os = "linux"))]
            let found = (n / size_of::<u64>()) as u32;
            signals = found.wrapping_add(signals);
            if n < bytes.len() {
                break;
            }
        }
        signals
    }
}

/// A [`Selector`] of two descriptors: the notifier's own, and that of a device while it is watched.
/// It is for callers that sleep in an event loop of their own and drive a device that has a
/// descriptor.
#[derive(Debug)]
pub(crate) struct SelectorPair {
    selector: Selector,
    device: Watch,
}

impl SelectorPair {
    pub(crate) fn new(notifier: &Notifier) -> io::Result<Self> {
        let selector = Selector::new()?;
        selector.add(notifier.descriptor()?.as_raw_fd(), OWN_TOKEN)?;
        Ok(Self { selector, device: Watch::default() })
    }

    pub(crate) fn readable(&self) -> BorrowedFd<'_> {
        self.selector.as_fd()
    }

    /// Watches the descriptor `device` of queue number `queue`; see [`Watch::set`].
    pub(crate) fn watch(&mut self, device: Option<RawFd>, queue: u64) -> io::Result<()> {
        self.device.set(&self.selector, device, queue, || 0)
    }
}

fn own(fd: RawFd) -> io::Result<File> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: every caller passes the result of the call that opened the descriptor. It is open,
    // and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::Instant;

    /// Far longer than a wake-up takes on a slow and busy machine.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn an_unpark_before_the_park_is_remembered_once() {
        let notifier = Notifier::default();
        notifier.unpark();
        let start = Instant::now();
        notifier.park(Some(LONG));
        assert!(start.elapsed() < LONG, "the token was lost");
        let start = Instant::now();
        notifier.park(Some(Duration::from_millis(20)));
        assert!(start.elapsed() >= Duration::from_millis(20), "the token was used twice");
    }

    fn readable(notifier: &Notifier) -> bool {
        let mut polls = [poll_in(notifier.descriptor().unwrap().as_raw_fd())];
        poll(&mut polls, 0);
        polls[0].revents != 0
    }

    #[test]
    fn the_descriptor_is_signalled_once_per_arming() {
        let notifier = Notifier::default();
        assert!(!readable(&notifier));
        notifier.unpark();
        assert!(!readable(&notifier), "signalled without being armed");
        notifier.arm_descriptor();
        assert!(!readable(&notifier));
        notifier.unpark();
        assert!(readable(&notifier));
        notifier.arm_descriptor();
        assert!(!readable(&notifier), "arming empties it");
    }

    /// Goal: an arming makes no system call if nothing was signalled, and a signal that comes after the
    /// arming that should have emptied it does not stay for ever. Method: the test signals the descriptor
    /// without a count. An arming that reads the descriptor would empty it.
    #[test]
    fn arming_reads_only_what_was_signalled() {
        let notifier = Notifier::default();
        assert!(!readable(&notifier));
        for _ in 0..3 {
            notifier.arm_descriptor();
            notifier.unpark();
            assert!(readable(&notifier));
            notifier.arm_descriptor();
            assert!(!readable(&notifier));
        }
        let descriptor = notifier.descriptor.get().expect("made above");
        descriptor.signal();
        notifier.arm_descriptor();
        assert!(readable(&notifier), "it was read although nothing was signalled");
        assert_eq!(descriptor.drain(), 1);

        // An `unpark` that is stopped between its count and its signal.
        assert!(notifier.descriptor_armed.swap(false, Ordering::AcqRel));
        notifier.signals[0].fetch_add(1, Ordering::Relaxed);
        notifier.arm_descriptor();
        descriptor.signal();
        assert!(readable(&notifier));
        notifier.arm_descriptor();
        assert!(!readable(&notifier), "it ends every sleep");
        notifier.unpark();
        assert!(readable(&notifier), "the arming counts");
        notifier.arm_descriptor();
        assert!(!readable(&notifier));
    }

    #[test]
    fn a_sleeper_on_descriptors_is_woken_by_unpark() {
        let notifier = Arc::new(Notifier::default());
        let other = Notifier::default();
        let fd = other.descriptor().unwrap().as_raw_fd();
        let waker = {
            let notifier = notifier.clone();
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(30));
                notifier.unpark();
            })
        };
        let start = Instant::now();
        notifier.park_on(Some(LONG), fd);
        assert!(start.elapsed() < LONG, "not woken");
        waker.join().unwrap();
        other.arm_descriptor();
        other.unpark();
        let start = Instant::now();
        notifier.park_on(Some(LONG), fd);
        assert!(start.elapsed() < LONG, "the other descriptor did not wake it");
    }
}
