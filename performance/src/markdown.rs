//! The table of the README in the folder above: some figures of the tables, in Markdown.

use std::fmt::Write as _;
use std::path::Path;

use crate::place::{Distance, Place};
use crate::report::{Report, Table, shorten};
use crate::result::Result;

/// Where a figure is: the table, the labels of its row, and its number.
struct At(&'static str, &'static [&'static str], usize);

/// A line of the README.
struct Line {
    what: &'static str,
    ours: &'static [At],
    /// The rivals, and the figures of each.
    beside: &'static [(&'static str, &'static [At])],
}

/// What depends on the place of the processors.
const TWO_THREADS: &[Line] = &[
    Line {
        what: "an entry to a poller's thread and back, 32 on their way",
        ours: &[At("echo", &["32", "vmring, null device"], 0)],
        beside: &[
            ("`rtrb`", &[At("echo", &["32", "rtrb, in chunks"], 0)]),
            ("io_uring NOP", &[At("echo", &["32", "io_uring NOP"], 0)]),
            ("a channel", &[At("echo", &["32", "crossbeam-channel"], 0)]),
        ],
    },
    Line {
        what: "the same over the loopback, where a packet is two",
        ours: &[At("echo", &["32", "vmring, loopback"], 0)],
        beside: &[],
    },
    Line {
        what: "one entry there and back, both sides spinning / its 99.9 %",
        ours: &[
            At("latency", &["vmring, null device"], 0),
            At("latency", &["vmring, null device"], 2),
        ],
        beside: &[(
            "a cache line",
            &[At("latency", &["a cache line"], 0), At("latency", &["a cache line"], 2)],
        )],
    },
    Line {
        what: "the same, both asleep, µs",
        ours: &[At("wakeup", &["vmring, wait"], 0)],
        beside: &[
            ("eventfd", &[At("wakeup", &["eventfd"], 0)]),
            ("futex", &[At("wakeup", &["futex"], 0)]),
        ],
    },
    Line {
        what: "two guests, 60 B, untouched / touched",
        ours: &[
            At("guests", &["60", "untouched", "vmring, inline"], 0),
            At("guests", &["60", "touched", "vmring, inline"], 0),
        ],
        beside: &[
            (
                "bare loop",
                &[
                    At("guests", &["60", "untouched", "bare loop"], 0),
                    At("guests", &["60", "touched", "bare loop"], 0),
                ],
            ),
            (
                "a Unix stream",
                &[
                    At("guests", &["60", "untouched", "Unix stream"], 0),
                    At("guests", &["60", "touched", "Unix stream"], 0),
                ],
            ),
        ],
    },
    Line {
        what: "two guests, 1,514 B",
        ours: &[
            At("guests", &["1514", "untouched", "vmring, inline"], 0),
            At("guests", &["1514", "touched", "vmring, inline"], 0),
        ],
        beside: &[
            (
                "bare loop",
                &[
                    At("guests", &["1514", "untouched", "bare loop"], 0),
                    At("guests", &["1514", "touched", "bare loop"], 0),
                ],
            ),
            (
                "a Unix stream",
                &[
                    At("guests", &["1514", "untouched", "Unix stream"], 0),
                    At("guests", &["1514", "touched", "Unix stream"], 0),
                ],
            ),
            (
                "Unix datagrams",
                &[
                    At("guests", &["1514", "untouched", "Unix datagrams"], 0),
                    At("guests", &["1514", "touched", "Unix datagrams"], 0),
                ],
            ),
        ],
    },
    Line {
        what: "two guests, 64 KiB",
        ours: &[
            At("guests", &["65535", "untouched", "vmring, inline"], 0),
            At("guests", &["65535", "touched", "vmring, inline"], 0),
        ],
        beside: &[
            (
                "bare loop",
                &[
                    At("guests", &["65535", "untouched", "bare loop"], 0),
                    At("guests", &["65535", "touched", "bare loop"], 0),
                ],
            ),
            (
                "a Unix stream",
                &[
                    At("guests", &["65535", "untouched", "Unix stream"], 0),
                    At("guests", &["65535", "touched", "Unix stream"], 0),
                ],
            ),
        ],
    },
];

/// What one thread does, wherever the other processor is.
const ONE_THREAD: &[Line] = &[
    Line {
        what: "a read posted and reaped over a device that does nothing: batch 32 / 1",
        ours: &[
            At("inline", &["32", "vmring, one by one"], 0),
            At("inline", &["1", "vmring, one by one"], 0),
        ],
        beside: &[(
            "two `rtrb` queues",
            &[
                At("inline", &["32", "two rtrb queues and no device"], 0),
                At("inline", &["1", "two rtrb queues and no device"], 0),
            ],
        )],
    },
    Line {
        what: "forwarding, 2 / 1,024 interfaces on the network",
        ours: &[
            At("growth", &["2", "1", "one pair"], 0),
            At("growth", &["1024", "1", "one pair"], 0),
        ],
        beside: &[],
    },
    Line {
        what: "the vmnet driver where a call costs 300 ns: batch 32 / 200",
        ours: &[
            At("vmnet", &["300 ns a call", "reading", "32", "vmring, inline"], 0),
            At("vmnet", &["300 ns a call", "reading", "200", "vmring, inline"], 0),
        ],
        beside: &[(
            "one packet a call",
            &[At(
                "vmnet",
                &["300 ns a call", "reading", "1", "loop over the C ABI, one packet a call"],
                0,
            )],
        )],
    },
    Line {
        what: "where vmnet takes 250 ns a packet",
        ours: &[At("vmnet", &["250 ns a packet", "reading", "32", "vmring, inline"], 0)],
        beside: &[(
            "a batched loop by hand",
            &[At(
                "vmnet",
                &["250 ns a packet", "reading", "32", "loop over the C ABI, in batches"],
                0,
            )],
        )],
    },
];

/// Writes what the report has of the README's figures.
pub(crate) fn write(report: &Report, path: &Path) -> Result<()> {
    let text = text(&report.heading().to_string(), report.heading().rounds(), report.tables())?;
    std::fs::write(path, text)
        .map_err(|error| format!("the table {} was not written: {error}", path.display()).into())
}

fn text(machine: &str, rounds: u32, tables: &[Table]) -> Result<String> {
    let places = places(tables);
    let what = match rounds {
        1 => "one round".to_owned(),
        _ => format!("medians of up to {rounds} rounds"),
    };
    let mut text = format!("One run on {machine}: {what}, in ns.");
    for place in &places {
        // Writing to a string does not fail.
        let (name, ns) = (place.distance.name(), place.round_trip_ns);
        let _ = match place.distance {
            Distance::One => write!(text, " There is only one processor."),
            _ => write!(text, " **{name}**: a cache line there and back takes {ns:.0} ns."),
        };
    }
    text.push('\n');
    let of_places: Vec<_> = places.iter().map(|place| Some(place.distance)).collect();
    let parts = [("two threads", TWO_THREADS, &of_places[..]), ("one thread", ONE_THREAD, &[None])];
    let mut any = false;
    for (name, lines, places) in parts {
        let rows: Vec<_> = lines.iter().filter_map(|line| line.cells(tables, places)).collect();
        if rows.is_empty() {
            continue;
        }
        any = true;
        let mut head = vec![name.to_owned()];
        for place in places {
            let place = place.map_or(String::new(), |place| format!(", {}", place.name()));
            head.extend([format!("vmring{place}"), "beside it".to_owned()]);
        }
        let rule = vec!["---".to_owned(); head.len()];
        let _ = writeln!(text);
        for row in [head, rule].iter().chain(&rows) {
            let _ = writeln!(text, "| {} |", row.join(" | "));
        }
    }
    if any { Ok(text) } else { Err("nothing was measured that the table has".into()) }
}

/// The places that any table has, near before far.
fn places(tables: &[Table]) -> Vec<Place> {
    let all = [Distance::One, Distance::Near, Distance::Far];
    let find = |distance| {
        let mut places = tables.iter().flat_map(Table::places);
        places.find(|place| place.distance == distance).copied()
    };
    all.into_iter().filter_map(find).collect()
}

impl Line {
    /// The cells of the line. `None` if vmring's figure was measured in no place.
    fn cells(&self, tables: &[Table], places: &[Option<Distance>]) -> Option<Vec<String>> {
        let mut cells = vec![self.what.to_owned()];
        let mut any = false;
        for place in places {
            let ours = figures(self.ours, tables, *place);
            any |= ours.is_some();
            let beside: Vec<_> = self
                .beside
                .iter()
                .filter_map(|(name, at)| Some(format!("{} {name}", figures(at, tables, *place)?)))
                .collect();
            cells.extend([ours.unwrap_or_default(), beside.join(", ")]);
        }
        any.then_some(cells)
    }
}

/// The figures, with slashes between them. `None` if one was not measured.
fn figures(all: &[At], tables: &[Table], place: Option<Distance>) -> Option<String> {
    let figure = |At(table, labels, figure): &At| {
        let mut named = tables.iter().filter(|one| one.name() == *table);
        named.find_map(|table| table.median(place, labels, *figure)).map(grouped)
    };
    Some(all.iter().map(figure).collect::<Option<Vec<_>>>()?.join(" / "))
}

/// The number, with a comma in front of its thousands.
fn grouped(value: f64) -> String {
    let text = shorten(value);
    match text.len() {
        4.. if value >= 1000.0 => {
            let (thousands, rest) = text.split_at(text.len() - 3);
            format!("{thousands},{rest}")
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guests;

    /// A table of guests in these places, whose vmring takes a multiple of the round trip.
    fn tables(trips: &[f64]) -> Vec<Table> {
        let mut table = Table::new("guests", "made up", guests::LABELS, &["ns/packet"]);
        for trip in trips {
            table.begin(Place::of(vec![*trip]), [11, 11]);
            for (receiver, ns) in [("untouched", *trip), ("touched", 10.0 * trip)] {
                table.row(&["1514", receiver, "vmring, inline"], &[&[ns]]);
                table.row(&["1514", receiver, "bare loop"], &[&[ns / 2.0]]);
            }
        }
        let mut one = Table::new("growth", "made up", crate::growth::LABELS, &["ns/packet"]);
        one.row(&["2", "1", "one pair"], &[&[34.0]]);
        one.row(&["1024", "1", "one pair"], &[&[33.0]]);
        vec![table, one]
    }

    #[test]
    fn the_table_names_each_place_that_was_seen() -> Result<()> {
        let wanted = "One run on a machine: medians of up to 11 rounds, in ns. **near**: a cache line there \
            and back takes 130 ns. **far**: a cache line there and back takes 540 ns.\n\n\
            | two threads | vmring, near | beside it | vmring, far | beside it |\n\
            | --- | --- | --- | --- | --- |\n\
            | two guests, 1,514 B | 130 / 1,300 | 65.0 / 650 bare loop | 540 / 5,400 | 270 / 2,700 bare \
            loop |\n\n\
            | one thread | vmring | beside it |\n\
            | --- | --- | --- |\n\
            | forwarding, 2 / 1,024 interfaces on the network | 34.0 / 33.0 |  |\n";
        assert_eq!(text("a machine", 11, &tables(&[130.0, 540.0]))?, wanted);
        let near = text("a machine", 1, &tables(&[130.0]))?;
        assert!(near.starts_with("One run on a machine: one round, in ns."), "{near}");
        assert!(
            near.contains("| two guests, 1,514 B | 130 / 1,300 | 65.0 / 650 bare loop |\n"),
            "{near}"
        );
        assert!(!near.contains("far"), "{near}");
        assert!(text("a machine", 11, &[]).is_err());
        Ok(())
    }
}
