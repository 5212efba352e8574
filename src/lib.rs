//! io_uring-style packet rings for virtual machine monitors.
//!
//! A [`Ring`] is a pair of lock-free queues between a VMM and a network device. The VMM moves a
//! [`Frame`] (the exclusive owner of one slot of a page-aligned [`Pool`]) into the submission queue
//! to have it filled ([`submit_read`](Ring::submit_read)) or sent
//! ([`submit_write`](Ring::submit_write)); a poller drives the device in batches; each submission
//! comes back once through the completion queue ([`reap`](Ring::reap)), with its frame.
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
//! // Bob posts a frame; Alice sends one.
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
//! // Everything closes by itself when dropped, in any order; `close` says how it went.
//! to.close()?;
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! * **What a VMM needs**: [`Interface`], [`Ring`] and its halves, [`Drive`] (who polls),
//!   [`Completion`]; for event loops [`Ring::completion_fd`].
//! * **Front-ends**: [`BlockingRing`] and [`AsyncRing`], each over a ring of its own.
//! * **Devices**: [`Embedded`] (the default), [`Loopback`], the wrappers in [`device`], and the trait
//!   [`device::Device`] for your own.
//! * **From one device to another**: [`Frame::forward_offload`], and [`software`] for what the other
//!   one does not do.
//! * **Contracts** (each has a test of its name): a slot is in one place at a time; a refused submit
//!   gives the frame back; the completion queue never overflows; packets complete in arrival order;
//!   no posted read, no packet; a cancel never drops a packet; closing completes everything in
//!   flight; no wake-up is lost, and none is paid for while the other side is awake.
//!
//! The whole API is safe Rust. The only `unsafe` a user can write is an implementation of
//! [`pool::Backing`], to put a pool on memory of his own; and, on macOS, taking over a network object
//! that came in an XPC message.

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
mod notify;
pub mod policy;
pub mod poller;
pub mod pool;
pub mod ring;
pub mod ring_builder;
#[cfg(feature = "serde")]
mod serde_impls;
pub mod software;
pub mod stats;
mod sys;

pub use blocking::BlockingRing;
pub use config::{Direction, InterfaceConfig, InterfaceInfo, Ipv4Range, Mode};
pub use device::embedded::Embedded;
pub use device::loopback::Loopback;
pub use device::seam::Driver;
#[cfg(all(target_os = "linux", feature = "tap"))]
pub use device::tap::{Tap, TapEngine};
#[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
pub use device::vmnet::{Vmnet, VmnetNetwork};
#[cfg(all(target_os = "linux", feature = "tap"))]
pub use error::TapError;
pub use error::{
    BatchError, CloseReason, CompletionError, ConfigError, EntryError, Error, Status, SubmitError,
    SubmitErrorKind,
};
pub use future::{AsyncRing, block_on};
pub use interface::{Interface, InterfaceBuilder};
pub use macaddr::MacAddr6;
pub use memory::page_size;
pub use policy::{IdlePolicy, RetryPolicy};
pub use poller::{Poller, PollerBuilder};
pub use pool::{Pool, PoolBuilder};
pub use ring::{
    Completion, CompletionHalf, CompletionQueue, HalfReap, Reap, Ring, RingControl, RingOp,
    SubmissionHalf, SubmissionQueue,
};
pub use ring_builder::{Drive, RingBuilder};
pub use vmring_core::offload::{Checksum, Gso, LEN as OFFLOAD_LEN, OffloadError, OffloadHeader};
pub use vmring_core::view::ETHERNET_HEADER_LEN;
pub use vmring_core::{Frame, FrontError, OutOfSpace, PacketView};

/// The README's example, compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
