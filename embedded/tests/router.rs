//! A network's way to other networks: what goes to its router, what comes back, and who is there.
#![cfg(not(loom))]

mod common;

use core::any::Any;
use core::net::{Ipv4Addr, Ipv6Addr};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::*;
use macaddr::MacAddr6;
use smoltcp::wire::{EthernetProtocol, IpProtocol};
use vmring_core::offload::{Checksum, Gso, OffloadHeader, Offloads};
use vmring_embedded::dhcp::AddressHolder;
use vmring_embedded::limits::{ROUTER_BATCH, ROUTER_FRAMES, ROUTER_OVERFLOW};
use vmring_embedded::{
    Accepted, DropReason, Ipv6Config, Network, NetworkConfig, PortConfig, PortFull, Registry,
    Router, RouterBatch, RouterEnd, Sent,
};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 10);

/// A router that keeps its end for the test.
#[derive(Default)]
struct Kept {
    end: Mutex<Option<RouterEnd<Buffer>>>,
    starts: AtomicUsize,
    stops: AtomicUsize,
    /// So many starts fail.
    fails: AtomicUsize,
    wakes: Arc<AtomicUsize>,
}

impl Router<Buffer> for Kept {
    fn start(&self, mut end: RouterEnd<Buffer>) -> io::Result<()> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        let left = self.fails.load(Ordering::SeqCst);
        if left > 0 {
            self.fails.store(left - 1, Ordering::SeqCst);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let wakes = self.wakes.clone();
        end.set_wake(Arc::new(move || {
            wakes.fetch_add(1, Ordering::SeqCst);
        }));
        *self.end.lock().unwrap() = Some(end);
        Ok(())
    }

    fn stop(&self) {
        self.stops.fetch_add(1, Ordering::SeqCst);
        self.end.lock().unwrap().take();
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }

    fn ports_of_gateway(&self) -> Vec<(u8, u16)> {
        vec![(6, 8080), (17, 53)]
    }
}

impl Kept {
    fn with<T>(&self, f: impl FnOnce(&mut RouterEnd<Buffer>) -> T) -> T {
        f(self.end.lock().unwrap().as_mut().expect("the router runs"))
    }

    /// The frames of each port that wait, in the order in which the router gets them.
    fn receive(&self) -> Vec<(u32, Vec<u8>)> {
        self.with(|end| {
            let mut batch = RouterBatch::new();
            let mut all = Vec::new();
            end.look(|_, _| ());
            while let Some(port) = end.receive(&mut batch) {
                for index in 0..batch.len() {
                    all.push((port, batch.get(index).unwrap().0.to_vec()));
                }
            }
            all
        })
    }
}

fn network() -> (Arc<Network<Buffer>>, Arc<Kept>, MacAddr6) {
    let config = NetworkConfig { router: Some(Vec::new()), ..NetworkConfig::default() };
    let network = Network::new(config).unwrap();
    let router: Arc<Kept> = Arc::default();
    network.set_router(router.clone()).unwrap();
    let gateway = network.gateway().unwrap().mac();
    (network, router, gateway)
}

fn to_world(gateway: MacAddr6, from: MacAddr6, payload: &[u8]) -> Vec<u8> {
    let packet = udp((OWN, 4000), (OUTSIDE, 53), payload);
    ethernet(eth(gateway), eth(from), EthernetProtocol::Ipv4, &packet)
}

/// Goal: what is for other networks goes to the router, and what is for the gateway, for a guest or for
/// all does not.
#[test]
fn only_what_is_for_other_networks_goes_to_the_router() {
    let (network, router, gateway) = network();
    let mut alice = Guest::join(&network, 1);
    let mac = alice.mac;
    let ip = |to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]| {
        let packet = ipv4(OWN, to, protocol, payload);
        ethernet(eth(gateway), eth(mac), EthernetProtocol::Ipv4, &packet)
    };
    // Source port 4000, the destination's port, and zeros.
    let ports = |to: u16| [&[0x0f, 0xa0][..], &to.to_be_bytes(), &[0; 20]].concat();
    let (tcp, udp) = (IpProtocol::Tcp, IpProtocol::Udp);
    let mut tagged = ip(OUTSIDE, tcp, &ports(80));
    tagged.splice(12..12, [0x81, 0, 0x20, 0]);
    let mut of_a_vlan = tagged.clone();
    of_a_vlan[15] = 7;
    let mut with_options = ip(SHARED, tcp, &[&[1, 1, 1, 1][..], &ports(8080)].concat());
    with_options[14] = 0x46;
    let mut fragment = ip(SHARED, tcp, &ports(8080));
    fragment[20] = 0x20;
    let broadcast_frame = {
        let packet = ipv4(OWN, OUTSIDE, udp, &ports(53));
        let to = smoltcp::wire::EthernetAddress::BROADCAST;
        ethernet(to, eth(alice.mac), EthernetProtocol::Ipv4, &packet)
    };
    let routed = [
        ("TCP", ip(OUTSIDE, tcp, &ports(80))),
        ("any protocol", ip(OUTSIDE, IpProtocol::Unknown(132), &ports(80))),
        ("with a priority tag", tagged),
        ("a port of the gateway", ip(SHARED, tcp, &ports(8080))),
        ("another one", ip(SHARED, udp, &ports(53))),
        ("behind options", with_options),
    ];
    let not_routed = [
        ("of a VLAN", of_a_vlan),
        ("the gateway's port", ip(SHARED, tcp, &ports(8081))),
        ("another protocol's port", ip(SHARED, udp, &ports(8080))),
        ("a fragment to the gateway", fragment),
        ("an echo request", ping(gateway, alice.mac, OWN, SHARED, 1, b"there?")),
        ("to another guest", ip(Ipv4Addr::new(192, 168, 64, 20), udp, &ports(9))),
        ("to the subnet", ip(Ipv4Addr::new(192, 168, 64, 255), udp, &ports(9))),
        ("to all", ip(Ipv4Addr::BROADCAST, udp, &ports(9))),
        ("to a group", ip(Ipv4Addr::new(224, 0, 0, 251), udp, &ports(9))),
        ("in a broadcast frame", broadcast_frame),
        ("another EtherType", data(gateway, alice.mac, &[0; 40])),
        ("cut short", ip(OUTSIDE, tcp, &ports(80))[..30].to_vec()),
    ];
    for (what, frame) in not_routed {
        alice.ask(&frame);
        assert_eq!(alice.sender.stats().sent_to_router, 0, "{what}");
    }
    assert_eq!(router.starts.load(Ordering::SeqCst), 0, "nothing was for the router");
    for (number, (what, frame)) in routed.iter().enumerate() {
        assert_eq!(alice.sender.send(frame), Sent::Gateway, "{what}");
        alice.sender.flush();
        assert_eq!(alice.sender.stats().sent_to_router, number as u64 + 1, "{what}");
        assert_eq!(router.receive(), [(0, frame.clone())], "{what}");
    }
    assert_eq!(router.starts.load(Ordering::SeqCst), 1);
    // With forwards, a guest answers a peer that has the gateway's address.
    router.with(|end| end.set_all_of_gateway(true));
    for (frame, is_routed) in [(ip(SHARED, tcp, &ports(8081)), 1), (ip(SHARED, udp, &ports(67)), 0)]
    {
        alice.ask(&frame);
        assert_eq!(router.receive().len(), is_routed);
    }
}

const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd12, 0x3456, 0, 1, 0, 0, 0, 0);

fn network_v6() -> (Arc<Network<Buffer>>, Arc<Kept>, MacAddr6) {
    let ipv6 = Some(Ipv6Config::new(PREFIX));
    let config = NetworkConfig { router: Some(Vec::new()), ipv6, ..NetworkConfig::default() };
    let network = Network::new(config).unwrap();
    let router: Arc<Kept> = Arc::default();
    network.set_router(router.clone()).unwrap();
    let gateway = network.gateway().unwrap().mac();
    (network, router, gateway)
}

/// A packet of IPv6 in a frame for one station.
fn frame_v6(macs: (MacAddr6, MacAddr6), ips: (&str, &str), next: u8, rest: &[u8]) -> Vec<u8> {
    let address = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((rest.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(address(ips.0));
    packet.extend(address(ips.1));
    packet.extend(rest);
    ethernet(eth(macs.1), eth(macs.0), EthernetProtocol::Ipv6, &packet)
}

/// Goal: over IPv6, what is for other networks goes to the router, and what is for the gateway, for a
/// guest, for a group, or from or to an address of the link does not.
#[test]
fn only_what_is_for_other_networks_goes_to_the_router_over_ipv6() {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let (network, router, gateway) = network_v6();
    let link_local = network.gateway().unwrap().link_local().unwrap().to_string();
    let mut alice = Guest::join(&network, 1);
    let mac = alice.mac;
    let (own, first) = ("fd12:3456:0:1::a", "fd12:3456:0:1::1");
    let ip =
        |from: &str, to: &str, next, rest: &[u8]| frame_v6((mac, gateway), (from, to), next, rest);
    let ports = |to: u16| [&[0x0f, 0xa0][..], &to.to_be_bytes(), &[0; 20]].concat();
    let behind = |next: u8, rest: &[u8]| [&[next, 0, 1, 4, 0, 0, 0, 0], rest].concat();
    let mut tagged = ip(own, "2001:db8::1", TCP, &ports(80));
    tagged.splice(12..12, [0x81, 0, 0x20, 0]);
    let mut version = ip(own, "2001:db8::1", TCP, &ports(80));
    version[14] = 0x40;
    let routed = [
        ("TCP", ip(own, "2001:db8::1", TCP, &ports(80))),
        ("a neighbour network", ip(own, "fd12:3456:0:2::1", UDP, &ports(80))),
        ("any protocol", ip(own, "2001:db8::1", 132, &[0; 12])),
        ("no payload", ip(own, "2001:db8::1", 59, &[])),
        ("an echo request", ip(own, "2001:db8::1", 58, &[128, 0, 0, 0, 0, 1, 0, 1])),
        ("to loopback, which is denied there", ip(own, "::1", TCP, &ports(80))),
        (
            "from another network, which is refused there",
            ip("2001:db8::9", "2001:db8::1", TCP, &[]),
        ),
        ("with a priority tag", tagged),
        ("a port of the gateway", ip(own, first, TCP, &ports(8080))),
        ("another one", ip(own, first, UDP, &ports(53))),
        ("behind options", ip(own, first, 0, &behind(60, &behind(TCP, &ports(8080))))),
    ];
    let not_routed = [
        ("the gateway's port", ip(own, first, TCP, &ports(8081))),
        ("another protocol's port", ip(own, first, UDP, &ports(8080))),
        ("a fragment to the gateway", ip(own, first, 44, &behind(TCP, &ports(8080)))),
        ("an echo request to the gateway", ip(own, first, 58, &[128, 0, 0, 0, 0, 1, 0, 1])),
        ("endless options", ip(own, first, 0, &behind(0, &behind(0, &[])).repeat(40))),
        ("to the link-local address", ip(own, &link_local, UDP, &ports(53))),
        ("from a link-local address", ip("fe80::a", "2001:db8::1", TCP, &ports(80))),
        ("from one to the gateway", ip("fe80::a", first, UDP, &ports(53))),
        ("from nobody", ip("::", "2001:db8::1", TCP, &ports(80))),
        ("to another link", ip(own, "fe80::b", TCP, &ports(80))),
        ("to another guest", ip(own, "fd12:3456:0:1::b", TCP, &ports(80))),
        ("to the network", ip(own, "fd12:3456:0:1::", TCP, &ports(80))),
        ("to a group", ip(own, "ff0e::1", UDP, &ports(80))),
        ("of another version", version),
        ("cut short", ip(own, "2001:db8::1", TCP, &ports(80))[..50].to_vec()),
        ("cut in front of its ports", ip(own, first, TCP, &ports(8080)[..2])),
    ];
    for (what, frame) in not_routed {
        alice.ask(&frame);
        assert_eq!(alice.sender.stats().sent_to_router, 0, "{what}");
    }
    assert_eq!(router.starts.load(Ordering::SeqCst), 0, "nothing was for the router");
    for (number, (what, frame)) in routed.iter().enumerate() {
        assert_eq!(alice.sender.send(frame), Sent::Gateway, "{what}");
        alice.sender.flush();
        assert_eq!(alice.sender.stats().sent_to_router, number as u64 + 1, "{what}");
        assert_eq!(router.receive(), [(0, frame.clone())], "{what}");
    }
    router.with(|end| end.set_all_of_gateway(true));
    for (port, is_routed) in [((TCP, 8081), 1), ((UDP, 547), 0), ((TCP, 547), 1)] {
        alice.ask(&ip(own, first, port.0, &ports(port.1)));
        assert_eq!(router.receive().len(), is_routed, "{port:?}");
    }
    // A network without IPv6 has nobody for it.
    let (network, router, gateway) = self::network();
    let mut bob = Guest::join(&network, 1);
    bob.ask(&frame_v6((bob.mac, gateway), (own, "2001:db8::1"), TCP, &ports(80)));
    assert_eq!(bob.sender.stats().sent_to_router, 0);
    assert_eq!(router.starts.load(Ordering::SeqCst), 0);
}

/// Goal: the router finds a silent guest by a question, which each guest hears, but nobody behind the uplink,
/// and the gateway knows who has answered.
#[test]
fn the_router_asks_for_a_silent_guest() {
    let (network, router, gateway) = network();
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::isolated(&network, 2));
    let mut uplink = Guest::with(&network, PortConfig { uplink: true, ..config(3) });
    network.start_router().unwrap();
    assert_eq!(router.receive(), []);
    router.with(|end| {
        end.ask_for(OWN.into());
        end.flush();
    });
    for guest in [&mut alice, &mut bob] {
        let question = guest.receive().pop().expect("a question");
        assert_eq!((&question[..6], question[21]), (&[0xff; 6][..], 1), "an ARP request to all");
        assert_eq!(question[22..28], *gateway.as_bytes());
        assert_eq!(question[38..42], OWN.octets());
    }
    assert!(uplink.receive().is_empty());
    bob.ask(&arp_reply(bob.mac, OWN, gateway, SHARED));
    let holder = AddressHolder { address: OWN, mac: bob.mac, port: Some(1), leased: false };
    let dhcp = network.gateway().unwrap().dhcp();
    assert_eq!(dhcp.holders(core::time::Duration::from_secs(1)), [holder]);
}

/// Goal: the router makes the gateway a router of IPv6, and each guest hears of it, but nobody behind the
/// uplink. It finds a silent guest by a question, as over IPv4.
#[test]
fn the_router_speaks_to_all_guests_over_ipv6() {
    let (network, router, gateway) = network_v6();
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::isolated(&network, 2));
    let mut uplink = Guest::with(&network, PortConfig { uplink: true, ..config(3) });
    network.start_router().unwrap();
    assert_eq!(router.receive(), []);
    let lifetime = |frames: Vec<Vec<u8>>| {
        let is_advertisement = |frame: &&Vec<u8>| frame[12..14] == [0x86, 0xdd] && frame[54] == 134;
        let found: Vec<_> = frames.iter().filter(is_advertisement).map(|f| f[60] > 0).collect();
        (found, frames.len())
    };
    for is_router in [true, false] {
        assert!(router.with(|end| end.set_ipv6_router(is_router)), "it has changed");
        assert!(router.with(|end| !end.set_ipv6_router(is_router)), "it has not changed");
        router.with(RouterEnd::flush);
        for guest in [&mut alice, &mut bob] {
            assert_eq!(lifetime(guest.receive()), (vec![is_router], 1));
        }
    }
    router.with(|end| {
        end.advertise_ipv6();
        end.flush();
    });
    assert_eq!(lifetime(alice.receive()), (vec![false], 1));
    assert_eq!(lifetime(bob.receive()), (vec![false], 1));
    let silent: Ipv6Addr = "fd12:3456:0:1::b0b".parse().unwrap();
    router.with(|end| {
        end.ask_for(silent.into());
        end.flush();
    });
    for guest in [&mut alice, &mut bob] {
        let question = guest.receive().pop().expect("a question");
        // It is for the solicited-node group, and a neighbour solicitation of the gateway's.
        assert_eq!(question[..6], [0x33, 0x33, 0xff, 0, 0x0b, 0x0b]);
        assert_eq!((question[21], question[54]), (255, 135));
        assert_eq!(question[62..78], silent.octets());
        assert_eq!(question[78..86], [&[1, 1][..], gateway.as_bytes()].concat());
    }
    assert!(uplink.receive().is_empty());
}

/// Goal: the router learns which guest uses an address from what the guest says to its neighbours, also
/// what it says of itself only, and hears nothing of a guest that has left.
#[test]
fn the_gateway_knows_who_uses_an_address_of_ipv6() {
    let (network, _, gateway_mac) = network_v6();
    let gateway = network.gateway().unwrap();
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    let own = |last: u16| Ipv6Addr::new(0xfd12, 0x3456, 0, 1, 0, 0, 0, last);
    // A solicitation for the gateway's address, and an advertisement.
    let say = |guest: &mut Guest, from: Ipv6Addr, kind: u8, target: Ipv6Addr| {
        let to = own(1);
        let mut message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat();
        smoltcp::wire::Icmpv6Packet::new_unchecked(&mut message[..]).fill_checksum(&from, &to);
        let ips = (&*from.to_string(), &*to.to_string());
        guest.ask(&frame_v6((guest.mac, gateway_mac), ips, 58, &message));
    };
    assert_eq!((gateway.neighbor_changes(), gateway.neighbors(0)), (0, vec![]));
    say(&mut alice, own(0xa), 135, own(1));
    let change = gateway.neighbor_changes();
    let of = |guest: &Guest, address, port| vmring_embedded::gateway::Neighbor {
        address,
        mac: guest.mac,
        port,
    };
    assert_eq!(gateway.neighbors(0), [of(&alice, own(0xa), 0)]);
    say(&mut bob, "fe80::b".parse().unwrap(), 136, own(0xb));
    assert_eq!(gateway.neighbors(change), [of(&bob, own(0xb), 1)]);
    // None of these is a guest's address of the prefix.
    let change = gateway.neighbor_changes();
    for (from, kind, target) in [
        ("fe80::a", 135, own(1)),
        ("fd12:3456:0:1::a", 136, own(1)),
        ("fd12:3456:0:1::a", 136, own(0)),
        ("fd12:3456:0:1::a", 136, "2001:db8::1".parse().unwrap()),
        ("fd12:3456:0:1::1", 135, own(1)),
        ("::", 135, own(0xd)),
    ] {
        say(&mut alice, from.parse().unwrap(), kind, target);
    }
    assert_eq!(gateway.neighbors(change), []);
    let mac = bob.mac;
    drop(bob);
    assert_eq!(gateway.neighbors(0), [of(&alice, own(0xa), 0)], "{mac} has left");
}

/// Goal: a port that floods fills only its own outbox; what it loses is counted, and ports have equal
/// shares of the router.
#[test]
fn a_flood_fills_the_outbox_of_its_own_port_only() {
    let (network, router, gateway) = network();
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    // The router takes the first, so that it has lent its buffers.
    alice.ask(&to_world(gateway, alice.mac, b"first"));
    assert_eq!(router.receive().len(), 1);
    let space = (ROUTER_FRAMES + ROUTER_OVERFLOW) as usize;
    for number in 0..space + 10 {
        let frame = to_world(gateway, alice.mac, &number.to_be_bytes());
        let sent = alice.sender.send(&frame);
        let expected = match number < space {
            true => Sent::Gateway,
            false => Sent::Dropped(DropReason::RouterBusy),
        };
        assert_eq!(sent, expected, "{number}");
    }
    alice.sender.flush();
    let stats = alice.sender.stats();
    assert_eq!((stats.sent_to_router, stats.dropped_router_busy), (space as u64 + 1, 10));
    assert_eq!(stats.drops(), 10);
    assert_eq!(bob.ask(&to_world(gateway, bob.mac, b"mine")), [[0u8; 0]; 0]);
    assert_eq!(bob.sender.stats().dropped_router_busy, 0);
    let received = router.receive();
    assert_eq!(received.len(), space + 1);
    let of_bob = received.iter().position(|(port, _)| *port == 1).unwrap();
    assert!(of_bob <= ROUTER_BATCH, "bob has his turn after one batch of alice's: {of_bob}");
    let of_alice = received.iter().filter(|(port, _)| *port == 0);
    for (number, (_, frame)) in of_alice.enumerate() {
        assert_eq!(*frame, to_world(gateway, alice.mac, &number.to_be_bytes()), "in order");
    }
}

/// Goal: a router that chooses whose frames it takes gets those of that port only, and knows who has some.
#[test]
fn the_router_chooses_whose_frames_it_takes() {
    let (network, router, gateway) = network();
    let mut guests: Vec<_> = (1..=3).map(|number| Guest::join(&network, number)).collect();
    let frames: Vec<_> = guests.iter().map(|guest| to_world(gateway, guest.mac, b"x")).collect();
    // The router takes the first of each, so that it has lent its buffers.
    for (guest, frame) in guests.iter_mut().zip(&frames).skip(1) {
        guest.ask(frame);
    }
    assert_eq!(router.receive().len(), 2);
    for (guest, frame) in guests.iter_mut().zip(&frames).skip(1) {
        for _ in 0..=ROUTER_BATCH {
            assert_eq!(guest.sender.send(frame), Sent::Gateway);
        }
        guest.sender.flush();
    }
    router.with(|end| {
        let mut batch = RouterBatch::new();
        let waiting = |end: &RouterEnd<Buffer>| end.waiting().collect::<Vec<_>>();
        assert_eq!(waiting(end), []);
        end.look(|_, _| ());
        assert_eq!(waiting(end), [1, 2]);
        for len in [ROUTER_BATCH, 1] {
            assert!(end.receive_from(2, &mut batch));
            assert_eq!((batch.len(), batch.get(0).unwrap().0), (len, &frames[2][..]));
        }
        assert_eq!(waiting(end), [1]);
        for nobody in [0, 2, 3, u32::MAX] {
            assert!(!end.receive_from(nobody, &mut batch), "port {nobody}");
            assert_eq!(batch.len(), 0);
        }
        assert_eq!(end.receive(&mut batch), Some(1));
        assert_eq!(batch.get(0).unwrap().0, &frames[1][..]);
        end.give_back(&mut batch);
    });
}

/// Goal: a router that sleeps is woken once per batch, one that is awake never, and none sleeps while
/// something waits.
#[test]
fn the_router_is_woken_once_per_batch() {
    let (network, router, gateway) = network();
    let mut alice = Guest::join(&network, 1);
    let frame = to_world(gateway, alice.mac, b"frame");
    let wakes = || router.wakes.load(Ordering::SeqCst);
    alice.ask(&frame);
    assert!(!router.with(RouterEnd::arm), "a frame waits");
    router.receive();
    assert!(router.with(RouterEnd::arm));
    for _ in 0..5 {
        alice.sender.send(&frame);
    }
    assert_eq!(wakes(), 0);
    alice.sender.flush();
    assert_eq!(wakes(), 1);
    alice.ask(&frame);
    assert_eq!(wakes(), 1, "it is awake");
    router.receive();
    assert!(router.with(RouterEnd::arm));
    drop(alice);
    assert_eq!(wakes(), 2, "a port has left");
    assert!(!router.with(RouterEnd::arm));
}

/// Goal: what the router sends arrives with its header where the receiver accepts that, and done where it
/// does not.
#[test]
fn the_router_sends_what_each_receiver_accepts() {
    let (network, router, gateway) = network();
    let join = |id, offloads| Guest::with(&network, PortConfig { offloads, ..config(id) });
    let (mut plain, mut large) = (join(1, Offloads::default()), join(2, Offloads::ALL));
    for guest in [&mut plain, &mut large] {
        guest.ask(&to_world(gateway, guest.mac, b"here"));
    }
    router.receive();
    let link = |port| router.with(|end| end.link(port));
    assert!(!link(0).offloads.checksum && link(0).longest == 1514);
    assert!(link(1).offloads.tso4 && link(1).longest == 65_549);
    let tcp = [&[0, 80, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10][..], &[1; 3000]].concat();
    let packet = ipv4(OUTSIDE, OWN, IpProtocol::Tcp, &tcp);
    let checksum = Checksum::Partial { start: 34, offset: 16 };
    let partial = OffloadHeader { checksum, ..OffloadHeader::NONE };
    let header = OffloadHeader { gso: Gso::TcpV4, segment_size: 1400, ..partial };
    let frame_to =
        |guest: &Guest| ethernet(eth(guest.mac), eth(gateway), EthernetProtocol::Ipv4, &packet);
    for (port, guest) in [(0, &mut plain), (1, &mut large)] {
        let frame = frame_to(guest);
        router.with(|end| {
            end.send(port, &frame, &header).unwrap();
            end.flush();
        });
    }
    let cut = plain.receive();
    assert_eq!(cut.len(), 3, "two segments of 1400 bytes and a rest");
    assert!(cut.iter().all(|segment| segment.len() <= 1514));
    let (buffer, len) = large.receiver.collect().unwrap();
    assert_eq!((buffer[12..12 + len] == frame_to(&large), len), (true, packet.len() + 14));
    assert_eq!(OffloadHeader::parse(buffer[..12].try_into().unwrap()).unwrap().gso, Gso::TcpV4);
    // A guest that has not negotiated as much.
    large.receiver.recall(drop);
    large.receiver.accept(Accepted::new(Offloads::default()));
    assert!(!link(1).offloads.tso4);
    large.post(8);
    let frame = frame_to(&large);
    router.with(|end| end.send(1, &frame, &header)).unwrap();
    assert_eq!(large.receive().len(), 3);
}

/// Goal: a guest without buffers refuses, says how much it takes, and takes frames again.
#[test]
fn a_full_port_refuses_and_takes_frames_again() {
    let config =
        NetworkConfig { router: Some(Vec::new()), overflow_depth: Some(4), ..Default::default() };
    let network = Network::new(config).unwrap();
    let router: Arc<Kept> = Arc::default();
    network.set_router(router.clone()).unwrap();
    let gateway = network.gateway().unwrap().mac();
    let mut alice = Guest::join(&network, 1);
    alice.ask(&to_world(gateway, alice.mac, b"here"));
    router.receive();
    let packet = udp((OUTSIDE, 53), (OWN, 4000), b"answer");
    let frame = ethernet(eth(alice.mac), eth(gateway), EthernetProtocol::Ipv4, &packet);
    let send = || router.with(|end| end.send(0, &frame, &OffloadHeader::NONE));
    let space = || router.with(|end| end.space(0));
    // Eight buffers, and four places to wait.
    for left in (0..12).rev() {
        assert_eq!(send(), Ok(()));
        assert_eq!(space(), left);
    }
    assert_eq!(send(), Err(PortFull));
    router.with(RouterEnd::flush);
    assert_eq!(alice.receive().len(), 12);
    assert_eq!(space(), 12);
    assert_eq!(send(), Ok(()));
    assert_eq!(alice.receiver.stats().drops(), 0, "what was refused was not dropped");
    alice.receiver.close();
    assert_eq!((space(), send()), (0, Err(PortFull)));
}

/// Goal: a header that says that it is longer than its packet reaches nobody, and ends nobody.
#[test]
fn a_header_that_ends_behind_its_packet_is_no_way_out() {
    let (network, router, gateway) = network_v6();
    let mut alice = Guest::join(&network, 1);
    let mac = alice.mac;
    let frame = |ethertype: EthernetProtocol, packet: &[u8]| {
        ethernet(eth(gateway), eth(mac), ethertype, packet)
    };
    for (protocol, words) in [(IpProtocol::Tcp, 15), (IpProtocol::Udp, 6)] {
        let mut packet = ipv4(OWN, SHARED, protocol, &[]);
        packet[0] = 0x40 | words;
        alice.ask(&frame(EthernetProtocol::Ipv4, &packet));
    }
    let config = network.config().ipv6.clone().unwrap();
    for next in [0, 60] {
        let mut packet = vec![0x60, 0, 0, 0, 0, 8, next, 64];
        packet.extend((u128::from(config.gateway()) + 9).to_be_bytes());
        packet.extend(u128::from(config.gateway()).to_be_bytes());
        packet.extend([6, 255, 0, 0, 0, 0, 0, 0]);
        alice.ask(&frame(EthernetProtocol::Ipv6, &packet));
    }
    assert_eq!(router.starts.load(Ordering::SeqCst), 0);
}

/// Goal: nothing for a port that has left reaches the port that has its place, nor the other way round.
#[test]
fn a_port_that_takes_a_place_has_nothing_of_the_one_before() {
    let (network, router, gateway) = network();
    let mut alice = Guest::join(&network, 1);
    alice.ask(&to_world(gateway, alice.mac, b"here"));
    router.receive();
    let mac = alice.mac;
    alice.ask(&to_world(gateway, mac, b"too late"));
    drop(alice);
    let mut bob = Guest::join(&network, 2);
    bob.ask(&to_world(gateway, bob.mac, b"bob's"));
    // The router does not know of bob yet.
    let frame = data(mac, gateway, b"for alice");
    assert_eq!(router.with(|end| end.send(0, &frame, &OffloadHeader::NONE)), Err(PortFull));
    assert_eq!(bob.receive(), [[0u8; 0]; 0]);
    let mut left = Vec::new();
    router.with(|end| end.look(|port, _| left.push(port)));
    assert_eq!(left, [0]);
    assert_eq!(router.receive(), [(0, to_world(gateway, bob.mac, b"bob's"))]);
    let ports: Vec<_> = router.with(|end| end.ports().collect());
    assert_eq!(ports, [(0, bob.mac)]);
    router.with(|end| end.send(0, &frame, &OffloadHeader::NONE)).unwrap();
    assert_eq!(bob.receive(), [frame]);
    // The router is not told of a port that comes and goes before it looks.
    drop(Guest::join(&network, 3));
    let mut left = Vec::new();
    router.with(|end| end.look(|port, _| left.push(port)));
    assert!(left.is_empty());
}

/// Goal: a router that cannot start or has ended costs nobody more than the frames of a second, and the
/// next one gets the ports.
#[test]
fn a_router_that_ends_is_started_again() {
    let clock = Arc::new(vmring_embedded::clock::ManualClock::new());
    struct Time(Arc<vmring_embedded::clock::ManualClock>);
    impl vmring_embedded::clock::Clock for Time {
        fn now(&self) -> core::time::Duration {
            self.0.now()
        }
    }
    clock.advance(core::time::Duration::from_secs(100));
    let config = NetworkConfig { router: Some(Vec::new()), ..NetworkConfig::default() };
    let network = Network::with_clock(config, Box::new(Time(clock.clone()))).unwrap();
    let router: Arc<Kept> = Arc::default();
    network.set_router(router.clone()).unwrap();
    let gateway = network.gateway().unwrap().mac();
    let mut alice = Guest::join(&network, 1);
    let mut bob = Guest::join(&network, 2);
    router.fails.store(1, Ordering::SeqCst);
    alice.ask(&to_world(gateway, alice.mac, b"1"));
    // The gateway answers that there is no way.
    assert_eq!(alice.ask(&to_world(gateway, alice.mac, b"2")).len(), 1);
    assert_eq!(router.starts.load(Ordering::SeqCst), 1);
    clock.advance(core::time::Duration::from_secs(1));
    assert_eq!(alice.ask(&to_world(gateway, alice.mac, b"3")).len(), 0);
    bob.ask(&to_world(gateway, bob.mac, b"bob's"));
    assert_eq!(router.starts.load(Ordering::SeqCst), 2);
    let received = router.receive();
    assert_eq!(received.len(), 3, "what came before the router waits for it");
    // It ends while a port leaves and another comes.
    let end = router.end.lock().unwrap().take();
    drop(alice);
    let mut carol = Guest::join(&network, 3);
    drop(end);
    clock.advance(core::time::Duration::from_secs(1));
    carol.ask(&to_world(gateway, carol.mac, b"carol's"));
    bob.ask(&to_world(gateway, bob.mac, b"bob's again"));
    assert_eq!(router.starts.load(Ordering::SeqCst), 3);
    let mut left = Vec::new();
    router.with(|end| end.look(|port, _| left.push(port)));
    assert!(left.is_empty(), "the new router has never known alice");
    assert_eq!(router.receive().len(), 2);
    let mut ports: Vec<_> = router.with(|end| end.ports().collect());
    ports.sort();
    assert_eq!(ports, [(0, carol.mac), (1, bob.mac)]);
    network.start_router().unwrap();
    assert_eq!(router.starts.load(Ordering::SeqCst), 3, "it runs");
    drop((bob, carol));
    assert_eq!(router.stops.load(Ordering::SeqCst), 0);
    drop(network);
    assert_eq!(router.stops.load(Ordering::SeqCst), 1, "the network has ended");
}

/// Goal: who has which address is known as soon as a guest has a lease or uses one, with the port, and a
/// port that has left is not named.
#[test]
fn the_gateway_knows_who_has_which_address() {
    let (network, ..) = network();
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    let dhcp = network.gateway().unwrap().dhcp();
    let now = || core::time::Duration::from_secs(1);
    let holders = || {
        let mut holders = dhcp.holders(now());
        holders.sort_by_key(|holder| holder.address);
        holders
    };
    assert_eq!(holders(), []);
    let before = dhcp.changes();
    let offer = dhcp_reply(&alice.ask(&Dhcp::discover(alice.mac).frame())[0]);
    alice.ask(&Dhcp::select(alice.mac, offer.address, SHARED).frame());
    assert_ne!(dhcp.changes(), before);
    let of_alice =
        |port| AddressHolder { address: offer.address, mac: alice.mac, port, leased: true };
    assert_eq!(holders(), [of_alice(Some(0))]);
    // Bob uses an address that was set by hand.
    let address =
        Ipv4Addr::new(192, 168, 64, if offer.address.octets()[3] > 99 { 20 } else { 200 });
    let before = dhcp.changes();
    bob.ask(&arp_request(bob.mac, address, SHARED));
    assert_ne!(dhcp.changes(), before);
    let before = dhcp.changes();
    bob.ask(&arp_request(bob.mac, address, SHARED));
    assert_eq!(dhcp.changes(), before, "nothing is new");
    // Nobody changes anything by what he claims against others.
    alice.ask(&arp_request(alice.mac, address, SHARED));
    assert_eq!(dhcp.changes(), before, "the first claim stands");
    let of_bob = AddressHolder { address, mac: bob.mac, port: Some(1), leased: false };
    assert!(holders().contains(&of_bob) && holders().len() == 2);
    let mac = alice.mac;
    drop((alice, bob));
    let lease = AddressHolder { address: offer.address, mac, port: None, leased: true };
    assert_eq!(holders(), [lease]);
    // She comes back at another port, and is seen there.
    let other = Guest::join(&network, 7);
    let mut alice = Guest::with(&network, PortConfig { mac: Some(mac), ..config(1) });
    alice.ask(&arp_request(mac, offer.address, SHARED));
    assert_eq!(holders(), [AddressHolder { port: Some(1), ..lease }]);
    drop(other);
}

/// Goal: networks whose routers have other settings are different ones.
#[test]
fn settings_of_the_router_are_compared() {
    let registry: Registry<Buffer> = Registry::new();
    let config = |rows: Option<&[(&'static str, &str)]>| NetworkConfig {
        router: rows
            .map(|rows| rows.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()),
        ..NetworkConfig::default()
    };
    let network = registry.open("lab", &config(Some(&[("deny", "[]"), ("allow", "[a]")]))).unwrap();
    let refused = |rows| registry.open("lab", &config(rows)).unwrap_err().to_string();
    assert!(refused(None).contains("with nat yes and not no"));
    assert!(
        refused(Some(&[("deny", "[b]"), ("allow", "[a]")])).contains("with deny [] and not [b]")
    );
    let refused = refused(Some(&[("deny", "[]"), ("limits", "1")]));
    assert!(refused.contains("with allow [a] and not none"), "{refused}");
    assert!(refused.contains("with limits none and not 1"), "{refused}");
    drop(network);
    let config = NetworkConfig { router: Some(Vec::new()), ..NetworkConfig::switch() };
    let error = Network::<Buffer>::new(config).unwrap_err().to_string();
    assert!(error.contains("the setting router is for a gateway"), "{error}");
    // Without the setting nobody can be set.
    let network = Network::new(NetworkConfig::default()).unwrap();
    assert!(network.set_router(Arc::<Kept>::default()).is_none());
    let mut alice = Guest::join(&network, 1);
    let gateway = network.gateway().unwrap().mac();
    assert_eq!(alice.ask(&to_world(gateway, alice.mac, b"no way")).len(), 1, "a refusal");
}

/// A router with several workers, which keeps their ends for the test.
#[derive(Default)]
struct Several {
    ends: Mutex<Vec<Option<RouterEnd<Buffer>>>>,
    wakes: Arc<Mutex<Vec<usize>>>,
    /// The worker whose starts fail.
    fails: Mutex<Option<usize>>,
}

impl Router<Buffer> for Several {
    fn start(&self, mut end: RouterEnd<Buffer>) -> io::Result<()> {
        let worker = end.worker();
        if *self.fails.lock().unwrap() == Some(worker) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let wakes = self.wakes.clone();
        end.set_wake(Arc::new(move || wakes.lock().unwrap().push(worker)));
        let mut ends = self.ends.lock().unwrap();
        let len = ends.len().max(worker + 1);
        ends.resize_with(len, || None);
        ends[worker] = Some(end);
        Ok(())
    }

    fn stop(&self) {
        self.ends.lock().unwrap().clear();
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

impl Several {
    fn with<T>(&self, worker: usize, f: impl FnOnce(&mut RouterEnd<Buffer>) -> T) -> T {
        f(self.ends.lock().unwrap()[worker].as_mut().expect("the worker runs"))
    }

    /// The frames that wait for a worker.
    fn receive(&self, worker: usize) -> Vec<Vec<u8>> {
        self.with(worker, |end| {
            let (mut batch, mut all) = (RouterBatch::new(), Vec::new());
            end.look(|_, _| ());
            while end.receive(&mut batch).is_some() {
                all.extend((0..batch.len()).map(|index| batch.get(index).unwrap().0.to_vec()));
            }
            all
        })
    }
}

const WORKERS: usize = 3;

fn several(fails: Option<usize>) -> (Arc<Network<Buffer>>, Arc<Several>, MacAddr6) {
    let router = Some(Vec::new());
    let config = NetworkConfig { router, router_workers: WORKERS, ..NetworkConfig::default() };
    // Its time stands still.
    let clock = vmring_embedded::clock::ManualClock::new();
    let network = Network::with_clock(config, Box::new(clock)).unwrap();
    let router = Arc::new(Several { fails: Mutex::new(fails), ..Several::default() });
    network.set_router(router.clone()).unwrap();
    let gateway = network.gateway().unwrap().mac();
    (network, router, gateway)
}

fn from_port(macs: (MacAddr6, MacAddr6), port: u16, to: (Ipv4Addr, u16)) -> Vec<u8> {
    let packet = udp((OWN, port), to, b"to the world");
    ethernet(eth(macs.1), eth(macs.0), EthernetProtocol::Ipv4, &packet)
}

/// Goal: what a guest sends from one of its ports is with one worker, whoever the guest is and whomever it
/// sends to, and is in order; what has no port is with the first worker; each worker is woken for its own
/// frames only.
#[test]
fn each_port_of_a_guest_has_one_worker() {
    let (network, router, gateway) = several(None);
    let mut guests = [1, 2].map(|id| Guest::join(&network, id));
    let mut expected = vec![Vec::new(); WORKERS];
    let mut received = vec![Vec::new(); WORKERS];
    for port in 5000..5040 {
        let worker = network.router_worker(17, port);
        for guest in &mut guests {
            for to in [(OUTSIDE, 53), (Ipv4Addr::new(203, 0, 113, 9), 7)] {
                let frame = from_port((guest.mac, gateway), port, to);
                assert!(guest.ask(&frame).is_empty());
                expected[worker].push(frame);
            }
        }
        // Few frames have a place before a worker has begun.
        for (worker, received) in received.iter_mut().enumerate() {
            received.extend(router.receive(worker));
        }
    }
    let fragment = {
        let mut frame = from_port((guests[0].mac, gateway), 5000, (OUTSIDE, 53));
        frame[14 + 6] = 0x20;
        frame
    };
    guests[0].ask(&fragment);
    expected[0].push(fragment);
    received[0].extend(router.receive(0));
    for (worker, (mut expected, mut received)) in expected.into_iter().zip(received).enumerate() {
        assert!(expected.len() > 4, "no port of 40 is with worker {worker}");
        let order = |frames: &[Vec<u8>], mac: MacAddr6| -> Vec<Vec<u8>> {
            let of_it = |frame: &&Vec<u8>| frame[6..12] == mac.into_array();
            frames.iter().filter(of_it).cloned().collect()
        };
        for guest in &guests {
            assert_eq!(order(&received, guest.mac), order(&expected, guest.mac), "{worker}");
        }
        received.sort();
        expected.sort();
        assert_eq!(received, expected, "{worker}");
    }
    let port_of = |worker: usize| {
        (6000..).find(|&port| network.router_worker(17, port) == worker).expect("a port")
    };
    for worker in 0..WORKERS {
        assert!(router.with(worker, RouterEnd::arm));
    }
    router.wakes.lock().unwrap().clear();
    for worker in [2, 1] {
        let frame = from_port((guests[0].mac, gateway), port_of(worker), (OUTSIDE, 53));
        guests[0].ask(&frame);
        guests[0].ask(&frame);
    }
    assert_eq!(*router.wakes.lock().unwrap(), [2, 1]);
    // All workers learn of a port that leaves, and of its generation.
    drop(guests);
    for worker in 0..WORKERS {
        let mut left = Vec::new();
        router.with(worker, |end| end.look(|port, generation| left.push((port, generation))));
        assert_eq!(left, [(0, 0), (1, 0)], "{worker}");
    }
    let mut next = Guest::join(&network, 3);
    next.ask(&from_port((next.mac, gateway), 5000, (OUTSIDE, 53)));
    let worker = network.router_worker(17, 5000);
    assert_eq!(router.receive(worker).len(), 1);
    assert_eq!(router.with(worker, |end| end.generation(0)), Some(1));
    let all_of =
        |network: &Network<Buffer>| (0..=u16::MAX).map(|p| network.router_worker(6, p)).max();
    assert_eq!(all_of(&network), Some(WORKERS - 1));
}

/// Goal: a worker that the system refuses costs its own frames, which the gateway refuses, and no others.
#[test]
fn a_worker_that_does_not_start_costs_its_own_frames() {
    let (network, router, gateway) = several(Some(1));
    let mut alice = Guest::join(&network, 1);
    network.start_router().expect_err("one of them fails");
    for port in 5000..5020 {
        let frame = from_port((alice.mac, gateway), port, (OUTSIDE, 53));
        let worker = network.router_worker(17, port);
        match worker {
            1 => assert_eq!(alice.ask(&frame).len(), 1, "the gateway says that there is no way"),
            _ => assert!(alice.ask(&frame).is_empty()),
        }
    }
    assert!(!router.receive(0).is_empty() && !router.receive(2).is_empty());
    *router.fails.lock().unwrap() = None;
    network.start_router().unwrap();
    assert!(router.receive(1).is_empty());
    for workers in [0, 9] {
        let config = NetworkConfig { router_workers: workers, ..NetworkConfig::default() };
        let refused = Network::<Buffer>::new(config).expect_err("no such number").to_string();
        assert!(refused.contains("it has from 1 to 8"), "{refused}");
    }
}
