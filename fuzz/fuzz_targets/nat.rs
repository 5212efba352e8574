//! Frames of hostile guests, and sockets that answer at random. The translator must not panic, must
//! give guests well-formed frames only, and must stay within its limits and within a memory that does
//! not depend on the input.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, Ipv4Packet, Ipv6Packet, TcpPacket};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vmring_core::offload::{OffloadHeader, Offloads};
use vmring_nat::{
    Capabilities, ConnectOptions, Full, GuestFrame, Link, Nat, NatConfig, Output, Port, Readiness,
    SendSpace, SocketError, Sockets, Token,
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
/// What the translator may have in use: its scratch memory, its tables, and a spill and a ring for each
/// flow.
const MEMORY: usize = (1 << 20) + FLOWS * (64 + 256) * 1024;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    rings_only: bool,
    offload: bool,
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
    Leave {
        port: u8,
    },
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
}

struct Socket {
    shared: Rc<Shared>,
    /// What was received and not discarded.
    waiting: Cell<usize>,
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
        self.shared.open.set(self.shared.open.get() + 1);
        assert!(self.shared.open.get() <= FLOWS + 1, "more sockets than flows");
        let mut tokens = self.shared.tokens.borrow_mut();
        tokens.push_back(token);
        if tokens.len() > 32 {
            tokens.pop_front();
        }
        Socket { shared: self.shared.clone(), waiting: Cell::new(0) }
    }
}

fn len(slices: &[IoSliceMut<'_>]) -> usize {
    slices.iter().map(|slice| slice.len()).sum()
}

impl Sockets for Random {
    type Socket = Socket;

    fn capabilities(&self) -> Capabilities {
        Capabilities { peek_offset_v4: true, peek_offset_v6: false, descriptors: 100 }
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
    fn local_address(&mut self, _: &Socket) -> Result<SocketAddr, SocketError> {
        Err(SocketError::Other(0))
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
        match self.space.checked_sub(1) {
            Some(space) => self.space = space,
            None => return Err(Full),
        }
        Ok(())
    }
}

impl Flow {
    fn port(self) -> Port {
        Port(u32::from(self.port % 3))
    }

    fn addresses(self) -> (SocketAddr, SocketAddr) {
        let guest_port = u16::from(self.guest_port % 16) + 1;
        if self.v6 {
            let (guest, remote) = ("fd00::2".parse().unwrap(), "2001:db8::1".parse().unwrap());
            (SocketAddr::new(guest, guest_port), SocketAddr::new(remote, 80))
        } else {
            (([192, 168, 64, 2], guest_port).into(), ([192, 0, 2, 1], 80).into())
        }
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
    let mut frame = vec![2; 14];
    match (guest, remote) {
        (SocketAddr::V4(guest), SocketAddr::V4(remote)) => {
            frame[12..].copy_from_slice(&[8, 0]);
            let mut ip = vec![0; 20];
            ip[0] = 0x45;
            ip[2..4].copy_from_slice(&(20 + tcp.len() as u16).to_be_bytes());
            (ip[8], ip[9]) = (64, 6);
            ip[12..16].copy_from_slice(&guest.ip().octets());
            ip[16..20].copy_from_slice(&remote.ip().octets());
            Ipv4Packet::new_unchecked(&mut ip).fill_checksum();
            frame.extend(ip);
        }
        (SocketAddr::V6(guest), SocketAddr::V6(remote)) => {
            frame[12..].copy_from_slice(&[0x86, 0xdd]);
            frame.extend([0x60, 0, 0, 0]);
            frame.extend((tcp.len() as u16).to_be_bytes());
            frame.extend([6, 64]);
            frame.extend(guest.ip().octets());
            frame.extend(remote.ip().octets());
        }
        _ => unreachable!("both are of one family"),
    }
    frame.extend(tcp);
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
    });
    let (v4, v6) = ([192, 168, 64, 1].into(), "fd00::1".parse().unwrap());
    let mut config = NatConfig::new([2, 0, 0, 0, 0, 1], v4, v6);
    config.rings_only = input.rings_only;
    config.limits.flows = FLOWS;
    let mut now = Duration::from_secs(1);
    let mut nat = Nat::new(config, Random { shared: shared.clone() }, now);
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
            Step::Leave { port } => nat.port_left(Port(u32::from(port % 3)), now, &mut out),
        }
        nat.on_time(now, &mut out);
        let (_, descriptors) = nat.usage();
        assert_eq!(descriptors, shared.open.get(), "descriptors");
        assert!(descriptors <= FLOWS);
        assert!(nat.tcp_flows().count() <= FLOWS);
        let used = IN_USE.load(Ordering::Relaxed) - before;
        assert!(used < MEMORY, "{used} bytes in use");
    }
    nat.close(now, &mut out);
    assert_eq!((nat.usage(), shared.open.get()), ((0, 0), 0));
}

fuzz_target!(|input: Input<'_>| run(&input));
