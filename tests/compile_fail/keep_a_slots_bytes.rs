//! E0505: the bytes of a slot do not outlive its completion.

use vmring::device::PollContext;

fn keep(cx: &mut PollContext<'_>) -> usize {
    let slot = cx.take_write().unwrap();
    let packet = slot.packet();
    cx.complete_write(slot);
    packet.map_or(0, <[u8]>::len)
}

fn main() {
    let _ = keep;
}
