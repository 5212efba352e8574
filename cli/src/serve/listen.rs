//! How connections are made: front ends connect, or are connected to, or were by somebody else.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{PermissionsExt, lchown};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use vmring::Socket;
use vmring::device::socket as wires;
use vmring_virtio::vhost_user::{Adopted, Listener, adopt, connect};

use super::limits::RETRY;
use super::spec::{Kind, ListenSpec, Place};
use crate::failure::Failure;
use crate::system;
use crate::wire::WireKind;

/// Takes over an inherited descriptor.
///
/// # Errors
///
/// If there is no such descriptor, or it was taken over before.
pub(super) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());
    // SAFETY: the call takes numbers only.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if !TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(number) {
        let text = format!("the descriptor {number} is there twice");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: it is open. Nothing in this process has opened it: whoever started the process did, and
    // says so on the command line or in the environment. It is taken over once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The descriptors that a service manager has passed, with their names (sd_listen_fds(3)).
#[derive(Debug, Default)]
pub(super) struct Passed(Vec<(RawFd, String)>);

impl Passed {
    pub(super) fn from_environment() -> Result<Self, Failure> {
        match sd_notify::listen_fds_with_names() {
            Ok(passed) => Ok(Self(passed.collect())),
            Err(error) => Err(Failure::Usage(format!(
                "the service manager's sockets cannot be taken over: LISTEN_FDS or LISTEN_FDNAMES is \
                 wrong: {error}"
            ))),
        }
    }

    fn named(&self, wanted: &str) -> Result<RawFd, Failure> {
        let mut found = self.0.iter().filter(|(_, name)| name == wanted);
        match (found.next(), found.next()) {
            (Some((fd, _)), None) => Ok(*fd),
            (Some(_), Some(_)) => Err(Failure::Usage(format!(
                "the service manager has passed several sockets with the name '{wanted}'; give each \
                 its own FileDescriptorName= in a socket unit of its own"
            ))),
            (None, _) => Err(Failure::Usage(format!(
                "the service manager has passed no socket with the name '{wanted}'{}",
                self.names()
            ))),
        }
    }

    fn names(&self) -> String {
        match &self.0[..] {
            [] => ", and none at all; start the server by its socket unit".to_owned(),
            some => {
                let names: Vec<_> = some.iter().map(|(_, name)| format!("'{name}'")).collect();
                format!("; it has passed {}", names.join(", "))
            }
        }
    }

    /// Refuses a socket that no option names: front ends would wait at it for ever.
    pub(super) fn check(&self, listens: &[ListenSpec]) -> Result<(), Failure> {
        let is_named = |fd: RawFd, name: &str| {
            listens.iter().any(|spec| match &spec.place {
                Place::Descriptor(number) => *number == fd,
                Place::Named(named) => named == name,
                Place::Server(_) | Place::Client(_) => false,
            })
        };
        match self.0.iter().find(|(fd, name)| !is_named(*fd, name)) {
            None => Ok(()),
            Some((_, name)) => Err(Failure::Usage(format!(
                "the service manager has passed a socket '{name}' that no option names; add --listen \
                 vhost-user:fd={name}"
            ))),
        }
    }
}

/// A `--listen` at work.
#[derive(Debug)]
pub(super) struct Listening {
    source: Source,
    /// Nothing is tried before this time.
    not_before: Option<Instant>,
    /// Datagrams whose senders nobody can answer, while there was no guest.
    unnamed: u64,
}

#[derive(Debug)]
enum Source {
    Listener(Listener),
    Client(PathBuf),
    Wires(wires::Listener, Framing),
    /// A datagram socket whose only guest is the one who sends first.
    First(wires::Listener, Framing),
    /// A datagram socket that has one guest after the other: the one who sends first, or the one at this
    /// path.
    Peers(wires::Listener, Option<PathBuf>, Framing),
    WireClient(PathBuf, Framing),
    Given(Option<Incoming>),
}

/// What a guest is reached by.
#[derive(Debug)]
pub(super) enum Incoming {
    VhostUser(UnixStream),
    /// A driver that has its socket.
    Wire(Box<Socket>),
}

impl Incoming {
    fn wire(socket: Socket) -> Self {
        Self::Wire(Box::new(socket))
    }
}

/// What a wire of frames speaks.
#[derive(Clone, Copy, Debug)]
struct Framing {
    kind: WireKind,
    header: bool,
}

impl Framing {
    fn driver(self, client: bool) -> Socket {
        self.kind.socket(client).virtio_header(self.header)
    }

    /// For one connection.
    fn over(self, socket: OwnedFd) -> Incoming {
        Incoming::wire(self.driver(false).from_fd(socket))
    }

    fn adopted(self, fd: OwnedFd) -> Result<Source, vmring::Error> {
        Ok(match wires::adopt(self.kind.socket_kind(), fd)? {
            wires::Adopted::Listening(listener) if self.kind.is_datagram() => {
                Source::Peers(listener, None, self)
            }
            wires::Adopted::Listening(listener) => Source::Wires(listener, self),
            wires::Adopted::Single(socket) => Source::Given(Some(self.over(socket))),
        })
    }

    /// Makes the socket that has a path.
    fn open(self, spec: &ListenSpec) -> Result<Source, vmring::Error> {
        let kind = self.kind.socket_kind();
        Ok(match (&spec.place, &spec.own) {
            (Place::Client(path), Some(own)) => {
                let own = wires::Listener::bind(kind, own)?;
                Source::Peers(own, Some(path.clone()), self)
            }
            (Place::Client(path), None) => Source::WireClient(path.clone(), self),
            (Place::Server(path), _) => {
                let listener = wires::Listener::bind(kind, path)?;
                match self.kind.is_datagram() {
                    true if spec.once => Source::First(listener, self),
                    true => Source::Peers(listener, None, self),
                    false => Source::Wires(listener, self),
                }
            }
            (Place::Descriptor(_) | Place::Named(_), _) => unreachable!("it was adopted"),
        })
    }
}

/// The failure of a wire's socket. Only what a live process has or holds is no fault of the arguments.
fn of_wire(spec: &ListenSpec, error: vmring::Error) -> Failure {
    let sentence = format!("{spec}: {error}");
    match error {
        vmring::Error::Socket(
            vmring::SocketError::Taken(_) | vmring::SocketError::FolderLocked(_),
        ) => Failure::Step(sentence),
        _ => Failure::Usage(sentence),
    }
}

/// Whether something waits to be received.
fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    system::poll(std::slice::from_mut(&mut poll), 0);
    poll.revents != 0
}

/// Whether the one that is connected to is not there yet, or has no time. The datagram socket of a VMM
/// that is connected to a server that has gone refuses others (EPERM), until the VMM connects again.
fn may_come(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
    ) || error.raw_os_error() == Some(libc::EPERM)
}

/// Lets the members of the group connect to the socket that was made, if there is a group. Nobody but its
/// maker can do so before.
fn share(spec: &ListenSpec) -> Result<(), Failure> {
    let (Some(group), Place::Server(path)) = (spec.group, &spec.place) else { return Ok(()) };
    let shared = lchown(path, None, Some(group.as_raw()))
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(SHARED_MODE)));
    shared.map_err(|error| {
        Failure::Usage(format!("{spec}: it cannot be shared with the group {group}: {error}"))
    })
}

/// The mode of a socket that a group shares.
const SHARED_MODE: u32 = 0o770;

impl Listening {
    fn of(source: Source) -> Self {
        Self { source, not_before: None, unnamed: 0 }
    }

    /// Takes over an inherited descriptor. It is done before anything else is opened, so that no number
    /// is one of this process's own descriptors.
    pub(super) fn adopted(spec: &ListenSpec, passed: &Passed) -> Result<Option<Self>, Failure> {
        let failed = |error: io::Error| Failure::Usage(format!("{spec}: {error}"));
        let number = match &spec.place {
            Place::Descriptor(number) => *number,
            Place::Named(name) => passed.named(name)?,
            Place::Server(_) | Place::Client(_) => return Ok(None),
        };
        let fd = inherited(number).map_err(failed)?;
        let source = match Self::framing(spec) {
            Some(framing) => framing.adopted(fd).map_err(|error| of_wire(spec, error))?,
            None => match adopt(fd).map_err(failed)? {
                Adopted::Listening(listener) => Source::Listener(listener),
                Adopted::Connected(socket) => Source::Given(Some(Incoming::VhostUser(socket))),
            },
        };
        Ok(Some(Self::of(source)))
    }

    fn framing(spec: &ListenSpec) -> Option<Framing> {
        match spec.kind {
            Kind::VhostUser => None,
            Kind::Wire(kind) => Some(Framing { kind, header: spec.header }),
        }
    }

    /// Makes the socket, if there is one to make.
    pub(super) fn open(spec: &ListenSpec) -> Result<Self, Failure> {
        if let Some(framing) = Self::framing(spec) {
            let source = framing.open(spec).map_err(|error| of_wire(spec, error))?;
            share(spec)?;
            return Ok(Self::of(source));
        }
        let source = match &spec.place {
            Place::Server(path) => Source::Listener(Listener::bind(path).map_err(|error| {
                let sentence = format!("{spec}: {error}");
                match error.kind() {
                    io::ErrorKind::AddrInUse | io::ErrorKind::TimedOut => Failure::Step(sentence),
                    _ => Failure::Usage(sentence),
                }
            })?),
            Place::Client(path) => Source::Client(path.clone()),
            Place::Descriptor(_) | Place::Named(_) => unreachable!("it was adopted"),
        };
        share(spec)?;
        Ok(Self::of(source))
    }

    /// The next connection, if there is one now. After an error nothing is tried for a while.
    pub(super) fn next(&mut self, now: Instant) -> io::Result<Option<Incoming>> {
        if self.not_before.is_some_and(|at| now < at) {
            return Ok(None);
        }
        self.not_before = None;
        let connected = match &mut self.source {
            Source::Listener(listener) => {
                listener.accept().map(|socket| socket.map(Incoming::VhostUser))
            }
            Source::Wires(listener, framing) => {
                listener.accept().map(|socket| socket.map(|socket| framing.over(socket)))
            }
            Source::Given(incoming) => Ok(incoming.take()),
            Source::First(listener, _) if !is_readable(listener.as_fd()) => Ok(None),
            Source::First(..) => match std::mem::replace(&mut self.source, Source::Given(None)) {
                Source::First(listener, framing) => {
                    let socket = framing.driver(false).bound(listener).one_peer(true);
                    Ok(Some(Incoming::wire(socket)))
                }
                _ => unreachable!("it is the first one's"),
            },
            Source::Peers(listener, None, framing) => {
                let learned = listener.learn_peer();
                self.unnamed += learned.unnamed;
                let peer = |_| framing.driver(false).peer_of(listener);
                Ok(learned.has_peer.then_some(()).map(peer).map(Incoming::wire))
            }
            Source::Peers(listener, Some(path), framing) => listener
                .reach(path)
                .map(|()| Some(Incoming::wire(framing.driver(true).peer_of(listener)))),
            Source::Client(path) => connect(path).map(|socket| Some(Incoming::VhostUser(socket))),
            Source::WireClient(path, framing) => wires::connect(framing.kind.socket_kind(), path)
                .map(|socket| Some(framing.over(socket))),
        };
        match connected {
            Err(error) if self.is_client() && may_come(&error) => {
                self.not_before = Some(now + RETRY);
                Ok(None)
            }
            next => next.inspect_err(|_| self.not_before = Some(now + RETRY)),
        }
    }

    /// Whether it connects again and again.
    fn is_client(&self) -> bool {
        matches!(
            self.source,
            Source::Client(_) | Source::WireClient(..) | Source::Peers(_, Some(_), _)
        )
    }

    /// What is readable when there is a connection.
    pub(super) fn descriptor(&self, now: Instant) -> Option<BorrowedFd<'_>> {
        let fd = match &self.source {
            Source::Listener(listener) => listener.as_fd(),
            Source::Wires(listener, _)
            | Source::First(listener, _)
            | Source::Peers(listener, None, _) => listener.as_fd(),
            Source::Client(_)
            | Source::WireClient(..)
            | Source::Peers(_, Some(_), _)
            | Source::Given(_) => return None,
        };
        self.not_before.is_none_or(|at| now >= at).then_some(fd)
    }

    /// How many datagrams were thrown away since the last call, because nobody can answer their senders.
    pub(super) fn take_unnamed(&mut self) -> u64 {
        std::mem::take(&mut self.unnamed)
    }

    /// When to try again, without being told.
    pub(super) fn due(&self) -> Option<Instant> {
        self.not_before
    }

    /// Whether no connection comes any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.source, Source::Given(None))
    }

    /// Takes no further connection, and removes the socket's file.
    pub(super) fn close(&mut self) {
        self.source = Source::Given(None);
    }

    /// After a connection that could not be served, nothing is tried for a while.
    pub(super) fn fail(&mut self, now: Instant) {
        self.not_before = Some(now + RETRY);
    }

    /// After a front end has gone, the next one is not tried at once, so that one that breaks every
    /// connection does not keep the server busy.
    pub(super) fn rest(&mut self, now: Instant) {
        if self.is_client() {
            self.not_before = Some(now + RETRY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: after a connection that could not be served the socket rests, and whoever connects
    /// again and again does not keep the main thread.
    #[test]
    fn a_socket_rests_after_a_connection_that_was_not_served() {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("vmring-rest-{}", std::process::id()));
        let source = Source::Listener(Listener::bind(&path).expect("a socket"));
        let mut listening = Listening::of(source);
        let _waiting: Vec<_> = (0..3).map(|_| connect(&path).expect("it listens")).collect();
        let now = Instant::now();
        assert!(listening.next(now).expect("it is accepted").is_some());
        listening.fail(now);
        assert!(listening.next(now).expect("it rests").is_none());
        assert!(listening.descriptor(now).is_none(), "nothing wakes the main thread");
        let later = listening.due().expect("it is tried again");
        assert_eq!(later, now + RETRY);
        assert!(listening.descriptor(later).is_some());
        assert!(listening.next(later).expect("it is accepted").is_some());
    }

    #[test]
    fn a_passed_socket_is_found_by_its_name_and_each_is_named() {
        let passed = |names: &[&str]| {
            Passed(names.iter().zip(3..).map(|(name, fd)| (fd, (*name).to_owned())).collect())
        };
        let said = |result: Result<RawFd, Failure>| result.expect_err("it is refused").to_string();
        assert_eq!(passed(&["a", "b"]).named("b").expect("it is there"), 4);
        let missing = said(passed(&["a", "b"]).named("c"));
        assert!(
            missing.ends_with("no socket with the name 'c'; it has passed 'a', 'b'"),
            "{missing}"
        );
        let none = said(passed(&[]).named("c"));
        assert!(none.ends_with("none at all; start the server by its socket unit"), "{none}");
        let two = said(passed(&["a", "a"]).named("a"));
        assert!(two.contains("several sockets with the name 'a'; give each its own"), "{two}");
        let spec = |text: &str| text.parse::<ListenSpec>().expect(text);
        let listens = [spec("vhost-user:fd=a"), spec("vhost-user:fd=4"), spec("vhost-user:/c")];
        passed(&["a", "b"]).check(&listens).expect("each is named");
        let more = passed(&["a", "b", "c"]).check(&listens).expect_err("c is not");
        assert!(more.to_string().ends_with("add --listen vhost-user:fd=c"), "{more}");
    }
}
