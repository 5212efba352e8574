//! Servers, clients and inherited sockets.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::task::Poll;
use std::time::{Duration, Instant};

use vmring_virtio::vhost_user::{Adopted, Listener, Progress, Session, adopt, connect};

use crate::frontend::*;
use crate::harness::*;

fn kind<T: std::fmt::Debug>(result: io::Result<T>) -> ErrorKind {
    result.expect_err("this is refused").kind()
}

/// Goal: one device serves one front end after the other, on a socket that only its owner may use.
#[test]
fn a_listener_accepts_again_after_a_disconnect() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let listener = Listener::bind(&path).expect("a listener");
    assert_eq!(fs::metadata(&path).expect("its file").permissions().mode() & 0o777, 0o600);
    assert!(listener.accept().expect("nobody is there").is_none());
    let mut device = Device::default();
    for round in 0..3 {
        let frontend = Frontend::on(UnixStream::connect(&path).expect("a connection"));
        let socket = listener.accept().expect("it is accepted").expect("it is there");
        let mut session = Session::new(socket, device, settings());
        frontend.send(&Sent::number(SET_FEATURES, FEATURES));
        frontend.send(&Sent::new(GET_FEATURES, []));
        assert_eq!(session.process().expect("they are right"), Progress::Idle);
        assert_eq!(frontend.reply().number(), LOGGED);
        drop(frontend);
        assert_eq!(session.process().expect("it has gone"), Progress::Closed);
        assert_eq!(session.end(), Poll::Ready(()));
        device = session.into_backend();
        assert_eq!(device.calls.len(), round + 1, "features are told to each session");
    }
    drop(listener);
    assert!(!path.exists(), "the file is removed");
}

/// Goal: what a server that was killed left behind does not stop the next one, and a living server or
/// another file is not touched.
#[test]
fn a_listener_replaces_what_is_left_over_and_nothing_else() {
    let folder = Folder::new();
    let path = folder.path("socket");
    drop(UnixListener::bind(&path).expect("a server"));
    assert!(path.exists(), "the standard library leaves its file");
    let listener = Listener::bind(&path).expect("it is left over");

    assert_eq!(kind(Listener::bind(&path)), ErrorKind::AddrInUse);
    assert!(UnixStream::connect(&path).is_ok(), "the first one still listens");
    // Its queue is full: it is alive all the same.
    let waiting: Vec<_> = std::iter::from_fn(|| connect(&path).ok()).take(500).collect();
    assert!(waiting.len() < 500);
    assert_eq!(kind(Listener::bind(&path)), ErrorKind::AddrInUse);
    drop(waiting);

    let other = folder.path("other");
    fs::write(&other, "text").expect("a file");
    assert_eq!(kind(Listener::bind(&other)), ErrorKind::AlreadyExists);
    let link = folder.path("link");
    std::os::unix::fs::symlink(&other, &link).expect("a link");
    assert_eq!(kind(Listener::bind(&link)), ErrorKind::AlreadyExists);
    assert_eq!(fs::read_to_string(&other).expect("the file"), "text");

    // Another server has taken the path since: its file stays.
    fs::remove_file(&path).expect("the file");
    let second = UnixListener::bind(&path).expect("a server");
    let inode = fs::metadata(&path).expect("its file").ino();
    drop(listener);
    assert_eq!(fs::metadata(&path).expect("it is still there").ino(), inode);
    drop(second);
}

/// Goal: of several servers that start at once on a path that is left over, one gets it.
#[test]
fn one_of_several_servers_gets_a_path() {
    let folder = Folder::new();
    let path = folder.path("socket");
    for _ in 0..100 {
        drop(UnixListener::bind(&path).expect("a server"));
        let start = std::sync::Barrier::new(4);
        let results: Vec<_> = std::thread::scope(|scope| {
            let bind = || {
                start.wait();
                Listener::bind(&path)
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(bind)).collect();
            threads.into_iter().map(|thread| thread.join().expect("it ends")).collect()
        });
        let (good, bad): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        assert_eq!(good.len(), 1);
        // One that was stopped while it had the lock makes the others wait too long.
        let lost = [ErrorKind::AddrInUse, ErrorKind::TimedOut];
        assert!(bad.into_iter().all(|result| lost.contains(&kind(result))));
        assert!(UnixStream::connect(&path).is_ok(), "it can be reached");
        drop(good);
        assert!(!path.exists());
    }
}

/// Goal: a process that holds the lock of a folder holds up no start for long: the lock is waited for, and
/// then there is a sentence.
#[test]
fn a_folder_that_is_locked_is_waited_for_and_refused() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let lock = || {
        let folder = fs::File::open(path.parent().expect("a folder")).expect("it can be read");
        // SAFETY: the call takes numbers only.
        let locked = unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX) };
        assert_eq!(locked, 0, "nobody else has it");
        folder
    };
    let held = lock();
    let refused = Listener::bind(&path).expect_err("it is locked");
    assert_eq!(refused.kind(), ErrorKind::TimedOut);
    assert!(
        refused.to_string().contains("another process holds a lock of the folder"),
        "{refused}"
    );
    assert!(!path.exists());
    drop(held);
    // If this thread is stopped meanwhile, the other one waits too long.
    let began = Instant::now();
    loop {
        let held = lock();
        let binding = std::thread::spawn({
            let path = path.clone();
            move || Listener::bind(&path)
        });
        std::thread::sleep(Duration::from_millis(100));
        drop(held);
        match binding.join().expect("it ends") {
            Ok(_) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::TimedOut, "the lock is free"),
        }
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "a lock that is free is never waited for"
        );
    }
}

/// Goal: a path that is too long, empty or has a zero is refused by a sentence.
#[test]
fn paths_are_limited_as_the_system_limits_them() {
    let folder = Folder::new();
    let longest = if cfg!(target_os = "macos") { 103 } else { 107 };
    let name = |len: usize| {
        let folder = folder.path("");
        folder.join("x".repeat(len - folder.as_os_str().len()))
    };
    drop(Listener::bind(&name(longest)).expect("the longest path"));
    let error = Listener::bind(&name(longest + 1)).expect_err("it is too long");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains(&longest.to_string()), "{error}");
    assert_eq!(kind(connect(&name(longest + 1))), ErrorKind::InvalidInput);
    assert_eq!(kind(connect(Path::new(""))), ErrorKind::InvalidInput);
    assert_eq!(kind(connect(Path::new("a\0b"))), ErrorKind::InvalidInput);
}

/// Goal: a client hears at once that there is no server, or that it is busy, and tries again later.
#[test]
fn a_client_does_not_wait() {
    let folder = Folder::new();
    let path = folder.path("socket");
    assert_eq!(kind(connect(&path)), ErrorKind::NotFound);
    drop(UnixListener::bind(&path).expect("a server"));
    assert_eq!(kind(connect(&path)), ErrorKind::ConnectionRefused);
    fs::remove_file(&path).expect("the file");
    let server = UnixListener::bind(&path).expect("a front end that listens");
    let socket = connect(&path).expect("a connection");
    let frontend = Frontend::on(server.accept().expect("a connection").0);
    let mut session = Session::new(socket, Device::default(), settings());
    frontend.send(&Sent::new(GET_FEATURES, []));
    assert_eq!(session.process().expect("it is right"), Progress::Idle);
    assert_eq!(frontend.reply().number(), LOGGED);
    // A queue that is full, of a server with a short one. Linux says so; macOS refuses.
    let busy = folder.path("busy");
    let _listener = Listener::bind(&busy).expect("a listener");
    let mut waiting = Vec::new();
    let refused = loop {
        match connect(&busy) {
            Ok(socket) => waiting.push(socket),
            Err(error) => break error.kind(),
        }
        assert!(waiting.len() < 500, "the queue has an end");
    };
    let busy = [ErrorKind::WouldBlock, ErrorKind::ConnectionRefused];
    assert!(busy.contains(&refused), "{refused}");
}

/// Goal: an inherited socket is taken for what it is.
#[test]
fn an_inherited_socket_is_adopted() {
    let folder = Folder::new();
    let (own, other) = UnixStream::pair().expect("sockets");
    let Ok(Adopted::Connected(socket)) = adopt(OwnedFd::from(other)) else {
        panic!("it is connected")
    };
    let mut session = Session::new(socket, Device::default(), settings());
    let frontend = Frontend::on(own);
    frontend.send(&Sent::new(GET_FEATURES, []));
    assert_eq!(session.process().expect("it is right"), Progress::Idle);

    let path = folder.path("socket");
    let server = UnixListener::bind(&path).expect("a server");
    let Ok(Adopted::Listening(listener)) = adopt(OwnedFd::from(server)) else {
        panic!("it listens")
    };
    assert!(listener.accept().expect("nobody is there").is_none());
    let _client = UnixStream::connect(&path).expect("a connection");
    assert!(listener.accept().expect("it is there").is_some());
    drop(listener);
    assert!(path.exists(), "who made the file removes it");

    let datagram = UnixDatagram::unbound().expect("a socket");
    assert_eq!(kind(adopt(datagram.into())), ErrorKind::InvalidInput);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
    assert_eq!(kind(adopt(tcp.into())), ErrorKind::InvalidInput);
    assert_eq!(kind(adopt(memory(1).into())), ErrorKind::InvalidInput);
    assert_eq!(kind(adopt(io::pipe().expect("a pipe").0.into())), ErrorKind::InvalidInput);
}
