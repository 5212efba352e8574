//! The keys of a description and of the parameters.
//!
//! The keys' texts are not Apple's, so code that writes them out instead of reading the variables
//! fails.

use std::ffi::{CStr, c_char};

/// A key: a constant that points at its text.
#[repr(transparent)]
pub(crate) struct Key(*const c_char);

// SAFETY: it points at a constant.
unsafe impl Sync for Key {}

/// Declares the keys. Each row has the variable, the name, and the type of the value in a
/// description; `-` means that the key is not for descriptions.
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

/// The text of the key with this name.
pub(crate) fn key(name: &str) -> &'static CStr {
    let (_, text, _) = KEYS.iter().find(|(known, ..)| *known == name).expect("a key's name");
    CStr::from_bytes_with_nul(text.as_bytes()).expect("it ends with a zero byte")
}

/// The name of the key with this text, if the key may be used in a description.
pub(crate) fn input(text: &str) -> Option<&'static str> {
    let name = text.strip_prefix("sim.")?;
    KEYS.iter().find(|(known, _, class)| *known == name && *class != '-').map(|(name, ..)| *name)
}

/// The type of this key's value in a description.
pub(crate) fn input_type(name: &str) -> char {
    KEYS.iter().find(|(known, ..)| *known == name).map_or('-', |(.., class)| *class)
}
