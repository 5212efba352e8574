//! The network namespace in which an interface was started. A restart runs on the thread that
//! releases the interface's last queue, and this thread may be in another network namespace.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::{io, thread};

/// A network namespace (network_namespaces(7)).
#[derive(Debug)]
pub(crate) struct Namespace(File);

impl Namespace {
    /// Returns the calling thread's network namespace.
    pub(crate) fn here() -> io::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(Self)
    }

    /// Runs `f` in this namespace and returns its result. If the calling thread is in another
    /// namespace, a new thread enters this one and runs `f`; for this the process needs
    /// CAP_SYS_ADMIN.
    ///
    /// # Panics
    ///
    /// Resumes the panic of `f`.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        if self.0.metadata()?.ino() == Self::here()?.0.metadata()?.ino() {
            return Ok(f());
        }
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("vmring-restart".to_owned());
            let there = thread.spawn_scoped(scope, || {
                // SAFETY: setns(2) takes two numbers and no pointer. `self.0` keeps the descriptor
                // open. The call changes only this thread, which ends after `f`.
                match unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) } {
                    0 => Ok(f()),
                    _ => Err(io::Error::last_os_error()),
                }
            })?;
            there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
