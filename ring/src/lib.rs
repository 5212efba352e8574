//! The rings of [`vmring`](https://docs.rs/vmring): submission and completion queues, frames and
//! packet views.
//!
//! This crate makes no OS call (it is `no_std`) and allocates nothing after construction.
//!
//! [`rings()`] makes a ring and returns its four halves. `slots.rs` states the two invariants on
//! which the unsafe code relies, "one place per slot" and "the pool outlives its slots".
#![cfg_attr(not(any(test, loom)), no_std)]

extern crate alloc;

mod backing;
mod buffer;
mod cq;
mod credits;
pub mod doorbell;
mod entry;
mod frame;
pub mod guest;
mod limits;
pub mod offload;
mod pool;
mod prefetch;
mod queue;
mod regions;
mod rings;
mod segment_slots;
mod slots;
mod sq;
#[doc(hidden)]
pub mod sync;
pub mod view;

pub use backing::{Backing, HeapBacking};
pub use buffer::Buffer;
pub use cq::{CqConsumer, CqProducer, CqeRef, DoneReads, Reaped};
pub use credits::Class;
pub use entry::{Cqe, GUEST, Opcode, Outcome, SKIP_SUCCESS, Sqe};
pub use frame::{Frame, FrontError, OutOfSpace};
pub use guest::{GuestBuffer, GuestMemory, SegmentTable};
pub use limits::DEPTH_MAX;
pub use pool::Pool;
pub use prefetch::{prefetch_for_writing, prefetch_line_for_writing};
pub use regions::Regions;
pub use rings::{Depths, rings};
pub use slots::{Layout, LayoutError};
pub use sq::{LeadingFrames, PushError, Reads, SqConsumer, SqProducer, SqeRef, Submission};
pub use view::PacketView;
