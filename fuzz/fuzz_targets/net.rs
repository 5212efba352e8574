//! A whole network device under a hostile guest, on a port of the embedded network: descriptors,
//! feature bits and memory that change at any moment. The device must not panic, must sleep in the end,
//! must give back what it has got, and must enter every byte that it writes into the dirty log after
//! the write. Two others on the same network exchange a packet afterwards as if nothing had happened.
#![no_main]

use std::num::Wrapping;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::Poll;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmring::config::Offloads;
use vmring::device::embedded::SourceRule;
use vmring::{Direction, Drive, Embedded, Interface, OFFLOAD_LEN, OffloadHeader, Ring};
use vmring_core::HeapBacking;
use vmring_core::guest::{DirtyLog, GuestMapping, GuestMemory, GuestRegion};
use vmring_virtio::net::{Features, Interrupt, NetDevice, NetSettings, QueueSetup};
use vmring_virtio::queue::{AddressSpace, QueueLayout, QueueState};

/// The first region holds the queues. The second one is adjacent, and the third one is apart.
const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (0x4000, 0x4003), (0x1_0001, 0x8000)];
const END: usize = 0x1_8001;
/// What each queue has for its parts.
const QUEUE_SPACE: u64 = 0x400;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x180;
const SIZE_MAX: u16 = 16;
const NETWORK: &str = "net";

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    settings: u16,
    offloads: u8,
    shift: u8,
    depth: u8,
    budget: u8,
    refused: u64,
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// Changes any bytes.
    Write {
        at: u16,
        bytes: [u8; 8],
    },
    /// Changes a descriptor of a queue.
    Describe {
        queue: u8,
        index: u8,
        address: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// Makes a descriptor anywhere, for an indirect table.
    DescribeAt {
        at: u16,
        address: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// Makes heads available, so that the available index is so far ahead of the used index.
    Expose {
        queue: u8,
        ahead: u8,
        heads: [u8; 4],
    },
    /// A packet with its header, in one chain.
    Send {
        at: u16,
        header: [u8; OFFLOAD_LEN],
        to: u8,
        bytes: &'a [u8],
    },
    /// Buffers to receive into: so many, of this length.
    Receive {
        queue: u8,
        at: u16,
        len: u16,
        count: u8,
    },
    /// A command of the control queue.
    Command {
        class: u8,
        number: u8,
        data: [u8; 8],
    },
    Poll,
    Arm,
    Restart {
        queue: u8,
        from: Option<u16>,
    },
    Enable {
        queue: u8,
        on: bool,
    },
    Pause,
    Resume,
    Reset {
        refused: u64,
    },
    SetMemory {
        without: u8,
        logged: bool,
    },
    Link(bool),
    Announce,
    Mtu(u16),
    Restore {
        at: u8,
        byte: u8,
    },
    /// Buffers, and at once a packet for them, or for too few of them.
    Exchange {
        at: u16,
        len: u16,
        count: u8,
        header: Option<[u8; OFFLOAD_LEN]>,
        size: u16,
    },
    /// Somebody else sends to the guest or to everybody.
    Arrive {
        all: bool,
        header: Option<[u8; OFFLOAD_LEN]>,
        len: u16,
        bytes: &'a [u8],
    },
}

/// A guest's memory, and the copy of a front end that takes each dirty page as soon as it is marked.
struct Memory {
    whole: GuestMemory,
    copy: Mutex<Vec<u8>>,
}

impl DirtyLog for Memory {
    fn mark(&self, guest_address: u64, len: u64) {
        let mut copy = self.copy.lock().expect("the device has not panicked");
        self.copy_to(guest_address, len as u32, &mut copy);
    }
}

impl Memory {
    fn copy_to(&self, guest_address: u64, len: u32, copy: &mut [u8]) {
        for piece in self.whole.slices(guest_address, len).map_while(Result::ok) {
            piece.copy_to(&mut copy[piece.guest_address() as usize..]);
        }
    }

    /// The guest itself writes, which needs no mark of the device.
    fn write(&self, at: u64, bytes: &[u8]) {
        let mut left = bytes;
        for piece in self.whole.slices(at, bytes.len() as u32).map_while(Result::ok) {
            left = &left[piece.copy_from(left)..];
        }
        self.mark(at, bytes.len() as u64);
    }

    fn index(&self, at: u64) -> u16 {
        let bytes = self.whole.slice(at, 2).and_then(|bytes| bytes.read());
        u16::from_le_bytes(bytes.expect("the rings are in memory"))
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; END];
        for (start, len) in REGIONS {
            self.copy_to(start, len as u32, &mut bytes);
        }
        bytes
    }

    /// Whether the copy is what the guest's memory is.
    fn check(&self) {
        let copy = self.copy.lock().expect("the device has not panicked");
        let now = self.bytes();
        // A comparison of all bytes at once, because a fuzzer watches each comparison.
        if now != *copy {
            let at = now.iter().zip(&*copy).position(|(now, copy)| now != copy);
            panic!("a write at {at:x?} is not in the dirty log");
        }
    }
}

struct Quiet;

impl Interrupt for Quiet {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
}

/// Somebody honest on the same network.
struct Peer {
    ring: Ring,
    /// It is the last field, as a ring is dropped before its interface.
    interface: Interface,
}

impl Peer {
    fn new(network: Embedded, offloads: Offloads) -> Self {
        let interface = Interface::builder().device(network).offloads(offloads).start();
        let interface = interface.expect("an interface");
        let ring = interface.ring(Direction::Both).depth(8).frames(12).drive(Drive::Inline);
        let ring = ring.build().expect("a ring");
        Self { interface, ring }
    }

    fn mac(&self) -> [u8; 6] {
        self.interface.mac().into_array()
    }

    /// Posts what is free, and returns what has arrived.
    fn turn(&mut self) -> Vec<Vec<u8>> {
        let mut came = Vec::new();
        for _ in 0..4 {
            for done in self.ring.reap() {
                if done.user_data == 1
                    && let Ok(packet) = done.take_packet()
                {
                    came.push(packet.to_vec());
                }
            }
            // Some frames are kept to send with.
            for _ in 0..6 {
                let Some(frame) = self.ring.alloc() else { break };
                if self.ring.submit_read(frame, 1).is_err() {
                    break;
                }
            }
        }
        came
    }

    fn send(&mut self, header: Option<OffloadHeader>, packet: &[u8]) {
        let Some(mut frame) = self.ring.alloc() else { return };
        if frame.copy_from(packet).is_ok()
            && header.is_none_or(|header| frame.set_offload(&header).is_ok())
        {
            let _ = self.ring.submit_write(frame, 0);
        }
    }
}

struct Guest {
    device: NetDevice,
    memory: Arc<Memory>,
    mappings: Vec<Arc<dyn GuestMapping>>,
    size: u16,
    /// Counts the descriptors that whole packets and buffers were put into.
    next: Wrapping<u16>,
}

impl Guest {
    fn memory(&self, without: usize, logged: bool) -> GuestMemory {
        let log: Option<Arc<dyn DirtyLog>> = logged.then(|| self.memory.clone() as _);
        let regions = REGIONS.iter().zip(&self.mappings).enumerate();
        let regions = regions.filter(|(number, _)| *number != without).map(|(_, (region, map))| {
            GuestRegion::new(region.0, map.clone()).dirty_log(log.clone())
        });
        GuestMemory::new(regions).expect("valid regions")
    }

    /// The queue that a number stands for.
    fn queue(&self, number: u8) -> u16 {
        u16::from(number) % self.device.queue_count()
    }

    fn place(&self, queue: u16) -> u64 {
        u64::from(queue) * QUEUE_SPACE
    }

    fn start(&mut self, queue: u16, from: Option<u16>) {
        let at = self.place(queue);
        let mut setup = QueueSetup::new(QueueLayout {
            size: self.size.into(),
            descriptors: at,
            available: at + AVAILABLE,
            used: at + USED,
            addresses: AddressSpace::Guest,
            used_log: None,
        });
        let used = self.memory.index(at + USED + 2);
        let next = from.unwrap_or(used);
        setup.state = QueueState { next_available: next, next_used: next };
        // It may run, or the first region may be gone.
        let _ = self.device.start_queue(queue, setup);
    }

    fn accept(&mut self, refused: u64) {
        // Mostly a driver of today.
        let needed = Features::VERSION_1.bits();
        let accepted = self.device.features().without(Features::from_bits(refused & !needed));
        self.device.set_features(accepted).expect("they were offered");
        for queue in 0..self.device.queue_count() {
            self.start(queue, None);
        }
    }

    fn describe(&self, queue: u16, index: u16, descriptor: [u8; 16]) {
        let index = u64::from(index % SIZE_MAX);
        self.memory.write(self.place(queue) + index * 16, &descriptor);
    }

    /// Makes heads available behind what is used, and shows `ahead` of them.
    fn expose(&self, queue: u16, ahead: u16, heads: impl IntoIterator<Item = u16>) {
        let at = self.place(queue);
        let used = self.memory.index(at + USED + 2);
        for (i, head) in heads.into_iter().enumerate() {
            let slot = used.wrapping_add(i as u16) % self.size;
            let place = at + AVAILABLE + 4 + u64::from(slot) * 2;
            self.memory.write(place, &head.to_le_bytes());
        }
        let index = used.wrapping_add(ahead);
        self.memory.write(at + AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Adds one chain behind what is available.
    fn add(&mut self, queue: u16, parts: &[[u8; 16]]) {
        let at = self.place(queue);
        let head = self.next.0 % self.size;
        for (i, part) in parts.iter().enumerate() {
            self.describe(queue, (self.next.0 + i as u16) % self.size, *part);
        }
        self.next += parts.len() as u16;
        let index = self.memory.index(at + AVAILABLE + 2);
        let place = at + AVAILABLE + 4 + u64::from(index % self.size) * 2;
        self.memory.write(place, &head.to_le_bytes());
        self.memory.write(at + AVAILABLE + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// The last of several calls, when a device has nothing to do any more.
    fn poll(&mut self) {
        for polls in 0.. {
            assert!(polls < 10_000, "it has work without end: {:?}", self.device);
            if !self.device.poll().again {
                return self.memory.check();
            }
        }
    }

    /// Calls something again until it is ready.
    fn ready<T>(&mut self, mut step: impl FnMut(&mut NetDevice) -> Poll<T>) -> T {
        for _ in 0..100 {
            if let Poll::Ready(ready) = step(&mut self.device) {
                return ready;
            }
            let _ = self.device.poll();
        }
        panic!("something is held for ever: {:?}", self.device);
    }

    fn restart(&mut self, queue: u16, from: Option<u16>) {
        let state = self.ready(|device| device.stop_queue(queue));
        if let Some(QueueState { next_available, next_used }) = state {
            assert_eq!(next_available, next_used);
        }
        self.start(queue, from);
    }
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

fn offloads(bits: u8) -> Offloads {
    let mut offloads = Offloads::default();
    (offloads.checksum, offloads.tso4) = (bits & 1 != 0, bits & 2 != 0);
    (offloads.tso6, offloads.uso) = (bits & 4 != 0, bits & 8 != 0);
    offloads
}

/// An address in a region, or shortly behind one.
fn address(number: u16) -> u64 {
    match number {
        0..0x8010 => number.into(),
        number => 0x1_0000 + u64::from(number - 0x8010),
    }
}

fn receive(guest: &mut Guest, queue: u8, at: u16, len: u16, count: u8) {
    let queue = guest.queue(queue);
    for i in 0..u64::from(count % 17) {
        let at = address(at) + i * u64::from(len);
        guest.add(queue, &[descriptor(at, len.into(), 2, 0)]);
    }
}

/// Lets a packet arrive. One of the peers leaves work to others.
fn arrive(
    guest: &Guest,
    peers: &mut [Peer; 2],
    all: bool,
    header: Option<[u8; OFFLOAD_LEN]>,
    len: u16,
    bytes: &[u8],
) {
    let to = if all { [0xff; 6] } else { guest.device.config().mac };
    let sender = usize::from(header.is_some());
    let from = peers[sender].mac();
    let mut packet = [&to[..], &from, bytes].concat();
    packet.resize(packet.len().max(len.into()), 7);
    let parse = OffloadHeader::parse_ignoring_reserved;
    let header = header.and_then(|header| parse(&header).ok());
    peers[sender].send(header, &packet);
    peers.iter_mut().for_each(|peer| drop(peer.turn()));
}

fuzz_target!(|input: Input| {
    let has = |bit: u32| input.settings & (1 << bit) != 0;
    let network = || match has(0) {
        true => Embedded::network(NETWORK).no_ipv6(),
        false => Embedded::switch(NETWORK),
    };
    let rule = if has(1) { SourceRule::LearnOnce } else { SourceRule::Any };
    let interface = Interface::builder()
        .device(network().source(rule))
        .offloads(offloads(input.offloads))
        .start()
        .expect("an interface");
    // An interface costs a thread until it is there, so the others stay from run to run.
    static PEERS: OnceLock<Mutex<[[Peer; 2]; 2]>> = OnceLock::new();
    let peers = PEERS.get_or_init(|| {
        let pair =
            |network: Embedded| [0, 15].map(|bits| Peer::new(network.clone(), offloads(bits)));
        Mutex::new([Embedded::switch(NETWORK), Embedded::network(NETWORK).no_ipv6()].map(pair))
    });
    let peers = &mut peers.lock().expect("no run has panicked")[usize::from(has(0))];
    let mut settings = NetSettings::default();
    settings.queue_pairs = 1 + u16::from(has(2));
    settings.control_queue = has(3);
    settings.ring_reset = has(4);
    settings.guest_announce = has(5);
    settings.depth = 1 << (input.depth % 6);
    settings.budget = 1 + u16::from(input.budget % 40);
    let device = NetDevice::new(interface, Arc::new(Quiet), settings).expect("a device");
    let mappings = REGIONS.map(|(_, len)| Arc::new(HeapBacking::new(len)) as Arc<dyn GuestMapping>);
    let whole = REGIONS.iter().zip(&mappings).map(|(at, map)| GuestRegion::new(at.0, map.clone()));
    let whole = GuestMemory::new(whole).expect("valid regions");
    let memory = Arc::new(Memory { whole, copy: Mutex::new(vec![0; END]) });
    let size = 1 << (input.shift % 5);
    let mappings = mappings.into();
    let mut guest = Guest { device, memory, mappings, size, next: Wrapping(0) };
    let all = guest.memory(usize::MAX, true);
    assert!(matches!(guest.device.set_memory(&all), Poll::Ready(Ok(()))));
    drop(all);
    guest.accept(input.refused);

    for step in &input.steps[..input.steps.len().min(300)] {
        match step {
            Step::Write { at, bytes } => guest.memory.write(address(*at), bytes),
            Step::Describe { queue, index, address: at, len, flags, next } => {
                let next = u16::from(next % 20);
                let part = descriptor(address(*at), (*len).into(), u16::from(flags & 7), next);
                guest.describe(guest.queue(*queue), (*index).into(), part);
            }
            Step::DescribeAt { at, address: to, len, flags, next } => {
                let next = u16::from(next % 20);
                let part = descriptor(address(*to), (*len).into(), u16::from(flags & 7), next);
                guest.memory.write(address(*at), &part);
            }
            Step::Expose { queue, ahead, heads } => {
                let heads = heads.map(|head| u16::from(head % 20));
                guest.expose(guest.queue(*queue), u16::from(ahead % 20), heads);
            }
            Step::Send { at, header, to, bytes } => {
                let to = match to % 4 {
                    0 => [0xff; 6],
                    1 => guest.device.config().mac,
                    number => peers[usize::from(number) - 2].mac(),
                };
                let from = guest.device.config().mac;
                let packet = [&header[..], &to, &from, bytes].concat();
                let at = address(*at);
                guest.memory.write(at, &packet);
                guest.add(1, &[descriptor(at, packet.len() as u32, 0, 0)]);
            }
            Step::Receive { queue, at, len, count } => {
                receive(&mut guest, queue & !1, *at, *len, *count);
            }
            Step::Command { class, number, data } => {
                if settings.control_queue {
                    let queue = guest.device.control_index();
                    let at = 0x3000;
                    guest.memory.write(at, &[&[class % 7, number % 4], &data[..]].concat());
                    let next = (guest.next.0 + 1) % guest.size;
                    let answer = descriptor(at + 16, 1, 2, 0);
                    guest.add(queue, &[descriptor(at, 10, 1, next), answer]);
                }
            }
            Step::Poll => guest.poll(),
            Step::Arm => {
                let _ = guest.device.arm();
            }
            Step::Restart { queue, from } => guest.restart(guest.queue(*queue), *from),
            Step::Enable { queue, on } => guest.device.enable_queue(guest.queue(*queue), *on),
            Step::Pause => {
                guest.ready(NetDevice::pause);
                for (_, QueueState { next_available, next_used }) in guest.device.queue_states() {
                    assert_eq!(next_available, next_used);
                }
            }
            Step::Resume => guest.device.resume(),
            Step::Reset { refused } => {
                guest.ready(NetDevice::reset);
                guest.accept(*refused);
            }
            Step::SetMemory { without, logged } => {
                // A front end copies everything when the log begins.
                let copy = guest.memory.bytes();
                *guest.memory.copy.lock().expect("no panic") = copy;
                let without = if *logged { usize::MAX } else { usize::from(*without % 4) };
                let memory = guest.memory(without, true);
                let _ = guest.ready(|device| device.set_memory(&memory));
            }
            Step::Link(up) => guest.device.set_link(*up),
            Step::Announce => {
                let mac = guest.device.config().mac;
                guest.device.announce(mac);
                guest.device.request_announcement();
            }
            Step::Mtu(mtu) => {
                guest.device.set_mtu(*mtu);
            }
            Step::Restore { at, byte } => {
                guest.ready(NetDevice::pause);
                let mut snapshot = guest.device.snapshot();
                guest.ready(NetDevice::reset);
                let place = usize::from(*at) % snapshot.len();
                snapshot[place] ^= byte;
                match guest.device.restore(&snapshot) {
                    Ok(queues) => {
                        for queue in queues {
                            guest.start(queue.index, Some(queue.state.next_used));
                            guest.device.enable_queue(queue.index, queue.enabled);
                        }
                    }
                    Err(_) => guest.accept(0),
                }
            }
            Step::Exchange { at, len, count, header, size } => {
                receive(&mut guest, 0, *at, *len, *count);
                guest.poll();
                arrive(&guest, peers, false, *header, *size % 4000, &[0x88, 0xb5]);
                guest.poll();
            }
            Step::Arrive { all, header, len, bytes } => {
                arrive(&guest, peers, *all, *header, *len, bytes);
            }
        }
    }

    guest.device.resume();
    guest.poll();
    guest.poll();
    // Only a device that was woken in between stays awake.
    assert!((0..4).any(|_| guest.device.arm() || guest.device.poll().again), "it does not sleep");
    guest.ready(NetDevice::reset);
    guest.memory.check();

    // What the guest has sent may be in front.
    peers.iter_mut().for_each(|peer| drop((peer.turn(), peer.turn())));
    let (to, from) = (peers[1].mac(), peers[0].mac());
    let packet = [&to[..], &from, &[0x88, 0xb5], &[9; 500]].concat();
    peers[0].send(None, &packet);
    let came = [peers[0].turn(), peers[1].turn(), peers[1].turn()].concat();
    assert_eq!(came.iter().filter(|one| **one == packet).count(), 1, "another's packet is lost");
    // Beside the device only `mappings` and `whole` hold the memory.
    drop(guest.device);
    let held = guest.mappings.iter().map(Arc::strong_count);
    assert_eq!(held.max(), Some(2), "something keeps the guest's memory");
});
