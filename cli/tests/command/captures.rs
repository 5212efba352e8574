//! Captures as the ends of a bridge: files of other tools, damaged files, and pipes.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{frames, json, path, refused, scratch, text, unfolded, vmring};

/// The header of a pcap file, in the little byte order, with this link type.
fn header(link: u32) -> Vec<u8> {
    let mut file = vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0];
    file.extend([0; 8]);
    file.extend(65_535_u32.to_le_bytes());
    file.extend(link.to_le_bytes());
    file
}

/// A record with these bytes of a packet that had `len`.
fn record(packet: &[u8], len: u32) -> Vec<u8> {
    let words = [1, 2, packet.len() as u32, len];
    let mut record: Vec<_> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    record.extend(packet);
    record
}

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().expect("mkfifo").success());
}

#[test]
fn a_file_that_ends_early_is_replayed_with_a_note_and_what_is_missing_is_counted() {
    let folder = scratch("cut capture");
    let [cut, copy] = ["cut.pcap", "copy.pcapng"].map(|name| folder.join(name));
    let packets = [[7; 60], [8; 60]];
    let mut file = header(1);
    file.extend(record(&packets[0], 60));
    file.extend(record(&packets[0], 1514));
    file.extend(record(&packets[1], 60));
    file.extend(&record(&packets[1], 60)[..20]);
    fs::write(&cut, file).expect("a file");
    let ends = [format!("pcap:{}", cut.display()), format!("capture:{}", copy.display())];
    let report = json(&["bridge", &ends[0], &ends[1], "--json"]);
    assert_eq!(frames(&copy), packets);
    let drops = &report["ends"][0]["drops_by_reason"];
    assert_eq!(drops["recorded incompletely"], 1, "{report}");
    assert_eq!(drops["cut off by the end of the file"], 1, "{report}");
    let note = report["ends"][0]["note"].as_str().expect("a note");
    assert!(note.contains("in the middle of a record"), "{note}");
    assert_eq!(report["ends"][1]["note"], serde_json::Value::Null);
    // A person reads the same, in lines of 80 columns.
    let output = vmring(&["bridge", &ends[0], &ends[1]]);
    assert_eq!(output.status.code(), Some(0));
    let report = unfolded(&output.stdout);
    for words in [note, "1 recorded incompletely", "1 cut off by the end of the file"] {
        assert!(report.contains(words), "no {words} in {report}");
    }
}

#[test]
fn a_capture_that_cannot_be_replayed_is_refused_in_one_sentence() {
    let folder = scratch("other captures");
    let file = folder.join("file");
    let said = |bytes: &[u8], words: &str| {
        fs::write(&file, bytes).expect("a file");
        let message = refused(&["bridge", "embedded:a", &format!("pcap:{}", file.display())]);
        assert!(message.contains("cannot be replayed") && message.contains(words), "{message}");
    };
    said(b"", "the capture is empty");
    said(&header(113), "link type is 113 (LINUX_SLL)");
    said(&[0x1f, 0x8b, 8, 0], "decompress it first, with gunzip");
    said(b"this is no capture", "editcap");
    fs::remove_file(&file).expect("it is there");
    // Nobody writes to this pipe, and it is not waited for.
    fifo(&file);
    let message = refused(&["bridge", "embedded:a", &format!("pcap:{}", file.display())]);
    assert!(message.contains("save it in a file first"), "{message}");
    let message = refused(&["bridge", "embedded:a", "pcap:/dev/null"]);
    assert!(message.contains("the capture is a device"), "{message}");
}

#[test]
fn a_capture_is_not_mixed_with_anything_else() {
    let folder = scratch("mixed captures");
    let [file, link] = ["a.pcap", "b.pcap"].map(|name| folder.join(name));
    fs::write(&file, header(1)).expect("a file");
    fs::hard_link(&file, &link).expect("a link");
    let ends = [format!("pcap:{}", file.display()), format!("capture:{}", link.display())];
    assert!(refused(&["bridge", &ends[0], &ends[1]]).contains("would be overwritten"));
    assert_eq!(fs::read(&file).expect("it is there"), header(1));
    for arguments in [
        &["demo", "--bytes", "1K", "--capture", "/dev/stdout"][..],
        &["bridge", "embedded:a", "capture:/dev/stdout"],
    ] {
        let message = refused(arguments);
        assert!(message.contains("mixed with the report on standard output"), "{message}");
    }
}

#[test]
fn a_pipe_that_nobody_reads_is_refused_and_stays() {
    let pipe = scratch("unread pipe").join("pipe");
    fifo(&pipe);
    let capture = format!("capture:{}", pipe.display());
    for arguments in [
        &["demo", "--bytes", "1K", "--capture", path(&pipe)][..],
        &["bridge", "embedded:a", &capture],
    ] {
        let message = refused(arguments);
        assert!(message.contains("no program reads the pipe"), "{message}");
    }
    assert!(pipe.exists());
}

/// A live view: another program reads the pipe until the demo has ended.
#[test]
fn a_demo_is_watched_through_a_pipe() {
    let folder = scratch("live demo");
    let [pipe, copy] = ["pipe", "copy.pcapng"].map(|name| folder.join(name));
    fifo(&pipe);
    let mut end = reading(&pipe);
    let mut child = Command::new(env!("CARGO_BIN_EXE_vmring"))
        .args(["demo", "--json", "--bytes", "64K", "--capture", path(&pipe)])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    let mut bytes = Vec::new();
    // Until the writer has opened the pipe, it has no end to read to; then reads wait.
    while bytes.is_empty() {
        let mut piece = [0; 4096];
        match end.read(&mut piece) {
            Ok(n) => bytes.extend(&piece[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
        assert!(!bytes.is_empty() || child.try_wait().expect("it runs").is_none(), "nothing came");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    loop {
        let mut piece = [0; 65_536];
        match end.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => bytes.extend(&piece[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
    fs::write(&copy, bytes).expect("a file");
    let output = child.wait_with_output().expect("it ends");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&report["ok"], &report["capture"]["lost"]), (&true.into(), &0.into()), "{report}");
    assert_eq!(report["capture"]["packets"], frames(&copy).len());
}

/// The reading end of a pipe. Opening it waits for no writer, and reading does not wait.
fn reading(pipe: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(pipe)
        .expect("the pipe is there")
}

/// A reader that never reads, or that goes away, ends neither the bridge nor hangs it.
#[test]
fn a_reader_that_fails_a_pipe_is_reported_and_nothing_hangs() {
    let folder = scratch("failing reader");
    let [big, pipe] = ["big.pcap", "pipe"].map(|name| folder.join(name));
    let mut file = header(1);
    for _ in 0..8000 {
        file.extend(record(&[9; 1514], 1514));
    }
    fs::write(&big, file).expect("a file");
    fifo(&pipe);
    let ends = [format!("pcap:{}", big.display()), format!("capture:{}", pipe.display())];
    let end = reading(&pipe);
    let output = vmring(&["bridge", &ends[0], &ends[1], "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("takes nothing more"), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let lost = report["ends"][1]["drops_by_reason"]["not recorded in time"].as_u64();
    assert!(lost > Some(1000), "{report}");
    assert_eq!(report["ways"][0]["packets_written"], 8000, "{report}");
    drop(end);
}
