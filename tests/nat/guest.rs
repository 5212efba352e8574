//! A guest: smoltcp over a ring of an embedded network.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface as Stack, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::wire::{
    DhcpOption, EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpProtocol, IpRepr, Ipv4Cidr,
    Ipv6Cidr, UdpPacket, UdpRepr,
};
use vmring::{Direction, Embedded, Interface, Ring, RingOp};

use crate::support::{LONG, stage};

/// The gateway of a shared network.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);
/// How many reads a guest keeps posted.
const READS: usize = 64;

/// Frames between the stack and the ring.
#[derive(Default)]
struct Card {
    mtu: usize,
    received: VecDeque<Vec<u8>>,
    to_send: VecDeque<Vec<u8>>,
}

pub(crate) struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub(crate) struct ToSend<'c>(&'c mut VecDeque<Vec<u8>>);

impl TxToken for ToSend<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = ToSend<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, ToSend<'_>)> {
        let frame = self.received.pop_front()?;
        Some((Received(frame), ToSend(&mut self.to_send)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<ToSend<'_>> {
        Some(ToSend(&mut self.to_send))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities
    }
}

/// See the [module](self).
pub(crate) struct Guest {
    pub(crate) interface: Interface,
    ring: Ring,
    card: Card,
    stack: Stack,
    sockets: SocketSet<'static>,
    start: Instant,
    dhcp: Option<SocketHandle>,
    /// How many queries of DNS it has sent.
    pub(crate) asked: u16,
}

/// A ring for both directions, with so many reads posted.
pub(crate) fn ring_of(interface: &Interface, reads: usize) -> Ring {
    let mut ring = interface.ring(Direction::Both).depth(1024).build().expect("a ring");
    let frames: Vec<_> = (0..reads).map(|_| ring.alloc().expect("a frame")).collect();
    for frame in frames {
        ring.submit_read(frame, 0).expect("a posted read");
    }
    ring
}

/// The frames that have arrived, whose reads are posted again.
pub(crate) fn received(ring: &mut Ring) -> Vec<Vec<u8>> {
    let (mut packets, mut reads) = (Vec::new(), Vec::new());
    for done in ring.reap() {
        let (op, result) = (done.op, done.result);
        let Some(frame) = done.take_frame() else { continue };
        if op == RingOp::Read {
            if result.is_ok() {
                packets.push(frame.to_vec());
            }
            reads.push(frame);
        }
    }
    for mut frame in reads {
        frame.reset();
        // A ring that is closed takes none.
        let _ = ring.submit_read(frame, 0);
    }
    packets
}

/// Sends a frame, and returns whether the ring had a place for it.
pub(crate) fn send(ring: &mut Ring, bytes: &[u8]) -> bool {
    let Some(mut frame) = ring.alloc() else { return false };
    frame.copy_from(bytes).expect("a frame for a packet");
    ring.submit_write(frame, 1).is_ok()
}

impl Guest {
    /// A guest whose address was set by hand.
    pub(crate) fn with_address(interface: Interface, address: Ipv4Addr) -> Self {
        let mut guest = Self::new(interface, READS);
        guest.set_address(Ipv4Cidr::new(address, 24));
        guest
    }

    /// A guest that asks for an address.
    pub(crate) fn with_dhcp(interface: Interface) -> Self {
        Self::with_dhcp_as(interface, b"")
    }

    /// A guest that asks for an address, and that calls itself `name`, if that is not empty.
    pub(crate) fn with_dhcp_as(interface: Interface, name: &'static [u8]) -> Self {
        let mut guest = Self::new(interface, READS);
        let mut socket = dhcpv4::Socket::new();
        if !name.is_empty() {
            socket.set_outgoing_options(vec![DhcpOption { kind: 12, data: name }].leak());
        }
        guest.dhcp = Some(guest.sockets.add(socket));
        guest.until("a lease", |guest| {
            let handle = guest.dhcp?;
            let address = match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()? {
                dhcpv4::Event::Configured(config) => config.address,
                dhcpv4::Event::Deconfigured => return None,
            };
            guest.set_address(address);
            Some(())
        });
        guest
    }

    /// A guest without an address, that keeps so many reads posted.
    pub(crate) fn new(interface: Interface, reads: usize) -> Self {
        let ring = ring_of(&interface, reads);
        let mut card = Card { mtu: interface.mtu() as usize, ..Card::default() };
        let mac = HardwareAddress::Ethernet(EthernetAddress(interface.mac().into_array()));
        let mut config = Config::new(mac);
        config.random_seed = 7;
        let stack = Stack::new(config, &mut card, smoltcp::time::Instant::ZERO);
        let (sockets, start) = (SocketSet::new(Vec::new()), Instant::now());
        Self { interface, ring, card, stack, sockets, start, dhcp: None, asked: 0 }
    }

    pub(crate) fn set_address(&mut self, address: Ipv4Cidr) {
        self.stack.update_ip_addrs(|addresses| {
            addresses.clear();
            addresses.push(IpCidr::Ipv4(address)).expect("space for an address");
        });
        self.stack.routes_mut().add_default_ipv4_route(GATEWAY).expect("space for a route");
    }

    /// A guest with an address of the network's prefix of IPv6, which ends with `last`.
    pub(crate) fn with_ipv6(interface: Interface, last: u16) -> Self {
        let mut guest = Self::new(interface, READS);
        let gateway = guest.gateway_v6();
        let address = Ipv6Addr::from_bits(gateway.to_bits() >> 16 << 16 | u128::from(last));
        guest.stack.update_ip_addrs(|addresses| {
            addresses.push(Ipv6Cidr::new(address, 64).into()).expect("space for an address");
        });
        guest.stack.routes_mut().add_default_ipv6_route(gateway).expect("space for a route");
        guest
    }

    /// The gateway's address over IPv6.
    pub(crate) fn gateway_v6(&self) -> Ipv6Addr {
        let prefix = self.interface.info().nat66_prefix.expect("a network with IPv6");
        Ipv6Addr::from_bits(prefix.to_bits() | 1)
    }

    pub(crate) fn address_v6(&self) -> Ipv6Addr {
        let addresses = self.stack.ip_addrs().iter();
        let v6 = |cidr: &IpCidr| match cidr {
            IpCidr::Ipv6(cidr) => Some(cidr.address()),
            IpCidr::Ipv4(_) => None,
        };
        addresses.filter_map(v6).next().expect("an address")
    }

    /// Waits for a frame, and sends another one meanwhile. The stack gets nothing.
    pub(crate) fn frame_where(
        &mut self,
        what: &str,
        sent: &[u8],
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Vec<u8> {
        stage(what);
        let begin = Instant::now();
        loop {
            self.card.received.extend(received(&mut self.ring));
            if let Some(found) = self.card.received.drain(..).find(|frame| wanted(frame)) {
                return found;
            }
            assert!(begin.elapsed() < LONG, "it never came: {what}");
            if !sent.is_empty() {
                send(&mut self.ring, sent);
            }
            self.ring.wait(1, Some(Duration::from_millis(20)));
        }
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        self.stack.ipv4_addr().expect("an address")
    }

    /// The guest goes on at another interface, as one that outlives a crash of its network's process.
    pub(crate) fn move_to(&mut self, start: impl FnOnce() -> Interface) {
        let mac = self.interface.mac();
        let ring = std::mem::replace(&mut self.ring, {
            // Both are gone before the next network begins.
            let nowhere =
                Interface::builder().device(Embedded::switch("nowhere")).start().expect("a switch");
            let ring = nowhere.ring(Direction::Write).build().expect("a ring");
            self.interface = nowhere;
            ring
        });
        drop(ring);
        self.interface = start();
        assert_eq!(self.interface.mac(), mac, "the guest keeps its MAC address");
        self.ring = ring_of(&self.interface, READS);
    }

    /// Moves frames both ways once.
    pub(crate) fn turn(&mut self) {
        self.card.received.extend(received(&mut self.ring));
        let now = smoltcp::time::Instant::from_micros(self.start.elapsed().as_micros() as i64);
        self.stack.poll(now, &mut self.card, &mut self.sockets);
        self.flush();
    }

    /// Sends what the stack has built.
    fn flush(&mut self) {
        while let Some(bytes) = self.card.to_send.pop_front() {
            if !send(&mut self.ring, &bytes) {
                self.card.to_send.push_front(bytes);
                break;
            }
        }
    }

    /// Sends frames as they are, as many as the ring takes.
    pub(crate) fn send_raw(&mut self, frame: &[u8], count: usize) {
        for _ in 0..count {
            self.card.to_send.push_back(frame.to_vec());
        }
        self.turn();
    }

    /// Takes turns until `done` returns something.
    pub(crate) fn until<T>(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Self) -> Option<T>,
    ) -> T {
        stage(what);
        let begin = Instant::now();
        loop {
            self.turn();
            if let Some(result) = done(self) {
                // What the last step has built goes out.
                self.turn();
                return result;
            }
            assert!(begin.elapsed() < LONG, "it never happened: {what}");
            self.ring.wait(1, Some(Duration::from_millis(2)));
        }
    }

    /// Begins a connection of TCP.
    pub(crate) fn connect(&mut self, to: impl Into<SocketAddr>, from: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_535]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.connect(self.stack.context(), to.into(), from).expect("a socket that connects");
        self.sockets.add(socket)
    }

    /// Listens at a port of TCP.
    pub(crate) fn listen(&mut self, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_535]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.listen(port).expect("a socket that listens");
        self.sockets.add(socket)
    }

    pub(crate) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Opens a port of UDP.
    pub(crate) fn udp_at(&mut self, port: u16) -> SocketHandle {
        let buffer =
            || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 32 * 1024]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).expect("a port");
        self.sockets.add(socket)
    }

    pub(crate) fn udp(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Closes a socket.
    pub(crate) fn close(&mut self, handle: SocketHandle) {
        self.sockets.remove(handle);
    }

    /// Opens a socket for pings with an identifier.
    pub(crate) fn ping(&mut self, ident: u16) -> SocketHandle {
        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(ident)).expect("an identifier");
        self.sockets.add(socket)
    }

    pub(crate) fn icmp(&mut self, handle: SocketHandle) -> &mut icmp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Reads what a connection has until it ends, and returns it.
    pub(crate) fn read_to_end(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut all = Vec::new();
        self.until("the end of a connection", |guest| {
            let socket = guest.tcp(handle);
            while socket.can_recv() {
                let _ = socket.recv(|bytes| {
                    all.extend_from_slice(bytes);
                    (bytes.len(), ())
                });
            }
            (!socket.may_recv() && socket.state() != tcp::State::SynSent).then_some(())
        });
        all
    }

    /// Sends all bytes on a connection.
    pub(crate) fn write_all(&mut self, handle: SocketHandle, bytes: &[u8]) {
        let mut sent = 0;
        self.until("all bytes on their way", |guest| {
            if sent < bytes.len() {
                let socket = guest.tcp(handle);
                if socket.can_send() {
                    sent += socket.send_slice(&bytes[sent..]).expect("an open connection");
                }
            }
            (sent == bytes.len()).then_some(())
        });
    }

    pub(crate) fn drops(&self, reason: &str) -> u64 {
        let drops = self.interface.drops();
        drops.iter().find(|(name, _)| *name == reason).expect("a reason of the device").1
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        let counters = self.interface.counters();
        counters.iter().find(|(other, _)| *other == name).map_or(0, |(_, value)| *value)
    }
}

impl Guest {
    pub(crate) fn mac(&self) -> [u8; 6] {
        self.interface.mac().into_array()
    }

    /// Asks for the gateway's MAC address in the name of an address, which the network learns by that.
    pub(crate) fn ask_for_gateway(&mut self, source: Ipv4Addr) -> [u8; 6] {
        let gateway = self.interface.info().ipv4.expect("addresses").start;
        let mut frame = Vec::from([0xff; 6]);
        frame.extend(self.mac());
        // RFC 826: Ethernet, IPv4, their lengths, a request.
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(self.mac());
        frame.extend(source.octets());
        frame.extend([0; 6]);
        frame.extend(gateway.octets());
        frame.resize(60, 0);
        self.send_raw(&frame, 1);
        let start = Instant::now();
        loop {
            let mut gateway = None;
            for frame in received(&mut self.ring) {
                if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                    gateway = Some(frame[22..28].try_into().expect("six bytes"));
                } else {
                    self.card.received.push_back(frame);
                }
            }
            if let Some(gateway) = gateway {
                return gateway;
            }
            assert!(start.elapsed() < LONG, "the gateway does not answer");
            self.ring.wait(1, Some(Duration::from_millis(2)));
        }
    }
}

/// A frame with a datagram of UDP, over the IP of its addresses.
pub(crate) fn datagram<A: Into<IpAddress>>(
    (from_mac, to_mac): ([u8; 6], [u8; 6]),
    (from, to): (A, A),
    port: u16,
) -> Vec<u8> {
    let (from, to, payload) = (from.into(), to.into(), [0x5a; 18]);
    let udp = UdpRepr { src_port: 4000, dst_port: port };
    let ip = IpRepr::new(from, to, IpProtocol::Udp, udp.header_len() + payload.len(), 64);
    let mut frame = [to_mac, from_mac].concat();
    frame.extend(match ip {
        IpRepr::Ipv4(_) => [8, 0],
        IpRepr::Ipv6(_) => [0x86, 0xdd],
    });
    let header_len = frame.len() + ip.header_len();
    frame.resize(frame.len() + ip.buffer_len(), 0);
    let checksums = ChecksumCapabilities::default();
    ip.emit(&mut frame[14..], &checksums);
    let mut datagram = UdpPacket::new_unchecked(&mut frame[header_len..]);
    let fill = |bytes: &mut [u8]| bytes.copy_from_slice(&payload);
    udp.emit(&mut datagram, &from, &to, payload.len(), fill, &checksums);
    frame
}
