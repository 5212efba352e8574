//! What `dlsym` finds: the addresses of the names that are newer than macOS 11.

use std::ffi::{CStr, c_void};
use std::ptr;

use crate::availability::since;
use crate::interface::start;
use crate::keys::{
    vmnet_enable_checksum_offload_key, vmnet_enable_virtio_header_key, vmnet_read_max_packets_key,
    vmnet_write_max_packets_key,
};
use crate::{forwarding, network};

/// The address of a function or a constant.
struct Address(*const c_void);

// SAFETY: it is the address of a function or a constant.
unsafe impl Sync for Address {}

/// The names that are newer than macOS 11.
static ADDRESSES: &[(&CStr, Address)] = &{
    macro_rules! function {
        ($module:ident, $name:ident, $name_c:literal) => {
            ($name_c, Address($module::$name as *const c_void))
        };
    }
    macro_rules! variable {
        ($name:ident, $name_c:literal) => {
            ($name_c, Address((&raw const $name).cast()))
        };
    }
    [
        variable!(vmnet_enable_checksum_offload_key, c"vmnet_enable_checksum_offload_key"),
        variable!(vmnet_read_max_packets_key, c"vmnet_read_max_packets_key"),
        variable!(vmnet_write_max_packets_key, c"vmnet_write_max_packets_key"),
        variable!(vmnet_enable_virtio_header_key, c"vmnet_enable_virtio_header_key"),
        function!(
            forwarding,
            vmnet_interface_add_ip_port_forwarding_rule,
            c"vmnet_interface_add_ip_port_forwarding_rule"
        ),
        function!(
            forwarding,
            vmnet_interface_remove_ip_port_forwarding_rule,
            c"vmnet_interface_remove_ip_port_forwarding_rule"
        ),
        function!(
            forwarding,
            vmnet_interface_get_ip_port_forwarding_rules,
            c"vmnet_interface_get_ip_port_forwarding_rules"
        ),
        function!(
            forwarding,
            vmnet_ip_port_forwarding_rule_get_details,
            c"vmnet_ip_port_forwarding_rule_get_details"
        ),
        function!(
            network,
            vmnet_network_configuration_create,
            c"vmnet_network_configuration_create"
        ),
        function!(
            network,
            vmnet_network_configuration_set_external_interface,
            c"vmnet_network_configuration_set_external_interface"
        ),
        function!(
            network,
            vmnet_network_configuration_disable_nat44,
            c"vmnet_network_configuration_disable_nat44"
        ),
        function!(
            network,
            vmnet_network_configuration_disable_nat66,
            c"vmnet_network_configuration_disable_nat66"
        ),
        function!(
            network,
            vmnet_network_configuration_disable_dhcp,
            c"vmnet_network_configuration_disable_dhcp"
        ),
        function!(
            network,
            vmnet_network_configuration_disable_dns_proxy,
            c"vmnet_network_configuration_disable_dns_proxy"
        ),
        function!(
            network,
            vmnet_network_configuration_disable_router_advertisement,
            c"vmnet_network_configuration_disable_router_advertisement"
        ),
        function!(
            network,
            vmnet_network_configuration_set_ipv4_subnet,
            c"vmnet_network_configuration_set_ipv4_subnet"
        ),
        function!(
            network,
            vmnet_network_configuration_set_ipv6_prefix,
            c"vmnet_network_configuration_set_ipv6_prefix"
        ),
        function!(
            network,
            vmnet_network_configuration_set_mtu,
            c"vmnet_network_configuration_set_mtu"
        ),
        function!(
            network,
            vmnet_network_configuration_add_dhcp_reservation,
            c"vmnet_network_configuration_add_dhcp_reservation"
        ),
        function!(
            network,
            vmnet_network_configuration_add_port_forwarding_rule,
            c"vmnet_network_configuration_add_port_forwarding_rule"
        ),
        function!(network, vmnet_network_create, c"vmnet_network_create"),
        function!(network, vmnet_network_get_ipv4_subnet, c"vmnet_network_get_ipv4_subnet"),
        function!(network, vmnet_network_get_ipv6_prefix, c"vmnet_network_get_ipv6_prefix"),
        function!(network, vmnet_network_copy_serialization, c"vmnet_network_copy_serialization"),
        function!(
            network,
            vmnet_network_create_with_serialization,
            c"vmnet_network_create_with_serialization"
        ),
        function!(start, vmnet_interface_start_with_network, c"vmnet_interface_start_with_network"),
        function!(network, CFRelease, c"CFRelease"),
    ]
};

/// The address of `name` on this version of macOS, or null.
pub(crate) fn find(name: &CStr, macos: (u32, u32)) -> *const c_void {
    if since(name).is_none_or(|since| since > macos) {
        return ptr::null();
    }
    let found = ADDRESSES.iter().find(|(known, _)| *known == name);
    found.map_or(ptr::null(), |(_, address)| address.0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::ADDRESSES;
    use crate::availability::SINCE;

    /// Goal: each name has both a version and an address, and has them once.
    #[test]
    fn names_have_a_version_and_an_address() {
        let versions: BTreeSet<_> = SINCE.iter().map(|(name, _)| *name).collect();
        let addresses: BTreeSet<_> = ADDRESSES.iter().map(|(name, _)| *name).collect();
        assert_eq!(versions, addresses);
        assert_eq!((SINCE.len(), ADDRESSES.len()), (versions.len(), addresses.len()));
    }
}
