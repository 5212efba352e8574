//! What the parent tells the child about its network: one line of JSON.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// The addresses of the TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) address: Ipv4Addr,
    pub(super) mask: Ipv4Addr,
    /// The router and the name server.
    pub(super) gateway: Ipv4Addr,
    /// The network's prefix of IPv6, of 64 bits, if it has one.
    pub(super) prefix: Option<Ipv6Addr>,
}
