//! Progress on stderr for people: a bar on a terminal, a few lines elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::fold;

/// The shortest time between two lines about the same thing.
const QUIET: Duration = Duration::from_secs(5);

/// Prints `text` to stderr, in lines of at most 80 columns.
pub(crate) fn say(text: &str) {
    // If this fails there is nobody to report it to.
    let _ = io::stderr().write_all(fold(text).as_bytes());
}

/// The templates of the bars. The longest message leaves some columns for the bar on a terminal of
/// 80 columns.
const BYTES: &str = "  {msg} {wide_bar} {percent} %, {binary_bytes_per_sec}, {eta} left";
const TIME: &str = "  {msg} {wide_bar} {eta} left";

fn bar(target: ProgressDrawTarget, what: &str, total: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let style = ProgressStyle::with_template(template);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar
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
        Self::new(what, total, BYTES)
    }

    /// Progress in time.
    pub(crate) fn of_time(what: &str, total: Duration) -> Self {
        Self::new(what, total.as_millis() as u64, TIME)
    }

    fn new(what: &str, total: u64, template: &str) -> Self {
        let bar = io::stderr()
            .is_terminal()
            .then(|| bar(ProgressDrawTarget::stderr(), what, total, template));
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

/// Lines on a terminal that are updated in place. It does nothing if stderr is not a terminal.
#[derive(Debug)]
pub(crate) struct Live {
    bar: Option<ProgressBar>,
}

impl Live {
    pub(crate) fn start() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self { bar }
    }

    /// Lines that nobody sees.
    pub(crate) fn off() -> Self {
        Self { bar: None }
    }

    /// Whether stderr is a terminal, and the lines are shown.
    pub(crate) fn is_watched(&self) -> bool {
        self.bar.is_some()
    }

    /// Replaces the lines.
    pub(crate) fn show(&self, lines: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(lines.to_owned());
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use indicatif::TermLike;

    use super::*;

    /// A terminal of 80 columns, which keeps what is written to it.
    #[derive(Clone, Debug, Default)]
    struct Terminal(Arc<Mutex<String>>);

    impl TermLike for Terminal {
        fn width(&self) -> u16 {
            80
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, line: &str) -> io::Result<()> {
            self.write_str(line)?;
            self.write_str("\n")
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            self.write_str("\n")
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bar_and_all_its_words_fit_into_80_columns() {
        for (template, what, said) in [
            (BYTES, "sending 999.99 GiB from guest0 to kernel", "50 %"),
            (BYTES, "sending 1 GiB from guest0 to guest1", "50 %"),
            (TIME, "measuring the vmnet-sim device; Ctrl-C ends it", "left"),
        ] {
            let terminal = Terminal::default();
            let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
            let bar = bar(target, what, 1 << 40, template);
            bar.set_position((1 << 39) - 1);
            bar.force_draw();
            let drawn = terminal.0.lock().unwrap().clone();
            let line = drawn.lines().rfind(|line| line.contains(said)).expect(&drawn);
            assert!(line.trim_end().chars().count() <= 80, "{line}");
            assert!(line.contains(what), "{line}");
            assert!(line.trim_end().ends_with(" left"), "it is cut: {line}");
            assert!(line.contains('█'), "there is no place for the bar: {line}");
        }
    }
}
