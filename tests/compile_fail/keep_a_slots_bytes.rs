//! E0505: the bytes of a slot do not outlive its completion.

use vmring::device::Io;

fn keep(io: &mut Io<'_>) -> usize {
    let slot = io.take_write().unwrap();
    let packet = slot.packet();
    io.complete_write(slot);
    packet.len()
}

fn main() {
    let _ = keep;
}
