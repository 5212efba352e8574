//! The list of system calls is what a server calls: no more, and no less. A server is traced through
//! its life, in each of its kinds.
//!
//! A call that is not in the list ends the server, which these tests and all others would see. So what
//! is left to show is that each call of the list is needed.

use std::collections::BTreeSet;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::ptr;

use super::frontend::*;
use super::guest::{self, Guest, connect, mac, packet};
use super::*;
use crate::tap::is_possible;

#[path = "../../../src/serve/calls.rs"]
#[allow(dead_code)] // The filter needs more of it.
mod table;

use table::{CALLS, Call, When};

/// The guide page lists the calls of the translator, and the others that a program needs for it. What the
/// table has for it alone is in the first list, and the rest is what every server may call.
#[test]
#[cfg(all(target_arch = "x86_64", not(target_env = "musl")))]
fn the_guide_has_the_translators_calls() {
    let guide = include_str!("../../../../docs/nat.md");
    let row = |start: &str| -> BTreeSet<&str> {
        let line = guide.lines().find(|line| line.starts_with(start)).expect("a row");
        let calls = line.split(" | ").nth(1).expect("a column");
        // What is in brackets is an argument.
        let calls = calls.split('(').map(|part| part.rsplit(')').next().expect("a part"));
        calls.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
    };
    let of = |whens: &[When]| -> BTreeSet<&str> {
        CALLS.iter().filter(|call| whens.contains(&call.when)).map(|call| call.name).collect()
    };
    let own: BTreeSet<&str> = row("| flows |").union(&row("| its start |")).copied().collect();
    assert_eq!(own, of(&[When::Nat]));
    let resolvers = row("| the host's resolvers");
    assert_eq!(resolvers, of(&[When::Resolvers]));
    let others = row("| what most programs need anyway |");
    let always = of(&[When::Always, When::Elsewhere]);
    let strange: Vec<_> = others.difference(&always).collect();
    assert!(strange.is_empty(), "the table does not have {strange:?} for every server");
}

/// A server under strace(1), which writes its calls to a file.
struct Traced {
    server: Server,
    file: PathBuf,
}

impl Traced {
    fn new(folder: &Path, arguments: &[&str]) -> Self {
        let (file, mut command, arguments) = Self::command(folder, arguments);
        Self { server: Server::of(&mut command, &as_strs(&arguments)), file }
    }

    /// A server whose stderr is a terminal.
    fn on_terminal(folder: &Path, arguments: &[&str]) -> Self {
        let (file, mut command, arguments) = Self::command(folder, arguments);
        let (here, there) = terminal();
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(there);
        let child = command.spawn().expect("the command starts");
        Self { server: Server::reading(child, here, &as_strs(&arguments)), file }
    }

    fn command(folder: &Path, arguments: &[&str]) -> (PathBuf, Command, Vec<String>) {
        let file = folder.join("calls");
        let arguments = [&["serve", "--json"], arguments].concat();
        let mut command = Command::new("strace");
        // With -D the server is the child, and strace a stranger. So signals reach the server.
        command.args(["-D", "-f", "-qq", "-o"]).arg(&file);
        command.arg(env!("CARGO_BIN_EXE_vmring")).args(&arguments);
        let arguments = arguments.iter().map(ToString::to_string).collect();
        (file, command, arguments)
    }

    /// The calls that it made after it had confined itself: of all threads, or of each whose name begins so.
    fn calls(file: &Path, threads: Option<&str>) -> BTreeSet<String> {
        let trace = std::fs::read_to_string(file).expect("a trace");
        let (_, after) = trace.rsplit_once("seccomp(SECCOMP_SET_MODE_FILTER").expect("a filter");
        let (_, after) = after.split_once('\n').expect("a line");
        let numbers = threads.map(|name| Self::threads(&trace, name));
        let is_its = |line: &&str| {
            let number = line.split_whitespace().next();
            numbers.as_ref().is_none_or(|all| number.is_some_and(|number| all.contains(number)))
        };
        let name = |line: &str| {
            let (_, call) = line.split_once(' ')?;
            let (name, _) = call.trim_start().split_once('(')?;
            let is_name =
                |letter: char| letter.is_ascii_lowercase() || "_0123456789".contains(letter);
            name.chars().all(is_name).then(|| name.to_owned())
        };
        after.lines().filter(is_its).filter_map(name).collect()
    }

    /// The numbers of the threads whose names begin so.
    fn threads<'t>(trace: &'t str, name: &str) -> BTreeSet<&'t str> {
        let names = format!("prctl(PR_SET_NAME, \"{name}");
        let lines = trace.lines().filter(|line| line.contains(&names));
        lines.map(|line| line.split_whitespace().next().expect("its number")).collect()
    }

    /// Ends it by a signal, and returns its calls.
    fn ended(self) -> BTreeSet<String> {
        let Self { server, file } = self;
        let report = server.report("TERM");
        assert_eq!(report["sandbox"]["system_calls"]["complete"], true, "{report:#}");
        Self::complete(&file)
    }

    /// The calls, when strace has written the last one.
    fn complete(file: &Path) -> BTreeSet<String> {
        let start = Instant::now();
        loop {
            let trace = std::fs::read_to_string(file).expect("a trace");
            if trace.contains("exit_group(") || trace.contains("+++ killed") {
                return Self::calls(file, None);
            }
            assert!(start.elapsed() < LIMIT, "the trace does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn as_strs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// A terminal: the end for this process, and the one for the other.
fn terminal() -> (std::fs::File, std::fs::File) {
    use std::os::fd::FromRawFd;
    let (mut here, mut there) = (0, 0);
    let (name, modes, size) = (ptr::null_mut(), ptr::null(), ptr::null());
    // SAFETY: the first two pointers are to numbers that live until the call returns, and the others
    // may be null.
    let opened = unsafe { libc::openpty(&mut here, &mut there, name, modes, size) };
    assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call has just opened both.
    unsafe { (std::fs::File::from_raw_fd(here), std::fs::File::from_raw_fd(there)) }
}

fn skip(what: &str) {
    let name = thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {what}");
}

/// What a server does for guests: connections, packets, a migration, front ends that go away or break
/// the rules, memory that shrinks, a stop and its end.
fn life(folder: &Path) -> BTreeSet<String> {
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let traced = Traced::new(
        folder,
        &["--network", "embedded:lab", "--listen", &listen(&a), "--listen", &listen(&b)],
    );
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..10);
    // A channel for the server's own requests, and sockets instead of pipes.
    let (channel, _) = UnixStream::pair().expect("sockets");
    one.frontend.send(&Sent::new(SET_BACKEND_REQ_FD, []).with(&channel));
    one.use_sockets();
    exchange(&mut one, &mut two, 0..10);
    // A migration: the log, the end of the rings, the device's state.
    let log = memory(1 << 20);
    one.ask(Sent::new(SET_LOG_BASE, u64s(&[1 << 20, 0])).with(&log));
    one.log(true);
    exchange(&mut one, &mut two, 0..10);
    one.stop_rings();
    let (mut state, writer) = std::io::pipe().expect("a pipe");
    one.ask(Sent::new(SET_DEVICE_STATE_FD, u32s(&[0, 0])).with(&writer));
    drop(writer);
    state.read_to_end(&mut Vec::new()).expect("the state");
    assert_eq!(one.ask(Sent::new(CHECK_DEVICE_STATE, [])).number(), 0);
    drop(one);
    // It comes from elsewhere, and is announced.
    let mut one = Guest::new(&a, mac(1));
    one.frontend.send(&Sent::new(SEND_RARP, [&mac(1)[..], &[0, 0]].concat()));
    one.frontend.send(&Sent::number(NET_SET_MTU, 1400));
    one.sync();
    exchange(&mut one, &mut two, 0..10);
    // The server sleeps while it is stopped, and goes on.
    traced.server.signal("STOP");
    thread::sleep(Duration::from_millis(50));
    traced.server.signal("CONT");
    exchange(&mut one, &mut two, 0..10);
    // A front end that does not wait for its interrupts.
    let mut deaf = Guest::new(&a, mac(3));
    deaf.post(8);
    deaf.close_calls();
    for number in 0..4 {
        one.send(&packet(one.mac, [0xff; 6], 60, number));
    }
    deaf.sync();
    // One whose memory shrinks, and one that breaks the protocol.
    let bad = Guest::new(&a, mac(4));
    bad.file.set_len(0).expect("the file is shortened");
    let mut bad = bad;
    bad.kick_blindly();
    assert!(bad.is_cut_off());
    let hostile = Frontend::on(connect(&a));
    hostile.send(&Sent::new(999, []));
    assert!(guest::is_cut_off(&hostile));
    exchange(&mut one, &mut two, 0..10);
    traced.ended()
}

/// A SIGBUS that is not about a guest.
fn end_by_bus(folder: &Path) -> BTreeSet<String> {
    let path = folder.join("a.sock");
    let traced = Traced::new(folder, &["--network", "embedded:lab", "--listen", &listen(&path)]);
    traced.server.signal("BUS");
    traced.server.ended();
    Traced::complete(&traced.file)
}

/// It connects, again and again.
fn client(folder: &Path) -> BTreeSet<String> {
    let path = folder.join("a.sock");
    let client = format!("{},client", listen(&path));
    let traced = Traced::new(folder, &["--network", "embedded:lab", "--listen", &client]);
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    for _ in 0..2 {
        let (socket, _) = listener.accept().expect("the server connects");
        Guest::on(socket, memory(guest::MEMORY), mac(1)).sync();
    }
    traced.ended()
}

/// Guests on wires come, exchange frames, break the rules and leave. With `more` the server connects too.
fn wired(folder: &Path, more: &[&str]) -> Traced {
    let [a, b, own] = ["a.sock", "b.sock", "own.sock"].map(|name| folder.join(name));
    let [stream, datagrams] = [wires::at("qemu", &a), wires::at("vfkit", &b)];
    let arguments = ["--network", "embedded:lab", "--listen", &stream, "--listen", &datagrams];
    let traced = Traced::new(folder, &[&arguments[..], more].concat());
    let mut one = wires::Wire::stream(&a, mac(1));
    let mut two = wires::Wire::vfkit(&b, &own, mac(2));
    wires::exchange(&mut one, &mut two, 0..10);
    // Many at once, for one that does not read.
    for number in 0..2000 {
        two.send(&packet(mac(2), mac(1), 1514, number));
    }
    wires::connected(&a).write_all(&[0xff; 8]).expect("it is taken");
    traced.server.until_said("a length above the maximum");
    drop(one);
    traced.server.until_said("has left");
    // The links sleep.
    thread::sleep(Duration::from_millis(50));
    let mut one = wires::Wire::stream(&a, mac(3));
    wires::exchange(&mut one, &mut two, 0..10);
    traced
}

/// The wires of the other VMMs: sequenced packets of user-mode Linux, and the stream of libkrun.
/// Each kind comes, goes and comes again.
fn wired_others(folder: &Path) -> BTreeSet<String> {
    let [a, b] = ["a.sock", "b.sock"].map(|name| folder.join(name));
    let (packets, stream) = (wires::at("bess", &a), wires::at("libkrun", &b));
    let arguments = ["--network", "embedded:lab", "--listen", &packets, "--listen", &stream];
    let traced = Traced::new(folder, &arguments);
    for round in 0..2 {
        let mut one = wires::Wire::bess(&a, mac(1));
        let mut two = wires::Wire::stream(&b, mac(2));
        wires::exchange(&mut one, &mut two, 0..10);
        // Many at once, for one that does not read.
        for number in 0..200 {
            two.send(&packet(mac(2), mac(1), 1514, number));
        }
        drop((one, two));
        for name in [&packets, &stream] {
            traced.server.until_said(&format!("{name}: guest {} has left", round + 1));
        }
    }
    traced.ended()
}

/// One wire is an inherited descriptor.
fn wired_inherited(folder: &Path) -> BTreeSet<String> {
    use std::os::fd::AsRawFd;
    let path = folder.join("a.sock");
    let (own, other) = std::os::unix::net::UnixDatagram::pair().expect("sockets");
    let fds = [(other.as_raw_fd(), 103)];
    let stream = wires::at("qemu", &path);
    let listens = ["--network", "embedded:lab", "--listen", &stream, "--listen", "krunkit:fd=103"];
    let (file, mut command, arguments) = Traced::command(folder, &listens);
    let command = wires::with_descriptors(&mut command, fds);
    let traced = Traced { server: Server::of(command, &as_strs(&arguments)), file };
    let mut one = wires::Wire::of(own, mac(1));
    wires::exchange(&mut one, &mut wires::Wire::stream(&path, mac(2)), 0..10);
    traced.ended()
}

/// It connects to VMMs that listen on wires, and finds them again when they have gone.
fn wired_client(folder: &Path) -> BTreeSet<String> {
    let [a, b, own] = ["c.sock", "d.sock", "own2.sock"].map(|name| folder.join(name));
    let datagrams = format!("{},own={}", wires::at("vfkit", &b), own.display());
    let more = ["--connect", &wires::at("qemu", &a), "--connect", &datagrams];
    let listener = std::os::unix::net::UnixListener::bind(&a).expect("a socket");
    let vmm = std::os::unix::net::UnixDatagram::bind(&b).expect("a socket");
    let traced = wired(folder, &more);
    vmm.recv(&mut [0; 16]).expect("the server announces itself");
    vmm.connect(&own).expect("it answers there");
    let mut three = wires::Wire::of(vmm, mac(5));
    let (socket, _) = listener.accept().expect("the server connects");
    wires::exchange(&mut wires::Wire::on(socket, mac(4)), &mut three, 0..10);
    let (socket, _) = listener.accept().expect("the server connects again");
    wires::exchange(&mut wires::Wire::on(socket, mac(4)), &mut three, 0..10);
    traced.ended()
}

/// Its counters are watched on a terminal.
fn watched(folder: &Path) -> BTreeSet<String> {
    let path = folder.join("a.sock");
    let arguments = ["--network", "embedded:lab", "--listen", &listen(&path)];
    let traced = Traced::on_terminal(folder, &arguments);
    let mut guest = Guest::new(&path, mac(1));
    guest.send(&packet(guest.mac, [0xff; 6], 60, 1));
    traced.server.until_said("1 guest: to ");
    traced.server.until_said("guest to it from it dropped");
    traced.server.until_said(" #1 ");
    traced.ended()
}

/// It says more than its guests need: counters over TCP and a socket of the Unix domain, reports on a
/// signal, a capture, a number in a file, a word when it is ready.
fn told(folder: &Path, metrics: &str) -> BTreeSet<String> {
    let path = folder.join("a.sock");
    let name = |file: &str| folder.join(file).display().to_string();
    let listen = format!("{},capture={}", listen(&path), name("a.pcapng"));
    let arguments = ["--network", "embedded:lab", "--listen", &listen, "--pid-file", &name("pid")];
    let traced = Traced::new(folder, &[&arguments[..], &["--metrics", metrics]].concat());
    let mut guest = Guest::new(&path, mac(1));
    guest.send(&packet(guest.mac, [0xff; 6], 60, 1));
    guest.sync();
    let said = traced.server.said();
    let answer = match metrics.strip_prefix("unix:") {
        Some(path) => {
            let silent = UnixStream::connect(path).expect("it listens");
            let answer = options::scraped(UnixStream::connect(path).expect("it listens"));
            drop(silent);
            answer
        }
        None => {
            let (_, address) = said.split_once("counters are at http://").expect("an address");
            let address = address.split('/').next().expect("an address");
            options::scraped(std::net::TcpStream::connect(address).expect("it listens"))
        }
    };
    assert!(answer.contains("vmring_guests"), "{answer}");
    drop(guest);
    traced.ended()
}

/// It prints a report on a signal. The report is read before the server ends, so that there is one.
fn reported(folder: &Path) -> BTreeSet<String> {
    let path = folder.join("a.sock");
    let mut traced =
        Traced::new(folder, &["--network", "embedded:lab", "--listen", &listen(&path)]);
    Guest::new(&path, mac(1)).sync();
    traced.server.signal("USR1");
    let mut stdout = traced.server.child.as_mut().expect("it runs").stdout.take().expect("piped");
    let stdout = in_time("the report", move || {
        let mut text = Vec::new();
        while !text.ends_with(b"}\n") {
            let mut byte = [0];
            stdout.read_exact(&mut byte).expect("a report");
            text.extend(byte);
        }
        stdout
    });
    traced.server.signal("TERM");
    // Somebody reads the last report, so that it can be printed.
    let reader =
        thread::spawn(move || BufReader::new(stdout).read_to_end(&mut Vec::new()).map(drop));
    let calls = Traced::complete(&traced.file);
    reader.join().expect("it ends").expect("it can be read");
    calls
}

/// A guest gets an address, which is remembered in a file.
fn leases(folder: &Path) -> BTreeSet<String> {
    let path = folder.join("a.sock");
    let file = folder.join("leases");
    let name = file.to_str().expect("UTF-8");
    // One lease more, and the file is written anew.
    let heading = "# vmring leases, version 1\n";
    let line = "52:54:00:00:00:99 192.168.64.9 9999999999\n";
    std::fs::write(&file, [heading, &line.repeat(1023)].concat()).expect("a file");
    let arguments = ["--network", "embedded:lab", "--lease-file", name, "--listen", &listen(&path)];
    let traced = Traced::new(folder, &arguments);
    let mut guest = Guest::new(&path, mac(1));
    guest.post(16);
    guest.lease();
    let calls = traced.ended();
    let leases = std::fs::read_to_string(&file).expect("the leases");
    assert!(leases.contains("52:54:00:12:34:01"), "{leases}");
    assert_eq!(leases.lines().count(), 3, "it is written anew");
    calls
}

/// Guests below the simulated vmnet.
fn simulated(folder: &Path) -> BTreeSet<String> {
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let traced = Traced::new(
        folder,
        &["--network", "vmnet-sim", "--listen", &listen(&a), "--listen", &listen(&b)],
    );
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    // A switch with an uplink sends what is for nobody that it knows there alone.
    two.send(&packet(two.mac, [0xff; 6], 60, 1));
    two.sync();
    one.post(128);
    one.lease();
    exchange(&mut one, &mut two, 0..5);
    traced.ended()
}

/// Guests with interfaces of their own, which start and stop while it is confined.
fn own(folder: &Path) -> BTreeSet<String> {
    let path = folder.join("a.sock");
    let stream = wires::at("qemu", &path);
    let arguments = ["--network", "vmnet-sim", "--per-client", "--listen", &stream];
    let traced = Traced::new(folder, &arguments);
    let mut one = wires::Wire::stream(&path, mac(1));
    for number in 2..4 {
        let mut other = wires::Wire::stream(&path, mac(number));
        wires::exchange(&mut one, &mut other, 0..5);
    }
    traced.ended()
}

/// A guest on a wire reaches the world, by so many threads. Returns the calls of the server, and those of the
/// translator's threads alone, which they also make if there is no wire that needs them.
fn way_out(
    folder: &Path,
    ports: super::way_out::Ports,
    workers: &'static str,
) -> [BTreeSet<String>; 2] {
    let path = folder.join("a.sock");
    let (mut options, wire) = (ports.options(), wires::at("qemu", &path));
    options.extend(["--nat-workers", workers].map(str::to_owned));
    let mut arguments = vec!["--network", "embedded:lab", "--listen", &wire];
    arguments.extend(as_strs(&options));
    let traced = Traced::new(folder, &arguments);
    drop(super::way_out::visit(&path, ports));
    let file = traced.file.clone();
    let all = traced.ended();
    let trace = std::fs::read_to_string(&file).expect("a trace");
    let threads = Traced::threads(&trace, "vmring-nat").len();
    assert_eq!(threads.to_string(), workers, "threads of the translator");
    [all, Traced::calls(&file, Some("vmring-nat"))]
}

/// Guests below a TAP.
fn tap(folder: &Path, network: &str, extra: &[&str]) -> BTreeSet<String> {
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let arguments = ["--network", network, "--listen", &listen(&a), "--listen", &listen(&b)];
    let traced = Traced::new(folder, &[&arguments[..], extra].concat());
    let _guests = super::tap::talk(&a, &b, 5);
    traced.ended()
}

/// Guests below a TAP that others have set up, by each engine that works here, and below one whose
/// host's end the server sets up.
fn taps() -> Vec<(Vec<When>, BTreeSet<String>)> {
    let folder = |name: &str| scratch(&format!("serve calls tap {name}"));
    let mut kinds = Vec::new();
    if super::tap::set_up() {
        for engine in super::tap::engines() {
            let mut when = vec![When::Tap];
            when.extend((engine == "io_uring").then_some(When::IoUring));
            kinds.push((when, tap(&folder(engine), "tap:t0", &["--engine", engine])));
        }
    }
    let (network, when) = ("tap:t1,shared,10.9.1.1/24", vec![When::Tap, When::HostsEnd]);
    let path = folder("shared").join("a.sock");
    let arguments = ["--network", network, "--listen", &listen(&path)];
    let traced = Traced::new(path.parent().expect("a folder"), &arguments);
    Guest::new(&path, mac(1)).sync();
    kinds.push((when, traced.ended()));
    kinds
}

#[test]
fn the_list_of_system_calls_is_what_a_server_calls() {
    if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
        return skip("there is no list for this processor");
    }
    match Command::new("strace").args(["-o", "/dev/null", "true"]).status() {
        Ok(status) if status.success() => {}
        Ok(_) => return skip("strace may trace nothing here"),
        Err(error) => return skip(&format!("strace: {error}")),
    }
    let folder = |name: &str| scratch(&format!("serve calls {name}"));
    let metrics = format!("unix:{}", folder("metrics 2").join("m.sock").display());
    let mut kinds = vec![
        (vec![], life(&folder("life"))),
        (vec![], end_by_bus(&folder("bus"))),
        (vec![When::Client], client(&folder("client"))),
        (vec![When::Wires], wired(&folder("wires"), &[]).ended()),
        (vec![When::Wires], wired_others(&folder("wires others"))),
        (vec![When::Wires], wired_inherited(&folder("wires inherited"))),
        (vec![When::Wires, When::Client], wired_client(&folder("wires client"))),
        (vec![When::Terminal], watched(&folder("watched"))),
        (vec![When::LeaseFile], leases(&folder("leases"))),
        (vec![When::Simulated], simulated(&folder("simulated"))),
        (vec![When::Simulated, When::Wires], own(&folder("own"))),
        (vec![], told(&folder("metrics"), "127.0.0.1:0")),
        (vec![], told(&folder("metrics 2"), &metrics)),
        (vec![], reported(&folder("reported"))),
    ];
    if is_possible() {
        use super::way_out::Ports;
        let when = vec![When::Nat, When::Resolvers];
        for (name, ports, workers) in [
            ("way out", Ports::new(), "1"),
            ("late way out", Ports::to_go_out(), "1"),
            ("two threads", Ports::new(), "2"),
        ] {
            let [all, translators] = way_out(&folder(name), ports, workers);
            kinds.push(([&when[..], &[When::Wires]].concat(), all));
            kinds.push((when.clone(), translators));
        }
        kinds.extend(super::tap::in_namespace(taps));
    }
    let mut wrong = Vec::new();
    for call in CALLS.iter().filter(|call| call.when != When::Elsewhere) {
        let needed =
            |(kinds, _): &&(Vec<When>, _)| call.when == When::Always || kinds.contains(&call.when);
        let mut of_kind = kinds.iter().filter(needed).peekable();
        if of_kind.peek().is_none() {
            skip(&format!("{}, which is for {:?}", call.name, call.when));
        } else if !of_kind.any(|(_, calls)| calls.contains(call.name)) {
            let Call { name, when, .. } = call;
            wrong.push(format!("{name} is in the list, and nothing calls it, {when:?}"));
        }
    }
    for (when, calls) in &kinds {
        let is_listed = |name: &String| {
            CALLS.iter().any(|call| {
                let always = matches!(call.when, When::Always | When::Elsewhere);
                call.name == name && (always || when.contains(&call.when))
            })
        };
        let unlisted = calls.iter().filter(|name| !is_listed(name));
        wrong.extend(
            unlisted.map(|name| format!("{name} is called, and not in the list, {when:?}")),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("; "));
}
