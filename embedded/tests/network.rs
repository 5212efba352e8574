//! Tests of the switch: which port gets which frame, and which does not.
#![cfg(not(loom))]

mod common;

use core::net::Ipv4Addr;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::*;
use macaddr::MacAddr6;
use smoltcp::wire::DhcpMessageType;
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::clock::{Clock, ManualClock, SystemClock};
use vmring_embedded::limits::MAX_PORTS;
use vmring_embedded::network::mac_of_interface;
use vmring_embedded::{
    AddressRange, DropReason, JoinError, Network, NetworkConfig, NetworkConfigError, NetworkMode,
    OpenError, PortConfig, PortStats, Registry, Sent,
};

/// Far longer than any test needs on a slow and busy machine.
const LONG: Duration = Duration::from_secs(60);

fn network() -> Arc<Network<Buffer>> {
    Network::new(NetworkConfig::default()).unwrap()
}

/// A network, and the clock by which the test moves its time.
fn timed(config: NetworkConfig) -> (Arc<Network<Buffer>>, Arc<ManualClock>) {
    struct Shared(Arc<ManualClock>);
    impl Clock for Shared {
        fn now(&self) -> Duration {
            self.0.now()
        }
    }
    let clock = Arc::new(ManualClock::new());
    (Network::with_clock(config, Box::new(Shared(clock.clone()))).unwrap(), clock)
}

const STRANGER: MacAddr6 = MacAddr6::new(2, 9, 9, 9, 9, 9);
const MULTICAST: MacAddr6 = MacAddr6::new(1, 0, 0x5e, 0, 0, 0xfb);

#[test]
fn a_unicast_frame_reaches_its_destination_and_nobody_else() {
    let network = network();
    let mut guests: Vec<_> = (0..4).map(|id| Guest::join(&network, id)).collect();
    let frame = data(guests[2].mac, guests[0].mac, b"hello");
    assert_eq!(guests[0].sender.send(&frame), Sent::Forwarded);
    guests[0].sender.flush();
    for (index, guest) in guests.iter_mut().enumerate() {
        let expected = if index == 2 { vec![frame.clone()] } else { vec![] };
        assert_eq!(guest.receive(), expected, "guest {index}");
    }
    let stats = guests[0].sender.stats();
    assert_eq!((stats.sent_packets, stats.sent_bytes), (1, frame.len() as u64));
    assert_eq!(guests[2].receiver.stats().received_direct, 1);
    assert_eq!(guests[2].receiver.stats().received_bytes, frame.len() as u64);
}

#[test]
fn broadcast_multicast_and_unknown_reach_all_others_once() {
    let network = network();
    let mut guests: Vec<_> = (0..5).map(|id| Guest::join(&network, id)).collect();
    for to in [MacAddr6::broadcast(), MULTICAST, STRANGER] {
        let frame = data(to, guests[1].mac, b"to all");
        assert_eq!(guests[1].sender.send(&frame), Sent::Flooded { reached: 4 });
        guests[1].sender.flush();
        for (index, guest) in guests.iter_mut().enumerate() {
            let expected = if index == 1 { vec![] } else { vec![frame.clone()] };
            assert_eq!(guest.receive(), expected, "guest {index}");
        }
    }
    let stats = guests[1].sender.stats();
    assert_eq!((stats.sent_floods, stats.sent_to_gateway), (3, 1));
}

/// A bit per port is kept in words of 64. Ports of the second word get floods and wake-ups too.
#[test]
fn a_flood_reaches_and_wakes_ports_beyond_the_64th() {
    let config = NetworkConfig { inbox_depth: 8, ..NetworkConfig::default() };
    let network = Network::<Buffer>::new(config).unwrap();
    let mut guests: Vec<_> = (0..130).map(|id| Guest::join(&network, id)).collect();
    assert!(guests.iter_mut().all(|guest| guest.receiver.arm()));
    let frame = data(MULTICAST, guests[70].mac, b"to all");
    assert_eq!(guests[70].sender.send(&frame), Sent::Flooded { reached: 129 });
    guests[70].sender.flush();
    for (index, guest) in guests.iter_mut().enumerate() {
        let expected = usize::from(index != 70);
        assert_eq!(guest.wakes.load(Ordering::SeqCst), expected, "guest {index}");
        assert_eq!(guest.receive().len(), expected, "guest {index}");
    }
}

/// What a port and a network say about themselves.
#[test]
fn a_port_knows_its_address_its_network_and_its_buffers() {
    let settings = NetworkConfig { inbox_depth: 8, ..NetworkConfig::of(NetworkMode::Host) };
    let network = Network::<Buffer>::new(settings.clone()).unwrap();
    assert_eq!(*network.config(), settings);
    let port = network.join(config(1)).unwrap();
    let mac = port.mac();
    let monitor = port.monitor();
    let (mut receiver, mut sender) = port.split();
    assert_eq!([receiver.mac(), sender.mac(), monitor.mac()], [mac; 3]);
    for its in [receiver.network(), sender.network(), monitor.network()] {
        assert!(Arc::ptr_eq(its, &network));
    }
    let buffer = |number: u8| vec![number; network.max_packet_size()];
    assert_eq!((receiver.posted(), receiver.is_full()), (0, false));
    (0..7).for_each(|number| receiver.stage(buffer(number)).unwrap());
    receiver.post(buffer(7)).unwrap();
    assert_eq!((receiver.posted(), receiver.is_full()), (8, true));
    assert_eq!(receiver.stage(buffer(8)), Err(buffer(8)));
    let mut back = Vec::new();
    assert_eq!(receiver.recall_if(|buffer| buffer[0] < 2, |buffer| back.push(buffer[0])), 2);
    assert_eq!((back, receiver.posted()), (vec![0, 1], 6));
    // Staged buffers are nobody's to fill before they are published.
    let mut other = Guest::join(&network, 2);
    receiver.recall(drop);
    receiver.stage(buffer(5)).unwrap();
    let frame = data(mac, other.mac, b"x");
    let header = frame[..ETHERNET_HEADER_LEN].try_into().unwrap();
    assert!(other.sender.run(header, 1, |_| ()).is_none());
    receiver.publish();
    assert!(other.sender.run(header, 1, |_| ()).unwrap().put(&frame));
    assert!(receiver.collect().is_some());
    assert!(receiver.arm() && receiver.disarm(), "nobody rang");
    // The network's counters are those of its ports.
    sender.send(&data(other.mac, mac, b"y"));
    sender.flush();
    other.sender.flush();
    let expected = [(mac, monitor.stats().unwrap()), (other.mac, other.sender.stats())];
    assert_eq!(network.stats(), expected);
    assert_eq!(expected[0].1.sent_packets, 1);
}

/// Every drop is in the sum once. One that the receiver's port counts is not in its sender's sum.
#[test]
fn the_drops_are_the_sum_of_their_reasons() {
    let mut stats = PortStats::default();
    stats.missed_no_buffer = 1;
    stats.missed_closed = 2;
    stats.dropped_runt = 4;
    stats.dropped_too_big = 8;
    stats.dropped_bad_source = 16;
    stats.dropped_isolated = 32;
    stats.dropped_own_port = 64;
    stats.dropped_no_receiver = 128;
    stats.dropped_reserved = 256;
    stats.missed_receive_limit = 512;
    stats.dropped_spoofed = 1024;
    stats.dropped_send_limit = 2048;
    stats.dropped_flood_limit = 4096;
    stats.dropped_unknown = 8192;
    assert_eq!(stats.drops(), 16_383 - 128);
}

#[test]
fn the_systems_clock_goes() {
    let clock = SystemClock::new();
    let before = clock.now();
    std::thread::sleep(Duration::from_millis(2));
    assert!(clock.now() >= before + Duration::from_millis(2));
}

/// The default depth of the overflow ring is what fits into 512 KiB, between 16 and 256 packets,
/// and a power of two.
#[test]
fn the_default_overflow_depth_follows_the_mtu() {
    for (mtu, depth) in [(1500, 256), (9000, 64), (30_000, 32), (65_521, 16)] {
        let settings = NetworkConfig { mtu, ..NetworkConfig::default() };
        let network = Network::<Buffer>::new(settings).unwrap();
        let mut sender = Guest::join(&network, 1);
        let silent = network.join(config(2)).unwrap();
        let frame = data(silent.mac(), sender.mac, b"x");
        let taken = (0..300).take_while(|_| sender.sender.send(&frame) == Sent::Forwarded).count();
        assert_eq!(taken, depth, "{mtu}");
    }
}

#[test]
fn a_learned_address_is_known_moves_and_ages() {
    let (network, clock) = timed(NetworkConfig::default());
    let mut guests: Vec<_> = (0..3).map(|id| Guest::join(&network, id)).collect();
    let to_stranger = data(STRANGER, guests[0].mac, b"?");
    let from_stranger = data(guests[0].mac, STRANGER, b"!");
    let ask = |guests: &mut Vec<Guest>| {
        let sent = guests[0].sender.send(&to_stranger);
        guests[0].sender.flush();
        let got: Vec<_> = guests.iter_mut().map(|guest| guest.receive().len()).collect();
        (sent, got)
    };
    assert_eq!(ask(&mut guests), (Sent::Flooded { reached: 2 }, vec![0, 1, 1]));
    // The address is behind guest 1 first, and behind guest 2 later.
    guests[1].ask(&from_stranger);
    guests[0].receive();
    assert_eq!(ask(&mut guests), (Sent::Forwarded, vec![0, 1, 0]));
    guests[2].ask(&from_stranger);
    guests[0].receive();
    assert_eq!(ask(&mut guests), (Sent::Forwarded, vec![0, 0, 1]));
    clock.advance(Duration::from_secs(299));
    assert_eq!(ask(&mut guests), (Sent::Forwarded, vec![0, 0, 1]));
    clock.advance(Duration::from_secs(1));
    assert_eq!(ask(&mut guests), (Sent::Flooded { reached: 2 }, vec![0, 1, 1]));
    // An assigned address does not age.
    clock.advance(Duration::from_secs(1_000_000));
    let to_guest = data(guests[1].mac, guests[0].mac, b"still there?");
    assert_eq!(guests[0].sender.send(&to_guest), Sent::Forwarded);
}

/// A run goes where single frames would go, if that is one other port, and is counted like them. In
/// all other cases `run` returns `None`.
#[test]
fn a_run_goes_to_one_port_and_to_no_other() {
    let network = network();
    let mut guests: Vec<_> = (0..3).map(|id| Guest::join(&network, id)).collect();
    let mut hermit = Guest::isolated(&network, 7);
    let header = |to: MacAddr6, from: MacAddr6| {
        let frame = data(to, from, b"");
        <[u8; ETHERNET_HEADER_LEN]>::try_from(&frame[..ETHERNET_HEADER_LEN]).unwrap()
    };
    let (own, to) = (guests[0].mac, guests[1].mac);
    let frames: Vec<_> = (0..3).map(|n| data(to, own, &[n; 50])).collect();
    let mut run = guests[0].sender.run(header(to, own), 3, |_| ()).unwrap();
    assert_eq!(run.left(), 3);
    frames.iter().for_each(|frame| assert!(run.put(frame)));
    assert!(!run.put(&frames[0]), "the run has three frames");
    drop(run);
    guests[0].sender.flush();
    assert_eq!(guests[1].receive(), frames);
    assert_eq!(guests[2].receive(), Vec::<Vec<u8>>::new());
    let stats = guests[0].sender.stats();
    assert_eq!((stats.sent_packets, stats.sent_bytes), (3, 3 * frames[0].len() as u64));

    // The run's second source address is learned, like that of a single frame.
    assert!(guests[0].sender.run(header(to, STRANGER), 1, |_| ()).unwrap().put(&frames[0]));
    assert_eq!(guests[1].sender.send(&data(STRANGER, to, b"back")), Sent::Forwarded);

    let gateway = network.gateway().unwrap().mac();
    for (to, from) in [
        (MacAddr6::broadcast(), own),
        (MULTICAST, own),
        (gateway, own),
        (MacAddr6::new(2, 8, 8, 8, 8, 8), own),
        (own, own),
        (STRANGER, own),
        (hermit.mac, own),
        (to, gateway),
        (to, guests[2].mac),
        (to, MULTICAST),
    ] {
        assert!(guests[0].sender.run(header(to, from), 1, |_| ()).is_none(), "{from} to {to}");
    }
    assert!(hermit.sender.run(header(to, hermit.mac), 1, |_| ()).is_none(), "it is isolated");
    guests[1].receiver.close();
    assert!(guests[0].sender.run(header(to, own), 1, |_| ()).is_none(), "it is closed");
    assert_eq!(guests[0].sender.send(&frames[0]), Sent::Dropped(DropReason::Closed));
}

#[test]
fn a_frame_for_the_port_it_came_from_goes_nowhere() {
    let network = network();
    let mut guest = Guest::join(&network, 1);
    let mut other = Guest::join(&network, 2);
    guest.ask(&data(other.mac, STRANGER, b"a second address behind the port"));
    other.receive();
    for to in [guest.mac, STRANGER] {
        let frame = data(to, guest.mac, b"to myself");
        assert_eq!(guest.sender.send(&frame), Sent::Dropped(DropReason::OwnPort));
    }
    guest.sender.flush();
    assert_eq!((guest.receive().len(), other.receive().len()), (0, 0));
    assert_eq!((guest.sender.stats().dropped_own_port, guest.sender.stats().drops()), (2, 2));
}

#[test]
fn bad_frames_are_dropped_and_counted_by_reason() {
    let network = network();
    let mut guest = Guest::join(&network, 1);
    let mut other = Guest::join(&network, 2);
    let gateway = network.gateway().unwrap().mac();
    let mut drop_of = |frame: &[u8]| match guest.sender.send(frame) {
        Sent::Dropped(reason) => reason,
        sent => panic!("{sent:?}"),
    };
    assert_eq!(drop_of(&[]), DropReason::Runt);
    assert_eq!(drop_of(&[2; 13]), DropReason::Runt);
    let from = |mac| data(other.mac, mac, b"spoofed");
    assert_eq!(drop_of(&vec![2; 1515]), DropReason::TooBig);
    for mac in [gateway, other.mac, MULTICAST, MacAddr6::broadcast(), MacAddr6::nil()] {
        assert_eq!(drop_of(&from(mac)), DropReason::BadSource, "{mac}");
    }
    guest.sender.flush();
    assert!(other.receive().is_empty());
    let stats = guest.sender.stats();
    assert_eq!((stats.dropped_runt, stats.dropped_too_big, stats.dropped_bad_source), (2, 1, 5));
    assert_eq!((stats.drops(), stats.sent_packets), (8, 0));
    // The largest frame arrives complete.
    let mut frame = vec![7; 1514];
    frame[..14].copy_from_slice(&data(other.mac, guest.mac, b"")[..14]);
    guest.ask(&frame);
    assert_eq!(other.receive(), [frame]);
}

/// A tag makes the largest frame four bytes longer. Only a frame with a tag may be that long.
#[test]
fn a_full_frame_with_a_tag_is_forwarded() {
    let network = network();
    let mut guest = Guest::join(&network, 1);
    let mut other = Guest::join(&network, 2);
    let frame = |len: usize, tag: [u8; 2]| {
        let mut frame = data(other.mac, guest.mac, &vec![7; len - 14]);
        frame[12..14].copy_from_slice(&tag);
        frame
    };
    let frames = [(1518, [0x81, 0x00]), (1518, [0x88, 0xa8]), (1514, [0x08, 0x00])];
    let frames = frames.map(|(len, tag)| frame(len, tag));
    let too_big = [(1519, [0x81, 0x00]), (1518, [0x08, 0x00]), (1515, [0x81, 0x01])];
    let too_big = too_big.map(|(len, tag)| frame(len, tag));
    let stranger = data(STRANGER, guest.mac, b"");
    let flooded = [&stranger[..12], &frames[0][12..]].concat();
    for frame in &frames {
        assert_eq!(guest.sender.send(frame), Sent::Forwarded);
    }
    assert_eq!(guest.sender.send(&flooded), Sent::Flooded { reached: 1 });
    for frame in &too_big {
        assert_eq!(guest.sender.send(frame), Sent::Dropped(DropReason::TooBig));
    }
    // A run is for frames without a tag, so what is longer is not put.
    let header = frames[0][..ETHERNET_HEADER_LEN].try_into().unwrap();
    let mut run = guest.sender.run(header, 1, |_| ()).unwrap();
    assert!(!run.put(&too_big[1]) && !run.put(&frames[0]) && run.put(&frames[2]));
    drop(run);
    guest.sender.flush();
    let expected = [&frames[..], &[flooded], &frames[2..]].concat();
    assert_eq!(other.receive(), expected);
    assert_eq!(guest.sender.stats().dropped_too_big, 3);
}

#[test]
fn an_isolated_guest_reaches_the_gateway_and_nobody_else() {
    let network = network();
    let mut hermit = Guest::isolated(&network, 1);
    let mut second = Guest::isolated(&network, 2);
    let mut open = Guest::join(&network, 3);
    let refused = Sent::Dropped(DropReason::Isolated);
    for to in [second.mac, open.mac, MULTICAST, STRANGER] {
        assert_eq!(hermit.sender.send(&data(to, hermit.mac, b"hello?")), refused, "{to}");
    }
    assert_eq!(open.sender.send(&data(hermit.mac, open.mac, b"hello?")), refused);
    // An address learned behind the isolated port is isolated too.
    let hidden = data(network.gateway().unwrap().mac(), STRANGER, b"here");
    assert_eq!(hermit.sender.send(&hidden), Sent::Gateway);
    assert_eq!(open.sender.send(&data(STRANGER, open.mac, b"hello?")), refused);
    let all = data(MacAddr6::broadcast(), open.mac, b"all?");
    assert_eq!(open.sender.send(&all), Sent::Flooded { reached: 0 });
    // Closing and opening it again does not change that.
    second.receiver.close();
    second.receiver.reopen();
    assert_eq!(open.sender.send(&all), Sent::Flooded { reached: 0 });
    hermit.sender.flush();
    open.sender.flush();
    // Its broadcasts reach the gateway, and the gateway's answer reaches no other port.
    let arp = arp_request(hermit.mac, Ipv4Addr::new(192, 168, 64, 9), SHARED);
    assert_eq!(hermit.sender.send(&arp), Sent::Gateway);
    hermit.sender.flush();
    assert_eq!(hermit.receive().len(), 1);
    assert_eq!((second.receive().len(), open.receive().len()), (0, 0));
    assert_eq!(hermit.sender.stats().dropped_isolated, 4);
    assert_eq!(open.sender.stats().dropped_isolated, 2);
}

/// No interface can have the address 00:00:00:00:00:00, so a frame to it goes where a frame to any
/// unknown address goes. It never goes to an isolated port, not even to the one that joined first.
#[test]
fn a_frame_to_the_address_zero_is_one_to_a_stranger() {
    let network = network();
    let mut hermit = Guest::isolated(&network, 1);
    let mut open = Guest::join(&network, 2);
    let mut other = Guest::join(&network, 3);
    let zero = MacAddr6::nil();
    let sent = open.sender.send(&data(zero, open.mac, b"anybody?"));
    assert_eq!(sent, Sent::Flooded { reached: 1 });
    let refused = Sent::Dropped(DropReason::Isolated);
    assert_eq!(hermit.sender.send(&data(zero, hermit.mac, b"anybody?")), refused);
    for guest in [&mut hermit, &mut open, &mut other] {
        guest.sender.flush();
    }
    assert_eq!((hermit.receive().len(), open.receive().len(), other.receive().len()), (0, 0, 1));
    assert_eq!(hermit.sender.stats().dropped_isolated, 1);
}

#[test]
fn guests_get_addresses_and_ping_the_gateway_and_only_the_asker_hears_it() {
    for mode in [NetworkMode::Shared, NetworkMode::Host] {
        let config =
            NetworkConfig { lease_time: Duration::from_secs(600), ..NetworkConfig::of(mode) };
        let gateway_ip = config.ipv4.gateway;
        let network = Network::<Buffer>::new(config).unwrap();
        let mut alice = Guest::join(&network, 1);
        let mut bob = Guest::join(&network, 2);
        let offer = dhcp_reply(&alice.ask(&Dhcp::discover(alice.mac).frame())[0]);
        let router = (mode == NetworkMode::Shared).then_some(gateway_ip);
        assert_eq!((offer.kind, offer.router), (DhcpMessageType::Offer, router));
        let request = Dhcp::select(alice.mac, offer.address, gateway_ip);
        let replies = alice.ask(&Dhcp { broadcast: true, ..request }.frame());
        let ack = dhcp_reply(&replies[0]);
        assert_eq!((ack.kind, ack.lease), (DhcpMessageType::Ack, Some(600)));
        let heard = bob.receive();
        let arp = heard.iter().filter(|frame| frame[12..14] == [8, 6]).count();
        assert_eq!((heard.len(), arp), (3, 1), "the requests and a question, not the replies");
        let lease = network.lease_of(alice.mac).unwrap();
        assert_eq!(lease.address, ack.address);
        let addresses: Vec<_> = network.leases().iter().map(|lease| lease.address).collect();
        assert_eq!(addresses, [lease.address]);
        let gateway = network.gateway().unwrap().mac();
        let request = ping(gateway, alice.mac, ack.address, gateway_ip, 1, b"payload");
        assert_eq!(alice.sender.send(&request), Sent::Gateway);
        alice.sender.flush();
        assert_eq!((alice.receive().len(), bob.receive().len()), (1, 0));
    }
}

#[test]
fn the_mac_follows_from_the_identity() {
    let network = network();
    let mut seen = HashSet::new();
    for id in 0..100_000u64 {
        let mac = mac_of_interface(config(id).interface_id);
        assert!(mac.is_unicast() && mac.is_local());
        assert!(seen.insert(mac), "{mac} twice");
    }
    // These values must never change: a guest keeps its address when the program is updated.
    assert_eq!(mac_of_interface([0; 16]).to_string(), "F6:DB:F7:03:08:57");
    assert_eq!(mac_of_interface([0xff; 16]).to_string(), "2A:15:F4:FC:49:F1");
    assert_eq!(network.gateway().unwrap().mac().to_string(), "12:BE:4E:19:5E:CC");
    let port = network.join(config(5)).unwrap();
    assert_eq!(port.mac(), mac_of_interface(config(5).interface_id));
    let chosen = PortConfig { mac: Some(STRANGER), ..config(6) };
    assert_eq!(network.join(chosen).unwrap().mac(), STRANGER);
}

#[test]
fn a_mac_is_used_once_and_must_be_one() {
    let network = network();
    let first = network.join(config(1)).unwrap();
    let mac = first.mac();
    assert_eq!(network.join(config(1)).unwrap_err(), JoinError::DuplicateMac { mac });
    let with = |mac| network.join(PortConfig { mac: Some(mac), ..config(9) }).unwrap_err();
    let gateway = network.gateway().unwrap().mac();
    assert_eq!(with(gateway), JoinError::DuplicateMac { mac: gateway });
    for mac in [MULTICAST, MacAddr6::nil(), MacAddr6::broadcast()] {
        assert_eq!(with(mac), JoinError::NotUnicast { mac });
    }
    drop(first);
    assert_eq!(network.ports(), 0);
    assert!(network.join(config(1)).is_ok(), "free again");
}

/// As many ports as a network can have join and forward, and the next is refused. A unicast frame
/// costs what it costs on a small network, within a factor that only a search over the ports would
/// exceed.
#[test]
fn a_thousand_ports_join_and_forward() {
    let config = NetworkConfig { inbox_depth: 8, ..NetworkConfig::default() };
    let cost = |ports: usize| {
        let network = Network::<Buffer>::new(config.clone()).unwrap();
        let mut guests: Vec<_> = (0..ports).map(|id| Guest::join(&network, id as u64)).collect();
        for index in 0..ports {
            let frame = data(guests[(index + 7) % ports].mac, guests[index].mac, b"x");
            assert_eq!(guests[index].sender.send(&frame), Sent::Forwarded);
        }
        for guest in &mut guests {
            assert_eq!(guest.receive().len(), 1);
        }
        let frame = data(guests[ports - 1].mac, guests[0].mac, &[0; 46]);
        let mut best = Duration::MAX;
        for _ in 0..20 {
            let start = Instant::now();
            for _ in 0..100 {
                assert_eq!(guests[0].sender.send(&frame), Sent::Forwarded);
                guests[ports - 1].receive();
            }
            best = best.min(start.elapsed());
        }
        if ports == MAX_PORTS {
            assert_eq!(network.join(common::config(5000)).unwrap_err(), JoinError::Full);
            let all = data(MacAddr6::broadcast(), guests[3].mac, b"x");
            let reached = MAX_PORTS as u32 - 1;
            assert_eq!(guests[3].sender.send(&all), Sent::Flooded { reached });
            drop(guests.remove(500));
            assert!(network.join(common::config(5000)).is_ok());
        }
        best
    };
    let (small, large) = (cost(10), cost(MAX_PORTS));
    assert!(large < small * 10, "{large:?} for 100 packets among 1024 ports, {small:?} among 10");
}

#[test]
fn a_slow_closed_or_gone_receiver_never_stalls_its_sender() {
    let config = NetworkConfig { overflow_depth: Some(4), ..NetworkConfig::default() };
    let network = Network::<Buffer>::new(config).unwrap();
    let mut sender = Guest::join(&network, 1);
    let mut slow = Guest::join(&network, 2);
    let frame = data(slow.mac, sender.mac, b"x");
    let sent: Vec<_> = (0..20).map(|_| sender.sender.send(&frame)).collect();
    assert_eq!(sent[..12], [Sent::Forwarded; 12], "8 posted, 4 waiting");
    assert_eq!(sent[12..], [Sent::Dropped(DropReason::NoBuffer); 8]);
    sender.sender.flush();
    assert_eq!(slow.receive().len(), 12);
    let stats = slow.receiver.stats();
    assert_eq!((stats.received_direct, stats.received_overflow), (8, 4));
    assert_eq!((stats.missed_no_buffer, stats.drops()), (8, 8));
    assert_eq!(sender.sender.stats().dropped_no_receiver, 8);
    assert_eq!(sender.sender.stats().drops(), 0, "counted once");
    // The receiver is closed: frames are refused, but earlier packets are still there, and its port
    // can still send.
    assert_eq!(sender.sender.send(&frame), Sent::Forwarded);
    slow.receiver.close();
    assert_eq!(sender.sender.send(&frame), Sent::Dropped(DropReason::Closed));
    let all = data(MacAddr6::broadcast(), sender.mac, b"x");
    assert!(slow.receiver.is_closed());
    assert_eq!(sender.sender.send(&all), Sent::Flooded { reached: 0 });
    assert!(slow.receiver.collect().is_some() && slow.receiver.collect().is_none());
    let mut back = 0;
    slow.receiver.recall(|_| back += 1);
    assert_eq!((back, slow.receiver.posted()), (7, 0));
    assert_eq!(slow.sender.send(&data(sender.mac, slow.mac, b"still")), Sent::Forwarded);
    slow.receiver.reopen();
    assert!(!slow.receiver.is_closed());
    slow.post(1);
    assert_eq!(sender.sender.send(&frame), Sent::Forwarded);
    assert_eq!(slow.receive().len(), 1);
    assert_eq!(sender.sender.send(&all), Sent::Flooded { reached: 1 });
    assert_eq!(slow.receive().len(), 1);
    // The receiver is dropped and the sender stays, so the port stays.
    let monitor = slow.receiver.monitor();
    let Guest { receiver, sender: mut slow_sender, mac, .. } = slow;
    drop(receiver);
    assert_eq!(network.ports(), 2);
    assert_eq!(sender.sender.send(&frame), Sent::Dropped(DropReason::Closed));
    assert_eq!(slow_sender.send(&data(sender.mac, mac, b"still")), Sent::Forwarded);
    // It gets no floods, so they are not counted as missed.
    assert_eq!(sender.sender.send(&all), Sent::Flooded { reached: 0 });
    assert_eq!(monitor.stats().unwrap().missed_closed, 2);
    drop(slow_sender);
    assert_eq!((network.ports(), monitor.stats()), (1, None));
    // The port has left, so its address is unknown again.
    assert_eq!(sender.sender.send(&frame), Sent::Flooded { reached: 0 });
}

#[test]
fn a_reused_port_starts_afresh() {
    let network = network();
    let mut sender = Guest::join(&network, 1);
    let mut old = Guest::join(&network, 2);
    old.ask(&data(sender.mac, STRANGER, b"an address behind the old port"));
    sender.ask(&data(old.mac, sender.mac, b"never collected"));
    sender.receive();
    let old_mac = old.mac;
    drop(old);
    let mut new = Guest::join(&network, 3);
    assert_ne!(new.mac, old_mac);
    assert!(new.receive().is_empty());
    assert_eq!(new.receiver.stats(), Default::default());
    for mac in [STRANGER, old_mac] {
        let frame = data(mac, sender.mac, b"?");
        assert_eq!(sender.sender.send(&frame), Sent::Flooded { reached: 1 });
    }
    assert_eq!(new.receive().len(), 2);
}

#[test]
fn a_sleeper_is_woken_once_per_batch_and_the_awake_never() {
    let network = network();
    let mut sender = Guest::join(&network, 1);
    let mut sleeper = Guest::join(&network, 2);
    let wakes = |guest: &Guest| guest.wakes.load(Ordering::SeqCst);
    let frame = data(sleeper.mac, sender.mac, b"x");
    for _ in 0..5 {
        sender.sender.send(&frame);
    }
    sender.sender.flush();
    assert_eq!(wakes(&sleeper), 0, "it was awake");
    assert!(!sleeper.receiver.arm(), "packets are there");
    sleeper.receive();
    assert!(sleeper.receiver.arm());
    for _ in 0..5 {
        sender.sender.send(&frame);
        assert_eq!(wakes(&sleeper), 0, "not before the flush");
    }
    sender.sender.flush();
    sender.sender.flush();
    assert_eq!(wakes(&sleeper), 1);
    // The frames of a run are like single frames: the flush wakes, once, and nothing before it.
    sleeper.receive();
    assert!(sleeper.receiver.arm());
    let header = frame[..ETHERNET_HEADER_LEN].try_into().unwrap();
    let mut run = sender.sender.run(header, 2, |_| ()).unwrap();
    assert!(run.put(&frame) && run.put(&frame));
    drop(run);
    assert_eq!(wakes(&sleeper), 1, "not before the flush");
    sender.sender.flush();
    sender.sender.flush();
    assert_eq!(wakes(&sleeper), 2);
    // Dropping a sender flushes.
    sleeper.receive();
    assert!(sleeper.receiver.arm());
    let mut second = sender.sender.new_sender();
    second.send(&frame);
    drop(second);
    assert_eq!(wakes(&sleeper), 3);
    assert!(!sleeper.receiver.disarm());
    // A reply of the gateway wakes the port that asked.
    assert!(sender.receiver.arm());
    sender.sender.send(&arp_request(sender.mac, Ipv4Addr::new(192, 168, 64, 9), SHARED));
    sender.sender.flush();
    assert_eq!(wakes(&sender), 1);
}

/// Two guests on two threads really sleep. Every packet arrives, in order, and every sleep ends.
#[test]
fn two_threads_exchange_packets_and_sleep_between() {
    let packets: u32 = if cfg!(debug_assertions) { 20_000 } else { 200_000 };
    let network = network();
    let (tell, told) = mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let ready = Arc::new(AtomicUsize::new(0));
    let mut threads = Vec::new();
    let macs = [1, 2].map(|id| mac_of_interface(config(id).interface_id));
    for side in 0..2usize {
        let (network, tell, stop) = (network.clone(), tell.clone(), stop.clone());
        let ready = ready.clone();
        threads.push(std::thread::spawn(move || {
            let thread = std::thread::current();
            let wake = Arc::new(move || thread.unpark());
            let port = network.join(PortConfig { wake, ..config(side as u64 + 1) }).unwrap();
            let (mut receiver, mut sender) = port.split();
            for _ in 0..64 {
                receiver.post(vec![0; network.max_packet_size()]).unwrap();
            }
            // A port is counted before its receiver is open, so the count does not tell.
            ready.fetch_add(1, Ordering::Release);
            let deadline = Instant::now() + LONG;
            while ready.load(Ordering::Acquire) < 2 {
                assert!(Instant::now() < deadline, "side {side} waits for the other to join");
                std::thread::yield_now();
            }
            // Side 0 sends, and side 1 sends back what it gets. At most 32 packets are under way.
            let (mut sent, mut got) = (0u32, 0u32);
            let mut frame = data(macs[1 - side], macs[side], &[0; 500]);
            while got < packets && !stop.load(Ordering::Relaxed) {
                while side == 0 && sent < packets && sent - got < 32 {
                    frame[20..24].copy_from_slice(&sent.to_be_bytes());
                    assert_eq!(sender.send(&frame), Sent::Forwarded);
                    sent += 1;
                }
                while let Some((buffer, len)) = receiver.collect() {
                    assert_eq!(len, frame.len());
                    assert_eq!(buffer[20..24], got.to_be_bytes());
                    got += 1;
                    if side == 1 {
                        frame[20..24].copy_from_slice(&buffer[20..24]);
                        assert_eq!(sender.send(&frame), Sent::Forwarded);
                    }
                    receiver.post(buffer).unwrap();
                }
                sender.flush();
                // If no packet is under way, no thread wakes us.
                if got < packets && (side == 1 || sent > got) && receiver.arm() {
                    std::thread::park_timeout(Duration::from_secs(20));
                    receiver.disarm();
                }
            }
            tell.send((side, got)).unwrap();
            // Each thread stays until both have ended, so that every packet finds its port.
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            receiver.stats()
        }));
    }
    let mut done = Vec::new();
    for _ in 0..2 {
        done.push(told.recv_timeout(LONG));
    }
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        let stats = thread.join().unwrap();
        assert_eq!(stats.received_direct + stats.received_overflow, u64::from(packets));
        assert_eq!(stats.drops(), 0);
    }
    for result in done {
        assert_eq!(result.unwrap().1, packets);
    }
}

/// Ports join, talk and leave on several threads while others flood them.
#[test]
fn joining_and_leaving_under_traffic_harms_nobody() {
    let network = network();
    let stop = Arc::new(AtomicBool::new(false));
    let mut talker = Guest::join(&network, 1);
    // How often each thread has joined and left.
    let rounds: [Arc<AtomicU64>; 2] = Default::default();
    let threads: Vec<_> = (0..2u64)
        .zip(rounds.clone())
        .map(|(thread, rounds)| {
            let (network, stop) = (network.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let round = rounds.load(Ordering::Relaxed);
                    let mut guest = Guest::join(&network, 100 + thread * 1000 + round % 50);
                    let frame = data(MacAddr6::broadcast(), guest.mac, b"hello all");
                    guest.ask(&frame);
                    for frame in guest.receive() {
                        assert!(frame.ends_with(b"hello all"));
                    }
                    drop(guest);
                    rounds.store(round + 1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let start = Instant::now();
    let mut sent = 0u32;
    let has_run = |rounds: &Arc<AtomicU64>| rounds.load(Ordering::Relaxed) > 10;
    while start.elapsed() < Duration::from_millis(700) || sent <= 100 || !rounds.iter().all(has_run)
    {
        assert!(start.elapsed() < LONG, "the threads do not join again and again: {rounds:?}");
        for id in (0..50).flat_map(|id| [100 + id, 1100 + id]) {
            let to = mac_of_interface(config(id).interface_id);
            talker.sender.send(&data(to, talker.mac, b"hello all"));
            sent += 1;
        }
        talker.sender.flush();
        talker.receive();
    }
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(network.ports(), 1);
}

#[test]
fn a_conflict_names_each_setting_that_differs() {
    static NETWORKS: Registry<Buffer> = Registry::new();
    let shared = NetworkConfig::default();
    let _network = NETWORKS.open("a", &shared).unwrap();
    let said = |change: fn(&mut NetworkConfig)| {
        let mut asked = shared.clone();
        change(&mut asked);
        NETWORKS.open("a", &asked).unwrap_err().to_string()
    };
    assert_eq!(
        said(|config| config.mtu = 9000),
        "the network 'a' exists already, with mtu 1500 and not 9000: join it with its own \
         settings, or name another"
    );
    for (change, words) in [
        (
            (|config| config.mode = NetworkMode::Host) as fn(&mut NetworkConfig),
            "mode Shared and not",
        ),
        (
            |config| config.ipv4.end = [192, 168, 64, 9].into(),
            "and not 192.168.64.1 to 192.168.64.9",
        ),
        (|config| config.inbox_depth = 7, "inbox_depth 1024 and not 7"),
        (|config| config.overflow_depth = Some(7), "overflow its default and not 7"),
        (|config| config.lease_time = Duration::from_secs(60), "lease_time 86400s and not 60s"),
        (|config| config.mac_ageing = Duration::from_secs(60), "mac_ageing 300s and not 60s"),
        (|config| config.dns = vec![[9, 9, 9, 9].into()], "dns [] and not [9.9.9.9]"),
        (
            |config| config.dhcp_first = Some([192, 168, 64, 9].into()),
            "dhcp_range beginning at its default and not 192.168.64.9",
        ),
        (
            |config| {
                let mac = [2, 0, 0, 0, 0, 9].into();
                config.reservations.push((mac, [192, 168, 64, 9].into()));
            },
            "reserve [] and not [02:00:00:00:00:09=192.168.64.9]",
        ),
        (
            |config| config.lease_file = Some("a.leases".into()),
            "lease_file none and not 'a.leases'",
        ),
    ] {
        let sentence = said(change);
        assert!(sentence.contains(words), "no '{words}' in {sentence}");
        assert_eq!(sentence.matches("and not").count(), 1, "nothing else differs: {sentence}");
    }
    let two = said(|config| (config.mtu, config.inbox_depth) = (9000, 7));
    assert!(two.contains("mtu 1500") && two.contains(", with inbox_depth"), "{two}");
}

#[test]
fn a_named_network_lives_as_long_as_somebody_holds_it() {
    static NETWORKS: Registry<Buffer> = Registry::new();
    let shared = NetworkConfig::default();
    let first = NETWORKS.open("a", &shared).unwrap();
    let again = NETWORKS.open("a", &shared).unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    assert!(!Arc::ptr_eq(&first, &NETWORKS.open("b", &shared).unwrap()));
    let host = NetworkConfig::of(NetworkMode::Host);
    let [existing, asked] = [&shared, &host].map(|config| Box::new(config.clone()));
    let conflict = OpenError::Conflict { name: "a".into(), existing, asked };
    assert_eq!(NETWORKS.open("a", &host).unwrap_err(), conflict);
    // A port keeps the network alive, and with it the lease.
    let mut guest = Guest::join(&first, 1);
    guest.ask(&Dhcp::discover(guest.mac).frame());
    drop((first, again));
    assert_eq!(NETWORKS.open("a", &shared).unwrap().ports(), 1);
    drop(guest);
    assert_eq!(NETWORKS.open("a", &host).unwrap().ports(), 0);
    let impossible = NetworkConfig { mtu: 100, ..shared };
    let error = NETWORKS.open("c", &impossible).unwrap_err();
    assert_eq!(error, OpenError::Config(NetworkConfigError::Mtu { mtu: 100 }));
}

#[test]
fn invalid_configurations_are_refused_with_a_sentence() {
    let address = |text: &str| text.parse::<Ipv4Addr>().unwrap();
    let refused = |gateway, end, mask| {
        let range =
            AddressRange { gateway: address(gateway), end: address(end), mask: address(mask) };
        range.check().map_err(|error| error.to_string())
    };
    let refusal = |gateway, end, mask| refused(gateway, end, mask).unwrap_err();
    let net = "255.255.255.0";
    assert!(refusal("10.0.0.1", "10.0.0.9", "255.0.255.0").contains("one bits"));
    assert!(refusal("10.0.0.1", "10.0.0.9", "0.0.0.0").contains("one bits"));
    assert!(refusal("10.0.0.1", "10.0.0.2", "255.255.255.254").contains("too small"));
    assert!(refusal("10.0.0.1", "10.0.0.1", "255.255.255.255").contains("too small"));
    assert!(refusal("8.8.8.1", "8.8.8.9", net).contains("private"));
    assert!(refusal("172.16.0.1", "172.16.0.9", "255.0.0.0").contains("private"));
    assert!(refusal("10.0.0.0", "10.0.0.9", net).contains("cannot be the gateway"));
    assert!(refusal("10.0.0.255", "10.0.0.9", net).contains("cannot be the gateway"));
    assert!(refusal("10.0.0.1", "10.0.1.9", net).contains("cannot end"));
    assert!(refusal("10.0.0.1", "10.0.0.255", net).contains("cannot end"));
    assert!(refusal("10.0.0.1", "10.0.0.1", net).contains("no address is left"));
    assert!(refusal("10.0.0.9", "10.0.0.5", net).contains("no address is left"));
    assert!(refusal("10.0.0.1", "10.0.0.9", "254.0.0.0").contains("private"), "10/7 ends outside");
    assert!(refused("10.0.0.1", "10.0.0.2", "255.255.255.252").is_ok());
    assert!(refused("172.31.0.1", "172.31.255.254", "255.255.0.0").is_ok());
    assert!(refused("10.0.0.1", "10.255.255.254", "255.0.0.0").is_ok());
    let with = |change: fn(&mut NetworkConfig)| {
        let mut config = NetworkConfig::default();
        change(&mut config);
        config.check()
    };
    assert!(with(|_| {}).is_ok());
    assert!(with(|c| c.mtu = 1279).is_err() && with(|c| c.mtu = 1280).is_ok());
    assert!(with(|c| c.mtu = 65_522).is_err() && with(|c| c.mtu = 65_521).is_ok());
    assert!(with(|c| c.inbox_depth = 0).is_err());
    assert!(with(|c| c.overflow_depth = Some(65_537)).is_err());
    assert!(with(|c| c.overflow_depth = Some(65_536)).is_ok());
    assert!(with(|c| c.lease_time = Duration::ZERO).is_err());
    assert!(with(|c| c.mac_ageing = Duration::ZERO).is_err());
    assert!(with(|c| c.dns = vec![SHARED; 4]).is_err());
    assert!(with(|c| c.dns = vec![SHARED; 3]).is_ok());
}

#[test]
fn the_largest_mtu_works_end_to_end() {
    let config = NetworkConfig { mtu: 65_521, ..NetworkConfig::default() };
    let network = Network::<Buffer>::new(config).unwrap();
    assert_eq!(network.max_packet_size(), 65_539);
    let mut alice = Guest::join(&network, 1);
    let mut bob = Guest::join(&network, 2);
    let frame = data(bob.mac, alice.mac, &vec![0x5a; 65_521]);
    alice.ask(&frame);
    assert_eq!(bob.receive(), [frame]);
    let offer = dhcp_reply(&alice.ask(&Dhcp::discover(alice.mac).frame())[0]);
    assert_eq!(offer.mtu, Some(65_521));
    let gateway = network.gateway().unwrap().mac();
    let request = ping(gateway, alice.mac, offer.address, SHARED, 1, &vec![1; 65_521 - 28]);
    assert_eq!(alice.ask(&request)[0].len(), 65_535);
}

/// A hostile guest makes up addresses. The others still reach each other, and no third guest gets
/// their frames.
#[test]
fn a_flood_of_made_up_sources_does_not_turn_the_switch_into_a_hub() {
    let network = network();
    let mut hostile = Guest::join(&network, 1);
    let mut alice = Guest::join(&network, 2);
    let mut bob = Guest::join(&network, 3);
    for number in 0..50_000u32 {
        let [_, b, c, d] = number.to_be_bytes();
        let from = MacAddr6::new(0x0a, 0, 0, b, c, d);
        hostile.sender.send(&data(network.gateway().unwrap().mac(), from, b""));
    }
    hostile.sender.flush();
    for _ in 0..10 {
        let frame = data(bob.mac, alice.mac, b"private");
        assert_eq!(alice.sender.send(&frame), Sent::Forwarded);
    }
    alice.sender.flush();
    assert_eq!((bob.receive().len(), hostile.receive().len()), (10, 0));
    assert!(alice.receive().is_empty());
}

/// Goal: whoever takes a place on the network sees nothing that was for the port before. Method: ports
/// join and leave at one place, each with an address of its own, while others send to all of them, by
/// single frames and by runs. What is for an address that is not there goes to the uplink.
#[test]
fn a_port_gets_no_frame_for_the_one_that_had_its_place() {
    let network = Network::new(NetworkConfig::switch()).unwrap();
    let rounds = if std::env::var_os("VMRING_TEST_SCALE").is_some() { 60 } else { 400 };
    let _uplink = Guest::with(&network, PortConfig { uplink: true, ..config(50) });
    let id_of = |round: u64| 100 + round % 5;
    let addresses: Vec<_> = (0..5)
        .map(|round| {
            let port = network.join(config(id_of(round))).unwrap();
            port.mac()
        })
        .collect();
    let done = &AtomicBool::new(false);
    struct SetAtEnd<'a>(&'a AtomicBool);
    impl Drop for SetAtEnd<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    std::thread::scope(|scope| {
        let _ends = SetAtEnd(done);
        for id in [1, 2] {
            let mut alice = Guest::join(&network, id);
            let addresses = addresses.clone();
            scope.spawn(move || {
                let mut turn = 0usize;
                while !done.load(Ordering::SeqCst) {
                    for to in &addresses {
                        turn += 1;
                        let frame = data(*to, alice.mac, &[7; 50]);
                        let header = *frame.first_chunk().unwrap();
                        if turn.is_multiple_of(2)
                            && let Some(mut run) = alice.sender.run(header, 2, |_| ())
                        {
                            while run.put(&frame) {}
                        } else {
                            alice.sender.send(&frame);
                        }
                    }
                    alice.sender.flush();
                    alice.receive();
                }
            });
        }
        let (mut seen, mut round, start) = (0, 0, Instant::now());
        // The threads that send may begin late.
        while round < rounds || seen == 0 {
            assert!(start.elapsed() < LONG, "no frame comes in {round} rounds");
            let mut bob = Guest::join(&network, id_of(round));
            let until = if round % 3 == 0 { 1 } else { 40 };
            for _ in 0..until {
                for frame in bob.receive() {
                    let to = frame.first_chunk::<6>().unwrap();
                    assert_eq!(*to, bob.mac.into_array(), "round {round}");
                    seen += 1;
                }
                std::thread::yield_now();
            }
            round += 1;
        }
    });
}

/// Goal: what waits in a port when its receiver goes away is counted, in buffers and without.
#[test]
fn what_waits_in_a_receiver_that_is_dropped_is_counted() {
    let network = Network::new(NetworkConfig::default()).unwrap();
    let mut alice = Guest::join(&network, 1);
    // It has eight buffers.
    let bob = Guest::join(&network, 2);
    let frame = data(bob.mac, alice.mac, &[1; 50]);
    for _ in 0..12 {
        assert_eq!(alice.sender.send(&frame), Sent::Forwarded);
    }
    let Guest { receiver, sender, .. } = bob;
    drop(receiver);
    let stats = sender.stats();
    assert_eq!((stats.missed_closed, stats.received_direct), (12, 0));
    assert_eq!(alice.sender.send(&frame), Sent::Dropped(DropReason::Closed));
    assert_eq!(sender.stats().missed_closed, 13);
}
