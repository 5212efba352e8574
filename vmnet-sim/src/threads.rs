//! Threads for which nobody waits.

use std::sync::mpsc;
use std::thread;

/// Runs `body` on a thread of this name.
///
/// `body` begins when the thread is detached. If a thread ends while it is detached, glibc may free the
/// memory of another thread (its bug 19951).
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    let (detached, is_detached) = mpsc::channel::<()>();
    let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Nothing is ever sent. The end of the channel is the signal.
        let _ = is_detached.recv();
        body();
    });
    drop(thread.expect("a thread"));
    drop(detached);
}
