//! Translating a packet allocates nothing, in either direction, whether the kernel or a ring retains
//! the bytes, and whether the port takes the frames or not. A flow costs a few hundred bytes.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use vmring_core::offload::OffloadHeader;
use vmring_nat::{
    Capabilities, ConnectOptions, DatagramError, Full, GuestFrame, Incoming, Link, Nat, Outgoing,
    Output, Port, Readiness, Route, SendSpace, SocketError, Sockets, Token,
};

use support::port::{PORT, config, plain_link};
use support::script::Segment;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static IN_USE: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: both functions pass their arguments to `System` unchanged and return what it returns, so
// the contract of `GlobalAlloc` is kept by `System`.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        IN_USE.with(|bytes| bytes.set(bytes.get() + layout.size() as isize));
        // SAFETY: the caller keeps the contract of `alloc`, and that of `System` is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.with(|bytes| bytes.set(bytes.get() - layout.size() as isize));
        // SAFETY: the caller got the pointer from `alloc` with this layout, and `alloc` got it from
        // `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Sockets that take everything and give zeros, as many as they are told to. A model that keeps the
/// bytes would allocate.
#[derive(Debug)]
struct Zeros {
    left: usize,
    peek_at: Option<usize>,
    kernel: bool,
    takes: usize,
    /// The sender of datagrams, of how many bytes each, and whether one of the socket's has met an error.
    from: SocketAddr,
    segment: u16,
    fails: bool,
    sent: usize,
}

impl Default for Zeros {
    fn default() -> Self {
        Self {
            left: 0,
            peek_at: None,
            kernel: false,
            takes: 0,
            from: ([192, 0, 2, 1], 53).into(),
            segment: 0,
            fails: false,
            sent: 0,
        }
    }
}

impl Zeros {
    fn give(&mut self, at: usize, into: &mut [IoSliceMut<'_>]) -> Result<usize, SocketError> {
        let all: usize = into.iter().map(|slice| slice.len()).sum();
        match all.min(self.left - at) {
            0 => Err(SocketError::WouldBlock),
            len => Ok(len),
        }
    }
}

impl Sockets for Zeros {
    type Socket = ();

    fn capabilities(&self) -> Capabilities {
        let kernel = self.kernel;
        Capabilities {
            peek_offset_v4: kernel,
            peek_offset_v6: kernel,
            descriptors: 20_000,
            udp_segments: 64,
            echo_v4: true,
            echo_v6: true,
        }
    }
    fn host_addresses(&mut self) -> Result<Vec<IpAddr>, SocketError> {
        Ok(Vec::new())
    }
    fn connect_tcp(
        &mut self,
        _: SocketAddr,
        _: &ConnectOptions,
        _: Token,
    ) -> Result<(), SocketError> {
        Ok(())
    }
    fn adopt_tcp(&mut self, (): &(), _: Token) -> Result<(), SocketError> {
        Ok(())
    }
    fn take_error(&mut self, (): &()) -> Result<(), SocketError> {
        Ok(())
    }
    fn set_peek_offset(&mut self, (): &(), offset: u32) -> Result<(), SocketError> {
        self.peek_at = Some(offset as usize);
        Ok(())
    }
    fn peek(&mut self, (): &(), into: &mut [IoSliceMut<'_>]) -> Result<usize, SocketError> {
        let len = self.give(self.peek_at.unwrap_or(0), into)?;
        self.peek_at = self.peek_at.map(|at| at + len);
        Ok(len)
    }
    fn discard(&mut self, (): &(), len: u32) -> Result<(), SocketError> {
        self.left -= len as usize;
        self.peek_at = self.peek_at.map(|at| at - len as usize);
        Ok(())
    }
    fn receive(&mut self, (): &(), into: &mut [IoSliceMut<'_>]) -> Result<usize, SocketError> {
        let len = self.give(0, into)?;
        self.left -= len;
        Ok(len)
    }
    fn send(&mut self, (): &(), from: &[IoSlice<'_>]) -> Result<usize, SocketError> {
        let all: usize = from.iter().map(|slice| slice.len()).sum();
        if self.takes == 0 { Err(SocketError::WouldBlock) } else { Ok(all.min(self.takes)) }
    }
    fn shutdown(&mut self, (): &()) -> Result<(), SocketError> {
        Ok(())
    }
    fn keep_alive(&mut self, (): &()) {}
    fn reset(&mut self, (): ()) {}
    fn send_space(&mut self, (): &()) -> Result<SendSpace, SocketError> {
        Ok(SendSpace { free: 1 << 20, capacity: 1 << 20, charge: 1 << 20 })
    }
    fn arm_writable(&mut self, (): &(), _: Token) -> Result<(), SocketError> {
        Ok(())
    }
    fn local_address(&mut self, (): &()) -> Result<SocketAddr, SocketError> {
        Err(SocketError::Other(0))
    }
    fn connect_udp(&mut self, _: u16, _: SocketAddr, _: Token) -> Result<(), SocketError> {
        Ok(())
    }
    fn bind_udp(&mut self, _: SocketAddr, _: Token) -> Result<(), SocketError> {
        Ok(())
    }
    fn connect_echo(&mut self, _: IpAddr, _: Token) -> Result<(), SocketError> {
        Ok(())
    }
    fn set_datagram_buffers(&mut self, (): &(), _: u32) {}
    fn set_ip_fields(&mut self, (): &(), _: bool, _: u8, _: u8) {}
    fn send_datagrams(
        &mut self,
        (): &(),
        _: Option<Route>,
        batch: &[Outgoing<'_>],
    ) -> Result<usize, SocketError> {
        self.sent += batch.len();
        if self.takes == 0 { Err(SocketError::WouldBlock) } else { Ok(batch.len()) }
    }
    fn receive_datagrams(
        &mut self,
        (): &(),
        into: &mut [u8],
        stride: usize,
        found: &mut [Incoming],
    ) -> Result<usize, SocketError> {
        if self.left == 0 {
            return Err(SocketError::WouldBlock);
        }
        let count = self.left.min(found.len());
        self.left -= count;
        for (found, into) in found.iter_mut().zip(into.chunks_exact_mut(stride)).take(count) {
            // A message that is several datagrams, and an echo reply: both begin with 0.
            into[..3000].fill(0);
            *found = Incoming { len: 3000, from: self.from, to: None, segment: self.segment };
        }
        Ok(count)
    }
    fn take_datagram_error(
        &mut self,
        (): &(),
        _: &mut [u8],
    ) -> Result<Option<DatagramError>, SocketError> {
        let icmp = Some((3, 1));
        let error = DatagramError { icmp, offender: None, to: self.from, quoted: 100 };
        Ok(std::mem::take(&mut self.fails).then_some(error))
    }
    fn listen(&mut self, _: SocketAddr, _: u32, _: Token) -> Result<(), SocketError> {
        Err(SocketError::Other(0))
    }
    fn accept(&mut self, (): &()) -> Result<((), SocketAddr), SocketError> {
        Err(SocketError::WouldBlock)
    }
}

/// A port that keeps the last frame without data only.
struct Last {
    link: Link,
    space: usize,
    frame: Vec<u8>,
    data: usize,
}

impl Output for Last {
    fn link(&self, _: Port) -> Link {
        self.link
    }
    fn send(&mut self, _: Port, frame: &[u8], _: &OffloadHeader) -> Result<(), Full> {
        if self.space == 0 {
            return Err(Full);
        }
        self.space -= 1;
        self.data += frame.len().saturating_sub(60);
        if frame.len() < 100 {
            self.frame.clear();
            self.frame.extend(frame);
        }
        Ok(())
    }
}

#[test]
fn a_packet_allocates_nothing() {
    for kernel in [true, false] {
        let guest: SocketAddr = ([192, 168, 64, 2], 4000).into();
        let remote: SocketAddr = ([192, 0, 2, 1], 80).into();
        let mut now = Duration::from_secs(5);
        let sockets = Zeros { kernel, takes: usize::MAX, ..Zeros::default() };
        let mut nat = Nat::new(config(false), sockets, now);
        let mut out =
            Last { link: plain_link(), space: 1000, frame: Vec::with_capacity(200), data: 0 };
        let token = Token(1 << 56);
        let frame = |flags: &str, seq, ack, len| {
            let (flags, data) = (flags.into(), vec![0; len]);
            Segment { flags, seq, ack, window: 60_000, data, ..Segment::default() }
                .frame(guest, remote)
        };
        let header = OffloadHeader::NONE;
        nat.from_guest(PORT, &[GuestFrame { bytes: &frame("S", 0, 0, 0), header }], now, &mut out);
        let writable = Readiness { writable: true, ..Readiness::default() };
        nat.on_ready(token, writable, now, &mut out);
        let iss = u32::from_be_bytes(out.frame[38..42].try_into().unwrap()).wrapping_add(1);
        nat.from_guest(
            PORT,
            &[GuestFrame { bytes: &frame(".", 1, iss, 0), header }],
            now,
            &mut out,
        );
        assert_eq!(nat.counters()[vmring_nat::Counter::TcpEstablished], 1);

        let (mut seq, mut ack) = (1, iss);
        let mut counted = 0;
        for round in 0..200u32 {
            // The first rounds take blocks out of the pools, which stay there.
            let warm = round >= 20;
            nat.sockets().takes = if round % 5 == 4 { 500 } else { usize::MAX };
            out.space = if round % 7 == 6 { 1 } else { 1000 };
            let batch: Vec<_> = (0..8).map(|i| frame("P.", seq + i * 1000, ack, 1000)).collect();
            let batch: Vec<_> = batch.iter().map(|bytes| GuestFrame { bytes, header }).collect();
            let strange = frame("P.", seq + 900_000, ack + 77, 10);
            let unknown = Segment { flags: ".".into(), ..Segment::default() };
            let unknown = unknown.frame(guest, ([192, 0, 2, 9], 80).into());
            nat.sockets().left += 20_000;
            now += Duration::from_millis(50);

            let before = ALLOCATIONS.get();
            nat.from_guest(PORT, &batch, now, &mut out);
            nat.from_guest(PORT, &[GuestFrame { bytes: &strange, header }], now, &mut out);
            nat.from_guest(PORT, &[GuestFrame { bytes: &unknown, header }], now, &mut out);
            let readable = Readiness { readable: true, writable: true, ..Readiness::default() };
            nat.on_ready(token, readable, now, &mut out);
            out.space = 1000;
            nat.on_space(PORT, now, &mut out);
            nat.on_time(now, &mut out);
            nat.on_ready(token, readable, now, &mut out);
            if warm {
                assert_eq!(ALLOCATIONS.get() - before, 0, "round {round}, kernel: {kernel}");
                counted += 1;
            }

            // Where both sides are now, by an answer to a keep-alive.
            let probe = frame(".", seq.wrapping_sub(2), ack, 0);
            nat.from_guest(PORT, &[GuestFrame { bytes: &probe, header }], now, &mut out);
            let number = |at: usize| u32::from_be_bytes(out.frame[at..at + 4].try_into().unwrap());
            seq = number(42);
            if round % 3 != 0 {
                ack = number(38);
            }
        }
        assert!(counted == 180 && out.data > 1_000_000, "{counted} rounds, {} bytes", out.data);
        assert!(seq > 200_000, "{seq} bytes from the guest");
        let counters = nat.counters();
        assert!(counters[vmring_nat::Counter::Spilled] > 0);
        assert!(counters[vmring_nat::Counter::OutputFull] > 0);
    }
}

/// Goal: an idle flow costs at most 512 bytes of memory, with its entries in every table, over IPv4 and
/// over IPv6.
/// Method: 10,000 flows that have carried data both ways.
#[test]
fn an_idle_flow_costs_512_bytes_at_most() {
    for (kernel, v4) in [(true, true), (true, false), (false, true), (false, false)] {
        let now = Duration::from_secs(5);
        let sockets = Zeros { kernel, takes: usize::MAX, ..Zeros::default() };
        let mut config = config(false);
        let limits = &mut config.limits;
        (limits.flows, limits.descriptors) = (20_000, 20_000);
        (limits.half_open, limits.new_flows_per_second) = (20_000, 20_000);
        (limits.port.flows, limits.port.descriptors) = (20_000, 20_000);
        (limits.port.half_open, limits.port.new_flows_per_second) = (20_000, 20_000);
        let mut nat = Nat::new(config, sockets, now);
        let link = plain_link();
        let mut out = Last { link, space: usize::MAX, frame: Vec::with_capacity(200), data: 0 };
        let header = OffloadHeader::NONE;
        let before = IN_USE.get();
        const FLOWS: u32 = 10_000;
        for index in 0..FLOWS {
            let (guest, remote): (IpAddr, IpAddr) = match v4 {
                true => ([192, 168, 64, 2].into(), [192, 0, 2, 1].into()),
                false => ("fd00::2".parse().unwrap(), "2606:4700::1".parse().unwrap()),
            };
            let guest = SocketAddr::new(guest, 1000 + index as u16);
            let remote = SocketAddr::new(remote, 80);
            let send = |nat: &mut Nat<Zeros>, out: &mut Last, flags: &str, seq, ack, len| {
                let (flags, data) = (flags.into(), vec![0; len]);
                let frame = Segment { flags, seq, ack, window: 60_000, data, ..Segment::default() };
                let bytes = frame.frame(guest, remote);
                nat.from_guest(PORT, &[GuestFrame { bytes: &bytes, header }], now, out);
            };
            send(&mut nat, &mut out, "S", 0, 0, 0);
            let token = Token(1 << 56 | u64::from(index));
            let writable = Readiness { writable: true, ..Readiness::default() };
            nat.on_ready(token, writable, now, &mut out);
            let at = if v4 { 38 } else { 58 };
            let iss = u32::from_be_bytes(out.frame[at..at + 4].try_into().unwrap()).wrapping_add(1);
            send(&mut nat, &mut out, "P.", 1, iss, 10);
            // One byte for the guest. Sockets that peek have one place for all.
            (nat.sockets().left, nat.sockets().peek_at) = (1, None);
            let readable = Readiness { readable: true, ..Readiness::default() };
            nat.on_ready(token, readable, now, &mut out);
            send(&mut nat, &mut out, ".", 11, iss.wrapping_add(1), 0);
        }
        let each = (IN_USE.get() - before) / FLOWS as isize;
        let counters = nat.counters();
        assert_eq!(nat.usage().0, FLOWS as usize);
        assert_eq!(counters[vmring_nat::Counter::TcpBytesReceived], u64::from(FLOWS));
        eprintln!("{each} bytes for each flow");
        assert!(each <= 512, "{each} bytes for each flow");
    }
}

/// UDP and ICMP echo: sends, messages that are cut, fragments, errors, and what is refused.
#[test]
fn a_datagram_allocates_nothing() {
    use support::datagram::{echo_request, udp_frame};
    let guest: SocketAddr = ([192, 168, 64, 2], 4000).into();
    for (kind, segment) in [("udp", 0), ("udp", 700), ("echo", 0)] {
        let mut now = Duration::from_secs(5);
        let peer = SocketAddr::from(([192, 0, 2, 1], if kind == "udp" { 53 } else { 0 }));
        let zeros = Zeros { takes: usize::MAX, from: peer, segment, ..Zeros::default() };
        let mut nat = Nat::new(config(false), zeros, now);
        let mut out =
            Last { link: plain_link(), space: 1000, frame: Vec::with_capacity(200), data: 0 };
        let frame = match kind {
            "udp" => udp_frame(guest, peer, &[7; 900]),
            _ => echo_request(guest.ip(), peer.ip(), 77, 1, &[7; 900]),
        };
        let refused = udp_frame(guest, ([127, 0, 0, 1], 53).into(), &[7; 900]);
        let header = OffloadHeader::NONE;
        let batch: Vec<_> = [&frame, &frame, &refused, &frame]
            .map(|bytes| GuestFrame { bytes, header })
            .into_iter()
            .collect();
        let mut counted = 0;
        for round in 0..200u32 {
            now += Duration::from_millis(50);
            nat.sockets().takes = if round % 5 == 4 { 0 } else { usize::MAX };
            nat.sockets().left = 40;
            nat.sockets().fails = true;
            out.space = if round % 7 == 6 { 1 } else { 1000 };
            let before = ALLOCATIONS.get();
            nat.from_guest(PORT, &batch, now, &mut out);
            let readiness = Readiness { readable: true, failed: true, ..Readiness::default() };
            nat.on_ready(Token(2 << 56), readiness, now, &mut out);
            out.space = 1000;
            nat.on_space(PORT, now, &mut out);
            nat.on_time(now, &mut out);
            if round >= 20 {
                assert_eq!(ALLOCATIONS.get() - before, 0, "round {round} of {kind} {segment}");
                counted += 1;
            }
        }
        let counters = nat.counters();
        assert!(counted == 180 && out.data > 1_000_000, "{counters:?}");
        assert!(nat.sockets().sent > 150 && counters[vmring_nat::Counter::ErrorsPassed] > 100);
        assert_eq!(counters[vmring_nat::Counter::Fragmented] > 100, segment == 0);
    }
}

/// DNS: queries that wait, that are refused, and for local names, and what resolvers send.
#[test]
fn a_query_allocates_nothing() {
    use support::datagram::udp_frame;
    use vmring_nat::{Counter, Resolvers};
    let guest: SocketAddr = ([192, 168, 64, 2], 4000).into();
    let gateway = ([192, 168, 64, 1], 53).into();
    let resolver = ([127, 0, 0, 53], 53).into();
    let mut now = Duration::from_secs(5);
    let zeros = Zeros { takes: usize::MAX, from: resolver, ..Zeros::default() };
    let mut config = config(false);
    config.resolvers = Resolvers::Fixed(vec![resolver]);
    let mut nat = Nat::new(config, zeros, now);
    nat.names_mut().set("host.internal", &[[192, 168, 64, 254].into()]).unwrap();
    let mut out = Last { link: plain_link(), space: 1000, frame: Vec::with_capacity(200), data: 0 };
    let header = OffloadHeader::NONE;
    let (mut counted, mut id) = (0, 0u16);
    for round in 0..400u32 {
        now += Duration::from_millis(50);
        let mut frame = |name: &[u8], kind: u8| {
            id = id.wrapping_add(1);
            let mut message = id.to_be_bytes().to_vec();
            message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
            message.extend(name);
            message.extend([0, kind, 0, 1]);
            udp_frame(guest, gateway, &message)
        };
        let frames = [
            frame(b"\x07example\x03com\0", 1),
            frame(b"\x04host\x08internal\0", 1),
            frame(b"\x06nobody\x08internal\0", 1),
            frame(b"\x02254\0", 12),
            frame(b"\x07example\x03com\0", 252),
        ];
        let batch = frames.each_ref().map(|bytes| GuestFrame { bytes, header });
        nat.sockets().left = 40;
        let before = ALLOCATIONS.get();
        nat.from_guest(PORT, &batch, now, &mut out);
        let readiness = Readiness { readable: true, ..Readiness::default() };
        nat.on_ready(Token(2 << 56), readiness, now, &mut out);
        nat.on_time(now, &mut out);
        out.space = 1000;
        // Until then, as many wait as may.
        if round >= 220 {
            assert_eq!(ALLOCATIONS.get() - before, 0, "round {round}");
            counted += 1;
        }
    }
    let counters = nat.counters();
    assert_eq!(counted, 180);
    let seen = [Counter::DnsForwarded, Counter::DnsLocal, Counter::DnsRefused, Counter::DnsUnasked];
    assert!(seen.iter().all(|&counter| counters[counter] >= 180), "{counters:?}");
    assert!(counters[Counter::DnsUnanswered] > 0 && counters[Counter::DnsPendingLimit] > 0);
}
