//! The crate's tests, as one program.

mod conversions;
mod guest;
mod life;
mod memory;
mod updates;

// The other side of a virtqueue, which the tests of `vmring-virtio` have.
#[allow(dead_code)]
#[path = "../../virtio/tests/driver/mod.rs"]
mod driver;
#[allow(dead_code, unused_imports)]
#[path = "../../virtio/tests/support/mod.rs"]
mod support;
