//! A custom device in safe Rust: an echo that sends every frame back to its sender.
//!
//! A [`Driver`] starts a [`Device`]; the device gives each ring a [`Queue`]; the poller lends the
//! queue slots through [`PollContext`]. Like a completion engine, this queue keeps the reads it is lent
//! until it has data for them. It gives everything back when it is closed.
//!
//! ```sh
//! cargo run --example device
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use vmring::device::{
    Capabilities, Device, PollContext, PostedSlot, Progress, Queue, QueueConfig, Wake,
};
use vmring::{
    Direction, Driver, Error, Interface, InterfaceConfig, InterfaceInfo, MacAddr6, RingOp, Status,
};

/// The driver, to pass to `Interface::builder().device(..)`.
struct Echo;

impl Driver for Echo {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let mac = config.mac.unwrap_or(MacAddr6::new(0x02, 0, 0, 0, 0, 0xec));
        let mtu = config.mtu.unwrap_or(1500);
        Ok(Arc::new(EchoDevice(InterfaceInfo::new(config, mac, mtu, mtu + 14))))
    }
}

struct EchoDevice(InterfaceInfo);

impl Device for EchoDevice {
    fn name(&self) -> &str {
        "echo"
    }

    fn info(&self) -> InterfaceInfo {
        self.0.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(self.0.mtu, self.0.max_packet_size)
    }

    fn queue(&self, config: QueueConfig, _: Wake) -> Result<Box<dyn Queue>, Error> {
        if config.direction != Direction::Both {
            return Err(self.not_supported("a ring of one direction"));
        }
        // Answers appear only while the poller polls, so there is never a reason to wake it.
        Ok(Box::new(EchoQueue::default()))
    }
}

#[derive(Default)]
struct EchoQueue {
    /// Reads that the poller has lent, oldest first.
    waiting: VecDeque<PostedSlot>,
    /// Reads that were cancelled. The next poll completes them.
    cancelled: Vec<PostedSlot>,
}

impl Queue for EchoQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        self.cancelled.drain(..).for_each(|slot| cx.cancel(slot));
        while let Some(slot) = cx.take_read() {
            self.waiting.push_back(slot);
        }
        // Without a posted read there is no place for the answer, so leave the writes with the
        // poller, which retries them.
        while !self.waiting.is_empty()
            && let Some(write) = cx.take_write()
        {
            // The device's capabilities ask for frames only, so both packets are slices.
            let Some(packet) = write.packet().filter(|packet| packet.len() >= 14) else {
                cx.fail(write, Status::InvalidArgument);
                continue;
            };
            let mut answer = self.waiting.pop_front().expect("just seen");
            if let Some(room) = answer.buffer_mut() {
                room[..6].copy_from_slice(&packet[6..12]);
                room[6..12].copy_from_slice(&packet[..6]);
                room[12..packet.len()].copy_from_slice(&packet[12..]);
            }
            let len = packet.len();
            cx.complete_read(answer, len);
            cx.complete_write(write);
        }
        Ok(Progress::Idle)
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        let before = self.cancelled.len();
        for slot in std::mem::take(&mut self.waiting) {
            if target.is_none_or(|target| target == slot.user_data()) {
                self.cancelled.push(slot);
            } else {
                self.waiting.push_back(slot);
            }
        }
        (self.cancelled.len() - before) as u32
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        self.cancel(None);
        self.cancelled.drain(..).for_each(|slot| cx.cancel(slot));
        true
    }
}

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let interface = Interface::builder().device(Echo).start()?;
    let mut ring = interface.ring(Direction::Both).depth(8).build()?;
    let frame = ring.alloc().expect("a fresh ring has free frames");
    ring.submit_read(frame, 1)?;
    let mut frame = ring.alloc().expect("as above");
    frame.copy_from(b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x01\x88\xb5 hello")?;
    ring.submit_write(frame, 2)?;

    ring.wait(2, Some(Duration::from_secs(10)));
    for done in ring.reap() {
        let frame = done.take_packet()?;
        if done.op == RingOp::Read {
            let view = frame.view();
            let ethernet = view.ethernet().ok_or("too short for a header")?;
            let to = MacAddr6::from(ethernet.destination());
            println!("an answer to {to}: {}", String::from_utf8_lossy(&frame[14..]));
        }
    }
    ring.close()?;
    Ok(())
}
