//! A hostile surrounding: no descriptor left, panics that panic again, names that cannot be, and a
//! system that changes its mind.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use vmring::device::Progress;
use vmring::{CloseReason, ConfigError, Direction, EntryError, Error, IdlePolicy, Poller};

use super::{assert_works, in_child};
use crate::support::{
    LONG, Script, ScriptQueue, Way, every_way, filled, guarded, guarded_for, loopback, post,
    reap_n, send, stage,
};

/// Uses up every descriptor that the process may have.
fn use_up_descriptors() {
    // SAFETY: all zeroes is a valid rlimit.
    let mut limit: libc::rlimit = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live rlimit, exclusively borrowed.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) }, 0);
    limit.rlim_cur = limit.rlim_cur.min(256);
    // SAFETY: the pointer is to a live rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    // SAFETY: `dup` takes no pointers. Nobody closes these descriptors.
    while unsafe { libc::dup(1) } >= 0 {}
}

/// Goal: a ring over a device with a descriptor receives packets although the process has no
/// descriptor left when its driver goes to sleep. Method: a process of its own uses all of them
/// up.
#[test]
fn a_devices_descriptor_is_looked_at_when_no_other_is_left() {
    guarded_for(LONG * 8, || {
        in_child(
            concat!(module_path!(), "::a_devices_descriptor_is_looked_at_when_no_other_is_left"),
            || {
                let mut rings = Vec::new();
                let pollers = Way::ALL.map(|_| Poller::builder().idle(IdlePolicy::PARK));
                let pollers = pollers.map(|poller| poller.start().unwrap());
                let mut interfaces = Vec::new();
                for _ in Way::ALL {
                    let (ours, theirs) = UnixStream::pair().unwrap();
                    theirs.set_nonblocking(true).unwrap();
                    let watched = OwnedFd::from(theirs.try_clone().unwrap());
                    let ends = Mutex::new(Some((theirs, watched)));
                    let device = Script::new(move |_, _| {
                        let (mut theirs, watched) = ends.lock().unwrap().take().unwrap();
                        ScriptQueue::new(move |cx| {
                            while cx.reads() > 0 && theirs.read(&mut [0]).is_ok_and(|n| n == 1) {
                                let slot = cx.take_read().unwrap();
                                cx.complete_read(slot, 60);
                            }
                            Ok(Progress::Idle)
                        })
                        .descriptor(watched, || ())
                    });
                    interfaces.push((device.start(), ours));
                }
                use_up_descriptors();
                for (((interface, ours), poller), way) in
                    interfaces.iter().zip(&pollers).zip(Way::ALL)
                {
                    let builder = interface.ring(Direction::Read).depth(8);
                    let ring = builder.drive(way.drive(poller)).build().unwrap();
                    rings.push((way, ring, ours));
                }
                for (way, mut ring, mut ours) in rings {
                    (0..4).for_each(|number| post(&mut ring, number));
                    for round in 0..4 {
                        stage(format!("{way:?}: packet {round}"));
                        // Time for the ring's driver to go to sleep.
                        ring.wait(1, Some(Duration::from_millis(20)));
                        ours.write_all(&[1]).unwrap();
                        assert_eq!(ring.wait(1, Some(LONG)), 1, "{way:?}: packet {round}");
                        assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(60));
                    }
                }
            },
        );
    });
}

/// A panic's payload that panics when it is dropped, so many times.
struct Bomb(u32);

impl Drop for Bomb {
    fn drop(&mut self) {
        if self.0 > 0 && !std::thread::panicking() {
            std::panic::panic_any(Bomb(self.0 - 1));
        }
    }
}

fn explode<T>() -> T {
    std::panic::panic_any(Bomb(3))
}

/// Goal: a device that panics ends its own ring and no other, whatever its panic carries. Method:
/// the payload's drop panics with another such payload, several times. In a process of its own,
/// since the standard library aborts when such a panic leaves a thread.
#[test]
fn a_panic_that_panics_again_ends_its_own_ring_only() {
    guarded_for(LONG * 8, || {
        in_child(
            concat!(module_path!(), "::a_panic_that_panics_again_ends_its_own_ring_only"),
            || {
                std::panic::set_hook(Box::new(|_| ()));
                every_way(|way, poller| {
                    for bombs in [3, 2, 1, 0, 7] {
                        stage(format!("{way:?}: {bombs} bombs"));
                        let interface = Script::new(move |_, _| {
                            ScriptQueue::new(move |cx| {
                                if cx.writes() > 0 {
                                    std::panic::panic_any(Bomb(bombs));
                                }
                                Ok(Progress::Idle)
                            })
                        })
                        .start();
                        let neighbour = loopback();
                        let builder = neighbour.ring(Direction::Both).depth(8);
                        let mut other = builder.drive(way.drive(poller)).build().unwrap();
                        let builder = interface.ring(Direction::Both).depth(8);
                        let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                        post(&mut ring, 1);
                        send(&mut ring, 2);
                        for done in reap_n(&mut ring, 2) {
                            assert_eq!(done.result, Err(EntryError::DevicePanicked));
                        }
                        assert_eq!(ring.control().closed(), Some(CloseReason::DevicePanicked));
                        ring.close().unwrap();
                        stage(format!("{way:?}: the neighbour after {bombs} bombs"));
                        assert_works(&mut other);
                        other.close().unwrap();
                    }
                });
            },
        );
    });
}

/// As [`a_panic_that_panics_again_ends_its_own_ring_only`], where a device panics elsewhere than
/// in `poll`.
#[test]
fn a_panic_that_panics_again_is_caught_at_every_call() {
    guarded_for(LONG * 8, || {
        in_child(
            concat!(module_path!(), "::a_panic_that_panics_again_is_caught_at_every_call"),
            || {
                std::panic::set_hook(Box::new(|_| ()));
                every_way(|way, poller| {
                    let queue = || ScriptQueue::new(|_| Ok(Progress::Idle));
                    let devices = [
                        ("cancel", Script::new(move |_, _| queue().on_cancel(move |_| explode()))),
                        ("close", Script::new(move |_, _| queue().on_close(move |_| explode()))),
                        ("stop", Script::new(move |_, _| queue()).on_stop(explode)),
                        ("restart", Script::new(move |_, _| queue()).on_restart(explode)),
                    ];
                    for (what, device) in devices {
                        stage(format!("{way:?}: a bomb in {what}"));
                        let interface = device.start();
                        let neighbour = loopback();
                        let builder = neighbour.ring(Direction::Both).depth(8);
                        let mut other = builder.drive(way.drive(poller)).build().unwrap();
                        let builder = interface.ring(Direction::Read).depth(8);
                        let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                        post(&mut ring, 1);
                        let frame = filled(&ring, 1);
                        drop(frame);
                        match what {
                            "cancel" => drop(ring.cancel_and_wait(LONG)),
                            "restart" if way != Way::Inline => drop(interface.restart(LONG)),
                            _ => drop(ring.close()),
                        }
                        assert_eq!(reap_n(&mut ring, 1).len(), 1);
                        drop(ring);
                        drop(interface.stop(LONG));
                        stage(format!("{way:?}: the neighbour after a bomb in {what}"));
                        assert_works(&mut other);
                    }
                });
            },
        );
    });
}

/// Goal: a name that no thread can have is an error, not a panic.
#[test]
fn a_thread_name_with_a_nul_is_refused() {
    guarded(|| {
        let interface = loopback();
        for name in ["\0", "a\0b", "poller\0"] {
            let ring = interface.ring(Direction::Both).thread_name(name).build();
            let refused = matches!(ring, Err(Error::Config(ConfigError::Invalid(_))));
            assert!(refused, "{name:?}: {ring:?}");
            let poller = Poller::builder().name(name).start();
            let refused = matches!(poller, Err(Error::Config(ConfigError::Invalid(_))));
            assert!(refused, "{name:?}: {poller:?}");
        }
        // Nothing of those stays behind.
        let mut ring = interface.ring(Direction::Both).thread_name("").build().unwrap();
        assert_works(&mut ring);
    });
}

/// Goal: a restarted vmnet interface that tells smaller batches gets smaller batches. Method: the
/// simulator aborts at a larger one, so it has a process of its own.
#[cfg(not(target_os = "macos"))]
#[test]
fn a_restarted_vmnet_gets_no_larger_batches_than_it_tells() {
    use crate::support::packet_between;
    use vmnet_sim::World;
    use vmring::{Interface, RingOp, Vmnet};

    guarded_for(LONG * 8, || {
        in_child(
            concat!(module_path!(), "::a_restarted_vmnet_gets_no_larger_batches_than_it_tells"),
            || {
                let world = World::new();
                let id = world.interface_id();
                let batches = |n| {
                    world.script(id, |script| {
                        (script.read_max_packets, script.write_max_packets) = (Some(n), Some(n));
                    });
                };
                let start = |id| {
                    let vmnet = world.enter(Vmnet::new);
                    Interface::builder().interface_id(id).device(vmnet).start().unwrap()
                };
                batches(64);
                let (interface, peer) = (start(id), start(world.interface_id()));
                let macs = [&interface, &peer].map(|interface| interface.mac().into_array());
                let mut ring = interface.ring(Direction::Both).depth(64).build().unwrap();
                let mut from = peer.ring(Direction::Write).depth(64).build().unwrap();
                for n in [4, 64, 1] {
                    stage(format!("batches of {n}"));
                    batches(n);
                    interface.restart(LONG).unwrap();
                    ring.reap().for_each(drop);
                    for (ring, [mac, to]) in [(&mut ring, macs), (&mut from, [macs[1], macs[0]])] {
                        let writes: Vec<_> = (0..16)
                            .map(|number| {
                                let mut frame = ring.alloc().unwrap();
                                frame.copy_from(&packet_between(mac, to, number, 60)).unwrap();
                                (frame, number)
                            })
                            .collect();
                        assert_eq!(ring.submit_writes(writes).unwrap(), 16);
                        for done in reap_n(ring, 16) {
                            assert_eq!((done.op, done.result), (RingOp::Write, Ok(60)));
                        }
                    }
                    stage(format!("reads in batches of {n}"));
                    (0..16).for_each(|number| post(&mut ring, number));
                    for done in reap_n(&mut ring, 16) {
                        assert_eq!((done.op, done.result), (RingOp::Read, Ok(60)));
                    }
                    let caps = interface.capabilities();
                    assert!(caps.max_write_batch <= 64 && caps.max_read_batch <= 64);
                }
            },
        );
    });
}
