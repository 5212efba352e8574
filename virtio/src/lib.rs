//! The device side of virtio for [`vmring`](https://docs.rs/vmring).

mod config;
mod event;
pub mod queue;
mod sys;
pub mod vhost_user;
