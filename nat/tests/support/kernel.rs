//! A model of the host's sockets: receive queues with a peek offset, send buffers that fill up, and
//! readiness that is told once.
//!
//! What it does at the edges is what Linux 6.18 was seen to do: a peek at the end of the queue finds
//! 0 after the peer's FIN, whatever is still unread before it; after a reset, the first peek at the
//! end says so and every later one finds 0; `take_error` takes the reset as well.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use vmring_nat::{
    Capabilities, ConnectOptions, DatagramError, Incoming, Outgoing, Readiness, Route, SendSpace,
    SocketError, Sockets, Token,
};

/// How a peer answers an attempt to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Not yet: the test says when.
    Later,
    /// At once, as far as an attempt that does not block can.
    Connect,
    /// The call itself fails.
    Fail(SocketError),
}

/// What a socket of datagrams has sent in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) route: Option<Route>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) segment: u16,
    /// In which call.
    pub(crate) call: usize,
    /// The hop limit and the differentiated services that the socket had.
    pub(crate) ip_fields: Option<(u8, u8)>,
}

/// What makes a socket one of datagrams, or a listener.
#[derive(Debug, Default)]
pub(crate) struct Datagrams {
    /// The port on the host.
    pub(crate) port: u16,
    pub(crate) incoming: VecDeque<(Incoming, Vec<u8>)>,
    pub(crate) errors: VecDeque<(DatagramError, Vec<u8>)>,
    pub(crate) sent: Vec<Sent>,
    pub(crate) ip_fields: Option<(u8, u8)>,
    /// What the next calls to send return instead of sending, or those to accept instead of a connection.
    pub(crate) failures: VecDeque<SocketError>,
    /// Connections that wait, by their peers.
    pub(crate) backlog: VecDeque<SocketAddr>,
    pub(crate) bound: Option<SocketAddr>,
}

/// One socket of the host, and its peer.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) token: Token,
    pub(crate) to: SocketAddr,
    pub(crate) options: ConnectOptions,
    /// `None` while it connects.
    pub(crate) connected: Option<Result<(), SocketError>>,
    /// What the peer has sent and the socket has not given away.
    pub(crate) incoming: VecDeque<u8>,
    /// Where the next peek begins, once that was set.
    pub(crate) peek_at: Option<usize>,
    pub(crate) ended: bool,
    pub(crate) error: Option<SocketError>,
    /// What the socket has been given.
    pub(crate) sent: Vec<u8>,
    /// How much of that the peer has not read.
    pub(crate) queued: usize,
    pub(crate) capacity: usize,
    /// A call found less space than it asked for.
    pub(crate) was_full: bool,
    pub(crate) armed: bool,
    pub(crate) shut: bool,
    /// How the translator ended it: `Some(true)` with a reset.
    pub(crate) closed: Option<bool>,
    /// Bytes that were unread when it was closed.
    pub(crate) unread: usize,
    pub(crate) datagrams: Datagrams,
}

/// How often each call was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Calls {
    pub(crate) connect: usize,
    pub(crate) peek: usize,
    pub(crate) receive: usize,
    pub(crate) discard: usize,
    pub(crate) set_peek_offset: usize,
    pub(crate) send: usize,
    pub(crate) send_space: usize,
    pub(crate) arm_writable: usize,
    pub(crate) keep_alive: usize,
    pub(crate) send_datagrams: usize,
    pub(crate) receive_datagrams: usize,
    pub(crate) accept: usize,
    pub(crate) resolvers: usize,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) peers: Vec<Peer>,
    pub(crate) events: VecDeque<(Token, Readiness)>,
    pub(crate) answer: Answer,
    pub(crate) capacity: usize,
    /// How much less than that a socket says it takes, because it counts in other units.
    pub(crate) understated: usize,
    /// As Linux does it, a buffer that was full has twice its size when the peer has read something.
    pub(crate) grows: bool,
    pub(crate) calls: Calls,
    pub(crate) capabilities: Capabilities,
    /// The most bytes that one call moves.
    pub(crate) most: usize,
    /// Ports of the host that others have.
    pub(crate) ports_in_use: Vec<u16>,
    /// How opening a socket of datagrams, a listener, or taking a connection fails.
    pub(crate) failure: Option<SocketError>,
    /// The host's own addresses.
    pub(crate) addresses: Result<Vec<IpAddr>, SocketError>,
    /// The host's resolvers, if they have changed.
    pub(crate) resolvers: Result<Option<Vec<SocketAddr>>, SocketError>,
}

/// The sockets that a translator gets. The test keeps another handle.
#[derive(Clone, Debug)]
pub(crate) struct Kernel(pub(crate) Rc<RefCell<World>>);

/// One open socket.
#[derive(Debug)]
pub(crate) struct Socket {
    world: Rc<RefCell<World>>,
    pub(crate) index: usize,
}

impl Drop for Socket {
    fn drop(&mut self) {
        let peer = &mut self.world.borrow_mut().peers[self.index];
        peer.unread = peer.incoming.len();
        // Unread bytes make the kernel send a reset (`__tcp_close` in net/ipv4/tcp.c).
        peer.closed.get_or_insert(peer.unread > 0);
        peer.incoming.clear();
    }
}

impl Kernel {
    pub(crate) fn new() -> Self {
        Self(Rc::new(RefCell::new(World {
            peers: Vec::new(),
            events: VecDeque::new(),
            answer: Answer::Later,
            capacity: 200_000,
            understated: 0,
            grows: false,
            calls: Calls::default(),
            capabilities: Capabilities {
                peek_offset_v4: true,
                peek_offset_v6: true,
                descriptors: 10_000,
                udp_segments: 64,
                echo_v4: true,
                echo_v6: true,
            },
            ports_in_use: Vec::new(),
            failure: None,
            most: usize::MAX,
            addresses: Ok(vec!["198.51.100.7".parse().unwrap()]),
            resolvers: Ok(None),
        })))
    }

    fn tell(&self, index: usize, readiness: Readiness) {
        let mut world = self.0.borrow_mut();
        let peer = &world.peers[index];
        if peer.closed.is_none() {
            let token = peer.token;
            world.events.push_back((token, readiness));
        }
    }

    pub(crate) fn take_event(&self) -> Option<(Token, Readiness)> {
        self.0.borrow_mut().events.pop_front()
    }

    pub(crate) fn calls(&self) -> Calls {
        self.0.borrow().calls
    }

    pub(crate) fn with<R>(&self, index: usize, f: impl FnOnce(&mut Peer) -> R) -> R {
        f(&mut self.0.borrow_mut().peers[index])
    }

    pub(crate) fn len(&self) -> usize {
        self.0.borrow().peers.len()
    }

    /// How many sockets are open.
    pub(crate) fn open(&self) -> usize {
        self.0.borrow().peers.iter().filter(|peer| peer.closed.is_none()).count()
    }

    pub(crate) fn connect(&self, index: usize, result: Result<(), SocketError>) {
        self.with(index, |peer| peer.connected = Some(result));
        let failed = result.is_err();
        self.tell(
            index,
            Readiness {
                writable: true,
                failed,
                closed: failed,
                readable: failed,
                ..Readiness::default()
            },
        );
    }

    pub(crate) fn write(&self, index: usize, bytes: &[u8]) {
        self.with(index, |peer| {
            assert!(!peer.ended && peer.error.is_none(), "the peer sends no more");
            peer.incoming.extend(bytes);
        });
        self.tell(index, Readiness { readable: true, ..Readiness::default() });
    }

    /// The peer sends FIN behind its last bytes. Both are told of together.
    pub(crate) fn write_and_finish(&self, index: usize, bytes: &[u8]) {
        self.with(index, |peer| {
            assert!(!peer.ended && peer.error.is_none(), "the peer sends no more");
            peer.incoming.extend(bytes);
            peer.ended = true;
        });
        self.tell(index, Readiness { readable: true, closed: true, ..Readiness::default() });
    }

    /// The peer sends bytes, and FIN, and then a reset, which is not told of yet.
    pub(crate) fn write_before_reset(&self, index: usize, bytes: &[u8]) {
        self.with(index, |peer| {
            peer.incoming.extend(bytes);
            peer.error = Some(SocketError::Reset);
        });
        self.tell(index, Readiness { readable: true, closed: true, ..Readiness::default() });
    }

    /// The peer sends FIN.
    pub(crate) fn finish(&self, index: usize) {
        self.with(index, |peer| peer.ended = true);
        self.tell(index, Readiness { readable: true, closed: true, ..Readiness::default() });
    }

    /// The peer sends a reset.
    pub(crate) fn reset(&self, index: usize) {
        self.with(index, |peer| peer.error = Some(SocketError::Reset));
        let readiness = Readiness {
            readable: true,
            writable: true,
            closed: true,
            failed: true,
            ..Readiness::default()
        };
        self.tell(index, readiness);
    }

    /// Tells that there is something to read, and not that it is a reset.
    pub(crate) fn write_after_reset(&self, index: usize) {
        self.tell(index, Readiness { readable: true, ..Readiness::default() });
    }

    /// The peer reads so much.
    pub(crate) fn read(&self, index: usize, len: usize) {
        let grows = self.0.borrow().grows;
        let armed = self.with(index, |peer| {
            if grows && len > 0 && std::mem::take(&mut peer.was_full) {
                peer.capacity *= 2;
            }
            peer.queued = peer.queued.saturating_sub(len);
            peer.takes() && std::mem::take(&mut peer.armed)
        });
        if armed {
            self.tell(index, Readiness { writable: true, ..Readiness::default() });
        }
    }

    /// A peer sends a datagram, or several of equal size, to a socket.
    pub(crate) fn datagram(&self, index: usize, from: SocketAddr, bytes: &[u8], segment: u16) {
        self.with(index, |peer| {
            let incoming = Incoming { len: bytes.len(), from, segment, to: None };
            peer.datagrams.incoming.push_back((incoming, bytes.to_vec()));
        });
        self.tell(index, Readiness { readable: true, ..Readiness::default() });
    }

    /// A datagram of a socket meets an error.
    pub(crate) fn datagram_error(&self, index: usize, error: DatagramError, quoted: &[u8]) {
        self.with(index, |peer| peer.datagrams.errors.push_back((error, quoted.to_vec())));
        let failed = Readiness { failed: true, readable: true, ..Readiness::default() };
        self.tell(index, failed);
    }

    /// Peers connect to a listener.
    pub(crate) fn knock(&self, index: usize, from: SocketAddr) {
        self.with(index, |peer| peer.datagrams.backlog.push_back(from));
        self.tell(index, Readiness { readable: true, ..Readiness::default() });
    }

    pub(crate) fn sent(&self, index: usize) -> Vec<Sent> {
        self.with(index, |peer| std::mem::take(&mut peer.datagrams.sent))
    }

    /// Opens a socket at a port, or at a free one if it is 0.
    fn open_at(&self, at: SocketAddr, to: SocketAddr, token: Token) -> Result<Socket, SocketError> {
        let index = {
            let mut world = self.0.borrow_mut();
            if let Some(error) = world.failure {
                return Err(error);
            }
            let used = |port: u16| {
                world.ports_in_use.contains(&port)
                    || world.peers.iter().any(|p| p.closed.is_none() && p.datagrams.port == port)
            };
            let port = match at.port() {
                0 => (50_000..).find(|&port| !used(port)).unwrap(),
                port if used(port) => return Err(SocketError::NoPort),
                port => port,
            };
            let capacity = world.capacity;
            let mut peer = Peer::new(to, ConnectOptions::default(), token, capacity);
            peer.datagrams.port = port;
            peer.datagrams.bound = Some(SocketAddr::new(at.ip(), port));
            world.peers.push(peer);
            world.peers.len() - 1
        };
        Ok(Socket { world: self.0.clone(), index })
    }

    /// Makes a connection that a listener has accepted.
    pub(crate) fn accepted(&self, from: SocketAddr) -> Socket {
        let mut world = self.0.borrow_mut();
        let options = ConnectOptions::default();
        let mut peer = Peer::new(from, options, Token(u64::MAX), world.capacity);
        peer.connected = Some(Ok(()));
        world.peers.push(peer);
        Socket { world: self.0.clone(), index: world.peers.len() - 1 }
    }
}

impl Peer {
    fn new(to: SocketAddr, options: ConnectOptions, token: Token, capacity: usize) -> Self {
        Self {
            token,
            to,
            options,
            connected: None,
            incoming: VecDeque::new(),
            peek_at: None,
            ended: false,
            error: None,
            sent: Vec::new(),
            queued: 0,
            capacity,
            was_full: false,
            armed: false,
            shut: false,
            closed: None,
            unread: 0,
            datagrams: Datagrams::default(),
        }
    }

    /// Whether the peer has got FIN: by shutdown, or by a close that is no reset.
    pub(crate) fn got_fin(&self) -> bool {
        self.shut || self.closed == Some(false)
    }

    /// Whether the kernel would say that the socket takes bytes: a third of its buffer is free.
    fn takes(&self) -> bool {
        self.capacity - self.queued >= self.capacity / 3
    }
}

/// Copies bytes from `at` on into slices.
fn copy(from: &VecDeque<u8>, at: usize, most: usize, into: &mut [IoSliceMut<'_>]) -> usize {
    let mut done = 0;
    for slice in into {
        for byte in slice.iter_mut() {
            if done == most || at + done >= from.len() {
                return done;
            }
            *byte = from[at + done];
            done += 1;
        }
    }
    done
}

impl Sockets for Kernel {
    type Socket = Socket;

    fn capabilities(&self) -> Capabilities {
        self.0.borrow().capabilities
    }

    fn host_addresses(&mut self) -> Result<Vec<IpAddr>, SocketError> {
        self.0.borrow().addresses.clone()
    }

    fn resolvers(&mut self) -> Result<Option<Vec<SocketAddr>>, SocketError> {
        let mut world = self.0.borrow_mut();
        world.calls.resolvers += 1;
        world.resolvers.clone()
    }

    fn connect_tcp(
        &mut self,
        to: SocketAddr,
        options: &ConnectOptions,
        token: Token,
    ) -> Result<Socket, SocketError> {
        let index = {
            let mut world = self.0.borrow_mut();
            world.calls.connect += 1;
            if let Answer::Fail(error) = world.answer {
                return Err(error);
            }
            let capacity = world.capacity;
            world.peers.push(Peer::new(to, *options, token, capacity));
            world.peers.len() - 1
        };
        if self.0.borrow().answer == Answer::Connect {
            self.connect(index, Ok(()));
        }
        Ok(Socket { world: self.0.clone(), index })
    }

    fn adopt_tcp(&mut self, socket: &Socket, token: Token) -> Result<(), SocketError> {
        let readable = self.with(socket.index, |peer| {
            peer.token = token;
            !peer.incoming.is_empty() || peer.ended
        });
        let closed = self.with(socket.index, |peer| peer.ended);
        if readable {
            self.tell(socket.index, Readiness { readable, closed, ..Readiness::default() });
        }
        Ok(())
    }

    fn take_error(&mut self, socket: &Socket) -> Result<(), SocketError> {
        self.with(socket.index, |peer| match peer.connected {
            None => Err(SocketError::WouldBlock),
            Some(Err(error)) => Err(error),
            Some(Ok(())) => match peer.error.take() {
                Some(error) => {
                    peer.ended = true;
                    Err(error)
                }
                None => Ok(()),
            },
        })
    }

    fn set_peek_offset(&mut self, socket: &Socket, offset: u32) -> Result<(), SocketError> {
        self.0.borrow_mut().calls.set_peek_offset += 1;
        self.with(socket.index, |peer| peer.peek_at = Some(offset as usize));
        Ok(())
    }

    fn peek(&mut self, socket: &Socket, into: &mut [IoSliceMut<'_>]) -> Result<usize, SocketError> {
        let most = {
            let mut world = self.0.borrow_mut();
            world.calls.peek += 1;
            world.most
        };
        self.with(socket.index, |peer| {
            let len = copy(&peer.incoming, peer.peek_at.unwrap_or(0), most, into);
            peer.peek_at = peer.peek_at.map(|at| at + len);
            peer.found(len)
        })
    }

    fn discard(&mut self, socket: &Socket, len: u32) -> Result<(), SocketError> {
        self.0.borrow_mut().calls.discard += 1;
        self.with(socket.index, |peer| {
            let len = len as usize;
            assert!(
                len > 0 && len <= peer.incoming.len(),
                "bytes are discarded that are not there"
            );
            peer.incoming.drain(..len);
            peer.peek_at = peer.peek_at.map(|at| at.saturating_sub(len));
        });
        Ok(())
    }

    fn receive(
        &mut self,
        socket: &Socket,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<usize, SocketError> {
        let most = {
            let mut world = self.0.borrow_mut();
            world.calls.receive += 1;
            world.most
        };
        self.with(socket.index, |peer| {
            let len = copy(&peer.incoming, 0, most, into);
            peer.incoming.drain(..len);
            peer.found(len)
        })
    }

    fn send(&mut self, socket: &Socket, from: &[IoSlice<'_>]) -> Result<usize, SocketError> {
        let most = {
            let mut world = self.0.borrow_mut();
            world.calls.send += 1;
            world.most
        };
        self.with(socket.index, |peer| {
            assert!(!peer.shut, "bytes after shutdown");
            if let Some(error) = peer.error.take() {
                peer.ended = true;
                return Err(error);
            }
            let all: usize = from.iter().map(|part| part.len()).sum();
            let space = peer.capacity - peer.queued;
            peer.was_full |= all > space;
            let len = all.min(most).min(space);
            if len == 0 {
                return Err(SocketError::WouldBlock);
            }
            peer.sent.extend(from.iter().flat_map(|part| part.iter()).take(len));
            peer.queued += len;
            Ok(len)
        })
    }

    fn shutdown(&mut self, socket: &Socket) -> Result<(), SocketError> {
        self.with(socket.index, |peer| {
            assert!(!std::mem::replace(&mut peer.shut, true), "shut down twice");
            if peer.error.is_some() { Err(SocketError::Reset) } else { Ok(()) }
        })
    }

    fn keep_alive(&mut self, _: &Socket) {
        self.0.borrow_mut().calls.keep_alive += 1;
    }

    fn reset(&mut self, socket: Socket) {
        self.with(socket.index, |peer| peer.closed = Some(true));
    }

    fn send_space(&mut self, socket: &Socket) -> Result<SendSpace, SocketError> {
        let understated = {
            let mut world = self.0.borrow_mut();
            world.calls.send_space += 1;
            world.understated
        };
        self.with(socket.index, |peer| {
            let capacity = peer.capacity - understated;
            Ok(SendSpace {
                free: capacity.saturating_sub(peer.queued) as u32,
                capacity: capacity as u32,
                charge: 2 * peer.capacity as u32,
            })
        })
    }

    fn arm_writable(&mut self, socket: &Socket, _: Token) -> Result<(), SocketError> {
        self.0.borrow_mut().calls.arm_writable += 1;
        let takes = self.with(socket.index, |peer| {
            peer.armed = !peer.takes();
            !peer.armed
        });
        if takes {
            self.tell(socket.index, Readiness { writable: true, ..Readiness::default() });
        }
        Ok(())
    }

    fn local_address(&mut self, socket: &Socket) -> Result<SocketAddr, SocketError> {
        let bound = self.with(socket.index, |peer| peer.datagrams.bound);
        Ok(bound.unwrap_or(([192, 0, 2, 1], 40_000).into()))
    }

    fn connect_udp(
        &mut self,
        port: u16,
        to: SocketAddr,
        token: Token,
    ) -> Result<Socket, SocketError> {
        self.open_at(([0, 0, 0, 0], port).into(), to, token)
    }

    fn bind_udp(&mut self, at: SocketAddr, token: Token) -> Result<Socket, SocketError> {
        self.open_at(at, at, token)
    }

    fn connect_echo(&mut self, to: IpAddr, token: Token) -> Result<Socket, SocketError> {
        self.open_at(([0, 0, 0, 0], 0).into(), (to, 0).into(), token)
    }

    fn set_datagram_buffers(&mut self, socket: &Socket, len: u32) {
        self.with(socket.index, |peer| peer.options.buffers = Some(len));
    }

    fn set_ip_fields(&mut self, socket: &Socket, _: bool, hop_limit: u8, dscp: u8) {
        self.with(socket.index, |peer| peer.datagrams.ip_fields = Some((hop_limit, dscp)));
    }

    fn send_datagrams(
        &mut self,
        socket: &Socket,
        route: Option<Route>,
        batch: &[Outgoing<'_>],
    ) -> Result<usize, SocketError> {
        let call = {
            let calls = &mut self.0.borrow_mut().calls;
            calls.send_datagrams += 1;
            calls.send_datagrams
        };
        assert!(!batch.is_empty());
        self.with(socket.index, |peer| {
            let datagrams = &mut peer.datagrams;
            if let Some(error) = datagrams.failures.pop_front() {
                return Err(error);
            }
            for outgoing in batch {
                let bytes: Vec<u8> =
                    outgoing.parts.iter().flat_map(|part| part.iter().copied()).collect();
                let (segment, ip_fields) = (outgoing.segment, datagrams.ip_fields);
                // What the kernel demands (`udp_send_skb` in net/ipv4/udp.c).
                assert!(segment == 0 || bytes.len().div_ceil(segment.into()) <= 64);
                assert!(bytes.len() <= 65_507);
                datagrams.sent.push(Sent { route, bytes, segment, call, ip_fields });
            }
            Ok(batch.len())
        })
    }

    fn receive_datagrams(
        &mut self,
        socket: &Socket,
        into: &mut [u8],
        stride: usize,
        found: &mut [Incoming],
    ) -> Result<usize, SocketError> {
        self.0.borrow_mut().calls.receive_datagrams += 1;
        self.with(socket.index, |peer| {
            let mut count = 0;
            for (found, into) in found.iter_mut().zip(into.chunks_exact_mut(stride)) {
                let Some((incoming, bytes)) = peer.datagrams.incoming.pop_front() else { break };
                into[..bytes.len()].copy_from_slice(&bytes);
                *found = incoming;
                count += 1;
            }
            if count > 0 { Ok(count) } else { Err(SocketError::WouldBlock) }
        })
    }

    fn take_datagram_error(
        &mut self,
        socket: &Socket,
        quoted: &mut [u8],
    ) -> Result<Option<DatagramError>, SocketError> {
        self.with(socket.index, |peer| {
            let Some((mut error, bytes)) = peer.datagrams.errors.pop_front() else {
                return Ok(None);
            };
            error.quoted = bytes.len().min(quoted.len());
            quoted[..error.quoted].copy_from_slice(&bytes[..error.quoted]);
            Ok(Some(error))
        })
    }

    fn listen(&mut self, at: SocketAddr, _: u32, token: Token) -> Result<Socket, SocketError> {
        self.open_at(at, at, token)
    }

    fn accept(&mut self, listener: &Socket) -> Result<(Socket, SocketAddr), SocketError> {
        self.0.borrow_mut().calls.accept += 1;
        let failure = self.0.borrow().failure;
        let backlog = |peer: &mut Peer| match failure {
            Some(error) if !peer.datagrams.backlog.is_empty() => Err(error),
            _ => {
                let next = peer.datagrams.backlog.pop_front().ok_or(SocketError::WouldBlock)?;
                peer.datagrams.failures.pop_front().map_or(Ok(next), Err)
            }
        };
        let from = self.with(listener.index, backlog)?;
        Ok((self.accepted(from), from))
    }
}

impl Peer {
    /// What a look at the end of the queue finds.
    fn found(&mut self, len: usize) -> Result<usize, SocketError> {
        match self.error {
            _ if len > 0 => Ok(len),
            Some(error) => {
                self.error = None;
                self.ended = true;
                Err(error)
            }
            None if self.ended => Ok(0),
            None => Err(SocketError::WouldBlock),
        }
    }
}
