//! A wire over connections: who the peer is, how the next one is found, and what is left of the last
//! write. Streams and sequenced packets have it.
//!
//! The device and its queues share one [`Link`]. Each queue keeps a [`Handle`], which knows the current
//! connection. Its look at the link's version costs a load; the lock is taken only when the peer changes,
//! or when there is none.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::counters::{Counters, add_one};
use super::framing::StreamParser;
use super::limits::{ACCEPT_AGAIN, RECEIVE_BUFFER, RECONNECT};
use super::place::{self, Listener, SocketFile, SocketKind, may_come};
use super::sys;
use crate::error::Status;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering};
use crate::sys::{after, lock};

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The peer has closed it, or is dead. `within`: in the middle of a payload.
    Gone { within: bool },
    /// A length above the maximum.
    AboveMaximum,
    /// The system refuses to receive or send.
    Failed(i32),
}

impl End {
    /// The status with which a ring closes whose only connection ends.
    fn status(self) -> Status {
        Status::Os(match self {
            End::Gone { .. } => libc::ECONNRESET,
            End::AboveMaximum => libc::EPROTO,
            End::Failed(errno) => errno,
        })
    }
}

/// A connection to a peer.
#[derive(Debug)]
pub(super) struct Connection {
    /// It tells the connections of a link apart.
    pub(super) number: u64,
    pub(super) socket: Arc<OwnedFd>,
    /// What was received and not delivered. Unused by sockets of messages.
    pub(super) received: Mutex<Received>,
    /// What is left of the last payload that was sent. Unused by sockets of messages.
    pub(super) unsent: Mutex<Unsent>,
    /// The peer takes no more, but what it has sent may still wait to be received.
    pub(super) takes_no_more: AtomicBool,
}

/// What was received of a stream and not delivered: `bytes[start..end]`.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) parser: StreamParser,
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Received {
    fn new(parser: StreamParser) -> Self {
        Self { parser, bytes: Box::default(), start: 0, end: 0 }
    }

    pub(super) fn undelivered(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The parser, and the bytes that it is to look at.
    pub(super) fn parts(&mut self) -> (&mut StreamParser, &[u8]) {
        (&mut self.parser, &self.bytes[self.start..self.end])
    }

    /// Says that the first `len` bytes were delivered.
    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Receives as many bytes as there are and as there is space for, behind those that are not
    /// delivered. Returns how many, and whether there may be more. It is called if the bytes hold no
    /// whole payload, so only a part of one is ever moved.
    pub(super) fn receive(&mut self, socket: &OwnedFd) -> io::Result<(usize, bool)> {
        if self.bytes.is_empty() {
            // Pages that are never used cost no memory.
            self.bytes = vec![0; RECEIVE_BUFFER].into_boxed_slice();
        }
        if self.bytes.len() - self.end < RECEIVE_BUFFER / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let space = &mut self.bytes[self.end..];
        let room = space.len();
        let len = sys::receive(socket, space)?;
        self.end += len;
        Ok((len, len == room))
    }
}

/// The rest of a payload of which the system took a part. It goes first, whatever else is to be sent,
/// so that the peer never sees a torn payload.
#[derive(Debug, Default)]
pub(super) struct Unsent {
    pub(super) bytes: Vec<u8>,
    pub(super) sent: usize,
}

impl Unsent {
    pub(super) fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Sends it, or as much of it as the system takes. Returns whether nothing is left. After an error
    /// nothing is, because nobody takes it.
    pub(super) fn flush(&mut self, socket: &OwnedFd) -> io::Result<bool> {
        while !self.is_empty() {
            match sys::send(socket, &self.bytes[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(error) if is_busy(&error) => return Ok(false),
                Err(error) => {
                    self.clear();
                    return Err(error);
                }
            }
        }
        self.clear();
        Ok(true)
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
    }
}

/// Whether the system may take it later.
pub(super) fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR))
}

/// The errno of an error of the system.
pub(super) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Where the connections come from.
#[derive(Debug)]
pub(super) enum Source {
    /// The one that was given is the only one.
    Given,
    /// Peers connect.
    Listener { socket: Arc<OwnedFd>, _file: Option<SocketFile> },
    /// A path is connected to. Without a pause, once.
    Path { path: PathBuf, pause: Option<Duration> },
}

impl Source {
    pub(super) fn listener(listener: Listener) -> Self {
        let Listener { socket, file, .. } = listener;
        Source::Listener { socket, _file: file }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Link {
    kind: SocketKind,
    parser: StreamParser,
    buffers: (usize, usize),
    state: Mutex<State>,
    /// It changes with the connection, and at a stop.
    version: AtomicU64,
    pub(super) counters: Arc<Counters>,
}

#[derive(Debug)]
struct State {
    source: Option<Source>,
    current: Option<Arc<Connection>>,
    /// Nothing is tried before this time.
    not_before: Option<Instant>,
    /// There will be no connection any more.
    over: Option<Status>,
    /// How many queues read.
    readers: usize,
}

impl Link {
    /// Makes a link. `buffers` are the sizes of a socket's buffers: for sending and for receiving.
    pub(super) fn new(
        kind: SocketKind,
        source: Source,
        given: Option<OwnedFd>,
        parser: StreamParser,
        buffers: (usize, usize),
        counters: Arc<Counters>,
    ) -> Self {
        let state =
            State { source: Some(source), current: None, not_before: None, over: None, readers: 0 };
        let link = Self {
            kind,
            parser,
            buffers,
            state: Mutex::new(state),
            version: AtomicU64::new(1),
            counters,
        };
        if let Some(socket) = given {
            lock(&link.state).current = Some(link.connection(socket));
        }
        link
    }

    fn connection(&self, socket: OwnedFd) -> Arc<Connection> {
        sys::set_buffers(&socket, self.buffers.0, self.buffers.1);
        let number = self.counters.peers.fetch_add(1, Ordering::Relaxed);
        Arc::new(Connection {
            number,
            socket: Arc::new(socket),
            received: Mutex::new(Received::new(self.parser.clone())),
            unsent: Mutex::default(),
            takes_no_more: AtomicBool::new(false),
        })
    }

    /// Looks for a peer if there is none, and returns the connection.
    fn establish(&self, state: &mut State) -> Option<Arc<Connection>> {
        if state.current.is_some() || state.over.is_some() {
            return state.current.clone();
        }
        if state.not_before.is_some_and(|at| Instant::now() < at) {
            return None;
        }
        state.not_before = None;
        let next = match state.source.as_ref()? {
            Source::Given => return None,
            Source::Listener { socket, .. } => sys::accept(socket.as_fd()),
            Source::Path { path, pause } => match place::connect(self.kind, path) {
                Ok(socket) => Ok(Some(socket)),
                Err(error) if may_come(&error) => {
                    state.not_before = Some(after(pause.unwrap_or(RECONNECT)));
                    Ok(None)
                }
                Err(error) => Err(error),
            },
        };
        let next = next.unwrap_or_else(|error| {
            tracing::warn!(%error, "a wire finds no peer");
            add_one(&self.counters.failed);
            state.not_before = Some(after(ACCEPT_AGAIN));
            None
        });
        state.current = next.map(|socket| self.connection(socket));
        if state.current.is_some() {
            self.changed();
        }
        state.current.clone()
    }

    /// How often an idle queue is polled, so that it tries to connect, or to accept after a failure.
    pub(super) fn pause(&self) -> Option<Duration> {
        match &lock(&self.state).source {
            Some(Source::Path { pause, .. }) => *pause,
            Some(Source::Listener { .. }) => Some(ACCEPT_AGAIN),
            _ => None,
        }
    }

    fn changed(&self) {
        // Release: pairs with the Acquire in `Handle::connection`. The lock orders the rest.
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Ends a connection. Returns the status with which a ring closes, if there will be no other one.
    fn end(&self, connection: &Arc<Connection>, end: End) -> Option<Status> {
        let mut state = lock(&self.state);
        if !state.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, connection)) {
            return state.over;
        }
        tracing::debug!(?end, "a wire's peer has gone");
        sys::shutdown(&connection.socket);
        state.current = None;
        add_one(&self.counters.ended);
        match end {
            End::Gone { within: true } => add_one(&self.counters.ended_within),
            End::AboveMaximum => add_one(&self.counters.above_maximum),
            _ => {}
        }
        match &state.source {
            Some(Source::Listener { .. }) => {}
            // A peer that ends each connection is not asked again at once.
            Some(Source::Path { pause: Some(pause), .. }) => state.not_before = Some(after(*pause)),
            _ => state.over = Some(end.status()),
        }
        self.changed();
        state.over
    }

    /// Ends the current connection, so that the next one is looked for. A connection that was given
    /// stays.
    pub(super) fn restart(&self) {
        let mut state = lock(&self.state);
        if state.over.is_some() || matches!(state.source, Some(Source::Given) | None) {
            return;
        }
        state.not_before = None;
        if let Some(connection) = state.current.take() {
            part(&connection);
            self.changed();
        }
        self.establish(&mut state);
    }

    /// Ends the link. A socket of a path that was listened on goes.
    pub(super) fn stop(&self) {
        let mut state = lock(&self.state);
        state.source = None;
        state.over.get_or_insert(Status::SetupIncomplete);
        if let Some(connection) = state.current.take() {
            part(&connection);
        }
        self.changed();
    }
}

/// Ends a connection from this side. What is left of the last payload goes, if the system takes it now.
fn part(connection: &Connection) {
    let _ = lock(&connection.unsent).flush(&connection.socket);
    sys::shutdown(&connection.socket);
}

/// A queue's view of its [`Link`].
#[derive(Debug)]
pub(super) struct Handle {
    link: Arc<Link>,
    current: Option<Arc<Connection>>,
    /// The socket of the connection before, until there is another one. While it is open, the system gives
    /// the number of its descriptor to no other. Otherwise the next connection could have this number, and
    /// a poller takes an equal number for the same file.
    last: Option<Arc<OwnedFd>>,
    listener: Option<Arc<OwnedFd>>,
    /// Whether the link waits for a time, and not for its listener.
    is_paused: bool,
    version: u64,
    reads: bool,
}

impl Handle {
    pub(super) fn new(link: Arc<Link>, reads: bool) -> Self {
        let mut state = lock(&link.state);
        state.readers += usize::from(reads);
        let listener = match &state.source {
            Some(Source::Listener { socket, .. }) => Some(socket.clone()),
            _ => None,
        };
        drop(state);
        Self { link, current: None, last: None, listener, is_paused: false, version: 0, reads }
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.link.counters
    }

    /// The current connection. Looks for a peer if there is none.
    ///
    /// # Errors
    ///
    /// The status with which the ring closes, if there will be no connection any more.
    #[inline]
    pub(super) fn connection(&mut self) -> Result<Option<Arc<Connection>>, Status> {
        // Acquire: pairs with the Release in `Link::changed`.
        let version = self.link.version.load(Ordering::Acquire);
        if self.current.is_none() || version != self.version {
            self.look()?;
        }
        Ok(self.current.clone())
    }

    #[cold]
    fn look(&mut self) -> Result<(), Status> {
        self.forget_current();
        let mut state = lock(&self.link.state);
        if let Some(status) = state.over {
            return Err(status);
        }
        self.current = self.link.establish(&mut state);
        if self.current.is_some() {
            self.last = None;
        }
        self.is_paused = state.not_before.is_some();
        // Under the lock, so it belongs to what was just seen.
        self.version = self.link.version.load(Ordering::Relaxed);
        Ok(())
    }

    fn forget_current(&mut self) {
        if let Some(connection) = self.current.take() {
            self.last = Some(connection.socket.clone());
        }
    }

    /// Ends a connection.
    ///
    /// # Errors
    ///
    /// The status with which the ring closes, if there will be no other one.
    #[cold]
    pub(super) fn end(&mut self, connection: &Arc<Connection>, end: End) -> Result<(), Status> {
        self.forget_current();
        self.link.end(connection, end).map_or(Ok(()), Err)
    }

    /// Says that the peer takes no more. If a queue reads, that one ends the connection when it has read
    /// what the peer had sent before.
    ///
    /// # Errors
    ///
    /// The status with which the ring closes, if there will be no other connection.
    #[cold]
    pub(super) fn takes_no_more(
        &mut self,
        connection: &Arc<Connection>,
        error: &io::Error,
    ) -> Result<(), Status> {
        connection.takes_no_more.store(true, Ordering::Relaxed);
        if lock(&self.link.state).readers > 0 {
            return Ok(());
        }
        let end = match errno(error) {
            libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN => End::Gone { within: false },
            errno => End::Failed(errno),
        };
        self.end(connection, end)
    }

    /// What is readable when a peer has sent something, or comes.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match (&self.current, &self.listener) {
            (Some(connection), _) => Some(connection.socket.as_fd()),
            (None, Some(listener)) if !self.is_paused => Some(listener.as_fd()),
            _ => None,
        }
    }

    /// The connection that the last poll used.
    pub(super) fn current(&self) -> Option<&Arc<Connection>> {
        self.current.as_ref()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        lock(&self.link.state).readers -= usize::from(self.reads);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a full buffer is no error, whichever way a system says so: macOS and the BSDs say `ENOBUFS`.
    #[test]
    fn a_system_that_is_busy_is_asked_again() {
        let says = |errno| is_busy(&io::Error::from_raw_os_error(errno));
        for errno in [libc::EAGAIN, libc::EWOULDBLOCK, libc::ENOBUFS, libc::ENOMEM, libc::EINTR] {
            assert!(says(errno), "{errno}");
        }
        for errno in [libc::EPIPE, libc::ECONNRESET, libc::EMSGSIZE, libc::EBADF, libc::ENOTCONN] {
            assert!(!says(errno), "{errno}");
        }
        assert!(!is_busy(&io::Error::other("no number")));
    }
}
