//! Events: takes in what the network delivers, and calls the event callback.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::{EventTarget, Interface, ReceiveQueue, borrow, recycle};
use crate::blocks::GivenBlock;
use crate::dispatch::GivenQueue;
use crate::framing::{is_dhcp, parts, ticket};
use crate::keys::key;
use crate::limits::HEADER;
use crate::objects::lock;
use crate::script::Events;
use crate::status::{INVALID_ARGUMENT, SETUP_INCOMPLETE, SUCCESS};
use crate::threads::spawn;
use crate::xpc::{Handle, Object};

impl Interface {
    /// Takes in what the network has delivered, on the sender's thread, and fires an event.
    pub(super) fn take_arrivals(self: &Arc<Self>) {
        let depth = lock(&self.record).script.queue_depth;
        let mut receive_queue = lock(&self.receive_queue);
        let ReceiveQueue { receiver: Some(receiver), waiting, free } = &mut *receive_queue else {
            return;
        };
        let (was_empty, mut arrived, mut dropped) = (waiting.is_empty(), false, 0);
        loop {
            while let Some((mut buffer, mut len)) = receiver.collect() {
                if let Some(ticket) = ticket(&buffer[..len]) {
                    // The wire's own buffer is lent again.
                    recycle(
                        free,
                        std::mem::replace(&mut buffer, self.world.0.long_frames.take(ticket)),
                    );
                    len = buffer.len();
                }
                if self.no_dhcp.is_some_and(|gateway| is_dhcp(&buffer[..len], gateway)) {
                    recycle(free, buffer);
                    continue;
                }
                let (frame, _) = parts(&buffer[..len]);
                let header = if self.settings.header { HEADER } else { 0 };
                let too_long = header + frame.len() > self.settings.max_frame();
                if waiting.len() < depth && !too_long {
                    waiting.push_back((buffer, len));
                    arrived = true;
                } else {
                    recycle(free, buffer);
                    dropped += 1;
                }
            }
            while !receiver.is_full() {
                let buffer = free.pop().unwrap_or_else(|| vec![0; self.wire_max]);
                if receiver.post(buffer).is_err() {
                    break;
                }
            }
            if receiver.arm() {
                break;
            }
        }
        drop(receive_queue);
        if dropped > 0 {
            self.count(|counts| counts.dropped += dropped);
        }
        if arrived {
            let events = lock(&self.record).script.events;
            match events {
                Events::Arrival | Events::Level => self.fire(),
                Events::Edge if was_empty => self.fire(),
                Events::Edge | Events::Lost => {}
            }
        }
    }

    /// Puts an event on the queue, unless one is already there that has not begun.
    fn fire(self: &Arc<Self>) {
        if lock(&self.dead).is_some() {
            return;
        }
        // Held until the event is on the queue: whoever clears the callback later finds it there.
        let events = lock(&self.events);
        let Some(target) = events.clone() else { return };
        if target.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let interface = self.clone();
        self.underway.fetch_add(1, Ordering::AcqRel);
        target.queue.clone().run(move || {
            let delay = lock(&interface.record).script.event_delay;
            thread::sleep(delay);
            target.pending.store(false, Ordering::Release);
            interface.count(|counts| counts.events += 1);
            let event = Handle::dictionary();
            let truth = lock(&interface.receive_queue).waiting.len() as u64;
            if let Some(estimate) = lock(&interface.record).script.estimate {
                let estimate = Object::U64(estimate.unwrap_or(truth));
                event.set(key("estimated_packets_available"), estimate);
            }
            // The callback may have been unset meanwhile: an event that is already on the queue
            // still comes.
            target.block.call_status_object(1, event.as_raw());
            drop(target);
            interface.underway.fetch_sub(1, Ordering::AcqRel);
            interface.repeat();
        });
    }

    /// If events are level-triggered, fires another one as long as packets wait.
    fn repeat(self: &Arc<Self>) {
        let level = lock(&self.record).script.events == Events::Level;
        if !level || lock(&self.receive_queue).waiting.is_empty() {
            return;
        }
        if self.repeating.swap(true, Ordering::AcqRel) {
            return;
        }
        let interface = Arc::downgrade(self);
        spawn("vmnet-sim-level", move || {
            thread::sleep(Duration::from_millis(1));
            if let Some(interface) = interface.upgrade() {
                interface.repeating.store(false, Ordering::Release);
                if !lock(&interface.receive_queue).waiting.is_empty() {
                    interface.fire();
                }
            }
        });
    }

    /// Fires an event if packets are left.
    pub(super) fn fire_if_waiting(self: &Arc<Self>) {
        let events = lock(&self.record).script.events;
        if events != Events::Lost && !lock(&self.receive_queue).waiting.is_empty() {
            self.fire();
        }
    }
}

/// # Safety
///
/// `interface` must be a handle from a start of this process. `queue` and `block` must both be
/// null, or be as for [`GivenQueue::new`] and [`GivenBlock::new`]: the simulator aborts if either
/// has already been released.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_set_event_callback(
    interface: *mut c_void,
    mask: u32,
    queue: *const c_void,
    block: *const c_void,
) -> u32 {
    let what = "vmnet_interface_set_event_callback";
    // SAFETY: guaranteed by the caller.
    let interface = unsafe { borrow(interface, what) };
    if !interface.is_running() {
        let why = format!("{what} on an interface that does not run");
        return interface.world.misuse(&why, SETUP_INCOMPLETE);
    }
    if mask != 1 {
        return interface.world.misuse(&format!("{what}: there is one event, 1"), INVALID_ARGUMENT);
    }
    if queue.is_null() != block.is_null() {
        let why = format!("{what}: both the queue and the block, or none of them");
        return interface.world.misuse(&why, INVALID_ARGUMENT);
    }
    let target = if block.is_null() {
        None
    } else {
        let retains = interface.world.retains();
        // SAFETY: guaranteed by the caller.
        let block = unsafe { GivenBlock::new(block, "the event callback", retains) };
        let queue = GivenQueue::new(queue, "the events' queue", retains);
        interface.world.track(block.life(), "the event callback");
        interface.world.track(queue.life(), "the events' queue");
        *lock(&interface.events_queue) = Some(queue.id());
        Some(Arc::new(EventTarget { block, queue, pending: AtomicBool::new(false) }))
    };
    let before = std::mem::replace(&mut *lock(&interface.events), target);
    drop(before);
    interface.fire_if_waiting();
    SUCCESS
}
