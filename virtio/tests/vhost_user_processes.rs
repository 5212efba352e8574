//! Tests of the vhost-user back end that start processes. They are a program of their own, because a
//! process that starts has copies of all descriptors for a moment, and other tests see by a closed
//! descriptor that its last copy is gone.

mod frontend;

#[path = "vhost_user/harness.rs"]
#[allow(dead_code)] // It has more than these tests need.
mod harness;

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::process::{Child, Command, Stdio};
use std::task::Poll;
use std::time::{Duration, Instant};

use vmring_virtio::vhost_user::{Listener, Progress, Session};

use crate::frontend::Folder;
use crate::harness::*;

/// Ends the process with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Polls until `done` returns true, or the session is closed.
fn until(
    session: &mut Session<Device>,
    what: &str,
    mut done: impl FnMut(&Session<Device>) -> bool,
) {
    let start = Instant::now();
    while !done(session) {
        assert!(start.elapsed() < Duration::from_secs(60), "it never happened: {what}");
        match session.process() {
            Ok(Progress::Idle) => std::thread::sleep(Duration::from_millis(1)),
            Ok(Progress::Closed) => return,
            Ok(_) => {}
            Err(error) => panic!("{what}: {error}: {error:?}"),
        }
    }
}

/// Goal: the negotiation of dpdk-testpmd starts two rings for each of its queues, and its end stops
/// them. Method: with `-i` it starts its ports and then waits for a command.
#[test]
fn virtio_user_of_dpdk_starts_and_stops_its_rings() {
    if std::thread::available_parallelism().is_ok_and(|count| count.get() < 2) {
        return println!("skipped: dpdk-testpmd needs two processors");
    }
    for options in ["queues=1", "queues=2,mrg_rxbuf=0,in_order=1", "packed_vq=0,server=0"] {
        let folder = Folder::new();
        let path = folder.path("socket");
        let listener = Listener::bind(&path).expect("a listener");
        let vdev = format!("net_virtio_user0,path={},{options}", path.display());
        let queues = if options.contains("queues=2") { 2 } else { 1 };
        // EAL has two main options that exclude each other: no huge pages, and no files.
        let output = File::create(folder.path("output")).expect("a file");
        let command = Command::new("dpdk-testpmd")
            .args(["-l", "0,1", "--no-huge", "-m", "128", "--no-pci", "--no-telemetry"])
            .args(["--file-prefix", "test", "--vdev", &vdev, "--", "-i", "--nb-cores=1"])
            .args([format!("--rxq={queues}"), format!("--txq={queues}")])
            .arg("--total-num-mbufs=2048")
            .env("RUNTIME_DIRECTORY", folder.path(""))
            .stdin(Stdio::piped())
            .stdout(output.try_clone().expect("a copy"))
            .stderr(output)
            .spawn();
        let mut process = match command {
            Ok(child) => Process(child),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return println!("skipped: dpdk-testpmd is not installed");
            }
            Err(error) => panic!("dpdk-testpmd: {error}"),
        };
        let start = Instant::now();
        let socket = loop {
            match listener.accept().expect("it is accepted") {
                Some(socket) => break socket,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
            if let Some(status) = process.0.try_wait().expect("the process") {
                let output = std::fs::read_to_string(folder.path("output")).unwrap_or_default();
                panic!("dpdk-testpmd ends by itself: {status}:\n{output}");
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it does not connect");
        };
        // VIRTIO_NET_F_MQ.
        let device = Device { more_features: 1 << 22, ..Device::default() };
        let mut session = Session::new(socket, device, settings());
        let rings = 2 * queues;
        until(&mut session, &format!("{options}: all rings start"), |session| {
            let running = &session.backend().rings;
            running.len() == rings && running.values().all(|ring| ring.enabled)
        });
        for ring in session.backend().rings.values() {
            assert!(ring.kick.is_some());
            // The guest's side has set its available ring up.
            let index = ring.memory.slice(ring.available, 4).expect("it is in the memory");
            assert!(index.read::<4>().is_some());
        }
        let mut input = process.0.stdin.take().expect("its input");
        input.write_all(b"quit\n").expect("it reads commands");
        until(&mut session, &format!("{options}: all rings stop"), |session| {
            session.backend().rings.is_empty()
        });
        let stops =
            (session.backend().calls.iter()).filter(|call| matches!(call, Call::Stop(_))).count();
        assert!(stops >= rings, "{options}: {:?}", session.backend().calls);
        until(&mut session, "it goes", |_| false);
        assert_eq!(session.end(), Poll::Ready(()));
        drop(input);
    }
}

/// Goal: descriptors that the kernel could not hand over, because the limit of open files is reached,
/// are an error, and not a message without them. Method: the test runs itself again, with a limit.
#[cfg(target_os = "linux")]
#[test]
fn descriptors_that_are_lost_are_an_error() {
    use crate::frontend::{Region, Sent};
    use vmring_virtio::vhost_user::Error;
    const CHILD: &str = "VMRING_TEST_LIMITED";
    if std::env::var_os("VMRING_TEST_PAGE_SIZE").is_some() {
        return println!("skipped: an emulator starts no program of its own kind");
    }
    if std::env::var_os(CHILD).is_none() {
        let output = Command::new(std::env::current_exe().expect("this program"))
            .args(["descriptors_that_are_lost_are_an_error", "--exact", "--test-threads=1"])
            .env(CHILD, "1")
            .output()
            .expect("this program runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let mut harness = Harness::running();
    let regions = [region(), Region { guest_address: 1 << 40, user_address: 1 << 40, ..region() }];
    let message = Sent::table(&regions).with(&harness.memory).with(&harness.memory);
    harness.frontend.send(&message);
    // There is no room for more than are open.
    let open = std::fs::File::open("/").expect("a folder");
    let limit = std::os::fd::AsRawFd::as_raw_fd(&open) as libc::rlim_t;
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: the pointer is to a value that lives until the call returns.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    drop(message);
    // The copies of the message were the highest ones: fill their places.
    let mut filled = Vec::new();
    while let Ok(file) = std::fs::File::open("/") {
        filled.push(file);
    }
    let error = harness.session.process().expect_err("the descriptors are lost");
    assert!(matches!(error, Error::DescriptorsLost), "{error:?}");
    drop(filled);
    assert_eq!(harness.session.end(), Poll::Ready(()));
}
