//! vmring beside its rivals and beside the least that the machine can do.
//!
//! The contenders take turns within each round, so that a slow minute of the machine is a slow
//! minute for all of them. The parts that need a TAP run as root, in network namespaces that the
//! program makes.

#[cfg(not(target_os = "linux"))]
compile_error!("io_uring, TAPs and processor clocks are Linux's");

mod cache_line;
mod clock;
mod common;
mod contender;
mod echo;
mod forward;
mod growth;
mod guest_stream;
mod guests;
mod idle;
mod inline;
mod latency;
mod lines;
mod markdown;
mod merge;
mod nat;
mod net;
mod ours;
mod paired;
mod place;
mod plan;
mod plot;
mod programs;
mod queues;
mod read;
mod relay;
mod report;
mod result;
mod rounds;
mod scale;
mod served;
mod slots;
mod spread;
mod vhost;
mod vmnet;
mod wires;
mod write;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use net::{FULL_FRAME, SMALL_FRAME};
use plan::{Part, Plan};
use programs::{NO_VMRING, Programs, Rivals, find_program, has_program, no_tap, version_of};
use report::{Heading, Report, Sample, Table, Want};
use result::Result;

/// vmring beside its rivals and beside the least that the machine can do.
///
/// The parts that need a TAP need root, because they make network namespaces of their own. They do
/// not touch the host's network. Without root they are skipped.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    what: Option<What>,

    /// How often each contender has its turn. The figures are medians.
    #[arg(long, global = true, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// How long one measurement of packets takes.
    #[arg(long, global = true, default_value_t = 0.05, value_parser = seconds)]
    seconds: f64,

    /// How long one TCP stream takes.
    #[arg(long, global = true, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60))]
    stream_seconds: u32,

    /// The vmring command, for `vmring bridge` in tap-forward and tap-merge, `vmring serve` in vhost, wires
    /// and nat, and `vmring run-netns` in nat. The default is the one that `cargo build --release` left in the folder above.
    #[arg(long, global = true, value_name = "PATH")]
    bridge: Option<PathBuf>,

    /// The program pasta, for nat. The default is the one on the path, as with the next two.
    #[arg(long, global = true, value_name = "PATH")]
    pasta: Option<PathBuf>,

    /// The program passt, for nat.
    #[arg(long, global = true, value_name = "PATH")]
    passt: Option<PathBuf>,

    /// The program slirp4netns, for nat.
    #[arg(long, global = true, value_name = "PATH")]
    slirp4netns: Option<PathBuf>,

    /// How long nat tries each rate of datagrams.
    #[arg(long, global = true, default_value_t = 5.0, value_parser = seconds)]
    datagram_seconds: f64,

    /// Measure only those rows of lines that contain this text (the table, the bytes and the name, as in
    /// "lines, steps: 1514: bare loop"), or those tables of vhost, wires and nat whose name does.
    #[arg(long, global = true, value_name = "TEXT", default_value = "")]
    only: String,

    /// Measure what depends on where the two processors are in both places: near each other and far apart. Each
    /// table of two threads goes on until each of its rows has its rounds in both, or until these seconds have
    /// passed. Without this option a table has the places in which the processors happen to be.
    #[arg(long, global = true, value_name = "SECONDS", value_parser = limit)]
    both: Option<Duration>,

    /// One short round, to see that everything works. Its figures say little.
    #[arg(long, global = true)]
    quick: bool,

    /// Print one JSON document.
    #[arg(long, global = true)]
    json: bool,

    /// Also draw the figures of guests and growth, if they were measured.
    #[arg(long, global = true, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Also write the table of the README in the folder above, as far as its figures were measured.
    #[arg(long, global = true, value_name = "FILE.md")]
    table: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Subcommand)]
enum What {
    /// An entry to another thread and back, beside rtrb, a channel and io_uring.
    Echo,
    /// What the rings cost where nothing else does.
    Inline,
    /// How long one entry takes there and back while both sides spin.
    Latency,
    /// The same, while both sides sleep.
    Wakeup,
    /// Packets between two guests on two threads, beside the lowest possible cost and Unix sockets.
    Guests,
    /// What makes up the cost of a packet between two processors, step by step.
    Lines,
    /// What a packet costs with 2 to 1,024 interfaces on one network.
    Growth,
    /// Guests over vhost-user, beside DPDK's back end and a TAP of the kernel, and guests in process.
    Vhost,
    /// Clients on the wires of `vmring serve`, beside a relay with one read and one write a frame.
    Wires,
    /// The way out of the embedded network, beside the kernel's NAT, pasta and slirp4netns.
    Nat,
    /// Packets per second into a TAP.
    TapWrite,
    /// Packets per second out of a TAP: out of a full queue, and while they arrive.
    TapRead,
    /// A TCP stream (iperf3) from one namespace through a bridge of two TAPs to another.
    TapForward,
    /// A TCP stream between an end without offload and a TAP with it.
    TapMerge,
    /// Packets through the vmnet driver over a simulated vmnet, beside loops over the C ABI.
    Vmnet,
    /// What the depth of a ring, the size of a frame and the number of rings change; memory and start.
    Scale,
    /// What sixteen interfaces cost if nothing happens on them.
    Idle,
    /// All of these. This is the default.
    All,
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.001..=60.0).contains(&seconds) => Ok(seconds),
        _ => Err("not between 0.001 and 60".to_owned()),
    }
}

fn limit(text: &str) -> std::result::Result<Duration, String> {
    match text.parse() {
        Ok(seconds) if (0..=86_400).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        _ => Err("not between 0 and 86400".to_owned()),
    }
}

/// A part, its name, the reason why it cannot run here (if it cannot), and the function that runs
/// it.
type Step<'a> = (What, &'static str, Option<&'static str>, &'a dyn Fn(Plan) -> Part);

/// Where `cargo build --release` in the folder above leaves the vmring command.
const BRIDGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/release/vmring");
fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// How often the round trip of a cache line is measured to find the place of the processors.
const PLACE_TURNS: u32 = 9;

fn run(arguments: &Arguments) -> Result<()> {
    // Counts the processors before any thread is pinned.
    common::processors();
    let (rounds, seconds) =
        if arguments.quick { (1, 0.01) } else { (arguments.rounds, arguments.seconds) };
    let plan = Plan { rounds, time: Duration::from_secs_f64(seconds), both: arguments.both };
    let mut report =
        Report::new(Heading::of_this_machine(rounds, seconds, cache_line::place(PLACE_TURNS)?)?);
    let found = arguments.bridge.is_none().then(|| Path::new(BRIDGE)).filter(|path| path.is_file());
    let bridge = arguments.bridge.as_deref().or(found);
    let stream = if arguments.quick { 1 } else { arguments.stream_seconds };
    let tap = no_tap();
    let stream_tap = tap.or((!has_program("iperf3")).then_some("the program iperf3 is not here"));
    let forward = move |plan: Plan| forward::run(plan.rounds, stream, bridge);
    let merge_missing = stream_tap.or(bridge.is_none().then_some(NO_VMRING));
    let merge = move |plan: Plan| merge::run(plan.rounds, stream, bridge.ok_or(NO_VMRING)?);
    let lines = |plan: Plan| lines::run(plan, &arguments.only);
    let programs = Programs { vmring: bridge, stream_seconds: stream, only: &arguments.only };
    let vhost = |plan: Plan| vhost::run(plan, programs);
    let wires_missing = bridge.is_none().then_some(NO_VMRING);
    let wires = |plan: Plan| wires::run(plan, programs);
    let rival = |given: &Option<PathBuf>, name| given.clone().or_else(|| find_program(name));
    let [pasta, passt, slirp] = [
        rival(&arguments.pasta, "pasta"),
        rival(&arguments.passt, "passt"),
        rival(&arguments.slirp4netns, "slirp4netns"),
    ];
    let datagram_seconds = if arguments.quick { 0.3 } else { arguments.datagram_seconds };
    let rivals = Rivals {
        pasta: pasta.as_deref(),
        passt: passt.as_deref(),
        slirp4netns: slirp.as_deref(),
        datagram_time: Duration::from_secs_f64(datagram_seconds),
    };
    if matches!(arguments.what, Some(What::Nat | What::All) | None) {
        for (name, program) in [("pasta", &pasta), ("passt", &passt), ("slirp4netns", &slirp)] {
            if let Some(version) = program.as_deref().and_then(version_of) {
                report.add_version(name, version);
            }
        }
    }
    let nat_missing = tap.or(wires_missing);
    let nat = |plan: Plan| nat::run(plan, programs, rivals);
    let steps: [Step<'_>; 17] = [
        (What::Echo, "echo", None, &echo::run),
        (What::Inline, "inline", None, &inline::run),
        (What::Latency, "latency", None, &latency::run),
        (What::Wakeup, "wakeup", None, &latency::run_wakeup),
        (What::Guests, "guests", None, &guests::run),
        (What::Lines, "lines", None, &lines),
        (What::Growth, "growth", None, &growth::run),
        (What::Vmnet, "vmnet", None, &vmnet::run),
        (What::Scale, "scale", None, &scale::run),
        (What::Idle, "idle", None, &idle::run),
        (What::Vhost, "vhost", None, &vhost),
        (What::Wires, "wires", wires_missing, &wires),
        (What::Nat, "nat", nat_missing, &nat),
        (What::TapWrite, "tap-write", tap, &tap_write),
        (What::TapRead, "tap-read", tap, &tap_read),
        (What::TapForward, "tap-forward", stream_tap, &forward),
        (What::TapMerge, "tap-merge", merge_missing, &merge),
    ];
    let what = arguments.what.unwrap_or(What::All);
    for (part, name, missing, run) in steps {
        if what != part && what != What::All {
            continue;
        }
        if let Some(why) = missing {
            report.skip(name, why);
            continue;
        }
        eprintln!("measuring {name}");
        match run(plan) {
            Ok((tables, wants)) => report.add(tables, wants),
            // The figures of the other parts are kept.
            Err(error) => report.fail(name, error.to_string()),
        }
        if part == What::TapForward && bridge.is_none() {
            report.skip("tap-forward, vmring bridge", NO_VMRING);
        }
    }
    report.end(cache_line::place(PLACE_TURNS)?);
    match report.print(arguments.json, &mut std::io::stdout().lock()) {
        // The reader has gone away.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        printed => printed?,
    }
    if let Some(path) = &arguments.plot {
        plot::write(&report, path)?;
    }
    if let Some(path) = &arguments.table {
        markdown::write(&report, path)?;
    }
    match report.failed() {
        0 => Ok(()),
        count => Err(format!("{count} part(s) or table(s) failed").into()),
    }
}

fn tap_write(plan: Plan) -> Part {
    let measured = turns(plan.rounds, write::Method::ALL, |method, length| {
        write::measure(method, length, plan.time)
    })?;
    let about = "packets into a TAP, dropped by the kernel for their address";
    let (table, medians) = packets("tap-write", about, measured, write::Method::name);
    let wants = tap_wants("into a TAP", &medians, "write(2)", "io_uring WRITE, 64 at once");
    let (paired, above) = write::run_paired(plan)?;
    Ok((paired.into_iter().chain([table]).collect(), above.into_iter().chain(wants).collect()))
}

fn tap_read(plan: Plan) -> Part {
    let Plan { rounds, time, .. } = plan;
    let drained =
        turns(rounds, read::Method::ALL, |method, len| read::measure_drain(method, len, time))?;
    let about = format!("{} packets out of a TAP's queue that was filled before", net::QUEUE);
    let (drain, medians) = packets("tap-read, drain", about, drained, read::Method::name);
    let wants = tap_wants("out of a TAP", &medians, "read(2)", "io_uring READ_MULTISHOT");
    let flooded =
        turns(rounds, read::Method::ALL, |method, len| read::measure_flood(method, len, time))?;
    let about = "packets out of a TAP while another thread sends all it can";
    let (flood, _) = packets("tap-read, flood", about, flooded, read::Method::name);
    let (paired, above) = read::run_paired(plan)?;
    let tables = paired.into_iter().chain([drain, flood]).collect();
    Ok((tables, above.into_iter().chain(wants).collect()))
}

/// The wants for the TAP: 1.5 times the plain system call, and 0.95 of the loop by hand.
fn tap_wants(what: &str, medians: &[(&str, usize, f64)], plain: &str, by_hand: &str) -> Vec<Want> {
    let of = |name: &str, bytes| {
        medians.iter().find(|row| row.0 == name && row.1 == bytes).map_or(f64::NAN, |row| row.2)
    };
    let mut wants = Vec::new();
    for ours in ["vmring, io_uring, inline", "vmring, plain calls, inline"] {
        for bytes in [SMALL_FRAME, FULL_FRAME] {
            for (rival, least) in [(plain, 1.5), (by_hand, 0.95)] {
                let ratio = of(rival, bytes) / of(ours, bytes);
                if ratio.is_finite() {
                    let name = format!("{bytes} B {what}: {ours}, / {rival}");
                    wants.push(Want::at_least(name, ratio, least));
                }
            }
        }
    }
    wants
}

/// The samples of one contender with one length of frame.
type Measured<W> = (W, usize, Vec<Sample>);

/// Lets all contenders take turns, `rounds` times, with short and long frames.
fn turns<W: Copy>(
    rounds: u32,
    methods: &[W],
    mut measure: impl FnMut(W, usize) -> Result<Sample>,
) -> Result<Vec<Measured<W>>> {
    let mut all: Vec<Measured<W>> = [SMALL_FRAME, FULL_FRAME]
        .into_iter()
        .flat_map(|length| methods.iter().map(move |method| (*method, length, Vec::new())))
        .collect();
    for _ in 0..rounds {
        for (method, length, samples) in &mut all {
            samples.push(measure(*method, *length)?);
        }
    }
    Ok(all)
}

/// A table of packets: for each contender and length of frame, the samples of all rounds. Also
/// returns the medians, in nanoseconds per packet.
fn packets<W>(
    name: &'static str,
    about: impl Into<String>,
    measured: Vec<Measured<W>>,
    name_of: impl Fn(W) -> &'static str,
) -> (Table, Vec<(&'static str, usize, f64)>) {
    let figures = &["ns/packet", "CPU ns", "packets/s"];
    let mut table = Table::new(name, about, &["bytes", "contender"], figures);
    let mut medians = Vec::new();
    for (method, length, samples) in measured {
        let values = |of: fn(&Sample) -> f64| samples.iter().map(of).collect::<Vec<_>>();
        let (wall, cpu) = (values(Sample::wall_ns), values(Sample::cpu_ns));
        let rate = values(|sample| 1e9 / sample.wall_ns());
        let contender = name_of(method);
        let median = table.row(&[&length.to_string(), contender], &[&wall, &cpu, &rate]);
        medians.push((contender, length, median));
    }
    (table, medians)
}
