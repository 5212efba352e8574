//! Clients of each wire that know nothing of this crate: programs in Python that play QEMU, vfkit, krunkit
//! and a client of socket_vmnet, as their sources and documents describe them.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use vmring::{Direction, Interface, RetryPolicy, Socket};

use crate::sockets::{Folder, Wire, echo_until, exists};
use crate::support::{LONG, eventually, guarded, skip, stage};

/// A client that is to be run with these arguments. `None` without Python.
fn client(script: &str, arguments: &[&str]) -> Option<Command> {
    let version = Command::new("python3").arg("--version").stdout(Stdio::null()).status();
    if !version.is_ok_and(|status| status.success()) {
        skip("there is no python3");
        return None;
    }
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/wire_clients");
    let mut command = Command::new("python3");
    command.arg("-B").arg(format!("{folder}/{script}")).args(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    Some(command)
}

/// Sends back what a client sends, until it ends. It must end well.
fn answer(interface: &Interface, mut child: Child) {
    let retry = RetryPolicy { attempts: 1_000_000, delay: Duration::from_micros(50) };
    let ring = interface.ring(Direction::Both).retry(retry).build();
    let start = std::time::Instant::now();
    let mut status = None;
    echo_until(&mut ring.expect("a ring"), |_| {
        if start.elapsed() > LONG {
            let _ = child.kill();
        }
        status = child.try_wait().expect("a child");
        status.is_some()
    });
    let output = child.wait_with_output().expect("a child");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(status.is_some_and(|status| status.success()), "{text}");
    assert!(interface.drops().iter().all(|(why, n)| *n == 0 || *why == "no peer"));
    interface.stop(LONG).expect("it stops");
}

/// Runs a client against a socket that listens. `PATH` among its arguments is the path.
fn against(socket: Socket, script: &str, arguments: &[&str]) {
    let folder = Folder::new();
    let path = folder.path("wire");
    stage(format!("{script} {arguments:?}"));
    let text = path.to_str().expect("a path of text");
    let local = folder.path("vm");
    let local = local.to_str().expect("a path of text");
    let arguments: Vec<&str> = arguments
        .iter()
        .map(|argument| match *argument {
            "PATH" => text,
            "LOCAL" => local,
            other => other,
        })
        .collect();
    let Some(mut client) = client(script, &arguments) else { return };
    let interface = Interface::builder().device(socket.listen(&path)).start().expect("a wire");
    answer(&interface, client.spawn().expect("a client"));
    assert!(!exists(&path));
}

#[test]
fn qemu_as_client_of_a_stream() {
    guarded(|| against(Socket::stream(), "qemu_stream.py", &["connect", "PATH"]));
}

#[test]
fn libkrun_with_headers_over_a_stream() {
    let socket = || Socket::stream().virtio_header(true);
    guarded(move || against(socket(), "qemu_stream.py", &["connect", "PATH", "--header"]));
}

#[test]
fn a_client_of_socket_vmnet() {
    guarded(|| against(Socket::stream(), "socket_vmnet.py", &["PATH"]));
}

#[test]
fn qemu_as_server_of_a_stream() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let arguments = ["serve", path.to_str().expect("a path of text")];
        let Some(mut client) = client("qemu_stream.py", &arguments) else { return };
        let socket = Socket::stream().connect(&path).reconnect(Some(Duration::from_millis(20)));
        let interface = Interface::builder().device(socket).start().expect("a wire");
        answer(&interface, client.spawn().expect("a client"));
    });
}

/// Runs a client that has one end of a pair of sockets as a descriptor.
fn over_descriptor(wire: Wire, script: &str) {
    let [ours, theirs] = wire.sockets();
    let number = theirs.as_raw_fd().to_string();
    let Some(mut client) = client(script, &["fd", &number]) else { return };
    inherit(&theirs);
    let child = client.spawn().expect("a client");
    drop(theirs);
    let socket = wire.driver().from_fd(ours);
    answer(&Interface::builder().device(socket).start().expect("a wire"), child);
}

/// Lets the programs that this one starts have a descriptor.
fn inherit(fd: &OwnedFd) {
    // SAFETY: the call takes numbers only.
    let set = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
    assert_eq!(set, 0);
}

#[test]
fn qemu_with_a_datagram_descriptor() {
    guarded(|| over_descriptor(Wire::Datagram, "qemu_dgram.py"));
}

#[test]
fn qemu_over_datagrams_from_path_to_path() {
    guarded(|| against(Socket::datagram(), "qemu_dgram.py", &["LOCAL", "PATH"]));
}

#[test]
fn vfkit() {
    guarded(|| {
        against(Socket::datagram(), "unixgram.py", &["vfkit", "PATH"]);
        against(Socket::datagram(), "unixgram.py", &["vfkit-quiet", "PATH"]);
    });
}

#[test]
fn krunkit() {
    guarded(|| {
        against(Socket::datagram(), "unixgram.py", &["krunkit", "PATH"]);
        against(Socket::datagram(), "unixgram.py", &["krunkit-quiet", "PATH"]);
        let socket = Socket::datagram().virtio_header(true);
        against(socket, "unixgram.py", &["krunkit-header", "PATH"]);
    });
}

#[cfg(target_os = "linux")]
#[test]
fn user_mode_linux_over_sequenced_packets() {
    guarded(|| against(Socket::seqpacket(), "bess.py", &["PATH"]));
}

/// Goal: a client that plays a VMM notices a peer that does not answer. Method: nobody answers.
#[test]
fn a_client_without_an_answer_fails() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let arguments = ["connect", path.to_str().expect("a path of text")];
        let Some(mut client) = client("qemu_stream.py", &arguments) else { return };
        let listener =
            std::os::unix::net::UnixListener::bind(Path::new(&path)).expect("a listener");
        let mut child = client.spawn().expect("a client");
        drop(listener.accept().expect("it connects"));
        let mut status = None;
        eventually("the client ends", || {
            status = child.try_wait().expect("a child");
            status.is_some()
        });
        assert!(status.is_some_and(|status| !status.success()));
    });
}
