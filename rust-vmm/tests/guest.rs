//! A guest in the memory of `vm-memory`: a driver with both queues of a pair, and the device behind it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmring::{Embedded, Interface};
use vmring_rust_vmm::{
    ActiveQueue, InterruptCause, MemorySource, QueueDescription, VirtioNet, interrupt_fn,
    virtio_queue, vm_memory,
};
use vmring_virtio::net::{Interrupt, NetSettings};
use vmring_virtio::queue::QueueFeatures;

use crate::driver::{ARENA, Driver, Returned};
use crate::support::LONG;

pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

pub(crate) const HEADER: usize = 12;
/// What each queue has for its buffers.
const ARENA_LEN: u64 = 0x40_0000;
const RINGS: u64 = 0x10_0000;
/// How far the parts of queues are apart: more than the largest page.
const APART: u64 = 0x1_0000;
pub(crate) const SIZE: u16 = 64;

pub(crate) fn memory() -> GuestMemoryAtomic<Memory> {
    let regions =
        [(GuestAddress(RINGS), 8 * APART as usize), (GuestAddress(ARENA), 2 * ARENA_LEN as usize)];
    GuestMemoryAtomic::new(Memory::from_ranges(&regions).expect("memory"))
}

/// A queue as the guest has set it up, in the registers of a transport.
pub(crate) fn queue(index: u16) -> Queue {
    let mut queue = Queue::new(256).expect("a queue");
    let base = (RINGS + u64::from(index) * 3 * APART) as u32;
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(base), Some(0));
    queue.set_avail_ring_address(Some(base + APART as u32), Some(0));
    queue.set_used_ring_address(Some(base + 2 * APART as u32), Some(0));
    queue.set_ready(true);
    queue
}

/// An interface on a network of this test's own, on which nobody but its guests sends: with IPv6 its
/// gateway would send router advertisements that nobody has asked for.
pub(crate) fn interface(network: &str) -> Interface {
    let network = Embedded::network(format!("rust-vmm test {network}")).no_ipv6();
    Interface::builder().device(network).start().expect("an interface")
}

/// The place of the configuration space among the interrupts.
pub(crate) const CONFIG: usize = 2;

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct Interrupts([AtomicU64; 3]);

impl Interrupts {
    pub(crate) fn of(&self, place: usize) -> u64 {
        self.0[place].load(Ordering::SeqCst)
    }

    /// As a VMM hands them over.
    pub(crate) fn function(self: &Arc<Self>) -> Arc<dyn Interrupt> {
        let interrupts = self.clone();
        interrupt_fn(move |cause| {
            let place = match cause {
                InterruptCause::Queue(index) => usize::from(index),
                InterruptCause::Config => CONFIG,
            };
            interrupts.0[place].fetch_add(1, Ordering::SeqCst);
        })
    }
}

/// The guest's side.
pub(crate) struct Guest {
    pub(crate) rx: Driver,
    pub(crate) tx: Driver,
}

impl Guest {
    pub(crate) fn new(memory: &impl MemorySource, features: u64) -> Self {
        let memory = memory.snapshot().expect("the guest's memory");
        let features = QueueFeatures::from_bits(features);
        let [rx, tx] = [0, 1].map(|index| {
            let layout = QueueDescription::try_from(&queue(index)).expect("a queue").layout;
            Driver::over(memory.clone(), layout, features, 0, ARENA_LEN)
                .with_arena(ARENA + u64::from(index) * ARENA_LEN)
        });
        Self { rx, tx }
    }

    /// Posts buffers for receiving, as many as there is space for, at most `most`.
    pub(crate) fn fill(&mut self, len: u32, most: usize) -> usize {
        let posted = (0..most).take_while(|_| self.rx.post(&[(len, true)], None).is_some()).count();
        self.rx.expose();
        posted
    }

    /// Sends a packet. Returns whether there was space.
    pub(crate) fn send(&mut self, packet: &[u8]) -> bool {
        let bytes = [&[0; HEADER], packet].concat();
        let Some(head) = self.tx.post(&[(bytes.len() as u32, false)], None) else { return false };
        let address = self.tx.buffers(head)[0].address;
        self.tx.write(address, &bytes);
        self.tx.expose();
        true
    }

    /// The packets that were received since the last call.
    pub(crate) fn received(&mut self) -> Vec<Vec<u8>> {
        let returned = self.rx.collect();
        returned.iter().map(|one| self.bytes(one)).collect()
    }

    pub(crate) fn bytes(&self, one: &Returned) -> Vec<u8> {
        assert!(one.len as usize >= HEADER, "an empty buffer");
        self.rx.read(one.buffers[0].address, one.len)[HEADER..].to_vec()
    }
}

/// Both queues of a guest, as they are at DRIVER_OK.
pub(crate) fn queues() -> [ActiveQueue; 2] {
    [0, 1].map(|index| ActiveQueue::new(index, queue(index).state()))
}

/// A device that is active, and its guest.
pub(crate) fn start(
    network: &str,
) -> (VirtioNet, Guest, GuestMemoryAtomic<Memory>, Arc<Interrupts>) {
    start_over(interface(network))
}

/// The same over an interface.
pub(crate) fn start_over(
    interface: Interface,
) -> (VirtioNet, Guest, GuestMemoryAtomic<Memory>, Arc<Interrupts>) {
    let mut net = VirtioNet::new(interface, NetSettings::default()).expect("a device");
    let (memory, interrupts) = (memory(), Arc::new(Interrupts::default()));
    let guest = Guest::new(&memory, net.features());
    let features = net.features();
    net.activate(&memory, interrupts.function(), features, queues()).expect("it starts");
    (net, guest, memory, interrupts)
}

pub(crate) fn mac(net: &VirtioNet) -> [u8; 6] {
    let mut mac = [0; 6];
    net.read_config(0, &mut mac);
    mac
}

/// Polls until there is nothing more to do now.
pub(crate) fn poll(net: &mut VirtioNet) {
    let began = Instant::now();
    while net.device_mut().poll().again {
        assert!(began.elapsed() < LONG, "the device has work without end: {net:?}");
    }
}

pub(crate) fn poll_both(a: &mut VirtioNet, b: &mut VirtioNet) {
    for _ in 0..3 {
        poll(a);
        poll(b);
    }
}

/// A frame between two stations, with a number in it.
pub(crate) fn frame(from: [u8; 6], to: [u8; 6], len: usize, number: u32) -> Vec<u8> {
    let mut bytes = [&to[..], &from, &[0x88, 0xb5], &number.to_le_bytes()].concat();
    bytes.extend((bytes.len()..len).map(|at| (at as u32 ^ number.wrapping_mul(0x9e37)) as u8));
    bytes
}

/// Long for one step, and far less than [`LONG`].
pub(crate) const STEP: Duration = Duration::from_secs(60);
