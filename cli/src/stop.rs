//! The request to end a command before its time. The command then reports what it has found so far.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::failure::Failure;

/// See the [module](self).
#[derive(Clone, Debug)]
pub(crate) struct Stop {
    wanted: Arc<AtomicBool>,
    /// The first end is readable once a stop is requested; writing to the second end requests it.
    bell: Arc<(UnixStream, UnixStream)>,
}

impl Stop {
    pub(crate) fn new() -> Result<Self, Failure> {
        let bell = UnixStream::pair().map_err(Self::failed)?;
        Ok(Self { wanted: Arc::default(), bell: Arc::new(bell) })
    }

    /// Like [`new`](Self::new), and Ctrl-C requests the stop. A second Ctrl-C ends the process at
    /// once.
    pub(crate) fn on_signals() -> Result<Self, Failure> {
        let stop = Self::new()?;
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(Self::failed)?;
        let told = stop.clone();
        let wait = move || {
            for signal in signals.forever() {
                if told.is_wanted() {
                    std::process::exit(128 + signal);
                }
                told.tell();
            }
        };
        thread::Builder::new().name("signals".to_owned()).spawn(wait).map_err(Self::failed)?;
        Ok(stop)
    }

    fn failed(error: std::io::Error) -> Failure {
        Failure::Step(format!("Ctrl-C cannot be waited for: {error}"))
    }

    pub(crate) fn tell(&self) {
        self.wanted.store(true, Ordering::Release);
        // There is always space for one byte.
        let _ = (&self.bell.1).write(&[1]);
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// A descriptor that is readable once a stop is requested.
    pub(crate) fn bell(&self) -> RawFd {
        self.bell.0.as_raw_fd()
    }
}
