//! A host and the world outside of it: network namespaces with a cable between them.

use crate::host::{Host, ip};

/// The address of a server outside.
pub(crate) const OUTSIDE: &str = "203.0.113.1";
/// The host's own address.
pub(crate) const HOST: &str = "203.0.113.2";

/// See the [module](self).
pub(crate) struct World {
    pub(crate) host: Host,
    pub(crate) outside: Host,
}

impl World {
    pub(crate) fn new() -> Self {
        let (host, outside) = (Host::new(), Host::new());
        let there = outside.namespace().split('/').nth(4).expect("a thread").to_owned();
        host.run(move || {
            ip("link set lo up");
            ip(&format!("link add w0 type veth peer name w1 netns {there}"));
            ip(&format!("address add {HOST}/24 dev w0"));
            ip("link set w0 up");
            ip(&format!("route add default via {OUTSIDE}"));
        });
        outside.run(|| {
            ip("link set lo up");
            ip(&format!("address add {OUTSIDE}/24 dev w1"));
            ip("link set w1 up");
        });
        Self { host, outside }
    }
}
