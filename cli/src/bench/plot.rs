//! A picture of the figures: bars, as text for a terminal and as SVG. Both are written by hand, so they need
//! neither fonts nor colours.

use std::fmt::Write as _;

use crate::report::WIDTH;

/// One quantity, with a bar for each thing that has it. The bars begin at zero.
#[derive(Debug, PartialEq)]
pub(crate) struct Group {
    /// What the numbers are, with their unit.
    pub(crate) name: String,
    pub(crate) bars: Vec<Bar>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) value: f64,
    /// The smallest and the greatest value, if they are known.
    pub(crate) range: Option<[f64; 2]>,
    /// Whether it is a rival's, which has another colour.
    pub(crate) is_rival: bool,
}

impl Group {
    /// What the end of the scale stands for.
    fn most(&self) -> f64 {
        self.bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max)
    }
}

/// A value in at most five characters, or a whole number if it is longer.
fn shorten(value: f64) -> String {
    match value {
        x if x >= 99.95 => format!("{value:.0}"),
        x if x >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The groups as lines of at most [`WIDTH`] columns.
pub(crate) fn text(groups: &[Group]) -> String {
    let bars = || groups.iter().flat_map(|group| &group.bars);
    let length = |text: &str| text.chars().count();
    let names = bars().map(|bar| length(&bar.name)).max().unwrap_or(0);
    let values = bars().map(|bar| length(&shorten(bar.value))).max().unwrap_or(0);
    let room = WIDTH.saturating_sub(names + values + 6).max(8);
    let mut text = String::new();
    for group in groups {
        // Writing to a string does not fail.
        let _ = writeln!(text, "\n{}", group.name);
        for bar in &group.bars {
            let value = shorten(bar.value);
            let bar_text = blocks(bar.value / group.most() * room as f64);
            let line = format!("  {:names$}  {value:>values$}  {bar_text}", bar.name);
            let _ = writeln!(text, "{}", line.trim_end());
        }
    }
    text
}

/// A bar of this many columns, in eighths. It has at least one.
fn blocks(columns: f64) -> String {
    const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = ((columns * 8.0).round() as usize).max(1);
    "█".repeat(eighths / 8) + PARTS[eighths % 8]
}

/// Pixels.
const IMAGE_WIDTH: f64 = 720.0;
const MARGIN: f64 = 16.0;
const BAR: f64 = 14.0;
const STEP: f64 = 20.0;
/// The approximate width of a character of 12 pixels in a sans-serif face.
const CHARACTER: f64 = 6.6;
/// People who see few colours can tell these apart, too.
const OURS: &str = "#d55e00";
const RIVAL: &str = "#0072b2";

/// The groups as an SVG document, with lines of text above. A thin line on a bar goes from the smallest value
/// to the greatest; it ends with the picture if that lies far behind the longest bar.
pub(crate) fn svg(heading: &[String], groups: &[Group]) -> String {
    let bars = || groups.iter().flat_map(|group| &group.bars);
    let names = bars().map(|bar| bar.name.chars().count()).max().unwrap_or(0);
    let left = MARGIN + names as f64 * CHARACTER + 8.0;
    // The figures are behind the bars.
    let longest = IMAGE_WIDTH - MARGIN - 60.0 - left;
    let (mut body, mut y) = (String::new(), MARGIN);
    for line in heading {
        y += STEP;
        label(&mut body, [MARGIN, y - 6.0], "start", line);
    }
    for group in groups {
        y += 1.5 * STEP;
        label(&mut body, [MARGIN, y - 6.0], "start", &group.name);
        for bar in &group.bars {
            let scale = |value: f64| longest * value / group.most();
            let (width, colour) =
                (scale(bar.value).max(1.0), if bar.is_rival { RIVAL } else { OURS });
            label(&mut body, [left - 6.0, y + 11.0], "end", &bar.name);
            let _ = writeln!(
                body,
                r#"<rect class="bar" x="{left:.1}" y="{y:.1}" width="{width:.1}" height="{BAR}" fill="{colour}"/>"#
            );
            let mut end = left + width;
            if let Some(range) = bar.range {
                let [from, to] = range.map(|value| left + scale(value).min(longest + 8.0));
                let middle = y + BAR / 2.0;
                let _ = writeln!(
                    body,
                    r##"<line class="range" x1="{from:.1}" y1="{middle:.1}" x2="{to:.1}" y2="{middle:.1}" stroke="#222222"/>"##
                );
                end = end.max(to);
            }
            label(&mut body, [end + 5.0, y + 11.0], "start", &shorten(bar.value));
            y += STEP;
        }
    }
    let height = y + MARGIN;
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {IMAGE_WIDTH} {height}" width="{IMAGE_WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222222">
<rect width="{IMAGE_WIDTH}" height="{height}" fill="#ffffff"/>
{body}</svg>
"##
    )
}

fn label(body: &mut String, [x, y]: [f64; 2], anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(body, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups() -> Vec<Group> {
        let bar = |name: &str, value, range| Bar {
            name: name.to_owned(),
            value,
            range,
            is_rival: name.contains("bare"),
        };
        let one_way = vec![
            bar("inline", 60.0, Some([50.0, 61.0])),
            bar("bare <loop> & \"all\"", 30.0, Some([30.0, 9000.0])),
            bar("next to nothing", 0.001, None),
        ];
        let out_and_back = vec![bar("poller, parked", 12_345.0, None)];
        let of = |name: &str, bars| Group { name: name.to_owned(), bars };
        vec![of("One way, ns", one_way), of("Out and back, us", out_and_back)]
    }

    #[test]
    fn bars_for_a_terminal_are_as_long_as_their_values() {
        let drawn = text(&groups());
        let blocks = |name: &str| {
            let line = drawn.lines().find(|line| line.contains(name)).expect(name);
            line.matches('█').count()
        };
        let longest = blocks("inline");
        assert_eq!(blocks("bare <loop>"), longest / 2);
        assert_eq!((blocks("next to nothing"), blocks("poller, parked")), (0, longest));
        assert!(drawn.contains("next to nothing       0.00  ▏"), "{drawn}");
        assert!(drawn.lines().all(|line| line.chars().count() <= WIDTH), "{drawn}");
        let widest = drawn.lines().map(|line| line.chars().count()).max();
        assert!(widest.is_some_and(|widest| widest > WIDTH - 4), "the lines are full: {drawn}");
        assert_eq!(text(&[]), "");
    }

    #[test]
    fn the_picture_has_a_bar_for_each_value() {
        let svg = svg(&["A machine <& kernel>".to_owned()], &groups());
        let document = roxmltree::Document::parse(&svg).expect("it is XML");
        let of_class = |class: &str| {
            document.descendants().filter(|node| node.attribute("class") == Some(class)).collect()
        };
        let (bars, ranges): (Vec<_>, Vec<_>) = (of_class("bar"), of_class("range"));
        assert_eq!((bars.len(), ranges.len()), (4, 2));
        let number = |node: &roxmltree::Node<'_, '_>, name: &str| -> f64 {
            node.attribute(name).and_then(|value| value.parse().ok()).expect(name)
        };
        let width = |bar: usize| number(&bars[bar], "width");
        assert!((width(0) - 2.0 * width(1)).abs() < 0.2, "{svg}");
        assert!((width(2) - 1.0).abs() < 0.01, "the shortest is still seen: {svg}");
        assert_ne!(bars[0].attribute("fill"), bars[1].attribute("fill"));
        for range in ranges {
            assert!(number(&range, "x2") < IMAGE_WIDTH - MARGIN, "{svg}");
        }
        let texts: Vec<_> = document.descendants().filter_map(|node| node.text()).collect();
        for wanted in ["A machine <& kernel>", "bare <loop> & \"all\"", "60.0", "12345"] {
            assert!(texts.contains(&wanted), "{wanted} is not in {texts:?}");
        }
    }
}
