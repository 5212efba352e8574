//! Traffic of the kernel's own network stacks over the TAP. The host is the test's namespace, the
//! guest is another namespace with a TAP of its own, and between them is a relay over two rings.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmring::device::Offloads;
use vmring::stats::RingStats;
use vmring::{
    Direction, EntryError, Interface, MacAddr6, Mode, Poller, PoolBuilder, Ring, RingOp, Status,
    Tap, TapEngine,
};

use crate::netns::{Host, has, in_namespace, sh, skip, try_sh, with_ipv6};
use crate::support::{LONG, Way, eventually, number_of, packet_between, scaled, stage, unique};

/// The port whose UDP datagrams are counted.
pub(crate) const PORT: u16 = 7777;

/// Runs `body` in a namespace of its own, if the engine is available.
fn on(engine: TapEngine, body: impl FnOnce(TapEngine) + Send + 'static) {
    in_namespace(move || match engine.resolve() {
        Ok(_) => body(engine),
        Err(error) => skip(&error.to_string()),
    });
}

macro_rules! on_both_engines {
    ($($(#[$attribute:meta])* $name:ident;)+) => {
        mod by_io_uring {
            $($(#[$attribute])*
            #[test]
            fn $name() {
                super::on(vmring::TapEngine::IoUring, super::$name);
            })+
        }

        mod by_plain_calls {
            $($(#[$attribute])*
            #[test]
            fn $name() {
                super::on(vmring::TapEngine::Plain, super::$name);
            })+
        }
    };
}

/// Counters of one way through the relay.
#[derive(Debug, Default)]
struct Lane {
    /// Frames passed on.
    frames: AtomicU64,
    /// UDP datagrams to [`PORT`] among them.
    counted: AtomicU64,
    /// The longest frame.
    longest: AtomicU64,
    /// Frames that were refused because the other TAP was down, and for any other reason.
    down: AtomicU64,
    refused: AtomicU64,
    /// Frames that came after the relay was stopped.
    late: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Lane {
    fn see(&self, frame: &[u8]) {
        add(&self.frames);
        self.longest.fetch_max(frame.len() as u64, Ordering::Relaxed);
        if frame.len() >= 42
            && frame[12..15] == [8, 0, 0x45]
            && frame[23] == 17
            && frame[36..38] == PORT.to_be_bytes()
        {
            add(&self.counted);
        }
    }
}

/// A thread that passes every frame of one interface to the other. It makes no copy, because both
/// rings use one pool. Lane 0 goes from the first interface to the second, lane 1 back.
struct Relay {
    stop: Arc<AtomicBool>,
    lanes: Arc<[Lane; 2]>,
    thread: Option<JoinHandle<[RingStats; 2]>>,
}

impl Relay {
    fn start(ends: [&Interface; 2], way: Way) -> Self {
        let packet = ends.map(Interface::max_packet_size).into_iter().max().expect("two") as usize;
        let depth = if packet > 16_384 { 64 } else { 256 };
        // A frame always stays in its lane, so a lane never has more frames to write than the other
        // ring has credits.
        let pool = PoolBuilder::new(2 * depth as usize, packet).build().expect("a pool");
        let poller = Poller::start().expect("a poller");
        let rings = ends.map(|end| {
            let ring = end.ring(Direction::Both).depth(depth).pool(&pool);
            ring.drive(way.drive(&poller)).build().expect("a ring")
        });
        let (stop, lanes) = (Arc::new(AtomicBool::new(false)), Arc::<[Lane; 2]>::default());
        let thread = thread::spawn({
            let (stop, lanes) = (stop.clone(), lanes.clone());
            move || {
                let stats = relay(rings, &lanes, &stop);
                drop(poller);
                assert_eq!(pool.slots_out(), 0, "every frame comes home");
                stats
            }
        });
        Self { stop, lanes, thread: Some(thread) }
    }

    /// Stops the relay and checks that the counters of both rings agree with those of the lanes.
    fn end(mut self) -> Arc<[Lane; 2]> {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take().expect("taken here or in drop");
        eventually("the relay ends", || thread.is_finished());
        let stats = match thread.join() {
            Ok(stats) => stats,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        for (from, lane) in self.lanes.iter().enumerate() {
            let (from, to) = (&stats[from], &stats[1 - from]);
            assert_eq!(from.rx_packets, get(&lane.frames) + get(&lane.late), "{from:?} {lane:?}");
            let failed = get(&lane.down) + get(&lane.refused);
            assert_eq!(to.tx_packets + failed, get(&lane.frames), "{to:?} {lane:?}");
            assert_eq!((to.errors, to.exhausted, to.abandoned), (failed, 0, 0), "{to:?} {lane:?}");
        }
        self.lanes.clone()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn relay(mut rings: [Ring; 2], lanes: &[Lane; 2], stop: &AtomicBool) -> [RingStats; 2] {
    for ring in &mut rings {
        let half = ring.pools()[0].layout().slots / 2;
        for _ in 0..half {
            let frame = ring.alloc().expect("half of the frames for each ring");
            ring.submit_read(frame, 0).expect("a credit for each");
        }
    }
    let (mut writing, mut stopping) = (0, false);
    while !(stopping && writing == 0) {
        stopping = stop.load(Ordering::Acquire);
        let mut idle = true;
        for from in 0..2 {
            let [first, second] = &mut rings;
            let (here, there) = if from == 0 { (first, second) } else { (second, first) };
            for done in here.reap() {
                idle = false;
                let op = done.op;
                let (_, result, frame) = done.into_parts();
                let mut frame = frame.expect("reads and writes have one");
                match op {
                    RingOp::Read if stopping => {
                        if result.is_ok() {
                            add(&lanes[from].late);
                        }
                    }
                    RingOp::Read => {
                        result.expect("a packet");
                        lanes[from].see(&frame);
                        frame.forward_offload().expect("the kernel's header");
                        there.submit_write(frame, 0).expect("a credit for each frame");
                        writing += 1;
                    }
                    RingOp::Write => {
                        writing -= 1;
                        let lane = &lanes[1 - from];
                        match result {
                            Ok(_) => {}
                            Err(EntryError::Device(Status::Os(libc::EIO))) => add(&lane.down),
                            Err(_) => add(&lane.refused),
                        }
                        if !stopping {
                            frame.reset();
                            there.submit_read(frame, 0).expect("a credit for each frame");
                        }
                    }
                    _ => panic!("nothing was cancelled"),
                }
            }
        }
        if idle && rings.iter_mut().all(|ring| ring.arm()) {
            let fds = rings.each_ref().map(|ring| libc::pollfd {
                fd: ring.completion_fd().expect("a descriptor").as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            });
            let mut fds = fds;
            // SAFETY: the pointer is to two `pollfd`s, which live through the call.
            unsafe { libc::poll(fds.as_mut_ptr(), 2, 20) };
        }
    }
    for (from, ring) in rings.iter_mut().enumerate() {
        ring.cancel_and_wait(LONG).expect("the kernel lets go");
        for done in ring.reap() {
            if done.op == RingOp::Read && done.result.is_ok() {
                add(&lanes[from].late);
            }
        }
    }
    let stats = rings.each_ref().map(Ring::stats);
    for mut ring in rings {
        ring.close().expect("it closes");
    }
    stats
}

/// What a `World` is made of.
struct Plan {
    engine: TapEngine,
    mode: Mode,
    offload: bool,
    mtu: u32,
    way: Way,
    ipv6: bool,
}

impl Plan {
    fn of(engine: TapEngine) -> Self {
        Self { engine, mode: Mode::Host, offload: false, mtu: 1500, way: Way::Thread, ipv6: false }
    }

    /// An interface on the TAP of that name, in the namespace of this thread.
    fn interface(&self, tap: Tap) -> Interface {
        if self.ipv6 {
            with_ipv6();
        }
        let mut offloads = Offloads::default();
        if self.offload {
            (offloads.checksum, offloads.uso) = (true, true);
            (offloads.tso4, offloads.tso6) = (true, true);
        }
        let tap = tap.engine(self.engine);
        let builder = Interface::builder().mode(self.mode.clone()).mtu(self.mtu);
        builder.offloads(offloads).device(tap).start().expect("an interface")
    }
}

/// The host with the TAP `a0`, the guest with `b0`, and the relay between them.
struct World {
    host: Interface,
    guest: Interface,
    b: Host,
    relay: Relay,
}

impl World {
    fn new(plan: Plan) -> Self {
        stage("making the host's TAP");
        let host = plan.interface(Tap::named("a0"));
        let b = Host::new();
        let way = plan.way;
        let guest = b.run(move || plan.interface(Tap::named("b0").configure(false)));
        let relay = Relay::start([&host, &guest], way);
        Self { host, guest, b, relay }
    }

    /// A world in host mode, with the guest at the second address.
    fn with_address(plan: Plan) -> Self {
        let this = Self::new(plan);
        this.b.sh(&format!("ip addr add {GUEST}/24 dev b0"));
        this
    }

    /// Stops everything and returns what the relay has counted.
    fn end(self) -> Arc<[Lane; 2]> {
        let lanes = self.relay.end();
        stage("the interfaces stop");
        self.host.stop(LONG).expect("it stops");
        self.guest.stop(LONG).expect("it stops");
        gone("a0");
        lanes
    }
}

/// Waits until the interface is no longer in this thread's namespace. A program that another test
/// starts inherits our descriptors and keeps them until its exec.
fn gone(interface: &str) {
    eventually("the TAP goes", || index_of(interface) == 0);
}

/// The index of the interface, or 0 if there is none.
fn index_of(interface: &str) -> u32 {
    let name = std::ffi::CString::new(interface).expect("a name");
    // SAFETY: the string ends with a zero and lives through the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

/// In host mode.
pub(crate) const HOST: &str = "192.168.128.1";
pub(crate) const GUEST: &str = "192.168.128.2";

on_both_engines! {
    ping;
    datagrams;
    iperf;
    streams;
    dhcp;
    way_out;
    bridged_over_vxlan;
    link_down_and_up;
    mtu_raised;
    cut_at_the_end_of_the_slot;
    cut_behind_a_vlan_tag;
    a_start_interrupts_nothing;
}

/// Goal: ARP, ping and IPv6 neighbour discovery work in both directions and nothing is lost.
fn ping(engine: TapEngine) {
    if !has("ping") {
        return;
    }
    for way in [Way::Thread, Way::Shared] {
        let world = World::with_address(Plan { ipv6: true, way, ..Plan::of(engine) });
        let local = |said: String| {
            let address = said.split_whitespace().find(|word| word.starts_with("fe80::"));
            address.and_then(|word| word.split('/').next()).expect("an address").to_owned()
        };
        let local_of = |tap: &str| format!("ip -6 -oneline addr show dev {tap} scope link");
        let (at_a, at_b) = (local(sh(&local_of("a0"))), local(world.b.sh(&local_of("b0"))));
        let b = &world.b;
        b.run(|| ping_20(HOST));
        ping_20(GUEST);
        b.run(move || ping_20(&format!("-6 {at_a}%b0")));
        ping_20(&format!("-6 {at_b}%a0"));
        b.run(|| ping_20(&format!("-s 8000 {HOST}"))); // these are fragmented
        let lanes = world.end();
        for lane in &*lanes {
            assert!((200..300).contains(&get(&lane.frames)), "{lanes:?}");
            assert_eq!(get(&lane.longest), 1514, "{lanes:?}");
        }
    }
}

/// Pings from this thread's namespace. The kernel's counter shows that no reply was lost. `ping`
/// itself exits before the last reply if that takes much longer than the ones before.
fn ping_20(whom: &str) {
    let before = echo_replies();
    sh(&format!("ping -n -q -c 20 -i 0.05 {whom}"));
    eventually("the last reply", || echo_replies() >= before + 20);
    assert_eq!(echo_replies(), before + 20);
}

/// The number of echo replies that the kernel has counted in this thread's namespace.
fn echo_replies() -> u64 {
    let read =
        |name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).expect("counters");
    let v4 = read("snmp");
    let mut lines = v4.lines().filter(|line| line.starts_with("Icmp: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut pairs = names.split(' ').zip(values.split(' '));
    let v4 = pairs.find(|(name, _)| *name == "InEchoReps").expect("it is counted").1;
    let v6 = read("snmp6");
    let v6 = word_after(&v6, "Icmp6InEchoReplies").unwrap_or("0"); // or no IPv6
    [v4, v6].map(|n| n.parse::<u64>().expect("a number")).iter().sum()
}

/// Goal: of many datagrams, none is lost, doubled or overtaken, and the sender, the receiver, both
/// rings and both kernels count the same. Method: fewer datagrams under way than any queue holds.
fn datagrams(engine: TapEngine) {
    let count = scaled(if engine == TapEngine::Plain { 200_000 } else { 1_000_000 });
    let world = World::with_address(Plan { way: Way::Shared, ..Plan::of(engine) });
    let at_a = UdpSocket::bind((HOST, PORT)).expect("a socket");
    let at_b = world.b.run(|| UdpSocket::bind((GUEST, PORT)).expect("a socket"));
    at_a.connect((GUEST, PORT)).expect("a way to the guest");
    at_b.connect((HOST, PORT)).expect("a way to the host");
    let start = Instant::now();
    for (from, to) in [(&at_a, &at_b), (&at_b, &at_a)] {
        stage("datagrams");
        let received = AtomicU64::new(0);
        thread::scope(|scope| {
            scope.spawn(|| send(from, count, &received));
            receive(to, count, &received);
        });
    }
    let rate = 2.0 * count as f64 / start.elapsed().as_secs_f64();
    eprintln!("{engine}: {rate:.0} datagrams a second");
    // ARP may still be under way.
    let lanes = world.relay.lanes.clone();
    eventually("both kernels and the relay count the same", || {
        let frames = lanes.each_ref().map(|lane| get(&lane.frames));
        let a = kernel_counts("a0");
        let b = world.b.run(|| kernel_counts("b0"));
        [a.sent, b.received] == [frames[0]; 2] && [b.sent, a.received] == [frames[1]; 2]
    });
    for counts in [kernel_counts("a0"), world.b.run(|| kernel_counts("b0"))] {
        assert_eq!(counts.dropped, 0);
    }
    world.end();
    for lane in &*lanes {
        assert_eq!(get(&lane.counted), count, "{lanes:?}");
        assert_eq!((get(&lane.down), get(&lane.refused)), (0, 0));
    }
}

pub(crate) const PAYLOAD: usize = 60;
const WINDOW: u64 = 128;

pub(crate) fn payload(number: u64) -> [u8; PAYLOAD] {
    let mut bytes = [number as u8; PAYLOAD];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn send(socket: &UdpSocket, count: u64, received: &AtomicU64) {
    for number in 0..count {
        let start = Instant::now();
        while number - received.load(Ordering::Acquire) >= WINDOW {
            if start.elapsed() > Duration::from_secs(20) {
                return; // the receiver reports what is missing
            }
            thread::yield_now();
        }
        assert_eq!(socket.send(&payload(number)).expect("it is sent"), PAYLOAD);
    }
}

/// Like `UdpSocket::recv_from`, but goes on if it is interrupted. An io_uring that was closed
/// interrupts, a little later, a wait with a timeout of the thread that had it.
fn recv_from(socket: &UdpSocket, bytes: &mut [u8]) -> std::io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

fn receive(socket: &UdpSocket, count: u64, received: &AtomicU64) {
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let mut bytes = [0; 2048];
    for number in 0..count {
        let len = recv_from(socket, &mut bytes).map(|(len, _)| len);
        let len = len.unwrap_or_else(|error| panic!("datagram {number} of {count}: {error}"));
        assert_eq!(bytes[..len], payload(number), "datagram {number}");
        received.store(number + 1, Ordering::Release);
    }
}

/// What the kernel has counted on an interface of this thread's namespace.
#[derive(Debug)]
pub(crate) struct KernelCounts {
    pub(crate) received: u64,
    pub(crate) sent: u64,
    dropped: u64,
}

pub(crate) fn kernel_counts(interface: &str) -> KernelCounts {
    let all = std::fs::read_to_string("/proc/thread-self/net/dev").expect("counters");
    let line = all.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let line = line.expect("the interface is there");
    let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    KernelCounts {
        received: fields[1],
        sent: fields[9],
        dropped: fields[2] + fields[3] + fields[10] + fields[11],
    }
}

/// A program in the background, until it is dropped.
struct Background(Child);

impl Background {
    /// In the namespace of this thread, for a minute at most.
    fn start(program: &str, arguments: &[&str]) -> Self {
        let seconds = LONG.as_secs().to_string();
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", &seconds, program]).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().expect("it starts"))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // `timeout` passes the signal on.
        // SAFETY: `kill` takes no pointer. The process is a child that was not waited for, so its
        // number was not reused.
        unsafe { libc::kill(self.0.id() as i32, libc::SIGTERM) };
        let _ = self.0.wait();
    }
}

/// Whether a socket in this thread's namespace listens on the TCP port.
fn listens(port: u16) -> bool {
    ["tcp", "tcp6"].into_iter().any(|family| {
        let path = format!("/proc/thread-self/net/{family}");
        let all = std::fs::read_to_string(path).unwrap_or_default();
        all.lines().any(|line| line.contains(&format!(":{port:04X} ")) && line.contains(" 0A "))
    })
}

/// Checks what the relay has seen: packets longer than the wire's limit if segmentation is
/// offloaded, and none otherwise.
fn check_longest(lanes: &[Lane; 2], offload: bool, mtu: u32) {
    for lane in lanes {
        let (longest, wire) = (get(&lane.longest), u64::from(mtu) + 14);
        if offload {
            assert!(longest > wire && longest <= 65_549, "{lanes:?}");
        } else {
            assert_eq!(longest, wire, "{lanes:?}");
        }
        assert_eq!((get(&lane.down), get(&lane.refused)), (0, 0), "{lanes:?}");
    }
}

/// Goal: iperf3 moves data in both directions. With segmentation offload, some packets are longer
/// than the MTU; without it, none is.
fn iperf(engine: TapEngine) {
    if !has("iperf3") {
        return;
    }
    for offload in [false, true] {
        let world = World::with_address(Plan { offload, ..Plan::of(engine) });
        for (name, way) in [("to the guest", ""), ("to the host", "-R")] {
            let server = world.b.run(|| Background::start("iperf3", &["-s", "-1"]));
            eventually("iperf3 listens", || world.b.run(|| listens(5201)));
            let said = sh(&format!("iperf3 -c {GUEST} -J -t 2 --connect-timeout 5000 {way}"));
            drop(server);
            let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
            let rate = said["end"]["sum_received"]["bits_per_second"].as_f64();
            let rate = rate.unwrap_or_else(|| panic!("{said}"));
            assert!(rate > 0.0, "{said}");
            let gigabits = rate / 1e9;
            eprintln!("{engine}, offload {offload}, TCP {name}: {gigabits:.2} Gbit/s");
        }
        check_longest(&world.end(), offload, 1500);
    }
}

/// Goal: megabytes that are sent in both directions of one TCP connection at the same time arrive
/// unchanged, with and without offload, with small and large packets.
fn streams(engine: TapEngine) {
    let bytes = scaled(64 << 20);
    for (offload, mtu) in [(false, 1500), (true, 1500), (false, 9000), (true, 9000)] {
        let world = World::with_address(Plan { offload, mtu, ..Plan::of(engine) });
        let listener = TcpListener::bind((HOST, 0)).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let connect = move || TcpStream::connect_timeout(&address, LONG).expect("a connection");
        let at_b = world.b.run(connect);
        let (at_a, _) = listener.accept().expect("it is there");
        stage(format!("TCP both ways, offload {offload}, MTU {mtu}"));
        let start = Instant::now();
        exchange(&at_a, &at_b, bytes);
        let rate = 16.0 * bytes as f64 / start.elapsed().as_secs_f64() / 1e9;
        eprintln!("{engine}, offload {offload}, MTU {mtu}: {rate:.2} Gbit/s both ways together");
        drop((at_a, at_b));
        check_longest(&world.end(), offload, mtu);
    }
}

/// Both ends send `bytes` bytes at the same time and check what they receive.
fn exchange(one: &TcpStream, other: &TcpStream, bytes: u64) {
    for end in [one, other] {
        end.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        end.set_write_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    }
    thread::scope(|scope| {
        for (seed, from, to) in [(1, one, other), (2, other, one)] {
            scope.spawn(move || speak(from, seed, bytes));
            scope.spawn(move || listen(to, seed, bytes));
        }
    });
}

pub(crate) const CHUNK: usize = 65_536;

/// Bytes of a pseudo-random stream (splitmix64), beginning at a multiple of [`CHUNK`].
pub(crate) fn chunk(seed: u64, at: u64, into: &mut [u8]) {
    for (i, word) in into.chunks_mut(8).enumerate() {
        let mut z = ((seed << 48) ^ (at / 8 + i as u64)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..word.len()]);
    }
}

fn pieces(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..bytes).step_by(CHUNK).map(move |at| (at, CHUNK.min((bytes - at) as usize)))
}

fn speak(mut to: &TcpStream, seed: u64, bytes: u64) {
    let mut piece = vec![0; CHUNK];
    for (at, len) in pieces(bytes) {
        chunk(seed, at, &mut piece[..len]);
        to.write_all(&piece[..len]).unwrap_or_else(|error| panic!("at {at}: {error}"));
    }
}

fn listen(mut from: &TcpStream, seed: u64, bytes: u64) {
    let (mut piece, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    for (at, len) in pieces(bytes) {
        from.read_exact(&mut piece[..len]).unwrap_or_else(|error| panic!("at {at}: {error}"));
        chunk(seed, at, &mut expected[..len]);
        assert!(piece[..len] == expected[..len], "the stream differs at {at} or after it");
    }
}

/// A directory for a test's files, until it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let name = unique(&format!("vmring-{}", std::process::id()));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a directory");
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("a path").to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The word after `key`, without the surrounding text.
fn word_after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let rest = &text[text.find(key)? + key.len()..];
    rest.split(|c: char| c.is_whitespace() || c == ';').find(|word| !word.is_empty())
}

/// Goal: common DHCP clients get an address in the range from our server, and a router in shared
/// mode only. The server also answers a renewal that is sent over the kernel's UDP, whose checksum
/// is left to the device if the device has offload.
fn dhcp(engine: TapEngine) {
    let clients = [("busybox", udhcpc as fn(&Host) -> Answer), ("dhclient", dhclient)];
    let clients = clients.map(|(program, run)| has(program).then_some(run));
    for (mode, offload) in
        [(Mode::Host, false), (Mode::Shared, false), (Mode::Host, true), (Mode::Shared, true)]
    {
        let (net, router) = match mode {
            Mode::Shared => ([192, 168, 64], Some(Ipv4Addr::new(192, 168, 64, 1))),
            _ => ([192, 168, 128], None),
        };
        let server = Ipv4Addr::new(net[0], net[1], net[2], 1);
        let world = World::new(Plan { mode, offload, ..Plan::of(engine) });
        let said = world.b.sh("ip -oneline link show b0");
        let mac: MacAddr6 = word_after(&said, "link/ether ").expect("one").parse().expect("a MAC");
        assert_eq!(world.host.lease(mac), None);
        let mut before = None;
        for client in clients.iter().flatten() {
            let answer = client(&world.b);
            let octets = answer.address.octets();
            assert!(octets[..3] == net && (2..=254).contains(&octets[3]), "{answer:?}");
            assert_eq!((answer.router, answer.mtu), (router, 1500), "{answer:?}");
            assert_eq!(answer.server, server, "{answer:?}");
            let lease = world.host.lease(mac).expect("a lease");
            assert_eq!((lease.address, lease.duration.as_secs()), (answer.address, 86_400));
            // The same host gets the same address.
            assert_eq!(*before.get_or_insert(answer.address), answer.address);
        }
        let Some(address) = before else { return };
        world.b.sh(&format!("ip addr add {address}/24 dev b0"));
        renew(&world.b, mac, address, server);
        let counter = |name: &str| {
            let all = world.host.counters();
            all.into_iter().find(|(other, _)| *other == name).expect("a counter").1
        };
        let replies = 2 * clients.iter().flatten().count() as u64 + 1;
        let answers = counter("DHCP offers") + counter("DHCP acknowledgements");
        assert!(answers >= replies, "{:?}", world.host.counters());
        for name in ["DHCP malformed", "DHCP unsent", "DHCP out of addresses"] {
            assert_eq!(counter(name), 0, "{name}");
        }
        world.end();
    }
}

/// What the server told a client.
#[derive(Debug)]
struct Answer {
    address: Ipv4Addr,
    router: Option<Ipv4Addr>,
    server: Ipv4Addr,
    mtu: u32,
}

fn udhcpc(host: &Host) -> Answer {
    let files = Scratch::new();
    let script = files.path("script");
    // Let another process write the script. If this process wrote it, a child that another test has
    // just forked could hold it open for writing, and it could not be run.
    let told = r#"echo "address=$ip router=$router server=$serverid mtu=$mtu.""#;
    sh(&format!(
        "cat >{script} <<'END'\n#!/bin/sh\nif [ \"$1\" = bound ]; then {told}; fi\nEND\nchmod +x {script}"
    ));
    let said = host.sh(&format!("busybox udhcpc -i b0 -n -q -f -t 5 -T 1 -O mtu -s {script} 2>&1"));
    let field = |name: &str| {
        let rest = &said[said.find(name).unwrap_or_else(|| panic!("{said}")) + name.len()..];
        rest.split([' ', '\n']).next().unwrap_or_default().trim_end_matches('.').to_owned()
    };
    Answer {
        address: field("address=").parse().expect("an address"),
        router: field("router=").parse().ok(),
        server: field("server=").parse().expect("an address"),
        mtu: field("mtu=").parse().expect("a number"),
    }
}

fn dhclient(host: &Host) -> Answer {
    let files = Scratch::new();
    let [config, leases, pid] = ["config", "leases", "pid"].map(|name| files.path(name));
    let wishes = "timeout 30; request subnet-mask, routers, interface-mtu;";
    std::fs::write(&config, wishes).expect("a file");
    let arguments = [&*config, &leases, &pid].map(str::to_owned);
    let client = host.run(move || {
        let [config, leases, pid] = arguments.each_ref().map(String::as_str);
        let files = ["-sf", "/bin/true", "-cf", config, "-lf", leases, "-pf", pid];
        Background::start("dhclient", &[&["-4", "-d", "-q", "-1"], &files[..], &["b0"]].concat())
    });
    let mut said = String::new();
    eventually("dhclient has a lease", || {
        said = std::fs::read_to_string(&leases).unwrap_or_default();
        said.contains("fixed-address ") && said.ends_with("}\n")
    });
    drop(client);
    let address = |key| word_after(&said, key).map(|word| word.parse().expect("an address"));
    Answer {
        address: address("fixed-address ").expect("one"),
        router: address("option routers "),
        server: address("option dhcp-server-identifier ").expect("it says who it is"),
        mtu: word_after(&said, "option interface-mtu ").expect("one").parse().expect("a number"),
    }
}

/// Renews a lease over the kernel's UDP, which uses the offloads that the TAP announces.
fn renew(host: &Host, mac: MacAddr6, address: Ipv4Addr, server: Ipv4Addr) {
    stage("renewing the lease");
    let socket = host.run(|| {
        let mut socket = None;
        // A program that dhclient has started has its socket for a moment longer.
        eventually("the port is free", || {
            let bound = UdpSocket::bind("0.0.0.0:68");
            let taken = |error: &std::io::Error| assert_eq!(error.kind(), ErrorKind::AddrInUse);
            socket = bound.inspect_err(taken).ok();
            socket.is_some()
        });
        socket.expect("a socket")
    });
    let mut request = vec![0; 240];
    request[..8].copy_from_slice(&[1, 1, 6, 0, 1, 2, 3, 4]);
    request[12..16].copy_from_slice(&address.octets());
    request[28..34].copy_from_slice(mac.as_bytes());
    request[236..].copy_from_slice(&[99, 130, 83, 99]);
    request.extend([53, 1, 3, 255]);
    request.resize(300, 0);
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    socket.send_to(&request, (server, 67)).expect("it is sent");
    let mut reply = [0; 1500];
    let (len, from) = recv_from(&socket, &mut reply).expect("an answer");
    assert!(len > 243, "{len}");
    assert_eq!(from.ip(), IpAddr::V4(server));
    assert_eq!((reply[0], &reply[4..8]), (2, &[1, 2, 3, 4][..]));
    assert_eq!(reply[16..20], address.octets());
    assert_eq!(reply[240..243], [53, 1, 5], "an acknowledgement");
}

/// Goal: in shared mode the guest reaches a network that has no route to the guest's network,
/// because it appears under the host's address. Afterwards the host's rules and forwarding are as
/// before.
fn way_out(engine: TapEngine) {
    const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
    let c = Host::new();
    sh("ip link add v0 type veth peer name v1");
    c.give("v1");
    sh("ip addr add 10.9.0.1/24 dev v0 && ip link set v0 up");
    c.sh("ip addr add 10.9.0.2/24 dev v1 && ip link set v1 up");
    let listener = c.run(|| TcpListener::bind("10.9.0.2:7").expect("a listener"));
    for (offload, forwarding) in [(false, "0"), (true, "1")] {
        std::fs::write(FORWARD, forwarding).expect("a setting");
        let world = World::new(Plan { mode: Mode::Shared, offload, ..Plan::of(engine) });
        world.b.sh("ip addr add 192.168.64.2/24 dev b0 && ip route add default via 192.168.64.1");
        assert!(c.run(|| try_sh("ip route get 192.168.64.2")).is_err(), "there is a way back");
        if has("ping") {
            world.b.run(|| ping_20("10.9.0.2"));
        }
        let at_b = world.b.run(|| {
            let address = "10.9.0.2:7".parse().expect("an address");
            TcpStream::connect_timeout(&address, LONG).expect("a connection")
        });
        let (at_c, peer) = listener.accept().expect("it is there");
        assert_eq!(peer.ip(), IpAddr::from([10, 9, 0, 1]));
        stage("TCP with the outside");
        exchange(&at_b, &at_c, scaled(4 << 20));
        drop((at_b, at_c));
        let nft = has("nft");
        if nft {
            assert!(sh("nft list ruleset").contains("vmring_a0"));
        }
        assert_eq!(std::fs::read_to_string(FORWARD).expect("a setting"), "1\n");
        check_longest(&world.end(), offload, 1500);
        if nft {
            assert_eq!(sh("nft list ruleset"), "");
        }
        let after = std::fs::read_to_string(FORWARD).expect("a setting");
        assert_eq!(after.trim(), forwarding);
    }
}

/// Goal: two hosts' bridges with a kernel VXLAN between them carry frames from a ring on one host
/// to a ring on the other: every frame, in order, of any length, both ways.
fn bridged_over_vxlan(engine: TapEngine) {
    let probe = try_sh("ip link add vx0 type vxlan id 42 dstport 4789 remote 10.1.0.2");
    if let Err(said) = probe {
        return skip(&format!("no VXLAN: {}", said.trim()));
    }
    sh("ip link del vx0");
    let far = Host::new();
    sh("ip link add u0 type veth peer name u1");
    far.give("u1");
    let lan = |mine: &str, others: &str, wire: &str| {
        format!(
            "ip addr add {mine}/24 dev {wire} && ip link set {wire} up && \
             ip link add br0 type bridge mcast_snooping 0 && ip link set br0 up && \
             ip link add vx0 type vxlan id 42 local {mine} remote {others} dstport 4789 \
             dev {wire} && ip link set vx0 master br0 up"
        )
    };
    sh(&lan("10.1.0.1", "10.1.0.2", "u0"));
    far.sh(&lan("10.1.0.2", "10.1.0.1", "u1"));
    let plan = move || Plan { mode: Mode::Bridged("br0".into()), mtu: 1400, ..Plan::of(engine) };
    let near = plan().interface(Tap::named("t0"));
    let there = far.run(move || plan().interface(Tap::named("t1")));
    let ends = [near, there];
    let macs = ends.each_ref().map(|end| end.mac().into_array());
    let mut rings = ends.each_ref().map(|end| {
        let mut ring = end.ring(Direction::Both).depth(64).build().expect("a ring");
        for _ in 0..64 {
            let frame = ring.alloc().expect("a frame");
            ring.submit_read(frame, 0).expect("a credit");
        }
        ring
    });
    let [near, there] = &mut rings;
    for _ in 0..2 {
        carry((near, macs[0]), (there, macs[1]), 1000);
        carry((there, macs[1]), (near, macs[0]), 1000);
    }
    for mut ring in rings {
        ring.cancel_and_wait(LONG).expect("it lets go");
        let stats = ring.stats();
        assert_eq!((stats.errors, stats.exhausted), (0, 0), "{stats:?}");
        ring.close().expect("it closes");
    }
    for end in ends {
        assert!(end.drops().iter().all(|(_, n)| *n == 0), "{:?}", end.drops());
        end.stop(LONG).expect("it stops");
    }
}

/// Writes `count` packets to one ring and receives them from the other.
fn carry((from, source): (&mut Ring, [u8; 6]), (to, target): (&mut Ring, [u8; 6]), count: u64) {
    /// The number of trial packets. Until the first one arrives, the bridges and the tunnel may not
    /// be up.
    const TRIAL: u64 = u64::MAX;
    let packet = |number: u64| {
        packet_between(source, target, number, 60 + (number.wrapping_mul(331) % 1355) as usize)
    };
    let write = |ring: &mut Ring, number: u64| {
        for done in ring.reap() {
            match done.op {
                RingOp::Write => assert!(done.result.is_ok(), "{done:?}"),
                _ => panic!("nobody writes to this side: {done:?}"),
            }
        }
        let mut frame = ring.alloc().expect("fewer are under way than there are");
        frame.copy_from(&packet(number)).expect("it fits");
        ring.submit_write(frame, number).expect("a credit");
    };
    let (start, mut tried) = (Instant::now(), None::<Instant>);
    let (mut open, mut sent, mut received) = (false, 0, 0);
    stage("frames through the tunnel");
    while received < count {
        assert!(start.elapsed() < LONG, "{received} of {count} came, {sent} were sent");
        if !open && tried.is_none_or(|last| last.elapsed() > Duration::from_millis(200)) {
            tried = Some(Instant::now());
            write(from, TRIAL);
        }
        while open && sent < count && sent - received < 32 {
            write(from, sent);
            sent += 1;
        }
        to.wait(1, Some(Duration::from_millis(10)));
        let (mut sq, mut cq) = to.split();
        for done in cq.reap() {
            if done.op == RingOp::Write {
                continue; // a write of the other direction, carried before
            }
            let frame = done.take_packet().expect("a packet");
            if frame[12..14] == [0x88, 0xb5] {
                match number_of(&frame) {
                    TRIAL => open = true,
                    number => {
                        assert_eq!(number, received, "in order, and none is missing");
                        assert!(frame[..] == packet(number)[..], "packet {number} differs");
                        received += 1;
                    }
                }
            }
            let mut frame = frame;
            frame.reset();
            sq.submit_read(frame, 0).expect("its credit came back");
        }
    }
    from.wait(1, Some(Duration::from_millis(1)));
    for done in from.reap() {
        assert!(done.op == RingOp::Write && done.result.is_ok(), "{done:?}");
    }
}

/// Goal: while the host's end is down, the guest's packets are refused with `EIO` and
/// none is kept. The rings stay open, and traffic resumes by itself when the link is up again.
fn link_down_and_up(engine: TapEngine) {
    for way in [Way::Thread, Way::Shared] {
        let world = World::with_address(Plan { way, ..Plan::of(engine) });
        // With a permanent neighbour entry, the guest keeps sending while the host does not answer
        // ARP.
        let said = sh("ip -oneline link show a0");
        let mac = word_after(&said, "link/ether ").expect("one");
        world.b.sh(&format!("ip neigh replace {HOST} lladdr {mac} dev b0 nud permanent"));
        let at_a = UdpSocket::bind((HOST, PORT)).expect("a socket");
        let at_b = world.b.run(|| UdpSocket::bind((GUEST, PORT)).expect("a socket"));
        at_a.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        at_b.connect((HOST, PORT)).expect("a way to the host");
        let (received, done) = (AtomicU64::new(0), AtomicBool::new(false));
        let lane = &world.relay.lanes[1];
        // The number of datagrams that were sent.
        let sent = thread::scope(|scope| {
            let _done = SetAtEnd(&done);
            let sender = scope.spawn(|| {
                let mut sent = 0;
                while !done.load(Ordering::Acquire) {
                    // A relay that is stopped finds all of them in the TAP's queue.
                    if sent < get(&lane.counted) + WINDOW {
                        sent += u64::from(at_b.send(&payload(sent)).is_ok());
                    }
                    thread::sleep(Duration::from_micros(100));
                }
                sent
            });
            scope.spawn(|| {
                let mut bytes = [0; 2048];
                while !done.load(Ordering::Acquire) {
                    if at_a.recv(&mut bytes).is_ok() {
                        add(&received);
                    }
                }
            });
            for _ in 0..3 {
                let before = get(&received);
                eventually("traffic", || get(&received) >= before + 200);
                let before = get(&lane.down);
                sh("ip link set a0 down");
                eventually("refusals", || get(&lane.down) >= before + 200);
                // Nothing arrives through a link that is down.
                let before = kernel_counts("a0").received;
                thread::sleep(Duration::from_millis(20));
                assert_eq!(kernel_counts("a0").received, before);
                sh("ip link set a0 up");
            }
            let before = get(&received);
            eventually("traffic after the last time", || get(&received) >= before + 200);
            done.store(true, Ordering::Release);
            sender.join().expect("the sender")
        });
        eventually("the relay has all", || get(&lane.counted) >= sent);
        let lanes = world.end();
        let lane = &lanes[1];
        assert_eq!((get(&lane.counted), get(&lane.refused)), (sent, 0), "{lanes:?}");
        assert_eq!((get(&lanes[0].down), get(&lanes[0].refused)), (0, 0), "{lanes:?}");
        // The receiving thread stopped reading a little earlier.
        let arrived = get(&lane.frames) - get(&lane.down);
        assert!(get(&received) <= arrived, "{} {lanes:?}", get(&received));
    }
}

pub(crate) struct SetAtEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn too_big(interface: &Interface) -> u64 {
    let drops = interface.drops();
    assert!(drops.iter().all(|(name, n)| *name == "too big" || *n == 0), "{drops:?}");
    drops.into_iter().find(|(name, _)| *name == "too big").expect("it counts them").1
}

/// Goal: if the operator raises the host's MTU under a running interface, longer packets are
/// dropped and counted, and nothing else is lost.
fn mtu_raised(engine: TapEngine) {
    let world = World::with_address(Plan::of(engine));
    sh("ip link set a0 mtu 9000");
    let at_a = UdpSocket::bind((HOST, PORT)).expect("a socket");
    let at_b = world.b.run(|| UdpSocket::bind((GUEST, PORT)).expect("a socket"));
    at_b.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    at_a.connect((GUEST, PORT)).expect("a way to the guest");
    let mut bytes = [0; 9000];
    for round in 0..50 {
        // The packets fit, are one byte too long, fit only the slot, or do not even fit that.
        for len in [1472, 1473, 1550, 4000, 8972, 1] {
            bytes[..len].fill(round);
            assert_eq!(at_a.send(&bytes[..len]).expect("it is sent"), len);
        }
        for expected in [1472, 1] {
            let len = recv_from(&at_b, &mut bytes).expect("what fits arrives").0;
            assert_eq!(len, expected);
            assert!(bytes[..len].iter().all(|byte| *byte == round));
        }
        assert_eq!(too_big(&world.host), 4 * (u64::from(round) + 1));
    }
    assert_eq!(too_big(&world.guest), 0);
    // With the old MTU, everything works as before.
    sh("ip link set a0 mtu 1500");
    at_a.send(&bytes[..4000]).expect("it is sent, in fragments");
    assert_eq!(recv_from(&at_b, &mut bytes).expect("fragments arrive").0, 4000);
    assert_eq!(too_big(&world.host), 200);
    let lanes = world.end();
    assert_eq!(get(&lanes[0].longest), 1514, "{lanes:?}");
}

/// Goal: a packet longer than its slot is dropped, and not delivered truncated, even if the slots
/// hold no byte more than the longest packet.
fn cut_at_the_end_of_the_slot(engine: TapEngine) {
    exact_slots(engine, false);
}

/// Goal: like `cut_at_the_end_of_the_slot`, for a packet with a VLAN tag.
fn cut_behind_a_vlan_tag(engine: TapEngine) {
    exact_slots(engine, true);
}

fn exact_slots(engine: TapEngine, tagged: bool) {
    let host = Plan::of(engine).interface(Tap::named("a0"));
    // 18 bytes of headroom and 1518 bytes of packet make 12 * 128 bytes.
    let mut ring = host.ring(Direction::Read).headroom(18).build().expect("a ring");
    assert_eq!(ring.pools()[0].capacity(), 1518);
    for number in 0..64 {
        let frame = ring.alloc().expect("a frame");
        ring.submit_read(frame, number).expect("a credit");
    }
    sh("ip link set a0 mtu 9000");
    // One fits, one is one byte too long, one is much too long. When the last one arrives, all
    // others have been handled.
    let longest = if tagged { 1518 } else { 1514 };
    for len in [longest, longest + 1, 8000, 43] {
        send_frame("a0", &ipv4_frame(len, tagged));
    }
    let (mut lengths, mut numbers) = (Vec::new(), Vec::new());
    while lengths.last() != Some(&43) {
        assert!(ring.wait(1, Some(Duration::from_secs(20))) > 0, "{lengths:?}");
        for done in ring.reap() {
            numbers.push(done.user_data);
            lengths.push(done.take_packet().expect("a packet").len());
        }
    }
    assert_eq!((&lengths[..], too_big(&host)), (&[longest, 43][..], 2));
    assert_eq!(numbers, [0, 1], "the read that was posted first completes first");
    ring.close().expect("it closes");
    host.restart(LONG).expect("it starts again");
    assert_eq!(too_big(&host), 2, "a restart forgets nothing");
    host.stop(LONG).expect("it stops");
    assert_eq!(too_big(&host), 2, "nor does a stop");
}

/// Goal: starting and stopping an interface leaves nothing behind that interrupts the caller's
/// later system calls, as a signal would.
fn a_start_interrupts_nothing(engine: TapEngine) {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    for round in 0..10 {
        let host = Plan::of(engine).interface(Tap::named("a0"));
        for when in ["started", "stopped"] {
            let error = socket.recv(&mut [0; 16]).expect_err("nobody sends");
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "{when}, round {round}");
            if when == "started" {
                host.stop(LONG).expect("it stops");
            }
        }
        drop(host);
        gone("a0");
    }
}

/// An Ethernet frame of length `len`, with an IPv4 packet whose header has the matching length.
fn ipv4_frame(len: usize, tagged: bool) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    if tagged {
        frame.extend([0x81, 0x00, 0, 7]);
    }
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend(((len + 2 - frame.len()) as u16).to_be_bytes());
    frame.resize(len, 0);
    frame
}

/// Sends a frame unchanged on an interface of this thread's namespace.
fn send_frame(interface: &str, frame: &[u8]) {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the system has just returned this descriptor, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeroes are a valid `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as libc::c_ushort;
    to.sll_ifindex = index_of(interface) as i32;
    // SAFETY: frame and address have these lengths and live through the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
}
