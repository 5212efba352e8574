//! `vmring bench`: measures how fast packets move through the rings on this machine, and checks
//! that all of them arrive as they were sent.
//!
//! One thread submits and reaps at both ends, as if two guests ran on one processor. With a poller
//! thread there are two threads. Last, each end has a thread of its own, beside the bare loop.

mod bare;
mod carry;
mod check;
mod endpoints;
#[cfg(test)]
mod faulty;
mod intervals;
mod limits;
mod one_way;
mod place;
mod plot;
mod progress;
mod queue;
mod round_trip;
mod setup;
mod summary;
mod two_threads;

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::args::BenchArgs;
use crate::device::DeviceName;
use crate::failure::Failure;
use crate::report::{grouped, offload_names, print_json, print_report};
use crate::stop::Stop;

use check::{Account, SMALLEST, SMALLEST_OF_TCP, Totals};
use endpoints::{Driving, Endpoints};
use intervals::InPlace;
use limits::{SAMPLE, SIZE, window};
use place::Processors;
use progress::Clock;
use setup::Setup;
use summary::{
    ChecksSummary, OneWaySummary, Rates, RingsSummary, RoundTripSummary, Summary, Trips,
};

/// The bytes of a VLAN tag.
const VLAN_TAG_LEN: u32 = 4;

/// What is measured one way: which thread drives the rings, and its name.
const ONE_WAY: [(Driving, &str); 2] = [(Driving::Inline, "inline"), (Driving::Poller, "poller")];
/// What is measured as round trips: which thread drives the rings, its name, and how it waits.
const ROUND_TRIP: [(Driving, &str, &str); 3] = [
    (Driving::Inline, "inline", "spinning"),
    (Driving::Spinning, "poller", "spinning"),
    (Driving::Parked, "poller", "parked"),
];

/// What is measured beside them: two threads, and the bare loop.
const BESIDE: usize = 2;

pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let device = args.device;
    let processors = Processors::choose(args.cpus)?;
    let mut drawing = args.plot.as_deref().map(Drawing::create).transpose()?;
    let plot = &mut drawing;
    #[cfg(target_os = "linux")]
    if device.is_tap() {
        return crate::tap::in_namespace(|| {
            crate::tap::make_bridge()?;
            run_on(device, args, processors, plot)
        })?;
    }
    run_on(device, args, processors, plot)
}

fn run_on(
    device: DeviceName,
    args: &BenchArgs,
    processors: Processors,
    plot: &mut Option<Drawing>,
) -> Result<(), Failure> {
    let offload = args.offload;
    if offload && device != DeviceName::Embedded {
        return Err(Failure::Usage("--offload is for the embedded device".to_owned()));
    }
    args.nat.check(usize::from(device == DeviceName::Embedded))?;
    let interface = endpoints::start_interface(device, "bench", offload, &args.nat)
        .map_err(Failure::starting)?;
    // Packets have no VLAN tag here, without which the longest are shorter.
    let longest = interface.mtu() + vmring::ETHERNET_HEADER_LEN as u32;
    let size = match offload {
        false => size(args.size, SMALLEST, interface.max_packet_size().min(longest))?,
        true => {
            let longest = interface.max_packet_size() - VLAN_TAG_LEN;
            size(args.size.or(Some(longest)), SMALLEST_OF_TCP, longest)?
        }
    };
    let mut summary = Summary {
        device: interface.device_name().to_owned(),
        size,
        offloads: offload_names(interface.capabilities().offloads),
        batch: args.batch as usize,
        seconds: args.seconds,
        processors: processors.count,
        cpus: processors.pair,
        may_lose: may_lose(device),
        ..Summary::default()
    };
    drop(interface);
    let stop = Stop::on_signals()?;
    let measures = (ONE_WAY.len() + ROUND_TRIP.len() + BESIDE) as u32;
    let total = Duration::from_secs(args.seconds);
    let (batch, time, nat) = (args.batch as usize, total / measures, args.nat.clone());
    let cpu = processors.pair.map(|[_, second]| second);
    let both = args.both.map(Duration::from_secs);
    let setup = Setup { device, size, offload, batch, nat, time, both, cpu };
    summary.checks = ChecksSummary::new(cost_of_checks(&setup));
    let what = format!("measuring the {} device; Ctrl-C ends it", summary.device);
    let mut clock = Clock::start(&stop, total, (!args.json).then_some(&*what));
    summary.place = processors.look();
    let measured = measure(&setup, &processors, &mut clock, &mut summary);
    summary.place_at_end = processors.look();
    drop(clock);
    summary.interrupted = stop.is_wanted();
    summary.drops = summary.drops_by_reason.values().sum();
    let wrong = summary.packets.wrong(summary.may_lose).map(Failure::Step);
    let outcome = measured.and_then(|()| wrong.map_or(Ok(()), Err));
    summary.ok = outcome.is_ok();
    summary.failed = outcome.as_ref().err().map(ToString::to_string);
    if let Some(plot) = plot {
        plot.write(&plot::svg(&summary.heading(), &summary.groups()))?;
    }
    if args.json {
        print_json(&summary)?;
    } else {
        print_report(&summary.text())?;
    }
    outcome
}

/// A file for a plot, which is removed again if nothing was drawn and it is new.
#[derive(Debug)]
struct Drawing {
    file: File,
    path: PathBuf,
    is_new: bool,
}

impl Drawing {
    /// Opens the file, before anything is measured. What is in it stays until it is drawn anew.
    fn create(path: &Path) -> Result<Self, Failure> {
        let is_new = !path.exists();
        let opened = File::options().write(true).create(true).truncate(false).open(path);
        let file = opened.map_err(|error| {
            Failure::Usage(format!("the plot '{}' cannot be written: {error}", path.display()))
        })?;
        Ok(Self { file, path: path.to_owned(), is_new })
    }

    fn write(&mut self, svg: &str) -> Result<(), Failure> {
        let written = self.file.set_len(0).and_then(|()| self.file.write_all(svg.as_bytes()));
        written.map_err(|error| {
            Failure::Step(format!("the plot '{}' was not written: {error}", self.path.display()))
        })?;
        self.is_new = false;
        Ok(())
    }
}

impl Drop for Drawing {
    fn drop(&mut self) {
        if self.is_new {
            // It is empty. If it cannot be removed, no harm is done.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The bytes of a packet, on a device that takes `min` to `max`.
fn size(asked: Option<u32>, min: u32, max: u32) -> Result<usize, Failure> {
    let size = asked.unwrap_or(SIZE.min(max));
    if (min..=max).contains(&size) {
        return Ok(size as usize);
    }
    Err(Failure::Usage(format!(
        "a packet has {min} to {} bytes on this device, and not {}",
        grouped(max.into()),
        grouped(size.into())
    )))
}

/// Whether the device may lose packets: the kernel and Apple do not promise to deliver them. Inside
/// this process there is a place for every packet in flight.
fn may_lose(device: DeviceName) -> bool {
    device.is_tap() || (device == DeviceName::Vmnet && cfg!(target_os = "macos"))
}

fn measure(
    setup: &Setup,
    processors: &Processors,
    clock: &mut Clock<'_>,
    summary: &mut Summary,
) -> Result<(), Failure> {
    let window = window(setup.batch);
    // The poller has the other one.
    processors.pin(0);
    for (driving, drive) in ONE_WAY {
        if !clock.tick() {
            return Ok(());
        }
        let mut endpoints = Endpoints::start(setup, driving, window)?;
        let (account, places) =
            one_way::measure(setup, driving, processors, &mut endpoints, clock)?;
        let rings = finish(setup, endpoints, &account.totals(), summary)?;
        summary.rings.push(RingsSummary { drive, ..rings });
        summary.one_way.extend(places.into_iter().filter_map(|InPlace { place, intervals }| {
            Some(OneWaySummary { drive, place, rates: Rates::of(&intervals, setup.size)? })
        }));
    }
    for (driving, drive, waits) in ROUND_TRIP {
        if !clock.tick() {
            return Ok(());
        }
        if driving == Driving::Spinning && summary.processors < 2 {
            summary.left_out.push(format!(
                "round trips with a spinning {drive}: two threads that spin need two processors"
            ));
            continue;
        }
        let mut endpoints = Endpoints::start(setup, driving, window)?;
        let (account, places) =
            round_trip::measure(setup, driving, processors, &mut endpoints, clock)?;
        finish(setup, endpoints, &account.totals(), summary)?;
        summary.round_trip.extend(places.into_iter().filter_map(|InPlace { place, intervals }| {
            Some(RoundTripSummary { drive, waits, place, trips: Trips::of(&intervals)? })
        }));
    }
    if !clock.tick() {
        return Ok(());
    }
    if let Some(why) = no_two_threads(setup, processors) {
        summary.left_out.push(format!("a guest on each of two threads: {why}"));
        return Ok(());
    }
    let mut endpoints = Endpoints::start(setup, Driving::Inline, window)?;
    let (places, [ours, bare]) =
        two_threads::measure(setup, processors, &mut endpoints, clock, summary.may_lose)?;
    summary.two_threads = places;
    finish(setup, endpoints, &ours, summary)?;
    // The bare loop's packets are no packets of the device, but they must be right, too.
    match bare.wrong(false) {
        Some(wrong) => Err(Failure::Step(format!("the bare loop: {wrong}"))),
        None => Ok(()),
    }
}

/// Why there are no two threads to measure, if there is a reason.
fn no_two_threads(setup: &Setup, processors: &Processors) -> Option<&'static str> {
    if processors.count < 2 {
        return Some("two threads that spin need two processors");
    }
    (setup.device == DeviceName::Loopback).then_some("the loopback has one end")
}

/// Adds the results of one run to the summary.
fn finish(
    setup: &Setup,
    endpoints: Endpoints,
    totals: &Totals,
    summary: &mut Summary,
) -> Result<summary::RingsSummary, Failure> {
    #[cfg(target_os = "linux")]
    if setup.device.is_tap() {
        summary.engine = Some(endpoints.engine());
    }
    summary.packets.add(totals);
    endpoints.end(setup.device, &mut summary.drops_by_reason)
}

/// The time in nanoseconds that it takes to write and check one packet of the one-way runs, without
/// any device.
fn cost_of_checks(setup: &Setup) -> f64 {
    const TIME: Duration = Duration::from_millis(20);
    let (size, pattern) = (setup.size, setup.pattern([2; 6], [4; 6], SAMPLE));
    let mut packets = vec![vec![0; size]; window(1)];
    let (start, mut account) = (Instant::now(), Account::default());
    while start.elapsed() < TIME {
        for packet in &mut packets {
            pattern.write(packet, account.sent);
            account.sent += 1;
            account.record(pattern.inspect(black_box(packet), size));
        }
    }
    start.elapsed().as_nanos() as f64 / account.sent as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_what_the_device_takes() {
        assert_eq!(size(None, SMALLEST, 1514).unwrap(), 1514);
        assert_eq!(size(None, SMALLEST, 65_535).unwrap(), 1514);
        assert_eq!(size(None, SMALLEST, 600).unwrap(), 600);
        assert_eq!(size(Some(60), SMALLEST, 1514).unwrap(), 60);
        for wrong in [0, 59, 1515] {
            let failure = size(Some(wrong), SMALLEST, 1514).unwrap_err();
            assert_eq!(failure.exit_code(), 2);
            assert!(failure.to_string().contains("60 to 1,514 bytes"), "{failure}");
        }
    }
}
