//! The rules that the standards have for such a box, each with what this one does, and a check that
//! it does.
//!
//! Sources: RFC 1812 (routers) 4.2, 4.3, 5.2.4 and 5.3; RFC 1122 (hosts) 3.2 and 3.3; RFC 2131
//! (DHCP) 3 and 4 with tables 3 and 5; RFC 2132 (its options); RFC 3046 (relay agents); RFC 6842
//! (client identifiers); RFC 5227 (address conflicts); IEEE 802.1Q (bridges), 802.3 (frames).
#![cfg(not(loom))]

mod common;

use core::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use macaddr::MacAddr6;
use smoltcp::wire::*;
use vmring_embedded::clock::{Clock, ManualClock};
use vmring_embedded::dhcp::DhcpStats;
use vmring_embedded::gateway::GatewayStats;
use vmring_embedded::limits::{ICMP_ERRORS_AT_ONCE, ICMP_ERRORS_PER_SECOND, PROBE_TIME};
use vmring_embedded::{DropReason, Network, NetworkConfig, Sent};

/// A rule: where it is, what it says, what we do, and the check.
type Rule = (&'static str, &'static str, &'static str, fn(&mut Lab));

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// A network with two guests, the first of which has an address.
struct Lab {
    network: Arc<Network<Buffer>>,
    clock: Arc<ManualClock>,
    alice: Guest,
    bob: Guest,
    /// Alice's address.
    ip: Ipv4Addr,
    gateway: MacAddr6,
}

struct Time(Arc<ManualClock>);

impl Clock for Time {
    fn now(&self) -> Duration {
        self.0.now()
    }
}

impl Lab {
    fn new() -> Self {
        let clock = Arc::new(ManualClock::new());
        clock.advance(Duration::from_secs(1000));
        let config = NetworkConfig {
            dns: vec![Ipv4Addr::new(192, 168, 64, 53)],
            ..NetworkConfig::default()
        };
        let network = Network::with_clock(config, Box::new(Time(clock.clone()))).unwrap();
        let (alice, bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
        let (ip, gateway) = (Ipv4Addr::new(192, 168, 64, 10), network.gateway().unwrap().mac());
        Self { network, clock, alice, bob, ip, gateway }
    }

    fn stats(&self) -> GatewayStats {
        self.network.gateway().unwrap().stats()
    }

    fn dhcp_stats(&self) -> DhcpStats {
        self.network.gateway().unwrap().dhcp().stats()
    }

    /// What comes back to Alice for a frame.
    fn ask(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        self.alice.ask(frame)
    }

    fn silent(&mut self, frame: &[u8]) {
        assert_eq!(self.ask(frame), Vec::<Vec<u8>>::new());
    }

    /// An IPv4 packet of Alice's, in a frame to the gateway.
    fn packet(&self, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
        self.framed(&ipv4(self.ip, to, protocol, payload))
    }

    fn framed(&self, packet: &[u8]) -> Vec<u8> {
        ethernet(eth(self.gateway), eth(self.alice.mac), EthernetProtocol::Ipv4, packet)
    }

    fn udp(&self, to: Ipv4Addr) -> Vec<u8> {
        self.framed(&udp((self.ip, 4000), (to, 53), b"what is the time?"))
    }

    fn ping(&self, to: Ipv4Addr, data: &[u8]) -> Vec<u8> {
        ping(self.gateway, self.alice.mac, self.ip, to, 1, data)
    }

    fn tcp(&self, to: Ipv4Addr, change: fn(&mut TcpPacket<&mut [u8]>)) -> Vec<u8> {
        let mut bytes = vec![0; 23];
        let mut tcp = TcpPacket::new_unchecked(&mut bytes[..]);
        tcp.set_src_port(4000);
        tcp.set_dst_port(80);
        tcp.set_header_len(20);
        tcp.set_seq_number(TcpSeqNumber(1000));
        change(&mut tcp);
        tcp.fill_checksum(&self.ip.into(), &to.into());
        self.packet(to, IpProtocol::Tcp, &bytes)
    }

    /// The ICMP error that comes back for a frame: its type and code. Everything else that must be
    /// right in it is checked.
    fn error(&mut self, frame: &[u8]) -> (Icmpv4Message, u8) {
        let replies = self.ask(frame);
        let [reply] = &replies[..] else { panic!("{} replies", replies.len()) };
        let ethernet = EthernetFrame::new_checked(&reply[..]).unwrap();
        assert_eq!(ethernet.dst_addr(), eth(self.alice.mac));
        assert_eq!(ethernet.src_addr(), eth(self.gateway));
        let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
        assert!(ip.verify_checksum());
        assert_eq!((ip.src_addr(), ip.dst_addr(), ip.hop_limit()), (SHARED, self.ip, 64));
        assert_eq!(ip.dscp(), 48, "precedence 6");
        assert!(ip.total_len() <= 576);
        let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        assert!(icmp.verify_checksum());
        // It quotes as much as fits of the packet, without the frame's padding.
        let cause = Ipv4Packet::new_checked(&frame[14..]).unwrap();
        let whole = &frame[14..14 + usize::from(cause.total_len())];
        assert_eq!(ip.payload()[8..], whole[..whole.len().min(548)]);
        (icmp.msg_type(), icmp.msg_code())
    }

    /// Checks that no error comes back for a frame that would get one if it were not for `change`.
    fn no_error(&mut self, change: impl Fn(&mut Vec<u8>)) {
        let good = self.udp(SHARED);
        assert_eq!(self.error(&good), UNREACHABLE_PORT);
        let mut frame = good;
        change(&mut frame);
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.fill_checksum();
        // The UDP checksum is left out, which is allowed.
        frame[40..42].fill(0);
        self.silent(&frame);
    }

    fn dhcp(&mut self, message: &Dhcp) -> Vec<u8> {
        let replies = self.ask(&message.frame());
        replies.into_iter().find(|frame| frame.len() > 60).expect("a reply")
    }

    fn discover(&self) -> Dhcp {
        Dhcp::discover(self.alice.mac)
    }

    fn offered(&mut self) -> Ipv4Addr {
        let discover = self.discover();
        dhcp_reply(&self.dhcp(&discover)).address
    }
}

const UNREACHABLE_PORT: (Icmpv4Message, u8) = (Icmpv4Message::DstUnreachable, 3);

/// Sets options of a DHCP message, which replace those after the message type.
fn with_options(message: &Dhcp, options: &[u8]) -> Vec<u8> {
    let frame = message.frame();
    let mut payload = frame[42..42 + 240 + 3].to_vec();
    payload.extend(options);
    payload.push(255);
    let packet = udp((message.source, 68), (Ipv4Addr::BROADCAST, 67), &payload);
    ethernet(EthernetAddress::BROADCAST, eth(message.mac), EthernetProtocol::Ipv4, &packet)
}

/// Changes the fixed fields of a DHCP message.
fn with_field(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[42 + at..42 + at + bytes.len()].copy_from_slice(bytes);
    frame[40..42].fill(0); // no UDP checksum
    frame
}

/// The message of a DHCP frame, and its options in their order.
fn message(frame: &[u8]) -> (&[u8], Vec<(u8, Vec<u8>)>) {
    let message = &frame[42..];
    let packet = DhcpPacket::new_checked(message).unwrap();
    let options = packet.options().map(|option| (option.kind, option.data.to_vec())).collect();
    (message, options)
}

fn codes(frame: &[u8]) -> Vec<u8> {
    message(frame).1.into_iter().map(|(code, _)| code).collect()
}

const RULES: &[Rule] = &[
    // ---- IEEE 802.1Q and 802.3 ----
    (
        "802.1Q table 8-1",
        "a bridge does not forward to 01-80-C2-00-00-00 to -0F",
        "the frame is dropped and counted, and the next address is flooded",
        |lab| {
            for last in 0..=0x10 {
                let to = MacAddr6::new(1, 0x80, 0xc2, 0, 0, last);
                let sent = lab.alice.sender.send(&data(to, lab.alice.mac, b"LLDP"));
                let reserved = Sent::Dropped(DropReason::Reserved);
                let flooded = Sent::Flooded { reached: 1 };
                assert_eq!(sent, if last < 0x10 { reserved } else { flooded }, "{last:#x}");
            }
            lab.alice.sender.flush();
            assert_eq!(lab.alice.sender.stats().dropped_reserved, 16);
        },
    ),
    (
        "802.1Q 6.9",
        "a frame with a priority tag belongs to no VLAN",
        "the gateway reads it like one without a tag, and answers without a tag",
        |lab| {
            // The frame of a client in the field.
            let text = "ffffffffffff02000000000a8100a0000806000108000604000102000000000ac0a8400a\
                        000000000000c0a84001";
            let frame = bytes_of(text);
            let replies = lab.ask(&frame);
            assert_eq!(replies.len(), 1);
            assert_eq!(replies[0][12..14], [8, 6]);
            let (ip, mac) = (lab.ip, lab.alice.mac);
            for mut frame in
                [lab.ping(SHARED, b"tagged"), lab.discover().frame(), arp_request(mac, ip, SHARED)]
            {
                frame.splice(12..12, [0x81, 0x00, 0xe0, 0x00]);
                assert!(!lab.ask(&frame).is_empty());
            }
        },
    ),
    (
        "802.1Q 6.9",
        "a frame with a VLAN's number belongs to that VLAN",
        "the gateway is in no VLAN: it counts the frame and does not answer",
        |lab| {
            for tag in [[0x81, 0x00, 0x00, 0x01], [0x81, 0x00, 0xef, 0xff], [0x88, 0xa8, 0, 0]] {
                let mut frame = lab.ping(SHARED, b"");
                frame.splice(12..12, tag);
                lab.silent(&frame);
            }
            assert_eq!(lab.stats().vlan, 3);
        },
    ),
    (
        "802.1Q 6.9",
        "a bridge without VLANs forwards tagged frames unchanged",
        "a tag is a part of the frame; one of 1,518 bytes passes at an MTU of 1,500",
        |lab| {
            let mut frame = data(lab.bob.mac, lab.alice.mac, &vec![3; 1500]);
            frame.splice(12..12, [0x81, 0x00, 0x00, 0x07]);
            assert_eq!(lab.alice.sender.send(&frame), Sent::Forwarded);
            lab.alice.sender.flush();
            assert_eq!(lab.bob.receive(), [frame]);
        },
    ),
    (
        "802.3 3.2.8",
        "the sender of a frame pads it to 60 bytes",
        "the gateway pads its own frames; those of guests are forwarded as they are",
        |lab| {
            let (mac, ip) = (lab.alice.mac, lab.ip);
            for frame in [arp_request(mac, ip, SHARED), lab.ping(SHARED, b"x")] {
                let replies = lab.ask(&frame);
                assert_eq!(replies[0].len(), 60);
                let used = if replies[0][13] == 6 { 42 } else { 43 };
                assert!(replies[0][used..].iter().all(|byte| *byte == 0));
            }
            let reset = lab.tcp(SHARED, |tcp| tcp.set_syn(true));
            assert_eq!(lab.ask(&reset)[0].len(), 60);
            let runt = data(lab.bob.mac, lab.alice.mac, b"");
            lab.ask(&runt);
            lab.bob.receive();
            lab.ask(&runt);
            assert_eq!(lab.bob.receive(), [runt]);
        },
    ),
    (
        "802.3 3.2.8",
        "a receiver ignores the padding",
        "a padded ARP request, ping and segment are read by their own lengths",
        |lab| {
            let (mac, ip) = (lab.alice.mac, lab.ip);
            for mut frame in [
                arp_request(mac, ip, SHARED),
                lab.ping(SHARED, b"x"),
                lab.tcp(SHARED, |tcp| tcp.set_syn(true)),
            ] {
                let plain = lab.ask(&frame);
                frame.resize(60, 0xee);
                assert_eq!(lab.ask(&frame), plain);
            }
        },
    ),
    // ---- ARP ----
    (
        "RFC 826, RFC 5227 2.1.1",
        "a probe for one's own address is answered",
        "the gateway answers it, so that no guest takes its address",
        |lab| {
            let mac = lab.alice.mac;
            assert_eq!(lab.ask(&arp_request(mac, Ipv4Addr::UNSPECIFIED, SHARED)).len(), 1);
        },
    ),
    (
        "RFC 5227 2.4",
        "a claim of one's own address is a conflict",
        "it is counted, and the request in it is answered",
        |lab| {
            let mac = lab.alice.mac;
            assert_eq!(lab.ask(&arp_request(mac, SHARED, SHARED)).len(), 1);
            lab.silent(&arp_reply(mac, SHARED, lab.gateway, SHARED));
            assert_eq!((lab.stats().arp_conflicts, lab.stats().other_arp), (2, 1));
        },
    ),
    // ---- IPv4, the packet itself ----
    (
        "RFC 1812 4.2.2.3, 5.2.2; RFC 1122 3.2.1.1, 3.2.1.2",
        "a packet with a bad version, length or checksum is discarded silently",
        "it is counted as malformed",
        |lab| {
            let good = lab.udp(SHARED);
            for (at, byte) in [(14, 0x55), (14, 0x44), (17, 0xff), (24, 0xff), (14, 0x4f)] {
                let mut bad = good.clone();
                bad[at] = byte;
                lab.silent(&bad);
            }
            assert_eq!(lab.stats().malformed, 5);
        },
    ),
    (
        "RFC 1122 3.2.1.3; RFC 1812 4.2.2.11, 5.3.7",
        "a packet whose source is no host's address is discarded",
        "also one of another network: an answer would go astray",
        |lab| {
            let sources = [
                Ipv4Addr::UNSPECIFIED,
                Ipv4Addr::BROADCAST,
                Ipv4Addr::LOCALHOST,
                Ipv4Addr::new(224, 0, 0, 1),
                Ipv4Addr::new(240, 0, 0, 1),
                Ipv4Addr::new(192, 168, 64, 0),
                Ipv4Addr::new(192, 168, 64, 255),
                SHARED,
                OUTSIDE,
            ];
            for source in sources {
                lab.no_error(|frame| frame[26..30].copy_from_slice(&source.octets()));
            }
            assert_eq!(lab.stats().bad_source, sources.len() as u64);
        },
    ),
    (
        "RFC 1122 3.3.6; RFC 1812 5.3.4",
        "a packet to one host in a broadcast frame is discarded silently",
        "it is counted as a broadcast",
        |lab| {
            lab.no_error(|frame| frame[..6].fill(0xff));
            assert_eq!(lab.stats().broadcasts, 1);
        },
    ),
    (
        "RFC 1812 4.2.2.4, 4.3.2.7; RFC 1122 3.2.2",
        "no error answers a packet to a broadcast or multicast address",
        "it is counted as a broadcast",
        |lab| {
            let all = [
                Ipv4Addr::BROADCAST,
                Ipv4Addr::new(192, 168, 64, 255),
                Ipv4Addr::new(224, 0, 0, 251),
            ];
            for to in all {
                lab.no_error(|frame| frame[30..34].copy_from_slice(&to.octets()));
            }
            assert_eq!(lab.stats().broadcasts, 3);
        },
    ),
    (
        "RFC 1812 4.2.2.1; RFC 1122 3.2.1.8",
        "options that one does not know are passed over",
        "a ping with options is answered without them",
        |lab| {
            let mut frame = lab.ping(SHARED, b"with options");
            frame.splice(34..34, [1, 1, 1, 0]);
            let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
            ip.set_header_len(24);
            ip.set_total_len(ip.total_len() + 4);
            ip.fill_checksum();
            assert_eq!(lab.ask(&frame)[0][14], 0x45);
        },
    ),
    (
        "RFC 1812 4.2.2.7, 4.2.2.8; RFC 1122 3.3.2",
        "a datagram in fragments to oneself is put together",
        "it is not; its first fragment is refused at once with \"reassembly time exceeded\", and the \
         others are counted",
        |lab| {
            let mut first = lab.ping(SHARED, &[7; 1400]);
            let mut ip = Ipv4Packet::new_unchecked(&mut first[14..]);
            ip.set_dont_frag(false);
            ip.set_more_frags(true);
            ip.fill_checksum();
            assert_eq!(lab.error(&first), (Icmpv4Message::TimeExceeded, 1));
            let mut ip = Ipv4Packet::new_unchecked(&mut first[14..]);
            ip.set_frag_offset(1400);
            ip.set_more_frags(false);
            ip.fill_checksum();
            lab.silent(&first);
            let stats = lab.stats();
            assert_eq!((stats.refused_fragments, stats.later_fragments), (1, 1));
        },
    ),
    // ---- ICMP ----
    (
        "RFC 1122 3.2.2.6; RFC 1812 4.3.3.6",
        "an echo request is answered with its own data and services",
        "so it is, up to the MTU",
        |lab| {
            let mut frame = lab.ping(SHARED, &[5; 1472]);
            let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
            ip.set_dscp(46);
            ip.fill_checksum();
            let reply = &lab.ask(&frame)[0];
            let ip = Ipv4Packet::new_checked(&reply[14..]).unwrap();
            assert_eq!((ip.dscp(), ip.src_addr(), ip.dst_addr()), (46, SHARED, lab.ip));
            assert!(ip.verify_checksum());
            assert_eq!(ip.payload()[8..], [5; 1472]);
        },
    ),
    (
        "RFC 1122 3.2.2.6",
        "an echo request to a broadcast address may be discarded",
        "it is counted as a broadcast",
        |lab| {
            let frame = lab.ping(Ipv4Addr::new(192, 168, 64, 255), b"anybody?");
            lab.silent(&frame);
            assert_eq!(lab.stats().broadcasts, 1);
        },
    ),
    (
        "RFC 1122 3.2.2; RFC 1812 4.3.2.1",
        "an ICMP message of an unknown type is discarded silently",
        "all but echo requests are counted as other ICMP; also timestamps, which are optional, and \
         router solicitations, since there is no way out",
        |lab| {
            for kind in [0, 3, 5, 10, 11, 13, 15, 17, 99] {
                let mut frame = lab.ping(SHARED, b"payload");
                frame[34] = kind;
                Icmpv4Packet::new_unchecked(&mut frame[34..]).fill_checksum();
                lab.silent(&frame);
            }
            assert_eq!(lab.stats().other_icmp, 9);
        },
    ),
    (
        "RFC 1812 4.3.3.1; RFC 1122 3.2.2.1",
        "a datagram to a port that nobody listens on gets \"port unreachable\"",
        "so it does, at once: nobody waits for a name server that is not there",
        |lab| {
            let frame = lab.udp(SHARED);
            assert_eq!(lab.error(&frame), UNREACHABLE_PORT);
            assert_eq!(lab.stats().refused_udp, 1);
        },
    ),
    (
        "RFC 1122 3.2.2.1, 3.3.1",
        "a protocol that one does not have gets \"protocol unreachable\"",
        "so it does",
        |lab| {
            let frame = lab.packet(SHARED, IpProtocol::Unknown(132), b"SCTP");
            assert_eq!(lab.error(&frame), (Icmpv4Message::DstUnreachable, 2));
            assert_eq!(lab.stats().refused_protocol, 1);
        },
    ),
    (
        "RFC 1812 5.2.7.1, 4.3.3.1",
        "a packet for which there is no route gets \"network unreachable\"",
        "so it does, since there is no way out; a neighbour behind the gateway is \"host \
         unreachable\"",
        |lab| {
            let frame = lab.tcp(OUTSIDE, |tcp| tcp.set_syn(true));
            assert_eq!(lab.error(&frame), (Icmpv4Message::DstUnreachable, 0));
            let frame = lab.udp(Ipv4Addr::new(192, 168, 64, 200));
            assert_eq!(lab.error(&frame), (Icmpv4Message::DstUnreachable, 1));
            assert_eq!(lab.stats().refused_route, 2);
        },
    ),
    (
        "RFC 1812 5.3.1",
        "a packet to oneself is not discarded because of its time to live",
        "one with a time to live of 1 is answered",
        |lab| {
            let mut frame = lab.ping(SHARED, b"one hop");
            let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
            ip.set_hop_limit(1);
            ip.fill_checksum();
            assert_eq!(lab.ask(&frame).len(), 1);
        },
    ),
    (
        "RFC 1812 5.2.4, 4.2.2.11",
        "a packet is for oneself if its destination is one's address or a broadcast",
        "the gateway's address and both kinds of broadcast reach the DHCP server",
        |lab| {
            let payload = lab.discover().frame()[42..].to_vec();
            let all = [Ipv4Addr::BROADCAST, Ipv4Addr::new(192, 168, 64, 255), SHARED];
            for to in all {
                let packet = udp((Ipv4Addr::UNSPECIFIED, 68), (to, 67), &payload);
                assert!(!lab.ask(&lab.framed(&packet)).is_empty(), "{to}");
            }
            assert_eq!(lab.dhcp_stats().offers, 3);
        },
    ),
    (
        "RFC 1812 4.3.2.7; RFC 1122 3.2.2",
        "no error answers an ICMP error",
        "it is counted as other ICMP; an echo request is no error",
        |lab| {
            let mut frame = lab.ping(OUTSIDE, b"payload");
            assert_eq!(lab.error(&frame), (Icmpv4Message::DstUnreachable, 0));
            for kind in [3, 4, 5, 11, 12] {
                frame[34] = kind;
                Icmpv4Packet::new_unchecked(&mut frame[34..]).fill_checksum();
                lab.silent(&frame);
            }
            assert_eq!(lab.stats().other_icmp, 5);
        },
    ),
    (
        "RFC 1812 4.3.2.7; RFC 1122 3.2.2",
        "no error answers a later fragment",
        "it is counted",
        |lab| {
            lab.no_error(|frame| frame[20..22].copy_from_slice(&[0x00, 0x10]));
            assert_eq!(lab.stats().later_fragments, 1);
        },
    ),
    (
        "RFC 1812 4.3.2.8",
        "the rate of errors is limited",
        "each port gets 50 at once and 100 per second, and no port costs another its own",
        |lab| {
            let frame = lab.udp(SHARED);
            let sent = |lab: &mut Lab, count: u32| {
                (0..count).filter(|_| !lab.ask(&frame).is_empty()).count() as u32
            };
            assert_eq!(sent(lab, 500), ICMP_ERRORS_AT_ONCE);
            assert_eq!(lab.stats().errors_limited, u64::from(500 - ICMP_ERRORS_AT_ONCE));
            let mut of_bob = frame.clone();
            of_bob[6..12].copy_from_slice(lab.bob.mac.as_bytes());
            assert_eq!(lab.bob.ask(&of_bob).len(), 1);
            lab.clock.advance(Duration::from_millis(200));
            assert_eq!(sent(lab, 500), ICMP_ERRORS_PER_SECOND / 5);
            // A ping is no error, and is answered always.
            let ping = lab.ping(SHARED, b"");
            assert_eq!(lab.ask(&ping).len(), 1);
        },
    ),
    (
        "RFC 1122 4.1.3.4, 4.2.2.7",
        "a datagram or segment with a bad checksum is discarded silently",
        "it is counted as malformed",
        |lab| {
            for mut frame in [lab.udp(SHARED), lab.tcp(SHARED, |tcp| tcp.set_syn(true))] {
                frame[38] ^= 1;
                lab.silent(&frame);
            }
            assert_eq!(lab.stats().malformed, 2);
        },
    ),
    (
        "RFC 9293 3.10.7.1; RFC 1122 4.2.2",
        "a segment to a port that nobody listens on is reset, and a reset is not",
        "so it is, at once",
        |lab| {
            let reset = |lab: &mut Lab, frame: &[u8]| {
                let replies = lab.ask(frame);
                let ip = Ipv4Packet::new_checked(&replies[0][14..]).unwrap();
                assert_eq!((ip.src_addr(), ip.dst_addr()), (SHARED, lab.ip));
                let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
                assert!(tcp.verify_checksum(&SHARED.into(), &lab.ip.into()));
                assert_eq!((tcp.src_port(), tcp.dst_port()), (80, 4000));
                assert!(tcp.rst() && !tcp.syn());
                (tcp.seq_number().0, tcp.ack().then(|| tcp.ack_number().0))
            };
            // Three bytes of data, and the SYN.
            let syn = lab.tcp(SHARED, |tcp| tcp.set_syn(true));
            assert_eq!(reset(lab, &syn), (0, Some(1004)));
            let late = lab.tcp(SHARED, |tcp| {
                tcp.set_ack(true);
                tcp.set_ack_number(TcpSeqNumber(77));
            });
            assert_eq!(reset(lab, &late), (77, None));
            let rst = lab.tcp(SHARED, |tcp| tcp.set_rst(true));
            lab.silent(&rst);
            assert_eq!((lab.stats().refused_tcp, lab.stats().resets), (2, 1));
        },
    ),
    (
        "none",
        "an EtherType that one does not know is discarded",
        "it is counted; there is no IPv6",
        |lab| {
            let frame = data(lab.gateway, lab.alice.mac, b"what is this?");
            lab.silent(&frame);
            assert_eq!(lab.stats().other_ethertype, 1);
        },
    ),
    // ---- DHCP ----
    (
        "RFC 2131 table 3",
        "the fields of an offer, an acknowledgement and a refusal",
        "op 2, hops 0 and secs 0; xid, flags, giaddr and chaddr come from the client; siaddr, sname \
         and file are empty, since there is nothing to boot from",
        |lab| {
            let discover = Dhcp { broadcast: true, ..lab.discover() };
            let offer = lab.dhcp(&discover);
            let its = dhcp_reply(&offer).address;
            let select =
                |address| Dhcp { broadcast: true, ..Dhcp::select(discover.mac, address, SHARED) };
            let nak = lab.dhcp(&select(Ipv4Addr::new(192, 168, 64, 3)));
            let ack = lab.dhcp(&select(its));
            let renewal = Dhcp::new(DhcpMessageType::Request, discover.mac).from(its);
            let renewed = lab.dhcp(&renewal);
            let none = Ipv4Addr::UNSPECIFIED;
            for (frame, client, your, flags) in [
                (&offer, none, its, 0x80),
                (&nak, none, none, 0x80),
                (&ack, none, its, 0x80),
                (&renewed, its, its, 0),
            ] {
                let (message, _) = message(frame);
                assert_eq!(message[..4], [2, 1, 6, 0], "op, htype, hlen, hops");
                assert_eq!(message[4..8], 0xfeed_0001u32.to_be_bytes(), "xid");
                assert_eq!(message[8..12], [0, 0, flags, 0], "secs, flags");
                assert_eq!(message[12..16], client.octets(), "ciaddr");
                assert_eq!(message[16..20], your.octets(), "yiaddr");
                assert_eq!(message[20..28], [0; 8], "siaddr, giaddr");
                assert_eq!(message[28..34], *discover.mac.as_bytes(), "chaddr");
                assert!(message[34..236].iter().all(|byte| *byte == 0), "sname, file");
            }
        },
    ),
    (
        "RFC 2131 table 3; RFC 2132 3.3",
        "the options of an offer and an acknowledgement, with the mask before the router",
        "those that a client asks for come first, in its order; the mask comes before the router",
        |lab| {
            let plain = with_options(&lab.discover(), &[]);
            let all = [53, 54, 51, 58, 59, 1, 3, 6, 28, 26];
            let frame = lab.ask(&plain).remove(0);
            assert_eq!(codes(&frame), all);
            // The request list of a client: router, mask, name servers, and one that we do not have.
            let asks = with_options(&lab.discover(), &[55, 4, 6, 3, 1, 12]);
            let frame = lab.ask(&asks).remove(0);
            assert_eq!(codes(&frame), [53, 54, 6, 1, 3, 51, 58, 59, 28, 26]);
            let twice = with_options(&lab.discover(), &[55, 3, 26, 26, 0]);
            let frame = lab.ask(&twice).remove(0);
            assert_eq!(codes(&frame), [53, 54, 26, 51, 58, 59, 1, 3, 6, 28]);
        },
    ),
    (
        "RFC 2131 table 3",
        "a refusal has the server, should have a message, and has no lease and no settings",
        "so it is; the message says why",
        |lab| {
            let select = Dhcp::select(lab.alice.mac, Ipv4Addr::new(10, 0, 0, 9), SHARED);
            let nak = lab.dhcp(&select);
            assert_eq!(codes(&nak), [53, 54, 61, 56]);
            let why = message(&nak).1.pop().unwrap().1;
            assert_eq!(why, b"the address is of another network");
        },
    ),
    (
        "RFC 2131 4.3.5",
        "an acknowledgement of an INFORM has no address and no times",
        "so it is",
        |lab| {
            let inform = Dhcp::new(DhcpMessageType::Inform, lab.alice.mac).from(lab.ip);
            let ack = lab.dhcp(&inform);
            assert_eq!(codes(&ack), [53, 54, 61, 1, 3, 6, 26, 28]);
            assert_eq!(message(&ack).0[16..20], [0; 4]);
        },
    ),
    (
        "RFC 6842 3",
        "a client identifier comes back unaltered in every reply",
        "so it does, of any length, and in none that had none",
        |lab| {
            let discover = lab.discover();
            let select = |address: Ipv4Addr| {
                let mut options = vec![50, 4];
                options.extend(address.octets());
                (Dhcp::new(DhcpMessageType::Request, discover.mac), options)
            };
            let its = lab.offered();
            for len in [0, 1, 2, 7, 19, 255] {
                let id: Vec<u8> = (0..len).map(|byte| byte as u8).collect();
                let option = [&[61, len as u8], &id[..]].concat();
                let (request, ask) = select(its);
                let (wrong, ask_wrong) = select(Ipv4Addr::new(10, 0, 0, 9));
                for (message_of, options) in
                    [(&discover, vec![]), (&request, ask), (&wrong, ask_wrong)]
                {
                    let frame = with_options(message_of, &[&options[..], &option[..]].concat());
                    let reply = lab.ask(&frame).into_iter().find(|reply| reply.len() > 60).unwrap();
                    let found = message(&reply).1.into_iter().find(|(code, _)| *code == 61);
                    assert_eq!(found, Some((61, id.clone())), "{len} bytes");
                }
            }
            let frame = with_options(&discover, &[]);
            assert!(!codes(&lab.ask(&frame)[0]).contains(&61));
        },
    ),
    (
        "RFC 2131 4.2",
        "a client identifier tells clients apart",
        "the MAC address does instead, so that a boot loader and the system it boots share an \
         address",
        |lab| {
            let its = lab.offered();
            for id in [[61, 2, 1, 1], [61, 2, 2, 2]] {
                let frame = with_options(&lab.discover(), &id);
                assert_eq!(dhcp_reply_of(&lab.ask(&frame)[0]).1, its);
            }
        },
    ),
    (
        "RFC 2131 2, 4.1; RFC 2132 9.10",
        "no message is longer than the client takes, which is 576 bytes at least",
        "what the client needs least is left out",
        |lab| {
            let id = [&[61, 255][..], &[7; 255]].concat();
            let frame = with_options(&lab.discover(), &id);
            let reply = lab.ask(&frame).remove(0);
            assert!(reply.len() <= 14 + 576, "{}", reply.len());
            assert_eq!(codes(&reply), [53, 54, 61, 51, 58, 59, 1, 3, 6, 26]);
            let more = [&id[..], &[57, 2, 5, 0xdc]].concat();
            let frame = with_options(&lab.discover(), &more);
            assert_eq!(codes(&lab.ask(&frame)[0]).len(), 11, "1,500 bytes are enough for all");
        },
    ),
    (
        "RFC 2131 4.1",
        "options may go on in the fields file and sname",
        "they are read there",
        |lab| {
            let its = lab.offered();
            let request = Dhcp::new(DhcpMessageType::Request, lab.alice.mac);
            let frame = with_options(&request, &[52, 1, 3]);
            let mut wanted = vec![50, 4];
            wanted.extend(its.octets());
            let frame = with_field(&frame, 108, &wanted);
            let frame = with_field(&frame, 44, &[61, 2, 9, 9, 255]);
            let reply = lab.ask(&frame).remove(0);
            assert_eq!(dhcp_reply_of(&reply), (5, its));
            assert!(message(&reply).1.contains(&(61, vec![9, 9])));
        },
    ),
    (
        "RFC 2131 3.1, 4.3.2",
        "a client that takes siaddr for the server's identity names 0.0.0.0",
        "it means the server whose offer it has, and gets its lease",
        |lab| {
            let its = lab.offered();
            let request = Dhcp::new(DhcpMessageType::Request, lab.alice.mac);
            let mut options = bytes_of("360400000000320400000000");
            options[8..12].copy_from_slice(&its.octets());
            let frame = with_options(&request, &options);
            assert_eq!(dhcp_reply_of(&lab.ask(&frame)[0]), (5, its));
        },
    ),
    (
        "RFC 2131 4.3.1",
        "a client gets its lease, or what it had, or what it asks for, or a new address",
        "in this order; what is new follows from its MAC address, and what is not its first choice \
         is probed before it is offered",
        |lab| {
            let wanted = Ipv4Addr::new(192, 168, 64, 99);
            let asks = lab.discover().requested(wanted);
            assert!(lab.ask(&asks.frame()).iter().all(|frame| frame.len() == 60));
            lab.clock.advance(PROBE_TIME);
            assert_eq!(dhcp_reply(&lab.dhcp(&asks)).address, wanted);
            let select = Dhcp::select(lab.alice.mac, wanted, SHARED);
            assert_eq!(dhcp_reply(&lab.dhcp(&select)).kind, DhcpMessageType::Ack);
            assert_eq!(lab.offered(), wanted);
            lab.ask(&Dhcp::new(DhcpMessageType::Release, lab.alice.mac).from(wanted).frame());
            assert_eq!(lab.offered(), wanted);
        },
    ),
    (
        "RFC 2131 3.1, 4.4.1",
        "a server should ask whether an address is in use before it offers it",
        "it asks by ARP: with the offer of a first choice, and before any other offer",
        |lab| {
            let frame = lab.discover().frame();
            let replies = lab.ask(&frame);
            let its = dhcp_reply(&replies[0]).address;
            let question = EthernetFrame::new_checked(&replies[1][..]).unwrap();
            let packet = ArpPacket::new_checked(question.payload()).unwrap();
            assert!(question.dst_addr().is_broadcast());
            assert_eq!(
                ArpRepr::parse(&packet).unwrap(),
                ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Request,
                    source_hardware_addr: eth(lab.gateway),
                    source_protocol_addr: SHARED,
                    target_hardware_addr: EthernetAddress([0; 6]),
                    target_protocol_addr: its,
                }
            );
        },
    ),
    (
        "RFC 2131 4.3.2",
        "INIT-REBOOT: silence if there is no record of the client",
        "it is refused instead: this server is the only one of its network, and the client need not \
         wait for another",
        |lab| {
            let reboot = Dhcp::new(DhcpMessageType::Request, lab.alice.mac);
            for address in [lab.ip, Ipv4Addr::new(10, 0, 2, 15)] {
                let nak = dhcp_reply(&lab.dhcp(&reboot.clone().requested(address)));
                assert_eq!(nak.kind, DhcpMessageType::Nak);
                assert!(nak.to_mac.is_broadcast() && nak.to_ip.is_broadcast());
            }
        },
    ),
    (
        "RFC 2131 4.3.2",
        "RENEWING and REBINDING: the lease is extended",
        "also without a record, if the address is free: the client uses it",
        |lab| {
            let renewal = Dhcp::new(DhcpMessageType::Request, lab.alice.mac).from(lab.ip);
            let ack = dhcp_reply(&lab.dhcp(&renewal));
            assert_eq!((ack.kind, ack.address, ack.to_ip), (DhcpMessageType::Ack, lab.ip, lab.ip));
        },
    ),
    (
        "RFC 2131 table 5",
        "a request names an address in option 50 or in ciaddr",
        "one that does not is counted as malformed",
        |lab| {
            let frame = Dhcp::new(DhcpMessageType::Request, lab.alice.mac).frame();
            lab.silent(&frame);
            assert_eq!(lab.dhcp_stats().malformed, 1);
        },
    ),
    (
        "RFC 2131 4.3.2, 4.3.4, table 5",
        "a message that names another server is not for us",
        "it is counted, and our offer ends",
        |lab| {
            lab.offered();
            let other = Ipv4Addr::new(192, 168, 64, 250);
            let frame = Dhcp::select(lab.alice.mac, lab.ip, other).frame();
            lab.silent(&frame);
            assert_eq!(lab.dhcp_stats().other_server, 1);
        },
    ),
    (
        "RFC 2131 4.3.3",
        "a declined address is in use",
        "it rests for an hour, also if it is reserved for the client",
        |lab| {
            let its = lab.offered();
            let decline = Dhcp::new(DhcpMessageType::Decline, lab.alice.mac).requested(its);
            lab.silent(&decline.frame());
            assert_eq!(lab.dhcp_stats().declines, 1);
            let frame = lab.discover().frame();
            assert!(lab.ask(&frame).iter().all(|frame| frame.len() == 60));
            lab.clock.advance(PROBE_TIME);
            assert_ne!(lab.offered(), its);
        },
    ),
    (
        "RFC 2131 4.1",
        "a reply goes to giaddr, or to ciaddr, or to all if the client asks for it, or to yiaddr",
        "so it does; a refusal goes to all",
        |lab| {
            let its = lab.offered();
            let at = |reply: &DhcpReply| (reply.to_mac, reply.to_ip);
            let offer = dhcp_reply(&lab.dhcp(&lab.discover()));
            assert_eq!(at(&offer), (eth(lab.alice.mac), its));
            let all = Dhcp { broadcast: true, ..lab.discover() };
            let offer = dhcp_reply(&lab.dhcp(&all));
            assert_eq!(at(&offer), (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST));
        },
    ),
    (
        "RFC 2131 2, 4.1",
        "chaddr is the client, whatever frame brings the message",
        "it is served; nobody but who got a lease releases or declines it",
        |lab| {
            // nmap's DISCOVER has this address in a frame of the interface's own.
            let nmap = MacAddr6::new(0xde, 0xad, 0xc0, 0xde, 0xca, 0xfe);
            let mut frame = Dhcp::discover(nmap).frame();
            frame[6..12].copy_from_slice(lab.alice.mac.as_bytes());
            let reply = dhcp_reply(&lab.ask(&frame)[0]);
            assert_eq!((reply.kind, reply.to_mac), (DhcpMessageType::Offer, eth(nmap)));
            let release = Dhcp::new(DhcpMessageType::Release, nmap).from(reply.address);
            let mut frame = release.frame();
            frame[6..12].copy_from_slice(lab.bob.mac.as_bytes());
            lab.bob.receive();
            assert!(lab.bob.ask(&frame).is_empty());
            assert_eq!((lab.dhcp_stats().foreign, lab.dhcp_stats().releases), (1, 0));
        },
    ),
    (
        "RFC 2131 4.1, 4.3.1, 4.3.2; RFC 3046 2.2",
        "a relay agent gets the reply at its own address, with its own information at the end",
        "one on our subnet does; a refusal asks it to broadcast",
        |lab| {
            let relay = Ipv4Addr::new(192, 168, 64, 30);
            let client = MacAddr6::new(2, 0, 0, 7, 7, 7);
            let relayed = |lab: &Lab, message_of: &Dhcp, options: &[u8]| {
                let information = [options, &[82, 4, 1, 2, 9, 9][..]].concat();
                let frame = with_options(message_of, &information);
                let frame = with_field(&frame, 24, &relay.octets());
                let mut frame = with_field(&frame, 3, &[1]);
                frame[6..12].copy_from_slice(lab.alice.mac.as_bytes());
                frame
            };
            let frame = relayed(lab, &Dhcp::discover(client), &[]);
            let offer = lab.ask(&frame).remove(0);
            let request = Dhcp::new(DhcpMessageType::Request, client);
            let frame = relayed(lab, &request, &[50, 4, 10, 0, 0, 1]);
            let nak = lab.ask(&frame).remove(0);
            for (reply, flags) in [(&offer, 0), (&nak, 0x80)] {
                assert_eq!(reply[..6], *lab.alice.mac.as_bytes(), "to the relay agent");
                assert_eq!(reply[30..34], relay.octets());
                assert_eq!(reply[36..38], [0, 67]);
                let (message, options) = message(reply);
                assert_eq!((message[3], message[10]), (0, flags), "hops, flags");
                assert_eq!(message[24..28], relay.octets());
                assert_eq!(options.last(), Some(&(82, vec![1, 2, 9, 9])));
            }
            assert_eq!(dhcp_reply_of(&offer).0, 2);
            assert_eq!(dhcp_reply_of(&nak).0, 6);
        },
    ),
    (
        "RFC 2131 4.3.1",
        "a client behind a relay agent gets an address of the relay agent's network",
        "we have none of another network: the message is counted and not answered",
        |lab| {
            let frame = with_field(&lab.discover().frame(), 24, &[10, 9, 9, 1]);
            lab.silent(&frame);
            assert_eq!(lab.dhcp_stats().other_subnet, 1);
        },
    ),
    (
        "RFC 951; RFC 1534 2",
        "a server may answer BOOTP",
        "a message without a message type is counted as malformed",
        |lab| {
            let frame = with_field(&lab.discover().frame(), 240, &[0, 0, 0]);
            lab.silent(&frame);
            assert_eq!(lab.dhcp_stats().malformed, 1);
        },
    ),
    ("RFC 1542 2.1", "a message has 300 bytes at least", "so it has", |lab| {
        let frame = with_options(&lab.discover(), &[]);
        assert!(message(&lab.ask(&frame)[0]).0.len() >= 300);
        let inform = Dhcp::new(DhcpMessageType::Inform, lab.alice.mac).from(lab.ip);
        let frame = with_options(&inform, &[]);
        assert_eq!(message(&lab.ask(&frame)[0]).0.len(), 300);
    }),
];

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// The type of a DHCP reply, and the address in it.
fn dhcp_reply_of(frame: &[u8]) -> (u8, Ipv4Addr) {
    let (message, options) = message(frame);
    let kind = options.iter().find(|(code, _)| *code == 53).unwrap().1[0];
    (kind, Ipv4Addr::from(<[u8; 4]>::try_from(&message[16..20]).unwrap()))
}

#[test]
fn every_rule_is_kept_or_answered_for() {
    for (source, rule, does, check) in RULES {
        println!("{source}: {rule}: {does}");
        check(&mut Lab::new());
    }
}

/// Every frame that the gateway has seen is in one of its counters, and every DHCP message in one
/// of the server's.
#[test]
fn nothing_is_dropped_without_a_counter() {
    let mut lab = Lab::new();
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let its = lab.offered();
    let (mac, ip) = (lab.alice.mac, lab.ip);
    for kind in 1..=9 {
        let message = Dhcp::new(DhcpMessageType::from(kind), mac);
        for message in [message.clone(), message.clone().requested(its), message.from(its)] {
            frames.push(message.frame());
            frames.push(with_field(&message.frame(), 24, &[10, 0, 0, 1]));
            frames.push(with_field(&message.frame(), 28, &[2, 2, 2, 2, 2, 2]));
            frames.push(with_field(&message.frame(), 236, &[0]));
        }
    }
    for to in [SHARED, OUTSIDE, Ipv4Addr::BROADCAST, ip] {
        frames.push(lab.udp(to));
        frames.push(lab.ping(to, b"x"));
        frames.push(lab.tcp(to, |tcp| tcp.set_syn(true)));
    }
    frames.push(arp_request(mac, ip, SHARED));
    frames.push(arp_request(mac, ip, its));
    frames.push(data(MacAddr6::broadcast(), mac, b"?"));
    for mut frame in frames.clone() {
        frame.truncate(40);
        frames.push(frame);
    }
    let sum = |lab: &Lab| {
        let stats = lab.stats();
        let GatewayStats { arp_conflicts, .. } = stats;
        total(&format!("{stats:?}")) - arp_conflicts
    };
    let dhcp_sum = |lab: &Lab| {
        let stats = lab.dhcp_stats();
        total(&format!("{stats:?}")) - stats.conflicts - stats.bad_names
    };
    for frame in frames {
        let (before, before_dhcp) = (sum(&lab), dhcp_sum(&lab));
        let messages = lab.stats().dhcp_messages;
        lab.ask(&frame);
        assert_eq!(sum(&lab), before + 1, "{frame:02x?}");
        let message = lab.stats().dhcp_messages - messages;
        assert_eq!(dhcp_sum(&lab), before_dhcp + message, "{frame:02x?}");
    }
}

/// The sum of the numbers that a structure of counters prints.
fn total(debug: &str) -> u64 {
    let numbers = debug.split(|mark: char| !mark.is_ascii_digit());
    numbers.filter_map(|number| number.parse::<u64>().ok()).sum()
}
