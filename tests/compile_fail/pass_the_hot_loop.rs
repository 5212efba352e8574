//! Compiles: this is the loop in the README.

use vmring::{CompletionError, CompletionQueue, Error, Frame, Ring, RingOp, SubmissionQueue};

fn handle(frame: Frame) -> Frame {
    frame
}

fn hot(ring: &mut Ring) -> Result<(), Error> {
    let (mut sq, mut cq) = ring.split();
    for done in cq.reap() {
        let frame = match (done.op, done.take_packet()) {
            (RingOp::Read, Ok(frame)) => handle(frame),
            (RingOp::Read, Err(CompletionError { frame: Some(frame), .. })) => frame,
            _ => continue,
        };
        sq.submit_read(frame, done.user_data)?;
    }
    Ok(())
}

fn on_two_threads(ring: Ring) {
    let (sq, cq): (SubmissionQueue, CompletionQueue) = ring.into_split();
    std::thread::spawn(move || drop(sq));
    std::thread::spawn(move || drop(cq));
}

fn main() {
    let _ = (hot, on_two_threads);
}
