//! Two guests: packets one way from one thread to another, which inspects them or only their
//! lengths.
//!
//! Nothing may be lost. If the contender itself does not hold the sender back, the receiver says
//! how many packets it has space for.

pub(crate) mod bare;
pub(crate) mod inspection;
pub(crate) mod ours;
pub(crate) mod sockets;
pub(crate) mod traffic;

use std::time::Duration;

use crate::net::{FULL_FRAME, SMALL_FRAME};
use crate::place::Distance;
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::rounds::take_turns;
use traffic::Traffic;

/// The longest packet of the network with the greatest MTU.
pub(crate) const LONG_PACKET: usize = 65_535;
const LENGTHS: [usize; 3] = [SMALL_FRAME, FULL_FRAME, LONG_PACKET];
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Bare,
    /// The bare loop behind the least that a ring can be, on each side.
    Queued,
    Ours(ours::Driven),
    Datagrams,
    Stream,
}

impl Method {
    const INLINE: Self = Self::Ours(ours::Driven::Inline);
    const ALL: [Self; 7] = [
        Self::Bare,
        Self::Queued,
        Self::INLINE,
        Self::Ours(ours::Driven::TwoPollers),
        Self::Ours(ours::Driven::SharedPoller),
        Self::Datagrams,
        Self::Stream,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare loop",
            Self::Queued => "bare loop behind rtrb queues",
            Self::Ours(driven) => driven.name(),
            Self::Datagrams => "Unix datagrams",
            Self::Stream => "Unix stream",
        }
    }
}

#[derive(Clone, Copy)]
struct Contender {
    method: Method,
    length: usize,
    touched: bool,
}

impl Contender {
    /// Nanoseconds per packet.
    fn measure(&self, time: Duration) -> Result<f64> {
        let Self { method, length, touched } = *self;
        let traffic = Traffic { length, touched, time, watched: false };
        let measured = match method {
            Method::Bare => bare::measure(traffic, false),
            Method::Queued => bare::measure(traffic, true),
            Method::Ours(driven) => ours::measure(driven, traffic),
            Method::Datagrams => sockets::measure_datagrams(traffic),
            Method::Stream => sockets::measure_stream(traffic),
        };
        let measured = measured.map(|carried| carried.ns);
        measured.map_err(|error| format!("{}, {length} B: {error}", method.name()).into())
    }
}

/// The labels that tell the rows of the table apart.
pub(crate) const LABELS: &[&str] = &["bytes", "receiver", "contender"];

/// The name of a variant.
fn seen(touched: bool) -> &'static str {
    if touched { "touched" } else { "untouched" }
}

pub(crate) fn run(plan: Plan) -> Part {
    let (mut contenders, mut refused) = (Vec::new(), Vec::new());
    for length in LENGTHS {
        let datagrams = sockets::takes_datagrams_of(length)?;
        for touched in [false, true] {
            for method in Method::ALL {
                let taken = method != Method::Datagrams || datagrams;
                let list = if taken { &mut contenders } else { &mut refused };
                list.push(Contender { method, length, touched });
            }
        }
    }
    let halves = take_turns(plan, &mut contenders, |contender| {
        contender.measure(plan.time).map(|ns| Some([ns]))
    })?;
    let mut table = Table::new(
        "guests",
        "packets one way between two threads; touched: the receiver reads a word of each cache line",
        LABELS,
        &["ns/packet", "packets/s"],
    );
    let mut all = Vec::new();
    for half in &halves {
        half.begin(&mut table);
        let mut medians = Vec::new();
        for (contender, [values]) in contenders.iter().zip(&half.values) {
            let Contender { method, length, touched } = *contender;
            let rates: Vec<f64> = values.iter().map(|ns| 1e9 / ns).collect();
            let labels = [&length.to_string(), seen(touched), method.name()];
            medians.push((*contender, table.row(&labels, &[values, &rates])));
        }
        all.extend(half.wants(wants(&medians, half.distance())));
    }
    table.end();
    for Contender { method, length, touched } in refused {
        let name = format!("{}: the system refuses that length", method.name());
        table.row(&[&length.to_string(), seen(touched), &name], &[&[], &[]]);
    }
    Ok((vec![table], all))
}

/// What is wanted of the inline ring for one kind of packet in one place.
struct Limits {
    /// At most so many times as long as the bare loop.
    bare: f64,
    /// A Unix stream takes at least so many times as long.
    stream: Option<f64>,
}

/// The wants near each other and far apart.
const LIMITS: [(usize, bool, Limits, Limits); 6] = {
    const fn of(bare: f64, stream: Option<f64>) -> Limits {
        Limits { bare, stream }
    }
    [
        (SMALL_FRAME, false, of(2.5, Some(2.0)), of(1.5, Some(1.5))),
        (SMALL_FRAME, true, of(2.5, Some(2.0)), of(1.5, Some(1.5))),
        (FULL_FRAME, false, of(1.5, Some(5.0)), of(1.4, Some(4.0))),
        (FULL_FRAME, true, of(1.3, Some(2.4)), of(1.2, Some(1.3))),
        (LONG_PACKET, false, of(1.4, None), of(1.4, None)),
        (LONG_PACKET, true, of(1.15, None), of(1.05, None)),
    ]
};

/// The wants in one place: beside the bare loop, and beside the sockets.
fn wants(medians: &[(Contender, f64)], place: Distance) -> Vec<Want> {
    let of = |method: Method, length, touched| {
        let row = medians
            .iter()
            .find(|(c, _)| (c.method, c.length, c.touched) == (method, length, touched));
        row.map_or(f64::NAN, |row| row.1)
    };
    let mut wants = Vec::new();
    for (length, touched, near, far) in &LIMITS {
        let (length, touched) = (*length, *touched);
        let limits = if place == Distance::Far { far } else { near };
        let (what, ours) =
            (format!("{length} B {}", seen(touched)), of(Method::INLINE, length, touched));
        let ratio = ours / of(Method::Bare, length, touched);
        wants.push(Want::at_most(
            format!("{what}: vmring, inline / bare loop"),
            ratio,
            limits.bare,
        ));
        let datagrams = if touched { 4.0 } else { 15.0 };
        let datagrams = (length == FULL_FRAME).then_some(datagrams);
        for (rival, least) in [(Method::Stream, limits.stream), (Method::Datagrams, datagrams)] {
            let ratio = of(rival, length, touched) / ours;
            let name = format!("{what}: {} / vmring, inline", rival.name());
            wants.extend(least.map(|least| Want::at_least(name, ratio, least)));
        }
    }
    wants
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The wants of a table in which each contender takes its number of nanoseconds.
    fn of(place: Distance) -> Vec<serde_json::Value> {
        let ns = |method| match method {
            Method::Bare => 10.0,
            Method::INLINE => 13.0,
            Method::Stream => 26.0,
            _ => 1000.0,
        };
        let mut medians = Vec::new();
        for length in LENGTHS {
            for touched in [false, true] {
                for method in Method::ALL {
                    medians.push((Contender { method, length, touched }, ns(method)));
                }
            }
        }
        let json = |want| serde_json::to_value(want).expect("a want is JSON");
        wants(&medians, place).into_iter().map(json).collect()
    }

    #[test]
    fn each_place_has_wants_of_its_own() {
        let wanted = |wants: &[serde_json::Value], what: &str| {
            let mut found = wants.iter().filter(|want| want["what"] == what);
            let (want, None) = (found.next().expect(what), found.next()) else {
                panic!("two: {what}")
            };
            (want["measured"].as_f64(), want["wanted"].as_f64(), want["met"].as_bool())
        };
        let (near, far) = (of(Distance::Near), of(Distance::Far));
        let bare = "1514 B touched: vmring, inline / bare loop";
        assert_eq!(wanted(&near, bare), (Some(1.3), Some(1.3), Some(true)));
        assert_eq!(wanted(&far, bare), (Some(1.3), Some(1.2), Some(false)));
        let stream = "1514 B touched: Unix stream / vmring, inline";
        assert_eq!(wanted(&near, stream), (Some(2.0), Some(2.4), Some(false)));
        assert_eq!(wanted(&far, stream), (Some(2.0), Some(1.3), Some(true)));
        let long = "65535 B touched: vmring, inline / bare loop";
        assert_eq!(wanted(&near, long).1, Some(1.15));
        assert_eq!(wanted(&far, long).1, Some(1.05));
        // Six beside the bare loop, four beside a stream, and two beside datagrams.
        assert_eq!((near.len(), far.len()), (12, 12));
    }
}
