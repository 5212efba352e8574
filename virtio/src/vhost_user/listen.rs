//! Ways to a connection: [`Listener`], [`connect`] and [`adopt`].

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::sys;

/// A socket on which front ends connect, one after the other or several at once. It does not wait.
///
/// Dropping it removes the file of its path, if the file is still its own.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// The path, and the device and inode of its file. An inherited socket leaves no file behind
    /// that would be ours.
    file: Option<(PathBuf, (u64, u64))>,
}

impl Listener {
    /// Listens at a path. Its file has the mode 0600 before anybody can connect.
    ///
    /// If the path has the socket of a server that is gone, its file is replaced.
    ///
    /// # Errors
    ///
    /// `AddrInUse` if a server listens there, `AlreadyExists` if the path is no socket,
    /// `InvalidInput` if the path is longer than 107 bytes (103 on macOS), `TimedOut` if another process
    /// holds a lock of the folder for more than two seconds, and what else the system says.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let _locked = lock_folder(path)?;
        match fs::symlink_metadata(path) {
            Ok(old) if !old.file_type().is_socket() => {
                let text = format!("{} exists and is no socket", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
            }
            Ok(_) => match sys::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path)?;
                }
                // A server whose queue is full refuses by `WouldBlock`, and is alive.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(in_use(path));
                }
                Err(error) => return Err(error),
                Ok(_) => return Err(in_use(path)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let socket = sys::listen(path)?;
        let file = fs::symlink_metadata(path)?;
        let file = Some((path.to_owned(), (file.dev(), file.ino())));
        Ok(Self { socket: socket.into(), file })
    }

    /// The next front end that has connected. `None` if there is none now.
    ///
    /// # Errors
    ///
    /// What the system says, for example if the limit of open files is reached.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            return match self.socket.accept() {
                Ok((stream, _)) => Ok(Some(stream)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => Ok(None),
                    // A front end that has gone again is no fault of the listener.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                    _ => Err(error),
                },
            };
        }
    }
}

/// How long a server waits for the lock of a folder. Another one that starts holds the lock for less than a
/// millisecond.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// The time between two attempts.
const LOCK_AGAIN: Duration = Duration::from_millis(10);

/// Locks the folder of a path, until the result is dropped. Two servers that start at once must not take
/// each other's new socket for one that is left over.
///
/// A process that may read the folder can lock it too, and for ever. So the wait has an end.
fn lock_folder(path: &Path) -> io::Result<File> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // Nothing that is no folder is opened, because opening a pipe may wait.
    let file = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(folder)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    while let Err(error) = sys::try_lock(file.as_fd()) {
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock if Instant::now() < deadline => thread::sleep(LOCK_AGAIN),
            io::ErrorKind::WouldBlock => {
                let text = format!(
                    "another process holds a lock of the folder {}, in which the socket is to be: end \
                     that one (lslocks(8) lists who holds which), or use a folder that only you can read",
                    folder.display()
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            _ => return Err(error),
        }
    }
    Ok(file)
}

fn in_use(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, format!("a server listens at {}", path.display()))
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, id)) = &self.file else { return };
        if fs::symlink_metadata(path).is_ok_and(|file| (file.dev(), file.ino()) == *id) {
            // If it cannot be removed, the next server finds it left over, and removes it.
            let _ = fs::remove_file(path);
        }
    }
}

/// Connects to a front end that listens (`server=on` of QEMU), without waiting. After an error the
/// caller decides when it tries again.
///
/// # Errors
///
/// `NotFound` or `ConnectionRefused` while there is no front end, `WouldBlock` if many wait for it,
/// `InvalidInput` if the path is too long, and what else the system says.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    sys::connect(path).map(UnixStream::from)
}

/// An inherited socket; see [`adopt`].
#[derive(Debug)]
pub enum Adopted {
    /// A front end is connected to it.
    Connected(UnixStream),
    /// Front ends connect to it.
    Listening(Listener),
}

/// Takes over a socket that another process has opened, as for the option `--fd` (section "Backend
/// program conventions").
///
/// # Errors
///
/// `InvalidInput` if the descriptor is no stream socket of the Unix domain, and what else the system
/// says.
pub fn adopt(fd: OwnedFd) -> io::Result<Adopted> {
    let wrong = |_| {
        let text = "the descriptor is no stream socket of the Unix domain";
        io::Error::new(io::ErrorKind::InvalidInput, text)
    };
    let kind = sys::socket_option(fd.as_fd(), libc::SO_TYPE).map_err(wrong)?;
    let listens = sys::socket_option(fd.as_fd(), libc::SO_ACCEPTCONN).map_err(wrong)?;
    let stream = UnixStream::from(fd);
    // The standard library refuses to name an address of another family.
    stream.local_addr().map_err(wrong)?;
    if kind != libc::SOCK_STREAM {
        return Err(wrong(io::ErrorKind::InvalidInput.into()));
    }
    stream.set_nonblocking(true)?;
    Ok(match listens {
        0 => Adopted::Connected(stream),
        _ => Adopted::Listening(Listener { socket: OwnedFd::from(stream).into(), file: None }),
    })
}
