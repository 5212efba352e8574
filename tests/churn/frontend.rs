//! A front-end, used by threads of its own: its calls may wait until the ring is closed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::task::{Context, Wake, Waker};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmring::{AsyncRing, BlockingRing, Error, Ring, block_on};

use crate::churn::operation::Task;
use crate::churn::{ON_PURPOSE, PATIENCE, is_on_purpose};

/// Broadcast: everybody on an embedded network reads it.
pub(crate) const PACKET: [u8; 60] = {
    let mut packet = [0xff; 60];
    packet[6] = 2;
    packet[12] = 0x88;
    packet[13] = 0xb5;
    packet
};

pub(crate) struct Front {
    jobs: Vec<Sender<Task>>,
    next: AtomicU64,
    threads: Vec<JoinHandle<()>>,
    books: Arc<Books>,
}

/// Writes begun and ended.
#[derive(Debug, Default)]
struct Books {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Books {
    fn write(&self, write: impl FnOnce() -> Result<(), Error>) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        // However it ends: the model says only that it does.
        let _ = write();
        self.ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// Wakes nobody, and panics.
struct BadWaker;

impl Wake for BadWaker {
    fn wake(self: Arc<Self>) {
        panic!("a waker panics {ON_PURPOSE}");
    }
}

impl Front {
    pub(crate) fn blocking(ring: Ring, prefix: &str) -> Result<Self, Error> {
        let mut packets = BlockingRing::new(ring)?;
        let mut front = Self::new();
        front.start(prefix, move |task, books| match task {
            Task::Write => books.write(|| packets.write(&PACKET)),
            Task::Read => drop(packets.read()),
            Task::ReadFor { micros } => drop(packets.read_timeout(Duration::from_micros(micros))),
            Task::Once | Task::BadWaker => drop(packets.alloc()),
        });
        Ok(front)
    }

    pub(crate) fn asynchronous(ring: Ring, prefix: &str) -> Result<Self, Error> {
        let packets = AsyncRing::new(ring)?;
        let mut front = Self::new();
        for _ in 0..2 {
            let packets = packets.clone();
            let mut sleeping = Vec::new();
            front.start(prefix, move |task, books| {
                let noop = &mut Context::from_waker(Waker::noop());
                match task {
                    Task::Write => books.write(|| block_on(packets.write(&PACKET))),
                    Task::Read => drop(block_on(packets.read())),
                    Task::Once | Task::ReadFor { .. } => {
                        let _ = pin!(packets.read()).poll(noop);
                        let _ = pin!(packets.write(&PACKET)).poll(noop);
                    }
                    Task::BadWaker => {
                        let mut read = Box::pin(packets.read());
                        let waker = Waker::from(Arc::new(BadWaker));
                        let _ = read.as_mut().poll(&mut Context::from_waker(&waker));
                        sleeping.push(read);
                    }
                }
            });
        }
        Ok(front)
    }

    fn new() -> Self {
        Self {
            jobs: Vec::new(),
            next: AtomicU64::new(0),
            threads: Vec::new(),
            books: Arc::default(),
        }
    }

    /// A thread that does what it is asked for with `work`.
    fn start(&mut self, prefix: &str, mut work: impl FnMut(Task, &Books) + Send + 'static) {
        let (sender, jobs) = mpsc::channel();
        let books = self.books.clone();
        let thread = thread::Builder::new().name(format!("{prefix}f"));
        let run = move || {
            // A bad waker may panic in the middle of a stranger's call.
            let mut careful = |task| catch_unwind(AssertUnwindSafe(|| work(task, &books)));
            for task in jobs {
                if let Err(panic) = careful(task)
                    && !is_on_purpose(&*panic)
                {
                    resume_unwind(panic);
                }
            }
        };
        self.threads.push(thread.spawn(run).expect("a front-end's thread"));
        self.jobs.push(sender);
    }

    /// Asks one of the threads.
    pub(crate) fn ask(&self, task: Task) {
        let n = self.next.fetch_add(1, Ordering::Relaxed) as usize % self.jobs.len();
        // A thread that has ended has panicked, which is found at the end.
        let _ = self.jobs[n].send(task);
    }

    /// Whether no write waits.
    pub(crate) fn writes_are_over(&self) -> bool {
        let ended = self.books.ended.load(Ordering::SeqCst);
        self.books.begun.load(Ordering::SeqCst) == ended
    }

    /// Whether its threads have ended, or will without waiting for anybody.
    pub(crate) fn is_over(&mut self) -> bool {
        self.jobs.clear();
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits for the threads to end, whose ring is closed.
    pub(crate) fn end(self) {
        let Self { jobs, threads, books, .. } = self;
        drop(jobs);
        let start = Instant::now();
        for thread in threads {
            while !thread.is_finished() {
                let waited = start.elapsed();
                assert!(
                    waited < PATIENCE,
                    "a front-end of a closed ring does not return: {books:?}"
                );
                thread::sleep(Duration::from_micros(200));
            }
            if let Err(panic) = thread.join() {
                resume_unwind(panic);
            }
        }
    }
}
