//! E0382: a slot is completed once.

use vmring::device::Io;

fn twice(io: &mut Io<'_>) {
    while let Some(slot) = io.take_write() {
        io.complete_write(slot);
        io.complete_write(slot);
    }
}

fn main() {
    let _ = twice;
}
