//! What several drivers have in common.

use macaddr::MacAddr6;
use vmring_embedded::network::mac_of_interface;

use crate::device::Offloads;
use crate::{Error, InterfaceConfig};

/// Returns an error if `config` asks for an offload. For devices that have none.
pub(crate) fn no_offloads(config: &InterfaceConfig, device: &str) -> Result<(), Error> {
    if config.offloads == Offloads::default() {
        return Ok(());
    }
    Err(Error::NotSupported { what: "offload", device: device.to_owned() })
}

/// Returns the MAC address of an interface of a device that has no allocation of its own: the one
/// that was asked for, or one derived from the interface's identity.
pub(crate) fn mac_of(config: &InterfaceConfig) -> MacAddr6 {
    config.mac.unwrap_or_else(|| mac_of_interface(config.interface_id))
}
