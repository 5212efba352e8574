//! The output: a heading, then tables for people or one JSON document.

use std::fs;
use std::io::{self, Write};

use serde::Serialize;

use crate::clock::Elapsed;
use crate::place::{Distance, Place};
use crate::result::Result;
use crate::spread::Spread;

/// The result of one measurement of packets.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sample {
    pub(crate) packets: u64,
    pub(crate) elapsed: Elapsed,
}

impl Sample {
    /// Nanoseconds per packet, in wall time.
    pub(crate) fn wall_ns(&self) -> f64 {
        self.elapsed.wall.as_nanos() as f64 / self.packets as f64
    }

    /// Nanoseconds per packet, in processor time of the measuring thread.
    pub(crate) fn cpu_ns(&self) -> f64 {
        self.elapsed.cpu.as_nanos() as f64 / self.packets as f64
    }
}

/// Where the figures come from.
#[derive(Serialize)]
pub(crate) struct Heading {
    machine: String,
    cores: usize,
    kernel: String,
    versions: Vec<(&'static str, String)>,
    rounds: u32,
    seconds: f64,
    processors: Processors,
}

/// Where the host of a virtual machine has put the two processors on which the measuring threads
/// run. A host may move them at any time, so this is looked at before the parts and after them.
#[derive(Serialize)]
pub(crate) struct Processors {
    before: Place,
    /// `None` until the parts have ended.
    after: Option<Place>,
}

impl std::fmt::Display for Processors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { before, after } = self;
        let moved = after.as_ref().filter(|after| after.distance != before.distance);
        let name = |place: &Place| match place.distance {
            Distance::One => "only one",
            distance => distance.name(),
        };
        write!(f, "processors: {}", name(before))?;
        if let Some(after) = moved {
            write!(f, ", at the end {}", name(after))?;
        }
        if before.turns > 0 {
            let ns = before.round_trip_ns;
            write!(f, ", cache-line round trip {ns:.0} ns")?;
            if let Some(after) = moved {
                write!(f, ", at the end {:.0} ns", after.round_trip_ns)?;
            }
            write!(f, " (median of {})", before.turns)?;
        }
        if moved.is_some() {
            f.write_str("; they moved, so a figure without a place may be of either")?;
        }
        Ok(())
    }
}

/// This program's own lock file, which says what it was built from.
const LOCK: &str = include_str!("../Cargo.lock");

/// The crates whose speed is compared.
const COMPARED: [&str; 6] =
    ["vmring", "rtrb", "crossbeam-channel", "io-uring", "tun-rs", "hdrhistogram"];

/// The version of `name` in the lock file.
fn version(name: &str) -> Option<&'static str> {
    let mut lines = LOCK.lines().skip_while(|line| *line != format!("name = \"{name}\""));
    lines.nth(1)?.strip_prefix("version = \"")?.strip_suffix('"')
}

impl Heading {
    pub(crate) fn of_this_machine(rounds: u32, seconds: f64, place: Place) -> Result<Self> {
        let processors = fs::read_to_string("/proc/cpuinfo")?;
        let machine = processors
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or(std::env::consts::ARCH, |(_, model)| model)
            .to_owned();
        Ok(Self {
            machine,
            cores: std::thread::available_parallelism()?.get(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            versions: COMPARED
                .into_iter()
                .filter_map(|name| Some((name, version(name)?.to_owned())))
                .collect(),
            rounds,
            seconds,
            processors: Processors { before: place, after: None },
        })
    }
}

impl Heading {
    pub(crate) fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Adds the version of another program.
    pub(crate) fn add_version(&mut self, name: &'static str, version: String) {
        self.versions.push((name, version));
    }
}

impl std::fmt::Display for Heading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} cores, Linux {}", self.machine, self.cores, self.kernel)
    }
}

/// A table. Each row has a spread for each figure that was measured.
#[derive(Serialize)]
pub(crate) struct Table {
    name: &'static str,
    about: String,
    /// The labels that tell the rows apart.
    labels: &'static [&'static str],
    /// The names of the figures, with their unit.
    figures: &'static [&'static str],
    /// The places of the processors in which rows were measured. Rows that do not depend on the place are
    /// of none.
    halves: Vec<HalfHeading>,
    rows: Vec<Row>,
    #[serde(skip)]
    place: Option<Distance>,
    /// Whether it could not be measured although everything for it is here.
    failed: bool,
}

/// Where one half of a table was measured, and how often.
#[derive(Serialize)]
struct HalfHeading {
    #[serde(flatten)]
    place: Place,
    /// The least and the most rounds that a row has.
    rounds: [usize; 2],
}

impl std::fmt::Display for HalfHeading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [least, most] = self.rounds;
        write!(f, "{}: ", self.place)?;
        match least == most {
            true => write!(f, "{most} round(s)"),
            false => write!(f, "{least} to {most} rounds"),
        }
    }
}

#[derive(Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<Distance>,
    labels: Vec<String>,
    /// `None` if the row does not have this figure.
    figures: Vec<Option<Spread>>,
}

impl Table {
    pub(crate) fn new(
        name: &'static str,
        about: impl Into<String>,
        labels: &'static [&'static str],
        figures: &'static [&'static str],
    ) -> Self {
        let (halves, rows) = (Vec::new(), Vec::new());
        Self {
            name,
            about: about.into(),
            labels,
            figures,
            halves,
            rows,
            place: None,
            failed: false,
        }
    }

    /// The next rows are of this place, in which they had the least and the most of these rounds.
    pub(crate) fn begin(&mut self, place: Place, rounds: [usize; 2]) {
        self.place = Some(place.distance);
        match self.halves.iter_mut().find(|half| half.place.distance == place.distance) {
            Some(HalfHeading { rounds: [least, most], .. }) => {
                (*least, *most) = (rounds[0].min(*least), rounds[1].max(*most));
            }
            None => self.halves.push(HalfHeading { place, rounds }),
        }
    }

    /// The next rows are of no place.
    pub(crate) fn end(&mut self) {
        self.place = None;
    }

    /// A table that could not be measured, and why.
    pub(crate) fn failed(name: &'static str, why: &str) -> Self {
        Self { failed: true, ..Self::new(name, format!("FAILED: {why}"), &[""], &[""]) }
    }

    /// Adds a row: its labels, and for each figure the values of all rounds, or no values if the
    /// row does not have the figure. Returns the median of the first figure.
    pub(crate) fn row(&mut self, labels: &[&str], figures: &[&[f64]]) -> f64 {
        assert_eq!((labels.len(), figures.len()), (self.labels.len(), self.figures.len()));
        let spread =
            |values: &&[f64]| (!values.is_empty()).then(|| Spread::of(values.iter().copied()));
        let figures: Vec<_> = figures.iter().map(spread).collect();
        let median = figures[0].map_or(f64::NAN, |spread| spread.median);
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        self.rows.push(Row { place: self.place, labels, figures });
        median
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// The medians of the first figure, with the places and the labels of the rows.
    pub(crate) fn medians(&self) -> impl Iterator<Item = (Option<&Place>, &[String], f64)> {
        let median = |row: &Row| row.figures[0].map_or(f64::NAN, |spread| spread.median);
        self.rows.iter().map(move |row| (self.place_of(row), &row.labels[..], median(row)))
    }

    /// The places in which rows were measured.
    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        self.halves.iter().map(|half| &half.place)
    }

    fn place_of(&self, row: &Row) -> Option<&Place> {
        self.places().find(|place| Some(place.distance) == row.place)
    }

    /// The median of one figure in the row with these labels, in a place or in none.
    pub(crate) fn median(
        &self,
        place: Option<Distance>,
        labels: &[&str],
        figure: usize,
    ) -> Option<f64> {
        let mut rows = self.rows.iter();
        let row = rows.find(|row| row.place == place && row.labels == labels)?;
        row.figures[figure].map(|spread| spread.median)
    }

    /// The rows of no place, and then those of each half.
    fn in_order(&self) -> impl Iterator<Item = &Row> {
        let places = self.halves.iter().map(|half| Some(half.place.distance));
        let of = |place| self.rows.iter().filter(move |row| row.place == place);
        [None].into_iter().chain(places).flat_map(of)
    }

    /// Prints the columns as wide as their contents: labels to the left, figures to the right. The
    /// first figure has its smallest and greatest value beside it.
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "\n{}: {}", self.name, self.about)?;
        let mut lines: Vec<Vec<String>> = Vec::new();
        let mut head: Vec<String> = self.labels.iter().map(|label| (*label).to_owned()).collect();
        for (i, figure) in self.figures.iter().enumerate() {
            head.push((*figure).to_owned());
            if i == 0 {
                head.push(String::new());
            }
        }
        lines.push(head);
        for row in self.in_order() {
            let mut line = row.labels.clone();
            for (i, figure) in row.figures.iter().enumerate() {
                let text = |of: fn(&Spread) -> f64| figure.as_ref().map(|s| shorten(of(s)));
                line.push(text(|s| s.median).unwrap_or("-".to_owned()));
                if i == 0 {
                    let range = text(|s| s.min).zip(text(|s| s.max));
                    line.push(
                        range.map_or(String::new(), |(min, max)| format!("({min} to {max})")),
                    );
                }
            }
            lines.push(line);
        }
        let columns = lines[0].len();
        let width = |i: usize| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        // The heading of the columns has no row.
        let places = [None].into_iter().chain(self.in_order().map(|row| row.place));
        let mut before = None;
        for (line, place) in lines.iter().zip(places) {
            let half = self.halves.iter().find(|half| Some(half.place.distance) == place);
            if let Some(half) = half.filter(|_| place != before) {
                writeln!(out, "{half}")?;
            }
            before = place;
            let mut text = String::new();
            for (i, (cell, width)) in line.iter().zip(&widths).enumerate() {
                let (width, gap) = (*width, if i == 0 { "" } else { "  " });
                text += &if i < self.labels.len() {
                    format!("{gap}{cell:<width$}")
                } else {
                    format!("{gap}{cell:>width$}")
                };
            }
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

/// Three significant digits, or all digits of a whole number.
pub(crate) fn shorten(value: f64) -> String {
    match value.abs() {
        x if x.is_nan() => "-".to_owned(),
        x if x >= 100.0 => format!("{value:.0}"),
        x if x >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A goal, and whether this run's medians reached it.
#[derive(Serialize)]
pub(crate) struct Want {
    what: String,
    /// Where it was measured, if it depends on the place.
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<Distance>,
    measured: f64,
    wanted: f64,
    /// Whether `wanted` is the most that the value may be, or the least.
    at_most: bool,
    /// `None` if it was not measured.
    met: Option<bool>,
}

impl Want {
    pub(crate) fn at_most(what: impl Into<String>, measured: f64, wanted: f64) -> Self {
        let met = (!measured.is_nan()).then_some(measured <= wanted);
        Self { what: what.into(), place: None, measured, wanted, at_most: true, met }
    }

    pub(crate) fn at_least(what: impl Into<String>, measured: f64, wanted: f64) -> Self {
        let met = (!measured.is_nan()).then_some(measured >= wanted);
        Self { what: what.into(), place: None, measured, wanted, at_most: false, met }
    }

    /// The same, measured in this place.
    pub(crate) fn in_place(self, place: Distance) -> Self {
        Self { place: Some(place), ..self }
    }
}

/// Everything that was measured.
#[derive(Serialize)]
pub(crate) struct Report {
    heading: Heading,
    tables: Vec<Table>,
    wants: Vec<Want>,
    /// The parts that were skipped, with the reason.
    skipped: Vec<(&'static str, String)>,
    /// The parts that ended with an error, and the error.
    failed: Vec<(&'static str, String)>,
}

impl Report {
    pub(crate) fn new(heading: Heading) -> Self {
        Self {
            heading,
            tables: Vec::new(),
            wants: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, tables: Vec<Table>, wants: Vec<Want>) {
        self.tables.extend(tables);
        self.wants.extend(wants);
    }

    pub(crate) fn add_version(&mut self, name: &'static str, version: String) {
        self.heading.add_version(name, version);
    }

    pub(crate) fn skip(&mut self, part: &'static str, why: impl Into<String>) {
        self.skipped.push((part, why.into()));
    }

    pub(crate) fn fail(&mut self, part: &'static str, error: String) {
        self.failed.push((part, error));
    }

    /// The number of parts and tables that ended with an error.
    pub(crate) fn failed(&self) -> usize {
        self.failed.len() + self.tables.iter().filter(|table| table.failed).count()
    }

    /// Notes where the processors are now that the parts have ended.
    pub(crate) fn end(&mut self, place: Place) {
        self.heading.processors.after = Some(place);
    }

    pub(crate) fn heading(&self) -> &Heading {
        &self.heading
    }

    pub(crate) fn tables(&self) -> &[Table] {
        &self.tables
    }

    pub(crate) fn print(&self, json: bool, out: &mut impl Write) -> io::Result<()> {
        if json {
            writeln!(out, "{}", serde_json::to_string_pretty(self)?)?;
            return Ok(());
        }
        let heading = &self.heading;
        writeln!(out, "{heading}")?;
        let versions: Vec<_> =
            heading.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        writeln!(out, "{}", versions.join(", "))?;
        writeln!(out, "{}", heading.processors)?;
        writeln!(
            out,
            "medians of {} interleaved round(s) of {} s, in brackets the smallest and the greatest",
            heading.rounds, heading.seconds
        )?;
        for table in &self.tables {
            table.print(out)?;
        }
        for (part, why) in &self.skipped {
            writeln!(out, "\n{part}: skipped: {why}")?;
        }
        for (part, error) in &self.failed {
            writeln!(out, "\n{part}: FAILED: {error}")?;
        }
        if !self.wants.is_empty() {
            writeln!(out, "\nwanted, and measured in this run")?;
            writeln!(out, "  #  met  measured    wanted         place  what")?;
        }
        for (number, want) in (1..).zip(&self.wants) {
            writeln!(
                out,
                "{number:>3}  {:<3}  {:>8}    {:<8} {:>5}  {:<5}  {}",
                want.met.map_or("-", |met| if met { "yes" } else { "no" }),
                shorten(want.measured),
                if want.at_most { "at most" } else { "at least" },
                want.wanted,
                want.place.map_or("", Distance::name),
                want.what
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(before: &[f64], after: Option<&[f64]>) -> String {
        let place = |trips: &[f64]| Place::of(trips.to_vec());
        Processors { before: place(before), after: after.map(place) }.to_string()
    }

    #[test]
    fn the_heading_says_where_the_processors_are() {
        let near = "processors: near, cache-line round trip 131 ns (median of 3)";
        assert_eq!(line(&[131.0, 130.0, 1200.0], None), near);
        // The same place at the end changes nothing.
        assert_eq!(line(&[130.0, 131.0, 140.0], Some(&[160.0])), near);
        let far = "processors: far, cache-line round trip 541 ns (median of 1)";
        assert_eq!(line(&[541.4], Some(&[490.0])), far);
        assert_eq!(line(&[], Some(&[])), "processors: only one");
    }

    #[test]
    fn the_heading_says_that_the_processors_moved() {
        let moved = "processors: near, at the end far, cache-line round trip 130 ns, at the end 540 \
            ns (median of 1); they moved, so a figure without a place may be of either";
        assert_eq!(line(&[130.0], Some(&[540.0])), moved);
    }

    fn two_halves() -> Table {
        let mut table = Table::new("two", "made up", &["row"], &["ns"]);
        table.begin(Place::of(vec![130.0]), [11, 11]);
        table.row(&["a"], &[&[5.0]]);
        table.begin(Place::of(vec![540.0]), [2, 7]);
        table.row(&["a"], &[&[50.0]]);
        table.row(&["b"], &[&[]]);
        table.end();
        table.row(&["c"], &[&[1.0]]);
        table
    }

    #[test]
    fn a_table_has_a_half_for_each_place() -> Result<()> {
        let mut text = Vec::new();
        two_halves().print(&mut text)?;
        let text = String::from_utf8(text)?;
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        let wanted = [
            "",
            "two: made up",
            "row    ns",
            "c    1.00  (1.00 to 1.00)",
            "near, cache-line round trip 130 ns: 11 round(s)",
            "a    5.00  (5.00 to 5.00)",
            "far, cache-line round trip 540 ns: 2 to 7 rounds",
            "a    50.0  (50.0 to 50.0)",
            "b       -",
        ];
        assert_eq!(lines, wanted);
        let table = two_halves();
        assert_eq!(table.median(Some(Distance::Far), &["a"], 0), Some(50.0));
        assert_eq!(table.median(Some(Distance::Near), &["b"], 0), None);
        assert_eq!(table.median(None, &["c"], 0), Some(1.0));
        let json = serde_json::to_value(&table)?;
        assert_eq!(json["halves"][1]["distance"], "far");
        assert_eq!(json["halves"][1]["rounds"], serde_json::json!([2, 7]));
        assert_eq!(json["rows"][1]["place"], "far");
        assert_eq!(json["rows"][3].get("place"), None);
        Ok(())
    }

    #[test]
    fn a_want_says_where_it_was_measured_and_whether_it_was() -> Result<()> {
        let want = Want::at_most("a want", 1.0, 2.0).in_place(Distance::Far);
        let json = serde_json::to_value(&want)?;
        assert_eq!((&json["place"], &json["met"]), (&"far".into(), &true.into()));
        let json = serde_json::to_value(Want::at_least("a want", f64::NAN, 2.0))?;
        assert_eq!((json.get("place"), &json["met"]), (None, &serde_json::Value::Null));
        Ok(())
    }

    #[test]
    fn the_document_for_programs_has_the_place() -> Result<()> {
        let before = Place::of(vec![540.0]);
        let processors = Processors { before, after: Some(before) };
        let json = serde_json::to_value(processors)?;
        assert_eq!(json["before"]["distance"], "far");
        assert_eq!(json["after"]["round_trip_ns"], 540.0);
        assert_eq!(json["after"]["turns"], 1);
        Ok(())
    }
}
