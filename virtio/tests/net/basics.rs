//! Packets between two guests: order, contents, used lengths, and the buffers of real drivers.

use vmring::Interface;
use vmring::device::Offloads;
use vmring_virtio::net::Features;

use crate::driver::shapes::{self, Shape};
use crate::net::guest::{
    Guest, HEADER, Options, PLAIN_TO_SEND, frame, interface, poll_both, quiet_network,
};
use crate::support::allocations;

pub(crate) fn shape(name: &str) -> Shape {
    shapes::all().into_iter().find(|shape| shape.name == name).expect(name)
}

pub(crate) fn one_buffer(len: u32) -> Shape {
    Shape { name: "one buffer", buffers: vec![(len, true)], indirect: None }
}

pub(crate) fn pair(network: &str) -> [Guest; 2] {
    [0, 1].map(|_| Guest::new(network))
}

#[test]
fn a_packet_goes_from_guest_to_guest() {
    let [mut a, mut b] = pair("one packet");
    assert!(b.post(&shape("Linux, mergeable")));
    b.poll();
    let packet = a.frame_to(b.mac(), 60, 1);
    a.send(&packet);
    poll_both(&mut a, &mut b);
    assert_eq!(b.received(), [packet]);
    let sent = a.tx.collect();
    assert_eq!(sent.iter().map(|one| one.len).collect::<Vec<_>>(), [0]);
    assert_eq!((a.stats().tx_packets, a.stats().tx_bytes), (1, 60));
    assert_eq!((b.stats().rx_packets, b.stats().rx_bytes), (1, 60));
}

#[test]
fn packets_of_all_lengths_through_the_buffers_of_real_drivers() {
    let receiving: Vec<Shape> = (shapes::all().into_iter())
        .filter(|shape| shape.buffers.iter().all(|(_, writable)| *writable))
        .collect();
    assert!(receiving.len() > 5);
    // How a sender splits header and packet.
    let splits: [(&[u32], Option<usize>); 7] = [
        (&[u32::MAX], None),
        (&[12], None),
        (&[12, 66], None),
        (&[3, 5, 4, 14, 1, 1], Some(0)),
        (&[5, 100], Some(1)),
        (&[12 + 54], Some(0)),
        (&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], None),
    ];
    let [mut a, mut b] = pair("shapes");
    let mut number = 0;
    for to in &receiving {
        for (lens, indirect) in splits {
            for len in [18, 60, 590, 1514] {
                number += 1;
                assert!(b.post(to), "{}", to.name);
                b.poll();
                let packet = a.frame_to(b.mac(), len, number);
                assert!(a.send_in(&packet, lens, indirect));
                poll_both(&mut a, &mut b);
                let returned = b.returned();
                assert_eq!(returned.len(), 1, "{} {lens:?} {len}", to.name);
                assert_eq!(returned[0].0 as usize, HEADER + len, "{} {lens:?}", to.name);
                assert_eq!(returned[0].1[HEADER..], packet, "{} {lens:?} {len}", to.name);
                assert_eq!(a.tx.collect().len(), 1);
            }
        }
    }
}

/// A packet of 64 KiB that is to be cut is copied once too, into mergeable buffers of 4 KiB.
#[test]
fn a_long_packet_between_guests_is_copied_once() {
    const LONG_LEN: usize = 65_535;
    const TO_CUT: [u8; HEADER] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let mut offloads = Offloads::default();
    (offloads.checksum, offloads.tso4) = (true, true);
    let [mut a, mut b] = [0, 1].map(|_| {
        let network = quiet_network("long copies");
        let interface = Interface::builder().offloads(offloads).device(network).start();
        Guest::with(interface.expect("an interface"), &Options::default())
    });
    assert_eq!(b.fill(&one_buffer(4096), 20), 20);
    b.poll();
    let mut packet = a.frame_to(b.mac(), LONG_LEN, 7);
    // IPv4 and TCP.
    packet[12..34].fill(0);
    (packet[12], packet[14], packet[22], packet[23], packet[46]) = (8, 0x45, 64, 6, 0x50);
    packet[16..18].copy_from_slice(&((LONG_LEN - 14) as u16).to_be_bytes());
    assert!(a.send_raw(&TO_CUT, &packet, &[4096; 17], None));
    poll_both(&mut a, &mut b);
    let returned = b.returned();
    assert_eq!(returned.len(), (LONG_LEN + HEADER).div_ceil(4096), "{:?}", b.stats());
    let bytes: Vec<u8> = returned.into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(bytes[..10], TO_CUT[..10]);
    assert!(bytes[HEADER..] == packet, "the bytes differ");
    let bounced = [(&a, 1), (&b, 0)].map(|(guest, queue)| {
        let stats = guest.device.ring_stats(queue).expect("it runs");
        stats.bounced_reads + stats.bounced_writes
    });
    let (a, b, again) = (a.stats(), b.stats(), second_copies(&b));
    assert_eq!((bounced, a.tx_copied, b.rx_copied, b.rx_software, again), ([0, 0], 0, 0, 0, 0));
}

/// A packet is copied once between two guests, whatever the buffers are like. One that finds no buffer
/// waits, which costs a second copy and is counted.
#[test]
fn a_packet_between_guests_is_copied_once() {
    for (number, (len, to, buffers)) in (0..).zip([
        (60, one_buffer(1526), 1),
        (1514, one_buffer(1526), 1),
        (1514, shape("Linux, mergeable"), 1),
        (1514, one_buffer(700), 3),
    ]) {
        let [mut a, mut b] = pair("copies");
        assert_eq!(b.fill(&to, buffers), buffers);
        b.poll();
        let packet = a.frame_to(b.mac(), len, number);
        a.send(&packet);
        poll_both(&mut a, &mut b);
        let returned = b.returned();
        assert_eq!(returned.len(), buffers, "{len} {}", to.name);
        let bytes: Vec<u8> = returned.into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert_eq!(bytes[HEADER..], packet, "{len} {}", to.name);
        let bounced = [(&a, 1), (&b, 0)].map(|(guest, queue)| {
            let stats = guest.device.ring_stats(queue).expect("it runs");
            stats.bounced_reads + stats.bounced_writes
        });
        assert_eq!(bounced, [0, 0]);
        assert_eq!((a.stats().tx_copied, b.stats().rx_software, second_copies(&b)), (0, 0, 0));

        // There is no buffer for this one when it is sent.
        a.send(&packet);
        poll_both(&mut a, &mut b);
        assert_eq!(b.fill(&to, buffers), buffers);
        poll_both(&mut a, &mut b);
        assert_eq!((b.returned().len(), second_copies(&b)), (buffers, 1));
    }
}

fn second_copies(guest: &Guest) -> u64 {
    let counters = guest.device.interface().counters();
    counters.iter().find(|(name, _)| *name == "second copies").expect("it is counted").1
}

#[test]
fn a_burst_keeps_its_order_and_costs_one_interrupt() {
    let [mut a, mut b] = pair("burst");
    assert_eq!(b.fill(&one_buffer(2048), 100), 100);
    b.poll();
    let before = (a.interrupts.of(1), b.interrupts.of(0));
    let packets: Vec<_> = (0..32).map(|n| a.frame_to(b.mac(), 60 + n as usize, n)).collect();
    packets.iter().for_each(|packet| a.send(packet));
    a.poll();
    b.poll();
    assert_eq!(b.received(), packets);
    assert_eq!(a.tx.collect().len(), 32);
    let interrupts = (a.interrupts.of(1) - before.0, b.interrupts.of(0) - before.1);
    assert_eq!(interrupts, (1, 1), "one for each queue and burst");
    assert_eq!(b.stats().interrupts, b.interrupts.of(0));
}

#[test]
fn a_guest_that_wants_no_interrupts_gets_none() {
    let [mut a, mut b] = pair("no interrupts");
    b.rx.set_no_interrupt(true);
    b.fill(&one_buffer(2048), 10);
    b.poll();
    let before = b.interrupts.of(0);
    a.send(&a.frame_to(b.mac(), 60, 1));
    poll_both(&mut a, &mut b);
    assert_eq!((b.received().len(), b.interrupts.of(0)), (1, before));
}

#[test]
fn an_event_index_says_which_packet_interrupts() {
    let options = Options { without: Features::NONE, ..Options::default() };
    let [mut a, mut b] = [0, 1].map(|_| Guest::with(interface("event index"), &options));
    b.fill(&one_buffer(2048), 64);
    b.poll();
    // The first look after a start interrupts in any case.
    a.send(&a.frame_to(b.mac(), 60, 0));
    poll_both(&mut a, &mut b);
    b.received();
    let before = b.interrupts.of(0);
    b.rx.set_used_event(b.rx.used_index().wrapping_add(4));
    for number in 1..=4 {
        a.send(&a.frame_to(b.mac(), 60, number));
        poll_both(&mut a, &mut b);
    }
    assert_eq!(b.interrupts.of(0), before, "the fifth one interrupts");
    a.send(&a.frame_to(b.mac(), 60, 5));
    poll_both(&mut a, &mut b);
    assert_eq!((b.interrupts.of(0), b.received().len()), (before + 1, 5));
}

#[test]
fn indices_wrap() {
    for base in [0xfff0, 0x7ff8] {
        let options = Options { base, size: 16, ..Options::default() };
        let [mut a, mut b] = [0, 1].map(|_| Guest::with(interface("wrap"), &options));
        for number in 0..100 {
            b.fill(&one_buffer(1600), 4);
            b.poll();
            let packet = a.frame_to(b.mac(), 100, number);
            a.send(&packet);
            poll_both(&mut a, &mut b);
            assert_eq!(b.received(), [packet], "{base:#x} {number}");
            assert_eq!(a.tx.collect().len(), 1);
        }
    }
}

#[test]
fn a_buffer_that_is_too_small_returns_empty_and_the_queue_goes_on() {
    let without = Features::EVENT_IDX | Features::MRG_RXBUF;
    let options = Options { without, ..Options::default() };
    let [mut a, mut b] = [0, 1].map(|_| Guest::with(interface("small buffers"), &options));
    // No space behind the header, none for the header, too little for the packet, enough.
    for len in [12, 4, 12 + 59, 12 + 60, 2048] {
        b.post(&one_buffer(len));
    }
    b.poll();
    let packets: Vec<_> = (0..3).map(|n| a.frame_to(b.mac(), 60, n)).collect();
    packets.iter().for_each(|packet| a.send(packet));
    poll_both(&mut a, &mut b);
    let returned = b.returned();
    let lens: Vec<_> = returned.iter().map(|one| one.0).collect();
    assert_eq!(lens, [0, 0, 0, 72, 72]);
    // The packet for the small buffer is lost, and no other.
    assert_eq!([&returned[3].1[HEADER..], &returned[4].1[HEADER..]], [&packets[1], &packets[2]]);
    let stats = b.stats();
    assert_eq!((stats.rx_useless, stats.rx_too_small, stats.rx_packets), (2, 1, 2));
}

#[test]
fn what_is_no_packet_is_dropped_in_its_turn() {
    let [mut a, mut b] = pair("bad packets");
    b.fill(&one_buffer(2048), 10);
    b.poll();
    let good: Vec<_> = (0..3).map(|n| a.frame_to(b.mac(), 100, n)).collect();
    let too_big = a.frame_to(b.mac(), 3000, 9);
    let mut checksum = PLAIN_TO_SEND;
    checksum[0] = 1; // NEEDS_CSUM, which was not offered
    let mut unknown = PLAIN_TO_SEND;
    unknown[1] = 77; // no type of GSO
    let mut reserved = PLAIN_TO_SEND;
    reserved[0] = 0x80; // a flag that a device ignores
    a.send(&good[0]);
    a.send_raw(&[0; 7], &[], &[u32::MAX], None);
    a.send_raw(&PLAIN_TO_SEND, &[], &[u32::MAX], None);
    a.send_raw(&checksum, &good[1], &[u32::MAX], None);
    a.send_raw(&unknown, &good[1], &[u32::MAX], None);
    a.send(&too_big);
    a.send_raw(&reserved, &good[1], &[u32::MAX], None);
    a.send(&good[2]);
    poll_both(&mut a, &mut b);
    assert_eq!(b.received(), good);
    assert!(a.tx.collect().iter().map(|one| one.len).eq([0; 8]));
    let stats = a.stats();
    assert_eq!((stats.tx_short, stats.tx_bad_header, stats.tx_too_big), (2, 2, 1));
    assert_eq!(stats.tx_packets, 3);
}

#[test]
fn chains_of_very_many_segments_are_served() {
    let [mut a, mut b] = pair("many segments");
    // 700 segments of one byte and a large one: the first 256 have space for a small packet.
    let mut many = vec![(1, true); 700];
    many[200].0 = 1200;
    let shape = Shape { name: "many", buffers: many, indirect: Some(0) };
    assert!(b.post(&shape) && b.post(&one_buffer(2048)));
    b.poll();
    let packets = [a.frame_to(b.mac(), 1000, 1), a.frame_to(b.mac(), 1000, 2)];
    // 12 bytes of header and 388 of the packet in segments of one byte each.
    assert!(a.send_in(&packets[0], &[1; 400], Some(0)));
    a.send(&packets[1]);
    poll_both(&mut a, &mut b);
    let returned = b.returned();
    assert_eq!(returned.len(), 2);
    assert_eq!(returned[0].1[HEADER..], packets[0]);
    assert_eq!(returned[1].1[HEADER..], packets[1]);
    assert_eq!((a.stats().tx_copied, a.stats().broken_chains), (1, 0));
}

#[test]
fn more_buffers_than_the_ring_takes_wait_in_the_queue() {
    let mut options = Options::default();
    options.settings.depth = 8;
    let [mut a, mut b] = [0, 1].map(|_| Guest::with(interface("shallow"), &options));
    assert_eq!(b.fill(&one_buffer(1600), 200), 200);
    b.poll();
    assert!(b.device.arm(), "the rest is no reason to stay awake");
    let packets: Vec<_> = (0..150).map(|n| a.frame_to(b.mac(), 100, n)).collect();
    let mut came = Vec::new();
    for packet in &packets {
        a.send(packet);
        poll_both(&mut a, &mut b);
        came.extend(b.received());
    }
    assert_eq!(came, packets);
}

/// A ring that was full when a packet was taken, and is not any more, is no reason to sleep.
#[test]
fn packets_behind_a_full_ring_are_sent_without_another_kick() {
    for depth in [1, 2, 32] {
        let mut options = Options::default();
        options.settings.depth = depth;
        let [mut a, mut b] = [0, 1].map(|_| Guest::with(interface("full ring"), &options));
        b.fill(&one_buffer(2048), 200);
        poll_both(&mut a, &mut b);
        let packets: Vec<_> = (0..100).map(|n| a.frame_to(b.mac(), 60, n)).collect();
        packets.iter().for_each(|packet| a.send(packet));
        a.poll();
        assert_eq!(a.tx.collect().len(), 100, "{depth}");
    }
}

#[test]
fn a_packet_costs_no_allocation() {
    let [mut a, mut b] = pair("allocations");
    b.fill(&one_buffer(2048), 200);
    b.poll();
    let packet = frame(a.mac(), b.mac(), 600, 1);
    a.send(&packet);
    poll_both(&mut a, &mut b);
    (0..64).for_each(|_| a.send(&packet));
    let count = allocations(|| {
        poll_both(&mut a, &mut b);
    });
    assert_eq!(count, 0);
    assert_eq!(b.received().len(), 65);
}
