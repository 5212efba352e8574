//! Software offload of arbitrary bytes. The result is an error, or segments of at most the promised
//! length. smoltcp must find the checksums of each segment right, and no byte of the payload may be
//! lost.
//!
//! Most inputs are turned into a packet that can be segmented: the target sets the fields that have
//! to agree, and the fuzzer chooses the rest.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};
use vmring::software::{self, Segments};
use vmring::{Checksum, Gso, OFFLOAD_LEN, OffloadHeader};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    raw: [u8; OFFLOAD_LEN],
    lead: Option<Lead>,
    packet: &'a [u8],
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Lead {
    v4: bool,
    tcp: bool,
    words: u8,
    segment_size: u16,
}

impl Lead {
    /// Sets the fields that have to agree.
    fn follow(self, packet: &mut [u8]) -> Option<OffloadHeader> {
        let protocol = if self.tcp { 6 } else { 17 };
        let ip_len = packet.len().checked_sub(14)?;
        let transport = if self.v4 {
            let words = 5 + self.words % 11;
            let ip = packet.get_mut(14..34)?;
            (ip[0], ip[6], ip[7], ip[9]) = (0x40 | words, 0x40, 0, protocol);
            ip[2..4].copy_from_slice(&u16::try_from(ip_len).ok()?.to_be_bytes());
            packet[12..14].copy_from_slice(&[8, 0]);
            14 + 4 * usize::from(words)
        } else {
            let ip = packet.get_mut(14..54)?;
            (ip[0], ip[6]) = (0x60, protocol);
            ip[4..6].copy_from_slice(&u16::try_from(ip_len - 40).ok()?.to_be_bytes());
            packet[12..14].copy_from_slice(&[0x86, 0xdd]);
            54
        };
        let len = packet.len().checked_sub(transport)?;
        if self.tcp {
            *packet.get_mut(transport + 13)? &= !0x26;
        } else {
            let field = packet.get_mut(transport + 4..transport + 6)?;
            field.copy_from_slice(&u16::try_from(len).ok()?.to_be_bytes());
        }
        let gso = match (self.tcp, self.v4) {
            (false, _) => Gso::UdpL4,
            (true, true) => Gso::TcpV4,
            (true, false) => Gso::TcpV6,
        };
        let offset = if self.tcp { 16 } else { 6 };
        let checksum = Checksum::Partial { start: transport as u16, offset };
        let segment_size = self.segment_size.max(1);
        Some(OffloadHeader { checksum, gso, segment_size, ..OffloadHeader::NONE })
    }
}

fuzz_target!(|input: Input| {
    let mut packet = input.packet.to_vec();
    let led = input.lead.and_then(|lead| lead.follow(&mut packet));
    let parsed = OffloadHeader::parse_ignoring_reserved(&input.raw).ok();
    let Some(header) = led.or(parsed) else { return };
    let plain = OffloadHeader { gso: Gso::None, ..header };
    if let Ok(done) = software::complete_checksum(&plain, &mut packet.clone()) {
        assert!(done.is_plain());
    }
    let segments = match Segments::new(&header, &packet) {
        Ok(segments) => segments,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let mut room = vec![0; segments.len_max()];
    let mut payload = 0;
    for i in 0..segments.count() {
        let len = segments.write(i, &mut room).expect("there is room");
        let part = judge(&header, &room[..len]);
        assert!(part <= header.segment_size.into());
        let from = headers_of(&header, &packet) + payload;
        assert_eq!(room[len - part..len], packet[from..from + part]);
        payload += part;
        assert!(segments.write(i, &mut room[..len - 1]).is_err());
    }
    assert!(segments.write(segments.count(), &mut room).is_err());
    assert_eq!(payload, packet.len() - headers_of(&header, &packet));
});

/// The number of bytes in front of the payload.
fn headers_of(header: &OffloadHeader, packet: &[u8]) -> usize {
    let Checksum::Partial { start, .. } = header.checksum else { panic!("it could be cut") };
    let start = usize::from(start);
    start + if header.gso.is_tcp() { usize::from(packet[start + 12] >> 4) * 4 } else { 8 }
}

/// Checks the segment's checksums and returns the length of its payload.
fn judge(header: &OffloadHeader, segment: &[u8]) -> usize {
    let headers = headers_of(header, segment);
    let Checksum::Partial { start, .. } = header.checksum else { panic!("it could be cut") };
    let transport = &segment[usize::from(start)..];
    let frame = EthernetFrame::new_checked(segment).expect("Ethernet");
    // The property test covers packets with VLAN tags, and the last address if there are IPv6
    // extension headers.
    let addresses: [IpAddress; 2] = match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(frame.payload()).expect("IPv4");
            assert!(ip.verify_checksum());
            assert_eq!(usize::from(ip.total_len()), frame.payload().len());
            [ip.src_addr().into(), ip.dst_addr().into()]
        }
        EthernetProtocol::Ipv6 if start == 54 => {
            let ip = Ipv6Packet::new_checked(frame.payload()).expect("IPv6");
            assert_eq!(ip.total_len(), frame.payload().len());
            [ip.src_addr().into(), ip.dst_addr().into()]
        }
        _ => return segment.len() - headers,
    };
    if header.gso.is_tcp() {
        let tcp = TcpPacket::new_checked(transport).expect("TCP");
        assert!(tcp.verify_checksum(&addresses[0], &addresses[1]));
    } else {
        let udp = UdpPacket::new_checked(transport).expect("UDP");
        assert!(udp.verify_checksum(&addresses[0], &addresses[1]));
    }
    segment.len() - headers
}
