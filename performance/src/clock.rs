//! Wall time and the calling thread's processor time, together.

use std::time::{Duration, Instant};

/// A moment in both times.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    wall: Instant,
    cpu: Duration,
}

/// What passed between two moments.
#[derive(Clone, Copy, Default)]
pub(crate) struct Elapsed {
    /// On the clock on the wall.
    pub(crate) wall: Duration,
    /// On the calling thread's processor: what other programs of the machine took is not in it.
    pub(crate) cpu: Duration,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { wall: Instant::now(), cpu: thread_time() }
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

fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes one timespec, which outlives the call. It cannot fail: every Linux
    // has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
