//! Credits and backpressure: the CQ has space for every completion, and no packet comes without a
//! posted read.

use vmring::{Direction, RingOp, SubmitErrorKind};

use super::credits;
use crate::support::{
    LONG, drive_to_rest, every_way, guarded, inline, loopback, number_of, post, reap, reap_n, send,
};

/// Goal: the CQ has space for every possible completion. Method: use every credit of every kind,
/// let everything complete and reap nothing. The indices wrap meanwhile.
#[test]
fn the_cq_never_overflows() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring = interface
                .ring(Direction::Both)
                .read_depth(4)
                .write_depth(8)
                .cancel_depth(2)
                .drive(way.drive(poller))
                .start_index(u32::MAX - 5)
                .build()
                .unwrap();
            for _ in 0..3 {
                (0..4).for_each(|i| post(&mut ring, i));
                (0..8).for_each(|i| send(&mut ring, i));
                assert_eq!(credits(&mut ring), (0, 0));
                while ring.wait(12, Some(LONG)) < 12 {}
                assert_eq!(ring.cancel(100, 0), Ok(()));
                assert_eq!(ring.cancel_all(0), Ok(()));
                assert_eq!(ring.cancel(100, 0), Err(SubmitErrorKind::NoCredit));
                while ring.wait(14, Some(LONG)) < 14 {}
                // Everything is complete, but nothing is reaped, so no credit has come back.
                assert_eq!(credits(&mut ring), (0, 0));
                assert_eq!(reap_n(&mut ring, 14).len(), 14);
                // Four of the eight packets are still in the device. Read them.
                (0..4).for_each(|i| post(&mut ring, i));
                reap_n(&mut ring, 4);
            }
        });
    });
}

#[test]
fn a_credit_returns_when_its_completion_is_reaped() {
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).depth(4).build().unwrap();
        (0..3).for_each(|number| send(&mut ring, number));
        (0..2).for_each(|number| post(&mut ring, number));
        assert_eq!(credits(&mut ring), (2, 1));
        drive_to_rest(&mut ring);
        assert_eq!(credits(&mut ring), (2, 1), "complete, but not reaped");
        assert_eq!(ring.in_flight(), 5);
        for done in reap(&mut ring) {
            drop(done);
        }
        assert_eq!(credits(&mut ring), (4, 4));
        assert_eq!(ring.in_flight(), 0);
    });
}

#[test]
fn reads_that_fill_the_ring_never_block_writes_or_cancels() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            // No packet comes for these reads until this ring itself writes one.
            let mut ring = interface
                .ring(Direction::Both)
                .depth(4)
                .frames(16)
                .cancel_depth(1)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            (0..4).for_each(|i| post(&mut ring, 10 + i));
            let frame = ring.alloc().unwrap();
            let kind = ring.submit_read(frame, 0).unwrap_err().kind;
            assert_eq!(kind, SubmitErrorKind::NoCredit);
            assert_eq!(ring.cancel(99, 1), Ok(()));
            assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Cancel, 1, Ok(0)));
            send(&mut ring, 2);
            let mut seen: Vec<_> = reap_n(&mut ring, 2).iter().map(|done| done.op).collect();
            seen.sort_by_key(|op| *op == RingOp::Write);
            assert_eq!(seen, [RingOp::Read, RingOp::Write]);
        });
    });
}

#[test]
fn no_posted_read_no_packet() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            (0..10).for_each(|number| send(&mut ring, number));
            assert!(reap_n(&mut ring, 10).iter().all(|done| done.op == RingOp::Write));
            assert_eq!((ring.in_flight(), ring.stats().rx_packets), (0, 0));
            let mut next = 0;
            for posted in [3, 1, 6] {
                (0..posted).for_each(|_| post(&mut ring, 50));
                for done in reap_n(&mut ring, posted) {
                    assert_eq!(done.op, RingOp::Read);
                    assert_eq!(number_of(&done.frame.unwrap()), next);
                    next += 1;
                }
                assert_eq!(ring.stats().rx_packets, next, "as many packets as posted reads");
            }
        });
    });
}
