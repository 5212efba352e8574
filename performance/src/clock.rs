//! Wall time and processor time, together.

use std::io;
use std::time::{Duration, Instant};

use crate::net::check;

/// A moment on both clocks.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    wall: Instant,
    cpu: Duration,
}

/// The time between two moments.
#[derive(Clone, Copy, Default)]
pub(crate) struct Elapsed {
    /// Wall time.
    pub(crate) wall: Duration,
    /// Processor time of all threads of this program, because a contender may have threads of its
    /// own. It does not contain what other programs of the machine used.
    pub(crate) cpu: Duration,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { wall: Instant::now(), cpu: Processor::PROGRAM.time() }
    }

    /// The elapsed wall time only, which costs no system call.
    pub(crate) fn wall_elapsed(&self) -> Duration {
        self.wall.elapsed()
    }

    pub(crate) fn elapsed(&self) -> Elapsed {
        let now = Self::now();
        Elapsed { wall: now.wall - self.wall, cpu: now.cpu - self.cpu }
    }
}

impl std::ops::AddAssign for Elapsed {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

/// A clock of one thread's processor time, which any thread of the program may read.
#[derive(Clone, Copy)]
pub(crate) struct Processor(libc::clockid_t);

impl Processor {
    const PROGRAM: Self = Self(libc::CLOCK_PROCESS_CPUTIME_ID);

    /// The clock of the calling thread. Once that thread has ended, the clock says zero.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        let mut clock = 0;
        // SAFETY: the thread is the calling one, and the clock's name outlives the call.
        match unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) } {
            0 => Ok(Self(clock)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    pub(crate) fn time(self) -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: clock_gettime writes one timespec, which outlives the call.
        match check(unsafe { libc::clock_gettime(self.0, &raw mut time) }) {
            Ok(_) => Duration::new(time.tv_sec as u64, time.tv_nsec as u32),
            Err(_) => Duration::ZERO,
        }
    }
}
