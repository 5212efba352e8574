//! A bridge between a TAP without offload and one with it, and the kernel's own TCP and UDP on both.
//! What was merged must be right for the kernel: no checksum is bad, and the streams are what was sent.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;

use sha2::{Digest as _, Sha256};

use super::*;
use crate::host::{Host, ip};
use crate::tap::is_possible;

/// The addresses of both ends.
const V4: [&str; 2] = ["10.9.0.1", "10.9.0.2"];
const V6: [&str; 2] = ["fd09::1", "fd09::2"];
const NAMES: [&str; 2] = ["left", "right"];
/// The bytes of each stream, and the datagrams of each burst.
const STREAM: usize = 4 << 20;
const BURST: u32 = 40;
const BURSTS: u32 = 20;
/// The payload of a datagram.
const DATAGRAM: usize = 1000;

/// Bytes that no two places of a stream have alike.
fn content() -> impl Iterator<Item = u8> {
    (0_u64..).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ (i >> 16) as u8)
}

/// A counter of this thread's namespace, from a table of `/proc/net/snmp` or `/proc/net/snmp6`.
fn counter(table: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(table));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split_whitespace().position(|of| of == name).unwrap();
    values.split_whitespace().nth(at).unwrap().parse().unwrap()
}

/// Packets that this thread's namespace has received at an interface, and sent to it.
fn packets(interface: &str) -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{interface}:")));
    let fields: Vec<u64> =
        line.unwrap().split_whitespace().map(|field| field.parse().unwrap()).collect();
    [fields[1], fields[9]]
}

/// Two hosts with a bridge between them, which is told what to do by `arguments`.
struct Joined {
    hosts: [Host; 2],
    bridge: Child,
    has_v6: bool,
}

impl Joined {
    fn new(arguments: &[&str]) -> Self {
        let hosts = [Host::new(), Host::new()];
        let middle = Host::new();
        let has_v6 = Path::new("/proc/net/if_inet6").exists();
        let namespace = File::open(middle.namespace()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
        command.args(["bridge", "tap:left", "tap:right", "--json"]).args(arguments);
        // SAFETY: setns(2) takes a descriptor that the closure owns, and no memory. The child moves to
        // the namespace in the middle before it runs the command.
        unsafe {
            command.pre_exec(move || match libc::setns(namespace.as_raw_fd(), 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut bridge = command.spawn().expect("the command starts");
        // It says something when it works. Before that it may still look at its TAPs.
        let stderr = bridge.stderr.as_mut().expect("piped");
        stderr.read_exact(&mut [0; 16]).expect("it says something before it ends");
        let ids = hosts.each_ref().map(|host| {
            // /proc/PID/task/TID/ns/net: `ip` takes the number of a thread, too.
            host.namespace().split('/').nth(4).unwrap().to_owned()
        });
        middle.run(move || {
            for (name, id) in NAMES.iter().zip(ids) {
                ip(&format!("link set {name} netns {id}"));
            }
        });
        for i in 0..2 {
            hosts[i].run(move || {
                ip(&format!("address add {}/24 dev {}", V4[i], NAMES[i]));
                if has_v6 {
                    ip(&format!("-6 address add {}/64 dev {} nodad", V6[i], NAMES[i]));
                }
                ip(&format!("link set {} up", NAMES[i]));
            });
        }
        Self { hosts, bridge, has_v6 }
    }

    /// Sends a stream from one host to another, and compares what arrives.
    fn stream(&self, from: usize, to: usize, address: &'static str) {
        let address: IpAddr = address.parse().unwrap();
        let listener = self.hosts[to].run(move || TcpListener::bind((address, 0)).unwrap());
        let target = listener.local_addr().unwrap();
        let received = self.hosts[to].start(move || {
            let (mut connection, _) = listener.accept().unwrap();
            connection.set_read_timeout(Some(LIMIT)).unwrap();
            let mut bytes = Vec::with_capacity(STREAM);
            connection.read_to_end(&mut bytes).unwrap();
            (bytes.len(), Sha256::digest(&bytes))
        });
        let sent = self.hosts[from].run(move || {
            let bytes: Vec<u8> = content().take(STREAM).collect();
            let mut connection = TcpStream::connect(target).unwrap();
            connection.set_write_timeout(Some(LIMIT)).unwrap();
            connection.write_all(&bytes).unwrap();
            Sha256::digest(&bytes)
        });
        let received = received.recv_timeout(LIMIT).expect("the stream arrives in time");
        assert_eq!(received, (STREAM, sent));
    }

    /// Sends bursts of datagrams, each of which is answered.
    fn datagrams(&self, address: &'static str) {
        let address: IpAddr = address.parse().unwrap();
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = self.hosts[1].run(move || UdpSocket::bind((address, 0)).unwrap());
        let target: SocketAddr = socket.local_addr().unwrap();
        let received = self.hosts[1].start(move || {
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            let mut buffer = [0; 2 * DATAGRAM];
            for number in 0..BURSTS * BURST {
                let (len, from) = socket.recv_from(&mut buffer).unwrap();
                let mut expected = vec![number as u8; DATAGRAM];
                expected[..4].copy_from_slice(&number.to_be_bytes());
                assert_eq!(buffer[..len], expected);
                if number % BURST == BURST - 1 {
                    socket.send_to(&[], from).unwrap();
                }
            }
        });
        self.hosts[0].run(move || {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(target).unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            for number in 0..BURSTS * BURST {
                let mut datagram = vec![number as u8; DATAGRAM];
                datagram[..4].copy_from_slice(&number.to_be_bytes());
                socket.send(&datagram).unwrap();
                if number % BURST == BURST - 1 {
                    socket.recv(&mut [0; 8]).expect("the burst is answered");
                }
            }
        });
        received.recv_timeout(LIMIT).expect("the datagrams arrive in time");
    }

    /// Ends the bridge and returns its report.
    fn end(self) -> Value {
        for host in &self.hosts {
            host.run(|| {
                for (table, names) in [
                    ("Tcp:", &["InErrs", "InCsumErrors"][..]),
                    ("Udp:", &["InErrors", "InCsumErrors"]),
                ] {
                    for name in names {
                        assert_eq!(counter(table, name), 0, "{table} {name}");
                    }
                }
                // IPv6 has a table of its own for UDP.
                let text =
                    std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
                for line in text.lines().filter(|line| line.starts_with("Udp6In")) {
                    let mut fields = line.split_whitespace();
                    if fields.next().is_some_and(|name| name.ends_with("Errors")) {
                        assert_eq!(fields.next(), Some("0"), "{line}");
                    }
                }
            });
        }
        // SAFETY: the arguments are plain numbers, and the process is a child that was not waited for.
        assert_eq!(unsafe { libc::kill(self.bridge.id() as i32, libc::SIGINT) }, 0);
        let output = ended(self.bridge, &["bridge"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("one JSON object")
    }
}

/// TCP both ways and UDP, over IPv4 and IPv6. The host behind the TAP without offload sends short
/// packets, and the other one receives long ones.
#[test]
fn the_kernel_takes_what_a_bridge_has_merged() {
    if !is_possible() {
        return;
    }
    let run = |arguments: &[&str]| {
        let joined = Joined::new(arguments);
        let counts = |i: usize| joined.hosts[i].run(move || packets(NAMES[i]));
        let before = [counts(0)[1], counts(1)[0]];
        joined.stream(0, 1, V4[1]);
        if joined.has_v6 {
            joined.stream(0, 1, V6[1]);
        }
        let [sent, received] = [counts(0)[1] - before[0], counts(1)[0] - before[1]];
        joined.datagrams(V4[1]);
        if joined.has_v6 {
            joined.datagrams(V6[1]);
        }
        // The way back is cut.
        joined.stream(1, 0, V4[0]);
        let offloads = |report: &Value, i: usize| report["ends"][i]["offloads"].clone();
        let report = joined.end();
        assert_eq!(offloads(&report, 0), Value::Array(Vec::new()), "{report}");
        assert_ne!(offloads(&report, 1), Value::Array(Vec::new()), "{report}");
        (sent, received, report)
    };
    let (sent, received, report) = run(&["--offload=software", "--plain", "a"]);
    let there = &report["ways"][0];
    let number = |name: &str| there[name].as_u64().unwrap();
    assert!(received * 2 < sent, "{sent} packets were sent, and {received} received: {there}");
    assert!(number("segments_merged") > 4 * number("packets_merged"), "{there}");
    let merged = number("segments_merged") - number("packets_merged");
    assert_eq!(number("packets_read"), number("packets_written") + number("drops") + merged);
    assert!(report["ways"][1]["packets_cut"].as_u64() > Some(0), "{report}");

    let (sent, received, report) = run(&["--offload=software", "--plain", "a", "--no-merge"]);
    assert!(received * 4 > sent * 3, "{sent} packets were sent, and {received} received: {report}");
    assert_eq!(report["ways"][0]["segments_merged"], 0);
}
