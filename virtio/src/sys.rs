//! The system calls that the standard library lacks.

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Space for the descriptors of one message, for more of them than any kernel sends at once (253 on
/// Linux, 512 on macOS). So none gets lost here, and all can be closed.
pub(crate) struct Control(Box<[u64; 320]>);

impl Control {
    pub(crate) fn new() -> Self {
        Self(Box::new([0; 320]))
    }
}

/// What [`receive`] found.
pub(crate) struct Received {
    /// The number of bytes. It is 0 at the end of the stream.
    pub(crate) len: usize,
    /// Whether the kernel had descriptors that it could not hand over.
    pub(crate) lost: bool,
}

/// Receives bytes, and gives each descriptor that comes with them to `found`. Every descriptor is
/// closed on exec.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    to: &mut [u8],
    control: &mut Control,
    found: &mut dyn FnMut(OwnedFd),
) -> io::Result<Received> {
    #[cfg(target_vendor = "apple")]
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT;
    #[cfg(not(target_vendor = "apple"))]
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let mut iov = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    // SAFETY: `msghdr` consists of numbers and pointers, for which zero is valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    let len = loop {
        message.msg_controllen = mem::size_of_val(&*control.0) as _;
        // SAFETY: the header names `to` and `control` with their lengths, and both are borrowed
        // exclusively until the call returns.
        let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, FLAGS) };
        match usize::try_from(len) {
            Ok(len) => break len,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    };
    // SAFETY: the kernel has set the length of the control messages, which are in `control`.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !next.is_null() {
        // SAFETY: the macros return a pointer to a whole header within `control`, which is aligned
        // for it.
        let (header, data) = unsafe { (next.read(), libc::CMSG_DATA(next)) };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            #[allow(clippy::unnecessary_cast)] // It has 32 bits on macOS.
            let bytes = (header.cmsg_len as usize).saturating_sub(data.addr() - next.addr());
            for i in 0..bytes / size_of::<RawFd>() {
                // SAFETY: the control message has `bytes` bytes of data, so the number is in it.
                // Numbers in it may be unaligned.
                let fd = unsafe { data.cast::<RawFd>().add(i).read_unaligned() };
                // SAFETY: the kernel has just opened this descriptor for this process, and nobody
                // else knows its number.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                #[cfg(target_vendor = "apple")]
                close_on_exec(&fd);
                found(fd);
            }
        }
        // SAFETY: `next` is a header of this message.
        next = unsafe { libc::CMSG_NXTHDR(&message, next) };
    }
    Ok(Received { len, lost: message.msg_flags & libc::MSG_CTRUNC != 0 })
}

#[cfg(target_vendor = "apple")]
fn close_on_exec(fd: &OwnedFd) {
    // SAFETY: the call takes numbers only.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
}

/// Sends bytes, as many as the socket takes now. A peer that is gone is an error and no signal.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // `no_signal` has set SO_NOSIGPIPE there.
    #[cfg(target_vendor = "apple")]
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT;
    #[cfg(not(target_vendor = "apple"))]
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    loop {
        // SAFETY: the pointer and the length are those of `bytes`, which the call only reads.
        let len =
            unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), FLAGS) };
        match usize::try_from(len) {
            Ok(len) => return Ok(len),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Writes bytes, as many as the pipe or socket takes now. A reader that is gone is an error and no
/// signal, also in a program that does not ignore SIGPIPE, as C programs do not.
pub(crate) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let blocked = BlockedPipeSignal::new(fd)?;
    // SAFETY: the pointer and the length are those of `bytes`, which the call only reads.
    let len = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    let result = usize::try_from(len).map_err(|_| io::Error::last_os_error());
    let broken = matches!(&result, Err(error) if error.kind() == io::ErrorKind::BrokenPipe);
    blocked.end(broken);
    result
}

/// While it exists, SIGPIPE waits.
#[cfg(not(target_vendor = "apple"))]
struct BlockedPipeSignal {
    signal: libc::sigset_t,
    old: libc::sigset_t,
    was_pending: bool,
}

#[cfg(not(target_vendor = "apple"))]
impl BlockedPipeSignal {
    fn new(_fd: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: these sets consist of numbers, for which zero is valid, and the calls write to
        // sets of this function only.
        unsafe {
            let [mut signal, mut old, mut pending]: [libc::sigset_t; 3] = mem::zeroed();
            libc::sigemptyset(&mut signal);
            libc::sigaddset(&mut signal, libc::SIGPIPE);
            check(libc::sigpending(&mut pending))?;
            let was_pending = libc::sigismember(&pending, libc::SIGPIPE) == 1;
            match libc::pthread_sigmask(libc::SIG_BLOCK, &signal, &mut old) {
                0 => Ok(Self { signal, old, was_pending }),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    /// Takes the signal that a broken pipe has raised in this thread, and restores what was before.
    fn end(self, broken: bool) {
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointers are to values that live until the calls return.
        unsafe {
            if broken && !self.was_pending {
                libc::sigtimedwait(&self.signal, std::ptr::null_mut(), &now);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.old, std::ptr::null_mut());
        }
    }
}

/// macOS has a setting of the descriptor for that.
#[cfg(target_vendor = "apple")]
struct BlockedPipeSignal;

#[cfg(target_vendor = "apple")]
impl BlockedPipeSignal {
    fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: the call takes numbers only.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETNOSIGPIPE, 1) })?;
        Ok(Self)
    }

    fn end(self, _broken: bool) {}
}

/// Switches off the signal that a write to a peer that is gone would raise, on systems where this
/// is a setting of the socket.
pub(crate) fn no_signal(socket: BorrowedFd<'_>) -> io::Result<()> {
    #[cfg(target_vendor = "apple")]
    {
        let on: libc::c_int = 1;
        // SAFETY: the pointer and the length are those of `on`, which the call only reads.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NOSIGPIPE,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        })?;
    }
    let _ = socket;
    Ok(())
}

/// Makes reads and writes return instead of waiting.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: the same.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    Ok(())
}

/// The type of a file: its bits of `S_IFMT`.
#[allow(clippy::unnecessary_cast)] // They have 16 bits on macOS.
pub(crate) fn file_type(mode: u32) -> u32 {
    mode & libc::S_IFMT as u32
}

/// The types that are asked for.
#[allow(clippy::unnecessary_cast)]
pub(crate) mod kind {
    pub(crate) const PIPE: u32 = libc::S_IFIFO as u32;
    pub(crate) const SOCKET: u32 = libc::S_IFSOCK as u32;
    pub(crate) const FILE: u32 = libc::S_IFREG as u32;
    /// An anonymous inode of Linux, such as an eventfd, and a shared memory object of macOS.
    pub(crate) const NONE: u32 = 0;
}

/// Seals the file against shrinking, unless it is. Returns whether it is then: a file may allow no more
/// seals (`F_SEAL_SEAL`), or be of a kind that has none.
///
/// A seal stays as long as the file does, which is as long as anybody has it open or mapped.
pub(crate) fn seal_against_shrinking(fd: BorrowedFd<'_>) -> bool {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        // SAFETY: the calls take numbers only.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        let is_sealed = seals >= 0 && seals & libc::F_SEAL_SHRINK != 0;
        let may_be = seals >= 0 && seals & libc::F_SEAL_SEAL == 0;
        is_sealed
            || may_be
                // SAFETY: as above.
                && unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) } == 0
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let _ = fd;
        false
    }
}

/// A number that the system knows about a socket.
pub(crate) fn socket_option(
    socket: BorrowedFd<'_>,
    option: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the pointers are to `value` and its length, and both live until the call returns.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &mut len,
        )
    })?;
    Ok(value)
}

/// The longest path of a socket: 107 bytes on Linux, 103 on macOS.
pub(crate) const PATH_MAX: usize =
    size_of::<libc::sockaddr_un>() - mem::offset_of!(libc::sockaddr_un, sun_path) - 1;

fn address(path: &Path) -> io::Result<libc::sockaddr_un> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > PATH_MAX || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a socket's path has 1 to {PATH_MAX} bytes and no zero: {}", path.display()),
        ));
    }
    // SAFETY: `sockaddr_un` consists of numbers, for which zero is valid.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, byte) in address.sun_path.iter_mut().zip(bytes) {
        *to = *byte as libc::c_char;
    }
    Ok(address)
}

/// A stream socket that does not wait and is closed on exec.
fn stream_socket() -> io::Result<OwnedFd> {
    #[cfg(target_vendor = "apple")]
    const TYPE: libc::c_int = libc::SOCK_STREAM;
    #[cfg(not(target_vendor = "apple"))]
    const TYPE: libc::c_int = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: the call takes numbers only.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, TYPE, 0) })?;
    // SAFETY: the kernel has just opened this descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    #[cfg(target_vendor = "apple")]
    close_on_exec(&socket);
    use std::os::fd::AsFd;
    set_nonblocking(socket.as_fd())?;
    no_signal(socket.as_fd())?;
    Ok(socket)
}

/// Binds a socket to a path, for its owner only, and listens after that.
pub(crate) fn listen(path: &Path) -> io::Result<OwnedFd> {
    let address = address(path)?;
    let socket = stream_socket()?;
    // SAFETY: the pointer and the length are those of `address`, which the call only reads.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })?;
    let c_path = CString::new(path.as_os_str().as_bytes()).expect("`address` saw no zero");
    // Nobody can connect before the socket listens, so nobody can before this.
    // SAFETY: the path ends with a zero and lives until the call returns.
    check(unsafe { libc::chmod(c_path.as_ptr(), 0o600) })?;
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::listen(socket.as_raw_fd(), 16) })?;
    Ok(socket)
}

/// Connects to a path, without waiting. A server whose queue is full is `WouldBlock`.
pub(crate) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let address = address(path)?;
    let socket = stream_socket()?;
    // SAFETY: the pointer and the length are those of `address`, which the call only reads.
    check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

/// Locks an open file or folder against others who lock it, until it is closed. It does not wait: if
/// another one has the lock, the error is `WouldBlock`.
pub(crate) fn try_lock(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }).map(drop)
}

pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// The bytes of a page of this machine.
pub(super) fn page_size() -> usize {
    // SAFETY: the call takes a number only.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}
