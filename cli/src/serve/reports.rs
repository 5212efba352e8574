//! What a server says while it goes on: reports on a signal, and counters for scrapers. Threads of their
//! own say it, so that a reader who does not read holds up nobody.

use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use super::metrics::Metrics;
use super::server::Asker;
use crate::failure::Failure;
use crate::progress::say;
use crate::report::print;

/// Prints reports, one after the other.
#[derive(Debug, Default)]
pub(super) struct Printer(Option<JoinHandle<()>>);

impl Printer {
    /// Prints a report. If nobody has read the last one yet, this one is not made.
    pub(super) fn print(&mut self, report: impl FnOnce() -> Result<String, Failure>) {
        if self.0.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return say("  the last report is not read yet, so there is no new one");
        }
        let report = report();
        let body = move || {
            if let Err(failure) = report.and_then(|report| print(&report)) {
                say(&format!("  no report: {failure}"));
            }
        };
        // Without a thread there is no report, and the server goes on.
        self.0 = thread::Builder::new().name("report".to_owned()).spawn(body).ok();
    }

    /// Waits until the last report is printed, so that it is not mixed with what follows.
    pub(super) fn finish(&mut self) {
        if let Some(thread) = self.0.take() {
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}

/// The thread that answers scrapers. Dropping this ends it.
#[derive(Debug)]
pub(super) struct Scraping {
    thread: Option<JoinHandle<()>>,
    /// The thread ends when this is closed.
    stop: Option<UnixStream>,
}

impl Scraping {
    pub(super) fn start(
        metrics: Metrics,
        (stop, stopped): (UnixStream, UnixStream),
        asker: Asker,
    ) -> Result<Self, Failure> {
        let body = move || metrics.run(&stopped, || Some(asker.figures()?.text()));
        let thread = thread::Builder::new().name("metrics".to_owned()).spawn(body);
        let failed = |error| Failure::Step(format!("the counters cannot be shown: {error}"));
        Ok(Self { thread: Some(thread.map_err(failed)?), stop: Some(stop) })
    }
}

impl Drop for Scraping {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It removes its socket, and has nothing to tell.
            let _ = thread.join();
        }
    }
}
