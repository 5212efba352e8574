//! The C declarations. They are a driver's, but with plain pointers, because the tests also pass
//! what a driver must not.

use std::ffi::{c_char, c_int, c_void};

use libc::{in_addr, in6_addr, iovec};

/// What C sees of an `xpc_object_t`, a queue, a block or a handle.
pub(crate) type Pointer = *mut c_void;
/// A dictionary key: an exported variable that points to the key's text.
pub(crate) type Key = *const c_char;

/// `struct vmpktdesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) vm_pkt_size: usize,
    pub(crate) vm_pkt_iov: *mut iovec,
    pub(crate) vm_pkt_iovcnt: u32,
    pub(crate) vm_flags: u32,
}

unsafe extern "C" {
    pub(crate) fn vmnet_start_interface(
        description: Pointer,
        queue: *const c_void,
        handler: *const c_void,
    ) -> Pointer;
    pub(crate) fn vmnet_stop_interface(
        interface: Pointer,
        queue: *const c_void,
        handler: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_interface_set_event_callback(
        interface: Pointer,
        mask: u32,
        queue: *const c_void,
        callback: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_read(
        interface: Pointer,
        packets: *mut Descriptor,
        count: *mut c_int,
    ) -> u32;
    pub(crate) fn vmnet_write(
        interface: Pointer,
        packets: *mut Descriptor,
        count: *mut c_int,
    ) -> u32;
    pub(crate) fn vmnet_copy_shared_interface_list() -> Pointer;
    pub(crate) fn vmnet_interface_add_port_forwarding_rule(
        interface: Pointer,
        protocol: u8,
        external_port: u16,
        internal_address: in_addr,
        internal_port: u16,
        handler: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_interface_remove_port_forwarding_rule(
        interface: Pointer,
        protocol: u8,
        external_port: u16,
        handler: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_interface_get_port_forwarding_rules(
        interface: Pointer,
        handler: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_port_forwarding_rule_get_details(
        rule: Pointer,
        protocol: *mut u8,
        external_port: *mut u16,
        internal_address: *mut in_addr,
        internal_port: *mut u16,
    ) -> u32;
    pub(crate) fn vmnet_interface_add_ip_port_forwarding_rule(
        interface: Pointer,
        protocol: u8,
        external_port: u16,
        family: u8,
        internal_address: *const c_void,
        internal_port: u16,
        handler: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_interface_remove_ip_port_forwarding_rule(
        interface: Pointer,
        protocol: u8,
        external_port: u16,
        family: u8,
        handler: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_interface_get_ip_port_forwarding_rules(
        interface: Pointer,
        family: u8,
        handler: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_ip_port_forwarding_rule_get_details(
        rule: Pointer,
        protocol: *mut u8,
        external_port: *mut u16,
        family: u8,
        internal_address: Pointer,
        internal_port: *mut u16,
    ) -> u32;

    pub(crate) fn vmnet_network_configuration_create(mode: u32, status: *mut u32) -> Pointer;
    pub(crate) fn vmnet_network_configuration_set_external_interface(
        configuration: Pointer,
        name: *const c_char,
    ) -> u32;
    pub(crate) fn vmnet_network_configuration_disable_nat44(configuration: Pointer);
    pub(crate) fn vmnet_network_configuration_disable_nat66(configuration: Pointer);
    pub(crate) fn vmnet_network_configuration_disable_dhcp(configuration: Pointer);
    pub(crate) fn vmnet_network_configuration_disable_dns_proxy(configuration: Pointer);
    pub(crate) fn vmnet_network_configuration_disable_router_advertisement(configuration: Pointer);
    pub(crate) fn vmnet_network_configuration_set_ipv4_subnet(
        configuration: Pointer,
        subnet: *const in_addr,
        mask: *const in_addr,
    ) -> u32;
    pub(crate) fn vmnet_network_configuration_set_ipv6_prefix(
        configuration: Pointer,
        prefix: *const in6_addr,
        bits: u8,
    ) -> u32;
    pub(crate) fn vmnet_network_configuration_set_mtu(configuration: Pointer, mtu: u32) -> u32;
    pub(crate) fn vmnet_network_configuration_add_dhcp_reservation(
        configuration: Pointer,
        client: *const [u8; 6],
        reservation: *const in_addr,
    ) -> u32;
    pub(crate) fn vmnet_network_configuration_add_port_forwarding_rule(
        configuration: Pointer,
        protocol: u8,
        family: u8,
        internal_port: u16,
        external_port: u16,
        internal_address: *const c_void,
    ) -> u32;
    pub(crate) fn vmnet_network_create(configuration: Pointer, status: *mut u32) -> Pointer;
    pub(crate) fn vmnet_network_get_ipv4_subnet(
        network: Pointer,
        subnet: *mut in_addr,
        mask: *mut in_addr,
    );
    pub(crate) fn vmnet_network_get_ipv6_prefix(
        network: Pointer,
        prefix: *mut in6_addr,
        bits: *mut u8,
    );
    pub(crate) fn vmnet_network_copy_serialization(network: Pointer, status: *mut u32) -> Pointer;
    pub(crate) fn vmnet_network_create_with_serialization(
        serialization: Pointer,
        status: *mut u32,
    ) -> Pointer;
    pub(crate) fn vmnet_interface_start_with_network(
        network: Pointer,
        description: Pointer,
        queue: *const c_void,
        handler: *const c_void,
    ) -> Pointer;
    pub(crate) fn CFRelease(object: *const c_void);

    pub(crate) fn xpc_dictionary_create(
        keys: *const Key,
        values: *const Pointer,
        count: usize,
    ) -> Pointer;
    pub(crate) fn xpc_dictionary_set_uint64(dictionary: Pointer, key: Key, value: u64);
    pub(crate) fn xpc_dictionary_set_string(dictionary: Pointer, key: Key, value: *const c_char);
    pub(crate) fn xpc_dictionary_set_bool(dictionary: Pointer, key: Key, value: bool);
    pub(crate) fn xpc_dictionary_set_uuid(dictionary: Pointer, key: Key, value: *const [u8; 16]);
    pub(crate) fn xpc_dictionary_get_uint64(dictionary: Pointer, key: Key) -> u64;
    pub(crate) fn xpc_dictionary_get_string(dictionary: Pointer, key: Key) -> *const c_char;
    pub(crate) fn xpc_dictionary_get_uuid(dictionary: Pointer, key: Key) -> *const [u8; 16];
    pub(crate) fn xpc_array_get_count(array: Pointer) -> usize;
    pub(crate) fn xpc_array_get_string(array: Pointer, index: usize) -> *const c_char;
    pub(crate) fn xpc_array_get_value(array: Pointer, index: usize) -> Pointer;
    pub(crate) fn xpc_get_type(object: Pointer) -> *const c_void;
    pub(crate) fn xpc_release(object: Pointer);
    pub(crate) static _xpc_type_array: c_void;
    pub(crate) static _xpc_type_dictionary: c_void;

    pub(crate) fn dispatch_queue_create(label: *const c_char, attributes: *const c_void)
    -> Pointer;
    pub(crate) fn dispatch_release(queue: *const c_void);
    pub(crate) fn dispatch_retain(queue: *const c_void);
    pub(crate) fn _Block_copy(block: *const c_void) -> Pointer;
    pub(crate) fn _Block_release(block: *const c_void);
    pub(crate) fn _Block_object_assign(to: Pointer, from: *const c_void, flags: c_int);
    pub(crate) fn _Block_object_dispose(object: *const c_void, flags: c_int);

    pub(crate) static vmnet_operation_mode_key: Key;
    pub(crate) static vmnet_interface_id_key: Key;
    pub(crate) static vmnet_mac_address_key: Key;
    pub(crate) static vmnet_allocate_mac_address_key: Key;
    pub(crate) static vmnet_mtu_key: Key;
    pub(crate) static vmnet_max_packet_size_key: Key;
    pub(crate) static vmnet_start_address_key: Key;
    pub(crate) static vmnet_end_address_key: Key;
    pub(crate) static vmnet_subnet_mask_key: Key;
    pub(crate) static vmnet_shared_interface_name_key: Key;
    pub(crate) static vmnet_nat66_prefix_key: Key;
    pub(crate) static vmnet_network_identifier_key: Key;
    pub(crate) static vmnet_host_ip_address_key: Key;
    pub(crate) static vmnet_host_subnet_mask_key: Key;
    pub(crate) static vmnet_enable_isolation_key: Key;
    pub(crate) static vmnet_enable_tso_key: Key;
    pub(crate) static vmnet_enable_checksum_offload_key: Key;
    pub(crate) static vmnet_enable_virtio_header_key: Key;
    pub(crate) static vmnet_read_max_packets_key: Key;
    pub(crate) static vmnet_write_max_packets_key: Key;
    pub(crate) static vmnet_estimated_packets_available_key: Key;
}
