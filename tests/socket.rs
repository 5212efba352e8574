//! The wires over sockets: what a peer does, and what becomes of it. Peers are plain sockets of the
//! standard library.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vmring::device::Offloads;
use vmring::device::socket::{Adopted, Listener, SocketKind, adopt};
use vmring::{
    Checksum, CloseReason, Direction, Drive, EntryError, Error, Gso, Interface, OffloadHeader,
    Poller, RetryPolicy, Ring, RingOp, Socket, SocketError, Status,
};

use crate::guest_memory::Guest;
use crate::sockets::{Folder, Wire, count, echo_until, exists, framed, read_framed, write_framed};
use crate::support::{
    LONG, Way, eventually, every_way, guarded, inline, packet, post, reap, reap_n, scaled, send,
    stage,
};

/// Longer than any number of tries in a test.
const PATIENT: RetryPolicy = RetryPolicy { attempts: 1_000_000, delay: Duration::from_micros(50) };

/// A kind of wire: its name, and how a driver of it is made.
type Kind = (&'static str, fn() -> Socket);

fn start(socket: Socket) -> Interface {
    Interface::builder().device(socket).start().expect("a wire starts")
}

fn both(interface: &Interface) -> Ring {
    interface.ring(Direction::Both).build().expect("a ring")
}

/// An interface with a ring, and the other end of its stream.
fn stream() -> (Interface, Ring, UnixStream) {
    let (ours, peer) = UnixStream::pair().expect("a pair of sockets");
    peer.set_read_timeout(Some(LONG)).expect("a time limit");
    let interface = start(Socket::stream().from_fd(ours.into()));
    let ring = both(&interface);
    (interface, ring, peer)
}

/// The next packet that arrives.
fn receive(ring: &mut Ring) -> Vec<u8> {
    loop {
        let seen = reap_n(ring, 1).remove(0);
        if seen.op == RingOp::Read {
            seen.result.expect("a read succeeds");
            return seen.frame.expect("a read has a frame").to_vec();
        }
    }
}

/// The outcome of the only entry.
fn outcome(ring: &mut Ring) -> Result<usize, EntryError> {
    reap_n(ring, 1).remove(0).result
}

fn no_peer() -> Result<usize, EntryError> {
    Err(EntryError::Device(Status::Os(libc::ENOTCONN)))
}

/// Goal: frames are found in a stream whatever pieces it comes in, and those that cannot be delivered are
/// counted. Method: a peer sends a byte at a time.
#[test]
fn a_stream_may_come_in_any_pieces() {
    guarded(|| {
        let (interface, mut ring, mut peer) = stream();
        for number in 0..8 {
            post(&mut ring, number);
        }
        let stream = [
            framed(&packet(1, 60)),
            framed(&[]),
            framed(&[7; 13]),
            framed(&packet(2, 1519)),
            framed(&packet(3, 14)),
            framed(&packet(4, 1518)),
        ];
        for byte in stream.concat() {
            peer.write_all(&[byte]).expect("it is taken");
        }
        for (number, len) in [(1, 60), (3, 14), (4, 1518)] {
            assert_eq!(receive(&mut ring), packet(number, len));
        }
        assert_eq!((count(&interface, "runt"), count(&interface, "too big")), (1, 1));
    });
}

/// Goal: large frames arrive whole, unchanged and in order whatever pieces they come in, with short ones
/// between them, and a peer that dies within one delivers nothing of it. Method: pieces that end within a
/// length, within a frame and behind it.
#[test]
fn a_stream_of_large_frames_may_come_in_any_pieces() {
    guarded(|| {
        let lengths = [65_549, 60, 16_384, 16_383, 65_549, 65_549, 14, 30_000];
        for piece in [3_001, 16_388, 20_003, 70_001, 400_000] {
            stage(format!("{piece}"));
            let (ours, mut peer) = UnixStream::pair().expect("a pair of sockets");
            let socket = Socket::stream().from_fd(ours.into());
            let interface = Interface::builder().mtu(65_535).device(socket).start();
            let interface = interface.expect("a wire");
            let mut ring = both(&interface);
            for number in 0..=lengths.len() {
                post(&mut ring, number as u64);
            }
            let frames = (1..).zip(lengths).map(|(number, len)| framed(&packet(number, len)));
            let mut stream = frames.collect::<Vec<_>>().concat();
            stream.extend_from_slice(&framed(&packet(9, 65_549))[..50_000]);
            let writing = thread::spawn(move || {
                for piece in stream.chunks(piece) {
                    peer.write_all(piece).expect("it is taken");
                }
            });
            for (number, len) in (1..).zip(lengths) {
                assert!(receive(&mut ring) == packet(number, len), "frame {number}");
            }
            assert_eq!(outcome(&mut ring), Err(EntryError::Device(Status::Os(libc::ECONNRESET))));
            assert_eq!(count(&interface, "peers gone within a packet"), 1);
            writing.join().expect("all is written");
        }
    });
}

/// Goal: a length above the maximum ends the connection, and no frame before it is lost. If there is no
/// other peer to come, the rings close and say why.
#[test]
fn a_length_above_the_maximum_ends_the_connection() {
    guarded(|| {
        let (interface, mut ring, mut peer) = stream();
        post(&mut ring, 1);
        post(&mut ring, 2);
        peer.write_all(&[framed(&packet(1, 60)), 131_073_u32.to_be_bytes().to_vec()].concat())
            .expect("it is taken");
        assert_eq!(receive(&mut ring), packet(1, 60));
        assert_eq!(outcome(&mut ring), Err(EntryError::Device(Status::Os(libc::EPROTO))));
        let closed = ring.control().closed();
        assert_eq!(closed, Some(CloseReason::Failed(Status::Os(libc::EPROTO))));
        assert_eq!(peer.read(&mut [0; 1]).expect("in time"), 0, "the peer is told");
        assert_eq!(count(&interface, "connections ended by a length above the maximum"), 1);
    });
}

/// Goal: a peer that dies within a frame delivers nothing of it, and a wire that listens waits for the
/// next peer, with the same posted reads.
#[test]
fn a_peer_that_dies_in_a_frame_is_followed_by_the_next() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let interface = start(Socket::stream().listen(&path));
        for cut in [1, 4, 5, 63] {
            stage(format!("a frame that ends after {cut} bytes"));
            let mut ring = both(&interface);
            post(&mut ring, 1);
            let mut peer = UnixStream::connect(&path).expect("it listens");
            peer.write_all(&framed(&packet(7, 60))[..cut]).expect("it is taken");
            drop(peer);
            let mut peer = UnixStream::connect(&path).expect("it listens still");
            write_framed(&mut peer, &packet(8, 60));
            assert_eq!(receive(&mut ring), packet(8, 60));
            assert_eq!(ring.control().closed(), None);
        }
        assert_eq!(count(&interface, "peers gone within a packet"), 4);
        // A peer that has broken the rules is followed, too.
        let mut ring = both(&interface);
        post(&mut ring, 1);
        let mut peer = UnixStream::connect(&path).expect("it listens");
        peer.write_all(&[0xff; 4]).expect("it is taken");
        let mut next = UnixStream::connect(&path).expect("it listens");
        write_framed(&mut next, &packet(9, 60));
        assert_eq!(receive(&mut ring), packet(9, 60));
    });
}

/// Goal: the ring sleeps on the connection of the peer that is there. Method: the next peer connects before
/// the last one goes, so the system may give the new connection the descriptor of the old one. Each frame
/// would wait for seconds, until the wire is polled in any case.
#[test]
fn each_peer_wakes_the_ring() {
    every_way(|way, poller| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let interface = start(Socket::stream().listen(&path));
        let builder = interface.ring(Direction::Both).idle(vmring::IdlePolicy::PARK);
        let mut ring = builder.drive(way.drive(poller)).build().expect("a ring");
        let mut next = UnixStream::connect(&path).expect("it listens");
        post(&mut ring, 1);
        for peer in 0..4 {
            let mut current = next;
            for frame in 0..10 {
                stage(format!("peer {peer}, frame {frame}"));
                post(&mut ring, 1);
                thread::sleep(Duration::from_millis(2)); // long enough that the ring sleeps
                write_framed(&mut current, &packet(peer, 60));
                assert_eq!(receive(&mut ring), packet(peer, 60));
            }
            next = UnixStream::connect(&path).expect("it listens");
        }
    });
}

/// Goal: a restart leaves a descriptor that was given as it is, and the owner of an inline ring can sleep
/// on it again.
#[test]
fn a_given_descriptor_is_armed_again_after_a_restart() {
    guarded(|| {
        let (ours, mut peer) = UnixStream::pair().expect("a pair of sockets");
        let interface = start(Socket::stream().from_fd(ours.into()));
        let builder = interface.ring(Direction::Both).drive(Drive::Inline);
        let mut ring = builder.build().expect("a ring");
        assert!(ring.completion_fd().is_ok());
        for number in 0..3 {
            post(&mut ring, number);
            eventually("the ring is armed", || {
                reap(&mut ring);
                ring.arm()
            });
            write_framed(&mut peer, &packet(number, 60));
            assert_eq!(receive(&mut ring), packet(number, 60));
            thread::scope(|scope| {
                let restart = scope.spawn(|| interface.restart(LONG));
                eventually("it starts again", || {
                    reap(&mut ring);
                    restart.is_finished()
                });
            });
        }
    });
}

/// Goal: what a peer has sent before it ends is delivered, even if a write finds it gone first.
#[test]
fn a_peers_last_frames_are_delivered_after_its_end() {
    guarded(|| {
        for wire in [Wire::Stream, Wire::ALL[Wire::ALL.len() - 1]] {
            let [ours, peer] = wire.sockets();
            let interface = start(wire.driver().from_fd(ours));
            let mut ring = both(&interface);
            let payload = packet(5, 60);
            let payload = if wire == Wire::Stream { framed(&payload) } else { payload };
            // SAFETY: the pointer and the length are those of the payload.
            let sent = unsafe {
                use std::os::fd::AsRawFd;
                libc::send(peer.as_raw_fd(), payload.as_ptr().cast(), payload.len(), 0)
            };
            assert_eq!(sent as usize, payload.len());
            drop(peer);
            send(&mut ring, 1);
            assert_eq!(outcome(&mut ring), no_peer(), "{wire:?}");
            post(&mut ring, 2);
            post(&mut ring, 3);
            assert_eq!(receive(&mut ring), packet(5, 60));
            let gone = EntryError::Device(Status::Os(libc::ECONNRESET));
            assert_eq!(outcome(&mut ring), Err(gone), "{wire:?}");
            assert_eq!(count(&interface, "no peer"), 1);
        }
    });
}

/// Goal: a peer that sends nothing and reads nothing holds up no cancel, drain, close or stop.
#[test]
fn a_peer_that_does_nothing_holds_up_nothing() {
    guarded(|| {
        every_way(|way, poller| {
            for &wire in Wire::ALL {
                stage(format!("{way:?}, {wire:?}"));
                let [ours, _peer] = wire.sockets();
                let interface = Interface::builder().mtu(9000).device(wire.driver().from_fd(ours));
                let interface = interface.start().expect("it starts");
                let ring = interface.ring(Direction::Both).drive(way.drive(poller));
                let mut ring = ring.build().expect("a ring");
                post(&mut ring, 0);
                fill(&mut ring, 0, |number| packet(number, 9000));
                ring.cancel_and_wait(LONG).expect("a cancel ends");
                ring.drain(LONG).expect("a drain ends");
                ring.resume();
                post(&mut ring, 0);
                ring.close().expect("a close ends, and leaks nothing");
                interface.stop(LONG).expect("a stop ends");
            }
        });
    });
}

/// The largest packet of [`large`].
const LARGE: u32 = 44_000;

/// A packet that Linux seldom takes as a whole when a stream becomes full: it is larger than one of the
/// kernel's buffers. The lengths differ, so that not each full stream ends with a whole packet.
fn large(number: u64) -> Vec<u8> {
    packet(number, (LARGE as u64 - number % 7 * 1000) as usize)
}

/// Writes packets, numbered from `first` on, until the wire takes no more. Returns the number after the last
/// one that it took.
fn fill(ring: &mut Ring, first: u64, packet: impl Fn(u64) -> Vec<u8>) -> u64 {
    let (mut taken, mut next, mut full) = (first, first, false);
    while !full {
        let mut writing = 0;
        while let Some(mut frame) = ring.alloc() {
            frame.copy_from(&packet(next)).expect("it fits");
            if ring.submit_write(frame, next).is_err() {
                break;
            }
            next += 1;
            writing += 1;
        }
        for seen in reap_n(ring, writing) {
            match seen.result {
                Ok(_) => {
                    assert_eq!(seen.user_data, taken, "what the wire has taken has no gap");
                    taken += 1;
                }
                Err(EntryError::Device(Status::BufferExhausted)) => full = true,
                Err(error) => panic!("{error}"),
            }
        }
    }
    taken
}

/// Fills a stream until a frame has gone in part. Returns the numbers of the next frame that comes out,
/// and of the one after the last that is in it.
fn fill_in_part(interface: &Interface, ring: &mut Ring, peer: &mut UnixStream) -> [u64; 2] {
    let (mut read, mut taken) = (0, fill(ring, 0, large));
    while count(interface, "partial writes") == 0 {
        // It became full between two frames.
        for _ in 0..2 {
            assert!(read_framed(peer).is_some_and(|frame| frame == large(read)));
            read += 1;
        }
        taken = fill(ring, taken, large);
    }
    [read, taken]
}

/// Goal: a peer that does not read loses whole frames only, and the rest of a frame that the system has
/// taken in part arrives although nothing else is written, driven by a poller that sleeps. Method: fill
/// the wire, until a frame has gone in part; then read everything.
#[test]
fn the_rest_of_a_frame_arrives_by_itself() {
    guarded(|| {
        every_way(|way, poller| {
            for direction in [Direction::Write, Direction::Both] {
                // An inline ring with nothing in flight has nobody who drives it.
                if way == Way::Inline && direction == Direction::Write {
                    continue;
                }
                let (interface, mut ring, mut peer) = large_stream(direction, way.drive(poller));
                let [first, end] = fill_in_part(&interface, &mut ring, &mut peer);
                if direction == Direction::Both {
                    // The ring sleeps until the peer takes more, and then until it also sends something.
                    thread::sleep(Duration::from_millis(10));
                    post(&mut ring, 0);
                    thread::sleep(Duration::from_millis(10));
                }
                stage(format!("{way:?}, {direction:?}: reading"));
                let reader = thread::spawn(move || {
                    for number in first..end {
                        let frame = read_framed(&mut peer).expect("a frame");
                        assert!(frame == large(number), "frame {number} is torn");
                    }
                    peer
                });
                while !reader.is_finished() {
                    ring.wait(1, Some(Duration::from_millis(1)));
                    thread::sleep(Duration::from_millis(1));
                }
                drop(reader.join().expect("each frame is whole"));
            }
        });
    });
}

/// As [`stream`], with an MTU of [`LARGE`] bytes.
fn large_stream(direction: Direction, drive: Drive<'_>) -> (Interface, Ring, UnixStream) {
    let (ours, peer) = UnixStream::pair().expect("a pair of sockets");
    peer.set_read_timeout(Some(LONG)).expect("a time limit");
    let socket = Socket::stream().from_fd(ours.into());
    let interface = Interface::builder().mtu(LARGE).device(socket).start().expect("it starts");
    let ring = interface.ring(direction).drive(drive).build().expect("a ring");
    (interface, ring, peer)
}

/// Goal: a peer that does not read holds up nobody else on the same poller. Method: one wire is full and
/// is written to again and again, while another moves packets both ways.
#[test]
fn a_stuck_peer_holds_up_nobody_else() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        let drive = || Drive::Shared(&poller);
        let (_stuck, mut stuck, _peer) = large_stream(Direction::Both, drive());
        fill(&mut stuck, 0, large);
        let pair = Wire::Stream.pair().map(start);
        let mut rings = pair.each_ref().map(|interface| {
            interface.ring(Direction::Both).drive(drive()).build().expect("a ring")
        });
        for number in 0..scaled(500) {
            stage(format!("packet {number}"));
            if let Some(frame) = stuck.alloc() {
                let _ = stuck.submit_write(frame, 0);
            }
            let _ = reap(&mut stuck);
            for (from, to) in [(0, 1), (1, 0)] {
                post(&mut rings[to], number);
                send(&mut rings[from], number);
                assert_eq!(receive(&mut rings[to]), packet(number, 60));
                reap_n(&mut rings[from], 1);
            }
        }
    });
}

/// Goal: a peer that sends what is dropped holds up nobody: one poll looks at a part of it only. Method: the
/// ring's owner drives it, step by step.
#[test]
fn one_poll_looks_at_a_part_of_what_is_dropped() {
    guarded(|| {
        let (ours, peer) = UnixDatagram::pair().expect("a pair of sockets");
        let interface = start(Socket::datagram().from_fd(ours.into()));
        let mut ring = inline(&interface, Direction::Both).build().expect("a ring");
        let sent = 90;
        for _ in 0..sent {
            peer.send(&[7; 13]).expect("it is taken");
        }
        post(&mut ring, 1);
        let mut before = 0;
        let mut polls = 0;
        while before < sent {
            let _ = reap(&mut ring);
            let now = count(&interface, "runt");
            assert!(now - before <= 16, "one poll has looked at {} messages", now - before);
            polls += u64::from(now > before);
            before = now;
            stage(format!("{now} of {sent}"));
        }
        assert!(polls > 1);
        peer.send(&packet(1, 60)).expect("it is taken");
        assert_eq!(receive(&mut ring), packet(1, 60));
    });
}

/// Goal: a wire that has nothing to do sleeps, whatever lies in its socket: messages of others while its
/// peer is not there, and the end of a peer that has not taken the rest of a frame. Method: count how
/// often the device wakes its poller.
#[test]
fn a_wire_that_can_do_nothing_sleeps() {
    guarded(|| {
        let wakeups_in_a_rest = |ring: &Ring| {
            // What has just happened wakes it a few times more.
            thread::sleep(Duration::from_millis(100));
            let before = ring.stats().device_wakeups;
            thread::sleep(Duration::from_millis(200));
            ring.stats().device_wakeups - before
        };
        let folder = Folder::new();
        let own = folder.path("own");
        let socket = Socket::datagram().connect(folder.path("nobody")).own_path(&own);
        let interface = start(socket);
        let mut ring = both(&interface);
        post(&mut ring, 1);
        let other = UnixDatagram::unbound().expect("a socket");
        for _ in 0..3 {
            other.send_to(&packet(1, 60), &own).expect("it is taken");
        }
        let wakeups = wakeups_in_a_rest(&ring);
        assert!(wakeups < 50, "{wakeups} times in vain");

        let (interface, mut ring, mut peer) = large_stream(Direction::Both, Drive::Thread);
        fill_in_part(&interface, &mut ring, &mut peer);
        peer.write_all(&framed(&packet(1, 60))).expect("it is taken");
        thread::sleep(Duration::from_millis(200));
        drop(peer);
        let wakeups = wakeups_in_a_rest(&ring);
        assert!(wakeups < 50, "{wakeups} times in vain");
    });
}

/// Goal: a peer that reads slowly gets each frame, in order, if the ring is patient.
#[test]
fn a_slow_reader_gets_every_frame() {
    guarded(|| {
        let (ours, mut peer) = UnixStream::pair().expect("a pair of sockets");
        peer.set_read_timeout(Some(LONG)).expect("a time limit");
        let socket = Socket::stream().from_fd(ours.into());
        let interface = Interface::builder().mtu(9000).device(socket).start().expect("it starts");
        let ring = interface.ring(Direction::Write).retry(PATIENT).build();
        let mut ring = ring.expect("a ring");
        let frames = 2000;
        let reader = thread::spawn(move || {
            for number in 0..frames {
                if number % 100 == 0 {
                    thread::sleep(Duration::from_millis(5));
                }
                let frame = read_framed(&mut peer).expect("a frame");
                assert!(frame == packet(number, 9000), "frame {number} is torn");
            }
        });
        let (mut next, mut written) = (0, 0);
        while written < frames {
            while next < frames
                && let Some(mut frame) = ring.alloc()
            {
                frame.copy_from(&packet(next, 9000)).expect("it fits");
                if ring.submit_write(frame, next).is_err() {
                    break;
                }
                next += 1;
            }
            ring.wait(1, Some(LONG));
            for seen in reap(&mut ring) {
                assert_eq!((seen.user_data, seen.result), (written, Ok(9000)));
                written += 1;
            }
        }
        stage("the last frames arrive");
        reader.join().expect("each frame arrives");
    });
}

/// Goal: the rest of a frame goes first, also after a cancel, a drain, a close and in another ring.
/// Method: fill the wire, do all of that, write one more packet in a new ring, and read everything.
#[test]
fn no_frame_is_torn_by_a_cancel_a_drain_or_a_close() {
    guarded(|| {
        let (interface, mut ring, mut peer) = large_stream(Direction::Write, Drive::Thread);
        let [first, taken] = fill_in_part(&interface, &mut ring, &mut peer);
        ring.cancel_and_wait(LONG).expect("a cancel ends");
        ring.drain(LONG).expect("a drain ends");
        ring.close().expect("a close ends");
        let ring = interface.ring(Direction::Write).retry(PATIENT);
        let mut ring = ring.build().expect("another ring");
        let mut frame = ring.alloc().expect("a frame");
        // So small that the system takes all of it or nothing. What is left of the last packet goes with a
        // stop only if the system takes it at once.
        frame.copy_from(&packet(taken, 60)).expect("it fits");
        ring.submit_write(frame, taken).expect("a credit");
        let reader = thread::spawn(move || {
            for number in first..taken {
                let frame = read_framed(&mut peer).expect("a frame");
                assert!(frame == large(number), "frame {number} is torn");
            }
            assert_eq!(read_framed(&mut peer), Some(packet(taken, 60)));
            assert_eq!(read_framed(&mut peer), None, "the end is between two frames");
        });
        assert_eq!(outcome(&mut ring), Ok(60));
        ring.close().expect("a close ends");
        interface.stop(LONG).expect("a stop ends");
        reader.join().expect("each frame is whole");
    });
}

/// Goal: a listener that peers connect to as fast as they can, four at once, stays as it is, and serves who
/// comes then. Every connection that breaks the rules is closed, so none is left. Meanwhile another wire of
/// the same poller answers each packet of its peer.
#[test]
fn ten_thousand_connections_leave_nothing() {
    const THREADS: u64 = 4;
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let poller = Poller::start().expect("a poller");
        let shared = |interface: &Interface| {
            let ring = interface.ring(Direction::Both).drive(Drive::Shared(&poller));
            ring.build().expect("a ring")
        };
        let interface = start(Socket::stream().listen(&path));
        let mut ring = shared(&interface);
        post(&mut ring, 1);
        let (ours, mut good) = UnixStream::pair().expect("a pair of sockets");
        good.set_read_timeout(Some(LONG)).expect("a time limit");
        good.set_write_timeout(Some(LONG)).expect("a time limit");
        let calm = start(Socket::stream().from_fd(ours.into()));
        let mut calm_ring = shared(&calm);
        let done = Arc::new(AtomicBool::new(false));
        let echo = thread::spawn({
            let done = done.clone();
            move || echo_until(&mut calm_ring, |_| done.load(Ordering::Relaxed))
        });
        let each = scaled(10_000 / THREADS);
        let storm = move |path: PathBuf| {
            let mut kept = Vec::new();
            for number in 0..each {
                // `connect` waits while the backlog is full.
                let mut peer = UnixStream::connect(&path).expect("it listens");
                if number % 100 == 0 {
                    peer.write_all(&[0xff; 4]).expect("it is taken");
                    kept.push(peer);
                }
            }
            // Those that break the rules are ended.
            for mut peer in kept {
                peer.set_read_timeout(Some(LONG)).expect("a time limit");
                assert_eq!(peer.read(&mut [0; 1]).expect("in time"), 0);
            }
        };
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let path = path.clone();
                thread::spawn(move || storm(path))
            })
            .collect();
        let mut pings = 0;
        while pings == 0 || threads.iter().any(|thread| !thread.is_finished()) {
            pings += 1;
            stage(format!("ping {pings} of the good peer"));
            let ping = packet(pings, 60);
            write_framed(&mut good, &ping);
            let answer = [&ping[6..12], &ping[..6], &ping[12..]].concat();
            assert_eq!(read_framed(&mut good), Some(answer));
        }
        threads.into_iter().for_each(|thread| thread.join().expect("each is let in"));
        done.store(true, Ordering::Relaxed);
        echo.join().expect("it ends");
        stage("the next peer is served");
        let mut peer = UnixStream::connect(&path).expect("it listens");
        write_framed(&mut peer, &packet(1, 60));
        assert_eq!(receive(&mut ring), packet(1, 60));
        assert_eq!(count(&interface, "peers"), THREADS * each + 1);
        assert_eq!(count(&interface, "peers gone"), THREADS * each);
    });
}

/// Goal: our side of each wire has the buffers that its peers need. Linux says twice what was asked for,
/// and grants no more than the host's limit to those without the privilege.
#[test]
fn each_wire_has_buffers_of_its_size() {
    const MIB: usize = 1 << 20;
    let option = |fd: &OwnedFd, name| {
        let (mut value, mut len) = (0_i32, size_of::<i32>() as libc::socklen_t);
        let to = (&raw mut value).cast();
        // SAFETY: the value has `len` bytes, and the system writes at most as many.
        let got = unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, to, &mut len) };
        assert_eq!(got, 0);
        value as usize
    };
    let limit = |name: &str| {
        let file = fs::read_to_string(format!("/proc/sys/net/core/{name}"));
        file.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(usize::MAX)
    };
    let expect = |fd: &OwnedFd, what: &str, [send, receive]: [usize; 2]| {
        for (name, wanted, most) in [
            (libc::SO_SNDBUF, send, limit("wmem_max")),
            (libc::SO_RCVBUF, receive, limit("rmem_max")),
        ] {
            let got = option(fd, name);
            let factor = if cfg!(target_os = "linux") { 2 } else { 1 };
            let possible = [factor * wanted, factor * wanted.min(most)];
            assert!(possible.contains(&got), "{what}: {got} bytes, and not one of {possible:?}");
        }
    };
    for &wire in Wire::ALL {
        for large in [false, true] {
            if large && !Wire::WITH_HEADERS.contains(&wire) {
                continue;
            }
            let [ours, _peer] = wire.sockets();
            let same = ours.try_clone().expect("a copy");
            let offloads = if large { Offloads::ALL } else { Offloads::default() };
            let builder = Interface::builder().offloads(offloads);
            let started = builder.device(wire.driver().from_fd(ours)).start().expect("it starts");
            let sizes = match wire {
                Wire::Stream | Wire::StreamWithHeaders => [MIB, MIB],
                _ if large => [MIB, 8 * MIB],
                _ => [MIB, 4 * MIB],
            };
            expect(&same, &format!("{wire:?}, large: {large}"), sizes);
            drop(started);
        }
    }
    let folder = Folder::new();
    let bound = Listener::bind(SocketKind::Datagram, &folder.path("wire")).expect("a socket");
    let same = bound.as_fd().try_clone_to_owned().expect("a copy");
    let started = start(Socket::datagram().bound(bound));
    expect(&same, "a datagram socket of a path", [MIB, 4 * MIB]);
    drop(started);
}

/// Goal: without a peer, reads wait and writes fail at once and are counted.
#[test]
fn without_a_peer_reads_wait_and_writes_fail() {
    guarded(|| {
        let folder = Folder::new();
        let kinds: [Kind; 4] = [
            ("stream", Socket::stream),
            ("datagram", Socket::datagram),
            ("stream client", Socket::stream),
            ("datagram client", Socket::datagram),
        ];
        for (name, socket) in kinds {
            stage(name);
            let path = folder.path(name);
            let socket = match name.contains("client") {
                true => socket().connect(&path),
                false => socket().listen(&path),
            };
            let interface = start(socket);
            let mut ring = both(&interface);
            post(&mut ring, 1);
            send(&mut ring, 2);
            assert_eq!(outcome(&mut ring), no_peer());
            assert_eq!(count(&interface, "no peer"), 1);
            assert_eq!(ring.in_flight(), 1);
        }
    });
}

/// Goal: a wire that connects does so again when its peer has gone and comes back, without a submission.
#[test]
fn a_stream_connects_again() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let pause = Some(Duration::from_millis(5));
        let interface = start(Socket::stream().connect(&path).reconnect(pause));
        let mut ring = both(&interface);
        for number in 0..3 {
            stage(format!("peer {number}"));
            post(&mut ring, number);
            let listener = UnixListener::bind(&path).expect("a listener");
            let (mut peer, _) = listener.accept().expect("the wire connects");
            peer.set_read_timeout(Some(LONG)).expect("a time limit");
            write_framed(&mut peer, &packet(number, 60));
            assert_eq!(receive(&mut ring), packet(number, 60));
            send(&mut ring, number);
            assert_eq!(read_framed(&mut peer), Some(packet(number, 60)));
            reap_n(&mut ring, 1);
            drop((peer, listener));
            fs::remove_file(&path).expect("the socket's file");
        }
        let once = Socket::stream().connect(folder.path("nobody")).reconnect(None);
        assert!(matches!(Interface::builder().device(once).start(), Err(Error::Io { .. })));
    });
}

/// Goal: a socket that is left over is replaced, one of a live process is refused, and so is a file. The
/// socket is for its owner only, and goes with the interface.
#[test]
fn a_path_is_taken_only_if_nobody_has_it() {
    guarded(|| {
        let folder = Folder::new();
        let refused = |socket: Socket| match Interface::builder().device(socket).start() {
            Err(Error::Socket(error)) => error,
            other => panic!("{other:?}"),
        };
        let kinds: [Kind; 2] = [("stream", Socket::stream), ("datagram", Socket::datagram)];
        for (name, socket) in kinds {
            let path = folder.path(name);
            leave_over(name, &path);
            let interface = start(socket().listen(&path));
            let mode = fs::metadata(&path).expect("a socket").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            assert_eq!(refused(socket().listen(&path)), SocketError::Taken(path.clone()));
            for (_, other) in kinds {
                assert_eq!(refused(other().listen(&path)), SocketError::Taken(path.clone()));
            }
            interface.stop(LONG).expect("it stops");
            assert!(!exists(&path), "a socket is left");
        }
        let file = folder.path("file");
        fs::write(&file, "text").expect("a file");
        assert_eq!(refused(Socket::stream().listen(&file)), SocketError::NotASocket(file.clone()));
        assert_eq!(fs::read(&file).expect("it is there"), b"text");
        let long = folder.path(&"x".repeat(120));
        for socket in [Socket::stream().listen(&long), Socket::stream().connect(&long)] {
            assert!(matches!(refused(socket), SocketError::PathTooLong { .. }));
        }
    });
}

fn leave_over(kind: &str, path: &Path) {
    match kind {
        "stream" => drop(UnixListener::bind(path).expect("a listener")),
        _ => drop(UnixDatagram::bind(path).expect("a socket")),
    }
    assert!(exists(path));
}

/// Goal: a descriptor of another kind is refused, and one that listens is listened on.
#[test]
fn a_descriptor_is_looked_at() {
    guarded(|| {
        let (stream, _peer) = UnixStream::pair().expect("a pair");
        let wrong = Socket::datagram().from_fd(stream.into());
        let error = Interface::builder().device(wrong).start().expect_err("it is a stream");
        assert!(matches!(error, Error::Socket(SocketError::Descriptor(_))), "{error}");
        let file: OwnedFd = fs::File::open("/dev/null").expect("a file").into();
        let wrong = Socket::stream().from_fd(file);
        let error = Interface::builder().device(wrong).start().expect_err("it is a file");
        assert!(matches!(error, Error::Socket(SocketError::Descriptor(_))), "{error}");
        let none = Interface::builder().device(Socket::stream()).start().expect_err("no socket");
        assert!(matches!(none, Error::Socket(SocketError::Setting(_))), "{none}");

        let folder = Folder::new();
        let path = folder.path("wire");
        let listener: OwnedFd = UnixListener::bind(&path).expect("a listener").into();
        let interface = start(Socket::stream().from_fd(listener));
        let mut ring = both(&interface);
        post(&mut ring, 1);
        let mut peer = UnixStream::connect(&path).expect("it listens");
        write_framed(&mut peer, &packet(1, 60));
        assert_eq!(receive(&mut ring), packet(1, 60));
        drop((ring, interface));
        assert!(exists(&path), "the file is its maker's");
    });
}

/// Goal: a server of many clients can use the rules of listening by themselves.
#[test]
fn a_listener_gives_each_client_a_wire_of_its_own() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let listener = Listener::bind(SocketKind::Stream, &path).expect("a listener");
        assert!(listener.accept().expect("nobody has come").is_none());
        let mut ends = Vec::new();
        for number in 0..3 {
            let mut peer = UnixStream::connect(&path).expect("it listens");
            let socket = listener.accept().expect("no error").expect("one has come");
            let interface = start(Socket::stream().from_fd(socket));
            let mut ring = both(&interface);
            post(&mut ring, number);
            write_framed(&mut peer, &packet(number, 60));
            ends.push((ring, interface, peer));
        }
        for (number, (ring, _, _)) in (0..).zip(&mut ends) {
            assert_eq!(receive(ring), packet(number, 60));
        }
        drop(listener);
        assert!(!exists(&path));
    });
}

/// Goal: a socket that was made before the interface is its own: one that listens, one to which a peer
/// sends, and this side of one that connects. Two sockets are refused.
#[test]
fn a_socket_that_was_made_before_is_used() {
    guarded(|| {
        let folder = Folder::new();
        let bind = |kind, name: &str| Listener::bind(kind, &folder.path(name)).expect(name);
        let stream = bind(SocketKind::Stream, "stream");
        let interface = start(Socket::stream().bound(stream));
        let mut ring = both(&interface);
        post(&mut ring, 1);
        let mut peer = UnixStream::connect(folder.path("stream")).expect("it listens");
        write_framed(&mut peer, &packet(1, 60));
        assert_eq!(receive(&mut ring), packet(1, 60));
        drop(ring);
        interface.stop(LONG).expect("it stops");
        assert!(!exists(&folder.path("stream")), "it is its own");

        let vmm = UnixDatagram::bind(folder.path("vmm")).expect("a socket");
        let learns = bind(SocketKind::Datagram, "learns");
        let interface = start(Socket::datagram().bound(learns));
        let mut ring = both(&interface);
        post(&mut ring, 2);
        vmm.send_to(&packet(2, 60), folder.path("learns")).expect("it is taken");
        assert_eq!(receive(&mut ring), packet(2, 60));
        drop((ring, interface));
        assert!(!exists(&folder.path("learns")), "it is its own");

        let own = bind(SocketKind::Datagram, "own");
        let socket = Socket::datagram().connect(folder.path("vmm")).magic(true).bound(own);
        let interface = start(socket);
        let mut ring = both(&interface);
        post(&mut ring, 3);
        vmm.set_read_timeout(Some(LONG)).expect("a timeout");
        let (len, from) = vmm.recv_from(&mut [0; 16]).expect("the wire announces itself");
        assert_eq!((len, from.as_pathname()), (4, Some(&*folder.path("own"))));
        vmm.send_to(&packet(3, 60), folder.path("own")).expect("it is taken");
        assert_eq!(receive(&mut ring), packet(3, 60));
        drop((ring, interface));
        assert!(!exists(&folder.path("own")), "it is its own");

        let (one, _other) = UnixStream::pair().expect("a pair");
        let two = Socket::stream().from_fd(one.into()).bound(bind(SocketKind::Stream, "two"));
        let error = Interface::builder().device(two).start().expect_err("there are two");
        assert!(matches!(error, Error::Socket(SocketError::Setting(_))), "{error}");
        let mixed = Socket::stream().bound(bind(SocketKind::Datagram, "mixed"));
        let error = Interface::builder().device(mixed).start().expect_err("it is no stream");
        assert!(matches!(error, Error::Socket(SocketError::Descriptor(_))), "{error}");
    });
}

/// Goal: a socket of another process is told apart, and accepting at it waits for nobody.
#[test]
fn an_inherited_socket_is_listening_or_single() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let blocking: OwnedFd = UnixListener::bind(&path).expect("a listener").into();
        let Ok(Adopted::Listening(listener)) = adopt(SocketKind::Stream, blocking) else {
            panic!("it listens");
        };
        assert!(listener.accept().expect("no error").is_none(), "nobody has come");
        let _peer = UnixStream::connect(&path).expect("it listens");
        assert!(listener.accept().expect("no error").is_some());
        let (one, _other) = UnixStream::pair().expect("a pair");
        assert!(matches!(adopt(SocketKind::Stream, one.into()), Ok(Adopted::Single(_))));
        let (one, _other) = UnixDatagram::pair().expect("a pair");
        assert!(adopt(SocketKind::Stream, one.into()).is_err(), "it is another type");
        drop(listener);
        assert!(exists(&path), "the file is its maker's");
    });
}

/// Goal: a process that holds the lock of a folder holds up no start for long: the lock is waited for, and
/// then there is a sentence.
#[test]
fn a_folder_that_is_locked_is_waited_for_and_refused() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let of_path = path.parent().expect("a folder").to_owned();
        let lock = || {
            let folder = fs::File::open(&of_path).expect("it can be read");
            // SAFETY: the call takes numbers only.
            let locked = unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX) };
            assert_eq!(locked, 0, "nobody else has it");
            folder
        };
        let is_locked = |error: &Error| matches!(error, Error::Socket(SocketError::FolderLocked(is)) if *is == of_path);
        let held = lock();
        let refused = Listener::bind(SocketKind::Stream, &path).expect_err("it is locked");
        assert!(is_locked(&refused), "{refused}");
        assert!(!exists(&path));
        drop(held);
        // If this thread is stopped meanwhile, the other one waits too long.
        eventually("a lock that is free soon is waited for", || {
            let held = lock();
            let binding = thread::spawn({
                let path = path.clone();
                move || Listener::bind(SocketKind::Datagram, &path)
            });
            thread::sleep(Duration::from_millis(100));
            drop(held);
            let bound = binding.join().expect("it ends");
            bound.inspect_err(|error| assert!(is_locked(error), "{error}")).is_ok()
        });
    });
}

/// Goal: a datagram socket serves one interface after the other, each with one peer: it is learned or
/// reached before, and the next one comes when the interface has stopped.
#[test]
fn a_datagram_socket_serves_one_peer_after_the_other() {
    guarded(|| {
        let folder = Folder::new();
        let (path, own) = (folder.path("wire"), folder.path("peer"));
        let mut listener = Listener::bind(SocketKind::Datagram, &path).expect("a socket");
        let refused = Interface::builder().device(Socket::datagram().peer_of(&listener)).start();
        let refused = refused.expect_err("there is no peer");
        assert!(matches!(refused, Error::Socket(SocketError::Setting(_))), "{refused}");
        assert!(!listener.learn_peer().has_peer);
        let gone = CloseReason::Failed(Status::Os(libc::ECONNRESET));
        for round in 0..6 {
            // The path is the same one each time, so only its file tells the next peer from the last.
            let (reaches, writes) = (round % 2 == 1, round % 3 == 0);
            stage(format!("round {round}"));
            let unnamed = UnixDatagram::unbound().expect("a socket");
            unnamed.send_to(&packet(9, 60), &path).expect("it is taken");
            let peer = UnixDatagram::bind(&own).expect("a socket");
            peer.set_read_timeout(Some(LONG)).expect("a time limit");
            peer.connect(&path).expect("nobody else is the peer");
            peer.send(&packet(round, 60)).expect("it is taken");
            let socket = match reaches {
                true => {
                    listener.reach(&own).expect("it is there");
                    Socket::datagram().magic(true).peer_of(&listener)
                }
                false => {
                    let learned = listener.learn_peer();
                    assert_eq!((learned.has_peer, learned.unnamed), (true, 1));
                    Socket::datagram().peer_of(&listener)
                }
            };
            let interface = start(socket);
            let mut ring = both(&interface);
            for number in 0..3 {
                post(&mut ring, number);
            }
            if reaches {
                let mut magic = [0; 8];
                assert_eq!(peer.recv(&mut magic).expect("it announces itself"), 4);
            }
            assert_eq!(receive(&mut ring), packet(round, 60));
            assert_eq!(count(&interface, "other sender"), u64::from(reaches));
            send(&mut ring, 5);
            let mut answer = [0; 2000];
            let len = peer.recv(&mut answer).expect("an answer in time");
            assert_eq!(answer[..len], packet(5, 60));
            drop(peer);
            fs::remove_file(&own).expect("the peer's file");
            // The next one is there before anybody has looked.
            let next = UnixDatagram::bind(&own).expect("a socket");
            if writes {
                send(&mut ring, 6);
            }
            eventually("the ring closes", || ring.control().closed() == Some(gone));
            let _ = next.connect(&path);
            drop((ring, next));
            fs::remove_file(&own).expect("the next one's file");
            interface.stop(LONG).expect("it stops");
            assert!(exists(&path), "the path stays");
        }
        stage("a peer that nobody serves is followed by the next");
        let unserved = UnixDatagram::bind(&own).expect("a socket");
        unserved.send_to(&packet(1, 60), &path).expect("it is taken");
        assert!(listener.learn_peer().has_peer);
        drop(unserved);
        assert!(!listener.learn_peer().has_peer, "it is given up");
        let next = UnixDatagram::bind(folder.path("next")).expect("a socket");
        next.send_to(&packet(2, 60), &path).expect("nobody else is the peer");
        assert!(listener.learn_peer().has_peer);
        let stream = Listener::bind(SocketKind::Stream, &folder.path("stream")).expect("a socket");
        let refused = Interface::builder().device(Socket::stream().peer_of(&stream)).start();
        refused.expect_err("a stream has connections");
        drop(listener);
        assert!(!exists(&path), "the file goes with the listener");
    });
}

/// Goal: a datagram socket that listens learns its peer from the first message, answers it, hears nobody
/// else, and takes the next peer after the first has gone. The magic is no frame, at any time.
#[test]
fn a_datagram_socket_learns_its_peer() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let interface = start(Socket::datagram().listen(&path));
        let mut ring = both(&interface);
        for number in 0..4 {
            post(&mut ring, number);
        }
        // Nobody could answer a socket without a name.
        let unnamed = UnixDatagram::unbound().expect("a socket");
        unnamed.send_to(&packet(99, 60), &path).expect("it is taken");
        eventually("the message is dropped", || count(&interface, "sender without a name") == 1);
        for number in 0..2 {
            stage(format!("peer {number}"));
            let own = folder.path(&format!("peer-{number}"));
            let peer = UnixDatagram::bind(&own).expect("a socket");
            peer.set_read_timeout(Some(LONG)).expect("a time limit");
            eventually("the former peer is found to be gone", || {
                peer.send_to(b"VFKT", &path).is_ok()
            });
            eventually("the peer is learned", || count(&interface, "peers") == number + 1);
            send(&mut ring, number);
            let mut answer = [0; 2000];
            let (len, from) = peer.recv_from(&mut answer).expect("an answer in time");
            assert_eq!(answer[..len], packet(number, 60));
            assert_eq!(from.as_pathname(), Some(&*path));
            assert_eq!(outcome(&mut ring), Ok(60));
            let stranger = UnixDatagram::bind(folder.path(&format!("stranger-{number}")));
            let _ = stranger.expect("a socket").send_to(&packet(98, 60), &path);
            for message in [&b"VFKT"[..], &[1, 2, 3], &packet(7, 1519), &packet(number, 100)] {
                peer.send_to(message, &path).expect("it is taken");
            }
            assert_eq!(receive(&mut ring), packet(number, 100));
            post(&mut ring, 0);
            assert_eq!(count(&interface, "runt"), number + 1);
            assert_eq!(count(&interface, "too big"), number + 1);
        }
        drop(ring);
        interface.stop(LONG).expect("it stops");
        assert!(!exists(&path));
    });
}

/// Goal: a datagram socket with one peer ends with it: nobody is its peer after the first, whether or not
/// something is written. Other sockets have no such setting.
#[test]
fn a_datagram_socket_with_one_peer_ends_with_it() {
    guarded(|| {
        let folder = Folder::new();
        for writes in [false, true] {
            stage(format!("writes: {writes}"));
            let (path, own) = (folder.path("wire"), folder.path("peer"));
            let interface = start(Socket::datagram().listen(&path).one_peer(true));
            let mut ring = both(&interface);
            post(&mut ring, 1);
            let peer = UnixDatagram::bind(&own).expect("a socket");
            peer.send_to(&packet(1, 60), &path).expect("it is taken");
            assert_eq!(receive(&mut ring), packet(1, 60));
            post(&mut ring, 2);
            drop(peer);
            if writes {
                send(&mut ring, 3);
            }
            let gone = CloseReason::Failed(Status::Os(libc::ECONNRESET));
            eventually("the ring closes", || ring.control().closed() == Some(gone));
            let next = UnixDatagram::bind(folder.path("next")).expect("a socket");
            let _ = next.send_to(&packet(2, 60), &path);
            assert_eq!(count(&interface, "peers"), 1);
            drop((ring, interface));
            fs::remove_file(&own).expect("the peer's file");
            fs::remove_file(folder.path("next")).expect("the next one's file");
        }
        let (ours, _peer) = UnixStream::pair().expect("a pair of sockets");
        for wrong in [
            Socket::stream().from_fd(ours.into()).one_peer(true),
            Socket::datagram().connect(folder.path("wire")).one_peer(true),
        ] {
            let refused = Interface::builder().device(wrong).start().expect_err("it is refused");
            assert!(refused.to_string().contains("one peer and no other"), "{refused}");
        }
    });
}

/// Goal: a datagram socket that connects finds its peer when it comes, announces itself, and finds it
/// again at the same path.
#[test]
fn a_datagram_socket_connects_again() {
    guarded(|| {
        let folder = Folder::new();
        let (path, own) = (folder.path("helper"), folder.path("own"));
        let pause = Some(Duration::from_millis(10));
        let socket = Socket::datagram().connect(&path).own_path(&own).magic(true).reconnect(pause);
        let interface = start(socket);
        let mut ring = both(&interface);
        post(&mut ring, 1);
        for number in 0..2 {
            stage(format!("helper {number}"));
            let peer = UnixDatagram::bind(&path).expect("a socket");
            peer.set_read_timeout(Some(LONG)).expect("a time limit");
            let mut first = [0; 2000];
            let (len, from) = peer.recv_from(&mut first).expect("the magic in time");
            assert_eq!((&first[..len], from.as_pathname()), (&b"VFKT"[..], Some(&*own)));
            peer.send_to(&packet(number, 60), &own).expect("it is taken");
            assert_eq!(receive(&mut ring), packet(number, 60));
            post(&mut ring, 1);
            send(&mut ring, number);
            let len = peer.recv(&mut first).expect("a frame in time");
            assert_eq!(first[..len], packet(number, 60));
            assert_eq!(outcome(&mut ring), Ok(60));
            drop(peer);
            fs::remove_file(&path).expect("the socket's file");
        }
        drop(ring);
        interface.stop(LONG).expect("it stops");
        assert!(!exists(&own), "the socket of this side is left");
    });
}

/// Goal: a datagram peer that was given and goes closes the ring, at the next write.
#[test]
fn a_given_datagram_peer_that_goes_closes_the_ring() {
    guarded(|| {
        let (ours, peer) = UnixDatagram::pair().expect("a pair of sockets");
        let interface = start(Socket::datagram().from_fd(ours.into()));
        let mut ring = both(&interface);
        post(&mut ring, 1);
        drop(peer);
        send(&mut ring, 2);
        reap_n(&mut ring, 2);
        assert!(matches!(ring.control().closed(), Some(CloseReason::Failed(Status::Os(_)))));
    });
}

/// Goal: an empty message is neither a frame nor an end, and none is ever sent.
#[cfg(target_os = "linux")]
#[test]
fn an_empty_message_means_nothing() {
    guarded(|| {
        use std::os::fd::AsRawFd;
        for wire in [Wire::Datagram, Wire::Seqpacket] {
            let [ours, peer] = wire.sockets();
            let interface = start(wire.driver().from_fd(ours));
            let mut ring = both(&interface);
            post(&mut ring, 1);
            for payload in [&[][..], &packet(1, 60)] {
                // SAFETY: the pointer and the length are those of the payload.
                let sent = unsafe {
                    libc::send(peer.as_raw_fd(), payload.as_ptr().cast(), payload.len(), 0)
                };
                assert_eq!(sent as usize, payload.len());
            }
            assert_eq!(receive(&mut ring), packet(1, 60), "{wire:?}");
            let frame = ring.alloc().expect("a frame");
            ring.submit_write(frame, 2).expect("a credit");
            let refused = Err(EntryError::Device(Status::InvalidArgument));
            assert_eq!(outcome(&mut ring), refused, "{wire:?}");
        }
    });
}

/// Goal: the read that was posted first gets the first packet, whatever is dropped in front of it.
/// Otherwise a guest whose device gives buffers back in order would wait for a packet that it has.
/// Method: good and bad messages come together, into frames and into a guest's memory.
#[test]
fn a_dropped_message_leaves_no_read_behind() {
    guarded(|| {
        use std::os::fd::AsRawFd;
        let of_messages = |wire: &&Wire| !matches!(wire, Wire::Stream | Wire::StreamWithHeaders);
        for &wire in Wire::ALL.iter().filter(of_messages) {
            stage(format!("{wire:?}"));
            let [ours, peer] = wire.sockets();
            let interface = start(wire.driver().from_fd(ours));
            let mut guest = Guest::new(8, 1514);
            let builder = inline(&interface, Direction::Both).segment_table(guest.table());
            let mut ring = builder.build().expect("a ring");
            for number in 0..8 {
                if number % 3 == 0 {
                    post(&mut ring, number);
                } else {
                    ring.submit_read_guest(guest.buffer(number), number).expect("a credit");
                }
            }
            let header: &[u8] = if wire.has_headers() { &[0; 12] } else { &[] };
            let good = |number| [header, &packet(number, 60 + number as usize)].concat();
            let bad = [vec![0; 13], b"VFKT".to_vec(), vec![0; 3000]];
            let [runt, magic, long] = bad;
            for message in [runt, good(0), magic, good(1), good(2), long, good(3)] {
                // SAFETY: the pointer and the length are those of the message.
                let sent = unsafe {
                    libc::send(peer.as_raw_fd(), message.as_ptr().cast(), message.len(), 0)
                };
                assert_eq!(sent as usize, message.len());
            }
            let came = reap_n(&mut ring, 4);
            for (number, done) in (0..).zip(came) {
                let len = 60 + number as usize;
                assert_eq!((done.user_data, done.result), (number, Ok(len)), "{wire:?}");
                let bytes = match done.frame {
                    Some(frame) => frame.to_vec(),
                    None => guest.bytes(number, len).1,
                };
                assert_eq!(bytes, packet(number, len), "{wire:?}");
            }
            ring.cancel_and_wait(LONG).expect("it ends");
            let left: Vec<_> = reap(&mut ring).iter().map(|done| done.user_data).collect();
            assert_eq!(left, [4, 5, 6, 7], "{wire:?}");
        }
    });
}

/// Goal: a virtio header goes through whole, in both directions. One that is wrong, or that asks for work
/// that was not negotiated, is dropped with its frame and counted.
#[test]
fn a_virtio_header_is_checked_and_goes_through() {
    guarded(|| {
        let checksum = OffloadHeader {
            checksum: Checksum::Partial { start: 34, offset: 16 },
            ..OffloadHeader::NONE
        };
        let large =
            OffloadHeader { gso: Gso::TcpV4, segment_size: 1460, header_len: 54, ..checksum };
        let beyond =
            OffloadHeader { checksum: Checksum::Partial { start: 5000, offset: 16 }, ..checksum };
        let bytes = |header: &OffloadHeader| {
            let mut bytes = [0; 12];
            header.write(&mut bytes);
            bytes
        };
        let mut asked = Offloads::default();
        asked.checksum = true;
        for &wire in Wire::WITH_HEADERS {
            stage(format!("{wire:?}"));
            let [ours, peer] = wire.sockets();
            let builder = Interface::builder().offloads(asked);
            let interface = builder.device(wire.driver().from_fd(ours)).start().expect("a wire");
            let mut ring = both(&interface);
            for number in 0..4 {
                post(&mut ring, number);
            }
            let to_wire = |payload: &[u8]| {
                use std::os::fd::AsRawFd;
                let is_stream = wire == Wire::StreamWithHeaders;
                let payload = if is_stream { framed(payload) } else { payload.to_vec() };
                // SAFETY: the pointer and the length are those of the payload.
                let sent = unsafe {
                    libc::send(peer.as_raw_fd(), payload.as_ptr().cast(), payload.len(), 0)
                };
                assert_eq!(sent as usize, payload.len());
            };
            let mut reserved = bytes(&OffloadHeader::NONE);
            reserved[0] = 0x80;
            for (header, number) in [
                (bytes(&checksum), 1),
                (bytes(&large), 2),
                (bytes(&beyond), 3),
                ([0, 77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 4),
                (reserved, 5),
            ] {
                to_wire(&[&header[..], &packet(number, 100)].concat());
            }
            to_wire(&[0; 25]);
            let first = reap_n(&mut ring, 1).remove(0).frame.expect("a frame");
            assert_eq!(first[..], packet(1, 100));
            let header = first.offload().expect("it is true").expect("there is one");
            assert_eq!(header.checksum, checksum.checksum);
            let second = reap_n(&mut ring, 1).remove(0).frame.expect("a frame");
            assert_eq!(second[..], packet(5, 100));
            assert!(second.offload().expect("it is true").is_none_or(|header| header.is_plain()));
            eventually("the runt is counted", || count(&interface, "runt") == 1);
            assert_eq!(count(&interface, "bad offload header"), 3);

            let mut frame = ring.alloc().expect("a frame");
            frame.copy_from(&packet(6, 100)).expect("it fits");
            frame.set_offload(&checksum).expect("there is headroom");
            ring.submit_write(frame, 6).expect("a credit");
            assert_eq!(outcome(&mut ring), Ok(100));
            let expected = [&bytes(&checksum)[..], &packet(6, 100)].concat();
            let mut peer = UnixStream::from(peer);
            peer.set_read_timeout(Some(LONG)).expect("a time limit");
            let mut came = vec![0; 4 + 112];
            let len = peer.read(&mut came).expect("in time");
            let came = if wire == Wire::StreamWithHeaders { &came[4..len] } else { &came[..len] };
            assert_eq!(came, expected);
        }
        let without = Interface::builder().offloads(asked);
        let [ours, _peer] = Wire::Stream.sockets();
        let error = without.device(Socket::stream().from_fd(ours)).start().expect_err("no header");
        assert!(matches!(error, Error::NotSupported { .. }), "{error}");
    });
}

/// Goal: a wire with implied offload makes a header of each frame that it receives, and completes what it
/// sends. What nothing can cut is dropped and counted. Other wires have no such setting.
#[test]
fn implied_offload_is_found_in_the_frames() {
    guarded(|| {
        let (ours, peer) = UnixDatagram::pair().expect("a pair of sockets");
        peer.set_read_timeout(Some(LONG)).expect("a time limit");
        let mut offloads = Offloads::ALL;
        offloads.uso = false;
        let socket = || Socket::datagram().implied_offload(true);
        let builder = Interface::builder().offloads(offloads);
        let interface = builder.device(socket().from_fd(ours.into())).start().expect("it starts");
        assert_eq!(interface.capabilities().offloads, offloads);
        let mut ring = both(&interface);
        post(&mut ring, 1);
        // TCP over IPv4 with a checksum of nothing.
        let tcp = |payload: usize| {
            let total = (40 + payload) as u16;
            let mut frame = vec![2; 12];
            frame.extend([8, 0, 0x45, 0]);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            frame.extend([0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
            frame.extend((0..payload).map(|i| i as u8));
            frame
        };
        // A datagram of UDP above the MTU cannot be cut.
        let mut long = tcp(3000);
        long[23] = 17;
        peer.send(&long).expect("it is taken");
        peer.send(&tcp(9000)).expect("it is taken");
        let seen = reap_n(&mut ring, 1).remove(0);
        assert_eq!(seen.result, Ok(9054));
        let mut frame = seen.frame.expect("a read has a frame");
        let header = frame.offload().expect("it is true").expect("there is one");
        assert_eq!((header.gso, header.segment_size), (Gso::TcpV4, 1460));
        assert_eq!(header.checksum, Checksum::Partial { start: 34, offset: 16 });
        assert_eq!(count(&interface, "too big"), 1);
        // It goes back whole, with the checksum over all of it.
        frame.set_offload(&header).expect("there is headroom");
        ring.submit_write(frame, 2).expect("it is submitted");
        assert_eq!(outcome(&mut ring), Ok(9054));
        let mut answer = vec![0; 70_000];
        let len = peer.recv(&mut answer).expect("in time");
        assert_eq!(len, 9054);
        let pseudo = [&answer[26..34], &[0, 6, (9020_u16 >> 8) as u8, 9020_u16 as u8]].concat();
        let words = pseudo.chunks(2).chain(answer[34..len].chunks(2));
        let sum = words.map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "the checksum is not whole");
        drop(ring);
        interface.stop(LONG).expect("it stops");
        let (ours, _peer) = UnixDatagram::pair().expect("a pair of sockets");
        let (stream, _other) = UnixStream::pair().expect("a pair of sockets");
        for (wrong, offloads) in [
            (socket().from_fd(ours.into()), Offloads::ALL),
            (Socket::stream().implied_offload(true).from_fd(stream.into()), offloads),
            (socket().virtio_header(true).listen("/nonexistent/wire"), offloads),
        ] {
            let refused = Interface::builder().offloads(offloads).device(wrong).start();
            let refused = refused.expect_err("it is refused").to_string();
            assert!(refused.contains("offload that nothing names"), "{refused}");
        }
    });
}

/// Goal: packets of 64 KiB go through, by offload on a wire with headers, and by the MTU on one without.
#[test]
fn large_packets_go_through() {
    guarded(|| {
        for &wire in Wire::ALL {
            stage(format!("{wire:?}"));
            let [one, other] = wire.pair().map(|socket| {
                let builder = Interface::builder();
                let builder = match wire {
                    wire if Wire::WITH_HEADERS.contains(&wire) => builder.offloads(Offloads::ALL),
                    _ => builder.mtu(65_535),
                };
                builder.device(socket).start().expect("a wire")
            });
            let mut from = one.ring(Direction::Both).retry(PATIENT).build().expect("a ring");
            let mut to = both(&other);
            let large = packet(3, 65_549);
            for _ in 0..8 {
                post(&mut to, 1);
                let mut frame = from.alloc().expect("a frame");
                frame.copy_from(&large).expect("it fits");
                from.submit_write(frame, 2).expect("a credit");
            }
            for _ in 0..8 {
                assert!(receive(&mut to) == large, "{wire:?}");
            }
        }
    });
}

/// Goal: one ring may read and others write, on threads of their own. When the peer has gone, the next one
/// is there for all of them.
#[test]
fn a_wire_may_have_a_ring_for_each_direction() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let interface = start(Socket::stream().listen(&path));
        let build = |direction| interface.ring(direction).build().expect("a ring");
        let mut from = build(Direction::Read);
        let mut to = [build(Direction::Write), build(Direction::Write)];
        post(&mut from, 0);
        for number in 0..3 {
            stage(format!("peer {number}"));
            let mut peer = UnixStream::connect(&path).expect("it listens");
            peer.set_read_timeout(Some(LONG)).expect("a time limit");
            write_framed(&mut peer, &packet(number, 60));
            assert_eq!(receive(&mut from), packet(number, 60));
            post(&mut from, 0);
            for ring in &mut to {
                send(ring, number);
                assert_eq!(outcome(ring), Ok(60));
                assert_eq!(read_framed(&mut peer), Some(packet(number, 60)));
            }
        }
    });
}

/// Goal: a restart of the interface ends the connection of a wire that listens, and the next one is served
/// by the same ring.
#[test]
fn a_restart_waits_for_the_next_peer() {
    guarded(|| {
        let folder = Folder::new();
        let path = folder.path("wire");
        let interface = start(Socket::stream().listen(&path));
        let mut ring = both(&interface);
        for number in 1..3 {
            post(&mut ring, number);
            let mut peer = UnixStream::connect(&path).expect("it listens");
            write_framed(&mut peer, &packet(number, 60));
            assert_eq!(receive(&mut ring), packet(number, 60));
            interface.restart(LONG).expect("it starts again");
            peer.set_read_timeout(Some(LONG)).expect("a time limit");
            assert_eq!(read_framed(&mut peer), None, "the peer is told");
        }
        assert!(reap(&mut ring).is_empty());
    });
}
