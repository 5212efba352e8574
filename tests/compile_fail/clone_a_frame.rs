//! E0277: a frame is the one owner of its slot.

use vmring::Frame;

fn two(frame: &Frame) -> Frame {
    Frame::clone(frame)
}

fn main() {
    let _ = two;
}
