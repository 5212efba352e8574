//! The device side of virtio for [`vmring`](https://docs.rs/vmring).

pub mod queue;
