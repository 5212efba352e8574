//! Forwarding allocates nothing, whether a frame is delivered directly or through the overflow
//! ring, flooded, dropped, or answered by the gateway, and whether there are limits or not.
#![cfg(not(loom))]

mod common;

use core::net::{Ipv4Addr, Ipv6Addr};
use core::num::NonZeroU64;
use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::cell::Cell;
use std::sync::{Arc, Mutex};

use common::*;
use macaddr::MacAddr6;
use smoltcp::wire::EthernetProtocol;
use vmring_core::offload::{Checksum, Gso, OffloadHeader, Offloads};
use vmring_embedded::limits::ROUTER_FRAMES;
use vmring_embedded::software::{Merging, Segments};
use vmring_embedded::{
    Ipv6Config, Network, NetworkConfig, Packet, PortConfig, PortLimits, PortPolicy, Rate,
    RateLimit, Router, RouterBatch, RouterEnd,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: both functions pass their arguments to `System` unchanged and return what it returns, so
// the contract of `GlobalAlloc` is kept by `System`.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`, and that of `System` is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller got the pointer from `alloc` with this layout, and `alloc` got it from
        // `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn forwarding_allocates_nothing() {
    forward(PortLimits { flood: None, ..PortLimits::default() });
    // Limits that are never reached, so that each frame takes tokens.
    let number = NonZeroU64::new(1 << 40).unwrap();
    let rate = Some(Rate { per_second: number, burst: number });
    let limit = RateLimit { packets: rate, bytes: rate };
    forward(PortLimits { send: limit, receive: limit, flood: rate });
}

/// A router that keeps its end for the test.
#[derive(Default)]
struct Kept(Mutex<Option<RouterEnd<Buffer>>>);

impl Router<Buffer> for Kept {
    fn start(&self, end: RouterEnd<Buffer>) -> std::io::Result<()> {
        *self.0.lock().unwrap() = Some(end);
        Ok(())
    }

    fn stop(&self) {}

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// Neither does a frame for the network's router, whether it is taken or not, nor what the router sends.
#[test]
fn what_goes_to_the_router_and_back_allocates_nothing() {
    let addresses = (Ipv4Addr::new(192, 168, 64, 9), Ipv4Addr::new(198, 51, 100, 7));
    let packet = udp((addresses.0, 4000), (addresses.1, 53), &[1; 1000]);
    route(EthernetProtocol::Ipv4, &packet);
    // The header of RFC 8200, 3, with the version, 1,000 bytes and UDP.
    let addresses = ["fd00::9", "2001:db8::7"].map(|ip| ip.parse::<Ipv6Addr>().unwrap().octets());
    let packet = [&[0x60, 0, 0, 0, 3, 0xe8, 17, 64][..], &addresses.concat(), &[1; 1000]].concat();
    route(EthernetProtocol::Ipv6, &packet);
}

fn route(ethertype: EthernetProtocol, packet: &[u8]) {
    let ipv6 = Some(Ipv6Config::new("fd00::".parse().unwrap()));
    let config = NetworkConfig { router: Some(Vec::new()), ipv6, ..NetworkConfig::default() };
    let network = Network::new(config).unwrap();
    let router: Arc<Kept> = Arc::default();
    network.set_router(router.clone()).unwrap();
    let gateway = network.gateway().unwrap().mac();
    let mut alice = Guest::join(&network, 1);
    let question = ethernet(eth(gateway), eth(alice.mac), ethertype, packet);
    let answer = ethernet(eth(alice.mac), eth(gateway), ethertype, packet);
    alice.ask(&question);
    let mut end = router.0.lock().unwrap().take().unwrap();
    let mut batch = RouterBatch::new();
    let mut turn = |alice: &mut Guest| {
        for _ in 0..ROUTER_FRAMES + 100 {
            alice.sender.send(&question);
        }
        alice.sender.flush();
        end.look(|_, _| ());
        while let Some(port) = end.receive(&mut batch) {
            for _ in 0..batch.len() {
                let _ = end.send(port, &answer, &OffloadHeader::NONE);
            }
            end.flush();
            while let Some((buffer, _)) = alice.receiver.collect() {
                alice.receiver.post(buffer).unwrap();
            }
        }
    };
    // The first turn lends the buffers.
    turn(&mut alice);
    let before = ALLOCATIONS.get();
    (0..100).for_each(|_| turn(&mut alice));
    assert_eq!(ALLOCATIONS.get() - before, 0);
    let stats = alice.sender.stats();
    assert!(stats.sent_to_router > 10_000 && stats.dropped_router_busy > 1000, "{stats:?}");
}

/// Completing and cutting allocates nothing either.
#[test]
fn work_in_software_allocates_nothing() {
    let network =
        Network::new(NetworkConfig { overflow_depth: Some(16), ..NetworkConfig::default() });
    let network = network.unwrap();
    let join = |id, offloads| Guest::with(&network, PortConfig { offloads, ..config(id) });
    let (mut alice, mut bob) = (join(1, Offloads::ALL), join(2, Offloads::default()));
    // 8,000 bytes of TCP.
    let segment = [&[0xc0, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10][..], &[1; 8000]].concat();
    let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    let packet = ipv4(from, to, smoltcp::wire::IpProtocol::Tcp, &segment);
    let ethertype = smoltcp::wire::EthernetProtocol::Ipv4;
    let checksum = Checksum::Partial { start: 34, offset: 16 };
    let small = ethernet(eth(bob.mac), eth(alice.mac), ethertype, &packet[..1000]);
    let large = ethernet(eth(bob.mac), eth(alice.mac), ethertype, &packet);
    let partial = OffloadHeader { checksum, ..OffloadHeader::NONE };
    let to_cut = OffloadHeader { gso: Gso::TcpV4, segment_size: 1400, ..partial };
    let before = ALLOCATIONS.get();
    for _ in 0..100 {
        for (frame, header) in [(&small, partial), (&large, to_cut)] {
            alice.sender.send_packet(Packet::from(&frame[..]).with_offload(&header));
            alice.sender.flush();
            while let Some((buffer, _)) = bob.receiver.collect() {
                bob.receiver.post(buffer).unwrap();
            }
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert_eq!(bob.receiver.stats().received_direct, 700);
}

/// Nor does merging what was cut.
#[test]
fn merging_allocates_nothing() {
    let segment = [&[0xc0, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10][..], &[1; 8000]].concat();
    let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    let packet = ipv4(from, to, smoltcp::wire::IpProtocol::Tcp, &segment);
    let ethertype = smoltcp::wire::EthernetProtocol::Ipv4;
    let mac = MacAddr6::new(2, 0, 0, 0, 0, 1);
    let packet = ethernet(eth(mac), eth(mac), ethertype, &packet);
    let header = OffloadHeader {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Gso::TcpV4,
        segment_size: 1400,
        ..OffloadHeader::NONE
    };
    let segments = Segments::new(&header, &packet).unwrap();
    let mut merging = Merging::new(&Offloads::ALL, 10_000);
    let mut free = vec![Vec::with_capacity(10_000), Vec::with_capacity(10_000)];
    let mut large = 0;
    let before = ALLOCATIONS.get();
    for _ in 0..100 {
        for index in 0..segments.count() {
            let mut buffer = free.pop().unwrap();
            buffer.resize(1514, 0);
            let len = segments.write(index, &mut buffer).unwrap();
            buffer.truncate(len);
            let mut out = None;
            let empty = merging.push(buffer, &OffloadHeader::NONE, |packet| out = Some(packet));
            large += usize::from(out.as_ref().is_some_and(|packet| packet.packets == 6));
            free.extend(empty);
            free.extend(out.map(|packet| packet.buffer));
        }
    }
    assert_eq!((ALLOCATIONS.get() - before, large), (0, 100));
}

fn forward(limits: PortLimits) {
    let network =
        Network::new(NetworkConfig { overflow_depth: Some(16), ..NetworkConfig::default() })
            .unwrap();
    let join = |id| {
        let policy = PortPolicy { limits, ..PortPolicy::default() };
        Guest::with(&network, PortConfig { policy, ..config(id) })
    };
    let (mut alice, mut bob) = (join(1), join(2));
    let stranger = MacAddr6::new(2, 9, 9, 9, 9, 9);
    let gateway = network.gateway().unwrap().mac();
    let frames = [
        data(bob.mac, alice.mac, &[1; 1000]),
        data(MacAddr6::broadcast(), alice.mac, b"to all"),
        data(MacAddr6::new(2, 8, 8, 8, 8, 8), alice.mac, b"to whom?"),
        data(bob.mac, stranger, b"from whom?"),
        data(bob.mac, gateway, b"dropped"),
        vec![1; 3],
        vec![1; 2000],
        arp_request(alice.mac, Ipv4Addr::UNSPECIFIED, SHARED),
        ping(gateway, alice.mac, Ipv4Addr::new(192, 168, 64, 9), SHARED, 1, &[1; 1000]),
    ];
    let before = ALLOCATIONS.get();
    for _ in 0..1000 {
        for frame in &frames {
            // 5 of the 9 frames reach bob, who has 8 buffers and 16 overflow cells.
            alice.sender.send(frame);
        }
        alice.sender.flush();
        for guest in [&mut alice, &mut bob] {
            while let Some((buffer, _)) = guest.receiver.collect() {
                guest.receiver.post(buffer).unwrap();
            }
            guest.receiver.arm();
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    let stats = bob.receiver.stats();
    assert_eq!(stats.received_direct + stats.received_overflow, 5000);
    assert!(alice.receiver.stats().received_direct == 2000, "the gateway's answers");
}
