//! The offload header in front of a packet, in its frame's headroom.
#![cfg(not(loom))]

use vmring_core::offload::{Checksum, Gso, LEN, OffloadError, OffloadHeader};
use vmring_core::{
    Class, Depths, Frame, FrontError, HeapBacking, Layout, OutOfSpace, Pool, Regions,
};
use vmring_core::{Outcome, Submission, rings};

const HEADROOM: u32 = 64;
const TSO: OffloadHeader = OffloadHeader {
    checksum: Checksum::Partial { start: 34, offset: 16 },
    gso: Gso::TcpV4,
    segment_size: 1448,
    header_len: 66,
    ..OffloadHeader::NONE
};

fn pool() -> Pool {
    let layout = Layout { slots: 4, slot_size: 4096, headroom: HEADROOM };
    Pool::new(Box::new(HeapBacking::new(4 * 4096)), layout).unwrap()
}

fn packet(pool: &Pool, len: usize) -> Frame {
    let mut frame = pool.alloc().unwrap();
    frame.set_len(len).unwrap();
    frame.fill(0x5a);
    frame
}

/// Receives a packet like a device: header and packet in one piece.
fn received(pool: &Pool, header: &OffloadHeader, len: usize) -> Frame {
    let mut frame = pool.alloc().unwrap();
    let space = frame.buffer_with_header_mut(LEN).unwrap();
    header.write(space.first_chunk_mut().unwrap());
    space[LEN..LEN + len].fill(0x5a);
    frame.set_received_with_offload(len).unwrap();
    frame
}

#[test]
fn the_header_is_directly_in_front_of_the_packet() {
    let pool = pool();
    let mut frame = packet(&pool, 2000);
    assert_eq!((frame.offload(), frame.with_offload()), (Ok(None), None));
    frame.set_offload(&TSO).unwrap();
    assert_eq!(frame.offload(), Ok(Some(TSO)));
    assert_eq!((frame.len(), frame.headroom()), (2000, HEADROOM as usize), "lengths exclude it");
    let whole = frame.with_offload().unwrap();
    assert_eq!(whole.len(), LEN + 2000);
    let mut header = [0; LEN];
    TSO.write(&mut header);
    assert_eq!((&whole[..LEN], &whole[LEN..]), (&header[..], &[0x5a; 2000][..]));
}

#[test]
fn trimming_and_growing_move_the_header_and_what_it_points_at() {
    let pool = pool();
    let mut frame = packet(&pool, 2000);
    frame.set_offload(&TSO).unwrap();
    frame.trim_front(4).unwrap();
    let moved = frame.offload().unwrap().unwrap();
    assert_eq!(moved.checksum, Checksum::Partial { start: 30, offset: 16 });
    assert_eq!((moved.header_len, frame.len()), (62, 1996));
    assert_eq!(&frame.with_offload().unwrap()[LEN..], &[0x5a; 1996]);
    frame.grow_front(4).unwrap();
    assert_eq!(frame.offload(), Ok(Some(TSO)));

    // A trim beyond the checksum's start is refused, because no header would be true. Nothing
    // changes.
    let error = OffloadError::TrimPastChecksumStart { trim: 35, start: 34 };
    assert_eq!(frame.trim_front(35), Err(FrontError::Offload(error)));
    assert_eq!((frame.offload(), frame.len()), (Ok(Some(TSO)), 2000));

    // The header needs space, too.
    let space = HEADROOM as usize - LEN;
    let error = OutOfSpace { wanted: space + 1, available: space };
    assert_eq!(frame.grow_front(space + 1), Err(FrontError::Space(error)));
    frame.grow_front(space).unwrap();
    assert_eq!(frame.headroom(), LEN);
    let far = OffloadHeader { checksum: Checksum::Partial { start: 0xfff0, offset: 0 }, ..TSO };
    frame.trim_front(space).unwrap();
    frame.set_offload(&far).unwrap();
    let error = OffloadError::ChecksumStartTooFar { grow: 16, start: 0xfff0 };
    assert_eq!(frame.grow_front(16), Err(FrontError::Offload(error)));
}

#[test]
fn a_frame_that_is_reused_carries_no_stale_header() {
    let pool = pool();
    let mut frame = received(&pool, &TSO, 2000);
    // The frame was received, and then another packet is written into it.
    assert_eq!(frame.offload(), Ok(Some(OffloadHeader { num_buffers: 1, ..TSO })));
    assert!(!frame.has_offload_to_send(), "not forwarded unless it is said");
    frame.copy_from(&[1; 60]).unwrap();
    assert_eq!(frame.offload(), Ok(None));
    frame.set_offload(&TSO).unwrap();
    assert!(frame.has_offload_to_send());
    frame.reset();
    assert_eq!((frame.offload(), frame.has_offload_to_send()), (Ok(None), false));
    frame.set_len(60).unwrap();
    frame.set_offload(&TSO).unwrap();
    frame.clear_offload();
    assert_eq!(frame.offload(), Ok(None));
}

#[test]
fn forwarding_takes_out_what_only_a_receiver_may_say() {
    let pool = pool();
    let valid = OffloadHeader { checksum: Checksum::DataValid, ..OffloadHeader::NONE };
    let mut frame = received(&pool, &valid, 60);
    let seen = frame.offload().unwrap().unwrap();
    assert_eq!((seen.checksum, seen.num_buffers), (Checksum::DataValid, 1));
    assert_eq!(frame.forward_offload(), Ok(true));
    assert_eq!(frame.offload(), Ok(Some(OffloadHeader::NONE)));
    assert!(frame.has_offload_to_send());
    assert_eq!(packet(&pool, 60).forward_offload(), Ok(false), "there is nothing to forward");
}

#[test]
fn a_device_that_writes_nonsense_is_an_error_and_not_a_panic() {
    let pool = pool();
    let mut frame = pool.alloc().unwrap();
    frame.buffer_with_header_mut(LEN).unwrap()[..LEN].fill(0xff);
    frame.set_received_with_offload(60).unwrap();
    let error = OffloadError::ReservedFlags { flags: 0xf8 };
    assert_eq!(frame.offload(), Err(error));
    assert_eq!(frame.forward_offload(), Err(error));
    assert_eq!(frame.trim_front(4), Err(FrontError::Offload(error)));
    assert_eq!(frame.grow_front(4), Err(FrontError::Offload(error)));
    assert_eq!(frame.with_offload().map(<[u8]>::len), Some(72));
    // This is more than the slot holds.
    let space = 4096 - HEADROOM as usize;
    let refused = OutOfSpace { wanted: space + 1, available: space };
    assert_eq!(frame.set_received_with_offload(space + 1), Err(refused));
}

#[test]
fn without_headroom_there_is_no_header() {
    let layout = Layout { slots: 1, slot_size: 4096, headroom: 8 };
    let pool = Pool::new(Box::new(HeapBacking::new(4096)), layout).unwrap();
    let mut frame = packet(&pool, 60);
    let refused = OutOfSpace { wanted: LEN, available: 8 };
    assert_eq!(frame.set_offload(&TSO), Err(refused));
    assert_eq!(frame.set_received_with_offload(60), Err(refused));
    assert!(frame.buffer_with_header_mut(LEN).is_none());
    assert_eq!(frame.offload(), Ok(None));
}

#[test]
fn headroom_of_exactly_a_header_is_enough() {
    let layout = Layout { slots: 1, slot_size: 4096, headroom: LEN as u32 };
    let pool = Pool::new(Box::new(HeapBacking::new(4096)), layout).unwrap();
    let mut frame = packet(&pool, 60);
    assert_eq!(frame.set_offload(&TSO), Ok(()));
    assert_eq!(frame.set_received_with_offload(60), Ok(()));
    assert!(frame.buffer_with_header_mut(LEN).is_some());
}

#[test]
fn the_header_goes_through_both_queues_with_its_frame() {
    let pool = pool();
    let regions = Regions::new(vec![pool.clone()]).unwrap();
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(1, 1, 1), regions, u32::MAX);
    let mut frame = packet(&pool, 2000);
    frame.set_offload(&TSO).unwrap();
    sq_producer.push(Class::Write, frame, 1).unwrap();
    sq_producer.publish();
    sq_consumer.ready();
    let Some(Submission::Packet { class: Class::Write, buffer: frame, .. }) = sq_consumer.pop()
    else {
        panic!("a write")
    };
    let frame = frame.into_frame().unwrap();
    assert_eq!((frame.offload(), frame.has_offload_to_send()), (Ok(Some(TSO)), true));
    drop(frame);
    cq_producer.push(Class::Read, received(&pool, &TSO, 2000), 2, Outcome::Done);
    cq_producer.publish();
    cq_consumer.ready();
    // This completion answers no submission. The credit that it returns does not matter here.
    let frame = cq_consumer.pop().unwrap().frame.unwrap();
    let seen = OffloadHeader { num_buffers: 1, ..TSO };
    assert_eq!((frame.offload(), frame.has_offload_to_send()), (Ok(Some(seen)), false));
}
