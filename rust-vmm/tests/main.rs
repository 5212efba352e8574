//! The crate's tests, as one program.

mod conversions;
mod guest;
mod late;
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
// An interface that does what a test says.
#[allow(dead_code)]
#[path = "../../virtio/tests/net/wire.rs"]
mod wire;

/// What the wire wants to know of a guest.
mod net {
    pub(crate) mod guest {
        pub(crate) use crate::guest::HEADER;
    }
}

#[allow(dead_code)]
#[path = "../examples/vmm_loop.rs"]
mod vmm_loop;

/// Goal: the example runs, and stays as short as the README says.
#[cfg(target_os = "linux")]
#[test]
fn the_example_runs() {
    support::guarded("the example", || vmm_loop::main().expect("all packets arrive"));
    let lines = include_str!("../examples/vmm_loop.rs").lines().map(str::trim);
    let code = lines.filter(|line| !line.is_empty() && !line.starts_with("//")).count();
    assert!(code < 60, "it has {code} lines of code");
}
