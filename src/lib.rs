//! vmring
#![warn(missing_docs)]

pub mod blocking;
pub mod device;
mod error;
pub mod future;
mod interface;
mod memory;
mod notify;
mod poller;
pub mod pool;
mod ring;
#[cfg(feature = "serde")]
mod sexp;
pub mod stats;

pub use blocking::Blocking;
pub use device::embedded::Embedded;
pub use device::loopback::Loopback;
pub use error::{
    BatchError, Closed, CompletionError, ConfigError, Direction, EntryError, Error, Status,
    SubmitError, SubmitErrorKind,
};
pub use future::{Async, block_on};
pub use interface::{
    Builder, Config, Drive, Driver, Interface, InterfaceInfo, Ipv4Range, Mode, RingBuilder,
};
pub use macaddr::MacAddr6;
pub use memory::page_size;
pub use poller::{IdlePolicy, Poller, PollerBuilder, RetryPolicy};
pub use pool::{Pool, PoolBuilder};
pub use ring::{
    Armed, Completion, CompletionQueue, Half, Op, Reap, Ring, RingControl, SubmissionQueue,
};
pub use vmring_core::{Frame, OutOfRoom, PacketView};
