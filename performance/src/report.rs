//! What is printed: a heading, then tables for people or one JSON document.

use std::fs;
use std::io::{self, Write};

use serde::Serialize;

use crate::Result;
use crate::clock::Elapsed;

/// What one measurement of packets gave.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sample {
    pub(crate) packets: u64,
    pub(crate) elapsed: Elapsed,
}

impl Sample {
    /// Nanoseconds a packet by the clock on the wall.
    pub(crate) fn wall_ns(&self) -> f64 {
        self.elapsed.wall.as_nanos() as f64 / self.packets as f64
    }

    /// Nanoseconds of the measuring thread's processor a packet.
    pub(crate) fn cpu_ns(&self) -> f64 {
        self.elapsed.cpu.as_nanos() as f64 / self.packets as f64
    }
}

/// Smallest, middle and greatest of the rounds.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of at least one value; of none, zeroes.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let [min, .., max] = values[..] else {
            let only = values.first().copied().unwrap_or_default();
            return Self { min: only, median: only, max: only };
        };
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Self { min, median, max }
    }
}

/// Where the figures are from.
#[derive(Serialize)]
pub(crate) struct Heading {
    machine: String,
    cores: usize,
    kernel: String,
    versions: Vec<(&'static str, &'static str)>,
    rounds: u32,
    seconds: f64,
}

/// This program's own lock file: what it was built from.
const LOCK: &str = include_str!("../Cargo.lock");

/// The crates whose speed is compared.
const COMPARED: [&str; 3] = ["vmring", "io-uring", "tun-rs"];

/// The version of `name` in the lock file.
fn version(name: &str) -> Option<&'static str> {
    let mut lines = LOCK.lines().skip_while(|line| *line != format!("name = \"{name}\""));
    lines.nth(1)?.strip_prefix("version = \"")?.strip_suffix('"')
}

impl Heading {
    pub(crate) fn of_this_machine(rounds: u32, seconds: f64) -> Result<Self> {
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
                .filter_map(|name| Some((name, version(name)?)))
                .collect(),
            rounds,
            seconds,
        })
    }
}

/// One line of a table of packets.
#[derive(Serialize)]
struct PacketRow {
    contender: &'static str,
    frame_bytes: usize,
    packets_per_second: Spread,
    ns_per_packet: Spread,
    cpu_ns_per_packet: Spread,
}

/// One line of the table of streams.
#[derive(Serialize)]
pub(crate) struct StreamRow {
    pub(crate) contender: &'static str,
    pub(crate) offload: bool,
    pub(crate) gbit_per_second: Spread,
    /// Of the bridge between; a veth pair has none.
    pub(crate) bridge_cpu_seconds_per_gigabyte: Option<Spread>,
    /// Of all processors, both ends of the stream and whoever else was busy included.
    pub(crate) system_cpu_seconds_per_gigabyte: Spread,
}

/// One table.
#[derive(Serialize)]
struct Table {
    name: &'static str,
    about: String,
    #[serde(flatten)]
    rows: Rows,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Rows {
    Packets(Vec<PacketRow>),
    Streams(Vec<StreamRow>),
}

/// Everything that was measured.
#[derive(Serialize)]
pub(crate) struct Report {
    heading: Heading,
    tables: Vec<Table>,
}

impl Report {
    pub(crate) fn new(heading: Heading) -> Self {
        Self { heading, tables: Vec::new() }
    }

    /// A table of packets: for each contender and length of frame, the samples of all rounds.
    pub(crate) fn packets(
        &mut self,
        name: &'static str,
        about: String,
        measured: impl IntoIterator<Item = (&'static str, usize, Vec<Sample>)>,
    ) {
        let row = |(contender, frame_bytes, samples): (_, _, Vec<Sample>)| PacketRow {
            contender,
            frame_bytes,
            packets_per_second: Spread::of(samples.iter().map(|sample| 1e9 / sample.wall_ns())),
            ns_per_packet: Spread::of(samples.iter().map(Sample::wall_ns)),
            cpu_ns_per_packet: Spread::of(samples.iter().map(Sample::cpu_ns)),
        };
        let rows = Rows::Packets(measured.into_iter().map(row).collect());
        self.tables.push(Table { name, about, rows });
    }

    /// A table of streams.
    pub(crate) fn streams(&mut self, name: &'static str, about: String, rows: Vec<StreamRow>) {
        self.tables.push(Table { name, about, rows: Rows::Streams(rows) });
    }

    pub(crate) fn print(&self, json: bool, out: &mut impl Write) -> io::Result<()> {
        if json {
            writeln!(out, "{}", serde_json::to_string_pretty(self)?)?;
            return Ok(());
        }
        let heading = &self.heading;
        writeln!(out, "{}, {} cores, Linux {}", heading.machine, heading.cores, heading.kernel)?;
        let versions: Vec<_> =
            heading.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        writeln!(out, "{}", versions.join(", "))?;
        writeln!(
            out,
            "medians of {} interleaved round(s) of {} s, in brackets the fastest and the slowest",
            heading.rounds, heading.seconds
        )?;
        for table in &self.tables {
            writeln!(out, "\n{}: {}", table.name, table.about)?;
            match &table.rows {
                Rows::Packets(rows) => print_packets(rows, out)?,
                Rows::Streams(rows) => print_streams(rows, out)?,
            }
        }
        Ok(())
    }
}

fn print_packets(rows: &[PacketRow], out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "{:>6}  {:<34} {:>12} {:>10} {:>15} {:>8}",
        "bytes", "contender", "packets/s", "ns/packet", "", "CPU ns"
    )?;
    for row in rows {
        let time = row.ns_per_packet;
        writeln!(
            out,
            "{:>6}  {:<34} {:>12.0} {:>10.0} {:>15} {:>8.0}",
            row.frame_bytes,
            row.contender,
            row.packets_per_second.median,
            time.median,
            format!("({:.0} to {:.0})", time.min, time.max),
            row.cpu_ns_per_packet.median
        )?;
    }
    Ok(())
}

fn print_streams(rows: &[StreamRow], out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "{:<8} {:<28} {:>8} {:>16} {:>16} {:>16}",
        "offload", "contender", "Gbit/s", "", "bridge CPU s/GB", "system CPU s/GB"
    )?;
    for row in rows {
        let rate = row.gbit_per_second;
        writeln!(
            out,
            "{:<8} {:<28} {:>8.2} {:>16} {:>16} {:>16.2}",
            if row.offload { "on" } else { "off" },
            row.contender,
            rate.median,
            format!("({:.2} to {:.2})", rate.min, rate.max),
            row.bridge_cpu_seconds_per_gigabyte
                .map_or("-".to_owned(), |spread| format!("{:.2}", spread.median)),
            row.system_cpu_seconds_per_gigabyte.median
        )?;
    }
    Ok(())
}
