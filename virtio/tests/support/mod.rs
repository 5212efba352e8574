//! What the tests share: a watchdog, dice, and a count of allocations.

mod counting;

pub(crate) use counting::allocations;

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Far longer than any test needs on a slow and busy machine. A test that reaches this hangs.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// Runs `body` on a thread of its own. If it does not end, panics with what it was to do instead of
/// hanging the whole run.
pub(crate) fn guarded(what: &str, body: impl FnOnce() + Send + 'static) {
    let (ended, ending) = mpsc::sync_channel::<()>(1);
    let thread = thread::spawn(move || {
        body();
        drop(ended);
    });
    // The sender is dropped when the body returns or panics.
    if ending.recv_timeout(LONG) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("it does not end; it hangs in: {what}");
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Waits until `done` returns true. Panics with what it waits for if that does not happen.
pub(crate) fn eventually(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < LONG, "it does not happen: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Whether a value does not change for a while. A busy machine may need several attempts.
pub(crate) fn is_constant<T: PartialEq>(value: impl Fn() -> T) -> bool {
    let before = value();
    thread::sleep(Duration::from_millis(300));
    value() == before
}

/// `n`, or a tenth of it if everything is slow (`VMRING_TEST_SCALE=small`: sanitizers, emulators).
pub(crate) fn scaled(n: u64) -> u64 {
    if std::env::var_os("VMRING_TEST_SCALE").is_some_and(|scale| scale == "small") {
        (n / 10).max(1)
    } else {
        n
    }
}

/// A small pseudo-random generator (xorshift64*), so that a failure can be repeated.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}
