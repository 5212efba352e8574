//! E0382: a submitted frame belongs to the device.

use vmring::{Frame, Ring, SubmitError};

fn after(ring: &mut Ring, frame: Frame) -> Result<usize, SubmitError> {
    ring.submit_write(frame, 1)?;
    Ok(frame.len())
}

fn main() {
    let _ = after;
}
