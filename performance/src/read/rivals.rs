//! Readers written by hand, and those of another crate.

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, types};

use crate::contender::{Reader, Taken};
use crate::net::{Tap, check};
use crate::result::Result;
use crate::slots::{BATCH, SLOT_SIZE, SLOTS, Slot, filled};

/// Waits for a packet.
fn poll(fd: RawFd, patience: Duration) -> io::Result<()> {
    let mut entry = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: poll reads and writes one entry, which outlives the call.
    check(unsafe { libc::poll(&raw mut entry, 1, patience.as_millis() as i32) })?;
    Ok(())
}

/// One system call per packet, and one that says that there is none.
pub(super) struct Plain {
    fd: RawFd,
    slots: Vec<Slot>,
    next: usize,
}

impl Plain {
    pub(super) fn new(fd: RawFd) -> Self {
        Self { fd, slots: filled(&[]), next: 0 }
    }

    /// Takes a batch, or as many packets as there are.
    fn take(&mut self) -> Result<Taken> {
        let mut taken = Taken::default();
        for _ in 0..BATCH {
            let slot = &mut self.slots[self.next].0;
            // SAFETY: the slot has this length and outlives the call.
            let length = unsafe { libc::read(self.fd, slot.as_mut_ptr().cast(), slot.len()) };
            if length < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::WouldBlock {
                    break;
                }
                return Err(error.into());
            }
            self.next = (self.next + 1) % SLOTS;
            taken.add(length as usize);
        }
        Ok(taken)
    }
}

impl Reader for Plain {
    fn read(&mut self, patience: Duration) -> Result<Taken> {
        let taken = self.take()?;
        if taken.packets > 0 {
            return Ok(taken);
        }
        poll(self.fd, patience)?;
        self.take()
    }
}

/// The crate of this name, over the same descriptor.
pub(super) struct TunRs {
    device: tun_rs::SyncDevice,
    slots: Vec<Slot>,
    next: usize,
}

impl TunRs {
    pub(super) fn new(tap: &Tap) -> Result<Self> {
        // SAFETY: the descriptor is a TAP's without packet information and virtio header, and from
        // here on the device owns it.
        let device = unsafe { tun_rs::SyncDevice::from_fd(tap.duplicate()?.into_raw_fd()) }?;
        Ok(Self { device, slots: filled(&[]), next: 0 })
    }

    fn take(&mut self) -> Result<Taken> {
        let mut taken = Taken::default();
        for _ in 0..BATCH {
            match self.device.recv(&mut self.slots[self.next].0) {
                Ok(length) => taken.add(length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
            self.next = (self.next + 1) % SLOTS;
        }
        Ok(taken)
    }
}

impl Reader for TunRs {
    fn read(&mut self, patience: Duration) -> Result<Taken> {
        let taken = self.take()?;
        if taken.packets > 0 {
            return Ok(taken);
        }
        poll(self.device.as_raw_fd(), patience)?;
        self.take()
    }
}

/// A batch of reads that complete at once and in order, with a packet or with the answer that there
/// is none.
pub(super) struct Batch {
    ring: IoUring,
    fd: RawFd,
    slots: Vec<Slot>,
    next: usize,
    /// The number of reads at once after the queue was found empty.
    smallest: usize,
    batch: usize,
    /// Whether the descriptor and the memory are registered with the kernel.
    fixed: bool,
}

impl Batch {
    pub(super) fn new(fd: RawFd, smallest: usize, fixed: bool) -> Result<Self> {
        let ring =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(BATCH as u32)?;
        let mut slots = filled(&[]);
        if fixed {
            let all = libc::iovec {
                iov_base: slots.as_mut_ptr().cast(),
                iov_len: slots.len() * SLOT_SIZE,
            };
            // SAFETY: the slots are neither moved nor freed before the ring, and nothing else uses
            // them.
            unsafe { ring.submitter().register_buffers(&[all]) }?;
            ring.submitter().register_files(&[fd])?;
        }
        Ok(Self { ring, fd, slots, next: 0, smallest, batch: smallest, fixed })
    }

    fn take(&mut self) -> Result<Taken> {
        let mut queue = self.ring.submission();
        for i in 0..self.batch {
            let slot = &mut self.slots[(self.next + i) % SLOTS].0;
            // The entry's flag makes the read non-blocking. The file's O_NONBLOCK has no effect on
            // files that know the flag, like a TAP's, and the read would wait for a packet.
            let (start, length) = (slot.as_mut_ptr(), SLOT_SIZE as u32);
            let entry = if self.fixed {
                opcode::ReadFixed::new(types::Fixed(0), start, length, 0)
                    .rw_flags(libc::RWF_NOWAIT)
                    .build()
            } else {
                opcode::Read::new(types::Fd(self.fd), start, length)
                    .rw_flags(libc::RWF_NOWAIT)
                    .build()
            };
            // SAFETY: the slots are not moved, used or freed before the batch is complete, and that
            // is before this function returns: an error of the ring itself ends the program.
            unsafe { queue.push(&entry) }?;
        }
        drop(queue);
        self.ring.submit_and_wait(self.batch)?;
        let (mut taken, mut done) = (Taken::default(), 0);
        for completion in self.ring.completion() {
            done += 1;
            match completion.result() {
                length @ 0.. => taken.add(length as usize),
                error if -error == libc::EAGAIN => {}
                error => return Err(io::Error::from_raw_os_error(-error).into()),
            }
        }
        if done != self.batch {
            return Err(format!("{done} of {} reads completed", self.batch).into());
        }
        self.next = (self.next + taken.packets as usize) % SLOTS;
        self.batch = if taken.packets as usize == self.batch {
            (self.batch * 4).min(BATCH)
        } else {
            self.smallest
        };
        Ok(taken)
    }
}

impl Reader for Batch {
    fn read(&mut self, patience: Duration) -> Result<Taken> {
        let taken = self.take()?;
        if taken.packets > 0 {
            return Ok(taken);
        }
        poll(self.fd, patience)?;
        self.take()
    }
}

/// One entry of the ring of buffers, as the kernel reads it.
#[repr(C)]
#[derive(Default)]
struct Provided {
    address: AtomicU64,
    length: AtomicU32,
    id: AtomicU16,
    /// In the first entry this is the ring's tail.
    tail: AtomicU16,
}

#[repr(C, align(4096))]
struct ProvidedRing([Provided; SLOTS]);

/// One read that completes once per packet, into buffers that the kernel takes from a ring.
pub(super) struct Multishot {
    // This is the first field, so that the kernel releases the buffers before they are freed.
    ring: IoUring,
    provided: Box<ProvidedRing>,
    slots: Vec<Slot>,
    fd: RawFd,
    tail: u16,
    armed: bool,
}

/// The identifier of the ring of buffers.
const GROUP: u16 = 0;

impl Multishot {
    pub(super) fn new(fd: RawFd) -> Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(2 * SLOTS as u32)
            .build(BATCH as u32)?;
        let provided = Box::new(ProvidedRing(std::array::from_fn(|_| Provided::default())));
        let address = (&raw const *provided).addr() as u64;
        // SAFETY: the memory is page-aligned, has this many entries, consists of atomics, and is
        // freed after the ring.
        unsafe { ring.submitter().register_buf_ring_with_flags(address, SLOTS as u16, GROUP, 0) }?;
        let mut this = Self { ring, provided, slots: filled(&[]), fd, tail: 0, armed: false };
        for id in 0..SLOTS {
            this.give(id as u16);
        }
        this.publish();
        Ok(this)
    }

    /// Puts a buffer into the ring. The kernel sees it after `publish`.
    fn give(&mut self, id: u16) {
        let entry = &self.provided.0[usize::from(self.tail) % SLOTS];
        let address = self.slots[usize::from(id)].0.as_mut_ptr().expose_provenance();
        entry.address.store(address as u64, Ordering::Relaxed);
        entry.length.store(SLOT_SIZE as u32, Ordering::Relaxed);
        entry.id.store(id, Ordering::Relaxed);
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&self) {
        // Release: pairs with the kernel's Acquire of the tail.
        self.provided.0[0].tail.store(self.tail, Ordering::Release);
    }
}

impl Reader for Multishot {
    fn read(&mut self, patience: Duration) -> Result<Taken> {
        if !self.armed {
            // The length is that of the buffers. The kernel accepts only 0 here.
            let entry = opcode::ReadMulti::new(types::Fd(self.fd), 0, GROUP).build();
            // SAFETY: the entry names no memory but the ring of buffers, which lives as long as the
            // ring.
            unsafe { self.ring.submission().push(&entry) }?;
            self.armed = true;
        }
        let limit = types::Timespec::from(patience);
        let arguments = types::SubmitArgs::new().timespec(&limit);
        match self.ring.submitter().submit_with_args(1, &arguments) {
            Err(error) if error.raw_os_error() != Some(libc::ETIME) => return Err(error.into()),
            _ => {}
        }
        let mut taken = Taken::default();
        let mut free = [0; 2 * SLOTS];
        for completion in self.ring.completion() {
            self.armed &= cqueue::more(completion.flags());
            match completion.result() {
                length @ 0.. => {
                    let id = cqueue::buffer_select(completion.flags()).ok_or("no buffer's name")?;
                    free[taken.packets as usize] = id;
                    taken.add(length as usize);
                }
                // All buffers are full, so the read has ended. The next one continues.
                error if -error == libc::ENOBUFS => {}
                error => return Err(io::Error::from_raw_os_error(-error).into()),
            }
        }
        for id in &free[..taken.packets as usize] {
            self.give(*id);
        }
        self.publish();
        Ok(taken)
    }
}
