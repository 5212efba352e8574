//! Where a wire's socket is: paths that are listened on and connected to, and what is asked of a
//! descriptor that somebody else has opened. A server of many clients uses these functions by itself.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use super::limits::{LOCK_AGAIN, LOCK_PATIENCE, UNNAMED_PER_POLL};
use super::sys::{self, Address};
use crate::error::{Error, SocketError};

/// The type of a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SocketKind {
    /// `SOCK_STREAM`: bytes.
    Stream,
    /// `SOCK_DGRAM`: messages, without a connection that ends.
    Datagram,
    /// `SOCK_SEQPACKET`: messages over a connection.
    #[cfg(target_os = "linux")]
    Seqpacket,
}

impl SocketKind {
    fn raw(self) -> libc::c_int {
        match self {
            SocketKind::Stream => libc::SOCK_STREAM,
            SocketKind::Datagram => libc::SOCK_DGRAM,
            #[cfg(target_os = "linux")]
            SocketKind::Seqpacket => libc::SOCK_SEQPACKET,
        }
    }

    fn mismatch(self) -> SocketError {
        SocketError::Descriptor(match self {
            SocketKind::Stream => "it is no stream socket (SOCK_STREAM)",
            SocketKind::Datagram => "it is no datagram socket (SOCK_DGRAM)",
            #[cfg(target_os = "linux")]
            SocketKind::Seqpacket => "it is no socket of sequenced packets (SOCK_SEQPACKET)",
        })
    }
}

/// A socket of a path on which peers connect, one after the other or several at once. It does not wait.
///
/// Nobody connects to a datagram socket: it only has its path, to which peers send. An interface gets it
/// by [`Socket::bound`](super::Socket::bound), or one interface after the other has it, each for one peer
/// ([`Socket::peer_of`](super::Socket::peer_of)).
///
/// Dropping it removes the file of its path, if the file is still its own.
#[derive(Debug)]
pub struct Listener {
    pub(super) socket: Arc<OwnedFd>,
    pub(super) file: Option<SocketFile>,
    /// The path of the peer that a datagram socket was connected to.
    pub(super) reached: Option<PathBuf>,
}

impl Listener {
    /// Listens at a path. Its file has the mode 0600 before anybody can connect.
    ///
    /// If the path has the socket of a process that is gone, its file is replaced.
    ///
    /// # Errors
    ///
    /// [`SocketError::Taken`] if a process has the socket of this path, [`SocketError::NotASocket`] if
    /// the path is no socket, [`SocketError::PathTooLong`], [`SocketError::FolderLocked`] if a process
    /// holds the lock of the folder for more than two seconds, and [`Error::Io`] for what else the system
    /// refuses.
    pub fn bind(kind: SocketKind, path: &Path) -> Result<Self, Error> {
        let (socket, file) = bind(kind, path)?;
        if kind != SocketKind::Datagram {
            sys::listen(&socket).map_err(Error::io("listening on a socket"))?;
        }
        Ok(Self { socket: Arc::new(socket), file: Some(file), reached: None })
    }

    /// Takes the next connection. Returns `None` if there is none now. A [`Socket`](super::Socket) that
    /// gets it ([`from_fd`](super::Socket::from_fd)) serves it, with the buffers that its wire needs.
    ///
    /// # Errors
    ///
    /// What the system says, for example if the limit of open files is reached. A connection that has
    /// been given up meanwhile is no error.
    pub fn accept(&self) -> io::Result<Option<OwnedFd>> {
        sys::accept(self.socket.as_fd())
    }

    /// Looks whether somebody has sent to a datagram socket, and connects it to the first one who has and
    /// can be answered. What that one has sent stays. [`Socket::peer_of`](super::Socket::peer_of) serves
    /// it. A peer that the socket still has, because no interface has served it, is given up, with what it
    /// has sent.
    pub fn learn_peer(&mut self) -> Learned {
        self.reached = None;
        if sys::peer(&self.socket).is_some() {
            // While the socket is connected to it, nobody else can send.
            sys::disconnect(&self.socket);
        }
        let mut unnamed = 0;
        while unnamed < UNNAMED_PER_POLL.into()
            && let Ok(sender) = sys::peek_sender(&self.socket)
        {
            if !sender.is_unnamed() && sys::connect(&self.socket, &sender).is_ok() {
                return Learned { has_peer: true, unnamed };
            }
            // Nobody can answer it: it has no name, or is gone already.
            let _ = sys::receive(&self.socket, &mut [0; 1]);
            unnamed += 1;
        }
        Learned { has_peer: false, unnamed }
    }

    /// Connects a datagram socket to the socket of a path, which is its peer then. It does not wait.
    /// [`Socket::peer_of`](super::Socket::peer_of) serves the peer.
    ///
    /// # Errors
    ///
    /// `NotFound` or `ConnectionRefused` while there is nobody, `EPERM` if the other socket has another
    /// peer, and what else the system says.
    pub fn reach(&mut self, path: &Path) -> io::Result<()> {
        let address = Address::of(path)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        sys::connect(&self.socket, &address)?;
        self.reached = Some(path.to_owned());
        Ok(())
    }
}

/// What [`Listener::learn_peer`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Learned {
    /// Whether the socket has a peer now.
    pub has_peer: bool,
    /// Messages that were thrown away, because nobody can answer their senders.
    pub unnamed: u64,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What a descriptor is that another process has opened.
#[derive(Debug)]
pub enum Adopted {
    /// Peers connect to it, or send to it if it is a datagram socket.
    Listening(Listener),
    /// It is connected. An interface gets it by [`Socket::from_fd`](super::Socket::from_fd).
    Single(OwnedFd),
}

/// Takes over a socket that another process has opened, such as a service manager. One that listens gets
/// the flag `O_NONBLOCK`, which all processes share that have it.
///
/// # Errors
///
/// [`SocketError::Descriptor`] if it is no socket of this kind.
pub fn adopt(kind: SocketKind, socket: OwnedFd) -> Result<Adopted, Error> {
    let listens = check(kind, &socket)?;
    if listens {
        sys::accept_at_once(&socket).map_err(Error::io("setting a flag of a socket"))?;
    } else if kind != SocketKind::Datagram || sys::peer(&socket).is_some() {
        return Ok(Adopted::Single(socket));
    }
    Ok(Adopted::Listening(Listener { socket: Arc::new(socket), file: None, reached: None }))
}

/// Makes a socket of this kind at a path, with the rules of [`Listener::bind`]. A datagram socket is
/// complete then.
pub(super) fn bind(kind: SocketKind, path: &Path) -> Result<(OwnedFd, SocketFile), Error> {
    let failed = |error| Error::io("making a socket at a path")(error);
    let address = Address::of(path)?;
    let _locked = lock_folder(path)?;
    match fs::symlink_metadata(path) {
        Ok(old) if !old.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()).into());
        }
        Ok(_) if is_left_over(kind, &address).map_err(failed)? => {
            fs::remove_file(path).map_err(failed)?;
        }
        Ok(_) => return Err(SocketError::Taken(path.to_owned()).into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let socket = sys::socket(kind.raw()).map_err(failed)?;
    sys::restrict(&socket).map_err(failed)?;
    sys::bind(&socket, &address).map_err(failed)?;
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    let file = SocketFile { path: path.to_owned(), id: (metadata.dev(), metadata.ino()) };
    // Nobody can connect to a stream socket before it listens.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok((socket, file))
}

/// Locks the folder of a path, until the result is dropped. Two processes that start at once must not take
/// each other's new socket for one that is left over.
///
/// A process that may read the folder can lock it too, and for ever. So the wait has an end.
fn lock_folder(path: &Path) -> Result<File, Error> {
    let failed = |error| Error::io("locking the folder of a socket")(error);
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // Nothing that is no folder is opened, because opening a pipe may wait.
    let mut options = File::options();
    let options = options.read(true).custom_flags(libc::O_DIRECTORY);
    let file = options.open(folder).map_err(failed)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        // SAFETY: the call takes numbers only.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(file);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock if Instant::now() < deadline => thread::sleep(LOCK_AGAIN),
            io::ErrorKind::WouldBlock => {
                return Err(SocketError::FolderLocked(folder.to_owned()).into());
            }
            _ => return Err(failed(error)),
        }
    }
}

/// Whether no process has the socket of this address. Each answer but a refusal comes from a live one:
/// its queue is full, or it is of another kind, or has another peer.
fn is_left_over(kind: SocketKind, address: &Address) -> io::Result<bool> {
    let probe = sys::socket(kind.raw())?;
    match sys::connect(&probe, address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        // It has gone meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        _ => Ok(false),
    }
}

/// The file of a socket that this process has made. It is removed with this value, if it is still the
/// same file.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Its device and inode.
    id: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = |file: fs::Metadata| (file.dev(), file.ino()) == self.id;
        if fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            // If it cannot be removed, the next process finds it left over, and removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connects to the socket of a path, without waiting.
///
/// # Errors
///
/// `NotFound` or `ConnectionRefused` while there is nobody, `WouldBlock` if many wait for it, and what
/// else the system says.
pub fn connect(kind: SocketKind, path: &Path) -> io::Result<OwnedFd> {
    let address =
        Address::of(path).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let socket = sys::socket(kind.raw())?;
    sys::connect(&socket, &address)?;
    Ok(socket)
}

/// Whether an error of [`connect`] says that the peer is not there yet, or has no time.
pub(super) fn may_come(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
    )
}

/// Checks a descriptor that somebody else has opened. Returns whether it listens.
pub(super) fn check(kind: SocketKind, socket: &OwnedFd) -> Result<bool, Error> {
    let is = sys::option(socket, libc::SO_TYPE).map_err(|_| kind.mismatch())?;
    if is != kind.raw() {
        return Err(kind.mismatch().into());
    }
    let listens = sys::option(socket, libc::SO_ACCEPTCONN).unwrap_or(0) != 0;
    sys::no_signal(socket).map_err(Error::io("setting an option of a socket"))?;
    Ok(listens)
}
