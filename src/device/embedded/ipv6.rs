//! The IPv6 of an embedded network: which prefix it has, and what its gateway counts.

use std::net::Ipv6Addr;

use vmring_embedded::Ipv6Config;
use vmring_embedded::gateway::Ipv6Stats;

/// Which IPv6 prefix a network has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Choice {
    /// One of its name if it has a way out. Otherwise none.
    #[default]
    WithWayOut,
    No,
    OfName,
    Prefix(Ipv6Addr),
}

impl Choice {
    /// The settings for the network of this name.
    pub(super) fn settings(self, name: &str, has_way_out: bool) -> Option<Ipv6Config> {
        match self {
            Self::WithWayOut if !has_way_out => None,
            Self::No => None,
            Self::WithWayOut | Self::OfName => Some(Ipv6Config::of_name(name)),
            Self::Prefix(prefix) => Some(Ipv6Config::new(prefix)),
        }
    }
}

/// What a gateway has done with packets of IPv6.
pub(super) fn counters(stats: &Ipv6Stats) -> [(&'static str, u64); 23] {
    [
        ("gateway IPv6 neighbor advertisements", stats.neighbor_advertisements),
        ("gateway IPv6 router advertisements", stats.router_advertisements),
        ("gateway IPv6 echo replies", stats.echo_replies),
        ("gateway DHCPv6 replies", stats.dhcp_replies),
        ("gateway IPv6 solicitations limited", stats.solicitations_limited),
        ("gateway IPv6 refused TCP", stats.refused_tcp),
        ("gateway IPv6 refused UDP", stats.refused_udp),
        ("gateway IPv6 refused protocols", stats.refused_protocol),
        ("gateway IPv6 refused fragments", stats.refused_fragments),
        ("gateway IPv6 refused routes", stats.refused_route),
        ("gateway IPv6 errors limited", stats.errors_limited),
        ("gateway IPv6 other neighbors", stats.other_neighbors),
        ("gateway IPv6 foreign routers", stats.foreign_routers),
        ("gateway DHCPv6 others", stats.other_dhcp),
        ("gateway IPv6 other ICMP", stats.other_icmp),
        ("gateway IPv6 resets", stats.resets),
        ("gateway IPv6 later fragments", stats.later_fragments),
        ("gateway IPv6 multicasts", stats.multicasts),
        ("gateway IPv6 discarded", stats.discarded),
        ("gateway IPv6 bad source", stats.bad_source),
        ("gateway IPv6 malformed", stats.malformed),
        ("gateway IPv6 unsent", stats.unsent),
        ("gateway IPv6 conflicts", stats.conflicts),
    ]
}
