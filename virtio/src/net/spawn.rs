//! [`NetThread`]: a thread that polls a device and sleeps, for VMMs without an event loop.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::task::Poll;
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crate::net::device::NetDevice;
use crate::net::idle::Idle;
use crate::net::readiness::Notifier;
use crate::net::stats::StatsHandle;
use crate::selector::{Wish, wait};

/// What another thread asks of the device. It is called again while it is pending.
type Call = Box<dyn FnMut(&mut NetDevice) -> Poll<()> + Send>;

/// A thread that polls a device, and sleeps while there is nothing to do. Dropping it stops the thread,
/// waits for it, and drops the device.
///
/// Its system calls are those of [`serve_connection`](crate::net::serve_connection) without the
/// socket's.
pub struct NetThread {
    /// It is `None` only while the thread is being stopped.
    calls: Option<Sender<Call>>,
    notifier: Notifier,
    stats: StatsHandle,
    id: ThreadId,
    thread: Option<JoinHandle<NetDevice>>,
}

impl NetDevice {
    /// Starts a thread of this name that polls the device. Names that the system shows have 15 bytes.
    ///
    /// # Errors
    ///
    /// What the system says, for example if it has no more threads. The device is dropped.
    pub fn spawn(self, name: &str) -> io::Result<NetThread> {
        let (notifier, stats) = (self.notifier(), self.stats_handle());
        let (sender, receiver) = mpsc::channel();
        let thread =
            thread::Builder::new().name(name.to_owned()).spawn(move || run(self, &receiver))?;
        let id = thread.thread().id();
        Ok(NetThread { calls: Some(sender), notifier, stats, id, thread: Some(thread) })
    }
}

fn run(mut device: NetDevice, calls: &Receiver<Call>) -> NetDevice {
    let mut pending: Vec<Call> = Vec::new();
    let mut idle = Idle::new(device.settings());
    loop {
        let moved = device.poll();
        // They come after the poll, which may have ended what they wait for. What ends later lets `arm`
        // fail, or wakes this thread.
        loop {
            match calls.try_recv() {
                Ok(call) => pending.push(call),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return device,
            }
        }
        pending.retain_mut(|call| call(&mut device).is_pending());
        // The sender of a call wakes the device after it.
        if !idle.stays_awake(&moved) && device.arm() {
            let timeout = moved.deadline.map(|at| at.saturating_duration_since(Instant::now()));
            wait([Some((device.as_fd(), Wish::Read))], timeout);
        }
    }
}

impl NetThread {
    /// Tells the device that the guest has notified it. It can be called on the thread of a virtual
    /// processor.
    pub fn notify(&self, queue: u16) {
        self.notifier.notify(queue);
    }

    /// A handle that notifies the device, for each thread of a virtual processor.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// Reads the device's counters.
    pub fn stats_handle(&self) -> StatsHandle {
        self.stats.clone()
    }

    /// Calls a function on the device's thread, between two polls, and returns what it returns.
    ///
    /// # Panics
    ///
    /// If it is called by the device's own thread, as from inside an
    /// [`Interrupt`](crate::net::Interrupt), or if that thread has panicked.
    pub fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut NetDevice) -> R + Send + 'static,
    ) -> R {
        let mut f = Some(f);
        let result = self.call_until(None, move |device| {
            // It is ready the first time, and not called again.
            f.take().map_or(Poll::Pending, |f| Poll::Ready(f(device)))
        });
        result.expect("without a timeout there is a result")
    }

    /// Calls a function on the device's thread until it is ready: first now, and then after each poll.
    /// Returns what it returns, or `None` if it was not ready within `timeout`. In that case it is
    /// still called until it is.
    ///
    /// # Panics
    ///
    /// As [`call`](Self::call).
    pub fn call_until<R: Send + 'static>(
        &self,
        timeout: Option<Duration>,
        mut f: impl FnMut(&mut NetDevice) -> Poll<R> + Send + 'static,
    ) -> Option<R> {
        assert_ne!(thread::current().id(), self.id, "a device cannot wait for itself");
        let (sender, receiver) = mpsc::sync_channel(1);
        let call: Call = Box::new(move |device| {
            // If nobody waits any more, the result is dropped.
            f(device).map(|result| drop(sender.try_send(result)))
        });
        let calls = self.calls.as_ref().expect("the thread is not being stopped");
        // If it fails, the thread has panicked, and the receiver says so.
        let _ = calls.send(call);
        self.notifier.wake();
        let result = match timeout {
            Some(timeout) => receiver.recv_timeout(timeout),
            None => receiver.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
        };
        match result {
            Ok(result) => Some(result),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("the device's thread has panicked"),
        }
    }

    /// Lets everything end that is on its way, and begins nothing more; see [`NetDevice::pause`].
    /// Returns whether nothing is on its way. If not within `timeout`, the device goes on pausing.
    pub fn pause(&self, timeout: Duration) -> bool {
        self.call_until(Some(timeout), NetDevice::pause).is_some()
    }

    /// Goes on after [`pause`](Self::pause).
    pub fn resume(&self) {
        self.call(NetDevice::resume);
    }

    /// Stops the thread, and returns the device.
    ///
    /// # Panics
    ///
    /// If the thread has panicked.
    pub fn stop(mut self) -> NetDevice {
        let thread = self.end().expect("it was not stopped before");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn end(&mut self) -> Option<JoinHandle<NetDevice>> {
        self.calls = None;
        self.notifier.wake();
        self.thread.take()
    }
}

impl Drop for NetThread {
    fn drop(&mut self) {
        if let Some(thread) = self.end()
            && thread::current().id() != self.id
        {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for NetThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetThread").field("stats", &self.stats).finish_non_exhaustive()
    }
}
