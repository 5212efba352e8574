//! Calls on sockets of UDP and ICMP echo.

use std::io;
use std::mem;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::socket::{from_system, open, retry, set, set_flags, to_system};
use crate::sockets::{DatagramError, Incoming, Outgoing, Route};

/// `UDP_SEGMENT` and `UDP_GRO` of linux/udp.h.
#[cfg(target_os = "linux")]
const UDP_SEGMENT: i32 = 103;
#[cfg(target_os = "linux")]
const UDP_GRO: i32 = 104;
/// `UDP_MAX_SEGMENTS` of the kernels up to 6.8 (linux/udp.h). Later ones take 128.
#[cfg(target_os = "linux")]
const UDP_MAX_SEGMENTS: usize = 64;

/// Space for control messages, aligned for their headers: an address (20 bytes), a segment size (4), or
/// an error with an address (44), each with its header of at most 16.
type Control = [u64; 16];

/// How many messages one call sends or receives.
const AT_ONCE: usize = 16;

/// A new socket of UDP.
pub(super) fn udp(v4: bool) -> io::Result<OwnedFd> {
    let socket = open(v4, libc::SOCK_DGRAM, 0)?;
    set_flags(socket.as_fd())?;
    Ok(socket)
}

/// A new socket of ICMP echo ("ping socket"). Linux allows it to the groups of
/// `net.ipv4.ping_group_range`, and says EACCES to others.
pub(super) fn echo(v4: bool) -> io::Result<OwnedFd> {
    let protocol = if v4 { libc::IPPROTO_ICMP } else { libc::IPPROTO_ICMPV6 };
    let socket = open(v4, libc::SOCK_DGRAM, protocol)?;
    set_flags(socket.as_fd())?;
    Ok(socket)
}

/// How many datagrams of equal size one send takes.
#[cfg(target_os = "linux")]
pub(super) fn segments() -> usize {
    let has = udp(true).is_ok_and(|socket| {
        set(socket.as_fd(), libc::IPPROTO_UDP, UDP_SEGMENT, 0 as libc::c_int).is_ok()
    });
    if has { UDP_MAX_SEGMENTS } else { 0 }
}

/// There is no such call.
#[cfg(not(target_os = "linux"))]
pub(super) fn segments() -> usize {
    0
}

/// Asks for datagrams of equal size in one piece. An older kernel refuses, and gives them one by one.
#[cfg(target_os = "linux")]
pub(super) fn receive_together(socket: BorrowedFd<'_>) {
    let _ = set(socket, libc::IPPROTO_UDP, UDP_GRO, 1 as libc::c_int);
}

#[cfg(not(target_os = "linux"))]
pub(super) fn receive_together(_: BorrowedFd<'_>) {}

/// Asks for the errors that datagrams meet.
#[cfg(target_os = "linux")]
pub(super) fn report_errors(socket: BorrowedFd<'_>, v4: bool) {
    let _ = if v4 {
        set(socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1 as libc::c_int)
    } else {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1 as libc::c_int)
    };
}

/// A connected socket tells that its peer refuses, and no more.
#[cfg(not(target_os = "linux"))]
pub(super) fn report_errors(_: BorrowedFd<'_>, _: bool) {}

/// Asks for the host's address that a datagram was sent to.
pub(super) fn report_destination(socket: BorrowedFd<'_>, v4: bool) -> io::Result<()> {
    if v4 {
        set(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1 as libc::c_int)
    } else {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1 as libc::c_int)
    }
}

/// An empty message header.
fn message() -> libc::msghdr {
    // SAFETY: the structure consists of numbers and pointers, for which zero is valid.
    unsafe { mem::zeroed() }
}

/// Appends a control message of type `T`, which is a C type that the message has, to those of `header`.
/// The header's control memory has space for it and is zero behind its length.
fn push_control<T: Copy>(header: &mut libc::msghdr, level: i32, kind: i32, value: T) {
    #[allow(clippy::unnecessary_cast)] // The type is another one on macOS.
    let at = header.msg_controllen as usize;
    let len = size_of::<T>() as libc::c_uint;
    // SAFETY: `msg_control` is a `Control`, of which `at` bytes are used, a multiple of a header's
    // alignment. The message fits: at most two are written, of 4 and of 20 bytes.
    #[allow(clippy::cast_ptr_alignment)]
    unsafe {
        let message = header.msg_control.cast::<u8>().add(at).cast::<libc::cmsghdr>();
        (*message).cmsg_level = level;
        (*message).cmsg_type = kind;
        (*message).cmsg_len = libc::CMSG_LEN(len) as _;
        libc::CMSG_DATA(message).cast::<T>().write_unaligned(value);
        header.msg_controllen = (at + libc::CMSG_SPACE(len) as usize) as _;
    }
}

/// Calls `f` with level, type and data of each control message of a header that the kernel has filled.
fn each_control(header: &libc::msghdr, mut f: impl FnMut(i32, i32, &[u8])) {
    // SAFETY: the kernel has written whole messages within `msg_controllen` bytes of the control memory,
    // which is still there, and these macros stay in them.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = next.as_ref() {
            let data = libc::CMSG_DATA(next);
            let head = data.offset_from(next.cast::<u8>()) as usize;
            #[allow(clippy::unnecessary_cast)] // The type is another one on macOS.
            let len = (message.cmsg_len as usize).saturating_sub(head);
            f(message.cmsg_level, message.cmsg_type, std::slice::from_raw_parts(data, len));
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
}

/// Reads a `T`, a C type of numbers, from the start of a message's data.
fn read<T: Copy>(data: &[u8]) -> Option<T> {
    // SAFETY: there are enough bytes, all initialized, and every bit pattern is a `T`.
    (data.len() >= size_of::<T>()).then(|| unsafe { data.as_ptr().cast::<T>().read_unaligned() })
}

/// Fills the header of what is to be sent.
fn describe(
    header: &mut libc::msghdr,
    control: &mut Control,
    name: Option<&(libc::sockaddr_storage, libc::socklen_t)>,
    from: Option<IpAddr>,
    outgoing: &Outgoing<'_>,
) {
    if let Some((storage, len)) = name {
        header.msg_name = std::ptr::from_ref(storage).cast_mut().cast();
        header.msg_namelen = *len;
    }
    // `IoSlice` has the layout of `iovec` (std::io::IoSlice). The call only reads.
    header.msg_iov = outgoing.parts.as_ptr().cast_mut().cast();
    header.msg_iovlen = outgoing.parts.len() as _;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = 0;
    match from {
        Some(IpAddr::V4(v4)) => {
            let address = libc::in_addr { s_addr: u32::from(v4).to_be() };
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: address,
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            push_control(header, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
        }
        Some(IpAddr::V6(v6)) => {
            let address = libc::in6_addr { s6_addr: v6.octets() };
            let info = libc::in6_pktinfo { ipi6_addr: address, ipi6_ifindex: 0 };
            push_control(header, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
        }
        None => {}
    }
    #[cfg(target_os = "linux")]
    if outgoing.segment > 0 {
        push_control(header, libc::IPPROTO_UDP, UDP_SEGMENT, outgoing.segment);
    }
    if header.msg_controllen == 0 {
        header.msg_control = std::ptr::null_mut();
    }
}

/// Sends up to [`AT_ONCE`] messages in one call.
#[cfg(target_os = "linux")]
pub(super) fn send(
    socket: BorrowedFd<'_>,
    route: Option<Route>,
    batch: &[Outgoing<'_>],
) -> io::Result<usize> {
    let name = route.map(|route| to_system(route.to));
    let from = route.and_then(|route| route.from);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    if let [outgoing] = batch {
        let (mut header, mut control) = (message(), Control::default());
        describe(&mut header, &mut control, name.as_ref(), from, outgoing);
        // SAFETY: the header names `name`, `control` and the slices of `batch`, which live until the
        // call returns.
        retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) })?;
        return Ok(1);
    }
    let mut controls = [Control::default(); AT_ONCE];
    let mut headers = [libc::mmsghdr { msg_hdr: message(), msg_len: 0 }; AT_ONCE];
    let count = batch.len().min(AT_ONCE);
    for ((header, control), outgoing) in headers.iter_mut().zip(&mut controls).zip(batch) {
        describe(&mut header.msg_hdr, control, name.as_ref(), from, outgoing);
    }
    // musl's function of this name makes one call for each message, for kernels that read the padding of a
    // header. Here it is zero.
    // SAFETY: the first `count` headers name `name`, `controls` and the slices of `batch`, which live
    // until the call returns.
    retry(|| unsafe {
        let count = count as libc::c_uint;
        libc::syscall(libc::SYS_sendmmsg, socket.as_raw_fd(), headers.as_mut_ptr(), count, flags)
            as isize
    })
}

/// Sends messages one by one.
#[cfg(not(target_os = "linux"))]
pub(super) fn send(
    socket: BorrowedFd<'_>,
    route: Option<Route>,
    batch: &[Outgoing<'_>],
) -> io::Result<usize> {
    let name = route.map(|route| to_system(route.to));
    let from = route.and_then(|route| route.from);
    for (index, outgoing) in batch.iter().take(AT_ONCE).enumerate() {
        let (mut header, mut control) = (message(), Control::default());
        describe(&mut header, &mut control, name.as_ref(), from, outgoing);
        // SAFETY: the header names `name`, `control` and the slices of `batch`, which live until the
        // call returns.
        let sent = retry(|| unsafe {
            libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT)
        });
        match sent {
            Err(error) if index == 0 => return Err(error),
            Err(_) => return Ok(index),
            Ok(_) => {}
        }
    }
    Ok(batch.len().min(AT_ONCE))
}

/// What the kernel says of a message that it has received.
fn received(
    header: &libc::msghdr,
    name: &libc::sockaddr_storage,
    len: usize,
) -> io::Result<Incoming> {
    let mut incoming = Incoming { len, from: from_system(name)?, ..Incoming::NONE };
    each_control(header, |level, kind, data| match (level, kind) {
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
            let info: Option<libc::in_pktinfo> = read(data);
            incoming.to =
                info.map(|info| IpAddr::V4(u32::from_be(info.ipi_spec_dst.s_addr).into()));
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
            let info: Option<libc::in6_pktinfo> = read(data);
            incoming.to = info.map(|info| IpAddr::V6(info.ipi6_addr.s6_addr.into()));
        }
        #[cfg(target_os = "linux")]
        (libc::IPPROTO_UDP, UDP_GRO) => {
            let size: libc::c_int = read(data).unwrap_or(0);
            incoming.segment = size.clamp(0, u16::MAX.into()) as u16;
        }
        _ => {}
    });
    Ok(incoming)
}

/// Receives up to [`AT_ONCE`] messages in one call.
#[cfg(target_os = "linux")]
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    stride: usize,
    found: &mut [Incoming],
) -> io::Result<usize> {
    // SAFETY: the structure consists of numbers, for which zero is valid.
    let mut names: [libc::sockaddr_storage; AT_ONCE] = unsafe { mem::zeroed() };
    let mut controls = [Control::default(); AT_ONCE];
    let mut slices = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; AT_ONCE];
    let mut headers = [libc::mmsghdr { msg_hdr: message(), msg_len: 0 }; AT_ONCE];
    let mut count = 0;
    for (piece, _) in into.chunks_exact_mut(stride).zip(found.iter()).take(AT_ONCE) {
        slices[count] = libc::iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: stride };
        let header = &mut headers[count].msg_hdr;
        header.msg_name = (&raw mut names[count]).cast();
        header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        header.msg_iov = &raw mut slices[count];
        header.msg_iovlen = 1;
        header.msg_control = controls[count].as_mut_ptr().cast();
        header.msg_controllen = size_of::<Control>() as _;
        count += 1;
    }
    // SAFETY: the first `count` headers name their elements of `names`, `controls` and `slices`, and the
    // pieces of `into`, which is borrowed exclusively; all live until the call returns.
    let got = retry(|| unsafe {
        let received = libc::recvmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count as _,
            libc::MSG_DONTWAIT as _,
            std::ptr::null_mut(),
        );
        received as isize
    })?;
    for index in 0..got {
        let header = &headers[index];
        found[index] = received(&header.msg_hdr, &names[index], header.msg_len as usize)?;
    }
    Ok(got)
}

/// Receives messages one by one.
#[cfg(not(target_os = "linux"))]
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    stride: usize,
    found: &mut [Incoming],
) -> io::Result<usize> {
    let mut got = 0;
    for (piece, found) in into.chunks_exact_mut(stride).zip(found).take(AT_ONCE) {
        // SAFETY: the structure consists of numbers, for which zero is valid.
        let mut name: libc::sockaddr_storage = unsafe { mem::zeroed() };
        let mut control = Control::default();
        let mut slice = libc::iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: stride };
        let mut header = message();
        header.msg_name = (&raw mut name).cast();
        header.msg_namelen = size_of_val(&name) as libc::socklen_t;
        header.msg_iov = &raw mut slice;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of::<Control>() as _;
        // SAFETY: the header names `name`, `control`, `slice` and through it `piece`, which is borrowed
        // exclusively; all live until the call returns.
        let len = retry(|| unsafe {
            libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT)
        });
        match len {
            Err(error) if got == 0 => return Err(error),
            Err(_) => return Ok(got),
            Ok(len) => {
                *found = received(&header, &name, len)?;
                got += 1;
            }
        }
    }
    Ok(got)
}

/// Takes an error from the error queue (ip(7), `IP_RECVERR`).
#[cfg(target_os = "linux")]
pub(super) fn take_error(
    socket: BorrowedFd<'_>,
    quoted: &mut [u8],
) -> io::Result<Option<DatagramError>> {
    // The origins of linux/errqueue.h.
    const ICMP: u8 = 2;
    const ICMP6: u8 = 3;
    // SAFETY: the structure consists of numbers, for which zero is valid.
    let mut name: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let mut control = Control::default();
    let mut slice = libc::iovec { iov_base: quoted.as_mut_ptr().cast(), iov_len: quoted.len() };
    let mut header = message();
    header.msg_name = (&raw mut name).cast();
    header.msg_namelen = size_of_val(&name) as libc::socklen_t;
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of::<Control>() as _;
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: the header names `name`, `control`, `slice` and through it `quoted`, which is borrowed
    // exclusively; all live until the call returns.
    let len = match retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) }) {
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    };
    let (mut icmp, mut offender) = (None, None);
    each_control(&header, |level, kind, data| {
        if !matches!(
            (level, kind),
            (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
        ) {
            return;
        }
        let Some(error) = read::<libc::sock_extended_err>(data) else { return };
        if [ICMP, ICMP6].contains(&error.ee_origin) {
            icmp = Some((error.ee_type, error.ee_code));
            // The address is behind the error (`SO_EE_OFFENDER`).
            let address = &data[size_of::<libc::sock_extended_err>()..];
            offender = match read::<libc::sa_family_t>(address).map(i32::from) {
                Some(libc::AF_INET) => read::<libc::sockaddr_in>(address)
                    .map(|v4| IpAddr::V4(u32::from_be(v4.sin_addr.s_addr).into())),
                Some(libc::AF_INET6) => read::<libc::sockaddr_in6>(address)
                    .map(|v6| IpAddr::V6(v6.sin6_addr.s6_addr.into())),
                _ => None,
            };
        }
    });
    // An error about a connected socket may have no name.
    let to = from_system(&name).unwrap_or(Incoming::NONE.from);
    Ok(Some(DatagramError { icmp, offender, to, quoted: len.min(quoted.len()) }))
}

/// There is no error queue. [`Sockets::receive_datagrams`](crate::Sockets::receive_datagrams) and
/// [`send_datagrams`](crate::Sockets::send_datagrams) tell what they can.
#[cfg(not(target_os = "linux"))]
pub(super) fn take_error(_: BorrowedFd<'_>, _: &mut [u8]) -> io::Result<Option<DatagramError>> {
    Ok(None)
}
