//! What the start of an interface negotiates, from what was asked for and from the script.

use std::time::Duration;

use macaddr::MacAddr6;
use vmring_embedded::AddressRange;
use vmring_embedded::network::mac_of_interface;

use crate::description::Request;
use crate::keys::key;
use crate::limits::{BATCH, HEADER, TSO_MAX};
use crate::network::Network;
use crate::script::Script;
use crate::status::{INVALID_ARGUMENT, SHARED_MODE};
use crate::world::World;
use crate::xpc::{Handle, Object};

/// The negotiated settings.
pub(crate) struct Settings {
    pub(crate) id: [u8; 16],
    pub(crate) mtu: u64,
    pub(crate) max: u64,
    pub(crate) header: bool,
    pub(crate) header_in_max: bool,
    pub(crate) limits: (usize, usize),
    pub(crate) mac: Option<MacAddr6>,
    pub(crate) addresses: Option<AddressRange>,
    pub(crate) nat66: Option<String>,
    pub(crate) several_iovecs: bool,
    pub(crate) free_of_charge: Option<usize>,
    pub(crate) call_cost: Duration,
}

impl Settings {
    pub(crate) fn negotiate(
        request: &Request,
        script: &Script,
        world: &World,
        network: Option<&Network>,
    ) -> Result<Self, u32> {
        let asked = |key| request.bool(key) == Some(true);
        let (tso, header) = (asked("enable_tso"), asked("enable_virtio_header"));
        let id = request.id.unwrap_or_else(|| world.interface_id());
        let own = network.map_or_else(|| request.u64("mtu"), |network| Some(network.mtu().into()));
        let mtu = own.unwrap_or(1500);
        if !(68..=65_535).contains(&mtu) {
            return Err(INVALID_ARGUMENT);
        }
        let max = if tso { TSO_MAX } else { mtu + 14 };
        let mac = match request.str("mac_address") {
            Some(text) if script.honours_mac => Some(text.parse().map_err(|_| INVALID_ARGUMENT)?),
            _ if request.bool("allocate_mac_address") == Some(false) => None,
            _ => Some(mac_of_interface(id)),
        };
        let addresses = match network {
            Some(network) => Some(network.range()),
            None => request.addresses()?,
        };
        let shared = request.mode == SHARED_MODE;
        let told = world.host().macos >= (15, 0);
        let limit = |limit: Option<u32>| limit.filter(|_| told).map_or(BATCH, |n| n as usize);
        Ok(Self {
            id,
            mtu: script.mtu.unwrap_or(mtu),
            max: script.max_packet_size.unwrap_or(max),
            header,
            header_in_max: script.header_in_max,
            limits: (limit(script.read_max_packets), limit(script.write_max_packets)),
            mac,
            addresses,
            nat66: shared.then(|| request.str("nat66_prefix").unwrap_or("fd00:64::").to_owned()),
            several_iovecs: script.several_iovecs,
            free_of_charge: script.free_of_charge,
            call_cost: script.call_cost,
        })
    }

    /// The longest packet, including the header.
    pub(crate) fn max_frame(&self) -> usize {
        let header = if self.header && !self.header_in_max { HEADER } else { 0 };
        self.max as usize + header
    }

    /// The dictionary that the start's handler gets.
    pub(crate) fn parameters(&self, script: &Script, world: &World) -> Handle {
        let all = Handle::dictionary();
        let told = world.host().macos >= (15, 0);
        let text = |text: String| Object::String(std::ffi::CString::new(text).unwrap_or_default());
        let set = |name: &'static str, value: Object| {
            if !script.start.missing.contains(&name) {
                all.set(key(name), value);
            }
        };
        set("mtu", Object::U64(self.mtu));
        set("max_packet_size", Object::U64(self.max));
        set("interface_id", Object::Uuid(self.id));
        if let Some(mac) = self.mac {
            set("mac_address", text(mac.to_string().to_lowercase()));
        }
        if let Some(range) = self.addresses {
            set("start_address", text(range.gateway.to_string()));
            set("end_address", text(range.end.to_string()));
            set("subnet_mask", text(range.mask.to_string()));
        }
        if let Some(prefix) = &self.nat66 {
            set("nat66_prefix", text(prefix.clone()));
        }
        let limits = [
            ("read_max_packets", script.read_max_packets),
            ("write_max_packets", script.write_max_packets),
        ];
        for (name, limit) in limits {
            if let (true, Some(limit)) = (told, limit) {
                set(name, Object::U64(limit.into()));
            }
        }
        all
    }
}
