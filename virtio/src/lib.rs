//! The device side of virtio for [`vmring`](https://docs.rs/vmring).

pub mod queue;
pub mod vhost_user;
