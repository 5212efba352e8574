//! The way out of the embedded network, beside the kernel's NAT, pasta and slirp4netns.
//!
//! Each contender has a host and a world outside of its own, which are network namespaces; all of them are
//! alike. The clients and the servers are the same threads of this program for every contender.

mod connections;
mod datagrams;
mod flows;
mod guest;
mod scripted;
mod servers;
mod streams;
mod uml;
mod way;
mod world;

use std::path::Path;
use std::time::Duration;

use crate::plan::{Part, Plan};
use crate::programs::{Measured, NO_VMRING, Programs, Rivals, Step, run_tables};
use crate::report::{Table, Want};
use crate::result::Result;

use datagrams::{Search, Sending};
use streams::Direction;
use way::{Running, Way};

const OFFLOAD: &str = "nat, stream with offload";
const PLAIN: &str = "nat, stream without offload";
const CONNECTIONS: &str = "nat, connections";
const ROUND_TRIP: &str = "nat, round trip";
const DATAGRAMS_OUT: &str = "nat, datagrams to the world";
const DATAGRAMS_IN: &str = "nat, datagrams from the world";
const FLOWS: &str = "nat, idle flows";

/// The longest packets of pasta, which are its default.
const LONG_MTU: u32 = 65_520;
/// The MTU of Ethernet.
const MTU: u32 = 1500;
/// A stream with fewer Gbit/s stands still most of the time, and is no measure of anything.
const STALLED: f64 = 0.1;
/// One measurement of connections and of round trips lasts this many of the plan's times.
const TIMES: u32 = 20;
/// The lengths of datagrams that are measured.
const DATAGRAM_LENGTHS: [usize; 2] = [1472, 64];

pub(crate) fn run(plan: Plan, programs: Programs<'_>, rivals: Rivals<'_>) -> Part {
    let vmring = programs.vmring.ok_or(NO_VMRING)?;
    let part = Parts { plan, programs, rivals, vmring };
    let steps: [Step<'_>; 9] = [
        (scripted::NAME, &|| scripted::run(plan.rounds, programs)),
        (OFFLOAD, &|| part.with_offload()),
        (PLAIN, &|| part.without_offload()),
        (CONNECTIONS, &|| part.connections()),
        (ROUND_TRIP, &|| part.round_trip()),
        (DATAGRAMS_OUT, &|| part.datagrams(Direction::Out)),
        (DATAGRAMS_IN, &|| part.datagrams(Direction::In)),
        (FLOWS, &|| part.idle_flows()),
        (uml::NAME, &|| uml::run(plan.rounds, programs, rivals)),
    ];
    run_tables(&steps, programs.only)
}

/// What the tables share.
#[derive(Clone, Copy)]
struct Parts<'a> {
    plan: Plan,
    programs: Programs<'a>,
    rivals: Rivals<'a>,
    vmring: &'a Path,
}

/// A contender, and whatever was measured of it: a list of values for each figure.
struct Contender<'a> {
    way: Way<'a>,
    /// The way out while it runs, or why it does not.
    state: std::result::Result<Running, String>,
    values: Vec<Vec<f64>>,
}

/// Starts each way that there is. A rival that does not start has its reason instead.
fn contenders<'a>(
    ways: Vec<(Option<Way<'a>>, Way<'a>)>,
    figures: usize,
) -> Result<Vec<Contender<'a>>> {
    ways.into_iter()
        .map(|(there, way)| {
            let state = match there {
                Some(way) => Running::start(way).and_then(|running| {
                    streams::check(&running)?;
                    Ok(running)
                }),
                None => Err("the program is not here".into()),
            };
            let state = state.map_err(|error| error.to_string());
            match state {
                Err(why) if way.is_ours() => Err(format!("{}: {why}", way.name()).into()),
                state => Ok(Contender { way, state, values: vec![Vec::new(); figures] }),
            }
        })
        .collect()
}

/// Lets all of them take turns. A rival that fails takes part no longer, and has no figures.
fn take_turns(
    rounds: u32,
    contenders: &mut [Contender<'_>],
    mut measure: impl FnMut(&Running) -> Result<Vec<Option<f64>>>,
) -> Result<()> {
    for _ in 0..rounds {
        for contender in &mut *contenders {
            let Ok(running) = &contender.state else { continue };
            match measure(running) {
                Ok(figures) => {
                    for (values, figure) in contender.values.iter_mut().zip(figures) {
                        values.extend(figure);
                    }
                }
                Err(error) if contender.way.is_ours() => {
                    return Err(format!("{}: {error}", contender.way.name()).into());
                }
                Err(error) => {
                    contender.state = Err(error.to_string());
                    contender.values.iter_mut().for_each(Vec::clear);
                }
            }
        }
    }
    Ok(())
}

/// Adds the rows of the contenders to a table, behind these labels. Returns the medians of each row's
/// figures, in the order of the contenders.
fn add_rows(table: &mut Table, labels: &[&str], contenders: &[Contender<'_>]) -> Vec<Vec<f64>> {
    let mut medians = Vec::new();
    for contender in contenders {
        let name = match &contender.state {
            Ok(_) => contender.way.name(),
            Err(why) => format!("{}: {why}", contender.way.name()),
        };
        let values: Vec<&[f64]> = contender.values.iter().map(Vec::as_slice).collect();
        table.row(&[labels, &[name.as_str()]].concat(), &values);
        medians.push(contender.values.iter().map(|values| median(values)).collect());
    }
    medians
}

impl<'a> Parts<'a> {
    fn ours(&self, arguments: &'static [&'static str]) -> (Option<Way<'a>>, Way<'a>) {
        let way = Way::Ours(self.vmring, arguments);
        (Some(way), way)
    }

    fn pasta(&self, mtu: u32) -> (Option<Way<'a>>, Way<'a>) {
        let way = |path| Way::Pasta(path, mtu);
        (self.rivals.pasta.map(way), way(Path::new("pasta")))
    }

    fn slirp(&self, mtu: u32) -> (Option<Way<'a>>, Way<'a>) {
        let way = |path| Way::Slirp(path, mtu);
        (self.rivals.slirp4netns.map(way), way(Path::new("slirp4netns")))
    }

    fn streams(
        &self,
        name: &'static str,
        about: &str,
        ways: Vec<(Option<Way<'a>>, Way<'a>)>,
        want: impl Fn(Direction, &[Vec<f64>]) -> Vec<Want>,
    ) -> Result<Measured> {
        let time = Duration::from_secs(self.programs.stream_seconds.into());
        let figures = &["Gbit/s", "translator CPU s/GB", "all CPU s/GB"];
        let about = format!("one TCP stream of {} s, {about}", time.as_secs());
        let mut table = Table::new(name, about, &["direction", "way out"], figures);
        let mut contenders = contenders(ways, figures.len())?;
        let mut wants = Vec::new();
        for direction in Direction::ALL {
            take_turns(self.plan.rounds, &mut contenders, |running| {
                let stream = streams::measure(running, direction, time)?;
                Ok(vec![Some(stream.gbit_per_second), stream.own_cpu, Some(stream.all_cpu)])
            })?;
            let mut medians = add_rows(&mut table, &[direction.name()], &contenders);
            // To be faster than a stream that stands still says nothing.
            let stalled = medians.iter_mut().filter(|figures| figures[0] < STALLED);
            stalled.for_each(|figures| figures.fill(f64::NAN));
            wants.extend(want(direction, &medians));
            contenders.iter_mut().flat_map(|one| &mut one.values).for_each(Vec::clear);
        }
        Ok(Ok((table, wants)))
    }

    fn with_offload(&self) -> Result<Measured> {
        let about = "from a namespace whose interface leaves segments to the other side, or has packets \
                     of 64 KiB";
        let direct = (Some(Way::Direct), Way::Direct);
        let kernel = (Some(Way::Kernel), Way::Kernel);
        let ways = vec![
            direct,
            kernel,
            self.ours(&[]),
            self.ours(&["--mtu", "1500"]),
            self.pasta(LONG_MTU),
        ];
        self.streams(OFFLOAD, about, ways, |direction, medians| {
            let [_, kernel, ours, _, pasta] = medians else { return Vec::new() };
            let what = |beside: &str| format!("TCP {}: run-netns / {beside}", direction.name());
            let mut wants = Vec::new();
            if kernel[0].is_finite() {
                let ratio = ours[0] / kernel[0];
                wants.push(Want::at_least(what("veth with nft masquerade"), ratio, 0.9));
            }
            if pasta[0].is_finite() {
                wants.push(Want::at_least(what("pasta"), ours[0] / pasta[0], 1.0));
                wants.push(Want::at_most(what("pasta, CPU s/GB"), ours[1] / pasta[1], 0.8));
            }
            wants
        })
    }

    fn without_offload(&self) -> Result<Measured> {
        let about = "from a namespace whose interface has an MTU of 1,500 and no offload";
        let ours = self.ours(&["--offload", "none"]);
        let ways = vec![ours, self.pasta(MTU), self.slirp(MTU)];
        self.streams(PLAIN, about, ways, |direction, medians| {
            let what = |beside: &str| {
                format!("TCP {}, 1,500 B, no offload: run-netns / {beside}", direction.name())
            };
            ratios(medians, [("pasta", 1.3), ("slirp4netns", 3.0)], what)
        })
    }

    fn connections(&self) -> Result<Measured> {
        let about = "connect, send 64 bytes, receive 64 and close: four clients, each with a server of \
                     its own";
        let figures = &["per second", "translator CPU us each"];
        let mut table = Table::new(CONNECTIONS, about, &["way out"], figures);
        let ways = vec![
            (Some(Way::Direct), Way::Direct),
            (Some(Way::Kernel), Way::Kernel),
            self.ours(&[]),
            self.pasta(LONG_MTU),
        ];
        let mut contenders = contenders(ways, figures.len())?;
        take_turns(self.plan.rounds, &mut contenders, |running| {
            let measured = connections::measure(running, self.plan.time * TIMES)?;
            Ok(vec![Some(measured.per_second), measured.own_cpu])
        })?;
        let medians = add_rows(&mut table, &[], &contenders);
        let what = |beside: &str| format!("connections per second: run-netns / {beside}");
        Ok(Ok((table, ratios(&medians[2..], [("pasta", 1.3)], what))))
    }

    fn round_trip(&self) -> Result<Measured> {
        let about = "one byte there and back over TCP; both ends sleep meanwhile";
        let mut table = Table::new(ROUND_TRIP, about, &["way out"], &["us"]);
        let ways = vec![
            (Some(Way::Direct), Way::Direct),
            (Some(Way::Kernel), Way::Kernel),
            self.ours(&[]),
            self.pasta(LONG_MTU),
            self.slirp(MTU),
        ];
        let mut contenders = contenders(ways, 1)?;
        take_turns(self.plan.rounds, &mut contenders, |running| {
            Ok(vec![Some(connections::round_trip(running, self.plan.time * TIMES)?)])
        })?;
        let medians = add_rows(&mut table, &[], &contenders);
        let ratio = medians[2][0] / medians[3][0];
        let want = Want::at_most("round trip of one byte: run-netns / pasta", ratio, 0.9);
        Ok(Ok((table, Vec::from_iter(ratio.is_finite().then_some(want)))))
    }

    fn datagrams(&self, direction: Direction) -> Result<Measured> {
        let time = self.rivals.datagram_time;
        let name = match direction {
            Direction::Out => DATAGRAMS_OUT,
            Direction::In => DATAGRAMS_IN,
        };
        let wanted = [("pasta", 1.5), ("slirp4netns", 2.0)];
        let about = format!(
            "UDP {}: the highest rate at which at most one datagram in 100,000 is lost in {} s",
            direction.name(),
            time.as_secs_f64()
        );
        let figures = &["datagrams/s", "Gbit/s", "translator CPU us each"];
        let mut table = Table::new(name, about, &["sent", "bytes", "way out"], figures);
        let ways = vec![
            (Some(Way::Direct), Way::Direct),
            (Some(Way::Kernel), Way::Kernel),
            self.ours(&[]),
            self.pasta(MTU),
            self.slirp(MTU),
        ];
        let mut contenders = contenders(ways, figures.len())?;
        let mut wants = Vec::new();
        for sending in Sending::ALL {
            for len in DATAGRAM_LENGTHS {
                take_turns(self.plan.rounds, &mut contenders, |running| {
                    let search = Search { direction, sending, len, time };
                    let found = datagrams::search(running, search)?;
                    let bits = found.per_second * len as f64 * 8.0 / 1e9;
                    Ok(vec![Some(found.per_second), Some(bits), found.own_cpu])
                })?;
                let labels = [sending.name(), &len.to_string()];
                let medians = add_rows(&mut table, &labels, &contenders);
                let (to, how) = (direction.name(), sending.name());
                let what = |beside: &str| format!("UDP {to}, {len} B {how}: run-netns / {beside}");
                wants.extend(ratios(&medians[2..], wanted, what));
                contenders.iter_mut().flat_map(|one| &mut one.values).for_each(Vec::clear);
            }
        }
        Ok(Ok((table, wants)))
    }

    fn idle_flows(&self) -> Result<Measured> {
        let count = flows::count()?;
        let about =
            format!("memory of the translator for {count} connections on which nothing happens");
        let mut table = Table::new(FLOWS, about, &["way out"], &["bytes each"]);
        // What a process has grown by does not shrink again, so each round needs a new one.
        let mut rows: Vec<Contender<'_>> = Vec::new();
        for _ in 0..self.plan.rounds {
            let ways = vec![self.ours(&[]), self.pasta(LONG_MTU)];
            let mut round = contenders(ways, 1)?;
            take_turns(1, &mut round, |running| Ok(vec![Some(flows::measure(running, count)?)]))?;
            if rows.is_empty() {
                rows = round;
            } else {
                for (row, mut one) in rows.iter_mut().zip(round) {
                    row.values[0].append(&mut one.values[0]);
                }
            }
        }
        let medians = add_rows(&mut table, &[], &rows);
        let want = Want::at_most("bytes of memory per idle flow: run-netns", medians[0][0], 512.0);
        Ok(Ok((table, vec![want])))
    }
}

/// Wants for the ratio of the first row to each of the following ones that was measured.
fn ratios<const N: usize>(
    medians: &[Vec<f64>],
    rivals: [(&str, f64); N],
    what: impl Fn(&str) -> String,
) -> Vec<Want> {
    let Some((ours, others)) = medians.split_first() else { return Vec::new() };
    let measured = others.iter().zip(rivals).filter(|(row, _)| row[0].is_finite());
    measured
        .map(|(row, (beside, least))| Want::at_least(what(beside), ours[0] / row[0], least))
        .collect()
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
