//! E0382: what was submitted is the device's.

use vmring::{Frame, Ring, SubmitError};

fn after(ring: &mut Ring, frame: Frame) -> Result<usize, SubmitError> {
    ring.submit_write(frame, 1)?;
    Ok(frame.len())
}

fn main() {
    let _ = after;
}
