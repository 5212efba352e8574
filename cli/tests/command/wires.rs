//! Wires of virtual machine monitors, at the ends of a bridge and in a measurement.

use std::io::Write;
use std::os::unix::net::{UnixDatagram, UnixStream};

use super::*;

/// A frame from one address to another, of an ethertype for experiments.
fn frame(to: u8, from: u8, len: usize) -> Vec<u8> {
    let mut frame = [[2, 0, 0, 0, 0, to], [2, 0, 0, 0, 0, from]].concat();
    frame.extend([0x88, 0xb5]);
    frame.extend((14..len).map(|i| i as u8));
    frame
}

/// Goal: a VMM that speaks one wire reaches one that speaks another, over a bridge. Method: this program
/// is both VMMs, QEMU and vfkit.
#[test]
fn a_bridge_joins_two_wires() {
    // A path of a socket is short.
    let folder = std::env::temp_dir().join(format!("vmring-wires-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let (qemu, vfkit, own) = (folder.join("qemu"), folder.join("vfkit"), folder.join("own"));
    let ends = [format!("qemu:{}", qemu.display()), format!("vfkit:{}", vfkit.display())];
    let arguments = ["bridge", &ends[0], &ends[1], "--json"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_vmring"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let start = Instant::now();
    while !(qemu.exists() && vfkit.exists()) {
        assert!(start.elapsed() < LIMIT, "the sockets are not made");
        assert!(child.try_wait().expect("a child").is_none(), "the bridge has ended");
        thread::sleep(Duration::from_millis(5));
    }
    let peer = UnixDatagram::bind(&own).expect("a socket");
    peer.set_read_timeout(Some(LIMIT)).expect("a time limit");
    peer.connect(&vfkit).expect("it is there");
    peer.send(b"VFKT").expect("it is taken");
    let mut stream = UnixStream::connect(&qemu).expect("it listens");
    stream.set_read_timeout(Some(LIMIT)).expect("a time limit");
    let (there, back) = (frame(2, 1, 1514), frame(1, 2, 60));
    let mut received = [0; 2048];
    // Until both ends know their peers, a frame may be dropped.
    peer.set_read_timeout(Some(Duration::from_millis(200))).expect("a time limit");
    let start = Instant::now();
    let len = loop {
        stream.write_all(&(there.len() as u32).to_be_bytes()).expect("it is taken");
        stream.write_all(&there).expect("it is taken");
        match peer.recv(&mut received) {
            Ok(len) => break len,
            Err(_) => assert!(start.elapsed() < LIMIT, "nothing arrives"),
        }
    };
    assert_eq!(received[..len], there);
    peer.send(&back).expect("it is taken");
    let mut answer = vec![0; 4 + back.len()];
    stream.read_exact(&mut answer).expect("an answer in time");
    assert_eq!(answer, [&60_u32.to_be_bytes()[..], &back].concat());
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(kill.is_ok_and(|status| status.success()));
    let output = ended(child, &arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["ways"][1]["packets_written"], 1, "{report}");
    assert!(!qemu.exists() && !vfkit.exists(), "a socket is left");
    std::fs::remove_dir_all(&folder).expect("it can be removed");
}

#[test]
fn a_wire_that_cannot_be_is_refused_in_one_sentence() {
    let long = format!("qemu:/{}", "x".repeat(200));
    let refusal = refused(&["bridge", &long, "embedded:a"]);
    assert!(refusal.contains("use a shorter one"), "{refusal}");
    assert!(refused(&["bridge", "qemu:a,b", "embedded:a"]).contains("no setting of a wire"));
    let folder = scratch("wire");
    let file = folder.join("file");
    std::fs::write(&file, "text").expect("a file");
    let path = file.strip_prefix(std::env::current_dir().expect("a folder")).unwrap_or(&file);
    if path.as_os_str().len() < 100 {
        let end = format!("qemu:{}", path.display());
        assert!(refused(&["bridge", &end, "embedded:a"]).contains("no socket"));
    }
}

#[test]
fn socket_pairs_are_measured() {
    let devices: &[&str] =
        if cfg!(target_os = "linux") { &["stream", "datagram", "seqpacket"] } else { &["stream"] };
    for device in devices {
        let report = json(&["bench", "--json", "--seconds", "1", "--device", device]);
        assert_eq!((&report["ok"], &report["device"]), (&true.into(), &"socket".into()));
        let packets = &report["packets"];
        assert!(packets["arrived"].as_u64() > Some(0), "{packets}");
        for wrong in ["lost", "duplicated", "corrupt"] {
            assert_eq!(packets[wrong], 0, "{packets}");
        }
    }
}
