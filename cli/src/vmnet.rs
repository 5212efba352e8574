//! A network of vmnet, as the command line has it: a mode, and what a network object of macOS 26 is given.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use vmring::device::vmnet::{Service, VmnetNetwork};
use vmring::{Error, InterfaceBuilder, Ipv4Range, MacAddr6, Mode, Vmnet};

use crate::device::VMNET;

/// `vmnet[:MODE[,OPTION...]]`. With any option the network is an object of its own, which macOS 26 has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VmnetSpec {
    pub(crate) mode: Mode,
    object: Option<Box<Object>>,
}

/// The settings of a network object. What is not set is Apple's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Object {
    subnet: Option<Ipv4Range>,
    prefix: Option<(Ipv6Addr, u8)>,
    external: Option<String>,
    off: Vec<Service>,
    reservations: Vec<(MacAddr6, Ipv4Addr)>,
}

/// The services of a network, by the names that turn them off.
const SERVICES: [(&str, Service); 5] = [
    ("dhcp", Service::Dhcp),
    ("dns", Service::DnsProxy),
    ("nat", Service::Nat44),
    ("nat66", Service::Nat66),
    ("ra", Service::RouterAdvertisement),
];

const OPTIONS: &str = "network, subnet=GATEWAY/BITS, ipv6=PREFIX/BITS, external=INTERFACE, \
                       reserve=MAC=ADDRESS, dhcp=off, dns=off, nat=off, nat66=off or ra=off";

impl VmnetSpec {
    /// A network that macOS shares among all programs that ask for this mode.
    pub(crate) fn of(mode: Mode) -> Self {
        Self { mode, object: None }
    }

    /// What is behind the colon.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let mode: Mode = parts.next().unwrap_or_default().parse().map_err(in_words)?;
        let mut object = None;
        for option in parts {
            object.get_or_insert_with(Box::<Object>::default).set(option)?;
        }
        if let (Mode::Bridged(_), Some(_)) = (&mode, &object) {
            return Err(format!(
                "'{text}' has options of a network, and a bridged network is somebody else's; leave \
                 them out"
            ));
        }
        let external = object.as_ref().and_then(|object| object.external.as_ref());
        if let (Mode::Host, Some(name)) = (&mode, external) {
            return Err(format!(
                "'external={name}' is for shared mode; a host network leads nowhere"
            ));
        }
        Ok(Self { mode, object })
    }

    /// Creates the network object, if one is asked for. It lives as long as the result, and as an
    /// interface on it.
    ///
    /// # Errors
    ///
    /// Those of [`VmnetNetworkBuilder::create`](vmring::device::vmnet::VmnetNetworkBuilder::create), such as
    /// that macOS is older than 26.
    pub(crate) fn create(&self, mtu: Option<u32>) -> Result<Option<VmnetNetwork>, Error> {
        let Some(object) = &self.object else {
            return Ok(None);
        };
        let Object { subnet, prefix, external, off, reservations } = &**object;
        let mut network = VmnetNetwork::builder(self.mode.clone());
        if let Some(Ipv4Range { start, mask, .. }) = subnet {
            network = network.ipv4(*start, *mask);
        }
        if let Some((prefix, bits)) = prefix {
            network = network.ipv6(*prefix, *bits);
        }
        if let Some(mtu) = mtu {
            network = network.mtu(mtu);
        }
        if let Some(name) = external {
            network = network.external_interface(name);
        }
        for service in off {
            network = network.without(*service);
        }
        for (mac, address) in reservations {
            network = network.reserve(*mac, *address);
        }
        network.create().map(Some)
    }

    /// Gives an interface its place: on the network object if there is one, or in the mode. The MTU is the
    /// object's.
    pub(crate) fn place(
        &self,
        network: Option<&VmnetNetwork>,
        mtu: Option<u32>,
        builder: InterfaceBuilder,
    ) -> (InterfaceBuilder, Vmnet) {
        match (network, mtu) {
            (Some(network), _) => (builder, Vmnet::new().network(network)),
            (None, Some(mtu)) => (builder.mode(self.mode.clone()).mtu(mtu), Vmnet::new()),
            (None, None) => (builder.mode(self.mode.clone()), Vmnet::new()),
        }
    }

    /// Whether an interface of the other is on the same network.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let is_shared = self.object.is_none() && other.object.is_none();
        is_shared && self.mode == other.mode
    }
}

fn in_words(error: vmring::ConfigError) -> String {
    error.to_string()
}

impl Object {
    /// Sets an option, as `name` or `name=value`.
    fn set(&mut self, option: &str) -> Result<(), String> {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let is_service = |(is, _): &&(&str, Service)| *is == name && value == "off";
        match (name, value) {
            ("network", "") => {}
            ("subnet", subnet) => {
                let range: Ipv4Range = subnet.parse().map_err(in_words)?;
                // macOS 26 takes it, and no interface starts on such a network.
                if u32::from(range.start) & !u32::from(range.mask) == 0 {
                    return Err(format!(
                        "'{subnet}' is the subnet's own address; name the gateway's, like \
                         192.168.77.1/24"
                    ));
                }
                self.subnet = Some(range);
            }
            ("ipv6", prefix) => {
                let parsed = prefix.split_once('/').and_then(|(prefix, bits)| {
                    let bits: u8 = bits.parse().ok().filter(|bits| *bits <= 128)?;
                    Some((prefix.parse().ok()?, bits))
                });
                let wrong = || format!("a prefix is one like fd00:1:2:3::/64, and not '{prefix}'");
                self.prefix = Some(parsed.ok_or_else(wrong)?);
            }
            ("external", "") => return Err("external needs an interface, like en0".to_owned()),
            ("external", interface) => self.external = Some(interface.to_owned()),
            ("reserve", one) => {
                let parsed = one.split_once('=').and_then(|(mac, address)| {
                    Some((mac.parse::<MacAddr6>().ok()?, address.parse().ok()?))
                });
                let wrong = || {
                    format!(
                        "a reservation is one like 52:54:00:12:34:56=192.168.77.9, and not '{one}'"
                    )
                };
                self.reservations.push(parsed.ok_or_else(wrong)?);
            }
            _ => match SERVICES.iter().find(is_service) {
                Some((_, service)) => self.off.push(*service),
                None => {
                    return Err(format!("there is no option '{option}' of {VMNET}; use {OPTIONS}"));
                }
            },
        }
        Ok(())
    }
}

impl FromStr for VmnetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text)
    }
}

impl fmt::Display for VmnetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{VMNET}:{}", self.mode)?;
        match self.object {
            Some(_) => f.write_str(",network"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_a_mode_and_options() {
        let spec = VmnetSpec::parse("host").expect("a mode");
        assert_eq!((spec.to_string(), &spec.object), (format!("{VMNET}:host"), &None));
        let text = "shared,subnet=192.168.77.1/24,ipv6=fd00:1:2:3::/64,external=en0,dhcp=off,\
                    reserve=52:54:00:00:00:07=192.168.77.9,nat=off,nat66=off,dns=off,ra=off";
        let spec = VmnetSpec::parse(text).expect("all options");
        let object = spec.object.as_ref().expect("a network of its own");
        assert_eq!(object.subnet.expect("a subnet").start.to_string(), "192.168.77.1");
        assert_eq!(object.prefix, Some(("fd00:1:2:3::".parse().expect("a prefix"), 64)));
        assert_eq!(object.external.as_deref(), Some("en0"));
        assert_eq!((object.off.len(), object.reservations.len()), (5, 1));
        assert_eq!(spec.to_string(), format!("{VMNET}:shared,network"));
        assert_eq!(
            VmnetSpec::parse("shared,network").expect("one with the defaults").object,
            Some(Box::default())
        );
        for (text, said) in [
            ("frob", "the mode must be"),
            ("shared,frob", "there is no option 'frob'"),
            ("shared,dhcp=on", "there is no option 'dhcp=on'"),
            ("shared,subnet=10.0.0.1", "GATEWAY/BITS"),
            ("shared,subnet=192.168.77.0/24", "is the subnet's own address"),
            ("shared,ipv6=fd00::", "a prefix is one like"),
            ("shared,ipv6=fd00::/129", "a prefix is one like"),
            ("shared,reserve=7", "a reservation is one like"),
            ("shared,external=", "needs an interface"),
            ("host,external=en0", "is for shared mode"),
            ("bridged:en0,network", "is somebody else's"),
        ] {
            let refused = VmnetSpec::parse(text).expect_err(text);
            assert!(refused.contains(said), "{text}: {refused}");
        }
    }

    #[test]
    fn two_objects_are_two_networks() {
        let of = |text| VmnetSpec::parse(text).expect(text);
        assert!(of("shared").is_same(&of("shared")));
        assert!(!of("shared").is_same(&of("host")));
        assert!(!of("shared,network").is_same(&of("shared,network")));
        assert!(!of("shared,network").is_same(&of("shared")));
    }

    /// Goal: the object is as it was asked for, an interface is on it, and an older macOS refuses it in
    /// words.
    #[cfg(not(target_os = "macos"))]
    #[test]
    fn a_network_object_is_made_or_refused_in_words() {
        use std::time::Duration;

        use vmnet_sim::World;
        use vmring::Interface;

        use crate::failure::Failure;

        let world = World::new();
        let spec = VmnetSpec::parse("host,subnet=192.168.77.1/24,dhcp=off").expect("options");
        let network = world.enter(|| spec.create(Some(1400))).expect("it is made").expect("asked");
        assert_eq!(network.ipv4().0.to_string(), "192.168.77.1");
        let id = world.interface_id();
        let interface = world.enter(|| {
            let builder = Interface::builder().interface_id(id);
            let (builder, vmnet) = spec.place(Some(&network), Some(1400), builder);
            builder.device(vmnet).start()
        });
        let interface = interface.expect("it starts");
        assert_eq!((interface.mtu(), interface.mode()), (1400, Mode::Host));
        interface.stop(Duration::from_secs(30)).expect("it stops");
        world.set_host(|host| host.macos = (15, 7));
        let refused = world.enter(|| spec.create(None)).expect_err("it is too old");
        let sentence = Failure::starting(refused).to_string();
        assert!(sentence.contains("26"), "{sentence}");
        let plain = VmnetSpec::of(Mode::Shared);
        assert!(world.enter(|| plain.create(None)).expect("nothing is made").is_none());
    }
}
