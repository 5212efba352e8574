//! E0382: a submit moves the frame.

use vmring::{Frame, Ring, SubmitError};

fn twice(ring: &mut Ring, frame: Frame) -> Result<(), SubmitError> {
    ring.submit_read(frame, 1)?;
    ring.submit_read(frame, 2)
}

fn main() {
    let _ = twice;
}
