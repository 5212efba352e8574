//! Offload between guests and a TAP: what both do passes uncut, and who does not do it gets frames with
//! valid checksums.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};

use super::guest::{Guest, Header, mac};
use super::tap::{HOST, address, host_mac, in_namespace, set_up};
use super::*;
use crate::host::ip;
use crate::tap::is_possible;

const PORT: u16 = 4790;
/// What an Ethernet frame of MTU 1500 has at most.
const PLAIN: usize = 1514;
/// The payload of a TCP segment at MTU 1500.
const SEGMENT: usize = 1460;
/// Ethernet's, IPv4's and TCP's headers.
const HEADERS: usize = 54;
/// The window of the guest is a megabyte: 65,535 times 2^4.
const SCALE: u8 = 4;

/// The guest's end of a TCP connection, as simple as can be: it takes what comes in order.
struct Tcp<'a> {
    guest: &'a mut Guest,
    number: u8,
    host: Vec<u8>,
    port: u16,
    sent: u32,
    received: u32,
    /// What the host has acknowledged, its window, and the scale of that.
    acknowledged: u32,
    window: u32,
    scale: u8,
    /// The lengths of frames with data.
    lengths: Vec<usize>,
}

fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|two| [two[0], two.get(1).copied().unwrap_or(0)]);
    words.map(|word| u32::from(u16::from_be_bytes(word))).sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of TCP's pseudo-header.
fn pseudo(addresses: &[u8], len: usize) -> u32 {
    sum(addresses) + 6 + len as u32
}

/// A frame with a TCP segment, and its header. If it is longer than the MTU allows, the rest is left to
/// others.
fn frame(macs: &[u8], from: [u8; 4], to: [u8; 4], mut tcp: Vec<u8>) -> (Header, Vec<u8>) {
    let len = (20 + tcp.len()) as u16;
    let mut ip = [&[0x45, 0][..], &len.to_be_bytes(), &[0; 4], &[64, 6, 0, 0], &from, &to].concat();
    let checksum = !folded(sum(&ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let is_large = HEADERS + SEGMENT < 34 + tcp.len();
    let of_addresses = pseudo(&[from, to].concat(), tcp.len());
    let checksum = match is_large {
        true => folded(of_addresses),
        false => !folded(of_addresses + sum(&tcp)),
    };
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    let mut header: Header = [0; 12];
    if is_large {
        // NEEDS_CSUM, TCPV4, the headers' length, the segments', where the checksum begins and is.
        header[..2].copy_from_slice(&[1, 1]);
        let numbers = [HEADERS as u16, SEGMENT as u16, 34, 16];
        for (at, number) in numbers.into_iter().enumerate() {
            header[2 + 2 * at..4 + 2 * at].copy_from_slice(&number.to_le_bytes());
        }
    }
    (header, [macs, &[8, 0], &ip, &tcp].concat())
}

/// Sends a frame with its header to the guests of the TAP, as the host's kernel does.
fn send_from_host(header: &Header, packet: &[u8]) {
    // SAFETY: the call takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call has just opened it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeroes are a valid address of this family.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    // SAFETY: the name ends with a zero.
    to.sll_ifindex = unsafe { libc::if_nametoindex(c"t0".as_ptr()) } as i32;
    let (on, fd) = (1_i32, socket.as_raw_fd());
    // This header has ten bytes, without the count of buffers (packet(7)).
    let bytes = [&header[..10], packet].concat();
    let size = |len: usize| len as libc::socklen_t;
    // SAFETY: the pointers are to values that live until the calls return, with their lengths.
    let sent = unsafe {
        let option = (&raw const on).cast();
        let set = libc::setsockopt(fd, libc::SOL_PACKET, PACKET_VNET_HDR, option, size(4));
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        let (address, len) = ((&raw const to).cast(), size(size_of::<libc::sockaddr_ll>()));
        libc::sendto(fd, bytes.as_ptr().cast(), bytes.len(), 0, address, len)
    };
    assert_eq!(sent, bytes.len() as isize, "{}", std::io::Error::last_os_error());
}

/// `PACKET_VNET_HDR` of the kernel's `linux/if_packet.h`.
const PACKET_VNET_HDR: i32 = 15;

impl<'a> Tcp<'a> {
    /// Connects to the host.
    fn connect(guest: &'a mut Guest, number: u8, port: u16) -> Self {
        let host = host_mac(guest, number);
        let (sent, received, acknowledged, window, scale) = (1, 0, 0, 0, 0);
        let lengths = Vec::new();
        let mut tcp = Self {
            guest,
            number,
            host,
            port,
            sent,
            received,
            acknowledged,
            window,
            scale,
            lengths,
        };
        tcp.send(&[2, 4, 5, 0xb4, 1, 3, 3, SCALE], 0x02, &[]);
        tcp.sent = 2;
        let answer = tcp.segment();
        assert_eq!(tcp.acknowledged, tcp.sent);
        assert_eq!(answer[47] & 0x12, 0x12, "it is SYN and ACK");
        tcp.received = u32::from_be_bytes(answer[38..42].try_into().expect("four bytes")) + 1;
        let options = &answer[54..34 + usize::from(answer[46] >> 4) * 4];
        let scale = options.windows(2).position(|pair| pair == [3, 3]).expect("the window's scale");
        tcp.scale = options[scale + 2];
        tcp.send(&[], 0x10, &[]);
        tcp
    }

    /// Sends a segment. If it has more data than a frame, the rest is left to others.
    fn send(&mut self, options: &[u8], flags: u8, data: &[u8]) {
        let ports = [self.port.to_be_bytes(), PORT.to_be_bytes()].concat();
        let numbers = [self.sent.to_be_bytes(), self.received.to_be_bytes()].concat();
        let shape = [((20 + options.len()) / 4 * 16) as u8, flags, 0xff, 0xff, 0, 0, 0, 0];
        let tcp = [&ports, &numbers, &shape[..], options, data].concat();
        let macs = [&self.host[..], &self.guest.mac].concat();
        let (header, packet) = frame(&macs, address(self.number), HOST, tcp);
        self.guest.send_with(&header, &packet);
    }

    /// Asks for the host's window, with a segment that the host has had.
    fn ask(&mut self) {
        self.sent -= 1;
        self.send(&[], 0x10, &[]);
        self.sent += 1;
    }

    fn segment(&mut self) -> Vec<u8> {
        self.segment_within(LIMIT).expect("a segment comes")
    }

    /// The next segment of the connection, if one comes in this time. Its checksum is valid, or left to
    /// the guest, which has said that it can bear that.
    fn segment_within(&mut self, time: Duration) -> Option<Vec<u8>> {
        let start = Instant::now();
        loop {
            let left = time.saturating_sub(start.elapsed());
            let (header, packet) = self.guest.receive_with_header_within(left)?;
            let is_tcp = packet[12..14] == [8, 0] && packet[23] == 6;
            // The host may still say something of a connection that was.
            if packet[..6] != self.guest.mac || !is_tcp || packet[36..38] != self.port.to_be_bytes()
            {
                continue;
            }
            let ip_len = usize::from(u16::from_be_bytes([packet[16], packet[17]]));
            let tcp = &packet[34..14 + ip_len];
            assert_eq!(folded(sum(&packet[14..34])), 0xffff, "IPv4's checksum");
            let of_addresses = pseudo(&packet[26..34], tcp.len());
            if header[0] & 1 == 1 {
                assert_ne!(self.guest.features & 2, 0, "it was not negotiated");
                let partial = u16::from_be_bytes([tcp[16], tcp[17]]);
                assert_eq!(partial, folded(of_addresses), "a partial checksum");
            } else {
                assert_eq!(folded(of_addresses + sum(tcp)), 0xffff, "TCP's checksum");
                assert_eq!(header[1], 0, "a large packet has a partial checksum");
                assert!(packet.len() <= PLAIN, "{} bytes at MTU 1500", packet.len());
            }
            self.acknowledged = u32::from_be_bytes(tcp[8..12].try_into().expect("four bytes"));
            self.window = u32::from(u16::from_be_bytes([tcp[14], tcp[15]])) << self.scale;
            return Some(packet[..14 + ip_len].to_vec());
        }
    }

    /// Receives this much.
    fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            let segment = self.segment();
            let number = u32::from_be_bytes(segment[38..42].try_into().expect("four bytes"));
            let data = &segment[34 + usize::from(segment[46] >> 4) * 4..];
            if !data.is_empty() {
                self.lengths.push(segment.len());
                if number == self.received {
                    all.extend(data);
                    self.received = self.received.wrapping_add(data.len() as u32);
                }
                self.send(&[], 0x10, &[]);
            }
        }
        all
    }
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// What goes from the host to the guest, and what goes back in each frame.
const THERE: usize = 2 << 20;
const BACK: usize = 44 * SEGMENT;

/// Sends to the guest, and twice from the guest in frames of this length. Returns the lengths of the
/// frames that the guest got.
fn talk(guest: &mut Guest, number: u8, frame: usize) -> Vec<usize> {
    let listener = TcpListener::bind((std::net::Ipv4Addr::from(HOST), PORT)).expect("a socket");
    let host = thread::spawn(move || {
        let (mut socket, _): (TcpStream, _) = listener.accept().expect("a connection");
        socket.set_read_timeout(Some(LIMIT)).expect("a timeout");
        let mut heard = vec![0; 2 * BACK];
        socket.read_exact(&mut heard).expect("what the guest sends");
        socket.write_all(&bytes(THERE)).expect("it is sent");
        heard
    });
    // The host knows the guest, which would not answer if it asked.
    let mac = guest.mac.map(|byte| format!("{byte:02x}")).join(":");
    let to = std::net::Ipv4Addr::from(address(number));
    ip(&format!("neigh replace {to} lladdr {mac} dev t0 nud permanent"));
    static PORTS: AtomicU16 = AtomicU16::new(1000);
    let mut tcp = Tcp::connect(guest, number, PORTS.fetch_add(1, Ordering::Relaxed));
    for data in bytes(2 * BACK).chunks(frame) {
        // The host tells of its window when it has read much, but not each time.
        let start = Instant::now();
        while tcp.sent - tcp.acknowledged + data.len() as u32 > tcp.window {
            if tcp.segment_within(Duration::from_secs(1)).is_none() {
                assert!(start.elapsed() < LIMIT, "the host's window stays at {}", tcp.window);
                tcp.ask();
            }
        }
        tcp.send(&[], 0x18, data);
        tcp.sent += data.len() as u32;
    }
    let there = tcp.receive(THERE);
    assert!(there == bytes(THERE), "it arrives as it was sent");
    let lengths = std::mem::take(&mut tcp.lengths);
    let heard = host.join().expect("the host ends");
    assert!(heard == bytes(2 * BACK), "it arrives as it was sent");
    lengths
}

/// A counter of the report's part, which is absent if it is 0.
fn counter(of: &Value, name: &str) -> u64 {
    of[name].as_u64().unwrap_or(0)
}

/// The packets and bytes that a TAP has got from the guests, by its kernel.
fn taken_by_the_kernel() -> [u64; 2] {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").expect("/proc");
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix("t0:")).expect("t0");
    let mut numbers = line.split_whitespace().map(|number| number.parse().expect("a number"));
    let bytes = numbers.next().expect("bytes");
    [numbers.next().expect("packets"), bytes]
}

/// Goal: TCP between a guest that offloads and the host goes through in packets of 64 KiB, both ways, with
/// their headers, and nobody on the way cuts one or completes a checksum. A guest on a socket without
/// offload, and one that does not accept it, get frames of the MTU with valid checksums.
#[test]
fn what_guest_and_tap_offload_passes_uncut() {
    if !is_possible() {
        return;
    }
    in_namespace(|| {
        if !set_up() {
            return;
        }
        for engine in super::tap::engines() {
            through_a_tap(engine);
        }
    });
}

fn through_a_tap(engine: &str) {
    let folder = scratch(&format!("serve offload {engine}"));
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.join(format!("{name}.sock")));
    let plain = format!("{},offload=off", listen(&b));
    let sockets = ["--listen", &listen(&a), "--listen", &plain, "--listen", &listen(&c)];
    let network = ["--network", "tap:t0", "--engine", engine];
    let server = Server::on(&[&network[..], &sockets].concat());
    let before = taken_by_the_kernel();
    let mut large = Guest::new(&a, mac(1));
    large.post(250);
    let (mut lengths, mut talks) = (Vec::<usize>::new(), 0);
    let start = Instant::now();
    // How much the kernel puts into one frame depends on how fast it goes, and a host that had to wait
    // for an answer goes slowly until the end.
    while lengths.iter().all(|&len| len <= 2 * PLAIN) {
        let most = lengths.iter().max();
        assert!(start.elapsed() < LIMIT, "the longest of {} frames: {most:?} bytes", lengths.len());
        lengths.extend(talk(&mut large, 1, BACK));
        talks += 1;
    }
    let mut tcp = [&[0; 12][..], &[0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]].concat();
    tcp.extend(bytes(BACK));
    let host = host_mac(&mut large, 1);
    let macs = [&large.mac[..], &host].concat();
    let (header, packet) = frame(&macs, HOST, address(1), tcp);
    assert!(packet.len() > 64_000);
    send_from_host(&header, &packet);
    let whole = loop {
        let received = large.receive_with_header_within(LIMIT).expect("the packet comes");
        if received.1.len() > PLAIN {
            break received;
        }
    };
    // The count of buffers is the device's.
    assert!(whole.0[..10] == header[..10] && whole.1 == packet, "it has changed: {:x?}", whole.0);
    drop(large);
    let taken = taken_by_the_kernel();
    let [packets, octets] = [0, 1].map(|i| taken[i] - before[i]);
    assert!(octets > 2 * BACK as u64, "{octets} bytes");
    // Each time two packets with data, which would be 88 if they were cut; the others answer what the
    // guest has got, and ask for the window.
    let most = lengths.len() as u64 + 40 * talks;
    assert!(packets <= most, "{packets} for {} frames in {talks} talks", lengths.len());
    let report = server.report("TERM");
    assert_eq!(counter(&report["sockets"][0]["counts"], "rx_software"), 0, "{report:#}");
    let of_ports =
        [&report["sockets"][0]["port_counters"], &report["uplink"]["ends"][1]["counters"]];
    for counters in of_ports {
        for work in ["cut in software", "checksums completed"] {
            assert_eq!(counter(counters, work), 0, "{report:#}");
        }
    }
    for way in 0..2 {
        let way = &report["uplink"]["ways"][way];
        assert_eq!((counter(way, "packets_cut"), counter(way, "checksums_completed")), (0, 0));
        assert_eq!(counter(way, "drops"), 0, "{report:#}");
    }

    let server = Server::on(&[&network[..], &sockets].concat());
    let mut switched_off = Guest::new(&b, mac(2));
    let mut refusing = Guest::without_offload(&c, mac(3));
    for (guest, number) in [(&mut switched_off, 2), (&mut refusing, 3)] {
        guest.post(250);
        let lengths = talk(guest, number, SEGMENT);
        assert_eq!(lengths.iter().max(), Some(&PLAIN));
    }
    drop((switched_off, refusing));
    let report = server.report("TERM");
    let uplink = &report["uplink"]["ends"][1]["counters"];
    assert!(counter(uplink, "cut in software") > 0, "the switch has cut for a port: {report:#}");
    let device = &report["sockets"][2]["counts"];
    for copied in ["rx_software", "rx_copied"] {
        assert_eq!(counter(device, copied), 0, "the device has no work left: {report:#}");
    }

    // Where no guest may offload, the kernel cuts.
    let server = Server::on(&[&network[..], &["--listen", &plain]].concat());
    let mut guest = Guest::new(&b, mac(2));
    guest.post(250);
    assert_eq!(talk(&mut guest, 2, SEGMENT).iter().max(), Some(&PLAIN));
    let report = server.report("TERM");
    assert_eq!(report["uplink"]["ends"][0]["offloads"], serde_json::json!([]));
    assert_eq!(counter(&report["uplink"]["ends"][1]["counters"], "cut in software"), 0);
}
