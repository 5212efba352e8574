//! The interface between a ring and a system: the devices that come with the library, and the
//! traits for a device of your own.
//!
//! A ring only queues frames. A poller drives it, on a thread of its own or on the caller's (see
//! [`Drive`](crate::Drive)). The poller calls a device, which moves the packets. Five types are
//! involved, and each leads to the next:
//!
//! 1. A [`Driver`] starts a device. [`InterfaceBuilder::device`](crate::InterfaceBuilder::device)
//!    takes a driver, and [`InterfaceBuilder::start`](crate::InterfaceBuilder::start) calls
//!    [`Driver::start`] once, with the settings that the caller chose.
//! 2. A [`Device`] is the running network interface. It reports what was negotiated
//!    ([`Device::info`]) and what it can do ([`Device::capabilities`]). It makes one [`Queue`] for
//!    each ring that is built on it ([`Device::queue`]).
//! 3. A [`Queue`] is the endpoint of one ring. The poller calls [`Queue::poll`] when there may be
//!    work, and the queue makes progress without blocking. When the queue has nothing to do, the
//!    poller sleeps; the queue wakes it with the [`Wake`] that it was made with, or through its
//!    [descriptor](Queue::descriptor). [`Queue::arm`] says when it must.
//! 4. A [`PollContext`] gives a queue access to its ring for one poll. The queue takes slots out of
//!    it, fills or sends them, and completes them through it.
//! 5. A [`PostedSlot`] is one frame that the ring's caller has submitted: a read to be filled, or a
//!    write to be sent. The queue owns the slot until it completes it or puts it back.
//!
//! A device is based on completions. A device that makes batch calls (vmnet, or a TAP with read(2)
//! and write(2)) takes a slot and completes it in the same poll. A device over a completion engine
//! (io_uring) keeps the slot until the kernel has finished with it, and completes it in a later
//! poll.
//!
//! # Example
//!
//! A device that sends each packet back to the ring that wrote it. Its queue keeps no slot between
//! two polls, so it needs no other method than `poll`.
//!
//! ```
//! use std::sync::Arc;
//! use vmring::device::{Capabilities, Device, PollContext, Progress, Queue, QueueConfig, Wake};
//! use vmring::{Direction, Driver, Error, Interface, InterfaceConfig, InterfaceInfo, MacAddr6, Status};
//!
//! struct Echo;
//!
//! impl Driver for Echo {
//!     fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
//!         let mac = config.mac.unwrap_or(MacAddr6::new(0x02, 0, 0, 0, 0, 0xec));
//!         let mtu = config.mtu.unwrap_or(1500);
//!         Ok(Arc::new(EchoDevice(InterfaceInfo::new(config, mac, mtu, mtu + 14))))
//!     }
//! }
//!
//! struct EchoDevice(InterfaceInfo);
//!
//! impl Device for EchoDevice {
//!     fn name(&self) -> &str {
//!         "echo"
//!     }
//!     fn info(&self) -> InterfaceInfo {
//!         self.0.clone()
//!     }
//!     fn capabilities(&self) -> Capabilities {
//!         Capabilities::new(self.0.mtu, self.0.max_packet_size)
//!     }
//!     fn queue(&self, _: QueueConfig, _: Wake) -> Result<Box<dyn Queue>, Error> {
//!         // Packets come only from a poll, so there is never a reason to wake the poller.
//!         Ok(Box::new(EchoQueue))
//!     }
//! }
//!
//! struct EchoQueue;
//!
//! impl Queue for EchoQueue {
//!     fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
//!         // Without a read for the answer, the write stays posted.
//!         while cx.reads() > 0
//!             && let Some(write) = cx.take_write()
//!             && let Some(mut read) = cx.take_read()
//!         {
//!             match read.copy_from_slot(&write) {
//!                 Ok(len) => cx.complete_read(read, len),
//!                 Err(_) => cx.put_back(read),
//!             }
//!             cx.complete_write(write);
//!         }
//!         Ok(Progress::Idle)
//!     }
//! }
//!
//! let interface = Interface::builder().device(Echo).start()?;
//! let mut ring = interface.ring(Direction::Both).build()?;
//! let read = ring.alloc().expect("a fresh ring has free frames");
//! let mut write = ring.alloc().expect("a fresh ring has free frames");
//! write.copy_from(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello")?;
//! ring.submit_and_wait([(read, 1)], [(write, 2)], 2, None)?;
//! assert!(ring.reap().all(|done| done.result == Ok(20)));
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! [`examples/device.rs`](https://github.com/vmring/vmring/blob/main/examples/device.rs) is a longer
//! one. Its queue keeps reads until it has packets for them, as a completion engine does, so it also
//! handles cancels and closing.
//!
//! # Failures
//!
//! * If one entry fails, and others may succeed, complete it with [`PollContext::fail`]. The ring
//!   stays open.
//! * If the device is dead, return an error from [`Queue::poll`]. Every entry in flight completes
//!   with that status, and the ring closes.
//! * If the device cannot take a write now, leave the write posted, or keep it.
//!
//! # Wrappers
//!
//! A wrapper is a device that contains another device. Its queue owns a [`Relay`]: it takes slots
//! out of the poller's [`PollContext`], posts them to the inner queue with [`Relay::post`], polls
//! the inner queue with [`Relay::poll`], and passes on each [`CompletedSlot`] with
//! [`PollContext::forward`]. The modules `fault` and `pcap` (features of the same names) contain
//! wrappers.
//!
//! The traits need no unsafe code, and no implementation of them can break memory safety. A slot
//! cannot be cloned, so a device cannot give it back twice. Completing a slot moves it, so a device
//! cannot use its memory afterwards.

pub(crate) mod bounce;
pub(crate) mod catch;
mod common;
pub(crate) mod completions;
pub(crate) mod context;
mod dhcp_settings;
pub mod embedded;
#[cfg(feature = "fault")]
pub mod fault;
mod inbox_reader;
pub mod loopback;
#[cfg(feature = "pcap")]
pub mod pcap;
mod relay;
pub(crate) mod seam;
pub(crate) mod slot;
#[cfg(feature = "socket")]
pub mod socket;
#[cfg(all(target_os = "linux", feature = "tap"))]
pub mod tap;
#[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
pub mod vmnet;

pub use crate::config::{Offloads, PortForward, Protocol};
pub use context::{CompletedSlot, PollContext};
pub use relay::Relay;
pub use seam::{Capabilities, Device, Driver, Lease, Progress, Queue, QueueConfig, Wake};
pub use slot::PostedSlot;
