//! The virtio-net device of vmring for virtual machine monitors (VMMs) that are built from
//! [rust-vmm](https://github.com/rust-vmm) crates.
//!
//! | rust-vmm | here | vmring |
//! |---|---|---|
//! | `GuestMemoryMmap`, in a `GuestMemoryAtomic` or not | [`MemorySource`], [`region`] | [`GuestMemory`](vmring::GuestMemory) |
//! | a region's bitmap | [`region`] | [`DirtyLog`](vmring::guest::DirtyLog) |
//! | `virtio_queue::Queue`, `QueueState` | [`QueueDescription`], both ways | `QueueLayout`, `QueueState`, `QueueSetup` |
//! | `EventFd` | `kick_event`, `call_event`, `event_interrupt` | [`Event`](vmring_virtio::Event), [`EventInterrupt`](vmring_virtio::net::EventInterrupt) |
//! | a trait or closure that interrupts | [`interrupt_fn`] | [`Interrupt`](vmring_virtio::net::Interrupt) |
//! | `activate` | [`VirtioNet`], [`VirtioNetThread`] | [`NetDevice`](vmring_virtio::net::NetDevice), [`NetThread`](vmring_virtio::net::NetThread) |
//!
//! [`vmring_virtio::net`] has the guide for authors of VMMs: threads, system calls, pauses and
//! snapshots, hostile guests.
//!
//! # A VMM like cloud-hypervisor
//!
//! Its `activate` gets a context, and the device has threads of its own. The trait is shortened to what
//! concerns this crate.
//!
//! ```
//! # #[cfg(target_os = "linux")]
//! # mod vmm {
//! # use std::{io, sync::Arc, sync::atomic::AtomicU8, time::Duration};
//! # use vmring_rust_vmm::virtio_queue::Queue;
//! # use vmring_rust_vmm::vm_memory::{GuestMemoryAtomic, GuestMemoryMmap, bitmap::AtomicBitmap};
//! # use vmring_rust_vmm::vmm_sys_util::eventfd::EventFd;
//! # use vmring_rust_vmm::{ActiveQueue, InterruptCause, VirtioNet, VirtioNetThread, interrupt_fn};
//! # type ActivateResult = Result<(), Box<dyn std::error::Error>>;
//! # pub enum VirtioInterruptType { Config, Queue(u16) }
//! # pub trait VirtioInterrupt: Send + Sync {
//! #     fn trigger(&self, cause: VirtioInterruptType) -> io::Result<()>;
//! # }
//! # pub struct ActivationContext {
//! #     pub mem: GuestMemoryAtomic<GuestMemoryMmap<AtomicBitmap>>,
//! #     pub interrupt_cb: Arc<dyn VirtioInterrupt>,
//! #     pub queues: Vec<(u16, Queue, EventFd)>,
//! #     pub device_status: Arc<AtomicU8>,
//! # }
//! # pub trait VirtioDevice {
//! #     fn features(&self) -> u64;
//! #     fn ack_features(&mut self, value: u64);
//! #     fn read_config(&self, offset: u64, data: &mut [u8]);
//! #     fn activate(&mut self, context: ActivationContext) -> ActivateResult;
//! #     fn reset(&mut self);
//! # }
//! # pub trait Pausable { fn pause(&mut self) -> io::Result<()>; fn resume(&mut self) -> io::Result<()>; }
//! pub struct Net {
//!     offered: u64,
//!     accepted: u64,
//!     memory: Option<GuestMemoryAtomic<GuestMemoryMmap<AtomicBitmap>>>,
//!     /// Exactly one of both is there.
//!     waiting: Option<VirtioNet>,
//!     active: Option<VirtioNetThread>,
//! }
//!
//! impl VirtioDevice for Net {
//!     fn features(&self) -> u64 {
//!         self.offered
//!     }
//!
//!     fn ack_features(&mut self, value: u64) {
//!         self.accepted |= value & self.offered;
//!     }
//!
//!     fn read_config(&self, offset: u64, data: &mut [u8]) {
//!         match (&self.waiting, &self.active) {
//!             (Some(net), _) => net.read_config(offset, data),
//!             (_, Some(net)) => net.read_config(offset, data),
//!             _ => {}
//!         }
//!     }
//!
//!     fn activate(&mut self, context: ActivationContext) -> ActivateResult {
//!         let ActivationContext { mem, interrupt_cb, queues, .. } = context;
//!         let interrupt = interrupt_fn(move |cause| {
//!             let _ = interrupt_cb.trigger(match cause {
//!                 InterruptCause::Queue(index) => VirtioInterruptType::Queue(index),
//!                 InterruptCause::Config => VirtioInterruptType::Config,
//!             });
//!         });
//!         let queues: Result<Vec<_>, _> = queues.into_iter().map(ActiveQueue::try_from).collect();
//!         let net = self.waiting.as_mut().ok_or("it is active")?;
//!         net.activate(&mem, interrupt, self.accepted, queues?)?;
//!         self.active = self.waiting.take().map(|net| net.spawn("vmring-net")).transpose()?;
//!         self.memory = Some(mem);
//!         Ok(())
//!     }
//!
//!     fn reset(&mut self) {
//!         if let Some(net) = self.active.take() {
//!             self.waiting = Some(net.reset(Duration::from_secs(5)));
//!         }
//!         (self.accepted, self.memory) = (0, None);
//!     }
//! }
//!
//! impl Pausable for Net {
//!     fn pause(&mut self) -> io::Result<()> {
//!         let Some(net) = &self.active else { return Ok(()) };
//!         // The states of the queues, for a snapshot.
//!         let _queues = net.pause(Duration::from_secs(5)).ok_or(io::ErrorKind::TimedOut)?;
//!         Ok(())
//!     }
//!
//!     fn resume(&mut self) -> io::Result<()> {
//!         self.active.iter().for_each(VirtioNetThread::resume);
//!         Ok(())
//!     }
//! }
//!
//! impl Net {
//!     /// After the VMM has added a region to its memory, or removed one.
//!     pub fn memory_changed(&self) -> Result<(), vmring_rust_vmm::Error> {
//!         let (Some(net), Some(memory)) = (&self.active, &self.memory) else { return Ok(()) };
//!         net.update_memory(memory, Duration::from_secs(5))
//!     }
//! }
//! # struct Nothing;
//! # impl VirtioInterrupt for Nothing {
//! #     fn trigger(&self, _: VirtioInterruptType) -> io::Result<()> { Ok(()) }
//! # }
//! # pub fn run() -> ActivateResult {
//! #     use vmring_rust_vmm::{virtio_queue::QueueT, vm_memory::GuestAddress, vmring};
//! #     let interface = vmring::Interface::builder().device(vmring::Loopback::new(1500)).start()?;
//! #     let waiting = VirtioNet::new(interface, Default::default())?;
//! #     let offered = waiting.features();
//! #     let mut net = Net { offered, accepted: 0, memory: None, waiting: Some(waiting), active: None };
//! #     for _ in 0..2 {
//! #         let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
//! #         let mut queues = Vec::new();
//! #         for index in 0..2 {
//! #             let mut queue = Queue::new(16)?;
//! #             let base = u32::from(index) * 0x1_0000;
//! #             queue.set_desc_table_address(Some(base), None);
//! #             queue.set_avail_ring_address(Some(base + 0x1000), None);
//! #             queue.set_used_ring_address(Some(base + 0x2000), None);
//! #             queue.set_ready(true);
//! #             queues.push((index, queue, EventFd::new(0)?));
//! #         }
//! #         net.ack_features(1 << 32);
//! #         let (mem, device_status) = (GuestMemoryAtomic::new(mem), Arc::default());
//! #         net.activate(ActivationContext { mem, interrupt_cb: Arc::new(Nothing), queues, device_status })?;
//! #         net.memory_changed()?;
//! #         net.pause()?;
//! #         net.resume()?;
//! #         let mut mac = [0; 6];
//! #         net.read_config(0, &mut mac);
//! #         assert_ne!(mac, [0; 6]);
//! #         net.reset();
//! #         assert!(net.waiting.is_some());
//! #     }
//! #     Ok(())
//! # }
//! # }
//! # #[cfg(target_os = "linux")]
//! # vmm::run().unwrap();
//! ```
//!
//! # A VMM like Firecracker
//!
//! Its queues, regions and interrupts are types of its own, and one event loop serves all devices. So
//! the queues are given as `QueueState`s, and [`region`] converts its regions. In the loop, the
//! descriptor of [`VirtioNet::device`] is one of the subscriber's; see [`vmring_virtio::net`].
//!
//! ```
//! # #[cfg(target_os = "linux")]
//! # mod vmm {
//! # use std::{num::Wrapping, sync::Arc};
//! # use vmring_rust_vmm::virtio_queue::QueueState;
//! # use vmring_rust_vmm::vm_memory::{GuestAddress, GuestRegionMmap, bitmap::AtomicBitmap};
//! # use vmring_rust_vmm::vmm_sys_util::eventfd::EventFd;
//! # use vmring_rust_vmm::vmring::GuestMemory;
//! # use vmring_rust_vmm::{ActiveQueue, InterruptCause, MemoryError, MemorySource, VirtioNet};
//! # use vmring_rust_vmm::{interrupt_fn, kick_event, region};
//! # pub struct GuestRegionMmapExt { pub inner: GuestRegionMmap<Option<AtomicBitmap>> }
//! # pub struct GuestMemoryMmap(pub Vec<GuestRegionMmapExt>);
//! # impl GuestMemoryMmap { fn iter(&self) -> impl Iterator<Item = &GuestRegionMmapExt> { self.0.iter() } }
//! # #[derive(Clone, Copy)]
//! # pub struct Queue {
//! #     pub max_size: u16, pub size: u16, pub ready: bool,
//! #     pub desc_table_address: GuestAddress, pub avail_ring_address: GuestAddress,
//! #     pub used_ring_address: GuestAddress,
//! #     pub next_avail: Wrapping<u16>, pub next_used: Wrapping<u16>,
//! # }
//! # pub enum VirtioInterruptType { Config, Queue(u16) }
//! # pub trait VirtioInterrupt: Send + Sync { fn trigger(&self, cause: VirtioInterruptType); }
//! # type ActivateResult = Result<(), Box<dyn std::error::Error>>;
//! # pub struct Net {
//! #     pub net: VirtioNet, pub acked_features: u64,
//! #     pub queues: Vec<Queue>, pub queue_events: Vec<EventFd>,
//! # }
//! struct Regions<'m>(&'m GuestMemoryMmap);
//!
//! impl MemorySource for Regions<'_> {
//!     fn snapshot(&self) -> Result<GuestMemory, MemoryError> {
//!         let regions: Result<Vec<_>, _> = self.0.iter().map(|part| region(&part.inner)).collect();
//!         Ok(GuestMemory::new(regions?)?)
//!     }
//! }
//!
//! fn state(queue: &Queue) -> QueueState {
//!     QueueState {
//!         max_size: queue.max_size,
//!         size: queue.size,
//!         ready: queue.ready,
//!         desc_table: queue.desc_table_address.0,
//!         avail_ring: queue.avail_ring_address.0,
//!         used_ring: queue.used_ring_address.0,
//!         next_avail: queue.next_avail.0,
//!         next_used: queue.next_used.0,
//!         event_idx_enabled: false, // The accepted features say it.
//!     }
//! }
//!
//! # impl Net {
//! // In `impl VirtioDevice for Net`:
//! pub fn activate(&mut self, mem: GuestMemoryMmap, interrupt: Arc<dyn VirtioInterrupt>) -> ActivateResult {
//!     let interrupt = interrupt_fn(move |cause| {
//!         interrupt.trigger(match cause {
//!             InterruptCause::Queue(index) => VirtioInterruptType::Queue(index),
//!             InterruptCause::Config => VirtioInterruptType::Config,
//!         });
//!     });
//!     let mut queues = Vec::new();
//!     for (index, (queue, event)) in self.queues.iter().zip(&self.queue_events).enumerate() {
//!         queues.push(ActiveQueue::new(index as u16, state(queue)).kick(kick_event(event)?));
//!     }
//!     Ok(self.net.activate(&Regions(&mem), interrupt, self.acked_features, queues)?)
//! }
//!
//! /// Puts the indices back, for a snapshot (`prepare_save`). Returns false if packets are still on
//! /// their way.
//! pub fn prepare_save(&mut self) -> bool {
//!     let std::task::Poll::Ready(states) = self.net.pause() else { return false };
//!     for (index, state) in states {
//!         let queue = &mut self.queues[usize::from(index)];
//!         (queue.next_avail, queue.next_used) = (Wrapping(state.next_avail), Wrapping(state.next_used));
//!     }
//!     true
//! }
//! # }
//! # struct Nothing;
//! # impl VirtioInterrupt for Nothing { fn trigger(&self, _: VirtioInterruptType) {} }
//! # pub fn run() -> ActivateResult {
//! #     use vmring_rust_vmm::{vm_memory::{bitmap::NewBitmap, mmap::MmapRegionBuilder}, vmring};
//! #     let interface = vmring::Interface::builder().device(vmring::Loopback::new(1500)).start()?;
//! #     let net = VirtioNet::new(interface, Default::default())?;
//! #     let queues = [0x1000, 0x5000].map(|base| Queue {
//! #         max_size: 16, size: 16, ready: true,
//! #         desc_table_address: GuestAddress(base), avail_ring_address: GuestAddress(base + 0x1000),
//! #         used_ring_address: GuestAddress(base + 0x2000),
//! #         next_avail: Wrapping(3), next_used: Wrapping(3),
//! #     });
//! #     let queue_events = vec![EventFd::new(0)?, EventFd::new(0)?];
//! #     let acked_features = net.features();
//! #     let mut device = Net { net, acked_features, queues: queues.to_vec(), queue_events };
//! #     let bitmap = Some(AtomicBitmap::with_len(0x1_0000));
//! #     let mapping = MmapRegionBuilder::new_with_bitmap(0x1_0000, bitmap);
//! #     let mapping = mapping.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build()?;
//! #     let inner = GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or("no region")?;
//! #     device.activate(GuestMemoryMmap(vec![GuestRegionMmapExt { inner }]), Arc::new(Nothing))?;
//! #     device.queues[0].next_used = Wrapping(0);
//! #     assert!(device.prepare_save());
//! #     assert_eq!(device.queues[0].next_used, Wrapping(3));
//! #     Ok(())
//! # }
//! # }
//! # #[cfg(target_os = "linux")]
//! # vmm::run().unwrap();
//! ```
//!
//! # Memory that changes
//!
//! A device has a snapshot of the guest's memory, and holds no guard of a `GuestMemoryAtomic`. When the
//! VMM has replaced what is in there, it calls [`VirtioNet::update_memory`]. When that is ready, no
//! packet is on its way into or out of the earlier mappings, and the device has given them up. Each
//! snapshot keeps its mappings (`Arc<MmapRegion>`), so memory that the VMM drops too early stays
//! mapped, and the kernel writes into nothing else.
//!
//! A write of the device is marked in the bitmap of its region, and `vm-memory`'s own accesses are not
//! involved. Exactly the bytes that were written are marked, before the guest is told of them.
//!
//! # macOS
//!
//! `EventFd`, `kick_event`, `call_event` and `event_interrupt` are on Linux only. All else is the same
//! on macOS: there a queue is kicked by [`Notifier::notify`](vmring_virtio::net::Notifier::notify), or
//! on an [`Event`](vmring_virtio::Event) made of a pipe.
//!
//! # Versions
//!
//! The crates whose types are in this crate's interface are re-exported. A new version of one of them is
//! a new version of this crate, and none of `vmring`.

mod device;
#[cfg(target_os = "linux")]
mod eventfd;
mod interrupt;
mod memory;
mod queue;

pub use device::{ActiveQueue, Error, Negotiated, VirtioNet, VirtioNetThread};
#[cfg(target_os = "linux")]
pub use eventfd::{call_event, event_interrupt, kick_event};
pub use interrupt::{InterruptCause, InterruptFn, interrupt_fn};
pub use memory::{MemoryError, MemorySource, region};
pub use queue::{QueueConversionError, QueueDescription};

pub use virtio_queue;
pub use vm_memory;
#[cfg(target_os = "linux")]
pub use vmm_sys_util;
pub use vmring;
pub use vmring_virtio;
