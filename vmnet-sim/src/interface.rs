//! A started interface: its state, and what every call checks first. The parts are in the modules
//! below.

mod events;
mod packets;
pub(crate) mod start;
mod stop;

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use macaddr::MacAddr6;
use vmring_embedded::{Receiver, Sender};

use crate::blocks::GivenBlock;
use crate::dispatch::{GivenQueue, QueueId};
use crate::limits::LENT;
use crate::network::Network;
use crate::objects::{lock, violation};
use crate::rules::Rule;
use crate::script::{Counts, Dead};
use crate::settings::Settings;
use crate::status::{FAILURE, INVALID_ARGUMENT, SETUP_INCOMPLETE};
use crate::world::{Record, World};

const STARTING: u8 = 0;
const RUNNING: u8 = 1;
const STOPPED: u8 = 2;

/// An interface. Foreign code has it as a pointer. It is never freed, so that a use after the stop
/// is reported.
pub(crate) struct Interface {
    state: AtomicU8,
    world: World,
    record: Arc<Mutex<Record>>,
    settings: Settings,
    /// Calls in progress.
    reading: AtomicBool,
    writing: AtomicBool,
    calls: AtomicUsize,
    receive_queue: Mutex<ReceiveQueue>,
    sender: Mutex<Option<Sender<Vec<u8>>>>,
    /// The longest packet that the wire takes.
    wire_max: usize,
    /// The gateway's MAC, if the network gives out no addresses: the gateway's DHCP answers are
    /// then filtered out.
    no_dhcp: Option<MacAddr6>,
    events: Mutex<Option<Arc<EventTarget>>>,
    /// Events that are on the queue or being delivered.
    underway: AtomicUsize,
    /// The queue of the event callback that was set last.
    events_queue: Mutex<Option<QueueId>>,
    /// A repeated event is on its way.
    repeating: AtomicBool,
    dead: Arc<Mutex<Option<Dead>>>,
    pub(crate) rules: Mutex<Vec<Rule>>,
    /// The network object that the interface is on and keeps alive, if any.
    pub(crate) network: Mutex<Option<Arc<Network>>>,
}

/// The queue of packets that nobody has read.
#[derive(Default)]
struct ReceiveQueue {
    receiver: Option<Receiver<Vec<u8>>>,
    waiting: VecDeque<(Vec<u8>, usize)>,
    free: Vec<Vec<u8>>,
}

/// Keeps a buffer for lending it to the network again.
fn recycle(free: &mut Vec<Vec<u8>>, buffer: Vec<u8>) {
    if free.len() < LENT {
        free.push(buffer);
    }
}

struct EventTarget {
    block: GivenBlock,
    queue: GivenQueue,
    /// An event is on the queue and has not begun.
    pending: AtomicBool,
}

/// All handles, so that leak checkers do not report them.
static HANDLES: Mutex<Vec<AtomicPtr<Arc<Interface>>>> = Mutex::new(Vec::new());

/// # Safety
///
/// `interface` must be null, which aborts, or a handle from a start of this process.
pub(crate) unsafe fn borrow<'a>(interface: *const c_void, role: &str) -> &'a Arc<Interface> {
    if interface.is_null() {
        violation(&format!("{role}: the interface is null"));
    }
    // SAFETY: guaranteed by the caller; a handle's box is never freed.
    unsafe { &*interface.cast::<Arc<Interface>>() }
}

impl Interface {
    /// The pointer that foreign code gets. It is never freed.
    fn handle(self: &Arc<Self>) -> *mut c_void {
        let handle = Box::into_raw(Box::new(self.clone()));
        lock(&HANDLES).push(AtomicPtr::new(handle));
        handle.cast()
    }

    fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut lock(&self.record).counts);
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state.load(Ordering::Acquire) == RUNNING
    }

    pub(crate) fn world(&self) -> &World {
        &self.world
    }

    /// What every call checks first. `Err` is the call's answer.
    fn enter<'a>(&'a self, busy: &'a AtomicBool, what: &str) -> Result<Call<'a>, u32> {
        match self.state.load(Ordering::Acquire) {
            RUNNING => {}
            STARTING => return Err(SETUP_INCOMPLETE),
            _ => {
                return Err(self.world.misuse(&format!("{what} after the stop"), INVALID_ARGUMENT));
            }
        }
        if busy.swap(true, Ordering::AcqRel) {
            let status = self.world.misuse(&format!("two calls of {what} at once"), FAILURE);
            return Err(status);
        }
        self.calls.fetch_add(1, Ordering::AcqRel);
        let call = Call { interface: self, busy };
        match *lock(&self.dead) {
            Some(Dead::Fails(status)) => Err(status),
            _ => Ok(call),
        }
    }
}

/// A call in progress.
struct Call<'a> {
    interface: &'a Interface,
    busy: &'a AtomicBool,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.busy.store(false, Ordering::Release);
        self.interface.calls.fetch_sub(1, Ordering::AcqRel);
    }
}
