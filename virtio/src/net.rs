//! A virtio-net device over an interface: the guide for authors of virtual machine monitors (VMMs).
//!
//! The buffers of a guest are the entries of the interface's rings. So a packet between a guest and a
//! TAP is copied by the kernel alone, and one between two guests of the embedded network once.
//!
//! There are three ways to use it:
//!
//! * [`NetDevice`] in the VMM's own event loop, or on a thread of its own ([`NetDevice::spawn`]);
//! * [`serve_connection`], for a front end of vhost-user in another process;
//! * [`VhostUserNet`] with a [`Session`](crate::vhost_user::Session) in a loop of your own.
//!
//! ```
//! use std::sync::Arc;
//! use std::task::Poll;
//! use vmring::guest::GuestRegion;
//! use vmring::{GuestMemory, GuestMmap, Interface, Loopback};
//! use vmring_virtio::net::{Interrupt, NetDevice, NetSettings, QueueSetup};
//! use vmring_virtio::queue::{AddressSpace, QueueLayout};
//!
//! /// A VMM raises an interrupt of its guest here.
//! struct Interrupts;
//!
//! impl Interrupt for Interrupts {
//!     fn queue(&self, _index: u16) {}
//!     fn config(&self) {}
//! }
//!
//! let interface = Interface::builder().device(Loopback::new(1500)).start()?;
//! let mut device = NetDevice::new(interface, Arc::new(Interrupts), NetSettings::default())?;
//!
//! // The guest's memory. Its driver has posted a buffer at 0x8000, and wants to send the packet behind
//! // the header at 0x9000.
//! let mapping = Arc::new(GuestMmap::anonymous(0x1_0000)?);
//! let memory = GuestMemory::new([GuestRegion::new(0, mapping)])?;
//! let write = |address, bytes: &[u8]| memory.slice(address, bytes.len() as u32).unwrap().copy_from(bytes);
//! write(0x9000 + 12, b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello");
//! for (queue, buffer, len, flags) in [(0x1000, 0x8000, 2048, 2), (0x4000, 0x9000, 32, 0)] {
//!     // A descriptor: address, length, flags (2: the device writes), next.
//!     write(queue, &[&u64::to_le_bytes(buffer)[..], &u32::to_le_bytes(len), &[flags, 0, 0, 0]].concat());
//!     // The available ring: flags, and the index of the next entry.
//!     write(queue + 0x1000, &[0, 0, 1, 0]);
//! }
//!
//! // What the transport does when the driver negotiates, and sets DRIVER_OK.
//! device.set_features(device.features())?;
//! assert!(matches!(device.set_memory(&memory), Poll::Ready(Ok(()))));
//! for (index, address) in [(0, 0x1000), (1, 0x4000)] {
//!     device.start_queue(index, QueueSetup::new(QueueLayout {
//!         size: 16,
//!         descriptors: address,
//!         available: address + 0x1000,
//!         used: address + 0x2000,
//!         addresses: AddressSpace::Guest,
//!         used_log: None,
//!     }))?;
//! }
//!
//! // The event loop. A thread of a virtual processor calls `device.notifier().notify(queue)` meanwhile.
//! while device.stats().rx_packets == 0 {
//!     if !device.poll().again && device.arm() {
//!         // Sleep until `device.as_fd()` is readable, or until the deadline of the progress.
//!     }
//! }
//! assert_eq!(memory.slice(0x8000 + 12 + 14, 6).unwrap().read(), Some(*b" hello"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Threads
//!
//! A device belongs to one thread at a time, and may move to another. It starts none, except with
//! [`spawn`](NetDevice::spawn). The loop around it is the same everywhere:
//!
//! 1. [`poll`](NetDevice::poll) moves packets, without waiting, up to a budget.
//! 2. If [`Progress::again`] is set, the loop polls again, and other devices of the thread have their turn
//!    after a number of such polls.
//! 3. Otherwise [`arm`](NetDevice::arm) asks the guest and the interface for signals. If it returns
//!    false, something has come meanwhile: poll again.
//! 4. Sleep until the descriptor of the device is readable, or until [`Progress::deadline`].
//!
//! A thread with several guests that send to each other is fastest if it polls a guest until it has no
//! more, with a bound, and then the next one:
//!
//! ```no_run
//! # fn turn(devices: &mut [vmring_virtio::net::NetDevice]) {
//! for device in devices {
//!     // With the default budget these are at most 2,048 chains of each queue.
//!     for _ in 0..64 {
//!         if !device.poll().again {
//!             break;
//!         }
//!     }
//! }
//! # }
//! ```
//!
//! If it polls each guest once, both guests always have more, and a packet from guest to guest has cost
//! up to twice as much.
//!
//! While the device is awake, the guest is told that kicks are not needed, and packets of other guests
//! cost no wake-up. An idle device costs nothing. The thread of a virtual processor calls
//! [`Notifier::notify`], which costs a fence and a load, and a write to a pipe if the device sleeps. A
//! kick descriptor, such as an `ioeventfd`, needs no such call ([`QueueSetup::kick`]).
//!
//! [`Interrupt`] is called on the device's thread, with no lock held, at most once for each queue and
//! burst, and only if the driver wants it. On systems where an interrupt is costly, such as macOS, this
//! is the number to watch ([`NetStats::interrupts`]).
//!
//! Each pair of queues has two rings, one for each direction. With one ring for both, completed writes
//! would wait behind reads that have no packets. The rings are inline: the device below moves packets
//! inside of `poll`, on the same thread, and nowhere else.
//!
//! # System calls
//!
//! For a seccomp list: a device makes the calls of its interface, and those below. None is made per
//! packet by this crate.
//!
//! | when | calls |
//! |---|---|
//! | a device or a ring is made | `pipe2`, `epoll_create1`, `eventfd2`, `fcntl`, `mmap`, `madvise` |
//! | a queue starts or stops | `epoll_ctl` |
//! | it wakes | `epoll_wait` (or `epoll_pwait`), `read` on the pipe or the kick |
//! | somebody wakes it | `write` on the pipe |
//! | it interrupts through an [`Event`](crate::Event) | `write`; for a socket `sendto`; for a pipe also `rt_sigprocmask`, `rt_sigpending`, `rt_sigtimedwait` |
//! | it waits in [`spawn`](NetDevice::spawn) or [`serve_connection`] | `sched_yield`, and then `poll` (or `ppoll`) |
//! | other threads call [`NetThread`] | `futex` |
//! | it is dropped | `close`, `munmap` |
//!
//! | interface | calls per burst |
//! |---|---|
//! | embedded network, loopback | none; a wake-up of another ring is one `write` to an eventfd |
//! | TAP, [`TapEngine::Plain`](https://docs.rs/vmring) | `readv` and `writev`, or `read` and `write`: one for each packet |
//! | TAP, `TapEngine::IoUring` | for reads the same; for writes `io_uring_enter` instead; `io_uring_setup` and `io_uring_register` when the ring is made |
//!
//! The net threads of Firecracker and cloud-hypervisor do not allow `io_uring_enter`: choose the plain
//! engine there. On macOS the descriptor is a kqueue, and the events are pipes.
//!
//! # Pause, snapshot, migration and reset
//!
//! [`pause`](NetDevice::pause) takes posted buffers back: the available index moves back over those
//! that have no packet, and the driver never sees them as used. It waits for packets that are being
//! sent, and cancels none. When it is ready, nothing accesses the guest's memory, and two indices for
//! each queue are all that there is to save, because chains are used in order.
//! [`snapshot`](NetDevice::snapshot) has them, and what the driver has set.
//!
//! A function that returns [`Poll::Pending`](std::task::Poll::Pending) has begun and is not done. Run
//! the loop, and call it again after each poll. With the interfaces of this project it is ready at
//! once, unless a TAP does not take packets now.
//!
//! For a live migration give the memory regions a [`DirtyLog`](vmring::guest::DirtyLog), with
//! [`set_memory`](NetDevice::set_memory). Exactly what was written is entered, before the driver is told
//! of it. At the other end call [`request_announcement`](NetDevice::request_announcement).
//!
//! A driver resets the device at each start of a system, with other features each time
//! ([`reset`](NetDevice::reset)). With `VIRTIO_F_RING_RESET` ([`NetSettings::ring_reset`]) it may reset
//! one queue: [`stop_queue`](NetDevice::stop_queue) and [`start_queue`](NetDevice::start_queue).
//!
//! # Offloads
//!
//! What a guest may leave undone is what the interface does
//! ([`InterfaceBuilder::offloads`](vmring::InterfaceBuilder::offloads)). A guest may accept less than the
//! interface delivers, as firmware does, or switch its offloads off later. If the interface lets each ring
//! say what it accepts ([`Capabilities::receive_offloads`]), as the embedded network does, the rest is
//! done before a packet is in the guest's buffer, and costs no copy. Over other interfaces, such as a TAP,
//! the guest gets its packets through frames of the device: the checksum is completed, or the packet is
//! cut ([`NetStats::rx_software`]). So do guests with mergeable buffers, if packets may be longer than
//! 1,524 bytes and the interface cannot fill several buffers with one packet (vmnet and recorded interfaces
//! cannot). This costs one more copy.
//!
//! [`Capabilities::receive_offloads`]: vmring::device::Capabilities::receive_offloads
//!
//! # Several pairs
//!
//! A guest with several processors can have several pairs of queues ([`NetSettings::queue_pairs`]), as many
//! as rings can read from the interface. The embedded network has
//! [`Embedded::queues`](vmring::Embedded::queues), a TAP has its own queues. The network below spreads
//! flows over the pairs that the guest uses, which it says over the control queue, or its front end by
//! enabling rings. A receive queue that is not in use has no ring, so its flows are in the others. What
//! waits for a queue in the embedded network when the guest disables it is dropped and counted there as
//! "closed", if other queues go on.
//!
//! # Hostile guests
//!
//! A guest may put anything into its memory, and change it at any time. What decides is copied once,
//! and the copy is checked. Then:
//!
//! | the guest | costs |
//! |---|---|
//! | makes a broken chain available | that chain: it is returned empty ([`NetStats::broken_chains`]) |
//! | moves its available index where no driver can be | that queue, until a reset ([`NetDevice::needs_reset`]) |
//! | posts a buffer that is too small | the packet for it; the buffer is returned empty ([`NetStats::rx_too_small`]) |
//! | sends a header that is wrong, or work that was not negotiated | that packet ([`NetStats::tx_bad_header`]) |
//! | changes a packet while it is sent | what is sent in its own name |
//! | lets its descriptors point at its rings, or at each other's buffers | itself |
//! | notifies all the time | one look at each queue for each time, on the device's thread |
//!
//! No guest makes the device wait, spin or grow. What a guest may send *as*, and how much, is the
//! business of the network below.
//!
//! # What is not offered, and why
//!
//! * Packed rings: they gain some two per cent, and no VMM of this family has them any more.
//! * `VIRTIO_NET_F_HASH_REPORT`, RSS and `VIRTIO_NET_F_NOTF_COAL`: no interface here can hash.
//! * `VIRTIO_F_ACCESS_PLATFORM`: each access would need a translation.
//! * `VIRTIO_NET_F_CTRL_VLAN`: networks here carry tags as they are.
//! * Legacy drivers: their headers have other lengths. Ask for a modern device in the VMM.
//! * RX modes are accepted, and filter nothing: a switch sends a guest what is for it, and a device may
//!   give a driver more than it asks for (virtio 1.2, section 5.1.6.5.1).

#![forbid(unsafe_code)]

mod control;
mod copying;
mod device;
mod features;
mod header;
mod idle;
mod interrupt;
mod limits;
mod readiness;
mod running;
mod rx;
mod snapshot;
mod spawn;
mod stats;
mod tx;
mod vhost_user;
mod window;

pub use crate::config::NetConfig;
pub use device::{NetDevice, NetError, NetSettings, Progress, QueueSetup};
pub use features::Features;
pub use interrupt::{EventInterrupt, Interrupt};
pub use readiness::Notifier;
pub use snapshot::SavedQueue;
pub use spawn::NetThread;
pub use stats::{NetStats, StatsHandle};
pub use vhost_user::{Ended, FrontEnd, FrontEndHandle, ServeError, VhostUserNet, serve_connection};
