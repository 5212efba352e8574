//! E0508: not even a borrowed frame can be copied.

use vmring::Frame;

fn copy(frames: &[Frame]) -> Frame {
    frames[0]
}

fn main() {
    let _ = copy;
}
