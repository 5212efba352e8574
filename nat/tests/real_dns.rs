//! DNS at the gateway over the host's real sockets: resolvers of this process on loopback addresses.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmring_core::offload::{OffloadHeader, Offloads};
use vmring_nat::{Counter, Resolvers};

use crate::dns::{A, answer_to, framed, query};
use crate::real_datagram::{LONG, World, loopback};
use crate::support::datagram::{Got, udp_frame};
use crate::support::port::config;
use crate::support::script::Segment;

/// A resolver of UDP that answers what it is asked, until it is dropped.
struct Resolver {
    at: SocketAddr,
    ends: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Resolver {
    /// `None` where a family has no loopback address.
    fn new(v6: bool) -> Option<Self> {
        let Ok(socket) = UdpSocket::bind((loopback(v6), 0)) else {
            eprintln!("skipped: no loopback address (v6: {v6})");
            return None;
        };
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let at = socket.local_addr().unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let thread = thread::spawn(move || {
            let mut buffer = [0; 2000];
            // Relaxed: nothing else is told by it, and the thread is joined.
            while !ended.load(Ordering::Relaxed) {
                if let Ok((len, from)) = socket.recv_from(&mut buffer) {
                    // Somebody else's answer comes first.
                    let mut lie = answer_to(&buffer[..len], 0);
                    lie[1] ^= 1;
                    socket.send_to(&lie, from).unwrap();
                    socket.send_to(&answer_to(&buffer[..len], 0), from).unwrap();
                }
            }
        });
        Some(Self { at, ends, thread: Some(thread) })
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the resolver");
        }
    }
}

fn gateway(v6: bool) -> SocketAddr {
    if v6 { "[fd00::1]:53" } else { "192.168.64.1:53" }.parse().unwrap()
}

fn world(v6: bool, resolvers: Resolvers) -> World {
    let mut config = config(false);
    config.resolvers = resolvers;
    World::new(config, Offloads::default(), v6)
}

/// Asks, and returns what the guest gets.
fn ask(world: &mut World, v6: bool, port: u16, message: &[u8]) -> Got {
    let guest = SocketAddr::new(world.guest, port);
    world.send(&udp_frame(guest, gateway(v6), message), OffloadHeader::NONE);
    world.next("an answer")
}

fn expected(world: &World, v6: bool, port: u16, message: &[u8]) -> Got {
    let to = SocketAddr::new(world.guest, port);
    Got::Udp { from: gateway(v6), to, data: answer_to(message, 0) }
}

/// A guest asks over either family, whichever family the resolver has, and the socket goes with the answer.
#[test]
fn a_resolver_on_loopback_answers_a_guest() {
    for resolver_v6 in [false, true] {
        let Some(resolver) = Resolver::new(resolver_v6) else { continue };
        for v6 in [false, true] {
            let mut world = world(v6, Resolvers::Fixed(vec![resolver.at]));
            for port in 4000..4020 {
                let message = query(port, "example.com", A);
                let got = ask(&mut world, v6, port, &message);
                assert_eq!(got, expected(&world, v6, port, &message));
            }
            let start = Instant::now();
            while world.nat.usage() != (0, 0) {
                assert!(start.elapsed() < LONG, "a socket is left: {:?}", world.nat);
                world.turn();
            }
            let counters = world.nat.counters();
            let seen = [Counter::DnsForwarded, Counter::DnsAnswered, Counter::DnsUnasked];
            assert_eq!(seen.map(|counter| counters[counter]), [20; 3]);
        }
    }
}

/// A resolver that is gone is passed over: the system says so, and the guest's next query is answered.
#[test]
fn a_resolver_that_is_gone_is_passed_over() {
    let Some(resolver) = Resolver::new(false) else { return };
    let gone = {
        let socket = UdpSocket::bind((loopback(false), 0)).unwrap();
        socket.local_addr().unwrap()
    };
    let mut world = world(false, Resolvers::Fixed(vec![gone, resolver.at]));
    let message = query(1, "example.com", A);
    // The guest is told that the query has failed.
    let got = ask(&mut world, false, 4000, &message);
    let Got::Udp { from, data, .. } = got else { panic!("{got:?}") };
    assert_eq!((from, &data[..2], data[3] & 15), (gateway(false), &message[..2], 2));
    assert_eq!(world.nat.counters()[Counter::ResolverFailed], 1);
    let got = ask(&mut world, false, 4000, &message);
    assert_eq!(got, expected(&world, false, 4000, &message));
}

/// The file that names the host's resolvers is read, and a file that takes its place is, too.
#[test]
fn the_hosts_resolvers_come_from_its_file() {
    let folder = std::env::temp_dir().join(format!("vmring-real-dns-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("resolv.conf");
    std::fs::write(&path, "# a comment\nnameserver 127.0.0.1\nnameserver ::1 # both\n").unwrap();
    let mut world = world(false, Resolvers::Host);
    world.nat.sockets().set_resolv_conf(&path);
    assert!(world.nat.current_resolvers().is_empty());
    // Whether somebody answers there depends on the machine, and does not matter.
    let guest = SocketAddr::new(world.guest, 4000);
    let frame = udp_frame(guest, gateway(false), &query(1, "example.com", A));
    world.send(&frame, OffloadHeader::NONE);
    let list =
        |text: &[&str]| text.iter().map(|at| at.parse().unwrap()).collect::<Vec<SocketAddr>>();
    assert_eq!(world.nat.current_resolvers(), list(&["127.0.0.1:53", "[::1]:53"]));
    let other = folder.join("other");
    std::fs::write(&other, "nameserver 127.0.0.2\n").unwrap();
    std::fs::rename(&other, &path).unwrap();
    // It is looked at every few seconds.
    world.start -= Duration::from_secs(6);
    world.send(&frame, OffloadHeader::NONE);
    assert_eq!(world.nat.current_resolvers(), list(&["127.0.0.2:53"]));
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Over TCP, a query reaches the resolver and its answer the guest. One for a local name ends the
/// connection.
#[test]
fn a_connection_reaches_the_resolver() {
    for v6 in [false, true] {
        let Ok(listener) = TcpListener::bind((loopback(v6), 0)) else {
            eprintln!("skipped: no loopback address (v6: {v6})");
            continue;
        };
        let at = listener.local_addr().unwrap();
        let question = framed(&query(1, "example.com", A));
        let expected = question.clone();
        let server = thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("a connection");
            client.set_read_timeout(Some(LONG)).unwrap();
            let mut got = vec![0; expected.len()];
            client.read_exact(&mut got).expect("a query");
            assert_eq!(got, expected);
            client.write_all(&framed(&answer_to(&got[2..], 0))).expect("an answer");
            // The rest is a reset, and nothing of the local name.
            let mut rest = Vec::new();
            let end = client.read_to_end(&mut rest);
            assert!(end.is_err() && rest.is_empty(), "{end:?}: {rest:?}");
        });
        let mut world = world(v6, Resolvers::Fixed(vec![at]));
        let guest = SocketAddr::new(world.guest, 4000);
        let send = |world: &mut World, flags: &str, seq: u32, ack: u32, data: &[u8]| {
            let (flags, data) = (flags.into(), data.to_vec());
            let segment = Segment { flags, seq, ack, window: 60_000, data, ..Segment::default() };
            world.send(&segment.frame(guest, gateway(v6)), OffloadHeader::NONE);
        };
        send(&mut world, "S", 0, 0, &[]);
        let ack = world.segment("SYN,ACK", |segment| segment.flags == "S.").seq.wrapping_add(1);
        send(&mut world, ".", 1, ack, &[]);
        send(&mut world, "P.", 1, ack, &question);
        let answer = framed(&answer_to(&question[2..], 0));
        let got = world.segment("an answer", |segment| !segment.data.is_empty());
        assert_eq!(got.data, answer);
        let seq = 1 + question.len() as u32;
        let ack = ack.wrapping_add(answer.len() as u32);
        send(&mut world, "P.", seq, ack, &framed(&query(2, "host.internal", A)));
        world.segment("a reset", |segment| segment.flags.starts_with('R'));
        assert_eq!(world.nat.counters()[Counter::DnsStreamRefused], 1);
        server.join().expect("the resolver");
        assert_eq!(world.nat.usage(), (0, 0));
    }
}
