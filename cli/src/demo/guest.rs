//! A guest: a TCP/IP stack of its own (smoltcp) on a thread of its own, with a ring.
//!
//! The thread sleeps in [`Ring::wait`](vmring::Ring::wait) until a packet arrives, a timer of the
//! stack is due, or a [`Command`] arrives. It answers with [`Report`]s.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::wire::{
    DhcpOption, EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Cidr,
};
use vmring::{Error, MacAddr6, RingControl};

use super::limits::{BATCH, CONTACT_TIMEOUT, PING_TIMEOUT, SLEEP_MAX};
use super::nic::{Losses, NetworkCard};
use crate::stream::Stream;

/// The payload of a ping.
const PING_PAYLOAD: [u8; 56] = *b"vmring demo: an echo request from one guest to the other";
/// The port on which the receiving guest listens.
pub(crate) const TCP_PORT: u16 = 5001;
/// DHCP option 51 (RFC 2132, 9.2).
const OPTION_LEASE_TIME: u8 = 51;

/// A command to a guest.
#[derive(Debug)]
pub(crate) enum Command {
    /// Ping `target` this many times, after one more ping that makes contact and does not count.
    Ping { target: Ipv4Addr, count: u32 },
    /// Accept one connection, or connect to where it comes `from`, and receive its data.
    Receive { window: usize, from: Option<(Ipv4Addr, u16)> },
    /// Connect, and send this many bytes of the stream.
    Send { target: Ipv4Addr, bytes: u64, stream: Stream, window: usize },
    /// End.
    Quit,
}

/// A report of a guest.
#[derive(Debug)]
pub(crate) enum Report {
    /// The guest has an address.
    Leased(Lease),
    /// The pings have ended.
    Pinged(Pings),
    /// The guest waits for a connection.
    Listening,
    /// Everything is sent and acknowledged.
    Sent {
        /// When it began to connect.
        started: Instant,
    },
    /// The connection has ended.
    Received(Received),
    /// The guest cannot continue.
    Failed(String),
    /// The guest has ended, and these packets did not get from or to it. It is the last report.
    Ended(Losses),
    /// A signal asks the demo to end. No guest sends this.
    Stop,
}

/// What DHCP has assigned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease {
    pub(crate) address: Ipv4Cidr,
    pub(crate) server: Ipv4Addr,
    pub(crate) router: Option<Ipv4Addr>,
    /// `None` if the server did not say.
    pub(crate) seconds: Option<u32>,
}

/// The result of some pings.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pings {
    pub(crate) sent: u32,
    /// The round-trip times of the pings that were answered.
    pub(crate) round_trips: Vec<Duration>,
}

/// What was received over a connection.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) bytes: u64,
    pub(crate) digest: [u8; 32],
    /// When the last byte was hashed.
    pub(crate) finished: Instant,
}

/// A handle to a guest's thread.
#[derive(Debug)]
pub(crate) struct Guest {
    commands: Sender<Command>,
    /// The control handle of the ring that the guest sleeps in. The kernel has none.
    control: Option<RingControl>,
    /// Bytes that the guest has received so far.
    pub(crate) progress: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    /// Starts a guest, which asks for an address at once. Its reports carry `number`.
    pub(crate) fn start(
        number: usize,
        mac: MacAddr6,
        nic: NetworkCard,
        control: RingControl,
        reports: Sender<(usize, Report)>,
    ) -> std::io::Result<Self> {
        Self::on_thread(format!("guest{number}"), Some(control), move |inbox, counter| {
            let tell = |report| drop(reports.send((number, report)));
            // DHCP's options are parsed from the packet, which is stored here.
            let mut dhcp_packet = [0; 1500];
            let mut guest = Stack::new(mac, nic, inbox, &tell, counter, &mut dhcp_packet);
            let ran = guest.run();
            let (losses, closed) = guest.nic.close();
            if let Err(error) = ran.and(closed) {
                tell(Report::Failed(error.to_string()));
            }
            tell(Report::Ended(losses));
        })
    }

    /// Starts a thread. `body` executes the commands, and counts the bytes that it receives.
    pub(crate) fn on_thread(
        name: String,
        control: Option<RingControl>,
        body: impl FnOnce(Receiver<Command>, Arc<AtomicU64>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = channel();
        let progress = Arc::new(AtomicU64::new(0));
        let counter = progress.clone();
        let thread = thread::Builder::new().name(name).spawn(move || body(inbox, counter))?;
        Ok(Self { commands, control, progress, thread: Some(thread) })
    }

    /// Sends a command. If the guest has ended, its last report says why.
    pub(crate) fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
        if let Some(control) = &self.control {
            control.wake();
        }
    }

    /// Ends the guest and waits for its end. Returns false if it does not end within `timeout`.
    pub(crate) fn quit(mut self, timeout: Duration) -> bool {
        self.tell(Command::Quit);
        let Some(thread) = self.thread.take() else { return true };
        let deadline = Instant::now() + timeout;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(Duration::from_micros(500));
        }
        thread.join().is_ok()
    }
}

/// The current task of a guest.
enum Task {
    Serve,
    Ping(Pinging),
    Send { socket: SocketHandle, stream: Stream, left: u64, started: Instant },
    Receive { socket: SocketHandle, hasher: Sha256, bytes: u64, finished: Instant },
}

struct Pinging {
    target: Ipv4Addr,
    left: u32,
    /// Whether the target has answered before.
    in_contact: bool,
    /// The sequence number of the ping in flight, and when it was sent.
    waiting: Option<(u16, Instant)>,
    pings: Pings,
}

/// The guest's side of the thread.
struct Stack<'a> {
    nic: NetworkCard,
    interface: Interface,
    sockets: SocketSet<'a>,
    dhcp: SocketHandle,
    icmp: SocketHandle,
    commands: Receiver<Command>,
    tell: &'a dyn Fn(Report),
    progress: Arc<AtomicU64>,
    /// The zero of the stack's clock.
    epoch: Instant,
    task: Task,
    echo_sequence: u16,
}

const ECHO_IDENT: u16 = 0x766d;

impl<'a> Stack<'a> {
    fn new(
        mac: MacAddr6,
        mut nic: NetworkCard,
        commands: Receiver<Command>,
        tell: &'a dyn Fn(Report),
        progress: Arc<AtomicU64>,
        dhcp_packet: &'a mut [u8],
    ) -> Self {
        let mut config = Config::new(EthernetAddress(mac.into_array()).into());
        // The ports and sequence numbers of two guests, and of two runs, must differ.
        config.random_seed = {
            use std::hash::{BuildHasher, RandomState};
            RandomState::new().hash_one(mac.into_array())
        };
        let now = smoltcp::time::Instant::ZERO;
        let interface = Interface::new(config, &mut nic, now);
        let mut sockets = SocketSet::new(Vec::new());
        let mut dhcp = dhcpv4::Socket::new();
        dhcp.set_receive_packet_buffer(dhcp_packet);
        let dhcp = sockets.add(dhcp);
        let buffer = || {
            let metadata = vec![icmp::PacketMetadata::EMPTY; 8];
            icmp::PacketBuffer::new(metadata, vec![0; 2048])
        };
        let icmp = sockets.add(icmp::Socket::new(buffer(), buffer()));
        Self {
            nic,
            interface,
            sockets,
            dhcp,
            icmp,
            commands,
            tell,
            progress,
            epoch: Instant::now(),
            task: Task::Serve,
            echo_sequence: 0,
        }
    }

    /// Runs until it is told to quit, or the ring fails.
    fn run(&mut self) -> Result<(), Error> {
        let echo = icmp::Endpoint::Ident(ECHO_IDENT);
        self.sockets.get_mut::<icmp::Socket<'_>>(self.icmp).bind(echo).expect("bound once");
        loop {
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Quit => return Ok(()),
                    command => self.begin(command),
                }
            }
            self.nic.collect();
            let now = self.now();
            let mut worked = false;
            for _ in 0..BATCH {
                let one = self.interface.poll_ingress_single(now, &mut self.nic, &mut self.sockets);
                if matches!(one, PollIngressSingleResult::None) {
                    break;
                }
                worked = true;
            }
            let task_due = self.work();
            for _ in 0..BATCH {
                let out = self.interface.poll_egress(now, &mut self.nic, &mut self.sockets);
                if matches!(out, PollResult::None) {
                    break;
                }
                worked = true;
            }
            self.nic.flush()?;
            self.finish();
            let starved = self.nic.take_starved();
            if self.nic.has_received() && !starved {
                continue;
            }
            let mut sleep = self
                .interface
                .poll_delay(self.now(), &self.sockets)
                .map_or(SLEEP_MAX, Duration::from)
                .min(SLEEP_MAX);
            if let Some(due) = task_due {
                sleep = sleep.min(due.saturating_duration_since(Instant::now()));
            }
            if starved {
                // The stack may want to continue at once but cannot, for lack of a frame.
                sleep = SLEEP_MAX;
            } else if sleep.is_zero() {
                if worked {
                    continue;
                }
                // The stack wants to do something at once, but has not done it now. That is no
                // reason to keep a processor busy.
                sleep = Duration::from_millis(1);
            }
            self.nic.wait(sleep, starved);
        }
    }

    fn now(&self) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros(self.epoch.elapsed().as_micros() as i64)
    }

    fn begin(&mut self, command: Command) {
        self.task = match command {
            Command::Ping { target, count } => {
                let pings = Pings::default();
                Task::Ping(Pinging { target, left: count, in_contact: false, waiting: None, pings })
            }
            Command::Receive { window, from } => {
                let mut socket = tcp_socket(window, 4096);
                match from {
                    Some(from) => self.connect(&mut socket, from),
                    None => socket
                        .listen(TCP_PORT)
                        .expect("a fresh socket listens on a port that is not 0"),
                }
                let socket = self.sockets.add(socket);
                self.progress.store(0, Ordering::Relaxed);
                (self.tell)(Report::Listening);
                Task::Receive { socket, hasher: Sha256::new(), bytes: 0, finished: Instant::now() }
            }
            Command::Send { target, bytes, stream, window } => {
                let mut socket = tcp_socket(4096, window);
                self.connect(&mut socket, (target, TCP_PORT));
                let socket = self.sockets.add(socket);
                Task::Send { socket, stream, left: bytes, started: Instant::now() }
            }
            Command::Quit => return,
        };
    }

    fn connect(&mut self, socket: &mut tcp::Socket<'_>, (target, port): (Ipv4Addr, u16)) {
        let remote = (IpAddress::from(target), port);
        // Ephemeral ports (RFC 6335) begin at 49152.
        let local = 49_152 + (self.epoch.elapsed().as_nanos() % 16_000) as u16;
        let connected = socket.connect(self.interface.context(), remote, local);
        connected.expect("a fresh socket connects");
    }

    /// Advances the task, between receiving and sending. Returns the latest time at which it has to
    /// be called again.
    fn work(&mut self) -> Option<Instant> {
        self.follow_dhcp();
        match &mut self.task {
            Task::Serve => None,
            Task::Ping(pinging) => {
                let socket = self.sockets.get_mut(self.icmp);
                pinging.step(socket, &mut self.echo_sequence)
            }
            Task::Send { socket, stream, left, .. } => {
                let socket = self.sockets.get_mut::<tcp::Socket<'_>>(*socket);
                while *left > 0 && socket.can_send() {
                    let filled = socket.send(|room| {
                        let n = (room.len() as u64).min(*left) as usize;
                        stream.fill(&mut room[..n]);
                        (n, n)
                    });
                    *left -= filled.unwrap_or(0) as u64;
                }
                if *left == 0 && socket.may_send() {
                    socket.close();
                }
                None
            }
            Task::Receive { socket, hasher, bytes, finished } => {
                let socket = self.sockets.get_mut::<tcp::Socket<'_>>(*socket);
                let before = *bytes;
                while socket.can_recv() {
                    let taken = socket.recv(|data| {
                        hasher.update(&*data);
                        (data.len(), data.len())
                    });
                    *bytes += taken.unwrap_or(0) as u64;
                }
                if *bytes > before {
                    *finished = Instant::now();
                    self.progress.store(*bytes, Ordering::Relaxed);
                }
                if socket.state() == tcp::State::CloseWait {
                    socket.close();
                }
                None
            }
        }
    }

    /// Ends a task that is done. Called after everything has been sent.
    fn finish(&mut self) {
        let done = match &self.task {
            Task::Serve => false,
            Task::Ping(pinging) => pinging.left == 0 && pinging.waiting.is_none(),
            Task::Send { socket, .. } => {
                let state = self.sockets.get::<tcp::Socket<'_>>(*socket).state();
                matches!(state, tcp::State::TimeWait | tcp::State::Closed)
            }
            Task::Receive { socket, .. } => {
                self.sockets.get::<tcp::Socket<'_>>(*socket).state() == tcp::State::Closed
            }
        };
        if !done {
            return;
        }
        match std::mem::replace(&mut self.task, Task::Serve) {
            Task::Serve => {}
            Task::Ping(pinging) => (self.tell)(Report::Pinged(pinging.pings)),
            Task::Send { socket, left, started, .. } => {
                let state = self.sockets.get::<tcp::Socket<'_>>(socket).state();
                self.sockets.remove(socket);
                (self.tell)(if left == 0 && state == tcp::State::TimeWait {
                    Report::Sent { started }
                } else {
                    Report::Failed(format!("the connection broke with {left} bytes to send"))
                });
            }
            Task::Receive { socket, hasher, bytes, finished } => {
                self.sockets.remove(socket);
                let digest = hasher.finalize().into();
                (self.tell)(Report::Received(Received { bytes, digest, finished }));
            }
        }
    }

    /// Applies what the DHCP client reports. The client renews its lease as long as the guest
    /// lives.
    fn follow_dhcp(&mut self) {
        match self.sockets.get_mut::<dhcpv4::Socket<'_>>(self.dhcp).poll() {
            None => {}
            Some(dhcpv4::Event::Deconfigured) => {
                self.interface.update_ip_addrs(|addresses| addresses.clear());
                self.interface.routes_mut().remove_default_ipv4_route();
            }
            Some(dhcpv4::Event::Configured(config)) => {
                self.interface.update_ip_addrs(|addresses| {
                    addresses.clear();
                    let _ = addresses.push(IpCidr::Ipv4(config.address));
                });
                let routes = self.interface.routes_mut();
                routes.remove_default_ipv4_route();
                if let Some(router) = config.router {
                    let _ = routes.add_default_ipv4_route(router);
                }
                let lease_time = |option: DhcpOption<'_>| {
                    let seconds = option.data.try_into().ok().map(u32::from_be_bytes);
                    seconds.filter(|_| option.kind == OPTION_LEASE_TIME)
                };
                (self.tell)(Report::Leased(Lease {
                    address: config.address,
                    server: config.server.address,
                    router: config.router,
                    seconds: config.packet.and_then(|p| p.options().find_map(lease_time)),
                }));
            }
        }
    }
}

fn tcp_socket(receive: usize, send: usize) -> tcp::Socket<'static> {
    let buffer = |size| tcp::SocketBuffer::new(vec![0; size]);
    let mut socket = tcp::Socket::new(buffer(receive), buffer(send));
    socket.set_nagle_enabled(false);
    // The stack answers a batch at a time in any case.
    socket.set_ack_delay(None);
    socket.set_timeout(Some(smoltcp::time::Duration::from_secs(30)));
    socket
}

impl Pinging {
    /// Handles the answers, gives up on a late one, and sends the next ping.
    fn step(&mut self, socket: &mut icmp::Socket<'_>, sequence: &mut u16) -> Option<Instant> {
        let now = Instant::now();
        while let Ok((packet, from)) = socket.recv() {
            let Some(answered) = answer(packet) else { continue };
            if let Some((waiting, sent)) = self.waiting
                && waiting == answered
                && from == IpAddress::from(self.target)
            {
                self.waiting = None;
                if self.in_contact {
                    self.pings.round_trips.push(now - sent);
                }
                self.in_contact = true;
            }
        }
        let timeout = if self.in_contact { PING_TIMEOUT } else { CONTACT_TIMEOUT };
        if self.waiting.is_some_and(|(_, sent)| now >= sent + timeout) {
            self.waiting = None;
            if !self.in_contact {
                // The target does not answer at all.
                self.pings.sent += std::mem::take(&mut self.left);
            }
        }
        if self.waiting.is_none() && self.left > 0 && socket.can_send() {
            *sequence = sequence.wrapping_add(1);
            let request = request(*sequence);
            if let Ok(packet) = socket.send(request.buffer_len(), self.target.into()) {
                let mut packet = Icmpv4Packet::new_unchecked(packet);
                request.emit(&mut packet, &ChecksumCapabilities::default());
                if self.in_contact {
                    self.left -= 1;
                    self.pings.sent += 1;
                }
                self.waiting = Some((*sequence, Instant::now()));
            }
        }
        self.waiting.map(|(_, sent)| sent + timeout)
    }
}

/// An echo request with this sequence number.
pub(crate) fn request(sequence: u16) -> Icmpv4Repr<'static> {
    Icmpv4Repr::EchoRequest { ident: ECHO_IDENT, seq_no: sequence, data: &PING_PAYLOAD }
}

/// The sequence number of a valid echo reply.
pub(crate) fn answer(packet: &[u8]) -> Option<u16> {
    let packet = Icmpv4Packet::new_checked(packet).ok()?;
    match Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).ok()? {
        Icmpv4Repr::EchoReply { ident: ECHO_IDENT, seq_no, data } if data == PING_PAYLOAD => {
            Some(seq_no)
        }
        _ => None,
    }
}
