//! A wrapper that records the packets of any device, in both directions, in a pcapng file.
//!
//! ```no_run
//! use vmring::device::pcap::Capture;
//! use vmring::{Embedded, Interface};
//!
//! let capture = Capture::create("run.pcapng")?;
//! let driver = capture.wrap("guest0", Embedded::network("lab"));
//! let interface = Interface::builder().device(driver).start()?;
//! // ... rings, packets ...
//! drop(interface);
//! capture.finish()?;
//! # Ok::<(), vmring::Error>(())
//! ```
//!
//! A thread of the capture's own writes the file. Each packet is there within about 100 ms, so a
//! capture can be watched live through a named pipe, and is readable after the process was killed.
//!
//! [`Replay`] is the opposite: a device that reads its packets out of such a file.

mod blocks;
mod capture;
mod classic;
mod format;
mod record;
mod replay;
mod source;
mod spool;

pub use capture::{Capture, Recorded};
pub use replay::Replay;
