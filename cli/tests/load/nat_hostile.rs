//! A hostile guest beside one that fetches by TCP through the way out of `vmring serve`.
//!
//! The hostile guest sends SYN, datagrams to 65,000 ports, fragments, packets in the name of others, bad
//! TCP, and packets to addresses that no guest reaches, all together. What it leaves to the other guest is
//! compared with what a guest leaves that sends as many frames of the same lengths, but all of them
//! datagrams to one server that answers nothing. So what the machine spends on so many frames, in this
//! program as well as in the server, counts for both. Both take turns, each before the other as often as
//! after it, so that what else the machine does counts for both too.

use std::fmt;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::host::ip;
use crate::visitor::Visitor;
use crate::way_out::{Halves, Stop, serve_outside};
use crate::world::{HOST, OUTSIDE, World};
use crate::{FLOOD, LEAST, Server, connected, frames, until};

/// The hostile guest's address, and the good guest's.
const HOSTILE: [u8; 4] = [192, 168, 64, 66];
const GOOD: &str = "192.168.64.2";
const GATEWAY: [u8; 4] = [192, 168, 64, 1];
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x66, 0x66, 0x66];
/// An address outside that never answers.
const BLACK_HOLE: [u8; 4] = [203, 0, 113, 66];
const SERVER: [u8; 4] = [203, 0, 113, 1];
const HOST_ADDRESS: [u8; 4] = [203, 0, 113, 2];
const METADATA: [u8; 4] = [169, 254, 169, 254];
/// The port at which the good guest's server is, and one at which nobody may be reached.
const PORT: u16 = 80;
const FORBIDDEN: u16 = 8000;
/// The port of the server that answers nothing, over UDP, and of one that ends each connection, over TCP.
const SINK: u16 = 9;
/// How many different frames there are. They repeat in this order.
const FRAMES: usize = 130_000;
/// How long a round takes, of those with the hostile load, and how many there are at least.
const ROUND: u64 = 10;
const ROUNDS: u64 = 5;
/// [`fetch`] has to end within the time that a job of a host may take.
const PIECE: Duration = Duration::from_secs(5);
/// A run is shorter than this only to see that it runs. Its figures mean nothing.
const MEANINGFUL: u64 = 60;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The Internet checksum (RFC 1071).
fn checksum(pieces: &[&[u8]]) -> [u8; 2] {
    let bytes = pieces.concat();
    let word = |two: &[u8]| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// A frame as it is on the wire of a stream: its length, and its bytes. `fragment` is the field of IPv4 with
/// the flags and the offset.
fn packet(
    gateway: [u8; 6],
    (from, to): ([u8; 4], [u8; 4]),
    (protocol, fragment): (u8, u16),
    mut payload: Vec<u8>,
) -> Vec<u8> {
    let len = (payload.len() as u16).to_be_bytes();
    let at = if protocol == TCP { 16 } else { 6 };
    if payload.len() > at + 1 {
        let sum = checksum(&[&from, &to, &[0, protocol], &len, &payload]);
        payload[at..at + 2].copy_from_slice(&sum);
    }
    let total = (20 + payload.len() as u16).to_be_bytes();
    let mut ip =
        [&[0x45, 0], &total[..], &[0, 1], &fragment.to_be_bytes(), &[64, protocol, 0, 0]].concat();
    ip.extend([from, to].concat());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum);
    let len = ((14 + ip.len() + payload.len()) as u32).to_be_bytes();
    [&len[..], &gateway, &MAC, &[8, 0], &ip, &payload].concat()
}

/// A segment of TCP without a checksum.
fn segment(from: u16, to: u16, (seq, ack): (u32, u32), flags: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = [from.to_be_bytes(), to.to_be_bytes()].concat();
    bytes.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
    bytes.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(data);
    bytes
}

/// A datagram of UDP without a checksum.
fn datagram(from: u16, to: u16, len: usize) -> Vec<u8> {
    let mut bytes = [from.to_be_bytes(), to.to_be_bytes()].concat();
    bytes.extend([((8 + len) as u16).to_be_bytes(), [0, 0]].concat());
    bytes.resize(8 + len, 0x5a);
    bytes
}

/// One of the hostile frames.
fn hostile(gateway: [u8; 6], number: usize) -> Vec<u8> {
    const SYN: u8 = 2;
    let (port, seq) =
        (1024 + (number * 7 % 64_000) as u16, (number as u32).wrapping_mul(0x9e37_79b9));
    let packet = |between, kind, payload| packet(gateway, between, kind, payload);
    let outside = (HOSTILE, SERVER);
    match number % 10 {
        // Half go where nobody answers, and a quarter to a server that does.
        0 | 1 => packet((HOSTILE, BLACK_HOLE), (TCP, 0), segment(port, PORT, (seq, 0), SYN, &[])),
        2 => packet(outside, (TCP, 0), segment(port, SINK, (seq, 0), SYN, &[])),
        3 | 4 => {
            let to = 1 + (number / 10 * 2 + number % 2) % 65_000;
            packet(outside, (UDP, 0), datagram(5000, to as u16, 100 + number % 400))
        }
        5 => {
            // The pieces are of datagrams that never become whole: first pieces, and pieces of everywhere.
            let offset = (number / 10 % 4000) as u16;
            let fragment = if number % 20 < 10 { 0x2000 } else { 0x2000 | offset };
            packet(outside, (UDP, fragment), datagram(5001, 7, 800))
        }
        6 => {
            let from = match number / 10 % 4 {
                0 => [192, 168, 64, 2],
                1 => GATEWAY,
                2 => SERVER,
                _ => [10, 0, (number >> 8) as u8, number as u8],
            };
            packet((from, SERVER), (TCP, 0), segment(port, SINK, (seq, 0), SYN, &[]))
        }
        7 | 8 => {
            // Any flags, sequence numbers of anywhere, and data.
            let flags = (number / 10 % 256) as u8;
            let ports = (1024 + (number % 500) as u16, SINK);
            let data = vec![0x5a; number % 600];
            let mut bytes = segment(ports.0, ports.1, (seq, seq.rotate_left(7)), flags, &data);
            if number % 70 == 7 {
                // A header longer than the packet.
                bytes[12] = 0xf0;
                bytes.truncate(20);
            }
            packet(outside, (TCP, 0), bytes)
        }
        _ => {
            let to = match number / 10 % 5 {
                0 => [127, 0, 0, 1],
                1 => METADATA,
                2 => HOST_ADDRESS,
                3 => GATEWAY,
                _ => [224, 0, 0, (number % 256) as u8],
            };
            let tcp = segment(port, FORBIDDEN, (seq, 0), SYN, &[]);
            match number / 50 % 2 {
                0 => packet((HOSTILE, to), (TCP, 0), tcp),
                _ => packet((HOSTILE, to), (UDP, 0), datagram(port, FORBIDDEN, 30)),
            }
        }
    }
}

/// A datagram to the server that answers nothing, whose frame is as long as another one.
fn harmless(gateway: [u8; 6], like: &[u8]) -> Vec<u8> {
    let data = (like.len() - 4).saturating_sub(14 + 20 + 8);
    packet(gateway, (HOSTILE, SERVER), (UDP, 0), datagram(5002, SINK, data))
}

/// Asks for the gateway's MAC address, by which the network learns the guest's.
fn find_gateway(socket: &mut UnixStream) -> [u8; 6] {
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &MAC, &HOSTILE, &[0; 6], &GATEWAY].concat();
    let mut frame = [&[0xff; 6][..], &MAC, &[8, 6], &arp].concat();
    frame.resize(60, 0);
    let len = (frame.len() as u32).to_be_bytes();
    socket.write_all(&[&len[..], &frame].concat()).expect("the server reads");
    let mut found = None;
    until("the gateway answers", || {
        let mut len = [0; 4];
        if socket.read_exact(&mut len).is_ok() {
            let mut frame = vec![0; u32::from_be_bytes(len) as usize];
            socket.read_exact(&mut frame).expect("the rest of a frame");
            let is_answer = frame[12..14] == [8, 6] && frame[20..22] == [0, 2];
            found = is_answer.then(|| frame[22..28].try_into().expect("six bytes"));
        }
        found.is_some()
    });
    found.expect("it was found")
}

/// What a guest sends, over and over.
struct Load {
    bytes: Vec<u8>,
    /// Where each frame begins, and the last one ends.
    starts: Vec<usize>,
}

impl Load {
    fn new(frame: impl Fn(usize) -> Vec<u8>) -> Self {
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for number in 0..FRAMES {
            bytes.extend(frame(number));
            starts.push(bytes.len());
        }
        Self { bytes, starts }
    }

    /// Sends [`FLOOD`] frames each second, and counts them.
    fn send(&self, socket: &mut UnixStream, stop: &Stop, sent: &AtomicU64) {
        let (step, mut next, mut due) = (FLOOD as usize / 1000, 0, Instant::now());
        while !stop.is_told() {
            let end = (next + step).min(FRAMES);
            let batch = &self.bytes[self.starts[next]..self.starts[end]];
            socket.write_all(batch).expect("the server reads");
            sent.fetch_add((end - next) as u64, Ordering::Relaxed);
            next = end % FRAMES;
            // What could not be sent in time is not sent later.
            due = (due + Duration::from_millis(1)).max(Instant::now());
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
}

/// The good guest reads what a server outside sends for so long. Returns bytes per second.
fn fetch(good: &Visitor, time: Duration) -> f64 {
    good.host.run(move || {
        let mut stream = TcpStream::connect((OUTSIDE, PORT)).expect("the server is reached");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let (mut bytes, mut got, start) = (vec![0; 1 << 18], 0_u64, Instant::now());
        while start.elapsed() < time {
            let len = stream.read(&mut bytes).expect("the stream goes on");
            assert!(len > 0, "the stream has ended");
            got += len as u64;
        }
        got as f64 / start.elapsed().as_secs_f64()
    })
}

/// Measures what the good guest gets beside a load, in pieces, and what rate the load has reached.
fn measure(
    socket: &UnixStream,
    load: &Arc<Load>,
    good: &Visitor,
    time: Duration,
    mut look: impl FnMut(),
) -> (f64, f64) {
    let (stop, sent) = (Stop::default(), Arc::new(AtomicU64::new(0)));
    let sender = {
        let (mut socket, stop) = (socket.try_clone().expect("the same socket"), stop.clone());
        let (load, sent) = (load.clone(), sent.clone());
        thread::spawn(move || load.send(&mut socket, &stop, &sent))
    };
    thread::sleep(Duration::from_millis(300));
    let (start, before) = (Instant::now(), sent.load(Ordering::Relaxed));
    let mut pieces = Vec::new();
    while start.elapsed() < time {
        pieces.push(fetch(good, PIECE.min(time)));
        look();
    }
    let rate = (sent.load(Ordering::Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
    stop.tell();
    sender.join().expect("the server reads what the guest sends");
    (median(&mut pieces), rate)
}

/// What was measured in each round: bytes per second, and frames per second of the load.
#[derive(Default)]
struct Columns {
    speeds: Vec<f64>,
    rates: Vec<f64>,
}

impl Columns {
    fn push(&mut self, speed: f64, rate: f64) {
        self.speeds.push(speed);
        self.rates.push(rate);
    }
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut speeds, mut rates) = (self.speeds.clone(), self.rates.clone());
        let (speed, rate) = (median(&mut speeds) / 1e6, median(&mut rates));
        let (least, most) = (speeds[0] / 1e6, speeds[speeds.len() - 1] / 1e6);
        write!(f, "{speed:.0} MB/s ({least:.0} to {most:.0}) at {rate:.0} frames/s")
    }
}

/// The one in the middle. The numbers are in order afterwards.
fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Runs the hostile load for so many seconds altogether.
pub(crate) fn run(seconds: u64) -> bool {
    let world = World::new();
    world.host.run(|| {
        ip("neighbour add 203.0.113.66 lladdr 02:00:00:00:00:66 dev w0 nud permanent");
        ip("address add 169.254.169.254/32 dev lo");
    });
    // Nobody reaches these.
    let forbidden = world.host.run(|| {
        [HOST, "127.0.0.1", "169.254.169.254"].map(|address| {
            let listener = TcpListener::bind((address, FORBIDDEN)).expect("a port");
            listener.set_nonblocking(true).expect("a socket");
            let socket = UdpSocket::bind((address, FORBIDDEN)).expect("a port");
            socket.set_nonblocking(true).expect("a socket");
            (listener, socket)
        })
    });
    let sink = world.outside.run(|| UdpSocket::bind((OUTSIDE, SINK)).expect("a port"));
    serve_outside(&world, &[OUTSIDE.to_owned()], PORT, |mut stream| {
        let bytes = vec![0x5a; 1 << 18];
        loop {
            stream.write_all(&bytes)?;
        }
    });
    let end = world.outside.run(|| TcpListener::bind((OUTSIDE, SINK)).expect("a port"));
    thread::spawn(move || end.incoming().for_each(drop));
    let command = world.host.command(env!("CARGO_BIN_EXE_vmring"));
    let server = Server::start_by(command, &["qemu"], "");
    let good = Visitor::new(&server.at("qemu"), GOOD);
    let mut socket = connected(&server.at("qemu"));
    let gateway = find_gateway(&mut socket);
    let bad = Arc::new(Load::new(|number| hostile(gateway, number)));
    let fair = Arc::new(Load::new(|number| harmless(gateway, &hostile(gateway, number))));
    // What comes for the hostile guest is read.
    let stop = Stop::default();
    let (reading, stopped) = (socket.try_clone().expect("the same socket"), stop.clone());
    let reader = thread::spawn(move || frames(reading, stopped.flag(), |_| {}));
    let rounds = (seconds / ROUND).max(ROUNDS) as u32;
    let time = Duration::from_secs(seconds) / rounds;
    let mut alone = Vec::new();
    let (mut ratios, mut halves) = (Vec::new(), Halves::default());
    let (mut fair_all, mut bad_all) = (Columns::default(), Columns::default());
    for round in 0..rounds {
        alone.push(fetch(&good, time.min(Duration::from_secs(1))));
        let measure_fair = || measure(&socket, &fair, &good, time.min(PIECE), || {});
        // The first rounds open what the limits allow.
        let mut look = || halves.add(round >= rounds / 2, server.sample());
        let mut measure_bad = || measure(&socket, &bad, &good, time, &mut look);
        let ((beside_fair, fair_rate), (beside_bad, bad_rate)) = match round % 2 {
            0 => {
                let fair = measure_fair();
                (fair, measure_bad())
            }
            _ => {
                let bad = measure_bad();
                (measure_fair(), bad)
            }
        };
        let ratio = beside_bad / beside_fair;
        println!(
            "round {round}: {:.0} MB/s beside {fair_rate:.0} harmless frames/s, {:.0} MB/s beside \
             {bad_rate:.0} hostile frames/s: {:.0} %; {}",
            beside_fair / 1e6,
            beside_bad / 1e6,
            ratio * 100.0,
            server.sample()
        );
        ratios.push(ratio);
        fair_all.push(beside_fair, fair_rate);
        bad_all.push(beside_bad, bad_rate);
    }
    stop.tell();
    reader.join().expect("the server does not cut the guest off");
    let mut good_enough = halves.are_flat();
    for (listener, socket) in &forbidden {
        let at = listener.local_addr().expect("its address");
        if listener.accept().is_ok() || socket.recv(&mut [0; 2000]).is_ok() {
            println!("the hostile guest has reached {at}");
            good_enough = false;
        }
    }
    let ratio = median(&mut ratios);
    println!("alone: {:.0} MB/s", median(&mut alone) / 1e6);
    println!("beside harmless frames: {fair_all}");
    println!("beside hostile frames: {bad_all}");
    println!(
        "median of the rounds: {:.0} % ({:.0} to {:.0}), and {:.0} % are wanted",
        ratio * 100.0,
        ratios[0] * 100.0,
        ratios[ratios.len() - 1] * 100.0,
        LEAST * 100.0
    );
    if seconds < MEANINGFUL {
        println!("the run is too short for its figures to mean something");
    } else {
        good_enough &= ratio >= LEAST;
    }
    drop((good, socket, sink));
    server.end();
    good_enough
}
