//! Open vSwitch with DPDK: a learning switch as a back end.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::result::Result;
use crate::served::Folder;

/// Longer than a start takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where Debian's package openvswitch-switch-dpdk has its switch.
const SWITCH: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const NAME: &str = "ovs-vswitchd-dpdk";
const TOOLS: [&str; 4] = ["ovsdb-tool", "ovsdb-server", "ovs-vsctl", "ovs-appctl"];

/// The reason why it cannot run here, if there is one.
pub(super) fn missing() -> Option<String> {
    for name in TOOLS {
        if !crate::programs::has_program(name) {
            return Some(format!("the program {name} (openvswitch-switch-dpdk) is not here"));
        }
    }
    switch().is_none().then(|| format!("the program {NAME} is not here"))
}

fn switch() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).map(|folder| folder.join(NAME));
    folders.chain([PathBuf::from(SWITCH)]).find(|path| path.is_file())
}

/// A switch that runs, with its database.
pub(super) struct Ovs {
    folder: PathBuf,
    children: Vec<Child>,
}

impl Ovs {
    /// Starts a switch on the second processor, whose ports connect to these sockets, and connect again
    /// each second.
    pub(super) fn start(folder: &Folder) -> Result<Self> {
        let mut ovs = Self { folder: folder.path().to_owned(), children: Vec::new() };
        let schema = std::env::var_os("OVS_PKGDATADIR")
            .map_or_else(|| PathBuf::from("/usr/share/openvswitch"), PathBuf::from);
        let database = ovs.folder.join("conf.db");
        let schema = schema.join("vswitch.ovsschema").display().to_string();
        ovs.run("ovsdb-tool", &["create", &database.display().to_string(), &schema])?;
        let socket = format!("{}/db.sock", ovs.folder.display());
        ovs.spawn(
            "ovsdb-server".into(),
            &[&database.display().to_string(), &format!("--remote=punix:{socket}")],
        )?;
        ovs.wait_for(|| PathBuf::from(&socket).exists())?;
        ovs.configure(&["init"])?;
        // Without huge pages it needs the old memory mode, or it asks for one that excludes the other.
        ovs.configure(&[
            "set",
            "Open_vSwitch",
            ".",
            "other_config:dpdk-init=true",
            "other_config:dpdk-extra=--no-huge --legacy-mem -m 1024 --no-pci --no-telemetry",
            "other_config:dpdk-lcore-mask=1",
            "other_config:pmd-cpu-mask=2",
        ])?;
        let switch = switch().ok_or("there was one")?;
        ovs.spawn(
            switch,
            &[&format!("unix:{socket}"), "--pidfile=switch.pid", "--unixctl=switch.ctl"],
        )?;
        let control = ovs.folder.join("switch.ctl");
        ovs.wait_for(|| control.exists())?;
        ovs.configure(&["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"])?;
        for (name, path) in ["a", "b"].iter().zip(folder.sockets()) {
            let path = format!("options:vhost-server-path={}", path.display());
            let interface = ["set", "Interface", name, "type=dpdkvhostuserclient", &path];
            ovs.configure(&[&["add-port", "br0", name, "--"][..], &interface].concat())?;
        }
        Ok(ovs)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "RUNTIME_DIRECTORY"] {
            command.env(variable, &self.folder);
        }
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.join("ovs"))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).current_dir(&self.folder);
        Ok(command)
    }

    fn spawn(&mut self, program: PathBuf, arguments: &[&str]) -> Result<()> {
        let mut command = self.command(program)?;
        self.children.push(command.args(arguments).stdout(Stdio::null()).spawn()?);
        Ok(())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self.command(program)?.args(arguments).output()?;
        if !output.status.success() {
            let said = fs::read_to_string(self.folder.join("ovs")).unwrap_or_default();
            return Err(format!("{program} {}: {said}", arguments.join(" ")).into());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn configure(&self, arguments: &[&str]) -> Result<()> {
        let database = format!("--db=unix:{}/db.sock", self.folder.display());
        self.run("ovs-vsctl", &[&[&database, "--no-wait"], arguments].concat()).map(drop)
    }

    fn wait_for(&mut self, done: impl Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        while !done() {
            let ended = self.children.iter_mut().any(|child| !matches!(child.try_wait(), Ok(None)));
            if ended || begin.elapsed() > PATIENCE {
                let said = fs::read_to_string(self.folder.join("ovs")).unwrap_or_default();
                return Err(format!("Open vSwitch does not start: {said}").into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn control(&self, command: &str) -> Result<String> {
        let target = format!("{}/switch.ctl", self.folder.display());
        self.run("ovs-appctl", &["--target", &target, command])
    }

    pub(super) fn restart_clock(&self) -> Result<()> {
        self.control("dpif-netdev/pmd-stats-clear").map(drop)
    }

    /// The nanoseconds for each frame, without those of empty polls, by its own counters.
    pub(super) fn busy_ns(&self) -> Result<f64> {
        let said = self.control("dpif-netdev/pmd-stats-show")?;
        let cycles = said.lines().find_map(|line| {
            let rest = line.trim().strip_prefix("avg processing cycles per packet:")?;
            rest.split_whitespace().next()?.parse::<f64>().ok()
        });
        Ok(cycles.ok_or_else(|| format!("Open vSwitch counts nothing: {said}"))? / cycles_per_ns())
    }
}

/// The cycles of the time-stamp counter for each nanosecond, by which Open vSwitch counts.
fn cycles_per_ns() -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: every x86-64 processor has the instruction.
        let counter = || unsafe { core::arch::x86_64::_rdtsc() };
        let (begin, first) = (Instant::now(), counter());
        thread::sleep(Duration::from_millis(20));
        (counter() - first) as f64 / begin.elapsed().as_nanos() as f64
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        1.0
    }
}

impl Drop for Ovs {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            // It may have ended by itself. Then there is nothing to do.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
