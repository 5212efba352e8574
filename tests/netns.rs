//! Network namespaces for tests that need the kernel's own network. A test makes one, and it is
//! gone when the test ends. No test touches the network of the host.

use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use crate::support::skip;
use crate::support::{LONG, guarded_for, stage};

/// Runs `body` under a watchdog, on a thread of its own and in a network namespace of its own.
/// There the loopback interface is up, and IPv6 is disabled. Without the privilege, prints that the
/// test was skipped, and why.
pub(crate) fn in_namespace(body: impl FnOnce() + Send + 'static) {
    in_namespace_for(LONG * 2, body);
}

/// Like [`in_namespace`], for a body that takes longer than others.
pub(crate) fn in_namespace_for(limit: Duration, body: impl FnOnce() + Send + 'static) {
    guarded_for(limit, || {
        if enter() {
            body();
        }
    });
}

/// Moves this thread, and those that it starts, into a new network namespace. Without the privilege,
/// prints why not and returns false.
pub(crate) fn enter() -> bool {
    if std::env::var_os("VMRING_SKIP_TAP").is_some() {
        skip("VMRING_SKIP_TAP is set");
        return false;
    }
    // SAFETY: the call takes no pointer. It affects this thread and the threads that it starts
    // later.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        skip("a network namespace needs root");
        return false;
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        skip("there is no /dev/net/tun");
        return false;
    }
    for set in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{set}/disable_ipv6");
        // A kernel without IPv6 has no such file.
        let _ = std::fs::write(path, "1");
    }
    sh("ip link set lo up");
    true
}

/// Enables IPv6 for interfaces that are made from now on.
pub(crate) fn with_ipv6() {
    for set in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{set}/disable_ipv6");
        std::fs::write(path, "0").expect("a kernel with IPv6");
        // Without duplicate address detection, a new address is usable at once.
        let path = format!("/proc/sys/net/ipv6/conf/{set}/accept_dad");
        std::fs::write(path, "0").expect("a kernel with IPv6");
    }
}

/// Returns whether the program is installed. If not, prints that the test is skipped.
pub(crate) fn has(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// Runs a shell command in this namespace and returns its output. It must succeed within a minute.
pub(crate) fn sh(command: &str) -> String {
    match try_sh(command) {
        Ok(output) => output,
        Err(said) => panic!("`{command}` failed:\n{said}"),
    }
}

/// Like [`sh`] for a command that may fail. Returns what the command printed.
pub(crate) fn try_sh(command: &str) -> Result<String, String> {
    stage(format!("`{command}`"));
    let seconds = LONG.as_secs();
    let output = Command::new("timeout")
        .args(["--kill-after=5", &seconds.to_string(), "sh", "-c", command])
        .stdin(Stdio::null())
        .output()
        .expect("a shell");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stdout) + &text(&output.stderr))
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Another host: a network namespace, with a thread that runs jobs in it.
pub(crate) struct Host {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
    tid: i32,
}

impl Host {
    pub(crate) fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (made, making) = mpsc::channel();
        let thread = thread::spawn(move || {
            assert!(enter(), "the privilege was there a moment ago");
            // SAFETY: the call takes no arguments.
            let _ = made.send(unsafe { libc::gettid() });
            while let Ok(job) = todo.recv() {
                job();
            }
        });
        let tid = making.recv_timeout(LONG).expect("a host");
        Self { jobs: Some(jobs), thread: Some(thread), tid }
    }

    /// Moves an interface of this thread's namespace there.
    pub(crate) fn give(&self, interface: &str) {
        sh(&format!("ip link set {interface} netns {}", self.tid));
    }

    /// Runs `f` there and waits for it.
    pub(crate) fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(f).wait(LONG * 2)
    }

    /// Starts `f` there.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> Running<T> {
        let (done, waiting) = mpsc::channel();
        let job = Box::new(move || {
            let _ = done.send(std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)));
        });
        self.jobs.as_ref().expect("until it is dropped").send(job).expect("its thread runs");
        Running(waiting)
    }

    pub(crate) fn sh(&self, command: &str) -> String {
        let command = command.to_owned();
        self.run(move || sh(&command))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs = None;
        let thread = self.thread.take().expect("taken here only");
        // If the thread hangs, the watchdog ends the test.
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < LONG {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A job that a [`Host`] runs in the background.
pub(crate) struct Running<T>(mpsc::Receiver<thread::Result<T>>);

impl<T> Running<T> {
    pub(crate) fn wait(self, timeout: Duration) -> T {
        match self.0.recv_timeout(timeout).expect("the other host answers in time") {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
