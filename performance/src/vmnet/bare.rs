//! A loop that calls the C ABI of vmnet itself, as a C program would.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::sync::mpsc::sync_channel;

use block2::{DynBlock, RcBlock};
use dispatch2::{DispatchQueue, DispatchRetained};
use libc::iovec;
use vmnet_sim::World;

use super::limits::{BUFFER_LEN, LENGTH, PATIENCE};
use crate::queues::{Entry, Queues};
use crate::result::Result;

const SUCCESS: u32 = 1000;

#[repr(C)]
struct Descriptor {
    vm_pkt_size: usize,
    vm_pkt_iov: *mut iovec,
    vm_pkt_iovcnt: u32,
    vm_flags: u32,
}

unsafe extern "C" {
    static vmnet_operation_mode_key: *const c_char;
    static vmnet_interface_id_key: *const c_char;

    fn vmnet_start_interface(
        description: *mut c_void,
        queue: &DispatchQueue,
        handler: &DynBlock<dyn Fn(u32, *mut c_void)>,
    ) -> *mut c_void;
    fn vmnet_stop_interface(
        interface: *mut c_void,
        queue: &DispatchQueue,
        handler: &DynBlock<dyn Fn(u32)>,
    ) -> u32;
    fn vmnet_read(interface: *mut c_void, packets: *mut Descriptor, count: *mut c_int) -> u32;
    fn vmnet_write(interface: *mut c_void, packets: *mut Descriptor, count: *mut c_int) -> u32;
    fn xpc_dictionary_create(
        keys: *const *const c_char,
        values: *const *mut c_void,
        count: usize,
    ) -> *mut c_void;
    fn xpc_dictionary_set_uint64(object: *mut c_void, key: *const c_char, value: u64);
    fn xpc_dictionary_set_uuid(object: *mut c_void, key: *const c_char, value: *const [u8; 16]);
    fn xpc_release(object: *mut c_void);
}

/// An interface as a C program has it.
pub(super) struct Bare {
    interface: *mut c_void,
    queue: DispatchRetained<DispatchQueue>,
    buffers: Vec<[u8; BUFFER_LEN]>,
    iovecs: Vec<iovec>,
    descriptors: Vec<Descriptor>,
    _world: World,
}

type Transfer = unsafe extern "C" fn(*mut c_void, *mut Descriptor, *mut c_int) -> u32;

impl Bare {
    pub(super) fn start(world: World, id: [u8; 16], batch: usize) -> Result<Self> {
        let queue = DispatchQueue::new("performance", None);
        let (answer, answers) = sync_channel(1);
        let handler = RcBlock::new(move |status: u32, _: *mut c_void| {
            // Nothing waits any more only after an error, which is reported there.
            let _ = answer.try_send(status);
        });
        // SAFETY: the description, the queue and the block live until the handler has run, and the
        // keys are constants.
        let interface = unsafe {
            let description = xpc_dictionary_create(ptr::null(), ptr::null(), 0);
            xpc_dictionary_set_uint64(description, vmnet_operation_mode_key, 1001);
            xpc_dictionary_set_uuid(description, vmnet_interface_id_key, &id);
            let interface = vmnet_start_interface(description, &queue, &handler);
            xpc_release(description);
            interface
        };
        let status = answers.recv_timeout(PATIENCE)?;
        if status != SUCCESS || interface.is_null() {
            return Err(format!("the simulated vmnet does not start: {status}").into());
        }
        let no_iovec = || iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let no_packet = || Descriptor {
            vm_pkt_size: 0,
            vm_pkt_iov: ptr::null_mut(),
            vm_pkt_iovcnt: 0,
            vm_flags: 0,
        };
        Ok(Self {
            interface,
            queue,
            buffers: vec![[0; BUFFER_LEN]; batch],
            iovecs: (0..batch).map(|_| no_iovec()).collect(),
            descriptors: (0..batch).map(|_| no_packet()).collect(),
            _world: world,
        })
    }

    /// Points each descriptor at its buffer, with `len` bytes of buffer or of packet.
    #[inline]
    fn prepare(&mut self, len: usize) {
        let all = self.buffers.iter_mut().zip(&mut self.iovecs).zip(&mut self.descriptors);
        for ((buffer, iovec), descriptor) in all {
            iovec.iov_base = buffer.as_mut_ptr().cast();
            iovec.iov_len = len;
            descriptor.vm_pkt_size = len;
            descriptor.vm_pkt_iov = iovec;
            descriptor.vm_pkt_iovcnt = 1;
            descriptor.vm_flags = 0;
        }
    }

    /// Makes one call for all descriptors. Returns how many packets it carried.
    #[inline]
    fn call(&mut self, transfer: Transfer) -> Result<usize> {
        let mut count = self.descriptors.len() as c_int;
        // SAFETY: the interface runs; there are this many descriptors, and what they point at is
        // ours.
        let status =
            unsafe { transfer(self.interface, self.descriptors.as_mut_ptr(), &raw mut count) };
        if status != SUCCESS {
            return Err(format!("the simulated vmnet answers {status}").into());
        }
        Ok(count as usize)
    }

    #[inline]
    fn turn(&mut self, transfer: Transfer, len: usize) -> Result<u64> {
        self.prepare(len);
        let count = self.call(transfer)?;
        if self.descriptors[..count].iter().any(|descriptor| descriptor.vm_pkt_size != LENGTH) {
            return Err("the simulated vmnet gives a packet of another length".into());
        }
        Ok(count as u64)
    }

    /// Like [`read`](Self::read) and [`write`](Self::write), for packets that are submitted to
    /// queues and reaped from them.
    #[inline]
    pub(super) fn turn_behind(&mut self, queues: &mut Queues, reads: bool) -> Result<u64> {
        let waiting = queues.waiting();
        if waiting != self.descriptors.len() {
            return Err(format!("{waiting} packets are in the submission queue").into());
        }
        if reads { self.read() } else { self.write() }?;
        let mut descriptors = self.descriptors.iter();
        queues.complete(waiting, |entry| {
            let length = descriptors.next().map_or(0, |packet| packet.vm_pkt_size as u32);
            Entry { length, ..entry }
        })?;
        let mut right = true;
        let done = queues.turn(waiting, |entry| {
            right &= entry.length == LENGTH as u32;
            Entry { length: 0, ..entry }
        })?;
        if right { Ok(done as u64) } else { Err("a packet of another length".into()) }
    }

    pub(super) fn buffers_mut(&mut self) -> impl Iterator<Item = &mut [u8; BUFFER_LEN]> {
        self.buffers.iter_mut()
    }

    /// Reads once, whatever arrives.
    pub(super) fn receive(&mut self) -> Result<impl Iterator<Item = &[u8]>> {
        self.prepare(BUFFER_LEN);
        let count = self.call(vmnet_read)?;
        let all = self.buffers.iter().zip(&self.descriptors[..count]);
        Ok(all.map(|(buffer, descriptor)| &buffer[..descriptor.vm_pkt_size.min(BUFFER_LEN)]))
    }

    /// Reads once. Returns the number of packets.
    #[inline]
    pub(super) fn read(&mut self) -> Result<u64> {
        self.turn(vmnet_read, BUFFER_LEN)
    }

    /// Writes once. Returns the number of packets.
    #[inline]
    pub(super) fn write(&mut self) -> Result<u64> {
        self.turn(vmnet_write, LENGTH)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let (answer, answers) = sync_channel(1);
        let handler = RcBlock::new(move |status: u32| {
            let _ = answer.try_send(status);
        });
        // SAFETY: the interface runs and only this has it; queue and block outlive the handler.
        let status = unsafe { vmnet_stop_interface(self.interface, &self.queue, &handler) };
        // Outside a call nothing uses the buffers, so all that is left to do is to report it.
        if status != SUCCESS || answers.recv_timeout(PATIENCE).is_err() {
            eprintln!("a simulated vmnet interface does not stop: {status}");
        }
    }
}
