//! Segments of up to 64 KiB, to and from guests that take or send them.

use vmring_core::offload::{Checksum, Gso, OffloadHeader, Offloads};
use vmring_nat::{GuestFrame, Link};

use crate::support::port::{PORT, config, plain_link};
use crate::support::script::{Script, Segment, from_guest, from_world, stream};

fn link(offloads: Offloads) -> Link {
    Link { offloads, longest: 65_549, ..plain_link() }
}

/// Goal: a guest that cuts segments gets them whole, with the checksum left to it, and with a length
/// that is a number of segments.
#[test]
fn large_segments_go_to_guests_that_cut_them() {
    for rings_only in [false, true] {
        for v6 in [false, true] {
            let mut script = Script::new(config(rings_only), link(Offloads::ALL), v6);
            script.run(
                "
                < S 0 win 65535 mss 1400 ws 7
                peer connects
                > S. 0 ack 1
                < . 1 ack 1 win 4000
                ",
            );
            script.net.kernel.write(0, &stream(from_world, 0, 200_000));
            script.net.settle();
            let mut at = 0;
            while let Some((frame, header)) = script.net.out.frames.pop_front() {
                let (segment, _) = Segment::parse(&frame, &header, &script.net.out.link).unwrap();
                let len = segment.data.len();
                assert!(segment.data == stream(from_world, at, at + len), "wrong bytes");
                at += len;
                assert!(matches!(header.checksum, Checksum::Partial { .. }));
                if len > 1400 {
                    let gso = if v6 { Gso::TcpV6 } else { Gso::TcpV4 };
                    assert_eq!((header.gso, header.segment_size), (gso, 1400));
                }
                assert!(at == 200_000 || len == 46 * 1400, "{len} bytes at {at}");
            }
            assert_eq!(at, 200_000);
        }
    }
}

/// Goal: a port that completes checksums but cuts nothing gets single segments.
#[test]
fn a_checksum_may_be_left_alone() {
    let checksum = Offloads::ALL & {
        let mut only = Offloads::default();
        (only.checksum, only.virtio_header) = (true, true);
        only
    };
    let mut script = Script::new(config(false), link(checksum), false);
    script.open().run("peer writes 1500");
    for len in [1000, 500] {
        let (frame, header) = script.net.out.frames.pop_front().unwrap();
        assert_eq!((frame.len(), header.gso), (54 + len, Gso::None));
        assert!(matches!(header.checksum, Checksum::Partial { .. }));
    }
}

/// Goal: the padding of a short frame has nothing of frames that were built at the same place before, and its
/// checksum is complete.
#[test]
fn short_segments_are_padded_with_zeros() {
    for offloads in [Offloads::default(), Offloads::ALL] {
        for rings_only in [false, true] {
            let mut script = Script::new(config(rings_only), link(offloads), false);
            script.open().run(
                "
                peer writes 1000
                > P. 1:1001 ack 1
                < . 1 ack 1001 win 512
                peer writes 1
                ",
            );
            let (frame, header) = &script.net.out.frames[0];
            assert_eq!((frame.len(), *header), (60, OffloadHeader::NONE));
            assert_eq!(frame[55..], [0; 5]);
            script.run("> P. 1001:1002 ack 1");
        }
    }
}

/// Goal: a guest's large segment is sent whole, and its checksum, which is not complete, is not needed.
#[test]
fn large_segments_of_guests_are_taken_whole() {
    let mut script = Script::new(config(false), link(Offloads::ALL), false);
    script.open();
    let data = stream(from_guest, 0, 60_000);
    let (seq, ack) = (script.isn.wrapping_add(1), script.iss.wrapping_add(1));
    let segment = Segment { flags: "P.".into(), seq, ack, window: 512, data, ..Segment::default() };
    let mut bytes = segment.frame(script.guest, script.remote);
    bytes[50..52].fill(0xaa);
    let header = OffloadHeader {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Gso::TcpV4,
        segment_size: 1460,
        ..OffloadHeader::NONE
    };
    let frame = GuestFrame { bytes: &bytes, header };
    let before = script.net.kernel.calls().send;
    script.net.nat.from_guest(PORT, &[frame], script.net.now, &mut script.net.out);
    assert_eq!(script.net.kernel.calls().send, before + 1);
    script.run("peer got 60000\n > . 1 ack 60001");
}

/// Section 9, 6: a port whose longest frame is shorter than its MTU gets frames that fit.
#[test]
fn frames_fit_the_port() {
    let short = Link { longest: 800, ..plain_link() };
    let mut script = Script::new(config(false), short, false);
    script.run(
        "
        < S 0 win 65535 mss 1460 ws 7
        peer connects
        > S. 0 ack 1 mss 746
        < . 1 ack 1 win 512
        peer writes 1000
        > . 1:747 ack 1
        > . 747:1001 ack 1
        ",
    );
}
