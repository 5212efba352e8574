//! The poller: a thread that drives the engines of rings.
//!
//! An *engine* is one ring's share of polling: submission queue -> batches -> device -> completion
//! queue. It never blocks. A [`Poller`] is a thread that polls the engines of one ring or of many.
//! With `Drive::Inline` the reaping half polls its engine itself.
//!
//! A poller polls only the engines that have something to do. An engine that runs out of work arms
//! its ring's doorbell and leaves the active list. The thread that rings it sets a bit in the
//! poller's ready set and rings the poller's own doorbell, which costs a system call only if the
//! poller sleeps. So the cost of a round does not grow with the number of idle rings.

mod sleepers;

use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{self, ThreadId};

use crate::device::catch::{Panicked, catch_panic};
use crate::engine::{Engine, Handoff};
use crate::error::{ConfigError, Error};
use crate::limits::RINGS_PER_POLLER_MAX;
use crate::mailbox::ready::ReadySet;
use crate::policy::IdlePolicy;
use crate::sync::{Mutex, Ordering, Overwrite};
use crate::sys::{lock, spawn_detached};
use sleepers::Sleepers;

/// The part of a poller that its rings share.
#[derive(Debug)]
pub(crate) struct PollerShared {
    pub(crate) set: Arc<ReadySet>,
    arrivals: Mutex<Arrivals>,
    thread: OnceLock<ThreadId>,
}

#[derive(Debug, Default)]
struct Arrivals {
    engines: Vec<(usize, Engine, Arc<Handoff>)>,
    free: Vec<usize>,
    used: usize,
    /// The poller's handle was dropped, so the thread ends when its last ring is closed.
    handle_dropped: bool,
}

impl PollerShared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            set: Arc::new(ReadySet::new()),
            arrivals: Mutex::default(),
            thread: OnceLock::new(),
        })
    }

    /// Reserves a place in the ready set.
    ///
    /// # Errors
    ///
    /// [`ConfigError::TooLarge`] if the poller has as many rings as it can drive.
    pub(crate) fn reserve(&self) -> Result<usize, Error> {
        let mut arrivals = lock(&self.arrivals);
        if let Some(place) = arrivals.free.pop() {
            return Ok(place);
        }
        if arrivals.used == RINGS_PER_POLLER_MAX {
            let (value, max) = (RINGS_PER_POLLER_MAX as u64 + 1, RINGS_PER_POLLER_MAX as u64);
            let what = "number of rings on one poller";
            return Err(ConfigError::TooLarge { what, value, max }.into());
        }
        arrivals.used += 1;
        Ok(arrivals.used - 1)
    }

    /// Returns a place that [`reserve`](Self::reserve) gave.
    pub(crate) fn unreserve(&self, place: usize) {
        lock(&self.arrivals).free.push(place);
    }

    /// Hands an engine to the poller's thread.
    pub(crate) fn adopt(&self, place: usize, engine: Engine, handoff: Arc<Handoff>) {
        lock(&self.arrivals).engines.push((place, engine, handoff));
        // Release: pairs with the Acquire in `run`. Relaxed would do, because the lock of
        // `arrivals` hands the engine over.
        self.set.arrived.overwrite(true, Ordering::Release);
        self.set.bell.ring();
    }

    /// Takes the engine that was handed over last, for a model that drives it.
    #[cfg(all(test, loom))]
    pub(crate) fn take_engine(&self) -> (Engine, Arc<Handoff>) {
        self.set.arrived.overwrite(false, Ordering::Relaxed);
        let (_, engine, handoff) = lock(&self.arrivals).engines.pop().expect("a ring was built");
        (engine, handoff)
    }

    pub(crate) fn is_current_thread(&self) -> bool {
        self.thread.get() == Some(&thread::current().id())
    }
}

/// A thread that drives rings: [`Drive::Shared(&poller)`](crate::Drive::Shared).
///
/// Dropping this handle does not end the thread at once. It ends when the last of its rings is
/// closed.
#[derive(Debug)]
pub struct Poller {
    shared: Arc<PollerShared>,
}

/// Starts a [`Poller`]. [`Poller::builder`] returns one.
#[derive(Clone, Debug, Default)]
pub struct PollerBuilder {
    name: Option<String>,
    cpu: Option<usize>,
    idle: IdlePolicy,
}

impl PollerBuilder {
    /// Sets the thread's name. Default: `vmring-poller`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Keeps the thread on one processor, counted from 0. Default: the thread may run on any. Linux
    /// only: macOS has no such call.
    pub fn cpu(mut self, cpu: usize) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// Sets how the thread waits for work.
    pub fn idle(mut self, idle: IdlePolicy) -> Self {
        self.idle = idle;
        self
    }

    /// Returns which setting of the thread itself was set, if any was.
    pub(crate) fn thread_setting(&self) -> Option<&'static str> {
        match (&self.cpu, &self.name) {
            (Some(_), _) => Some("processor"),
            (None, Some(_)) => Some("thread name"),
            (None, None) => None,
        }
    }

    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if the name contains a NUL, if this process may not run on the processor,
    /// or if a processor was set on a system that cannot keep a thread on one; [`Error::Io`] if the
    /// system refuses the thread.
    pub fn start(self) -> Result<Poller, Error> {
        if self.name.as_ref().is_some_and(|name| name.contains('\0')) {
            let why = "a thread's name must not contain a NUL".to_owned();
            return Err(ConfigError::Invalid(why).into());
        }
        let shared = PollerShared::new();
        let (started, starting) = mpsc::sync_channel(1);
        let body = {
            let shared = shared.clone();
            move || {
                let pinned = self.cpu.map_or(Ok(()), pin_to);
                let go = pinned.is_ok();
                let _ = shared.thread.set(thread::current().id());
                let _ = started.send(pinned);
                if go {
                    run(&shared, self.idle);
                }
            }
        };
        let name = self.name.as_deref().unwrap_or("vmring-poller");
        spawn_detached(name, body).map_err(Error::io("starting the poller's thread"))?;
        starting.recv().unwrap_or_else(|_| {
            Err(Error::Io {
                what: "starting the poller's thread",
                source: std::io::ErrorKind::BrokenPipe.into(),
            })
        })?;
        Ok(Poller { shared })
    }
}

#[cfg(target_os = "linux")]
fn pin_to(cpu: usize) -> Result<(), Error> {
    // SAFETY: cpu_set_t is a C struct of integers, a bit set, so all zeroes is a valid value: the
    // empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(no_processor(cpu));
    }
    // SAFETY: `cpu` is below CPU_SETSIZE, as checked above, so the bit is inside the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer and the size are those of `set`, which lives through the call, and the
    // kernel only reads it. 0 is the calling thread.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } != 0 {
        let source = std::io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            // The set has no processor that is there and that this process may use.
            Some(libc::EINVAL) => no_processor(cpu),
            _ => Error::Io { what: "keeping the poller's thread on its processor", source },
        });
    }
    Ok(())
}

/// Returns the error for a processor that is not there, or that this process may not use.
#[cfg(target_os = "linux")]
fn no_processor(cpu: usize) -> Error {
    let mut sentence = format!("a thread of this process cannot be kept on the processor {cpu}");
    // SAFETY: cpu_set_t is a C struct of integers, a bit set, so all zeroes is a valid value: the
    // empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer and the size are those of `set`, which lives through the call. 0 is the
    // calling thread.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } == 0 {
        // SAFETY: the numbers are below CPU_SETSIZE, so their bits are inside the set.
        let may = |cpu: &usize| unsafe { libc::CPU_ISSET(*cpu, &set) };
        let allowed: Vec<_> = (0..libc::CPU_SETSIZE as usize).filter(may).collect();
        sentence += &format!(": it may run on {}, counted from 0", spans(&allowed));
    }
    ConfigError::Invalid(sentence).into()
}

/// Ascending numbers as text, like "0 to 3, 6".
#[cfg(target_os = "linux")]
fn spans(numbers: &[usize]) -> String {
    let spans = numbers.chunk_by(|a, b| a + 1 == *b);
    let spans = spans.map(|span| match span {
        [first, .., last] => format!("{first} to {last}"),
        [one] => one.to_string(),
        [] => String::new(),
    });
    spans.collect::<Vec<_>>().join(", ")
}

#[cfg(not(target_os = "linux"))]
fn pin_to(_cpu: usize) -> Result<(), Error> {
    let why = "only Linux can keep a thread on one";
    Err(ConfigError::NotApplicable { what: "processor", why }.into())
}

impl Poller {
    /// Starts a poller thread with the default settings.
    ///
    /// # Errors
    ///
    /// Those of [`PollerBuilder::start`].
    pub fn start() -> Result<Self, Error> {
        Self::builder().start()
    }

    /// Returns a builder for the settings. [`PollerBuilder::start`] starts the thread.
    pub fn builder() -> PollerBuilder {
        PollerBuilder::default()
    }

    /// Returns a poller without a thread, for a model.
    #[cfg(all(test, loom))]
    pub(crate) fn unstarted() -> Self {
        Self { shared: PollerShared::new() }
    }

    /// Returns what the poller's thread does, for a model to run on a thread of loom's.
    #[cfg(all(test, loom))]
    pub(crate) fn thread(&self) -> impl FnOnce() + Send + 'static {
        let shared = self.shared.clone();
        move || run(&shared, IdlePolicy::PARK)
    }

    pub(crate) fn shared(&self) -> &Arc<PollerShared> {
        &self.shared
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        lock(&self.shared.arrivals).handle_dropped = true;
        // Release: pairs with the Acquire in `run`. Relaxed would do, because `handle_dropped` is
        // under the lock of `arrivals`.
        self.shared.set.arrived.overwrite(true, Ordering::Release);
        self.shared.set.bell.ring();
    }
}

/// A ring on a poller's thread.
struct PolledRing {
    engine: Engine,
    handoff: Arc<Handoff>,
    /// The number of rounds without work.
    idle: u32,
    /// Whether the ring is in the list of rings that are polled.
    active: bool,
}

/// The outcome of polling a ring once.
enum PollOutcome {
    Worked,
    /// The ring had no work, and none in that many rounds before this one.
    Idle(u32),
    Asleep,
    Closed,
}

impl PolledRing {
    fn poll(&mut self, idle: IdlePolicy) -> PollOutcome {
        // The engine catches the panics of its device. Any other panic (in the drop of a panic's
        // payload, or in a subscriber of our traces) ends this ring and no other.
        catch_panic(|| self.poll_uncaught(idle)).unwrap_or_else(|Panicked| {
            let _ = catch_panic(|| self.engine.close_panicked());
            PollOutcome::Closed
        })
    }

    fn poll_uncaught(&mut self, idle: IdlePolicy) -> PollOutcome {
        let worked = self.engine.poll_once();
        if self.engine.is_closed() {
            PollOutcome::Closed
        } else if worked {
            self.idle = 0;
            PollOutcome::Worked
        } else if self.idle < idle.rounds() {
            self.idle += 1;
            PollOutcome::Idle(self.idle - 1)
        } else if self.engine.try_sleep() {
            self.active = false;
            PollOutcome::Asleep
        } else {
            PollOutcome::Worked
        }
    }
}

/// The poller's thread.
fn run(shared: &PollerShared, idle: IdlePolicy) {
    let mut rings: Vec<Option<PolledRing>> = Vec::new();
    let mut active: Vec<usize> = Vec::new();
    let mut sleepers = Sleepers::default();
    let mut ring_count = 0;
    let mut handle_dropped = false;
    loop {
        // Acquire: pairs with the Releases in `adopt` and in the drop of `Poller`. The Release half
        // pairs with nothing. Relaxed would do for both, because the lock below hands over what
        // arrived.
        if shared.set.arrived.swap(false, Ordering::AcqRel) {
            let mut arrivals = lock(&shared.arrivals);
            handle_dropped |= arrivals.handle_dropped;
            for (place, mut engine, handoff) in arrivals.engines.drain(..) {
                engine.bind_to_thread();
                if rings.len() <= place {
                    rings.resize_with(place + 1, || None);
                }
                rings[place] = Some(PolledRing { engine, handoff, idle: 0, active: true });
                active.push(place);
                ring_count += 1;
            }
            // Reserves space for all rings now, so that no list grows in the path of a packet.
            active.reserve(rings.len().saturating_sub(active.len()));
            sleepers.reserve(rings.len());
        }
        shared.set.collect(|place| {
            if activate(&mut rings, &mut active, place) {
                sleepers.remove(place);
            }
        });

        let mut worked = false;
        let mut rounds = u32::MAX;
        let mut i = 0;
        while let Some(&place) = active.get(i) {
            let ring = rings[place].as_mut().expect("an active place is taken");
            match ring.poll(idle) {
                PollOutcome::Worked => worked = true,
                PollOutcome::Idle(round) => rounds = rounds.min(round),
                PollOutcome::Asleep => {
                    let engine = &ring.engine;
                    let device = engine.descriptor().map(|fd| (fd, engine.queues_closed()));
                    let notifier = shared.set.bell.parker();
                    sleepers.add(place, engine.deadline(), device, notifier);
                    active.swap_remove(i);
                    continue;
                }
                PollOutcome::Closed => {
                    let ring = rings[place].take().expect("an active place is taken");
                    active.swap_remove(i);
                    sleepers.forget(place);
                    ring_count -= 1;
                    hand_back(shared, place, ring);
                    worked = true;
                    continue;
                }
            }
            i += 1;
        }
        if !active.is_empty() {
            let polls = active.len();
            sleepers.check(polls, shared.set.bell.parker(), |place| {
                wake(&mut rings, &mut active, place);
            });
        }
        if worked {
            continue;
        }
        if !active.is_empty() {
            idle.pause(rounds);
            continue;
        }
        if handle_dropped && ring_count == 0 {
            // Without a handle nobody can add a ring, and without a ring nobody rings.
            return;
        }
        let set = &shared.set;
        sleepers.sleep(&set.bell, || set.has_news(), |place| wake(&mut rings, &mut active, place));
    }
}

/// Adds a ring that was rung to the active list. Returns whether it was not there.
fn activate(rings: &mut [Option<PolledRing>], active: &mut Vec<usize>, place: usize) -> bool {
    // A ring may have left since its bit was set.
    let Some(Some(ring)) = rings.get_mut(place) else { return false };
    if ring.active {
        return false;
    }
    ring.active = true;
    ring.idle = 0;
    active.push(place);
    true
}

/// Adds a ring to the active list whose deadline has come or whose descriptor is readable.
fn wake(rings: &mut [Option<PolledRing>], active: &mut Vec<usize>, place: usize) {
    if !activate(rings, active, place) {
        return;
    }
    let ring = rings[place].as_ref().expect("it was activated");
    // Nobody rang this ring, so its doorbell is still armed.
    ring.engine.shared.bell.disarm();
    ring.engine.request_device_poll();
}

/// Hands the engine of a closed ring back to the reaping half, which may be waiting for it.
fn hand_back(shared: &PollerShared, place: usize, ring: PolledRing) {
    let PolledRing { engine, handoff, .. } = ring;
    let ring = engine.shared.clone();
    // If the reaping half is gone, the engine is dropped here, and with it perhaps the device,
    // whose code may panic.
    if catch_panic(|| handoff.give(engine)).is_err() {
        tracing::error!(ring = ring.number, "the device panicked while dropped");
    }
    shared.unreserve(place);
    ring.notify();
}
