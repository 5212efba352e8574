//! The description of an interface: what its start is asked for.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::net::Ipv4Addr;

use vmring_embedded::{AddressRange, NetworkMode};

use crate::keys;
use crate::network::range_from;
use crate::objects::violation;
use crate::script::Value;
use crate::status::{BRIDGED_MODE, HOST_MODE, INVALID_ARGUMENT, SHARED_MODE};
use crate::xpc;

/// A parsed description.
pub(crate) struct Request {
    pub(crate) id: Option<[u8; 16]>,
    pub(crate) mode: u64,
    pub(crate) values: BTreeMap<String, Value>,
}

impl Request {
    /// # Safety
    ///
    /// If `description` is a live XPC object, the caller must hold a reference to it during this
    /// call. The simulator aborts if no live XPC object has this address.
    pub(crate) unsafe fn read(description: *const c_void, on_network: bool) -> Self {
        let role = "the interface's description";
        // SAFETY: guaranteed by the caller.
        let (object, _) = unsafe { xpc::borrow(description, role) };
        let mut values = BTreeMap::new();
        for (name, value) in xpc::values(object, role) {
            let Some(short) = keys::input(&name) else {
                violation(&format!("{role}: there is no key '{name}' that goes in"));
            };
            let expected = keys::input_type(short);
            let found = match value {
                Value::U64(_) => 'u',
                Value::Bool(_) => 'b',
                Value::Str(_) => 's',
                Value::Uuid(_) => 'i',
            };
            if expected != found {
                violation(&format!("{role}: the value of '{short}' is of the wrong type"));
            }
            values.insert(short.to_owned(), value);
        }
        let id = match values.get("interface_id") {
            Some(Value::Uuid(id)) => Some(*id),
            _ => None,
        };
        let mode = match values.get("operation_mode") {
            Some(Value::U64(mode)) => *mode,
            _ if on_network => 0, // the caller takes the network's mode
            _ => violation(&format!("{role}: it has no operation mode")),
        };
        Self { id, mode, values }
    }

    pub(crate) fn str(&self, key: &str) -> Option<&str> {
        match self.values.get(key) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn bool(&self, key: &str) -> Option<bool> {
        match self.values.get(key) {
            Some(Value::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn u64(&self, key: &str) -> Option<u64> {
        match self.values.get(key) {
            Some(Value::U64(value)) => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Whether vmnet's header allows this combination.
    pub(crate) fn allowed(&self) -> bool {
        let range = ["start_address", "end_address", "subnet_mask"].map(|key| self.has(key));
        let bridged = self.mode == BRIDGED_MODE;
        let lawful = [
            matches!(self.mode, HOST_MODE..=BRIDGED_MODE),
            range.iter().all(|has| *has == range[0]),
            !(bridged
                && (range[0] || self.has("mtu") || self.bool("enable_isolation") == Some(true))),
            bridged == self.has("shared_interface_name"),
            self.str("nat66_prefix").is_none_or(|text| {
                self.mode == SHARED_MODE && text.to_ascii_lowercase().starts_with("fd")
            }),
            !self.has("network_identifier") || self.mode == HOST_MODE,
            self.has("host_ip_address") == self.has("host_subnet_mask"),
            !self.has("host_ip_address") || self.has("network_identifier"),
            !(self.bool("enable_virtio_header") == Some(true)
                && self.bool("enable_checksum_offload") == Some(true)),
        ];
        lawful.into_iter().all(|holds| holds)
    }

    /// The addresses of the network that the interface joins: those asked for, or the mode's.
    pub(crate) fn addresses(&self) -> Result<Option<AddressRange>, u32> {
        let address = |key| self.str(key).map(|text| text.parse::<Ipv4Addr>());
        let asked = (address("start_address"), address("end_address"), address("subnet_mask"));
        let host = (address("host_ip_address"), address("host_subnet_mask"));
        if let (Some(gateway), Some(mask)) = host {
            let (Ok(gateway), Ok(mask)) = (gateway, mask) else { return Err(INVALID_ARGUMENT) };
            let range = range_from(gateway, mask);
            range.check().map_err(|_| INVALID_ARGUMENT)?;
            return Ok(Some(range));
        }
        match (self.mode, asked) {
            (BRIDGED_MODE, _) => Ok(None),
            (_, (Some(Ok(gateway)), Some(Ok(end)), Some(Ok(mask)))) => {
                let range = AddressRange { gateway, end, mask };
                range.check().map_err(|_| INVALID_ARGUMENT)?;
                Ok(Some(range))
            }
            (HOST_MODE, (None, ..)) => Ok(Some(AddressRange::of(NetworkMode::Host))),
            (_, (None, ..)) => Ok(Some(AddressRange::of(NetworkMode::Shared))),
            _ => Err(INVALID_ARGUMENT),
        }
    }
}
