//! Calls on sockets.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::sockets::SendSpace;

/// Calls again as long as a signal interrupts it.
pub(super) fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(result) => return Ok(result),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

pub(super) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// How many descriptors the process may have.
pub(super) fn descriptor_limit() -> io::Result<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to `limit`.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    Ok(usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX))
}

/// A new TCP socket, which does not block and is closed on exec.
pub(super) fn tcp(v4: bool) -> io::Result<OwnedFd> {
    open(v4, libc::SOCK_STREAM, 0)
}

/// A new socket. On Linux it does not block and is closed on exec from the start;
/// [`set_flags`] does the same elsewhere.
pub(super) fn open(v4: bool, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    let family = if v4 { libc::AF_INET } else { libc::AF_INET6 };
    #[cfg(target_os = "linux")]
    let kind = kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the call takes numbers only.
    let fd = check(unsafe { libc::socket(family, kind, protocol) })?;
    // SAFETY: the system has just opened this descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a socket close on exec and not block, and a peer that is gone an error and no signal. On Linux a
/// new one is so, and a send says it.
#[cfg(target_os = "linux")]
pub(super) fn set_flags(_: BorrowedFd<'_>) -> io::Result<()> {
    Ok(())
}

/// Makes a socket close on exec and not block, and a peer that is gone an error and no signal.
#[cfg(not(target_os = "linux"))]
pub(super) fn set_flags(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
    set(socket, libc::SOL_SOCKET, libc::SO_NOSIGPIPE, 1)?;
    set_nonblocking(socket)
}

/// Gives a socket an address of the host.
pub(super) fn bind(socket: BorrowedFd<'_>, at: SocketAddr) -> io::Result<()> {
    let (address, len) = to_system(at);
    // SAFETY: the pointer and the length are those of `address`, which the call only reads.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
}

/// Keeps a socket of IPv6 from taking IPv4 as well.
pub(super) fn only_v6(socket: BorrowedFd<'_>, at: SocketAddr) -> io::Result<()> {
    if at.is_ipv6() { set(socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1) } else { Ok(()) }
}

/// A new listener of TCP. A connection that still ends at its port does not keep it from starting.
pub(super) fn listen(at: SocketAddr, backlog: u32) -> io::Result<OwnedFd> {
    let listener = tcp(at.is_ipv4())?;
    set_flags(listener.as_fd())?;
    set(listener.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    only_v6(listener.as_fd(), at)?;
    bind(listener.as_fd(), at)?;
    let backlog = libc::c_int::try_from(backlog).unwrap_or(libc::c_int::MAX);
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::listen(listener.as_raw_fd(), backlog) })?;
    Ok(listener)
}

/// Takes a connection from a listener.
pub(super) fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, SocketAddr)> {
    // SAFETY: the structure consists of numbers, for which zero is valid.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let accepted = retry(|| {
        let mut len = size_of_val(&storage) as libc::socklen_t;
        let address = (&raw mut storage).cast();
        #[cfg(target_os = "linux")]
        // SAFETY: the pointers are to `storage` and its length, which live until the call returns.
        let fd = unsafe {
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            libc::accept4(listener.as_raw_fd(), address, &raw mut len, flags)
        };
        #[cfg(not(target_os = "linux"))]
        // SAFETY: the same.
        let fd = unsafe { libc::accept(listener.as_raw_fd(), address, &raw mut len) };
        fd as isize
    })?;
    // SAFETY: the system has just opened this descriptor, and nobody else knows its number.
    let socket = unsafe { OwnedFd::from_raw_fd(accepted as i32) };
    Ok((socket, from_system(&storage)?))
}

/// Sets an option of type `T`, which is a C type that the option takes.
pub(super) fn set<T: Copy>(
    socket: BorrowedFd<'_>,
    level: i32,
    option: i32,
    value: T,
) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointer and the length are those of `value`, which the call only reads.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), len)
    };
    check(result).map(drop)
}

/// Reads an option that is an `int`.
fn get(socket: BorrowedFd<'_>, level: i32, option: i32) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the pointers are to `value` and its length, which live until the call returns.
    check(unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut len)
    })?;
    Ok(value)
}

/// Makes calls return instead of waiting.
pub(super) fn set_nonblocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    let flags = check(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: the same.
    check(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
        .map(drop)
}

/// Makes a socket what [`Sockets::connect_tcp`](crate::Sockets::connect_tcp) promises.
pub(super) fn prepare(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_flags(socket)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    set(socket, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)
}

/// Asks the kernel to find out whether the peer is still there.
pub(super) fn keep_alive(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)
}

/// Sets the size of both buffers, and so keeps the kernel from changing it.
pub(super) fn set_buffers(socket: BorrowedFd<'_>, len: u32) -> io::Result<()> {
    let len = libc::c_int::try_from(len).unwrap_or(libc::c_int::MAX);
    set(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, len)?;
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, len)
}

/// Sets the differentiated services, unless they are what they are at first. The system may refuse; the
/// connection works all the same.
pub(super) fn set_dscp_at_first(socket: BorrowedFd<'_>, v4: bool, dscp: u8) {
    if dscp != 0 {
        set_dscp(socket, v4, dscp);
    }
}

/// Sets the differentiated services. The system may refuse.
pub(super) fn set_dscp(socket: BorrowedFd<'_>, v4: bool, dscp: u8) {
    let class = libc::c_int::from(dscp) << 2;
    let _ = if v4 {
        set(socket, libc::IPPROTO_IP, libc::IP_TOS, class)
    } else {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class)
    };
}

/// Sets the hop limit. The system may refuse.
pub(super) fn set_hop_limit(socket: BorrowedFd<'_>, v4: bool, hop_limit: u8) {
    let hop_limit = libc::c_int::from(hop_limit);
    let _ = if v4 {
        set(socket, libc::IPPROTO_IP, libc::IP_TTL, hop_limit)
    } else {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, hop_limit)
    };
}

/// Makes the next close a reset.
pub(super) fn set_linger_zero(socket: BorrowedFd<'_>) -> io::Result<()> {
    // On macOS, SO_LINGER counts in ticks of the clock, of which 0 are as many.
    set(socket, libc::SOL_SOCKET, libc::SO_LINGER, libc::linger { l_onoff: 1, l_linger: 0 })
}

/// An address in the system's form, and its length.
pub(super) fn to_system(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: the structure consists of numbers, for which zero is valid.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let len = match address {
        SocketAddr::V4(v4) => {
            let place = ptr::from_mut(&mut storage).cast::<libc::sockaddr_in>();
            // SAFETY: the storage is large enough and aligned for every form of address, and all its
            // bytes are initialized.
            let system = unsafe { &mut *place };
            system.sin_family = libc::AF_INET as libc::sa_family_t;
            system.sin_port = v4.port().to_be();
            system.sin_addr.s_addr = u32::from(*v4.ip()).to_be();
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            let place = ptr::from_mut(&mut storage).cast::<libc::sockaddr_in6>();
            // SAFETY: the same.
            let system = unsafe { &mut *place };
            system.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            system.sin6_port = v6.port().to_be();
            system.sin6_addr.s6_addr = v6.ip().octets();
            system.sin6_scope_id = v6.scope_id();
            size_of::<libc::sockaddr_in6>()
        }
    };
    #[cfg(target_vendor = "apple")]
    {
        storage.ss_len = len as u8;
    }
    (storage, len as libc::socklen_t)
}

pub(super) fn from_system(storage: &libc::sockaddr_storage) -> io::Result<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the storage is large enough and aligned for every form of address, and all its
            // bytes are initialized.
            let v4 = unsafe { &*ptr::from_ref(storage).cast::<libc::sockaddr_in>() };
            let ip = u32::from_be(v4.sin_addr.s_addr).into();
            Ok(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the same.
            let v6 = unsafe { &*ptr::from_ref(storage).cast::<libc::sockaddr_in6>() };
            let (ip, port) = (v6.sin6_addr.s6_addr.into(), u16::from_be(v6.sin6_port));
            Ok(SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into())
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Begins to connect.
pub(super) fn connect(socket: BorrowedFd<'_>, to: SocketAddr) -> io::Result<()> {
    let (address, len) = to_system(to);
    // SAFETY: the pointer and the length are those of `address`, which the call only reads.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    match check(result) {
        Ok(_) => Ok(()),
        Err(error) => match error.raw_os_error() {
            // An interrupted attempt goes on by itself.
            Some(libc::EINPROGRESS | libc::EINTR) => Ok(()),
            // Linux: no port is left to connect from.
            Some(libc::EAGAIN) => Err(io::ErrorKind::AddrNotAvailable.into()),
            _ => Err(error),
        },
    }
}

/// The socket's error, or that it is still connecting.
pub(super) fn take_error(socket: BorrowedFd<'_>) -> io::Result<()> {
    match get(socket, libc::SOL_SOCKET, libc::SO_ERROR)? {
        0 => match peer_address(socket) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            other => other.map(drop),
        },
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

type NameCall =
    unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn address_by(socket: BorrowedFd<'_>, call: NameCall) -> io::Result<SocketAddr> {
    // SAFETY: the structure consists of numbers, for which zero is valid.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let mut len = size_of_val(&storage) as libc::socklen_t;
    // SAFETY: the pointers are to `storage` and its length, which live until the call returns.
    check(unsafe { call(socket.as_raw_fd(), (&raw mut storage).cast(), &raw mut len) })?;
    from_system(&storage)
}

fn peer_address(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    address_by(socket, libc::getpeername)
}

/// The socket's own address.
pub(super) fn local_address(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    address_by(socket, libc::getsockname)
}

/// Receives bytes, or peeks at them.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    into: &mut [IoSliceMut<'_>],
    flags: libc::c_int,
) -> io::Result<usize> {
    // SAFETY: `msghdr` consists of numbers and pointers, for which zero is valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    // `IoSliceMut` has the layout of `iovec` (std::io::IoSliceMut).
    message.msg_iov = into.as_mut_ptr().cast();
    message.msg_iovlen = into.len() as _;
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: the header names the slices of `into`, which are borrowed exclusively until the call
    // returns.
    retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })
}

/// Sends bytes. A peer that is gone is an error and no signal.
pub(super) fn send(socket: BorrowedFd<'_>, from: &[IoSlice<'_>]) -> io::Result<usize> {
    // `prepare` has set SO_NOSIGPIPE there.
    #[cfg(target_vendor = "apple")]
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT;
    #[cfg(not(target_vendor = "apple"))]
    const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `msghdr` consists of numbers and pointers, for which zero is valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    // `IoSlice` has the layout of `iovec` (std::io::IoSlice). The call only reads.
    message.msg_iov = from.as_ptr().cast_mut().cast();
    message.msg_iovlen = from.len() as _;
    // SAFETY: the header names the slices of `from`, which are borrowed until the call returns.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, FLAGS) })
}

/// Ends what this side sends.
pub(super) fn shutdown(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) }).map(drop)
}

/// Drops received bytes: with `MSG_TRUNC`, TCP on Linux copies nothing (tcp(7)).
#[cfg(target_os = "linux")]
pub(super) fn discard(socket: BorrowedFd<'_>, mut len: usize) -> io::Result<()> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    while len > 0 {
        // SAFETY: with MSG_TRUNC, the kernel does not write to the buffer of a TCP socket, so there
        // need be none.
        let dropped =
            retry(|| unsafe { libc::recv(socket.as_raw_fd(), ptr::null_mut(), len, flags) })?;
        if dropped == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        len -= dropped;
    }
    Ok(())
}

/// Nobody calls this where there is no `SO_PEEK_OFF`.
#[cfg(not(target_os = "linux"))]
pub(super) fn discard(_: BorrowedFd<'_>, _: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Sets where the next peek begins.
#[cfg(target_os = "linux")]
pub(super) fn set_peek_offset(socket: BorrowedFd<'_>, offset: u32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset as libc::c_int)
}

/// There is none.
#[cfg(not(target_os = "linux"))]
pub(super) fn set_peek_offset(_: BorrowedFd<'_>, _: u32) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Whether TCP sockets of an address's family have a peek offset: since Linux 6.9 over IPv4, and since
/// about 6.11 over IPv6. Older kernels refuse the option.
pub(super) fn has_peek_offset(address: SocketAddr) -> bool {
    tcp(address.is_ipv4()).is_ok_and(|socket| set_peek_offset(socket.as_fd(), 0).is_ok())
}

/// How much the socket takes. The kernel counts the memory of its buffers, which is more than the bytes
/// in them, so a part of what is free is left out.
#[cfg(target_os = "linux")]
pub(super) fn send_space(socket: BorrowedFd<'_>) -> io::Result<SendSpace> {
    // The indices of linux/sock_diag.h.
    const RECEIVE_BUFFER: usize = 1;
    const SEND_BUFFER: usize = 3;
    const QUEUED: usize = 5;
    let mut info = [0u32; 9];
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the pointers are to `info` and its length, which live until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        // Linux before 4.12, and emulators. These are the bytes alone.
        info[SEND_BUFFER] = get(socket, libc::SOL_SOCKET, libc::SO_SNDBUF)?.max(0) as u32;
        info[RECEIVE_BUFFER] = get(socket, libc::SOL_SOCKET, libc::SO_RCVBUF)?.max(0) as u32;
        let mut queued: libc::c_int = 0;
        // SAFETY: the pointer is to `queued`, which lives until the call returns.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) })?;
        info[QUEUED] = queued.max(0) as u32;
    }
    let capacity = info[SEND_BUFFER];
    let free = capacity.saturating_sub(info[QUEUED]);
    Ok(SendSpace {
        free: free - free / 4,
        capacity: capacity - capacity / 4,
        charge: capacity.saturating_add(info[RECEIVE_BUFFER]),
    })
}

/// How much the socket takes.
#[cfg(not(target_os = "linux"))]
pub(super) fn send_space(socket: BorrowedFd<'_>) -> io::Result<SendSpace> {
    let capacity = get(socket, libc::SOL_SOCKET, libc::SO_SNDBUF)?.max(0) as u32;
    let queued = get(socket, libc::SOL_SOCKET, libc::SO_NWRITE)?.max(0) as u32;
    let receive = get(socket, libc::SOL_SOCKET, libc::SO_RCVBUF)?.max(0) as u32;
    let free = capacity.saturating_sub(queued);
    Ok(SendSpace { free, capacity, charge: capacity.saturating_add(receive) })
}
