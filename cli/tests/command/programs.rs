//! Other people's programs use the way out: iperf3, curl, wget, wrk, ssh, scp, dig, dnsmasq, hping3, scapy,
//! tcpreplay, ping and traceroute. A test whose programs are not there says that it is skipped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::Value;

use crate::host::Host;
use crate::serve::Server;
use crate::tap::skip;
use crate::visitor::Visitor;
use crate::world::{HOST, OUTSIDE, World};
use crate::{LIMIT, ended, text};

#[path = "programs/faults.rs"]
mod faults;
#[path = "programs/forwards.rs"]
mod forwards;
#[path = "programs/hostile.rs"]
mod hostile;
#[path = "programs/names.rs"]
mod names;
#[path = "programs/packets.rs"]
mod packets;
#[path = "programs/paths.rs"]
mod paths;
#[path = "programs/rates.rs"]
mod rates;
#[path = "programs/shell.rs"]
mod shell;
#[path = "programs/web.rs"]
mod web;

/// The gateway of a network, and its first guest.
const GATEWAY: &str = "192.168.64.1";
const GUEST: &str = "192.168.64.2";

/// The folders of programs, with those that are not in the PATH of every user.
fn folders() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&folders()).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Whether there are namespaces and these programs. If not, reports that the test is skipped.
fn have(programs: &[&str]) -> bool {
    if !crate::tap::is_possible() {
        return false;
    }
    let missing = ["bash"].iter().chain(programs).find(|program| find(program).is_none());
    if let Some(program) = missing {
        skip(&format!("{program} is not installed"));
    }
    missing.is_none()
}

/// What a script does before its own first line: it finds all programs, and ends with the first failure.
fn prepared(script: &str) -> String {
    format!("set -e; export PATH='{}' LC_ALL=C; {script}", folders())
}

/// Runs a script in the namespace of a host.
fn run_in(host: &Host, script: &str) -> Output {
    let mut command = host.command("bash");
    command.args(["-c", &prepared(script)]).stdin(Stdio::null());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    ended(child.expect("bash"), &[script])
}

/// Runs a script, which succeeds, and returns what it prints.
#[track_caller]
fn sh(host: &Host, script: &str) -> String {
    succeeded(&run_in(host, script))
}

#[track_caller]
fn succeeded(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}: {out}{err}", output.status);
    out.into_owned()
}

/// Runs a script below `vmring run-netns` with these options, and returns what it prints.
#[track_caller]
fn guest(world: &World, options: &[&str], script: &str) -> String {
    let script = prepared(script);
    succeeded(&world.run_netns(&[options, &["--", "bash", "-c", &script]].concat()))
}

/// A program that runs until this is dropped.
struct Daemon(Child);

impl Daemon {
    fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.env("PATH", folders()).spawn().expect("the program starts"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "it never happened: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until somebody has this port of `host` in a table of /proc/net: `tcp` (listening) or `udp`.
fn until_bound(host: &Host, protocol: &'static str, port: u16) {
    until(&format!("{protocol} port {port} is in use"), || {
        let table =
            host.run(move || fs::read_to_string(format!("/proc/thread-self/net/{protocol}")));
        let table = table.expect("a table of sockets");
        table.lines().skip(1).any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let is_open = protocol == "udp" || words[3] == "0A";
            is_open && words[1].ends_with(&format!(":{port:04X}"))
        })
    });
}

/// A server of the host's, and the kernels of two guests on its network.
struct Lab {
    world: World,
    server: Server,
    /// Their addresses are 192.168.64.2 and 192.168.64.3.
    guests: [Visitor; 2],
}

impl Lab {
    fn new(name: &str, options: &[&str]) -> Self {
        let folder = crate::scratch(name);
        let world = World::new();
        let path = folder.join("a.sock");
        let listen = format!("qemu:{}", path.display());
        let arguments =
            [&["serve", "--json", "--network", "embedded:lab", "--listen", &listen], options]
                .concat();
        let mut command = world.host.command(env!("CARGO_BIN_EXE_vmring"));
        let server = Server::of(command.args(&arguments), &arguments);
        let guests = [GUEST, "192.168.64.3"].map(|address| Visitor::new(&path, address));
        Self { world, server, guests }
    }

    /// Ends the server, and returns its report.
    fn end(self) -> Report {
        Report(self.server.report("TERM"))
    }
}

/// What a server has counted.
struct Report(Value);

impl Report {
    fn counter(&self, name: &str) -> u64 {
        // What is 0 is not shown.
        self.0["network"]["counters"][name].as_u64().unwrap_or(0)
    }
}

/// Bytes that look random.
fn content(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// The digest of a file, by sha256sum(1).
fn digest(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum runs");
    succeeded(&output).split(' ').next().expect("a digest").to_owned()
}
