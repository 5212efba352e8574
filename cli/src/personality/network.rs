//! The network that a helper serves: vmnet on macOS, and elsewhere one that works without it.

use std::collections::hash_map::RandomState;
use std::env;
use std::hash::{BuildHasher, Hasher};
use std::net::Ipv6Addr;

use sha2::{Digest, Sha256};
use vmring::{Ipv4Range, MacAddr6, Mode};

use crate::args::ServeArgs;
use crate::bridge::spec::Spec;
use crate::device::VMNET;
use crate::serve::spec::{ListenSpec, NetworkSettings, NetworkSpec};
use crate::serve::teller::NetworkFacts;
use crate::vmnet::VmnetSpec;

use super::limits::{BRIDGED_MODE, HOST_MODE, SHARED_MODE};
use super::options::uuid_text;

/// The variable that names the network: `vmnet` (on macOS, the default there), and elsewhere `embedded` (the
/// default), `vmnet-sim` or `tap:NAME` (Linux).
pub(super) const VARIABLE: &str = "VMRING_NETWORK";

/// Where the guests are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Embedded,
    Vmnet,
    #[cfg(target_os = "linux")]
    Tap(String),
}

impl Place {
    fn of(name: Option<&str>) -> Result<Self, String> {
        match name {
            None | Some("") if cfg!(target_os = "macos") => Ok(Place::Vmnet),
            None | Some("" | "embedded") => Ok(Place::Embedded),
            Some(VMNET) => Ok(Place::Vmnet),
            #[cfg(target_os = "linux")]
            Some(name) if name.strip_prefix("tap:").is_some_and(|name| !name.is_empty()) => {
                Ok(Place::Tap(name["tap:".len()..].to_owned()))
            }
            Some(other) => {
                let tap = if cfg!(target_os = "linux") { ", tap:NAME" } else { "" };
                Err(format!("{VARIABLE} is embedded{tap} or {VMNET}, and not \"{other}\""))
            }
        }
    }
}

/// Whether vmnet of macOS is used, which takes root or an entitlement.
pub(super) fn is_vmnet() -> bool {
    cfg!(target_os = "macos") && env::var(VARIABLE).map_or(true, |name| name == VMNET)
}

/// Whether the network has vmnet's host interfaces to bridge to.
pub(super) fn has_vmnet() -> Result<bool, String> {
    place().map(|place| place == Place::Vmnet)
}

fn place() -> Result<Place, String> {
    match env::var(VARIABLE) {
        Ok(name) => Place::of(Some(&name)),
        Err(env::VarError::NotPresent) => Place::of(None),
        Err(env::VarError::NotUnicode(_)) => Err(format!("{VARIABLE} is no text")),
    }
}

/// What a helper's command line says of its network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) mode: Mode,
    pub(super) range: Option<Ipv4Range>,
    pub(super) interface_id: Option<[u8; 16]>,
    pub(super) isolated: bool,
    /// The identity of an isolated network in host mode.
    pub(super) identifier: Option<[u8; 16]>,
    pub(super) nat66_prefix: Option<Ipv6Addr>,
    pub(super) without_dhcp: bool,
}

impl Wanted {
    /// Lets the server have this network, and its socket the policy that belongs to it. Returns what is
    /// left out, in sentences.
    ///
    /// # Errors
    ///
    /// A sentence that says what the network of this machine does not have.
    pub(super) fn give(
        self,
        args: &mut ServeArgs,
        socket: &mut ListenSpec,
    ) -> Result<Vec<String>, String> {
        self.give_on(place()?, args, socket)
    }

    fn give_on(
        self,
        place: Place,
        args: &mut ServeArgs,
        socket: &mut ListenSpec,
    ) -> Result<Vec<String>, String> {
        let mut left_out = Vec::new();
        let interface_id = self.interface_id.unwrap_or_else(random_id);
        let mut settings = NetworkSettings {
            interface_id: Some(interface_id),
            guest_mac: Some(mac_of(interface_id)),
            ..NetworkSettings::default()
        };
        if place != Place::Vmnet {
            if self.without_dhcp {
                return Err("a network without DHCP requires macOS 26 or later".to_owned());
            }
            if self.identifier.is_some() {
                return Err("a network identifier requires macOS".to_owned());
            }
            if self.nat66_prefix.is_some() {
                left_out.push("the IPv6 prefix is ignored: the network has IPv4 only".to_owned());
            }
            socket.isolated = self.isolated;
        }
        let network = match (place, self.mode) {
            (Place::Vmnet, mode) => {
                settings = NetworkSettings {
                    ipv4: self.range,
                    isolated: self.isolated,
                    identifier: self.identifier,
                    nat66_prefix: self.nat66_prefix,
                    without_dhcp: self.without_dhcp,
                    ..settings
                };
                Spec::Vmnet(VmnetSpec::of(mode))
            }
            (Place::Embedded, Mode::Bridged(name)) => {
                return Err(format!(
                    "the embedded network cannot be bridged to \"{name}\"; set {VARIABLE} to \
                     {}",
                    if cfg!(target_os = "linux") { "tap:NAME" } else { VMNET }
                ));
            }
            (Place::Embedded, mode) => {
                settings.mode = mode;
                Spec::Embedded { network: "vmnet".to_owned(), subnet: self.range }
            }
            #[cfg(target_os = "linux")]
            (Place::Tap(name), mode) => Spec::Tap {
                name,
                mode: Some(mode),
                subnet: self.range,
                engine: vmring::TapEngine::Auto,
            },
        };
        args.network = Some(NetworkSpec(network));
        args.settings = settings;
        Ok(left_out)
    }
}

/// vmnet's number of a mode.
pub(super) fn number_of(mode: &Mode) -> u32 {
    match mode {
        Mode::Host => HOST_MODE,
        Mode::Bridged(_) => BRIDGED_MODE,
        _ => SHARED_MODE,
    }
}

/// The MAC address that belongs to the identity: the same one gives the same address.
fn mac_of(interface_id: [u8; 16]) -> MacAddr6 {
    let hash = Sha256::new().chain_update(b"vmnet").chain_update(interface_id).finalize();
    let mut mac: [u8; 6] = hash[..6].try_into().expect("six of 32 bytes");
    // One guest's, and assigned by nobody.
    mac[0] = mac[0] & 0xfc | 0x02;
    mac.into()
}

/// An identity that nobody else has (RFC 9562, version 4).
fn random_id() -> [u8; 16] {
    // Each state has keys of its own, which are random.
    let half = || RandomState::new().build_hasher().finish().to_be_bytes();
    let mut id = [0; 16];
    id[..8].copy_from_slice(&half());
    id[8..].copy_from_slice(&half());
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

/// The value of a parameter of vmnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Number(u64),
    Text(String),
}

/// The parameters of a started network, by vmnet's names.
pub(super) fn parameters(facts: &NetworkFacts) -> Vec<(&'static str, Value)> {
    let mut all = vec![
        ("vmnet_write_max_packets", Value::Number(facts.write_batch.into())),
        ("vmnet_read_max_packets", Value::Number(facts.read_batch.into())),
    ];
    let text = |address: std::net::Ipv4Addr| Value::Text(address.to_string());
    if let Some(range) = facts.ipv4 {
        all.push(("vmnet_subnet_mask", text(range.mask)));
    }
    all.push(("vmnet_mtu", Value::Number(facts.mtu.into())));
    if let Some(range) = facts.ipv4 {
        all.push(("vmnet_end_address", text(range.end)));
        all.push(("vmnet_start_address", text(range.start)));
    }
    all.push(("vmnet_interface_id", Value::Text(uuid_text(&facts.interface_id))));
    all.push(("vmnet_max_packet_size", Value::Number(facts.max_packet_size.into())));
    if let Some(prefix) = facts.nat66_prefix {
        all.push(("vmnet_nat66_prefix", Value::Text(prefix.to_string())));
    }
    all.push(("vmnet_mac_address", Value::Text(facts.mac.to_string().to_lowercase())));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::spec::{Kind, Place as SocketPlace};
    use crate::wire::WireKind;

    fn given(wanted: Wanted, place: Place) -> Result<(ServeArgs, ListenSpec, Vec<String>), String> {
        let mut args = ServeArgs::new();
        let place_of_socket = SocketPlace::Server("/s".into());
        let mut socket = ListenSpec::new(Kind::Wire(WireKind::Vfkit), place_of_socket);
        let left_out = wanted.give_on(place, &mut args, &mut socket)?;
        Ok((args, socket, left_out))
    }

    #[test]
    fn the_same_identity_gives_the_same_address() {
        let wanted = |id| Wanted { interface_id: id, ..Wanted::default() };
        let mac = |id| given(wanted(id), Place::Embedded).unwrap().0.settings.guest_mac.unwrap();
        assert_eq!(mac(Some([7; 16])), mac(Some([7; 16])));
        assert_ne!(mac(Some([7; 16])), mac(Some([8; 16])));
        assert_ne!(mac(None), mac(None));
        assert!(mac(None).is_unicast() && mac(None).is_local());
    }

    #[test]
    fn what_a_network_does_not_have_is_refused_or_said() {
        let bridged = Wanted { mode: Mode::Bridged("en0".into()), ..Wanted::default() };
        let refused = given(bridged.clone(), Place::Embedded).unwrap_err();
        assert!(refused.contains("cannot be bridged to \"en0\""), "{refused}");
        let no_dhcp = Wanted { without_dhcp: true, ..Wanted::default() };
        assert!(given(no_dhcp.clone(), Place::Embedded).unwrap_err().contains("macOS 26"));
        let identifier = Wanted { identifier: Some([1; 16]), ..Wanted::default() };
        assert!(given(identifier, Place::Embedded).unwrap_err().contains("requires macOS"));
        let prefix = Wanted { nat66_prefix: "fd00::".parse().ok(), ..Wanted::default() };
        let (args, _, left_out) = given(prefix.clone(), Place::Embedded).unwrap();
        assert_eq!((left_out.len(), args.settings.nat66_prefix), (1, None));
        let (args, _, left_out) = given(prefix.clone(), Place::Vmnet).unwrap();
        assert_eq!((left_out.len(), args.settings.nat66_prefix), (0, prefix.nat66_prefix));
        let (args, ..) = given(bridged, Place::Vmnet).unwrap();
        let bridged = VmnetSpec::of(Mode::Bridged("en0".into()));
        assert_eq!(args.network, Some(NetworkSpec(Spec::Vmnet(bridged))));
        assert!(given(no_dhcp, Place::Vmnet).unwrap().0.settings.without_dhcp);
    }

    #[test]
    fn isolation_is_the_ports_or_vmnets() {
        let isolated = Wanted { isolated: true, ..Wanted::default() };
        let (args, socket, _) = given(isolated.clone(), Place::Embedded).unwrap();
        assert!(socket.isolated && !args.settings.isolated);
        let (args, socket, _) = given(isolated, Place::Vmnet).unwrap();
        assert!(!socket.isolated && args.settings.isolated);
    }

    #[test]
    fn the_variable_names_a_network() {
        assert_eq!(Place::of(Some("embedded")), Ok(Place::Embedded));
        assert_eq!(Place::of(Some(VMNET)), Ok(Place::Vmnet));
        let default = if cfg!(target_os = "macos") { Place::Vmnet } else { Place::Embedded };
        assert_eq!((Place::of(None), Place::of(Some(""))), (Ok(default.clone()), Ok(default)));
        #[cfg(target_os = "linux")]
        assert_eq!(Place::of(Some("tap:t0")), Ok(Place::Tap("t0".into())));
        for wrong in ["tap:", "tap", "lan", "embedded:lab"] {
            assert!(Place::of(Some(wrong)).unwrap_err().contains(VARIABLE), "{wrong}");
        }
    }
}
