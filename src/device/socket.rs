//! The wires by which virtual machine monitors reach a network outside their process: Unix sockets with
//! one frame after the other. Feature `socket`.
//!
//! ```no_run
//! use vmring::{Direction, Interface, Socket};
//!
//! // The other end of `qemu-system-x86_64 -netdev stream,id=n,addr.type=unix,addr.path=/run/vm.sock`.
//! let interface = Interface::builder().device(Socket::stream().listen("/run/vm.sock")).start()?;
//! let mut ring = interface.ring(Direction::Both).build()?;
//!
//! // A frame for a packet of the guest to arrive in.
//! let frame = ring.alloc().expect("a fresh ring has free frames");
//! ring.submit_read(frame, 1)?;
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! # Which wire a VMM speaks
//!
//! | VMM or helper | its option | here |
//! |---|---|---|
//! | QEMU | `-netdev stream,addr.type=unix,addr.path=P` | `Socket::stream().listen(P)` |
//! | QEMU | `-netdev stream,server=on,addr.type=unix,addr.path=P` | `Socket::stream().connect(P)` |
//! | QEMU | `-netdev socket,fd=N`, `-netdev dgram,local.type=fd,local.str=N` | `from_fd` of the other end of a socket pair of either type |
//! | QEMU | `-netdev dgram,local.type=unix,local.path=Q,remote.type=unix,remote.path=P` | `Socket::datagram().listen(P)` |
//! | socket_vmnet, passt | a client of theirs | `Socket::stream().listen(P)` |
//! | socket_vmnet, passt | as their client | `Socket::stream().connect(P)` |
//! | krunkit, libkrun | `type=unixstream,path=P` | `Socket::stream().listen(P)` |
//! | krunkit, libkrun, vfkit | `type=unixgram,path=P`, `unixSocketPath=P` | `Socket::datagram().listen(P)` |
//! | gvproxy, vmnet-helper | as their client | `Socket::datagram().connect(P).magic(true)` |
//! | user-mode Linux | `vec0:transport=bess,dst=P` | `Socket::seqpacket().listen(P)` (Linux) |
//!
//! A stream has a number of 32 bits, big-endian, in front of each frame: its length. In a datagram socket
//! or one of sequenced packets, each message is a frame. Frames have neither preamble nor checksum.
//!
//! # Peers
//!
//! An interface has one peer at a time. A further one that connects waits until the first has gone; its
//! frames wait with it. (For many at once, a program accepts them with a [`Listener`] and starts an
//! interface for each, by [`Socket::from_fd`].)
//!
//! * [`listen`](Socket::listen): peers come and go. While there is none, reads wait and writes fail with
//!   `Status::Os(ENOTCONN)`, which [`Interface::drops`](crate::Interface::drops) counts.
//! * [`connect`](Socket::connect): the same, and the interface connects again, each
//!   [second](Socket::reconnect) once.
//! * [`from_fd`](Socket::from_fd): when the peer has gone, the rings close, for the reason
//!   `Status::Os(ECONNRESET)`, or `Status::Os(EPROTO)` if it has broken the rules.
//!
//! The peer of a datagram socket that listens is whoever sends first. A datagram `VFKT`, with which vfkit
//! announces itself, is no frame. While there is a peer, nobody else is heard. Datagram sockets do not
//! tell when their peer ends: that is found when something is sent to it, and by a look each second.
//!
//! # What a peer can do
//!
//! A peer is as little trusted as a guest. A frame that is too short or too long is dropped and counted.
//! So is one whose virtio header is wrong or asks for work that was not negotiated. A stream in which a
//! length is above 131,072 bytes cannot be understood any more, so its connection ends; so does one that
//! ends within a frame. Both are counted ([`Interface::counters`](crate::Interface::counters)).
//!
//! A peer that does not read holds up nobody but itself. Its writes are tried again within the ring's
//! [`RetryPolicy`](crate::RetryPolicy), and then end with
//! [`BufferExhausted`](crate::Status::BufferExhausted). If the system has taken a part of a frame, the
//! write succeeds and the rest is kept. It goes before anything else, also in a later ring of the
//! interface, so a peer never sees a torn frame unless its connection ends.
//!
//! # Offload
//!
//! With [`virtio_header`](Socket::virtio_header) each frame has a `virtio_net_hdr` of 12 bytes in front,
//! in both directions. Such a wire has the offloads that the interface is started with
//! ([`InterfaceBuilder::offloads`](crate::InterfaceBuilder::offloads)); the peer must have been given the
//! same ones, since no wire negotiates. Without the header there is no offload, unless
//! [`implied_offload`](Socket::implied_offload) lets a datagram wire find it in the frames.

// Its tests run elsewhere too, with a kernel of their own.
#[cfg(any(target_os = "macos", all(test, unix)))]
mod apple;
mod batch;
mod counters;
mod datagram;
pub mod framing;
mod implied;
mod limits;
mod link;
mod messages;
mod packet;
mod place;
mod stream;
mod sys;
mod watch;

use std::collections::hash_map::RandomState;
use std::env;
use std::hash::{BuildHasher, Hasher};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use vmring_core::guest::SEGMENTS_MAX;
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::limits::VLAN_TAG_LEN;

use counters::Counters;
use datagram::{Datagram, Next, PeerRule};
use framing::StreamParser;
use limits::{
    BATCH, HEADER_LEN, IP_MAX, LARGE_RECEIVE_BUFFER, MESSAGE_RECEIVE_BUFFER, MESSAGE_SEND_BUFFER,
    MTU_MIN, READ_SEGMENTS_MAX, RECONNECT, STREAM_BUFFER, WRITE_SEGMENTS_MAX,
};
use link::{Handle, Link, Source};
use messages::{Endpoint, MessageQueue};
use packet::Layout;
use stream::StreamQueue;
use sys::Address;

use crate::config::{InterfaceConfig, InterfaceInfo, Offloads};
use crate::device::common::mac_of;
use crate::device::seam::{Capabilities, Device, Driver, Queue, QueueConfig, Wake};
use crate::error::{ConfigError, Error, SocketError};

pub use place::{Adopted, Learned, Listener, SocketKind, adopt, connect};

/// A wire over a socket, as a driver for [`Interface::builder`](crate::Interface::builder). See the
/// [module](self).
#[derive(Debug)]
pub struct Socket {
    kind: SocketKind,
    place: Option<Place>,
    bound: Option<Listener>,
    own_path: Option<PathBuf>,
    header: bool,
    magic: bool,
    reconnect: Option<Duration>,
    many_at_once: bool,
    one_peer: bool,
    implied: bool,
}

#[derive(Debug)]
enum Place {
    Descriptor(OwnedFd),
    Listen(PathBuf),
    Connect(PathBuf),
    Bound(Listener),
    /// A datagram socket with its peer, which is another wire's afterwards.
    Lent(Arc<OwnedFd>, Option<PathBuf>),
}

impl Socket {
    /// Creates a driver for a stream socket, with a length in front of each frame. Say where it is with
    /// [`listen`](Self::listen), [`connect`](Self::connect) or [`from_fd`](Self::from_fd).
    pub fn stream() -> Self {
        Self::of(SocketKind::Stream)
    }

    /// Creates a driver for a datagram socket; see [`stream`](Self::stream).
    pub fn datagram() -> Self {
        Self::of(SocketKind::Datagram)
    }

    /// Creates a driver for a socket of sequenced packets, which BESS and user-mode Linux speak; see
    /// [`stream`](Self::stream).
    #[cfg(target_os = "linux")]
    pub fn seqpacket() -> Self {
        Self::of(SocketKind::Seqpacket)
    }

    fn of(kind: SocketKind) -> Self {
        Self {
            kind,
            place: None,
            bound: None,
            own_path: None,
            header: false,
            magic: false,
            reconnect: Some(RECONNECT),
            many_at_once: false,
            one_peer: false,
            implied: false,
        }
    }

    /// Takes a socket that another process, or this one, has opened: one that is connected, such as one
    /// end of a socket pair, or one that listens. Its flags stay as they are, but one that listens does not
    /// wait from then on. Its buffers are set.
    ///
    /// A stream may be one of TCP. A datagram socket without a peer has the one who sends first.
    pub fn from_fd(mut self, fd: OwnedFd) -> Self {
        self.place = Some(Place::Descriptor(fd));
        self
    }

    /// Listens at a path. The start makes the socket, with the mode 0600, and replaces one whose process
    /// is gone. When the interface stops, the socket is removed.
    pub fn listen(mut self, path: impl Into<PathBuf>) -> Self {
        self.place = Some(Place::Listen(path.into()));
        self
    }

    /// Connects to the socket of a path. It need not be there yet.
    pub fn connect(mut self, path: impl Into<PathBuf>) -> Self {
        self.place = Some(Place::Connect(path.into()));
        self
    }

    /// Takes a socket that was made before, for example before the process gave up its privileges. By
    /// itself it is as if the interface [listened](Self::listen) at its path. A datagram socket that
    /// [connects](Self::connect) has it as its own side, in the place of [`own_path`](Self::own_path).
    /// When the interface stops, the socket is removed.
    pub fn bound(mut self, listener: Listener) -> Self {
        self.bound = Some(listener);
        self
    }

    /// Serves the peer that a datagram socket has [learned](Listener::learn_peer) or
    /// [reached](Listener::reach). When the peer has gone, the rings close for the reason
    /// `Status::Os(ECONNRESET)`. When the interface stops, the socket has no peer any more, and the next
    /// peer gets an interface of its own. So what a server has learned of one guest, such as its MAC
    /// address, does not hold for the next one. `listener` keeps the path. At most one interface may have
    /// the socket at a time.
    ///
    /// The start fails with [`SocketError::Setting`] if the socket has no peer.
    pub fn peer_of(mut self, listener: &Listener) -> Self {
        self.place = Some(Place::Lent(listener.socket.clone(), listener.reached.clone()));
        self
    }

    /// Sets the path of this side of a datagram socket that [connects](Self::connect), to which the peer
    /// answers. Default: a name of this process in the folder for temporary files.
    pub fn own_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.own_path = Some(path.into());
        self
    }

    /// Sets whether each frame has a virtio header of 12 bytes in front, in both directions. Default
    /// false.
    pub fn virtio_header(mut self, yes: bool) -> Self {
        self.header = yes;
        self
    }

    /// Sets whether a datagram socket that connects announces itself as vfkit does
    /// ([`VFKIT_MAGIC`](framing::VFKIT_MAGIC)). Default false. One that listens understands it always.
    pub fn magic(mut self, yes: bool) -> Self {
        self.magic = yes;
        self
    }

    /// Sets the time between two attempts of a socket that [connects](Self::connect). Default one second.
    /// With `None` a stream is connected once, at the start, which fails if nobody is there; when the
    /// peer goes, the rings close.
    pub fn reconnect(mut self, pause: Option<Duration>) -> Self {
        self.reconnect = pause;
        self
    }

    /// Sets whether the private calls `recvmsg_x` and `sendmsg_x` of macOS 15.6 and later move many
    /// datagrams at once. Default false, because no header of Apple's declares them, and the App Store may
    /// refuse a program that uses them. They cannot tell a datagram that was cut from one that fills its
    /// frame, so such a one is dropped. They are used where each datagram is in one frame. On other
    /// systems this has no effect: Linux has public calls, which are always used.
    pub fn many_at_once(mut self, yes: bool) -> Self {
        self.many_at_once = yes;
        self
    }

    /// Sets whether a datagram socket that listens has one peer and no other after it: when the peer has
    /// gone, the rings close for the reason `Status::Os(ECONNRESET)`. Default false: the next one that
    /// sends is the peer then. The start refuses it on other sockets, with
    /// [`SocketError::Setting`].
    pub fn one_peer(mut self, yes: bool) -> Self {
        self.one_peer = yes;
        self
    }

    /// Sets whether a datagram wire without headers has the offloads that the interface is started with.
    /// Default false. libkrun with offload and vmnet-helper speak like that: the peer leaves checksums
    /// to this side, and both send TCP of up to 64 KiB at once. What is left to do of a frame is found in
    /// the frame. A checksum that the peer has completed is completed again, so a wrong one is not
    /// noticed. UDP segmentation cannot be found, so an interface with it is refused, as are
    /// other sockets and headers ([`SocketError::Setting`]).
    pub fn implied_offload(mut self, yes: bool) -> Self {
        self.implied = yes;
        self
    }

    fn layout(&self, config: &InterfaceConfig) -> Result<(Layout, u32), Error> {
        let mtu = config.mtu.unwrap_or(1500);
        if !(MTU_MIN..=IP_MAX).contains(&mtu) {
            let sentence = format!("a wire's MTU is {MTU_MIN} to {IP_MAX} bytes, and not {mtu}");
            return Err(ConfigError::Invalid(sentence).into());
        }
        let mut offloads = config.offloads;
        if self.implied && (self.header || self.kind != SocketKind::Datagram || offloads.uso) {
            let sentence = "only a datagram socket without headers has offload that nothing names, and \
                            none of UDP";
            return Err(SocketError::Setting(sentence).into());
        }
        if offloads != Offloads::default() && !self.header && !self.implied {
            let device = "socket".to_owned();
            return Err(Error::NotSupported { what: "offload without a virtio header", device });
        }
        let segments = offloads.tso4 || offloads.tso6 || offloads.uso;
        // Every segmentation offload requires checksum offload.
        offloads.checksum |= segments;
        let is_implied = self.implied && offloads != Offloads::default();
        offloads.virtio_header = self.header || is_implied;
        let longest = if segments { IP_MAX } else { mtu };
        let max_packet_size = longest as usize + ETHERNET_HEADER_LEN + VLAN_TAG_LEN;
        let has_header = self.header;
        Ok((Layout { has_header, max_packet_size, offloads, is_implied, mtu: mtu as usize }, mtu))
    }

    /// The sizes of a socket's buffers: for sending and for receiving.
    fn buffers(&self, layout: &Layout) -> (usize, usize) {
        let is_large = layout.max_packet_size > IP_MAX as usize;
        match self.kind {
            SocketKind::Stream => (STREAM_BUFFER, STREAM_BUFFER),
            _ if is_large => (MESSAGE_SEND_BUFFER, LARGE_RECEIVE_BUFFER),
            _ => (MESSAGE_SEND_BUFFER, MESSAGE_RECEIVE_BUFFER),
        }
    }

    /// Opens a socket over which peers connect.
    fn open_link(
        kind: SocketKind,
        place: Place,
        pause: Option<Duration>,
        parser: StreamParser,
        buffers: (usize, usize),
        counters: Arc<Counters>,
    ) -> Result<Link, Error> {
        let mut given = None;
        let source = match place {
            Place::Listen(path) => Source::listener(Listener::bind(kind, &path)?),
            Place::Connect(path) => {
                Address::of(&path)?;
                if pause.is_none() {
                    let failed = Error::io("connecting to a socket");
                    given = Some(place::connect(kind, &path).map_err(failed)?);
                }
                Source::Path { path, pause }
            }
            Place::Bound(listener) => {
                place::check(kind, &listener.socket)?;
                Source::listener(listener)
            }
            Place::Lent(..) => unreachable!("the start has refused it"),
            Place::Descriptor(socket) => match place::adopt(kind, socket)? {
                Adopted::Listening(listener) => Source::listener(listener),
                Adopted::Single(socket) => {
                    given = Some(socket);
                    Source::Given
                }
            },
        };
        Ok(Link::new(kind, source, given, parser, buffers, counters))
    }

    /// Opens a datagram socket.
    fn open_datagram(
        place: Place,
        own: Own,
        (magic, once): (bool, bool),
        pause: Duration,
        buffers: (usize, usize),
        counters: Arc<Counters>,
    ) -> Result<Datagram, Error> {
        let kind = SocketKind::Datagram;
        let next = match &place {
            Place::Lent(..) => Next::Wire,
            _ if once => Next::End,
            _ => Next::Peer,
        };
        let mut learned = None;
        let (socket, file, rule) = match place {
            Place::Listen(path) => {
                let (socket, file) = place::bind(kind, &path)?;
                (Arc::new(socket), Some(file), PeerRule::Learn)
            }
            Place::Connect(path) => {
                let address = Address::of(&path)?;
                let Listener { socket, file, .. } = match own {
                    Own::Bound(listener) => listener,
                    Own::Path(path) => Listener::bind(kind, &path)?,
                };
                place::check(kind, &socket)?;
                (socket, file, PeerRule::Known { path, address, magic, pause })
            }
            Place::Bound(Listener { socket, file, .. }) => {
                place::check(kind, &socket)?;
                (socket, file, PeerRule::Learn)
            }
            Place::Lent(socket, path) => {
                place::check(kind, &socket)?;
                let sentence = "the datagram socket has no peer yet";
                learned = Some(sys::peer(&socket).ok_or(SocketError::Setting(sentence))?);
                let rule = match path {
                    None => PeerRule::Learn,
                    Some(path) => {
                        PeerRule::Known { address: Address::of(&path)?, path, magic, pause }
                    }
                };
                (socket, None, rule)
            }
            Place::Descriptor(socket) => {
                place::check(kind, &socket)?;
                let has_peer = sys::peer(&socket).is_some();
                let rule = if has_peer { PeerRule::Given } else { PeerRule::Learn };
                (Arc::new(socket), None, rule)
            }
        };
        sys::set_buffers(&socket, buffers.0, buffers.1);
        let datagram = Datagram::new(socket, rule, next, file, counters);
        if let Some(peer) = learned {
            datagram.has_peer(peer);
        }
        Ok(datagram)
    }
}

/// This side of a datagram socket that connects.
enum Own {
    Bound(Listener),
    Path(PathBuf),
}

/// A path that no other socket has, for a peer to answer to.
fn any_path() -> PathBuf {
    // Each state has keys of its own, which are random.
    let number = RandomState::new().build_hasher().finish();
    env::temp_dir().join(format!("vmring-{}-{number:016x}.sock", process::id()))
}

impl Driver for Socket {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let (layout, mtu) = self.layout(config)?;
        let buffers = self.buffers(&layout);
        let Socket { kind, place, bound, own_path, magic, reconnect, many_at_once, .. } = *self;
        let once = self.one_peer;
        let (place, bound) = match (place, bound) {
            (None, Some(listener)) => (Place::Bound(listener), None),
            (Some(place), bound) => (place, bound),
            (None, None) => {
                let sentence =
                    "the wire has no socket: give it one with listen, connect, bound or from_fd";
                return Err(SocketError::Setting(sentence).into());
            }
        };
        let has_own_side = kind == SocketKind::Datagram && matches!(place, Place::Connect(_));
        if bound.is_some() && !has_own_side {
            let sentence = "the wire has two sockets: one is enough";
            return Err(SocketError::Setting(sentence).into());
        }
        if kind != SocketKind::Datagram && matches!(place, Place::Lent(..)) {
            let sentence = "only a datagram socket serves one wire after the other";
            return Err(SocketError::Setting(sentence).into());
        }
        if kind != SocketKind::Datagram && (magic || own_path.is_some()) {
            let sentence = "only a datagram socket has a path of its own and announces itself";
            return Err(SocketError::Setting(sentence).into());
        }
        if once && (kind != SocketKind::Datagram || has_own_side) {
            let sentence = "only a datagram socket that listens can have one peer and no other";
            return Err(SocketError::Setting(sentence).into());
        }
        let counters = Arc::<Counters>::default();
        let parser = StreamParser::new(layout.max_packet_size, layout.header());
        let wire = if kind == SocketKind::Datagram {
            let pause = reconnect.unwrap_or(RECONNECT);
            let path = || Own::Path(own_path.unwrap_or_else(any_path));
            let own = bound.map_or_else(path, Own::Bound);
            let datagram =
                Self::open_datagram(place, own, (magic, once), pause, buffers, counters.clone())?;
            Wire::Datagram(Arc::new(datagram))
        } else {
            let link = Self::open_link(kind, place, reconnect, parser, buffers, counters.clone())?;
            Wire::Link(kind, Arc::new(link))
        };
        let max_packet_size = layout.max_packet_size as u32;
        let info = InterfaceInfo::new(config, mac_of(config), mtu, max_packet_size);
        Ok(Arc::new(SocketDevice { info, layout, wire, many_at_once, counters }))
    }
}

/// A started wire.
struct SocketDevice {
    info: InterfaceInfo,
    layout: Layout,
    wire: Wire,
    many_at_once: bool,
    counters: Arc<Counters>,
}

enum Wire {
    Datagram(Arc<Datagram>),
    Link(SocketKind, Arc<Link>),
}

impl Device for SocketDevice {
    fn name(&self) -> &str {
        "socket"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(self.info.mtu, self.info.max_packet_size);
        caps.max_read_batch = BATCH;
        caps.max_write_batch = BATCH;
        let headers = self.layout.has_header || self.layout.is_implied;
        caps.headroom = if headers { HEADER_LEN as u32 } else { 0 };
        caps.offloads = self.layout.offloads;
        caps.write_segments = WRITE_SEGMENTS_MAX as u32;
        caps.writing_rings = usize::MAX;
        caps.late_descriptor = true;
        (caps.read_segments, caps.safety_poll) = match &self.wire {
            Wire::Datagram(datagram) => (READ_SEGMENTS_MAX as u32, datagram.pause()),
            Wire::Link(SocketKind::Stream, link) => (SEGMENTS_MAX, link.pause()),
            Wire::Link(_, link) => (READ_SEGMENTS_MAX as u32, link.pause()),
        };
        if self.layout.is_implied {
            // It looks into each frame, and must own what it looks at.
            (caps.read_segments, caps.write_segments) = (0, 0);
        }
        caps
    }

    fn queue(&self, config: QueueConfig, _wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let (layout, direction) = (self.layout, config.direction);
        let handle = |link: &Arc<Link>| Handle::new(link.clone(), direction.reads());
        let endpoint = match &self.wire {
            Wire::Link(SocketKind::Stream, link) => {
                return Ok(Box::new(StreamQueue::new(handle(link), layout, direction)));
            }
            Wire::Link(_, link) => Endpoint::Connections(handle(link)),
            Wire::Datagram(datagram) => Endpoint::Datagram(datagram.clone()),
        };
        Ok(Box::new(MessageQueue::new(endpoint, layout, direction, self.many_at_once)))
    }

    fn stop(&self) -> Result<(), Error> {
        match &self.wire {
            Wire::Datagram(datagram) => datagram.stop(),
            Wire::Link(_, link) => link.stop(),
        }
        Ok(())
    }

    fn restart(&self) -> Result<(), Error> {
        match &self.wire {
            Wire::Datagram(datagram) => datagram.restart(),
            Wire::Link(_, link) => link.restart(),
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.counters()
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        self.counters.drops()
    }
}
