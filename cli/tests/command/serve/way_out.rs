//! A guest of a server reaches the world: the kernel's own TCP and UDP, in a namespace of their own, by
//! way of a TAP, a bridge, a wire, the server's switch and its translator.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::visitor::{GATEWAY, Visitor};

const GUEST: &str = "192.168.64.2";
/// Ports of the guest that the host's lead to.
const GUEST_PORT: u16 = 7777;
/// What a stream carries.
const STREAM: usize = 3 << 20;
/// Datagrams in one burst.
const BURST: usize = 40;
/// How long an answer takes on a machine that is not busy, and more.
const SOON: Duration = Duration::from_millis(500);

/// A socket of the host's loopback address, and its port.
fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    (listener, port)
}

fn datagrams() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let port = socket.local_addr().expect("its address").port();
    (socket, port)
}

/// A port at which nobody listens.
fn free_port() -> u16 {
    listener().1
}

fn content(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Sends back what one client sends, from then on when that has ended.
fn echo_once(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().expect("a client");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("it is read");
    stream.write_all(&bytes).expect("it is written");
}

/// Sends a stream to an echo, and gets the same back.
fn exchange_stream(at: SocketAddr) {
    let mut stream = TcpStream::connect_timeout(&at, LIMIT).expect("it is reached");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let bytes = content(STREAM);
    stream.write_all(&bytes).expect("it is written");
    stream.shutdown(Shutdown::Write).expect("its end");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("it is read");
    assert!(bytes == back, "{} of {} bytes", back.len(), bytes.len());
}

/// Sends back what comes, until it is dropped.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Echo {
    fn new(socket: UdpSocket) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        socket.set_read_timeout(Some(SOON)).expect("a timeout");
        let thread = thread::spawn(move || {
            let mut bytes = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((len, from)) = socket.recv_from(&mut bytes) {
                    socket.send_to(&bytes[..len], from).expect("it is sent");
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of it was printed.
            let _ = thread.join();
        }
    }
}

/// Sends datagrams to an echo, and gets the same back. On a busy machine some of a burst may be lost, and
/// these are sent again.
fn exchange_datagrams(at: SocketAddr) {
    let start = Instant::now();
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
    socket.connect(at).expect("it is reached");
    socket.set_read_timeout(Some(SOON)).expect("a timeout");
    let mut missing: BTreeSet<usize> = (1000..1000 + BURST).collect();
    while !missing.is_empty() {
        assert!(start.elapsed() < LIMIT, "no answer to datagrams of these lengths: {missing:?}");
        for len in &missing {
            socket.send(&content(*len)).expect("it is sent");
        }
        let mut bytes = [0; 2048];
        while !missing.is_empty()
            && let Ok(len) = socket.recv(&mut bytes)
        {
            assert!(bytes[..len] == content(len), "{len} bytes");
            missing.remove(&len);
        }
    }
}

/// A question for the address of a name (RFC 1035, 4.1).
fn question(id: u8, name: &[&str]) -> Vec<u8> {
    let mut message = vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name {
        message.push(label.len() as u8);
        message.extend(label.bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

/// The ports of the host that a [`visit`] uses.
pub(super) struct Ports {
    stream: (TcpListener, u16),
    datagrams: (UdpSocket, u16),
    nobody: u16,
    /// A port that leads to the guest.
    forwarded: Option<u16>,
}

impl Ports {
    pub(super) fn new() -> Self {
        Self {
            stream: listener(),
            datagrams: datagrams(),
            nobody: free_port(),
            forwarded: Some(free_port()),
        }
    }

    /// None of them leads to the guest, so the translator starts with the guest's first packet.
    pub(super) fn to_go_out() -> Self {
        Self { forwarded: None, ..Self::new() }
    }

    /// The options of a server that lets guests do what they do here.
    pub(super) fn options(&self) -> Vec<String> {
        let Self { stream, datagrams, nobody, forwarded } = self;
        let mut options = vec![
            format!("--host-port={}", stream.1),
            format!("--host-port={},udp", datagrams.1),
            format!("--host-port={nobody}"),
            format!("--host-port={nobody},udp"),
        ];
        for protocol in ["tcp", "udp"] {
            let rule = |port: &u16| format!("--forward={port}={GUEST}:{GUEST_PORT},{protocol}");
            options.extend(forwarded.iter().map(rule));
        }
        options
    }
}

/// Asks the gateway for a name over IPv6, with the address that the gateway's advertisement gives a kernel.
fn ask_over_ipv6() {
    let start = Instant::now();
    if !Path::new("/proc/sys/net/ipv6").exists() {
        return eprintln!("skipped: this kernel has no IPv6");
    }
    // The kernel looks first whether somebody has the address, for a second or two (`IFA_F_TENTATIVE`).
    let prefix = loop {
        let listed = std::fs::read_to_string("/proc/thread-self/net/if_inet6").expect("a list");
        let usable = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            let number = |word| u128::from_str_radix(word, 16).expect("a number");
            let is_global = words[5] == "t0" && words[3] == "00";
            (is_global && number(words[4]) & 0x40 == 0).then(|| number(words[0]) >> 64)
        };
        if let Some(prefix) = listed.lines().find_map(usable) {
            break prefix;
        }
        assert!(start.elapsed() < LIMIT, "the guest gets no address: {listed}");
        thread::sleep(Duration::from_millis(20));
    };
    let gateway = Ipv6Addr::from_bits(prefix << 64 | 1);
    let socket = UdpSocket::bind("[::]:0").expect("a port");
    socket.set_read_timeout(Some(SOON)).expect("a timeout");
    socket.connect((gateway, 53)).expect("it is connected");
    let mut answer = [0; 512];
    let len = loop {
        assert!(start.elapsed() < LIMIT, "the gateway does not answer");
        socket.send(&question(3, &["gateway", "internal"])).expect("it is sent");
        if let Ok(len) = socket.recv(&mut answer) {
            break len;
        }
    };
    assert_eq!((answer[1], answer[3] & 15), (3, 0), "{:x?}", &answer[..len]);
    assert_eq!(answer[len - 4..len], GATEWAY.octets());
}

/// A guest with a static address joins by this socket, and does what guests do outside. It leaves when it
/// is dropped.
pub(super) fn visit(wire: &Path, ports: Ports) -> Visitor {
    let Ports { stream, datagrams, nobody, forwarded } = ports;
    let guest = Visitor::new(wire, GUEST);
    let at = |port: u16| SocketAddr::new(GATEWAY.into(), port);
    // Out, by TCP and UDP.
    let echo = thread::spawn(move || echo_once(&stream.0));
    guest.host.run(move || exchange_stream(at(stream.1)));
    echo.join().expect("the echo ends");
    let echo = Echo::new(datagrams.0);
    guest.host.run(move || exchange_datagrams(at(datagrams.1)));
    drop(echo);
    // The gateway knows names: those of the host's resolvers, which may not answer here, and its own.
    guest.host.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
        socket.set_read_timeout(Some(SOON)).expect("a timeout");
        socket.connect(at(53)).expect("it is connected");
        let (start, mut answer) = (Instant::now(), [0; 512]);
        let len = loop {
            assert!(start.elapsed() < LIMIT, "the gateway does not answer");
            socket.send(&question(1, &["example", "org"])).expect("it is sent");
            socket.send(&question(2, &["host", "internal"])).expect("it is sent");
            // The other answer comes first, if the host's resolvers are there.
            let found = (0..2).find_map(|_| {
                let len = socket.recv(&mut answer).ok()?;
                (answer[..2] == [0, 2]).then_some(len)
            });
            if let Some(len) = found {
                break len;
            }
        };
        // No error, one answer, and at its end the address.
        assert_eq!((answer[3] & 15, &answer[6..8]), (0, &[0, 1][..]), "{:x?}", &answer[..len]);
        assert_eq!(answer[len - 4..len], GATEWAY.octets());
    });
    guest.host.run(move || {
        // Nobody is there: TCP is reset, and UDP gets an error of ICMP.
        let refused = TcpStream::connect_timeout(&at(nobody), LIMIT).expect_err("nobody listens");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
        socket.set_read_timeout(Some(SOON)).expect("a timeout");
        socket.connect(at(nobody)).expect("it is connected");
        let start = Instant::now();
        let refused = loop {
            assert!(start.elapsed() < LIMIT, "no error comes");
            match socket.send(b"hello").and_then(|_| socket.recv(&mut [0; 16])) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                answer => break answer.expect_err("nobody listens"),
            }
        };
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        // What no guest reaches is refused at once: a cloud's metadata, and the host's other ports.
        for denied in ["169.254.169.254:80", "127.0.0.1:1", "192.168.64.1:1"] {
            let denied: SocketAddr = denied.parse().expect("an address");
            TcpStream::connect_timeout(&denied, LIMIT).expect_err("it is denied");
        }
        // A ping goes out, or is refused where the system has no ping sockets for this process.
        let _ = Command::new("ping").args(["-c1", "-W1", "127.0.0.2"]).output();
    });
    guest.host.run(ask_over_ipv6);
    // In, by the ports that lead to the guest.
    let Some(forwarded) = forwarded else { return guest };
    let (listener, socket) = guest.host.run(|| {
        let listener = TcpListener::bind(("0.0.0.0", GUEST_PORT)).expect("its port");
        (listener, UdpSocket::bind(("0.0.0.0", GUEST_PORT)).expect("its port"))
    });
    let there = guest.host.start(move || echo_once(&listener));
    let echo = Echo::new(socket);
    let here = SocketAddr::from(([127, 0, 0, 1], forwarded));
    exchange_stream(here);
    there.recv_timeout(LIMIT).expect("the guest's echo ends");
    exchange_datagrams(here);
    drop(echo);
    guest
}

/// The translator is confined as its server is: a call that it makes and that is not in the list would
/// end the server.
#[test]
fn a_guest_of_a_confined_server_reaches_the_world() {
    if !crate::tap::is_possible() {
        return;
    }
    let folder = scratch("serve way out");
    let (path, ports) = (folder.join("a.sock"), Ports::new());
    let options = ports.options();
    let listen = wires::at("qemu", &path);
    let mut arguments = vec!["--listen", &listen];
    arguments.extend(options.iter().map(String::as_str));
    let mut server = Server::new(&arguments);
    let stdout = server.child.as_mut().expect("it runs").stdout.take().expect("piped");
    let (sender, reports) = std::sync::mpsc::channel::<Value>();
    let reader = thread::spawn(move || {
        let all = serde_json::Deserializer::from_reader(stdout);
        for one in all.into_iter() {
            sender.send(one.expect("one JSON object after the other")).expect("it is read");
        }
    });
    let forwarded = ports.forwarded.expect("a port that leads to the guest");
    let guest = visit(&path, ports);
    server.signal("USR1");
    let running = reports.recv_timeout(LIMIT).expect("a report");
    server.signal("TERM");
    assert_eq!(server.exit_code(), Some(0));
    drop(guest);
    let last = reports.recv_timeout(LIMIT).expect("a report");
    reader.join().expect("the output ends");
    for part in PARTS {
        assert_eq!(last["sandbox"][part]["complete"], true, "{last:#}");
    }
    let state = last["sandbox"]["files_and_network"]["state"].as_str().expect("words");
    assert!(state.contains("for guests"), "{state}");
    let counted = last["network"]["counters"]["NAT frames"].as_u64();
    assert!(counted.is_some_and(|n| n > 0), "{last:#}");
    // The last report has what there was when the server began to end.
    for way_out in [&running["way_out"], &last["way_out"]] {
        check_way_out(way_out, forwarded);
    }
}

/// Checks what is reported of a way out that a guest has visited, and which leads to the guest too.
fn check_way_out(way_out: &Value, forwarded: u16) {
    let forwards = way_out["forwards"].as_array().expect("a list");
    assert_eq!(forwards.len(), 2, "{way_out:#}");
    let at = format!("127.0.0.1:{forwarded}");
    assert!(forwards.iter().all(|one| one["at"] == *at && one["guest"] == GUEST), "{way_out:#}");
    let carried = forwards.iter().all(|one| {
        let moved = |what: &str| one[what].as_u64();
        let is_udp = one["protocol"] == "udp";
        one["accepted"] == 1
            && moved("bytes_from_guest") > Some(0)
            && moved("bytes_to_guest") > Some(0)
            && moved("datagrams_from_guest").is_some_and(|n| n > 0) == is_udp
            && moved("datagrams_to_guest").is_some_and(|n| n > 0) == is_udp
    });
    assert!(carried, "{way_out:#}");
    // A flow of UDP stays for a while.
    let flows = way_out["flows"].as_array().expect("a list");
    assert!(flows.iter().any(|one| one["protocol"] == "udp"), "{way_out:#}");
    assert!(flows.iter().all(|one| one["guest"].as_str().expect("words").starts_with(GUEST)));
}

/// A translator that starts when the server is confined already.
#[test]
fn a_way_out_may_begin_late() {
    if !crate::tap::is_possible() {
        return;
    }
    let path = scratch("serve late way out").join("a.sock");
    let (wire, ports) = (wires::at("qemu", &path), Ports::to_go_out());
    let options = ports.options();
    let mut arguments = vec!["--listen", &*wire];
    arguments.extend(options.iter().map(String::as_str));
    let server = Server::new(&arguments);
    drop(visit(&path, ports));
    // It was used, although no guest is there any more.
    let report = server.report("TERM");
    assert!(report["way_out"]["flows"].is_array(), "{report:#}");
}

/// Without a way out the gateway says so.
#[test]
fn a_guest_without_a_way_out_is_told_so() {
    if !crate::tap::is_possible() {
        return;
    }
    let path = scratch("serve no way out").join("a.sock");
    let server = Server::new(&["--listen", &wires::at("qemu", &path), "--no-nat"]);
    let guest = Visitor::new(&path, GUEST);
    guest.host.run(|| {
        let at = SocketAddr::from(([198, 51, 100, 1], 80));
        let error = TcpStream::connect_timeout(&at, LIMIT).expect_err("there is no way");
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "{error}");
    });
    server.report("TERM");
}
