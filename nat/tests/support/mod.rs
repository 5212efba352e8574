//! What the tests share: a model of the kernel's sockets, a guest's port, and scripts.
#![allow(dead_code)] // Each test program uses a part of it.

pub(crate) mod datagram;
pub(crate) mod kernel;
pub(crate) mod port;
pub(crate) mod script;
