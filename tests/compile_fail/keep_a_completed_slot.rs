//! E0382: completing a slot takes its memory from the device.

use vmring::device::Io;

fn keep(io: &mut Io<'_>) {
    while let Some(mut slot) = io.take_read() {
        io.complete_read(slot, 60);
        slot.buffer_mut()[0] = 1;
    }
}

fn main() {
    let _ = keep;
}
