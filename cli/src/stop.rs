//! The request to end a command before its time. The command then reports what it has found so far.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::failure::Failure;
use crate::system;

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

    /// Like [`new`](Self::new), and a signal requests the stop: SIGINT (Ctrl-C), SIGTERM, or SIGHUP
    /// (the terminal has closed). A second signal ends the process at once.
    pub(crate) fn on_signals() -> Result<Self, Failure> {
        Self::on_signals_then(|| {})
    }

    /// Like [`on_signals`](Self::on_signals), and calls `told` after the first signal, on a thread of
    /// its own.
    pub(crate) fn on_signals_then(told: impl FnOnce() + Send + 'static) -> Result<Self, Failure> {
        Self::catch_signals()?.watch(told)
    }

    /// Catches the signals from now on, without a thread that looks at them.
    pub(crate) fn catch_signals() -> Result<Caught, Failure> {
        Self::catch_signals_and(&[])
    }

    /// Likewise, and catches `others`, which end nothing.
    pub(crate) fn catch_signals_and(others: &'static [i32]) -> Result<Caught, Failure> {
        let all = ending_signals().into_iter().chain(others.iter().copied());
        let signals = Signals::new(all).map_err(Self::failed)?;
        Ok(Caught { signals, others, stop: Self::new()? })
    }

    fn failed(error: std::io::Error) -> Failure {
        Failure::Step(format!("signals like Ctrl-C cannot be waited for: {error}"))
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

/// Signals that are caught, and that nobody looks at yet.
#[derive(Debug)]
pub(crate) struct Caught {
    signals: Signals,
    others: &'static [i32],
    stop: Stop,
}

impl Caught {
    /// Starts the thread that looks at them, those that have come already too. It calls `told` after
    /// the first one.
    pub(crate) fn watch(self, told: impl FnOnce() + Send + 'static) -> Result<Stop, Failure> {
        self.watch_and(told, || {})
    }

    /// Likewise. It calls `other` after each signal that ends nothing.
    pub(crate) fn watch_and(
        self,
        told: impl FnOnce() + Send + 'static,
        other: impl Fn() + Send + 'static,
    ) -> Result<Stop, Failure> {
        let Self { mut signals, others, stop } = self;
        let (requested, mut told) = (stop.clone(), Some(told));
        let wait = move || {
            for signal in signals.forever() {
                if others.contains(&signal) {
                    other();
                    continue;
                }
                if requested.is_wanted() {
                    std::process::exit(128 + signal);
                }
                requested.tell();
                if let Some(told) = told.take() {
                    told();
                }
            }
        };
        thread::Builder::new().name("signals".to_owned()).spawn(wait).map_err(Stop::failed)?;
        Ok(stop)
    }
}

/// The signals that end a command with its report. A SIGHUP that is ignored stays ignored, because
/// that is what nohup(1) asks for. SIGINT and SIGTERM are handled in any case: a shell without job
/// control starts every background command with SIGINT ignored, and scripts end such a command with
/// `kill -INT`.
pub(crate) fn ending_signals() -> Vec<i32> {
    let mut signals = vec![SIGINT, SIGTERM];
    if !system::is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    signals
}
