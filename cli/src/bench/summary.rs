//! The results: one JSON object, or tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde::Serialize;
use vmring::Ring;
use vmring::stats::RingStats;

use super::check::Totals;
use super::limits::SAMPLE;
use super::place::Place;
use super::plot::{self, Bar, Group};
use crate::report::{Batches, Table, grouped, percentile, round};

/// Everything that was found out. What the measurement did not get to is missing.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Summary {
    /// Whether every packet was as it had to be.
    pub(crate) ok: bool,
    /// The failure, in a sentence.
    pub(crate) failed: Option<String>,
    /// Whether it was ended before its time.
    pub(crate) interrupted: bool,
    pub(crate) device: String,
    /// How frames are moved, where there is a choice: `io_uring` or `plain`.
    pub(crate) engine: Option<&'static str>,
    /// Bytes of a packet.
    pub(crate) size: usize,
    /// What the packets leave to the device.
    pub(crate) offloads: Vec<&'static str>,
    /// Packets submitted at once.
    pub(crate) batch: usize,
    pub(crate) seconds: u64,
    pub(crate) processors: usize,
    /// The two processors that are used, where a thread can be kept on one.
    pub(crate) cpus: Option<[usize; 2]>,
    /// Where they are, if there are two; and at the end.
    pub(crate) place: Option<Place>,
    pub(crate) place_at_end: Option<Place>,
    pub(crate) one_way: Vec<OneWaySummary>,
    /// The rings of the one-way runs.
    pub(crate) rings: Vec<RingsSummary>,
    pub(crate) round_trip: Vec<RoundTripSummary>,
    /// A guest on each of two threads, beside the bare loop, in each place that was seen.
    pub(crate) two_threads: Vec<TwoThreadsSummary>,
    /// What was not measured, and why.
    pub(crate) left_out: Vec<String>,
    pub(crate) checks: ChecksSummary,
    pub(crate) packets: Totals,
    /// Whether the device may lose packets.
    pub(crate) may_lose: bool,
    /// Packets that the network dropped.
    pub(crate) drops: u64,
    /// The same by reason, for the reasons that occurred.
    pub(crate) drops_by_reason: BTreeMap<&'static str, u64>,
}

/// What is checked within the measured time.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChecksSummary {
    /// In the one-way runs the number of every packet is checked, and the body of one in this many.
    pub(crate) one_way_bodies_one_in: u64,
    /// The part of a packet's time in the one-way runs that writing and comparing takes.
    pub(crate) one_way_ns_per_packet: f64,
}

/// What was measured in one place.
#[derive(Debug, Serialize)]
pub(crate) struct OneWaySummary {
    pub(crate) drive: &'static str,
    /// Where the two processors were, if there are two threads.
    pub(crate) place: Option<Place>,
    pub(crate) rates: Rates,
}

/// What was measured in one place.

#[derive(Debug, Serialize)]
pub(crate) struct RoundTripSummary {
    pub(crate) drive: &'static str,
    pub(crate) waits: &'static str,
    /// The same as for one way.
    pub(crate) place: Option<Place>,
    pub(crate) trips: Trips,
}

#[derive(Debug, Serialize)]
pub(crate) struct TwoThreadsSummary {
    pub(crate) place: Place,
    pub(crate) vmring: Rates,
    pub(crate) bare_loop: Rates,
    /// How many times as long as the bare loop a packet takes.
    pub(crate) times_bare_loop: f64,
}

impl TwoThreadsSummary {
    pub(crate) fn new(place: Place, vmring: Rates, bare_loop: Rates) -> Self {
        let times = vmring.ns_per_packet.median / bare_loop.ns_per_packet.median;
        Self { place, vmring, bare_loop, times_bare_loop: round(times, 2) }
    }
}

/// The spread over several intervals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Rates {
    pub(crate) intervals: usize,
    pub(crate) packets_per_s: Spread,
    pub(crate) gbit_per_s: Spread,
    pub(crate) ns_per_packet: Spread,
}

impl Rates {
    /// From rates in packets per second, with `size` bytes each. `None` if there are no rates, or
    /// nothing moved.
    pub(crate) fn of(rates: &[f64], size: usize) -> Option<Self> {
        let mut sorted = rates.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |p| percentile(&sorted, p);
        let spread = |places, of: &dyn Fn(f64) -> f64| {
            let values = (of(at(0.5)?), of(at(0.0)?), of(at(1.0)?));
            let (median, a, b) = values;
            let [median, min, max] = [median, a.min(b), a.max(b)].map(|v| round(v, places));
            Some(Spread { median, min, max })
        };
        if at(0.5)? == 0.0 {
            return None;
        }
        // In an interval without packets, a packet took at least the interval.
        let ns = |rate: f64| 1e9 / rate.max(1.0);
        Some(Self {
            intervals: rates.len(),
            packets_per_s: spread(0, &|rate| rate)?,
            gbit_per_s: spread(3, &|rate| rate * size as f64 * 8.0 / 1e9)?,
            ns_per_packet: spread(1, &ns)?,
        })
    }
}

/// Nanoseconds of many trips.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Trips {
    pub(crate) count: u64,
    pub(crate) min_ns: u64,
    pub(crate) median_ns: u64,
    pub(crate) p99_ns: u64,
    pub(crate) p99_9_ns: u64,
    pub(crate) max_ns: u64,
}

impl Trips {
    /// From the trips of several intervals. `None` if there was none.
    pub(crate) fn of(intervals: &[Histogram<u64>]) -> Option<Self> {
        let (first, others) = intervals.split_first()?;
        let mut times = first.clone();
        for other in others {
            times.add(other).expect("they have the same bounds");
        }
        (!times.is_empty()).then(|| Self {
            count: times.len(),
            min_ns: times.min(),
            median_ns: times.value_at_quantile(0.5),
            p99_ns: times.value_at_quantile(0.99),
            p99_9_ns: times.value_at_quantile(0.999),
            max_ns: times.max(),
        })
    }
}

/// The counters of the rings in one run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct RingsSummary {
    pub(crate) drive: &'static str,
    /// Batches of the endpoint that sends, and of the one that receives.
    pub(crate) write_batches: Batches,
    pub(crate) read_batches: Batches,
    /// Times that the driving thread had nothing to do and slept, over all rings.
    pub(crate) parks: u64,
    /// Times that a submit had to wake it.
    pub(crate) doorbells: u64,
    /// Times that the device woke it.
    pub(crate) device_wakeups: u64,
    /// Times that it had to wake the reaping thread.
    pub(crate) notifications: u64,
    /// Times that the device took less than it was offered.
    pub(crate) retries: u64,
    /// Packets written by the endpoint that sends.
    pub(crate) packets: u64,
}

impl RingsSummary {
    /// Summarizes the rings, from the one that sends to the one that receives. They may be the
    /// same. What drives them is still unnamed.
    pub(crate) fn of<'a>(rings: impl Iterator<Item = &'a Ring> + Clone) -> Self {
        let stats: Vec<_> = rings.clone().map(Ring::stats).collect();
        let (Some(first), Some(last)) = (stats.first(), stats.last()) else {
            return Self::default();
        };
        let sum = |of: fn(&RingStats) -> u64| stats.iter().map(of).sum();
        Self {
            write_batches: Batches::of(first.tx_packets, &first.write_batches),
            read_batches: Batches::of(last.rx_packets, &last.read_batches),
            parks: sum(|stats| stats.parks),
            doorbells: rings.map(|ring| ring.control().doorbells()).sum(),
            device_wakeups: sum(|stats| stats.device_wakeups),
            notifications: sum(|stats| stats.notifications),
            retries: sum(|stats| stats.retries),
            packets: first.tx_packets,
            ..Self::default()
        }
    }

    /// A count per thousand packets.
    fn per_thousand(&self, n: u64) -> String {
        format!("{:.2}", n as f64 * 1000.0 / self.packets.max(1) as f64)
    }
}

impl Summary {
    /// The tables for people.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "The {} device{}: packets of {} bytes, {} processors\n",
            self.device,
            self.engine.map_or_else(String::new, |engine| format!(" ({engine})")),
            grouped(self.size as u64),
            self.processors,
        );
        if !self.offloads.is_empty() {
            let _ = writeln!(text, "Offloads: {}", self.offloads.join(", "));
        }
        self.tell_place(&mut text);
        self.tell_one_way(&mut text);
        self.tell_two_threads(&mut text);
        self.tell_round_trip(&mut text);
        self.tell_rings(&mut text);
        text.push_str(&plot::text(&self.groups()));
        text.push('\n');
        for why in &self.left_out {
            let _ = writeln!(text, "Left out: {why}");
        }
        let checks = &self.checks;
        let _ = writeln!(
            text,
            "Checked: the number of every packet, and all bytes of one in {}, which takes about {:.1} ns \
             of a packet's time one way; in round trips all bytes of every packet, outside of the \
             time.",
            checks.one_way_bodies_one_in, checks.one_way_ns_per_packet
        );
        self.tell_packets(&mut text);
        if self.interrupted {
            text.push_str("The run was ended before its time: these are the figures so far.\n");
        }
        text
    }

    /// The bars of a plot.
    pub(crate) fn groups(&self) -> Vec<Group> {
        let mut one_way = Vec::new();
        let mut add = |name: String, rates: &Rates, is_rival| {
            let Spread { median, min, max } = rates.ns_per_packet;
            one_way.push(Bar { name, value: median, range: Some([min, max]), is_rival });
        };
        for run in &self.one_way {
            add(of_place(run.drive, run.place), &run.rates, false);
        }
        for run in &self.two_threads {
            let place = Some(run.place);
            add(of_place("two threads", place), &run.vmring, false);
            add(of_place("bare loop", place), &run.bare_loop, true);
        }
        let trips = self.round_trip.iter().map(|run| {
            let name = of_place(&format!("{}, {}", run.drive, run.waits), run.place);
            let value = run.trips.median_ns as f64 / 1000.0;
            Bar { name, value, range: None, is_rival: false }
        });
        let named =
            [("One way, ns per packet", one_way), ("One packet out and back, us", trips.collect())];
        let groups = named.map(|(name, bars)| Group { name: name.to_owned(), bars });
        groups.into_iter().filter(|group| !group.bars.is_empty()).collect()
    }

    /// Whether a figure of two threads may be of another place than the heading says.
    fn has_moved(&self) -> bool {
        let Some(place) = self.place else { return false };
        let one_way = self.one_way.iter().filter_map(|run| run.place);
        let mut all = one_way.chain(self.round_trip.iter().filter_map(|run| run.place));
        self.place_at_end.is_some_and(|end| end.distance != place.distance)
            || all.any(|seen| seen.distance != place.distance)
    }

    /// The lines above a picture.
    pub(crate) fn heading(&self) -> Vec<String> {
        let mut text = format!(
            "vmring bench, the {} device: packets of {} bytes in batches of {}\n",
            self.device,
            grouped(self.size as u64),
            self.batch
        );
        self.tell_place(&mut text);
        text.lines().map(str::to_owned).collect()
    }

    // Writing to a string does not fail.

    fn tell_place(&self, text: &mut String) {
        let Some(Place { distance, round_trip_ns }) = self.place else { return };
        let which = self.cpus.map_or_else(
            || "Two processors".to_owned(),
            |[a, b]| format!("Processors {a} and {b}"),
        );
        let _ = write!(
            text,
            "{which}: {}, a cache line there and back takes {round_trip_ns:.0} ns",
            distance.name()
        );
        let moved = self.place_at_end.filter(|place| place.distance != distance);
        if let Some(Place { distance, round_trip_ns }) = moved {
            let _ = write!(text, "; at the end {}, {round_trip_ns:.0} ns", distance.name());
        }
        text.push('\n');
    }

    fn tell_two_threads(&self, text: &mut String) {
        let heading = ["place", "ns/packet", "min", "max", "bare loop", "min", "max", "times"];
        let mut table = Table::new(&heading);
        let mut intervals = 0;
        for run in &self.two_threads {
            intervals = intervals.max(run.vmring.intervals);
            let (ours, bare) = (run.vmring.ns_per_packet, run.bare_loop.ns_per_packet);
            table.row([
                format!("{}, {:.0} ns", run.place.distance.name(), run.place.round_trip_ns),
                nanos(ours.median),
                nanos(ours.min),
                nanos(ours.max),
                nanos(bare.median),
                nanos(bare.min),
                nanos(bare.max),
                format!("{:.2}", run.times_bare_loop),
            ]);
        }
        if intervals > 0 {
            let _ = write!(
                text,
                "\nA guest on each of two threads, and the bare loop: medians of {intervals} \
                 intervals\n{}",
                table.text()
            );
        }
    }

    fn tell_one_way(&self, text: &mut String) {
        let heading = ["driven", "packets/s", "min", "max", "Gbit/s", "ns/packet", "min", "max"];
        let mut table = Table::new(&heading);
        let mut intervals = 0;
        for run in &self.one_way {
            let rates = &run.rates;
            intervals = intervals.max(rates.intervals);
            let (packets, ns) = (rates.packets_per_s, rates.ns_per_packet);
            table.row([
                of_place(run.drive, run.place.filter(|_| self.has_moved())),
                grouped(packets.median as u64),
                grouped(packets.min as u64),
                grouped(packets.max as u64),
                format!("{:.2}", rates.gbit_per_s.median),
                nanos(ns.median),
                nanos(ns.min),
                nanos(ns.max),
            ]);
        }
        if intervals > 0 {
            let batch = self.batch;
            let _ = write!(
                text,
                "\nOne way, in batches of {batch}: medians of {intervals} intervals\n{}",
                table.text()
            );
        }
    }

    fn tell_round_trip(&self, text: &mut String) {
        let heading = ["driven", "waits", "median", "99 %", "99.9 %", "min", "max", "trips"];
        let mut table = Table::new(&heading);
        for run in &self.round_trip {
            let trips = &run.trips;
            let us = |ns: u64| match ns {
                0..1_000_000 => format!("{:.2}", ns as f64 / 1000.0),
                _ => format!("{:.0}", ns as f64 / 1000.0),
            };
            table.row([
                of_place(run.drive, run.place.filter(|_| self.has_moved())),
                run.waits.to_owned(),
                us(trips.median_ns),
                us(trips.p99_ns),
                us(trips.p99_9_ns),
                us(trips.min_ns),
                us(trips.max_ns),
                grouped(trips.count),
            ]);
        }
        if !self.round_trip.is_empty() {
            let _ = write!(
                text,
                "\nOne packet out and back, from submit to reap, in us\n{}",
                table.text()
            );
        }
    }

    fn tell_rings(&self, text: &mut String) {
        let heading = ["driven", "per write", "per read", "slept", "submit", "device", "reaper"];
        let mut table = Table::new(&heading);
        for rings in &self.rings {
            table.row([
                rings.drive.to_owned(),
                format!("{:.1}", rings.write_batches.mean),
                format!("{:.1}", rings.read_batches.mean),
                rings.per_thousand(rings.parks),
                rings.per_thousand(rings.doorbells),
                rings.per_thousand(rings.device_wakeups),
                rings.per_thousand(rings.notifications),
            ]);
        }
        if !self.rings.is_empty() {
            let _ = write!(
                text,
                "\nThe rings, one way: packets per write and per read; and how often, for 1,000\n\
                 packets, the driver slept, a submit or the device woke it, it woke the reaper\n{}",
                table.text()
            );
        }
    }

    fn tell_packets(&self, text: &mut String) {
        let Totals { sent, lost, reordered, duplicated, corrupt, refused, .. } = self.packets;
        let counts = [
            (lost, "lost"),
            (corrupt, "corrupt"),
            (duplicated, "doubled"),
            (reordered, "out of order"),
            (refused, "refused by the device"),
        ];
        let _ = write!(text, "Of {} packets", grouped(sent));
        let told: Vec<_> = counts
            .iter()
            .filter(|(n, _)| *n > 0)
            .map(|(n, what)| format!("{} {what}", grouped(*n)))
            .collect();
        let _ = match &told[..] {
            [] => writeln!(text, " none was lost, corrupt, doubled or out of order."),
            _ => writeln!(text, ": {}.", told.join(", ")),
        };
        let drops = self.drops_by_reason.iter();
        let drops: Vec<_> = drops.map(|(why, n)| format!("{} {why}", grouped(*n))).collect();
        let _ = match &drops[..] {
            [] => writeln!(text, "The device dropped none."),
            _ => writeln!(text, "The device dropped: {}.", drops.join(", ")),
        };
    }
}

/// A name with the place behind it.
fn of_place(name: &str, place: Option<Place>) -> String {
    place.map_or_else(|| name.to_owned(), |place| format!("{name}, {}", place.distance.name()))
}

/// Nanoseconds as a number. From a millisecond on, an interval moved next to nothing, and only the
/// size of the number matters.
fn nanos(ns: f64) -> String {
    if ns < 1e6 { format!("{ns:.0}") } else { format!("{ns:.0e}") }
}

impl ChecksSummary {
    pub(crate) fn new(ns_per_packet: f64) -> Self {
        Self { one_way_bodies_one_in: SAMPLE, one_way_ns_per_packet: round(ns_per_packet, 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::place::Distance;

    #[test]
    fn rates_are_of_the_median_interval_and_times_of_the_same() {
        let rates = Rates::of(&[2e6, 1e6, 4e6], 1000).unwrap();
        assert_eq!(rates.packets_per_s, Spread { median: 2e6, min: 1e6, max: 4e6 });
        assert_eq!(rates.gbit_per_s, Spread { median: 16.0, min: 8.0, max: 32.0 });
        assert_eq!(rates.ns_per_packet, Spread { median: 500.0, min: 250.0, max: 1000.0 });
        assert_eq!(Rates::of(&[], 1000), None);
        assert_eq!(Rates::of(&[0.0, 0.0], 1000), None);
        assert_eq!(Rates::of(&[0.0, 5.0, 6.0], 1000).unwrap().ns_per_packet.max, 1e9);
    }

    const NEAR: Place = Place { distance: Distance::Near, round_trip_ns: 130.0 };
    const FAR: Place = Place { distance: Distance::Far, round_trip_ns: 541.0 };

    #[test]
    fn the_places_and_the_bare_loop_are_told_and_drawn() {
        let rates = |rate| Rates::of(&[rate, 2.0 * rate, rate], 1514).unwrap();
        let one_way = |drive, place, rate| OneWaySummary { drive, place, rates: rates(rate) };
        let near = Some(NEAR);
        let mut summary = Summary {
            cpus: Some([0, 8]),
            place: Some(NEAR),
            place_at_end: Some(NEAR),
            one_way: vec![one_way("inline", None, 20e6), one_way("poller", near, 10e6)],
            two_threads: vec![
                TwoThreadsSummary::new(NEAR, rates(15e6), rates(20e6)),
                TwoThreadsSummary::new(FAR, rates(2e6), rates(4e6)),
            ],
            ..Summary::default()
        };
        let text = summary.text();
        let place = "Processors 0 and 8: near, a cache line there and back takes 130 ns\n";
        assert!(text.contains(place), "{text}");
        let rows: Vec<_> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let row: Vec<_> = "far, 541 ns 500 250 500 250 125 250 2.00".split(' ').collect();
        assert!(rows.contains(&row), "{text}");
        assert_eq!(summary.two_threads[0].times_bare_loop, 1.33);
        let names: Vec<_> = summary.groups().into_iter().flat_map(|group| group.bars).collect();
        let names: Vec<_> = names.iter().map(|bar| (&*bar.name, bar.is_rival)).collect();
        let wanted = [
            ("inline", false),
            ("poller, near", false),
            ("two threads, near", false),
            ("bare loop, near", true),
            ("two threads, far", false),
            ("bare loop, far", true),
        ];
        assert_eq!(names, wanted);
        assert!(!text.contains("  poller, near  10,000,000"), "one place needs no word: {text}");
        summary.one_way.push(one_way("poller", Some(FAR), 5e6));
        let text = summary.text();
        for row in ["  poller, near  10,000,000", "  poller, far    5,000,000"] {
            assert!(text.contains(row), "no {row} in {text}");
        }
        summary.one_way.pop();
        summary.place_at_end = Some(FAR);
        let text = summary.text();
        assert!(text.contains("130 ns; at the end far, 541 ns\n"), "{text}");
        assert!(text.contains("  poller, near  10,000,000"), "{text}");
    }

    #[test]
    fn the_widest_tables_fit_into_80_columns() {
        let rates = Rates::of(&[99_999_999.0, 99_999_999.0, 0.0], 1514).unwrap();
        let mut times = Histogram::new(3).unwrap();
        for ns in [900, 1_000_000_000, 1_000_000_000] {
            times.record(ns).unwrap();
        }
        let counts = RingsSummary {
            drive: "poller",
            parks: 1_000_000,
            doorbells: 1_000_000,
            device_wakeups: 1_000_000,
            notifications: 1_000_000,
            packets: 100_000,
            ..RingsSummary::default()
        };
        let summary = Summary {
            place: Some(FAR),
            place_at_end: Some(NEAR),
            cpus: Some([126, 127]),
            one_way: vec![OneWaySummary { drive: "poller", place: Some(NEAR), rates }],
            rings: vec![counts],
            two_threads: vec![
                TwoThreadsSummary::new(NEAR, rates, rates),
                TwoThreadsSummary::new(FAR, rates, rates),
            ],
            round_trip: vec![RoundTripSummary {
                drive: "poller",
                waits: "spinning",
                place: Some(FAR),
                trips: Trips::of(&[times]).unwrap(),
            }],
            ..Summary::default()
        };
        // What is no table is folded later.
        let (text, prose) = (summary.text(), ["Checked: ", "Processors "]);
        for line in text.lines().filter(|line| !prose.iter().any(|start| line.starts_with(start))) {
            assert!(line.chars().count() <= crate::report::WIDTH, "{line}");
        }
        for figure in ["99,999,999", "1e9", "10000.00"] {
            assert!(text.contains(figure), "no {figure} in {text}");
        }
    }

    #[test]
    fn trips_are_counted_by_their_share() {
        let mut times = Histogram::new(3).unwrap();
        assert_eq!(Trips::of(&[]), None);
        assert_eq!(Trips::of(&[times.clone()]), None);
        (1..=1000).for_each(|ns| times.record(ns).unwrap());
        let trips = Trips::of(&[times.clone(), times]).unwrap();
        assert_eq!((trips.count, trips.min_ns, trips.median_ns), (2000, 1, 500));
        assert_eq!((trips.p99_ns, trips.p99_9_ns, trips.max_ns), (990, 999, 1000));
    }
}
