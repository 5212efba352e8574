//! What the tests share: a watchdog, numbered packets, and a device that is made of closures.

use std::cell::RefCell;
use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::{Capabilities, Device, PollContext, Progress, Queue, QueueConfig, Wake};
use vmring::{
    Direction, Drive, Driver, Embedded, Error, Frame, Interface, InterfaceConfig, InterfaceInfo,
    Loopback, MacAddr6, Poller, Ring, RingBuilder, RingOp, Status,
};

/// Far longer than any test needs on a slow and busy machine. A test that reaches this hangs.
pub(crate) const LONG: Duration = Duration::from_secs(60);

thread_local! {
    static STAGE: RefCell<Option<Arc<Mutex<String>>>> = const { RefCell::new(None) };
}

/// The device of an embedded network on which nobody but the test sends. With the feature `nat` a network
/// has a way out, and with it IPv6; its gateway would send router advertisements that nobody has asked
/// for, and a test that counts packets would find more.
pub(crate) fn quiet_network(name: impl Into<String>) -> Embedded {
    Embedded::network(name).no_ipv6()
}

/// This program, under the emulator that cargo runs it with, if there is one.
pub(crate) fn myself() -> Command {
    let program = env::current_exe().expect("this program's path");
    let is_runner = |name: &OsString| {
        let name = name.to_string_lossy();
        name.starts_with(&format!("CARGO_TARGET_{}_", env::consts::ARCH.to_uppercase()))
            && name.ends_with("_RUNNER")
    };
    let runner = env::vars_os().find(|(name, _)| is_runner(name));
    let Some((_, runner)) = runner else { return Command::new(program) };
    let runner = runner.into_string().expect("a runner's command line");
    let mut words = runner.split_whitespace();
    let mut command = Command::new(words.next().expect("a runner"));
    command.args(words).arg(program);
    command
}

/// Names what a [`guarded`] body is doing, for the message if it does not end.
pub(crate) fn stage(name: impl Into<String>) {
    STAGE.with_borrow(|stage| {
        if let Some(stage) = stage {
            *stage.lock().unwrap_or_else(PoisonError::into_inner) = name.into();
        }
    });
}

/// Runs `body` on a thread of its own. If it does not end, panics with the [`stage`] it is in
/// instead of hanging the whole run.
pub(crate) fn guarded(body: impl FnOnce() + Send + 'static) {
    guarded_for(LONG * 2, body);
}

/// Like [`guarded`], for a body that takes longer than others.
pub(crate) fn guarded_for(limit: Duration, body: impl FnOnce() + Send + 'static) {
    let reached = Arc::new(Mutex::new("the beginning".to_owned()));
    let (ended, ending) = mpsc::sync_channel::<()>(1);
    let test = thread::current().name().unwrap_or("test").to_owned();
    let thread = thread::Builder::new()
        .name(test)
        .spawn({
            let reached = reached.clone();
            move || {
                STAGE.set(Some(reached));
                body();
                drop(ended);
            }
        })
        .expect("a thread for the test's body");
    // The sender is dropped when the body returns or panics.
    if ending.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
        let reached = reached.lock().unwrap_or_else(PoisonError::into_inner).clone();
        panic!("it does not end; it hangs in: {reached}");
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Says that the test of this thread is skipped, and why. Writes to stderr directly, because the test
/// harness captures `eprintln!`.
pub(crate) fn skip(why: &str) {
    let name = thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
}

/// `n`, or a tenth of it if everything is slow (`VMRING_TEST_SCALE=small`: sanitizers, emulators).
pub(crate) fn scaled(n: u64) -> u64 {
    if std::env::var_os("VMRING_TEST_SCALE").is_some_and(|scale| scale == "small") {
        (n / 10).max(1)
    } else {
        n
    }
}

/// A name that no other test uses.
pub(crate) fn unique(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Calls `done` until it returns true.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    stage(what);
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "it never happened: {what}");
        thread::sleep(Duration::from_micros(500));
    }
}

/// The three ways to drive a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Thread,
    Shared,
    Inline,
}

impl Way {
    pub(crate) const ALL: [Way; 3] = [Way::Thread, Way::Shared, Way::Inline];

    pub(crate) fn drive(self, poller: &Poller) -> Drive<'_> {
        match self {
            Way::Thread => Drive::Thread,
            Way::Shared => Drive::Shared(poller),
            Way::Inline => Drive::Inline,
        }
    }
}

/// Runs `body` once for each way to drive a ring.
pub(crate) fn every_way(mut body: impl FnMut(Way, &Poller)) {
    let poller = Poller::start().expect("a poller");
    for way in Way::ALL {
        stage(format!("{way:?}"));
        body(way, &poller);
    }
}

/// A small pseudo-random generator (xorshift64*), so that a failure can be repeated.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

pub(crate) fn loopback() -> Interface {
    Interface::builder().device(Loopback::new(1500)).start().expect("a loopback starts")
}

/// A ring whose engine runs only when the test drives it.
pub(crate) fn inline(interface: &Interface, direction: Direction) -> RingBuilder<'_> {
    interface.ring(direction).drive(Drive::Inline)
}

/// The bytes of packet `number`, `len` (at least 14) long.
pub(crate) fn packet(number: u64, len: usize) -> Vec<u8> {
    packet_between([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], number, len)
}

/// Like [`packet`], with the addresses of two interfaces.
pub(crate) fn packet_between(from: [u8; 6], to: [u8; 6], number: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    bytes.extend(to);
    bytes.extend(from);
    bytes.extend([0x88, 0xb5]);
    bytes.extend(number.to_be_bytes());
    // The pattern depends on the number, so that bytes of another packet are noticed.
    bytes.extend((bytes.len()..len.max(22)).map(|i| (i as u64 ^ number.wrapping_mul(31)) as u8));
    bytes.truncate(len);
    bytes
}

/// The number of a [`packet`] of at least 22 bytes.
pub(crate) fn number_of(packet: &[u8]) -> u64 {
    u64::from_be_bytes(packet[14..22].try_into().expect("22 bytes"))
}

/// A frame of the ring's own pool with packet `number`.
pub(crate) fn filled(ring: &Ring, number: u64) -> Frame {
    let mut frame = ring.alloc().expect("a free frame");
    frame.copy_from(&packet(number, 60)).expect("60 bytes fit");
    frame
}

/// Submits packet `number`, with the number as `user_data`.
pub(crate) fn send(ring: &mut Ring, number: u64) {
    let frame = filled(ring, number);
    ring.submit_write(frame, number).expect("there are credits");
}

/// Posts a read.
pub(crate) fn post(ring: &mut Ring, user_data: u64) {
    let frame = ring.alloc().expect("a free frame");
    ring.submit_read(frame, user_data).expect("there are credits");
}

/// The parts of a completion.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) user_data: u64,
    pub(crate) op: RingOp,
    pub(crate) result: Result<usize, vmring::EntryError>,
    pub(crate) frame: Option<Frame>,
}

impl Seen {
    /// The completion without its frame, for comparing.
    pub(crate) fn brief(&self) -> (RingOp, u64, Result<usize, vmring::EntryError>) {
        (self.op, self.user_data, self.result)
    }
}

/// Reaps all completions that are there now.
pub(crate) fn reap(ring: &mut Ring) -> Vec<Seen> {
    ring.reap().map(seen).collect()
}

fn seen(done: vmring::Completion) -> Seen {
    let op = done.op;
    let (user_data, result, frame) = done.into_parts();
    Seen { user_data, op, result, frame }
}

/// Waits for `n` completions and takes exactly those.
pub(crate) fn reap_n(ring: &mut Ring, n: usize) -> Vec<Seen> {
    let mut all = Vec::new();
    let start = Instant::now();
    while all.len() < n {
        let left = n - all.len();
        ring.wait(left, Some(LONG));
        all.extend(ring.reap().take(left).map(seen));
        assert!(start.elapsed() < LONG, "{} of {n} completions came: {all:?}", all.len());
    }
    all
}

/// Drives an inline ring until it makes no more progress, without reaping.
pub(crate) fn drive_to_rest(ring: &mut Ring) {
    for _ in 0..8 {
        let _ = ring.reap().len();
    }
}

type PollFn = dyn FnMut(&mut PollContext<'_>) -> Result<Progress, Status> + Send;
type CancelFn = dyn FnMut(Option<u64>) -> u32 + Send;
type CloseFn = dyn FnMut(&mut PollContext<'_>) -> bool + Send;

/// A third-party queue that is made of closures.
pub(crate) struct ScriptQueue {
    poll: Box<PollFn>,
    cancel: Box<CancelFn>,
    close: Box<CloseFn>,
    cancel_reads: Option<Box<dyn FnMut() -> u32 + Send>>,
    bind: Box<dyn FnMut() + Send>,
    arm: Box<dyn FnMut() -> bool + Send>,
    deadline: Box<dyn Fn() -> Option<Instant> + Send>,
    descriptor: Option<OwnedFd>,
    asked: Box<dyn Fn() + Send>,
}

impl ScriptQueue {
    pub(crate) fn new(
        poll: impl FnMut(&mut PollContext<'_>) -> Result<Progress, Status> + Send + 'static,
    ) -> Self {
        Self {
            poll: Box::new(poll),
            cancel: Box::new(|_| 0),
            close: Box::new(|_| true),
            cancel_reads: None,
            bind: Box::new(|| ()),
            arm: Box::new(|| true),
            deadline: Box::new(|| None),
            descriptor: None,
            asked: Box::new(|| ()),
        }
    }

    /// The poller sleeps on this descriptor. Each time it asks for the descriptor, `asked` is
    /// called.
    pub(crate) fn descriptor(
        mut self,
        descriptor: OwnedFd,
        asked: impl Fn() + Send + 'static,
    ) -> Self {
        (self.descriptor, self.asked) = (Some(descriptor), Box::new(asked));
        self
    }

    pub(crate) fn on_cancel(mut self, f: impl FnMut(Option<u64>) -> u32 + Send + 'static) -> Self {
        self.cancel = Box::new(f);
        self
    }

    pub(crate) fn on_cancel_reads(mut self, f: impl FnMut() -> u32 + Send + 'static) -> Self {
        self.cancel_reads = Some(Box::new(f));
        self
    }

    pub(crate) fn on_close(
        mut self,
        f: impl FnMut(&mut PollContext<'_>) -> bool + Send + 'static,
    ) -> Self {
        self.close = Box::new(f);
        self
    }

    pub(crate) fn on_arm(mut self, f: impl FnMut() -> bool + Send + 'static) -> Self {
        self.arm = Box::new(f);
        self
    }

    pub(crate) fn on_deadline(mut self, f: impl Fn() -> Option<Instant> + Send + 'static) -> Self {
        self.deadline = Box::new(f);
        self
    }

    pub(crate) fn on_bind(mut self, f: impl FnMut() + Send + 'static) -> Self {
        self.bind = Box::new(f);
        self
    }
}

impl Queue for ScriptQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        (self.poll)(cx)
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        (self.cancel)(target)
    }

    fn cancel_reads(&mut self) -> u32 {
        match &mut self.cancel_reads {
            Some(cancel_reads) => cancel_reads(),
            None => self.cancel(None),
        }
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        (self.close)(cx)
    }

    fn bind_to_thread(&mut self) {
        (self.bind)();
    }

    fn arm(&mut self) -> bool {
        (self.arm)()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        (self.asked)();
        self.descriptor.as_ref().map(|descriptor| descriptor.as_fd())
    }

    fn deadline(&self) -> Option<Instant> {
        (self.deadline)()
    }
}

type QueueFn = dyn Fn(Direction, Wake) -> Result<ScriptQueue, Error> + Send + Sync;

/// A third-party device. It is its own driver.
pub(crate) struct Script {
    queue: Box<QueueFn>,
    limits: Box<dyn Fn(&mut Capabilities) + Send + Sync>,
    info: Option<InterfaceInfo>,
    stopped: Arc<AtomicU64>,
    stop: Box<dyn Fn() + Send + Sync>,
    restart: Box<dyn Fn() + Send + Sync>,
}

impl Script {
    pub(crate) fn new(
        queue: impl Fn(Direction, Wake) -> ScriptQueue + Send + Sync + 'static,
    ) -> Self {
        Self::fallible(move |direction, wake| Ok(queue(direction, wake)))
    }

    pub(crate) fn fallible(
        queue: impl Fn(Direction, Wake) -> Result<ScriptQueue, Error> + Send + Sync + 'static,
    ) -> Self {
        let limits = |caps: &mut Capabilities| {
            caps.reading_rings = usize::MAX;
            caps.writing_rings = usize::MAX;
        };
        Self {
            queue: Box::new(queue),
            limits: Box::new(limits),
            info: None,
            stopped: Arc::default(),
            stop: Box::new(|| ()),
            restart: Box::new(|| ()),
        }
    }

    /// Sets what a stop does.
    pub(crate) fn on_stop(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.stop = Box::new(f);
        self
    }

    /// Sets what a restart does.
    pub(crate) fn on_restart(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.restart = Box::new(f);
        self
    }

    /// Changes the capabilities.
    pub(crate) fn limits(
        mut self,
        limits: impl Fn(&mut Capabilities) + Send + Sync + 'static,
    ) -> Self {
        self.limits = Box::new(limits);
        self
    }

    /// Counts how often the device has been stopped.
    pub(crate) fn stops(&self) -> Arc<AtomicU64> {
        self.stopped.clone()
    }

    pub(crate) fn start(self) -> Interface {
        Interface::builder().device(self).start().expect("a script starts")
    }
}

impl Driver for Script {
    fn start(mut self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, 9);
        self.info = Some(InterfaceInfo::new(config, mac, 1500, 1514));
        Ok(Arc::new(*self))
    }
}

impl Device for Script {
    fn name(&self) -> &str {
        "script"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone().expect("it has started")
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(1500, 1514);
        (self.limits)(&mut caps);
        caps
    }

    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        Ok(Box::new((self.queue)(config.direction, wake)?))
    }

    fn stop(&self) -> Result<(), Error> {
        self.stopped.fetch_add(1, Ordering::SeqCst);
        (self.stop)();
        Ok(())
    }

    fn restart(&self) -> Result<(), Error> {
        (self.restart)();
        Ok(())
    }
}

/// Completes every write with success and leaves reads posted.
pub(crate) fn take_writes(cx: &mut PollContext<'_>) {
    while let Some(slot) = cx.take_write() {
        cx.complete_write(slot);
    }
}
