//! How far it has come, and whether to go on.

use std::time::{Duration, Instant};

use crate::progress::Progress;
use crate::stop::Stop;

/// Looked at between intervals, so that it costs what is measured nothing.
#[derive(Debug)]
pub(crate) struct Clock<'a> {
    stop: &'a Stop,
    progress: Option<Progress>,
    start: Instant,
    total: Duration,
}

impl<'a> Clock<'a> {
    /// For all that takes `total`; `what` is for people.
    pub(crate) fn start(stop: &'a Stop, total: Duration, what: Option<&str>) -> Self {
        let progress = what.map(|what| Progress::of_time(what, total));
        Self { stop, progress, start: Instant::now(), total }
    }

    /// Shows how far it is. Whether to go on.
    pub(crate) fn tick(&mut self) -> bool {
        if let Some(progress) = &mut self.progress {
            // Starts and closes come on top of what was asked for.
            progress.at_time(self.start.elapsed().min(self.total));
        }
        !self.stop.is_wanted()
    }
}
