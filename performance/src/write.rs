//! Packets per second into a TAP.

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use crate::clock::Moment;
use crate::contender::Writer;
use crate::net::{QUEUE, Tap, counters, in_new_namespace, udp_frame};
use crate::ours::Ours;
use crate::paired::{self, Contender, time_each};
use crate::plan::{Part, Plan};
use crate::report::Sample;
use crate::result::Result;
use crate::slots::{BATCH, SLOT_SIZE, SLOTS, Slot, filled};

/// The contenders.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Plain,
    Uring,
    UringFixed,
    TunRs,
    Ours(Ours),
}

impl Method {
    pub(crate) const ALL: &[Self] = &[
        Self::Plain,
        Self::Uring,
        Self::UringFixed,
        Self::TunRs,
        Self::Ours(Ours::URING_INLINE),
        Self::Ours(Ours::URING_THREAD),
        Self::Ours(Ours::PLAIN_INLINE),
        Self::Ours(Ours::PLAIN_THREAD),
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "write(2)",
            Self::Uring => "io_uring WRITE, 64 at once",
            Self::UringFixed => "io_uring WRITE_FIXED, 64 at once",
            Self::TunRs => "tun-rs send",
            Self::Ours(ours) => ours.name(),
        }
    }
}

impl Method {
    /// A writer of packets of `length` bytes. Before anything is timed, this checks that the right
    /// number of packets of the right length arrive.
    fn open(self, tap: &Tap, length: usize) -> Result<Box<dyn Writer + '_>> {
        let slots = filled(&udp_frame(length));
        let mut writer: Box<dyn Writer> = match self {
            Self::Plain => Box::new(Plain { tap, slots, next: 0, length }),
            Self::Uring => Box::new(Uring::new(tap, slots, length, false)?),
            Self::UringFixed => Box::new(Uring::new(tap, slots, length, true)?),
            Self::TunRs => Box::new(TunRs::new(tap, slots, length)?),
            Self::Ours(ours) => ours.writer(tap, &slots[0].0[..length])?,
        };
        let before = counters(tap.name())?;
        writer.write(SLOTS + 1)?;
        let after = counters(tap.name())?;
        let came = (after.received - before.received, after.received_bytes - before.received_bytes);
        let wanted = SLOTS as u64 + 1;
        if came != (wanted, wanted * length as u64) {
            let name = self.name();
            return Err(
                format!("{name}: wrote {wanted} packets, (packets, bytes) came: {came:?}").into()
            );
        }
        Ok(writer)
    }
}

/// One measurement of one contender, for about `time`.
pub(crate) fn measure(method: Method, length: usize, time: Duration) -> Result<Sample> {
    in_new_namespace(|| {
        let tap = Tap::open_up("tap0", QUEUE)?;
        let mut writer = method.open(&tap, length)?;
        let start = Moment::now();
        let mut packets = 0;
        loop {
            writer.write(16 * BATCH)?;
            packets += 16 * BATCH;
            let elapsed = start.elapsed();
            if elapsed.wall >= time {
                return Ok(Sample { packets: packets as u64, elapsed });
            }
        }
    })
}

/// How many packets a slice writes, in about [`paired::SLICE`].
const SLICE: usize = 16 * SLOTS;

/// What each contender without a thread of its own costs above a loop over `write(2)`.
pub(crate) fn run_paired(plan: Plan) -> Part {
    const METHODS: [Method; 5] = [
        Method::Plain,
        Method::TunRs,
        Method::Ours(Ours::PLAIN_INLINE),
        Method::Ours(Ours::URING_INLINE),
        Method::Uring,
    ];
    let what = ("tap-write, paired", "packets into a TAP");
    paired::above_call(plan, what, ("into a TAP", "write(2)"), |tap, length| {
        let mut contenders = Vec::new();
        for method in METHODS {
            let mut writer = method.open(tap, length)?;
            contenders.push(Contender::new(method.name(), move || {
                // The contender before has left its own buffers in the caches.
                writer.write(SLOTS)?;
                time_each(SLICE, || writer.write(SLICE))
            }));
        }
        contenders.push(Contender::new("write(2) of 1 B, refused", move || {
            time_each(SLICE, || (0..SLICE).try_for_each(|_| refused(tap)))
        }));
        Ok(contenders)
    })
}

/// A call that the TAP refuses, since no frame is that short.
fn refused(tap: &Tap) -> Result<()> {
    // SAFETY: the byte outlives the call.
    let written = unsafe { libc::write(tap.as_raw_fd(), [0_u8].as_ptr().cast(), 1) };
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EINVAL) if written < 0 => Ok(()),
        _ => Err(format!("a write of 1 B gave {written}").into()),
    }
}

/// One system call per packet.
struct Plain<'a> {
    tap: &'a Tap,
    slots: Vec<Slot>,
    next: usize,
    length: usize,
}

impl Writer for Plain<'_> {
    fn write(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let frame = &self.slots[self.next].0[..self.length];
            self.next = (self.next + 1) % SLOTS;
            // SAFETY: the frame has this length and outlives the call.
            let written =
                unsafe { libc::write(self.tap.as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
            if written != self.length as isize {
                return Err(io::Error::last_os_error().into());
            }
        }
        Ok(())
    }
}

/// One system call per batch.
struct Uring<'a> {
    ring: IoUring,
    tap: &'a Tap,
    slots: Vec<Slot>,
    next: usize,
    length: usize,
    /// Whether the descriptor and the memory are registered with the kernel.
    fixed: bool,
}

impl<'a> Uring<'a> {
    fn new(tap: &'a Tap, mut slots: Vec<Slot>, length: usize, fixed: bool) -> Result<Self> {
        let ring =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(BATCH as u32)?;
        if fixed {
            let all = libc::iovec {
                iov_base: slots.as_mut_ptr().cast(),
                iov_len: slots.len() * SLOT_SIZE,
            };
            // SAFETY: the slots are neither moved nor freed before the ring, and nothing else uses
            // them.
            unsafe { ring.submitter().register_buffers(&[all]) }?;
            ring.submitter().register_files(&[tap.as_raw_fd()])?;
        }
        Ok(Self { ring, tap, slots, next: 0, length, fixed })
    }
}

impl Writer for Uring<'_> {
    fn write(&mut self, count: usize) -> Result<()> {
        let mut left = count;
        while left > 0 {
            let batch = left.min(BATCH);
            let mut queue = self.ring.submission();
            for _ in 0..batch {
                let slot = &self.slots[self.next];
                self.next = (self.next + 1) % SLOTS;
                let (start, length) = (slot.0.as_ptr(), self.length as u32);
                let entry = if self.fixed {
                    opcode::WriteFixed::new(types::Fixed(0), start, length, 0).build()
                } else {
                    opcode::Write::new(types::Fd(self.tap.as_raw_fd()), start, length).build()
                };
                // SAFETY: the slots are not moved, changed or freed before the batch is complete,
                // and that is before this function returns: an error of the ring itself ends the
                // program.
                unsafe { queue.push(&entry) }?;
            }
            drop(queue);
            self.ring.submit_and_wait(batch)?;
            let mut done = 0;
            for completion in self.ring.completion() {
                if completion.result() != self.length as i32 {
                    return Err(io::Error::from_raw_os_error(-completion.result()).into());
                }
                done += 1;
            }
            if done != batch {
                return Err(format!("{done} of {batch} writes completed").into());
            }
            left -= batch;
        }
        Ok(())
    }
}

/// The crate of this name, over the same descriptor.
struct TunRs {
    device: tun_rs::SyncDevice,
    slots: Vec<Slot>,
    next: usize,
    length: usize,
}

impl TunRs {
    fn new(tap: &Tap, slots: Vec<Slot>, length: usize) -> Result<Self> {
        // SAFETY: the descriptor is a TAP's without packet information and virtio header, and from
        // here on the device owns it.
        let device = unsafe { tun_rs::SyncDevice::from_fd(tap.duplicate()?.into_raw_fd()) }?;
        Ok(Self { device, slots, next: 0, length })
    }
}

impl Writer for TunRs {
    fn write(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let frame = &self.slots[self.next].0[..self.length];
            self.next = (self.next + 1) % SLOTS;
            let written = self.device.send(frame)?;
            if written != self.length {
                return Err(format!("{written} of {} bytes written", self.length).into());
            }
        }
        Ok(())
    }
}
