//! Hosts of their own: network namespaces, with the kernel's own TCP and UDP.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use crate::LIMIT;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace, and a thread that runs jobs in it.
pub(crate) struct Host {
    jobs: Sender<Job>,
    namespace: String,
}

impl Host {
    pub(crate) fn new() -> Self {
        let (jobs, todo) = channel::<Job>();
        let (tell, told) = channel();
        thread::spawn(move || {
            // SAFETY: the argument is a plain number. The call only concerns this thread and what it
            // starts.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            // SAFETY: the call has no argument and cannot fail.
            let thread = unsafe { libc::gettid() };
            tell.send(format!("/proc/{}/task/{thread}/ns/net", std::process::id())).unwrap();
            todo.iter().for_each(|job| job());
        });
        Self { jobs, namespace: told.recv_timeout(LIMIT).unwrap() }
    }

    /// The path of its namespace.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// A command that runs in this namespace.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let namespace = File::open(&self.namespace).expect("its namespace");
        let mut command = Command::new(program);
        // SAFETY: setns(2) takes a descriptor that the closure owns, and no memory.
        unsafe {
            command.pre_exec(move || match libc::setns(namespace.as_raw_fd(), 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        command
    }

    /// Starts a job, whose result arrives later.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Receiver<T> {
        let (tell, told) = channel();
        let job = move || drop(tell.send(job()));
        self.jobs.send(Box::new(job)).unwrap();
        told
    }

    #[track_caller]
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(job).recv_timeout(LIMIT).expect("it ends in time")
    }
}

/// Why this process cannot make network namespaces and TAPs, if it cannot.
pub(crate) fn obstacle() -> Option<&'static str> {
    // SAFETY: the argument is a plain number. The call only concerns that thread, which ends at once.
    let unshare = || unsafe { libc::unshare(libc::CLONE_NEWNET) == 0 };
    if !thread::spawn(unshare).join().expect("it does not panic") {
        Some("a network namespace needs root")
    } else if !Path::new("/dev/net/tun").exists() {
        Some("there is no /dev/net/tun")
    } else {
        None
    }
}

/// Runs ip(8), in the namespace of this thread.
pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip runs");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}
