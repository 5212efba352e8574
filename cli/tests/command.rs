//! The command as a user meets it: run, read, and judged by what it prints and how it exits.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "command/bench.rs"]
mod bench;
#[path = "command/captures.rs"]
mod captures;
#[cfg(target_os = "linux")]
#[path = "command/carry.rs"]
mod carry;
#[path = "command/completions.rs"]
mod completions;
#[path = "command/dhcp.rs"]
mod dhcp;
#[path = "command/ends.rs"]
mod ends;
#[cfg(target_os = "linux")]
#[path = "command/host.rs"]
mod host;
#[cfg(target_os = "linux")]
#[path = "command/http.rs"]
mod http;
#[path = "command/manual.rs"]
mod manual;
#[cfg(target_os = "linux")]
#[path = "command/merging.rs"]
mod merging;
#[path = "command/personality.rs"]
mod personality;
#[cfg(target_os = "linux")]
#[path = "command/programs.rs"]
mod programs;
#[cfg(target_os = "linux")]
#[path = "command/run_netns.rs"]
mod run_netns;
#[path = "command/serve.rs"]
mod serve;
#[path = "command/signals.rs"]
mod signals;
#[cfg(target_os = "linux")]
#[path = "command/visitor.rs"]
mod visitor;
#[path = "command/width.rs"]
mod width;
#[path = "command/wires.rs"]
mod wires;
#[cfg(target_os = "linux")]
#[path = "command/world.rs"]
mod world;

/// No run here needs a tenth of this, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs `vmring` with `arguments`. If it does not end, kills it and fails.
fn vmring(arguments: &[&str]) -> Output {
    let child = Command::new(env!("CARGO_BIN_EXE_vmring"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    ended(child, arguments)
}

/// Waits for the end of a child, whose output is piped. If it does not end, kills it and fails.
fn ended(mut child: Child, arguments: &[&str]) -> Output {
    let mut stdout = child.stdout.take().expect("piped");
    let mut stderr = child.stderr.take().expect("piped");
    let out = thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    let err = thread::spawn(move || {
        let mut bytes = Vec::new();
        stderr.read_to_end(&mut bytes).map(|_| bytes)
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("it can be waited for") {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill().expect("it can be killed");
            panic!("vmring {arguments:?} does not end");
        }
        thread::sleep(Duration::from_millis(10));
    };
    let bytes = |thread: thread::JoinHandle<std::io::Result<Vec<u8>>>| {
        thread.join().expect("the reader ends").expect("the pipe can be read")
    };
    Output { status, stdout: bytes(out), stderr: bytes(err) }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("it prints text")
}

/// What was printed for people, in one line. A path can put the end of a line between any two words.
fn unfolded(bytes: &[u8]) -> String {
    text(bytes).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A run that succeeds and prints exactly one JSON object.
fn json(arguments: &[&str]) -> Value {
    let output = vmring(arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let value: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert!(value.is_object());
    value
}

/// A run with invalid arguments: exit code 2, nothing on stdout, one sentence on stderr.
fn refused(arguments: &[&str]) -> String {
    refusal(&vmring(arguments), arguments)
}

/// The sentence of a run with invalid arguments.
fn refusal(output: &Output, arguments: &[&str]) -> String {
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    let message = text(&output.stderr).trim_end().to_owned();
    assert!(!message.is_empty() && !message.contains('\n'), "one sentence: {message}");
    message
}

/// A path in a folder of the test's own, which is empty at first.
fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a scratch folder");
    folder
}

#[test]
fn the_demo_moves_every_byte_and_says_so_in_json() {
    let report = json(&["demo", "--json", "--bytes", "8M"]);
    assert_eq!(report["mode"], "shared");
    let guests = report["guests"].as_array().expect("a list");
    assert_eq!(guests.len(), 2);
    for guest in guests {
        assert_eq!(guest["mac"].as_str().expect("a MAC").len(), 17);
        assert_eq!((&guest["mtu"], &guest["max_packet_size"]), (&1500.into(), &1518.into()));
        assert!(guest["ipv4"].as_str().expect("an address").starts_with("192.168.64."));
        assert_eq!(guest["lease_seconds"], 86_400);
    }
    assert_ne!(guests[0]["ipv4"], guests[1]["ipv4"]);
    let ping = &report["ping"];
    assert!(ping["sent"].as_u64().expect("a number") >= 100);
    assert_eq!(ping["sent"], ping["received"]);
    assert!(ping["rtt_us_p50"].as_f64() > Some(0.0) && ping["rtt_us_p99"].as_f64() > Some(0.0));
    let transfer = &report["transfer"];
    assert_eq!((&transfer["bytes"], &transfer["sha256_ok"]), (&(8 << 20).into(), &true.into()));
    assert!(transfer["seconds"].as_f64() > Some(0.0));
    assert!(transfer["gbit_per_s"].as_f64() > Some(0.0));
    assert!(transfer["packets"].as_u64() > Some((8 << 20) / 1500));
    let fetch = &report["fetch"];
    assert_eq!((&fetch["bytes"], &fetch["sha256_ok"]), (&(8 << 20).into(), &true.into()));
    assert_eq!(report["drops"], 0);
}

/// With offload the guests send packets that are longer than the MTU, and what arrives is the same.
#[test]
fn offload_on_the_embedded_network_makes_fewer_and_larger_packets() {
    for drive in ["thread", "shared", "inline"] {
        let report = json(&["demo", "--json", "--offload", "--bytes", "8M", "--drive", drive]);
        assert_eq!(report["offloads"], serde_json::json!(["checksum", "tso4", "virtio_header"]));
        let transfer = &report["transfer"];
        assert_eq!((&transfer["bytes"], &transfer["sha256_ok"]), (&(8 << 20).into(), &true.into()));
        let packets = transfer["packets"].as_u64().expect("a number");
        assert!(packets < (8 << 20) / 1460 / 2, "{packets} for 8 MiB");
        assert_eq!(report["fetch"]["sha256_ok"], true);
        assert_eq!((&report["guests"][0]["mtu"], &report["drops"]), (&1500.into(), &0.into()));
    }
}

/// The macOS driver, end to end over the simulated vmnet: leases, pings, a transfer.
#[cfg(not(target_os = "macos"))]
#[test]
fn the_demo_runs_on_the_vmnet_driver_over_the_simulator() {
    for (mode, network) in [("shared", "192.168.64."), ("host", "192.168.128.")] {
        for drive in ["thread", "inline"] {
            let report = json(&[
                "demo",
                "--json",
                "--device",
                "vmnet-sim",
                "--bytes",
                "2M",
                "--mode",
                mode,
                "--drive",
                drive,
            ]);
            for guest in report["guests"].as_array().expect("a list") {
                assert_eq!(
                    (&guest["mtu"], &guest["lease_seconds"]),
                    (&1500.into(), &86_400.into())
                );
                assert!(guest["ipv4"].as_str().expect("an address").starts_with(network));
            }
            assert_eq!(report["ping"]["sent"], report["ping"]["received"]);
            assert_eq!(report["transfer"]["sha256_ok"], true);
        }
    }
}

/// Tests that need a TAP report it if they cannot have one. They write past the test harness, which
/// would capture it.
#[cfg(target_os = "linux")]
mod tap {
    use std::io::Write;

    use super::*;

    pub(super) fn skip(why: &str) {
        let name = thread::current().name().unwrap_or("test").to_owned();
        let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
    }

    fn is_root() -> bool {
        // SAFETY: it has no arguments and cannot fail.
        unsafe { libc::geteuid() == 0 }
    }

    /// Whether this process may have a TAP in a network namespace of its own.
    pub(super) fn is_possible() -> bool {
        let why = match std::env::var_os("VMRING_SKIP_TAP") {
            Some(_) => Some("VMRING_SKIP_TAP is set"),
            None => crate::host::obstacle(),
        };
        if let Some(why) = why {
            skip(why);
        }
        why.is_none()
    }

    /// A run on a TAP in which every step succeeded.
    fn demo(arguments: &[&str]) -> Value {
        let report = json(&[&["demo", "--json", "--device", "tap"], arguments].concat());
        assert_eq!((&report["ok"], &report["device"]), (&true.into(), &"tap".into()));
        let [guest, kernel] = &report["guests"].as_array().expect("a list")[..] else {
            panic!("not two guests: {report}")
        };
        assert_eq!((&guest["name"], &kernel["name"]), (&"guest0".into(), &"kernel".into()));
        assert_eq!(guest["gateway"], kernel["ipv4"]);
        assert_ne!(guest["ipv4"], kernel["ipv4"]);
        assert_ne!(guest["mac"], kernel["mac"]);
        assert_eq!(guest["lease_seconds"], 86_400);
        assert_eq!(kernel["packets_read"], Value::Null, "the kernel has no ring");
        assert_eq!(
            (&report["ping"]["sent"], &report["ping"]["received"]),
            (&100.into(), &100.into())
        );
        report
    }

    /// The transfers in both directions, of this many bytes.
    fn transfers(report: &Value, bytes: u64) -> [&Value; 2] {
        let transfers = [&report["transfer"], &report["transfer_back"]];
        for (transfer, (from, to)) in
            transfers.into_iter().zip([("guest0", "kernel"), ("kernel", "guest0")])
        {
            assert_eq!((&transfer["from"], &transfer["to"]), (&from.into(), &to.into()));
            assert_eq!((&transfer["bytes"], &transfer["sha256_ok"]), (&bytes.into(), &true.into()));
            assert!(transfer["gbit_per_s"].as_f64() > Some(0.0));
        }
        transfers
    }

    #[test]
    fn the_demo_runs_on_a_tap_with_the_kernel_by_both_engines() {
        if !is_possible() {
            return;
        }
        let report = demo(&["--bytes", "2M"]);
        transfers(&report, 2 << 20);
        assert_eq!(report["mode"], "shared");
        assert_eq!(report["guests"][0]["router"], report["guests"][1]["ipv4"]);
        assert_eq!(report["offloads"], serde_json::json!([]));
        let auto = report["engine"].as_str().expect("a name");
        assert!(["io_uring", "plain"].contains(&auto), "{auto}");

        for engine in ["io_uring", "plain"] {
            if engine == "io_uring" && auto != engine {
                skip("no io_uring here");
                continue;
            }
            for drive in ["thread", "inline"] {
                let report = demo(&[
                    "--bytes",
                    "1M",
                    "--engine",
                    engine,
                    "--drive",
                    drive,
                    "--mode",
                    "host",
                    "--subnet",
                    "10.7.0.1/30",
                    "--mtu",
                    "9000",
                ]);
                transfers(&report, 1 << 20);
                assert_eq!((&report["engine"], &report["mode"]), (&engine.into(), &"host".into()));
                let guest = &report["guests"][0];
                assert_eq!((&guest["ipv4"], &guest["mtu"]), (&"10.7.0.2".into(), &9000.into()));
                assert_eq!(guest["router"], Value::Null, "a host network has no router");
            }
        }
    }

    /// With offload the guest receives packets that are longer than the MTU.
    #[test]
    fn offload_makes_fewer_and_larger_packets_for_the_guest() {
        if !is_possible() {
            return;
        }
        for engine in ["auto", "plain"] {
            let report = demo(&["--bytes", "4M", "--offload", "--engine", engine]);
            let [_, back] = transfers(&report, 4 << 20);
            let offloads = report["offloads"].as_array().expect("a list");
            for offload in ["checksum", "tso4"] {
                assert!(offloads.contains(&offload.into()), "no {offload}: {offloads:?}");
            }
            let packets = back["data_packets"].as_u64().expect("a number");
            assert!(packets < (4 << 20) / 1460 / 2, "{packets} for 4 MiB");
            assert_eq!(report["guests"][0]["mtu"], 1500);
        }
    }

    #[test]
    fn a_capture_on_a_tap_has_the_kernels_packets() {
        if !is_possible() {
            return;
        }
        let path = scratch("tap").join("demo.pcapng");
        let report = demo(&["--bytes", "64K", "--capture", path.to_str().expect("UTF-8")]);
        let guest = &report["guests"][0];
        let both = [&guest["packets_read"], &guest["packets_written"]]
            .map(|packets| packets.as_u64().expect("a number"));
        assert_eq!(report["capture"]["packets"], both[0] + both[1]);
        assert!(both.into_iter().all(|packets| packets > 100), "{both:?}");
    }

    /// During and after the demo the host's network has no interface, namespace or table of the
    /// demo's.
    #[test]
    fn the_demo_on_a_tap_leaves_the_hosts_network_alone() {
        if !is_possible() {
            return;
        }
        let taps = || {
            let table = std::fs::read_to_string("/proc/thread-self/net/dev").expect("/proc");
            table.lines().filter(|line| line.trim_start().starts_with("tap")).count()
        };
        let before = taps();
        let most = thread::scope(|scope| {
            let demo = scope.spawn(|| demo(&["--idle", "1"]));
            let mut most = before;
            while !demo.is_finished() {
                most = most.max(taps());
                thread::sleep(Duration::from_millis(5));
            }
            demo.join().expect("it held");
            most
        });
        assert_eq!((most, taps()), (before, before));
    }

    /// What `info` says about the TAP: among the devices, and in its own section.
    fn info() -> [Value; 2] {
        let report = json(&["info", "--json"]);
        let devices = report["devices"].as_array().expect("a list");
        let mut taps = devices.iter().filter(|device| device["name"] == "tap");
        let device = taps.next().expect("it is listed");
        assert_eq!(taps.next(), None, "once");
        [device.clone(), report["tap"].clone()]
    }

    #[test]
    fn info_says_what_a_tap_can_do_here() {
        let [device, tap] = info();
        let engine = tap["engine"].as_str().expect("a name");
        assert_eq!(engine == "io_uring", tap["why_no_io_uring"].is_null(), "{tap}");
        assert!(["io_uring", "plain"].contains(&engine), "{engine}");
        assert!(tap["bridges"].is_array(), "{tap}");
        let forwarding = &tap["forwarding"];
        let seen = forwarding["on"].is_boolean() && forwarding["dropped_by"].is_array();
        assert!(forwarding.is_null() || seen, "{tap}");
        assert_eq!(tap["opens"] == true, tap["why_not"].is_null(), "{tap}");
        assert_eq!(device["usable"] == true, device["why_not"].is_null(), "{device}");
        assert_eq!(device["usable"] == true, tap["offloads"].is_array(), "{device} {tap}");
        if !is_possible() {
            return;
        }
        assert_eq!((&device["usable"], &tap["opens"]), (&true.into(), &true.into()));
        assert_eq!(device["capabilities"]["mtu"], 1500);
        let offloads = tap["offloads"].as_array().expect("a list");
        for offload in ["checksum", "tso4", "tso6"] {
            assert!(offloads.contains(&offload.into()), "no {offload}: {offloads:?}");
        }
        let output = vmring(&["info"]);
        for words in [
            "/dev/net/tun      may be opened",
            engine,
            "checksum, tso4",
            "bridges",
            "forward policy",
        ] {
            assert!(text(&output.stdout).contains(words), "no {words} in {}", text(&output.stdout));
        }
    }

    /// The same without root, where no TAP can be asked.
    #[test]
    fn without_root_info_says_what_is_missing() {
        let Some(output) = without_root(&["info", "--json"]) else { return };
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert_eq!((&report["root"], &report["tap"]["offloads"]), (&false.into(), &Value::Null));
        let devices = report["devices"].as_array().expect("a list");
        let tap = devices.iter().find(|device| device["name"] == "tap").expect("it is listed");
        assert_eq!(tap["usable"], false);
        let why_not = tap["why_not"].as_str().expect("a sentence");
        assert!(why_not.contains("root") && !why_not.contains('\n'), "{why_not}");
    }

    /// A run as a user without privileges. Returns `None`, and prints a sentence, if there is no
    /// way to become one.
    pub(super) fn without_root(arguments: &[&str]) -> Option<Output> {
        let program = env!("CARGO_BIN_EXE_vmring");
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", "65534", "--clear-groups", program]);
            command
        } else {
            Command::new(program)
        };
        let Ok(output) = command.args(arguments).stdin(Stdio::null()).output() else {
            skip("setpriv is not installed");
            return None;
        };
        if matches!(output.status.code(), Some(126 | 127)) {
            skip("another user may not run the program where it is");
            return None;
        }
        Some(output)
    }

    #[test]
    fn what_a_tap_cannot_do_is_refused_in_one_sentence() {
        let on_a_tap =
            |arguments: &[&str]| refused(&[&["demo", "--device", "tap"], arguments].concat());
        assert!(
            on_a_tap(&["--engine", "turbo"]).contains("auto, io_uring or plain, and not 'turbo'")
        );
        assert!(on_a_tap(&["--mode", "bridged:br0"]).contains("no bridge"));
        assert!(on_a_tap(&["--mtu", "99"]).contains("1280"));
        let message = refused(&["demo", "--offload", "--device", "vmnet-sim"]);
        assert!(message.contains("--offload is for"), "{message}");
        let message = refused(&["demo", "--engine", "plain"]);
        assert!(message.contains("--engine") && message.contains("--device tap"), "{message}");
    }

    #[test]
    fn without_root_the_demo_on_a_tap_says_what_is_missing_and_touches_nothing() {
        let path = scratch("no root").join("demo.pcapng");
        let capture = path.to_str().expect("UTF-8");
        let arguments = ["demo", "--device", "tap", "--bytes", "1K", "--capture", capture];
        let Some(output) = without_root(&arguments) else { return };
        let message = text(&output.stderr).trim_end();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert_eq!(text(&output.stdout), "");
        assert!(!message.contains('\n'), "one sentence: {message}");
        for words in ["permission denied", "CAP_SYS_ADMIN", "run as root"] {
            assert!(message.contains(words), "no {words} in {message}");
        }
        assert!(!path.exists(), "a capture of nothing");
    }
}

#[test]
fn the_demo_runs_in_host_mode_on_a_subnet_of_choice_and_other_drives() {
    for drive in ["shared", "inline"] {
        let report = json(&[
            "demo",
            "--json",
            "--bytes",
            "1M",
            "--mode",
            "host",
            "--subnet",
            "10.7.0.1/24",
            "--mtu",
            "9000",
            "--drive",
            drive,
        ]);
        assert_eq!(report["mode"], "host");
        assert_eq!(report["transfer"]["sha256_ok"], true);
        assert_eq!(report["fetch"], Value::Null, "a host network has no way out");
        for guest in report["guests"].as_array().expect("a list") {
            assert!(guest["ipv4"].as_str().expect("an address").starts_with("10.7.0."));
            assert_eq!(guest["mtu"], 9000);
            assert_eq!(guest["router"], Value::Null, "a host network has no router");
        }
    }
}

#[test]
fn the_demo_ends_with_a_table_for_people() {
    let output = vmring(&["demo", "--bytes", "1M"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for word in ["MAC", "MTU", "192.168.64.", "p50", "Gbit/s", "packets per second", "Drops"] {
        assert!(text(&output.stdout).contains(word), "no {word} in {}", text(&output.stdout));
    }
    assert!(!output.stderr.is_empty(), "a person sees progress");
}

#[test]
fn the_capture_holds_the_packets_of_both_guests_in_both_directions() {
    use pcap_file::pcapng::blocks::Block;
    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;

    let path = scratch("capture").join("demo.pcapng");
    json(&["demo", "--json", "--bytes", "64K", "--capture", path.to_str().expect("UTF-8")]);
    let file = std::fs::File::open(&path).expect("it was written");
    let mut reader = pcap_file::pcapng::PcapNgReader::new(file).expect("it is pcapng");
    // Packets by interface and direction (1 inbound, 2 outbound).
    let mut packets = [[0; 3]; 2];
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block.expect("a whole block") {
            let direction = packet.options.iter().find_map(|option| match option {
                EnhancedPacketOption::Flags(flags) => Some(*flags as usize & 3),
                _ => None,
            });
            packets[packet.interface_id as usize][direction.expect("a direction")] += 1;
        }
    }
    for [none, inbound, outbound] in packets {
        assert!(none == 0 && inbound > 50 && outbound > 50, "{packets:?}");
    }
}

#[test]
fn idle_guests_cost_next_to_nothing_and_still_hear_the_next_packet() {
    let report = json(&["demo", "--json", "--idle", "1"]);
    assert_eq!(report["idle"]["next_packet_arrived"], true);
    // The bound is two percent. The margin is for the clock ticks of a busy machine.
    assert!(report["idle"]["cpu_percent"].as_f64() < Some(20.0), "{report}");
    assert_eq!(report["transfer"], Value::Null);
}

#[test]
fn what_cannot_be_is_refused_in_one_sentence() {
    assert!(refused(&["demo", "--mtu", "99"]).contains("1280"));
    assert!(refused(&["demo", "--subnet", "8.8.8.1/33"]).contains("192.168.64.1/24"));
    assert!(refused(&["demo", "--subnet", "8.8.8.1/24"]).contains("8.8.8.1"));
    assert!(refused(&["demo", "--subnet", "10.0.0.1/30"]).contains("two guests"));
    assert!(refused(&["demo", "--subnet", "192.168.64.253/24"]).contains("one address"));
    if cfg!(not(target_os = "linux")) {
        assert!(refused(&["demo", "--device", "tap"]).contains("exists on Linux only"));
    }
    assert!(refused(&["demo", "--device", "abacus"]).contains("abacus"));
    assert!(refused(&["demo", "--mode", "bridged:en0"]).contains("bridged"));
    assert!(refused(&["demo", "--bytes", "many"]).contains("many"));
    assert!(refused(&["demo", "--wrong"]).contains("--wrong"));
    refused(&["nonsense"]);
}

#[test]
fn a_capture_that_cannot_be_written_is_refused_and_leaves_nothing() {
    let folder = scratch("unwritable");
    let path = folder.join("no such folder").join("demo.pcapng");
    let message = refused(&["demo", "--capture", path.to_str().expect("UTF-8")]);
    assert!(message.contains("cannot be written"), "{message}");
    // Another mistake, found after the file was made, leaves no file behind.
    let path = folder.join("demo.pcapng");
    refused(&["demo", "--subnet", "8.8.8.1/24", "--capture", path.to_str().expect("UTF-8")]);
    assert_eq!(std::fs::read_dir(&folder).expect("it is there").count(), 0);
}

/// A file that can be created but not written to, as on a full disk, is found before anything is
/// started.
#[test]
fn a_capture_on_a_full_disk_is_refused_at_once_and_leaves_nothing() {
    if cfg!(target_os = "linux") {
        let message = refused(&["demo", "--capture", "/dev/full"]);
        assert!(message.contains("'/dev/full' cannot be written"), "{message}");
    }
    // A limit of no bytes per file stands in for a full disk.
    let folder = scratch("full");
    let path = folder.join("demo.pcapng");
    let script = "trap '' XFSZ; ulimit -f 0; exec \"$0\" demo --capture \"$1\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_vmring"), path.to_str().expect("UTF-8")])
        .output()
        .expect("a shell");
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("cannot be written"), "{message}");
    assert_eq!(std::fs::read_dir(&folder).expect("it is there").count(), 0);
}

/// The frames of a pcapng file.
fn frames(path: &Path) -> Vec<Vec<u8>> {
    use pcap_file::pcapng::blocks::Block;

    let file = std::fs::File::open(path).expect("it was written");
    let mut reader = pcap_file::pcapng::PcapNgReader::new(file).expect("it is pcapng");
    let mut frames = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block.expect("a whole block") {
            frames.push(packet.data.to_vec());
        }
    }
    frames
}

#[test]
fn a_file_replayed_into_a_capture_is_the_same_packets() {
    let folder = scratch("replay");
    let [demo, copy] = ["demo.pcapng", "copy.pcapng"].map(|name| folder.join(name));
    json(&["demo", "--json", "--bytes", "4M", "--capture", demo.to_str().expect("UTF-8")]);
    let packets = frames(&demo);
    assert!(packets.len() > 2000);
    let [from, to] = [format!("pcap:{}", demo.display()), format!("capture:{}", copy.display())];
    for [a, b] in [[&from, &to], [&to, &from]] {
        // It ends by itself.
        let report = json(&["bridge", a, b, "--json", "--depth", "64"]);
        assert!(frames(&copy) == packets, "other packets came");
        let way =
            report["ways"].as_array().expect("a list").iter().find(|way| way["from"] == *from);
        let way = way.expect("the way from the file");
        assert_eq!(way["packets_written"], packets.len());
        assert_eq!(way["bytes_written"], packets.iter().map(Vec::len).sum::<usize>());
        assert_eq!((&way["drops"], &report["ok"]), (&0.into(), &true.into()));
        assert!(way["read_batches"]["mean"].as_f64() > Some(1.0));
    }
    // Frames that the other end cannot accept are counted and reported.
    json(&["demo", "--json", "--bytes", "256K", "--mtu", "9000", "--capture", path(&demo)]);
    let output = vmring(&["bridge", &from, "embedded:lab", "--seconds", "1"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report = unfolded(&output.stdout);
    for word in ["MTU", "per batch", "9014", "1518", "too big for the other end"] {
        assert!(report.contains(word), "no {word} in {report}");
    }
    assert!(unfolded(&output.stderr).contains("are joined"), "a person sees what it does");
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn an_idle_bridge_costs_next_to_nothing() {
    for other in ["embedded:two", "vmnet-sim"] {
        let other = if cfg!(target_os = "macos") { "embedded:two" } else { other };
        let report = json(&["bridge", "embedded:one", other, "--json", "--seconds", "2"]);
        assert!(report["seconds"].as_f64() >= Some(2.0), "{report}");
        // Next to nothing is below one percent. This leaves space for the clock ticks of a busy
        // machine.
        assert!(report["cpu_percent"].as_f64() < Some(10.0), "{report}");
    }
}

#[test]
fn a_bridge_that_cannot_be_is_refused_in_one_sentence() {
    assert!(refused(&["bridge", "embedded:a"]).contains("<B>"));
    assert!(refused(&["bridge", "embedded:a", "abacus:b"]).contains("no end 'abacus:b'"));
    assert!(refused(&["bridge", "embedded:a", "embedded:a"]).contains("name two networks"));
    assert!(refused(&["bridge", "embedded:a", "embedded:b", "--mtu", "99"]).contains("1280"));
    assert!(
        refused(&["bridge", "embedded:a", "embedded:b", "--depth", "65537"])
            .contains("65537 is not in")
    );
    assert!(
        refused(&["bridge", "embedded:a", "embedded:b", "--depth", "0"]).contains("0 is not in")
    );
    assert!(
        refused(&["bridge", "embedded:a", "pcap:nowhere"]).contains("'nowhere' cannot be replayed")
    );
    let folder = scratch("bridge");
    let file = folder.join("text");
    std::fs::write(&file, "this is no capture, whoever wrote it").expect("a file");
    let pcap = format!("pcap:{}", file.display());
    assert!(refused(&["bridge", "embedded:a", &pcap]).contains("cannot be replayed"));
    let nowhere = format!("capture:{}", folder.join("no/such/folder").display());
    assert!(refused(&["bridge", "embedded:a", &nowhere]).contains("cannot be written"));
    // What is wrong with the other end is found before the file is touched.
    let capture = format!("capture:{}", folder.join("new").display());
    refused(&["bridge", &capture, "pcap:nowhere"]);
    refused(&["bridge", &capture, "embedded:a", "--mtu", "99"]);
    assert!(!folder.join("new").exists());
    // The way out is that of one embedded network.
    let both = refused(&["bridge", "embedded:a", "embedded:b", "--allow", "10.0.0.0/8"]);
    assert!(both.contains("both ends are embedded networks"), "{both}");
    let none = refused(&["bridge", "pcap:a", &capture, "--deny", "10.0.0.0/8"]);
    assert!(none.contains("nothing here is an embedded network"), "{none}");
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = taken.local_addr().expect("it has a port").port();
    let forward = format!("{port}=192.168.64.2:22");
    let output = vmring(&["bridge", "embedded:a", &capture, "--forward", &forward]);
    let message = text(&output.stderr);
    assert!(!output.status.success() && message.contains("in use"), "{message}");
}

#[test]
fn info_names_the_devices_and_what_each_needs() {
    let output = vmring(&["info"]);
    assert_eq!(output.status.code(), Some(0));
    for word in ["embedded", "loopback", "vmnet", "tap", "entitlement", "CAP_NET_ADMIN", "MTU"] {
        assert!(text(&output.stdout).contains(word), "no {word}");
    }
    let report = json(&["info", "--json"]);
    assert!(report.to_string().contains("embedded"));
}

#[test]
fn help_and_completions_are_there() {
    let help = vmring(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for word in ["demo", "bridge", "bench", "info", "probe", "completions", "Exit code"] {
        assert!(text(&help.stdout).contains(word), "no {word} in {}", text(&help.stdout));
    }
    let script = vmring(&["completions", "bash"]);
    assert_eq!(script.status.code(), Some(0));
    assert!(text(&script.stdout).contains("_vmring"));
}

#[cfg(not(target_os = "macos"))]
#[test]
fn the_probe_asks_its_twelve_questions() {
    assert!(refused(&["probe"]).contains("exists on macOS only"));

    let output = vmring(&["probe", "--simulated", "--sleep", "1"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report = text(&output.stdout);
    assert!(report.starts_with("These are the simulator's answers"), "{report}");
    // The simulator's defaults.
    for (number, said) in [
        (1, &["write with 2: (1000, 1), 1 arrived, right: true", "[1514] bytes, right: true"][..]),
        (2, &["the third too long: (1006, 4), arrived []", "\"(1000, 256)\": 64", "arrived 1024"]),
        (3, &["more than 256: (1008, 257), 0 arrived", "after 257 were sent: (1008, 257)"]),
        (4, &["one of them read (1000, 1): 0 more; a fourth packet: 1 more"]),
        (5, &["32 sent", "read 32, 32 different, 0 left"]),
        (6, &["max_packet_size 65550", "write of 65562: (1000, 1)", "came with 72 bytes, [01, 00"]),
        (7, &["max_packet_size 65550", "came with 72 bytes, [01, 00"]),
        (8, &["before the handler was waited for: read (100", "write (100"]),
        (9, &["it slept 0 s", "8 of 8 were taken", "8 arrived"]),
        (10, &["8192 sent and none read meanwhile: 1024 waited"]),
        (11, &["write (1000, 1), read (1000, 1), right: true"]),
        (12, &["13 bytes: (1003, 1); 14 bytes: (1000, 1)", "lengths [14, 15, 18, 59, 60]"]),
    ] {
        let start = format!("{number:2}. ");
        let lines: Vec<_> = report.lines().filter(|line| line.starts_with(&start)).collect();
        let [line] = lines[..] else { panic!("{number} is answered once: {report}") };
        for words in said {
            assert!(line.contains(words), "no '{words}' in {line}");
        }
        let asking = format!("question {number}: ");
        assert!(text(&output.stderr).contains(&asking), "a person sees progress");
    }
}
