//! The network namespace in which an interface was started. A restart is carried out by whoever lets go
//! last, and that thread may be in another one.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::{io, thread};

/// A network namespace (network_namespaces(7)).
#[derive(Debug)]
pub(crate) struct Namespace(File);

impl Namespace {
    /// This thread's.
    pub(crate) fn here() -> io::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(Self)
    }

    /// Runs `f` in there: on this thread if it is there, else on one that goes there, for which the
    /// process needs CAP_SYS_ADMIN.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        if self.0.metadata()?.ino() == Self::here()?.0.metadata()?.ino() {
            return Ok(f());
        }
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("vmring-restart".to_owned());
            let there = thread.spawn_scoped(scope, || {
                // SAFETY: plain numbers; it concerns this thread, which ends here.
                match unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) } {
                    0 => Ok(f()),
                    _ => Err(io::Error::last_os_error()),
                }
            })?;
            there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
