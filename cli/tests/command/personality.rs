//! The helpers whose part the command takes, as their users' scripts start them. The virtual machines are
//! programs in Python that know nothing of vmring.

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};

use super::*;

const MAC: &str = "0a:d6:36:c1:ea:f3";
const ID: &str = "2835E074-9892-4A79-AFFB-7E41D2605678";

/// The path of a script.
fn script(name: &str) -> String {
    format!("{}/tests/command/personality/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn has_python() -> bool {
    let version = Command::new("python3").arg("--version").stdout(Stdio::null()).status();
    let has = version.is_ok_and(|status| status.success());
    if !has {
        use std::io::Write;
        let name = thread::current().name().unwrap_or("test").to_owned();
        let _ = writeln!(std::io::stderr(), "skipped: {name}: there is no python3");
    }
    has
}

/// A program of these tests, without what would change its network or user.
fn program(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null());
    for name in ["SUDO_UID", "SUDO_GID", "VMRING_NETWORK", "DEBUG"] {
        command.env_remove(name);
    }
    command
}

/// The command of a personality.
fn personality(words: &[&str]) -> Command {
    program(&[&[env!("CARGO_BIN_EXE_vmring")], words].concat())
}

/// Runs a program to its end.
fn run(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    ended(child.unwrap_or_else(|error| panic!("{command:?}: {error}")), &["..."])
}

/// The lines of a run that has succeeded.
fn lines(command: Command) -> Vec<String> {
    let output = run(command);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout).lines().map(str::to_owned).collect()
}

/// A helper that runs. It is killed when it is dropped.
struct Helper {
    child: Child,
    said: Arc<Mutex<String>>,
}

impl Helper {
    fn start(mut command: Command) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("the helper starts");
        let stderr = child.stderr.take().expect("piped");
        let said = Arc::new(Mutex::new(String::new()));
        let heard = said.clone();
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                heard.lock().expect("nobody panics here").push_str(&(line + "\n"));
            }
        });
        Self { child, said }
    }

    fn said(&self) -> String {
        self.said.lock().expect("nobody panics here").clone()
    }

    /// Waits until it has said this.
    fn until_said(&mut self, words: &str) {
        let start = Instant::now();
        while !self.said().contains(words) {
            let ended = self.child.try_wait().expect("it can be waited for");
            assert!(ended.is_none(), "it ends with {ended:?}: {}", self.said());
            assert!(start.elapsed() < LIMIT, "it does not say '{words}': {}", self.said());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn terminate(&self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().expect("kill").success());
    }

    /// Waits for its end: how it ended, and what it printed.
    fn ended(&mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it can be waited for") {
                break status;
            }
            assert!(start.elapsed() < LIMIT, "it does not end: {}", self.said());
            thread::sleep(Duration::from_millis(5));
        };
        let mut printed = String::new();
        let mut stdout = self.child.stdout.take().expect("piped");
        stdout.read_to_string(&mut printed).expect("text");
        (status, printed)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until this is true.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "it never happened: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A machine behind a path, in Python.
fn guest(how: &str, path: &Path, mac: &str) -> Vec<String> {
    let path = path.to_str().expect("a path of text");
    lines(program(&["python3", "-B", &script("guest.py"), how, path, mac]))
}

/// The line that a helper prints has vmnet's keys, and what its users read from them.
fn check_interface(line: &str) -> Value {
    let interface: Value = serde_json::from_str(line).expect("one JSON object");
    for (key, is) in interface.as_object().expect("an object") {
        let numbers = [
            "vmnet_write_max_packets",
            "vmnet_read_max_packets",
            "vmnet_mtu",
            "vmnet_max_packet_size",
        ];
        let texts = [
            "vmnet_subnet_mask",
            "vmnet_start_address",
            "vmnet_end_address",
            "vmnet_interface_id",
            "vmnet_mac_address",
            "vmnet_nat66_prefix",
        ];
        let known =
            is.is_u64() && numbers.contains(&&**key) || is.is_string() && texts.contains(&&**key);
        assert!(known, "{key}: {is}");
    }
    let required = ["vmnet_mac_address", "vmnet_start_address", "vmnet_end_address"];
    let required = required.iter().chain(&["vmnet_subnet_mask", "vmnet_interface_id"]);
    for key in required.chain(&["vmnet_max_packet_size", "vmnet_mtu"]) {
        assert!(!interface[key].is_null(), "{key} is missing: {interface}");
    }
    let mac = interface["vmnet_mac_address"].as_str().expect("text");
    assert_eq!((mac.len(), mac.to_lowercase()), (17, mac.to_owned()));
    interface
}

/// Goal: a program that starts a helper with a socket pair gets one line of JSON, starts a machine with its
/// address, and ends the helper by SIGTERM, with the exit code 0.
#[test]
fn an_owner_gives_a_vmnet_helper_one_end_of_a_socket_pair() {
    if !has_python() {
        return;
    }
    let vmring = env!("CARGO_BIN_EXE_vmring");
    let owner = |network: &str, options: &[&str]| {
        let owner = script("owner.py");
        let words = ["python3", "-B", &owner, vmring, "vmnet-helper", "--"];
        let mut command = program(&[&words, options].concat());
        command.env("VMRING_NETWORK", network);
        let lines = lines(command);
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert_eq!(lines[2], "0 0", "the helper ends well, and prints nothing more");
        (check_interface(&lines[0]), lines[1].clone())
    };
    let mut networks = vec!["embedded"];
    if cfg!(not(target_os = "macos")) {
        networks.push("vmnet-sim");
    }
    for network in networks {
        let id = format!("--interface-id={ID}");
        let (interface, got) = owner(network, &[&id]);
        assert_eq!(interface["vmnet_interface_id"], ID);
        assert_eq!(interface["vmnet_start_address"], "192.168.64.1");
        assert!(
            got.starts_with("192.168.64.") && got.ends_with(" 192.168.64.1 192.168.64.1"),
            "{got}"
        );
        // The same identity has the same address.
        let lower = ["--interface-id", &ID.to_lowercase()];
        let (again, _) = owner(network, &[&lower[..], &["--operation-mode=shared"]].concat());
        assert_eq!(again["vmnet_mac_address"], interface["vmnet_mac_address"]);
        // A subnet with space for one guest, as anylinuxfs has it.
        let subnet = [
            "--start-address=192.168.200.1",
            "--end-address=192.168.200.2",
            "--subnet-mask=255.255.255.252",
        ];
        let (interface, got) = owner(network, &subnet);
        assert_eq!(interface["vmnet_start_address"], "192.168.200.1");
        assert_eq!(interface["vmnet_end_address"], "192.168.200.2");
        assert_eq!(interface["vmnet_subnet_mask"], "255.255.255.252");
        assert_eq!(got, "192.168.200.2 192.168.200.1 192.168.200.1");
        // As krunkit's owners have it, whose machines take whole frames too.
        let offload = ["--enable-tso", "--enable-checksum-offload", "--verbose"];
        let (_, got) = owner(network, &offload);
        assert!(got.ends_with(" 192.168.64.1 192.168.64.1"), "{got}");
        let (interface, got) = owner(network, &["--operation-mode", "host"]);
        assert_eq!(interface["vmnet_start_address"], "192.168.128.1");
        assert!(got.ends_with(" 192.168.128.1 -"), "the mode host has no router: {got}");
    }
}

/// Goal: the script of vmnet-helper's guide works: the helper makes a socket and waits for a client, whose
/// address is in a file. The client is vfkit, or one whose first message is a short frame.
#[test]
fn a_vmnet_helper_waits_at_a_path_for_its_one_client() {
    if !has_python() {
        return;
    }
    let folder = scratch("vmnet-helper");
    for how in ["vfkit", "quiet"] {
        let socket = folder.join(format!("{how}.sock"));
        let name = socket.to_str().expect("a path of text");
        let mut helper =
            Helper::start(personality(&["vmnet-helper", "--socket", name, "--stats-interval=1"]));
        helper.until_said(&format!("INFO  [main] waiting for client on \"{name}\"\n"));
        let kind = std::fs::metadata(&socket).expect("a socket");
        assert!(kind.file_type().is_socket());
        assert_eq!(kind.permissions().mode() & 0o777, 0o600);
        assert!(folder.join(format!("{how}.sock.lock")).exists());
        // A second one does not get the socket.
        let second = run(personality(&["vmnet-helper", "--socket", name]));
        assert_eq!(second.status.code(), Some(1), "{}", text(&second.stderr));
        assert_eq!(text(&second.stdout), "");
        assert!(text(&second.stderr).contains("ERROR [main] "), "{}", text(&second.stderr));
        #[cfg(target_os = "linux")]
        check_confined(helper.child.id());
        let got = guest(how, &socket, MAC);
        assert!(got[0].ends_with(" 192.168.64.1 192.168.64.1"), "{got:?}");
        // It ends with its client.
        let (status, printed) = helper.ended();
        assert_eq!(status.code(), Some(0), "{}", helper.said());
        check_interface(&printed);
        assert_eq!(printed.lines().count(), 1);
        let said = helper.said();
        for words in [
            "INFO  [main] running vmnet-helper v",
            "INFO  [main] started vmnet interface\n",
            &format!("INFO  [main] serving client on \"{name}\"\n"),
            "INFO  [main] started host forwarding\n",
            "INFO  [main] started vm forwarding\n",
            "INFO  [main] reporting stats every 1 seconds\n",
            "INFO  [vm->host] socket was closed by peer\n",
            "INFO  [main] stopped vmnet interface\n",
        ] {
            assert!(said.contains(words), "{words:?} is not in: {said}");
        }
        assert!(!socket.exists() && !folder.join(format!("{how}.sock.lock")).exists());
    }
}

/// The helper has no privileges, files and network, and few system calls.
#[cfg(target_os = "linux")]
fn check_confined(id: u32) {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).expect(name);
        line.split_whitespace().nth(1).expect("a value").to_owned()
    };
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
    assert_eq!(field("CapEff:"), "0000000000000000");
}

/// Goal: a helper has one client and no other one: it hears nobody else while the first is there, and serves
/// nobody after it.
#[test]
fn a_vmnet_helper_ignores_further_clients() {
    let folder = scratch("vmnet-helper one");
    let socket = folder.join("s");
    let name = socket.to_str().expect("a path of text");
    let mut helper = Helper::start(personality(&["vmnet-helper", "-s", name]));
    helper.until_said("waiting for client");
    let client = |own: &str| {
        let client = UnixDatagram::bind(folder.join(own)).expect("a socket of its own");
        client.set_read_timeout(Some(LIMIT)).expect("a timeout");
        client
    };
    let (first, second) = (client("first"), client("second"));
    let ask = |sender: u8| {
        let mac = [2, 0, 0, 0, 0, sender];
        let mut frame = [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac].concat();
        frame.extend([192, 168, 64, 90 + sender, 0, 0, 0, 0, 0, 0, 192, 168, 64, 1]);
        frame
    };
    first.send_to(&ask(1), &socket).expect("it is taken");
    let mut answer = [0; 2000];
    let (len, _) = first.recv_from(&mut answer).expect("an answer in time");
    assert_eq!((&answer[..6], &answer[12..14]), (&[2, 0, 0, 0, 0, 1][..], &[8, 6][..]));
    assert!(len >= 42);
    // Linux refuses it, and macOS drops it.
    let _ = second.send_to(&ask(2), &socket);
    first.send_to(&ask(1), &socket).expect("it is taken");
    first.recv_from(&mut answer).expect("an answer in time");
    second.set_nonblocking(true).expect("a flag");
    assert!(second.recv_from(&mut answer).is_err(), "the second one is answered");
    drop(first);
    assert_eq!(helper.ended().0.code(), Some(0), "{}", helper.said());
    assert!(!socket.exists());
}

/// Goal: counters are logged in the original's form, at the interval.
#[test]
fn a_vmnet_helper_logs_its_counters() {
    let folder = scratch("vmnet-helper stats");
    let socket = folder.join("s");
    let name = socket.to_str().expect("a path of text");
    let mut helper =
        Helper::start(personality(&["vmnet-helper", "-s", name, "--stats-interval", "1"]));
    helper.until_said("waiting for client");
    let client = UnixDatagram::bind(folder.join("own")).expect("a socket of its own");
    let frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1], &[0x88, 0xb5], &[0; 50]].concat();
    client.send_to(&frame, &socket).expect("it is taken");
    // One that is too short is dropped.
    client.send_to(&frame[..13], &socket).expect("it is taken");
    helper.until_said("\"vm\": {\"packets\": 1, \"bytes\": 64, \"drops\": 1,");
    let said = helper.said();
    let line = said.lines().rev().find(|line| line.starts_with("INFO  [stats] ")).expect("a line");
    let stats: Value = serde_json::from_str(&line["INFO  [stats] ".len()..]).expect("JSON");
    for way in ["host", "vm"] {
        for name in ["packets", "bytes", "drops", "fast", "slow"] {
            assert!(stats[way][name].is_u64(), "{way} {name}: {stats}");
        }
    }
    let time = stats["time"].as_str().expect("text");
    assert!(time.len() == 29 && time.ends_with("+00:00"), "{time}");
}

/// Goal: `vmnet-run` gives its command a socket under the number 4 on which a helper is, and ends as the
/// command does. The helper ends with it.
#[test]
fn vmnet_run_starts_a_command_beside_a_helper() {
    if !has_python() {
        return;
    }
    let guest = script("guest.py");
    let words = ["vmnet-run", "--operation-mode", "shared", "--", "python3", "-B", &guest];
    let output = run(personality(&[&words[..], &["datagram", "4", MAC]].concat()));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    // The client of a descriptor is there from the start, and nobody waits for it.
    let said = text(&output.stderr);
    assert_eq!(said.matches("[main] running\n").count(), 1, "{said}");
    assert!(!said.contains("serving client"), "{said}");
    // The helper's line is on the same stdout, as with the original.
    let lines: Vec<_> = text(&output.stdout).lines().collect();
    let got: Vec<_> = lines.iter().filter(|line| !line.starts_with('{')).collect();
    assert!(got.len() == 1 && got[0].ends_with(" 192.168.64.1 192.168.64.1"), "{lines:?}");
    check_interface(lines.iter().find(|line| line.starts_with('{')).expect("the helper's line"));
    // Exit codes, of the command and of what ended it.
    for (words, code) in [
        (&["vmnet-run", "--", "sh", "-c", "exit 7"][..], 7),
        (&["vmnet-run", "sh", "-c", "kill -9 $$"], 128 + 9),
        (&["vmnet-run", "--", "/nonexistent/command"], 1),
        (&["vmnet-run"], 1),
        (&["vmnet-run", "--operation-mode", "nat", "--", "true"], 1),
    ] {
        let output = run(personality(words));
        assert_eq!(output.status.code(), Some(code), "{words:?}: {}", text(&output.stderr));
    }
}

/// Goal: each signal that ends `vmnet-run` ends its command and its helper, and what it returns says so. A
/// SIGHUP that nohup(1) has it ignore ends nothing.
#[test]
fn a_signal_ends_vmnet_run_with_its_command_and_its_helper() {
    use std::os::unix::process::CommandExt;

    let script = "echo started >&2; exec sleep 600";
    let words = ["vmnet-run", "-v", "--", "sh", "-c", script];
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let mut command = personality(&words);
        if signal == libc::SIGTERM {
            // SAFETY: signal(2) is safe to call between fork and exec, and touches no memory.
            unsafe {
                command.pre_exec(|| {
                    libc::signal(libc::SIGHUP, libc::SIG_IGN);
                    Ok(())
                })
            };
        }
        let mut owner = Helper::start(command);
        owner.until_said("started\n");
        // The helper says that it runs too.
        owner.until_said("started helper (pid ");
        owner.until_said("started command (pid ");
        let pid = |what: &str| -> libc::pid_t {
            let said = owner.said();
            let (_, rest) = said.split_once(&format!("started {what} (pid ")).expect("it says so");
            rest.split(')').next().and_then(|pid| pid.parse().ok()).expect("a number")
        };
        let children = [pid("helper"), pid("command")];
        let kill = |signal: i32| {
            let id = owner.child.id() as libc::pid_t;
            // SAFETY: the call takes numbers only, and the process was not waited for.
            assert_eq!(unsafe { libc::kill(id, signal) }, 0);
        };
        if signal == libc::SIGTERM {
            kill(libc::SIGHUP);
        }
        kill(signal);
        assert_eq!(owner.ended().0.code(), Some(128 + signal), "{}", owner.said());
        for pid in children {
            // SAFETY: the call takes numbers only, and the signal 0 does nothing.
            assert!(unsafe { libc::kill(pid, 0) } < 0, "{pid} is left after signal {signal}");
        }
    }
}

/// A daemon, its socket and the file with its number.
fn daemon(folder: &Path) -> (Helper, PathBuf, PathBuf) {
    let (socket, pidfile) = (folder.join("socket_vmnet"), folder.join("pid"));
    let [path, pid] = [&socket, &pidfile].map(|path| path.to_str().expect("a path of text"));
    let gateway = "--vmnet-gateway=192.168.105.1";
    let mut daemon = Helper::start(personality(&["socket_vmnet", "-p", pid, gateway, path]));
    daemon.until_said("INFO | * vmnet_start_address: 192.168.105.1\n");
    eventually("the socket is there", || UnixStream::connect(path).is_ok());
    (daemon, socket, pidfile)
}

/// Goal: the test of socket_vmnet's repository: a daemon, and a client that starts a machine with the
/// connection under the number 3, which gets an address of the daemon's network.
#[test]
fn socket_vmnet_serves_what_socket_vmnet_client_starts() {
    if !has_python() {
        return;
    }
    let folder = scratch("socket_vmnet");
    let (mut daemon, socket, pidfile) = daemon(&folder);
    let number = std::fs::read_to_string(&pidfile).expect("a file");
    assert_eq!(number.trim(), daemon.child.id().to_string());
    let path = socket.to_str().expect("a path of text");
    let guest = script("guest.py");
    let mut addresses = Vec::new();
    for (dashes, mac) in [(&[][..], MAC), (&["--"][..], "0a:d6:36:c1:ea:f4")] {
        let client = [&["socket_vmnet_client", path], dashes, &["python3", "-B", &guest]].concat();
        let got = lines(personality(&[&client[..], &["stream", "3", mac]].concat()));
        assert!(got[0].ends_with(" 192.168.105.1 192.168.105.1"), "{got:?}");
        addresses.push(got[0].clone());
    }
    assert_ne!(addresses[0], addresses[1]);
    daemon.until_said("Closing a connection (guest 2): it has left\n");
    #[cfg(target_os = "linux")]
    check_confined(daemon.child.id());
    daemon.terminate();
    let (status, printed) = daemon.ended();
    assert_eq!((status.code(), &*printed), (Some(0), ""), "{}", daemon.said());
    assert!(!pidfile.exists() && !socket.exists());
    let said = daemon.said();
    for words in [
        "INFO | Initializing vmnet.framework (mode 1001)\n",
        "INFO | Accepted a connection (guest 1)\n",
        "INFO | Created pidfile ",
        "INFO | Removed pidfile ",
    ] {
        assert!(said.contains(words), "{words:?} is not in: {said}");
    }
}

/// Goal: two machines on one socket reach each other, whatever the number of the socket is.
#[test]
fn clients_of_socket_vmnet_reach_each_other() {
    use super::serve::wires::{Wire, exchange};

    let folder = scratch("socket_vmnet two");
    let (_daemon, socket, _) = daemon(&folder);
    let mut one = Wire::stream(&socket, [2, 0, 0, 0, 0, 1]);
    let mut other = Wire::stream(&socket, [2, 0, 0, 0, 0, 2]);
    exchange(&mut one, &mut other, 0..20);
}

/// Goal: the members of a group may connect, and nobody else.
#[cfg(target_os = "linux")]
#[test]
fn a_socket_of_socket_vmnet_is_shared_with_a_group() {
    use std::os::unix::fs::MetadataExt;

    let folder = scratch("socket_vmnet group");
    // SAFETY: it has no arguments and cannot fail.
    let (gid, is_root) = unsafe { (libc::getegid(), libc::geteuid() == 0) };
    let groups = std::fs::read_to_string("/etc/group").expect("the groups of the system");
    let named = |wanted: &dyn Fn(&[&str]) -> bool| {
        let mut lines = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
        lines
            .find(|fields| wanted(fields))
            .map(|fields| (fields[0].to_owned(), fields[2].to_owned()))
    };
    let own = named(&|fields| match is_root {
        true => fields[2] != "0",
        false => fields[2] == gid.to_string(),
    });
    let (name, number) = own.expect("a group");
    let socket = folder.join("s");
    let path = socket.to_str().expect("a path of text");
    let group = format!("--socket-group={name}");
    let _daemon = Helper::start(personality(&["socket_vmnet", &group, path]));
    eventually("the socket is shared", || {
        std::fs::metadata(&socket).is_ok_and(|found| found.mode() & 0o777 == 0o770)
    });
    assert_eq!(std::fs::metadata(&socket).expect("a socket").gid().to_string(), number);
}

/// Goal: the connection is the number 3 whatever has that number before, and stays when it has it already.
#[test]
fn socket_vmnet_client_gives_the_number_3() {
    use std::os::unix::process::CommandExt;

    let folder = scratch("socket_vmnet client");
    let socket = folder.join("s");
    let path = socket.to_str().expect("a path of text");
    let listener = UnixListener::bind(&socket).expect("a socket");
    for occupied in [false, true] {
        let say =
            ["socket_vmnet_client", path, "sh", "-c", "echo here >&3; echo $0 $1", "a", "--", "x"];
        let mut command = personality(&say);
        let file = std::fs::File::open("/dev/null").expect("a file");
        let fd = file.as_raw_fd();
        // SAFETY: the closure makes one system call.
        unsafe {
            command.pre_exec(move || {
                if occupied && libc::dup2(fd, 3) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let client = thread::spawn(move || run(command));
        let (mut connection, _) = listener.accept().expect("it connects");
        connection.set_read_timeout(Some(LIMIT)).expect("a timeout");
        let mut words = String::new();
        connection.read_to_string(&mut words).expect("its words");
        assert_eq!(words, "here\n", "occupied: {occupied}");
        let output = client.join().expect("it ends");
        // What is behind the command is its own, also two dashes.
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "a --\n"));
    }
    let missing = folder.join("missing");
    let missing = missing.to_str().expect("a path of text");
    for (words, said) in [
        (&["socket_vmnet_client", missing, "true"][..], "Failed to connect to \""),
        (
            &["socket_vmnet_client", path, "/nonexistent"],
            "Failed to exec \"/nonexistent\": No such",
        ),
        (&["socket_vmnet_client", path], "Missing argument: "),
        (&["socket_vmnet_client"], "Missing argument: "),
    ] {
        let output = run(personality(words));
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""), "{words:?}");
        assert!(text(&output.stderr).starts_with(said), "{words:?}: {}", text(&output.stderr));
    }
}

/// Goal: a link of its name is the helper, and a command of the same name is none of the program's arguments.
#[test]
fn a_link_is_the_helper_of_its_name() {
    let folder = scratch("links");
    let link = |name: &str| {
        let path = folder.join(name);
        symlink(env!("CARGO_BIN_EXE_vmring"), &path).expect("a link");
        path.to_str().expect("a path of text").to_owned()
    };
    for name in ["vmnet-helper", "vmnet-run"] {
        let lines = lines(program(&[&link(name), "--version"]));
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].starts_with("version: v") && lines[0].contains(env!("CARGO_PKG_VERSION")));
        assert!(lines[1].starts_with("commit: "), "{lines:?}");
    }
    let lines = lines(program(&[&link("socket_vmnet"), "--version"]));
    assert!(lines.len() == 1 && lines[0].starts_with('v'), "{lines:?}");
    // A copy that is `vmnet-run` finds itself as the helper.
    let output = run(program(&[&folder.join("vmnet-run").display().to_string(), "true"]));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = run(program(&[&link("socket_vmnet_client"), "/nonexistent", "true"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("Failed to connect to \"/nonexistent\""));
}

/// Goal: what is wrong is said in one sentence of the original's, and the exit code is 1.
#[test]
fn wrong_arguments_are_refused_as_by_the_originals() {
    for (words, said) in [
        (&["vmnet-helper"][..], "ERROR Missing argument: either \"fd\" or \"socket\" required"),
        (&["vmnet-helper", "--bogus"], "ERROR [main] Invalid option: --bogus"),
        (&["vmnet-helper", "--fd"], "ERROR [main] Option --fd requires an argument"),
        (&["vmnet-helper", "--fd", "three"], "ERROR Invalid fd 'three'"),
        (&["vmnet-helper", "--fd=99"], "ERROR [main] vfkit:fd=99: Bad file descriptor"),
        (&["vmnet-helper", "--fd=3", "--network=x"], "ERROR --network needs vmnet-broker"),
        (&["vmnet-run", "--bogus", "--", "true"], "ERROR [runner] Invalid option: --bogus"),
        (&["vmnet-run"], "ERROR [runner] no command specified"),
        (&["socket_vmnet", "--bogus", "s"], "ERROR| Invalid option: --bogus"),
        (&["socket_vmnet"], "ERROR| Missing argument: <SOCKET>"),
        (&["socket_vmnet", "--vmnet-mode=x", "s"], "ERROR| Unknown vmnet mode \"x\""),
    ] {
        let output = run(personality(words));
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        assert_eq!(text(&output.stdout), "", "{words:?}");
        let stderr = text(&output.stderr);
        let line = stderr.lines().find(|line| line.starts_with("ERROR")).unwrap_or_default();
        assert!(line.starts_with(said), "{words:?}: {stderr}");
    }
    let mut command = personality(&["vmnet-helper", "--fd=3"]);
    command.env("VMRING_NETWORK", "lan");
    let output = run(command);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("VMRING_NETWORK is embedded"),
        "{}",
        text(&output.stderr)
    );
}

/// Goal: the command's help has the helpers, and theirs names the original.
#[test]
fn the_helpers_have_help() {
    let help = lines(personality(&["--help"])).join("\n");
    for name in ["vmnet-helper", "vmnet-run", "socket_vmnet", "socket_vmnet_client"] {
        assert!(help.contains(&format!("  {name} ")), "{help}");
        let own = lines(personality(&[name, "--help"]));
        assert!(own.iter().any(|line| line.contains("takes the part of")), "{own:?}");
        assert!(own.iter().all(|line| line.chars().count() <= 80), "{own:?}");
    }
}
