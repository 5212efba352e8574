//! The device side of virtio for [`vmring`](https://docs.rs/vmring).

mod config;
mod event;
pub mod net;
pub mod queue;
mod selector;
mod sys;
pub mod vhost_user;

pub use config::NetConfig;
pub use event::Event;
