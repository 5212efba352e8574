//! Where the bytes of a capture wait for the thread that writes them, so that no poller waits for a
//! disk or for a program at the other end of a pipe.
//!
//! A poller appends to the *stage*, under a lock. The thread swaps the stage for an empty buffer
//! and writes it, at the latest [`LATENCY`] after the first byte came. If the stage is full, the
//! poller waits for the thread, but only once and only for [`PATIENCE`]: after that the spool is
//! *stalled*, and everybody finds it full without waiting, until the thread has written something.

use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::sys::{after, block_sigpipe, lock, now};

/// How long a byte may stay in the stage.
pub(super) const LATENCY: Duration = Duration::from_millis(100);
/// The size of the stage from which on it is written at once, and the size at which it is full, in
/// bytes.
const WORTH_WRITING: usize = 1 << 18;
const FULL: usize = 1 << 22;
/// How long a poller waits for space, and how long a queue that closes waits for its packets to be
/// written.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the end of a capture waits for the rest to be written.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// What makes bytes out of packets, and holds those that were not handed to the thread yet.
pub(super) trait Stage: Send + 'static {
    /// The bytes that wait.
    fn bytes(&mut self) -> &mut Vec<u8>;

    /// How many packets are whole in `bytes`, which are the beginning of what the stage had.
    fn whole_packets(bytes: &[u8]) -> u64;
}

/// A handle to the stage and its thread. When it is dropped, the rest is written and the thread
/// ends.
#[derive(Debug)]
pub(super) struct Spool<S> {
    shared: Arc<Shared<S>>,
}

#[derive(Debug)]
struct Shared<S> {
    state: Mutex<State<S>>,
    /// For the thread: there is something to write, or somebody is in a hurry.
    work: Condvar,
    /// For the others: something was written, or the thread has ended.
    progress: Condvar,
}

/// What the lock protects.
#[derive(Debug)]
pub(super) struct State<S> {
    pub(super) stage: S,
    /// Packets in the stage, and those that are being written.
    pub(super) staged: u64,
    writing: u64,
    written: u64,
    /// Packets for which there was no space.
    pub(super) lost: u64,
    /// What the thread is doing.
    thread: Doing,
    /// Somebody waits for the stage to be written.
    is_urgent: bool,
    is_stalled: bool,
    is_closing: bool,
    /// The first error. Nothing is written after it.
    failed: Option<io::Error>,
}

/// What the thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It sleeps until the first byte comes.
    Sleeping,
    /// It sleeps until [`LATENCY`] has passed, or there is much to write.
    Gathering,
    Writing,
    /// It has ended, and the writer is dropped.
    Ended,
}

impl<S> State<S> {
    /// How many packets were appended and not lost to an error.
    pub(super) fn packets(&self) -> u64 {
        self.staged + self.writing + self.written
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }
}

impl<S: Stage> State<S> {
    /// Whether everything that was appended has left the process.
    fn is_idle(&mut self) -> bool {
        self.thread != Doing::Writing && self.stage.bytes().is_empty()
    }
}

impl<S: Stage> Spool<S> {
    /// Starts the thread, which writes what is in the stage.
    pub(super) fn start(stage: S, writer: Box<dyn Write + Send>) -> io::Result<Self> {
        let state = State {
            stage,
            staged: 0,
            writing: 0,
            written: 0,
            lost: 0,
            thread: Doing::Writing,
            is_urgent: false,
            is_stalled: false,
            is_closing: false,
            failed: None,
        };
        let (work, progress) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { state: Mutex::new(state), work, progress });
        let of_thread = shared.clone();
        thread::Builder::new()
            .name("vmring-capture".to_owned())
            .spawn(move || of_thread.run(writer))?;
        Ok(Self { shared })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State<S>> {
        lock(&self.shared.state)
    }

    /// Whether the stage has space for `len` bytes. Waits for it if that may help.
    pub(super) fn has_space<'a>(
        &'a self,
        mut state: MutexGuard<'a, State<S>>,
        len: usize,
    ) -> (MutexGuard<'a, State<S>>, bool) {
        let is_full = |state: &mut State<S>| {
            let staged = state.stage.bytes().len();
            // One packet fits an empty stage, however long it is.
            staged > 0 && staged + len > FULL && !state.has_failed()
        };
        if is_full(&mut state) && !state.is_stalled {
            let deadline = after(PATIENCE);
            state.is_urgent = true;
            self.shared.work.notify_one();
            while is_full(&mut state) {
                let left = deadline.saturating_duration_since(now());
                if left.is_zero() {
                    state.is_stalled = true;
                    tracing::warn!("the capture is not written; packets are left out of it");
                    break;
                }
                state = wait(&self.shared.progress, state, left);
            }
        }
        let has_space = !is_full(&mut state);
        (state, has_space)
    }

    /// Wakes the thread, if it waits for what was appended.
    pub(super) fn appended(&self, state: &mut State<S>) {
        let wanted = match state.thread {
            Doing::Sleeping => 1,
            Doing::Gathering => WORTH_WRITING,
            Doing::Writing | Doing::Ended => return,
        };
        if state.stage.bytes().len() >= wanted {
            self.shared.work.notify_one();
        }
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    ///
    /// The first error since the start; [`io::ErrorKind::TimedOut`] if it takes too long.
    pub(super) fn finish(&self) -> io::Result<()> {
        let mut state = self.shared.written_within(lock(&self.shared.state), END_PATIENCE);
        if let Some(error) = &state.failed {
            // The first error stays, because what follows it would be a recording with a gap.
            return Err(io::Error::new(error.kind(), error.to_string()));
        }
        if state.is_idle() {
            return Ok(());
        }
        let sentence = "what it is written to takes nothing more";
        Err(io::Error::new(io::ErrorKind::TimedOut, sentence))
    }

    /// Waits a moment until everything is written, unless the spool is stalled.
    pub(super) fn flush(&self) {
        let state = lock(&self.shared.state);
        if !state.is_stalled {
            drop(self.shared.written_within(state, PATIENCE));
        }
    }
}

impl<S> Drop for Spool<S> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.is_closing = true;
        self.shared.work.notify_one();
        let deadline = after(END_PATIENCE);
        // The file is closed when the thread has ended. A thread that cannot write stays behind
        // until it can.
        while state.thread != Doing::Ended && !state.is_stalled {
            let left = deadline.saturating_duration_since(now());
            if left.is_zero() {
                break;
            }
            state = wait(&self.shared.progress, state, left);
        }
    }
}

impl<S: Stage> Shared<S> {
    /// Waits until everything is written, or has failed, but no longer than `patience`.
    fn written_within<'a>(
        &'a self,
        mut state: MutexGuard<'a, State<S>>,
        patience: Duration,
    ) -> MutexGuard<'a, State<S>> {
        let deadline = after(patience);
        while !state.is_idle() && !state.has_failed() {
            let left = deadline.saturating_duration_since(now());
            if left.is_zero() {
                state.is_stalled = true;
                break;
            }
            state.is_urgent = true;
            self.work.notify_one();
            state = wait(&self.progress, state, left);
        }
        state
    }

    /// The thread: writes what comes until the spool is dropped or writing fails.
    fn run(&self, writer: Box<dyn Write + Send>) {
        block_sigpipe();
        let ending = Ending(self);
        // The writer is dropped before the end is announced.
        let mut writer = writer;
        let mut chunk = Vec::new();
        let mut state = lock(&self.state);
        loop {
            let has_work;
            (state, has_work) = self.wait_for_work(state);
            if !has_work {
                break;
            }
            mem::swap(state.stage.bytes(), &mut chunk);
            state.writing = mem::take(&mut state.staged);
            (state.thread, state.is_urgent) = (Doing::Writing, false);
            drop(state);
            let result = write(&mut *writer, &chunk);
            state = lock(&self.state);
            let packets = mem::take(&mut state.writing);
            match result {
                Ok(()) => {
                    state.written += packets;
                    state.is_stalled = false;
                    chunk.clear();
                    // `wait_for_work` looks for more before it releases the lock.
                    state.thread = Doing::Sleeping;
                    self.progress.notify_all();
                }
                Err((len, error)) => {
                    tracing::error!(%error, "the capture failed; no further packets are recorded");
                    state.written += S::whole_packets(&chunk[..len]);
                    state.staged = 0;
                    *state.stage.bytes() = Vec::new();
                    state.failed = Some(error);
                    break;
                }
            }
        }
        drop(state);
        drop(writer);
        drop(ending);
    }

    /// Waits until there is something to write and it is time to write it. Returns false at the
    /// end.
    fn wait_for_work<'a>(
        &'a self,
        mut state: MutexGuard<'a, State<S>>,
    ) -> (MutexGuard<'a, State<S>>, bool) {
        while state.stage.bytes().is_empty() {
            if state.is_closing {
                return (state, false);
            }
            state.thread = Doing::Sleeping;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let deadline = after(LATENCY);
        loop {
            let left = deadline.saturating_duration_since(now());
            let enough = state.stage.bytes().len() >= WORTH_WRITING;
            if enough || state.is_urgent || state.is_closing || left.is_zero() {
                return (state, true);
            }
            state.thread = Doing::Gathering;
            state = wait(&self.work, state, left);
        }
    }
}

/// Says that the thread has ended, even if the writer has panicked.
struct Ending<'a, S>(&'a Shared<S>);

impl<S> Drop for Ending<'_, S> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if thread::panicking() {
            state.failed.get_or_insert_with(|| io::Error::other("the writer has panicked"));
        }
        state.thread = Doing::Ended;
        drop(state);
        self.0.progress.notify_all();
    }
}

fn wait<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
) -> MutexGuard<'a, T> {
    condition.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner).0
}

/// Writes all of `bytes`. An error comes with the number of bytes that were written before it.
fn write(writer: &mut dyn Write, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut written = 0;
    while written < bytes.len() {
        match writer.write(&bytes[written..]) {
            Ok(0) => return Err((written, io::ErrorKind::WriteZero.into())),
            Ok(n) => written += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err((written, error)),
        }
    }
    writer.flush().map_err(|error| (written, error))
}
