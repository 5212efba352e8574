//! `vmring bridge`: joins two devices through two rings over one pool.
//!
//! The frame that one ring has read is written by the other ring, without a copy. When the write
//! has completed, the frame is posted for reading where it came from. One thread does all of this:
//! it drives both rings, and sleeps until either of them has something to do.

mod direction;
pub(crate) mod forwarding;
mod limits;
pub(crate) mod spec;
pub(crate) mod summary;

use std::time::{Duration, Instant};

use crate::args::BridgeArgs;
use crate::failure::Failure;
use crate::progress::{Live, say};
use crate::report::{print_json, print_report};
use crate::stop::Stop;
use crate::system;

use forwarding::Bridge;
use limits::TICK;
use spec::{InSoftware, NetworkArgs, Offload, Spec};
use summary::Summary;

pub(crate) fn run(args: &BridgeArgs) -> Result<(), Failure> {
    spec::check(&args.a, &args.b)?;
    let stop = Stop::on_signals()?;
    let specs = [&args.a, &args.b].map(Spec::clone);
    #[cfg(target_os = "linux")]
    let specs = specs.map(|spec| spec.driven_by(args.engine));
    args.dhcp.check(specs.iter().filter(|spec| spec.has_dhcp()).count())?;
    args.nat.check(specs.iter().filter(|spec| spec.is_embedded()).count())?;
    let settings = NetworkArgs { dhcp: &args.dhcp, nat: &args.nat };
    let ends = spec::start(specs.each_ref(), args.offload, args.plain, args.mtu, settings)?;
    let software = match args.offload {
        Offload::Software if args.no_merge => InSoftware::Cut,
        Offload::Software => InSoftware::CutAndMerge,
        Offload::Common | Offload::None => InSoftware::Nothing,
    };
    let mut bridge =
        Bridge::new(ends, [software; 2], [args.depth; 2]).map_err(Failure::starting)?;
    let [a, b] = &bridge.ends;
    say(&format!(
        "  {} and {} are joined{}",
        a.name,
        b.name,
        match args.seconds {
            Some(seconds) => format!(" for {seconds} s"),
            None => "; Ctrl-C ends it".to_owned(),
        }
    ));
    for obstacle in specs.iter().filter_map(Spec::obstacle) {
        say(&format!("  note: {obstacle}"));
    }
    let (start, cpu) = (Instant::now(), system::cpu_time());
    let deadline = args.seconds.map(|seconds| start + Duration::from_secs(seconds));
    let live = Live::start();
    let mut before = bridge.moved();
    let moving = bridge.run(&stop, deadline, live.is_watched().then_some(TICK), |bridge| {
        let now = bridge.moved();
        live.show(&summary::rates(before, now, bridge.dropped()));
        before = now;
    });
    drop(live);
    let ended = bridge.end();
    let mut summary = Summary::of(&bridge, start.elapsed(), system::cpu_time().saturating_sub(cpu));
    // Reports the first failure.
    let outcome = moving.and(ended).and_then(|()| bridge.stop());
    summary.end(&outcome);
    if args.json {
        print_json(&summary)?;
    } else {
        print_report(&summary.text())?;
    }
    outcome
}

#[cfg(test)]
mod tests;
