//! What a port may do: source addresses, and limits.
#![cfg(not(loom))]

mod common;

use core::net::Ipv4Addr;
use core::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::*;
use macaddr::MacAddr6;
use smoltcp::wire::{DhcpMessageType, EthernetAddress, EthernetProtocol};
use vmring_core::offload::{Checksum, OffloadHeader, Offloads};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::clock::{Clock, ManualClock};
use vmring_embedded::limits::{
    DHCP_MESSAGES_AT_ONCE, DHCP_MESSAGES_PER_SECOND, FLOODS_AT_ONCE, FLOODS_PER_SECOND,
};
use vmring_embedded::{
    DropReason, JoinError, Network, NetworkConfig, Packet, PortConfig, PortLimits, PortPolicy,
    PortRole, Rate, RateLimit, Sender, Sent, SourceRule,
};

struct Shared(Arc<ManualClock>);

impl Clock for Shared {
    fn now(&self) -> Duration {
        self.0.now()
    }
}

/// A network, and the clock by which the test moves its time.
fn timed() -> (Arc<Network<Buffer>>, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::new());
    let network = Network::with_clock(NetworkConfig::default(), Box::new(Shared(clock.clone())));
    (network.unwrap(), clock)
}

const STRANGER: MacAddr6 = MacAddr6::new(2, 9, 9, 9, 9, 9);
const OTHER: MacAddr6 = MacAddr6::new(2, 8, 8, 8, 8, 8);
const MULTICAST: MacAddr6 = MacAddr6::new(1, 0, 0x5e, 0, 0, 0xfb);
const IP: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 10);

const SPOOFED: Sent = Sent::Dropped(DropReason::Spoofed);
const BAD_SOURCE: Sent = Sent::Dropped(DropReason::BadSource);
const OVER_SEND: Sent = Sent::Dropped(DropReason::SendLimit);
const OVER_RECEIVE: Sent = Sent::Dropped(DropReason::ReceiveLimit);
const OVER_FLOOD: Sent = Sent::Dropped(DropReason::FloodLimit);

fn rate(per_second: u64, burst: u64) -> Rate {
    let number = |number| NonZeroU64::new(number).unwrap();
    Rate { per_second: number(per_second), burst: number(burst) }
}

fn packets(per_second: u64, burst: u64) -> RateLimit {
    RateLimit { packets: Some(rate(per_second, burst)), ..RateLimit::default() }
}

fn bytes(per_second: u64, burst: u64) -> RateLimit {
    RateLimit { bytes: Some(rate(per_second, burst)), ..RateLimit::default() }
}

fn guest(network: &Arc<Network<Buffer>>, id: u64, source: SourceRule) -> Guest {
    let policy = PortPolicy { source, ..PortPolicy::default() };
    Guest::with(network, PortConfig { policy, ..config(id) })
}

fn limited(network: &Arc<Network<Buffer>>, id: u64, limits: PortLimits) -> Guest {
    let policy = PortPolicy { limits, ..PortPolicy::default() };
    Guest::with(network, PortConfig { policy, ..config(id) })
}

fn header(frame: &[u8]) -> [u8; ETHERNET_HEADER_LEN] {
    *frame.first_chunk().unwrap()
}

/// Sends a frame as a batch of its own.
fn send(sender: &mut Sender<Buffer>, frame: &[u8]) -> Sent {
    let sent = sender.send(frame);
    sender.flush();
    sent
}

/// Sends a frame so many times in one batch. Returns how many were forwarded, flooded or given to
/// the gateway, and checks that all others ended as `refused`.
fn pass(sender: &mut Sender<Buffer>, frame: &[u8], times: u32, refused: Sent) -> u32 {
    let mut passed = 0;
    for _ in 0..times {
        match sender.send(frame) {
            sent if sent == refused => {}
            Sent::Dropped(reason) => panic!("{reason:?}"),
            _ => passed += 1,
        }
    }
    sender.flush();
    passed
}

// ---- Source addresses ----

#[test]
fn a_fixed_port_sends_from_its_own_address_only() {
    let (network, _) = timed();
    let mut alice = guest(&network, 1, SourceRule::Fixed);
    let (mut bob, mut carol) = (Guest::join(&network, 2), Guest::join(&network, 3));
    assert_eq!(send(&mut alice.sender, &data(bob.mac, alice.mac, b"mine")), Sent::Forwarded);
    let forged = data(bob.mac, STRANGER, b"not mine");
    assert_eq!(send(&mut alice.sender, &forged), SPOOFED);
    assert!(alice.sender.run(header(&forged), 1, |_| ()).is_none());
    assert_eq!(send(&mut alice.sender, &data(bob.mac, bob.mac, b"his")), SPOOFED);
    let group = data(bob.mac, MULTICAST, b"nobody's");
    assert_eq!(send(&mut alice.sender, &group), BAD_SOURCE);
    assert_eq!(bob.receive().len(), 1);
    // The forged address was not learned.
    let flooded = Sent::Flooded { reached: 2 };
    assert_eq!(send(&mut carol.sender, &data(STRANGER, carol.mac, b"where?")), flooded);
    let stats = alice.sender.stats();
    assert_eq!((stats.dropped_spoofed, stats.dropped_bad_source, stats.drops()), (2, 1, 3));
    assert_eq!(stats.sent_packets, 1);
}

#[test]
fn a_port_with_one_source_sends_no_arp_of_another() {
    let (network, _) = timed();
    for (id, source) in [(1, SourceRule::Fixed), (2, SourceRule::LearnOnce)] {
        let mut alice = guest(&network, id, source);
        let mut bob = Guest::join(&network, 9);
        let (own, to) = (alice.mac, bob.mac);
        let honest = [arp_request(own, IP, SHARED), arp_reply(own, IP, to, SHARED)];
        for frame in &honest {
            assert!(!matches!(send(&mut alice.sender, frame), Sent::Dropped(_)));
        }
        assert_eq!(bob.receive().len(), 2);
        let reply = arp_reply(STRANGER, SHARED, to, IP);
        let mut forged = reply.clone();
        forged[6..12].copy_from_slice(own.as_bytes());
        let rarp = [&forged[..12], &[0x80, 0x35], &forged[14..]].concat();
        let tagged = |tags: &[u8]| [&forged[..12], tags, &forged[12..]].concat();
        let tag = [0x81, 0, 0, 7];
        for frame in [
            forged.clone(),
            rarp,
            tagged(&tag),
            tagged(&[[0x88, 0xa8, 0, 7], tag].concat()),
            tagged(&[tag, tag, tag].concat()),
            tagged(&tag.repeat(8)),
            forged[..27].to_vec(),
        ] {
            assert_eq!(send(&mut alice.sender, &frame), SPOOFED, "{frame:x?}");
        }
        // A run decides by the header, which does not name the sender.
        for first in [header(&honest[1]), header(&tagged(&tag))] {
            assert!(alice.sender.run(first, 1, |_| ()).is_none());
        }
        assert!(alice.sender.run(header(&data(to, own, b"")), 1, |_| ()).is_some());
        assert_eq!(alice.sender.stats().dropped_spoofed, 7);
        // What looks like one and is none passes, however short it is.
        for payload in [&b"\x08\x06 and more bytes than an ARP packet has"[..], b""] {
            assert_eq!(send(&mut alice.sender, &data(to, own, payload)), Sent::Forwarded);
        }
        let short = tagged(&tag)[..16].to_vec();
        assert_eq!(send(&mut alice.sender, &short), Sent::Forwarded);
        // A port with any source may be a bridge, whose ARP packets are other stations'.
        assert_eq!(send(&mut bob.sender, &arp_reply(STRANGER, IP, own, SHARED)), Sent::Forwarded);
    }
}

// ---- Roles ----

/// A router advertisement, from one station to another.
fn advertisement(to: MacAddr6, from: MacAddr6) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 16, 58, 255];
    packet.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
    packet.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([134, 0, 0, 0, 64, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    ethernet(eth(to), eth(from), EthernetProtocol::Ipv6, &packet)
}

/// Goal: a guest is no router and no DHCP server for others, to one of them or to all, plain or with a
/// checksum left out; what else it sends arrives as it was. A port of any role may be both.
#[test]
fn a_host_is_no_router_and_no_server() {
    let (network, _) = timed();
    let mut bob = Guest::join(&network, 9);
    for (id, offload) in [(1, false), (2, true)] {
        let mut offloads = Offloads::default();
        (offloads.checksum, offloads.virtio_header) = (offload, offload);
        let policy = PortPolicy { role: PortRole::Host, ..PortPolicy::default() };
        let alice = PortConfig { policy, offloads, ..config(id) };
        let mut alice = Guest::with(&network, alice);
        let (own, to) = (alice.mac, bob.mac);
        let all = MacAddr6::broadcast();
        let datagram = |from, to| udp((IP, from), ([192, 168, 64, 9].into(), to), b"some bytes");
        let framed =
            |to, packet: &[u8]| ethernet(eth(to), eth(own), EthernetProtocol::Ipv4, packet);
        let tagged = |frame: &[u8]| [&frame[..12], &[0x81, 0, 0, 7], &frame[12..]].concat();
        let mut refused = vec![advertisement(to, own), advertisement(all, own)];
        refused.push(framed(to, &datagram(67, 68)));
        refused.push(framed(all, &datagram(67, 68)));
        for frame in &refused {
            for frame in [frame.clone(), tagged(frame)] {
                let role = Sent::Dropped(DropReason::Role);
                assert_eq!(send(&mut alice.sender, &frame), role, "{frame:x?}");
                assert!(alice.sender.run(header(&frame), 1, |_| ()).is_none());
            }
        }
        if offload {
            let frame = framed(to, &datagram(67, 68));
            let start = Checksum::Partial { start: 34, offset: 6 };
            let work = OffloadHeader { checksum: start, ..OffloadHeader::NONE };
            let packet = Packet::from(&frame[..]).with_offload(&work);
            assert_eq!(alice.sender.send_packet(packet), Sent::Dropped(DropReason::Role));
        }
        alice.sender.flush();
        assert!(bob.receive().is_empty());
        let stats = alice.sender.stats();
        assert_eq!(
            (stats.dropped_role, stats.drops()),
            (8 + u64::from(offload), stats.dropped_role)
        );
        // These are a question for a server, other datagrams, and what is no IP.
        let mut fine = vec![framed(to, &datagram(68, 67)), framed(to, &datagram(1000, 2000))];
        fine.push(data(to, own, b"x"));
        fine.push(advertisement(to, own));
        fine[3][54] = 133;
        for frame in &fine {
            assert_eq!(send(&mut alice.sender, frame), Sent::Forwarded);
        }
        assert!(bob.receive() == fine);
        assert!(alice.sender.run(header(&data(to, own, b"")), 1, |_| ()).is_some());
        bob.receive();
    }
    let mut carol = Guest::join(&network, 3);
    let frame = advertisement(bob.mac, carol.mac);
    assert_eq!(send(&mut carol.sender, &frame), Sent::Forwarded);
    assert!(carol.sender.run(header(&frame), 1, |_| ()).is_some());
}

#[test]
fn a_port_that_learns_once_is_bound_to_its_first_source() {
    let (network, clock) = timed();
    let mut alice = guest(&network, 1, SourceRule::LearnOnce);
    let mut bob = Guest::join(&network, 2);
    let assigned = alice.mac;
    // What is nobody's or another's binds nothing.
    for source in [MULTICAST, bob.mac, network.gateway().unwrap().mac(), MacAddr6::nil()] {
        assert_eq!(send(&mut alice.sender, &data(bob.mac, source, b"?")), BAD_SOURCE, "{source}");
    }
    assert_eq!(send(&mut alice.sender, &data(bob.mac, STRANGER, b"first")), Sent::Forwarded);
    for source in [assigned, OTHER, bob.mac] {
        assert_eq!(send(&mut alice.sender, &data(bob.mac, source, b"second")), SPOOFED, "{source}");
    }
    let mut second = alice.sender.new_sender();
    assert_eq!(second.send(&data(bob.mac, OTHER, b"of a second sender")), SPOOFED);
    assert_eq!(second.send(&data(bob.mac, STRANGER, b"of a second sender")), Sent::Forwarded);
    let frame = data(bob.mac, STRANGER, b"of a run");
    assert!(alice.sender.run(header(&frame), 1, |_| ()).unwrap().put(&frame));
    alice.sender.flush();
    // The address is the port's own: it does not age, and nobody else sends from it.
    clock.advance(Duration::from_secs(1_000_000));
    bob.receive();
    assert_eq!(send(&mut bob.sender, &data(STRANGER, bob.mac, b"to it")), Sent::Forwarded);
    assert_eq!(send(&mut bob.sender, &data(assigned, STRANGER, b"from it")), BAD_SOURCE);
    assert_eq!(alice.receive().len(), 1);
    let twin = PortConfig { mac: Some(STRANGER), ..config(3) };
    assert_eq!(network.join(twin).unwrap_err(), JoinError::DuplicateMac { mac: STRANGER });
    // When the port leaves, the address is free, and a port in its place starts anew.
    drop((second, alice));
    let mut next = guest(&network, 4, SourceRule::LearnOnce);
    assert_eq!(
        send(&mut bob.sender, &data(STRANGER, bob.mac, b"where?")),
        Sent::Flooded { reached: 1 }
    );
    assert_eq!(send(&mut next.sender, &data(bob.mac, OTHER, b"first")), Sent::Forwarded);
    assert_eq!(send(&mut bob.sender, &data(next.mac, STRANGER, b"from it")), Sent::Forwarded);
    // Its own address does as well as another.
    let mut last = guest(&network, 5, SourceRule::LearnOnce);
    let own = last.mac;
    assert_eq!(send(&mut last.sender, &data(bob.mac, own, b"first")), Sent::Forwarded);
    assert_eq!(send(&mut last.sender, &data(bob.mac, THIRD, b"second")), SPOOFED);
    drop(last);
    assert!(network.join(PortConfig { mac: Some(own), ..config(6) }).is_ok());
}

const THIRD: MacAddr6 = MacAddr6::new(2, 7, 7, 7, 7, 7);

/// Two threads send the first frames of a port at the same time. It is bound to one address and not
/// to two.
#[test]
fn two_senders_bind_a_port_to_one_address() {
    (0..10).for_each(|_| bind_a_thousand_ports_twice());
}

fn bind_a_thousand_ports_twice() {
    let settings =
        NetworkConfig { inbox_depth: 1, overflow_depth: Some(1), ..NetworkConfig::default() };
    let network = Network::<Buffer>::new(settings).unwrap();
    let policy = PortPolicy { source: SourceRule::LearnOnce, ..PortPolicy::default() };
    let ports: Vec<_> = (0..1000)
        .map(|id| network.join(PortConfig { policy, ..config(id) }).unwrap().split())
        .collect();
    let senders = || ports.iter().map(|(_, sender)| sender.new_sender()).collect::<Vec<_>>();
    let at = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let first = |side: usize, senders: Vec<Sender<Buffer>>| {
        let mut sent = Vec::new();
        for (round, mut sender) in senders.into_iter().enumerate() {
            let [high, low] = (round as u16).to_be_bytes();
            let source = MacAddr6::new(6, 0, 0, side as u8, high, low);
            let frame = data(MULTICAST, source, b"first");
            at[side].store(round + 1, Ordering::SeqCst);
            let mut waits = 0;
            while at[1 - side].load(Ordering::SeqCst) <= round {
                waits += 1;
                if waits % 100 == 0 {
                    std::thread::yield_now();
                }
            }
            // The other sees this a little later. How much later depends on the machine.
            if round % 2 == side {
                (0..round % 200).for_each(|_| std::hint::spin_loop());
            }
            sent.push(sender.send(&frame));
        }
        sent
    };
    let (ours, theirs) = (senders(), senders());
    let [ours, theirs] = std::thread::scope(|scope| {
        let threads = [scope.spawn(|| first(0, ours)), scope.spawn(|| first(1, theirs))];
        threads.map(|thread| thread.join().unwrap())
    });
    for sent in ours.iter().zip(&theirs) {
        let flooded = |sent: &Sent| matches!(sent, Sent::Flooded { .. });
        assert!(flooded(sent.0) != flooded(sent.1), "{sent:?}");
        assert!(*sent.0 == SPOOFED || *sent.1 == SPOOFED, "{sent:?}");
    }
}

// ---- Limits ----

#[test]
fn a_send_limit_in_packets_drops_what_is_over_it() {
    let (network, clock) = timed();
    let limits = PortLimits { send: packets(1000, 5), ..PortLimits::default() };
    let mut alice = limited(&network, 1, limits);
    let mut bob = Guest::join(&network, 2);
    let frame = data(bob.mac, alice.mac, b"one of many");
    assert_eq!(pass(&mut alice.sender, &frame, 20, OVER_SEND), 5);
    clock.advance(Duration::from_millis(3));
    // What goes to the gateway and what the network drops are frames that the port sends.
    assert_eq!(send(&mut alice.sender, &arp_request(alice.mac, IP, SHARED)), flooded(1));
    assert_eq!(send(&mut alice.sender, &data(alice.mac, alice.mac, b"")), own_port());
    assert_eq!(pass(&mut alice.sender, &frame, 20, OVER_SEND), 1);
    // A frame that may not be sent at all takes no token.
    clock.advance(Duration::from_millis(1));
    assert_eq!(send(&mut alice.sender, &data(bob.mac, bob.mac, b"forged")), BAD_SOURCE);
    assert_eq!(send(&mut alice.sender, &frame), Sent::Forwarded);
    // The bucket holds no more than the burst.
    clock.advance(Duration::from_secs(1000));
    bob.receive();
    assert_eq!(pass(&mut alice.sender, &frame, 20, OVER_SEND), 5);
    let stats = alice.sender.stats();
    assert_eq!(stats.dropped_send_limit, 15 + 19 + 15);
    assert_eq!(stats.drops(), 15 + 19 + 15 + 2);
    // The others of the network have no limit, and its other senders share this one.
    assert_eq!(send(&mut bob.sender, &data(alice.mac, bob.mac, b"free")), Sent::Forwarded);
    assert_eq!(alice.sender.new_sender().send(&frame), OVER_SEND);
}

fn flooded(reached: u32) -> Sent {
    Sent::Flooded { reached }
}

fn own_port() -> Sent {
    Sent::Dropped(DropReason::OwnPort)
}

#[test]
fn a_limit_in_bytes_counts_whole_frames() {
    let (network, clock) = timed();
    let limits = PortLimits { send: bytes(100_000, 3000), ..PortLimits::default() };
    let mut alice = limited(&network, 1, limits);
    let mut bob = Guest::join(&network, 2);
    let frame = data(bob.mac, alice.mac, &[1; 986]); // 1,000 bytes
    assert_eq!(pass(&mut alice.sender, &frame, 20, OVER_SEND), 3);
    clock.advance(Duration::from_millis(9));
    assert_eq!(pass(&mut alice.sender, &frame, 1, OVER_SEND), 0, "900 bytes are there");
    assert_eq!(pass(&mut alice.sender, &data(bob.mac, alice.mac, &[1; 886]), 2, OVER_SEND), 1);
    assert_eq!(bob.receive().len(), 4);
    // A frame longer than the burst passes a full bucket, which is in debt then.
    let limits = PortLimits { send: bytes(100_000, 10), ..PortLimits::default() };
    assert!(alice.sender.monitor().set_limits(limits));
    assert_eq!(pass(&mut alice.sender, &frame, 20, OVER_SEND), 1);
    clock.advance(Duration::from_millis(9));
    assert_eq!(pass(&mut alice.sender, &frame, 20, OVER_SEND), 0);
    clock.advance(Duration::from_millis(1));
    assert_eq!(pass(&mut alice.sender, &frame, 20, OVER_SEND), 1);
}

#[test]
fn a_receive_limit_holds_for_all_who_send_to_the_port() {
    let (network, clock) = timed();
    let limits = PortLimits { receive: packets(1000, 4), ..PortLimits::default() };
    let mut alice = limited(&network, 1, limits);
    let (mut bob, mut carol) = (Guest::join(&network, 2), Guest::join(&network, 3));
    let from_bob = data(alice.mac, bob.mac, b"one of many");
    assert_eq!(pass(&mut bob.sender, &from_bob, 3, OVER_RECEIVE), 3);
    let from_carol = data(alice.mac, carol.mac, b"one of many");
    assert_eq!(pass(&mut carol.sender, &from_carol, 3, OVER_RECEIVE), 1);
    // A flood reaches the others all the same, and the gateway's answers are packets too.
    assert_eq!(send(&mut bob.sender, &data(MULTICAST, bob.mac, b"to all")), flooded(1));
    let ask = arp_request(alice.mac, IP, SHARED);
    assert_eq!(alice.ask(&ask).len(), 4, "no answer is among them");
    clock.advance(Duration::from_millis(1));
    assert_eq!(alice.ask(&ask).len(), 1);
    // The receiver's port counts, and the sender counts frames that were not accepted.
    let stats = alice.receiver.stats();
    assert_eq!((stats.missed_receive_limit, stats.drops()), (2 + 1 + 1, 4));
    assert_eq!(carol.sender.stats().dropped_no_receiver, 2);
    assert_eq!(carol.sender.stats().drops(), 0);
    // What the port sends is not limited.
    assert_eq!(pass(&mut alice.sender, &data(bob.mac, alice.mac, b""), 6, OVER_RECEIVE), 6);
}

#[test]
fn a_run_is_as_long_as_the_limits_of_both_ports_allow() {
    let (network, clock) = timed();
    let limits = PortLimits { send: packets(1000, 6), ..PortLimits::default() };
    let mut alice = limited(&network, 1, limits);
    let limits = PortLimits { receive: packets(1000, 4), ..PortLimits::default() };
    let mut bob = limited(&network, 2, limits);
    let frame = data(bob.mac, alice.mac, b"of a run");
    let run = |alice: &mut Guest, wanted| {
        let run = alice.sender.run(header(&frame), wanted, |_| ());
        let put = run.map_or(0, |mut run| {
            let left = run.left();
            (0..left).for_each(|_| assert!(run.put(&frame)));
            assert!(!run.put(&frame));
            left
        });
        alice.sender.flush();
        put
    };
    assert_eq!(run(&mut alice, 20), 4, "as many as bob may receive");
    assert_eq!(run(&mut alice, 20), 0);
    assert_eq!(send(&mut alice.sender, &frame), OVER_RECEIVE);
    clock.advance(Duration::from_secs(1));
    assert_eq!((run(&mut alice, 3), run(&mut alice, 3)), (3, 1));
    // The tokens of frames for which nothing was claimed are there for others.
    let mut carol = Guest::join(&network, 3);
    let to_carol = data(carol.mac, alice.mac, b"");
    assert_eq!(pass(&mut alice.sender, &to_carol, 20, OVER_SEND), 2);
    clock.advance(Duration::from_secs(1));
    bob.receive();
    bob.receiver.recall(drop);
    assert_eq!(run(&mut alice, 6), 0, "bob has no buffer");
    assert_eq!(pass(&mut alice.sender, &to_carol, 20, OVER_SEND), 6);
    bob.post(8);
    assert_eq!(pass(&mut carol.sender, &data(bob.mac, carol.mac, b""), 20, OVER_RECEIVE), 4);
    assert!(bob.receive().iter().all(|frame| !frame.is_empty()));
    // The length of a run's frames is not known, so a limit of bytes decides one by one.
    clock.advance(Duration::from_secs(1));
    assert!(
        bob.receiver
            .monitor()
            .set_limits(PortLimits { receive: bytes(1000, 100), ..PortLimits::default() })
    );
    assert_eq!(run(&mut alice, 1), 0);
    assert_eq!(pass(&mut alice.sender, &frame, 6, OVER_RECEIVE), 100 / frame.len() as u32);
    assert_eq!(alice.sender.stats().dropped_send_limit, 18 + 14);
}

#[test]
fn a_flood_limit_holds_for_its_port_and_for_nothing_else() {
    let (network, clock) = timed();
    let limits = PortLimits { flood: Some(rate(1000, 4)), ..PortLimits::default() };
    let mut alice = limited(&network, 1, limits);
    let mut bob = limited(&network, 2, limits);
    let own = alice.mac;
    for to in [MULTICAST, STRANGER, MacAddr6::broadcast()] {
        let frame = data(to, own, b"to all");
        assert_eq!(pass(&mut alice.sender, &frame, 20, OVER_FLOOD), 4, "{to}");
        assert_eq!(bob.receive().len(), 4);
        clock.advance(Duration::from_millis(4));
    }
    assert_eq!(pass(&mut alice.sender, &data(MULTICAST, own, b""), 20, OVER_FLOOD), 4);
    // The gateway answers a port that may not flood, and nobody else hears of it.
    bob.receive();
    let ask = arp_request(own, IP, SHARED);
    assert_eq!(send(&mut alice.sender, &ask), OVER_FLOOD);
    assert_eq!(alice.receive().len(), 1, "the gateway's answer");
    let replies = alice.ask(&Dhcp::discover(own).frame());
    let offer = replies.iter().find(|frame| frame.len() > 60).expect("an offer");
    assert_eq!(dhcp_reply(offer).kind, DhcpMessageType::Offer);
    assert!(bob.receive().iter().all(|frame| frame[6..12] != *own.as_bytes()));
    // Unicast is no flood, and the limit of one port is not another's.
    assert_eq!(send(&mut alice.sender, &data(bob.mac, own, b"")), Sent::Forwarded);
    assert_eq!(pass(&mut bob.sender, &data(MULTICAST, bob.mac, b""), 20, OVER_FLOOD), 4);
    let stats = alice.sender.stats();
    assert_eq!(stats.dropped_flood_limit, 4 * 16 + 2);
    assert_eq!((stats.sent_floods, stats.drops()), (16, 4 * 16 + 2));
    assert_eq!(stats.sent_to_gateway, 20 + 2);
}

/// Each DHCP message can make the gateway ask all ports for an address. So they are limited too, and
/// the limit is each port's own.
#[test]
fn a_guest_makes_the_gateway_ask_others_only_so_often() {
    let (network, clock) = timed();
    let mut alice = Guest::join(&network, 1);
    let (mut bob, mut carol) = (Guest::join(&network, 2), Guest::join(&network, 3));
    let none = PortLimits { flood: None, ..PortLimits::default() };
    assert!(alice.sender.monitor().set_limits(none));
    let gateway = network.gateway().unwrap().mac();
    let ask = |guest: &mut Guest, bob: &mut Guest, times: u32| {
        let mut questions = 0;
        for number in 0..times {
            let [.., high, low] = number.to_be_bytes();
            let client = MacAddr6::new(2, 5, 5, 5, high, low);
            let mut frame = Dhcp::discover(client).frame();
            frame[..6].copy_from_slice(gateway.as_bytes());
            frame[6..12].copy_from_slice(guest.mac.as_bytes());
            send(&mut guest.sender, &frame);
            guest.receive();
            questions += bob.receive().len();
        }
        questions
    };
    let at_once = DHCP_MESSAGES_AT_ONCE;
    assert!(ask(&mut alice, &mut bob, 3 * at_once) <= at_once as usize);
    assert_eq!(network.gateway().unwrap().stats().dhcp_limited, u64::from(2 * at_once));
    assert_eq!(network.gateway().unwrap().stats().dhcp_messages, u64::from(at_once));
    ask(&mut carol, &mut bob, 1);
    assert_eq!(network.gateway().unwrap().stats().dhcp_messages, u64::from(at_once + 1));
    clock.advance(Duration::from_millis(10));
    ask(&mut alice, &mut bob, at_once);
    let gained = DHCP_MESSAGES_PER_SECOND / 100;
    assert_eq!(network.gateway().unwrap().stats().dhcp_messages, u64::from(at_once + 1 + gained));
}

/// By default a port floods as much as the limit's documentation says.
#[test]
fn the_default_flood_limit_is_the_documented_one() {
    let (network, clock) = timed();
    let (mut alice, _bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    let frame = data(MULTICAST, alice.mac, b"to all");
    let burst = FLOODS_AT_ONCE.get() as u32;
    assert_eq!(pass(&mut alice.sender, &frame, burst + 10, OVER_FLOOD), burst);
    clock.advance(Duration::from_millis(10));
    let gained = FLOODS_PER_SECOND.get() as u32 / 100;
    assert_eq!(pass(&mut alice.sender, &frame, burst, OVER_FLOOD), gained);
    let none = PortLimits { flood: None, ..PortLimits::default() };
    assert!(alice.sender.monitor().set_limits(none));
    assert_eq!(pass(&mut alice.sender, &frame, 5 * burst, OVER_FLOOD), 5 * burst);
}

#[test]
fn limits_change_while_a_port_is_in_use_and_end_with_it() {
    let (network, _clock) = timed();
    let mut alice = Guest::join(&network, 1);
    let bob = Guest::join(&network, 2);
    let monitor = alice.sender.monitor();
    let frame = data(bob.mac, alice.mac, b"");
    assert_eq!(pass(&mut alice.sender, &frame, 8, OVER_SEND), 8);
    let limits = PortLimits { send: packets(1, 2), receive: packets(1, 3), flood: None };
    assert!(monitor.set_limits(limits));
    assert_eq!(pass(&mut alice.sender, &frame, 8, OVER_SEND), 2);
    // Setting them again fills the buckets.
    assert!(monitor.set_limits(limits));
    assert_eq!(pass(&mut alice.sender, &frame, 8, OVER_SEND), 2);
    assert!(monitor.set_limits(PortLimits::default()));
    assert_eq!(pass(&mut alice.sender, &frame, 8, OVER_SEND), 8);
    // A port in the same place has its own limits, and the old handle does not reach it.
    assert!(monitor.set_limits(limits));
    drop(alice);
    let mut next = Guest::join(&network, 3);
    assert!(!monitor.set_limits(limits));
    let frame = data(bob.mac, next.mac, b"");
    assert_eq!(pass(&mut next.sender, &frame, 8, OVER_SEND), 8);
}

/// A frame of an ordinary kind for a guest of an ordinary size: nothing is in the way of it.
#[test]
fn a_port_with_the_default_policy_has_no_rule_but_the_flood_limit() {
    let limits = PortLimits::default();
    let none = RateLimit::default();
    assert_eq!((limits.send, limits.receive), (none, none));
    assert_eq!(PortPolicy::default().source, SourceRule::Any);
    let flood = limits.flood.unwrap();
    assert_eq!((flood.per_second, flood.burst), (FLOODS_PER_SECOND, FLOODS_AT_ONCE));
    let (network, _) = timed();
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    let ipv6 = EthernetProtocol::Ipv6;
    let frame = ethernet(eth(bob.mac), EthernetAddress(STRANGER.into_array()), ipv6, &[0; 60]);
    assert_eq!(send(&mut alice.sender, &frame), Sent::Forwarded);
    assert_eq!(bob.receive(), [frame]);
}
