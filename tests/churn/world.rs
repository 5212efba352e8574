//! Interfaces, pollers, rings and front-ends, what is done to them, and what must come of it.

use std::fmt::Write as _;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmring::{
    ConfigError, Direction, Drive, Error, IdlePolicy, Interface, Mode, Poller, Pool, PoolBuilder,
    RetryPolicy, RingOp, SubmitErrorKind,
};

use crate::churn::counted::{Counted, Counts};
use crate::churn::frontend::{Front, PACKET};
use crate::churn::nasty::Inside;
use crate::churn::operation::{KINDS, Operation, PLACES, Part, Plan, Shape, Step, Task, Way};
use crate::churn::seat::{Activity, Reaps, Seat, new_number};
use crate::churn::setup::{Identified, Setup, Under};
use crate::churn::{PATIENCE, QUIET, lock, processor};
use crate::support::stage;

/// Turns that one wait for one thing may take without anything coming of them. A waiter that spins
/// has so many at once.
const IDLE_TURNS: u32 = 500;
/// Front-ends that may be about to end before one of them is waited for.
const ENDING: usize = 8;
/// Frames for all rings but the front-ends'.
const FRAMES: usize = 192;

pub(crate) struct World {
    setup: Setup,
    /// The beginning of the names of all threads.
    prefix: String,
    interfaces: Vec<Port>,
    places: Vec<Mutex<Option<Arc<Seat>>>>,
    /// Front-ends whose seat is gone.
    ending: Mutex<Vec<Front>>,
    pollers: [Poller; 2],
    pool: Pool,
    inside: Arc<Inside>,
    /// Nobody but this thread does anything.
    alone: AtomicBool,
    pub(crate) tally: Arc<Tally>,
}

/// An interface.
struct Port {
    interface: Interface,
    counts: Arc<Counts>,
    stopped: AtomicBool,
}

/// What was done, for a summary.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) operations: [AtomicU64; KINDS.len()],
    pub(crate) completions: AtomicU64,
    pub(crate) restarts: AtomicU64,
}

impl World {
    pub(crate) fn new(setup: &Setup) -> Self {
        let inside = Arc::default();
        let prefix = new_prefix();
        let drivers = setup.drivers(&prefix, &inside);
        Self::over(setup, prefix, drivers, inside)
    }

    /// A world of interfaces with these drivers.
    pub(crate) fn over(
        setup: &Setup,
        prefix: String,
        drivers: Vec<Identified>,
        inside: Arc<Inside>,
    ) -> Self {
        let interfaces = drivers.into_iter().map(Port::start).collect::<Vec<_>>();
        let max = interfaces.iter().map(|port| port.interface.max_packet_size()).max();
        let headroom = interfaces.iter().map(|port| port.interface.capabilities().headroom).max();
        let pool = PoolBuilder::new(FRAMES, max.unwrap_or_default() as usize)
            .headroom(headroom.unwrap_or_default() as usize)
            .huge_pages(false);
        let pollers = [IdlePolicy::PARK, IdlePolicy { spins: 0, yields: 2 }]
            .map(|idle| Poller::builder().name(format!("{prefix}p")).idle(idle).start());
        Self {
            setup: setup.clone(),
            prefix,
            interfaces,
            places: (0..PLACES).map(|_| Mutex::default()).collect(),
            ending: Mutex::default(),
            pollers: pollers.map(|poller| poller.expect("a poller")),
            pool: pool.build().expect("a small pool"),
            inside,
            alone: AtomicBool::new(false),
            tally: Arc::default(),
        }
    }

    fn is_alone(&self) -> bool {
        self.alone.load(Ordering::Relaxed)
    }

    /// Whether the device may break the rules by which calls are predicted.
    fn is_plain(&self) -> bool {
        self.setup.is_honest() && self.setup.lives()
    }

    pub(crate) fn step(&self, step: &Step) {
        match &step.0[..] {
            [operation] => {
                self.alone.store(true, Ordering::Relaxed);
                self.perform(operation);
            }
            several => {
                self.alone.store(false, Ordering::Relaxed);
                let begin = std::sync::Barrier::new(several.len());
                thread::scope(|scope| {
                    let start = |operation| {
                        let begin = &begin;
                        let thread = thread::Builder::new().name(format!("{}o", self.prefix));
                        let work = move || {
                            begin.wait();
                            self.perform(operation);
                        };
                        thread.spawn_scoped(scope, work).expect("a thread")
                    };
                    let threads: Vec<_> = several.iter().map(start).collect();
                    for thread in threads {
                        thread.join().unwrap_or_else(|panic| resume_unwind(panic));
                    }
                });
            }
        }
    }

    /// Does one operation. Any number of threads may.
    pub(crate) fn perform(&self, operation: &Operation) {
        self.tally.operations[operation.kind()].fetch_add(1, Ordering::Relaxed);
        match *operation {
            Operation::Build { place, plan } => self.build(place, plan),
            Operation::Submit { place, reads, writes, skip } => {
                self.with(place, |seat| self.submit(seat, reads, writes, skip));
            }
            Operation::Rounds { place, n, writes, skip } => {
                self.with(place, |seat| self.rounds(seat, n, writes, skip));
            }
            Operation::Cancel { place, all } => self.with(place, |seat| self.cancel(seat, all)),
            Operation::Reap { place } => self.with(place, |seat| {
                self.reaps(seat, |reaper| self.take_in(seat, reaper));
            }),
            Operation::Wait { place, min, micros } => self.with(place, |seat| {
                self.reaps(seat, |reaper| {
                    let start = Instant::now();
                    reaper.wait(min, Some(Duration::from_micros(micros)));
                    assert!(start.elapsed() < PATIENCE, "a wait of {micros} us hung");
                    self.take_in(seat, reaper)
                });
            }),
            Operation::CancelAndWait { place } => {
                self.with(place, |seat| self.cancel_and_wait(seat));
            }
            Operation::Drain { place } => self.with(place, |seat| self.drain(seat)),
            Operation::Resume { place } => self.with(place, |seat| self.resume(seat)),
            Operation::Arm { place } => self.with(place, |seat| {
                self.reaps(seat, |reaper| {
                    let _ = reaper.arm();
                });
            }),
            Operation::Close { place } => self.with(place, |seat| self.close(seat)),
            Operation::Drop { place, part } => self.drop_part(place, part),
            Operation::ControlWake { place } => self.with(place, |seat| seat.control.wake()),
            Operation::ControlStop { place } => self.with(place, |seat| {
                seat.control.stop();
                assert!(seat.control.closed().is_some(), "it was stopped");
            }),
            Operation::ControlCancel { place } => {
                self.with(place, |seat| seat.control.cancel_all());
            }
            Operation::Front { place, task } => self.with(place, |seat| {
                if let Some(front) = &*lock(&seat.front) {
                    front.ask(task);
                }
            }),
            Operation::Restart { interface, patient } => self.restart(interface, patient),
            Operation::Stop { interface } => self.stop(interface),
            Operation::DeviceWakes => self.inside.wake_all(),
            Operation::Pause { micros } => thread::sleep(Duration::from_micros(micros)),
        }
    }

    fn with(&self, place: usize, f: impl FnOnce(&Arc<Seat>)) {
        let seat = lock(&self.places[place]).clone();
        if let Some(seat) = seat {
            f(&seat);
        }
    }

    fn seats(&self) -> Vec<Arc<Seat>> {
        self.places.iter().filter_map(|place| lock(place).clone()).collect()
    }

    fn port(&self, interface: usize) -> &Port {
        &self.interfaces[interface % self.interfaces.len()]
    }

    fn reaps<T>(&self, seat: &Seat, f: impl FnOnce(&mut dyn Reaps) -> T) -> Option<T> {
        seat.reaps(f)
    }

    fn take_in(&self, seat: &Seat, reaper: &mut dyn Reaps) -> usize {
        let n = seat.take_in(reaper);
        self.tally.completions.fetch_add(n as u64, Ordering::Relaxed);
        let ledger = lock(&seat.ledger);
        let mut skipping = lock(&seat.skipping);
        if !skipping.is_empty() {
            // What is in flight and not in the ledger skips success. Nobody submits meanwhile.
            let left = reaper.in_flight().saturating_sub(ledger.len());
            let missing = |number: &u64| self.may_be_missing(seat, *number);
            if left <= skipping.iter().filter(|number| missing(number)).count() {
                skipping.retain(missing);
            }
        }
        n
    }

    /// Polls the inline rings that nobody else uses this moment.
    fn drive(&self) {
        for seat in self.seats() {
            if seat.plan.drive == Way::Inline {
                seat.try_reaps(|reaper| self.take_in(&seat, reaper));
            }
        }
    }

    fn build(&self, place: usize, plan: Plan) {
        if lock(&self.places[place]).is_some() {
            return;
        }
        let port = self.port(plan.interface);
        let was_stopped = port.stopped.load(Ordering::SeqCst);
        match self.build_seat(port, plan) {
            Ok(seat) => {
                assert!(!was_stopped, "a ring on a stopped interface");
                let before = lock(&self.places[place]).replace(Arc::new(seat));
                // Two builds at once for one place.
                before.into_iter().for_each(|seat| self.retire(&seat));
            }
            // The device, or a restart or a stop meanwhile.
            Err(_) if !self.is_alone() || was_stopped || !self.is_plain() => {}
            Err(Error::TooManyRings { .. }) => {}
            // A restart that waits for an inline ring.
            Err(Error::Config(ConfigError::Invalid(_))) => {}
            Err(error) => panic!("no ring: {error}"),
        }
    }

    fn build_seat(&self, port: &Port, plan: Plan) -> Result<Seat, Error> {
        let direction = match (plan.reads, plan.writes) {
            (true, false) => Direction::Read,
            (false, _) => Direction::Write,
            (true, true) => Direction::Both,
        };
        let idle = if plan.parks { IdlePolicy::PARK } else { IdlePolicy { spins: 0, yields: 2 } };
        let mut builder = port
            .interface
            .ring(direction)
            .depth(1 << plan.depth)
            .idle(idle)
            .retry(RetryPolicy { attempts: 3, delay: Duration::from_micros(20) })
            .close_timeout(self.setup.close_timeout())
            .start_index(0_u32.wrapping_sub(20));
        if plan.small_sq {
            builder = builder.sq_depth(2);
        }
        builder = match plan.drive {
            Way::Thread => builder.thread_name(format!("{}r", self.prefix)),
            Way::Shared(i) => builder.drive(Drive::Shared(&self.pollers[i])),
            Way::Inline => builder.drive(Drive::Inline),
        };
        let restarts = port.counts.restarts();
        match plan.shape {
            Shape::Whole => Ok(Seat::whole(plan, builder.pool(&self.pool).build()?, restarts)),
            Shape::Split => Ok(Seat::split(plan, builder.pool(&self.pool).build()?, restarts)),
            Shape::Blocking | Shape::Async => {
                let ring = builder.build()?;
                let seat = Seat::new(plan, ring.control(), restarts);
                let front = match plan.shape {
                    Shape::Blocking => Front::blocking(ring, &self.prefix)?,
                    _ => Front::asynchronous(ring, &self.prefix)?,
                };
                *lock(&seat.front) = Some(front);
                Ok(seat)
            }
        }
    }

    fn submit(&self, seat: &Seat, reads: usize, writes: usize, skip: bool) {
        let mut submitted = 0;
        for i in 0..reads.max(writes) {
            let ops = [(i < writes, RingOp::Write), (i < reads, RingOp::Read)];
            for (_, op) in ops.into_iter().filter(|(wanted, _)| *wanted) {
                match self.submit_one(seat, op, skip) {
                    Some(Ok(_)) => submitted += 1,
                    Some(Err(_)) => {}
                    None => return,
                }
            }
        }
        if submitted > 0 && seat.plan.drive == Way::Inline && self.is_alone() {
            let deadline = seat.reaps(|reaper| reaper.next_deadline()).flatten();
            let closed = seat.control.closed().is_some();
            assert!(
                closed || deadline.is_some_and(|at| at <= Instant::now()),
                "what was submitted is to be driven now, and not at {deadline:?}"
            );
        }
    }

    /// Submits one entry; `None` if there is no frame or no submitting half. A write skips success if
    /// `skip`.
    fn submit_one(
        &self,
        seat: &Seat,
        op: RingOp,
        skip: bool,
    ) -> Option<Result<u64, SubmitErrorKind>> {
        let number = new_number();
        let skip = skip && op == RingOp::Write;
        let (reads, writes) = (seat.plan.reads, seat.plan.writes || !seat.plan.reads);
        let was_closed = seat.control.closed().is_some();
        let drained = seat.drains.load(Ordering::SeqCst);
        let answer = seat.submits(|half| {
            let mut frame = half.alloc()?;
            // Before: the completion may be reaped at once.
            let mut ledger = lock(&seat.ledger);
            if skip {
                lock(&seat.skipping).insert(number);
            } else {
                ledger.insert(number, op);
            }
            let answer = if op == RingOp::Read {
                half.read(frame, number)
            } else {
                frame.copy_from(&PACKET).expect("it fits");
                if skip { half.write_only(frame, number) } else { half.write(frame, number) }
            };
            if answer.is_err() {
                ledger.remove(&number);
                lock(&seat.skipping).remove(&number);
            }
            Some(answer.map_err(|refused| refused.kind))
        })??;
        match answer {
            Ok(()) => {
                assert!(!was_closed, "a closed ring takes nothing");
                assert!(!drained || !self.is_alone(), "a ring that drains takes nothing");
                Some(Ok(number))
            }
            Err(kind) => {
                match kind {
                    SubmitErrorKind::SqFull | SubmitErrorKind::NoCredit => {}
                    SubmitErrorKind::Draining if drained || !self.is_alone() => {}
                    SubmitErrorKind::Closed(_) if seat.control.closed().is_some() => {}
                    SubmitErrorKind::WrongDirection if op == RingOp::Read && !reads => {}
                    SubmitErrorKind::WrongDirection if op == RingOp::Write && !writes => {}
                    kind => panic!("a {op:?} is refused: {kind}"),
                }
                Some(Err(kind))
            }
        }
    }

    /// Ends with the first round that is not over soon. Whether it is stuck is seen at the end.
    fn rounds(&self, seat: &Seat, n: usize, writes: usize, skip: bool) {
        for _ in 0..n {
            for _ in 0..writes {
                if !matches!(self.submit_one(seat, RingOp::Write, skip), Some(Ok(_))) {
                    break;
                }
            }
            let over = seat.reaps(|reaper| {
                let start = Instant::now();
                loop {
                    self.take_in(seat, reaper);
                    let skipping = !lock(&seat.skipping).is_empty();
                    if !skipping && seat.in_flight(&[RingOp::Write]).is_empty() {
                        return true;
                    }
                    if start.elapsed() > Duration::from_millis(20) {
                        return false;
                    }
                    reaper.wait(1, Some(Duration::from_millis(2)));
                }
            });
            if over != Some(true) || seat.control.closed().is_some() {
                return;
            }
        }
    }

    fn cancel(&self, seat: &Seat, all: bool) {
        let mut target = seat.in_flight(&[RingOp::Read, RingOp::Write]).first().copied();
        target = target.or_else(|| lock(&seat.skipping).first().copied());
        let target = if all { None } else { Some(target.unwrap_or(u64::MAX)) };
        let number = new_number();
        seat.submits(|half| {
            let mut ledger = lock(&seat.ledger);
            ledger.insert(number, RingOp::Cancel);
            if half.cancel(target, number).is_err() {
                ledger.remove(&number);
            }
        });
    }

    fn cancel_and_wait(&self, seat: &Seat) {
        seat.reaps(|reaper| {
            // What another thread submits meanwhile is not cancelled.
            let in_time = self.is_alone() && !self.setup.loses();
            let patience = if in_time { PATIENCE } else { Duration::from_millis(5) };
            match reaper.cancel_and_wait(patience) {
                Ok(waiting) if self.is_alone() => {
                    assert_eq!(waiting, reaper.in_flight(), "all is cancelled");
                }
                Ok(_) => {}
                Err(Error::Timeout(_)) if !in_time => {}
                Err(error) => panic!("cancel_and_wait: {error}"),
            }
            self.take_in(seat, reaper);
        });
    }

    fn drain(&self, seat: &Seat) {
        seat.reaps(|reaper| {
            seat.drains.store(true, Ordering::SeqCst);
            let in_time = self.is_alone() && !self.setup.loses();
            let patience = if in_time { PATIENCE } else { Duration::from_millis(5) };
            match reaper.drain(patience) {
                Ok(waiting) => {
                    if in_time {
                        assert_eq!(waiting, reaper.in_flight(), "a drained ring has nothing left");
                    }
                    self.take_in(seat, reaper);
                }
                Err(Error::Timeout(_)) if !in_time => {}
                Err(Error::Closed(_)) if seat.control.closed().is_some() => {}
                Err(error) => panic!("a drain: {error}"),
            }
        });
    }

    fn resume(&self, seat: &Seat) {
        seat.reaps(|reaper| {
            reaper.resume();
            seat.drains.store(false, Ordering::SeqCst);
        });
    }

    /// Closes the ring and takes in everything.
    fn close(&self, seat: &Seat) {
        seat.reaps(|reaper| match reaper.close() {
            Ok(()) => {}
            Err(Error::Leaked { .. }) if self.setup.loses() => {}
            Err(error) => panic!("close: {error}"),
        });
    }

    fn drop_part(&self, place: usize, part: Part) {
        match part {
            Part::Everything => {
                let seat = lock(&self.places[place]).take();
                seat.into_iter().for_each(|seat| self.retire(&seat));
            }
            Part::Submitter => self.with(place, |seat| seat.drop_submitter()),
            Part::Reaper => self.with(place, |seat| seat.drop_reaper()),
        }
    }

    /// A seat whose place is gone. Its ring closes when it is dropped; a front-end's must be closed
    /// for its threads to end.
    fn retire(&self, seat: &Seat) {
        let Some(front) = lock(&seat.front).take() else { return };
        seat.control.stop();
        let mut ending = std::mem::take(&mut *lock(&self.ending));
        ending.push(front);
        let mut over: Vec<_> = ending.extract_if(.., Front::is_over).collect();
        if ending.len() > ENDING {
            over.push(ending.remove(0));
        }
        lock(&self.ending).append(&mut ending);
        over.into_iter().for_each(Front::end);
    }

    /// What is in flight on the rings of an interface that a thread drives.
    fn polled_seats(&self, interface: usize) -> Vec<Arc<Seat>> {
        let n = self.interfaces.len();
        let mut seats = self.seats();
        seats.retain(|seat| {
            seat.plan.drive != Way::Inline && seat.plan.interface % n == interface % n
        });
        seats
    }

    /// A stop or restart that has returned has completed everything, and it can be reaped.
    fn assert_all_visible(&self, seats: &[Arc<Seat>], what: &str) {
        if !self.is_alone() || !self.setup.is_honest() {
            return;
        }
        for seat in seats {
            seat.reaps(|reaper| {
                self.take_in(seat, reaper);
                let left = reaper.in_flight();
                assert!(left == 0, "{left} entries that {what} cancelled cannot be reaped yet");
            });
        }
    }

    /// Calls `f` on a thread of its own and drives the inline rings until it returns.
    fn while_driving<T: Send>(&self, what: &str, f: impl FnOnce() -> T + Send) -> T {
        if self.seats().iter().all(|seat| seat.plan.drive != Way::Inline) && self.is_alone() {
            return f();
        }
        thread::scope(|scope| {
            let thread = thread::Builder::new().name(format!("{}c", self.prefix));
            let call = thread.spawn_scoped(scope, f).expect("a thread");
            let start = Instant::now();
            while !call.is_finished() {
                self.drive();
                assert!(start.elapsed() < PATIENCE * 2, "{what} does not return");
                thread::sleep(Duration::from_micros(100));
            }
            call.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    fn restart(&self, interface: usize, patient: bool) {
        let port = self.port(interface);
        let (before, was_stopped) = (port.counts.restarts(), port.stopped.load(Ordering::SeqCst));
        // What is in flight on a ring that is still detached waits on.
        let mut seats = self.polled_seats(interface);
        seats.retain(|seat| seat.is_attached(before));
        let answer = if patient {
            self.while_driving("a restart", || port.interface.restart(PATIENCE))
        } else {
            port.interface.restart(Duration::ZERO)
        };
        match answer {
            Ok(()) => {
                self.tally.restarts.fetch_add(1, Ordering::Relaxed);
                assert!(!was_stopped, "a restart of a stopped interface succeeds");
                let after = port.counts.restarts();
                assert!(after > before, "a restart succeeds, and the device was not restarted");
                if patient {
                    self.assert_all_visible(&seats, "a restart");
                }
            }
            Err(Error::StopTimeout { .. }) if !patient => {}
            Err(Error::StopTimeout { .. }) => panic!("a restart does not end"),
            // Stopped, or the device has failed to restart.
            Err(_) if was_stopped || !self.is_alone() || !self.setup.lives() => {}
            Err(_) if port.stopped.load(Ordering::SeqCst) => {}
            Err(error) => panic!("a restart: {error}"),
        }
    }

    fn stop(&self, interface: usize) {
        let port = self.port(interface);
        match self.while_driving("a stop", || port.interface.stop(PATIENCE)) {
            Ok(()) => {
                port.stopped.store(true, Ordering::SeqCst);
                assert!(port.counts.stops() > 0, "a stop succeeds, and the device was not stopped");
                self.assert_all_visible(&self.polled_seats(interface), "a stop");
            }
            Err(error) => panic!("a stop: {error}"),
        }
    }

    /// After the last operation: everything that must complete does, everything works that must,
    /// nobody is woken or polls, and everything can be closed.
    pub(crate) fn finish(self) {
        self.alone.store(true, Ordering::Relaxed);
        stage_of("everything completes", &self);
        self.complete_all();
        if self.seats().iter().any(|seat| seat.drains.load(Ordering::SeqCst)) {
            stage_of("it is quiet while rings drain", &self);
            self.assert_quiet();
            self.seats().iter().for_each(|seat| self.resume(seat));
        }
        stage_of("open rings work", &self);
        self.rings_work();
        stage_of("it is quiet", &self);
        self.assert_quiet();
        stage_of("everything closes", &self);
        self.close_all();
        stage_of("it is quiet after the close", &self);
        self.assert_quiet();
        stage_of("the rings are dropped", &self);
        for place in &self.places {
            let seat = lock(place).take();
            drop(seat);
        }
        stage_of("a new ring works", &self);
        self.assert_new_ring_works();
        let Self { interfaces, pool, setup, .. } = self;
        drop(interfaces);
        let start = Instant::now();
        while !setup.loses() && pool.slots_out() > 0 {
            assert!(start.elapsed() < PATIENCE, "{} slots do not come back", pool.slots_out());
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until `done`, and drives all rings meanwhile. No wait may end early again and again.
    fn pump_until(&self, what: &str, mut done: impl FnMut(&Seat) -> bool) {
        let start = Instant::now();
        let nap = Duration::from_millis(3);
        let mut idle = 0;
        loop {
            let mut open = Vec::new();
            for seat in self.seats() {
                seat.reaps(|reaper| self.take_in(&seat, reaper));
                if !done(&seat) {
                    open.push(seat);
                }
            }
            if open.is_empty() {
                return;
            }
            let mut slept = false;
            for seat in &open {
                let waited = seat.reaps(|reaper| {
                    let before = Instant::now();
                    let ready = reaper.wait(1, Some(nap));
                    let early = before.elapsed() < nap / 2;
                    if early && ready == 0 && reaper.in_flight() > 0 {
                        idle += 1;
                    }
                    slept |= !early;
                    self.take_in(seat, reaper)
                });
                if waited.is_some_and(|n| n > 0) {
                    idle = 0;
                }
            }
            assert!(
                idle < IDLE_TURNS,
                "{what}: `wait` returns at once and brings nothing\n{self:?}"
            );
            assert!(start.elapsed() < PATIENCE, "{what}: it never happens\n{self:?}");
            if !slept {
                thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Whether an entry that is still in flight need not complete before its ring is closed.
    fn may_be_missing(&self, seat: &Seat, number: u64) -> bool {
        let closed_with_loss = self.setup.loses() && seat.control.closed().is_some();
        closed_with_loss || self.inside.has_forgotten(number)
    }

    fn is_over(&self, seat: &Seat, kinds: &[RingOp]) -> bool {
        let missing = |number: &u64| self.may_be_missing(seat, *number);
        // A cancel ends them all, and a wait for writes is one for these too.
        let skipped = !kinds.contains(&RingOp::Write) || lock(&seat.skipping).iter().all(missing);
        skipped && seat.in_flight(kinds).iter().all(missing)
    }

    fn complete_all(&self) {
        const CANCEL_AND_WRITE: [RingOp; 2] = [RingOp::Cancel, RingOp::Write];
        self.eventually("the device's threads have nothing to do", || self.inside.is_idle());
        self.pump_until("writes and cancels complete", |seat| {
            seat.reaps(|_| ()).is_none() || self.is_over(seat, &CANCEL_AND_WRITE)
        });
        for seat in self.seats() {
            seat.control.cancel_all();
        }
        self.pump_until("cancelled reads complete", |seat| {
            seat.reaps(|_| ()).is_none() || self.is_over(seat, &[RingOp::Read])
        });
        self.fronts_end();
    }

    /// Writes of front-ends end.
    fn fronts_end(&self) {
        if self.setup.loses() {
            return;
        }
        let is_over =
            |seat: &Arc<Seat>| lock(&seat.front).as_ref().is_none_or(Front::writes_are_over);
        self.eventually("writes of front-ends end", || {
            self.drive();
            self.seats().iter().all(is_over)
        });
    }

    fn eventually(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "{what}: it never happens\n{self:?}");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// A write on each open ring completes, and a read after a cancel.
    fn rings_work(&self) {
        for seat in self.seats() {
            let (reads, writes) = (seat.plan.reads, seat.plan.writes);
            let all = [
                (RingOp::Write, false, writes),
                (RingOp::Write, true, writes),
                (RingOp::Read, false, reads),
            ];
            for (op, skip, wanted) in all {
                if !wanted || seat.control.closed().is_some() {
                    continue;
                }
                self.submit_one(&seat, op, skip);
                if op == RingOp::Read {
                    self.cancel(&seat, true);
                }
                self.pump_until(&format!("a {op:?} on an open ring completes"), |other| {
                    !std::ptr::eq(other, &*seat)
                        || seat.reaps(|_| ()).is_none()
                        || self.is_over(&seat, &[op, RingOp::Cancel])
                });
            }
        }
        for seat in self.seats() {
            if let Some(front) = &*lock(&seat.front) {
                (0..8).for_each(|_| front.ask(Task::Write));
            }
        }
        self.fronts_end();
        self.packets_arrive();
        // A read that came behind the cancel.
        self.pump_until("cancelled reads complete", |seat| {
            let Some(()) = seat.reaps(|_| ()) else { return true };
            let over = self.is_over(seat, &[RingOp::Read, RingOp::Cancel]);
            if !over {
                seat.control.cancel_all();
            }
            over
        });
    }

    /// A packet reaches a posted read, whoever sleeps. (Of a nasty device another ring may get it.)
    fn packets_arrive(&self) {
        let n = self.interfaces.len();
        if !self.setup.lives() || !matches!(self.setup.device, Under::Loopback | Under::Embedded) {
            return;
        }
        let seats = self.seats();
        let open = |seat: &Seat| {
            let whole = seat.reaps(|_| ()).is_some() && seat.submits(|_| ()).is_some();
            whole && seat.control.closed().is_none()
        };
        for reader in seats.iter().filter(|seat| seat.plan.reads && open(seat)) {
            // On a network the packet comes from the other interface.
            let from = (reader.plan.interface + n - 1) % n;
            let writer = seats
                .iter()
                .find(|seat| seat.plan.interface % n == from && seat.plan.writes && open(seat));
            let (Some(writer), Some(Ok(_))) =
                (writer, self.submit_one(reader, RingOp::Read, false))
            else {
                continue;
            };
            // Writes may be refused, and dropped on the way.
            let start = Instant::now();
            let mut last = None;
            while !self.is_over(reader, &[RingOp::Read]) {
                assert!(
                    start.elapsed() < PATIENCE,
                    "no packet reaches a posted read; the last write: {last:?}\n{self:?}"
                );
                last = self.submit_one(writer, RingOp::Write, false);
                for seat in [writer, reader] {
                    seat.reaps(|reaper| {
                        reaper.wait(1, Some(Duration::from_millis(2)));
                        self.take_in(seat, reaper)
                    });
                }
            }
        }
    }

    /// What has been done that nobody does who sleeps: calls of each interface's device, and the
    /// activity of each ring.
    fn activity(&self) -> (Vec<u64>, Vec<Activity>) {
        let calls = self.interfaces.iter().map(|port| port.counts.calls()).collect();
        (calls, self.seats().iter().map(|seat| seat.activity()).collect())
    }

    fn assert_quiet(&self) {
        let hasty = self.interfaces.iter().map(|port| port.counts.hasty_closes()).max();
        assert_eq!(hasty, Some(0), "a queue is asked to close again and again\n{self:?}");
        self.eventually("the device's threads have nothing to do", || self.inside.is_idle());
        for seat in self.seats() {
            seat.reaps(|reaper| {
                // What is still under way, and a wake that nobody has waited for, end an arming
                // early; but not again and again.
                let mut early = 0;
                while !(reaper.arm() && reaper.arm_waker()) {
                    self.take_in(&seat, reaper);
                    early += 1;
                    let plan = seat.plan;
                    assert!(early < IDLE_TURNS, "{plan:?}: `arm` says no for ever\n{self:?}");
                    thread::sleep(Duration::from_micros(100));
                }
            });
        }
        let start = Instant::now();
        let mut before = self.activity();
        loop {
            thread::sleep(QUIET);
            let now = self.activity();
            if now == before {
                break;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "it does not become quiet: {before:?}, and {QUIET:?} later {now:?}\n{self:?}"
            );
            before = now;
        }
        if self.setup.measured
            && let Some(before) = processor::time_of(&self.prefix)
        {
            let start = Instant::now();
            thread::sleep(Duration::from_secs(1));
            let spent = processor::time_of(&self.prefix).unwrap_or_default().saturating_sub(before);
            let most = start.elapsed() / 100;
            assert!(
                spent <= most,
                "{spent:?} of processor time in a second without work\n{self:?}"
            );
        }
    }

    fn close_all(&self) {
        for seat in self.seats() {
            self.retire(&seat);
            seat.control.stop();
        }
        for front in std::mem::take(&mut *lock(&self.ending)) {
            front.end();
        }
        for seat in self.seats() {
            self.close(&seat);
            // As the documentation has it.
            seat.reaps(|reaper| {
                let mut turns = 0;
                while reaper.in_flight() > 0 {
                    reaper.wait(1, None);
                    let n = self.take_in(&seat, reaper);
                    turns = if n > 0 { 0 } else { turns + 1 };
                    assert!(turns < IDLE_TURNS, "a closed ring: `wait` spins\n{self:?}");
                }
                self.take_in(&seat, reaper);
                let left = lock(&seat.ledger).len() + lock(&seat.skipping).len();
                assert!(left == 0 || self.setup.loses(), "{left} entries never complete\n{self:?}");
            });
        }
    }

    /// When all rings are gone, a new one can be built and works.
    fn assert_new_ring_works(&self) {
        if !self.is_plain() || matches!(self.setup.device, Under::Other) {
            return;
        }
        let plan = Plan {
            interface: 0,
            drive: Way::Thread,
            shape: Shape::Whole,
            reads: false,
            writes: true,
            depth: 3,
            small_sq: false,
            parks: true,
        };
        for port in &self.interfaces {
            if port.stopped.load(Ordering::SeqCst) {
                continue;
            }
            let start = Instant::now();
            let seat = loop {
                match self.build_seat(port, plan) {
                    Ok(seat) => break seat,
                    Err(error) => {
                        assert!(start.elapsed() < PATIENCE, "no new ring: {error}");
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            };
            *lock(&self.places[0]) = Some(Arc::new(seat));
            self.rings_work();
            let seat = lock(&self.places[0]).take();
            drop(seat);
        }
    }
}

impl Port {
    fn start((id, driver): Identified) -> Self {
        let counts = Arc::<Counts>::default();
        let driver = Counted { inner: driver, counts: counts.clone() };
        let interface = Interface::builder().mode(Mode::Host).interface_id(id).device(driver);
        let interface = interface.start().expect("a device of this process starts");
        Self { interface, counts, stopped: AtomicBool::new(false) }
    }
}

/// The beginning of the names of a world's threads.
pub(crate) fn new_prefix() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("lv{}-", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn stage_of(what: &str, world: &World) {
    stage(format!("{what}\n{world:?}"));
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, place) in self.places.iter().enumerate() {
            let Some(seat) = lock(place).clone() else { continue };
            let mut line = format!("{:?}, closed: {:?}", seat.plan, seat.control.closed());
            let _ = match seat.ledger.try_lock() {
                Ok(ledger) => write!(
                    line,
                    ", in flight: {ledger:?}, skipping success: {:?}",
                    seat.skipping.try_lock()
                ),
                Err(_) => write!(line, ", in use"),
            };
            writeln!(f, "ring {i}: {line}")?;
            let stats = seat.control.stats();
            let (reads, writes) = (stats.rx_packets, stats.tx_packets);
            let (cancelled, failed) = (stats.cancelled, stats.errors + stats.exhausted);
            let (abandoned, restarts) = (stats.abandoned, stats.restarts);
            writeln!(
                f,
                "    {reads} read, {writes} written, {cancelled} cancelled, {failed} failed, \
                 {abandoned} abandoned, {restarts} restarts"
            )?;
        }
        for (i, port) in self.interfaces.iter().enumerate() {
            let (counts, drops) = (&port.counts, port.interface.drops());
            writeln!(f, "interface {i}: {counts:?}, dropped: {drops:?}")?;
        }
        writeln!(f, "{} slots are out", self.pool.slots_out())?;
        write!(f, "{:?}", self.setup)
    }
}

/// Runs `steps` in a world of its own, and then asks for everything that must hold.
pub(crate) fn run(setup: &Setup, steps: &[Step]) {
    let world = World::new(setup);
    for (i, step) in steps.iter().enumerate() {
        stage(format!("step {i}: {step:?}\n{setup:?}\n{steps:?}"));
        world.step(step);
    }
    world.finish();
}
