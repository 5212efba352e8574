//! A datagram socket: who the peer is. There is no connection that begins or ends, so a peer is learned
//! from the first message, or known by its path, and found to be gone when something is sent to it, or by
//! a look now and then.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use super::counters::{Counters, add_one};
use super::framing::VFKIT_MAGIC;
use super::limits::{RECONNECT, UNNAMED_PER_POLL};
use super::place::{SocketFile, may_come};
use super::sys::{self, Address};
use crate::error::Status;
use crate::sync::{AtomicBool, Mutex, Ordering};
use crate::sys::{after, lock};

/// How the peer is known.
#[derive(Debug)]
pub(super) enum PeerRule {
    /// The socket was given with its peer.
    Given,
    /// It is the one that sends first.
    Learn,
    /// The socket of a path. If `magic`, it is told that a VMM comes, as vfkit does.
    Known { path: PathBuf, address: Address, magic: bool, pause: Duration },
}

/// What follows when the peer has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another peer is looked for.
    Peer,
    /// The wire is over. The socket stays connected, so that nobody else can send to it.
    End,
    /// The wire is over, and the socket is for the next wire.
    Wire,
}

/// A datagram socket and its peer. The device and its queues share it.
#[derive(Debug)]
pub(super) struct Datagram {
    pub(super) socket: Arc<OwnedFd>,
    rule: PeerRule,
    next: Next,
    has_peer: AtomicBool,
    /// Whether messages of other senders may still be among those that wait to be received: they were
    /// there before the socket was connected. Linux lets nobody but the peer send to a connected socket.
    mixed: AtomicBool,
    state: Mutex<State>,
    pub(super) counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct State {
    /// The address of the peer, if it was learned or reached.
    peer: Option<Address>,
    /// Nothing is tried, and nobody is looked for, before this time.
    not_before: Option<Instant>,
    over: Option<Status>,
    /// The file of the peer's socket when the peer was found.
    file_of_peer: Option<FileId>,
    _file: Option<SocketFile>,
}

/// What tells the file of a socket from one of another socket at the same path. The number of a file may
/// be used again at once, so its time is compared too.
#[derive(Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
    modified: (i64, i64),
}

impl FileId {
    fn of(path: &Path) -> Option<Self> {
        let file = fs::metadata(path).ok()?;
        let modified = (file.mtime(), file.mtime_nsec());
        Some(Self { device: file.dev(), inode: file.ino(), modified })
    }
}

impl Datagram {
    pub(super) fn new(
        socket: Arc<OwnedFd>,
        rule: PeerRule,
        next: Next,
        file: Option<SocketFile>,
        counters: Arc<Counters>,
    ) -> Self {
        let given = matches!(rule, PeerRule::Given);
        if given {
            add_one(&counters.peers);
        }
        Self {
            socket,
            rule,
            next,
            has_peer: AtomicBool::new(given),
            mixed: AtomicBool::new(false),
            state: Mutex::new(State { _file: file, ..State::default() }),
            counters,
        }
    }

    /// How often an idle queue is polled.
    pub(super) fn pause(&self) -> Option<Duration> {
        match &self.rule {
            PeerRule::Given => None,
            PeerRule::Learn => Some(RECONNECT),
            PeerRule::Known { pause, .. } => Some(*pause),
        }
    }

    /// Whether there is a peer. Looks for one if there is none.
    ///
    /// # Errors
    ///
    /// The status with which the ring closes, if there will be none any more.
    #[inline]
    pub(super) fn find_peer(&self) -> Result<bool, Status> {
        // The flag comes with no other data: what belongs to it is under the lock.
        if self.has_peer.load(Ordering::Relaxed) { Ok(true) } else { self.look() }
    }

    #[cold]
    fn look(&self) -> Result<bool, Status> {
        let mut state = lock(&self.state);
        if let Some(status) = state.over {
            return Err(status);
        }
        let found = match &self.rule {
            PeerRule::Given => false,
            PeerRule::Learn => self.learn(&mut state),
            PeerRule::Known { path, address, magic, pause } => {
                if state.not_before.is_some_and(|at| Instant::now() < at) {
                    return Ok(false);
                }
                state.not_before = Some(after(*pause));
                state.file_of_peer = FileId::of(path);
                let found = sys::connect(&self.socket, address);
                if let Err(error) = &found
                    && !may_come(error)
                {
                    tracing::warn!(%error, "a wire finds no peer");
                    add_one(&self.counters.failed);
                }
                found.is_ok() && (!magic || sys::send(&self.socket, &VFKIT_MAGIC).is_ok())
            }
        };
        if found {
            add_one(&self.counters.peers);
            self.has_peer.store(true, Ordering::Relaxed);
        }
        Ok(found)
    }

    /// Makes the sender of the first message the peer. The message stays, to be received.
    fn learn(&self, state: &mut State) -> bool {
        for _ in 0..UNNAMED_PER_POLL {
            let Ok(sender) = sys::peek_sender(&self.socket) else { return false };
            if !sender.is_unnamed() && sys::connect(&self.socket, &sender).is_ok() {
                self.remember(state, sender);
                return true;
            }
            // Nobody can answer it: it has no name, or is gone already.
            let _ = sys::receive(&self.socket, &mut [0; 1]);
            add_one(&self.counters.unnamed);
        }
        false
    }

    fn remember(&self, state: &mut State, peer: Address) {
        tracing::debug!(?peer, "a wire has a peer");
        state.peer = Some(peer);
        state.file_of_peer = peer.path().and_then(|path| FileId::of(&path));
        state.not_before = Some(after(RECONNECT));
        self.mixed.store(true, Ordering::Relaxed);
    }

    /// Says that the socket is connected to this peer already.
    pub(super) fn has_peer(&self, peer: Address) {
        let mut state = lock(&self.state);
        match &self.rule {
            PeerRule::Known { path, magic, pause, .. } => {
                state.peer = Some(peer);
                state.file_of_peer = FileId::of(path);
                state.not_before = Some(after(*pause));
                self.mixed.store(true, Ordering::Relaxed);
                if *magic {
                    // If it fails, the peer has gone, and is found to be gone.
                    let _ = sys::send(&self.socket, &VFKIT_MAGIC);
                }
            }
            PeerRule::Given | PeerRule::Learn => self.remember(&mut state, peer),
        }
        add_one(&self.counters.peers);
        self.has_peer.store(true, Ordering::Relaxed);
    }

    /// Whether a message that comes can be received or thrown away. While a known peer is not there, what
    /// others send waits, and must not wake anybody.
    pub(super) fn takes_messages(&self) -> bool {
        matches!(self.rule, PeerRule::Learn) || self.has_peer.load(Ordering::Relaxed)
    }

    /// The sender whose messages count, if others may be among them.
    #[inline]
    pub(super) fn only_sender(&self) -> Option<Address> {
        if !self.mixed.load(Ordering::Relaxed) {
            return None;
        }
        lock(&self.state).peer
    }

    /// Says that no message was left to receive. Now and then this looks whether the peer is still there:
    /// while the socket is connected to one that is gone, nobody else can send to it.
    #[inline]
    pub(super) fn found_nothing(&self) {
        if cfg!(target_os = "linux") {
            self.mixed.store(false, Ordering::Relaxed);
        }
        if !matches!(self.rule, PeerRule::Given) {
            self.look_after_peer();
        }
    }

    fn look_after_peer(&self) {
        let mut state = lock(&self.state);
        if state.not_before.is_some_and(|at| Instant::now() < at) {
            return;
        }
        let (address, pause, is_other) = match (&self.rule, &state.peer) {
            (PeerRule::Known { path, address, pause, .. }, _) => {
                (*address, *pause, FileId::of(path) != state.file_of_peer)
            }
            (_, Some(address)) => {
                let file = address.path().and_then(|path| FileId::of(&path));
                (*address, RECONNECT, file != state.file_of_peer)
            }
            _ => return,
        };
        state.not_before = Some(after(pause));
        // To connect to the same socket again changes nothing. Another one has to be told who comes.
        if is_other || sys::connect(&self.socket, &address).is_err() {
            self.forget(&mut state);
        }
    }

    /// Says that the peer is gone.
    ///
    /// # Errors
    ///
    /// The status with which the ring closes, if there will be no other one.
    #[cold]
    pub(super) fn peer_is_gone(&self, error: &io::Error) -> Result<(), Status> {
        let mut state = lock(&self.state);
        if matches!(self.rule, PeerRule::Given) {
            let status = Status::Os(error.raw_os_error().unwrap_or(libc::ECONNRESET));
            state.over.get_or_insert(status);
        }
        self.forget(&mut state);
        state.over.map_or(Ok(()), Err)
    }

    fn forget(&self, state: &mut State) {
        if self.has_peer.swap(false, Ordering::Relaxed) {
            tracing::debug!(peer = ?state.peer, "a wire's peer has gone");
            add_one(&self.counters.ended);
        }
        state.peer = None;
        self.mixed.store(false, Ordering::Relaxed);
        match (&self.rule, self.next) {
            (PeerRule::Given, _) => {}
            (_, Next::Peer) => sys::disconnect(&self.socket),
            (_, Next::End | Next::Wire) => {
                state.over.get_or_insert(Status::Os(libc::ECONNRESET));
            }
        }
    }

    /// Forgets the peer, so that the next one is looked for. One that was given stays.
    pub(super) fn restart(&self) {
        let mut state = lock(&self.state);
        if !matches!(self.rule, PeerRule::Given) && state.over.is_none() {
            state.not_before = None;
            self.forget(&mut state);
        }
    }

    /// Ends the wire, and removes the socket's file if it is the wire's.
    pub(super) fn stop(&self) {
        let mut state = lock(&self.state);
        state.over.get_or_insert(Status::SetupIncomplete);
        state._file = None;
        self.has_peer.store(false, Ordering::Relaxed);
        match self.next {
            Next::Wire => sys::disconnect(&self.socket),
            Next::Peer | Next::End => sys::shutdown(&self.socket),
        }
    }
}
