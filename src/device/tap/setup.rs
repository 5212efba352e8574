//! The host's end of a TAP: sets it up when an interface starts, and undoes that when it stops.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use macaddr::MacAddr6;
use vmring_embedded::dhcp::DhcpConfig;
use vmring_embedded::{AddressRange as Range, NetworkMode};

use super::dhcp::Dhcp;
use super::forwarding::{self, Forwarding};
use super::limits::{MAC_LOOKS_MAX, SETTLE_PATIENCE};
use super::link::{Link, Netlink, Refusal};
use super::nat::{Network, Rules};
use super::nft::Nft;
use super::open::TapQueueFd;
use super::subnet;
use super::switches::{self, End};
use crate::config::{InterfaceConfig, Ipv4Range, Mode};
use crate::device::dhcp_settings::DhcpSettings;
use crate::error::{ConfigError, Error, TapError};
use crate::sys::after;

/// What an interface requests of the host's end.
pub(crate) struct Asked<'a> {
    pub(crate) name: &'a str,
    /// The interface's index, if the TAP was opened by name and so is in this network namespace.
    pub(crate) index: Option<u32>,
    /// The TAP has just been created, and is deleted when its descriptors are closed.
    pub(crate) fresh: bool,
    /// Whether to set up what the mode says.
    pub(crate) configure: bool,
    pub(crate) config: &'a InterfaceConfig,
    pub(crate) host_mac: Option<MacAddr6>,
    pub(crate) dhcp: bool,
    pub(crate) dhcp_settings: &'a DhcpSettings,
    pub(crate) dns: &'a [Ipv4Addr],
}

/// The settings that were made, and how to undo them.
#[derive(Debug)]
pub(crate) struct Setup {
    netlink: Netlink,
    /// The steps that undo the settings of the interface, in the order in which they were made.
    undo: Vec<Undo>,
    /// The lock, from the time that a network is set up.
    nft: Option<Nft>,
    /// Declared before `forwarding`, so that it is dropped first.
    rules: Option<Rules>,
    forwarding: Option<Forwarding>,
    range: Option<Ipv4Range>,
    /// The TAP goes with its descriptors, so that a step that fails because it has gone is no error.
    fresh: bool,
}

/// What a TAP is to be like when its setup is done.
struct Wanted<'a> {
    index: u32,
    name: &'a str,
    /// `None`: whatever it is.
    mac: Option<MacAddr6>,
    mtu: u32,
    /// `None`: whatever it is.
    master: Option<u32>,
}

impl Wanted<'_> {
    /// Says what is not as it was asked for.
    fn differs_from(&self, link: &Link) -> Option<String> {
        let Self { name, mac, mtu, master, .. } = self;
        if link.name != *name {
            return Some(format!("its name is '{}'", link.name));
        }
        if let Some(mac) = mac.filter(|mac| *mac != link.mac) {
            return Some(format!("its MAC address is {}, and not {mac}", link.mac));
        }
        if *mtu != link.mtu {
            return Some(format!("its MTU is {}, and not {mtu}", link.mtu));
        }
        if master.is_some() && *master != link.master {
            return Some("it is not a port of the bridge".to_owned());
        }
        (!link.up).then(|| "its link is down".to_owned())
    }
}

/// One step of an undo, with the value to put back.
#[derive(Debug)]
enum Undo {
    Down { index: u32 },
    Mtu { index: u32, mtu: u32 },
    Mac { index: u32, mac: MacAddr6 },
    Address { index: u32, address: Ipv4Addr, prefix: u8 },
    Master { index: u32, master: Option<u32> },
}

impl Setup {
    /// Creates a setup that has set nothing yet. It works in the calling thread's network
    /// namespace, and stays there whichever thread uses it later.
    pub(crate) fn open() -> Result<Self, Error> {
        let netlink = Netlink::open()?;
        Ok(Self {
            netlink,
            undo: Vec::new(),
            nft: None,
            rules: None,
            forwarding: None,
            range: None,
            fresh: false,
        })
    }

    /// Returns the interface of that name, or `None` if there is none.
    pub(crate) fn find(&mut self, name: &str) -> Result<Option<Link>, Error> {
        self.netlink.link(name)
    }

    /// Returns the names of the bridges in this setup's network namespace.
    pub(crate) fn bridges(&mut self) -> Result<Vec<String>, Error> {
        self.netlink.bridges()
    }

    /// Whether this setup holds IPv4 forwarding and forwarding was off before.
    pub(crate) fn turned_forwarding_on(&self) -> bool {
        self.forwarding.as_ref().is_some_and(Forwarding::changed)
    }

    /// Returns the IPv4 range of the TAP's network, if an address was set.
    pub(crate) fn range(&self) -> Option<Ipv4Range> {
        self.range
    }

    /// Makes the requested settings, and checks at the end that they hold. Returns the MTU, and the
    /// DHCP server if there is one. If it fails, the settings that it has made are undone when `self`
    /// is dropped.
    pub(crate) fn apply(
        &mut self,
        asked: &Asked<'_>,
        queue: &TapQueueFd,
    ) -> Result<(u32, Option<Dhcp>), Error> {
        let config = asked.config;
        if let Some(mtu) = config.mtu
            && !(68..=65_521).contains(&mtu)
        {
            let sentence = format!("a TAP's MTU is 68 to 65,521 bytes, and not {mtu}");
            return Err(ConfigError::Invalid(sentence).into());
        }
        let end = match (asked.configure, &config.mode) {
            (false, _) => End::Bare,
            (true, Mode::Bridged(_)) => End::Port,
            (true, Mode::Host | Mode::Shared) => End::Routed,
        };
        if config.ipv4.is_some() && end != End::Routed {
            let why = match end {
                End::Port => "the network behind the bridge has addresses of its own",
                _ => "the TAP is left as it is, unless Tap::configure asks to set it up",
            };
            return Err(ConfigError::NotApplicable { what: "IPv4 range of the TAP", why }.into());
        }
        let Some(link) = self.link_of(asked, queue)? else {
            // The descriptor comes from another network namespace. The process that passed it has
            // set the TAP up.
            if asked.configure || asked.host_mac.is_some() {
                return Err(TapError::Setting(
                    "the TAP is in another network namespace, where it cannot be configured from \
                     here",
                )
                .into());
            }
            return Ok((config.mtu.unwrap_or(1500), None));
        };
        self.fresh = asked.fresh;
        let index = link.index;
        if asked.fresh {
            // This is done before the link is up, so that no frame comes before.
            switches::set(asked.name, end)?;
        }
        let bridge = match &config.mode {
            Mode::Bridged(name) if asked.configure => Some(self.bridge(name)?),
            _ => None,
        };
        let bridge_mtu = bridge.as_ref().map(|bridge| bridge.mtu);
        let mac = match &bridge {
            _ if asked.host_mac.is_some() => asked.host_mac,
            _ if !asked.fresh => None,
            Some(bridge) => Some(port_mac(link.mac, bridge.mac)),
            // It keeps the address that it has. Once that is set, it is no longer one that the kernel has
            // chosen at random, which udev replaces (MACAddressPolicy= of systemd.link(5)).
            None => Some(link.mac),
        };
        let wanted = Wanted {
            index,
            name: asked.name,
            mac,
            // A port with a smaller MTU would lower that of the bridge.
            mtu: config.mtu.or(bridge_mtu).unwrap_or(link.mtu),
            master: bridge.as_ref().map(|bridge| bridge.index),
        };
        if let Some(mac) = mac {
            self.netlink.set_mac(index, mac)?;
            self.undo.push(Undo::Mac { index, mac: link.mac });
        }
        if wanted.mtu != link.mtu {
            self.netlink.set_mtu(index, wanted.mtu)?;
            self.undo.push(Undo::Mtu { index, mtu: link.mtu });
        }
        let mut dhcp = None;
        match (&config.mode, &bridge) {
            (_, Some(bridge)) => self.enslave(asked, &link, mac.unwrap_or(link.mac), bridge)?,
            (Mode::Host, _) if asked.configure => {
                dhcp = self.address(asked, &link, NetworkMode::Host, wanted.mtu)?;
            }
            (Mode::Shared, _) if asked.configure => {
                dhcp = self.address(asked, &link, NetworkMode::Shared, wanted.mtu)?;
            }
            _ => {}
        }
        if !link.up {
            self.netlink.set_up(index, true)?;
            self.undo.push(Undo::Down { index });
        }
        self.settle(&wanted)?;
        if let Some(nft) = &mut self.nft {
            nft.unlock();
        }
        if asked.fresh {
            // The other settings disappear with the TAP. The address is removed at the stop, because a
            // child that has just been forked keeps the TAP until it executes its program, and the
            // range is to be free at once.
            self.undo.retain(|step| matches!(step, Undo::Address { .. }));
        }
        Ok((wanted.mtu, dhcp))
    }

    /// Returns the interface of the open TAP, or `None` if it is in another network namespace.
    fn link_of(&mut self, asked: &Asked<'_>, queue: &TapQueueFd) -> Result<Option<Link>, Error> {
        if let Some(index) = asked.index {
            let link = self.netlink.link_at(index)?;
            return link.map(Some).ok_or_else(|| TapError::Gone(asked.name.to_owned()).into());
        }
        // The kernel does not say where a descriptor's TAP is. If an interface of that name has the
        // TAP's MAC address, it is the TAP. Another program may change the address just now, so it is
        // compared before and after.
        for _ in 0..MAC_LOOKS_MAX {
            let before = queue.host_mac()?;
            let Some(link) = self.netlink.link(asked.name)? else { return Ok(None) };
            let after = queue.host_mac()?;
            if link.mac == before || link.mac == after {
                return Ok(Some(link));
            }
            if before == after {
                break;
            }
        }
        Ok(None)
    }

    /// Waits until the TAP is as it was asked for. Programs that watch for new interfaces (udev,
    /// systemd-networkd, NetworkManager) change them within the first milliseconds, so what they have
    /// changed is set again, for up to [`SETTLE_PATIENCE`].
    fn settle(&mut self, wanted: &Wanted<'_>) -> Result<(), Error> {
        let deadline = after(SETTLE_PATIENCE);
        loop {
            let gone = || TapError::Gone(wanted.name.to_owned());
            let link = self.netlink.link_at(wanted.index)?.ok_or_else(gone)?;
            let Some(what) = wanted.differs_from(&link) else { return Ok(()) };
            if Instant::now() >= deadline {
                return Err(TapError::Changed { name: wanted.name.to_owned(), what }.into());
            }
            tracing::debug!(tap = wanted.name, what, "another program has changed the TAP");
            if let Some(mac) = wanted.mac.filter(|mac| *mac != link.mac) {
                self.netlink.set_mac(wanted.index, mac)?;
            }
            if wanted.mtu != link.mtu {
                self.netlink.set_mtu(wanted.index, wanted.mtu)?;
            }
            if wanted.master.is_some() && wanted.master != link.master {
                self.netlink.set_master(wanted.index, wanted.master)?;
            }
            if !link.up {
                self.netlink.set_up(wanted.index, true)?;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Returns the bridge of that name.
    fn bridge(&mut self, name: &str) -> Result<Link, Error> {
        let bridge = self.netlink.link(name)?.filter(|link| link.is_bridge);
        Ok(bridge.ok_or_else(|| TapError::NoBridge(name.to_owned()))?)
    }

    /// Makes the TAP, whose address is `mac`, a port of `bridge`. The bridge's own address stays.
    ///
    /// A bridge whose address nobody has set has the smallest address of its ports
    /// (`br_stp_recalculate_bridge_id` in the kernel's `net/bridge/br_stp_if.c`). So the first port of
    /// a bridge, and a port with a smaller address, would change it. There the bridge is given the
    /// address that it has, which keeps it.
    fn enslave(
        &mut self,
        asked: &Asked<'_>,
        link: &Link,
        mac: MacAddr6,
        bridge: &Link,
    ) -> Result<(), Error> {
        if link.master == Some(bridge.index) {
            return Ok(());
        }
        let ports = self.netlink.links()?;
        let is_first = ports.iter().all(|port| port.master != Some(bridge.index));
        if (is_first || mac < bridge.mac) && bridge.mac != MacAddr6::nil() {
            self.netlink.set_mac(bridge.index, bridge.mac)?;
        }
        self.netlink.set_master(link.index, Some(bridge.index))?;
        self.undo.push(Undo::Master { index: link.index, master: link.master });
        if asked.fresh {
            self.netlink.block_root(link.index)?;
        }
        Ok(())
    }

    /// Sets up host or shared mode: the address, the rules and forwarding. Returns the DHCP server, if
    /// one was requested.
    fn address(
        &mut self,
        asked: &Asked<'_>,
        link: &Link,
        mode: NetworkMode,
        mtu: u32,
    ) -> Result<Option<Dhcp>, Error> {
        let range = asked.config.ipv4.map(|Ipv4Range { start: gateway, end, mask }| Range {
            gateway,
            end,
            mask,
        });
        if let Some(range) = range {
            range.check().map_err(|error| ConfigError::Invalid(error.to_string()))?;
        }
        // The lock is held until the end of the setup, so that no other process takes the same range.
        let locking = |refusal: Refusal| refusal.into_error("waiting for vmring's lock");
        let nft = self.nft.insert(Nft::open().map_err(locking)?);
        nft.lock().map_err(locking)?;
        let range = subnet::choose(&mut self.netlink, link.index, range, mode)?;
        let network_config = asked.dhcp_settings.network(mode, range)?;
        let Range { gateway, end, mask } = range;
        self.range = Some(Ipv4Range { start: gateway, end, mask });
        let prefix = subnet::prefix_of(range);
        if self.netlink.add_address(link.index, gateway, prefix)? {
            self.undo.push(Undo::Address { index: link.index, address: gateway, prefix });
        }
        let shared = mode == NetworkMode::Shared;
        self.rules = Some(Rules::start(Network {
            tap: asked.name,
            address: gateway,
            prefix_len: prefix,
            shared,
        })?);
        if shared {
            self.forwarding = Some(Forwarding::start()?);
        } else if let Some(nft) = &mut self.nft
            && let Err(error) = forwarding::tidy(nft)
        {
            tracing::info!(%error, "a killed process has left IPv4 forwarding on");
        }
        if !asked.dhcp {
            return Ok(None);
        }
        let config = DhcpConfig {
            server: gateway,
            server_mac: asked.host_mac.unwrap_or(link.mac),
            first: network_config.dhcp_first(),
            last: network_config.ipv4.end,
            mask,
            router: shared.then_some(gateway),
            dns: asked.dns.to_vec(),
            mtu: u16::try_from(mtu).ok(),
            lease_time: network_config.lease_time,
        };
        Dhcp::new(config, asked.dhcp_settings, link.index).map(Some)
    }

    /// Undoes the settings, the last one first. Continues after an error, and returns the first
    /// error.
    pub(crate) fn undo(&mut self) -> Result<(), Error> {
        let mut result = Ok(());
        let mut keep = |outcome: Result<(), Error>| {
            if result.is_ok() {
                result = outcome;
            }
        };
        if let Some(nft) = &mut self.nft
            && let Err(refusal) = nft.lock()
        {
            let error = refusal.into_error("waiting for vmring's lock");
            tracing::warn!(%error, "a network stops without vmring's lock");
        }
        self.rules = None;
        if let Some(forwarding) = self.forwarding.take() {
            keep(forwarding.stop());
        }
        while let Some(step) = self.undo.pop() {
            let undone = match step {
                Undo::Down { index } => self.netlink.set_up(index, false),
                Undo::Mtu { index, mtu } => self.netlink.set_mtu(index, mtu),
                Undo::Mac { index, mac } => self.netlink.set_mac(index, mac),
                Undo::Address { index, address, prefix } => {
                    self.netlink.remove_address(index, address, prefix).map(drop)
                }
                Undo::Master { index, master } => self.netlink.set_master(index, master),
            };
            if !self.fresh {
                keep(undone);
            }
        }
        if let Some(mut nft) = self.nft.take() {
            nft.unlock();
        }
        result
    }
}

/// Returns an address for a port that is larger than the bridge's, so that the bridge keeps its own.
/// `random` is the address that the kernel has chosen.
fn port_mac(random: MacAddr6, bridge: MacAddr6) -> MacAddr6 {
    let [_, b, c, d, e, f] = random.into_array();
    // The largest first byte of an address that is locally administered and of one station.
    let mac = MacAddr6::new(0xfe, b, c, d, e, f);
    if mac > bridge { mac } else { MacAddr6::new(0xfe, 0xff, 0xff, d, e, f) }
}

impl Drop for Setup {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::debug!(%error, "the TAP's earlier settings were not all restored");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::link::testing::{Namespace, run};
    use super::*;

    #[test]
    fn what_differs_from_what_was_asked_for_is_said() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            run("ip link add v0 address 02:00:00:00:00:01 type veth peer name v1");
            let mut netlink = Netlink::open().unwrap();
            let index = netlink.link("v0").unwrap().unwrap().index;
            let mac = Some(MacAddr6::new(2, 0, 0, 0, 0, 1));
            let wanted = Wanted { index, name: "v0", mac, mtu: 1400, master: Some(9) };
            for (said, mend) in [
                ("its MTU is 1500, and not 1400", "ip link set v0 mtu 1400"),
                ("it is not a port of the bridge", "ip link add br0 index 9 type bridge"),
                ("it is not a port of the bridge", "ip link set v0 master br0"),
                ("its link is down", "ip link set v0 up"),
            ] {
                let link = netlink.link_at(index).unwrap().unwrap();
                assert_eq!(wanted.differs_from(&link).as_deref(), Some(said));
                run(mend);
            }
            let link = netlink.link_at(index).unwrap().unwrap();
            assert_eq!(wanted.differs_from(&link), None);
            run("ip link set v0 address 02:00:00:00:00:02");
            let link = netlink.link_at(index).unwrap().unwrap();
            let said = "its MAC address is 02:00:00:00:00:02, and not 02:00:00:00:00:01";
            assert_eq!(wanted.differs_from(&link).as_deref(), Some(said));
            let other = Wanted { name: "v9", ..wanted };
            assert_eq!(other.differs_from(&link).as_deref(), Some("its name is 'v0'"));
        });
    }

    /// Goal: what another program changes during the setup is set again.
    #[test]
    fn what_another_program_changes_is_set_again() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            run("ip link add br0 type bridge");
            run("ip link add v0 type veth peer name v1");
            let mut setup = Setup::open().unwrap();
            let index = setup.find("v0").unwrap().unwrap().index;
            let master = Some(setup.find("br0").unwrap().unwrap().index);
            let mac = Some(MacAddr6::new(2, 0, 0, 0, 0, 7));
            setup.settle(&Wanted { index, name: "v0", mac, mtu: 1300, master }).unwrap();
            let link = setup.find("v0").unwrap().unwrap();
            assert_eq!((Some(link.mac), link.mtu, link.master, link.up), (mac, 1300, master, true));
            let other = Wanted { index, name: "v9", mac: None, mtu: 1300, master: None };
            let refused = setup.settle(&other);
            assert!(matches!(refused, Err(Error::Tap(TapError::Changed { .. }))), "{refused:?}");
            let gone = Wanted { index: 7777, ..other };
            let refused = setup.settle(&gone);
            assert!(matches!(refused, Err(Error::Tap(TapError::Gone(_)))), "{refused:?}");
        });
    }

    #[test]
    fn the_address_of_a_port_is_larger_than_that_of_its_bridge() {
        let random = MacAddr6::new(2, 0, 0, 1, 2, 3);
        for bridge in ["02:00:00:00:00:00", "fa:16:3e:00:00:01", "fe:54:00:aa:bb:cc"] {
            let bridge = bridge.parse().unwrap();
            let port = port_mac(random, bridge);
            assert!(port > bridge, "{port}");
            assert!(port.is_local() && port.is_unicast(), "{port}");
        }
    }
}
