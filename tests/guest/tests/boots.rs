//! What a test may expect of a guest. It boots both kinds, so it takes a minute.

#![cfg(target_os = "linux")]

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vmring_guest::{Engine, Folder, Guest, Missing, Nic, Outcome, Process};

const LIMIT: Duration = Duration::from_secs(60);

/// The guest, unless something is missing: then reports that the test is skipped, and why.
fn have(guest: Result<Guest, Missing>) -> Option<Guest> {
    guest.inspect_err(|why| skip(&why.to_string())).ok()
}

/// Writes to stderr directly, because the test harness captures `eprintln!`.
fn skip(why: &str) {
    let name = thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
}

#[test]
fn a_guest_runs_scripts_and_says_how_they_end() {
    for engine in [Engine::Uml, Engine::Qemu] {
        let Some(guest) = have(Guest::new(engine)) else { continue };
        let guest = guest.file("/opt/hello", "#!/bin/sh\necho hello from $0\nexit 7\n");
        let Some(guest) = have(guest.program("ethtool")) else { continue };
        let mut guest = guest.start();
        let outcome = guest.run("/opt/hello");
        assert_eq!(outcome, Outcome { status: 7, output: "hello from /opt/hello\n".to_owned() });
        assert_eq!(guest.run("kill -9 $$").status, 137);
        // No byte of it is changed or lost, and there need be no newline at the end.
        let lines: String = (1..=2000).map(|n| format!("line {n}\n")).collect();
        assert_eq!(guest.sh("seq 2000 | sed 's/^/line /'"), lines);
        assert_eq!(guest.sh("printf 'a\\r\\tb\\003'"), "a\r\tb\u{3}");
        // A script may be longer than a terminal's line.
        let long = format!("echo '{}'", "x".repeat(10_000));
        assert_eq!(guest.sh(&long).len(), 10_001);
        assert!(guest.sh("ethtool --version").starts_with("ethtool version"));
        // What goes on in the background writes on.
        guest.sh("(sleep 1; echo late) & ");
        let end = guest.wait_for("late\n", 0);
        assert_eq!(end, guest.text().len());
        assert!(guest.power_off().success());
    }
}

#[test]
fn a_guest_boots_again_after_a_reset() {
    let Some(guest) = have(Guest::qemu()) else { return };
    let mut guest = guest.start();
    for _ in 0..2 {
        guest.sh("[ ! -e /tmp/mark ] && touch /tmp/mark");
        guest.reset();
    }
    guest.sh("[ ! -e /tmp/mark ]");
}

#[test]
fn a_guest_of_qemu_reaches_the_network_of_its_user() {
    let Some(guest) = have(Guest::qemu()) else { return };
    let nic = Nic::netdev("user");
    let mac = nic.mac().to_owned();
    let mut guest = guest.nic(nic).start();
    assert_eq!(guest.sh("cat /sys/class/net/eth0/address").trim(), mac);
    guest.sh("udhcpc -i eth0 -n -q -t 10 && grep -q router=10.0.2.2 /tmp/dhcp.eth0");
    guest.sh("ping -c 3 -W 5 10.0.2.2");
}

/// Goal: two interfaces of QEMU are joined by sockets, and a guest moves between two QEMUs while it
/// pings the other.
#[test]
fn a_guest_migrates_while_it_pings() {
    let Some(guest) = have(Guest::qemu()) else { return };
    let folder = Folder::new();
    let nic = |from: &str, to: &str| {
        let path = |name| folder.join(name).display().to_string();
        Nic::netdev(format!(
            "dgram,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            path(from),
            path(to)
        ))
    };
    let still = guest.clone().nic(nic("still", "moving"));
    let moving = guest.nic(nic("moving", "still"));
    let (still, mut old) = (still.start(), moving.clone().start());
    let mut still = still;
    still.sh("ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up");
    old.sh("ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; ping -c 2 -W 5 10.0.0.1");
    old.keep_changing();
    let pings = old.begin("ping -c 40 -i 0.1 10.0.0.1");
    old.wait_for("seq=5", 0);
    // It binds the same path, so that what the other sends comes here.
    let mut new = moving.incoming().start();
    // Until the move it loses what is for the old one, which goes on sending.
    old.migrate_to(&mut new, |_| {});
    let outcome = new.finish(&pings);
    assert_eq!(outcome.status, 0, "{}", outcome.output);
    // The whole output is there, what was written before the move and what was written after it.
    assert!(outcome.output.starts_with("PING 10.0.0.1"), "{}", outcome.output);
    assert!(outcome.output.contains("40 packets transmitted"), "{}", outcome.output);
    assert_eq!(new.sh("echo here"), "here\n");
}

/// Goal: guests are front ends of vhost-user that come back after their back end has gone. Method:
/// dpdk-testpmd forwards between two of them, is killed, and starts again.
#[test]
fn guests_of_qemu_find_a_back_end_of_vhost_user_again() {
    let Some(guest) = have(Guest::qemu()) else { return };
    let processors = thread::available_parallelism().map_or(1, |count| count.get());
    if processors < 2 || Command::new("dpdk-testpmd").arg("-h").output().is_err() {
        return skip("dpdk-testpmd with two processors is missing");
    }
    let sockets = Folder::new();
    let port = |number: u32| sockets.join(&format!("socket{number}"));
    let start = || {
        let folder = Folder::new();
        let mut testpmd = Command::new("dpdk-testpmd");
        testpmd.args(["-l", "0,1", "--no-huge", "-m", "128", "--no-pci", "--no-telemetry"]);
        for number in 0..2 {
            let path = port(number).display().to_string();
            // It does not replace a socket that is left.
            let _ = std::fs::remove_file(&path);
            testpmd.args(["--vdev", &format!("net_vhost{number},iface={path},queues=1,client=0")]);
        }
        testpmd
            .args(["--file-prefix", "guests", "--", "-i", "--auto-start", "--nb-cores=1"])
            .arg("--total-num-mbufs=2048")
            .env("RUNTIME_DIRECTORY", folder.join(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let testpmd = Process::start(&mut testpmd, folder);
        until("testpmd listens", || port(0).exists() && port(1).exists());
        testpmd
    };
    let mut testpmd = start();
    let boot = |number: u32| {
        let nic = Nic::vhost_user(port(number)).reconnects();
        let mut guest = guest.clone().nic(nic).start();
        guest.sh(&format!("ip addr add 10.0.0.{}/24 dev eth0; ip link set eth0 up", number + 1));
        guest
    };
    let (_one, mut other) = (boot(0), boot(1));
    let ping = "for try in $(seq 30); do ping -c 1 -W 1 10.0.0.1 && exit; done; exit 1";
    other.sh(ping);
    testpmd.kill();
    assert_ne!(other.run("ping -c 1 -W 1 10.0.0.1").status, 0);
    testpmd = start();
    other.sh(ping);
    drop(testpmd);
}

/// Goal: the transports of user-mode Linux. Method: it has a TAP of this machine, in a network
/// namespace, which needs root.
#[test]
fn a_guest_of_user_mode_linux_has_a_tap() {
    let Some(guest) = have(Guest::uml()) else { return };
    if !std::path::Path::new("/dev/net/tun").exists() {
        return skip("there is no /dev/net/tun");
    }
    let body = move || {
        // SAFETY: the argument is a plain number. The call concerns this thread only, and what it
        // starts.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return skip("a network namespace needs root");
        }
        let host =
            "ip tuntap add tap0 mode tap; ip addr add 10.0.0.1/24 dev tap0; ip link set tap0 up";
        assert!(Command::new("sh").args(["-c", host]).status().expect("a shell").success());
        let mut guest = guest.nic(Nic::vector("transport=tap,ifname=tap0,depth=128,gro=1")).start();
        guest.sh("ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up");
        guest.sh("ping -c 3 -i 0.2 -W 5 10.0.0.1");
    };
    let name = "a_guest_of_user_mode_linux_has_a_tap".to_owned();
    let thread = thread::Builder::new().name(name).spawn(body);
    thread.expect("a thread").join().expect("the body does not panic");
}

/// Goal: a test that is killed leaves no process and no file. Method: this program starts itself as
/// such a test.
#[test]
fn a_killed_test_leaves_nothing_behind() {
    const ENGINE: &str = "VMRING_TEST_GUEST_TO_LEAVE";
    let name = "a_killed_test_leaves_nothing_behind";
    if let Some(engine) = std::env::var_os(ENGINE) {
        let engine = if engine == "Uml" { Engine::Uml } else { Engine::Qemu };
        let mut guest = Guest::new(engine).expect("it was there").start();
        guest.sh("sleep 600 &");
        println!("started");
        thread::sleep(LIMIT * 2);
        return;
    }
    for engine in [Engine::Uml, Engine::Qemu] {
        if have(Guest::new(engine)).is_none() {
            continue;
        }
        // What it leaves is in a folder of its own.
        let folder = Folder::new();
        let temporary = folder.join("tmp");
        std::fs::create_dir(&temporary).expect("a folder");
        let said = folder.join("said");
        let mut myself = Command::new(std::env::current_exe().expect("this program"));
        myself
            .args([name, "--exact", "--nocapture"])
            .env(ENGINE, format!("{engine:?}"))
            .env("TMPDIR", &temporary)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&said).expect("a file"));
        let mut test = Process::start(&mut myself, folder);
        until("the guest starts", || {
            assert!(test.ended().is_none(), "the test has ended");
            std::fs::read_to_string(&said).expect("a file").contains("started")
        });
        let uses = || processes_with(&temporary.display().to_string());
        assert_ne!(uses(), [0; 0], "the guest has its files there");
        test.kill();
        until("the guest ends", || uses().is_empty());
        until("its files are gone", || {
            std::fs::read_dir(&temporary).expect("a folder").next().is_none()
        });
    }
}

/// The processes whose command line or environment has these words.
fn processes_with(words: &str) -> Vec<u32> {
    let has_words = |path: PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).contains(words)
    };
    let all = std::fs::read_dir("/proc").expect("a list of processes").flatten();
    let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let uses = |pid: &u32| {
        let file = |name| PathBuf::from(format!("/proc/{pid}/{name}"));
        has_words(file("cmdline")) || has_words(file("environ"))
    };
    numbers.filter(uses).collect()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "it never happened: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
