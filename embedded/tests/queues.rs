//! Ports with several queues: flows, order, and receivers that close and open under traffic.
#![cfg(not(loom))]

mod common;
#[path = "common/form.rs"]
mod form;

use core::net::Ipv4Addr;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use common::*;
use form::{ALL, Form, finished, offloads};
use macaddr::MacAddr6;
use smoltcp::wire::EthernetProtocol;
use vmring_core::offload::LEN;
use vmring_embedded::limits::QUEUES_MAX;
use vmring_embedded::{
    Accepted, JoinError, Network, NetworkConfig, NextFrame, Packet, PortConfig, PortLimits,
    PortPolicy, Receiver, Sender, Sent,
};

const FRAME: usize = 1518;

fn network() -> Arc<Network<Buffer>> {
    Network::new(NetworkConfig { overflow_depth: Some(256), ..NetworkConfig::default() }).unwrap()
}

fn wide(
    network: &Arc<Network<Buffer>>,
    id: u64,
    queues: usize,
) -> (Vec<Receiver<Buffer>>, Sender<Buffer>) {
    let limits = PortLimits { flood: None, ..PortLimits::default() };
    let policy = PortPolicy { limits, ..PortPolicy::default() };
    let port = network.join(PortConfig { queues, policy, ..config(id) }).unwrap();
    port.split_queues()
}

/// A UDP packet of a flow, with a number in it.
fn packet(to: MacAddr6, from: MacAddr6, flow: u16, number: u64) -> Vec<u8> {
    let (a, b) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    let packet = udp((a, flow), (b, 9), &number.to_be_bytes());
    ethernet(eth(to), eth(from), EthernetProtocol::Ipv4, &packet)
}

/// The flow and the number of such a packet.
fn parts_of(packet: &[u8]) -> (u16, u64) {
    let flow = u16::from_be_bytes([packet[34], packet[35]]);
    (flow, u64::from_be_bytes(packet[42..50].try_into().unwrap()))
}

fn post(receiver: &mut Receiver<Buffer>, count: usize) {
    for _ in 0..count {
        receiver.post(vec![0; FRAME]).unwrap();
    }
}

/// Takes everything out, and posts the buffers again.
fn take(receiver: &mut Receiver<Buffer>) -> Vec<(u16, u64)> {
    let mut taken = Vec::new();
    while let Some((buffer, len)) = receiver.collect() {
        taken.push(parts_of(&buffer[..len]));
        receiver.post(buffer).unwrap();
    }
    taken
}

#[test]
fn a_port_has_a_receiver_for_each_queue() {
    let network = network();
    for queues in [0, QUEUES_MAX + 1] {
        let refused = network.join(PortConfig { queues, ..config(9) }).map(drop);
        assert_eq!(refused, Err(JoinError::Queues { asked: queues }));
    }
    for queues in [1, 2, QUEUES_MAX] {
        let (receivers, sender) = wide(&network, 9, queues);
        assert_eq!(receivers.len(), queues);
        let numbers: Vec<_> = receivers.iter().map(Receiver::queue).collect();
        assert_eq!(numbers, (0..queues).collect::<Vec<_>>());
        drop(receivers);
        assert_eq!(network.ports(), 1, "a sender is left");
        drop(sender);
        assert_eq!(network.ports(), 0);
    }
    // A port that is taken apart as if it had one queue has one.
    let port = network.join(PortConfig { queues: 4, ..config(9) }).unwrap();
    let mac = port.mac();
    let (mut receiver, _sender) = port.split();
    post(&mut receiver, 64);
    let mut alice = Guest::join(&network, 1);
    for flow in 0..64 {
        assert_eq!(alice.sender.send(&packet(mac, alice.mac, flow, 0)), Sent::Forwarded);
    }
    assert_eq!(take(&mut receiver).len(), 64);
}

/// Goal: a flow stays in one queue and in order, many flows spread, both by runs and by single frames,
/// and a run does not leave its queue.
#[test]
fn a_flow_stays_in_one_queue_and_many_spread() {
    let network = network();
    let mut alice = Guest::join(&network, 1);
    let (mut bob, sender) = wide(&network, 2, 4);
    let mac = sender.mac();
    bob.iter_mut().for_each(|receiver| post(receiver, 512));
    let mut queue_of = HashMap::new();
    let mut next = [0u64; 64];
    let mut counts = [0; 4];
    let mut runs = 0;
    for round in 0..20u64 {
        let mut sent = 0;
        while sent < 300 {
            // Flows come in bursts of different lengths.
            let burst: Vec<_> = (0..16)
                .map(|at| {
                    let flow = ((round * 7 + (sent + at) / (1 + round % 5)) % 64) as u16;
                    next[usize::from(flow)] += 1;
                    packet(mac, alice.mac, flow, next[usize::from(flow)])
                })
                .collect();
            sent += 16;
            let header = *burst[0].first_chunk().unwrap();
            let mut left = &burst[..];
            while let Some((first, rest)) = left.split_first() {
                let shown = left;
                let frames = |each: &mut dyn FnMut(NextFrame<'_>) -> bool| {
                    let _ = shown.iter().all(|frame| each(NextFrame::Bytes(frame)));
                };
                if round % 2 == 0
                    && let Some(mut run) = alice.sender.run(header, left.len(), frames)
                {
                    runs += 1;
                    let count = run.left();
                    assert!((1..=left.len()).contains(&count));
                    left[..count].iter().for_each(|frame| assert!(run.put(frame)));
                    left = &left[count..];
                } else {
                    assert_eq!(alice.sender.send(first), Sent::Forwarded);
                    left = rest;
                }
            }
        }
        alice.sender.flush();
        for (queue, receiver) in bob.iter_mut().enumerate() {
            let mut last = HashMap::new();
            for (flow, number) in take(receiver) {
                assert_eq!(*queue_of.entry(flow).or_insert(queue), queue, "flow {flow}");
                let before = last.insert(flow, number).unwrap_or(0);
                assert!(number > before, "flow {flow}: {number} after {before}");
                counts[queue] += 1;
            }
        }
    }
    let all: u64 = next.iter().sum();
    assert_eq!(counts.iter().sum::<u64>(), all);
    assert!(counts.iter().all(|count| *count > all / 20), "{counts:?}");
    assert!(runs > 100);
    // A sender that shows no frames gets no run, since the frames may be for any queue.
    let one = packet(mac, alice.mac, 1, 1);
    assert!(alice.sender.run(*one.first_chunk().unwrap(), 4, |_| ()).is_none());
    assert_eq!(bob[0].stats().received_direct + bob[0].stats().received_overflow, all);
}

/// Goal: a receiver that closes gives its flows to the others, no other flow moves, and a receiver that
/// opens takes its flows back.
#[test]
fn a_queue_that_closes_gives_its_flows_to_the_others() {
    let network = network();
    let mut alice = Guest::join(&network, 1);
    let (mut bob, sender) = wide(&network, 2, 4);
    let mac = sender.mac();
    bob.iter_mut().for_each(|receiver| post(receiver, 512));
    let mut map = |bob: &mut Vec<Receiver<Buffer>>| {
        for flow in 0..256 {
            assert_eq!(alice.sender.send(&packet(mac, alice.mac, flow, 0)), Sent::Forwarded);
        }
        let mut map = HashMap::new();
        for (queue, receiver) in bob.iter_mut().enumerate() {
            map.extend(take(receiver).into_iter().map(|(flow, _)| (flow, queue)));
        }
        assert_eq!(map.len(), 256);
        map
    };
    let whole = map(&mut bob);
    for closed in 0..4 {
        bob[closed].close();
        let without = map(&mut bob);
        let mut takers = [0; 4];
        for (flow, queue) in &without {
            match whole[flow] {
                before if before == closed => takers[*queue] += 1,
                before => assert_eq!(before, *queue, "flow {flow} moved"),
            }
        }
        assert_eq!(takers[closed], 0);
        assert_eq!(takers.iter().filter(|count| **count > 0).count(), 3, "{takers:?}");
        bob[closed].reopen();
        assert_eq!(map(&mut bob), whole);
    }
    // One is left, and then none.
    bob[1..].iter_mut().for_each(Receiver::close);
    assert!(map(&mut bob).values().all(|queue| *queue == 0));
    bob[0].close();
    let mut alice = Guest::join(&network, 3);
    let frame = packet(mac, alice.mac, 0, 0);
    assert!(matches!(alice.sender.send(&frame), Sent::Dropped(_)));
    let flood = packet(MacAddr6::broadcast(), alice.mac, 0, 0);
    assert_eq!(alice.sender.send(&flood), Sent::Flooded { reached: 1 }, "the first guest");
    bob[2].reopen();
    assert_eq!(alice.sender.send(&frame), Sent::Forwarded);
    assert_eq!(alice.sender.send(&flood), Sent::Flooded { reached: 2 });
    assert_eq!(take(&mut bob[2]).len(), 2, "a broadcast goes to one queue of a port");
    assert_eq!(bob[0].stats().missed_closed, 1);
}

/// Goal: each receiver is woken for its own packets and for no others'.
#[test]
fn a_wake_goes_to_the_queue_that_has_a_packet() {
    let network = network();
    let mut alice = Guest::join(&network, 1);
    let (mut bob, sender) = wide(&network, 2, 4);
    let mac = sender.mac();
    let wakes: Vec<_> = (0..4).map(|_| Arc::new(AtomicUsize::new(0))).collect();
    for (receiver, wakes) in bob.iter_mut().zip(&wakes) {
        let wakes = wakes.clone();
        receiver.set_wake(Arc::new(move || {
            wakes.fetch_add(1, Ordering::SeqCst);
        }));
        post(receiver, 64);
    }
    for flow in 0..32 {
        assert!(bob.iter_mut().all(Receiver::arm));
        let before: Vec<_> = wakes.iter().map(|wakes| wakes.load(Ordering::SeqCst)).collect();
        alice.sender.send(&packet(mac, alice.mac, flow, 0));
        alice.sender.flush();
        for (queue, receiver) in bob.iter_mut().enumerate() {
            let woken = wakes[queue].load(Ordering::SeqCst) - before[queue];
            assert_eq!(take(receiver).len(), woken, "queue {queue}");
            receiver.disarm();
        }
    }
}

/// Goal: each queue accepts what its own receiver says, and a packet that is cut stays in one queue.
#[test]
fn each_queue_accepts_other_work() {
    let network = network();
    let alice = network.join(PortConfig { offloads: offloads(ALL), ..config(1) }).unwrap();
    let from = alice.mac();
    let (_receiver, mut sends) = alice.split();
    let port = PortConfig { offloads: offloads(ALL), queues: 2, ..config(2) };
    let (mut bob, sender) = network.join(port).unwrap().split_queues();
    bob[1].accept(Accepted::new(offloads(0)));
    let sizes = [65_553, FRAME];
    for (receiver, size) in bob.iter_mut().zip(sizes) {
        assert_eq!(receiver.max_packet_size(), size);
        (0..200).for_each(|_| receiver.post(vec![0; LEN + size]).unwrap());
    }
    let mut seen = [0; 2];
    for v4 in [true, false] {
        for flow in 0..20u16 {
            let form = Form { v4, tcp: true, tagged: false, payload: 5000, segment: Some(1000) };
            let (mut packet, header) = form.build(sender.mac(), from, 0);
            let at = if v4 { 34 } else { 54 };
            packet[at..at + 2].copy_from_slice(&flow.to_be_bytes());
            let sent = sends.send_packet(Packet::from(&*packet).with_offload(&header));
            assert_eq!(sent, Sent::Forwarded);
            let took = [0, 1].map(|queue: usize| {
                let mut frames = Vec::new();
                while let Some((buffer, len)) = bob[queue].collect() {
                    frames.push(buffer[LEN..LEN + len].to_vec());
                    bob[queue].post(buffer).unwrap();
                }
                frames
            });
            match &took {
                [whole, none] if none.is_empty() => {
                    assert_eq!(*whole, [packet]);
                    seen[0] += 1;
                }
                [none, cut] if none.is_empty() => {
                    assert_eq!(*cut, finished(&packet, &header));
                    seen[1] += 1;
                }
                _ => panic!("it is in both queues"),
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

/// Goal: what two senders send to four queues, whose receivers close and open all the time, arrives once
/// and in order while its queue stays open, and what does not arrive was counted.
#[test]
fn nothing_is_lost_uncounted_while_queues_close_and_open() {
    let network = network();
    let (bob, sender) = wide(&network, 2, 4);
    let mac = sender.mac();
    let small = std::env::var_os("VMRING_TEST_SCALE").is_some();
    let each: u64 = if small { 2_000 } else { 40_000 };
    let done = &AtomicUsize::new(0);
    let failed = &AtomicBool::new(false);
    let arrived = &AtomicU64::new(0);
    let dropped = &AtomicU64::new(0);
    let sent = &AtomicU64::new(0);
    struct OnPanic<'a>(&'a AtomicBool);
    impl Drop for OnPanic<'_> {
        fn drop(&mut self) {
            self.0.fetch_or(std::thread::panicking(), Ordering::SeqCst);
        }
    }
    std::thread::scope(|scope| {
        for id in [3u64, 4] {
            let mut alice = Guest::join(&network, id);
            scope.spawn(move || {
                let _fails = OnPanic(failed);
                for number in 0..each {
                    let flow = (id * 1000 + number % 24) as u16;
                    match alice.sender.send(&packet(mac, alice.mac, flow, number)) {
                        Sent::Forwarded => {}
                        Sent::Dropped(_) => {
                            dropped.fetch_add(1, Ordering::Relaxed);
                        }
                        other => panic!("{other:?}"),
                    }
                    sent.fetch_add(1, Ordering::Relaxed);
                    if number % 32 == 31 {
                        alice.sender.flush();
                        std::thread::yield_now();
                    }
                    // Of four runs, three wait for the receivers, so that most packets arrive however
                    // late those begin. One queue holds what is under way then.
                    let under_way = || {
                        let gone =
                            arrived.load(Ordering::Relaxed) + dropped.load(Ordering::Relaxed);
                        sent.load(Ordering::Relaxed).saturating_sub(gone)
                    };
                    let began = Instant::now();
                    while number / 256 % 4 != 0
                        && under_way() > 128
                        && !failed.load(Ordering::SeqCst)
                    {
                        assert!(
                            began.elapsed().as_secs() < 60,
                            "nobody takes {} packets",
                            under_way()
                        );
                        alice.sender.flush();
                        std::thread::yield_now();
                    }
                }
                alice.sender.flush();
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        for mut receiver in bob {
            scope.spawn(move || {
                let _fails = OnPanic(failed);
                let began = Instant::now();
                let queue = receiver.queue();
                let mut last = HashMap::new();
                let mut turn = 0;
                post(&mut receiver, 64);
                loop {
                    let ended = done.load(Ordering::SeqCst) == 2;
                    let taken = take(&mut receiver);
                    arrived.fetch_add(taken.len() as u64, Ordering::Relaxed);
                    let idle = taken.is_empty();
                    for (flow, number) in taken {
                        // A flow comes back after it was elsewhere, and is in order all the same.
                        let before = last.insert(flow, number);
                        assert!(before.is_none_or(|before| number > before), "flow {flow}");
                    }
                    turn += 1;
                    // The first queue stays open.
                    if queue > 0 && turn % (5 + queue) == 0 && !ended {
                        receiver.close();
                        let taken = take(&mut receiver);
                        arrived.fetch_add(taken.len() as u64, Ordering::Relaxed);
                        for (flow, number) in taken {
                            let before = last.insert(flow, number);
                            assert!(before.is_none_or(|before| number > before), "flow {flow}");
                        }
                        std::thread::yield_now();
                        receiver.reopen();
                    }
                    if ended && idle || failed.load(Ordering::SeqCst) {
                        break;
                    }
                    assert!(began.elapsed().as_secs() < 100, "queue {queue} does not end");
                    if idle {
                        std::thread::yield_now();
                    }
                }
            });
        }
    });
    let stats = sender.stats();
    let (arrived, dropped) = (arrived.load(Ordering::Relaxed), dropped.load(Ordering::Relaxed));
    assert_eq!(arrived + dropped, 2 * each, "{stats:?}");
    assert_eq!(stats.missed_no_buffer + stats.missed_closed, dropped, "{stats:?}");
    assert_eq!(stats.received_direct + stats.received_overflow, arrived);
    assert_eq!(stats.missed_closed, 0, "one queue was always open");
    assert!(arrived > each / 2);
}
