//! Sixteen interfaces on which nothing happens: what their pollers cost.

use std::fs;
use std::thread;
use std::time::Duration;

use vmring::{Direction, Drive, IdlePolicy, Interface, Loopback, Poller, Ring};

use crate::clock::Moment;
use crate::common::take_turns;
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;

const INTERFACES: usize = 16;
/// One measurement lasts this many of the plan's times, at most.
const TIMES: u32 = 20;
const LONGEST: Duration = Duration::from_secs(1);
/// More rounds would say little about something that does not happen.
const ROUNDS: u32 = 3;
/// How long it takes until everything that was just started sleeps.
const SETTLE: Duration = Duration::from_millis(20);

/// The interfaces, each with a ring and a posted read, as if a guest waited.
struct Idle {
    name: &'static str,
    shared: bool,
    switches: Vec<f64>,
}

/// What is kept alive while nothing happens.
struct Running {
    rings: Vec<(Interface, Ring)>,
    _poller: Option<Poller>,
}

impl Idle {
    fn start(&self) -> Result<Running> {
        let poller = if self.shared {
            Some(Poller::builder().idle(IdlePolicy::PARK).start()?)
        } else {
            None
        };
        let mut rings = Vec::new();
        for _ in 0..INTERFACES {
            let interface = Interface::builder().device(Loopback::new(1500)).start()?;
            let drive = poller.as_ref().map_or(Drive::Thread, Drive::Shared);
            let builder = interface.ring(Direction::Both).drive(drive).idle(IdlePolicy::PARK);
            let mut ring = builder.build()?;
            post(&mut ring)?;
            check(&mut ring)?;
            rings.push((interface, ring));
        }
        Ok(Running { rings, _poller: poller })
    }

    /// Percent of a processor for each interface.
    fn measure(&mut self, time: Duration) -> Result<f64> {
        let mut running = self.start()?;
        thread::sleep(SETTLE);
        let (start, before) = (Moment::now(), voluntary_switches()?);
        thread::sleep(time);
        let (passed, after) = (start.elapsed(), voluntary_switches()?);
        let seconds = passed.wall.as_secs_f64();
        // Shows that they slept and were not dead.
        for (_, ring) in &mut running.rings {
            check(ring)?;
        }
        // One switch is this thread's own sleep.
        let switches = after.saturating_sub(before).saturating_sub(1) as f64;
        self.switches.push(switches / seconds / INTERFACES as f64);
        Ok(passed.cpu.as_secs_f64() / seconds * 100.0 / INTERFACES as f64)
    }
}

/// Posts a read, like a guest that waits.
fn post(ring: &mut Ring) -> Result<()> {
    let room = ring.alloc().ok_or("a ring has no free frame to post")?;
    Ok(ring.submit_read(room, 0)?)
}

/// Checks that a packet goes out and comes back to the posted read, for which its poller has to
/// wake. Then posts a read again.
fn check(ring: &mut Ring) -> Result<()> {
    let packet = [0x5a; 60];
    let mut frame = ring.alloc().ok_or("a ring has no free frame to send")?;
    frame.copy_from(&packet)?;
    ring.submit_write(frame, 1)?;
    if ring.wait(2, Some(Duration::from_secs(5))) < 2 {
        return Err("nothing came back from an idle interface within five seconds".into());
    }
    for done in ring.reap() {
        if done.take_packet()?[..] != packet {
            return Err("a packet came back changed".into());
        }
    }
    post(ring)
}

/// The voluntary switches of all threads of this process so far.
fn voluntary_switches() -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir("/proc/self/task")? {
        // A thread that has ended meanwhile has no file any more, and is not one of those measured.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        sum += line.ok_or("a thread's status has no switches")?.trim().parse::<u64>()?;
    }
    Ok(sum)
}

pub(crate) fn run(plan: Plan) -> Part {
    let plan =
        Plan { rounds: plan.rounds.min(ROUNDS), time: (plan.time * TIMES).min(LONGEST), ..plan };
    let about = format!("for each of {INTERFACES} interfaces with a parked poller and no packets");
    let figures = &["% of a processor", "voluntary switches/s"];
    let mut table = Table::new("idle", about, &["driven"], figures);
    let contender = |name, shared| Idle { name, shared, switches: Vec::new() };
    let mut contenders = [contender("own threads", false), contender("one shared poller", true)];
    let percents = take_turns(plan, &mut contenders, |idle| idle.measure(plan.time))?;
    let mut wants = Vec::new();
    for (idle, percents) in contenders.iter().zip(&percents) {
        let median = table.row(&[idle.name], &[percents, &idle.switches]);
        let what = format!("idle, {}: % of a processor for each interface", idle.name);
        wants.push(Want::at_most(what, median, 0.5));
        let most = idle.switches.iter().copied().fold(0.0, f64::max);
        let what = format!("idle, {}: voluntary switches/s for each interface, worst", idle.name);
        wants.push(Want::at_most(what, most, 1.0));
    }
    Ok((vec![table], wants))
}
