//! Frames of hostile guests, and sockets that answer at random. The translator must not panic, must
//! give guests well-formed frames only, and must stay within its limits and within a memory that does
//! not depend on the input.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vmring_core::offload::{Gso, OffloadHeader, Offloads};
use vmring_nat::{
    Capabilities, ConnectOptions, DatagramError, ForwardRule, Full, Guest, GuestFrame, Incoming,
    Link, Nat, NatConfig, Outgoing, Output, Port, Protocol, Readiness, Resolvers, Route, SendSpace,
    SocketError, Sockets, Token,
};

static IN_USE: AtomicUsize = AtomicUsize::new(0);

/// Counts the bytes in use.
struct Counting;

// SAFETY: both functions pass their arguments to `System` unchanged and return what it returns.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, and that of `System` is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller got the pointer from `alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most flows at a time.
const FLOWS: usize = 8;
/// The most port forwards of a test.
const FORWARDS: usize = 4;
/// What the translator may have in use: its scratch memory, its messages, its tables, and a spill and a
/// ring for each flow.
const MEMORY: usize = (3 << 20) + FLOWS * (64 + 256) * 1024;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    rings_only: bool,
    offload: bool,
    endpoint_independent: bool,
    /// The resolvers: how many of them.
    resolvers: u8,
    /// What the sockets answer, in turn, again and again.
    answers: [Answer; 16],
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Answer {
    Len(u16),
    Everything,
    WouldBlock,
    Reset,
    Refused,
    NoMemory,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Raw(&'a [u8]),
    Segment(Segment),
    Batch(Vec<Segment>),
    /// A step of a guest that behaves: it acknowledges what it has last got.
    Answer {
        flow: Flow,
        len: u16,
        window: u16,
        fin: bool,
    },
    Ready {
        token: u8,
        readiness: u8,
    },
    Space(u8),
    Wait {
        millis: u32,
    },
    Accept(Flow),
    Datagram {
        flow: Flow,
        echo: bool,
        len: u16,
        segment_size: Option<u16>,
        hop_limit: u8,
    },
    Forward {
        flow: Flow,
        udp: bool,
        port: u8,
    },
    Unforward {
        index: u8,
        cut: bool,
    },
    Leave {
        port: u8,
    },
    /// A message for the gateway's DNS, over UDP or behind its length over TCP.
    Query {
        flow: Flow,
        tcp: bool,
        id: u8,
        name: Name<'a>,
        kind: u16,
        /// What of the message is changed.
        flip: Option<(u8, u8)>,
        behind: &'a [u8],
    },
    /// A guest says what it is called.
    Call {
        flow: Flow,
        mac: u8,
        name: &'a [u8],
    },
    Resolvers(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Name<'a> {
    Host,
    Outside,
    Reverse(u8),
    Labels(&'a [u8]),
}

/// The names of guests are fewer than so many.
const NAMES: usize = 3 * 16 + 1;

fn resolvers(count: u8) -> Resolvers {
    let list = ["127.0.0.53:53", "[::1]:53", "192.0.2.53:53"];
    let list = list.iter().take(usize::from(count % 4)).map(|at| at.parse().unwrap());
    Resolvers::Fixed(list.collect())
}

fn query(id: u8, name: Name<'_>, kind: u16, flip: Option<(u8, u8)>, behind: &[u8]) -> Vec<u8> {
    let mut message =
        vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, behind.first().copied().unwrap_or(0) & 1];
    match name {
        Name::Host => message.extend(b"\x04hoST\x08internal\0"),
        Name::Outside => message.extend(b"\x07example\0"),
        Name::Reverse(last) => {
            message.extend([1, b'0' + last % 10]);
            message.extend(b"\x0264\x03168\x03192\x07in-addr\x04arpa\0");
        }
        Name::Labels(bytes) => {
            for label in bytes.chunks(7) {
                message.push(label.len() as u8);
                message.extend(label);
            }
            message.push(0);
        }
    }
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message.extend(behind);
    if let Some((at, bits)) = flip {
        let at = usize::from(at) % message.len();
        message[at] ^= bits;
    }
    message
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Flow {
    port: u8,
    guest_port: u8,
    v6: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Segment {
    flow: Flow,
    flags: u8,
    seq: Number,
    ack: Number,
    window: u16,
    len: u16,
    options: [u8; 8],
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Number {
    /// Counted from what the guest knows.
    Near(i16),
    Far(u32),
}

/// Sockets that answer at random, but keep to what they promise.
struct Random {
    shared: Rc<Shared>,
}

struct Shared {
    answers: [Answer; 16],
    next: Cell<usize>,
    open: Cell<usize>,
    tokens: RefCell<VecDeque<Token>>,
    ports: Cell<u16>,
}

struct Socket {
    shared: Rc<Shared>,
    /// What was received and not discarded.
    waiting: Cell<usize>,
    peer: SocketAddr,
    at: SocketAddr,
    /// The last datagram that was sent. A resolver answers with its question.
    last: RefCell<Vec<u8>>,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Socket")
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.shared.open.set(self.shared.open.get() - 1);
    }
}

impl Shared {
    fn answer(&self, all: usize) -> Result<usize, SocketError> {
        let answer = self.answers[self.next.get() % 16];
        self.next.set(self.next.get() + 1);
        match answer {
            Answer::Len(len) => Ok(all.min(len.into())),
            Answer::Everything => Ok(all),
            Answer::WouldBlock => Err(SocketError::WouldBlock),
            Answer::Reset => Err(SocketError::Reset),
            Answer::Refused => Err(SocketError::Refused),
            Answer::NoMemory => Err(SocketError::NoMemory),
        }
    }
}

impl Random {
    fn open(&self, token: Token) -> Socket {
        let any = SocketAddr::from(([192, 0, 2, 1], 80));
        self.open_to(token, any, any)
    }

    fn open_to(&self, token: Token, peer: SocketAddr, mut at: SocketAddr) -> Socket {
        if at.port() == 0 {
            let port = self.shared.ports.get();
            self.shared.ports.set(if port == u16::MAX { 1024 } else { port + 1 });
            at.set_port(port);
        }
        self.shared.open.set(self.shared.open.get() + 1);
        assert!(self.shared.open.get() <= 3 * FLOWS + FORWARDS + 1, "more sockets than flows");
        let mut tokens = self.shared.tokens.borrow_mut();
        tokens.push_back(token);
        if tokens.len() > 32 {
            tokens.pop_front();
        }
        Socket {
            shared: self.shared.clone(),
            waiting: Cell::new(0),
            peer,
            at,
            last: RefCell::default(),
        }
    }
}

fn len(slices: &[IoSliceMut<'_>]) -> usize {
    slices.iter().map(|slice| slice.len()).sum()
}

impl Sockets for Random {
    type Socket = Socket;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            peek_offset_v4: true,
            peek_offset_v6: false,
            descriptors: 100,
            udp_segments: 64,
            echo_v4: true,
            echo_v6: true,
        }
    }
    fn connect_tcp(
        &mut self,
        _: SocketAddr,
        _: &ConnectOptions,
        token: Token,
    ) -> Result<Socket, SocketError> {
        self.shared.answer(0)?;
        Ok(self.open(token))
    }
    fn adopt_tcp(&mut self, _: &Socket, token: Token) -> Result<(), SocketError> {
        self.shared.tokens.borrow_mut().push_back(token);
        self.shared.answer(0).map(drop)
    }
    fn take_error(&mut self, _: &Socket) -> Result<(), SocketError> {
        self.shared.answer(0).map(drop)
    }
    fn set_peek_offset(&mut self, _: &Socket, _: u32) -> Result<(), SocketError> {
        self.shared.answer(0).map(drop)
    }
    fn peek(&mut self, socket: &Socket, into: &mut [IoSliceMut<'_>]) -> Result<usize, SocketError> {
        let len = self.shared.answer(len(into))?;
        socket.waiting.set(socket.waiting.get() + len);
        Ok(len)
    }
    fn discard(&mut self, socket: &Socket, len: u32) -> Result<(), SocketError> {
        // What is peeked again counts again here, so there is never too little.
        assert!(socket.waiting.get() >= len as usize, "more is discarded than was received");
        self.shared.answer(0).map(drop)
    }
    fn receive(&mut self, _: &Socket, into: &mut [IoSliceMut<'_>]) -> Result<usize, SocketError> {
        self.shared.answer(len(into))
    }
    fn send(&mut self, _: &Socket, from: &[IoSlice<'_>]) -> Result<usize, SocketError> {
        match self.shared.answer(from.iter().map(|slice| slice.len()).sum()) {
            // A kernel that takes nothing says that it would block.
            Ok(0) => Err(SocketError::WouldBlock),
            other => other,
        }
    }
    fn shutdown(&mut self, _: &Socket) -> Result<(), SocketError> {
        self.shared.answer(0).map(drop)
    }
    fn keep_alive(&mut self, _: &Socket) {}
    fn reset(&mut self, _: Socket) {}
    fn send_space(&mut self, _: &Socket) -> Result<SendSpace, SocketError> {
        let free = self.shared.answer(1 << 20)? as u32;
        Ok(SendSpace { free, capacity: 1 << 20, charge: 1 << 20 })
    }
    fn arm_writable(&mut self, _: &Socket, _: Token) -> Result<(), SocketError> {
        self.shared.answer(0).map(drop)
    }
    fn local_address(&mut self, socket: &Socket) -> Result<SocketAddr, SocketError> {
        Ok(socket.at)
    }
    fn host_addresses(&mut self) -> Result<Vec<IpAddr>, SocketError> {
        self.shared.answer(0)?;
        Ok(vec![[198, 51, 100, 7].into()])
    }
    fn connect_udp(
        &mut self,
        port: u16,
        to: SocketAddr,
        token: Token,
    ) -> Result<Socket, SocketError> {
        self.shared.answer(0)?;
        Ok(self.open_to(token, to, ([0, 0, 0, 0], port).into()))
    }
    fn bind_udp(&mut self, at: SocketAddr, token: Token) -> Result<Socket, SocketError> {
        self.shared.answer(0)?;
        Ok(self.open_to(token, ([192, 0, 2, 1], 80).into(), at))
    }
    fn connect_echo(&mut self, to: IpAddr, token: Token) -> Result<Socket, SocketError> {
        self.shared.answer(0)?;
        Ok(self.open_to(token, (to, 0).into(), ([0, 0, 0, 0], 0).into()))
    }
    fn set_datagram_buffers(&mut self, _: &Socket, _: u32) {}
    fn set_ip_fields(&mut self, _: &Socket, _: bool, hop_limit: u8, dscp: u8) {
        assert!(hop_limit > 0 && dscp < 64);
    }
    fn send_datagrams(
        &mut self,
        socket: &Socket,
        _: Option<Route>,
        batch: &[Outgoing<'_>],
    ) -> Result<usize, SocketError> {
        assert!(!batch.is_empty());
        for outgoing in batch {
            let len: usize = outgoing.parts.iter().map(|part| part.len()).sum();
            if socket.peer.port() == 53 {
                let bytes: Vec<u8> = outgoing.parts.iter().flat_map(|part| part.to_vec()).collect();
                let is_query = bytes.len() >= 17 && bytes[2] & 0xf8 == 0 && bytes[4..6] == [0, 1];
                assert!(is_query, "no query goes to a resolver");
                // The domain is right behind the first label.
                let behind = bytes.get(usize::from(bytes[12]) + 13..).unwrap_or_default();
                let below = behind
                    .get(..10)
                    .is_some_and(|rest| rest.eq_ignore_ascii_case(b"\x08internal\0"));
                assert!(!below, "a local name goes to a resolver");
                *socket.last.borrow_mut() = bytes;
            }
            assert!(len <= 65_535 && !outgoing.parts.is_empty());
            let segment = usize::from(outgoing.segment);
            assert!(segment == 0 || len > segment && len.div_ceil(segment) <= 64);
        }
        Ok(self.shared.answer(batch.len())?.max(1))
    }
    fn receive_datagrams(
        &mut self,
        socket: &Socket,
        into: &mut [u8],
        stride: usize,
        found: &mut [Incoming],
    ) -> Result<usize, SocketError> {
        let count = self.shared.answer(found.len())?.max(1);
        for (found, into) in found.iter_mut().zip(into.chunks_exact_mut(stride)).take(count) {
            let len = self.shared.answer(65_507).unwrap_or(100);
            let segment = self.shared.answer(usize::from(u16::MAX)).unwrap_or(0) as u16;
            into[..8].copy_from_slice(&[
                if socket.peer.is_ipv4() { 0 } else { 129 },
                0,
                1,
                2,
                3,
                4,
                5,
                6,
            ]);
            let last = socket.last.borrow();
            if !last.is_empty() && self.shared.answer(0).is_ok() {
                into[..last.len()].copy_from_slice(&last);
                into[2] |= 0x80;
                into[3] = self.shared.answer(6).unwrap_or(0) as u8;
            }
            let other = self.shared.answer(0).is_err();
            let from = if other { ([203, 0, 113, 9], 80).into() } else { socket.peer };
            *found = Incoming { len, from, to: None, segment };
        }
        Ok(count)
    }
    fn take_datagram_error(
        &mut self,
        socket: &Socket,
        quoted: &mut [u8],
    ) -> Result<Option<DatagramError>, SocketError> {
        let quoted = self.shared.answer(quoted.len())?;
        let kind = self.shared.answer(256).unwrap_or(3) as u8;
        let offender = self.shared.answer(0).is_ok().then_some([203, 0, 113, 9].into());
        Ok(Some(DatagramError { icmp: Some((kind, 1)), offender, to: socket.peer, quoted }))
    }
    fn listen(&mut self, at: SocketAddr, _: u32, token: Token) -> Result<Socket, SocketError> {
        self.shared.answer(0)?;
        Ok(self.open_to(token, at, at))
    }
    fn accept(&mut self, _: &Socket) -> Result<(Socket, SocketAddr), SocketError> {
        self.shared.answer(0)?;
        let from = ([203, 0, 113, 9], self.shared.ports.get()).into();
        Ok((self.open_to(Token(0), from, ([192, 0, 2, 9], 0).into()), from))
    }
}

struct Out {
    link: Link,
    space: usize,
    /// The last sequence and acknowledgment number that a guest got.
    last: (u32, u32),
}

impl Output for Out {
    fn link(&self, _: Port) -> Link {
        self.link
    }
    fn send(&mut self, _: Port, frame: &[u8], header: &OffloadHeader) -> Result<(), Full> {
        assert!(frame.len() <= self.link.longest && frame.len() >= 60);
        header.validate(frame.len()).expect("the header describes the frame");
        let ethernet = EthernetFrame::new_checked(frame).expect("Ethernet");
        let (source, target, protocol, payload) = match ethernet.ethertype() {
            EthernetProtocol::Ipv4 => {
                let ip = Ipv4Packet::new_checked(ethernet.payload()).expect("IPv4");
                assert!(ip.verify_checksum());
                let (source, target) = (ip.src_addr().into(), ip.dst_addr().into());
                (source, target, ip.next_header(), ip.payload())
            }
            EthernetProtocol::Ipv6 => {
                let ip = Ipv6Packet::new_checked(ethernet.payload()).expect("IPv6");
                let (source, target) = (ip.src_addr().into(), ip.dst_addr().into());
                (source, target, ip.next_header(), ip.payload())
            }
            other => panic!("a frame of type {other}"),
        };
        if u8::from(protocol) == 6 {
            let tcp = TcpPacket::new_checked(payload).expect("TCP");
            if header.is_plain() {
                assert!(tcp.verify_checksum(&source, &target), "TCP's checksum");
            }
            self.last = (tcp.seq_number().0 as u32, tcp.ack_number().0 as u32);
        }
        if u8::from(protocol) == 17 && header.is_plain() && !self.is_fragment(frame) {
            let udp = UdpPacket::new_checked(payload).expect("UDP");
            if udp.src_port() == 53 {
                let message = udp.payload();
                assert!(message.len() >= 12 && message[2] & 0x80 > 0, "an answer");
            }
            assert_eq!(usize::from(udp.len()), payload.len());
            let addresses: (IpAddress, IpAddress) = (source, target);
            assert!(udp.verify_checksum(&addresses.0, &addresses.1), "UDP's checksum");
        }
        if header.gso == Gso::None {
            assert!(frame.len() <= self.link.mtu as usize + 14, "a frame longer than the MTU");
        }
        match self.space.checked_sub(1) {
            Some(space) => self.space = space,
            None => return Err(Full),
        }
        Ok(())
    }
}

impl Out {
    /// Whether a frame has a fragment of an IPv4 packet. One of IPv6 has another protocol.
    fn is_fragment(&self, frame: &[u8]) -> bool {
        frame[12..14] == [8, 0] && (frame[20] & 0x3f, frame[21]) != (0, 0)
    }
}

impl Flow {
    fn port(self) -> Port {
        Port(u32::from(self.port % 3))
    }

    fn addresses(self) -> (SocketAddr, SocketAddr) {
        let guest_port = u16::from(self.guest_port % 16) + 1;
        // Each port has its own.
        let host = self.port % 3 + 2;
        if self.v6 {
            let (guest, remote): (std::net::Ipv6Addr, _) =
                ("fd00::".parse().unwrap(), "2001:db8::1".parse().unwrap());
            let guest = std::net::Ipv6Addr::from(u128::from(guest) | u128::from(host));
            (SocketAddr::new(guest.into(), guest_port), SocketAddr::new(remote, 80))
        } else {
            (([192, 168, 64, host], guest_port).into(), ([192, 0, 2, 1], 80).into())
        }
    }

    /// The addresses of a flow to the gateway's DNS.
    fn to_dns(self) -> (SocketAddr, SocketAddr) {
        let gateway = if self.v6 { "[fd00::1]:53" } else { "192.168.64.1:53" };
        (self.addresses().0, gateway.parse().unwrap())
    }
}

/// The frame of a TCP segment.
fn frame(
    flow: Flow,
    flags: u8,
    seq: u32,
    ack: u32,
    window: u16,
    len: u16,
    options: &[u8],
) -> Vec<u8> {
    let (guest, remote) = flow.addresses();
    let mut tcp = vec![0; 20 + options.len() + usize::from(len)];
    tcp[..2].copy_from_slice(&guest.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&remote.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&seq.to_be_bytes());
    tcp[8..12].copy_from_slice(&ack.to_be_bytes());
    tcp[12] = ((20 + options.len()) as u8 / 4) << 4;
    tcp[13] = flags;
    tcp[14..16].copy_from_slice(&window.to_be_bytes());
    tcp[20..20 + options.len()].copy_from_slice(options);
    ip_frame((guest, remote), 6, 64, &tcp)
}

/// The frame of a datagram of UDP, or of an echo request.
fn datagram_frame(flow: Flow, echo: bool, len: u16, hop_limit: u8) -> Vec<u8> {
    let (guest, remote) = flow.addresses();
    let mut bytes = vec![7; 8 + usize::from(len % 9000)];
    let protocol = if echo {
        let (kind, protocol) = if flow.v6 { (128, 58) } else { (8, 1) };
        bytes[..2].copy_from_slice(&[kind, 0]);
        bytes[4..6].copy_from_slice(&guest.port().to_be_bytes());
        protocol
    } else {
        bytes[..2].copy_from_slice(&guest.port().to_be_bytes());
        bytes[2..4].copy_from_slice(&remote.port().to_be_bytes());
        let len = bytes.len() as u16;
        bytes[4..6].copy_from_slice(&len.to_be_bytes());
        17
    };
    ip_frame((guest, remote), protocol, hop_limit, &bytes)
}

fn ip_frame(
    (guest, remote): (SocketAddr, SocketAddr),
    protocol: u8,
    hop_limit: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = vec![2; 14];
    match (guest, remote) {
        (SocketAddr::V4(guest), SocketAddr::V4(remote)) => {
            frame[12..].copy_from_slice(&[8, 0]);
            let mut ip = vec![0; 20];
            ip[0] = 0x45;
            ip[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
            (ip[8], ip[9]) = (hop_limit, protocol);
            ip[12..16].copy_from_slice(&guest.ip().octets());
            ip[16..20].copy_from_slice(&remote.ip().octets());
            Ipv4Packet::new_unchecked(&mut ip).fill_checksum();
            frame.extend(ip);
        }
        (SocketAddr::V6(guest), SocketAddr::V6(remote)) => {
            frame[12..].copy_from_slice(&[0x86, 0xdd]);
            frame.extend([0x60, 0, 0, 0]);
            frame.extend((payload.len() as u16).to_be_bytes());
            frame.extend([protocol, hop_limit]);
            frame.extend(guest.ip().octets());
            frame.extend(remote.ip().octets());
        }
        _ => unreachable!("both are of one family"),
    }
    frame.extend(payload);
    frame
}

fn segment_frame(segment: &Segment, (seq, ack): (u32, u32)) -> Vec<u8> {
    let number = |number, base: u32| match number {
        Number::Near(offset) => base.wrapping_add_signed(offset.into()),
        Number::Far(number) => number,
    };
    let Segment { flow, flags, window, len, options, .. } = *segment;
    // What the guest has last got: its own next number is what was acknowledged.
    let (seq, ack) = (number(segment.seq, ack), number(segment.ack, seq));
    let options = if flags & 2 != 0 { &options[..] } else { &[] };
    frame(flow, flags & 0x1f, seq, ack, window, len % 9000, options)
}

fn run(input: &Input<'_>) {
    let before = IN_USE.load(Ordering::Relaxed);
    let shared = Rc::new(Shared {
        answers: input.answers,
        next: Cell::new(0),
        open: Cell::new(0),
        tokens: RefCell::new(VecDeque::new()),
        ports: Cell::new(1024),
    });
    let host = [[192, 168, 64, 254].into()];
    let (v4, v6) = ([192, 168, 64, 1].into(), "fd00::1".parse().unwrap());
    let mut config = NatConfig::new([2, 0, 0, 0, 0, 1], v4, v6);
    config.rings_only = input.rings_only;
    config.limits.flows = FLOWS;
    (config.limits.udp_flows, config.limits.echo_flows) = (FLOWS, FLOWS);
    config.endpoint_independent = input.endpoint_independent;
    config.resolvers = resolvers(input.resolvers);
    let mut now = Duration::from_secs(1);
    let mut nat = Nat::new(config, Random { shared: shared.clone() }, now);
    nat.names_mut().set("host.internal", &host).unwrap();
    let link = if input.offload {
        Link { mtu: 1500, offloads: Offloads::ALL, longest: 65_549 }
    } else {
        Link { mtu: 1500, offloads: Offloads::default(), longest: 1514 }
    };
    let mut out = Out { link, space: 100, last: (0, 0) };
    let header = OffloadHeader::NONE;
    for step in &input.steps {
        match step {
            Step::Raw(bytes) => {
                nat.from_guest(Port(0), &[GuestFrame { bytes, header }], now, &mut out);
            }
            Step::Segment(segment) => {
                let bytes = segment_frame(segment, out.last);
                let frame = GuestFrame { bytes: &bytes, header };
                nat.from_guest(segment.flow.port(), &[frame], now, &mut out);
            }
            Step::Batch(segments) => {
                let Some(first) = segments.first() else { continue };
                let frames: Vec<_> =
                    segments.iter().map(|segment| segment_frame(segment, out.last)).collect();
                let frames: Vec<_> =
                    frames.iter().map(|bytes| GuestFrame { bytes, header }).collect();
                nat.from_guest(first.flow.port(), &frames, now, &mut out);
            }
            Step::Answer { flow, len, window, fin } => {
                let (seq, ack) = out.last;
                let flags = 0x10 | u8::from(*fin);
                let bytes = frame(*flow, flags, ack, seq.wrapping_add(1), *window, len % 9000, &[]);
                nat.from_guest(flow.port(), &[GuestFrame { bytes: &bytes, header }], now, &mut out);
            }
            Step::Ready { token, readiness } => {
                let tokens = shared.tokens.borrow();
                if tokens.is_empty() {
                    continue;
                }
                let token = tokens[usize::from(*token) % tokens.len()];
                drop(tokens);
                let has = |bit| readiness & bit != 0;
                let readiness = Readiness {
                    readable: has(1),
                    writable: has(2),
                    closed: has(4),
                    urgent: has(16),
                    failed: has(8),
                };
                nat.on_ready(token, readiness, now, &mut out);
            }
            Step::Space(space) => {
                out.space = usize::from(*space);
                nat.on_space(Port(u32::from(*space) % 3), now, &mut out);
            }
            Step::Wait { millis } => now += Duration::from_millis((*millis).into()),
            Step::Accept(flow) => {
                let socket = nat.sockets().open(Token(0));
                let (guest, remote) = flow.addresses();
                let guest = (guest, [2, 0, 0, 0, 0, 2]);
                let _ = nat.accept_tcp(socket, remote, flow.port(), guest, remote, now, &mut out);
            }
            Step::Datagram { flow, echo, len, segment_size, hop_limit } => {
                let bytes = datagram_frame(*flow, *echo, *len, *hop_limit);
                let header = match segment_size {
                    Some(segment_size) => OffloadHeader {
                        gso: Gso::UdpL4,
                        segment_size: *segment_size,
                        ..OffloadHeader::NONE
                    },
                    None => header,
                };
                nat.from_guest(flow.port(), &[GuestFrame { bytes: &bytes, header }], now, &mut out);
            }
            Step::Forward { flow, udp, port } => {
                if nat.forwards().count() < FORWARDS {
                    let protocol = if *udp { Protocol::Udp } else { Protocol::Tcp };
                    let guest = flow.addresses().0;
                    let rule = ForwardRule::new(
                        protocol,
                        (*port).into(),
                        Guest::Address(guest.ip()),
                        guest.port(),
                    );
                    let _ = nat.add_forward(&rule, now, &mut out);
                }
            }
            Step::Unforward { index, cut } => {
                let info = nat.forwards().nth(usize::from(*index) % FORWARDS);
                if let Some(info) = info {
                    assert!(nat.remove_forward(info.protocol, info.at, *cut, now, &mut out));
                }
            }
            Step::Query { flow, tcp, id, name, kind, flip, behind } => {
                let message = query(*id, *name, *kind, *flip, behind);
                let (guest, gateway) = flow.to_dns();
                let ports = [guest.port().to_be_bytes(), gateway.port().to_be_bytes()].concat();
                let frame = if *tcp {
                    let (seq, ack) = out.last;
                    let mut segment = ports;
                    segment.extend(ack.to_be_bytes());
                    segment.extend(seq.wrapping_add(1).to_be_bytes());
                    // A connection is made first.
                    let flags = if kind & 3 == 3 { 2 } else { 0x18 };
                    segment.extend([0x50, flags, 0x40, 0, 0, 0, 0, 0]);
                    segment.extend((message.len() as u16).to_be_bytes());
                    segment.extend(message);
                    ip_frame((guest, gateway), 6, 64, &segment)
                } else {
                    let mut datagram = ports;
                    datagram.extend((8 + message.len() as u16).to_be_bytes());
                    datagram.extend([0, 0]);
                    datagram.extend(message);
                    ip_frame((guest, gateway), 17, 64, &datagram)
                };
                nat.from_guest(flow.port(), &[GuestFrame { bytes: &frame, header }], now, &mut out);
            }
            Step::Call { flow, mac, name } => {
                let address = flow.addresses().0.ip();
                let mac = [2, 0, 0, 0, flow.port % 3, *mac];
                let _ = nat.names_mut().lease(flow.port(), mac, name, address);
            }
            Step::Resolvers(count) => nat.set_resolvers(resolvers(*count)),
            Step::Leave { port } => nat.port_left(Port(u32::from(port % 3)), now, &mut out),
        }
        nat.on_time(now, &mut out);
        let (_, descriptors) = nat.usage();
        assert_eq!(descriptors, shared.open.get(), "descriptors");
        assert!(descriptors <= 3 * FLOWS + FORWARDS);
        assert!(nat.datagram_flows().count() <= 2 * FLOWS);
        assert!(nat.tcp_flows().count() <= FLOWS);
        assert!(nat.names().iter().count() <= NAMES, "names");
        let (_, addresses) = nat.names().iter().find(|(name, _)| *name == "host.internal").unwrap();
        assert_eq!(addresses, host, "a guest is the host");
        let used = IN_USE.load(Ordering::Relaxed) - before;
        assert!(used < MEMORY, "{used} bytes in use");
    }
    nat.close(now, &mut out);
    assert_eq!((nat.usage(), shared.open.get()), ((0, 0), 0));
}

fuzz_target!(|input: Input<'_>| run(&input));
