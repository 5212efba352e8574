//! Between the first packet and the millionth nothing is allocated and nothing is freed: not by the
//! caller, not by the poller's threads, not by the device.
//!
//! This is a program of its own because the counting allocator serves the whole program. It does
//! without the test harness because the harness has threads that allocate at any time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr};
use vmring::device::embedded::nat::{HostPort, NatSettings, Protocol};
use vmring::device::{Capabilities, Device, PollContext, Progress, Queue, QueueConfig, Wake};
use vmring::{
    Direction, Drive, Driver, Embedded, Error, IdlePolicy, Interface, InterfaceConfig,
    InterfaceInfo, Loopback, MacAddr6, Poller, RetryPolicy, Ring, RingOp, Socket, Status,
};

struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
/// Allocations, frees and reallocations, counted over all threads.
static COUNTS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

thread_local! {
    /// Whether this thread captures its stack, which allocates.
    static CAPTURES: Cell<bool> = const { Cell::new(false) };
}

fn count(what: usize, layout: Layout) {
    if !COUNTING.load(Ordering::Relaxed) || CAPTURES.get() {
        return;
    }
    if COUNTS[what].fetch_add(1, Ordering::Relaxed) == 0 {
        // Print the stack of the first call only. This takes long, so the next attempt may have begun.
        CAPTURES.set(true);
        let thread = std::thread::current().name().unwrap_or("?").to_owned();
        let stack = std::backtrace::Backtrace::force_capture();
        eprintln!("{} bytes, thread {thread}:\n{stack}", layout.size());
        drop((thread, stack));
        CAPTURES.set(false);
    }
}

// SAFETY: every call goes to the system's allocator unchanged, so its guarantees hold here.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(0, layout);
        // SAFETY: the caller of `alloc` keeps its contract, which is that of `System.alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(1, layout);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(2, layout);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A test that reaches this hangs.
const LONG: Duration = Duration::from_secs(60);
const BATCH: u64 = 32;

fn packets() -> u64 {
    let small = std::env::var_os("VMRING_TEST_SCALE").is_some_and(|scale| scale == "small");
    if small { 20_000 } else { 1_000_000 }
}

/// Calls `turn`, which returns the number of packets it saw, until `n` packets have come.
fn until(what: &str, n: u64, turn: &mut dyn FnMut() -> u64) {
    let (mut seen, mut last) = (0, Instant::now());
    while seen < n {
        match turn() {
            0 => assert!(last.elapsed() < LONG, "{what}: hangs after {seen} packets"),
            packets => {
                seen += packets;
                last = Instant::now();
            }
        }
    }
}

fn nothing_is_allocated(what: &str, packets: u64, mut turn: impl FnMut() -> u64) {
    // Warm up: lists grow to their size, threads start, lazy statics are initialised.
    until(what, 5_000, &mut turn);
    let mut counted = (0, 0, 0);
    // Two attempts, because a thread that has just ended may still free something of its own.
    for _ in 0..2 {
        let start = Instant::now();
        COUNTS.iter().for_each(|count| count.store(0, Ordering::SeqCst));
        COUNTING.store(true, Ordering::SeqCst);
        until(what, packets, &mut turn);
        COUNTING.store(false, Ordering::SeqCst);
        let [allocated, freed, moved] = COUNTS.each_ref().map(|count| count.load(Ordering::SeqCst));
        let took = start.elapsed();
        println!("{what}: {allocated} allocations, {freed} frees in {packets} packets, {took:.1?}");
        counted = (allocated, freed, moved);
        if counted == (0, 0, 0) {
            return;
        }
    }
    panic!("{what}: {counted:?}");
}

fn ring(interface: &Interface, drive: Drive<'_>) -> Ring {
    // The thread of the peer may not run for a while.
    let retry = RetryPolicy { attempts: 1_000_000, delay: Duration::from_micros(50) };
    interface.ring(Direction::Both).drive(drive).retry(retry).build().expect("a ring")
}

fn fill(ring: &mut Ring, packet: &[u8]) {
    for i in 0..BATCH {
        let frame = ring.alloc().expect("a fresh ring");
        ring.submit_read(frame, i).expect("a fresh ring");
        let mut frame = ring.alloc().expect("a fresh ring");
        frame.copy_from(packet).expect("it fits");
        ring.submit_write(frame, i).expect("a fresh ring");
    }
}

/// Reaps all completions and submits their frames again. Returns the number of packets read.
fn turn(ring: &mut Ring, patience: Duration) -> u64 {
    ring.wait(1, Some(patience));
    let (mut sq, mut cq) = ring.split();
    let mut read = 0;
    for done in cq.reap() {
        let frame = done.take_packet().expect("it succeeds");
        match done.op {
            RingOp::Read => {
                read += 1;
                sq.submit_read(frame, done.user_data)
            }
            _ => sq.submit_write(frame, done.user_data),
        }
        .expect("its credit just came back");
    }
    read
}

fn loopback(what: &str, packets: u64, drive: Drive<'_>) {
    let interface = Interface::builder().device(Loopback::new(1500)).start().expect("it starts");
    let mut ring = ring(&interface, drive);
    fill(&mut ring, &[0x5a; 60]);
    nothing_is_allocated(what, packets, || turn(&mut ring, Duration::from_secs(1)));
}

/// Two interfaces that send to each other.
fn embedded(what: &str, packets: u64, drive: Drive<'_>) {
    let join = || {
        // No router advertisement is among the packets.
        let driver = Embedded::network(what).no_ipv6();
        Interface::builder().device(driver).start().expect("a port")
    };
    between(what, packets, drive, (join(), join()));
}

/// Two interfaces at the ends of a socket pair.
fn wire(what: &str, packets: u64, drive: Drive<'_>, driver: fn() -> Socket, ends: [OwnedFd; 2]) {
    let [a, b] =
        ends.map(|end| Interface::builder().device(driver().from_fd(end)).start().expect("a wire"));
    between(what, packets, drive, (a, b));
}

fn between(what: &str, packets: u64, drive: Drive<'_>, (a, b): (Interface, Interface)) {
    let packet = |from: &Interface, to: &Interface| {
        let mut packet = [0x5a; 60];
        packet[..6].copy_from_slice(to.mac().as_bytes());
        packet[6..12].copy_from_slice(from.mac().as_bytes());
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        packet
    };
    let (mut first, mut second) = (ring(&a, drive), ring(&b, drive));
    fill(&mut first, &packet(&a, &b));
    fill(&mut second, &packet(&b, &a));
    nothing_is_allocated(what, packets, || {
        // A write completes even if its packet is dropped, so another completion always comes.
        turn(&mut first, Duration::from_millis(5)) + turn(&mut second, Duration::from_millis(5))
    });
}

/// Sends as fast as credits come back, and wants no completion.
fn skipping(what: &str, packets: u64, drive: Drive<'_>) {
    let interface =
        Interface::builder().device(Embedded::network(what).no_ipv6()).start().expect("a port");
    let mut ring = interface.ring(Direction::Write).drive(drive).build().expect("a ring");
    let mut packet = [0x5a; 60];
    packet[..6].fill(0xff);
    nothing_is_allocated(what, packets, || {
        let (mut sq, _) = ring.split();
        let mut sent = 0;
        while let Some(mut frame) = sq.alloc() {
            frame.copy_from(&packet).expect("it fits");
            if sq.submit_write_skip_success(frame, 0).is_err() {
                break;
            }
            sent += 1;
        }
        assert_eq!(ring.wait(1, Some(LONG)), 0, "{what}: a write completes");
        sent
    });
}

/// Sends one packet at a time, so that both sides sleep before each packet. Parking and waking must
/// not allocate either.
fn one_at_a_time(what: &str, packets: u64, driver: impl Driver, drive: Drive<'_>) {
    let interface = Interface::builder().device(driver).start().expect("it starts");
    let builder = interface.ring(Direction::Both).drive(drive).idle(IdlePolicy::PARK);
    let mut ring = builder.build().expect("a ring");
    let mut read = ring.alloc();
    let mut write = ring.alloc();
    write.as_mut().expect("a fresh ring").copy_from(&[1; 60]).expect("it fits");
    nothing_is_allocated(what, packets, || {
        ring.submit_read(read.take().expect("it came back"), 0).expect("nothing is in flight");
        ring.submit_write(write.take().expect("it came back"), 1).expect("as above");
        while read.is_none() || write.is_none() {
            assert!(ring.wait(1, Some(LONG)) > 0, "{what}: hangs");
            for done in ring.reap() {
                let frame = done.take_packet().expect("a loop succeeds");
                let place = if done.op == RingOp::Read { &mut read } else { &mut write };
                *place = Some(frame);
            }
        }
        1
    });
}

/// Sends to a server of the host through the network's way out, as fast as credits come back. Neither the
/// ring's thread nor the translator's allocates, whether it takes a packet or has no place for it.
fn outside(what: &str, packets: u64, drive: Drive<'_>) {
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = server.local_addr().expect("an address").port();
    let settings = NatSettings::new().host_port(HostPort { port, protocol: Protocol::Udp });
    let driver = Embedded::network(what).nat(settings);
    let interface = Interface::builder().device(driver).start().expect("a port");
    let packet = datagram(&interface, port);
    let mut ring = interface.ring(Direction::Write).drive(drive).build().expect("a ring");
    nothing_is_allocated(what, packets, || {
        let (mut sq, _) = ring.split();
        let mut sent = 0;
        while let Some(mut frame) = sq.alloc() {
            frame.copy_from(&packet).expect("it fits");
            if sq.submit_write_skip_success(frame, 0).is_err() {
                break;
            }
            sent += 1;
        }
        assert_eq!(ring.wait(1, Some(LONG)), 0, "{what}: a write completes");
        sent
    });
    drop(ring);
    let counters = interface.counters();
    let counter = |name| counters.iter().find(|(other, _)| *other == name).map(|(_, count)| *count);
    assert!(counter("NAT UDP sent") > Some(0), "{what}: nothing went out");
}

/// A frame with a datagram to a port of the gateway's address.
fn datagram(interface: &Interface, port: u16) -> Vec<u8> {
    let mut gateway = [0; 6];
    let mut ring = interface.ring(Direction::Both).build().expect("a ring");
    let read = ring.alloc().expect("a fresh ring");
    ring.submit_read(read, 0).expect("a fresh ring");
    // An ARP request (RFC 826) from nobody: no address is learned.
    let mut arp = Vec::from([0xff; 6]);
    arp.extend(interface.mac().as_bytes());
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(interface.mac().as_bytes());
    arp.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 192, 168, 64, 1]);
    let mut frame = ring.alloc().expect("a fresh ring");
    frame.copy_from(&arp).expect("it fits");
    ring.submit_write(frame, 1).expect("a fresh ring");
    until("the gateway answers", 1, &mut || {
        ring.wait(1, Some(LONG));
        let mut answered = 0;
        for done in ring.reap() {
            let is_read = done.op == RingOp::Read;
            let frame = done.take_packet().expect("it succeeds");
            if is_read {
                gateway.copy_from_slice(&frame[6..12]);
                answered = 1;
            }
        }
        answered
    });
    let udp = UdpRepr { src_port: 4000, dst_port: port };
    let (src_addr, dst_addr) = (Ipv4Addr::new(192, 168, 64, 9), Ipv4Addr::new(192, 168, 64, 1));
    let payload_len = udp.header_len() + 18;
    let ip =
        Ipv4Repr { src_addr, dst_addr, next_header: IpProtocol::Udp, payload_len, hop_limit: 64 };
    let mut frame = vec![0; 14 + ip.buffer_len() + payload_len];
    frame[..6].copy_from_slice(&gateway);
    frame[6..12].copy_from_slice(interface.mac().as_bytes());
    frame[12..14].copy_from_slice(&[8, 0]);
    let checksums = ChecksumCapabilities::default();
    let mut out = Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.emit(&mut out, &checksums);
    let mut out = UdpPacket::new_unchecked(out.payload_mut());
    udp.emit(&mut out, &src_addr.into(), &dst_addr.into(), 18, |_| (), &checksums);
    frame
}

/// A device driven by a descriptor: a socket, with a thread that echoes at the other end.
struct Echo {
    socket: UnixDatagram,
    info: Option<InterfaceInfo>,
}

impl Echo {
    fn new() -> Self {
        let (socket, other) = UnixDatagram::pair().expect("two sockets");
        socket.set_nonblocking(true).expect("a socket can");
        thread::spawn(move || {
            let mut packet = [0; 1514];
            while let Ok(len @ 1..) = other.recv(&mut packet) {
                if other.send(&packet[..len]).is_err() {
                    break;
                }
            }
        });
        Self { socket, info: None }
    }
}

impl Driver for Echo {
    fn start(mut self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, 9);
        self.info = Some(InterfaceInfo::new(config, mac, 1500, 1514));
        Ok(Arc::new(*self))
    }
}

impl Device for Echo {
    fn name(&self) -> &str {
        "echo"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone().expect("it has started")
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(1500, 1514)
    }

    fn queue(&self, _: QueueConfig, _: Wake) -> Result<Box<dyn Queue>, Error> {
        let socket =
            self.socket.try_clone().map_err(|source| Error::Io { what: "echo", source })?;
        Ok(Box::new(EchoQueue(socket)))
    }
}

struct EchoQueue(UnixDatagram);

impl Queue for EchoQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        while let Some(slot) = cx.take_write() {
            self.0.send(slot.packet().expect("a frame")).map_err(|_| Status::Failure)?;
            cx.complete_write(slot);
        }
        while let Some(mut slot) = cx.take_read() {
            match self.0.recv(slot.buffer_mut().expect("a frame")) {
                Ok(len) => cx.complete_read(slot, len),
                Err(_) => {
                    cx.put_back(slot);
                    break;
                }
            }
        }
        Ok(Progress::Idle)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

fn main() {
    // Like the harness, run only the cases that the arguments name.
    let unasked = |argument: String| {
        argument == "--list" || !argument.starts_with('-') && !"allocations".contains(&argument)
    };
    if std::env::args().skip(1).any(unasked) {
        return;
    }
    let poller = Poller::start().expect("a poller");
    let (all, some, few) = (packets(), packets() / 5, packets() / 20);
    loopback("loopback, inline", all, Drive::Inline);
    loopback("loopback, a thread", all, Drive::Thread);
    loopback("loopback, a shared poller", some, Drive::Shared(&poller));
    embedded("embedded, inline", all, Drive::Inline);
    embedded("embedded, threads", all, Drive::Thread);
    embedded("embedded, a shared poller", some, Drive::Shared(&poller));
    skipping("skipped, inline", all, Drive::Inline);
    skipping("skipped, a thread", some, Drive::Thread);
    skipping("skipped, a shared poller", some, Drive::Shared(&poller));
    outside("outside, inline", few, Drive::Inline);
    outside("outside, a thread", few, Drive::Thread);
    for drive in [Drive::Inline, Drive::Thread] {
        let (one, other) = UnixStream::pair().expect("two sockets");
        let ends = [one, other].map(OwnedFd::from);
        wire("a stream", some, drive, Socket::stream, ends);
        let (one, other) = UnixDatagram::pair().expect("two sockets");
        let ends = [one, other].map(OwnedFd::from);
        wire("datagrams", some, drive, Socket::datagram, ends);
    }
    let driver = || Loopback::new(1500);
    one_at_a_time("one at a time, inline", few, driver(), Drive::Inline);
    one_at_a_time("one at a time, a thread", few, driver(), Drive::Thread);
    one_at_a_time("one at a time, inline on a descriptor", few, Echo::new(), Drive::Inline);
    one_at_a_time("one at a time, a thread on a descriptor", few, Echo::new(), Drive::Thread);
}
