//! The life of a TAP: how it is made, what is set up and removed, what can go wrong, and that no
//! buffer is released while the kernel has it. Each test runs in a network namespace of its own.

use std::collections::{BTreeMap, HashSet};
use std::fs::OpenOptions;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmring::device::Offloads;
use vmring::device::fault::Faults;
use vmring::{
    CloseReason, Direction, Drive, EntryError, Error, Frame, Interface, Mode, PoolBuilder,
    RetryPolicy, Ring, RingOp, Status, SubmitErrorKind, Tap, TapEngine, TapError,
};

use crate::netns::{Host, in_namespace, sh};
use crate::support::{LONG, Way, eventually, every_way, number_of, packet_between, stage};
use crate::tap_traffic::{SetAtEnd, kernel_counts};

const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BROADCAST: [u8; 6] = [0xff; 6];

fn start(tap: Tap) -> Result<Interface, Error> {
    Interface::builder().mode(Mode::Host).device(tap).start()
}

/// Sends and receives frames with the tests' ethertype on an interface of this namespace, as a
/// neighbour on the host would.
struct Neighbour(OwnedFd);

impl Neighbour {
    fn on(interface: &str) -> Self {
        use std::os::fd::FromRawFd;
        let index: u32 =
            std::fs::read_to_string("/proc/thread-self/net/dev_snmp6/".to_owned() + interface)
                .ok()
                .and_then(|text| text.split_whitespace().nth(1)?.parse().ok())
                .unwrap_or_else(|| {
                    sh(&format!("ip -o link show {interface}"))
                        .split(':')
                        .next()
                        .unwrap()
                        .parse()
                        .unwrap()
                });
        let protocol = 0x88b5u16.to_be();
        // SAFETY: plain numbers.
        let fd = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into())
        };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was just opened, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeroes are a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let len = size_of_val(&address) as u32;
        // SAFETY: the address lives through the call.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        Self(fd)
    }

    fn send(&self, number: u64, len: usize) {
        let frame = packet_between(HOST, BROADCAST, number, len);
        // SAFETY: the frame lives through the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
    }

    /// The number of the next frame, if it has come or comes within 5 ms.
    fn receive(&self) -> Option<u64> {
        let mut buffer = [0; 2048];
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor.
        if unsafe { libc::poll(&mut poll, 1, 5) } <= 0 {
            return None;
        }
        // SAFETY: the buffer lives through the call.
        let len =
            unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        Some(number_of(&buffer[..usize::try_from(len).ok()?]))
    }
}

fn post(ring: &mut Ring, n: u64) {
    for i in 0..n {
        let frame = ring.alloc().expect("a fresh ring");
        ring.submit_read(frame, i).expect("a fresh ring");
    }
}

/// Returns the next frame with the tests' ethertype. Panics if none comes within `LONG`.
fn next(ring: &mut Ring) -> Frame {
    let start = Instant::now();
    loop {
        ring.wait(1, Some(Duration::from_millis(20)));
        let (mut sq, mut cq) = ring.split();
        for done in cq.reap() {
            if done.op != RingOp::Read {
                continue;
            }
            let (user_data, result) = (done.user_data, done.result);
            let frame = done.take_frame().expect("it has one");
            match result {
                Ok(_) => {}
                // A restart cancelled it. The reads that were posted afterwards come later.
                Err(EntryError::Cancelled) => continue,
                Err(error) => panic!("a read failed: {error}"),
            }
            if frame.len() >= 22 && frame[12..14] == [0x88, 0xb5] {
                return frame;
            }
            sq.submit_read(frame, user_data).expect("its credit came back");
        }
        assert!(start.elapsed() < LONG, "nothing comes");
    }
}

/// Sends a frame each way. Afterwards as many reads are posted as before.
fn exchange(ring: &mut Ring, neighbour: &Neighbour, number: u64) {
    neighbour.send(number, 100);
    let mut frame = next(ring);
    assert_eq!(number_of(&frame), number);
    frame.reset();
    frame.copy_from(&packet_between([2, 9, 9, 9, 9, 9], BROADCAST, number + 1, 100)).unwrap();
    ring.submit_write(frame, 0).expect("a credit");
    // A packet socket receives its own frames too.
    let start = Instant::now();
    loop {
        // If the ring is inline, this drives it.
        ring.wait(ring.in_flight(), Some(Duration::from_millis(1)));
        if neighbour.receive() == Some(number + 1) {
            break;
        }
        assert!(start.elapsed() < LONG, "the frame does not reach the host");
    }
    loop {
        ring.wait(1, Some(Duration::from_millis(20)));
        let (mut sq, mut cq) = ring.split();
        let (mut written, mut chatter) = (false, Vec::new());
        for done in cq.reap() {
            match done.op {
                RingOp::Write => written = true,
                _ => chatter.extend(done.take_frame()),
            }
        }
        for frame in chatter {
            sq.submit_read(frame, 98).expect("its credit came back");
        }
        if written {
            break;
        }
        assert!(start.elapsed() < LONG, "the write does not complete");
    }
    let frame = ring.alloc().expect("the written one");
    ring.submit_read(frame, 97).expect("the read's credit came back");
}

#[test]
fn the_kernel_names_a_new_tap_which_goes_with_its_interface() {
    in_namespace(|| {
        let interface = start(Tap::new().host_mac(HOST.into())).expect("it starts");
        assert_eq!(interface.system_name().as_deref(), Some("tap0"));
        let taps = sh("ip -o link show type tun");
        assert!(taps.contains("tap0") && taps.contains("02:00:00:00:00:01"), "{taps}");
        assert!(taps.contains(",UP"), "{taps}");
        assert!(sh("ip -o -4 address show tap0").contains("192.168.128.1/24"));
        assert_eq!(interface.mtu(), 1500);
        assert_eq!(interface.max_packet_size(), 1518, "with a VLAN tag");
        interface.stop(LONG).expect("it stops");
        eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
    });
}

#[test]
fn frames_go_both_ways_on_every_engine_and_in_every_way() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            every_way(|way, poller| {
                let interface = start(Tap::named("t0").engine(engine)).expect("it starts");
                let neighbour = Neighbour::on("t0");
                let ring = interface.ring(Direction::Both).drive(way.drive(poller));
                let mut ring = ring.build().expect("a ring");
                post(&mut ring, 32);
                for number in 0..50 {
                    exchange(&mut ring, &neighbour, number * 2);
                }
                ring.close().expect("it closes");
                interface.stop(LONG).expect("it stops");
                eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
            });
        }
    });
}

#[test]
fn a_persistent_tap_is_left_as_it_was_found() {
    in_namespace(|| {
        sh("ip link add br0 type bridge && ip link set br0 up");
        sh("ip tuntap add p0 mode tap && ip link set p0 address 02:00:00:00:00:77 mtu 1400");
        let look = || sh("ip -o link show p0; ip -o address show p0").replace("NO-CARRIER,", "");
        // The flags, the MTU and the MAC.
        let link = |text: String| {
            let mut words = text.split_whitespace();
            let first: Vec<_> = words.by_ref().take_while(|word| *word != "qdisc").collect();
            let mac = words.skip_while(|word| *word != "link/ether").nth(1).expect("a MAC");
            format!("{} {mac}", first.join(" "))
        };
        let before = look();

        stage("as it is");
        let interface = start(Tap::named("p0")).expect("it starts");
        assert_eq!(interface.mtu(), 1400);
        assert!(look().contains(",UP") && !look().contains("192.168"), "{}", look());
        let mut ring = interface.ring(Direction::Both).build().expect("a ring");
        post(&mut ring, 8);
        exchange(&mut ring, &Neighbour::on("p0"), 1);
        ring.close().expect("it closes");
        interface.stop(LONG).expect("it stops");
        assert_eq!(link(look()), link(before.clone()));

        stage("set up");
        let tap = Tap::named("p0").configure(true).host_mac(HOST.into());
        let interface =
            Interface::builder().mode(Mode::Host).mtu(1300).device(tap).start().unwrap();
        let now = look();
        for part in ["192.168.128.1/24", "mtu 1300", "02:00:00:00:00:01", ",UP"] {
            assert!(now.contains(part), "{part} is not in {now}");
        }
        drop(interface);
        eventually("as before", || link(look()) == link(before.clone()));
        assert!(!look().contains("192.168"));

        stage("on a bridge");
        let tap = Tap::named("p0").configure(true);
        let mode = Mode::Bridged("br0".to_owned());
        let interface = Interface::builder().mode(mode).device(tap).start().unwrap();
        assert!(look().contains("master br0"));
        let (interface, bridges) = Host::new().run(move || {
            let bridges = interface.shared_interfaces();
            (interface, bridges)
        });
        assert_eq!(bridges.unwrap(), ["br0"], "of its own namespace, whoever asks");
        interface.stop(LONG).expect("it stops");
        assert!(!look().contains("master"));
    });
}

#[test]
fn shared_mode_puts_forwarding_and_translation_back() {
    in_namespace(|| {
        let forwarding =
            || std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim().to_owned();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        let shared = |name: &str, net: &str| {
            let builder = Interface::builder().mode(Mode::Shared).ipv4(net.parse().unwrap());
            builder.device(Tap::named(name)).start().expect("it starts")
        };
        let tables = || if has_nft() { sh("nft list tables") } else { String::new() };
        let first = shared("s0", "10.7.0.1/24");
        let second = shared("s1", "10.8.0.1/24");
        assert_eq!(forwarding(), "1");
        if has_nft() {
            let rules = sh("nft list table inet vmring_s0");
            for part in ["ip saddr 10.7.0.0/24", "oifname != \"s0\"", "masquerade"] {
                assert!(rules.contains(part), "{part} is not in {rules}");
            }
        }
        first.stop(LONG).expect("it stops");
        assert_eq!(forwarding(), "1", "the second needs it");
        assert!(!tables().contains("vmring_s0"), "{}", tables());
        // Stop from another namespace. The settings of this namespace must be restored.
        Host::new().run(move || second.stop(LONG).expect("it stops"));
        assert_eq!(forwarding(), "0");
        assert_eq!(tables(), "");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        drop(shared("s0", "10.7.0.1/24"));
        assert_eq!(forwarding(), "1", "it was on before");
    });
}

/// The folded sum of big-endian words. It is all ones if the checksum is right.
fn sum_of(bytes: &[u8], start: u32) -> u32 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| (*b).into()));
    let mut sum = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// Goal: the offloads that one interface has set on a persistent TAP do not affect the next
/// interface, which has none. Method: check that the host's datagram has a checksum.
#[test]
fn a_persistent_tap_keeps_no_offload_for_the_next_interface() {
    in_namespace(|| {
        sh("ip tuntap add p0 mode tap && ip address add 10.9.0.1/24 dev p0");
        let mut offloads = Offloads::default();
        (offloads.checksum, offloads.tso4) = (true, true);
        let builder = Interface::builder().mode(Mode::Host).offloads(offloads);
        let first = builder.device(Tap::named("p0")).start().expect("it starts");
        assert!(first.capabilities().offloads.checksum);
        first.stop(LONG).expect("it stops");
        drop(first);

        let second = start(Tap::named("p0")).expect("it starts");
        assert_eq!(second.capabilities().offloads, Offloads::default());
        let mut ring = second.ring(Direction::Read).depth(64).build().expect("a ring");
        post(&mut ring, 32);
        sh("ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:09 dev p0");
        let socket = std::net::UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.send_to(&[7; 33], "10.9.0.2:9").unwrap();
        let start = Instant::now();
        let frame = loop {
            ring.wait(1, Some(Duration::from_millis(20)));
            let mut frames = ring.reap().map(|done| done.take_packet().expect("a packet"));
            if let Some(frame) = frames.find(|frame| frame.len() == 75 && frame[23] == 17) {
                break frame;
            }
            assert!(start.elapsed() < LONG, "the datagram does not come");
        };
        // The pseudo header: both addresses, the protocol and the length.
        assert_eq!(sum_of(&frame[26..], 17 + 41), 0xffff, "the checksum was left to us");
    });
}

/// Goal: if a TAP exists when an interface begins to start but is gone before the interface can
/// open it, the interface makes the TAP and sets it up.
#[test]
fn a_tap_that_goes_while_an_interface_waits_for_it_is_made_anew() {
    in_namespace(|| {
        let begin = Instant::now();
        let interface = loop {
            let holder = parent_opens("r0", libc::IFF_TAP | libc::IFF_NO_PI);
            let started = std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(50));
                    drop(holder);
                });
                start(Tap::named("r0"))
            });
            match started {
                Ok(interface) => break interface,
                // On a slow machine the holder outlasts the interface's patience.
                Err(Error::Tap(TapError::Taken(_))) if begin.elapsed() < LONG => {
                    eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
                }
                Err(error) => panic!("it does not start: {error}"),
            }
        };
        let address = sh("ip -o -4 address show r0");
        assert!(address.contains("192.168.128.1/24"), "{address}");
        drop(interface);
        eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
    });
}

fn has_nft() -> bool {
    crate::netns::has("nft")
}

/// Opens a TAP as a privileged parent does.
fn parent_opens(name: &str, flags: i32) -> OwnedFd {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: all zeroes are an `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    file.into()
}

#[test]
fn a_descriptor_from_a_parent_works_without_the_privilege() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            let fd = parent_opens("f0", libc::IFF_TAP | libc::IFF_NO_PI);
            sh("ip link set f0 up mtu 1350");
            let neighbour = Neighbour::on("f0");
            let interface = start(Tap::from_fd(fd).engine(engine)).expect("it starts");
            assert_eq!(interface.mtu(), 1350);
            let mut ring = interface.ring(Direction::Both).build().expect("a ring");
            post(&mut ring, 8);
            exchange(&mut ring, &neighbour, 1);
            stage("a restart with the same descriptor");
            interface.restart(LONG).expect("it restarts");
            ring.reap().for_each(drop);
            post(&mut ring, 8);
            exchange(&mut ring, &neighbour, 3);
            drop((ring, interface));
            eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
        }

        stage("from another namespace");
        let fd = parent_opens("f1", libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        sh("ip link set f1 up");
        let neighbour = Neighbour::on("f1");
        let other = Host::new();
        let (interface, mut ring) = other.run(move || {
            let mut offloads = Offloads::default();
            offloads.checksum = true;
            let builder = Interface::builder().offloads(offloads).device(Tap::from_fd(fd));
            let interface = builder.start().expect("it starts");
            let ring = interface.ring(Direction::Both).build().expect("a ring");
            (interface, ring)
        });
        assert!(interface.capabilities().offloads.checksum);
        assert_eq!(interface.capabilities().headroom, 12);
        post(&mut ring, 8);
        exchange(&mut ring, &neighbour, 5);
    });
}

#[track_caller]
fn tap_error(tap: Tap) -> TapError {
    error_of(Interface::builder().mode(Mode::Host), tap)
}

#[track_caller]
fn error_of(builder: vmring::InterfaceBuilder, tap: Tap) -> TapError {
    match builder.device(tap).start() {
        Err(Error::Tap(error)) => {
            let sentence = error.to_string();
            assert!(sentence.contains(':'), "{sentence} has no remedy");
            error
        }
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("it started"),
    }
}

#[test]
fn what_cannot_be_opened_says_why() {
    in_namespace(|| {
        assert_eq!(tap_error(Tap::named("a/b")), TapError::Name("a/b".to_owned()));
        let long = "sixteen-bytes-xx";
        assert_eq!(tap_error(Tap::named(long)), TapError::Name(long.to_owned()));

        sh("ip link add br0 type bridge");
        assert_eq!(tap_error(Tap::named("br0")), TapError::NotATap("br0".to_owned()));
        sh("ip tuntap add tun0 mode tun");
        assert_eq!(tap_error(Tap::named("tun0")), TapError::NotATap("tun0".to_owned()));

        let holder = start(Tap::named("taken")).expect("it starts");
        assert_eq!(tap_error(Tap::named("taken")), TapError::TakenHere("taken".to_owned()));
        drop(holder);

        sh("ip tuntap add solo mode tap && ip tuntap add many mode tap multi_queue");
        let mismatch = |name: &str, multi| TapError::QueueMismatch { name: name.to_owned(), multi };
        assert_eq!(tap_error(Tap::named("solo").queues(2)), mismatch("solo", false));
        assert_eq!(tap_error(Tap::named("many")), mismatch("many", true));
        for queues in [0, 257] {
            let refused = start(Tap::named("q0").queues(queues));
            assert!(matches!(refused, Err(Error::Config(_))), "{refused:?}");
        }

        let bridged = |name: &str| Interface::builder().mode(Mode::Bridged(name.to_owned()));
        let none = TapError::NoBridge("none".to_owned());
        assert_eq!(error_of(bridged("none"), Tap::named("refused0")), none);
        let no_bridge = TapError::NoBridge("solo".to_owned());
        assert_eq!(error_of(bridged("solo"), Tap::named("refused0")), no_bridge);
        eventually("a start that failed leaves nothing", || {
            !sh("ip -o link show type tun").contains("refused0")
        });

        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        for fd in [file.into(), std::fs::File::open("/dev/null").unwrap().into()] {
            assert!(matches!(tap_error(Tap::from_fd(fd)), TapError::Descriptor(_)));
        }
        let tun = parent_opens("tun1", libc::IFF_TUN | libc::IFF_NO_PI);
        assert!(matches!(tap_error(Tap::from_fd(tun)), TapError::Descriptor(_)));
        for mtu in [67, 65_522] {
            let refused =
                Interface::builder().mode(Mode::Host).mtu(mtu).device(Tap::named("m0")).start();
            assert!(matches!(refused, Err(Error::Config(_))), "{refused:?}");
        }
    });
}

/// Runs `f` on a thread without capabilities, as a user has none.
fn unprivileged<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            // Change this thread only. libc's wrapper would change all threads.
            // SAFETY: a plain number.
            let done = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
            f()
        });
        run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives this thread, and what it starts, a /dev/net/tun that every user may open, as most systems
/// have it.
fn with_a_public_tun() {
    // SAFETY: the call takes no pointer. It affects this thread only.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    sh(
        "mount --make-rprivate / && mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200",
    );
}

#[test]
fn without_the_privilege_it_says_what_is_needed() {
    in_namespace(|| {
        with_a_public_tun();
        let denied = unprivileged(|| start(Tap::named("t0")));
        let Err(Error::PermissionDenied { needs }) = denied else { panic!("{denied:?}") };
        assert!(needs.contains("CAP_NET_ADMIN") && needs.contains("ip tuntap add"), "{needs}");

        stage("a persistent TAP of the user's own");
        sh("ip tuntap add u0 mode tap user 65534 && ip link set u0 up");
        let neighbour = Neighbour::on("u0");
        let (interface, mut ring) = unprivileged(|| {
            let interface = start(Tap::named("u0")).expect("it is the user's");
            let ring = interface.ring(Direction::Both).build().expect("a ring");
            (interface, ring)
        });
        post(&mut ring, 8);
        exchange(&mut ring, &neighbour, 1);
        drop((ring, interface));
        sh("ip link set u0 down");
        let denied = unprivileged(|| start(Tap::named("u0")));
        let Err(Error::PermissionDenied { needs }) = denied else { panic!("{denied:?}") };
        assert!(needs.contains("ip link set"), "{needs}");
    });
}

/// Runs `body` with as many reads as possible posted and in the kernel.
fn with_reads_in_the_kernel(engine: TapEngine, way: Way, body: impl FnOnce(Interface, Ring)) {
    let poller = vmring::Poller::start().unwrap();
    let interface = start(Tap::named("t0").engine(engine)).expect("it starts");
    let ring = interface.ring(Direction::Both).depth(64).drive(way.drive(&poller));
    let mut ring = ring.build().expect("a ring");
    post(&mut ring, 64);
    exchange(&mut ring, &Neighbour::on("t0"), 1);
    assert_eq!(ring.in_flight(), 64);
    body(interface, ring);
    eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
}

#[test]
fn a_cancel_takes_reads_back_from_the_kernel_and_loses_no_packet() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            for way in Way::ALL {
                with_reads_in_the_kernel(engine, way, |interface, mut ring| {
                    let neighbour = Neighbour::on("t0");
                    stage(format!("{engine} {way:?}: one of them"));
                    let mut numbers = Vec::new();
                    let mut cancelled = HashSet::new();
                    let mut sent = 0;
                    // Cancel one read after another, with packets arriving in between.
                    for round in 0..10 {
                        neighbour.send(1000 + sent, 60);
                        sent += 1;
                        let target = 63 - round;
                        ring.split().0.cancel(target, 7_000).expect("a cancel's credit");
                        let deadline = Instant::now() + LONG;
                        let mut answered = false;
                        while !answered || numbers.len() < sent as usize {
                            ring.wait(1, Some(Duration::from_millis(5)));
                            for done in ring.reap() {
                                let (data, result) = (done.user_data, done.result);
                                match (done.op, result) {
                                    (RingOp::Cancel, result) => {
                                        assert_eq!(result, Ok(1), "target {target}");
                                        answered = true;
                                    }
                                    (RingOp::Read, Err(error)) => {
                                        assert_eq!(error, EntryError::Cancelled);
                                        assert!(cancelled.insert(data), "twice");
                                    }
                                    (RingOp::Read, Ok(_)) => {
                                        let frame = done.take_packet().expect("a packet");
                                        if frame[12..14] == [0x88, 0xb5] {
                                            numbers.push(number_of(&frame));
                                        }
                                    }
                                    _ => {}
                                }
                            }
                            assert!(Instant::now() < deadline, "round {round}: {numbers:?}");
                        }
                    }
                    assert_eq!(numbers, (1000..1000 + sent).collect::<Vec<_>>());
                    stage(format!("{engine} {way:?}: all of them"));
                    ring.cancel_and_wait(LONG).expect("it empties");
                    for done in ring.reap() {
                        assert_eq!(done.result, Err(EntryError::Cancelled));
                        assert!(cancelled.insert(done.user_data), "twice");
                    }
                    assert_eq!(ring.in_flight(), 0);
                    // Every frame is back, and the ring still works.
                    let all: Vec<Frame> = std::iter::from_fn(|| ring.alloc()).collect();
                    assert_eq!(all.len(), 128);
                    drop(all);
                    post(&mut ring, 8);
                    exchange(&mut ring, &neighbour, 5000);
                    ring.close().expect("it closes");
                    drop(interface);
                });
            }
        }
    });
}

#[test]
fn a_close_with_reads_in_the_kernel_brings_every_frame_home() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            for way in Way::ALL {
                stage(format!("{engine} {way:?}: close"));
                with_reads_in_the_kernel(engine, way, |interface, mut ring| {
                    ring.close().expect("it closes");
                    let cancelled = ring.reap().filter(|done| {
                        done.result == Err(EntryError::Cancelled) && done.op == RingOp::Read
                    });
                    assert_eq!(cancelled.count(), 64);
                    interface.stop(LONG).expect("it stops");
                });
                stage(format!("{engine} {way:?}: drop"));
                with_reads_in_the_kernel(engine, way, |interface, ring| {
                    drop(interface);
                    drop(ring);
                });
            }
        }
    });
}

/// Goal: if a queue is dropped without a close because code above it has panicked, it takes its
/// buffers back from the kernel before a frame returns to its pool. Method: packets come all the
/// time, and no frame in the pool may change any more.
#[test]
fn a_panic_above_the_queue_brings_home_what_the_kernel_has() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            every_way(|way, poller| {
                let after = 20;
                let tap =
                    Faults::seeded(1).panic_after(after).wrap(Tap::named("t0").engine(engine));
                let interface = Interface::builder().mode(Mode::Host).device(tap).start().unwrap();
                let neighbour = Neighbour::on("t0");
                let ring = interface.ring(Direction::Both).depth(64).drive(way.drive(poller));
                let mut ring = ring.build().expect("a ring");
                post(&mut ring, 64);
                ring.reap().for_each(drop);
                stage(format!("{engine} {way:?}: the panic"));
                let mut home: Vec<(Frame, Vec<u8>)> = Vec::new();
                let (mut came, mut panicked, mut number) = (0, 0, 0);
                eventually("every read comes back", || {
                    // These are fewer than the reads, so some reads have no packet at the panic.
                    if number < 40 || came >= number || panicked > 0 {
                        neighbour.send(number, 1000);
                        number += 1;
                    }
                    for done in ring.reap() {
                        match done.result {
                            Ok(_) => came += 1,
                            Err(EntryError::DevicePanicked) => panicked += 1,
                            Err(error) => panic!("{error}"),
                        }
                        let mut frame = done.take_frame().expect("it has one");
                        frame.reset();
                        frame.copy_from(&[home.len() as u8; 1200]).unwrap();
                        let bytes = frame.to_vec();
                        home.push((frame, bytes));
                    }
                    came + panicked == 64
                });
                assert!(came >= after && panicked > 0, "{came} {panicked}");
                for number in 0..200 {
                    neighbour.send(number, 1000);
                }
                for (frame, bytes) in &home {
                    assert!(frame[..] == bytes[..], "the kernel wrote into a frame that was home");
                }
                assert_eq!(ring.control().closed(), Some(CloseReason::DevicePanicked));
                let pool = ring.pools()[0].clone();
                ring.close().expect("nothing is leaked");
                drop((home, ring));
                assert_eq!(pool.slots_out(), 0);
                interface.stop(LONG).expect("it stops");
                eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
            });
        }
    });
}

/// Goal: the numbers of the kernel's buffers are reused after their packets. Method: more packets
/// than there are numbers.
#[test]
fn thousands_of_packets_go_through_one_ring_in_order() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            for way in [Way::Thread, Way::Inline] {
                with_reads_in_the_kernel(engine, way, |interface, mut ring| {
                    let neighbour = Neighbour::on("t0");
                    for first in (0..2500).step_by(32) {
                        (first..first + 32).for_each(|number| neighbour.send(number, 60));
                        for number in first..first + 32 {
                            let mut frame = next(&mut ring);
                            assert_eq!(number_of(&frame), number, "{engine} {way:?}");
                            frame.reset();
                            ring.submit_read(frame, 0).expect("its credit came back");
                        }
                    }
                    drop((ring, interface));
                });
            }
        }
    });
}

/// Goal: on an inline ring, the descriptor signals a packet that comes to the TAP, before and after
/// a restart, and nothing else.
#[test]
fn the_descriptor_of_an_inline_ring_tells_of_packets() {
    fn readable(ring: &Ring, timeout: Duration) -> bool {
        let fd = ring.completion_fd().expect("a descriptor").as_raw_fd();
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor.
        unsafe { libc::poll(&mut poll, 1, timeout.as_millis() as i32) == 1 }
    }
    fn packets(ring: &mut Ring) {
        let neighbour = Neighbour::on("t0");
        ring.completion_fd().expect("a descriptor");
        for number in 0..20 {
            // Arm twice, like an owner that sleeps again although no packet has come.
            for _ in 0..2 {
                let mut turns = 0;
                while !ring.arm() {
                    assert_eq!(ring.reap().count(), 0, "nothing was sent");
                    turns += 1;
                    assert!(turns < 100, "it never says that it is armed");
                }
                assert!(!readable(ring, Duration::ZERO), "nothing has come");
            }
            neighbour.send(number, 60);
            assert!(readable(ring, LONG), "nothing tells of the packet");
            let mut frame = next(ring);
            assert_eq!(number_of(&frame), number);
            frame.reset();
            ring.submit_read(frame, 0).expect("its credit came back");
        }
    }
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            stage(format!("{engine}"));
            let interface = start(Tap::named("t0").engine(engine)).expect("it starts");
            let ring = interface.ring(Direction::Both).depth(64).drive(Drive::Inline);
            let mut ring = ring.build().expect("a ring");
            post(&mut ring, 32);
            packets(&mut ring);
            std::thread::scope(|scope| {
                let restarting = scope.spawn(|| interface.restart(LONG));
                eventually("the restart", || {
                    ring.reap().for_each(drop);
                    restarting.is_finished() && ring.stats().restarts == 1
                });
                restarting.join().unwrap().expect("it restarts");
            });
            post(&mut ring, 32);
            packets(&mut ring);
            drop((ring, interface));
            eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
        }
    });
}

/// Goal: an inline ring still works after it has moved to another thread, and after its thread has
/// ended.
#[test]
fn an_inline_ring_may_change_threads() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            let interface = start(Tap::named("t0").engine(engine)).expect("it starts");
            let neighbour = Neighbour::on("t0");
            let ring = interface.ring(Direction::Both).depth(64).drive(Drive::Inline);
            let mut ring = ring.build().expect("a ring");
            post(&mut ring, 32);
            for round in 0..10 {
                stage(format!("{engine} round {round}"));
                exchange(&mut ring, &neighbour, round * 10);
                let (moved, neighbour) = (&mut ring, &neighbour);
                std::thread::scope(|scope| {
                    scope.spawn(move || exchange(moved, neighbour, round * 10 + 5));
                });
            }
            ring.close().expect("it closes");
            interface.stop(LONG).expect("it stops");
            eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
        }
    });
}

/// Goal: while an inline ring moves from thread to thread, packets wait in the TAP and writes wait
/// in the ring. Each arrives once and in order. Method: a neighbour sends all the time. Each thread
/// takes some packets, leaves others and a write, and ends.
#[test]
fn an_inline_ring_loses_and_mixes_up_nothing_on_its_way_through_threads() {
    /// Numbers of the ring's writes begin here, so that they differ from those of the packets that
    /// it reads.
    const WRITTEN: u64 = 1_000_000;
    /// How many packets may wait. The TAP's queue has space for more.
    const WAITING: u64 = 200;

    fn hop(ring: &mut Ring, listener: &Neighbour, hop: u64, taken: &AtomicU64) {
        for _ in 0..=hop % 23 {
            let mut frame = next(ring);
            let expected = taken.fetch_add(1, Ordering::Relaxed);
            assert_eq!(number_of(&frame), expected, "hop {hop}");
            frame.reset();
            ring.submit_read(frame, 0).expect("its credit came back");
        }
        if hop > 0 {
            let mut written = None;
            eventually("the write that the thread before has left", || {
                written = listener.receive().filter(|number| *number >= WRITTEN);
                written.is_some()
            });
            assert_eq!(written, Some(WRITTEN + hop - 1), "hop {hop}");
        }
        let mut frame = ring.alloc().expect("a frame that is free");
        frame.copy_from(&packet_between([2, 9, 9, 9, 9, 9], BROADCAST, WRITTEN + hop, 60)).unwrap();
        ring.submit_write(frame, 0).expect("a credit");
    }

    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            stage(format!("{engine}"));
            let interface = start(Tap::named("t0").engine(engine)).expect("it starts");
            let (neighbour, listener) = (Neighbour::on("t0"), Neighbour::on("t0"));
            let ring = interface.ring(Direction::Both).depth(64).drive(Drive::Inline);
            let mut ring = ring.build().expect("a ring");
            post(&mut ring, 16);
            let (taken, over) = (AtomicU64::new(0), AtomicBool::new(false));
            std::thread::scope(|scope| {
                // Ends the sender, even if an assertion fails.
                let _over = SetAtEnd(&over);
                scope.spawn(|| {
                    let mut number = 0;
                    while !over.load(Ordering::Relaxed) {
                        if number < taken.load(Ordering::Relaxed) + WAITING {
                            neighbour.send(number, 60);
                            number += 1;
                        } else {
                            std::thread::yield_now();
                        }
                    }
                });
                for i in 0..100 {
                    let (ring, listener, taken) = (&mut ring, &listener, &taken);
                    std::thread::scope(|scope| {
                        scope.spawn(|| hop(ring, listener, i, taken));
                    });
                }
            });
            ring.close().expect("it closes");
            interface.stop(LONG).expect("it stops");
            eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
        }
    });
}

/// Goal: between two calls, nothing takes packets for an inline ring, because each would interrupt
/// the owner's thread. Method: the kernel's count of packets taken out of the TAP.
#[test]
fn packets_for_an_inline_ring_stay_in_the_tap_until_it_is_called() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            stage(format!("{engine}"));
            with_reads_in_the_kernel(engine, Way::Inline, |_interface, mut ring| {
                let neighbour = Neighbour::on("t0");
                let before = kernel_counts("t0").sent;
                (0..8).for_each(|number| neighbour.send(number, 60));
                assert_eq!(kernel_counts("t0").sent, before);
                for number in 0..8 {
                    assert_eq!(number_of(&next(&mut ring)), number);
                }
                assert!(kernel_counts("t0").sent >= before + 8, "they were taken uncounted");
            });
        }
    });
}

#[test]
fn a_tap_that_is_deleted_ends_the_ring_and_comes_back_with_a_restart() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            for way in Way::ALL {
                for persistent in [false, true] {
                    stage(format!("{engine} {way:?} persistent: {persistent}"));
                    deleted(engine, way, persistent);
                }
            }
        }
    });
}

fn deleted(engine: TapEngine, way: Way, persistent: bool) {
    let make = || sh("ip tuntap add d0 mode tap && ip link set d0 up");
    if persistent {
        make();
    }
    let poller = vmring::Poller::start().unwrap();
    let interface = start(Tap::named("d0").engine(engine)).expect("it starts");
    let build = |interface: &Interface| {
        let ring = interface.ring(Direction::Both).depth(64).drive(way.drive(&poller));
        let mut ring = ring.build().expect("a ring");
        post(&mut ring, 32);
        ring
    };
    let mut ring = build(&interface);
    exchange(&mut ring, &Neighbour::on("d0"), 1);
    sh("ip link del d0");
    let mut failed = 0;
    let mut refused = None;
    eventually("the ring says so", || {
        ring.wait(1, Some(Duration::from_millis(5)));
        for done in ring.reap() {
            if done.op == RingOp::Read {
                assert_eq!(done.result, Err(EntryError::Device(Status::Os(libc::EBADFD))));
                failed += 1;
            }
        }
        // A new submit must be refused as well.
        if refused.is_none()
            && let Some(frame) = ring.alloc()
            && let Err(error) = ring.submit_read(frame, 99)
        {
            refused = Some(error.kind);
        }
        refused.is_some() && ring.in_flight() == 0
    });
    assert!(failed >= 31, "{failed} of what was in flight");
    assert_eq!(
        refused,
        Some(SubmitErrorKind::Closed(CloseReason::Failed(Status::Os(libc::EBADFD))))
    );
    if persistent {
        let gone = interface.restart(LONG);
        let Err(Error::Device(error)) = &gone else { panic!("{gone:?}") };
        assert!(matches!(&**error, Error::Tap(TapError::Gone(name)) if name == "d0"), "{error}");
        make();
    }
    interface.restart(LONG).expect("it is back");
    let mut again = build(&interface);
    exchange(&mut again, &Neighbour::on("d0"), 7);
    drop((ring, again));
    interface.stop(LONG).expect("it stops");
    if persistent {
        sh("ip link del d0");
    }
    eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
}

/// Frames of many flows are spread over the queues, and each arrives once.
#[test]
fn every_queue_has_a_ring_and_a_poller() {
    in_namespace(|| {
        for engine in [TapEngine::IoUring, TapEngine::Plain] {
            let interface = start(Tap::named("q0").queues(4).engine(engine)).expect("it starts");
            assert_eq!(interface.capabilities().reading_rings, 4);
            let mut rings = interface.ring(Direction::Both).depth(64).rings(4).expect("rings");
            let fifth = interface.ring(Direction::Read).build();
            assert!(matches!(fifth, Err(Error::TooManyRings { limit: 4, .. })), "{fifth:?}");
            rings.iter_mut().for_each(|ring| post(ring, 64));
            // Each flow is a UDP socket on the host that sends to an address of the network.
            sh("ip neigh add 192.168.128.9 lladdr 02:00:00:00:00:09 dev q0");
            let to = (Ipv4Addr::new(192, 168, 128, 9), 7);
            let flows = 64;
            for flow in 0..flows {
                let socket = std::net::UdpSocket::bind("192.168.128.1:0").unwrap();
                socket.send_to(&[flow; 20], to).unwrap();
            }
            let mut seen = HashSet::new();
            let mut per_ring = [0; 4];
            eventually("every flow's packet", || {
                for (ring, count) in rings.iter_mut().zip(&mut per_ring) {
                    ring.wait(1, Some(Duration::from_millis(1)));
                    for done in ring.reap() {
                        let frame = done.take_packet().expect("a packet");
                        if frame.len() == 62 && frame[23] == 17 {
                            assert!(seen.insert(frame[42]), "flow {} came twice", frame[42]);
                            *count += 1;
                        }
                    }
                }
                seen.len() == usize::from(flows)
            });
            assert!(per_ring.iter().filter(|count| **count > 0).count() > 1, "{per_ring:?}");
            stage("one ring is left, and gets everything");
            rings.truncate(1);
            let ring = &mut rings[0];
            for round in 0..flows {
                let socket = std::net::UdpSocket::bind("192.168.128.1:0").unwrap();
                socket.send_to(&[round; 30], to).unwrap();
                let frame = ring.alloc().expect("frames came home");
                let _ = ring.submit_read(frame, 0);
            }
            let mut came = 0;
            eventually("all of them", || {
                ring.wait(1, Some(Duration::from_millis(1)));
                came += ring
                    .reap()
                    .filter_map(|done| done.take_packet().ok())
                    .filter(|frame| frame.len() == 72 && frame[23] == 17)
                    .count();
                came == usize::from(flows)
            });
            drop(rings);
            interface.stop(LONG).expect("it stops");
            eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
        }
    });
}

/// Makes the kernel refuse io_uring_setup(2) to this thread and those it starts, as containers do
/// (seccomp(2)).
fn forbid_io_uring() {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // the call's number
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the filter and its program live through the call.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn where_io_uring_is_forbidden_plain_calls_do_its_work() {
    in_namespace(|| {
        forbid_io_uring();
        let refused = start(Tap::named("t0").engine(TapEngine::IoUring));
        assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
        assert_eq!(TapEngine::Auto.resolve().unwrap(), TapEngine::Plain);
        let interface = start(Tap::named("t0")).expect("it starts");
        let counters = interface.counters();
        assert!(counters.contains(&("io_uring", 0)), "{counters:?}");
        let mut ring = interface.ring(Direction::Both).build().expect("a ring");
        post(&mut ring, 8);
        exchange(&mut ring, &Neighbour::on("t0"), 1);
    });
}

/// io_uring is forbidden only after the start, as in a process that gives up its rights meanwhile.
#[test]
fn a_ring_that_gets_no_io_uring_falls_back() {
    in_namespace(|| {
        if TapEngine::Auto.resolve().unwrap() != TapEngine::IoUring {
            return crate::netns::skip("no io_uring on this kernel");
        }
        let interface = start(Tap::named("t0")).expect("it starts");
        assert!(interface.counters().contains(&("io_uring", 1)));
        forbid_io_uring();
        let mut ring = interface.ring(Direction::Both).build().expect("a ring");
        post(&mut ring, 8);
        exchange(&mut ring, &Neighbour::on("t0"), 1);
        assert!(interface.counters().contains(&("io_uring fallbacks", 1)));
    });
}

/// Goal: packets that come before the first ring wait in the queue that the first ring gets, and
/// not in queues that no ring reads.
#[test]
fn packets_wait_for_the_first_ring_in_its_queue() {
    in_namespace(|| {
        let interface = start(Tap::named("q0").queues(4)).expect("it starts");
        sh("ip neigh add 192.168.128.9 lladdr 02:00:00:00:00:09 dev q0");
        let flows = 64;
        for flow in 0..flows {
            let socket = std::net::UdpSocket::bind("192.168.128.1:0").unwrap();
            socket.send_to(&[flow; 20], "192.168.128.9:7").unwrap();
        }
        let mut ring = interface.ring(Direction::Read).depth(128).build().expect("a ring");
        post(&mut ring, 128);
        let mut seen = HashSet::new();
        eventually("every flow's packet", || {
            ring.wait(1, Some(Duration::from_millis(1)));
            for done in ring.reap() {
                let frame = done.take_packet().expect("a packet");
                if frame.len() == 62 && frame[23] == 17 {
                    assert!(seen.insert(frame[42]), "flow {} came twice", frame[42]);
                }
            }
            seen.len() == usize::from(flows)
        });
    });
}

/// Goal: after a restart the TAP has the MTU that rings and guests know, even if it was changed
/// meanwhile. A stop restores the changed one.
#[test]
fn a_restart_keeps_the_mtu() {
    in_namespace(|| {
        sh("ip tuntap add p0 mode tap && ip link set p0 mtu 1400");
        let interface = start(Tap::named("p0")).expect("it starts");
        sh("ip link set p0 mtu 1300");
        interface.restart(LONG).expect("it restarts");
        let link = || sh("ip -o link show p0");
        assert!(link().contains("mtu 1400"), "{}", link());
        assert_eq!(interface.mtu(), 1400);
        interface.stop(LONG).expect("it stops");
        assert!(link().contains("mtu 1300"), "{}", link());
    });
}

/// Goal: writes for which the kernel has no space wait. None is lost, and they keep their order.
/// Method: the TAP may have only a few packets under way, and they leave over a slow link.
#[test]
fn writes_that_the_kernel_refuses_for_now_keep_their_order() {
    if !crate::netns::has("tc") {
        return;
    }
    in_namespace(|| {
        let poller = vmring::Poller::start().unwrap();
        sh("ip link add br0 type bridge && ip link set br0 up");
        sh("ip link add v0 type veth peer name v1 && ip link set v1 up");
        sh("ip link set v0 up master br0");
        sh("tc qdisc add dev v0 root tbf rate 2mbit burst 4kb limit 1mb");
        let ways = [Way::Inline, Way::Thread];
        let engines = [TapEngine::IoUring, TapEngine::Plain];
        for (engine, way) in engines.into_iter().flat_map(|engine| ways.map(|way| (engine, way))) {
            stage(format!("{engine} {way:?}"));
            let fd = parent_opens("f0", libc::IFF_TAP | libc::IFF_NO_PI);
            let room: libc::c_int = 6000;
            // SAFETY: TUNSETSNDBUF reads a number.
            let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETSNDBUF, &room) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
            sh("ip link set f0 up master br0");
            let neighbour = Neighbour::on("v1");
            let interface = start(Tap::from_fd(fd).engine(engine)).expect("it starts");
            let retry = RetryPolicy { attempts: u32::MAX, delay: Duration::from_micros(100) };
            let ring = interface.ring(Direction::Write).depth(128).retry(retry);
            let mut ring = ring.drive(way.drive(&poller)).build().expect("a ring");
            // When a packet arrives, the bridge's port is ready.
            let mut number = 0;
            eventually("the way is open", || {
                number += 1;
                write(&mut ring, number, 60);
                // Packets of the previous engine may still arrive. Their numbers are larger.
                neighbour.receive().is_some_and(|number| number < 1000)
            });
            for number in 1000..1100 {
                write(&mut ring, number, 1000);
            }
            let mut came = Vec::new();
            eventually("all of them come", || {
                ring.reap().for_each(|done| assert!(done.result.is_ok()));
                came.extend(neighbour.receive().filter(|number| (1000..1100).contains(number)));
                came.len() == 100
            });
            assert_eq!(came, (1000..1100).collect::<Vec<_>>(), "{engine} {way:?}");
            assert!(ring.stats().retries > 0, "nothing was refused");

            stage(format!("{engine} {way:?}: a close does not wait for room"));
            sh("tc qdisc change dev v0 root tbf rate 8kbit burst 4kb limit 1mb");
            for number in 2000..2050 {
                write(&mut ring, number, 1000);
            }
            ring.close().expect("it closes");
            // A poller's thread may have written some meanwhile. Writes that the kernel had
            // complete after those that were only posted.
            let done = ring.reap().map(|done| (done.user_data, done.result));
            let done: BTreeMap<_, _> = done.collect();
            let written = done.values().take_while(|result| result.is_ok()).count();
            assert!(written < done.len(), "nothing was refused");
            assert!(done.keys().copied().eq(2050 - done.len() as u64..2050), "{done:?}");
            let cancelled = Err(EntryError::Cancelled);
            assert!(done.values().skip(written).all(|result| *result == cancelled), "{done:?}");
            sh("tc qdisc change dev v0 root tbf rate 2mbit burst 4kb limit 1mb");
            drop((ring, interface));
            eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
        }
    });
}

fn write(ring: &mut Ring, number: u64, len: usize) {
    let mut frame = ring.alloc().expect("a free frame");
    // Send to one host. Of a broadcast, the bridge sends a copy, which does not count against the
    // TAP's limit.
    frame.copy_from(&packet_between([2, 9, 9, 9, 9, 9], HOST, number, len)).unwrap();
    ring.submit_write(frame, number).expect("a credit");
    ring.reap().for_each(|done| assert!(done.result.is_ok()));
}

/// One reading ring and two writing rings share the only queue of a TAP.
#[test]
fn one_ring_reads_and_others_write() {
    in_namespace(|| {
        let interface = start(Tap::named("t0")).expect("it starts");
        let neighbour = Neighbour::on("t0");
        let pool = PoolBuilder::new(64, 1518).build().unwrap();
        let ring = |direction| interface.ring(direction).pool(&pool).build().expect("a ring");
        let (mut reads, mut first, mut second) =
            (ring(Direction::Read), ring(Direction::Write), ring(Direction::Write));
        post(&mut reads, 8);
        neighbour.send(1, 60);
        assert_eq!(number_of(&next(&mut reads)), 1);
        for (number, ring) in [(2, &mut first), (3, &mut second)] {
            let mut frame = ring.alloc().unwrap();
            frame.copy_from(&packet_between(HOST, BROADCAST, number, 60)).unwrap();
            ring.submit_write(frame, 0).unwrap();
            eventually("it reaches the host", || neighbour.receive() == Some(number));
        }
    });
}

/// Goal: if an old TAP of the same name is about to disappear, the new interface must not treat it
/// as one that the operator has set up. Method: another descriptor holds the old TAP until the new
/// start is under way.
#[test]
fn a_new_tap_is_set_up_even_if_the_old_one_is_still_there() {
    in_namespace(|| {
        let (mut made, begin) = (0, Instant::now());
        while made < 20 {
            let holder = parent_opens("t0", libc::IFF_TAP | libc::IFF_NO_PI);
            let letting_go = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                drop(holder);
            });
            match start(Tap::named("t0")) {
                Ok(interface) => {
                    assert!(sh("ip -o -4 address show t0").contains("192.168.128.1/24"));
                    interface.stop(LONG).expect("it stops");
                    made += 1;
                }
                // On a slow machine the holder outlasts the interface's patience.
                Err(Error::Tap(TapError::Taken(_))) if begin.elapsed() < LONG => {}
                Err(error) => panic!("it does not start: {error}"),
            }
            letting_go.join().expect("it lets go");
            eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
        }
    });
}

#[test]
fn a_restart_from_another_namespace_is_in_the_first_one() {
    in_namespace(|| {
        let interface = start(Tap::named("t0")).expect("it starts");
        let interface = Host::new().run(move || {
            interface.restart(LONG).expect("it restarts");
            interface
        });
        assert!(sh("ip -o -4 address show t0").contains("192.168.128.1/24"));
        let mut ring = interface.ring(Direction::Both).build().expect("a ring");
        post(&mut ring, 8);
        exchange(&mut ring, &Neighbour::on("t0"), 1);
    });
}

#[test]
fn a_tap_whose_queues_are_all_taken_gives_no_further_one() {
    in_namespace(|| {
        let multi = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE;
        let taken: Vec<OwnedFd> = (0..255).map(|_| parent_opens("m0", multi)).collect();
        let refused = tap_error(Tap::named("m0").queues(2));
        assert_eq!(refused, TapError::TooManyQueues("m0".to_owned()));
        drop(taken);
    });
}
