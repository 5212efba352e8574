//! The keys and functions that macOS 11 does not have.
//!
//! They are looked up with `dlsym` when a driver is created, so the program starts on every system.
//! If one is missing, the error says which macOS has it.

use std::ffi::{CStr, c_char, c_void};
use std::mem::transmute_copy;

use libc::{in_addr, in6_addr};

use super::ffi::{
    ConfigurationRef, InterfaceRef, Key, NetworkRef, Object, ObjectBlock, StartBlock, StatusBlock,
};
use super::system::{Macos, is_root, macos, symbol};
use crate::error::Error;

/// `ether_addr_t`: a MAC.
pub(crate) type EtherAddr = [u8; 6];

/// The running system, and what it has beyond macOS 11.
#[derive(Clone, Copy, Debug)]
pub(crate) struct System {
    pub(crate) macos: Macos,
    pub(crate) root: bool,
    pub(crate) keys: Keys,
    pub(crate) forwarding: Option<IpForwarding>,
    pub(crate) networks: Option<Networks>,
}

/// The keys that are not in macOS 11. Each field says which macOS is the first to have the key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keys {
    /// macOS 12: the macOS 11.3 SDK does not have it. We know of no source for the exact version.
    pub(crate) enable_checksum_offload: Option<Name>,
    /// macOS 15.4.
    pub(crate) enable_virtio_header: Option<Name>,
    /// macOS 15.
    pub(crate) read_max_packets: Option<Name>,
    /// macOS 15.
    pub(crate) write_max_packets: Option<Name>,
}

/// The text of a key. It is a constant of vmnet's and lives as long as the process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name(&'static CStr);

impl Name {
    pub(crate) fn key(self) -> Key {
        self.0.as_ptr()
    }
}

/// Declares a table of functions that are looked up together. If one of them is missing, `find`
/// returns `None`.
macro_rules! table {
    ($(#[$doc:meta])* $table:ident { $($field:ident: $name:literal, fn($($arg:ty),*) $(-> $ret:ty)?;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $table {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
        }

        impl $table {
            #[cfg(test)]
            pub(crate) const NAMES: &[&CStr] = &[$($name),*];

            fn find() -> Option<Self> {
                Some(Self {
                    $($field: {
                        let found = symbol($name);
                        if found.is_null() {
                            return None;
                        }
                        // SAFETY: the function of this name has this type; whoever adds a row to
                        // a table keeps that, from the source which the table's comment cites. It
                        // is never unloaded: the program links vmnet, and objc2 links Foundation,
                        // which has CoreFoundation's `CFRelease` loaded.
                        unsafe {
                            transmute_copy::<*const c_void, unsafe extern "C" fn($($arg),*) $(-> $ret)?>(&found)
                        }
                    },)*
                })
            }
        }
    };
}

table! {
    /// Port forwarding for IPv4 and IPv6 on an interface. The macOS 11.3 SDK does not have these
    /// functions. Apple's developer documentation has the declarations, and deprecates the
    /// functions for IPv4 only from macOS 12 on, so macOS 12 is taken as the first that has these.
    IpForwarding {
        add: c"vmnet_interface_add_ip_port_forwarding_rule",
            fn(InterfaceRef, u8, u16, u8, *const c_void, u16, Option<&StatusBlock>) -> u32;
        remove: c"vmnet_interface_remove_ip_port_forwarding_rule",
            fn(InterfaceRef, u8, u16, u8, Option<&StatusBlock>) -> u32;
        get: c"vmnet_interface_get_ip_port_forwarding_rules",
            fn(InterfaceRef, u8, &ObjectBlock) -> u32;
        details: c"vmnet_ip_port_forwarding_rule_get_details",
            fn(Object, *mut u8, *mut u16, u8, *mut c_void, *mut u16) -> u32;
    }
}

table! {
    /// Network objects, macOS 26. The declarations are from Apple's developer documentation, and
    /// for the few functions it does not show, from public bindings generated from the macOS 26
    /// header.
    Networks {
        configuration_create: c"vmnet_network_configuration_create",
            fn(u32, *mut u32) -> ConfigurationRef;
        set_external_interface: c"vmnet_network_configuration_set_external_interface",
            fn(ConfigurationRef, *const c_char) -> u32;
        disable_nat44: c"vmnet_network_configuration_disable_nat44", fn(ConfigurationRef);
        disable_nat66: c"vmnet_network_configuration_disable_nat66", fn(ConfigurationRef);
        disable_dhcp: c"vmnet_network_configuration_disable_dhcp", fn(ConfigurationRef);
        disable_dns_proxy: c"vmnet_network_configuration_disable_dns_proxy", fn(ConfigurationRef);
        disable_router_advertisement:
            c"vmnet_network_configuration_disable_router_advertisement", fn(ConfigurationRef);
        set_ipv4_subnet: c"vmnet_network_configuration_set_ipv4_subnet",
            fn(ConfigurationRef, *const in_addr, *const in_addr) -> u32;
        set_ipv6_prefix: c"vmnet_network_configuration_set_ipv6_prefix",
            fn(ConfigurationRef, *const in6_addr, u8) -> u32;
        set_mtu: c"vmnet_network_configuration_set_mtu", fn(ConfigurationRef, u32) -> u32;
        add_dhcp_reservation: c"vmnet_network_configuration_add_dhcp_reservation",
            fn(ConfigurationRef, *const EtherAddr, *const in_addr) -> u32;
        add_port_forwarding_rule: c"vmnet_network_configuration_add_port_forwarding_rule",
            fn(ConfigurationRef, u8, u8, u16, u16, *const c_void) -> u32;
        create: c"vmnet_network_create", fn(ConfigurationRef, *mut u32) -> NetworkRef;
        get_ipv4_subnet: c"vmnet_network_get_ipv4_subnet",
            fn(NetworkRef, *mut in_addr, *mut in_addr);
        get_ipv6_prefix: c"vmnet_network_get_ipv6_prefix", fn(NetworkRef, *mut in6_addr, *mut u8);
        copy_serialization: c"vmnet_network_copy_serialization",
            fn(NetworkRef, *mut u32) -> Object;
        create_with_serialization: c"vmnet_network_create_with_serialization",
            fn(Object, *mut u32) -> NetworkRef;
        start_interface: c"vmnet_interface_start_with_network",
            fn(NetworkRef, Object, &dispatch2::DispatchQueue, &StartBlock) -> InterfaceRef;
        release: c"CFRelease", fn(*const c_void);
    }
}

impl System {
    /// Looks up what the running system has.
    pub(crate) fn look() -> Self {
        Self {
            macos: macos(),
            root: is_root(),
            keys: Keys {
                enable_checksum_offload: key(c"vmnet_enable_checksum_offload_key"),
                enable_virtio_header: key(c"vmnet_enable_virtio_header_key"),
                read_max_packets: key(c"vmnet_read_max_packets_key"),
                write_max_packets: key(c"vmnet_write_max_packets_key"),
            },
            forwarding: IpForwarding::find(),
            networks: Networks::find(),
        }
    }

    /// Returns the functions for network objects.
    ///
    /// # Errors
    ///
    /// [`Error::NeedsMacos`] before macOS 26.
    pub(crate) fn networks(&self) -> Result<Networks, Error> {
        self.networks.ok_or(Error::NeedsMacos { what: "a network object", version: "26" })
    }
}

/// Reads the key that vmnet exports as `name`; `None` if the running system does not have it.
fn key(name: &CStr) -> Option<Name> {
    let variable = symbol(name).cast::<Key>();
    if variable.is_null() {
        return None;
    }
    // SAFETY: vmnet.h declares each key as `extern const char * const`, so the symbol is a pointer
    // that never changes, and may be read. The callers pass names of keys only.
    let text = unsafe { *variable };
    // SAFETY: the pointer is not null, so by the same declaration it points at a C string. vmnet
    // stays loaded and the string is constant, so it lives for `'static`.
    (!text.is_null()).then(|| Name(unsafe { CStr::from_ptr(text) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A misspelt name would never be found, and no other test would notice. On Linux this test
    /// asks the simulator; on a Mac it asks the system's vmnet, as far as that is new enough.
    #[test]
    fn every_name_is_found_on_a_system_that_has_it() {
        let system = System::look();
        let has = |major, minor| system.macos >= Macos(major, minor);
        for (since, names) in [(Macos(12, 0), IpForwarding::NAMES), (Macos(26, 0), Networks::NAMES)]
        {
            for name in names {
                let found = !symbol(name).is_null();
                assert!(found || system.macos < since, "{name:?} is not there");
            }
        }
        assert_eq!(system.keys.enable_checksum_offload.is_some(), has(12, 0));
        assert_eq!(system.keys.enable_virtio_header.is_some(), has(15, 4));
        assert_eq!(system.keys.read_max_packets.is_some(), has(15, 0));
        assert_eq!(system.keys.write_max_packets.is_some(), has(15, 0));
    }
}
