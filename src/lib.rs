//! io_uring-style packet rings for virtual machine monitors.
//!
//! A [`Ring`] is a pair of lock-free queues between a VMM and a network device. The VMM moves a
//! [`Frame`], which exclusively owns one slot of a page-aligned [`Pool`], into the submission
//! queue. The device fills the frame ([`submit_read`](Ring::submit_read)) or sends its packet
//! ([`submit_write`](Ring::submit_write)). A poller drives the device in batches. Each submission
//! completes exactly once: its completion, with its frame, comes out of the completion queue
//! ([`reap`](Ring::reap)).
//!
//! ```
//! use std::time::Duration;
//! use vmring::{Direction, Embedded, Interface, RingOp};
//!
//! // Two guests on one in-process network.
//! let start = || Interface::builder().device(Embedded::network("guide")).start();
//! let (alice, bob) = (start()?, start()?);
//! let mut to = bob.ring(Direction::Read).build()?;
//! let mut from = alice.ring(Direction::Write).build()?;
//!
//! // Bob posts a frame. Alice sends one.
//! let frame = to.alloc().expect("a fresh ring has free frames");
//! to.submit_read(frame, 7)?;
//! let mut frame = from.alloc().expect("as above");
//! frame.copy_from(&[&bob.mac().into_array()[..], &alice.mac().into_array(), b"\x88\xb5 hello"].concat())?;
//! from.submit_write(frame, 8)?;
//!
//! to.wait(1, Some(Duration::from_secs(10)));
//! let done = to.reap().next().expect("the packet came");
//! assert_eq!((done.user_data, done.op, done.result), (7, RingOp::Read, Ok(20)));
//! let packet = done.take_packet()?;
//! let ethernet = packet.view().ethernet().map(|header| header.ethertype());
//! assert_eq!((ethernet, &packet[14..]), (Some(0x88b5), &b" hello"[..]));
//!
//! // Everything closes by itself when it is dropped, in any order. `close` also reports how it went.
//! to.close()?;
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! # Where to find what
//!
//! | to | use |
//! |---|---|
//! | start an interface and build a ring | [`Interface::builder`], [`Interface::ring`], [`RingBuilder`] |
//! | choose the thread that polls the device | [`Drive`] |
//! | write the hot loop | [the ring's module](mod@ring#the-hot-loop), [`Completion`] |
//! | decide between one ring for both directions and two rings | [the ring's module](mod@ring#one-ring-or-two) |
//! | look at a completion before taking it | [`Ring::peek`], [`Ring::reap_if`] |
//! | wait, by blocking or in an event loop | [the ring's module](mod@ring#ways-to-wait) |
//! | handle errors | [the ring's module](mod@ring#errors), [`error`] |
//! | cancel, and close | [the ring's module](mod@ring#cancel-and-close), [`Interface::stop`] |
//! | start, stop and restart in a task | [`InterfaceBuilder::start_async`], [`Interface::stop_async`], [`Interface::restart_async`] |
//! | translate from liburing | [the ring's module](mod@ring#coming-from-liburing) |
//! | make calls or futures of a ring | [`BlockingRing`], [`AsyncRing`] |
//! | choose a device | [Devices](#devices) |
//! | write a device | the module [`device`], the trait [`device::Device`] |
//! | forward from one device to another | [`Frame::forward_offload`]; [`software`] does in software what the other device does not do |
//!
//! # Devices
//!
//! [`InterfaceBuilder::device`] takes one of these. The modules of [`device`] describe each.
//!
//! * [`Embedded`]: a network in this process, or a switch below a TAP or vmnet for several guests.
//!   Everywhere, without privileges. The default on systems other than macOS.
//! * [`Loopback`]: each packet that is written can be read again. The reference device, for tests.
#![cfg_attr(all(target_os = "linux", feature = "tap"), doc = "* [`Tap`]:")]
#![cfg_attr(not(all(target_os = "linux", feature = "tap")), doc = "* `Tap`:")]
//!   a TAP of the kernel. On Linux, feature `tap`.
#![cfg_attr(feature = "socket", doc = "* [`Socket`]:")]
#![cfg_attr(not(feature = "socket"), doc = "* `Socket`:")]
//!   a wire to a VMM in another process: QEMU, krunkit, libkrun, vfkit, user-mode Linux. Feature
//!   `socket`.
#![cfg_attr(any(target_os = "macos", feature = "vmnet-sim"), doc = "* [`Vmnet`]:")]
#![cfg_attr(not(any(target_os = "macos", feature = "vmnet-sim")), doc = "* `Vmnet`:")]
//!   Apple's vmnet. On macOS, where it is the default; on other systems a simulation, feature
//!   `vmnet-sim`.
#![cfg_attr(feature = "pcap", doc = "* [`device::pcap::Capture`],")]
#![cfg_attr(not(feature = "pcap"), doc = "* `device::pcap::Capture`,")]
//!   around any other device: records its packets in a file. Feature `pcap`.
#![cfg_attr(feature = "fault", doc = "* [`device::fault::Faults`],")]
#![cfg_attr(not(feature = "fault"), doc = "* `device::fault::Faults`,")]
//!   around any other device: makes it misbehave, for tests. Feature `fault`.
//! * A [`Driver`] of your own; see [`device`].
//!
//! # Features
//!
//! None is on by default.
//!
//! | feature | brings |
//! |---|---|
//! | `tap` | the device `Tap` on Linux, and nothing on other systems |
//! | `pcap` | the module `device::pcap`: captures of any device as pcapng files, and a device that replays such a file |
//! | `fault` | the module `device::fault`: fault injection around any device |
//! | `futures` | `Stream` and `Sink` of packets for [`AsyncRing`]: `AsyncRing::packets`, `frame_sink` and `packet_sink` |
//! | `nat` | the module `device::embedded::nat`: guests of a shared [`Embedded`] network reach the world through sockets of the process, and ports of the host lead to them |
//! | `serde` | `Serialize` for [`Mode`], [`Status`], [`Ipv4Range`] and [`InterfaceInfo`], `Deserialize` for [`Mode`] and [`Status`] |
//! | `socket` | the device `Socket`: Unix sockets to VMMs |
//! | `vmnet-sim` | the device `Vmnet` on systems other than macOS, over a simulated vmnet, for tests; nothing on macOS |
//!
//! # Contracts
//!
//! Tests check each of these. `ARCHITECTURE.md` in the
//! [repository](https://github.com/vmring/vmring) names the tests.
//!
//! * A slot is in one place at a time.
//! * A refused submit gives the frame back.
//! * The completion queue never overflows.
//! * Packets complete in arrival order.
//! * No posted read, no packet: a device receives only into posted frames.
//! * A cancel never drops a packet.
//! * A close completes everything in flight.
//! * No wake-up is lost, and none is paid for while the other side is awake.
//!
//! The whole API is safe Rust, with two exceptions. An implementation of [`pool::Backing`], which
//! puts a pool on the user's own memory, is `unsafe`. On macOS, so is the call that takes over a
//! network object from an XPC message.

mod background;
pub mod blocking;
pub mod config;
pub mod device;
mod engine;
pub mod error;
mod fifo;
mod future;
pub mod interface;
mod lifecycle;
mod limits;
mod mailbox;
mod memory;
#[cfg(all(test, loom))]
mod models;
mod notify;
pub mod policy;
pub mod poller;
pub mod pool;
pub mod ring;
pub mod ring_builder;
mod selector;
#[cfg(feature = "serde")]
mod serde_impls;
pub mod stats;
mod sync;
mod sys;

pub use blocking::BlockingRing;
pub use config::{Direction, InterfaceConfig, InterfaceInfo, Ipv4Range, Mode};
pub use device::embedded::Embedded;
pub use device::loopback::Loopback;
pub use device::seam::Driver;
#[cfg(feature = "socket")]
pub use device::socket::Socket;
#[cfg(all(target_os = "linux", feature = "tap"))]
pub use device::tap::{Tap, TapEngine, TapForwarding};
#[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
pub use device::vmnet::{Vmnet, VmnetNetwork};
#[cfg(feature = "socket")]
pub use error::SocketError;
#[cfg(all(target_os = "linux", feature = "tap"))]
pub use error::TapError;
pub use error::{
    BatchError, CloseReason, CompletionError, ConfigError, EntryError, Error, GuestSubmitError,
    Status, SubmitError, SubmitErrorKind,
};
#[cfg(feature = "futures")]
pub use future::streams::{FrameSink, PacketSink, Packets};
pub use future::write::{AllocFuture, WriteFrameFuture, WriteFuture};
pub use future::{AsyncRing, ReadFuture, block_on};
pub use interface::{Interface, InterfaceBuilder, InterfaceMonitor};
pub use macaddr::MacAddr6;
pub use memory::{GuestMmap, page_size};
pub use policy::{IdlePolicy, RetryPolicy};
pub use poller::{Poller, PollerBuilder};
pub use pool::{Pool, PoolBuilder};
pub use ring::{
    Completion, CompletionHalf, CompletionInfo, CompletionQueue, HalfReap, Peek, Reap, Ring,
    RingControl, RingOp, SubmissionHalf, SubmissionQueue,
};
pub use ring_builder::{Drive, RingBuilder};
pub use vmring_core::guest;
pub use vmring_core::offload::{Checksum, Gso, LEN as OFFLOAD_LEN, OffloadError, OffloadHeader};
pub use vmring_core::view::ETHERNET_HEADER_LEN;
pub use vmring_core::{
    Frame, FrontError, GuestBuffer, GuestMemory, OutOfSpace, PacketView, SegmentTable,
};
pub use vmring_embedded::software;

/// The README's example, compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
