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
