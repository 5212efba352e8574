//! The virtio-net device of vmring for virtual machine monitors (VMMs) that are built from
//! [rust-vmm](https://github.com/rust-vmm) crates.

mod memory;
mod queue;

pub use memory::{MemoryError, MemorySource, region};
pub use queue::{QueueConversionError, QueueDescription};

pub use virtio_queue;
pub use vm_memory;
#[cfg(target_os = "linux")]
pub use vmm_sys_util;
pub use vmring;
pub use vmring_virtio;
