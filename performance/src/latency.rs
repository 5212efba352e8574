//! How long one entry takes there and back. While both sides spin, it is compared with a cache line
//! that goes to the other processor and back. While both sleep, it is compared with the kernel's
//! own ways to wake a thread.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use vmring::{Direction, Drive, IdlePolicy, Interface, Loopback, Poller, Ring, RingOp};

use crate::cache_line::{Line, PATIENCE, line, spin, trips};
use crate::common::{NULL_LENGTH, Null, pin, pinned, processors};
use crate::net::check;
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::rounds::{Half, take_turns};

#[derive(Clone, Copy, PartialEq)]
enum Method {
    /// Nothing between two looks at the clock: the time that they add to all other trips.
    Clock,
    Line,
    Null,
    Loopback,
    Eventfd,
    Futex,
    Wait,
    Descriptor,
}

impl Method {
    const SPINNING: [Self; 4] = [Self::Clock, Self::Line, Self::Null, Self::Loopback];
    const ASLEEP: [Self; 4] = [Self::Eventfd, Self::Futex, Self::Wait, Self::Descriptor];

    fn name(self) -> &'static str {
        match self {
            Self::Clock => "the clock alone, which is in the others",
            Self::Line => "a cache line",
            Self::Null => "vmring, null device",
            Self::Loopback => "vmring, loopback",
            Self::Eventfd => "eventfd",
            Self::Futex => "futex",
            Self::Wait => "vmring, wait",
            Self::Descriptor => "vmring, completion_fd and poll(2)",
        }
    }
}

pub(crate) fn run(plan: Plan) -> Part {
    let about = "one entry to the other processor and back, both sides spinning";
    measured(plan, "latency", about, &Method::SPINNING, 1.0, |medians| {
        // With the clock in both, the ratio would look better than it is.
        let (clock, line) = (medians[0], medians[1] - medians[0]);
        let ours = Method::SPINNING.iter().zip(medians).skip(2);
        let want = |(method, median): (&Method, &f64)| {
            let what = format!("latency: {} / a cache line, both without the clock", method.name());
            Want::at_most(what, (median - clock) / line, 2.5)
        };
        ours.map(want).collect()
    })
}

pub(crate) fn run_wakeup(plan: Plan) -> Part {
    let about = "one entry to a sleeping thread and back to a sleeping thread";
    measured(plan, "wakeup", about, &Method::ASLEEP, 1e3, |medians| {
        let want = |(ours, rival): (usize, usize)| {
            let (name, bare) = (Method::ASLEEP[ours].name(), Method::ASLEEP[rival].name());
            let ratio = medians[ours] / medians[rival];
            Want::at_most(format!("wakeup: {name}, / {bare}"), ratio, 1.3)
        };
        [(2, 1), (2, 0), (3, 0)].into_iter().map(want).collect()
    })
}

/// Lets the contenders take turns. The figures are the quantiles of each round, in units of this
/// many nanoseconds. `wants` is given the medians of one place.
fn measured(
    plan: Plan,
    name: &'static str,
    about: &'static str,
    methods: &[Method],
    unit: f64,
    wants: impl Fn(&[f64]) -> Vec<Want>,
) -> Part {
    let mut contenders = methods.to_vec();
    let halves: Vec<Half<3>> = pinned(|| {
        take_turns(plan, &mut contenders, |method| {
            let times = round(*method, plan.time)
                .map_err(|error| format!("{name}, {}: {error}", method.name()))?;
            let at = |quantile| times.value_at_quantile(quantile) as f64 / unit;
            Ok(Some([0.5, 0.99, 0.999].map(at)))
        })
    })?;
    let figures: &'static [&'static str] =
        if unit == 1.0 { &["ns", "99 %", "99.9 %"] } else { &["us", "99 %", "99.9 %"] };
    let mut table = Table::new(name, about, &["contender"], figures);
    let mut all = Vec::new();
    for half in &halves {
        half.begin(&mut table);
        let rows = methods.iter().zip(&half.values);
        let medians: Vec<f64> = rows
            .map(|(method, [median, high, highest])| {
                table.row(&[method.name()], &[median, high, highest])
            })
            .collect();
        all.extend(half.wants(wants(&medians)));
    }
    Ok((vec![table], all))
}

fn round(method: Method, time: Duration) -> Result<Histogram<u64>> {
    match method {
        Method::Clock => trips(time, || Ok(())),
        Method::Line => line(time),
        Method::Null => spinning(time, false),
        Method::Loopback => spinning(time, true),
        Method::Eventfd => eventfd(time),
        Method::Futex => futex(time),
        Method::Wait => asleep(time, false),
        Method::Descriptor => asleep(time, true),
    }
}

/// A ring whose poller is on the other processor.
fn ring(loopback: bool, idle: IdlePolicy) -> Result<(Poller, Interface, Ring)> {
    let poller = Poller::builder().idle(idle);
    let poller = if processors() > 1 { poller.cpu(1) } else { poller }.start()?;
    let builder = Interface::builder();
    let interface = match loopback {
        true => builder.device(Loopback::new(1500)).start()?,
        false => builder.device(Null).start()?,
    };
    let ring = interface.ring(Direction::Both).idle(IdlePolicy::PARK).prefault(true);
    let mut ring = ring.drive(Drive::Shared(&poller)).build()?;
    if loopback {
        // The read that receives the written packet.
        let frame = ring.alloc().ok_or("a fresh ring has free frames")?;
        ring.submit_read(frame, 0)?;
    }
    Ok((poller, interface, ring))
}

/// Writes one packet and, over the loopback, reads it again. The trip is over when everything has
/// come back.
fn spinning(time: Duration, loopback: bool) -> Result<Histogram<u64>> {
    let (_poller, _interface, mut ring) =
        ring(loopback, IdlePolicy { spins: u32::MAX / 2, yields: 0 })?;
    let mut packet = ring.alloc();
    if let Some(frame) = &mut packet {
        frame.copy_from(&[0x5a; NULL_LENGTH])?;
    }
    trips(time, || {
        ring.submit_write(packet.take().ok_or("the packet is gone")?, 1)?;
        let mut missing = if loopback { 2 } else { 1 };
        spin(|| {
            let (mut sq, mut cq) = ring.split();
            for done in cq.reap() {
                let frame = done.take_packet()?;
                if frame[..] != [0x5a; NULL_LENGTH] {
                    return Err("a packet is not what was sent".into());
                }
                missing -= 1;
                match done.op {
                    RingOp::Read => sq.submit_read(frame, 0)?,
                    _ => packet = Some(frame),
                }
            }
            Ok(missing == 0)
        })
    })
}

/// Posts one read of nothing and waits for it, by `wait` or by the descriptor.
fn asleep(time: Duration, descriptor: bool) -> Result<Histogram<u64>> {
    let (_poller, _interface, mut ring) = ring(false, IdlePolicy::PARK)?;
    let mut idle = ring.alloc();
    let fd = ring.completion_fd()?.as_raw_fd();
    trips(time, || {
        ring.submit_read(idle.take().ok_or("the frame is gone")?, 1)?;
        let end = Instant::now() + PATIENCE;
        while idle.is_none() {
            if !descriptor {
                ring.wait(1, Some(PATIENCE));
            } else if ring.arm() {
                let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
                // SAFETY: it is one pollfd, exclusively borrowed.
                check(unsafe { libc::poll(&raw mut poll, 1, PATIENCE.as_millis() as i32) })?;
            }
            idle = ring.reap().find_map(|done| done.take_packet().ok());
            if Instant::now() > end {
                return Err("nobody was woken".into());
            }
        }
        Ok(())
    })
}

/// A counter that a thread can sleep on.
fn new_eventfd() -> Result<File> {
    // SAFETY: eventfd takes no pointers.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })?;
    // SAFETY: the system has just given us this descriptor, and nothing else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn eventfd(time: Duration) -> Result<Histogram<u64>> {
    const ONE: [u8; 8] = 1_u64.to_ne_bytes();
    let (there, back) = (new_eventfd()?, new_eventfd()?);
    let (over, gone) = (AtomicBool::new(false), AtomicBool::new(false));
    let answer = || -> std::io::Result<()> {
        let mut count = [0; 8];
        loop {
            (&there).read_exact(&mut count)?;
            if over.load(Ordering::Relaxed) {
                return Ok(());
            }
            (&back).write_all(&ONE)?;
        }
    };
    thread::scope(|scope| {
        let far = scope.spawn(|| {
            pin(1);
            let answered = answer();
            // A read has no time limit, so the side that ends wakes the other.
            gone.store(true, Ordering::Release);
            (&back).write_all(&ONE).and(answered)
        });
        let mut count = [0; 8];
        let times = trips(time, || {
            (&there).write_all(&ONE)?;
            (&back).read_exact(&mut count)?;
            if count != ONE || gone.load(Ordering::Acquire) {
                return Err("the far end is gone".into());
            }
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        (&there).write_all(&ONE)?;
        far.join().map_err(|_| "the far end panicked")??;
        times
    })
}

/// Sleeps while the word is `old`, but not for ever.
fn futex_wait(word: &AtomicU32, old: u32) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    let limit = libc::timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    while word.load(Ordering::Acquire) == old {
        // SAFETY: the word and the time outlive the call; the kernel reads both.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                old,
                &raw const limit,
            )
        };
        if Instant::now() > end {
            return Err("nobody was woken".into());
        }
    }
    Ok(())
}

fn futex_wake(word: &AtomicU32, new: u32) {
    word.store(new, Ordering::Release);
    // SAFETY: the kernel uses the word's address only as a name.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            1,
        )
    };
}

fn futex(time: Duration) -> Result<Histogram<u64>> {
    let (there, back, over) = (Line(0.into()), Line(0.into()), AtomicBool::new(false));
    thread::scope(|scope| {
        let far = scope.spawn(|| -> Result<()> {
            pin(1);
            let mut number = 0_u32;
            loop {
                futex_wait(&there.0, number)?;
                if over.load(Ordering::Relaxed) {
                    return Ok(());
                }
                number = number.wrapping_add(1);
                futex_wake(&back.0, number);
            }
        });
        let mut number = 0_u32;
        let times = trips(time, || {
            let old = number;
            number = number.wrapping_add(1);
            futex_wake(&there.0, number);
            futex_wait(&back.0, old)
        });
        over.store(true, Ordering::Relaxed);
        futex_wake(&there.0, number.wrapping_add(1));
        far.join().map_err(|_| "the far end panicked")??;
        times
    })
}
