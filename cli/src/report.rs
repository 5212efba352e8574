//! Results, for people and for programs.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;
use vmring::device::Offloads;
use vmring::stats::Histogram;

use crate::failure::Failure;

/// Prints to stdout. It is not a failure if the reader has gone away.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let newline = if text.ends_with('\n') { "" } else { "\n" };
    match write!(out, "{text}{newline}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Step(format!("the result could not be printed: {error}")))
        }
        _ => Ok(()),
    }
}

/// Prints a report for people to stdout, in lines of at most [`WIDTH`] columns.
pub(crate) fn print_report(report: &str) -> Result<(), Failure> {
    print(&fold(report))
}

/// Prints one JSON object to stdout.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&in_json(value)?)
}

/// A JSON object.
pub(crate) fn in_json(value: &impl Serialize) -> Result<String, Failure> {
    let failed = |error| Failure::Step(format!("the result could not be printed: {error}"));
    serde_json::to_string_pretty(value).map_err(failed)
}

/// Columns of the narrowest terminal that a report is made for.
pub(crate) const WIDTH: usize = 80;

/// Breaks lines that are longer than [`WIDTH`] between words. A continued line is indented by two
/// spaces more than its first. A word that is longer than a line stays whole.
pub(crate) fn fold(text: &str) -> String {
    let mut folded = String::new();
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        let mut rest = line;
        let mut room = WIDTH;
        while rest.chars().count() > room {
            let (start, end) = broken(rest, room, if room == WIDTH { indent } else { 0 });
            folded.push_str(start);
            if end.is_empty() {
                rest = end;
                break;
            }
            folded.push('\n');
            folded.extend(std::iter::repeat_n(' ', indent + 2));
            (rest, room) = (end, WIDTH - indent - 2);
        }
        folded.push_str(rest);
        folded.push('\n');
    }
    folded
}

/// Breaks a text that is longer than `room` characters at the last blank that leaves the first part
/// no longer, or else at the first blank. The first `indent` bytes are no place for a break.
fn broken(text: &str, room: usize, indent: usize) -> (&str, &str) {
    let blanks = || text.match_indices(' ').map(|(at, _)| at).filter(|at| *at > indent);
    let fitting = blanks().take_while(|at| text[..*at].chars().count() <= room).last();
    match fitting.or_else(|| blanks().next()) {
        Some(at) => (&text[..at], text[at..].trim_start()),
        None => (text, ""),
    }
}

/// A table of text, no wider than [`WIDTH`] if its columns allow that. The first column is aligned to the left, the others to the right, unless
/// [`left`](Self::left) was called.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    all_left: bool,
}

impl Table {
    pub(crate) fn new(heading: &[&str]) -> Self {
        let mut table = Self::default();
        table.row(heading.iter().map(ToString::to_string));
        table
    }

    /// Aligns every column to the left.
    pub(crate) fn left(mut self) -> Self {
        self.all_left = true;
        self
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table as text, each line indented by two spaces. In a table that is wider than
    /// [`WIDTH`], the last column is folded if it has text, and the first one is shortened
    /// otherwise.
    pub(crate) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let mut widths: Vec<_> = (0..columns).map(width).collect();
        let excess = widths.iter().map(|width| width + 2).sum::<usize>().saturating_sub(WIDTH);
        let (mut first, mut last) = (usize::MAX, usize::MAX);
        if excess > 0 && self.all_left && widths[columns - 1] >= excess + LEAST {
            widths[columns - 1] -= excess;
            last = widths[columns - 1];
        } else if excess > 0 {
            widths[0] = widths[0].saturating_sub(excess).max(LEAST.min(widths[0]));
            first = widths[0];
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut row: Vec<_> = row.iter().map(|cell| Cow::from(cell.as_str())).collect();
            if let Some(cell) = row.first_mut() {
                *cell = shortened(std::mem::take(cell), first);
            }
            // The lines of the last cell stand under each other.
            let mut rest = String::new();
            if row.len() == columns
                && let Some(cell) = row.last_mut()
                && cell.chars().count() > last
            {
                let (start, end) = broken(cell, last, 0);
                (rest, *cell) = (end.to_owned(), start.to_owned().into());
            }
            self.line(&mut text, &row, &widths);
            while !rest.is_empty() {
                let (start, end) = match rest.chars().count() > last {
                    true => broken(&rest, last, 0),
                    false => (&*rest, ""),
                };
                let mut row = vec![Cow::from(""); columns];
                row[columns - 1] = start.into();
                self.line(&mut text, &row, &widths);
                rest = end.to_owned();
            }
        }
        text
    }

    fn line(&self, text: &mut String, row: &[Cow<'_, str>], widths: &[usize]) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Writing to a string does not fail.
            let _ = if column == 0 || self.all_left {
                write!(line, "  {cell:<width$}")
            } else {
                write!(line, "  {cell:>width$}")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

/// The least width to which a column is folded or shortened.
const LEAST: usize = 16;

/// A cell of at most `width` characters. A longer one is shortened in its middle, because names of
/// files differ at their ends.
fn shortened(cell: Cow<'_, str>, width: usize) -> Cow<'_, str> {
    let len = cell.chars().count();
    if len <= width {
        return cell;
    }
    let start = (width - 1) / 3;
    let end = width - 1 - start;
    let (start, end) = (cell.chars().take(start), cell.chars().skip(len - end));
    start.chain(['…']).chain(end).collect::<String>().into()
}

/// A number with commas between its thousands.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes in the largest unit that keeps it readable.
pub(crate) fn bytes(n: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in units {
        if n >= 1 << shift {
            let value = n as f64 / (1_u64 << shift) as f64;
            return if n.trailing_zeros() >= shift {
                format!("{value:.0} {unit}")
            } else {
                format!("{value:.2} {unit}")
            };
        }
    }
    format!("{n} bytes")
}

/// The names of the offloads that are on.
pub(crate) fn offload_names(offloads: Offloads) -> Vec<&'static str> {
    let named = [
        (offloads.checksum, "checksum"),
        (offloads.tso4, "tso4"),
        (offloads.tso6, "tso6"),
        (offloads.uso, "uso"),
        (offloads.virtio_header, "virtio_header"),
    ];
    named.into_iter().filter_map(|(on, name)| on.then_some(name)).collect()
}

/// The sizes of the batches that went through a ring in one direction.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Batches {
    /// Calls of the device that moved packets.
    pub(crate) calls: u64,
    /// Packets per call.
    pub(crate) mean: f64,
    /// The power of two at or below the median batch.
    pub(crate) median: u64,
}

impl Batches {
    pub(crate) fn of(packets: u64, histogram: &Histogram) -> Self {
        let calls = histogram.count();
        let mean = if calls == 0 { 0.0 } else { round(packets as f64 / calls as f64, 1) };
        Self { calls, mean, median: histogram.median() }
    }
}

/// What has moved in this time, as packets and bits per second.
pub(crate) fn rate(packets: u64, octets: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let gbit = octets as f64 * 8.0 / seconds / 1e9;
    format!("{} {gbit:.2} Gbit/s", per_second(packets as f64 / seconds))
}

/// Packets per second, in a few columns.
fn per_second(packets: f64) -> String {
    match packets {
        n if n < 1e3 => format!("{n:.0} pps"),
        n if n < 1e6 => format!("{:.1} kpps", n / 1e3),
        n => format!("{:.1} Mpps", n / 1e6),
    }
}

/// Rounded to this many places, because people read JSON too.
pub(crate) fn round(value: f64, places: i32) -> f64 {
    let scale = 10_f64.powi(places);
    (value * scale).round() / scale
}

/// The value at the fraction `p` (0 to 1) of the sorted values, by the nearest-rank method.
pub(crate) fn percentile(sorted: &[f64], p: f64) -> Option<f64> {
    let rank = (sorted.len() as f64 * p).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let mut table = Table::new(&["a", "number"]);
        table.row(["long name".to_owned(), "7".to_owned()]);
        assert_eq!(table.text(), "  a          number\n  long name       7\n");
        assert_eq!(table.left().text(), "  a          number\n  long name  7\n");
    }

    fn widest(text: &str) -> usize {
        text.lines().map(|line| line.chars().count()).max().unwrap_or(0)
    }

    #[test]
    fn a_wide_table_is_made_to_fit() {
        let mut table = Table::new(&["name", "what"]).left();
        table.row(["short".to_owned(), "word ".repeat(40)]);
        let text = table.text();
        assert!((WIDTH - 4..=WIDTH).contains(&widest(&text)), "the lines are full: {text}");
        assert_eq!(text.matches("word").count(), 40);
        assert!(text.lines().skip(2).all(|line| line.starts_with("         word")), "{text}");

        let mut table = Table::new(&["from", "read", "written"]);
        for name in ["a", "b"] {
            table.row([format!("pcap:{}/{name}.pcapng", "x".repeat(90)), "1".into(), "2".into()]);
        }
        let text = table.text();
        assert_eq!(widest(&text), WIDTH, "{text}");
        for (line, name) in text.lines().skip(1).zip(["a", "b"]) {
            assert!(line.starts_with("  pcap:x"), "{line}");
            assert!(line.contains(&format!("/{name}.pcapng     1        2")), "{line}");
        }
    }

    #[test]
    fn a_long_line_is_folded_between_words() {
        assert_eq!(fold("short\n\n  indented\n"), "short\n\n  indented\n");
        let folded = fold(&format!("  {}end", "twelve chars ".repeat(10)));
        assert!(widest(&folded) <= WIDTH, "{folded}");
        let lines: Vec<_> = folded.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].starts_with("    ") && lines[1].ends_with(" end"), "{folded}");
        assert_eq!(folded.split_whitespace().count(), 21, "no word is lost");
        let long = "x".repeat(100);
        assert_eq!(fold(&format!("a {long} b")), format!("a\n  {long}\n  b\n"));
        assert_eq!(fold(&long), format!("{long}\n"));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(bytes(64 << 20), "64 MiB");
        assert_eq!(bytes(1 << 30), "1 GiB");
        assert_eq!(bytes(1_500_000), "1.43 MiB");
        assert_eq!(bytes(12), "12 bytes");
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<_> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), Some(50.0));
        assert_eq!(percentile(&values, 0.99), Some(99.0));
        assert_eq!(percentile(&values, 1.0), Some(100.0));
        assert_eq!(percentile(&values[..1], 0.5), Some(1.0));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
