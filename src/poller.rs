//! The poller: submission queue -> batches -> device -> completion queue.
//!
//! An *engine* is one ring's share of that work; it never blocks. A [`Poller`] is a thread that polls
//! the engines of one ring or of many; with `Drive::Inline` the reaping half polls its engine itself.
//!
//! A poller polls only engines that have something to do. An engine that runs dry arms its ring's
//! doorbell and leaves the active list; whoever rings puts a bit into the poller's ready set and
//! rings the poller's own doorbell, which costs a system call only if the thread sleeps. So the cost
//! of a turn does not grow with the number of idle rings.

use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread::{self, ThreadId};
use std::time::Instant;

use vmring_core::sync::Ordering;

use crate::device::catch::{Panicked, catch_panic};
use crate::engine::{Engine, Handoff};
use crate::error::{ConfigError, Error};
use crate::limits::{RINGS_PER_POLLER_MAX, SLEEPER_CHECK_INTERVAL, SLEEPER_CHECK_TURNS};
use crate::mailbox::ready::ReadySet;
use crate::policy::IdlePolicy;
use crate::sys::{lock, poll, poll_in};

/// The part of a poller that rings and ringers see.
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
    /// The last handle to the poller is gone: end when the last ring is.
    handle_dropped: bool,
}

impl PollerShared {
    /// A place in the ready set.
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

    pub(crate) fn unreserve(&self, place: usize) {
        lock(&self.arrivals).free.push(place);
    }

    pub(crate) fn adopt(&self, place: usize, engine: Engine, handoff: Arc<Handoff>) {
        lock(&self.arrivals).engines.push((place, engine, handoff));
        self.set.arrived.store(true, Ordering::Release);
        self.set.bell.ring();
    }

    pub(crate) fn is_current_thread(&self) -> bool {
        self.thread.get() == Some(&thread::current().id())
    }
}

/// A thread that drives rings: `Drive::Shared(&poller)`.
///
/// It ends when this handle is gone and the last of its rings is closed.
#[derive(Debug)]
pub struct Poller {
    shared: Arc<PollerShared>,
}

/// Makes a [`Poller`].
#[derive(Clone, Debug, Default)]
pub struct PollerBuilder {
    name: Option<String>,
    cpu: Option<usize>,
    idle: IdlePolicy,
}

impl PollerBuilder {
    /// The thread's name. Default `vmring-poller`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Keeps the thread on one processor, counted from 0. Linux only: macOS offers no such call.
    pub fn cpu(mut self, cpu: usize) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// How the thread waits for work.
    pub fn idle(mut self, idle: IdlePolicy) -> Self {
        self.idle = idle;
        self
    }

    /// What was set of the thread itself, if anything was.
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
    /// [`Error::Io`] if the system refuses the thread or the processor, [`Error::NotSupported`] for
    /// a processor on a system that cannot.
    pub fn start(self) -> Result<Poller, Error> {
        let shared = Arc::new(PollerShared {
            set: Arc::new(ReadySet::new()),
            arrivals: Mutex::default(),
            thread: OnceLock::new(),
        });
        let (started, starting) = mpsc::sync_channel(1);
        let thread = {
            let shared = shared.clone();
            thread::Builder::new()
                .name(self.name.unwrap_or_else(|| "vmring-poller".to_owned()))
                .spawn(move || {
                    let pinned = self.cpu.map_or(Ok(()), pin_to);
                    let go = pinned.is_ok();
                    let _ = shared.thread.set(thread::current().id());
                    let _ = started.send(pinned);
                    if go {
                        run(&shared, self.idle);
                    }
                })
        };
        thread.map_err(Error::io("starting the poller's thread"))?;
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
    // SAFETY: a cpu_set_t is a plain bit set, for which all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= libc::CPU_SETSIZE as usize {
        let source = std::io::ErrorKind::InvalidInput.into();
        return Err(Error::Io { what: "pinning the poller's thread", source });
    }
    // SAFETY: `cpu` is within the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer and size are those of the set; 0 is the calling thread.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } != 0 {
        return Err(Error::io("pinning the poller's thread")(std::io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn pin_to(_cpu: usize) -> Result<(), Error> {
    Err(Error::NotSupported {
        what: "pinning a thread to a processor",
        device: std::env::consts::OS.to_owned(),
    })
}

impl Poller {
    /// A poller thread with the defaults.
    pub fn start() -> Result<Self, Error> {
        Self::builder().start()
    }

    /// A poller thread with settings.
    pub fn builder() -> PollerBuilder {
        PollerBuilder::default()
    }

    pub(crate) fn shared(&self) -> &Arc<PollerShared> {
        &self.shared
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        lock(&self.shared.arrivals).handle_dropped = true;
        self.shared.set.arrived.store(true, Ordering::Release);
        self.shared.set.bell.ring();
    }
}

/// A ring's place on a poller's thread.
struct PolledRing {
    engine: Engine,
    handoff: Arc<Handoff>,
    /// Rounds without work.
    idle: u32,
    active: bool,
    /// Whether it stands in the list of those with a time or a descriptor.
    watched: bool,
    /// When it wants to be turned although nobody rings; looked at only while inactive.
    wake_at: Option<Instant>,
}

/// What became of a ring's turn.
enum PollOutcome {
    Worked,
    /// For that many rounds before this one as well.
    Idle(u32),
    Asleep,
    Closed,
}

impl PolledRing {
    fn poll(&mut self, idle: IdlePolicy) -> PollOutcome {
        // The engine catches what its device does. Whatever panics besides (what a panic carried,
        // when it is dropped; a subscriber of our traces) is this ring's end and nobody else's.
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
            self.wake_at = self.engine.deadline();
            PollOutcome::Asleep
        } else {
            PollOutcome::Worked
        }
    }
}

fn run(shared: &PollerShared, idle: IdlePolicy) {
    let mut rings: Vec<Option<PolledRing>> = Vec::new();
    let mut active: Vec<usize> = Vec::new();
    let mut watched: Vec<usize> = Vec::new();
    let mut descriptors: Vec<libc::pollfd> = Vec::new();
    let mut ring_count = 0;
    let mut handle_dropped = false;
    let mut check = SleeperCheck::default();
    loop {
        if shared.set.arrived.swap(false, Ordering::AcqRel) {
            let mut arrivals = lock(&shared.arrivals);
            handle_dropped |= arrivals.handle_dropped;
            for (place, mut engine, handoff) in arrivals.engines.drain(..) {
                engine.bind_to_thread();
                if rings.len() <= place {
                    rings.resize_with(place + 1, || None);
                }
                let wake_at = None;
                let (active_now, watched) = (true, false);
                rings[place] = Some(PolledRing {
                    engine,
                    handoff,
                    idle: 0,
                    active: active_now,
                    wake_at,
                    watched,
                });
                active.push(place);
                ring_count += 1;
            }
            // Room for all, now, so that nothing grows on a packet's way.
            active.reserve(rings.len().saturating_sub(active.len()));
            watched.reserve(rings.len().saturating_sub(watched.len()));
            descriptors.reserve(rings.len() + 1);
        }
        shared.set.collect(|place| activate(&mut rings, &mut active, place));

        let mut worked = false;
        let mut rounds = u32::MAX;
        let mut i = 0;
        while let Some(&place) = active.get(i) {
            let ring = rings[place].as_mut().expect("an active place is taken");
            match ring.poll(idle) {
                PollOutcome::Worked => worked = true,
                PollOutcome::Idle(round) => rounds = rounds.min(round),
                PollOutcome::Asleep => {
                    let watch = ring.wake_at.is_some() || ring.engine.descriptor().is_some();
                    if watch && !ring.watched {
                        ring.watched = true;
                        watched.push(place);
                    }
                    active.swap_remove(i);
                    continue;
                }
                PollOutcome::Closed => {
                    let ring = rings[place].take().expect("as above");
                    active.swap_remove(i);
                    if ring.watched {
                        // Or whoever takes the place next would stand there twice.
                        watched.retain(|watched| *watched != place);
                    }
                    ring_count -= 1;
                    hand_back(shared, place, ring);
                    worked = true;
                    continue;
                }
            }
            i += 1;
        }
        if !active.is_empty() && !watched.is_empty() && check.is_due(active.len()) {
            // Those who sleep are not to wait until everybody does.
            check.run(&mut rings, &mut active, &mut watched, &mut descriptors);
        }
        if worked {
            continue;
        }
        if !active.is_empty() {
            idle.pause(rounds);
            continue;
        }
        if handle_dropped && ring_count == 0 {
            // No handle, so nobody can add a ring; no ring, so nobody rings.
            return;
        }
        sleep(shared, &mut rings, &mut active, &mut watched, &mut descriptors);
    }
}

fn activate(rings: &mut [Option<PolledRing>], active: &mut Vec<usize>, place: usize) {
    // A bit may outlive its ring.
    if let Some(Some(ring)) = rings.get_mut(place)
        && !ring.active
    {
        ring.active = true;
        ring.idle = 0;
        active.push(place);
    }
}

/// A closed ring leaves: its engine goes to the reaping half, which may be waiting for it.
fn hand_back(shared: &PollerShared, place: usize, ring: PolledRing) {
    let PolledRing { engine, handoff, .. } = ring;
    let ring = engine.shared.clone();
    // Nobody may want it any more; then the device may end here, whose code that is.
    if catch_panic(|| handoff.give(engine)).is_err() {
        tracing::error!(ring = ring.number, "the device panicked while dropped");
    }
    shared.unreserve(place);
    ring.notify();
}

/// Nothing is active: sleeps until somebody rings, a descriptor is readable, or a ring's time has
/// come. `watched` are the places of the rings with a time or a descriptor: the others cost nothing
/// here.
fn sleep(
    shared: &PollerShared,
    rings: &mut [Option<PolledRing>],
    active: &mut Vec<usize>,
    watched: &mut Vec<usize>,
    descriptors: &mut Vec<libc::pollfd>,
) {
    let wake_at = collect_descriptors(rings, watched, descriptors);
    // The notifier's own.
    descriptors.push(poll_in(-1));
    let timeout = wake_at.map(|at| at.saturating_duration_since(Instant::now()));
    shared.set.bell.arm();
    if !shared.set.has_news() {
        shared.set.bell.parker().park_on(timeout, descriptors);
    }
    shared.set.bell.disarm();
    if !watched.is_empty() {
        wake_due(rings, active, watched, descriptors, Instant::now());
    }
}

/// The descriptors of those who sleep, and the first of their times.
fn collect_descriptors(
    rings: &[Option<PolledRing>],
    watched: &[usize],
    descriptors: &mut Vec<libc::pollfd>,
) -> Option<Instant> {
    let mut wake_at: Option<Instant> = None;
    descriptors.clear();
    for &place in watched {
        let Some(ring) = rings[place].as_ref().filter(|ring| !ring.active) else { continue };
        wake_at = [wake_at, ring.wake_at].into_iter().flatten().min();
        if let Some(fd) = ring.engine.descriptor() {
            descriptors.push(poll_in(fd));
        }
    }
    wake_at
}

/// When a poller that is busy looks after those who sleep: now and then, and never in a packet's
/// share of a round.
#[derive(Debug, Default)]
struct SleeperCheck {
    polls: usize,
    /// Before then no descriptor is polled again.
    next: Option<Instant>,
}

impl SleeperCheck {
    /// Counts a round of so many polls.
    fn is_due(&mut self, polls: usize) -> bool {
        self.polls += polls;
        let due = self.polls >= SLEEPER_CHECK_TURNS;
        if due {
            self.polls = 0;
        }
        due
    }

    fn run(
        &mut self,
        rings: &mut [Option<PolledRing>],
        active: &mut Vec<usize>,
        watched: &mut Vec<usize>,
        descriptors: &mut Vec<libc::pollfd>,
    ) {
        let now = Instant::now();
        let wake_at = collect_descriptors(rings, watched, descriptors);
        if self.next.is_some_and(|next| now < next) {
            descriptors.clear();
        }
        if !descriptors.is_empty() {
            self.next = now.checked_add(SLEEPER_CHECK_INTERVAL);
            poll(descriptors, 0);
        }
        if !descriptors.is_empty() || wake_at.is_some_and(|at| at <= now) {
            wake_due(rings, active, watched, descriptors, now);
        }
    }
}

/// Turns those again whose time has come or whose descriptor is readable.
fn wake_due(
    rings: &mut [Option<PolledRing>],
    active: &mut Vec<usize>,
    watched: &mut Vec<usize>,
    descriptors: &[libc::pollfd],
    now: Instant,
) {
    watched.retain(|&place| {
        let Some(ring) = &mut rings[place] else { return false };
        let due = ring.wake_at.is_some_and(|at| at <= now);
        let readable = ring
            .engine
            .descriptor()
            .is_some_and(|fd| descriptors.iter().any(|poll| poll.fd == fd && poll.revents != 0));
        if !ring.active && (due || readable) {
            // It was not rung awake, so its doorbell is still armed.
            ring.engine.shared.bell.disarm();
            ring.engine.request_device_poll();
            ring.active = true;
            ring.idle = 0;
            active.push(place);
        }
        ring.watched = !ring.active;
        ring.watched
    });
}
