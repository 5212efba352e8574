//! A virtio-net device over an interface.

#![forbid(unsafe_code)]

mod control;
mod copying;
mod device;
mod features;
mod header;
mod interrupt;
mod lane;
mod limits;
mod readiness;
mod rx;
mod snapshot;
mod spawn;
mod stats;
mod tx;
mod vhost_user;
mod window;

pub use crate::config::NetConfig;
pub use device::{NetDevice, NetError, NetSettings, Progress, QueueSetup};
pub use features::Features;
pub use interrupt::{EventInterrupt, Interrupt};
pub use readiness::Notifier;
pub use snapshot::SavedQueue;
pub use spawn::NetThread;
pub use stats::{NetStats, StatsHandle};
pub use vhost_user::{Ended, ServeError, VhostUserNet, serve_connection};
