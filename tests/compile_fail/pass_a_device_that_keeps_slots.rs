//! Compiles: a device may keep a slot as long as it does not complete it.

use std::collections::VecDeque;

use vmring::Status;
use vmring::device::{PollContext, PostedSlot, Progress, Queue};

struct Keeps(VecDeque<PostedSlot>);

impl Queue for Keeps {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        while let Some(slot) = cx.take_read() {
            self.0.push_back(slot);
        }
        if let Some(mut slot) = self.0.pop_front() {
            slot.buffer_mut().unwrap()[0] = 1;
            cx.complete_read(slot, 1);
        }
        Ok(Progress::Idle)
    }
}

fn main() {
    let _ = Keeps(VecDeque::new());
}
