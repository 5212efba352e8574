//! Progress on stderr for people: a bar on a terminal, a few lines elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The shortest time between two lines about the same thing.
const QUIET: Duration = Duration::from_secs(5);

/// Prints `text` to stderr.
pub(crate) fn say(text: &str) {
    // If this fails there is nobody to report it to.
    let _ = writeln!(io::stderr(), "{text}");
}

/// The progress of something long.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    total: u64,
    quarter: u64,
    said: Instant,
}

impl Progress {
    /// Progress in bytes, shown with the rate.
    pub(crate) fn of_bytes(what: &str, total: u64) -> Self {
        let template = "  {msg} {wide_bar} {binary_bytes} of {binary_total_bytes}, \
                        {binary_bytes_per_sec}, {eta} left";
        Self::new(what, total, template)
    }

    /// Progress in time.
    pub(crate) fn of_time(what: &str, total: Duration) -> Self {
        Self::new(what, total.as_millis() as u64, "  {msg} {wide_bar} {eta} left")
    }

    fn new(what: &str, total: u64, template: &str) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(template);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what.to_owned());
            bar
        });
        if bar.is_none() {
            say(&format!("  {what}"));
        }
        Self { bar, what: what.to_owned(), total, quarter: 0, said: Instant::now() }
    }

    /// Shows that `position` has been reached.
    pub(crate) fn at(&mut self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            return;
        }
        let quarter = (u128::from(position) * 4 / u128::from(self.total.max(1))) as u64;
        if quarter > self.quarter && quarter < 4 && self.said.elapsed() >= QUIET {
            (self.quarter, self.said) = (quarter, Instant::now());
            say(&format!("  {}: {} %", self.what, quarter * 25));
        }
    }

    /// Like [`at`](Self::at), for a time.
    pub(crate) fn at_time(&mut self, position: Duration) {
        self.at(position.as_millis() as u64);
    }

    /// Whether there is a bar on a terminal, so that updates are worth the effort.
    pub(crate) fn is_watched(&self) -> bool {
        self.bar.is_some()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A line on a terminal that is updated in place. It does nothing if stderr is not a terminal.
#[derive(Debug)]
pub(crate) struct Live {
    bar: Option<ProgressBar>,
}

impl Live {
    pub(crate) fn start() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("  {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self { bar }
    }

    /// Whether stderr is a terminal.
    pub(crate) fn is_watched(&self) -> bool {
        self.bar.is_some()
    }

    /// Replaces the line.
    pub(crate) fn show(&self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(line.to_owned());
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
