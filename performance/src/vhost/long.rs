//! Packets of 64 KiB from one guest of this program to another, over mergeable buffers.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use vmring::config::Offloads;
use vmring::guest::GuestRegion;
use vmring::{Embedded, GuestMemory, GuestMmap, Interface};
use vmring_virtio::net::{Features, Interrupt, NetDevice, NetSettings, QueueSetup};
use vmring_virtio::queue::{AddressSpace, QueueLayout};

use crate::common::{pinned, take_turns, time_packets};
use crate::guests::LONG_PACKET;
use crate::plan::Plan;
use crate::report::{Table, Want};
use crate::result::Result;

pub(super) const NAME: &str = "vhost, 64 KiB";

const RX: u16 = 0;
const TX: u16 = 1;
const SIZE: u32 = 256;
/// The bytes of a buffer: a page.
const BUFFER: u64 = 4096;
/// The buffers of one packet with its header.
const PARTS: u32 = (LONG_PACKET as u64 + HEADER).div_ceil(BUFFER) as u32;
const HEADER: u64 = 12;
/// The bytes of a queue's three parts together.
const QUEUE: u64 = 0x4000;
/// Flags of a descriptor and of the available ring (virtio 1.2, sections 2.7.5 and 2.7.6).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;

struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
}

fn layout(queue: u16) -> QueueLayout {
    let descriptors = u64::from(queue) * QUEUE;
    QueueLayout {
        size: SIZE,
        descriptors,
        available: descriptors + 0x1000,
        used: descriptors + 0x2000,
        addresses: AddressSpace::Guest,
        used_log: None,
    }
}

/// A guest, and the driver's side of its queues. The buffers for receiving have one descriptor each; a
/// packet to send has [`PARTS`] of them. The descriptors never change.
struct Guest {
    device: NetDevice,
    memory: GuestMemory,
    available: [u16; 2],
}

impl Guest {
    fn new(
        interface: Interface,
        buffers_of: Buffers,
        accepts: impl FnOnce(Features) -> Features,
    ) -> Result<Self> {
        let buffers = 2 * QUEUE;
        let len = buffers + 2 * u64::from(SIZE) * BUFFER;
        let mapping = GuestMmap::anonymous(len as usize)?;
        let memory = GuestMemory::new([GuestRegion::new(0, Arc::new(mapping))])?;
        let device = NetDevice::new(interface, Arc::new(NoInterrupt), NetSettings::default())?;
        let mut guest = Self { device, memory, available: [0; 2] };
        for queue in [RX, TX] {
            guest.write(layout(queue).available, &NO_INTERRUPT.to_le_bytes());
            for i in 0..SIZE {
                let place = buffers + buffers_of.place(queue, i);
                let (len, flags) = match queue {
                    RX => (BUFFER, WRITE),
                    _ if i % PARTS < PARTS - 1 => (BUFFER, NEXT),
                    _ => (LONG_PACKET as u64 + HEADER - u64::from(PARTS - 1) * BUFFER, 0),
                };
                let at = layout(queue).descriptors + u64::from(i) * 16;
                guest.write(at, &place.to_le_bytes());
                guest.write(at + 8, &(len as u32).to_le_bytes());
                guest.write(at + 12, &flags.to_le_bytes());
                guest.write(at + 14, &(i as u16 + 1).to_le_bytes());
                // Chains are used in order, so these entries are always the right ones.
                let head = if queue == RX { i } else { i % (SIZE / PARTS) * PARTS };
                let at = layout(queue).available + 4 + u64::from(i) * 2;
                guest.write(at, &(head as u16).to_le_bytes());
            }
        }
        guest.device.set_features(accepts(guest.device.features()))?;
        if !matches!(guest.device.set_memory(&guest.memory), Poll::Ready(Ok(()))) {
            return Err("a new device does not take its memory".into());
        }
        for queue in [RX, TX] {
            guest.device.start_queue(queue, QueueSetup::new(layout(queue)))?;
        }
        Ok(guest)
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let slice = self.memory.slice(address, bytes.len() as u32);
        slice.expect("the layout is inside").copy_from(bytes);
    }

    /// Writes the Ethernet header of every packet to send.
    fn address(&self, buffers_of: Buffers, to: [u8; 6], from: [u8; 6]) {
        for packet in 0..SIZE / PARTS {
            let place = 2 * QUEUE + buffers_of.place(TX, packet * PARTS) + HEADER;
            self.write(place, &[&to[..], &from, &[0x88, 0xb5]].concat());
        }
    }

    /// Lets the device do all that there is to do.
    fn poll(&mut self) {
        while self.device.poll().again {}
    }

    fn offer(&mut self, queue: u16, count: u16) {
        let available = &mut self.available[usize::from(queue)];
        *available = available.wrapping_add(count);
        let index = *available;
        self.write(layout(queue).available + 2, &index.to_le_bytes());
    }
}

/// Which memory the buffers of a queue are in.
#[derive(Clone, Copy)]
enum Buffers {
    /// Each has memory of its own: 1 MiB for each queue.
    Own,
    /// Each packet to send is in the same memory, and each second packet that is received: 204 KiB for
    /// both queues, which fit into the processor's second cache together with a frame.
    Shared,
}

impl Buffers {
    /// Where a buffer is, behind the first one.
    fn place(self, queue: u16, index: u32) -> u64 {
        let own = match (self, queue) {
            (Self::Own, _) => index,
            (Self::Shared, RX) => index % (2 * PARTS),
            (Self::Shared, _) => index % PARTS,
        };
        u64::from(u32::from(queue) * SIZE + own) * BUFFER
    }

    /// Packets that are sent at once, and that both queues have space for.
    fn batch(self) -> u32 {
        match self {
            Self::Own => 4,
            Self::Shared => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Own => "2 MiB",
            Self::Shared => "204 KiB",
        }
    }
}

/// How often a packet is copied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copies {
    /// The copy alone, without queues.
    Bare,
    Once,
    /// The receiver has not accepted an offload that its interface has, so each packet goes through a
    /// frame of the device.
    Bounced,
}

#[derive(Clone, Copy)]
struct Method {
    copies: Copies,
    buffers: Buffers,
}

impl Method {
    fn name(self) -> &'static str {
        match self.copies {
            Copies::Bare => "the copy alone",
            Copies::Once => "one copy",
            Copies::Bounced => "through a frame, two copies",
        }
    }

    fn measure(self, time: Duration) -> Result<f64> {
        let Self { copies, buffers: buffers_of } = self;
        if copies == Copies::Bare {
            return self.copy(time);
        }
        let start = |offloads| {
            let device = Embedded::network("performance, long");
            let interface = Interface::builder().device(device).mtu(LONG_PACKET as u32 - 14);
            interface.offloads(offloads).start()
        };
        let one = start(Offloads::default())?;
        let mut offloads = Offloads::default();
        offloads.checksum = copies == Copies::Bounced;
        let other = start(offloads)?;
        let (from, to) = (one.mac().into_array(), other.mac().into_array());
        let mut sender = Guest::new(one, buffers_of, |all| all)?;
        let without_checksums = |all: Features| all.without(Features::GUEST_CSUM);
        let mut receiver = Guest::new(other, buffers_of, without_checksums)?;
        sender.address(buffers_of, to, from);
        let batch = buffers_of.batch();
        let buffers = (batch * PARTS) as u16;
        receiver.offer(RX, 2 * buffers);
        let mut received = 0;
        time_packets(time, 16, || {
            receiver.poll();
            sender.offer(TX, batch as u16);
            sender.poll();
            receiver.poll();
            receiver.offer(RX, buffers);
            let stats = receiver.device.stats();
            let came = stats.rx_packets - received;
            received = stats.rx_packets;
            if came != u64::from(batch) || stats.rx_bytes != received * LONG_PACKET as u64 {
                return Err(format!("{came} of {batch} packets came: {stats:?}").into());
            }
            Ok(came)
        })
    }

    /// Copies from the buffers of one guest's packets to those of another guest, and does nothing else.
    fn copy(self, time: Duration) -> Result<f64> {
        let memory = || -> Result<GuestMemory> {
            let mapping = GuestMmap::anonymous((2 * u64::from(SIZE) * BUFFER) as usize)?;
            Ok(GuestMemory::new([GuestRegion::new(0, Arc::new(mapping))])?)
        };
        let (from, to) = (memory()?, memory()?);
        let mut at = [0; 2];
        time_packets(time, 16, || {
            for part in 0..PARTS {
                let len = (LONG_PACKET as u64 - u64::from(part) * BUFFER).min(BUFFER) as u32;
                let bytes = from.slice(self.buffers.place(TX, (at[0] + part) % SIZE), len);
                let space = to.slice(self.buffers.place(RX, (at[1] + part) % SIZE), len);
                let (Some(bytes), Some(space)) = (bytes, space) else {
                    return Err("a buffer is outside of the memory".into());
                };
                space.copy_from_guest(bytes);
            }
            at[0] = (at[0] + PARTS) % (SIZE / PARTS * PARTS);
            at[1] = (at[1] + PARTS) % SIZE;
            Ok(1)
        })
    }
}

pub(super) fn run(plan: Plan) -> Result<(Table, Vec<Want>)> {
    let mut methods: Vec<Method> = [Buffers::Own, Buffers::Shared]
        .into_iter()
        .flat_map(|buffers| {
            let copies = [Copies::Bare, Copies::Once, Copies::Bounced];
            copies.map(|copies| Method { copies, buffers })
        })
        .collect();
    let measured = take_turns(plan, &mut methods, |method| {
        let method = *method;
        pinned(move || method.measure(plan.time))
    })?;
    let mut table = Table::new(
        NAME,
        "packets of 64 KiB from guest to guest in buffers of 4 KiB, on one thread",
        &["buffers", "way"],
        &["ns/packet", "GB/s"],
    );
    let mut medians = Vec::new();
    for (method, values) in methods.iter().zip(&measured) {
        let rates: Vec<f64> = values.iter().map(|ns| LONG_PACKET as f64 / ns).collect();
        medians.push(table.row(&[method.buffers.name(), method.name()], &[values, &rates]));
    }
    let wants = [0, 3].map(|first| {
        let name = methods[first].buffers.name();
        let (once, twice) = (medians[first + 1], medians[first + 2]);
        let name = format!("64 KiB, mergeable, buffers of {name}: two copies / one");
        Want::at_least(name, twice / once, 1.6)
    });
    Ok((table, wants.into()))
}
