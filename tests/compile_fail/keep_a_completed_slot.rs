//! E0382: completing a slot takes its memory from the device.

use vmring::device::PollContext;

fn keep(cx: &mut PollContext<'_>) {
    while let Some(mut slot) = cx.take_read() {
        cx.complete_read(slot, 60);
        slot.buffer_mut().unwrap()[0] = 1;
    }
}

fn main() {
    let _ = keep;
}
