//! A bridge between two interfaces of this process, which keeps no order of its own and counts nothing.

use std::time::Duration;

use vmring::{Direction, Interface, RingOp};

const DEPTH: u32 = 256;

/// Moves packets from one interface to the other, until `stops` says so.
pub(crate) fn carry(from: &Interface, to: &Interface, stops: impl Fn() -> bool) {
    let mut reads = from.ring(Direction::Read).depth(DEPTH).build().expect("a ring");
    let mut writes = to.ring(Direction::Write).depth(DEPTH).build().expect("a ring");
    while let Some(frame) = reads.alloc() {
        if reads.submit_read(frame, 0).is_err() {
            break;
        }
    }
    let mut packets = Vec::new();
    while !stops() {
        reads.wait(1, Some(Duration::from_millis(100)));
        for done in reads.reap() {
            let (op, is_good) = (done.op, done.result.is_ok());
            packets.extend(done.take_frame().filter(|_| op == RingOp::Read).map(|f| (f, is_good)));
        }
        for (mut frame, is_good) in packets.drain(..) {
            while is_good && !stops() {
                writes.reap().for_each(drop);
                let Some(mut copy) = writes.alloc() else {
                    writes.wait(1, Some(Duration::from_millis(10)));
                    continue;
                };
                copy.copy_from(&frame).expect("both ends have the same longest packet");
                // What the ring refuses is lost, as on a wire.
                let _ = writes.submit_write(copy, 0);
                break;
            }
            frame.reset();
            // A ring that is closed takes none.
            let _ = reads.submit_read(frame, 0);
        }
    }
}
