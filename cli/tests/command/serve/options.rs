//! What else a server does for whoever has started it: files, signals, counters, and other users.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;

use super::guest::{Guest, mac, packet};
use super::*;

const ON_LAB: [&str; 4] = ["serve", "--json", "--network", "embedded:lab"];

/// A server on an embedded network, whose command is changed before it starts.
fn started(arguments: &[&str], change: impl FnOnce(&mut Command)) -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    let arguments = [&ON_LAB[..], arguments].concat();
    change(command.args(&arguments));
    Server::of(&mut command, &arguments)
}

/// Lets the command inherit a descriptor under another number.
fn inherit(command: &mut Command, fds: Vec<(i32, i32)>) {
    // SAFETY: dup2(2) is safe to call between fork and exec, and touches no memory.
    unsafe {
        command.pre_exec(move || {
            for (fd, number) in &fds {
                if libc::dup2(*fd, *number) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        })
    };
}

/// Runs a command, which ends by itself. If it does not, kills it and fails.
fn finished(command: &mut Command, arguments: &[&str]) -> Output {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    ended(command.spawn().expect("it starts"), arguments)
}

fn server_id(server: &Server) -> u32 {
    server.child.as_ref().expect("it runs").id()
}

/// A file has the number of the process, while it lives. A second server does not take it, and one that
/// comes after a server that was killed does. No signal leaves anything behind.
#[test]
fn a_pid_file_is_there_while_a_server_is() {
    let folder = scratch("serve pid");
    let (socket, file) = (listen(&folder.join("a.sock")), folder.join("pid"));
    let name = file.to_str().expect("UTF-8");
    let start = || {
        let metrics = format!("unix:{}", folder.join("m.sock").display());
        let arguments = ["--listen", &socket, "--pid-file", name, "--metrics", &metrics];
        let server = started(&arguments, |command| {
            // SAFETY: signal(2) is safe to call between fork and exec, and touches no memory.
            unsafe {
                command.pre_exec(|| {
                    // The tests may run under nohup(1), whose children ignore SIGHUP.
                    libc::signal(libc::SIGHUP, libc::SIG_DFL);
                    Ok(())
                })
            };
        });
        let number = std::fs::read_to_string(&file).expect("a number");
        assert_eq!(number, format!("{}\n", server_id(&server)));
        server
    };
    for signal in ["TERM", "INT", "HUP"] {
        let server = start();
        let other = listen(&folder.join("b.sock"));
        let second = ["--listen", &other, "--pid-file", name, "--seconds", "1"];
        let second = vmring(&[&ON_LAB[..], &second].concat());
        assert_eq!(second.status.code(), Some(1));
        let said = unfolded(&second.stderr);
        assert!(said.contains("a process that runs has the file"), "{said}");
        server.report(signal);
        let left: Vec<_> = std::fs::read_dir(&folder).expect("a folder").collect();
        assert!(left.is_empty(), "{left:?}");
    }
    // Dropping it kills it.
    drop(start());
    assert!(file.exists(), "it is left over");
    start().report("TERM");
    assert_eq!(std::fs::read_dir(&folder).expect("a folder").count(), 0);
}

/// The reader of a descriptor gets a line when guests can join, and then the end.
#[test]
fn the_reader_of_a_descriptor_is_told() {
    let path = scratch("serve ready fd").join("a.sock");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let fd = writer.as_raw_fd();
    let server = started(&["--listen", &listen(&path), "--ready-fd", "105"], |command| {
        inherit(command, vec![(fd, 105)]);
    });
    drop(writer);
    let told = in_time("the line", move || {
        let mut told = String::new();
        BufReader::new(reader).read_to_string(&mut told).map(|_| told)
    });
    assert_eq!(told.expect("a line"), "READY=1\n");
    assert!(is_socket(&path), "it was true");
    server.report("TERM");
}

/// A server gets its sockets from a service manager, by their names or numbers (sd_listen_fds(3)), and
/// leaves them where they are.
#[test]
fn a_service_manager_passes_sockets() {
    let folder = scratch("serve activation");
    let [a, b] = ["a", "b"].map(|name| folder.join(format!("{name}.sock")));
    let sockets = [&a, &b].map(|path| UnixListener::bind(path).expect("a socket"));
    let fds: Vec<_> = sockets.iter().zip([103, 104]).map(|(s, n)| (s.as_raw_fd(), n)).collect();
    let activated = |names: &str, arguments: &[&str]| {
        // The process that systemd starts is the one that LISTEN_PID names, so a shell becomes it. The numbers
        // have three digits, which not every shell can read.
        let mut command = Command::new("bash");
        let script = "LISTEN_PID=$$ exec \"$0\" \"$@\" 3<&103 4<&104";
        command.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_vmring"));
        command.args(ON_LAB).args(arguments).env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", names);
        inherit(&mut command, fds.clone());
        command
    };
    let arguments = ["--listen", "vhost-user:fd=vm0", "--listen", "vhost-user:fd=4,isolated"];
    let server = Server::of(&mut activated("vm0:vm1", &arguments), &arguments);
    let (one, two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    one.sync();
    two.sync();
    let report = server.report("TERM");
    assert_eq!(report["sockets"][0]["name"], "vhost-user:fd=vm0");
    assert_eq!(report["sockets"][1]["connections"], 1);
    assert!(is_socket(&a) && is_socket(&b), "they are the manager's");
    for (names, arguments, said) in [
        ("vm0:vm1", &["--listen", "vhost-user:fd=vm0"][..], "passed a socket 'vm1' that no option"),
        ("vm0:vm1", &["--listen", "vhost-user:fd=vm2"], "it has passed 'vm0', 'vm1'"),
        ("vm:vm", &["--listen", "vhost-user:fd=vm"], "several sockets with the name 'vm'"),
        ("vm0", &["--listen", "vhost-user:fd=vm0"], "LISTEN_FDNAMES is wrong"),
        (
            "vm0:vm1",
            &["--listen", "vhost-user:fd=vm0", "--listen", "vhost-user:fd=vm1", "--fd", "3"],
            "the descriptor 3 is there twice",
        ),
    ] {
        let output = finished(&mut activated(names, arguments), arguments);
        assert_eq!(output.status.code(), Some(2), "{names}");
        let sentence = unfolded(&output.stderr);
        assert!(sentence.contains(said), "{arguments:?}: {sentence}");
    }
}

/// The packets of a socket's guests are recorded, and nobody else's.
#[test]
fn the_guests_of_a_socket_are_recorded() {
    let folder = scratch("serve capture");
    let [a, b] = ["a", "b"].map(|name| folder.join(format!("{name}.sock")));
    let file = folder.join("a.pcapng");
    let recorded = format!("{},capture={}", listen(&a), file.display());
    let server = Server::new(&["--listen", &recorded, "--listen", &listen(&b)]);
    #[cfg(target_os = "linux")]
    expect_confined_threads(&server, 0, &["signals", "vmring", "vmring-capture"]);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..20);
    two.send(&packet(two.mac, mac(9), 60, 1));
    two.sync();
    let report = server.report("TERM");
    assert_eq!(report["sockets"][0]["unrecorded"], 0);
    let bytes = std::fs::read(&file).expect("the capture");
    let holds = |packet: &[u8]| bytes.windows(packet.len()).any(|part| part == packet);
    assert!(holds(&packet(one.mac, two.mac, 60, 0)) && holds(&packet(two.mac, one.mac, 1514, 0)));
    assert!(holds(&packet(one.mac, two.mac, 60 + 19 * 37, 19)));
    // What could not start leaves no file behind.
    let new = folder.join("new.pcapng");
    let wrong = format!("{},capture={}", listen(&a), new.display());
    refused(&[&ON_LAB[..], &["--listen", &wrong, "--mtu", "7"]].concat());
    assert!(!new.exists() && !is_socket(&a));
}

/// A name without a folder is in the private folder, which nobody else can enter.
#[test]
fn a_name_is_in_a_private_folder() {
    let runtime = scratch("serve private");
    let start = |name: &str| {
        let listen = format!("vhost-user:{name}");
        started(&["--listen", &listen], |command| {
            command.env("XDG_RUNTIME_DIR", &runtime);
        })
    };
    let server = start("vm0.sock");
    let folder = runtime.join("vmring");
    assert_eq!(folder.metadata().expect("a folder").mode() & 0o7777, 0o700);
    let path = folder.join("vm0.sock");
    assert_eq!(path.symlink_metadata().expect("a socket").mode() & 0o777, 0o600);
    assert!(server.said().contains(&path.display().to_string()), "it says where");
    Guest::new(&path, mac(1)).sync();
    server.report("TERM");
    assert!(!path.exists());
    // Killed, and started again.
    drop(start("vm0.sock"));
    assert!(is_socket(&path), "it is left over");
    start("vm0.sock").report("TERM");
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).expect("its mode");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    command.args(ON_LAB).args(["--listen", "vhost-user:vm0.sock"]);
    let output = finished(command.env("XDG_RUNTIME_DIR", &runtime), &["vm0.sock"]);
    assert_eq!(output.status.code(), Some(2));
    let said = unfolded(&output.stderr);
    assert!(said.contains("has the mode 755 and not 700; name the socket with a path"), "{said}");
}

/// A signal asks for a report, and the server goes on. One that is not read holds up nobody.
#[test]
fn a_signal_asks_for_a_report() {
    let folder = scratch("serve report");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let mut server = Server::new(&["--listen", &listen(&a), "--listen", &listen(&b)]);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..10);
    let stdout = server.child.as_mut().expect("it runs").stdout.take().expect("piped");
    let (sender, reports) = std::sync::mpsc::channel();
    let (begin, beginning) = std::sync::mpsc::channel::<()>();
    let reader = thread::spawn(move || {
        beginning.recv().expect("the test goes on");
        let all = serde_json::Deserializer::from_reader(BufReader::new(stdout));
        for report in all.into_iter::<Value>() {
            sender.send(report.expect("one JSON object after the other")).expect("it is read");
        }
    });
    server.signal("USR1");
    begin.send(()).expect("the reader waits");
    let report = reports.recv_timeout(LIMIT).expect("a report");
    assert_eq!((&report["running"], &report["ok"]), (&true.into(), &true.into()));
    let guest = &report["sockets"][0]["guests"][0];
    assert_eq!((&guest["guest"], &guest["counts"]["tx_packets"]), (&1.into(), &10.into()));
    assert_eq!(count(&report, 1, "rx_packets"), 10);
    exchange(&mut one, &mut two, 10..20);
    server.signal("TERM");
    let last = reports.recv_timeout(LIMIT).expect("a report");
    assert_eq!((&last["running"], count(&last, 0, "tx_packets")), (&false.into(), 20));
    assert_eq!(last["sockets"][0]["guests"], serde_json::json!([]));
    reader.join().expect("the output ends");

    // Nobody reads: hundreds of reports fill the pipe, and guests come and go as before.
    let mut server = Server::new(&["--listen", &listen(&a), "--listen", &listen(&b)]);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    let start = Instant::now();
    while !server.said().contains("is not read yet") {
        assert!(start.elapsed() < LIMIT, "{}", server.said());
        server.signal("USR1");
        thread::sleep(Duration::from_millis(2));
    }
    exchange(&mut one, &mut two, 0..10);
    let mut stdout = server.child.as_mut().expect("it runs").stdout.take().expect("piped");
    let reader = thread::spawn(move || stdout.read_to_end(&mut Vec::new()).map(drop));
    server.signal("TERM");
    assert_eq!(server.exit_code(), Some(0));
    reader.join().expect("it ends").expect("it can be read");
}

/// Asks for the counters, and returns the whole answer.
pub(super) fn scraped(stream: impl Read + Write + Send + 'static) -> String {
    asked(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
}

fn asked(mut stream: impl Read + Write + Send + 'static, request: &str) -> String {
    let request = request.to_owned();
    in_time("a scrape", move || {
        stream.write_all(request.as_bytes()).expect("it is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    })
}

/// The value of the sample that begins like this.
fn sample(answer: &str, name: &str) -> f64 {
    sample_of(answer, name).unwrap_or_else(|| panic!("no {name} in {answer}"))
}

fn sample_of(answer: &str, name: &str) -> Option<f64> {
    let value = answer.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.trim().parse().expect("a number"))
}

/// Goal: a monitoring system reads the counters, over TCP and over a socket of the Unix domain. Scrapers
/// that are silent, slow, or send rubbish cost the guests nothing and the others a little time.
#[test]
fn counters_are_shown_to_a_monitoring_system() {
    let folder = scratch("serve metrics");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let learning = format!("{},mac=learn", listen(&a));
    let arguments = ["--listen", &learning, "--listen", &listen(&b), "--metrics"];
    let server = Server::new(&[&arguments[..], &["127.0.0.1:0"]].concat());
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..10);
    server.until_said("/metrics");
    let said = server.said();
    let (_, address) = said.split_once("counters are at http://").expect("an address");
    let address = address.split('/').next().expect("an address").to_owned();
    let connect = || {
        let stream = TcpStream::connect(&address).expect("it listens");
        stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
        stream
    };
    let answer = scraped(connect());
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a body");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    let of = |name: &str, more: &str| format!("{name}{{socket=\"{}\"{more}}}", listen(&a));
    assert_eq!(sample(body, &of("vmring_guests", "")), 1.0);
    assert_eq!(sample(body, &of("vmring_device_total", ",counter=\"tx_packets\"")), 10.0);
    // What a port drops is seen while its guest is connected.
    one.send(&packet(mac(7), two.mac, 60, 1));
    let spoofed =
        || sample_of(&scraped(connect()), &of("vmring_port_drops_total", ",reason=\"spoofed\""));
    let start = Instant::now();
    while spoofed() != Some(1.0) {
        assert!(start.elapsed() < LIMIT, "it is not counted");
        thread::sleep(Duration::from_millis(5));
    }
    // Of one that is silent, one that is slow, and one that says too much.
    let silent = connect();
    let mut slow = connect();
    slow.write_all(b"GET /met").expect("it is sent");
    let mut long = connect();
    long.write_all(&[b'x'; 20_000]).expect("it is sent");
    exchange(&mut one, &mut two, 10..30);
    assert!(asked(connect(), "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(asked(connect(), "PUT /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    let answer = scraped(connect());
    assert_eq!(sample(&answer, &of("vmring_device_total", ",counter=\"tx_packets\"")), 31.0);
    for mut ended in [silent, slow] {
        assert_eq!(ended.read(&mut [0; 64]).expect("its end"), 0, "it has no answer");
    }
    drop((one, two));
    let start = Instant::now();
    while sample(&scraped(connect()), &of("vmring_guests", "")) > 0.0 {
        assert!(start.elapsed() < LIMIT, "the guests have gone");
        thread::sleep(Duration::from_millis(10));
    }
    let answer = scraped(connect());
    assert_eq!(sample(&answer, &of("vmring_device_total", ",counter=\"tx_packets\"")), 31.0);
    assert_eq!(sample(&answer, &of("vmring_connections_total", "")), 1.0);
    // One that is connected when the server ends holds it up no longer than a moment.
    let _silent = connect();
    server.report("TERM");

    let path = folder.join("metrics.sock");
    let place = format!("unix:{}", path.display());
    let server = Server::new(&[&arguments[..], &[&place]].concat());
    assert_eq!(path.symlink_metadata().expect("a socket").mode() & 0o777, 0o600);
    let answer = scraped(UnixStream::connect(&path).expect("it listens"));
    assert_eq!(sample(&answer, &of("vmring_guests", "")), 0.0);
    let second =
        vmring(&[&ON_LAB[..], &["--listen", "vhost-user:./x", "--metrics", &place]].concat());
    assert_eq!(second.status.code(), Some(1));
    assert!(unfolded(&second.stderr).contains("a server listens at"));
    drop(server);
    assert!(is_socket(&path), "it is left over");
    Server::new(&[&arguments[..], &[&place]].concat()).report("TERM");
    assert!(!path.exists() && !is_socket(&a));
}

/// Goal: each guest of a socket has counters of its own, and guests that come and go make no more series
/// than there are guests at once.
#[test]
fn each_guest_has_counters_by_its_slot() {
    let folder = scratch("serve metrics slots");
    let [path, metrics] = ["a.sock", "metrics"].map(|name| folder.join(name));
    let (streams, place) = (wires::at("qemu", &path), format!("unix:{}", metrics.display()));
    let server = Server::new(&["--listen", &streams, "--metrics", &place]);
    let scrape = || scraped(UnixStream::connect(&metrics).expect("it listens"));
    let of = |name: &str, slot: u64, rest: &str| {
        format!("{name}{{socket=\"{streams}\",slot=\"{slot}\"{rest}}}")
    };
    let mut one = wires::Wire::stream(&path, mac(1));
    for round in 0..5 {
        let mut other = wires::Wire::stream(&path, mac(2));
        wires::exchange(&mut one, &mut other, 0..10);
        let answer = scrape();
        assert_eq!(sample(&answer, &of("vmring_guest", 0, "")), 1.0);
        assert_eq!(sample(&answer, &of("vmring_guest", 1, "")), f64::from(round) + 2.0);
        let sent = |slot| {
            let name = of("vmring_guest_packets_total", slot, ",way=\"from guest\"");
            sample(&answer, &name)
        };
        assert!(sent(0) >= 10.0 * (f64::from(round) + 1.0), "{answer}");
        assert!((10.0..sent(0) + 100.0).contains(&sent(1)), "{answer}");
        assert_eq!(answer.lines().filter(|line| line.starts_with("vmring_guest{")).count(), 2);
        drop(other);
        let start = Instant::now();
        while scrape().contains("slot=\"1\"") {
            assert!(start.elapsed() < LIMIT, "the guest has gone");
            thread::sleep(Duration::from_millis(10));
        }
    }
    server.report("TERM");
}

/// The user that the tests let a server become.
#[cfg(target_os = "linux")]
const SOMEBODY: u32 = 65_534;

/// The ids of every thread of a server: the real, effective, saved and file-system one, and the groups.
#[cfg(target_os = "linux")]
fn ids(server: &Server) -> Vec<String> {
    let process = format!("/proc/{}/task", server_id(server));
    let threads = std::fs::read_dir(process).expect("the threads");
    let ids = threads.map(|thread| {
        let status = std::fs::read_to_string(thread.expect("a thread").path().join("status"));
        let lines: Vec<_> = status
            .expect("a status")
            .lines()
            .filter(|line| ["Uid:", "Gid:", "Groups:"].iter().any(|name| line.starts_with(name)))
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        lines.join(", ")
    });
    let mut ids: Vec<_> = ids.collect();
    ids.dedup();
    ids
}

/// Goal: a server that root has started becomes somebody else, whose the sockets and files are, and who
/// can remove them. It may be the one who has called sudo.
#[cfg(target_os = "linux")]
#[test]
fn root_becomes_somebody_else() {
    // SAFETY: the call has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("skipped: only root can become somebody else");
    }
    let folder = scratch("serve user");
    let private = folder.join("runtime");
    std::fs::create_dir(&private).expect("a folder");
    let id = SOMEBODY.to_string();
    let own = |path: &Path| std::os::unix::fs::chown(path, Some(SOMEBODY), Some(SOMEBODY));
    // The folders above are for all.
    own(&folder).and_then(|()| own(&private)).expect("it is root's to give");
    let (path, file, capture) =
        (folder.join("a.sock"), folder.join("pid"), folder.join("a.pcapng"));
    let listen_there = format!("{},capture={}", listen(&path), capture.display());
    let file_name = file.to_str().expect("UTF-8");
    let arguments =
        ["--listen", &listen_there, "--listen", "vhost-user:b", "--pid-file", file_name];
    let of_user = ["--user", &id, "--group", &id];
    for sudo in [false, true] {
        let more = if sudo { &[][..] } else { &of_user };
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
        let arguments = [&ON_LAB[..], &arguments, more].concat();
        command.args(&arguments).env("XDG_RUNTIME_DIR", &private);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if sudo {
            command.env("SUDO_UID", &id).env("SUDO_GID", &id);
        }
        let mut child = command.spawn().expect("it starts");
        let stderr = child.stderr.take().expect("piped");
        let server = Server::reading(child, stderr, &arguments);
        let guest = Guest::new(&path, mac(1));
        guest.sync();
        Guest::new(&private.join("vmring/b"), mac(2)).sync();
        assert_eq!(
            ids(&server),
            [format!("Uid: {id} {id} {id} {id}, Gid: {id} {id} {id} {id}, Groups: {id}")]
        );
        confined_threads(&server, true, 0);
        for path in [&path, &file, &capture, &private.join("vmring")] {
            assert_eq!(path.symlink_metadata().expect("it is there").uid(), SOMEBODY);
        }
        let report = server.report("TERM");
        assert_eq!(report["sandbox"]["capabilities"]["state"], "none");
        assert!(!path.exists() && !file.exists() && !private.join("vmring/b").exists());
    }
    // A server that could not remove a socket makes none.
    let of_root = scratch("serve user root").join("a.sock");
    std::fs::set_permissions(of_root.parent().expect("a folder"), PermissionsExt::from_mode(0o755))
        .expect("its mode");
    let message = refused(&[&ON_LAB[..], &["--listen", &listen(&of_root)], &of_user].concat());
    assert!(message.contains("Permission denied (os error 13) (as --user 65534)"), "{message}");
}

/// Goal: the host's end of a TAP is put back by somebody who is not root any more.
#[cfg(target_os = "linux")]
#[test]
fn somebody_else_puts_the_host_back() {
    if !crate::tap::is_possible() {
        return;
    }
    super::tap::in_namespace(|| {
        let folder = scratch("serve user tap");
        std::os::unix::fs::chown(&folder, Some(SOMEBODY), Some(SOMEBODY)).expect("root's to give");
        let forwarding = || {
            std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
                .expect("/proc")
                .trim()
                .to_owned()
        };
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("/proc");
        let (path, id) = (folder.join("a.sock"), SOMEBODY.to_string());
        for extra in [&[][..], &["--no-sandbox"]] {
            let user = ["--user", &id, "--group", &id];
            let network = ["--network", "tap:t0,shared,10.9.0.1/24", "--listen", &listen(&path)];
            let server = Server::on(&[&network[..], &user, extra].concat());
            assert_eq!(forwarding(), "1");
            let mut guest = Guest::new(&path, mac(1));
            guest.post(64);
            guest.lease();
            let ids = ids(&server);
            assert!(ids.len() == 1 && ids[0].starts_with("Uid: 65534 65534"), "{ids:?}");
            if extra.is_empty() {
                // CAP_NET_ADMIN.
                confined_threads(&server, true, 1 << 12);
            }
            server.report("TERM");
            assert_eq!(forwarding(), "0", "it is put back");
            let links = std::fs::read_to_string("/proc/thread-self/net/dev").expect("/proc");
            assert!(!links.contains("t0:"), "the TAP is removed: {links}");
        }
    });
}
