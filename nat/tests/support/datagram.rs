//! Datagrams of a guest, and those that it gets, put together from fragments and cut into datagrams as a
//! guest does.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv6Packet, IpAddress, IpProtocol, Ipv4Packet,
    Ipv6Packet, UdpPacket,
};
use vmring_core::offload::{Gso, OffloadHeader};
use vmring_embedded::software;
use vmring_nat::Link;

use super::port::{GATEWAY_MAC, GUEST_MAC};
use super::script::ip_frame;

/// A frame of a guest with a datagram of UDP.
pub(crate) fn udp_frame(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 8 + data.len()];
    let mut udp = UdpPacket::new_unchecked(&mut bytes);
    udp.set_src_port(from.port());
    udp.set_dst_port(to.port());
    udp.set_len(8 + data.len() as u16);
    udp.payload_mut().copy_from_slice(data);
    udp.fill_checksum(&from.ip().into(), &to.ip().into());
    ip_frame(from.ip(), to.ip(), IpProtocol::Udp, &bytes)
}

/// A frame of a guest with an echo request.
pub(crate) fn echo_request(from: IpAddr, to: IpAddr, id: u16, seq: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![if from.is_ipv4() { 8 } else { 128 }, 0, 0, 0];
    bytes.extend(id.to_be_bytes());
    bytes.extend(seq.to_be_bytes());
    bytes.extend(data);
    let protocol = match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            Icmpv6Packet::new_unchecked(&mut bytes).fill_checksum(&from, &to);
            IpProtocol::Icmpv6
        }
        _ => {
            Icmpv4Packet::new_unchecked(&mut bytes).fill_checksum();
            IpProtocol::Icmp
        }
    };
    ip_frame(from, to, protocol, &bytes)
}

/// What a guest has got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Got {
    Udp {
        from: SocketAddr,
        to: SocketAddr,
        data: Vec<u8>,
    },
    /// A message of ICMP or ICMPv6, with its type and code.
    Icmp {
        from: IpAddr,
        to: IpAddr,
        kind: u8,
        code: u8,
        message: Vec<u8>,
    },
}

/// A guest's receiving side.
#[derive(Debug, Default)]
pub(crate) struct Receiver {
    /// Fragments, by their identification and offset.
    fragments: BTreeMap<u32, BTreeMap<usize, (Vec<u8>, bool)>>,
    /// How many frames were fragments, and how many were to be cut.
    pub(crate) fragment_count: usize,
    pub(crate) cut_count: usize,
}

impl Receiver {
    /// Takes a frame, whose headers and checksums must be right, and returns what it completes.
    pub(crate) fn take(&mut self, frame: &[u8], header: &OffloadHeader, link: &Link) -> Vec<Got> {
        assert!(frame.len() >= 60, "a runt");
        if header.gso == Gso::None {
            assert!(frame.len() <= link.mtu as usize + 14, "a frame longer than the MTU");
            let mut frame = frame.to_vec();
            software::complete_checksum(header, &mut frame).expect("the header describes it");
            return self.take_whole(&frame).into_iter().collect();
        }
        assert!(link.offloads.uso && header.gso == Gso::UdpL4);
        header.validate(frame.len()).expect("the header describes the frame");
        self.cut_count += 1;
        let segments = software::Segments::new(header, frame).expect("a frame to be cut");
        let mut got = Vec::new();
        for index in 0..segments.count() {
            let mut out = vec![0; segments.len_max().max(60)];
            let len = segments.write(index, &mut out).unwrap();
            assert!(len <= link.mtu as usize + 14, "a datagram longer than the MTU");
            got.extend(self.take_whole(&out[..len]));
        }
        got
    }

    fn take_whole(&mut self, frame: &[u8]) -> Option<Got> {
        let ethernet = EthernetFrame::new_checked(frame).unwrap();
        assert_eq!(ethernet.src_addr().0, GATEWAY_MAC);
        assert_eq!(ethernet.dst_addr().0, GUEST_MAC);
        let (from, to, protocol, payload): (IpAddr, IpAddr, _, Vec<u8>);
        match ethernet.ethertype() {
            EthernetProtocol::Ipv4 => {
                let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
                assert!(ip.verify_checksum());
                (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
                protocol = ip.next_header();
                if ip.more_frags() || ip.frag_offset() > 0 {
                    let (id, at) = (ip.ident().into(), ip.frag_offset().into());
                    payload = self.put(id, at, ip.more_frags(), ip.payload())?;
                } else {
                    payload = ip.payload().to_vec();
                }
            }
            EthernetProtocol::Ipv6 => {
                let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
                (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
                if ip.next_header() == IpProtocol::Ipv6Frag {
                    let bytes = ip.payload();
                    protocol = bytes[0].into();
                    let field = u16::from_be_bytes([bytes[2], bytes[3]]);
                    let id = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
                    payload = self.put(id, (field & !7).into(), field & 1 > 0, &bytes[8..])?;
                } else {
                    protocol = ip.next_header();
                    payload = ip.payload().to_vec();
                }
            }
            other => panic!("a frame of type {other}"),
        }
        Some(match protocol {
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(&payload[..]).unwrap();
                assert_eq!(usize::from(udp.len()), payload.len());
                let (source, target) = (IpAddress::from(from), IpAddress::from(to));
                assert!(udp.checksum() != 0 && udp.verify_checksum(&source, &target));
                Got::Udp {
                    from: SocketAddr::new(from, udp.src_port()),
                    to: SocketAddr::new(to, udp.dst_port()),
                    data: udp.payload().to_vec(),
                }
            }
            IpProtocol::Icmp | IpProtocol::Icmpv6 => {
                match (from, to) {
                    (IpAddr::V6(from), IpAddr::V6(to)) => {
                        let icmp = Icmpv6Packet::new_checked(&payload[..]).unwrap();
                        assert!(icmp.verify_checksum(&from, &to));
                    }
                    _ => {
                        assert!(Icmpv4Packet::new_checked(&payload[..]).unwrap().verify_checksum())
                    }
                }
                Got::Icmp { from, to, kind: payload[0], code: payload[1], message: payload }
            }
            other => panic!("a packet of protocol {other}"),
        })
    }

    /// Adds a fragment, and returns the whole if it is complete.
    fn put(&mut self, id: u32, at: usize, more: bool, bytes: &[u8]) -> Option<Vec<u8>> {
        assert!(
            !more || bytes.len().is_multiple_of(8),
            "a fragment that is no multiple of 8 bytes"
        );
        self.fragment_count += 1;
        let parts = self.fragments.entry(id).or_default();
        parts.insert(at, (bytes.to_vec(), more));
        let mut whole = Vec::new();
        let mut ended = false;
        for (at, (bytes, more)) in parts.iter() {
            if *at != whole.len() {
                return None;
            }
            whole.extend(bytes);
            ended = !more;
        }
        if ended {
            self.fragments.remove(&id);
        }
        ended.then_some(whole)
    }
}
