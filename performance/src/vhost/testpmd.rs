//! `dpdk-testpmd`: the front end of two guests, or the back end of two front ends.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::programs::has_program;
use crate::result::Result;
use crate::served::Folder;

/// Longer than any command takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// The addresses of the two guests.
const MACS: [&str; 2] = ["52:54:00:12:34:01", "52:54:00:12:34:02"];

/// The reason why testpmd cannot run here, if there is one.
pub(super) fn missing() -> Option<String> {
    if crate::common::processors() < 2 {
        return Some("the front end and the back end need a processor each".into());
    }
    for (program, package) in [("dpdk-testpmd", "dpdk-dev"), ("stdbuf", "coreutils")] {
        if !has_program(program) {
            return Some(format!("the program {program} (Debian's package {package}) is not here"));
        }
    }
    None
}

/// What the front end does with the frames.
#[derive(Clone, Copy)]
pub(super) struct Load<'a> {
    /// The bytes of each frame, without its checksum.
    pub(super) len: u32,
    /// Options of the two virtio-user devices, with a comma in front.
    pub(super) device: &'a str,
    /// Reads of random memory for each frame, which take time. With 0 the front end does what it can.
    pub(super) reads: u32,
}

/// A testpmd that runs.
pub(super) struct Testpmd {
    child: Child,
    input: ChildStdin,
    output: PathBuf,
    /// How much of the output was looked at.
    seen: usize,
}

impl Testpmd {
    /// The front end of two guests, on the first processor, which connects to these sockets.
    pub(super) fn front(folder: &Folder, load: Load<'_>) -> Result<Self> {
        let sockets = folder.sockets();
        let vdev = |i: usize| {
            let (path, mac) = (sockets[i].display(), MACS[i]);
            format!("net_virtio_user{i},path={path},mac={mac}{}", load.device)
        };
        let peer = |i: usize| format!("--eth-peer={i},{}", MACS[1 - i]);
        let mut more = vec![peer(0), peer(1), format!("--txpkts={}", load.len)];
        if load.reads > 0 {
            more.extend(["--noisy-lkup-memory=1".into(), "--forward-mode=noisy".into()]);
            more.push(format!("--noisy-lkup-num-reads={}", load.reads));
        } else {
            more.push("--forward-mode=io".into());
        }
        Self::start(folder, "front", 0, &[vdev(0), vdev(1)], &more)
    }

    /// The back end of two front ends, on the second processor, which listens at these sockets.
    pub(super) fn back(folder: &Folder) -> Result<Self> {
        let sockets = folder.sockets();
        let vdev = |i: usize| format!("net_vhost{i},iface={}", sockets[i].display());
        let more = ["--forward-mode=io".into(), "--record-core-cycles".into()];
        let mut back = Self::start(folder, "back", 1, &[vdev(0), vdev(1)], &more)?;
        back.does("start\n", "packets/burst")?;
        Ok(back)
    }

    fn start(
        folder: &Folder,
        name: &str,
        processor: usize,
        vdevs: &[String; 2],
        more: &[String],
    ) -> Result<Self> {
        let output = folder.path().join(name);
        let file = File::create(&output)?;
        // Line by line, so that what it does can be waited for. The thread that reads commands sleeps.
        let mut command = Command::new("stdbuf");
        command
            .args(["-oL", "dpdk-testpmd", "--no-huge", "-m", "256", "--no-pci", "--no-telemetry"])
            .args(["--lcores", &format!("0@{processor},1@{processor}"), "--file-prefix", name])
            .args(["--vdev", &vdevs[0], "--vdev", &vdevs[1], "--", "-i", "--nb-cores=1"])
            .arg("--total-num-mbufs=8192")
            .args(more)
            .env("RUNTIME_DIRECTORY", folder.path())
            .stdin(Stdio::piped())
            .stdout(file.try_clone()?)
            .stderr(file);
        let mut child = command.spawn()?;
        let input = child.stdin.take().ok_or("its input is not a pipe")?;
        let mut testpmd = Self { child, input, output, seen: 0 };
        testpmd.wait_for("testpmd>", 1)?;
        Ok(testpmd)
    }

    /// Gives a command, and waits for these words. Returns what is printed from the command on.
    pub(super) fn does(&mut self, command: &str, words: &str) -> Result<String> {
        self.seen = fs::read(&self.output)?.len();
        self.input.write_all(command.as_bytes())?;
        self.wait_for(words, 1)
    }

    /// Waits until new output has these words so many times. Returns it.
    fn wait_for(&mut self, words: &str, times: usize) -> Result<String> {
        let start = Instant::now();
        loop {
            let all = String::from_utf8_lossy(&fs::read(&self.output)?).into_owned();
            let new = all.get(self.seen..).unwrap_or_default();
            if new.matches(words).count() >= times {
                return Ok(new.to_owned());
            }
            let ended = self.child.try_wait()?.is_some();
            if ended || start.elapsed() > PATIENCE {
                return Err(format!("dpdk-testpmd says no '{words}':\n{all}").into());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The frames per second that each port has received on average since the last call, by testpmd's
    /// own clock.
    pub(super) fn frames_per_second(&mut self) -> Result<f64> {
        self.does("show port stats all\n", "Tx-bps:")?;
        // One line for each port.
        let shown = self.wait_for("Tx-bps:", 2)?;
        let rates = shown.lines().filter_map(|line| line.trim().strip_prefix("Rx-pps:"));
        let rates: Vec<f64> =
            rates.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).collect();
        match rates[..] {
            [one, other] => Ok(f64::midpoint(one, other)),
            _ => Err(format!("dpdk-testpmd shows no rates:\n{shown}").into()),
        }
    }

    /// Stops forwarding. Returns the nanoseconds for each frame, without those of empty polls, by
    /// testpmd's own counters.
    pub(super) fn busy_ns(&mut self) -> Result<f64> {
        let said = self.does("stop\n", "MHz Clock")?;
        let of = |word: &str, end: &str| {
            let (_, rest) = said.split_once(word)?;
            rest.split_once(end)?.0.trim().parse::<f64>().ok()
        };
        let (Some(cycles), Some(mhz)) = (of("CPU cycles/packet=", " "), of(" at ", " MHz")) else {
            return Err(format!("dpdk-testpmd shows no cycles:\n{said}").into());
        };
        Ok(cycles / mhz * 1000.0)
    }

    /// Ends it, as far as it listens.
    pub(super) fn quit(mut self) {
        let _ = self.input.write_all(b"stop\nquit\n");
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) && matches!(self.child.try_wait(), Ok(None))
        {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // It may have ended by itself. Then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
