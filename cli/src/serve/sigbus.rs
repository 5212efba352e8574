//! SIGBUS: a front end whose memory shrinks loses its own connection, and nothing else ends.
//!
//! A front end can shorten the file that it shares. Then the next access to a lost page raises SIGBUS
//! on the thread that makes it: that of the guest itself, or that of another guest, whose packet goes
//! there. The handler here finds the address among the mappings of all connections, puts private
//! zeroes in the place of that mapping, and tells the connection that it is over. The access then
//! succeeds. A SIGBUS for any other reason ends the process, as it does without a handler.
//!
//! A signal may arrive at any place, and so the handler takes no lock, allocates nothing, and calls
//! `mmap`, `write`, `sigaction` and `raise` only.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmring_virtio::vhost_user::MappingObserver;

use super::limits::MAPPINGS_PER_CONNECTION;
use crate::failure::Failure;

/// A mapping of a connection, or zeroes. Its fields change under the lock of [`Places`]. The handler, which
/// cannot take a lock, sees by `version` whether they changed while it read them.
#[derive(Debug, Default)]
struct Entry {
    /// It is odd while the fields change.
    version: AtomicU64,
    start: AtomicUsize,
    len: AtomicUsize,
    /// The connection's number; see [`Seat::number`].
    owner: AtomicU64,
}

impl Entry {
    fn set(&self, start: usize, len: usize, owner: u64) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // The fence makes the odd version visible before the fields. It pairs with the Acquire fence
        // in `find`.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.owner.store(owner, Ordering::Relaxed);
        // Release: pairs with the Acquire load in `find`.
        self.version.store(version + 2, Ordering::Release);
    }

    /// The range and its owner, if it has this address.
    fn find(&self, address: usize) -> Option<(usize, usize, u64)> {
        // Acquire: pairs with the Release store in `set`.
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        let owner = self.owner.load(Ordering::Relaxed);
        // Pairs with the Release fence in `set`.
        fence(Ordering::Acquire);
        // A mapping that is being accessed is neither being entered nor being removed. So an entry that
        // changes is that of another one.
        let is_whole = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (is_whole && address.checked_sub(start)? < len).then_some((start, len, owner))
    }
}

/// The place of a connection: how the handler tells it that it is over.
#[derive(Debug)]
struct Place {
    /// The number of the connection, or 0.
    connection: AtomicU64,
    has_shrunk: AtomicBool,
    /// What is written to the second can be read from the first.
    bell: (UnixStream, UnixStream),
    /// Entries of its mappings, so that no front end can use up those of another.
    entries: Box<[Entry]>,
}

/// The places of all connections that there can be, and their mappings. It lives as long as the
/// process, because the handler may run at any time.
#[derive(Debug)]
pub(super) struct Places {
    places: Box<[Place]>,
    page: usize,
    free: Mutex<Free>,
}

#[derive(Debug)]
struct Free {
    places: Vec<usize>,
    connections: u64,
}

/// What the handler looks at.
static PLACES: AtomicPtr<Places> = AtomicPtr::new(ptr::null_mut());

impl Places {
    /// Makes places for `connections` connections at once, and installs the handler.
    pub(super) fn install(connections: usize) -> Result<&'static Self, Failure> {
        let failed = |error: io::Error| {
            Failure::Step(format!("the handler of SIGBUS cannot be installed: {error}"))
        };
        let own = Self::new(connections).map_err(failed)?;
        // Release: the handler sees the whole of it. It pairs with the Acquire load in `handle`.
        PLACES.store(ptr::from_ref(own).cast_mut(), Ordering::Release);
        let handler = handle as *const () as libc::sighandler_t;
        set_action(handler, libc::SA_SIGINFO | libc::SA_ONSTACK).map_err(failed)?;
        Ok(own)
    }

    /// Places that live as long as the process.
    fn new(connections: usize) -> io::Result<&'static Self> {
        let place = || {
            let bell = UnixStream::pair()?;
            bell.0.set_nonblocking(true)?;
            bell.1.set_nonblocking(true)?;
            let (connection, has_shrunk) = (AtomicU64::new(0), AtomicBool::new(false));
            let entries = (0..MAPPINGS_PER_CONNECTION).map(|_| Entry::default()).collect();
            Ok(Place { connection, has_shrunk, bell, entries })
        };
        let places = (0..connections).map(|_| place()).collect::<io::Result<_>>()?;
        let free = Free { places: (0..connections).rev().collect(), connections: 0 };
        // SAFETY: the call takes a number only.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).unwrap_or(4096);
        Ok(Box::leak(Box::new(Self { places, page, free: Mutex::new(free) })))
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        // It is consistent between any two statements.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many more connections have a place.
    pub(super) fn vacant(&self) -> usize {
        self.free().places.len()
    }

    /// A place for one more connection, if there is one.
    pub(super) fn take(&'static self) -> Option<Seat> {
        let mut free = self.free();
        let index = free.places.pop()?;
        free.connections += 1;
        let number = free.connections;
        let place = &self.places[index];
        place.has_shrunk.store(false, Ordering::Relaxed);
        // Nothing rings any more for the connection that had the place before.
        let _ = (&place.bell.0).read(&mut [0; 64]);
        // Release: pairs with the Acquire load in `cut_off`.
        place.connection.store(number, Ordering::Release);
        Some(Seat { places: self, index, number })
    }

    /// Cuts the address off if it belongs to a front end. Returns whether it does, and is.
    fn cut_off(&self, address: usize) -> bool {
        let mut entries = self.places.iter().flat_map(|place| &place.entries);
        let Some((start, len, owner)) = entries.find_map(|entry| entry.find(address)) else {
            return false;
        };
        // The whole mapping at once: the front end may have shortened the file to nothing, and its
        // pages may be huge ones, of which no part can be replaced. A kernel that promises no more
        // memory than it has (`vm.overcommit_memory` is 2) may refuse that, but not a page.
        let page = (address / self.page * self.page, self.page);
        if !put_zeroes(start, len) && !put_zeroes(page.0, page.1) {
            return false;
        }
        for place in &self.places {
            // Acquire: pairs with the Release stores in `take` and in the drop of a `Seat`.
            if place.connection.load(Ordering::Acquire) == owner {
                // Release: pairs with the Acquire load in `Seat::has_shrunk`.
                place.has_shrunk.store(true, Ordering::Release);
                ring(&place.bell.1);
            }
        }
        true
    }
}

/// The place of one connection, from its beginning to its end.
#[derive(Debug)]
pub(super) struct Seat {
    places: &'static Places,
    index: usize,
    /// It is not given again, so that a late mapping of a connection is not taken for one of the next.
    number: u64,
}

impl Seat {
    fn place(&self) -> &Place {
        &self.places.places[self.index]
    }

    /// Is readable once the connection must end.
    pub(super) fn bell(&self) -> BorrowedFd<'static> {
        self.places.places[self.index].bell.0.as_fd()
    }

    /// Ends the connection from another thread.
    pub(super) fn ringer(&self) -> Ringer {
        Ringer { places: self.places, index: self.index, number: self.number }
    }

    /// Whether the front end's memory has shrunk.
    pub(super) fn has_shrunk(&self) -> bool {
        // Acquire: pairs with the Release store in `cut_off`.
        self.place().has_shrunk.load(Ordering::Acquire)
    }

    /// What the connection's session tells of its mappings.
    pub(super) fn observer(&self) -> Arc<dyn MappingObserver> {
        Arc::new(Mappings { places: self.places, index: self.index, owner: self.number })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut free = self.places.free();
        // Release: pairs with the Acquire load in `cut_off`.
        self.place().connection.store(0, Ordering::Release);
        free.places.push(self.index);
    }
}

/// Ends one connection, if it is still there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ringer {
    places: &'static Places,
    index: usize,
    number: u64,
}

impl Ringer {
    pub(super) fn ring(&self) {
        let _free = self.places.free();
        let place = &self.places.places[self.index];
        // Relaxed: the lock orders it.
        if place.connection.load(Ordering::Relaxed) == self.number {
            ring(&place.bell.1);
        }
    }
}

#[derive(Debug)]
struct Mappings {
    places: &'static Places,
    index: usize,
    owner: u64,
}

impl Mappings {
    /// Changes the entry that has these values.
    fn change(&self, from: (usize, usize, u64), to: (usize, usize, u64)) -> bool {
        let _free = self.places.free();
        // Relaxed: only the holder of the lock writes.
        let values = |entry: &Entry| {
            let (start, len) = (&entry.start, &entry.len);
            let range = (start.load(Ordering::Relaxed), len.load(Ordering::Relaxed));
            (range.0, range.1, entry.owner.load(Ordering::Relaxed))
        };
        let mut entries = self.places.places[self.index].entries.iter();
        let found = entries.find(|entry| values(entry) == from);
        found.inspect(|entry| entry.set(to.0, to.1, to.2)).is_some()
    }
}

impl MappingObserver for Mappings {
    fn mapped(&self, start: usize, len: usize) -> bool {
        self.change((0, 0, 0), (start, len, self.owner))
    }

    fn unmapped(&self, start: usize, len: usize) {
        self.change((start, len, self.owner), (0, 0, 0));
    }
}

/// Rings, or leaves a bell alone that rings already.
fn ring(bell: &UnixStream) {
    // SAFETY: the pointer is to one byte that lives until the call returns.
    let _ = unsafe { libc::write(bell.as_raw_fd(), [1u8].as_ptr().cast(), 1) };
}

/// Puts private zeroes in the place of what is mapped there.
fn put_zeroes(start: usize, len: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let to = ptr::with_exposed_provenance_mut(start);
    // SAFETY: the range is a mapping of a front end's file, as its owner said, which is unmapped by
    // nobody now: the thread that was interrupted is accessing it. No reference to its bytes exists.
    let new = unsafe { libc::mmap(to, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    new != libc::MAP_FAILED
}

fn set_action(handler: libc::sighandler_t, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: zero is valid for the mask, which is empty then, and for the other fields.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the pointer is to an action that lives until the call returns. Its handler is `handle`,
    // which has the signature that its flags say, or the default.
    match unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the system hands the handler a valid `siginfo_t`. The address is valid for a fault,
    // which has a positive code.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // Acquire: pairs with the Release store in `install`.
    let places = PLACES.load(Ordering::Acquire);
    // SAFETY: it is null or was leaked by `install`.
    let places = unsafe { places.as_ref() };
    let is_fault = code > 0;
    // The interrupted code may be about to look at errno.
    let errno = Errno::save();
    let is_cut_off = is_fault && places.is_some_and(|places| places.cut_off(address));
    if !is_cut_off {
        // The access fails again and ends the process, as without a handler.
        let _ = set_action(libc::SIG_DFL, 0);
        if !is_fault {
            // Somebody has sent it. It is delivered when this returns.
            // SAFETY: the call takes a number only.
            unsafe { libc::raise(signal) };
        }
    }
    errno.restore();
}

/// The error of the last system call of the interrupted code.
struct Errno(libc::c_int);

impl Errno {
    fn place() -> *mut libc::c_int {
        #[cfg(target_vendor = "apple")]
        // SAFETY: the call has no arguments.
        return unsafe { libc::__error() };
        #[cfg(not(target_vendor = "apple"))]
        // SAFETY: the call has no arguments.
        return unsafe { libc::__errno_location() };
    }

    fn save() -> Self {
        // SAFETY: the place is this thread's own, and valid.
        Self(unsafe { *Self::place() })
    }

    fn restore(self) {
        // SAFETY: the place is this thread's own, and valid.
        unsafe { *Self::place() = self.0 }
    }
}

#[cfg(test)]
mod tests;
