//! The host's real sockets: servers of this process on a loopback address, a guest with smoltcp's TCP,
//! and a policy that leads a name of the outside to them.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as GuestInstant;
use smoltcp::wire::{HardwareAddress, IpCidr};
use vmring_core::offload::{OffloadHeader, Offloads};
use vmring_nat::sys::{Events, Host};
use vmring_nat::{
    ConnectOptions, Counter, Full, GuestFrame, Link, Nat, Output, Policy, Port, Request,
    SocketError, Sockets, Token, Verdict,
};

use crate::smoltcp_guest::{Card, deliver, with_ethernet};
use crate::support::port::{PORT, config, plain_link};
use crate::support::script::{from_guest, from_world, stream};

/// Far longer than any test needs on a slow and busy machine.
const LONG: Duration = Duration::from_secs(60);

// A translator may be made in one thread and work in another.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Nat<Host>>();
};

/// Leads 192.0.2.1 and 2001:db8::1 to the loopback addresses, with the same port.
#[derive(Debug)]
struct ToLoopback;

impl Policy for ToLoopback {
    fn decide(&mut self, request: &Request) -> Verdict {
        let port = request.destination.port();
        let to = if request.destination.is_ipv4() {
            SocketAddr::new([127, 0, 0, 1].into(), port)
        } else {
            SocketAddr::new("::1".parse().unwrap(), port)
        };
        Verdict::Allow { to }
    }
}

struct Frames(VecDeque<(Vec<u8>, OffloadHeader)>, Link);

impl Output for Frames {
    fn link(&self, _: Port) -> Link {
        self.1
    }
    fn send(&mut self, _: Port, frame: &[u8], header: &OffloadHeader) -> Result<(), Full> {
        if self.0.len() == 256 {
            return Err(Full);
        }
        self.0.push_back((frame.to_vec(), *header));
        Ok(())
    }
    fn space(&self, _: Port) -> usize {
        256 - self.0.len()
    }
}

/// A guest behind a translator with real sockets, in one thread.
struct Guest {
    nat: Nat<Host>,
    out: Frames,
    events: Events,
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
    v6: bool,
    next_port: u16,
}

impl Guest {
    fn new(rings_only: bool, v6: bool) -> Self {
        let host = Host::new().expect("sockets");
        // Large segments go with the kernel's queue.
        let link = if rings_only {
            plain_link()
        } else {
            Link { offloads: Offloads::ALL, longest: 65_549, ..plain_link() }
        };
        let nat = Nat::with_policy(config(rings_only), host, Box::new(ToLoopback), Duration::ZERO);
        let mut card = Card::default();
        let settings = Config::new(HardwareAddress::Ip);
        let mut interface = Interface::new(settings, &mut card, GuestInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let v6 = "fd00::2".parse().unwrap();
            addresses.push(IpCidr::new(smoltcp::wire::IpAddress::v4(192, 168, 64, 2), 24)).unwrap();
            addresses.push(IpCidr::new(smoltcp::wire::IpAddress::Ipv6(v6), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route([192, 168, 64, 1].into()).unwrap();
        interface.routes_mut().add_default_ipv6_route("fd00::1".parse().unwrap()).unwrap();
        Self {
            nat,
            out: Frames(VecDeque::new(), link),
            events: Events::new(64),
            card,
            interface,
            sockets: SocketSet::new(Vec::new()),
            start: Instant::now(),
            v6,
            next_port: 40_000,
        }
    }

    fn connect(&mut self, port: u16, buffer: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let to: SocketAddr = if self.v6 {
            SocketAddr::new("2001:db8::1".parse().unwrap(), port)
        } else {
            ([192, 0, 2, 1], port).into()
        };
        self.next_port += 1;
        socket.connect(self.interface.context(), to, self.next_port).unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// One turn: the guest, the translator, and a short wait for sockets if nothing is to do.
    fn turn(&mut self) {
        let clock = || GuestInstant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(clock(), &mut self.card, &mut self.sockets);
        let frames: Vec<_> =
            self.card.sent.drain(..).map(|packet| with_ethernet(&packet)).collect();
        let header = OffloadHeader::NONE;
        let batch: Vec<_> = frames.iter().map(|bytes| GuestFrame { bytes, header }).collect();
        let now = self.start.elapsed();
        self.nat.from_guest(PORT, &batch, now, &mut self.out);
        let was_full = self.out.0.len() == 256;
        for (frame, header) in self.out.0.drain(..) {
            deliver(&frame, &header, &mut self.card.received);
        }
        if was_full {
            self.nat.on_space(PORT, now, &mut self.out);
        }
        let next = self.nat.on_time(now, &mut self.out);
        let idle = frames.is_empty() && self.card.received.is_empty() && self.out.0.is_empty();
        let wait = if idle { Duration::from_millis(2) } else { Duration::ZERO };
        let wait = next.map_or(wait, |next| wait.min(next.saturating_sub(now)));
        self.nat.sockets().wait(Some(wait), &mut self.events).expect("a wait");
        let now = self.start.elapsed();
        for (token, readiness) in self.events.iter() {
            self.nat.on_ready(token, readiness, now, &mut self.out);
        }
    }

    /// Takes turns until `done` says so.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < LONG, "it never happened: {what}: {:?}", self.nat);
            self.turn();
        }
    }

    /// Until the guest's side is closed and nothing is left.
    fn until_gone(&mut self, handle: SocketHandle) {
        self.until("the end", |guest| {
            let state = guest.socket(handle).state();
            matches!(state, tcp::State::Closed | tcp::State::TimeWait)
                && guest.nat.usage() == (0, 0)
        });
        self.sockets.remove(handle);
    }
}

/// Runs a body with both places for bytes and both IPs, as far as the machine has them.
fn each_way(body: impl Fn(&mut Guest, TcpListener)) {
    for v6 in [false, true] {
        let address = if v6 { "[::1]:0" } else { "127.0.0.1:0" };
        let Ok(_) = TcpListener::bind(address) else {
            eprintln!("skipped: this machine has no {address}");
            continue;
        };
        for rings_only in [false, true] {
            eprintln!("rings_only: {rings_only}, v6: {v6}");
            let listener = TcpListener::bind(address).unwrap();
            let mut guest = Guest::new(rings_only, v6);
            body(&mut guest, listener);
            assert_eq!(guest.nat.usage(), (0, 0));
        }
    }
}

/// A server's part, on a thread of its own. Its result comes back.
fn serve<R: Send + 'static>(
    listener: TcpListener,
    body: impl FnOnce(TcpStream) -> R + Send + 'static,
) -> mpsc::Receiver<R> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        // When the result has come, nobody listens any more.
        drop(listener);
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        let _ = sender.send(body(stream));
    });
    receiver
}

/// Goal: bytes go both ways, through windows and buffers that fill up, and each half may end first and
/// leave the other.
#[test]
fn bytes_go_both_ways_and_halves_close() {
    let len = if std::env::var_os("VMRING_TEST_SCALE").is_some() { 150_000 } else { 1_500_000 };
    each_way(move |guest, listener| {
        let port = listener.local_addr().unwrap().port();
        let served = serve(listener, move |mut peer| {
            let mut got = Vec::new();
            peer.read_to_end(&mut got).expect("the guest's bytes");
            // The guest's half has ended; this one goes on.
            peer.write_all(&stream(from_world, 0, len)).expect("space");
            peer.shutdown(Shutdown::Write).unwrap();
            got
        });
        let handle = guest.connect(port, 100_000);
        let (mut written, mut read) = (0, Vec::new());
        guest.until("everything", |guest| {
            let socket = guest.socket(handle);
            if socket.can_send() && written < len {
                let end = len.min(written + 50_000);
                written += socket.send_slice(&stream(from_guest, written, end)).unwrap();
                if written == len {
                    socket.close();
                }
            }
            if socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), read.extend_from_slice(bytes))).unwrap();
            }
            read.len() == len
        });
        assert!(read == stream(from_world, 0, len), "wrong bytes at the guest");
        assert!(served.recv_timeout(LONG).unwrap() == stream(from_guest, 0, len));
        guest.until_gone(handle);
        let counters = guest.nat.counters();
        assert_eq!(counters[Counter::TcpBytesReceived], len as u64);
        assert_eq!(counters[Counter::TcpBytesSent], len as u64);
    });
}

/// Goal: a server that speaks first is heard, and one that closes first leaves the guest's half, which
/// goes on for many windows.
#[test]
fn a_server_may_speak_and_close_first() {
    each_way(|guest, listener| {
        let port = listener.local_addr().unwrap().port();
        let served = serve(listener, |mut stream| {
            stream.write_all(b"220 hello\r\n").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).expect("the guest's bytes");
            got.len()
        });
        let handle = guest.connect(port, 20_000);
        let mut read = Vec::new();
        guest.until("the greeting and its end", |guest| {
            let socket = guest.socket(handle);
            if socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), read.extend_from_slice(bytes))).unwrap();
            }
            socket.state() == tcp::State::CloseWait
        });
        assert_eq!(read, b"220 hello\r\n");
        let mut written = 0;
        guest.until("the guest's half", |guest| {
            let socket = guest.socket(handle);
            if socket.can_send() && written < 500_000 {
                written += socket.send_slice(&vec![7; 500_000 - written]).unwrap();
            }
            written == 500_000 && socket.send_queue() == 0
        });
        guest.socket(handle).close();
        guest.until_gone(handle);
        assert_eq!(served.recv_timeout(LONG).unwrap(), 500_000);
    });
}

/// Goal: a reader that reads slowly, on either side, gets everything, and the kernel is not asked for
/// what it cannot give.
#[test]
fn slow_readers_get_everything() {
    each_way(|guest, listener| {
        let port = listener.local_addr().unwrap().port();
        let (go, wait) = mpsc::channel::<()>();
        let served = serve(listener, move |mut stream| {
            stream.write_all(&vec![9; 300_000]).unwrap();
            wait.recv_timeout(LONG).unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap()
        });
        let handle = guest.connect(port, 30_000);
        let mut written = 0;
        // The server does not read until the guest can send no more, nor does the guest read.
        let mut still = 0;
        guest.until("a standstill", |guest| {
            let socket = guest.socket(handle);
            if socket.can_send() && written < 2_000_000 {
                written += socket.send_slice(&[7; 30_000]).unwrap();
                still = 0;
            }
            still += 1;
            still > 100 || written >= 2_000_000
        });
        go.send(()).unwrap();
        let mut read = 0;
        guest.until("both", |guest| {
            let socket = guest.socket(handle);
            if socket.can_send() && written < 2_000_000 {
                let len = 30_000.min(2_000_000 - written);
                written += socket.send_slice(&vec![7; len]).unwrap();
            }
            if socket.can_recv() {
                read +=
                    socket.recv(|bytes| (bytes.len().min(4000), bytes.len().min(4000))).unwrap();
            }
            read == 300_000 && written >= 2_000_000 && socket.send_queue() == 0
        });
        guest.socket(handle).close();
        guest.until_gone(handle);
        assert_eq!(served.recv_timeout(LONG).unwrap(), written);
    });
}

/// Goal: nobody listens: a reset. The server resets: a reset, and not an end. The guest resets: the
/// server gets it.
#[test]
fn resets_go_both_ways() {
    each_way(|guest, listener| {
        let port = listener.local_addr().unwrap().port();
        let served = serve(listener, |mut stream| {
            let mut byte = [0; 1];
            stream.read_exact(&mut byte).unwrap();
            stream.write_all(&[1; 1000]).unwrap();
            // Bytes that are unread when it is closed make the kernel send a reset.
            assert!(stream.peek(&mut byte).expect("more bytes") > 0);
            drop(stream);
        });
        let handle = guest.connect(port, 5000);
        guest.until("a connection", |guest| guest.socket(handle).can_send());
        guest.socket(handle).send_slice(&[1; 100]).unwrap();
        guest.until("a reset", |guest| guest.socket(handle).state() == tcp::State::Closed);
        served.recv_timeout(LONG).unwrap();
        assert_eq!(guest.nat.counters()[Counter::WorldReset], 1);
        guest.until_gone(handle);

        // The listener is gone.
        let handle = guest.connect(port, 5000);
        guest.until("a refusal", |guest| guest.socket(handle).state() == tcp::State::Closed);
        assert_eq!(guest.nat.counters()[Counter::ConnectRefused], 1);
        guest.until_gone(handle);

        let address = if guest.v6 { "[::1]:0" } else { "127.0.0.1:0" };
        let listener = TcpListener::bind(address).unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = serve(listener, |mut stream| {
            stream.write_all(&[1; 1000]).unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).map(drop).map_err(|error| error.kind())
        });
        let handle = guest.connect(port, 5000);
        guest.until("a byte", |guest| guest.socket(handle).can_recv());
        guest.socket(handle).abort();
        let error = guest_waits(guest, &served);
        assert_eq!(error, Err(std::io::ErrorKind::ConnectionReset));
        guest.until_gone(handle);
    });

    fn guest_waits<R>(guest: &mut Guest, served: &mpsc::Receiver<R>) -> R {
        let mut result = None;
        guest.until("the server's end", |_| {
            result = served.try_recv().ok();
            result.is_some()
        });
        result.unwrap()
    }
}

/// Goal: urgent bytes are bytes of the stream like others, and what is behind them arrives too, although the
/// kernel stops in front of them. The bytes are there before the translator looks.
#[test]
fn urgent_bytes_are_bytes_like_others() {
    each_way(|guest, listener| {
        let port = listener.local_addr().unwrap().port();
        let (send, may_send) = mpsc::channel();
        let (sent, is_sent) = mpsc::channel();
        let served = serve(listener, move |mut peer| {
            may_send.recv_timeout(LONG).expect("a connected guest");
            for part in [b"before", b"urgent", b"behind"] {
                let flags = if part == b"urgent" { libc::MSG_OOB } else { 0 };
                // SAFETY: the pointer and the length are those of `part`, which the call only reads.
                let len = unsafe { libc::send(peer.as_raw_fd(), part.as_ptr().cast(), 6, flags) };
                assert_eq!(len, 6, "{}", std::io::Error::last_os_error());
            }
            sent.send(()).unwrap();
            // The connection stays open until the guest has everything.
            let mut rest = Vec::new();
            peer.read_to_end(&mut rest).expect("the guest's end");
        });
        let handle = guest.connect(port, 2000);
        guest.until("a connection", |guest| guest.socket(handle).can_send());
        send.send(()).unwrap();
        is_sent.recv_timeout(LONG).expect("the server's bytes");
        guest.until("all bytes", |guest| guest.socket(handle).recv_queue() == 18);
        let mut got = [0; 18];
        guest.socket(handle).recv_slice(&mut got).unwrap();
        assert_eq!(&got, b"beforeurgentbehind");
        guest.socket(handle).close();
        guest.until_gone(handle);
        served.recv_timeout(LONG).unwrap();
    });
}

/// An option of a socket that is an `int`.
fn option(socket: &OwnedFd, level: i32, option: i32) -> libc::c_int {
    let mut value: libc::c_int = 0;
    let mut len = size_of_val(&value) as libc::socklen_t;
    let (value_at, len_at) = ((&raw mut value).cast(), &raw mut len);
    // SAFETY: the pointers are to `value` and its length, which live until the call returns.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, value_at, len_at) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    value
}

/// Goal: a socket is what it was asked for: it sends at once, and its packets have the hop limit and the
/// services of the guest's. Its buffers are the kernel's, unless they are to be small. It asks whether its
/// peer is there when it is told to.
#[test]
fn a_socket_is_set_up_as_it_was_asked_for() {
    for v6 in [false, true] {
        let Ok(listener) = TcpListener::bind(if v6 { "[::1]:0" } else { "127.0.0.1:0" }) else {
            eprintln!("skipped: this machine has no IPv6");
            continue;
        };
        let to = listener.local_addr().unwrap();
        let mut host = Host::new().unwrap();
        let (level, services, hops) = match v6 {
            false => (libc::IPPROTO_IP, libc::IP_TOS, libc::IP_TTL),
            true => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, libc::IPV6_UNICAST_HOPS),
        };
        let plain = host.connect_tcp(to, &ConnectOptions::default(), Token(1 << 56)).unwrap();
        assert_ne!(option(&plain, libc::IPPROTO_TCP, libc::TCP_NODELAY), 0);
        assert_eq!(option(&plain, level, services), 0);
        assert_eq!(option(&plain, libc::SOL_SOCKET, libc::SO_KEEPALIVE), 0);
        host.keep_alive(&plain);
        assert_ne!(option(&plain, libc::SOL_SOCKET, libc::SO_KEEPALIVE), 0);

        let options = ConnectOptions { dscp: 46, hop_limit: Some(7), buffers: Some(8192) };
        let asked = host.connect_tcp(to, &options, Token(2 << 56)).unwrap();
        assert_eq!((option(&asked, level, services), option(&asked, level, hops)), (46 << 2, 7));
        for buffer in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
            let [plain, asked] =
                [&plain, &asked].map(|socket| option(socket, libc::SOL_SOCKET, buffer));
            // Linux doubles the size, for what it keeps beside the bytes (socket(7)).
            assert!(asked <= 2 * 8192 && asked < plain, "{asked} and {plain} bytes");
        }

        let udp = host.connect_udp(0, to, Token(3 << 56)).unwrap();
        for (limit, dscp) in [(9, 0), (64, 10), (8, 0)] {
            host.set_ip_fields(&udp, !v6, limit, dscp);
            let set = (option(&udp, level, hops), option(&udp, level, services));
            assert_eq!(set, (limit.into(), libc::c_int::from(dscp) << 2));
        }
    }
}

/// Goal: connections that come and go leave no descriptor.
#[test]
#[cfg(target_os = "linux")]
fn connections_leave_no_descriptor() {
    each_way(|guest, listener| {
        let port = listener.local_addr().unwrap().port();
        let count = if std::env::var_os("VMRING_TEST_SCALE").is_some() { 20 } else { 100 };
        let server = thread::spawn(move || {
            for _ in 0..count {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(LONG)).unwrap();
                let mut request = [0; 4];
                stream.read_exact(&mut request).unwrap();
                stream.write_all(&request).unwrap();
            }
        });
        for number in 0..count {
            let handle = guest.connect(port, 2000);
            guest.until("a connection", |guest| guest.socket(handle).can_send());
            guest.socket(handle).send_slice(b"ping").unwrap();
            guest.until("an answer", |guest| guest.socket(handle).recv_queue() == 4);
            guest.socket(handle).close();
            guest.until("the end", |guest| {
                let state = guest.socket(handle).state();
                matches!(state, tcp::State::Closed | tcp::State::TimeWait)
                    && guest.nat.usage().1 == 0
            });
            guest.sockets.remove(handle);
            assert_eq!(guest.nat.counters()[Counter::TcpOpened], number + 1);
        }
        server.join().unwrap();
        guest.until("the last late segments", |guest| guest.nat.usage() == (0, 0));
    });
}

fn pair(v6: bool) -> Option<(Host, OwnedFd, TcpStream)> {
    let listener = TcpListener::bind(if v6 { "[::1]:0" } else { "127.0.0.1:0" }).ok()?;
    let mut host = Host::new().unwrap();
    let to = listener.local_addr().unwrap();
    let socket = host.connect_tcp(to, &Default::default(), Token(1 << 56)).unwrap();
    let (stream, _) = listener.accept().unwrap();
    Some((host, socket, stream))
}

fn wait_for(host: &mut Host, what: &str, mut done: impl FnMut(vmring_nat::Readiness) -> bool) {
    let mut events = Events::new(8);
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < LONG, "it was never told: {what}");
        host.wait(Some(Duration::from_millis(100)), &mut events).unwrap();
        if events.iter().any(|(_, readiness)| done(readiness)) {
            return;
        }
    }
}

fn nothing_more(host: &mut Host) {
    let mut events = Events::new(8);
    for _ in 0..3 {
        host.wait(Some(Duration::from_millis(5)), &mut events).unwrap();
        let told: Vec<_> = events.iter().collect();
        assert!(told.is_empty(), "told again: {told:?}");
    }
}

/// T1, T2 and section 9, 2: what is ready is told once, whatever is left unread, and so is the end.
#[test]
fn what_is_ready_is_told_once() {
    for v6 in [false, true] {
        let Some((mut host, socket, mut stream)) = pair(v6) else { continue };
        wait_for(&mut host, "the connection", |readiness| readiness.writable);
        assert_eq!(host.take_error(&socket), Ok(()));
        nothing_more(&mut host);
        stream.write_all(b"some bytes").unwrap();
        wait_for(&mut host, "bytes", |readiness| readiness.readable);
        nothing_more(&mut host);
        stream.shutdown(Shutdown::Write).unwrap();
        wait_for(&mut host, "the end", |readiness| readiness.closed);
        nothing_more(&mut host);
    }
}

/// The facts that the translator builds on: a peek moves the offset forward, a discard moves it back, and
/// the end is seen behind bytes that are not discarded.
#[test]
fn a_peek_offset_moves_with_the_stream() {
    for v6 in [false, true] {
        let Some((mut host, socket, mut stream)) = pair(v6) else { continue };
        let capabilities = host.capabilities();
        if !(if v6 { capabilities.peek_offset_v6 } else { capabilities.peek_offset_v4 }) {
            eprintln!("skipped: this kernel has no SO_PEEK_OFF for TCP");
            continue;
        }
        host.set_peek_offset(&socket, 0).unwrap();
        stream.write_all(b"0123456789").unwrap();
        wait_for(&mut host, "bytes", |readiness| readiness.readable);
        let peek = |host: &mut Host| {
            let mut bytes = [0; 4];
            let found = host.peek(&socket, &mut [std::io::IoSliceMut::new(&mut bytes)]);
            found.map(|len| String::from_utf8_lossy(&bytes[..len]).into_owned())
        };
        assert_eq!(peek(&mut host).unwrap(), "0123");
        assert_eq!(peek(&mut host).unwrap(), "4567");
        host.discard(&socket, 6).unwrap();
        assert_eq!(peek(&mut host).unwrap(), "89");
        assert_eq!(peek(&mut host), Err(SocketError::WouldBlock));
        host.set_peek_offset(&socket, 0).unwrap();
        assert_eq!(peek(&mut host).unwrap(), "6789");
        stream.shutdown(Shutdown::Write).unwrap();
        wait_for(&mut host, "the end", |readiness| readiness.closed);
        assert_eq!(peek(&mut host).unwrap(), "");
        host.discard(&socket, 4).unwrap();
        assert!(host.discard(&socket, 1).is_err());
    }
}

/// Section 9, 3a: a reset is told once. 9, 17: and a refusal by its own error.
#[test]
fn errors_have_their_names() {
    for v6 in [false, true] {
        let Some((mut host, socket, stream)) = pair(v6) else { continue };
        wait_for(&mut host, "the connection", |readiness| readiness.writable);
        assert_eq!(host.send(&socket, &[std::io::IoSlice::new(b"unread")]), Ok(6));
        stream.set_read_timeout(Some(LONG)).unwrap();
        assert!(stream.peek(&mut [0]).expect("the bytes arrive") > 0);
        drop(stream);
        wait_for(&mut host, "a reset", |readiness| readiness.failed);
        assert_eq!(host.take_error(&socket), Err(SocketError::Reset));

        let gone = TcpListener::bind(if v6 { "[::1]:0" } else { "127.0.0.1:0" }).unwrap();
        let to = gone.local_addr().unwrap();
        drop(gone);
        match host.connect_tcp(to, &Default::default(), Token(2 << 56)) {
            Ok(socket) => {
                wait_for(&mut host, "a refusal", |readiness| readiness.failed);
                assert_eq!(host.take_error(&socket), Err(SocketError::Refused));
            }
            Err(error) => assert_eq!(error, SocketError::Refused),
        }
    }
}

/// Goal: a connection that has ended well in both directions has no error to ask for.
#[cfg(target_os = "linux")]
#[test]
fn an_end_is_no_error() {
    for v6 in [false, true] {
        let Some((mut host, socket, stream)) = pair(v6) else { continue };
        wait_for(&mut host, "the connection", |readiness| readiness.writable);
        host.shutdown(&socket).unwrap();
        drop(stream);
        wait_for(&mut host, "the end", |readiness| {
            assert!(!readiness.failed, "{readiness:?}");
            readiness.closed
        });
    }
}

/// Goal: a socket whose buffer is full tells when it takes bytes, if it was asked to, and once.
#[test]
fn a_full_socket_tells_when_it_takes_bytes() {
    let (mut host, socket, mut stream) = pair(false).unwrap();
    wait_for(&mut host, "the connection", |readiness| readiness.writable);
    let empty = host.send_space(&socket).unwrap();
    assert!(empty.capacity > 0 && empty.free == empty.capacity);
    let bytes = vec![1; 100_000];
    let mut sent = 0;
    loop {
        match host.send(&socket, &[std::io::IoSlice::new(&bytes)]) {
            Ok(len) => sent += len,
            Err(error) => {
                assert_eq!(error, SocketError::WouldBlock);
                break;
            }
        }
    }
    let full = host.send_space(&socket).unwrap();
    assert!(full.free < full.capacity / 2, "{full:?}");
    host.arm_writable(&socket, Token(1 << 56)).unwrap();
    nothing_more(&mut host);
    let mut read = vec![0; sent];
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.read_exact(&mut read).unwrap();
    wait_for(&mut host, "space", |readiness| readiness.writable);
    nothing_more(&mut host);
    // At once, if it takes bytes now.
    host.arm_writable(&socket, Token(1 << 56)).unwrap();
    wait_for(&mut host, "space", |readiness| readiness.writable);
    assert_eq!(host.local_address(&socket).unwrap(), stream.peer_addr().unwrap());
}

/// Goal: a wait ends when somebody wakes the waiter, before or during the wait.
#[test]
fn a_waker_ends_a_wait() {
    let mut host = Host::new().unwrap();
    let waker = host.waker();
    let mut events = Events::new(8);
    waker.wake();
    waker.wake();
    host.wait(Some(LONG), &mut events).unwrap();
    assert_eq!(events.iter().count(), 0);
    let start = Instant::now();
    host.wait(Some(Duration::from_millis(20)), &mut events).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(20), "woken twice by one wake");
    let thread = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        waker.wake();
    });
    host.wait(Some(LONG), &mut events).unwrap();
    thread.join().unwrap();
}
