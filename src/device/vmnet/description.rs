//! The description of an interface to start, as the dictionary that vmnet reads.

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

/// An isolated network in host mode (macOS 11). Only interfaces with the same identifier are on it.
/// It has no DHCP server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsolatedNetwork {
    /// The network's identity: the 16 bytes of a UUID.
    #[doc(alias = "vmnet_network_identifier_key")]
    pub identifier: [u8; 16],
    /// The host's IPv4 address on the network and the subnet mask; `None` if the host has none
    /// there.
    #[doc(alias = "vmnet_host_ip_address_key")]
    pub host: Option<(Ipv4Addr, Ipv4Addr)>,
    /// The host's IPv6 address on the network; `None` if the host has none there.
    #[doc(alias = "vmnet_host_ipv6_address_key")]
    pub host_ipv6: Option<Ipv6Addr>,
}

/// The settings that only vmnet has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extras {
    pub(crate) nat66_prefix: Option<Ipv6Addr>,
    pub(crate) isolated_network: Option<IsolatedNetwork>,
    /// Whether the interface joins a network object, which decides the mode, the addresses and the
    /// MTU.
    pub(crate) on_network: bool,
}

/// Builds the dictionary for [`vmnet_start_interface`](super::ffi::vmnet_start_interface), or for
/// `vmnet_interface_start_with_network`.
///
/// # Errors
///
/// [`ConfigError::Invalid`] for settings that vmnet would refuse without a reason;
/// [`Error::NeedsMacos`] for settings that the running system does not have.
pub(crate) fn describe(
    config: &InterfaceConfig,
    extras: &Extras,
    system: &System,
) -> Result<Dictionary, Error> {
    let invalid = |sentence: &str| Err(ConfigError::Invalid(sentence.to_owned()).into());
    let bridged = matches!(config.mode, Mode::Bridged(_));
    let mut description = Dictionary::new();
    // SAFETY: vmnet.h declares each key as `extern const char * const`. They are initialized when
    // the program is loaded and never change, so reading them races with nothing.
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
                return invalid(
                    "a bridged interface gets its addresses from the outside network: set no ipv4",
                );
            }
            // vmnet.h: either all three are set, or none.
            for (key, address) in key.range.into_iter().zip([range.start, range.end, range.mask]) {
                description.set_str(key, &address.to_string());
            }
        }
        if let Some(mtu) = config.mtu {
            if bridged {
                return invalid("a bridged interface has the MTU of the one it shares: set no mtu");
            }
            description.set_u64(key.mtu, mtu.into());
        }
        if let Some(prefix) = extras.nat66_prefix {
            if config.mode != Mode::Shared {
                return invalid("a NAT66 prefix (nat66_prefix) is for shared mode only");
            }
            if prefix.octets()[0] != 0xfd {
                return invalid("a NAT66 prefix must be a unique local address, within fd00::/8");
            }
            description.set_str(key.nat66, &prefix.to_string());
        }
        if let Some(network) = extras.isolated_network {
            if config.mode != Mode::Host {
                return invalid("a network identifier (isolated_network) is for host mode only");
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
        // Apple does not document whether vmnet uses this MAC. It does not have to: users of vmnet
        // report that it carries frames of any MAC. The interface reports the MAC asked for.
        description.set_str(key.mac, &mac.to_string().to_lowercase());
        description.set_bool(key.allocate_mac, false);
    }
    if config.isolated {
        if bridged {
            return invalid("isolation (isolated) is for host and shared mode only");
        }
        description.set_bool(key.isolation, true);
    }

    let wanted = config.offloads;
    let tso = wanted.tso4 || wanted.tso6;
    if wanted.uso {
        return invalid("vmnet does not segment UDP: ask for offloads without uso");
    }
    if tso && !wanted.virtio_header {
        // Without the header nothing would say how a packet beyond the MTU is to be segmented.
        return invalid(
            "TSO without the virtio header would deliver packets beyond the MTU: ask for the offload \
             virtio_header, too",
        );
    }
    if wanted.virtio_header {
        let Some(name) = system.keys.enable_virtio_header else {
            return Err(Error::NeedsMacos { what: "the virtio header", version: "15.4" });
        };
        // The header describes the checksums. Apple's documentation forbids to set the key for
        // checksum offload as well: the start would fail.
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

/// The values of vmnet's keys, read once per description.
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
