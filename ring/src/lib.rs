//! The rings of [`vmring`](https://docs.rs/vmring): submission and completion queues, frames and
//! packet views.
//!
//! This crate makes no OS call (it is `no_std`) and allocates nothing after construction.
#![cfg_attr(not(any(test, loom)), no_std)]

extern crate alloc;

pub mod doorbell;
#[doc(hidden)]
pub mod sync;
