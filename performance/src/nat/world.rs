//! A host, on which a translator runs, and the world outside of it: two network namespaces with a veth
//! pair between them. Each contender has such a pair of its own, and all of them are alike.

use std::fs;
use std::net::Ipv4Addr;

use crate::net::{Namespace, ip};
use crate::result::Result;

/// The addresses of the servers outside.
pub(super) const SERVERS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(203, 0, 113, 1),
    Ipv4Addr::new(203, 0, 113, 2),
    Ipv4Addr::new(203, 0, 113, 3),
    Ipv4Addr::new(203, 0, 113, 4),
];
/// The host's own address.
const HOST: &str = "203.0.113.100";
/// The host's router, which is none of the servers.
const ROUTER: &str = "203.0.113.254";
/// The host's interface to the world.
pub(super) const WORLD: &str = "world";
const CABLE: &str = "cable";

/// See the [module](self).
pub(super) struct World {
    pub(super) host: Namespace,
    pub(super) outside: Namespace,
}

impl World {
    pub(super) fn new() -> Result<Self> {
        let (host, outside) = (Namespace::new()?, Namespace::new()?);
        host.inside(|| {
            ip(&format!("link add {WORLD} type veth peer name {CABLE}"))?;
            outside.adopt(CABLE)?;
            ip(&format!("address add {HOST}/24 dev {WORLD}"))?;
            ip(&format!("link set {WORLD} up"))
        })?;
        outside.inside(|| {
            for address in SERVERS {
                ip(&format!("address add {address}/24 dev {CABLE}"))?;
            }
            ip(&format!("address add {ROUTER}/24 dev {CABLE}"))?;
            ip(&format!("link set {CABLE} up"))
        })?;
        host.inside(|| {
            ip(&format!("route add default via {ROUTER}"))?;
            // User-mode Linux pings, which takes a ping socket of whoever translates.
            fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
            many_ports()
        })?;
        Ok(Self { host, outside })
    }
}

/// Lets the calling thread's namespace have as many connections per server and minute as there are ports.
pub(super) fn many_ports() -> Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535")?;
    Ok(fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")?)
}
