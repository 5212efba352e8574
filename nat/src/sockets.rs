//! What the translator needs of the host's sockets.
//!
//! The translator makes no system call. It calls a [`Sockets`], which is [`sys::Host`](crate::sys)
//! in a program, and a model of the kernel in the tests.
//!
//! # Readiness
//!
//! A socket has one [`Token`] from its beginning to its end. What becomes ready is told once
//! ("edge-triggered"): when a connection is made or fails, when bytes arrive, when the peer closes
//! or resets. A translator that does not read them is not told again until more arrive, so it
//! remembers. Nothing is told again and again while a guest does not read (which would be a busy
//! loop).
//!
//! That a socket takes bytes again is told after
//! [`arm_writable`](Sockets::arm_writable), and once for each call.

use core::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};

use crate::table::FlowId;

/// What a socket belongs to. It is chosen by the translator, and comes back with each
/// [`Readiness`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// The kinds of things that have a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A flow of TCP.
    Tcp = 1,
    /// A socket of datagrams.
    Datagrams = 2,
    /// A listener of a port forward.
    Forward = 3,
}

impl Token {
    pub(crate) fn new(kind: Kind, id: FlowId) -> Self {
        Self((kind as u64) << 56 | u64::from(id.generation) << 32 | u64::from(id.index))
    }

    /// What the token names, unless it is none of this crate's.
    pub(crate) fn split(self) -> Option<(Kind, FlowId)> {
        let kind = match self.0 >> 56 {
            1 => Kind::Tcp,
            2 => Kind::Datagrams,
            3 => Kind::Forward,
            _ => return None,
        };
        let generation = (self.0 >> 32) as u32 & 0xff_ffff;
        Some((kind, FlowId { index: self.0 as u32, generation }))
    }
}

/// What has become of a socket. It is a hint: each field may be true without a reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There are bytes to read, or the end of the stream.
    pub readable: bool,
    /// The socket takes bytes, or the attempt to connect has ended.
    pub writable: bool,
    /// The peer sends no more.
    pub closed: bool,
    /// There are urgent bytes (RFC 6093), in front of which a read may stop although there are more.
    pub urgent: bool,
    /// There is an error to ask for.
    pub failed: bool,
}

/// Why a call failed, as far as a translator acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SocketError {
    /// Not now. Not a failure.
    WouldBlock,
    /// The peer refused the connection.
    Refused,
    /// The peer has reset the connection, or this side has.
    Reset,
    /// There is no route to the network.
    NetworkUnreachable,
    /// There is no way to the host.
    HostUnreachable,
    /// Nobody answered.
    TimedOut,
    /// The host's rules forbid it.
    Denied,
    /// The process or the system has no descriptor left.
    NoDescriptor,
    /// The kernel has no memory for it.
    NoMemory,
    /// No port is left to connect from, or the one that is asked for is in use.
    NoPort,
    /// The address that is asked for is none of the host's.
    NoAddress,
    /// The datagram is too long to be sent.
    TooLong,
    /// Another error, with its number.
    Other(i32),
}

impl From<io::Error> for SocketError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as E;
        match error.kind() {
            E::WouldBlock => Self::WouldBlock,
            E::ConnectionRefused => Self::Refused,
            E::ConnectionReset | E::ConnectionAborted | E::BrokenPipe | E::NotConnected => {
                Self::Reset
            }
            E::NetworkUnreachable | E::NetworkDown => Self::NetworkUnreachable,
            E::HostUnreachable => Self::HostUnreachable,
            E::TimedOut => Self::TimedOut,
            E::PermissionDenied => Self::Denied,
            E::AddrInUse => Self::NoPort,
            E::AddrNotAvailable => Self::NoAddress,
            E::OutOfMemory => Self::NoMemory,
            _ => match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE) => Self::NoDescriptor,
                Some(libc::ENOBUFS) => Self::NoMemory,
                Some(libc::EHOSTDOWN) => Self::HostUnreachable,
                Some(libc::EMSGSIZE) => Self::TooLong,
                Some(number) => Self::Other(number),
                None => Self::Other(0),
            },
        }
    }
}

/// What a host's sockets can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `SO_PEEK_OFF` works for TCP over IPv4: [`Sockets::set_peek_offset`].
    pub peek_offset_v4: bool,
    /// `SO_PEEK_OFF` works for TCP over IPv6.
    pub peek_offset_v6: bool,
    /// How many descriptors a translator may open.
    pub descriptors: usize,
    /// How many datagrams of equal size one send takes (`UDP_SEGMENT`). 0 if there is no such call.
    pub udp_segments: usize,
    /// Sockets for ICMP echo may be opened.
    pub echo_v4: bool,
    /// Sockets for ICMPv6 echo may be opened.
    pub echo_v6: bool,
}

/// What a socket of datagrams sends in one go: a datagram, or several of equal size.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The bytes.
    pub parts: &'a [IoSlice<'a>],
    /// The bytes of each datagram, of which the last may have fewer. 0 if this is one datagram.
    pub segment: u16,
}

/// Where datagrams of a socket that is not connected go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The peer.
    pub to: SocketAddr,
    /// The host's address that they come from, or `None` if the system chooses.
    pub from: Option<IpAddr>,
}

/// What was received in one piece: a datagram, or several of equal size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The bytes.
    pub len: usize,
    /// The peer.
    pub from: SocketAddr,
    /// The host's address that they were sent to, if the socket was opened by
    /// [`Sockets::bind_udp`].
    pub to: Option<IpAddr>,
    /// The bytes of each datagram, of which the last may have fewer (`UDP_GRO`). 0 if this is one.
    pub segment: u16,
}

impl Incoming {
    /// Nothing.
    pub const NONE: Self = Self {
        len: 0,
        from: SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0),
        to: None,
        segment: 0,
    };

    /// How many datagrams these are.
    pub(crate) fn datagrams(&self) -> u64 {
        match usize::from(self.segment) {
            0 => 1,
            segment => self.len.div_ceil(segment).max(1) as u64,
        }
    }
}

/// An error that a datagram has met on its way (`IP_RECVERR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatagramError {
    /// Type and code of the ICMP or ICMPv6 error, or `None` if the error is the host's own.
    pub icmp: Option<(u8, u8)>,
    /// The sender of the error, if it is known.
    pub offender: Option<IpAddr>,
    /// Where the datagram was to go.
    pub to: SocketAddr,
    /// How many bytes of the datagram are quoted.
    pub quoted: usize,
}

/// What a new connection is to be like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectOptions {
    /// The differentiated services of its packets, 6 bits.
    pub dscp: u8,
    /// The hop limit of its packets. `None` leaves it to the system. With one, any ICMP error ends the
    /// attempt to connect, and [`Sockets::take_datagram_error`] tells it.
    pub hop_limit: Option<u8>,
    /// The size of its buffers each way, in bytes. `None` leaves it to the kernel, which fits them to
    /// the connection.
    pub buffers: Option<u32>,
}

/// How much a socket takes, and what it costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendSpace {
    /// The bytes that the socket takes now, about.
    pub free: u32,
    /// The bytes that it takes when nothing waits in it, about. It may grow.
    pub capacity: u32,
    /// What it may cost the kernel, in bytes, both ways.
    pub charge: u32,
}

/// A host's sockets. No call waits.
///
/// Dropping a `Socket` closes it: what was sent still goes out. If bytes are unread, the peer gets a
/// reset.
pub trait Sockets {
    /// An open socket.
    type Socket: fmt::Debug;

    /// What these sockets can do. It does not change.
    fn capabilities(&self) -> Capabilities;

    /// The addresses of the host's interfaces, as they are now.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    fn host_addresses(&mut self) -> Result<Vec<IpAddr>, SocketError>;

    /// The host's resolvers, if they are not those that the last call returned. It is asked now and then,
    /// and only when a guest asks for a name.
    ///
    /// Sockets without a host have none, which is the default.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    fn resolvers(&mut self) -> Result<Option<Vec<SocketAddr>>, SocketError> {
        Ok(None)
    }

    /// Begins a TCP connection. The connection is made, or has failed, when `writable` or `failed`
    /// is told; then ask [`take_error`](Self::take_error).
    ///
    /// The socket sends at once what it is given (`TCP_NODELAY`), and takes urgent bytes for data
    /// (`SO_OOBINLINE`), so that it counts bytes as the guest does.
    ///
    /// # Errors
    ///
    /// If it fails at once.
    fn connect_tcp(
        &mut self,
        to: SocketAddr,
        options: &ConnectOptions,
        token: Token,
    ) -> Result<Self::Socket, SocketError>;

    /// Takes a connection that a listener has accepted: prepares it as
    /// [`connect_tcp`](Self::connect_tcp) does, and tells of it by `token` from now on, also of what has
    /// arrived before.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    fn adopt_tcp(&mut self, socket: &Self::Socket, token: Token) -> Result<(), SocketError>;

    /// Whether a connection is made. [`WouldBlock`](SocketError::WouldBlock) if that is not known
    /// yet; another error ends the socket, and may be told only once.
    ///
    /// # Errors
    ///
    /// What has happened to the socket since it was asked last.
    fn take_error(&mut self, socket: &Self::Socket) -> Result<(), SocketError>;

    /// Sets where the next [`peek`](Self::peek) begins: so many bytes behind the oldest that was not
    /// discarded (`SO_PEEK_OFF`). A peek moves this place forward and a discard moves it back, so that
    /// it stays at the same byte of the stream. Before the first call, each peek begins at the oldest byte.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    fn set_peek_offset(&mut self, socket: &Self::Socket, offset: u32) -> Result<(), SocketError>;

    /// Copies received bytes from the peek offset on, and keeps them in the socket. Returns how many
    /// these are: fewer than asked for if there are no more now, and 0 at the end of the stream.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](SocketError::WouldBlock) if there are none now.
    /// [`Reset`](SocketError::Reset), once: later calls return 0, as at the end of the stream.
    fn peek(
        &mut self,
        socket: &Self::Socket,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<usize, SocketError>;

    /// Takes received bytes that were peeked out of the socket, without a copy (`MSG_TRUNC`).
    ///
    /// # Errors
    ///
    /// If the socket does not have that many.
    fn discard(&mut self, socket: &Self::Socket, len: u32) -> Result<(), SocketError>;

    /// Copies received bytes and takes them out of the socket. Returns how many these are, as
    /// [`peek`](Self::peek) does.
    ///
    /// # Errors
    ///
    /// The errors are those of `peek`.
    fn receive(
        &mut self,
        socket: &Self::Socket,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<usize, SocketError>;

    /// Sends bytes, as many as the socket takes now, and returns how many these are.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](SocketError::WouldBlock) if it takes none now.
    fn send(&mut self, socket: &Self::Socket, from: &[IoSlice<'_>]) -> Result<usize, SocketError>;

    /// Ends what this side sends. What was sent before still goes out.
    ///
    /// # Errors
    ///
    /// If the connection is gone.
    fn shutdown(&mut self, socket: &Self::Socket) -> Result<(), SocketError>;

    /// Asks the kernel to find out whether the peer is still there, now and then (`SO_KEEPALIVE`).
    fn keep_alive(&mut self, socket: &Self::Socket);

    /// Closes the socket with a reset (`SO_LINGER` of 0 s).
    fn reset(&mut self, socket: Self::Socket);

    /// How much the socket takes now.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    fn send_space(&mut self, socket: &Self::Socket) -> Result<SendSpace, SocketError>;

    /// Asks to be told, once, when the socket takes bytes: at once if it does now.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    fn arm_writable(&mut self, socket: &Self::Socket, token: Token) -> Result<(), SocketError>;

    /// The address that the socket has on the host.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    fn local_address(&mut self, socket: &Self::Socket) -> Result<SocketAddr, SocketError>;

    /// Opens a socket of UDP that is connected to a peer. It gets what the peer sends, and perhaps a
    /// little that others sent before it was connected. It tells ICMP errors
    /// ([`take_datagram_error`](Self::take_datagram_error)), and puts datagrams together (`UDP_GRO`)
    /// where the system can.
    ///
    /// `port` is the port that it has on the host; 0 leaves it to the system.
    ///
    /// # Errors
    ///
    /// [`NoPort`](SocketError::NoPort) if the port is in use, and others.
    fn connect_udp(
        &mut self,
        port: u16,
        to: SocketAddr,
        token: Token,
    ) -> Result<Self::Socket, SocketError>;

    /// Opens a socket of UDP that gets what everybody sends to an address of the host. Port 0 leaves the
    /// port to the system. It is as [`connect_udp`](Self::connect_udp)'s otherwise.
    ///
    /// # Errors
    ///
    /// [`NoPort`](SocketError::NoPort) if the port is in use,
    /// [`Denied`](SocketError::Denied) if it takes a privilege,
    /// [`NoAddress`](SocketError::NoAddress) if the address is not the host's, and others.
    fn bind_udp(&mut self, at: SocketAddr, token: Token) -> Result<Self::Socket, SocketError>;

    /// Opens a socket of ICMP echo that is connected to a peer. What is sent and received begins with
    /// the header of ICMP, whose identifier and checksum are the system's. On macOS, the IP header is in
    /// front of what is received over IPv4.
    ///
    /// # Errors
    ///
    /// [`Denied`](SocketError::Denied) if the process may not, and others.
    fn connect_echo(&mut self, to: IpAddr, token: Token) -> Result<Self::Socket, SocketError>;

    /// Makes both buffers of a socket of datagrams so many bytes long, about. The system may refuse.
    fn set_datagram_buffers(&mut self, socket: &Self::Socket, len: u32);

    /// Sets the hop limit and the differentiated services (6 bits) of what a socket of datagrams sends.
    /// The system may refuse; the datagrams go out all the same.
    fn set_ip_fields(&mut self, socket: &Self::Socket, v4: bool, hop_limit: u8, dscp: u8);

    /// Sends datagrams, and returns how many of `batch` were sent: one at least, or an error about the
    /// first. `route` is `None` if the socket is connected.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](SocketError::WouldBlock) if the socket takes none now. What an earlier datagram
    /// has met may be told too; then nothing was sent.
    fn send_datagrams(
        &mut self,
        socket: &Self::Socket,
        route: Option<Route>,
        batch: &[Outgoing<'_>],
    ) -> Result<usize, SocketError>;

    /// Receives into the pieces of `into` that are `stride` bytes long, and returns how many have
    /// something, one at least. If they are fewer than `found` has places, there is nothing more now.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](SocketError::WouldBlock) if there is nothing now.
    fn receive_datagrams(
        &mut self,
        socket: &Self::Socket,
        into: &mut [u8],
        stride: usize,
        found: &mut [Incoming],
    ) -> Result<usize, SocketError>;

    /// Takes the oldest error that a datagram of the socket has met, or a connection with a hop limit of
    /// its own. `None` if there is none, or the
    /// system does not keep them.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    fn take_datagram_error(
        &mut self,
        socket: &Self::Socket,
        quoted: &mut [u8],
    ) -> Result<Option<DatagramError>, SocketError>;

    /// Opens a listener of TCP at an address of the host. Port 0 leaves the port to the system. It is
    /// told once that there are connections; [`accept`](Self::accept) until there is none.
    ///
    /// # Errors
    ///
    /// The errors are those of [`bind_udp`](Self::bind_udp).
    fn listen(
        &mut self,
        at: SocketAddr,
        backlog: u32,
        token: Token,
    ) -> Result<Self::Socket, SocketError>;

    /// Takes a connection from a listener. [`adopt_tcp`](Self::adopt_tcp) comes next.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](SocketError::WouldBlock) if there is none now.
    fn accept(
        &mut self,
        listener: &Self::Socket,
    ) -> Result<(Self::Socket, SocketAddr), SocketError>;
}
