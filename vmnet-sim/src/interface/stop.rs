//! Stops.

use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::thread;

use super::{Interface, STOPPED, borrow};
use crate::blocks::GivenBlock;
use crate::dispatch::{GivenQueue, QueueId};
use crate::objects::{lock, violation};
use crate::status::{INVALID_ARGUMENT, SUCCESS};
use crate::threads::spawn;

/// # Safety
///
/// `interface` must be a handle from a start of this process. `queue` must be as for
/// [`GivenQueue::new`] and `handler` as for [`GivenBlock::new`]: the simulator aborts if one of
/// them is null or has already been released.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_stop_interface(
    interface: *mut c_void,
    queue: *const c_void,
    handler: *const c_void,
) -> u32 {
    let what = "vmnet_stop_interface";
    // SAFETY: guaranteed by the caller.
    let interface = unsafe { borrow(interface, what) }.clone();
    let world = interface.world.clone();
    if interface.state.load(Ordering::Acquire) == STOPPED {
        return world.misuse(&format!("{what}: a second time"), INVALID_ARGUMENT);
    }
    if lock(&interface.events).is_some() {
        violation(&format!("{what}: the event callback is still set"));
    }
    if interface.calls.load(Ordering::Acquire) > 0 {
        violation(&format!("{what}: a read or a write is under way"));
    }
    if lock(&interface.events_queue).is_some_and(QueueId::is_current) {
        violation(&format!("{what}: from a job of the queue that its events come on"));
    }
    if interface.underway.load(Ordering::Acquire) > 0 {
        violation(&format!("{what}: an event is on its queue or under way"));
    }
    let queue = GivenQueue::new(queue, "the stop's queue", world.retains());
    if queue.is_current() {
        violation(&format!("{what}: from a job of the queue that the handler is to run on"));
    }
    // SAFETY: guaranteed by the caller.
    let handler = unsafe { GivenBlock::new(handler, "the stop's handler", world.retains()) };
    world.track(handler.life(), "the stop's handler");
    world.track(queue.life(), "the stop's queue");
    let (plan, patience) = {
        let script = &lock(&interface.record).script;
        (script.stop, script.patience)
    };
    if let Some(status) = plan.refused {
        return status;
    }
    interface.state.store(STOPPED, Ordering::Release);
    interface.count(|counts| counts.stops += 1);
    spawn("vmnet-sim-stop", move || {
        interface.leave();
        let Some(delay) = plan.handler else {
            std::mem::forget((queue, handler));
            return;
        };
        thread::sleep(delay);
        // If there are references, they are released when the job ends.
        queue.clone().run_within(patience, "the stop's handler", move || {
            handler.call_status(plan.status);
            drop((handler, queue));
        });
    });
    SUCCESS
}

impl Interface {
    /// Leaves the network.
    fn leave(&self) {
        let sender = lock(&self.sender).take();
        let receive_queue = std::mem::take(&mut *lock(&self.receive_queue));
        let network = lock(&self.network).take();
        drop((sender, receive_queue, network));
    }
}
