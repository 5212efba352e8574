//! A device, as `vmring info` shows it.

use serde::Serialize;
use vmring::device::Capabilities;
use vmring::{Driver, Error, Interface};

use crate::report::offload_names;

#[derive(Debug, Serialize)]
pub(crate) struct DeviceInfo {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    /// What a process needs to use it.
    pub(super) needs: &'static str,
    pub(crate) usable: bool,
    /// The reason why it is not usable here.
    pub(crate) why_not: Option<String>,
    /// The capabilities with default settings; `None` if the device is not usable.
    pub(crate) capabilities: Option<CapabilitiesInfo>,
}

#[derive(Debug, Serialize)]
pub(crate) struct CapabilitiesInfo {
    pub(super) mtu: u32,
    pub(super) max_packet_size: u32,
    pub(super) max_read_batch: u32,
    pub(super) max_write_batch: u32,
    pub(super) headroom: u32,
    /// `None` means any number.
    pub(super) reading_rings: Option<usize>,
    pub(super) writing_rings: Option<usize>,
    pub(super) offloads: Vec<&'static str>,
}

impl From<Capabilities> for CapabilitiesInfo {
    fn from(caps: Capabilities) -> Self {
        let any = |rings| (rings != usize::MAX).then_some(rings);
        Self {
            mtu: caps.mtu,
            max_packet_size: caps.max_packet_size,
            max_read_batch: caps.max_read_batch,
            max_write_batch: caps.max_write_batch,
            headroom: caps.headroom,
            reading_rings: any(caps.reading_rings),
            writing_rings: any(caps.writing_rings),
            offloads: offload_names(caps.offloads),
        }
    }
}

/// Tries a device of this build by starting it.
pub(crate) fn try_device(
    name: &'static str,
    what: &'static str,
    needs: &'static str,
    driver: impl Driver,
) -> DeviceInfo {
    let tried: Result<Capabilities, Error> =
        Interface::builder().device(driver).start().map(|interface| interface.capabilities());
    let (capabilities, why_not) = match tried {
        Ok(caps) => (Some(caps.into()), None),
        Err(error) => (None, Some(error.to_string())),
    };
    DeviceInfo { name, what, needs, usable: why_not.is_none(), why_not, capabilities }
}

/// A device that is not usable here, with the reason.
pub(crate) fn unusable(
    (name, what, needs): (&'static str, &'static str, &'static str),
    why_not: String,
) -> DeviceInfo {
    DeviceInfo { name, what, needs, usable: false, why_not: Some(why_not), capabilities: None }
}

pub(crate) const TAP: (&str, &str, &str) = (
    "tap",
    "a network interface of the host's kernel",
    "root or the capability CAP_NET_ADMIN, or a TAP interface that was made for this user",
);
