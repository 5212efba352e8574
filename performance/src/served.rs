//! [`Served`]: a `vmring serve` that is measured. [`Folder`]: its sockets.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::pin;
use crate::result::Result;

/// Longer than a start takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// A folder for sockets and outputs, which goes with the value.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmring-performance-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        // What a run with the same number has left behind is nobody's.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The sockets of the two guests.
    pub(crate) fn sockets(&self) -> [PathBuf; 2] {
        ["a.sock", "b.sock"].map(|name| self.0.join(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `vmring serve` on the second processor.
pub(crate) struct Served(Child);

impl Served {
    /// Starts it for two guests over vhost-user without offload, as DPDK's are.
    pub(crate) fn start(program: &Path, folder: &Folder) -> Result<Self> {
        let sockets = folder.sockets();
        let listens =
            sockets.each_ref().map(|at| format!("vhost-user:{},offload=off", at.display()));
        let arguments = ["serve", "--network", "embedded:performance", "--busy-poll"];
        Self::start_with(program, &arguments, &listens, folder)
    }

    /// Starts it with these arguments and sockets of the folder.
    pub(crate) fn start_with(
        program: &Path,
        arguments: &[&str],
        listens: &[String],
        folder: &Folder,
    ) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments);
        listens.iter().for_each(|listen| _ = command.args(["--listen", listen]));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // A child has the processors of the thread that starts it.
        let child = thread::scope(|scope| {
            let start = scope.spawn(|| {
                pin(1);
                command.spawn()
            });
            start.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()))
        });
        let mut served = Self(child.map_err(|error| format!("{}: {error}", program.display()))?);
        let begin = Instant::now();
        while !folder.sockets().iter().take(listens.len()).all(|socket| socket.exists()) {
            if served.0.try_wait()?.is_some() || begin.elapsed() > PATIENCE {
                return Err(format!("{} serve does not listen", program.display()).into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(served)
    }

    pub(crate) fn process(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself. Then there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The processor time in nanoseconds and the voluntary switches of all threads of a process.
pub(crate) fn usage(process: u32) -> Result<(u64, u64)> {
    let (mut time, mut switches) = (0, 0);
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let task = task?.path();
        let first = |text: &str| text.split_whitespace().next()?.parse::<u64>().ok();
        time += first(&fs::read_to_string(task.join("schedstat"))?)
            .ok_or("a thread's schedstat has no time")?;
        let status = fs::read_to_string(task.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        switches += line.and_then(first).ok_or("a thread's status has no switches")?;
    }
    Ok((time, switches))
}

/// The processor time of all threads of this process with this name, or `None` if there is none.
pub(crate) fn thread_time(name: &str) -> Result<Option<Duration>> {
    let mut time = None;
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        // A thread may end meanwhile.
        let Ok(its) = fs::read_to_string(task.join("comm")) else { continue };
        if its.trim_end() != name {
            continue;
        }
        let Ok(stat) = fs::read_to_string(task.join("schedstat")) else { continue };
        let nanos = stat.split_whitespace().next().and_then(|first| first.parse().ok());
        let nanos = Duration::from_nanos(nanos.ok_or("a thread's schedstat has no time")?);
        time = Some(time.unwrap_or(Duration::ZERO) + nanos);
    }
    Ok(time)
}
