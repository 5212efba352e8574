//! Serial dispatch queues: a thread each, which starts with the first job. A queued job holds a
//! reference to its queue, as in libdispatch.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::objects::{self, Kind, Life, lock, violation};

pub(crate) struct Queue {
    label: String,
    /// `None` until the first job.
    jobs: Mutex<Option<Sender<Job>>>,
}

struct Job {
    run: Box<dyn FnOnce() + Send>,
    /// While it waits and runs, its queue exists.
    queue: Arc<Queue>,
}

thread_local! {
    /// The queue whose job this thread runs.
    static CURRENT: Cell<*const Queue> = const { Cell::new(ptr::null()) };
}

impl Queue {
    fn run(self: &Arc<Self>, run: impl FnOnce() + Send + 'static) {
        let mut jobs = lock(&self.jobs);
        let sender = jobs.get_or_insert_with(|| {
            let (sender, receiver) = channel::<Job>();
            thread::Builder::new()
                .name(self.label.clone())
                .spawn(move || {
                    // Ends when the queue, which has the sender, is gone.
                    for Job { run, queue } in receiver {
                        CURRENT.set(Arc::as_ptr(&queue));
                        run();
                        CURRENT.set(ptr::null());
                    }
                })
                .expect("a thread for a dispatch queue");
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

/// A queue that vmnet was given: with a reference of its own or without one.
#[derive(Clone)]
pub(crate) struct GivenQueue {
    queue: *const Queue,
    life: Life,
    role: &'static str,
    /// `None` if vmnet does not retain.
    retained: Option<Arc<Queue>>,
}

// SAFETY: the pointer is used after `life` has been checked only, and queues are `Sync`.
unsafe impl Send for GivenQueue {}
// SAFETY: as above.
unsafe impl Sync for GivenQueue {}

impl GivenQueue {
    /// A queue that somebody gives: told if it is none.
    pub(crate) fn new(queue: *const c_void, role: &'static str, retains: bool) -> Self {
        let life = objects::expect_live(queue, Kind::Queue, role);
        let queue = queue.cast::<Queue>();
        // SAFETY: a queue lives there, made by `dispatch_queue_create` as an Arc.
        let retained = retains.then(|| unsafe {
            Arc::increment_strong_count(queue);
            Arc::from_raw(queue)
        });
        Self { queue, life, role, retained }
    }

    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// Puts a job on it.
    pub(crate) fn run(&self, run: impl FnOnce() + Send + 'static) {
        match &self.retained {
            Some(queue) => queue.run(run),
            None => {
                self.life.check(self.role);
                // SAFETY: it lives, as just seen; whoever releases it now breaks the rule that is
                // tested here, and the reference taken here makes that harmless.
                let queue = unsafe {
                    Arc::increment_strong_count(self.queue);
                    Arc::from_raw(self.queue)
                };
                queue.run(run);
            }
        }
    }

    /// As [`run`](Self::run); and if the job has not ended after `patience` the queue counts as
    /// blocked, which is told.
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
        let watcher = thread::Builder::new().name("vmnet-sim-watch".to_owned()).spawn(watch);
        drop(watcher.expect("a thread"));
    }

    /// Whether the calling thread runs a job of it.
    pub(crate) fn is_current(&self) -> bool {
        ptr::eq(CURRENT.get(), self.queue)
    }

    /// Which queue it is, to remember without a reference.
    pub(crate) fn id(&self) -> QueueId {
        QueueId { queue: self.queue as usize, life: self.life }
    }
}

/// Which queue something was given, whether that still exists or not.
#[derive(Clone, Copy)]
pub(crate) struct QueueId {
    queue: usize,
    life: Life,
}

impl QueueId {
    /// As [`GivenQueue::is_current`].
    pub(crate) fn is_current(self) -> bool {
        CURRENT.get() as usize == self.queue && self.life.is_live()
    }
}

/// # Safety
///
/// `label` is a C string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dispatch_queue_create(
    label: *const c_char,
    attributes: *const c_void,
) -> *const c_void {
    if !attributes.is_null() {
        violation("dispatch_queue_create: vmnet's queues are to be serial, with no attributes");
    }
    // SAFETY: as the caller says.
    let label = unsafe { CStr::from_ptr(label) }.to_string_lossy().into_owned();
    let queue = Arc::new(Queue { label, jobs: Mutex::new(None) });
    let memory = Arc::downgrade(&queue);
    let queue = Arc::into_raw(queue);
    objects::register(queue, Kind::Queue, Box::new(memory));
    queue.cast()
}

/// # Safety
///
/// `queue` is a queue, or nothing that lives, which is told.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dispatch_retain(queue: *const c_void) {
    objects::expect_live(queue, Kind::Queue, "dispatch_retain");
    // SAFETY: it lives, and was made as an Arc.
    unsafe { Arc::increment_strong_count(queue.cast::<Queue>()) }
}

/// # Safety
///
/// As [`dispatch_retain`], and the caller has a reference to give up.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dispatch_release(queue: *const c_void) {
    objects::expect_live(queue, Kind::Queue, "dispatch_release");
    // SAFETY: as in `dispatch_retain`; the reference is the caller's.
    unsafe { Arc::decrement_strong_count(queue.cast::<Queue>()) }
}

/// # Safety
///
/// `function` may be called with `context` on another thread.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dispatch_async_f(
    queue: *const c_void,
    context: *mut c_void,
    function: extern "C" fn(*mut c_void),
) {
    struct Context(*mut c_void);
    // SAFETY: as the caller says.
    unsafe impl Send for Context {}
    let context = Context(context);
    GivenQueue::new(queue, "dispatch_async_f", true).run(move || {
        let context = context; // the whole of it
        function(context.0);
    });
}
