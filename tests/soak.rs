//! A soak: the operations of `churn`, at full speed, on every device at once, and then a look at
//! what is left of them.
//!
//! ```sh
//! cargo test --release --test soak -- 1800
//! ```
//!
//! It runs for so many seconds (60 if none are given), on the devices that are named behind them (all
//! if none is). As root the TAP takes part, in a network
//! namespace of its own. It fails if anything is stuck, and if the memory, the descriptors or the
//! threads of the process grow. A program of its own, because it looks at the whole process; and not
//! part of a plain `cargo test`, because it takes its time.

#[allow(dead_code)] // its other half is used by the integration tests
mod churn;
#[cfg(target_os = "linux")]
#[allow(dead_code)]
mod netns;
#[allow(dead_code)]
mod support;

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use churn::nasty::{Inside, Script};
use churn::operation::{KINDS, Operation};
use churn::setup::{FaultPlan, Identified, Setup, Under, new_interface_id};
use churn::world::{Tally, World, new_prefix};
use churn::{is_on_purpose, lock};
use support::Dice;
use vmring::Socket;

/// Threads that work on one world.
const WORKERS: u64 = 3;
/// How long a lane may be silent: far longer than the longest wait of a world.
const SILENCE: Duration = Duration::from_secs(180);
/// How often a line is printed, in seconds.
const LINE: u64 = 10;
/// How much more of a thing there may be in the second half: a part, and a number. The worlds that
/// are there at one time differ by so much; what leaks grows with the operations, which are thousands
/// a second.
const SLACK: Sample = Sample { memory: 16 << 20, descriptors: 24, threads: 24 };

/// What the process holds.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    memory: u64,
    descriptors: u64,
    threads: u64,
}

impl Sample {
    /// `None` where the system does not say.
    fn take() -> Option<Self> {
        let entries = |path| std::fs::read_dir(path).ok().map(|list| list.count() as u64);
        let pages = std::fs::read_to_string("/proc/self/statm").ok()?;
        let pages: u64 = pages.split_whitespace().nth(1)?.parse().ok()?;
        Some(Self {
            memory: pages * vmring::page_size() as u64,
            // One is the directory's own.
            descriptors: entries("/proc/self/fd")? - 1,
            threads: entries("/proc/self/task")?,
        })
    }

    /// The median of each thing. What leaks raises it, and what is there for a moment does not: on a busy
    /// machine, threads that are about to end wait for a processor.
    fn median(samples: &[Self]) -> Self {
        let median = |f: fn(&Self) -> u64| {
            let mut values: Vec<_> = samples.iter().map(f).collect();
            values.sort_unstable();
            values.get(values.len() / 2).copied().unwrap_or_default()
        };
        Self {
            memory: median(|sample| sample.memory),
            descriptors: median(|sample| sample.descriptors),
            threads: median(|sample| sample.threads),
        }
    }

    fn parts(&self) -> [(&'static str, u64); 3] {
        [("memory", self.memory), ("descriptors", self.descriptors), ("threads", self.threads)]
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory, descriptors, threads } = self;
        let mib = *memory as f64 / f64::from(1 << 20);
        write!(f, "{mib:.1} MiB, {descriptors} descriptors, {threads} threads")
    }
}

/// One device, on which world after world is made.
struct Lane {
    name: &'static str,
    /// Changes whenever something is done.
    beat: AtomicU64,
    worlds: AtomicU64,
    doing: Mutex<&'static str>,
}

struct Soak {
    over: AtomicBool,
    tally: Arc<Tally>,
    seed: u64,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let seconds = match arguments.next().map(|text| text.parse::<u64>()) {
        None => 60,
        Some(Ok(seconds)) => seconds,
        Some(Err(_)) => {
            eprintln!("usage: cargo test --release --test soak -- [SECONDS [DEVICE]...]");
            return ExitCode::from(2);
        }
    };
    let devices: Vec<String> = arguments.collect();
    quiet_panics();
    match soak(Duration::from_secs(seconds), &devices) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            println!("FAILED: {sentence}");
            ExitCode::FAILURE
        }
    }
}

/// Panics on purpose say nothing.
fn quiet_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // The device's bombs have no text.
        let payload = info.payload();
        if (payload.is::<String>() || payload.is::<&str>()) && !is_on_purpose(payload) {
            usual(info);
        }
    }));
}

type Round = fn(&mut Dice) -> (Setup, Drivers);
/// Makes the drivers of a world, and returns them with a check that runs when the world is gone.
type Drivers = Box<dyn FnOnce(&Setup, &str, &Arc<Inside>) -> (Vec<Identified>, After)>;
type After = Box<dyn FnOnce()>;

/// The devices, whether they need a network namespace, and how their worlds are made.
const DEVICES: &[(&str, bool, Round)] = &[
    ("loopback", false, loopback),
    ("embedded", false, embedded),
    ("nasty", false, nasty),
    ("wire", false, wire),
    #[cfg(not(target_os = "macos"))]
    (SIMULATED, false, vmnet),
    #[cfg(target_os = "linux")]
    ("tap", true, tap),
];

fn soak(time: Duration, devices: &[String]) -> Result<(), String> {
    let seed = std::env::var("VMRING_SOAK_SEED").map_or(Ok(1), |text| text.parse());
    let seed = seed.map_err(|_| "VMRING_SOAK_SEED is a number".to_owned())?;
    let soak = Arc::new(Soak { over: AtomicBool::new(false), tally: Arc::default(), seed });
    let before = Sample::take();
    let wanted = |name: &str| devices.is_empty() || devices.iter().any(|device| device == name);
    let lanes: Vec<_> = DEVICES
        .iter()
        .filter(|(name, ..)| wanted(name))
        .map(|(name, in_namespace, round)| start_lane(&soak, name, *in_namespace, *round))
        .collect();
    let result = watch(&soak, &lanes, time);
    soak.over.store(true, Ordering::SeqCst);
    let samples = result?;
    for (lane, thread) in lanes {
        wait_for(&lane, &thread)?;
        let ended = thread.join().map_err(|panic| format!("{}: {}", lane.name, text_of(&*panic)));
        ended?;
        println!("{}: {} worlds", lane.name, lane.worlds.load(Ordering::Relaxed));
    }
    summary(&soak.tally);
    is_flat(&samples)?;
    everything_is_gone(before)
}

/// Samples until the time is over. An error if a lane has ended or is stuck.
fn watch(
    soak: &Soak,
    lanes: &[(Arc<Lane>, JoinHandle<()>)],
    time: Duration,
) -> Result<Vec<Sample>, String> {
    let start = Instant::now();
    let mut samples = Vec::new();
    let mut beats = vec![(0, start); lanes.len()];
    for second in 1.. {
        while start.elapsed() < Duration::from_secs(second).min(time) {
            thread::sleep(Duration::from_millis(50));
        }
        for ((lane, thread), (beat, since)) in lanes.iter().zip(&mut beats) {
            let now = lane.beat.load(Ordering::Relaxed);
            if now != *beat {
                (*beat, *since) = (now, Instant::now());
            }
            let doing = *lock(&lane.doing);
            if thread.is_finished() && doing != SKIPPED {
                return Err(format!("{}: it panicked, as said above", lane.name));
            }
            if since.elapsed() > SILENCE && !thread.is_finished() {
                return Err(format!("{}: stuck while {doing}", lane.name));
            }
        }
        samples.extend(Sample::take());
        if second % LINE == 0 || start.elapsed() >= time {
            let operations = soak.tally.operations.iter().map(|n| n.load(Ordering::Relaxed));
            println!(
                "{:>6} s: {} operations, {} completions, {} restarts; {}",
                start.elapsed().as_secs(),
                operations.sum::<u64>(),
                soak.tally.completions.load(Ordering::Relaxed),
                soak.tally.restarts.load(Ordering::Relaxed),
                samples.last().map_or_else(String::new, Sample::to_string),
            );
        }
        if start.elapsed() >= time {
            break;
        }
    }
    Ok(samples)
}

fn wait_for(lane: &Lane, thread: &JoinHandle<()>) -> Result<(), String> {
    let mut beat = lane.beat.load(Ordering::Relaxed);
    let mut since = Instant::now();
    while !thread.is_finished() {
        thread::sleep(Duration::from_millis(10));
        let now = lane.beat.load(Ordering::Relaxed);
        if now != beat {
            (beat, since) = (now, Instant::now());
        }
        if since.elapsed() > SILENCE {
            return Err(format!("{}: stuck while {}", lane.name, lock(&lane.doing)));
        }
    }
    Ok(())
}

fn summary(tally: &Tally) {
    for (kind, n) in KINDS.iter().zip(&tally.operations) {
        println!("{kind:>16}: {}", n.load(Ordering::Relaxed));
    }
    println!("{:>16}: {}", "completions", tally.completions.load(Ordering::Relaxed));
    println!("{:>16}: {}", "restarts done", tally.restarts.load(Ordering::Relaxed));
}

fn is_flat(samples: &[Sample]) -> Result<(), String> {
    // In the first tenth, threads and lists grow to their size.
    let samples = &samples[samples.len() / 10..];
    let (first, second) = samples.split_at(samples.len() / 2);
    let (first, second) = (Sample::median(first), Sample::median(second));
    println!("usually in the first half: {first}; in the second: {second}");
    for (((what, first), (_, second)), (_, slack)) in
        first.parts().into_iter().zip(second.parts()).zip(SLACK.parts())
    {
        if second > first + first / 10 + slack {
            return Err(format!("{what} is not flat: {first} usually, and then {second}"));
        }
    }
    Ok(())
}

/// When every world is gone, so are its threads and descriptors.
fn everything_is_gone(before: Option<Sample>) -> Result<(), String> {
    let Some(before) = before else { return Ok(()) };
    let start = Instant::now();
    loop {
        let now = Sample::take().unwrap_or_default();
        if now.threads <= before.threads && now.descriptors <= before.descriptors + KEPT {
            println!("at the end: {now}");
            return Ok(());
        }
        if start.elapsed() > churn::PATIENCE {
            return Err(format!("something is left: {before} at the beginning, now {now}"));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Descriptors that the process keeps for itself.
const KEPT: u64 = 4;
/// The device that runs on the simulator.
const SIMULATED: &str = "vmnet-sim";
/// What a lane was doing that could not be.
const SKIPPED: &str = "nothing: it was skipped";

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

fn start_lane(
    soak: &Arc<Soak>,
    name: &'static str,
    in_namespace: bool,
    round: Round,
) -> (Arc<Lane>, JoinHandle<()>) {
    let lane = Arc::new(Lane {
        name,
        beat: AtomicU64::new(0),
        worlds: AtomicU64::new(0),
        doing: Mutex::new("starting"),
    });
    let (soak, same) = (soak.clone(), lane.clone());
    let work = move || {
        #[cfg(target_os = "linux")]
        if in_namespace && !netns::enter() {
            *lock(&same.doing) = SKIPPED;
            return;
        }
        let _ = in_namespace;
        run_lane(&soak, &same, round);
    };
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work).expect("a lane's thread");
    (lane, thread)
}

/// World after world, until the time is over.
fn run_lane(soak: &Soak, lane: &Lane, round: Round) {
    let name =
        lane.name.bytes().fold(soak.seed, |seed, byte| seed.wrapping_mul(31) ^ u64::from(byte));
    let mut dice = Dice::new(name);
    while !soak.over.load(Ordering::SeqCst) {
        *lock(&lane.doing) = "starting interfaces";
        let (setup, drivers) = round(&mut dice);
        let (prefix, inside) = (new_prefix(), Arc::default());
        let (drivers, after) = drivers(&setup, &prefix, &inside);
        let mut world = World::over(&setup, prefix, drivers, inside);
        world.tally = soak.tally.clone();
        *lock(&lane.doing) = "working";
        let end = Instant::now() + Duration::from_millis(500 + dice.below(2500));
        // The simulator keeps a kilobyte for each start of an interface until the process ends.
        let restarts = if lane.name == SIMULATED { 50 } else { 1 };
        thread::scope(|scope| {
            for _ in 0..WORKERS {
                let (world, seed) = (&world, dice.below(u64::MAX));
                let work = move || {
                    let mut dice = Dice::new(seed);
                    while Instant::now() < end && !soak.over.load(Ordering::Relaxed) {
                        operate(world, &mut dice, restarts);
                        lane.beat.fetch_add(1, Ordering::Relaxed);
                    }
                };
                let name = format!("{}-worker", lane.name);
                thread::Builder::new().name(name).spawn_scoped(scope, work).expect("a thread");
            }
        });
        *lock(&lane.doing) = "waiting for everything to complete";
        world.finish();
        after();
        lane.beat.fetch_add(1, Ordering::Relaxed);
        lane.worlds.fetch_add(1, Ordering::Relaxed);
    }
}

/// One operation. An interface is seldom stopped, and a place is made free for a new ring half of the
/// time: at this speed little else would be done.
/// One restart of `restarts` is done.
fn operate(world: &World, dice: &mut Dice, restarts: u64) {
    let operation = Operation::draw(dice);
    match operation {
        Operation::Restart { .. } if dice.below(restarts) > 0 => return,
        Operation::Stop { .. } if dice.below(1000) > 0 => return,
        Operation::Build { place, .. } if dice.below(2) == 0 => {
            let part = churn::operation::Part::Everything;
            world.perform(&Operation::Drop { place, part });
        }
        _ => {}
    }
    world.perform(&operation);
}

/// Faults in two of three worlds, a capture in one of eight.
fn setup(dice: &mut Dice, device: Under) -> Setup {
    Setup {
        seed: dice.below(u64::MAX),
        device,
        faults: (dice.below(3) > 0).then(|| FaultPlan::draw_mild(dice)),
        capture: dice.below(8) == 0,
        measured: false,
    }
}

fn of_the_setup() -> Drivers {
    Box::new(|setup, prefix, inside| {
        let drivers = setup.drivers(prefix, inside);
        (drivers, Box::new(|| ()))
    })
}

fn loopback(dice: &mut Dice) -> (Setup, Drivers) {
    (setup(dice, Under::Loopback), of_the_setup())
}

fn embedded(dice: &mut Dice) -> (Setup, Drivers) {
    (setup(dice, Under::Embedded), of_the_setup())
}

/// Whatever a device may do, but for what loses slots: that is memory.
fn nasty(dice: &mut Dice) -> (Setup, Drivers) {
    let script = loop {
        let script = Script::draw(dice);
        if !script.loses() {
            break script;
        }
    };
    (setup(dice, Under::Nasty(script)), of_the_setup())
}

/// Two interfaces that are each other's peers.
fn wire(dice: &mut Dice) -> (Setup, Drivers) {
    let is_stream = dice.below(2) == 0;
    let drivers: Drivers = Box::new(move |setup, _, _| {
        let ends = if is_stream {
            UnixStream::pair().map(|(a, b)| [OwnedFd::from(a), OwnedFd::from(b)])
        } else {
            UnixDatagram::pair().map(|(a, b)| [OwnedFd::from(a), OwnedFd::from(b)])
        };
        let mut drivers = Vec::new();
        for (i, end) in ends.expect("a pair of sockets").into_iter().enumerate() {
            let socket = if is_stream { Socket::stream() } else { Socket::datagram() };
            let inner = Box::new(socket.from_fd(end));
            drivers.push((new_interface_id(), setup.wrap(i, inner)));
        }
        (drivers, Box::new(|| ()))
    });
    (setup(dice, Under::Other), drivers)
}

#[cfg(not(target_os = "macos"))]
fn vmnet(dice: &mut Dice) -> (Setup, Drivers) {
    let retains = dice.below(2) == 0;
    let drivers: Drivers = Box::new(move |setup, _, _| {
        let vmnet = vmnet_sim::World::with(vmnet_sim::Rules::Strict, retains);
        let driver = |i| {
            let inner = Box::new(vmnet.enter(vmring::Vmnet::new));
            (vmnet.interface_id(), setup.wrap(i, inner))
        };
        let drivers = vec![driver(0), driver(1)];
        let after = move || {
            let left = vmnet.unreleased(churn::PATIENCE);
            assert!(left.is_empty(), "vmnet still has {left:?}");
        };
        (drivers, Box::new(after))
    });
    (setup(dice, Under::Other), drivers)
}

#[cfg(target_os = "linux")]
fn tap(dice: &mut Dice) -> (Setup, Drivers) {
    let engine = [vmring::TapEngine::Auto, vmring::TapEngine::Plain][dice.below(2) as usize];
    let queues = 1 + dice.below(3) as usize;
    let drivers: Drivers = Box::new(move |setup, _, _| {
        let tap = vmring::Tap::new().engine(engine).queues(queues);
        (vec![(new_interface_id(), setup.wrap(0, Box::new(tap)))], Box::new(|| ()))
    });
    (setup(dice, Under::Other), drivers)
}
