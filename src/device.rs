//! The one seam between the poller and a system: [`Device`], its [`Queue`]s, and the
//! [`PostedSlot`]s they fill and drain.
//!
//! A device is completion-shaped: the poller lends it slots, asks it to make progress without
//! blocking, and gets each slot back by value. Batch calls (vmnet, a TAP's read and write) take a
//! slot and complete it in the same call; a real completion engine (io_uring) keeps it until the
//! kernel lets go. Everything here is safe Rust, and a device cannot break memory safety: a slot
//! cannot be cloned, so it cannot be given back twice, and giving it back takes its memory away.
//!
//! See `examples/device.rs` for a device of one's own.

pub(crate) mod catch;
mod common;
pub(crate) mod completions;
pub(crate) mod context;
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
#[cfg(all(target_os = "linux", feature = "tap"))]
pub mod tap;
#[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
pub mod vmnet;

pub use crate::config::{Offloads, PortForward, Protocol};
pub use context::{CompletedSlot, PollContext};
pub use relay::Relay;
pub use seam::{Capabilities, Device, Driver, Lease, Progress, Queue, Wake};
pub use slot::PostedSlot;
