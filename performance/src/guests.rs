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

use crate::common::take_turns;
use crate::net::{FULL_FRAME, SMALL_FRAME};
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;
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
    let values = take_turns(plan, &mut contenders, |contender| contender.measure(plan.time))?;
    let mut table = Table::new(
        "guests",
        "packets one way between two threads; touched: the receiver reads a word of each cache line",
        LABELS,
        &["ns/packet", "packets/s"],
    );
    let mut medians = Vec::new();
    for (contender, values) in contenders.iter().zip(&values) {
        let Contender { method, length, touched } = *contender;
        let rates: Vec<f64> = values.iter().map(|ns| 1e9 / ns).collect();
        let labels = [&length.to_string(), seen(touched), method.name()];
        medians.push((*contender, table.row(&labels, &[values, &rates])));
    }
    for Contender { method, length, touched } in refused {
        let name = format!("{}: the system refuses that length", method.name());
        table.row(&[&length.to_string(), seen(touched), &name], &[&[], &[]]);
    }
    Ok((vec![table], wants(&medians)))
}

/// The wants: at most 1.4 times the bare loop, and this many times as fast as the sockets.
fn wants(medians: &[(Contender, f64)]) -> Vec<Want> {
    let of = |method: Method, length, touched| {
        let row = medians
            .iter()
            .find(|(c, _)| (c.method, c.length, c.touched) == (method, length, touched));
        row.map_or(f64::NAN, |row| row.1)
    };
    let mut wants = Vec::new();
    for length in LENGTHS {
        for touched in [false, true] {
            let ratio = of(Method::INLINE, length, touched) / of(Method::Bare, length, touched);
            let name = format!("{length} B {}: vmring, inline / bare loop", seen(touched));
            wants.push(Want::at_most(name, ratio, 1.4));
        }
    }
    for rival in [Method::Datagrams, Method::Stream] {
        for (touched, least) in [(false, 15.0), (true, 4.0)] {
            let ratio = of(rival, FULL_FRAME, touched) / of(Method::INLINE, FULL_FRAME, touched);
            let rival = rival.name();
            let name = format!("{FULL_FRAME} B {}: {rival} / vmring, inline", seen(touched));
            wants.push(Want::at_least(name, ratio, least));
        }
    }
    wants
}
