//! A server and its guests.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::sync::{Arc, Mutex};

use super::*;

#[cfg(target_os = "linux")]
#[path = "serve/calls.rs"]
mod calls;
#[path = "serve/crowd.rs"]
mod crowd;
#[cfg(target_os = "linux")]
#[path = "serve/dpdk.rs"]
mod dpdk;
#[path = "../../../virtio/tests/driver/mod.rs"]
#[allow(dead_code)] // It has more than these tests need.
mod driver;
#[path = "../../../virtio/tests/frontend/mod.rs"]
mod frontend;
#[cfg_attr(not(target_os = "linux"), allow(dead_code))] // Some tests are for Linux only.
#[path = "serve/guest.rs"]
mod guest;
#[cfg(target_os = "linux")]
#[path = "serve/offload.rs"]
mod offload;
#[path = "serve/options.rs"]
mod options;
#[cfg(not(target_os = "macos"))] // There is no simulated vmnet.
#[path = "serve/own.rs"]
mod own;
#[cfg(target_os = "linux")]
#[path = "serve/tap.rs"]
mod tap;
#[cfg(target_os = "linux")]
#[path = "serve/unit.rs"]
mod unit;
#[cfg(target_os = "linux")]
#[path = "serve/way_out.rs"]
mod way_out;
#[path = "serve/wires.rs"]
pub(super) mod wires;

use guest::{Guest, connect, mac, packet};

/// A server that runs.
pub(super) struct Server {
    child: Option<Child>,
    arguments: Vec<String>,
    /// What it has said on stderr.
    said: Arc<Mutex<String>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Starts `vmring serve` on an embedded network, and waits until guests can join.
    fn new(arguments: &[&str]) -> Self {
        let arguments = [&["--network", "embedded:lab"], arguments].concat();
        Self::on(&arguments)
    }

    fn on(arguments: &[&str]) -> Self {
        let arguments = [&["serve", "--json"], arguments].concat();
        Self::of(Command::new(env!("CARGO_BIN_EXE_vmring")).args(&arguments), &arguments)
    }

    pub(super) fn of(command: &mut Command, arguments: &[&str]) -> Self {
        // Below sudo a server becomes the caller, who may not write into root's folders.
        let command = command.env_remove("SUDO_UID").env_remove("SUDO_GID");
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().expect("the command starts");
        let stderr = child.stderr.take().expect("piped");
        Self::reading(child, stderr, arguments)
    }

    /// A server that has been started, and what its stderr is read from.
    fn reading(child: Child, mut stderr: impl Read + Send + 'static, arguments: &[&str]) -> Self {
        let said = Arc::new(Mutex::new(String::new()));
        let heard = said.clone();
        let reader = thread::spawn(move || {
            let mut bytes = [0; 1024];
            // A terminal that nobody has open any more is an error, and no end.
            while let Ok(len) = stderr.read(&mut bytes)
                && len > 0
            {
                let words = String::from_utf8_lossy(&bytes[..len]);
                heard.lock().expect("nobody panics here").push_str(&words);
            }
        });
        let arguments = arguments.iter().map(ToString::to_string).collect();
        let server = Self { child: Some(child), arguments, said, reader: Some(reader) };
        server.until_said("guests can join");
        server
    }

    /// What it has said, in one line.
    fn said(&self) -> String {
        unfolded(self.said.lock().expect("nobody panics here").as_bytes())
    }

    fn until_said(&self, words: &str) {
        let start = Instant::now();
        while !self.said().contains(words) {
            let ended = self.reader.as_ref().is_none_or(thread::JoinHandle::is_finished);
            let hangs = start.elapsed() > LIMIT;
            assert!(!ended && !hangs, "it does not say '{words}', but: {}", self.said());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end, when its output is somebody else's.
    fn exit_code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            let child = self.child.as_mut().expect("it runs");
            if let Some(status) = child.try_wait().expect("it can be waited for") {
                return status.code();
            }
            assert!(start.elapsed() < LIMIT, "it does not end: {}", self.said());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, name: &str) {
        let id = self.child.as_ref().expect("it runs").id().to_string();
        let kill = Command::new("kill").args([&format!("-{name}"), &id]).status();
        assert!(kill.expect("there is kill").success());
    }

    /// Waits for the end: how it ended, what it printed, and what it said.
    fn ended(mut self) -> (std::process::ExitStatus, String, String) {
        let mut child = self.child.take().expect("it runs");
        let start = Instant::now();
        let mut stdout = child.stdout.take().expect("piped");
        let out = thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).map(|_| text)
        });
        let status = loop {
            if let Some(status) = child.try_wait().expect("it can be waited for") {
                break status;
            }
            if start.elapsed() > LIMIT {
                child.kill().expect("it can be killed");
                panic!("vmring {:?} does not end: {}", self.arguments, self.said());
            }
            thread::sleep(Duration::from_millis(5));
        };
        let printed = out.join().expect("the reader ends").expect("it prints text");
        self.reader.take().expect("it reads").join().expect("the reader ends");
        (status, printed, self.said())
    }

    /// Ends it by a signal, and returns its report. It ended well.
    pub(super) fn report(self, signal: &str) -> Value {
        self.signal(signal);
        let (status, printed, said) = self.ended();
        assert_eq!(status.code(), Some(0), "{signal}: {said}");
        let report: Value = serde_json::from_str(&printed).expect("one JSON object");
        assert_eq!((&report["ok"], &report["failed"]), (&true.into(), &Value::Null), "{said}");
        report
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What this returns, in any time that a test may take.
fn in_time<T: Send + 'static>(what: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || sender.send(f()));
    match receiver.recv_timeout(LIMIT) {
        Ok(done) => done,
        Err(_) if thread.is_finished() => panic!("it fails: {what}"),
        Err(_) => panic!("it hangs: {what}"),
    }
}

fn listen(path: &Path) -> String {
    format!("vhost-user:{}", path.display())
}

/// Two guests exchange packets of many lengths, and none is lost or changed.
fn exchange(a: &mut Guest, b: &mut Guest, numbers: std::ops::Range<u32>) {
    a.post(128);
    b.post(128);
    for number in numbers {
        let there = packet(a.mac, b.mac, 60 + number as usize * 37 % 1455, number);
        a.send(&there);
        assert_eq!(b.receive_ours(), there);
        let back = packet(b.mac, a.mac, 1514 - number as usize % 1400, number);
        b.send(&back);
        assert_eq!(a.receive_ours(), back);
    }
}

/// Whether the file of a socket is there.
fn is_socket(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|file| file.file_type().is_socket())
}

/// A counter of all guests of a socket.
fn count(report: &Value, socket: usize, name: &str) -> u64 {
    report["sockets"][socket]["counts"][name].as_u64().expect("a number")
}

/// How the last connection of a socket has ended.
fn last_end(report: &Value, socket: usize) -> &str {
    let ends = report["sockets"][socket]["ends"].as_array().expect("a list");
    ends.last().expect("an end")["how"].as_str().expect("words")
}

#[test]
fn two_guests_exchange_packets_through_a_server() {
    let folder = scratch("serve exchange");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let server = Server::new(&["--listen", &listen(&a), "--listen", &listen(&b)]);
    for path in [&a, &b] {
        let file = path.symlink_metadata().expect("the socket's file");
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
    }
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..100);
    let report = server.report("TERM");
    assert!(!is_socket(&a) && !is_socket(&b), "the sockets are removed");
    assert_eq!(report["network"]["name"], "embedded:lab");
    assert_eq!((&report["network"]["mtu"], &report["uplink"]), (&1500.into(), &Value::Null));
    for socket in 0..2 {
        assert_eq!(report["sockets"][socket]["connections"], 1);
        assert_eq!(last_end(&report, socket), "was connected when the server ended");
        assert_eq!(count(&report, socket, "tx_packets"), 100);
        assert_eq!(count(&report, socket, "rx_packets"), 100);
    }
    assert_eq!(count(&report, 0, "rx_bytes"), count(&report, 1, "tx_bytes"));
    assert_eq!(report["sockets"][0]["drops_by_reason"], serde_json::json!({}));
}

#[test]
fn each_signal_ends_a_server_with_its_report() {
    for signal in ["INT", "TERM", "HUP"] {
        let path = scratch(&format!("serve {signal}")).join("a.sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
        // SAFETY: signal(2) is safe to call between fork and exec, and touches no memory.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, || {
                // The tests may run under nohup(1), whose children ignore SIGHUP.
                libc::signal(libc::SIGHUP, libc::SIG_DFL);
                Ok(())
            })
        };
        let listen = listen(&path);
        let arguments = ["serve", "--json", "--network", "embedded:lab", "--listen", &listen];
        let server = Server::of(command.args(arguments), &arguments);
        let guest = Guest::new(&path, mac(1));
        let report = server.report(signal);
        assert!(guest.is_cut_off() && !is_socket(&path));
        assert_eq!(report["sockets"][0]["connections"], 1);
    }
}

/// For people there are tables, and a server ends by itself after a time.
#[test]
fn a_server_ends_after_its_time_with_tables() {
    let path = scratch("serve time").join("a.sock");
    let listen = listen(&path);
    let output = vmring(&[
        "serve",
        "--network",
        "embedded:lab,10.1.0.1/24",
        "--seconds",
        "1",
        "--listen",
        &listen,
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report = text(&output.stdout);
    for words in ["embedded:lab (MTU 1500), for 1.", "to guests", "Sandbox", "capabilities"] {
        assert!(report.contains(words), "no {words} in {report}");
    }
    assert!(unfolded(&output.stderr).contains("guests can join embedded:lab for 1 s"));
}

#[test]
fn a_server_with_wrong_arguments_says_so_in_a_sentence() {
    let folder = scratch("serve wrong");
    let file = folder.join("file");
    std::fs::write(&file, "no socket").expect("a file");
    let (file, long) = (listen(&file), listen(&folder.join("x".repeat(120))));
    let nowhere = listen(&folder.join("none/a.sock"));
    let socket = listen(&folder.join("a.sock"));
    let with = |arguments: &[&str]| {
        let arguments = [&["serve", "--network", "embedded:lab"], arguments].concat();
        refused(&arguments)
    };
    for (arguments, said) in [
        (&["--listen", &file][..], "exists and is no socket"),
        (&["--listen", &long], "vhost-user:"),
        (&["--listen", &nowhere], "No such file"),
        (&["--listen", "vhost-user:fd=99"], "vhost-user:fd=99: "),
        (&["--listen", "vhost-user:fd=1"], "is 3 or more"),
        (&["--listen", "quemu:/a"], "there is no wire"),
        (&["--listen", "vhost-user:fd=vm0"], "no socket with the name 'vm0', and none at all"),
        (&["--listen", &socket, "--metrics", "0.0.0.0:1"], "an address that others can reach"),
        (&["--listen", &socket, "--ready-fd", "99"], "--ready-fd 99: "),
        (&["--listen", &socket, "--ready-fd", "1"], "1 is not in"),
        (&["--listen", &socket, "--pid-file", "/dev/null"], "is no file for a process's number"),
        (&["--listen", &socket, "--pid-file", "/nonexistent/pid"], "cannot be written"),
        (&["--listen", &socket, "--user", "nobody-of-this-name"], "there is no user"),
        (&["--listen", &format!("{socket},capture=/nonexistent/x")], "the capture file"),
        (&["--listen", &socket, "--listen", &socket], "is there twice"),
        (&["--listen", &socket, "--mac", "52:54:00:00:00:01"], "is for one guest"),
        (&["--listen", &socket, "--queues", "0"], "0 is not in 1 to 16"),
        (&["--listen", &socket, "--queues", "17"], "17 is not in 1 to 16"),
        (&["--listen", &socket, "--connections", "0"], "0 is not in 1 to 1023"),
        (&["--listen", &socket, "--mtu", "7"], "embedded:lab: "),
        (&[], "--listen"),
    ] {
        let message = with(arguments);
        assert!(message.contains(said), "{arguments:?}: {message}");
    }
    for (network, said) in [
        ("pcap:x", "'pcap:x' is no network of a server"),
        ("capture:x", "is no network of a server"),
        ("embedded:", "needs the name of a network"),
        ("frob", "use embedded:NAME"),
    ] {
        let message = refused(&["serve", "--network", network, "--listen", &socket]);
        assert!(message.contains(said), "{network}: {message}");
    }
    assert!(!is_socket(&folder.join("a.sock")), "nothing is left");
}

/// What QEMU's conventions for back ends ask for.
#[test]
fn a_server_prints_its_capabilities() {
    let report = json(&["serve", "--print-capabilities"]);
    assert_eq!(report, serde_json::json!({ "type": "net", "features": [] }));
}

/// The socket of a server that was killed is replaced. That of one that lives is not.
#[test]
fn a_socket_that_is_left_over_is_replaced_and_one_in_use_is_not() {
    let path = scratch("serve stale").join("a.sock");
    let listen = listen(&path);
    let killed = Server::new(&["--listen", &listen]);
    drop(killed);
    assert!(is_socket(&path), "it is left over");
    let server = Server::new(&["--listen", &listen]);
    let second =
        vmring(&["serve", "--network", "embedded:other", "--listen", &listen, "--seconds", "1"]);
    assert_eq!(second.status.code(), Some(1));
    let said = unfolded(&second.stderr);
    assert!(said.contains("a server listens at"), "{said}");
    assert_eq!(text(&second.stdout), "");
    let guest = Guest::new(&path, mac(1));
    guest.sync();
    server.report("TERM");
    assert!(!is_socket(&path));
}

/// Goal: a server can be killed and started again under running guests. Their front ends connect
/// again, no packet that waits is lost or comes twice, and traffic goes on.
#[test]
fn a_server_is_killed_and_started_again_while_guests_run() {
    let folder = scratch("serve again");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let arguments = ["--listen", &listen(&a), "--listen", &listen(&b)];
    let mut server = Server::new(&arguments);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..20);
    for round in 1..4 {
        drop(server);
        assert!(one.is_cut_off() && two.is_cut_off());
        // The guest does not know, and goes on sending.
        let waiting = packet(one.mac, two.mac, 333, round);
        one.send(&waiting);
        server = Server::new(&arguments);
        two.rejoin(&b);
        one.rejoin(&a);
        assert_eq!(two.receive_ours(), waiting);
        exchange(&mut one, &mut two, 100..120);
    }
    assert_eq!(two.receive_within(Duration::from_millis(100)), None, "nothing comes twice");
    server.report("TERM");
}

/// A front end may leave and come again, and several may come to one socket.
#[test]
fn front_ends_come_and_go() {
    let path = scratch("serve come").join("a.sock");
    let server = Server::new(&["--listen", &listen(&path), "--connections", "2"]);
    for round in 0..5 {
        let (mut one, mut two) = (Guest::new(&path, mac(1)), Guest::new(&path, mac(2)));
        exchange(&mut one, &mut two, 0..10);
        if round == 0 {
            // There is no place for a third one until another leaves.
            let third = connect(&path);
            drop(two);
            Guest::on(third, frontend::memory(guest::MEMORY), mac(3));
        }
    }
    let report = server.report("INT");
    assert_eq!(report["sockets"][0]["connections"], 11);
    assert_eq!(report["sockets"][0]["ends"].as_array().expect("a list").len(), 8);
    assert_eq!(count(&report, 0, "tx_packets"), 100);
}

/// Goal: a front end that breaks the protocol loses its connection, and a flood of such front ends
/// fills no log.
#[test]
fn a_front_end_that_breaks_the_protocol_ends_alone() {
    let folder = scratch("serve hostile");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let server = Server::new(&["--listen", &listen(&a), "--listen", &listen(&b)]);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&a, mac(2)));
    for _ in 0..50 {
        let hostile = frontend::Frontend::on(connect(&b));
        hostile.send(&frontend::Sent::new(999, []));
        assert!(guest::is_cut_off(&hostile));
        exchange(&mut one, &mut two, 0..2);
    }
    let lines = server.said().matches("b.sock").count();
    assert!((1..80).contains(&lines), "{lines} lines for 100 events");
    let report = server.report("TERM");
    assert_eq!(report["sockets"][1]["connections"], 50);
    assert!(last_end(&report, 1).contains("vhost-user has no request 999"), "{report}");
    assert_eq!(count(&report, 0, "tx_packets"), 200);
}

/// Goal: a front end that makes its memory shorter loses its connection, whoever accesses the lost
/// pages, and nobody else notices.
#[test]
fn memory_that_shrinks_ends_one_connection() {
    let folder = scratch("serve shrink");
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.join(format!("{name}.sock")));
    let server =
        Server::new(&["--listen", &listen(&a), "--listen", &listen(&b), "--listen", &listen(&c)]);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..20);
    for round in 1..4 {
        let mut bad = Guest::new(&c, mac(3));
        exchange(&mut bad, &mut one, 0..3);
        match round {
            // Its own thread reads the rings, which are lost.
            1 => {
                bad.file.set_len(0).expect("the file is shortened");
                bad.kick_blindly();
            }
            // The thread of another writes into a buffer, which is lost.
            2 => {
                bad.file.set_len(guest::RINGS_LEN).expect("the file is shortened");
                one.send(&packet(one.mac, bad.mac, 1514, 7));
            }
            // Both at once.
            _ => {
                bad.file.set_len(0).expect("the file is shortened");
                one.send(&packet(one.mac, bad.mac, 1514, 7));
                bad.kick_blindly();
            }
        }
        assert!(bad.is_cut_off(), "round {round}");
        exchange(&mut one, &mut two, 0..20);
    }
    let report = server.report("TERM");
    assert_eq!(report["sockets"][2]["connections"], 3);
    let ends = report["sockets"][2]["ends"].as_array().expect("a list");
    for end in ends {
        let how = end["how"].as_str().expect("words");
        assert!(how.contains("has made the memory shorter that it shares"), "{how}");
    }
    assert_eq!(report["sockets"][0]["connections"], 1);
}

/// A SIGBUS that is not about a guest's memory ends the server, as without a handler.
#[test]
fn a_sigbus_that_is_sent_ends_a_server() {
    use std::os::unix::process::ExitStatusExt;
    let path = scratch("serve bus").join("a.sock");
    let server = Server::new(&["--listen", &listen(&path)]);
    server.signal("BUS");
    let (status, printed, _) = server.ended();
    assert_eq!((status.signal(), &*printed), (Some(libc::SIGBUS), ""));
}

/// Memory is sealed against shrinking, by the server where the front end has not done it. Where that is
/// not possible it is counted, or refused where seals are demanded.
#[cfg(target_os = "linux")]
#[test]
fn seals_are_demanded() {
    let folder = scratch("serve seals");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let one = format!("{},seals", listen(&a));
    let server = Server::new(&["--listen", &one, "--listen", &listen(&b)]);
    // Sealed by its front end, as QEMU's are; and left to the server to seal.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    for (number, seals) in [(1, seals), (3, 0)] {
        let file = frontend::memfd(guest::MEMORY, libc::MFD_ALLOW_SEALING, seals);
        let file = file.expect("a memory file");
        let same = file.try_clone().expect("the same file");
        Guest::on(connect(&a), file, mac(number)).sync();
        let shorter = same.set_len(0).expect_err("it is sealed");
        assert_eq!(shorter.raw_os_error(), Some(libc::EPERM));
    }
    let open = frontend::Frontend::on(connect(&a));
    guest::share(&open, &frontend::memory(guest::MEMORY));
    assert!(guest::is_cut_off(&open));
    Guest::new(&b, mac(2)).sync();
    let report = server.report("TERM");
    let unsealed = [0, 1].map(|socket| count(&report, socket, "unsealed_regions"));
    assert_eq!(unsealed, [0, 2], "both regions of the guest at b: {report:#}");
    let ends = report["sockets"][0]["ends"].as_array().expect("a list");
    let how: Vec<_> = ends.iter().map(|end| end["how"].as_str().expect("words")).collect();
    assert!(
        how.iter().any(|how| how.contains("the file is not sealed against shrinking")),
        "{how:?}"
    );
}

/// A front end that listens is connected to, when it is there, and again when it has gone.
#[test]
fn a_server_connects_to_front_ends_that_listen() {
    let folder = scratch("serve client");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let server =
        Server::new(&["--listen", &format!("{},client", listen(&a)), "--listen", &listen(&b)]);
    let mut two = Guest::new(&b, mac(2));
    let listener = std::os::unix::net::UnixListener::bind(&a).expect("a socket");
    for _ in 0..3 {
        let (socket, _) = listener.accept().expect("the server connects");
        let mut one = Guest::on(socket, frontend::memory(guest::MEMORY), mac(1));
        exchange(&mut one, &mut two, 0..5);
    }
    let report = server.report("TERM");
    assert_eq!(report["sockets"][0]["connections"], 3);
    assert!(is_socket(&a), "it is not the server's to remove");
}

/// A socket that another process has made is used, whether it listens or is connected.
#[test]
fn a_server_takes_over_inherited_sockets() {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    let path = scratch("serve inherit").join("a.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let (own, other) = UnixStream::pair().expect("sockets");
    let fds = [listener.as_raw_fd(), other.as_raw_fd()];
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    // SAFETY: fcntl(2) and dup2(2) are safe to call between fork and exec, and touch no memory.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
            for (fd, number) in fds.into_iter().zip([103, 104]) {
                if libc::dup2(fd, number) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        })
    };
    let arguments = ["serve", "--json", "--network", "embedded:lab", "--fd", "103"];
    let arguments = [&arguments[..], &["--listen", "vhost-user:fd=104"]].concat();
    let server = Server::of(command.args(&arguments), &arguments);
    drop((listener, other));
    let mut one = Guest::new(&path, mac(1));
    let mut two = Guest::on(own, frontend::memory(guest::MEMORY), mac(2));
    exchange(&mut one, &mut two, 0..10);
    let report = server.report("TERM");
    assert_eq!(report["sockets"][0]["name"], "vhost-user:fd=104");
    assert_eq!(report["sockets"][1]["name"], "vhost-user:fd=103");
    assert!(is_socket(&path), "it is not the server's to remove");

    // A connected socket is one guest; when it has gone there is nothing left to serve.
    let (own, other) = UnixStream::pair().expect("sockets");
    let fd = other.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    // SAFETY: as above.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
            match libc::dup2(fd, 103) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            }
        })
    };
    let arguments = ["serve", "--json", "--network", "embedded:lab", "--fd", "103"];
    let server = Server::of(command.args(arguments), &arguments);
    drop(other);
    drop(Guest::on(own, frontend::memory(guest::MEMORY), mac(1)));
    let (status, printed, said) = server.ended();
    assert_eq!(status.code(), Some(0), "{said}");
    let report: Value = serde_json::from_str(&printed).expect("one JSON object");
    assert_eq!(last_end(&report, 0), "has left");
}

/// The program that has started the server is told when guests can join, and when it ends.
#[test]
fn a_service_manager_is_told() {
    let folder = scratch("serve ready");
    let manager = std::os::unix::net::UnixDatagram::bind(folder.join("notify")).expect("a socket");
    manager.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let listen = listen(&folder.join("a.sock"));
    let arguments = ["serve", "--json", "--network", "embedded:lab", "--listen", &listen];
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    command.env("NOTIFY_SOCKET", folder.join("notify")).args(arguments);
    let server = Server::of(&mut command, &arguments);
    let told = || {
        let mut word = [0; 64];
        let len = manager.recv(&mut word).expect("a word");
        text(&word[..len]).to_owned()
    };
    assert_eq!(told(), "READY=1");
    assert!(is_socket(&folder.join("a.sock")), "it was true");
    server.report("TERM");
    assert_eq!(told(), "STOPPING=1");
}

/// The parts of the confinement, as the report has them.
#[cfg(target_os = "linux")]
const PARTS: [&str; 4] = ["new_privileges", "capabilities", "files_and_network", "system_calls"];

/// The kernel says of every thread of a server that it is confined, or that none is. The effective
/// capabilities are these. Returns the names of the threads.
#[cfg(target_os = "linux")]
fn confined_threads(server: &Server, confined: bool, capabilities: u64) -> Vec<String> {
    let process = format!("/proc/{}/task", server.child.as_ref().expect("it runs").id());
    let mut names = Vec::new();
    for thread in std::fs::read_dir(process).expect("the threads") {
        let status = thread.expect("a thread").path().join("status");
        let status = std::fs::read_to_string(status).expect("a status");
        let value = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect(name).trim().to_owned()
        };
        let name = value("Name:");
        assert_eq!(value("NoNewPrivs:"), if confined { "1" } else { "0" }, "{name}");
        assert_eq!(value("Seccomp:"), if confined { "2" } else { "0" }, "{name}");
        if confined {
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
                let bits = u64::from_str_radix(&value(set), 16).expect("bits");
                // Only root may empty the bounding set.
                // SAFETY: the call has no arguments and cannot fail.
                let is_root = unsafe { libc::geteuid() } == 0;
                let bounded = set == "CapBnd:" && !is_root;
                let kept = if matches!(set, "CapPrm:" | "CapEff:") { capabilities } else { 0 };
                assert!(bounded || bits == kept, "{name}: {set} {bits:x}");
            }
        }
        names.push(name);
    }
    names.sort_unstable();
    names
}

/// Waits for these threads, of which each one is confined. A thread gives itself its name when it runs.
#[cfg(target_os = "linux")]
fn expect_confined_threads(server: &Server, capabilities: u64, expected: &[&str]) {
    let start = Instant::now();
    loop {
        let threads = confined_threads(server, true, capabilities);
        if threads == expected {
            return;
        }
        assert!(start.elapsed() < LIMIT, "{threads:?}, and not {expected:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Goal: what the report says of the confinement is what the kernel says, of every thread.
#[cfg(target_os = "linux")]
#[test]
fn a_server_is_confined_unless_told_otherwise() {
    let path = scratch("serve confined").join("a.sock");
    let listen = listen(&path);
    for (extra, confined) in [(&[][..], true), (&["--no-sandbox"], false)] {
        let server = Server::new(&[&["--listen", &listen], extra].concat());
        let guest = Guest::new(&path, mac(1));
        guest.sync();
        let threads = confined_threads(&server, confined, 0);
        assert_eq!(threads, ["guest1", "signals", "vmring"]);
        let report = server.report("TERM");
        for part in PARTS {
            let part = &report["sandbox"][part];
            assert_eq!(part["complete"], confined, "{part}");
            let state = part["state"].as_str().expect("words");
            assert_eq!(state == "off: --no-sandbox", !confined, "{state}");
        }
    }
}

/// Goal: every thread of a server below a simulated vmnet, or with a file of leases, is confined. Those
/// threads belong to the network, which starts before the guests come.
#[cfg(target_os = "linux")]
#[test]
fn the_threads_of_a_network_are_confined_too() {
    let folder = scratch("serve network threads");
    let (path, file) = (folder.join("a.sock"), folder.join("leases"));
    let file = file.to_str().expect("UTF-8");
    for (network, thread) in [
        (&["--network", "vmnet-sim"][..], "vmring.interfac"),
        (&["--network", "embedded:lab", "--lease-file", file], "vmring-leases"),
    ] {
        let server = Server::on(&[network, &["--listen", &listen(&path)]].concat());
        let mut guest = Guest::new(&path, mac(1));
        guest.post(64);
        guest.lease();
        let start = Instant::now();
        while !confined_threads(&server, true, 0).iter().any(|name| name.starts_with(thread)) {
            assert!(start.elapsed() < LIMIT, "there is no thread {thread}");
            thread::sleep(Duration::from_millis(10));
        }
        let report = server.report("TERM");
        for part in PARTS {
            assert_eq!(report["sandbox"][part]["complete"], true, "{report:#}");
        }
    }
}

/// Goal: with busy polling the thread of a guest never prepares for sleep, and otherwise it does.
#[test]
fn a_server_that_polls_never_sleeps() {
    for (extra, polls) in [(&["--busy-poll"][..], true), (&[], false)] {
        let folder = scratch(&format!("serve polls {polls}"));
        let paths = ["a", "b"].map(|name| folder.join(name));
        let listens = paths.each_ref().map(|path| listen(path));
        let listens = ["--listen", &listens[0], "--listen", &listens[1]];
        let server = Server::new(&[&listens, extra].concat());
        let [mut a, mut b] =
            [(&paths[0], mac(1)), (&paths[1], mac(2))].map(|(path, mac)| Guest::new(path, mac));
        b.post(8);
        for number in 0..8 {
            let sent = packet(a.mac, b.mac, 100, number);
            a.send(&sent);
            assert_eq!(b.receive_ours(), sent);
            // By now a thread that may sleep does.
            thread::sleep(Duration::from_millis(20));
        }
        let report = server.report("TERM");
        for port in 0..2 {
            assert_eq!(count(&report, port, "wakes") == 0, polls, "{report:#}");
        }
    }
}

/// Goal: a guest sends from the address that its socket gives it, from the first that it uses, or from
/// any, and an isolated one reaches no other.
#[test]
fn a_sockets_rules_hold_for_its_guests() {
    let folder = scratch("serve rules");
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| folder.join(format!("{name}.sock")));
    let fixed = format!("{},mac=52:54:00:12:34:01,config", listen(&a));
    let isolated = format!("{},isolated", listen(&c));
    let limited = format!("{},send-packets=1", listen(&d));
    let all = ["--listen", &fixed, "--listen", &listen(&b), "--listen", &isolated];
    let server = Server::new(&[&all[..], &["--listen", &limited]].concat());
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    let (mut three, mut four) = (Guest::new(&c, mac(3)), Guest::new(&d, mac(4)));
    let config = one.ask(frontend::Sent::config(frontend::GET_CONFIG, 0, 0, &[0; 12]));
    assert_eq!(config.payload[12..18], mac(1), "the guest is told its address");
    exchange(&mut one, &mut two, 0..5);
    one.send(&packet(mac(9), two.mac, 60, 1));
    two.send(&packet(mac(8), one.mac, 60, 2));
    assert_eq!(one.receive_ours()[6..12], mac(8));
    // Its frame goes nowhere.
    three.send(&packet(three.mac, two.mac, 60, 3));
    three.sync();
    // 64 packets pass at once, and one more in each second.
    for number in 0..100 {
        four.send(&packet(four.mac, two.mac, 60, number));
    }
    four.until_taken();
    one.send(&packet(one.mac, two.mac, 60, 100));
    let mut passed = 0;
    loop {
        let came = two.receive_ours();
        if came == packet(one.mac, two.mac, 60, 100) {
            break;
        }
        let is_next = |number: &u32| came == packet(four.mac, two.mac, 60, *number);
        let number = (passed..100).find(is_next).expect("one of them, in order");
        assert!(number == passed || passed >= 64, "{number} after {passed}");
        passed += 1;
    }
    assert!((64..100).contains(&passed), "{passed} of 100 have passed");
    exchange(&mut one, &mut two, 5..10);
    let report = server.report("TERM");
    let dropped = |socket: usize, why: &str| {
        report["sockets"][socket]["drops_by_reason"][why].as_u64().unwrap_or(0)
    };
    assert_eq!(dropped(0, "spoofed"), 1, "{report:#}");
    assert_eq!(dropped(2, "isolated"), 1, "{report:#}");
    assert_eq!(dropped(3, "send limit"), u64::from(100 - passed), "{report:#}");
}
