//! The system calls of sockets. No call waits, and none changes a flag of a descriptor that somebody
//! else has made, because the other holders of such a descriptor share its flags.

use std::ffi::{OsStr, c_void};
use std::mem::{self, offset_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::{io, ptr};

use super::limits::BACKLOG;
use crate::error::SocketError;

/// What a call that sends or receives is told: not to wait, and to have an error instead of SIGPIPE.
/// (Apple's systems have an option of the socket for the latter; see [`no_signal`].)
#[cfg(target_vendor = "apple")]
pub(super) const FLAGS: libc::c_int = libc::MSG_DONTWAIT;
#[cfg(not(target_vendor = "apple"))]
pub(super) const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// The address of a Unix socket.
#[derive(Clone, Copy)]
pub(super) struct Address {
    raw: libc::sockaddr_un,
    len: libc::socklen_t,
}

const PATH_AT: usize = offset_of!(libc::sockaddr_un, sun_path);

impl Address {
    pub(super) fn of(path: &Path) -> Result<Self, SocketError> {
        let mut address = Self::none();
        let bytes = path.as_os_str().as_bytes();
        let max = address.raw.sun_path.len() - 1;
        if bytes.len() > max {
            return Err(SocketError::PathTooLong { path: path.to_owned(), max });
        }
        address.raw.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in address.raw.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        address.len = (PATH_AT + bytes.len() + 1) as libc::socklen_t;
        Ok(address)
    }

    /// An address that a call fills.
    pub(super) fn none() -> Self {
        // SAFETY: it consists of numbers, for which zero is valid.
        let raw: libc::sockaddr_un = unsafe { mem::zeroed() };
        Self { raw, len: 0 }
    }

    /// Whether nothing can be sent there, because the socket has no name.
    pub(super) fn is_unnamed(&self) -> bool {
        let len = self.len as usize;
        // Apple's systems give an unnamed socket an address of zeros.
        len <= PATH_AT || cfg!(target_vendor = "apple") && self.raw.sun_path[0] == 0
    }

    /// Where a call writes an address, and how many bytes there are.
    pub(super) fn space(&mut self) -> (*mut libc::sockaddr_un, usize) {
        (&mut self.raw, size_of::<libc::sockaddr_un>())
    }

    /// Says how long the address is that a call has written.
    pub(super) fn set_len(&mut self, len: libc::socklen_t) {
        self.len = len.min(size_of::<libc::sockaddr_un>() as libc::socklen_t);
    }

    /// The path, if the address is one. An abstract name of Linux is none.
    pub(super) fn path(&self) -> Option<PathBuf> {
        let bytes: Vec<u8> = self.bytes().iter().map(|byte| *byte as u8).collect();
        let is_path = bytes.first().is_some_and(|first| *first != 0);
        is_path.then(|| OsStr::from_bytes(&bytes).into())
    }

    fn bytes(&self) -> &[libc::c_char] {
        let len = (self.len as usize).saturating_sub(PATH_AT).min(self.raw.sun_path.len());
        let bytes = &self.raw.sun_path[..len];
        // A path may come with the zero behind it or without.
        match bytes.split_first() {
            Some((first, rest)) if *first != 0 => {
                let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
                &bytes[..=end]
            }
            _ => bytes,
        }
    }
}

impl PartialEq for Address {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl std::fmt::Debug for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes: Vec<u8> = self.bytes().iter().map(|byte| *byte as u8).collect();
        write!(f, "{}", String::from_utf8_lossy(&bytes))
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes a Unix socket of a type (`SOCK_STREAM` and so on) that is closed on exec and does not wait.
pub(super) fn socket(kind: libc::c_int) -> io::Result<OwnedFd> {
    #[cfg(target_os = "linux")]
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call takes numbers only.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: the system has just opened it, and nobody else knows its number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    #[cfg(not(target_os = "linux"))]
    make_own(&fd)?;
    no_signal(&fd)?;
    Ok(fd)
}

/// Makes a descriptor closed on exec and not waiting.
#[cfg(not(target_os = "linux"))]
fn make_own(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: these calls take numbers only.
    unsafe {
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC))?;
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    }
    Ok(())
}

/// Lets accepting a connection not wait for one.
pub(super) fn accept_at_once(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: these calls take numbers only.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    }
    Ok(())
}

/// Makes sending to a peer that is gone an error and no signal, where a flag of the call does not.
pub(super) fn no_signal(fd: &OwnedFd) -> io::Result<()> {
    #[cfg(target_vendor = "apple")]
    set_option(fd, libc::SO_NOSIGPIPE, 1)?;
    let _ = fd;
    Ok(())
}

/// Sets the mode 0600 before there is a file, where the system can: then its file has it from the
/// beginning (Linux: the socket's mode is the one of its file, less the mask).
pub(super) fn restrict(fd: &OwnedFd) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), 0o600) })?;
    let _ = fd;
    Ok(())
}

pub(super) fn bind(fd: &OwnedFd, address: &Address) -> io::Result<()> {
    // SAFETY: the address is borrowed through the call, and has at least `len` bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address.raw).cast(), address.len) })?;
    Ok(())
}

pub(super) fn listen(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })?;
    Ok(())
}

pub(super) fn connect(fd: &OwnedFd, address: &Address) -> io::Result<()> {
    // SAFETY: as in `bind`.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const address.raw).cast(), address.len) })?;
    Ok(())
}

/// Makes a datagram socket one that no peer is set for.
pub(super) fn disconnect(fd: &OwnedFd) {
    let mut address = Address::none();
    address.raw.sun_family = libc::AF_UNSPEC as libc::sa_family_t;
    address.len = PATH_AT as libc::socklen_t;
    // BSD systems answer with an error and have done it.
    let _ = connect(fd, &address);
}

/// Takes the next connection. `None` if there is none now.
pub(super) fn accept(fd: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    loop {
        // SAFETY: null addresses ask for none.
        #[cfg(target_os = "linux")]
        let accepted = check(unsafe {
            let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            libc::accept4(fd.as_raw_fd(), ptr::null_mut(), ptr::null_mut(), flags)
        });
        // SAFETY: as above.
        #[cfg(not(target_os = "linux"))]
        let accepted =
            check(unsafe { libc::accept(fd.as_raw_fd(), ptr::null_mut(), ptr::null_mut()) });
        match accepted {
            Ok(fd) => {
                // SAFETY: the system has just opened it, and nobody else knows its number.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                #[cfg(not(target_os = "linux"))]
                make_own(&fd)?;
                no_signal(&fd)?;
                return Ok(Some(fd));
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                // A peer that has gone again is no fault of the listener.
                io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                _ => return Err(error),
            },
        }
    }
}

/// Ends both directions, so that the peer is told even if somebody holds the descriptor.
pub(super) fn shutdown(fd: &OwnedFd) {
    // SAFETY: the call takes numbers only.
    unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR) };
}

pub(super) fn option(fd: &OwnedFd, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` has `len` bytes, and the system writes at most as many.
    check(unsafe {
        let value = (&raw mut value).cast::<c_void>();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, value, &mut len)
    })?;
    Ok(value)
}

fn set_option(fd: &OwnedFd, name: libc::c_int, value: usize) -> io::Result<()> {
    let value = value as libc::c_int;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` has `len` bytes, which the system only reads.
    check(unsafe {
        let value = (&raw const value).cast::<c_void>();
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, value, len)
    })?;
    Ok(())
}

/// Asks for buffers of these sizes. A system that grants less is no error.
pub(super) fn set_buffers(fd: &OwnedFd, send: usize, receive: usize) {
    for (name, bytes) in [(libc::SO_SNDBUF, send), (libc::SO_RCVBUF, receive)] {
        // With CAP_NET_ADMIN the host's limits (`net.core.wmem_max`) do not count.
        #[cfg(target_os = "linux")]
        {
            let force =
                if name == libc::SO_SNDBUF { libc::SO_SNDBUFFORCE } else { libc::SO_RCVBUFFORCE };
            if set_option(fd, force, bytes).is_ok() {
                continue;
            }
        }
        if let Err(error) = set_option(fd, name, bytes) {
            tracing::debug!(%error, bytes, "a socket's buffer has the system's size");
        }
    }
}

/// The peer of a socket, if it has one.
pub(super) fn peer(fd: &OwnedFd) -> Option<Address> {
    let mut address = Address::none();
    let mut len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the space has `len` bytes, and the system writes at most as many.
    let found = unsafe { libc::getpeername(fd.as_raw_fd(), address.space().0.cast(), &mut len) };
    address.set_len(len);
    (found == 0).then_some(address)
}

/// Whether the peer has closed a connection, for sockets whose empty messages look like an end.
#[cfg(target_os = "linux")]
pub(super) fn has_hung_up(fd: &OwnedFd) -> bool {
    let events = libc::POLLRDHUP;
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: there is one element, which is borrowed through the call.
    let found = unsafe { libc::poll(&mut poll, 1, 0) };
    found > 0 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// Receives bytes, as many as there are and as fit.
pub(super) fn receive(fd: &OwnedFd, to: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of `to`, which is exclusively borrowed.
    let len =
        unsafe { libc::recv(fd.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), libc::MSG_DONTWAIT) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Sends bytes, as many as the socket takes now.
pub(super) fn send(fd: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of `bytes`, which the call only reads.
    let len = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), FLAGS) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Sends pieces, as many bytes as the socket takes now.
///
/// # Safety
///
/// Each piece is memory that stays valid for reading through the call.
pub(super) unsafe fn send_pieces(fd: &OwnedFd, pieces: &mut [libc::iovec]) -> io::Result<usize> {
    let message = header(ptr::null_mut(), 0, pieces);
    // SAFETY: the message names `pieces`, which is borrowed; the caller answers for what they name.
    let len = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, FLAGS) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// The header of a message.
pub(super) fn header(
    name: *mut libc::sockaddr_un,
    name_len: usize,
    pieces: &mut [libc::iovec],
) -> libc::msghdr {
    // SAFETY: it consists of numbers and pointers, for which zero is valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_name = name.cast();
    message.msg_namelen = name_len as libc::socklen_t;
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    message
}

/// Looks who has sent the next message, and leaves the message. `WouldBlock` if there is none.
pub(super) fn peek_sender(fd: &OwnedFd) -> io::Result<Address> {
    let mut address = Address::none();
    let mut byte = 0_u8;
    let mut piece = [libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 }];
    let (name, len) = address.space();
    let mut message = header(name, len, &mut piece);
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    // SAFETY: the message names one byte and an address, which are borrowed through the call.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, flags) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    let len = message.msg_namelen;
    address.set_len(len);
    Ok(address)
}
