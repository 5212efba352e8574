//! A guest: a driver with both queues of a pair in one memory, and the device behind it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use vmring::{Embedded, GuestMmap, Interface};
use vmring_core::HeapBacking;
use vmring_core::guest::{DirtyLog, GuestMemory, GuestRegion};
use vmring_virtio::net::{Features, Interrupt, NetDevice, NetSettings, NetStats, QueueSetup};
use vmring_virtio::queue::{AddressSpace, QueueFeatures, QueueLayout, QueueState};

use crate::driver::shapes::Shape;
use crate::driver::{ARENA, Buffer, Driver};
use crate::support::LONG;

pub(crate) const HEADER: usize = 12;
/// The header that a packet arrives with when nothing is left to do.
pub(crate) const PLAIN: [u8; HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// What each queue has for its buffers.
const ARENA_LEN: u64 = 0x40_0000;
/// Where the rings of the queues are, and how far apart.
const RINGS: u64 = 0x1_0000;
const RING_SPACE: u64 = 0x2_0000;

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct Interrupts {
    queues: [AtomicU64; 8],
    config: AtomicU64,
}

impl Interrupts {
    pub(crate) fn of(&self, queue: u16) -> u64 {
        self.queues[usize::from(queue)].load(Ordering::SeqCst)
    }

    pub(crate) fn config(&self) -> u64 {
        self.config.load(Ordering::SeqCst)
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, index: u16) {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}

/// What a guest is made of.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) size: u16,
    /// Features that the driver does not accept.
    pub(crate) without: Features,
    pub(crate) settings: NetSettings,
    pub(crate) dirty_log: Option<Arc<dyn DirtyLog>>,
    pub(crate) base: u16,
}

impl Default for Options {
    fn default() -> Self {
        let settings = NetSettings::default();
        let without = Features::EVENT_IDX;
        Self { size: 256, without, settings, dirty_log: None, base: 0 }
    }
}

pub(crate) struct Guest {
    pub(crate) device: NetDevice,
    pub(crate) rx: Driver,
    pub(crate) tx: Driver,
    pub(crate) interrupts: Arc<Interrupts>,
    pub(crate) memory: GuestMemory,
}

/// A network of this test's own, on which nobody but its guests sends. With IPv6 its gateway would send
/// router advertisements that no guest has asked for.
pub(crate) fn quiet_network(name: &str) -> Embedded {
    Embedded::network(format!("virtio-net test {name}")).no_ipv6()
}

/// An interface on a network of this test's own.
pub(crate) fn interface(network: &str) -> Interface {
    let network = quiet_network(network);
    Interface::builder().device(network).start().expect("an interface")
}

/// Like [`memory`], in a file, so that others can map it elsewhere, as another process does.
pub(crate) fn memory_of(file: &File) -> GuestMemory {
    let regions = [(RINGS, 0, 8 * RING_SPACE), (ARENA, 8 * RING_SPACE, 2 * ARENA_LEN)];
    let regions = regions.map(|(address, offset, len)| {
        let map = GuestMmap::file(file, offset, len as usize).expect("a mapping");
        GuestRegion::new(address, Arc::new(map))
    });
    GuestMemory::new(regions).expect("the regions are apart")
}

/// The length of the file for [`memory_of`].
pub(crate) const FILE_LEN: u64 = 8 * RING_SPACE + 2 * ARENA_LEN;

/// The memory of a guest: the rings, and what the queues have for their buffers.
pub(crate) fn memory(dirty_log: Option<Arc<dyn DirtyLog>>) -> GuestMemory {
    let regions = [(RINGS, 8 * RING_SPACE), (ARENA, 2 * ARENA_LEN)];
    let regions = regions.map(|(address, len)| {
        GuestRegion::new(address, Arc::new(HeapBacking::new(len as usize)))
            .dirty_log(dirty_log.clone())
    });
    GuestMemory::new(regions).expect("the regions are apart")
}

/// Where a queue is.
pub(crate) fn layout(index: u16, size: u16) -> QueueLayout {
    let at = RINGS + u64::from(index) * RING_SPACE;
    let descriptors = at;
    let available = descriptors + u64::from(size) * 16;
    let used = (available + 6 + u64::from(size) * 2).next_multiple_of(4);
    let addresses = AddressSpace::Guest;
    QueueLayout { size: size.into(), descriptors, available, used, addresses, used_log: None }
}

/// A driver of a queue in a guest's memory.
pub(crate) fn driver(
    memory: &GuestMemory,
    index: u16,
    size: u16,
    accepted: Features,
    base: u16,
) -> Driver {
    let features = QueueFeatures::from_bits(accepted.bits());
    let arena = ARENA + u64::from(index % 2) * ARENA_LEN;
    Driver::over(memory.clone(), layout(index, size), features, base, ARENA_LEN).with_arena(arena)
}

impl Guest {
    pub(crate) fn new(network: &str) -> Self {
        Self::with(interface(network), &Options::default())
    }

    pub(crate) fn with(interface: Interface, options: &Options) -> Self {
        Self::over(interface, options, memory(options.dirty_log.clone()))
    }

    /// A guest with this memory.
    pub(crate) fn over(interface: Interface, options: &Options, memory: GuestMemory) -> Self {
        let interrupts = Arc::new(Interrupts::default());
        let device = NetDevice::new(interface, interrupts.clone(), options.settings);
        let mut device = device.expect("a device");
        let accepted = device.features().without(options.without);
        device.set_features(accepted).expect("they were offered");
        assert!(matches!(device.set_memory(&memory), Poll::Ready(Ok(()))));
        let [rx, tx] =
            [0, 1].map(|index| driver(&memory, index, options.size, accepted, options.base));
        let mut guest = Self { device, rx, tx, interrupts, memory };
        guest.start(options.base);
        guest
    }

    /// Starts both queues.
    pub(crate) fn start(&mut self, base: u16) {
        for index in [0, 1] {
            self.start_queue(index, base);
        }
    }

    pub(crate) fn start_queue(&mut self, index: u16, base: u16) {
        let layout = if index == 0 { self.rx.layout() } else { self.tx.layout() };
        let mut setup = QueueSetup::new(layout);
        setup.state = QueueState { next_available: base, next_used: base };
        self.device.start_queue(index, setup).expect("the queue starts");
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        self.device.config().mac
    }

    pub(crate) fn stats(&self) -> NetStats {
        self.device.stats()
    }

    /// A frame to another guest, of this length, with a number that tells it apart.
    pub(crate) fn frame_to(&self, to: [u8; 6], len: usize, number: u32) -> Vec<u8> {
        frame(self.mac(), to, len, number)
    }

    /// Posts one buffer for receiving. Returns whether there was space.
    pub(crate) fn post(&mut self, shape: &Shape) -> bool {
        let posted = self.rx.post(&shape.buffers, shape.indirect).is_some();
        self.rx.expose();
        posted
    }

    /// Posts as many as there is space for, at most `most`.
    pub(crate) fn fill(&mut self, shape: &Shape, most: usize) -> usize {
        (0..most).take_while(|_| self.post(shape)).count()
    }

    /// Sends a packet in buffers of these lengths, which are cut or extended to the packet's.
    pub(crate) fn send_in(&mut self, packet: &[u8], lens: &[u32], indirect: Option<usize>) -> bool {
        self.send_raw(&PLAIN_TO_SEND, packet, lens, indirect)
    }

    pub(crate) fn send_raw(
        &mut self,
        header: &[u8],
        packet: &[u8],
        lens: &[u32],
        indirect: Option<usize>,
    ) -> bool {
        let bytes = [header, packet].concat();
        let mut shape = Vec::new();
        let mut left = bytes.len() as u32;
        for &len in lens {
            let len = len.min(left);
            left -= len;
            if len > 0 {
                shape.push((len, false));
            }
        }
        if left > 0 {
            shape.push((left, false));
        }
        let indirect = indirect.filter(|first| *first < shape.len());
        let Some(head) = self.tx.post(&shape, indirect) else { return false };
        let mut written = 0;
        for buffer in self.tx.buffers(head).to_vec() {
            let end = written + buffer.len as usize;
            self.tx.write(buffer.address, &bytes[written..end]);
            written = end;
        }
        self.tx.expose();
        true
    }

    /// Sends a packet in one buffer.
    pub(crate) fn send(&mut self, packet: &[u8]) {
        assert!(self.send_in(packet, &[u32::MAX], None), "there is space");
    }

    /// Polls until there is nothing more to do now.
    pub(crate) fn poll(&mut self) {
        let began = Instant::now();
        while self.device.poll().again {
            assert!(began.elapsed() < LONG, "the device has work without end: {:?}", self.device);
        }
    }

    /// What was received since the last call: used lengths, and the bytes with headers.
    pub(crate) fn returned(&mut self) -> Vec<(u32, Vec<u8>)> {
        let returned = self.rx.collect();
        returned.into_iter().map(|one| (one.len, gather(&self.rx, &one.buffers, one.len))).collect()
    }

    /// The packets that were received since the last call. Each has a plain header, and fills one
    /// chain.
    pub(crate) fn received(&mut self) -> Vec<Vec<u8>> {
        self.returned()
            .into_iter()
            .map(|(len, bytes)| {
                assert_eq!(len as usize, bytes.len());
                assert_eq!(bytes[..HEADER], PLAIN, "{len}");
                bytes[HEADER..].to_vec()
            })
            .collect()
    }
}

/// The header of a packet with nothing left to do.
pub(crate) const PLAIN_TO_SEND: [u8; HEADER] = [0; HEADER];

/// The first bytes of a chain that the device may write.
fn gather(driver: &Driver, buffers: &[Buffer], len: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for buffer in buffers.iter().filter(|buffer| buffer.writable) {
        let left = len - bytes.len() as u32;
        bytes.extend(driver.read(buffer.address, buffer.len.min(left)));
    }
    bytes
}

/// A frame between two stations, with a number in it. It has at least 18 bytes.
pub(crate) fn frame(from: [u8; 6], to: [u8; 6], len: usize, number: u32) -> Vec<u8> {
    let mut bytes = [&to[..], &from, &[0x88, 0xb5], &number.to_le_bytes()].concat();
    bytes.extend((bytes.len()..len).map(|at| (at as u32 ^ number.wrapping_mul(0x9e37)) as u8));
    bytes.truncate(len);
    bytes
}

/// A UDP packet of a flow of its own, of 60 bytes.
pub(crate) fn of_flow(from: [u8; 6], to: [u8; 6], flow: u16) -> Vec<u8> {
    let mut bytes = [&to[..], &from, &[8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
    bytes.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend(flow.to_be_bytes());
    bytes.extend([0, 9, 0, 26, 0, 0]);
    bytes.resize(60, 0);
    bytes
}

/// An interface on a network of this test's own, with this many queues.
pub(crate) fn wide_interface(network: &str, queues: usize) -> Interface {
    let network = quiet_network(network).queues(queues);
    Interface::builder().device(network).start().expect("an interface")
}

/// Whether a descriptor becomes readable within this time.
pub(crate) fn readable(fd: impl AsFd, timeout: Duration) -> bool {
    use std::os::fd::AsRawFd;
    let mut entry = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the pointer is to one entry, which lives until the call returns.
    let count = unsafe { libc::poll(&mut entry, 1, timeout.as_millis() as libc::c_int) };
    count == 1
}

/// Polls two guests until neither has anything to do.
pub(crate) fn poll_both(a: &mut Guest, b: &mut Guest) {
    for _ in 0..3 {
        a.poll();
        b.poll();
    }
}
