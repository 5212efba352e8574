//! A driver of a split virtqueue, as a guest has one (virtio 1.2, sections 2.7.13 and 2.7.14). It
//! checks what the device gives back: heads, order and lengths.

pub(crate) mod shapes;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use vmring_core::HeapBacking;
use vmring_core::guest::{DirtyLog, GuestMemory, GuestRegion, GuestSlice};
use vmring_virtio::queue::{
    AddressSpace, Queue, QueueError, QueueFeatures, QueueLayout, QueueState,
};

/// Flags of a descriptor.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// How far a front end's addresses are from the guest's.
pub(crate) const FRONT_END: u64 = 0x7f00_0000_0000;

/// Where the driver's buffers are.
pub(crate) const ARENA: u64 = 0x4000_0000;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// A descriptor, as it is in a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// A chain that came back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Returned {
    pub(crate) head: u16,
    pub(crate) len: u32,
    pub(crate) buffers: Vec<Buffer>,
}

/// What a guest is made of.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) size: u16,
    pub(crate) features: QueueFeatures,
    pub(crate) addresses: AddressSpace,
    /// Where both indices begin.
    pub(crate) base: u16,
    /// The lengths of the regions that the arena is made of, which are adjacent.
    pub(crate) arena: Vec<usize>,
    pub(crate) dirty_log: Option<Arc<dyn DirtyLog>>,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup")
            .field("size", &self.size)
            .field("features", &self.features)
            .field("addresses", &self.addresses)
            .field("base", &self.base)
            .field("regions", &self.arena.len())
            .finish_non_exhaustive()
    }
}

impl Setup {
    pub(crate) fn of(size: u16) -> Self {
        Self {
            size,
            features: QueueFeatures { indirect: true, ..QueueFeatures::default() },
            addresses: AddressSpace::Guest,
            base: 0,
            arena: vec![0x10_0000],
            dirty_log: None,
        }
    }
}

/// What the driver knows of a chain that the device has.
struct Posted {
    buffers: Vec<Buffer>,
    descriptors: Vec<u16>,
    /// Everything in the arena that is the chain's.
    allocated: Vec<u64>,
}

pub(crate) struct Driver {
    memory: GuestMemory,
    layout: QueueLayout,
    features: QueueFeatures,
    /// The free descriptors. Without `VIRTIO_F_IN_ORDER` the last one is taken, otherwise the first.
    free: VecDeque<u16>,
    /// The chains that the device has, by their heads, and their order.
    posted: BTreeMap<u16, Posted>,
    order: VecDeque<u16>,
    available: u16,
    exposed: u16,
    seen_used: u16,
    /// The allocations in the arena: where, and how long.
    arena: BTreeMap<u64, u64>,
    arena_start: u64,
    arena_len: u64,
    cursor: u64,
}

impl Driver {
    /// A guest with a memory of its own.
    pub(crate) fn new(setup: &Setup) -> Self {
        let size = u64::from(setup.size);
        let rings = 0x1_0000;
        let available = rings + size * 16;
        let used = (available + 6 + size * 2).next_multiple_of(4);
        let end = used + 6 + size * 8;
        let mut regions = vec![(rings, (end - rings) as usize)];
        let mut address = ARENA;
        for len in &setup.arena {
            regions.push((address, *len));
            address += *len as u64;
        }
        let memory = GuestMemory::new(regions.into_iter().map(|(address, len)| {
            GuestRegion::new(address, Arc::new(HeapBacking::new(len)))
                .user_address(address + FRONT_END)
                .dirty_log(setup.dirty_log.clone())
        }));
        let offset = match setup.addresses {
            AddressSpace::Guest => 0,
            AddressSpace::FrontEnd => FRONT_END,
        };
        let layout = QueueLayout {
            size: size as u32,
            descriptors: rings + offset,
            available: available + offset,
            used: used + offset,
            addresses: setup.addresses,
            used_log: None,
        };
        let arena_len = address - ARENA;
        Self::over(memory.expect("valid regions"), layout, setup.features, setup.base, arena_len)
    }

    /// A driver in a memory that exists. Its arena begins at [`ARENA`].
    pub(crate) fn over(
        memory: GuestMemory,
        layout: QueueLayout,
        features: QueueFeatures,
        base: u16,
        arena_len: u64,
    ) -> Self {
        let driver = Self {
            memory,
            layout,
            features,
            free: (0..layout.size as u16).collect(),
            posted: BTreeMap::new(),
            order: VecDeque::new(),
            available: base,
            exposed: base,
            seen_used: base,
            arena: BTreeMap::new(),
            arena_start: ARENA,
            arena_len,
            cursor: 0,
        };
        driver.available_field(2).store(base.to_le(), Ordering::Relaxed);
        driver.used_field(2).store(base.to_le(), Ordering::Relaxed);
        driver
    }

    /// Sets where the arena begins, for several drivers in one memory.
    pub(crate) fn with_arena(mut self, arena_start: u64) -> Self {
        self.arena_start = arena_start;
        self
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(crate) fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// The device's side, which goes on at `state`.
    pub(crate) fn device_at(&self, state: QueueState) -> Result<Queue, QueueError> {
        Queue::new(self.memory.clone(), self.layout, self.features, state)
    }

    /// The device's side, with nothing outstanding.
    pub(crate) fn device(&self) -> Queue {
        let state = QueueState { next_available: self.seen_used, next_used: self.seen_used };
        self.device_at(state).expect("the driver's layout is valid")
    }

    // ---- Memory ----

    fn ring(&self, address: u64, len: u32) -> GuestSlice<'_> {
        let slice = match self.layout.addresses {
            AddressSpace::Guest => self.memory.slice(address, len),
            AddressSpace::FrontEnd => self.memory.slice_of_user(address, len),
        };
        slice.expect("the rings are in memory")
    }

    fn field(&self, address: u64) -> &AtomicU16 {
        self.ring(address, 2).atomic_u16(0).expect("the fields are aligned")
    }

    fn available_field(&self, at: u64) -> &AtomicU16 {
        self.field(self.layout.available + at)
    }

    fn used_field(&self, at: u64) -> &AtomicU16 {
        self.field(self.layout.used + at)
    }

    pub(crate) fn write(&self, address: u64, mut bytes: &[u8]) {
        for piece in self.memory.slices(address, bytes.len() as u32) {
            let copied = piece.expect("it is in memory").copy_from(bytes);
            bytes = &bytes[copied..];
        }
    }

    pub(crate) fn read(&self, address: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let mut copied = 0;
        for piece in self.memory.slices(address, len) {
            copied += piece.expect("it is in memory").copy_to(&mut bytes[copied..]);
        }
        bytes
    }

    /// A place in the arena. It comes soon behind the one before, so buffers cross regions.
    pub(crate) fn allocate(&mut self, len: u64) -> Option<u64> {
        for start in [self.cursor, 0] {
            let mut at = start;
            let base = self.arena_start;
            let before = self.arena.range(..base + start).next_back();
            for (&used, &used_len) in before.into_iter().chain(self.arena.range(base + start..)) {
                let used = used - base;
                if used >= at + len {
                    break;
                }
                at = at.max(used + used_len);
            }
            if at + len <= self.arena_len {
                self.cursor = at + len;
                self.arena.insert(base + at, len);
                return Some(base + at);
            }
        }
        None
    }

    fn release(&mut self, allocated: &[u64]) {
        for address in allocated {
            self.arena.remove(address);
        }
    }

    /// Writes a descriptor into the queue's table.
    pub(crate) fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        let place = self.ring(self.layout.descriptors + u64::from(index) * 16, 16);
        place.copy_from(&descriptor_bytes(descriptor));
    }

    /// Writes a descriptor into an indirect table.
    pub(crate) fn set_indirect(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.write(table + u64::from(index) * 16, &descriptor_bytes(descriptor));
    }

    // ---- Making available ----

    fn take_descriptors(&mut self, count: usize) -> Option<Vec<u16>> {
        if self.free.len() < count {
            return None;
        }
        let in_order = self.features.in_order;
        let next =
            |free: &mut VecDeque<u16>| if in_order { free.pop_front() } else { free.pop_back() };
        (0..count).map(|_| next(&mut self.free)).collect()
    }

    /// Makes a chain of buffers with these lengths, and puts it into the available ring. All buffers
    /// from the number `indirect` on are in an indirect table. Returns the head, or `None` if there
    /// is no room in the descriptor table or in the arena.
    pub(crate) fn post(&mut self, shape: &[(u32, bool)], indirect: Option<usize>) -> Option<u16> {
        let mut allocated = Vec::new();
        let mut buffers = Vec::new();
        let mut complete = true;
        for &(len, writable) in shape {
            let Some(address) = self.allocate(len.into()) else {
                complete = false;
                break;
            };
            allocated.push(address);
            buffers.push(Buffer { address, len, writable });
        }
        let direct = indirect.unwrap_or(shape.len());
        let in_table = shape.len() - direct;
        let table = if in_table > 0 { self.allocate(in_table as u64 * 16) } else { None };
        allocated.extend(table);
        complete &= in_table == 0 || table.is_some();
        let descriptors =
            if complete { self.take_descriptors(direct + usize::from(in_table > 0)) } else { None };
        let Some(descriptors) = descriptors else {
            self.release(&allocated);
            return None;
        };
        for (i, buffer) in buffers[..direct].iter().enumerate() {
            let next = descriptors.get(i + 1);
            self.set_descriptor(descriptors[i], describe(buffer, next.copied()));
        }
        if let Some(table) = table {
            // The order in the table is any, unless descriptors are used in order. It begins at 0.
            let place = |i: usize| match i {
                0 => 0,
                i if self.features.in_order => i as u16,
                i => (in_table - i) as u16,
            };
            for (i, buffer) in buffers[direct..].iter().enumerate() {
                let next = (i + 1 < in_table).then(|| place(i + 1));
                self.set_indirect(table, place(i), describe(buffer, next));
            }
            let len = in_table as u32 * 16;
            // The device ignores that the table is said to be device-writable.
            let flags = INDIRECT | if in_table.is_multiple_of(2) { WRITE } else { 0 };
            let last = descriptors[direct];
            self.set_descriptor(last, Descriptor { address: table, len, flags, next: 0 });
        }
        let head = descriptors[0];
        self.make_available(head);
        self.order.push_back(head);
        self.posted.insert(head, Posted { buffers, descriptors, allocated });
        Some(head)
    }

    /// The number of free descriptors.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// What the driver has posted at `head`.
    pub(crate) fn buffers(&self, head: u16) -> &[Buffer] {
        &self.posted[&head].buffers
    }

    /// Puts a head into the available ring, whatever it is.
    pub(crate) fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.available & (self.layout.size as u16 - 1));
        self.available_field(4 + slot * 2).store(head.to_le(), Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows the device what was made available.
    pub(crate) fn expose(&mut self) {
        self.set_available_index(self.available);
    }

    /// Sets the available index, whatever it is.
    pub(crate) fn set_available_index(&self, index: u16) {
        // Release: the device sees the entries. It pairs with its Acquire load, in `fetch`.
        self.available_field(2).store(index.to_le(), Ordering::Release);
    }

    /// Whether the device is to be notified of what was exposed since the last call.
    pub(crate) fn needs_kick(&mut self) -> bool {
        // It pairs with the device's fence in `enable_notifications`.
        fence(Ordering::SeqCst);
        let (old, new) =
            (self.exposed, u16::from_le(self.available_field(2).load(Ordering::Relaxed)));
        self.exposed = new;
        if self.features.event_idx {
            let event = self.used_field(4 + u64::from(self.layout.size) * 8);
            passes(u16::from_le(event.load(Ordering::Relaxed)), old, new)
        } else {
            new != old && self.used_field(0).load(Ordering::Relaxed) == 0
        }
    }

    // ---- Getting back ----

    /// Asks for an interrupt when the used index passes `event`, or, without
    /// `VIRTIO_F_EVENT_IDX`, for all or none.
    pub(crate) fn set_used_event(&self, event: u16) {
        let at = 4 + u64::from(self.layout.size) * 2;
        self.available_field(at).store(event.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn set_no_interrupt(&self, no_interrupt: bool) {
        self.available_field(0).store(u16::from(no_interrupt).to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn used_index(&self) -> u16 {
        // Acquire: the elements are the new ones. It pairs with the device's Release, in `flush`.
        u16::from_le(self.used_field(2).load(Ordering::Acquire))
    }

    /// The element at a used index.
    pub(crate) fn element(&self, index: u16) -> (u32, u32) {
        let slot = u64::from(index & (self.layout.size as u16 - 1));
        let bytes: [u8; 8] = self.ring(self.layout.used + 4 + slot * 8, 8).read().expect("8 bytes");
        let [i0, i1, i2, i3, l0, l1, l2, l3] = bytes;
        (u32::from_le_bytes([i0, i1, i2, i3]), u32::from_le_bytes([l0, l1, l2, l3]))
    }

    /// How many chains the device has.
    pub(crate) fn outstanding(&self) -> usize {
        self.order.len()
    }

    /// What the device has given back since the last call, in order.
    pub(crate) fn collect(&mut self) -> Vec<Returned> {
        let index = self.used_index();
        let mut returned = Vec::new();
        while self.seen_used != index {
            let (id, len) = self.element(self.seen_used);
            loop {
                let head = self.order.pop_front().expect("the device gives back what it has got");
                let last = u32::from(head) == id;
                assert!(last || self.features.in_order, "{head} is the oldest, not {id}");
                let Posted { buffers, descriptors, allocated } =
                    self.posted.remove(&head).expect("it is posted");
                let room: u32 = buffers.iter().filter(|b| b.writable).map(|b| b.len).sum();
                assert!(last || room == 0, "a chain with {room} bytes of room is skipped");
                assert!(!last || len <= room, "{len} bytes are in {room}");
                self.free.extend(descriptors);
                self.release(&allocated);
                returned.push(Returned { head, len: if last { len } else { 0 }, buffers });
                self.seen_used = self.seen_used.wrapping_add(1);
                if last {
                    break;
                }
                assert_ne!(self.seen_used, index, "the batch of {id} is not complete");
            }
        }
        returned
    }
}

fn describe(buffer: &Buffer, next: Option<u16>) -> Descriptor {
    let write = if buffer.writable { WRITE } else { 0 };
    let flags = write | if next.is_some() { NEXT } else { 0 };
    Descriptor { address: buffer.address, len: buffer.len, flags, next: next.unwrap_or(0) }
}

fn descriptor_bytes(descriptor: Descriptor) -> [u8; 16] {
    let Descriptor { address, len, flags, next } = descriptor;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Whether `event` is one of the indices from `old` to `new`. This is how the specification says it
/// (virtio 1.2, sections 2.7.7.2 and 2.7.10.1), one index after the other.
pub(crate) fn passes(event: u16, old: u16, new: u16) -> bool {
    (0..new.wrapping_sub(old)).any(|i| old.wrapping_add(i) == event)
}
