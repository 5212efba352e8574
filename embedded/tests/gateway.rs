//! Tests of the gateway, frame by frame: ARP, ping, and every DHCP flow.
#![cfg(not(loom))]

mod common;

use core::net::Ipv4Addr;
use std::time::Duration;

use common::*;
use macaddr::MacAddr6;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::dhcpv4;
use smoltcp::wire::*;
use vmring_embedded::dhcp::{DhcpConfig, DhcpServer, DhcpStats, ReserveError};
use vmring_embedded::gateway::Gateway;

const GATEWAY_MAC: MacAddr6 = MacAddr6::new(2, 0, 0, 0, 0, 1);
const ALICE: MacAddr6 = MacAddr6::new(2, 0, 0, 0, 0, 0xa);
const BOB: MacAddr6 = MacAddr6::new(2, 0, 0, 0, 0, 0xb);
const ALICE_IP: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 10);
const NOW: Duration = Duration::from_secs(1000);
const HOUR: u64 = 3600;

fn dhcp_config() -> DhcpConfig {
    DhcpConfig {
        server: SHARED,
        server_mac: GATEWAY_MAC,
        first: Ipv4Addr::new(192, 168, 64, 2),
        last: Ipv4Addr::new(192, 168, 64, 254),
        mask: Ipv4Addr::new(255, 255, 255, 0),
        router: Some(SHARED),
        dns: vec![],
        mtu: Some(1500),
        lease_time: Duration::from_secs(HOUR),
    }
}

fn gateway() -> Gateway {
    Gateway::new(dhcp_config())
}

fn ask(gateway: &Gateway, frame: &[u8], now: Duration) -> Option<Vec<u8>> {
    let mut reply = vec![0xaa; 1514];
    let len = gateway.handle(frame, &mut reply, now)?;
    reply.truncate(len);
    Some(reply)
}

fn dhcp(gateway: &Gateway, message: &Dhcp, now: Duration) -> Option<DhcpReply> {
    ask(gateway, &message.frame(), now).map(|frame| dhcp_reply(&frame))
}

/// Gets a lease by DISCOVER, OFFER, REQUEST and ACK, and returns its address.
fn lease(gateway: &Gateway, mac: MacAddr6, now: Duration) -> Option<Ipv4Addr> {
    let offer = dhcp(gateway, &Dhcp::discover(mac), now)?;
    assert_eq!(offer.kind, DhcpMessageType::Offer);
    let ack = dhcp(gateway, &Dhcp::select(mac, offer.address, SHARED), now)?;
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, offer.address));
    Some(ack.address)
}

fn host(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 64, last)
}

fn mac(number: u16) -> MacAddr6 {
    let [a, b] = number.to_be_bytes();
    MacAddr6::new(2, 0, 0, 1, a, b)
}

#[test]
fn arp_for_the_gateway_is_answered_and_for_others_is_not() {
    let gateway = gateway();
    let reply = ask(&gateway, &arp_request(ALICE, ALICE_IP, SHARED), NOW).unwrap();
    let frame = EthernetFrame::new_checked(&reply[..]).unwrap();
    assert_eq!((frame.dst_addr(), frame.src_addr()), (eth(ALICE), eth(GATEWAY_MAC)));
    assert_eq!(
        ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).unwrap()).unwrap(),
        ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: eth(GATEWAY_MAC),
            source_protocol_addr: SHARED,
            target_hardware_addr: eth(ALICE),
            target_protocol_addr: ALICE_IP,
        }
    );
    // This is a probe from a guest that has no address yet.
    assert!(ask(&gateway, &arp_request(ALICE, Ipv4Addr::UNSPECIFIED, SHARED), NOW).is_some());
    assert_eq!(ask(&gateway, &arp_request(ALICE, ALICE_IP, host(2)), NOW), None);
    assert_eq!((gateway.stats().arp_replies, gateway.stats().ignored), (2, 1));
}

fn check_echo(reply: &[u8], seq_no: u16, payload: &[u8]) {
    let checksums = ChecksumCapabilities::default();
    let frame = EthernetFrame::new_checked(reply).unwrap();
    assert_eq!((frame.dst_addr(), frame.src_addr()), (eth(ALICE), eth(GATEWAY_MAC)));
    let ip = Ipv4Packet::new_checked(frame.payload()).unwrap();
    let repr = Ipv4Repr::parse(&ip, &checksums).unwrap();
    assert_eq!((repr.src_addr, repr.dst_addr), (SHARED, ALICE_IP));
    let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
    assert_eq!(
        Icmpv4Repr::parse(&icmp, &checksums).unwrap(),
        Icmpv4Repr::EchoReply { ident: 0x1234, seq_no, data: payload }
    );
}

#[test]
fn pings_of_every_size_come_back_as_they_went() {
    let gateway = gateway();
    for (seq_no, len) in [0, 1, 2, 55, 56, 57, 1471, 1472].into_iter().enumerate() {
        let payload: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
        let seq_no = seq_no as u16;
        let request = ping(GATEWAY_MAC, ALICE, ALICE_IP, SHARED, seq_no, &payload);
        check_echo(&ask(&gateway, &request, NOW).unwrap(), seq_no, &payload);
    }
    let mut reply = vec![0; 65_535];
    let payload = vec![9; 65_535 - 14 - 28];
    let request = ping(GATEWAY_MAC, ALICE, ALICE_IP, SHARED, 7, &payload);
    let len = gateway.handle(&request, &mut reply, NOW).unwrap();
    check_echo(&reply[..len], 7, &payload);
    assert_eq!(gateway.stats().echo_replies, 9);
}

#[test]
fn a_broken_or_foreign_ping_is_counted_and_not_answered() {
    let gateway = gateway();
    let good = ping(GATEWAY_MAC, ALICE, ALICE_IP, SHARED, 1, b"payload");
    assert!(ask(&gateway, &good, NOW).is_some());
    for at in [14, 24, 35, 36, 43] {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        assert_eq!(ask(&gateway, &bad, NOW), None, "byte {at}");
    }
    assert_eq!(gateway.stats().malformed, 5);
    for length in 0..good.len() {
        assert_eq!(ask(&gateway, &good[..length], NOW), None, "cut to {length}");
    }
    // A header of another version, and one that is too short, each with a checksum that fits.
    let malformed = gateway.stats().malformed;
    for first in [0x55, 0x44] {
        let mut bad = good.clone();
        bad[14] = first;
        Ipv4Packet::new_unchecked(&mut bad[14..]).fill_checksum();
        assert_eq!(ask(&gateway, &bad, NOW), None);
    }
    assert_eq!(gateway.stats().malformed, malformed + 2);
    // A longer header is right.
    let mut longer = good.clone();
    longer.splice(34..34, [1, 1, 1, 0]);
    let mut ip = Ipv4Packet::new_unchecked(&mut longer[14..]);
    ip.set_header_len(24);
    ip.set_total_len(ip.total_len() + 4);
    ip.fill_checksum();
    check_echo(&ask(&gateway, &longer, NOW).unwrap(), 1, b"payload");
    let foreign = [
        ping(GATEWAY_MAC, ALICE, Ipv4Addr::new(10, 0, 0, 1), SHARED, 1, b"of another subnet"),
        ping(GATEWAY_MAC, ALICE, host(255), SHARED, 1, b"answer goes to all"),
        ping(GATEWAY_MAC, ALICE, SHARED, SHARED, 1, b"answer goes to itself"),
        ping(GATEWAY_MAC, ALICE, ALICE_IP, host(9), 1, b"to another"),
        ping(BOB, ALICE, ALICE_IP, SHARED, 1, b"to another, below"),
        ping(MacAddr6::broadcast(), ALICE, ALICE_IP, Ipv4Addr::BROADCAST, 1, b"to all"),
    ];
    let ignored = gateway.stats().ignored;
    for frame in &foreign {
        assert_eq!(ask(&gateway, frame, NOW), None);
    }
    assert_eq!(gateway.stats().ignored, ignored + foreign.len() as u64);
}

#[test]
fn fragments_are_counted_and_not_answered() {
    let gateway = gateway();
    let mut frame = ping(GATEWAY_MAC, ALICE, ALICE_IP, SHARED, 1, b"payload");
    let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_dont_frag(false);
    ip.set_more_frags(true);
    ip.fill_checksum();
    assert_eq!(ask(&gateway, &frame, NOW), None);
    let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_more_frags(false);
    ip.set_frag_offset(8);
    ip.fill_checksum();
    assert_eq!(ask(&gateway, &frame, NOW), None);
    assert_eq!(gateway.stats().fragments, 2);
}

#[test]
fn an_offer_and_an_ack_say_all_a_guest_needs() {
    let config = DhcpConfig { dns: vec![host(53), host(54)], ..dhcp_config() };
    let gateway = Gateway::new(config);
    let offer = dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap();
    let ack = dhcp(&gateway, &Dhcp::select(ALICE, host(2), SHARED), NOW).unwrap();
    assert_eq!((offer.kind, ack.kind), (DhcpMessageType::Offer, DhcpMessageType::Ack));
    for reply in [offer, ack] {
        assert_eq!(reply.address, host(2), "the first free address");
        assert_eq!((reply.to_mac, reply.to_ip), (eth(ALICE), host(2)));
        assert_eq!(reply.mask, Some(Ipv4Addr::new(255, 255, 255, 0)));
        assert_eq!((reply.router, reply.server), (Some(SHARED), Some(SHARED)));
        assert_eq!(
            (reply.lease, reply.renewal, reply.rebinding),
            (Some(3600), Some(1800), Some(3150))
        );
        assert_eq!(reply.dns, [host(53), host(54)]);
        assert_eq!((reply.mtu, reply.broadcast), (Some(1500), Some(host(255))));
    }
    let lease = gateway.dhcp().lease_of(ALICE, NOW).unwrap();
    assert_eq!((lease.address, lease.remaining), (host(2), Duration::from_secs(HOUR)));
    assert_eq!(gateway.dhcp().leases(NOW), [lease]);
    assert_eq!(gateway.dhcp().lease_of(BOB, NOW), None);
    let end = NOW + Duration::from_secs(HOUR);
    assert!(gateway.dhcp().lease_of(ALICE, end - Duration::from_millis(1)).is_some());
    assert_eq!(gateway.dhcp().lease_of(ALICE, end), None, "it lasts up to here");
}

#[test]
fn an_mtu_that_is_not_configured_is_not_told() {
    let gateway = Gateway::new(DhcpConfig { mtu: None, ..dhcp_config() });
    assert_eq!(dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap().mtu, None);
}

#[test]
fn host_mode_names_no_router() {
    let gateway = Gateway::new(DhcpConfig { router: None, ..dhcp_config() });
    assert_eq!(dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap().router, None);
}

#[test]
fn replies_are_broadcast_to_those_who_ask_for_it() {
    let gateway = gateway();
    let discover = Dhcp { broadcast: true, ..Dhcp::discover(ALICE) };
    let offer = dhcp(&gateway, &discover, NOW).unwrap();
    assert_eq!((offer.to_mac, offer.to_ip), (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST));
    assert_eq!(offer.address, host(2));
}

#[test]
fn an_offer_alone_is_no_lease_and_is_held_for_a_minute() {
    let gateway = gateway();
    assert_eq!(dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap().address, host(2));
    assert!(gateway.dhcp().leases(NOW).is_empty());
    let request = Dhcp::discover(BOB).requested(host(2));
    assert_eq!(dhcp(&gateway, &request, NOW + Duration::from_secs(59)).unwrap().address, host(3));
    let request = Dhcp::discover(mac(1)).requested(host(2));
    assert_eq!(dhcp(&gateway, &request, NOW + Duration::from_secs(60)).unwrap().address, host(2));
}

#[test]
fn the_same_mac_gets_the_same_address() {
    let gateway = gateway();
    assert_eq!(lease(&gateway, ALICE, NOW), Some(host(2)));
    assert_eq!(lease(&gateway, BOB, NOW), Some(host(3)));
    assert_eq!(lease(&gateway, ALICE, NOW), Some(host(2)));
    // The client gets it long after the lease ran out, and after a release, as long as no other
    // client needed the address.
    let later = NOW + Duration::from_secs(100 * HOUR);
    assert_eq!(gateway.dhcp().lease_of(ALICE, later), None);
    assert_eq!(lease(&gateway, mac(1), later), Some(host(4)));
    assert_eq!(lease(&gateway, ALICE, later), Some(host(2)));
    let release = Dhcp::new(DhcpMessageType::Release, ALICE).from(host(2));
    assert!(dhcp(&gateway, &release, later).is_none());
    assert_eq!(gateway.dhcp().lease_of(ALICE, later), None);
    assert_eq!(lease(&gateway, mac(2), later), Some(host(5)));
    assert_eq!(lease(&gateway, ALICE, later), Some(host(2)));
}

#[test]
fn an_address_asked_for_is_given_if_it_is_free() {
    let gateway = gateway();
    let request = Dhcp::discover(ALICE).requested(host(77));
    assert_eq!(dhcp(&gateway, &request, NOW).unwrap().address, host(77));
    assert!(dhcp(&gateway, &Dhcp::select(ALICE, host(77), SHARED), NOW).is_some());
    for taken in [host(77), SHARED, host(255), host(0), Ipv4Addr::new(10, 0, 0, 9)] {
        let request = Dhcp::discover(BOB).requested(taken);
        assert_eq!(dhcp(&gateway, &request, NOW).unwrap().address, host(2));
    }
}

#[test]
fn a_request_for_another_address_is_refused() {
    let gateway = Gateway::new(DhcpConfig { dns: vec![host(53)], ..dhcp_config() });
    lease(&gateway, ALICE, NOW).unwrap();
    let nak = dhcp(&gateway, &Dhcp::select(ALICE, host(99), SHARED), NOW).unwrap();
    assert_eq!((nak.kind, nak.address), (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED));
    assert_eq!((nak.to_mac, nak.to_ip), (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST));
    assert_eq!((nak.lease, nak.router, nak.mask, nak.mtu), (None, None, None, None));
    assert_eq!((nak.dns, nak.broadcast), (vec![], None));
    // The client accepts an offer that was never made.
    let nak = dhcp(&gateway, &Dhcp::select(BOB, host(5), SHARED), NOW).unwrap();
    assert_eq!(nak.kind, DhcpMessageType::Nak);
    assert_eq!(gateway.dhcp().leases(NOW).len(), 1);
    // A short reply is filled up with zeros, not with what was in the buffer before.
    let reply = ask(&gateway, &Dhcp::select(BOB, host(5), SHARED).frame(), NOW).unwrap();
    let end = 1 + reply.iter().rposition(|&byte| byte == 255).unwrap();
    assert!(end < reply.len() && reply[end..].iter().all(|&byte| byte == 0));
    // A request that names no address at all is not one.
    let nothing = Dhcp::new(DhcpMessageType::Request, BOB);
    assert!(dhcp(&gateway, &Dhcp { server: Some(SHARED), ..nothing }, NOW).is_none());
    let stats = gateway.dhcp().stats();
    assert_eq!((stats.naks, stats.malformed), (3, 1));
}

#[test]
fn a_client_that_chose_another_server_frees_our_offer() {
    let gateway = gateway();
    assert_eq!(dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap().address, host(2));
    assert!(dhcp(&gateway, &Dhcp::select(ALICE, host(200), host(250)), NOW).is_none());
    let request = Dhcp::discover(BOB).requested(host(2));
    assert_eq!(dhcp(&gateway, &request, NOW).unwrap().address, host(2));
}

/// The offer ends once. If the client chooses the other server again, our address is no younger.
#[test]
fn an_address_is_free_since_the_offer_ended() {
    let gateway = Gateway::new(DhcpConfig { last: host(3), ..dhcp_config() });
    let at = |seconds| NOW + Duration::from_secs(seconds);
    let elsewhere = Dhcp::select(ALICE, host(200), host(250));
    assert_eq!(dhcp(&gateway, &Dhcp::discover(ALICE), at(0)).unwrap().address, host(2));
    assert!(dhcp(&gateway, &elsewhere, at(1)).is_none());
    assert_eq!(lease(&gateway, BOB, at(1)), Some(host(3)));
    let release = Dhcp::new(DhcpMessageType::Release, BOB).from(host(3));
    assert!(dhcp(&gateway, &release, at(2)).is_none());
    assert!(dhcp(&gateway, &elsewhere, at(3)).is_none());
    assert_eq!(lease(&gateway, mac(1), at(3)), Some(host(2)), "free longest");
}

#[test]
fn init_reboot_follows_the_record() {
    let gateway = gateway();
    lease(&gateway, ALICE, NOW).unwrap();
    let reboot = |mac, address| Dhcp::new(DhcpMessageType::Request, mac).requested(address);
    let ack = dhcp(&gateway, &reboot(ALICE, host(2)), NOW).unwrap();
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, host(2)));
    let nak = dhcp(&gateway, &reboot(ALICE, host(3)), NOW).unwrap();
    assert_eq!(nak.kind, DhcpMessageType::Nak);
    // The server has no record of the client: it does not reply, unless the address is of another
    // network.
    assert!(dhcp(&gateway, &reboot(BOB, host(9)), NOW).is_none());
    let nak = dhcp(&gateway, &reboot(BOB, Ipv4Addr::new(10, 0, 2, 15)), NOW).unwrap();
    assert_eq!(nak.kind, DhcpMessageType::Nak);
}

#[test]
fn renewing_and_rebinding_extend_the_lease() {
    let gateway = gateway();
    lease(&gateway, ALICE, NOW).unwrap();
    let half = NOW + Duration::from_secs(HOUR / 2);
    assert_eq!(gateway.dhcp().lease_of(ALICE, half).unwrap().remaining.as_secs(), HOUR / 2);
    let renew = Dhcp::new(DhcpMessageType::Request, ALICE).from(host(2));
    let ack = dhcp(&gateway, &renew, half).unwrap();
    assert_eq!((ack.kind, ack.address, ack.to_ip), (DhcpMessageType::Ack, host(2), host(2)));
    assert_eq!(ack.client_ip, host(2));
    assert_eq!(gateway.dhcp().lease_of(ALICE, half).unwrap().remaining.as_secs(), HOUR);
    // A real renewal comes in unicast.
    let mut unicast = renew.frame();
    let ip = udp((host(2), 68), (SHARED, 67), &unicast[14 + 28..]);
    unicast = ethernet(eth(GATEWAY_MAC), eth(ALICE), EthernetProtocol::Ipv4, &ip);
    let ack = dhcp_reply(&ask(&gateway, &unicast, half).unwrap());
    assert_eq!(ack.kind, DhcpMessageType::Ack);
    // The address is another client's.
    let theirs = Dhcp::new(DhcpMessageType::Request, BOB).from(host(2));
    assert!(dhcp(&gateway, &theirs, half).is_none());
}

#[test]
fn a_declined_address_is_not_given_out() {
    let gateway = gateway();
    lease(&gateway, ALICE, NOW).unwrap();
    let decline = Dhcp::new(DhcpMessageType::Decline, ALICE).requested(host(2));
    assert!(dhcp(&gateway, &decline, NOW).is_none());
    assert_eq!(gateway.dhcp().lease_of(ALICE, NOW), None);
    assert_eq!(lease(&gateway, ALICE, NOW), Some(host(3)));
    let request = Dhcp::discover(BOB).requested(host(2));
    assert_eq!(dhcp(&gateway, &request, NOW).unwrap().address, host(4));
    let request = Dhcp::discover(mac(1)).requested(host(2));
    let later = NOW + Duration::from_secs(HOUR);
    assert_eq!(dhcp(&gateway, &request, later).unwrap().address, host(2));
    assert_eq!(gateway.dhcp().stats().declines, 1);
}

/// A declined address rests for its own time, which is not that of the lease.
#[test]
fn a_declined_address_rests_longer_than_a_short_lease() {
    let lease_time = Duration::from_secs(60);
    let gateway = Gateway::new(DhcpConfig { lease_time, ..dhcp_config() });
    lease(&gateway, ALICE, NOW).unwrap();
    let decline = Dhcp::new(DhcpMessageType::Decline, ALICE).requested(host(2));
    assert!(dhcp(&gateway, &decline, NOW).is_none());
    for (number, seconds) in [(1, 61), (2, HOUR - 1), (3, HOUR)] {
        let request = Dhcp::discover(mac(number)).requested(host(2));
        let offer = dhcp(&gateway, &request, NOW + Duration::from_secs(seconds)).unwrap();
        assert_eq!(offer.address == host(2), seconds == HOUR, "after {seconds} s");
    }
}

/// A release counts only from the client that has the address, and only if it is for this server.
#[test]
fn a_release_of_another_address_or_to_another_server_ends_no_lease() {
    let gateway = gateway();
    lease(&gateway, ALICE, NOW).unwrap();
    let release = |address| Dhcp::new(DhcpMessageType::Release, ALICE).from(address);
    let to = |server, address| Dhcp { server: Some(server), ..release(address) };
    for message in [release(host(3)), to(SHARED, host(3)), to(host(250), host(2))] {
        assert!(dhcp(&gateway, &message, NOW).is_none());
        assert!(gateway.dhcp().lease_of(ALICE, NOW).is_some());
    }
    assert!(dhcp(&gateway, &to(SHARED, host(2)), NOW).is_none());
    assert_eq!(gateway.dhcp().lease_of(ALICE, NOW), None);
    assert_eq!(gateway.dhcp().stats().releases, 1);
}

/// A client that has a lease and asks for an offer, for example because it has restarted, keeps
/// the lease. An offer is for a minute, so it takes the place of a lease that ends earlier.
#[test]
fn an_offer_shortens_no_lease_and_is_renewed_by_the_next() {
    let gateway = gateway();
    let at = |seconds| NOW + Duration::from_secs(seconds);
    let left = |seconds| {
        gateway.dhcp().lease_of(ALICE, at(seconds)).map(|lease| lease.remaining.as_secs())
    };
    lease(&gateway, ALICE, NOW).unwrap();
    for seconds in [0, HOUR - 61] {
        let offer = dhcp(&gateway, &Dhcp::discover(ALICE), at(seconds)).unwrap();
        assert_eq!((offer.address, left(seconds)), (host(2), Some(HOUR - seconds)));
    }
    let offer = dhcp(&gateway, &Dhcp::discover(ALICE), at(HOUR - 60)).unwrap();
    assert_eq!((offer.address, left(HOUR - 60)), (host(2), None), "it is an offer again");
    // The second offer lasts a minute from the time it is made.
    dhcp(&gateway, &Dhcp::discover(ALICE), at(HOUR - 30)).unwrap();
    let ask = |number, seconds| {
        let request = Dhcp::discover(mac(number)).requested(host(2));
        dhcp(&gateway, &request, at(seconds)).unwrap().address
    };
    assert_eq!(ask(1, HOUR + 29), host(3));
    assert_eq!(ask(2, HOUR + 30), host(2));
}

#[test]
fn inform_is_answered_without_a_lease() {
    let gateway = gateway();
    let inform = Dhcp::new(DhcpMessageType::Inform, ALICE).from(host(200));
    let ack = dhcp(&gateway, &inform, NOW).unwrap();
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED));
    assert_eq!((ack.lease, ack.renewal, ack.rebinding), (None, None, None));
    assert_eq!((ack.router, ack.mtu, ack.to_ip), (Some(SHARED), Some(1500), host(200)));
    assert!(gateway.dhcp().leases(NOW).is_empty());
    assert_eq!(gateway.dhcp().stats().acks, 1);
    // The reply would go to another network.
    let stranger = Dhcp::new(DhcpMessageType::Inform, ALICE).from(Ipv4Addr::new(10, 0, 0, 1));
    assert!(dhcp(&gateway, &stranger, NOW).is_none());
    // A type of message that only a server sends.
    let mut offer = Dhcp::discover(ALICE).frame();
    offer[14 + 28 + 242] = 2;
    offer[14 + 20 + 6..14 + 20 + 8].fill(0); // no UDP checksum
    assert_eq!(ask(&gateway, &offer, NOW), None);
    assert_eq!(gateway.dhcp().stats().malformed, 1);
}

#[test]
fn an_exhausted_range_gets_no_reply_and_reuses_what_was_free_longest() {
    let config = DhcpConfig { last: host(4), ..dhcp_config() };
    let gateway = Gateway::new(config);
    for number in 0..3 {
        let at = NOW + Duration::from_secs(number.into());
        assert_eq!(lease(&gateway, mac(number), at), Some(host(2 + number as u8)));
    }
    assert_eq!(lease(&gateway, mac(3), NOW), None);
    assert_eq!(gateway.dhcp().stats().exhausted, 1);
    // One lease runs out: the newcomer gets the address, and its old owner gets none.
    let at = NOW + Duration::from_secs(HOUR);
    assert_eq!(lease(&gateway, mac(3), at), Some(host(2)));
    assert_eq!(lease(&gateway, mac(0), at), None);
    assert_eq!(gateway.dhcp().leases(at).len(), 3);
    // A released address is free at once.
    let release = Dhcp::new(DhcpMessageType::Release, mac(2)).from(host(4));
    assert!(dhcp(&gateway, &release, at).is_none());
    assert_eq!(lease(&gateway, mac(0), at), Some(host(4)));
}

#[test]
fn no_client_speaks_for_another() {
    let gateway = gateway();
    lease(&gateway, ALICE, NOW).unwrap();
    for kind in [DhcpMessageType::Release, DhcpMessageType::Decline] {
        let mut frame = Dhcp::new(kind, ALICE).from(host(2)).requested(host(2)).frame();
        frame[6..12].copy_from_slice(BOB.as_bytes()); // Bob sends it
        assert_eq!(ask(&gateway, &frame, NOW), None);
    }
    assert!(gateway.dhcp().lease_of(ALICE, NOW).is_some());
    assert_eq!(gateway.dhcp().stats().malformed, 2);
}

#[test]
fn a_client_identifier_of_any_kind_is_accepted() {
    let gateway = gateway();
    let mut frame = Dhcp::discover(ALICE).frame();
    // Option 61 follows the message type. Its hardware type becomes 255, which a DUID has.
    let at = 14 + 28 + 240 + 3;
    assert_eq!(frame[at..at + 3], [61, 7, 1]);
    frame[at + 2] = 255;
    frame[14 + 20 + 6..14 + 20 + 8].fill(0); // no UDP checksum
    assert!(ask(&gateway, &frame, NOW).is_some());
}

#[test]
fn a_reserved_address_is_kept_for_its_client() {
    let server = DhcpServer::new(dhcp_config());
    server.reserve(ALICE, host(2), NOW).unwrap();
    assert_eq!(
        server.reserve(BOB, host(2), NOW),
        Err(ReserveError::Taken { address: host(2), holder: ALICE })
    );
    assert_eq!(server.reserve(BOB, SHARED, NOW), Err(ReserveError::OutOfRange(SHARED)));
    let ask = |message: Dhcp, now| {
        let mut reply = [0; 400];
        let len = server.handle(&message.frame(), &mut reply, now)?;
        Some(dhcp_reply(&reply[..len]))
    };
    assert_eq!(ask(Dhcp::discover(BOB).requested(host(2)), NOW).unwrap().address, host(3));
    assert_eq!(ask(Dhcp::discover(ALICE), NOW).unwrap().address, host(2));
    assert!(server.leases(NOW).is_empty());
    assert!(ask(Dhcp::select(ALICE, host(2), SHARED), NOW).is_some());
    assert_eq!(server.leases(NOW).len(), 1);
    assert!(ask(Dhcp::new(DhcpMessageType::Release, ALICE).from(host(2)), NOW).is_none());
    assert!(server.leases(NOW).is_empty());
    assert_eq!(ask(Dhcp::discover(mac(1)).requested(host(2)), NOW).unwrap().address, host(4));
    // Bob had an offer of another address. The reservation gives him this one instead.
    server.reserve(BOB, host(50), NOW).unwrap();
    assert_eq!(ask(Dhcp::discover(BOB), NOW).unwrap().address, host(50));
    assert_eq!(ask(Dhcp::discover(mac(2)), NOW).unwrap().address, host(3));
    let DhcpStats { offers, acks, releases, .. } = server.stats();
    assert_eq!((offers, acks, releases), (5, 1, 1));
}

#[test]
fn a_reservation_keeps_a_lease_on_its_address_and_makes_none() {
    let gateway = gateway();
    let server = gateway.dhcp();
    // Alice has a lease on the address. It goes on.
    lease(&gateway, ALICE, NOW).unwrap();
    let before = server.lease_of(ALICE, NOW).unwrap();
    server.reserve(ALICE, host(2), NOW).unwrap();
    assert_eq!(server.lease_of(ALICE, NOW), Some(before));
    // It ends if the reservation is for another address.
    server.reserve(ALICE, host(20), NOW).unwrap();
    assert_eq!(server.lease_of(ALICE, NOW), None);
    // Bob has an offer of the address, or has never been heard of. Neither has a lease by that.
    assert_eq!(dhcp(&gateway, &Dhcp::discover(BOB), NOW).unwrap().address, host(2));
    server.reserve(BOB, host(2), NOW).unwrap();
    assert_eq!(server.lease_of(BOB, NOW), None);
    server.reserve(mac(1), host(30), Duration::ZERO).unwrap();
    assert_eq!(server.lease_of(mac(1), Duration::ZERO), None);
    let beyond = host(255);
    assert_eq!(server.reserve(mac(2), beyond, NOW), Err(ReserveError::OutOfRange(beyond)));
}

/// Asks a DHCP server that has no gateway in front of it.
fn ask_server(server: &DhcpServer, frame: &[u8]) -> Option<DhcpReply> {
    let mut reply = [0; 400];
    let len = server.handle(frame, &mut reply, NOW)?;
    Some(dhcp_reply(&reply[..len]))
}

#[test]
fn a_server_without_a_gateway_ignores_what_is_not_for_it() {
    let server = DhcpServer::new(dhcp_config());
    let good = Dhcp::discover(ALICE).frame();
    let changed = |change: fn(&mut Ipv4Packet<&mut [u8]>)| {
        let mut frame = good.clone();
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
        change(&mut ip);
        ip.fill_checksum();
        frame[14 + 20 + 6..14 + 20 + 8].fill(0); // no UDP checksum
        ask_server(&server, &frame)
    };
    assert!(changed(|_| {}).is_some());
    assert!(changed(|ip| ip.set_dst_addr(SHARED)).is_some());
    assert!(changed(|ip| ip.set_dst_addr(host(9))).is_none(), "to another");
    assert!(changed(|ip| ip.set_more_frags(true)).is_none(), "a first fragment");
    assert!(changed(|ip| ip.set_frag_offset(8)).is_none(), "a later fragment");
    assert!(changed(|ip| ip.set_next_header(IpProtocol::Tcp)).is_none(), "not UDP");

    // Four bytes of options make the IP header longer.
    let mut longer = good.clone();
    longer.splice(34..34, [1, 1, 1, 0]);
    let mut ip = Ipv4Packet::new_unchecked(&mut longer[14..]);
    ip.set_header_len(24);
    ip.set_total_len(ip.total_len() + 4);
    ip.fill_checksum();
    assert!(ask_server(&server, &longer).is_some());

    // An IP header of 16 bytes would have its destination in the UDP header: port 67 is .0.67.
    let server_ip = Ipv4Addr::new(192, 168, 0, 67);
    let server = DhcpServer::new(DhcpConfig { server: server_ip, ..dhcp_config() });
    let mut shorter = good.clone();
    shorter.drain(30..34);
    shorter[30..32].copy_from_slice(&[192, 168]);
    shorter[36..38].fill(0); // no UDP checksum
    let mut ip = Ipv4Packet::new_unchecked(&mut shorter[14..]);
    ip.set_header_len(16);
    ip.set_total_len(ip.total_len() - 4);
    ip.fill_checksum();
    assert!(ask_server(&server, &shorter).is_none());
}

#[test]
fn a_message_that_is_not_quite_dhcp_is_counted_and_not_answered() {
    let server = DhcpServer::new(dhcp_config());
    let mut good = Dhcp::discover(ALICE).frame();
    good[14 + 20 + 6..14 + 20 + 8].fill(0); // no UDP checksum
    assert!(ask_server(&server, &good).is_some());
    let at = 14 + 28; // where the message begins
    // Opcode, hardware type, length of the hardware address, magic number.
    let bytes = [(0, 2), (1, 6), (2, 5), (236, 0x64)];
    for (offset, byte) in bytes {
        let mut bad = good.clone();
        bad[at + offset] = byte;
        assert!(ask_server(&server, &bad).is_none(), "byte {offset}");
    }
    // The option with the message type has another length than one byte. The bytes that a shorter
    // or longer option leaves are padding or part of it.
    assert_eq!(good[at + 240..at + 243], [53, 1, 1]);
    for option in [[53, 0, 0], [53, 2, 1]] {
        let mut bad = good.clone();
        bad[at + 240..at + 243].copy_from_slice(&option);
        assert!(ask_server(&server, &bad).is_none(), "{option:?}");
    }
    assert_eq!(server.stats().malformed, 6);
}

/// A wide range does not use unbounded memory: the server stops at 65,536 clients.
#[test]
fn a_flood_of_clients_ends_at_the_most_leases() {
    let server = DhcpServer::new(DhcpConfig {
        server: Ipv4Addr::new(10, 0, 0, 1),
        first: Ipv4Addr::new(10, 0, 0, 2),
        last: Ipv4Addr::new(10, 255, 255, 254),
        mask: Ipv4Addr::new(255, 0, 0, 0),
        ..dhcp_config()
    });
    let mut reply = [0; 400];
    let mut offered = 0;
    for number in 0..66_000u32 {
        let [_, b, c, d] = number.to_be_bytes();
        let frame = Dhcp::discover(MacAddr6::new(2, 9, 9, b, c, d)).frame();
        offered += u32::from(server.handle(&frame, &mut reply, NOW).is_some());
    }
    assert_eq!(offered, 65_536);
    assert_eq!(server.stats().exhausted, 66_000 - 65_536);
}

/// A device whose other end is the gateway.
struct Wire<'a> {
    gateway: &'a Gateway,
    now: Duration,
    replies: Vec<Vec<u8>>,
}

struct Sends<'a, 'b>(&'b mut Wire<'a>);

impl TxToken for Sends<'_, '_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        let reply = ask(self.0.gateway, &frame, self.0.now);
        self.0.replies.extend(reply);
        result
    }
}

struct Receives(Vec<u8>);

impl RxToken for Receives {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl<'a> Device for Wire<'a> {
    type RxToken<'b>
        = Receives
    where
        Self: 'b;
    type TxToken<'b>
        = Sends<'a, 'b>
    where
        Self: 'b;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Receives, Sends<'a, '_>)> {
        (!self.replies.is_empty()).then(|| (Receives(self.replies.remove(0)), Sends(self)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sends<'a, '_>> {
        Some(Sends(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// An independent DHCP client, smoltcp's, works with the server from the first message to the
/// renewal.
#[test]
fn smoltcps_own_client_gets_and_renews_a_lease() {
    let gateway = gateway();
    let mut wire = Wire { gateway: &gateway, now: NOW, replies: Vec::new() };
    let start = smoltcp::time::Instant::from_secs(0);
    let mut interface = Interface::new(Config::new(eth(ALICE).into()), &mut wire, start);
    let mut sockets = SocketSet::new(vec![]);
    let client = sockets.add(dhcpv4::Socket::new());
    let mut configured = None;
    for second in 0..3 * HOUR {
        wire.now = NOW + Duration::from_secs(second);
        let now = smoltcp::time::Instant::from_secs(second as i64);
        interface.poll(now, &mut wire, &mut sockets);
        match sockets.get_mut::<dhcpv4::Socket<'_>>(client).poll() {
            Some(dhcpv4::Event::Configured(config)) => {
                assert_eq!(config.address, Ipv4Cidr::new(host(2), 24));
                assert_eq!(config.router, Some(SHARED));
                interface.update_ip_addrs(|addresses| {
                    addresses.clear();
                    addresses.push(IpCidr::Ipv4(config.address)).unwrap();
                });
                configured = Some(second);
            }
            Some(dhcpv4::Event::Deconfigured) if configured.is_some() => {
                panic!("the lease was lost after {second} s");
            }
            _ => {}
        }
    }
    assert!(configured.is_some());
    assert!(gateway.dhcp().stats().acks > 3, "it renewed: {:?}", gateway.dhcp().stats());
    assert!(gateway.stats().arp_replies > 0, "renewals are unicast");
    assert!(gateway.dhcp().lease_of(ALICE, wire.now).is_some());
}
