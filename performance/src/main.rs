//! vmring's Linux TAP device against other ways to move the same packets.
//!
//! Everything happens in network namespaces that the program makes; it needs root. The contenders
//! take turns within each round, so that a slow minute of the machine is a slow minute for all.

#[cfg(not(target_os = "linux"))]
compile_error!("TAP is Linux's");

mod clock;
mod forward;
mod net;
#[cfg(feature = "ours")]
mod ours;
mod read;
mod relay;
mod report;
mod slots;
mod write;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use net::{FULL_FRAME, SMALL_FRAME};
use report::{Heading, Report, Sample};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// vmring's Linux TAP device against other ways to move the same packets.
///
/// Needs root, for network namespaces of its own; the host's network is not touched.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    what: What,

    /// How often each contender has its turn; the figures are medians.
    #[arg(long, global = true, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// How long one measurement of packets takes.
    #[arg(long, global = true, default_value_t = 0.1, value_parser = seconds)]
    seconds: f64,

    /// How long one TCP stream takes.
    #[arg(long, global = true, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60))]
    stream_seconds: u32,

    /// The vmring command, to have `vmring bridge` in tap-forward.
    #[arg(long, global = true, value_name = "PATH")]
    bridge: Option<PathBuf>,

    /// One short round, to see that everything works; its figures say little.
    #[arg(long, global = true)]
    quick: bool,

    /// Print one JSON document.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Subcommand)]
enum What {
    /// Packets per second into a TAP.
    TapWrite,
    /// Packets per second out of a TAP: out of a full queue, and while they come.
    TapRead,
    /// A TCP stream (iperf3) from one namespace through a bridge of two TAPs to another.
    TapForward,
    /// All of these.
    All,
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.001..=60.0).contains(&seconds) => Ok(seconds),
        _ => Err("not between 0.001 and 60".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("root is needed: network namespaces and TAPs are made");
        return ExitCode::from(2);
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let (rounds, seconds) =
        if arguments.quick { (1, 0.01) } else { (arguments.rounds, arguments.seconds) };
    let time = Duration::from_secs_f64(seconds);
    let mut report = Report::new(Heading::of_this_machine(rounds, seconds)?);
    let wanted = |what| arguments.what == what || arguments.what == What::All;
    if wanted(What::TapWrite) {
        let measured =
            turns(rounds, write::Way::ALL, |way, length| write::measure(way, length, time))?;
        let about = "packets into a TAP, dropped by the kernel for their address".to_owned();
        report.packets("tap-write", about, named(measured, write::Way::name));
    }
    if wanted(What::TapRead) {
        let measured =
            turns(rounds, read::Way::ALL, |way, length| read::measure_drain(way, length, time))?;
        let about = format!("{} packets out of a TAP's queue that was filled before", read::QUEUE);
        report.packets("tap-read, drain", about, named(measured, read::Way::name));
        let measured =
            turns(rounds, read::Way::ALL, |way, length| read::measure_flood(way, length, time))?;
        let about = "packets out of a TAP while another thread sends all it can".to_owned();
        report.packets("tap-read, flood", about, named(measured, read::Way::name));
    }
    if wanted(What::TapForward) {
        let stream_seconds = if arguments.quick { 1 } else { arguments.stream_seconds };
        let about = format!("one TCP stream of {stream_seconds} s through a bridge");
        let rows = forward::turns(rounds, stream_seconds, arguments.bridge.as_deref())?;
        report.streams("tap-forward", about, rows);
    }
    match report.print(arguments.json, &mut std::io::stdout().lock()) {
        // Whoever reads has read enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        printed => Ok(printed?),
    }
}

/// The samples of one contender with one length of frame.
type Measured<W> = (W, usize, Vec<Sample>);

/// Lets all contenders take turns, `rounds` times, with short and long frames.
fn turns<W: Copy>(
    rounds: u32,
    ways: &[W],
    mut measure: impl FnMut(W, usize) -> Result<Sample>,
) -> Result<Vec<Measured<W>>> {
    let mut all: Vec<Measured<W>> = [SMALL_FRAME, FULL_FRAME]
        .into_iter()
        .flat_map(|length| ways.iter().map(move |way| (*way, length, Vec::new())))
        .collect();
    for _ in 0..rounds {
        for (way, length, samples) in &mut all {
            samples.push(measure(*way, *length)?);
        }
    }
    Ok(all)
}

/// The same with the contenders' names.
fn named<W>(
    measured: Vec<Measured<W>>,
    name: impl Fn(W) -> &'static str,
) -> impl Iterator<Item = (&'static str, usize, Vec<Sample>)> {
    measured.into_iter().map(move |(way, length, samples)| (name(way), length, samples))
}
