//! Merging of arbitrary packets. Whatever is merged must be cut into the packets that came, byte for
//! byte and in their order; everything else must come out as it went in; and the packets of a flow must
//! stay in their order.
//!
//! Most packets are of one of four flows and follow each other: the target keeps account of what a flow
//! sends, and the fuzzer chooses what is different.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use smoltcp::wire::{IpAddress, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket};
use vmring::device::Offloads;
use vmring::software::{Merging, Outgoing, Segments};
use vmring::{Checksum, OFFLOAD_LEN, OffloadHeader};

const LONGEST: usize = 4000;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    flows: [Flow; 4],
    packets: Vec<Packet<'a>>,
    tcp_only: bool,
    longest: u16,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Flow {
    v4: bool,
    tcp: bool,
    tagged: bool,
    df: bool,
    option_words: u8,
    sequence: u32,
    ident: u16,
    len: u8,
}

#[derive(Arbitrary, Debug)]
enum Packet<'a> {
    Raw([u8; OFFLOAD_LEN], &'a [u8]),
    /// The next of a flow.
    Next(u8, Difference),
    /// The next of a flow, with bytes overwritten before the checksums are made, or after it.
    Spoilt {
        flow: u8,
        at: u8,
        byte: u8,
        before: bool,
    },
    Flush,
}

/// What is different about a packet of a flow.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Difference {
    Nothing,
    Len(u8),
    Flags(u16),
    Skip(u8),
    Ident(u8),
    Partial,
    Longer(u16),
}

impl Flow {
    /// Builds the next packet, which `change` may overwrite before the checksums are made.
    fn next(
        &mut self,
        port: u8,
        difference: Difference,
        change: impl FnOnce(&mut [u8]),
    ) -> (Vec<u8>, OffloadHeader) {
        let (mut len, mut flags, mut partial) = (usize::from(self.len), 0x10, false);
        match difference {
            Difference::Nothing => {}
            Difference::Len(other) => len = other.into(),
            Difference::Flags(bits) => flags ^= bits & 0x0fff,
            Difference::Skip(by) => self.sequence = self.sequence.wrapping_add(by.into()),
            Difference::Ident(by) => self.ident = self.ident.wrapping_add(by.into()),
            Difference::Partial => partial = true,
            Difference::Longer(other) => len = usize::from(other) % 1500,
        }
        let ip_at = if self.tagged { 18 } else { 14 };
        let at = ip_at + if self.v4 { 20 } else { 40 };
        let words = usize::from(self.option_words % 11);
        let header = if self.tcp { 20 + 4 * words } else { 8 };
        let mut packet = vec![2; at + header + len];
        if self.tagged {
            packet[12..16].copy_from_slice(&[0x81, 0, 0, 7]);
        }
        packet[ip_at - 2..ip_at].copy_from_slice(if self.v4 { &[8, 0] } else { &[0x86, 0xdd] });
        let protocol = if self.tcp { 6 } else { 17 };
        let (ip, datagram) = packet[ip_at..].split_at_mut(at - ip_at);
        if self.v4 {
            (ip[0], ip[1], ip[8], ip[9]) = (0x45, 0, 64, protocol);
            ip[2..4].copy_from_slice(&((20 + header + len) as u16).to_be_bytes());
            ip[4..6].copy_from_slice(&self.ident.to_be_bytes());
            (ip[6], ip[7]) = (if self.df { 0x40 } else { 0 }, 0);
        } else {
            (ip[0], ip[6], ip[7]) = (0x60, protocol, 64);
            ip[4..6].copy_from_slice(&((header + len) as u16).to_be_bytes());
        }
        datagram[..4].copy_from_slice(&[0xc0, port, 0, 80]);
        if self.tcp {
            datagram[4..8].copy_from_slice(&self.sequence.to_be_bytes());
            let word = ((5 + words) as u16) << 12 | flags;
            datagram[12..14].copy_from_slice(&word.to_be_bytes());
        } else {
            datagram[4..6].copy_from_slice(&((8 + len) as u16).to_be_bytes());
        }
        self.sequence = self.sequence.wrapping_add(len as u32);
        self.ident = self.ident.wrapping_add(1);
        change(&mut packet);
        let (ip, datagram) = packet[ip_at..].split_at_mut(at - ip_at);
        let addresses: [IpAddress; 2] = if self.v4 {
            let mut ip = Ipv4Packet::new_unchecked(ip);
            if ip.header_len() == 20 {
                ip.fill_checksum();
            }
            [ip.src_addr().into(), ip.dst_addr().into()]
        } else {
            let ip = Ipv6Packet::new_unchecked(&*ip);
            [ip.src_addr().into(), ip.dst_addr().into()]
        };
        let field = if self.tcp { 16 } else { 6 };
        let len = datagram.len();
        if self.tcp {
            if usize::from(datagram[12] >> 4) * 4 <= len {
                TcpPacket::new_unchecked(&mut *datagram)
                    .fill_checksum(&addresses[0], &addresses[1]);
            }
        } else if usize::from(u16::from_be_bytes([datagram[4], datagram[5]])) == len {
            UdpPacket::new_unchecked(&mut *datagram).fill_checksum(&addresses[0], &addresses[1]);
        }
        let mut checksum = Checksum::Complete;
        if partial {
            // The sum of the pseudo header is what the packet's own sum lacks.
            datagram[field..field + 2].fill(0);
            let [from, to] = addresses;
            let octets = |address: IpAddress| match address {
                IpAddress::Ipv4(address) => address.octets().to_vec(),
                IpAddress::Ipv6(address) => address.octets().to_vec(),
            };
            let pseudo =
                [octets(from), octets(to), vec![0, protocol], (len as u16).to_be_bytes().to_vec()];
            let pseudo = pseudo.concat();
            let mut sum: u32 =
                pseudo.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            datagram[field..field + 2].copy_from_slice(&(sum as u16).to_be_bytes());
            checksum = Checksum::Partial { start: at as u16, offset: field as u16 };
        }
        (packet, OffloadHeader { checksum, ..OffloadHeader::NONE })
    }
}

/// A packet that went in: its bytes, its header, and its flow, if it is known.
struct Sent {
    packet: Vec<u8>,
    header: OffloadHeader,
    flow: Option<u8>,
    came: bool,
}

/// Finds the packet among those that went in, behind `from`, and returns its place.
fn find(sent: &mut [Sent], from: usize, packet: &[u8], header: Option<OffloadHeader>) -> usize {
    let place = sent.iter().enumerate().skip(from).find(|(_, sent)| {
        !sent.came && sent.packet == packet && header.is_none_or(|header| header == sent.header)
    });
    let place = place.expect("what comes out went in").0;
    sent[place].came = true;
    place
}

fuzz_target!(|input: Input| {
    let mut flows = input.flows;
    let mut receiver = Offloads::ALL;
    receiver.uso = !input.tcp_only;
    let mut merging = Merging::new(&receiver, usize::from(input.longest));
    let mut sent: Vec<Sent> = Vec::new();
    let mut out: Vec<Outgoing<Vec<u8>>> = Vec::new();
    for packet in input.packets {
        let ((packet, header), flow) = match packet {
            Packet::Flush => {
                merging.flush(|packet| out.push(packet));
                continue;
            }
            Packet::Raw(raw, packet) => {
                let Ok(header) = OffloadHeader::parse_ignoring_reserved(&raw) else { continue };
                ((packet.to_vec(), header.for_sending()), None)
            }
            Packet::Next(number, difference) => {
                let number = number % 4;
                let built = flows[usize::from(number)].next(number, difference, |_| {});
                (built, Some(number))
            }
            Packet::Spoilt { flow, at, byte, before } => {
                let number = flow % 4;
                let spoil = |packet: &mut [u8]| {
                    if let Some(place) = packet.get_mut(usize::from(at)) {
                        *place = byte;
                    }
                };
                let flow = &mut flows[usize::from(number)];
                let (mut packet, header) = flow.next(number, Difference::Nothing, |packet| {
                    if before {
                        spoil(packet)
                    }
                });
                if !before {
                    spoil(&mut packet);
                }
                ((packet, header), None)
            }
        };
        if packet.len() > LONGEST {
            continue;
        }
        let mut buffer = Vec::with_capacity(LONGEST);
        buffer.extend_from_slice(&packet);
        sent.push(Sent { packet, header, flow, came: false });
        merging.push(buffer, &header, |packet| out.push(packet));
    }
    merging.flush(|packet| out.push(packet));

    let mut last = [None; 4];
    for packet in out {
        let mut places = Vec::new();
        if packet.packets == 1 {
            places.push(find(&mut sent, 0, &packet.buffer, Some(packet.header)));
        } else {
            let segments = Segments::new(&packet.header, &packet.buffer).expect("it can be cut");
            assert_eq!(segments.count(), packet.packets);
            let mut room = vec![0; segments.len_max()];
            // All are partial, or none is. The first is the earliest that has not come, since a flow
            // keeps its order.
            let place = |sent: &[Sent], first: &[u8], partial: bool| {
                sent.iter().position(|sent| {
                    let is_partial = matches!(sent.header.checksum, Checksum::Partial { .. });
                    !sent.came && sent.packet == first && is_partial == partial
                })
            };
            let len = segments.write(0, &mut room).expect("there is room");
            let complete = place(&sent, &room[..len], false);
            let len = segments.write_partial(0, &mut room).expect("there is room");
            let partial = place(&sent, &room[..len], true)
                .is_some_and(|partial| complete.is_none_or(|complete| partial < complete));
            let mut from = 0;
            for index in 0..segments.count() {
                let len = match partial {
                    true => segments.write_partial(index, &mut room),
                    false => segments.write(index, &mut room),
                };
                let place = find(&mut sent, from, &room[..len.expect("there is room")], None);
                places.push(place);
                from = place + 1;
            }
        }
        for place in places {
            if let Some(flow) = sent[place].flow {
                let last = &mut last[usize::from(flow)];
                assert!(last.is_none_or(|last| last < place), "the order of a flow");
                *last = Some(place);
            }
        }
    }
    assert!(sent.iter().all(|sent| sent.came), "nothing is lost");
});
