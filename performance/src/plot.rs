//! A picture of two of the tables, as SVG: packets between guests as bars, and the effect of more
//! interfaces in a network as lines. It is written by hand, so it needs no fonts and no libraries
//! of the system.

use std::fmt::Write as _;
use std::path::Path;

use crate::report::{Report, Table, shorten};
use crate::result::Result;

/// Pixels.
const WIDTH: f64 = 1200.0;
const TOP: f64 = 70.0;
const MARGIN: f64 = 20.0;
const BAR: f64 = 16.0;
const STEP: f64 = 22.0;
/// The approximate width of a character of 12 pixels in a sans-serif face.
const CHARACTER: f64 = 6.4;
const LEAST_HEIGHT: f64 = 420.0;

/// People who see few colours can tell these apart, too. The first is vmring's.
const COLOURS: [&str; 6] = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#555555"];

/// Draws the tables that the report has.
pub(crate) fn write(report: &Report, path: &Path) -> Result<()> {
    let drawing = draw(&report.heading().to_string(), report.tables())?;
    std::fs::write(path, drawing)
        .map_err(|error| format!("the plot {} was not written: {error}", path.display()).into())
}

/// The whole picture.
fn draw(title: &str, tables: &[Table]) -> Result<String> {
    let find = |name| tables.iter().filter(move |table| table.name() == name);
    let bars: Vec<Bar> = find("guests").flat_map(bars).collect();
    let lines = find("growth").flat_map(points).fold(Vec::new(), into_lines);
    let wide = match (bars.is_empty(), lines.is_empty()) {
        (true, true) => return Err("nothing to plot: no guests and no growth measured".into()),
        (false, false) => WIDTH * 0.58,
        _ => WIDTH,
    };
    let groups = bars.chunk_by(|a, b| a.group == b.group).count();
    let rows = (bars.len() + groups) as f64;
    let height = (TOP + rows * STEP + 60.0).max(LEAST_HEIGHT);
    let mut svg = Svg::default();
    svg.text(MARGIN, 26.0, "start", 15, title);
    if !bars.is_empty() {
        svg.bars(&bars, wide, height);
    }
    if !lines.is_empty() {
        let left = if bars.is_empty() { 0.0 } else { wide };
        svg.lines(&lines, left, height);
    }
    Ok(svg.finish(height))
}

/// The time of a packet in one row of the table.
struct Bar {
    group: String,
    name: String,
    ns: f64,
}

/// The rows of full frames. A row that was not measured has no bar.
fn bars(table: &Table) -> impl Iterator<Item = Bar> {
    table.medians().filter_map(|(place, labels, ns)| match labels {
        [bytes, variant, contender] if number(bytes) == Some(1514) && ns > 0.0 => {
            let place = place.map_or(String::new(), |place| format!("; {place}"));
            let group = format!("1514 B, {variant}{place}");
            Some(Bar { group, name: contender.clone(), ns })
        }
        _ => None,
    })
}

/// A number in a label, with or without a unit after it or commas in it.
fn number(label: &str) -> Option<u64> {
    let digits = label.split_whitespace().next()?.replace(',', "");
    digits.parse().ok()
}

type Line = (String, Vec<(f64, f64)>);

/// The row's name, the number of interfaces and the time of a packet.
fn points(table: &Table) -> impl Iterator<Item = (&str, f64, f64)> {
    table.medians().filter_map(|(_, labels, ns)| match labels {
        [interfaces, _pairs, row] if ns.is_finite() => {
            number(interfaces).filter(|n| *n > 0).map(|n| (row.as_str(), n as f64, ns))
        }
        _ => None,
    })
}

fn into_lines(mut lines: Vec<Line>, (row, interfaces, ns): (&str, f64, f64)) -> Vec<Line> {
    match lines.iter_mut().find(|line| line.0 == row) {
        Some(line) => line.1.push((interfaces, ns)),
        None => lines.push((row.to_owned(), vec![(interfaces, ns)])),
    }
    lines
}

#[derive(Default)]
struct Svg(String);

impl Svg {
    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{element}").expect("a String takes everything");
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, size: u32, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        self.add(format_args!(
            r##"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}">{text}</text>"##
        ));
    }

    fn rule(&mut self, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.add(format_args!(
            r##"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="#cccccc"/>"##
        ));
    }

    /// Draws bars to the right, on a logarithmic scale, from 0 to `right`.
    fn bars(&mut self, bars: &[Bar], right: f64, height: f64) {
        let longest = bars.iter().map(|bar| bar.name.chars().count()).max().unwrap_or(0);
        let left = MARGIN + longest as f64 * CHARACTER + 8.0;
        // The figures are after the bars.
        let right = (right - MARGIN - 50.0).max(left + 50.0);
        let least = bars.iter().map(|bar| bar.ns).fold(f64::INFINITY, f64::min).log10();
        let most = bars.iter().map(|bar| bar.ns).fold(0.0, f64::max).log10();
        // A bar begins at a power of ten well below the shortest; otherwise that one would have no
        // length.
        let (low, high) = ((least - 0.3).floor(), most.ceil());
        let place = |log: f64| left + (right - left) * (log - low) / (high - low).max(1.0);
        let bottom = height - 40.0;
        let mut power = low;
        while power <= high {
            let x = place(power);
            self.rule((x, TOP - 10.0), (x, bottom));
            let digits = (-power).max(0.0) as usize;
            let tick = format!("{:.digits$}", 10f64.powf(power));
            self.text(x, bottom + 16.0, "middle", 12, &tick);
            power += 1.0;
        }
        let about = "guest to guest, ns per packet (logarithmic)";
        self.text((left + right) / 2.0, bottom + 33.0, "middle", 12, about);
        let mut y = TOP;
        for group in bars.chunk_by(|a, b| a.group == b.group) {
            self.text(MARGIN, y + 12.0, "start", 13, &group[0].group);
            y += STEP;
            for bar in group {
                let end = place(bar.ns.log10());
                let ours = bar.name.starts_with("vmring");
                let colour = COLOURS[usize::from(!ours)];
                self.text(left - 6.0, y + 12.0, "end", 12, &bar.name);
                self.add(format_args!(
                    r##"<rect class="bar" x="{left:.1}" y="{y:.1}" width="{:.1}" height="{BAR}" fill="{colour}"/>"##,
                    end - left
                ));
                self.text(end + 5.0, y + 12.0, "start", 12, &shorten(bar.ns));
                y += STEP;
            }
        }
    }

    /// Draws lines over the number of interfaces, from `left` on. Each doubling has the same width.
    fn lines(&mut self, lines: &[Line], left: f64, height: f64) {
        let (left, right) = (left + MARGIN + 45.0, WIDTH - MARGIN);
        // The names are above.
        let (top, bottom) = (TOP + lines.len() as f64 * 16.0, height - 40.0);
        let all = || lines.iter().flat_map(|line| &line.1);
        let first = all().map(|point| point.0).fold(f64::INFINITY, f64::min).log2().floor();
        let last = all().map(|point| point.0).fold(0.0, f64::max).log2().ceil();
        let most = all().map(|point| point.1).fold(0.0, f64::max).max(1e-3);
        let step = step(most);
        let most = (most / step).ceil() * step;
        let across = |x: f64| left + (right - left) * (x.log2() - first) / (last - first).max(1.0);
        let up = |y: f64| bottom - (bottom - top) * y / most;
        for tick in 0..=(most / step).round() as u32 {
            let value = f64::from(tick) * step;
            self.rule((left, up(value)), (right, up(value)));
            let digits = (-step.log10().floor()).max(0.0) as usize;
            let text = format!("{value:.digits$}");
            self.text(left - 6.0, up(value) + 4.0, "end", 12, &text);
        }
        let mut power = first;
        while power <= last {
            let x = across(power.exp2());
            self.rule((x, top), (x, bottom));
            self.text(x, bottom + 16.0, "middle", 12, &power.exp2().to_string());
            power += 1.0;
        }
        let about = "interfaces in the network; ns per packet";
        self.text((left + right) / 2.0, bottom + 33.0, "middle", 12, about);
        for (i, (name, points)) in lines.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let places: Vec<_> =
                points.iter().map(|point| (across(point.0), up(point.1))).collect();
            let path: Vec<_> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            self.add(format_args!(
                r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"##,
                path.join(" ")
            ));
            for (x, y) in places {
                self.add(format_args!(
                    r##"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"/>"##
                ));
            }
            let y = TOP - 12.0 + 16.0 * i as f64;
            self.add(format_args!(
                r##"<rect x="{left:.1}" y="{:.1}" width="12" height="4" fill="{colour}"/>"##,
                y - 6.0
            ));
            self.text(left + 18.0, y, "start", 12, name);
        }
    }

    /// Puts white behind everything, because the page may be dark.
    fn finish(self, height: f64) -> String {
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif" fill="#222222">
<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>
{}</svg>
"##,
            self.0
        )
    }
}

/// The distance between two ticks, so that there are four to ten up to `most`: 1, 2 or 5, followed
/// by zeroes.
fn step(most: f64) -> f64 {
    let power = 10f64.powf((most / 10.0).log10().ceil());
    [0.2, 0.5].into_iter().map(|part| part * power).find(|s| most / s <= 10.0).unwrap_or(power)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Place;
    use crate::{growth, guests};

    /// Uses the labels of the part itself. Otherwise the plot could look for labels that do not
    /// exist.
    fn guests_table() -> Table {
        let mut table = Table::new("guests", "made up", guests::LABELS, &["ns/packet"]);
        let contenders = [("vmring, inline", 45.0), ("rtrb <one> & \"all\"", 8.0)];
        for round_trip in [130.0, 540.0] {
            table.begin(Place::of(vec![round_trip]), [11, 11]);
            for bytes in ["60", "1514"] {
                for variant in ["touched", "untouched"] {
                    for (contender, ns) in contenders {
                        table.row(&[bytes, variant, contender], &[&[ns]]);
                    }
                }
            }
        }
        table.end();
        table.row(&["1514", "untouched", "socketpair"], &[&[1900.0]]);
        table.row(&["1514", "untouched", "not measured"], &[&[]]);
        table
    }

    fn growth_table() -> Table {
        let mut table = Table::new("growth", "made up", growth::LABELS, &["ns/packet"]);
        for power in 1..=10 {
            let interfaces = (1 << power).to_string();
            table.row(&[&interfaces, "1", "one to one"], &[&[40.0 + f64::from(power)]]);
            table.row(&[&interfaces, "2", "to all"], &[&[60.0]]);
        }
        table
    }

    /// The number of bars, lines and points, and the texts.
    fn read(svg: &str) -> ([usize; 3], Vec<String>) {
        let document = roxmltree::Document::parse(svg).expect("it is XML");
        let nodes = || document.descendants();
        let named = |name: &'static str| {
            nodes().filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", name))).count()
        };
        let bars = nodes().filter(|node| node.attribute("class") == Some("bar")).count();
        for node in nodes() {
            for attribute in node.attributes() {
                assert!(!attribute.value().contains("NaN") && !attribute.value().contains("inf"));
            }
            let width = node.attribute("width").map_or(1.0, |width| width.parse().expect("pixels"));
            assert!((0.1..=WIDTH).contains(&width), "{width}");
        }
        let texts = nodes().filter_map(|node| node.text()).map(str::to_owned).collect();
        ([bars, named("polyline"), named("circle")], texts)
    }

    #[test]
    fn a_bar_for_each_full_frame_and_a_line_for_each_row() {
        let svg = draw("A machine <& kernel>", &[guests_table(), growth_table()])
            .expect("there is something");
        let (counts, texts) = read(&svg);
        assert_eq!(counts, [9, 2, 20]);
        let [near, far] =
            ["near, cache-line round trip 130 ns", "far, cache-line round trip 540 ns"]
                .map(|place| format!("1514 B, touched; {place}"));
        for text in [
            &near,
            &far,
            "A machine <& kernel>",
            "rtrb <one> & \"all\"",
            "1900",
            "1024",
            "2",
            "to all",
        ] {
            assert!(texts.iter().any(|t| t == text), "{text} is not in {texts:?}");
        }
    }

    #[test]
    fn a_missing_table_leaves_its_half_out() {
        let counts = |tables: &[Table]| read(&draw("", tables).expect("there is something")).0;
        assert_eq!(counts(&[guests_table()]), [9, 0, 0]);
        assert_eq!(counts(&[growth_table()]), [0, 2, 20]);
        assert!(draw("", &[]).is_err());
    }

    #[test]
    fn ticks_are_round_and_few() {
        for (most, wanted) in [(100.0, 10.0), (45.0, 5.0), (18.0, 2.0), (0.9, 0.1), (2500.0, 500.0)]
        {
            assert!((step(most) / wanted - 1.0).abs() < 1e-9, "{most}: {}", step(most));
        }
    }
}
