//! Every live block, queue, XPC object and network object, by address. So a use after the last
//! release is reported instead of working by luck, and a world can say what was never released.
//!
//! Foreign code gives the simulator pointers that may be wrong. [`expect_live`] looks the address
//! up in the table before it is followed, and aborts with a sentence if no live object of the
//! expected kind is there. It cannot check that the caller holds a reference for the time of the
//! call: the `# Safety` sections demand that.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, Write};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;

/// The kind of object at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Block,
    Queue,
    Xpc,
    Configuration,
    Network,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Block => "a block",
            Kind::Queue => "a dispatch queue",
            Kind::Xpc => "an XPC object",
            Kind::Configuration => "a network configuration",
            Kind::Network => "a network object",
        })
    }
}

/// One life of one object. The address may be used again; the serial number is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    address: usize,
    serial: u64,
}

/// As long as it exists, its address is not given out again.
pub(crate) type Memory = Box<dyn Send>;

#[derive(Default)]
struct Table {
    alive: HashMap<usize, (u64, Kind, Memory)>,
    /// Blocks that are being called by a caller that holds no reference to them.
    running: Vec<Life>,
    /// The memory of the objects that ended last. It is kept, so that one of them is not mistaken
    /// for a new object at the same address.
    retired: VecDeque<Memory>,
    next: u64,
}

/// How many ended objects keep their memory.
const RETIRED_MAX: usize = 256;

/// The memory of an object that has ended. Dropped when its last user is done with it.
#[must_use = "as long as it exists the memory may be used"]
pub(crate) struct RetiredMemory(Option<Memory>);

impl Drop for RetiredMemory {
    fn drop(&mut self) {
        let Some(memory) = self.0.take() else { return };
        let mut table = lock(&TABLE);
        table.retired.push_back(memory);
        let oldest =
            if table.retired.len() > RETIRED_MAX { table.retired.pop_front() } else { None };
        drop(table);
        drop(oldest);
    }
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn register<T: ?Sized>(address: *const T, kind: Kind, memory: Memory) -> Life {
    let mut table = lock(&TABLE);
    table.next += 1;
    let (address, serial) = (address.cast::<()>() as usize, table.next);
    table.alive.insert(address, (serial, kind, memory));
    Life { address, serial }
}

pub(crate) fn unregister<T: ?Sized>(address: *const T) -> RetiredMemory {
    let removed = lock(&TABLE).alive.remove(&(address.cast::<()>() as usize));
    RetiredMemory(removed.map(|(.., memory)| memory))
}

/// The kind of the live object at `address`, if there is one.
pub(crate) fn kind<T: ?Sized>(address: *const T) -> Option<Kind> {
    lock(&TABLE).alive.get(&(address.cast::<()>() as usize)).map(|(_, kind, _)| *kind)
}

/// The life of the object at `address`. Aborts if no live object of this kind is there. `role`
/// names the argument in the message.
pub(crate) fn expect_live<T: ?Sized>(address: *const T, kind: Kind, role: &str) -> Life {
    let address = address.cast::<()>() as usize;
    match lock(&TABLE).alive.get(&address) {
        Some((serial, found, _)) if *found == kind => Life { address, serial: *serial },
        Some((_, found, _)) => {
            violation(&format!("{role}: {kind} is expected and {found} was given"))
        }
        None if address == 0 => violation(&format!("{role}: {kind} is expected and it is null")),
        None => {
            violation(&format!("{role}: {kind} is expected, and nothing lives there (any more)"))
        }
    }
}

/// As long as this exists, a block is being called.
pub(crate) struct Running(Life);

impl Drop for Running {
    fn drop(&mut self) {
        let mut table = lock(&TABLE);
        if let Some(at) = table.running.iter().position(|life| *life == self.0) {
            table.running.swap_remove(at);
        }
    }
}

/// Whether the block at `address` is being called.
pub(crate) fn is_running<T: ?Sized>(address: *const T) -> bool {
    let address = address.cast::<()>() as usize;
    lock(&TABLE).running.iter().any(|life| life.address == address)
}

impl Life {
    pub(crate) fn mark_running(self) -> Running {
        lock(&TABLE).running.push(self);
        Running(self)
    }

    pub(crate) fn is_live(self) -> bool {
        lock(&TABLE).alive.get(&self.address).is_some_and(|(serial, ..)| *serial == self.serial)
    }

    /// Aborts if the object has ended. Called right before it is used.
    pub(crate) fn check(self, role: &str) {
        if !self.is_live() {
            violation(&format!("{role}: it was released too early"));
        }
    }
}

/// Reports what was done wrong and ends the process. It does not panic, because the caller is
/// foreign code.
#[cold]
pub(crate) fn violation(what: &str) -> ! {
    let thread = thread::current();
    // Not `eprintln`, because a test harness would capture it.
    let _ = writeln!(
        io::stderr(),
        "vmnet-sim: the caller broke a rule of vmnet: {what} (on thread '{}')",
        thread.name().unwrap_or("unnamed")
    );
    std::process::abort();
}
