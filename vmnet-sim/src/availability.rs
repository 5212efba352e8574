//! The version of macOS that introduced each name.

use std::ffi::CStr;

use crate::objects::violation;

/// The names that are newer than macOS 11, with the version that introduced each.
pub(crate) static SINCE: &[(&CStr, (u32, u32))] = &[
    (c"vmnet_enable_checksum_offload_key", (12, 0)),
    (c"vmnet_read_max_packets_key", (15, 0)),
    (c"vmnet_write_max_packets_key", (15, 0)),
    (c"vmnet_enable_virtio_header_key", (15, 4)),
    (c"vmnet_interface_add_ip_port_forwarding_rule", (12, 0)),
    (c"vmnet_interface_remove_ip_port_forwarding_rule", (12, 0)),
    (c"vmnet_interface_get_ip_port_forwarding_rules", (12, 0)),
    (c"vmnet_ip_port_forwarding_rule_get_details", (12, 0)),
    (c"vmnet_network_configuration_create", (26, 0)),
    (c"vmnet_network_configuration_set_external_interface", (26, 0)),
    (c"vmnet_network_configuration_disable_nat44", (26, 0)),
    (c"vmnet_network_configuration_disable_nat66", (26, 0)),
    (c"vmnet_network_configuration_disable_dhcp", (26, 0)),
    (c"vmnet_network_configuration_disable_dns_proxy", (26, 0)),
    (c"vmnet_network_configuration_disable_router_advertisement", (26, 0)),
    (c"vmnet_network_configuration_set_ipv4_subnet", (26, 0)),
    (c"vmnet_network_configuration_set_ipv6_prefix", (26, 0)),
    (c"vmnet_network_configuration_set_mtu", (26, 0)),
    (c"vmnet_network_configuration_add_dhcp_reservation", (26, 0)),
    (c"vmnet_network_configuration_add_port_forwarding_rule", (26, 0)),
    (c"vmnet_network_create", (26, 0)),
    (c"vmnet_network_get_ipv4_subnet", (26, 0)),
    (c"vmnet_network_get_ipv6_prefix", (26, 0)),
    (c"vmnet_network_copy_serialization", (26, 0)),
    (c"vmnet_network_create_with_serialization", (26, 0)),
    (c"vmnet_interface_start_with_network", (26, 0)),
    (c"CFRelease", (10, 10)),
];

/// The version of macOS that introduced `name`, or `None` if all versions have it.
pub(crate) fn since(name: &CStr) -> Option<(u32, u32)> {
    SINCE.iter().find(|(known, _)| *known == name).map(|(_, since)| *since)
}

/// Aborts if this version of macOS does not have `name`: a program that links to a missing name
/// does not even start.
pub(crate) fn require(here: (u32, u32), name: &CStr) {
    if let Some(since) = since(name).filter(|since| *since > here) {
        violation(&format!(
            "{}: macOS {}.{} does not have it, {}.{} does",
            name.to_string_lossy(),
            here.0,
            here.1,
            since.0,
            since.1
        ));
    }
}

/// Like [`require`], for the variable of the key with this name.
pub(crate) fn require_key(here: (u32, u32), name: &str) {
    let variable = std::ffi::CString::new(format!("vmnet_{name}_key")).expect("a key's name");
    require(here, &variable);
}
