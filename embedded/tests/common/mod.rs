//! Frames and ports for the tests of the network and its gateway.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use core::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use macaddr::MacAddr6;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;
use vmring_embedded::{Network, PortConfig, Receiver, Sender};

pub type Buffer = Vec<u8>;

pub const SHARED: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);

pub fn eth(mac: MacAddr6) -> EthernetAddress {
    EthernetAddress(mac.into_array())
}

pub struct Guest {
    pub receiver: Receiver<Buffer>,
    pub sender: Sender<Buffer>,
    pub mac: MacAddr6,
    pub wakes: Arc<AtomicUsize>,
    /// The bytes of a buffer that it posts.
    pub size: usize,
}

/// The default settings of a guest.
pub fn config(id: u64) -> PortConfig {
    let mut interface_id = [0; 16];
    interface_id[..8].copy_from_slice(&id.to_le_bytes());
    PortConfig::new(interface_id, Arc::new(|| {}))
}

impl Guest {
    pub fn join(network: &Arc<Network<Buffer>>, id: u64) -> Self {
        Self::with(network, config(id))
    }

    pub fn isolated(network: &Arc<Network<Buffer>>, id: u64) -> Self {
        Self::with(network, PortConfig { isolated: true, ..config(id) })
    }

    pub fn with(network: &Arc<Network<Buffer>>, config: PortConfig) -> Self {
        let wakes = Arc::new(AtomicUsize::new(0));
        let count = wakes.clone();
        let wake = Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let port = network.join(PortConfig { wake, ..config }).unwrap();
        let mac = port.mac();
        let header = if port.offloads().virtio_header { 12 } else { 0 };
        let size = header + port.max_packet_size();
        let (receiver, sender) = port.split();
        let mut guest = Self { receiver, sender, mac, wakes, size };
        guest.post(8);
        guest
    }

    pub fn post(&mut self, count: usize) {
        for _ in 0..count {
            self.receiver.post(vec![0; self.size]).unwrap();
        }
    }

    /// Returns all packets that have arrived, and posts their buffers again.
    pub fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some((buffer, len)) = self.receiver.collect() {
            frames.push(buffer[..len].to_vec());
            self.receiver.post(buffer).unwrap();
        }
        frames
    }

    /// Sends one frame and returns what came back to this guest.
    pub fn ask(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        self.sender.send(frame);
        self.sender.flush();
        self.receive()
    }
}

/// A frame of a private Ethernet type.
pub fn data(to: MacAddr6, from: MacAddr6, payload: &[u8]) -> Vec<u8> {
    ethernet(eth(to), eth(from), EthernetProtocol::Unknown(0x88b5), payload)
}

pub fn ethernet(
    to: EthernetAddress,
    from: EthernetAddress,
    ethertype: EthernetProtocol,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = vec![0; 14 + payload.len()];
    let mut out = EthernetFrame::new_unchecked(&mut frame[..]);
    EthernetRepr { src_addr: from, dst_addr: to, ethertype }.emit(&mut out);
    out.payload_mut().copy_from_slice(payload);
    frame
}

pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, next_header: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let mut packet = vec![0; 20 + payload.len()];
    let mut out = Ipv4Packet::new_unchecked(&mut packet[..]);
    repr.emit(&mut out, &ChecksumCapabilities::default());
    out.payload_mut().copy_from_slice(payload);
    packet
}

pub fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 8 + payload.len()];
    UdpRepr { src_port: from.1, dst_port: to.1 }.emit(
        &mut UdpPacket::new_unchecked(&mut packet[..]),
        &from.0.into(),
        &to.0.into(),
        payload.len(),
        |out| out.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    ipv4(from.0, to.0, IpProtocol::Udp, &packet)
}

pub fn arp_request(from: MacAddr6, source: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let packet = arp(ArpOperation::Request, (from, source), (MacAddr6::nil(), target));
    ethernet(EthernetAddress::BROADCAST, eth(from), EthernetProtocol::Arp, &packet)
}

pub fn arp_reply(from: MacAddr6, source: Ipv4Addr, to: MacAddr6, target: Ipv4Addr) -> Vec<u8> {
    let packet = arp(ArpOperation::Reply, (from, source), (to, target));
    ethernet(eth(to), eth(from), EthernetProtocol::Arp, &packet)
}

fn arp(
    operation: ArpOperation,
    source: (MacAddr6, Ipv4Addr),
    target: (MacAddr6, Ipv4Addr),
) -> Vec<u8> {
    let repr = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: eth(source.0),
        source_protocol_addr: source.1,
        target_hardware_addr: eth(target.0),
        target_protocol_addr: target.1,
    };
    let mut packet = vec![0; repr.buffer_len()];
    repr.emit(&mut ArpPacket::new_unchecked(&mut packet));
    packet
}

pub fn ping(
    to: MacAddr6,
    from: MacAddr6,
    source: Ipv4Addr,
    target: Ipv4Addr,
    seq_no: u16,
    payload: &[u8],
) -> Vec<u8> {
    let repr = Icmpv4Repr::EchoRequest { ident: 0x1234, seq_no, data: payload };
    let mut packet = vec![0; repr.buffer_len()];
    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut packet[..]), &ChecksumCapabilities::default());
    let packet = ipv4(source, target, IpProtocol::Icmp, &packet);
    ethernet(eth(to), eth(from), EthernetProtocol::Ipv4, &packet)
}

/// A DHCP message of a client.
#[derive(Clone)]
pub struct Dhcp {
    pub kind: DhcpMessageType,
    pub mac: MacAddr6,
    pub source: Ipv4Addr,
    pub requested: Option<Ipv4Addr>,
    pub server: Option<Ipv4Addr>,
    pub broadcast: bool,
    /// What the client calls itself. Nothing is no option.
    pub name: &'static [u8],
}

impl Dhcp {
    pub fn new(kind: DhcpMessageType, mac: MacAddr6) -> Self {
        let source = Ipv4Addr::UNSPECIFIED;
        Self { kind, mac, source, requested: None, server: None, broadcast: false, name: b"" }
    }

    pub fn discover(mac: MacAddr6) -> Self {
        Self::new(DhcpMessageType::Discover, mac)
    }

    /// A request that accepts an offer.
    pub fn select(mac: MacAddr6, address: Ipv4Addr, server: Ipv4Addr) -> Self {
        let request = Self::new(DhcpMessageType::Request, mac);
        Self { requested: Some(address), server: Some(server), ..request }
    }

    pub fn requested(self, address: Ipv4Addr) -> Self {
        Self { requested: Some(address), ..self }
    }

    /// Makes it the message of a client that has an address.
    pub fn from(self, source: Ipv4Addr) -> Self {
        Self { source, ..self }
    }

    pub fn frame(&self) -> Vec<u8> {
        let name = [DhcpOption { kind: 12, data: self.name }];
        let repr = DhcpRepr {
            message_type: self.kind,
            transaction_id: 0xfeed_0001,
            secs: 3,
            client_hardware_address: eth(self.mac),
            client_ip: self.source,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: self.broadcast,
            requested_ip: self.requested,
            client_identifier: Some(eth(self.mac)),
            server_identifier: self.server,
            parameter_request_list: Some(&[1, 3, 6, 26]),
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: if self.name.is_empty() { &[] } else { &name },
        };
        let mut packet = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut packet[..])).unwrap();
        let to = (Ipv4Addr::BROADCAST, 67);
        let packet = udp((self.source, 68), to, &packet);
        let from = eth(self.mac);
        ethernet(EthernetAddress::BROADCAST, from, EthernetProtocol::Ipv4, &packet)
    }
}

/// A DHCP reply, parsed as a client does. Every length and checksum is verified.
#[derive(Debug)]
pub struct DhcpReply {
    pub kind: DhcpMessageType,
    pub address: Ipv4Addr,
    pub to_mac: EthernetAddress,
    pub to_ip: Ipv4Addr,
    pub mask: Option<Ipv4Addr>,
    pub router: Option<Ipv4Addr>,
    pub server: Option<Ipv4Addr>,
    pub lease: Option<u32>,
    pub renewal: Option<u32>,
    pub rebinding: Option<u32>,
    pub dns: Vec<Ipv4Addr>,
    pub mtu: Option<u16>,
    pub broadcast: Option<Ipv4Addr>,
    pub client_ip: Ipv4Addr,
}

pub fn dhcp_reply(frame: &[u8]) -> DhcpReply {
    let checksums = ChecksumCapabilities::default();
    let ethernet = EthernetFrame::new_checked(frame).unwrap();
    assert_eq!(ethernet.ethertype(), EthernetProtocol::Ipv4);
    let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
    let repr = Ipv4Repr::parse(&ip, &checksums).unwrap();
    let udp = UdpPacket::new_checked(ip.payload()).unwrap();
    assert_ne!(udp.checksum(), 0);
    let ports =
        UdpRepr::parse(&udp, &repr.src_addr.into(), &repr.dst_addr.into(), &checksums).unwrap();
    assert_eq!((ports.src_port, ports.dst_port), (67, 68));
    assert!(udp.payload().len() >= 300);
    let packet = DhcpPacket::new_checked(udp.payload()).unwrap();
    let mtu = packet
        .options()
        .find(|option| option.kind == 26)
        .map(|option| u16::from_be_bytes(option.data.try_into().unwrap()));
    let broadcast = packet
        .options()
        .find(|option| option.kind == 28)
        .map(|option| <[u8; 4]>::try_from(option.data).unwrap().into());
    let dhcp = DhcpRepr::parse(&packet).unwrap();
    assert_eq!((dhcp.transaction_id, dhcp.secs), (0xfeed_0001, 0));
    DhcpReply {
        kind: dhcp.message_type,
        address: dhcp.your_ip,
        to_mac: ethernet.dst_addr(),
        to_ip: repr.dst_addr,
        mask: dhcp.subnet_mask,
        router: dhcp.router,
        server: dhcp.server_identifier,
        lease: dhcp.lease_duration,
        renewal: dhcp.renew_duration,
        rebinding: dhcp.rebind_duration,
        dns: dhcp.dns_servers.map(|servers| servers.iter().copied().collect()).unwrap_or_default(),
        mtu,
        broadcast,
        client_ip: dhcp.client_ip,
    }
}
