//! Loads on `vmring serve` whose figures belong to a machine: a flood of broadcasts, and a soak.
//!
//! ```sh
//! cargo test --release -p vmring-cli --test load -- flood
//! cargo test --release -p vmring-cli --test load -- soak 600
//! cargo test --release -p vmring-cli --test load -- nat-hostile 600
//! cargo test --release -p vmring-cli --test load -- nat-soak 1800
//! cargo test --release -p vmring-cli --test load -- nat-soak 1800 --defaults
//! ```
//!
//! `flood` compares what two guests get through beside another guest that sends 200,000 broadcasts each
//! second with what they get through beside one that sends as many frames to one guest. It fails below
//! 80 %. `soak` runs for so many seconds (60 if none are given), and fails if the server's memory or
//! descriptors grow, or if guests that do nothing wrong lose a frame although the machine is not
//! saturated. The guests around them come, go, stall, flood and send rubbish.
//!
//! `nat-hostile` compares what a guest gets through the way out beside a hostile guest with what it gets
//! beside a guest that sends as many harmless frames. It fails below 80 % if it runs for a minute or more, and
//! if the server's memory or descriptors grow, or something is reached that no guest reaches. `nat-soak` makes
//! 500 short connections each second, with raised limits or with the defaults. It fails if one connection
//! does, or if memory, descriptors or flows are left over. Both need root, for their network namespaces.
//!
//! This is a program of its own, because it takes the machine for itself.

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

#[cfg(target_os = "linux")]
#[path = "command/carry.rs"]
mod carry;
#[cfg(target_os = "linux")]
#[path = "command/host.rs"]
mod host;
#[cfg(target_os = "linux")]
#[path = "load/nat_hostile.rs"]
mod nat_hostile;
#[cfg(target_os = "linux")]
#[path = "load/nat_soak.rs"]
mod nat_soak;
#[cfg(target_os = "linux")]
#[path = "command/visitor.rs"]
mod visitor;
#[cfg(target_os = "linux")]
#[path = "load/way_out.rs"]
mod way_out;
#[cfg(target_os = "linux")]
#[path = "command/world.rs"]
mod world;

const LIMIT: Duration = Duration::from_secs(60);
const ALL: [u8; 6] = [0xff; 6];
/// The flood of the comparison, in frames per second, and the least part of the other guests' packets.
const FLOOD: u64 = 200_000;
const LEAST: f64 = 0.8;
/// The frames that a steady guest of the soak sends each second.
const STEADY: u64 = 2000;
/// The flood budget of each guest of the soak. The frames to all are no load that a steady guest cannot
/// take.
const FLOODS: u64 = 2000;
/// A machine that keeps a thread of this program waiting for longer, in milliseconds, is saturated. The
/// buffers of a steady guest may be full before its thread runs.
const SATURATED: u64 = 50;
/// What the server's memory may grow by from one half of a soak to the other, in bytes. The guests that
/// are connected at one time differ by so much.
const MEMORY_SLACK: u64 = 16 << 20;

/// A server, which is killed when it is dropped.
struct Server {
    child: Child,
    folder: PathBuf,
}

impl Server {
    /// Starts a server with a socket of each of these kinds, which have these options.
    fn start(kinds: &[&str], options: &str) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_vmring")), kinds, options)
    }

    /// The same, by a command of the program.
    fn start_by(mut command: Command, kinds: &[&str], options: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("vmring-load-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        command.args(["serve", "--json", "--network", "embedded:load"]);
        // The network keeps the memory of a port for the next one. Few ports are soon used, all of them.
        command.args(["--connections", "16"]);
        for kind in kinds {
            command.args(["--listen", &format!("{kind}:{}{options}", folder.join(kind).display())]);
        }
        command.stdin(Stdio::null()).stderr(Stdio::null());
        command.stdout(File::create(folder.join("report")).expect("a file"));
        let child = command.env_remove("SUDO_UID").spawn().expect("the command starts");
        let server = Self { child, folder };
        until("the server listens", || kinds.iter().all(|kind| server.at(kind).exists()));
        server
    }

    /// Ends it, and prints what it has dropped.
    fn end(mut self) {
        // SAFETY: the call takes numbers only, and the child was not waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let ended = self.child.wait().expect("a child");
        let report = std::fs::read_to_string(self.folder.join("report")).expect("a report");
        let report: Value = serde_json::from_str(&report).expect("one object");
        println!("the server: {ended}, cpu {} %", report["cpu_percent"]);
        for socket in report["sockets"].as_array().expect("a list") {
            let (connections, drops) = (&socket["connections"], &socket["drops_by_reason"]);
            let missed = &socket["counts"]["rx_not_taken"];
            println!("{}: {connections} guests, drops {drops}, not taken {missed}", socket["name"]);
        }
    }

    fn at(&self, kind: &str) -> PathBuf {
        self.folder.join(kind)
    }

    fn sample(&self) -> Sample {
        sample_of(self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// What a process has now.
fn sample_of(process: u32) -> Sample {
    let of = |name: &str| format!("/proc/{}/{name}", process);
    let status = std::fs::read_to_string(of("status")).expect("the server runs");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        number.unwrap_or_else(|| panic!("no {name}"))
    };
    let descriptors = std::fs::read_dir(of("fd")).expect("the server runs").count() as u64;
    Sample { memory: field("VmRSS:") * 1024_u64, descriptors, threads: field("Threads:") }
}

/// What the server has.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    memory: u64,
    descriptors: u64,
    threads: u64,
}

impl Sample {
    fn max(self, other: Self) -> Self {
        Self {
            memory: self.memory.max(other.memory),
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
        }
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory, descriptors, threads } = self;
        let mebibytes = *memory as f64 / f64::from(1 << 20);
        write!(f, "{mebibytes:.1} MiB, {descriptors} descriptors, {threads} threads")
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "it never happened: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn mac(last: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0x55, 0, last]
}

/// A frame with a number, as it is on a stream.
fn framed(from: [u8; 6], to: [u8; 6], len: usize, number: u64) -> Vec<u8> {
    let mut bytes = (len as u32).to_be_bytes().to_vec();
    bytes.extend([&to[..], &from, &[0x88, 0xb5], &number.to_le_bytes()].concat());
    bytes.resize(4 + len, 0x5a);
    bytes
}

fn connected(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).expect("the server listens");
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    socket.set_write_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    socket
}

fn is_late(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Calls `f` with each frame that comes, until `stop`.
fn frames(mut socket: UnixStream, stop: &AtomicBool, mut f: impl FnMut(&[u8])) {
    let (mut bytes, mut end) = (vec![0; 1 << 18], 0);
    while !stop.load(Ordering::Relaxed) {
        match socket.read(&mut bytes[end..]) {
            Ok(0) => panic!("the server has cut off a guest that does nothing wrong"),
            Ok(len) => end += len,
            Err(error) if is_late(&error) => continue,
            Err(error) => panic!("a guest that does nothing wrong: {error}"),
        }
        let mut start = 0;
        while let Some((len, rest)) = bytes[start..end].split_first_chunk::<4>()
            && let Some(frame) = rest.get(..u32::from_be_bytes(*len) as usize)
        {
            f(frame);
            start += 4 + frame.len();
        }
        bytes.copy_within(start..end, 0);
        end -= start;
    }
}

/// The number of a frame from `from` to `to`.
fn number_of(frame: &[u8], from: [u8; 6], to: [u8; 6]) -> Option<u64> {
    let ours = frame.len() >= 22 && frame[..6] == to && frame[6..12] == from;
    ours.then(|| u64::from_le_bytes(frame[14..22].try_into().expect("eight bytes")))
}

/// What one guest sends beside the two that are measured.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Beside {
    Unicast,
    Broadcast,
}

/// Frames per second from one guest to another, and what the other load has reached.
fn measure(server: &Server, beside: Beside, time: Duration) -> (f64, f64) {
    let stop = Arc::new(AtomicBool::new(false));
    let got = Arc::new(AtomicU64::new(0));
    let loaded = Arc::new(AtomicU64::new(0));
    let path = server.at("qemu");
    let guests: Vec<_> = (1..=4).map(|_| connected(&path)).collect();
    let mut threads = Vec::new();
    for (i, guest) in guests.iter().enumerate() {
        let (mut socket, stop, got) =
            (guest.try_clone().expect("the same socket"), stop.clone(), got.clone());
        socket.write_all(&framed(mac(i as u8 + 1), ALL, 60, 0)).expect("the server reads");
        threads.push(thread::spawn(move || {
            frames(socket, &stop, |frame| {
                if i == 1 && number_of(frame, mac(1), mac(2)).is_some() {
                    got.fetch_add(1, Ordering::Relaxed);
                }
            });
        }));
    }
    thread::sleep(Duration::from_millis(200));
    let mut sender = guests[0].try_clone().expect("the same socket");
    let stopped = stop.clone();
    threads.push(thread::spawn(move || {
        let batch = framed(mac(1), mac(2), 1514, 1).repeat(32);
        while !stopped.load(Ordering::Relaxed) {
            sender.write_all(&batch).expect("the server reads");
        }
    }));
    let (mut other, stopped, sent) =
        (guests[2].try_clone().expect("the same socket"), stop.clone(), loaded.clone());
    threads.push(thread::spawn(move || {
        let to = if beside == Beside::Unicast { mac(4) } else { ALL };
        let batch = framed(mac(3), to, 60, 1).repeat(FLOOD as usize / 1000);
        let mut due = Instant::now();
        while !stopped.load(Ordering::Relaxed) {
            other.write_all(&batch).expect("the server reads");
            sent.fetch_add(FLOOD / 1000, Ordering::Relaxed);
            // What could not be sent in time is not sent later.
            due = (due + Duration::from_millis(1)).max(Instant::now());
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }));
    thread::sleep(Duration::from_millis(500));
    let (start, before) =
        (Instant::now(), [&got, &loaded].map(|count| count.load(Ordering::Relaxed)));
    thread::sleep(time);
    let seconds = start.elapsed().as_secs_f64();
    let after = [&got, &loaded].map(|count| count.load(Ordering::Relaxed));
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().expect("no guest is cut off"));
    let rate = |i: usize| (after[i] - before[i]) as f64 / seconds;
    (rate(0), rate(1))
}

fn flood(seconds: u64) -> bool {
    let server = Server::start(&["qemu"], "");
    let time = Duration::from_secs(seconds);
    let mut ratios = Vec::new();
    for round in 0..5 {
        let (beside_unicast, unicast) = measure(&server, Beside::Unicast, time);
        let (beside_flood, flood) = measure(&server, Beside::Broadcast, time);
        let ratio = beside_flood / beside_unicast;
        println!(
            "round {round}: {beside_unicast:.0} frames/s beside {unicast:.0}/s to one, \
             {beside_flood:.0} frames/s beside {flood:.0}/s to all: {:.0} %",
            ratio * 100.0
        );
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    println!("median: {:.0} %, and {:.0} % are wanted", ratios[2] * 100.0, LEAST * 100.0);
    ratios[2] >= LEAST
}

/// Numbers that look random (xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn pause(&mut self, millis: u64) {
        thread::sleep(Duration::from_millis(self.below(millis)));
    }
}

/// A guest that does what it should not, once.
type Guest = fn(&Path, &mut Dice) -> std::io::Result<()>;

/// Comes, says something, perhaps a part of a frame, and goes.
fn comes_and_goes(folder: &Path, dice: &mut Dice) -> std::io::Result<()> {
    let mut socket = connected(&folder.join("qemu"));
    let from = mac(100 + dice.below(20) as u8);
    for number in 0..dice.below(20) {
        socket.write_all(&framed(from, mac(dice.below(256) as u8), 60, number))?;
    }
    let last = framed(from, ALL, 60, 0);
    socket.write_all(&last[..dice.below(last.len() as u64 + 1) as usize])?;
    dice.pause(20);
    Ok(())
}

/// Reads nothing, while others send to it.
fn stalls(folder: &Path, dice: &mut Dice) -> std::io::Result<()> {
    let mut socket = connected(&folder.join("libkrun"));
    socket.write_all(&framed(mac(99), ALL, 60, 0))?;
    let mut sender = connected(&folder.join("qemu"));
    let from = mac(98);
    for number in 0..dice.below(20_000) {
        sender.write_all(&framed(from, mac(99), 1514, number))?;
    }
    dice.pause(1000);
    Ok(())
}

/// Sends to all, as fast as it can.
fn floods(folder: &Path, dice: &mut Dice) -> std::io::Result<()> {
    let mut socket = connected(&folder.join("qemu"));
    let batch = framed(mac(97), ALL, 60 + dice.below(1400) as usize, 0).repeat(64);
    let until = Instant::now() + Duration::from_millis(dice.below(500));
    while Instant::now() < until {
        socket.write_all(&batch)?;
    }
    dice.pause(500);
    Ok(())
}

/// Sends bytes that are no frames.
fn sends_rubbish(folder: &Path, dice: &mut Dice) -> std::io::Result<()> {
    let mut socket = connected(&folder.join("libkrun"));
    for _ in 0..100 {
        let len = dice.below(3000) as u32;
        // Some lengths are right, and what they count is rubbish all the same.
        let mut bytes = match dice.below(4) {
            0 => vec![],
            _ => len.to_be_bytes().to_vec(),
        };
        bytes.extend((0..len).map(|_| dice.below(256) as u8));
        socket.write_all(&bytes)?;
        dice.pause(5);
    }
    Ok(())
}

/// The same on a datagram socket, which has one peer at a time.
fn sends_datagrams(folder: &Path, dice: &mut Dice) -> std::io::Result<()> {
    let own = folder.join("own");
    let _ = std::fs::remove_file(&own);
    let socket = UnixDatagram::bind(&own)?;
    socket.set_nonblocking(true)?;
    socket.connect(folder.join("vfkit"))?;
    socket.send(b"VFKT")?;
    for number in 0..dice.below(200) {
        let len = dice.below(2000) as usize;
        let frame = framed(mac(96), ALL, len.max(22), number);
        match socket.send(&frame[4..4 + len]) {
            Err(error) if !is_late(&error) => return Err(error),
            _ => dice.pause(3),
        }
    }
    Ok(())
}

/// What a steady guest has received from the other one.
#[derive(Debug, Default)]
struct Steady {
    received: AtomicU64,
    lost: AtomicU64,
    /// What it has sent itself, once it sends no more.
    sent: OnceLock<u64>,
}

/// Sends numbered frames at one rate, and checks those of the other guest. Returns how many were sent.
fn steady(
    path: &Path,
    own: [u8; 6],
    other: [u8; 6],
    (stop, end): (Arc<AtomicBool>, Arc<AtomicBool>),
    seen: Arc<Steady>,
) -> thread::JoinHandle<u64> {
    let socket = connected(path);
    let mut sender = socket.try_clone().expect("the same socket");
    sender.write_all(&framed(own, ALL, 60, 0)).expect("the server reads");
    let own_seen = seen.clone();
    thread::spawn(move || {
        let reader = thread::spawn(move || {
            let mut next = 0;
            frames(socket, &end, |frame| {
                if let Some(number) = number_of(frame, other, own) {
                    seen.received.fetch_add(1, Ordering::Relaxed);
                    seen.lost.fetch_add(number.abs_diff(next), Ordering::Relaxed);
                    next = number + 1;
                }
            });
        });
        thread::sleep(Duration::from_millis(500));
        let (start, mut sent) = (Instant::now(), 0);
        while !stop.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(2));
            // It sends what is due, but never a burst that would be a load of its own.
            let due = (start.elapsed().as_millis() as u64 * STEADY / 1000).min(sent + 64);
            let len = 60 + sent as usize * 37 % 1455;
            let batch = (sent..due).map(|number| framed(own, other, len, number));
            sender.write_all(&batch.collect::<Vec<_>>().concat()).expect("the server reads");
            sent = due.max(sent);
        }
        own_seen.sent.set(sent).expect("it ends once");
        reader.join().expect("no steady guest is cut off");
        sent
    })
}

/// Finds out for how long the machine keeps a thread waiting, at most, in milliseconds.
fn watch(stop: Arc<AtomicBool>) -> thread::JoinHandle<u64> {
    thread::spawn(move || {
        let mut longest = 0;
        while !stop.load(Ordering::Relaxed) {
            let start = Instant::now();
            thread::sleep(Duration::from_millis(5));
            longest = longest.max(start.elapsed().as_millis() as u64 - 5);
        }
        longest
    })
}

fn soak(seconds: u64) -> bool {
    let seed = std::env::var("VMRING_SOAK_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) + 1);
    println!("VMRING_SOAK_SEED={seed}");
    let kinds = ["socket_vmnet", "qemu", "libkrun", "vfkit"];
    let server = Server::start(&kinds, &format!(",floods={FLOODS}"));
    thread::sleep(Duration::from_millis(300));
    let empty = server.sample();
    let [stop, end] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let seen = [(); 2].map(|()| Arc::new(Steady::default()));
    let path = server.at("socket_vmnet");
    let pair = [(mac(1), mac(2)), (mac(2), mac(1))];
    let steady: Vec<_> = (0..2)
        .map(|i| steady(&path, pair[i].0, pair[i].1, (stop.clone(), end.clone()), seen[i].clone()))
        .collect();
    thread::sleep(Duration::from_secs(1));
    println!("empty: {empty}; with two guests: {}", server.sample());
    let others: [Guest; 7] = [
        comes_and_goes,
        comes_and_goes,
        comes_and_goes,
        stalls,
        floods,
        sends_rubbish,
        sends_datagrams,
    ];
    let watched = watch(stop.clone());
    let visits = Arc::new(AtomicU64::new(0));
    let threads = others.iter().zip(1..).map(|(guest, number)| {
        let (guest, folder) = (*guest, server.folder.clone());
        let (stop, visits) = (stop.clone(), visits.clone());
        let mut dice = Dice((seed << 8 | number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // The server may end it at any time.
                if guest(&folder, &mut dice).is_err() {
                    dice.pause(50);
                }
                visits.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    let threads: Vec<_> = threads.collect();
    let start = Instant::now();
    let mut halves = [Sample::default(); 2];
    let mut said = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        thread::sleep(Duration::from_millis(200));
        let (sample, passed) = (server.sample(), start.elapsed().as_secs());
        let half = usize::from(passed >= seconds / 2);
        halves[half] = halves[half].max(sample);
        if passed >= said + 10 {
            said = passed;
            let lost: u64 = seen.iter().map(|one| one.lost.load(Ordering::Relaxed)).sum();
            println!(
                "{passed:4} s: {sample}; {} visits, {lost} lost",
                visits.load(Ordering::Relaxed)
            );
        }
    }
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().expect("a guest ends"));
    // What is on its way arrives, if nothing is lost.
    let has_all = |one: &Steady, other: &Steady| {
        other.sent.get().is_some_and(|sent| one.received.load(Ordering::Relaxed) >= *sent)
    };
    let waited = Instant::now();
    while !(has_all(&seen[0], &seen[1]) && has_all(&seen[1], &seen[0])) && waited.elapsed() < LIMIT
    {
        thread::sleep(Duration::from_millis(50));
    }
    end.store(true, Ordering::Relaxed);
    let sent: Vec<_> = steady.into_iter().map(|one| one.join().expect("it ends")).collect();
    println!("first half at most: {}; second half: {}", halves[0], halves[1]);
    let longest = watched.join().expect("it ends");
    println!("the machine kept a thread waiting for {longest} ms at most");
    if longest > SATURATED {
        println!("skipped: the machine is saturated, so what is lost proves nothing");
    }
    let mut good = true;
    for (i, seen) in seen.iter().enumerate() {
        let (received, lost) =
            (seen.received.load(Ordering::Relaxed), seen.lost.load(Ordering::Relaxed));
        println!("steady guest {}: {received} of {} frames, {lost} lost", i + 1, sent[1 - i]);
        good &= received > 0;
        good &= received == sent[1 - i] && lost == 0 || longest > SATURATED;
    }
    // The two have gone too, with what a link has.
    let is_back = || server.sample().descriptors <= empty.descriptors;
    let waited = Instant::now();
    while !is_back() && waited.elapsed() < LIMIT {
        thread::sleep(Duration::from_millis(50));
    }
    println!("after all have left: {}; {} visits", server.sample(), visits.load(Ordering::Relaxed));
    good &= is_back();
    good &= halves[1].memory <= halves[0].memory + MEMORY_SLACK;
    good &= halves[1].descriptors <= halves[0].descriptors + 64;
    server.end();
    good && visits.load(Ordering::Relaxed) > 0
}

/// Whether this process may make network namespaces and TAPs. If not, says that it is skipped.
#[cfg(target_os = "linux")]
fn has_namespaces() -> bool {
    let why = host::obstacle();
    if let Some(why) = why {
        println!("skipped: {why}");
    }
    why.is_none()
}

fn main() -> ExitCode {
    if !cfg!(target_os = "linux") {
        println!("skipped: the server's memory is read from /proc");
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let seconds = |default| arguments.get(1).map_or(Some(default), |text| text.parse().ok());
    let good = match (arguments.first().map(String::as_str), seconds(60), seconds(3)) {
        (Some("flood"), _, Some(seconds)) => flood(seconds),
        (Some("soak"), Some(seconds), _) => soak(seconds),
        #[cfg(target_os = "linux")]
        (Some("nat-hostile"), Some(seconds), _) => !has_namespaces() || nat_hostile::run(seconds),
        #[cfg(target_os = "linux")]
        (Some("nat-soak"), Some(seconds), _) => {
            let are_raised = arguments.get(2).map(String::as_str) != Some("--defaults");
            !has_namespaces() || nat_soak::run(seconds, are_raised)
        }
        #[cfg(target_os = "linux")]
        (Some("nat-network"), _, _) => nat_soak::network(&arguments[1], arguments[2] == "raised"),
        _ => {
            println!(
                "use: flood [SECONDS of each measurement], soak [SECONDS], nat-hostile [SECONDS], or \
                 nat-soak [SECONDS [--defaults]]"
            );
            false
        }
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
