//! Random operations on rings over randomly misbehaving devices, checked against a plain model.
//!
//! The model knows what is in flight, what was sent, and which frames the caller holds. After each
//! step it checks that no slot was lost or doubled. For each completion it checks that the entry
//! was in flight, that the order is right, and that something explains the result. The fuzz target
//! `ring_ops` has a smaller model of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmring::device::fault::Faults;
use vmring::device::{
    Capabilities, Device, PollContext, PostedSlot, Progress, Queue, QueueConfig, Relay, Wake,
};
use vmring::pool::{Pool, PoolBuilder};
use vmring::{
    CloseReason, Completion, Direction, Drive, Driver, EntryError, Error, Frame, IdlePolicy,
    Interface, InterfaceConfig, InterfaceInfo, Loopback, RetryPolicy, Ring, RingOp as Kind, Status,
    SubmitErrorKind,
};

use crate::support::quiet_network;

/// Far longer than anything here takes. A test that reaches this hangs.
const LONG: Duration = Duration::from_secs(20);
/// The shortest packet with both addresses, a type and a number.
const NUMBERED: usize = 22;
/// The status with which the fault device fails for good, and the one with which it refuses a
/// write.
const FATAL: Status = Status::SharingServiceBusy;
const REFUSAL: Status = Status::NotAuthorized;

/// The devices and depths of the rings. Probabilities are in percent.
#[derive(Clone, Debug)]
#[cfg_attr(not(test), derive(arbitrary::Arbitrary))]
pub(crate) struct Setup {
    /// Two interfaces on one network, instead of one loopback.
    pub(crate) embedded: bool,
    pub(crate) seed: u64,
    pub(crate) short: u8,
    pub(crate) exhaustion: u8,
    pub(crate) errors: u8,
    pub(crate) abandon: u8,
    pub(crate) corruption: u8,
    pub(crate) twice: u8,
    pub(crate) late: u8,
    /// Probability that the device puts back slots it has taken.
    pub(crate) shy: u8,
    /// How long a completion engine holds a slot. 0 means no completion engine.
    pub(crate) hold_us: u8,
    pub(crate) reorder: bool,
    pub(crate) fate: Fate,
    /// Depths as exponents of two.
    pub(crate) depths: [u8; 3],
    pub(crate) sq_depth: Option<u8>,
    pub(crate) frames: u8,
    /// Number of submissions until the indices wrap.
    pub(crate) before_wrap: u8,
}

#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), derive(arbitrary::Arbitrary))]
pub(crate) enum Fate {
    Lives,
    FailsAfter(u8),
    PanicsAfter(u8),
}

/// One step. `end` chooses the interface. Numbers are taken modulo what exists.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), derive(arbitrary::Arbitrary))]
pub(crate) enum Step {
    Read {
        end: bool,
        n: u8,
    },
    Write {
        end: bool,
        size: Size,
        skip: bool,
    },
    Writes {
        end: bool,
        sizes: [Size; 3],
        skip: bool,
    },
    Foreign {
        end: bool,
        read: bool,
    },
    Cancel {
        end: bool,
        target: u8,
        to_the_end: bool,
    },
    CancelAll {
        end: bool,
    },
    Reap {
        end: bool,
        n: u8,
    },
    /// Takes completions of one operation, and leaves those of the others.
    ReapIf {
        end: bool,
        write: bool,
        n: u8,
    },
    Peek {
        end: bool,
        take: bool,
    },
    Wait {
        end: bool,
        min: u8,
        ms: u8,
    },
    Take {
        n: u8,
    },
    Drop {
        frame: u8,
    },
    Trim {
        frame: u8,
        front: bool,
        n: u8,
    },
    Grow {
        frame: u8,
        n: u8,
    },
    Quiesce {
        end: bool,
    },
    Restart {
        end: bool,
    },
    ControlCancel {
        end: bool,
    },
    ControlWake {
        end: bool,
    },
    ControlStop {
        end: bool,
    },
    Close {
        end: bool,
    },
    Rebuild {
        end: bool,
    },
}

#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), derive(arbitrary::Arbitrary))]
pub(crate) enum Size {
    Empty,
    /// One byte short of an Ethernet header.
    Runt,
    Some(u8),
    Max,
    TooBig,
    /// The frame keeps its trimmed or grown length.
    AsItIs,
}

/// Runs `steps` and then closes everything. Each ring has a poller of its own if `threads`, else it
/// is inline.
///
/// # Panics
///
/// If a contract is broken.
pub(crate) fn run(setup: &Setup, threads: bool, steps: &[Step]) {
    let mut model = Model::new(setup, threads);
    for step in steps {
        model.step(*step);
        model.check();
    }
    model.finish();
}

#[derive(Debug)]
struct Entry {
    kind: Kind,
    /// The slot of a read or write.
    slot: Option<u32>,
    /// For a write, its index in `sent`.
    sent: usize,
    /// A write whose success has no completion.
    skip: bool,
    /// A cancel, close or restart has asked for its end.
    cancelled: bool,
}

/// A submitted packet. The list is in submission order.
#[derive(Debug)]
struct Sent {
    bytes: Vec<u8>,
    /// The packet cannot have reached the device.
    failed: bool,
    received: bool,
}

/// One interface, its ring, and what the model knows about both.
struct End {
    interface: Interface,
    ring: Option<Ring>,
    flight: BTreeMap<u64, Entry>,
    sent: Vec<Sent>,
    /// How many of the other end's packets were matched, if the order must be kept.
    cursor: usize,
    /// Reads, writes and cancels in flight, as far as the model knows.
    count: [usize; 3],
    /// How many of these writes have succeeded without a completion. If a thread drives the ring, there
    /// may be more by now.
    skipped: usize,
    /// Entries submitted since the engine last ran.
    in_sq: usize,
    /// The highest `user_data` of a successful read, and of a successful write.
    last_ok: [Option<u64>; 2],
    /// What the ring's own counters must show.
    seen: Seen,
    restarts: u64,
    restart_pending: bool,
    /// A control handle asked to cancel everything, and the engine may not have seen the request.
    cancel_pending: bool,
    /// Packets may have been lost, because a close or a restart empties the device's own queue.
    lossy: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    rx_packets: u64,
    rx_bytes: u64,
    tx_packets: u64,
    tx_bytes: u64,
    cancelled: u64,
    errors: u64,
    exhausted: u64,
    abandoned: u64,
}

struct Model<'a> {
    setup: &'a Setup,
    threads: bool,
    depths: [usize; 3],
    sq_depth: usize,
    max: usize,
    pool: Pool,
    stranger: Pool,
    held: Vec<Frame>,
    ends: Vec<End>,
    next: u64,
}

impl Setup {
    fn faults(&self, end: u64) -> Faults {
        let p = |percent: u8| f64::from(percent % 101) / 100.0;
        // At most 90 percent, because a device that takes nothing at all would stop the ring for
        // good.
        let some = |percent: u8| p(percent % 91);
        let mut faults = Faults::seeded(self.seed.wrapping_add(end))
            .short_batches(some(self.short))
            .exhaustion(some(self.exhaustion))
            .errors(p(self.errors), REFUSAL)
            .abandon(p(self.abandon))
            .corruption(p(self.corruption))
            .duplicate_wakes(p(self.twice))
            .late_wakes(p(self.late), Duration::from_micros(300));
        if self.hold_us > 0 {
            faults = faults.engine(Duration::from_micros(self.hold_us.into()), self.reorder);
        }
        match self.fate {
            Fate::Lives => faults,
            Fate::FailsAfter(n) => faults.fail_after(n.into(), FATAL),
            Fate::PanicsAfter(n) => faults.panic_after(n.into()),
        }
    }

    fn shy(&self, inner: impl Driver) -> Shy {
        Shy { inner: Box::new(inner), percent: self.shy % 91, seed: self.seed }
    }

    fn has_engine(&self) -> bool {
        self.hold_us > 0
    }

    fn in_order(&self) -> bool {
        !(self.has_engine() && self.reorder)
    }

    fn lives(&self) -> bool {
        matches!(self.fate, Fate::Lives)
    }

    fn interface(&self, end: u8, network: &str) -> Interface {
        let faults = self.faults(end.into());
        // Large enough that packets which wait are not dropped.
        let driver: Box<dyn Driver> = if self.embedded {
            Box::new(faults.wrap(self.shy(quiet_network(network).overflow(1024))))
        } else {
            Box::new(faults.wrap(self.shy(Loopback::new(200))))
        };
        Interface::builder()
            .interface_id([end + 1; 16])
            .device(driver)
            .start()
            .expect("a device of this process starts")
    }
}

/// A driver with a device that takes slots and often puts the last ones back, like a system call
/// that takes only a part of its batch.
struct Shy {
    inner: Box<dyn Driver>,
    percent: u8,
    seed: u64,
}

struct ShyDevice {
    inner: Arc<dyn Device>,
    percent: u8,
    seed: u64,
}

struct ShyQueue {
    inner: Box<dyn Queue>,
    relay: Relay,
    percent: u8,
    dice: u64,
    put_back_reads: bool,
}

impl Driver for Shy {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let Shy { inner, percent, seed } = *self;
        Ok(Arc::new(ShyDevice { inner: inner.start(config)?, percent, seed }))
    }
}

impl Device for ShyDevice {
    fn name(&self) -> &str {
        "shy"
    }

    fn info(&self) -> InterfaceInfo {
        self.inner.info()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let inner = self.inner.queue(config, wake)?;
        let (percent, dice) = (self.percent, self.seed | 1);
        let relay = Relay::default();
        Ok(Box::new(ShyQueue { inner, relay, percent, dice, put_back_reads: false }))
    }

    fn stop(&self) -> Result<(), Error> {
        self.inner.stop()
    }

    fn restart(&self) -> Result<(), Error> {
        self.inner.restart()
    }
}

impl ShyQueue {
    /// Returns how many of `n` to keep.
    fn some(&mut self, n: usize) -> usize {
        // xorshift64
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        let shy = self.dice % 100 < self.percent.into();
        if shy && n > 0 { (self.dice >> 32) as usize % n } else { n }
    }

    /// Takes all slots of one kind, puts back the last ones in reverse order, and posts the others
    /// to the inner device.
    fn take(
        &mut self,
        cx: &mut PollContext<'_>,
        take: fn(&mut PollContext<'_>) -> Option<PostedSlot>,
    ) -> bool {
        let mut taken: Vec<_> = std::iter::from_fn(|| take(cx)).collect();
        let kept = self.some(taken.len());
        let put_back = taken.len() > kept;
        for slot in taken.drain(kept..).rev() {
            cx.put_back(slot);
        }
        taken.into_iter().for_each(|slot| self.relay.post(slot));
        put_back
    }

    fn forward(&mut self, cx: &mut PollContext<'_>) {
        while let Some(done) = self.relay.next_done() {
            cx.forward(done);
        }
    }
}

impl Queue for ShyQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        self.put_back_reads = self.take(cx, |cx| cx.take_read());
        self.take(cx, |cx| cx.take_write());
        let result = self.relay.poll(&mut *self.inner);
        self.relay.put_back(cx);
        self.forward(cx);
        result
    }

    fn arm(&mut self) -> bool {
        !self.put_back_reads && self.inner.arm()
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        self.inner.cancel(target)
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        let closed = self.relay.close(&mut *self.inner);
        self.forward(cx);
        closed
    }
}

impl<'a> Model<'a> {
    fn new(setup: &'a Setup, threads: bool) -> Self {
        static NETWORKS: AtomicU64 = AtomicU64::new(0);
        let network = format!("model-{}", NETWORKS.fetch_add(1, Ordering::Relaxed));
        let n = if setup.embedded { 2 } else { 1 };
        let interfaces: Vec<_> = (0..n).map(|end| setup.interface(end, &network)).collect();
        let max = interfaces[0].max_packet_size() as usize;
        let build = |frames| PoolBuilder::new(frames, max + 1).huge_pages(false).build();
        let pool = build(usize::from(setup.frames) % 64 + 2).expect("a small pool");
        let stranger = build(1).expect("a small pool");
        let depths = [0, 1, 2].map(|i| 1 << (setup.depths[i] % [5, 5, 3][i]));
        let sum: usize = depths.iter().sum();
        let sq_depth =
            setup.sq_depth.map_or(sum.next_power_of_two(), |exponent| 1 << (exponent % 5));
        let mut model = Self {
            setup,
            threads,
            depths,
            sq_depth,
            max,
            pool,
            stranger,
            held: Vec::new(),
            ends: Vec::new(),
            next: 1,
        };
        for interface in interfaces {
            let ring = Some(model.build(&interface));
            model.ends.push(End {
                interface,
                ring,
                flight: BTreeMap::new(),
                sent: Vec::new(),
                cursor: 0,
                count: [0; 3],
                skipped: 0,
                in_sq: 0,
                last_ok: [None; 2],
                seen: Seen::default(),
                restarts: 0,
                restart_pending: false,
                cancel_pending: false,
                lossy: false,
            });
        }
        model
    }

    fn build(&self, interface: &Interface) -> Ring {
        let [read, write, cancel] = self.depths.map(|depth| depth as u32);
        let drive = if self.threads { Drive::Thread } else { Drive::Inline };
        interface
            .ring(Direction::Both)
            .read_depth(read)
            .write_depth(write)
            .cancel_depth(cancel)
            .sq_depth(self.sq_depth as u32)
            .pool(&self.pool)
            .drive(drive)
            .idle(IdlePolicy { spins: 0, yields: 2 })
            .retry(RetryPolicy { attempts: 3, delay: Duration::from_micros(20) })
            .close_timeout(LONG)
            .start_index(0_u32.wrapping_sub(self.setup.before_wrap.into()))
            .build()
            .expect("a ring")
    }

    fn end(&self, end: bool) -> usize {
        usize::from(end) % self.ends.len()
    }

    /// Checks after each step that every slot is in exactly one place.
    fn check(&mut self) {
        let in_flight = |end: &End| end.count[0] + end.count[1] - end.skipped;
        let most: usize = self.ends.iter().map(in_flight).sum();
        let out = self.pool.slots_out() as usize;
        for end in 0..self.ends.len() {
            self.settle(end);
        }
        let in_flight: usize = self.ends.iter().map(in_flight).sum();
        let held = self.held.len();
        if self.threads {
            // The frames of writes that skip success go home at any time.
            let skipping: usize = self.ends.iter().map(|end| end.skipping() - end.skipped).sum();
            let possible = held + in_flight - skipping..=held + most;
            assert!(possible.contains(&out), "{out} slots out, possible are {possible:?}");
        } else {
            assert_eq!(out, held + in_flight, "slots out: held and in flight");
        }
    }

    /// Asks the ring how many writes have succeeded without a completion. Forgets them when all have
    /// that may.
    fn settle(&mut self, end: usize) {
        let me = &mut self.ends[end];
        let (all, skipping) = (me.flight.len(), me.skipping());
        let count = me.ring.as_ref().map_or(all, Ring::in_flight);
        if skipping == 0 {
            assert_eq!(count, all, "the ring's own count of what is in flight");
        }
        assert!(count <= all && count + skipping >= all, "{count} of {all}, {skipping} may skip");
        assert!(me.skipped <= all - count, "what was over is in flight again");
        me.skipped = all - count;
        if me.skipped == skipping {
            me.all_skipped();
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Read { end, n } => self.read(self.end(end), n.into()),
            Step::Write { end, size, skip } => self.write(self.end(end), &[size], false, skip),
            Step::Writes { end, sizes, skip } => self.write(self.end(end), &sizes, true, skip),
            Step::Foreign { end, read } => self.foreign(self.end(end), read),
            Step::Cancel { end, target, to_the_end } => {
                self.cancel(self.end(end), target, to_the_end);
            }
            Step::CancelAll { end } => self.cancel_all(self.end(end)),
            Step::Reap { end, n } => self.reap(self.end(end), n.into()),
            Step::ReapIf { end, write, n } => {
                self.reap_if(self.end(end), if write { Kind::Write } else { Kind::Read }, n.into());
            }
            Step::Peek { end, take } => self.peek(self.end(end), take),
            Step::Wait { end, min, ms } => self.wait(self.end(end), min.into(), ms),
            Step::Take { n } => {
                for _ in 0..n % 4 {
                    let full = self.pool.slots_out() == self.pool.layout().slots;
                    let frame = self.pool.alloc();
                    assert!(full || frame.is_some(), "a frame is refused only if all are out");
                    // A poller frees slots meanwhile, and counts a slot after it has freed it.
                    assert!(self.threads || !full || frame.is_none(), "all frames are out");
                    self.held.extend(frame);
                }
            }
            Step::Drop { frame } => {
                if !self.held.is_empty() {
                    self.held.swap_remove(usize::from(frame) % self.held.len());
                }
            }
            Step::Trim { frame, front, n } => self.resize(frame, n, |frame, n| {
                let fits = n <= frame.len();
                let trimmed =
                    if front { frame.trim_front(n).is_ok() } else { frame.trim_back(n).is_ok() };
                assert_eq!(trimmed, fits);
            }),
            Step::Grow { frame, n } => self.resize(frame, n, |frame, n| {
                let fits = n <= frame.headroom();
                assert_eq!(frame.grow_front(n).is_ok(), fits);
            }),
            Step::Quiesce { end } => self.cancel_and_wait(self.end(end)),
            Step::Restart { end } => self.restart(self.end(end)),
            Step::ControlCancel { end } => {
                let end = self.end(end);
                self.ends[end].allow_cancels();
                self.ends[end].cancel_pending = true;
                self.with_ring(end, |ring| ring.control().cancel_all());
            }
            Step::ControlWake { end } => {
                let end = self.end(end);
                self.with_ring(end, |ring| ring.control().wake());
            }
            Step::ControlStop { end } => {
                let end = self.end(end);
                self.ends[end].allow_cancels();
                self.ends[end].lossy = true;
                self.with_ring(end, |ring| {
                    ring.control().stop();
                    assert!(ring.control().closed().is_some());
                });
            }
            Step::Close { end } => self.close(self.end(end)),
            Step::Rebuild { end } => self.rebuild(self.end(end)),
        }
    }

    fn with_ring(&mut self, end: usize, f: impl FnOnce(&mut Ring)) {
        if let Some(ring) = &mut self.ends[end].ring {
            f(ring);
        }
    }

    fn resize(&mut self, frame: u8, n: u8, f: impl FnOnce(&mut Frame, usize)) {
        let len = self.held.len();
        if len > 0 {
            let frame = &mut self.held[usize::from(frame) % len];
            let before = (frame.headroom() + frame.len(), frame.capacity() + frame.headroom());
            f(frame, n.into());
            assert!(frame.headroom() + frame.len() <= before.0);
            assert_eq!(frame.capacity() + frame.headroom(), before.1, "the slot's own size");
        }
    }

    /// A frame to submit: one that the caller holds, or a new one.
    fn frame(&mut self) -> Option<Frame> {
        self.held.pop().or_else(|| self.pool.alloc())
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Why a submit of this class must be refused. If a thread drives the ring, the model does not
    /// know how full the SQ is.
    fn refusal(&self, end: usize, class: usize) -> Option<SubmitErrorKind> {
        let end = &self.ends[end];
        let skipped = if class == 1 { end.skipped } else { 0 };
        if end.count[class] - skipped == self.depths[class] {
            Some(SubmitErrorKind::NoCredit)
        } else if end.in_sq == self.sq_depth && !self.threads {
            Some(SubmitErrorKind::SqFull)
        } else {
            None
        }
    }

    /// Checks the result of a submit. On an inline ring it is predicted exactly. If a thread drives
    /// the ring, the SQ may drain and the device may fail at any time.
    fn expect(
        &self,
        end: usize,
        answer: Option<SubmitErrorKind>,
        closed: Option<CloseReason>,
        foreseen: Option<SubmitErrorKind>,
    ) {
        if let Some(closed) = closed {
            assert_eq!(answer, Some(SubmitErrorKind::Closed(closed)));
            return;
        }
        if self.threads {
            if foreseen == Some(SubmitErrorKind::NoCredit)
                && answer != foreseen
                && self.ends[end].skipping() > self.ends[end].skipped
            {
                // A credit has come back without a completion.
                let free =
                    [None, Some(SubmitErrorKind::SqFull), Some(SubmitErrorKind::ForeignPool)];
                assert!(
                    free.contains(&answer) || matches!(answer, Some(SubmitErrorKind::Closed(_)))
                );
                return;
            }
            if let Some(SubmitErrorKind::Closed(_)) = answer {
                assert!(!self.setup.lives() || self.ends[end].restart_pending, "{answer:?}");
                return;
            }
            if answer == Some(SubmitErrorKind::SqFull) {
                assert!(self.sq_depth < self.depths.iter().sum(), "an SQ with room for all");
                return;
            }
        }
        assert_eq!(answer, foreseen);
    }

    fn entered(&mut self, end: usize, number: u64, kind: Kind, slot: Option<u32>, sent: usize) {
        let end = &mut self.ends[end];
        let cancelled = end.restart_pending || end.cancel_pending;
        end.flight.insert(number, Entry { kind, slot, sent, skip: false, cancelled });
        end.count[kind as usize] += 1;
        end.in_sq += 1;
    }

    /// Posts `n % 6 + 1` reads, or fewer if frames run out.
    fn read(&mut self, end: usize, n: usize) {
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        let closed = ring.control().closed();
        let n = n % 6 + 1;
        let frames: Vec<_> = (0..n).map_while(|_| self.frame()).collect();
        let mut batch: Vec<_> = frames.into_iter().map(|frame| (frame, self.number())).collect();
        let slots: Vec<_> = batch.iter().map(|(frame, n)| (frame.slot(), *n)).collect();
        if n == 1 {
            // Use `submit_read` for a single frame.
            if let Some((frame, number)) = batch.pop() {
                let slot = frame.slot();
                let foreseen = self.refusal(end, 0);
                let answer = ring.submit_read(frame, number).map_err(|refused| {
                    assert_eq!(refused.frame.slot(), slot, "the refused frame comes back");
                    self.held.push(refused.frame);
                    refused.kind
                });
                self.expect(end, answer.err(), closed, foreseen);
                if answer.is_ok() {
                    self.entered(end, number, Kind::Read, Some(slot), 0);
                }
            }
        } else {
            let mut rest = batch.into_iter();
            let accepted = match ring.submit_reads(rest.by_ref()) {
                Ok(accepted) => accepted,
                Err(refused) => {
                    assert_eq!(refused.frame.slot(), slots[refused.accepted].0);
                    self.expect(end, Some(refused.kind), closed, None);
                    self.held.push(refused.frame);
                    refused.accepted
                }
            };
            let left = rest.len();
            self.held.extend(rest.map(|(frame, _)| frame));
            self.accepted(end, &slots, accepted, left, Kind::Read, closed);
        }
        let credits = ring.split().0.read_credits() as usize;
        assert_eq!(credits, self.depths[0] - self.ends[end].count[0], "read credits");
        self.ends[end].ring = Some(ring);
    }

    /// Records that the first `accepted` entries of a batch are in flight. No more than expected
    /// may be accepted.
    fn accepted(
        &mut self,
        end: usize,
        batch: &[(u32, u64)],
        accepted: usize,
        left: usize,
        kind: Kind,
        closed: Option<CloseReason>,
    ) {
        if closed.is_some() {
            assert_eq!(accepted, 0, "a closed ring takes nothing");
        }
        for (slot, number) in &batch[..accepted] {
            if !self.threads {
                assert_eq!(self.refusal(end, kind as usize), None, "more than there was room for");
            }
            self.entered(end, *number, kind, Some(*slot), 0);
        }
        let most = self.depths[kind as usize] + self.ends[end].skipping();
        assert!(self.ends[end].count[kind as usize] <= most, "credits");
        let stopped_early = accepted + left == batch.len() && left > 0;
        if stopped_early && !self.threads && closed.is_none() {
            assert!(self.refusal(end, kind as usize).is_some(), "it could have taken more");
        }
    }

    fn write(&mut self, end: usize, sizes: &[Size], as_batch: bool, skip: bool) {
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        let closed = ring.control().closed();
        let mut batch = Vec::new();
        for size in sizes {
            let Some(mut frame) = self.frame() else { break };
            self.fill(end, &mut frame, *size);
            batch.push((frame, self.number()));
        }
        let slots: Vec<_> = batch.iter().map(|(frame, n)| (frame.slot(), *n)).collect();
        let packets: Vec<_> = batch.iter().map(|(frame, _)| frame.to_vec()).collect();
        let mut entered = slots.len();
        if as_batch {
            let mut rest = batch.into_iter();
            let result = match skip {
                true => ring.submit_writes_skip_success(rest.by_ref()),
                false => ring.submit_writes(rest.by_ref()),
            };
            let left = rest.len();
            self.held.extend(rest.map(|(frame, _)| frame));
            entered = match result {
                Ok(accepted) => accepted,
                Err(refused) => {
                    let at = refused.accepted;
                    assert_eq!(refused.frame.slot(), slots[at].0);
                    self.expect(end, Some(refused.kind), closed, self.too_big(&packets[at]));
                    self.held.push(refused.frame);
                    at
                }
            };
            self.accepted(end, &slots, entered, left, Kind::Write, closed);
        } else if let Some((frame, number)) = batch.pop() {
            let slot = frame.slot();
            let foreseen = self.too_big(&packets[0]).or(self.refusal(end, 1));
            let answer = match skip {
                true => ring.submit_write_skip_success(frame, number),
                false => ring.submit_write(frame, number),
            };
            let answer = answer.map_err(|refused| {
                assert_eq!(refused.frame.slot(), slot, "the refused frame comes back");
                assert_eq!(*refused.frame, *packets[0], "with its packet");
                self.held.push(refused.frame);
                refused.kind
            });
            self.expect(end, answer.err(), closed, foreseen);
            if answer.is_ok() {
                self.entered(end, number, Kind::Write, Some(slot), 0);
            } else {
                entered = 0;
            }
        }
        for ((_, number), bytes) in slots.into_iter().zip(packets).take(entered) {
            let end = &mut self.ends[end];
            let entry = end.flight.get_mut(&number).expect("just entered");
            (entry.sent, entry.skip) = (end.sent.len(), skip);
            end.sent.push(Sent { bytes, failed: false, received: false });
        }
        let credits = ring.split().0.write_credits() as usize;
        let me = &self.ends[end];
        let least = (self.depths[1] + me.skipped).saturating_sub(me.count[1]);
        let more = if self.threads { me.skipping() - me.skipped } else { 0 };
        assert!((least..=least + more).contains(&credits), "{credits} write credits");
        self.ends[end].ring = Some(ring);
    }

    fn too_big(&self, packet: &[u8]) -> Option<SubmitErrorKind> {
        let (len, max) = (packet.len(), self.max);
        (len > max).then_some(SubmitErrorKind::TooBig { len, max })
    }

    /// Makes the frame a packet from this end to the other. It carries a number if it is long
    /// enough.
    fn fill(&mut self, end: usize, frame: &mut Frame, size: Size) {
        // The longest packets of the embedded network have a VLAN tag, and these have none.
        let longest = self.max - if self.setup.embedded { 4 } else { 0 };
        let len = match size {
            Size::Empty => 0,
            Size::Runt => 13,
            Size::Some(n) => usize::from(n).min(longest),
            Size::Max => longest,
            Size::TooBig => self.max + 1,
            Size::AsItIs => frame.len(),
        };
        if !matches!(size, Size::AsItIs) {
            frame.reset();
            frame.set_len(len).expect("the pool has room for it");
        }
        let other = &self.ends[(end + 1) % self.ends.len()];
        let mut packet = [0x5a; NUMBERED];
        packet[..6].copy_from_slice(other.interface.mac().as_bytes());
        packet[6..12].copy_from_slice(self.ends[end].interface.mac().as_bytes());
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        packet[14..].copy_from_slice(&self.next.to_be_bytes());
        frame.fill(self.next as u8);
        let n = frame.len().min(NUMBERED);
        frame[..n].copy_from_slice(&packet[..n]);
    }

    fn foreign(&mut self, end: usize, read: bool) {
        let foreseen = self.refusal(end, usize::from(!read));
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        let closed = ring.control().closed();
        let frame = self.stranger.alloc().expect("the stranger's only frame is home");
        let result = if read { ring.submit_read(frame, 0) } else { ring.submit_write(frame, 0) };
        let refused = result.expect_err("a stranger's frame");
        let foreseen = foreseen.or(Some(SubmitErrorKind::ForeignPool));
        self.expect(end, Some(refused.kind), closed, foreseen);
        assert!(self.stranger.owns(&refused.frame));
        self.ends[end].ring = Some(ring);
    }

    fn cancel(&mut self, end: usize, target: u8, to_the_end: bool) {
        let candidates: Vec<_> = self.ends[end].flight.keys().copied().collect();
        // Sometimes the target is a number that no entry has.
        let target = candidates.get(usize::from(target) % (candidates.len() + 1)).copied();
        let target = target.unwrap_or(u64::MAX);
        // Nobody says whether a write that skips success has ended.
        let skips = self.ends[end].flight.get(&target).is_some_and(|entry| entry.skip);
        if !self.submit_cancel(end, Some(target)) || !to_the_end || skips {
            return;
        }
        let start = Instant::now();
        while self.ends[end].flight.contains_key(&target) {
            assert!(start.elapsed() < LONG, "{target} was cancelled and never completed");
            self.wait(end, 1, 1);
            self.reap(end, usize::MAX);
        }
    }

    fn cancel_all(&mut self, end: usize) {
        self.submit_cancel(end, None);
    }

    fn submit_cancel(&mut self, end: usize, target: Option<u64>) -> bool {
        let Some(mut ring) = self.ends[end].ring.take() else { return false };
        let closed = ring.control().closed();
        let number = self.number();
        let foreseen = self.refusal(end, 2);
        let answer = match target {
            Some(target) => ring.cancel(target, number),
            None => ring.cancel_all(number),
        };
        self.ends[end].ring = Some(ring);
        self.expect(end, answer.err(), closed, foreseen);
        if answer.is_ok() {
            for (number, entry) in &mut self.ends[end].flight {
                entry.cancelled |= target.is_none_or(|target| target == *number);
            }
            self.entered(end, number, Kind::Cancel, None, 0);
        }
        answer.is_ok()
    }

    /// Takes up to `n` completions.
    fn reap(&mut self, end: usize, n: usize) {
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        self.turned(end);
        let batch = ring.reap();
        let waiting = batch.len();
        let done: Vec<_> = batch.take(n).collect();
        assert_eq!(done.len(), waiting.min(n));
        self.look_for_restart(end, &ring);
        self.ends[end].ring = Some(ring);
        for done in done {
            self.completed(end, done);
        }
    }

    /// Takes up to `n` completions of `kind`, and leaves the others.
    fn reap_if(&mut self, end: usize, kind: Kind, n: usize) {
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        self.turned(end);
        let mut seen = 0;
        let batch = ring.reap_if(|next| {
            seen += usize::from(next.op == kind);
            next.op == kind
        });
        let done: Vec<_> = batch.take(n).collect();
        assert_eq!(done.len(), seen.min(n));
        assert!(done.iter().all(|done| done.op == kind), "{done:?}");
        self.look_for_restart(end, &ring);
        self.ends[end].ring = Some(ring);
        for done in done {
            self.completed(end, done);
        }
    }

    /// Looks at the next completion, and takes it or leaves it.
    fn peek(&mut self, end: usize, take: bool) {
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        self.turned(end);
        let taken = ring.peek().and_then(|next| {
            let seen = (next.user_data, next.op, next.result);
            let flight = &self.ends[end].flight;
            assert_eq!(flight.get(&next.user_data).map(|it| it.kind), Some(next.op), "{next:?}");
            take.then(|| {
                let done = next.take();
                assert_eq!((done.user_data, done.op, done.result), seen);
                done
            })
        });
        self.look_for_restart(end, &ring);
        self.ends[end].ring = Some(ring);
        if let Some(done) = taken {
            self.completed(end, done);
        }
    }

    /// If the ring is inline, the engine has now taken all submissions and seen all requests.
    fn turned(&mut self, end: usize) {
        self.ends[end].in_sq = 0;
        self.ends[end].cancel_pending &= self.threads;
    }

    fn look_for_restart(&mut self, end: usize, ring: &Ring) {
        let restarts = ring.stats().restarts;
        let end = &mut self.ends[end];
        if restarts != end.restarts {
            end.restarts = restarts;
            end.restart_pending = false;
        }
    }

    fn completed(&mut self, end: usize, done: Completion) {
        let (number, kind) = (done.user_data, done.op);
        let entry = self.ends[end].flight.remove(&number);
        let entry = entry.unwrap_or_else(|| panic!("{done:?}: nobody is waiting for that"));
        assert_eq!(entry.kind, kind, "{done:?}");
        self.ends[end].count[kind as usize] -= 1;
        let (_, result, frame) = done.into_parts();
        let Some(frame) = frame else {
            assert_eq!(kind, Kind::Cancel, "the frame comes back, also on an error");
            assert!(result.is_ok_and(|found| found <= self.depths[0] + self.depths[1]));
            return;
        };
        assert_eq!(Some(frame.slot()), entry.slot, "the frame is the one submitted");
        assert!(self.pool.owns(&frame));
        if kind == Kind::Write {
            let sent = &mut self.ends[end].sent[entry.sent];
            assert_eq!(*frame, *sent.bytes, "a write does not change its packet");
            sent.failed = matches!(result, Err(EntryError::Cancelled | EntryError::Device(_)));
        }
        match result {
            Ok(len) => {
                assert!(!entry.skip, "a success that is to be skipped is completed");
                assert_eq!(len, frame.len());
                let last = &mut self.ends[end].last_ok[kind as usize];
                if self.setup.in_order() {
                    assert!(last.is_none_or(|last| last < number), "{kind:?} {number} is late");
                }
                *last = Some(number);
            }
            Err(error) => self.explain(end, &entry, error, frame.len()),
        }
        self.count(end, kind, result);
        if kind == Kind::Read && result.is_ok() {
            self.received(end, &frame);
        }
        self.held.push(frame);
    }

    /// Checks that something explains the error.
    fn explain(&self, end: usize, entry: &Entry, error: EntryError, len: usize) {
        let write = entry.kind == Kind::Write;
        let setup = self.setup;
        let why = match error {
            EntryError::Cancelled => entry.cancelled,
            EntryError::DevicePanicked => matches!(setup.fate, Fate::PanicsAfter(_)),
            // After a panic, the completion engine's thread may drop its slots before or after the
            // close.
            EntryError::Abandoned => {
                write && !setup.abandon.is_multiple_of(101)
                    || setup.has_engine() && matches!(setup.fate, Fate::PanicsAfter(_))
            }
            EntryError::Device(FATAL) => matches!(setup.fate, Fate::FailsAfter(_)),
            EntryError::Device(REFUSAL) => write && !setup.errors.is_multiple_of(101),
            EntryError::Device(Status::InvalidArgument) => write && setup.embedded && len < 14,
            // The reason is injected exhaustion, a short batch, or a loopback that nobody reads.
            EntryError::Device(Status::BufferExhausted) => write,
            _ => false,
        };
        let closed = self.ends[end].ring.as_ref().and_then(|ring| ring.control().closed());
        assert!(why, "{error} of {entry:?}, {len} bytes, closed: {closed:?}");
    }

    fn count(&mut self, end: usize, kind: Kind, result: Result<usize, EntryError>) {
        let seen = &mut self.ends[end].seen;
        match (result, kind) {
            (Ok(len), Kind::Read) => {
                seen.rx_packets += 1;
                seen.rx_bytes += len as u64;
            }
            (Ok(len), _) => {
                seen.tx_packets += 1;
                seen.tx_bytes += len as u64;
            }
            (Err(EntryError::Cancelled), _) => seen.cancelled += 1,
            (Err(EntryError::Device(Status::BufferExhausted)), _) => seen.exhausted += 1,
            (Err(EntryError::Device(_)), _) => seen.errors += 1,
            (Err(EntryError::Abandoned | EntryError::DevicePanicked), _) => seen.abandoned += 1,
            (Err(error), _) => panic!("an error that no test expects: {error}"),
        }
    }

    /// A packet arrived. The other end must have sent it, it must be new, and if the device keeps
    /// the order, it must come after all packets seen so far.
    fn received(&mut self, end: usize, packet: &[u8]) {
        let corrupt = !self.setup.corruption.is_multiple_of(101);
        let from = (end + 1) % self.ends.len();
        let cursor = if self.setup.in_order() { self.ends[end].cursor } else { 0 };
        let found = self.ends[from].sent.iter_mut().enumerate().skip(cursor).find(|(_, sent)| {
            let free = !sent.received && !sent.failed;
            free && sent.bytes.len() == packet.len()
                && flipped_bits(&sent.bytes, packet) <= u32::from(corrupt)
        });
        let Some((i, sent)) = found else {
            panic!("a packet of {} bytes that nobody sent, or too late: {packet:?}", packet.len());
        };
        sent.received = true;
        self.ends[end].cursor = i + 1;
    }

    fn wait(&mut self, end: usize, min: usize, ms: u8) {
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        let timeout = Duration::from_micros(u64::from(ms % 4) * 400);
        let start = Instant::now();
        let waiting = ring.wait(min % 8, Some(timeout));
        assert!(start.elapsed() < LONG, "a wait of {timeout:?} hung");
        assert!(waiting <= self.ends[end].flight.len());
        self.turned(end);
        self.look_for_restart(end, &ring);
        self.ends[end].ring = Some(ring);
    }

    fn cancel_and_wait(&mut self, end: usize) {
        self.ends[end].allow_cancels();
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        let waiting = ring.cancel_and_wait(LONG).expect("the device lets go");
        assert_eq!(waiting, ring.in_flight());
        self.ends[end].ring = Some(ring);
        self.ends[end].cancel_pending = false;
        self.reap(end, usize::MAX);
        self.settle(end);
        assert!(self.ends[end].flight.is_empty(), "a quiet ring has nothing in flight");
    }

    fn restart(&mut self, end: usize) {
        let me = &mut self.ends[end];
        me.allow_cancels();
        me.lossy = true;
        me.restart_pending = true;
        let patience = if self.threads { LONG } else { Duration::ZERO };
        match me.interface.restart(patience) {
            Ok(()) | Err(Error::StopTimeout { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn close(&mut self, end: usize) {
        self.ends[end].allow_cancels();
        self.ends[end].lossy = true;
        let Some(mut ring) = self.ends[end].ring.take() else { return };
        match ring.close() {
            Ok(()) => {}
            // If the fault device panics, the slots on its thread may come back too late to be
            // counted.
            Err(Error::Leaked { .. })
                if self.setup.has_engine() && matches!(self.setup.fate, Fate::PanicsAfter(_)) => {}
            Err(error) => panic!("{error}"),
        }
        let start = Instant::now();
        self.ends[end].ring = Some(ring);
        loop {
            self.reap(end, usize::MAX);
            let panics = matches!(self.setup.fate, Fate::PanicsAfter(_));
            // After a panic, what is lost counts as in flight no more.
            let me = &mut self.ends[end];
            let sent = me.ring.as_ref().expect("just put there").stats().tx_packets;
            if !panics {
                self.settle(end);
            } else if sent == me.seen.tx_packets + me.skipping() as u64 {
                me.all_skipped();
            }
            if self.ends[end].flight.is_empty() {
                break;
            }
            assert!(panics, "close() left {:?} in flight", self.ends[end].flight);
            assert!(start.elapsed() < LONG, "never: {:?}", self.ends[end].flight);
            std::thread::sleep(Duration::from_micros(100));
        }
        let me = &self.ends[end];
        let stats = me.ring.as_ref().expect("just put there").stats();
        let counted = Seen {
            rx_packets: stats.rx_packets,
            rx_bytes: stats.rx_bytes,
            tx_packets: stats.tx_packets,
            tx_bytes: stats.tx_bytes,
            cancelled: stats.cancelled,
            errors: stats.errors,
            exhausted: stats.exhausted,
            abandoned: stats.abandoned,
        };
        assert_eq!(counted, me.seen, "the ring's counters");
    }

    /// A new ring on the same interface and pool.
    fn rebuild(&mut self, end: usize) {
        self.close(end);
        let me = &mut self.ends[end];
        me.ring = None;
        me.last_ok = [None; 2];
        me.seen = Seen::default();
        me.restarts = 0;
        // A restart that was requested while the ring closed has happened by now.
        me.restart_pending = false;
        me.cancel_pending = false;
        let interface = &self.ends[end].interface;
        if matches!(self.setup.fate, Fate::PanicsAfter(_)) {
            // A restart repairs the device after its panic.
            interface.restart(LONG).expect("no ring is left");
        }
        let ring = self.build(interface);
        self.ends[end].ring = Some(ring);
    }

    fn finish(mut self) {
        if self.setup.lives() && !self.ends.iter().any(|end| end.lossy) {
            self.drain();
        }
        for end in 0..self.ends.len() {
            self.close(end);
            self.check();
        }
        for sent in self.ends.iter().flat_map(|end| &end.sent) {
            // Short packets and packets with flipped bits can be mistaken for others.
            let known = sent.bytes.len() >= NUMBERED && self.setup.corruption.is_multiple_of(101);
            assert!(!(known && sent.failed && sent.received), "refused and yet sent");
        }
        self.held.clear();
        self.ends.clear();
        let start = Instant::now();
        while self.pool.slots_out() > 0 {
            assert!(start.elapsed() < LONG, "slots that did not come home");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// If nothing was closed, every packet that the device took must arrive.
    fn drain(&mut self) {
        let start = Instant::now();
        loop {
            for end in 0..self.ends.len() {
                self.reap(end, usize::MAX);
                self.check();
            }
            let owed: Vec<_> = (0..self.ends.len()).map(|end| self.owed(end)).collect();
            let writes: usize = self.ends.iter().map(|end| end.count[1] - end.skipped).sum();
            if writes == 0 && owed.iter().all(|packets| *packets == 0) {
                return;
            }
            assert!(
                start.elapsed() < LONG,
                "{owed:?} packets are missing: {:?}, {:?}",
                self.flights(),
                self.ends.iter().map(End::counters).collect::<Vec<_>>()
            );
            for (end, owed) in owed.into_iter().enumerate() {
                if owed > 0 && self.ends[end].count[0] == 0 {
                    self.read(end, 0);
                }
                if owed > 0 && self.ends[end].count[0] == 0 {
                    // The other end holds all frames, so take its posted reads back.
                    self.cancel_and_wait((end + 1) % self.ends.len());
                }
                self.wait(end, 1, 1);
            }
        }
    }

    /// How many packets the other end has sent that this end has not received.
    fn owed(&self, end: usize) -> u64 {
        let from = &self.ends[(end + 1) % self.ends.len()];
        // A packet may arrive before its write completes.
        from.seen.tx_packets.saturating_sub(self.ends[end].seen.rx_packets)
    }

    fn flights(&self) -> Vec<Vec<(&u64, &Entry)>> {
        self.ends.iter().map(|end| end.flight.iter().collect()).collect()
    }
}

impl End {
    /// The counters of the device and the ring, for messages.
    fn counters(&self) -> String {
        let stats = self.ring.as_ref().map(Ring::stats);
        format!("{:?}, {stats:?}", self.interface.drops())
    }

    /// How many writes in flight skip their success, as far as the model knows.
    fn skipping(&self) -> usize {
        self.flight.values().filter(|entry| entry.skip).count()
    }

    /// All of them have succeeded.
    fn all_skipped(&mut self) {
        let Self { flight, seen, sent, count, .. } = self;
        flight.retain(|_, entry| {
            if entry.skip {
                seen.tx_packets += 1;
                seen.tx_bytes += sent[entry.sent].bytes.len() as u64;
                count[1] -= 1;
            }
            !entry.skip
        });
        self.skipped = 0;
    }

    fn allow_cancels(&mut self) {
        for entry in self.flight.values_mut() {
            entry.cancelled = true;
        }
    }
}

fn flipped_bits(a: &[u8], b: &[u8]) -> u32 {
    a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum()
}

#[cfg(test)]
mod properties {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::test_runner::{Config, FileFailurePersistence};

    use super::*;
    use crate::support::{guarded, stage};

    fn config() -> Config {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/model.txt");
        Config {
            failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
            ..Config::default()
        }
    }

    /// Mostly zero, so that a case has one or two kinds of misbehaviour.
    fn percent() -> impl Strategy<Value = u8> {
        prop_oneof![3 => Just(0), 1 => 1_u8..60]
    }

    fn setup() -> impl Strategy<Value = Setup> {
        let faults = (percent(), percent(), percent(), percent(), percent(), percent(), percent());
        let engine = (prop_oneof![3 => Just(0), 1 => 1_u8..200], any::<bool>(), percent());
        let fate = prop_oneof![
            6 => Just(Fate::Lives),
            1 => (0_u8..40).prop_map(Fate::FailsAfter),
            1 => (0_u8..40).prop_map(Fate::PanicsAfter),
        ];
        let sizes = (any::<[u8; 3]>(), proptest::option::of(0_u8..5), any::<u8>(), 0_u8..40);
        (any::<bool>(), any::<u64>(), faults, engine, fate, sizes).prop_map(
            |(embedded, seed, faults, (hold_us, reorder, shy), fate, sizes)| {
                let (short, exhaustion, errors, abandon, corruption, twice, late) = faults;
                let (depths, sq_depth, frames, before_wrap) = sizes;
                Setup {
                    embedded,
                    seed,
                    short,
                    exhaustion,
                    errors,
                    abandon,
                    corruption,
                    twice,
                    late,
                    shy,
                    hold_us,
                    reorder,
                    fate,
                    depths,
                    sq_depth,
                    frames,
                    before_wrap,
                }
            },
        )
    }

    fn size() -> impl Strategy<Value = Size> {
        prop_oneof![
            1 => Just(Size::Empty),
            1 => Just(Size::Runt),
            8 => any::<u8>().prop_map(Size::Some),
            2 => Just(Size::Max),
            1 => Just(Size::TooBig),
            2 => Just(Size::AsItIs),
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        let end = any::<bool>;
        let n = any::<u8>;
        let twos = || (any::<bool>(), any::<u8>());
        prop_oneof![
            8 => twos().prop_map(|(end, n)| Step::Read { end, n }),
            8 => (end(), size(), end())
                .prop_map(|(end, size, skip)| Step::Write { end, size, skip }),
            3 => (end(), [size(), size(), size()], end())
                .prop_map(|(end, sizes, skip)| Step::Writes { end, sizes, skip }),
            1 => (end(), end()).prop_map(|(end, read)| Step::Foreign { end, read }),
            3 => (end(), n(), any::<bool>())
                .prop_map(|(end, target, to_the_end)| Step::Cancel { end, target, to_the_end }),
            1 => end().prop_map(|end| Step::CancelAll { end }),
            8 => twos().prop_map(|(end, n)| Step::Reap { end, n }),
            4 => (any::<bool>(), any::<bool>(), 0..40_u8)
                .prop_map(|(end, write, n)| Step::ReapIf { end, write, n }),
            3 => any::<(bool, bool)>().prop_map(|(end, take)| Step::Peek { end, take }),
            3 => (end(), n(), n()).prop_map(|(end, min, ms)| Step::Wait { end, min, ms }),
            2 => n().prop_map(|n| Step::Take { n }),
            3 => n().prop_map(|frame| Step::Drop { frame }),
            2 => (n(), end(), n()).prop_map(|(frame, front, n)| Step::Trim { frame, front, n }),
            2 => (n(), n()).prop_map(|(frame, n)| Step::Grow { frame, n }),
            1 => end().prop_map(|end| Step::Quiesce { end }),
            1 => end().prop_map(|end| Step::ControlCancel { end }),
            1 => end().prop_map(|end| Step::ControlWake { end }),
        ]
    }

    /// Like `step`, and also the steps after which packets may be lost.
    fn rough_step() -> impl Strategy<Value = Step> {
        let end = any::<bool>;
        prop_oneof![
            40 => step(),
            1 => end().prop_map(|end| Step::Restart { end }),
            1 => end().prop_map(|end| Step::ControlStop { end }),
            1 => end().prop_map(|end| Step::Close { end }),
            1 => end().prop_map(|end| Step::Rebuild { end }),
        ]
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        prop_oneof![vec(step(), 1..100), vec(rough_step(), 1..100)]
    }

    proptest! {
        #![proptest_config(config())]

        #[test]
        fn a_ring_keeps_its_contracts_when_its_owner_drives_it(setup in setup(), steps in steps()) {
            guarded(move || {
                stage(format!("{setup:?}\n{steps:?}"));
                run(&setup, false, &steps);
            });
        }

        #[test]
        fn a_ring_keeps_its_contracts_on_a_poller_thread(setup in setup(), steps in steps()) {
            guarded(move || {
                stage(format!("{setup:?}\n{steps:?}"));
                run(&setup, true, &steps);
            });
        }
    }
}
