//! A future of what a thread of its own returns. It lets an executor await a call that blocks, without
//! a runtime: the call runs on the thread, and the thread wakes the task.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::device::catch::catch_panic;
use crate::error::Error;
use crate::sync::{Condvar, Mutex};
use crate::sys::{lock, spawn_detached};

type Work<T> = Box<dyn FnOnce() -> Result<T, Error> + Send>;

/// The future. It is `Unpin` and does nothing before its first poll, which starts the thread.
///
/// If it is dropped after that, the work goes on, and its result is dropped on the thread. So the drop
/// of the future never blocks, also where the drop of the result would.
pub(crate) struct Background<T> {
    /// What is being done, for errors, and the thread's name.
    what: &'static str,
    name: &'static str,
    /// Until the first poll.
    work: Option<Work<T>>,
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    /// The result was taken, or the future dropped.
    taken: Condvar,
}

struct State<T> {
    result: Option<Result<T, Error>>,
    waker: Option<Waker>,
    /// The future is ready or dropped. Nobody comes for a result any more.
    over: bool,
}

impl<T: Send + 'static> Background<T> {
    pub(crate) fn new(
        name: &'static str,
        what: &'static str,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Self {
        let state = State { result: None, waker: None, over: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), taken: Condvar::new() });
        Self { what, name, work: Some(Box::new(work)), shared }
    }

    fn start(&self, work: Work<T>) -> Result<(), Error> {
        let (what, shared) = (self.what, self.shared.clone());
        let body = move || {
            let result = catch_panic(work).unwrap_or_else(|_| {
                Err(Error::Io { what, source: io::Error::other("the thread panicked") })
            });
            shared.finish(result);
        };
        spawn_detached(self.name, body).map_err(Error::io(what))
    }
}

impl<T> Shared<T> {
    /// Gives the result to the future, and waits until it has taken it. If the future is dropped
    /// instead, drops the result here.
    fn finish(&self, result: Result<T, Error>) {
        let mut state = lock(&self.state);
        state.result = Some(result);
        let waker = state.waker.take();
        drop(state);
        // Woken outside the lock, because a waker may run any code, and poll the future.
        if let Some(waker) = waker
            && catch_panic(|| waker.wake()).is_err()
        {
            tracing::error!("a waker panicked");
        }
        let mut state = lock(&self.state);
        while !state.over {
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let left = state.result.take();
        drop(state);
        if catch_panic(|| drop(left)).is_err() {
            tracing::error!("a result that nobody wanted panicked");
        }
    }
}

impl<T: Send + 'static> Future for Background<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(work) = self.work.take()
            && let Err(error) = self.start(work)
        {
            lock(&self.shared.state).over = true;
            return Poll::Ready(Err(error));
        }
        let mut state = lock(&self.shared.state);
        assert!(!state.over, "the future is not polled again after it was ready");
        if let Some(result) = state.result.take() {
            state.over = true;
            drop(state);
            self.shared.taken.notify_all();
            return Poll::Ready(result);
        }
        let replaced = state.waker.replace(cx.waker().clone());
        drop(state);
        // Dropped outside the lock, because dropping a waker may run any code.
        drop(replaced);
        Poll::Pending
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.over = true;
        let waker = state.waker.take();
        drop(state);
        self.shared.taken.notify_all();
        drop(waker);
    }
}

impl<T> fmt::Debug for Background<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").field("what", &self.what).finish_non_exhaustive()
    }
}
