//! What several drivers answer alike.

use macaddr::MacAddr6;
use vmring_embedded::network::mac_of_interface;

use crate::device::Offloads;
use crate::{Error, InterfaceConfig};

/// Refuses offloads, for devices that have none.
pub(crate) fn no_offloads(config: &InterfaceConfig, device: &str) -> Result<(), Error> {
    if config.offloads == Offloads::default() {
        return Ok(());
    }
    Err(Error::NotSupported { what: "offload", device: device.to_owned() })
}

/// The MAC that devices without an allocation of their own give an interface.
pub(crate) fn mac_of(config: &InterfaceConfig) -> MacAddr6 {
    config.mac.unwrap_or_else(|| mac_of_interface(config.interface_id))
}
