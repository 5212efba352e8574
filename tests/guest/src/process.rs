//! Processes that end with the test, and folders that go with them: also if the test is killed.

use std::fs;
use std::io::{PipeWriter, Write, pipe};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A process with a process group and a temporary folder of its own. When it is dropped, or when
/// this program ends in any way, the whole group is killed and the folder is removed.
#[derive(Debug)]
pub struct Process {
    child: Child,
    folder: Folder,
}

impl Process {
    /// Starts `command` in the folder.
    ///
    /// # Panics
    ///
    /// Panics if it cannot be started.
    pub fn start(command: &mut Command, folder: Folder) -> Self {
        let child = command.process_group(0).spawn();
        let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        folder.guard_group(Some(child.id()));
        Self { child, folder }
    }

    /// The process, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The folder of the process.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// The status of the process if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            let ended = self.ended();
            if ended.is_some() || start.elapsed() > limit {
                return ended;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills the process and its group with SIGKILL, and waits for its end.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            // SAFETY: the call takes no pointer. The child leads its group and was not waited for,
            // so no other process has this number.
            unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
            let _ = self.child.wait();
        }
        // Another process may get the number from here on.
        self.folder.guard_group(None);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A temporary folder, and a guard: a shell that waits for the end of this program. It then kills
/// the process group that uses the folder, and removes the folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    guard: Child,
    /// The guard's input. It ends when this program does.
    alive: Option<PipeWriter>,
}

/// Each line is a process group, or empty if there is none any more.
const GUARD: &str = r#"
    while read -r line; do group=$line; done
    [ -z "$group" ] || kill -s KILL -- "-$group"
    rm -rf -- "$0"
"#;

impl Folder {
    /// An empty folder.
    ///
    /// # Panics
    ///
    /// Panics if there cannot be one.
    #[expect(clippy::new_without_default, reason = "a folder is made, which may fail")]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // The path of a socket in it has to be shorter than 108 bytes.
        let name = format!("vmring-guest-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).expect("a temporary folder");
        let (reader, alive) = pipe().expect("a pipe");
        let guard = Command::new("sh")
            .args(["-c", GUARD])
            .arg(&path)
            .process_group(0)
            .stdin(reader)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        Self { path, guard, alive: Some(alive) }
    }

    /// A path in the folder.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Tells the guard which process group it has to kill.
    fn guard_group(&self, group: Option<u32>) {
        let mut alive = self.alive.as_ref().expect("until it is dropped");
        let line = group.map(|group| group.to_string()).unwrap_or_default();
        writeln!(alive, "{line}").expect("the guard reads");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.alive = None;
        let _ = self.guard.wait();
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_process_and_its_children_end_when_it_is_dropped() {
        let folder = Folder::new();
        let path = folder.join("");
        let pid = folder.join("pid");
        let script = "sleep 600 & echo $! >pid.new; mv pid.new pid; wait";
        let process =
            Process::start(Command::new("sh").args(["-c", script]).current_dir(&path), folder);
        let start = Instant::now();
        while !pid.exists() {
            assert!(start.elapsed() < Duration::from_secs(60), "the shell does not start");
            thread::sleep(Duration::from_millis(5));
        }
        let pid = fs::read_to_string(&pid).expect("a number");
        let pid: i32 = pid.trim().parse().expect("a number");
        drop(process);
        assert!(!path.exists());
        // A killed child without a parent is there until init waits for it.
        while is_running(pid) {
            assert!(start.elapsed() < Duration::from_secs(60), "{pid} does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether a process is there and is no zombie (proc_pid_stat(5)).
    fn is_running(pid: i32) -> bool {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
    }
}
