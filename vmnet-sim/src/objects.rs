//! What lives: every block, queue, XPC object and network object, by address. So a use after the
//! last release is told, and not left to luck; and so a world can say what was never released.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, Write};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;

/// What an address is the address of.
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

/// One life of one object: the address may come again, this does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    address: usize,
    serial: u64,
}

/// What keeps an address from being given out again, while it exists.
pub(crate) type Memory = Box<dyn Send>;

#[derive(Default)]
struct Table {
    alive: HashMap<usize, (u64, Kind, Memory)>,
    /// Blocks that are being called, by somebody without a reference.
    running: Vec<Life>,
    /// Of those that died last: so that one of them is not mistaken for one born in its place.
    retired: VecDeque<Memory>,
    next: u64,
}

/// How many of the dead keep their memory.
const RETIRED_MAX: usize = 256;

/// The memory of one that died. Whoever drops it is done with it.
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

/// What lives at `address`.
pub(crate) fn kind<T: ?Sized>(address: *const T) -> Option<Kind> {
    lock(&TABLE).alive.get(&(address.cast::<()>() as usize)).map(|(_, kind, _)| *kind)
}

/// The life of what stands at `address`, which must be of that kind. `role` says in whose place it
/// was given.
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

/// While it exists, a block is being called.
pub(crate) struct Running(Life);

impl Drop for Running {
    fn drop(&mut self) {
        let mut table = lock(&TABLE);
        if let Some(at) = table.running.iter().position(|life| *life == self.0) {
            table.running.swap_remove(at);
        }
    }
}

/// Whether what lives at `address` is being called.
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

    /// It must go on: it is about to be used.
    pub(crate) fn check(self, role: &str) {
        if !self.is_live() {
            violation(&format!("{role}: it was released too early"));
        }
    }
}

/// Says what was done wrong and ends the process. Not a panic: the caller is foreign code.
#[cold]
pub(crate) fn violation(what: &str) -> ! {
    let thread = thread::current();
    // Not eprintln: a test harness would keep that to itself.
    let _ = writeln!(
        io::stderr(),
        "vmnet-sim: the caller broke a rule of vmnet: {what} (on thread '{}')",
        thread.name().unwrap_or("unnamed")
    );
    std::process::abort();
}
