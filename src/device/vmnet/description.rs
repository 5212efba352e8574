//! What an interface is asked for, as the dictionary that vmnet reads.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::availability::System;
use super::ffi::{
    BRIDGED_MODE, HOST_MODE, Key, SHARED_MODE, vmnet_allocate_mac_address_key,
    vmnet_enable_isolation_key, vmnet_enable_tso_key, vmnet_end_address_key,
    vmnet_host_ip_address_key, vmnet_host_ipv6_address_key, vmnet_host_subnet_mask_key,
    vmnet_interface_id_key, vmnet_mac_address_key, vmnet_mtu_key, vmnet_nat66_prefix_key,
    vmnet_network_identifier_key, vmnet_operation_mode_key, vmnet_shared_interface_name_key,
    vmnet_start_address_key, vmnet_subnet_mask_key,
};
use super::xpc::Dictionary;
use crate::config::{InterfaceConfig, Mode};
use crate::error::{ConfigError, Error};

/// A host-mode network of its own: only interfaces with the same identifier are on it, and nobody
/// gives out addresses there. macOS 11.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsolatedNetwork {
    /// The network's identity, a UUID.
    #[doc(alias = "vmnet_network_identifier_key")]
    pub identifier: [u8; 16],
    /// The host's address on it and its subnet mask, if the host is to be on it.
    #[doc(alias = "vmnet_host_ip_address_key")]
    pub host: Option<(Ipv4Addr, Ipv4Addr)>,
    /// The host's IPv6 address on it.
    #[doc(alias = "vmnet_host_ipv6_address_key")]
    pub host_ipv6: Option<Ipv6Addr>,
}

/// What only vmnet can be asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extras {
    pub(crate) nat66_prefix: Option<Ipv6Addr>,
    pub(crate) isolated_network: Option<IsolatedNetwork>,
    /// On a network object, which decides mode, addresses and MTU.
    pub(crate) on_network: bool,
}

/// The dictionary for [`vmnet_start_interface`](super::ffi::vmnet_start_interface) or its sibling for
/// network objects. Refuses what vmnet would refuse without saying why.
pub(crate) fn describe(
    config: &InterfaceConfig,
    extras: &Extras,
    system: &System,
) -> Result<Dictionary, Error> {
    let invalid = |sentence: &str| Err(ConfigError::Invalid(sentence.to_owned()).into());
    let bridged = matches!(config.mode, Mode::Bridged(_));
    let mut description = Dictionary::new();
    // SAFETY: reads constants that vmnet exports.
    let key = unsafe {
        Keys {
            mode: vmnet_operation_mode_key,
            id: vmnet_interface_id_key,
            mac: vmnet_mac_address_key,
            allocate_mac: vmnet_allocate_mac_address_key,
            mtu: vmnet_mtu_key,
            shared_interface: vmnet_shared_interface_name_key,
            range: [vmnet_start_address_key, vmnet_end_address_key, vmnet_subnet_mask_key],
            nat66: vmnet_nat66_prefix_key,
            identifier: vmnet_network_identifier_key,
            host: [vmnet_host_ip_address_key, vmnet_host_subnet_mask_key],
            host_ipv6: vmnet_host_ipv6_address_key,
            isolation: vmnet_enable_isolation_key,
            tso: vmnet_enable_tso_key,
        }
    };

    description.set_uuid(key.id, &config.interface_id);
    if !extras.on_network {
        let mode = match &config.mode {
            Mode::Host => HOST_MODE,
            Mode::Shared => SHARED_MODE,
            Mode::Bridged(name) => {
                description.set_str(key.shared_interface, name);
                BRIDGED_MODE
            }
        };
        description.set_u64(key.mode, mode.into());
        if let Some(range) = config.ipv4 {
            if bridged {
                return invalid("a bridged interface takes its addresses from the outside");
            }
            // All three or none (vmnet.h).
            for (key, address) in key.range.into_iter().zip([range.start, range.end, range.mask]) {
                description.set_str(key, &address.to_string());
            }
        }
        if let Some(mtu) = config.mtu {
            if bridged {
                return invalid("a bridged interface has the MTU of the one it shares");
            }
            description.set_u64(key.mtu, mtu.into());
        }
        if let Some(prefix) = extras.nat66_prefix {
            if config.mode != Mode::Shared {
                return invalid("a NAT66 prefix is for shared mode");
            }
            if prefix.octets()[0] != 0xfd {
                return invalid("a NAT66 prefix is a unique local address, fd00::/8");
            }
            description.set_str(key.nat66, &prefix.to_string());
        }
        if let Some(network) = extras.isolated_network {
            if config.mode != Mode::Host {
                return invalid("a network identifier is for host mode");
            }
            description.set_uuid(key.identifier, &network.identifier);
            if let Some((address, mask)) = network.host {
                description.set_str(key.host[0], &address.to_string());
                description.set_str(key.host[1], &mask.to_string());
            }
            if let Some(address) = network.host_ipv6 {
                description.set_str(key.host_ipv6, &address.to_string());
            }
        }
    }
    if let Some(mac) = config.mac {
        // Whether vmnet follows is not documented. It carries frames of any MAC, so it does not
        // matter: the interface says the MAC that was asked for.
        description.set_str(key.mac, &mac.to_string().to_lowercase());
        description.set_bool(key.allocate_mac, false);
    }
    if config.isolated {
        if bridged {
            return invalid("isolation is for host and shared mode");
        }
        description.set_bool(key.isolation, true);
    }

    let wanted = config.offloads;
    let tso = wanted.tso4 || wanted.tso6;
    if wanted.uso {
        return invalid("vmnet does not segment UDP");
    }
    if tso && !wanted.virtio_header {
        // Packets beyond the MTU would come without a word about their segments.
        return invalid("TSO without the virtio header would deliver packets beyond the MTU");
    }
    if wanted.virtio_header {
        let Some(name) = system.keys.enable_virtio_header else {
            return Err(Error::NeedsMacos { what: "the virtio header", version: "15.4" });
        };
        // The header says what is to be done about checksums; with the key for them as well the
        // start fails (Apple's documentation).
        description.set_bool(name.key(), true);
        if tso {
            description.set_bool(key.tso, true);
        }
    } else if wanted.checksum {
        let Some(name) = system.keys.enable_checksum_offload else {
            return Err(Error::NeedsMacos { what: "checksum offload", version: "12" });
        };
        description.set_bool(name.key(), true);
    }
    Ok(description)
}

/// vmnet's keys, read once.
struct Keys {
    mode: Key,
    id: Key,
    mac: Key,
    allocate_mac: Key,
    mtu: Key,
    shared_interface: Key,
    range: [Key; 3],
    nat66: Key,
    identifier: Key,
    host: [Key; 2],
    host_ipv6: Key,
    isolation: Key,
    tso: Key,
}
