//! `vmring serve` with a guest on whose network nothing happens.

use std::path::Path;
use std::thread;
use std::time::Duration;

use super::testpmd::{Load, Testpmd, missing};
use crate::common::take_turns;
use crate::plan::Plan;
use crate::programs::Measured;
use crate::report::{Table, Want};
use crate::result::Result;
use crate::served::{Folder, Served, usage};

pub(super) const NAME: &str = "vhost, idle";

/// One measurement lasts this many of the plan's times, at most.
const TIMES: u32 = 100;
const LONGEST: Duration = Duration::from_secs(5);
/// More rounds would say little about something that does not happen.
const ROUNDS: u32 = 3;
/// How long it takes until everything sleeps that was just started.
const SETTLE: Duration = Duration::from_millis(500);

pub(super) fn run(plan: Plan, vmring: Option<&Path>) -> Result<Measured> {
    let Some(vmring) = vmring else { return Ok(Err(crate::programs::NO_VMRING.into())) };
    if let Some(why) = missing() {
        return Ok(Err(why));
    }
    let plan =
        Plan { rounds: plan.rounds.min(ROUNDS), time: (plan.time * TIMES).min(LONGEST), ..plan };
    let mut switches = Vec::new();
    let percents = take_turns(plan, &mut [()], |()| {
        let (percent, count) = measure(vmring, plan.time)?;
        switches.push(count as f64);
        Ok(percent)
    })?;
    let mut table = Table::new(
        NAME,
        format!("vmring serve with two guests that are connected and silent, for {:?}", plan.time),
        &["mode"],
        &["% of a processor", "voluntary switches"],
    );
    let median = table.row(&["notified"], &[&percents[0], &switches]);
    let most = switches.iter().copied().fold(0.0, f64::max);
    let wants = vec![
        Want::at_most("vhost, idle: % of a processor", median, 0.5),
        Want::at_most("vhost, idle: voluntary switches, worst", most, 0.0),
    ];
    Ok(Ok((table, wants)))
}

/// Percent of a processor, and voluntary switches.
fn measure(vmring: &Path, time: Duration) -> Result<(f64, u64)> {
    let folder = Folder::new()?;
    let listens = folder.sockets().map(|at| format!("vhost-user:{}", at.display()));
    let arguments = ["serve", "--network", "embedded:performance"];
    let server = Served::start_with(vmring, &arguments, &listens, &folder)?;
    let mut front = Testpmd::front(&folder, Load { len: 64, device: "", reads: 0 })?;
    // One round shows that the guests are there, and that the server was not dead.
    front.does("start tx_first 1\n", "packets/burst")?;
    front.frames_per_second()?;
    thread::sleep(SETTLE);
    if front.frames_per_second()? == 0.0 {
        return Err("no frame comes back".into());
    }
    front.does("stop\n", "Done.")?;
    thread::sleep(SETTLE);
    let before = usage(server.process())?;
    thread::sleep(time);
    let after = usage(server.process())?;
    front.quit();
    let percent = (after.0 - before.0) as f64 / time.as_nanos() as f64 * 100.0;
    Ok((percent, after.1 - before.1))
}
