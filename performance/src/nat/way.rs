//! The ways out of a network namespace that are compared.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::servers::Servers;
use super::world::{WORLD, World, many_ports};
use crate::net::{Namespace, ip};
use crate::result::Result;
use crate::served::{Folder, usage};

/// The user that owns nothing.
const NOBODY: u32 = 65_534;
/// Longer than a start takes.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one attempt to reach a server may take.
const ATTEMPT: Duration = Duration::from_millis(500);
/// The network between a host and the namespace behind the kernel's NAT.
const INSIDE: [&str; 2] = ["10.99.0.1", "10.99.0.2"];
/// Limits of ours that no measurement reaches.
const LIMITS: [&str; 6] = [
    "flows=60000",
    "half-open=20000",
    "udp-flows=20000",
    "new-flows-per-second=1000000",
    "descriptors=60000",
    "kernel-memory=4294967296",
];

/// What carries packets out of a namespace.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    /// Nothing: the sockets are the host's.
    Direct,
    /// The kernel, which forwards and masquerades.
    Kernel,
    /// `vmring run-netns` with these arguments.
    Ours(&'a Path, &'static [&'static str]),
    /// pasta, with this MTU.
    Pasta(&'a Path, u32),
    /// slirp4netns, with this MTU.
    Slirp(&'a Path, u32),
}

impl Way<'_> {
    pub(super) fn name(self) -> String {
        match self {
            Self::Direct => "no translator".to_owned(),
            Self::Kernel => "veth, nft masquerade".to_owned(),
            Self::Ours(_, arguments) => [&["vmring run-netns"][..], arguments].concat().join(" "),
            Self::Pasta(_, mtu) => format!("pasta --mtu {mtu}"),
            Self::Slirp(_, mtu) => format!("slirp4netns --mtu={mtu}"),
        }
    }

    /// Whether it is the one whose failure is a failure of the measurement.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Ours(..))
    }
}

/// A way out that is there, with a world at its end.
pub(super) struct Running {
    /// Where clients are.
    pub(super) inside: Namespace,
    pub(super) servers: Servers,
    /// The translator.
    process: Option<Process>,
    world: World,
}

/// A child process that does not outlive its measurement, and what it says on stderr.
pub(super) struct Process {
    child: Child,
    folder: Folder,
}

impl Process {
    /// Starts a program in the calling thread's namespace.
    pub(super) fn start(mut command: Command) -> Result<Self> {
        let folder = Folder::new()?;
        let said = File::create(folder.path().join("said"))?;
        let child = command.stderr(said).spawn().map_err(|error| {
            format!("{} does not start: {error}", command.get_program().display())
        })?;
        Ok(Self { child, folder })
    }

    /// Waits until something is so. Fails if it takes too long or if the program has ended.
    pub(super) fn wait_until(&mut self, otherwise: &str, done: impl Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        while !done() {
            if self.child.try_wait()?.is_some() || begin.elapsed() > PATIENCE {
                return Err(format!("{otherwise}: {}", self.said()).into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The processor time of all its threads.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        Ok(Duration::from_nanos(usage(self.child.id())?.0))
    }

    /// The last line that it has said on stderr.
    fn said(&self) -> String {
        let said = fs::read_to_string(self.folder.path().join("said")).unwrap_or_default();
        said.lines().next_back().unwrap_or("it has said nothing").to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself. Then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    pub(super) fn start(way: Way<'_>) -> Result<Self> {
        let world = World::new()?;
        let servers = Servers::start(&world.outside)?;
        let (inside, process) = match way {
            Way::Direct => (world.host.duplicate()?, None),
            Way::Kernel => (masqueraded(&world.host)?, None),
            Way::Ours(program, arguments) => {
                let mut command = Command::new(program);
                command.arg("run-netns").args(arguments);
                LIMITS.iter().for_each(|limit| _ = command.args(["--limit", limit]));
                let (inside, process) = world.host.inside(|| with_command(command))?;
                (inside, Some(process))
            }
            Way::Pasta(program, mtu) => {
                let mut command = Command::new(program);
                command.args(["--foreground", "--quiet", "--config-net", "--ipv4-only"]);
                command.args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"]);
                command.args(["--no-map-gw", "--no-pidns", "--mtu", &mtu.to_string()]);
                // As root it would give up what it needs to reach the namespace that it makes.
                command.uid(NOBODY).gid(NOBODY);
                let (inside, process) = world.host.inside(|| with_command(command))?;
                (inside, Some(process))
            }
            Way::Slirp(program, mtu) => {
                let inside = Namespace::new()?;
                let mut command = Command::new(program);
                command.args(["--configure", "--disable-host-loopback", &format!("--mtu={mtu}")]);
                command.arg("--netns-type=path").arg(inside.path()).arg("tap0");
                command.stdin(Stdio::null()).stdout(Stdio::null());
                let process = world.host.inside(|| Process::start(command))?;
                (inside, Some(process))
            }
        };
        inside.inside(many_ports)?;
        let mut running = Self { inside, servers, process, world };
        running.await_server()?;
        Ok(running)
    }

    /// Waits until a server is reached from inside.
    fn await_server(&mut self) -> Result<()> {
        let begin = Instant::now();
        let server = SocketAddr::from(self.servers.echo(0));
        loop {
            let reached = self.inside.inside(|| Ok(TcpStream::connect_timeout(&server, ATTEMPT)?));
            let Err(error) = reached else { return Ok(()) };
            if let Some(process) = &mut self.process
                && let Some(status) = process.child.try_wait()?
            {
                return Err(format!("it has ended ({status}): {}", process.said()).into());
            }
            if begin.elapsed() > PATIENCE {
                let said = self.process.as_ref().map(Process::said).unwrap_or_default();
                return Err(format!("no server is reached: {error}; {said}").into());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs `work` on a thread in the namespace of the world.
    pub(super) fn outside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.world.outside.inside(work)
    }

    /// The processor time of the translator, if it is a process.
    pub(super) fn processor_time(&self) -> Result<Option<Duration>> {
        self.process.as_ref().map(Process::processor_time).transpose()
    }

    /// The bytes of memory that are the translator's own, if it is a process.
    pub(super) fn memory(&self) -> Result<Option<u64>> {
        let Some(process) = &self.process else { return Ok(None) };
        let status = fs::read_to_string(format!("/proc/{}/status", process.child.id()))?;
        let kilobytes = status.lines().find_map(|line| {
            line.strip_prefix("RssAnon:")?.split_whitespace().next()?.parse::<u64>().ok()
        });
        Ok(Some(kilobytes.ok_or("a process's status has no RssAnon")? * 1024))
    }
}

/// A namespace behind the kernel's NAT on `host`.
fn masqueraded(host: &Namespace) -> Result<Namespace> {
    let inside = Namespace::new()?;
    host.inside(|| {
        ip("link add guest type veth peer name eth0")?;
        inside.adopt("eth0")?;
        ip(&format!("address add {}/24 dev guest", INSIDE[0]))?;
        ip("link set guest up")?;
        masquerade()
    })?;
    inside.inside(|| {
        ip(&format!("address add {}/24 dev eth0", INSIDE[1]))?;
        ip("link set eth0 up")?;
        ip(&format!("route add default via {}", INSIDE[0]))
    })?;
    Ok(inside)
}

/// Lets the calling thread's namespace forward, and masquerade what leaves for the world.
pub(super) fn masquerade() -> Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    let rules = format!(
        "table ip nat {{\n chain out {{\n type nat hook postrouting priority srcnat\n \
         oifname \"{WORLD}\" masquerade\n }}\n }}\n"
    );
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
    nft.stdin.take().ok_or("its input is not a pipe")?.write_all(rules.as_bytes())?;
    if !nft.wait()?.success() {
        return Err("nft makes no masquerade".into());
    }
    Ok(())
}

/// A program that runs a command in a network namespace of its own, started in the calling thread's, and
/// the namespace that it makes.
fn with_command(mut program: Command) -> Result<(Namespace, Process)> {
    // The command says its number when its network is there, and waits for the end of its input.
    program.args(["--", "sh", "-c", "echo $$; exec cat"]);
    program.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = Process::start(program)?;
    let mut line = String::new();
    BufReader::new(process.child.stdout.as_mut().ok_or("its output is not a pipe")?)
        .read_line(&mut line)?;
    let Ok(number) = line.trim().parse() else { return Err(process.said().into()) };
    Ok((Namespace::of_process(number)?, process))
}
