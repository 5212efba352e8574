//! A guest of a server: a kernel with a network namespace of its own, and the bridge from its TAP to the
//! server's socket.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Stdio};

use crate::host::{Host, ip};

/// The gateway of the server's network.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);

/// See the [module](self). It leaves when it is dropped.
pub(crate) struct Visitor {
    pub(crate) host: Host,
    bridge: Child,
}

impl Visitor {
    /// A guest with a static address, which joins by this socket.
    pub(crate) fn new(wire: &Path, address: &'static str) -> Self {
        let host = Host::new();
        host.run(move || {
            ip("link set lo up");
            ip("tuntap add t0 mode tap");
            ip(&format!("address add {address}/24 dev t0"));
            ip("link set t0 up");
            ip(&format!("route add default via {GATEWAY}"));
        });
        let mut command = host.command(env!("CARGO_BIN_EXE_vmring"));
        command.args(["bridge", "tap:t0", &format!("qemu:{},client", wire.display())]);
        let bridge = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let bridge = bridge.spawn().expect("the command starts");
        Self { host, bridge }
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.bridge.kill();
        let _ = self.bridge.wait();
    }
}
