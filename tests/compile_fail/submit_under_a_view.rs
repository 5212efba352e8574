//! E0505: a frame cannot be submitted while a view borrows it.

use vmring::{Frame, Ring};

fn under(ring: &mut Ring, frame: Frame) -> usize {
    let view = frame.view();
    let _ = ring.submit_write(frame, 1);
    view.len()
}

fn main() {
    let _ = under;
}
