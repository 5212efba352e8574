//! Packets in the memory of guests, on their way through an inbox.
#![cfg(not(loom))]

use std::sync::Arc;

use vmring_core::guest::{GuestMemory, GuestRegion};
use vmring_core::offload::{Checksum, Gso, LEN, OffloadHeader};
use vmring_core::{GuestBuffer, HeapBacking, SegmentTable};
use vmring_embedded::inbox::{Collector, Delivery, Inbox};
use vmring_embedded::limits::{GROUP_MAX, HEAD_LEN};
use vmring_embedded::packet::{Packet, PacketBuffer};

const MAX_FRAME: usize = 200;

enum Lent {
    Own(Vec<u8>),
    Guest(GuestBuffer),
}

impl AsMut<[u8]> for Lent {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Lent::Own(bytes) => bytes,
            Lent::Guest(_) => &mut [],
        }
    }
}

impl PacketBuffer for Lent {
    fn guest(&self) -> Option<&GuestBuffer> {
        match self {
            Lent::Own(_) => None,
            Lent::Guest(buffer) => Some(buffer),
        }
    }
}

/// A guest of 64 KiB, and a table for all its segments.
fn table() -> SegmentTable {
    let region = GuestRegion::new(0, Arc::new(HeapBacking::new(0x1_0000)));
    SegmentTable::new(GuestMemory::new([region]).expect("a region"), 4096).expect("a table")
}

fn open(overflow: u32) -> (vmring_core::sync::Arc<Inbox<Lent>>, Collector<Lent>) {
    let inbox = vmring_core::sync::Arc::new(Inbox::new(1024, overflow, MAX_FRAME));
    let collector = Inbox::open(&inbox, Arc::new(|| {})).expect("it has no collector");
    (inbox, collector)
}

fn guest(table: &SegmentTable, ranges: &[(u64, u32)], header: u32) -> Lent {
    Lent::Guest(table.buffer(ranges.iter().copied(), header).expect("it is memory"))
}

/// Collects one packet: its bytes, and in how many buffers they are.
fn collect(collector: &mut Collector<Lent>) -> Option<(Vec<u8>, usize)> {
    let (mut bytes, mut buffers) = (Vec::new(), 0);
    loop {
        let part = collector.collect()?;
        match part.buffer {
            Lent::Own(own) => bytes.extend(&own[..part.len]),
            Lent::Guest(guest) => {
                let header = if buffers == 0 { guest.header_len() } else { 0 };
                let mut piece = vec![0; part.len];
                guest.segments().skip_bytes(header).copy_to(&mut piece);
                bytes.extend(piece);
            }
        }
        buffers += 1;
        if !part.more {
            return Some((bytes, buffers));
        }
    }
}

/// Goal: the receiver gets the first bytes by which the network has decided, whatever the guest writes
/// there before they are copied.
#[test]
fn what_was_decided_by_is_what_arrives() {
    let table = table();
    let sent = table.buffer([(0, 20), (100, 80)], 0).expect("it is memory");
    let write = |byte: u8| sent.segments().copy_from(&[byte; 100]);
    for overflow in [false, true] {
        let (inbox, mut collector) = open(4);
        for (parts, expected) in [(vec![(1000, 200)], 1), (vec![(1000, 10), (1100, 95)], 2)] {
            write(1);
            let packet = Packet::from(&sent);
            write(2);
            let post = |collector: &mut Collector<Lent>| {
                for part in &parts {
                    assert!(collector.post(guest(&table, &[*part], 0)).is_ok());
                }
            };
            if !overflow {
                post(&mut collector);
            }
            assert!(!matches!(inbox.deliver_packet(packet), Delivery::Dropped(_)));
            if overflow {
                post(&mut collector);
            }
            let (bytes, buffers) = collect(&mut collector).expect("it has arrived");
            assert_eq!((&bytes[..HEAD_LEN], &bytes[HEAD_LEN..]), (&[1; 42][..], &[2; 58][..]));
            assert_eq!(buffers, expected);
        }
    }
}

/// Goal: a packet arrives whole from any memory in any memory, and in buffers of both kinds.
#[test]
fn packets_go_between_all_kinds_of_memory() {
    let table = table();
    let bytes: Vec<u8> = (0..150).collect();
    let sent = table.buffer([(0, 1), (64, 0), (128, 99), (300, 50)], 0).expect("it is memory");
    sent.segments().copy_from(&bytes);
    for packet in [Packet::from(&bytes[..]), Packet::from(&sent)] {
        let lent = [
            (vec![Lent::Own(vec![0; 200])], 1),
            (vec![guest(&table, &[(1000, 100), (2000, 112)], 12)], 1),
            (vec![guest(&table, &[(1000, 7), (2000, 20)], 12), Lent::Own(vec![0; 200])], 2),
            (
                vec![
                    guest(&table, &[(1000, 12)], 12),
                    guest(&table, &[(1100, 49)], 12),
                    guest(&table, &[(1200, 101)], 12),
                ],
                3,
            ),
        ];
        for (buffers, expected) in lent {
            let (inbox, mut collector) = open(0);
            buffers.into_iter().for_each(|buffer| assert!(collector.post(buffer).is_ok()));
            assert_eq!(inbox.deliver_packet(packet), Delivery::Direct);
            assert_eq!(collect(&mut collector), Some((bytes.clone(), expected)));
            assert_eq!(collector.posted(), 0);
        }
    }
}

/// Goal: a guest that posts tiny buffers costs a sender no more than a look at [`GROUP_MAX`] of them,
/// and gets later packets that fit.
#[test]
fn a_packet_fills_no_more_than_a_bounded_number_of_buffers() {
    let table = table();
    let (inbox, mut collector) = open(4);
    for place in 0..2 * u64::from(GROUP_MAX) {
        let range = if place < u64::from(GROUP_MAX) { (place, 0) } else { (place, 1) };
        assert!(collector.post(guest(&table, &[range], 0)).is_ok());
    }
    let packet = [7; 100];
    assert_eq!(inbox.deliver(&packet), Delivery::Overflow, "256 buffers have no bytes");
    assert_eq!(collect(&mut collector), None);
    assert_eq!(collector.take_dropped(), 1);
    assert_eq!(inbox.deliver(&[]), Delivery::Direct);
    assert_eq!(collect(&mut collector), Some((vec![], 1)));
    // Behind the empty ones there is a byte each.
    for _ in 1..GROUP_MAX {
        assert_eq!(inbox.deliver(&[]), Delivery::Direct);
        assert_eq!(collect(&mut collector), Some((vec![], 1)));
    }
    assert_eq!(inbox.deliver(&packet), Delivery::Direct);
    assert_eq!(collect(&mut collector), Some((packet.to_vec(), 100)));
}

/// Goal: a receiver that had small buffers and has large ones later serves its senders as before.
#[test]
fn an_inbox_forgets_its_small_buffers() {
    let table = table();
    let (inbox, mut collector) = open(4);
    assert!(collector.post(guest(&table, &[(0, 10)], 0)).is_ok());
    assert_eq!(collector.discard(drop), 0);
    collector.reopen();
    for _ in 0..1024 {
        assert!(collector.post(Lent::Own(vec![0; MAX_FRAME])).is_ok());
    }
    let mut claim = inbox.claim(1024).expect("as many are posted");
    assert_eq!(claim.left(), 1024);
    while claim.left() > 0 {
        assert!(claim.fill(&[3; MAX_FRAME]));
    }
    drop(claim);
    for _ in 0..1024 {
        assert_eq!(collect(&mut collector), Some((vec![3; MAX_FRAME], 1)));
    }
}

/// The header of a packet to be cut, as its receiver gets it.
fn header(num_buffers: u16) -> OffloadHeader {
    OffloadHeader {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Gso::TcpV4,
        ecn: true,
        segment_size: 50,
        header_len: 54,
        num_buffers,
    }
}

/// Goal: an inbox with headers hands a packet's header over in front of the packet, and says in how
/// many buffers the packet is, whichever memory the buffers are in and whichever way the packet takes.
/// A packet whose sender has done all work gets a header that says so.
#[test]
fn a_receiver_with_offload_gets_the_header_of_each_packet() {
    let table = table();
    let bytes: Vec<u8> = (0..150).collect();
    let own = || Lent::Own(vec![0xee; LEN + MAX_FRAME]);
    let shapes: [(&dyn Fn() -> Vec<Lent>, u16); 3] = [
        (&|| vec![own()], 1),
        (&|| vec![guest(&table, &[(1000, 5), (2000, 207)], 12)], 1),
        (&|| vec![guest(&table, &[(1000, 60)], 12), own(), own()], 2),
    ];
    for (shape, expected) in shapes {
        for (asks, overflow) in [(false, false), (true, false), (false, true), (true, true)] {
            let inbox = vmring_core::sync::Arc::new(Inbox::with_headers(8, 2, MAX_FRAME));
            let mut collector = Inbox::open(&inbox, Arc::new(|| {})).expect("no collector");
            assert!(collector.post(Lent::Own(vec![0; LEN + MAX_FRAME - 1])).is_err());
            let post = |collector: &mut Collector<Lent>| {
                for buffer in shape() {
                    assert!(collector.post(buffer).is_ok());
                }
                // The buffers move up, and are where they are all the same.
                collector.recall_if(|_| false, |_| panic!("nothing is recalled"));
            };
            if !overflow {
                post(&mut collector);
            }
            let packet = Packet::from(&bytes[..]);
            let packet = if asks { packet.with_offload(&header(0)) } else { packet };
            assert!(!matches!(inbox.deliver_packet(packet), Delivery::Dropped(_)));
            if overflow {
                post(&mut collector);
            }
            let (mut arrived, mut buffers, mut found) = (Vec::new(), 0, None);
            while let Some(part) = collector.collect() {
                let (head, piece) = match part.buffer {
                    Lent::Own(own) => (own[..LEN].to_vec(), own[LEN..][..part.len].to_vec()),
                    Lent::Guest(buffer) => {
                        let (mut all, at) = (vec![0; LEN + part.len], buffer.header_len());
                        buffer.segments().copy_to(&mut all);
                        (all[..at].to_vec(), all[at..at + part.len].to_vec())
                    }
                };
                found.get_or_insert(head);
                arrived.extend(piece);
                buffers += 1;
                if !part.more {
                    break;
                }
            }
            assert_eq!((&arrived, buffers), (&bytes, expected));
            let found = *found.unwrap().first_chunk().expect("12 bytes");
            let plain = OffloadHeader { num_buffers: expected, ..OffloadHeader::NONE };
            let right = if asks { header(expected) } else { plain };
            assert_eq!(OffloadHeader::parse(&found), Ok(right), "{asks} {overflow}");
        }
    }
}

/// Goal: claims for several packets write a header too, which no earlier packet has left.
#[test]
fn a_claim_writes_a_header_that_asks_for_nothing() {
    let inbox = vmring_core::sync::Arc::new(Inbox::with_headers(8, 0, MAX_FRAME));
    let mut collector = Inbox::open(&inbox, Arc::new(|| {})).expect("no collector");
    for _ in 0..8 {
        assert!(collector.post(Lent::Own(vec![0xee; LEN + MAX_FRAME])).is_ok());
    }
    let mut claim = inbox.claim(8).expect("8 are posted");
    while claim.left() > 0 {
        assert!(claim.fill(&[7; 100]));
    }
    drop(claim);
    for _ in 0..8 {
        let packet = collector.collect().expect("8 have arrived");
        let Lent::Own(bytes) = packet.buffer else { panic!("no guest") };
        assert_eq!((&bytes[..LEN], packet.len), (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0][..], 100));
        assert_eq!(bytes[LEN..LEN + 100], [7; 100]);
    }
}
