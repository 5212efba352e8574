//! The three ways to drive a ring: a thread of its own, a thread shared with other rings, or its
//! owner.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::Duration;

use vmring::device::{
    Capabilities, Device, PollContext, Progress, Queue, QueueConfig, Wake as DeviceWake,
};
use vmring::{
    Direction, Drive, Driver, EntryError, Interface, InterfaceConfig, InterfaceInfo, Poller,
    RetryPolicy, Ring, RingOp, Status,
};
#[cfg(target_os = "linux")]
use vmring::{Error, IdlePolicy};

use crate::support::{
    LONG, Script, ScriptQueue, Way, eventually, every_way, guarded, inline, loopback, number_of,
    post, reap, reap_n, scaled, send, stage, take_writes,
};

/// Sends and receives packets `numbers` on a ring over a loopback.
fn round_trips(ring: &mut Ring, numbers: std::ops::Range<u64>) {
    for number in numbers {
        post(ring, 1_000_000);
        send(ring, number);
        for done in reap_n(ring, 2) {
            assert_eq!(done.result, Ok(60));
            if done.op == RingOp::Read {
                assert_eq!(number_of(&done.frame.unwrap()), number);
            }
        }
    }
}

/// The names of this process's threads.
#[cfg(target_os = "linux")]
fn thread_names() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .collect()
}

/// Goal: a ring works in each of the three ways, and the device is called on the thread that was
/// chosen.
#[test]
fn three_ways_to_drive() {
    guarded(|| {
        let poller = Poller::builder().name("shared-one").start().unwrap();
        for way in Way::ALL {
            let callers: Arc<Mutex<Vec<String>>> = Arc::default();
            let calling = callers.clone();
            let interface = Script::new(move |_, _| {
                let calling = calling.clone();
                ScriptQueue::new(move |cx| {
                    let name = thread::current().name().unwrap_or_default().to_owned();
                    calling.lock().unwrap().push(name);
                    take_writes(cx);
                    Ok(Progress::Idle)
                })
            })
            .start();
            let builder = interface.ring(Direction::Write).drive(way.drive(&poller));
            let mut ring = match way {
                Way::Thread => builder.thread_name("its-own").build().unwrap(),
                Way::Shared | Way::Inline => builder.build().unwrap(),
            };
            for number in 0..20 {
                send(&mut ring, number);
                assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Write, number, Ok(60)));
            }
            let expected = match way {
                Way::Thread => "its-own".to_owned(),
                Way::Shared => "shared-one".to_owned(),
                Way::Inline => thread::current().name().unwrap().to_owned(),
            };
            let callers = callers.lock().unwrap();
            assert!(callers.iter().all(|name| *name == expected), "{way:?}: {callers:?}");
        }
    });
}

#[test]
fn a_poller_drives_many_rings_and_all_make_progress() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        let count = scaled(200).max(20);
        let interfaces: Vec<Interface> = (0..64).map(|_| loopback()).collect();
        let mut rings: Vec<Ring> = interfaces
            .iter()
            .map(|interface| {
                let builder = interface.ring(Direction::Both).depth(8);
                builder.drive(Drive::Shared(&poller)).build().unwrap()
            })
            .collect();
        // All rings have work at the same time, and each must make progress.
        let mut received = vec![0; rings.len()];
        let mut sent = vec![0; rings.len()];
        while received.iter().any(|n| *n < count) {
            for (i, ring) in rings.iter_mut().enumerate() {
                let (mut sq, _) = ring.split();
                let (reads, writes) = (sq.read_credits(), sq.write_credits());
                (0..reads).for_each(|_| post(ring, 0));
                for _ in 0..u64::from(writes).min(count - sent[i]) {
                    send(ring, sent[i]);
                    sent[i] += 1;
                }
                for done in reap(ring) {
                    assert_eq!(done.result, Ok(60));
                    if done.op == RingOp::Read {
                        assert_eq!(number_of(&done.frame.unwrap()), received[i]);
                        received[i] += 1;
                    }
                }
            }
            stage(format!("received {received:?} of {count}"));
            rings[0].wait(1, Some(Duration::from_micros(100)));
        }
        // Closing one ring and adding another does not disturb the others.
        drop(rings.swap_remove(10));
        rings[20].cancel_and_wait(LONG).unwrap();
        rings[20].reap().for_each(drop);
        round_trips(&mut rings[20], 0..10);
        let extra = loopback();
        let mut ring = extra.ring(Direction::Both).drive(Drive::Shared(&poller)).build().unwrap();
        round_trips(&mut ring, 0..10);
    });
}

#[test]
fn a_busy_ring_does_not_starve_its_neighbour() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        let (busy, calm) = (loopback(), loopback());
        let build = |interface: &Interface| {
            interface.ring(Direction::Both).drive(Drive::Shared(&poller)).build().unwrap()
        };
        let (mut busy, mut calm) = (build(&busy), build(&calm));
        let stop = Arc::new(AtomicBool::new(false));
        let busily = {
            let stop = stop.clone();
            thread::spawn(move || {
                (0..64).for_each(|number| post(&mut busy, number));
                (0..32).for_each(|number| send(&mut busy, number));
                while !stop.load(Ordering::Relaxed) {
                    let (mut sq, mut cq) = busy.split();
                    for done in cq.reap() {
                        let frame = done.take_packet().unwrap();
                        match done.op {
                            RingOp::Read => sq.submit_read(frame, 0).unwrap(),
                            _ => sq.submit_write(frame, 0).unwrap(),
                        }
                    }
                }
            })
        };
        round_trips(&mut calm, 0..scaled(200));
        stop.store(true, Ordering::Relaxed);
        busily.join().unwrap();
    });
}

/// A ring whose poller never sleeps, because its device always reports more work.
fn restless(poller: &Poller) -> Ring {
    let interface = Script::new(|_, _| {
        ScriptQueue::new(|cx| {
            take_writes(cx);
            Ok(Progress::More)
        })
    })
    .start();
    let mut ring = interface.ring(Direction::Both).drive(Drive::Shared(poller)).build().unwrap();
    post(&mut ring, 1);
    ring
}

/// Goal: the timers of a ring that sleeps (here its retries) fire even while another ring on its
/// poller is never idle.
#[test]
fn a_busy_ring_does_not_hold_up_its_neighbours_times() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        let drive = Drive::Shared(&poller);
        let _busy = restless(&poller);
        // This device never takes a write.
        let full = Script::new(|_, _| ScriptQueue::new(|_| Ok(Progress::Idle))).start();
        let retry = RetryPolicy { attempts: 4, delay: Duration::from_millis(2) };
        let mut calm = full.ring(Direction::Write).drive(drive).retry(retry).build().unwrap();
        send(&mut calm, 1);
        let done = reap_n(&mut calm, 1);
        assert_eq!(done[0].result, Err(EntryError::Device(Status::BufferExhausted)));
    });
}

/// A device whose packets are the bytes that can be read from a socket. It rings no doorbell, and counts
/// how often it is looked at.
struct Socket(Arc<UnixStream>, Arc<AtomicU64>, InterfaceInfo);

impl Device for Socket {
    fn name(&self) -> &str {
        "socket"
    }

    fn info(&self) -> InterfaceInfo {
        self.2.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(1500, 1514)
    }

    fn queue(&self, _: QueueConfig, _: DeviceWake) -> Result<Box<dyn Queue>, vmring::Error> {
        Ok(Box::new(SocketQueue(self.0.clone(), self.1.clone())))
    }
}

struct SocketQueue(Arc<UnixStream>, Arc<AtomicU64>);

impl Queue for SocketQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        self.1.fetch_add(1, Ordering::Relaxed);
        while cx.reads() > 0 && (&*self.0).read(&mut [0]).is_ok_and(|n| n == 1) {
            let slot = cx.take_read().expect("one is posted");
            cx.complete_read(slot, 60);
        }
        Ok(Progress::Idle)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

struct Start(UnixStream, Arc<AtomicU64>);

impl Driver for Start {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, vmring::Error> {
        let mac = vmring::MacAddr6::new(2, 0, 0, 0, 0, 8);
        let info = InterfaceInfo::new(config, mac, 1500, 1514);
        Ok(Arc::new(Socket(Arc::new(self.0), self.1, info)))
    }
}

/// Goal: while no read is posted, the device's descriptor stays readable, and the poller still
/// sleeps. A read that is posted later gets the packet.
#[test]
fn a_packet_that_nobody_can_take_does_not_keep_the_poller_awake() {
    guarded(|| {
        let (mut far, near) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let interface = Interface::builder().device(Start(near, Arc::default())).start().unwrap();
        let builder = interface.ring(Direction::Read).idle(vmring::IdlePolicy::PARK);
        let mut ring = builder.drive(Drive::Thread).build().unwrap();
        far.write_all(&[1]).unwrap();
        thread::sleep(Duration::from_millis(20));
        let before = ring.stats().parks;
        thread::sleep(Duration::from_millis(50));
        let woken = ring.stats().parks - before;
        assert!(woken < 5, "woken {woken} times for nothing");
        post(&mut ring, 7);
        assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Read, 7, Ok(60)));
    });
}

/// Goal: a ring that takes the place of one that is gone sleeps on the descriptor that this one slept on.
/// The device keeps it open, so the system still knows it.
#[test]
fn the_next_ring_of_a_device_sleeps_on_its_descriptor() {
    guarded(|| {
        let poller = Poller::builder().idle(vmring::IdlePolicy::PARK).start().unwrap();
        let (mut far, near) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let looks = Arc::<AtomicU64>::default();
        let interface = Interface::builder().device(Start(near, looks.clone())).start().unwrap();
        for number in 0..3 {
            stage(format!("ring {number}"));
            let builder = interface.ring(Direction::Read).drive(Drive::Shared(&poller));
            let mut ring = builder.build().unwrap();
            post(&mut ring, number);
            thread::sleep(Duration::from_millis(20)); // long enough that the ring sleeps
            let before = looks.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(50));
            let woken = looks.load(Ordering::Relaxed) - before;
            assert!(woken < 5, "woken {woken} times for nothing");
            far.write_all(&[1]).unwrap();
            assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Read, number, Ok(60)));
            post(&mut ring, number);
            thread::sleep(Duration::from_millis(20));
        }
    });
}

/// Like `a_busy_ring_does_not_hold_up_its_neighbours_times`, for a ring that sleeps on its device's
/// descriptor.
#[test]
fn a_busy_ring_does_not_hold_up_its_neighbours_descriptors() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        let drive = Drive::Shared(&poller);
        let _busy = restless(&poller);
        let (mut far, near) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let calm = Interface::builder().device(Start(near, Arc::default())).start().unwrap();
        let mut calm = calm.ring(Direction::Read).drive(drive).build().unwrap();
        for number in 0..20 {
            post(&mut calm, number);
            thread::sleep(Duration::from_millis(1)); // long enough that the ring sleeps
            far.write_all(&[1]).unwrap();
            assert_eq!(reap_n(&mut calm, 1)[0].brief(), (RingOp::Read, number, Ok(60)));
        }
    });
}

/// The limit of open files, which this raises to `wanted` if the system lets it.
fn open_files(wanted: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls have a pointer to a live value.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = limit.rlim_cur.max(wanted).min(limit.rlim_max);
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
    }
    limit.rlim_cur
}

/// Goal: what a poller looks at for a packet does not depend on the number of descriptors that are idle.
#[test]
fn a_wake_up_looks_at_no_descriptor_that_is_idle() {
    const PACKETS: u64 = 100;
    guarded(|| {
        // Each has both ends of its socket, and what its ring needs.
        let limit = open_files(10_000).saturating_sub(500) / 8;
        for idle in [10, scaled(1000).min(limit)] {
            stage(format!("{idle} idle descriptors"));
            let poller = Poller::builder().idle(vmring::IdlePolicy::PARK).start().unwrap();
            let looks = Arc::new(AtomicU64::new(0));
            let ring = |looks: &Arc<AtomicU64>| {
                let (far, near) = UnixStream::pair().unwrap();
                near.set_nonblocking(true).unwrap();
                let interface = Interface::builder().device(Start(near, looks.clone()));
                let interface = interface.start().unwrap();
                let ring = interface.ring(Direction::Read).depth(2);
                let mut ring = ring.drive(Drive::Shared(&poller)).build().unwrap();
                post(&mut ring, 0);
                (far, ring)
            };
            let others: Vec<_> = (0..idle).map(|_| ring(&looks)).collect();
            let own = Arc::default();
            let (mut far, mut busy) = ring(&own);
            let seen = || looks.load(Ordering::Relaxed);
            let mut number = 0;
            let mut exchange = |count: u64| {
                for _ in 0..count {
                    far.write_all(&[1]).unwrap();
                    assert_eq!(reap_n(&mut busy, 1)[0].brief(), (RingOp::Read, number, Ok(60)));
                    number += 1;
                    post(&mut busy, number);
                }
            };
            // They sleep when the poller has worked for the busy one for a while and looked at none.
            let mut before = 0;
            eventually("all others sleep", || {
                before = seen();
                exchange(20);
                before >= idle && before == seen()
            });
            exchange(PACKETS);
            assert!(own.load(Ordering::Relaxed) >= PACKETS);
            let looked = seen() - before;
            assert_eq!(looked, 0, "{looked} looks at {idle} idle descriptors");
            // Each of them wakes the poller all the same.
            let (mut far, mut last) = others.into_iter().next_back().unwrap();
            far.write_all(&[1]).unwrap();
            assert_eq!(reap_n(&mut last, 1)[0].brief(), (RingOp::Read, 0, Ok(60)));
        }
    });
}

#[test]
fn a_poller_outlives_its_handle_until_its_rings_are_closed() {
    guarded(|| {
        let name = "outliving";
        let poller = Poller::builder().name(name).start().unwrap();
        let interfaces = [loopback(), loopback()];
        let mut rings: Vec<Ring> = interfaces
            .iter()
            .map(|i| i.ring(Direction::Both).drive(Drive::Shared(&poller)).build().unwrap())
            .collect();
        drop(poller);
        round_trips(&mut rings[0], 0..20);
        rings[0].close().unwrap();
        round_trips(&mut rings[1], 0..20);
        #[cfg(target_os = "linux")]
        {
            assert!(thread_names().iter().any(|thread| thread == name));
            rings.clear();
            eventually("the poller's thread ends", || {
                thread_names().iter().all(|thread| thread != name)
            });
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_rings_own_thread_ends_with_it() {
    guarded(|| {
        let interface = loopback();
        let mut ring =
            interface.ring(Direction::Both).thread_name("ends-with-ring").build().unwrap();
        let there = || thread_names().iter().any(|thread| thread == "ends-with-ring");
        round_trips(&mut ring, 0..1);
        assert!(there());
        ring.close().unwrap();
        eventually("its thread ends", || !there());
        // An unused poller ends when its handle is dropped.
        let poller = Poller::builder().name("never-used").start().unwrap();
        drop(poller);
        eventually("the unused poller ends", || {
            thread_names().iter().all(|thread| thread != "never-used")
        });
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_poller_stays_on_its_processor_or_says_why_not() {
    guarded(|| {
        // The first processor that this process may use.
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let first: usize =
            allowed.unwrap().trim().split(['-', ',']).next().unwrap().parse().unwrap();
        let places: Arc<Mutex<Vec<i32>>> = Arc::default();
        let seen = places.clone();
        let interface = Script::new(move |_, _| {
            let seen = seen.clone();
            ScriptQueue::new(move |cx| {
                // SAFETY: the call takes no arguments and returns a number.
                seen.lock().unwrap().push(unsafe { libc::sched_getcpu() });
                take_writes(cx);
                Ok(Progress::Idle)
            })
        })
        .start();
        let poller = Poller::builder().cpu(first).idle(IdlePolicy::PARK).start().unwrap();
        let ring = |drive| interface.ring(Direction::Write).drive(drive);
        for builder in [ring(Drive::Shared(&poller)), ring(Drive::Thread).cpu(first)] {
            let mut ring = builder.build().unwrap();
            for number in 0..20 {
                send(&mut ring, number);
                reap_n(&mut ring, 1);
            }
        }
        assert!(places.lock().unwrap().iter().all(|cpu| *cpu == first as i32));
        for cpu in [1 << 20, libc::CPU_SETSIZE as usize - 1] {
            let start = Poller::builder().cpu(cpu).start();
            assert!(matches!(start, Err(Error::Config(_))), "{start:?}");
            let build = interface.ring(Direction::Write).cpu(cpu).build();
            assert!(matches!(build, Err(Error::Config(_))), "{build:?}");
        }
    });
}

/// A waker that drops a ring on the thread that wakes it.
struct Dropper {
    ring: Mutex<Option<Ring>>,
    dropped_on: Mutex<Option<thread::ThreadId>>,
    wakes: AtomicU64,
}

impl Wake for Dropper {
    fn wake(self: Arc<Self>) {
        self.wakes.fetch_add(1, Ordering::SeqCst);
        // Take the ring out of the lock first, because dropping it may wake this waker again.
        let ring = self.ring.lock().unwrap().take();
        if let Some(ring) = ring {
            drop(ring);
            *self.dropped_on.lock().unwrap() = Some(thread::current().id());
        }
    }
}

#[test]
fn dropping_a_ring_on_its_own_poller_thread_does_not_deadlock() {
    guarded(|| {
        let poller = Poller::start().unwrap();
        for drive in [Drive::Thread, Drive::Shared(&poller)] {
            let interface = loopback();
            let mut ring = interface.ring(Direction::Both).drive(drive).build().unwrap();
            let pool = ring.pools()[0].clone();
            let mut writer = inline(&interface, Direction::Write).build().unwrap();
            for number in 0..8 {
                post(&mut ring, number);
            }
            let dropper = Arc::new(Dropper {
                ring: Mutex::new(None),
                dropped_on: Mutex::new(None),
                wakes: AtomicU64::new(0),
            });
            let waker = Waker::from(dropper.clone());
            assert!(ring.poll_ready(&mut Context::from_waker(&waker), 1).is_pending());
            *dropper.ring.lock().unwrap() = Some(ring);
            send(&mut writer, 1);
            writer.reap().for_each(drop);
            eventually("the waker drops the ring", || dropper.dropped_on.lock().unwrap().is_some());
            let dropped_on = dropper.dropped_on.lock().unwrap().unwrap();
            assert_ne!(dropped_on, thread::current().id(), "it was woken by the poller");
            eventually("what was in flight comes home", || pool.slots_out() == 0);
            drop(writer);
            // The poller still runs, and the device's reading claim is free again.
            let mut ring = None;
            eventually("the place of the dropped ring is free", || {
                ring = interface.ring(Direction::Both).drive(drive).build().ok();
                ring.is_some()
            });
            let mut ring = ring.unwrap();
            // The packet that caused the wake-up was lost with the ring. Others arrive.
            round_trips(&mut ring, 0..5);
        }
    });
}

/// A panic in a waker ends neither the poller nor the ring.
#[test]
fn a_waker_that_panics_does_not_end_the_poller() {
    struct Panicking;
    impl Wake for Panicking {
        fn wake(self: Arc<Self>) {
            std::panic::resume_unwind(Box::new("a waker's own bug"));
        }
    }
    guarded(|| {
        every_way(|way, poller| {
            if way == Way::Inline {
                return;
            }
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            post(&mut ring, 1);
            let waker = Waker::from(Arc::new(Panicking));
            assert!(ring.poll_ready(&mut Context::from_waker(&waker), 1).is_pending());
            send(&mut ring, 2);
            assert_eq!(reap_n(&mut ring, 2).len(), 2);
            round_trips(&mut ring, 0..5);
        });
    });
}
