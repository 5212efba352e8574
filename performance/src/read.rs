//! Packets per second out of a TAP.

mod rivals;

use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::clock::{Elapsed, Moment, Processor};
use crate::contender::{Reader, Taken};
use crate::net::{PacketSocket, QUEUE, Tap, check, counters, in_new_namespace, udp_frame};
use crate::ours::Ours;
use crate::paired::{self, Contender, time_each};
use crate::plan::{Part, Plan};
use crate::report::Sample;
use crate::result::Result;
use crate::slots::BATCH;
use rivals::{Batch, Multishot, Plain, TunRs};

/// The contenders.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Plain,
    UringMultishot,
    UringBatch,
    UringFixed,
    UringAdaptive,
    TunRs,
    Ours(Ours),
}

impl Method {
    pub(crate) const ALL: &[Self] = &[
        Self::Plain,
        Self::UringMultishot,
        Self::UringBatch,
        Self::UringFixed,
        Self::UringAdaptive,
        Self::TunRs,
        Self::Ours(Ours::URING_INLINE),
        Self::Ours(Ours::URING_THREAD),
        Self::Ours(Ours::PLAIN_INLINE),
        Self::Ours(Ours::PLAIN_THREAD),
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "read(2)",
            Self::UringMultishot => "io_uring READ_MULTISHOT",
            Self::UringBatch => "io_uring READ, 64 at once",
            Self::UringFixed => "io_uring READ_FIXED, 64 at once",
            Self::UringAdaptive => "io_uring READ, 4 to 64 at once",
            Self::TunRs => "tun-rs recv",
            Self::Ours(ours) => ours.name(),
        }
    }

    fn open(self, tap: &Tap) -> Result<Box<dyn Reader>> {
        Ok(match self {
            Self::Plain => Box::new(Plain::new(tap.as_raw_fd())),
            Self::UringMultishot => Box::new(Multishot::new(tap.as_raw_fd())?),
            Self::UringBatch => Box::new(Batch::new(tap.as_raw_fd(), BATCH, false)?),
            Self::UringFixed => Box::new(Batch::new(tap.as_raw_fd(), BATCH, true)?),
            Self::UringAdaptive => Box::new(Batch::new(tap.as_raw_fd(), 4, false)?),
            Self::TunRs => Box::new(TunRs::new(tap)?),
            Self::Ours(ours) => ours.reader(tap)?,
        })
    }
}

/// Longer than any reader has to wait for a packet that is in the queue.
const PATIENCE: Duration = Duration::from_secs(1);

/// Takes `count` packets of `length` bytes. The error says what came instead.
fn drain(reader: &mut dyn Reader, count: usize, length: usize) -> Result<()> {
    let mut all = Taken::default();
    while all.packets < count as u64 {
        let taken = reader.read(PATIENCE)?;
        if taken.packets == 0 {
            return Err(format!("only {all:?} of {count} packets came").into());
        }
        all.packets += taken.packets;
        all.bytes += taken.bytes;
    }
    let wanted = Taken { packets: count as u64, bytes: (count * length) as u64 };
    if all == wanted { Ok(()) } else { Err(format!("{wanted:?} sent, {all:?} came").into()) }
}

/// One measurement of one contender: fills the queue and times the draining, repeatedly until the
/// draining has taken `time`.
pub(crate) fn measure_drain(method: Method, length: usize, time: Duration) -> Result<Sample> {
    in_new_namespace(|| {
        let tap = Tap::open_up("tap0", QUEUE)?;
        let socket = PacketSocket::on(tap.name())?;
        let frame = udp_frame(length);
        let mut reader = method.open(&tap)?;
        // Checks before anything is timed that the right number of packets of the right length come
        // out, and only when asked.
        let before = counters("tap0")?;
        reader.rest()?;
        socket.send(&frame, QUEUE)?;
        let filled = counters("tap0")?;
        drain(&mut *reader, QUEUE, length)?;
        let after = counters("tap0")?;
        let packets = (filled.sent - before.sent, after.sent - before.sent);
        if packets != (0, QUEUE as u64) || after.dropped != before.dropped {
            let name = method.name();
            return Err(format!("{name}: {packets:?} packets left the queue: {after:?}").into());
        }
        let (mut packets, mut elapsed) = (0, Elapsed::default());
        while elapsed.wall < time {
            reader.rest()?;
            socket.send(&frame, QUEUE)?;
            let start = Moment::now();
            drain(&mut *reader, QUEUE, length)?;
            elapsed += start.elapsed();
            packets += QUEUE as u64;
        }
        Ok(Sample { packets, elapsed })
    })
}

/// How often a slice fills the queue, to drain it in about [`paired::SLICE`].
const FILLS: usize = 4;

/// What each contender without a thread of its own costs above a loop over `read(2)`.
pub(crate) fn run_paired(plan: Plan) -> Part {
    const METHODS: [Method; 5] = [
        Method::Plain,
        Method::TunRs,
        Method::Ours(Ours::PLAIN_INLINE),
        Method::Ours(Ours::URING_INLINE),
        Method::UringBatch,
    ];
    let what = ("tap-read, paired", "packets out of a TAP's queue");
    paired::above_call(plan, what, ("out of a TAP", "read(2)"), |tap, length| {
        let socket = Rc::new(PacketSocket::on(tap.name())?);
        let mut contenders = Vec::new();
        for method in METHODS {
            let mut reader = method.open(tap)?;
            let (socket, frame) = (socket.clone(), udp_frame(length));
            contenders.push(Contender::new(method.name(), move || {
                let mut all = 0.0;
                for _ in 0..FILLS {
                    reader.rest()?;
                    socket.send(&frame, QUEUE)?;
                    all += time_each(QUEUE, || drain(&mut *reader, QUEUE, length))?;
                }
                Ok(all / FILLS as f64)
            }));
        }
        contenders.push(Contender::new("read(2) of an empty queue", move || {
            let calls = FILLS * QUEUE;
            time_each(calls, || (0..calls).try_for_each(|_| find_nothing(tap)))
        }));
        Ok(contenders)
    })
}

/// A call that finds no packet.
fn find_nothing(tap: &Tap) -> Result<()> {
    let mut byte = 0_u8;
    // SAFETY: the byte outlives the call.
    let read = unsafe { libc::read(tap.as_raw_fd(), (&raw mut byte).cast(), 1) };
    match check(read as libc::c_int) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
        _ => Err("a packet came that nobody sent".into()),
    }
}

/// One measurement of one contender, while another thread sends as fast as it can.
pub(crate) fn measure_flood(method: Method, length: usize, time: Duration) -> Result<Sample> {
    in_new_namespace(|| {
        let tap = Tap::open_up("tap0", QUEUE)?;
        let socket = PacketSocket::on(tap.name())?;
        let frame = udp_frame(length);
        let mut reader = method.open(&tap)?;
        let stop = AtomicBool::new(false);
        let (tell, told) = mpsc::channel();
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                tell.send(Processor::of_this_thread()?)?;
                while !stop.load(Ordering::Relaxed) {
                    socket.send(&frame, BATCH)?;
                }
                Ok(())
            });
            let received = told
                .recv()
                .map_err(Into::into)
                .and_then(|processor| receive(&mut *reader, processor, time));
            stop.store(true, Ordering::Relaxed);
            let sent: Result<()> =
                sender.join().unwrap_or_else(|_| Err("the sender panicked".into()));
            sent?;
            let (taken, elapsed) = received?;
            if taken.packets == 0 || taken.bytes != taken.packets * length as u64 {
                return Err(format!("{}: {taken:?} came", method.name()).into());
            }
            Ok(Sample { packets: taken.packets, elapsed })
        })
    })
}

/// What arrives in `time`, and the time without the sender's processor time.
fn receive(reader: &mut dyn Reader, sender: Processor, time: Duration) -> Result<(Taken, Elapsed)> {
    reader.read(PATIENCE)?;
    let (start, sender_start) = (Moment::now(), sender.time());
    let mut all = Taken::default();
    loop {
        let taken = reader.read(PATIENCE)?;
        all.packets += taken.packets;
        all.bytes += taken.bytes;
        if start.wall_elapsed() >= time {
            let mut elapsed = start.elapsed();
            elapsed.cpu = elapsed.cpu.saturating_sub(sender.time() - sender_start);
            return Ok((all, elapsed));
        }
    }
}
