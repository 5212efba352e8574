//! A soak test of the TAP. Two network stacks talk over two TAPs and a relay while links, rings,
//! interfaces and TAPs disappear and return in random order. No frame may be lost for good, and no
//! resource may grow.
//!
//! `VMRING_SOAK_SECONDS` makes it longer. The test must then run alone, because it also compares
//! what the whole process holds. `VMRING_SOAK_SEED` chooses another order.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use vmring::{
    CloseReason, Direction, EntryError, Error, Frame, Interface, Mode, Poller, Pool, PoolBuilder,
    Ring, RingOp, Status, SubmitErrorKind, Tap, TapEngine, TapError,
};

use crate::netns::{Host, in_namespace_for, sh, skip};
use crate::support::{Dice, LONG, Way, eventually, scaled, stage};
use crate::tap_traffic::{CHUNK, GUEST, HOST, PAYLOAD, PORT, SetAtEnd, add, chunk, get, payload};

const DEPTH: u32 = 128;
/// Frames for both directions. The relay never has more frames to write to a ring than the ring has
/// credits.
const FRAMES: usize = 2 * DEPTH as usize;

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number, and not '{text}'")))
}

/// Goal: whatever happens to links, rings, interfaces and TAPs, every frame returns to the pool,
/// every flow goes on, no datagram is doubled or overtaken, no byte of a stream differs, and no
/// descriptor or memory is left behind. Method: random acts, for half of the time with io_uring,
/// then with plain calls.
#[test]
fn traffic_outlives_whatever_happens() {
    let asked = number_from("VMRING_SOAK_SECONDS");
    let seed = number_from("VMRING_SOAK_SEED").unwrap_or(1);
    let time = asked.map_or(Duration::from_millis(scaled(4000)), Duration::from_secs);
    in_namespace_for(time * 2 + LONG * 4, move || {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            match engine.resolve() {
                Ok(_) => soak(engine, time / 2, seed, asked.is_some()),
                Err(error) => skip(&error.to_string()),
            }
        }
    });
}

/// The two network stacks. The host is the test's own namespace.
struct Ends {
    names: [&'static str; 2],
    b: Host,
}

impl Ends {
    fn run<T: Send + 'static>(&self, side: usize, f: impl FnOnce() -> T + Send + 'static) -> T {
        if side == 0 { f() } else { self.b.run(f) }
    }

    fn sh(&self, side: usize, command: &str) {
        let command = command.to_owned();
        self.run(side, move || sh(&command));
    }

    /// Makes the persistent TAP, with the addresses it had before. ARP is off, because later
    /// datagrams overtake those that wait for its answer. Without ARP, the kernel sends to its own
    /// MAC address, so both ends have the same one.
    fn make(&self, side: usize) {
        let (name, address) = (self.names[side], [HOST, GUEST][side]);
        self.sh(
            side,
            &format!(
                "ip tuntap add {name} mode tap && \
                 ip link set {name} address 02:00:00:00:01:00 arp off up && \
                 ip addr add {address}/24 broadcast {EVERYBODY} dev {name}"
            ),
        );
    }

    /// Shortens TCP's timeouts for the test.
    fn be_quick(&self) {
        for side in 0..2 {
            self.run(side, || {
                for (path, value) in
                    [("ipv4/tcp_rto_min_us", "5000"), ("ipv4/tcp_rto_max_ms", "1000")]
                {
                    // Older kernels do not have all of these settings. There the test takes longer.
                    let _ = std::fs::write(format!("/proc/sys/net/{path}"), value);
                }
            });
        }
    }
}

const EVERYBODY: &str = "192.168.128.255";

/// What the relay has seen of one ring since the ring was built.
#[derive(Debug, Default)]
struct Tally {
    read: u64,
    written: u64,
    /// Frames that the ring holds, by direction.
    reading: usize,
    writing: usize,
    /// Cancels in flight.
    cancelling: usize,
    /// The ring's TAP is about to be deleted.
    doomed: bool,
}

/// What is printed at the end.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// To the guest, and to the host.
    packets: [u64; 2],
    bytes: [u64; 2],
    cancelled: u64,
    down: u64,
    failed: u64,
    undelivered: u64,
    rings: u64,
}

type Job = Box<dyn FnOnce(&mut Relay) + Send>;

/// Passes every frame of one interface to the other, whatever happens to the rings.
struct Relay {
    ends: Arc<Ends>,
    interfaces: [Arc<Interface>; 2],
    pool: Pool,
    rings: [Option<Ring>; 2],
    tallies: [Tally; 2],
    sums: Sums,
}

impl Relay {
    fn new(ends: Arc<Ends>, interfaces: [Arc<Interface>; 2]) -> Self {
        let pool = PoolBuilder::new(FRAMES, 1518).build().expect("a pool");
        let (rings, tallies, sums) = Default::default();
        Self { ends, interfaces, pool, rings, tallies, sums }
    }

    /// Runs until the sender of jobs is dropped.
    fn run(mut self, jobs: &mpsc::Receiver<Job>) -> Sums {
        loop {
            match jobs.try_recv() {
                Ok(job) => job(&mut self),
                Err(mpsc::TryRecvError::Empty) => {}
                Err(mpsc::TryRecvError::Disconnected) => return self.sums,
            }
            let busy = [self.turn(0), self.turn(1)];
            if busy == [false; 2] {
                self.sleep();
            }
        }
    }

    fn sleep(&mut self) {
        let mut fds = Vec::with_capacity(2);
        for ring in self.rings.iter_mut().flatten() {
            if !ring.arm() {
                // The ring has completions already, or will never have any again.
                return thread::sleep(Duration::from_micros(50));
            }
            let fd = ring.completion_fd().expect("a descriptor").as_raw_fd();
            fds.push(libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        }
        // SAFETY: pointer and length are those of `fds`, which lives through the call.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 2) };
    }

    /// Reaps one ring and gives it frames to read into. Returns whether there was anything to reap.
    fn turn(&mut self, from: usize) -> bool {
        let Some(mut ring) = self.rings[from].take() else { return false };
        let busy = self.reap(from, &mut ring);
        while self.tallies[from].reading + self.tallies[1 - from].writing < DEPTH as usize
            && let Some(frame) = self.pool.alloc()
        {
            match ring.submit_read(frame, 1) {
                Ok(()) => self.tallies[from].reading += 1,
                Err(refused) => {
                    self.may_refuse(from, refused.kind);
                    break;
                }
            }
        }
        self.rings[from] = Some(ring);
        busy
    }

    fn may_refuse(&self, side: usize, kind: SubmitErrorKind) {
        match kind {
            SubmitErrorKind::Closed(CloseReason::Failed(_)) if self.tallies[side].doomed => {}
            kind => panic!("side {side} refuses: {kind}: {:?}", self.tallies[side]),
        }
    }

    fn reap(&mut self, from: usize, ring: &mut Ring) -> bool {
        let mut busy = false;
        for done in ring.reap() {
            busy = true;
            let op = done.op;
            let (_, result, frame) = done.into_parts();
            let tally = &mut self.tallies[from];
            match op {
                RingOp::Read => tally.reading -= 1,
                RingOp::Write => tally.writing -= 1,
                _ => tally.cancelling -= 1,
            }
            match (op, result) {
                (RingOp::Read, Ok(_)) => {
                    tally.read += 1;
                    self.forward(from, frame.expect("a read has one"));
                }
                (RingOp::Write, Ok(_)) => {
                    tally.written += 1;
                    self.sums.packets[1 - from] += 1;
                    self.sums.bytes[1 - from] += frame.expect("a write has one").len() as u64;
                }
                (RingOp::Cancel, _) => {}
                (_, Err(EntryError::Cancelled)) => self.sums.cancelled += 1,
                (RingOp::Write, Err(EntryError::Device(Status::Os(libc::EIO)))) => {
                    self.sums.down += 1;
                }
                (_, Err(EntryError::Device(Status::Os(libc::EBADFD)))) if tally.doomed => {
                    self.sums.failed += 1;
                }
                (op, result) => panic!("side {from}: {op:?} ends with {result:?}: {tally:?}"),
            }
        }
        busy
    }

    fn forward(&mut self, from: usize, frame: Frame) {
        let to = 1 - from;
        let Some(ring) = &mut self.rings[to] else {
            self.sums.undelivered += 1;
            return;
        };
        match ring.submit_write(frame, 2) {
            Ok(()) => self.tallies[to].writing += 1,
            Err(refused) => {
                self.sums.undelivered += 1;
                self.may_refuse(to, refused.kind);
            }
        }
    }

    fn ring(&mut self, side: usize) -> &mut Ring {
        self.rings[side].as_mut().expect("both sides have a ring")
    }

    /// Takes everything back from a ring and keeps the ring.
    fn cancel_and_wait(&mut self, side: usize) {
        let mut ring = self.rings[side].take().expect("a ring");
        ring.cancel_and_wait(LONG).expect("the kernel lets go");
        self.reap(side, &mut ring);
        let tally = &self.tallies[side];
        assert_eq!((ring.in_flight(), tally.reading, tally.writing), (0, 0, 0), "{tally:?}");
        self.rings[side] = Some(ring);
        self.count();
    }

    fn cancel_all(&mut self, side: usize) {
        match self.ring(side).cancel_all(3) {
            Ok(()) => self.tallies[side].cancelling += 1,
            Err(kind) => self.may_refuse(side, kind),
        }
    }

    /// Whether the ring has ended and has nothing left.
    fn is_over(&mut self, side: usize) -> bool {
        let ring = self.ring(side);
        let closed = ring.control().closed();
        assert!(
            !matches!(closed, Some(CloseReason::Stopped | CloseReason::DevicePanicked)),
            "{closed:?}"
        );
        closed.is_some() && ring.in_flight() == 0
    }

    /// Closes the ring if `close`, else only drops it.
    fn end(&mut self, side: usize, close: bool) {
        let Some(mut ring) = self.rings[side].take() else { return };
        if close {
            ring.close().expect("it closes");
            self.reap(side, &mut ring);
            let (stats, tally) = (ring.stats(), &self.tallies[side]);
            assert_eq!((ring.in_flight(), tally.reading, tally.writing), (0, 0, 0), "{tally:?}");
            assert_eq!((stats.rx_packets, stats.tx_packets), (tally.read, tally.written));
            assert_eq!((stats.exhausted, stats.abandoned), (0, 0), "{stats:?}");
        }
        drop(ring);
        self.tallies[side] = Tally::default();
    }

    /// Ends the rings of those sides and builds new ones over the same pool.
    fn renew(&mut self, sides: &[usize], close: bool, way: Way) {
        for side in sides {
            self.end(*side, close);
        }
        self.count();
        for side in sides {
            // Build the ring on its side: the interface restarts in the namespace of the thread
            // that drives the ring.
            let (interface, pool) = (self.interfaces[*side].clone(), self.pool.clone());
            let ring = self.ends.run(*side, move || {
                let poller = Poller::start().expect("a poller");
                let ring = interface.ring(Direction::Both).depth(DEPTH).pool(&pool);
                ring.drive(way.drive(&poller)).build().expect("a ring")
            });
            self.rings[*side] = Some(ring);
            self.sums.rings += 1;
        }
    }

    /// Checks that every frame that is not in a ring is in the pool.
    fn count(&self) {
        let out: usize = self.tallies.iter().map(|tally| tally.reading + tally.writing).sum();
        let mut home = Vec::with_capacity(FRAMES);
        eventually("every frame comes home", || {
            home.extend(std::iter::from_fn(|| self.pool.alloc()));
            home.len() + out >= FRAMES
        });
        assert_eq!(home.len() + out, FRAMES, "{:?}", self.tallies);
        drop(home);
        assert_eq!(self.pool.slots_out() as usize, out, "{:?}", self.tallies);
    }
}

/// A relay's thread.
struct Relaying {
    jobs: mpsc::Sender<Job>,
    thread: thread::JoinHandle<Sums>,
}

impl Relaying {
    fn start(ends: Arc<Ends>, interfaces: [Arc<Interface>; 2]) -> Self {
        let (jobs, todo) = mpsc::channel();
        let thread = thread::spawn(move || Relay::new(ends, interfaces).run(&todo));
        Self { jobs, thread }
    }

    /// Has the relay run `f` between two turns, and waits for the result.
    fn ask<T: Send + 'static>(&self, f: impl FnOnce(&mut Relay) -> T + Send + 'static) -> T {
        let (done, waiting) = mpsc::channel();
        let job = Box::new(move |relay: &mut Relay| {
            let _ = done.send(f(relay));
        });
        self.jobs.send(job).expect("the relay runs");
        waiting.recv_timeout(LONG).expect("the relay answers")
    }

    fn end(self) -> Sums {
        drop(self.jobs);
        eventually("the relay ends", || self.thread.is_finished());
        self.thread.join().expect("the relay has not panicked")
    }
}

/// Datagrams, broadcasts and a stream in both directions. Counts what has arrived of each.
struct Flows {
    datagrams: [UdpSocket; 2],
    shouts: [UdpSocket; 2],
    streams: [TcpStream; 2],
    arrived: [[AtomicU64; 2]; 3],
    done: AtomicBool,
}

impl Flows {
    fn new(ends: &Ends) -> Self {
        let addresses = [HOST, GUEST];
        let datagrams = [0, 1].map(|side| {
            ends.run(side, move || {
                let socket = UdpSocket::bind((addresses[side], PORT)).expect("a socket");
                socket.connect((addresses[1 - side], PORT)).expect("a way to the other end");
                socket
            })
        });
        // A kernel receives its own broadcasts, so each side has its own port.
        let shouts = [0, 1].map(|side| {
            ends.run(side, move || {
                let socket = UdpSocket::bind(("0.0.0.0", SHOUTS[side])).expect("a socket");
                socket.set_broadcast(true).expect("a setting");
                socket
            })
        });
        for socket in datagrams.iter().chain(&shouts) {
            socket.set_read_timeout(Some(NAP)).expect("a timeout");
        }
        let listener = TcpListener::bind((HOST, 0)).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let connect = move || TcpStream::connect_timeout(&address, LONG).expect("a connection");
        let guest = ends.run(1, connect);
        let (host, _) = listener.accept().expect("it is there");
        for stream in [&host, &guest] {
            stream.set_read_timeout(Some(NAP)).expect("a timeout");
            stream.set_write_timeout(Some(NAP)).expect("a timeout");
        }
        let (arrived, done) = Default::default();
        Self { datagrams, shouts, streams: [host, guest], arrived, done }
    }

    fn start<'a>(&'a self, scope: &'a thread::Scope<'a, '_>) {
        let [datagrams, shouts, streams] = &self.arrived;
        for side in 0..2 {
            let other = 1 - side;
            scope.spawn(move || self.throw(side));
            scope.spawn(move || self.catch(&self.datagrams[side], other as u64, &datagrams[side]));
            scope.spawn(move || self.catch(&self.shouts[side], 2 + other as u64, &shouts[side]));
            scope.spawn(move || self.speak(&self.streams[side], side as u64));
            scope.spawn(move || self.listen(&self.streams[side], other as u64, &streams[side]));
        }
    }

    fn is_on(&self) -> bool {
        !self.done.load(Ordering::Acquire)
    }

    /// Sends numbered datagrams and broadcasts. They are lost while there is no route.
    fn throw(&self, side: usize) {
        let _done = SetAtEnd(&self.done);
        let flow = |flow: usize, number: u64| payload((flow as u64) << 48 | number);
        for number in 0.. {
            if !self.is_on() {
                break;
            }
            let _ = self.datagrams[side].send(&flow(side, number));
            if number % 16 == 0 {
                let everybody = (EVERYBODY, SHOUTS[1 - side]);
                let _ = self.shouts[side].send_to(&flow(2 + side, number), everybody);
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn catch(&self, socket: &UdpSocket, flow: u64, arrived: &AtomicU64) {
        let _done = SetAtEnd(&self.done);
        let (mut bytes, mut last) = ([0; 2048], None);
        while self.is_on() {
            // Errors concern datagrams that were sent while there was no route.
            let Ok(len) = socket.recv(&mut bytes) else { continue };
            assert_eq!(len, PAYLOAD);
            let number = u64::from_be_bytes(bytes[..8].try_into().expect("eight"));
            assert_eq!(bytes[..len], payload(number), "flow {flow}, datagram {number}");
            assert_eq!(number >> 48, flow);
            assert!(last < Some(number), "flow {flow}: {number} after {last:?}");
            last = Some(number);
            add(arrived);
        }
    }

    fn speak(&self, mut to: &TcpStream, flow: u64) {
        let _done = SetAtEnd(&self.done);
        let mut piece = vec![0; CHUNK];
        for at in (0..).step_by(CHUNK) {
            chunk(flow, at, &mut piece);
            let mut rest = &piece[..];
            while !rest.is_empty() {
                if !self.is_on() {
                    return;
                }
                match to.write(rest) {
                    Ok(len) => rest = &rest[len..],
                    Err(error) if is_later(&error) => {}
                    Err(error) => panic!("stream {flow} at {at}: {error}"),
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn listen(&self, mut from: &TcpStream, flow: u64, arrived: &AtomicU64) {
        let _done = SetAtEnd(&self.done);
        let (mut bytes, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
        for at in (0..).step_by(CHUNK) {
            chunk(flow, at, &mut expected);
            let mut rest = &expected[..];
            while !rest.is_empty() {
                if !self.is_on() {
                    return;
                }
                match from.read(&mut bytes[..rest.len()]) {
                    Ok(0) => panic!("stream {flow} ends at {at}"),
                    Ok(len) => {
                        assert!(bytes[..len] == rest[..len], "stream {flow} differs after {at}");
                        rest = &rest[len..];
                        arrived.fetch_add(len as u64, Ordering::Relaxed);
                    }
                    Err(error) if is_later(&error) => {}
                    Err(error) => panic!("stream {flow} at {at}: {error}"),
                }
            }
        }
    }

    /// Waits until every flow makes progress again.
    fn go_on(&self, after: &str) {
        let look = || self.arrived.each_ref().map(|both| both.each_ref().map(get));
        let before = look();
        let least = [20, 2, 2 * CHUNK as u64];
        let what = format!("every flow goes on after {after}");
        stage(&*what);
        let start = Instant::now();
        loop {
            let now = look();
            let all = (0..3).all(|i| (0..2).all(|side| now[i][side] >= before[i][side] + least[i]));
            if all {
                break;
            }
            assert!(self.is_on(), "one of the flows has failed; {what}");
            assert!(start.elapsed() < LONG, "{what}: {before:?}, now {now:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

const SHOUTS: [u16; 2] = [PORT + 1, PORT + 2];
const NAP: Duration = Duration::from_millis(20);

fn is_later(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Flap,
    Restart,
    RestartInAFlap,
    RenewOne,
    RenewBoth,
    Quiesce,
    CancelAll,
    CancelFromAfar,
    Mtu,
    Delete,
}

const ACTS: [Act; 10] = [
    Act::Flap,
    Act::Restart,
    Act::RestartInAFlap,
    Act::RenewOne,
    Act::RenewBoth,
    Act::Quiesce,
    Act::CancelAll,
    Act::CancelFromAfar,
    Act::Mtu,
    Act::Delete,
];

struct Chaos<'a> {
    dice: Dice,
    ends: &'a Ends,
    interfaces: &'a [Arc<Interface>; 2],
    relaying: &'a Relaying,
    flows: &'a Flows,
    done: [u64; ACTS.len()],
}

impl Chaos<'_> {
    /// Performs each act once, in random order.
    fn round(&mut self) {
        let mut left = ACTS.to_vec();
        while !left.is_empty() {
            let act = left.swap_remove(self.dice.below(left.len() as u64) as usize);
            thread::sleep(Duration::from_millis(self.dice.below(20)));
            let side = self.dice.below(2) as usize;
            stage(format!("{act:?} at side {side}"));
            self.act(act, side);
            self.done[act as usize] += 1;
        }
    }

    fn act(&mut self, act: Act, side: usize) {
        let (ends, relaying, name) = (self.ends, self.relaying, self.ends.names[side]);
        let interface = self.interfaces[side].clone();
        let way = self.way(side);
        let close = self.dice.below(3) != 0;
        let pause = Duration::from_millis(self.dice.below(30));
        match act {
            Act::Flap => {
                ends.sh(side, &format!("ip link set {name} down"));
                thread::sleep(pause);
                ends.sh(side, &format!("ip link set {name} up"));
            }
            Act::Restart => {
                ends.run(side, move || interface.restart(LONG)).expect("it restarts");
                self.flows.go_on("a restart");
            }
            Act::RestartInAFlap => {
                let restarted = ends.run(side, move || {
                    thread::scope(|scope| {
                        scope.spawn(|| {
                            sh(&format!("ip link set {name} down"));
                            thread::sleep(pause / 10);
                            sh(&format!("ip link set {name} up"));
                        });
                        thread::sleep(pause / 5);
                        interface.restart(LONG)
                    })
                });
                restarted.expect("it restarts");
                // The restart or the flap may have come last, so set the link up.
                ends.sh(side, &format!("ip link set {name} up"));
                self.flows.go_on("a restart in a flap");
            }
            Act::RenewOne => {
                relaying.ask(move |relay| relay.renew(&[side], close, way));
                self.flows.go_on("a new ring");
            }
            Act::RenewBoth => {
                let way = self.way(1);
                relaying.ask(move |relay| relay.renew(&[side, 1 - side], close, way));
                self.flows.go_on("new rings");
            }
            Act::Quiesce => {
                relaying.ask(move |relay| relay.cancel_and_wait(side));
                self.flows.go_on("a cancel_and_wait");
            }
            Act::CancelAll => relaying.ask(move |relay| relay.cancel_all(side)),
            Act::CancelFromAfar => {
                relaying.ask(move |relay| relay.ring(side).control()).cancel_all();
            }
            Act::Mtu => {
                let mtu = 576 + self.dice.below(1500 - 576 + 1);
                ends.sh(side, &format!("ip link set {name} mtu {mtu}"));
            }
            Act::Delete => {
                relaying.ask(move |relay| relay.tallies[side].doomed = true);
                ends.sh(side, &format!("ip link del {name}"));
                eventually("the ring ends with its TAP", || {
                    relaying.ask(move |relay| relay.is_over(side))
                });
                let again = interface.clone();
                let gone = ends.run(side, move || again.restart(LONG));
                let Err(Error::Device(error)) = &gone else { panic!("{gone:?}") };
                assert!(matches!(&**error, Error::Tap(TapError::Gone(_))), "{error}");
                ends.make(side);
                ends.run(side, move || interface.restart(LONG)).expect("it is back");
                relaying.ask(move |relay| relay.renew(&[side], close, way));
                self.flows.go_on("a deletion");
            }
        }
    }

    /// How to drive the ring of a side. The guest's ring is not driven by this thread, because its
    /// interface restarts in the namespace of the driving thread.
    fn way(&mut self, side: usize) -> Way {
        Way::ALL[self.dice.below(if side == 0 { 3 } else { 2 }) as usize]
    }
}

fn soak(engine: TapEngine, time: Duration, seed: u64, alone: bool) {
    let fds_before = Descriptors::now(&[]);
    let names = match engine {
        TapEngine::Plain => ["soakp0", "soakp1"],
        _ => ["soaki0", "soaki1"],
    };
    let ends = Arc::new(Ends { names, b: Host::new() });
    ends.be_quick();
    let interfaces = [0, 1].map(|side| {
        ends.make(side);
        ends.run(side, move || {
            let tap = Tap::named(names[side]).engine(engine);
            let builder = Interface::builder().mode(Mode::Host).mtu(1500).device(tap);
            Arc::new(builder.start().expect("an interface"))
        })
    });
    let relaying = Relaying::start(ends.clone(), interfaces.clone());
    relaying.ask(|relay| relay.renew(&[0, 1], true, Way::Thread));
    let flows = Flows::new(&ends);
    let (start, mut warm) = (Instant::now(), None);
    let (done, end) = thread::scope(|scope| {
        let _done = SetAtEnd(&flows.done);
        flows.start(scope);
        flows.go_on("the start");
        let dice = Dice::new(seed);
        let mut chaos = Chaos {
            dice,
            ends: &ends,
            interfaces: &interfaces,
            relaying: &relaying,
            flows: &flows,
            done: [0; ACTS.len()],
        };
        loop {
            chaos.round();
            if start.elapsed() > time / 5 {
                warm.get_or_insert_with(resident);
            }
            if start.elapsed() > time {
                break;
            }
        }
        flows.go_on("all of it");
        (chaos.done, resident())
    });
    let warm = warm.expect("at the end at the latest");
    stage("everything goes home");
    relaying.ask(|relay| {
        relay.end(0, true);
        relay.end(1, true);
        relay.count();
    });
    let sums = relaying.end();
    for interface in interfaces {
        interface.stop(LONG).expect("it stops");
    }
    drop(flows);
    for (side, name) in names.into_iter().enumerate() {
        // The TAP existed before the interface, so it is still there.
        ends.sh(side, &format!("ip link del {name}"));
    }
    drop(Arc::into_inner(ends).expect("nobody else has them").b);
    // If other tests run too, count only the descriptors that are certainly ours.
    let fds = || Descriptors::now(&names);
    eventually("no descriptor of ours is left", || {
        fds().taps == 0 && (!alone || fds().all <= fds_before.all)
    });
    let numbers = Numbers { seed, engine, sums, done, fds: [fds_before, fds()], warm, end };
    let _ = writeln!(std::io::stderr(), "{numbers}");
    assert!(!alone || end < warm + 8192, "memory has grown from {warm} to {end} KiB");
}

/// Numbers of open descriptors: of these TAPs, of any io_uring, and all.
#[derive(Clone, Copy, Debug, Default)]
struct Descriptors {
    taps: usize,
    urings: usize,
    all: usize,
}

impl Descriptors {
    fn now(names: &[&str]) -> Self {
        let mut this = Self::default();
        for entry in std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten() {
            // Other threads may close theirs meanwhile.
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            this.all += 1;
            this.urings += usize::from(target.to_str() == Some("anon_inode:[io_uring]"));
            let info = format!("/proc/self/fdinfo/{}", entry.file_name().to_string_lossy());
            let info = std::fs::read_to_string(info).unwrap_or_default();
            let tap = info.lines().find_map(|line| line.strip_prefix("iff:"));
            this.taps += usize::from(tap.is_some_and(|name| names.contains(&name.trim())));
        }
        this
    }
}

/// Resident memory in KiB.
fn resident() -> u64 {
    let all = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = all.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("resident memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

struct Numbers {
    seed: u64,
    engine: TapEngine,
    sums: Sums,
    done: [u64; ACTS.len()],
    fds: [Descriptors; 2],
    warm: u64,
    end: u64,
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, engine, sums, done, fds: [before, after], warm, end } = self;
        let count = |act: Act| done[act as usize];
        write!(f, "soak by {engine}, seed {seed}: ")?;
        for (way, name) in ["to the guest", "to the host"].into_iter().enumerate() {
            write!(f, "{} packets ({} bytes) {name}, ", sums.packets[way], sums.bytes[way])?;
        }
        let Sums { cancelled, down, failed, undelivered, rings, .. } = sums;
        write!(f, "{cancelled} cancelled, {down} at a link down, {failed} at a TAP gone, ")?;
        write!(f, "{undelivered} with nowhere to go; ")?;
        write!(f, "{} flaps, ", count(Act::Flap))?;
        let restarts = count(Act::Restart) + count(Act::RestartInAFlap);
        write!(f, "{restarts} restarts, {} deletions, {rings} rings; ", count(Act::Delete))?;
        write!(f, "descriptors {} before, {} after, ", before.all, after.all)?;
        write!(f, "io_uring {} and {}; ", before.urings, after.urings)?;
        write!(f, "resident {warm} KiB warm, {end} KiB at the end")
    }
}
