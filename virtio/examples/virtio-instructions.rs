//! Scenarios of a virtio-net device for counting instructions per packet, beside the rings' own of the
//! library's `examples/instructions.rs`. `.ci/instructions` runs both.
//!
//! The driver's side costs nothing that is worth counting: its descriptors never change, and for a
//! whole burst it stores one index. So the figures are those of the device and of the ring below it.
//!
//! ```text
//! virtio-instructions --list
//! virtio-instructions SCENARIO PACKETS
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::task::Poll;

use vmring::device::{Capabilities, Device, PollContext, Progress, Queue, QueueConfig, Wake};
use vmring::{
    Direction, Drive, Driver, Error, GuestMemory, GuestMmap, Interface, InterfaceConfig,
    InterfaceInfo, MacAddr6, SegmentTable, Status,
};
use vmring_core::guest::{GuestRegion, SEGMENTS_MAX};
use vmring_virtio::net::{Interrupt, NetDevice, NetSettings, QueueSetup};
use vmring_virtio::queue::{AddressSpace, QueueLayout};

/// The name of a scenario, and a function that runs the given number of packets.
type Scenario = (&'static str, fn(u64));

const SCENARIOS: &[Scenario] = &[
    ("ring-guest-rx-60-batch-32", |n| ring_alone(n, Direction::Read)),
    ("ring-guest-tx-60-batch-32", |n| ring_alone(n, Direction::Write)),
    ("virtio-rx-60-batch-32", |n| one_way(n, RX)),
    ("virtio-tx-60-batch-32", |n| one_way(n, TX)),
    ("virtio-embedded-60-batch-32", |n| guest_to_guest(n, 60)),
    ("virtio-embedded-1514-batch-32", |n| guest_to_guest(n, 1514)),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--list"] => {
            SCENARIOS.iter().for_each(|(name, _)| println!("{name}"));
            ExitCode::SUCCESS
        }
        [name, packets] => {
            let scenario = SCENARIOS.iter().find(|(known, _)| *known == name);
            let (Some((_, run)), Ok(packets)) = (scenario, packets.parse()) else {
                eprintln!("no scenario '{name}', or '{packets}' is no number; see --list");
                return ExitCode::from(2);
            };
            run(packets);
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: virtio-instructions --list | SCENARIO PACKETS");
            ExitCode::from(2)
        }
    }
}

/// The packet that the null device receives.
const NULL_LENGTH: usize = 60;

/// A device that takes guests' buffers, completes every slot at once and touches no byte.
struct Null;

impl Driver for Null {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, 1);
        Ok(Arc::new(NullDevice(InterfaceInfo::new(config, mac, 1500, 1514))))
    }
}

struct NullDevice(InterfaceInfo);

impl Device for NullDevice {
    fn name(&self) -> &str {
        "null"
    }

    fn info(&self) -> InterfaceInfo {
        self.0.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(1500, 1514);
        (caps.read_segments, caps.write_segments) = (SEGMENTS_MAX, SEGMENTS_MAX);
        (caps.checks_headers, caps.merges_reads) = (true, true);
        caps
    }

    fn queue(&self, _: QueueConfig, _: Wake) -> Result<Box<dyn Queue>, Error> {
        Ok(Box::new(NullQueue))
    }
}

struct NullQueue;

impl Queue for NullQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        while let Some(slot) = cx.take_read() {
            cx.complete_read(slot, NULL_LENGTH);
        }
        while let Some(slot) = cx.take_write() {
            cx.complete_write(slot);
        }
        Ok(Progress::Idle)
    }
}

/// The guest polls.
struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
}

const RX: u16 = 0;
const TX: u16 = 1;
const SIZE: u16 = 256;
const BATCH: u16 = 32;
/// The bytes of a queue's three parts together, and of a buffer.
const QUEUE: u64 = 0x4000;
const BUFFER: u64 = 2048;
const HEADER: u64 = 12;
/// Flags of a descriptor and of the available ring (virtio 1.2, sections 2.7.5 and 2.7.6).
const WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;

/// A guest, and the driver's side of its two queues. Each buffer is one descriptor.
struct Guest {
    device: NetDevice,
    memory: GuestMemory,
    /// The available indices.
    available: [u16; 2],
}

/// Where the parts of a queue are.
fn layout(queue: u16) -> QueueLayout {
    let descriptors = u64::from(queue) * QUEUE;
    QueueLayout {
        size: SIZE.into(),
        descriptors,
        available: descriptors + 0x1000,
        used: descriptors + 0x2000,
        addresses: AddressSpace::Guest,
        used_log: None,
    }
}

impl Guest {
    /// A guest that sends packets of `len` bytes with this Ethernet header.
    fn new(interface: Interface, header: &[u8; 14], len: u64) -> Self {
        let buffers = 2 * QUEUE;
        let bytes = buffers + 2 * u64::from(SIZE) * BUFFER;
        let mapping = GuestMmap::anonymous(bytes as usize).expect("memory");
        let memory =
            GuestMemory::new([GuestRegion::new(0, Arc::new(mapping))]).expect("one region");
        let write = |address, bytes: &[u8]| {
            let slice = memory.slice(address, bytes.len() as u32).expect("it is in the region");
            slice.copy_from(bytes);
        };
        for queue in [RX, TX] {
            let layout = layout(queue);
            write(layout.available, &NO_INTERRUPT.to_le_bytes());
            for i in 0..SIZE {
                let place = u64::from(queue * SIZE + i) * BUFFER + buffers;
                let (size, flags) = if queue == RX { (BUFFER, WRITE) } else { (HEADER + len, 0) };
                let at = u64::from(i);
                write(layout.descriptors + at * 16, &place.to_le_bytes());
                write(layout.descriptors + at * 16 + 8, &(size as u32).to_le_bytes());
                write(layout.descriptors + at * 16 + 12, &flags.to_le_bytes());
                write(layout.available + 4 + at * 2, &i.to_le_bytes());
                if queue == TX {
                    write(place + HEADER, header);
                }
            }
        }
        let settings = NetSettings::default();
        let mut device =
            NetDevice::new(interface, Arc::new(NoInterrupt), settings).expect("a device");
        device.set_features(device.features()).expect("they are offered");
        assert!(matches!(device.set_memory(&memory), Poll::Ready(Ok(()))));
        for queue in [RX, TX] {
            device.start_queue(queue, QueueSetup::new(layout(queue))).expect("it starts");
        }
        Self { device, memory, available: [0; 2] }
    }

    /// Makes `count` more buffers available. Chains are used in order, so the entries of the ring are
    /// the right ones already.
    fn offer(&mut self, queue: u16, count: u16) {
        let available = &mut self.available[usize::from(queue)];
        *available = available.wrapping_add(count);
        let place = self.memory.slice(layout(queue).available + 2, 2).expect("it is there");
        place.copy_from(&available.to_le_bytes());
    }

    fn poll(&mut self) {
        let _ = self.device.poll();
    }
}

/// Guests' buffers in one direction over a ring and a device that does nothing, without a virtqueue: what
/// a virtio-net device cannot save.
fn ring_alone(packets: u64, direction: Direction) {
    let interface = Interface::builder().device(Null).start().expect("null starts");
    let mapping = GuestMmap::anonymous(BUFFER as usize).expect("memory");
    let memory = GuestMemory::new([GuestRegion::new(0, Arc::new(mapping))]).expect("one region");
    let mut table = SegmentTable::new(memory.clone(), 4 * 256).expect("a table");
    let ring = interface.ring(direction).frames(1).segment_table(&table).drive(Drive::Inline);
    let ring = ring.mergeable_reads(direction == Direction::Read);
    let mut ring = ring.build().expect("a ring");
    let len = if direction == Direction::Read { BUFFER } else { HEADER + NULL_LENGTH as u64 };
    let mut bytes = 0;
    for burst in 0..packets / u64::from(BATCH) {
        for number in 0..u64::from(BATCH) {
            let slice = memory.slice(0, len as u32);
            let buffer = table.buffer_of(slice, HEADER as u32).expect("it has slots");
            let number = burst * u64::from(BATCH) + number;
            match direction {
                Direction::Read => ring.stage_read_guest(buffer, number),
                _ => ring.stage_write_guest(buffer, number),
            }
            .expect("the ring has credits");
        }
        ring.publish();
        ring.reap().for_each(|done| bytes += done.result.expect("it succeeds"));
    }
    let moved = packets / u64::from(BATCH) * u64::from(BATCH);
    assert_eq!(bytes, moved as usize * NULL_LENGTH);
}

/// Packets in one direction over a device that does nothing. Without its other direction's buffers that
/// direction costs a look at its queue for each burst.
fn one_way(packets: u64, queue: u16) {
    let interface = Interface::builder().device(Null).start().expect("null starts");
    let mut guest = Guest::new(interface, &[2; 14], NULL_LENGTH as u64);
    for _ in 0..packets / u64::from(BATCH) {
        guest.offer(queue, BATCH);
        guest.poll();
    }
    let stats = guest.device.stats();
    let moved = if queue == RX { stats.rx_packets } else { stats.tx_packets };
    assert_eq!(moved, packets / u64::from(BATCH) * u64::from(BATCH));
}

/// Packets from one guest to another over the embedded network, for guests without offload.
fn guest_to_guest(packets: u64, len: u64) {
    let start = || Interface::builder().device(vmring::Embedded::network("count")).start();
    let (one, other) = (start().expect("it starts"), start().expect("it starts"));
    let mut header = [0x88; 14];
    header[..6].copy_from_slice(&other.mac().into_array());
    header[6..12].copy_from_slice(&one.mac().into_array());
    let mut sender = Guest::new(one, &header, len);
    let mut receiver = Guest::new(other, &header, len);
    receiver.offer(RX, 2 * BATCH);
    receiver.poll();
    for _ in 0..packets / u64::from(BATCH) {
        sender.offer(TX, BATCH);
        sender.poll();
        receiver.poll();
        receiver.offer(RX, BATCH);
    }
    assert_eq!(receiver.device.stats().rx_packets, packets / u64::from(BATCH) * u64::from(BATCH));
}
