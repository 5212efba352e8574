//! Many short connections through the way out: 500 each second, to four addresses of servers outside,
//! because one address bears about 470 (a pair of addresses has 28,000 ports, and each rests for a minute).
//!
//! The guest is a kernel with a network namespace of its own. The network is in a process of its own, whose
//! memory and descriptors are watched.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmring::device::embedded::nat::{Counter, Limits, NatControl, NatSettings, PortLimits};
use vmring::{Embedded, Interface, Tap};

use crate::carry::carry;
use crate::host::{Host, ip};
use crate::way_out::{Halves, Stop, serve_outside};
use crate::world::World;
use crate::{LIMIT, Sample, sample_of, until};

/// Connections each second.
const RATE: u64 = 500;
const SERVERS: usize = 4;
const PORT: u16 = 80;
/// Threads of the guest, each of which has one connection at a time.
const CLIENTS: u64 = 16;

/// With these, nothing in the way of [`RATE`] is a limit.
fn raised() -> Limits {
    let mut port = PortLimits::default();
    (port.flows, port.half_open, port.new_flows_per_second) = (8192, 1024, 10_000);
    let mut limits = Limits::default();
    (limits.flows, limits.half_open, limits.new_flows_per_second) = (10_000, 1024, 10_000);
    (limits.descriptors, port.descriptors) = (16_384, 12_288);
    limits.port = port;
    limits
}

/// The process of the network: joins the TAP `t0` of a namespace to a network with a way out. For each line
/// that it reads it prints one that says what it has.
pub(crate) fn network(namespace: &str, are_raised: bool) -> bool {
    let (namespace, control) = (namespace.to_owned(), NatControl::default());
    let open = move || {
        let namespace = File::open(namespace).expect("the guest's namespace");
        // SAFETY: setns(2) takes a descriptor that lives through the call, and no memory.
        assert_eq!(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
        Interface::builder().device(Tap::named("t0").configure(false)).start().expect("the TAP")
    };
    let tap = thread::spawn(open).join().expect("the TAP is there");
    let limits = if are_raised { raised() } else { Limits::default() };
    let driver = Embedded::network("soak").nat(NatSettings::new().limits(limits));
    let driver = driver.nat_control(&control);
    let network = Interface::builder().device(driver).start().expect("the network");
    let stop = Stop::default();
    thread::scope(|scope| {
        for (from, to) in [(&tap, &network), (&network, &tap)] {
            let stop = stop.clone();
            scope.spawn(move || carry(from, to, || stop.is_told()));
        }
        for _ in std::io::stdin().lock().lines() {
            let report = control.report().expect("the translator answers");
            let counted = |counter: Counter| report.counters[counter];
            let line = json!({
                "flows": report.tcp_flows.len(),
                "entries": report.entries,
                "descriptors": report.descriptors,
                "opened": counted(Counter::TcpOpened),
                "established": counted(Counter::TcpEstablished),
                "too_many_new": counted(Counter::NewFlowLimit),
                "too_many": counted(Counter::FlowLimit) + counted(Counter::HalfOpenLimit),
                "again": counted(Counter::TimeoutRetransmit) + counted(Counter::FastRetransmit),
            });
            println!("{line}");
        }
        stop.tell();
    });
    true
}

/// The process of the network, as the load sees it.
struct Network {
    child: Child,
    ask: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Network {
    fn start(world: &World, guest: &Host, limits: &str) -> Self {
        let own = std::env::current_exe().expect("this program has a path");
        let mut command = world.host.command(own);
        command.args(["nat-network", guest.namespace(), limits]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        let ask = child.stdin.take();
        let mut network = Self { child, ask, answers };
        network.report();
        network
    }

    fn report(&mut self) -> Value {
        writeln!(self.ask.as_ref().expect("it runs"), "report").expect("the network reads");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the network answers");
        serde_json::from_str(&line).expect("a report")
    }

    fn number(&mut self, name: &str) -> u64 {
        self.report()[name].as_u64().expect("a number")
    }

    fn sample(&self) -> Sample {
        sample_of(self.child.id())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.ask = None;
        let _ = self.child.wait();
    }
}

/// One connection: a request, its answer, and the end. Who ends it first is a matter of the number.
fn connect(to: SocketAddr, number: u64) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let who = if (number / SERVERS as u64).is_multiple_of(2) { b'S' } else { b'C' };
    let mut request = [who; 64];
    request[1..9].copy_from_slice(&number.to_be_bytes());
    stream.write_all(&request)?;
    let mut answer = [0; 64];
    stream.read_exact(&mut answer)?;
    if who == b'C' {
        stream.shutdown(Shutdown::Write)?;
    }
    let rest = stream.read(&mut [0])?;
    match answer == request && rest == 0 {
        true => Ok(()),
        false => Err(std::io::Error::other("another answer")),
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let mut request = [0; 64];
    stream.read_exact(&mut request)?;
    stream.write_all(&request)?;
    if request[0] == b'C' {
        stream.read_to_end(&mut Vec::new())?;
    }
    Ok(())
}

/// What the clients of the guest have done.
#[derive(Default)]
struct Done {
    made: AtomicU64,
    failed: AtomicU64,
}

/// Starts the clients in the guest: `rate` connections each second, or as many as they can.
fn start_clients(
    guest: &Host,
    addresses: &[String],
    rate: Option<u64>,
    (stop, done): (&Stop, &Arc<Done>),
) -> Vec<thread::JoinHandle<()>> {
    let to: Vec<SocketAddr> =
        addresses.iter().map(|at| format!("{at}:{PORT}").parse().expect("an address")).collect();
    let (stop, done) = (stop.clone(), done.clone());
    // A thread is in the namespace of the one that starts it.
    guest.run(move || {
        let start = Instant::now();
        let client = |first: u64| {
            let (to, stop, done) = (to.clone(), stop.clone(), done.clone());
            move || {
                let mut number = first;
                while !stop.is_told() {
                    if let Some(rate) = rate {
                        let due = start + Duration::from_micros(number * 1_000_000 / rate);
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                    }
                    match connect(to[number as usize % to.len()], number) {
                        Ok(()) => _ = done.made.fetch_add(1, Ordering::Relaxed),
                        Err(error) => {
                            if done.failed.fetch_add(1, Ordering::Relaxed) < 3 {
                                println!("connection {number}: {error}");
                            }
                        }
                    }
                    number += CLIENTS;
                }
            }
        };
        (0..CLIENTS).map(|first| thread::spawn(client(first))).collect()
    })
}

fn join(clients: Vec<thread::JoinHandle<()>>) {
    clients.into_iter().for_each(|client| client.join().expect("a client ends"));
}

/// Runs so many seconds.
pub(crate) fn run(seconds: u64, are_raised: bool) -> bool {
    let limits = if are_raised { raised() } else { Limits::default() };
    let how = if are_raised { "raised" } else { "defaults" };
    println!("limits ({how}): {limits:?}");
    let (world, guest) = (World::new(), Host::new());
    let addresses: Vec<_> = (1..=SERVERS).map(|n| format!("203.0.113.{}", 100 + n)).collect();
    let own = addresses.clone();
    world.outside.run(move || {
        own.iter().for_each(|address| ip(&format!("address add {address}/24 dev w1")));
    });
    guest.run(|| {
        ip("link set lo up");
        ip("tuntap add t0 mode tap");
        ip("address add 192.168.64.2/24 dev t0");
        ip("link set t0 up");
        ip("route add default via 192.168.64.1");
    });
    serve_outside(&world, &addresses, PORT, answer);
    let mut network = Network::start(&world, &guest, how);
    let first: SocketAddr = format!("{}:{PORT}", addresses[0]).parse().expect("an address");
    guest.run(move || until("the first connection", || connect(first, 0).is_ok()));
    until("the first flow is gone", || network.number("entries") == 0);
    let before = (network.number("descriptors"), network.sample());
    println!("after one connection: {}", before.1);

    let (stop, done) = (Stop::default(), Arc::new(Done::default()));
    let clients = start_clients(&guest, &addresses, Some(RATE), (&stop, &done));
    let (mut halves, start) = (Halves::default(), Instant::now());
    let pid = network.child.id();
    halves.watch(
        Duration::from_secs(seconds),
        || sample_of(pid),
        || {
            let (made, failed) = (&done.made, &done.failed);
            let counts = [made, failed].map(|count| count.load(Ordering::Relaxed));
            format!("{} connections, {} failed; {}", counts[0], counts[1], network.report())
        },
    );
    stop.tell();
    join(clients);
    let (made, failed) = (done.made.load(Ordering::Relaxed), done.failed.load(Ordering::Relaxed));
    let rate = made as f64 / start.elapsed().as_secs_f64();
    println!("{made} connections, {rate:.0} each second, {failed} failed");
    // A machine that is saturated makes fewer, but none fails.
    let mut good = made > 0 && failed == 0 && halves.are_flat();

    if !are_raised {
        good &= burst(&guest, &addresses, &mut network);
    }
    let is_back = |network: &mut Network| {
        network.number("entries") == 0
            && network.number("descriptors") <= before.0
            && network.sample().descriptors <= before.1.descriptors
    };
    let waited = Instant::now();
    while !is_back(&mut network) && waited.elapsed() < LIMIT {
        thread::sleep(Duration::from_millis(100));
    }
    println!("at the end: {}; {}", network.sample(), network.report());
    good && is_back(&mut network)
}

/// More connections than the default limits let a guest have: they hold, and say so.
fn burst(guest: &Host, addresses: &[String], network: &mut Network) -> bool {
    const TIME: Duration = Duration::from_secs(3);
    let limit = u64::from(Limits::default().port.new_flows_per_second);
    let before = network.report();
    let (stop, done) = (Stop::default(), Arc::new(Done::default()));
    let (clients, start) = (start_clients(guest, addresses, None, (&stop, &done)), Instant::now());
    thread::sleep(TIME);
    stop.tell();
    join(clients);
    let time = start.elapsed().as_secs() + 1;
    let after = network.report();
    let more = |name: &str| {
        after[name].as_u64().expect("a number") - before[name].as_u64().expect("a number")
    };
    let (opened, refused) = (more("opened"), more("too_many_new"));
    println!("as many as it can for {time} s: {opened} flows, {refused} refused");
    // As many as in a second can be opened at once.
    opened <= (time + 1) * limit && (refused > 0 || opened < limit)
}
