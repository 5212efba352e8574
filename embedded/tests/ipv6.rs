//! Tests of the gateway over IPv6, frame by frame, and of a network that has one.
#![cfg(not(loom))]

mod common;

use core::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use macaddr::MacAddr6;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;
use vmring_embedded::clock::{Clock, ManualClock};
use vmring_embedded::dhcp::DhcpConfig;
use vmring_embedded::gateway::{Gateway, Ipv6Stats};
use vmring_embedded::limits::{
    ADVERTISEMENT_INTERVAL, ICMPV6_ERROR_MAX, ROUTER_LIFETIME, SOLICITATIONS_AT_ONCE,
};
use vmring_embedded::{
    Ipv6Config, Network, NetworkConfig, NetworkConfigError, NetworkMode, OpenError, PortConfig,
    Registry, Sent,
};

const GATEWAY_MAC: MacAddr6 = MacAddr6::new(2, 0, 0, 0, 0, 1);
const ALICE: MacAddr6 = MacAddr6::new(2, 0, 0, 0, 0, 0xa);
const NOW: Duration = Duration::from_secs(1000);

const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 1, 0, 0, 0, 0);
const GLOBAL: Ipv6Addr = Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 1, 0, 0, 0, 1);
const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 1);
const ALICE_GLOBAL: Ipv6Addr = Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 1, 0, 0xff, 0xfe00, 0xa);
const ALICE_LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 0xa);
const WORLD: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const NAMES: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53);
const NOBODY: Ipv6Addr = Ipv6Addr::UNSPECIFIED;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const DHCP_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

fn solicited(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | a & 0xff, b)
}

fn group_mac(group: Ipv6Addr) -> MacAddr6 {
    let [.., a, b, c, d] = group.octets();
    MacAddr6::new(0x33, 0x33, a, b, c, d)
}

fn gateway() -> Gateway {
    let dhcp = DhcpConfig {
        server: SHARED,
        server_mac: GATEWAY_MAC,
        first: [192, 168, 64, 2].into(),
        last: [192, 168, 64, 254].into(),
        mask: [255, 255, 255, 0].into(),
        router: Some(SHARED),
        dns: vec![],
        mtu: Some(1500),
        lease_time: Duration::from_secs(3600),
    };
    Gateway::new(dhcp).with_ipv6(Ipv6Config { dns: vec![NAMES, WORLD], ..Ipv6Config::new(PREFIX) })
}

fn ask_at(gateway: &Gateway, frame: &[u8], port: u32, now: Duration) -> Option<Vec<u8>> {
    let mut reply = vec![0xaa; 65_535];
    let len = gateway.handle(frame, port, &mut reply, now).reply?;
    reply.truncate(len);
    Some(reply)
}

fn ask(gateway: &Gateway, frame: &[u8]) -> Option<Vec<u8>> {
    ask_at(gateway, frame, 0, NOW)
}

/// A packet, with a hop limit.
fn packet_with(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x60, 0, 0, 0];
    bytes.extend((payload.len() as u16).to_be_bytes());
    bytes.extend([protocol, hops]);
    bytes.extend(from.octets());
    bytes.extend(to.octets());
    bytes.extend(payload);
    bytes
}

fn packet(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    packet_with(from, to, protocol, 64, payload)
}

/// A frame of Alice's with a packet, to the group or to the gateway.
fn framed_by(mac: MacAddr6, packet: &[u8]) -> Vec<u8> {
    let to = Ipv6Addr::from(<[u8; 16]>::try_from(&packet[24..40]).unwrap());
    let to = if to.is_multicast() { group_mac(to) } else { GATEWAY_MAC };
    ethernet(eth(to), eth(mac), EthernetProtocol::Ipv6, packet)
}

fn framed(packet: &[u8]) -> Vec<u8> {
    framed_by(ALICE, packet)
}

/// A message of ICMPv6 with its checksum.
fn icmp(from: Ipv6Addr, to: Ipv6Addr, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(body);
    Icmpv6Packet::new_unchecked(&mut message[..]).fill_checksum(&from, &to);
    message
}

fn neighbor(from: Ipv6Addr, to: Ipv6Addr, kind: u8, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let body = [&[0; 4][..], &target.octets(), options].concat();
    framed(&packet_with(from, to, 58, 255, &icmp(from, to, kind, 0, &body)))
}

fn solicit(from: Ipv6Addr, to: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let source = [1, 1, 2, 0, 0, 0, 0, 0xa];
    neighbor(from, to, 135, target, if from == NOBODY { &[] } else { &source })
}

fn router_solicit(from: Ipv6Addr) -> Vec<u8> {
    let message = icmp(from, ALL_ROUTERS, 133, 0, &[0; 4]);
    framed(&packet_with(from, ALL_ROUTERS, 58, 255, &message))
}

fn ping6(from: Ipv6Addr, to: Ipv6Addr, data: &[u8]) -> Vec<u8> {
    let body = [&[0x12, 0x34, 0, 7][..], data].concat();
    framed(&packet(from, to, 58, &icmp(from, to, 128, 0, &body)))
}

fn udp6(from: (Ipv6Addr, u16), to: (Ipv6Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 8 + payload.len()];
    let checksums = ChecksumCapabilities::default();
    UdpRepr { src_port: from.1, dst_port: to.1 }.emit(
        &mut UdpPacket::new_unchecked(&mut bytes[..]),
        &from.0.into(),
        &to.0.into(),
        payload.len(),
        |out| out.copy_from_slice(payload),
        &checksums,
    );
    packet(from.0, to.0, 17, &bytes)
}

/// What an answer is.
struct Answered<'a> {
    mac: MacAddr6,
    from: Ipv6Addr,
    to: Ipv6Addr,
    hops: u8,
    protocol: IpProtocol,
    class: u8,
    payload: &'a [u8],
}

/// Reads an answer, whose headers, padding and checksum must be right.
fn answer(frame: &[u8]) -> Answered<'_> {
    let ethernet = EthernetFrame::new_checked(frame).unwrap();
    assert_eq!(ethernet.ethertype(), EthernetProtocol::Ipv6);
    assert_eq!(ethernet.src_addr(), eth(GATEWAY_MAC));
    let ip = Ipv6Packet::new_checked(&frame[14..]).unwrap();
    assert_eq!(ip.version(), 6);
    let end = 14 + ip.total_len();
    assert_eq!(frame.len(), end.max(60), "the length of the frame");
    assert!(frame[end..].iter().all(|byte| *byte == 0), "the padding");
    let (from, to) = (ip.src_addr(), ip.dst_addr());
    let payload = &frame[54..end];
    match ip.next_header() {
        IpProtocol::Icmpv6 => {
            assert!(Icmpv6Packet::new_unchecked(payload).verify_checksum(&from, &to));
        }
        IpProtocol::Udp => {
            let udp = UdpPacket::new_checked(payload).unwrap();
            assert!(udp.checksum() != 0 && udp.verify_checksum(&from.into(), &to.into()));
        }
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(payload).unwrap();
            assert!(tcp.verify_checksum(&from.into(), &to.into()));
        }
        other => panic!("an answer of protocol {other}"),
    }
    Answered {
        mac: ethernet.dst_addr().0.into(),
        from,
        to,
        hops: ip.hop_limit(),
        protocol: ip.next_header(),
        class: ip.traffic_class(),
        payload,
    }
}

#[test]
fn solicitations_for_the_gateways_addresses_are_answered() {
    let gateway = gateway();
    assert_eq!(gateway.link_local(), Some(LINK_LOCAL));
    for target in [GLOBAL, LINK_LOCAL] {
        for (from, to) in [
            (ALICE_LINK, solicited(target)),
            (ALICE_GLOBAL, solicited(target)),
            (ALICE_GLOBAL, target),
        ] {
            let reply = ask(&gateway, &solicit(from, to, target)).expect("an answer");
            let got = answer(&reply);
            assert_eq!((got.mac, got.from, got.to, got.hops), (ALICE, target, from, 255));
            assert_eq!(got.payload[..2], [136, 0]);
            // The flags are router, solicited and override (RFC 4861, 4.4).
            assert_eq!(got.payload[4..8], [0xe0, 0, 0, 0]);
            assert_eq!(got.payload[8..24], target.octets());
            assert_eq!(got.payload[24..], [2, 1, 2, 0, 0, 0, 0, 1]);
        }
    }
    assert_eq!(ask(&gateway, &solicit(ALICE_LINK, solicited(GLOBAL), ALICE_GLOBAL)), None);
    let stats = gateway.stats().ipv6;
    assert_eq!((stats.neighbor_advertisements, stats.other_neighbors), (6, 1));
}

/// Goal: a guest that would take the gateway's address learns that it is in use (RFC 4862, 5.4).
#[test]
fn a_station_that_probes_a_gateways_address_is_told() {
    let gateway = gateway();
    for target in [GLOBAL, LINK_LOCAL] {
        let reply = ask(&gateway, &solicit(NOBODY, solicited(target), target)).expect("an answer");
        let got = answer(&reply);
        assert_eq!((got.mac, got.from, got.to), (group_mac(ALL_NODES), target, ALL_NODES));
        assert_eq!(got.payload[4], 0xa0, "router and override, and not solicited");
    }
    // These are a probe for another address, one to the wrong group, and one that names its sender.
    let other = solicited(ALICE_GLOBAL);
    assert_eq!(ask(&gateway, &solicit(NOBODY, other, ALICE_GLOBAL)), None);
    assert_eq!(ask(&gateway, &solicit(NOBODY, ALL_NODES, GLOBAL)), None);
    let named = neighbor(NOBODY, solicited(GLOBAL), 135, GLOBAL, &[1, 1, 2, 0, 0, 0, 0, 0xa]);
    assert_eq!(ask(&gateway, &named), None);
    assert_eq!(gateway.stats().ipv6.malformed, 2);
}

/// Goal: neighbour discovery that a router could have forwarded, or that is not well formed, is ignored
/// (RFC 4861, 6.1 and 7.1).
#[test]
fn invalid_neighbor_discovery_is_counted_and_not_answered() {
    let gateway = gateway();
    let to = solicited(GLOBAL);
    let body = [&[0; 4][..], &GLOBAL.octets()].concat();
    let good = icmp(ALICE_LINK, to, 135, 0, &body);
    assert!(ask(&gateway, &framed(&packet_with(ALICE_LINK, to, 58, 255, &good))).is_some());
    let far = packet_with(ALICE_LINK, to, 58, 254, &good);
    let code = packet_with(ALICE_LINK, to, 58, 255, &icmp(ALICE_LINK, to, 135, 1, &body));
    let cut = packet_with(ALICE_LINK, to, 58, 255, &icmp(ALICE_LINK, to, 135, 0, &body[..19]));
    let mut sum = packet_with(ALICE_LINK, to, 58, 255, &good);
    *sum.last_mut().unwrap() ^= 1;
    for packet in [&far, &code, &cut, &sum] {
        assert_eq!(ask(&gateway, &framed(packet)), None);
    }
    for options in [&[1, 0, 0, 0, 0, 0, 0, 0][..], &[1, 2, 0, 0, 0, 0, 0, 0], &[1]] {
        assert_eq!(ask(&gateway, &neighbor(ALICE_LINK, to, 135, GLOBAL, options)), None);
        assert_eq!(ask(&gateway, &neighbor(ALICE_LINK, to, 136, GLOBAL, options)), None);
    }
    let many = neighbor(ALICE_LINK, to, 135, "ff02::5".parse().unwrap(), &[]);
    assert_eq!(ask(&gateway, &many), None);
    let far = packet_with(
        ALICE_LINK,
        ALL_ROUTERS,
        58,
        64,
        &icmp(ALICE_LINK, ALL_ROUTERS, 133, 0, &[0; 4]),
    );
    assert_eq!(ask(&gateway, &framed(&far)), None);
    assert_eq!(gateway.stats().ipv6.malformed, 12);
}

/// What an advertisement says.
#[derive(Debug, PartialEq, Eq)]
struct Advertised {
    lifetime: u16,
    flags: u8,
    options: Vec<(u8, Vec<u8>)>,
}

fn advertised(payload: &[u8]) -> Advertised {
    assert_eq!(payload[..2], [134, 0]);
    let (mut options, mut rest) = (Vec::new(), &payload[16..]);
    while let [kind, units, ..] = *rest {
        let (option, after) = rest.split_at(usize::from(units) * 8);
        options.push((kind, option[2..].to_vec()));
        rest = after;
    }
    assert!(rest.is_empty());
    let lifetime = u16::from_be_bytes([payload[6], payload[7]]);
    Advertised { lifetime, flags: payload[5], options }
}

fn expected(is_router: bool) -> Advertised {
    let prefix = [&[64, 0xc0][..], &[0xff; 8], &[0; 4], &PREFIX.octets()].concat();
    let names = [&[0, 0][..], &[0xff; 4], &NAMES.octets(), &WORLD.octets()].concat();
    Advertised {
        lifetime: if is_router { ROUTER_LIFETIME } else { 0 },
        flags: 0x40, // other configuration, by DHCPv6
        options: vec![
            (1, vec![2, 0, 0, 0, 0, 1]),
            (5, [&[0, 0][..], &1500u32.to_be_bytes()].concat()),
            (3, prefix),
            (25, names),
        ],
    }
}

#[test]
fn a_router_solicitation_is_answered_to_who_asked() {
    let gateway = gateway();
    for (is_router, from) in [(false, ALICE_LINK), (true, ALICE_LINK), (true, NOBODY)] {
        gateway.set_ipv6_router(is_router);
        let reply = ask(&gateway, &router_solicit(from)).expect("an advertisement");
        let got = answer(&reply);
        let to = match from {
            NOBODY => (group_mac(ALL_NODES), ALL_NODES),
            from => (ALICE, from),
        };
        assert_eq!((got.mac, got.to, got.from, got.hops), (to.0, to.1, LINK_LOCAL, 255));
        assert_eq!(advertised(got.payload), expected(is_router));
    }
    assert!(!gateway.set_ipv6_router(true), "nothing has changed");
    assert!(gateway.set_ipv6_router(false));
}

#[test]
fn a_port_gets_few_answers_to_solicitations_at_once() {
    let gateway = gateway();
    let mut answers = 0;
    for _ in 0..200 {
        answers += u32::from(ask(&gateway, &router_solicit(ALICE_LINK)).is_some());
        answers += u32::from(ask(&gateway, &information_request(&[])).is_some());
    }
    assert_eq!(answers, SOLICITATIONS_AT_ONCE);
    let stats = gateway.stats().ipv6;
    assert_eq!(stats.solicitations_limited, 400 - u64::from(SOLICITATIONS_AT_ONCE));
    // Another port has its own, and a second later there are some again.
    assert!(ask_at(&gateway, &router_solicit(ALICE_LINK), 1, NOW).is_some());
    let later = NOW + Duration::from_secs(1);
    assert!(ask_at(&gateway, &router_solicit(ALICE_LINK), 0, later).is_some());
}

#[test]
fn pings_of_the_gateways_addresses_and_groups_come_back() {
    let gateway = gateway();
    for len in [0, 1, 56, 1452, 65_000] {
        let data: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
        for (from, to, by) in [
            (ALICE_GLOBAL, GLOBAL, GLOBAL),
            (ALICE_LINK, LINK_LOCAL, LINK_LOCAL),
            (ALICE_LINK, GLOBAL, GLOBAL),
            (ALICE_LINK, ALL_NODES, LINK_LOCAL),
            (ALICE_GLOBAL, ALL_ROUTERS, GLOBAL),
        ] {
            let mut request = ping6(from, to, &data);
            request[14..16].copy_from_slice(&[0x6b, 0x8f]); // class 0xb8: expedited forwarding, no ECN
            let reply = ask(&gateway, &request).expect("a reply");
            let got = answer(&reply);
            assert_eq!((got.mac, got.from, got.to, got.class), (ALICE, by, from, 0xb8));
            let head = [129, 0, got.payload[2], got.payload[3], 0x12, 0x34, 0, 7];
            assert!(got.payload == [&head[..], &data].concat());
        }
    }
    assert_eq!(gateway.stats().ipv6.echo_replies, 25);
    // The buffer is too short.
    let request = ping6(ALICE_GLOBAL, GLOBAL, &[0; 100]);
    assert_eq!(gateway.handle(&request, 0, &mut [0; 100], NOW).reply, None);
    assert_eq!(gateway.stats().ipv6.unsent, 1);
}

/// A DHCPv6 message of the type 11 (RFC 8415, 7.3).
fn dhcpv6(kind: u8, options: &[u8]) -> Vec<u8> {
    let message = [&[kind, 1, 2, 3][..], options].concat();
    framed(&udp6((ALICE_LINK, 546), (DHCP_SERVERS, 547), &message))
}

fn information_request(options: &[u8]) -> Vec<u8> {
    dhcpv6(11, options)
}

const CLIENT: [u8; 14] = [0, 1, 0, 10, 0, 3, 0, 1, 2, 0, 0, 0, 0, 0xa];
const SERVER: [u8; 14] = [0, 2, 0, 10, 0, 3, 0, 1, 2, 0, 0, 0, 0, 1];

/// Goal: a client of stateless DHCPv6 gets the name servers, in the form of RFC 8415, 18.3.6 and RFC
/// 3646.
#[test]
fn dhcpv6_tells_name_servers_and_nothing_else() {
    let gateway = gateway();
    let names = [&[0, 23, 0, 32][..], &NAMES.octets(), &WORLD.octets()].concat();
    let asks = |codes: &[u8]| [&[0, 6, 0, codes.len() as u8][..], codes].concat();
    let cases = [
        ([&CLIENT[..], &asks(&[0, 24, 0, 23])].concat(), [&SERVER[..], &CLIENT, &names].concat()),
        ([&CLIENT[..], &asks(&[0, 24])].concat(), [&SERVER[..], &CLIENT].concat()),
        ([&asks(&[0, 23])[..], &SERVER].concat(), [&SERVER[..], &names].concat()),
        (vec![], [&SERVER[..], &names].concat()),
        // Elapsed time and an unknown option are skipped.
        (vec![0, 8, 0, 2, 0, 9, 0xff, 0, 0, 0], [&SERVER[..], &names].concat()),
    ];
    for (options, told) in &cases {
        let reply = ask(&gateway, &information_request(options)).expect("a reply");
        let got = answer(&reply);
        assert_eq!((got.mac, got.from, got.to), (ALICE, LINK_LOCAL, ALICE_LINK));
        let udp = UdpPacket::new_checked(got.payload).unwrap();
        assert_eq!((got.protocol, udp.src_port(), udp.dst_port()), (IpProtocol::Udp, 547, 546));
        assert_eq!(udp.payload()[..4], [7, 1, 2, 3]);
        assert_eq!(udp.payload()[4..], told[..]);
    }
    assert_eq!(gateway.stats().ipv6.dhcp_replies, 5);
}

#[test]
fn dhcpv6_for_others_and_for_addresses_is_not_answered() {
    let gateway = gateway();
    let ask = |frame: &[u8]| ask_at(&gateway, frame, 0, NOW + Duration::from_secs(1));
    let other_server = [0, 2, 0, 3, 9, 9, 9];
    let others = [
        information_request(&other_server),
        information_request(&[0, 3, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        dhcpv6(1, &CLIENT),
        dhcpv6(12, &[0; 34]),
        // This is sent to the server alone (RFC 8415, 16).
        framed(&udp6((ALICE_LINK, 546), (LINK_LOCAL, 547), &[11, 1, 2, 3])),
    ];
    let malformed = [
        framed(&udp6((ALICE_LINK, 546), (DHCP_SERVERS, 547), &[11, 1, 2])),
        information_request(&[0, 1, 0]),
        information_request(&[0, 1, 0, 5, 1, 2, 3]),
        information_request(&[0, 1, 0, 0]),
        information_request(&[&[0, 1, 0, 131][..], &[0; 131]].concat()),
        information_request(&[0, 6, 0, 1, 0]),
    ];
    for frame in others.iter().chain(&malformed) {
        assert_eq!(ask(frame), None);
    }
    let stats = gateway.stats().ipv6;
    assert_eq!((stats.other_dhcp, stats.malformed), (5, 6));
}

/// Checks that an answer is an error that quotes the packet.
fn check_error(reply: &[u8], from: Ipv6Addr, packet: &[u8], kind: u8, code: u8, word: u32) {
    let got = answer(reply);
    assert_eq!((got.mac, got.from), (ALICE, from));
    assert_eq!(got.to.octets(), packet[8..24], "to who has sent it");
    assert_eq!(got.payload[..2], [kind, code]);
    assert_eq!(got.payload[4..8], word.to_be_bytes());
    let quoted = &packet[..packet.len().min(ICMPV6_ERROR_MAX - 48)];
    assert!(got.payload[8..] == *quoted);
}

#[test]
fn what_the_gateway_does_not_serve_is_refused() {
    let gateway = gateway();
    let pair = |from, to| (from, to);
    let mut now = NOW;
    let mut check = |(from, to): (Ipv6Addr, Ipv6Addr), bytes: &[u8], by, error: (u8, u8, u32)| {
        now += Duration::from_secs(1);
        assert_eq!(bytes[8..24], from.octets());
        assert_eq!(bytes[24..40], to.octets());
        let reply = ask_at(&gateway, &framed(bytes), 0, now).expect("an error");
        check_error(&reply, by, bytes, error.0, error.1, error.2);
    };
    let ours = pair(ALICE_GLOBAL, GLOBAL);
    for len in [0, 5000] {
        let datagram = udp6((ALICE_GLOBAL, 4000), (GLOBAL, 53), &vec![7; len]);
        check(ours, &datagram, GLOBAL, (1, 4, 0));
    }
    // The protocol is unknown, also behind an extension header: the error points at its number.
    check(ours, &packet(ALICE_GLOBAL, GLOBAL, 132, &[1; 12]), GLOBAL, (4, 1, 6));
    let padded = [&[132, 0, 1, 4, 0, 0, 0, 0][..], &[1; 12]].concat();
    check(ours, &packet(ALICE_GLOBAL, GLOBAL, 60, &padded), GLOBAL, (4, 1, 40));
    // This is a second header for every hop.
    let twice = [&[0, 0, 1, 4, 0, 0, 0, 0][..], &[59, 0, 1, 4, 0, 0, 0, 0]].concat();
    check(ours, &packet(ALICE_GLOBAL, GLOBAL, 0, &twice), GLOBAL, (4, 1, 40));
    // This route is not at its end.
    let route = [&[58, 2, 0, 1, 0, 0, 0, 0][..], &WORLD.octets()].concat();
    check(ours, &packet(ALICE_GLOBAL, GLOBAL, 43, &route), GLOBAL, (4, 0, 42));
    // These options must not be skipped.
    for kind in [0x85, 0xc5] {
        let option = [59, 0, 1, 0, kind, 2, 0, 0];
        check(ours, &packet(ALICE_GLOBAL, GLOBAL, 60, &option), GLOBAL, (4, 2, 44));
    }
    let option = [59, 0, 0x85, 4, 0, 0, 0, 0];
    let to_all = pair(ALICE_LINK, ALL_NODES);
    check(to_all, &packet(ALICE_LINK, ALL_NODES, 60, &option), LINK_LOCAL, (4, 2, 42));
    // This is a first fragment.
    let fragment = [&[17, 0, 0, 1, 0, 0, 0, 9][..], &[0; 16]].concat();
    check(ours, &packet(ALICE_GLOBAL, GLOBAL, 44, &fragment), GLOBAL, (3, 1, 0));
    // These are for other places.
    for (from, to, by, code) in [
        (ALICE_GLOBAL, WORLD, GLOBAL, 0),
        (ALICE_LINK, WORLD, LINK_LOCAL, 2),
        (ALICE_GLOBAL, "fd12:3456:789a:1::99".parse().unwrap(), GLOBAL, 3),
        (ALICE_LINK, "fe80::99".parse().unwrap(), LINK_LOCAL, 3),
        (ALICE_GLOBAL, PREFIX, GLOBAL, 3),
    ] {
        check(pair(from, to), &udp6((from, 1), (to, 2), b"x"), by, (1, code, 0));
    }
    let stats = gateway.stats().ipv6;
    let refused = (stats.refused_udp, stats.refused_protocol, stats.refused_fragments);
    assert_eq!((refused, stats.refused_route), ((2, 7, 1), 5));
}

#[test]
fn a_segment_to_the_gateway_is_reset() {
    let gateway = gateway();
    let segment = |control| {
        let repr = TcpRepr {
            src_port: 4000,
            dst_port: 80,
            control,
            seq_number: TcpSeqNumber(100),
            ack_number: None,
            window_len: 1000,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let mut bytes = vec![0; repr.buffer_len()];
        let (from, to) = (ALICE_GLOBAL.into(), GLOBAL.into());
        let checksums = ChecksumCapabilities::default();
        repr.emit(&mut TcpPacket::new_unchecked(&mut bytes[..]), &from, &to, &checksums);
        framed(&packet(ALICE_GLOBAL, GLOBAL, 6, &bytes))
    };
    let reply = ask(&gateway, &segment(TcpControl::Syn)).expect("a reset");
    let got = answer(&reply);
    assert_eq!((got.from, got.to, got.protocol), (GLOBAL, ALICE_GLOBAL, IpProtocol::Tcp));
    let tcp = TcpPacket::new_checked(got.payload).unwrap();
    assert_eq!((tcp.src_port(), tcp.dst_port(), tcp.rst(), tcp.ack()), (80, 4000, true, true));
    assert_eq!((tcp.seq_number(), tcp.ack_number()), (TcpSeqNumber(0), TcpSeqNumber(101)));
    assert_eq!(ask(&gateway, &segment(TcpControl::Rst)), None);
    assert_eq!((gateway.stats().ipv6.refused_tcp, gateway.stats().ipv6.resets), (1, 1));
}

/// Goal: nothing that is an error, comes from nobody or goes to many gets an error (RFC 4443, 2.4 e).
#[test]
fn an_error_answers_no_error_and_no_group() {
    let gateway = gateway();
    let error = icmp(ALICE_GLOBAL, WORLD, 1, 0, &[0; 40]);
    let redirect = icmp(ALICE_GLOBAL, WORLD, 137, 0, &[0; 36]);
    let group = "ff02::99".parse().unwrap();
    let fragment = |offset: u16| {
        let field = (offset << 3 | 1).to_be_bytes();
        [&[17, 0, field[0], field[1], 0, 0, 0, 9][..], &[0; 16]].concat()
    };
    let udp_bytes = udp6((ALICE_GLOBAL, 1), (GLOBAL, 2), b"x")[40..].to_vec();
    let mut no_sum = udp_bytes.clone();
    no_sum[6..8].fill(0);
    let to_one = packet(ALICE_GLOBAL, GLOBAL, 17, &udp_bytes);
    type Is = fn(&Ipv6Stats) -> u64;
    let cases: [(Vec<u8>, Is); 17] = [
        (framed(&packet(ALICE_GLOBAL, WORLD, 58, &error)), |s| s.other_icmp),
        (framed(&packet(ALICE_GLOBAL, WORLD, 58, &redirect)), |s| s.other_icmp),
        (framed(&packet(NOBODY, WORLD, 17, &udp_bytes)), |s| s.bad_source),
        (framed(&packet(NOBODY, GLOBAL, 17, &udp_bytes)), |s| s.bad_source),
        (framed(&packet(WORLD, GLOBAL, 17, &udp_bytes)), |s| s.bad_source),
        (framed(&packet(PREFIX, GLOBAL, 17, &udp_bytes)), |s| s.bad_source),
        (framed(&packet(ALL_NODES, GLOBAL, 17, &udp_bytes)), |s| s.bad_source),
        (framed(&packet(Ipv6Addr::LOCALHOST, GLOBAL, 17, &udp_bytes)), |s| s.bad_source),
        (framed(&packet(ALICE_LINK, group, 17, &udp_bytes)), |s| s.multicasts),
        (framed(&udp6((ALICE_LINK, 1), (ALL_NODES, 2), b"x")), |s| s.multicasts),
        (framed(&packet(ALICE_LINK, ALL_NODES, 6, &[0; 20])), |s| s.multicasts),
        (framed(&packet(ALICE_LINK, ALL_NODES, 44, &fragment(0))), |s| s.multicasts),
        (framed(&packet(ALICE_GLOBAL, GLOBAL, 44, &fragment(2))), |s| s.later_fragments),
        (framed(&packet(ALICE_GLOBAL, WORLD, 44, &fragment(2))), |s| s.later_fragments),
        (framed(&packet(ALICE_GLOBAL, GLOBAL, 59, &[])), |s| s.discarded),
        (framed(&packet(ALICE_GLOBAL, GLOBAL, 17, &no_sum)), |s| s.malformed),
        (ethernet(eth(group_mac(ALL_NODES)), eth(ALICE), EthernetProtocol::Ipv6, &to_one), |s| {
            s.multicasts
        }),
    ];
    for (number, (frame, counted)) in cases.iter().enumerate() {
        // A group that the gateway is not a member of is not given to it by a network.
        let before = counted(&gateway.stats().ipv6) + gateway.stats().not_for_us;
        assert_eq!(ask(&gateway, frame), None, "case {number}");
        let after = counted(&gateway.stats().ipv6) + gateway.stats().not_for_us;
        assert_eq!(after, before + 1, "case {number}");
    }
}

#[test]
fn a_port_gets_few_errors_at_once_over_both_families() {
    let gateway = gateway();
    let v6 = framed(&udp6((ALICE_GLOBAL, 1), (GLOBAL, 2), b"x"));
    let v4 = udp(([192, 168, 64, 10].into(), 1), (SHARED, 2), b"x");
    let v4 = ethernet(eth(GATEWAY_MAC), eth(ALICE), EthernetProtocol::Ipv4, &v4);
    let errors = (0..100).filter(|_| ask(&gateway, &v6).is_some()).count()
        + (0..100).filter(|_| ask(&gateway, &v4).is_some()).count();
    assert_eq!(errors, 50);
    let stats = gateway.stats();
    assert_eq!((stats.ipv6.errors_limited, stats.errors_limited), (50, 100));
}

#[test]
fn who_claims_the_gateways_addresses_is_counted() {
    let gateway = gateway();
    let claim = neighbor(ALICE_LINK, ALL_NODES, 136, GLOBAL, &[2, 1, 2, 0, 0, 0, 0, 0xa]);
    assert_eq!(ask(&gateway, &claim), None);
    assert_eq!(ask(&gateway, &ping6(LINK_LOCAL, GLOBAL, b"")), None);
    let advert = icmp(ALICE_LINK, ALL_NODES, 134, 0, &[0; 12]);
    let advert = framed(&packet_with(ALICE_LINK, ALL_NODES, 58, 255, &advert));
    assert_eq!(ask(&gateway, &advert), None);
    let stats = gateway.stats().ipv6;
    assert_eq!((stats.conflicts, stats.foreign_routers, stats.bad_source), (2, 1, 1));
}

#[test]
fn without_ipv6_the_gateway_answers_none() {
    let network = Network::<Buffer>::new(NetworkConfig::default()).unwrap();
    let gateway = network.gateway().unwrap();
    assert_eq!((gateway.ipv6(), gateway.link_local()), (None, None));
    assert!(!gateway.hears(group_mac(ALL_ROUTERS)));
    assert_eq!(gateway.router_advertisement(&mut [0; 512]), None);
    let mut alice = Guest::join(&network, 1);
    network.set_ipv6_router(true);
    let solicitation = framed_by(alice.mac, &router_solicit(ALICE_LINK)[14..]);
    assert!(alice.ask(&solicitation).is_empty());
    assert_eq!(gateway.stats().ipv6, Ipv6Stats::default());
}

fn network(mode: NetworkMode) -> (Arc<Network<Buffer>>, Arc<ManualClock>) {
    struct Shared(Arc<ManualClock>);
    impl Clock for Shared {
        fn now(&self) -> Duration {
            self.0.now()
        }
    }
    let clock = Arc::new(ManualClock::new());
    let config = NetworkConfig { ipv6: Some(Ipv6Config::new(PREFIX)), ..NetworkConfig::of(mode) };
    (Network::with_clock(config, Box::new(Shared(clock.clone()))).unwrap(), clock)
}

/// The lifetime of the router in each advertisement among some frames.
fn lifetimes(frames: &[Vec<u8>]) -> Vec<u16> {
    let adverts = frames.iter().filter(|frame| frame[12..14] == [0x86, 0xdd] && frame[54] == 134);
    adverts.map(|frame| u16::from_be_bytes([frame[60], frame[61]])).collect()
}

/// Goal: each guest gets the prefix soon, and hears of changes at once, although the network has no
/// timer.
#[test]
fn a_guest_gets_advertisements_without_a_timer() {
    let (network, clock) = network(NetworkMode::Shared);
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    let mut uplink = Guest::with(&network, PortConfig { uplink: true, ..config(3) });
    let arp = |guest: &Guest| arp_request(guest.mac, [192, 168, 64, 9].into(), SHARED);
    // This is the first frame for the gateway.
    assert_eq!(lifetimes(&alice.ask(&arp(&alice))), [0]);
    assert_eq!(lifetimes(&alice.ask(&arp(&alice))), []);
    assert_eq!(lifetimes(&uplink.ask(&arp(&uplink))), []);
    bob.receive();
    uplink.receive();
    // A change goes to everybody but the uplink.
    network.set_ipv6_router(true);
    network.set_ipv6_router(true);
    assert_eq!(lifetimes(&alice.receive()), [ROUTER_LIFETIME]);
    assert_eq!(lifetimes(&bob.receive()), [ROUTER_LIFETIME]);
    assert!(uplink.receive().is_empty());
    assert!(bob.wakes.load(std::sync::atomic::Ordering::SeqCst) <= 2);
    // Each port gets one again after a while, and after another guest has come to its place.
    clock.advance(ADVERTISEMENT_INTERVAL - Duration::from_secs(1));
    assert_eq!(lifetimes(&alice.ask(&arp(&alice))), []);
    clock.advance(Duration::from_secs(1));
    assert_eq!(lifetimes(&alice.ask(&arp(&alice))), [ROUTER_LIFETIME]);
    assert_eq!(lifetimes(&alice.ask(&arp(&alice))), []);
    drop(alice);
    let mut carol = Guest::join(&network, 4);
    assert_eq!(lifetimes(&carol.ask(&arp(&carol))), [ROUTER_LIFETIME]);
    network.set_ipv6_router(false);
    assert_eq!(lifetimes(&carol.receive()), [0]);
}

/// Goal: a network that leads nowhere is nobody's default route.
#[test]
fn a_host_networks_gateway_is_no_router() {
    let (network, _) = network(NetworkMode::Host);
    let mut alice = Guest::join(&network, 1);
    network.set_ipv6_router(true);
    assert!(alice.receive().is_empty());
    let solicitation = framed_by(alice.mac, &router_solicit(ALICE_LINK)[14..]);
    assert_eq!(lifetimes(&alice.ask(&solicitation)), [0]);
}

/// Goal: groups of the gateway reach it and the other guests, also from an isolated port, and nothing of
/// the uplink's network is answered.
#[test]
fn groups_of_the_gateway_reach_it_and_all_others() {
    let (network, _) = network(NetworkMode::Shared);
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    let mut lonely = Guest::isolated(&network, 3);
    let seen = || {
        let stats = network.gateway().unwrap().stats();
        stats.ipv6.router_advertisements + stats.ipv6.echo_replies + stats.ipv6.multicasts
    };
    let solicitation = |mac| framed_by(mac, &router_solicit(ALICE_LINK)[14..]);
    assert_eq!(alice.sender.send(&solicitation(alice.mac)), Sent::Flooded { reached: 1 });
    assert_eq!(lonely.sender.send(&solicitation(lonely.mac)), Sent::Gateway);
    for guest in [&mut alice, &mut bob, &mut lonely] {
        guest.sender.flush();
    }
    assert_eq!((lifetimes(&alice.receive()), lifetimes(&lonely.receive())), (vec![0], vec![0]));
    assert_eq!(bob.receive(), [solicitation(alice.mac)]);
    assert_eq!(seen(), 2);
    // The gateway is not a member of this group.
    let other = "ff02::fb".parse().unwrap();
    let frame = framed_by(alice.mac, &udp6((ALICE_LINK, 5353), (other, 5353), b"x"));
    assert_eq!(alice.sender.send(&frame), Sent::Flooded { reached: 1 });
    assert_eq!(seen(), 2);
    let mut uplink = Guest::with(&network, PortConfig { uplink: true, ..config(4) });
    assert!(uplink.ask(&solicitation(uplink.mac)).is_empty());
    assert_eq!(seen(), 2);
}

#[test]
fn wrong_settings_of_ipv6_are_refused_by_what_is_wrong() {
    let check =
        |ipv6: Ipv6Config| NetworkConfig { ipv6: Some(ipv6), ..NetworkConfig::default() }.check();
    assert_eq!(check(Ipv6Config::of_name("lab")), Ok(()));
    for prefix in [Ipv6Addr::UNSPECIFIED, GLOBAL, LINK_LOCAL, ALL_NODES] {
        assert_eq!(
            check(Ipv6Config::new(prefix)),
            Err(NetworkConfigError::Ipv6Prefix { prefix }),
            "{prefix}"
        );
    }
    let dns = |dns| check(Ipv6Config { dns, ..Ipv6Config::new(PREFIX) });
    assert_eq!(dns(vec![NAMES; 3]), Ok(()));
    assert_eq!(dns(vec![NAMES; 4]), Err(NetworkConfigError::Dns { count: 4 }));
    for address in [NOBODY, ALL_NODES, Ipv6Addr::LOCALHOST] {
        assert_eq!(dns(vec![NAMES, address]), Err(NetworkConfigError::Ipv6Dns { address }));
    }
    let switch = NetworkConfig { ipv6: Some(Ipv6Config::new(PREFIX)), ..NetworkConfig::switch() };
    assert_eq!(switch.check(), Err(NetworkConfigError::NoGateway { setting: "ipv6" }));
    // A port that joins a network with another prefix learns what differs.
    let networks = Registry::<Buffer>::new();
    let with = |ipv6| NetworkConfig { ipv6, ..NetworkConfig::default() };
    let _network = networks.open("lab", &with(Some(Ipv6Config::new(PREFIX)))).unwrap();
    let error = networks.open("lab", &with(None)).unwrap_err();
    assert!(matches!(error, OpenError::Conflict { .. }));
    assert!(error.to_string().contains("with ipv6 fd12:3456:789a:1::/64 and not none"), "{error}");
}
