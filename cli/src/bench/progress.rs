//! The progress of the measurement, and whether to continue.

use std::time::{Duration, Instant};

use crate::progress::Progress;
use crate::stop::Stop;

/// Looked at only between intervals, so that it costs the measurement nothing.
#[derive(Debug)]
pub(crate) struct Clock<'a> {
    stop: &'a Stop,
    progress: Option<Progress>,
    start: Instant,
    total: Duration,
}

impl<'a> Clock<'a> {
    /// Starts the clock for a measurement that takes `total`. `what` is shown to people.
    pub(crate) fn start(stop: &'a Stop, total: Duration, what: Option<&str>) -> Self {
        let progress = what.map(|what| Progress::of_time(what, total));
        Self { stop, progress, start: Instant::now(), total }
    }

    /// Shows the progress. Returns whether to continue.
    pub(crate) fn tick(&mut self) -> bool {
        if let Some(progress) = &mut self.progress {
            // Starting and closing take time beyond what was asked for.
            progress.at_time(self.start.elapsed().min(self.total));
        }
        !self.stop.is_wanted()
    }
}
