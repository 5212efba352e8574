//! The back end of vhost-user, for a network device.
//!
//! A front end (QEMU, cloud-hypervisor, crosvm, user-mode Linux, libkrun, DPDK's virtio-user) shares
//! the memory of its guest, and says where the guest's rings are. [`message::Message`] is what it
//! says, checked.
//!
//! The document is QEMU's `docs/interop/vhost-user.rst`. Names of sections here are those of it.

mod error;
pub mod features;
pub mod message;
mod request;

pub use error::{Error, MapError};
pub use request::Request;
