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
use vmring_embedded::dhcp::{DhcpConfig, DhcpServer, ReserveError};
use vmring_embedded::gateway::Gateway;
use vmring_embedded::limits::{DHCP_REPLY_MAX, PROBE_TIME};

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
    let len = gateway.handle(frame, 0, &mut reply, now).reply?;
    reply.truncate(len);
    Some(reply)
}

fn dhcp(gateway: &Gateway, message: &Dhcp, now: Duration) -> Option<DhcpReply> {
    ask(gateway, &message.frame(), now).map(|frame| dhcp_reply(&frame))
}

/// Gets an offer. If the server asks first whether somebody uses the address, the client
/// retransmits.
fn offer(gateway: &Gateway, discover: &Dhcp, now: Duration) -> Option<Ipv4Addr> {
    let offer =
        dhcp(gateway, discover, now).or_else(|| dhcp(gateway, discover, now + PROBE_TIME))?;
    assert_eq!(offer.kind, DhcpMessageType::Offer);
    Some(offer.address)
}

/// The address that a server which knows nothing offers a client.
fn first(mac: MacAddr6) -> Ipv4Addr {
    dhcp(&gateway(), &Dhcp::discover(mac), NOW).unwrap().address
}

/// Gets a lease by DISCOVER, OFFER, REQUEST and ACK, and returns its address.
fn lease(gateway: &Gateway, mac: MacAddr6, now: Duration) -> Option<Ipv4Addr> {
    let address = offer(gateway, &Dhcp::discover(mac), now)?;
    let ack = dhcp(gateway, &Dhcp::select(mac, address, SHARED), now)?;
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, address));
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
    assert_eq!((gateway.stats().arp_replies, gateway.stats().other_arp), (2, 1));
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
    let len = gateway.handle(&request, 0, &mut reply, NOW).reply.unwrap();
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
        ping(BOB, ALICE, ALICE_IP, SHARED, 1, b"to another, below"),
        ping(MacAddr6::broadcast(), ALICE, ALICE_IP, Ipv4Addr::BROADCAST, 1, b"to all"),
        ping(MacAddr6::broadcast(), ALICE, ALICE_IP, SHARED, 1, b"to all, below"),
    ];
    for frame in &foreign {
        assert_eq!(ask(&gateway, frame, NOW), None);
    }
    let stats = gateway.stats();
    assert_eq!((stats.bad_source, stats.not_for_us, stats.broadcasts), (3, 1, 2));
}

#[test]
fn an_offer_and_an_ack_say_all_a_guest_needs() {
    let config = DhcpConfig { dns: vec![host(53), host(54)], ..dhcp_config() };
    let gateway = Gateway::new(config);
    let its = first(ALICE);
    let offer = dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap();
    let ack = dhcp(&gateway, &Dhcp::select(ALICE, its, SHARED), NOW).unwrap();
    assert_eq!((offer.kind, ack.kind), (DhcpMessageType::Offer, DhcpMessageType::Ack));
    for reply in [offer, ack] {
        assert_eq!(reply.address, its, "the first choice");
        assert_eq!((reply.to_mac, reply.to_ip), (eth(ALICE), its));
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
    assert_eq!((lease.address, lease.remaining), (its, Duration::from_secs(HOUR)));
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
    assert_eq!(offer.address, first(ALICE));
}

#[test]
fn an_offer_alone_is_no_lease_and_is_held_for_a_minute() {
    let gateway = gateway();
    let its = first(ALICE);
    assert_eq!(dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap().address, its);
    assert!(gateway.dhcp().leases(NOW).is_empty());
    let wanted_by = |mac, seconds| {
        let discover = Dhcp::discover(mac).requested(its);
        offer(&gateway, &discover, NOW + Duration::from_secs(seconds)).unwrap()
    };
    assert_eq!(wanted_by(BOB, 59), first(BOB));
    assert_eq!(wanted_by(mac(1), 60), its);
}

#[test]
fn the_same_mac_gets_the_same_address() {
    let gateway = gateway();
    assert_eq!(lease(&gateway, ALICE, NOW), Some(first(ALICE)));
    assert_eq!(lease(&gateway, BOB, NOW), Some(first(BOB)));
    assert_eq!(lease(&gateway, ALICE, NOW), Some(first(ALICE)));
    // The client gets it long after the lease ran out, and after a release, as long as no other
    // client needed the address. This holds for an address that is not its first choice, too.
    let asked = Dhcp::discover(mac(1)).requested(host(77));
    assert_eq!(offer(&gateway, &asked, NOW), Some(host(77)));
    assert!(dhcp(&gateway, &Dhcp::select(mac(1), host(77), SHARED), NOW).is_some());
    let later = NOW + Duration::from_secs(100 * HOUR);
    assert_eq!(gateway.dhcp().lease_of(mac(1), later), None);
    assert_eq!(lease(&gateway, mac(2), later), Some(first(mac(2))));
    assert_eq!(lease(&gateway, mac(1), later), Some(host(77)));
    let release = Dhcp::new(DhcpMessageType::Release, mac(1)).from(host(77));
    assert!(dhcp(&gateway, &release, later).is_none());
    assert_eq!(gateway.dhcp().lease_of(mac(1), later), None);
    assert_eq!(lease(&gateway, mac(3), later), Some(first(mac(3))));
    assert_eq!(lease(&gateway, mac(1), later), Some(host(77)));
}

#[test]
fn an_address_asked_for_is_given_if_it_is_free() {
    let gateway = gateway();
    let asked = Dhcp::discover(ALICE).requested(host(77));
    // The server asks first whether somebody uses the address.
    assert!(dhcp(&gateway, &asked, NOW).is_none());
    let later = NOW + PROBE_TIME;
    assert_eq!(dhcp(&gateway, &asked, later).unwrap().address, host(77));
    assert!(dhcp(&gateway, &Dhcp::select(ALICE, host(77), SHARED), later).is_some());
    for taken in [host(77), SHARED, host(255), host(0), Ipv4Addr::new(10, 0, 0, 9)] {
        let request = Dhcp::discover(BOB).requested(taken);
        assert_eq!(dhcp(&gateway, &request, NOW).unwrap().address, first(BOB));
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
    let its = dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap().address;
    assert!(dhcp(&gateway, &Dhcp::select(ALICE, host(200), host(250)), NOW).is_none());
    let request = Dhcp::discover(BOB).requested(its);
    assert_eq!(offer(&gateway, &request, NOW), Some(its));
    assert_eq!(gateway.dhcp().stats().other_server, 1);
}

/// The offer ends once. If the client chooses the other server again, our address is no younger.
#[test]
fn an_address_is_free_since_the_offer_ended() {
    let gateway = Gateway::new(DhcpConfig { last: host(3), ..dhcp_config() });
    let at = |seconds| NOW + Duration::from_secs(seconds);
    let elsewhere = Dhcp::select(ALICE, host(200), host(250));
    let its = dhcp(&gateway, &Dhcp::discover(ALICE), at(0)).unwrap().address;
    let other = if its == host(2) { host(3) } else { host(2) };
    assert!(dhcp(&gateway, &elsewhere, at(1)).is_none());
    assert_eq!(offer(&gateway, &Dhcp::discover(BOB).requested(other), at(1)), Some(other));
    assert!(dhcp(&gateway, &Dhcp::select(BOB, other, SHARED), at(2)).is_some());
    let release = Dhcp::new(DhcpMessageType::Release, BOB).from(other);
    assert!(dhcp(&gateway, &release, at(2)).is_none());
    assert!(dhcp(&gateway, &elsewhere, at(3)).is_none());
    assert_eq!(lease(&gateway, mac(1), at(3)), Some(its), "free longest");
}

#[test]
fn init_reboot_follows_the_record() {
    let gateway = gateway();
    let its = lease(&gateway, ALICE, NOW).unwrap();
    let reboot = |mac, address| Dhcp::new(DhcpMessageType::Request, mac).requested(address);
    let ack = dhcp(&gateway, &reboot(ALICE, its), NOW).unwrap();
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, its));
    for (mac, address) in [
        (ALICE, host(3)),
        // The server has no record of the client. It is refused at once, and need not wait.
        (BOB, first(BOB)),
        (BOB, host(9)),
        (BOB, its),
        (BOB, Ipv4Addr::new(10, 0, 2, 15)),
    ] {
        let nak = dhcp(&gateway, &reboot(mac, address), NOW).unwrap();
        assert_eq!(nak.kind, DhcpMessageType::Nak, "{mac} {address}");
    }
    // A client without a record that was seen to use the address keeps it.
    let used = arp_request(BOB, host(9), host(10));
    assert_eq!(ask(&gateway, &used, NOW), None);
    let ack = dhcp(&gateway, &reboot(BOB, host(9)), NOW).unwrap();
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, host(9)));
}

#[test]
fn renewing_and_rebinding_extend_the_lease() {
    let gateway = gateway();
    let its = lease(&gateway, ALICE, NOW).unwrap();
    let half = NOW + Duration::from_secs(HOUR / 2);
    assert_eq!(gateway.dhcp().lease_of(ALICE, half).unwrap().remaining.as_secs(), HOUR / 2);
    let renew = Dhcp::new(DhcpMessageType::Request, ALICE).from(its);
    let ack = dhcp(&gateway, &renew, half).unwrap();
    assert_eq!((ack.kind, ack.address, ack.to_ip), (DhcpMessageType::Ack, its, its));
    assert_eq!(ack.client_ip, its);
    assert_eq!(gateway.dhcp().lease_of(ALICE, half).unwrap().remaining.as_secs(), HOUR);
    // A real renewal comes in unicast.
    let mut unicast = renew.frame();
    let ip = udp((its, 68), (SHARED, 67), &unicast[14 + 28..]);
    unicast = ethernet(eth(GATEWAY_MAC), eth(ALICE), EthernetProtocol::Ipv4, &ip);
    let ack = dhcp_reply(&ask(&gateway, &unicast, half).unwrap());
    assert_eq!(ack.kind, DhcpMessageType::Ack);
    // The address is another client's.
    let theirs = Dhcp::new(DhcpMessageType::Request, BOB).from(its);
    assert_eq!(dhcp(&gateway, &theirs, half).unwrap().kind, DhcpMessageType::Nak);
    // A server that has lost its records keeps a client that uses a free address.
    let ack = dhcp(&gateway, &Dhcp::new(DhcpMessageType::Request, BOB).from(host(9)), half);
    assert_eq!(ack.unwrap().kind, DhcpMessageType::Ack);
    assert_eq!(gateway.dhcp().lease_of(BOB, half).unwrap().address, host(9));
}

/// The address is not given out for an hour, which is longer than a short lease.
#[test]
fn a_declined_address_is_not_given_out() {
    for lease_time in [60, HOUR, 24 * HOUR] {
        let lease_time = Duration::from_secs(lease_time);
        let gateway = Gateway::new(DhcpConfig { lease_time, ..dhcp_config() });
        let its = lease(&gateway, ALICE, NOW).unwrap();
        let decline = Dhcp::new(DhcpMessageType::Decline, ALICE).requested(its);
        assert!(dhcp(&gateway, &decline, NOW).is_none());
        assert_eq!(gateway.dhcp().lease_of(ALICE, NOW), None);
        assert_ne!(lease(&gateway, ALICE, NOW), Some(its));
        for (number, seconds) in [(1, 0), (2, 61), (3, HOUR - 1), (4, HOUR)] {
            let request = Dhcp::discover(mac(number)).requested(its);
            let offered = offer(&gateway, &request, NOW + Duration::from_secs(seconds));
            assert_eq!(offered == Some(its), seconds == HOUR, "after {seconds} s");
        }
        assert_eq!(gateway.dhcp().stats().declines, 1);
        // It has the lease no more, so it cannot decline it again.
        assert!(dhcp(&gateway, &decline, NOW).is_none());
        assert_eq!((gateway.dhcp().stats().declines, gateway.dhcp().stats().no_lease), (1, 1));
    }
}

/// A release counts only from the client that has the address, and only if it is for this server.
#[test]
fn a_release_of_another_address_or_to_another_server_ends_no_lease() {
    let gateway = gateway();
    let its = lease(&gateway, ALICE, NOW).unwrap();
    let release = |address| Dhcp::new(DhcpMessageType::Release, ALICE).from(address);
    let to = |server, address| Dhcp { server: Some(server), ..release(address) };
    for message in [release(host(1)), to(SHARED, host(1)), to(host(250), its)] {
        assert!(dhcp(&gateway, &message, NOW).is_none());
        assert!(gateway.dhcp().lease_of(ALICE, NOW).is_some());
    }
    assert!(dhcp(&gateway, &to(SHARED, its), NOW).is_none());
    assert_eq!(gateway.dhcp().lease_of(ALICE, NOW), None);
    let stats = gateway.dhcp().stats();
    assert_eq!((stats.releases, stats.no_lease, stats.other_server), (1, 2, 1));
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
    let its = lease(&gateway, ALICE, NOW).unwrap();
    for seconds in [0, HOUR - 61] {
        let offer = dhcp(&gateway, &Dhcp::discover(ALICE), at(seconds)).unwrap();
        assert_eq!((offer.address, left(seconds)), (its, Some(HOUR - seconds)));
    }
    let again = dhcp(&gateway, &Dhcp::discover(ALICE), at(HOUR - 60)).unwrap();
    assert_eq!((again.address, left(HOUR - 60)), (its, None), "it is an offer again");
    // The second offer lasts a minute from the time it is made.
    dhcp(&gateway, &Dhcp::discover(ALICE), at(HOUR - 30)).unwrap();
    let ask = |number, seconds| {
        let request = Dhcp::discover(mac(number)).requested(its);
        offer(&gateway, &request, at(seconds)).unwrap()
    };
    assert_ne!(ask(1, HOUR + 29), its);
    assert_eq!(ask(2, HOUR + 30), its);
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
    let mut leased = Vec::new();
    for number in 0..3 {
        let at = NOW + Duration::from_secs(number.into());
        leased.push(lease(&gateway, mac(number), at).unwrap());
    }
    let mut sorted = leased.clone();
    sorted.sort();
    assert_eq!(sorted, [host(2), host(3), host(4)]);
    assert_eq!(lease(&gateway, mac(3), NOW + Duration::from_secs(2)), None);
    assert_eq!(gateway.dhcp().stats().exhausted, 2, "the client asked twice");
    // One lease runs out: the newcomer gets the address, and its old owner gets none.
    let at = NOW + Duration::from_secs(HOUR);
    assert_eq!(lease(&gateway, mac(3), at), Some(leased[0]));
    assert_eq!(lease(&gateway, mac(0), at), None);
    assert_eq!(gateway.dhcp().leases(at).len(), 3);
    // A released address is free at once.
    let release = Dhcp::new(DhcpMessageType::Release, mac(2)).from(leased[2]);
    assert!(dhcp(&gateway, &release, at).is_none());
    assert_eq!(lease(&gateway, mac(0), at), Some(leased[2]));
}

#[test]
fn no_client_gives_up_what_another_has() {
    let gateway = gateway();
    let its = lease(&gateway, ALICE, NOW).unwrap();
    let by_bob = |message: &Dhcp| {
        let mut frame = message.frame();
        frame[6..12].copy_from_slice(BOB.as_bytes()); // Bob sends it
        ask(&gateway, &frame, NOW).map(|frame| dhcp_reply(&frame))
    };
    for kind in [DhcpMessageType::Release, DhcpMessageType::Decline] {
        assert!(by_bob(&Dhcp::new(kind, ALICE).from(its).requested(its)).is_none());
    }
    let lease_now = gateway.dhcp().lease_of(ALICE, NOW).unwrap();
    assert_eq!(gateway.dhcp().stats().foreign, 2);
    // Whatever Bob asks for in her name, she keeps what she has.
    by_bob(&Dhcp::discover(ALICE).requested(host(99)));
    by_bob(&Dhcp::select(ALICE, host(99), SHARED));
    by_bob(&Dhcp::select(ALICE, host(99), host(250)));
    assert_eq!(gateway.dhcp().lease_of(ALICE, NOW), Some(lease_now));
    let renew = Dhcp::new(DhcpMessageType::Request, ALICE).from(its);
    assert_eq!(dhcp(&gateway, &renew, NOW).unwrap().kind, DhcpMessageType::Ack);
}

/// Goal: a client is known by the name that it calls itself as long as it has its lease, and by none that is
/// no host name; nobody else names it, and nobody gets its name with its address.
#[test]
fn a_client_has_the_name_that_it_calls_itself() {
    let gateway = gateway();
    let address = lease(&gateway, ALICE, NOW).unwrap();
    let names = |now| {
        let names = gateway.dhcp().host_names(now);
        names.into_iter().map(|host| (host.address, host.mac, host.name.into_string())).collect()
    };
    let none: [(Ipv4Addr, MacAddr6, String); 0] = [];
    let of_alice = |name: &str| [(address, ALICE, name.to_owned())];
    let renew = |name| Dhcp { name, ..Dhcp::new(DhcpMessageType::Request, ALICE).from(address) };
    let check = |name, expected: &[(Ipv4Addr, MacAddr6, String)]| {
        dhcp(&gateway, &renew(name), NOW).expect("an answer");
        let names: Vec<_> = names(NOW);
        assert_eq!(names, expected);
    };
    check(b"", &none);
    let before = gateway.dhcp().changes();
    check(b"Web-1.example.com", &of_alice("web-1"));
    assert_ne!(gateway.dhcp().changes(), before);
    // What is no name, or no word of it, changes nothing.
    for (bad, name) in [&b"a b"[..], b"-a", b"a_b", b"../etc", b"\xff", &[b'a'; 64]].iter().zip(1..)
    {
        check(bad, &of_alice("web-1"));
        assert_eq!(gateway.dhcp().stats().bad_names, name);
    }
    check(b"", &of_alice("web-1"));
    check(b"db", &of_alice("db"));
    let mut of_another = renew(b"stolen").frame();
    of_another[6..12].copy_from_slice(BOB.as_bytes());
    ask(&gateway, &of_another, NOW).expect("an answer");
    assert_eq!(names(NOW), of_alice("db"));
    let later = NOW + Duration::from_secs(HOUR);
    assert_eq!(names(later), none, "the lease has ended");
    dhcp(&gateway, &renew(b""), NOW).expect("an answer");
    ask(&gateway, &Dhcp::new(DhcpMessageType::Release, ALICE).from(address).frame(), NOW);
    assert_eq!(names(NOW), none, "she has given it back");
    // Bob gets her address.
    let wants = Dhcp::discover(BOB).requested(address);
    assert_eq!(offer(&gateway, &wants, NOW), Some(address));
    let select = Dhcp::select(BOB, address, SHARED);
    let ack = dhcp(&gateway, &select, NOW + PROBE_TIME).unwrap();
    assert_eq!((ack.kind, names(NOW + PROBE_TIME)), (DhcpMessageType::Ack, vec![]));
}

/// Test tools and clients behind other agents send messages for a client in frames of their own.
#[test]
fn a_message_for_a_client_in_anothers_frame_is_served() {
    let gateway = gateway();
    let by_bob = |message: &Dhcp| {
        let mut frame = message.frame();
        frame[6..12].copy_from_slice(BOB.as_bytes());
        ask(&gateway, &frame, NOW).map(|frame| dhcp_reply(&frame))
    };
    let offer = by_bob(&Dhcp::discover(ALICE)).unwrap();
    assert_eq!((offer.address, offer.to_mac), (first(ALICE), eth(ALICE)));
    let ack = by_bob(&Dhcp::select(ALICE, offer.address, SHARED)).unwrap();
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, offer.address));
    assert_eq!(gateway.dhcp().lease_of(ALICE, NOW).unwrap().address, offer.address);
    // The client of the lease can give it back. Another cannot.
    let release = Dhcp::new(DhcpMessageType::Release, ALICE).from(offer.address);
    let mut by_third = release.frame();
    by_third[6..12].copy_from_slice(mac(3).as_bytes());
    assert_eq!(ask(&gateway, &by_third, NOW), None);
    assert!(gateway.dhcp().lease_of(ALICE, NOW).is_some());
    assert!(by_bob(&release).is_none());
    assert_eq!(gateway.dhcp().lease_of(ALICE, NOW), None);
    // What Bob gets in her name does not bind her: she uses another address and keeps it, and
    // nobody gets the one that Bob asked for before its lease is over.
    by_bob(&Dhcp::discover(ALICE));
    by_bob(&Dhcp::select(ALICE, offer.address, SHARED)).unwrap();
    let renew = Dhcp::new(DhcpMessageType::Request, ALICE).from(host(99));
    let ack = dhcp(&gateway, &renew, NOW).unwrap();
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, host(99)));
    let later = NOW + Duration::from_secs(HOUR - 1);
    let wants = Dhcp::discover(mac(1)).requested(offer.address);
    assert_ne!(self::offer(&gateway, &wants, later), Some(offer.address));
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
    let gateway = gateway();
    let server = gateway.dhcp();
    server.reserve(ALICE, host(2), NOW).unwrap();
    let taken = ReserveError::Taken { address: host(2), holder: ALICE };
    assert_eq!(server.reserve(BOB, host(2), NOW), Err(taken));
    for impossible in [SHARED, host(0), host(255), Ipv4Addr::new(10, 0, 0, 1)] {
        let error = ReserveError::OutOfRange(impossible);
        assert_eq!(server.reserve(BOB, impossible, NOW), Err(error));
    }
    let asked = Dhcp::discover(BOB).requested(host(2));
    assert_eq!(offer(&gateway, &asked, NOW), Some(first(BOB)));
    // It is the client's first choice, so it is offered at once.
    assert_eq!(dhcp(&gateway, &Dhcp::discover(ALICE), NOW).unwrap().address, host(2));
    assert!(server.leases(NOW).is_empty());
    assert!(dhcp(&gateway, &Dhcp::select(ALICE, host(2), SHARED), NOW).is_some());
    assert_eq!(server.leases(NOW).len(), 1);
    let release = Dhcp::new(DhcpMessageType::Release, ALICE).from(host(2));
    assert!(dhcp(&gateway, &release, NOW).is_none());
    assert!(server.leases(NOW).is_empty());
    let asked = Dhcp::discover(mac(1)).requested(host(2));
    assert_eq!(offer(&gateway, &asked, NOW), Some(first(mac(1))));
    // Bob had an offer of another address. The reservation gives him this one instead.
    server.reserve(BOB, host(50), NOW).unwrap();
    assert_eq!(dhcp(&gateway, &Dhcp::discover(BOB), NOW).unwrap().address, host(50));
    // An address beyond the range can be reserved.
    let small = Gateway::new(DhcpConfig { first: host(100), last: host(110), ..dhcp_config() });
    small.dhcp().reserve(ALICE, host(20), NOW).unwrap();
    assert_eq!(lease(&small, ALICE, NOW), Some(host(20)));
    assert!((host(100)..=host(110)).contains(&lease(&small, BOB, NOW).unwrap()));
}

/// Nobody gets an address that a lease is still running on, whatever is reserved meanwhile.
#[test]
fn a_reservation_hands_out_no_address_that_is_leased() {
    let gateway = gateway();
    let server = gateway.dhcp();
    // Alice has a lease on the address. It goes on.
    let its = lease(&gateway, ALICE, NOW).unwrap();
    let before = server.lease_of(ALICE, NOW).unwrap();
    server.reserve(ALICE, its, NOW).unwrap();
    assert_eq!(server.lease_of(ALICE, NOW), Some(before));
    // Another address is reserved for her. She may still use the old one, so nobody gets it before
    // the lease's time is over, neither by asking nor by a reservation.
    server.reserve(ALICE, host(20), NOW).unwrap();
    assert_eq!(server.lease_of(ALICE, NOW), None);
    let taken = ReserveError::Taken { address: its, holder: ALICE };
    assert_eq!(server.reserve(mac(9), its, NOW), Err(taken));
    let end = NOW + Duration::from_secs(HOUR);
    let wants = |mac, at| offer(&gateway, &Dhcp::discover(mac).requested(its), at);
    assert_eq!(wants(BOB, end - Duration::from_secs(1)), Some(first(BOB)));
    assert_eq!(wants(mac(1), end), Some(its));
    // Her renewal is refused, so that she asks for the reserved address and gets it.
    let renew = Dhcp::new(DhcpMessageType::Request, ALICE).from(its);
    assert_eq!(dhcp(&gateway, &renew, NOW).unwrap().kind, DhcpMessageType::Nak);
    assert_eq!(lease(&gateway, ALICE, NOW), Some(host(20)));
    // A reservation alone makes no lease.
    server.reserve(mac(2), host(30), Duration::ZERO).unwrap();
    assert_eq!(server.lease_of(mac(2), Duration::ZERO), None);
}

/// A lease from before a restart is on an address that is now reserved for another client. Nobody
/// gets the address twice: its holder is moved away first.
#[test]
fn a_restored_lease_goes_before_a_reservation() {
    let gateway = gateway();
    let server = gateway.dhcp();
    server.reserve(ALICE, host(50), NOW).unwrap();
    assert!(server.restore(BOB, host(50), Duration::from_secs(60), NOW));
    let other = lease(&gateway, ALICE, NOW).unwrap();
    assert_ne!(other, host(50));
    // The holder's renewal is refused, and it gets another address.
    let renew = Dhcp::new(DhcpMessageType::Request, BOB).from(host(50));
    assert_eq!(dhcp(&gateway, &renew, NOW).unwrap().kind, DhcpMessageType::Nak);
    assert_eq!(lease(&gateway, BOB, NOW), Some(first(BOB)));
    // Now the address is free, and its owner is moved to it.
    let renew = Dhcp::new(DhcpMessageType::Request, ALICE).from(other);
    assert_eq!(dhcp(&gateway, &renew, NOW).unwrap().kind, DhcpMessageType::Nak);
    assert_eq!(lease(&gateway, ALICE, NOW), Some(host(50)));
    // A reservation made later is refused while the lease runs.
    let gateway = self::gateway();
    let server = gateway.dhcp();
    assert!(server.restore(BOB, host(50), Duration::from_secs(60), NOW));
    let taken = ReserveError::Taken { address: host(50), holder: BOB };
    assert_eq!(server.reserve(ALICE, host(50), NOW), Err(taken));
    assert_eq!(server.reserve(ALICE, host(50), NOW + Duration::from_secs(60)), Ok(()));
}

/// The client found its reserved address in use. It gets another one, and not the same for ever.
#[test]
fn a_declined_reservation_is_not_offered_until_it_has_rested() {
    let gateway = gateway();
    gateway.dhcp().reserve(ALICE, host(50), NOW).unwrap();
    assert_eq!(lease(&gateway, ALICE, NOW), Some(host(50)));
    let decline = Dhcp::new(DhcpMessageType::Decline, ALICE).requested(host(50));
    assert!(dhcp(&gateway, &decline, NOW).is_none());
    let other = lease(&gateway, ALICE, NOW).unwrap();
    assert_ne!(other, host(50));
    let renew = Dhcp::new(DhcpMessageType::Request, ALICE).from(other);
    let before = NOW + Duration::from_secs(HOUR - 1);
    assert_eq!(dhcp(&gateway, &renew, before).unwrap().kind, DhcpMessageType::Ack);
    // It has rested now, so the client is brought back to it.
    let after = NOW + Duration::from_secs(HOUR);
    assert_eq!(dhcp(&gateway, &renew, after).unwrap().kind, DhcpMessageType::Nak);
    assert_eq!(lease(&gateway, ALICE, after), Some(host(50)));
}

/// Asks a DHCP server that has no gateway in front of it.
fn ask_server(server: &DhcpServer, frame: &[u8]) -> Option<DhcpReply> {
    let mut reply = [0; DHCP_REPLY_MAX];
    let len = server.handle(frame, 0, &mut reply, NOW)?.reply?;
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
    let mut offered = 0;
    for number in 0..66_000u32 {
        let [_, b, c, d] = number.to_be_bytes();
        let frame = Dhcp::discover(MacAddr6::new(2, 9, 9, b, c, d)).frame();
        let reply = |now| server.handle(&frame, 0, &mut [0; DHCP_REPLY_MAX], now).unwrap().reply;
        offered += u32::from(reply(NOW).or_else(|| reply(NOW + PROBE_TIME)).is_some());
    }
    assert_eq!(offered, 65_536);
    assert_eq!(server.stats().exhausted, 2 * (66_000 - 65_536));
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
                assert_eq!(config.address, Ipv4Cidr::new(first(ALICE), 24));
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
