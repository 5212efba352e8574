//! E0597: a view borrows its frame.

use vmring::{Frame, PacketView};

fn outlive(frame: Frame) -> usize {
    let view: PacketView<&[u8]> = {
        let frame = frame;
        frame.view()
    };
    view.len()
}

fn main() {
    let _ = outlive;
}
