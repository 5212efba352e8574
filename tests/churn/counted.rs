//! A wrapper that counts what is asked of a device.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vmring::device::{Capabilities, Device, PollContext, Progress, Queue, QueueConfig, Wake};
use vmring::{Driver, Error, InterfaceConfig, InterfaceInfo, Status};

#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Calls of a queue's functions.
    calls: AtomicU64,
    restarts: AtomicU64,
    stops: AtomicU64,
    /// The largest number of times that a queue was asked to close, if that was too often.
    hasty_closes: AtomicU64,
}

impl Counts {
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    pub(crate) fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::SeqCst)
    }

    pub(crate) fn hasty_closes(&self) -> u64 {
        self.hasty_closes.load(Ordering::SeqCst)
    }

    pub(crate) fn stops(&self) -> u64 {
        self.stops.load(Ordering::SeqCst)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::SeqCst);
}

pub(crate) struct Counted {
    pub(crate) inner: Box<dyn Driver>,
    pub(crate) counts: Arc<Counts>,
}

impl Driver for Counted {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let Counted { inner, counts } = *self;
        Ok(Arc::new(CountedDevice { inner: inner.start(config)?, counts }))
    }
}

struct CountedDevice {
    inner: Arc<dyn Device>,
    counts: Arc<Counts>,
}

impl Device for CountedDevice {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn info(&self) -> InterfaceInfo {
        self.inner.info()
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = self.inner.capabilities();
        // A safety poll is a poll of nothing, and is not what is looked for here.
        caps.safety_poll = None;
        caps
    }

    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let inner = self.inner.queue(config, wake)?;
        Ok(Box::new(CountedQueue { inner, counts: self.counts.clone(), closes: None }))
    }

    fn stop(&self) -> Result<(), Error> {
        count(&self.counts.stops);
        self.inner.stop()
    }

    fn restart(&self) -> Result<(), Error> {
        count(&self.counts.restarts);
        self.inner.restart()
    }
}

struct CountedQueue {
    inner: Box<dyn Queue>,
    counts: Arc<Counts>,
    /// When it was first asked to close, and how often since.
    closes: Option<(Instant, u64)>,
}

/// How often a queue may be asked to close, at once and in each millisecond after that: many times
/// as often as an engine asks that sleeps in between.
const CLOSES: (u64, u64) = (500, 20);

impl Queue for CountedQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        count(&self.counts.calls);
        self.inner.poll(cx)
    }

    fn bind_to_thread(&mut self) {
        self.inner.bind_to_thread();
    }

    fn arm(&mut self) -> bool {
        count(&self.counts.calls);
        self.inner.arm()
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        count(&self.counts.calls);
        self.inner.cancel(target)
    }

    fn cancel_reads(&mut self) -> u32 {
        count(&self.counts.calls);
        self.inner.cancel_reads()
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        count(&self.counts.calls);
        let (first, calls) = self.closes.get_or_insert_with(|| (Instant::now(), 0));
        *calls += 1;
        if *calls > CLOSES.0 + CLOSES.1 * first.elapsed().as_millis() as u64 {
            self.counts.hasty_closes.fetch_max(*calls, Ordering::SeqCst);
        }
        self.inner.close(cx)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }

    fn deadline(&self) -> Option<Instant> {
        self.inner.deadline()
    }
}
