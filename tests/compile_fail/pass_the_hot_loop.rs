//! Compiles: this is the loop in the README.

use vmring::{CompletionQueue, Error, Frame, Ring, SubmissionQueue};

fn handle(frame: Frame) -> Frame {
    frame
}

fn hot(ring: &mut Ring) -> Result<(), Error> {
    let (mut sq, mut cq) = ring.split();
    for done in cq.reap() {
        let frame = done.take_packet()?;
        sq.submit_read(handle(frame), done.user_data)?;
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
