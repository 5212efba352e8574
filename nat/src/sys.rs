//! The host's sockets: [`Host`].
//!
//! `addresses.rs` reads the host's own addresses, and `resolv_conf.rs` its resolvers. `datagram.rs` has the calls on sockets of UDP and ICMP.
//! `route.rs` asks whether the host has a way to the world over IPv6.
//! `socket.rs` has the calls that both systems have, `epoll.rs` and `kqueue.rs` how each tells what is
//! ready. Where a system lacks a call, the [`Capabilities`] say so or the file of that system has the
//! other way.
//!
//! # System calls
//!
//! What a filter of system calls has to allow on Linux. At the start: `prlimit64`, `epoll_create1`,
//! `eventfd2`, `socket`, `setsockopt`, `close`. Afterwards: `socket`, `bind`, `connect`, `listen`, `accept4`,
//! `setsockopt`, `getsockopt`, `getpeername`, `getsockname`, `fcntl`, `sendmsg`, `sendmmsg`, `recvmsg`,
//! `recvmmsg`, `recvfrom`, `shutdown`, `close`, `epoll_ctl`, `epoll_wait` (`epoll_pwait` on arm64), `read`,
//! `write`, `sendto` (to a netlink socket, for the host's own addresses), and `ioctl` with `TIOCOUTQ` where
//! there is no `SO_MEMINFO`. With [`Resolvers::Host`](crate::Resolvers::Host), `statx` and `openat` of
//! /etc/resolv.conf too when guests ask for names, and for an address of a link `ioctl` with `SIOCGIFINDEX`.
//! [`has_ipv6_route`] makes `socket`, `bind`, `connect`, `getsockname` and `close`.

mod addresses;
mod datagram;
#[cfg(target_os = "linux")]
mod epoll;
#[cfg(not(target_os = "linux"))]
mod kqueue;
mod resolv_conf;
mod route;
mod socket;

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::limits::DESCRIPTORS_RESERVED;
use crate::sockets::{
    Capabilities, ConnectOptions, DatagramError, Incoming, Outgoing, Route, SendSpace, SocketError,
    Sockets, Token,
};

#[cfg(target_os = "linux")]
pub use epoll::Events;
#[cfg(target_os = "linux")]
use epoll::Poll;
#[cfg(not(target_os = "linux"))]
pub use kqueue::Events;
#[cfg(not(target_os = "linux"))]
use kqueue::Poll;
use resolv_conf::ResolvConf;
pub use route::has_ipv6_route;

/// The sockets of this process, and the queue of what is ready.
#[derive(Debug)]
pub struct Host {
    poll: Arc<Poll>,
    capabilities: Capabilities,
    resolv_conf: ResolvConf,
}

impl Host {
    /// Finds out what the system can do.
    ///
    /// # Errors
    ///
    /// If the system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let descriptors = socket::descriptor_limit()?.saturating_sub(DESCRIPTORS_RESERVED);
        let capabilities = Capabilities {
            peek_offset_v4: socket::has_peek_offset((Ipv4Addr::LOCALHOST, 0).into()),
            peek_offset_v6: socket::has_peek_offset((Ipv6Addr::LOCALHOST, 0).into()),
            descriptors,
            udp_segments: datagram::segments(),
            echo_v4: datagram::echo(true).is_ok(),
            echo_v6: datagram::echo(false).is_ok(),
        };
        let resolv_conf = ResolvConf::new("/etc/resolv.conf");
        Ok(Self { poll: Arc::new(Poll::new()?), capabilities, resolv_conf })
    }

    /// Waits until a socket is ready, [`Waker::wake`] is called, a signal comes or the time is over;
    /// with `None` there is no such time. `events` has what is ready afterwards.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn wait(&mut self, timeout: Option<Duration>, events: &mut Events) -> io::Result<()> {
        self.poll.wait(timeout, events)
    }

    /// Reads the host's resolvers from another file than /etc/resolv.conf, of the same form. It is read
    /// with the next query, and again when it changes.
    pub fn set_resolv_conf(&mut self, path: impl AsRef<Path>) {
        self.resolv_conf = ResolvConf::new(path);
    }

    /// A handle that ends [`wait`](Self::wait) from any thread.
    pub fn waker(&self) -> Waker {
        Waker { poll: Arc::clone(&self.poll) }
    }
}

/// Ends [`Host::wait`], the one that is under way or the next.
#[derive(Clone, Debug)]
pub struct Waker {
    poll: Arc<Poll>,
}

impl Waker {
    /// Ends the wait.
    pub fn wake(&self) {
        self.poll.wake();
    }
}

impl Sockets for Host {
    type Socket = OwnedFd;

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn host_addresses(&mut self) -> Result<Vec<IpAddr>, SocketError> {
        Ok(addresses::all()?)
    }

    fn resolvers(&mut self) -> Result<Option<Vec<SocketAddr>>, SocketError> {
        Ok(self.resolv_conf.changed()?)
    }

    fn connect_tcp(
        &mut self,
        to: SocketAddr,
        options: &ConnectOptions,
        token: Token,
    ) -> Result<OwnedFd, SocketError> {
        let socket = socket::tcp(to.is_ipv4())?;
        socket::prepare(socket.as_fd())?;
        if let Some(len) = options.buffers {
            socket::set_buffers(socket.as_fd(), len)?;
        }
        socket::set_dscp_at_first(socket.as_fd(), to.is_ipv4(), options.dscp);
        if let Some(hop_limit) = options.hop_limit {
            socket::set_hop_limit(socket.as_fd(), to.is_ipv4(), hop_limit);
            datagram::report_errors(socket.as_fd(), to.is_ipv4());
        }
        socket::connect(socket.as_fd(), to)?;
        // Not before: a socket that is not connecting is told of as closed.
        self.poll.add(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn adopt_tcp(&mut self, socket: &OwnedFd, token: Token) -> Result<(), SocketError> {
        socket::set_nonblocking(socket.as_fd())?;
        socket::prepare(socket.as_fd())?;
        self.poll.add(socket.as_fd(), token)?;
        Ok(())
    }

    fn take_error(&mut self, socket: &OwnedFd) -> Result<(), SocketError> {
        Ok(socket::take_error(socket.as_fd())?)
    }

    fn set_peek_offset(&mut self, socket: &OwnedFd, offset: u32) -> Result<(), SocketError> {
        Ok(socket::set_peek_offset(socket.as_fd(), offset)?)
    }

    fn peek(
        &mut self,
        socket: &OwnedFd,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<usize, SocketError> {
        Ok(socket::receive(socket.as_fd(), into, libc::MSG_PEEK)?)
    }

    fn discard(&mut self, socket: &OwnedFd, len: u32) -> Result<(), SocketError> {
        Ok(socket::discard(socket.as_fd(), len as usize)?)
    }

    fn receive(
        &mut self,
        socket: &OwnedFd,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<usize, SocketError> {
        Ok(socket::receive(socket.as_fd(), into, 0)?)
    }

    fn send(&mut self, socket: &OwnedFd, from: &[IoSlice<'_>]) -> Result<usize, SocketError> {
        Ok(socket::send(socket.as_fd(), from)?)
    }

    fn shutdown(&mut self, socket: &OwnedFd) -> Result<(), SocketError> {
        Ok(socket::shutdown(socket.as_fd())?)
    }

    fn keep_alive(&mut self, socket: &OwnedFd) {
        // If the system refuses, the flow ends by its own time.
        let _ = socket::keep_alive(socket.as_fd());
    }

    fn reset(&mut self, socket: OwnedFd) {
        // If the system refuses, the socket is closed without a reset.
        let _ = socket::set_linger_zero(socket.as_fd());
    }

    fn send_space(&mut self, socket: &OwnedFd) -> Result<SendSpace, SocketError> {
        Ok(socket::send_space(socket.as_fd())?)
    }

    fn arm_writable(&mut self, socket: &OwnedFd, token: Token) -> Result<(), SocketError> {
        Ok(self.poll.arm_writable(socket.as_fd(), token)?)
    }

    fn local_address(&mut self, socket: &OwnedFd) -> Result<SocketAddr, SocketError> {
        Ok(socket::local_address(socket.as_fd())?)
    }

    fn connect_udp(
        &mut self,
        port: u16,
        to: SocketAddr,
        token: Token,
    ) -> Result<OwnedFd, SocketError> {
        let socket = datagram::udp(to.is_ipv4())?;
        datagram::report_errors(socket.as_fd(), to.is_ipv4());
        datagram::receive_together(socket.as_fd());
        // So that the port is free for IPv6 although a socket of IPv4 has it.
        socket::only_v6(socket.as_fd(), to)?;
        if port != 0 {
            let any: IpAddr = match to {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            socket::bind(socket.as_fd(), (any, port).into())?;
        }
        socket::connect(socket.as_fd(), to)?;
        self.poll.add_reader(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn bind_udp(&mut self, at: SocketAddr, token: Token) -> Result<OwnedFd, SocketError> {
        let socket = datagram::udp(at.is_ipv4())?;
        datagram::report_errors(socket.as_fd(), at.is_ipv4());
        datagram::receive_together(socket.as_fd());
        datagram::report_destination(socket.as_fd(), at.is_ipv4())?;
        socket::only_v6(socket.as_fd(), at)?;
        socket::bind(socket.as_fd(), at)?;
        self.poll.add_reader(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn connect_echo(&mut self, to: IpAddr, token: Token) -> Result<OwnedFd, SocketError> {
        let socket = datagram::echo(to.is_ipv4())?;
        datagram::report_errors(socket.as_fd(), to.is_ipv4());
        socket::connect(socket.as_fd(), (to, 0).into())?;
        self.poll.add_reader(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn set_datagram_buffers(&mut self, socket: &OwnedFd, len: u32) {
        // If the system refuses, the buffers are the system's own.
        let _ = socket::set_buffers(socket.as_fd(), len);
    }

    fn set_ip_fields(&mut self, socket: &OwnedFd, v4: bool, hop_limit: u8, dscp: u8) {
        socket::set_hop_limit(socket.as_fd(), v4, hop_limit);
        socket::set_dscp(socket.as_fd(), v4, dscp);
    }

    fn send_datagrams(
        &mut self,
        socket: &OwnedFd,
        route: Option<Route>,
        batch: &[Outgoing<'_>],
    ) -> Result<usize, SocketError> {
        Ok(datagram::send(socket.as_fd(), route, batch)?)
    }

    fn receive_datagrams(
        &mut self,
        socket: &OwnedFd,
        into: &mut [u8],
        stride: usize,
        found: &mut [Incoming],
    ) -> Result<usize, SocketError> {
        Ok(datagram::receive(socket.as_fd(), into, stride, found)?)
    }

    fn take_datagram_error(
        &mut self,
        socket: &OwnedFd,
        quoted: &mut [u8],
    ) -> Result<Option<DatagramError>, SocketError> {
        Ok(datagram::take_error(socket.as_fd(), quoted)?)
    }

    fn listen(
        &mut self,
        at: SocketAddr,
        backlog: u32,
        token: Token,
    ) -> Result<OwnedFd, SocketError> {
        let listener = socket::listen(at, backlog)?;
        self.poll.add_reader(listener.as_fd(), token)?;
        Ok(listener)
    }

    fn accept(&mut self, listener: &OwnedFd) -> Result<(OwnedFd, SocketAddr), SocketError> {
        Ok(socket::accept(listener.as_fd())?)
    }
}
