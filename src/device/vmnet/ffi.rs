//! The C declarations: vmnet and XPC as macOS 11 has them, and the types that newer functions need.
//!
//! The sources are Apple's `vmnet.h` of the macOS 11.3 SDK, Apple's developer documentation for
//! what is newer, and `xpc/xpc.h` for XPC. Return codes, modes and event masks are plain `u32`,
//! because newer systems may return numbers that no enum here would have. What macOS 11 does not
//! have is not declared as a symbol here: a program that imports a missing symbol does not start.
//! It is looked up at run time instead (see [`availability`](super::availability)).

use std::ffi::{c_char, c_int, c_void};
use std::mem::{align_of, offset_of, size_of};

use block2::DynBlock;
use dispatch2::DispatchQueue;
use libc::{in_addr, iovec};
use static_assertions::const_assert_eq;

/// `xpc_object_t`.
pub(crate) type Object = *mut c_void;
/// `interface_ref`.
pub(crate) type InterfaceRef = *mut c_void;
/// `vmnet_network_configuration_ref`.
pub(crate) type ConfigurationRef = *mut c_void;
/// `vmnet_network_ref`.
pub(crate) type NetworkRef = *mut c_void;
/// A dictionary key: an exported variable that points to the key's text.
pub(crate) type Key = *const c_char;

/// `VMNET_SUCCESS`. It is not 0.
pub(crate) const SUCCESS: u32 = 1000;
/// `VMNET_HOST_MODE`.
pub(crate) const HOST_MODE: u32 = 1000;
/// `VMNET_SHARED_MODE`.
pub(crate) const SHARED_MODE: u32 = 1001;
/// `VMNET_BRIDGED_MODE`.
pub(crate) const BRIDGED_MODE: u32 = 1002;
/// `VMNET_INTERFACE_PACKETS_AVAILABLE`, the only event that vmnet has.
pub(crate) const PACKETS_AVAILABLE: u32 = 1;
/// Darwin's `AF_INET`. The simulator uses Darwin's numbers on other systems too.
pub(crate) const AF_INET: u8 = 2;
/// Darwin's `AF_INET6`, which is another number on other systems.
pub(crate) const AF_INET6: u8 = 30;

/// `struct vmpktdesc`: one packet of a batch.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PacketDescriptor {
    /// In bytes: the size of the buffer before a read, the size of the packet after it, and the
    /// size of the packet before a write.
    pub(crate) vm_pkt_size: usize,
    pub(crate) vm_pkt_iov: *mut iovec,
    pub(crate) vm_pkt_iovcnt: u32,
    /// No bit is documented, so it is always 0.
    pub(crate) vm_flags: u32,
}

const_assert_eq!(size_of::<PacketDescriptor>(), 24);
const_assert_eq!(align_of::<PacketDescriptor>(), 8);
const_assert_eq!(offset_of!(PacketDescriptor, vm_pkt_size), 0);
const_assert_eq!(offset_of!(PacketDescriptor, vm_pkt_iov), 8);
const_assert_eq!(offset_of!(PacketDescriptor, vm_pkt_iovcnt), 16);
const_assert_eq!(offset_of!(PacketDescriptor, vm_flags), 20);
const_assert_eq!(size_of::<iovec>(), 16);
const_assert_eq!(offset_of!(iovec, iov_base), 0);
const_assert_eq!(offset_of!(iovec, iov_len), 8);

/// `void (^)(vmnet_return_t, xpc_object_t)`.
pub(crate) type StartBlock = DynBlock<dyn Fn(u32, Object)>;
/// `void (^)(vmnet_return_t)`.
pub(crate) type StatusBlock = DynBlock<dyn Fn(u32)>;
/// `void (^)(interface_event_t, xpc_object_t)`.
pub(crate) type EventBlock = DynBlock<dyn Fn(u32, Object)>;
/// `void (^)(xpc_object_t)`.
pub(crate) type ObjectBlock = DynBlock<dyn Fn(Object)>;

#[cfg_attr(target_os = "macos", link(name = "vmnet", kind = "framework"))]
unsafe extern "C" {
    // macOS 10.10
    pub(crate) fn vmnet_start_interface(
        description: Object,
        queue: &DispatchQueue,
        handler: &StartBlock,
    ) -> InterfaceRef;
    pub(crate) fn vmnet_stop_interface(
        interface: InterfaceRef,
        queue: &DispatchQueue,
        handler: &StatusBlock,
    ) -> u32;
    pub(crate) fn vmnet_interface_set_event_callback(
        interface: InterfaceRef,
        event_mask: u32,
        queue: Option<&DispatchQueue>,
        callback: Option<&EventBlock>,
    ) -> u32;
    pub(crate) fn vmnet_read(
        interface: InterfaceRef,
        packets: *mut PacketDescriptor,
        pktcnt: *mut c_int,
    ) -> u32;
    pub(crate) fn vmnet_write(
        interface: InterfaceRef,
        packets: *mut PacketDescriptor,
        pktcnt: *mut c_int,
    ) -> u32;
    // macOS 10.15
    pub(crate) fn vmnet_copy_shared_interface_list() -> Object;
    pub(crate) fn vmnet_interface_add_port_forwarding_rule(
        interface: InterfaceRef,
        protocol: u8,
        external_port: u16,
        internal_address: in_addr,
        internal_port: u16,
        handler: Option<&StatusBlock>,
    ) -> u32;
    pub(crate) fn vmnet_interface_remove_port_forwarding_rule(
        interface: InterfaceRef,
        protocol: u8,
        external_port: u16,
        handler: Option<&StatusBlock>,
    ) -> u32;
    pub(crate) fn vmnet_interface_get_port_forwarding_rules(
        interface: InterfaceRef,
        handler: &ObjectBlock,
    ) -> u32;
    pub(crate) fn vmnet_port_forwarding_rule_get_details(
        rule: Object,
        protocol: *mut u8,
        external_port: *mut u16,
        internal_address: *mut in_addr,
        internal_port: *mut u16,
    ) -> u32;

    // macOS 10.10
    pub(crate) static vmnet_operation_mode_key: Key;
    pub(crate) static vmnet_interface_id_key: Key;
    pub(crate) static vmnet_mac_address_key: Key;
    pub(crate) static vmnet_mtu_key: Key;
    pub(crate) static vmnet_max_packet_size_key: Key;
    // macOS 10.15
    pub(crate) static vmnet_allocate_mac_address_key: Key;
    pub(crate) static vmnet_shared_interface_name_key: Key;
    pub(crate) static vmnet_start_address_key: Key;
    pub(crate) static vmnet_end_address_key: Key;
    pub(crate) static vmnet_subnet_mask_key: Key;
    pub(crate) static vmnet_nat66_prefix_key: Key;
    // macOS 11
    pub(crate) static vmnet_network_identifier_key: Key;
    pub(crate) static vmnet_host_ip_address_key: Key;
    pub(crate) static vmnet_host_subnet_mask_key: Key;
    pub(crate) static vmnet_host_ipv6_address_key: Key;
    pub(crate) static vmnet_enable_tso_key: Key;
    pub(crate) static vmnet_enable_isolation_key: Key;
}

// XPC is in libSystem, which every program links.
unsafe extern "C" {
    pub(crate) fn xpc_dictionary_create(
        keys: *const Key,
        values: *const Object,
        count: usize,
    ) -> Object;
    pub(crate) fn xpc_dictionary_set_uint64(dictionary: Object, key: Key, value: u64);
    pub(crate) fn xpc_dictionary_set_string(dictionary: Object, key: Key, value: *const c_char);
    pub(crate) fn xpc_dictionary_set_bool(dictionary: Object, key: Key, value: bool);
    pub(crate) fn xpc_dictionary_set_uuid(dictionary: Object, key: Key, value: *const [u8; 16]);
    pub(crate) fn xpc_dictionary_get_uint64(dictionary: Object, key: Key) -> u64;
    pub(crate) fn xpc_dictionary_get_string(dictionary: Object, key: Key) -> *const c_char;
    pub(crate) fn xpc_dictionary_get_uuid(dictionary: Object, key: Key) -> *const [u8; 16];
    pub(crate) fn xpc_array_get_count(array: Object) -> usize;
    pub(crate) fn xpc_array_get_string(array: Object, index: usize) -> *const c_char;
    pub(crate) fn xpc_array_get_value(array: Object, index: usize) -> Object;
    pub(crate) fn xpc_get_type(object: Object) -> *const c_void;
    pub(crate) fn xpc_release(object: Object);
    pub(crate) static _xpc_type_array: c_void;
    pub(crate) static _xpc_type_dictionary: c_void;
}

/// Takes the address of every symbol, so that the linker must find each one. Linking these tests
/// for macOS therefore proves the names.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_declared_symbol_exists() {
        let functions = [
            vmnet_start_interface as *const c_void,
            vmnet_stop_interface as *const c_void,
            vmnet_interface_set_event_callback as *const c_void,
            vmnet_read as *const c_void,
            vmnet_write as *const c_void,
            vmnet_copy_shared_interface_list as *const c_void,
            vmnet_interface_add_port_forwarding_rule as *const c_void,
            vmnet_interface_remove_port_forwarding_rule as *const c_void,
            vmnet_interface_get_port_forwarding_rules as *const c_void,
            vmnet_port_forwarding_rule_get_details as *const c_void,
            xpc_dictionary_create as *const c_void,
            xpc_dictionary_set_uint64 as *const c_void,
            xpc_dictionary_set_string as *const c_void,
            xpc_dictionary_set_bool as *const c_void,
            xpc_dictionary_set_uuid as *const c_void,
            xpc_dictionary_get_uint64 as *const c_void,
            xpc_dictionary_get_string as *const c_void,
            xpc_dictionary_get_uuid as *const c_void,
            xpc_array_get_count as *const c_void,
            xpc_array_get_string as *const c_void,
            xpc_array_get_value as *const c_void,
            xpc_get_type as *const c_void,
            xpc_release as *const c_void,
            &raw const _xpc_type_array,
            &raw const _xpc_type_dictionary,
        ];
        assert!(functions.iter().all(|function| !function.is_null()));
        // SAFETY: vmnet.h declares each key as `extern const char * const`. They are initialized
        // when the program is loaded and never change.
        let keys = unsafe {
            [
                vmnet_operation_mode_key,
                vmnet_interface_id_key,
                vmnet_mac_address_key,
                vmnet_mtu_key,
                vmnet_max_packet_size_key,
                vmnet_allocate_mac_address_key,
                vmnet_shared_interface_name_key,
                vmnet_start_address_key,
                vmnet_end_address_key,
                vmnet_subnet_mask_key,
                vmnet_nat66_prefix_key,
                vmnet_network_identifier_key,
                vmnet_host_ip_address_key,
                vmnet_host_subnet_mask_key,
                vmnet_host_ipv6_address_key,
                vmnet_enable_tso_key,
                vmnet_enable_isolation_key,
            ]
        };
        assert!(keys.iter().all(|key| !key.is_null()));
    }
}
