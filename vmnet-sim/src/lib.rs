//! The C ABI of Apple's vmnet, with the parts of XPC, libdispatch and the Blocks runtime that a
//! driver needs, for systems other than macOS. With it the tests of vmring's macOS driver run there
//! on the very same source files.
//!
//! Interfaces of one [`World`] that name the same network really exchange frames and get leases,
//! because the simulator uses [`vmring_embedded`] underneath.
//!
//! The simulator is strict: whatever vmnet's header forbids, or is known to go wrong, prints a
//! sentence and aborts the process. It is scriptable: a [`Script`] says for each interface what
//! vmnet answers, and when. So where Apple's documents leave a question open, a test can try both
//! answers.
//!
//! On macOS this crate is empty.

#![cfg(not(target_os = "macos"))]

mod availability;
mod blocks;
mod description;
mod dispatch;
mod forwarding;
mod framing;
mod interface;
mod keys;
mod limits;
mod mapped;
mod network;
mod objects;
mod rules;
mod script;
mod settings;
mod status;
mod symbols;
mod threads;
mod world;
mod xpc;

use std::ffi::{CStr, c_void};

pub use script::{
    CallPlan, Counts, Dead, Events, ForwardMade, NetworkMade, NetworkPlan, Reported, Script,
    StartHandler, StartPlan, StopPlan, Value,
};
pub use world::{Host, Rules, World};

/// What `dlsym` would find on the current world's macOS. Null for a name that this version lacks,
/// and for a name that no version has.
pub fn symbol(name: &CStr) -> *const c_void {
    symbols::find(name, World::current().host().macos)
}

/// The version of macOS that the current world simulates.
pub fn macos_version() -> (u32, u32) {
    World::current().host().macos
}

/// Whether the current world's process is root.
pub fn is_root() -> bool {
    World::current().host().root
}
