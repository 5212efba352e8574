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

use vmring_nat::{Capabilities, ConnectOptions, Readiness, SendSpace, SocketError, Sockets, Token};

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
    pub(crate) peek_at: usize,
    pub(crate) ended: bool,
    pub(crate) error: Option<SocketError>,
    /// What the socket has been given.
    pub(crate) sent: Vec<u8>,
    /// How much of that the peer has not read.
    pub(crate) queued: usize,
    pub(crate) capacity: usize,
    pub(crate) armed: bool,
    pub(crate) shut: bool,
    /// How the translator ended it: `Some(true)` with a reset.
    pub(crate) closed: Option<bool>,
    /// Bytes that were unread when it was closed.
    pub(crate) unread: usize,
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
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) peers: Vec<Peer>,
    pub(crate) events: VecDeque<(Token, Readiness)>,
    pub(crate) answer: Answer,
    pub(crate) capacity: usize,
    pub(crate) calls: Calls,
    pub(crate) capabilities: Capabilities,
    /// The most bytes that one call moves.
    pub(crate) most: usize,
    /// The host's own addresses.
    pub(crate) addresses: Result<Vec<IpAddr>, SocketError>,
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
            calls: Calls::default(),
            capabilities: Capabilities {
                peek_offset_v4: true,
                peek_offset_v6: true,
                descriptors: 10_000,
            },
            most: usize::MAX,
            addresses: Ok(vec!["198.51.100.7".parse().unwrap()]),
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
        self.tell(index, Readiness { writable: true, failed, closed: failed, readable: failed });
    }

    pub(crate) fn write(&self, index: usize, bytes: &[u8]) {
        self.with(index, |peer| {
            assert!(!peer.ended && peer.error.is_none(), "the peer sends no more");
            peer.incoming.extend(bytes);
        });
        self.tell(index, Readiness { readable: true, ..Readiness::default() });
    }

    /// The peer sends FIN.
    pub(crate) fn finish(&self, index: usize) {
        self.with(index, |peer| peer.ended = true);
        self.tell(index, Readiness { readable: true, closed: true, ..Readiness::default() });
    }

    /// The peer sends a reset.
    pub(crate) fn reset(&self, index: usize) {
        self.with(index, |peer| peer.error = Some(SocketError::Reset));
        let readiness = Readiness { readable: true, writable: true, closed: true, failed: true };
        self.tell(index, readiness);
    }

    /// Tells that there is something to read, and not that it is a reset.
    pub(crate) fn write_after_reset(&self, index: usize) {
        self.tell(index, Readiness { readable: true, ..Readiness::default() });
    }

    /// The peer reads so much.
    pub(crate) fn read(&self, index: usize, len: usize) {
        let armed = self.with(index, |peer| {
            peer.queued = peer.queued.saturating_sub(len);
            peer.takes() && std::mem::take(&mut peer.armed)
        });
        if armed {
            self.tell(index, Readiness { writable: true, ..Readiness::default() });
        }
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
            peek_at: 0,
            ended: false,
            error: None,
            sent: Vec::new(),
            queued: 0,
            capacity,
            armed: false,
            shut: false,
            closed: None,
            unread: 0,
        }
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
        self.with(socket.index, |peer| peer.peek_at = offset as usize);
        Ok(())
    }

    fn peek(&mut self, socket: &Socket, into: &mut [IoSliceMut<'_>]) -> Result<usize, SocketError> {
        let most = {
            let mut world = self.0.borrow_mut();
            world.calls.peek += 1;
            world.most
        };
        self.with(socket.index, |peer| {
            let len = copy(&peer.incoming, peer.peek_at, most, into);
            peer.peek_at += len;
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
            peer.peek_at = peer.peek_at.saturating_sub(len);
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
            let len = all.min(most).min(peer.capacity - peer.queued);
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

    fn keep_alive(&mut self, _: &Socket) {}
    fn reset(&mut self, socket: Socket) {
        self.with(socket.index, |peer| peer.closed = Some(true));
    }

    fn send_space(&mut self, socket: &Socket) -> Result<SendSpace, SocketError> {
        self.0.borrow_mut().calls.send_space += 1;
        self.with(socket.index, |peer| {
            Ok(SendSpace {
                free: (peer.capacity - peer.queued) as u32,
                capacity: peer.capacity as u32,
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

    fn local_address(&mut self, _: &Socket) -> Result<SocketAddr, SocketError> {
        Ok(([192, 0, 2, 1], 40_000).into())
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
