//! `vmring run-netns`, as a user meets it.

#[path = "run_netns/ipv6.rs"]
mod ipv6;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::world::{OUTSIDE, World};
use crate::{LIMIT, ended, text};

/// The user that owns nothing.
const NOBODY: u32 = 65_534;

fn start(user: Option<u32>, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    command.arg("run-netns").args(arguments).current_dir("/");
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the command starts")
}

/// Runs it, unless this machine lets no user make what it needs.
fn run(user: Option<u32>, arguments: &[&str]) -> Option<Output> {
    let output = ended(start(user, arguments), arguments);
    let message = text(&output.stderr);
    let obstacles = ["lets no user make", "/dev/net/tun failed", "detaching the mounts failed"];
    if output.status.code() == Some(1) && obstacles.iter().any(|one| message.contains(one)) {
        let name = std::thread::current().name().unwrap_or("test").to_owned();
        eprintln!("skipped: {name}: {message}");
        return None;
    }
    Some(output)
}

/// A user without privileges, if this process can become one and that user can run the command.
fn nobody() -> Option<u32> {
    let binary = env!("CARGO_BIN_EXE_vmring");
    let mut command = Command::new(binary);
    command.arg("--version").uid(NOBODY).gid(NOBODY).stdout(Stdio::null());
    command.status().is_ok_and(|status| status.success()).then_some(NOBODY)
}

const LOOK: &str = "id -u; readlink /proc/self/ns/net; head -n 1 /etc/resolv.conf; \
                    tail -n +3 /proc/net/dev | cut -d: -f1; tail -n +2 /proc/net/route";

fn look(user: Option<u32>) {
    let resolvers = std::fs::read("/etc/resolv.conf").ok();
    let subnet = "10.77.0.1/24";
    let Some(output) = run(user, &["--subnet", subnet, "--", "sh", "-c", LOOK]) else { return };
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    // The caller's own user, another network, and nothing in it but these.
    let lines: Vec<&str> = out.lines().map(str::trim).collect();
    let id = Command::new("id").arg("-u").output().expect("id runs");
    let own = user.map_or_else(|| text(&id.stdout).trim().to_owned(), |user| user.to_string());
    assert_eq!(lines[0], own);
    let here = std::fs::read_link("/proc/self/ns/net").expect("this process has a namespace");
    assert_ne!(lines[1], here.to_string_lossy());
    let mut rest = lines[2..].to_vec();
    if resolvers.is_some() {
        assert_eq!(rest.remove(0), "nameserver 10.77.0.1");
    }
    let mut interfaces = rest[..2].to_vec();
    interfaces.sort_unstable();
    assert_eq!(interfaces, ["lo", "tap0"], "{out}");
    // The default route by 10.77.0.1, and the subnet: numbers in the processor's order of bytes.
    let number = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
    let routes = rest[2..].join("\n");
    for column in [number([10, 77, 0, 1]), number([10, 77, 0, 0]), number([255, 255, 255, 0])] {
        assert!(routes.contains(&column), "no {column} in {routes}");
    }
    // Outside nothing has changed.
    assert_eq!(std::fs::read("/etc/resolv.conf").ok(), resolvers);
}

#[test]
fn a_command_has_a_network_of_its_own() {
    look(None);
}

#[test]
fn a_user_without_privileges_can_have_one_too() {
    match nobody() {
        Some(user) => look(Some(user)),
        None => eprintln!("skipped: this process cannot become another user"),
    }
}

#[test]
fn the_gateway_answers() {
    if let Some(output) = run(nobody(), &["ping", "-c", "1", "-W", "20", "192.168.64.1"]) {
        if output.status.code() == Some(127) {
            return eprintln!("skipped: there is no ping here");
        }
        assert!(text(&output.stdout).contains(" 0% packet loss"), "{output:?}");
    }
}

/// The C library's resolver asks the gateway, which knows this name itself.
#[test]
fn a_command_finds_the_host_by_name() {
    if let Some(output) = run(nobody(), &["getent", "ahostsv4", "host.internal"]) {
        if output.status.code() == Some(127) {
            return eprintln!("skipped: there is no getent here");
        }
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(out.starts_with("192.168.64.1 "), "{out}{err}");
    }
}

#[test]
fn its_exit_code_is_the_commands() {
    for (command, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -9 $$"], 128 + libc::SIGKILL),
        (&["/etc"], 126),
        (&["there-is-no-such-command"], 127),
        // What follows the name is the command's, even if it looks like ours.
        (
            &[
                "sh",
                "-c",
                "[ \"$*\" = '--offload none -- --mtu' ]",
                "sh",
                "--offload",
                "none",
                "--",
                "--mtu",
            ],
            0,
        ),
    ] {
        let arguments = [&["--"], command].concat();
        let Some(output) = run(None, &arguments) else { return };
        assert_eq!(output.status.code(), Some(code), "{command:?}: {output:?}");
    }
}

/// The TAP has the header of offload and long packets, or it has neither; and packets pass through both.
#[test]
fn a_command_leaves_work_to_its_network_or_does_it_itself() {
    for (options, header, mtu) in [
        (&[][..], "vnet_hdr on", "mtu 65520 "),
        (&["--mtu", "1500"], "vnet_hdr on", "mtu 1500 "),
        (&["--offload", "none"], "vnet_hdr off", "mtu 1500 "),
    ] {
        let script = "ip -details link show tap0 && ping -c 1 -W 20 -s 1400 192.168.64.1";
        let arguments = [options, &["--", "sh", "-c", script]].concat();
        let Some(output) = run(None, &arguments) else { return };
        if output.status.code() == Some(127) {
            return eprintln!("skipped: there is no ip or no ping here");
        }
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(out.contains(header) && out.contains(mtu), "no {header} or {mtu} in {out}{err}");
        assert!(out.contains(" 0% packet loss"), "{out}{err}");
    }
}

/// What looks like an option of ours behind the command's name is the command's, also without `--`.
#[test]
fn options_behind_the_command_are_its_own() {
    let command = ["sh", "-c", "[ \"$*\" = '--offload none' ]", "sh", "--offload", "none"];
    let Some(output) = run(None, &command) else { return };
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn wrong_arguments_are_refused() {
    for (arguments, words) in [
        (&["run-netns"][..], "<COMMAND>"),
        (&["run-netns", "--mtu", "1000", "true"], "not in 1280 to 65521"),
        (&["run-netns", "--subnet", "8.8.8.1/24", "true"], "private"),
        (&["run-netns", "--offload", "some", "true"], "[possible values: all, none]"),
        (&["run-netns", "--limit", "flows=1,half-open=2", "true"], "NAME=NUMBER"),
        (&["run-netns", "--dns", "8.8.8.8:53", "true"], "is no IP address"),
        (&["run-netns", "--host-port", "80-90", "true"], "the port is no number from 1"),
        (&["run-netns", "--forward", "80=10.0.0.1", "true"], "no guest of this network"),
    ] {
        let output = crate::vmring(arguments);
        let message = text(&output.stderr);
        let is_possible =
            !message.contains("lets no user make") && !message.contains("/dev/net/tun");
        if !is_possible {
            eprintln!("skipped: {message}");
            continue;
        }
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(words), "no {words} in {message}");
    }
}

/// Starts a command that says when it runs, unless this machine lets nobody do so.
fn sleeper() -> Option<(Child, u32)> {
    run(None, &["true"])?;
    let mut child = start(None, &["sh", "-c", "echo $$; exec sleep 600"]);
    let mut line = String::new();
    let stdout = child.stdout.as_mut().expect("piped");
    BufReader::new(stdout).read_line(&mut line).expect("it says its number");
    Some((child, line.trim().parse().expect("a number")))
}

fn signal(process: u32, number: libc::c_int) {
    // SAFETY: the call takes numbers.
    assert_eq!(unsafe { libc::kill(process as libc::pid_t, number) }, 0, "it is there");
}

#[test]
fn a_request_to_end_reaches_the_command() {
    let Some((child, _)) = sleeper() else { return };
    signal(child.id(), libc::SIGTERM);
    let output = ended(child, &["sleep"]);
    assert_eq!(output.status.code(), Some(128 + libc::SIGTERM), "{output:?}");
}

#[test]
fn the_command_ends_with_its_network() {
    let Some((child, command)) = sleeper() else { return };
    signal(child.id(), libc::SIGKILL);
    assert_eq!(ended(child, &["sleep"]).status.signal(), Some(libc::SIGKILL));
    let (start, its) = (Instant::now(), format!("/proc/{command}/stat"));
    // A process that has ended may wait for somebody to look at its end.
    let is_there = || std::fs::read_to_string(&its).is_ok_and(|stat| !stat.contains(") Z "));
    while is_there() {
        assert!(start.elapsed() < LIMIT, "the command is still there");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

impl World {
    /// Starts a command of the host's in a network namespace of its own.
    pub(crate) fn start_run_netns(&self, arguments: &[&str]) -> Child {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_vmring"));
        command.arg("run-netns").args(arguments).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        child.expect("the command starts")
    }

    /// Runs a command of the host's in a network namespace of its own.
    pub(crate) fn run_netns(&self, arguments: &[&str]) -> Output {
        ended(self.start_run_netns(arguments), arguments)
    }
}

/// Answers one request of HTTP: a GET with `body`, a PUT with the digest of what came.
fn answer(mut stream: TcpStream, body: &[u8]) {
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let mut reader = BufReader::new(stream.try_clone().expect("a copy"));
    let (mut request, mut len) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a line");
        if line.trim().is_empty() {
            break;
        }
        if let Some(number) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            len = number.trim().parse().expect("a length");
        }
        if request.is_empty() {
            request = line;
        }
    }
    let answer = if request.starts_with("PUT") {
        let mut hash = Sha256::new();
        let mut left = len;
        let mut bytes = vec![0; 1 << 16];
        while left > 0 {
            let some = bytes.len().min(left);
            let some = reader.read(&mut bytes[..some]).expect("the body");
            assert!(some > 0, "{left} bytes are missing");
            hash.update(&bytes[..some]);
            left -= some;
        }
        digest(hash).into_bytes()
    } else {
        body.to_vec()
    };
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", answer.len());
    stream.write_all(head.as_bytes()).expect("it is written");
    stream.write_all(&answer).expect("it is written");
}

fn digest(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// curl, over the kernel's own TCP, gets and puts what a server outside has and wants. The host has
/// neither a TAP nor a rule of ours.
#[test]
fn a_command_reaches_the_world() {
    if !crate::tap::is_possible() {
        return;
    }
    if Command::new("curl").arg("--version").stdout(Stdio::null()).status().is_err() {
        return eprintln!("skipped: there is no curl");
    }
    const LEN: usize = 24 << 20;
    const SMALL: usize = 40;
    let world = World::new();
    let body: Vec<u8> =
        (0..LEN as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let wanted = digest(Sha256::new_with_prefix(&body));
    let listener = world.outside.run(|| TcpListener::bind((OUTSIDE, 80)).expect("its port"));
    let serving = world.outside.start(move || {
        for number in 0..2 + SMALL {
            let (stream, _) = listener.accept().expect("a client");
            answer(stream, if number == 0 { &body } else { b"small" });
        }
    });
    // One stream each way, and one connection after another.
    let script = format!(
        "curl -sS -m 100 http://{OUTSIDE}/ > \"$F\" && sha256sum < \"$F\" && \
         curl -sS -m 100 -T \"$F\" http://{OUTSIDE}/ && echo && \
         for i in $(seq {SMALL}); do curl -sS -m 100 http://{OUTSIDE}/ && echo; done"
    );
    let file = format!("{}/run-netns-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let script = format!("F='{file}'; {script}");
    let output = world.run_netns(&["--", "sh", "-c", &script]);
    let _ = std::fs::remove_file(&file);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0].split(' ').next(), Some(&*wanted));
    assert_eq!(lines[1], wanted);
    assert_eq!(lines[2..], ["small"; SMALL]);
    serving.recv_timeout(LIMIT).expect("the server has served all");
}

/// A command has as many connections as its limit allows, which is three quarters of what is given.
#[test]
fn a_command_has_no_more_connections_than_its_limit() {
    if !crate::tap::is_possible() {
        return;
    }
    let world = World::new();
    let listener = world.outside.run(|| TcpListener::bind((OUTSIDE, 8000)).expect("its port"));
    let serving = world.outside.start(move || {
        (0..3).map(|_| listener.accept().map(|(stream, _)| stream)).collect::<Vec<_>>()
    });
    // What is beyond the limit is not answered.
    let script = "open() { exec {fd}<>/dev/tcp/203.0.113.1/8000 && echo open; }; \
                  open && open && open; \
                  timeout 2 bash -c 'exec 3<>/dev/tcp/203.0.113.1/8000' || echo silent";
    let output = world.run_netns(&["--limit", "flows=4", "--", "bash", "-c", script]);
    if output.status.code() == Some(127) {
        return eprintln!("skipped: there is no bash");
    }
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(out.lines().collect::<Vec<_>>(), ["open", "open", "open", "silent"], "{err}");
    serving.recv_timeout(LIMIT).expect("the server has had three");
}

/// What the options deny is refused at once, and the rest is reached.
#[test]
fn a_command_reaches_no_more_than_it_may() {
    if !crate::tap::is_possible() {
        return;
    }
    let world = World::new();
    let listener = world.outside.run(|| TcpListener::bind((OUTSIDE, 8000)).expect("its port"));
    let serving = world.outside.start(move || listener.accept().map(drop));
    // The host's own address, and its loopback address by way of the gateway's, are denied by default.
    let host = world.host.start(|| TcpListener::bind(("0.0.0.0", 8000)));
    let listener = host.recv_timeout(LIMIT).expect("it ends").expect("its port");
    let script = "for at in 203.0.113.1/8000 203.0.113.1/8001 203.0.113.2/8000 192.168.64.1/8000 \
                  169.254.169.254/80; do \
                  if timeout 20 bash -c \"exec 3<>/dev/tcp/$at\" 2>/dev/null; then echo reached; \
                  else echo refused; fi; done";
    let rules = ["--deny", "203.0.113.0/24", "--allow", "203.0.113.1:8000,tcp"];
    let output = world.run_netns(&[&rules[..], &["--", "bash", "-c", script]].concat());
    if output.status.code() == Some(127) {
        return eprintln!("skipped: there is no bash");
    }
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines, ["reached", "refused", "refused", "refused", "refused"], "{err}");
    serving.recv_timeout(LIMIT).expect("it ends").expect("a client");
    drop(listener);
}
