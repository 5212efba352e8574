//! The virtio header between the caller and a device that negotiated it: its position, when it may
//! be set, and what is refused.

use std::sync::{Arc, Mutex};

use vmring::device::Progress;
use vmring::{
    Checksum, ConfigError, Direction, Drive, Error, Frame, Gso, Interface, Loopback, OffloadError,
    OffloadHeader, PoolBuilder, Ring, SubmitErrorKind,
};

use crate::support::{LONG, Script, ScriptQueue, guarded, reap_n};

const LEN: usize = vmring::OFFLOAD_LEN;
const TSO: OffloadHeader = OffloadHeader {
    checksum: Checksum::Partial { start: 34, offset: 16 },
    gso: Gso::TcpV4,
    segment_size: 1448,
    header_len: 54,
    ..OffloadHeader::NONE
};

/// What the device was given to send. Header and packet are in one piece.
type Wire = Arc<Mutex<Vec<Vec<u8>>>>;

/// A device that sends to a list and receives `incoming` again and again. If `header`, it has the
/// virtio header and the TCP offloads of IPv4.
fn device(header: bool, incoming: Vec<u8>) -> (Interface, Wire) {
    let wire: Wire = Arc::default();
    let sent = wire.clone();
    let len = if header { LEN } else { 0 };
    let interface = Script::new(move |_, _| {
        let (sent, incoming) = (sent.clone(), incoming.clone());
        ScriptQueue::new(move |io| {
            while let Some(mut slot) = io.take_write() {
                let packet = slot.packet_with_header_mut(len).expect("it was checked at submit");
                sent.lock().unwrap().push(packet.to_vec());
                io.complete_write(slot);
            }
            while let Some(mut slot) = io.take_read() {
                let room = slot.buffer_with_header_mut(len).expect("it was checked at submit");
                room[..incoming.len()].copy_from_slice(&incoming);
                match header {
                    true => io.complete_read_with_header(slot, incoming.len()),
                    false => io.complete_read(slot, incoming.len()),
                }
            }
            Ok(Progress::Idle)
        })
    })
    .limits(move |caps| {
        caps.headroom = len as u32;
        caps.offloads.virtio_header = header;
        caps.offloads.checksum = header;
        caps.offloads.tso4 = header;
    })
    .start();
    (interface, wire)
}

fn inline(interface: &Interface) -> Ring {
    interface.ring(Direction::Both).depth(4).drive(Drive::Inline).build().unwrap()
}

fn packet(ring: &Ring, len: usize) -> Frame {
    let mut frame = ring.alloc().unwrap();
    frame.set_len(len).unwrap();
    frame.fill(0x5a);
    frame
}

fn send(ring: &mut Ring, frame: Frame) -> Frame {
    ring.submit_write(frame, 1).unwrap();
    let done = reap_n(ring, 1).pop().unwrap();
    done.frame.unwrap()
}

#[test]
fn a_header_is_sent_as_set_and_zeroed_when_it_is_not() {
    guarded(|| {
        let (interface, wire) = device(true, Vec::new());
        let mut ring = inline(&interface);
        let mut frame = packet(&ring, 1500);
        frame.set_offload(&TSO).unwrap();
        let mut frame = send(&mut ring, frame);
        // Use the frame for another packet. Nothing of the earlier header may be left.
        frame.reset();
        frame.set_len(60).unwrap();
        frame.fill(0x33);
        send(&mut ring, frame);
        let wire = wire.lock().unwrap();
        let mut header = [0; LEN];
        TSO.write(&mut header);
        assert_eq!(wire[0], [&header[..], &[0x5a; 1500]].concat());
        assert_eq!(wire[1], [&[0; LEN][..], &[0x33; 60]].concat());
    });
}

#[test]
fn a_received_header_is_forwarded_only_when_it_is_said() {
    guarded(|| {
        let mut incoming = [0; LEN + 1500];
        let (header, body) = incoming.split_first_chunk_mut().unwrap();
        TSO.write(header);
        body.fill(0x44);
        let (interface, wire) = device(true, incoming.to_vec());
        let mut ring = inline(&interface);
        let mut frames = Vec::new();
        for number in 0..2 {
            let frame = ring.alloc().unwrap();
            ring.submit_read(frame, number).unwrap();
            let done = reap_n(&mut ring, 1).pop().unwrap();
            assert_eq!(done.result, Ok(1500), "lengths exclude the header");
            let frame = done.frame.unwrap();
            let seen = frame.offload().unwrap().unwrap();
            assert_eq!(seen, OffloadHeader { num_buffers: 1, ..TSO }, "TAP says 0 here");
            frames.push(frame);
        }
        let silent = frames.pop().unwrap();
        let mut said = frames.pop().unwrap();
        assert_eq!(said.forward_offload(), Ok(true));
        send(&mut ring, said);
        send(&mut ring, silent);
        let wire = wire.lock().unwrap();
        assert_eq!(wire[0], incoming, "with num_buffers 0 again");
        assert_eq!(wire[1], [&[0; LEN][..], &[0x44; 1500]].concat());
    });
}

#[test]
fn a_header_that_cannot_be_true_is_refused_with_its_frame() {
    guarded(|| {
        let (interface, wire) = device(true, Vec::new());
        let mut ring = inline(&interface);
        let mut frame = packet(&ring, 40);
        frame.set_offload(&OffloadHeader { header_len: 0, ..TSO }).unwrap();
        let refused = ring.submit_write(frame, 1).unwrap_err();
        let error = OffloadError::ChecksumPastEnd { start: 34, offset: 16, packet_len: 40 };
        assert_eq!(refused.kind, SubmitErrorKind::Offload(error));
        assert!(!refused.is_backpressure());
        assert_eq!(*refused.frame, [0x5a; 40]);
        assert!(wire.lock().unwrap().is_empty());
    });
}

#[test]
fn what_was_not_negotiated_is_refused() {
    guarded(|| {
        let (interface, wire) = device(true, Vec::new());
        let mut ring = inline(&interface);
        let mut frame = packet(&ring, 1500);
        frame.set_offload(&OffloadHeader { gso: Gso::TcpV6, ..TSO }).unwrap();
        let refused = ring.submit_write(frame, 1).unwrap_err();
        assert_eq!(refused.kind, SubmitErrorKind::OffloadNotNegotiated);

        // A device without offload sends a packet whose header asks for nothing, and refuses any
        // other header.
        let (interface, plain) = device(false, Vec::new());
        let mut ring = inline(&interface);
        let mut frame = packet(&ring, 1500);
        frame.set_offload(&TSO).unwrap();
        let refused = ring.submit_write(frame, 1).unwrap_err();
        assert_eq!(refused.kind, SubmitErrorKind::OffloadNotNegotiated);
        let mut frame = refused.frame;
        frame.set_offload(&OffloadHeader::NONE).unwrap();
        send(&mut ring, frame);
        assert_eq!(*plain.lock().unwrap(), [vec![0x5a; 1500]], "the header is absent, not zero");
        assert!(wire.lock().unwrap().is_empty());
    });
}

#[test]
fn frames_need_headroom_for_the_header() {
    guarded(|| {
        let (interface, _) = device(true, Vec::new());
        let tight = PoolBuilder::new(4, 1600).headroom(LEN - 1).build().unwrap();
        let refused = interface.ring(Direction::Both).pool(&tight).build().unwrap_err();
        let expected = ConfigError::PoolHeadroom { headroom: LEN - 1, needed: LEN };
        assert!(matches!(refused, Error::Config(error) if error == expected));

        // A ring's own pool has this headroom even if the caller asks for less.
        let mut ring = interface.ring(Direction::Both).depth(4).headroom(0).build().unwrap();
        let mut frame = packet(&ring, 60);
        frame.grow_front(4).unwrap();
        let headroom = frame.headroom();
        assert!(headroom < LEN);
        let refused = ring.submit_write(frame, 1).unwrap_err();
        assert_eq!(refused.kind, SubmitErrorKind::NoHeadroom { headroom, needed: LEN });
        assert!(ring.wait(1, Some(LONG)) == 0);
    });
}

#[test]
fn a_device_that_claims_a_packet_shorter_than_its_header_is_refused() {
    guarded(|| {
        let (interface, _) = device(true, vec![0; LEN - 1]);
        let mut ring = inline(&interface);
        let frame = ring.alloc().unwrap();
        ring.submit_read(frame, 1).unwrap();
        let done = reap_n(&mut ring, 1).pop().unwrap();
        let status = vmring::Status::InvalidArgument;
        assert_eq!(done.result, Err(vmring::EntryError::Device(status)));
        assert!(done.frame.is_some());
    });
}

#[test]
fn a_device_without_offload_says_so_at_start() {
    let mut offloads = vmring::device::Offloads::default();
    offloads.tso4 = true;
    let error =
        Interface::builder().offloads(offloads).device(Loopback::new(1500)).start().unwrap_err();
    assert!(matches!(error, Error::NotSupported { what: "offload", .. }), "{error}");
}
