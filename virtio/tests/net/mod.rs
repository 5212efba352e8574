//! The virtio-net device, over real interfaces, with a driver of our own.

mod basics;
mod callbacks;
mod commands;
mod guest;
mod hostile;
mod late;
mod life;
mod migration;
mod offloads;
mod random;
mod remote;
mod snapshots;
#[cfg(target_os = "linux")]
mod tap;
mod vhost;
mod waking;
mod wire;
