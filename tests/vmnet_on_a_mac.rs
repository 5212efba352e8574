//! The driver on Apple's own vmnet: two interfaces on the host's network, frames both ways, a
//! restart, a stop. On other systems the test runs over the simulated vmnet, so that this file is
//! known to work.
//!
//! It needs a privilege. Without it, the test prints that it was skipped, and why.

use std::io::Write;
use std::time::{Duration, Instant};

use vmring::{Direction, EntryError, Error, Interface, MacAddr6, Mode, Ring, RingOp, Vmnet};

use crate::support::{LONG, guarded, number_of, packet_between, stage};

/// Frames under way at a time, in each direction.
const WINDOW: u64 = 16;
const ROUNDS: u64 = 50;

struct End {
    interface: Interface,
    ring: Ring,
}

impl End {
    fn start(id: Option<[u8; 16]>) -> Result<Self, Error> {
        let builder = Interface::builder().mode(Mode::Host).device(Vmnet::new());
        let builder = match id {
            Some(id) => builder.interface_id(id),
            None => builder,
        };
        let interface = builder.start_timeout(LONG).start()?;
        let mut ring = interface.ring(Direction::Both).depth(128).build()?;
        for i in 0..64 {
            let frame = ring.alloc().expect("a fresh ring");
            ring.submit_read(frame, i).expect("a fresh ring");
        }
        Ok(Self { interface, ring })
    }

    fn send(&mut self, to: MacAddr6, number: u64) {
        let from = self.interface.mac().into_array();
        let mut frame = self.ring.alloc().expect("frames come home");
        frame.copy_from(&packet_between(from, to.into_array(), number, 200)).expect("it fits");
        self.ring.submit_write(frame, number).expect("there are credits");
    }

    /// Takes the frames that came and posts the reads again. Returns the numbers of the frames from
    /// `peer`, because a real network has other senders too.
    fn receive(&mut self, peer: MacAddr6) -> Vec<u64> {
        let me = self.interface.mac().into_array();
        self.ring.wait(1, Some(Duration::from_millis(10)));
        let (mut sq, mut cq) = self.ring.split();
        let mut numbers = Vec::new();
        for done in cq.reap() {
            let frame = done.take_frame().expect("a read or a write");
            match (done.op, done.result) {
                (_, Err(EntryError::Cancelled)) => {} // by the restart
                (_, Err(error)) => panic!("{:?} failed: {error}", done.op),
                (RingOp::Read, Ok(len)) => {
                    let ours = len == 200 && frame[12..14] == [0x88, 0xb5];
                    if ours && frame[6..12] == peer.into_array() {
                        let number = number_of(&frame);
                        let whole = packet_between(peer.into_array(), me, number, 200);
                        assert!(frame[..] == whole[..], "frame {number} has changed on its way");
                        numbers.push(number);
                    }
                }
                _ => {}
            }
            if done.op == RingOp::Read {
                sq.submit_read(frame, done.user_data).expect("its credit came back");
            }
        }
        numbers
    }
}

/// Sends until a frame arrives in each direction. A network that has just started may not forward
/// yet.
fn meet(ends: &mut [End; 2], from: u64) {
    let macs = ends.each_ref().map(|end| end.interface.mac());
    let start = Instant::now();
    let mut met = [false; 2];
    for number in from.. {
        for i in 0..2 {
            ends[i].send(macs[1 - i], number);
        }
        let until = Instant::now() + Duration::from_millis(100);
        while Instant::now() < until {
            for i in 0..2 {
                met[i] |= ends[i].receive(macs[1 - i]).iter().any(|number| *number >= from);
            }
            if met == [true; 2] {
                return;
            }
        }
        assert!(start.elapsed() < LONG, "nothing comes through: {met:?}");
    }
}

/// Checks that every frame arrives in both directions, once and in order. `first` is above every
/// number used so far.
fn exchange(ends: &mut [End; 2], first: u64) {
    let macs = ends.each_ref().map(|end| end.interface.mac());
    for round in 0..ROUNDS {
        let from = first + round * WINDOW;
        for number in from..from + WINDOW {
            for i in 0..2 {
                ends[i].send(macs[1 - i], number);
            }
        }
        let wanted: Vec<u64> = (from..from + WINDOW).collect();
        let start = Instant::now();
        let mut came = [Vec::new(), Vec::new()];
        while came.iter().any(|numbers| numbers.len() < wanted.len()) {
            for i in 0..2 {
                // Late frames of `meet` have smaller numbers.
                let numbers = ends[i].receive(macs[1 - i]);
                came[i].extend(numbers.into_iter().filter(|number| *number >= first));
            }
            assert!(start.elapsed() < LONG, "of {wanted:?} came {came:?}");
        }
        assert_eq!(came, [wanted.clone(), wanted]);
    }
}

fn two_guests(ids: [Option<[u8; 16]>; 2]) {
    stage("the start");
    let mut ends = match ids.map(End::start) {
        [Ok(a), Ok(b)] => [a, b],
        [Err(error @ Error::PermissionDenied { .. }), _]
        | [_, Err(error @ Error::PermissionDenied { .. })] => {
            // Write to stderr directly, because the test harness captures `eprintln!`.
            let _ = writeln!(std::io::stderr(), "skipped: {error}");
            return;
        }
        [Err(error), _] | [_, Err(error)] => panic!("it does not start: {error}"),
    };
    let macs = ends.each_ref().map(|end| end.interface.mac());
    assert_ne!(macs[0], macs[1]);
    assert!(ends[0].interface.max_packet_size() >= ends[0].interface.mtu());
    stage("the first frames");
    meet(&mut ends, 0);
    exchange(&mut ends, 1_000_000);

    stage("the restart");
    let id = ends[0].interface.interface_id();
    ends[0].interface.restart(LONG).expect("it restarts");
    assert_eq!((ends[0].interface.mac(), ends[0].interface.interface_id()), (macs[0], id));
    stage("the frames after the restart");
    meet(&mut ends, 2_000_000);
    exchange(&mut ends, 3_000_000);

    stage("the stop");
    for mut end in ends {
        end.ring.close().expect("it closes");
        end.interface.stop(LONG).expect("it stops");
    }
}

#[cfg(target_os = "macos")]
#[test]
fn vmnet_carries_frames_between_two_guests_and_survives_a_restart() {
    guarded(|| two_guests([None, None]));
}

#[cfg(not(target_os = "macos"))]
#[test]
fn the_simulated_vmnet_does_too() {
    guarded(|| {
        let world = vmnet_sim::World::new();
        two_guests([Some(world.interface_id()), Some(world.interface_id())]);
        assert_eq!(world.unreleased(LONG), [""; 0]);
    });
}

#[cfg(not(target_os = "macos"))]
#[test]
fn without_the_privilege_it_is_skipped() {
    guarded(|| {
        let world = vmnet_sim::World::new();
        let id = world.interface_id();
        world.script(id, |script| script.start.status = 1010);
        // The driver asks whether it is root when it is made.
        world.set_host(|host| host.root = false);
        world.enter(|| two_guests([Some(id), Some(world.interface_id())]));
    });
}
