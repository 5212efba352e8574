//! Which name is there since which macOS, and the keys.
//!
//! The keys' texts are not Apple's: whoever writes them out instead of reading the variables fails.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use crate::objects::violation;
use crate::world::World;
use crate::{forwarding, network};

/// A key: a constant that points at its text.
#[repr(transparent)]
pub(crate) struct Key(*const c_char);

// SAFETY: it points at a constant.
unsafe impl Sync for Key {}

/// Declares the keys: variable, name, type of the value that goes in (`-`: none does).
macro_rules! keys {
    ($($variable:ident $name:literal $class:literal;)*) => {
        $(
            #[unsafe(no_mangle)]
            #[allow(non_upper_case_globals, reason = "the name is Apple's")]
            pub(crate) static $variable: Key =
                Key(concat!("sim.", $name, "\0").as_ptr().cast());
        )*

        const KEYS: &[(&str, &str, char)] =
            &[$(($name, concat!("sim.", $name, "\0"), $class)),*];
    };
}

keys! {
    vmnet_operation_mode_key "operation_mode" 'u';
    vmnet_interface_id_key "interface_id" 'i';
    vmnet_mac_address_key "mac_address" 's';
    vmnet_allocate_mac_address_key "allocate_mac_address" 'b';
    vmnet_mtu_key "mtu" 'u';
    vmnet_max_packet_size_key "max_packet_size" '-';
    vmnet_start_address_key "start_address" 's';
    vmnet_end_address_key "end_address" 's';
    vmnet_subnet_mask_key "subnet_mask" 's';
    vmnet_shared_interface_name_key "shared_interface_name" 's';
    vmnet_nat66_prefix_key "nat66_prefix" 's';
    vmnet_network_identifier_key "network_identifier" 'i';
    vmnet_host_ip_address_key "host_ip_address" 's';
    vmnet_host_subnet_mask_key "host_subnet_mask" 's';
    vmnet_host_ipv6_address_key "host_ipv6_address" 's';
    vmnet_enable_isolation_key "enable_isolation" 'b';
    vmnet_enable_tso_key "enable_tso" 'b';
    vmnet_enable_checksum_offload_key "enable_checksum_offload" 'b';
    vmnet_enable_virtio_header_key "enable_virtio_header" 'b';
    vmnet_read_max_packets_key "read_max_packets" '-';
    vmnet_write_max_packets_key "write_max_packets" '-';
    vmnet_estimated_packets_available_key "estimated_packets_available" '-';
}

/// A key's text, by its name.
pub(crate) fn key(name: &str) -> &'static CStr {
    let (_, text, _) = KEYS.iter().find(|(known, ..)| *known == name).expect("a key's name");
    CStr::from_bytes_with_nul(text.as_bytes()).expect("it ends with a zero byte")
}

/// The name of the key with that text, if it may stand in a description.
pub(crate) fn input(text: &str) -> Option<&'static str> {
    let name = text.strip_prefix("sim.")?;
    KEYS.iter().find(|(known, _, class)| *known == name && *class != '-').map(|(name, ..)| *name)
}

/// The type of a description's value.
pub(crate) fn input_type(name: &str) -> char {
    KEYS.iter().find(|(known, ..)| *known == name).map_or('-', |(.., class)| *class)
}

/// The version of macOS that has a name, if not all have it.
fn since(name: &CStr) -> Option<(u32, u32)> {
    SYMBOLS.iter().find(|(known, ..)| *known == name).map(|(_, since, _)| *since)
}

/// On a macOS that lacks a name whoever refers to it does not even start.
pub(crate) fn require(world: &World, name: &CStr) {
    let here = world.host().macos;
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

/// As [`require`], for the key of that name.
pub(crate) fn require_key(world: &World, name: &str) {
    let variable = std::ffi::CString::new(format!("vmnet_{name}_key")).expect("a key's name");
    require(world, &variable);
}

/// An address in a constant.
struct Address(*const c_void);

// SAFETY: the address of a function or a constant.
unsafe impl Sync for Address {}

/// What came after macOS 11.
static SYMBOLS: &[(&CStr, (u32, u32), Address)] = &{
    macro_rules! function {
        ($module:ident, $name:ident, $name_c:literal, $since:expr) => {
            ($name_c, $since, Address($module::$name as *const c_void))
        };
    }
    macro_rules! variable {
        ($name:ident, $name_c:literal, $since:expr) => {
            ($name_c, $since, Address((&raw const $name).cast()))
        };
    }
    [
        variable!(vmnet_enable_checksum_offload_key, c"vmnet_enable_checksum_offload_key", (12, 0)),
        variable!(vmnet_read_max_packets_key, c"vmnet_read_max_packets_key", (15, 0)),
        variable!(vmnet_write_max_packets_key, c"vmnet_write_max_packets_key", (15, 0)),
        variable!(vmnet_enable_virtio_header_key, c"vmnet_enable_virtio_header_key", (15, 4)),
        function!(
            forwarding,
            vmnet_interface_add_ip_port_forwarding_rule,
            c"vmnet_interface_add_ip_port_forwarding_rule",
            (12, 0)
        ),
        function!(
            forwarding,
            vmnet_interface_remove_ip_port_forwarding_rule,
            c"vmnet_interface_remove_ip_port_forwarding_rule",
            (12, 0)
        ),
        function!(
            forwarding,
            vmnet_interface_get_ip_port_forwarding_rules,
            c"vmnet_interface_get_ip_port_forwarding_rules",
            (12, 0)
        ),
        function!(
            forwarding,
            vmnet_ip_port_forwarding_rule_get_details,
            c"vmnet_ip_port_forwarding_rule_get_details",
            (12, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_create,
            c"vmnet_network_configuration_create",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_set_external_interface,
            c"vmnet_network_configuration_set_external_interface",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_disable_nat44,
            c"vmnet_network_configuration_disable_nat44",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_disable_nat66,
            c"vmnet_network_configuration_disable_nat66",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_disable_dhcp,
            c"vmnet_network_configuration_disable_dhcp",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_disable_dns_proxy,
            c"vmnet_network_configuration_disable_dns_proxy",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_disable_router_advertisement,
            c"vmnet_network_configuration_disable_router_advertisement",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_set_ipv4_subnet,
            c"vmnet_network_configuration_set_ipv4_subnet",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_set_ipv6_prefix,
            c"vmnet_network_configuration_set_ipv6_prefix",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_set_mtu,
            c"vmnet_network_configuration_set_mtu",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_add_dhcp_reservation,
            c"vmnet_network_configuration_add_dhcp_reservation",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_configuration_add_port_forwarding_rule,
            c"vmnet_network_configuration_add_port_forwarding_rule",
            (26, 0)
        ),
        function!(network, vmnet_network_create, c"vmnet_network_create", (26, 0)),
        function!(
            network,
            vmnet_network_get_ipv4_subnet,
            c"vmnet_network_get_ipv4_subnet",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_get_ipv6_prefix,
            c"vmnet_network_get_ipv6_prefix",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_copy_serialization,
            c"vmnet_network_copy_serialization",
            (26, 0)
        ),
        function!(
            network,
            vmnet_network_create_with_serialization,
            c"vmnet_network_create_with_serialization",
            (26, 0)
        ),
        function!(
            network,
            vmnet_interface_start_with_network,
            c"vmnet_interface_start_with_network",
            (26, 0)
        ),
        function!(network, CFRelease, c"CFRelease", (10, 10)),
    ]
};

/// The address of a name on that macOS, or null.
pub(crate) fn find(name: &CStr, macos: (u32, u32)) -> *const c_void {
    let found = SYMBOLS.iter().find(|(known, since, _)| *known == name && *since <= macos);
    found.map_or(ptr::null(), |(.., address)| address.0)
}
