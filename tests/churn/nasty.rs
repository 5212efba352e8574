//! A third-party device that does everything a device may do and should not.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::{
    Capabilities, Device, PollContext, PostedSlot, Progress, Queue, QueueConfig, Wake,
};
use vmring::{Driver, Error, InterfaceConfig, InterfaceInfo, MacAddr6, Status};

use crate::churn::{ON_PURPOSE, lock};
use crate::support::Dice;

/// What the device does. Numbers are percent unless they say otherwise.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) seed: u64,
    /// A taken slot is kept, and completed in a later poll.
    pub(crate) keep: u8,
    /// A thread of the device drops it.
    pub(crate) thread_drops: u8,
    /// A thread of the device has it for a while.
    pub(crate) thread_returns: u8,
    /// It is forgotten.
    pub(crate) forget: u8,
    /// It is refused.
    pub(crate) refuse: u8,
    /// It is put back.
    pub(crate) put_back: u8,
    /// How long a thread has it, at most.
    pub(crate) delay_us: u64,
    /// After this part of the polls a thread wakes the ring for nothing, perhaps after its close.
    pub(crate) wakes: u8,
    /// `arm` says that there is something to do, and there is not.
    pub(crate) shy: u8,
    /// A restart fails.
    pub(crate) fails_restart: u8,
    pub(crate) panics: Option<Panics>,
    pub(crate) close: Close,
    pub(crate) threads: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Panics {
    pub(crate) at: Call,
    /// In the call of that number, of one queue.
    pub(crate) call: u64,
    /// How often dropping what the panic carries panics again.
    pub(crate) bombs: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Open,
    Poll,
    Arm,
    Cancel,
    Close,
    Drop,
}

/// What the device says when it is asked to close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close {
    /// Yes, as soon as its threads have returned what they have.
    Honest,
    /// No, so many times; then it is honest.
    After(u8),
    /// Yes, although its threads still have slots. They drop them later.
    WithoutItsThreads,
    /// No.
    Never,
}

impl Script {
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        let mut rare = |most: u64| {
            if dice.below(3) == 0 { 1 + dice.below(most) as u8 } else { 0 }
        };
        let (keep, thread_drops, thread_returns) = (rare(60), rare(90), rare(60));
        let (refuse, put_back, wakes, shy) = (rare(20), rare(40), rare(50), rare(40));
        let forget = if dice.below(5) == 0 { 10 } else { 0 };
        let calls = [Call::Open, Call::Poll, Call::Arm, Call::Cancel, Call::Close, Call::Drop];
        let panics = (dice.below(4) == 0).then(|| Panics {
            at: calls[dice.below(calls.len() as u64) as usize],
            call: dice.below(12),
            bombs: dice.below(3) as u8,
        });
        let close = match dice.below(10) {
            0..5 => Close::Honest,
            5..7 => Close::After(1 + dice.below(8) as u8),
            7..9 => Close::WithoutItsThreads,
            _ => Close::Never,
        };
        Self {
            seed: dice.below(u64::MAX),
            keep,
            thread_drops,
            thread_returns,
            forget,
            refuse,
            put_back,
            delay_us: [0, 0, 200, 2000][dice.below(4) as usize],
            wakes,
            shy,
            fails_restart: if dice.below(8) == 0 { 20 } else { 0 },
            panics,
            close,
            threads: 1 + dice.below(3) as usize,
        }
    }

    /// Whether a slot may be lost for good.
    pub(crate) fn loses(&self) -> bool {
        self.forget > 0 || self.close == Close::Never
    }

    /// Whether everything has come back when a close is over.
    pub(crate) fn is_honest(&self) -> bool {
        self.panics.is_none() && self.thread_drops == 0 && self.close != Close::WithoutItsThreads
    }
}

/// What the test knows of the device from outside.
#[derive(Default)]
pub(crate) struct Inside {
    /// What its threads still have to do.
    pending: AtomicI64,
    /// The entries that were forgotten.
    forgotten: Mutex<HashSet<u64>>,
    wakes: Mutex<Wakes>,
    /// Packets to be read: as many as were written.
    packets: AtomicI64,
}

#[derive(Default)]
struct Wakes {
    /// The wakes of the queues that are there, by the queue's number.
    now: BTreeMap<u64, Wake>,
    /// The wakes of the queues that went last.
    past: VecDeque<Wake>,
}

impl Wakes {
    fn end(&mut self, queue: u64) {
        self.past.extend(self.now.remove(&queue));
        if self.past.len() > 16 {
            self.past.pop_front();
        }
    }

    fn all(&self) -> Vec<Wake> {
        self.now.values().chain(&self.past).cloned().collect()
    }
}

impl Inside {
    pub(crate) fn is_idle(&self) -> bool {
        self.pending.load(Ordering::SeqCst) == 0
    }

    pub(crate) fn has_forgotten(&self, number: u64) -> bool {
        lock(&self.forgotten).contains(&number)
    }

    /// Wakes every ring, also those that are closed.
    pub(crate) fn wake_all(&self) {
        let wakes = lock(&self.wakes).all();
        wakes.iter().for_each(Wake::wake);
    }

    fn take_packet(&self) -> bool {
        let take = |n: i64| (n > 0).then(|| n - 1);
        self.packets.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }
}

pub(crate) struct Nasty {
    pub(crate) script: Script,
    pub(crate) inside: Arc<Inside>,
    /// The beginning of its threads' names.
    pub(crate) prefix: String,
}

impl Driver for Nasty {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let Nasty { script, inside, prefix } = *self;
        let threads = (0..script.threads).map(|_| start_thread(&prefix, &inside)).collect();
        let mac = config.mac.unwrap_or(MacAddr6::new(2, 0, 0, 0, 0, 7));
        let info = InterfaceInfo::new(config, mac, 200, 214);
        Ok(Arc::new(NastyDevice { script, inside, threads, info, queues: AtomicU64::new(0) }))
    }
}

struct Job {
    at: Instant,
    work: Work,
}

enum Work {
    Drop(PostedSlot),
    Return(PostedSlot, Arc<Returned>, Wake),
    Wake(Wake),
}

/// What a queue's threads have returned; `None` when the queue is gone.
type Returned = Mutex<Option<Vec<PostedSlot>>>;

fn start_thread(prefix: &str, inside: &Arc<Inside>) -> Sender<Job> {
    let (sender, jobs) = mpsc::channel();
    let inside = inside.clone();
    let thread = thread::Builder::new().name(format!("{prefix}d"));
    thread.spawn(move || work(&jobs, &inside)).expect("a thread of the device");
    sender
}

fn work(jobs: &Receiver<Job>, inside: &Inside) {
    let mut waiting: Vec<Job> = Vec::new();
    loop {
        let next = waiting.iter().map(|job| job.at).min();
        let answer = match next {
            None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => jobs.recv_timeout(at.saturating_duration_since(Instant::now())),
        };
        match answer {
            Ok(job) => waiting.push(job),
            Err(RecvTimeoutError::Timeout) => {}
            // The device is gone. What is left is done at once.
            Err(RecvTimeoutError::Disconnected) => {
                waiting.drain(..).for_each(|job| carry_out(job.work, inside));
                return;
            }
        }
        let now = Instant::now();
        while let Some(i) = waiting.iter().position(|job| job.at <= now) {
            carry_out(waiting.swap_remove(i).work, inside);
        }
    }
}

fn carry_out(work: Work, inside: &Inside) {
    match work {
        Work::Drop(slot) => drop(slot),
        Work::Return(slot, to, wake) => {
            let refused = match &mut *lock(&to) {
                Some(returned) => {
                    returned.push(slot);
                    None
                }
                None => Some(slot),
            };
            drop(refused);
            wake.wake();
        }
        Work::Wake(wake) => wake.wake(),
    }
    inside.pending.fetch_sub(1, Ordering::SeqCst);
}

struct NastyDevice {
    script: Script,
    inside: Arc<Inside>,
    threads: Vec<Sender<Job>>,
    info: InterfaceInfo,
    /// Queues made so far.
    queues: AtomicU64,
}

impl Device for NastyDevice {
    fn name(&self) -> &str {
        "nasty"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(200, 214);
        (caps.reading_rings, caps.writing_rings) = (usize::MAX, usize::MAX);
        caps
    }

    fn queue(&self, _: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let n = self.queues.fetch_add(1, Ordering::SeqCst);
        if let Some(Panics { at: Call::Open, call, bombs }) = self.script.panics
            && call == n
        {
            explode(bombs);
        }
        lock(&self.inside.wakes).now.insert(n, wake.clone());
        Ok(Box::new(NastyQueue {
            number: n,
            dice: Dice::new(self.script.seed ^ n),
            script: self.script.clone(),
            inside: self.inside.clone(),
            threads: self.threads.clone(),
            wants_packets: false,
            wake,
            kept: Vec::new(),
            cancelled: Vec::new(),
            returned: Arc::new(Mutex::new(Some(Vec::new()))),
            out: BTreeMap::new(),
            calls: [0; 6],
        }))
    }

    fn restart(&self) -> Result<(), Error> {
        let n = self.queues.load(Ordering::SeqCst);
        if Dice::new(self.script.seed ^ n).below(100) < self.script.fails_restart.into() {
            return Err(Status::Failure.into());
        }
        Ok(())
    }
}

/// What a panic carries: dropping it panics again, so many times.
struct Bomb(u8);

impl Drop for Bomb {
    fn drop(&mut self) {
        if self.0 > 0 {
            explode(self.0 - 1);
        }
    }
}

fn explode(bombs: u8) -> ! {
    if bombs == 0 {
        panic!("the device panics {ON_PURPOSE}");
    }
    std::panic::panic_any(Bomb(bombs));
}

struct NastyQueue {
    number: u64,
    dice: Dice,
    script: Script,
    inside: Arc<Inside>,
    threads: Vec<Sender<Job>>,
    /// The last poll has left reads, or it keeps some.
    wants_packets: bool,
    wake: Wake,
    kept: Vec<PostedSlot>,
    /// To be completed as cancelled in the next poll.
    cancelled: Vec<PostedSlot>,
    returned: Arc<Returned>,
    /// The entries that its threads have and will return.
    out: BTreeMap<u64, Out>,
    calls: [u64; 6],
}

struct Out {
    is_read: bool,
    /// A cancel asks for it.
    is_cancelled: bool,
}

/// What becomes of a slot.
enum Fate {
    Complete,
    Keep,
    ThreadDrops,
    ThreadReturns,
    Forget,
    Refuse,
}

impl NastyQueue {
    fn called(&mut self, call: Call) {
        let n = self.calls[call as usize];
        self.calls[call as usize] += 1;
        if let Some(panics) = self.script.panics
            && panics.at == call
            && panics.call == n
        {
            explode(panics.bombs);
        }
    }

    fn chance(&mut self, percent: u8) -> bool {
        percent > 0 && self.dice.below(100) < percent.into()
    }

    fn fate(&mut self) -> Fate {
        let script = &self.script;
        let fates = [
            (script.keep, Fate::Keep),
            (script.thread_drops, Fate::ThreadDrops),
            (script.thread_returns, Fate::ThreadReturns),
            (script.forget, Fate::Forget),
            (script.refuse, Fate::Refuse),
        ];
        for (percent, fate) in fates {
            if self.chance(percent) {
                return fate;
            }
        }
        Fate::Complete
    }

    fn give(&mut self, work: Work) {
        let delay = Duration::from_micros(self.dice.below(self.script.delay_us + 1));
        let thread = self.dice.below(self.threads.len() as u64) as usize;
        self.inside.pending.fetch_add(1, Ordering::SeqCst);
        let job = Job { at: Instant::now() + delay, work };
        if self.threads[thread].send(job).is_err() {
            unreachable!("a thread of the device lives as long as the device");
        }
    }

    fn handle(&mut self, slot: PostedSlot, cx: &mut PollContext<'_>) {
        match self.fate() {
            Fate::Complete => self.complete(slot, cx),
            Fate::Keep => self.kept.push(slot),
            Fate::ThreadDrops => self.give(Work::Drop(slot)),
            Fate::ThreadReturns => {
                let out = Out { is_read: slot.is_read(), is_cancelled: false };
                self.out.insert(slot.user_data(), out);
                self.give(Work::Return(slot, self.returned.clone(), self.wake.clone()));
            }
            Fate::Forget => {
                lock(&self.inside.forgotten).insert(slot.user_data());
                std::mem::forget(slot);
            }
            Fate::Refuse => cx.fail(slot, Status::NotAuthorized),
        }
    }

    /// A read that finds no packet is kept.
    fn complete(&mut self, slot: PostedSlot, cx: &mut PollContext<'_>) {
        if !slot.is_read() {
            cx.complete_write(slot);
            self.inside.packets.fetch_add(1, Ordering::SeqCst);
        } else if self.inside.take_packet() {
            cx.complete_read(slot, 60);
        } else {
            self.kept.push(slot);
        }
    }

    /// The next poll completes the entries as cancelled that `is_wanted` names, by number and kind.
    fn take_back(&mut self, is_wanted: impl Fn(u64, bool) -> bool) -> u32 {
        let before = self.cancelled.len();
        let wanted = |slot: &mut PostedSlot| is_wanted(slot.user_data(), slot.is_read());
        self.cancelled.extend(self.kept.extract_if(.., wanted));
        let mut found = self.cancelled.len() - before;
        for (number, out) in &mut self.out {
            if is_wanted(*number, out.is_read) {
                out.is_cancelled = true;
                found += 1;
            }
        }
        found as u32
    }

    fn take_returned(&mut self) -> Vec<PostedSlot> {
        lock(&self.returned).as_mut().map(std::mem::take).unwrap_or_default()
    }
}

impl Queue for NastyQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        self.called(Call::Poll);
        let packets = self.inside.packets.load(Ordering::SeqCst);
        for slot in self.cancelled.drain(..) {
            cx.cancel(slot);
        }
        for slot in self.take_returned() {
            if self.out.remove(&slot.user_data()).is_some_and(|out| out.is_cancelled) {
                cx.cancel(slot);
            } else {
                self.complete(slot, cx);
            }
        }
        for slot in std::mem::take(&mut self.kept) {
            if !slot.is_read() && self.dice.below(2) == 0 {
                self.kept.push(slot);
            } else {
                self.complete(slot, cx);
            }
        }
        while let Some(slot) = cx.take_write() {
            if self.chance(self.script.put_back) {
                cx.put_back(slot);
                break;
            }
            self.handle(slot, cx);
        }
        // Now and then the reads are left for later, which is right while no packet waits.
        while self.inside.packets.load(Ordering::SeqCst) > 0 || self.dice.below(2) == 0 {
            let Some(slot) = cx.take_read() else { break };
            self.handle(slot, cx);
        }
        self.wants_packets = cx.reads() > 0 || self.kept.iter().any(PostedSlot::is_read);
        if self.kept.iter().any(|slot| !slot.is_read()) {
            // Nobody else asks it to go on.
            self.give(Work::Wake(self.wake.clone()));
        }
        if self.chance(self.script.wakes) {
            let wake = self.wake.clone();
            // Never again and again: a wake for nothing brings a poll.
            if self.dice.below(2) == 0 {
                self.give(Work::Wake(wake));
            }
        }
        if self.inside.packets.load(Ordering::SeqCst) > packets {
            self.inside.wake_all();
        }
        Ok(Progress::Idle)
    }

    fn arm(&mut self) -> bool {
        self.called(Call::Arm);
        let packet_for_us = self.wants_packets && self.inside.packets.load(Ordering::SeqCst) > 0;
        let returned = lock(&self.returned).as_ref().is_some_and(|list| !list.is_empty());
        !packet_for_us && !returned && !self.chance(self.script.shy)
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        self.called(Call::Cancel);
        self.take_back(|number, _| target.is_none_or(|target| target == number))
    }

    fn cancel_reads(&mut self) -> u32 {
        self.called(Call::Cancel);
        self.take_back(|_, is_read| is_read)
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        self.called(Call::Close);
        match self.script.close {
            Close::Never => return false,
            Close::After(n) if self.calls[Call::Close as usize] <= n.into() => return false,
            _ => {}
        }
        let returned = self.take_returned();
        for slot in returned.into_iter().chain(self.kept.drain(..)).chain(self.cancelled.drain(..))
        {
            self.out.remove(&slot.user_data());
            cx.cancel(slot);
        }
        self.out.is_empty() || self.script.close == Close::WithoutItsThreads
    }
}

impl Drop for NastyQueue {
    fn drop(&mut self) {
        lock(&self.inside.wakes).end(self.number);
        let left = lock(&self.returned).take();
        drop(left);
        self.called(Call::Drop);
    }
}
