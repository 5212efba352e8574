//! `vmring serve` and `vmring bridge` with real guests: QEMU and user-mode Linux, over vhost-user and over
//! their own wires.

#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmring_guest::{Engine, Folder, Guest, Missing, Nic, Process, Running};

#[path = "command/host.rs"]
mod host;
#[path = "command/http.rs"]
mod http;
#[path = "guests/migration.rs"]
mod migration;
#[path = "guests/personality.rs"]
mod personality;
#[path = "guests/restarts.rs"]
mod restarts;
#[path = "guests/traffic.rs"]
mod traffic;
#[path = "guests/way_out.rs"]
mod way_out;
#[path = "guests/wires.rs"]
mod wires;
#[path = "command/world.rs"]
mod world;

/// No step here needs a tenth of this, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Writes to stderr directly, because the test harness captures `eprintln!`.
fn skip(why: &str) {
    let name = thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
}

/// What was asked for, unless something is missing: then reports that the test is skipped, and why.
fn have<T>(wanted: Result<T, Missing>) -> Option<T> {
    wanted.inspect_err(|why| skip(&why.to_string())).ok()
}

/// A guest with what these tests run in it.
fn guest(engine: Engine) -> Option<Guest> {
    have(Guest::new(engine).and_then(|guest| guest.program("ethtool")))
}

/// Whether the command serves. If not, reports that the test is skipped.
fn can_serve() -> bool {
    let help = Command::new(env!("CARGO_BIN_EXE_vmring")).args(["serve", "--help"]).output();
    let can = help.expect("the command starts").status.success();
    if !can {
        skip("this vmring has no command serve");
    }
    can
}

/// A `vmring serve`. It is killed when it is dropped.
struct Server {
    process: Process,
}

impl Server {
    /// Starts the command, and waits until guests can connect.
    fn start(network: &str, sockets: &[&Path], more: &[&str]) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_vmring")), network, sockets, more)
    }

    /// The same, by a command of the program.
    fn start_by(mut command: Command, network: &str, sockets: &[&Path], more: &[&str]) -> Self {
        let folder = Folder::new();
        command.args(["serve", "--json", "--network", network]).args(more);
        for socket in sockets {
            command.args(["--listen", &format!("vhost-user:{}", socket.display())]);
        }
        let file = |name| File::create(folder.join(name)).expect("a file in a new folder");
        command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
        let mut server = Self { process: Process::start(&mut command, folder) };
        until("the server says that guests can join", || {
            let said = server.said("stderr");
            assert!(server.process.ended().is_none(), "the server ends: {said}");
            said.contains("guests can join")
        });
        server
    }

    fn said(&self, name: &str) -> String {
        std::fs::read_to_string(self.process.folder().join(name)).unwrap_or_default()
    }

    fn terminate(&mut self) {
        let pid = self.process.child().id().to_string();
        let kill = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(kill.expect("there is kill").success());
    }

    /// Ends the server with SIGTERM, and returns its report.
    fn end(mut self) -> Value {
        self.terminate();
        let status = self.process.wait(LIMIT).expect("the server ends in time");
        let (report, stderr) = (self.said("stdout"), self.said("stderr"));
        assert!(status.success(), "{status}: {report}\n{stderr}");
        serde_json::from_str(&report).unwrap_or_else(|error| panic!("{error}: {report}\n{stderr}"))
    }
}

/// A test that fails shows what the server said and counted.
impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            if self.process.ended().is_none() {
                self.terminate();
            }
            let status = self.process.wait(Duration::from_secs(5));
            let (report, stderr) = (self.said("stdout"), self.said("stderr"));
            let counts = report.lines().filter(|line| !line.trim_end_matches(',').ends_with(": 0"));
            let counts: Vec<_> = counts.collect();
            eprintln!("-- the server, which ended with {status:?}:\n{stderr}{}", counts.join("\n"));
        }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "it never happened: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Gets an address by DHCP, pings the gateway, and returns the address.
fn join(guest: &mut Running) -> String {
    guest.sh("udhcpc -i eth0 -n -q -t 20 -T 1");
    guest.sh(". /tmp/dhcp.eth0; ping -A -c 3 -W 5 $router");
    guest.sh(". /tmp/dhcp.eth0; echo $ip").trim().to_owned()
}

/// Transfers 4 MiB in each direction at once, over two TCP connections, and compares the digests. Each
/// guest, with its address, gets what the other one has.
fn transfer(guests: [(&mut Running, &str); 2]) {
    let [(a, a_address), (b, b_address)] = guests;
    // Each number has seven digits and an end of line.
    for (guest, first) in [(&mut *a, 3_000_000), (&mut *b, 6_000_000)] {
        guest.sh(&format!("seq {first} {} >/tmp/out; httpd -p 80 -h /tmp", first + 524_287));
    }
    let get = |guest: &mut Running, from: &str| {
        guest.begin(&format!("cd /tmp; wget -q -O in http://{from}/out && cat in | sha256sum"))
    };
    let (a_gets, b_gets) = (get(a, b_address), get(b, a_address));
    let (a_has, b_has) = (a.finish(&a_gets), b.finish(&b_gets));
    let digest = |guest: &mut Running| guest.sh("sha256sum </tmp/out");
    let (a_gave, b_gave) = (digest(a), digest(b));
    assert_ne!(a_gave, b_gave);
    for (who, has, gave) in [(a, a_has, b_gave), (b, b_has, a_gave)] {
        assert_eq!((has.status, &has.output), (0, &gave), "{}", who.text());
    }
}
