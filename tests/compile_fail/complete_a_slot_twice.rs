//! E0382: a slot is completed once.

use vmring::device::PollContext;

fn twice(cx: &mut PollContext<'_>) {
    while let Some(slot) = cx.take_write() {
        cx.complete_write(slot);
        cx.complete_write(slot);
    }
}

fn main() {
    let _ = twice;
}
