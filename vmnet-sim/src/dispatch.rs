//! Serial dispatch queues. Each has a thread, which starts with the first job. A queued job holds a
//! reference to its queue, as in libdispatch.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::objects::{self, Kind, Life, lock, violation};
use crate::threads::spawn;

pub(crate) struct Queue {
    label: String,
    /// `None` until the first job.
    jobs: Mutex<Option<Sender<Job>>>,
}

struct Job {
    run: Box<dyn FnOnce() + Send>,
    /// Keeps the queue alive while the job waits and runs.
    queue: Arc<Queue>,
}

thread_local! {
    /// The queue whose job this thread runs at the moment.
    static CURRENT: Cell<*const Queue> = const { Cell::new(ptr::null()) };
}

impl Queue {
    fn run(self: &Arc<Self>, run: impl FnOnce() + Send + 'static) {
        let mut jobs = lock(&self.jobs);
        let sender = jobs.get_or_insert_with(|| {
            let (sender, receiver) = channel::<Job>();
            spawn(&self.label, move || {
                // The loop ends when the queue, which owns the sender, is gone.
                for Job { run, queue } in receiver {
                    CURRENT.set(Arc::as_ptr(&queue));
                    run();
                    CURRENT.set(ptr::null());
                }
            });
            sender
        });
        let job = Job { run: Box::new(run), queue: self.clone() };
        sender.send(job).expect("the queue's thread runs as long as the queue exists");
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        drop(objects::unregister(ptr::from_ref(self)));
    }
}

/// A queue that vmnet was given, with a reference of its own or without one.
#[derive(Clone)]
pub(crate) struct GivenQueue {
    queue: *const Queue,
    life: Life,
    role: &'static str,
    /// `None` if vmnet does not retain the queues it is given.
    retained: Option<Arc<Queue>>,
}

// SAFETY: the pointer is only followed after `life` has been checked, and queues are `Sync`.
unsafe impl Send for GivenQueue {}
// SAFETY: as for `Send`.
unsafe impl Sync for GivenQueue {}

impl GivenQueue {
    /// Takes a queue from foreign code. Aborts if no live queue has this address.
    pub(crate) fn new(queue: *const c_void, role: &'static str, retains: bool) -> Self {
        let life = objects::expect_live(queue, Kind::Queue, role);
        let queue = queue.cast::<Queue>();
        // SAFETY: `expect_live` has found a live queue, which `dispatch_queue_create` made as an
        // Arc.
        let retained = retains.then(|| unsafe {
            Arc::increment_strong_count(queue);
            Arc::from_raw(queue)
        });
        Self { queue, life, role, retained }
    }

    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// Puts a job on the queue.
    pub(crate) fn run(&self, run: impl FnOnce() + Send + 'static) {
        match &self.retained {
            Some(queue) => queue.run(run),
            None => {
                self.life.check(self.role);
                // SAFETY: `life.check` has just found it alive. A caller that releases it at this
                // moment breaks the rule that is tested here; the reference taken here makes that
                // harmless.
                let queue = unsafe {
                    Arc::increment_strong_count(self.queue);
                    Arc::from_raw(self.queue)
                };
                queue.run(run);
            }
        }
    }

    /// Like [`run`](Self::run). If the job has not ended after `patience`, the queue counts as
    /// blocked and the process is aborted.
    pub(crate) fn run_within(
        &self,
        patience: Duration,
        what: &'static str,
        run: impl FnOnce() + Send + 'static,
    ) {
        let (ended, end) = channel::<()>();
        let watch = move || {
            if end.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                violation(&format!("{what} waits on a queue that is blocked"));
            }
        };
        self.run(move || {
            run();
            drop(ended);
        });
        spawn("vmnet-sim-watch", watch);
    }

    /// Whether the calling thread runs a job of this queue.
    pub(crate) fn is_current(&self) -> bool {
        ptr::eq(CURRENT.get(), self.queue)
    }

    /// Identifies the queue without a reference to it.
    pub(crate) fn id(&self) -> QueueId {
        QueueId { queue: self.queue as usize, life: self.life }
    }
}

/// Identifies a queue, whether it still exists or not.
#[derive(Clone, Copy)]
pub(crate) struct QueueId {
    queue: usize,
    life: Life,
}

impl QueueId {
    /// See [`GivenQueue::is_current`].
    pub(crate) fn is_current(self) -> bool {
        CURRENT.get() as usize == self.queue && self.life.is_live()
    }
}

/// # Safety
///
/// `label` must be a C string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dispatch_queue_create(
    label: *const c_char,
    attributes: *const c_void,
) -> *const c_void {
    if !attributes.is_null() {
        violation("dispatch_queue_create: vmnet's queues are to be serial, with no attributes");
    }
    // SAFETY: guaranteed by the caller.
    let label = unsafe { CStr::from_ptr(label) }.to_string_lossy().into_owned();
    let queue = Arc::new(Queue { label, jobs: Mutex::new(None) });
    let memory = Arc::downgrade(&queue);
    let queue = Arc::into_raw(queue);
    objects::register(queue, Kind::Queue, Box::new(memory));
    queue.cast()
}

/// # Safety
///
/// If `queue` is a live queue, the caller must hold a reference to it during this call. The
/// simulator aborts if no live queue has this address.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dispatch_retain(queue: *const c_void) {
    objects::expect_live(queue, Kind::Queue, "dispatch_retain");
    // SAFETY: `expect_live` has just found the queue, which was made as an Arc.
    unsafe { Arc::increment_strong_count(queue.cast::<Queue>()) }
}

/// # Safety
///
/// The caller keeps the contract of [`dispatch_retain`], and gives up its reference.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dispatch_release(queue: *const c_void) {
    objects::expect_live(queue, Kind::Queue, "dispatch_release");
    // SAFETY: as in `dispatch_retain`; the caller gives up the reference.
    unsafe { Arc::decrement_strong_count(queue.cast::<Queue>()) }
}

/// # Safety
///
/// It must be allowed to call `function` with `context` on another thread. For `queue` see
/// [`dispatch_retain`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dispatch_async_f(
    queue: *const c_void,
    context: *mut c_void,
    function: extern "C" fn(*mut c_void),
) {
    struct Context(*mut c_void);
    // SAFETY: guaranteed by the caller.
    unsafe impl Send for Context {}
    let context = Context(context);
    GivenQueue::new(queue, "dispatch_async_f", true).run(move || {
        let context = context; // capture the whole of it, not the pointer
        function(context.0);
    });
}
