//! A capture that is watched while it is written, and one whose process or reader ends.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use vmring::device::pcap::{Capture, Replay};
use vmring::{ConfigError, Direction, Error, Interface, Loopback, Ring};

use super::{Scratch, parse};
use crate::support::{
    LONG, eventually, guarded, myself, packet, post, reap_n, send, stage, unique,
};

fn looped(capture: &Capture) -> (Interface, Ring) {
    let driver = capture.wrap("loop", Loopback::new(65_000));
    let interface = Interface::builder().device(driver).start().unwrap();
    let ring = interface.ring(Direction::Both).depth(4).build().unwrap();
    (interface, ring)
}

/// Sends packet `number` through the loopback: two packets in the capture.
fn round_trip(ring: &mut Ring, number: u64) {
    post(ring, number);
    send(ring, number);
    for done in reap_n(ring, 2) {
        assert_eq!(done.result, Ok(60));
    }
}

fn fifo(name: &str) -> Scratch {
    let path = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique(name));
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    Scratch(path)
}

/// Reads a pipe on a thread of its own, from now on: what comes, in pieces.
fn reader(path: &Path) -> mpsc::Receiver<Vec<u8>> {
    let (tell, pieces) = mpsc::sync_channel(0);
    // Opened to read and write, so that it does not wait for a writer; then without a writer.
    let both = File::options().read(true).write(true).open(path).unwrap();
    let mut pipe = File::open(path).unwrap();
    thread::spawn(move || {
        let mut both = Some(both);
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut piece) {
            // The capture is open: from now on its end is the pipe's end.
            both = None;
            if tell.send(piece[..n].to_vec()).is_err() {
                break;
            }
        }
        drop(both);
    });
    pieces
}

/// The test of this name again, in a process of its own, in which [`CHILD`] is set.
fn child(name: &str, path: &Path) -> Child {
    let mut command = myself();
    command.args(["--exact", &format!("pcap::live::{name}"), "--nocapture", "--test-threads=1"]);
    command.env(CHILD, path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    command.spawn().expect("a child process")
}

const CHILD: &str = "VMRING_TEST_CAPTURE";

/// Ends the child with the test.
struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Goal: packets are in the file soon, without a close or a finish, and without further packets.
#[test]
fn a_packet_is_in_the_file_while_the_ring_is_open() {
    guarded(|| {
        let file = Scratch(Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique("open")));
        let capture = Capture::create(&file.0).unwrap();
        let (_interface, mut ring) = looped(&capture);
        for number in 0..3 {
            round_trip(&mut ring, number);
            let want = 2 * (number as usize + 1);
            eventually("the packets are in the file", || {
                let bytes = std::fs::read(&file.0).unwrap();
                parse(&bytes).packets.len() == want
            });
        }
        assert_eq!((capture.packets(), capture.lost()), (6, 0));
    });
}

/// Goal: a capture of a process that was killed is readable, and has every packet that was seen in
/// it before. Method: a child records without end; it is killed in the middle.
#[test]
fn a_capture_is_readable_after_its_process_was_killed() {
    if let Some(path) = std::env::var_os(CHILD) {
        let capture = Capture::create(path).unwrap();
        let (_interface, mut ring) = looped(&capture);
        for number in 0.. {
            round_trip(&mut ring, number);
        }
    }
    guarded(|| {
        for round in 0..3 {
            stage(format!("round {round}"));
            let file = Scratch(Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique("killed")));
            let name = "a_capture_is_readable_after_its_process_was_killed";
            let mut child = Kill(child(name, &file.0));
            let packets = || Replay::open(&file.0).map_or(0, |replay| replay.packets());
            eventually("the child records", || packets() > 100);
            let before = packets();
            child.0.kill().unwrap();
            child.0.wait().unwrap();
            let replay = Replay::open(&file.0).unwrap();
            assert!(replay.packets() >= before, "{} of {before}", replay.packets());
            assert!(replay.note().is_none_or(|note| note.contains("in the middle of a record")));
        }
    });
}

/// A reader of a named pipe sees the packets at once; when it goes away, the network goes on, and
/// the end says what became of the capture.
#[test]
fn a_pipe_is_watched_live_and_its_reader_may_go() {
    guarded(|| {
        let pipe = fifo("live");
        stage("nobody reads the pipe");
        let refused = Capture::create(&pipe.0).unwrap_err();
        let said = "no program reads the pipe; start the reader first";
        assert!(
            matches!(&refused, Error::Config(ConfigError::Invalid(text)) if text == said),
            "{refused}"
        );
        stage("the reader follows");
        let pieces = reader(&pipe.0);
        let capture = Capture::create(&pipe.0).unwrap();
        let (_interface, mut ring) = looped(&capture);
        let mut seen = Vec::new();
        for number in 0..3 {
            round_trip(&mut ring, number);
            let start = Instant::now();
            loop {
                // Every piece ends with a whole block, unless it fills the reader's buffer.
                if !seen.is_empty() && parse(&seen).packets.len() == 2 * (number as usize + 1) {
                    break;
                }
                match pieces.recv_timeout(LONG) {
                    Ok(piece) => seen.extend(piece),
                    Err(why) => panic!("packet {number} does not come: {why:?}"),
                }
                assert!(start.elapsed() < LONG);
            }
        }
        stage("the reader goes");
        drop(pieces);
        let mut number = 3;
        eventually("the capture notices", || {
            round_trip(&mut ring, number);
            number += 1;
            capture.finish().is_err()
        });
        let packets = capture.packets();
        (0..100).for_each(|number| round_trip(&mut ring, number));
        assert_eq!(capture.packets(), packets);
        let error = capture.finish().unwrap_err();
        assert!(
            matches!(&error, Error::Io { source, .. }
                if source.kind() == std::io::ErrorKind::BrokenPipe),
            "{error}"
        );
        ring.close().unwrap();
    });
}

/// Goal: a reader that goes away does not kill a process that leaves SIGPIPE at its default, as
/// programs that are not Rust's do.
#[test]
fn a_broken_pipe_kills_nobody() {
    if let Some(path) = std::env::var_os(CHILD) {
        // SAFETY: the default action is no handler that could run.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        let capture = Capture::create(path).unwrap();
        let (_interface, mut ring) = looped(&capture);
        eventually("the capture notices that its reader is gone", || {
            round_trip(&mut ring, 1);
            capture.finish().is_err()
        });
        return;
    }
    guarded(|| {
        let pipe = fifo("broken");
        let pieces = reader(&pipe.0);
        let mut child = Kill(child("a_broken_pipe_kills_nobody", &pipe.0));
        pieces.recv_timeout(LONG).unwrap();
        drop(pieces);
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.0.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < LONG, "it does not end");
            thread::sleep(Duration::from_millis(10));
        };
        assert!(status.success(), "{status}");
    });
}

/// Goal: a reader that stops reading holds up neither the network nor the end; the file says where
/// packets are missing, and how many. Method: nobody takes a piece from the channel, so that the
/// pipe fills up, until the test does.
#[test]
fn a_reader_that_does_not_read_costs_packets_of_the_capture_only() {
    guarded(|| {
        let pipe = fifo("stalled");
        let pieces = reader(&pipe.0);
        let capture = Capture::create(&pipe.0).unwrap();
        let (interface, mut ring) = looped(&capture);
        let mut sent = 0;
        let mut trip = |ring: &mut Ring| {
            let mut frame = ring.alloc().unwrap();
            frame.copy_from(&packet(sent, 60_000)).unwrap();
            post(ring, sent);
            ring.submit_write(frame, sent).unwrap();
            assert!(reap_n(ring, 2).iter().all(|done| done.result == Ok(60_000)));
            sent += 1;
        };
        stage("the pipe fills up");
        let start = Instant::now();
        while capture.lost() < 200 {
            trip(&mut ring);
            assert!(start.elapsed() < LONG, "{} packets, none lost", capture.packets());
        }
        stage("an end that nobody reads");
        let error = capture.finish().unwrap_err();
        assert!(
            matches!(&error, Error::Io { source, .. }
                if source.kind() == std::io::ErrorKind::TimedOut),
            "{error}"
        );
        stage("the reader reads again");
        let reading = thread::spawn(move || {
            let mut all = Vec::new();
            loop {
                match pieces.recv_timeout(LONG) {
                    Ok(piece) => all.extend(piece),
                    Err(RecvTimeoutError::Disconnected) => return all,
                    Err(RecvTimeoutError::Timeout) => panic!("the capture does not end"),
                }
            }
        });
        eventually("it catches up", || capture.finish().is_ok());
        trip(&mut ring);
        ring.close().unwrap();
        capture.finish().unwrap();
        let (packets, lost) = (capture.packets(), capture.lost());
        assert_eq!(packets + lost, 2 * sent);
        drop((ring, interface, capture));
        stage("the end of the pipe");
        let bytes = reading.join().unwrap();
        let mut reader = PcapNgReader::new(&bytes[..]).unwrap();
        let (mut in_file, mut missing) = (0, 0);
        while let Some(block) = reader.next_block() {
            if let Block::EnhancedPacket(packet) = block.unwrap() {
                in_file += 1;
                missing += packet.options.iter().map(dropped).sum::<u64>();
            }
        }
        assert_eq!((in_file, missing), (packets, lost));
    });
}

fn dropped(option: &EnhancedPacketOption<'_>) -> u64 {
    match option {
        EnhancedPacketOption::DropCount(n) => *n,
        _ => 0,
    }
}
