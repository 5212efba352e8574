//! Reads and writes.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::iovec;
use vmring_embedded::limits::VLAN_TAG_LEN;
use vmring_embedded::{Sender, Sent};

use super::{Interface, borrow, recycle};
use crate::framing::{LONG_MARK, MARK, parts};
use crate::limits::{FLUSH, HEADER};
use crate::mapped::Mapped;
use crate::objects::{lock, violation};
use crate::script::{CallPlan, Reported};
use crate::status::{INVALID_ARGUMENT, PACKET_TOO_BIG, SUCCESS, TOO_MANY_PACKETS};

/// `struct vmpktdesc`, as vmnet.h declares it.
#[repr(C)]
pub(crate) struct Descriptor {
    vm_pkt_size: usize,
    vm_pkt_iov: *mut iovec,
    vm_pkt_iovcnt: u32,
    vm_flags: u32,
}

impl Interface {
    /// Checks the descriptors of a call.
    ///
    /// # Safety
    ///
    /// `packets` must point at `n` descriptors. The simulator checks that `vm_pkt_iov` is a pointer
    /// to memory; the caller must guarantee that there are as many iovecs as the descriptor says.
    unsafe fn check(
        &self,
        packets: *const Descriptor,
        n: usize,
        limit: usize,
        what: &str,
    ) -> Result<(), u32> {
        let forbids =
            |why: String, status| Err(self.world.misuse(&format!("{what}: {why}"), status));
        if n > limit {
            return forbids(format!("{n} packets where {limit} are allowed"), TOO_MANY_PACKETS);
        }
        let mut mapped = Mapped::default();
        for i in 0..n {
            // SAFETY: guaranteed by the caller.
            let packet = unsafe { &*packets.add(i) };
            if !mapped.holds(packet.vm_pkt_iov) {
                return forbids(
                    format!(
                        "packet {i}: vm_pkt_iov is no pointer to iovecs (is the layout right?)"
                    ),
                    INVALID_ARGUMENT,
                );
            }
            if packet.vm_pkt_iovcnt == 0 || packet.vm_pkt_iovcnt > 1024 {
                let count = packet.vm_pkt_iovcnt;
                return forbids(format!("packet {i}: vm_pkt_iovcnt is {count}"), INVALID_ARGUMENT);
            }
            if packet.vm_flags != 0 {
                return forbids(
                    format!("packet {i}: vm_flags is {:#x}: it was not reset", packet.vm_flags),
                    INVALID_ARGUMENT,
                );
            }
            // SAFETY: guaranteed by the caller.
            let iovecs = unsafe { iovecs(packet) };
            if iovecs.iter().any(|iovec| iovec.iov_base.is_null()) {
                return forbids(format!("packet {i}: an iov_base is null"), INVALID_ARGUMENT);
            }
            let sum = iovecs.iter().fold(0_usize, |sum, iovec| sum.saturating_add(iovec.iov_len));
            if sum != packet.vm_pkt_size {
                let size = packet.vm_pkt_size;
                return forbids(
                    format!("packet {i}: vm_pkt_size is {size} and the iovecs have {sum} bytes"),
                    INVALID_ARGUMENT,
                );
            }
        }
        // SAFETY: guaranteed by the caller.
        let several = || (0..n).any(|i| unsafe { (*packets.add(i)).vm_pkt_iovcnt } > 1);
        if !self.settings.several_iovecs && several() {
            return Err(INVALID_ARGUMENT);
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As for [`check`](Self::check); and the memory that the iovecs point at must be valid for
    /// writing.
    unsafe fn read(
        self: &Arc<Self>,
        packets: *mut Descriptor,
        count: &mut c_int,
    ) -> Result<(), u32> {
        let what = "vmnet_read";
        let _call = self.enter(&self.reading, what)?;
        let asked = self.check_count(*count, what)?;
        let settings = &self.settings;
        if let Some(len) = settings.free_of_charge {
            pay(settings.call_cost);
            for i in 0..asked {
                // SAFETY: guaranteed by the caller.
                unsafe { (*packets.add(i)).vm_pkt_size = len }
            }
            return Ok(());
        }
        // SAFETY: guaranteed by the caller.
        unsafe { self.check(packets, asked, settings.limits.0, what)? };
        for i in 0..asked {
            // SAFETY: guaranteed by the caller.
            let size = unsafe { (*packets.add(i)).vm_pkt_size };
            if size < settings.max_frame() {
                let why =
                    format!("{what}: a buffer of {size} bytes for up to {}", settings.max_frame());
                return Err(self.world.misuse(&why, INVALID_ARGUMENT));
            }
        }
        pay(settings.call_cost);
        let plan = lock(&self.record).script.reads.pop_front().unwrap_or(CallPlan::Well);
        let most = match plan {
            CallPlan::Well => asked,
            CallPlan::Takes(n) => n.min(asked),
            CallPlan::Fails { status, reported, .. } => {
                *count = reported.count(asked, 0);
                self.count(|counts| counts.reads += 1);
                return Err(status);
            }
        };
        let dead = lock(&self.dead).is_some();
        let mut receive_queue = lock(&self.receive_queue);
        let n = if dead { 0 } else { receive_queue.waiting.len().min(most) };
        for i in 0..n {
            let Some((buffer, len)) = receive_queue.waiting.pop_front() else { break };
            // SAFETY: guaranteed by the caller; the size of the buffer was checked above.
            unsafe { self.deliver(&buffer[..len], &mut *packets.add(i)) };
            recycle(&mut receive_queue.free, buffer);
        }
        for i in 0..asked {
            // The field is in and out: a caller that does not reset it is caught by the next call.
            // SAFETY: guaranteed by the caller.
            unsafe { (*packets.add(i)).vm_flags = 0x5a5a }
        }
        drop(receive_queue);
        *count = n as c_int;
        self.count(|counts| {
            counts.reads += 1;
            counts.packets_read += n as u64;
        });
        if n == most && most < asked {
            // The read came back short although packets may be waiting, so an event has to say so.
            self.fire_if_waiting();
        }
        Ok(())
    }

    /// Writes a frame from the wire, with its header if the interface has it, to a descriptor's
    /// buffer.
    ///
    /// # Safety
    ///
    /// As for [`read`](Self::read).
    unsafe fn deliver(&self, wire: &[u8], packet: &mut Descriptor) {
        let (frame, header) = parts(wire);
        let mut pieces = if self.settings.header { [header, frame] } else { [&[], frame] };
        let len = pieces[0].len() + pieces[1].len();
        let mut left = len;
        // SAFETY: guaranteed by the caller.
        for iovec in unsafe { iovecs_mut(packet) } {
            // SAFETY: the caller guarantees `iov_len` bytes at `iov_base`.
            let mut room = unsafe {
                std::slice::from_raw_parts_mut(iovec.iov_base.cast::<u8>(), iovec.iov_len)
            };
            // "Both are in/out": the length says how much of the buffer is used.
            iovec.iov_len = left.min(room.len());
            left -= iovec.iov_len;
            for piece in &mut pieces {
                let (now, later) = piece.split_at(piece.len().min(room.len()));
                let (to, rest) = room.split_at_mut(now.len());
                to.copy_from_slice(now);
                (*piece, room) = (later, rest);
            }
            if left == 0 {
                break;
            }
        }
        packet.vm_pkt_size = len;
    }

    /// # Safety
    ///
    /// As for [`check`](Self::check).
    unsafe fn write(
        self: &Arc<Self>,
        packets: *mut Descriptor,
        count: &mut c_int,
    ) -> Result<(), u32> {
        let what = "vmnet_write";
        let _call = self.enter(&self.writing, what)?;
        let asked = self.check_count(*count, what)?;
        if self.settings.free_of_charge.is_some() {
            pay(self.settings.call_cost);
            return Ok(());
        }
        // SAFETY: guaranteed by the caller.
        unsafe { self.check(packets, asked, self.settings.limits.1, what)? };
        pay(self.settings.call_cost);
        let (plan, failed_batch) = {
            let script = &mut lock(&self.record).script;
            (script.writes.pop_front().unwrap_or(CallPlan::Well), script.failed_batch)
        };
        // SAFETY: guaranteed by the caller.
        let frames: Vec<Vec<u8>> =
            (0..asked).map(|i| unsafe { gather(&*packets.add(i)) }).collect();
        let fault = frames.iter().enumerate().find_map(|(i, frame)| {
            let status = self.packet_status(frame);
            (status != SUCCESS).then_some((i, status))
        });
        // A packet that cannot be sent is not sent, whatever the plan says.
        let possible = fault.map_or(asked, |(i, _)| i);
        let (n, status, reported) = match (plan, fault) {
            (CallPlan::Takes(n), _) => (n.min(possible), SUCCESS, Reported::Done),
            (CallPlan::Fails { status, sent, reported }, _) => {
                (sent.min(possible), status, reported)
            }
            (CallPlan::Well, None) => (asked, SUCCESS, Reported::Done),
            (CallPlan::Well, Some((i, status))) => {
                (if failed_batch.0 { i } else { 0 }, status, failed_batch.1)
            }
        };
        let dead = lock(&self.dead).is_some();
        if !dead {
            let mut sender = lock(&self.sender);
            if let Some(sender) = &mut *sender {
                for (i, frame) in frames[..n].iter().enumerate() {
                    self.send(sender, frame);
                    if i % FLUSH == FLUSH - 1 {
                        sender.flush();
                    }
                }
                sender.flush();
            }
        }
        *count = reported.count(asked, n);
        self.count(|counts| {
            counts.writes += 1;
            counts.packets_written += n as u64;
        });
        if status == SUCCESS { Ok(()) } else { Err(status) }
    }

    /// The status for one packet, including its header.
    fn packet_status(&self, packet: &[u8]) -> u32 {
        let header = if self.settings.header { HEADER } else { 0 };
        if packet.len() < header + 14 {
            INVALID_ARGUMENT
        } else if packet.len() > self.settings.max_frame() {
            PACKET_TOO_BIG
        } else {
            SUCCESS
        }
    }

    fn send(&self, sender: &mut Sender<Vec<u8>>, packet: &[u8]) {
        let header_len = if self.settings.header { HEADER } else { 0 };
        let (header, frame) = packet.split_at(header_len);
        // `num_buffers` has no meaning in this direction.
        let says = header.iter().take(10).any(|byte| *byte != 0);
        let marked = says.then(|| [frame, header, MARK].concat());
        let whole = marked.as_deref().unwrap_or(frame);
        if whole.len() <= self.wire_max - VLAN_TAG_LEN {
            sender.send(whole);
            return;
        }
        let long = &self.world.0.long_frames;
        let ticket = long.give(whole.to_vec());
        let copies = match sender.send(&[&whole[..14], &ticket.to_le_bytes(), LONG_MARK].concat()) {
            Sent::Forwarded => 1,
            Sent::Flooded { reached } => reached,
            _ => 0,
        };
        long.expect(ticket, copies);
    }

    fn check_count(&self, count: c_int, what: &str) -> Result<usize, u32> {
        usize::try_from(count).ok().filter(|count| *count > 0).ok_or_else(|| {
            self.world.misuse(&format!("{what}: a count of {count}"), INVALID_ARGUMENT)
        })
    }
}

impl Reported {
    fn count(self, asked: usize, done: usize) -> c_int {
        (match self {
            Reported::Asked => asked,
            Reported::Done => done,
            Reported::Zero => 0,
        }) as c_int
    }
}

/// # Safety
///
/// There must be as many iovecs as the descriptor says.
unsafe fn iovecs(packet: &Descriptor) -> &[iovec] {
    // SAFETY: the caller guarantees the count; `check` has looked at the pointer.
    unsafe { std::slice::from_raw_parts(packet.vm_pkt_iov, packet.vm_pkt_iovcnt as usize) }
}

/// # Safety
///
/// As for [`iovecs`]; and nobody else may use them at the same time.
unsafe fn iovecs_mut(packet: &mut Descriptor) -> &mut [iovec] {
    // SAFETY: guaranteed by the caller.
    unsafe { std::slice::from_raw_parts_mut(packet.vm_pkt_iov, packet.vm_pkt_iovcnt as usize) }
}

/// # Safety
///
/// As for [`iovecs`]; and they must point at readable bytes.
unsafe fn gather(packet: &Descriptor) -> Vec<u8> {
    let mut all = Vec::with_capacity(packet.vm_pkt_size);
    // SAFETY: guaranteed by the caller.
    for iovec in unsafe { iovecs(packet) } {
        // SAFETY: guaranteed by the caller.
        all.extend(unsafe {
            std::slice::from_raw_parts(iovec.iov_base.cast::<u8>(), iovec.iov_len)
        });
    }
    all
}

/// Spends the cost of a call. It spins, because a system call uses the processor too.
#[inline]
fn pay(cost: Duration) {
    if cost.is_zero() {
        return;
    }
    let start = Instant::now();
    while start.elapsed() < cost {
        std::hint::spin_loop();
    }
}

/// # Safety
///
/// `interface` must be a handle from a start of this process. `packets` must point at `*count`
/// descriptors, whose memory must be valid for writing during the call.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_read(
    interface: *mut c_void,
    packets: *mut Descriptor,
    count: *mut c_int,
) -> u32 {
    if packets.is_null() || count.is_null() {
        violation("vmnet_read: the packets and their count are pointers, and one is null");
    }
    // SAFETY: guaranteed by the caller.
    unsafe { borrow(interface, "vmnet_read").read(packets, &mut *count) }.err().unwrap_or(SUCCESS)
}

/// # Safety
///
/// As for [`vmnet_read`], but the memory need only be valid for reading.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_write(
    interface: *mut c_void,
    packets: *mut Descriptor,
    count: *mut c_int,
) -> u32 {
    if packets.is_null() || count.is_null() {
        violation("vmnet_write: the packets and their count are pointers, and one is null");
    }
    // SAFETY: guaranteed by the caller.
    unsafe { borrow(interface, "vmnet_write").write(packets, &mut *count) }.err().unwrap_or(SUCCESS)
}
